"""Scores a model on a list of questions.

Knows: an answer is right when the greedy output is the intent's answer, token for token, with its end.
Does not know: how the model was trained.
"""

from dataclasses import dataclass

import torch

from training.batches import Encoder, Sample, collate
from training.dataset import Book, Question
from training.exercises import Exercise, Row, exercise
from training.model import Llama

_MAX_NEW_TOKENS = 160
_ENDS = ('",', '"}', ",", "}")  # of values in JSON


@dataclass(frozen=True)
class Result:
    """One question: was the answer right, and by how much did its least certain token win (in logits)."""

    question: str
    intent: str
    right: bool
    margin: float


@dataclass(frozen=True)
class Score:
    """All results of a list."""

    results: tuple[Result, ...]

    @property
    def right(self) -> int:
        return sum(result.right for result in self.results)

    @property
    def total(self) -> int:
        return len(self.results)

    @property
    def percent(self) -> float:
        return 100.0 * self.right / self.total

    def wrong(self) -> list[Result]:
        return [result for result in self.results if not result.right]


@torch.inference_mode()
def score(model: Llama, encoder: Encoder, book: Book, questions: list[Question], bf16: bool = False) -> Score:
    """Judges every question.

    Greedy decoding yields the canonical answer exactly when each of its tokens is the most likely one after
    the tokens before it, so one forward pass over question and answer decides, without generating.
    """
    model.eval()
    results: list[Result] = []
    for at in range(0, len(questions), 32):
        part = questions[at : at + 32]
        samples = [_sample(encoder, book, question, intent) for question, intent in part]
        batch = collate(samples)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model.logits(model.hidden(batch.ids_ST)).float()
        for row, (question, intent) in enumerate(part):
            margin = _margin(logits[row], batch.targets_ST[row])
            results.append(Result(question, intent, margin > 0, margin))
    return Score(tuple(results))


def _sample(encoder: Encoder, book: Book, question: str, intent: str) -> Sample:
    prompt, answer = encoder.prompt(question), encoder.answer(book.answer(intent))
    return Sample(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _margin(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> float:
    """The smallest lead of a wanted token over the best other one; negative when greedy leaves the answer."""
    learned = targets_T >= 0
    logits, wanted = logits_TV[learned], targets_T[learned].unsqueeze(1)
    won = logits.gather(1, wanted).squeeze(1)
    best_other = logits.scatter(1, wanted, float("-inf")).amax(1)
    return float((won - best_other).min())


@torch.inference_mode()
def score_tasks(model: Llama, encoder: Encoder, book: Book, rows: list[Row]) -> Score:
    """Judges dialogues with tools and questions for JSON.

    A call is right when it is the call, token for token; so is the answer where none should be made. An
    answer to a result is right when it says what the row wants said. Of JSON, whose form a grammar gives,
    each value must be the model's own, and that it ends; whether another follows is the schema's.
    """
    model.eval()
    judged = (exercise(row, book) for row in rows)
    return Score(tuple(_judge(model, encoder, one, row) for one, row in zip(judged, rows, strict=True)))


def _judge(model: Llama, encoder: Encoder, asked: Exercise, row: Row) -> Result:
    prompt = encoder.rendered(asked.messages, asked.tools)
    if asked.says:
        stop = {encoder.answer("")[-1]}
        said = encoder.text(generate(model, encoder, prompt, stop))
        return Result(row["question"], said, all(part in said for part in asked.says), 0.0)
    answer, judged = encoder.answer_spans(asked.answer, asked.given)
    batch = collate([Sample(prompt + answer, [False] * len(prompt) + judged)])
    logits_TV, targets_T = model.logits(model.hidden(batch.ids_ST)).float()[0], batch.targets_ST[0]
    if asked.given:
        ends = encoder.tokens(_ENDS)
        places = torch.isin(targets_T, ends).nonzero()
        other_ends = ends[None] != targets_T[places]
        logits_TV[places, ends] = logits_TV[places, ends].masked_fill(other_ends, float("-inf"))
    margin = _margin(logits_TV, targets_T)
    return Result(row["question"], asked.answer, margin > 0, margin)


@torch.inference_mode()
def generate(model: Llama, encoder: Encoder, prompt: list[int], stop: set[int]) -> list[int]:
    """Greedy continuation, one full forward pass per token: slow and simple."""
    model.eval()
    ids = list(prompt)
    for _ in range(_MAX_NEW_TOKENS):
        hidden = model.hidden(torch.tensor([ids]))
        token = int(model.logits(hidden[0, -1]).argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]
