"""/v1/cache around a FakeClient: probing, explaining, pages of the pool, resetting."""

from __future__ import annotations

from typing import Any

import pytest

from engine.views import CacheReport, MissReason
from server.settings import ServerSettings
from tests.helpers.fake_client import FakeClient
from tests.helpers.http import CHAT, COMPLETIONS, HELLO, frames, in_process

pytestmark = pytest.mark.anyio

PROBE = "/v1/cache/probe"
LONG = "a prompt of a few blocks, so that something can be shared. "


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class TestExplain:
    async def test_only_when_asked(self) -> None:
        async with in_process() as (http, _):
            for path, body in ((CHAT, {"messages": HELLO}), (COMPLETIONS, {"prompt": "a"})):
                for extra in ({}, {"explain_cache": False}, {"explain_cache": None}):
                    assert "cache" not in (await http.post(path, json={**body, **extra})).json()
                    stream = await http.post(path, json={**body, **extra, "stream": True})
                    assert not any("cache" in chunk for chunk in frames(stream.text))

    async def test_a_report_for_each_prompt_in_their_order(self) -> None:
        async with in_process() as (http, _):
            await http.post(COMPLETIONS, json={"prompt": LONG})
            body = {"prompt": ["x", LONG, LONG + "and more of it, again a few blocks long"], "n": 2}
            reply = (await http.post(COMPLETIONS, json={**body, "explain_cache": True})).json()
        reports = reply["cache"]
        assert [report["prompt"] for report in reports] == [0, 1, 2]
        assert [report["prompt_tokens"] for report in reports] == [1, 59, 98]
        assert [report["reused_tokens"] for report in reports] == [0, 48, 48]
        assert (
            sum(r["reused_tokens"] for r in reports)
            == reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        )
        assert all(r["messages"] is None and r["block_size"] == 16 for r in reports)

    @pytest.mark.parametrize("n", [1, 3])
    async def test_a_stream_says_it_in_the_first_chunk_of_each_prompts_first_choice(self, n: int) -> None:
        body = {"prompt": ["x", LONG], "n": n, "stream": True, "explain_cache": True}
        async with in_process() as (http, _):
            chunks = frames((await http.post(COMPLETIONS, json=body)).text)
        told = [chunk for chunk in chunks if "cache" in chunk]
        assert sorted(chunk["choices"][0]["index"] for chunk in told) == [0, n]
        for chunk in told:
            choice = chunk["choices"][0]["index"]
            assert [report["prompt"] for report in chunk["cache"]] == [choice // n]
            assert chunk is next(c for c in chunks if c["choices"][0]["index"] == choice)

    @pytest.mark.parametrize(
        "extra", [{}, {"logprobs": 2, "echo": True}, {"stream_options": {"include_usage": True}}], ids=str
    )
    async def test_chunks_are_otherwise_the_same(self, extra: dict[str, Any]) -> None:
        body = {"prompt": LONG, "stream": True, **extra}
        async with in_process() as (http, _):
            await http.post(COMPLETIONS, json=body)
            plain = frames((await http.post(COMPLETIONS, json=body)).text)
            told = frames((await http.post(COMPLETIONS, json={**body, "explain_cache": True})).text)
        assert told[0].pop("cache")[0]["prompt_tokens"] == 59
        for chunk in (*plain, *told):
            del chunk["id"], chunk["created"]
        assert told == plain

    async def test_a_first_token_without_text_does_not_lose_it(self) -> None:
        client = FakeClient(lambda ids, params, index: "ö!")  # the first event is half a character
        body = {"prompt": "x", "stream": True, "explain_cache": True}
        async with in_process(client) as (http, _):
            chunks = frames((await http.post(COMPLETIONS, json=body)).text)
        assert chunks[0]["choices"][0]["text"] == "ö" and "cache" in chunks[0]

    async def test_chat_counts_by_message(self) -> None:
        messages = [
            {"role": "system", "content": "s" * 30},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "and now?"},
        ]
        async with in_process() as (http, _):
            await http.post(CHAT, json={"messages": messages[:2]})
            for stream in (False, True):
                body = {"messages": messages, "explain_cache": True, "stream": stream}
                reply = await http.post(CHAT, json=body)
                (report,) = (frames(reply.text)[1] if stream else reply.json())["cache"]
                assert [m["tokens"] for m in report["messages"]] == [30, 5, 0, 8]
                assert [m["role"] for m in report["messages"]] == ["system", "user", "assistant", "user"]
                reused = [m["reused_tokens"] for m in report["messages"]]
                assert reused == ([30, 5, 0, 6] if stream else [30, 0, 0, 0])

    @pytest.mark.parametrize("value", ["true", "1", "TRUE", " true "])
    async def test_the_header_asks_too(self, value: str) -> None:
        async with in_process() as (http, _):
            headers = {"x-quire-explain-cache": value}
            reply = await http.post(CHAT, json={"messages": HELLO}, headers=headers)
            assert len(reply.json()["cache"]) == 1
            off = await http.post(CHAT, json={"messages": HELLO}, headers={"x-quire-explain-cache": "false"})
            assert "cache" not in off.json()

    @pytest.mark.parametrize("sent", [["yes"], [""], ["true", "false"], ["true,true"]], ids=str)
    async def test_other_headers_are_refused(self, sent: list[str]) -> None:
        async with in_process() as (http, client):
            headers = [("x-quire-explain-cache", value) for value in sent]
            reply = await http.post(CHAT, json={"messages": HELLO}, headers=headers)
            assert reply.status_code == 400 and not client.submitted
            assert reply.json()["error"]["param"] == "x-quire-explain-cache"


