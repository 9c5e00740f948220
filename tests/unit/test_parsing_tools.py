"""Tool calls in models' own notations -> calls, content, and nothing lost."""

from __future__ import annotations

import json
from itertools import count

import pytest

from server.parsing.formats import TOOL_FORMATS
from server.parsing.message import Message
from server.parsing.pieces import CallArguments, CallBroken, CallEnd, CallStart, Content, Piece
from server.parsing.tools import CallOptions, ToolParser

NAMES = frozenset({"get_weather", "search", "now"})


def make(name: str, **options: object) -> ToolParser:
    numbers = count()
    options = {"names": NAMES, "new_id": lambda: f"id{next(numbers)}", **options}
    return TOOL_FORMATS[name](CallOptions(**options))  # type: ignore[arg-type]


def read(name: str, text: str, size: int = 0, **options: object) -> Message:
    """The message a text makes, fed in pieces of `size` characters."""
    return Message.of(pieces(make(name, **options), text, size))


def pieces(parser: ToolParser, text: str, size: int = 0) -> list[Piece]:
    cuts = [text[at : at + size] for at in range(0, len(text), size)] if size else [text]
    return [*(piece for cut in cuts for piece in parser.push(cut)), *parser.finish()]


def calls(message: Message) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


PARIS = ("get_weather", {"city": "Paris"})
SEARCH = ("search", {"query": 'the "best" café\n', "limit": 3, "deep": True})
CITY, QUERY = r'{"city": "Paris"}', r'{"query": "the \"best\" café\n", "limit": 3, "deep": true}'

TRANSCRIPTS = [
    # Qwen 2.5 and 3: words before, each call in its tags.
    (
        "hermes",
        f'I will look.\n<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>\n'
        f'<tool_call>\n{{"name": "search", "arguments": {QUERY}}}\n</tool_call>',
        "I will look.",
        [PARIS, SEARCH],
    ),
    # Hermes 2 Pro: the arguments first, a space after the brace.
    (
        "hermes",
        f'<tool_call>\n{{ "arguments": {CITY}, "name": "get_weather"}}\n</tool_call> ',
        "",
        [PARIS],
    ),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
    # Arguments as a string of JSON, as OpenAI's own API shows them.
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        "",
        [PARIS],
    ),
    # A tool that nobody offered: whoever runs the tools can tell the model so.
    ("hermes", '<tool_call>{"name": "guess", "arguments": {}}</tool_call>', "", [("guess", {})]),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {CITY}}}', "", [PARIS]),
    ("hermes", f'<tool_call>{{"name": "get_weather", "arguments": {CITY}\n</tool_call>', "", [PARIS]),
    ("hermes", f'A\n<tool_call>{{"name": "now"}}</tool_call>\nB {CITY}', "A\n\nB " + CITY, [("now", {})]),
    ("llama3_json", f'{{"name": "get_weather", "parameters": {CITY}}}', "", [PARIS]),
    ("llama3_json", '\n\n{"type": "function", "name": "now", "parameters": {}}', None, []),
    (
        "llama3_json",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {CITY}}}',
        "",
        [PARIS],
    ),
    (
        "llama3_json",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {CITY}}}; '
        f'{{"name": "search", "parameters": {QUERY}}}',
        "",
        [PARIS, SEARCH],
    ),
    ("llama3_json", 'So.<|python_tag|>{"name": "now", "parameters": {}}', "So.", [("now", {})]),
    (
        "llama3_json",
        f'<|python_start|>{{"name": "get_weather", "parameters": {CITY}}}<|python_end|>',
        "",
        [PARIS],
    ),
    ("pythonic", '[get_weather(city="Paris")]', "", [PARIS]),
    (
        "pythonic",
        "[get_weather(city='Paris'), search(query='the \"best\" caf\\u00e9\\n', limit=3, deep=True)]",
        "",
        [PARIS, SEARCH],
    ),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", "", [("now", {})]),
    (
        "pythonic",
        "[search(query={'a': [1, -2.5e3, (None, False)], \"b\": {}}, tags=[],)]",
        "",
        [("search", {"query": {"a": [1, -2.5e3, [None, False]], "b": {}}, "tags": []})],
    ),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {CITY}}}, '
        f'{{"name": "search", "arguments": {QUERY}, "id": "abcdefghi"}}]',
        "",
        [PARIS, SEARCH],
    ),
    ("mistral", f"A[TOOL_CALLS]get_weather[ARGS]{CITY}[TOOL_CALLS]search[ARGS]{QUERY}", "A", [PARIS, SEARCH]),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{CITY}", "", [PARIS]),
    ("mistral", f"[TOOL_CALLS]get_weather{CITY}", "", [PARIS]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "content", "expected"), TRANSCRIPTS)
@pytest.mark.parametrize("size", [0, 1, 5])
def test_transcripts(
    name: str, text: str, content: str | None, expected: list[tuple[str, object]], size: int
) -> None:
    message = read(name, text, size)
    assert calls(message) == expected
    assert message.content == (text if content is None else content)


