"""NumericComparisonValidator: extraction, exact comparison, and answers that try to cheat."""

import asyncio
import sys
import time
from fractions import Fraction

import pytest

from awf.tasks import quantities
from awf.tasks.latex import LatexComparer
from awf.tasks.numeric import NumericComparisonValidator
from awf.types import UserError


@pytest.fixture(scope="module")
def validator():
  made = NumericComparisonValidator()
  yield made
  made.close()


@pytest.mark.parametrize(
  "answer, expected",
  [
    ("5", "5"), ("5.0", "5"), ("073", "73"), ("1,234", "1234"), ("1{,}234", "1234"),
    ("1\\,234", "1234"), ("1/2", "0.5"), ("\\frac{1}{2}", "0.5"), ("\\dfrac12", ".5"),
    ("-\\frac{1}{2}", "-0.5"), ("1\\frac{1}{2}", "3/2"), ("1 1/2", "1.5"), ("1½", "1.5"),
    ("½", "0.5"), ("−5", "-5"), ("- 5", "-5"), ("5 apples", "5"), ("5 km/h", "5"),
    ("5 cm^2", "5"), ("5 cm²", "5"), ("$5$", "5"), ("\\$5", "5"), ("$1,000.50", "1000.5"),
    ("US$5", "5"), ("HK\\$5", "5"),
    ("x=5", "5"), ("The answer is 5", "5"), ("**42**", "42"), ("42.", "42"), ("{5}", "5"),
    ("(5)", "5"), ("5 times a day", "5"), ("5th", "5"), ("5 m", "5"), ("５", "5"), ("45%", "45"),
    ("45%", "0.45"), ("0.45", "45%"), ("45\\%", "45 percent"), ("3e4", "30000"),
    ("3\\times 10^4", "30000"), ("3 x 10^{-2}", "0.03"), ("5 million", "5000000"),
    ("-1,200", "-1200"), ("($1,200)", "1200"), ("(1,200 dollars)", "1200"), ("10,000", "10000"),
    ("(32,\\!348)", "32348"), ("(2{,}500)", "2500"),
    ("[0,100]", "[0, 100]"), ("(2,500)", "(2, 500)"), ("\\left(2,500\\right)", "(2,500)"),
    ("\\bigl[1,200\\bigr)", "[1, 200)"), ("(-1,200)", "(-1, 200)"), ("(2,\\,500)", "(2,500)"),
    ("90^\\circ", "90"), ("90°", "90"), ("\\text{Evelyn}", "evelyn"), ("0.1", "1/10"),
  ],
)  # fmt: skip
def test_equal_numbers(validator, answer, expected):
  assert validator.compare(answer, expected) == (True, "")


@pytest.mark.parametrize(
  "answer, expected",
  [
    ("5 or 6", "5"), ("5, 6", "5"), ("5 6", "5"), ("5x", "5"), ("x-5", "5"), ("-5", "5"),
    ("5 +", "5"), ("5/x", "5"), ("5 - 3", "5"), ("5\\pi", "5"), ("2**10", "2"), ("0.45%", "0.45"),
    ("5:30", "5"), ("1/3", "0.333"), ("0.3333333333333", "1/3"), ("1 234", "1234"),
    ("3:5", "0.6"), ("1.2.3", "1.2"), ("", "5"), ("none", "5"), ("9" * 5000, "9"),
    ("1e999999", "1"), ("1/0", "1"), ("5!", "5"), ("\\{1,2,3,4,5\\}", "5"), ("n", "7"),
    ("5=6", "5"), ("True", "1"), ("12^", "12"), ("1,23", "123"),
    ("0,100", "100"), ("2500", "(2,500)"), ("(2,500)", "2500"), ("[1,200)", "(1,200)"),
    ("(2,500)", "[2,500]"), ("1200", "\\{1,200\\}"), ("\\{1,200\\}", "1200"),
  ],
)  # fmt: skip
def test_unequal_or_no_single_number(validator, answer, expected):
  equal, reason = validator.compare(answer, expected)
  assert not equal and reason and expected not in reason.split()


