"""Programs compiled in a fraction of the time, where tests judge neither speed nor the last bit.

Left out are LLVM's optimisation and XLA's own emitters of fusions; XLA's passes before them, and so
the program, its arrays, copies and collectives, are the same but for single exp and log, which
those emitters wrap. Numbers agree within rounding.
"""

FLAGS = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
  "xla_cpu_parallel_codegen_split_count": 1,
}
# The same for a process of its own.
XLA_FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in FLAGS.items())

_usual = None  # JAX's own function while ours stands in its place


def set_quick(is_quick: bool) -> None:
  """From now on JAX compiles for the CPU with FLAGS, or as users do again.

  At a change every compiled program is forgotten, so that none is used in the other way's place.
  """
  global _usual
  if is_quick == (_usual is not None):
    return
  import jax
  from jax._src import compiler  # no public place takes options for all programs

  jax.clear_caches()
  if is_quick:
    _usual, compiler.get_compile_options = compiler.get_compile_options, _quick_options
  else:
    _usual, compiler.get_compile_options = None, _usual


def _quick_options(*args, env_options_overrides=None, backend=None, **kwargs):
  flags = FLAGS if backend is None or backend.platform == "cpu" else {}
  options = {**flags, **(env_options_overrides or {})}
  return _usual(*args, env_options_overrides=options, backend=backend, **kwargs)
