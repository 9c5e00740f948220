"""From the tensors of a stored weight to a QuantizedWeight, and from the parts of a slot to one.

`O` outputs, `I` inputs, `G` groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.errors import ModelError
from engine.model.quant.stored import Elements, Shape, StoredWeight
from kernels import api

Weight = Tensor | api.QuantizedWeight
# Where value c of a word lies when the word holds values 0, 2, 4, 6, 1, 3, 5, 7.
_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
_ONES = {4: 0x11111111, 8: 0x01010101}


def unpack(stored: StoredWeight, read: Callable[[str], Tensor]) -> Weight:
    """The weight in integers; where it was stored in fp8, in that or in fp32.

    Args:
        read: a tensor by its name on disk; its dtype and shape were checked.

    Raises:
        ModelError: the groups of the inputs are not equally large.
    """
    outputs, groups = stored.shape[0], stored.groups
    scale_OG = _per_group(_upright(read(stored.scale), stored).float(), outputs, groups)
    if stored.stays_fp8:
        return api.QuantizedWeight(8, read(stored.value.name).clone(), scale_OG)
    if stored.is_float:
        value_OGJ = read(stored.value.name).float().view(outputs, groups, -1)
        return (value_OGJ * scale_OG.unsqueeze(-1)).view(stored.shape)
    value_OI = _integers(stored.value, read(stored.value.name), stored, stored.shape)
    zero_OG = None
    if stored.zero is not None:
        zeros = _integers(stored.zero, read(stored.zero.name), stored, (outputs, groups))
        zero_OG = _per_group(zeros, outputs, groups)
    order_I = None
    if stored.group_index is not None:
        order_I = _order(read(stored.group_index), stored)
        value_OI = value_OI if order_I is None else value_OI[:, order_I]
    return api.QuantizedWeight(stored.value.bits, value_OI, scale_OG, zero_OG, order_I)


def join(weights: Sequence[Weight]) -> api.QuantizedWeight | None:
    """The parts of one slot below each other; None where they are not in integers of one kind."""
    if not all(isinstance(weight, api.QuantizedWeight) for weight in weights):
        return None
    parts = [weight for weight in weights if isinstance(weight, api.QuantizedWeight)]
    first = parts[0]
    if len(parts) == 1:
        return first
    if not all(_alike(first, part) for part in parts):
        return None
    zeros = [_no_zeros(part) if part.zero_OG is None else part.zero_OG for part in parts]
    return api.QuantizedWeight(
        first.bits,
        torch.cat([part.value_OI for part in parts]),
        torch.cat([part.scale_OG for part in parts]),
        torch.cat(zeros) if any(part.zero_OG is not None for part in parts) else None,
        first.order_I,
    )


def _no_zeros(weight: api.QuantizedWeight) -> Tensor:
    return torch.zeros_like(weight.scale_OG, dtype=torch.int8)


def _alike(a: api.QuantizedWeight, b: api.QuantizedWeight) -> bool:
    if (a.bits, a.value_OI.dtype, a.scale_OG.shape[1]) != (b.bits, b.value_OI.dtype, b.scale_OG.shape[1]):
        return False
    if a.order_I is None or b.order_I is None:
        return a.order_I is b.order_I
    return torch.equal(a.order_I, b.order_I)


def _upright(matrix: Tensor, stored: StoredWeight) -> Tensor:
    return matrix.t() if stored.transposed and matrix.dim() == 2 else matrix


def _per_group(x: Tensor, outputs: int, groups: int) -> Tensor:
    """`[O, G]` in memory of its own, from that, from `[O]` or from a single number."""
    if x.numel() == 1:
        return x.reshape(1, 1).expand(outputs, groups).clone()
    return x.reshape(outputs, groups).clone(memory_format=torch.contiguous_format)


def _integers(elements: Elements, on_disk: Tensor, stored: StoredWeight, shape: Shape) -> Tensor:
    """int8, `shape`, in memory of its own: values around zero."""
    if elements.dtype == "I8":
        return _upright(on_disk, stored).clone(memory_format=torch.contiguous_format)
    words = on_disk + _ONES[elements.bits] if elements.minus_one else on_disk
    along_last = words.t() if elements.packed_axis == 0 else words
    values = _unpack_last(along_last.contiguous().view(torch.uint8), elements)
    lies_across = (elements.packed_axis == 0) != stored.transposed
    upright = values.t() if lies_across else values
    return upright[: shape[0], : shape[1]].contiguous()


def _unpack_last(packed: Tensor, elements: Elements) -> Tensor:
    """Bytes -> values, along the last axis; 8 bits are bytes already."""
    if elements.bits == 8:
        return (packed ^ 0x80).view(torch.int8)
    values = torch.stack((packed & 15, packed >> 4), dim=-1).view(torch.int8).flatten(1).sub_(8)
    if not elements.interleaved:
        return values
    return values.view(values.shape[0], -1, 8)[:, :, list(_INTERLEAVED)].flatten(1)


def _order(group_I: Tensor, stored: StoredWeight) -> Tensor | None:
    """The inputs sorted by group; None where they are in order already."""
    inputs = stored.shape[1]
    sorted_I, order_I = torch.sort(group_I.long(), stable=True)
    if not torch.equal(sorted_I, torch.arange(inputs) // (inputs // stored.groups)):
        raise ModelError(
            f"{stored.group_index} does not put {inputs // stored.groups} inputs into each of "
            f"{stored.groups} groups."
        )
    return None if torch.equal(order_I, torch.arange(inputs)) else order_I
