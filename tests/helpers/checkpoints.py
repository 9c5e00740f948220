"""Tiny random checkpoints of every family, and what `transformers` makes of them.

    path = make_checkpoint(tmp_path, "qwen3", num_key_value_heads=4)
    token_ids, logprobs = reference_generate(path, [5, 6, 7], 16)

Weights are fp32 and large, so that greedy choices are no ties and every norm and bias matters; no token ends
a generation. Checkpoints are made once per test process and shared: copy one before changing its files.
"""

from __future__ import annotations

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.embedding import PoolingKind

# Under the suite's "warnings are errors", importing this much of somebody else's code would fail by chance.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB_SIZE = 320
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GEMMA: dict[str, Any] = {**_COMMON, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16}

# Family -> (model class, config class, what is not as in _COMMON).
_FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _COMMON),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_COMMON, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _COMMON),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_COMMON, "head_dim": 24}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_GEMMA, "num_hidden_layers": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_GEMMA, "num_hidden_layers": 7}),
    "gemma3-multimodal": (
        "Gemma3ForConditionalGeneration",
        "Gemma3TextConfig",
        {**_GEMMA, "num_hidden_layers": 7},
    ),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _COMMON),
}


class TinyConfig(NamedTuple):
    """A family and what to change in its tiny config.

    Besides the config's own keys, `overrides` understands `shards` (how many weight files, about),
    `old_form` (rotary parameters written as transformers 4 did) and `bare` (the decoder is saved alone).
    """

    family: str
    overrides: dict[str, Any]
    note: str = "plain"

    @property
    def id(self) -> str:
        return f"{self.family}-{self.note}"


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **parameters}}


_LLAMA3 = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0)
_DEEPSEEK_YARN = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=1.0, truncate=False
)
_GEMMA3_LINEAR = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5_000.0},
    }
}


def _longrope(original: int, pairs: int, **more: Any) -> dict[str, Any]:
    """transformers picks the factors by each sequence's length; Quire once, by the longest it serves.

    With a training length of 2 both always take the long ones, with 256 the short ones.
    """
    short, long = [1.0 + 0.1 * i for i in range(pairs)], [2.0 + 0.5 * i for i in range(pairs)]
    rope = _rope("longrope", short_factor=short, long_factor=long, factor=4.0, **more)
    return {**rope, "original_max_position_embeddings": original}


