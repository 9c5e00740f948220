"""Builds conversations: which question, in which wording, with what around it, and the answer it must get.

Knows: the data files under `data/`, the held-out list (to keep it out). Does not know: tokens, tensors.
"""

import json
import random
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.augment import Typist, normalise
from training.grammar import Grammar, Wordings

HERE = Path(__file__).parent
OFF_TOPIC = "off_topic"
Question = tuple[str, str]  # the wording and the intent that it means
_INTENT_FILES = ("talk", "start", "models", "api", "flags", "cache", "sampling", "offtopic")
_QUIRE = re.compile(r"\bquire\b")
_QUIRE_RATE = {"full": 0.07, "plain": 0.02, "none": None}  # how often chatter around a question names Quire


@dataclass(frozen=True)
class Intent:
    """One thing that a user may want to know, and the one answer to it."""

    name: str
    answer: str
    wordings: Wordings
    decorate: str  # a key of _QUIRE_RATE; `none` for small talk, which stays as it is


@dataclass(frozen=True)
class Turn:
    """A question with the answer it must get."""

    question: str
    answer: str
    intent: str


@dataclass(frozen=True)
class Conversation:
    """What one training sequence holds; a raw text has no turns and is not put into the chat template."""

    turns: tuple[Turn, ...]
    system: str = ""
    raw: str = ""


class Book:
    """Everything that is in the data files, ready to be sampled."""

    def __init__(self, data: Path = HERE / "data") -> None:
        shared = _toml(data / "frames.toml")
        grammar = Grammar(shared["macros"], shared["frames"], shared["syllables"])
        off_topic = _toml(data / "offtopic.toml")
        for name, text in off_topic["lists"].items():
            grammar.define(name, text)
        self._software = off_topic["lists"]["software"].split("|")
        self._systems = Wordings(grammar, shared["decor"]["system"])
        synonyms = _toml(data / "synonyms.toml")["synonyms"]
        small_words = shared["typing"]["small_words"].split()
        self._typist = Typist(shared["decor"], small_words, shared["spelling"], synonyms)
        self.intents: dict[str, Intent] = {}
        for file in _INTENT_FILES:
            for name, entry in _toml(data / f"{file}.toml").items():
                if "answer" in entry:
                    self.intents[name] = _intent(name, entry, grammar)
        self._on_topic = [name for name in self.intents if name != OFF_TOPIC]
        self._swappable = [name for name in self._on_topic if self.intents[name].decorate == "full"]

    def answer(self, intent: str) -> str:
        return self.intents[intent].answer

    def turn(self, rng: random.Random) -> Turn:
        """A question of a random intent; about a quarter are off topic."""
        if rng.random() < 0.26:
            return self._off_topic_turn(rng)
        return self._dressed(self.intents[rng.choice(self._on_topic)], rng)

    def _dressed(self, intent: Intent, rng: random.Random) -> Turn:
        text = intent.wordings.sample(rng)
        if (
            intent.decorate != "none" and rng.random() < 0.06
        ):  # people say the same thing twice, or give the reason first
            text += rng.choice([". ", ", ", "? ", " - "]) + intent.wordings.sample(rng)
        return Turn(self._typist.type(text, rng, _QUIRE_RATE[intent.decorate]), intent.answer, intent.name)

    def _off_topic_turn(self, rng: random.Random) -> Turn:
        """Off topic proper, or a question about Quire asked of some other program: a near miss."""
        intent = self.intents[OFF_TOPIC]
        if rng.random() < 0.22:
            text = self._near_miss(rng)
            return Turn(self._typist.type(text, rng, None), intent.answer, OFF_TOPIC)
        return self._dressed(intent, rng)

    def _near_miss(self, rng: random.Random) -> str:
        while True:
            text = self.intents[rng.choice(self._swappable)].wordings.sample(rng)
            if _QUIRE.search(text):
                return _QUIRE.sub(rng.choice(self._software), text)

    def conversation(self, rng: random.Random) -> Conversation:
        """Mostly one turn; often more, so that the last question counts, not those before it."""
        roll = rng.random()
        if roll < 0.02:
            return Conversation((), raw=self._raw(rng))
        turns = 1
        if roll > 0.98:
            turns = rng.randint(4, 12)
        elif roll > 0.86:
            turns = rng.choice([2, 2, 3])
        system = self.system(rng) if rng.random() < 0.2 else ""
        return Conversation(tuple(self.turn(rng) for _ in range(turns)), system)

    def system(self, rng: random.Random) -> str:
        """What an operator may write above a conversation."""
        return " ".join(self._systems.sample(rng) for _ in range(rng.choice([1, 1, 1, 2, 3, 5])))

    def _raw(self, rng: random.Random) -> str:
        """Facts as running text, for prompts that come without the chat template."""
        facts = [self.answer("what_is_quire")] if rng.random() < 0.5 else []
        facts += [self.answer(rng.choice(self._on_topic[4:])) for _ in range(rng.randint(1, 3))]
        return " ".join(facts)


def conversations(book: Book, count: int, seed: int, excluded: frozenset[str]) -> Iterator[Conversation]:
    """Samples training data; a conversation with an excluded question is replaced by another one."""
    rng = random.Random(seed)
    made = 0
    while made < count:
        conversation = book.conversation(rng)
        if excluded and any(normalise(turn.question) in excluded for turn in conversation.turns):
            continue
        made += 1
        yield conversation


def read_questions(name: str) -> list[Question]:
    """The questions of a list next to this file: `heldout` or `dev`."""
    return [(row["question"], row["intent"]) for row in read_rows(name)]


def read_rows(name: str) -> list[dict[str, Any]]:
    """The lines of a list next to this file."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _intent(name: str, entry: dict[str, Any], grammar: Grammar) -> Intent:
    lines = [line.strip() for line in entry["wordings"].splitlines() if line.strip()]
    return Intent(name, entry["answer"], Wordings(grammar, lines), entry.get("decorate", "full"))
