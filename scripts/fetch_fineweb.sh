#!/usr/bin/env bash
# FineWeb-Edu, already in GPT-2 tokens (100M a shard, 200 MB a file), from the Hugging Face hub:
# karpathy/fineweb-edu-100B-gpt2-token-shards, in llm.c's .bin format, which --val-npy and
# --train-npy read as it is. Needs internet; no test or continuous-integration job runs it.
#
#   bash scripts/fetch_fineweb.sh              # validation and 1 training shard into data/fineweb
#   bash scripts/fetch_fineweb.sh 10 DIR       # validation and 10 training shards into DIR
#   HF_ENDPOINT=https://a.mirror bash scripts/fetch_fineweb.sh
#
# Run it again to continue: complete shards are kept, partial ones resumed. A shard gets its name
# only once its length is right.
set -euo pipefail

shards=${1:-1}
dir=${2:-"$(dirname "$0")/../data/fineweb"}
base="${HF_ENDPOINT:-https://huggingface.co}/datasets/karpathy/fineweb-edu-100B-gpt2-token-shards/resolve/main"

if ! [[ $shards =~ ^[0-9]+$ ]]; then
    echo "error: the number of training shards must be a number, not '$shards'" >&2
    exit 2
fi
mkdir -p "$dir"

# Little-endian int32 number $2 of file $1.
header() { od -A n -t d4 -j $((4 * $2)) -N 4 "$1" | tr -d ' '; }

# llm.c's header is 256 int32, of which magic number, version, tokens; then come uint16 tokens.
is_shard() { [[ $(header "$1" 0) == 20240520 ]]; }
is_complete() { (($(wc -c <"$1") == 1024 + 2 * $(header "$1" 2))); }

fetch() {
    local name=$1 path="$dir/$1"
    if [[ -f $path ]]; then
        echo "$name: already here"
        return
    fi
    if ! { [[ -s $path.part ]] && is_shard "$path.part" && is_complete "$path.part"; }; then
        echo "$name: downloading"
        curl --fail --location --retry 5 --continue-at - --progress-bar \
            --output "$path.part" "$base/$name"
    fi
    if ! is_shard "$path.part"; then
        rm "$path.part"
        echo "error: what came for $name is not a token shard (a proxy's error page?)" >&2
        exit 1
    fi
    if ! is_complete "$path.part"; then
        echo "error: $name is incomplete; run this again to continue" >&2
        exit 1
    fi
    mv "$path.part" "$path"
}

fetch edu_fineweb_val_000000.bin
for ((i = 1; i <= shards; i++)); do
    fetch "$(printf 'edu_fineweb_train_%06d.bin' "$i")"
done
echo "in $dir: evaluate with --data-mode fineweb_npy --val-npy $dir/edu_fineweb_val_000000.bin"
