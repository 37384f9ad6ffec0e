"""Runs AFlow's own Optimizer; started by `aflow_driver` with AFlow's interpreter (Python >= 3.9).

Its one argument is a JSON object: the arguments of Optimizer, with the names of the two models in
config/config2.yaml instead of their configurations. It imports nothing of awf.
"""

import importlib
import json
import os
import signal
import sys
import threading
import time


def end_with_parent():
  """Ends this process and all that it started when the one that started it is gone."""
  parent = os.getppid()

  def watch():
    while os.getppid() == parent:
      time.sleep(1)
    os.killpg(os.getpid(), signal.SIGKILL)  # it leads a group of its own

  threading.Thread(target=watch, daemon=True).start()


def main():
  end_with_parent()
  fields = json.loads(sys.argv[1])
  models = importlib.import_module("scripts.async_llm").LLMsConfig.default()
  optimizer = importlib.import_module("scripts.optimizer").Optimizer(
    opt_llm_config=models.get(fields.pop("optimizer")),
    exec_llm_config=models.get(fields.pop("executor")),
    **fields,
  )
  optimizer.optimize("Graph")


main()
