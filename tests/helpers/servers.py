"""A real `quire serve` in a process of its own, on a free port of 127.0.0.1."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Server:
    """A running server and how to look at it."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Polls /ready until it is 200."""
        until(lambda: self.process.poll() is not None or self._ready(), timeout_s, lambda: self.log)
        assert self.process.poll() is None, self.log

    def _ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False

    def engine_pid(self) -> int:
        (engine,) = psutil.Process(self.process.pid).children()
        return int(engine.pid)

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        reply = self.http.post(path, json=body)
        assert reply.status_code == 200, reply.text
        content: dict[str, Any] = reply.json()
        return content


def until(condition: Any, timeout_s: float, describe: Any = lambda: "") -> None:
    """Polls until the condition holds; fails with `describe()` after the time limit."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {describe()}"
        time.sleep(0.02)


@contextlib.contextmanager
def serve(tmp_path: Path, *args: str, ready: bool = True, program: str = "server.cli") -> Iterator[Server]:
    """Starts `quire serve *args`, waits until it is ready, and ends it (by pid) afterwards."""
    port = free_port()
    log = tmp_path / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", program, "serve", *args, "--port", str(port)],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "default"},
        )
        server = Server(process, port, log)
        try:
            if ready:
                server.wait_ready()
            yield server
        finally:
            server.http.close()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait(10)
