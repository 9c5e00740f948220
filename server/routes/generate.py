"""How all generation routes answer: a whole reply or a stream. The way there is api.py's."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from server.generation import Generation
from server.render import Choice, Common, ExplainedChunks, Fields, Frames, Head, Usage
from server.routes.api import Api
from server.routes.common import explainer
from server.schema.common import RequestT
from server.streaming import EventStream, collect
from server.token_ids import TokenIdChunks


class GenerationApi(Api[RequestT]):
    """One generation API."""

    prompt_ids_per_choice: ClassVar = False  # where replies say them

    @abstractmethod
    def chunks(self, request: RequestT, generation: Generation) -> Frames: ...

    def choices(self, request: RequestT, generation: Generation) -> Sequence[Choice]:
        """What a whole reply is collected in."""
        return [Choice(index) for index in range(len(generation.prompts) * generation.params.n)]

    @abstractmethod
    def reply(self, request: RequestT, generation: Generation, choices: Sequence[Choice]) -> Fields: ...

    def head(self, generation: Generation) -> Head:
        """Made when the reply begins."""
        return Head(generation.id, int(time.time()), self.service.model_name, self.service.fingerprint)

    def common(self, request: RequestT, generation: Generation, usage: Usage) -> Common:
        return Common(self.head(generation), usage, request.usage_in_stream, self.service.tokenizer)

    async def answer(
        self, request: RequestT, generation: Generation, http: Request, headers: dict[str, str]
    ) -> Response:
        if request.stream:
            return EventStream(self.service, generation, self._stream(request, generation), headers)
        choices = self.choices(request, generation)
        await collect(self.service, generation, http.receive, choices)
        return self.whole(generation, self.reply(request, generation, choices), headers)

    def _stream(self, request: RequestT, generation: Generation) -> Frames:
        chunks = self.chunks(request, generation)
        if request.return_token_ids:
            prompts, n = [prompt.ids for prompt in generation.prompts], generation.params.n
            chunks = TokenIdChunks(chunks, prompts, n, per_choice=self.prompt_ids_per_choice)
        if not generation.explains:
            return chunks
        explain = explainer(self.service)

        def report(position: int) -> Mapping[str, Any] | None:
            found = generation.reports[position]
            return None if found is None else explain.report(position, generation.prompts[position], found)

        return ExplainedChunks(chunks, generation.params.n, report)
