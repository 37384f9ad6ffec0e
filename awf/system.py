"""What a run needs, built in the one right order: sandbox, JAX, model, data set, workflow
runner.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from awf.sandbox import Sandbox, SandboxConfig
from awf.types import Problem, SamplingParams, UserError, WorkflowSource, stable_hash
from awf.workflow.contract import PRELOAD, seed_source

log = logging.getLogger("awf")


class System:
  """The parts that all modes of the loop share; a context manager.

  Attributes:
    sandbox: started before JAX, so that its forks hold no accelerator.
    policy: base model with the policy's adapter.
    mesh: of the learner.
    task: the data set.
    validation, test: its problems; test is for evaluation alone.
    search_problems: validation problems that the search may use.
    held_out: validation problems kept for the comparison before/after, never searched or trained
      on.
    seed_source: the workflow that the search starts from.
  """

  def __init__(self, config: ConfigDict, workdir: Any):
    self.config, self.workdir = config, workdir
    self.sandbox = Sandbox(SandboxConfig(**config.sandbox), preload=PRELOAD)
    try:
      self._build()
    except BaseException:
      self.sandbox.close()
      raise

  def _build(self) -> None:
    # JAX is imported from here on.
    from awf.policy import make_policy
    from awf.runtime_setup import setup_jax
    from awf.sharding import make_mesh
    from awf.tasks import make_task

    config = self.config
    self.task = make_task(config.task, self.sandbox)
    validation, test = self.task.split_dataset()
    self.validation, self.test = tuple(validation), tuple(test)
    count = config.eval.parent_problems if config.eval.parent_count else 0
    self.held_out, self.search_problems = hold_out(self.validation, count, config.seed)
    self.seed_source: WorkflowSource = seed_source(self.task.question_type)
    setup_jax()
    self.workdir.record_devices()
    self.mesh = make_mesh(**config.mesh)
    single = self.mesh.size == 1
    self.policy = make_policy(config, None if single else self.mesh)
    self.policy.prompt_ids([{"role": "user", "content": "?"}])  # no chat template: said now
    self.workdir.add_to_record(
      base_fingerprint=self.policy.base_fingerprint,
      trainable_parameters=self.policy.trainable_parameters,
      trainable_share=self.policy.trainable_share,
    )
    self._runners: dict[int, Any] = {}
    log.info(
      "model %s (%.1fM parameters), %d validation and %d test problems",
      config.model.path, self.policy.config.num_parameters / 1e6,
      len(self.validation), len(self.test),
    )  # fmt: skip

  def runner(self, repeat: int = 0) -> Any:
    """The workflow runner whose executor calls draw their `repeat`-th independent noise."""
    from awf.workflow.runner import WorkflowRunner

    if repeat not in self._runners:
      self._runners[repeat] = WorkflowRunner(
        self.sandbox,
        self.policy,
        self.executor_sampling,
        system=self.config.executor.system,
        seed=stable_hash(self.config.seed, "executor", repeat),
        dataset=self.task.dataset,
        question_type=self.task.question_type,
        concurrency=self.config.executor.concurrency,
      )
    return self._runners[repeat]

  def make_trainer(self, rounds: int) -> Any:
    """The learner of a run of so many rounds, from the policy's adapter."""
    import jax

    from awf.grpo.config import GRPOConfig, OptimConfig
    from awf.grpo.trainer import GRPOTrainer

    config, policy = self.config, self.policy
    return GRPOTrainer(
      policy.config,
      policy.params,
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

  def make_search(self, episode: int) -> Any:
    """The search of one episode, counted from 0 over all epochs."""
    from awf.search.config import SearchConfig, load_starts
    from awf.search.mcts import MCTSOptimizer

    config, task = self.config, self.task
    search = SearchConfig.from_config(
      config.search,
      config.reward,
      group_size=config.grpo.group_size,
      refill=config.grpo.refill,
      dataset=task.dataset,
      question_type=task.question_type,
    )
    # The first search is the run's workspace; each further one has its own folder beside it.
    folder = self.workdir.workspace if episode == 0 else self.workdir / f"workspace_{episode + 1}"
    return MCTSOptimizer(
      search,
      self.runner(),
      task,
      self.propose,
      self.search_problems,
      folder,
      stable_hash(config.seed, "search", episode),
      starts=load_starts(config.search.starts),
    )

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
    return await self.policy.propose(messages, n, key, self.policy_sampling)

  def executor_totals(self) -> dict[str, int]:
    """Calls, tokens and programs of all runners since the start."""
    totals: dict[str, int] = {}
    for runner in self._runners.values():
      for name, value in runner.stats().items():
        totals[name] = totals.get(name, 0) + value
    return totals

  def state_dict(self) -> dict[str, Any]:
    """Results of the runners that hung on a clock, as JSON: a resumed run must not see others."""
    states = {str(repeat): runner.state_dict() for repeat, runner in self._runners.items()}
    return {repeat: state for repeat, state in states.items() if any(state.values())}

  def load_state_dict(self, state: dict[str, Any]) -> None:
    """Puts back what `state_dict` gave."""
    for repeat, results in state.items():
      self.runner(int(repeat)).load_state_dict(results)

  def close(self) -> None:
    self.policy.close()
    self.sandbox.close()

  def __enter__(self) -> System:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


def hold_out(
  problems: Sequence[Problem], count: int, seed: int
) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
  """Sets `count` problems aside, the same share of each family, by a seeded hash.

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
  families: dict[str, list[Problem]] = {}
  for p in sorted(problems, key=lambda p: stable_hash(seed, "hold_out", p.id)):
    families.setdefault(p.family, []).append(p)
  rows, chosen = [families[f] for f in sorted(families)], set()
  depth = 0
  while len(chosen) < count:
    for row in rows:
      if depth < len(row) and len(chosen) < count:
        chosen.add(row[depth].id)
    depth += 1
  held = tuple(p for p in problems if p.id in chosen)
  return held, tuple(p for p in problems if p.id not in chosen)
