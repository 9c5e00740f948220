"""AWQ, as its GEMM kernels want it: 4 bits, in words along the outputs, with the inputs in rows.

`qweight` int32 `[I, O / 8]`, `qzeros` int32 `[G, O / 8]`, `scales` `[G, O]`. The values of a word are in the
order 0, 2, 4, 6, 1, 3, 5, 7.

Source: https://github.com/casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.model.headers import TensorInfo
from engine.model.hf_config import HFConfig
from engine.model.quant.stored import Elements, Format, Shape, StoredWeight

_BITS = 4


def read_awq(config: HFConfig) -> Format:
    """Raises ModelError."""
    key = "w_bit" if config.has("w_bit") else "bits"
    bits = config.integer(key, high=32)
    version = config.get("version") or "gemm"
    if bits != _BITS:
        raise config.error(f"AWQ with {bits} bits is not supported; 4 is.")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise config.error(f"AWQ version {version!r} is not supported; gemm is.")
    if not config.boolean("zero_point", True):
        raise config.error("AWQ without zero points (zero_point: false) is not supported.")
    return Format("AWQ", ("qweight", "qzeros", "scales"), _find)


def _find(stem: str, shape: Shape, tensors: Mapping[str, TensorInfo]) -> StoredWeight | None:
    if f"{stem}.qweight" not in tensors:
        return None
    scales = tensors.get(f"{stem}.scales")
    return StoredWeight(
        shape=shape,
        groups=scales.shape[0] if scales and scales.shape else 1,
        value=Elements(f"{stem}.qweight", "I32", _BITS, packed_axis=1, interleaved=True),
        scale=f"{stem}.scales",
        zero=Elements(f"{stem}.qzeros", "I32", _BITS, packed_axis=1, interleaved=True),
        transposed=True,
    )
