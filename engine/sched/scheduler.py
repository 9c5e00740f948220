"""Which tokens are computed next, and what their results mean. It knows counts and tokens, not text,
time or devices; blocks are the KVManager's.

There is no prefill phase and no decode phase: each step gives tokens to requests until `computed == known`.
In a step, single tokens (decodes) come first, then longer stretches of running requests, then admissions.

    add -> queue -> schedule: admitted -> running -> update: finished -> outputs
              ^                              |
              +--------- preempted ----------+

A step may be scheduled before the results of those before it were seen (steps in flight). A result is
matched with its request by identity and epoch, so whatever happened to the request meanwhile, it never
reaches another one or a later life of the same one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from engine.config import SchedulerConfig
from engine.errors import InvalidRequest, Overloaded
from engine.grammar import Grammars
from engine.kv.manager import KVManager, PrefixHit
from engine.kv.page_table import blocks_for
from engine.plan import NOTHING_LEFT, SequencePlan, StepPlan, StepResult, TokenMasks
from engine.request import Request, Status
from engine.sched.budget import StepBudget
from engine.sched.draft import Planned, StepDraft
from engine.sched.ledger import Ledger
from engine.sched.limits import RequestLimits
from engine.sched.masks import draw_masks
from engine.sched.roster import Roster, expendable
from engine.sched.show import lanes
from engine.sched.stopping import StopRules
from engine.sched.tally import Tally
from engine.types import FinishReason, TokenLogprob, TokenOutput
from engine.views import Lane

logger = logging.getLogger(__name__)

FAULT = "This request failed inside the engine."
NOT_FINITE = "The model's output for this request was not finite."
STUCK = "This request cannot go on"
NOTHING_ALLOWED = "No token is left that all of the request's parameters allow."
RETRY_AFTER_S = 1.0
# Admission leaves one block free for each so many running requests: of those that decode, about a
# quarter asks for its next block within a quarter of a block's tokens.
RUNNING_PER_SPARE_BLOCK = 4


class Scheduler:
    """Plans steps, reads their results, and ends every submitted choice exactly once.

    Not thread-safe: one thread owns it.

    Args:
        kv: hands out blocks; the scheduler is its only caller.
        limits: refuses what can never work.
        stops: when a choice ends by itself.
        clock: for what is told of requests; nothing is decided by it.

    Attributes:
        tally: what was counted and timed.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        limits: RequestLimits,
        stops: StopRules,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.steps = 0
        self.tally = Tally(clock)
        self.kv = kv
        self.roster = Roster(config.max_num_seqs, kv)
        self._config = config
        self._limits = limits
        self._stops = stops
        self._ledger = Ledger(self.tally)
        self._arrivals = 0
        self._in_flight: deque[tuple[StepPlan, list[Planned]]] = deque()

    # ---- asking

    @property
    def has_work(self) -> bool:
        return self._ledger.num_live > 0 or self._ledger.has_outputs

    @property
    def running(self) -> list[Request]:
        """Running choices in their order."""
        return self.roster.running

    @property
    def num_waiting(self) -> int:
        """Choices not running yet, or not any more."""
        return self._ledger.num_live - len(self.roster.running)

    def lanes(self) -> tuple[tuple[Lane, ...], int]:
        """What the choices do, for somebody who looks on; and how many more there are."""
        return lanes(self.roster.running, self.roster.waiting, self._ledger.num_live, self.tally.now_s)

    def add(self, leader: Request) -> None:
        """Queues a request: its first choice, the others as its followers.

        Raises:
            InvalidRequest, ContextTooLong, NeverFits: it can never run.
            Overloaded: the queue is full.
        """
        if leader.request_id in self._ledger:
            raise InvalidRequest("A request with this id is already being served.", "request_id")
        max_output = self._limits.max_output(leader.prompt_len, leader.params)
        # The rule of the client, who asks first. A stricter one here would break requests that it let in.
        live, most = self._ledger.num_live, self._config.max_num_seqs + self._config.max_queued_requests
        if live + 1 + len(leader.followers) > most:
            raise Overloaded(f"{live} sequences are running or queued, {most} are allowed.", RETRY_AFTER_S)
        stop_ids = self._stops.stop_ids(leader.params)
        for choice in (leader, *leader.followers):
            choice.set_limits(max_output, stop_ids)
            choice.order = (choice.params.priority, self._arrivals)
            self._arrivals += 1
        self.tick()
        self._ledger.enter(leader)
        self.roster.waiting.push(leader)
        if max_output == 0:
            self._end_without_output(leader)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends one choice or all that are left, and gives their blocks back at once. Unknown is ignored."""
        for choice in reversed(self._ledger.choices(request_id)):  # followers before their leader
            if index is None or choice.index == index:
                self._end(expendable(choice), FinishReason.ABORT)

    def fail(self, request_id: str | None, message: str) -> None:
        """Ends a request, or all of them, with an error."""
        choices = list(self._ledger.all_choices()) if request_id is None else self._ledger.choices(request_id)
        for choice in reversed(choices):
            self._end(choice, FinishReason.ERROR, error=message)

    def take_outputs(self) -> list[TokenOutput]:
        """What was said since the last call."""
        return self._ledger.take_outputs()

    def tick(self) -> None:
        """Whatever happens until the next tick happens now."""
        self.kv.tick(self.tally.tick())

    # ---- one step

    def schedule(self) -> StepPlan | None:
        """Plans the next step and counts it as done; None where there is nothing to compute now."""
        self.tick()
        self.kv.settle()
        draft = StepDraft(StepBudget(self._config.max_num_batched_tokens, self._config.least_piece))
        longer = self._plan_singles(draft)
        owed_blocks = self._plan_longer(longer, draft)
        self._admit(draft, owed_blocks)
        return self._launch(draft)

    def masks(self, plan: StepPlan, grammars: Grammars) -> TokenMasks | None:
        """Which tokens the sequences under a grammar may draw in the step launched last.

        The results of all steps before it must have been seen, and its own not yet. Choices whose grammar
        leaves nothing to draw end here.
        """
        launched, planned = self._in_flight[-1]
        if launched is not plan or len(self._in_flight) > 1:
            raise AssertionError(f"step {plan.step}: masks are made after all earlier results were seen")
        sampling = [part.request if part.is_current else None for part in planned if part.sequence.samples]
        masks, complete, stuck = draw_masks(sampling, grammars)
        for request in complete:
            self._end(request, FinishReason.STOP)
        for request, why in stuck:
            self._end(request, FinishReason.ERROR, error=f"{STUCK}: {why}.")
        return masks

    def update(self, plan: StepPlan, result: StepResult) -> None:
        """Takes in the result of the oldest step in flight, which is `plan`'s."""
        self.tick()
        launched, planned = self._in_flight.popleft()
        if launched is not plan or len(result.token_ids) != sum(p.sequence.samples for p in planned):
            raise AssertionError(f"step {launched.step}: the result belongs to another plan")
        self.tally.runs[result.run] += 1
        for index, logprobs in result.prompt_logprobs:
            request = planned[index].request
            if planned[index].is_current and request.prompt_logprobs is not None:
                request.prompt_logprobs += logprobs
        for index, embedding in result.embeddings:
            if planned[index].is_current:
                planned[index].request.embedding = embedding
        token_ids = iter(result.token_ids)
        logprobs_S = iter(result.logprobs)
        for part in planned:
            request, _, sequence = part
            token_id = next(token_ids) if sequence.samples else None
            logprob = next(logprobs_S, None) if sequence.samples else None
            if not part.is_current:
                continue
            try:
                self._see(request, sequence, token_id, logprob)
            except Exception:
                self._fault(request)

    def restart(self) -> None:
        """Forgets all steps in flight and puts every running request back into the queue.

        For when the executor failed: nothing is lost, all is computed again.
        """
        self._in_flight.clear()
        for request in reversed(tuple(self.roster.running)):
            self._preempt(request)

    # ---- planning

    def _plan_singles(self, draft: StepDraft) -> list[Request]:
        """Plans requests with one token to compute, in their order, and returns those with more."""
        longer = []
        for request in tuple(self.roster.running):
            remaining = request.remaining
            if remaining > 1:
                longer.append(request)
            elif remaining == 1 and draft.budget.left and request.status is Status.RUNNING:
                self._extend(request, 1, draft)
        return longer

    def _plan_longer(self, requests: list[Request], draft: StepDraft) -> int:
        """Plans requests that are behind; returns the blocks they will still ask for to catch up."""
        owed_blocks = 0
        for request in requests:
            if request.adopting and request.status is Status.RUNNING:
                self._adopt_more(request)
            if draft.budget.has_piece and request.status is Status.RUNNING and not request.adopting:
                self._extend(request, request.remaining, draft)
            if request.status is Status.RUNNING:
                owed_blocks += self._owed(request)
        return owed_blocks

    def _admit(self, draft: StepDraft, owed_blocks: int) -> None:
        """Admits from the queue's head while rows, blocks and budget last, nobody was preempted, and the next
        one need not wait for what a running request computes for both."""
        waiting = self.roster.waiting
        while len(waiting) and draft.budget.has_piece and not draft.preempted and not self.kv.is_busy:
            request = waiting.peek()
            try:
                if not self.roster.has_rows(request) or not self.kv.prepare(request):
                    return
                hit = self.kv.match(request)
                if not self._has_room(request, hit, draft.budget.left, owed_blocks):
                    return
                if self.kv.is_coming(request, hit):
                    return
                self._account(request, hit)
                self.roster.begin(request, hit)
            except Exception:
                self._fault(request)
                continue
            if not request.adopting:
                self._extend(request, request.remaining, draft)
            owed_blocks += self._owed(request)

    def _adopt_more(self, request: Request) -> None:
        """Goes on with a prefix hit that was too long for one step."""
        try:
            request.adopting = not self.kv.adopt(request, self.kv.match(request))
        except Exception:
            self._fault(request)
            return
        if not request.preemptions:  # some of what was found may have been evicted since
            request.cached_tokens = request.computed

    def _has_room(self, request: Request, hit: PrefixHit, budget_tokens: int, owed_blocks: int) -> bool:
        """Whether admitting the request would not soon cost somebody else his blocks.

        With nothing else running its first stretch must fit, no more: that it fits when alone was checked
        on arrival. Else all it knows must fit, beside what others are sure to ask for.
        """
        size = self.kv.block_size
        if self.roster.running:
            needed = blocks_for(request.known, size) + len(request.followers) + owed_blocks
            needed += len(self.roster.running) // RUNNING_PER_SPARE_BLOCK
        else:
            needed = blocks_for(min(request.known, hit.tokens + budget_tokens), size)
        return needed - len(hit.block_ids) + hit.idle_blocks <= self.kv.pool.num_available

    def _extend(self, request: Request, wanted: int, draft: StepDraft) -> None:
        """Plans `wanted` tokens of a running request, or as many as the budget allows, preempting others
        where blocks lack."""
        granted = draft.budget.grant(wanted)
        if not granted:
            return
        try:
            new_block_ids = self._reserve(request, request.computed + granted, draft)
            if new_block_ids is None:
                draft.budget.refund(granted)
            else:
                draft.add(request, granted, new_block_ids)
        except Exception:
            draft.remove(request)
            self._fault(request)

    def _reserve(self, request: Request, total_tokens: int, draft: StepDraft) -> tuple[int, ...] | None:
        """Reserves blocks at the cost of the last in order; None where that was the request itself."""
        while (new_block_ids := self.kv.reserve(request, total_tokens)) is None:
            victim = self.roster.running[-1]
            if victim is self.roster.running[0]:
                raise AssertionError(f"the pool cannot hold the first request alone: {request}")
            draft.remove(victim)
            draft.preempted = True
            self._preempt(victim)
            if victim is request:
                return None
        return new_block_ids

    def _launch(self, draft: StepDraft) -> StepPlan | None:
        """Makes the plan final: from here on nobody can be taken out of it."""
        planned = draft.planned()
        if not planned:
            return None
        copies = [copy for request in draft.starts if (copy := self.kv.take_copy(request))]
        for part in planned:
            if part.request.followers and part.request.computed >= part.request.prompt_len:
                self.roster.fork(part.request)
        self.steps += 1
        self.tally.launched(self._config.max_num_batched_tokens - draft.budget.left, len(planned))
        sequences = tuple([part.sequence for part in planned])
        starts = tuple(draft.starts.values())
        plan = StepPlan(self.steps, sequences, starts, tuple(copies), draft.constrained)
        self._in_flight.append((plan, planned))
        return plan

    def _owed(self, request: Request) -> int:
        return blocks_for(request.known, self.kv.block_size) - len(request.block_ids) + len(request.followers)

    # ---- results

    def _see(
        self,
        request: Request,
        sequence: SequencePlan,
        token_id: int | None,
        logprob: TokenLogprob | None,
    ) -> None:
        """Takes in what a step brought to a request that is still the one it was planned for."""
        if token_id is None:
            if request.max_output == 0 and sequence.start + sequence.num_tokens == request.prompt_len:
                self._end_prompt(request)
            return
        request.in_flight -= 1
        if token_id < 0:
            why = NOTHING_ALLOWED if token_id == NOTHING_LEFT else NOT_FINITE
            self._end(request, FinishReason.ERROR, error=why)
            return
        request.token_ids.append(token_id)
        if request.matcher is not None:
            request.matcher.take(token_id)
        self._confirm(request, sequence.start + sequence.num_tokens)
        ending = self._stops.ending(request, token_id)
        complete = request.matcher is not None and request.matcher.ended
        if ending is not None and (ending.reason is FinishReason.STOP or not complete):
            self._end(request, ending.reason, token_id, ending.stop_reason, logprob)
            return
        self._ledger.token(request, token_id, logprob)
        if complete:  # unlike a stop token, the last one is part of the text
            self._end(request, FinishReason.STOP)

    def _confirm(self, request: Request, tokens: int) -> None:
        """A finite result vouches for all it attended to: only now may others find these blocks."""
        request.confirmed = tokens
        self.kv.commit(request)

    def _end_prompt(self, request: Request) -> None:
        """The prompt is computed, and nothing follows it."""
        if request.params.pooling is None:
            self._end(request, FinishReason.LENGTH)
        elif request.embedding is None:
            self._end(request, FinishReason.ERROR, error=NOT_FINITE)
        else:
            self._confirm(request, request.prompt_len)
            self._end(request, FinishReason.STOP)

    # ---- leaving

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        token_id: int | None = None,
        stop_reason: int | None = None,
        logprob: TokenLogprob | None = None,
        error: str | None = None,
    ) -> None:
        """Ends a choice wherever it is: running, in the queue, or behind its leader."""
        self.roster.leave(request, self._ledger.choices(request.request_id))
        self._ledger.end(
            request, reason, token_id=token_id, stop_reason=stop_reason, logprob=logprob, error=error
        )

    def _fault(self, request: Request) -> None:
        """An exception while one request was handled ends that request, with those that wait for it."""
        logger.exception("request %s failed", request.request_id)
        for choice in (*request.followers, request):
            self._end(choice, FinishReason.ERROR, error=FAULT)

    def _preempt(self, request: Request) -> None:
        self.roster.preempt(request)
        self.tally.preemptions += 1

    def _end_without_output(self, leader: Request) -> None:
        """max_tokens 0: but for what the prompt itself is computed for, there is nothing to do."""
        if leader.explain:
            report = self.kv.explain(leader, self.kv.match(leader))
            for choice in (leader, *leader.followers):
                choice.report = report
        for follower in tuple(leader.followers):
            self._end(follower, FinishReason.LENGTH)
        if not leader.only_prompt:
            self._end(leader, FinishReason.LENGTH)

    def _account(self, request: Request, hit: PrefixHit) -> None:
        """Counts what is about to be admitted, and explains it while it is as it was found."""
        if request.preemptions:
            self.tally.readmitted(request, hit.tokens)
            return
        report = self.kv.account(request, hit)
        if request.explain:
            request.report = report
        request.cached_tokens = hit.tokens
        self.tally.admitted(request, hit.tokens)
