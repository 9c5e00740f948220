"""Conversations as padded batches of token ids.

Knows: the chat format token by token, and which tokens the model is asked to learn. Does not know: the model.

Shapes: S sequences, T tokens of the longest one.
"""

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from training.dataset import Conversation
from training.tasks import Dialogue, Span
from training.tokenizer import END_OF_TEXT, IM_END, IM_START, render, token_id

_POOL = 8192  # sequences that are sorted by length together
IGNORED = -100
_ANSWER = re.compile(rf"(?<={re.escape(IM_START)}assistant\n)(.*?{re.escape(IM_END)})", re.DOTALL)


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether it is to be predicted."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Batch:
    """Inputs and next-token targets, padded on the right (causal attention never looks there)."""

    ids_ST: torch.Tensor
    targets_ST: torch.Tensor


class Encoder:
    """Turns a conversation into a sample.

    Only answers are learned: predicting what people ask would spend the model's few parameters on noise.
    A share of the samples is cut a few tokens into the last answer: there the choice of the answer has been
    made, the rest is recitation and needs far fewer examples.
    """

    def __init__(self, tokenizer: Tokenizer, cut_rate: float, cut_tokens: int = 8) -> None:
        self._tokenizer = tokenizer
        self._cut_rate, self._cut_tokens = cut_rate, cut_tokens
        self._start, self._end = token_id(tokenizer, IM_START), token_id(tokenizer, IM_END)
        self._end_of_text = token_id(tokenizer, END_OF_TEXT)
        self._newline = self._text("\n")
        self._answers: dict[str, list[int]] = {}

    def prompt(self, question: str) -> list[int]:
        """What the chat template renders for one user message and the generation prompt."""
        return self._message("user", question) + self._opening("assistant")

    def answer(self, text: str) -> list[int]:
        """The ids of an answer with the end of turn."""
        if text not in self._answers:
            self._answers[text] = [*self._text(text), self._end]
        return self._answers[text]

    def answer_spans(self, text: str, given: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """The ids of an answer, and which of them do not lie within what is given (ranges of characters)."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        free = [not any(a <= start and end <= b for a, b in given) for start, end in encoding.offsets]
        return [*encoding.ids, self._end], [*free, True]

    def rendered(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> list[int]:
        """The prompt for messages and tools."""
        return self._text(render(messages, tools)) + self._opening("assistant")

    def tokens(self, names: Sequence[str]) -> torch.Tensor:
        """The ids of tokens by their names."""
        return torch.tensor([token_id(self._tokenizer, name) for name in names])

    def text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))

    def sample(self, conversation: Conversation, rng: random.Random) -> Sample:
        if conversation.raw:
            ids = [*self._text(conversation.raw), self._end_of_text]
            return Sample(ids, [True] * len(ids))
        ids = self._message("system", conversation.system) if conversation.system else []
        learned = [False] * len(ids)
        for turn in conversation.turns:
            prompt, answer = self.prompt(turn.question), self.answer(turn.answer)
            ids = ids + prompt + answer + self._newline
            learned = learned + [False] * len(prompt) + [True] * len(answer) + [False] * len(self._newline)
        cut = len(ids)
        if rng.random() < self._cut_rate:
            rest = len(answer) + len(self._newline) - self._cut_tokens
            cut -= max(rest, 0)
        return Sample(ids[:cut], learned[:cut])

    def dialogue(self, dialogue: Dialogue, rng: random.Random) -> Sample:
        """Every answer is learned but for what is given; a last one that is recited is cut as in `sample`."""
        ids: list[int] = []
        learned: list[bool] = []
        pieces = _ANSWER.split(render(dialogue.messages, dialogue.tools))
        for place, text in enumerate(pieces[:-1]):  # after the last answer there is only a line break
            part = self._text(text)
            ids, learned = ids + part, learned + [place % 2 == 1] * len(part)
        if dialogue.recited and rng.random() < self._cut_rate:
            rest = max(len(part) - self._cut_tokens, 0)
            ids, learned = ids[: len(ids) - rest], learned[: len(ids) - rest]
        if dialogue.given:
            _, judged = self.answer_spans(pieces[-2].removesuffix(IM_END), dialogue.given)
            learned[-len(judged) :] = judged
        return Sample(ids, learned)

    def _text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _opening(self, role: str) -> list[int]:
        return [self._start, *self._text(role + "\n")]

    def _message(self, role: str, content: str) -> list[int]:
        # One string, as the template renders it: the newline and the content may share a token.
        return [self._start, *self._text(f"{role}\n{content}"), self._end, *self._newline]


def pack(samples: Iterable[Sample], tokens_per_batch: int, rng: random.Random) -> Iterator[Batch]:
    """Groups samples of similar length into batches of about that many tokens, in random order."""
    pool: list[Sample] = []
    for sample in samples:
        pool.append(sample)
        if len(pool) == _POOL:
            yield from _drain(pool, tokens_per_batch, rng)
            pool = []
    yield from _drain(pool, tokens_per_batch, rng)


def _drain(pool: list[Sample], tokens_per_batch: int, rng: random.Random) -> Iterator[Batch]:
    groups: list[list[Sample]] = []
    for sample in sorted(pool, key=lambda s: len(s.ids)):
        if not groups or (len(groups[-1]) + 1) * len(sample.ids) > tokens_per_batch:
            groups.append([])
        groups[-1].append(sample)
    rng.shuffle(groups)
    yield from (collate(group) for group in groups)


def collate(samples: list[Sample]) -> Batch:
    """Pads samples to the longest."""
    longest = max(len(sample.ids) for sample in samples)
    ids_ST = torch.zeros(len(samples), longest, dtype=torch.long)
    targets_ST = torch.full((len(samples), longest), IGNORED)
    for row, sample in enumerate(samples):
        ids_ST[row, : len(sample.ids)] = torch.tensor(sample.ids)
        pairs = zip(sample.ids[1:], sample.learned[1:], strict=True)
        following = [token if learned else IGNORED for token, learned in pairs]
        targets_ST[row, : len(following)] = torch.tensor(following, dtype=torch.long)
    return Batch(ids_ST, targets_ST)
