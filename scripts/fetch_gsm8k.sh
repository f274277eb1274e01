#!/usr/bin/env bash
# GSM8K (train 7,473, test 1,319 problems, MIT licence), MGSM (250 problems in 11 languages,
# CC BY 4.0) and the eight worked examples of Wei et al., also in Llama 3's words, for gsm8k_eval.py.
#
#   scripts/fetch_gsm8k.sh [DIRECTORY]        # default: this repository's data
#
# From their authors' repositories, the examples from lm-evaluation-harness's. Needs curl and
# internet: this script has not been run where roseval is developed, which has none.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${1:-"$here/../data"}
raw=https://raw.githubusercontent.com
python=$here/../.venv/bin/python
[ -x "$python" ] || python=python3

fetch() { # URL FILE LINES
    if [ -e "$2" ]; then
        echo "$2 is already there" >&2
        return
    fi
    mkdir -p "$(dirname "$2")"
    curl --fail --location --retry 3 --output "$2.part" "$1"
    if [ "$(wc -l < "$2.part")" -lt "$3" ]; then
        echo "error: $1 has fewer than $3 lines: it is not what it was ($2.part)" >&2
        exit 1
    fi
    mv "$2.part" "$2"
}

for split in train:7473 test:1319; do
    fetch "$raw/openai/grade-school-math/master/grade_school_math/data/${split%:*}.jsonl" \
        "$data/gsm8k/${split%:*}.jsonl" "${split#*:}"
done
for shots in cot cot-llama; do
    fetch "$raw/EleutherAI/lm-evaluation-harness/main/lm_eval/tasks/gsm8k/gsm8k-$shots.yaml" \
        "$data/gsm8k/gsm8k-$shots.yaml" 20
    "$python" "$here/cot_shots.py" "$data/gsm8k/${shots/-/_}_shots.jsonl" \
        "$data/gsm8k/gsm8k-$shots.yaml"
done
for language in bn de en es fr ja ru sw te th zh; do
    fetch "$raw/google-research/url-nlp/main/mgsm/mgsm_$language.tsv" \
        "$data/mgsm/mgsm_$language.tsv" 249
done
echo "python gsm8k_eval.py --data-path $data/gsm8k --checkpoint-path ..."
