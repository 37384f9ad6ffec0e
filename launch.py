"""The command line: `python launch.py --config=configs/NAME.py [--workdir=DIR] [--mode=MODE]`.

Progress goes to stderr; the last line of stdout is one JSON object. Exit codes: 0 success, 1 a
fault of the program (traceback on stderr), 2 a mistake of the user or a machine that is too small
(one line). SIGTERM (a pre-empted machine) in a mode that resumes: its state is kept, 0; elsewhere
143. Ctrl-C: the state is kept too, 130.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from awf import cli
from awf.config_io import resolve_paths
from awf.faults import explain
from awf.interrupt import Interrupted
from awf.types import UserError
from awf.workdir import Workdir

log = logging.getLogger("awf")


class _Terminated(KeyboardInterrupt):
  """SIGTERM: handled like Ctrl-C, so that a pre-empted run ends in order."""


class _Fault(Exception):
  """A mode failed by a fault of the program; the traceback is logged already."""


def main(argv: Sequence[str]) -> int:
  """Runs one command; returns the exit code."""
  if "--help" in argv or "-h" in argv or "--helpfull" in argv:
    print(cli.usage())
    return 0
  _setup_logging()
  catch_signals()
  command = None
  try:
    with _held_signals():
      command = cli.parse(argv)
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the JSON line alone
      result = _run(command, argv)
    print(cli.json_line(result), flush=True)
    return 0
  except UserError as e:
    print("error: " + " ".join(str(e).split()), file=sys.stderr)
    return 2
  except _Fault:
    return 1
  except (Interrupted, KeyboardInterrupt) as e:
    return _end_interrupted(e, command, argv)


def _run(command: cli.Command, argv: Sequence[str]) -> dict[str, Any]:
  """Dispatches to the mode's function; JAX is not imported here, the sandbox starts before it."""
  mode = cli.MODES[command.mode]
  config = resolve_paths(command.config)
  config.lock()
  with Workdir(command.workdir) as workdir:
    if mode.owns_workdir:
      resumed = workdir.open(command.config, command.mode, _command_line(argv))
      log.info("%s %s in %s", "resuming" if resumed else "starting", command.mode, workdir)
    module, name = mode.function.split(":")
    function = getattr(importlib.import_module(module), name)
    extra = {flag: getattr(command, flag) for flag in mode.needs}
    try:
      result = dict(function(config, workdir, **extra))
    except UserError:
      workdir.discard()
      raise
    except Interrupted:
      raise
    except Exception as e:
      reason = explain(e, config, _plan_command(argv))
      if reason is not None:
        log.error("%s: %s", type(e).__name__, " ".join(str(e).split())[:400])
        workdir.discard()
        raise UserError(reason) from e
      log.exception("%s failed", command.mode)  # run.log keeps the traceback
      raise _Fault from None
    result.setdefault("mode", command.mode)
    if mode.owns_workdir:
      result.setdefault("workdir", str(workdir))
    return result


def _setup_logging() -> None:
  """awf's own progress and everybody's warnings, on stderr."""
  logging.basicConfig(
    stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING
  )
  log.setLevel(logging.INFO)


def catch_signals() -> None:
  """SIGTERM ends a run as Ctrl-C does, and neither gets lost.

  Python drops what a signal's handler raises inside a finaliser or a callback of the garbage
  collector (JAX has one), and only reports it to this hook: the signal is sent once more.
  """
  report = sys.unraisablehook

  def hook(unraisable: sys.UnraisableHookArgs) -> None:
    dropped = unraisable.exc_value
    if isinstance(dropped, KeyboardInterrupt):
      number = signal.SIGTERM if isinstance(dropped, _Terminated) else signal.SIGINT
      threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    else:
      report(unraisable)

  sys.unraisablehook = hook
  signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def _held_signals() -> Iterator[None]:
  """SIGTERM and Ctrl-C wait until it is left: how they end a run depends on its mode."""
  held: list[int] = []
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {n: signal.signal(n, lambda number, _: held.append(number)) for n in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
  if held:
    signal.raise_signal(held[0])


def _on_sigterm(signum: int, frame: object) -> None:
  del signum, frame
  raise _Terminated


def _command_line(argv: Sequence[str]) -> str:
  return shlex.join(["python", "launch.py", *argv])


def _plan_command(argv: Sequence[str]) -> str:
  """The same config in mode plan, for the machine at hand."""
  rest = [x for x in argv if not x.startswith(("--mode", "--workdir", "--input", "--output"))]
  return _command_line([*rest, "--mode=plan", "--config.plan.target=local"])


def _end_interrupted(
  error: Interrupted | KeyboardInterrupt, command: cli.Command | None, argv: Sequence[str]
) -> int:
  """Says what happened and how to go on; returns the exit code.

  A run whose state is kept ends well after SIGTERM, which is how machines are taken back.
  """
  figures = error.figures if isinstance(error, Interrupted) else {}
  is_term = isinstance(error, _Terminated) or figures.get("signal") == "SIGTERM"
  if command is None or not cli.MODES[command.mode].owns_workdir:
    print("interrupted", file=sys.stderr, flush=True)
    return 143 if is_term else 130
  print(
    f"interrupted; {command.workdir} keeps what was done, resume with: {_command_line(argv)}",
    file=sys.stderr,
    flush=True,
  )
  facts = {"interrupted": True, "mode": command.mode, "workdir": str(command.workdir)}
  print(cli.json_line({**figures, **facts}), flush=True)
  return 0 if is_term else 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
