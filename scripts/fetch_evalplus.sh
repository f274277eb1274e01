#!/usr/bin/env bash
# EvalPlus's HumanEval+ (164 problems) and MBPP+ (378), in its own form (Apache-2.0), for
# humaneval_eval.py: its release files of the versions that EvalPlus 0.3.1 reads.
#
#   scripts/fetch_evalplus.sh [DIRECTORY]        # default: this repository's data
#
# From EvalPlus's own repositories. Needs curl and internet: this script has not been run where
# roseval is developed, which has none.
set -euo pipefail

data=${1:-"$(dirname "${BASH_SOURCE[0]}")/../data"}
releases=https://github.com/evalplus

fetch() { # URL FILE PROBLEMS
    if [ -e "$2" ]; then
        echo "$2 is already there" >&2
        return
    fi
    mkdir -p "$(dirname "$2")"
    curl --fail --location --retry 3 --output "$2.part" "$1"
    n=$(gzip -dc "$2.part" | grep -c '"task_id"' || true)
    if [ "$n" -ne "$3" ]; then
        echo "error: $n problems, not $3: $1 is not what it was ($2.part)" >&2
        exit 1
    fi
    mv "$2.part" "$2"
}

fetch "$releases/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz" \
    "$data/HumanEvalPlus.jsonl.gz" 164
fetch "$releases/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz" \
    "$data/MbppPlus.jsonl.gz" 378
echo "python humaneval_eval.py --data-path $data/HumanEvalPlus.jsonl.gz --checkpoint-path ..."
