"""From records to figures: percentiles, throughput, errors by kind; as a table and as JSON."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from server.bench.client import Record
from server.bench.options import BenchOptions


@dataclass(frozen=True, slots=True)
class Distribution:
    """A sample in five numbers and its mean, in the sample's unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def distribution(sample: Iterable[float]) -> Distribution | None:
    """None for an empty sample."""
    ordered = sorted(sample)
    if not ordered:
        return None
    p50, p90, p95, p99 = (percentile(ordered, percent) for percent in (50, 90, 95, 99))
    return Distribution(len(ordered), sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted sample."""
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Result:
    """The figures of one run.

    Latencies and throughput count successful requests only; `duration_s` is from the first start to the
    last end among them.

    Args:
        prompt_form: "ids" or "text".
    """

    def __init__(self, options: BenchOptions, model: str, prompt_form: str, records: list[Record]) -> None:
        self.options = options
        self.model = model
        self.prompt_form = prompt_form
        self.done = [record for record in records if record.error is None]
        self.failed = [record for record in records if record.error is not None]
        self.missing = options.requests - len(records)  # never sent: the time was over
        starts = [record.start_s for record in self.done]
        ends = [record.end_s for record in self.done]
        self.duration_s = max(ends) - min(starts) if self.done else 0.0
        self.has_usage = all(record.output_tokens >= 0 for record in self.done)
        self.output_tokens = sum(_tokens(record) for record in self.done)
        self.text_chunks = sum(len(record.text_s) for record in self.done)
        self.prompt_tokens = sum(max(0, record.prompt_tokens) for record in self.done)
        self.cached_tokens = sum(record.cached_tokens for record in self.done)

    @property
    def one_token_per_chunk(self) -> bool:
        return self.output_tokens == self.text_chunks

    def per_second(self, count: float) -> float:
        return count / self.duration_s if self.duration_s else 0.0

    def ttft_s(self) -> Distribution | None:
        """Time to the first chunk with text."""
        return distribution(r.text_s[0] - r.start_s for r in self.done if r.text_s)

    def tpot_s(self) -> Distribution | None:
        """Per request: time per output token after the first chunk."""
        return distribution(
            (r.text_s[-1] - r.text_s[0]) / (_tokens(r) - 1)
            for r in self.done
            if len(r.text_s) > 1 and _tokens(r) > 1
        )

    def gap_s(self) -> Distribution | None:
        """Between consecutive chunks with text: the inter-token latency where each holds one token."""
        return distribution(late - early for r in self.done for early, late in pairwise(r.text_s))

    def end_to_end_s(self) -> Distribution | None:
        return distribution(r.end_s - r.start_s for r in self.done)

    def errors(self) -> dict[str, tuple[int, str]]:
        """Kind -> (how many, the message of one)."""
        kinds: dict[str, tuple[int, str]] = {}
        for record in self.failed:
            assert record.error is not None
            count, message = kinds.get(record.error.kind, (0, record.error.message))
            kinds[record.error.kind] = (count + 1, message)
        if self.missing:
            kinds["not sent"] = (self.missing, "--max-seconds ended the run before")
        return kinds


def _tokens(record: Record) -> int:
    return record.output_tokens if record.output_tokens >= 0 else len(record.text_s)


def render_table(result: Result) -> str:
    """What `quire bench` prints."""
    lines = [*_describe(result), "", *_throughput(result)]
    latencies = [
        ("time to first token", result.ttft_s()),
        ("inter-token latency" if result.one_token_per_chunk else "between chunks", result.gap_s()),
        ("time per output token", result.tpot_s()),
        ("end to end", result.end_to_end_s()),
    ]
    head = "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p95", "p99", "max"))
    lines += ["", f"{'milliseconds':<24}{head}"]
    lines += [_latency_row(name, found) for name, found in latencies if found is not None]
    lines += [f"\nfailed: {kind}: {count} ({message})" for kind, (count, message) in result.errors().items()]
    return "\n".join(lines)


def _describe(result: Result) -> list[str]:
    options = result.options
    if options.rate is None:
        load = f"closed loop, {options.concurrency} clients"
    else:
        load = f"open loop, {options.rate:g} requests/s"
    shared = f"{options.shared_prefix_len} shared + " if options.shared_prefix_len else ""
    return [
        f"{result.model} at {options.url}, {options.api}, prompts as {result.prompt_form}",
        f"{load}; {options.requests} requests of {shared}{options.input_len} tokens in, "
        f"{options.output_len} out",
    ]


def _throughput(result: Result) -> list[str]:
    done, sent = len(result.done), result.options.requests
    rows = [
        ("requests succeeded", f"{done} of {sent} in {result.duration_s:.2f} s"),
        ("requests/s", f"{result.per_second(done):.2f}"),
        ("output tokens/s", f"{result.per_second(result.output_tokens):,.1f}"),
        ("prompt tokens/s", f"{result.per_second(result.prompt_tokens):,.1f}"),
    ]
    if result.prompt_tokens:
        share = 100 * result.cached_tokens / result.prompt_tokens
        cached = f"{result.cached_tokens:,} of {result.prompt_tokens:,} prompt tokens ({share:.1f} %)"
        rows.append(("served from cache", cached))
    if not result.has_usage:
        rows.append(("tokens", "the server sends no usage: each chunk is taken for one token"))
    elif not result.one_token_per_chunk:
        rows.append(("chunks with text", f"{result.text_chunks:,} for {result.output_tokens:,} tokens"))
    return [f"{name:<24}{value}" for name, value in rows]


def _latency_row(name: str, found: Distribution) -> str:
    values = (found.mean, found.p50, found.p90, found.p95, found.p99, found.max)
    return f"{name:<24}" + "".join(f"{1000 * value:>10.2f}" for value in values)


def as_dict(result: Result) -> dict[str, Any]:
    """Everything, for JSON; times in seconds. The API key stays out."""
    options = {**asdict(result.options), "api_key": None}
    latencies = {
        "ttft_s": result.ttft_s(),
        "gap_s": result.gap_s(),
        "tpot_s": result.tpot_s(),
        "end_to_end_s": result.end_to_end_s(),
    }
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "client": {"python": platform.python_version(), "machine": platform.machine()},
        "options": options,
        "model": result.model,
        "prompt_form": result.prompt_form,
        "duration_s": result.duration_s,
        "requests": {
            "succeeded": len(result.done),
            "failed": len(result.failed),
            "not_sent": result.missing,
        },
        "requests_per_s": result.per_second(len(result.done)),
        "output_tokens": result.output_tokens,
        "output_tokens_per_s": result.per_second(result.output_tokens),
        "prompt_tokens": result.prompt_tokens,
        "cached_tokens": result.cached_tokens,
        "text_chunks": result.text_chunks,
        "one_token_per_chunk": result.one_token_per_chunk,
        "has_usage": result.has_usage,
        "latency": {name: asdict(found) if found else None for name, found in latencies.items()},
        "errors": {
            kind: {"count": count, "example": message} for kind, (count, message) in result.errors().items()
        },
    }


def write_json(result: Result, path: str) -> None:
    Path(path).write_text(json.dumps(as_dict(result), indent=2) + "\n")
