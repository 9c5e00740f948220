"""Calls that a model must make, and arguments that must keep to their schema.

The model is a random one at temperature 1: nothing but the grammar makes it call, and call rightly.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from engine.build import build
from engine.client import InProcessClient
from engine.config import EngineOptions
from engine.text.chat import ChatTemplate
from engine.text.files import read_text_files
from engine.text.tokenizer import Tokenizer
from server.app import create_app
from server.settings import ServerSettings
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.http import CHAT, HELLO, frames

Work = Callable[[httpx.AsyncClient], Awaitable[None]]
Serve = Callable[[Work], None]

FLAT = "{{ messages[-1].content }}<|eos|>{{ tools | tojson if tools }}"
TEMPLATES = {
    "hermes": FLAT + "{% if tools %}<tool_call>{% endif %}",
    "llama3_json": FLAT + '{% if tools %}{"name": function name, "parameters": x}{% endif %}',
    "mistral list": FLAT + "{% if tools %}[TOOL_CALLS] [{% endif %}",
    "mistral list without a space": FLAT + "{% if tools %}[TOOL_CALLS][{% endif %}",
    "mistral": FLAT + "{% if tools %}[TOOL_CALLS]f[ARGS]{% endif %}",
    "thinks": FLAT + "{% if tools %}<tool_call>{% endif %}{{ x.split('</think>') if x }}",
    "has begun to think": FLAT
    + "{{ x.split('</think>') if x }}{% if tools %}<tool_call>{% endif %}<think>\n",
    "pythonic": FLAT + "{% if tools %}[func_name1(]{% endif %}",
}
FORCED = [name for name in TEMPLATES if name not in ("thinks", "has begun to think")]
MARKERS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "mistral list": ("[TOOL_CALLS]", "[CALL_ID]"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "has begun to think": ("<think>", "</think>"),
    "thinks": ("<think>", "</think>"),
}
SCHEMAS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "unit": {"enum": ["c", "f"]},
            "days": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": 9},
                "maxItems": 3,
            },
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
    "set-timer": {
        "properties": {"at": {"type": "string", "pattern": r"^\d\d:\d\d$"}, "loud": {"type": "boolean"}},
        "required": ["at", "loud"],
        "additionalProperties": False,
    },
    "now": None,
}


def tool(name: str, **more: Any) -> dict[str, Any]:
    parameters = {} if SCHEMAS[name] is None else {"parameters": SCHEMAS[name]}
    return {"type": "function", "function": {"name": name, **parameters, **more}}


TOOLS = [tool(name) for name in SCHEMAS]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("forced"), "llama", max_position_embeddings=4096)


@pytest.fixture
def serving(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs something against a server around a real engine.

    `control`: the notation's marks are special tokens of the model, instead of text.
    """

    async def around(template_name: str, work: Work, control: bool) -> None:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(checkpoint, folder)
        marks = MARKERS.get(template_name, ()) if control else ()
        for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
            text = path.read_text()
            for old, new in zip(("<|user|>", "<|system|>"), marks, strict=False):
                text = text.replace(old, new)
            path.write_text(text)
        for name, key, value in (
            ("config.json", "eos_token_id", 2),
            ("tokenizer_config.json", "chat_template", TEMPLATES[template_name]),
        ):
            fields = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps({**fields, key: value}))
        files = read_text_files(folder)
        tokenizer = Tokenizer(files)
        assert all(mark in tokenizer.control for mark in marks)
        core, info = build(
            EngineOptions(model=str(folder), dtype="float32", max_num_seqs=16, kv_cache_memory_bytes=64 << 20)
        )
        client = InProcessClient(core, info, tokenizer)
        template = ChatTemplate.from_files(files, tokenizer)
        app = create_app(client, ServerSettings(), tokenizer, template, {})
        async with app.router.lifespan_context(app):
            await app.state.service.started.wait()
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost/") as http:
                await work(http)
            assert client.snapshot().blocks_in_use == 0

    def run(template_name: str, work: Work, *, control: bool = False) -> None:
        asyncio.run(around(template_name, work, control))

    yield run


def check(name: str, arguments: str) -> None:
    schema = {"type": "object", "maxProperties": 0} if SCHEMAS[name] is None else SCHEMAS[name]
    jsonschema.validate(json.loads(arguments), schema)


