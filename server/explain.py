"""CacheReport -> what a caller is told: figures, one plain sentence, and both texts where two prompts part.

Knows reasons and words; does not know how the cache looks things up, nor HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.views import CacheReport, EvictionCause, MissReason
from server.prompts import Prompt, Tokenizer
from server.spans import MessageSpan

MAX_TEXT_CHARS = 400

_CAUSES = {
    EvictionCause.CAPACITY: "because its block was needed for other tokens",
    EvictionCause.RESET: "when the cache was reset",
    EvictionCause.RECLAIMED: "when the last request that used it wrote on in its block",
}


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explains one model's reports."""

    tokenizer: Tokenizer
    block_size: int

    def reports(
        self, prompts: Sequence[Prompt], reports: Sequence[CacheReport | None]
    ) -> list[dict[str, Any]]:
        """One entry for each prompt that has a report, in order."""
        return [
            self.report(position, prompt, report)
            for position, (prompt, report) in enumerate(zip(prompts, reports, strict=True))
            if report is not None
        ]

    def report(self, position: int, prompt: Prompt, report: CacheReport) -> dict[str, Any]:
        ago_s = report.evicted_s
        cached_text, prompt_text = self._texts(prompt.ids, report)
        return {
            "prompt": position,
            "prompt_tokens": report.prompt_tokens,
            "reused_tokens": report.reused_tokens,
            "computed_tokens": report.prompt_tokens - report.reused_tokens,
            "block_size": self.block_size,
            "reason": report.reason,
            "at_token": report.at_token,
            "message": sentence(report, self.block_size),
            "evicted_seconds_ago": None if ago_s is None else round(max(0.0, ago_s), 3),
            "eviction_cause": report.eviction_cause,
            "cached_text": cached_text,
            "prompt_text": prompt_text,
            "messages": _messages(prompt.messages, report.reused_tokens),
        }

    def _texts(self, ids: Sequence[int], report: CacheReport) -> tuple[str | None, str | None]:
        """Both sides around the place where they part; neither where the other side is not the caller's."""
        if not report.cached_ids:
            return None, None
        start = report.context_start
        ours = ids[start : start + len(report.cached_ids)]
        return self._text(report.cached_ids), self._text(ours)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)[:MAX_TEXT_CHARS]


def sentence(report: CacheReport, block_size: int) -> str:
    """Why the reuse ended where it did, in one sentence with the numbers."""
    whole, reused, at = report.prompt_tokens, report.reused_tokens, report.at_token
    left = whole - reused
    head = f"{reused} of {_tokens(whole)} {'is' if reused == 1 else 'are'} in the cache"
    match report.reason:
        case MissReason.PARTIAL_BLOCK:
            rest = f"the other {left} do not fill a block of {block_size}, and only full blocks are shared"
        case MissReason.LAST_TOKEN:
            head = f"All {_tokens(whole)} are in the cache"
            rest = (
                f"the last {left} are computed again, because the answer begins with the last token's result"
            )
        case MissReason.NEVER_SEEN:
            rest = f"what follows from token {at} on was never computed"
            if report.memory_full:
                rest += ", or so long ago that its eviction is forgotten"
        case MissReason.EVICTED:
            cause = _CAUSES.get(report.eviction_cause or EvictionCause.CAPACITY, "")
            rest = f"what follows from token {at} on was evicted {_ago(report.evicted_s)}, {cause}"
        case MissReason.DIVERGED:
            rest = f"what is cached goes on differently from token {at} on"
        case MissReason.OTHER_SALT:
            rest = f"what follows from token {at} on is cached under another cache_salt only"
        case MissReason.IN_PROGRESS:
            rest = f"what follows from token {at} on is being computed by another request at this moment"
        case MissReason.PROMPT_LOGPROBS:
            return (
                f"None of {_tokens(whole)} is reused, because the prompt's log probabilities were asked for."
            )
        case MissReason.POOLING:
            return f"None of {_tokens(whole)} is reused, because its embedding is made of all of them."
        case MissReason.CACHING_OFF:
            return f"None of {_tokens(whole)} is reused, because this server runs without prefix caching."
    return f"{head}; {rest}."


def _tokens(count: int) -> str:
    return f"{count} prompt token{'' if count == 1 else 's'}"


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return "earlier"
    if seconds < 60:
        return f"{seconds:.1f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 7200 else f"{seconds / 3600:.0f} h ago"


def _messages(spans: Sequence[MessageSpan] | None, reused: int) -> list[dict[str, Any]] | None:
    if spans is None:
        return None
    return [
        {
            "role": span.role,
            "tokens": span.end - span.start,
            "reused_tokens": max(0, min(span.end, reused) - span.start),
        }
        for span in spans
    ]
