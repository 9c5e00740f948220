"""Stop strings: found across token borders, never shown in part and then regretted.

Knows text only. Token ids that stop, and how the end is reported, are others' business.
"""

from __future__ import annotations

from collections.abc import Iterable


class StopChecker:
    """Watches one choice's text for stop strings.

    Text that may be the beginning of a stop string is held back until the next text decides. At any time

        text so far = shown + held,  and no stop string ends within either.

    Args:
        stops: the strings; none of them empty.
        include: show the stop string itself.
    """

    __slots__ = ("_firsts", "_held", "_include", "_longest", "_stops", "matched")

    def __init__(self, stops: Iterable[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, armed: bool = True) -> str:
        """Takes new text and returns what may be shown; sets `matched` when a stop string was found.

        Args:
            text: follows what was pushed before.
            armed: False while fewer than min_tokens were generated: the text is shown and does not stop.
                A stop string that began then does not count.
        """
        if not self._stops:
            return text
        text = self._held + text
        if not armed:
            self._held = ""
            return text
        found = self._first(text)
        if found is not None:
            start, self.matched = found
            self._held = ""
            return text[: start + len(self.matched)] if self._include else text[:start]
        keep = self._may_begin(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Returns what was held back: the text ends here, so it began no stop string."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        """The stop string that is complete first; of several that end together, the longest."""
        found = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start, stop) for start, stop in found if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _may_begin(self, text: str) -> int:
        """Where the longest tail of `text` begins that is the beginning of a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return start
        return len(text)
