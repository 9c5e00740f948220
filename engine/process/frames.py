"""What the server and the engine process say to each other, and how it becomes bytes.

    frame:  | length, 4 bytes big endian | MessagePack of one tagged struct |

The first array element of each struct names its type, so that a decoder knows what it may be. Nothing else is
ever decoded: no pickle, no code, no frame larger than MAX_FRAME_BYTES.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from engine.config import EngineOptions
from engine.grammar import Grammar
from engine.logs import LogOptions
from engine.types import EngineInfo, EngineSnapshot, SamplingParams, TokenOutput, token_array
from engine.views import DEFAULT_SCOPE, BlockDetail, CachePage, CacheReport, CacheScope, PoolFrame

# Prompt logprobs of a very long prompt are the largest thing that is sent.
MAX_FRAME_BYTES = 256 << 20
_HEADER = struct.Struct(">I")


class FrameError(Exception):
    """The other side sent something that is not a frame: the connection is of no more use."""


class _Frame(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Arrays, not maps: half the bytes, twice the speed."""


# From the server to the engine.


class Start(_Frame):
    options: EngineOptions
    factory: str  # "module:function", called in the child only
    log: LogOptions = LogOptions()


class Submit(_Frame):
    request_id: str
    prompt_ids: bytes  # 4 bytes each: see pack_ids
    params: SamplingParams
    scope: CacheScope = DEFAULT_SCOPE
    explain: bool = False


class Abort(_Frame):
    request_id: str
    index: int | None = None


class Shutdown(_Frame):
    pass


class Watch(_Frame):
    """Show the pool from now on, all of it first; or no longer."""

    on: bool


class Probe(_Frame):
    """A question, as are the next four. `number` comes back with the answer."""

    number: int
    prompt_ids: bytes
    scope: CacheScope


class Page(_Frame):
    number: int
    first_block: int
    limit: int
    state: str


class Block(_Frame):
    number: int
    block_id: int


class Reset(_Frame):
    number: int


class Compile(_Frame):
    """Make a grammar ready; answered as soon as it is, whatever step is being done."""

    number: int
    grammar: Grammar


# From the engine to the server.


class Progress(_Frame):
    done_bytes: int
    total_bytes: int


class Ready(_Frame):
    info: EngineInfo


class Failed(_Frame):
    """The engine ends. `kind` names a class of engine.errors; the message is for the operator."""

    kind: str
    message: str


class Outputs(_Frame):
    outputs: list[TokenOutput]
    snapshot: EngineSnapshot | None = None  # now and then


class Heartbeat(_Frame):
    """`busy_s` is how long the present step has been running, 0 between steps."""

    busy_s: float


class Answer(_Frame):
    """To the question of that number: what was asked for, or `error`."""

    number: int
    report: CacheReport | None = None
    page: CachePage | None = None
    block: BlockDetail | None = None
    emptied: int = 0
    error: str | None = None
    refusal: str | None = None  # what is wrong with the grammar


class Pool(_Frame):
    pool: PoolFrame


Question = Probe | Page | Block | Reset | Compile
ToEngine = Start | Submit | Abort | Shutdown | Watch | Question
FromEngine = Progress | Ready | Failed | Outputs | Heartbeat | Answer | Pool

T = TypeVar("T")
_encoder = msgspec.msgpack.Encoder()
to_engine = msgspec.msgpack.Decoder(ToEngine)
from_engine = msgspec.msgpack.Decoder(FromEngine)


def pack(frame: ToEngine | FromEngine) -> bytes:
    """One frame as bytes.

    Raises:
        FrameError: it is too large to send.
    """
    body = bytearray(_HEADER.size)
    _encoder.encode_into(frame, body, _HEADER.size)
    size = len(body) - _HEADER.size
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {size} bytes is too large")
    _HEADER.pack_into(body, 0, size)
    return bytes(body)


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as 4 bytes each: one copy, where a list of numbers would be parsed one by one."""
    return token_array(token_ids).tobytes()


def unpack_ids(data: bytes) -> array[int]:
    ids = array("I")
    ids.frombytes(data)
    return ids


class Splitter(Generic[T]):
    """Cuts a stream of bytes into decoded frames.

    Args:
        decoder: for one of the two directions.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decode = decoder.decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """Takes what arrived and returns the frames that are complete.

        Raises:
            FrameError: a frame is too large or not one of the known structs.
        """
        self._buffer += data
        frames: list[T] = []
        start, buffer = 0, self._buffer
        with memoryview(buffer) as view:
            while len(buffer) - start >= _HEADER.size:
                (size,) = _HEADER.unpack_from(buffer, start)
                if size > MAX_FRAME_BYTES:
                    raise FrameError(f"a frame of {size} bytes is too large")
                end = start + _HEADER.size + size
                if len(buffer) < end:
                    break
                frames.append(self._decoded(view[start + _HEADER.size : end]))
                start = end
        del buffer[:start]
        return frames

    def _decoded(self, body: memoryview) -> T:
        try:
            with body:
                return self._decode(body)
        except (msgspec.DecodeError, ValueError, TypeError) as error:
            raise FrameError(f"not a frame: {error}") from error
