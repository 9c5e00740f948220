"""Quire and other servers under the same loads on the same machine: `python -m benchmarks.compare`.

    checkpoints   the models with random weights, for every server, and llama.cpp's files of them
    engines       how each server is installed, started and called
    serving       one running server: when it was ready, what it holds, what it spent
    loads         W1 to W4, and one run of one of them
    bounds        what the hardware allows under each load
    statistics    medians, spread, ties; which runs were disturbed
    page          the tables of docs/performance.md

Servers take turns: each round starts every server afresh, one at a time, in another order, under all loads.
"""