@pytest.mark.parametrize(
  "answer, expected, equal",
  [
    ("2\\sqrt{3}", "\\sqrt{12}", True), ("\\sqrt{16}", "4", True), ("5\\pi", "5\\pi", True),
    ("2^{10}", "1024", True), ("x^2y^2", "y^2x^2", True),
    ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", True), ("\\sqrt{2}", "1.4142135", False),
    ("\\{200,1\\}", "\\{1,200\\}", True), ("(\\frac12,500)", "(0.5,500)", True),
    ("[2.0,500)", "[2,500)", True), ("(500,2)", "(2,500)", False),
    ("\\sqrt{3}", "\\sqrt{2}", False), ("5 \\text{ or } 6", "5", False),
  ],
)  # fmt: skip
def test_latex(validator, answer, expected, equal):
  assert validator.compare(answer, expected)[0] is equal


@pytest.mark.parametrize(
  "response, answer, strategy",
  [
    ("<answer>5</answer> or 7", "5", "tag"),
    ("<answer>1</answer> no, <ANSWER> 2 </ANSWER>", "2", "tag"),
    ("<answer>\\boxed{8}</answer>", "8", "tag"),
    ("<answer>42", "42", "tag"),
    ("x \\boxed{\\frac{1}{2}} 9", "\\frac{1}{2}", "boxed"),
    ("\\boxed{1} then \\boxed{2}", "2", "boxed"),
    ("\\boxed 7 and 8", "7", "boxed"),
    ("\\boxed{7 \nand 8", "7", "boxed"),
    ("first 1\nThe answer is 12 out of 30", "12", "last_line"),
    ("Answer: 5 (see step 2)", "5", "last_line"),
    ("so 3 + 4 = 7", "7", "last_line"),
    ("#### 1,200", "1,200", "last_line"),
    ("It is \\(1,200\\)", "1,200", "last_line"),
    ("That makes a total (2,500)", "2,500", "last_line"),
    ("the answer is...42", "42", "last_line"),
    ("= -3", "-3", "last_line"),
    ("So he pays 3 × US$6 = US$18.", "18", "last_number"),
    ("It is A\\$ 7", "7", "last_line"),
    ("we get 3 and 4", "4", "last_number"),
    ("first 3\nno numbers here", "3", "last_number"),
  ],
)
def test_extraction(validator, response, answer, strategy):
  found = validator.extract(response)
  assert (found.text, found.strategy) == (answer, strategy)


def test_a_tag_or_box_hides_all_else(validator):
  for response in ("<answer></answer> 5", "<answer>unknown</answer>\n5", "\\boxed{} so 5",
                   "<answer>4 5</answer> 5", "5 <answer>"):  # fmt: skip
    assert not validator.validate(response, "5").correct


def test_nothing_found(validator):
  for response in ("", "no number", "version 1.2.3", "on 2024-05-06", "x_1 and y2"):
    grade = validator.validate(response, 5)
    assert (grade.score, grade.correct, grade.answer) == (0.0, False, "")


def test_order_of_strategies_is_the_users():
  response = "<answer>1</answer> \\boxed{2}\nlast 3"
  for strategies, answer in ((("boxed", "tag"), "2"), (("last_number",), "3"), (("tag",), "1")):
    assert NumericComparisonValidator(strategies, latex=False).extract(response).text == answer
  for bad in ((), ("tags",)):
    with pytest.raises(UserError, match="strategies"):
      NumericComparisonValidator(bad)


def test_tolerance():
  assert not NumericComparisonValidator(latex=False).compare("0.3333", "1/3")[0]
  near = NumericComparisonValidator(tolerance=Fraction(1, 1000), latex=False)
  assert near.compare("0.3333", "1/3")[0] and not near.compare("0.33", "1/3")[0]
  with pytest.raises(UserError):
    NumericComparisonValidator(tolerance=-1)


