"""Tenants around a real engine: nobody reuses, is told or can find out what another tenant sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.build import build
from engine.client import InProcessClient
from engine.config import EngineOptions
from engine.text.chat import ChatTemplate
from engine.text.tokenizer import Tokenizer
from server.app import create_app
from server.settings import ServerSettings
from server.tenants import TenantKeys, digest
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.http import CHAT, COMPLETIONS, frames

pytestmark = pytest.mark.anyio

PROBE = "/v1/cache/probe"
BLOCK = 16
IDS = [40 + number % 50 for number in range(3 * BLOCK + 5)]
FORK = [*IDS[: BLOCK + 4], 99, *IDS[BLOCK + 5 :]]  # differs in its second block


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tenants"), "llama")


class Caller:
    """Somebody with a key."""

    def __init__(self, http: httpx.AsyncClient, key: str) -> None:
        self._http = http
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    async def ask(self, path: str, body: dict[str, Any]) -> Any:
        reply = await self._http.post(path, json=body, headers=self._headers)
        assert reply.status_code == 200, reply.text
        return reply

    async def run(self, prompt: Any, **fields: Any) -> tuple[int, Any]:
        """(cached tokens, report) of one request."""
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "explain_cache": True, **fields}
        reply = (await self.ask(COMPLETIONS, body)).json()
        return reply["usage"]["prompt_tokens_details"]["cached_tokens"], reply["cache"][0]

    async def probe(self, prompt: Any, **fields: Any) -> Any:
        return (await self.ask(PROBE, {"prompt": prompt, **fields})).json()["cache"][0]


@asynccontextmanager
async def serving(model: Path, settings: ServerSettings, *keys: str) -> AsyncIterator[list[Caller]]:
    options = EngineOptions(
        model=str(model), device="cpu", block_size=BLOCK, max_num_seqs=4, kv_cache_memory_bytes=2**20
    )
    core, info = build(options)
    tokenizer = Tokenizer.from_dir(model)
    client = InProcessClient(core, info, tokenizer)
    app = create_app(client, settings, tokenizer, ChatTemplate.from_dir(model, tokenizer))
    async with app.router.lifespan_context(app):
        await app.state.service.started.wait()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            yield [Caller(http, key) for key in keys]


TWO = ServerSettings(api_keys=("one", "two"), admin_keys=("root",))


def member(name: str, key: str, share: str = "") -> TenantKeys:
    return TenantKeys(name, (digest(key.encode()),), share)


async def test_the_other_tenants_prompt_is_not_there(model: Path) -> None:
    async with serving(model, TWO, "one", "two", "root") as (one, two, root):
        before = [await two.probe(ids) for ids in (IDS, FORK)]
        assert (await one.run(IDS))[0] == 0
        assert (await one.run(IDS))[0] == 3 * BLOCK, "the cache works"
        for caller in (two, root):
            # The very words that an empty cache has.
            assert [await caller.probe(ids) for ids in (IDS, FORK)] == before
        assert await two.run(IDS) == (0, before[0])
        assert before[0]["reason"] == "never_seen" and before[0]["cached_text"] is None
        assert (await two.run(IDS))[0] == 3 * BLOCK
        assert (await two.run(FORK))[1]["reason"] == "diverged", "from the tenant's own prompt now"


async def test_not_while_it_runs_either(model: Path) -> None:
    async with serving(model, TWO, "one", "two") as (one, two):
        before = await two.probe(IDS)
        asked = asyncio.create_task(one.run(IDS, max_tokens=180, ignore_eos=True))
        reports = [await two.probe(IDS) for _ in range(20)]
        assert not asked.done() and reports == [before] * 20
        assert await two.run(IDS) == (0, before)
        assert (await two.run(FORK))[0] == BLOCK, "of the tenant's own"
        await asked


async def test_nor_what_was_evicted(model: Path) -> None:
    async with serving(model, TWO, "one", "two", "root") as (one, two, root):
        before = await two.probe(IDS)
        await one.run(IDS)
        assert (await root.ask("/v1/cache/reset", {})).json()["blocks_emptied"] >= 3
        assert await two.probe(IDS) == before
        report = await one.probe(IDS)
        assert (report["reason"], report["eviction_cause"]) == ("evicted", "reset")
        assert (await two.run(IDS))[1] == before


async def test_a_share_group_reuses_and_is_not_told_whose_text_it_is(model: Path) -> None:
    named = (member("a", "ka", "team"), member("b", "kb", "team"), member("c", "kc"))
    settings = ServerSettings(named_tenants=named)
    async with serving(model, settings, "ka", "kb", "kc") as (a, b, c):
        await a.run(IDS)
        assert (await b.run(IDS))[0] == 3 * BLOCK and (await c.run(IDS))[0] == 0
        own, others = await a.probe(FORK), await b.probe(FORK)
        assert (own["reason"], own["reused_tokens"], own["at_token"]) == ("diverged", BLOCK, BLOCK + 4)
        assert own["cached_text"] and own["prompt_text"] and own["cached_text"] != own["prompt_text"]
        assert others["reason"] != "other_salt" and others["reused_tokens"] == BLOCK
        assert others["cached_text"] is None and others["prompt_text"] is None


async def test_share_cache_is_one_cache(model: Path) -> None:
    settings = ServerSettings(api_keys=("one", "two"), share_cache=True)
    async with serving(model, settings, "one", "two") as (one, two):
        await one.run(IDS)
        assert (await two.run(IDS))[0] == 3 * BLOCK
        assert (await two.probe(FORK))["cached_text"] is None


async def test_a_salt_splits_within_a_tenant(model: Path) -> None:
    async with serving(model, TWO, "one", "two") as (one, two):
        await one.run(IDS, cache_salt="s")
        for report in (await one.probe(IDS), await one.probe(IDS, cache_salt="t")):
            assert (report["reason"], report["reused_tokens"]) == ("other_salt", 0)
            assert "cache_salt" in report["message"] and report["cached_text"] is None
        assert (await one.run(IDS, cache_salt="s"))[0] == 3 * BLOCK
        for salt in ({}, {"cache_salt": "s"}, {"cache_salt": "t"}):
            assert (await two.probe(IDS, **salt))["reason"] == "never_seen"
        assert (await two.run(IDS, cache_salt="s"))[0] == 0


async def test_without_keys_a_salt_splits_too(model: Path) -> None:
    async with serving(model, ServerSettings(), "") as (one,):
        await one.run(IDS)
        cached, report = await one.run(IDS, cache_salt="s")
        assert (cached, report["reason"]) == (0, "other_salt")
        assert (await one.run(IDS))[0] == 3 * BLOCK


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_is_explained_by_message(model: Path, stream: bool) -> None:
    talk = [
        {"role": "system", "content": "You answer in very few words, and never in more than one line."},
        {"role": "user", "content": "What is a KV cache?"},
    ]
    async with serving(model, TWO, "one", "two") as (one, two):
        body = {"messages": talk, "max_tokens": 1, "explain_cache": True, "stream": stream}

        async def report(caller: Caller) -> Any:
            reply = await caller.ask(CHAT, body)
            events = frames(reply.text) if stream else [reply.json()]
            return next(event["cache"][0] for event in events if "cache" in event)

        first, second, other = await report(one), await report(one), await report(two)
        assert first == other, "another tenant's run changes nothing"
        assert [m["reused_tokens"] for m in first["messages"]] == [0, 0]
        assert all(m["tokens"] > 0 for m in first["messages"])
        assert second["reused_tokens"] >= BLOCK and second["messages"][0]["reused_tokens"] > 0
        probed = (await one.ask(PROBE, {"messages": talk})).json()["cache"][0]
        assert probed == second


async def test_the_admin_sees_whose_blocks_they_are(model: Path) -> None:
    async with serving(model, TWO, "one", "two", "root") as (one, two, root):
        await one.run(IDS)
        await two.run(IDS)
        reply = await root._http.get("/v1/cache?state=cached", headers=root._headers)
        blocks = reply.json()["data"]
        assert {block["tenant"] for block in blocks} == {"key-1", "key-2"}
        digests = [{b["digest"] for b in blocks if b["tenant"] == name} for name in ("key-1", "key-2")]
        assert digests[0] and not digests[0] & digests[1], "equal text of two tenants has nothing in common"
        text = (await root._http.get("/metrics", headers=root._headers)).text
        assert 'quire_tenant_kv_blocks{state="cached",tenant="key-1"}' in text
        assert 'cache_isolation="true"' in text.lower()
