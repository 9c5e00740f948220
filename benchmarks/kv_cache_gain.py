"""What the KV cache buys: time per token by position, with the cache and without.

With it, a step computes one token and reads the keys and values of those before. Without it, a step computes
the whole prefix again to get its last token. Both run the same decoder and the same kernels on paged blocks.
At each position measured, both must choose the same next token.

    python -m benchmarks.kv_cache_gain                      a random 110M-parameter Llama
    python -m benchmarks.kv_cache_gain --size qwen3-0.6b --tokens 512
    python -m benchmarks.kv_cache_gain --model DIR          a checkpoint
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.models import CONFIGS, random_transformer, read_spec
from engine.model import checkpoint, loader
from engine.model.batch import ForwardBatch
from engine.model.transformer import Transformer
from kernels import api

BLOCK_SIZE = 16
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Sequence:
    """One sequence in blocks of its own: block 0 is padding, the others follow each other."""

    def __init__(self, model: Transformer, max_tokens: int) -> None:
        spec = model.spec
        self._model = model
        num_blocks = -(-max_tokens // BLOCK_SIZE)
        shape = (num_blocks + 1, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
        self.kv = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(spec.num_layers)]
        self._page_table = torch.arange(1, num_blocks + 1, dtype=torch.int32, device=model.device)[None]

    def next_token(self, token_ids: Tensor, start: int) -> Tensor:
        """Computes `token_ids[start:]` on top of what the blocks hold; returns the likeliest next token."""
        end, device = token_ids.shape[0], token_ids.device
        position_T = torch.arange(start, end, device=device)
        attention = api.AttentionBatch(
            page_table_SB=self._page_table,
            query_start_S1=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            seq_len_S=torch.tensor([end], dtype=torch.int32, device=device),
            num_decodes=int(end - start == 1),
            max_query_len=end - start,
            max_seq_len=end,
        )
        slot_T = position_T + BLOCK_SIZE  # the blocks are consecutive, from block 1
        batch = ForwardBatch(token_ids[start:], position_T, slot_T, attention, self.kv)
        return self._model.logits(self._model.forward(batch)[-1:]).argmax()


@dataclass(frozen=True, slots=True)
class Gain:
    """Seconds per token by position, and whether both ways chose the same tokens."""

    cached_s: dict[int, float]
    recomputed_s: dict[int, float]
    same_choices: int


@torch.inference_mode()
def measure(model: Transformer, prompt: Tensor, tokens: int, every: int, repeats: int) -> Gain:
    """Generates greedily with the cache, then times both ways along the same tokens.

    Args:
        every: positions between two timings of the recomputation, which is slow.
    """
    total = prompt.shape[0] + tokens
    ids = torch.cat([prompt, prompt.new_zeros(tokens)])
    kept, scratch = Sequence(model, total), Sequence(model, total)
    ids[prompt.shape[0]] = kept.next_token(prompt, 0)
    for end in range(prompt.shape[0] + 1, total):
        ids[end] = kept.next_token(ids[:end], end - 1)

    ends = range(prompt.shape[0] + 1, total)
    sparse = [*ends[::every]]
    cached: dict[int, list[float]] = {end: [] for end in ends}
    recomputed: dict[int, list[float]] = {end: [] for end in sparse}
    same = 0
    for repeat in range(repeats):
        for end in ends:
            seconds, _ = _timed(model, partial(kept.next_token, ids[:end], end - 1))
            cached[end].append(seconds)
        for end in sparse:
            seconds, choice = _timed(model, partial(scratch.next_token, ids[:end], 0))
            recomputed[end].append(seconds)
            same += repeat == 0 and int(choice) == int(ids[end])
    return Gain(_medians(cached), _medians(recomputed), same)


def _timed(model: Transformer, call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    begin = time.perf_counter()
    result = call()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def _medians(samples: dict[int, list[float]]) -> dict[int, float]:
    return {position: round(statistics.median(times), 6) for position, times in samples.items()}


def memory_per_token(model: Transformer) -> dict[str, int]:
    """The formula, and what allocating 64 times BLOCK_SIZE more tokens costs, per token."""
    spec = model.spec
    formula = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * model.dtype.itemsize
    before = _memory_in_use(model.device)
    sequence = Sequence(model, 64 * BLOCK_SIZE * 16)
    for kv in sequence.kv:
        kv.fill_(0.0)  # memory counts once it is touched
    grown = _memory_in_use(model.device) - before
    tokens = sequence.kv[0].shape[0] * BLOCK_SIZE
    return {"formula_bytes": formula, "measured_bytes": round(grown / tokens)}


def _memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def draw(gain: Gain, title: str, path: Path) -> None:
    """Both curves over the position, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    lines = (
        (gain.recomputed_s, "without the cache: the whole prefix again", "#c2410c"),
        (gain.cached_s, "with the cache: one token", "#1d4ed8"),
    )
    for times, label, colour in lines:
        axes.plot(list(times), [1000 * seconds for seconds in times.values()], label=label, color=colour)
    axes.set(xlabel="position in the sequence, tokens", ylabel="time per token, ms", title=title)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _report(gain: Gain, memory: dict[str, int]) -> str:
    rows = [f"{'position':>8} {'with cache, ms':>16} {'without, ms':>13} {'ratio':>7}"]
    positions = list(gain.recomputed_s)
    for position in positions[:: max(1, len(positions) // 12)] + positions[-1:]:
        cached, recomputed = gain.cached_s[position], gain.recomputed_s[position]
        rows.append(
            f"{position:>8} {1000 * cached:>16.2f} {1000 * recomputed:>13.2f} {recomputed / cached:>7.1f}"
        )
    rows += [
        "",
        f"all {len(gain.cached_s)} tokens: {sum(gain.cached_s.values()):.2f} s with the cache, "
        f"{_integral(gain):.1f} s without (interpolated between the positions timed)",
        f"same next token both ways at {gain.same_choices} of {len(gain.recomputed_s)} positions",
        f"KV memory per token: {memory['formula_bytes']:,} bytes by the formula, "
        f"2 * layers * kv_heads * head_dim * bytes; {memory['measured_bytes']:,} measured",
    ]
    return "\n".join(rows)


def _integral(gain: Gain) -> float:
    """The recomputation's time over all positions, linear between those timed."""
    known = list(gain.recomputed_s)
    total, low = 0.0, 0
    for position in gain.cached_s:
        while low + 2 < len(known) and known[low + 1] <= position:
            low += 1
        first, second = known[low], known[min(low + 1, len(known) - 1)]
        share = (position - first) / (second - first) if second > first else 0.0
        total += gain.recomputed_s[first] * (1 - share) + gain.recomputed_s[second] * share
    return total


def _load(args: argparse.Namespace, device: torch.device, max_len: int) -> tuple[Transformer, str]:
    if args.model is None:
        spec, dtype = read_spec(args.size), DTYPES[args.dtype]
        model = random_transformer(spec, dtype=dtype, device=device, max_model_len=max_len)
        return model, f"{args.size}, random weights"
    found = checkpoint.inspect(args.model)
    return loader.load(found, dtype=args.dtype, device=device, max_model_len=max_len), Path(args.model).name


def main() -> None:
    parser = argparse.ArgumentParser(description="Time per token with and without the KV cache.")
    parser.add_argument("--size", choices=CONFIGS, default="110m", help="random weights (default: 110m)")
    parser.add_argument("--model", help="a checkpoint's directory, instead of a random model")
    parser.add_argument("--prompt", type=int, default=8, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=1016, help="to generate (default: 1016)")
    parser.add_argument("--every", type=int, default=16, help="positions between two recomputations")
    parser.add_argument("--repeats", type=int, default=5, help="medians of this many (default: 5)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    parser.add_argument("--png", type=Path, help="draw the curves here")
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model, name = _load(args, device, args.prompt + args.tokens)
    memory = memory_per_token(model)
    facts = machine.describe(args.device)
    where = facts.get("gpu") or f"{torch.get_num_threads()} threads on {facts['cpu']}"
    print(f"{name}, {args.dtype}, {where}, commit {facts['commit']}\n")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.spec.vocab_size, (args.prompt,), generator=generator).to(device)
    gain = measure(model, prompt, args.tokens, args.every, args.repeats)
    print(_report(gain, memory))
    if args.png is not None:
        draw(gain, f"{name}, {args.dtype}, {where}", args.png)
    if args.json is not None:
        result = {"machine": facts, "model": name, "dtype": args.dtype, "block_size": BLOCK_SIZE}
        times = {"cached_s": gain.cached_s, "recomputed_s": gain.recomputed_s}
        agree = {"same_choices": gain.same_choices, "positions": len(gain.recomputed_s)}
        args.json.write_text(json.dumps({**result, **agree, "memory": memory, **times}) + "\n")


if __name__ == "__main__":
    main()
