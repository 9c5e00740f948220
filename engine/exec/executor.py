"""Runs plans on this process's device: rows and batch, the model's forward, the sampler.

`forward` and `sample` only launch work; the host waits in `StepHandle.result`. It knows plans and tensors;
not requests, queues or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.exec import batch
from engine.exec.graphed import GraphedDecode
from engine.exec.kv_store import KVStore
from engine.exec.pooling import PendingEmbeddings, Pooler
from engine.exec.rows import Rows
from engine.model.transformer import Transformer
from engine.plan import RowStart, SequencePlan, StepPlan, StepResult, TokenMasks
from engine.sample.logprobs import PendingLogprobs
from engine.sample.sampler import Sampler
from engine.transfer import to_device, to_host
from engine.types import StepRun, TokenLogprob
from kernels import api

_PROMPT_LOGITS_TOKENS = 128  # prompt positions whose logits are held at once


class LocalExecutor:
    """The Executor of one device.

    Args:
        model: the decoder, on the device.
        kv_store: the KV memory its blocks index.
        rows: persistent page tables and last tokens.
        sampler: persistent sampling state, of as many rows.
        graphs: runs decode steps as graphs, on the same memory; None where there are none.
    """

    def __init__(
        self,
        model: Transformer,
        kv_store: KVStore,
        rows: Rows,
        sampler: Sampler,
        graphs: GraphedDecode | None = None,
    ) -> None:
        self._model = model
        self._kv_store = kv_store
        self._rows = rows
        self._sampler = sampler
        self._graphs = graphs
        self._pooler = Pooler()
        self._prompts: dict[int, tuple[int, ...]] = {}  # of rows that asked for prompt logprobs
        self._step: _Step | None = None

    @property
    def samples(self) -> bool:
        """Whether the model has an output layer."""
        return self._model.spec.lm_head

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> None:
        """Launches the model on a plan; its logits wait for `sample`."""
        self._start_rows(plan.row_starts)
        self._kv_store.copy_blocks(plan.block_copies)
        self._rows.start(plan)
        run = StepRun.OFF if self._graphs is None else self._graphs.launch(plan)
        if self._graphs is None or run.how == "eager":
            self._step = self._forward(plan, run)
        elif run is StepRun.GRAPH:
            self._step = _Step(plan, run)
        else:
            hidden_SE, row_S, position_S = self._graphs.forwarded(len(plan.sequences))
            self._step = _Step(plan, run, _ToDraw(self._model.logits(hidden_SE), row_S, position_S))

    @torch.inference_mode()
    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> _Handle:
        """Launches the draw of the step that `forward` launched last, where it is not launched yet."""
        handle = self._sample(plan, masks)
        if self._graphs is not None:
            self._graphs.capture_if_due()
        return handle

    def _sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> _Handle:
        step = self._step
        if step is None or step.plan is not plan:
            raise RuntimeError("sample must follow forward of the same plan")
        self._step = None
        wanted = [sequence.logprobs for sequence in plan.sequences if sequence.samples]
        if step.to_draw is not None:
            return _Handle(step, *self._draw(plan, step.to_draw, wanted, masks))
        if self._graphs is not None and step.run is StepRun.GRAPH:
            return _Handle(step, *self._graphs.drawn(wanted))
        return _Handle(step, None, None)

    @torch.inference_mode()
    def rehearse(self, plans: Sequence[StepPlan], threads: int) -> None:
        """Has the kernels of these plans compiled on threads, then those of graphs; does not wait for them.
        Computes nothing. Before the first request: what rows hold is lost."""
        with api.rehearsal(threads):
            for plan in plans:
                self.forward(plan)
                self._sample(plan)
            if self._graphs is not None:
                self._graphs.rehearse()
        self._rows.last_token_R.zero_()  # draws that were left out have written anything there

    @torch.inference_mode()
    def warm_up(self, plan: StepPlan) -> None:
        """Runs a plan for what is built lazily on the way, and captures nothing."""
        self.forward(plan)
        self._sample(plan).result()

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Captures a graph that steps may need. Whether there was one left."""
        return self._graphs is not None and self._graphs.capture_next()

    def _forward(self, plan: StepPlan, run: StepRun) -> _Step:
        """Launch by launch, whatever the plan."""
        self._rows.append(plan)
        all_hidden = self._reads_all_hidden(plan)
        tensors = batch.build(plan, self._rows, self._kv_store.layers, all_hidden)
        hidden_TE = hidden_SE = self._model.forward(tensors.forward)
        to_draw, of_prompts = None, _OfPrompts()
        if tensors.forward.wanted is None:
            hidden_SE = hidden_TE[tensors.sample_index]
            logprobs = self._prompt_logprobs(plan, hidden_TE)
            of_prompts = _OfPrompts(logprobs, self._pooler.pool(plan, hidden_TE))
        if len(tensors.sample_index) > 0:
            logits_SV = self._model.logits(hidden_SE)
            to_draw = _ToDraw(logits_SV, tensors.sample_row, tensors.sample_position)
        return _Step(plan, run, to_draw, of_prompts)

    def _reads_all_hidden(self, plan: StepPlan) -> bool:
        """Whether the hidden states of tokens are read that are not sampled from."""
        # On a GPU one query has other bits than the same query among several: then nothing may depend on
        # what other requests of the step ask for.
        fixed = self._model.deterministic and self._model.device.type == "cuda"
        return fixed or self._pooler.reads(plan) or any(s.prompt_logprobs is not None for s in plan.sequences)

    def _draw(
        self, plan: StepPlan, to_draw: _ToDraw, wanted: list[int | None], masks: TokenMasks | None
    ) -> tuple[Tensor, PendingLogprobs]:
        logits_SV, row_S, position_S = to_draw
        sampling = [sequence for sequence in plan.sequences if sequence.samples]
        rows = [sequence.row for sequence in sampling]
        positions = [sequence.start + sequence.num_tokens for sequence in sampling]
        keep = any(count is not None for count in wanted) and (
            masks is not None or self._sampler.changes_logits(rows)
        )
        raw_SV = logits_SV.clone() if keep else logits_SV
        token_S = self._sampler.sample(logits_SV, rows, positions, row_S, position_S, masks)
        self._rows.last_token_R[row_S] = token_S.clamp(min=0)
        return token_S, PendingLogprobs.launch(raw_SV, token_S, wanted)

    def _start_rows(self, starts: Sequence[RowStart]) -> None:
        self._sampler.start_rows(starts)
        self._pooler.start_rows(starts)
        for start in starts:
            self._prompts.pop(start.row, None)
            if start.params.prompt_logprobs is not None:
                self._prompts[start.row] = start.known_token_ids[: start.prompt_len]

    def _prompt_logprobs(self, plan: StepPlan, hidden_TE: Tensor) -> list[tuple[int, list[TokenLogprob]]]:
        """Log probabilities of prompt tokens, for the few sequences that ask. Waits for the device."""
        found = []
        first = 0
        for i, sequence in enumerate(plan.sequences):
            if sequence.prompt_logprobs is not None:
                chunk_TE = hidden_TE[first : first + sequence.num_tokens]
                found.append((i, self._chunk_logprobs(sequence, chunk_TE, sequence.prompt_logprobs)))
            first += sequence.num_tokens
        return found

    def _chunk_logprobs(self, sequence: SequencePlan, hidden_TE: Tensor, top: int) -> list[TokenLogprob]:
        """Of the prompt tokens start + 1 ... start + num_tokens, as far as the prompt goes."""
        following = self._prompts[sequence.row][sequence.start + 1 : sequence.start + 1 + sequence.num_tokens]
        out: list[TokenLogprob] = []
        for i in range(0, len(following), _PROMPT_LOGITS_TOKENS):
            part = following[i : i + _PROMPT_LOGITS_TOKENS]
            logits_SV = self._model.logits(hidden_TE[i : i + len(part)])
            tokens = to_device(part, torch.int64, logits_SV.device)
            pending = PendingLogprobs.launch(logits_SV, tokens, [top] * len(part))
            if logits_SV.is_cuda:
                torch.cuda.current_stream().synchronize()
            out += (entry for entry in pending.read() if entry)
        return out