class TestProbe:
    async def test_it_says_what_a_request_would_be_told(self) -> None:
        messages = [{"role": "user", "content": LONG}]
        async with in_process() as (http, client):
            for body, path in (({"messages": messages}, CHAT), ({"prompt": LONG}, COMPLETIONS)):
                for _ in range(2):
                    probed = (await http.post(PROBE, json=body)).json()
                    run = (await http.post(path, json={**body, "explain_cache": True})).json()
                    assert probed["cache"] == run["cache"]
                    assert (probed["object"], probed["model"]) == ("cache.probe", "quire-demo")
            assert [ids for ids, _ in client.probed] == [ids for _, ids, _ in client.submitted]

    async def test_nothing_runs_and_nothing_counts(self) -> None:
        async with in_process() as (http, client):
            assert (await http.post(PROBE, json={"prompt": ["a", "b"]})).status_code == 200
            assert not client.submitted and client.snapshot().prefix_queries == 0
            text = (await http.get("/metrics")).text
        assert 'quire_requests_received_total{api="completions"} 0.0' in text

    async def test_forms_of_a_prompt(self) -> None:
        async with in_process() as (http, client):
            for prompt, count in (("ab", 1), ([1, 2], 1), (["ab", "c"], 2), ([[1], [2], [3]], 3)):
                reply = (await http.post(PROBE, json={"prompt": prompt})).json()
                assert [report["prompt"] for report in reply["cache"]] == list(range(count))
            assert [ids for ids, _ in client.probed[:2]] == [[97, 98], [1, 2]]

    async def test_the_fields_of_a_chat_prompt(self) -> None:
        async with in_process() as (http, client):
            await http.post(PROBE, json={"messages": HELLO, "add_generation_prompt": False})
            assert client.probed[-1][0][-1] == 259, "no assistant turn was begun"
            known = {"messages": HELLO, "model": "quire-demo", "cache_salt": "s", "temperature": 0}
            reply = await http.post(PROBE, json=known)
            assert reply.status_code == 200
            assert reply.headers["x-quire-warnings"] == "ignored fields: temperature"
            assert len(client.probed[-1][1].salt) == 32

    @pytest.mark.parametrize("reason", MissReason)
    async def test_every_reason_is_told(self, reason: MissReason) -> None:
        client = FakeClient()
        client.report = CacheReport(40, 16, reason, 20)
        async with in_process(client) as (http, _):
            (report,) = (await http.post(PROBE, json={"prompt": "x" * 40})).json()["cache"]
        assert (report["reason"], report["at_token"], report["computed_tokens"]) == (reason.value, 20, 24)


