"""Quantised checkpoints: what is refused before anything is allocated, and corners of the formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.model.checkpoint import inspect
from engine.model.headers import TensorInfo
from engine.model.loader import load
from engine.model.quant.formats import read_format
from engine.model.quant.gptq import find_gptq
from engine.model.quant.unpack import unpack
from kernels import api
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.quantized import WRITERS, Rounded, Tensors, gptq, write_quantized

UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "config, words",
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported; known: compressed"),
        ({"bits": 4}, "quant_method None is not supported"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with 3 bits is not supported; 4 and 8 are"),
        ({"quant_method": "gptq"}, "bits is missing"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": "yes"}, "desc_act must be true or false"),
        ({"quant_method": "awq", "bits": 8}, "AWQ with 8 bits is not supported; 4 is"),
        ({"quant_method": "awq", "w_bit": 4, "version": "gemv"}, "AWQ version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "without zero points"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format 'nvfp4"),
        (
            {"quant_method": "compressed-tensors", "format": "mixed-precision",
             "config_groups": {"group_0": {"format": "marlin-24"}}},
            "group_0: format 'marlin-24' is not supported",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized",
             "config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 3}}}},
            "int weights of 3 bits are not supported",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
            "transform_config is not supported",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config is not supported",
        ),
        ("int4", "quantization_config must be an object"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(config: Any, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_format({"quantization_config": config})
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.json: ")


def test_where_the_config_may_be() -> None:
    config = {"quant_method": "gptq", "bits": 4}
    found = [
        read_format({"quantization_config": config}),
        read_format({"text_config": {"quantization_config": config}}),
        read_format({"compression_config": {"format": "pack-quantized"}}),
        read_format({"text_config": {}}),
    ]
    assert [format and format.name for format in found] == ["GPTQ", "GPTQ", "compressed-tensors", None]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama")


def broken(llama: Path, folder: Path, name: str, change: Callable[[Tensors], object]) -> Path:
    path = write_quantized(llama, folder, WRITERS[name])
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file({k: x.contiguous() for k, x in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    return path


CHANGES: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scales": ("gptq", lambda t: t.pop(f"{UP}.scales"), "up_proj.scales is missing"),
    "no zeros": ("awq", lambda t: t.pop(f"{UP}.qzeros"), "up_proj.qzeros is missing"),
    "no order": ("gptq-order", lambda t: t.pop(f"{UP}.g_idx"), "up_proj.g_idx is missing"),
    "neither": ("gptq", lambda t: t.pop(f"{UP}.qweight"), f"1 of 30 weights are missing: {UP}.weight"),
    "3 bits": (
        "gptq", lambda t: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:6]}),
        "packs 64 inputs into 6 words: neither 4 nor 8 bits",
    ),
    "outputs": (
        "packed", lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:90]}),
        "up_proj.weight_packed has shape [90, 8], but config.json asks for [96, 8]",
    ),
    "groups": (
        "packed", lambda t: t.update({f"{UP}.weight_scale": torch.ones(96, 3)}),
        "has 3 groups, which do not divide the 64 inputs",
    ),
    "scales": (
        "ints", lambda t: t.update({f"{UP}.weight_scale": torch.ones(95, 1)}),
        "up_proj.weight_scale has shape [95, 1], but config.json asks for [96, 1]",
    ),
    "bytes": (
        "packed", lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].view(torch.uint8)}),
        "neither 4 nor 8 bits",
    ),
    "zero dtype": (
        "awq", lambda t: t.update({f"{UP}.qzeros": t[f"{UP}.qzeros"].long()}),
        "up_proj.qzeros is stored as I64; expected I32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_tensors_that_are_refused(llama: Path, what: str, tmp_path: Path) -> None:
    name, change, words = CHANGES[what]
    path = broken(llama, tmp_path / "broken", name, change)
    with pytest.raises(ModelError) as caught:
        inspect(str(path))
    assert words in str(caught.value)


def test_groups_of_unequal_size_are_refused(llama: Path, tmp_path: Path) -> None:
    """It takes the values to know, so that this is found out while loading."""
    path = broken(llama, tmp_path / "broken", "gptq-order", lambda t: t[f"{UP}.g_idx"].fill_(0))
    with pytest.raises(ModelError, match="g_idx does not put 32 inputs into each of 2 groups"):
        load(inspect(str(path)), dtype="float32", device="cpu", max_model_len=16)


def test_everything_of_a_quantised_module_is_known(llama: Path, tmp_path: Path) -> None:
    for name, writer in WRITERS.items():
        assert inspect(str(write_quantized(llama, tmp_path / name, writer))).unused == ()


def test_dtype_of_the_rest_decides_what_is_computed_in(llama: Path, tmp_path: Path) -> None:
    """Most tensors are int32 words and their fp16 scales; the weights in floats are what counts."""
    from engine.build import model_facts

    checkpoint = inspect(str(write_quantized(llama, tmp_path / "gptq", WRITERS["gptq-asym"])))
    assert model_facts(checkpoint, torch.device("cpu")).checkpoint_dtype == "float16"


def test_a_config_may_say_quantised_where_nothing_is(llama: Path, tmp_path: Path) -> None:
    path = broken(llama, tmp_path / "floats", "packed", lambda t: None)
    (path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    checkpoint = inspect(str(path))
    assert (checkpoint.format, dict(checkpoint.stored)) == ("", {})
    assert json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("minus_one", [True, False])
def test_gptq_zeros_of_the_whole_range(bits: int, minus_one: bool) -> None:
    """A zero of 0 is written as -1: the borrow changes its neighbour in the word, and is given back."""
    top = 2**bits
    zero = torch.arange(512, dtype=torch.int32).view(512, 1) * 7 % top
    w = Rounded(
        bits=bits,
        value=torch.randint(top, (512, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0)),
        zero=zero,
        scale=torch.ones(512, 1),
        group=torch.zeros(32, dtype=torch.int32),
    )
    tensors = {f"m.{role}": x for role, x in gptq(less_one=minus_one)(w).items()}
    dtypes = {torch.int32: "I32", torch.float32: "F32"}
    headers = {name: TensorInfo("f", dtypes[x.dtype], tuple(x.shape)) for name, x in tensors.items()}
    stored = find_gptq("m", (512, 32), headers, symmetric=False, ordered=False, minus_one=minus_one)
    assert stored is not None
    got = unpack(stored, tensors.__getitem__)
    assert isinstance(got, api.QuantizedWeight)
    assert api.dequantize(got, torch.float32).equal(w.weight)
