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

from awf import cli, membership, terminal
from awf.backup import BackupManager, check_target
from awf.config_io import resolve_paths
from awf.faults import explain
from awf.interrupt import Interrupted
from awf.preflight import check_files
from awf.restore import restore
from awf.types import UserError
from awf.workdir import Workdir

log = logging.getLogger("awf")


class _Terminated(KeyboardInterrupt):
  """SIGTERM: handled like Ctrl-C, so that a pre-empted run ends in order."""


class _Fault(Exception):
  """A mode failed by a fault of the program; the traceback is logged already."""


def main(argv: Sequence[str]) -> int:
  """Runs one command; returns the exit code."""
  handler = _setup_logging()
  catch_signals()
  command = None
  try:
    is_help = "--help" in argv or "-h" in argv or "--helpfull" in argv
    listing = cli.usage() if is_help else cli.listing(argv)
    if listing is not None:
      return _say(listing)
    with _held_signals():
      command = cli.parse(argv)
    with (
      contextlib.redirect_stdout(sys.stderr),  # stdout is for the JSON line alone
      terminal.show(handler, command.quiet),
    ):
      result = _run(command, argv)
    return membership.leave(_say(cli.json_line(result)) if membership.is_writer() else 0)
  except UserError as e:
    text = " ".join(str(e).split())
    print("error: " + text, file=sys.stderr)
    return membership.leave(2, text)
  except _Fault as e:
    return membership.leave(1, f"a fault of the program: {e}")
  except (Interrupted, KeyboardInterrupt) as e:
    code = _end_interrupted(e, command, argv)
    return membership.leave(code, "" if isinstance(e, Interrupted) else "it was interrupted")


def _say(text: str) -> int:
  """Writes to stdout; a reader that has gone, such as `head`, has what it wants.

  Returns:
    2 when it takes no more, which stderr says; else 0.
  """
  try:
    print(text, flush=True)
    return 0
  except OSError as error:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed once more at the end
    if isinstance(error, BrokenPipeError):
      return 0
    print(f"error: cannot write to the standard output ({error.strerror})", file=sys.stderr)
    return 2


def _run(command: cli.Command, argv: Sequence[str]) -> dict[str, Any]:
  """Dispatches to the mode's function; JAX is not imported here, the sandbox starts before it."""
  mode = cli.MODES[command.mode]
  config = resolve_paths(command.config)
  config.lock()
  check_files(config, command.mode, command.input, command.output)
  is_shared = membership.settings(command.config) is not None
  if is_shared and not mode.spans_hosts:
    raise UserError(
      f"config.distributed: --mode={command.mode} runs in one process; start it once, without "
      "config.distributed.coordinator and JAX_COORDINATOR_ADDRESS"
    )
  if is_shared and command.config.backup.restore:
    raise UserError(
      "config.backup.restore: one process restores; start it once without config.distributed"
    )
  with contextlib.ExitStack() as stack:
    workdir = stack.enter_context(Workdir(command.workdir))
    module, name = mode.function.split(":")
    extra = {flag: getattr(command, flag) for flag in mode.needs}
    if mode.owns_workdir:
      check_target(command.config, workdir)
      restore(command.config, workdir, command.mode)
      workdir.open(command.config, command.mode, _command_line(argv), is_shared)
    try:
      if mode.owns_workdir:
        stack.enter_context(BackupManager(command.config, workdir))
      function = getattr(importlib.import_module(module), name)
      result = dict(function(config, workdir, **extra))
    except UserError:
      workdir.discard()
      raise
    except Interrupted:
      raise
    except Exception as e:  # told in one line; run.log keeps the trace of what is not known
      lost = membership.why_over()
      if lost:  # the error is what the loss of another process looks like from here
        raise UserError(lost) from e
      reason = explain(e, config, _plan_command(argv), command.mode)
      if reason is not None:
        log.error("%s: %s", type(e).__name__, " ".join(str(e).split())[:400])
        workdir.discard()
        raise UserError(reason) from e
      log.exception("%s failed", command.mode)  # run.log keeps the traceback
      raise _Fault(f"{type(e).__name__}: {' '.join(str(e).split())[:300]}") from None
    result.setdefault("mode", command.mode)
    if mode.owns_workdir:
      result.setdefault("workdir", str(workdir))
    return result


def _setup_logging() -> terminal.Handler:
  """awf's own progress and everybody's warnings, on stderr."""
  handler = terminal.Handler()
  logging.basicConfig(handlers=[handler], level=logging.WARNING)
  log.setLevel(logging.INFO)
  return handler


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
  if command is None or not cli.MODES[command.mode].resumes:
    print("interrupted", file=sys.stderr, flush=True)
    return 143 if is_term else 130
  if not membership.is_writer():
    return 0 if is_term else 130
  print(
    f"interrupted; {command.workdir} keeps what was done, resume with: {_command_line(argv)}",
    file=sys.stderr,
    flush=True,
  )
  facts = {"interrupted": True, "mode": command.mode, "workdir": str(command.workdir)}
  _say(cli.json_line({**figures, **facts}))
  return 0 if is_term else 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
