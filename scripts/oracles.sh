#!/usr/bin/env bash
# The trainers whose checkpoints are fixtures of the tests, in an environment of their own, and their
# files made anew: bash scripts/oracles.sh [NAME …]. About 5 GB, on a CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
at=.oracles
if [ ! -d "$at/venv" ]; then
    python3 -m venv "$at/venv"
    "$at/venv/bin/pip" install torch==2.13.0 triton numpy pyyaml psutil transformers==5.17.0 \
        accelerate==1.15.0 lightning==2.6.6 deepspeed==0.19.8 megatron-core==0.16.1 \
        gguf==0.19.0 xllamacpp==2026.10.11549
    # their pins contradict each other, their code does not
    "$at/venv/bin/pip" install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 torch_checkpointing \
        tensorboard torchdata litgpt==0.5.13 ai2-olmo-core==3.0.0
    "$at/venv/bin/pip" install tyro einops cached_path omegaconf bettermap importlib_resources \
        'dataclass-extensions>=0.3'
    git clone https://github.com/karpathy/llama2.c "$at/llama2.c"
    git -C "$at/llama2.c" checkout -q 350e04f
    git clone https://github.com/karpathy/llm.c "$at/llm.c"
    git -C "$at/llm.c" checkout -q f1e2ace
    git clone https://github.com/karpathy/nanochat "$at/nanochat"
    git -C "$at/nanochat" checkout -q ccf4b7f
fi
ORACLES="$at" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 "$at/venv/bin/python" tests/fixtures/make_trained.py "$@"
bash scripts/oracles_quantised.sh
[ -z "${ROSEVAL_DATA:-}" ] || "$at/venv/bin/python" tests/fixtures/make_llama_cpp.py
