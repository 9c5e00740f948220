"""Inspecting a checkpoint before anything is allocated: can it be served, and what does it need?

Reads JSON and the headers of safetensors and GGUF files, never weights; executes nothing that comes with a
checkpoint. Knows files and names, not tensors. What is wrong is said in one line that names the file or key
at fault.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import DTYPE_BYTES, Quantization
from engine.errors import ModelError
from engine.gguf.config import read_config
from engine.gguf.container import is_gguf, read_gguf
from engine.hub import find_model
from engine.model.arch import ArchSpec
from engine.model.family import Family
from engine.model.gguf.shown import show_tensors
from engine.model.headers import TensorInfo, read_header
from engine.model.hf_config import HFConfig
from engine.model.quant import holding
from engine.model.quant.formats import read_format
from engine.model.quant.stored import Format, StoredWeight, check
from engine.model.registry import find_family
from engine.model.weights import Slot, WeightNames, model_slots

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MAX_JSON_BYTES = 64 << 20
LOADABLE = ("BF16", "F16", "F32", "F64")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Tables that old checkpoints saved and every engine computes itself.
HARMLESS = (".inv_freq", ".masked_bias", ".attn.bias", ".embed_positions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that can be loaded, and everything known about it without loading it.

    Attributes:
        path: the local folder, or the GGUF file.
        name: the folder or hub id as it was asked for.
        tensors: every tensor in the files, by its name on disk.
        slots: the model's tensors, each with the names of its parts; those are in `tensors` or `stored`.
        stored: by the name of the part, the weights that come quantised, all of their tensors checked.
        format: the name of the format of those; empty where there are none.
        unused: names in the files that nothing reads and that are not known to be harmless.
        dtype: what the config says the weights were trained in, or None.
        eos_token_ids: end-of-turn tokens, of generation_config.json or else config.json.
    """

    path: Path
    name: str
    architecture: str
    spec: ArchSpec
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    slots: tuple[Slot, ...]
    stored: Mapping[str, StoredWeight]
    format: str
    unused: tuple[str, ...]
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    def keeping_fp8(self) -> Checkpoint:
        """The same, its fp8 weights to be held as they come where they have a scale for each output."""
        stored = {
            name: replace(weight, stays_fp8=weight.is_float and weight.groups == 1)
            for name, weight in self.stored.items()
        }
        return replace(self, stored=stored)

    def weight_bytes(self, dtype: str, quantization: Quantization | None = None) -> int:
        """Memory of the weights when loaded as "bfloat16", "float16" or "float32".

        Args:
            quantization: what linears are rounded to that are not `stored` in integers.
        """
        elements, integer_bytes = holding.memory(self.slots, self.stored, quantization)
        return elements * DTYPE_BYTES[dtype] + integer_bytes


def inspect(model: str) -> Checkpoint:
    """Finds and checks a checkpoint.

    Args:
        model: a folder, a GGUF file, or the id of a hub repository, which is downloaded unless it is in the
            cache.

    Raises:
        ModelError: it cannot be had or cannot be served; nothing was allocated.
    """
    path = find_model(model, weights=False)
    gguf = read_gguf(path) if is_gguf(path) else None
    config = read_config(gguf) if gguf else read_json(path / CONFIG)
    architecture, family = _family(config)
    spec = family.read(HFConfig(_with_outer_keys(config), path.name if gguf else CONFIG))
    format = read_format(config)
    path = find_model(model, weights=True)
    tensors = show_tensors(gguf) if gguf else _read_tensors(path)
    if _is_bare(spec, family.names, tensors):
        spec = replace(spec, lm_head=False)
    slots = _find_slots(spec, family.names, tensors)
    stored = _find_stored(format, slots, tensors) if format else {}
    _check_floats(slots, stored, tensors)
    generation = read_json(path / "generation_config.json", optional=True)
    return Checkpoint(
        path=path,
        name=model,
        architecture=architecture,
        spec=spec,
        config=config,
        tensors=tensors,
        slots=slots,
        stored=stored,
        format=format.name if format and stored else "",
        unused=_unused(tensors, slots, spec, family.names, format),
        dtype=_dtype(config),
        eos_token_ids=_eos_token_ids((generation, config, _text_config(config)), spec.vocab_size),
    )


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; empty where an optional one is missing."""
    if optional and not path.exists():
        return {}
    value = load_json(path, path.name)
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object.")
    return value


def load_json(path: Path, name: str) -> Any:
    """What a file holds. Raises ModelError, with the name that people know it by."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{name} is larger than {MAX_JSON_BYTES} bytes.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not valid JSON.") from error


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    """The family, after refusing what no family can serve."""
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError("config.json: architectures must be a list of names.")
    try:
        return find_family(names)
    except ModelError as error:
        if not config.get("auto_map"):
            raise
        raise ModelError(f"{error} Its own Python code (auto_map) is never executed.") from None


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else {}


