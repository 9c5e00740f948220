"""Questions about the cache and watching the pool: what callers get, and what the engine does."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from engine.client import InProcessClient
from engine.client.questions import FRAMES_KEPT, PoolWatch, QuestionDesk
from engine.core import EngineCore
from engine.embedding import EmbeddingFacts
from engine.errors import ContextTooLong, EngineDead, InvalidRequest, RequestFailed
from engine.process import frames, loop
from engine.types import SamplingParams, TokenEvent
from engine.views import CacheReport, CacheScope, MissReason, PoolFrame
from tests.helpers.audit import check_core
from tests.helpers.fake_engine import INFO, ByteTokenizer, FakeCore
from tests.helpers.fake_executor import FakeExecutor, make_config
from tests.helpers.viewer import Viewer, numbers

DEADLINE_S = 10.0
FOREVER = list(b"forever")
ANN, BOB = CacheScope("ann", b"a"), CacheScope("bob", b"b")


@asynccontextmanager
async def serving(core: FakeCore | EngineCore) -> AsyncIterator[InProcessClient]:
    client = InProcessClient(core, INFO, ByteTokenizer())
    await client.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield client
    finally:
        await client.stop()


def run(test: Callable[[InProcessClient, FakeCore], Awaitable[None]]) -> FakeCore:
    core = FakeCore()

    async def main() -> None:
        async with serving(core) as client:
            await test(client, core)

    asyncio.run(main())
    return core


def run_real(test: Callable[[InProcessClient, EngineCore], Awaitable[None]], **options: int) -> None:
    """With a real core and scheduler on a fake executor."""
    config = make_config(**{"num_blocks": 65, **options})  # type: ignore[arg-type]
    core = EngineCore(config, FakeExecutor(config))

    async def main() -> None:
        async with serving(core) as client:
            await test(client, core)
            await client.stop()
        check_core(core)

    asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def events(stream: AsyncIterator[TokenEvent]) -> list[TokenEvent]:
    return [event async for event in stream]


class TestSubmit:
    def test_the_scope_reaches_the_engine(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            await events(client.submit("a", list(b"say x"), SamplingParams(), ANN))
            await events(client.submit("b", list(b"say x"), SamplingParams()))

        assert run(test).scopes == [ANN, CacheScope()]

    def test_each_choices_first_event_has_the_report(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            found = await events(client.submit("a", list(b"say xyz"), SamplingParams(n=2), explain=True))
            for index in range(2):
                first, *rest = (event for event in found if event.index == index)
                assert first.cache == CacheReport(7, 2, MissReason.NEVER_SEEN, 2)
                assert not any(event.cache for event in rest)
            plain = await events(client.submit("b", list(b"say xyz"), SamplingParams()))
            assert not any(event.cache for event in plain)

        run(test)

    def test_tenants_of_different_salts_never_share(self) -> None:
        async def test(client: InProcessClient, core: EngineCore) -> None:
            params = SamplingParams(max_tokens=2, ignore_eos=True)
            told = []
            for name, scope in enumerate([ANN, BOB, ANN, BOB]):
                first, *_ = await events(client.submit(str(name), range(2, 12), params, scope, explain=True))
                assert first.cache is not None
                told.append((first.cached_tokens, first.cache.reused_tokens))
            assert told == [(0, 0), (0, 0), (8, 8), (8, 8)]
            await until(lambda: client.snapshot().requests_finished.get("length") == 4)
            assert {name: use.hit_tokens for name, use in client.snapshot().tenants.items()} == {
                "ann": 8,
                "bob": 8,
            }

        run_real(test)


class TestQuestions:
    def test_they_are_answered(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            report = await client.probe_cache([1, 2], ANN)
            assert (report.reason, report.cached_ids) == (MissReason.DIVERGED, (5, 6))
            await events(client.submit("a", list(b"say x"), SamplingParams()))
            page = await client.cache_page(1, 5, "cached")
            assert [view.owner for view in page.blocks] == ["1"]
            detail = await client.cache_block(1)
            assert detail is not None and detail.token_ids == (1, 2)
            assert await client.cache_block(77) is None
            assert await client.reset_cache() == 1
            assert core.questions == [
                ("probe", (1, 2), ANN),
                ("page", 1, 5, "cached"),
                ("block", 1),
                ("block", 77),
            ]

        run(test)

    def test_they_do_not_wait_for_requests(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            stream = client.submit("a", FOREVER, SamplingParams())
            await anext(stream)
            pages = await asyncio.gather(*(client.cache_page() for _ in range(20)))
            assert all(len(page.blocks) == 1 for page in pages)
            assert not core.aborted
            client.abort("a")

        run(test)

    def test_many_of_them_hold_up_no_step_and_no_abort(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop, "ANSWERS_S", 0.0)

        async def test(client: InProcessClient, core: FakeCore) -> None:
            steps: list[int] = []
            heard: list[bool] = []
            probe = core.probe

            def counted(prompt_ids: Sequence[int], scope: CacheScope) -> CacheReport:
                steps.append(core._steps)
                heard.append(bool(core.aborted))
                return probe(prompt_ids, scope)

            monkeypatch.setattr(core, "probe", counted)
            streams = [client.submit(name, FOREVER, SamplingParams()) for name in "ab"]
            for stream in streams:
                await anext(stream)
            core.gate.clear()
            asked = [asyncio.ensure_future(client.probe_cache([1])) for _ in range(20)]
            await asyncio.sleep(0)
            client.abort("a")
            core.gate.set()
            await asyncio.gather(*asked)
            assert len(set(steps)) == 20, "a step after each"
            assert all(heard[1:]), "the abort was sent last and is heard before them"
            client.abort("b")

        run(test)

    def test_one_that_fails_harms_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            stream = client.submit("a", FOREVER, SamplingParams())
            await anext(stream)
            with pytest.raises(RequestFailed, match="could not answer"):
                await client.probe_cache(list(b"crash"))
            with pytest.raises(RequestFailed, match="no such state"):
                await client.cache_page(state="odd")
            assert (await anext(stream)).text and client.health() is None
            client.abort("a")

        run(test)
        assert "crashed as asked" in caplog.text

    @pytest.mark.parametrize(
        ("prompt", "error"), [([], InvalidRequest), ([999], InvalidRequest), ([1] * 5000, ContextTooLong)]
    )
    def test_a_probe_is_refused_as_a_request_would_be(
        self, prompt: list[int], error: type[Exception]
    ) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            with pytest.raises(error):
                await client.probe_cache(prompt)
            assert not core.questions

        run(test)

    def test_a_model_that_writes_no_text_is_probed_all_the_same(self) -> None:
        async def main() -> None:
            info = replace(INFO, embeddings=EmbeddingFacts(8, only=True))
            client = InProcessClient(FakeCore(), info, ByteTokenizer())
            await client.start()
            try:
                assert (await client.probe_cache([1, 2], ANN)).reason is MissReason.DIVERGED
                with pytest.raises(InvalidRequest, match="embeddings only"):
                    client.submit("a", list(b"say x"), SamplingParams())
            finally:
                await client.stop()

        asyncio.run(main())

    def test_a_dead_engine_answers_nobody(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            stream = client.submit("a", list(b"crash"), SamplingParams())
            with pytest.raises(EngineDead):
                await events(stream)
            for question in (client.probe_cache([1]), client.cache_page(), client.reset_cache()):
                with pytest.raises(EngineDead):
                    await question

        run(test)

    def test_whoever_waits_when_it_dies_is_told(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            core.gate.clear()
            stream = client.submit("a", list(b"crash"), SamplingParams())
            await until(lambda: core.added)
            asked = asyncio.ensure_future(client.cache_page())
            await asyncio.sleep(0)
            core.gate.set()
            with pytest.raises(EngineDead):
                await asked
            with pytest.raises(EngineDead):
                await events(stream)

        run(test)

    def test_whoever_stops_waiting_leaves_nothing_behind(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            core.gate.clear()
            stream = client.submit("a", FOREVER, SamplingParams())
            await until(lambda: core.added)
            asked = asyncio.ensure_future(client.cache_page())
            await asyncio.sleep(0)
            asked.cancel()
            await asyncio.wait([asked])
            core.gate.set()
            await anext(stream)
            assert not client._desk._asked
            client.abort("a")

        run(test)

    def test_a_number_leads_to_the_live_request(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            stream = client.submit("public-name", FOREVER, SamplingParams())
            await anext(stream)
            number = core.added[0]
            assert client.public_id(number) == "public-name"
            client.abort("public-name")
            await events(stream)
            assert client.public_id(number) == client.public_id("77") == ""

        run(test)


class TestWatching:
    def test_all_of_it_first_then_what_changes_and_nothing_while_idle(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            watch = client.watch_pool()
            viewer = Viewer()
            viewer.apply(await anext(watch))
            assert viewer.rows["owners"] == [0]
            await events(client.submit("a", list(b"say x"), SamplingParams()))
            while len(viewer.rows["owners"]) == 1:
                frame = await anext(watch)
                assert not frame.full
                if frame.ids:
                    assert (numbers(frame.ids), numbers(frame.owners)) == ([1], [1])
                    break
            made = core._frames
            await asyncio.sleep(2.5 * loop.FRAME_INTERVAL_S)
            assert core._frames <= made + 1, "an idle pool is not shown again and again"
            await watch.aclose()  # type: ignore[attr-defined]

        run(test)

    def test_frames_add_up_to_the_pool_under_load(self) -> None:
        async def test(client: InProcessClient, core: EngineCore) -> None:
            watch, viewer = client.watch_pool(), Viewer()
            params = SamplingParams(max_tokens=6, ignore_eos=True)
            streams = [
                asyncio.ensure_future(
                    events(client.submit(str(i), [2 + i % 7] * (5 + i), params, ANN if i % 2 else BOB))
                )
                for i in range(16)
            ]
            await asyncio.gather(*streams)
            await until(lambda: not core.has_work)
            await client.reset_cache()
            page = await client.cache_page(state="free")
            assert len(page.blocks) == 64
            while not viewer.rows or any(viewer.rows["kept"]) or any(viewer.rows["refs"]):
                viewer.apply(await anext(watch))
            viewer.expect(core.kv.pool)
            assert viewer.last is not None and set(viewer.last.tenant_names) == {"", "ann", "bob"}

        run_real(test)

    def test_a_second_watcher_has_all_of_it_sent_to_all(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            first = client.watch_pool()
            assert (await anext(first)).full
            second = client.watch_pool()
            assert (await anext(second)).full
            assert (await anext(first)).full
            await first.aclose()  # type: ignore[attr-defined]
            await client.cache_page()
            assert core.watched
            await second.aclose()  # type: ignore[attr-defined]
            await until(lambda: not core.watched)

        run(test)

    def test_a_forgotten_watcher_is_gone(self) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            watch = client.watch_pool()
            await anext(watch)
            del watch
            gc.collect()
            await until(lambda: not core.watched)

        run(test)

    @pytest.mark.parametrize("how", ["stop", "crash"])
    def test_it_ends_with_the_engine(self, how: str) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            watch = client.watch_pool()
            await anext(watch)
            if how == "stop":
                await client.stop()
            else:
                stream = client.submit("a", list(b"crash"), SamplingParams())
                with pytest.raises(EngineDead):
                    await events(stream)
            rest = [frame async for frame in watch]
            assert not any(frame.full for frame in rest)
            assert [frame async for frame in client.watch_pool()] == []

        run(test)

    def test_a_pool_that_cannot_be_shown_still_serves(self, caplog: pytest.LogCaptureFixture) -> None:
        async def test(client: InProcessClient, core: FakeCore) -> None:
            def broken(full: bool) -> PoolFrame:
                raise RuntimeError("no picture")

            core.frame = broken  # type: ignore[method-assign]
            watch = client.watch_pool()
            assert len(await events(client.submit("a", list(b"say x"), SamplingParams()))) >= 1
            await until(lambda: "could not be shown" in caplog.text)
            assert client.health() is None
            await watch.aclose()  # type: ignore[attr-defined]

        run(test)


def frame(sequence: int, *, full: bool = False) -> PoolFrame:
    return PoolFrame(sequence, full, 0, (), *[b""] * 9)


class TestSlowWatchers:
    """The desk alone: what is sent is collected."""

    def start(self) -> tuple[QuestionDesk, PoolWatch, list[frames.Watch]]:
        sent: list[frames.Watch] = []
        desk = QuestionDesk(sent.append, lambda: None)  # type: ignore[arg-type]
        return desk, desk.watch(), sent

    def test_changes_without_a_beginning_are_not_kept(self) -> None:
        async def main() -> None:
            desk, watch, _ = self.start()
            desk.receive(frames.Pool(frame(6)))
            desk.receive(frames.Pool(frame(7, full=True)))
            desk.receive(frames.Pool(frame(8)))
            assert [(await anext(watch)).sequence for _ in range(2)] == [7, 8]
            await watch.aclose()

        asyncio.run(main())

    def test_whoever_is_too_slow_begins_again(self) -> None:
        async def main() -> None:
            desk, watch, sent = self.start()
            desk.receive(frames.Pool(frame(0, full=True)))
            for number in range(1, 1000):
                desk.receive(frames.Pool(frame(number)))
                assert len(watch._frames) <= FRAMES_KEPT
            assert len(sent) == 1, "nothing is asked for while nobody reads"
            reading = asyncio.ensure_future(anext(watch))
            await asyncio.sleep(0)
            assert sent == [frames.Watch(True)] * 2
            desk.receive(frames.Pool(frame(1000)))
            desk.receive(frames.Pool(frame(1001, full=True)))
            assert (await reading).sequence == 1001
            await watch.aclose()
            assert sent[-1] == frames.Watch(False)

        asyncio.run(main())

    def test_a_full_frame_replaces_what_waits(self) -> None:
        async def main() -> None:
            desk, watch, _ = self.start()
            for number in (0, 1, 2):
                desk.receive(frames.Pool(frame(number, full=number != 1)))
            assert [waiting.sequence for waiting in watch._frames] == [2]
            await watch.aclose()

        asyncio.run(main())
