"""`continue_final_message`: the prompt ends where the last message's text does, as with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidRequest
from tests.helpers.text_models import CHATML
from tests.unit.test_text_chat import TEMPLATES, both, control_in, load, turns

__all__ = ["both"]  # the fixture: ours, and transformers' on the same files


@pytest.mark.parametrize(
    "messages",
    [
        turns("hello", "The answer"),
        turns("hello", "The answer", "and", "is <b>"),
        turns("The answer", "The answer"),
        turns("to go on"),
    ],
)
def test_the_same_prompt_as_transformers(both: Any, messages: list[dict[str, Any]]) -> None:
    _, chat, theirs = both
    text = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert text.endswith(messages[-1]["content"])
    assert chat.render_text(messages, continue_final_message=True) == text
    ids = theirs.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert chat.render(messages, continue_final_message=True) == ids


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_nobody_types_a_control_token(name: str, tmp_path: Path) -> None:
    tokenizer, chat = load(tmp_path, TEMPLATES[name])
    plain = chat.render(turns("a", "b"), continue_final_message=True)
    for typed in (*tokenizer.control, "b<|im_", "b<"):
        ids = chat.render(turns("a", typed), continue_final_message=True)
        assert control_in(tokenizer, ids) == control_in(tokenizer, plain), typed
        if "think" not in typed:  # which the reasoning template cuts out, as it should
            assert tokenizer.decode(ids, skip_special_tokens=False).endswith(typed)


def test_white_space_at_the_end_is_kept(tmp_path: Path) -> None:
    _, chat = load(tmp_path, CHATML)
    assert chat.render_text(turns("a", "b  \n"), continue_final_message=True).endswith("b  \n")


def test_a_template_that_leaves_the_last_message_out(tmp_path: Path) -> None:
    _, chat = load(tmp_path, "{{ messages[0]['content'] }}<|im_end|>")
    with pytest.raises(InvalidRequest) as caught:
        chat.render(turns("a", "b"), continue_final_message=True)
    assert caught.value.param == "continue_final_message"