def test_grade_agrees_with_validate(validator):
  for response, expected in (
    ("<answer>5</answer>", 5),
    ("6", 5),
    ("", 5),
    ("\\boxed{\\sqrt{16}}", 4),
  ):
    assert asyncio.run(validator.grade(response, expected)) == validator.validate(
      response, expected
    )


@pytest.mark.parametrize(
  "text",
  ["9" * 200_000, "1," * 50_000, "<answer>" * 20_000, "\\boxed{" * 20_000, "- " * 50_000,
   "1/" * 50_000, "{" * 100_000, " " * 100_000 + "1", "\\frac{" * 20_000,
   "a=" * 50_000, "1 1/" * 30_000, "(" * 100_000, "(1," * 40_000, "(" + "1," * 50_000],
  ids=lambda text: text[:8],
)  # fmt: skip
def test_long_responses_take_bounded_time(validator, text):
  start = time.perf_counter()
  validator.validate(text, "5")
  assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
  "text",
  ["10^{10^{10}}", "9^9^9^9", "99999!", "3!!", "__import__('os').system('id')",
   "\\input{/etc/passwd}", "x.__class__", "a" * 400, '"x"', "\\sqrt{"],
)  # fmt: skip
def test_expressions_that_are_not_compared(validator, text):
  start = time.perf_counter()
  assert not validator.compare(f"\\boxed{{{text}}}", "5\\pi")[0]
  assert not validator.compare(text, "5\\pi")[0]
  assert time.perf_counter() - start < 10


def test_a_comparison_past_its_time_is_unequal_and_the_next_one_works():
  comparer = LatexComparer(seconds=0.3)
  try:
    slow = "\\int_0^1 \\sin(x^7) \\cos(x^5) \\tan(x^3) dx"
    equal, reason = comparer.equal(slow, "\\sqrt{\\pi}+" + slow)
    assert not equal and "did not end" in reason
    comparing = NumericComparisonValidator()
    comparing._latex = comparer
    slow_grade = comparing.validate(f"\\boxed{{{slow}}}", "\\sqrt{\\pi}+" + slow)
    assert (slow_grade.correct, slow_grade.failure) == (False, "timeout")
    assert comparer._process is None  # ended by its processor time, long before the wall's limit
    comparer.seconds = 20.0
    assert comparer.equal("\\sqrt{4}", "2") == (True, "")
    helper = comparer._process
    helper.kill()
    helper.wait()
    assert comparer.equal("\\sqrt{9}", "3") == (True, "")
  finally:
    comparer.close()


@pytest.mark.parametrize("sign, value", [("", 1), ("-", -1), ("−", -1), ("+", 1)])
@pytest.mark.parametrize(
  "number", [Fraction(0), Fraction(7), Fraction(1234567), Fraction(1, 8), Fraction(22, 7)]
)
def test_reading_back_what_was_written(number, sign, value):
  forms = [
    f"{number.numerator}/{number.denominator}",
    f"\\frac{{{number.numerator}}}{{{number.denominator}}}",
  ]
  if number.denominator == 1:
    forms += [
      str(number),
      f"{number.numerator:,}",
      f"{number.numerator}.00",
      f"{number.numerator}e0",
    ]
  if number.denominator == 8:
    forms += [str(float(number)), "12.5%"]
  for form in forms:
    found = quantities.parse_quantity(sign + form)
    assert found.value / (100 if found.percent else 1) == value * number, form


def test_the_comparison_finds_packages_where_this_process_does(tmp_path, monkeypatch):
  """As after `pip install --target DIR` with PYTHONPATH=DIR."""
  text = "def {}(*_, **__):\n  return [True]\n"
  names = "LatexExtractionConfig", "parse", "verify"
  (tmp_path / "math_verify.py").write_text("".join(text.format(name) for name in names))
  monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
  comparer = LatexComparer(seconds=20.0)
  try:
    assert comparer.equal("a + x", "b + y") == (True, "")
  finally:
    comparer.close()
