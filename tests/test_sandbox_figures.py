"""Leaks and containment, in short: `python tests/sandbox_figures.py` does it at length."""

import asyncio
import os

import pytest
from sandbox_figures import (
  ESCAPES,
  LAYERS,
  NOBODY,
  SLOW,
  hostile_jobs,
  is_contained,
  jailed,
  jobs,
  new_box,
  raw,
)

from awf.sandbox import Limits
from awf.sandbox.jail import NICE

USERS = {"root": 0, "user": NOBODY} if os.getuid() == 0 else {"user": os.getuid()}


def test_random_jobs_leave_nothing_behind():
  found = jobs(250, warm=150, seed=1)
  assert found["leaks"] == [], found
  assert {"ok", "crash", "format", "policy", "memory", "timeout"} <= set(found["ends"])


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_escape_works_whatever_the_host_lacks(name, user):
  row = jailed(LAYERS[name], USERS[user], ESCAPES)
  assert row["jobs"] == len(ESCAPES)
  assert is_contained(row) and "refused" not in row, row
  absent = {"landlock": "landlock", "namespaces": "network_namespace"}
  assert not {absent[layer] for layer in LAYERS[name]} & set(row["layers"])
  assert "seccomp" in row["layers"] and ("uid_drop" in row["layers"]) == (USERS[user] == 0)


def test_a_host_without_seccomp_is_refused():
  row = jailed(("seccomp",), list(USERS.values())[-1], ESCAPES)
  assert "cannot confine" in row["refused"] and "config.sandbox.allow_weak" in row["refused"]


def test_the_long_command_tries_more_than_a_hundred_hostile_jobs():
  names = [name for name, *_ in hostile_jobs()]
  assert len(set(names)) == len(names) >= 100 and set(ESCAPES) <= set(names)


def test_children_weigh_little_beside_the_program():
  """By nice within a session, and all together as one session where the kernel shares by those."""

  async def scenario(box):
    task = asyncio.ensure_future(box.run(raw(SLOW, Limits(cpu_seconds=60.0, wall_seconds=600.0))))
    while not (pids := [r.pid for r in box._pool._schedule.alive.values() if r.ready and r.pid]):
      await asyncio.sleep(0.01)
    (pid,) = pids
    seen = os.getsid(pid), os.getpriority(os.PRIO_PROCESS, pid)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return seen

  with new_box() as box:
    session, nice = asyncio.run(scenario(box))
    assert session == box.stats()["zygote_pid"]
  assert nice == min(19, os.nice(0) + NICE)
