"""Load for `retro-run serve`: clients that ask at once, some of which go away, and what that gives.

    python tests/python/load.py http://127.0.0.1:8080 --clients 200 --requests 5 --cut 0.2
    python tests/python/load.py http://127.0.0.1:8080 --streams 1,8 --context 4000
    python tests/python/load.py http://127.0.0.1:8080 --talk 4000
"""

import argparse
import http.client
import json
import random
import threading
import time
from urllib.parse import urlsplit

WORDS = "river stone cloud garden window paper engine forest silver morning letter bridge winter market candle".split()


def text(tokens, seed):
    """Words of a seed's own, about as many tokens."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(tokens))


def ask(url, body, cut=None):
    """The text of a streamed completion, the time to its first event, and its usage; `cut`: goes away after so many events."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=600)
    begun = time.perf_counter()
    first, said, usage, events = None, "", None, 0
    try:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            return None, None, response.read().decode()
        for line in response:
            if not line.startswith(b"data: ") or line == b"data: [DONE]\n":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return None, None, event["error"]["message"]
            first = first or time.perf_counter() - begun
            said += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
            events += 1
            if cut is not None and events >= cut:
                return said, first, None
        return said, first, usage
    finally:
        connection.close()


def memory(pid):
    """Resident memory of a process, in MiB."""
    for line in open(f"/proc/{pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return None


def clients(url, options):
    """Requests of mixed lengths from many clients: whether each is answered, and as it is alone."""
    kinds = [
        {"prompt": text(length, seed=length), "max_tokens": 4 + length % 13, "temperature": 0, "ignore_eos": True}
        for length in [3, 9, 20, 33, 50, 80, 120, 200]
    ]
    alone = [ask(url, kind)[0] for kind in kinds]
    lost, mixed, done, gone, waits = [], [], [], [], []

    def client(number):
        draw = random.Random(number)
        for _ in range(options.requests):
            kind = draw.randrange(len(kinds))
            if draw.random() < options.cut:
                ask(url, kinds[kind] | {"max_tokens": 500}, cut=draw.randrange(1, 4))
                gone.append(kind)
                continue
            said, first, usage = ask(url, kinds[kind])
            if said is None:
                lost.append(usage)
            elif said != alone[kind]:
                mixed.append((said, alone[kind]))
            else:
                done.append(usage["completion_tokens"])
                waits.append(first)

    before = memory(options.pid) if options.pid else None
    begun = time.perf_counter()
    threads = [threading.Thread(target=client, args=(i,)) for i in range(options.clients)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    seconds = time.perf_counter() - begun
    waits.sort()
    print(f"{options.clients} clients x {options.requests}: {len(done)} answered, {len(gone)} cut off, {len(lost)} lost, {len(mixed)} mixed up")
    print(f"{seconds:.1f} s, {sum(done) / seconds:.1f} tokens/s; first token: median {waits[len(waits) // 2]:.2f} s, last {waits[-1]:.2f} s")
    if before:
        print(f"memory {before:.0f} MiB before, {memory(options.pid):.0f} MiB after")
    for why in lost[:3] + mixed[:3]:
        print(why)
    return 1 if lost or mixed else 0


def streams(url, options):
    """Tokens per second of so many streams at once."""
    rates = {}
    for count in options.streams:
        prompts = [text(options.context, seed=i) if options.context else WORDS[i] for i in range(count)]
        body = {"max_tokens": options.tokens, "temperature": 0, "ignore_eos": True}
        [ask(url, body | {"prompt": prompt, "max_tokens": 1}) for prompt in prompts]
        gate = threading.Barrier(count + 1)
        usages = [None] * count

        def stream(i):
            gate.wait()
            usages[i] = ask(url, body | {"prompt": prompts[i]})[2]

        threads = [threading.Thread(target=stream, args=(i,)) for i in range(count)]
        [thread.start() for thread in threads]
        gate.wait()
        begun = time.perf_counter()
        [thread.join() for thread in threads]
        seconds = time.perf_counter() - begun
        failed = [usage for usage in usages if not isinstance(usage, dict)]
        assert not failed, failed
        rates[count] = sum(usage["completion_tokens"] for usage in usages) / seconds
        prompt = max(usage["prompt_tokens"] for usage in usages)
        print(f"{count} streams, prompts of {prompt} tokens: {rates[count]:.1f} tokens/s ({seconds:.1f} s)")
    least, most = min(rates), max(rates)
    print(f"{most} against {least}: {rates[most] / rates[least]:.2f}")


def talk(url, options):
    """The time to the first token of a second turn against that of the first."""
    body = {"max_tokens": 64, "temperature": 0, "ignore_eos": True}
    prompt = text(options.talk, seed=time.time())
    said, first, usage = ask(url, body | {"prompt": prompt})
    again = ask(url, body | {"prompt": prompt + said + " and what then?"})
    print(f"first turn {usage['prompt_tokens']} tokens, {first:.3f} s; second {again[1]:.3f} s: {again[1] / first:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, help="clients that ask at once")
    parser.add_argument("--requests", type=int, default=5, help="requests of each client")
    parser.add_argument("--cut", type=float, default=0.2, help="share of requests that are cut off")
    parser.add_argument("--pid", type=int, help="the server's process, whose memory is watched")
    parser.add_argument("--streams", type=lambda s: [int(n) for n in s.split(",")], help="numbers of streams to compare")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each stream")
    parser.add_argument("--context", type=int, default=0, help="words of each stream's prompt")
    parser.add_argument("--talk", type=int, help="words of a conversation's first turn")
    options = parser.parse_args()
    status = 0
    if options.streams:
        streams(options.url, options)
    if options.talk:
        talk(options.url, options)
    if options.clients:
        status = clients(options.url, options)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
