"""Writes the model directory in Hugging Face form.

Knows: file names and formats. Does not know: how the model was trained or how good it is.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from training import tokenizer
from training.model import Llama, Shape


def write_model(model: Llama, bpe: Tokenizer, folder: Path) -> None:
    """Everything but the card: config, generation config, tokenizer, weights."""
    folder.mkdir(parents=True, exist_ok=True)
    end_of_text = tokenizer.token_id(bpe, tokenizer.END_OF_TEXT)
    eos = [tokenizer.token_id(bpe, tokenizer.IM_END), end_of_text]
    _json(folder / "config.json", model.shape.hf_config(end_of_text, eos, end_of_text))
    ids = {"bos_token_id": end_of_text, "eos_token_id": eos, "pad_token_id": end_of_text}
    _json(folder / "generation_config.json", {**ids, "do_sample": False})
    tokenizer.save(bpe, folder, model.shape.max_positions)
    weights = folder / "model.safetensors"
    save_file(model.checkpoint(), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner alone; an installed package is read by others


def read_model(folder: Path, shape: Shape) -> tuple[Tokenizer, Llama]:
    """What `write_model` wrote: the tokenizer and the weights of a model of that shape."""
    model = Llama(shape)
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): value.float() for name, value in weights.items()})
    return Tokenizer.from_file(str(folder / "tokenizer.json")), model


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
