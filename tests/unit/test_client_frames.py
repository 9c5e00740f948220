"""Frames: everything survives the way to the other process, and nothing else gets in."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineOptions
from engine.process import frames
from engine.types import EngineSnapshot, FinishReason, SamplingParams, TokenLogprob, TokenOutput, token_array
from engine.views import (
    BlockDetail,
    BlockView,
    CachePage,
    CacheReport,
    CacheScope,
    EvictionCause,
    HistogramData,
    Lane,
    MissReason,
    PoolFrame,
    TenantUse,
)
from tests.helpers.fake_engine import INFO

FROM_ENGINE = [
    frames.Progress(1, 2),
    frames.Ready(INFO),
    frames.Failed("ModelError", "why"),
    frames.Heartbeat(0.5),
    frames.Outputs([], EngineSnapshot(steps=3, requests_finished={"stop": 2})),
    frames.Outputs(
        [
            TokenOutput("1", 0, 5),
            TokenOutput(
                "2",
                1,
                6,
                FinishReason.STOP,
                6,
                TokenLogprob(6, -0.5, ((6, -0.5),)),
                64,
                (None, TokenLogprob(1, -2.0)),
            ),
            TokenOutput("3", 0, None, FinishReason.ERROR, error="why"),
            TokenOutput("4", 0, 1, cache=CacheReport(9, 0, MissReason.EVICTED, 0, 1.5, EvictionCause.RESET)),
        ]
    ),
    frames.Outputs(
        [],
        EngineSnapshot(
            misses={MissReason.DIVERGED: 2},
            histograms={"queue_s": HistogramData((1, 2), 0.5)},
            tenants={"ann": TenantUse(1, 2, 3, 4, 5, 6, 7, 8)},
        ),
    ),
    frames.Answer(1, report=CacheReport(9, 4, MissReason.DIVERGED, 5, cached_ids=(1, 2), context_start=3)),
    frames.Answer(
        2, page=CachePage((BlockView(1, "shared", "ann", "7", ("7", "8"), 2, 16, "ab", 3, 1.5),), 2)
    ),
    frames.Answer(3, block=BlockDetail(BlockView(4, "cached", idle_s=0.5), (1, 2), (5,))),
    frames.Answer(4, emptied=12),
    frames.Answer(5, error="why"),
    frames.Pool(
        PoolFrame(
            1,
            True,
            70,
            ("", "ann"),
            *[b"\0\1\2\3"] * 9,
            (Lane("7", 0, "ann", "decode", 9, 8, 10, 1, 2, 0, 0.5),),
            3,
        )
    ),
]
TO_ENGINE = [
    frames.Start(EngineOptions("model", max_num_seqs=3), "a:b"),
    frames.Submit(
        "1",
        frames.pack_ids([1, 2, 70000]),
        SamplingParams(logit_bias={5: -1.0}, stop=("x",), stop_token_ids=(3,)),
    ),
    frames.Submit("2", b"", SamplingParams(), CacheScope("ann", b"\0\xff"), True),
    frames.Abort("1", 2),
    frames.Watch(True),
    frames.Probe(1, frames.pack_ids([1]), CacheScope("ann", b"s")),
    frames.Page(2, 1, 100, "cached"),
    frames.Block(3, 9),
    frames.Reset(4),
    frames.Shutdown(),
]


@pytest.mark.parametrize("step", [1, 3, 10_000])
def test_frames_survive_any_cut(step: int) -> None:
    for sent, decoder in ((FROM_ENGINE, frames.from_engine), (TO_ENGINE, frames.to_engine)):
        data = b"".join(map(frames.pack, sent))
        splitter = frames.Splitter(decoder)
        got = [frame for at in range(0, len(data), step) for frame in splitter.feed(data[at : at + step])]
        assert got == sent


def test_token_ids_are_exact() -> None:
    ids = [0, 1, 2**32 - 1]
    for made in (ids, tuple(ids), token_array(ids)):
        assert list(frames.unpack_ids(frames.pack_ids(made))) == ids
    assert frames.pack_ids(b"ab") == frames.pack_ids([97, 98]), "bytes are ids, too"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x00",
        b"\x00\x00\x00\x01\x90",
        b"\x00\x00\x00\x04\x80\x04N.",  # a pickle
    ],
)
def test_malformed_frames_are_refused(data: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.Splitter(frames.from_engine).feed(data)


def test_a_frame_of_the_other_direction_is_refused() -> None:
    with pytest.raises(frames.FrameError):
        frames.Splitter(frames.from_engine).feed(frames.pack(frames.Shutdown()))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=64))
def test_garbage_never_gets_further_than_a_frame_error(data: bytes) -> None:
    splitter = frames.Splitter(frames.from_engine)
    try:
        for frame in splitter.feed(len(data).to_bytes(4, "big") + data):
            assert isinstance(frame, msgspec.Struct)
    except frames.FrameError:
        pass


def test_too_large_to_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 10)
    with pytest.raises(frames.FrameError, match="too large"):
        frames.pack(frames.Failed("x", "y" * 100))


def test_the_client_does_not_load_torch() -> None:
    """The API process would pay for it in memory and start-up time."""
    heavy = ("torch", "triton", "fastapi", "kernels")
    code = f"import sys, engine.client, engine.text.chat; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
