"""Trains the small demo model that ships with Quire. Server and engine do not import this package."""

import os

# Before torch starts its threads: idle threads sleep instead of spinning. On a busy machine spinning threads
# eat the time that the others need, and a training step takes five times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
