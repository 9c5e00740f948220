"""`quire bench` against a pretend server: what it sends, what it measures, how it names errors."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.bench import drive, report
from server.bench.client import Record, RequestError
from server.bench.options import BenchOptions, LengthRange, parse
from server.bench.workload import PromptForm, Workload
from tests.helpers.bench_server import BenchServer, serving

SMALL = BenchOptions(
    requests=6,
    concurrency=3,
    warmup=0,
    input_len=LengthRange(8, 8),
    output_len=LengthRange(4, 4),
    max_seconds=20,
    timeout_s=10,
    quiet=True,
)


def run(server: BenchServer, **changes: Any) -> report.Result:
    async def inside() -> report.Result:
        async with serving(server) as url:
            return await drive.bench(replace(SMALL, url=url, **changes))

    return asyncio.run(inside())


def measured(server: BenchServer) -> list[dict[str, Any]]:
    return [request for request in server.requests if request["max_tokens"] > 1]


def test_every_request_is_sent_and_counted() -> None:
    server = BenchServer()
    result = run(server)
    assert (len(result.done), len(result.failed), result.missing) == (6, 0, 0)
    assert result.model == "pretend"
    assert result.output_tokens == result.text_chunks == 6 * 4
    assert result.prompt_tokens == 6 * 8
    assert result.cached_tokens == 6 * 3
    assert result.one_token_per_chunk
    sent = measured(server)[0]
    assert len(sent["prompt"]) == 8
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["ignore_eos"] is True


def test_a_closed_loop_keeps_exactly_its_clients_busy_and_their_connections_open() -> None:
    server = BenchServer()
    run(server, requests=12)
    assert server.most_at_once <= 3
    assert server.connections <= 4  # the probes' connection is used again


def test_an_open_loop_sends_all_whatever_is_unfinished() -> None:
    async def inside() -> report.Result:
        server = BenchServer()
        async with serving(server) as url:
            options = replace(SMALL, url=url, rate=1000.0, requests=20, prompt_form="ids")
            server.release.clear()
            task = asyncio.create_task(drive.bench(options))
            while server.under_way < 1:  # the probe for ids
                await asyncio.sleep(0)
            server.release.set()
            while len(measured(server)) < 20:
                await asyncio.sleep(0)
            return await task

    result = asyncio.run(inside())
    assert len(result.done) == 20


def test_arrivals_are_poisson_at_the_rate() -> None:
    workload = Workload(replace(SMALL, rate=50.0), "m", PromptForm())
    times = list(workload.arrivals_s(5000))
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] / 4999 == pytest.approx(1 / 50, rel=0.1)


def test_latency_in_an_open_loop_counts_from_the_arrival() -> None:
    record = Record(start_s=10.0, end_s=13.0, output_tokens=2)
    record.text_s.extend([11.5, 12.5])
    result = report.Result(replace(SMALL, requests=1), "m", "ids", [record])
    assert result.ttft_s() == report.distribution([1.5])
    assert result.gap_s() == result.tpot_s() == report.distribution([1.0])
    assert result.end_to_end_s() == report.distribution([3.0])


def test_tokens_are_counted_by_usage_when_a_chunk_holds_several() -> None:
    server = BenchServer()
    server.tokens_per_chunk = 3
    result = run(server, output_len=LengthRange(9, 9))
    assert (result.output_tokens, result.text_chunks) == (54, 18)
    assert "chunks with text" in report.render_table(result)
    assert "between chunks" in report.render_table(result)


def test_without_usage_a_chunk_is_a_token_and_the_table_says_so() -> None:
    server = BenchServer()
    server.usage = False
    result = run(server)
    assert result.output_tokens == 24
    assert not result.has_usage
    assert "sends no usage" in report.render_table(result)


def test_chat_sends_words_whose_cost_was_measured() -> None:
    server = BenchServer()  # 2 tokens a word and 5 for the template
    result = run(server, api="chat", input_len=LengthRange(105, 105), shared_prefix_len=105)
    assert result.prompt_form == "text"
    assert all("messages" in request for request in measured(server))
    assert len(measured(server)[0]["messages"][0]["content"].split()) == 100
    assert result.output_tokens == result.text_chunks == 24  # the role chunk is not text


def test_ids_beyond_the_vocabulary_are_avoided() -> None:
    server = BenchServer()
    server.takes_ids = 1200
    result = run(server)
    assert result.prompt_form == "ids"
    assert max(max(request["prompt"]) for request in measured(server)) <= 999


def test_a_server_without_token_ids_gets_text() -> None:
    server = BenchServer()
    server.takes_ids = False
    assert run(server).prompt_form == "text"
    with pytest.raises(RequestError, match="no such token"):
        run(server, prompt_form="ids")


def test_prompts_share_their_prefix_and_nothing_else() -> None:
    server = BenchServer()
    run(server, shared_prefix_len=16, warmup=2)
    prompts = [request["prompt"] for request in measured(server)]
    warm, real = prompts[:2], prompts[2:]
    assert {len(prompt) for prompt in prompts} == {24}
    assert len({tuple(prompt[:16]) for prompt in real}) == 1
    assert len({tuple(prompt[16:]) for prompt in real}) == 6
    assert warm[0][:16] != real[0][:16]


def test_the_same_seed_gives_the_same_requests() -> None:
    options = replace(SMALL, input_len=LengthRange(1, 50), output_len=LengthRange(1, 50))
    first, again = (list(Workload(options, "m", PromptForm(999)).bodies(20)) for _ in range(2))
    other = list(Workload(replace(options, seed=1), "m", PromptForm(999)).bodies(20))
    assert first == again
    assert first != other
    assert len({len(json.loads(body)["prompt"]) for body in first}) > 5


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("429", "HTTP 429 (overloaded)"),
        ("cut", "connection closed in the middle of a response"),
        ("short", "stream ended early"),
        ("error", "error in the stream (server_error)"),
        ("garbage", "bad chunk"),
    ],
)
def test_errors_are_counted_by_kind(fault: str, kind: str) -> None:
    server = BenchServer()
    server.fault = fault
    result = run(server)
    assert len(result.done) == 0
    assert {name: count for name, (count, _) in result.errors().items()} == {kind: 6}
    assert f"failed: {kind}: 6" in report.render_table(result)


def test_a_finish_reason_ends_a_stream_without_done() -> None:
    server = BenchServer()
    server.done = False
    assert len(run(server).done) == 6


def test_a_silent_server_times_out_request_by_request() -> None:
    server = BenchServer()
    server.fault = "hang"
    result = run(server, timeout_s=0.05)
    assert set(result.errors()) == {"timeout"}


def test_the_run_ends_in_time_and_says_what_was_left() -> None:
    server = BenchServer()
    server.fault = "hang"
    result = run(server, max_seconds=0.1)
    assert {kind: count for kind, (count, _) in result.errors().items()} == {"unfinished": 3, "not sent": 3}


def test_the_api_key_is_sent_and_never_written() -> None:
    server = BenchServer()
    result = run(server, api_key="secret")
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in json.dumps(report.as_dict(result))


def test_main_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = BenchServer()
    found: list[int] = []

    async def inside() -> None:
        async with serving(server) as url:
            args = ["--url", url, "--requests", "4", "--output-len", "3", "--json", str(tmp_path / "r.json")]
            found.append(await asyncio.to_thread(drive.main, args))

    asyncio.run(inside())
    assert found == [0]
    table = capsys.readouterr().out
    assert "output tokens/s" in table
    assert "time to first token" in table
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["requests"] == {"succeeded": 4, "failed": 0, "not_sent": 0}
    assert written["output_tokens"] == 12
    assert written["latency"]["ttft_s"]["count"] == 4


def test_main_says_when_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert drive.main(["--url", "http://127.0.0.1:1"]) == 2
    assert "connection refused" in capsys.readouterr().err


def test_percentiles_are_linear_between_neighbours() -> None:
    assert report.percentile([10.0], 99) == 10.0
    assert report.percentile([0.0, 10.0], 50) == 5.0
    assert report.percentile(list(range(101)), 95) == 95.0
    assert report.distribution([]) is None


@pytest.mark.parametrize(
    "args",
    [
        ["--requests", "0"],
        ["--input-len", "9-3"],
        ["--input-len", "x"],
        ["--rate", "-1"],
        ["--rate", "1", "--concurrency", "2"],
        ["--url", "ftp://host"],
        ["--api", "chat", "--prompt-form", "ids"],
    ],
)
def test_bad_arguments_are_refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(args)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_urls_are_taken_with_and_without_v1() -> None:
    assert parse(["--url", "http://host:9/v1/"]).url == "http://host:9"
    assert parse(["--url", "host:9"]).url == "http://host:9"
    assert parse(["--input-len", "5-9"]).input_len == LengthRange(5, 9)
