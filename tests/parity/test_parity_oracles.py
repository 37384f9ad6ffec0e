"""TRL 1.16.0's `GRPOTrainer._compute_loss` and verl 0.9.1's `core_algos`, run on random batches.

Both are installed without their dependencies, so their functions are compiled from the installed
sources, each with the names that it uses. AWF_WRITE_GOLDEN=1 writes the numbers that
tests/test_grpo_oracles.py compares with where there is no torch.
"""

import ast
import importlib.metadata
import importlib.util
import os
import pathlib
import types
from collections import defaultdict

import numpy as np
import oracle_cases as oracle
import pytest
import torch

VERSIONS = {"trl": "1.16.0", "verl": "0.9.1"}


def source(package, path):
  assert importlib.metadata.version(package) == VERSIONS[package]
  (folder,) = importlib.util.find_spec(package).submodule_search_locations
  return ast.parse(pathlib.Path(folder, path).read_text())


def compiled(nodes, names):
  """Runs definitions or statements as they stand in a source, in a namespace of their own."""
  for node in nodes:
    if isinstance(node, ast.FunctionDef):
      node.decorator_list, node.returns = [], None
      for arg in (*node.args.args, *node.args.kwonlyargs, node.args.kwarg):
        if arg is not None:
          arg.annotation = None
  exec(compile(ast.Module(list(nodes), []), "oracle", "exec"), names)
  return names


def functions(tree, *wanted):
  nodes = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in wanted]
  assert len(nodes) == len(wanted)
  return nodes


def assigned(block):
  """Names that the statements of a block assign, not counting blocks inside it."""
  statements = [s for s in block.body if isinstance(s, ast.Assign)]
  return {ast.unparse(s.targets[0]) for s in statements}


# TRL


class Trl:
  """`_compute_loss`, and the statements of TRL's that make advantages and corrections."""

  def __init__(self):
    tools = functions(source("trl", "trainer/utils.py"), "nanmin", "nanmax", "nanstd")
    self.names = compiled(tools, {"torch": torch, "math": __import__("math")})
    tree = source("trl", "trainer/grpo_trainer.py")
    trainer = next(n for n in tree.body if getattr(n, "name", "") == "GRPOTrainer")
    methods = {n.name: n for n in trainer.body if isinstance(n, ast.FunctionDef)}
    self.compute_loss = compiled([methods["_compute_loss"]], self.names)["_compute_loss"]
    blocks = [n for n in ast.walk(trainer) if isinstance(n, ast.If)]
    self.ratio_block = next(b for b in blocks if "per_token_logps_diff" in assigned(b))
    self.advantage_block = next(
      b
      for b in blocks
      if ast.unparse(b.test).startswith("self.multi_objective_aggregation == 'sum")
    )

  def importance(self, c, old, sampled, mask):
    me = types.SimpleNamespace(
      use_vllm=True,
      vllm_importance_sampling_correction=True,
      vllm_importance_sampling_mode=c.importance,
      vllm_importance_sampling_clip_min=c.importance_min,
      vllm_importance_sampling_clip_max=c.importance_max,
    )
    names = self.names | {"self": me, "tool_mask": None, "completion_mask": mask}
    names |= {"old_per_token_logps": old, "sampling_per_token_logps": sampled}
    return compiled([self.ratio_block], names)["vllm_importance_sampling_ratio"]

  def advantages(self, kind, rewards, size):
    scale = {"grpo": "group", "dr_grpo": "none", "batch": "batch"}[kind]
    me = types.SimpleNamespace(
      multi_objective_aggregation="sum_then_normalize", scale_rewards=scale,
      reward_weights=torch.ones(1),
    )  # fmt: skip
    rewards = torch.tensor(rewards)[:, None]
    names = self.names | {"self": me, "rewards_per_func": rewards, "device": "cpu"}
    names |= {"num_generations": size, "unscorable_mask": torch.isnan(rewards).all(dim=1)}
    return torch.nan_to_num(compiled([self.advantage_block], names)["advantages"], nan=0.0)

  def loss(self, case, loss_type, level, dtype):
    """(loss, gradient, metrics)."""
    c = case.config
    x = {k: torch.tensor(v, dtype=dtype) for k, v in case.arrays.items()}
    logp = x["logp"].requires_grad_()
    args = types.SimpleNamespace(
      use_bias_correction_kl=False, delta=c.ratio_max or None, steps_per_generation=1,
      sapo_temperature_pos=c.sapo_tau_pos, sapo_temperature_neg=c.sapo_tau_neg,
    )  # fmt: skip
    accelerator = types.SimpleNamespace(
      num_processes=1, sync_gradients=True, gather=lambda v: v, reduce=lambda v, reduction: v
    )
    metrics = {"train": defaultdict(list)}
    me = types.SimpleNamespace(
      _get_per_token_logps_and_entropies=lambda *a, **k: (logp, x["entropy"], None),
      aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
      importance_sampling_level=level, beta=c.beta, args=args, loss_type=loss_type,
      epsilon_low=c.clip_low, epsilon_high=c.cispo_max if loss_type == "cispo" else c.clip_high,
      use_vllm=c.importance != "none", vllm_importance_sampling_correction=True,
      model=types.SimpleNamespace(training=True), current_gradient_accumulation_steps=1,
      max_completion_length=c.horizon, accelerator=accelerator, _metrics=metrics,
      _entropy_bonus_enabled=c.entropy_coef != 0, use_adaptive_entropy=False,
      entropy_coef=c.entropy_coef,
    )  # fmt: skip
    ids = torch.zeros(x["mask"].shape, dtype=torch.long)
    inputs = {
      "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids,
      "completion_mask": x["mask"], "advantages": x["advantage"],
      "old_per_token_logps": x["old_logp"], "ref_per_token_logps": x["ref_logp"],
      "num_items_in_batch": x["mask"].sum(),
    }  # fmt: skip
    if c.importance != "none":
      parts = (x["old_logp"], x["sampler_logp"], x["mask"])
      inputs["importance_sampling_ratio"] = self.importance(c, *parts)
    loss = self.compute_loss(me, None, inputs)
    loss.backward()
    return loss.item(), logp.grad.double().numpy(), {k: v[0] for k, v in metrics["train"].items()}


