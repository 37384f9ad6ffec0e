"""Entry of the sandbox tests' jobs: code gets the interpreter, not the namespace of programs."""

import inspect


async def run_source(payload, call):
  """Executes payload["source"] with unguarded imports and awaits its `main(call)`."""
  namespace = {"__name__": "job", "payload": payload}
  exec(compile(payload["source"], "<program>", "exec"), namespace)
  value = namespace["main"](call)
  return await value if inspect.isawaitable(value) else value
