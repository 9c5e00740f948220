"""How many texts a body holds is known before it is parsed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from server.errors import ApiError
from server.jsonbody import MAX_TEXTS, _texts, read_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('\\"ab,:é\n', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('\\"k', max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


def count(value: Any) -> int:
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        return sum(map(count, value))
    return sum(1 + count(inner) for inner in value.values()) if isinstance(value, dict) else 0


@given(VALUES, st.booleans())
def test_texts_are_counted_exactly(value: Any, ascii_only: bool) -> None:
    assert _texts(json.dumps(value, ensure_ascii=ascii_only).encode()) == count(value)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_the_limit() -> None:
    async def read(texts: int) -> Any:
        body = json.dumps({"x": ["\\"] * (texts - 1)}).encode()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body}

        return await read_json(Headers({"content-type": "application/json"}), receive, 1 << 24, 10**6)

    assert len((await read(MAX_TEXTS))["x"]) == MAX_TEXTS - 1
    with pytest.raises(ApiError) as caught:
        await read(MAX_TEXTS + 1)
    assert caught.value.status == 413
