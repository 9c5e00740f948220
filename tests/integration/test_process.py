"""The engine process against its faults: killed, stopped, stuck, silent, broken at start, orphaned."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.client import ProcessClient
from engine.client.supervised import Supervision
from engine.config import EngineOptions
from engine.errors import ConfigError, Draining, EngineDead, MemoryPlanError, RequestFailed
from engine.process import frames
from engine.types import FinishReason, SamplingParams, TokenEvent
from engine.views import CacheReport, CacheScope, MissReason
from tests.helpers.fake_engine import ByteTokenizer
from tests.helpers.viewer import Viewer, numbers

FACTORY = "tests.helpers.fake_engine:build"
DEADLINE_S = 20.0
ROOT = Path(__file__).resolve().parents[2]
FOREVER = list(b"forever")


def make(
    model: str = "fake",
    *,
    factory: str = FACTORY,
    progress: list[tuple[int, int]] | None = None,
    **limits: float,
) -> ProcessClient:
    return ProcessClient(
        EngineOptions(model),
        ByteTokenizer(),
        on_progress=None if progress is None else lambda done, total: progress.append((done, total)),
        factory=factory,
        supervision=Supervision(**{"backoff_s": 0.01, **limits}),  # type: ignore[arg-type]
    )


@asynccontextmanager
async def serving(client: ProcessClient) -> AsyncIterator[ProcessClient]:
    await client.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield client
    finally:
        pid = client.engine_pid
        await client.stop()
        assert pid is not None
        assert not alive(pid), "the engine outlived its client"


def run(
    test: Callable[[ProcessClient], Awaitable[None]],
    client: ProcessClient | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> None:
    async def main() -> None:
        async with serving(client or make()) as served:
            await test(served)

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def text_of(stream: AsyncIterator[TokenEvent]) -> str:
    return "".join([event.text async for event in stream])


async def ends_dead(stream: AsyncIterator[TokenEvent]) -> None:
    with pytest.raises(EngineDead):
        await text_of(stream)


async def serves_again(client: ProcessClient, restarts: int = 1) -> None:
    await until(lambda: client.health() is None)
    assert client.restarts == restarts
    assert await text_of(client.submit("again", list(b"say again"), SamplingParams())) == "again"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_request_through_the_process(loop: str) -> None:
    new_loop = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else asyncio.new_event_loop
    progress: list[tuple[int, int]] = []

    async def test(client: ProcessClient) -> None:
        assert progress[-1] == (1000, 1000)
        assert client.info.model == "fake"
        streams = [
            client.submit(str(i), list(f"say text {i}".encode()), SamplingParams(n=2)) for i in range(4)
        ]
        texts = [await text_of(stream) for stream in streams]
        assert [sorted(text) for text in texts] == [sorted(f"text {i}" * 2) for i in range(4)]
        await until(lambda: client.snapshot().generated_tokens == 4 * 2 * 7)

    run(test, make(progress=progress), new_loop)


def test_the_pool_is_known_before_the_first_request_and_again_after_a_death() -> None:
    async def test(client: ProcessClient) -> None:
        pool = client.snapshot().blocks_total
        assert pool > 0 and client.snapshot().blocks_free == pool
        await text_of(client.submit("a", list(b"say text"), SamplingParams()))
        await until(lambda: client.snapshot().steps)
        assert client.engine_pid is not None
        os.kill(client.engine_pid, signal.SIGKILL)
        await until(lambda: client.restarts == 1 and client.health() is None)
        assert client.snapshot().steps == 0 and client.snapshot().blocks_free == pool

    run(test)


def test_faults_stay_with_their_request() -> None:
    async def test(client: ProcessClient) -> None:
        good = client.submit("good", list(b"say fine"), SamplingParams())
        for name in (b"error", b"refuse"):
            (event,) = [event async for event in client.submit("bad", list(name), SamplingParams())]
            assert event.finish_reason is FinishReason.ERROR
        assert await text_of(good) == "fine"
        assert client.health() is None

    run(test)


def test_abort_reaches_the_engine() -> None:
    async def test(client: ProcessClient) -> None:
        stream = client.submit("a", FOREVER, SamplingParams())
        await anext(stream)
        client.abort("a")
        await text_of(stream)
        await until(lambda: client.snapshot().steps and client.snapshot().running == 0)

    run(test)


def test_a_stop_string_reaches_the_engine() -> None:
    async def test(client: ProcessClient) -> None:
        assert await text_of(client.submit("a", FOREVER, SamplingParams(stop=("c",)))) == "ab"
        await until(lambda: client.snapshot().steps and client.snapshot().running == 0)

    run(test)


@pytest.mark.parametrize("how", ["kill", "crash", "exit"])
def test_death_ends_every_stream_and_a_new_engine_serves(how: str) -> None:
    async def test(client: ProcessClient) -> None:
        old = client.engine_pid
        assert old is not None
        streams = [client.submit(str(i), FOREVER, SamplingParams()) for i in range(5)]
        for stream in streams:
            await anext(stream)
        if how == "kill":
            os.kill(old, signal.SIGKILL)
        else:
            streams.append(client.submit("culprit", list(how.encode()), SamplingParams()))
        async with asyncio.timeout(2.0):
            await asyncio.gather(*map(ends_dead, streams))
        assert "died" in (client.health() or "")
        with pytest.raises(EngineDead):
            client.submit("x", FOREVER, SamplingParams())
        await serves_again(client)
        assert client.engine_pid != old
        assert not alive(old)

    run(test)


@pytest.mark.parametrize("how", ["hung step", "stopped process"])
def test_the_watchdog_replaces_an_engine_that_hangs(how: str, capfd: pytest.CaptureFixture[str]) -> None:
    async def test(client: ProcessClient) -> None:
        old = client.engine_pid
        assert old is not None
        stream = client.submit("a", FOREVER, SamplingParams())
        await anext(stream)
        streams, began = [stream], time.monotonic()
        if how == "hung step":
            streams.append(client.submit("b", list(b"hang"), SamplingParams()))
        else:
            os.kill(old, signal.SIGSTOP)
        await asyncio.gather(*map(ends_dead, streams))
        assert 0.9 <= time.monotonic() - began <= 1.6
        await serves_again(client)
        assert not alive(old)

    run(test, make(step_timeout_s=1.0, heartbeat_timeout_s=1.0))
    if how == "hung step":
        assert "_break" in capfd.readouterr().err, "the stacks are in the log"


def test_an_idle_engine_is_not_hung() -> None:
    async def test(client: ProcessClient) -> None:
        pid = client.engine_pid
        deadline = time.monotonic() + 1.0
        await until(lambda: time.monotonic() > deadline)
        assert client.health() is None
        assert client.engine_pid == pid
        with open(f"/proc/{pid}/stat") as stat:
            ticks = sum(map(int, stat.read().rsplit(")", 1)[1].split()[11:13]))
        assert ticks < 60, "it spins"

    run(test, make(step_timeout_s=0.4, heartbeat_timeout_s=0.6))


def test_too_many_deaths_are_final() -> None:
    async def test(client: ProcessClient) -> None:
        for death in range(3):
            assert client.engine_pid is not None
            os.kill(client.engine_pid, signal.SIGKILL)
            await until(lambda: client.health() is not None)
            if death < 2:
                await until(lambda: client.health() is None)
        await until(lambda: "not started again" in (client.health() or ""))
        assert client.restarts == 2
        with pytest.raises(EngineDead):
            client.submit("x", FOREVER, SamplingParams())

    run(test, make(restarts=2))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("does-not-fit", MemoryPlanError, "14 GiB"),
        ("bug", ConfigError, "RuntimeError: see the engine's log"),
        ("vanish", ConfigError, "exit code 7"),
    ],
)
def test_a_start_that_fails_says_why(model: str, error: type[Exception], message: str) -> None:
    async def main() -> None:
        client = make(model)
        with pytest.raises(error, match=message):
            await client.start()
        assert client.health() is not None
        with pytest.raises(EngineDead):
            client.submit("x", FOREVER, SamplingParams())
        assert client.engine_pid is not None
        assert not alive(client.engine_pid)
        await client.stop()

    asyncio.run(main())


def test_another_package_named_kernels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face has a library of that name; see kernels/README.md."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    (tmp_path / "kernels" / "api.py").touch()  # an editable install would find ours behind a missing one
    monkeypatch.chdir(tmp_path)  # `python -m` looks here first
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    async def main() -> None:
        with pytest.raises(ConfigError, match="Another Python package named `kernels`"):
            await make(factory="engine.build:build").start()

    asyncio.run(main())


def test_a_start_that_hangs_is_ended(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        client = make("slow", start_timeout_s=0.5)
        with pytest.raises(ConfigError, match="did not start"):
            await client.start()
        assert client.engine_pid is not None
        assert not alive(client.engine_pid)

    asyncio.run(main())


def test_a_start_can_be_cancelled() -> None:
    async def main() -> None:
        client = make("slow")
        start = asyncio.create_task(client.start())
        await until(lambda: client._process is not None)
        pid = client.engine_pid
        start.cancel()
        await asyncio.wait([start])
        await client.stop()
        assert pid is not None
        assert not alive(pid)

    asyncio.run(main())


def test_questions_cross_to_the_engine_and_back() -> None:
    async def test(client: ProcessClient) -> None:
        stream = client.submit("a", FOREVER, SamplingParams(), CacheScope("ann", b"\0"), explain=True)
        first = await anext(stream)
        assert first.cache == CacheReport(7, 2, MissReason.NEVER_SEEN, 2)
        report = await client.probe_cache([1, 2, 3], CacheScope("ann", b"\xff"))
        assert (report.prompt_tokens, report.reason, report.cached_ids) == (3, MissReason.DIVERGED, (5, 6))
        (view,) = (await client.cache_page()).blocks
        assert client.public_id(view.owner) == "a"
        detail = await client.cache_block(1)
        assert detail is not None and detail.children == (3,)
        with pytest.raises(RequestFailed):
            await client.probe_cache(list(b"crash"))
        assert await client.reset_cache() == 1
        assert client.restarts == 0 and client.health() is None

    run(test)


def test_the_pool_can_be_watched() -> None:
    async def test(client: ProcessClient) -> None:
        watch, viewer = client.watch_pool(), Viewer()
        viewer.apply(await anext(watch))
        assert viewer.rows["owners"] == [0]
        assert await text_of(client.submit("a", list(b"say x"), SamplingParams())) == "x"
        changed = await anext(watch)
        while not changed.ids:
            changed = await anext(watch)
        assert numbers(changed.owners) == [1]
        await watch.aclose()  # type: ignore[attr-defined]

    run(test)


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_a_death_answers_every_question_and_ends_every_watch(how: str) -> None:
    async def test(client: ProcessClient) -> None:
        assert client.engine_pid is not None
        watch = client.watch_pool()
        await anext(watch)
        asked = [asyncio.create_task(client.probe_cache(list(b"hang")))]
        asked += [asyncio.create_task(client.cache_page()) for _ in range(3)]  # type: ignore[misc]
        await asyncio.sleep(0)
        if how == "kill":
            os.kill(client.engine_pid, signal.SIGKILL)
        for task in asked:
            with pytest.raises(EngineDead):
                await task
        assert not any([frame.full async for frame in watch])
        with pytest.raises(EngineDead):
            await client.cache_page()
        await serves_again(client)
        again = client.watch_pool()
        assert (await anext(again)).full
        await again.aclose()  # type: ignore[attr-defined]

    run(test, make(step_timeout_s=1.0, heartbeat_timeout_s=1.0))


def test_drain_then_stop() -> None:
    async def test(client: ProcessClient) -> None:
        stream = client.submit("a", list(b"say to the end"), SamplingParams())
        client.start_draining()
        with pytest.raises(Draining):
            client.submit("b", FOREVER, SamplingParams())
        text = await text_of(stream)
        await client.drained()
        assert text == "to the end"
        began = time.monotonic()
        await client.stop()
        assert time.monotonic() - began < 2.0

    run(test)


def test_stop_under_load_ends_streams() -> None:
    async def test(client: ProcessClient) -> None:
        stream = client.submit("a", FOREVER, SamplingParams())
        await anext(stream)
        await client.stop()
        await ends_dead(stream)

    run(test)


def test_a_stuck_engine_is_killed_on_stop() -> None:
    async def test(client: ProcessClient) -> None:
        stream = client.submit("a", list(b"hang"), SamplingParams())
        assert client.engine_pid is not None
        await until(lambda: client._busy_s > 0)
        await client.stop()
        await ends_dead(stream)

    run(test, make(stop_patience_s=0.2))


def test_signals_to_the_group_leave_the_engine_alone() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the engine too; the server drains it first."""

    async def test(client: ProcessClient) -> None:
        stream = client.submit("a", list(b"say still here"), SamplingParams())
        assert client.engine_pid is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.engine_pid, number)
        assert await text_of(stream) == "still here"
        assert client.restarts == 0

    run(test)


