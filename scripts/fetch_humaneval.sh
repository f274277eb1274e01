#!/usr/bin/env bash
# HumanEval's 164 problems as published (HumanEval.jsonl.gz, 44 kB, MIT licence), for
# humaneval_eval.py.
#
#   scripts/fetch_humaneval.sh [DIRECTORY]        # default: this repository's data
#
# From OpenAI's own repository. Needs curl and internet: this script has not been run where roseval
# is developed, which has none.
set -euo pipefail

target=${1:-"$(dirname "${BASH_SOURCE[0]}")/../data"}/HumanEval.jsonl.gz
url=https://github.com/openai/human-eval/raw/master/data/HumanEval.jsonl.gz

if [ -e "$target" ]; then
    echo "$target is already there; nothing done" >&2
    exit 0
fi
mkdir -p "$(dirname "$target")"
temporary=$(mktemp "$target.XXXXXX")
trap 'rm -f "$temporary"' EXIT

curl --fail --location --retry 3 --output "$temporary" "$url"
n=$(gzip -dc "$temporary" | grep -c '"task_id"' || true)
if [ "$n" -ne 164 ]; then
    echo "error: $n problems, not 164: $url is not what it was" >&2
    exit 1
fi
chmod 644 "$temporary"
mv "$temporary" "$target"
echo "HumanEval is in $target: python humaneval_eval.py --data-path $target --checkpoint-path ..."
