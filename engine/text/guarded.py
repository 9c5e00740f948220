"""A tokenizer library instance whose control tokens have names that nobody can type.

The library finds an added token wherever its text occurs, so `<|im_end|>` typed by a user would end the
turn. Here each control token is renamed, in the added tokens as well as in the model's vocabulary, to a
secret drawn at start-up. Typed control tokens are then ordinary text for every kind of model, in one pass
and with the library's own rules; whoever may write a real one asks for its secret.

Does not know who may; tokenizer.py decides.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from engine.errors import ModelError

if TYPE_CHECKING:
    import tokenizers


def build(
    source: Mapping[str, Any], added: list[dict[str, Any]], control: Mapping[str, int]
) -> tuple[tokenizers.Tokenizer, dict[int, str]]:
    """Builds the library's tokenizer.

    Args:
        source: tokenizer.json. Not changed.
        added: the added tokens, completed.
        control: text -> id of those to rename.

    Returns:
        The tokenizer, and control token id -> secret.

    Raises:
        ModelError: the library refuses the file.
    """
    import tokenizers  # a model that is given token ids does without the library

    names = {text: _secret(token_id) for text, token_id in control.items()}
    renamed = dict(source)
    renamed["added_tokens"] = [
        # Unnormalised, so that no normaliser touches the secret.
        entry | {"content": names[entry["content"]], "normalized": False}
        if entry["content"] in names
        else entry
        for entry in added
    ]
    renamed["model"] = _rename_model(source["model"], names)
    renamed["truncation"] = renamed["padding"] = None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(renamed))
    except Exception as error:  # the library raises plain Exception
        raise ModelError("tokenizer.json is not one the tokenizers library can read.") from error
    for text, token_id in control.items():
        if tokenizer.token_to_id(names[text]) != token_id:
            raise ModelError(f"tokenizer.json: the id of added token {text!r} is not {token_id}.")
    return tokenizer, {token_id: names[text] for text, token_id in control.items()}


def _secret(token_id: int) -> str:
    """Private-use brackets, so that no pre-tokenizer joins it to a word; 64 bits that nobody can guess."""
    return f"\ue000{secrets.token_hex(8)}.{token_id}\ue001"


def _rename_model(model: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Control tokens keep their ids in the vocabulary, but no text leads there any more."""
    renamed = dict(model)
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        renamed["vocab"] = {names.get(token, token): token_id for token, token_id in vocab.items()}
    else:
        renamed["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if model.get("unk_token") in names:
        renamed["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        renamed["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    return renamed


def _touches(merge: str | list[str], names: Mapping[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def matcher(control: Mapping[str, int]) -> re.Pattern[str]:
    """Finds control tokens in text as the library would: leftmost, then longest."""
    longest_first = sorted(control, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
