"""What the log says of a request: one line when it has been answered, one more if it generated something.

Knows trails and words; what was asked and answered is never written, unless somebody started the server with
--log-prompts.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from server.generation import Generation
from server.log import duration, milliseconds
from server.prompts import Tokenizer
from server.trail import Trail, joined

access_logger = logging.getLogger("quire.access")
request_logger = logging.getLogger("quire.request")
prompt_logger = logging.getLogger("quire.prompt")

# Of each prompt, with --log-prompts.
MAX_PROMPT_CHARS = 1000
MAX_PROMPT_TOKENS = 1000
_MAX_NUMBERS = 8
_HARMLESS_PATH = re.compile(r"[\w/.~:@%+,=-]+", re.ASCII)


def _shown(path: str) -> str:
    """In quotes where it is not plainly a path: nothing in it can pass for the rest of the line."""
    return path if _HARMLESS_PATH.fullmatch(path) else json.dumps(path)


def access(trail: Trail) -> None:
    """One answered request."""
    if not access_logger.isEnabledFor(logging.INFO):
        return
    fields: dict[str, Any] = {
        "request_id": trail.request_id,
        "client": trail.client,
        "method": trail.method,
        "path": trail.path,
        "status": trail.status,
        "duration_ms": milliseconds(trail.seconds),
    }
    if trail.tenant:
        fields["tenant"] = trail.tenant
    if trail.error:
        fields["error"] = trail.error
    access_logger.info(
        "%s %s %s %d %s%s %s",
        trail.client,
        trail.method,
        _shown(trail.path),
        trail.status,
        duration(trail.seconds),
        f" {trail.error}" if trail.error else "",
        trail.request_id,
        extra={"fields": fields},
    )


def finished(trail: Trail, generation: Generation, trace_id: str = "") -> None:
    """One request that was in the engine, with its counts and times; a warning if we failed it."""
    level = logging.WARNING if trail.server_failed else logging.INFO
    if not request_logger.isEnabledFor(level):
        return
    timeline = generation.timeline
    reason = joined(timeline.finish_reasons)
    queued_s = timeline.queued_s
    first_s = None if timeline.first_s is None else timeline.first_s - trail.started_s
    fields: dict[str, Any] = {
        "request_id": trail.request_id,
        "id": generation.id,
        "engine_requests": generation.engine_numbers[:_MAX_NUMBERS],
        "api": trail.api,
        "tenant": trail.tenant,
        "stream": trail.stream,
        "prompts": len(generation.prompts),
        "choices": len(generation.prompts) * generation.params.n,
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "completion_tokens": generation.completion_tokens,
        "finish_reason": reason or None,
        "queue_ms": None if queued_s is None else milliseconds(queued_s),
        "ttft_ms": None if first_s is None else milliseconds(first_s),
        "duration_ms": milliseconds(trail.seconds),
    }
    if trail.error:
        fields["error"] = trail.error
    if trace_id:
        fields["trace_id"] = trace_id
    parts = [f"{generation.prompt_tokens} prompt tokens ({generation.cached_tokens} cached)"]
    parts.append(f"{generation.completion_tokens} generated")
    if queued_s is not None:
        parts.append(f"queued {duration(queued_s)}")
    if first_s is not None:
        parts.append(f"first token after {duration(first_s)}")
    parts.append(f"{duration(trail.seconds)} in all")
    if trail.tenant not in ("", "default"):
        parts.append(f"tenant {trail.tenant}")
    parts.append(trail.request_id)
    request_logger.log(
        level,
        "%s %s: %s",
        generation.id,
        trail.error or reason or "ended",
        ", ".join(parts),
        extra={"fields": fields},
    )


def prompts(generation: Generation, tokenizer: Tokenizer) -> None:
    """The beginning of each prompt, as the model sees it. Only where the operator asked for this."""
    for position, prompt in enumerate(generation.prompts):
        ids = list(prompt.ids[:MAX_PROMPT_TOKENS])
        text = tokenizer.decode(ids)[:MAX_PROMPT_CHARS]
        more = len(prompt.ids) > len(ids) or len(text) == MAX_PROMPT_CHARS
        prompt_logger.info(
            "%s prompt %d: %s%s",
            generation.id,
            position,
            json.dumps(text, ensure_ascii=False),
            " ..." if more else "",
            extra={"fields": {"id": generation.id, "prompt": position, "text": text, "cut": more}},
        )