ALL_CONFIGS: list[TinyConfig] = [
    TinyConfig("llama", {}),
    TinyConfig("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}, "mha-tied"),
    TinyConfig("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}, "biases-mqa"),
    TinyConfig("llama", {**_LLAMA3, "shards": 4, "head_dim": 32}, "llama3rope-sharded"),
    TinyConfig("llama", {**_LLAMA3, "old_form": True}, "llama3rope-old"),
    TinyConfig("llama", _rope("linear", factor=4.0), "linear"),
    TinyConfig("llama", _rope("dynamic", factor=4.0), "dynamic"),
    TinyConfig("llama", _YARN, "yarn"),
    TinyConfig("mistral", {}),
    TinyConfig("mistral", {"sliding_window": 16, "head_dim": 8}, "window"),
    TinyConfig("qwen2", {"tie_word_embeddings": True}, "tied"),
    TinyConfig("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}, "window"),
    TinyConfig("qwen3", {}),
    TinyConfig("qwen3", {"attention_bias": True, "tie_word_embeddings": True, **_DEEPSEEK_YARN}, "bias-yarn"),
    TinyConfig("qwen3", {**_YARN, "old_form": True, "shards": 3}, "yarn-old-sharded"),
    TinyConfig("gemma2", {}),
    TinyConfig(
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": 5.0, "attention_bias": True},
        "caps-bias",
    ),
    TinyConfig("gemma3", _GEMMA3_LINEAR, "dual-rope"),
    TinyConfig("gemma3", {**_GEMMA3_LINEAR, "old_form": True, "num_key_value_heads": 4}, "dual-rope-old"),
    TinyConfig("gemma3-multimodal", _GEMMA3_LINEAR),
    TinyConfig("phi3", {}),
    TinyConfig("phi3", {"sliding_window": 20, "num_key_value_heads": 4}, "window-mha"),
    TinyConfig("phi3", _longrope(256, 8), "longrope-short"),
    TinyConfig(
        "phi3",
        {**_longrope(2, 6, partial_rotary_factor=0.75), "tie_word_embeddings": True, "old_form": True},
        "longrope-long-partial-tied",
    ),
]

_made: dict[str, Path] = {}


def make_checkpoint(tmp: Path, family: str, **overrides: Any) -> Path:
    """A checkpoint with tokenizer and chat template, in a new folder of `tmp` or where it was made before."""
    key = json.dumps([family, overrides], sort_keys=True)
    if key not in _made or not _made[key].exists():
        path = tmp / f"{family}-{len(_made)}"
        shards, old_form = overrides.pop("shards", 1), overrides.pop("old_form", False)
        bare = overrides.pop("bare", False)
        model = _make_model(family, overrides)
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        saved = model.model if bare else model
        saved.save_pretrained(path, max_shard_size=weight_bytes // shards if shards > 1 else "1GB")
        if old_form:
            _write_old_form(path / "config.json")
        write_tokenizer(path)
        _made[key] = path
    return _made[key]


def _make_model(family: str, overrides: Mapping[str, Any]) -> Any:
    model_class, config_class, defaults = _FAMILIES[family]
    # Configs write into the dicts they are given.
    values = json.loads(json.dumps({**defaults, **overrides}))
    config = getattr(transformers, config_class)(**values)
    if family == "gemma3-multimodal":
        config = _multimodal(config)
    torch.manual_seed(2)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            # Else Gemma's scaled embeddings drown its blocks, and it repeats one token whatever they do.
            if family.startswith("gemma") and "layernorm" in name and "post_" in name:
                parameter.add_(4.0)
    return model


def _multimodal(text_config: Any) -> Any:
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return transformers.Gemma3Config(
        text_config=text_config,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=VOCAB_SIZE - 1,
        eos_token_id=None,
    )


def _write_old_form(path: Path) -> None:
    """Rewrites a config the way transformers 4 wrote it."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    if "full_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = 6
        config.pop("layer_types")
        rope = rope["full_attention"]
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:  # Phi-4-mini
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    path.write_text(json.dumps(config))


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer: special tokens, then one token for each byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def reference_generate(
    path: Path, prompt_ids: Sequence[int], num_tokens: int
) -> tuple[list[int], list[float]]:
    """The greedy tokens of `transformers` in fp32, and the log probability of each."""
    token_ids, logprobs = _reference(path, tuple(prompt_ids), num_tokens)
    return list(token_ids), list(logprobs)


def reference_logits(
    path: Path, token_ids: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The logits `[T, V]` of `transformers` at every position of a sequence, computed in `dtype`."""
    with _single_threaded():
        model = _reference_model(path, dtype)
        logits: torch.Tensor = model(torch.tensor([list(token_ids)]), use_cache=False).logits
    return logits[0].float()


def reference_embedding(
    path: Path,
    token_ids: Sequence[int],
    kind: PoolingKind = PoolingKind.LAST,
    dimensions: int | None = None,
) -> NDArray[np.float64]:
    """The last hidden states of `transformers`, final norm applied, pooled to a vector of length 1."""
    with _single_threaded():
        out = _reference_model(path)(
            torch.tensor([list(token_ids)]), use_cache=False, output_hidden_states=True
        )
    hidden_TE = out.hidden_states[-1][0].double().numpy()
    pooled = {
        PoolingKind.LAST: hidden_TE[-1],
        PoolingKind.MEAN: hidden_TE.mean(0),
        PoolingKind.CLS: hidden_TE[0],
    }
    vector: NDArray[np.float64] = pooled[kind][:dimensions]
    return vector / np.linalg.norm(vector)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """For models this small, handing work to threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


@functools.lru_cache(maxsize=4)
def _reference_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    architecture = json.loads((path / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture)
    return model_class.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


@functools.cache
def _reference(path: Path, prompt_ids: tuple[int, ...], num_tokens: int) -> tuple[list[int], list[float]]:
    """Tokens from a cached decode, log probabilities from one pass over the whole without a cache."""
    model, ids, cache = _reference_model(path), list(prompt_ids), None
    with _single_threaded():
        for _ in range(num_tokens):
            new = ids if cache is None else ids[-1:]
            out = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            ids.append(int(out.logits[0, -1].argmax()))
    drawn = ids[len(prompt_ids) :]
    logprobs = reference_logits(path, ids[:-1])[-num_tokens:].log_softmax(-1)
    return drawn, logprobs.gather(1, torch.tensor(drawn)[:, None])[:, 0].tolist()
