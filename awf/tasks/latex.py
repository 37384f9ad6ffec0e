"""Symbolic comparison of LaTeX answers (math-verify) in a helper process with hard limits."""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import re
import select
import subprocess
import sys
import threading

MAX_CHARS = 300
NO_END = "the symbolic comparison did not end"
WALL = 6  # a helper that waits, or is kept from running, has this many times its processor time
_WORKER = pathlib.Path(__file__).with_name("latex_worker.py")
# Math only: no quotes, attribute access or calls by name could reach a parser that evaluates.
_ALLOWED = re.compile(r"[A-Za-z0-9\s\\{}()\[\]^_+\-*/=<>.,:;!|&'%]*")
_REFUSED = re.compile(r"__|[A-Za-z]\.[A-Za-z]|\\(?:def|input|include|write|catcode)")
# Towers and huge exponents take for ever in exact arithmetic.
_COSTLY = re.compile(
  r"\^\s*(?:[0-9A-Za-z]\s*\^|\{[^{}]*\^)|\^\s*\{?\s*[0-9]{4,}|[0-9]{4,}\s*!|!\s*!"
)


class LatexComparer:
  """Says whether two LaTeX expressions are equal; what takes too long counts as unequal.

  The limit is one of processor time, so that a busy machine changes no verdict. Thread-safe; one
  helper process, started when first needed and replaced after a time-out or crash.
  """

  def __init__(self, seconds: float = 5.0, memory_mb: int = 1024):
    self.seconds = seconds
    self.memory_mb = memory_mb
    self._process: subprocess.Popen[bytes] | None = None
    self._lock = threading.Lock()
    self._known: dict[tuple[str, str], tuple[bool, str]] = {}

  def equal(self, answer: str, expected: str) -> tuple[bool, str]:
    """Returns (equal, reason); the reason is empty when the comparison came to an end."""
    for text in (answer, expected):
      if not text.strip() or len(text) > MAX_CHARS:
        return False, "empty or too long for a symbolic comparison"
      if not _ALLOWED.fullmatch(text) or _REFUSED.search(text) or _COSTLY.search(text):
        return False, "no expression that can be compared"
    with self._lock:
      key = (answer, expected)
      if key not in self._known:
        self._known[key] = self._ask(answer, expected)
      return self._known[key]

  def close(self) -> None:
    """Ends the helper process."""
    process, self._process = self._process, None
    if process is not None:
      process.kill()
      process.wait()
      for pipe in (process.stdin, process.stdout):
        if pipe is not None:
          pipe.close()
      atexit.unregister(self.close)

  def _start(self) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)  # packages may lie anywhere
    process = subprocess.Popen(
      [sys.executable, "-s", "-P", str(_WORKER), str(self.memory_mb << 20)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      env={"PYTHONHASHSEED": "0", "PYTHONPATH": path},
      bufsize=0,
      start_new_session=True,
    )
    self._process = process
    atexit.register(self.close)
    if self._line(process, 60.0) is None:
      self.close()
      raise RuntimeError(
        "the process for LaTeX comparisons did not start: is math-verify installed?"
      )
    return process

  def _ask(self, answer: str, expected: str) -> tuple[bool, str]:
    process = self._process
    if process is None or process.poll() is not None:
      self.close()
      process = self._start()
    request = json.dumps({"expected": expected, "answer": answer, "seconds": self.seconds}) + "\n"
    assert process.stdin is not None
    try:
      process.stdin.write(request.encode())
      reply = self._line(process, WALL * self.seconds)
    except BrokenPipeError:
      reply = None
    if reply is None:
      self.close()
      return False, NO_END
    return bool(json.loads(reply)["equal"]), ""

  @staticmethod
  def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """One line of the helper's output, or None when time is up or it has died."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return (process.stdout.readline() or None) if ready else None
