#!/usr/bin/env bash
# Makes .venv beside the scripts and installs the tested versions. Run twice, it does nothing twice.
#   bash scripts/install.sh            what the scripts need
#   bash scripts/install.sh test       and what the tests need
# PYTHON=python3.12 picks the interpreter (3.11 or later).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: roseval needs Python 3.11 or later, $python is $("$python" --version 2>&1);" \
         "name another one with PYTHON=python3.12" >&2
    exit 2
}
wanted=(requirements.txt)
[ "${1:-}" = test ] && wanted+=(requirements-test.txt)
stamp=.venv/installed-${1:-run}
sum=$(cat "${wanted[@]}" constraints.txt | cksum)
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && exit 0

start=$SECONDS
echo "installing into .venv (PyTorch is large: minutes on a slow line) …"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt "${wanted[@]/#/--requirement=}"
echo "$sum" > "$stamp"
echo "installed in $((SECONDS - start)) s"
