"""Mode generate: JSON lines in, completions out, on the sampler that training uses."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from ml_collections import ConfigDict

from awf.types import SamplingParams

log = logging.getLogger("awf")


def run_generate(config: ConfigDict, workdir: Any, input: str, output: str) -> dict[str, Any]:
  """Completes every line of `input` with the base, or with the adapter of `config.lora.init_path`.

  Args:
    config: resolved config; `config.sampler` holds the sampling that a line does not set itself,
      unless `config.generate.sampling` asks for the checkpoint's own. A line's `adapter` picks one
      of `config.lora.paths` by name.
    workdir: directory of the run; nothing is written there.
    input: JSON lines of {prompt}, {messages} or {prompt_ids}.
    output: JSON lines to write.

  Raises:
    UserError: a malformed line, with its number.
  """
  import jax

  from awf.policy import make_policy
  from awf.qwen.hf_config import generation_defaults
  from awf.runtime_setup import setup_jax
  from awf.sampler.generate import run_generate as complete_lines
  from awf.sharding import make_mesh

  del workdir
  setup_jax()
  mesh = make_mesh(**config.mesh) if jax.device_count() > 1 else None
  policy = make_policy(config, mesh)
  if not config.lora.init_path:
    policy.set_lora(None)  # nobody asks for a new one; its products would only cost
  s = config.sampler
  sampling = SamplingParams(s.temperature, s.top_p, s.top_k, s.max_new_tokens, min_p=s.min_p)
  if config.generate.sampling == "checkpoint":
    own = generation_defaults(config.model.path)
    log.info("sampling of the checkpoint: %s", own or "none given, config.sampler's instead")
    sampling = dataclasses.replace(sampling, **own)
  try:
    return complete_lines(
      policy,
      input,
      output,
      sampling=sampling,
      seed=config.seed,
      adapter=int(bool(config.lora.init_path)),
    )
  finally:
    policy.close()
