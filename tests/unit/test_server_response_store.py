"""The store of responses: bounds, fairness, conversations."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.response_store import ResponseStore, Stored


def stored(size: int, previous: str | None = None) -> Stored:
    return Stored(b"x" * size, b"", b"", previous)


def test_what_was_not_used_for_longest_goes_first() -> None:
    store = ResponseStore(max_responses=2)
    for name in ("a", "b"):
        store.put("t", name, stored(1))
    assert store.get("t", "a") is not None
    store.put("t", "c", stored(1))
    assert store.get("t", "b") is None and store.get("t", "a") is not None
    assert len(store) == 2


def test_nobody_pushes_out_what_others_keep() -> None:
    store = ResponseStore(max_bytes=100)
    store.put("small", "mine", stored(10))
    for number in range(50):
        store.put("large", str(number), stored(30))
    assert store.get("small", "mine") is not None
    assert store.bytes <= 100


def test_what_is_larger_than_everything_is_not_kept() -> None:
    store = ResponseStore(max_bytes=100)
    store.put("t", "huge", stored(101))
    assert store.get("t", "huge") is None and len(store) == store.bytes == 0


def test_a_conversation_in_order_or_not_at_all() -> None:
    store = ResponseStore()
    store.put("t", "a", stored(1))
    store.put("t", "b", stored(2, "a"))
    store.put("t", "c", stored(3, "b"))
    chain = store.chain("t", "c")
    assert chain is not None and [entry.size for entry in chain] == [1, 2, 3]
    assert store.chain("other", "c") is None
    store.remove("t", "a")
    assert store.chain("t", "c") is None


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("xyzw"), st.integers(0, 40), st.booleans()),
        max_size=60,
    )
)
def test_the_books_are_right(steps: list[tuple[str, str, int, bool]]) -> None:
    store = ResponseStore(max_responses=5, max_bytes=100)
    for tenant, name, size, put in steps:
        if put:
            store.put(tenant, name, stored(size))
        else:
            was_there = store.get(tenant, name) is not None
            assert store.remove(tenant, name) == was_there
        kept = [found for t in "ab" for n in "xyzw" if (found := store.get(t, n)) is not None]
        assert len(store) == len(kept) <= 5
        assert store.bytes == sum(entry.size for entry in kept) <= 100
