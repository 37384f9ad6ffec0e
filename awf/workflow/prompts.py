"""Prompt texts of the operators. Changing one changes what every workflow costs and, for the nano
model, what it was trained on (data/nano/corpus.py uses these very functions)."""

from __future__ import annotations

XML_RULE = "Reply with these tags and nothing else:"


def custom(instruction: str, input: str) -> str:
  """Instruction first, then the input, simply joined (as AFlow does); no placeholders."""
  return instruction + input


def programmer(problem: str, analysis: str = "None", feedback: str = "") -> str:
  text = (
    "Write a Python program that solves the problem. Define solve() without arguments; it returns"
    f" the final answer. Reply with one python code block.\nProblem: {problem}"
  )
  if analysis and analysis != "None":
    text += f"\nAnalysis: {analysis}"
  if feedback:
    text += f"\nThe last program failed: {feedback}"
  return text


def code_generate(problem: str, entry_point: str, instruction: str) -> str:
  return (
    f"{instruction}{problem}\nReply with the complete Python code in one python code block; "
    f"it must define {entry_point}."
  )


def sc_ensemble(solutions: list[str], problem: str = "") -> str:
  """Letters A, B, ... before the candidate solutions; the model names the best one."""
  listed = "\n".join(f"{chr(65 + i)}: {text}" for i, text in enumerate(solutions))
  head = f"Problem: {problem}\n" if problem else ""
  return (
    f"{head}Candidate solutions:\n{listed}\nWhich one is right or the most consistent? {XML_RULE}\n"
    "<thought>why</thought>\n<solution_letter>one letter</solution_letter>"
  )


def answer_generate(input: str) -> str:
  return (
    f"{input}\nThink step by step, then give a short final answer. {XML_RULE}\n"
    "<thought>your steps</thought>\n<answer>the answer alone</answer>"
  )


def again(prompt: str, wanted: str) -> str:
  """The prompt once more, after a reply that did not have what was asked for."""
  return f"{prompt}\nThe last reply had no {wanted}. Reply in exactly that form."


def md_ensemble(solutions: list[str], problem: str) -> str:
  """As `sc_ensemble`, for the best solution alone."""
  listed = "\n".join(f"{chr(65 + i)}: {text}" for i, text in enumerate(solutions))
  return (
    f"Problem: {problem}\nCandidate solutions:\n{listed}\nWhich one is the best? {XML_RULE}\n"
    "<thought>why</thought>\n<solution_letter>one letter</solution_letter>"
  )


def short_answer(problem: str, solution: str) -> str:
  return (
    f"Problem: {problem}\nSolution: {solution}\nWhat is the final answer of this solution? Reply "
    "with the answer alone, a number or a few words."
  )


def review(problem: str, solution: str) -> str:
  return (
    f"Problem: {problem}\nSolution: {solution}\nCheck the solution. Reject it only when you are "
    f"more than 95 percent sure that it is wrong. {XML_RULE}\n"
    "<review_result>true or false</review_result>\n<feedback>what is wrong</feedback>"
  )


def revise(problem: str, solution: str, feedback: str) -> str:
  return (
    f"Problem: {problem}\nSolution: {solution}\nFeedback: {feedback}\nCorrect the solution. "
    f"{XML_RULE}\n<solution>the corrected solution</solution>"
  )


def reflect_on_test(problem: str, solution: str, failure: str) -> str:
  return (
    f"Problem: {problem}\nCode:\n{solution}\nIt fails: {failure}\nFind the mistake, then reply "
    "with the complete corrected code in one python code block."
  )
