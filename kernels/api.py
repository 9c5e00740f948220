"""The one door to the tensor ops: checks the arguments, picks the backend by the first tensor's device.

CUDA tensors go to Triton, which is imported when the first one arrives; all others go to the CPU backend.
The checks catch what would read or write the wrong memory. They look at shapes, dtypes and strides alone and
never at values, which would wait for the device. Shapes and semantics are in `kernels/README.md`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.decoder.cpu import NativeDecoder
from kernels.decoder.cpu import can_run as _can_run_decoder
from kernels.kv_format import head_dim_of, is_eight_bit, kv_width
from kernels.linear.linear import linear, pack_linear
from kernels.linear.quantized import dequantize, pack_quantized, quantize
from kernels.native.library import describe as _describe_native
from kernels.native.library import library as _native_library
from kernels.native.library import use_threads
from kernels.rehearsal import rehearsal
from kernels.types import (
    AttentionBatch,
    DecodeInputs,
    DecoderParams,
    HeadNorms,
    LayerWeights,
    PackedLinear,
    PenaltyParams,
    QuantizedWeight,
    SampleParams,
    WantedTokens,
)

__all__ = [
    "AttentionBatch",
    "DecodeInputs",
    "DecoderParams",
    "HeadNorms",
    "LayerWeights",
    "NativeDecoder",
    "PackedLinear",
    "PenaltyParams",
    "QuantizedWeight",
    "SampleParams",
    "WantedTokens",
    "backend_name",
    "copy_blocks",
    "decode_inputs",
    "dequantize",
    "is_native",
    "kv_width",
    "linear",
    "logprobs",
    "mask_tokens",
    "native_decoder",
    "pack_linear",
    "pack_quantized",
    "paged_attention",
    "penalize",
    "quantize",
    "rehearsal",
    "rms_norm",
    "rotary",
    "rotate_and_write",
    "sample",
    "silu_mul",
    "use_threads",
    "write_kv",
]

ACTIVATIONS = ("silu", "gelu_tanh")


def backend_name(device: torch.device | str) -> str:
    """Names what runs the ops on a device, for a start-up line."""
    if torch.device(device).type != "cuda":
        return f"cpu: {_describe_native()}"
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return f"triton {triton.__version__} (sm_{major}{minor})"


def is_native() -> bool:
    """Whether CPU ops run in the native library, which needs no copy of them in fp32."""
    return _native_library() is not None


def native_decoder(
    layers: Sequence[LayerWeights], final_norm_E: Tensor, params: DecoderParams
) -> NativeDecoder | None:
    """What runs all layers of a decoder in one native call; None where only the ops one by one can."""
    if final_norm_E.is_cuda or not _can_run_decoder(layers, final_norm_E.dtype):
        return None
    return NativeDecoder(layers, final_norm_E, params)


def paged_attention(
    q_THD: Tensor,
    kv_N2GPD: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attends each new token to its sequence's cached tokens, its own included.

    Args:
        q_THD: queries of all sequences, one after another; heads may be a slice of a wider tensor.
        kv_N2GPD: one layer's KV memory, which already holds this step's keys and values. In q's dtype, or in
            int8 with rows of `kv_width`; then q is of any dtype.
        batch: which tokens belong to which sequence, and where their keys are.
        scale: factor of the scores, 1 / sqrt(D) as a rule.
        window: how many positions back a token sees, itself included; 0 for all.
        softcap: `c` of `c * tanh(score / c)`; 0 for none.
        deterministic: a sequence's result has the same bits whatever else is in the batch. The CPU backends'
            always has.

    Returns:
        A new contiguous `[T, H, D]` tensor. Rows of tokens that belong to no sequence are undefined.
    """
    _check_kv(kv_N2GPD)
    _check_batch(batch)
    if q_THD.dim() != 3 or q_THD.stride(2) != 1 or not _goes_with(q_THD, kv_N2GPD):
        raise _bad(f"q must be {kv_N2GPD.dtype} [T, H, D] like the KV memory, last dim contiguous", q_THD)
    if q_THD.shape[2] != head_dim_of(kv_N2GPD) or q_THD.shape[1] % kv_N2GPD.shape[2]:
        raise _bad("q's heads must be a multiple of the kv heads, and of their size", q_THD, kv_N2GPD)
    if window < 0 or softcap < 0:
        raise ValueError(f"window and softcap must not be negative, got {window} and {softcap}")
    if q_THD.shape[0] == 0:
        return q_THD.new_empty(q_THD.shape)
    asked: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if q_THD.is_cuda:
        asked["deterministic"] = deterministic
    out_THD: Tensor = _backend("paged_attention", q_THD).paged_attention(q_THD, kv_N2GPD, batch, **asked)
    return out_THD


