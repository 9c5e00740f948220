"""A real Prometheus scrapes a real server under mixed load; then every query of ours is asked of it.

The load has all that panels and alerts speak of: shared prefixes, long prompts, streams, preemptions,
evictions, refusals, mistakes of callers, callers who leave, a reset of the cache. The client keeps books, and
the counters must agree with them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.helpers.prometheus import Prometheus, finite, prometheus
from tests.helpers.servers import ROOT, Server, serve, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="prometheus is not installed (apt install prometheus)"
    ),
]

KEYS = ("alpha-key", "beta-key")
ADMIN_KEY = "admin-key"
BOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
RULES = ("rules.yml", "alerts.yml")
LOAD_S = 15.0
WINDOW = "10s"  # Grafana would take four scrapes at least

CHECKED = "tests.helpers.checked_engine"  # audits its pool before it says what is in it

# Expressions that may be empty in a healthy run: none are.
MAY_BE_EMPTY: set[str] = set()


@dataclass
class Books:
    """What the client sent and was told."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: Counter[str] = field(default_factory=Counter)  # by API
    statuses: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    by_tenant: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note_sent(self, api: str) -> None:
        with self.lock:
            self.sent[api] += 1

    def note_reply(self, status: int, code: str | None = None) -> None:
        with self.lock:
            self.statuses[status] += 1
            self.codes[code or ""] += 1

    def note_usage(self, tenant: str, usage: dict[str, Any]) -> None:
        told = {
            "prompt": usage["prompt_tokens"],
            "generated": usage["completion_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
        }
        with self.lock:
            self.tokens.update(told)
            self.by_tenant.update({(tenant, name): count for name, count in told.items()})


class Caller:
    """Sends requests with one key, and writes them down."""

    def __init__(self, url: str, key: str, tenant: str, books: Books) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120)
        self.tenant = tenant
        self.books = books

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def ask(self, api: str, **body: Any) -> int:
        """One request, streamed if it says so; returns the status."""
        path = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}[api]
        if self.http.headers.get("authorization"):
            self.books.note_sent(api)
        if body.get("stream"):
            return self._stream(path, body | {"stream_options": {"include_usage": True}})
        reply = self.http.post(path, json=body)
        content = reply.json()
        self.books.note_reply(reply.status_code, content.get("error", {}).get("code"))
        if reply.status_code == 200:
            self.books.note_usage(self.tenant, content["usage"])
        return reply.status_code

    def _stream(self, path: str, body: dict[str, Any]) -> int:
        with self.http.stream("POST", path, json=body) as reply:
            lines = [line for line in reply.iter_lines() if line.startswith("data: ")]
        self.books.note_reply(reply.status_code)
        if reply.status_code == 200:
            assert lines[-1] == "data: [DONE]" and '"usage"' in lines[-2], lines[-3:]
            self.books.note_usage(self.tenant, json.loads(lines[-2].removeprefix("data: "))["usage"])
        return reply.status_code

    def leave_early(self, **body: Any) -> None:
        """Reads one line of a stream and goes."""
        self.books.note_sent("completions")
        with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
            self.books.note_reply(reply.status_code)
            next(reply.iter_lines())


@dataclass
class Run:
    """A server that was under load, the Prometheus that watched, and the client's books."""

    prometheus: Prometheus
    server: Server
    books: Books
    left_early: int
    start_s: float
    end_s: float

    @property
    def range(self) -> str:
        return f"{int(self.end_s - self.start_s)}s"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    tmp_path = tmp_path_factory.mktemp("prometheus")
    keys = [word for key in KEYS for word in ("--api-key", key)]
    pool = ["--kv-cache-memory", "8MiB", "--max-num-seqs", "8", "--max-queued-requests", "4"]
    with (
        serve(tmp_path, *keys, "--admin-key", ADMIN_KEY, *pool, program=CHECKED) as server,
        prometheus(tmp_path, server.url.removeprefix("http://"), ADMIN_KEY) as watcher,
    ):
        start_s = time.time()
        books = Books()
        left_early = drive(server, books)
        watcher.now_s = end_s = wait_until_seen(server, watcher)
        yield Run(watcher, server, books, left_early, start_s, end_s)


def wait_until_seen(server: Server, watcher: Prometheus) -> float:
    """Until nothing runs, and Prometheus and its rules know; returns when the last scrape was."""
    until(lambda: scraped(server)["quire_requests_running"] == 0, 60)
    idle_s = time.time()
    seen_s = [0.0]

    def seen() -> bool:
        newest = watcher.at_once("timestamp(quire_requests_running == 0)")
        seen_s.extend(float(series["value"][1]) for series in newest)
        return seen_s[-1] > idle_s + 2

    until(seen, 60)
    return seen_s[-1]


