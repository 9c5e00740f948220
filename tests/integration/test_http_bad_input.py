"""Bad requests, one row each, to both APIs, streamed and not: right status, right shape, no harm done.

After every row the same greedy request must give the very same reply as before: one bad request never
touches another.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.contract.openai_schema import check
from tests.helpers.fake_client import INFO, VOCAB_SIZE, FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, in_process

pytestmark = pytest.mark.anyio

GOLDEN = {"prompt": "golden", "temperature": 0, "max_tokens": 24, "logprobs": 2}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class Server:
    http: httpx.AsyncClient
    engine: FakeClient
    golden: Any = None

    async def answer_golden(self) -> Any:
        reply = (await self.http.post(COMPLETIONS, json=GOLDEN)).json()
        return reply["choices"], reply["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
async def server(anyio_backend: str) -> AsyncIterator[Server]:
    async with in_process() as (http, engine):
        made = Server(http, engine)
        await made.answer_golden()
        made.golden = await made.answer_golden()
        yield made


@dataclass(frozen=True)
class Row:
    """One bad request.

    Attributes:
        fields: put into an otherwise good body.
        param: the field the error names; None where it names none.
        only: the API it concerns; both if None.
    """

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    param: str | None = None
    status: int = 400
    code: str | None = None
    only: str | None = None


NESTED: Any = {}
for _ in range(200):
    NESTED = {"a": NESTED}


def wide_schema(properties: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(properties)}}


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

ROWS = [
    Row("unknown model", {"model": "../../etc/passwd"}, "model", 404, "model_not_found"),
    Row("huge model name", {"model": "m" * 1_000_000}, "model", 404, "model_not_found"),
    Row("model not a string", {"model": 3}, "model"),
    *(Row(f"n {value!r}", {"n": value}, "n") for value in (0, -1, 1_000_001, "3", True, 3.0, [1], {})),
    *(Row(f"temperature {value}", {"temperature": value}, "temperature") for value in (-1, 1e9, "0", True)),
    *(Row(f"top_p {value}", {"top_p": value}, "top_p") for value in (0, 2, -1, "1")),
    *(Row(f"top_k {value}", {"top_k": value}, "top_k") for value in (-5, 2**40, 1.5)),
    *(Row(f"min_p {value}", {"min_p": value}, "min_p") for value in (-0.1, 2)),
    *(
        Row(f"{name} {value}", {name: value}, name)
        for name in ("presence_penalty", "frequency_penalty")
        for value in (1e6, -1e6, "1")
    ),
    *(Row(f"repetition_penalty {v}", {"repetition_penalty": v}, "repetition_penalty") for v in (0, -1, 1e6)),
    *(Row(f"seed {str(v)[:6]}", {"seed": v}, "seed") for v in (10**100, 2**63, "1", 1.5)),
    *(Row(f"max_tokens {value}", {"max_tokens": value}, "max_tokens") for value in (-1, 2**63, "5", 1.0)),
    Row("min above max", {"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    Row("min_tokens -1", {"min_tokens": -1}, "min_tokens"),
    Row("stop: 40 000 strings", {"stop": ["x"] * 40_000}, "stop"),
    Row("stop: 200 000 strings", {"stop": ["x"] * 200_000}, None, 413),
    Row("stop: 500 000 strings", {"stop": ["x"] * 500_000}, None, 413),
    Row("metadata: 20 000 pairs", {"metadata": {str(k): "" for k in range(20_000)}}, "metadata", only=CHAT),
    Row("metadata: 200 000 pairs", {"metadata": {str(k): "" for k in range(200_000)}}, None, 413),
    Row("2 000 unknown fields", {f"field{number}": 1 for number in range(2000)}, None, code="invalid_json"),
    Row("stop: 17 strings", {"stop": ["x"] * 17}, "stop"),
    Row("stop: 1 MB string", {"stop": "x" * 1_000_000}, "stop"),
    Row("stop: empty string", {"stop": ""}, "stop"),
    Row("stop: number", {"stop": [3]}, "stop"),
    Row("stop_token_ids: 200 000", {"stop_token_ids": [1] * 200_000}, "stop_token_ids"),
    Row("stop_token_ids: a million", {"stop_token_ids": [1] * 1_000_000}, None, 413),
    Row("stop_token_ids: out of vocabulary", {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    Row("stop_token_ids: negative", {"stop_token_ids": [-1]}, "stop_token_ids"),
    Row("logit_bias: key abc", {"logit_bias": {"abc": 1}}, "logit_bias"),
    Row("logit_bias: key -1", {"logit_bias": {"-1": 1}}, "logit_bias"),
    Row("logit_bias: other digits", {"logit_bias": {"٣": 1}}, "logit_bias"),
    Row("logit_bias: out of vocabulary", {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    Row("logit_bias: 1e9", {"logit_bias": {"5": 1e9}}, "logit_bias"),
    Row("logit_bias: true", {"logit_bias": {"5": True}}, "logit_bias"),
    Row("logit_bias: 40 000 keys", {"logit_bias": {str(k): 1 for k in range(40_000)}}, "logit_bias"),
    Row("logit_bias: 245 000 keys", {"logit_bias": {str(k): 1 for k in range(245_000)}}, None, 413),
    Row("logit_bias: list", {"logit_bias": [1]}, "logit_bias"),
    *(
        Row(f"{name} {value!r}", {name: value}, name)
        for name, values in {
            "truncate_prompt_tokens": (0, -2, INFO.max_model_len + 1, 2**40, "3", True, [3]),
            "prompt_logprobs": (-1, 21, "1", True, 1.5),
            "return_token_ids": (1, "yes", []),
            "allowed_token_ids": ([], [VOCAB_SIZE], [-1], [1] * 20_000, "1", {}),
            "bad_words": ("x", ["x"] * 65, ["x" * 40], {}),
            "priority": (2**31, -(2**31) - 1, "0", True, 0.5),
        }.items()
        for value in values
    ),
    *(Row(f"bad_words {v!r:.9}", {"bad_words": v}, "bad_words[0]") for v in ([""], [3], ["x" * 65])),
    Row("stream: text", {"stream": "yes"}, "stream"),
    Row("stream_options: number", {"stream_options": 1}, "stream_options"),
    Row("include_usage: 1", {"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    Row("user: number", {"user": 3}, "user"),
    *(Row(f"cache_salt {str(v)[:9]!r}", {"cache_salt": v}, "cache_salt") for v in ("", "s" * 257, 3, ["s"])),
    *(Row(f"explain_cache {v!r}", {"explain_cache": v}, "explain_cache") for v in (1, "true", [], {})),
    Row("deep metadata", {"metadata": NESTED}, "metadata", code="invalid_json"),
    Row("deep unknown field", {"whatever": NESTED}, "whatever", code="invalid_json"),
    *(
        Row(f"refused: {name}", {name: value}, name, code="unsupported_parameter")
        for name, value in {
            "guided_json": {"type": "object"},
            "guided_regex": "a",
            "guided_choice": ["a"],
            "guided_grammar": 'start: "a"',
            "ebnf": 'root ::= "a"',
            "json_schema": {},
            "prompt_embeds": "gASV",
            "chat_template": "{{ 1 }}",
            "use_beam_search": True,
            "kv_transfer_params": {"tp_size": 2},
        }.items()
    ),
    *(
        Row(f"response_format {str(value)[:60]}", {"response_format": value}, param)
        for value, param in (
            ("json", "response_format"),
            ({}, "response_format.type"),
            ({"type": "yaml"}, "response_format.type"),
            ({"type": "json_schema"}, "response_format.json_schema"),
            ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.name"),
            ({"type": "json_schema", "json_schema": {"name": "a"}}, "response_format.json_schema.schema"),
            (
                {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
                "response_format.json_schema.name",
            ),
            (
                {"type": "json_schema", "json_schema": {"name": "a", "schema": []}},
                "response_format.json_schema.schema",
            ),
            (
                {"type": "json_schema", "json_schema": {"name": "a", "schema": wide_schema(2000)}},
                "response_format",
            ),
            ({"type": "structural_tag"}, "response_format.structures"),
            ({"type": "json_object", "schema": {}}, "response_format.schema"),
        )
    ),
    *(
        Row(f"structured_outputs {str(value)[:60]}", {"structured_outputs": value}, param)
        for value, param in (
            ("json", "structured_outputs"),
            ({}, "structured_outputs"),
            ({"jsn": {}}, "structured_outputs.jsn"),
            ({"regex": "a", "choice": ["a"]}, "structured_outputs"),
            ({"regex": 3}, "structured_outputs.regex"),
            ({"regex": "(("}, "structured_outputs"),
            ({"regex": "a" * 100_000}, "structured_outputs"),
            ({"regex": ""}, "structured_outputs"),
            ({"json": "{"}, "structured_outputs"),
            ({"json": 3}, "structured_outputs.json"),
            ({"choice": []}, "structured_outputs"),
            ({"choice": [""]}, "structured_outputs"),
            ({"choice": ["a"] * 5000}, "structured_outputs"),
            ({"choice": [1]}, "structured_outputs.choice[0]"),
            ({"grammar": "a" * 100_000}, "structured_outputs"),
            ({"structural_tag": 3}, "structured_outputs.structural_tag"),
        )
    ),
    Row(
        "two formats",
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    # completions
    *(
        Row(f"prompt {str(value)[:20]!r}", {"prompt": value}, "prompt", only=COMPLETIONS)
        for value in (
            "",
            [],
            [[]],
            None,
            3,
            True,
            {},
            [""],
            [1, "a"],
            [1, True],
            [1, 1.5],
            [[1], 2],
            ["a", 1],
        )
    ),
    *(
        Row(f"token id {value}", {"prompt": [1, value]}, "prompt", only=COMPLETIONS)
        for value in (-1, VOCAB_SIZE, 2**40, 10**30)
    ),
    Row("more ids than the context", {"prompt": [1] * (INFO.max_model_len + 1)}, "prompt", only=COMPLETIONS),
    Row("40 000 prompts", {"prompt": ["a"] * 40_000}, "prompt", only=COMPLETIONS),
    Row("prompts times n", {"prompt": ["a"] * 100, "n": 2}, "n", only=COMPLETIONS),
    Row("max_tokens 0", {"max_tokens": 0}, "max_tokens", only=COMPLETIONS),
    *(
        Row(f"logprobs {v}", {"logprobs": v}, "logprobs", only=COMPLETIONS)
        for v in (21, 10**6, -1, True, "1")
    ),
    Row("best_of", {"best_of": 3}, "best_of", only=COMPLETIONS),
    Row("suffix", {"suffix": "x"}, "suffix", only=COMPLETIONS, code="unsupported_parameter"),
    Row("echo: text", {"echo": "yes"}, "echo", only=COMPLETIONS),
    Row(
        "longer than the context",
        {"prompt": "x" * INFO.max_model_len},
        "max_tokens",
        only=COMPLETIONS,
        code="context_length_exceeded",
    ),
    Row(
        "far longer than the context",
        {"prompt": "x" * (40 * INFO.max_model_len)},
        "prompt",
        only=COMPLETIONS,
        code="context_length_exceeded",
    ),
    Row(
        "never fits the pool",
        {"prompt": "x" * (INFO.largest_request_tokens + 1)},
        only=COMPLETIONS,
        code="request_too_large",
    ),
    # chat
    *(
        Row(f"messages {value!r}", {"messages": value}, "messages", only=CHAT)
        for value in ([], None, "hi", {}, [{"role": "user", "content": "x"}] * 3000)
    ),
    Row("message not an object", {"messages": [3]}, "messages[0]", only=CHAT),
    *(
        Row(f"message {message}", {"messages": [message]}, param, only=CHAT)
        for message, param in (
            ({"role": "wizard", "content": "x"}, "messages[0].role"),
            ({"content": "x"}, "messages[0].role"),
            ({"role": "user"}, "messages[0].content"),
            ({"role": "user", "content": None}, "messages[0].content"),
            ({"role": "user", "content": 3}, "messages[0].content"),
            ({"role": "user", "content": []}, "messages[0].content"),
            ({"role": "user", "content": [3]}, "messages[0].content"),
            ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content"),
            (
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                },
                "messages[0].content",
            ),
            (
                {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
                "messages[0].content",
            ),
            ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls[0].function"),
            ({"role": "assistant", "tool_calls": {}}, "messages[0].tool_calls"),
            (
                {"role": "assistant", "tool_calls": [{"id": "", "function": {"name": "f", "arguments": ""}}]},
                "messages[0].tool_calls[0].id",
            ),
            (
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}],
                },
                "messages[0].tool_calls[0].function.arguments",
            ),
            (
                {"role": "user", "content": "x", "tool_calls": [CALL]},
                "messages[0].tool_calls",
            ),
            ({"role": "assistant", "tool_calls": [CALL] * 129}, "messages[0].tool_calls"),
            ({"role": "assistant", "function_call": {"name": "f"}}, "messages[0].function_call"),
            ({"role": "tool", "content": "4"}, "messages[0].tool_call_id"),
            ({"role": "tool", "tool_call_id": "x"}, "messages[0].content"),
        )
    ),
    Row("logprobs: number", {"logprobs": 1}, "logprobs", only=CHAT),
    *(
        Row(f"top_logprobs {value}", {"logprobs": True, "top_logprobs": value}, "top_logprobs", only=CHAT)
        for value in (21, 10**6, -1, True, "5")
    ),
    Row("top_logprobs alone", {"top_logprobs": 3}, "top_logprobs", only=CHAT),
    Row("max_tokens 0", {"max_tokens": 0}, "max_tokens", only=CHAT),
    Row("two limits", {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", only=CHAT),
    Row("metadata: numbers", {"metadata": {"a": 1}}, "metadata.a", only=CHAT),
    *(
        Row(f"template kwargs {kwargs}", {"chat_template_kwargs": kwargs}, "chat_template_kwargs", only=CHAT)
        for kwargs in (
            {"tokenize": True},
            {"tools": []},
            {"messages": []},
            {"_x": 1},
            {"a b": 1},
            {"x": "{{ 7 }}"},
            {"x": "<|end|>"},
            {"x": {}},
            {f"k{number}": 1 for number in range(17)},
        )
    ),
    *(
        Row(f"tools {tools}", {"tools": tools}, param, only=CHAT)
        for tools, param in (
            ({}, "tools"),
            ([3], "tools[0]"),
            ([{}], "tools[0].type"),
            ([{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
            ([{"type": "function"}], "tools[0].function"),
            ([{"type": "function", "function": {}}], "tools[0].function.name"),
            ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
            ([{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name"),
            (
                [{"type": "function", "function": {"name": "f", "parameters": []}}],
                "tools[0].function.parameters",
            ),
            ([TOOL] * 129, "tools"),
            ([TOOL] * 2, "tools[1].function.name"),
        )
    ),
    *(
        Row(f"tool_choice {choice}", {"tool_choice": choice}, "tool_choice", only=CHAT)
        for choice in (
            *(
                "any",
                3,
                [],
                {},
                "required",
                {"type": "function"},
                {"type": "function", "function": {"name": 3}},
            ),
            {"type": "function", "function": {"name": "f"}},
            {"type": "custom", "custom": {"name": "f"}},
            {"type": "allowed_tools"},
            {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [TOOL]}},
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}},
        )
    ),
    *(
        Row(f"continue {v!r}", {"continue_final_message": v}, "continue_final_message", only=CHAT)
        for v in (1, "x")
    ),
    Row("parallel_tool_calls: 1", {"parallel_tool_calls": 1}, "parallel_tool_calls", only=CHAT),
    Row("reasoning_effort: hard", {"reasoning_effort": "hard"}, "reasoning_effort", only=CHAT),
    Row("include_reasoning: text", {"include_reasoning": "no"}, "include_reasoning", only=CHAT),
    *(
        Row(f"refused: {name}", {name: value}, name, only=CHAT, code="unsupported_parameter")
        for name, value in {
            "tools": [TOOL],
            "functions": [{"name": "f"}],
            "function_call": {"name": "f"},
            "audio": {"voice": "alloy", "format": "wav"},
            "modalities": ["text", "audio"],
            "web_search_options": {},
            "moderation": {"model": "m"},
            "reasoning_effort": "high",
            "verbosity": "low",
            "service_tier": "flex",
            "documents": [{"text": "x"}],
            "echo": True,
        }.items()
    ),
]

CASES = [
    pytest.param(
        row, path, stream, id=f"{path.rsplit('/', 1)[1]}-{'stream' if stream else 'whole'}-{row.name[:48]}"
    )
    for row in ROWS
    for path in (CHAT, COMPLETIONS)
    for stream in (False, True)
    if row.only in (None, path)
]


def good(path: str) -> dict[str, Any]:
    return {"messages": HELLO} if path == CHAT else {"prompt": "hello"}


@pytest.mark.parametrize(("row", "path", "stream"), CASES)
async def test_fields(server: Server, row: Row, path: str, stream: bool) -> None:
    body = {**good(path), "stream": stream, **row.fields}
    reply = await server.http.post(path, json=body)
    error = refusal(reply, row.status)
    assert error["param"] == row.param, error
    if row.code is not None:
        assert error["code"] == row.code
    await unharmed(server)


def refusal(reply: httpx.Response, status: int) -> Any:
    """The error of a refused request, after checking everything all errors have in common."""
    assert reply.status_code == status, reply.text[:500]
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    check("ErrorResponse", reply.json())
    error = reply.json()["error"]
    assert 0 < len(error["message"]) < 500
    assert not re.search(r"Traceback|/work/|/usr/|site-packages|0x[0-9a-f]{6}", error["message"])
    return error


async def unharmed(server: Server) -> None:
    assert server.engine.in_flight == 0
    assert (await server.http.get("/health")).status_code == 200
    assert await server.answer_golden() == server.golden


JSON = {"content-type": "application/json"}


def body_with(path: str, text: str) -> bytes:
    """A good body with one more field, as raw JSON."""
    return json.dumps(good(path))[:-1].encode() + b', "temperature": ' + text.encode() + b"}"


BODIES = {
    "empty": (b"", None),
    "blank": (b"   ", None),
    "truncated": (b'{"prompt": "x', None),
    "array": (b"[]", None),
    "null": (b"null", None),
    "text": (b'"x"', None),
    "number": (b"3", None),
    "duplicate keys": (b'{"prompt": "a", "prompt": "b"}', None),
    "duplicate keys inside": (b'{"prompt": "a", "x": {"a": 1, "a": 2}}', None),
    "trailing garbage": (b'{"prompt": "a"} x', None),
    "two objects": (b'{"prompt": "a"}{"prompt": "a"}', None),
    "byte order mark": (b'\xef\xbb\xbf{"prompt": "a"}', None),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), None),
    "UTF-16 without mark": ('{"prompt": "a"}'.encode("utf-16-le"), None),
    "bad UTF-8": (b'{"prompt": "\xff"}', None),
    "surrogate bytes": (b'{"prompt": "\xed\xa0\x80"}', None),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', "prompt"),
    "half a pair in stop": (b'{"prompt": "a", "stop": ["\\udfff"]}', "stop"),
    "half a pair in a key": (b'{"prompt": "a", "\\ud800": 1}', None),
    "half a pair in user": (b'{"prompt": "a", "user": "\\uD912x"}', "user"),
    "half a pair in a message": (b'{"messages": [{"role": "user", "content": "\\ude00"}]}', "messages"),
    "100 000 deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    "40 000 deep objects": (b'{"metadata": ' + b'{"a":' * 40_000 + b"1" + b"}" * 40_000 + b"}", None),
    "5 000 digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", None),
    "control character": (b'{"prompt": "a\nb"}', None),
    "comment": (b'{"prompt": "a" /* b */}', None),
    "single quotes": (b"{'prompt': 'a'}", None),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", BODIES)
async def test_bodies(server: Server, path: str, name: str) -> None:
    body, param = BODIES[name]
    error = refusal(await server.http.post(path, content=body, headers=JSON), 400)
    assert (error["param"], error["code"]) == (param, "invalid_json")
    await unharmed(server)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "-1e999"])
async def test_numbers_that_are_none(server: Server, path: str, text: str) -> None:
    error = refusal(await server.http.post(path, content=body_with(path, text), headers=JSON), 400)
    assert error["param"] == "temperature"
    await unharmed(server)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/jsonp"},
        {**JSON, "content-encoding": "gzip"},
        {**JSON, "content-encoding": "br"},
    ],
    ids=str,
)
async def test_other_types_and_encodings(server: Server, headers: dict[str, str]) -> None:
    reply = await server.http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    refusal(reply, 415)
    await unharmed(server)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=UTF-8", "application/x+json"]
)
async def test_json_by_another_name(server: Server, kind: str) -> None:
    reply = await server.http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert reply.status_code == 200


async def test_a_body_over_the_limit_by_its_header(server: Server) -> None:
    headers = {**JSON, "content-length": "99999999999"}
    error = refusal(await server.http.post(COMPLETIONS, content=b"{", headers=headers), 413)
    assert error["code"] == "request_too_large"


async def test_a_body_over_the_limit_without_a_header(server: Server) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" " * (1 << 20)
            assert sent < 64, "read on past the limit"

    refusal(await server.http.post(COMPLETIONS, content=endless(), headers=JSON), 413)
    await unharmed(server)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "localhost/v1/models?"},
        {"host": "a b"},
        {"host": ""},
        {"host": "a@b"},
        {"host": "x:99999999"},
        {"content-length": "-1"},
        {"content-length": "1x"},
        {"content-length": "3", "transfer-encoding": "chunked"},
        {"transfer-encoding": "gzip"},
    ],
    ids=str,
)
async def test_headers(server: Server, headers: dict[str, str]) -> None:
    refusal(await server.http.get("/v1/models", headers=headers), 400)
    await unharmed(server)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "[::1]:8000", "my-host.example.com", "a_b"])
async def test_good_hosts(server: Server, host: str) -> None:
    assert (await server.http.get("/v1/models", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/V1/models", 404),
        ("GET", "/v1/models;x", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/%00", 404),
        ("GET", "/" + "x" * 4000, 404),
        ("OPTIONS", "/v1/models", 405),
        ("HEAD", "/v1/models", 405),
        ("DELETE", "/v1/chat/completions", 405),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/images/generations", 404),
    ],
)
async def test_addresses(server: Server, method: str, path: str, status: int) -> None:
    url = httpx.URL("http://localhost", raw_path=path.encode())
    reply = await server.http.request(method, url, follow_redirects=False)
    assert reply.status_code == status
    assert len(reply.headers.get_list("allow")) == (status == 405)
    if method != "HEAD":
        refusal(reply, status)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_everything_at_once(server: Server, path: str) -> None:
    """All features together in one good request."""
    fields = {
        **good(path),
        "n": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "seed": 2**63 - 1,
        "max_tokens": 20,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "logit_bias": {"5": -100, "6": 3.5},
        "stop": ["zz", "yy"],
        "stop_token_ids": [1, 2],
        "min_tokens": 1,
        "ignore_eos": True,
        "logprobs": True if path == CHAT else 5,
    }
    reply = await server.http.post(path, json=fields)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["choices"]) == 3
    params = server.engine.submitted[-1][2]
    assert (params.n, params.top_k, params.seed, params.stop) == (3, 40, 2**63 - 1, ("zz", "yy"))
    assert params.logit_bias == {5: -100.0, 6: 3.5}
    await unharmed(server)


@pytest.mark.parametrize("text", ["\0", "\u202e" + "abc", "e" + "\u0301" * 1000, "👩‍👩‍👧", "<|end|><|user|>"])
async def test_odd_text_is_served(server: Server, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    assert (await server.http.post(CHAT, json={"messages": messages})).status_code == 200
    ids = server.engine.submitted[-1][1]
    assert ids == [256, *text.encode(), 259, 257], "typed control tokens must stay text"


async def test_null_is_the_default_everywhere(server: Server) -> None:
    from server.schema.chat import ChatRequest
    from server.schema.completions import CompletionRequest

    for path, model in ((CHAT, ChatRequest), (COMPLETIONS, CompletionRequest)):
        nulls = dict.fromkeys((*model.model_fields, *model.refused))
        reply = await server.http.post(path, json={**nulls, **good(path)})
        assert reply.status_code == 200, reply.text
        plain = await server.http.post(path, json=good(path))
        assert server.engine.submitted[-1][2] == server.engine.submitted[-2][2]
        assert plain.status_code == 200
