"""Every reply, chunk and error has the shape that OpenAI's own description gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.docs import openapi
from server.schema.chat import ChatRequest
from server.schema.completions import CompletionRequest
from tests.contract import openai_schema
from tests.contract.openai_schema import check
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    HELLO,
    chat_text,
    completion_text,
    frames,
    in_process,
)

pytestmark = pytest.mark.anyio

CHAT_VARIANTS: list[dict[str, Any]] = [
    {},
    {"n": 3},
    {"max_tokens": 1},
    {"max_completion_tokens": 4, "logprobs": True},
    {"logprobs": True, "top_logprobs": 5, "n": 2},
    {"stop": ["wör"]},
    {"temperature": 0, "seed": 1, "user": "u", "metadata": {"a": "b"}, "store": True},
    {"stream_options": {"include_usage": True}},
    {"explain_cache": True, "cache_salt": "s", "n": 2},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}, "n": 2},
]
COMPLETION_VARIANTS: list[dict[str, Any]] = [
    {},
    {"prompt": ["one", "two"], "n": 2},
    {"prompt": [72, 101]},
    {"prompt": [[72, 101], [73]], "max_tokens": 1, "logprobs": 1, "echo": True},
    {"max_tokens": 0, "echo": True},
    {"prompt": ["one", "two"], "explain_cache": True, "cache_salt": "s"},
    {"max_tokens": 0, "echo": True, "logprobs": 0},
    {"logprobs": 3, "stop": "llo"},
    {"echo": True, "n": 2, "stream_options": {"include_usage": True}},
]
EMBEDDING_VARIANTS: list[dict[str, Any]] = [
    {},
    {"input": ["one", "two"], "encoding_format": "float"},
    {"input": [72, 101], "encoding_format": "base64"},
    {"input": [[72, 101], [73]], "dimensions": 2, "user": "u"},
    {"explain_cache": True, "cache_salt": "s"},
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("extra", CHAT_VARIANTS, ids=json.dumps)
async def test_chat(extra: dict[str, Any]) -> None:
    body = {"model": "quire-demo", "messages": HELLO, **extra}
    async with in_process() as (http, _):
        whole = (await http.post(CHAT, json={**body, "stream_options": None})).json()
        stream = await http.post(CHAT, json={**body, "stream": True})
    check("CreateChatCompletionResponse", whole)
    chunks = frames(stream.text)
    for chunk in chunks:
        check("CreateChatCompletionStreamResponse", chunk)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    for choice in whole["choices"]:
        assert chat_text(chunks, choice["index"]) == choice["message"]["content"]
    _check_usage_chunks(chunks, extra, whole)


@pytest.mark.parametrize("extra", COMPLETION_VARIANTS, ids=json.dumps)
async def test_completions(extra: dict[str, Any]) -> None:
    body = {"model": "quire-demo", "prompt": "Once", **extra}
    async with in_process() as (http, _):
        whole = (await http.post(COMPLETIONS, json={**body, "stream_options": None})).json()
        stream = await http.post(COMPLETIONS, json={**body, "stream": True})
    check("CreateCompletionResponse", whole)
    chunks = frames(stream.text)
    for chunk in chunks:
        check("CreateCompletionResponse", chunk)
    for choice in whole["choices"]:
        assert completion_text(chunks, choice["index"]) == choice["text"]
        assert _joined_logprobs(chunks, choice["index"]) == choice["logprobs"]
    _check_usage_chunks(chunks, extra, whole)


def _check_usage_chunks(chunks: list[Any], extra: dict[str, Any], whole: Any) -> None:
    """The last chunk alone has no choices and the whole usage; others have null, or the usage so far."""
    options = extra.get("stream_options")
    if options is None:
        assert not any("usage" in chunk for chunk in chunks)
        return
    *before, last = chunks
    assert last["choices"] == [] and all(chunk["choices"] for chunk in before)
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert isinstance(last["usage"]["prompt_tokens_details"]["cached_tokens"], int)
    for chunk in before:
        assert (chunk["usage"] is not None) == bool(options.get("continuous_usage_stats"))


def _joined_logprobs(chunks: list[Any], index: int) -> Any:
    parts = [
        choice["logprobs"]
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index and choice["logprobs"]
    ]
    return {key: [item for part in parts for item in part[key]] for key in parts[0]} if parts else None


async def test_the_first_chunk_of_each_choice_has_the_role() -> None:
    async with in_process() as (http, _):
        stream = await http.post(CHAT, json={"messages": HELLO, "n": 2, "stream": True})
    for index in (0, 1):
        deltas = [
            c["delta"] for chunk in frames(stream.text) for c in chunk["choices"] if c["index"] == index
        ]
        assert deltas[0]["role"] == "assistant"
        assert not any("role" in delta for delta in deltas[1:])
        assert deltas[-1] == {}


@pytest.mark.parametrize("extra", EMBEDDING_VARIANTS, ids=json.dumps)
async def test_embeddings(extra: dict[str, Any]) -> None:
    body = {"model": "quire-demo", "input": "Once", **extra}
    async with in_process() as (http, _):
        reply = await http.post(EMBEDDINGS, json=body)
    assert reply.status_code == 200
    check("CreateEmbeddingResponse", reply.json())
    if not {"explain_cache", "cache_salt"} & set(extra):
        check("CreateEmbeddingRequest", body)


async def test_models() -> None:
    async with in_process() as (http, _):
        check("ListModelsResponse", (await http.get("/v1/models")).json())
        check("Model", (await http.get("/v1/models/quire-demo")).json())


async def test_an_error_inside_a_stream() -> None:
    client = FakeClient()
    client.die_after = 3
    async with in_process(client) as (http, _):
        stream = await http.post(CHAT, json={"messages": HELLO, "stream": True})
    *chunks, error = frames(stream.text)
    assert stream.status_code == 200 and chunks
    check("ErrorResponse", error)


async def test_cached_tokens_are_always_told() -> None:
    messages = [{"role": "user", "content": "x" * 100}]
    async with in_process() as (http, _):
        first = (await http.post(CHAT, json={"messages": messages})).json()["usage"]
        second = (await http.post(CHAT, json={"messages": messages})).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == 96


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ChatRequest, "CreateChatCompletionRequest"), (CompletionRequest, "CreateCompletionRequest")],
)
def test_every_official_parameter_is_known(ours: Any, theirs: str) -> None:
    """Honoured, taken on purpose, or refused by name: never dropped without a word."""
    assert openai_schema.request_fields(theirs) <= set(ours.model_fields) | set(ours.refused)


async def test_replies_match_our_own_description() -> None:
    from jsonschema import Draft202012Validator

    from server.app import create_app
    from server.settings import ServerSettings
    from tests.helpers.fake_client import FakeTokenizer

    document = openapi(create_app(FakeClient(), ServerSettings(), FakeTokenizer()))
    bodies = {
        CHAT: {"messages": HELLO, "logprobs": True},
        COMPLETIONS: {"prompt": "a", "logprobs": 1, "echo": True},
    }
    async with in_process() as (http, _):
        for path, body in bodies.items():
            operation = document["paths"][path]["post"]
            for value, schema in (
                (body, operation["requestBody"]["content"]["application/json"]["schema"]),
                (
                    (await http.post(path, json=body)).json(),
                    operation["responses"]["200"]["content"]["application/json"]["schema"],
                ),
            ):
                Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_the_copy_is_current() -> None:
    original = Path(__file__).parents[2].parent / "shared" / "openai" / "openapi.json"
    if not original.is_file():
        pytest.skip("the full description is not on this machine")
    assert openai_schema.trim(json.loads(original.read_text())) == json.loads(openai_schema.COPY.read_text())
