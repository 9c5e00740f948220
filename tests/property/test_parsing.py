"""Parsers against anything a model might write, in any cuts."""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.parsing.chosen import Notations
from server.parsing.formats import TOOL_FORMATS
from server.parsing.message import Message
from server.parsing.pieces import CallArguments, CallStart, Piece
from server.parsing.tools import CallOptions
from server.parsing.values import MAX_DEPTH, json_object

OPTIONS = CallOptions(frozenset({"f", "get_weather"}), max_calls=3, max_call_chars=120, new_id=lambda: "id")
READS = frozenset({"tools"})
ONE = CallOptions(OPTIONS.names, parallel=False, new_id=lambda: "id")

FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<tool_", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<|python_start|>", "<|python_end|>", "<think>", "</think>", "<th", "\n", " ", ";", ",", "[", "]"),
    *("{", "}", "(", ")", '"', "'", "\\", ":", "=", "f", "get_weather", "f(", "a=1", '"a"', "1", "-2.5e3"),
    *('{"name": "f", "arguments": {"a":1}}', '{"name": "f", "parameters": {}}', '{"name": "f", "arguments":'),
    *("[f(a=1), ", "f()", "None", "true", "é", "\u2028", "\x00", "\\u00", "\\n", '"name": "f"', "x" * 50),
]  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=30).map("".join)
notations = st.builds(
    Notations, st.just(READS), st.sampled_from([None, *TOOL_FORMATS]), st.sampled_from([None, "think"])
).filter(lambda chosen: chosen.tools or chosen.reasoning)


def feed(chosen: Notations, options: CallOptions, opened: bool, cuts: list[str]) -> list[Piece]:
    parser = chosen.parser(options, {}, opened=opened)
    assert parser is not None
    return [*(piece for cut in cuts for piece in parser.push(cut)), *parser.finish()]


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({place % (len(text) + 1) for place in places})
    return [text[start:end] for start, end in zip([0, *at], [*at, len(text)], strict=True)]


def joined(pieces: list[Piece]) -> list[Any]:
    """Pieces with neighbours of one kind put together."""
    result: list[Any] = []
    for piece in pieces:
        key = (type(piece), getattr(piece, "index", None))
        if hasattr(piece, "text") and result and result[-1][0] == key:
            result[-1][1] += piece.text
        else:
            result.append([key, piece.text] if hasattr(piece, "text") else [piece])
    return result


@given(texts, notations, st.sampled_from([OPTIONS, ONE]), st.booleans(), st.lists(st.integers(0, 10_000)))
def test_cuts_do_not_matter(
    text: str, chosen: Notations, options: CallOptions, opened: bool, places: list[int]
) -> None:
    whole = feed(chosen, options, opened, [text])
    assert joined(feed(chosen, options, opened, cut(text, places))) == joined(whole)
    assert joined(feed(chosen, options, opened, list(text))) == joined(whole)


@given(texts, notations)
def test_nothing_is_lost_and_calls_are_valid(text: str, chosen: Notations) -> None:
    pieces = feed(chosen, OPTIONS, False, list(text))
    message = Message.of(pieces)
    if not message.calls and not message.reasoning and "<think>" not in text:
        assert message.content == text
    for call in message.calls:
        assert isinstance(json.loads(call.arguments), dict)
    assert _in_order(message.content, text) and _in_order(message.reasoning, text)
    started = [piece.index for piece in pieces if isinstance(piece, CallStart)]
    assert started == list(range(len(started))) and len(started) <= OPTIONS.max_calls


def _in_order(part: str, text: str) -> bool:
    """Whether the characters of `part` stand in `text` in this order."""
    rest = iter(text)
    return all(character in rest for character in part)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
arguments = st.dictionaries(st.from_regex(r"[a-z_][a-z0-9_]{0,5}", fullmatch=True), json_values, max_size=4)


