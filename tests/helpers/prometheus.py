"""A real Prometheus with this repository's configuration and rules, on a free port of 127.0.0.1."""

from __future__ import annotations

import contextlib
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.helpers.servers import ROOT, free_port, until

CONFIG = ROOT / "deploy/prometheus/prometheus.yml"

Sample = tuple[float, float]  # seconds, value


class Prometheus:
    """Its HTTP API, as far as the tests ask.

    Attributes:
        now_s: the moment that questions are about; None is the present, which moves between two of them.
    """

    now_s: float | None = None

    def __init__(self, port: int) -> None:
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def get(self, path: str, **params: Any) -> Any:
        reply = self.http.get(f"/api/v1/{path}", params=params)
        body = reply.json()
        assert body["status"] == "success", f"{params}: {body}"
        return body["data"]

    def at_once(self, expr: str) -> list[Any]:
        """The expression at one moment: a list of series."""
        moment = {} if self.now_s is None else {"time": self.now_s}
        return list(self.get("query", query=expr, **moment)["result"])

    def over_time(self, expr: str, start_s: float, end_s: float, step_s: float = 1) -> list[Any]:
        data = self.get("query_range", query=expr, start=start_s, end=end_s, step=step_s)
        return list(data["result"])

    def value(self, expr: str) -> float:
        """Of an expression with a single series."""
        (series,) = self.at_once(expr)
        return float(series["value"][1])

    def samples(self, selector: str, window: str = "10m") -> dict[tuple[tuple[str, str], ...], list[Sample]]:
        """Every scraped sample, by labels."""
        found = {}
        for series in self.at_once(f"{selector}[{window}]"):
            labels = tuple(sorted(series["metric"].items()))
            found[labels] = [(float(at), float(value)) for at, value in series["values"]]
        return found

    def scrapes(self, selector: str, window: str = "10m") -> dict[float, float]:
        """The sum over all series of a metric at each scrape."""
        sums: dict[float, float] = {}
        for samples in self.samples(selector, window).values():
            for at, value in samples:
                sums[at] = sums.get(at, 0.0) + value
        return sums


def finite(series: list[Any]) -> bool:
    """Whether there is a number in it that is one."""
    values = [value for one in series for _, value in one["values"]]
    return any(math.isfinite(float(value)) for value in values)


def adapted(target: str, key_file: Path) -> dict[str, Any]:
    """Our configuration for a server elsewhere, and in a hurry."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "quire"]
    job["static_configs"] = [{"targets": [target]}]
    job["authorization"]["credentials_file"] = str(key_file)
    config["scrape_configs"] = [job]
    return config


@contextlib.contextmanager
def prometheus(tmp_path: Path, target: str, key: str = "none") -> Iterator[Prometheus]:
    """Starts Prometheus, waits until it has scraped the target, and ends it (by pid) afterwards."""
    key_file, config = tmp_path / "key", tmp_path / "prometheus.yml"
    key_file.write_text(key + "\n")
    config.write_text(yaml.safe_dump(adapted(target, key_file)))
    port = free_port()
    log = tmp_path / "prometheus.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            cwd=tmp_path,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    server = Prometheus(port)

    def has_scraped() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return any(series["value"][1] == "1" for series in server.at_once('up{job="quire"}'))
        except (httpx.TransportError, ValueError):
            return False

    try:
        until(has_scraped, 30, log.read_text)
        yield server
    finally:
        server.http.close()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
