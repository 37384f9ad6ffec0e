"""The report page in a real browser: it loads, opens nodes, and runs nothing that a model wrote."""

import html
import json

import pytest
from browser import Browser, find_chromium
from made_run import make_run

from awf.report import write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on PATH")

# Each would set window.hacked if the page took it for markup or code.
ATTACKS = (
  "</script><script>window.hacked=1</script>",
  "<!--<script>window.hacked=1</script>",
  "<img src=x onerror=window.hacked=1>",
  '"><img src=x onerror=window.hacked=1>',
  "' onmouseover='window.hacked=1' onfocus='window.hacked=1' autofocus='",
  "<svg onload=window.hacked=1><animate onbegin=window.hacked=1 attributeName=x dur=1s>",
  "<svg><style></style><script>window.hacked=1</script></svg>",
  "\u2028window.hacked=1//\u2029",
  "javascript:window.hacked=1",
  "${window.hacked=1}`;window.hacked=1//",
  '<iframe srcdoc="<script>parent.hacked=1</script>"></iframe>',
  "]]></text><foreignObject><body onload=window.hacked=1>",
  "\\u003cscript\\u003ewindow.hacked=1\\u003c/script\\u003e",
  "__proto__",
)
COUNT = 30


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """A run of 30 nodes; every text that a model writes, from node 2 on, is hostile."""
  folder = tmp_path_factory.mktemp("hostile")
  make_run(folder, COUNT)
  journal = folder / "workspace" / "NANO" / "journal.jsonl"
  events = [json.loads(line) for line in journal.read_text().splitlines()]
  evil = "\n".join(ATTACKS)
  for event in events:
    made = event.get("node")
    if made and made["id"] > 1:
      made["source"] = {"graph": made["source"]["graph"] + evil, "prompt": evil}
      made["modification"] = ATTACKS[made["id"] % len(ATTACKS)]
      for entry in made["log"]:
        entry["output"] = entry["extracted"] = evil
      if made["failure"]:
        made["failure"]["message"] = evil
  journal.write_text("".join(json.dumps(event) + "\n" for event in events))
  problems = {f"train-{i}": evil for i in range(40)}
  (folder / "problems.json").write_text(json.dumps(problems))
  config = {"config": {"name": evil, evil: evil}, "command": evil, "commit": evil, "mode": evil}
  (folder / "config.json").write_text(json.dumps(config))
  return write_report(folder)


@pytest.fixture(scope="module")
def browser():
  with Browser() as opened:
    yield opened


def press(browser, text):
  found = f"[...document.querySelectorAll('button')].find(b => b.textContent === {text!r})"
  browser.value(f"{found}.click()")


def heading(browser):
  return browser.value("document.querySelector('.panel:not([hidden]) h3')?.textContent ?? ''")


def settle(browser):
  """Waits until what was asked for is drawn."""
  browser.value("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(() => f(1))))")


def test_a_hostile_run_loads_opens_every_node_and_runs_nothing(browser, page):
  browser.open(page)
  count = browser.value("Number(document.querySelector('.canvas').dataset.nodes)")
  assert count == COUNT
  seen = set()
  for id in range(1, COUNT + 1):
    browser.value(f"location.hash = ''; document.querySelector('input').value = '{id}'")
    browser.value("document.querySelector('input').dispatchEvent(new Event('input'))")
    browser.value(
      f"[...document.querySelectorAll('.hits button')]"
      f".find(b => b.textContent.startsWith('{id}:')).click()"
    )
    browser.value("document.querySelectorAll('details').forEach(d => d.open = true)")
    seen.add(heading(browser).split(" — ")[0])
  assert seen == {f"Node {id}" for id in range(1, COUNT + 1)}
  settle(browser)
  shown = browser.value("document.querySelector('.panel').textContent")
  assert "window.hacked=1" in shown  # as text
  assert browser.value("typeof window.hacked") == "undefined"
  assert browser.value("document.querySelectorAll('img, iframe, foreignObject, a').length") == 0
  assert browser.value("document.scripts.length") == 2
  handlers = "[...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
  assert not [name for name in browser.value(handlers) if name.startswith("on")]
  assert browser.faults == []
  assert [url for url in browser.requests if not url.startswith("about:")] == [f"file://{page}"]


def test_the_policy_stops_a_script_that_is_not_the_page_s_own(browser, page):
  """A second wall: even markup that got into the page would not run."""
  browser.open(page)
  browser.value(
    "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=window.hacked=1>');"
    "{ const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
    "document.body.append(s); }"
  )
  settle(browser)
  assert browser.value("typeof window.hacked") == "undefined"
  assert any("Content Security Policy" in fault for fault in browser.faults)
  browser.faults.clear()


