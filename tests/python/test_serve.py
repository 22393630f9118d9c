"""`retro-run serve` as clients see it: plain HTTP, and the `openai` package."""

import concurrent.futures
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import onnxruntime as ort
import pytest

import documents
from paths import ROOT, exporter, models, plugin
from server import Server

LIBRARY = Path(ort.__file__).parent / "capi" / f"libonnxruntime.so.{ort.__version__}"
ENVIRONMENT = os.environ | {"ORT_DYLIB_PATH": str(LIBRARY), "RETRO_ATTENTION_PLUGIN": plugin()}
VERSION = tuple(map(int, ort.__version__.split(".")[:2]))
pytestmark = pytest.mark.skipif(VERSION < (1, 32), reason="the server is tested with the newest onnxruntime alone")

# With a template, so that every form of output can be asked for.
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if reasoning_effort %}<{{ reasoning_effort }}>{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def command(*arguments):
    result = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, f"{arguments}: {result.stdout}{result.stderr}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """`code`, converted with a window of 4."""
    folder = tmp_path_factory.mktemp("serve")
    command(models(), "build", "--weights", ROOT / "models" / "code", "-o", folder / "dense")
    command(exporter(), folder / "dense", "-o", folder / "code", "--window", "4", "--budget", "0.15", "--no-verify")
    (folder / "code" / "chat_template.jinja").write_text(TEMPLATE)
    return folder / "code"


@pytest.fixture(scope="module")
def server(model):
    with Server(model, "--parallel", "4", "--queue", "64", environment=ENVIRONMENT) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai", reason="the package openai is tested with onnxruntime 1.32.0 alone")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)


def completion(**fields):
    return {"prompt": "def add(a, b):\n", "max_tokens": 12, "temperature": 0} | fields


def chat(**fields):
    return {"messages": [{"role": "user", "content": "def f"}], "max_tokens": 12, "temperature": 0} | fields


# ---- plain HTTP ------------------------------------------------------------------------------------------------------------


def test_what_the_server_says_of_itself(server):
    assert server.json("/health") == {"status": "ok"}
    (listed,) = server.json("/v1/models")["data"]
    assert listed["id"] == "code" and listed["object"] == "model"
    assert server.json("/v1/models/code") == listed
    props = server.json("/props")
    assert props["total_slots"] == 4 and props["window"]["max"] == 4
    tokens = server.json("/tokenize", {"content": "def f():"})["tokens"]
    assert server.json("/detokenize", {"tokens": tokens})["content"] == "def f():"
    pieces = server.json("/tokenize", {"content": "def f():", "with_pieces": True})["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    # A part of a letter is bytes.
    parts = [piece["piece"] for piece in server.json("/tokenize", {"content": "\u4f60\U0001f600", "with_pieces": True})["tokens"]]
    whole = b"".join(bytes(part) if isinstance(part, list) else part.encode() for part in parts)
    assert whole.decode() == "\u4f60\U0001f600" and any(isinstance(part, list) for part in parts)
    status, headers, text = server.request("/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"] and "<title>" in text
    status, headers, _ = server.request("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("application/openmetrics-text")


def test_a_completion_is_what_retro_run_writes(server, model):
    answer = server.json("/v1/completions", completion(ignore_eos=True, max_tokens=40))
    (choice,) = answer["choices"]
    run = ["-p", completion()["prompt"], "--no-template", "-n", "40", "--ignore-eos", "--no-stream"]
    written = subprocess.run(
        [server.arguments[0], "run", str(model), *run], capture_output=True, text=True, env=ENVIRONMENT, check=True
    ).stdout
    assert choice["text"] + "\n" == written and choice["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 40 and usage["total_tokens"] == usage["prompt_tokens"] + 40
    assert usage["retro"]["window"] == 4 and usage["retro"]["budget"] == "0.15"
    assert usage["retro"]["pages_per_kv_head_and_step"] > 0


def test_streams_say_the_same_as_whole_answers(server):
    for path, body, text in [
        ("/v1/completions", completion(n=2, seed=7, temperature=1.2, max_tokens=20), lambda c: c["text"]),
        ("/v1/chat/completions", chat(n=2, seed=7, temperature=1.2), lambda c: c["delta"].get("content", "")),
    ]:
        whole = server.json(path, body)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        _, headers, streamed = server.request(path, body)
        assert headers["Content-Type"].startswith("text/event-stream")
        data = [part.removeprefix("data: ") for part in streamed.strip().split("\n\n")]
        assert data.pop() == "[DONE]"
        events = [json.loads(part) for part in data]
        said, finished = ["", ""], [None, None]
        for choice in (choice for event in events for choice in event["choices"]):
            said[choice["index"]] += text(choice)
            finished[choice["index"]] = finished[choice["index"]] or choice["finish_reason"]
        expected = [c.get("text") or c["message"]["content"] for c in whole["choices"]]
        assert said == expected and finished == [c["finish_reason"] for c in whole["choices"]]
        assert said[0] != said[1], "two answers with seeds of their own"
        same = ["prompt_tokens", "completion_tokens", "total_tokens"]
        assert [events[-1]["usage"][name] for name in same] == [whole["usage"][name] for name in same]
        assert len({event["id"] for event in events}) == 1


def test_a_stream_says_what_it_took_so_far(server):
    body = completion(n=2, seed=7, temperature=1.2, max_tokens=20, stream=True, ignore_eos=True)
    streams = []
    for live in [True, False]:
        options = {"include_usage": True} | ({"continuous_usage_stats": True} if live else {})
        _, _, streamed = server.request("/v1/completions", body | {"stream_options": options})
        data = [part.removeprefix("data: ") for part in streamed.strip().split("\n\n")]
        streams.append([json.loads(part)["usage"] for part in data[:-1]])
    live, plain = streams
    generated = [usage["completion_tokens"] for usage in live]
    assert generated == sorted(generated) and generated[0] < 4 and generated[-1] == 40 and len(set(generated)) > 20
    assert {usage["prompt_tokens"] for usage in live} == {plain[-1]["prompt_tokens"]}
    middle = live[len(live) // 2]["retro"]
    assert 0 < middle["pages_per_kv_head_and_step"] and 0 < middle["decode_tokens_per_second"]
    assert plain[:-1] == [None] * (len(plain) - 1) and plain[-1]["completion_tokens"] == 40


def test_several_answers_read_their_prompt_once(server):
    prompt = "class Once:\n" + "    def again(self):\n        return 1\n" * 9
    before = [server.figure(name) for name in ["retro_prompt_tokens_total", "retro_prompt_tokens_cached_total"]]
    usage = server.json("/v1/completions", completion(prompt=prompt, n=4, max_tokens=3))["usage"]
    after = [server.figure(name) for name in ["retro_prompt_tokens_total", "retro_prompt_tokens_cached_total"]]
    read, held = (b - a for a, b in zip(before, after))
    tokens, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    assert tokens > 60 and cached < 16, "the other tests have no such prompt"
    assert (read, held) == (tokens - cached + 3, cached + 3 * (tokens - 1))


def test_what_a_request_asks_for_is_done(server):
    def text(**fields):
        return server.json("/v1/completions", completion(**fields))["choices"][0]

    anyway = {"cache_prompt": True, "id_slot": -1, "typical_p": 1.0, "mirostat": 0, "skip_special_tokens": True, "use_beam_search": False}
    assert text(**anyway) == text()
    assert text(max_tokens=None, n_predict=5) == text(max_tokens=5)
    plain = text(max_tokens=30)["text"]
    stop = plain[8:11]
    cut = text(max_tokens=30, stop=stop)
    assert cut["text"] == plain[: plain.index(stop)] and cut["finish_reason"] == "stop"
    first = text(logprobs=3, max_tokens=1)["logprobs"]
    (top,) = first["top_logprobs"]
    assert len(top) == 3 and first["token_logprobs"][0] == max(top.values())
    # A token that is made impossible does not come, and one that is made certain does.
    (token,) = server.json("/tokenize", {"content": "z"})["tokens"]
    assert text(logit_bias={str(token): 100}, max_tokens=4)["text"] == "zzzz"
    worn = text(logit_bias={str(token): 12}, presence_penalty=2, frequency_penalty=2, max_tokens=30)["text"]
    assert "z" in worn and worn != "z" * 30
    assert text(temperature=2, seed=3) == text(temperature=2, seed=3)
    assert text(temperature=2, seed=3) != text(temperature=2, seed=4)
    assert text(temperature=2, seed=3, top_k=1)["text"] == text()["text"]
    both = server.json("/v1/completions", completion(prompt=["def a", "class B"], max_tokens=3))
    assert [c["index"] for c in both["choices"]] == [0, 1]
    tokens = server.json("/tokenize", {"content": completion()["prompt"], "add_special": True})["tokens"]
    assert text(prompt=tokens) == text()
    wide = server.json("/v1/completions", completion(window=1, budget=0.5))["usage"]["retro"]
    assert (wide["window"], wide["budget"]) == (1, "0.5")
    passes = server.json("/v1/completions", completion(rectify=4))["usage"]["retro"]
    assert passes["rectify"] == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n_predict": 0}, "n_predict"),
        ({"stop": 3}, "stop"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logprobs": 99}, "logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"window": 5}, "window"),
        ({"window": 0}, "window"),
        ({"budget": 1.5}, "budget"),
        ({"budget": "much"}, "budget"),
        ({"rectify": 0}, "rectify"),
        ({"rectify": 9000}, "rectify"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"store": True}, "store"),
        ({"cache_prompt": False}, "cache_prompt"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"prompt": ["a"] * 9, "n": 8}, "n"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}, "response_format"),
        ({"colour": "blue"}, "colour"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else value,
)
def test_the_field_that_is_wrong_is_named(server, fields, param):
    status, error = server.error("/v1/completions", completion(**fields))
    assert status == 400 and error["param"] == param and param in error["message"]
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0]"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else value,
)
def test_so_it_is_in_chats(server, fields, param):
    status, error = server.error("/v1/chat/completions", chat(**fields))
    assert status == 400 and error["param"] == param, error


def test_the_template_gets_its_variables(server):
    tokens = [
        server.json("/v1/chat/completions", chat(**fields))["usage"]["prompt_tokens"]
        for fields in [{}, {"reasoning_effort": "high"}, {"chat_template_kwargs": {"reasoning_effort": "high"}}]
    ]
    assert tokens[0] < tokens[1] == tokens[2]


def test_what_is_no_request_is_refused(server):
    assert server.error("/v1/completions", b"{")[0] == 400
    assert server.error("/v1/completions", b"[" * 100_000)[0] == 400
    assert server.error("/v1/completions", completion(), headers={"Content-Type": "text/plain"})[0] == 415
    assert server.error("/v1/completions", b'{"prompt": "' + b"x" * (5 << 20) + b'"}')[0] == 413
    assert server.error("/v2")[0] == 404
    assert server.error("/v1/completions")[0] == 405
    assert server.error("/health", headers={"Host": "page.example"})[0] == 403
    long = server.error("/v1/completions", completion(prompt="x " * 50_000))[1]
    assert long["code"] == "context_length_exceeded"
    assert server.json("/health")["status"] == "ok"


def test_keys_and_origins(model):
    environment = ENVIRONMENT | {"RETRO_API_KEY": "first,second"}
    with Server(model, "--cors", "https://page.example", environment=environment) as server:
        status, error = server.error("/v1/completions", completion())
        assert status == 401 and error["code"] == "invalid_api_key"
        assert server.error("/v1/models", headers={"Authorization": "Bearer firs"})[0] == 401
        allowed = {"Authorization": "Bearer second", "Origin": "https://page.example"}
        status, headers, _ = server.request("/v1/models", headers=allowed)
        assert status == 200 and headers["Access-Control-Allow-Origin"] == "https://page.example"
        _, headers, _ = server.request("/v1/models", headers=allowed | {"Origin": "https://other.example"})
        assert headers["Access-Control-Allow-Origin"] is None
        assert server.json("/health")["status"] == "ok"


def test_past_the_queue_clients_are_told_when_to_come_back(model):
    with Server(model, "--parallel", "1", "--queue", "1", environment=ENVIRONMENT) as server:
        body = completion(max_tokens=6000, ignore_eos=True, stream=True)
        sockets = []
        for _ in range(2):
            sockets.append(stream_of(server, body))
            wait_until(lambda: server.figure("retro_slots_busy") + server.figure("retro_requests_waiting") == len(sockets))
        status, headers, text = server.request("/v1/completions", completion())
        assert status == 429 and headers["Retry-After"] == "1", text
        assert json.loads(text)["error"]["code"] == "rate_limit_exceeded"
        assert server.figure('retro_requests_total{outcome="refused"}') == 1
        # Clients that go away free their places.
        for connection in sockets:
            connection.close()
        wait_until(lambda: server.figure('retro_requests_total{outcome="cancelled"}') == 2)
        assert server.figure("retro_slots_busy") == 0 and server.figure("retro_requests_waiting") == 0
        assert server.json("/v1/completions", completion())["usage"]["completion_tokens"] == 12


def stream_of(server, body):
    """The connection of a request whose answer nobody reads."""
    connection = socket.create_connection(tuple(server.url.removeprefix("http://").split(":")))
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def wait_until(holds):
    limit = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_stopping_lets_answers_end(model):
    with Server(model, environment=ENVIRONMENT) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(server.json, "/v1/completions", completion(max_tokens=200, ignore_eos=True))
        wait_until(lambda: server.figure("retro_slots_busy") == 1)
        server.process.send_signal(signal.SIGTERM)
        assert answer.result()["usage"]["completion_tokens"] == 200
        assert server.process.wait(30) == 0
        assert server.said().endswith("stopped\n")


def test_a_port_that_is_taken_is_one_line(server, model):
    port = server.url.rsplit(":", 1)[1]
    arguments = [server.arguments[0], "serve", str(model), "--port", port]
    result = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 1 and result.stderr.startswith("error: cannot listen on") and result.stderr.count("\n") == 1


def test_a_graph_wants_a_gpu(server, model):
    arguments = [server.arguments[0], "serve", str(model), "--port", "0", "--cuda-graph"]
    result = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    error = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and error.startswith("error: ") and "--cuda-graph needs a GPU" in error, result.stderr


def test_an_address_that_is_open_to_others_is_warned_of(model):
    warning = "anyone who reaches this address may use the server: --api-key KEY asks for a key"
    for key, warned in [([], True), (["--api-key", "secret"], False)]:
        with Server(model, "--host", "0.0.0.0", "--parallel", "1", *key, environment=ENVIRONMENT) as server:
            assert (warning in server.said()) == warned
            # Under any name: it is not this machine's alone.
            assert server.json("/health", headers={"Host": "server.example"})["status"] == "ok"
            assert server.request("/v1/models")[0] == (200 if warned else 401)


def test_requests_that_do_not_say_are_sampled_as_the_model_says(server, model, tmp_path):
    plain = server.json("/props")["default_generation_settings"]["params"]
    assert plain == {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repeat_penalty": 1}
    silent = {"prompt": "def add(a, b):\n", "max_tokens": 12, "seed": 3}
    greedy = server.json("/v1/completions", silent | {"temperature": 0})["choices"]
    drawn = server.json("/v1/completions", silent)["choices"]
    assert drawn != greedy
    told = tmp_path / "told"
    shutil.copytree(model, told)
    # One token to choose from: as the likeliest is taken.
    (told / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 1, "top_p": 0.95}')
    with Server(told, "--parallel", "1", environment=ENVIRONMENT) as asked:
        assert "by generation_config.json: temperature 0.6, top-k 1, top-p 0.95" in asked.said()
        params = asked.json("/props")["default_generation_settings"]["params"]
        assert params == plain | {"temperature": 0.6, "top_k": 1, "top_p": 0.95}
        assert asked.json("/v1/completions", silent)["choices"] == greedy
        # What a request says holds.
        own = silent | {"temperature": 1, "top_k": -1, "top_p": 1}
        assert asked.json("/v1/completions", own)["choices"] == drawn
    with Server(told, "--generation-config", "none", "--parallel", "1", environment=ENVIRONMENT) as asked:
        assert asked.json("/props")["default_generation_settings"]["params"] == plain
        assert asked.json("/v1/completions", silent)["choices"] == drawn
    (told / "generation_config.json").write_text('{"top_p": 7}')
    arguments = [server.arguments[0], "serve", str(told), "--port", "0"]
    result = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert result.returncode == 1 and "--generation-config none" in result.stderr and "top-p" in result.stderr


def test_many_clients_are_answered_as_each_alone(server):
    """Some of them go away in the middle."""
    prompts = [f"def f{i}(x):\n    return" + " x +" * (i % 7) for i in range(24)]
    body = [completion(prompt=prompt, max_tokens=8 + i % 5, ignore_eos=True) for i, prompt in enumerate(prompts)]
    alone = [server.json("/v1/completions", b)["choices"][0]["text"] for b in body]
    cancelled = server.figure('retro_requests_total{outcome="cancelled"}')

    def ask(i):
        if i % 5 == 4:
            connection = stream_of(server, body[i] | {"stream": True, "max_tokens": 3000})
            connection.recv(64)
            connection.close()
            return None
        return server.json("/v1/completions", body[i])["choices"][0]["text"]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    assert [a for a in answers if a is not None] == [t for i, t in enumerate(alone) if i % 5 != 4]
    wait_until(lambda: server.figure("retro_slots_busy") == 0)
    assert server.figure('retro_requests_total{outcome="cancelled"}') - cancelled == 4


# ---- the openai package ----------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "person", "description": "Writes a person down.", "parameters": SCHEMA}}
MESSAGES = [{"role": "user", "content": "Ben is 42."}]


def test_openai_chats_and_streams(client):
    asked = {"model": "code", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    content = whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    with client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        events = list(stream)
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == content
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert client.models.list().data[0].id == "code"


def test_openai_structured_output(client):
    asked = {"model": "code", "messages": MESSAGES, "max_tokens": 200, "temperature": 1}
    for seed in range(5):
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
        made = client.chat.completions.create(**asked, seed=seed, response_format=form).choices[0]
        person = json.loads(made.message.content)
        assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120 and made.finish_reason == "stop"


def test_openai_tools(client):
    asked = {"model": "code", "messages": MESSAGES, "tools": [TOOL], "max_tokens": 200, "temperature": 1, "seed": 1}
    for choice in ["required", {"type": "function", "function": {"name": "person"}}]:
        made = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        (call,) = made.message.tool_calls
        assert made.finish_reason == "tool_calls" and made.message.content is None
        assert call.function.name == "person" and set(json.loads(call.function.arguments)) == {"name", "age"}
        with client.chat.completions.create(**asked, tool_choice=choice, stream=True) as stream:
            events = list(stream)
        (delta,) = [e.choices[0].delta.tool_calls for e in events if e.choices[0].delta.tool_calls]
        assert delta[0].function.arguments == call.function.arguments
        assert events[-1].choices[0].finish_reason == "tool_calls"
    # The result of a call, and what follows it.
    messages = MESSAGES + [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "written"},
    ]
    assert client.chat.completions.create(model="code", messages=messages, tools=[TOOL], max_tokens=4).choices


def test_openai_errors_and_cancelling(client, server):
    import openai

    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="code", messages=MESSAGES, temperature=9)
    assert wrong.value.param == "temperature"
    before = server.figure('retro_requests_total{outcome="cancelled"}')
    asked = {"model": "code", "messages": MESSAGES, "max_tokens": 6000, "extra_body": {"ignore_eos": True}}
    with client.chat.completions.create(**asked, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: server.figure('retro_requests_total{outcome="cancelled"}') == before + 1)
    wait_until(lambda: server.figure("retro_slots_busy") == 0)


# ---- the document ----------------------------------------------------------------------------------------------------------

SERVING = ROOT / "docs" / "serving.md"
URL = "http://127.0.0.1:8080"


def test_the_documents_python_runs(client, server, capsys):
    defined = {}
    blocks = [block for block in documents.blocks(SERVING) if block.language == "python"]
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile("\n" * block.line + block.text.replace(URL, server.url), str(SERVING), "exec"), defined)
    assert "write_down" in capsys.readouterr().out


def test_the_documents_shell_runs(server):
    for block in (block for block in documents.blocks(SERVING) if block.language == "sh"):
        result = subprocess.run(["sh", "-ec", block.text.replace(URL, server.url)], capture_output=True, text=True, check=True)
        assert json.loads(result.stdout)["usage"]["retro"]["budget"] == "0.2"


def test_the_document_names_the_servers_flags(server):
    text = SERVING.read_text()
    shown = subprocess.run([server.arguments[0], "serve", "--help"], capture_output=True, text=True, check=True).stdout
    own = ["--host", "--port", "--parallel", "--queue", "--timeout", "--grace", "--api-key", "--cors", "--max-body", "--log", "--log-prompts"]
    own += ["--generation-config", "--cuda-graph", "--no-cuda-graph"]
    for flag in own:
        assert flag in shown and flag in text, flag
