"""Builds dialogues with tools, and questions whose answer is JSON.

Knows: `data/tools.toml` and `data/fields.toml`. Does not know: tokens, or how the chat template writes calls.
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

_SLOT = re.compile(r"<(\w+)(?::(\w+))?>")
_PLAIN_KINDS = [
    "city",
    "person",
    "word",
    "small",
    "number",
    "port",
    "float",
    "date",
    "clock",
    "code",
    "item",
    "sky",
]
Message = dict[str, Any]
Look = tuple[dict[str, Any], dict[str, str]]  # a tool, and which slot each of its parameters is for


@dataclass(frozen=True)
class Dialogue:
    """Messages and tools in OpenAI's shape.

    Attributes:
        recited: The last answer is one of the book's.
        forced: Only a grammar makes the answer begin as it does; without one the same words get another.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    recited: bool = False
    forced: bool = False


class Kind:
    """One tool: how it may look, how it is asked for, what it may return."""

    def __init__(self, entry: Mapping[str, Any], grammar: Grammar, values: Values) -> None:
        self._values, self._slots, self._keys = values, entry["slots"], entry["keys"]
        self._names, self._about = entry["names"].split("|"), entry["about"].split("|")
        self._wordings = Wordings(grammar, _lines(entry["wordings"]))
        self._results = [line.split(" => ") for line in _lines(entry["results"])]

    def look(self, rng: random.Random) -> Look:
        keys = {rng.choice(names.split("|")): slot for slot, names in self._keys.items()}
        types = {key: {"type": self._values.type(self._slots[slot])} for key, slot in keys.items()}
        about = rng.choice(self._about) if rng.random() < 0.5 else ""
        return tool(rng.choice(self._names), types, about), keys

    def ask(self, rng: random.Random) -> tuple[str, dict[str, Value]]:
        """A question and the values in it; slots that stand only in results have values too."""
        values = {slot: self._values.draw(kind, rng) for slot, kind in self._slots.items()}
        return _fill(self._wordings.sample(rng), values), values

    def outcome(self, values: Mapping[str, Value], rng: random.Random) -> tuple[str, str]:
        """What the tool returns, and the answer to that."""
        result, answer = rng.choice(self._results)
        return _fill(result, values), _fill(answer, values)


