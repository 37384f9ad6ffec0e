"""QwenPolicy: base weights, adapter, tokenizer and sampler engine behind one object.

Adapter index 0 is the base (the executor that workflows call), 1 the policy's own adapter. Both run
on the same arrays. Subclass it for an own policy: `prompt_ids` decides what the model reads,
`complete` and `propose` how it answers.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from awf.config import longest_completion
from awf.config_io import find_path, load_class, named_paths
from awf.qwen import hf
from awf.qwen.config import QwenConfig
from awf.qwen.lora import Lora, LoRAConfig, count, init_lora, scaled, stack_adapters, widen
from awf.qwen.model import Qwen, head
from awf.qwen.peft import load_adapter, save_adapter
from awf.qwen.quant import QuantConfig
from awf.qwen.tokenizer import Tokenizer, load_tokenizer
from awf.sampler.engine import Engine, Output, Request
from awf.sampler.text import cut
from awf.sharding import tree_shardings
from awf.types import Completion, SamplingParams, UserError, stable_hash

if TYPE_CHECKING:
  from ml_collections import ConfigDict

log = logging.getLogger("awf")

BASE, ADAPTER = 0, 1  # adapter indices of the engine
_CHUNK = 128  # positions whose logits exist at a time while scoring


def load_base(
  path: Path, config: QwenConfig, dtype: str, mesh: Mesh | None, quant: QuantConfig
) -> dict[str, Any]:
  """Base weights in the layout that multiplies fastest where they go; else as `hf.load_params`."""
  return hf.load_params(path, config, dtype, mesh, quant, base_is_turned(mesh, quant))


def base_is_turned(mesh: Mesh | None, quant: QuantConfig) -> bool:
  """Whether float matrices lie as [out, in], which multiplies faster on one CPU device."""
  return mesh is None and quant.method == "none" and jax.default_backend() == "cpu"


class QwenPolicy:
  """A base model with its own adapter, and others by name; implements `awf.types.LLM`.

  Attributes:
    config: architecture.
    params: frozen base parameters, shared with the engine and the learner.
    tokenizer: text and chat messages to ids.
    lora: the adapter, not scaled, or None for the bare base.
    lora_config: its rank, alpha and targets.
    engine: the sampler.
    base_name, base_fingerprint: of the base's checkpoint, kept in saved adapters; "" when unknown.
  """

  base_name = ""
  base_fingerprint = ""

  def __init__(
    self,
    config: QwenConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    lora: Lora | None,
    lora_config: LoRAConfig,
    engine: Engine,
  ) -> None:
    self.config, self.params, self.tokenizer = config, params, tokenizer
    self.lora_config, self.engine = lora_config, engine
    self._others: dict[str, Lora] = {}  # scaled, by name
    self.set_lora(lora)

  @classmethod
  def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> QwenPolicy:
    """Loads model and tokenizer, makes (or reads) the adapter and starts the engine.

    Args:
      config: a resolved config with the fields of configs/base.py.
      mesh: where the weights live; None is the default device.

    Raises:
      UserError: a checkpoint, adapter or field that cannot be used, named.
    """
    quant = QuantConfig.from_config(config.model)
    path = hf.resolve_path(config.model.path)
    model_config = hf.load_config(path, dtype_name(config.model.compute_dtype, "compute_dtype"))
    tokenizer = load_tokenizer(config.model.tokenizer or path)
    _check_sizes(config, model_config, tokenizer)
    dtype = dtype_name(config.model.dtype, "dtype")
    params = load_base(path, model_config, dtype, mesh, quant)
    lora_config = LoRAConfig.from_config(config.lora)
    base = hf.fingerprint(path)
    others = {
      name: load_adapter(find_path(folder), model_config, f"config.lora.paths ({name})", base)
      for name, folder in named_paths(config.lora.paths).items()
    }
    lora = initial_lora(config, model_config, lora_config, base)
    engine = Engine(
      model_config,
      params,
      rows=config.sampler.rows,
      context=config.sampler.context,
      prefill_rows=config.sampler.prefill_rows,
      steps_per_dispatch=config.sampler.steps_per_dispatch,
      max_new_tokens=longest_completion(config),
      prompt_bytes=int(config.sampler.prompt_cache_gb * 2**30),
      strict=config.sampler.strict,
      queue=config.sampler.queue,
      decode=tokenizer.decode,
      mesh=mesh,
    )
    lora = jax.device_put(lora, tree_shardings(lora, mesh)) if mesh is not None else lora
    policy = cls(model_config, params, tokenizer, lora, lora_config, engine)
    policy.base_name, policy.base_fingerprint = str(config.model.path), base
    policy.add_adapters({name: scaled(*found) for name, found in others.items()})
    log.debug(
      "adapter of rank %d: %d trainable parameters, %.3f %% of the base",
      lora_config.rank, policy.trainable_parameters, 100 * policy.trainable_share,
    )  # fmt: skip
    return policy

  def set_lora(self, lora: Lora | None) -> None:
    """Puts an adapter in place for requests submitted from now on; None leaves the base alone."""
    own = None if lora is None else scaled(lora, self.lora_config)
    self.lora, self._scaled = lora, own
    if own is None and not self._others:
      self.engine.set_adapters(None)
      return
    adapters = [own or {}, *self._others.values()]
    adapters = widen(adapters) if self._others else adapters
    stacked = stack_adapters(adapters)
    if self.engine.mesh is not None:
      stacked = jax.device_put(stacked, tree_shardings(stacked, self.engine.mesh))
    self.engine.set_adapters(stacked)

  def add_adapters(self, adapters: dict[str, Lora]) -> None:
    """Puts further scaled adapters beside the own one; each row of a batch picks its own by name.

    Their ranks and targets may differ. They serve requests submitted from now on.
    """
    if adapters:
      self._others |= adapters
      self.set_lora(self.lora)

  def adapter_index(self, name: str) -> int:
    """The engine's index of an adapter: "base", "policy", or a name of `add_adapters`.

    Raises:
      UserError: no adapter of that name.
    """
    known = ["base", "policy", *self._others]
    if name not in known or (name == "policy" and self.lora is None):
      raise UserError(
        f"adapter {name!r} is not loaded; expected one of {', '.join(known)}: add it to "
        "config.lora.paths as NAME=DIR"
      )
    return known.index(name)

  @property
  def trainable_parameters(self) -> int:
    """Numbers of the own adapter."""
    return 0 if self.lora is None else count(self.lora)

  @property
  def trainable_share(self) -> float:
    """The own adapter's numbers as a share of the base's."""
    return self.trainable_parameters / self.config.num_parameters

  def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """Ids of a chat up to the assistant's turn."""
    return tuple(self.tokenizer.chat_ids(messages, add_generation_prompt=True))

  async def complete(
    self,
    messages: list[dict[str, str]],
    sampling: SamplingParams,
    key: int,
    adapter: int = BASE,
  ) -> Completion:
    """Draws one completion; a function of its arguments and the adapter's values alone."""
    request = self.request(self.prompt_ids(messages), sampling, key, 1, adapter)
    (output,) = await self.engine.asubmit(request)
    return self.completion(request, output)

  async def propose(
    self, messages: list[dict[str, str]], n: int, key: int, sampling: SamplingParams
  ) -> list[Completion]:
    """Draws n completions of one prompt with the policy's adapter: a group."""
    adapter = BASE if self.lora is None else ADAPTER
    request = self.request(self.prompt_ids(messages), sampling, key, n, adapter)
    return [self.completion(request, output) for output in await self.engine.asubmit(request)]

  def request(
    self, prompt_ids: Sequence[int], sampling: SamplingParams, key: int, n: int, adapter: int
  ) -> Request:
    """An engine request that also stops at the tokenizer's end-of-turn ids."""
    is_set = adapter == BASE or (adapter == ADAPTER and self.lora is not None)
    if not (is_set or ADAPTER < adapter <= ADAPTER + len(self._others)):
      raise ValueError(f"adapter: expected 0 (base) or the index of a set one, got {adapter}")
    return Request(
      prompt_ids=tuple(prompt_ids),
      n=n,
      seed=key,
      temperature=sampling.temperature,
      top_p=sampling.top_p,
      top_k=sampling.top_k,
      min_p=sampling.min_p,
      max_new_tokens=sampling.max_new_tokens,
      stop_ids=tuple(sorted({*self.tokenizer.stop_ids, *sampling.stop_ids})),
      stop=tuple(sampling.stop),
      logprobs=sampling.logprobs,
      adapter=adapter,
    )

  def completion(self, request: Request, output: Output) -> Completion:
    """An engine output with its text.

    Ids and log-probs stay as drawn. A stop id leaves the text; a stop string leaves it too, with
    what the token that completed it says beyond.
    """
    by_id = output.finish_reason == "stop" and output.stop is None
    text = self.tokenizer.decode(output.token_ids[:-1] if by_id else output.token_ids)
    return Completion(
      prompt_ids=tuple(request.prompt_ids),
      token_ids=tuple(output.token_ids),
      logprobs=tuple(output.logprobs),
      text=text if output.stop is None else cut(text, request.stop),
      finish_reason=output.finish_reason,
      full_logprobs=tuple(output.full_logprobs),
    )

  def logprobs(
    self,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    adapter: int = ADAPTER,
    temperature: float = 1.0,
  ) -> list[float]:
    """Log-probabilities of a completion by one full forward pass, without the sampler's cache.

    Args:
      prompt_ids: at least one id.
      token_ids: the completion's ids.
      adapter: 0 is the base, 1 the policy's adapter.
      temperature: of the softmax, positive; top-k and top-p are not applied.

    Returns:
      One float per completion id.
    """
    if not prompt_ids or temperature <= 0:
      raise ValueError("expected at least one prompt id and a positive temperature")
    if not token_ids:
      return []
    ids = [*prompt_ids, *token_ids]
    size = max(_CHUNK, 1 << (len(ids) - 1).bit_length())  # powers of two: few traces
    tokens_BT = np.zeros((1, size + 1), np.int32)
    tokens_BT[0, : len(ids)] = ids
    lora = self._scaled if adapter == ADAPTER else None
    logp_T = _score(self.config, self.params, lora, tokens_BT, np.float32(temperature))
    return np.asarray(logp_T)[len(prompt_ids) - 1 : len(ids) - 1].tolist()

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the adapter as a PEFT directory; the base stays where it is.

    Raises:
      ValueError: there is no adapter.
    """
    if self.lora is None:
      raise ValueError("this policy has no adapter to save")
    save_adapter(path, self.lora, self.lora_config, self.base_name, self.base_fingerprint)

  def load(self, path: str | os.PathLike[str]) -> None:
    """Reads a PEFT directory and puts its adapter in place.

    Raises:
      UserError: the adapter does not fit the model.
    """
    lora, self.lora_config = load_adapter(path, self.config, str(path), self.base_fingerprint)
    self.set_lora(lora)

  def close(self) -> None:
    """Ends the engine's thread."""
    self.engine.close()


