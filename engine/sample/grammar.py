"""Grammars compiled to token masks by llguidance, which is imported here and nowhere else.

    Grammar -> source for llguidance -> LLMatcher, walked as far as it is forced -> kept -> a copy per choice

Knows the tokenizer's bytes and what llguidance accepts; not requests, rows or logits. Compiling runs without
the interpreter lock, within limits on sizes and fuel, and no single step of a matcher may take long: whoever
sends a grammar that is too complex is told so, and nobody else waits for it.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidRequest, ModelError
from engine.grammar import Grammar, GrammarKind
from engine.text.tokenizer import Tokenizer

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
except ImportError:  # the engine works without; only grammars are refused
    INSTALLED = False
else:
    INSTALLED = True

KEPT_GRAMMARS = 64
# Tokens that a grammar forces from its start on, tried while compiling: some faults show only then.
TRIED_TOKENS = 8
# Between the values of JSON: nothing, a space, or a line break with as much indentation as anybody needs.
# Without a bound a model can go on with white space for ever.
WHITESPACE = r"[ ]|\n[ \t]{0,32}"

TOO_COMPLEX = "the grammar is too complex to follow"
NOTHING_FITS = "no text fits the grammar"


class CompiledGrammars:
    """The Grammars of one model. Keeps the most recently used ones.

    Args:
        load: makes the model's tokenizer, whose byte table says what each token is. Called for the first
            grammar, by whoever compiles it: a large one takes a second or two.
        vocab_size: of the model, which may be larger than the tokenizer's or smaller.
        eos_token_ids: the model's ends of turn, allowed where the grammar may end.
    """

    def __init__(self, load: Callable[[], Tokenizer], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._load: Callable[[], _Vocabulary] = lambda: _Vocabulary(load(), vocab_size, tuple(eos_token_ids))
        self._loading = threading.Lock()
        self._loaded: _Vocabulary | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[Grammar, _Start] = OrderedDict()

    def ready(self, grammar: Grammar) -> bool:
        return grammar in self._kept

    def start(self, grammar: Grammar) -> TokenMatcher:
        with self._lock:
            found = self._kept.get(grammar)
            if found is not None:
                self._kept.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar)
            with self._lock:
                self._kept[grammar] = found
                while len(self._kept) > KEPT_GRAMMARS:
                    self._kept.popitem(last=False)
        return found.matcher()

    def _compile(self, grammar: Grammar) -> _Start:
        if not INSTALLED:
            raise _refused("this server lacks the package llguidance")
        try:
            vocabulary = self._vocabulary()
        except ModelError:
            raise _refused("the model has no tokenizer") from None
        source = _source(grammar, vocabulary.control)
        matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=_limits())
        if matcher.is_error():
            raise _refused(_reason(matcher.get_error()))
        # Special tokens that a grammar of our own making names are meant; in anybody's Lark they are not.
        allowed = vocabulary.ordinary_W if grammar.kind is GrammarKind.LARK else None
        start = _Start(matcher, vocabulary, allowed)
        problem = _try(start.matcher())
        if problem is not None:
            raise _refused(problem)
        return start

    def _vocabulary(self) -> _Vocabulary:
        """Loaded once; others who need it meanwhile wait."""
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            return self._loaded


class TokenMatcher:
    """See engine.grammar.Matcher. Not thread-safe."""

    __slots__ = ("_allowed_W", "_matcher", "_vocabulary", "ended")

    def __init__(
        self, matcher: LLMatcher, vocabulary: _Vocabulary, allowed_W: NDArray[np.uint32] | None
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._allowed_W = allowed_W
        self.ended = False

    @property
    def num_words(self) -> int:
        return self._vocabulary.num_words

    def take(self, token_id: int) -> None:
        matcher = self._matcher
        matcher.consume_token(token_id)
        self.ended = matcher.is_stopped() and not matcher.is_error()

    def fill(self, words_W: NDArray[np.uint32]) -> str | None:
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
        if matcher.is_error():
            return NOTHING_FITS if "NoExtension" in matcher.get_error() else TOO_COMPLEX
        if self._allowed_W is not None:
            words_W &= self._allowed_W
        if self._vocabulary.goes_on(words_W):
            return None
        # Nothing but an end may follow: no need to draw one.
        self.ended = matcher.is_accepting()
        return None if self.ended else NOTHING_FITS


class _Start:
    """A compiled grammar at its beginning."""

    def __init__(
        self, matcher: LLMatcher, vocabulary: _Vocabulary, allowed_W: NDArray[np.uint32] | None
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._allowed_W = allowed_W

    def matcher(self) -> TokenMatcher:
        return TokenMatcher(self._matcher.deep_copy(), self._vocabulary, self._allowed_W)


class _Vocabulary:
    """The model's tokens for llguidance, and the words of a mask.

    llguidance wants an end-of-sequence token; a model without one gets an id that its logits do not reach.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        if tokenizer.byte_table is None:
            raise ModelError("The tokenizer has no fixed text for each token.")
        self.control = tokenizer.control
        size = max(vocab_size, tokenizer.vocab_size)
        self._eos = list(eos_token_ids) or [size]
        self._size = max(size, max(self._eos) + 1)
        self.num_words = -(-self._size // 32)
        special = sorted(tokenizer.special_ids | set(tokenizer.control.values()) | set(self._eos))
        ends_W = self._words(self._eos)
        beyond_W = self._words(range(vocab_size, self._size))
        self._goes_on_W = ~(ends_W | beyond_W)
        self.ordinary_W = ~self._words(special) | ends_W
        tokens = self._tokens(tokenizer, special)
        wrapper: Any = _Wrapper(tokenizer, tokens, special, self._eos[0])
        self.tokenizer = LLTokenizer(wrapper, eos_token=self._eos)

    def _words(self, ids: Sequence[int]) -> NDArray[np.uint32]:
        bits = np.zeros(self.num_words * 32, dtype=np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def goes_on(self, words_W: NDArray[np.uint32]) -> bool:
        """Whether a token that is no end is among those allowed."""
        return bool(np.bitwise_and(words_W, self._goes_on_W).any())

    def _tokens(self, tokenizer: Tokenizer, special: Sequence[int]) -> list[bytes]:
        """The bytes of each token; llguidance takes special ones by name, where a grammar names them."""
        table = [*(tokenizer.byte_table or ()), *[b""] * (self._size - tokenizer.vocab_size)]
        for token_id in special:
            table[token_id] = tokenizer.token_string(token_id).encode() or f"<|end {token_id}|>".encode()
        return table


# Some tokenizers put a space before a text that begins with a letter; nobody writes this character.
_LEAD = "\x02"


class _Wrapper:
    """What llguidance asks of a tokenizer: how it would itself write a text that the grammar forces."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos_id: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos_id
        self._lead = tokenizer.encode(_LEAD, add_special_tokens=False)

    def __call__(self, text: str) -> list[int]:
        """Ids that spell the text, as the model's own encoding does in the middle of one."""
        data = text.encode()
        for lead in ([], self._lead):
            ids = self._encode(_LEAD + text if lead else text)
            if ids[: len(lead)] == lead and self._spelled(ids[len(lead) :]) == data:
                return ids[len(lead) :]
        return self._greedy(data)

    def _encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except InvalidRequest:
            return []

    def _spelled(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._tokenizer.token_bytes, ids))

    @functools.cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        special = set(self.special_token_ids)
        return {token: i for i, token in enumerate(self.tokens) if token and i not in special}

    def _greedy(self, data: bytes) -> list[int]:
        """The longest token, again and again, as far as there are any."""
        ids, start = [], 0
        longest = max(map(len, self._by_bytes), default=1)
        while start < len(data):
            ends = range(min(len(data), start + longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._by_bytes), None)
            if end is None:
                break
            ids.append(self._by_bytes[data[start:end]])
            start = end
        return ids


def _limits() -> LLParserLimits:
    """A matcher's memory is what bounds the number of states; what its steps may take, the rest."""
    return LLParserLimits(max_lexer_states=50_000, step_lexer_fuel=100_000, verbose_errors=False)


def _try(matcher: TokenMatcher) -> str | None:
    """Follows a grammar while it leaves no choice; returns what is wrong with it."""
    words_W = np.zeros(matcher.num_words, dtype=np.uint32)
    for _ in range(TRIED_TOKENS):
        if (problem := matcher.fill(words_W)) is not None:
            return problem
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little"))
        if matcher.ended or len(allowed) != 1:
            return None
        matcher.take(int(allowed[0]))
    return None


# ---- sources


def _source(grammar: Grammar, control: Mapping[str, int]) -> str:
    kind, text = grammar.kind, grammar.text
    if kind is GrammarKind.JSON_OBJECT:
        text = '{"type":"object"}'
    if kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT):
        return _json_source(text)
    if kind is GrammarKind.REGEX:
        return LLMatcher.grammar_from_regex(ascii_classes(text))
    if kind is GrammarKind.CHOICE:
        return LLMatcher.grammar_from_regex("|".join(re.escape(choice) for choice in json.loads(text)))
    if kind is GrammarKind.LARK:
        if "::=" in text:
            raise _refused("it is written in EBNF; write it in Lark's notation (start: ...)")
        return LLMatcher.grammar_from_lark(text)
    return LLMatcher.grammar_from_lark(tag_source(json.loads(text), control))