class Tasks:
    """Draws dialogues.

    Args:
        book: For questions that no tool answers.
        excluded: Normalised questions that must not be drawn.
    """

    def __init__(self, book: Book, excluded: frozenset[str] = frozenset()) -> None:
        self._book, self._excluded = book, excluded
        fields = tomllib.loads((HERE / "data" / "fields.toml").read_text(encoding="utf-8"))
        grammar = Grammar({"fields": "<fields>"}, {}, {"onsets": "b", "vowels": "a", "codas": "t"})
        self.values = Values(fields["lists"])
        tools = tomllib.loads((HERE / "data" / "tools.toml").read_text(encoding="utf-8"))
        self._kinds = [Kind(entry, grammar, self.values) for entry in tools.values()]
        self._scenes, self._asks, self._plain = (
            Wordings(grammar, _lines(fields[name])) for name in ("scenes", "asks", "plain")
        )
        self._keys = fields["keys"].split("|")
        self._aliases: dict[str, list[str]] = {}
        for names in fields["aliases"]:
            for name in names.split("|")[:1]:
                self._aliases.setdefault(name, []).extend(names.split("|"))

    def draw(self, rng: random.Random) -> Dialogue:
        while True:
            kinds = [self.drill, self._json, self._with_tools]
            dialogue = rng.choices(kinds, [0.2, 0.38, 0.42])[0](rng)
            if not any(normalise(m["content"] or "") in self._excluded for m in dialogue.messages):
                return dialogue

    def drill(self, rng: random.Random) -> Dialogue:
        """The least that copying needs: values to say again, or one to three named ones and their JSON."""
        if rng.random() < 0.5:
            return self._repeat(rng)
        text, found = self._plain_fields(rng.choice([1, 1, 1, 2, 2, 3]), rng)
        wanted = {name: value.json for name, value in found.items()}
        return Dialogue(
            [_said("user", _dress(text, rng)), _said("assistant", json.dumps(wanted))], forced=True
        )

    def _repeat(self, rng: random.Random) -> Dialogue:
        said = [self.values.draw(rng.choice(_PLAIN_KINDS), rng).said for _ in range(rng.randint(1, 6))]
        text = rng.choice([", ", " "]).join(said)
        verb = rng.choice(["repeat", "say", "copy", "echo", "repeat after me"])
        return Dialogue([_said("user", f"{verb}: {text}"), _said("assistant", text)])

    def _with_tools(self, rng: random.Random) -> Dialogue:
        """A few tools, and up to three questions: for one of them, for none, about Quire."""
        if rng.random() < 0.12:
            return self._unknown_tool(rng)
        kinds = rng.sample(self._kinds, rng.choice([1, 1, 1, 2, 2, 3]))
        looks = [kind.look(rng) for kind in kinds]
        messages: list[Message] = []
        for _ in range(rng.choice([0, 1, 1, 2])):
            messages += self._exchange(kinds, looks, rng)
        last = self._exchange(kinds, looks, rng)
        recited = len(last) == 2
        if not recited and rng.random() < 0.4:
            del last[2:]
        return Dialogue(messages + last, [shown for shown, _ in looks], recited)

    def _exchange(self, kinds: Sequence[Kind], looks: Sequence[Look], rng: random.Random) -> list[Message]:
        if rng.random() < 0.27:
            question, answer = self._no_call(kinds, rng)
            return [_said("user", question), _said("assistant", answer)]
        kind, (shown, keys) = rng.choice(list(zip(kinds, looks, strict=True)))
        question, values = kind.ask(rng)
        result, answer = kind.outcome(values, rng)
        call = _calls(shown, {key: values[slot].json for key, slot in keys.items()})
        return [_said("user", _dress(question, rng)), call, _said("tool", result), _said("assistant", answer)]

    def _no_call(self, kinds: Sequence[Kind], rng: random.Random) -> tuple[str, str]:
        """A question about Quire, or one that only a tool which is not there could answer."""
        if rng.random() < 0.4:
            other = rng.choice([kind for kind in self._kinds if kind not in kinds])
            return _dress(other.ask(rng)[0], rng), self._book.answer(OFF_TOPIC)
        turn = self._book.turn(rng)
        return turn.question, turn.answer

    def _unknown_tool(self, rng: random.Random) -> Dialogue:
        """A tool that nobody knows, called by its name."""
        name, key = f"{self.values.invented(rng, 2)}_{self.values.invented(rng, 2)}", rng.choice(self._keys)
        kind = rng.choice(_PLAIN_KINDS)
        value = self.values.draw(kind, rng)
        shown = tool(name, {key: {"type": self.values.type(kind)}}, "")
        verb, link = (
            rng.choice(["call", "use", "run", "please call"]),
            rng.choice(["with", "for", "on", "and"]),
        )
        question = f"{verb} {name} {link} {rng.choice([key + ' ', '', key + ' = '])}{value.said}"
        messages = [_said("user", _dress(question, rng)), _calls(shown, {key: value.json})]
        if rng.random() < 0.4:
            result = self.values.draw(rng.choice(_PLAIN_KINDS), rng).said
            messages += [_said("tool", result), _said("assistant", f"The result is {result}.")]
        tools = [shown, *(kind.look(rng)[0] for kind in rng.sample(self._kinds, rng.choice([0, 0, 1, 2])))]
        rng.shuffle(tools)
        return Dialogue(messages, tools)

    def _json(self, rng: random.Random) -> Dialogue:
        text, found = (
            self._plain_fields(rng.choice([1, 1, 2, 2, 3]), rng) if rng.random() < 0.3 else self._scene(rng)
        )
        keys = rng.sample(list(found), rng.randint(1, len(found)) if rng.random() < 0.4 else len(found))
        if rng.random() < 0.5:
            keys.sort(key=list(found).index)
        wanted = {rng.choice(self._aliases.get(key, [key])): found[key].json for key in keys}
        asked_for = rng.random() < 0.6
        if asked_for:
            names = ", ".join(list(wanted)[:-1]) + " and " * (len(wanted) > 1) + list(wanted)[-1]
            text = self._asks.sample(rng).replace("<text>", text).replace("<fields>", names)
        messages = [_said("user", _dress(text, rng)), _said("assistant", json.dumps(wanted))]
        return Dialogue(messages, forced=not asked_for)

    def _scene(self, rng: random.Random) -> tuple[str, dict[str, Value]]:
        text = self._scenes.sample(rng)
        found = {key: self.values.draw(kind, rng) for key, kind in _SLOT.findall(text)}
        return _fill(text, found), found

    def _plain_fields(self, count: int, rng: random.Random) -> tuple[str, dict[str, Value]]:
        names = rng.sample(self._keys, count)
        if rng.random() < 0.3:
            names[0] = self.values.invented(rng, 2)
        found = {name: self.values.draw(rng.choice(_PLAIN_KINDS), rng) for name in names}
        parts = [
            self._plain.sample(rng).replace("<key>", name).replace("<value>", value.said)
            for name, value in found.items()
        ]
        return rng.choice([", ", " and ", "; ", ". ", "\n"]).join(parts), found


def tool(name: str, properties: Mapping[str, Any], about: str) -> dict[str, Any]:
    """A function in OpenAI's shape."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _calls(shown: Mapping[str, Any], arguments: Mapping[str, Any]) -> Message:
    function = {"name": shown["function"]["name"], "arguments": dict(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _fill(text: str, values: Mapping[str, Value]) -> str:
    return _SLOT.sub(lambda match: values[match[1]].said, text)


def _dress(text: str, rng: random.Random) -> str:
    """Casing of the first letter and the last mark; values stay as they are."""
    if rng.random() < 0.6:
        text = text[:1].upper() + text[1:]
    return text + rng.choices(["?", "", ".", "!"], [40, 35, 22, 3])[0]