def scraped(server: Server) -> dict[str, float]:
    """/metrics, parsed by hand: name with labels -> value."""
    text = server.http.get("/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}).text
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


# --- the load


def drive(server: Server, books: Books) -> int:
    """Some rounds of work, then what goes wrong; returns how many callers left early."""
    with contextlib.ExitStack() as stack:
        identities = (
            *zip(KEYS, ("key-1", "key-2"), strict=True),
            ("", ""),
            ("wrong", ""),
            (ADMIN_KEY, "admin"),
        )
        one, two, nobody, stranger, admin = (
            stack.enter_context(Caller(server.url, key, tenant, books)) for key, tenant in identities
        )
        callers = (one, two)
        for salt in rounds(LOAD_S):
            together([partial(conversations, caller, salt) for caller in callers])
            together([partial(long_prompts, caller) for caller in callers])
            together([partial(callers[n % 2].ask, "completions", **long_answer(n)) for n in range(16)])
        mistakes(one, nobody, stranger)
        for n in range(4):
            callers[n % 2].leave_early(**long_answer(n))
        assert admin.http.post("/v1/cache/reset").status_code == 200
        together([partial(conversations, caller, -1) for caller in callers])
    return 4


def rounds(seconds: float) -> Iterator[int]:
    """At least one; no new one after so long."""
    end_s = time.monotonic() + seconds
    for number in itertools.count():
        yield number
        if time.monotonic() > end_s:
            return


def together(jobs: list[Callable[[], object]]) -> None:
    """Runs all at once; fails if one does."""
    failed: list[BaseException] = []

    def attempt(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as exc:
            failed.append(exc)

    threads = [threading.Thread(target=attempt, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if failed:
        raise failed[0]


def ids(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(300, 2000), k=count)


def conversations(caller: Caller, salt: int) -> None:
    """The same beginning, other questions; each conversation goes on for some turns."""
    system = {"role": "system", "content": "You answer questions about the server Quire. " * 12}
    for n in range(4):
        messages = [system, {"role": "user", "content": f"What is {n} of {caller.tenant}, {salt}?"}]
        for turn in range(3):
            caller.ask("chat", messages=messages, max_tokens=12, temperature=0, stream=turn == 1)
            messages = [
                *messages,
                {"role": "assistant", "content": "That."},
                {"role": "user", "content": "And?"},
            ]


def long_prompts(caller: Caller) -> None:
    """More than the pool holds, round and round: content is evicted just before it is wanted."""
    shared = ids(7, 64)
    for n in itertools.islice(itertools.cycle(range(6)), 15):
        own = ids(100 * len(caller.tenant) + n + (50 if caller.tenant == "key-2" else 0), 600)
        caller.ask("completions", prompt=shared + own, max_tokens=3, ignore_eos=True)


def long_answer(n: int) -> dict[str, Any]:
    return {"prompt": ids(n, 130), "max_tokens": 700, "ignore_eos": True, "stream": n % 2 == 0}


def mistakes(caller: Caller, nobody: Caller, stranger: Caller) -> None:
    assert caller.ask("chat", messages=[{"role": "user", "content": "Hi"}], temperature=9) == 400
    assert caller.ask("completions", prompt="Quire", max_tokens=100000) == 400
    assert caller.ask("completions", prompt="Quire", model="another") == 404
    assert caller.ask("completions", prompt="Quire", max_tokens=2, no_such_field=1) == 200
    assert nobody.ask("completions", prompt="Quire") == 401
    assert (
        nobody.http.post("/v1/completions", json={}, headers={"authorization": "Bearer x"}).status_code == 401
    )
    assert stranger.http.get("/v1/models").status_code == 401
    assert caller.http.get("/v1/nothing").status_code == 404


# --- every expression


def panel_expressions() -> Iterator[tuple[str, str]]:
    for path in BOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.stem}: {panel['title']}: {target['refId']}", target["expr"]


def rule_expressions() -> Iterator[tuple[str, str]]:
    for name in RULES:
        for group in yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text())["groups"]:
            for rule in group["rules"]:
                for number, side in enumerate(sides(rule["expr"])):
                    yield f"{rule.get('alert') or rule['record']}: {number}", side
    for path in BOARDS:
        for note in json.loads(path.read_text())["annotations"]["list"]:
            for side in sides(note["expr"]):
                yield f"{path.stem}: {note['name']}", side


def sides(expr: str) -> list[str]:
    """What a condition compares and joins: an alert that does not fire is empty, its sides must not be."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(r"[({\[]|[)}\]]|\band\b|\bunless\b|[<>]=?|[=!]=", expr):
        token = match.group()
        if token in "({[":
            depth += 1
        elif token in ")}]":
            depth -= 1
        elif depth == 0:
            parts.append(expr[start : match.start()])
            start = match.end()
    parts.append(expr[start:])
    return [part.strip() for part in parts if not re.fullmatch(r"\s*[\d.]+\s*", part)]


def test_conditions_are_taken_apart() -> None:
    assert sides('up{job="a"} == 0') == ['up{job="a"}']
    assert sides("a > 0.1\n and b\n < 30") == ["a", "b"]
    assert sides("a > 2 * b and min_over_time(c[5m]) > 0") == ["a", "2 * b", "min_over_time(c[5m])"]
    assert sides("sum(x > 1) / y") == ["sum(x > 1) / y"]


def substituted(expr: str, run: Run) -> Iterator[str]:
    """As Grafana would, for each value of the variables that have a list."""
    expr = expr.replace("$__rate_interval", WINDOW).replace("$__range", run.range).replace("$instance", ".*")
    lists = {
        variable["name"]: [option["value"] for option in variable["options"]]
        for path in BOARDS
        for variable in json.loads(path.read_text())["templating"]["list"]
        if variable["type"] == "custom"
    }
    used = [name for name in lists if f"${name}" in expr]
    for values in itertools.product(*(lists[name] for name in used)):
        filled = expr
        for name, value in zip(used, values, strict=True):
            filled = filled.replace(f"${name}", value)
        yield filled


@pytest.mark.parametrize(
    "expr", [pytest.param(expr, id=name) for name, expr in [*panel_expressions(), *rule_expressions()]]
)
def test_every_expression_returns_numbers(expr: str, run: Run) -> None:
    for filled in substituted(expr, run):
        assert "$" not in filled
        series = run.prometheus.over_time(filled, run.start_s, run.end_s)
        assert (series and finite(series)) or filled in MAY_BE_EMPTY, filled


def test_the_variables_of_the_boards_have_values(run: Run) -> None:
    (info,) = run.prometheus.at_once('quire_build_info{model=~".*"}')
    assert info["metric"]["model"] == "quire-demo"
    assert info["metric"]["instance"] == run.server.url.removeprefix("http://")


def test_rules_are_evaluated_without_errors(run: Run) -> None:
    rules = [rule for group in run.prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 15
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    for rule in rules:
        if rule["type"] == "recording":
            assert run.prometheus.at_once(rule["name"]), rule["name"]


def test_no_scrape_failed(run: Run) -> None:
    up = run.prometheus.scrapes('up{job="quire"}')
    assert len(up) > 10 and set(up.values()) == {1.0}
    assert set(run.prometheus.scrapes("quire_engine_up").values()) == {1.0}
    assert set(run.prometheus.scrapes("quire_engine_restarts_total").values()) == {0.0}


# --- gauges at every scrape


def test_blocks_add_up_to_the_pool_at_every_scrape(run: Run) -> None:
    blocks = run.prometheus.scrapes("quire_kv_blocks")
    pool = run.prometheus.scrapes("quire_kv_pool_blocks")
    assert len(blocks) > 10 and blocks == pool
    assert len(set(run.prometheus.scrapes('quire_kv_blocks{state="in_use"}').values())) > 3


def test_gauges_agree_with_each_other_at_every_scrape(run: Run) -> None:
    ask = run.prometheus.scrapes
    in_use, shared = ask('quire_kv_blocks{state="in_use"}'), ask("quire_kv_blocks_shared")
    cached = ask('quire_kv_blocks{state="cached"}')
    held, wasted, fill = (
        ask("quire_kv_tokens_held"),
        ask("quire_kv_wasted_tokens"),
        ask("quire_kv_fill_ratio"),
    )
    size, usage = ask("quire_kv_block_size_tokens"), ask("quire_kv_usage_ratio")
    pool, cached_tokens = ask("quire_kv_pool_blocks"), ask("quire_kv_cached_tokens")
    owned = {state: ask(f'quire_tenant_kv_blocks{{state="{state}"}}') for state in ("in_use", "cached")}
    for at, blocks in in_use.items():
        assert 0 <= shared[at] <= blocks
        assert held[at] + wasted[at] == blocks * size[at] and wasted[at] >= 0
        assert fill[at] == pytest.approx(held[at] / (blocks * size[at]) if blocks else 1)
        assert usage[at] == pytest.approx(blocks / pool[at])
        assert cached_tokens[at] == cached[at] * size[at]  # only full blocks are cached
        assert owned["in_use"][at] == blocks and owned["cached"][at] == cached[at]


def test_running_and_waiting_of_tenants_add_up_at_every_scrape(run: Run) -> None:
    for phase in ("running", "waiting"):
        whole = run.prometheus.scrapes(f"quire_requests_{phase}")
        assert run.prometheus.scrapes(f'quire_tenant_requests{{phase="{phase}"}}') == whole


def test_misses_add_up_to_queries_at_every_scrape(run: Run) -> None:
    ask = run.prometheus.scrapes
    assert ask("quire_prefix_misses_total") == ask("quire_prefix_queries_total")
    lost, hits = ask("quire_prefix_miss_tokens_total"), ask("quire_prefix_hit_tokens_total")
    for at, asked in ask("quire_prefix_query_tokens_total").items():
        assert lost[at] + hits[at] == asked


def test_requests_are_ended_or_in_flight_at_every_scrape(run: Run) -> None:
    ask = run.prometheus.scrapes
    ended, active = ask("quire_requests_total"), ask("quire_http_requests_active")
    for at, received in ask("quire_requests_received_total").items():
        assert 0 <= received - ended[at] <= active[at]


# --- counters against the client's books


def test_requests_agree_with_what_was_sent(run: Run) -> None:
    for api, sent in run.books.sent.items():
        assert run.prometheus.value(f'quire_requests_received_total{{api="{api}"}}') == sent
    assert run.prometheus.value("sum(quire_requests_total)") == run.books.sent.total()
    told = run.books.statuses
    assert outcomes(run) == {
        "ok": told[200] - run.left_early,
        "client_error": told[400] + told[404],
        "aborted": run.left_early,
        "shed": told[429],
        "error": 0,
    }


def outcomes(run: Run) -> dict[str, float]:
    series = run.prometheus.at_once("sum by (outcome) (quire_requests_total)")
    return {one["metric"]["outcome"]: float(one["value"][1]) for one in series}


def test_statuses_agree_with_what_was_received(run: Run) -> None:
    for status in (400, 429):
        count = run.books.statuses[status]
        assert count and run.prometheus.value(f'sum(quire_http_requests_total{{status="{status}"}})') == count
    assert run.prometheus.value('sum(quire_http_requests_total{status="401"})') == 3
    assert run.prometheus.value('sum(quire_http_requests_total{status="404"})') == 2
    assert (
        run.prometheus.value('quire_requests_refused_total{reason="queue_full"}') == run.books.statuses[429]
    )
    assert run.prometheus.value('quire_requests_refused_total{reason="too_long"}') == 1
    assert run.prometheus.value('quire_requests_refused_total{reason="invalid"}') >= 1
    assert run.prometheus.value("sum(quire_unknown_request_fields_total)") == 1


def test_tokens_agree_with_usage(run: Run) -> None:
    told = run.books.tokens
    left = run.left_early * 130  # their prompts; nobody was told of their answers
    assert run.prometheus.value("quire_prompt_tokens_total") == told["prompt"] + left
    generated = run.prometheus.value("quire_generated_tokens_total")
    assert told["generated"] + run.left_early <= generated <= told["generated"] + run.left_early * 700
    hits = run.prometheus.value("quire_prefix_hit_tokens_total")
    assert told["cached"] > 1000 and told["cached"] <= hits <= told["cached"] + left


def test_tenants_agree_with_usage_and_with_the_whole(run: Run) -> None:
    for name in ("prompt", "generated"):
        whole = run.prometheus.value(f"quire_{name}_tokens_total")
        assert run.prometheus.value(f"sum(quire_tenant_{name}_tokens_total)") == whole
    hits = run.prometheus.value("quire_prefix_hit_tokens_total")
    assert run.prometheus.value("sum(quire_tenant_hit_tokens_total)") == hits
    for tenant in ("key-1", "key-2"):
        prompts = run.prometheus.value(f'quire_tenant_prompt_tokens_total{{tenant="{tenant}"}}')
        assert prompts == run.books.by_tenant[tenant, "prompt"] + run.left_early // 2 * 130


@pytest.mark.parametrize(
    "series",
    [
        "quire_preemptions_total",
        "quire_recomputed_tokens_total",
        'quire_kv_evicted_blocks_total{cause="capacity"}',
        'quire_kv_evicted_blocks_total{cause="reset"}',
        'quire_prefix_misses_total{reason="evicted"}',
        'quire_prefix_misses_total{reason="never_seen"}',
        'quire_prefix_misses_total{reason="diverged"}',
        'quire_whatif_hit_tokens_total{pool="2"}',
        "quire_kv_ghost_blocks",
        "quire_kv_block_idle_before_reuse_seconds_count",
        "quire_request_queue_seconds_count",
        "quire_engine_busy_seconds_total",
        'quire_memory_bytes{use="engine_resident"}',
    ],
)
def test_the_load_had_everything_in_it(series: str, run: Run) -> None:
    assert max(run.prometheus.scrapes(series).values()) > 0


def test_metrics_pass_promtool(run: Run, tmp_path: Path) -> None:
    text = run.server.http.get("/metrics", headers={"authorization": f"Bearer {ADMIN_KEY}"}).text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and not done.stderr, done.stderr + done.stdout
