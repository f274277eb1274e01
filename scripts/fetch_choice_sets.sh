#!/usr/bin/env bash
# Choice sets for mmlu_eval.py --set, from their authors, in the layout that configs/choice_sets names.
#
#   scripts/fetch_choice_sets.sh SET...        # arc boolq ceval cmmlu hellaswag mmlu_pro openbookqa
#                                              # piqa truthfulqa winogrande, or: all
#   DATA=/big/data scripts/fetch_choice_sets.sh arc     # default: this repository's data
#
# Each lands in its own folder of DATA: data/arc/ARC-Challenge/ARC-Challenge-Test.jsonl, ... MMLU is
# scripts/fetch_mmlu.sh's. What arrives is counted, and refused where rows are missing. Licences are
# the sets' own (configs/choice_sets/README.md). Needs curl, Python and internet: this script has not
# been run where roseval is developed, which has none. Without internet, fetch the address that it
# names elsewhere and lay the file where it says.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
data=${DATA:-"$here/../data"}
python=$here/../.venv/bin/python
[ -x "$python" ] || python=python3
known="arc boolq ceval cmmlu hellaswag mmlu_pro openbookqa piqa truthfulqa winogrande"
bucket=https://ai2-public-datasets.s3.amazonaws.com
mosaic=https://storage.googleapis.com/ai2-mosaic/public
hub=https://huggingface.co/datasets
raw=https://raw.githubusercontent.com

get() { # URL FILE
    [ -e "$2" ] && { echo "$2 is already there" >&2; return; }
    mkdir -p "$(dirname "$2")"
    if ! curl --fail --location --retry 3 --silent --show-error --output "$2.part" "$1"; then
        rm -f "$2.part"
        echo "error: $1 could not be fetched: without internet here, fetch it elsewhere and lay it at $2" >&2
        exit 1
    fi
    mv "$2.part" "$2"
}

lines() { # FILE LINES
    n=$(grep -c '' "$1" || true)
    if [ "$n" -ne "$2" ]; then
        echo "error: $1 has $n lines, not $2: it is not what it was" >&2
        exit 1
    fi
}

unpack() { # ZIP FOLDER: its content, unless FOLDER is there
    [ -e "$2" ] && return
    mkdir -p "$2.part"
    "$python" -m zipfile -e "$1" "$2.part"
    mv "$2.part" "$2"
}

arc() {
    get $bucket/arc/ARC-V1-Feb2018.zip "$data/arc/ARC-V1-Feb2018.zip"
    unpack "$data/arc/ARC-V1-Feb2018.zip" "$data/arc/unpacked"
    for part in ARC-Easy:2376 ARC-Challenge:1172; do
        name=${part%:*}
        [ -e "$data/arc/$name" ] || mv "$data"/arc/unpacked/*/"$name" "$data/arc/"
        lines "$data/arc/$name/$name-Test.jsonl" "${part#*:}"
    done
    echo "python mmlu_eval.py --set arc_challenge --data-path $data/arc --num-few-shot 25 ..."
}

boolq() {
    for part in train:9427 dev:3270; do
        get https://storage.googleapis.com/boolq/"${part%:*}".jsonl "$data/boolq/${part%:*}.jsonl"
        lines "$data/boolq/${part%:*}.jsonl" "${part#*:}"
    done
    echo "python mmlu_eval.py --set boolq --data-path $data/boolq ..."
}

ceval() {
    get $hub/ceval/ceval-exam/resolve/main/ceval-exam.zip "$data/ceval-exam.zip"
    unpack "$data/ceval-exam.zip" "$data/ceval"
    echo "python mmlu_eval.py --set ceval --data-path $data/ceval --num-few-shot 5 ..."
}

cmmlu() {
    get https://github.com/haonan-li/CMMLU/archive/refs/heads/master.zip "$data/cmmlu.zip"
    unpack "$data/cmmlu.zip" "$data/cmmlu.unpacked"
    [ -e "$data/cmmlu" ] || mv "$data"/cmmlu.unpacked/*/data "$data/cmmlu"
    echo "python mmlu_eval.py --set cmmlu --data-path $data/cmmlu --num-few-shot 5 ..."
}

hellaswag() {
    for part in train:39905 val:10042; do
        file=hellaswag_${part%:*}.jsonl
        get $raw/rowanz/hellaswag/master/data/"$file" "$data/hellaswag/$file"
        lines "$data/hellaswag/$file" "${part#*:}"
    done
    echo "python mmlu_eval.py --set hellaswag --data-path $data/hellaswag --num-few-shot 10 ..."
}

mmlu_pro() {
    for split in test validation; do
        file=$split-00000-of-00001.parquet
        get $hub/TIGER-Lab/MMLU-Pro/resolve/main/data/$file "$data/mmlu_pro/$file"
    done
    echo "python mmlu_eval.py --set mmlu_pro --data-path $data/mmlu_pro --num-few-shot 5 ..."
}

openbookqa() {
    get $bucket/open-book-qa/OpenBookQA-V1-Sep2018.zip "$data/openbookqa/OpenBookQA-V1-Sep2018.zip"
    unpack "$data/openbookqa/OpenBookQA-V1-Sep2018.zip" "$data/openbookqa/unpacked"
    [ -e "$data/openbookqa/Main" ] || mv "$data"/openbookqa/unpacked/*/Data/Main "$data/openbookqa/"
    lines "$data/openbookqa/Main/test.jsonl" 500
    echo "python mmlu_eval.py --set openbookqa --data-path $data/openbookqa ..."
}

piqa() {
    get $mosaic/physicaliqa/physicaliqa-train-dev.zip "$data/piqa.zip"
    unpack "$data/piqa.zip" "$data/piqa"
    lines "$data/piqa/physicaliqa-train-dev/dev.jsonl" 1838
    echo "python mmlu_eval.py --set piqa --data-path $data/piqa ..."
}

truthfulqa() {
    get $raw/sylinrl/TruthfulQA/main/data/mc_task.json "$data/truthfulqa/mc_task.json"
    echo "python mmlu_eval.py --set truthfulqa_mc2 --data-path $data/truthfulqa ..."
}

winogrande() {
    get $mosaic/winogrande/winogrande_1.1.zip "$data/winogrande.zip"
    unpack "$data/winogrande.zip" "$data/winogrande"
    lines "$data/winogrande/winogrande_1.1/dev.jsonl" 1267
    echo "python mmlu_eval.py --set winogrande --data-path $data/winogrande --num-few-shot 5 ..."
}

[ $# -gt 0 ] || { echo "usage: $0 SET...; there are $known, or all" >&2; exit 2; }
[ "$*" = all ] && set -- $known
for name in "$@"; do
    case " $known " in
        *" $name "*) ;;
        *) echo "error: $name is none of $known" >&2; exit 2 ;;
    esac
done
for name in "$@"; do "$name"; done