def test_pointer_and_keys(browser, page):
  browser.open(page)
  browser.value("document.querySelector('.canvas').scrollIntoView()")
  settle(browser)
  spot = browser.value(
    "(() => { const b = document.querySelector('.canvas .ring').getBoundingClientRect();"
    "return [b.x + b.width / 2, b.y + b.height / 2] })()"
  )
  assert heading(browser) == ""
  browser.click(*spot)
  assert heading(browser).endswith("the best")
  best = browser.value("location.hash")
  panel = browser.value("document.querySelector('.panel').textContent")
  for part in (
    "95 % interval", "40 problems", "✓ full", "model calls to judge it", "tokens of proposals",
    "Changes to its parent", "Workflow", "Prompts", "not solved",
  ):  # fmt: skip
    assert part in panel, part
  browser.value("document.querySelector('.canvas').focus()")
  browser.key("ArrowLeft")
  browser.key("Enter")
  parent = heading(browser)
  assert parent.startswith("Node ") and not parent.endswith("the best")
  browser.key("Escape")
  assert heading(browser) == ""
  assert browser.value("document.activeElement.classList.contains('canvas')")
  said = browser.value("document.querySelector('[aria-live]').textContent")
  assert said.startswith(parent)
  walked = set()
  browser.key("Home")
  for _ in range(COUNT):  # down reaches every node
    walked.add(browser.value("document.querySelector('[aria-live]').textContent").split(",")[0])
    browser.key("ArrowDown")
  assert len(walked) == COUNT
  browser.open(page, best)  # the address opens the node again
  assert heading(browser).endswith("the best")
  settle(browser)
  size = "document.querySelector('.canvas .ring').getBoundingClientRect().width"
  before = browser.value(size)
  browser.value("document.querySelector('.canvas').focus()")
  browser.key("-", "-")
  browser.key("-", "-")
  browser.key("-", "-")
  settle(browser)
  assert browser.value(size) < before
  assert browser.faults == []


def test_a_notebook_shows_it_in_a_frame(browser, page, tmp_path):
  """As colab.ipynb does: the frame has no address, which opening a node would write to."""
  outside = tmp_path / "notebook.html"
  text = html.escape(page.read_text(encoding="utf-8"))
  outside.write_text(f'<html data-ready="1"><iframe srcdoc="{text}" height="700"></iframe></html>')
  browser.open(outside)
  browser.wait("frames[0]?.document?.documentElement?.dataset.ready")
  browser.value(
    "[...frames[0].document.querySelectorAll('button')].find(b => b.textContent === 'best').click()"
  )
  assert browser.value("frames[0].document.activeElement.textContent").endswith("the best")
  assert browser.value("typeof frames[0].hacked") == "undefined" and browser.faults == []


def test_phone_and_print_and_colours(browser, page, tmp_path):
  browser.open(page)
  press(browser, "best")
  browser.resize(390, 844)
  assert browser.value("document.documentElement.scrollWidth") <= 390
  lines = browser.value(
    "[...document.querySelectorAll('.charts td.n')].map(cell => { const range = "
    "document.createRange(); range.selectNodeContents(cell); "
    "return range.getClientRects().length })"
  )
  assert len(lines) > 5 and set(lines) == {1}  # no number is broken
  browser.resize(1280, 900)
  colour = "getComputedStyle(document.body).backgroundColor"
  browser.dress("light")
  light = browser.value(colour)
  browser.dress("dark")
  dark = browser.value(colour)
  assert light != dark
  browser.value("document.getElementById('theme').click()")
  assert browser.value(colour) == light
  browser.dress("dark", "print")
  assert browser.value(colour) == "rgb(255, 255, 255)"
  assert browser.value("getComputedStyle(document.querySelector('.tools')).display") == "none"
  browser.picture(tmp_path / "print.png")
  assert (tmp_path / "print.png").read_bytes()[:4] == b"\x89PNG"
  browser.dress()
  assert browser.faults == []


def test_two_thousand_nodes_draw_only_what_is_seen(browser, tmp_path):
  make_run(tmp_path, 2000, log=4)
  browser.open(write_report(tmp_path))
  settle(browser)
  drawn = "document.querySelectorAll('.canvas .disc, .canvas .cross').length"
  assert browser.value("document.querySelector('.canvas').dataset.nodes") == "2000"
  assert 10 < browser.value(drawn) < 500
  press(browser, "all")
  settle(browser)
  assert browser.value(drawn) == 2000
  assert browser.faults == []


CASES = [
  ("", ""), ("a", "a"), ("a\nb\nc", "a\nc"), ("a\nc", "a\nb\nc"), ("a\nb", "c\nd"),
  ("a\nb\na\nb", "b\na\nb\na"), ("", "x\ny"), ("x\ny", ""), ("a\na\na", "a"),
]  # fmt: skip


def test_a_difference_gives_both_texts_back_and_is_no_longer_than_needed(browser, page):
  browser.open(page)
  for before, after in CASES:
    lines = browser.value(f"diffLines({json.dumps(before)}, {json.dumps(after)})")
    assert "\n".join(text for sign, text in lines if sign != "+") == before
    assert "\n".join(text for sign, text in lines if sign != "-") == after
    a, b = (x.split("\n") if x else [] for x in (before, after))
    assert sum(sign == " " for sign, _ in lines) == common(a, b)


def common(a, b):
  """Length of the longest common subsequence."""
  if not a or not b:
    return 0
  if a[0] == b[0]:
    return 1 + common(a[1:], b[1:])
  return max(common(a[1:], b), common(a, b[1:]))
