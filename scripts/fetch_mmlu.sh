#!/usr/bin/env bash
# MMLU in its original layout (dev/, val/, test/ with one CSV a subject), for mmlu_eval.py.
#
#   scripts/fetch_mmlu.sh [DIRECTORY]        # default: this repository's data/mmlu
#
# Hendrycks et al.'s own archive, 166 MB, MIT licence. Needs curl and tar, and internet: this script
# has not been run where roseval is developed, which has none.
set -euo pipefail

target=${1:-"$(dirname "${BASH_SOURCE[0]}")/../data/mmlu"}
url=https://people.eecs.berkeley.edu/~hendrycks/data.tar

if [ -e "$target/test" ]; then
    echo "$target/test is already there; nothing done" >&2
    exit 0
fi
mkdir -p "$target"
temporary=$(mktemp -d "$target/.fetch-XXXXXX")
trap 'rm -rf "$temporary"' EXIT

curl --fail --location --retry 3 --output "$temporary/data.tar" "$url"
tar -xf "$temporary/data.tar" -C "$temporary"
for split in dev val test; do
    n=$(find "$temporary/data/$split" -name '[!.]*.csv' | wc -l)
    if [ "$n" -ne 57 ]; then
        echo "error: $n subjects in $split, not 57: $url is not what it was" >&2
        exit 1
    fi
done
mv "$temporary"/data/{dev,val,test} "$target/"
echo "MMLU is in $target: python mmlu_eval.py --data-path $target --num-few-shot 5 ..."
