"""Writes the model card from the measured scores, so that the card cannot drift from the weights.

Knows: what the card says. Does not know: how the score was measured.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from training.dataset import Book
from training.evaluate import Score
from training.model import Shape
from training.tasks import Tasks

_DATA = Path(__file__).parent / "data"


def sha256(path: Path) -> str:
    """The hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(folder: Path, questions: Score, of_tasks: Score, book: Book, shape: Shape) -> None:
    """Writes README.md next to the weights."""
    tasks, weights = Tasks(book), folder / "model.safetensors"
    text = (
        (_DATA / "card.md")
        .read_text(encoding="utf-8")
        .format(
            layers=shape.layers,
            hidden=shape.hidden_size,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            parameters=shape.parameters(),
            megabytes=weights.stat().st_size / 1e6,
            vocab=shape.vocab_size,
            positions=shape.max_positions,
            right=questions.right,
            total=questions.total,
            percent=questions.percent,
            tasks_right=of_tasks.right,
            tasks_total=of_tasks.total,
            tasks_percent=of_tasks.percent,
            tools=_listed(f"`{kind.name}({', '.join(kind.keys)})`" for kind in tasks.kinds),
            fields=_listed(", ".join(f"`{key}`" for key in kind.keys) for kind in tasks.forms),
            values=_listed(tasks.values.described()),
            digest=sha256(weights),
            intents=len(book.intents) - 1,
            off_topic=sum(result.intent == "off_topic" for result in questions.results),
        )
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
