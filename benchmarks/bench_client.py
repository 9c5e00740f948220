"""How many streamed tokens per second can `quire bench` itself receive?

A pretend server in a second process writes ready-made chunks, one per token and stream, as fast as the
client reads them: what is measured is the ceiling of any result obtained with `quire bench`.

    python -m benchmarks.bench_client [--streams 256] [--tokens 200] [--requests 1024]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import cast

from server.bench.drive import bench
from server.bench.options import BenchOptions, LengthRange
from server.bench.report import render_table

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def _event(content: object) -> bytes:
    data = b"data: " + json.dumps(content).encode() + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _token_event() -> bytes:
    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None}
    return _event(
        {
            "id": "cmpl-0123456789abcdef0123456789abcdef",
            "object": "text_completion",
            "created": 1_700_000_000,
            "model": "pretend",
            "choices": [choice],
            "usage": None,
        }
    )


class _Stream(asyncio.Protocol):
    """One connection: answers each request with `max_tokens` chunks, one per turn of the event loop."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._token = _token_event()

    def data_received(self, data: bytes) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        if head.startswith(b"GET"):
            models = json.dumps({"data": [{"id": "pretend"}]}).encode()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(models), models))
            return
        self._total = int(json.loads(body)["max_tokens"])
        self._left = self._total
        self._transport.write(HEAD)
        self._write_one()

    def _write_one(self) -> None:
        if self._transport.is_closing():
            return
        if self._left:
            self._left -= 1
            self._transport.write(self._token)
            asyncio.get_running_loop().call_soon(self._write_one)
            return
        usage = {"prompt_tokens": 2, "completion_tokens": self._total}
        tail = _event({"choices": [], "usage": usage})
        self._transport.write(tail + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


def _serve(port_out: Connection) -> None:
    async def main() -> None:
        listener = await asyncio.get_running_loop().create_server(_Stream, "127.0.0.1", 0)
        port_out.send(listener.sockets[0].getsockname()[1])
        await asyncio.sleep(300)

    import uvloop

    uvloop.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1024)
    args = parser.parse_args()
    port_in, port_out = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(port_out,), daemon=True)
    server.start()
    options = BenchOptions(
        url=f"http://127.0.0.1:{port_in.recv()}",
        requests=args.requests,
        concurrency=args.streams,
        input_len=LengthRange(2, 2),
        output_len=LengthRange(args.tokens, args.tokens),
        max_seconds=120,
        quiet=True,
    )
    import uvloop

    cpu_s, begin_s = time.process_time(), time.perf_counter()
    result = uvloop.run(bench(options))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - begin_s
    server.terminate()
    print(render_table(result))
    rate = result.output_tokens / cpu_s
    print(f"\nclient: {cpu_s:.2f} s of CPU in {wall_s:.2f} s; {rate:,.0f} tokens per second of CPU")


if __name__ == "__main__":
    main()
