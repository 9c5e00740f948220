"""Runs a load: find the model, probe how prompts may be written, warm up, then a closed or open loop."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine, Iterator

from server.bench.client import ApiClient, Record, RequestError
from server.bench.options import BenchOptions, parse
from server.bench.report import Result, render_table, write_json
from server.bench.workload import WORDS, PromptForm, Workload

# Largest token id to try: the sizes of common vocabularies, then small ones.
PROBE_IDS = (31_999, 9_999, 3_999, 999, 255)


def main(args: list[str]) -> int:
    """The subcommand. Returns the exit status."""
    options = parse(args)
    try:
        result = _run_loop(bench(options))
    except RequestError as error:
        print(f"quire bench: {options.url}: {error.kind}: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(render_table(result))
    if options.json_path is not None:
        write_json(result, options.json_path)
    return 1 if result.failed or result.missing else 0


def _run_loop(task: Coroutine[None, None, Result]) -> Result:
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(task)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(task)


async def bench(options: BenchOptions) -> Result:
    """Measures one load.

    Raises:
        RequestError: the server cannot be reached or refuses the first request.
    """
    client = ApiClient(options.url, options.api_key, options.timeout_s)
    try:
        model = options.model or await find_model(client)
        form = await find_prompt_form(client, options, model)
        workload = Workload(options, model, form)
        await _warm_up(client, workload, options)
        run = Run(client, workload, options)
        await run.measure()
    finally:
        client.close()
        await asyncio.sleep(0)  # the loop closes the sockets
    return Result(options, model, "ids" if form.max_token_id is not None else "text", run.records)


async def find_model(client: ApiClient) -> str:
    """The first model that /v1/models lists."""
    reply = await client.get_json("/v1/models")
    try:
        return str(reply["data"][0]["id"])
    except (TypeError, LookupError):
        raise RequestError("/v1/models lists no model", "name one with --model") from None


async def find_prompt_form(client: ApiClient, options: BenchOptions, model: str) -> PromptForm:
    """Token ids where the server takes them, else words and what they cost.

    Raises:
        RequestError: the server refuses text too.
    """
    if options.api == "completions" and options.prompt_form != "text":
        for last_id in PROBE_IDS:
            workload = Workload(options, model, PromptForm(last_id))
            record = await client.stream(workload.path, workload.body([last_id - 1, last_id], 1))
            if record.error is None:
                return PromptForm(last_id)
        if options.prompt_form == "ids" and record.error is not None:
            raise record.error
    workload = Workload(options, model, PromptForm())
    tokens: list[int] = []
    for num_words in (16, 16 + len(WORDS)):
        pieces = [WORDS[i % len(WORDS)] for i in range(num_words)]
        record = await client.stream(workload.path, workload.body(pieces, 1))
        if record.error is not None:
            raise record.error
        tokens.append(record.prompt_tokens)
    if min(tokens) < 0 or tokens[1] <= tokens[0]:
        return PromptForm()  # no usage: take a word for a token
    per_word = (tokens[1] - tokens[0]) / len(WORDS)
    return PromptForm(None, per_word, tokens[0] - 16 * per_word)


async def _warm_up(client: ApiClient, workload: Workload, options: BenchOptions) -> None:
    bodies = workload.bodies(options.warmup, "warmup")

    async def worker() -> None:
        for body in bodies:
            record = await client.stream(workload.path, body)
            if record.error is not None:
                raise record.error

    try:
        async with asyncio.timeout(options.max_seconds), asyncio.TaskGroup() as group:
            for _ in range(min(options.concurrency, options.warmup)):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    except TimeoutError:
        raise RequestError("timeout", "the warm-up did not end within --max-seconds") from None


class Run:
    """The measured part: at most `requests` requests, at most `max_seconds`."""

    def __init__(self, client: ApiClient, workload: Workload, options: BenchOptions) -> None:
        self.records: list[Record] = []
        self._client = client
        self._workload = workload
        self._options = options
        # Bodies are made before the clock starts: making them costs time that is not the server's.
        self._bodies = list(workload.bodies(options.requests))

    async def measure(self) -> None:
        loop = self._closed_loop if self._options.rate is None else self._open_loop
        progress = asyncio.create_task(_show_progress(self.records, self._options))
        try:
            async with asyncio.timeout(self._options.max_seconds):
                await loop()
        except TimeoutError:
            pass  # the requests that were under way are in the records, as failed
        finally:
            progress.cancel()

    async def _closed_loop(self) -> None:
        bodies: Iterator[bytes] = iter(self._bodies)

        async def worker() -> None:
            for body in bodies:
                await self._one(body, time.perf_counter())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._options.concurrency, len(self._bodies))):
                group.create_task(worker())

    async def _open_loop(self) -> None:
        places = asyncio.Semaphore(self._options.max_in_flight)
        begin_s = time.perf_counter()

        async def arrive(body: bytes, start_s: float) -> None:
            async with places:
                await self._one(body, start_s)

        async with asyncio.TaskGroup() as group:
            arrivals = self._workload.arrivals_s(len(self._bodies))
            for body, after_s in zip(self._bodies, arrivals, strict=True):
                await asyncio.sleep(begin_s + after_s - time.perf_counter())
                group.create_task(arrive(body, begin_s + after_s))

    async def _one(self, body: bytes, start_s: float) -> None:
        try:
            record = await self._client.stream(self._workload.path, body, start_s)
        except asyncio.CancelledError:
            record = Record(start_s, time.perf_counter())
            record.error = RequestError("unfinished", "--max-seconds ended the run")
            self.records.append(record)
            raise
        self.records.append(record)


async def _show_progress(records: list[Record], options: BenchOptions) -> None:
    if options.quiet or not sys.stderr.isatty():
        return
    write: Callable[[str], object] = sys.stderr.write
    try:
        while True:
            await asyncio.sleep(1)
            failed = sum(record.error is not None for record in records)
            write(f"\r{len(records)}/{options.requests} done, {failed} failed ")
            sys.stderr.flush()
    finally:
        write("\r\x1b[K")
