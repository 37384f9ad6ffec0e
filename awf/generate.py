"""Mode generate: JSON lines in, completions out, on the sampler that training uses."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from awf.types import SamplingParams


def run_generate(config: ConfigDict, workdir: Any, input: str, output: str) -> dict[str, Any]:
  """Completes every line of `input` with the base, or with the adapter of `config.lora.init_path`.

  Args:
    config: resolved config; `config.sampler` holds the sampling that a line does not set itself.
    workdir: directory of the run; nothing is written there.
    input: JSON lines of {prompt}, {messages} or {prompt_ids}.
    output: JSON lines to write.

  Raises:
    UserError: a malformed line, with its number.
  """
  import jax

  from awf.policy import make_policy
  from awf.runtime_setup import setup_jax
  from awf.sampler.generate import run_generate as complete_lines
  from awf.sharding import make_mesh

  del workdir
  setup_jax()
  mesh = make_mesh(**config.mesh) if jax.device_count() > 1 else None
  policy = make_policy(config, mesh)
  s = config.sampler
  try:
    return complete_lines(
      policy,
      input,
      output,
      sampling=SamplingParams(s.temperature, s.top_p, s.top_k, s.max_new_tokens),
      seed=config.seed,
      adapter=int(bool(config.lora.init_path)),
    )
  finally:
    policy.close()
