"""Which format a checkpoint's config.json names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.model.hf_config import HFConfig
from engine.model.quant.awq import read_awq
from engine.model.quant.compressed_tensors import read_compressed_tensors
from engine.model.quant.gguf import read_gguf_blocks
from engine.model.quant.gptq import read_gptq
from engine.model.quant.stored import Format

FORMATS: Mapping[str, Callable[[HFConfig], Format]] = {
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
    "gguf": read_gguf_blocks,
}
_COMPRESSED = "compressed-tensors"


def read_format(config: Mapping[str, Any]) -> Format | None:
    """The format named by config.json, or by its text model's part; None for a checkpoint in floats.

    Raises:
        ModelError: a format that cannot be read.
    """
    outer = HFConfig(config)
    for part in (outer, outer.section("text_config")):
        for key in ("quantization_config", "compression_config"):
            if part.get(key):
                return _read(part.section(key), _COMPRESSED if key == "compression_config" else None)
    return None


def _read(config: HFConfig, default: str | None) -> Format:
    method = config.get("quant_method") or default
    if not isinstance(method, str) or method not in FORMATS:
        raise config.error(
            f"quant_method {method!r} is not supported; known: {', '.join(FORMATS)}. "
            "Or serve the original with --quantization."
        )
    return FORMATS[method](config)
