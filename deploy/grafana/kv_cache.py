"""The dashboard of the KV cache: what is in the pool, what is reused, what is lost, and to whom."""

from __future__ import annotations

from deploy.grafana.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    YELLOW,
    Json,
    Query,
    Row,
    bar_gauge,
    dashboard,
    facts,
    heatmap,
    increase,
    lines,
    of,
    quantile,
    rate,
    stat,
    total,
)  # fmt: skip

POOL = total("quire_kv_pool_blocks")
IN_USE = total("quire_kv_blocks", 'state="in_use"')
SHARED = total("quire_kv_blocks_shared")
CACHED = total("quire_kv_blocks", 'state="cached"')
FREE = total("quire_kv_blocks", 'state="free"')


def hit_ratio(window: str = "$__rate_interval") -> str:
    """Of the prompt tokens looked up."""
    hits = rate("quire_prefix_hit_tokens_total", window=window)
    return f"{hits} / {rate('quire_prefix_query_tokens_total', window=window)}"


def what_if(window: str, pool: str = "") -> str:
    """The hit ratio of pools of other sizes; `pool` chooses one."""
    labels = (f'pool="{pool}"',) if pool else ()
    hits = rate("quire_whatif_hit_tokens_total", *labels, by="pool", window=window)
    return f"{hits} / on () group_left () {rate('quire_prefix_query_tokens_total', window=window)}"


def make() -> Json:
    rows = [_now(), _pool(), _reuse(), _loss(), _sizing(), _tenants(), _pressure(), _configuration()]
    return dashboard(
        "quire-kv-cache",
        "Quire / KV cache",
        "What is in the pool of KV blocks, what is reused, what is lost, and what a larger pool would bring.",
        rows,
    )


def _now() -> Row:
    return Row(
        "At a glance",
        [
            stat(
                "Pool in use",
                "Blocks that running requests hold, of all. Cached blocks do not count: they can be had at "
                "once.",
                "Above 90 % for long, look at *Preemptions*: without any, all is well and the pool well "
                "used; with some, lower `--max-num-seqs` or raise `--kv-cache-memory`.",
                f"{IN_USE} / {POOL}",
                unit="percentunit",
                thresholds=[(0.9, ORANGE), (0.98, RED)],
                start=BLUE,
            ),
            stat(
                "Hit rate",
                "Prompt tokens that were found in the cache and not computed, of all, in the time shown.",
                "Low is normal for prompts that have nothing in common. Otherwise *Prompt tokens computed, "
                "by reason* says what stands in the way.",
                hit_ratio("$__range"),
                unit="percentunit",
                start=BLUE,
            ),
            stat(
                "Tokens saved",
                "Prompt tokens that the cache saved from being computed, in the time shown.",
                "Nothing; it is what the cache is for. Times the prefill cost of a token it is what the "
                "cache earns.",
                increase("quire_prefix_hit_tokens_total"),
                start=BLUE,
            ),
            stat(
                "Pool twice the size",
                "The hit rate that a pool of twice the blocks would have had, in the time shown.",
                "Compare with *Hit rate*. Where it is much higher, memory buys speed: see *What if the pool "
                "had another size*.",
                what_if("$__range", "2"),
                unit="percentunit",
                start=BLUE,
            ),
            stat(
                "Fill of blocks in use",
                "Tokens in the blocks in use, of the slots they have. The rest is the last, unfinished "
                "block of each request.",
                "Below 70 % with short requests: a smaller `--block-size` wastes less and shares more.",
                f"{total('quire_kv_tokens_held')} / ({total('quire_kv_tokens_held')} + "
                f"{total('quire_kv_wasted_tokens')})",
                unit="percentunit",
                start=BLUE,
            ),
            stat(
                "Evictions",
                "Cached blocks given up, per second.",
                "A full cache evicts at the rate at which it takes in new blocks; that is how it works. It "
                "hurts only where *Tokens lost to eviction* rises.",
                rate("quire_kv_evicted_blocks_total"),
                unit="ops",
                start=BLUE,
                decimals=1,
            ),
            stat(
                "Preempted",
                "Requests set back to the queue because no block was left, in the time shown.",
                "A few in a peak are harmless. Steady ones mean work done twice: lower `--max-num-seqs` or "
                "raise `--kv-cache-memory`.",
                increase("quire_preemptions_total"),
                thresholds=[(1, ORANGE), (100, RED)],
                decimals=0,
            ),
            stat(
                "Lost to eviction",
                "Prompt tokens computed because what held them had been evicted, of all looked up, in the "
                "time shown.",
                "Above 10 % the pool is too small for what comes back: see *What if the pool had another "
                "size*.",
                f"{increase('quire_prefix_miss_tokens_total', EVICTED)} / "
                f"{increase('quire_prefix_query_tokens_total')}",
                unit="percentunit",
                thresholds=[(0.1, ORANGE), (0.3, RED)],
            ),
        ],
    )


