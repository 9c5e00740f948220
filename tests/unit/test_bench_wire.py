"""The load generator's HTTP and event parsers, fed bytes in every way a network may cut them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.wire import EventParser, ResponseParser, WireError

CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Odd:  value \r\n\r\n"
    b"5\r\nhello\r\n7;ext=1\r\n world!\r\n0\r\nTrailer: x\r\n\r\n"
)
PLAIN = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\nConnection: close\r\n\r\nnope"


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[low:high] for low, high in pairwise(edges)]


@given(st.lists(st.integers(0, 500), max_size=12))
def test_a_chunked_body_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    parser = ResponseParser()
    body = b"".join(parser.feed(piece) for piece in pieces_of(CHUNKED, cuts))
    assert (parser.status, body, parser.done) == (200, b"hello world!", True)
    assert parser.keep_alive


@given(st.lists(st.integers(0, 500), max_size=6))
def test_a_body_with_a_length_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    parser = ResponseParser()
    body = b"".join(parser.feed(piece) for piece in pieces_of(PLAIN, cuts))
    assert (parser.status, body, parser.done) == (404, b"nope", True)
    assert not parser.keep_alive


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.0 200 OK\r\n\r\nabc") == b"abc"
    before = parser.done
    parser.feed_eof()
    assert (before, parser.done) == (False, True)
    assert not parser.keep_alive


def test_an_empty_body_is_complete_at_once() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") == b""
    assert parser.done


def test_an_interim_response_is_passed_over() -> None:
    parser = ResponseParser()
    assert parser.feed(b"HTTP/1.1 100 Continue\r\n\r\n") == b""
    before = parser.status, parser.done
    assert (parser.feed(PLAIN), before) == (b"nope", (0, False))
    assert (parser.status, parser.done) == (404, True)


@pytest.mark.parametrize("cut", [0, 10, len(CHUNKED) - 1])
def test_a_connection_closed_early_is_an_error(cut: int) -> None:
    parser = ResponseParser()
    parser.feed(CHUNKED[:cut])
    with pytest.raises(WireError):
        parser.feed_eof()


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_not_http_is_an_error(data: bytes) -> None:
    with pytest.raises(WireError):
        ResponseParser().feed(data)


EVENTS = (
    b'data: {"a": 1}\n\n'
    b": a comment keeps the connection warm\n\n"
    b"event: ping\ndata: two\ndata:lines\nid: 7\n\n"
    b"data: [DONE]\r\n\r\n"
)


@given(st.lists(st.integers(0, 500), max_size=12))
def test_events_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    parser = EventParser()
    found = [data for piece in pieces_of(EVENTS, cuts) for data in parser.feed(piece)]
    assert found == [b'{"a": 1}', b"two\nlines", b"[DONE]"]
