"""One conversation's side of the wire: the list of models, one streamed answer, and errors people can act on.

Knows the chat API as OpenAI and its likes speak it; takes what a server leaves out as unknown. Does not know
the terminal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from server.bench.client import DONE, error_of, json_or_text
from server.bench.wire import EventParser, OnBody, RequestWriter, ResponseParser, WireError, connect

LOOKUP_TIMEOUT_S = 30.0

Message = dict[str, str]
OnText = Callable[[str, bool], None]


class ChatError(Exception):
    """One line for the person at the terminal."""


@dataclass(slots=True)
class Answer:
    """What came back, as far as it came. Counts are None where the server does not say.

    Attributes:
        first_s, last_s: from sending the request to the first and the last piece of text.
        explained: a Quire server's sentence on why the reuse of the prompt ended where it did.
    """

    text: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    first_s: float | None = None
    last_s: float = 0.0
    finish_reason: str = ""
    explained: str = ""

    def tokens_per_s(self) -> float | None:
        """Of decoding: the first token is the prompt's work."""
        if self.output_tokens is None or self.first_s is None or self.last_s <= self.first_s:
            return None
        return (self.output_tokens - 1) / (self.last_s - self.first_s)


def parse_url(text: str) -> str:
    """The address of an API without a slash at its end; /v1 where it has no path.

    Raises:
        ValueError: it is none.
    """
    text = text.strip()
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if (
        not known
        or not text.isascii()
        or not text.isprintable()
        or " " in text
        or parts.query
        or parts.fragment
    ):
        raise ValueError(f"expected an address such as http://127.0.0.1:8000/v1, not {text!r}")
    base = text.rstrip("/")
    return base if parts.path.rstrip("/") else base + "/v1"


class ChatClient:
    """A connection per request: people type slowly, and servers close idle ones.

    Args:
        url: from `parse_url`.
        model: "" is the first that the server lists.
        sampling: goes into every request as it is.
    """

    def __init__(self, url: str, api_key: str | None, model: str, sampling: Mapping[str, Any]) -> None:
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ChatError("the API key has characters that no key has")
        self.url = url
        self.model = model
        self._api_key = api_key
        self._sampling = dict(sampling)
        # Asked for in a header: servers ignore those they do not know, but may refuse unknown fields.
        headers = "User-Agent: quire-chat", "Connection: close", "X-Quire-Explain-Cache: true"
        self._requests = RequestWriter(url, api_key, *headers)

    async def find_model(self) -> str:
        """Settles and returns the model's name.

        Raises:
            ChatError: the server is not there, refuses, or lists none.
        """
        if self.model:
            return self.model
        body = bytearray()
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                response = await self._exchange("GET", "/models", b"", lambda _, data: body.extend(data))
        except TimeoutError:
            raise ChatError(f"no reply from {self.url} within {LOOKUP_TIMEOUT_S:g} s") from None
        self._check(response, bytes(body))
        listed = json_or_text(bytes(body))
        try:
            name = listed["data"][0]["id"]
        except (TypeError, LookupError):
            raise ChatError(f"{self.url} lists no model; name one with --model") from None
        self.model = str(name)
        return self.model

    async def answer(self, messages: Sequence[Message], answer: Answer, on_text: OnText) -> None:
        """Streams one answer into `answer`, and each piece of it to `on_text(text, is_reasoning)`.

        Raises:
            ChatError: it did not end as it should; what came is in `answer`.
        """
        model = await self.find_model()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = msgspec.json.encode({"model": model, "messages": messages, **options, **self._sampling})
        reader = _Reader(answer, on_text)
        response = await self._exchange("POST", "/chat/completions", body, reader.on_body)
        self._check(response, bytes(reader.refusal))
        if not reader.ended:
            raise ChatError("the answer broke off: the server ended the stream early")

    async def _exchange(self, method: str, path: str, body: bytes, on_body: OnBody) -> ResponseParser:
        try:
            connection = await connect(self.url)
        except (WireError, UnicodeError) as error:
            raise ChatError(self._absent(str(error))) from None
        try:
            return await connection.exchange(self._requests.write(method, path, body), on_body)
        except WireError as error:
            raise ChatError(f"the connection to {self.url} broke: {error}") from None
        finally:
            connection.close()  # a server stops work on an answer that nobody reads

    def _absent(self, reason: str) -> str:
        refused = reason == "connection refused" or "Multiple exceptions" in reason
        why = "" if refused else f" ({reason})"
        return f"no server at {self.url}{why}; `quire serve` starts one, --url names another"

    def _check(self, response: ResponseParser, body: bytes) -> None:
        if response.status == 200:
            return
        if response.status in (401, 403):
            said = "does not take this API key" if self._api_key else "asks for an API key"
            raise ChatError(f"{self.url} {said}: give one with --api-key or QUIRE_API_KEY")
        error = error_of(f"HTTP {response.status}", json_or_text(body))
        message = error.message if body else "no reason given"
        raise ChatError(f"HTTP {response.status} from {self.url}: {message}")


class _Reader:
    """Fills an answer from the bytes of one streamed reply."""

    def __init__(self, answer: Answer, on_text: OnText) -> None:
        self.refusal = bytearray()
        self.ended = False
        self._answer = answer
        self._on_text = on_text
        self._events = EventParser()
        self._sent_s = time.perf_counter()

    def on_body(self, response: ResponseParser, body: bytes) -> None:
        if response.status != 200:
            self.refusal += body
            return
        for data in self._events.feed(body):
            if data.strip() == DONE:
                self.ended = True
            else:
                self._on_chunk(json_or_text(data))

    def _on_chunk(self, chunk: Any) -> None:
        if not isinstance(chunk, dict):
            raise ChatError("the server sent something other than an answer; is this the address of an API?")
        if chunk.get("error") is not None:
            raise ChatError(f"the answer broke off: {error_of('error', chunk['error']).message}")
        self._on_usage(chunk.get("usage"))
        self._on_cache(chunk.get("cache"))
        for choice in _dicts(chunk.get("choices")):
            self._answer.finish_reason = choice.get("finish_reason") or self._answer.finish_reason
            delta = choice.get("delta")
            if isinstance(delta, dict):
                # vLLM and OpenRouter say "reasoning", others "reasoning_content", some both.
                self._on_piece(delta.get("reasoning_content") or delta.get("reasoning"), True)
                self._on_piece(delta.get("content") or delta.get("refusal"), False)

    def _on_piece(self, text: Any, is_reasoning: bool) -> None:
        if not isinstance(text, str) or not text:
            return
        answer = self._answer
        answer.last_s = time.perf_counter() - self._sent_s
        if answer.first_s is None:
            answer.first_s = answer.last_s
        if not is_reasoning:
            answer.text += text
        self._on_text(text, is_reasoning)

    def _on_usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        self._answer.prompt_tokens = _number(usage.get("prompt_tokens"))
        self._answer.output_tokens = _number(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self._answer.cached_tokens = _number(details.get("cached_tokens"))

    def _on_cache(self, reports: Any) -> None:
        for report in _dicts(reports):
            if isinstance(report.get("message"), str):
                self._answer.explained = report["message"]


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