def streamed(chunks: list[Any], index: int) -> tuple[list[list[str]], str, str]:
    """(name and arguments of each call, the content, the finish reason) of a choice."""
    calls: list[list[str]] = []
    content, finish = "", ""
    for choice in (c for chunk in chunks for c in chunk["choices"] if c["index"] == index):
        content += choice["delta"].get("content") or ""
        finish = choice["finish_reason"] or finish
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                calls.append([call["function"]["name"], ""])
            calls[call["index"]][1] += call["function"]["arguments"]
    return calls, content, finish


CASES = [(name, False) for name in FORCED] + [(name, True) for name in FORCED if name in MARKERS]


@pytest.mark.parametrize(("name", "control"), CASES)
@pytest.mark.parametrize("parallel", [True, False])
def test_required(serving: Callable[..., None], name: str, control: bool, parallel: bool) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        asked = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", "n": 2, "max_tokens": 2000}
        counts = set()
        for seed in range(2):
            body = {**asked, "seed": seed, "parallel_tool_calls": parallel, "min_tokens": 100}
            whole = await http.post(CHAT, json=body)
            assert whole.status_code == 200, whole.text
            chunks = frames((await http.post(CHAT, json={**body, "stream": True})).text)
            for index, choice in enumerate(whole.json()["choices"]):
                assert choice["finish_reason"] == "tool_calls", choice
                assert choice["message"]["content"] is None
                calls = [call["function"] for call in choice["message"]["tool_calls"]]
                counts.add(len(calls))
                for call in calls:
                    check(call["name"], call["arguments"])
                pairs = [[call["name"], call["arguments"]] for call in calls]
                assert streamed(chunks, index) == (pairs, "", "tool_calls")
        assert max(counts) > 1 if parallel else counts == {1}

    serving(name, work, control=control)


@pytest.mark.parametrize("name", FORCED)
def test_a_named_function_is_called_once(serving: Callable[..., None], name: str) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        for wanted in SCHEMAS:
            body = {"messages": HELLO, "tools": TOOLS, "tool_choice": named(wanted), "n": 2}
            whole = (await http.post(CHAT, json=body)).json()
            chunks = frames((await http.post(CHAT, json={**body, "stream": True})).text)
            for index, choice in enumerate(whole["choices"]):
                (call,) = choice["message"]["tool_calls"]
                assert call["function"]["name"] == wanted and choice["finish_reason"] == "stop"
                check(wanted, call["function"]["arguments"])
                ((called, arguments),), content, finish = streamed(chunks, index)
                assert (called, content, finish) == (wanted, "", "stop")
                check(called, arguments)

    serving(name, work)


def test_one_of_those_allowed(serving: Callable[..., None]) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        allowed = {"mode": "required", "tools": [named("now"), named("set-timer")]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        body = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice, "n": 8, "max_tokens": 2000}
        reply = (await http.post(CHAT, json=body)).json()
        for found in reply["choices"]:
            assert found["finish_reason"] == "tool_calls"
            assert {call["function"]["name"] for call in found["message"]["tool_calls"]} <= {
                "now",
                "set-timer",
            }

    serving("hermes", work)


