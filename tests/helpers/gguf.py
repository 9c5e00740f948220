"""GGUF files of tiny checkpoints, as llama.cpp's converter and quantiser would leave them.

    floats = write_gguf(checkpoint, folder / "model.gguf", lambda name: "Q8_0")
    write_floats(checkpoint, folder / "floats", floats)  # what the file stands for, as a checkpoint in fp32

Written from the format's description, block by block, and sharing nothing with what reads them.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.compare.gguf_files import gguf_name, pairs_together

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}
ALIGNMENT = 32
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

Block = tuple[bytes, list[float]]  # as it lies in the file, and what it stands for
Raw = tuple[str, Sequence[int], bytes]  # type, shape, data
Kinds = Callable[[str], str]


def half(value: float) -> float:
    return float(torch.tensor(value).half())


def q8_0(x: list[float]) -> Block:
    scale = half(max(map(abs, x)) / 127)
    values = [round(v / scale) for v in x] if scale else [0] * 32
    return struct.pack("<e32b", scale, *values), [v * scale for v in values]


def q4_0(x: list[float]) -> Block:
    scale = half(max(x, key=abs) / -8)
    values = [min(15, max(0, round(v / scale) + 8)) for v in x] if scale else [8] * 32
    return struct.pack("<e", scale) + _nibbles(values), [(v - 8) * scale for v in values]


def q4_1(x: list[float]) -> Block:
    least, scale = half(min(x)), half((max(x) - min(x)) / 15)
    values = [min(15, max(0, round((v - least) / scale))) for v in x]
    return struct.pack("<2e", scale, least) + _nibbles(values), [v * scale + least for v in values]


def _nibbles(values: list[int]) -> bytes:
    return bytes(values[i] | values[i + 16] << 4 for i in range(16))


def q6_k(x: list[float]) -> Block:
    scale = half(max(map(abs, x)) / 31 / 127) or 1.0
    scales = [max(1, round(max(map(abs, x[i : i + 16])) / 31 / scale)) for i in range(0, 256, 16)]
    values = [min(31, max(-32, round(v / (scale * scales[i // 16])))) for i, v in enumerate(x)]
    low, high = bytearray(128), bytearray(64)
    for i, value in enumerate(values):
        part, run, at = i // 128, i % 128 // 32, i % 32
        low[64 * part + 32 * (run % 2) + at] |= (value + 32 & 15) << 4 * (run // 2)
        high[32 * part + at] |= (value + 32 >> 4) << 2 * run
    floats = [value * scale * scales[i // 16] for i, value in enumerate(values)]
    return bytes(low) + bytes(high) + struct.pack("<16be", *scales, scale), floats


ENCODERS: Mapping[str, tuple[int, Callable[[list[float]], Block]]] = {
    "Q8_0": (32, q8_0),
    "Q4_0": (32, q4_0),
    "Q4_1": (32, q4_1),
    "Q6_K": (256, q6_k),
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode(weight: Tensor, kind: str) -> tuple[bytes, Tensor]:
    """The bytes of a weight, and the fp32 weight that they stand for."""
    if kind in PLAIN:
        rounded = weight.to(PLAIN[kind]).contiguous()
        return rounded.view(torch.uint8).numpy().tobytes(), rounded.float()
    size, encoder = ENCODERS[kind]
    blocks = [encoder(block) for block in weight.float().reshape(-1, size).tolist()]
    floats = torch.tensor([value for _, values in blocks for value in values]).view(weight.shape)
    return b"".join(raw for raw, _ in blocks), floats


def by_size(kind: str, **others: str) -> Kinds:
    """Matrices in `kind`, but for those named in `others`; the rest in F32."""
    return lambda name: others.get(name.replace(".", "_"), kind if name.endswith("weight") else "F32")


def write_gguf(
    checkpoint: Path,
    target: Path,
    kinds: Kinds,
    extra: Mapping[str, Tensor] | None = None,
    **metadata: Any,
) -> dict[str, Tensor]:
    """Writes a file of a checkpoint, and returns its weights as they are there.

    Args:
        kinds: the type of a matrix, by llama.cpp's name of it.
        extra: further tensors, in fp32.
        metadata: replaces what the config says, dots written as two underscores; None leaves it out.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    tensors: dict[str, Raw] = {
        name: ("F32", tuple(x.shape), encode(x, "F32")[0]) for name, x in (extra or {}).items()
    }
    floats: dict[str, Tensor] = {}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        module, suffix = name.rsplit(".", 1)
        theirs = gguf_name(f"{module}.weight").removesuffix("weight") + suffix
        raw, stands_for = encode(weight, kinds(theirs) if weight.dim() == 2 else "F32")
        floats[name] = stands_for
        if config["model_type"] == "llama" and (heads := _heads(module, config)):
            paired = pairs_together(weight.view(len(weight), -1), heads).view(weight.shape)
            raw, _ = encode(paired, kinds(theirs) if weight.dim() == 2 else "F32")
        tensors[theirs] = (kinds(theirs) if weight.dim() == 2 else "F32", tuple(weight.shape), raw)
    given = {key.replace("__", "."): value for key, value in metadata.items()}
    pairs = {**shape_metadata(config), **text_metadata(checkpoint), **given}
    write_raw(target, {key: value for key, value in pairs.items() if value is not None}, tensors)
    return floats


def _heads(module: str, config: Mapping[str, Any]) -> int:
    keys = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    key = keys.get(module.rpartition(".")[2])
    return config[key] if key else 0


def write_floats(checkpoint: Path, target: Path, floats: dict[str, Tensor]) -> Path:
    """The checkpoint with these weights."""
    shutil.copytree(checkpoint, target)
    save_file({name: weight.contiguous() for name, weight in floats.items()}, target / "model.safetensors")
    return target


def shape_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    name = config["model_type"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "general.architecture": name,
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": config["num_attention_heads"],
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.key_length": head_dim,
        f"{name}.rope.dimension_count": head_dim,
        f"{name}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        f"{name}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }


def text_metadata(checkpoint: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """Of a byte-level tokenizer."""
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    ids = dict(tokenizer["model"]["vocab"])
    kinds = dict.fromkeys(ids.values(), NORMAL)
    for entry in tokenizer["added_tokens"]:
        ids[entry["content"]] = entry["id"]
        kinds[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds[ids[token]] for token in tokens],
        "tokenizer.ggml.merges": merges or None,
        "tokenizer.ggml.bos_token_id": ids.get(config.get("bos_token")),
        "tokenizer.ggml.eos_token_id": ids.get(config.get("eos_token")),
        "tokenizer.chat_template": config.get("chat_template"),
    }
    return {key: value for key, value in found.items() if value is not None}


def write_raw(target: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Raw] | None = None) -> Path:
    """The container itself."""
    tensors = tensors or {}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
    data, entries = b"", b""
    for name, (kind, shape, raw) in tensors.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        entries += _string(name) + sizes + struct.pack("<IQ", TYPES[kind], len(data))
        data += raw + b"\0" * (-len(raw) % ALIGNMENT)
    head += entries
    target.write_bytes(head + b"\0" * (-len(head) % ALIGNMENT) + data)
    return target


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _string(value)
    return struct.pack("<I", 9) + _array(value)


def _array(values: Iterable[Any]) -> bytes:
    items = list(values)
    inner = [_value(item) for item in items]
    kind = inner[0][:4] if inner else struct.pack("<I", 4)
    return kind + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in inner)