def make_policy(config: ConfigDict, mesh: Mesh | None = None) -> QwenPolicy:
  """The policy that `config.model.policy` names: QwenPolicy, or a subclass of the user's own.

  Raises:
    UserError: no such class, or as `QwenPolicy.from_config`.
  """
  chosen = load_class(config.model.policy, "config.model.policy", QwenPolicy)
  return chosen.from_config(config, mesh)


@functools.partial(jax.jit, static_argnums=(0,))
def _score(config, params, lora, tokens_BT, temperature):
  """log p of each next token, [T]; logits of `_CHUNK` positions exist at a time."""
  collections = {"params": params} if lora is None else {"params": params, "lora": lora}
  inputs_BT, targets_T = tokens_BT[:, :-1], tokens_BT[0, 1:]
  positions_BT = jnp.arange(inputs_BT.shape[1], dtype=jnp.int32)[None]
  hidden_BTD, _ = Qwen(config).apply(collections, inputs_BT, positions_BT)

  def chunk(part):
    hidden_CD, targets_C = part
    logp_CV = jax.nn.log_softmax(head(params, hidden_CD) / temperature, axis=-1)
    return jnp.take_along_axis(logp_CV, targets_C[:, None], axis=-1)[:, 0]

  parts = (hidden_BTD[0].reshape(-1, _CHUNK, config.hidden_size), targets_T.reshape(-1, _CHUNK))
  return jax.lax.map(chunk, parts).reshape(-1)


