"""Headers of safetensors files that somebody else made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ModelError
from engine.model.headers import TensorInfo, read_header
from tests.helpers.raw_checkpoints import safetensors_bytes, write_tensors


def tensor(start: int, end: int, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    return message


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": (2, 3), "scalar": (), "empty": (0, 4)}, "BF16")
    assert read_header(path) == {
        "a": TensorInfo(path.name, "BF16", (2, 3)),
        "scalar": TensorInfo(path.name, "BF16", ()),
        "empty": TensorInfo(path.name, "BF16", (0, 4)),
    }


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^a\.safetensors cannot be read: No such file"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, (50).to_bytes(8, "little") + b"{}", b"\xff" * 40])
def test_cut_short(tmp_path: Path, content: bytes) -> None:
    assert "cut short" in refusal(tmp_path / "a.safetensors", content)


def test_a_header_too_long_to_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((200 << 20).to_bytes(8, "little"))
        file.truncate((200 << 20) + 100)
    with pytest.raises(ModelError, match="too large"):
        read_header(path)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"[]", b"3"])
def test_not_the_json_it_should_be(tmp_path: Path, text: bytes) -> None:
    assert "in header: " in refusal(tmp_path / "a.safetensors", safetensors_bytes(text))


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor(0, 8), "b": tensor(4, 12)},
        {"a": tensor(0, 8), "b": tensor(0, 8)},
        {"a": tensor(0, 8), "b": tensor(10, 18)},
        {"a": tensor(4, 12)},
        {"a": tensor(0, 8), "b": tensor(8, 24, (4,))},
        {"a": tensor(0, 8)},
        {"a": tensor(0, 16)},
        {"a": tensor(8, 0)},
        {"a": tensor(0, 8, (1 << 40, 1 << 40))},
        {"a": tensor(0, 8, (-2,))},
        {"a": tensor(-8, 0)},
        {"a": tensor(0, 8, (True, 2))},
        {"a": tensor(0, 8, dtype="Q4")},
        {"a": tensor(0, 8, dtype=None)},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}},
        {"a": [1]},
        {"x" * 10_000: None},
    ],
)
def test_inconsistent(tmp_path: Path, header: object) -> None:
    message = refusal(tmp_path / "a.safetensors", safetensors_bytes(header, bytes(16)))
    assert len(message) < 300


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("headers") / "a.safetensors"


@settings(deadline=None)  # reading a file takes as long as the machine is busy
@given(content=st.binary(max_size=200), header=st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(scratch: Path, content: bytes, header: bytes) -> None:
    for data in (content, safetensors_bytes(header, content)):
        scratch.write_bytes(data)
        try:
            read_header(scratch)
        except ModelError:
            continue


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1), at=st.data())
def test_ranges_that_miss_the_data_by_a_byte_are_refused(
    scratch: Path, sizes: list[int], at: st.DataObject
) -> None:
    write_tensors(scratch, {f"t{i}": (size,) for i, size in enumerate(sizes)}, "U8")
    found = {name: tensor.shape for name, tensor in read_header(scratch).items()}
    assert found == {f"t{i}": (size,) for i, size in enumerate(sizes)}

    moved = at.draw(st.integers(0, len(sizes) - 1))
    header = {}
    for i, size in enumerate(sizes):
        start = sum(sizes[:i]) + (i == moved)
        header[f"t{i}"] = tensor(start, start + size, (size,), "U8")
    scratch.write_bytes(safetensors_bytes(header, bytes(sum(sizes))))
    with pytest.raises(ModelError):
        read_header(scratch)
