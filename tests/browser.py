"""Headless Chromium over the pipe of its DevTools protocol: no port, no further package."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 300  # for one answer; the machine may stand still for a while
# Puts the two ends of the pipe where Chromium looks for them.
START = (
  "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
  "os.execv(sys.argv[3], sys.argv[3:])"
)


def find_chromium():
  """Path of a Chromium on PATH, or None."""
  return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
  """One page of a headless Chromium; a context manager.

  Attributes:
    faults: what the page wrote to its console as warning or error, and what it threw.
  """

  def __init__(self, width=1280, height=900, scale=1):
    path = find_chromium()
    assert path is not None
    self._folder = tempfile.TemporaryDirectory(prefix="awf-chromium-", ignore_cleanup_errors=True)
    to_child, self._write = os.pipe()
    self._read, from_child = os.pipe()
    flags = ["--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu"]
    flags += ["--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    flags += [f"--user-data-dir={self._folder.name}"]
    start = [sys.executable, "-S", "-c", START, str(to_child), str(from_child), path, *flags]
    self._child = subprocess.Popen(
      start, pass_fds=(to_child, from_child), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    os.close(to_child)
    os.close(from_child)
    self._number, self._rest, self._events, self.faults = 0, b"", [], []
    self._session = None
    target = self.ask("Target.createTarget", url="about:blank")["targetId"]
    attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
    self._session = attached["sessionId"]
    for part in ("Page", "Runtime", "Log", "Network"):
      self.ask(f"{part}.enable")
    self.resize(width, height, scale)

  def ask(self, method, **params):
    """Sends a command and returns its result."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    while True:
      got = self._message()
      if got.get("id") == self._number:
        assert "error" not in got, f"{method}: {got['error']}"
        return got["result"]

  def _message(self):
    """The next message; an event is kept."""
    end = time.monotonic() + SECONDS
    while b"\0" not in self._rest:
      if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
        raise TimeoutError(f"Chromium gave no answer in {SECONDS} s")
      piece = os.read(self._read, 1 << 20)
      assert piece, "Chromium has ended"
      self._rest += piece
    line, _, self._rest = self._rest.partition(b"\0")
    got = json.loads(line)
    self._note(got.get("method"), got.get("params", {}))
    return got

  def _note(self, method, params):
    if method == "Runtime.exceptionThrown":
      details = params["exceptionDetails"]
      self.faults.append(details.get("exception", {}).get("description", details["text"]))
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error"):
      self.faults.append(str(params["args"]))
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
      self.faults.append(params["entry"]["text"])
    elif method == "Network.requestWillBeSent":
      self._events.append(params["request"]["url"])

  @property
  def requests(self):
    """Addresses that the page asked for."""
    return list(self._events)

  def open(self, path, fragment=""):
    """Loads a file and waits until its script is done."""
    self.ask("Page.navigate", url="about:blank")
    self._events.clear()
    self.ask("Page.navigate", url=f"file://{path}{fragment}")
    self.wait("document.documentElement?.dataset.ready")

  def wait(self, expression):
    """Waits until an expression is true in the page."""
    end = time.monotonic() + SECONDS
    while not self.value(f"Boolean({expression})"):
      assert time.monotonic() < end, f"{expression} did not become true; {self.faults}"
      time.sleep(0.05)

  def value(self, expression):
    """An expression's value; a promise is waited for."""
    asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
    got = self.ask("Runtime.evaluate", **asked)
    assert "exceptionDetails" not in got, got["exceptionDetails"]
    return got["result"].get("value")

  def click(self, x, y):
    for kind in ("mousePressed", "mouseReleased"):
      args = {"x": x, "y": y, "button": "left", "clickCount": 1}
      self.ask("Input.dispatchMouseEvent", type=kind, **args)

  def key(self, name, text=""):
    self.ask("Input.dispatchKeyEvent", type="keyDown", key=name, text=text)
    self.ask("Input.dispatchKeyEvent", type="keyUp", key=name)

  def resize(self, width, height, scale=1):
    self.ask(
      "Emulation.setDeviceMetricsOverride",
      width=width, height=height, deviceScaleFactor=scale, mobile=width < 600,
    )  # fmt: skip

  def dress(self, scheme="light", media=""):
    """Colour scheme light or dark, medium "" or print."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    self.ask("Emulation.setEmulatedMedia", media=media, features=features)

  def picture(self, path, whole=False):
    """Writes a PNG of what is in view, or of the whole page."""
    # Two frames, so that what a click caused is drawn.
    self.value("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(() => f(1))))")
    shot = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
    path.write_bytes(base64.b64decode(shot["data"]))

  def close(self):
    os.close(self._write)
    os.close(self._read)
    self._child.kill()
    self._child.wait()
    self._folder.cleanup()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()
