"""Which architectures Quire serves: the name in `config.json` -> the family that can read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.errors import ModelError
from engine.model.families import gemma, llama, phi, qwen
from engine.model.family import Family

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": llama.LLAMA,
    "MistralForCausalLM": llama.MISTRAL,
    "Qwen2ForCausalLM": qwen.QWEN2,
    "Qwen3ForCausalLM": qwen.QWEN3,
    "Gemma2ForCausalLM": gemma.GEMMA2,
    "Gemma3ForCausalLM": gemma.GEMMA3_TEXT,
    "Gemma3ForConditionalGeneration": gemma.GEMMA3,
    "Phi3ForCausalLM": phi.PHI3,
    # The decoder alone, as embedding models are often saved.
    "LlamaModel": llama.LLAMA,
    "MistralModel": llama.MISTRAL,
    "Qwen2Model": qwen.QWEN2,
    "Qwen3Model": qwen.QWEN3,
    "Gemma2Model": gemma.GEMMA2,
    "Phi3Model": phi.PHI3,
}


def find_family(architectures: Sequence[str]) -> tuple[str, Family]:
    """The first of a config's architectures that is served, and its family.

    Raises:
        ModelError: none is; the line lists those that are.
    """
    for name in architectures:
        if name in FAMILIES:
            return name, FAMILIES[name]
    asked = ", ".join(architectures)[:100] or "none named in config.json"
    raise ModelError(f"Architecture not supported: {asked}. Supported: {', '.join(FAMILIES)}.")