@pytest.mark.parametrize("control", [True, False])
def test_thoughts_come_before_the_call(serving: Callable[..., None], control: bool) -> None:
    """Where the prompt has begun them they must end; else the model decides."""

    async def begun(http: httpx.AsyncClient) -> None:
        body: dict[str, Any] = {"messages": HELLO, "tools": TOOLS, "tool_choice": named("get_weather")}
        if control:
            body["logit_bias"] = {"5": 8}  # </think>
        reply = (await http.post(CHAT, json={**body, "n": 4, "max_tokens": 800, "seed": 3})).json()
        ended = [c for c in reply["choices"] if c["finish_reason"] == "stop"]
        assert len(ended) == 4 or not control
        for choice in reply["choices"]:
            message = choice["message"]
            assert message["content"] is None
            if choice in ended:
                check("get_weather", message["tool_calls"][0]["function"]["arguments"])
            else:
                assert message["reasoning_content"]

    async def free(http: httpx.AsyncClient) -> None:
        body = {"messages": HELLO, "tools": TOOLS, "tool_choice": named("now"), "n": 8, "max_tokens": 800}
        body["seed"] = 4
        if control:
            body["logit_bias"] = {"5": 8}
        reply = (await http.post(CHAT, json=body)).json()
        assert not control or any(choice["finish_reason"] == "stop" for choice in reply["choices"])
        for choice in reply["choices"]:
            calls = choice["message"].get("tool_calls", ())
            assert len(calls) == (choice["finish_reason"] == "stop")
            assert calls or choice["message"]["reasoning_content"]

    serving("has begun to think", begun, control=control)
    serving("thinks", free, control=control)


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral list"])
def test_strict_arguments_of_a_call_that_the_model_chose(serving: Callable[..., None], name: str) -> None:
    """Text is free; what follows the mark is a call. Tools that are not strict stay free of their schemas."""

    async def work(http: httpx.AsyncClient) -> None:
        free = {"type": "function", "function": {"name": "any", "parameters": {"not": {}}}}
        tools = [tool("get_weather", strict=True), tool("set-timer", strict=True), free]
        body = {"messages": HELLO, "tools": tools, "n": 8, "max_tokens": 200, "seed": 1}
        reply = (await http.post(CHAT, json={**body, "logit_bias": {"3": 12}})).json()
        calls = [
            c["function"] for choice in reply["choices"] for c in choice["message"].get("tool_calls", ())
        ]
        assert any(call["name"] != "any" for call in calls)
        for call in calls:
            if call["name"] != "any":
                check(call["name"], call["arguments"])

    serving(name, work, control=True)


PLACE = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 5}, "sure": {"type": "boolean"}},
    "required": ["place", "sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}


@pytest.mark.parametrize("name", FORCED)
def test_calls_or_a_format(serving: Callable[..., None], name: str) -> None:
    """With both, as frameworks for agents send them, the text is one or the other."""

    async def work(http: httpx.AsyncClient) -> None:
        tools = [tool("get_weather", **({} if name in ("pythonic", "llama3_json") else {"strict": True}))]
        asked = {"messages": HELLO, "tools": tools, "response_format": FORMAT, "n": 16, "seed": 1}
        asked |= {"max_tokens": 600, "temperature": 2, "parallel_tool_calls": False}
        whole = (await http.post(CHAT, json=asked)).json()
        chunks = frames((await http.post(CHAT, json={**asked, "stream": True})).text)
        kinds = set()
        for index, choice in enumerate(whole["choices"]):
            message, finish = choice["message"], choice["finish_reason"]
            kinds.add(finish)
            calls = [
                [c["function"]["name"], c["function"]["arguments"]] for c in message.get("tool_calls", ())
            ]
            if finish != "length":  # what is cut off is a call as far as it goes, or content
                assert streamed(chunks, index) == (calls, message["content"] or "", finish)
            if finish == "tool_calls":
                ((called, arguments),) = calls
                assert called == "get_weather" and isinstance(json.loads(arguments), dict)
                if tools[0]["function"].get("strict"):
                    check(called, arguments)
            elif finish == "stop":
                assert not calls
                jsonschema.validate(json.loads(message["content"]), PLACE)
        assert kinds >= ({"stop", "tool_calls"} if name == "hermes" else set())  # the model chooses
        body = {**asked, "tool_choice": "required", "n": 1}
        (choice,) = (await http.post(CHAT, json=body)).json()["choices"]
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None

    serving(name, work)


def test_thoughts_before_a_format(serving: Callable[..., None]) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        body = {"messages": HELLO, "tools": [tool("now")], "response_format": FORMAT, "n": 8, "seed": 2}
        body |= {"max_tokens": 800, "logit_bias": {"5": 8}}  # </think>
        choices = (await http.post(CHAT, json=body)).json()["choices"]
        assert any(choice["message"].get("reasoning_content") for choice in choices)
        for choice in choices:
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["message"]["content"]), PLACE)

    serving("has begun to think", work, control=True)


