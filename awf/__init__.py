"""awf: trains a Qwen model to write better agent workflows, in one JAX program."""

__version__ = "0.1.0"
