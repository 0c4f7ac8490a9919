#!/bin/bash
# Documents with several questions each on one rank and on two replicas: the same records, and about as many prompt tokens found
# in the caches: a document's questions go to one replica (tests/test_replicas.c has the rule; how far the reader is when a
# request is dealt out is chance here: one of five times is enough, for without the rule it would be half as many each time).
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch prefixes

awk 'BEGIN {
    for (doc = 0; doc < 10; doc++)
        for (q = 0; q < 3; q++) {
            prompt = 40 + doc
            for (i = 1; i < 128; i++) prompt = prompt ", " 40 + (doc * 31 + i * 7) % 1800
            for (i = 0; i < 6; i++) prompt = prompt ", " 40 + (q * 57 + i * 3) % 1800
            printf "{\"custom_id\": \"doc-%d-%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": [%s], " \
                "\"max_tokens\": 3, \"temperature\": 0, \"logprobs\": 1, \"return_token_ids\": true}}\n", doc, q, prompt
        }
}' >"$dir/in"

job() { # RANKS OUT OPTION...
    ranks=$1 out=$2
    shift 2
    timeout "$patience_s" "$mpiexec" -n "$ranks" "${TRIREME:?}" batch -m "${TR_SRCDIR:?}/models/tiny" -i "$dir/in" -o "$out" --kv-dtype f32 \
        --max-model-len 256 --max-sequences 6 "$@" 2>"$dir/log" && return
    cat "$dir/log"
    exit 1
}
cached() { # OUT
    grep -o '"cached_tokens": *[0-9]*' "$1" | awk '{ n += $NF } BEGIN { FS = ":" } END { print n + 0 }'
}
job 1 "$dir/one"
one=$(cached "$dir/one") two=0
# 20 questions come second or third to 128 tokens; dealt out in turn each replica would compute nearly every document.
[ "$one" -eq 2560 ] || { echo "one rank found $one tokens in its cache, not 2560"; exit 1; }
for _ in 1 2 3 4 5; do
    [ "$two" -lt $((one * 9 / 10)) ] || break
    rm -f "$dir"/two*
    job 2 "$dir/two" --dp 2 --ep 1
    "${TR_BUILDDIR:?}/tests/compare_records" "$dir/one" "$dir/two" || exit 1
    two=$(cached "$dir/two")
done
[ "$two" -ge $((one * 9 / 10)) ] || { echo "two replicas found $two tokens in their caches, one $one"; exit 1; }
