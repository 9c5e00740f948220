"""What a stranger does: serve a model, chat with it by the official client, stop it, break it.

pytest tests/e2e/test_serve.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.servers import ROOT, Server, free_port, serve, until

QUESTION = [{"role": "user", "content": "Which port does Quire listen on?"}]


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("builtin")) as server:
        yield server


@pytest.fixture(scope="module")
def client(builtin: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{builtin.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chats_about_itself(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    reply = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    assert "8000" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"


def test_streams_the_same_text(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)  # type: ignore[arg-type]
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]


def test_a_second_turn_reuses_the_first(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    long = [{"role": "system", "content": "You help people with Quire. " * 12}, *QUESTION]
    first = client.chat.completions.create(model=model, messages=long, temperature=0)  # type: ignore[arg-type]
    again = client.chat.completions.create(model=model, messages=long, temperature=0)  # type: ignore[arg-type]
    assert first.choices[0].message.content == again.choices[0].message.content
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= 64


def test_a_seed_gives_the_same_text_in_any_batch(builtin: Server) -> None:
    body = {"prompt": "Quire is", "temperature": 1.0, "seed": 11, "max_tokens": 24, "ignore_eos": True}
    alone = builtin.post("/v1/completions", **body)["choices"][0]["text"]
    crowd = [
        threading.Thread(
            target=builtin.post, args=("/v1/completions",), kwargs={**body, "seed": seed, "max_tokens": 60}
        )
        for seed in range(6)
    ]
    for thread in crowd:
        thread.start()
    together = builtin.post("/v1/completions", **body)["choices"][0]["text"]
    for thread in crowd:
        thread.join()
    assert together == alone


def test_prints_where_things_are(builtin: Server) -> None:
    for word in (builtin.url, "/docs", "/metrics", "demo", "blocks"):
        assert word in builtin.log, builtin.log


def test_serves_a_checkpoint_from_disk(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen3")
    with serve(tmp_path, str(path), "--dtype", "float32", "--served-model-name", "mine") as server:
        assert server.http.get("/v1/models").json()["data"][0]["id"] == "mine"
        reply = server.post("/v1/completions", model="mine", prompt=[5, 6, 7], max_tokens=5, ignore_eos=True)
        assert reply["usage"]["completion_tokens"] == 5


def stream_lines(server: Server, seen: list[str], **body: object) -> None:
    """Collects SSE lines until the stream ends, however it ends."""
    body = {"prompt": "Quire is", "max_tokens": 1500, "ignore_eos": True, "stream": True, **body}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
        seen.extend(line for line in reply.iter_lines() if line)


def test_sigterm_drains_and_exits_with_0(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        seen: list[str] = []
        thread = threading.Thread(target=stream_lines, args=(server, seen), kwargs={"max_tokens": 400})
        thread.start()
        until(lambda: "quire_requests_running 1" in server.http.get("/metrics").text, 10)
        server.process.send_signal(signal.SIGTERM)
        thread.join(30)
        assert seen[-1] == "data: [DONE]"
        assert server.process.wait(20) == 0, server.log
        assert json.loads(seen[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_a_killed_engine_comes_back(tmp_path: Path) -> None:
    with serve(tmp_path) as server:
        golden = server.post("/v1/completions", prompt="Quire is", max_tokens=8, temperature=0)
        seen: list[str] = []
        thread = threading.Thread(target=stream_lines, args=(server, seen))
        thread.start()
        until(lambda: "quire_requests_running 1" in server.http.get("/metrics").text, 10)
        killed_s = time.monotonic()
        os.kill(server.engine_pid(), signal.SIGKILL)
        until(lambda: server.http.get("/health").status_code == 503, 2)
        thread.join(2)
        assert not thread.is_alive() and time.monotonic() - killed_s < 4
        assert seen[-1] == "data: [DONE]" and '"error"' in seen[-2]
        server.wait_ready(20)
        again = server.post("/v1/completions", prompt="Quire is", max_tokens=8, temperature=0)
        assert again["choices"] == golden["choices"]


@pytest.mark.parametrize("problem", ["missing", "pickle", "architecture", "port", "memory"])
def test_what_cannot_work_is_refused_in_one_line(problem: str, tmp_path: Path, builtin: Server) -> None:
    path = tmp_path / "model"
    if problem != "missing":
        shutil.copytree(make_checkpoint(tmp_path, "llama"), path)
    args = [str(path)]
    port = free_port()
    if problem == "pickle":
        next(path.glob("*.safetensors")).unlink()
        (path / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    elif problem == "architecture":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": ["T5Model"]}))
    elif problem == "port":
        port = int(builtin.url.rsplit(":", 1)[1])
    elif problem == "memory":
        args += ["--kv-cache-memory", "900GiB"]
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "serve", *args, "--port", str(port)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode not in (0, -6, -11)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(line) > 30
