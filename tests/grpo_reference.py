"""A plain reading of the learner's formulas: whole arrays with masks, no packing, no tricks.

Losses are written in JAX for their gradients alone; nothing is shared with awf.grpo.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Advantages, NumPy


def advantages(rewards, groups, kind, eps=1e-4, lengths=None):
  """One number per row; NaN rewards and groups of one give 0."""
  lengths = [1] * len(rewards) if lengths is None else lengths
  out = np.zeros(len(rewards))
  for label in set(groups):
    rows = [i for i, g in enumerate(groups) if g == label and np.isfinite(rewards[i])]
    if len(rows) < 2:
      continue
    r = np.array([rewards[i] for i in rows])
    mean = sum(r) / len(r)
    for i in rows:
      x = rewards[i] - mean
      if kind == "grpo":
        x /= np.sqrt(sum((r - mean) ** 2) / (len(r) - 1)) + eps
      elif kind == "rloo":
        x = rewards[i] - (sum(r) - rewards[i]) / (len(r) - 1)
      elif kind == "maxrl":
        x = x / mean if mean > 0 else 0.0
      elif kind == "opo":
        n = sum(lengths[j] for j in rows)
        x = rewards[i] - sum(lengths[j] * rewards[j] for j in rows) / n
      out[i] = 0.0 if np.all(r == r[0]) else x
  valid = [i for i, r in enumerate(rewards) if np.isfinite(r)]
  if kind == "batch":
    out /= np.std([rewards[i] for i in valid], ddof=1) + eps
  if kind == "reinforce_plus_plus_baseline":
    tokens = np.concatenate([[out[i]] * lengths[i] for i in valid])
    scale = np.sqrt(tokens.var(ddof=1) + 1e-8)
    out = np.array(
      [(out[i] - tokens.mean()) / scale if i in valid else 0.0 for i in range(len(out))]
    )
  return out


def gae_row(rewards, values, gamma, lam):
  """(advantages, returns) of one row by the definition: discounted sums of later errors."""
  n = len(values)
  after = [*values[1:], 0.0]
  delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
  adv = [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)]
  return np.array(adv), np.array(adv) + np.array(values)


def whiten(rows):
  """Rows of numbers, mean 0 and variance 1 over all of them."""
  x = np.concatenate(rows)
  return [(row - x.mean()) / np.sqrt(x.var(ddof=1) + 1e-8) for row in rows]


# Losses, [B, T] with a 0/1 mask


def policy(logp, old, adv, mask, c):
  """Loss of each token."""
  d = logp - old
  if c.loss == "gspo":
    d = (d * mask).sum(1, keepdims=True) / jnp.maximum(mask.sum(1, keepdims=True), 1) + 0 * d
  r = jnp.exp(d)
  if c.loss == "reinforce":
    return -adv * logp
  if c.loss == "cispo":
    return -jax.lax.stop_gradient(jnp.where(r > c.cispo_max, c.cispo_max, r)) * adv * logp
  if c.loss == "sapo":
    pos = 4 / c.sapo_tau_pos / (1 + jnp.exp(-c.sapo_tau_pos * (r - 1)))
    neg = 4 / c.sapo_tau_neg / (1 + jnp.exp(-c.sapo_tau_neg * (r - 1)))
    return -jnp.where(adv > 0, pos, neg) * adv
  top = jnp.where(r > c.ratio_max, c.ratio_max, r) if c.ratio_max else r
  inside = jnp.where(r > 1 + c.clip_high, 1 + c.clip_high, r)
  inside = jnp.where(inside < 1 - c.clip_low, 1 - c.clip_low, inside)
  gain = jnp.where(top * adv < inside * adv, top * adv, inside * adv)
  if c.dual_clip:
    gain = jnp.where((adv < 0) & (gain < c.dual_clip * adv), c.dual_clip * adv, gain)
  return -gain


def kl(logp, ref, kind):
  d = logp - ref
  return {"k1": lambda: d, "k2": lambda: d**2 / 2, "k3": lambda: jnp.exp(-d) + d - 1}[kind]()


def importance_row(old, sampled, c):
  """Weights of one row, NumPy."""
  if c.importance == "none":
    return np.ones(len(old))
  diff = np.array([o - s if np.isfinite(s) else 0.0 for o, s in zip(old, sampled, strict=True)])
  if c.importance.startswith("sequence"):
    diff = np.full(len(diff), diff.sum())
  w = np.exp(diff)
  if c.importance.endswith("truncate"):
    return np.array([min(max(x, c.importance_min), c.importance_max) for x in w])
  return np.array([x if c.importance_min <= x <= c.importance_max else 0.0 for x in w])


def aggregate(x, mask, num_rows, c):
  """Token losses to one number; mask is 0 on rows that are not in the loss."""
  if c.aggregation == "token_mean":
    return jnp.sum(x * mask) / mask.sum()
  sums = jnp.sum(x * mask, axis=1)
  if c.aggregation == "sequence_mean":
    return jnp.sum(sums / np.maximum(mask.sum(1), 1)) / num_rows
  return jnp.sum(sums) / num_rows / (c.horizon if c.aggregation == "constant" else 1)


def kept_by_rule(logits, top_p, top_k, min_p):
  """bool like one position's tempered logits: what top-k, then top-p, then min-p leave (NumPy, by
  sorting).
  """
  order = np.argsort(-logits, kind="stable")
  keep = np.zeros(len(logits), bool)
  keep[order[: top_k or len(logits)]] = True
  p = np.where(keep, np.exp(logits - logits.max()), 0.0)
  mass, need = 0.0, top_p * p.sum()
  for v in order:
    if mass >= need:
      keep[v] = False
    mass += p[v]
  return keep & (np.exp(logits - logits.max()) >= min_p)


def overlong(length, c):
  start = c.horizon - c.overlong_buffer
  if not c.overlong_buffer or length <= start:
    return 0.0
  return -c.overlong_penalty * min((length - start) / c.overlong_buffer, 1.0)
