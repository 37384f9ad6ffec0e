"""AFlow's Optimizer as far as its files and its requests go."""

import datetime
import json
import pathlib
import re

from scripts.async_llm import ask

REQUEST = """Here is a graph that performed well before; improve it.
<sample>
    <experience>none</experience>
    <modification>(such as:add /delete /modify/ ...)</modification>
    <score>{score}</score>
    <graph>{graph}</graph>
    <prompt>{prompt}</prompt>(only prompt_custom)
    <operator_description>{operators}</operator_description>
</sample>
Rules follow."""


class Optimizer:
  def __init__(
    self, dataset, question_type, opt_llm_config, exec_llm_config, operators, sample,
    check_convergence=False, optimized_path=None, initial_round=1, max_rounds=20,
    validation_rounds=5,
  ):  # fmt: skip
    self.dataset, self.operators = dataset, operators
    self.optimizer, self.executor = opt_llm_config, exec_llm_config
    self.path = pathlib.Path(f"{optimized_path}/{dataset}/workflows")
    self.round, self.max_rounds = initial_round, max_rounds
    with open(f"data/datasets/{dataset.lower()}_validate.jsonl", encoding="utf-8") as file:
      self.problems = [json.loads(line) for line in file]

  def optimize(self, mode):
    assert mode == "Graph"
    for _ in range(self.max_rounds):
      try:
        self._one_round()
      except Exception as error:  # as AFlow does: the round is lost
        print("Error occurred:", repr(error))
      self.round += 1

  def _one_round(self):
    results = self.path / "results.json"
    rows = json.loads(results.read_text())
    if self.round == 1:
      rows.append(self._evaluate(1))
      results.write_text(json.dumps(rows))
    folder = self.path / f"round_{self.round + 1}"
    folder.mkdir(exist_ok=True)
    parent = max(rows, key=lambda row: row["score"])
    own = self.path / f"round_{parent['round']}"
    text, prompt = (own / "graph.py").read_text(), (own / "prompt.py").read_text()
    graph = text[text.index("class Workflow:") :]
    reply, _ = ask(
      self.optimizer,
      REQUEST.format(score=parent["score"], graph=graph, prompt=prompt, operators=self.operators),
    )
    parts = {k: v.strip() for k, v in re.findall(r"<(\w+)>(.*?)</\1>", reply, re.DOTALL)}
    head = text[: text.index("class Workflow:")].replace(own.name, folder.name)
    (folder / "graph.py").write_text(head + parts["graph"] + "\n")
    (folder / "prompt.py").write_text(parts["prompt"])
    (folder / "__init__.py").write_text("")
    compile(parts["graph"], "graph.py", "exec")
    rows.append(self._evaluate(self.round + 1))
    results.write_text(json.dumps(rows))
    experience = {
      "father node": parent["round"], "modification": parts["modification"],
      "before": parent["score"], "after": rows[-1]["score"],
      "succeed": rows[-1]["score"] > parent["score"],
    }  # fmt: skip
    (folder / "experience.json").write_text(json.dumps(experience))

  def _evaluate(self, number):
    solved, log = 0, []
    for row in self.problems:
      reply, _ = ask(self.executor, row["question"])
      wanted = row["answer"].rpartition("####")[2].strip()
      found = re.findall(r"-?\d+", reply)
      if found and found[-1] == wanted:
        solved += 1
      else:
        log.append({"question": row["question"], "right_answer": wanted, "model_output": reply})
    (self.path / f"round_{number}" / "log.json").write_text(json.dumps(log))
    score, now = solved / len(self.problems), datetime.datetime.now().isoformat()
    return {"round": number, "score": score, "avg_cost": 0.0, "total_cost": 0.0, "time": now}
