"""Text to token ids and back. Knows which tokens control the model and keeps users from typing them.

Does not know chat templates (chat.py writes prompts in `Segment`s) nor requests. All methods may be called
from several threads at once; encoding releases the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.errors import InvalidRequest
from engine.text import guarded, vocabulary
from engine.text.files import TextFiles, read_text_files

# A prompt in pieces: ordinary text, and ids of control tokens that its author may write.
Segment = str | int


class Tokenizer:
    """One model's tokenizer, from the files beside its weights.

    Attributes:
        vocab_size: one more than the largest token id; the model's own may be larger (padding).
        special_ids: tokens that `skip_special_tokens` hides.
        control: text -> id of every token that steers the model; see `vocabulary.control_ids`.
        named_tokens: bos_token, eos_token ... -> text, as chat templates want them.
        bos_id: the sequence's first token, if there is one.
        byte_table: token id -> bytes of text, None if a token's text depends on its neighbours.
        strip_left: spaces that a text's start loses when decoded.
    """

    def __init__(self, files: TextFiles) -> None:
        self.named_tokens = files.named_tokens
        named = set(files.named_tokens.values())
        added = vocabulary.added_tokens(files.tokenizer, files.config, named)
        self.control = vocabulary.control_ids(added, named, files.templates.values())
        self.find_control = guarded.matcher(self.control).finditer
        self._library, self._secrets = guarded.build(files.tokenizer, added, self.control)
        self._strings = vocabulary.token_strings(files.tokenizer["model"], added)
        self.vocab_size = len(self._strings)
        self.special_ids = frozenset(entry["id"] for entry in added if entry["special"])
        self._added_ids = {entry["content"]: entry["id"] for entry in added}
        model = files.tokenizer["model"]
        unknown = model.get("unk_id", self._id_of(model.get("unk_token")))
        # A character that is not in the vocabulary becomes the unknown token: text may do that.
        self._never_typed = frozenset(self.control.values()) - {unknown}
        table = vocabulary.byte_table(self._strings, added, files.tokenizer.get("decoder"))
        self.byte_table: list[bytes] | None = None
        self.strip_left = 0
        if table is not None:
            self.byte_table, self.strip_left = table
        self.bos_id = self._id_of(files.named_tokens.get("bos_token"))
        # Only a value that is stated overrides what the post-processor does.
        stated = files.config.get("add_bos_token")
        self._stated_bos = stated if isinstance(stated, bool) and self.bos_id is not None else None

    @classmethod
    def from_dir(cls, directory: str | Path) -> Tokenizer:
        """Reads a checkpoint directory, or a GGUF file.

        Raises:
            ModelError: files are missing or broken, in one line for the operator.
        """
        return cls(read_text_files(directory))

    def _id_of(self, text: str | None) -> int | None:
        if text is None or text in self._added_ids:
            return self._added_ids.get(text or "")
        token_id: int | None = self._library.token_to_id(text)
        return token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encodes text that somebody typed: no control token is real.

        Args:
            add_special_tokens: what the model wants around every text (BOS).

        Raises:
            InvalidRequest: the text holds half a surrogate pair.
        """
        return self._encode(text, add_special_tokens, written=0)

    def encode_chat(self, segments: Sequence[Segment]) -> list[int]:
        """Encodes a prompt in which only the ids among the segments are control tokens.

        The pieces are encoded together: a word cut in two segments is still one word.
        """
        secrets = self._secrets
        written = sum(isinstance(segment, int) for segment in segments)
        text = "".join(secrets[segment] if isinstance(segment, int) else segment for segment in segments)
        return self._encode(text, False, written)

    def segments(self, text: str) -> list[Segment]:
        """Cuts text at the control tokens written in it."""
        pieces: list[Segment] = []
        end = 0
        for match in self.find_control(text):
            pieces += (text[end : match.start()], self.control[match[0]])
            end = match.end()
        pieces.append(text[end:])
        return pieces

    def _encode(self, text: str, add_special_tokens: bool, written: int) -> list[int]:
        try:
            # The batch call without offsets is the faster one, and releases the lock throughout.
            (encoding,) = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError) as error:
            raise InvalidRequest(
                "The text is not valid Unicode (half a surrogate pair).", "prompt"
            ) from error
        ids: list[int] = encoding.ids
        around = self._library.num_special_tokens_to_add(False) if add_special_tokens else 0
        self._check(ids, written + around)
        return self._with_bos(ids) if add_special_tokens and self._stated_bos is not None else ids

    def _check(self, ids: list[int], expected: int) -> None:
        """Holds the promise whatever the library does: no control token that nobody wrote."""
        if self._never_typed.isdisjoint(ids):
            return
        if sum(token_id in self._never_typed for token_id in ids) > expected:
            raise InvalidRequest("The text cannot be encoded without control tokens.", "prompt")

    def _with_bos(self, ids: list[int]) -> list[int]:
        assert self.bos_id is not None
        has_bos = ids[:1] == [self.bos_id]
        if self._stated_bos and not has_bos:
            return [self.bos_id, *ids]
        return ids[1:] if has_bos and not self._stated_bos else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; for one that grows, use a Detokenizer."""
        hidden = self.special_ids if skip_special_tokens else frozenset[int]()
        shown = [token_id for token_id in ids if token_id not in hidden]
        if self.byte_table is None:
            return self.decode_strings([self.token_string(token_id) for token_id in shown])
        text = b"".join(self.token_bytes(token_id) for token_id in shown).decode("utf-8", "replace")
        return strip_spaces(text, self.strip_left)

    def decode_strings(self, strings: list[str]) -> str:
        """Runs the library's decoder over tokens as tokenizer.json writes them."""
        text: str = self._library.decoder.decode(strings)
        return text

    def token_string(self, token_id: int) -> str:
        """The token as tokenizer.json writes it; "" for an id that is not used."""
        return self._strings[token_id] if 0 <= token_id < self.vocab_size else ""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for, which may be part of a character."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        if self.byte_table is not None:
            return self.byte_table[token_id]
        return self.decode_strings([self._strings[token_id]]).encode()

    def token_text(self, token_id: int) -> str:
        """A token for people to read; U+FFFD where it is only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def strip_spaces(text: str, most: int) -> str:
    """Takes up to `most` spaces from the front."""
    while most and text.startswith(" "):
        text, most = text[1:], most - 1
    return text
