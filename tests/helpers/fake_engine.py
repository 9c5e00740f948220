"""A core without a model: it says what the prompt tells it to, one token per byte, and breaks on request.

The prompt's bytes are a command, the rest of them its argument:

    say TEXT        the text, then the end-of-turn token
    forever         "abc" again and again, up to max_tokens
    crash           the step raises; hang: the step never returns; oom: the step runs out of memory twice
    refuse          `add` raises
    error           this request alone ends with an error
    raw HEX         the bytes, whatever they are
    control         a control token again and again

Of its cache it knows one thing: each request takes one block, and none is ever given back but by a reset.

`build` has the interface of engine.build.build; the options' model says how the start goes.
"""

from __future__ import annotations

import itertools
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from engine.config import EngineOptions
from engine.errors import InvalidRequest, MemoryPlanError
from engine.grammar import Grammars
from engine.types import EngineInfo, EngineSnapshot, FinishReason, SamplingParams, TokenLogprob, TokenOutput
from engine.views import (
    DEFAULT_SCOPE,
    BlockDetail,
    BlockView,
    CachePage,
    CacheReport,
    CacheScope,
    MissReason,
    PoolFrame,
)

END, CONTROL = 256, 257
VOCAB_SIZE = 258
STEP_S = 0.001

INFO = EngineInfo(
    model="fake",
    architecture="FakeForCausalLM",
    dtype="float32",
    device="cpu",
    backend="fake",
    vocab_size=VOCAB_SIZE,
    max_model_len=4096,
    eos_token_ids=(END,),
    block_size=16,
    num_blocks=129,
    kv_dtype="float32",
    weight_bytes=1000,
    kv_bytes=1000,
    max_num_seqs=8,
    max_num_batched_tokens=512,
    max_queued_requests=8,
    prefix_caching=False,
    largest_request_tokens=2048,
)


class ByteTokenizer:
    """What a client needs of a tokenizer: a token is a byte, two more are special."""

    vocab_size = VOCAB_SIZE
    special_ids = frozenset({END, CONTROL})
    byte_table: ClassVar[list[bytes]] = [*(bytes([byte]) for byte in range(256)), b"<end>", b"<control>"]
    strip_left = 0

    def token_string(self, token_id: int) -> str:
        return str(token_id)

    def decode_strings(self, strings: list[str]) -> str:
        return "".join(strings)


class _Choice:
    def __init__(
        self, tokens: Iterator[int], params: SamplingParams, fault: str | None, report: CacheReport | None
    ) -> None:
        self.report = report
        self.tokens = tokens
        self.left = INFO.max_model_len if params.max_tokens is None else params.max_tokens
        self.params = params
        self.fault = fault

    def next(self, request_id: str, index: int) -> TokenOutput:
        if self.fault == "error":
            return TokenOutput(request_id, index, None, FinishReason.ERROR, error="its own fault")
        if self.left == 0:
            return TokenOutput(request_id, index, None, FinishReason.LENGTH)
        token = next(self.tokens)
        self.left -= 1
        reason = None
        if token == END:
            reason = FinishReason.STOP
        elif self.left == 0:
            reason = FinishReason.LENGTH
        logprob = TokenLogprob(token, -0.5) if self.params.logprobs is not None else None
        report, self.report = self.report, None
        return TokenOutput(request_id, index, token, reason, logprob=logprob, cached_tokens=2, cache=report)


