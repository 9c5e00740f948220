"""/v1/responses: every object and event has its official shape, and the official client understands them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from engine.types import SamplingParams
from server.routes import responses
from server.schema.responses import ResponsesRequest
from server.settings import ServerSettings
from tests.contract.openai_schema import check, request_fields
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import Live, described, in_process, live
from tests.helpers.servers import until
from tests.helpers.tool_template import HERMES, THINKING, ToolTemplate

pytestmark = pytest.mark.anyio

RESPONSES = "/v1/responses"
BODY: dict[str, Any] = {"model": "quire-demo", "input": "hello"}
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def says(*texts: str) -> FakeClient:
    """Each request the next text; the last one again and again."""
    left = list(texts)
    return FakeClient(lambda ids, params, index: left.pop(0) if len(left) > 1 else left[0])


def tools_and_thoughts() -> ToolTemplate:
    return ToolTemplate(HERMES + THINKING)


def events(text: str) -> list[Any]:
    """The events of a stream, checked."""
    found = []
    for frame in text.split("\n\n"):
        if frame:
            name, data = frame.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            check("ResponseStreamEvent", event)
            if "response" in event:
                check("Response", event["response"])
            found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def plain(output: list[Any]) -> list[Any]:
    """Items without what is made up anew each time."""
    return [{key: value for key, value in item.items() if key not in ("id", "call_id")} for item in output]


def followed(stream: list[Any]) -> list[Any]:
    """The items that the events between the first and the last one tell of, with every rule checked."""
    items: list[Any] = []
    texts: list[str] = []
    is_open = False
    for event in stream:
        kind = event["type"].removeprefix("response.")
        if "output_index" in event:
            assert event["output_index"] == len(items) - (kind != "output_item.added")
        if "item_id" in event:
            assert is_open and event["item_id"] == items[-1]["id"]
        match kind:
            case "output_item.added":
                assert not is_open and event["item"]["status"] == "in_progress"
                is_open, texts = True, []
                items.append(event["item"])
            case "output_text.delta" | "reasoning_text.delta" | "function_call_arguments.delta":
                texts.append(event["delta"])
            case "output_text.done" | "reasoning_text.done":
                assert event["text"] == "".join(texts)
            case "function_call_arguments.done":
                assert event["arguments"] == "".join(texts)
            case "content_part.done":
                assert event["part"]["text"] == "".join(texts)
            case "output_item.done":
                assert event["item"]["id"] == items[-1]["id"]
                is_open = False
                items[-1] = event["item"]
    assert not is_open
    return items


@pytest.mark.parametrize(
    ("text", "kinds", "status"),
    [
        ("Hello there", ["message"], "completed"),
        ("<think>\nhm\n</think>\n\nWörld", ["reasoning", "message"], "completed"),
        (CALL, ["function_call"], "completed"),
        (
            f"<think>hm</think>See. {CALL}\n{CALL}",
            ["reasoning", "message", *["function_call"] * 2],
            "completed",
        ),
        ("", [], "completed"),
        ("x" * 300, ["message"], "incomplete"),
        ("<think>" + "x" * 300, ["reasoning"], "incomplete"),
    ],
)
async def test_a_response_and_its_stream(text: str, kinds: list[str], status: str) -> None:
    body = {**BODY, "max_output_tokens": 200, "tools": [WEATHER], "metadata": {"a": "b"}}
    async with in_process(says(text), template=tools_and_thoughts()) as (http, _):
        whole = (await http.post(RESPONSES, json=body)).json()
        stream = events((await http.post(RESPONSES, json={**body, "stream": True})).text)
        kept = (await http.get(f"{RESPONSES}/{whole['id']}")).json()
        kept_stream = (await http.get(f"{RESPONSES}/{stream[0]['response']['id']}")).json()
    check("Response", whole)
    assert kept == whole
    assert [item["type"] for item in whole["output"]] == kinds
    assert whole["status"] == status
    assert whole["incomplete_details"] == (
        {"reason": "max_output_tokens"} if status == "incomplete" else None
    )
    assert [item["status"] for item in whole["output"]][-1:] == [status] * bool(kinds)

    created, in_progress, *between, last = stream
    assert [event["type"] for event in (created, in_progress, last)] == [
        *("response.created", "response.in_progress"),
        f"response.{status}",
    ]
    assert created["response"]["status"] == "in_progress" and "usage" not in created["response"]
    assert kept_stream == last["response"]
    assert followed(between) == last["response"]["output"]
    assert plain(last["response"]["output"]) == plain(whole["output"])
    assert last["response"]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    same = ("object", "model", "metadata", "tools", "temperature", "top_p", "text", "max_output_tokens")
    assert all(created["response"][key] == whole[key] == last["response"][key] for key in same)
    assert len({event["response"]["id"] for event in (created, in_progress, last)}) == 1


async def test_a_call_that_breaks_is_an_item_without_an_end() -> None:
    broken = '<tool_call>{"name": "weather", "arguments": {"city": "K'
    body = {**BODY, "tools": [WEATHER]}
    async with in_process(says(broken), template=ToolTemplate()) as (http, _):
        whole = (await http.post(RESPONSES, json=body)).json()
        stream = events((await http.post(RESPONSES, json={**body, "stream": True})).text)
        going_on = {"input": "and?", "previous_response_id": stream[-1]["response"]["id"]}
        assert (await http.post(RESPONSES, json=going_on)).status_code == 200
    assert whole["output"][0]["content"][0]["text"] == broken
    (item,) = followed(stream)
    assert (item["type"], item["status"]) == ("function_call", "incomplete")
    assert not any(event["type"] == "response.function_call_arguments.done" for event in stream)


async def test_usage() -> None:
    text = "<think>hm</think>yes"
    body = {"input": "x" * 100}
    async with in_process(says(text), template=tools_and_thoughts()) as (http, _):
        first = (await http.post(RESPONSES, json=body)).json()["usage"]
        second = (await http.post(RESPONSES, json=body)).json()["usage"]
    assert first["input_tokens_details"]["cached_tokens"] == 0
    assert second["input_tokens_details"]["cached_tokens"] == 96
    assert second["output_tokens"] == len(text)
    assert second["output_tokens_details"]["reasoning_tokens"] == len("<think>hm</think>")
    assert second["total_tokens"] == second["input_tokens"] + second["output_tokens"]


async def test_a_conversation_goes_on() -> None:
    template = tools_and_thoughts()
    engine = says(f"<think>hm</think>I look. {CALL}", "It rains.", "Yes.")
    async with in_process(engine, template=template) as (http, _):
        first = (
            await http.post(RESPONSES, json={**BODY, "instructions": "Be brief.", "tools": [WEATHER]})
        ).json()
        call = first["output"][-1]
        answer = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
        second_body = {"input": [answer], "previous_response_id": first["id"]}
        second = (await http.post(RESPONSES, json=second_body)).json()
        third_body = {"input": "Really?", "previous_response_id": second["id"], "stream": True}
        third = events((await http.post(RESPONSES, json=third_body)).text)[-1]["response"]
        listed = (await http.get(f"{RESPONSES}/{third['id']}/input_items?order=asc")).json()
    said, _ = template.seen
    function = {"name": "weather", "arguments": {"city": "Köln"}}
    assert said == [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": call["call_id"], "type": "function", "function": function}],
        },
        {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": call["call_id"]},
        {"role": "assistant", "content": "It rains."},
        {"role": "user", "content": "Really?"},
    ]
    assert (second["previous_response_id"], third["previous_response_id"]) == (first["id"], second["id"])
    assert second["instructions"] is None
    check("ResponseItemList", listed)
    assert [item["type"] for item in listed["data"]] == [
        *("message", "reasoning", "message", "function_call", "function_call_output"),
        *("message", "message"),
    ]


async def test_the_same_items_sent_again_make_the_same_prompt() -> None:
    engine = says(f"<think>hm</think>I look. {CALL}", "x")
    async with in_process(engine, template=tools_and_thoughts()) as (http, _):
        first = (await http.post(RESPONSES, json={**BODY, "tools": [WEATHER]})).json()
        chained = {"input": "And?", "previous_response_id": first["id"]}
        whole = {
            "input": [
                {"role": "user", "content": "hello"},
                *first["output"],
                {"role": "user", "content": "And?"},
            ]
        }
        for body in (chained, whole):
            assert (await http.post(RESPONSES, json=body)).status_code == 200
    assert engine.submitted[-1][1] == engine.submitted[-2][1]


async def test_input_items_in_pages() -> None:
    texts = ["a", "b", "c"]
    body = {"input": [{"role": "user", "content": [{"type": "input_text", "text": text}]} for text in texts]}
    async with in_process() as (http, _):
        response = (await http.post(RESPONSES, json=body)).json()
        address = f"{RESPONSES}/{response['id']}/input_items"
        newest = (await http.get(address, params={"limit": 2})).json()
        rest = (await http.get(address, params={"limit": 2, "after": newest["last_id"]})).json()
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=nothing"):
            assert (await http.get(f"{address}?{query}")).status_code == 400
    for page in (newest, rest):
        check("ResponseItemList", page)
    shown = [item["content"][0]["text"] for page in (newest, rest) for item in page["data"]]
    assert shown == ["c", "b", "a"]
    assert (newest["has_more"], rest["has_more"]) == (True, False)


async def test_deleted_and_not_stored() -> None:
    async with in_process() as (http, _):
        kept = (await http.post(RESPONSES, json=BODY)).json()["id"]
        not_kept = [
            (await http.post(RESPONSES, json={**BODY, "store": False})).json()["id"],
            events((await http.post(RESPONSES, json={**BODY, "store": False, "stream": True})).text)[0][
                "response"
            ]["id"],
        ]
        address = f"{RESPONSES}/{kept}"
        assert (await http.post(f"{address}/cancel")).status_code == 400
        assert (await http.get(f"{address}?stream=true")).status_code == 400
        assert (await http.delete(address)).json() == {"id": kept, "object": "response", "deleted": True}
        for gone in (kept, *not_kept, "x" * 5000):
            replies = [
                await http.get(f"{RESPONSES}/{gone}"),
                await http.delete(f"{RESPONSES}/{gone}"),
                await http.post(f"{RESPONSES}/{gone}/cancel"),
                await http.get(f"{RESPONSES}/{gone}/input_items"),
            ]
            for reply in replies:
                assert reply.status_code == 404
                check("ErrorResponse", reply.json())
        refused = await http.post(RESPONSES, json={**BODY, "previous_response_id": kept})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "previous_response_not_found"


async def test_another_tenants_responses_are_not_there() -> None:
    def key(name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {name}"}

    settings = ServerSettings(api_keys=("one", "two"), admin_keys=("root",))
    async with in_process(settings=settings) as (http, _):
        made = (await http.post(RESPONSES, json=BODY, headers=key("one"))).json()["id"]
        address = f"{RESPONSES}/{made}"
        for other in ("two", "root"):
            assert (await http.get(address, headers=key(other))).status_code == 404
            assert (await http.delete(address, headers=key(other))).status_code == 404
            assert (await http.post(f"{address}/cancel", headers=key(other))).status_code == 404
            assert (await http.get(f"{address}/input_items", headers=key(other))).status_code == 404
            body = {**BODY, "previous_response_id": made}
            assert (await http.post(RESPONSES, json=body, headers=key(other))).status_code == 400
        assert (await http.get(address, headers=key("one"))).status_code == 200


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_stream_can_be_ended_from_elsewhere(how: str) -> None:
    with live(make=lambda: says("x" * 100)) as server:
        server.engine.pause_s = 0.02
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
            client.responses.create(**BODY, stream=True) as stream,
        ):
            response_id = next(iter(stream)).response.id
            assert client.responses.retrieve(response_id).status == "in_progress"
            with pytest.raises(openai.BadRequestError, match="still being made"):
                client.responses.create(**BODY, previous_response_id=response_id)
            if how == "cancel":
                assert client.responses.cancel(response_id).status == "cancelled"
            else:
                client.responses.delete(response_id)
            last = list(stream)[-1]
            assert (last.type, last.response.status) == ("response.failed", "cancelled")
            server.until(lambda: server.engine.in_flight == 0)
            if how == "cancel":
                assert client.responses.retrieve(response_id).status == "cancelled"
            else:
                with pytest.raises(openai.NotFoundError):
                    client.responses.retrieve(response_id)


def test_a_caller_who_leaves_cancels() -> None:
    with live(make=lambda: says("x" * 1000)) as server:
        server.engine.pause_s = 0.02
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with client.responses.create(**BODY, stream=True) as stream:
                response_id = next(iter(stream)).response.id
            until(lambda: client.responses.retrieve(response_id).status == "cancelled", 10)
            server.until(lambda: server.engine.in_flight == 0)


@pytest.mark.parametrize("after", [0, 3])
async def test_an_error_inside_a_stream(after: int) -> None:
    engine = FakeClient()
    engine.fail_after = after
    async with in_process(engine) as (http, _):
        stream = events((await http.post(RESPONSES, json={**BODY, "stream": True})).text)
        kept = (await http.get(f"{RESPONSES}/{stream[0]['response']['id']}")).json()
    assert stream[0]["type"] == "response.created" and stream[-1]["type"] == "response.failed"
    failed = stream[-1]["response"]
    assert failed["status"] == "failed" and failed["error"]["code"] == "server_error"
    assert kept == failed


async def test_what_is_asked_of_the_engine() -> None:
    body = {**BODY, "temperature": 0.5, "top_p": 0.25, "max_output_tokens": 7}
    async with in_process() as (http, engine):
        reply = (await http.post(RESPONSES, json=body)).json()
    assert engine.submitted[-1][2] == SamplingParams(temperature=0.5, top_p=0.25, max_tokens=7)
    assert (reply["temperature"], reply["top_p"], reply["max_output_tokens"]) == (0.5, 0.25, 7)


@pytest.mark.parametrize(
    ("extra", "variables"),
    [
        ({"reasoning": {"effort": "none", "summary": "auto"}}, {"enable_thinking": False}),
        ({"reasoning": {"effort": "high"}}, {"enable_thinking": True}),
        ({"tools": [WEATHER], "tool_choice": "none"}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
    ],
)
async def test_variables_of_the_template(extra: dict[str, Any], variables: dict[str, Any]) -> None:
    template = tools_and_thoughts()
    async with in_process(template=template) as (http, _):
        assert (await http.post(RESPONSES, json={**BODY, **extra})).status_code == 200
    assert template.seen[1] == variables


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json_object"),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "json_schema"),
    ],
)
async def test_formats(wanted: dict[str, Any], kind: str | None) -> None:
    async with in_process() as (http, engine):
        reply = (await http.post(RESPONSES, json={**BODY, "text": {"format": wanted}})).json()
    check("Response", reply)
    assert reply["text"]["format"] == wanted
    grammar = engine.submitted[-1][2].grammar
    assert (grammar.kind if grammar else None) == kind
    if kind == "json_schema":
        assert json.loads(grammar.text) == SCHEMA


async def test_a_long_conversation_is_read_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "THREAD_BYTES", 10)
    async with in_process() as (http, engine):
        previous = None
        for _ in range(3):
            body = {"input": "x" * 400, "previous_response_id": previous}
            previous = (await http.post(RESPONSES, json=body)).json()["id"]
    assert len(engine.submitted[-1][1]) > 1200


async def test_replies_match_our_own_description() -> None:
    body = {**BODY, "tools": [WEATHER], "explain_cache": True, "reasoning": {"effort": "low"}}
    engine = says(f"<think>hm</think>x {CALL}")
    async with in_process(engine, template=tools_and_thoughts()) as (http, _):
        document = (await http.get("/openapi.json")).json()
        reply = (await http.post(RESPONSES, json=body)).json()
        address = f"{RESPONSES}/{reply['id']}"
        answers = [
            (RESPONSES, "post", reply),
            (RESPONSES + "/{response_id}", "get", (await http.get(address)).json()),
            (
                RESPONSES + "/{response_id}/input_items",
                "get",
                (await http.get(f"{address}/input_items")).json(),
            ),
            (RESPONSES + "/{response_id}", "delete", (await http.delete(address)).json()),
        ]
    content = document["paths"][RESPONSES]["post"]["requestBody"]["content"]
    described(document, content["application/json"]["schema"], body)
    for path, method, value in answers:
        content = document["paths"][path][method]["responses"]["200"]["content"]
        described(document, content["application/json"]["schema"], value)


async def test_allowed_tools() -> None:
    template = tools_and_thoughts()
    other = {**WEATHER, "name": "other"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    async with in_process(template=template) as (http, _):
        reply = await http.post(RESPONSES, json={**BODY, "tools": [WEATHER, other], "tool_choice": choice})
    check("Response", reply.json())
    assert [tool["function"]["name"] for tool in template.seen[1]["tools"]] == ["weather"]


async def test_the_cache_explains_itself_here_too() -> None:
    body = {**BODY, "explain_cache": True}
    async with in_process() as (http, _):
        whole = (await http.post(RESPONSES, json=body)).json()
        stream = events((await http.post(RESPONSES, json={**body, "stream": True})).text)
    assert whole["cache"][0]["prompt_tokens"] == whole["usage"]["input_tokens"]
    assert [at for at, event in enumerate(stream) if "cache" in event] == [2]
    assert stream[2]["cache"] == [{**whole["cache"][0], **stream[2]["cache"][0]}]


def test_every_official_parameter_is_known() -> None:
    """Honoured, taken on purpose, or refused by name: never dropped without a word."""
    assert request_fields("CreateResponse") <= set(ResponsesRequest.model_fields) | set(
        ResponsesRequest.refused
    )


async def test_null_is_the_default_everywhere() -> None:
    nulls = dict.fromkeys((*ResponsesRequest.model_fields, *ResponsesRequest.refused))
    async with in_process() as (http, engine):
        reply = await http.post(RESPONSES, json={**nulls, **BODY})
        assert reply.status_code == 200, reply.text
        await http.post(RESPONSES, json=BODY)
        assert "x-quire-warnings" not in reply.headers
    assert engine.submitted[-1][2] == engine.submitted[-2][2]


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": []}, "input"),
    "input number": ({"input": 3}, "input"),
    "too many items": ({"input": user("x") * 2049}, "input"),
    "item number": ({"input": [3]}, "input[0]"),
    "item of another type": ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    "reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "role": ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
    "no role": ({"input": [{"content": "x"}]}, "input[0].role"),
    "no content": ({"input": [{"role": "user"}]}, "input[0].content"),
    "content number": ({"input": user(3)}, "input[0].content"),
    "image": ({"input": user([{"type": "input_image", "image_url": "x"}])}, "input[0].content[0].type"),
    "part without text": ({"input": user([{"type": "input_text"}])}, "input[0].content[0].text"),
    "call without a name": (
        {"input": [{"type": "function_call", "call_id": "1", "arguments": "{}"}]},
        "input[0].name",
    ),
    "output without a call": (
        {"input": [{"type": "function_call_output", "output": "x"}]},
        "input[0].call_id",
    ),
    "unknown previous": ({"previous_response_id": "resp_0"}, "previous_response_id"),
    "previous number": ({"previous_response_id": 3}, "previous_response_id"),
    "max_output_tokens 0": ({"max_output_tokens": 0}, "max_output_tokens"),
    "more than the context": ({"max_output_tokens": 10**6}, "max_output_tokens"),
    "temperature": ({"temperature": 3}, "temperature"),
    "top_p": ({"top_p": 0}, "top_p"),
    "instructions": ({"instructions": 3}, "instructions"),
    "store": ({"store": "yes"}, "store"),
    "stream": ({"stream": 1}, "stream"),
    "metadata values": ({"metadata": {"a": 1}}, "metadata.a"),
    "metadata size": ({"metadata": {str(key): "" for key in range(17)}}, "metadata"),
    "web search": ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    "tool without a name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "two tools of a name": ({"tools": [WEATHER] * 2}, "tools[1].name"),
    "a template without tools": ({"tools": [WEATHER]}, "tools"),
    "tool_choice": ({"tool_choice": "any"}, "tool_choice"),
    "tool_choice number": ({"tool_choice": 3}, "tool_choice"),
    "tool_choice without a name": ({"tool_choice": {"type": "function"}}, "tool_choice"),
    "tool_choice of no mode": (
        {"tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "f"}]}},
        "tool_choice",
    ),
    "tool_choice of no tools": ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
    "tool_choice of another kind": ({"tool_choice": {"type": "mcp"}}, "tool_choice"),
    "tool_choice allowed": ({"tool_choice": {"type": "allowed_tools", "tools": [3]}}, "tool_choice"),
    "effort": ({"reasoning": {"effort": "hard"}}, "reasoning.effort"),
    "effort of a model without": ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "format": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "format without a schema": (
        {"text": {"format": {"type": "json_schema", "name": "x"}}},
        "text.format.schema",
    ),
    "include": ({"include": ["message.output_text.logprobs"]}, "include[0]"),
    "background": ({"background": True}, "background"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "p"}}, "prompt"),
    "top_logprobs": ({"top_logprobs": 3}, "top_logprobs"),
    "service_tier": ({"service_tier": "flex"}, "service_tier"),
    "cache_salt": ({"cache_salt": ""}, "cache_salt"),
    "priority": ({"priority": 2**31}, "priority"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
async def test_bad_requests(name: str, stream: bool) -> None:
    fields, param = BAD[name]
    async with in_process() as (http, engine):
        reply = await http.post(RESPONSES, json={**BODY, "stream": stream, **fields})
        assert (await http.post(RESPONSES, json=BODY)).status_code == 200
    assert reply.status_code == 400, reply.text
    check("ErrorResponse", reply.json())
    error = reply.json()["error"]
    assert error["param"] == param and not re.search(r"\.function\b|messages", error["message"]), error
    assert len(engine.submitted) == 1


async def test_priority_reaches_the_engine() -> None:
    async with in_process() as (http, engine):
        assert (await http.post(RESPONSES, json={**BODY, "priority": -5})).status_code == 200
    assert engine.submitted[0][2].priority == -5


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    settings = ServerSettings(api_keys=("secret",))
    with live(settings, lambda: says(f"<think>hm</think>Wörld. {CALL}"), tools_and_thoughts()) as running:
        yield running


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as made:
        yield made


def test_the_client_creates(client: openai.OpenAI) -> None:
    response = client.responses.create(model="quire-demo", input="hello", tools=[WEATHER])
    assert response.output_text == "Wörld."
    thought, _, call = response.output
    assert thought.content[0].text == "hm" and json.loads(call.arguments) == {"city": "Köln"}
    assert client.responses.retrieve(response.id).output_text == "Wörld."
    assert [item.type for item in client.responses.input_items.list(response.id)] == ["message"]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_the_client_streams(client: openai.OpenAI) -> None:
    with client.responses.stream(model="quire-demo", input="hello", tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        response = stream.get_final_response()
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert response.output_text == "Wörld." and response.output[2].name == "weather"
    assert response.usage.output_tokens_details.reasoning_tokens > 0


def test_the_client_counts_tokens(client: openai.OpenAI) -> None:
    first = client.responses.create(model="quire-demo", input="Hello!")
    assert first.usage is not None
    alone = client.responses.input_tokens.count(model="quire-demo", input="Hello!")
    assert (alone.object, alone.input_tokens) == ("response.input_tokens", first.usage.input_tokens)
    after = client.responses.input_tokens.count(
        model="quire-demo", input="More!", previous_response_id=first.id, instructions="Be brief."
    )
    assert after.input_tokens > alone.input_tokens
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.responses.input_tokens.count(model="gpt", input="Hello!")
