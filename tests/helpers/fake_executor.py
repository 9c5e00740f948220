"""An executor without a model that catches the engine's mistakes.

Its KV memory is a list of cells: a cell holds the (position, token) that a step wrote there. To draw a
token it reads *all* earlier tokens back through the page table and hashes them, so a wrong block, a missing
copy or a position that was never computed changes the output or raises. It is strict on purpose: whatever
a plan says that a device would silently accept, and that is wrong, is an error here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from engine.core import choice_seed
from engine.embedding import Pooling
from engine.plan import RowStart, SequencePlan, StepPlan, StepResult, TokenMasks
from engine.types import FinishReason, SamplingParams, TokenLogprob

VOCAB = 50
EOS = (1,)


class PlanError(AssertionError):
    """A plan that no correct scheduler makes."""


Cell = tuple[int, int]  # (position, token id)


@dataclass
class Row:
    """What a runner's row remembers."""

    params: SamplingParams
    seed: int
    prompt_len: int
    length: int  # tokens that exist: the prompt and what was drawn
    table: list[int]
    prompt: tuple[int, ...]
    computed: int | None = None  # None until the first sequence tells
    finite: int = 0  # tokens up to the last finite draw, or before this row began
    last_token: int | None = None
    began: int = 0  # the first token that this row computed


def ensure(law: bool, broken: str) -> None:
    if not law:
        raise PlanError(broken)


def draw(seed: int, token_ids: Sequence[int], banned: Iterable[int] = ()) -> int:
    """The next token: a function of the seed and all tokens before, and nothing else."""
    salt = 0
    banned = set(banned)
    while True:
        data = f"{seed}/{salt}/{','.join(map(str, token_ids))}".encode()
        token_id = int.from_bytes(hashlib.blake2b(data, digest_size=4).digest(), "big") % VOCAB
        if token_id not in banned:
            return token_id
        salt += 1


def stop_ids(params: SamplingParams, eos: tuple[int, ...] = EOS) -> frozenset[int]:
    return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos)


def embedding_of(token_ids: Sequence[int], pooling: Pooling) -> bytes:
    """The fake's vector: a function of what was asked and of every token, and nothing else."""
    return hashlib.blake2b(f"{pooling}/{','.join(map(str, token_ids))}".encode(), digest_size=16).digest()


def prompt_logprob(position: int, token_id: int) -> TokenLogprob:
    """What the fake says of a prompt token, so that order and place can be checked."""
    return TokenLogprob(token_id, -float(position))


class Handle:
    """A step's result; may be asked once."""

    def __init__(self, result: StepResult) -> None:
        self._result: StepResult | None = result

    def result(self) -> StepResult:
        ensure(self._result is not None, "a result was taken twice")
        result, self._result = self._result, None
        assert result is not None
        return result


