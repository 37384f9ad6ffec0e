"""Mode sft: supervised cold start on JSON lines of {prompt, response} (or {messages, response})."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from awf.backup import status_figures
from awf.checkpoint import Checkpointer
from awf.grpo.config import OptimConfig
from awf.grpo.sft import Batch, SFTTrainer, batches, pack_examples
from awf.interrupt import Interrupted, StopRequest
from awf.metrics import MetricsLogger
from awf.policy import dtype_name, initial_lora
from awf.qwen import hf
from awf.qwen.config import QwenConfig
from awf.qwen.lora import Lora, LoRAConfig, count
from awf.qwen.model import init_params
from awf.qwen.peft import save_adapter
from awf.qwen.quant import QuantConfig
from awf.qwen.tokenizer import Tokenizer, load_tokenizer
from awf.runtime_setup import setup_jax
from awf.sharding import make_mesh
from awf.terminal import track
from awf.types import UserError

log = logging.getLogger("awf")


def run_sft(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Trains all weights or a LoRA on the file of `config.sft.path`; resumes by itself.

  Raises:
    UserError: malformed line (with its number), nothing to train on, sizes that do not fit.
  """
  setup_jax()
  workdir.record_devices()
  sft, start = config.sft, time.perf_counter()
  mesh = make_mesh(**config.mesh) if jax.device_count() > 1 else None
  model_config, params, tokenizer = load_or_init(config, mesh)
  _check_save(config)
  examples = read_examples(sft.path, tokenizer, sft.steps * sft.batch * sft.length)
  packed = pack_examples(examples, sft.length, sft.prompt_weight, config.seed)
  lora_config = LoRAConfig.from_config(config.lora)
  lora = None
  if sft.weights == "lora":
    lora = initial_lora(config, model_config, lora_config, hf.fingerprint(config.model.path))
  share = _trainable_share(lora, model_config)
  base = hf.fingerprint(config.model.path) if lora is not None else ""
  workdir.add_to_record(trainable_share=share, base_fingerprint=base)
  log.info("%.3f %% of the parameters are trained", 100 * share)
  trainer = SFTTrainer(
    model_config,
    params,
    OptimConfig.from_config(config.optim, sft.steps),
    mesh,
    weights=sft.weights,
    lora=lora,
    lora_config=lora_config if lora is not None else None,
  )
  del params  # the trainer has them, or a copy that it trains
  checkpoints = Checkpointer(workdir.checkpoints, config.train.keep_checkpoints)
  with MetricsLogger(workdir) as metrics, StopRequest() as stop, ExitStack() as stages:
    done = step = _resume(trainer, checkpoints, metrics)
    last: dict[str, float] = {}
    start = time.perf_counter()

    def save(step: int) -> None:
      checkpoints.save(step, trainer.state, {"done": step, "rows": metrics.position})

    def until_stopped(rows: Iterator[Batch]) -> Iterator[Batch]:
      nonlocal step
      for row in rows:
        if stop.number:
          return
        step += 1
        yield row

    rows = until_stopped(itertools.islice(batches(packed, sft.batch, config.seed), done, None))
    shown = stages.enter_context(track("steps", sft.steps, step))
    while step < sft.steps:
      # Rows of metrics are at the multiples of log_every, wherever a run was interrupted.
      target = min(step + sft.log_every - step % sft.log_every, sft.steps)
      values = trainer.train(itertools.islice(rows, target - step))
      if stop.number:
        if step > done:
          save(step)
        checkpoints.close()
        raise Interrupted(stop.number, {"steps": step})
      seconds = time.perf_counter() - start
      speed = (step - done) * sft.batch * sft.length / max(seconds, 1e-9)
      left = (sft.steps - step) * sft.batch * sft.length / max(speed, 1e-9)
      clock = {"perf/tokens_per_second": speed, "time/step": seconds, **status_figures(workdir)}
      metrics.log(step, values, timings=clock)
      log.info(
        "step %d of %d, loss %.4f, %.0f tokens/s, %.0f s left",
        step, sft.steps, values["loss"], speed, left,
      )  # fmt: skip
      shown.advance(step - shown.done, **{"loss": values["loss"], "tokens/s": int(speed)})
      last = values
      if step % (10 * sft.log_every) == 0 or step == sft.steps:
        save(step)
  checkpoints.close()
  saved = _save(config, workdir, trainer, model_config, tokenizer, lora_config)
  return {
    "loss": last.get("loss"),
    "steps": sft.steps,
    "examples": len(examples),
    "parameters": model_config.num_parameters,
    "trainable_share": _trainable_share(lora, model_config),
    "saved": saved,
    "wall_seconds": round(time.perf_counter() - start, 1),
  }


