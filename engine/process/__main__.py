"""`python -m engine.process FD`: the engine process. Started by engine.process.launcher only."""

from __future__ import annotations

import sys

from engine.process.child import main

sys.exit(main(int(sys.argv[1])))
