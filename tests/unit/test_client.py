"""The client's promises, with a scripted core on a thread: what callers get, and what the engine is told."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import ClassVar

import pytest

from engine.client import InProcessClient, check_request
from engine.errors import ContextTooLong, Draining, EngineDead, InvalidRequest, NeverFits, Overloaded
from engine.types import FinishReason, SamplingParams, TokenEvent
from tests.helpers.fake_engine import END, INFO, ByteTokenizer, FakeCore

DEADLINE_S = 5.0


@asynccontextmanager
async def serving(
    core: FakeCore | None = None, tokenizer: ByteTokenizer | None = None
) -> AsyncIterator[InProcessClient]:
    client = InProcessClient(core or FakeCore(), INFO, tokenizer or ByteTokenizer())
    await client.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield client
    finally:
        await client.stop()


def run(
    test: Callable[[InProcessClient, FakeCore], Awaitable[None]], tokenizer: ByteTokenizer | None = None
) -> FakeCore:
    core = FakeCore()

    async def main() -> None:
        async with serving(core, tokenizer) as client:
            await test(client, core)

    asyncio.run(main())
    return core


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def collect(stream: AsyncIterator[TokenEvent], index: int = 0) -> tuple[str, TokenEvent]:
    """One choice's text and last event."""
    events = [event async for event in stream]
    mine = [event for event in events if event.index == index]
    assert [event.finish_reason is not None for event in mine] == [False] * (len(mine) - 1) + [True]
    return "".join(event.text for event in mine), mine[-1]


def say(text: str) -> list[int]:
    return list(b"say " + text.encode())


def test_text_and_end() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        events = [event async for event in client.submit("a", say("héllo 😀"), SamplingParams(logprobs=0))]
        assert "".join(event.text for event in events) == "héllo 😀"
        ids = [token_id for event in events for token_id in event.token_ids]
        assert ids == [*"héllo 😀".encode(), END]
        assert [entry.token_id for event in events for entry in event.logprobs] == ids
        assert all(event.cached_tokens == 2 for event in events)
        assert events[-1].finish_reason is FinishReason.STOP
        assert client.health() is None
        await until(lambda: client.snapshot().generated_tokens == len(ids))

    run(test)


def test_choices_are_interleaved_and_each_ends_once() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        stream = client.submit("a", say("xyz"), SamplingParams(n=3))
        events = [event async for event in stream]
        for index in range(3):
            mine = [event for event in events if event.index == index]
            assert "".join(event.text for event in mine) == "xyz"
            assert [event.finish_reason for event in mine].count(FinishReason.STOP) == 1

    run(test)


@pytest.mark.parametrize(("include", "shown"), [(False, "ab"), (True, "abca")])
def test_a_stop_string_ends_the_choice_in_the_engine_too(include: bool, shown: str) -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        params = SamplingParams(stop=("zz", "ca"), include_stop_str_in_output=include)
        text, last = await collect(client.submit("a", list(b"forever"), params))
        assert text == shown
        assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, "ca")
        await until(lambda: core.aborted == [(core.added[0], 0)] and not core.has_work)

    run(test)


def test_min_tokens_delays_stop_strings() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        text, _ = await collect(
            client.submit("a", list(b"forever"), SamplingParams(stop=("b",), min_tokens=4))
        )
        assert text == "abca"

    run(test)


def test_held_back_text_is_shown_at_the_end() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        text, last = await collect(client.submit("a", say("it is </"), SamplingParams(stop=("</s>",))))
        assert text == "it is </"
        assert last.stop_reason is None

    run(test)


def test_a_cut_character_is_replaced_at_the_end_only() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        text, last = await collect(client.submit("a", say("a😀"), SamplingParams(max_tokens=3)))
        assert text == "a\ufffd"
        assert last.finish_reason is FinishReason.LENGTH

    run(test)


