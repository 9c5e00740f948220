"""Small tokenizers of every kind that models use, made in milliseconds, and real-style chat templates."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog. <s> </s> system user assistant im_start im_end think",
    "Ein Text mit Umlauten: äöüß, and code: if (a < b) { return [x, y]; } <|im_end|> <s>",
    "日本語のテキスト、絵文字 👩‍👩‍👧‍👦 😀 и немного русского.",
    "hello world " * 20,
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<|eot|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Tools, reasoning kept apart by string operations on the content, as Qwen 3 does.
REASONING = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n') %}
            {%- set reasoning = reasoning.split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' }}
            {{- reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
# Alternation enforced, contents stripped, BOS and EOS as variables: Llama 2 and Mistral.
INST = """{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + message['content'] | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""
# Role names become tokens, and parts are joined without anything between: Phi and multimodal models.
PARTS = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def special(text: str, **flags: bool) -> AddedToken:
    return AddedToken(text, special=True, normalized=False, **flags)


@cache
def byte_level() -> str:
    """GPT-2, Llama 3, Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = [*CONTROL, "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]"]
    tokenizer.add_special_tokens([special(name) for name in names])
    tokenizer.add_special_tokens([special("<|end|>", rstrip=True)])
    plain = ["<think>", "</think>", "<tool_response>", "</tool_response>", "<|fim|>", "<b>", "\n\n\n"]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    return tokenizer.to_str()


@cache
def sentencepiece(kind: str = "llama") -> str:
    """Llama 2 ("llama": a prefix space) and Gemma ("gemma": none), with byte fallback.

    As in converted SentencePiece models, merges lead to the control tokens.
    """
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({c for text in CORPUS for c in text.replace(" ", "▁") if ord(c) < 0x2600})
    merges = [
        ("<", "s"),
        ("<s", ">"),
        ("<", "/"),
        ("</", "s"),
        ("</s", ">"),
        ("▁", "h"),
        ("▁h", "e"),
        ("l", "l"),
    ]
    merges += [("▁", "▁"), ("o", "r"), ("▁", "w"), ("▁w", "or"), ("▁he", "ll"), ("▁hell", "o")]
    for token in (*letters, *("".join(pair) for pair in merges)):
        if token not in tokens:
            tokens.append(token)
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(steps)
    names = ["<unk>", "<s>", "</s>", *CONTROL, "[INST]", "[/INST]"]
    tokenizer.add_special_tokens([special(name) for name in names])
    plain = ["\n\n", "<table>"] if kind == "gemma" else []
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    return tokenizer.to_str()


@cache
def unigram() -> str:
    """T5 and others: pieces with scores, a control token's being the best of all."""
    letters = sorted({c for text in CORPUS for c in text.replace(" ", "▁")})
    pieces = [
        ("<unk>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("▁hello", -3.0),
        ("▁the", -3.0),
        *((c, -8.0) for c in letters),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([special(name) for name in ("<unk>", "<s>", "</s>", *CONTROL)])
    return tokenizer.to_str()


@cache
def word_piece() -> str:
    """BERT's: a token's text depends on its neighbours."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


KINDS: dict[str, Any] = {
    "byte_level": byte_level,
    "llama": lambda: sentencepiece("llama"),
    "gemma": lambda: sentencepiece("gemma"),
    "unigram": unigram,
    "word_piece": word_piece,
}


def write_model(folder: Path, kind: str = "byte_level", template: object = None, **config: object) -> Path:
    """Writes a checkpoint's text side."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(KINDS[kind](), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    if kind != "word_piece":
        settings = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def ends_of(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a reply, of a model that `write_model` made."""
    return (tokenizer.control[tokenizer.named_tokens["eos_token"]],)
