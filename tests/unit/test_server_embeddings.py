"""/v1/embeddings with a fake engine: forms, formats, refusals, long lists, and what holds for every route."""

from __future__ import annotations

import asyncio
import base64
import struct
from dataclasses import replace
from typing import Any

import pytest

from engine.embedding import EmbeddingFacts, Pooling, PoolingKind
from server.docs import openapi
from server.generation import MAX_IN_FLIGHT
from server.prompts import INLINE_CHARS
from server.schema.embeddings import MAX_INPUTS
from server.settings import ServerSettings
from tests.contract.openai_schema import check
from tests.helpers.fake_client import EMBEDDING_SIZE, INFO, VOCAB_SIZE, FakeClient, embedding_of
from tests.helpers.http import CHAT, EMBEDDINGS, HELLO, described, in_process

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def vectors(reply: Any) -> list[Any]:
    assert reply.status_code == 200, reply.text
    data = reply.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("hé", [list("hé".encode())]),
        (["a", "bc"], [[97], [98, 99]]),
        ([5, 6], [[5, 6]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["a", [5]], [[97], [5]]),
    ],
)
async def test_every_form_of_input(given: Any, prompts: list[list[int]]) -> None:
    async with in_process() as (http, client):
        reply = await http.post(EMBEDDINGS, json={"input": given})
        assert [ids for _, ids, _ in client.submitted] == prompts
        assert all(params.pooling == Pooling() for *_, params in client.submitted)
    for found, ids in zip(vectors(reply), prompts, strict=True):
        assert found == pytest.approx(embedding_of(ids), abs=1e-7)
    total = sum(map(len, prompts))
    usage = {"prompt_tokens": total, "total_tokens": total, "prompt_tokens_details": {"cached_tokens": 0}}
    assert reply.json()["usage"] == usage and reply.json()["model"] == "quire-demo"
    described_by_us(reply.json())


def described_by_us(body: Any) -> None:
    from server.app import create_app
    from tests.helpers.fake_client import FakeTokenizer

    document = openapi(create_app(FakeClient(), ServerSettings(), FakeTokenizer()))
    reply = document["paths"]["/v1/embeddings"]["post"]["responses"]["200"]
    described(document, reply["content"]["application/json"]["schema"], body)


async def test_base64_is_the_same_numbers() -> None:
    async with in_process() as (http, _):
        plain, packed = [
            vectors(await http.post(EMBEDDINGS, json={"input": "hello", "encoding_format": name}))[0]
            for name in ("float", "base64")
        ]
    assert list(struct.unpack(f"<{EMBEDDING_SIZE}f", base64.b64decode(packed))) == plain


async def test_dimensions_reach_the_engine() -> None:
    async with in_process() as (http, client):
        (vector,) = vectors(await http.post(EMBEDDINGS, json={"input": "a", "dimensions": 3}))
        assert client.submitted[0][2].pooling == Pooling(dimensions=3)
    assert vector == pytest.approx(embedding_of([97], 3), abs=1e-7)


async def test_priority_reaches_the_engine() -> None:
    async with in_process() as (http, client):
        for given in (-3, None):
            await http.post(EMBEDDINGS, json={"input": "a", "priority": given})
        refused = await http.post(EMBEDDINGS, json={"input": "a", "priority": 2**31})
        assert [params.priority for *_, params in client.submitted] == [-3, 0]
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority"


async def test_the_model_says_how_to_pool() -> None:
    info = replace(INFO, embeddings=EmbeddingFacts(EMBEDDING_SIZE, PoolingKind.MEAN))
    async with in_process(FakeClient(info=info)) as (http, client):
        await http.post(EMBEDDINGS, json={"input": "a"})
        assert client.submitted[0][2].pooling == Pooling(PoolingKind.MEAN)


