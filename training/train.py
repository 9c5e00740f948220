"""Trains the demo model and writes `engine/builtin/model`: `python -m training.train`.

Knows: the order of the steps. Does not know: the details of any step, and the numbers of the recipe.
Everything is seeded: on one machine, with the same torch and as many threads, the result is the same.
"""

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from training import card, tokenizer
from training.augment import normalise
from training.batches import IGNORED, Batch, Encoder, Sample, pack
from training.dataset import Book, conversations, read_questions, read_rows
from training.evaluate import Score, score, score_tasks
from training.export import read_model, write_model
from training.model import Llama, Shape
from training.recipe import Pace, Recipe
from training.tasks import Tasks

OUT = Path(__file__).parent.parent / "engine" / "builtin" / "model"


class Trainer:
    """The two parts of the training.

    Args:
        recipe: Every number.
        checkpoints: A folder where each part is saved while it runs, and goes on from.
    """

    def __init__(self, recipe: Recipe, checkpoints: Path | None = None) -> None:
        self.book = Book()
        self._recipe, self._checkpoints = recipe, checkpoints
        if checkpoints is not None:
            checkpoints.mkdir(parents=True, exist_ok=True)

    def questions(self) -> tuple[Tokenizer, Llama]:
        """The first part: questions about Quire, from nothing."""
        recipe, rng = self._recipe, self._seeded(0)
        bpe = _train_tokenizer(self.book, recipe, Shape())
        model = Llama(Shape(), recipe.questions.dropout)
        encoder = Encoder(bpe, recipe.cut_rate)
        sampled = conversations(self.book, recipe.conversations, recipe.seed + 2, _held_out())
        self._fit(model, (encoder.sample(c, rng) for c in sampled), recipe.questions, rng, "questions")
        return bpe, model

    def tasks(self, bpe: Tokenizer, model: Llama) -> tuple[Tokenizer, Llama]:
        """The second part: tools and JSON, without forgetting the questions."""
        recipe, rng = self._recipe, self._seeded(3)
        tasks = Tasks(self.book, [row["question"] for row in read_rows("tasks_heldout")])
        wider = tokenizer.with_words(bpe, tasks.words())
        model = model.with_tokens(_beginnings(bpe, wider, tasks.words()), recipe.tasks.dropout)
        self._fit(
            model, self._mixed(Encoder(wider, recipe.later_cut_rate), tasks, rng), recipe.tasks, rng, "tasks"
        )
        return wider, model

    def _seeded(self, offset: int) -> random.Random:
        torch.manual_seed(self._recipe.seed + offset)
        return random.Random(self._recipe.seed + offset + 1)

    def _mixed(self, encoder: Encoder, tasks: Tasks, rng: random.Random) -> Iterator[Sample]:
        recipe = self._recipe
        repeated = conversations(self.book, recipe.task_samples, rng.randrange(1 << 30), _held_out())
        for _ in range(recipe.task_samples):
            if rng.random() < recipe.task_share:
                yield encoder.dialogue(tasks.draw(rng), rng)
            else:
                yield encoder.sample(next(repeated), rng)

    def _fit(
        self, model: Llama, samples: Iterable[Sample], pace: Pace, rng: random.Random, part: str
    ) -> None:
        batches = list(pack(samples, pace.tokens_per_batch, rng))
        fit(model, batches, self._recipe, pace, self._checkpoints and self._checkpoints / f"{part}.pt")


def main() -> None:
    """Parses the command line and runs all steps."""
    parser = argparse.ArgumentParser(description="Train a demo model like the one that ships with Quire.")
    parser.add_argument(
        "--checkpoints", type=Path, help="a folder where each part is saved while it runs, and goes on from"
    )
    parser.add_argument("--questions-from", type=Path, help="a model that has done the first part: skip it")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    recipe, first = Recipe(), arguments.questions_from
    torch.set_num_threads(recipe.threads)
    torch.set_flush_denormal(True)
    trainer = Trainer(recipe, arguments.checkpoints)
    bpe, model = trainer.questions() if first is None else read_model(first, Shape())
    bpe, model = trainer.tasks(bpe, model)
    finish(trainer.book, bpe, model, Encoder(bpe, recipe.cut_rate), arguments.out)


def finish(book: Book, bpe: Tokenizer, model: Llama, encoder: Encoder, out: Path) -> None:
    """Evaluation, files, card."""
    questions = _report(model, encoder, book)
    of_tasks = _report_tasks(model, encoder, book)
    write_model(model, bpe, out)
    card.write(out, questions, of_tasks, book, model.shape)
    print(f"wrote {out}", flush=True)


