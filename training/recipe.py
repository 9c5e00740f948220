"""Every number that decides the result. Does not know: what is done with them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How one part of the training goes through its batches."""

    learning_rate: float
    dropout: float
    tokens_per_batch: int
    warmup_steps: int = 100
    decay: float = 1.0  # the share of the steps, at the end, in which the rate falls along a cosine


@dataclass(frozen=True)
class Recipe:
    """What decides the result."""

    seed: int = 20
    threads: int = 2
    conversations: int = 100_000
    tokenizer_conversations: int = 20_000
    questions: Pace = Pace(2e-3, dropout=0.05, tokens_per_batch=2048)
    task_samples: int = 57_000
    task_share: float = 0.6  # of those samples; the others repeat questions, so that they are not forgotten
    tasks: Pace = Pace(1e-3, dropout=0.0, tokens_per_batch=1024, decay=0.8)
    cut_rate: float = 0.95
    later_cut_rate: float = 0.85
    weight_decay: float = 0.05
    clip_norm: float = 1.0
