"""What a checkpoint says of its embeddings: how to pool, and whether this decoder can give them at all.

Reads the files that sentence-transformers writes beside a model. Knows neither tensors nor requests. What is
wrong here is no reason not to serve text: it is said to those who ask for an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.embedding import EmbeddingFacts, PoolingKind
from engine.errors import ModelError
from engine.model.checkpoint import Checkpoint, load_json

MODULES = "modules.json"
POOLING = "1_Pooling/config.json"
# After the decoder: a pooling, and a vector of length 1, which all vectors get here.
_MODULES = frozenset({"Transformer", "Pooling", "Normalize"})
_FLAG = "pooling_mode_"
_KINDS = {
    "lasttoken": PoolingKind.LAST,
    "mean_tokens": PoolingKind.MEAN,
    "mean": PoolingKind.MEAN,
    "cls_token": PoolingKind.CLS,
    "cls": PoolingKind.CLS,
}


def read_embedding_facts(checkpoint: Checkpoint) -> EmbeddingFacts:
    """The facts; a checkpoint that says nothing pools the last token."""
    kind, refusal = PoolingKind.LAST, ""
    try:
        _check_causal(checkpoint.config)
        _check_modules(_optional(checkpoint, MODULES))
        kind = _kind(_optional(checkpoint, POOLING))
    except ModelError as error:
        refusal = str(error)
    spec = checkpoint.spec
    return EmbeddingFacts(spec.hidden_size, kind, refusal, only=not spec.lm_head)


def _optional(checkpoint: Checkpoint, name: str) -> Any:
    path = checkpoint.path / name
    return load_json(path, name) if path.exists() else None


def _check_causal(config: Mapping[str, Any]) -> None:
    """Some embedding models were trained to see the tokens that follow, in a decoder's clothes."""
    for key, causal in (("is_causal", True), ("use_bidirectional_attention", False)):
        said = config.get(key)
        if said is not None and bool(said) is not causal:
            raise ModelError(
                f"config.json says {key}: {str(said).lower()}; only decoders whose tokens see no later ones "
                "are run here."
            )


def _check_modules(modules: Any) -> None:
    if modules is None:
        return
    try:
        names = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (TypeError, KeyError):
        raise ModelError(f"{MODULES} is not a list of modules.") from None
    more = [name for name in names if name not in _MODULES]
    if more:
        raise ModelError(f"{MODULES} asks for {', '.join(more)[:100]}, which is not supported.")


def _kind(config: Any) -> PoolingKind:
    """By one name, or by a flag for each; several would be joined to a longer vector."""
    if config is None:
        return PoolingKind.LAST
    if not isinstance(config, dict):
        raise ModelError(f"{POOLING} is not a JSON object.")
    named = config.get("pooling_mode")
    flags = [key.removeprefix(_FLAG) for key, on in config.items() if key.startswith(_FLAG) and on is True]
    asked = [str(named)] if named else flags
    if len(asked) == 1 and asked[0] in _KINDS:
        return _KINDS[asked[0]]
    raise ModelError(
        f"{POOLING} asks for {', '.join(asked)[:100] or 'no pooling'}; supported: lasttoken, mean, cls."
    )
