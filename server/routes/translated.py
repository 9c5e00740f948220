"""The way of APIs that are served in the words of the chat API: only what is read and written differs."""

from __future__ import annotations

from collections.abc import Sequence

from server.generation import Generation
from server.render import Choice
from server.render_pieces import PiecesChoice
from server.routes.chat import ChatApi
from server.routes.common import check_model, conversation
from server.schema.chat import ChatRequest
from server.schema.common import WireModel
from server.translate import Translated, naming


class TranslatedApi(ChatApi):
    """One such API."""

    def sent(self, request: ChatRequest) -> WireModel:
        assert isinstance(request, Translated)
        source: WireModel = request.source
        return source

    async def prompt_tokens(self, request: ChatRequest) -> int:
        """How many tokens the request's prompt has. Runs nothing.

        Raises:
            ApiError, QuireError: to be written by the app's handlers.
        """
        with naming(self.names):
            check_model(self.service, request.model)
            prompt = await conversation(self.service, request.messages, request, locate=False)
        return len(prompt.ids)

    def choices(self, request: ChatRequest, generation: Generation) -> Sequence[Choice]:
        return [PiecesChoice(reader) for reader in self.readers(request, generation)]
