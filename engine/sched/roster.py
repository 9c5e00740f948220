"""Where each live choice is, and what it holds there: a row and blocks. It knows no tokens and no steps.

             begin                         leave
waiting ----------------> running -----------------------> gone
   ^                       |   ^
   +------- preempt -------+   | fork
                               behind its leader (a row is kept for it)
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from engine.kv.manager import KVManager, PrefixHit
from engine.request import Request, Status
from engine.sched.queue import Queue, by_order


class Roster:
    """Moves choices between places; rows and blocks move with them.

    Attributes:
        running, waiting: in the requests' order. Followers that were never forked are behind their leader.
    """

    def __init__(self, num_rows: int, kv: KVManager) -> None:
        self.running: list[Request] = []
        self.waiting = Queue()
        self._kv = kv
        self._free_rows = list(range(num_rows - 1, -1, -1))

    def has_rows(self, leader: Request) -> bool:
        """Whether there is a row for each choice of the group."""
        return len(self._free_rows) > len(leader.followers)

    def begin(self, leader: Request, hit: PrefixHit) -> None:
        """Moves a request from the queue to the running ones, with blocks of its prefix hit."""
        leader.adopting = not self._kv.adopt(leader, hit)
        self.waiting.remove(leader)
        for choice in (leader, *leader.followers):
            choice.row = self._free_rows.pop()
        leader.status = Status.RUNNING
        insort(self.running, leader, key=by_order)

    def fork(self, leader: Request) -> None:
        """The leader's prompt is as good as computed: its followers run from the next step on."""
        for follower in leader.followers:
            self._kv.fork(leader, follower)
            follower.cached_tokens = leader.cached_tokens
            follower.report = leader.report
            follower.status = Status.RUNNING
            insort(self.running, follower, key=by_order)
        leader.followers = []

    def preempt(self, request: Request) -> None:
        """Takes everything from a running request but its tokens, and puts it back into the queue."""
        self.running.remove(request)
        self._vacate(request)
        request.status = Status.WAITING
        request.lost_tokens = request.computed
        request.computed = request.confirmed = request.in_flight = 0
        if request.prompt_logprobs is not None:
            request.prompt_logprobs = [None]
        request.preemptions += 1
        self.waiting.push(request)

    def leave(self, request: Request, group: Iterable[Request]) -> None:
        """Takes a choice out, wherever it is.

        Args:
            group: the live choices of its request, among them the leader it may wait for.
        """
        leader = next((choice for choice in group if request in choice.followers), None)
        if request.status is Status.RUNNING:
            self.running.remove(request)
        elif leader is not None:
            leader.followers.remove(request)
        else:
            self.waiting.remove(request)
        self._vacate(request)
        request.status = Status.FINISHED

    def _vacate(self, request: Request) -> None:
        """Gives blocks and rows back, also the rows kept for followers not forked yet."""
        self._kv.release(request)
        for choice in (request, *request.followers):
            if choice.row >= 0:
                self._free_rows.append(choice.row)
                choice.row = -1
        request.started = request.adopting = False


def expendable(choice: Request) -> Request:
    """Returns the object to drop in order to end a choice.

    While a leader computes the prompt for others, the work is the group's: it goes on under a follower's
    name and seed, and the follower's object ends in its place.
    """
    if not choice.followers:
        return choice
    heir = choice.followers[0]
    choice.index, heir.index = heir.index, choice.index
    choice.seed, heir.seed = heir.seed, choice.seed
    choice.started = False  # the executor learns the new seed with the next step
    return heir
