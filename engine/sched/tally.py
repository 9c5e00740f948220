"""What requests waited for and what they used: counted, timed, and by tenant. It decides nothing.

              arrival         first admission        first token             end
    request      |---- queue ----|------ prefill ------|------- decode -------|

Queue and prefill are a request's, told once by the choice that computes its prompt; decode is each choice's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from engine.kv.facts import BlockFacts
from engine.request import Account, Request
from engine.stats import BUCKETS, Histogram
from engine.types import FinishReason, StepRun
from engine.views import HistogramData, TenantUse

_HISTOGRAMS = ("queue_s", "prefill_s", "decode_s", "step_s", "step_tokens", "step_sequences")


class Tally:
    """Told by the scheduler at the few turns of a request's life, and once per step.

    Args:
        clock: seconds from any moment on, never backwards.

    Attributes:
        now_s: the time of the last tick, since the start.
        accounts: by tenant.
        preemptions, recomputed_tokens: and what the former cost.
        finished: choices, by how they ended.
        runs: steps seen, by how they ran.
        busy_s: spent in steps.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start_s = clock()
        self.now_s = 0.0
        self.accounts: dict[str, Account] = {}
        self.preemptions = 0
        self.recomputed_tokens = 0
        self.finished = {reason.value: 0 for reason in FinishReason}
        self.runs = {run.value: 0 for run in StepRun}
        self.busy_s = 0.0
        self._histograms = {name: Histogram(BUCKETS[name]) for name in _HISTOGRAMS}
        self._queue_s, self._prefill_s, self._decode_s, *of_steps = self._histograms.values()
        self._step_s, self._step_tokens, self._step_sequences = of_steps

    def tick(self) -> float:
        """Looks at the clock; whatever is told until the next tick happened then."""
        self.now_s = self._clock() - self._start_s
        return self.now_s

    # ---- requests

    def arrived(self, leader: Request) -> None:
        account = self.accounts.get(leader.scope.tenant)
        if account is None:
            account = self.accounts[leader.scope.tenant] = Account()
        for choice in (leader, *leader.followers):
            choice.account = account
            choice.arrival_s = self.now_s
            account.live += 1

    def admitted(self, request: Request, hit_tokens: int) -> None:
        """For the first time. See `readmitted`."""
        request.admitted_s = self.now_s
        self._queue_s.observe(self.now_s - request.arrival_s)
        account = request.account
        account.requests += 1
        account.prompt_tokens += request.prompt_len
        account.hit_tokens += hit_tokens

    def readmitted(self, request: Request, hit_tokens: int) -> None:
        """After a preemption."""
        self.recomputed_tokens += max(request.lost_tokens - hit_tokens, 0)

    def first_token(self, request: Request) -> None:
        request.first_token_s = self.now_s
        if request.admitted_s is not None:
            self._prefill_s.observe(self.now_s - request.admitted_s)

    def ended(self, request: Request, reason: FinishReason) -> None:
        request.account.live -= 1
        self.finished[reason.value] += 1
        if request.first_token_s is not None:
            self._decode_s.observe(self.now_s - request.first_token_s)

    # ---- steps

    def launched(self, tokens: int, sequences: int) -> None:
        self._step_tokens.observe(tokens)
        self._step_sequences.observe(sequences)

    def stepped(self, began_s: float, *, worked: bool) -> None:
        """A step of the engine is over. `worked`: something was launched or seen in it."""
        taken_s = self.tick() - began_s
        self.busy_s += taken_s
        if worked:
            self._step_s.observe(taken_s)

    # ---- telling

    @property
    def prompt_tokens(self) -> int:
        return sum(account.prompt_tokens for account in self.accounts.values())

    @property
    def generated_tokens(self) -> int:
        return sum(account.generated_tokens for account in self.accounts.values())

    def histograms(self) -> dict[str, HistogramData]:
        return {name: histogram.data() for name, histogram in self._histograms.items()}

    def tenants(self, running: Iterable[Request], facts: BlockFacts) -> dict[str, TenantUse]:
        """What each tenant has now and had since the start."""
        runs = Counter(request.scope.tenant for request in running)
        uses = {}
        for name, account in self.accounts.items():
            index = facts.tenant(name)
            uses[name] = TenantUse(
                blocks_in_use=facts.in_use[index],
                blocks_cached=facts.cached[index],
                running=runs[name],
                waiting=account.live - runs[name],
                requests=account.requests,
                prompt_tokens=account.prompt_tokens,
                hit_tokens=account.hit_tokens,
                generated_tokens=account.generated_tokens,
            )
        return uses
