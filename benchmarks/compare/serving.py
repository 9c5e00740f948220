"""One running server: started on a free port, watched, ended. Knows processes, not what they serve."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import processes
from benchmarks.machine import ROOT
from server.bench.client import ApiClient
from server.bench.options import BenchOptions
from server.bench.workload import PromptForm, Workload

START_LIMIT_S = 900.0
STOP_LIMIT_S = 60.0
POLL_S = 0.05


class DidNotStart(Exception):
    """The server ended, or never answered; the message is what it last said."""


@dataclass(frozen=True)
class Launch:
    """How one server is started.

    Attributes:
        command: with {port} where the port belongs.
        model: the model's name in its API.
        takes_ids: prompts may be token ids.
    """

    command: Sequence[str]
    model: str
    environment: Mapping[str, str]
    takes_ids: bool = True


@dataclass(frozen=True)
class Running:
    """A server that has answered.

    Attributes:
        ready_s: from its start to the end of the first answer of one token.
        resident_bytes: right after that answer, all its processes.
    """

    url: str
    pid: int
    ready_s: float
    resident_bytes: int


@contextmanager
def running(launch: Launch, log: Path) -> Iterator[Running]:
    """Starts a server and ends it after the block.

    Raises:
        DidNotStart: it gave no answer.
    """
    port = _free_port()
    command = [part.replace("{port}", str(port)) for part in launch.command]
    environment = {**os.environ, **launch.environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    start_s = time.perf_counter()
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT) as process,
    ):
        try:
            url = f"http://127.0.0.1:{port}"
            asyncio.run(_first_answer(url, launch, process, log))
            ready_s = time.perf_counter() - start_s
            resident = processes.tree_bytes(process.pid)
            yield Running(url, process.pid, ready_s, resident)
        finally:
            _stop(process)


async def _first_answer(url: str, launch: Launch, process: subprocess.Popen[bytes], log: Path) -> None:
    form = PromptForm(255) if launch.takes_ids else PromptForm()
    workload = Workload(BenchOptions(ignore_eos=False), launch.model, form)
    body = workload.body([100, 101] if launch.takes_ids else ["time"], 1)
    client = ApiClient(url, None, START_LIMIT_S)
    deadline_s = time.monotonic() + START_LIMIT_S
    try:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise DidNotStart(f"ended with status {process.returncode}: {last_words(log)}")
            record = await client.stream(workload.path, body)
            if record.error is None:
                return
            await asyncio.sleep(POLL_S)
    finally:
        client.close()
        await asyncio.sleep(0)  # the loop closes the sockets
    raise DidNotStart(f"no answer within {START_LIMIT_S:g} s; last {record.error}; {last_words(log)}")


def last_words(log: Path) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks, waits, then ends what is left of the tree."""
    pids = processes.tree(process.pid) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    for pid in pids[1:]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