def initial_lora(
  config: ConfigDict, model_config: QwenConfig, lora_config: LoRAConfig, base: str = ""
) -> Lora:
  """The adapter that training starts from: that of `config.lora.init_path`, or a new one.

  Args:
    config: resolved config.
    model_config: architecture of the base.
    lora_config: what the config asks for.
    base: fingerprint of the base; "" does not compare it.

  Raises:
    UserError: the adapter differs from what the config asks for, or belongs to another base.
  """
  if not config.lora.init_path:
    key = jax.random.key(stable_hash(config.seed, "lora") >> 32)
    return init_lora(model_config, lora_config, key)
  lora, found = load_adapter(config.lora.init_path, model_config, base_fingerprint=base)
  if _comparable(found) != _comparable(lora_config):
    raise UserError(
      f"config.lora: {config.lora.init_path} has {found}, the config asks for {lora_config}; "
      "set config.lora.rank, alpha, targets and rslora to the adapter's"
    )
  return lora


def _comparable(config: LoRAConfig) -> tuple[int, float, bool, frozenset[str]]:
  return config.rank, config.alpha, config.rslora, frozenset(config.targets)


def dtype_name(name: str, field: str) -> str:
  """Resolves "auto" (float32 on CPU, bfloat16 elsewhere) and checks the name.

  Raises:
    UserError: an unknown dtype of `config.model.<field>`.
  """
  if name == "auto":
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if name not in hf.DTYPES:
    raise UserError(f"config.model.{field}: expected auto, {', '.join(hf.DTYPES)}, got {name!r}")
  return name


def _check_sizes(config: ConfigDict, model_config: QwenConfig, tokenizer: Tokenizer) -> None:
  if config.sampler.context > model_config.max_position_embeddings:
    raise UserError(
      f"config.sampler.context: {config.sampler.context} is more than the model's "
      f"{model_config.max_position_embeddings} positions; lower it"
    )
  if tokenizer.vocab_size > model_config.vocab_size:
    raise UserError(
      f"config.model.path: the tokenizer knows {tokenizer.vocab_size} ids, the model only "
      f"{model_config.vocab_size}; expected files of one checkpoint"
    )
  if tokenizer.vocab_size < model_config.vocab_size:
    log.info(
      "the vocabulary is padded: %d ids beyond the tokenizer's %d have no text",
      model_config.vocab_size - tokenizer.vocab_size, tokenizer.vocab_size,
    )  # fmt: skip