# verl


class Verl:
  """The functions of `core_algos`."""

  ADVANTAGES = {
    "grpo": "grpo",
    "dr_grpo": "grpo",
    "rloo": "rloo",
    "opo": "opo",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
  }
  AGGREGATIONS = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
  }

  def __init__(self):
    wanted = ("masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value")
    tools = functions(source("verl", "utils/torch_functional.py"), *wanted)
    tools = types.SimpleNamespace(**compiled(tools, {"torch": torch}))
    outcomes = {f"compute_{n}_outcome_advantage" for n in self.ADVANTAGES.values()}
    losses = ("vanilla", "gspo", "cispo", "reinforce", "sapo")
    wanted = ("agg_loss", "kl_penalty", "kl_penalty_forward", "compute_value_loss", *outcomes)
    wanted += ("compute_gae_advantage_return", *(f"compute_policy_loss_{n}" for n in losses))
    names = {"torch": torch, "np": np, "verl_F": tools, "defaultdict": defaultdict}
    names |= {"AlgoConfig": type("AlgoConfig", (), {}), "ActorConfig": types.SimpleNamespace}
    names |= {"Optional": None}
    core = functions(source("verl", "trainer/ppo/core_algos.py"), *wanted)
    self.names = compiled(core, names)

  def advantages(self, kind, rewards, labels, mask, eps):
    fn = self.names[f"compute_{self.ADVANTAGES[kind]}_outcome_advantage"]
    mask = torch.tensor(mask)
    # The outcome may sit on any token, but not on one that is masked in whole rows.
    token_rewards = torch.zeros_like(mask)
    token_rewards[:, 0] = torch.tensor(rewards)
    more = {"norm_adv_by_std_in_grpo": kind == "grpo"} if "grpo" in kind else {}
    table = fn(token_rewards, mask, np.array(labels), epsilon=eps, **more)[0]
    return (table.sum(1) / mask.sum(1).clamp(min=1)).numpy(), mask.sum(1).numpy() > 0

  def gae(self, seed):
    reward, value, mask, new_value, gamma, lam = oracle.gae_case(seed)
    tensors = [torch.tensor(x) for x in (reward, value, mask)]
    advantage, returns = self.names["compute_gae_advantage_return"](*tensors, gamma, lam)
    args = (torch.tensor(new_value), returns, tensors[1], tensors[2], 0.5)
    loss = self.names["compute_value_loss"](*args)[0]
    return (advantage * tensors[2]).numpy(), (returns * tensors[2]).numpy(), loss.item()

  def loss(self, case, name, dtype):
    """(loss, gradient)."""
    c = case.config
    x = {k: torch.tensor(v, dtype=dtype) for k, v in case.arrays.items()}
    logp, mask = x["logp"].requires_grad_(), x["mask"]
    batch = {"dp_size": 1, "batch_num_tokens": mask.sum(), "global_batch_size": len(mask)}
    batch["loss_scale_factor"] = c.horizon
    high = c.cispo_max - 1 if name == "cispo" else c.clip_high
    config = types.SimpleNamespace(
      clip_ratio=0.2, clip_ratio_low=c.clip_low, clip_ratio_high=high, global_batch_info=batch,
      tau_pos=c.sapo_tau_pos, tau_neg=c.sapo_tau_neg, get=lambda k, d: c.dual_clip or d,
    )  # fmt: skip
    mode = self.AGGREGATIONS[c.aggregation]
    weight = None
    if c.importance != "none":
      weight = (x["old_logp"] - x["sampler_logp"]).exp().clamp(max=c.importance_max)
    advantage = x["advantage"][:, None].expand_as(mask)
    fn = self.names[f"compute_policy_loss_{name}"]
    loss = fn(x["old_logp"], logp, advantage, mask, mode, config, weight)[0]
    if c.beta:
      kl = self.names["kl_penalty"](logp, x["ref_logp"], c.kl)
      loss = loss + c.beta * self.names["agg_loss"](kl, mask, mode, **batch)
    loss.backward()
    return loss.item(), logp.grad.double().numpy()


