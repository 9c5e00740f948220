"""Grows a trained model: more tokens, a wider residual stream, and heads that can copy from the start.

To repeat a name, a model looks for the place where what it wrote last stood before, and says what followed
there. That takes heads in two layers that work together (an induction head, https://arxiv.org/abs/2209.11895).
Training does not find them in a few thousand steps: after the first layer a token's own embedding is a
hundredth of the residual stream. So they are put in, with channels of their own. Training refines them, shows
them when to copy, and mends what the small model says, which they disturb.

Knows: the weights of `model.py`. Does not know: text.

Shapes: E hidden, D head dim, V vocabulary, N channels of a code's part that is looked for.
"""

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from training.model import Attention, Llama

_NEW = 64  # channels: what stands here, what is to be said, one and two tokens back, a constant
_CODE, _N = 20, 11
_HERE, _SAY = slice(0, _CODE), slice(_CODE, 2 * _CODE)
_BACK = (slice(2 * _CODE, 2 * _CODE + _N), slice(2 * _CODE + _N, 2 * _CODE + 2 * _N))
_CONSTANT = 2 * _CODE + 2 * _N
_SIZE = {"here": 10.0, "constant": 5.0}  # relative to a token's embedding, so that its length stays known
_LOUD = 12.0  # the length of what is written into a channel of another token
_SAID = 45.0
_ADDED = 170 + 45 + 2 * _LOUD**2  # what the channels add to the square of the residual stream's length
_TYPICAL = (0.0, 88.0, 103.0, 120.0, 152.0)  # lengths of the residual stream before each layer and at the end


def grown(small: Llama, tokens: int, dropout: float = 0.0) -> Llama:
    """The model with that many more tokens, and in each layer two more query heads on one more KV head."""
    shape = replace(
        small.shape,
        vocab_size=small.shape.vocab_size + tokens,
        hidden_size=small.shape.hidden_size + _NEW,
        heads=small.shape.heads + 2,
        kv_heads=small.shape.kv_heads + 1,
    )
    model = Llama(shape, dropout)
    with torch.no_grad():
        new = model.state_dict()
        for name, old in small.state_dict().items():
            new[name].zero_()[tuple(slice(size) for size in old.shape)] = old
        old_E = small.shape.hidden_size
        _name_tokens(model, len(small.embed_tokens.weight), old_E)
        _keep_scale(model, old_E)
        _look_back(model.layers[0].self_attn, old_E)
        _look_for(model.layers[1].self_attn, old_E)
        for layer in model.layers[1:]:
            _say(layer.self_attn, old_E)
    return model


def _name_tokens(model: Llama, known: int, old_E: int) -> None:
    tokens_VE = model.embed_tokens.weight
    tokens_VE[known:, :old_E] = 0.06 * torch.randn(len(tokens_VE) - known, old_E)
    length_V1 = tokens_VE.norm(dim=1, keepdim=True)
    code_VC = _codes(len(tokens_VE))
    added = tokens_VE[:, old_E:]
    added[:, _HERE] = _SIZE["here"] * length_V1 * code_VC
    added[:, _SAY] = length_V1.mean() * code_VC
    added[:, _CONSTANT] = _SIZE["constant"] * length_V1[:, 0]


def _codes(tokens: int) -> torch.Tensor:
    """A direction for each token, both parts of equal length, pushed apart from one another."""
    code_VC = torch.randn(tokens, _CODE)
    with torch.enable_grad():
        code_VC.requires_grad_()
        optimizer = torch.optim.Adam([code_VC], lr=0.03)
        for _ in range(60):
            parts = [F.normalize(part, dim=1) for part in code_VC.split([_N, _CODE - _N], 1)]
            loss = sum(torch.logsumexp(8 * part @ part.T, 1).mean() for part in parts)
            loss.backward()  # type: ignore[union-attr, no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    parts = [F.normalize(part, dim=1) for part in code_VC.detach().split([_N, _CODE - _N], 1)]
    return torch.cat(parts, 1) / math.sqrt(2)