def write_kv(k_TGD: Tensor, v_TGD: Tensor, kv_N2GPD: Tensor, slot_T: Tensor) -> None:
    """Stores this step's keys and values in their slots, `block * P + offset`; slot -1 is skipped.

    k and v may be slices of a wider tensor with a contiguous last dim. Where the memory has 8 bits, they
    are rounded to it here, a factor for each token and head.
    """
    _check_write(k_TGD, v_TGD, kv_N2GPD, slot_T)
    if k_TGD.shape[0]:
        _backend("write_kv", kv_N2GPD).write_kv(k_TGD, v_TGD, kv_N2GPD, slot_T)


def rotate_and_write(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_sin_MR: Tensor,
    position_T: Tensor,
    kv_N2GPD: Tensor,
    slot_T: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Norms queries and keys per head where there are norms, rotates both, stores keys and values.

    Arguments are those of `rotary` and `write_kv`. q and k are used up.

    Returns:
        The queries for attention, in q's memory or in new.
    """
    if q_THD.is_cuda:
        _check_rotation(q_THD, k_TGD, cos_sin_MR, position_T)
        _check_write(k_TGD, v_TGD, kv_N2GPD, slot_T)
        if q_THD.shape[0]:
            _backend("rotate_and_write", q_THD).rotate_and_write(
                q_THD, k_TGD, v_TGD, cos_sin_MR, position_T, kv_N2GPD, slot_T, norms
            )
        return q_THD
    if norms is not None:
        q_THD = rms_norm(q_THD, norms.q_weight_D, norms.eps, offset=norms.offset)
        k_TGD = rms_norm(k_TGD, norms.k_weight_D, norms.eps, offset=norms.offset)
    rotary(q_THD, k_TGD, cos_sin_MR, position_T)
    write_kv(k_TGD, v_TGD, kv_N2GPD, slot_T)
    return q_THD


def copy_blocks(kv_N2GPD: Tensor, src_: Tensor, dst_: Tensor) -> None:
    """Copies whole blocks; destinations are distinct and none of them is a source."""
    _check_kv(kv_N2GPD)
    _check_ids("sources", src_)
    _check_ids("destinations", dst_)
    if src_.shape != dst_.shape:
        raise _bad("sources must be as many as destinations", src_, dst_)
    if src_.shape[0]:
        _backend("copy_blocks", kv_N2GPD).copy_blocks(kv_N2GPD, src_, dst_)


def decode_inputs(
    lanes_5S: Tensor, last_token_R: Tensor, page_table_RB: Tensor, block_size: int, out: DecodeInputs
) -> None:
    """Fills in what a step reads that computes one token of each sequence, and moves the lanes on by one.

    Args:
        lanes_5S: int64, written: of each sequence its row, position, token or -1, the column of a new block
            or -1, and the block.
        last_token_R: int64, by row.
        page_table_RB: int32, by row, written: gets the new blocks.
        out: written; the page table up to each sequence's length.
    """
    if lanes_5S.dtype != torch.int64 or lanes_5S.dim() != 2 or lanes_5S.shape[0] != 5:
        raise _bad("lanes must be int64 [5, S]", lanes_5S)
    for ids in (lanes_5S[0], last_token_R, out.token_id_S, out.position_S, out.slot_S, out.next_position_S):
        _check_ids("lanes, tokens, positions and slots", ids)
    for table in (page_table_RB, out.page_table_SB, out.seq_len_S):
        if table.dtype != torch.int32 or table.stride(-1) != 1:
            raise _bad("page tables and lengths must be int32, last dim contiguous", table)
    sequences = lanes_5S.shape[1]
    if out.page_table_SB.shape != (sequences, page_table_RB.shape[1]) or len(out.seq_len_S) != sequences:
        raise _bad("each sequence needs a length and a whole page table", out.page_table_SB, page_table_RB)
    _backend("decode_inputs", lanes_5S).decode_inputs(lanes_5S, last_token_R, page_table_RB, block_size, out)


def rms_norm(
    x_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    residual_TE: Tensor | None = None,
) -> Tensor:
    """Returns `x / rms(x) * (weight + offset)` over the last dim, in x's dtype, contiguous.

    With a residual: `residual += x` in place, and the norm is of that sum. x may be `[T, E]`, or `[T, H, E]`
    with any strides but the last (the heads of a fused projection); a residual is contiguous.
    """
    width = x_TE.shape[-1]
    if x_TE.dim() not in (2, 3) or x_TE.stride(-1) != 1:
        raise _bad("x must be [T, E] or [T, H, E], last dim contiguous", x_TE)
    if weight_E.shape != (width,) or not weight_E.is_contiguous():
        raise _bad("the weight must be contiguous and as wide as x", weight_E, x_TE)
    if residual_TE is not None and not (
        residual_TE.shape == x_TE.shape and residual_TE.dtype == x_TE.dtype and residual_TE.is_contiguous()
    ):
        raise _bad("the residual must be contiguous, of x's shape and dtype", residual_TE, x_TE)
    backend = _backend("rms_norm", x_TE)
    y_TE: Tensor = backend.rms_norm(x_TE, weight_E, eps, offset=offset, residual_TE=residual_TE)
    return y_TE


def rotary(q_THD: Tensor, k_TGD: Tensor, cos_sin_MR: Tensor, position_T: Tensor) -> None:
    """Rotates q and k in place, half-split pairs, by row `position_T[t]` of `cos[R / 2], sin[R / 2]`."""
    _check_rotation(q_THD, k_TGD, cos_sin_MR, position_T)
    if q_THD.shape[0]:
        _backend("rotary", q_THD).rotary(q_THD, k_TGD, cos_sin_MR, position_T)


def silu_mul(gate_up_T2F: Tensor, *, activation: str = "silu") -> Tensor:
    """Returns `act(gate) * up`, `[T, F]`, of rows that hold the gate and then the up projection."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if gate_up_T2F.dim() != 2 or gate_up_T2F.shape[1] % 2 or not gate_up_T2F.is_contiguous():
        raise _bad("gate_up must be contiguous [T, 2F]", gate_up_T2F)
    y_TF: Tensor = _backend("silu_mul", gate_up_T2F).silu_mul(gate_up_T2F, activation=activation)
    return y_TF


def sample(logits_SV: Tensor, params: SampleParams) -> Tensor:
    """Draws a token per row, int64 `[S]`: temperature, top-k, top-p, min-p, then a Gumbel-max draw."""
    _check_logits(logits_SV)
    if logits_SV.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=logits_SV.device)
    token_S: Tensor = _backend("sample", logits_SV).sample(logits_SV, params)
    return token_S


