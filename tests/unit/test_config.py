"""resolve(): every automatic value is decided before anything is allocated, with its reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.config import GIB, EngineOptions, MachineFacts, ModelFacts, Quantization, resolve
from engine.errors import ConfigError, MemoryPlanError

OPTIONS = EngineOptions(model="m")
# Llama-3.1-8B: 32 layers, 8 kv heads of 128.
LLAMA_8B = ModelFacts(
    name="llama-8b", vocab_size=128_256, eos_token_ids=(128_009,), max_positions=131_072,
    checkpoint_dtype="bfloat16", num_parameters=8_030_000_000, kv_rows_per_token=2 * 32 * 8, head_dim=128,
    hidden_size=4096, intermediate_size=14_336,
)  # fmt: skip
TINY = replace(LLAMA_8B, name="tiny", num_parameters=4_000_000, kv_rows_per_token=2 * 5 * 2, head_dim=64,
               max_positions=2048, vocab_size=2048, hidden_size=256, intermediate_size=704)  # fmt: skip
H200 = MachineFacts("cuda", "NVIDIA H200", 139 * GIB, 138 * GIB, ("bfloat16", "float16"))
LAPTOP = MachineFacts("cpu", "this CPU", 24 * GIB, 20 * GIB, ("bfloat16", "float32"))
OLD_LAPTOP = replace(LAPTOP, fast_dtypes=("float32",))


def reason(config_reasons: tuple[tuple[str, str, str], ...], setting: str) -> tuple[str, str]:
    return next((value, why) for name, value, why in config_reasons if name == setting)


def test_cuda_uses_the_asked_share_of_memory() -> None:
    config = resolve(OPTIONS, LLAMA_8B, H200)
    pool = config.cache.num_blocks * config.cache.bytes_per_block
    assert config.cache.bytes_per_block == 128 * 1024 * 64  # 128 KiB a token in bf16, blocks of 64
    assert 100 * GIB < pool < 0.9 * 139 * GIB - 15 * GIB
    assert config.model.max_model_len == 131_072
    assert config.scheduler.steps_ahead == 2


def test_graphs_are_for_cuda_and_cost_memory() -> None:
    off = replace(OPTIONS, cuda_graphs="off")
    assert resolve(OPTIONS, LLAMA_8B, H200).cuda_graphs
    assert not resolve(off, LLAMA_8B, H200).cuda_graphs
    assert not resolve(OPTIONS, TINY, LAPTOP).cuda_graphs
    blocks = [resolve(options, LLAMA_8B, H200).cache.num_blocks for options in (OPTIONS, off)]
    assert 256 * 2**20 < (blocks[1] - blocks[0]) * 128 * 1024 * 64 < GIB
    with pytest.raises(ConfigError, match="--cuda-graphs on: choose auto or off"):
        resolve(replace(OPTIONS, cuda_graphs="on"), TINY, LAPTOP)


def test_small_model_on_cpu_takes_what_its_requests_can_use() -> None:
    config = resolve(OPTIONS, TINY, LAPTOP)
    holds = (config.cache.num_blocks - 1) * config.cache.block_size
    assert holds == config.scheduler.max_num_seqs * 2048
    assert reason(config.reasons, "kv-cache-memory")[1] == "every running request at full length"


def test_context_shrinks_to_the_pool_and_says_so() -> None:
    config = resolve(OPTIONS, LLAMA_8B, replace(LAPTOP, free_bytes=19 * GIB))
    assert config.model.max_model_len == (config.cache.num_blocks - 1) * config.cache.block_size
    assert reason(config.reasons, "max-model-len")[1] == "the longest that the KV pool holds"


def test_model_larger_than_memory_is_refused() -> None:
    with pytest.raises(MemoryPlanError, match=r"llama-8b needs 14\.96 GiB for weights"):
        resolve(OPTIONS, LLAMA_8B, replace(LAPTOP, free_bytes=8 * GIB))


def test_asked_context_that_does_not_fit_is_refused_with_the_one_that_does() -> None:
    options = replace(OPTIONS, max_model_len=2048, kv_cache_memory_bytes=2 * 2**20)
    with pytest.raises(MemoryPlanError, match=r"Lower --max-model-len to \d+ or raise --kv-cache-memory"):
        resolve(options, TINY, LAPTOP)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (replace(OPTIONS, dtype="int4"), "--dtype int4: choose auto"),
        (replace(OPTIONS, block_size=17), "--block-size 17: choose one of 16, 32, 64, 128"),
        (replace(OPTIONS, max_num_seqs=0), "--max-num-seqs 0: must be between 1"),
        (replace(OPTIONS, max_num_seqs=64, max_num_batched_tokens=32), "needs one token of every step"),
        (replace(OPTIONS, max_model_len=1 << 20), "--max-model-len 1048576: must be between 1 and 2048"),
        (replace(OPTIONS, kv_cache_memory_bytes=100 * GIB), "--kv-cache-memory 100.00 GiB: between"),
        (replace(OPTIONS, kv_cache_dtype="int4"), "--kv-cache-dtype int4: choose auto, int8 or fp8"),
        (replace(OPTIONS, kv_cache_dtype="fp8"), "--kv-cache-dtype fp8: not on a CPU, .* Choose int8"),
        (replace(OPTIONS, gpu_memory_utilization=1.5), "--gpu-memory-utilization 1.5"),
    ],
)
def test_impossible_options_are_refused_in_one_line(options: EngineOptions, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        resolve(options, TINY, LAPTOP)
    assert "\n" not in str(caught.value)


def test_deterministic_mode_on_cuda_needs_room_for_a_piece_of_a_prompt() -> None:
    options = replace(OPTIONS, deterministic=True, max_num_seqs=64, max_num_batched_tokens=65)
    with pytest.raises(ConfigError, match="--max-num-seqs 64 and 2 more"):
        resolve(options, TINY, H200)
    roomy = resolve(replace(options, max_num_batched_tokens=66), TINY, H200).scheduler
    assert roomy.least_piece == 2
    assert resolve(replace(options, deterministic=False), TINY, H200).scheduler.least_piece == 1


def test_dtype_follows_the_checkpoint_where_the_machine_is_fast_in_it() -> None:
    assert resolve(OPTIONS, TINY, LAPTOP).model.dtype == "bfloat16"
    assert resolve(OPTIONS, TINY, OLD_LAPTOP).model.dtype == "float32"
    half = replace(TINY, checkpoint_dtype="float16")
    assert resolve(OPTIONS, half, H200).model.dtype == "float16"
    assert resolve(OPTIONS, half, LAPTOP).model.dtype == "bfloat16"
    silent = replace(TINY, checkpoint_dtype="")
    assert resolve(OPTIONS, silent, OLD_LAPTOP).model.dtype == "float32"
    assert ("dtype", "bfloat16", "the checkpoint does not say what it was trained in") in resolve(
        OPTIONS, silent, H200
    ).reasons
    full = replace(TINY, checkpoint_dtype="float32")
    assert resolve(OPTIONS, full, LAPTOP).model.dtype == "float32"
    assert resolve(OPTIONS, full, H200).model.dtype == "bfloat16"


def test_a_slow_dtype_is_obeyed_and_said() -> None:
    config = resolve(replace(OPTIONS, dtype="float16"), TINY, LAPTOP)
    assert config.model.dtype == "float16"
    assert ("dtype", "float16", "as asked, though bfloat16 is faster on this CPU") in config.reasons


def test_weights_in_integers_count_whatever_the_dtype() -> None:
    half = replace(TINY, num_parameters=1_000_000, integer_bytes=3_000_000)
    assert (half.weight_bytes("bfloat16"), half.weight_bytes("float32")) == (5_000_000, 7_000_000)
    full = replace(TINY, num_parameters=1, integer_bytes=64 * GIB)
    with pytest.raises(MemoryPlanError, match=r"needs 64\.\d\d GiB for weights"):
        resolve(OPTIONS, full, LAPTOP)


@pytest.mark.parametrize(
    "text, bits, group_size, shown",
    [
        ("int8", 8, 0, "int8"), ("INT4", 4, 32, "int4"), ("int4-g32", 4, 32, "int4"),
        ("int4-g128", 4, 128, "int4-g128"), ("int8-g64", 8, 64, "int8-g64"),
    ],
)  # fmt: skip
def test_quantization_is_read(text: str, bits: int, group_size: int, shown: str) -> None:
    asked = Quantization.parse(text)
    assert (asked.bits, asked.group_size, str(asked)) == (bits, group_size, shown)


@pytest.mark.parametrize("text", ["", "int3", "int4-g16", "int4-g0", "int4-128", "fp8", "int8 int8"])
def test_other_quantizations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected int8 or int4, or these with groups of 32, 64, 128"):
        Quantization.parse(text)


def test_keys_and_values_are_stored_as_the_model_computes_unless_said() -> None:
    config = resolve(OPTIONS, TINY, OLD_LAPTOP)
    assert config.cache.dtype == "float32"
    assert config.cache.bytes_per_block == 2 * 5 * 2 * 64 * 4 * 32
    assert reason(config.reasons, "kv-cache-dtype") == ("float32", "as the model computes")


def test_int8_makes_room_for_nearly_twice_the_tokens() -> None:
    options = replace(OPTIONS, kv_cache_memory_bytes=GIB // 4, max_num_seqs=4)
    plain, small = (
        resolve(replace(options, kv_cache_dtype=dtype), TINY, LAPTOP).cache for dtype in ("auto", "int8")
    )
    assert small.dtype == "int8"
    assert small.bytes_per_block == 2 * 5 * 2 * (64 + 4) * 32  # a factor of 4 bytes for each key and value
    assert small.num_blocks == GIB // 4 // small.bytes_per_block > 1.88 * plain.num_blocks


def test_a_gpu_stores_8_bits_as_far_as_it_converts_them() -> None:
    machine = replace(H200, converts_fp8=True)
    for dtype in ("int8", "fp8"):
        cache = resolve(replace(OPTIONS, kv_cache_dtype=dtype), LLAMA_8B, machine).cache
        assert cache.dtype == dtype
        assert cache.bytes_per_block == 2 * 32 * 8 * (128 + 4) * 64
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype fp8: .* has no instruction .* Choose int8"):
        resolve(replace(OPTIONS, kv_cache_dtype="fp8"), LLAMA_8B, H200)


def test_deterministic_is_refused_where_rows_of_a_batch_touch() -> None:
    asked = replace(OPTIONS, deterministic=True)
    assert resolve(asked, TINY, LAPTOP).model.deterministic
    assert not resolve(OPTIONS, TINY, LAPTOP).model.deterministic
    with pytest.raises(ConfigError, match=r"--deterministic: .* native library"):
        resolve(asked, TINY, replace(LAPTOP, independent_rows=False))


def test_threads_are_the_cores_unless_asked() -> None:
    machine = replace(LAPTOP, cores=6)
    config = resolve(OPTIONS, TINY, machine)
    assert config.threads == 6
    assert reason(config.reasons, "threads")[0] == "6"
    assert resolve(replace(OPTIONS, threads=2), TINY, machine).threads == 2
    with pytest.raises(ConfigError, match="--threads 0: must be between 1 and 1024"):
        resolve(replace(OPTIONS, threads=0), TINY, machine)
