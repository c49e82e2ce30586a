"""Tool calls: the grammar of each form of a template, and the calls in an answer."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AddedToken

from qmix.errors import UsageError
from qmix.text.chat_template import ChatTemplate
from qmix.text.constraint import GrammarCompiler
from qmix.text.grammar import grammar_source
from qmix.text.tokenizer import decode, load_tokenizer
from qmix.text.tools import ToolCall, ToolForm, tool_form

MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools %}[AVAILABLE_TOOLS] {{
tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] {{
m.tool_calls | tojson }}{% endif %}{% endfor %}"""
HERMES = """{% if tools %}Tools: {{ tools | tojson }} Answer with <tool_call>...</tool_call>.{% endif %}{%
for m in messages %}{{ m.content }}{% endfor %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
            "required": ["city", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "not": {"const": 1},
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '{"name": "weather", "arguments": {"city": "Köln", "days": 3}}'
TWO = f'{CALL}, {{"name": "clock", "arguments": {{}}}}'


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


def form_of(tokenizer, template: str, special: bool = False) -> tuple[ToolForm, object]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    if special:
        tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True)], special_tokens=True)
    return tool_form(ChatTemplate(tokenizer), tokenizer), tokenizer


def takes(tokenizer, grammar: str, text: str) -> bool:
    """Return True if a text, cut into characters and special tokens, is all of an answer under a grammar."""
    constraint = GrammarCompiler(tokenizer, len(tokenizer), [2]).constraint(grammar_source(grammar))
    ids = ids_of(tokenizer, text)
    allowed = constraint.allowed(ids)
    return allowed is not None and bool(allowed[2])


def ids_of(tokenizer, text: str) -> list[int]:
    """The ids of a text behind another one, without the space that is put before a text."""
    line_end, whole = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in ("\n", "\n" + text))
    return whole[len(line_end) :]


EACH = f"<tool_call>\n{CALL}\n</tool_call>"
CLOCK_CALL = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
FORMS = {
    "mistral": (MISTRAL, True, f"[TOOL_CALLS] [{CALL}]", f"[TOOL_CALLS] [{TWO}]"),
    "mistral as text": (MISTRAL, False, f"[TOOL_CALLS] [{CALL}]", f"[TOOL_CALLS] [{TWO}]"),
    "hermes": (HERMES, False, EACH, f"{EACH}\n{CLOCK_CALL}"),
}


@pytest.mark.parametrize(("template", "special", "one", "two"), FORMS.values(), ids=FORMS.keys())
def test_answers_under_a_grammar_are_calls_and_are_read_back(tokenizer, template, special, one, two):
    form, own = form_of(tokenizer, template, special)
    assert (form.token is not None) == special
    tools = [WEATHER, CLOCK]
    auto, required = form.grammar(tools), form.grammar(tools, "required")
    clock, single = form.grammar(tools, "clock"), form.grammar(tools, "required", parallel=False)
    assert [takes(own, grammar, one) for grammar in (auto, required, clock, single)] == [True, True, False, True]
    assert [takes(own, grammar, two) for grammar in (auto, required, clock, single)] == [True, True, False, False]
    assert [takes(own, grammar, "It is late.") for grammar in (auto, required)] == [True, False]
    assert takes(own, auto, f"Let me see.{one}")
    assert not takes(own, auto, one.replace("3", "30")), "parameters follow their schema"
    assert not takes(own, auto, one.replace("weather", "whether"))
    calls = [ToolCall("weather", '{"city": "Köln", "days": 3}'), ToolCall("clock", "{}")]

    def read(text: str) -> tuple[str, list[ToolCall]]:
        text, found = form.parse(ids_of(own, text), lambda ids: decode(own, ids))
        return text.strip(), found

    assert read(two) == ("", calls)
    assert read(f"Let me see.{one}") == ("Let me see.", calls[:1])
    assert read("It is late.") == ("It is late.", [])
    assert read(one[:-8])[1] == [], "an answer that was cut is text"


def test_a_template_without_tools_is_refused(tokenizer):
    with pytest.raises(UsageError, match=r"^tools: the model's chat template has no place for tools; leave them out$"):
        tool_form(ChatTemplate(tokenizer), tokenizer)
    with pytest.raises(UsageError, match=r"^tools: the chat template writes calls in a form unknown to qmix; "):
        form_of(tokenizer, "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}")


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([WEATHER], "clock", "tool_choice 'clock': is not among the tools"),
        ([], "auto", "tool_choice 'auto': is not among the tools"),
        ([{"type": "retrieval"}], "auto", "tools[0]: must be an object with 'type' \"function\" and a 'function'"),
        ([CLOCK, {"type": "function", "function": {"name": ""}}], "auto", "tools[1].function.name: must be a text"),
        (
            [{"type": "function", "function": {"name": "a", "parameters": {"type": "nonsense"}}}],
            "auto",
            "tools[0].function.parameters: Invalid type: nonsense",
        ),
    ],
)
def test_a_tool_that_cannot_be_used_is_named(tools, choice, message):
    with pytest.raises(UsageError) as caught:
        ToolForm("<tool_call>").grammar(tools, choice)
    assert str(caught.value).startswith(message)


def test_tools_are_shown_by_the_template(tokenizer):
    _, own = form_of(tokenizer, MISTRAL)
    template = ChatTemplate(own)
    text = template.text([{"role": "user", "content": "Hi"}], True, [CLOCK])
    assert text == f"<s>[AVAILABLE_TOOLS] {json.dumps([CLOCK])}[/AVAILABLE_TOOLS][INST] Hi[/INST]"
    assert template.text([{"role": "user", "content": "Hi"}], True) == "<s>[INST] Hi[/INST]"