def _keep_scale(model: Llama, old_E: int) -> None:
    """The old channels leave the norms as large as before, although there are more channels now."""
    wider = math.sqrt(old_E / model.shape.hidden_size)
    tokens = _SIZE["here"] ** 2 + _SIZE["constant"] ** 2 + 1
    norms = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in model.layers]
    for place, norm in enumerate([*itertools.chain(*norms), model.norm]):
        length = _TYPICAL[place // 2]
        gain = math.sqrt(1 + tokens) if length == 0 else math.sqrt(1 + _ADDED / length**2)
        norm.weight[:old_E] *= gain * wider
        norm.weight[old_E:] = 1.0
    model.norm.weight[old_E:] = 0.0
    model.norm.weight[old_E:][_SAY] = 1.4


def _look_back(heads: Attention, old_E: int) -> None:
    """One and two tokens back: rotary positions turn a constant by the distance."""
    shape = heads._shape
    D = shape.head_dim
    weights = torch.tensor([2.0, 1.5, 1.0, 1.0, 1.0, 1.0])
    angles = shape.rope_theta ** -(torch.arange(len(weights)) * 2 / D)
    total = 1 + _SIZE["here"] ** 2 + _SIZE["constant"] ** 2
    constant = _SIZE["constant"] * math.sqrt(shape.hidden_size / total)
    code = _SIZE["here"] * math.sqrt(shape.hidden_size / total) / math.sqrt(2)
    strength = (70 * 8 / weights.sum() * weights).sqrt() / constant
    k_DE, v_DE = heads.k_proj.weight[-D:, old_E:], heads.v_proj.weight[-D:, old_E:]
    k_DE[: len(weights), _CONSTANT] = strength
    v_DE[:_N, :_N] = torch.eye(_N)
    for head, back in ((-2, 1), (-1, 2)):
        q_DE = heads.q_proj.weight[head * D :, old_E:][:D]
        q_DE[: len(weights), _CONSTANT] = strength * (back * angles).cos()
        q_DE[D // 2 : D // 2 + len(weights), _CONSTANT] = -strength * (back * angles).sin()
        o_ED = heads.o_proj.weight[old_E:, head * D :][:, :D]
        o_ED[_BACK[back - 1], :_N] = _LOUD / code * torch.eye(_N)


def _look_for(heads: Attention, old_E: int) -> None:
    """Tokens before which stood what stands here, and before that what stood before it."""
    D = heads._shape.head_dim
    scale = math.sqrt(heads._shape.hidden_size) / _TYPICAL[1]
    here = _SIZE["here"] * 1.3 * scale / math.sqrt(2)
    back, constant = _LOUD * scale, _SIZE["constant"] * 1.3 * scale
    slow = (slice(D // 2 - _N, D // 2), slice(D - _N, D))
    k_DE = heads.k_proj.weight[-D:, old_E:]
    for rows, channels in zip(slow, _BACK, strict=True):
        k_DE[rows, channels] = torch.eye(_N) / back
    still = D // 2 - _N - 1  # a channel that hardly turns, for what no match is to stay below
    k_DE[still, _CONSTANT] = 1 / constant
    for head, first, second, least in ((-2, 1.0, 1.0, 1.4), (-1, 1.5, 0.5, 1.2)):
        q_DE = heads.q_proj.weight[head * D :, old_E:][:D]
        q_DE[slow[0], :_N] = 8 * 20 * first * torch.eye(_N) / here
        q_DE[slow[1], _BACK[0]] = 8 * 20 * second * torch.eye(_N) / back
        q_DE[still, _CONSTANT] = -8 * 20 * least / constant


def _say(heads: Attention, old_E: int) -> None:
    """What stands where a new head looks is said."""
    D = heads._shape.head_dim
    heads.v_proj.weight[-D:, old_E:][:_CODE, _HERE] = torch.eye(_CODE)
    size = _SIZE["here"] * 1.3 * math.sqrt(heads._shape.hidden_size) / _TYPICAL[1]
    for head in (-2, -1):
        heads.o_proj.weight[old_E:, head * D :][_SAY, :_CODE] = _SAID / 2 / size * torch.eye(_CODE)
