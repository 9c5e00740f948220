"""A GGUF file's metadata as the config.json of the checkpoint that it was made from.

What would change the model and is not known here is refused, not passed over.
"""

from __future__ import annotations

import struct
from typing import Any

from engine.gguf.container import GGUF

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Of each weight, the bits of the integers that are kept; other types become floats.
INTEGER_BITS = {"Q8_0": 8, "Q4_0": 4}
EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def read_config(file: GGUF) -> dict[str, Any]:
    """
    Raises:
        ModelError: an architecture that is not served, or metadata that is missing.
    """
    name = file.get("general.architecture", str)
    if name is None or name not in ARCHITECTURES:
        raise file.error(f"architecture {name!r} is not served from GGUF; {', '.join(ARCHITECTURES)} are.")
    if EMBEDDING not in file.tensors:
        raise file.error(f"{EMBEDDING} is missing.")
    described = _Described(file, name)
    biases = "blk.0.attn_q.bias" in file.tensors
    return {
        "architectures": [ARCHITECTURES[name]],
        **{key: described.need(theirs) for key, theirs in _SIZES.items()},
        "num_key_value_heads": described.get("attention.head_count_kv"),
        "head_dim": described.get("attention.key_length"),
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        "attention_bias": biases,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "rope_parameters": _rope(described),
        "tie_word_embeddings": head_source(file) is None,
        "eos_token_id": end_ids(file),
        "quantization_config": {"quant_method": "gguf", "types": _types(file)},
    }


def head_source(file: GGUF) -> str | None:
    """The tensor that the output layer is read from; None where that is the embedding as it is looked up.

    One in integers is looked up in floats and multiplied in integers, so that here they are two.
    """
    if HEAD in file.tensors:
        return HEAD
    return EMBEDDING if file.tensors[EMBEDDING].type in INTEGER_BITS else None


def end_ids(file: GGUF) -> list[int]:
    """The tokens that end a reply."""
    return [file.metadata[key] for end in _END_KEYS if (key := f"tokenizer.ggml.{end}") in file.metadata]


def _types(file: GGUF) -> list[str]:
    """The integers that weights come in, for people."""
    return sorted({tensor.type for tensor in file.tensors.values()} & INTEGER_BITS.keys())


class _Described:
    """The keys of the file's architecture."""

    def __init__(self, file: GGUF, name: str) -> None:
        self.file = file
        self._name = name
        if self.get("expert_count"):
            raise file.error("mixtures of experts are not served.")

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self._name}.{key}")

    def count(self, key: str) -> int:
        """0 where it is not said."""
        return self.file.get(f"{self._name}.{key}", int, 0) or 0

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise self.file.error(f"{self._name}.{key} is missing.")
        return value

    def keys(self, start: str) -> set[str]:
        """What follows `start` in the keys that begin so."""
        prefix = f"{self._name}.{start}"
        return {key.removeprefix(prefix) for key in self.file.metadata if key.startswith(prefix)}


def _rope(described: _Described) -> dict[str, Any]:
    file, theta = described.file, described.get("rope.freq_base") or 10_000.0
    heads, dims = described.count("attention.head_count"), described.count("rope.dimension_count")
    head_dim = described.count("attention.key_length")
    in_all = described.count("embedding_length") if head_dim == 0 else head_dim * heads
    if dims * heads not in (0, in_all):
        raise file.error("rotary embeddings of a part of each head are not served from GGUF.")
    scaling = _scaling(described)
    if ROPE_FACTORS not in file.tensors:
        return {"rope_theta": theta, **scaling}
    if scaling["rope_type"] != "default":
        raise file.error(f"{ROPE_FACTORS} and rope.scaling.type exclude each other.")
    # Llama 3's scaling comes as what it does: a factor for each pair of dims, whatever the length.
    factors = _floats(file, ROPE_FACTORS)
    return {
        "rope_theta": theta, "rope_type": "longrope",
        "short_factor": factors, "long_factor": factors,
    }  # fmt: skip


def _scaling(described: _Described) -> dict[str, Any]:
    """`rope.scaling.*`, and the key that versions before had."""
    kind = described.get("rope.scaling.type") or "none"
    known = {"type", "factor", "original_context_length", "finetuned", "yarn_beta_fast", "yarn_beta_slow"}
    unknown = described.keys("rope.scaling.") - known | described.keys("rope.scale_")
    if kind not in ("none", "linear", "yarn") or unknown:
        what = ", ".join(sorted(unknown)) or f"type {kind!r}"
        raise described.file.error(f"rope scaling by {what} is not served from GGUF.")
    if kind == "none":
        return {"rope_type": "default"}
    return {
        "rope_type": kind,
        "factor": described.need("rope.scaling.factor"),
        "original_max_position_embeddings": described.get("rope.scaling.original_context_length"),
        "beta_fast": described.get("rope.scaling.yarn_beta_fast"),
        "beta_slow": described.get("rope.scaling.yarn_beta_slow"),
    }


def _floats(file: GGUF, name: str) -> list[float]:
    tensor = file.tensors[name]
    if tensor.type != "F32":
        raise file.error(f"{name} is {tensor.type}; expected F32.")
    with file.path.open("rb") as opened:
        opened.seek(tensor.start)
        raw = opened.read(tensor.end - tensor.start)
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))
