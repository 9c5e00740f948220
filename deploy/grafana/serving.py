"""The dashboard of serving: how fast, how much, what waits, what fails, what the engine does."""

from __future__ import annotations

from deploy.grafana.panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    WINDOW,
    Json,
    Panel,
    Query,
    Row,
    choice,
    dashboard,
    facts,
    heatmap,
    increase,
    lines,
    of,
    percentiles,
    quantile,
    rate,
    stat,
    timeline,
    total,
    value_map,
    within,
)  # fmt: skip

FIRST_TOKEN = "quire_time_to_first_token_seconds"
INTER_TOKEN = "quire_inter_token_seconds"
DURATION = "quire_request_duration_seconds"
QUEUE = "quire_request_queue_seconds"
PREFILL = "quire_request_prefill_seconds"
DECODE = "quire_request_decode_seconds"
STEP = "quire_engine_step_seconds"

# Bounds of the histograms' own buckets, since only there a share is exact.
FIRST_TOKEN_TARGETS = ("0.1", "0.2", "0.5", "1.0", "2.0", "5.0", "10.0")
INTER_TOKEN_TARGETS = ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5")

FAILED = 'outcome="error"'
TARGETS = [(0.0, RED), (0.95, ORANGE), (0.99, GREEN)]


def make() -> Json:
    targets = [
        choice("ttft", "First token within (s)", FIRST_TOKEN_TARGETS, "1.0", "The target of *SLO* panels."),
        choice("itl", "Next token within (s)", INTER_TOKEN_TARGETS, "0.1", "The target of *SLO* panels."),
    ]
    rows = [
        _now(),
        _targets(),
        _latency(),
        _phases(),
        _throughput(),
        _queue(),
        _answers(),
        _engine(),
        _machine(),
    ]
    return dashboard(
        "quire-serving",
        "Quire / Serving",
        "Latency, throughput, queue, errors, targets and the engine's steps.",
        rows,
        targets,
    )


def errors(window: str = WINDOW) -> str:
    """The share of requests that ended badly through no fault of the caller."""
    failed = rate("quire_requests_total", FAILED, window=window)
    return f"{failed} / {rate('quire_requests_total', window=window)}"


def _now() -> Row:
    return Row(
        "At a glance",
        [
            stat(
                "Engines up",
                "Engines that live and make progress.",
                "0: see *Engine down* in the runbooks.",
                total("quire_engine_up"),
                thresholds=[(0, RED), (1, GREEN)],
                decimals=0,
            ),
            stat(
                "Running now",
                "Choices in the running batch.",
                "At `--max-num-seqs` for long: raise it, if the pool has room.",
                total("quire_requests_running"),
                start=BLUE,
                decimals=0,
            ),
            stat(
                "Waiting now",
                "Choices queued for their first or next step.",
                "Above 0 for long, the server gets more than it can do: add one, or send less.",
                total("quire_requests_waiting"),
                thresholds=[(1, ORANGE), (100, RED)],
                decimals=0,
            ),
            stat(
                "Requests",
                "Generation requests that came, per second.",
                "Nothing.",
                rate("quire_requests_received_total"),
                unit="reqps",
                start=BLUE,
            ),
            stat(
                "Generated",
                "Tokens generated per second, of all requests together.",
                "Nothing.",
                rate("quire_generated_tokens_total"),
                start=BLUE,
                decimals=0,
            ),
            stat(
                "First token, p95",
                "19 of 20 requests had their first token within this time.",
                "See *Queue wait* and *Prefill*: one of the two makes it up.",
                quantile(0.95, FIRST_TOKEN),
                unit="s",
                thresholds=[(1, ORANGE), (5, RED)],
            ),
            stat(
                "Next token, p95",
                "19 of 20 tokens came within this time after the one before.",
                "High: long prompts are computed in between (lower `--max-num-batched-tokens`), or the "
                "batch is large (lower `--max-num-seqs`).",
                quantile(0.95, INTER_TOKEN),
                unit="s",
                thresholds=[(0.1, ORANGE), (0.5, RED)],
            ),
            stat(
                "Failed",
                "Requests that ended with an error of the server, of all, in the time shown.",
                "Search the log for the request ids; *How requests ended* and *Replies by status* say when.",
                f"{increase('quire_requests_total', FAILED)} / {increase('quire_requests_total')}",
                unit="percentunit",
                thresholds=[(0.001, ORANGE), (0.02, RED)],
            ),
        ],
    )


