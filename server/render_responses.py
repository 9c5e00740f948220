"""Pieces -> the Responses API's objects and stream events."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.types import FinishReason
from server import response_items as items
from server.errors import SERVER, ApiError
from server.generation import Generation
from server.parsing.message import Call
from server.parsing.pieces import CallArguments, CallBroken, CallEnd, CallStart, Content, Piece, Reasoning
from server.render import Fields, Head, named_event
from server.render_pieces import PiecesChoice, PiecesStream, Reader
from server.schema.responses import ResponsesRequest

Finished = Callable[[Fields], None]


class Sheet:
    """One response: what it repeats of its request, and what changes while it is made."""

    def __init__(self, head: Head, generation: Generation, request: ResponsesRequest, reader: Reader) -> None:
        self._generation = generation
        self._reader = reader
        params = generation.params
        self._fixed: Fields = {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "model": head.model,
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": request.reasoning.effort if request.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": params.temperature,
            "text": {"format": _format(request)},
            "tool_choice": request.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_logprobs": 0,
            "top_p": params.top_p,
            "truncation": "disabled",
        }

    def now(self, status: str, output: Sequence[Fields], error: Fields | None = None) -> Fields:
        """The response with this status."""
        cut = {"reason": "max_output_tokens"} if status == items.INCOMPLETE else None
        found = {
            **self._fixed,
            "status": status,
            "completed_at": int(time.time()) if status == items.COMPLETED else None,
            "error": error,
            "incomplete_details": cut,
            "output": list(output),
        }
        return found if status == items.IN_PROGRESS else {**found, "usage": self._usage()}

    def _usage(self) -> Fields:
        generation = self._generation
        return {
            "input_tokens": generation.prompt_tokens,
            "input_tokens_details": {"cached_tokens": generation.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": generation.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reader.reasoning_tokens},
            "total_tokens": generation.prompt_tokens + generation.completion_tokens,
        }


def _format(request: ResponsesRequest) -> Fields:
    if request.text is None or request.text.format is None:
        return {"type": "text"}
    return request.text.format.model_dump(by_alias=True, exclude_none=True)


def whole(sheet: Sheet, choice: PiecesChoice) -> Fields:
    """A response that was not streamed."""
    said = choice.message
    status = items.INCOMPLETE if choice.last.finish_reason is FinishReason.LENGTH else items.COMPLETED
    output = [items.reasoning(said.reasoning)] if said.reasoning else []
    output += [items.message(said.content)] if said.content else []
    output += [items.function_call(call) for call in said.calls]
    if output:
        output[-1]["status"] = status
    return sheet.now(status, output)


class ResponseStream(PiecesStream):
    """response.created, items one after another, response.completed; each event with its number.

    Args:
        finished: told of the response as it is at the end, whatever the end is.
    """

    def __init__(self, sheet: Sheet, generation: Generation, reader: Reader, finished: Finished) -> None:
        super().__init__(reader)
        self.generation = generation
        self._sheet = sheet
        self._finished = finished
        self._number = 0
        self._output: list[Fields] = []
        self._open: Fields | None = None  # the item that is being written, the last of the output
        self._texts: list[str] = []

    def current(self) -> Fields:
        """The response as it is while it is made."""
        return self._sheet.now(items.IN_PROGRESS, self._output[: -1 if self._open else None])

    def begin(self) -> bytes:
        response = self.current()
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def piece(self, piece: Piece) -> bytes:
        match piece:
            case Content(text):
                return self._within("message") + self._delta("response.output_text.delta", text, logprobs=[])
            case Reasoning(text):
                return self._within("reasoning") + self._delta("response.reasoning_text.delta", text)
            case CallStart(_, identity, name):
                call = items.function_call(Call(identity, name, ""), items.IN_PROGRESS)
                return self._close() + self._add(call)
            case CallArguments(_, text):
                self._texts.append(text)
                return self._at("response.function_call_arguments.delta", delta=text)
            case CallEnd():
                return self._close()
            case CallBroken():
                return self._close(items.INCOMPLETE)

    def end(self) -> bytes:
        if self.last is None:
            return self._stop("response.failed", "cancelled")
        if self.cut_off:
            return self._stop("response.incomplete", items.INCOMPLETE)
        return self._stop("response.completed", items.COMPLETED)

    def failed(self, error: ApiError) -> bytes:
        return self._stop("response.failed", "failed", {"code": SERVER, "message": error.message})

    def _stop(self, event: str, status: str, error: Fields | None = None) -> bytes:
        closing = self._close(items.COMPLETED if status == items.COMPLETED else items.INCOMPLETE)
        response = self._sheet.now(status, self._output, error)
        self._finished(response)
        return closing + self._event(event, response=response)

    def _within(self, kind: str) -> bytes:
        """Makes sure that an item of this type is open."""
        if self._open is not None and self._open["type"] == kind:
            return b""
        before = self._close()
        item = (items.message if kind == "message" else items.reasoning)("", items.IN_PROGRESS)
        (part,) = item["content"]
        added = self._add({**item, "content": []})
        return before + added + self._at("response.content_part.added", content_index=0, part=part)

    def _add(self, item: Fields) -> bytes:
        self._open = item
        self._texts = []
        self._output.append(item)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _delta(self, event: str, text: str, **fields: Any) -> bytes:
        self._texts.append(text)
        return self._at(event, content_index=0, delta=text, **fields)

    def _close(self, status: str = items.COMPLETED) -> bytes:
        """Ends the open item, if there is one."""
        item, text = self._open, "".join(self._texts)
        if item is None:
            return b""
        done = {**item, "status": status}
        if item["type"] == "function_call":
            done["arguments"] = text
            frames = b""
            if status == items.COMPLETED:
                frames = self._at("response.function_call_arguments.done", name=item["name"], arguments=text)
        else:
            frames = self._end_part(done, text)
        self._output[-1] = done
        self._open = None
        return frames + self._event(
            "response.output_item.done", output_index=len(self._output) - 1, item=done
        )

    def _end_part(self, done: Fields, text: str) -> bytes:
        if done["type"] == "message":
            part = items.output_text(text)
            frames = self._at("response.output_text.done", content_index=0, text=text, logprobs=[])
        else:
            part = items.reasoning_text(text)
            frames = self._at("response.reasoning_text.done", content_index=0, text=text)
        done["content"] = [part]
        return frames + self._at("response.content_part.done", content_index=0, part=part)

    def _at(self, event: str, **fields: Any) -> bytes:
        """An event about the open item."""
        assert self._open is not None
        place: Mapping[str, Any] = {"item_id": self._open["id"], "output_index": len(self._output) - 1}
        return self._event(event, **place, **fields)

    def _event(self, event: str, **fields: Any) -> bytes:
        number = self._number
        self._number += 1
        return named_event(event, {"type": event, "sequence_number": number, **fields})