EVICTED = 'reason="evicted"'


def _pool() -> Row:
    return Row(
        "What is in the pool",
        [
            lines(
                "Blocks by state",
                "Every block of the pool: held by one request, shared by several, cached (nobody uses it, "
                "its content is kept for whoever comes with the same prefix), or free. The four add up to "
                "the pool.",
                "A pool full of cached blocks is a good sign, not a full one: they are handed out when "
                "needed. Only *in use* and *shared* together near the top mean that memory is short.",
                [
                    Query(f"{IN_USE} - {SHARED}", "in use"),
                    Query(SHARED, "shared"),
                    Query(CACHED, "cached"),
                    Query(FREE, "free"),
                ],
                width=16,
                height=9,
                stacked=True,
                colors={"in use": BLUE, "shared": PURPLE, "cached": GREEN, "free": GREY},
            ),
            lines(
                "Share of the pool in use",
                "Blocks in use of all, for each server.",
                "Servers far apart under one load balancer: route by prefix or by load, not round robin.",
                [Query(of("quire_kv_usage_ratio"), "{{instance}}")],
                unit="percentunit",
                height=9,
                top=1,
                thresholds=[(0.9, ORANGE), (0.98, RED)],
            ),
            lines(
                "Tokens in the pool",
                "Tokens whose keys and values are held for running requests, kept in cached blocks, or "
                "could be held in slots that are wasted in unfinished blocks.",
                "This is the pool in the unit of your prompts: compare with their length.",
                [
                    Query(total("quire_kv_tokens_held"), "held"),
                    Query(total("quire_kv_cached_tokens"), "cached"),
                    Query(total("quire_kv_wasted_tokens"), "wasted"),
                ],
                stacked=True,
                colors={"held": BLUE, "cached": GREEN, "wasted": ORANGE},
            ),
            lines(
                "Fill ratio",
                "Tokens held, of the slots in blocks in use. 1 where none are in use.",
                "Lower with larger blocks and shorter requests. Below 0.7 try a smaller `--block-size`.",
                [Query(of("quire_kv_fill_ratio"), "{{instance}}")],
                unit="percentunit",
                top=1,
            ),
            lines(
                "Blocks handed out",
                "Blocks per second that were taken anew, taken over from the cache with their content, and "
                "given up by the cache.",
                "*Reused* above *new* means that most blocks cost nothing to fill.",
                [
                    Query(rate("quire_kv_allocated_blocks_total"), "new"),
                    Query(rate("quire_kv_reused_blocks_total"), "reused"),
                    Query(rate("quire_kv_evicted_blocks_total"), "evicted"),
                ],
                unit="ops",
                colors={"new": BLUE, "reused": GREEN, "evicted": ORANGE},
            ),
        ],
    )


def _reuse() -> Row:
    queries = rate("quire_prefix_queries_total")
    return Row(
        "What is reused",
        [
            lines(
                "Hit rate over time",
                "Tokens: the share of prompt tokens that were not computed. Requests: the share of requests "
                "of which any block was found.",
                "Many requests and few tokens: prompts share a short beginning and then differ. Put what is "
                "common (system prompt, documents) first, and what changes (dates, names, the question) "
                "last.",
                [
                    Query(hit_ratio(), "tokens"),
                    Query(f"{rate('quire_prefix_hits_total')} / {queries}", "requests"),
                ],
                unit="percentunit",
                width=12,
                top=1,
                colors={"tokens": BLUE, "requests": GREEN},
            ),
            heatmap(
                "Hit ratio of each request",
                "How many requests reused which share of their prompt. Two bands are typical: new "
                "conversations near 0, later turns near 1.",
                "A band in the middle that was at the top before: something early in the prompt changes now. "
                "Ask `explain_cache` for one such request.",
                "quire_prefix_hit_ratio",
                unit="percentunit",
                width=12,
            ),
            lines(
                "Requests by reason",
                "Why the reuse of each prompt ended where it did: one reason for each request. `last_token` "
                "and `partial_block` are complete hits.",
                "`diverged`: prompts differ early. `never_seen`: new text. `evicted`: the pool is too "
                "small. `other_salt`: the same text under another `cache_salt`. `in_progress`: "
                "prompts that share less than half and came at the same moment. `prompt_logprobs`, `pooling` "
                "and `caching_off`: asked for.",
                [Query(rate("quire_prefix_misses_total", by="reason"), "{{reason}}")],
                unit="reqps",
                width=12,
                stacked=True,
            ),
            lines(
                "Prompt tokens computed, by reason",
                "Prompt tokens per second that were not reused, by why. The height is the prefill work that "
                "is left.",
                "The widest band is what to work on; what each reason asks for is said at *Requests by "
                "reason*.",
                [Query(rate("quire_prefix_miss_tokens_total", by="reason"), "{{reason}}")],
                unit="short",
                width=12,
                stacked=True,
            ),
        ],
    )


