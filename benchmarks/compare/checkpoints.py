"""Checkpoints with random weights in Hugging Face's layout, with a tokenizer. For timing, not for text.

Made once, under build/peers/models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.models import CONFIGS

MODELS = {"110m": "110m", "0.6b": "qwen3-0.6b"}
FOLDER = ROOT / "build" / "peers" / "models"
END = "<end>"
MERGE = ("Ġ", "t")  # a byte-level BPE of one merge: prompts are token ids, so the text hardly matters


def checkpoint(name: str) -> Path:
    """The folder of a model of MODELS, made if it is not there."""
    folder = FOLDER / name
    if not (folder / "complete").exists():
        write_checkpoint(folder, CONFIGS[MODELS[name]])
        (folder / "complete").touch()
    return folder


def write_checkpoint(folder: Path, config: Mapping[str, Any], seed: int = 0) -> None:
    """Weights, configuration and tokenizer of this shape. The same seed gives the same weights."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, config, seed)
    _write_tokenizer(folder, config["vocab_size"])


def vocabulary(size: int) -> list[str]:
    """The end token, 256 bytes, one merge, then a word of its own for each id."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [END, *sorted(ByteLevel.alphabet()), "".join(MERGE)]
    return tokens + [f"Ġt{i}" for i in range(len(tokens), size)]


def _write_weights(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family = config["architectures"][0].removesuffix("ForCausalLM").lower()
    torch.manual_seed(seed)
    hf_config = AutoConfig.for_model(family, **config, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16).save_pretrained(folder)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = vocabulary(vocab_size)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [MERGE]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "chat_template": "{% for message in messages %}{{ message.content }} {% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
