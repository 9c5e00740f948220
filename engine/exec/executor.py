"""Runs plans on this process's device: rows and batch, the model's forward, the sampler.

`forward` and `sample` only launch work; the host waits in `StepHandle.result`. It knows plans and tensors;
not requests, queues or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.dist.transfer import to_device, to_host
from engine.exec import batch
from engine.exec.batch import BatchTensors
from engine.exec.kv_store import KVStore
from engine.exec.pooling import PendingEmbeddings, Pooler
from engine.exec.rows import Rows
from engine.model.transformer import Transformer
from engine.plan import RowStart, SequencePlan, StepPlan, StepResult, TokenMasks
from engine.sample.sampler import PendingLogprobs, Sampler
from engine.types import TokenLogprob

_PROMPT_LOGITS_TOKENS = 128  # prompt positions whose logits are held at once


class LocalExecutor:
    """The Executor of one device.

    Args:
        model: the decoder, on the device.
        kv_store: the KV memory its blocks index.
        rows: persistent page tables and last tokens.
        sampler: persistent sampling state, of as many rows.
    """

    def __init__(self, model: Transformer, kv_store: KVStore, rows: Rows, sampler: Sampler) -> None:
        self._model = model
        self._kv_store = kv_store
        self._rows = rows
        self._sampler = sampler
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
        self._rows.apply(plan)
        tensors = batch.build(plan, self._rows, self._kv_store.layers)
        hidden_TE = self._model.forward(tensors.forward)
        samples = len(tensors.sample_index) > 0
        logits_SV = self._model.logits(hidden_TE[tensors.sample_index]) if samples else None
        of_prompts = _OfPrompts(self._prompt_logprobs(plan, hidden_TE), self._pooler.pool(plan, hidden_TE))
        self._step = _Step(plan, tensors, logits_SV, of_prompts)

    @torch.inference_mode()
    def sample(self, plan: StepPlan, masks: TokenMasks | None = None) -> _Handle:
        """Launches the draw of the step that `forward` launched last."""
        step = self._step
        if step is None or step.plan is not plan:
            raise RuntimeError("sample must follow forward of the same plan")
        self._step = None
        if step.logits_SV is None:
            return _Handle(None, None, step.of_prompts)
        sampling = [sequence for sequence in plan.sequences if sequence.samples]
        wanted = [sequence.logprobs for sequence in sampling]
        rows = [sequence.row for sequence in sampling]
        positions = [sequence.start + sequence.num_tokens for sequence in sampling]
        keep = any(count is not None for count in wanted) and (
            masks is not None or self._sampler.changes_logits(rows)
        )
        raw_SV = step.logits_SV.clone() if keep else step.logits_SV
        row_S, position_S = step.tensors.sample_row, step.tensors.sample_position
        token_S = self._sampler.sample(step.logits_SV, rows, positions, row_S, position_S, masks)
        self._rows.last_token_R[row_S] = token_S.clamp(min=0)
        return _Handle(token_S, PendingLogprobs(raw_SV, token_S, wanted), step.of_prompts)

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
            pending = PendingLogprobs(logits_SV, tokens, [top] * len(part))
            if logits_SV.is_cuda:
                torch.cuda.current_stream().synchronize()
            out += (entry for entry in pending.read() if entry)
        return out


class _OfPrompts(NamedTuple):
    """What a step's hidden states say of prompts."""

    logprobs: list[tuple[int, list[TokenLogprob]]]
    embeddings: PendingEmbeddings | None


class _Step(NamedTuple):
    """What `forward` leaves for `sample`. Where nothing is sampled, there are no logits."""

    plan: StepPlan
    tensors: BatchTensors
    logits_SV: Tensor | None
    of_prompts: _OfPrompts


class _Handle:
    """A step whose tokens are on their way to the host."""

    def __init__(
        self,
        token_S: Tensor | None,
        logprobs: PendingLogprobs | None,
        of_prompts: _OfPrompts,
    ) -> None:
        self._logprobs = logprobs
        self._of_prompts = of_prompts
        self._token_S = None if token_S is None else to_host(token_S)
        self._arrived: torch.cuda.Event | None = None
        embeddings = of_prompts.embeddings
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
            token_ids, logprobs, self._of_prompts.logprobs, [] if embeddings is None else embeddings.read()
        )
