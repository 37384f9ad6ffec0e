"""The small modes: glue between the command line and one library call each."""

from __future__ import annotations

import logging
from typing import Any

from ml_collections import ConfigDict

from awf.types import UserError

log = logging.getLogger("awf")


def run_report(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Writes DIR/report.html.

  Raises:
    UserError: DIR holds no run.
  """
  from awf.report import write_report

  del config  # the page shows the run's own
  if workdir.record() is None:
    raise UserError(f"--workdir={workdir} holds no run; give the directory of a run")
  path = write_report(workdir.path)
  return {"report": str(path or workdir / "report.html"), "workdir": str(workdir)}
