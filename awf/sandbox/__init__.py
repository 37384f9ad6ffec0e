"""Runs model-written code in jailed child processes; see `Sandbox`."""

from awf.sandbox.api import CallError, Handler, Job, JobResult, Limits, Sandbox, SandboxConfig
from awf.sandbox.probe import ProbeReport

__all__ = [
  "CallError",
  "Handler",
  "Job",
  "JobResult",
  "Limits",
  "ProbeReport",
  "Sandbox",
  "SandboxConfig",
]
