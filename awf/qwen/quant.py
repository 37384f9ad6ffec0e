"""Weight-only quantisation of the frozen base: symmetric int8 per output channel, int4 by groups.

Layout: a quantised module has, in place of the leaf `kernel` [in, out],

  int8  `kernel_q` int8 [in, out] and `kernel_scale` float32 [out]
  int4  `kernel_q` int4 [in, out] and `kernel_scale` float32 [groups, out], groups along `in`

and, if embedding and head are included, `embedding_q` int8 [V, D] with `embedding_scale` float32
[V] in place of `embedding` (one scale per row, which is one per output channel of a tied head), and
`lm_head/kernel_q` int8 with `kernel_scale` [V]. Embedding and head are int8 in int4 too. Norms and
biases stay as they are. The tree itself tells the layout; no flag is passed along.

A float matrix may lie turned, as `kernel_t` [out, in] in place of `kernel`: on a CPU, products with
few rows then take half the time (`matmul`).

The product is `(x @ q) * scale`: the cast of `q` belongs to the product. On accelerators the
compiler does it tile by tile; a CPU holds one cast matrix at a time.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from awf.types import UserError

METHODS = ("none", "int8", "int4")
CHUNK_VALUES = 1 << 18  # values that are floats at a time while a matrix is loaded: fits a cache
FEW_ROWS = 128  # of a product that a CPU computes turned
_TINY = 1e-30  # rows below it are zero: their inverse scale would overflow
_THREADS = 8
_LARGEST = {"int8": 127, "int4": 7}
_STORED = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """How a base is stored.

  Attributes:
    method: none, int8 (one scale per output channel) or int4 (one per group and channel).
    group: inputs that share a scale in int4; must divide the inputs of every projection.
    embedding: quantise the embedding and the head too (int8, one scale per id).
  """

  method: str = "none"
  group: int = 128
  embedding: bool = True

  def __post_init__(self) -> None:
    if self.method not in METHODS:
      raise UserError(
        f"config.model.quant: expected one of {', '.join(METHODS)}, got {self.method!r}"
      )
    if self.group < 1:
      raise UserError(f"config.model.quant_group: expected at least 1, got {self.group!r}")

  @classmethod
  def from_config(cls, model: Any) -> QuantConfig:
    """From the `model` part of a resolved config."""
    return cls(model.quant, model.quant_group, model.quant_embedding)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantKernel:
  """A quantised matrix [in, out] on its way to a product; see `matmul`."""

  q: jax.Array  # int8 or int4, [in, out], or [out, in] if is_transposed
  scale: jax.Array  # float32 [out], or [groups, out]
  is_transposed: bool = dataclasses.field(default=False, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, int]:
    """(in, out)."""
    a, b = self.q.shape
    return (b, a) if self.is_transposed else (a, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
  """A float matrix [in, out] that lies as its transpose and is turned where it is used.

  A product folds the transpose away. Turned before a loop whose body has the product, a tied
  embedding would exist twice for the length of the loop.
  """

  table: jax.Array  # [out, in]

  @property
  def shape(self) -> tuple[int, int]:
    """(in, out)."""
    return self.table.shape[1], self.table.shape[0]

  @property
  def dtype(self) -> Any:
    return self.table.dtype


Kernel = jax.Array | QuantKernel | Transposed


def at_compute_dtype(kernel: Kernel, dtype: Any) -> Kernel:
  """A float kernel cast to `dtype`; a quantised one as it is."""
  if isinstance(kernel, QuantKernel):
    return kernel
  return jax.tree.map(lambda x: x.astype(dtype), kernel)


def matmul(x: jax.Array, kernel: Kernel) -> jax.Array:
  """x [..., in] times a kernel [in, out] of either layout, in the dtype of `x`.

  Differentiable with respect to `x`; a quantised kernel gets no gradient.
  """
  if isinstance(kernel, QuantKernel):
    return _quant_matmul(x, kernel)
  if not isinstance(kernel, Transposed):
    return x @ kernel
  if math.prod(x.shape[:-1]) > FEW_ROWS:
    return x @ kernel.table.T
  return jax.lax.platform_dependent(
    x, kernel.table, cpu=_turned_matmul, default=lambda x, table: x @ table.T
  )


def logits(x: jax.Array, kernel: Kernel) -> jax.Array:
  """Float32 x [..., in] times the head's kernel [in, out]; no gradient.

  On a GPU these are the product's sums as they are, which saves a pass that widens them. Elsewhere
  they are rounded to the dtype of `x` first: a TPU's step reads half as many bytes.
  """
  if isinstance(kernel, QuantKernel):
    return matmul(x, kernel).astype(jnp.float32)

  def wide(x, kernel):
    weight = kernel.table.T if isinstance(kernel, Transposed) else kernel
    return jnp.matmul(x, weight, preferred_element_type=jnp.float32)

  def rounded(x, kernel):
    return matmul(x, kernel).astype(jnp.float32)

  return jax.lax.platform_dependent(x, kernel, cuda=wide, default=rounded)


@jax.custom_vjp
def frozen_logits(x: jax.Array, kernel: Kernel) -> jax.Array:
  """`logits` with a gradient for `x` alone, computed in the dtype of `x`."""
  return logits(x, kernel)


def _logits_fwd(x, kernel):
  return logits(x, kernel), (kernel, jnp.zeros((), x.dtype))


def _logits_bwd(saved, d_y):
  kernel, zero = saved
  return matmul_transposed(d_y.astype(zero.dtype), kernel), jax.tree.map(no_gradient, kernel)


frozen_logits.defvjp(_logits_fwd, _logits_bwd)


def no_gradient(x: jax.Array) -> Any:
  """What a backward pass gives for a leaf that is not trained."""
  if jnp.issubdtype(x.dtype, jnp.floating):
    return jnp.zeros_like(x)
  return np.zeros(x.shape, jax.dtypes.float0)


def _turned_matmul(x: jax.Array, table: jax.Array) -> jax.Array:
  """x [..., in] times table [out, in], as (table x^T)^T.

  Eigen, which multiplies on XLA's CPU backend, repacks its left operand in registers' width and so
  takes a skinny `x` badly there: 16 rows times a head of 49,152 x 576 take 28 ms as x W, 18 ms as x
  W^T and 9 ms so. The barrier keeps XLA from turning the product back.
  """
  rows = x.reshape(-1, x.shape[-1])
  y = jax.lax.dot_general(table, rows, (((1,), (1,)), ((), ())))
  return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], table.shape[0])


def matmul_transposed(y: jax.Array, kernel: Kernel) -> jax.Array:
  """y [..., out] times the transpose of a kernel [in, out], in the dtype of `y`."""
  if isinstance(kernel, QuantKernel):
    return _product_transposed(y, kernel)
  return y @ (kernel.table if isinstance(kernel, Transposed) else kernel.T)


@jax.custom_vjp
def _quant_matmul(x: jax.Array, kernel: QuantKernel) -> jax.Array:
  return _product(x, kernel)


def _quant_matmul_fwd(x, kernel):
  return _product(x, kernel), kernel  # the integers are saved, never their cast


def _quant_matmul_bwd(kernel, d_y):
  none = QuantKernel(
    np.zeros(kernel.q.shape, jax.dtypes.float0),  # pyright: ignore[reportArgumentType]
    jnp.zeros_like(kernel.scale),
    kernel.is_transposed,
  )
  return _product_transposed(d_y, kernel), none


_quant_matmul.defvjp(_quant_matmul_fwd, _quant_matmul_bwd)


def _product(x: jax.Array, kernel: QuantKernel) -> jax.Array:
  weight, scale = _cast_beside(kernel, x)
  y = _dot(x, weight, 1 if kernel.is_transposed else 0)
  return y if scale is None else (y * _leading(scale, y.ndim)).astype(x.dtype)


def _product_transposed(y: jax.Array, kernel: QuantKernel) -> jax.Array:
  weight, scale = _cast_beside(kernel, y)
  y = y if scale is None else (y * _leading(scale, y.ndim)).astype(y.dtype)
  return _dot(y, weight, 0 if kernel.is_transposed else 1)


def _cast_beside(kernel: QuantKernel, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """(matrix in the dtype of `x`, scale that is still to apply to the output channels)."""
  q = jax.lax.platform_dependent(kernel.q, x, cpu=_bound_to, default=lambda q, x: q)
  if kernel.scale.ndim == 1:
    return q.astype(x.dtype), kernel.scale
  groups, size = kernel.scale.shape[0], q.shape[0] // kernel.scale.shape[0]
  weight = q.reshape(groups, size, -1).astype(x.dtype) * kernel.scale[:, None].astype(x.dtype)
  return weight.reshape(q.shape), None


def _bound_to(q: jax.Array, x: jax.Array) -> jax.Array:
  """`q`, as a function of `x` for XLA's CPU compiler.

  It would else compute the casts of all matrices before a loop, or keep the forward pass's for the
  backward pass: a float copy of the whole model.
  """
  zero = jnp.floor(jnp.clip(jnp.abs(x[(0,) * x.ndim].astype(jnp.float32)), 0.0, 0.5))
  return q ^ zero.astype(q.dtype)[None, None]


def _dot(x: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
  return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (axis,)), ((), ())))


def _leading(scale: jax.Array, ndim: int) -> jax.Array:
  return scale.reshape((1,) * (ndim - 1) + scale.shape)


def linear_kernel(module: Mapping[str, Any]) -> Kernel:
  """The kernel of a projection's subtree, of either layout."""
  if "kernel_q" in module:
    return QuantKernel(module["kernel_q"], module["kernel_scale"])
  return Transposed(module["kernel_t"]) if "kernel_t" in module else module["kernel"]


