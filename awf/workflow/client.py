"""The model as a workflow sees it: AFlow's `AsyncLLM`, answered by the parent."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from awf.sandbox.child import JobError
from awf.types import price

Call = Callable[[str, Any], Awaitable[Any]]


class Session:
  """What all model clients of one job share: channel, public tests, counts of equal prompts.

  Attributes:
    prices: USD of a million prompt and a million generated tokens.
  """

  def __init__(
    self,
    call: Call,
    public_tests: tuple[str, ...] = (),
    prices: tuple[float, float] = (0.0, 0.0),
  ) -> None:
    self.call = call
    self._public_tests = public_tests
    self.prices = prices
    self._asked: dict[str, int] = {}

  def tests_of(self, entry_point: str) -> tuple[str, ...]:
    """The public tests of the problem, whatever its function is called."""
    del entry_point  # they came with the job
    return self._public_tests

  async def ask(self, messages: list[dict[str, str]]) -> dict[str, Any]:
    """Sends messages to the model; equal ones get occurrence 0, 1, ... in the order of asking.

    Returns:
      "text", "prompt_tokens", "completion_tokens".

    Raises:
      CallError: the parent refused the call.
    """
    name = json.dumps(messages)
    occurrence = self._asked.get(name, 0)
    self._asked[name] = occurrence + 1
    return await self.call("llm", {"messages": messages, "occurrence": occurrence})


class ModelClient:
  """A chat model with AFlow's interface: `await llm(prompt)` is the text of one reply.

  Attributes:
    sys_msg: system message, None without one.
  """

  def __init__(self, session: Session, config: Any = None, system_msg: str | None = None) -> None:
    self.config = config
    self.sys_msg = system_msg
    self.session = session
    self._history: list[dict[str, Any]] = []

  async def __call__(self, prompt: str) -> str:
    """Asks the model with one user message.

    Raises:
      TypeError: the prompt is not text.
      CallError: the parent refused the call.
    """
    if not isinstance(prompt, str):
      raise TypeError(f"the model needs a text, got {type(prompt).__name__}")
    messages = [{"role": "user", "content": "".join(prompt)}]
    if self.sys_msg:
      messages.insert(0, {"role": "system", "content": str(self.sys_msg)})
    reply = await self.session.ask(messages)
    self._record(reply["prompt_tokens"], reply["completion_tokens"])
    return reply["text"]

  def _record(self, prompt_tokens: int, completion_tokens: int) -> None:
    prices = self.session.prices
    used = (prompt_tokens, completion_tokens)
    costs = [price((used[0], 0), prices), price((0, used[1]), prices)]
    self._history.append(
      {
        "model": getattr(self.config, "model", ""),
        "input_tokens": prompt_tokens,
        "output_tokens": completion_tokens,
        "total_tokens": sum(used),
        "input_cost": costs[0],
        "output_cost": costs[1],
        "total_cost": sum(costs),
        # AFlow's are of a thousand tokens.
        "prices": {"input_price": prices[0] / 1000, "output_price": prices[1] / 1000},
      }
    )

  def get_usage_summary(self) -> dict[str, Any]:
    """AFlow's usage summary, costs in USD by `executor.prices`; 0.0 where those are not set."""
    inputs = sum(one["input_tokens"] for one in self._history)
    outputs = sum(one["output_tokens"] for one in self._history)
    return {
      "total_input_tokens": inputs,
      "total_output_tokens": outputs,
      "total_tokens": inputs + outputs,
      "total_cost": sum((one["total_cost"] for one in self._history), 0.0),
      "call_count": len(self._history),
      "history": [dict(one) for one in self._history],
    }


def malformed(message: str) -> JobError:
  """The failure of an operator whose model does not reply in the form that was asked for."""
  return JobError("format", message)


def client_of(llm: Any, operator_name: str) -> ModelClient:
  """Checks what an operator was built with.

  Raises:
    JobError: kind "format", when it is not the workflow's model.
  """
  if not isinstance(llm, ModelClient):
    raise JobError(
      "format",
      f"operator.{operator_name} was built with {type(llm).__name__}, expected the model: "
      f"operator.{operator_name}(self.llm)",
    )
  return llm
