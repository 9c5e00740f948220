"""Values that a person may name: cities, people, numbers, dates, codes.

Knows: how each kind looks, as said and as JSON. Does not know: what is asked about them. Many words are made
up, so that a model can only copy them, not know them.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

_ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "fr",
    "g",
    "gl",
    "gr",
    "h",
    "j",
    "k",
    "kr",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sh",
    "sk",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "y",
    "z",
]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ie", "oo", "ou"]
_CODAS = ["", "", "", *["b", "ck", "d", "l", "m", "n", "nd", "ng", "r", "rg", "rk", "s", "st", "t", "x"]]
_CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_INTEGERS = ("digit", "small", "id", "port", "number", "percent")


@dataclass(frozen=True)
class Value:
    """As said, and as JSON holds it."""

    said: str
    json: str | int | float


class Values:
    """Draws values by kind.

    Args:
        lists: Words by list name, separated by bars.
    """

    def __init__(self, lists: Mapping[str, str]) -> None:
        self.lists = {name: text.split("|") for name, text in lists.items()}

    def draw(self, kind: str, rng: random.Random) -> Value:
        """A value of a kind: the name of one of the methods below."""
        found: str | int | float = getattr(self, f"_{kind}")(rng)
        return Value(str(found), found)

    def type(self, kind: str) -> str:
        """The JSON schema's name for it."""
        return {**dict.fromkeys(_INTEGERS, "integer"), "float": "number"}.get(kind, "string")

    def invented(self, rng: random.Random, syllables: int = 3) -> str:
        """A word that means nothing."""
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, syllables))]
        return "".join(parts) + rng.choice(_CODAS)

    def _listed(self, name: str, rate: float, rng: random.Random) -> str:
        return rng.choice(self.lists[name]) if rng.random() < rate else self.invented(rng).capitalize()

    def _city(self, rng: random.Random) -> str:
        city = self._listed("cities", 0.5, rng)
        return rng.choice(["New ", "San ", "Port ", "East ", "Bad "]) + city if rng.random() < 0.06 else city

    def _person(self, rng: random.Random) -> str:
        first = self._listed("people", 0.5, rng)
        return f"{first} {self._listed('surnames', 0.5, rng)}" if rng.random() < 0.25 else first

    def _word(self, rng: random.Random) -> str:
        word = rng.choice(self.lists["hosts"]) if rng.random() < 0.4 else self.invented(rng)
        return f"{word}{rng.choice('-_-')}{rng.randint(1, 40)}" if rng.random() < 0.35 else word

    def _model(self, rng: random.Random) -> str:
        word = rng.choice(self.lists["models"]) if rng.random() < 0.6 else self.invented(rng)
        size = f"{rng.randint(1, 90)}b"
        return word + rng.choice(["", f"-{rng.randint(1, 9)}", f"-{size}", f"{rng.randint(2, 5)}-{size}"])

    def _words(self, rng: random.Random) -> str:
        count = rng.randint(1, 4)
        return " ".join(
            rng.choice(self.lists["words"]) if rng.random() < 0.7 else self.invented(rng)
            for _ in range(count)
        )

    def _digit(self, rng: random.Random) -> int:
        return rng.randint(1, 12)

    def _small(self, rng: random.Random) -> int:
        return rng.randint(1, 99)

    def _percent(self, rng: random.Random) -> int:
        return rng.randint(0, 100)

    def _id(self, rng: random.Random) -> int:
        return rng.randint(1, 10 ** rng.randint(1, 5))

    def _port(self, rng: random.Random) -> int:
        return rng.randint(1000, 65535) if rng.random() < 0.8 else rng.randint(20, 999)

    def _number(self, rng: random.Random) -> int:
        return rng.randint(1, 10 ** rng.randint(1, 4))

    def _float(self, rng: random.Random) -> float:
        return round(rng.uniform(0, 10 ** rng.randint(1, 3)), rng.choice([1, 2]))

    def _clock(self, rng: random.Random) -> str:
        return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"

    def _date(self, rng: random.Random) -> str:
        month, day = rng.randint(1, 12), rng.randint(1, 28)
        return f"{rng.randint(1980, 2035)}-{month:02}-{day:02}"

    def _ip(self, rng: random.Random) -> str:
        first, rest = rng.choice([10, 127, 172, 192]), [rng.randint(0, 255) for _ in range(3)]
        return ".".join(str(part) for part in (first, *rest))

    def _email(self, rng: random.Random) -> str:
        name = rng.choice(self.lists["people"]).lower() if rng.random() < 0.5 else self.invented(rng, 2)
        return f"{name}@{self.invented(rng, 2)}.{rng.choice(self.lists['tlds'])}"

    def _version(self, rng: random.Random) -> str:
        return ".".join(str(rng.randint(0, 20)) for _ in range(rng.choice([2, 3])))

    def _code(self, rng: random.Random) -> str:
        digits = str(rng.randint(10, 99999))
        letter = rng.choice(_CAPITALS)
        return rng.choice(["", f"{letter}-", letter, "req-", "#"]) + digits

    def _currency(self, rng: random.Random) -> str:
        invented = "".join(rng.choices(_CAPITALS, k=3))
        return rng.choice(self.lists["currencies"]) if rng.random() < 0.7 else invented

    def _ticker(self, rng: random.Random) -> str:
        return "".join(rng.choices(_CAPITALS, k=rng.randint(2, 5)))

    def _item(self, rng: random.Random) -> str:
        return rng.choice(self.lists["items"]) if rng.random() < 0.6 else self.invented(rng, 2) + "s"

    def _room(self, rng: random.Random) -> str:
        return rng.choice(self.lists["rooms"]) if rng.random() < 0.7 else self.invented(rng, 2)

    def _sky(self, rng: random.Random) -> str:
        return rng.choice(self.lists["skies"])

    def _state(self, rng: random.Random) -> str:
        return rng.choice(self.lists["states"])
