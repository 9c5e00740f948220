#!/usr/bin/env bash
# Installs transformers with what `transformers serve` needs into an environment of its own, build/peers/transformers.
set -euo pipefail
cd "$(dirname "$0")/../.."
VERSION=${TRANSFORMERS:-5.23.0}
HOME_DIR=$PWD/build/peers/transformers
python3 -m venv --clear "$HOME_DIR"
# torch as Quire's own constraints have it, so that both run the same kernels.
"$HOME_DIR/bin/python" -m pip install --quiet "$(grep '^torch==' constraints.txt)" "transformers[serving]==$VERSION" accelerate
echo "transformers $VERSION" >"$HOME_DIR/version"
