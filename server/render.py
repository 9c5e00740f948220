"""Token events -> OpenAI's replies and stream chunks, as bytes.

Knows the wire shapes; does not know sockets, the engine or the clock. A chunk differs from the one before
in one string, so everything around that string is rendered once per stream and choice, and a token costs
the escaping of its text and one join.
"""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import msgspec

from engine.types import TokenEvent, TokenLogprob
from server.errors import ApiError
from server.logprobs import LegacyLogprobs, chat_logprobs
from server.prompts import Tokenizer

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def _plain(value: Any) -> Any:
    if isinstance(value, array):
        return value.tolist()
    raise NotImplementedError(f"a {type(value).__name__} is not JSON")


encode = msgspec.json.Encoder(enc_hook=_plain).encode


def named_event(name: str, data: Mapping[str, Any]) -> bytes:
    """One server-sent event of a kind."""
    return b"event: %b\ndata: %b\n\n" % (name.encode("ascii"), encode(data))


Fields = dict[str, Any]
Usage = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks and the reply of one request have in common."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    def fields(self, object_name: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }


class Frames(Protocol):
    """What writes one stream.

    Attributes:
        keep_alive: sent when nothing else was for a while.
    """

    keep_alive: bytes = KEEP_ALIVE

    def begin(self) -> bytes:
        """The frames before the first token's; may be empty."""
        return b""

    @abstractmethod
    def event(self, choice: int, event: TokenEvent) -> bytes:
        """The frames for one event; may be empty."""

    @abstractmethod
    def end(self) -> bytes:
        """The frames after the last event."""

    @abstractmethod
    def failed(self, error: ApiError) -> bytes:
        """The frames after which a stream that broke ends."""


class Common(NamedTuple):
    """What all chunks of one stream are written with.

    Attributes:
        usage: read for the last chunk, and for all with continuous usage.
        usage_in_stream: whether there is usage at the end, and in every chunk.
    """

    head: Head
    usage: Usage
    usage_in_stream: tuple[bool, bool]
    tokenizer: Tokenizer


class Chunks(Frames):
    """Renders one stream."""

    object_name: str

    def __init__(self, common: Common) -> None:
        self._usage = common.usage
        self._tokenizer = common.tokenizer
        self._last_usage, self._every_usage = common.usage_in_stream
        self._base = encode(common.head.fields(self.object_name))[:-1]
        self._plain_end = self._ending()

    def end(self) -> bytes:
        if not self._last_usage:
            return DONE
        return b"data: " + self._base + b',"choices":[],"usage":' + encode(self._usage()) + b"}\n\n" + DONE

    def failed(self, error: ApiError) -> bytes:
        return b"data: " + error.body() + b"\n\n" + DONE

    def _lead(self, choice: int, field: bytes) -> bytes:
        return b'data: %b,"choices":[{"index":%d,%b' % (self._base, choice, field)

    def _ending(self) -> bytes:
        """What closes a chunk after its only choice."""
        if self._every_usage:
            return b'}],"usage":' + encode(self._usage()) + b"}\n\n"
        return b'}],"usage":null}\n\n' if self._last_usage else b"}]}\n\n"

    def _close(self) -> bytes:
        return self._ending() if self._every_usage else self._plain_end


class ExplainedChunks:
    """A stream that says of each prompt's first choice, with its first token, what the cache had.

    Args:
        chunks: the stream without it.
        n: choices per prompt.
        explain: a prompt's position -> its report, once that is known.
    """

    def __init__(self, chunks: Frames, n: int, explain: Callable[[int], Mapping[str, Any] | None]) -> None:
        self._chunks = chunks
        self._n = n
        self._explain = explain
        self._told: set[int] = set()
        self.begin = chunks.begin
        self.end = chunks.end
        self.failed = chunks.failed
        self.keep_alive = chunks.keep_alive

    def event(self, choice: int, event: TokenEvent) -> bytes:
        frames = self._chunks.event(choice, event)
        position, index = divmod(choice, self._n)
        if not frames or index or position in self._told:
            return frames
        report = self._explain(position)
        if report is None:
            return frames
        self._told.add(position)
        first, rest = frames.split(b"\n\n", 1)
        return first[:-1] + b',"cache":' + encode([report]) + b"}\n\n" + rest


class ChatChunks(Chunks):
    """chat.completion.chunk: each choice's role at once, then text, then the finish reason alone.

    Args:
        n: choices.
    """

    object_name = "chat.completion.chunk"
    _first_content = b'""'
    _before_text = b'"delta":{"content":'

    def __init__(self, common: Common, n: int) -> None:
        super().__init__(common)
        self._leads = [self._lead(choice, self._before_text) for choice in range(n)]
        self._text_end = b'},"logprobs":null,"finish_reason":null' + self._plain_end

    def begin(self) -> bytes:
        return b"".join([self._role(choice) for choice in range(len(self._leads))])

    def event(self, choice: int, event: TokenEvent) -> bytes:
        lead = self._leads[choice]
        if event.finish_reason is None and not event.logprobs and not self._every_usage:
            return lead + encode(event.text) + self._text_end if event.text else b""
        frames = b""
        if event.text or event.logprobs:
            frames += lead + encode(event.text) + self._text_tail(event)
        if event.finish_reason is not None:
            frames += self._finish(choice, event)
        return frames

    def _role(self, choice: int) -> bytes:
        delta = b'"delta":{"role":"assistant","content":%b,"refusal":null}' % self._first_content
        return self._lead(choice, delta + b',"logprobs":null,"finish_reason":null') + self._close()

    def _text_tail(self, event: TokenEvent) -> bytes:
        logprobs = chat_logprobs(self._tokenizer, event.logprobs) if event.logprobs else None
        return b'},"logprobs":' + encode(logprobs) + b',"finish_reason":null' + self._close()

    def _finish(self, choice: int, event: TokenEvent) -> bytes:
        fields = b'"delta":{},"logprobs":null,' + encode(self._ending_fields(choice, event))[1:-1]
        return self._lead(choice, fields) + self._close()

    def _ending_fields(self, choice: int, event: TokenEvent) -> Fields:
        return ending_fields(event)


