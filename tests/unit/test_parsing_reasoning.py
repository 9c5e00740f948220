"""Thoughts apart from answers, and which notations a template uses."""

from __future__ import annotations

import pytest

from server.parsing.chosen import Notations, choose
from server.parsing.message import Message
from server.parsing.parser import OutputParser
from server.parsing.reasoning import REASONING_TAGS, ReasoningSplitter
from server.parsing.tools import CallOptions

THINK = REASONING_TAGS["think"]
READS = frozenset({"tools"})


def read(text: str, size: int = 0, *, opened: bool = False, tools: bool = False) -> Message:
    notations = Notations(READS, "hermes", "think")
    parser = notations.parser(CallOptions() if tools else None, {}, opened=opened)
    assert parser is not None
    cuts = [text[at : at + size] for at in range(0, len(text), size)] if size else [text]
    return Message.of([*(piece for cut in cuts for piece in parser.push(cut)), *parser.finish()])


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nHm, 2 < 3.\n</think>\n\nYes.", False, "Hm, 2 < 3.", "Yes."),
        ("\n<think>a</think>b", False, "a", "b"),
        ("Hm.\n</think>\n\nYes.\n", True, "Hm.", "Yes.\n"),
        ("<think>\nHm.</think>Yes.", True, "Hm.", "Yes."),
        ("<think>never ends ", False, "never ends", ""),
        ("never ends </thin", True, "never ends </thin", ""),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        (" Yes. <think>no</think>", False, "", " Yes. <think>no</think>"),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
        ("<thin", False, "", "<thin"),
        ("  ", False, "", "  "),
        ("", True, "", ""),
    ],
)
def test_split(text: str, opened: bool, reasoning: str, content: str, size: int) -> None:
    assert read(text, size, opened=opened) == Message(content, reasoning)


@pytest.mark.parametrize("size", [0, 1])
def test_calls_follow_the_thoughts(size: int) -> None:
    text = '<think>Use <tool_call>?</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    message = read(text, size, tools=True)
    assert (message.reasoning, message.content, len(message.calls)) == ("Use <tool_call>?", "", 1)


def test_thoughts_are_shown_as_they_come() -> None:
    splitter = ReasoningSplitter(THINK)
    assert [splitter.push(part) for part in ("<think>", "\nOne ", "two <", "/think", ">\n\nA", "B")] == [
        ("", ""),
        ("One", ""),
        (" two", ""),
        ("", ""),
        ("", "A"),
        ("", "B"),
    ]


@pytest.mark.parametrize(
    ("texts", "opened", "expected"),
    [
        (["<think>", "a", "b", "</think>", "c", "d"], False, 4),
        (["<", "think", ">", "a", "</", "think>", "c", "d"], False, 6),
        (["\n", "x", "y"], False, 0),
        (["<thi", "s"], False, 0),
        (["a", "</think>", "c"], True, 2),
        (["a", "b"], True, 2),
    ],
)
def test_tokens_of_thoughts(texts: list[str], opened: bool, expected: int) -> None:
    parser = OutputParser(ReasoningSplitter(THINK, opened=opened), None)
    for number, text in enumerate(texts):
        parser.push(text, (number,))
    parser.finish()
    assert parser.reasoning_tokens == expected


def test_tokens_that_come_together_are_told_apart_by_the_closing_tag() -> None:
    parser = OutputParser(ReasoningSplitter(THINK), None, end_id=9)
    parser.push("<think>a</think>bcd", (8, 1, 9, 2, 3, 4))
    assert parser.reasoning_tokens == 3


QWEN = '{%- if tools %}<tools>{"name": <function-name>}</tools><tool_call>{% endif %}'
LLAMA = 'Respond in the format {"name": function name, "parameters": dictionary}. {% if tools %}'


@pytest.mark.parametrize(
    ("template", "takes_tools", "tools", "reasoning"),
    [
        ("{{ messages }}", False, None, None),
        (QWEN, True, "hermes", None),
        (QWEN + "{{ content.split('</think>')[-1] }}", True, "hermes", "think"),
        (QWEN + "<function=name><parameter=x>", True, None, None),
        (QWEN + "<arg_key>", True, None, None),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", True, "mistral", None),
        ("[TOOL_CALLS][THINK][/THINK]{{ tools }}", True, "mistral", "mistral"),
        (LLAMA + "<|python_tag|>", True, "llama3_json", None),
        (LLAMA + "<|python_start|>", True, "llama3_json", None),
        ("[func_name1(params_name1=params_value1...)] {{ tools | tojson }}", True, "pythonic", None),
        ("{% if tools %}<|tool_call|>{% endif %}", True, None, None),
        ("a fool's toolset", False, None, None),
    ],
)
def test_detection(template: str, takes_tools: bool, tools: str | None, reasoning: str | None) -> None:
    found = choose({"default": template})
    assert ("tools" in found.reads, found.tools, found.reasoning) == (takes_tools, tools, reasoning)


def test_variables_a_template_reads() -> None:
    found = choose({"default": "{% if enable_thinking is defined %}", "other": "{{ reasoning_effort }}"})
    assert found.reads == {"enable_thinking", "reasoning_effort"}


def test_the_template_for_tools_is_asked_first() -> None:
    found = choose({"default": "plain", "tool_use": "{{ tools }}<tool_call>", "zzz": "[TOOL_CALLS]"})
    assert found.tools == "hermes"


def test_the_operator_decides() -> None:
    templates = {"default": QWEN + "</think>"}

    def chosen(*said: str) -> tuple[frozenset[str], str | None, str | None]:
        found = choose(templates, *said)
        return found.reads, found.tools, found.reasoning

    assert chosen() == (READS, "hermes", "think")
    assert chosen("none", "none") == (READS, None, None)
    assert chosen("mistral", "cohere") == (READS, "mistral", "cohere")
    assert Notations().parser(CallOptions(), {}) is None


def test_a_prompt_that_begins_the_thoughts() -> None:
    notations = Notations(reasoning="think")
    assert notations.opened_by("<|im_start|>assistant\n<think>\n")
    assert not notations.opened_by("<think>\n\n</think>\n\n")
    assert not Notations().opened_by("<think>")


def test_markers_that_are_special_tokens() -> None:
    control = {"[TOOL_CALLS]": 9, "[ARGS]": 32, "</s>": 2, "[THINK]": 34}
    notations = Notations(READS, "mistral", "mistral")
    assert notations.hidden_markers(control, {2, 9, 32, 34}, tools=True) == (9, 32, 34)
    assert notations.hidden_markers(control, {2, 9, 32, 34}, tools=False) == (34,)
    assert notations.hidden_markers(control, {2, 9}, tools=True) == (9,)
    assert Notations(READS, "hermes").hidden_markers(control, {2, 9, 32}, tools=True) == ()
