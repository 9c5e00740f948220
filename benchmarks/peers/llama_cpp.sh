#!/usr/bin/env bash
# Builds llama.cpp's server and quantiser from the sources inside llama-cpp-python's sdist,
# for this machine's own instruction set, into build/peers/llama.cpp. Needs cmake and a C++ compiler.
set -euo pipefail
cd "$(dirname "$0")/../.."
VERSION=${LLAMA_CPP_PYTHON:-0.3.36}
HOME_DIR=$PWD/build/peers/llama.cpp
mkdir -p "$HOME_DIR"

python3 -m pip download --quiet --no-deps --no-binary :all: --dest "$HOME_DIR" "llama-cpp-python==$VERSION"
tar -xzf "$HOME_DIR"/llama_cpp_python-"$VERSION".tar.gz -C "$HOME_DIR"

SOURCE=$HOME_DIR/source
ln -sfn "llama_cpp_python-$VERSION/vendor/llama.cpp" "$SOURCE"
nice -n 10 cmake -S "$SOURCE" -B "$HOME_DIR/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF \
  -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_CURL=OFF
nice -n 10 cmake --build "$HOME_DIR/build" --target llama-server llama-quantize -j "${JOBS:-$(nproc)}"
echo "llama-cpp-python $VERSION" >"$HOME_DIR/version"
"$HOME_DIR/build/bin/llama-server" --version
