"""The compact proposal prompt: the node alone, no lengthy rules; what the nano model is trained
on.
"""

from __future__ import annotations

from collections.abc import Sequence

from awf.types import WorkflowSource


def compact_prompt(
  source: WorkflowSource, score: float, experience: Sequence[str] = (), logs: str = ""
) -> str:
  """Renders a node for the optimiser; parts with nothing to show are left out.

  Args:
    source: the parent workflow.
    score: its mean score in [0, 1].
    experience: one line per evaluated child, newest last.
    logs: failure log entries, already sanitised.
  """
  parts = ["Improve this workflow.", f"<score>{score:.2f}</score>"]
  if experience:
    parts.append("<experience>\n" + "\n".join(experience) + "\n</experience>")
  if logs:
    parts.append(f"<logs>\n{logs}\n</logs>")
  parts.append(f"<graph>\n{source.graph.strip()}\n</graph>")
  parts.append(f"<prompt>\n{source.prompt.strip()}\n</prompt>")
  return "\n".join(parts)
