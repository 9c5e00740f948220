"""Which tensors a safetensors file holds, by its header: no weight is read.

The library checks what somebody else wrote: ranges lie in the file, do not overlap, match dtype and shape,
and leave nothing uncovered, so that no tensor can show bytes that are not its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelError


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file in the checkpoint's folder; its dtype as safetensors calls it."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, by name.

    Raises:
        ModelError: truncated, not safetensors, or inconsistent; names the file and what is wrong.
    """
    from safetensors import SafetensorError, safe_open  # not needed by a model without files

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
            return {
                name: TensorInfo(path.name, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{path.name} is cut short or is not a safetensors file ({why}).") from error
