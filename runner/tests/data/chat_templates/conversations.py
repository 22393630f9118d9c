"""The conversations that every template renders, each with what apply_chat_template gets beside it."""

SYSTEM = {"role": "system", "content": "You are brief.\nAnswer in one line. "}
HELLO = {"role": "user", "content": "Hello, who are you?"}
BACK = {"role": "assistant", "content": "  I'm a model.\n"}
AGAIN = {"role": "user", "content": "And <b>what</b> is \"2 + 2\" & 'x' \\ {{ y }}?"}
UNICODE = {"role": "user", "content": " Grüße, 世界! 👩‍🚀\u00a0\t<|im_end|> é \u2028 \x7f "}
THOUGHT = {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nFour."}
REASONED = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two.\nThat is four."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "One part. "}, {"type": "text", "text": "Another."}]}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place — now.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Town & country, as \"Köln, DE\""},
                "unit": {"type": "string", "enum": ["°C", "°F"], "default": "°C"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "near": {"type": "number", "default": 1.0},
                "exact": {"type": "boolean", "default": False, "nullable": True},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {}},
    },
}


def call(number, name, arguments, **message):
    function = {"name": name, "arguments": arguments}
    calls = [{"id": f"call0000{number}", "type": "function", "function": function}]
    return {"role": "assistant", **message, "tool_calls": calls}


def result(number, name, content):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": name, "content": content}


CALL = call(1, "get_weather", {"place": "Köln", "days": [1, 2], "near": 0.5, "exact": None}, content="")
RESULT = result(1, "get_weather", '{"temperature": 21.5, "sky": "blue & clear"}')
TOOLS = [WEATHER, CLOCK]
WORD = {"role": "assistant", "content": "21.5 °C."}
DOCUMENTS = [
    {"doc_id": 1, "title": "Bees", "text": "Bees dance.\nThey fly."},
    {"doc_id": 2, "title": "Ants", "text": "Ants don't."},
]
PROMPT = {"add_generation_prompt": True}

CONVERSATIONS = {
    "user": ([HELLO], {}),
    "user, prompt": ([HELLO], PROMPT),
    "system, prompt": ([SYSTEM, HELLO], PROMPT),
    "turns, prompt": ([HELLO, BACK, AGAIN], PROMPT),
    "system and turns": ([SYSTEM, HELLO, BACK, AGAIN, BACK], {}),
    "unicode, prompt": ([UNICODE], PROMPT),
    "parts, prompt": ([PARTS], PROMPT),
    "reasoning in content, prompt": ([HELLO, THOUGHT, AGAIN], PROMPT),
    "reasoning apart": ([SYSTEM, HELLO, REASONED], {}),
    "reasoning apart, prompt": ([HELLO, REASONED, AGAIN], PROMPT),
    "thinking off, prompt": ([HELLO], {**PROMPT, "variables": {"enable_thinking": False, "reasoning_effort": "low"}}),
    "thinking on, prompt": ([HELLO], {**PROMPT, "variables": {"enable_thinking": True, "reasoning_effort": "high"}}),
    "continued": ([HELLO, {"role": "assistant", "content": "I am "}], {"continue_final_message": True}),
    "tools, prompt": ([SYSTEM, HELLO], {**PROMPT, "tools": TOOLS}),
    "tool call": ([HELLO, CALL], {"tools": TOOLS}),
    "tool result, prompt": ([HELLO, CALL, RESULT], {**PROMPT, "tools": [CLOCK]}),
    "tool answer": ([HELLO, {**CALL, "content": "I look."}, RESULT, WORD, AGAIN], {**PROMPT, "tools": [CLOCK]}),
    "call as text": ([HELLO, call(2, "clock", "{}", content=""), result(2, "clock", "12:00")], {"tools": [CLOCK]}),
    "documents, prompt": ([HELLO], {**PROMPT, "documents": DOCUMENTS}),
    "two of the user": ([HELLO, AGAIN], PROMPT),
}