class CompletionChunks(Chunks):
    """text_completion chunks: text with its logprobs, the finish reason beside the last."""

    object_name = "text_completion"

    def __init__(self, common: Common, echoes: Sequence[Echo | None]) -> None:
        super().__init__(common)
        self._leads: dict[int, bytes] = {}
        self._echoes = echoes
        self._writers = [LegacyLogprobs(common.tokenizer) for _ in echoes]
        self._text_end = b',"logprobs":null,"finish_reason":null' + self._plain_end

    def event(self, choice: int, event: TokenEvent) -> bytes:
        lead = self._leads.get(choice)
        if lead is not None and event.finish_reason is None and not event.logprobs and not self._every_usage:
            return lead + encode(event.text) + self._text_end if event.text else b""
        if lead is not None:
            return self._chunk(lead, choice, event)
        lead = self._leads[choice] = self._lead(choice, b'"text":')
        return self._echo(lead, choice, event) + self._chunk(lead, choice, event)

    def _echo(self, lead: bytes, choice: int, event: TokenEvent) -> bytes:
        echo = self._echoes[choice]
        if echo is None:
            return b""
        logprobs = None
        if event.prompt_logprobs is not None:
            logprobs = self._writers[choice].lists(echo.ids, event.prompt_logprobs)
        end = b',"logprobs":' + encode(logprobs) + b',"finish_reason":null'
        return lead + encode(echo.text) + end + self._close()

    def _chunk(self, lead: bytes, choice: int, event: TokenEvent) -> bytes:
        if not (event.text or event.logprobs or event.finish_reason):
            return b""
        logprobs = None
        if event.logprobs:
            logprobs = self._writers[choice].lists(
                [entry.token_id for entry in event.logprobs], event.logprobs
            )
        end = b',"logprobs":' + encode(logprobs) + b"," + encode(ending_fields(event))[1:-1]
        return lead + encode(event.text) + end + self._close()


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt to repeat before its completion."""

    text: str
    ids: Sequence[int]


class Choice:
    """One choice of a reply that is not streamed, collected from its events."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._events: list[TokenEvent] = []

    @property
    def reasoning_tokens(self) -> int:
        return 0

    def add(self, event: TokenEvent) -> None:
        self._events.append(event)

    @property
    def last(self) -> TokenEvent:
        return self._events[-1]

    @property
    def token_ids(self) -> list[int]:
        return [token_id for event in self._events for token_id in event.token_ids]

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob | None]:
        return next((event.prompt_logprobs for event in self._events if event.prompt_logprobs), ())

    @property
    def text(self) -> str:
        return "".join([event.text for event in self._events])

    def chat(self, tokenizer: Tokenizer, with_logprobs: bool) -> dict[str, Any]:
        entries = [entry for event in self._events for entry in event.logprobs]
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": self.text, "refusal": None},
            "logprobs": chat_logprobs(tokenizer, entries) if with_logprobs else None,
            **ending_fields(self.last),
        }

    def completion(self, tokenizer: Tokenizer, with_logprobs: bool, echo: Echo | None) -> dict[str, Any]:
        return {
            "index": self.index,
            "text": self.text if echo is None else echo.text + self.text,
            "logprobs": self._legacy_logprobs(tokenizer, echo) if with_logprobs else None,
            **ending_fields(self.last),
        }

    def _legacy_logprobs(self, tokenizer: Tokenizer, echo: Echo | None) -> dict[str, list[Any]]:
        entries = [entry for event in self._events for entry in event.logprobs]
        ids = [entry.token_id for entry in entries]
        if echo is None:
            return LegacyLogprobs(tokenizer).lists(ids, entries)
        return LegacyLogprobs(tokenizer).lists([*echo.ids, *ids], [*self.prompt_logprobs, *entries])


def reply(
    head: Head,
    object_name: str,
    choices: Sequence[Fields],
    usage: Mapping[str, Any],
    more: Mapping[str, Any] | None = None,
) -> Fields:
    """A whole reply. `more`: other fields."""
    return {**head.fields(object_name), "choices": choices, "usage": usage, **(more or {})}


def ending_fields(event: TokenEvent) -> dict[str, Any]:
    """finish_reason, and what stopped it where that was a stop string or token of the request."""
    ending: dict[str, Any] = {"finish_reason": event.finish_reason}
    if event.stop_reason is not None:
        ending["stop_reason"] = event.stop_reason
    return ending
