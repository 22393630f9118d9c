"""A running `retro-run serve`."""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from paths import runner


class Server:
    """Serves a model until the block ends, on a free port."""

    def __init__(self, model, *arguments, environment=None):
        self.arguments = [runner(), "serve", str(model), "--port", "0", *arguments]
        self.environment = environment or os.environ

    def __enter__(self):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.process = subprocess.Popen(self.arguments, stderr=self.log, env=self.environment)
        limit = time.monotonic() + 120
        while not (found := re.search(r"listening on (\S+);[\s\S]*^ready", self.said(), re.MULTILINE)):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < limit, self.said()
            time.sleep(0.05)
        self.url = found[1]
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def said(self):
        return open(self.log.name).read()

    def request(self, path, body=None, headers=None, method=None):
        """The status, the headers and the text of a response."""
        headers = {"Content-Type": "application/json"} | (headers or {})
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        asked = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=120) as response:
                return response.status, response.headers, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read().decode()

    def json(self, path, body=None, **options):
        """What a response that must succeed says."""
        status, _, text = self.request(path, body, **options)
        assert status == 200, text
        return json.loads(text)

    def error(self, path, body=None, **options):
        """The status and the error of a response that must fail."""
        status, _, text = self.request(path, body, **options)
        assert status >= 400, text
        return status, json.loads(text)["error"]

    def figure(self, name):
        """A figure of /metrics; 0 where there is none yet."""
        _, _, text = self.request("/metrics")
        values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.rsplit(" ", 1)[0] == name]
        return float(values[0]) if values else 0.0
