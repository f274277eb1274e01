#!/usr/bin/env bash
# A sweep as a Slurm job, on one node or several. NEVER RUN by roseval's tests, which have no
# cluster: read it before you trust it. What it starts, sweep.py under torchrun, is tested on one
# machine; of several nodes only this script's lines are new.
#
#   sbatch scripts/slurm_sweep.sh checkpoints/run
#   sbatch --nodes=2 --gpus-per-node=8 scripts/slurm_sweep.sh checkpoints/run --watch
#
# Checkpoints, data and results must lie on a file system that all nodes share. Instead of one job
# of several nodes, several jobs of one node may sweep the same directory: they share the work
# checkpoint by checkpoint, and models that fit on one node are faster that way.
#SBATCH --job-name=roseval-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%x-%j.log
#SBATCH --requeue
# Asked to end (time limit, preemption), Slurm sends SIGTERM first; what is done is recorded, and the
# requeued job goes on from there.
#SBATCH --signal=TERM@60
set -euo pipefail
if [[ $# -lt 1 || $1 == -* ]]; then
    echo "usage: sbatch $0 CHECKPOINTS_DIR [flags of sweep.py]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the directory of sweep.py}"
python=${PYTHON:-.venv/bin/python}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one node do not meet
directory=$1
shift

# --rdzv-backend=c10d: the first node's torchrun holds the rendezvous, no etcd is needed.
srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head:$port" \
    --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=0 \
    sweep.py --checkpoint-path "$directory" "$@"
