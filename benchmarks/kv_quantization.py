"""What keys and values in 8 bits cost in accuracy.

    python -m benchmarks.kv_quantization [--sizes tiny,110m] [--tokens 512] [--json FILE]

The built-in model: perplexity of the right answers to the held-out questions, and in how many of them each
token is the likeliest. Random checkpoints: how far the logits of every position of a random text move, as a
share of their own spread. Both against keys and values as the model computes them. fp8 (e4m3 with a factor
for each key and value of a head, as on a GPU) is computed by the reference kernels, in plain torch.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import machine
from benchmarks.models import CONFIGS, random_transformer, read_spec
from engine import builtin
from engine.exec.device import count_cores
from engine.model import checkpoint, loader
from engine.model.batch import ForwardBatch
from engine.model.transformer import Transformer
from kernels import api
from training.batches import Encoder
from training.dataset import Book, read_questions

BLOCK_SIZE = 32
FORMATS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def logits_of(model: Transformer, ids: list[int], kind: str) -> Tensor:
    """Logits `[T, V]` of every position; the second half is computed token by token, as in decoding."""
    spec, tokens = model.spec, len(ids)
    blocks = -(-tokens // BLOCK_SIZE)
    dtype = FORMATS.get(kind, model.dtype)
    shape = (blocks + 1, 2, spec.num_kv_heads, BLOCK_SIZE, api.kv_width(spec.head_dim, dtype))
    kv = [torch.empty(shape, dtype=dtype).zero_() for _ in range(spec.num_layers)]
    table_SB = torch.arange(1, blocks + 1, dtype=torch.int32)[None]
    half = max(1, tokens // 2)
    rows = []
    for begin, end in [(0, half), *((i, i + 1) for i in range(half, tokens))]:
        position_T = torch.arange(begin, end)
        starts, length = torch.tensor([0, end - begin]).int(), torch.tensor([end]).int()
        attention = api.AttentionBatch(table_SB, starts, length, int(end - begin == 1), end - begin, end)
        batch = ForwardBatch(torch.tensor(ids[begin:end]), position_T, position_T + BLOCK_SIZE, attention, kv)
        rows.append(model.logits(model.forward(batch)))
    return torch.cat(rows)


@torch.inference_mode()
def heldout(kinds: list[str], questions: int) -> dict[str, dict[str, float]]:
    """Perplexity of the answers, and the share of answers in which every token is the likeliest."""
    path = builtin.path()
    model = loader.load(
        checkpoint.inspect(str(path)), dtype="bfloat16", device=torch.device("cpu"), max_model_len=2048
    )
    encoder, book = Encoder(Tokenizer.from_file(str(path / "tokenizer.json")), 0.0), Book()
    loss, right, tokens = dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0), 0
    chosen = read_questions("heldout")[:questions]
    for question, intent in chosen:
        prompt, answer = encoder.prompt(question), encoder.answer(book.answer(intent))
        tokens += len(answer)
        target_T = torch.tensor(answer)
        for kind in kinds:
            logits_TV = logits_of(model, (prompt + answer)[:-1], kind)[-len(answer) :]
            loss[kind] += torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum").item()
            right[kind] += bool((logits_TV.argmax(-1) == target_T).all())
    return {
        kind: {
            "perplexity": round(math.exp(loss[kind] / tokens), 5),
            "right_percent": round(100 * right[kind] / len(chosen), 1),
        }
        for kind in kinds
    }


@torch.inference_mode()
def random_checkpoint(size: str, kinds: list[str], tokens: int) -> dict[str, dict[str, float]]:
    """Root mean square of the logits' change over their spread; how often the likeliest token stays."""
    spec = read_spec(size)
    model = random_transformer(
        spec, dtype=torch.float32, device=torch.device("cpu"), max_model_len=tokens + BLOCK_SIZE
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, spec.vocab_size, (tokens,), generator=generator).tolist()
    exact = logits_of(model, ids, "model")
    result = {}
    for kind in kinds:
        got = exact if kind == "model" else logits_of(model, ids, kind)
        error = (got - exact).square().mean().sqrt() / exact.std()
        same = (got.argmax(-1) == exact.argmax(-1)).float().mean()
        result[kind] = {
            "logit_error_percent": round(100 * error.item(), 3),
            "same_choice_percent": round(100 * same.item(), 1),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", default="tiny,110m", help=f"random checkpoints, of {', '.join(CONFIGS)}")
    parser.add_argument("--tokens", type=int, default=512, help="of the random text (default: 512)")
    parser.add_argument("--questions", type=int, default=1000, help="at most this many of the held-out ones")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    api.use_threads(count_cores())
    kinds = ["model", "int8", "fp8"]
    results = {"built-in, held-out questions": heldout(kinds, args.questions)}
    for size in args.sizes.split(","):
        results[f"{size}, random weights"] = random_checkpoint(size, kinds, args.tokens)
    for title, figures in results.items():
        for kind, values in figures.items():
            print(f"{title}, {kind}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    if args.json:
        facts = {"machine": machine.describe(), "backend": api.backend_name("cpu"), "results": results}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