def _with_outer_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Multimodal configs may say outside `text_config` whether its embeddings are tied."""
    if not _text_config(config) or "tie_word_embeddings" not in config:
        return dict(config)
    outer = {"tie_word_embeddings": config["tie_word_embeddings"]}
    return {**config, "text_config": {**outer, **_text_config(config)}}


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of every weight file.

    Raises:
        ModelError: a shard is missing, a name is in two files, or there are no safetensors at all.
    """
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        for name, tensor in read_header(folder / file).items():
            if name in tensors:
                raise ModelError(f"Tensor {name[:80]} is in both {tensors[name].file} and {file}.")
            tensors[name] = tensor
    return tensors


def _weight_files(folder: Path) -> Sequence[str]:
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    # Mistral's own format lies beside the other one and holds the same weights under other names.
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    names = [name for name in names if not name.startswith("consolidated")]
    if not names:
        raise ModelError(_why_no_weights(folder))
    return names


def _indexed_files(folder: Path) -> Sequence[str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(map(_is_plain_name, weight_map.values())):
        raise ModelError(f"{INDEX}: weight_map must map tensors to *.safetensors files beside it.")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise ModelError(f"{len(missing)} of {len(files)} weight files are missing: {_some(missing)}.")
    return files


def _is_plain_name(name: object) -> bool:
    """A file name that cannot lead out of the folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & set("/\\\0")


def _why_no_weights(folder: Path) -> str:
    if any(path for pattern in PICKLES for path in folder.glob(pattern)):
        return (
            "Only pickled weights (.bin, .pt) were found, and those can run code when opened; "
            "convert them with `safetensors`, or use a checkpoint that has *.safetensors."
        )
    return "No *.safetensors files were found beside config.json."


def _is_bare(spec: ArchSpec, names: WeightNames, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether the decoder was saved alone, as embedding models are: no prefix, and no output layer."""
    has_head = spec.tied_embeddings or bool(_heads(names, tensors))
    return not has_head and f"{names.embed}.weight" in tensors


def _heads(names: WeightNames, tensors: Mapping[str, TensorInfo]) -> Sequence[str]:
    """The output layers found, whatever form they are stored in."""
    return [head for head in names.lm_heads if any(name.startswith(f"{head}.") for name in tensors)]


def _find_slots(spec: ArchSpec, names: WeightNames, tensors: Mapping[str, TensorInfo]) -> tuple[Slot, ...]:
    """The model's tensors, under the names that this checkpoint has."""
    prefixes = [prefix for prefix in names.prefixes if f"{prefix}{names.embed}.weight" in tensors]
    prefix, head = [*prefixes, names.prefixes[0]][0], [*_heads(names, tensors), names.lm_heads[0]][0]
    return tuple(model_slots(spec, names, prefix, head))


def _find_stored(
    format: Format, slots: Iterable[Slot], tensors: Mapping[str, TensorInfo]
) -> dict[str, StoredWeight]:
    """The weights that are quantised, by the names they would have if they were not."""
    parts = [part for slot in slots if slot.linear for part in slot.parts]
    found = ((part.name, format.find(_stem(part.name), part.shape, tensors)) for part in parts)
    weights = {name: stored for name, stored in found if stored is not None}
    for stored in weights.values():
        check(stored, tensors)
    return weights


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def _check_floats(
    slots: Iterable[Slot], stored: Mapping[str, StoredWeight], tensors: Mapping[str, TensorInfo]
) -> None:
    """Whatever is not quantised must be in the files, in floats and with the right shape."""
    every = [part for slot in slots for part in slot.all_parts]
    parts = [part for part in every if part.name not in stored]
    missing = [part.name for part in parts if part.name not in tensors]
    if missing:
        raise ModelError(f"{len(missing)} of {len(every)} weights are missing: {_some(missing)}.")
    for part in parts:
        found = tensors[part.name]
        if found.shape != part.shape:
            raise ModelError(
                f"{part.name} has shape {list(found.shape)}, but config.json asks for {list(part.shape)}."
            )
        if found.dtype not in LOADABLE:
            raise ModelError(f"{part.name} is stored as {found.dtype}; supported: {', '.join(LOADABLE)}.")


def _unused(
    tensors: Iterable[str],
    slots: Sequence[Slot],
    spec: ArchSpec,
    names: WeightNames,
    format: Format | None,
) -> tuple[str, ...]:
    used = {part.name for slot in slots for part in slot.all_parts}
    if format is not None:
        stems = [_stem(part.name) for slot in slots for part in slot.parts]
        used |= {f"{stem}.{suffix}" for stem in stems for suffix in format.suffixes}
    if spec.tied_embeddings:  # some files write the tied matrix twice
        used |= {f"{head}.weight" for head in names.lm_heads}
    rest = (name for name in tensors if name not in used)
    return tuple(name for name in rest if not name.startswith(names.ignored) and not name.endswith(HARMLESS))


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The training type, under its old or its new key."""
    for part in (config, _text_config(config)):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key)).removeprefix("torch.")
            if name in DTYPE_BYTES:
                return name
    return None


def _eos_token_ids(configs: Sequence[Mapping[str, Any]], vocab_size: int) -> tuple[int, ...]:
    """The first config that names any decides."""
    for config in configs:
        value = config.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        valid = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size]
        if valid:
            return tuple(dict.fromkeys(valid))
    return ()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
