"""What the cache counts. Nothing here is read to decide anything."""

from __future__ import annotations

from collections.abc import Sequence

from engine.stats import BUCKETS, Histogram
from engine.views import WHATIF_SIZES, CacheReport, EvictionCause, MissReason

WHATIF_KEYS = tuple(f"{size:g}" for size in WHATIF_SIZES)
NOT_ASKED = (MissReason.CACHING_OFF, MissReason.PROMPT_LOGPROBS, MissReason.POOLING)


class CacheCounts:
    """Of all first admissions; all reasons, causes and sizes are there from the start.

    Attributes:
        prefix_queries, prefix_query_tokens: requests that read the cache, and their prompts' tokens.
        prefix_hits, prefix_hit_tokens: those that found something, and how much.
        misses, miss_tokens: requests and tokens not reused, by reason; those that did not read it too.
        whatif_hit_tokens: what pools of other sizes would have had of `prefix_query_tokens`.
        evicted: blocks whose content was given up, by cause.
        hit_ratio: the share of its prompt each request that read the cache found.
    """

    def __init__(self) -> None:
        self.prefix_queries = 0
        self.prefix_hits = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self.misses = {str(reason): 0 for reason in MissReason}
        self.miss_tokens = {str(reason): 0 for reason in MissReason}
        self.whatif_hit_tokens = dict.fromkeys(WHATIF_KEYS, 0)
        self.evicted = {str(cause): 0 for cause in EvictionCause}
        self.hit_ratio = Histogram(BUCKETS["hit_ratio"])

    def count(self, report: CacheReport) -> None:
        """Counts one admission."""
        prompt, reused = report.prompt_tokens, report.reused_tokens
        self.misses[report.reason] += 1
        self.miss_tokens[report.reason] += prompt - reused
        if report.reason in NOT_ASKED:
            return
        self.prefix_queries += 1
        self.prefix_query_tokens += prompt
        self.prefix_hits += reused > 0
        self.prefix_hit_tokens += reused
        self.hit_ratio.observe(reused / prompt if prompt else 0.0)

    def count_whatif(self, hit_tokens: Sequence[int]) -> None:
        """Counts what a pool of each size would have had."""
        for size, tokens in zip(WHATIF_KEYS, hit_tokens, strict=True):
            self.whatif_hit_tokens[size] += tokens