def _loss() -> Row:
    lost = rate("quire_prefix_miss_tokens_total", EVICTED)
    return Row(
        "What is lost",
        [
            lines(
                "Evictions by cause",
                "`capacity`: the block was needed. `reset`: somebody emptied the cache. `reclaimed`: its "
                "only user took it over to write into it.",
                "Capacity evictions are normal once the cache is full; see whether they hurt in the next "
                "panel.",
                [Query(rate("quire_kv_evicted_blocks_total", by="cause"), "{{cause}}")],
                unit="ops",
                stacked=True,
            ),
            lines(
                "Tokens lost to eviction",
                "Prompt tokens computed again because their blocks had been evicted, of all looked up.",
                "Above 10 % for long: a larger pool, fewer tenants per server, or routing by prefix.",
                [Query(f"{lost} / {rate('quire_prefix_query_tokens_total')}", "of prompt tokens")],
                unit="percentunit",
                thresholds=[(0.1, ORANGE), (0.3, RED)],
            ),
            lines(
                "Median times of a block",
                "Its age at eviction, how long it had been idle then, and how long blocks that are reused "
                "had been idle.",
                "Blocks that are evicted after a shorter idle time than those that are reused: content "
                "leaves just before it is wanted. A larger pool helps most then.",
                [
                    Query(quantile(0.5, "quire_kv_block_age_at_eviction_seconds"), "age at eviction"),
                    Query(
                        quantile(0.5, "quire_kv_block_idle_before_eviction_seconds"), "idle before eviction"
                    ),
                    Query(quantile(0.5, "quire_kv_block_idle_before_reuse_seconds"), "idle before reuse"),
                ],
                unit="s",
                colors={"age at eviction": GREY, "idle before eviction": ORANGE, "idle before reuse": GREEN},
            ),
            heatmap(
                "Age at eviction",
                "How long evicted blocks had existed.",
                "Young blocks evicted (seconds) under load: the cache turns over before anybody comes back.",
                "quire_kv_block_age_at_eviction_seconds",
            ),
            heatmap(
                "Idle before eviction",
                "How long evicted blocks had not been used: how long the cache remembers.",
                "Compare with the pauses between the turns of your users: memory shorter than a pause is no "
                "use.",
                "quire_kv_block_idle_before_eviction_seconds",
            ),
            heatmap(
                "Idle before reuse",
                "How long reused blocks had not been used: the pauses after which content is wanted again.",
                "The tail that would lie beyond *Idle before eviction* is what is lost.",
                "quire_kv_block_idle_before_reuse_seconds",
            ),
        ],
    )


def _sizing() -> Row:
    return Row(
        "What if the pool had another size",
        [
            lines(
                "What if the pool had another size",
                "The share of prompt tokens that pools of 0.5, 1, 2, 4 and 8 times the size would have "
                "found, estimated live from a list of evicted blocks; and what was measured.",
                "Lines close together: the size does not matter, memory may even be taken away. A wide step "
                "between 1 and 2: double the pool (`--kv-cache-memory`).",
                [Query(what_if("$__rate_interval"), "{{pool}} x"), Query(hit_ratio(), "measured")],
                unit="percentunit",
                width=14,
                top=1,
                dashed=["measured"],
                colors={
                    "measured": GREY,
                    "0.5 x": RED,
                    "1 x": BLUE,
                    "2 x": GREEN,
                    "4 x": YELLOW,
                    "8 x": PURPLE,
                },
            ),
            bar_gauge(
                "Hit rate by size of the pool",
                "The same over all of the time shown: the curve of hit rate against size.",
                "Pick the size where the bars stop growing.",
                [Query(what_if("$__range"), "{{pool}} x")],
                unit="percentunit",
                width=6,
                top=1,
            ),
            lines(
                "Evicted blocks remembered",
                "Entries of the list behind the estimate (a few bytes each). It is bounded.",
                "Nothing. When it is full, older evictions are forgotten and the largest sizes are "
                "estimated low.",
                [Query(total("quire_kv_ghost_blocks"), "remembered")],
                width=4,
            ),
        ],
    )


