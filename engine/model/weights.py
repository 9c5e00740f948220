"""Which tensors a decoder needs, what they are called on disk, and how they are put together.

Plain data: the checkpoint's inspection looks here for what is missing, the loader for what to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.model.arch import ArchSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """A family's names on disk, without `.weight` and `.bias`.

    Attributes:
        prefixes: what may stand before `embed_tokens`, `layers.` and `norm`; the first that fits is taken.
        qkv, gate_up: one name where the file holds them fused, else the parts in order.
        ignored: starts of tensor names that belong to parts Quire does not run.
    """

    prefixes: tuple[str, ...] = ("model.", "")
    embed: str = "embed_tokens"
    final_norm: str = "norm"
    lm_heads: tuple[str, ...] = ("lm_head",)
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    attention_out_norm: str = ""  # sandwich norms only
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_out_norm: str = ""  # sandwich norms only
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor on disk."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the model: parts joined along their first dimension.

    Attributes:
        name: the model's own name, like `layers.3.qkv`.
        linear: the tensor is the weight of a linear, to be packed together with its bias.
    """

    name: str
    parts: tuple[Part, ...]
    bias_parts: tuple[Part, ...] = ()
    linear: bool = False

    @property
    def all_parts(self) -> tuple[Part, ...]:
        return self.parts + self.bias_parts


def model_slots(spec: ArchSpec, names: WeightNames, prefix: str, lm_head: str) -> Iterator[Slot]:
    """Everything the decoder needs, in the order it is used."""
    table = (spec.vocab_size, spec.hidden_size)
    yield Slot("embed", (Part(f"{prefix}{names.embed}.weight", table),))
    for layer in range(spec.num_layers):
        yield from _layer_slots(spec, names, layer, prefix)
    yield Slot("final_norm", (Part(f"{prefix}{names.final_norm}.weight", (spec.hidden_size,)),))
    if spec.lm_head and not spec.tied_embeddings:
        yield Slot("lm_head", (Part(f"{lm_head}.weight", table),), linear=True)


def _layer_slots(spec: ArchSpec, names: WeightNames, layer: int, prefix: str) -> Iterator[Slot]:
    ours, theirs = f"layers.{layer}.", f"{prefix}layers.{layer}."
    hidden, q, kv, mlp = spec.hidden_size, spec.q_size, spec.kv_size, spec.mlp_size

    def norm(name: str, on_disk: str, size: int) -> Slot:
        return Slot(ours + name, (Part(f"{theirs}{on_disk}.weight", (size,)),))

    def linear(name: str, on_disk: tuple[str, ...], rows: Shape, columns: int, bias: bool) -> Slot:
        if len(on_disk) == 1:
            rows = (sum(rows),)
        stems = [theirs + stem for stem in on_disk]
        parts = [Part(f"{stem}.weight", (n, columns)) for stem, n in zip(stems, rows, strict=True)]
        biases = [Part(f"{stem}.bias", (n,)) for stem, n in zip(stems, rows, strict=True) if bias]
        return Slot(ours + name, tuple(parts), tuple(biases), linear=True)

    yield norm("input_norm", names.input_norm, hidden)
    yield linear("qkv", names.qkv, (q, kv, kv), hidden, spec.qkv_bias)
    if spec.qk_norm:
        yield norm("q_norm", names.q_norm, spec.head_dim)
        yield norm("k_norm", names.k_norm, spec.head_dim)
    yield linear("o", (names.o,), (hidden,), q, spec.o_bias)
    if spec.sandwich_norms:
        yield norm("attention_out_norm", names.attention_out_norm, hidden)
    yield norm("mlp_norm", names.mlp_norm, hidden)
    yield linear("gate_up", names.gate_up, (mlp, mlp), hidden, spec.mlp_bias)
    yield linear("down", (names.down,), (hidden,), mlp, spec.mlp_bias)
    if spec.sandwich_norms:
        yield norm("mlp_out_norm", names.mlp_out_norm, hidden)
