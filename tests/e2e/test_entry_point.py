"""What a container of docker-compose.yml would run, run here: the same command, environment and health check.

Only the port, the address (this machine alone) and the paths of volumes differ.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.helpers.containers import compose, seconds, started_by, without_host_settings
from tests.helpers.servers import free_port, until

SERVICE = compose()["services"]["quire-cpu"]


@dataclass
class Container:
    process: subprocess.Popen[str]
    environment: dict[str, str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environment['QUIRE_PORT']}"

    def healthy(self) -> bool:
        """By the health check itself."""
        kind, program, *rest = SERVICE["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        done = subprocess.run([sys.executable, *rest], env=self.environment, capture_output=True, timeout=30)
        return done.returncode == 0


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    command, image = started_by(SERVICE)
    bin_path = Path(sys.executable).parent
    if not (bin_path / command[0]).exists():
        pytest.skip("the `quire` command is not installed")
    assert image["PATH"].startswith("/opt/quire/bin:")
    environment = {
        **without_host_settings(),
        **image,
        "PATH": f"{bin_path}:/usr/bin:/bin",
        "QUIRE_HOST": "127.0.0.1",
        "QUIRE_PORT": str(free_port()),
        "HF_HOME": str(tmp_path / "huggingface"),
    }
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(bin_path / command[0]), *command[1:]],
            cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            yield Container(process, environment, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(10)


def test_starts_answers_and_stops_in_time(container: Container) -> None:
    assert not container.healthy()
    until(lambda: container.process.poll() is not None or container.healthy(), 60, container.log.read_text)
    assert container.process.poll() is None, container.log.read_text()
    body = {"prompt": "Quire is", "max_tokens": 4}
    assert httpx.post(f"{container.url}/v1/completions", json=body, timeout=30).status_code == 200
    assert httpx.get(f"{container.url}/metrics", timeout=30).status_code == 200
    container.process.send_signal(signal.SIGTERM)
    assert container.process.wait(seconds(SERVICE["stop_grace_period"])) == 0, container.log.read_text()
    assert not container.healthy()