def test_no_tokens_at_all() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        text, last = await collect(client.submit("a", say("x"), SamplingParams(max_tokens=0)))
        assert (text, last.token_ids, last.finish_reason) == ("", (), FinishReason.LENGTH)

    run(test)


def test_tokens_that_wait_are_one_event() -> None:
    """A slow reader gets everything that waits in one event, in order."""

    async def test(client: InProcessClient, core: FakeCore) -> None:
        stream = client.submit("a", say("hello"), SamplingParams())
        await until(lambda: client.snapshot().running == 0 and client.snapshot().steps >= 6)
        events = [event async for event in stream]
        assert len(events) == 1
        assert events[0].text == "hello"
        assert len(events[0].token_ids) == 6

    run(test)


def test_special_tokens_on_request() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
        assert (await collect(client.submit("a", say("x"), params)))[0] == "x<end>"
        params = SamplingParams(skip_special_tokens=False)
        assert (await collect(client.submit("a", say("x"), params)))[0] == "x"
        params = SamplingParams(include_stop_str_in_output=True)
        assert (await collect(client.submit("a", say("x"), params)))[0] == "x"
        params = SamplingParams(include_stop_str_in_output=True, shown_token_ids=(END,))
        assert (await collect(client.submit("a", say("x"), params)))[0] == "x<end>"

    run(test)


def test_one_requests_fault_is_its_own() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        good = client.submit("good", say("fine"), SamplingParams())
        bad = client.submit("bad", list(b"error"), SamplingParams())
        refused = client.submit("refused", list(b"refuse"), SamplingParams(n=2))
        assert (await collect(good))[0] == "fine"
        _, last = await collect(bad)
        assert (last.finish_reason, last.error) == (FinishReason.ERROR, "its own fault")
        assert (await collect(refused, 1))[1].error == "refused by the core"

    run(test)


def test_a_fault_in_making_text_is_the_requests_own(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ByteTokenizer):
        byte_table: ClassVar = [*ByteTokenizer.byte_table[:-1], None]

    async def test(client: InProcessClient, core: FakeCore) -> None:
        params = SamplingParams(skip_special_tokens=False)
        good = client.submit("good", say("fine"), params)
        bad = client.submit("bad", list(b"control"), params)
        assert (await collect(good))[0] == "fine"
        assert (await collect(bad))[1].finish_reason is FinishReason.ERROR
        await until(lambda: core.aborted == [(core.added[1], 0)])

    run(test, Broken())
    assert "could not be turned into text" in caplog.text


def test_abort_ends_the_iterator_and_the_work() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        stream = client.submit("a", list(b"forever"), SamplingParams(n=2))
        await anext(stream)
        client.abort("a")
        client.abort("unknown")
        rest = [event async for event in stream]
        assert [event.finish_reason for event in rest if event.finish_reason] == [FinishReason.ABORT] * 2
        await until(lambda: not core.has_work)
        again = client.submit("a", say("same id"), SamplingParams())
        assert (await collect(again))[0] == "same id"

    run(test)


@pytest.mark.parametrize("how", ["aclose", "cancel", "forget"])
def test_leaving_early_aborts(how: str) -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        stream = client.submit("a", list(b"forever"), SamplingParams())
        await anext(stream)
        if how == "aclose":
            await stream.aclose()  # type: ignore[attr-defined]
            assert [event async for event in stream] == []
        elif how == "cancel":
            core.gate.clear()
            task = asyncio.ensure_future(collect(stream))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            core.gate.set()
        else:
            del stream
            gc.collect()
        await client.drained()
        await until(lambda: core.aborted and not core.has_work)

    run(test)


def test_live_ids_are_unique() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        first = client.submit("a", list(b"forever"), SamplingParams())
        with pytest.raises(InvalidRequest, match="already running"):
            client.submit("a", say("x"), SamplingParams())
        client.abort("a")
        await collect(first)

    run(test)