def _json_source(schema: str) -> str:
    portable = _ascii_patterns(json.loads(schema))
    if isinstance(portable, dict):
        portable.pop("x-guidance", None)  # the compiler's own options
    try:
        return LLMatcher.grammar_from_json_schema(
            json.dumps(portable), overrides={"whitespace_pattern": WHITESPACE}
        )
    except ValueError as error:
        raise _refused(_reason(str(error))) from error


def ascii_classes(pattern: str) -> str:
    r"""Has `\d` and `\w` mean ASCII, as JSON Schema says and as whoever reads the number expects.

    >>> ascii_classes(r"\d+[\d.]\\d")
    '[0-9]+[0-9.]\\\\d'
    """
    out, inside = [], False
    for piece in re.findall(r"\\.|[^\\]|\\$", pattern, re.DOTALL):
        if piece in _ASCII:
            piece = _ASCII[piece] if inside else f"[{_ASCII[piece]}]"
        elif piece in _NOT_ASCII and not inside:
            piece = f"[^{_NOT_ASCII[piece]}]"
        elif piece in "[]":
            inside = piece == "["
        out.append(piece)
    return "".join(out)


_ASCII = {r"\d": "0-9", r"\w": "0-9A-Za-z_"}
_NOT_ASCII = {r"\D": "0-9", r"\W": "0-9A-Za-z_"}
_VALUES = ("enum", "const", "default", "examples", "example")


