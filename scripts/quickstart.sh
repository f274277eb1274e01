#!/usr/bin/env bash
# From nothing to a loss curve on one machine with Python and a package index, in minutes on CPU:
# installs, makes a corpus of the Python standard library's own sources, trains a small GPT on it,
# and evaluates every checkpoint of that run. Safe to run twice: what is done is not done again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
start=$SECONDS
run=checkpoints/quickstart
# two ranks of one thread each: the way it goes on many GPUs, and what two cores do best
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc obeys both
launch="torchrun --standalone --nproc-per-node=$((cores > 1 ? 2 : 1))"
export OMP_NUM_THREADS=1

step() { printf '\n\033[1m%s\033[0m\n%s\n' "$1" "$ $2"; eval ".venv/bin/$2"; }

step "1. A corpus: this machine's Python standard library, as token shards" \
    "python scripts/make_corpus.py --out data/stdlib --tokenizer byte"
step "2. A small GPT, trained for about a minute" \
    "$launch train.py --config nano --tokenizer-name byte --data-mode fineweb_npy \
--train-npy 'data/stdlib/stdlib_train_*.npy' --val-npy 'data/stdlib/stdlib_val_*.npy' \
--val-max-tokens 50_000 --seq-len 256 --batch-size 4 --lr 3e-3 --warmup-steps 20 \
--num-steps 300 --eval-steps 60 --checkpoint-path $run --resume"
step "3. All its checkpoints, evaluated on the whole validation text" \
    "$launch eval.py --checkpoint-path $run --data-mode fineweb_npy \
--val-npy 'data/stdlib/stdlib_val_*.npy' --max-tokens 200_000 --seq-len 256 --batch-size 16"
step "4. The same records as a page with curves" "python report.py results/quickstart"
printf '\nDone in %d s without the install. Checkpoints: %s; records: results/quickstart.\n' \
    $((SECONDS - start)) "$run"
