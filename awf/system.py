"""What a run needs, built in the one right order: sandbox, JAX, model, data set, workflow
runner.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from awf.absent import NoPolicy
from awf.banner import banner_lines
from awf.config import is_remote_alone
from awf.config_io import PATH_FIELDS, flatten, load_object
from awf.gauges import Gauges, Peak, find_peak, peak_memory_gb, utilisation
from awf.hosts import Cluster, Hosts
from awf.membership import join, settings
from awf.sandbox import Sandbox, SandboxConfig
from awf.terminal import count_tokens
from awf.types import (
  LLM,
  Problem,
  SamplingParams,
  UserError,
  WorkflowSource,
  price,
  stable_hash,
)
from awf.workflow.contract import PRELOAD, seed_source
from awf.workflow.own import add_operators

log = logging.getLogger("awf")

_SHOW_SECONDS = 60.0  # after which a shared disk shows what another host wrote


class System:
  """The parts that all modes of the loop share; a context manager.

  Attributes:
    sandbox: started before JAX, so that its forks hold no accelerator.
    hosts: the processes of the run.
    executor: what answers the calls of workflows: the policy's base, a remote model, or a
      client of the user's own.
    proposer: what proposes edits: the policy, or a remote model.
    policy: base model with the policy's adapter, on this process's devices; a `NoPolicy` where
      remote models do all.
    mesh: of the learner, over the devices of all processes.
    task: the data set.
    validation, test: its problems; test is for evaluation alone.
    search_problems: validation problems that the search may use.
    held_out: validation problems kept for the comparison before/after, never searched or trained
      on.
    seed_source: the workflow that the search starts from.
    gauges: seconds by part, for the timings.
  """

  def __init__(self, config: ConfigDict, workdir: Any):
    self.config, self.workdir, self.gauges = config, workdir, Gauges()
    self._remotes: list[Any] = []  # clients of remote models
    own = add_operators(config.search.operators)
    self.sandbox = Sandbox(SandboxConfig(**config.sandbox), preload=(*PRELOAD, *own))
    try:
      self._build()
    except BaseException:
      for llm in self._remotes:
        llm.close()
      self.sandbox.close()
      raise

  def _build(self) -> None:
    # JAX is imported from here on.
    from awf.policy import make_policy
    from awf.runtime_setup import setup_jax
    from awf.sharding import local_mesh, make_mesh
    from awf.tasks import make_task
    from awf.tasks.counted import CountedTask

    config = self.config
    self.hosts = self._join()
    self.task: Any = CountedTask(make_task(config.task, self.sandbox))
    validation, test = self.task.split_dataset()
    self.validation, self.test = tuple(validation), tuple(test)
    count = config.eval.parent_problems if config.eval.parent_count else 0
    self.held_out, self.search_problems = hold_out(self.validation, count, config.seed)
    self.seed_source: WorkflowSource = seed_source(self.task.question_type)
    setup_jax()
    self.gauges.watch_compilation()
    self.workdir.record_devices()
    self.mesh = make_mesh(**config.mesh)
    own = local_mesh(self.mesh)
    self.policy: Any = NoPolicy()
    if not is_remote_alone(config):
      self.policy = make_policy(config, None if own.size == 1 else own)
      self.policy.prompt_ids([{"role": "user", "content": "?"}])  # no chat template: said now
    self._version = 0  # of the policy's adapter
    self.workdir.add_to_record(
      base_fingerprint=self.policy.base_fingerprint,
      trainable_parameters=self.policy.trainable_parameters,
      trainable_share=self.policy.trainable_share,
    )
    own = make_executor(config.executor.client)
    self.executor: LLM = self._remote("executor") or own or self.policy
    self.proposer = self._remote("search") or self.policy
    self._proposed = [0, 0]  # prompt and generated tokens of proposals
    self._runners: dict[int, Any] = {}
    count_tokens(self.tokens)
    for line in banner_lines(self):
      log.info("%s", line)
    self._peak: Peak | None = None
    self._check_agreement()

  def _join(self) -> Hosts:
    """Finds the other processes of the run, before JAX sees any device."""
    from awf.runtime_setup import setup_jax

    chosen = settings(self.config)
    if chosen is None:
      return Hosts()
    setup_jax()
    found = join(chosen)
    self.workdir.claim(found.is_writer)
    found.agree(
      "config", self._shared_config(), "start all processes with the same command and code"
    )
    return found

  def _shared_config(self) -> dict[str, Any]:
    """What must be equal; paths may differ, what they hold is compared later."""
    own = ("distributed.", "sandbox.workers", "sandbox.max_children", *PATH_FIELDS)
    return {k: str(v) for k, v in flatten(self.config).items() if not k.startswith(own)}

  def _seen_record(self) -> Any:
    """When the run in DIR began, as process 0 wrote it; a shared disk may show it late."""
    told = self.hosts.meet_now({"started": (self.workdir.record() or {}).get("started")})
    wanted, found = told[0]["started"], None
    deadline = time.monotonic() + _SHOW_SECONDS
    while (found := (self.workdir.record() or {}).get("started")) != wanted:
      if time.monotonic() > deadline:
        break
      time.sleep(0.5)
    return found

  def _check_agreement(self) -> None:
    """What every process reads for itself must be the same."""
    if not isinstance(self.hosts, Cluster):
      return
    from awf.dealt import DealtTask

    problems = stable_hash([[p.id, p.prompt] for p in (*self.validation, *self.test)])
    self.hosts.agree("set of problems", problems, "config.task.path must be the same file")
    base = [self.policy.base_fingerprint, self.policy.trainable_parameters]
    self.hosts.agree("model", base, "config.model.path must be the same checkpoint")
    where = "it must be a directory that all processes share"
    self.hosts.agree("--workdir", self._seen_record(), where)
    self.task = DealtTask(self.task, self.hosts)

  def _remote(self, group: str) -> Any:
    """The remote model of `config.<group>.remote`, asked once; None where there is none."""
    from awf.sampler.remote import RemoteLLM

    fields = self.config[group].remote
    if not fields.url:
      return None
    llm = RemoteLLM.from_config(fields, f"{group}.remote")
    self._remotes.append(llm)
    asyncio.run(llm.check())
    return llm

  def tokens(self) -> int:
    """Generated by this process's engine and its remote models."""
    remote = sum(llm.stats()["tokens"] for llm in self._remotes)
    return int(self.policy.engine.stats()["tokens"]) + remote

  def cost(self) -> float:
    """USD of what this process asked for since the start, by `executor.prices`, `search.prices`."""
    executor = self.executor_totals()
    used = (executor.get("prompt_tokens", 0), executor.get("completion_tokens", 0))
    c = self.config
    return price(used, c.executor.prices) + price(self._proposed, c.search.prices)

  def runner(self, repeat: int = 0) -> Any:
    """The workflow runner whose executor calls draw their `repeat`-th independent noise."""
    from awf.workflow.runner import WorkflowRunner

    if repeat not in self._runners:
      runner = WorkflowRunner(
        self.sandbox,
        self.executor,
        self.executor_sampling,
        system=self.config.executor.system,
        seed=stable_hash(self.config.seed, "executor", repeat),
        dataset=self.task.dataset,
        question_type=self.task.question_type,
        prices=tuple(self.config.executor.prices),
        concurrency=self.config.executor.concurrency,
        watch=lambda: self.gauges.during("evaluate"),
      )
      if isinstance(self.hosts, Cluster):
        from awf.dealt import DealtRunner

        runner = DealtRunner(runner, self.hosts, repeat)
      self._runners[repeat] = runner
    return self._runners[repeat]

  def make_trainer(self, rounds: int) -> Any:
    """The learner of a run of so many rounds, from the policy's adapter."""
    import jax

    from awf.grpo.config import GRPOConfig, OptimConfig
    from awf.grpo.trainer import GRPOTrainer
    from awf.sharding import spread

    config, policy = self.config, self.policy
    return GRPOTrainer(
      policy.config,
      spread(policy.params, self.mesh),
      policy.lora,
      policy.lora_config,
      GRPOConfig.from_config(config.grpo, config.sampler.max_new_tokens),
      OptimConfig.from_config(config.optim, rounds * config.grpo.steps_per_batch),
      self.mesh,
      jax.random.key(stable_hash(config.seed, "learner") >> 32),
      temperature=config.sampler.temperature,
      top_p=config.sampler.top_p,
      top_k=config.sampler.top_k,
      min_p=config.sampler.min_p,
    )

  def serve(self, lora: Any) -> None:
    """Puts an adapter of the learner in place for what is sampled from now on."""
    import jax

    from awf.sharding import gathered_here

    self._version += 1
    own = jax.tree.map(lambda x: x.copy(), lora)  # the next update donates the learner's
    self.policy.set_lora(gathered_here(own, self.mesh))

  def make_search(
    self, number: int, agree: Any = None, problems: Sequence[Problem] | None = None
  ) -> Any:
    """One search.

    Args:
      number: of the search in the run, from 0.
      agree: as in MCTSOptimizer.
      problems: draws of the one problem that it is about; None: all problems of the search.
    """
    from awf.search.adopt import import_workspace
    from awf.search.config import SearchConfig, load_starts
    from awf.search.mcts import MCTSOptimizer

    config, task = self.config, self.task
    fields = dict(config.search)
    # The first search is the run's workspace; each further one has its own folder beside it.
    folder = self.workdir.workspace if number == 0 else self.workdir / f"workspace_{number + 1}"
    if problems is not None:
      fields |= {"curriculum": "none", "full_problems": 0}  # that orders problems; all draws
      name = re.sub(r"[^\w.-]", "_", problems[0].id.rpartition("#")[0])[:60]
      folder = self.workdir.workspace / f"{number + 1:05d}_{name}"
    search = SearchConfig.from_config(
      fields,
      config.reward,
      group_size=config.grpo.group_size,
      refill=config.grpo.refill,
      prices=tuple(config.executor.prices),
      dataset=task.dataset,
      question_type=task.question_type,
    )
    if config.search.workspace and self.hosts.is_writer:
      import_workspace(Path(config.search.workspace), Path(folder), task.dataset)
    optimizer = MCTSOptimizer(
      search,
      self.runner(),
      task,
      self.propose,
      self.search_problems if problems is None else problems,
      folder,
      stable_hash(config.seed, "search", number),
      starts=load_starts(config.search.starts),
      agree=agree,
    )
    optimizer.workspace.is_kept = self.hosts.is_writer
    return optimizer

  @property
  def executor_sampling(self) -> SamplingParams:
    e = self.config.executor
    return SamplingParams(e.temperature, e.top_p, e.top_k, e.max_new_tokens, min_p=e.min_p)

  @property
  def policy_sampling(self) -> SamplingParams:
    s = self.config.sampler
    return SamplingParams(s.temperature, s.top_p, s.top_k, s.max_new_tokens, min_p=s.min_p)

  async def propose(self, messages, n: int, key: int):
    """n completions of the policy for one prompt."""
    with self.gauges.during("rollout"):
      if isinstance(self.hosts, Cluster):
        from awf.dealt import propose

        args = (self.proposer, messages, n, key, self.policy_sampling)
        found = await propose(self.hosts, self._version, *args)
      else:
        found = await self.proposer.propose(messages, n, key, self.policy_sampling)
    if self.hosts.is_writer:  # all processes see all proposals
      for completion in found:
        for i, count in enumerate(completion.counts):
          self._proposed[i] += count
    return found

  def machine(
    self, before: dict[str, Any], now: dict[str, Any], trainer: Any, update_seconds: float
  ) -> dict[str, float]:
    """What a round cost: seconds by part, compilation, memory, shares of the devices' peaks.

    Args:
      before, now: steps and busy_seconds of the engine, and `grader/...`, before the round and
        after it.
      trainer: the learner, or None.
      update_seconds: of its update.
    """
    from awf.qwen.quant import num_bytes

    self._peak = self._peak or find_peak()
    decode = {name: now[name] - before[name] for name in ("steps", "busy_seconds")}
    decode["weight_bytes"] = num_bytes(self.policy.params)
    flops = trainer.flops if trainer is not None else 0.0
    grader = {name: now[name] - before[name] for name in now if name.startswith("grader/")}
    return {
      "time/grade": grader.pop("grader/seconds"),
      **grader,
      **self.gauges.take(),
      **utilisation(self._peak, flops, update_seconds, decode),
      "perf/peak_memory_gb": peak_memory_gb(),
    }

  def executor_totals(self) -> dict[str, int]:
    """Calls, tokens and programs of all runners since the start."""
    totals: dict[str, int] = {}
    for runner in self._runners.values():
      for name, value in runner.stats().items():
        totals[name] = totals.get(name, 0) + value
    return totals

  def counters(self) -> dict[str, Any]:
    """What grader, sandbox, workflows and sampler of this process did since the start."""
    sandbox = {"layers": self.sandbox.probe.layers, **self.sandbox.stats()}
    sandbox.pop("zygote_pid")
    return {
      "grader": self.task.grader_stats(),
      "sandbox": sandbox,
      "workflows": self.executor_totals(),
      "sampler": self.policy.engine.stats(),
    }

  def state_dict(self) -> dict[str, Any]:
    """Results of the runners that hung on a clock, as JSON: a resumed run must not see others."""
    states = {str(repeat): runner.state_dict() for repeat, runner in self._runners.items()}
    return {repeat: state for repeat, state in states.items() if any(state.values())}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    """Puts back what `state_dict` gave."""
    for repeat, results in state.items():
      self.runner(int(repeat)).load_state_dict(results)

  def close(self) -> None:
    count_tokens(None)
    for llm in self._remotes:
      llm.close()
    self.policy.close()
    self.sandbox.close()

  def __enter__(self) -> System:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def make_executor(name: str) -> LLM | None:
  """The client that `config.executor.client` names, made without arguments; None without a name.

  Raises:
    UserError: it cannot be imported or made, or has no `complete`.
  """
  if not name:
    return None
  field = "config.executor.client"
  make = load_object(name, field)
  try:
    client = make()
  except Exception as error:  # whatever the user's class raises, for want of a key for instance
    raise UserError(f"{field} = {name!r}: {type(error).__name__}: {error}") from error
  if not isinstance(client, LLM):
    raise UserError(
      f"{field} = {name!r}: expected `async def complete(self, messages, sampling, key, adapter=0)`"
    )
  return client


def hold_out(
  problems: Sequence[Problem], count: int, seed: int
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
  """Sets `count` problems aside, of each family its share (rounded), by a seeded hash.

  Returns:
    (held out, the rest), both in the order of `problems`.

  Raises:
    UserError: nothing would be left.
  """
  if count >= len(problems):
    raise UserError(
      f"config.eval.parent_problems: {count} held-out problems leave none of the "
      f"{len(problems)} validation problems to the search; lower it"
    )
  order = sorted(problems, key=lambda p: (p.family, stable_hash(seed, "hold_out", p.id)))
  start = stable_hash(seed, "hold_out") % len(order)
  share = Counter(order[(i * len(order) + start) // count].family for i in range(count))
  chosen = set()
  for p in order:
    if share[p.family] > 0:
      share[p.family] -= 1
      chosen.add(p.id)
  held = tuple(p for p in problems if p.id in chosen)
  return held, tuple(p for p in problems if p.id not in chosen)
