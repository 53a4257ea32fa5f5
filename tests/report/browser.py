"""Headless Chromium, driven over a pipe: what a page does and measures when it is opened from disk."""

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBLEMS = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
# Elements that stick out of the page, but for what a box that scrolls by itself holds.
STICKING_OUT = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') || e.matches('.scroll'))
    .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5)
    .map(e => e.outerHTML.slice(0, 80))
"""
MEASURES = {
    "width": "document.documentElement.scrollWidth",
    "sticking_out": STICKING_OUT,
    "background": "getComputedStyle(document.body).backgroundColor",
    "charts": "[...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height)",
    # How large the charts' letters are on the screen, in pixels.
    "letters": "[...document.querySelectorAll('svg')].map(e => 12 * e.getBoundingClientRect().width / 400)",
    "cut_off": """[...document.querySelectorAll('svg')].flatMap(e => [...e.querySelectorAll('text')].filter(t => {
        const box = e.getBoundingClientRect(), text = t.getBoundingClientRect();
        return text.left < box.left - 1 || text.right > box.right + 1 || text.bottom > box.bottom + 1;
    }).map(t => t.textContent))""",
}


class Browser:
    """One Chromium with one page. Close it, or use it in a `with` statement."""

    def __init__(self, profile: Path):
        (commands, to_browser), (from_browser, answers) = os.pipe(), os.pipe()
        # Chromium takes commands from file 3 and answers to file 4; neither may be in the way of the other.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        script = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", str(CHROMIUM), *options],
            pass_fds=ends,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *ends):
            os.close(end)
        self.writer, self.reader = os.fdopen(to_browser, "wb"), os.fdopen(from_browser, "rb")
        self.number, self.waiting, self.events = 0, b"", []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.session = None
        try:
            self.call("Browser.close")
        finally:
            self.process.terminate()
            self.process.wait(timeout=60)
            self.writer.close()
            self.reader.close()

    def call(self, method: str, **parameters) -> dict[str, Any]:
        """The result of a command of the DevTools protocol; events that come before it are kept."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.waiting:
            content = os.read(self.reader.fileno(), 1 << 16)
            assert content, "Chromium has ended"
            self.waiting += content
        message, self.waiting = self.waiting.split(b"\0", 1)
        return json.loads(message)

    def look(self, page: Path, *, width: int, scheme: str = "light") -> dict[str, Any]:
        """Open a page and tell its `problems`, its `requests` beyond itself, and what `MEASURES` lists."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())
        found = {name: self._evaluate(script) for name, script in MEASURES.items()}
        requested = [
            e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"
        ]
        found["requests"] = [url for url in requested if url != page.as_uri()]
        found["problems"] = [event for event in self.events if event.get("method") in PROBLEMS]
        return found

    def _evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"]["value"]
