"""A request as the scheduler sees it: token ids and a few counts. It knows no text and no tensors.

                      admit                    prompt computed
    WAITING ----------------------> RUNNING ------------------> RUNNING (decoding)
       ^                              |  |
       |          preempt             |  |  stop, length, abort, error
       +------------------------------+  +-------------------------------> FINISHED

One rule instead of two phases: each step gives tokens until `computed == known`.

    0            cached         computed            len(token_ids)     known
    |--------------|---------------|---------------------|---------------|
     prefix hit      given to steps    still to compute     sampled, not yet seen (in flight)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum, auto, unique

from engine.types import SamplingParams, TokenLogprob


@unique
class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Request:
    """One choice of one submitted request. Owned by the scheduler; nothing else changes it.

    Attributes:
        token_ids: prompt, then every token sampled and seen.
        computed: tokens whose keys and values are in blocks, or will be once the steps in flight end.
        in_flight: tokens sampled by a step whose result has not been seen.
        block_ids: the page table. Owned by the KVManager, kept here because it lives as long.
        num_hashed_blocks: leading blocks whose content is in the prefix cache. KVManager's.
        row: the executor's row while running, else -1.
        followers: on the first choice, the others that wait for its prompt to be computed.
    """

    __slots__ = (
        "arrival_s", "block_ids", "cached_tokens", "computed", "copy_source", "followers", "in_flight",
        "index", "last_hash", "num_hashed_blocks", "params", "preemptions", "prompt_len",
        "prompt_logprobs", "request_id", "row", "salt", "seed", "status", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        seed: int = 0,
        salt: bytes = b"",
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.params = params
        self.seed = seed
        self.salt = salt
        self.token_ids: list[int] = list(prompt_ids)
        self.prompt_len = len(self.token_ids)
        self.status = Status.WAITING
        self.computed = 0
        self.in_flight = 0
        self.cached_tokens = 0
        self.block_ids: list[int] = []
        self.num_hashed_blocks = 0
        self.last_hash = b""
        self.copy_source: int | None = None  # a shared tail block to copy before the first write
        self.row = -1
        self.followers: list[Request] = []
        self.prompt_logprobs: list[TokenLogprob | None] = []
        self.preemptions = 0
        self.arrival_s = time.monotonic()

    @property
    def known(self) -> int:
        """Tokens that exist, seen or still in flight."""
        return len(self.token_ids) + self.in_flight

    @property
    def remaining(self) -> int:
        """Tokens still to be computed."""
        return self.known - self.computed

    @property
    def num_output(self) -> int:
        """Tokens generated and seen."""
        return len(self.token_ids) - self.prompt_len
