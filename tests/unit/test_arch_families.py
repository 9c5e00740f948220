"""Published configs, and the decoders they describe."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import ModelError
from engine.model.arch import ArchSpec, RopeSpec
from engine.model.hf_config import HFConfig
from engine.model.registry import FAMILIES, find_family

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "vocab_size": 32000,
}
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 32000,
}
QWEN_2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA_2_2B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
# As published: almost everything is left to the family's defaults.
GEMMA_3_4B: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}
PHI_4_MINI: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}


def read(config: dict[str, Any], **changes: Any) -> ArchSpec:
    _, family = find_family(config["architectures"])
    return family.read(HFConfig({**config, **changes}))


def test_llama_3_1() -> None:
    spec = read(LLAMA_3_1_8B)
    assert (spec.q_size, spec.kv_size, spec.head_dim) == (4096, 1024, 128)
    assert set(spec.ropes) == {
        RopeSpec(500_000.0, 128, "llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    }
    assert spec.norm_eps == 1e-5
    assert spec.query_scale == 128**-0.5
    assert not spec.tied_embeddings
    assert not any(spec.windows)


def test_llama_2_has_as_many_kv_heads_as_heads() -> None:
    spec = read(LLAMA_2_7B)
    assert spec.num_kv_heads == 32
    assert set(spec.ropes) == {RopeSpec(10_000.0, 128)}


def test_llama_biases() -> None:
    spec = read(LLAMA_3_1_8B, attention_bias=True, mlp_bias=True)
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, True, True)


def test_mistral_window_is_for_all_layers_or_none() -> None:
    assert read(MISTRAL_7B).windows == (4096,) * 32
    assert read(MISTRAL_7B, sliding_window=None).windows == (0,) * 32


def test_mistral_nemo_has_heads_that_do_not_divide_the_hidden_size() -> None:
    spec = read(MISTRAL_7B, hidden_size=5120, head_dim=128)
    assert (spec.q_size, spec.hidden_size) == (4096, 5120)


def test_qwen_2_biases_and_a_window_that_is_switched_off() -> None:
    spec = read(QWEN_2_5_7B)
    assert (spec.qkv_bias, spec.o_bias, spec.qk_norm) == (True, False, False)
    assert not any(spec.windows)


def test_qwen_2_window_starts_after_max_window_layers() -> None:
    assert (
        read(QWEN_2_5_7B, use_sliding_window=True, max_window_layers=26).windows == (0,) * 26 + (131072,) * 2
    )
    types = ["sliding_attention", "full_attention"] * 14
    assert read(QWEN_2_5_7B, use_sliding_window=True, layer_types=types).windows == (131072, 0) * 14


def test_qwen_3_norms_queries_and_keys() -> None:
    spec = read(QWEN_3_0_6B)
    assert spec.qk_norm
    assert spec.tied_embeddings
    assert spec.q_size == 2048
    assert not spec.qkv_bias


def test_yarn_extends_the_context_that_the_config_claims() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    spec = read(QWEN_3_0_6B, rope_scaling=yarn)
    assert spec.max_positions == 131072
    assert spec.ropes[0].attention_factor == pytest.approx(1.1386294)


def test_gemma_2() -> None:
    spec = read(GEMMA_2_2B)
    assert spec.windows == (4096, 0) * 13
    assert (spec.attention_softcap, spec.logit_softcap) == (50.0, 30.0)
    assert spec.query_scale == 1 / 16
    assert spec.embed_scale == 48.0
    assert (spec.norm_offset, spec.sandwich_norms, spec.activation) == (1.0, True, "gelu_tanh")
    assert spec.tied_embeddings


def test_gemma_2_caps_are_off_where_null_and_its_own_where_absent() -> None:
    config = {**GEMMA_2_2B, "attn_logit_softcapping": None}
    del config["final_logit_softcapping"]
    assert (read(config).attention_softcap, read(config).logit_softcap) == (0.0, 30.0)


def test_gemma_3_nested_in_a_multimodal_config() -> None:
    spec = read(GEMMA_3_4B)
    assert spec.windows == ((1024,) * 5 + (0,)) * 5 + (1024,) * 4
    local, full = RopeSpec(10_000.0, 256), RopeSpec(1_000_000.0, 256, "linear", 8.0)
    assert [spec.ropes[i] for i in (0, 4, 5, 6, 33)] == [local, local, full, local, local]
    assert (spec.vocab_size, spec.num_heads, spec.num_kv_heads) == (262_208, 8, 4)
    assert spec.qk_norm
    assert spec.logit_softcap == 0.0


def test_gemma_3_rope_in_the_new_form() -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    text = {**GEMMA_3_4B["text_config"], "rope_parameters": rope}
    del text["rope_scaling"]
    assert read(GEMMA_3_4B, text_config=text) == read(GEMMA_3_4B)


def test_phi_4_mini() -> None:
    spec = read(PHI_4_MINI)
    rope = spec.ropes[0]
    assert (rope.kind, rope.dims, rope.original_max_positions) == ("longrope", 96, 4096)
    assert rope.attention_factor == pytest.approx(1.1902380714)
    assert spec.tied_embeddings
    assert spec.windows[0] == 262_144


def test_both_forms_of_rotary_parameters_mean_the_same() -> None:
    new = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500_000.0}
    assert read(new) == read(LLAMA_3_1_8B)


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(ModelError) as caught:
        find_family(["GPT2LMHeadModel"])
    message = str(caught.value)
    assert "\n" not in message
    assert all(name in message for name in ["GPT2LMHeadModel", *FAMILIES])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 2**31}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": "32000"}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 33}, "divisible"),
        ({"num_key_value_heads": 5}, "kv heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 1e3}, "hidden_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "activation"),
        ({"hidden_act": ["silu"]}, "activation"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                           "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
         "64 numbers"),
        ({"partial_rotary_factor": 0.001}, "rotary dims"),
        ({"partial_rotary_factor": 2}, "rotary dims"),
        ({"layer_types": ["full_attention"]}, "layers"),
        ({"layer_types": ["chunked_attention"] * 32}, "layer_types"),
    ],
)  # fmt: skip
def test_absurd_values_are_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named) as caught:
        read(LLAMA_3_1_8B, **changes)
    assert len(str(caught.value)) < 300


def test_an_encoder_is_refused() -> None:
    text = {**GEMMA_3_4B["text_config"], "use_bidirectional_attention": True}
    with pytest.raises(ModelError, match="bidirectional"):
        read(GEMMA_3_4B, text_config=text)
