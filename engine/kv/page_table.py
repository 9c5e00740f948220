"""Arithmetic of page tables. It knows counts, not blocks.

A page table is a list of block ids: position p of a request lives in block `table[p // block_size]` at
offset `p % block_size`.
"""

from __future__ import annotations

from typing import NamedTuple


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold `tokens` tokens.

    >>> [blocks_for(tokens, 4) for tokens in (0, 1, 4, 5)]
    [0, 1, 1, 2]
    """
    return -(-tokens // block_size)


class ForkSplit(NamedTuple):
    """What a follower takes from a computed prompt. See `split_for_fork`."""

    shared_blocks: int
    copied_tokens: int


def split_for_fork(prompt_len: int, block_size: int) -> ForkSplit:
    """Where sharing ends and copying begins when a prompt of `prompt_len` tokens is forked.

        0                       shared                 prompt_len - 1    prompt_len
        |--- full blocks, shared ---|--- copied with their block ---|--- recomputed ---|

    The follower computes the last prompt token again, because that is where its own first token is drawn
    from. It therefore writes into the block of that token and needs that block for itself, even where
    the prompt fills it exactly. With nothing before that token in its block there is nothing to copy.

    >>> split_for_fork(10, 4), split_for_fork(8, 4), split_for_fork(9, 4)
    (ForkSplit(shared_blocks=2, copied_tokens=1), ForkSplit(shared_blocks=1, copied_tokens=3), \
ForkSplit(shared_blocks=2, copied_tokens=0))
    """
    return ForkSplit((prompt_len - 1) // block_size, (prompt_len - 1) % block_size)
