"""Structured outputs as clients ask for them: the official one's `.parse()`, plain HTTP, streams.

The model is a random one: nothing but the grammar makes its replies right.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from engine.build import build
from engine.client import InProcessClient
from engine.config import EngineOptions
from engine.text.chat import ChatTemplate
from engine.text.files import read_text_files
from engine.text.tokenizer import Tokenizer
from server.app import create_app
from server.settings import ServerSettings
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, chat_text, completion_text, frames
from tests.helpers.schemas import random_schema

Work = Callable[[httpx.AsyncClient], Awaitable[None]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("clients"), "llama", max_position_embeddings=2048)


@pytest.fixture
def serve(folder: Path) -> Callable[[Work], None]:
    """Runs something against a server around a real engine."""

    async def around(work: Work) -> None:
        files = read_text_files(folder)
        tokenizer = Tokenizer(files)
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

    return lambda work: asyncio.run(around(work))


class Step(BaseModel):
    explanation: str = Field(max_length=12)
    output: Literal["x = 1", "x = 2"]


class Answer(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=2)
    confidence: int = Field(ge=0, le=100)
    unit: Literal["m", "km"] | None


def test_the_official_client_parses(serve: Callable[[Work], None]) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http)
        reply = await client.chat.completions.parse(
            model="quire-demo",
            messages=HELLO,
            response_format=Answer,
            n=4,
            seed=1,  # type: ignore[arg-type]
        )
        assert len(reply.choices) == 4
        for choice in reply.choices:
            assert choice.finish_reason == "stop"
            assert isinstance(choice.message.parsed, Answer)
        async with client.chat.completions.stream(
            model="quire-demo",
            messages=HELLO,
            response_format=Answer,
            seed=2,  # type: ignore[arg-type]
        ) as stream:
            final = await stream.get_final_completion()
        assert isinstance(final.choices[0].message.parsed, Answer)

    serve(work)


def test_whole_and_streamed_on_both_apis(serve: Callable[[Work], None]) -> None:
    async def one(http: httpx.AsyncClient, seed: int) -> None:
        schema = random_schema(seed)
        path, prompt = ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "x"}))[seed % 2]
        wanted: dict[str, Any] = {
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        }
        if seed % 3 == 0:
            wanted = {"structured_outputs": {"json": json.dumps(schema) if seed % 2 else schema}}
        body = {**prompt, **wanted, "seed": seed, "max_tokens": 1200}
        whole = (await http.post(path, json=body)).json()["choices"][0]
        text = whole["message"]["content"] if path == CHAT else whole["text"]
        assert whole["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), schema)
        streamed = frames((await http.post(path, json={**body, "stream": True})).text)
        assert (chat_text if path == CHAT else completion_text)(streamed) == text

    async def work(http: httpx.AsyncClient) -> None:
        await asyncio.gather(*(one(http, seed) for seed in range(24)))

    serve(work)


def test_the_other_kinds(serve: Callable[[Work], None]) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        async def ask(wanted: dict[str, Any], **more: Any) -> str:
            body = {"prompt": "x", "structured_outputs": wanted, "max_tokens": 200, **more}
            reply = await http.post(COMPLETIONS, json=body)
            return str(reply.json()["choices"][0]["text"])

        assert re.fullmatch(r"[a-c]{4}-\d\d", await ask({"regex": r"[a-c]{4}-\d\d"}))
        assert await ask({"choice": ["a (b)", "c|d"]}) in ("a (b)", "c|d")
        assert await ask({"grammar": 'start: "a" "b"~2'}) == "abb"
        assert (await ask({"json_object": True}))[0] == "{"
        # What ends a text early still does.
        assert await ask({"regex": "abcdef"}, stop=["d"]) == "abc"
        assert await ask({"regex": "abcdef"}, stop=["d"], include_stop_str_in_output=True) == "abcd"

    serve(work)


def test_refusals_name_field_and_reason(serve: Callable[[Work], None]) -> None:
    async def work(http: httpx.AsyncClient) -> None:
        async def refusal(**wanted: Any) -> dict[str, Any]:
            reply = await http.post(CHAT, json={"messages": HELLO, **wanted})
            assert reply.status_code == 400, reply.text
            error: dict[str, Any] = reply.json()["error"]
            return error

        schema = {"type": "array", "uniqueItems": True}
        error = await refusal(
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        )
        assert error["param"] == "response_format" and "uniqueItems" in error["message"]
        error = await refusal(structured_outputs={"json": {"$ref": "http://localhost/x"}})
        assert error["param"] == "structured_outputs" and "nothing is fetched" in error["message"]
        error = await refusal(structured_outputs={"regex": "(?=a)b"})
        assert error["param"] == "structured_outputs" and "look-around" in error["message"]
        error = await refusal(guided_json=schema)
        assert error["param"] == "guided_json" and "structured_outputs.json" in error["message"]

    serve(work)
