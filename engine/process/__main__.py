"""`python -m engine.process FD MODULE`: the engine process. Started by engine.process.launcher only."""

from __future__ import annotations

import logging
import os
import sys

from engine.process.child import main

code = main(int(sys.argv[1]), sys.argv[2])
logging.shutdown()
sys.stderr.flush()
# Nothing is left to save, and unloading a device's libraries can take seconds.
os._exit(code)
