"""Makes a clean question look typed by a person: chatter around it, casing, punctuation, slips.

Knows: strings and a random generator. Does not know: which intent a question belongs to.
"""

import random
import re
from collections.abc import Mapping, Sequence
from string import capwords

_KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"(?<![-./_\w])[a-z][a-z0-9'-]*")


class Typist:
    """Types questions the way people do.

    Args:
        decor: What people say before and after a question; the `_quire` lists name the server.
        small_words: Words that a hasty person leaves out.
        spelling: Lower-case names to their usual spelling.
        synonyms: Words and phrases to others, separated by bars, that may replace them.
    """

    def __init__(
        self,
        decor: Mapping[str, Sequence[str]],
        small_words: Sequence[str],
        spelling: Mapping[str, str],
        synonyms: Mapping[str, str],
    ) -> None:
        self._decor = decor
        self._synonyms = {phrase: others.split("|") for phrase, others in synonyms.items()}
        longest_first = sorted(synonyms, key=len, reverse=True)
        self._replaceable = re.compile(
            rf"(?<![-./_\w])(?:{'|'.join(map(re.escape, longest_first))})(?![-./_\w])"
        )
        self._small_words = frozenset(small_words)
        self._spelling = spelling

    def type(self, text: str, rng: random.Random, quire_rate: float | None) -> str:
        """A question as it may arrive.

        Args:
            text: The clean wording, lower case.
            rng: Decides everything.
            quire_rate: Probability of each wrapping that names Quire; None for no chatter at all.
        """
        if quire_rate is not None:
            text = self._wrap(text, rng, quire_rate)
        if rng.random() < 0.35:
            text = self._replace(text, rng)
        return self._dress(self._slip(text, rng), rng)

    def _replace(self, text: str, rng: random.Random) -> str:
        def other(match: re.Match[str]) -> str:
            return rng.choice(self._synonyms[match[0]]) if rng.random() < 0.35 else match[0]

        return self._replaceable.sub(other, text)

    def _wrap(self, text: str, rng: random.Random, quire_rate: float) -> str:
        roll = rng.random()
        if roll < 0.10:
            text = rng.choice(self._decor["prefix"]) + text
        elif roll < 0.10 + quire_rate:
            text = rng.choice(self._decor["prefix_quire"]) + text
        roll = rng.random()
        if roll < 0.06:
            text = text + rng.choice(self._decor["suffix"])
        elif roll < 0.06 + quire_rate:
            text = text + rng.choice(self._decor["suffix_quire"])
        return text

    def _slip(self, text: str, rng: random.Random) -> str:
        """Drops, swaps or misspells words now and then; sparing short texts, where one word may be all."""
        words = text.split()
        roll = rng.random()
        if roll < 0.05 and len(words) > 4:
            words = [w for w in words if w not in self._small_words or rng.random() < 0.2] or words
        elif roll < 0.08 and len(words) > 4:
            del words[rng.randrange(len(words))]
        elif roll < 0.10 and len(words) > 3:
            at = rng.randrange(len(words) - 1)
            words[at], words[at + 1] = words[at + 1], words[at]
        elif roll < 0.18:
            at = rng.randrange(len(words))
            if len(words[at]) > 3 and words[at].isalpha():
                words[at] = _misspell(words[at], rng)
        return " ".join(words)

    def _dress(self, text: str, rng: random.Random) -> str:
        """Casing and the final punctuation mark."""
        roll = rng.random()
        if roll < 0.55:
            text = self._spell(text, rng, 1.0)
            text = text[:1].upper() + text[1:]
        elif roll < 0.58:
            text = text.upper()
        elif roll < 0.60:
            text = capwords(text)
        elif roll < 0.66:
            text = self._spell(text, rng, 0.5)
        if "'" in text and rng.random() < 0.15:
            text = text.replace("'", "")
        return text + rng.choices(["?", "", ".", "!", "??", " ?", "..."], [50, 33, 9, 3, 2, 2, 1])[0]

    def _spell(self, text: str, rng: random.Random, rate: float) -> str:
        def fix(match: re.Match[str]) -> str:
            return self._spelling.get(match[0], match[0]) if rng.random() < rate else match[0]

        return _WORD.sub(fix, text)


def _misspell(word: str, rng: random.Random) -> str:
    at = rng.randrange(len(word) - 1)
    kind = rng.randrange(4)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[:at] + word[at] + word[at:]
    return word[:at] + _neighbour(word[at], rng) + word[at + 1 :]


def _neighbour(letter: str, rng: random.Random) -> str:
    for row in _KEYBOARD:
        if letter in row:
            at = row.index(letter)
            return rng.choice(row[max(0, at - 1) : at] + row[at + 1 : at + 2])
    return letter


def normalise(text: str) -> str:
    """Lower case, letters and digits only: two wordings that a reader would call the same are equal."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
