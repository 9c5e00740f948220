"""Wording templates: a tiny grammar in which one line stands for many ways to ask the same thing.

Knows: `{a|b|}` picks one alternative, `$name` is a macro, and `frame> text` puts the text into one of the
sentence frames of that name. Does not know: intents, answers, noise.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2

_TOKEN = re.compile(r"[{|}]|\$[a-z_]+|[^{|}$]+|\$")
_SLOT = "X"


@dataclass(frozen=True)
class Text:
    """Literal text."""

    text: str

    def sample(self, rng: random.Random) -> str:
        return self.text

    def count(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Alt:
    """One of several nodes, each equally likely."""

    options: tuple["Node", ...]

    def sample(self, rng: random.Random) -> str:
        return rng.choice(self.options).sample(rng)

    def count(self) -> float:
        return sum(option.count() for option in self.options)


@dataclass(frozen=True)
class Seq:
    """Several nodes, one after the other."""

    parts: tuple["Node", ...]

    def sample(self, rng: random.Random) -> str:
        return "".join(part.sample(rng) for part in self.parts)

    def count(self) -> float:
        total = 1.0
        for part in self.parts:
            total *= part.count()
        return total


@dataclass(frozen=True)
class Gibberish:
    """A pronounceable word that means nothing, so that unknown words are not mistaken for known ones."""

    onsets: tuple[str, ...]
    vowels: tuple[str, ...]
    codas: tuple[str, ...]

    def sample(self, rng: random.Random) -> str:
        syllables = rng.randint(1, 3)
        word = "".join(rng.choice(self.onsets) + rng.choice(self.vowels) for _ in range(syllables))
        return word + (rng.choice(self.codas) if rng.random() < 0.9 else "")

    def count(self) -> float:
        return 1000.0


Node = Text | Alt | Seq | Gibberish


class Grammar:
    """Macros and frames, shared by every template.

    Args:
        macros: Name to template text; a macro may use others that were defined before it.
        frames: Name to sentence frames, each holding the slot X once.
        syllables: What the macro `$gibberish` makes its words of.
    """

    def __init__(
        self, macros: Mapping[str, str], frames: Mapping[str, Sequence[str]], syllables: Mapping[str, str]
    ) -> None:
        parts = (tuple(syllables[part].split()) for part in ("onsets", "vowels", "codas"))
        self._macros: dict[str, Node] = {"gibberish": Gibberish(*parts)}
        for name, text in macros.items():
            self.define(name, text)
        self._frames = {name: [self._split_frame(line) for line in lines] for name, lines in frames.items()}

    def define(self, name: str, text: str) -> None:
        """Adds the macro `$name`: one of the alternatives in the text."""
        self._macros[name] = self._parse_text("{" + text + "}")

    def parse(self, line: str) -> Node:
        """The template of one line."""
        head, mark, tail = line.partition("> ")
        if mark and head in self._frames:
            inner = self._parse_text(tail)
            return Alt(tuple(Seq((before, inner, after)) for before, after in self._frames[head]))
        return self._parse_text(line)

    def _split_frame(self, line: str) -> tuple[Node, Node]:
        before, after = re.split(rf"\b{_SLOT}\b", line, maxsplit=1)
        return self._parse_text(before), self._parse_text(after)

    def _parse_text(self, line: str) -> Node:
        tokens = _TOKEN.findall(line)
        node, rest = self._sequence(tokens, 0)
        if rest != len(tokens):
            raise ValueError(f"unbalanced braces in the template: {line}")
        return node

    def _sequence(self, tokens: list[str], at: int) -> tuple[Node, int]:
        parts: list[Node] = []
        while at < len(tokens) and tokens[at] not in "|}":
            if tokens[at] == "{":
                node, at = self._alternatives(tokens, at + 1)
            else:
                node, at = self._leaf(tokens[at]), at + 1
            parts.append(node)
        return (parts[0] if len(parts) == 1 else Seq(tuple(parts))), at

    def _alternatives(self, tokens: list[str], at: int) -> tuple[Node, int]:
        options: list[Node] = []
        while True:
            node, at = self._sequence(tokens, at)
            options.append(node)
            if at >= len(tokens):
                raise ValueError("a template opens a brace and never closes it: " + "".join(tokens))
            if tokens[at] == "}":
                return Alt(tuple(options)), at + 1
            at += 1

    def _leaf(self, token: str) -> Node:
        if token.startswith("$") and len(token) > 1:
            return self._macros[token[1:]]
        return Text(token)


class Wordings:
    """All templates of one intent.

    A line is drawn in proportion to the logarithm of how many wordings it stands for: rich lines come more
    often, yet a line that is a single sentence is still seen.
    """

    def __init__(self, grammar: Grammar, lines: Sequence[str]) -> None:
        self._nodes = [grammar.parse(line) for line in lines]
        self._weights = [1.0 + log2(node.count()) for node in self._nodes]

    def sample(self, rng: random.Random) -> str:
        node = rng.choices(self._nodes, self._weights)[0]
        return " ".join(node.sample(rng).split())

    def count(self) -> float:
        """How many wordings the templates stand for (with repetitions)."""
        return sum(node.count() for node in self._nodes)