def _targets() -> Row:
    first, following = within(FIRST_TOKEN, "$ttft", "$__range"), within(INTER_TOKEN, "$itl", "$__range")
    return Row(
        "Targets (SLO)",
        [
            stat(
                "First token in time",
                "Requests whose first token came within the time chosen at the top, of all that got one.",
                "Below your target: see *Queue wait* first, then *Prefill*. More cache hits shorten both.",
                first,
                unit="percentunit",
                thresholds=TARGETS,
                width=4,
            ),
            stat(
                "Next token in time",
                "Tokens that came within the time chosen at the top after the one before.",
                "Below your target: smaller steps (`--max-num-batched-tokens`) or fewer at a time "
                "(`--max-num-seqs`).",
                following,
                unit="percentunit",
                thresholds=TARGETS,
                width=4,
            ),
            lines(
                "In time, over time",
                "The same two shares for each moment.",
                "Dips that repeat at the same hour are load; dips with *Engine restarts* are not.",
                [
                    Query(within(FIRST_TOKEN, "$ttft"), "first token within $ttft s"),
                    Query(within(INTER_TOKEN, "$itl"), "next token within $itl s"),
                ],
                unit="percentunit",
                width=16,
                top=1,
            ),
        ],
    )


def _pair(title: str, name: str, what: str, action: str, histogram: str) -> list[Panel]:
    spread = "Two bands are two kinds of requests; look at them apart before you tune for an average of both."
    return [
        percentiles(title, what, action, histogram, width=12),
        heatmap(f"{title}: spread", f"How many {name} took how long.", spread, histogram, width=12),
    ]


def _latency() -> Row:
    return Row(
        "Latency",
        [
            *_pair(
                "Time to first token", "first tokens",
                "From a request's arrival to its first token: queue wait and prefill.",
                "Rising with *Queue wait*: too much load. Rising alone: longer prompts, or fewer cache hits.",
                FIRST_TOKEN,
            ),
            *_pair(
                "Time between tokens", "gaps",
                "Between two tokens of one choice.",
                "p99 far above p50: long prompts are computed in the same steps; lower "
                "`--max-num-batched-tokens`. All of it rising: more sequences in a step than before.",
                INTER_TOKEN,
            ),
            *_pair(
                "Whole request", "requests",
                "From arrival to the last token, of requests that ended well.",
                "Mostly the number of tokens asked for. Compare with *Tokens per second*.",
                DURATION,
            ),
        ],
    )  # fmt: skip


def _phases() -> Row:
    seconds = {"queue": QUEUE, "prefill": PREFILL, "decode": DECODE}
    means = [
        Query(f"{rate(name + '_sum')} / {rate(name + '_count')}", phase) for phase, name in seconds.items()
    ]
    return Row(
        "Where the time goes",
        [
            percentiles(
                "Queue wait",
                "From a request's arrival at the engine to its first step.",
                "Above zero for long: the batch or the pool is full. See *Waiting against blocks to be had* "
                "on the KV cache dashboard for which.",
                QUEUE,
            ),
            percentiles(
                "Prefill",
                "From the first step to the first token: computing what of the prompt was not cached.",
                "Long: long prompts without cache hits, or many at once in chunks of "
                "`--max-num-batched-tokens`.",
                PREFILL,
            ),
            percentiles(
                "Decode",
                "From a choice's first token to its last.",
                "Tokens asked for, times the time between tokens.",
                DECODE,
            ),
            heatmap("Queue wait: spread", "How many requests waited how long.", "As above.", QUEUE),
            heatmap("Prefill: spread", "How many prefills took how long.", "As above.", PREFILL),
            heatmap("Decode: spread", "How many decodes took how long.", "As above.", DECODE),
            lines(
                "Mean time by phase",
                "Mean seconds in the queue, in prefill and in decode, on top of each other.",
                "Work on the widest band.",
                means,
                unit="s",
                width=24,
                stacked=True,
                colors={"queue": ORANGE, "prefill": BLUE, "decode": GREEN},
            ),
        ],
    )


