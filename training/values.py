"""The values of the closed world: cities, people, things, numbers.

Knows: which there are, how each is said and what JSON holds. Does not know: what is asked about them; tokens.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

_LARGEST = 200
_USUAL = 0.8  # how often a value is said as JSON holds it, where there are other ways
_NUMBERS = ("number", "port")


@dataclass(frozen=True)
class Value:
    """What JSON holds, and all ways to say it, this one first."""

    json: str | int | float
    ways: tuple[str, ...]

    def said(self, rng: random.Random) -> str:
        return self.ways[0] if len(self.ways) == 1 or rng.random() < _USUAL else rng.choice(self.ways[1:])


class Values:
    """Draws values by kind.

    Args:
        lists: Values by kind, separated by bars, each with other names behind equals signs.
    """

    def __init__(self, lists: Mapping[str, str]) -> None:
        self._kinds = {kind: [_value(kind, part) for part in text.split("|")] for kind, text in lists.items()}
        named = {value.json: value for value in self._kinds["number"]}
        plain = [named.pop(n, Value(n, (str(n),))) for n in range(_LARGEST + 1)]
        self._kinds |= {"number": [*plain, *named.values()], "small": plain[:101], "age": plain[1:100]}
        longest_first = sorted(self.spellings(), key=len, reverse=True)
        self._written = re.compile(rf"\b(?:{'|'.join(longest_first)})\b", re.IGNORECASE)

    def draw(self, kind: str, rng: random.Random) -> Value:
        """A value of a kind: one that the lists name, `small`, `age`, `clock` or `money`."""
        if kind == "clock":
            return _unlisted(f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}")
        if kind == "money" and rng.random() < 0.3:
            return _unlisted(round(rng.randint(0, _LARGEST) + rng.randint(1, 99) / 100, 2))
        # Small numbers are said more often than large ones.
        rows = self._kinds["number" if kind == "money" else kind]
        return rng.choice(rows[:101] if kind == "number" and rng.random() < 0.6 else rows)

    def spellings(self) -> dict[str, str]:
        """Every way to write a value, and the value that it stands for, in a fixed order."""
        found: dict[str, str] = {}
        for kind in sorted(self._kinds):
            for value in self._kinds[kind]:
                for way in value.ways:
                    for text in (way, way.lower(), way.capitalize()):
                        found.setdefault(text, str(value.json))
        return found | {f"0{digit}": f"0{digit}" for digit in range(10)}  # of clocks

    def described(self) -> list[str]:
        """A line for each kind, for people."""
        lists = {kind: rows for kind, rows in self._kinds.items() if kind not in ("number", "small", "age")}
        lines = [f"{kind}: {', '.join(str(row.json) for row in rows)}" for kind, rows in lists.items()]
        larger = [str(row.json) for row in self._kinds["number"] if int(row.json) > _LARGEST]
        return [*lines, f"numbers: 0 to {_LARGEST}, {', '.join(larger)}"]

    def masked(self, text: str) -> str:
        """The text with a mark for each value: what is left is the wording."""
        return self._written.sub("#", text)


def _value(kind: str, text: str) -> Value:
    name, *others = text.split("=")
    return Value(int(name) if kind in _NUMBERS else name, (name, *others))


def _unlisted(found: str | float) -> Value:
    return Value(found, (str(found),))
