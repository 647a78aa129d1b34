"""Open reports in a real headless Chromium and ask what a reader would: python -m tests.reports.browser [--chromium PATH]

Not part of the tests: it needs a browser. It checks that no request leaves the file, that nothing is said on the console,
that a click on a column sorts by it, that at 400 pixels nothing but tables and the picture scrolls sideways, that print
holds everything, that all text stands out from its ground (in light and in dark), and that the page works without scripts.
"""

import argparse
import base64
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
import torchvision

import se_inject as si

CONTRAST = """
(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const [r, g, b] = c.map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
                       return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
                        if (c.length === 3 || c[3] > 0.99) return c.slice(0, 3); } return [255, 255, 255]; };
  let worst = [99, ""];
  for (const e of document.querySelectorAll("body *")) {
    if (!e.childNodes.length || e.closest("svg, script, style") || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const a = light(parse(getComputedStyle(e).color).slice(0, 3)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, e.tagName + " " + e.textContent.slice(0, 40)];
  }
  return JSON.stringify(worst);
})()
"""


class Browser:
    """A headless Chromium, spoken to over its own protocol with nothing but sockets."""

    def __init__(self, program: str) -> None:
        self.folder = tempfile.mkdtemp()
        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={self.folder}",
             "--remote-allow-origins=*", "about:blank"], stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        port_file = Path(self.folder) / "DevToolsActivePort"
        for _ in range(300):
            if port_file.exists() and port_file.read_text().count("\n"):
                break
            time.sleep(0.1)
        port = int(port_file.read_text().split()[0])
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(each for each in json.load(answer) if each["type"] == "page")
        path = target["webSocketDebuggerUrl"].partition(f":{port}")[2]
        self.socket = socket.create_connection(("127.0.0.1", port))
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self.stream = self.socket.makefile("rb")
        while self.stream.readline().strip():
            pass
        self.number, self.events = 0, []

    def call(self, method: str, **parameters: object) -> dict:
        """One command, and its answer; events that come meanwhile are kept."""
        self.number += 1
        self._send(json.dumps({"id": self.number, "method": method, "params": parameters}).encode())
        while True:
            message = json.loads(self._receive())
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def value(self, expression: str) -> object:
        """What a JavaScript expression is."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _send(self, data: bytes) -> None:
        head = struct.pack("!BB", 0x81, 0x80 | 127) + struct.pack("!Q", len(data)) if len(data) > 65535 else (
            struct.pack("!BBH", 0x81, 0x80 | 126, len(data)) if len(data) > 125 else struct.pack("!BB", 0x81, 0x80 | len(data))
        )  # fmt: skip
        mask = os.urandom(4)
        self.socket.sendall(head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(data)))

    def _receive(self) -> bytes:
        data = b""
        while True:
            first, size = self.stream.read(2)
            if size == 126:
                (size,) = struct.unpack("!H", self.stream.read(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self.stream.read(8))
            data += self.stream.read(size)
            if first & 0x80:
                return data

    def close(self) -> None:
        """End the browser that this started."""
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


def reports(folder: Path) -> list[Path]:
    """A report with everything in it, and the largest one."""
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18().eval(), torch.rand(2, 3, 64, 64)
    plan = si.plan(model, x, init="paper")
    injected = plan.apply(model)
    gates = si.excitations(injected, [(torch.randn(4, 3, 64, 64), torch.arange(4) % 2)])
    verdict = si.verify(model, injected, x, fresh=False)
    si.report(
        plan, folder / "all.html", verdict=verdict, gates=gates, command="se-inject torchvision:resnet18", force=True
    )
    large = si.plan(torchvision.models.resnet152(), x)
    si.report(large, folder / "large.html", force=True)
    return [folder / "all.html", folder / "large.html"]


def check(browser: Browser, path: Path) -> list[str]:
    """What was found of one report, a line each; raises AssertionError for the first fault."""
    browser.events.clear()
    for domain in ("Page", "Network", "Runtime", "Log"):
        browser.call(f"{domain}.enable")
    browser.call("Page.navigate", url=path.resolve().as_uri())
    while browser.value("document.readyState") != "complete":
        time.sleep(0.1)
    time.sleep(0.5)
    browser.value("1")
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [path.resolve().as_uri()], asked
    said = [
        e
        for e in browser.events
        if e["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert not said, said
    told = [f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, no request but for itself, nothing on the console"]
    for mode in ("light", "dark"):
        browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": mode}])
        ratio, where = json.loads(browser.value(CONTRAST))
        assert ratio >= 4.5, (mode, ratio, where)
        told.append(f"{mode}: the faintest text has a contrast of {ratio:.1f} ({where})")
    for width in (400, 800, 1280):
        browser.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width == 400
        )
        wide = browser.value("document.documentElement.scrollWidth")
        assert wide <= width, (width, wide)
    told.append("at 400, 800 and 1280 pixels the page itself does not scroll sideways")
    browser.value("[...document.querySelectorAll('details')].forEach(d => d.open = true)")
    column = "[...document.querySelectorAll('table')].find(t => t.caption.textContent === 'Every block')"
    at = "[...t.tHead.rows[0].cells].findIndex(c => c.textContent === 'bytes')"
    get = f"(() => {{ const t = {column}; const i = {at}; return [...t.tBodies[0].rows].map(r => +r.cells[i].dataset.v); }})()"
    browser.value(f"(() => {{ const t = {column}; t.tHead.rows[0].cells[{at}].querySelector('button').click(); }})()")
    up = browser.value(get)
    browser.value(f"(() => {{ const t = {column}; t.tHead.rows[0].cells[{at}].querySelector('button').click(); }})()")
    assert up == sorted(up) and browser.value(get) == sorted(up, reverse=True), up
    told.append("a click on `bytes` sorts by it, a second one the other way")
    assert browser.value("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label'))")
    assert browser.value("[...document.querySelectorAll('th')].every(h => h.scope)")
    pages = base64.b64decode(browser.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pages[:4] == b"%PDF"
    told.append(f"prints: {pages.count(b'/Type /Page') - pages.count(b'/Type /Pages')} pages")
    return told


def main() -> None:
    """Check both reports and say what was found."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome") or "chromium")
    browser = Browser(options.parse_args().chromium)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for path in reports(Path(folder)):
                print("\n".join(check(browser, path)))
    finally:
        browser.close()


if __name__ == "__main__":
    main()
