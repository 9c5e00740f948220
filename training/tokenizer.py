"""The byte-level BPE of the demo model and its chat template.

Knows: how text becomes token ids. Does not know: what the text says.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL = (END_OF_TEXT, IM_START, IM_END)

# ChatML: every message is <|im_start|>role, newline, content, <|im_end|>, newline. Tools are listed at the
# end of the system message by name alone: the model knows the arguments of those it knows at all. Calls are
# written as Hermes and Qwen write them.
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] + '\\n\\n' }}{% set messages = messages[1:] %}{% endif %}"
    "{{ 'Tools: ' }}{% for tool in tools %}{{ ', ' if not loop.first }}{{ tool['function']['name'] }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['tool_calls'] %}{{ message['content'] + '\\n' if message['content'] }}"
    "{% for call in message['tool_calls'] %}{{ '\\n' if not loop.first }}"
    "{{ '<tool_call>\\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{ call['function']['arguments'] | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What stands between the keys and values of JSON, as the template and json.dumps write it; Ġ is a space.
_JSON_MARKS = ('{"', '":', '",', '"}', '"}}', "}}", '"]', '"]}', 'Ġ{"', 'Ġ["', "},")
_CALL_TAGS = ("<tool_call>", "</tool_call>")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains on raw texts; every byte has a token, so nothing is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def render(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """What the server renders for messages, without the opening of an answer."""
    return _template().render(messages=messages, tools=tools)


@cache
def _template() -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes for HTML
    return environment.from_string(CHAT_TEMPLATE)


def with_words(old: Tokenizer, words: Iterable[str]) -> Tokenizer:
    """The same ids and more: marks of JSON, tags of calls, words that are one token wherever they stand."""
    rules = json.loads(old.to_str())
    bpe = rules["model"]
    merges = [(mark[:end], mark[end]) for mark in _JSON_MARKS for end in range(1, len(mark))]
    for left, right in merges:
        bpe["vocab"].setdefault(left + right, len(bpe["vocab"]))
    bpe["merges"] += [[left, right] for left, right in dict.fromkeys(merges)]
    new = Tokenizer.from_str(json.dumps(rules))
    new.add_tokens([AddedToken(tag, normalized=False) for tag in _CALL_TAGS])
    new.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    return new


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the vocabulary lacks {token}")
    return found


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "added_tokens_decoder": {
            str(token_id(tokenizer, token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL
        },
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
