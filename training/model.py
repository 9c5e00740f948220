"""A Llama-shaped decoder in plain torch, for training only; the engine serves it with its own code.

Knows: the shape, the forward pass, the Hugging Face names of the weights. Does not know: text.

Shapes: S sequences, T tokens, E hidden, H query heads, G kv heads, D head dim, F feed-forward, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_OWN = 0.5  # how far a new token lies from those that it begins as, in spreads of the embedding


@dataclass(frozen=True)
class Shape:
    """The size of the model."""

    vocab_size: int = 2048
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def parameters(self) -> int:
        """How many weights a model of this shape has."""
        attention = 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.layers * layer + self.hidden_size

    def hf_config(self, bos: int, eos: list[int], pad: int) -> dict[str, Any]:
        """The config.json of a LlamaForCausalLM of this shape."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._eps = eps

    def forward(self, x_STE: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_STE.float(), self.weight.shape, self.weight.float(), self._eps)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self._shape = shape
        query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def forward(self, x_STE: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        q_SHTD = rotate(self._heads(self.q_proj(x_STE)), cos_TD, sin_TD)
        k_SGTD = rotate(self._heads(self.k_proj(x_STE)), cos_TD, sin_TD)
        v_SGTD = self._heads(self.v_proj(x_STE))
        group = self._shape.heads // self._shape.kv_heads
        k_SHTD, v_SHTD = k_SGTD.repeat_interleave(group, 1), v_SGTD.repeat_interleave(group, 1)
        out_SHTD = causal_attention(q_SHTD, k_SHTD, v_SHTD)
        out: torch.Tensor = self.o_proj(out_SHTD.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self._shape.head_dim).transpose(1, 2)


def rotate(x: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
    """Rotary embedding in the half-split form that Llama checkpoints use."""
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    out: torch.Tensor = (x * cos_TD + turned * sin_TD).to(x.dtype)
    return out


def causal_attention(q_SHTD: torch.Tensor, k_SHTD: torch.Tensor, v_SHTD: torch.Tensor) -> torch.Tensor:
    """Written out: for sequences this short torch's fused CPU attention takes three times as long."""
    tokens = q_SHTD.shape[2]
    future_TT = torch.full((tokens, tokens), float("-inf")).triu(1)
    scores_SHTT = (q_SHTD @ k_SHTD.transpose(-1, -2)).float() * q_SHTD.shape[-1] ** -0.5 + future_TT
    out: torch.Tensor = scores_SHTT.softmax(-1).to(v_SHTD.dtype) @ v_SHTD
    return out


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x_STE: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x_STE), self.up_proj(x_STE)
        out: torch.Tensor = self.down_proj(F.silu(gate) * up)
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each around a residual; dropout only while training."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mlp = MLP(shape)
        self._dropout = dropout

    def forward(self, x_STE: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor) -> torch.Tensor:
        x_STE = x_STE + self._drop(self.self_attn(self.input_layernorm(x_STE), cos_TD, sin_TD))
        out: torch.Tensor = x_STE + self._drop(self.mlp(self.post_attention_layernorm(x_STE)))
        return out

    def _drop(self, x_STE: torch.Tensor) -> torch.Tensor:
        return F.dropout(x_STE, self._dropout, self.training)


class Llama(nn.Module):
    """The decoder. Attribute names give the checkpoint its Hugging Face names."""

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self._dropout = dropout
        self._init_weights()

    def _init_weights(self) -> None:
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.data.div_(math.sqrt(2 * self.shape.layers))

    def with_tokens(self, rows: Sequence[Sequence[int]], dropout: float) -> "Llama":
        """A model with more tokens: each begins as the mean of the given ones, and a little of its own."""
        wider = Llama(replace(self.shape, vocab_size=self.shape.vocab_size + len(rows)), dropout)
        weights = self.state_dict()
        known_VE = weights["embed_tokens.weight"]
        for row in rows:
            begun_E = known_VE[list(row)].mean(0)
            own_E = torch.randn_like(begun_E) * known_VE.std() * (_OWN if len(row) > 1 else _OWN / 4)
            known_VE = torch.cat((known_VE, (begun_E + own_E)[None]))
        wider.load_state_dict(weights | {"embed_tokens.weight": known_VE})
        return wider

    def hidden(self, ids_ST: torch.Tensor) -> torch.Tensor:
        """The normalised last hidden states, [S, T, E]."""
        cos_TD, sin_TD = self._angles(ids_ST.shape[1])
        x_STE = F.dropout(self.embed_tokens(ids_ST), self._dropout, self.training)
        for layer in self.layers:
            x_STE = layer(x_STE, cos_TD, sin_TD)
        out: torch.Tensor = self.norm(x_STE)
        return out

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores over the vocabulary for hidden states of any leading shape."""
        return F.linear(hidden, self.embed_tokens.weight)

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """bfloat16 weights under their Hugging Face names; the output matrix is tied and left out."""
        return {f"model.{name}": value.bfloat16().contiguous() for name, value in self.state_dict().items()}

    def _angles(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        half = torch.arange(0, self.shape.head_dim, 2).float() / self.shape.head_dim
        angles = torch.outer(torch.arange(tokens).float(), self.shape.rope_theta**-half)
        angles_TD = torch.cat((angles, angles), -1)
        return angles_TD.cos(), angles_TD.sin()