@pytest.fixture(scope="module")
def trl():
  return Trl()


@pytest.fixture(scope="module")
def verl():
  return Verl()


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
  """Torch makes constants in its default precision."""
  torch.set_default_dtype(getattr(torch, request.param))
  yield request.param
  torch.set_default_dtype(torch.float32)


def exact_advantages(trl, verl, seed):
  kind, rewards, labels, mask, eps, by_verl = oracle.advantage_case(seed)
  if not by_verl:
    return trl.advantages(kind, rewards, labels.count(labels[0])).numpy()
  found, is_known = verl.advantages(kind, rewards, labels, mask, eps)
  return np.where(is_known, found, oracle.our_advantages(seed))  # verl masks rows without tokens


def test_losses_and_gradients_equal_trl(trl, dtype):
  for seed in range(oracle.NUM_TRL):
    case, loss_type, level = oracle.trl_case(seed)
    loss, grad, metrics = trl.loss(case, loss_type, level, getattr(torch, dtype))
    oracle.check([(f"TRL {seed} {case.config}", case, loss, grad)], [], [], dtype)
    ours = oracle.our_loss(case, dtype)[3]
    for name in {"kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean"} & set(metrics):
      if name == "clip_ratio" and level == "sequence":
        continue
      if level == "token" or not name.startswith("clip_ratio"):
        assert ours[name] == pytest.approx(metrics[name], abs=3e-7), (seed, name)


def test_losses_and_gradients_equal_verl(verl, dtype):
  for seed in range(oracle.NUM_VERL):
    case, name = oracle.verl_case(seed)
    if name == "sapo" and dtype == "float64":  # see verl_case
      continue
    loss, grad = verl.loss(case, name, getattr(torch, dtype))
    oracle.check([(f"verl {seed} {case.config}", case, loss, grad)], [], [], dtype)


def test_advantages_and_gae_equal_trl_and_verl(trl, verl):
  torch.set_default_dtype(torch.float64)
  try:
    seeds = range(oracle.NUM_ADVANTAGES)
    advantages = [(i, exact_advantages(trl, verl, i)) for i in seeds]
    gaes = [(i, *verl.gae(i)) for i in range(oracle.NUM_GAE)]
  finally:
    torch.set_default_dtype(torch.float32)
  oracle.check([], advantages, gaes, "float64")


def test_golden_numbers_are_those_of_the_oracles(trl, verl):
  torch.set_default_dtype(torch.float64)
  try:
    found = [
      trl.loss(case, *how, torch.float64)[:2]
      for case, *how in map(oracle.trl_case, range(oracle.NUM_TRL))
    ]
    found += [
      verl.loss(case, name, torch.float64)
      for case, name in map(oracle.verl_case, range(oracle.NUM_VERL))
    ]
    advantages = [exact_advantages(trl, verl, i) for i in range(oracle.NUM_ADVANTAGES)]
    gaes = [verl.gae(i) for i in range(oracle.NUM_GAE)]
  finally:
    torch.set_default_dtype(torch.float32)
  names = ("gae", "returns", "value_loss")
  fresh = {"loss": np.array([f[0] for f in found]), "grad": np.array([f[1] for f in found])}
  fresh |= {"advantage": np.array(advantages)}
  fresh |= {name: np.array([g[i] for g in gaes]) for i, name in enumerate(names)}
  if os.environ.get("AWF_WRITE_GOLDEN"):
    np.savez_compressed(oracle.GOLDEN, **fresh)
  with np.load(oracle.GOLDEN) as golden:
    for name, value in fresh.items():
      np.testing.assert_allclose(golden[name], value, rtol=1e-11, atol=1e-13, err_msg=name)
