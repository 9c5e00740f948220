"""Trains the demo model and writes `engine/builtin/model`: `python -m training.train`.

Knows: the order of the steps and every number that matters. Does not know: the details of any step.
Everything is seeded: on one machine, with the same torch and as many threads, the result is the same.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from training import card, tokenizer
from training.augment import normalise
from training.batches import IGNORED, Batch, Encoder, pack
from training.dataset import Book, conversations, read_questions
from training.evaluate import Score, score
from training.export import write_model
from training.model import Llama, Shape

OUT = Path(__file__).parent.parent / "engine" / "builtin" / "model"


@dataclass(frozen=True)
class Recipe:
    """What decides the result."""

    seed: int = 20
    threads: int = 2
    conversations: int = 100_000
    tokenizer_conversations: int = 20_000
    tokens_per_batch: int = 2048
    cut_rate: float = 0.95
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup_steps: int = 100
    dropout: float = 0.05
    clip_norm: float = 1.0


def main() -> None:
    """Parses the command line and runs all steps."""
    parser = argparse.ArgumentParser(description="Train the demo model that ships with Quire.")
    parser.add_argument("--conversations", type=int, default=Recipe.conversations)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    run(Recipe(conversations=arguments.conversations), Shape(), arguments.out)


def run(recipe: Recipe, shape: Shape, out: Path) -> None:
    """Data, tokenizer, training, evaluation, files."""
    started = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(recipe.seed)
    book = Book()
    bpe = _train_tokenizer(book, recipe, shape)
    encoder = Encoder(bpe, recipe.cut_rate)
    model = Llama(shape, recipe.dropout)
    batches = _batches(book, encoder, recipe)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(batches)} steps", flush=True)
    fit(model, batches, recipe)
    model.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    minutes = (time.monotonic() - started) / 60
    held_out = _report(model, encoder, book)
    write_model(model, bpe, out)
    card.write(out, held_out, book, shape, minutes)
    print(f"wrote {out} after {minutes:.1f} minutes of training", flush=True)


def fit(model: Llama, batches: list[Batch], recipe: Recipe) -> None:
    """One pass over the batches with AdamW and a cosine schedule."""
    decay = [p for p in model.parameters() if p.dim() == 2]
    other = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    bf16 = _bf16_is_fast()
    model.train()
    started, running = time.monotonic(), 0.0
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, len(batches), recipe.warmup_steps)
        loss = _loss(model, batch, bf16)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == len(batches) - 1:
            print(f"step {step:5d}  loss {running:.4f}  {time.monotonic() - started:6.0f} s", flush=True)


def _loss(model: Llama, batch: Batch, bf16: bool) -> torch.Tensor:
    """Cross entropy over the answer tokens; other positions never reach the output matrix."""
    targets = batch.targets_ST.flatten()
    learned = (targets != IGNORED).nonzero().squeeze(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model.logits(model.hidden(batch.ids_ST).flatten(0, 1).index_select(0, learned))
    return F.cross_entropy(logits.float(), targets[learned])


def _schedule(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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


def _batches(book: Book, encoder: Encoder, recipe: Recipe) -> list[Batch]:
    rng = random.Random(recipe.seed + 1)
    sampled = conversations(book, recipe.conversations, recipe.seed + 2, _held_out())
    return list(pack((encoder.sample(c, rng) for c in sampled), recipe.tokens_per_batch, rng))


def _held_out() -> frozenset[str]:
    """The wordings that training must not see."""
    return frozenset(normalise(question) for question, _ in read_questions("heldout"))


def _report(model: Llama, encoder: Encoder, book: Book) -> Score:
    """Prints the scores. Only the development list shows what went wrong: the other is not for tuning."""
    development = score(model, encoder, book, read_questions("dev"))
    print(f"development list: {development.right} of {development.total} right", flush=True)
    for result in development.wrong():
        print(f"  wrong: {result.question}  ({result.intent})")
    held_out = score(model, encoder, book, read_questions("heldout"))
    in_bf16 = score(model, encoder, book, read_questions("heldout"), bf16=True)
    print(f"held-out list: {held_out.right} of {held_out.total} right ({held_out.percent:.1f} %)", flush=True)
    print(f"  the same in bfloat16: {in_bf16.right} of {in_bf16.total}", flush=True)
    return held_out


if __name__ == "__main__":
    main()
