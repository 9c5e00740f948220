"""What the log says of a request: one line, when it has been answered.

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
prompt_logger = logging.getLogger("quire.prompt")

# Of each prompt, with --log-prompts.
MAX_PROMPT_CHARS = 1000
MAX_PROMPT_TOKENS = 1000
_MAX_NUMBERS = 8
_WORTH_TELLING_S = 0.001
_HARMLESS_PATH = re.compile(r"[\w/.~:@%+,=-]+", re.ASCII)


def _shown(path: str) -> str:
    """In quotes where it is not plainly a path: nothing in it can pass for the rest of the line."""
    return path if _HARMLESS_PATH.fullmatch(path) else json.dumps(path)


def answered(trail: Trail, trace_id: str = "") -> None:
    """One answered request, with counts and times if it was in the engine; a warning if we failed it."""
    level = logging.WARNING if trail.server_failed else logging.INFO
    if not access_logger.isEnabledFor(level):
        return
    fields = _fields(trail)
    parts = [
        f"{trail.client} {trail.method} {_shown(trail.path)} {trail.status} {duration(trail.seconds)}"
        + (f" {trail.error}" if trail.error else "")
    ]
    ids = trail.request_id
    if trail.generation is not None:
        fields |= _generation_fields(trail, trail.generation)
        parts.append(_outcome(trail, trail.generation))
        ids += f" {trail.generation.id}"
        if trail.server_failed:
            ids += f" (engine: {', '.join(trail.generation.engine_numbers[:_MAX_NUMBERS])})"
    if trace_id:
        fields["trace_id"] = trace_id
    if trail.tenant not in ("", "default"):
        parts.append(trail.tenant)
    access_logger.log(level, "%s", " | ".join([*parts, ids]), extra={"fields": fields})


def _fields(trail: Trail) -> dict[str, Any]:
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
    return fields


def _generation_fields(trail: Trail, generation: Generation) -> dict[str, Any]:
    timeline, priority = generation.timeline, generation.params.priority
    return {
        "id": generation.id,
        "engine_requests": generation.engine_numbers[:_MAX_NUMBERS],
        "api": trail.api,
        "stream": trail.stream,
        **({"priority": priority} if priority else {}),
        "prompts": len(generation.prompts),
        "choices": len(generation.prompts) * generation.params.n,
        "prompt_tokens": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "completion_tokens": generation.completion_tokens,
        "finish_reason": joined(timeline.finish_reasons) or None,
        "queue_ms": None if timeline.queued_s is None else milliseconds(timeline.queued_s),
        "ttft_ms": None if timeline.first_s is None else milliseconds(timeline.first_s - trail.started_s),
    }


def _outcome(trail: Trail, generation: Generation) -> str:
    timeline = generation.timeline
    parts = [
        f"{generation.prompt_tokens} prompt tokens ({generation.cached_tokens} cached)",
        f"{generation.completion_tokens} generated",
    ]
    if timeline.queued_s is not None and timeline.queued_s >= _WORTH_TELLING_S:
        parts.append(f"queued {duration(timeline.queued_s)}")
    if timeline.first_s is not None:
        parts.append(f"first after {duration(timeline.first_s - trail.started_s)}")
    if timeline.finish_reasons:
        parts.append(joined(timeline.finish_reasons))
    return ", ".join(parts)


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
