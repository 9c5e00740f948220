"""A pretend OpenAI server for the load generator: raw asyncio, bound to 127.0.0.1, with faults on request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Connection: keep-alive\r\n\r\n"
)


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class BenchServer:
    """Answers every completion with max_tokens tokens of text.

    Attributes:
        requests: the JSON bodies received, in order.
        keys: the Authorization headers received.
        takes_ids: False answers 400 to a list prompt; a number refuses larger ids.
        tokens_per_chunk: tokens in each chunk.
        fault: what to do to measured requests: "", "429", "cut" (close mid-stream), "error" (an error event),
            "short" (end the stream after two chunks), "hang" (send nothing), "garbage" (a chunk that is not
            JSON).
        done: whether [DONE] ends a stream.
        most_at_once: the largest number of completions under way.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.takes_ids: bool | int = True
        self.tokens_per_chunk = 1
        self.usage = True
        self.done = True
        self.fault = ""
        self.release = asyncio.Event()
        self.release.set()
        self.connections = 0
        self.tasks: set[asyncio.Task[object]] = set()
        self.under_way = 0
        self.most_at_once = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(headers.get("Content-Length", "0")))
                self.keys.append(headers.get("Authorization", ""))
                await self.answer(head.split(" ")[1], body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self.tasks.discard(task)

    async def answer(self, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            self.reply(writer, 200, {"object": "list", "data": [{"id": "pretend"}]})
            return
        request = json.loads(body)
        self.requests.append(request)
        if self._refuses(request.get("prompt")):
            self.reply(writer, 400, {"error": {"message": "no such token", "code": "bad_prompt"}})
            return
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            await self.release.wait()
            await self._stream(request, "chat" in path, writer)
        finally:
            self.under_way -= 1

    def _refuses(self, prompt: Any) -> bool:
        if not isinstance(prompt, list) or self.takes_ids is True:
            return False
        return self.takes_ids is False or max(prompt) > self.takes_ids

    async def _stream(self, request: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> None:
        measured = request["max_tokens"] > 1
        if measured and self.fault == "429":
            self.reply(writer, 429, {"error": {"message": "queue full", "type": "overloaded", "code": None}})
            return
        writer.write(STREAM_HEAD)
        if measured and self.fault == "hang":
            await asyncio.Event().wait()
        for number, data in enumerate(self.events(request, chat)):
            if measured and number == 2 and self.fault:
                if self.fault == "short":
                    break
                if self.fault == "cut":
                    writer.close()
                    return
                data = {"error": event({"error": {"message": "boom", "type": "server_error"}})}.get(
                    self.fault, b"data: {oops\n\n"
                )
            writer.write(http_chunk(data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    def events(self, request: dict[str, Any], chat: bool) -> list[bytes]:
        total, step = request["max_tokens"], self.tokens_per_chunk
        prompt = request.get("prompt") or request["messages"][0]["content"]
        num_prompt = len(prompt) if isinstance(prompt, list) else 5 + 2 * len(prompt.split())
        choices: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}] if chat else []
        for first in range(0, total, step):
            text = " tok" * min(step, total - first)
            choices.append({"delta": {"content": text}} if chat else {"text": text})
        choices[-1]["finish_reason"] = "length"
        chunks = [{"choices": [{"index": 0, "finish_reason": None, **choice}]} for choice in choices]
        usage = {
            "prompt_tokens": num_prompt,
            "completion_tokens": total,
            "prompt_tokens_details": {"cached_tokens": 3},
        }
        tail = [{"choices": [], "usage": usage}] if self.usage else []
        end = [b"data: [DONE]\n\n"] if self.done else []
        return [*(event(chunk) for chunk in [*chunks, *tail]), *end]

    def reply(self, writer: asyncio.StreamWriter, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)


@asynccontextmanager
async def serving(server: BenchServer) -> AsyncIterator[str]:
    """Yields the server's URL."""
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    host, port = listener.sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        listener.close()
        for task in list(server.tasks):
            task.cancel()
        await asyncio.gather(*server.tasks)