def test_the_other_apis(serving: Callable[..., None]) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        tools: list[Any] = [{"name": "set-timer", "input_schema": SCHEMAS["set-timer"] | {"type": "object"}}]
        for choice in (
            {"type": "any", "disable_parallel_tool_use": True},
            {"type": "tool", "name": "set-timer"},
        ):
            body = {"messages": HELLO, "max_tokens": 500, "tools": tools, "tool_choice": choice}
            reply = (await http.post("/v1/messages", json=body)).json()
            (block,) = reply["content"]
            assert (block["type"], reply["stop_reason"]) == ("tool_use", "tool_use")
            check("set-timer", json.dumps(block["input"]))
        functions = [{"type": "function", **tool("set-timer")["function"], "strict": True}]
        for wanted in ("required", {"type": "function", "name": "set-timer"}):
            body = {"input": "x", "tools": functions, "tool_choice": wanted, "parallel_tool_calls": False}
            reply = (await http.post("/v1/responses", json=body)).json()
            (item,) = reply["output"]
            assert (item["type"], reply["status"]) == ("function_call", "completed")
            check("set-timer", item["arguments"])
        # Without strict, and with a format: what the model does not call must fit it.
        formatted = {"type": "json_schema", "name": "place", "schema": PLACE}
        body = {"input": "x", "tools": functions, "text": {"format": formatted}, "max_output_tokens": 600}
        for item in (await http.post("/v1/responses", json=body)).json()["output"]:
            if item["type"] == "message":
                jsonschema.validate(json.loads(item["content"][0]["text"]), PLACE)

    serving("hermes", work)


def test_the_official_client(serving: Callable[..., None]) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http)
        asked: dict[str, Any] = {"model": "quire-demo", "messages": HELLO, "tools": TOOLS, "max_tokens": 2000}
        reply = await client.chat.completions.create(**asked, tool_choice="required")
        assert reply.choices[0].finish_reason == "tool_calls"
        for call in reply.choices[0].message.tool_calls or ():
            check(call.function.name, call.function.arguments)
        picked: Any = named("get_weather")
        async with client.chat.completions.stream(**asked, tool_choice=picked) as stream:
            choice = (await stream.get_final_completion()).choices[0]
        assert choice.finish_reason == "stop" and choice.message.tool_calls
        (call,) = choice.message.tool_calls
        check("get_weather", call.function.arguments)

    serving("hermes", work)


DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"properties": {"a": DEEP}}
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "pythonic",
        {"tools": [tool("now", strict=True)]},
        "tools[0].function.strict",
        "or use tool_choice",
    ),
    (
        "llama3_json",
        {"tools": [TOOLS[0], tool("now", strict=True)]},
        "tools[1].function.strict",
        "or use tool_choice",
    ),
    (
        "hermes",
        {"tools": TOOLS, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "combined with tools",
    ),
    ("hermes", {"tools": TOOLS, "structured_outputs": {"json": "3"}}, "structured_outputs", "an object"),
    ("hermes", {"tools": TOOLS, "tool_choice": named("x")}, "tool_choice", "no tool 'x'"),
    ("hermes", {"tool_choice": "required"}, "tool_choice", "no tools"),
    *(
        (
            "hermes",
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": "required",
            },
            "tools",
            says,
        )
        for schema, says in (
            ({"type": "string"}, "'f' are not an object"),
            ({"type": 3}, "'f' are not an object"),
            ({"type": "object", "properties": {"a": {"not": {}}}}, 'not supported: "not"'),
            ({"properties": {"a": {"$ref": "http://x/y"}}}, "nothing is fetched"),
            (DEEP, "levels deep"),
        )
    ),
    *(
        (
            "pythonic",
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": "required",
            },
            "tools",
            says,
        )
        for schema, says in (
            ({"properties": {"a": {"oneOf": [{}]}}}, 'not supported: "oneOf"'),
            ({"properties": {"a b": {}}}, "no argument can be called 'a b'"),
        )
    ),
]


def test_what_cannot_be_done_is_said(serving: Callable[..., None]) -> None:
    def asking(rows: list[tuple[str, dict[str, Any], str, str]]) -> Work:
        async def work(http: httpx.AsyncClient) -> None:
            for _, fields, param, says in rows:
                reply = await http.post(CHAT, json={"messages": HELLO, **fields})
                assert reply.status_code == 400, (fields, reply.text)
                error = reply.json()["error"]
                assert error["param"] == param and says in error["message"], error

        return work

    for name in {row[0] for row in BAD}:
        serving(name, asking([row for row in BAD if row[0] == name]))
