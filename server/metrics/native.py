"""The server's own names: `quire_*`, as `promtool check metrics` likes them.

Every series exists from the first scrape on, at zero, so that a rate sees its first increase; label values
are those of enums and of the configuration. `quire_http_requests` is the one exception: it has the routes
and statuses that occurred.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client.core import Metric

from engine.stats import BUCKETS
from engine.types import EngineInfo, EngineSnapshot, FinishReason, StepRun
from engine.views import WHATIF_SIZES, EvictionCause, MissReason, TenantUse
from server import __version__
from server.metrics import families as make
from server.metrics.records import APIS, OUTCOMES, REFUSALS, Records
from server.metrics.state import State, resident_bytes, tenant_uses

WHATIF_KEYS = tuple(f"{size:g}" for size in WHATIF_SIZES)

Read = Callable[[EngineSnapshot], float]

# (metric, help, what of the snapshot)
_GAUGES: tuple[tuple[str, str, Read], ...] = (
    ("quire_requests_running", "Choices in the running batch.", lambda s: s.running),
    ("quire_requests_waiting", "Choices queued for their first or next step.", lambda s: s.waiting),
    (
        "quire_kv_blocks_shared",
        "Blocks in use by more than one request; counted in use once.",
        lambda s: s.blocks_shared,
    ),
    ("quire_kv_pool_blocks", "Size of the KV pool.", lambda s: s.blocks_total),
    (
        "quire_kv_usage_ratio",
        "Blocks in use, of all.",
        lambda s: s.blocks_in_use / s.blocks_total if s.blocks_total else 0.0,
    ),
    ("quire_kv_tokens_held", "Tokens whose keys and values are in blocks in use.", lambda s: s.tokens_held),
    (
        "quire_kv_cached_tokens",
        "Tokens whose keys and values are in cached blocks.",
        lambda s: s.cached_tokens,
    ),
    (
        "quire_kv_ghost_blocks",
        "Evicted blocks remembered for the what-if curve.",
        lambda s: s.ghosts,
    ),
)
_COUNTERS: tuple[tuple[str, str, Read], ...] = (
    ("quire_kv_allocated_blocks", "Blocks handed out.", lambda s: s.allocated_blocks),
    ("quire_kv_reused_blocks", "Cached blocks taken into use by a prefix hit.", lambda s: s.reused_blocks),
    ("quire_prefix_queries", "Requests looked up in the prefix cache.", lambda s: s.prefix_queries),
    ("quire_prefix_hits", "Requests of which at least one block was found.", lambda s: s.prefix_hits),
    (
        "quire_prefix_query_tokens",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_query_tokens,
    ),
    (
        "quire_prefix_hit_tokens",
        "Prompt tokens found there and not computed.",
        lambda s: s.prefix_hit_tokens,
    ),
    ("quire_preemptions", "Requests set back to the queue for lack of blocks.", lambda s: s.preemptions),
    ("quire_recomputed_tokens", "Tokens computed again after a preemption.", lambda s: s.recomputed_tokens),
    ("quire_prompt_tokens", "Prompt tokens of admitted requests.", lambda s: s.prompt_tokens),
    ("quire_generated_tokens", "Tokens generated.", lambda s: s.generated_tokens),
    ("quire_engine_steps", "Steps the engine ran.", lambda s: s.steps),
    ("quire_engine_busy_seconds", "Time the engine spent in steps.", lambda s: s.busy_s),
)
# (metric, label, its values, help, what of the snapshot): a count for each value
_COUNTERS_BY: tuple[
    tuple[str, str, Iterable[str], str, Callable[[EngineSnapshot], Mapping[str, int]]], ...
] = (
    (
        "quire_kv_evicted_blocks",
        "cause",
        EvictionCause,
        "Blocks whose cached content was given up.",
        lambda s: s.evicted_blocks,
    ),
    (
        "quire_prefix_misses",
        "reason",
        MissReason,
        "Requests by why the reuse of their prompt ended where it did.",
        lambda s: s.misses,
    ),
    (
        "quire_prefix_miss_tokens",
        "reason",
        MissReason,
        "Prompt tokens that were not reused, by why.",
        lambda s: s.miss_tokens,
    ),
    (
        "quire_whatif_hit_tokens",
        "pool",
        WHATIF_KEYS,
        "Prompt tokens that a pool of so many times the size would have found (an estimate).",
        lambda s: s.whatif_hit_tokens,
    ),
    (
        "quire_engine_requests_finished",
        "reason",
        FinishReason,
        "Choices the engine ended.",
        lambda s: s.requests_finished,
    ),
)
# (key in the snapshot, metric, help)
_HISTOGRAMS = (
    ("queue_s", "quire_request_queue_seconds", "From a request's arrival at the engine to its admission."),
    ("prefill_s", "quire_request_prefill_seconds", "From a request's admission to its first token."),
    ("decode_s", "quire_request_decode_seconds", "From a choice's first token to its last."),
    ("step_s", "quire_engine_step_seconds", "Duration of an engine step."),
    ("step_tokens", "quire_engine_step_tokens", "Tokens computed in a step."),
    ("step_sequences", "quire_engine_step_sequences", "Choices in a step."),
    ("hit_ratio", "quire_prefix_hit_ratio", "Share of a request's prompt tokens that was reused."),
    (
        "block_age_s",
        "quire_kv_block_age_at_eviction_seconds",
        "Of a block whose cached content is given up: time since it was taken.",
    ),
    (
        "block_idle_s",
        "quire_kv_block_idle_before_eviction_seconds",
        "Of a block whose cached content is given up: time since it was last in use.",
    ),
    (
        "block_reuse_gap_s",
        "quire_kv_block_idle_before_reuse_seconds",
        "Of a cached block taken into use again: time since it was last in use.",
    ),
)


def engine(state: State, tenants: tuple[str, ...], cache_isolation: bool) -> Iterator[Metric]:
    """What the engine says."""
    snapshot, info = state.snapshot, state.info
    yield make.gauge("quire_engine_up", "1 while the engine lives and makes progress, else 0.", int(state.up))
    yield make.counter("quire_engine_restarts", "Times a new engine replaced a dead one.", state.restarts)
    for name, text, read in _GAUGES:
        yield make.gauge(name, text, read(snapshot))
    yield from _blocks(snapshot, info.block_size if info else 0)
    for name, text, read in _COUNTERS:
        yield make.counter(name, text, read(snapshot))
    for name, label, values, text, read_all in _COUNTERS_BY:
        counts = read_all(snapshot)
        yield make.counters(name, text, (label,), (((str(v),), counts.get(v, 0)) for v in values))
    yield make.counters(
        "quire_engine_step_runs",
        "Steps by how they ran on the device, and why not better.",
        ("how", "reason"),
        (((run.how, run.reason), snapshot.step_runs.get(run, 0)) for run in StepRun),
    )
    for key, name, text in _HISTOGRAMS:
        yield make.histogram(name, text, BUCKETS[key], snapshot.histograms.get(key))
    yield from _tenants(tenant_uses(snapshot, tenants))
    yield make.info("quire_config", "How the engine is set up.", _config(info, cache_isolation))


def _blocks(snapshot: EngineSnapshot, block_size: int) -> Iterator[Metric]:
    slots = snapshot.blocks_in_use * block_size
    yield make.gauges(
        "quire_kv_blocks",
        "Blocks of the KV pool by state; the three add up to the pool.",
        ("state",),
        (
            (("in_use",), snapshot.blocks_in_use),
            (("cached",), snapshot.blocks_cached),
            (("free",), snapshot.blocks_free),
        ),
    )
    yield make.gauge("quire_kv_block_size_tokens", "Tokens in a block.", block_size)
    yield make.gauge(
        "quire_kv_fill_ratio",
        "Slots of blocks in use that hold a token, of all their slots; 1 when none is in use.",
        snapshot.tokens_held / slots if slots else 1.0,
    )
    yield make.gauge(
        "quire_kv_wasted_tokens",
        "Slots of blocks in use that hold no token.",
        slots - snapshot.tokens_held if slots else 0,
    )


def _tenants(uses: Mapping[str, TenantUse]) -> Iterator[Metric]:
    def rows(values: Callable[[TenantUse], Mapping[str, int]]) -> make.Rows:
        return [((name, key), value) for name, use in uses.items() for key, value in values(use).items()]

    yield make.gauges(
        "quire_tenant_kv_blocks",
        "Blocks on the account of a tenant. Shared ones are on the account of who took them.",
        ("tenant", "state"),
        rows(lambda use: {"in_use": use.blocks_in_use, "cached": use.blocks_cached}),
    )
    yield make.gauges(
        "quire_tenant_requests",
        "Choices of a tenant that run or wait.",
        ("tenant", "phase"),
        rows(lambda use: {"running": use.running, "waiting": use.waiting}),
    )
    counts: tuple[tuple[str, str, Callable[[TenantUse], int]], ...] = (
        ("requests_admitted", "Requests of a tenant that were admitted.", lambda use: use.requests),
        ("prompt_tokens", "Prompt tokens of a tenant's admitted requests.", lambda use: use.prompt_tokens),
        ("hit_tokens", "Of them, those found in the prefix cache.", lambda use: use.hit_tokens),
        ("generated_tokens", "Tokens generated for a tenant.", lambda use: use.generated_tokens),
    )
    for name, text, read in counts:
        counted = [((tenant,), read(use)) for tenant, use in uses.items()]
        yield make.counters(f"quire_tenant_{name}", text, ("tenant",), counted)


def _config(info: EngineInfo | None, cache_isolation: bool) -> dict[str, str]:
    names = ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    return {
        **{name: str(getattr(info, name, "")) for name in names},
        "num_blocks": str(info.num_blocks - 1) if info else "",  # without the padding block, as in the gauges
        "prefix_caching": _switch(info.prefix_caching) if info else "",
        "cache_isolation": _switch(cache_isolation),
    }


def _switch(on: bool) -> str:
    return "true" if on else "false"


def server(records: Records, state: State, model: str) -> Iterator[Metric]:
    """What the server itself noted."""
    yield make.counters(
        "quire_http_requests",
        "HTTP requests answered.",
        ("method", "route", "status"),
        (((method, route, str(status)), count) for (method, route, status), count in records.http.items()),
    )
    yield make.gauge("quire_http_requests_active", "HTTP requests being answered.", records.active_requests)
    yield make.counters(
        "quire_requests_received",
        "Generation requests received.",
        ("api",),
        (((api,), records.received[api]) for api in APIS),
    )
    yield make.counters(
        "quire_requests",
        "Generation requests by how they ended; they add up to those received and not in flight.",
        ("api", "outcome"),
        (((api, outcome), records.outcomes[api, outcome]) for api in APIS for outcome in OUTCOMES),
    )
    yield make.counters(
        "quire_requests_refused",
        "Generation requests that the engine never worked on, by why.",
        ("reason",),
        (((reason,), records.refused[reason]) for reason in REFUSALS),
    )
    yield make.counters(
        "quire_unknown_request_fields",
        "Request fields that were taken and ignored.",
        ("api",),
        (((api,), records.unknown_fields[api]) for api in APIS),
    )
    for name, text, observed in (
        (
            "quire_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            records.first_token_s,
        ),
        ("quire_inter_token_seconds", "Between two tokens of one choice.", records.inter_token_s),
        (
            "quire_request_duration_seconds",
            "From arrival to the last token, of requests that ended well.",
            records.request_s,
        ),
    ):
        yield make.histogram(name, text, observed.bounds, observed.data())
    yield make.gauges("quire_memory_bytes", "Memory by use.", ("use",), _memory(state))
    yield make.info("quire_build", "What is running.", _build(state.info, model))


def _memory(state: State) -> Iterator[tuple[tuple[str], float]]:
    yield ("weights",), state.info.weight_bytes if state.info else 0
    yield ("kv_pool",), state.info.kv_bytes if state.info else 0
    for use, pid in (("engine_resident", state.pid), ("server_resident", os.getpid())):
        size = resident_bytes(pid) if pid is not None else None
        if size is not None:
            yield (use,), size


def _build(info: EngineInfo | None, model: str) -> dict[str, str]:
    names = ("architecture", "dtype", "kv_dtype", "device", "backend")
    return {
        "version": __version__,
        "model": model,
        **{name: str(getattr(info, name, "")) for name in names},
    }