def _tenants() -> Row:
    hits = rate("quire_tenant_hit_tokens_total", by="tenant")
    tokens = rate("quire_tenant_prompt_tokens_total", by="tenant")
    return Row(
        "Tenants",
        [
            lines(
                "Blocks in use by tenant",
                "On whose account the blocks in use are. A shared block is on the account of who took it.",
                "One tenant with most of the pool while others queue: give it a key on a server of its own.",
                [Query(total("quire_tenant_kv_blocks", 'state="in_use"', by="tenant"), "{{tenant}}")],
                stacked=True,
            ),
            lines(
                "Cached blocks by tenant",
                "Whose content the cache keeps. The least recently used goes first, whoever it belongs to.",
                "A busy tenant pushes the others out; compare with *Hit rate by tenant*.",
                [Query(total("quire_tenant_kv_blocks", 'state="cached"', by="tenant"), "{{tenant}}")],
                stacked=True,
            ),
            lines(
                "Hit rate by tenant",
                "Prompt tokens of each tenant that were found in the cache.",
                "Tenants with the same system prompt: put them into one `share` group, if they may share.",
                [Query(f"{hits} / {tokens}", "{{tenant}}")],
                unit="percentunit",
                top=1,
            ),
            lines(
                "Tokens by tenant",
                "Prompt and generated tokens per second.",
                "Nothing; it is who uses the server.",
                [
                    Query(tokens, "{{tenant}}: prompt"),
                    Query(rate("quire_tenant_generated_tokens_total", by="tenant"), "{{tenant}}: generated"),
                ],
                width=8,
            ),
            lines(
                "Requests admitted by tenant",
                "Requests that got their first blocks, per second.",
                "Compare with *Requests of tenants, now*: few admitted and many waiting is a tenant held "
                "back.",
                [Query(rate("quire_tenant_requests_admitted_total", by="tenant"), "{{tenant}}")],
                unit="reqps",
            ),
            lines(
                "Requests of tenants, now",
                "Running and waiting, by tenant.",
                "One tenant's waiting requests that delay all others: limit it in front of the server.",
                [Query(total("quire_tenant_requests", by="tenant, phase"), "{{tenant}}: {{phase}}")],
                stacked=True,
            ),
        ],
    )


def _pressure() -> Row:
    computed = (
        f"({rate('quire_prompt_tokens_total')} - {rate('quire_prefix_hit_tokens_total')} "
        f"+ {rate('quire_generated_tokens_total')} + {rate('quire_recomputed_tokens_total')})"
    )
    return Row(
        "Pressure",
        [
            lines(
                "Preemptions",
                "Requests per second that were set back to the queue because no block was left.",
                "Steady ones: lower `--max-num-seqs` or raise `--kv-cache-memory`.",
                [Query(rate("quire_preemptions_total"), "preempted")],
                unit="reqps",
                thresholds=[(0.01, ORANGE), (1, RED)],
            ),
            lines(
                "Work done twice",
                "Tokens computed again after a preemption, of all tokens computed.",
                "Above 5 % throughput would be higher with fewer requests at a time.",
                [Query(f"{rate('quire_recomputed_tokens_total')} / {computed}", "of tokens computed")],
                unit="percentunit",
                thresholds=[(0.05, ORANGE), (0.2, RED)],
            ),
            lines(
                "Waiting against blocks to be had",
                "Requests that wait, and blocks that are free or cached and could be given to them.",
                "Waiting with blocks to spare: `--max-num-seqs` holds them back. Waiting without: memory "
                "does.",
                [
                    Query(total("quire_requests_waiting"), "waiting requests"),
                    Query(f"{CACHED} + {FREE}", "blocks to be had"),
                ],
                colors={"waiting requests": ORANGE, "blocks to be had": GREEN},
            ),
        ],
    )


def _configuration() -> Row:
    return Row(
        "Configuration",
        [
            facts(
                "Configuration of the engine",
                "What each engine decided at its start.",
                "Servers of one group should agree.",
                "quire_config_info",
                width=16,
            ),
            lines(
                "Tokens in a block",
                "`--block-size`, for each server.",
                "Nothing; it explains the steps of other curves after a restart.",
                [Query(of("quire_kv_block_size_tokens"), "{{instance}}")],
                height=4,
            ),
        ],
    )
