"""Stop strings: the same result as looking at the whole text, however it arrives in pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text.stops import StopChecker


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Reads character by character and stops as soon as a stop string is complete; the longest wins."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def stream(checker: StopChecker, pieces: list[str]) -> str:
    shown = []
    for piece in pieces:
        shown.append(checker.push(piece))
        if checker.matched is not None:
            return "".join(shown)
    return "".join((*shown, checker.finish()))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4),
    include=st.booleans(),
)
def test_pieces_do_not_matter(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include=include)
    assert (stream(checker, pieces), checker.matched) == naive("".join(pieces), stops, include)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=10),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_shown_text_is_never_taken_back_and_never_held_in_vain(pieces: list[str], stops: list[str]) -> None:
    checker, shown, text = StopChecker(stops), "", ""
    for piece in pieces:
        shown, text = shown + checker.push(piece), text + piece
        if checker.matched is not None:
            return
        held = text[len(shown) :]
        assert shown + held == text
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_min_tokens_shows_what_would_stop() -> None:
    checker = StopChecker(["END"])
    assert checker.push("an END", armed=False) == "an END"
    assert checker.matched is None
    assert checker.push(" and EN") == " and "
    assert checker.push("D tail") == ""
    assert checker.matched == "END"


def test_without_stops_nothing_is_held() -> None:
    checker = StopChecker([])
    assert checker.push("anything") == "anything"
    assert checker.finish() == ""