NOT_CALLS = [
    ("hermes", "<tool_call>not JSON at all</tool_call>"),
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": tru}}</tool_call> and more'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a" 1}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1,}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'now', 'arguments': {}}</tool_call>"),
    ("hermes", '  so \n<tool_call>{"name": "now", "arguments": {"a": "unfinished'),
    ("hermes", '<tool_call>{"name": "now", "arguments": ' + '{"a": ' * 200 + "1" + "}" * 201),
    ("hermes", "<tool_"),
    ("hermes", "a </tool_call> b"),
    ("hermes", '<tool_call>{"name": "n' + "x" * 300 + '", "arguments": {}}'),
    ("llama3_json", '{"name": "Bob", "age": 3}'),
    ("llama3_json", '{"name": "get_weather", "description": "Weather", "parameters": {}}'),
    ("llama3_json", '{"answer": 42}'),
    ("llama3_json", 'The call is {"name": "now", "parameters": {}}'),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("pythonic", "[a link](http://x) and [get_weather(city='Paris')]"),
    ("pythonic", "[unknown(city='Paris')]"),
    ("pythonic", "[get_weather('Paris')]"),
    ("pythonic", "[get_weather(city=__import__('os').system('ls'))]"),
    ("pythonic", "[get_weather(city=f'{x}')]"),
    ("pythonic", "[get_weather(city='Paris'"),
    ("pythonic", "[now(a=" + "[" * 200),
    ("pythonic", "[get_weather(city='\\U00110000')]"),
    ("pythonic", "[]"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]get_weather and then nothing"),
    ("mistral", "[TOOL_CALLS"),
]


@pytest.mark.parametrize(("name", "text"), NOT_CALLS)
@pytest.mark.parametrize("size", [0, 1])
def test_what_is_no_call_is_content(name: str, text: str, size: int) -> None:
    assert read(name, text, size) == Message(text)


def test_a_call_is_streamed_while_it_is_written() -> None:
    parser = make("hermes")
    assert parser.push('Look. <tool_call>\n{"name": "get_wea') == [Content("Look.")]
    assert parser.push('ther"') == []
    assert parser.push(', "arguments": {"ci') == [
        CallStart(0, "id0", "get_weather"),
        CallArguments(0, '{"ci'),
    ]
    assert parser.push('ty": "Pa') == [CallArguments(0, 'ty": "Pa')]
    assert parser.push('ris"}') == [CallArguments(0, 'ris"}')]
    assert parser.push("}\n</tool_call>") == [CallEnd(0)]
    assert parser.finish() == []


def test_a_call_that_breaks_in_a_stream_goes_on_as_content() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": oh no</tool_call>'
    parser = make("hermes")
    start, arguments, broken, rest = [*parser.push(text), *parser.finish()]
    assert (start, arguments) == (CallStart(0, "id0", "now"), CallArguments(0, '{"a": oh'))
    assert isinstance(broken, CallBroken) and isinstance(rest, Content)
    assert broken.source + rest.text == text
    assert rest.text == " no</tool_call>"


def test_text_that_may_begin_a_marker_waits() -> None:
    parser = make("hermes")
    assert parser.push("a <tool") == [Content("a")]
    assert parser.push("box>") == [Content(" <toolbox>")]
    assert parser.push(" <") == []
    assert parser.finish() == [Content(" <")]


def test_the_next_call_after_a_broken_one_counts_on() -> None:
    text = (
        '<tool_call>{"name": "now", "arguments": {"a"}}</tool_call>'
        + '<tool_call>{"name": "now"}</tool_call>'
    )
    starts = [piece for piece in pieces(make("hermes"), text) if isinstance(piece, CallStart)]
    assert [start.index for start in starts] == [0, 1]
    assert calls(read("hermes", text)) == [("now", {})]


def test_raw_line_breaks_in_strings_are_escaped() -> None:
    message = read("hermes", '<tool_call>{"name": "now", "arguments": {"code": "a\n\tb"}}</tool_call>')
    assert calls(message) == [("now", {"code": "a\n\tb"})]


CALL = '<tool_call>{"name": "now"}</tool_call>'


@pytest.mark.parametrize("size", [0, 1])
def test_more_calls_than_allowed_are_content(size: int) -> None:
    message = read("hermes", CALL * 4, size, max_calls=2)
    assert len(message.calls) == 2
    assert message.content == CALL * 2


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", CALL + "\n" + CALL + " bye"),
        ("llama3_json", '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}'),
        ("pythonic", "[now(), now()]"),
        ("mistral", '[TOOL_CALLS] [{"name": "now"}, {"name": "now"}]'),
        ("mistral", "[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}"),
    ],
)
def test_one_call_where_parallel_calls_are_not_wanted(name: str, text: str, size: int) -> None:
    message = read(name, text, size, parallel=False)
    assert calls(message) == [("now", {})] and message.content == ""


@pytest.mark.parametrize("size", [0, 1, 64])
def test_a_call_that_is_too_long_is_content(size: int) -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": "' + "x" * 500 + '"}}</tool_call> after'
    parser = make("hermes", max_call_chars=100)
    made = pieces(parser, text, size)
    assert Message.of(made) == Message(text)
    (broken,) = [piece for piece in made if isinstance(piece, CallBroken)]
    assert len(broken.source) == 100 + len("<tool_call>")


def test_ids() -> None:
    for name, text in (("hermes", CALL), ("mistral", "[TOOL_CALLS]now{}")):
        parser = TOOL_FORMATS[name](CallOptions())
        (start,) = [piece for piece in parser.push(text) if isinstance(piece, CallStart)]
        assert (
            start.id.isalnum() and len(start.id) == 9 if name == "mistral" else start.id.startswith("call_")
        )
    given = read("mistral", "[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}")
    assert given.calls[0].id == "a1b2c3d4e"
