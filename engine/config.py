"""Configuration: what the user asked (EngineOptions) and what was decided (EngineConfig).

Both are frozen. `resolve` turns one into the other before anything is allocated, from facts that others
measured (the checkpoint's, the machine's), and keeps the reason of every automatic value. It reads no
files, no environment and no device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from engine.embedding import DEFAULT_FACTS, EmbeddingFacts
from engine.errors import ConfigError, MemoryPlanError

GIB = 1 << 30
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
GRAPH_BYTES = 256 << 20
KV_FACTOR_BYTES = 4  # the factor of a key or value in 8 bits
KV_EIGHT_BITS = ("int8", "fp8")
BLOCK_SIZES = (16, 32, 64, 128)
DEFAULT_BLOCK_SIZE = {"cpu": 32, "cuda": 64}


@dataclass(frozen=True, slots=True)
class Quantization:
    """Weights in integers: "int8", "int4" and, with groups other than their own, "int8-g128" or "int4-g64".

    Attributes:
        group_size: most inputs that share a scale; 0 is all of an output's.
    """

    GROUP_SIZES: ClassVar[tuple[int, ...]] = (32, 64, 128)
    _DEFAULT_SIZE: ClassVar[dict[int, int]] = {8: 0, 4: 32}

    bits: int
    group_size: int

    @classmethod
    def parse(cls, text: str) -> Quantization:
        """Raises ValueError."""
        match = re.fullmatch(r"int(4|8)(?:-g(\d{1,4}))?", text.strip().lower())
        sizes = ", ".join(map(str, cls.GROUP_SIZES))
        if match is None or (match[2] and int(match[2]) not in cls.GROUP_SIZES):
            raise ValueError(f"expected int8 or int4, or these with groups of {sizes}, such as int4-g64")
        bits = int(match[1])
        return cls(bits, int(match[2]) if match[2] else cls._DEFAULT_SIZE[bits])

    def __str__(self) -> str:
        group = "" if self.group_size == self._DEFAULT_SIZE[self.bits] else f"-g{self.group_size}"
        return f"int{self.bits}{group}"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the user asked. None means "choose for me"."""

    model: str
    served_model_name: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_queued_requests: int | None = None
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    threads: int | None = None
    cuda_graphs: str = "auto"
    prefix_caching: bool = True
    deterministic: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the model is, in which type it computes, on which device."""

    name: str
    dtype: str  # "bfloat16" | "float16" | "float32"
    device: str  # "cpu" | "cuda"
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None = None  # what linears are rounded to that do not come in integers
    seed: int | None = None  # draws the seeds of requests that bring none; None: unpredictably
    deterministic: bool = False  # what else is in a batch changes no bit of a sequence's results
    embeddings: EmbeddingFacts = DEFAULT_FACTS


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The block pool. Block 0 is padding and is never handed out, so num_blocks - 1 hold tokens.

    Attributes:
        dtype: of keys and values: the model's, or "int8" or "fp8" with a factor for each.
    """

    block_size: int
    num_blocks: int
    bytes_per_block: int
    prefix_caching: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step and of the queue.

    Attributes:
        steps_ahead: steps launched before the oldest one's tokens are read: 1 on CPU, 2 on CUDA.
        least_piece: tokens of a prompt that a step computes at least, while so many are left of it: 2 in
            deterministic mode on CUDA, where a single token goes through the kernel of decode steps.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queued_requests: int
    steps_ahead: int = 1
    least_piece: int = 1


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything decided, and why."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    threads: int = 1  # that compute, on a CPU
    cuda_graphs: bool = False
    reasons: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the checkpoint says, read from its config and its tensors' headers.

    Attributes:
        checkpoint_dtype: the type the weights are stored in, mostly; "" where that says nothing of the model.
        num_parameters: elements held in the compute dtype, tied embeddings counted as they will be stored.
        kv_rows_per_token: 2 * layers * kv heads: its keys and values.
        head_dim: elements in each of them.
        integer_bytes: weights held in integers, whatever the compute dtype, their scales included.
        quantization: what linears are rounded to as they are loaded.
    """

    name: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_positions: int
    checkpoint_dtype: str
    num_parameters: int
    kv_rows_per_token: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    integer_bytes: int = 0
    quantization: Quantization | None = None
    embeddings: EmbeddingFacts = DEFAULT_FACTS

    def weight_bytes(self, dtype: str) -> int:
        return self.num_parameters * DTYPE_BYTES[dtype] + self.integer_bytes


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """What the device offers, measured before anything is allocated.

    Attributes:
        fast_dtypes: those that weights may stay in, the preferred first.
        converts_fp8: in an instruction, as its kernels do.
        independent_rows: it can compute each row of a batch in the same order whatever is beside it.
    """

    device: str  # "cpu" | "cuda"
    name: str
    total_bytes: int
    free_bytes: int
    fast_dtypes: tuple[str, ...]
    cores: int = 1
    converts_fp8: bool = False
    independent_rows: bool = True


def resolve(options: EngineOptions, model: ModelFacts, machine: MachineFacts) -> EngineConfig:
    """Decides every automatic value, and refuses what cannot work before anything is allocated.

    Raises:
        ConfigError: a value is out of range.
        MemoryPlanError: weights or KV pool do not fit; the message says what would.
    """
    return _Resolver(options, model, machine).resolve()


class _Resolver:
    """One pass over the options, in the order in which the values depend on each other."""

    def __init__(self, options: EngineOptions, model: ModelFacts, machine: MachineFacts) -> None:
        self.options = options
        self.model = model
        self.machine = machine
        self.reasons: list[tuple[str, str, str]] = []

    def resolve(self) -> EngineConfig:
        if self.options.deterministic and not self.machine.independent_rows:
            raise ConfigError(
                "--deterministic: on a CPU this takes the native library, which is not there. "
                "Install a C++ compiler and install Quire again."
            )
        dtype = self._dtype()
        weight_bytes = self.model.weight_bytes(dtype)
        seqs, batched = self._step_limits()
        block_size = self._block_size()
        kv_dtype = self._kv_dtype(dtype)
        row_bytes = kv_row_bytes(self.model.head_dim, kv_dtype)
        block_bytes = self.model.kv_rows_per_token * row_bytes * block_size
        wanted_len = self.options.max_model_len or self.model.max_positions
        if self.options.max_model_len is not None:
            _check("--max-model-len", wanted_len, 1, self.model.max_positions)
        pool_bytes = self._pool_bytes(weight_bytes, block_bytes, block_size, seqs, batched, wanted_len)
        num_blocks = pool_bytes // block_bytes
        max_len = self._max_model_len(wanted_len, num_blocks, block_size, block_bytes)
        queued = self.options.max_queued_requests
        return EngineConfig(
            model=ModelConfig(
                name=self.options.served_model_name or self.model.name,
                dtype=dtype,
                device=self.machine.device,
                max_model_len=max_len,
                vocab_size=self.model.vocab_size,
                eos_token_ids=self.model.eos_token_ids,
                quantization=self.model.quantization,
                seed=self.options.seed,
                deterministic=self.options.deterministic,
                embeddings=self.model.embeddings,
            ),
            cache=CacheConfig(block_size, num_blocks, block_bytes, self.options.prefix_caching, kv_dtype),
            scheduler=SchedulerConfig(
                max_num_seqs=seqs,
                max_num_batched_tokens=batched,
                max_queued_requests=4 * seqs if queued is None else queued,
                steps_ahead=2 if self.machine.device == "cuda" else 1,
                least_piece=self._least_piece(),
            ),
            threads=self._threads(),
            cuda_graphs=self._cuda_graphs(),
            reasons=tuple(self.reasons),
        )

    def _threads(self) -> int:
        asked = self.options.threads
        if asked is not None:
            _check("--threads", asked, 1, 1024)
            return asked
        if self.machine.device == "cpu":
            self._auto("threads", self.machine.cores, "one for each core that this process may use")
        return self.machine.cores

    def _cuda_graphs(self) -> bool:
        asked = self.options.cuda_graphs
        if asked not in ("auto", "off"):
            raise ConfigError(f"--cuda-graphs {asked}: choose auto or off.")
        return asked == "auto" and self.machine.device == "cuda"

    def _auto(self, setting: str, value: object, why: str) -> None:
        self.reasons.append((setting, str(value), why))

    def _dtype(self) -> str:
        asked, fast = self.options.dtype, self.machine.fast_dtypes
        if asked != "auto":
            if asked not in DTYPE_BYTES:
                raise ConfigError(f"--dtype {asked}: choose auto, {', '.join(DTYPE_BYTES)}.")
            if asked not in fast:
                self._auto("dtype", asked, f"as asked, though {fast[0]} is faster on {self.machine.name}")
            return asked
        stored = self.model.checkpoint_dtype
        dtype = stored if stored in fast else fast[0]
        if not stored:
            why = "the checkpoint does not say what it was trained in"
        elif dtype == stored:
            why = "as the checkpoint is stored"
        else:
            why = f"the checkpoint is {stored}, which is slow on {self.machine.name}"
        self._auto("dtype", dtype, why)
        return dtype

    def _kv_dtype(self, dtype: str) -> str:
        asked, device = self.options.kv_cache_dtype, self.machine.device
        if asked == "auto":
            self._auto("kv-cache-dtype", dtype, "as the model computes")
            return dtype
        if asked not in KV_EIGHT_BITS:
            raise ConfigError(f"--kv-cache-dtype {asked}: choose auto, int8 or fp8.")
        if asked == "fp8" and device == "cpu":
            raise ConfigError(
                "--kv-cache-dtype fp8: not on a CPU, where int8 takes as little memory and is more exact. "
                "Choose int8."
            )
        if asked == "fp8" and not self.machine.converts_fp8:
            raise ConfigError(
                f"--kv-cache-dtype fp8: {self.machine.name} has no instruction for it, which takes compute "
                "capability 8.9. Choose int8: it takes as little memory."
            )
        return asked

    def _step_limits(self) -> tuple[int, int]:
        cuda = self.machine.device == "cuda"
        seqs, batched = self.options.max_num_seqs, self.options.max_num_batched_tokens
        if seqs is None:
            seqs = 256 if cuda else 64
            self._auto("max-num-seqs", seqs, f"default on {self.machine.device}")
        _check("--max-num-seqs", seqs, 1, 4096)
        if batched is None:
            batched = max(8192 if cuda else 512, seqs)
            self._auto("max-num-batched-tokens", batched, "longer prompts are computed in chunks of this")
        _check("--max-num-batched-tokens", batched, 1, 1 << 20)
        if batched < seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {batched} is less than --max-num-seqs {seqs}: "
                "each running request needs one token of every step. Raise one or lower the other."
            )
        if self._least_piece() > 1 and batched < seqs + 2:
            raise ConfigError(
                f"--max-num-batched-tokens {batched} is less than --max-num-seqs {seqs} and 2 more: "
                "--deterministic cuts prompts into pieces of 2 tokens at least. Raise one or lower the other."
            )
        return seqs, batched

    def _least_piece(self) -> int:
        return 2 if self.options.deterministic and self.machine.device == "cuda" else 1

    def _block_size(self) -> int:
        size = self.options.block_size
        if size is None:
            size = DEFAULT_BLOCK_SIZE[self.machine.device]
            self._auto("block-size", size, f"measured best on {self.machine.device}")
        elif size not in BLOCK_SIZES:
            raise ConfigError(f"--block-size {size}: choose one of {', '.join(map(str, BLOCK_SIZES))}.")
        return size

    def _pool_bytes(
        self, weights: int, block: int, block_size: int, seqs: int, batched: int, max_len: int
    ) -> int:
        asked = self.options.kv_cache_memory_bytes
        _check("--gpu-memory-utilization", self.options.gpu_memory_utilization, 0.05, 1.0)
        activations = self._activation_bytes(seqs, batched)
        available = self._available_bytes() - weights - activations
        least = 2 * block  # padding and one block
        if available < least:
            raise MemoryPlanError(
                f"{self.model.name} needs {_gib(weights)} for weights and {_gib(activations)} to compute, "
                f"but {self.machine.name} offers {_gib(self._available_bytes())} "
                f"of its {_gib(self.machine.total_bytes)}. Choose a smaller model, --dtype "
                "or --quantization, or free memory."
            )
        if asked is not None:
            if not least <= asked <= available:
                raise MemoryPlanError(
                    f"--kv-cache-memory {_gib(asked)}: between {_gib(least)} and {_gib(available)} "
                    "is possible here beside the weights."
                )
            return asked
        if self.machine.device == "cuda":
            share = f"{self.options.gpu_memory_utilization:.0%} of the device less weights and activations"
            self._auto("kv-cache-memory", _gib(available), share)
            return available
        useful = block * (1 + seqs * -(-max_len // block_size))
        quarter = available // 4
        pool = max(min(useful, quarter), least)
        why = "every running request at full length" if pool == useful else "a quarter of the free memory"
        self._auto("kv-cache-memory", _gib(pool), why)
        return pool

    def _available_bytes(self) -> int:
        if self.machine.device == "cuda":
            used = self.machine.total_bytes - self.machine.free_bytes
            return int(self.machine.total_bytes * self.options.gpu_memory_utilization) - used
        return int(self.machine.free_bytes * 0.95)

    def _activation_bytes(self, seqs: int, batched: int) -> int:
        """Peak of one step: the widest layer's inputs and outputs, and two copies of the logits."""
        width = 6 * self.model.hidden_size + 3 * self.model.intermediate_size
        logits = seqs * self.model.vocab_size
        # Memory of graphs is their own: logits in both types once more, and what CUDA keeps of each launch.
        graphs = 6 * logits + GRAPH_BYTES if self._cuda_graphs() else 0
        return 4 * (batched * width + 3 * logits) + graphs

    def _max_model_len(self, wanted: int, num_blocks: int, block_size: int, block_bytes: int) -> int:
        holds = (num_blocks - 1) * block_size
        if self.options.max_model_len is None:
            length = min(wanted, holds)
            why = "the model's own limit" if length == wanted else "the longest that the KV pool holds"
            self._auto("max-model-len", length, why)
            return length
        if holds < wanted:
            needs = (-(-wanted // block_size) + 1) * block_bytes
            raise MemoryPlanError(
                f"One request of --max-model-len {wanted} needs {_gib(needs)} of KV cache, but the pool "
                f"has {_gib(num_blocks * block_bytes)}. Lower --max-model-len to {holds} "
                "or raise --kv-cache-memory."
            )
        return wanted


def kv_row_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes of one key or value of one head.

    >>> kv_row_bytes(128, "bfloat16"), kv_row_bytes(128, "int8")
    (256, 132)
    """
    return head_dim + KV_FACTOR_BYTES if kv_dtype in KV_EIGHT_BITS else head_dim * DTYPE_BYTES[kv_dtype]


def _check(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value}: must be between {low} and {high}.")


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
