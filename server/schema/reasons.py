"""Why a field is refused, in the words that its 400 ends with. Knows names only."""

from __future__ import annotations

from collections.abc import Mapping

REASONS: Mapping[str, str] = {
    "audio": "the model writes text only",
    "modalities": "the model writes text only",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "web_search_options": "the server searches nothing",
    "moderation": "the server has no moderation model",
    "verbosity": "models do not know it; ask for it in a message",
    "service_tier": "all requests are served alike; send auto or default",
    "echo": "the reply has only what is new",
    "suffix": "nothing is filled in; write the model's own tokens for it as token ids",
    "use_beam_search": "there is no beam search; use n and temperature",
    "length_penalty": "there is no beam search",
    "early_stopping": "there is no beam search",
    "logits_processors": "requests bring no code; use logit_bias, allowed_token_ids or a grammar",
    "prompt_embeds": "prompts are text or token ids",
    "add_special_tokens": "the chat template writes them",
    "documents": "put them into a message",
    "chat_template": "the model's own template is used; requests bring no code",
    "kv_transfer_params": "blocks are not moved between servers",
    "mm_processor_kwargs": "the model reads text only",
    "return_tokens_as_token_ids": "use return_token_ids",
    "thinking_token_budget": "use max_tokens, or reasoning_effort",
    "spaces_between_special_tokens": "special tokens are shown as they are",
    "background": "a response is made while its caller waits",
    "truncation": "a conversation that is too long is refused; shorten it",
    "conversation": "use previous_response_id",
    "prompt": "templates of prompts are not kept here",
    "context_management": "a conversation is used as it is sent",
    "top_logprobs": "use /v1/chat/completions",
    "mcp_servers": "the server calls no others",
    "container": "the server runs no code",
    "messages": "put the text into input",
    "normalize": "vectors have length 1",
    "use_activation": "vectors have length 1",
    "embed_dtype": "values are 32-bit floats",
    "endianness": "base64 has the least byte first",
}