def _trainable_share(lora: Lora | None, model_config: QwenConfig) -> float:
  """Trained numbers as a share of the base's; all weights are 1."""
  return 1.0 if lora is None else count(lora) / model_config.num_parameters


def load_or_init(config: ConfigDict, mesh: Mesh | None = None) -> tuple[QwenConfig, Any, Tokenizer]:
  """The checkpoint of `config.model.path`, or a model made from `config.model.architecture`.

  Args:
    config: resolved config.
    mesh: where the checkpoint's weights lie; None is the default device.
  """
  dtype = dtype_name(config.model.compute_dtype, "compute_dtype")
  if config.model.path:
    path = hf.resolve_path(config.model.path)
    model_config = hf.load_config(path, dtype)
    stored, quant = dtype_name(config.model.dtype, "dtype"), QuantConfig.from_config(config.model)
    params = hf.load_params(path, model_config, stored, mesh, quant)
    return model_config, params, load_tokenizer(config.model.tokenizer or path)
  if not config.model.architecture.vocab_size or not config.model.tokenizer:
    raise UserError(
      "config.model.path is empty: give a checkpoint, or config.model.tokenizer and "
      "config.model.architecture.vocab_size for a model from nothing"
    )
  if config.sft.weights != "all":
    raise UserError("config.sft.weights: a model from nothing needs 'all', got 'lora'")
  tokenizer = load_tokenizer(config.model.tokenizer)
  model_config = QwenConfig(**config.model.architecture.to_dict(), dtype=dtype)
  if tokenizer.vocab_size > model_config.vocab_size:
    raise UserError(
      f"config.model.architecture.vocab_size: the tokenizer has {tokenizer.vocab_size} ids, got "
      f"{model_config.vocab_size}"
    )
  return model_config, init_params(model_config, jax.random.key(config.seed)), tokenizer


def read_examples(
  path: str, tokenizer: Tokenizer, tokens: int = 0
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """Reads (prompt ids, response ids) pairs; the response ends with the end-of-turn id.

  Args:
    path: JSON lines of {"prompt", "response"} or {"messages", "response"}.
    tokenizer: of the model.
    tokens: stop reading after this many; 0 reads all.

  Raises:
    UserError: no file, a malformed line (number named), or no example.
  """
  if not path or not Path(path).is_file():
    raise UserError(f"config.sft.path: expected a JSON-lines file, found none at {path!r}")
  end = tokenizer.encode("<|im_end|>", allow_special=True)
  end = end if len(end) == 1 else [tokenizer.stop_ids[0]]
  examples, count = [], 0
  with open(path, encoding="utf-8") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        row = json.loads(line)
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        prompt = tuple(tokenizer.chat_ids(messages))
        response = (*tokenizer.encode(row["response"]), *end)
      except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
          f"config.sft.path: {path} line {number}: expected an object with prompt (or messages) "
          f"and response, got {line.strip()[:60]!r} ({type(e).__name__})"
        ) from e
      examples.append((prompt, response))
      count += len(prompt) + len(response)
      if tokens and count > tokens * 1.02:
        break
  if not examples:
    raise UserError(f"config.sft.path: {path} holds no example")
  return examples


def _resume(trainer: SFTTrainer, checkpoints: Checkpointer, metrics: MetricsLogger) -> int:
  found = checkpoints.restore(trainer.state)
  if found is None:
    metrics.truncate(-1)
    return 0
  _, trainer.state, extra = found
  metrics.truncate(extra["done"], extra.get("rows"))
  log.info("resumed at step %d", extra["done"])
  return extra["done"]


def _check_save(config: ConfigDict) -> None:
  """Refuses an unwritable target before hours are spent."""
  if not config.sft.save:
    return
  try:
    Path(config.sft.save).mkdir(parents=True, exist_ok=True)
    probe = Path(config.sft.save) / ".probe"
    probe.touch()
    probe.unlink()
  except OSError as e:
    raise UserError(f"config.sft.save: cannot write {config.sft.save} ({e.strerror})") from e


def _save(config, workdir, trainer, model_config, tokenizer, lora_config) -> str:
  """Writes the result: a Hugging Face checkpoint, or a PEFT adapter."""
  folder = Path(config.sft.save or workdir / "model")
  if config.sft.weights == "lora":
    base = hf.fingerprint(config.model.path)
    save_adapter(folder, trainer.params, lora_config, str(config.model.path), base)
    return str(folder)
  hf.save_checkpoint(
    folder,
    trainer.params,
    model_config,
    tokenizer.files,
    dtype=config.sft.save_dtype,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
  )
  return str(folder)
