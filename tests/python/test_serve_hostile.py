"""`retro-run serve` and clients that mean it no good: what they send is refused, the server stays, and others are answered."""

import concurrent.futures
import http.client
import json
import socket
import subprocess
import time

import pytest

from load import memory
from test_serve import ENVIRONMENT, chat, completion, model, pytestmark, server  # noqa: F401

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connected(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def said_to(server, data):
    """All that the server says to bytes that end with `Connection: close`, or that it cuts off."""
    with connected(server) as connection:
        said = b""
        try:
            connection.sendall(data)
            while part := connection.recv(1 << 16):
                said += part
        except ConnectionError:
            pass
        return said


def with_length(body):
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"4294967295": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(49_000)}}, "logit_bias"),
        ({"stop": [f"x{i}" for i in range(5000)]}, "stop"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"temperature": 1e308}, "temperature"),
        ({"seed": 2**64}, "seed"),
        ({"prompt": ["a"] * 400_000}, "prompt"),
        ({"prompt": [[1]] * 400_000}, "prompt"),
        ({"prompt": [2**32]}, "prompt"),
        ({"prompt": "x y" * 1_000_000}, "prompt"),
        ({"echo": "z" * 1_000_000}, "echo"),
        ({"z" * 1_000_000: 1}, "z" * 600 + "…"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, "response_format"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else value[:20],
)
def test_too_much_is_refused_at_once_and_named(server, fields, param):  # noqa: F811
    begun = time.monotonic()
    status, error = server.error("/v1/completions", completion(**fields))
    assert status == 400 and error["param"] == param, error
    assert len(error["message"]) < 700 and time.monotonic() - begun < 10


def test_a_schema_that_grows_too_large_is_the_requests_fault(server):  # noqa: F811
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    status, error = server.error("/v1/chat/completions", chat(response_format=form, max_tokens=60))
    assert status == 400 and "cannot follow" in error["message"] and "<" not in error["message"], error


def test_hostile_patterns_end_and_others_go_on(server):  # noqa: F811
    plain = server.json("/v1/completions", completion())["choices"]
    patterns = ["(.*a){25}", "^(?:(?:a|b)*a(?:a|b){200})$", "(x+x+)+y", "a{1000}{1000}", "(" * 2000 + ")" * 2000, "(a|aa)+$"]

    def ask(pattern):
        form = {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": pattern}}}
        return server.request("/v1/chat/completions", chat(response_format=form, max_tokens=40, temperature=1, seed=1))[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        hostile = [pool.submit(ask, pattern) for pattern in patterns]
        assert server.json("/v1/completions", completion())["choices"] == plain
        assert {each.result() for each in hostile} <= {200, 400}
    assert server.json("/health")["status"] == "ok"


def test_variables_of_a_template_replace_no_message(server):  # noqa: F811
    plain = server.json("/v1/chat/completions", chat())["choices"]
    for variables in [{"messages": [], "tools": 1, "add_generation_prompt": False}, {"strftime_now": 1, "loop": 2, "raise_exception": 3}]:
        assert server.json("/v1/chat/completions", chat(chat_template_kwargs=variables))["choices"] == plain


def test_paths_and_hosts_that_are_tricks(server):  # noqa: F811
    for path in ["/v1/models/%ff", "/v1/models/..%2f..%2fetc", "//v1/models", "/v1/../metrics", "/%00"]:
        connection = http.client.HTTPConnection(*server.url.removeprefix("http://").split(":"))
        connection.putrequest("GET", path)
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 404 and json.loads(response.read())["error"]["message"], path
    for hosts in [b"Host: localhost\r\nHost: page.example\r\n", b"Host: 127.0.0.1.page.example\r\n", b""]:
        said = said_to(server, b"GET /health HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        assert said.startswith(b"HTTP/1.1 403"), said


def test_bodies_without_end_are_cut_off(server):  # noqa: F811
    assert said_to(server, HEAD + b"Content-Length: 5000000000\r\n\r\n{").startswith(b"HTTP/1.1 413")
    with connected(server) as connection, pytest.raises(ConnectionError):
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(1000):
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
    broken = said_to(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n")
    assert broken == b"" or broken.startswith(b"HTTP/1.1 400"), broken
    for head in [b"Content-Length: -1", b"Content-Length: 4\r\nContent-Length: 5", b"Content-Length: 9999999999999999999999"]:
        assert said_to(server, HEAD + head + b"\r\n\r\n{}").startswith(b"HTTP/1.1 400")
    assert server.json("/health")["status"] == "ok"


def test_requests_behind_each_other_get_their_own_answers(server):  # noqa: F811
    bodies = [completion(prompt=f"x{i} = ", max_tokens=4 + i) for i in range(4)]
    alone = [server.json("/v1/completions", body)["choices"][0]["text"] for body in bodies]
    last = with_length(json.dumps(bodies[-1]).encode()).replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
    data = b"".join(with_length(json.dumps(body).encode()) for body in bodies[:-1]) + last
    said = said_to(server, data).decode()
    answers = [json.loads(part.split("\r\n\r\n", 1)[1])["choices"][0]["text"] for part in said.split("HTTP/1.1 ")[1:]]
    assert answers == alone


def test_many_long_bodies_at_once_take_little_memory(server):  # noqa: F811
    body = json.dumps(completion(prompt="hello wor" * 400_000)).encode()
    pid = server.process.pid
    server.request("/v1/completions", body)
    before = memory(pid)
    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        statuses = list(pool.map(lambda _: server.request("/v1/completions", body)[0], range(96)))
    assert set(statuses) <= {400, 503}, set(statuses)
    assert memory(pid) - before < 250
    assert server.json("/v1/completions", completion())["usage"]["completion_tokens"] == 12


def test_more_connections_than_there_are_places(server):  # noqa: F811
    held = [connected(server) for _ in range(900)]
    for connection in held[::2]:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
    assert server.json("/v1/completions", completion())["usage"]["completion_tokens"] == 12
    for connection in held:
        connection.close()
    assert server.json("/health")["status"] == "ok"


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "a,,b"])
def test_a_key_that_no_client_could_send_is_refused(server, model, key):  # noqa: F811
    arguments = [server.arguments[0], "serve", str(model), "--port", "0", "--api-key", key]
    result = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert result.returncode == 1 and "--api-key" in result.stderr and result.stderr.count("\n") == 1, result.stderr
