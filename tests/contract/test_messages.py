"""/v1/messages: Anthropic's shapes, and the official `anthropic` client against a real server on a socket.

There is no public description of that API to validate against: its own client's models are, strictly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter

from engine.types import SamplingParams
from server.schema.messages import MessagesRequest
from server.settings import ServerSettings
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import HELLO, Live, described, in_process, live
from tests.helpers.tool_template import HERMES, THINKING, ToolTemplate

pytestmark = pytest.mark.anyio

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
BODY: dict[str, Any] = {"model": "quire-demo", "max_tokens": 64, "messages": HELLO}
WEATHER = {
    "name": "weather",
    "description": "Says it.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def says(text: str) -> FakeClient:
    return FakeClient(lambda ids, params, index: text)


def tools_and_thoughts() -> ToolTemplate:
    return ToolTemplate(HERMES + THINKING)


def events(text: str) -> list[Any]:
    """The events of a stream; their names are their types."""
    found = []
    for frame in text.split("\n\n"):
        if frame:
            name, data = frame.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            found.append(event)
    return found


def check_event(event: Any) -> None:
    if event["type"] not in ("ping", "error"):
        EVENT.validate_python(event)


def joined(stream: list[Any]) -> list[Any]:
    """The blocks of a stream, put together as a client does."""
    blocks: list[Any] = []
    is_open = False
    for event in stream:
        match event["type"]:
            case "content_block_start":
                assert not is_open and event["index"] == len(blocks)
                is_open = True
                blocks.append({**event["content_block"], "json": ""})
            case "content_block_delta":
                assert is_open and event["index"] == len(blocks) - 1
                for kind in ("text", "thinking"):
                    if event["delta"]["type"] == f"{kind}_delta":
                        blocks[-1][kind] += event["delta"][kind]
                if event["delta"]["type"] == "input_json_delta":
                    blocks[-1]["json"] += event["delta"]["partial_json"]
            case "content_block_stop":
                assert is_open and event["index"] == len(blocks) - 1
                is_open = False
    assert not is_open
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
    return blocks


@pytest.mark.parametrize(
    ("text", "kinds", "reason"),
    [
        ("Hello there", ["text"], "end_turn"),
        ("<think>\nhm\n</think>\n\nWörld", ["thinking", "text"], "end_turn"),
        (CALL, ["tool_use"], "tool_use"),
        (f"<think>hm</think>Let me see. {CALL}\n{CALL}", ["thinking", "text", *["tool_use"] * 2], "tool_use"),
        ("", [], "end_turn"),
        ("x" * 100, ["text"], "max_tokens"),
        ("One STOP two", ["text"], "stop_sequence"),
    ],
)
async def test_a_reply_and_its_stream(text: str, kinds: list[str], reason: str) -> None:
    body = {**BODY, "max_tokens": 90, "tools": [WEATHER], "stop_sequences": ["STOP"]}
    if len(kinds) > 3:
        body["max_tokens"] = 500
    async with in_process(says(text), template=tools_and_thoughts()) as (http, _):
        whole = (await http.post(MESSAGES, json=body)).json()
        stream = events((await http.post(MESSAGES, json={**body, "stream": True})).text)
    Message.model_validate(whole, strict=True)
    for event in stream:
        check_event(event)
    assert [block["type"] for block in whole["content"]] == kinds
    assert whole["stop_reason"] == reason
    assert whole["stop_sequence"] == ("STOP" if reason == "stop_sequence" else None)

    start, *_, delta, stop = stream
    assert (start["type"], delta["type"], stop) == (
        "message_start",
        "message_delta",
        {"type": "message_stop"},
    )
    assert start["message"]["content"] == [] and start["message"]["stop_reason"] is None
    assert delta["delta"] == {"stop_reason": reason, "stop_sequence": whole["stop_sequence"]}
    assert delta["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    assert _no_ids(joined(stream)) == _no_ids(whole["content"])


def _no_ids(blocks: list[Any]) -> list[Any]:
    return [{key: value for key, value in block.items() if key != "id"} for block in blocks]


async def test_a_call_that_breaks_ends_its_block() -> None:
    broken = '<tool_call>{"name": "weather", "arguments": {"city": "K'
    body = {**BODY, "max_tokens": 500, "tools": [WEATHER]}
    async with in_process(says(broken), template=ToolTemplate()) as (http, _):
        whole = (await http.post(MESSAGES, json=body)).json()
        stream = events((await http.post(MESSAGES, json={**body, "stream": True})).text)
    assert whole["content"] == [{"type": "text", "text": broken}]
    assert whole["stop_reason"] == "end_turn"
    names = [event["type"] for event in stream]
    assert names.count("content_block_start") == names.count("content_block_stop") == 1
    assert stream[-2]["delta"]["stop_reason"] == "end_turn"


async def test_a_turn_that_the_caller_has_begun() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Once upon"}]
    async with in_process(says(" a time")) as (http, engine):
        reply = (await http.post(MESSAGES, json={**BODY, "messages": messages})).json()
        counted = (await http.post(COUNT, json={"messages": messages})).json()
    assert reply["content"] == [{"type": "text", "text": " a time"}]
    ids = engine.submitted[-1][1]
    assert bytes(ids[-9:]) == b"Once upon" and counted["input_tokens"] == len(ids)


async def test_usage_counts_what_was_reused_apart() -> None:
    body = {**BODY, "messages": [{"role": "user", "content": "x" * 100}]}
    async with in_process() as (http, _):
        first = (await http.post(MESSAGES, json=body)).json()["usage"]
        second = (await http.post(MESSAGES, json=body)).json()["usage"]
        counted = (await http.post(COUNT, json={"messages": body["messages"]})).json()
        stream = events((await http.post(MESSAGES, json={**body, "stream": True})).text)
    MessageTokensCount.model_validate(counted, strict=True)
    total = counted["input_tokens"]
    assert (first["input_tokens"], first["cache_read_input_tokens"]) == (total, 0)
    assert (second["input_tokens"], second["cache_read_input_tokens"]) == (total - 96, 96)
    begun, ended = stream[0]["message"]["usage"], stream[-2]["usage"]
    assert (begun["input_tokens"], begun["cache_read_input_tokens"]) == (total, 0), "not looked up yet"
    assert (ended["input_tokens"], ended["cache_read_input_tokens"]) == (total - 96, 96)


async def test_what_the_model_is_told() -> None:
    template = tools_and_thoughts()
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I ask."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True},
                {"type": "text", "text": "And?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    body = {
        **BODY,
        "system": [{"type": "text", "text": "Be brief."}],
        "messages": messages,
        "tools": [WEATHER],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
    }
    async with in_process(template=template) as (http, _):
        assert (await http.post(MESSAGES, json=body)).status_code == 200
    said, variables = template.seen
    assert said == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "I ask.",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": {"city": "Köln"}},
                }
            ],
        },
        {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "t1"},
        {"role": "tool", "content": "", "name": "weather", "tool_call_id": "t1"},
        {"role": "user", "content": "And?"},
    ]
    assert variables["enable_thinking"] is True
    (tool,) = variables["tools"]
    assert tool["function"]["parameters"] == WEATHER["input_schema"]


@pytest.mark.parametrize(
    ("extra", "variables"),
    [
        ({}, {}),
        ({"thinking": {"type": "adaptive"}}, {}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"output_config": {"effort": "high"}}, {"enable_thinking": True}),
        ({"tool_choice": {"type": "none"}, "tools": [WEATHER]}, {}),
    ],
)
async def test_variables_of_the_template(extra: dict[str, Any], variables: dict[str, Any]) -> None:
    template = tools_and_thoughts()
    async with in_process(template=template) as (http, _):
        assert (await http.post(MESSAGES, json={**BODY, **extra})).status_code == 200
    assert template.seen[1] == variables


async def test_sampling() -> None:
    body = {**BODY, "temperature": 0, "top_p": 0.5, "top_k": 7, "stop_sequences": ["a", "b"]}
    async with in_process() as (http, engine):
        await http.post(MESSAGES, json=body)
    assert engine.submitted[-1][2] == SamplingParams(
        temperature=0, top_p=0.5, top_k=7, stop=("a", "b"), max_tokens=64
    )


async def test_the_cache_explains_itself_here_too() -> None:
    body = {**BODY, "explain_cache": True}
    async with in_process() as (http, _):
        whole = (await http.post(MESSAGES, json=body)).json()
        stream = events((await http.post(MESSAGES, json={**body, "stream": True})).text)
    assert whole["cache"][0]["prompt_tokens"] == whole["usage"]["input_tokens"]
    assert [at for at, event in enumerate(stream) if "cache" in event] == [1]
    assert stream[1]["cache"][0]["prompt_tokens"] == whole["usage"]["input_tokens"]


async def test_null_is_the_default_everywhere() -> None:
    nulls = dict.fromkeys((*MessagesRequest.model_fields, *MessagesRequest.refused))
    async with in_process(settings=ServerSettings(strict=True)) as (http, engine):
        reply = await http.post(MESSAGES, json={**nulls, **BODY})
        assert reply.status_code == 200, reply.text
        await http.post(MESSAGES, json=BODY)
    assert engine.submitted[-1][2] == engine.submitted[-2][2]


async def test_replies_match_our_own_description() -> None:
    body = {**BODY, "system": "s", "tools": [WEATHER], "explain_cache": True}
    engine = says(f"<think>hm</think>x {CALL}")
    async with in_process(engine, template=tools_and_thoughts()) as (http, _):
        paths = (document := (await http.get("/openapi.json")).json())["paths"]
        answers = {
            MESSAGES: {200: await http.post(MESSAGES, json=body), 400: await http.post(MESSAGES, json={})},
            COUNT: {200: await http.post(COUNT, json=body), 400: await http.post(COUNT, json={})},
        }
    for path, replies in answers.items():
        operation = paths[path]["post"]
        described(document, operation["requestBody"]["content"]["application/json"]["schema"], body)
        for status, reply in replies.items():
            assert reply.status_code == status
            content = operation["responses"][str(status)]["content"]
            described(document, content["application/json"]["schema"], reply.json())


async def test_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    async with in_process() as (http, engine):
        assert (await http.post(MESSAGES, json={**BODY, "output_config": wanted})).status_code == 200
    grammar = engine.submitted[-1][2].grammar
    assert grammar is not None and json.loads(grammar.text) == schema


async def test_ignored_fields_are_named() -> None:
    async with in_process(settings=ServerSettings(strict=True)) as (http, _):
        assert (await http.post(MESSAGES, json=BODY)).status_code == 200
        for path in (MESSAGES, COUNT):
            refused = await http.post(path, json={**BODY, "inference_geo": "eu"})
            assert refused.status_code == 400 and "inference_geo" in refused.json()["error"]["message"]
    async with in_process() as (http, _):
        reply = await http.post(MESSAGES, json={**BODY, "inference_geo": "eu", "metadata": {"user_id": "u"}})
        metrics = (await http.get("/metrics")).text
    assert reply.headers["x-quire-warnings"] == "ignored fields: inference_geo"
    assert 'quire_unknown_request_fields_total{api="messages"} 1.0' in metrics
    assert 'quire_requests_total{api="messages",outcome="ok"} 1.0' in metrics


TURN = {"role": "user", "content": "x"}
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "no max_tokens": ({"max_tokens": None}, 400, "max_tokens"),
    "max_tokens 0": ({"max_tokens": 0}, 400, "max_tokens"),
    "max_tokens true": ({"max_tokens": True}, 400, "max_tokens"),
    "unknown model": ({"model": "claude"}, 404, "'claude'"),
    "no messages": ({"messages": []}, 400, "messages"),
    "role system": ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages[0].role"),
    "content number": ({"messages": [{"role": "user", "content": 3}]}, 400, "messages[0].content"),
    "no content": ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        400,
        "messages[0].content[0].type",
    ),
    "text without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        400,
        "messages[0].content[0].text",
    ),
    "call of a user": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}
            ]
        },
        400,
        "messages[0].content[0].type",
    ),
    "result without a call": (
        {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
        400,
        "messages[0].content[0].tool_use_id",
    ),
    "calls that nobody answered": (
        {
            "messages": [
                TURN,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}],
                },
            ]
        },
        400,
        "messages: the last message has no text to go on from",
    ),
    "too many turns": ({"messages": [TURN] * 2049}, 400, "messages"),
    "system number": ({"system": 3}, 400, "system: must be a string or a list of blocks"),
    "temperature": ({"temperature": 3}, 400, "temperature"),
    "top_p": ({"top_p": 0}, 400, "top_p"),
    "top_k": ({"top_k": -2}, 400, "top_k"),
    "stop_sequences text": ({"stop_sequences": "x"}, 400, "stop_sequences"),
    "stop_sequences empty": ({"stop_sequences": [""]}, 400, "stop_sequences[0]"),
    "stop_sequences many": ({"stop_sequences": ["x"] * 17}, 400, "stop_sequences"),
    "tools without a schema": ({"tools": [{"name": "f"}]}, 400, "tools[0].input_schema"),
    "a tool of their servers": (
        {"tools": [{"type": "bash_20250124", "name": "bash"}]},
        400,
        "tools[0].type",
    ),
    "two tools of a name": ({"tools": [WEATHER, WEATHER]}, 400, "tools[1].name:"),
    "a template without tools": ({"tools": [WEATHER]}, 400, "tools"),
    "tool_choice text": ({"tool_choice": "auto"}, 400, "tool_choice"),
    "tool_choice any without tools": ({"tool_choice": {"type": "any"}}, 400, "tool_choice"),
    "tool without a name": ({"tool_choice": {"type": "tool"}}, 400, "tool_choice.name"),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "thinking"),
    "thinking true": ({"thinking": True}, 400, "thinking"),
    "effort": ({"output_config": {"effort": "high"}}, 400, "output_config.effort"),
    "format": ({"output_config": {"format": {"type": "xml"}}}, 400, "output_config.format"),
    "mcp": ({"mcp_servers": [{"url": "https://example.com"}]}, 400, "mcp_servers"),
    "container": ({"container": "c"}, 400, "container"),
    "cache_salt": ({"cache_salt": ""}, 400, "cache_salt"),
    "priority": ({"priority": "high"}, 400, "priority"),
    "stream": ({"stream": "yes"}, 400, "stream"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
async def test_bad_requests(name: str, stream: bool) -> None:
    fields, status, word = BAD[name]
    async with in_process() as (http, engine):
        reply = await http.post(MESSAGES, json={**BODY, "stream": stream, **fields})
        assert (await http.post(MESSAGES, json=BODY)).status_code == 200
    assert reply.status_code == status, reply.text
    error = reply.json()
    assert set(error) == {"type", "error"} and error["type"] == "error"
    assert error["error"]["type"] == ("invalid_request_error" if status == 400 else "not_found_error")
    assert word in error["error"]["message"]
    assert len(engine.submitted) == 1


async def test_priority_reaches_the_engine() -> None:
    async with in_process() as (http, engine):
        assert (await http.post(MESSAGES, json={**BODY, "priority": -5})).status_code == 200
    assert engine.submitted[0][2].priority == -5


@pytest.mark.parametrize("path", [MESSAGES, COUNT])
async def test_errors_of_the_layers_below_have_the_same_shape(path: str) -> None:
    async with in_process(settings=ServerSettings(api_keys=("secret",))) as (http, _):
        no_key = await http.post(path, json=BODY)
        no_json = await http.post(path, content=b"x", headers={"x-api-key": "secret"})
        no_method = await http.get(path, headers={"x-api-key": "secret"})
        elsewhere = await http.get("/v1/models")
    kinds = [reply.json()["error"]["type"] for reply in (no_key, no_json, no_method)]
    assert kinds == ["authentication_error", "invalid_request_error", "invalid_request_error"]
    assert [reply.status_code for reply in (no_key, no_json, no_method)] == [401, 415, 405]
    assert no_key.json()["type"] == "error" and "type" not in elsewhere.json()
    assert int(no_key.headers["content-length"]) == len(no_key.content)


async def test_errors_of_the_engine() -> None:
    busy = FakeClient()
    busy.max_in_flight = 0
    async with in_process(busy) as (http, _):
        reply = await http.post(MESSAGES, json=BODY)
    assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
    assert reply.headers["retry-after"]

    dying = FakeClient()
    dying.die_after = 3
    async with in_process(dying) as (http, _):
        stream = events((await http.post(MESSAGES, json={**BODY, "stream": True})).text)
    assert stream[-1]["type"] == "error" and stream[-1]["error"]["type"] == "overloaded_error"


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    settings = ServerSettings(api_keys=("secret",), sse_keep_alive_s=0.05)
    text = f"<think>hm</think>Wörld. {CALL}"
    with live(settings, lambda: says(text), tools_and_thoughts()) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0) as made:
        yield made


def test_the_client_creates(client: anthropic.Anthropic) -> None:
    message = client.messages.create(
        model="quire-demo", max_tokens=500, messages=HELLO, tools=[WEATHER], system="Be brief."
    )
    thought, text, call = message.content
    assert (thought.thinking, text.text, call.input) == ("hm", "Wörld.", {"city": "Köln"})
    assert message.stop_reason == "tool_use" and message.usage.output_tokens > 0


def test_the_client_streams_over_pings(server: Live, client: anthropic.Anthropic) -> None:
    server.call(server.engine.gate.clear)
    server.loop.call_soon_threadsafe(server.loop.call_later, 0.3, server.engine.gate.set)
    with client.messages.stream(
        model="quire-demo", max_tokens=500, messages=HELLO, tools=[WEATHER]
    ) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "Wörld."
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[2].input == {"city": "Köln"}
    assert message.stop_reason == "tool_use"


def test_the_client_counts_tokens(client: anthropic.Anthropic) -> None:
    assert client.messages.count_tokens(model="quire-demo", messages=HELLO).input_tokens > 5


def test_the_client_finds_the_id_of_the_request(client: anthropic.Anthropic) -> None:
    raw = client.messages.with_raw_response.create(model="quire-demo", max_tokens=5, messages=HELLO)
    assert raw.headers["request-id"] == raw.headers["x-request-id"] == raw.parse()._request_id
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.messages.create(model="claude", max_tokens=5, messages=HELLO)
    assert caught.value.request_id == caught.value.response.headers["x-request-id"]


def test_the_client_raises(server: Live, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(model="claude", max_tokens=5, messages=HELLO)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(model="quire-demo", max_tokens=0, messages=HELLO)
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as other,
        pytest.raises(anthropic.AuthenticationError),
    ):
        other.messages.create(model="quire-demo", max_tokens=5, messages=HELLO)


def test_the_client_with_a_bearer_token(server: Live) -> None:
    with anthropic.Anthropic(base_url=server.url, auth_token="secret", max_retries=0) as client:
        assert client.messages.create(model="quire-demo", max_tokens=5, messages=HELLO).content
