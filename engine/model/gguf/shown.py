"""What a GGUF file holds, under the names and in the forms of a Hugging Face checkpoint.

A tensor in Q8_0 or Q4_0 is shown as two: its integers and its scales (`quant/gguf.py` puts them together).
Other blocks are shown as floats, and so is the embedding, which is looked up. llama.cpp's Llama has its query
and key rows in another order, which is undone. Knows headers; `tensors.py` reads what is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.gguf.config import EMBEDDING, HEAD, INTEGER_BITS, ROPE_FACTORS, head_source
from engine.gguf.container import BLOCKS, GGUF, TensorEntry, is_blocks
from engine.model.headers import TensorInfo

# llama.cpp's names, and those of a checkpoint; inside a layer and outside.
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shown(TensorInfo):
    """A tensor, or one half of it, as it is shown.

    Attributes:
        start, end: its bytes in the file are [start, end).
        stored: the type in the file.
        heads: whose rows llama.cpp put into pairs; 0 where rows are in order.
    """

    start: int
    end: int
    stored: str
    heads: int = 0


def show_tensors(file: GGUF) -> dict[str, TensorInfo]:
    """Everything a file holds, by the names of a Hugging Face checkpoint; unknown names stay as they are."""
    shown: dict[str, TensorInfo] = {}
    for name, entry in file.tensors.items():
        if name != ROPE_FACTORS:  # config.py has read them
            stem, _, suffix = name.rpartition(".")
            shown.update(_show(file, stem, f"{_theirs(stem)}.{suffix}", entry))
    if head_source(file) == EMBEDDING:
        shown.update(_show(file, HEAD.removesuffix(".weight"), "lm_head.weight", file.tensors[EMBEDDING]))
    return shown


def _theirs(stem: str) -> str:
    """`blk.3.attn_q` -> `model.layers.3.self_attn.q_proj`."""
    if stem in OUTER_NAMES:
        return OUTER_NAMES[stem]
    match stem.split("."):
        case ["blk", layer, inner] if inner in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[inner]}"
    return stem


def _show(file: GGUF, stem: str, name: str, entry: TensorEntry) -> Iterator[tuple[str, Shown]]:
    def shown(dtype: str, shape: tuple[int, ...]) -> Shown:
        # Absolute, because a checkpoint in one file has no folder that this could be relative to.
        return Shown(str(file.path.absolute()), dtype, shape, entry.start, entry.end, entry.type, heads)

    heads = _paired_heads(file, stem)
    if entry.type not in INTEGER_BITS or len(entry.shape) != 2 or f"{stem}.weight" == EMBEDDING:
        yield name, shown("F32" if is_blocks(entry.type) else entry.type, entry.shape)
        return
    rows, inputs = entry.shape
    module = name.removesuffix(".weight")
    yield f"{module}.{entry.type.lower()}", shown("I8", entry.shape)
    yield f"{module}.scale", shown("F16", (rows, inputs // BLOCKS[entry.type].values))


def _paired_heads(file: GGUF, stem: str) -> int:
    """llama.cpp turns neighbouring dims of a head in a Llama, and the two halves in others, as we do."""
    if file.metadata["general.architecture"] != "llama":
        return 0
    heads: int = file.metadata["llama.attention.head_count"]
    kv_heads: int = file.metadata.get("llama.attention.head_count_kv", heads)
    return {"attn_q": heads, "attn_k": kv_heads}.get(stem.rpartition(".")[2], 0)