def kernel_shape(module: Mapping[str, Any]) -> tuple[int, int]:
  """(in, out) of a projection's subtree, of either layout."""
  num_in, num_out = linear_kernel(module).shape
  return num_in, num_out


def embedding_rows(q_VD: jax.Array, scale_V: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
  """Rows [..., D] of a quantised embedding."""
  rows = jnp.take(q_VD, ids, axis=0).astype(jnp.float32)
  return (rows * jnp.take(scale_V, ids, axis=0)[..., None]).astype(dtype)


def is_quantised(params: Mapping[str, Any]) -> bool:
  """Whether any leaf of a base is quantised."""
  names = (path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params))
  return any(name.endswith("_q") for name in names)


def quantised_leaves(
  where: Sequence[str], shape: Sequence[int], quant: QuantConfig
) -> dict[tuple[str, ...], tuple[tuple[int, ...], np.dtype]]:
  """Which leaves take the place of a float leaf; empty if it stays as it is.

  Args:
    where: path of the float leaf, for instance ("layers_0", "q_proj", "kernel").
    shape: its shape.
    quant: the layout that is wanted.

  Returns:
    Path -> (shape, dtype), the integers first.

  Raises:
    UserError: the group does not divide the inputs.
  """
  *parent, leaf = where
  is_table = where[0] in ("embed", "lm_head")
  if quant.method == "none" or leaf not in ("kernel", "embedding"):
    return {}
  if is_table and not quant.embedding:
    return {}
  method = "int8" if is_table else quant.method
  scale_shape = (shape[0],) if leaf == "embedding" else (shape[1],)
  if method == "int4":
    if shape[0] % quant.group:
      raise UserError(
        f"config.model.quant_group: {quant.group} does not divide the {shape[0]} inputs of "
        f"{'/'.join(parent)}; expected a divisor, for instance {_largest_group(shape[0])}"
      )
    scale_shape = (shape[0] // quant.group, shape[1])
  return {
    (*parent, f"{leaf}_q"): (tuple(shape), _STORED[method]),
    (*parent, f"{leaf}_scale"): (scale_shape, np.dtype(np.float32)),
  }


def _largest_group(size: int) -> int:
  return max(g for g in (1, 2, 4, 8, 16, 32, 64, 128) if size % g == 0)


def quantise_rows(rows: np.ndarray, method: str, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Quantises some output channels, each a row of all its inputs.

  Args:
    rows: float [out, in].
    method: int8 or int4.
    group: inputs per scale in int4.

  Returns:
    (integers [out, in] as int8 or int4, scale float32 [out] or [out, groups]). A row of zeros has
    scale 0.
  """
  largest = np.float32(_LARGEST[method])
  wide = np.array(rows, np.float32)  # a copy: worked on in place
  wide = wide.reshape(wide.shape[0], -1, group) if method == "int4" else wide[:, None]
  scale = np.maximum(wide.max(axis=-1), -wide.min(axis=-1)) / largest
  if not np.isfinite(scale).all():
    raise UserError("config.model.path: the weights hold values that are not finite")
  inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > _TINY)
  np.multiply(wide, inverse[..., None], out=wide)
  integers = np.rint(wide, out=wide).astype(np.int8).reshape(rows.shape)
  return integers.astype(_STORED[method], copy=False), scale if method == "int4" else scale[:, 0]


def quantise_stored(
  read: Callable[[int, int], np.ndarray], shape: Sequence[int], kind: np.dtype, group: int
) -> tuple[np.ndarray, np.ndarray]:
  """Quantises a matrix that is read a few rows at a time, so that its floats never exist at once.

  Args:
    read: (start, stop) -> float rows [stop - start, in].
    shape: (out, in) as stored.
    kind: int8 or int4.
    group: inputs per scale in int4.

  Returns:
    (integers [out, in], scale float32 [out] or [out, groups]).
  """
  method = "int8" if kind == np.int8 else "int4"
  num_out, num_in = shape
  integers = np.empty(shape, kind)
  scale = np.empty((num_out, num_in // group) if method == "int4" else num_out, np.float32)

  def part(start: int) -> None:
    stop = min(start + step, num_out)
    integers[start:stop], scale[start:stop] = quantise_rows(read(start, stop), method, group)

  step = max(1, CHUNK_VALUES // num_in)
  with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
    list(pool.map(part, range(0, num_out, step)))
  return integers, scale


def quantise(params: Mapping[str, Any], quant: QuantConfig) -> dict[str, Any]:
  """A float base in another layout, leaf by leaf on the host; for models made in memory."""

  def walk(tree: Mapping[str, Any], where: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for name, leaf in tree.items():
      path = (*where, name)
      if isinstance(leaf, Mapping):
        yield name, dict(walk(leaf, path))
        continue
      paths = list(quantised_leaves(path, leaf.shape, quant))
      if not paths:
        yield name, leaf
        continue
      host, is_kernel = np.asarray(leaf), name == "kernel"
      method = "int8" if path[0] in ("embed", "lm_head") else quant.method
      integers, scale = quantise_rows(host.T if is_kernel else host, method, quant.group)
      yield paths[0][-1], jnp.asarray(integers.T if is_kernel else integers)
      yield paths[1][-1], jnp.asarray(scale.T)

  return dict(walk(params, ()))


def dequantise(params: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
  """The float base that a quantised one stands for; a copy of the whole, for tests and export."""
  out: dict[str, Any] = {}
  for name, leaf in params.items():
    if isinstance(leaf, Mapping):
      out[name] = dequantise(leaf, dtype)
    elif name.endswith("_q"):
      stem = name.removesuffix("_q")
      out[stem] = dequantised(leaf, params[f"{stem}_scale"], stem == "embedding").astype(dtype)
    elif not name.endswith("_scale"):
      out[name] = leaf
  return out


def dequantised(q: Any, scale: Any, is_embedding: bool) -> jax.Array:
  """One float32 matrix."""
  q, scale = jnp.asarray(q).astype(jnp.float32), jnp.asarray(scale)
  if is_embedding:
    return q * scale[:, None]
  if scale.ndim == 1:
    return q * scale[None]
  return (q.reshape(scale.shape[0], -1, q.shape[1]) * scale[:, None]).reshape(q.shape)


def num_bytes(params: Any) -> int:
  """Bytes of all leaves as an accelerator holds them; two int4 share one byte."""
  return sum(
    (leaf.size + 1) // 2 if leaf.dtype == jnp.int4 else leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(params)
  )
