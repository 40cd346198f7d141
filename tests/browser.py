"""A page in headless Chromium, driven through its debugging pipe: two file descriptors, messages of JSON that end in a
zero byte."""

import base64
import json
import os
import shutil
import subprocess

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe"
).split()


class Page:
    """`file` opened at a width, light or dark. problems: what the console complained of; requests: every URL that was
    asked for."""

    def __init__(self, file, profile, width=1600, height=1000, dark=False):
        there, self._write = os.pipe()
        self._read, back = os.pipe()

        def wire():  # the browser reads descriptor 3 and writes 4
            os.dup2(there, 100), os.dup2(back, 101)
            os.dup2(100, 3), os.dup2(101, 4)

        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            command, close_fds=False, preexec_fn=wire, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(there), os.close(back)
        self._buffer, self._number, self._session = b"", 0, None
        self.problems, self.requests = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=file.resolve().as_uri())
        while self.run("document.readyState") != "complete":
            pass
        self.settle()

    def resize(self, width, height=1000):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def settle(self):
        """Two frames: layout, then what watches it."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def run(self, script):
        """The value of a JavaScript expression."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def screenshot(self, path, clip=None):
        """The whole page as a PNG file, or the part (x, y, width, height) of it."""
        options = {"clip": dict(zip(("x", "y", "width", "height"), clip), scale=1)} if clip else {}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, **options)
        path.write_bytes(base64.b64decode(found["data"]))

    def call(self, method, **parameters):
        """A command of the Chrome DevTools Protocol; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                part = os.read(self._read, 1 << 20)
                assert part, "the browser is gone"
                self._buffer += part
            line, _, self._buffer = self._buffer.partition(b"\0")
            event = json.loads(line)
            if event.get("id") == self._number:
                assert "error" not in event, (method, event)
                return event["result"]
            self._note(event.get("method"), event.get("params", {}))

    def _note(self, kind, found):
        if kind == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif kind in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"):
            self.problems.append(found)

    def close(self):
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write), os.close(self._read)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
