"""Word problems with integer answers from 0 to 999, in nine families.

Each family is a function from a random generator to an `Item`; `wide` draws larger numbers (first
phase of training). Six families suit programs; three need facts (`legs`, `units`) or a reading of
number words (`words`) that no program in the training text has. Worked solutions can carry random
slips, so that single calls err independently and a vote over several helps.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Container

Slip = Callable[[int], int]


@dataclasses.dataclass(frozen=True)
class Item:
  """One problem: `key` identifies it whatever the phrasing; `work(slip)` gives (lines, answer)."""

  family: str
  key: tuple
  question: str
  answer: int
  work: Callable[[Slip], tuple[list[str], int]]
  program: tuple[str, ...]  # body lines of solve(); empty: a program cannot help


NAMES = ("Ann", "Ben", "Cora", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon", "Kim", "Leo")
GOODS = ("pens", "cups", "kites", "books", "hats", "lamps", "bags", "toys", "rugs", "bells")
BIRDS = ("ducks", "geese", "crows", "owls", "swans", "gulls", "doves", "finches")
PLACES = ("pond", "park", "farm", "barn", "field", "yard")
MAKERS = (("mill", "sacks"), ("shop", "cakes"), ("press", "plates"), ("plant", "bottles"),
          ("oven", "loaves"), ("loom", "scarves"))  # fmt: skip
LEGS = {"cats": 4, "dogs": 4, "cows": 4, "hens": 2, "ducks": 2, "ants": 6, "bees": 6, "flies": 6,
        "spiders": 8, "ticks": 8, "crabs": 10, "prawns": 10}  # fmt: skip
UNITS = (("weeks", "days", 7), ("dozens", "eggs", 12), ("days", "hours", 24), ("scores", "years", 20),
         ("decades", "years", 10), ("hours", "minutes", 60), ("feet", "inches", 12),
         ("pounds", "ounces", 16), ("gallons", "pints", 8), ("yards", "feet", 3))  # fmt: skip
ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
        " sixteen seventeen eighteen nineteen").split()  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def in_words(n: int) -> str:
  """English words of 0..99."""
  if n < 20:
    return ONES[n]
  return TENS[n // 10] + ("-" + ONES[n % 10] if n % 10 else "")


def shop(r: random.Random, wide: bool = False) -> Item:
  top = 15 if wide else 12
  name, (x, y) = r.choice(NAMES), r.sample(GOODS, 2)
  a, b, c, d = r.randint(2, top), r.randint(2, top), r.randint(2, top), r.randint(2, top)
  question = r.choice((
    f"{name} buys {a} {x} at {b} coins each and {c} {y} at {d} coins each. How many coins is that?",
    f"A box of {x} costs {b} coins and a box of {y} costs {d} coins. {name} takes {a} boxes of {x} and"
    f" {c} boxes of {y}. What is the price in coins?",
    f"{name} sells {a} {x} for {b} coins each and {c} {y} for {d} coins each. How many coins does"
    f" {name} get?",
  ))  # fmt: skip

  def work(slip):
    p, q = slip(a * b), slip(c * d)
    s = slip(p + q)
    return [f"{a}*{b}={p}", f"{c}*{d}={q}", f"{p}+{q}={s}"], s

  body = (f"a = {a} * {b}", f"b = {c} * {d}", "return a + b")
  return Item("shop", (a, b, c, d, x, y), question, a * b + c * d, work, body)


def flow(r: random.Random, wide: bool = False) -> Item:
  bird, place = r.choice(BIRDS), r.choice(PLACES)
  a = r.randint(30, 200 if wide else 99)
  b, d = r.randint(11, 90 if wide else 40), r.randint(11, 90 if wide else 40)
  c = r.randint(11, min(99 if wide else 40, a + b - 5))
  total = a + b - c + d
  question = r.choice((
    f"There are {a} {bird} at the {place}. Then {b} come, {c} leave and {d} come. How many {bird} are"
    " there now?",
    f"A {place} has {a} {bird}. In the morning {b} arrive, at noon {c} fly off, at night {d} arrive."
    f" How many {bird} does it have?",
    f"{a} {bird} sit at the {place}. {b} join them, {c} go away and {d} more join. How many sit there?",
  ))  # fmt: skip

  def work(slip):
    x = slip(a + b)
    y = slip(x - c)
    z = slip(y + d)
    return [f"{a}+{b}={x}", f"{x}-{c}={y}", f"{y}+{d}={z}"], z

  body = (f"a = {a} + {b}", f"b = a - {c}", f"return b + {d}")
  return Item("flow", (a, b, c, d), question, total, work, body)


def rate(r: random.Random, wide: bool = False) -> Item:
  maker, thing = r.choice(MAKERS)
  a, h, g = r.randint(6, 29 if wide else 15), r.randint(3, 9 if wide else 6), r.randint(2, 4)
  lost = r.randint(3, a * h - 1)
  lost = min(lost, 60 if wide else 20)
  total = (a * h - lost) * g
  if total > 999:
    return rate(r, wide)
  question = r.choice((
    f"A {maker} makes {a} {thing} an hour for {h} hours a day and {lost} of them break. How many"
    f" good {thing} does it make in {g} days?",
    f"Each day a {maker} runs {h} hours, makes {a} {thing} an hour and loses {lost}. How many {thing}"
    f" are left after {g} days?",
    f"A {maker} runs {h} hours a day and makes {a} {thing} in every hour. Each day {lost} {thing} are"
    f" spoiled. How many are fine after {g} days?",
  ))  # fmt: skip

  def work(slip):
    x = slip(a * h)
    y = slip(x - lost)
    z = slip(y * g)
    return [f"{a}*{h}={x}", f"{x}-{lost}={y}", f"{y}*{g}={z}"], z

  body = (f"a = {a} * {h}", f"b = a - {lost}", f"return b * {g}")
  return Item("rate", (a, h, lost, g), question, total, work, body)


def power(r: random.Random, wide: bool = False) -> Item:
  del wide  # the same numbers always
  a, n, m = r.randint(2, 15), r.randint(4, 15), r.randint(5, 19)
  question = r.choice((
    f"What is the remainder when {a}^{n} is divided by {m}?",
    f"Find {a}^{n} modulo {m}.",
    f"{a} to the power {n} is divided by {m}. What remains?",
  ))  # fmt: skip

  def work(slip):
    x, lines = a % m, [f"{a}%{m}={a % m}"]
    for _ in range(n - 1):
      y = slip(x * a % m)
      lines.append(f"{x}*{a}%{m}={y}")
      x = y
    return lines, x

  return Item("power", (a, n, m), question, pow(a, n, m), work, (f"return {a} ** {n} % {m}",))


def count(r: random.Random, wide: bool = False) -> Item:
  low, high = (60, 400) if wide else (30, 150)
  top, a, b = r.randint(low, high), *r.sample(range(3, 12), 2)
  both = next(x for x in range(max(a, b), a * b + 1) if x % a == 0 and x % b == 0)
  total = top // a + top // b - top // both
  question = r.choice((
    f"How many integers from 1 to {top} are divisible by {a} or by {b}?",
    f"Count the numbers from 1 to {top} that are multiples of {a} or {b}.",
    f"How many of the numbers 1, 2, ..., {top} can be divided by {a} or {b}?",
  ))  # fmt: skip

  def work(slip):
    x, y, z = slip(top // a), slip(top // b), slip(top // both)
    s = slip(x + y)
    t = slip(s - z)
    return [f"{top}//{a}={x}", f"{top}//{b}={y}", f"{top}//{both}={z}", f"{x}+{y}={s}",
            f"{s}-{z}={t}"], t  # fmt: skip

  body = (f"n = range(1, {top} + 1)", f"return sum(x % {a} == 0 or x % {b} == 0 for x in n)")
  return Item("count", (top, a, b), question, total, work, body)


def squares(r: random.Random, wide: bool = False) -> Item:
  low = r.randint(1, 13)
  high, k = low + r.randint(2, 4), r.randint(1, 50)
  total = sum(x * x for x in range(low, high + 1)) + k
  if total > 999:
    return squares(r, wide)
  question = r.choice((
    f"Add {k} to the sum of the squares of the integers from {low} to {high}.",
    f"What is {k} plus the sum of all squares x^2 for x from {low} to {high}?",
    f"The squares of {low} up to {high} are added, then {k} is added. What is the result?",
  ))  # fmt: skip

  def work(slip):
    total, lines = slip(low * low), []
    lines.append(f"{low}*{low}={total}")
    for x in range(low + 1, high + 1):
      s = slip(x * x)
      new = slip(total + s)
      lines += [f"{x}*{x}={s}", f"{total}+{s}={new}"]
      total = new
    end = slip(total + k)
    return [*lines, f"{total}+{k}={end}"], end

  body = (f"n = range({low}, {high} + 1)", f"return sum(x * x for x in n) + {k}")
  return Item("squares", (low, high, k), question, total, work, body)


def legs(r: random.Random, wide: bool = False) -> Item:
  top = 40 if wide else 15
  x, y = r.sample(sorted(LEGS), 2)
  a, b = r.randint(3, top), r.randint(3, top)
  place = r.choice(PLACES)
  question = r.choice((
    f"How many legs do {a} {x} and {b} {y} have together?",
    f"In a {place} there are {a} {x} and {b} {y}. How many legs are that?",
    f"Count the legs of {a} {x} and {b} {y}.",
  ))  # fmt: skip

  def work(slip):
    p, q = slip(a * LEGS[x]), slip(b * LEGS[y])
    s = slip(p + q)
    return [f"{x}: {a}*{LEGS[x]}={p}", f"{y}: {b}*{LEGS[y]}={q}", f"{p}+{q}={s}"], s

  return Item("legs", (a, x, b, y), question, a * LEGS[x] + b * LEGS[y], work, ())


def units(r: random.Random, wide: bool = False) -> Item:
  big, small, size = r.choice(UNITS)
  a, c = r.randint(2, 19 if wide else 12), r.randint(2, 9 if wide else 5)
  b = r.randint(1, 40 if wide else 20)
  total = a * size + b * c
  if total > 999:
    return units(r, wide)
  name = r.choice(NAMES)
  question = r.choice((
    f"{name} needs {a} {big} and {c} times {b} {small}. How many {small} are that in all?",
    f"How many {small} are {a} {big} plus {c} times {b} {small}?",
    f"Write {a} {big} and {c} lots of {b} {small} in {small}.",
  ))  # fmt: skip

  def work(slip):
    p, q = slip(a * size), slip(c * b)
    s = slip(p + q)
    return [f"{big}: {a}*{size}={p}", f"{c}*{b}={q}", f"{p}+{q}={s}"], s

  return Item("units", (big, a, b, c), question, total, work, ())


def words(r: random.Random, wide: bool = False) -> Item:
  top = 99 if wide else 49
  a, b, c = r.randint(11, top), r.randint(2, 9 if wide else 6), r.randint(11, top)
  total = a * b + c
  x, y, z = in_words(a), in_words(b), in_words(c)
  question = r.choice((
    f"What is {x} times {y} plus {z}?",
    f"Take {x}, multiply by {y}, then add {z}. What do you get?",
    f"Add {z} to the product of {x} and {y}.",
  ))  # fmt: skip

  def work(slip):
    p = slip(a * b)
    s = slip(p + c)
    return [f"{a}*{b}={p}", f"{p}+{c}={s}"], s

  return Item("words", (a, b, c), question, total, work, ())


FAMILIES: dict[str, Callable[..., Item]] = {
  f.__name__: f for f in (shop, flow, rate, power, count, squares, legs, units, words)
}


def make_slip(r: random.Random, probability: float) -> Slip:
  """A slip changes a value by a little, at random, with the given probability per line."""

  def slip(value: int) -> int:
    if r.random() >= probability:
      return value
    return max(0, value + r.choice((-1, 1)) * r.choice((1, 1, 2, 3, 4, 5, 7, 10, 10, 20)))

  return slip


SIZES = {"validation": 40, "test": 30, "card": 110}  # problems of a family in each set


def problem_sets(
  seed: int = 11, wide: bool = False, seen: Container[tuple] = ()
) -> dict[str, list[Item]]:
  """Reserved problems: "validation" and "test" are shipped, "card" measures the model card.

  Args:
    seed: of the draw.
    wide: with the larger numbers.
    seen: (family, key) of problems that training has met; left out.

  Returns:
    `SIZES` problems of each family, no two with the same key.
  """
  r = random.Random(seed)
  sets: dict[str, list[Item]] = {name: [] for name in SIZES}
  for family, make in FAMILIES.items():
    used: set[tuple] = set()
    for name, size in SIZES.items():
      chosen: list[Item] = []
      while len(chosen) < size:
        item = make(r, wide)
        if item.key not in used and (family, item.key) not in seen:
          used.add(item.key)
          chosen.append(item)
      sets[name] += chosen
  return sets
