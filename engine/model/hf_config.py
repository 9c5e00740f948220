"""Reading a Hugging Face `config.json`: every value is checked for type and range where it is read.

A config is somebody else's text. A missing or absurd value becomes one line that names it, not a
traceback from the middle of the model. Both ways to write rotary embeddings are understood: `rope_theta`
with `rope_scaling`, and `rope_parameters`, for all layers or per layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast, get_args

from engine.errors import ModelError
from engine.model.arch import Activation, ArchSpec, RopeKind, RopeSpec

MAX_HIDDEN = 1 << 17
MAX_MLP = 1 << 20
MAX_VOCAB = 1 << 24
MAX_POSITIONS = 1 << 27
MAX_LAYERS = MAX_HEADS = MAX_HEAD_DIM = 1 << 10

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
}
SLIDING = "sliding_attention"
FULL = "full_attention"
LAYER_TYPES = (SLIDING, FULL)


class HFConfig:
    """One object of a config, read with checks. `null` and absent are the same."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self._raw = raw
        self._where = where

    def get(self, key: str) -> Any:
        return self._raw.get(key)

    def has(self, key: str) -> bool:
        """Whether `key` is written down at all, be it as null."""
        return key in self._raw

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self._where}: {message}")

    def section(self, key: str) -> HFConfig:
        """The object under `key`; an empty one where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(f"{key} must be an object, got {_shown(value)}.")
        return HFConfig(value or {}, f"{self._where}: {key}")

    def sections(self, key: str) -> list[HFConfig]:
        """Each of the objects in the object under `key`."""
        outer = self.section(key)
        return [outer.section(name) for name in outer._raw]

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(f"{key} must be an integer from {low} to {high}, got {_shown(value)}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._value(key, default)
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not (ok and _finite(value) and value > 0):
            raise self.error(f"{key} must be a number above 0, got {_shown(value)}.")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, got {_shown(value)}.")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        values = self._value(key, None)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            raise self.error(f"{key} must be a list of {count} numbers.")
        each = [HFConfig({key: value}, self._where).number(key) for value in values]
        return tuple(each)

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing.")
        return value


class Sizes(TypedDict):
    """Keyword arguments of ArchSpec."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int


def read_sizes(config: HFConfig, **defaults: int) -> Sizes:
    """The sizes, which every family spells alike.

    Args:
        defaults: by the config's own keys, what the family assumes where the config is silent.
    """

    def size(key: str, high: int) -> int:
        return config.integer(key, defaults.get(key), high=high)

    hidden, heads = size("hidden_size", MAX_HIDDEN), size("num_attention_heads", MAX_HEADS)
    if "head_dim" not in defaults and config.get("head_dim") is None:
        if hidden % heads:
            raise config.error(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}.")
        defaults["head_dim"] = hidden // heads
    defaults.setdefault("num_key_value_heads", heads)
    return {
        "vocab_size": size("vocab_size", MAX_VOCAB),
        "hidden_size": hidden,
        "num_layers": size("num_hidden_layers", MAX_LAYERS),
        "num_heads": heads,
        "num_kv_heads": size("num_key_value_heads", MAX_HEADS),
        "head_dim": size("head_dim", MAX_HEAD_DIM),
        "mlp_size": size("intermediate_size", MAX_MLP),
        "max_positions": size("max_position_embeddings", MAX_POSITIONS),
    }