BAD: list[tuple[str, dict[str, Any], str | None, int]] = [
    ("nothing", {}, "input", 400),
    ("null", {"input": None}, "input", 400),
    ("empty text", {"input": ""}, "input", 400),
    ("empty list", {"input": []}, "input", 400),
    ("an empty text among others", {"input": ["a", ""]}, "input", 400),
    ("empty ids among others", {"input": [[1], []]}, "input", 400),
    ("a number", {"input": 5}, "input", 400),
    ("an object", {"input": {"text": "a"}}, "input", 400),
    ("a number among texts", {"input": ["a", 5]}, "input", 400),
    ("true among ids", {"input": [[1, True]]}, "input", 400),
    ("a float id", {"input": [1.5]}, "input", 400),
    ("a negative id", {"input": [-1]}, "input", 400),
    ("an id past the vocabulary", {"input": [[5], [VOCAB_SIZE]]}, "input", 400),
    ("half a character", {"input": "\ud800"}, None, 400),
    ("too many inputs", {"input": ["a"] * (MAX_INPUTS + 1)}, "input", 400),
    ("more than the pool holds", {"input": "x" * (INFO.largest_request_tokens + 1)}, None, 400),
    ("much too long a text", {"input": "x" * (33 * INFO.max_model_len)}, "input", 400),
    ("too many ids", {"input": [5] * (INFO.max_model_len + 1)}, "input", 400),
    *((f"dimensions {v!r}", {"dimensions": v}, "dimensions", 400) for v in (0, -1, 17, 2**40, "3", 1.5)),
    *((f"format {v!r}", {"encoding_format": v}, "encoding_format", 400) for v in ("int8", "", 3, "FLOAT")),
    ("another model", {"model": "text-embedding-3-small"}, "model", 404),
    ("user", {"user": 3}, "user", 400),
    ("truncate to nothing", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", 400),
    ("not normalised", {"normalize": False}, "normalize", 400),
    ("a conversation", {"messages": HELLO}, "messages", 400),
    ("a smaller type", {"embed_dtype": "float16"}, "embed_dtype", 400),
    ("cache_salt", {"cache_salt": ""}, "cache_salt", 400),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "status"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_bad_input(fields: dict[str, Any], param: str | None, status: int) -> None:
    body = {} if not fields else {"input": "good", **fields}
    async with in_process() as (http, client):
        if fields.get("input") == "\ud800":
            reply = await http.post(EMBEDDINGS, content=b'{"input": "\\ud800"}', headers=JSON)
        else:
            reply = await http.post(EMBEDDINGS, json=body)
        assert reply.status_code == status, reply.text
        check("ErrorResponse", reply.json())
        if param is not None:
            assert reply.json()["error"]["param"] == param
        assert client.in_flight == 0
        assert vectors(await http.post(EMBEDDINGS, json={"input": "good"}))


JSON = {"content-type": "application/json"}


async def test_a_model_that_gives_none_says_why() -> None:
    info = replace(INFO, embeddings=EmbeddingFacts(EMBEDDING_SIZE, refusal="modules.json asks for Dense."))
    async with in_process(FakeClient(info=info)) as (http, client):
        reply = await http.post(EMBEDDINGS, json={"input": "a"})
        assert reply.status_code == 400 and not client.submitted
        assert reply.json()["error"]["param"] == "model"
        assert "Dense" in reply.json()["error"]["message"]
        assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 200


async def test_a_model_that_gives_nothing_else_says_so() -> None:
    info = replace(INFO, embeddings=EmbeddingFacts(EMBEDDING_SIZE, only=True))
    async with in_process(FakeClient(info=info)) as (http, _):
        reply = await http.post(CHAT, json={"messages": HELLO})
        assert reply.status_code == 400 and "embeddings only" in reply.json()["error"]["message"]
        assert vectors(await http.post(EMBEDDINGS, json={"input": "a"}))


async def test_truncating_keeps_the_end() -> None:
    async with in_process() as (http, client):
        await http.post(EMBEDDINGS, json={"input": ["abcdef", [1, 2, 3]], "truncate_prompt_tokens": 2})
        assert [ids for _, ids, _ in client.submitted] == [[101, 102], [2, 3]]
        whole = {"input": [5] * INFO.max_model_len, "truncate_prompt_tokens": -1}
        refused = await http.post(EMBEDDINGS, json=whole)  # the fake's pool holds half the context
        assert refused.json()["error"]["code"] == "request_too_large"


async def test_what_holds_for_every_route_holds_here() -> None:
    settings = ServerSettings(api_keys=("one", "two"))
    async with in_process(settings=settings) as (http, client):
        assert (await http.post(EMBEDDINGS, json={"input": "a"})).status_code == 401
        for key in ("one", "two"):
            headers = {"authorization": f"Bearer {key}"}
            body = {"input": "a", "inptu": 1, "cache_salt": "s", "explain_cache": True}
            reply = await http.post(EMBEDDINGS, json=body, headers=headers)
            assert reply.headers["x-quire-warnings"] == "ignored fields: inptu (did you mean input?)"
            assert [report["prompt"] for report in reply.json()["cache"]] == [0]
        first, second = client.scopes
        assert first.tenant != second.tenant and first.salt != second.salt
    async with in_process(settings=ServerSettings(strict=True)) as (http, _):
        reply = await http.post(EMBEDDINGS, json={"input": "a", "inptu": 1})
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "unknown_parameter"


async def test_it_is_counted() -> None:
    async with in_process() as (http, _):
        await http.post(EMBEDDINGS, json={"input": ["a", "b"]})
        await http.post(EMBEDDINGS, json={"input": ""})
        text = (await http.get("/metrics")).text
    assert 'quire_requests_received_total{api="embeddings"} 2.0' in text
    assert 'quire_requests_total{api="embeddings",outcome="ok"} 1.0' in text
    assert 'quire_requests_total{api="embeddings",outcome="client_error"} 1.0' in text


async def test_a_long_list_leaves_room_for_others() -> None:
    inputs = [f"text {number}" for number in range(MAX_INPUTS)]
    most = 0

    class Watching(FakeClient):
        def submit(self, *args: Any, **more: Any) -> Any:
            nonlocal most
            stream = super().submit(*args, **more)
            most = max(most, self.in_flight)
            return stream

    async with in_process(Watching()) as (http, client):
        reply = await http.post(EMBEDDINGS, json={"input": inputs, "encoding_format": "base64"})
        assert len(client.submitted) == MAX_INPUTS and client.in_flight == 0
    assert most == MAX_IN_FLIGHT
    for text, found in zip(inputs, vectors(reply), strict=True):
        values = struct.unpack(f"<{EMBEDDING_SIZE}f", base64.b64decode(found))
        assert values == pytest.approx(embedding_of(list(text.encode())), abs=1e-7)


async def test_a_long_list_goes_on_with_fewer_places() -> None:
    """Others take the places that become free: what is left of ours goes through those we have."""
    client = FakeClient()
    client.gate.clear()
    async with in_process(client) as (http, _):
        running = asyncio.create_task(http.post(EMBEDDINGS, json={"input": ["a"] * 300}))
        while client.in_flight < MAX_IN_FLIGHT:
            await asyncio.sleep(0)
        client.max_in_flight = 4
        client.gate.set()
        assert len(vectors(await running)) == 300
        client.max_in_flight = 0
        refused = await http.post(EMBEDDINGS, json={"input": ["a"] * 300})
        assert refused.status_code == 429 and "retry-after" in refused.headers


async def test_a_long_list_that_has_not_all_begun_is_cut_off_by_a_shutdown() -> None:
    client = FakeClient()
    client.gate.clear()
    async with in_process(client) as (http, _):
        running = asyncio.create_task(http.post(EMBEDDINGS, json={"input": ["a"] * 300}))
        short = asyncio.create_task(http.post(EMBEDDINGS, json={"input": ["a"] * 3}))
        while client.in_flight < MAX_IN_FLIGHT + 3:
            await asyncio.sleep(0)
        client.start_draining()
        client.gate.set()
        reply = await running
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "shutting_down"
        assert len(vectors(await short)) == 3 and client.in_flight == 0


async def test_a_failure_in_a_long_list_ends_all_of_it() -> None:
    client = FakeClient()
    client.die_after = 0
    async with in_process(client) as (http, _):
        reply = await http.post(EMBEDDINGS, json={"input": ["a"] * 300})
        assert reply.status_code == 503 and client.in_flight == 0


async def test_many_texts_are_tokenised_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from tests.helpers.fake_client import FakeTokenizer

    threads = set()
    encode = FakeTokenizer.encode

    def noting(self: FakeTokenizer, text: str, **more: Any) -> list[int]:
        threads.add(threading.current_thread().name)
        return encode(self, text, **more)

    monkeypatch.setattr(FakeTokenizer, "encode", noting)
    async with in_process() as (http, _):
        each = INLINE_CHARS // 2
        vectors(await http.post(EMBEDDINGS, json={"input": ["x" * each] * 10}))
    assert all(name.startswith("tokenize") for name in threads)