def penalize(logits_SV: Tensor, params: PenaltyParams) -> None:
    """Applies repetition, then frequency and presence penalties in place."""
    _check_logits(logits_SV)
    for state_UV in (params.output_count_UV, params.prompt_seen_UV):
        if state_UV.shape[1] != logits_SV.shape[1] or not state_UV.is_contiguous():
            raise _bad("counts and prompt flags must be contiguous [U, V]", state_UV, logits_SV)
    if logits_SV.shape[0]:
        _backend("penalize", logits_SV).penalize(logits_SV, params)


def mask_tokens(logits_SV: Tensor, words_KW: Tensor, row_K: Tensor) -> None:
    """Sets the logits of row `row_K[k]` to -inf in place, for tokens whose bit in mask k is not set.

    Args:
        words_KW: int32; bit t % 32 of word t // 32 is token t.
        row_K: distinct int64 rows of the logits.
    """
    _check_logits(logits_SV)
    _check_ids("rows", row_K)
    rows, vocabulary = row_K.shape[0], logits_SV.shape[1]
    if words_KW.dtype != torch.int32 or words_KW.dim() != 2 or not words_KW.is_contiguous():
        raise _bad("masks must be contiguous int32 [K, W]", words_KW)
    if words_KW.shape[0] != rows or words_KW.shape[1] * 32 < vocabulary or rows > logits_SV.shape[0]:
        raise _bad("masks must be one per row, with a bit for each token", words_KW, row_K, logits_SV)
    if rows:
        _backend("mask_tokens", logits_SV).mask_tokens(logits_SV, words_KW, row_K)