class _OfPrompts(NamedTuple):
    """What a step's hidden states say of prompts."""

    logprobs: Sequence[tuple[int, list[TokenLogprob]]] = ()
    embeddings: PendingEmbeddings | None = None


class _ToDraw(NamedTuple):
    """Logits that are to be drawn from, with the rows and the positions of the tokens."""

    logits_SV: Tensor
    row_S: Tensor
    position_S: Tensor


class _Step(NamedTuple):
    """What `forward` leaves for `sample`. Without `to_draw`, nothing is sampled, or all is launched."""

    plan: StepPlan
    run: StepRun
    to_draw: _ToDraw | None = None
    of_prompts: _OfPrompts = _OfPrompts()


class _Handle:
    """A step whose tokens are on their way to the host."""

    def __init__(self, step: _Step, token_S: Tensor | None, logprobs: PendingLogprobs | None) -> None:
        self._run = step.run
        self._of_prompts = step.of_prompts
        self._logprobs = logprobs
        self._token_S = None if token_S is None else to_host(token_S)
        self._arrived: torch.cuda.Event | None = None
        embeddings = step.of_prompts.embeddings
        if (token_S is not None and token_S.is_cuda) or (embeddings is not None and embeddings.on_device):
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> StepResult:
        """Waits for this step's copies, not for whatever was launched after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        token_ids = [] if self._token_S is None else self._token_S.tolist()
        logprobs = [] if self._logprobs is None else self._logprobs.read()
        embeddings = self._of_prompts.embeddings
        return StepResult(
            token_ids,
            logprobs,
            self._of_prompts.logprobs,
            [] if embeddings is None else embeddings.read(),
            self._run,
        )
