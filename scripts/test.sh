#!/usr/bin/env bash
# Installs what the tests need, then checks style and runs them.
#   bash scripts/test.sh               the quick suite, under 10 minutes on 2 cores
#   bash scripts/test.sh --slow        the full fault batteries too; other flags go to pytest
# Tests on real data run where ROSEVAL_DATA points to it, and say so where they are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh test
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# one thread a process: tests start processes of their own, and two workers share two cores
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest -q -rs -n 2 --dist loadfile --durations=15 "$@"
