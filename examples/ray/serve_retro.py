"""Ray Serve in front of replicas of `retro-run serve`: OpenAI's API at one address, on as many machines as Ray has.

    pip install 'ray[serve]' httpx dist/retro_attention-*.whl
    python examples/ray/serve_retro.py OUT --replicas 2 -- --parallel 8

Each replica starts a server on a port of its own and hands requests on to it, streams too. What comes after -- goes to the
server. OUT must lie at the same path on every machine. A request whose replica dies ends in an error of the connection or in
status 500 or 503: a client that tries again gets another replica, and Ray starts a new one.
"""

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading

# Before Ray loads: it reports how it is used otherwise.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
import httpx  # noqa: E402
import ray  # noqa: E402
from ray import serve  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.responses import PlainTextResponse, StreamingResponse  # noqa: E402

# Its name among the applications of a cluster.
APPLICATION = "retro"
PR_SET_PDEATHSIG = 1
# Headers that belong to a connection, not to a message.
OF_CONNECTIONS = {"connection", "keep-alive", "transfer-encoding", "host", "content-length"}


def end_with_parent():
    """A server must not outlive the replica that started it, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@serve.deployment(health_check_period_s=1, health_check_timeout_s=10, max_ongoing_requests=64)
class Replica:
    def __init__(self, command: list[str]):
        self.server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=end_with_parent)
        said, url = [], None
        for line in self.server.stderr:
            said.append(line)
            url = url or re.search(r"listening on (\S+);", line)
            if line.startswith("ready"):
                break
        else:
            raise RuntimeError("retro-run serve did not start: " + " ".join("".join(said).split()))
        # Its log goes on: read it, so that the server never waits for room.
        threading.Thread(target=lambda: [print(line, end="") for line in self.server.stderr], daemon=True).start()
        self.client = httpx.AsyncClient(base_url=url[1], timeout=None)

    def check_health(self):
        if self.server.poll() is not None:
            raise RuntimeError(f"retro-run serve ended with code {self.server.returncode}")

    async def __call__(self, request: Request):
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        headers = [(name, value) for name, value in request.headers.items() if name not in OF_CONNECTIONS]
        asked = self.client.build_request(request.method, path, headers=headers, content=await request.body())
        try:
            answer = await self.client.send(asked, stream=True)
        except httpx.TransportError as error:
            return PlainTextResponse(f"the server of this replica is gone: {error}", 503, {"Retry-After": "1"})
        headers = {name: value for name, value in answer.headers.items() if name not in OF_CONNECTIONS}
        return StreamingResponse(answer.aiter_raw(), answer.status_code, headers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder that retro-export wrote")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="what Ray reserves for a replica")
    parser.add_argument("--gpus", type=float, default=0, help="what Ray reserves for a replica, with -- --device cuda")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--retro-run", default="retro-run", help="the program")
    # What comes after -- is the server's.
    words = sys.argv[1:]
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    args = parser.parse_args(own)
    command = [args.retro_run, "serve", os.path.abspath(args.model), "--port", "0", *options]
    serve.start(http_options={"host": args.host, "port": args.port})
    actor = {"num_cpus": args.cpus, "num_gpus": args.gpus}
    app = Replica.options(num_replicas=args.replicas, ray_actor_options=actor).bind(command)
    serve.run(app, name=APPLICATION, route_prefix="/")
    print(f"ready: http://{args.host}:{args.port}", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    # Nothing of others that the cluster runs.
    serve.delete(APPLICATION)
    ray.shutdown()


if __name__ == "__main__":
    main()