def _ascii_patterns(schema: Any) -> Any:
    """The schema with its patterns rewritten; values in it are left as they are."""
    if isinstance(schema, list):
        return [_ascii_patterns(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for name, inner in schema.items():
        if name == "pattern" and isinstance(inner, str):
            found[name] = ascii_classes(inner)
        elif name == "patternProperties" and isinstance(inner, dict):
            found[name] = {ascii_classes(key): _ascii_patterns(value) for key, value in inner.items()}
        else:
            found[name] = inner if name in _VALUES else _ascii_patterns(inner)
    return found


def tag_source(tag: Any, control: Mapping[str, int]) -> str:
    """Lark for {"structures": [{"begin", "schema", "end"}], "triggers": [...]}.

    Text is free up to a trigger. From there on it is one of the structures whose begin has that trigger in
    front. A trigger that is one of the model's control tokens is that token. With "forced" ("one" or "some")
    there are no triggers and no free text: one structure, or several in a row, with "first", "between" and
    "last" around them. Before them there may be "thoughts", which are free: what opens and what closes them.
    """
    structures, triggers, forced = _tag_parts(tag)
    rules = []
    for i, structure in enumerate(structures):
        begin = structure["begin"]
        trigger = "" if forced else next((t for t in triggers if begin.startswith(t)), None)
        if trigger is None:
            raise _refused(f"structure {i} begins with none of the triggers")
        head = ""
        if trigger in control:
            head = f"TEXT <[{control[trigger]}]>"
        elif trigger:
            head = f"head_{i}"
            rules.append(f"head_{i}[lazy]: TEXT {json.dumps(trigger)}")
        begin, end = _quoted(begin[len(trigger) :], control), _quoted(structure["end"], control)
        rules.append(f"tag_{i}: {head} {begin} {_embedded(structure['schema'])} {end}")
    either = " | ".join(f"tag_{i}" for i in range(len(structures)))
    if not forced:
        return "\n".join(["%llguidance {}", f"start: ({either})* rest", "rest: TEXT", _TEXT, *rules])
    first, between, last = (_quoted(tag.get(name, ""), control) for name in _AROUND)
    more = f"({between} ({either}))*" if forced == "some" else ""
    thoughts, of_thoughts = _thoughts(tag.get("thoughts"), control)
    start = f"start: {thoughts} {first} ({either}) {more} {last}"
    return "\n".join(["%llguidance {}", start, *of_thoughts, *rules])


_TEXT = r"TEXT: /(.|\n)*/"
_AROUND = ("first", "between", "last")


def _thoughts(tags: Any, control: Mapping[str, int]) -> tuple[str, list[str]]:
    """Free text up to a tag, and what of it the beginning refers to."""
    if tags is None:
        return "", []
    opening, close = tags
    if close in control:
        until = f"thoughts: TEXT <[{control[close]}]>"
    else:
        until = f"thoughts[lazy]: TEXT {json.dumps(close)}"
    rules = [until, _TEXT, r"GAP: /[ \n]{1,4}/"]
    return f"({_quoted(opening, control)} thoughts GAP?){'?' if opening else ''}", rules


def _embedded(schema: Any) -> str:
    portable = _ascii_patterns(schema)
    if isinstance(portable, dict):
        portable = {**portable, "x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps(portable)}"


def _tag_parts(tag: Any) -> tuple[list[Any], list[str], str | None]:
    tag = tag if isinstance(tag, dict) else {}
    structures, triggers, forced = (tag.get(name) for name in ("structures", "triggers", "forced"))
    if forced in ("one", "some"):
        triggers = []
    elif not isinstance(triggers, list) or not triggers:
        raise _refused("a structural tag needs lists of structures and triggers")
    if not isinstance(structures, list) or not structures:
        raise _refused("a structural tag needs lists of structures and triggers")
    if not all(isinstance(trigger, str) and trigger for trigger in triggers):
        raise _refused("each trigger must be a string that is not empty")
    if not all(isinstance(tag.get(name, ""), str) for name in _AROUND):
        raise _refused("what stands around the structures must be strings")
    thoughts = tag.get("thoughts", ["", "."])
    if not isinstance(thoughts, list) or [type(text) for text in thoughts] != [str, str] or not thoughts[1]:
        raise _refused("thoughts are what opens and what closes them")
    for structure in structures:
        if not isinstance(structure, dict) or not isinstance(structure.get("schema"), dict | bool):
            raise _refused("each structure needs a schema")
        if not isinstance(structure.get("begin"), str) or not isinstance(structure.get("end"), str):
            raise _refused("each structure needs a begin and an end")
    return structures, triggers, forced if forced in ("one", "some") else None


def _quoted(text: str, control: Mapping[str, int]) -> str:
    """Text for a Lark rule, with control tokens as tokens."""
    if not text:
        return ""
    if not control:
        return json.dumps(text)
    pattern = "|".join(re.escape(name) for name in sorted(control, key=len, reverse=True))
    pieces = [piece for piece in re.split(f"({pattern})", text) if piece]
    return " ".join(f"<[{control[piece]}]>" if piece in control else json.dumps(piece) for piece in pieces)


# ---- refusals

_UNSUPPORTED = re.compile(r"Unimplemented keys: \[(.*)\]")
_REMOTE = re.compile(r"Resource '(.*)' is not present")


def _refused(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The grammar cannot be compiled: {reason}.", "grammar")


def _reason(error: str) -> str:
    """llguidance's complaint as part of a sentence: its first line, without what is ours alone."""
    if "panic" in error:
        return "it is too large"
    if found := _UNSUPPORTED.search(error):
        return f"the schema has keywords that are not supported: {found[1]}"
    if found := _REMOTE.search(error):
        return f"$ref leaves the schema ({found[1][:80]}), and nothing is fetched"
    if "recursion limit" in error:
        return "it is nested too deeply"
    first, *others = error.removesuffix("<non-verbose/>").strip().splitlines() or [""]
    detail = next((line for line in others if line.startswith("error: ")), "").removeprefix("error: ")
    return " ".join(filter(None, (first.strip(), detail)))[:300].rstrip(".:") or "it is not valid"
