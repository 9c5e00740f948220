"""Checkpoint folders written byte by byte, without torch or transformers: also those that must be refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.model.hf_config import HFConfig
from engine.model.registry import find_family
from engine.model.weights import model_slots

ITEM_BYTES = {"U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint with this config has on disk."""
    _, family = find_family(config["architectures"])
    spec = family.read(HFConfig(config))
    slots = model_slots(spec, family.names, family.names.prefixes[0], family.names.lm_heads[0])
    return {part.name: part.shape for slot in slots for part in slot.all_parts}


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A weight file of zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    path.write_bytes(safetensors_bytes({"__metadata__": {"format": "pt"}, **header}, bytes(at)))


def write_checkpoint(
    folder: Path,
    *,
    weights: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str = "BF16",
    **config: Any,
) -> Path:
    """A Llama of zeros; `config` changes its config.json, `weights` replaces its tensors."""
    full = {**LLAMA, **config}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(full))
    shapes = weight_shapes(full) if weights is None else weights
    write_tensors(folder / "model.safetensors", shapes, dtype)
    return folder
