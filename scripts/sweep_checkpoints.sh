#!/usr/bin/env bash
# Every checkpoint of a directory through the evaluations of configs/sweep.yaml, on all GPUs.
#   scripts/sweep_checkpoints.sh checkpoints/run
#   scripts/sweep_checkpoints.sh checkpoints/run --watch --newest-first     beside a training run
#   scripts/sweep_checkpoints.sh checkpoints/run --evaluations my.yaml --results-dir results
# All flags: python sweep.py --help. NPROC=4 sets the number of processes (default: one a GPU, or
# one without GPUs); PYTHON the interpreter. Safe to interrupt and to start again, or twice at once.
set -euo pipefail
if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: $0 CHECKPOINTS_DIR [flags of sweep.py]" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[[ -x $python ]] || python=python3
directory=$1
shift
if [[ $* != *--evaluations* ]]; then
    set -- --evaluations "$root/configs/sweep.yaml" "$@"
fi
if [[ -z ${NPROC:-} ]]; then
    NPROC=$("$python" -c "import torch; print(max(1, torch.cuda.device_count()))" 2> /dev/null) ||
        exec "$python" "$root/sweep.py" --checkpoint-path "$directory" "$@" # which says why not
fi
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$NPROC" \
    "$root/sweep.py" --checkpoint-path "$directory" "$@"
