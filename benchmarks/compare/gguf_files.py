"""llama.cpp's files of a checkpoint: bf16 as it is, the others by llama.cpp's own quantiser.

Uses the `gguf` package that comes with llama.cpp's sources. Knows the Llama and Qwen3 families alone.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.compare.checkpoints import MERGE, vocabulary
from engine.model.gguf.shown import LAYER_NAMES, OUTER_NAMES

_THEIRS = {ours: theirs for theirs, ours in (OUTER_NAMES | LAYER_NAMES).items()}


def gguf_file(checkpoint: Path, kind: str, home: Path) -> Path:
    """The file of this kind (bf16, f16, q8_0, q4_0), made if it is not there.

    Args:
        home: where `benchmarks/peers/llama_cpp.sh` put llama.cpp.
    """
    target = checkpoint / f"{kind}.gguf"
    if target.exists():
        return target
    part = target.with_suffix(".part")
    if kind == "bf16":
        _write_bf16(checkpoint, part, home / "source" / "gguf-py")
    else:
        source = gguf_file(checkpoint, "bf16", home)
        quantize = [str(home / "build/bin/llama-quantize"), str(source), str(part), kind.upper()]
        subprocess.run(quantize, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return part.rename(target)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a weight of the checkpoint."""
    module = name.removesuffix(".weight")
    if module in _THEIRS:
        return f"{_THEIRS[module]}.weight"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{_THEIRS[inner]}.weight"


def pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection in the order of llama.cpp's Llama.

    The checkpoint's rotary embedding turns dimension i of a head with i + D/2; llama.cpp's 2i with 2i + 1.
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _write_bf16(checkpoint: Path, target: Path, package: Path) -> None:
    sys.path.insert(0, str(package))
    try:
        gguf = importlib.import_module("gguf")
    finally:
        sys.path.remove(str(package))
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, config["model_type"])
    _add_shape(writer, config)
    _add_vocabulary(writer, config["vocab_size"], gguf.TokenType)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (it is not a mapping)
            _add_weight(writer, name, weights.get_tensor(name), config, gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()


def _add_weight(writer: Any, name: str, weight: torch.Tensor, config: dict[str, Any], bf16: Any) -> None:
    if weight.dim() == 1:
        writer.add_tensor(gguf_name(name), weight.float().numpy())
        return
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is not None and config["model_type"] == "llama":
        weight = pairs_together(weight, config[heads])
    raw = weight.contiguous().view(torch.uint8).numpy().astype(np.uint8, copy=False)
    writer.add_tensor(gguf_name(name), raw, raw_dtype=bf16)


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: Any, size: int, kinds: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary(size))
    writer.add_token_types([kinds.CONTROL] + [kinds.NORMAL] * (size - 1))
    writer.add_token_merges([" ".join(MERGE)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
