"""Compares LaTeX expressions in a process of its own: JSON lines in, JSON lines out.

Run as a file by `awf.tasks.latex`. A comparison that spends its processor time ends the process:
the timer's signal is left to its default action, which no library code can catch.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
import warnings

FLOAT_DIGITS = 12


def main(memory_bytes: int) -> None:
  """Answers {"equal": bool} to each line {"expected", "answer": str, "seconds": float} until the
  input ends."""
  warnings.simplefilter("ignore")
  logging.disable(logging.CRITICAL)
  resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  from math_verify import LatexExtractionConfig, parse, verify

  def read(text: str) -> list:
    return parse(
      f"${text}$",
      extraction_config=[LatexExtractionConfig()],
      fallback_mode="no_fallback",
      # None: the parent's limit holds. The library takes it, its annotation leaves it out.
      parsing_timeout=None,  # pyright: ignore[reportArgumentType]
    )

  sys.stdout.write("ready\n")
  sys.stdout.flush()
  for line in sys.stdin:
    request = json.loads(line)
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    expected, answer = read(request["expected"]), read(request["answer"])
    equal = bool(expected and answer) and verify(
      expected, answer, float_rounding=FLOAT_DIGITS, timeout_seconds=None
    )
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.write(json.dumps({"equal": bool(equal)}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
  main(int(sys.argv[1]))
