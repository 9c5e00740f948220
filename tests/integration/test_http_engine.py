"""`quire serve` on a real checkpoint: the command, the engine process and the API together."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.helpers.checkpoints import make_checkpoint, reference_embedding
from tests.helpers.http import CHAT, COMPLETIONS, EMBEDDINGS, HELLO, chat_text, completion_text, frames

pytestmark = pytest.mark.slow


class Quire:
    """A running `quire serve`."""

    def __init__(self, model: Path, log: Path) -> None:
        command = [sys.executable, "-m", "server.cli", "serve", str(model), "--port", "0"]
        command += ["--served-model-name", "tiny", "--max-num-seqs", "16"]
        self.model = model
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stderr=out)
        self._until(lambda: "metrics   http" in log.read_text() or self.process.poll() is not None)
        found = re.search(r"API +(http://127\.0\.0\.1:\d+)/v1", log.read_text())
        assert found, log.read_text()
        self.http = httpx.Client(base_url=found[1], timeout=30)

    @staticmethod
    def _until(condition: object, timeout_s: float = 60) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline_s
            time.sleep(0.02)

    def until_status(self, path: str, status: int) -> None:
        self._until(lambda: self.http.get(path).status_code == status)

    def engine_pid(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[0])

    def close(self) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def quire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Quire]:
    folder = tmp_path_factory.mktemp("serve")
    running = Quire(make_checkpoint(folder, "llama"), folder / "log")
    with contextlib.closing(running):
        yield running


def test_the_report(quire: Quire) -> None:
    text = quire.log.read_text()
    for words in (
        "model     tiny: LlamaForCausalLM",
        "weights",
        "KV pool",
        "blocks of",
        "chosen    ",
        "/docs",
    ):
        assert words in text, text


def test_embeddings(quire: Quire) -> None:
    """Through the engine process: the right vectors in the right places, and what they share is reused."""
    inputs = [[(7 * i + 3 * k) % 90 + 5 for i in range(70)] for k in range(20)]
    first = quire.http.post(EMBEDDINGS, json={"input": inputs, "encoding_format": "base64"}).json()
    wanted = [reference_embedding(quire.model, ids) for ids in inputs]
    for entry, vector in zip(first["data"], wanted, strict=True):
        found = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        assert found @ vector > 0.999  # the served model is rounded to bf16
    assert first["usage"]["prompt_tokens"] == first["usage"]["total_tokens"] == 20 * 70
    again = quire.http.post(EMBEDDINGS, json={"input": inputs, "explain_cache": True}).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 20 * 32
    assert {report["reason"] for report in again["cache"]} <= {"partial_block", "last_token"}
    for entry, before in zip(again["data"], first["data"], strict=True):
        found = np.frombuffer(base64.b64decode(before["embedding"]), "<f4")
        assert np.dot(entry["embedding"], found) > 0.999
    refused = quire.http.post(EMBEDDINGS, json={"input": "a", "dimensions": 65})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "dimensions"


def test_streamed_and_whole_replies_agree(quire: Quire) -> None:
    for path, prompt, text in (
        (CHAT, {"messages": HELLO}, chat_text),
        (COMPLETIONS, {"prompt": "hello"}, completion_text),
    ):
        body = {**prompt, "temperature": 0, "max_tokens": 24, "logprobs": True if path == CHAT else 1}
        whole = quire.http.post(path, json=body).json()["choices"][0]
        streamed = text(frames(quire.http.post(path, json={**body, "stream": True}).text))
        assert streamed == (whole["message"]["content"] if path == CHAT else whole["text"])
        assert whole["finish_reason"] == "length"


def test_a_prefix_is_cached_and_told(quire: Quire) -> None:
    body = {
        "prompt": "a prompt of more than two blocks, so that something is there to be shared " * 2,
        "max_tokens": 2,
    }
    quire.http.post(COMPLETIONS, json=body)
    usage = quire.http.post(COMPLETIONS, json=body).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0


def test_echoed_probabilities(quire: Quire) -> None:
    body = {"prompt": [[5, 6, 7, 8]], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    lists = quire.http.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]
    assert lists["token_logprobs"][0] is None and len(lists["tokens"]) == 5
    assert all(value < 0 for value in lists["token_logprobs"][1:])


def test_what_cannot_fit_is_refused_with_the_numbers(quire: Quire) -> None:
    error = quire.http.post(COMPLETIONS, json={"prompt": "hello", "max_tokens": 5000}).json()["error"]
    assert (
        error["code"] == "context_length_exceeded"
        and "256" in error["message"]
        and "5000" in error["message"]
    )


def test_a_killed_engine_is_replaced(quire: Quire) -> None:
    body = {"prompt": "hello", "max_tokens": 200, "n": 8, "stream": True}
    with quire.http.stream("POST", COMPLETIONS, json=body) as reply:
        text = ""
        for piece in reply.iter_text():
            if not text:
                os.kill(quire.engine_pid(), signal.SIGKILL)
            text += piece
    assert frames(text)[-1]["error"]["code"] == "engine_unavailable"
    quire.until_status("/ready", 200)
    assert quire.http.post(COMPLETIONS, json={"prompt": "hello"}).status_code == 200
    assert "quire_engine_restarts_total 1.0" in quire.http.get("/metrics").text


def test_it_ends_cleanly(quire: Quire) -> None:
    """The last one: it ends the server."""
    quire.until_status("/ready", 200)
    engine = quire.engine_pid()
    quire.process.send_signal(signal.SIGTERM)
    assert quire.process.wait(20) == 0
    assert not Path(f"/proc/{engine}").exists()
    assert "Traceback" not in quire.log.read_text()