PARENT = f"""
import asyncio, sys
from engine.client import ProcessClient
from engine.config import EngineOptions
from engine.types import SamplingParams
from tests.helpers.fake_engine import ByteTokenizer

async def main():
    client = ProcessClient(EngineOptions("fake"), ByteTokenizer(), factory="{FACTORY}")
    await client.start()
    stream = client.submit("a", list(sys.argv[1].encode()), SamplingParams())
    print(client.engine_pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("command", ["forever", "hang", "say idle"])
def test_the_engine_does_not_outlive_its_server(command: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, command], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        parent.kill()
        died = time.monotonic()
        while alive(engine):
            assert time.monotonic() - died < 30.0, "the engine is an orphan"
            time.sleep(0.01)


def spawn_child() -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", "engine.process", str(theirs.fileno()), FACTORY.partition(":")[0]],
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.DEVNULL,
        )
    return child, ours


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", frames.pack(frames.Shutdown()), b""]
)
def test_the_child_ends_on_a_malformed_first_frame(data: bytes) -> None:
    child, sock = spawn_child()
    with sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert child.wait(5.0) == (1 if data else 0)


def test_the_child_ends_on_a_malformed_later_frame() -> None:
    child, sock = spawn_child()
    with sock:
        sock.sendall(frames.pack(frames.Start(EngineOptions("fake"), FACTORY)) + b"\x00\x00\x00\x01\xc1")
        assert child.wait(5.0) in (0, 1)


def test_a_malformed_frame_from_the_engine_is_its_death() -> None:
    async def test(client: ProcessClient) -> None:
        assert client._process is not None
        stream = client.submit("a", FOREVER, SamplingParams())
        client._process.data_received(b"\x00\x00\x00\x01\xc1")
        await ends_dead(stream)
        assert "malformed" in (client.health() or "")
        await serves_again(client)

    run(test)