class TestPool:
    async def test_pages(self) -> None:
        async with in_process() as (http, _):
            await http.post(COMPLETIONS, json={"prompt": LONG})
            whole = (await http.get("/v1/cache")).json()
            assert whole["object"] == "cache" and whole["next_block"] is None
            assert (whole["block_size"], whole["num_blocks"], len(whole["data"])) == (16, 512, 512)
            counts = whole["blocks"]
            assert counts == {"in_use": 0, "shared": 0, "cached": 4, "free": 508}
            assert whole["tokens_held"] == 0
            pages, at = [], 1
            while at:
                page = (await http.get(f"/v1/cache?first_block={at}&limit=100")).json()
                pages += page["data"]
                at = page["next_block"]
            assert [b["block_id"] for b in pages] == [b["block_id"] for b in whole["data"]]
            cached = (await http.get("/v1/cache?state=cached&limit=3")).json()
            assert [b["state"] for b in cached["data"]] == ["cached"] * 3 and cached["next_block"] == 4

    async def test_live_requests_have_their_public_names(self) -> None:
        async with in_process() as (http, client):
            client.gate.clear()
            stream = client.submit("chatcmpl-abc-0", list(LONG.encode()), _params())
            (block, *_) = (await http.get("/v1/cache?limit=1")).json()["data"]
            assert block["owner"] == "chatcmpl-abc-0" and block["holders"] == ["chatcmpl-abc-0"]
            assert (block["state"], block["tokens"], block["idle_s"]) == ("in_use", 16, None)
            client.abort("chatcmpl-abc-0")
            client.gate.set()
            assert [event async for event in stream] == []
            (block, *_) = (await http.get("/v1/cache?limit=1")).json()["data"]
            assert (block["owner"], block["holders"], block["state"]) == ("", [], "cached")

    async def test_a_blocks_text(self) -> None:
        async with in_process() as (http, _):
            await http.post(COMPLETIONS, json={"prompt": LONG})
            detail = (await http.get("/v1/cache/blocks/2")).json()
        assert detail["object"] == "cache.block" and detail["block"]["parent"] == 1
        assert detail["text"] == LONG[16:32] and detail["token_ids"] == list(LONG[16:32].encode())
        assert detail["children"] == [3]

    async def test_with_keys_nobody_sees_text(self) -> None:
        settings = ServerSettings(api_keys=("one",), admin_keys=("root",))
        headers = {"authorization": "Bearer root"}
        async with in_process(settings=settings) as (http, _):
            await http.post(COMPLETIONS, json={"prompt": LONG}, headers=headers)
            reply = await http.get("/v1/cache/blocks/1", headers=headers)
            assert reply.json()["block"]["tenant"] == "admin"
            assert reply.json()["text"] is None and reply.json()["token_ids"] is None
            assert "prompt" not in reply.text
            page = await http.get("/v1/cache", headers=headers)
            assert page.status_code == 200 and "token_ids" not in page.text

    async def test_reset(self) -> None:
        async with in_process() as (http, _):
            await http.post(COMPLETIONS, json={"prompt": LONG})
            for kwargs in ({}, {"json": {}}, {"content": b"whatever"}):
                reply = (await http.post("/v1/cache/reset", **kwargs)).json()  # type: ignore[arg-type]
                assert reply == {"object": "cache.reset", "blocks_emptied": 0 if kwargs else 4}
            (report,) = (await http.post(PROBE, json={"prompt": LONG})).json()["cache"]
            assert (report["reason"], report["eviction_cause"]) == ("evicted", "reset")
            assert "evicted" in report["message"] and report["evicted_seconds_ago"] < 60

    @pytest.mark.parametrize(
        ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
    )
    async def test_no_other_sites_page_can_reset(self, site: str, status: int) -> None:
        async with in_process() as (http, _):
            reply = await http.post("/v1/cache/reset", headers={"sec-fetch-site": site})
            assert reply.status_code == status


def _params() -> Any:
    from engine.types import SamplingParams

    return SamplingParams(max_tokens=4)


class TestPhases:
    CALLS = (
        ("POST", PROBE, {"prompt": "a"}),
        ("GET", "/v1/cache", None),
        ("GET", "/v1/cache/blocks/1", None),
        ("POST", "/v1/cache/reset", None),
        ("GET", "/v1/cache/events", None),
    )

    async def test_loading_and_draining(self) -> None:
        client = FakeClient()
        client.start_gate.clear()
        async with in_process(client, wait=False) as (http, _):
            for method, path, body in self.CALLS:
                reply = await http.request(method, path, json=body)
                assert reply.status_code == 503 and reply.json()["error"]["code"] == "loading", path
            client.start_gate.set()
            service = http._transport.app.state.service  # type: ignore[attr-defined]
            await service.started.wait()
            service.drain()
            for method, path, body in self.CALLS:
                reply = await http.request(method, path, json=body)
                assert reply.status_code == 503 and reply.json()["error"]["code"] == "shutting_down", path

    async def test_a_dead_engine(self) -> None:
        async with in_process() as (http, client):
            client.sickness = "gone"
            for method, path, body in self.CALLS[:-1]:
                reply = await http.request(method, path, json=body)
                assert reply.status_code == 503 and reply.json()["error"]["code"] == "engine_unavailable"


async def test_replies_match_their_description() -> None:
    from jsonschema import Draft202012Validator

    async with in_process() as (http, _):
        await http.post(COMPLETIONS, json={"prompt": LONG})
        document = (await http.get("/openapi.json")).json()
        page = (await http.get("/docs")).text
        calls = [
            ("post", PROBE, {"messages": HELLO}),
            ("get", "/v1/cache", None),
            ("get", "/v1/cache/blocks/{block_id}", None),
            ("post", "/v1/cache/reset", None),
            ("post", CHAT, {"messages": HELLO, "explain_cache": True}),
            ("post", COMPLETIONS, {"prompt": [LONG, "b"], "explain_cache": True, "cache_salt": "s"}),
        ]
        for method, path, body in calls:
            assert path in page
            operation = document["paths"][path][method]
            reply = await http.request(method.upper(), path.replace("{block_id}", "1"), json=body)
            assert reply.status_code == 200
            pairs = [(reply.json(), operation["responses"]["200"])]
            if "requestBody" in operation:
                pairs.append((body, operation["requestBody"]))
            for value, described in pairs:
                schema = described["content"]["application/json"]["schema"]
                Draft202012Validator({**schema, "components": document["components"]}).validate(value)
            assert ("text/event-stream" in operation["responses"]["200"]["content"]) == (
                path in (CHAT, COMPLETIONS)
            )
    assert "403" in document["paths"]["/v1/cache"]["get"]["responses"]
    assert [field["name"] for field in document["paths"]["/v1/cache"]["get"]["parameters"]] == [
        *("first_block", "limit", "state")
    ]
    for words in ("-X POST http", "state=cached", "curl -N", "cache_salt", "explain_cache", "<td>1000"):
        assert words in page.replace("<code>", ""), words
