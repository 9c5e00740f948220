"""Reading a checkpoint's weights onto the device, one tensor of the model at a time.

At no time does more than one unpacked tensor exist beside what is already loaded: parts are copied straight
from the mapped file into their place in the fused tensor, cast on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from engine.dist.group import TensorGroup
from engine.errors import ModelError
from engine.model.checkpoint import Checkpoint
from engine.model.transformer import ModelWeights, Transformer
from engine.model.weights import Part, Slot
from kernels import api

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load(
    checkpoint: Checkpoint,
    *,
    dtype: str,
    device: torch.device | str,
    max_model_len: int,
    group: TensorGroup | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """Loads a checkpoint that was inspected.

    Args:
        dtype: compute dtype, "bfloat16", "float16" or "float32"; weights are cast to it.
        progress: called after each tensor with (bytes done, bytes in total), in the compute dtype.

    Raises:
        ModelError: a file changed or broke since the inspection.
    """
    if checkpoint.unused:
        some = ", ".join(checkpoint.unused[:3])
        logger.warning("%d tensors of the checkpoint are not used: %s", len(checkpoint.unused), some)
    dense: dict[str, Tensor] = {}
    linear: dict[str, api.PackedLinear] = {}
    done, total = 0, checkpoint.weight_bytes(dtype)
    for slot, weight, bias in _read_slots(checkpoint, DTYPES[dtype], torch.device(device)):
        done += sum(x.numel() * x.element_size() for x in (weight, bias) if x is not None)
        if slot.linear:
            linear[slot.name] = api.pack_linear(weight, bias)
        else:
            dense[slot.name] = weight
        del weight, bias
        if progress is not None:
            progress(done, total)
    if checkpoint.spec.tied_embeddings:
        # Packing leaves the embedding as it is: CUDA shares it, a CPU reads from it once more.
        linear["lm_head"] = api.pack_linear(dense["embed"], None)
    return Transformer(checkpoint.spec, ModelWeights(dense, linear), max_model_len, group)


def _read_slots(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Slot, Tensor, Tensor | None]]:
    """Each slot with its weight and bias. They are not named here: a name would keep them alive."""
    with ExitStack() as stack:
        files = _Files(checkpoint, stack)
        for slot in checkpoint.slots:
            bias_parts = slot.bias_parts
            yield (
                slot,
                files.join(slot.parts, dtype, device),
                files.join(bias_parts, dtype, device) if bias_parts else None,
            )


class _Files:
    """The checkpoint's files, each mapped when its first tensor is asked for."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._checkpoint = checkpoint
        self._stack = stack
        self._open: dict[str, Any] = {}

    def join(self, parts: tuple[Part, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The parts, one under the other, in memory of their own."""
        rows = sum(part.shape[0] for part in parts)
        joined = torch.empty((rows, *parts[0].shape[1:]), dtype=dtype, device=device)
        at = 0
        for part in parts:
            joined[at : at + part.shape[0]].copy_(self._tensor(part.name))
            at += part.shape[0]
        return joined

    def _tensor(self, name: str) -> Tensor:
        """A view of the mapped file; gone when the file is closed."""
        file = self._checkpoint.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(_map(self._checkpoint.path / file))
            tensor: Tensor = self._open[file].get_tensor(name)
        # The library's errors are its own type, which derives from Exception alone.
        except Exception as error:
            raise ModelError(
                f"{file} changed or broke while it was read ({type(error).__name__})."
            ) from error
        return tensor


def _map(path: Path) -> Any:
    return safe_open(path, framework="pt", device="cpu")