def test_overload_says_when_to_come_back() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        streams = [client.submit(str(i), list(b"forever"), SamplingParams(n=4)) for i in range(4)]
        with pytest.raises(Overloaded) as refused:
            client.submit("x", say("x"), SamplingParams())
        assert 1.0 <= refused.value.retry_after_s <= 60.0
        client.abort("0")
        await collect(client.submit("x", say("x"), SamplingParams()))
        for i in range(1, 4):
            client.abort(str(i))
        for stream in streams:
            await collect(stream)
        await client.drained()

    run(test)


def test_draining_refuses_and_finishes() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        stream = client.submit("a", say("to the end"), SamplingParams())
        client.start_draining()
        with pytest.raises(Draining):
            client.submit("b", say("x"), SamplingParams())
        assert (await collect(stream))[0] == "to the end"
        await client.drained()

    run(test)


def test_a_dead_engine_ends_every_stream(caplog: pytest.LogCaptureFixture) -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        stream = client.submit("a", list(b"forever"), SamplingParams())
        await anext(stream)
        crash = client.submit("b", list(b"crash"), SamplingParams())
        for each in (stream, crash):
            with pytest.raises(EngineDead):
                await collect(each)
        assert client.health() is not None
        with pytest.raises(EngineDead):
            client.submit("c", say("x"), SamplingParams())

    run(test)
    assert "crashed as asked" in caplog.text


def test_running_out_of_memory_once_is_survived() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        assert (await collect(client.submit("a", list(b"oom"), SamplingParams())))[0] == "survived"

    run(test)


def test_running_out_of_memory_twice_fails_the_requests() -> None:
    async def test(client: InProcessClient, core: FakeCore) -> None:
        core._ooms = -1
        _, last = await collect(client.submit("a", list(b"oom"), SamplingParams()))
        assert last.error == "The engine ran out of memory."
        assert client.health() is None

    run(test)


def test_a_step_without_end_is_unhealthy() -> None:
    async def main() -> None:
        core = FakeCore()
        client = InProcessClient(core, INFO, ByteTokenizer(), step_timeout_s=0.05)
        await client.start()
        core.gate.clear()
        stream = client.submit("a", say("x"), SamplingParams())
        async with asyncio.timeout(DEADLINE_S):
            await until(lambda: "step" in (client.health() or ""))
            core.gate.set()
            await collect(stream)
        await client.stop()

    asyncio.run(main())


def ids(count: int) -> list[int]:
    return [1] * count


@pytest.mark.parametrize(
    ("prompt_ids", "params", "error", "message"),
    [
        ([], SamplingParams(), InvalidRequest, "empty"),
        ([-1], SamplingParams(), InvalidRequest, "vocabulary"),
        ([INFO.vocab_size], SamplingParams(), InvalidRequest, "vocabulary"),
        ([2**40], SamplingParams(), InvalidRequest, "vocabulary"),
        ([1], SamplingParams(stop_token_ids=(999,)), InvalidRequest, "stop_token_ids"),
        ([1], SamplingParams(logit_bias={999: 1.0}), InvalidRequest, "logit_bias"),
        ([1], SamplingParams(n=INFO.max_num_seqs + 1), InvalidRequest, "n is 9"),
        (ids(4000), SamplingParams(max_tokens=97), ContextTooLong, "4000.*97.*4096"),
        (ids(4096), SamplingParams(), ContextTooLong, "4096"),
        (ids(2000), SamplingParams(max_tokens=49), NeverFits, "2048"),
        (ids(2048), SamplingParams(), NeverFits, "2048"),
    ],
)
def test_what_can_never_work_is_refused(
    prompt_ids: list[int], params: SamplingParams, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_request(INFO, prompt_ids, params)


@pytest.mark.parametrize(("count", "max_tokens"), [(1, None), (2047, None), (2000, 48), (2048, 0)])
def test_what_just_fits_is_taken(count: int, max_tokens: int | None) -> None:
    check_request(INFO, ids(count), SamplingParams(max_tokens=max_tokens))
