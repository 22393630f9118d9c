"""`retro-run serve` as LangChain's client for OpenAI sees it."""

import pytest

from test_serve import model, pytestmark, server  # noqa: F401

langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is tested with onnxruntime 1.32.0 alone")


@pytest.fixture
def chat(server):  # noqa: F811
    def chat(**options):
        options = {"model": "code", "max_tokens": 16, "temperature": 0, "max_retries": 0} | options
        return langchain.ChatOpenAI(base_url=server.url + "/v1", api_key="unused", **options)

    return chat


PERSON = {
    "title": "Person",
    "description": "Someone.",
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_chats_streams_and_batches(chat):
    whole = chat().invoke([("system", "Be brief."), ("user", "def f")])
    usage = whole.usage_metadata
    assert whole.content and usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    parts = list(chat(stream_usage=True).stream([("system", "Be brief."), ("user", "def f")]))
    assert len(parts) > 2 and "".join(part.content for part in parts) == whole.content
    assert sum(part.usage_metadata["output_tokens"] for part in parts if part.usage_metadata) == usage["output_tokens"]
    prompts = ["def a", "class B", "import c"]
    answers = chat().batch(prompts)
    assert [answer.content for answer in answers] == [chat().invoke(prompt).content for prompt in prompts]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    writer = chat(temperature=1, seed=3, max_tokens=200).with_structured_output(PERSON, method=method)
    person = writer.invoke("Ben is 42.")
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 120


def test_tools(chat):
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    bound = chat(temperature=1, seed=1, max_tokens=200).bind_tools([PERSON], tool_choice="Person")
    made = bound.invoke("Ben is 42.")
    (call,) = made.tool_calls
    assert call["name"] == "Person" and set(call["args"]) == {"name", "age"}
    talk = [HumanMessage("Ben is 42."), AIMessage("", tool_calls=[call]), ToolMessage("written", tool_call_id=call["id"])]
    assert chat().invoke(talk).usage_metadata["output_tokens"] > 0


def test_what_retro_asks_for_goes_through(chat):
    answer = chat(extra_body={"window": 1, "budget": 0.5}).invoke("def f")
    assert answer.response_metadata["token_usage"]["retro"]["window"] == 1
