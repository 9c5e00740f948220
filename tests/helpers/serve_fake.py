"""A server process around FakeClient, for tests that need signals and exit codes.

    python -m tests.helpers.serve_fake [--tokens N] [--pause S] [the flags of `quire serve`]

Prints "ready PORT" on stdout once it serves.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

import uvloop

from server.app import create_app
from server.log import configure_logging, log_options
from server.port import listen
from server.run import Server
from tests.helpers.fake_client import FakeClient, FakeTemplate, FakeTokenizer
from tests.helpers.settings import parse_args


async def serve(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.0)
    own, rest = parser.parse_known_args(arguments)
    chosen = parse_args(rest, {})
    configure_logging(log_options(chosen))
    client = FakeClient(lambda ids, params, index: "abcdefghi " * (own.tokens // 10))
    client.pause_s = own.pause
    app = create_app(client, chosen, FakeTokenizer(), FakeTemplate())
    with listen(chosen.host, chosen.port) as sock:
        port = sock.getsockname()[1]
        return await Server(app, chosen).run_until_stopped(sock, lambda: print(f"ready {port}", flush=True))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.exit(runner.run(serve(sys.argv[1:])))
