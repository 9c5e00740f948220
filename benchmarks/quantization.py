"""What weights in integers cost in accuracy: perplexity of the built-in model, error of logits elsewhere.

    python -m benchmarks.quantization [--models 110m qwen3-0.6b] [--json FILE]

The built-in model reads questions it was not trained on, each with the answer it should give: the
perplexity of the answers, and how many it would give word for word. Models of other shapes have random
weights; there the figure is how far the logits are from those in fp32, with bf16 for comparison.
Neither depends on how fast the machine is.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks import machine
from benchmarks.models import CONFIGS, assemble, random_weights, read_spec
from engine import builtin
from engine.config import Quantization
from engine.llm import LLM
from engine.model.arch import ArchSpec
from engine.model.batch import ForwardBatch
from engine.model.transformer import Transformer
from engine.types import SamplingParams
from kernels.api import AttentionBatch
from training.batches import Encoder
from training.dataset import Book

WAYS = ("bfloat16", "int8", "int8-g128", "int4", "int4-g64", "int4-g128")
QUESTIONS = Path("training/heldout.jsonl")
NUM_TOKENS = 128
BLOCK_SIZE = 32


def answers_of_the_builtin_model(way: str) -> dict[str, float]:
    """Perplexity of the right answers, and the share that are the likeliest at every token."""
    quantization = None if way in ("float32", "bfloat16") else way
    dtype = "float32" if way == "float32" else "bfloat16"
    llm = LLM(dtype=dtype, quantization=quantization, kv_cache_memory_bytes=64 << 20)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    pairs = list(_pairs())
    total = tokens = right = 0.0
    outputs = llm.generate([prompt + answer for prompt, answer in pairs], params)
    for (prompt, _), output in zip(pairs, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = [entry for entry in output.prompt_logprobs[len(prompt) :] if entry is not None]
        total += sum(entry.logprob for entry in entries)
        tokens += len(entries)
        right += all(entry.top[0][0] == entry.token_id for entry in entries)
    return {
        "perplexity": math.exp(-total / tokens),
        "right_answers": right / len(pairs),
        "answer_tokens": tokens,
        "weight_bytes": llm.info.weight_bytes,
    }


def _pairs() -> Iterator[tuple[list[int], list[int]]]:
    encoder = Encoder(Tokenizer.from_file(str(builtin.path() / "tokenizer.json")), cut_rate=0.0)
    book = Book()
    for line in QUESTIONS.read_text().splitlines():
        entry = json.loads(line)
        yield encoder.prompt(entry["question"]), encoder.answer(book.answer(entry["intent"]))


def errors_of_logits(name: str) -> dict[str, dict[str, float]]:
    """Against fp32 with the same random weights, at every position of a random prompt."""
    spec = read_spec(name)
    exact = _logits(_random(spec, "float32"))
    return {way: _distance(exact, _logits(_random(spec, way))) for way in WAYS}


def _random(spec: ArchSpec, way: str) -> Transformer:
    """The weights are drawn in fp32 for all, then rounded."""
    weights = random_weights(spec, dtype=torch.float32, device=torch.device("cpu"))
    if way == "float32":
        return assemble(spec, weights, NUM_TOKENS)
    quantization = None if way == "bfloat16" else Quantization.parse(way)
    return assemble(spec, ((slot, x.bfloat16()) for slot, x in weights), NUM_TOKENS, quantization)


@torch.inference_mode()
def _logits(model: Transformer) -> torch.Tensor:
    spec, blocks = model.spec, NUM_TOKENS // BLOCK_SIZE
    token_id_T = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0))
    shape = (blocks + 1, 2, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    position_T = torch.arange(NUM_TOKENS)
    batch = ForwardBatch(
        token_id_T=token_id_T,
        position_T=position_T,
        slot_T=position_T + BLOCK_SIZE,
        attention=AttentionBatch(
            page_table_SB=torch.arange(1, blocks + 1, dtype=torch.int32)[None],
            query_start_S1=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
            seq_len_S=torch.tensor([NUM_TOKENS], dtype=torch.int32),
            num_decodes=0,
            max_query_len=NUM_TOKENS,
            max_seq_len=NUM_TOKENS,
        ),
        kv=[torch.zeros(shape, dtype=model.dtype) for _ in range(spec.num_layers)],
    )
    return model.logits(model.forward(batch))


def _distance(exact_TV: torch.Tensor, got_TV: torch.Tensor) -> dict[str, float]:
    """Relative root mean square error, mean KL divergence in nats, share of equal argmaxes."""
    p_TV, q_TV = exact_TV.log_softmax(-1), got_TV.log_softmax(-1)
    return {
        "relative_error": float((got_TV - exact_TV).norm() / exact_TV.norm()),
        "kl": float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean()),
        "same_argmax": float((exact_TV.argmax(-1) == got_TV.argmax(-1)).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=list(CONFIGS), default=["110m", "qwen3-0.6b"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine.describe(), "builtin": {}, "random": {}}
    print(f"{'built-in model':<24}{'perplexity':>12}{'answers':>10}{'weights':>10}")
    for way in ("float32", *WAYS):
        row = result["builtin"][way] = answers_of_the_builtin_model(way)
        size = f"{row['weight_bytes'] / 2**20:.1f} MiB"
        print(f"{way:<24}{row['perplexity']:>12.5f}{row['right_answers']:>10.1%}{size:>10}")
    for name in args.models:
        print(f"{name + ', random weights':<24}{'error':>12}{'KL':>10}{'argmax':>10}")
        result["random"][name] = errors_of_logits(name)
        for way, row in result["random"][name].items():
            print(f"{way:<24}{row['relative_error']:>12.5f}{row['kl']:>10.5f}{row['same_argmax']:>10.1%}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
