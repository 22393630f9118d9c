"""Headless Chromium, driven through its debugging pipe: nothing but Python's own modules."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time


def find():
    """Chromium, if this machine has it."""
    names = ["chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """A page in a browser of its own, until the block ends."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = itertools.count(1)
        self.session = None

    def __enter__(self):
        (theirs_in, self.out), (self.into, theirs_out) = os.pipe(), os.pipe()

        def place():
            # Chromium reads 3 and writes 4. Copied away first: one may lie where the other is to be.
            ends = [os.dup(theirs_in), os.dup(theirs_out)]
            ends = [os.dup2(end, 10 + i) for i, end in enumerate(ends)]
            os.dup2(10, 3)
            os.dup2(11, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={self.folder}"]
        self.process = subprocess.Popen(
            [find(), *flags, "about:blank"], preexec_fn=place, close_fds=False, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.held = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def call(self, method, **params):
        """What a call of the protocol gives."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            said = self.receive()
            if said.get("id") == number:
                assert "error" not in said, f"{method}: {said}"
                return said["result"]

    def receive(self):
        while b"\0" not in self.held:
            part = os.read(self.into, 1 << 16)
            assert part, "the browser ended"
            self.held += part
        message, self.held = self.held.split(b"\0", 1)
        return json.loads(message)

    def open(self, url):
        self.call("Page.navigate", url=url)

    def value(self, expression):
        """What an expression is on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        """Waits until it holds."""
        limit = time.monotonic() + seconds
        while not self.value(f"!!({expression})"):
            assert time.monotonic() < limit, f"{expression}: {self.value('document.body.innerText')}"
            time.sleep(0.05)

    def press(self, key, code=None, text=None, modifiers=0):
        code = code or {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowRight": 39}[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        pressed = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **event, **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def picture(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
