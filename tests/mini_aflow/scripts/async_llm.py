"""AFlow's way to a model: config/config2.yaml of the working directory, chat completions."""

import json
import urllib.request

import yaml


class LLMsConfig:
  def __init__(self, models):
    self._models = models

  @classmethod
  def default(cls):
    with open("config/config2.yaml", encoding="utf-8") as file:
      return cls(yaml.safe_load(file)["models"])

  def get(self, name):
    return {"model": name, "temperature": 1, "top_p": 1, **self._models[name]}


def ask(model, prompt):
  """The reply to one user message; (text, usage)."""
  names = ("model", "temperature", "top_p")
  body = {k: model[k] for k in names} | {"messages": [{"role": "user", "content": prompt}]}
  request = urllib.request.Request(
    model["base_url"] + "/chat/completions",
    json.dumps(body).encode(),
    {"Authorization": f"Bearer {model['api_key']}", "Content-Type": "application/json"},
  )
  with urllib.request.urlopen(request, timeout=600) as response:
    answer = json.load(response)
  return answer["choices"][0]["message"]["content"], answer["usage"]