def read_activation(config: HFConfig, *keys: str) -> Activation:
    """The MLP's activation, from the first of `keys` that is set; silu where none is."""
    name = next((config.get(key) for key in keys if config.get(key) is not None), "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise config.error(f"activation {_shown(name)} is not supported; known: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def read_layer_types(config: HFConfig, default: Sequence[str]) -> tuple[str, ...]:
    """Per layer, `sliding_attention` or `full_attention`."""
    types = config.get("layer_types")
    if types is None:
        return tuple(default)
    if not isinstance(types, Sequence) or not all(kind in LAYER_TYPES for kind in types):
        raise config.error(f"layer_types must be a list of {' and '.join(LAYER_TYPES)}.")
    return tuple(types)


def read_windows(config: HFConfig, types: Sequence[str], *, default: int | None = None) -> tuple[int, ...]:
    """Per layer, the window of the sliding ones and 0 for the full ones."""
    if SLIDING not in types:
        return (0,) * len(types)
    window = config.integer("sliding_window", default, high=MAX_POSITIONS)
    return tuple(window if kind == SLIDING else 0 for kind in types)


def read_rope(
    config: HFConfig, head_dim: int, *, layer_type: str = FULL, theta: float = 10_000.0
) -> RopeSpec:
    """The rotary embedding of all layers, or of one layer type.

    Args:
        theta: the family's default.

    Raises:
        ModelError: a kind that Quire does not know, or its values are missing or absurd.
    """
    parameters, theta = _rope_parameters(config, layer_type, theta)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in get_args(RopeKind):
        known = ", ".join(get_args(RopeKind))
        raise parameters.error(f"rope type {_shown(kind)} is not supported; known: {known}.")
    share = parameters.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    dims = int(head_dim * share)
    if not 2 <= dims <= head_dim or dims % 2:
        raise config.error(f"{dims} rotary dims of head_dim {head_dim}; they must be even and fit.")
    return _READERS[cast(RopeKind, kind)](config, parameters, theta, dims)


def read_decoder(
    config: HFConfig, sizes: Sizes, windows: tuple[int, ...], *, norm_eps: float = 1e-6, **switches: bool
) -> ArchSpec:
    """A decoder with one rotary embedding for all layers, and with what most families spell alike.

    Args:
        norm_eps: the family's default.
        switches: fields of the ArchSpec that not all have.
    """
    rope = read_rope(config, sizes["head_dim"])
    sizes["max_positions"] = _rope_positions(rope, sizes["max_positions"])
    return ArchSpec(
        **sizes,
        windows=windows,
        ropes=(rope,) * sizes["num_layers"],
        query_scale=sizes["head_dim"] ** -0.5,
        norm_eps=config.number("rms_norm_eps", norm_eps),
        activation=read_activation(config, "hidden_act"),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
        **switches,
    )


def _rope_positions(rope: RopeSpec, claimed: int) -> int:
    """The context a checkpoint can serve: yarn is often added to a config without raising the claim."""
    if rope.kind != "yarn":
        return claimed
    return max(claimed, int(rope.factor * rope.original_max_positions))


def _rope_parameters(config: HFConfig, layer_type: str, theta: float) -> tuple[HFConfig, float]:
    """The object that describes the rotary embedding, old form or new, and its theta."""
    parameters = config.section("rope_parameters")
    if parameters.get(FULL) is not None or parameters.get(SLIDING) is not None:
        parameters = parameters.section(layer_type)
    elif not config.get("rope_parameters"):
        parameters = config.section("rope_scaling")
    return parameters, parameters.number("rope_theta", config.number("rope_theta", theta))


def _original(config: HFConfig, parameters: HFConfig) -> int:
    """The training length. Phi writes it beside the rotary parameters, and then that one counts."""
    for place in (config, parameters):
        if place.get("original_max_position_embeddings") is not None:
            return place.integer("original_max_position_embeddings", low=2, high=MAX_POSITIONS)
    return config.integer("max_position_embeddings", low=2, high=MAX_POSITIONS)


def _default(config: HFConfig, parameters: HFConfig, theta: float, dims: int) -> RopeSpec:
    return RopeSpec(theta, dims)


def _linear(config: HFConfig, parameters: HFConfig, theta: float, dims: int) -> RopeSpec:
    return RopeSpec(theta, dims, "linear", parameters.number("factor"))


def _dynamic(config: HFConfig, parameters: HFConfig, theta: float, dims: int) -> RopeSpec:
    if dims == 2:
        raise parameters.error("dynamic scaling needs more than two rotary dims.")
    length = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    return RopeSpec(theta, dims, "dynamic", parameters.number("factor"), length)


def _llama3(config: HFConfig, parameters: HFConfig, theta: float, dims: int) -> RopeSpec:
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if high <= low:
        raise parameters.error(f"high_freq_factor {high:g} must be above low_freq_factor {low:g}.")
    return RopeSpec(
        theta,
        dims,
        "llama3",
        parameters.number("factor"),
        _original(config, parameters),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(config: HFConfig, parameters: HFConfig, theta: float, dims: int) -> RopeSpec:
    original = _original(config, parameters)
    longest = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    factor = parameters.number("factor", longest / original)
    return RopeSpec(
        theta,
        dims,
        "yarn",
        factor,
        original,
        attention_factor=parameters.number("attention_factor", _yarn_attention_factor(parameters, factor)),
        beta_fast=parameters.number("beta_fast", 32.0),
        beta_slow=parameters.number("beta_slow", 1.0),
        truncate=parameters.boolean("truncate", True),
    )


def _yarn_attention_factor(parameters: HFConfig, factor: float) -> float:
    """YaRN, Peng et al. 2023, section 3.4; `mscale` and `mscale_all_dim` are DeepSeek's refinement."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return scale(parameters.number("mscale")) / scale(parameters.number("mscale_all_dim"))
    return scale(1.0)


def _longrope(config: HFConfig, parameters: HFConfig, theta: float, dims: int) -> RopeSpec:
    """LongRoPE, Ding et al. 2024. Its attention factor follows the stretch that the config claims."""
    original = _original(config, parameters)
    longest = config.integer("max_position_embeddings", high=MAX_POSITIONS)
    factor = parameters.number("factor", longest / original)
    grown = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        theta,
        dims,
        "longrope",
        factor,
        original,
        attention_factor=parameters.number("attention_factor", grown),
        short_factors=parameters.numbers("short_factor", dims // 2),
        long_factors=parameters.numbers("long_factor", dims // 2),
    )


_READERS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


def _finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: object) -> str:
    """A value for an error line: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