def _throughput() -> Row:
    hits = rate("quire_prefix_hit_tokens_total")
    return Row(
        "Throughput",
        [
            lines(
                "Tokens per second",
                "Prompt tokens computed, prompt tokens taken from the cache, and tokens generated.",
                "The engine pays for the first and the last. Flat while requests queue: this is the most it "
                "can do.",
                [
                    Query(f"{rate('quire_prompt_tokens_total')} - {hits}", "prompt, computed"),
                    Query(hits, "prompt, cached"),
                    Query(rate("quire_generated_tokens_total"), "generated"),
                ],
                width=12,
                stacked=True,
                colors={"prompt, computed": BLUE, "prompt, cached": GREEN, "generated": PURPLE},
            ),
            lines(
                "Requests per second",
                "Generation requests that came, by API.",
                "Nothing; it is the load.",
                [Query(rate("quire_requests_received_total", by="api"), "{{api}}")],
                unit="reqps",
                width=12,
                stacked=True,
            ),
        ],
    )


def _queue() -> Row:
    return Row(
        "Queue",
        [
            lines(
                "Running and waiting",
                "Choices in the running batch, and queued.",
                "Waiting that grows while running is flat: full. Waiting that grows while running is low: "
                "the pool is short of blocks.",
                [
                    Query(total("quire_requests_running"), "running"),
                    Query(total("quire_requests_waiting"), "waiting"),
                ],
                width=12,
                colors={"running": BLUE, "waiting": ORANGE},
            ),
            lines(
                "Refusals by reason",
                "Requests refused before they were queued, per second.",
                "`queue_full`: add servers, or let callers wait. `too_long`, `never_fits`: "
                "`--max-model-len` or the pool is too small for what is asked. `loading`, `draining`: send "
                "only to servers whose `/ready` is 200. `engine_down`: see the log. `invalid`: the caller's "
                "mistake.",
                [Query(rate("quire_requests_refused_total", by="reason"), "{{reason}}")],
                unit="reqps",
                width=12,
                stacked=True,
            ),
        ],
    )


def _answers() -> Row:
    bad = 'status=~"4..|5.."'
    return Row(
        "Answers",
        [
            lines(
                "How requests ended",
                "Generation requests per second, by outcome.",
                "`error` is the server's fault: look into the log. `client_error`: the reply said what was "
                "wrong. `aborted`: callers left, often because they waited too long. `shed`: refused for "
                "load.",
                [Query(rate("quire_requests_total", by="outcome"), "{{outcome}}")],
                unit="reqps",
                stacked=True,
                colors={"ok": GREEN, "error": RED, "client_error": ORANGE, "aborted": GREY, "shed": PURPLE},
            ),
            lines(
                "Share of requests that failed",
                "Requests that ended with an error of the server, of all.",
                "Anything above 0 deserves a look at the log.",
                [Query(errors(), "failed")],
                unit="percentunit",
                thresholds=[(0.001, ORANGE), (0.02, RED)],
            ),
            lines(
                "Why choices ended",
                "Choices the engine ended, by reason: `stop`, `length`, `abort`, `error`.",
                "Mostly `length`: answers are cut off; callers may want a larger `max_tokens`.",
                [Query(rate("quire_engine_requests_finished_total", by="reason"), "{{reason}}")],
                unit="ops",
                stacked=True,
            ),
            lines(
                "Replies by status",
                "HTTP replies per second, of every endpoint.",
                "429 and 503 are load, 401 and 403 keys, 400 and 404 callers, 499 callers who left, 500 us.",
                [Query(rate("quire_http_requests_total", by="status"), "{{status}}")],
                unit="reqps",
                stacked=True,
            ),
            lines(
                "Errors by endpoint",
                "HTTP replies with a status from 400 on, per second.",
                "One endpoint alone: a client's mistake or an old path. All: keys or load.",
                [
                    Query(
                        rate("quire_http_requests_total", bad, by="method, route, status"),
                        "{{status}} {{method}} {{route}}",
                    )
                ],
                unit="reqps",
            ),
            lines(
                "Being answered, and odd fields",
                "HTTP requests being answered now, and request fields per second that were taken and "
                "ignored.",
                "Ignored fields are named in the reply header `x-quire-warnings`.",
                [
                    Query(total("quire_http_requests_active"), "being answered"),
                    Query(rate("quire_unknown_request_fields_total"), "ignored fields per second"),
                ],
            ),
        ],
    )