def fit(
    model: Llama, batches: list[Batch], recipe: Recipe, pace: Pace, checkpoint: Path | None = None
) -> None:
    """One pass over the batches with AdamW; the weights end as bfloat16 holds them."""
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(batches)} steps", flush=True)
    decay = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=pace.learning_rate, betas=(0.9, 0.98), fused=True)
    bf16 = _bf16_is_fast()
    model.train()
    started, running, first = time.monotonic(), 0.0, _resume(checkpoint, model, optimizer)
    for step in range(first, len(batches)):
        for group in optimizer.param_groups:
            group["lr"] = pace.learning_rate * _schedule(step, len(batches), pace)
        loss = _loss(model, batches[step], bf16)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == len(batches) - 1:
            print(f"step {step:5d}  loss {running:.4f}  {time.monotonic() - started:6.0f} s", flush=True)
            if checkpoint is not None:
                state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, checkpoint)
    model.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})


def _resume(checkpoint: Path | None, model: Llama, optimizer: torch.optim.Optimizer) -> int:
    """The step to begin with. Exact where nothing is dropped out, since no other randomness is left then."""
    if checkpoint is None or not checkpoint.exists():
        return 0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]) + 1


def _loss(model: Llama, batch: Batch, bf16: bool) -> torch.Tensor:
    """Cross entropy over the answer tokens; other positions never reach the output matrix."""
    targets = batch.targets_ST.flatten()
    learned = (targets != IGNORED).nonzero().squeeze(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model.logits(model.hidden(batch.ids_ST).flatten(0, 1).index_select(0, learned))
    return F.cross_entropy(logits.float(), targets[learned])


def _schedule(step: int, steps: int, pace: Pace) -> float:
    if step < pace.warmup_steps:
        return (step + 1) / pace.warmup_steps
    start = max(pace.warmup_steps, round(steps * (1 - pace.decay)))
    done = max(0, step - start) / max(1, steps - start)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _bf16_is_fast() -> bool:
    """Whether the CPU multiplies bfloat16 natively; elsewhere autocast would only slow things down."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _train_tokenizer(book: Book, recipe: Recipe, shape: Shape) -> Tokenizer:
    rng = random.Random(recipe.seed)
    texts = [intent.answer for intent in book.intents.values()] * 20
    for conversation in conversations(book, recipe.tokenizer_conversations, recipe.seed, _held_out()):
        texts += [conversation.system, *(turn.question for turn in conversation.turns)]
    rng.shuffle(texts)
    return tokenizer.train(texts, shape.vocab_size)


def _beginnings(old: Tokenizer, new: Tokenizer, words: Mapping[str, str]) -> list[list[int]]:
    """For each new token, those that it begins as: its pieces, or what it is another spelling of."""
    found: list[list[int]] = []
    for token_id in range(old.get_vocab_size(), new.get_vocab_size()):
        text = new.decode([token_id], skip_special_tokens=False)
        same = tokenizer.token_id(new, words.get(text, text)) if text in words else token_id
        pieces = list(old.encode(text, add_special_tokens=False).ids)
        found.append([same] if same < token_id else pieces)
    return found


def _held_out() -> frozenset[str]:
    """The wordings that training must not see."""
    return frozenset(normalise(question) for question, _ in read_questions("heldout"))


def _report(model: Llama, encoder: Encoder, book: Book) -> Score:
    """Prints the scores. Only the development lists show what went wrong: the others are not for tuning."""
    _show_development(score(model, encoder, book, read_questions("dev")))
    questions = score(model, encoder, book, read_questions("heldout"))
    _show("questions", questions)
    _show("questions in bfloat16", score(model, encoder, book, read_questions("heldout"), bf16=True))
    return questions


def _report_tasks(model: Llama, encoder: Encoder, book: Book) -> Score:
    _show_development(score_tasks(model, encoder, book, read_rows("tasks_dev")))
    tasks = score_tasks(model, encoder, book, read_rows("tasks_heldout"))
    _show("tasks", tasks)
    return tasks


def _show_development(found: Score) -> None:
    print(f"development list: {found.right} of {found.total} right", flush=True)
    for result in found.wrong():
        print(f"  wrong: {result.question}  ({result.intent})")


def _show(name: str, found: Score) -> None:
    print(f"held-out {name}: {found.right} of {found.total} right ({found.percent:.1f} %)", flush=True)


if __name__ == "__main__":
    main()
