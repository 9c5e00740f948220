"""All layers of a decoder in one native call, on a CPU.

The C side is `kernels/native/decoder.h`; the structs here repeat its structs field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.native.library import DTYPE_CODE, library
from kernels.paged_attention import cpu as _paged_attention
from kernels.types import AttentionBatch, DecoderParams, LayerWeights, PackedLinear, WantedTokens

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_ACTIVATION_CODE = {"silu": 0, "gelu_tanh": 1}


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Linear(ctypes.Structure):
    _fields_ = _fields(_POINTER, "packed scale zero bias_O") + _fields(
        _INT64, "inputs outputs group bits scale_dtype"
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        _fields(_Linear, "qkv o gate_up down")
        + _fields(_POINTER, "input_norm_E attention_out_norm_E mlp_norm_E mlp_out_norm_E q_norm_D k_norm_D")
        + _fields(_POINTER, "cos_sin_MR kv_N2GPD")
        + _fields(_INT64, "rotary_dim window")
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        _fields(_POINTER, "layers final_norm_E")
        + _fields(_INT64, "num_layers hidden heads kv_heads dim block")
        + _fields(_INT, "dtype activation int8_kv")
        + _fields(_FLOAT, "eps norm_offset scale softcap")
    )


class _Queries(ctypes.Structure):
    _fields_ = _fields(_POINTER, "page_table_SB query_start_S1 seq_len_S") + _fields(
        _INT64, "tokens seqs page_table_stride"
    )


class _Step(ctypes.Structure):
    _fields_ = _fields(_POINTER, "residual_TE out_WE position_T slot_T wanted_W") + _fields(
        _Queries, "all wanted"
    )


class NativeDecoder:
    """The layers of one model, laid out for the library. It keeps their tensors alive.

    Args:
        layers: weights packed for the library (`can_run`).
        final_norm_E: the norm after the last layer.
        params: what all layers share.
    """

    def __init__(self, layers: Sequence[LayerWeights], final_norm_E: Tensor, params: DecoderParams) -> None:
        self._kept = (tuple(layers), final_norm_E)
        self._layers = (_Layer * len(layers))(*(_layer(weights) for weights in layers))
        self._kv: Sequence[Tensor] = ()
        self._decoder = _Decoder(
            layers=ctypes.addressof(self._layers), final_norm_E=final_norm_E.data_ptr(),
            num_layers=len(layers), hidden=final_norm_E.shape[0], heads=params.num_heads,
            kv_heads=params.num_kv_heads, dim=params.head_dim, dtype=DTYPE_CODE[final_norm_E.dtype],
            activation=_ACTIVATION_CODE[params.activation], eps=params.norm_eps,
            norm_offset=params.norm_offset, scale=params.scale, softcap=params.softcap,
        )  # fmt: skip

    def takes(self, kv: Sequence[Tensor]) -> bool:
        """Whether the library owns that KV memory, so that it can run the layers on it."""
        return library() is not None and _paged_attention.is_native(kv[0])

    def __call__(
        self,
        residual_TE: Tensor,
        position_T: Tensor,
        slot_T: Tensor,
        attention: AttentionBatch,
        kv: Sequence[Tensor],
        wanted: WantedTokens | None = None,
    ) -> Tensor:
        """Writes this step's keys and values; returns the hidden states, final norm applied: `[W, E]` of the
        wanted tokens, or `[T, E]`.

        Args:
            residual_TE: the embeddings; contiguous, and written.
            kv: a `kv_N2GPD` per layer, of which `takes` is true.
        """
        lib = library()
        assert lib is not None, "the library is loaded: takes() said so"
        if kv is not self._kv:
            self._bind(kv)
        tokens, hidden = residual_TE.shape
        every = last = _queries(attention, tokens)
        if wanted is not None:
            last = _queries(wanted.attention, wanted.index_W.shape[0])
        out_WE = residual_TE.new_empty((last.tokens, hidden))
        step = _Step(
            residual_TE.data_ptr(), out_WE.data_ptr(), position_T.data_ptr(), slot_T.data_ptr(),
            None if wanted is None else wanted.index_W.data_ptr(), every, last,
        )  # fmt: skip
        lib.quire_decoder(ctypes.addressof(self._decoder), ctypes.addressof(step))
        return out_WE

    def _bind(self, kv: Sequence[Tensor]) -> None:
        for layer, kv_N2GPD in zip(self._layers, kv, strict=True):
            layer.kv_N2GPD = kv_N2GPD.data_ptr()
        self._decoder.block = kv[0].shape[3]
        self._decoder.int8_kv = kv[0].dtype == torch.int8
        self._kv = kv


def can_run(layers: Sequence[LayerWeights], dtype: torch.dtype) -> bool:
    """Whether every weight is packed for the library, its inputs in their own order."""
    linears = [w for layer in layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return library() is not None and dtype in DTYPE_CODE and all(_is_native(w, dtype) for w in linears)


def _is_native(w: PackedLinear, dtype: torch.dtype) -> bool:
    fits = w.kind == "native_quantized" or (w.kind == "native" and w.weight.dtype == dtype)
    return fits and w.order_I is None and (w.bias_O is None or w.bias_O.dtype == dtype)


def _queries(batch: AttentionBatch, tokens: int) -> _Queries:
    table_SB = batch.page_table_SB
    return _Queries(
        table_SB.data_ptr(), batch.query_start_S1.data_ptr(), batch.seq_len_S.data_ptr(),
        tokens, table_SB.shape[0], table_SB.stride(0),
    )  # fmt: skip


def _layer(weights: LayerWeights) -> _Layer:
    norms = weights.head_norms
    q_norm_D, k_norm_D = (norms.q_weight_D, norms.k_weight_D) if norms else (None, None)
    return _Layer(
        _linear(weights.qkv), _linear(weights.o), _linear(weights.gate_up), _linear(weights.down),
        _pointer(weights.input_norm_E), _pointer(weights.attention_out_norm_E), _pointer(weights.mlp_norm_E),
        _pointer(weights.mlp_out_norm_E), _pointer(q_norm_D), _pointer(k_norm_D),
        weights.cos_sin_MR.data_ptr(), None, weights.cos_sin_MR.shape[1], weights.window,
    )  # fmt: skip


def _linear(w: PackedLinear) -> _Linear:
    scale = w.scale_OG
    group, scale_dtype = (
        (w.inputs // scale.shape[1], DTYPE_CODE[scale.dtype]) if scale is not None else (0, 0)
    )
    return _Linear(
        _pointer(w.weight), _pointer(scale), _pointer(w.zero_OG), _pointer(w.bias_O),
        w.inputs, w.outputs, group, w.bits, scale_dtype,
    )  # fmt: skip


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