class FakeCore:
    """See the module.

    Attributes:
        gate: every step waits for it; clear it to hold all streams.
        scopes: of the requests added. questions: what was asked of the cache.
        watched: somebody looks on.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.added: list[str] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.scopes: list[CacheScope] = []
        self.questions: list[tuple[object, ...]] = []
        self.watched = False
        self.grammars: Grammars | None = None
        self._owners: list[int] = []
        self._shown = 0
        self._frames = 0
        self._live: dict[tuple[str, int], _Choice] = {}
        self._ends: list[TokenOutput] = []
        self._steps = 0
        self._generated = 0
        self._ooms = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live or self._ends)

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        scope: CacheScope = DEFAULT_SCOPE,
        explain: bool = False,
    ) -> None:
        command, _, argument = bytes(token % 256 for token in prompt_ids).partition(b" ")
        if command == b"refuse":
            raise InvalidRequest("refused by the core", "prompt")
        self.added.append(request_id)
        self.scopes.append(scope)
        self._owners.append(int(request_id))
        report = CacheReport(len(prompt_ids), 2, MissReason.NEVER_SEEN, 2) if explain else None
        tokens: Callable[[], Iterator[int]] = {
            b"say": lambda: iter([*argument, END]),
            b"raw": lambda: iter([*bytes.fromhex(argument.decode()), END]),
            b"control": lambda: itertools.repeat(CONTROL),
            b"oom": lambda: iter([*b"survived", END]),
        }.get(command, lambda: itertools.cycle(b"abc"))
        for index in range(params.n):
            self._live[request_id, index] = _Choice(tokens(), params, command.decode(), report)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append((request_id, index))
        for key in [key for key in self._live if key[0] == request_id and index in (None, key[1])]:
            del self._live[key]
            self._ends.append(TokenOutput(*key, None, FinishReason.ABORT))

    def fail(self, request_id: str | None, message: str) -> None:
        for key in [key for key in self._live if request_id in (None, key[0])]:
            del self._live[key]
            self._ends.append(TokenOutput(*key, None, FinishReason.ERROR, error=message))

    def step(self) -> list[TokenOutput]:
        self.gate.wait()
        threading.Event().wait(STEP_S)  # stands for the work
        for choice in self._live.values():
            self._break(choice.fault)
        outputs, self._ends = self._ends, []
        for key, choice in list(self._live.items()):
            outputs.append(choice.next(*key))
            if outputs[-1].finish_reason is not None:
                del self._live[key]
        self._steps += 1
        self._generated += len(outputs)
        return outputs

    def _break(self, fault: str | None) -> None:
        if fault == "crash":
            raise RuntimeError("crashed as asked")
        if fault == "exit":
            os._exit(3)
        if fault == "hang":
            threading.Event().wait()
        if fault == "oom" and self._ooms < 1:
            self._ooms += 1
            raise MemoryError

    def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(
            steps=self._steps,
            running=len(self._live),
            generated_tokens=self._generated,
            blocks_total=INFO.num_blocks - 1,
            blocks_free=INFO.num_blocks - 1,
        )

    def probe(self, prompt_ids: Sequence[int], scope: CacheScope) -> CacheReport:
        self.questions.append(("probe", tuple(prompt_ids), scope))
        if bytes(list(prompt_ids)) == b"hang":
            threading.Event().wait()
        if bytes(list(prompt_ids)) == b"crash":
            raise RuntimeError("crashed as asked")
        return CacheReport(len(prompt_ids), 0, MissReason.DIVERGED, 1, None, None, (5, 6), 1)

    def cache_page(self, first_block: int, limit: int, state: str) -> CachePage:
        self.questions.append(("page", first_block, limit, state))
        if state not in ("", "cached"):
            raise InvalidRequest("no such state", "state")
        block_ids = range(first_block, min(first_block + limit, len(self._owners) + 1))
        return CachePage(tuple(map(self._view, block_ids)), block_ids.stop if block_ids else None)

    def cache_block(self, block_id: int) -> BlockDetail | None:
        self.questions.append(("block", block_id))
        if not 1 <= block_id <= len(self._owners):
            return None
        return BlockDetail(self._view(block_id), (1, 2), (3,))

    def _view(self, block_id: int) -> BlockView:
        owner = str(self._owners[block_id - 1])
        return BlockView(block_id, "cached", "default", owner, (), 0, 16, "ab", 0, 1.5, 0.5)

    def reset_prefix_cache(self) -> int:
        emptied, self._owners, self._shown = len(self._owners), [], 0
        return emptied

    def watch(self, on: bool) -> None:
        self.watched = on

    def prepare(self) -> bool:
        return False

    @property
    def pool_changed(self) -> bool:
        return self._shown != len(self._owners)

    def frame(self, full: bool) -> PoolFrame:
        """The owners only; a block's other columns are zero."""
        first = 0 if full else self._shown + 1
        self._shown, self._frames = len(self._owners), self._frames + 1
        ids = range(first, self._shown + 1)
        owners = array("I", [0, *self._owners][first:]).tobytes()
        zeros, kept = bytes(len(owners)), bytes(len(ids))
        sent = b"" if full else array("I", ids).tobytes()
        return PoolFrame(
            self._frames, full, 0, ("default",), sent, zeros, kept, owners, *[zeros] * 5, (), len(self._live)
        )


def build(
    options: EngineOptions, progress: Callable[[int, int], None] | None = None
) -> tuple[FakeCore, EngineInfo]:
    """The engine process's factory in tests."""
    if options.model == "does-not-fit":
        raise MemoryPlanError("The model needs 14 GiB and the machine has 8 GiB.")
    if options.model == "bug":
        raise RuntimeError("/secret/path")
    if options.model == "vanish":
        os._exit(7)
    if options.model == "slow":
        threading.Event().wait()
    if progress is not None:
        for done in (0, 500, 1000):
            progress(done, 1000)
    return FakeCore(), INFO
