"""The cost counter against costs known by hand, and scans against unrolled programs."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awf.hlo_cost import count_module
from awf.plan_target import find_target
from awf.sharding import abstract, make_mesh, replicated

TARGETS = ("cpu", "v5e-1") if importlib.util.find_spec("libtpu") else ("cpu",)


def compiled(target, f, *args, donate=()):
  mesh = make_mesh(1, devices=find_target(target).devices[:1])
  args = abstract(args, jax.tree.map(lambda _: replicated(mesh), args))
  return jax.jit(f, donate_argnums=donate).lower(*args).compile().as_text()


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("target", TARGETS)
def test_a_matrix_product_by_hand(target):
  count = count_module(compiled(target, lambda a, b: a @ b, floats(256, 512), floats(512, 128)))
  assert count.total().flops == 2 * 256 * 512 * 128
  if target == "cpu":
    assert count.total().read == 4 * (256 * 512 + 512 * 128)
    assert count.total().written == 4 * 256 * 128
  assert not count.unknown_loops


@pytest.mark.parametrize("target", TARGETS)
def test_a_batched_product_by_hand(target):
  f = lambda q, k: jnp.einsum("bkqh,bkhw->bkqw", q, k)  # noqa: E731
  count = count_module(compiled(target, f, floats(8, 4, 16, 64), floats(8, 4, 64, 128)))
  assert count.total().flops == 2 * 8 * 4 * 16 * 64 * 128


def scanned(w_LDD, x_BD):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0]


def unrolled(w_LDD, x_BD):
  for w in w_LDD:
    x_BD = jnp.tanh(x_BD @ w)
  return x_BD


@pytest.mark.parametrize("target", TARGETS)
def test_a_scan_costs_what_its_unrolled_program_costs(target):
  args = floats(12, 512, 512), floats(64, 512)
  loop, flat = (count_module(compiled(target, f, *args)) for f in (scanned, unrolled))
  assert loop.total().flops == flat.total().flops == 12 * 2 * 64 * 512 * 512
  weights = 12 * 512 * 512 * 4
  assert weights <= loop.total().read
  assert loop.total().num_bytes == pytest.approx(flat.total().num_bytes, rel=0.1)
  assert not loop.unknown_loops and not loop.unknown_calls


def test_nested_loops_multiply():
  def f(x_BB):
    inner = lambda _, y: y @ x_BB  # noqa: E731
    return jax.lax.fori_loop(0, 5, lambda _, y: jax.lax.fori_loop(2, 9, inner, y), x_BB)

  assert count_module(compiled("cpu", f, floats(64, 64))).total().flops == 35 * 2 * 64**3


def test_the_caller_gives_the_trips_that_depend_on_data():
  def f(x_BB, n):
    with jax.named_scope("steps"):
      return jax.lax.fori_loop(0, n, lambda _, y: y @ x_BB, x_BB)

  text = compiled("cpu", f, floats(64, 64), jax.ShapeDtypeStruct((), jnp.int32))
  assert count_module(text).unknown_loops == ["jit(f)/steps/while"]
  count = count_module(text, lambda name: 7.5 if name.endswith("steps/while") else None)
  assert not count.unknown_loops
  assert count.total().flops == 7.5 * 2 * 64**3
  assert count.total(count.inside("steps")).flops == count.total().flops


@pytest.mark.parametrize("target", TARGETS)
def test_a_slice_costs_the_slice(target):
  def f(x_LBB, i):
    return jax.lax.dynamic_index_in_dim(x_LBB, i, 0, keepdims=False) * 2

  args = floats(64, 256, 256), jax.ShapeDtypeStruct((), jnp.int32)
  total = count_module(compiled(target, f, *args)).total()
  assert total.read < 2.2 * 256 * 256 * 4


@pytest.mark.parametrize("target", TARGETS)
def test_an_update_in_place_costs_the_update(target):
  def f(x_LBB, y_BB, i):
    return jax.lax.dynamic_update_index_in_dim(x_LBB, y_BB, i, 0)

  args = floats(64, 256, 256), floats(256, 256), jax.ShapeDtypeStruct((), jnp.int32)
  total = count_module(compiled(target, f, *args, donate=(0,))).total()
  assert total.num_bytes < 4.2 * 256 * 256 * 4


def test_one_branch_of_a_conditional_counts():
  def f(x_BB, p):
    with jax.named_scope("rare"):
      return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x, x_BB)

  text = compiled("cpu", f, floats(64, 64), jax.ShapeDtypeStruct((), jnp.bool_))
  assert count_module(text).total().flops == 2 * 2 * 64**3
  seldom = count_module(text, taken=lambda name: False if "/rare/" in name else None)
  assert seldom.total().flops == 0


TPU_TEXT = """HloModule m

%body.1 (p: (s32[], bf16[32,256])) -> (s32[], bf16[32,256]) {
  %p = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %next = s32[]{:T(128)} add(%i, %one)
  %y = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} negate(%x)
  ROOT %t = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %y)
}

%cond.1 (q: (s32[], bf16[32,256])) -> pred[] {
  %q = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %end = s32[]{:T(128)} constant(6)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %end), direction=LT
}

ENTRY %main (a: bf16[32,256], k: bf16[4,8,64], q: bf16[4,16,64]) -> bf16[32,256] {
  %a = bf16[32,256]{1,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[4,8,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %q = bf16[4,16,64]{2,1,0:T(8,128)(2,1)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  %start = (bf16[32,256]{1,0:T(8,128)(2,1)S(1)}, bf16[32,256]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %here = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %c = bf16[4,16,8]{2,1,0:T(8,128)(2,1)S(1)} convolution(%q, %k), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %t.1 = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero, %here)
  %w = (s32[]{:T(128)}, bf16[32,256]{1,0:T(8,128)(2,1)S(1)}) while(%t.1), condition=%cond.1, body=%body.1
  ROOT %out = bf16[32,256]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def test_a_tpu_program_on_chip_arrays_padding_and_products_as_convolutions():
  count = count_module(TPU_TEXT)
  by_name = {op.name: op for op in count.ops}
  assert by_name["start"].read == 32 * 256 * 2
  assert by_name["start"].written == 0, "into the chip's own memory"
  assert by_name["y"].times == 6
  assert by_name["y"].num_bytes == 0
  assert by_name["c"].flops == 2 * 4 * 16 * 64 * 8, "each batch element meets its own window place"
  assert by_name["c"].read == 2 * 128 * 4 * (8 + 16), "64 lanes fill 128"


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    count_module("nothing here")


def test_seconds_are_the_slower_of_arithmetic_and_bytes():
  text = compiled("cpu", lambda a, b: a @ b, floats(64, 64), floats(64, 64))
  count = count_module(text)
  flops, size = 2 * 64**3, 3 * 64 * 64 * 4
  assert count.total(None, flops / 2, size / 3).seconds == pytest.approx(3)
  assert count.total(None, flops / 5, size / 3).seconds == pytest.approx(5)
  assert np.isfinite(count.total().flops)
