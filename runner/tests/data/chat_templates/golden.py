#!/usr/bin/env python3
"""Writes golden.json: what transformers' apply_chat_template makes of conversations.py with each of the templates.

    python3 -m venv venv && venv/bin/pip install transformers==5.24.0 jinja2==3.1.6
    venv/bin/python golden.py

`golden.py FOLDER` does so for another folder's models.json and templates; with RETRO_CHAT_TEMPLATES=FOLDER the test compares them.

Today is the 24th of December 2025 there, 09:05:03. A template's refusal (raise_exception) is kept as {"refused": text}. Where
Python itself fails, as on text + list, there is no case.
"""

import datetime
import json
import sys
from pathlib import Path

import jinja2
import tokenizers
import transformers
from transformers.utils import chat_template_utils

from conversations import CONVERSATIONS
from expressions import EXPRESSIONS

HERE = Path(__file__).resolve().parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NOW = datetime.datetime(2025, 12, 24, 9, 5, 3)


class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def case(tokenizer, messages, options):
    options = dict(options)
    variables = options.pop("variables", {})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options, **variables)
    except jinja2.exceptions.TemplateError as error:
        # raise_exception raises this class, Jinja itself its children.
        if type(error) is not jinja2.exceptions.TemplateError:
            raise TypeError from error
        return {"refused": error.message}


def with_template(text, special_tokens):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?")),
        chat_template=text,
        **special_tokens,
    )


def main():
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    chat_template_utils.datetime = Frozen
    models = json.loads((folder / "models.json").read_text())
    golden, failed = {}, 0
    for file, model in models.items():
        tokenizer = with_template((folder / "templates" / file).read_text(), model["special_tokens"])
        golden[file] = {}
        for name, (messages, options) in CONVERSATIONS.items():
            try:
                golden[file][name] = case(tokenizer, messages, options)
            except (TypeError, ValueError, AttributeError) as error:
                failed += 1
                print(f"{file}: {name}: {type(error).__name__}: {str(error or error.__cause__)[:100]}", file=sys.stderr)
    conversations = {name: {"messages": messages, **options} for name, (messages, options) in CONVERSATIONS.items()}
    messages, _ = CONVERSATIONS["system and turns"]
    expressions = [[text, with_template(text, TOKENS).apply_chat_template(messages, tokenize=False)] for text in EXPRESSIONS]
    out = {"now": NOW.isoformat(), "conversations": conversations, "golden": golden, "expressions": expressions}
    (folder / "golden.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n")
    print(f"{sum(map(len, golden.values()))} cases, {failed} that Python fails on")


if __name__ == "__main__":
    main()
