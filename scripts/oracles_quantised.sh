#!/usr/bin/env bash
# The quantisers whose matrices are fixtures of the tests, in an environment of their own, and their
# files made anew: bash scripts/oracles_quantised.sh [NAME …]. On a CPU; nothing is compiled.
set -euo pipefail
cd "$(dirname "$0")/.."
at=.oracles/quantised
if [ ! -d "$at/venv" ]; then
    python3 -m venv "$at/venv"
    "$at/venv/bin/pip" install torch==2.13.0 numpy safetensors transformers==5.17.0 accelerate
    # without what they need to run models on a GPU
    "$at/venv/bin/pip" install --no-deps compressed-tensors==0.20.0 bitsandbytes==0.50.2 \
        loguru logbar device-smi threadpoolctl tokenicer pypcre maxminddb defuser
    "$at/venv/bin/pip" install --no-deps --target "$at/compressed_tensors_0.10.2" \
        compressed-tensors==0.10.2
    # sources alone: their packing is Python
    "$at/venv/bin/pip" download --no-deps --no-binary :all: --no-build-isolation -d "$at" \
        gptqmodel==7.7.0 autoawq==0.2.9
    for name in gptqmodel autoawq; do
        tar -xzf "$at/$name"-*.tar.gz -C "$at"
        mv "$at/$name"-*/ "$at/$name"
    done
fi
PYTHONPATH="$at/gptqmodel" ORACLES="$at" OMP_NUM_THREADS=1 \
    "$at/venv/bin/python" tests/fixtures/make_quantised.py "$@"
