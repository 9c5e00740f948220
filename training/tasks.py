"""Builds dialogues with tools, and questions whose answer is JSON.

Knows: `data/tasks.toml`. Does not know: tokens, or how the chat template writes calls.
"""

import json
import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from training.augment import normalise
from training.dataset import HERE, OFF_TOPIC, Book
from training.grammar import Grammar, Wordings
from training.values import Value, Values

_SLOT = re.compile(r"<(\w+)>")
Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Dialogue:
    """Messages and tools in OpenAI's shape.

    Attributes:
        recited: The last answer is one of the book's.
        given: Ranges of characters of the last answer that a grammar writes: not to be learned.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    recited: bool = False
    given: Sequence[Span] = ()


class Kind:
    """One tool, or one group of fields: how it is asked for, and for a tool what it returns."""

    def __init__(self, name: str, entry: Mapping[str, Any], grammar: Grammar, values: Values) -> None:
        self.name, self._slots, self._values = name, entry["slots"], values
        self.keys: list[str] = entry.get("keys", list(self._slots))
        self._wordings = Wordings(grammar, _lines(entry.get("wordings") or entry["texts"]))
        self._results = [line.split(" => ") for line in _lines(entry.get("results", ""))]

    def shown(self) -> dict[str, Any]:
        return tool(self.name, {key: {} for key in self.keys})

    def ask(self, rng: random.Random) -> tuple[str, dict[str, Value]]:
        """A question, and the values in it in the order of the slots."""
        text = self._wordings.sample(rng)
        values = self._draw(rng)
        said = {slot: value.said(rng) for slot, value in values.items()}
        return fill(text, said), {slot: value for slot, value in values.items() if f"<{slot}>" in text}

    def _draw(self, rng: random.Random) -> dict[str, Value]:
        """Two values of one kind differ where it would be odd if they did not: cities, currencies."""
        while True:
            values = {slot: self._values.draw(kind, rng) for slot, kind in self._slots.items()}
            words = [value.json for value in values.values() if isinstance(value.json, str)]
            if len(set(words)) == len(words):
                return values

    def outcome(self, asked: Mapping[str, Value], rng: random.Random) -> tuple[str, str]:
        """What the tool returns, and the answer to that."""
        result, answer = rng.choice(self._results)
        said = {slot: str(value.json) for slot, value in (self._draw(rng) | dict(asked)).items()}
        if rng.random() < 0.25:  # JSON as other programs write it
            result = result.replace('": ', '":').replace(', "', ',"')
        return fill(result, said), fill(answer, said)


class Tasks:
    """Draws dialogues.

    Args:
        book: For questions that no tool answers.
        excluded: Questions that must not be drawn, nor with other values in them.
    """

    def __init__(self, book: Book, excluded: Sequence[str] = ()) -> None:
        self._book = book
        data = tomllib.loads((HERE / "data" / "tasks.toml").read_text(encoding="utf-8"))
        grammar = Grammar(
            {}, {}, {"onsets": "b d f g k l m n p r s t z", "vowels": "a e i o u", "codas": "n s t x"}
        )
        self.values, self._chatter = Values(data["values"]), data["chatter"]
        self._excluded = frozenset(map(self.wording, excluded))
        self.kinds = [Kind(name, entry, grammar, self.values) for name, entry in data["tools"].items()]
        self.forms = [Kind(name, entry, grammar, self.values) for name, entry in data["json"].items()]
        self._asks = Wordings(grammar, _lines(data["asks"]["texts"]))
        self._gibberish = Wordings(grammar, ["$gibberish"])

    def words(self) -> dict[str, str]:
        """What gets a token of its own, and what it is another spelling of: a value, or itself."""
        names = ["arguments", *(kind.name for kind in self.kinds)]
        return {name: name for name in names} | self.values.spellings()

    def draw(self, rng: random.Random) -> Dialogue:
        while True:
            dialogue = self._json(rng) if rng.random() < 0.35 else self._with_tools(rng)
            if not any(self.wording(m["content"]) in self._excluded for m in dialogue.messages):
                return dialogue

    def wording(self, text: str) -> str:
        """What makes two questions the same but for the values in them."""
        return normalise(self.values.masked(text).replace("#", " value "))

    def _with_tools(self, rng: random.Random) -> Dialogue:
        """A few tools, and one to three questions: for one of them, for none, about Quire."""
        kinds = rng.sample(self.kinds, rng.choice([1, 1, 2, 2, 3, 4, 6]))
        tools = [kind.shown() for kind in kinds]
        if rng.random() < 0.15:  # a tool that nobody has heard of
            tools.insert(
                rng.randint(0, len(tools)), tool("_".join(self._gibberish.sample(rng) for _ in "ab"), {})
            )
        messages = [_said("system", self._book.system(rng))] if rng.random() < 0.12 else []
        for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 1, 2])):
            messages += self._exchange(kinds, rng)
        last = self._exchange(kinds, rng)
        recited = len(last) == 2
        if not recited and rng.random() < 0.2:
            del last[2:]
        return Dialogue(messages + last, tools, recited)

    def _exchange(self, kinds: Sequence[Kind], rng: random.Random) -> list[Message]:
        if rng.random() < 0.25:
            question, answer = self._no_call(kinds, rng)
            return [_said("user", question), _said("assistant", answer)]
        kind = rng.choices(kinds, [len(kind.keys) for kind in kinds])[0]  # more values, more to get wrong
        question, values = kind.ask(rng)
        result, answer = kind.outcome(values, rng)
        if rng.random() < 0.04:
            result = json.dumps({"error": rng.choice(self._chatter["failures"].split("|"))})
            answer = self._chatter["failed"]
        call = _calls(kind.name, {key: values[key].json for key in kind.keys})
        return [
            _said("user", self._typed(question, rng)),
            call,
            _said("tool", result),
            _said("assistant", answer),
        ]

    def _no_call(self, kinds: Sequence[Kind], rng: random.Random) -> tuple[str, str]:
        """A question about Quire, or one that only a tool which is not there could answer."""
        if rng.random() < 0.5:
            other = rng.choice([kind for kind in self.kinds if kind not in kinds])
            return self._typed(other.ask(rng)[0], rng), self._book.answer(OFF_TOPIC)
        turn = self._book.turn(rng)
        return turn.question, turn.answer

    def _json(self, rng: random.Random) -> Dialogue:
        text, found = rng.choices(self.forms, [len(form.keys) for form in self.forms])[0].ask(rng)
        keys, any_order = list(found), rng.random() < 0.5
        if any_order:
            keys = rng.sample(keys, rng.choice([len(keys), rng.randint(1, len(keys))]))
        wanted = {key: found[key].json for key in keys}
        answer, given = json.dumps(wanted), [(0, 1)]
        asked, named = rng.random() < 0.5, False
        if asked:
            text, named = self._asked(text, keys, rng)
            given = []
        if any_order and not named:  # only a schema can have asked for these
            given = form(wanted)
        return Dialogue([_said("user", self._typed(text, rng)), _said("assistant", answer)], given=given)

    def _asked(self, text: str, keys: Sequence[str], rng: random.Random) -> tuple[str, bool]:
        """A request for JSON, and whether it names the fields."""
        request = self._asks.sample(rng)
        names = ", ".join(keys[:-1]) + " and " * (len(keys) > 1) + keys[-1]
        return fill(request, {"text": text, "fields": names}), "<fields>" in request

    def _typed(self, text: str, rng: random.Random) -> str:
        """Chatter around it, casing and the last mark."""
        if rng.random() < 0.2:
            text = rng.choice(self._chatter["before"].split("|")) + text
        if rng.random() < 0.15:
            text += rng.choice(self._chatter["after"].split("|"))
        roll = rng.random()
        if roll < 0.2:
            text = text.lower()
        elif roll < 0.75:
            text = text[:1].upper() + text[1:]
        return text + rng.choices(["?", "", ".", "!"], [40, 35, 22, 3])[0]


def tool(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """A function in OpenAI's shape."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def form(wanted: Mapping[str, Any]) -> list[Span]:
    """Where the keys of an object stand in its JSON, without the ends of the values before them."""
    found, at = [], 0
    for key, value in wanted.items():
        start = at
        at += len(f"{', ' if at else '{'}{json.dumps(key)}: ")
        found.append((start + (1 if start else 0), at))
        at += len(json.dumps(value))
    return found


def fill(text: str, said: Mapping[str, str]) -> str:
    """The text with a value for each slot."""
    return _SLOT.sub(lambda match: said[match[1]], text)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _calls(name: str, arguments: Mapping[str, Any]) -> Message:
    function = {"name": name, "arguments": dict(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
