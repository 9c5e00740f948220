"""What the terminal shows while a server starts: progress, then what was decided and why, then where to go.

Knows EngineInfo and how to say it in a few lines; does not start anything. Everything goes to stderr: stdout
belongs to programs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TextIO

from tqdm import tqdm

from engine.types import EngineInfo
from server.settings import ServerSettings

logger = logging.getLogger("quire")

_PLAIN_STEP = 0.25


class LoadProgress:
    """Shows loaded bytes: a bar on a terminal, a line per quarter elsewhere."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._bar: tqdm[None] | None = None
        self._next_share = _PLAIN_STEP

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        if self._out.isatty():
            self._draw(done_bytes, total_bytes)
        elif total_bytes and done_bytes >= self._next_share * total_bytes:
            share = done_bytes / total_bytes
            print(f"Loading weights: {share:.0%} of {size(total_bytes)}", file=self._out, flush=True)
            self._next_share = (share // _PLAIN_STEP + 1) * _PLAIN_STEP

    def _draw(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=total_bytes,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                desc="Loading weights",
                file=self._out,
            )
        self._bar.update(done_bytes - self._bar.n)
        if done_bytes >= total_bytes:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def size(count_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.0f} B" if unit == "B" else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} TiB"


def lines(info: EngineInfo, settings: ServerSettings, url: str) -> list[str]:
    """The start-up report."""
    blocks = info.num_blocks - 1  # block 0 holds nothing
    tokens = blocks * info.block_size
    sharing = "prefix caching on" if info.prefix_caching else "prefix caching off"
    fits = min(info.largest_request_tokens, info.max_model_len)
    held = f", {info.quantization}" if info.quantization else ""
    report = [
        f"model     {settings.model_name}: {info.architecture}, {info.dtype}, on {_device(info)}",
        f"weights   {size(info.weight_bytes)}{held}",
        f"KV pool   {size(info.kv_bytes)} of {info.kv_dtype}: {blocks} blocks of {info.block_size} tokens = "
        f"{tokens} tokens, {sharing}",
        f"requests  up to {fits} tokens each (prompt + output), {info.max_num_seqs} at a time, "
        f"{info.max_queued_requests} queued",
    ]
    report += [f"chosen    {name} = {value}: {why}" for name, value, why in info.reasons]
    if settings.demo:
        report.insert(0, "demo      This is the small built-in demo model: it only knows Quire itself.")
        report.insert(1, "          Serve your own with: quire serve MODEL")
    keys = " (API key needed)" if settings.tenants().keys_configured else ""
    page = [f"live page {url}/ui"] if settings.ui else []
    return [
        *report,
        *page,
        f"API       {url}/v1{keys}",
        f"docs      {url}/docs",
        f"metrics   {url}/metrics",
    ]


def fields(info: EngineInfo, url: str) -> dict[str, object]:
    """The same for programs."""
    facts = asdict(info)
    chosen = {name: value for name, value, _ in facts.pop("reasons")}
    return {"url": url, **facts, "chosen": chosen}


def _device(info: EngineInfo) -> str:
    return info.backend if info.backend.startswith(info.device) else f"{info.device} ({info.backend})"


def printer(settings: ServerSettings, url: str, info: Callable[[], EngineInfo]) -> Callable[[], None]:
    """Prints the report when called."""

    def show() -> None:
        if settings.log_format == "json":
            logger.info(
                "ready to serve %s at %s", settings.model_name, url, extra={"fields": fields(info(), url)}
            )
            return
        print("\n".join(lines(info(), settings, url)), file=sys.stderr, flush=True)

    return show