def logprobs(logits_SV: Tensor, token_S: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each token's log probability, and the ids and log probabilities of the `top` likeliest."""
    _check_logits(logits_SV)
    if token_S.shape != logits_SV.shape[:1] or token_S.dtype != torch.int64:
        raise _bad("tokens must be int64, one per row of logits", token_S, logits_SV)
    if not 0 <= top <= logits_SV.shape[1]:
        raise ValueError(f"top must be between 0 and the vocabulary {logits_SV.shape[1]}, got {top}")
    chosen_S, top_ids_SK, top_SK = _backend("logprobs", logits_SV).logprobs(logits_SV, token_S, top)
    return chosen_S, top_ids_SK, top_SK


def _backend(op: str, x: Tensor) -> Any:
    """The module that runs an op on tensors where x is."""
    return _module(op, "triton" if x.is_cuda else "cpu")


@functools.cache
def _module(op: str, backend: str) -> Any:
    return importlib.import_module(f"kernels.{op}.{backend}")


def _bad(rule: str, *got: Tensor) -> ValueError:
    seen = "; ".join(f"{x.dtype} {tuple(x.shape)} with strides {x.stride()}" for x in got)
    return ValueError(f"{rule}; got {seen}")


def _check_kv(kv_N2GPD: Tensor) -> None:
    if kv_N2GPD.dim() != 5 or kv_N2GPD.shape[1] != 2 or not kv_N2GPD.is_contiguous():
        raise _bad("KV memory must be contiguous [blocks, 2, kv_heads, block_size, head_dim]", kv_N2GPD)


def _check_write(k_TGD: Tensor, v_TGD: Tensor, kv_N2GPD: Tensor, slot_T: Tensor) -> None:
    _check_kv(kv_N2GPD)
    _check_ids("slots", slot_T)
    expected = (slot_T.shape[0], kv_N2GPD.shape[2], head_dim_of(kv_N2GPD))
    if k_TGD.dtype != v_TGD.dtype:
        raise _bad("k and v must have the same dtype", k_TGD, v_TGD)
    for x_TGD in (k_TGD, v_TGD):
        if x_TGD.shape != expected or x_TGD.stride(2) != 1 or not _goes_with(x_TGD, kv_N2GPD):
            raise _bad(f"k and v must be {kv_N2GPD.dtype} {expected}, last dim contiguous", x_TGD)


def _check_rotation(q_THD: Tensor, k_TGD: Tensor, cos_sin_MR: Tensor, position_T: Tensor) -> None:
    rotary_dim = cos_sin_MR.shape[1]
    if cos_sin_MR.dtype != torch.float32 or rotary_dim % 2 or not cos_sin_MR.is_contiguous():
        raise _bad("the table must be contiguous fp32 with an even number of columns", cos_sin_MR)
    _check_ids("positions", position_T)
    for x_THD in (q_THD, k_TGD):
        if x_THD.dim() != 3 or x_THD.stride(2) != 1 or x_THD.dtype != q_THD.dtype:
            raise _bad("q and k must be [T, heads, D] of one dtype, last dim contiguous", x_THD)
        if x_THD.shape[0] != position_T.shape[0] or x_THD.shape[2] < rotary_dim:
            raise _bad("q and k must have a row per position and at least R dims", x_THD, cos_sin_MR)


def _goes_with(x: Tensor, kv_N2GPD: Tensor) -> bool:
    """Whether keys, values or queries of this dtype can meet that memory."""
    if is_eight_bit(kv_N2GPD.dtype):
        return x.is_floating_point()
    return x.dtype == kv_N2GPD.dtype


def _check_batch(batch: AttentionBatch) -> None:
    table_SB, start_S1, length_S = batch.page_table_SB, batch.query_start_S1, batch.seq_len_S
    if not table_SB.dtype == start_S1.dtype == length_S.dtype == torch.int32:
        raise _bad("the page table, query starts and lengths must be int32", table_SB, start_S1, length_S)
    sequences = length_S.shape[0]
    if table_SB.shape[0] != sequences or start_S1.shape[0] != sequences + 1:
        raise _bad(
            f"{sequences} lengths need as many page table rows, one query start more", table_SB, start_S1
        )
    if table_SB.stride(1) != 1 or start_S1.stride(0) != 1 or length_S.stride(0) != 1:
        raise _bad(
            "page table rows, query starts and lengths must be contiguous", table_SB, start_S1, length_S
        )
    if not 0 <= batch.num_decodes <= sequences:
        raise ValueError(f"num_decodes must be between 0 and {sequences}, got {batch.num_decodes}")


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        raise _bad(f"{name} must be contiguous int64 [n]", ids)


def _check_logits(logits_SV: Tensor) -> None:
    if logits_SV.dtype != torch.float32 or logits_SV.dim() != 2 or not logits_SV.is_contiguous():
        raise _bad("logits must be contiguous fp32 [S, V]", logits_SV)