def written(name: str, values: dict[str, Any], *, ascii_only: bool) -> str:
    text = json.dumps(values, ensure_ascii=ascii_only)
    if name == "pythonic":
        return f"[f({', '.join(f'{key}={value!r}' for key, value in values.items())})]"
    if name == "mistral":
        return f"[TOOL_CALLS]f[ARGS]{text}"
    if name == "llama3_json":
        return f'{{"name": "f", "parameters": {text}}}'
    return f'<tool_call>\n{{"name": "f", "arguments": {text}}}\n</tool_call>'


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(arguments, st.booleans(), st.lists(st.integers(0, 10_000), max_size=8))
def test_arguments_come_through(
    name: str, values: dict[str, Any], ascii_only: bool, places: list[int]
) -> None:
    text = written(name, values, ascii_only=ascii_only)
    options = CallOptions(frozenset({"f"}))
    pieces = feed(Notations(READS, name), options, False, cut(text, places))
    message = Message.of(pieces)
    (call,) = message.calls
    assert json.loads(call.arguments) == values
    assert message.content == ""
    if name != "pythonic":
        assert call.arguments == json.dumps(values, ensure_ascii=ascii_only)


@given(json_values.map(repr))
def test_python_literals_are_read_as_python_reads_them(literal: str) -> None:
    expected = ast.literal_eval(literal)
    message = Message.of(
        feed(Notations(READS, "pythonic"), CallOptions(frozenset({"f"})), False, [f"[f(x={literal})]"])
    )
    assert json.loads(message.calls[0].arguments) == {"x": expected}


@given(st.dictionaries(st.text(), json_values))
def test_an_object_in_a_string(value: dict[str, Any]) -> None:
    assert json_object(json.dumps(value, indent=2)) == json.dumps(value)


BEGUN = '<tool_call>{"name": "f", "arguments": '
HOSTILE = {
    "hermes": [
        "<tool_call>" * 50_000,
        "<tool_call" * 50_000,
        BEGUN + '{"a":' * 90_000,
        BEGUN + " " * 300_000,
    ],
    "llama3_json": ["{" * 300_000, '{"name": "' + "\\n" * 200_000, "<|python_tag|>{" * 20_000],
    "pythonic": ["[" * 300_000, "[f(a=" + "(" * 300_000, "[f(" * 100_000, "[f(a=" + "9" * 300_000],
    "mistral": ["[TOOL_CALLS]" * 30_000, "[TOOL_CALLS] [" * 20_000, "[TOOL_CALLS]" + "f" * 300_000],
}


@pytest.mark.parametrize("name", TOOL_FORMATS)
@pytest.mark.parametrize("size", [7, 1 << 30])
def test_work_grows_with_the_text_alone(name: str, size: int) -> None:
    """Hundreds of kilobytes of the worst: seconds, where a quadratic reader would run into the time limit."""
    for text in HOSTILE[name]:
        cuts = [text[at : at + size] for at in range(0, len(text), size)]
        message = Message.of(feed(Notations(READS, name), CallOptions(frozenset({"f"})), False, cuts))
        assert message == Message(text)


def test_depth() -> None:
    def nested(depth: int) -> Message:
        text = '{"a": ' * depth + "1" + "}" * depth
        source = f'<tool_call>{{"name": "f", "arguments": {text}}}</tool_call>'
        return Message.of(feed(Notations(READS, "hermes"), CallOptions(), False, list(source)))

    assert len(nested(MAX_DEPTH).calls) == 1
    assert nested(MAX_DEPTH + 1).calls == []


def test_long_arguments_come_in_small_pieces() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "' + "word " * 1000 + '"}}</tool_call>'
    cuts = [text[at : at + 5] for at in range(0, len(text), 5)]
    pieces = feed(Notations(READS, "hermes"), CallOptions(), False, cuts)
    assert max(len(piece.text) for piece in pieces if isinstance(piece, CallArguments)) <= 10