def _engine() -> Row:
    return Row(
        "Engine",
        [
            lines(
                "Engine busy",
                "The share of time the engine spends in steps. The rest it sleeps for lack of work.",
                "Near 100 %: this server is fully used. Low while latency is high: the time is spent "
                "elsewhere, see the CPU of the server process.",
                [Query(f"rate({of('quire_engine_busy_seconds_total')}[{WINDOW}])", "{{instance}}")],
                unit="percentunit",
                top=1,
            ),
            percentiles(
                "Step time",
                "How long one step of the engine takes: each running sequence gets a token per step.",
                "p99 far above p50 are steps with chunks of long prompts; lower `--max-num-batched-tokens` "
                "to even them out.",
                STEP,
            ),
            heatmap(
                "Step time: spread",
                "How many steps took how long.",
                "One band per kind of step: decode only below, with prefill above.",
                STEP,
            ),
            lines(
                "Tokens per step",
                "Median and p95 of the tokens computed in one step, prompt and output.",
                "At `--max-num-batched-tokens`: prompts queue for room in a step.",
                [
                    Query(quantile(0.5, "quire_engine_step_tokens"), "p50"),
                    Query(quantile(0.95, "quire_engine_step_tokens"), "p95"),
                ],
                width=6,
            ),
            lines(
                "Sequences per step",
                "Median and p95 of the batch size.",
                "Larger batches give more tokens per second, and each token a bit later.",
                [
                    Query(quantile(0.5, "quire_engine_step_sequences"), "p50"),
                    Query(quantile(0.95, "quire_engine_step_sequences"), "p95"),
                ],
                width=6,
            ),
            lines(
                "Steps per second",
                "Steps the engine ran.",
                "Few large steps or many small ones: both are fine. None while requests run: see *Engine "
                "down*.",
                [Query(f"rate({of('quire_engine_steps_total')}[{WINDOW}])", "{{instance}}")],
                unit="ops",
                width=6,
            ),
            lines(
                "How steps ran",
                "Steps per second: as one CUDA graph, with the forward pass as one, or launch by launch; "
                "and why not better.",
                "On a GPU, much `eager uncaptured` long after the start means that graphs cannot be "
                "captured: the log says why. On a CPU all steps are `eager off`.",
                [Query(rate("quire_engine_step_runs_total", by="how, reason"), "{{how}} {{reason}}")],
                unit="ops",
                width=6,
                stacked=True,
            ),
        ],
    )


def _machine() -> Row:
    up = value_map({"0": ("down", RED), "1": ("up", GREEN)})
    return Row(
        "Machine",
        [
            lines(
                "Memory by use",
                "The weights, the KV pool, and what the two processes hold in main memory. On a CPU weights "
                "and pool are inside the engine's.",
                "A server process that only grows is a leak: report it. The engine's may grow until the "
                "pool has been written once.",
                [Query(total("quire_memory_bytes", by="use"), "{{use}}")],
                unit="bytes",
                width=12,
            ),
            timeline(
                "Engine up",
                "Whether each engine lives and makes progress.",
                "Down while a model loads is normal. Otherwise see *Engine down* in the runbooks.",
                Query(of("quire_engine_up"), "{{instance}}"),
                up,
                width=6,
            ),
            lines(
                "Engine restarts",
                "Times a new engine replaced a dead one, since the server started.",
                "Any: the log has the reason of each death.",
                [Query(of("quire_engine_restarts_total"), "{{instance}}")],
                width=6,
            ),
            facts("What is running", "Version, model and device of each server.",
                  "Servers of one group should agree.", "quire_build_info"),
        ],
    )  # fmt: skip
