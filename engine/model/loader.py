"""Reading a checkpoint's weights onto the device, one tensor of the model at a time.

At no time does more than one unpacked tensor exist beside what is already loaded: parts are copied straight
from the mapped file into their place in the fused tensor, cast on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import Quantization
from engine.errors import ModelError
from engine.gguf.container import is_gguf
from engine.model.checkpoint import Checkpoint
from engine.model.gguf.tensors import GGUFTensors
from engine.model.quant import holding
from engine.model.quant.unpack import Weight, join, unpack
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
    quantization: Quantization | None = None,
    deterministic: bool = False,
    progress: Progress | None = None,
) -> Transformer:
    """Loads a checkpoint that was inspected.

    Args:
        dtype: compute dtype, "bfloat16", "float16" or "float32"; weights are cast to it that are not held in
            integers.
        quantization: what linears are rounded to that do not come in integers.
        deterministic: what else is in a batch changes no bit of a sequence's results.
        progress: called after each tensor with (bytes done, bytes in total), as they are held.

    Raises:
        ModelError: a file changed or broke since the inspection.
    """
    if checkpoint.unused:
        some = ", ".join(checkpoint.unused[:3])
        logger.warning("%d tensors of the checkpoint are not used: %s", len(checkpoint.unused), some)
    compute, place = DTYPES[dtype], torch.device(device)

    def pack(weight: Weight, bias_O: Tensor | None) -> api.PackedLinear:
        if isinstance(weight, api.QuantizedWeight):
            return api.pack_quantized(weight.to(place), bias_O, compute, deterministic)
        return api.pack_linear(weight, bias_O, deterministic)

    dense: dict[str, Tensor] = {}
    linear: dict[str, api.PackedLinear] = {}
    done, total = 0, checkpoint.weight_bytes(dtype, quantization)
    with ExitStack() as stack:
        reader = _Reader(_Files(checkpoint, stack), checkpoint, compute, place, quantization)
        for slot in checkpoint.slots:
            if slot.linear:
                # The weight is not named here: a name would keep it alive beside the next one.
                linear[slot.name] = pack(reader.linear(slot), reader.bias(slot))
            else:
                dense[slot.name] = reader.dense(slot)
            done += reader.held_bytes(slot)
            if progress is not None:
                progress(done, total)
        reader.report()
    if checkpoint.spec.lm_head and checkpoint.spec.tied_embeddings:
        # Packing leaves the embedding as it is: CUDA shares it, a CPU reads from it once more.
        linear["lm_head"] = pack(reader.rounded("lm_head", dense["embed"]), None)
    return Transformer(checkpoint.spec, ModelWeights(dense, linear), max_model_len, deterministic)


class _Reader:
    """Turns the parts of a slot into one weight, as it will be held."""

    def __init__(
        self,
        files: _Files,
        checkpoint: Checkpoint,
        compute: torch.dtype,
        device: torch.device,
        asked: Quantization | None,
    ) -> None:
        self._files = files
        self._stored = checkpoint.stored
        self._compute = compute
        self._device = device
        self._asked = asked
        self._widened: list[str] = []  # slots that came quantised and are not held so

    def dense(self, slot: Slot) -> Tensor:
        return self._files.join(slot.parts, self._compute, self._device)

    def bias(self, slot: Slot) -> Tensor | None:
        return self._files.join(slot.bias_parts, self._compute, self._device) if slot.bias_parts else None

    def linear(self, slot: Slot) -> Weight:
        if any(part.name in self._stored for part in slot.parts):
            return self._quantised(slot)
        if self._asked is None:
            return self.dense(slot)
        return self.rounded(slot.name, self._files.join_as_stored(slot.parts).to(self._device))

    def rounded(self, name: str, weight_OI: Tensor) -> Weight:
        """The weight of a linear as the user asked to hold it."""
        if self._asked is None:
            return weight_OI
        held = holding.rounding(name, weight_OI.shape[1], self._asked)
        return api.quantize(weight_OI, held.bits, weight_OI.shape[1] // held.groups)

    def held_bytes(self, slot: Slot) -> int:
        elements, integer_bytes = holding.memory((slot,), self._stored, self._asked)
        return elements * self._compute.itemsize + integer_bytes

    def report(self) -> None:
        if self._widened:
            how = str(self._compute).removeprefix("torch.") if self._asked is None else str(self._asked)
            logger.warning(
                "%d weights are fp8 in the checkpoint, or in parts that are not quantised alike; "
                "they are held in %s: %s",
                len(self._widened), how, ", ".join(self._widened[:3]),
            )  # fmt: skip

    def _quantised(self, slot: Slot) -> Weight:
        weights = [self._part(part) for part in slot.parts]
        joined = join(weights)
        if joined is not None:
            return joined
        self._widened.append(slot.name)
        dtype = self._compute if self._asked is None else torch.float32
        floats = torch.cat([_floats(weight, dtype) for weight in weights])
        return self.rounded(slot.name, floats.to(self._device))

    def _part(self, part: Part) -> Weight:
        stored = self._stored.get(part.name)
        return self._files.tensor(part.name) if stored is None else unpack(stored, self._files.tensor)


def _floats(weight: Weight, dtype: torch.dtype) -> Tensor:
    return api.dequantize(weight, dtype) if isinstance(weight, api.QuantizedWeight) else weight.to(dtype)


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
            joined[at : at + part.shape[0]].copy_(self.tensor(part.name))
            at += part.shape[0]
        return joined

    def join_as_stored(self, parts: tuple[Part, ...]) -> Tensor:
        """The same in the file's own dtype; a single part is a view of the mapped file."""
        tensors = [self.tensor(part.name) for part in parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file; gone when the file is closed."""
        file = self._checkpoint.tensors[name].file
        try:
            if file not in self._open:
                self._open[file] = self._map(self._checkpoint.path / file)
            tensor: Tensor = self._open[file].get_tensor(name)
        # The library's errors are its own type, which derives from Exception alone.
        except Exception as error:
            raise ModelError(
                f"{file} changed or broke while it was read ({type(error).__name__})."
            ) from error
        return tensor

    def _map(self, path: Path) -> Any:
        if is_gguf(path):
            return GGUFTensors(path, self._checkpoint.tensors)
        from safetensors import safe_open  # not needed by a model without files

        return self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