class FakeExecutor:
    """Runs plans at once and in order, as a device's stream does.

    Args:
        config: pool, limits and depth that plans must keep to.

    Attributes:
        broken: (seed, position): what is computed for a token drawn there is not finite: the token is -1,
            and so is every token drawn by whoever reads those cells later.
        fail_next: raised by the next forward, once.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.block_size = config.cache.block_size
        self.num_blocks = config.cache.num_blocks
        self.limits = config.scheduler
        self.eos = config.model.eos_token_ids
        self.cells: dict[int, list[Cell | None]] = {}
        self.poisoned: set[tuple[int, int]] = set()  # (block, offset) whose content is not finite
        self.rows: dict[int, Row] = {}
        self.broken: set[tuple[int, int]] = set()
        self.fail_next: BaseException | None = None
        self.fail_next_result: BaseException | None = None
        self.steps = 0
        self.max_tokens_in_step = 0
        self._forwarded: StepPlan | None = None

    def forward(self, plan: StepPlan) -> None:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        ensure(self._forwarded is None, "forward twice without sample")
        self._forwarded = plan
        self.steps += 1
        self._check_limits(plan)
        for start in plan.row_starts:
            self._start(start)
        fresh = [block_id for sequence in plan.sequences for block_id in sequence.new_block_ids]
        ensure(len(set(fresh)) == len(fresh), "a block was handed out twice in one step")
        self._copy(plan, set(fresh))
        self._append(plan)
        for sequence in plan.sequences:
            self._write(sequence)

    def prepare(self) -> bool:
        return False

    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> Handle:
        ensure(self._forwarded is plan, "sample without forward")
        self._forwarded = None
        token_ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        prompt_logprobs: list[tuple[int, list[TokenLogprob]]] = []
        embeddings: list[tuple[int, bytes]] = []
        ensure(masks is None or plan.constrained, "masks for a step without a grammar")
        fitting = {} if masks is None else dict(zip(masks.index_K.tolist(), masks.words_KW, strict=True))
        for index, sequence in enumerate(plan.sequences):
            row = self.rows[sequence.row]
            end = sequence.start + sequence.num_tokens
            seen = self._read(row, end)
            if sequence.prompt_logprobs is not None:
                following = range(sequence.start + 1, min(end + 1, row.prompt_len))
                prompt_logprobs.append((index, [prompt_logprob(p, row.prompt[p]) for p in following]))
            if sequence.embeds:
                vector = self._embed(row, seen)
                embeddings += [(index, vector)] if vector is not None else []
            if sequence.samples:
                token_ids.append(self._draw(row, seen, fitting.get(len(token_ids))))
                wanted = sequence.logprobs is not None
                logprobs.append(TokenLogprob(token_ids[-1], -0.5) if wanted else None)
        return _FailingHandle.wrap(self, StepResult(token_ids, logprobs, prompt_logprobs, embeddings))

    def _check_limits(self, plan: StepPlan) -> None:
        rows = [sequence.row for sequence in plan.sequences]
        ensure(bool(rows), "an empty step")
        ensure(len(set(rows)) == len(rows), "a row has two sequences in one step")
        ensure(all(0 <= row < self.limits.max_num_seqs for row in rows), f"a row beyond the limit: {rows}")
        ensure(plan.num_tokens <= self.limits.max_num_batched_tokens, "the token budget is overrun")
        ensure(len(plan.sequences) <= self.limits.max_num_seqs, "too many sequences")
        self.max_tokens_in_step = max(self.max_tokens_in_step, plan.num_tokens)
        sizes = [sequence.num_tokens > 1 for sequence in plan.sequences]
        ensure(sizes == sorted(sizes), "single tokens do not come first")
        started = {start.row for start in plan.row_starts}
        ensure(len(started) == len(plan.row_starts) and started <= set(rows), "a row starts without tokens")

    def _start(self, start: RowStart) -> None:
        known = start.known_token_ids
        prompt = known[: start.prompt_len]
        self.rows[start.row] = Row(
            start.params, start.seed, start.prompt_len, len(known), list(start.block_ids), prompt
        )

    def _copy(self, plan: StepPlan, fresh: set[int]) -> None:
        sources = {source for source, _ in plan.block_copies}
        destinations = [destination for _, destination in plan.block_copies]
        ensure(set(destinations) <= fresh, "a copy goes to a block that is not new")
        ensure(len(set(destinations)) == len(destinations), "two copies go to one block")
        ensure(not sources & fresh, "a copy's source was handed out in the same step")
        for block_id in fresh:  # poison: what was there before must never be read again
            ensure(0 < block_id < self.num_blocks, f"block {block_id} is not one of the pool's")
            self.cells[block_id] = [None] * self.block_size
            self.poisoned -= {(block_id, offset) for offset in range(self.block_size)}
        for source, destination in plan.block_copies:
            self.cells[destination] = list(self.cells[source])
            self.poisoned |= {(destination, offset) for b, offset in self.poisoned if b == source}

    def _append(self, plan: StepPlan) -> None:
        for sequence in plan.sequences:
            self.rows[sequence.row].table += sequence.new_block_ids

    def _write(self, sequence: SequencePlan) -> None:
        row = self.rows[sequence.row]
        ensure(row.computed in (None, sequence.start), f"row {sequence.row}: a gap or a repeat in positions")
        if row.computed is None:
            row.finite = row.began = sequence.start
        token_ids = sequence.token_ids
        if not token_ids:
            ensure(row.last_token is not None and sequence.num_tokens == 1, "no token to compute")
            token_ids = (row.last_token or 0,)
        ensure(len(token_ids) == sequence.num_tokens, "tokens and their count differ")
        end = sequence.start + sequence.num_tokens
        ensure(end <= row.length, "tokens that do not exist yet")
        limit = row.prompt_len + max((row.params.max_tokens or 1) - 1, 0)
        ensure(row.params.max_tokens is None or end <= limit, "more is computed than was asked for")
        ensure(-(-end // self.block_size) == len(row.table), "the page table does not fit the tokens")
        for position, token_id in enumerate(token_ids, sequence.start):
            block_id, offset = self._place(row, position)
            self.cells[block_id][offset] = (position, token_id)
            self.poisoned.discard((block_id, offset))
        row.computed = end
        ensure(sequence.samples == (end == row.length and row.params.max_tokens != 0), "samples is wrong")
        pools = row.params.pooling is not None and end == row.prompt_len
        ensure(sequence.embeds == pools, "embeds is wrong")

    def _read(self, row: Row, end: int) -> list[int]:
        """Attention: every token so far, through the page table."""
        seen = []
        for position in range(end):
            block_id, offset = self._place(row, position)
            cell = self.cells[block_id][offset]
            if cell is None or cell[0] != position:
                raise PlanError(f"position {position} was not computed: found {cell}")
            seen.append(cell[1])
        return seen

    def _embed(self, row: Row, seen: list[int]) -> bytes | None:
        """None where anything that it was made of is not finite."""
        pooling = row.params.pooling
        ensure(pooling is not None and len(seen) == row.prompt_len, "an embedding that nobody asked for")
        assert pooling is not None
        ensure(row.began == 0 or not pooling.needs_every_token, "hidden states were asked of a prefix hit")
        places = [self._place(row, position) for position in range(len(seen))]
        if (row.seed, len(seen)) in self.broken:
            self.poisoned.update(places[row.finite :])
        return None if self.poisoned.intersection(places) else embedding_of(seen, pooling)

    def _draw(self, row: Row, seen: list[int], words_W: Sequence[int] | None = None) -> int:
        too_short = row.length - row.prompt_len < row.params.min_tokens
        banned = set(stop_ids(row.params, self.eos) if too_short else ())
        if words_W is not None:
            banned |= {t for t in range(VOCAB) if not int(words_W[t // 32]) >> (t % 32) & 1}
        token_id = draw(row.seed, seen, banned)
        row.length += 1
        row.last_token = token_id
        places = [self._place(row, position) for position in range(len(seen))]
        if (row.seed, len(seen)) in self.broken:
            self.poisoned.update(places[row.finite :])
        if self.poisoned.intersection(places):
            return -1
        row.finite = len(seen)
        return token_id

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.table[position // self.block_size], position % self.block_size


class _FailingHandle(Handle):
    """Raises instead of a result when the executor was told so."""

    def __init__(self, result: StepResult, error: BaseException) -> None:
        super().__init__(result)
        self._error = error

    def result(self) -> StepResult:
        raise self._error

    @classmethod
    def wrap(cls, executor: FakeExecutor, result: StepResult) -> Handle:
        error, executor.fail_next_result = executor.fail_next_result, None
        return Handle(result) if error is None else cls(result, error)


@dataclass
class Expected:
    """What one choice must say: the oracle, which knows no blocks and no steps."""

    token_ids: list[int] = field(default_factory=list)
    reason: FinishReason = FinishReason.LENGTH
    stop_reason: int | None = None


def expected_choice(
    prompt: Sequence[int], params: SamplingParams, index: int, max_output: int, eos: tuple[int, ...] = EOS
) -> Expected:
    """What choice `index` of a request says when nobody interferes."""
    assert params.seed is not None
    seed = choice_seed(params.seed, index)
    stops = stop_ids(params, eos)
    out = Expected()
    while len(out.token_ids) < max_output:
        too_short = len(out.token_ids) < params.min_tokens
        token_id = draw(seed, [*prompt, *out.token_ids], stops if too_short else ())
        out.token_ids.append(token_id)
        if token_id in stops:
            own = token_id in eos and not params.ignore_eos
            return Expected(out.token_ids, FinishReason.STOP, None if own else token_id)
    return out


def make_config(
    *,
    block_size: int = 4,
    num_blocks: int = 33,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_queued_requests: int = 1000,
    max_model_len: int = 1000,
    prefix_caching: bool = True,
    steps_ahead: int = 1,
    least_piece: int = 1,
    vocab_size: int = VOCAB,
    eos_token_ids: tuple[int, ...] = EOS,
) -> EngineConfig:
    """A small engine configuration; `num_blocks` counts the padding block."""
    return EngineConfig(
        model=ModelConfig(
            name="fake", dtype="float32", device="cpu", max_model_len=max_model_len,
            vocab_size=vocab_size, eos_token_ids=eos_token_ids, seed=0,
        ),
        cache=CacheConfig(block_size, num_blocks, 1, prefix_caching, "float32"),
        scheduler=SchedulerConfig(
            max_num_seqs, max_num_batched_tokens, max_queued_requests, steps_ahead, least_piece
        ),
    )  # fmt: skip
