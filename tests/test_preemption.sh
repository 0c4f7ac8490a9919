#!/bin/bash
# A cache too small for the answers that are under way: the youngest give their pages up and begin again later, and every record
# is what it is with room for all. A cache that does not hold one sequence is refused before the weights are read.
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
scratch preemption

awk 'BEGIN {
    for (r = 0; r < 24; r++) {
        prompt = 40 + r
        for (i = 1; i < 60 + 13 * (r * 7 % 16); i++) prompt = prompt ", " 40 + (r * 31 + i * 7) % 1800
        printf "{\"custom_id\": \"r-%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {" \
            "\"prompt\": [%s], \"max_tokens\": %d, \"temperature\": %s, \"logprobs\": 2, \"return_token_ids\": true}}\n", \
            r, prompt, 40 + r % 5, r % 3 / 3
    }
}' >"$dir/in"

job() { # OUT OPTION...
    local out=$1
    shift
    timeout "$patience_s" "${TRIREME:?}" batch -m "${TR_SRCDIR:?}/models/tiny" -i "$dir/in" -o "$dir/$out" --max-model-len 384 \
        --max-sequences 12 --device cpu "$@" 2>"$dir/$out.log"
}
preemptions() { # OUT
    sed -n 's/.* \([0-9]*\) preemptions.*/\1/p' "$dir/$1.log"
}
job roomy || { cat "$dir/roomy.log"; exit 1; }
[ "$(preemptions roomy)" = 0 ] || { echo "$(preemptions roomy) preemptions with room for all"; exit 1; }
for cache in 1024 448; do
    job "small$cache" --max-cache-tokens "$cache" || { cat "$dir/small$cache.log"; exit 1; }
    [ "$(preemptions "small$cache")" -gt 0 ] || { echo "no preemption in $cache tokens: this test shows nothing"; exit 1; }
    grep -q ", $cache tokens;" "$dir/small$cache.log" ||
        { echo "the cache is not of $cache tokens"; cat "$dir/small$cache.log"; exit 1; }
    "${TR_BUILDDIR:?}/tests/compare_records" "$dir/roomy" "$dir/small$cache" || exit 1
done
# Weights that are NaN, which only reading them tells.
mkdir "$dir/damaged" && cp "$TR_SRCDIR"/models/tiny/*.json "$dir/damaged" || exit 1
for shard in "$TR_SRCDIR"/models/tiny/*.safetensors; do
    header=$(($(od -An -tu8 -N8 "$shard") + 8))
    { head -c "$header" "$shard" && head -c $(($(wc -c <"$shard") - header)) /dev/zero | tr '\0' '\377'; } \
        >"$dir/damaged/${shard##*/}" || exit 1
done
job none -m "$dir/damaged" --max-cache-tokens 447
status=$?
[ "$status" -eq 2 ] || { echo "exit status $status, not 2, of a cache that holds no sequence"; exit 1; }
grep -q -- '--max-cache-tokens 447: a sequence of 384 tokens needs 448 (--max-model-len)' "$dir/none.log" ||
    { cat "$dir/none.log"; exit 1; }
job damaged.out -m "$dir/damaged" --max-cache-tokens 448
status=$?
if [ "$status" -ne 65 ] || ! grep -q NaN "$dir/damaged.out.log"; then
    echo "exit status $status, not 65, of weights that are NaN"
    cat "$dir/damaged.out.log"
    exit 1
fi
