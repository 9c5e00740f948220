"""The names of vLLM, for boards, autoscalers and the Kubernetes inference gateway that read those.

Same numbers as `quire_*`, under vLLM's names, labels (`model_name`, `engine`) and meanings. What Quire does
not measure is left out rather than made up. Off by default: Prometheus reserves the colon for recording
rules, and `promtool check metrics` refuses such names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import Metric

from engine.stats import BUCKETS
from engine.types import EngineInfo, EngineSnapshot, FinishReason
from server.metrics import families as make
from server.metrics.records import Records
from server.metrics.state import State

ENGINE = "0"

Row = tuple[Sequence[str], float]

# (name after the colon, help, key in the snapshot)
_HISTOGRAMS = (
    ("iteration_tokens_total", "Tokens per engine step.", "step_tokens"),
    ("request_queue_time_seconds", "Time in the queue.", "queue_s"),
    ("request_prefill_time_seconds", "Admission to first token.", "prefill_s"),
    ("request_decode_time_seconds", "First token to last.", "decode_s"),
    ("kv_block_lifetime_seconds", "Blocks: allocation to eviction.", "block_age_s"),
    ("kv_block_idle_before_evict_seconds", "Blocks: last use to eviction.", "block_idle_s"),
    ("kv_block_reuse_gap_seconds", "Blocks: last use to reuse.", "block_reuse_gap_s"),
)


def families(state: State, records: Records, model: str) -> Iterator[Metric]:
    """Every alias."""
    snapshot = state.snapshot
    names = _Names(model)
    for name, text, gauge in (
        ("num_requests_running", "Requests in the running batch.", snapshot.running),
        ("num_requests_waiting", "Requests in the queue.", snapshot.waiting),
        ("kv_cache_usage_perc", "Blocks in use, of all, 0 to 1; cached ones are free.", _usage(snapshot)),
    ):
        yield names.gauges(name, text, "", {"": gauge})
    waits = {"capacity": snapshot.waiting, "deferred": 0}
    yield names.gauges("num_requests_waiting_by_reason", "Requests in the queue, by why.", "reason", waits)
    for name, text, count in (
        ("prefix_cache_queries", "Prompt tokens looked up.", snapshot.prefix_query_tokens),
        ("prefix_cache_hits", "Prompt tokens found.", snapshot.prefix_hit_tokens),
        ("num_preemptions", "Preemptions.", snapshot.preemptions),
        ("prompt_tokens", "Prompt tokens, cached ones included.", snapshot.prompt_tokens),
        ("prompt_tokens_cached", "Prompt tokens found in the cache.", snapshot.prefix_hit_tokens),
        ("generation_tokens", "Tokens generated.", snapshot.generated_tokens),
    ):
        yield names.counters(name, text, "", {"": count})
    sources = {
        "local_compute": snapshot.prompt_tokens - snapshot.prefix_hit_tokens,
        "local_cache_hit": snapshot.prefix_hit_tokens,
    }
    yield names.counters("prompt_tokens_by_source", "Prompt tokens by where from.", "source", sources)
    finished = {reason.value: snapshot.requests_finished.get(reason, 0) for reason in FinishReason}
    yield names.counters("request_success", "Choices the engine ended.", "finished_reason", finished)
    rejected = {"max_num_queued_reqs": records.refused["queue_full"], "max_num_queued_tokens": 0}
    yield names.counters("admission_rejections", "Refused because the queue was full.", "reason", rejected)
    for name, text, key in _HISTOGRAMS:
        data = snapshot.histograms.get(key)
        yield make.histogram(f"vllm:{name}", text, BUCKETS[key], data, names.labels, names.values)
    for name, text, observed in (
        ("time_to_first_token_seconds", "Arrival to first token.", records.first_token_s),
        ("inter_token_latency_seconds", "Between two tokens of one choice.", records.inter_token_s),
        ("e2e_request_latency_seconds", "Arrival to last token.", records.request_s),
    ):
        yield make.histogram(
            f"vllm:{name}", text, observed.bounds, observed.data(), names.labels, names.values
        )
    if state.info is not None:
        config = {"model_name": model, "engine": ENGINE, **_cache_config(state.info)}
        yield make.info("vllm:cache_config", "How the cache is set up.", config)


def _usage(snapshot: EngineSnapshot) -> float:
    return snapshot.blocks_in_use / snapshot.blocks_total if snapshot.blocks_total else 0.0


def _cache_config(info: EngineInfo) -> dict[str, str]:
    """As vLLM counts: block 0, which is never handed out, is one of `num_gpu_blocks`."""
    return {
        "block_size": str(info.block_size),
        "num_gpu_blocks": str(info.num_blocks),
        "cache_dtype": info.kv_dtype,
        "enable_prefix_caching": str(info.prefix_caching),
    }


class _Names:
    """Puts the two labels that all of them have in front of a third, if there is one."""

    labels: Sequence[str] = ("model_name", "engine")

    def __init__(self, model: str) -> None:
        self.values = (model, ENGINE)

    def gauges(self, name: str, text: str, label: str, rows: Mapping[str, float]) -> Metric:
        return make.gauges(f"vllm:{name}", text, *self._table(label, rows))

    def counters(self, name: str, text: str, label: str, rows: Mapping[str, float]) -> Metric:
        return make.counters(f"vllm:{name}", text, *self._table(label, rows))

    def _table(self, label: str, rows: Mapping[str, float]) -> tuple[Sequence[str], list[Row]]:
        if not label:
            return self.labels, [(self.values, value) for value in rows.values()]
        return (*self.labels, label), [((*self.values, key), value) for key, value in rows.items()]
