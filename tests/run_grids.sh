#!/bin/bash
# One job on many process grids: every grid must give the answers of one rank. Where no sum is cut (data, context and pipeline
# parallelism with whole experts on every rank) to the last digit of every log-probability; where one is (tp, ep, moe-tp) the
# same tokens, and log-probabilities within 1e-4. With an f32 cache: rounding to fp8 or bf16 would turn a difference in the last
# bit into one of whole steps.
#
# usage: run_grids.sh TRIREME MODEL COMPARE [--quick] [PATTERN]
# COMPARE: tests/compare_records. --quick: some grids of 2 ranks, fewer requests. PATTERN: only grids whose options match it.
set -u

if [ $# -lt 3 ]; then
    echo "usage: $0 TRIREME MODEL COMPARE [--quick] [PATTERN]" >&2
    exit 2
fi
trireme=$1 model=$2 compare=$3
shift 3
quick=
if [ "${1-}" = --quick ]; then
    quick=yes
    shift
fi
pattern=${1-}
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch grids
n_grids=0

# Prompts of token ids: lengths around pages of 64 rows and around index_topk (128), shorter than a group, alike at the beginning
# (the prefix cache then answers for pages that were computed under another split); sampled with every parameter; scored.
requests() { # QUICK
    awk -v quick="$1" '
    function next_id() { seed = (seed * 1103515245 + 12345) % 2147483648; return 40 + int(seed / 65536) % 1800 }
    function ids(n, from,   i, s) {
        seed = from
        s = next_id()
        for (i = 1; i < n; i++) s = s ", " next_id()
        return "[" s "]"
    }
    function request(id, prompt, more) {
        printf "{\"custom_id\": \"%s\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": %s, " \
            "\"return_token_ids\": true, %s}}\n", id, prompt, more
    }
    BEGIN {
        n = split(quick ? "1 2 63 64 65 200" : "1 2 3 5 7 16 63 64 65 127 128 129 192 257 300 700", length_of, " ")
        for (i = 1; i <= n; i++)
            request("length-" length_of[i], ids(length_of[i], length_of[i]), \
                "\"temperature\": 0, \"max_tokens\": " (quick ? 6 : 12) ", \"logprobs\": 3")
        for (i = 0; i < (quick ? 2 : 4); i++) # 150 of these tokens, or 170, are alike
            request("prefix-" i, ids(150 + 20 * i, 99), "\"temperature\": 0, \"max_tokens\": 6, \"logprobs\": 2")
        request("sampled", ids(30, 5), "\"temperature\": 0.8, \"top_p\": 0.95, \"seed\": 7, \"n\": 2, \"max_tokens\": 10, \"logprobs\": 1")
        request("echo", ids(90, 6), "\"temperature\": 0, \"max_tokens\": 2, \"echo\": true, \"logprobs\": 2")
        if (!quick) {
            request("hot", ids(66, 8), "\"temperature\": 1.9, \"seed\": 11, \"max_tokens\": 16")
            request("top-k", ids(20, 9), "\"temperature\": 1.2, \"top_k\": 5, \"seed\": 3, \"max_tokens\": 16, \"logprobs\": 5")
            request("top-k-wide", ids(20, 9), "\"temperature\": 1.5, \"top_k\": 300, \"seed\": 4, \"max_tokens\": 16")
            request("min-p", ids(131, 10), "\"temperature\": 1.4, \"min_p\": 0.02, \"seed\": 5, \"max_tokens\": 16")
            request("penalties", ids(40, 12), "\"temperature\": 0.9, \"seed\": 6, \"max_tokens\": 24, " \
                "\"repetition_penalty\": 1.2, \"presence_penalty\": 0.4, \"frequency_penalty\": 0.3, " \
                "\"logit_bias\": {\"77\": 3, \"78\": -100}, \"logprobs\": 2")
            request("score", ids(260, 13), "\"max_tokens\": 0, \"echo\": true, \"logprobs\": 1")
            request("prompt-logprobs", ids(140, 14), "\"temperature\": 0, \"max_tokens\": 3, \"prompt_logprobs\": 2")
            request("refused", "[5000]", "\"max_tokens\": 3")
            print "{\"custom_id\": \"chat\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\": {\"messages\": " \
                "[{\"role\": \"user\", \"content\": \"The code of amber falcon is 4821.\\nThe code of bold hawk is 3197.\\n" \
                "What is the code of bold hawk?\"}], \"temperature\": 0, \"max_tokens\": 16, \"logprobs\": true, \"top_logprobs\": 3}}"
            print "this is no request"
        }
    }'
}

# job RANKS NAME INPUT OPTION...: into NAME.jsonl
job() {
    local ranks=$1 name=$2 input=$3
    shift 3
    rm -f "$dir/$name.jsonl"*
    timeout "$patience_s" "$mpiexec" -n "$ranks" "$trireme" batch -m "$model" -i "$dir/$input" -o "$dir/$name.jsonl" \
        --kv-dtype f32 --max-model-len 1024 --max-batch-tokens 256 --max-sequences 12 "$@" \
        >"$dir/log" 2>&1
}

# check HOW WANTED RANKS INPUT OPTION...: HOW is exact or near; WANTED: the run it is compared with.
check() {
    local how=$1 wanted=$2 ranks=$3 input=$4 begun=$SECONDS status answer
    shift 4
    case "$ranks $*" in
    *$pattern*) ;;
    *) return ;;
    esac
    n_grids=$((n_grids + 1))
    job "$ranks" got "$input" "$@"
    status=$?
    if [ "$status" -ne 0 ]; then
        printf '%d ranks %s: exit status %d\n' "$ranks" "$*" "$status"
        sed 's/^/    /' "$dir/log"
        failed=1
        return
    fi
    if [ "$how" = exact ]; then
        answer=$("$compare" "$dir/$wanted.jsonl" "$dir/got.jsonl")
    else
        answer=$("$compare" -t 1e-4 "$dir/$wanted.jsonl" "$dir/got.jsonl")
    fi
    status=$?
    [ "$status" -eq 0 ] || failed=1
    printf '%-6s %d ranks %s: %s, %d s\n' "$how" "$ranks" "$*" "$answer" $((SECONDS - begun))
}

requests "$quick" >"$dir/in"
head -n 1 "$dir/in" >"$dir/one"
tail -n 3 "$dir/in" >"$dir/few"
job 1 one-rank in || { cat "$dir/log"; exit 1; }

if [ -n "$quick" ]; then
    check near one-rank 2 in --tp 2
    check exact one-rank 2 in --pp 2
    check near one-rank 2 in --dp 2
    check exact one-rank 2 in --cp 2 --ep 1
    check exact one-rank 2 in --cp 2 --ep 1 --cp-mode in-seq-split
    exit "$failed"
fi

# Each dimension alone.
check exact one-rank 1 in --no-overlap
check near one-rank 2 in --tp 2
check near one-rank 2 in --tp 2 --ep 1
check near one-rank 2 in --tp 2 --moe-tp 2
check near one-rank 4 in --tp 4
check near one-rank 4 in --tp 4 --ep 2 --moe-tp 2
check near one-rank 4 in --tp 4 --ep 2
check exact one-rank 2 in --pp 2
check exact one-rank 2 in --pp 2 --pp-layers 1,3
check exact one-rank 3 in --pp 3
check exact one-rank 4 in --pp 4
check exact one-rank 2 in --dp 2 --ep 1
check exact one-rank 3 in --dp 3 --ep 1
check exact one-rank 8 in --dp 8 --ep 1
check near one-rank 2 in --dp 2
check near one-rank 2 in --dp 2 --moe-tp 2
check near one-rank 4 in --dp 4
check near one-rank 4 in --dp 4 --ep 2
check near one-rank 8 in --dp 8
check exact one-rank 2 in --cp 2 --ep 1
check exact one-rank 3 in --cp 3 --ep 1
check exact one-rank 4 in --cp 4 --ep 1
check exact one-rank 8 in --cp 8 --ep 1
check exact one-rank 2 in --cp 2 --ep 1 --cp-mode in-seq-split
check exact one-rank 3 in --cp 3 --ep 1 --cp-mode in-seq-split
check exact one-rank 4 in --cp 4 --ep 1 --cp-mode in-seq-split
check exact one-rank 8 in --cp 8 --ep 1 --cp-mode in-seq-split
check near one-rank 2 in --cp 2
check near one-rank 2 in --cp 2 --cp-mode in-seq-split
check near one-rank 4 in --cp 4 --moe-tp 2

# Combined. Every (cp, tp) split of 8 ranks that 4 heads allow is here or above.
check near one-rank 4 in --cp 2 --tp 2
check near one-rank 4 in --cp 2 --tp 2 --cp-mode in-seq-split
check near one-rank 4 in --cp 2 --tp 2 --ep 1
check near one-rank 6 in --cp 3 --tp 2
check near one-rank 8 in --cp 2 --tp 4
check near one-rank 8 in --cp 4 --tp 2
check near one-rank 8 in --cp 4 --tp 2 --cp-mode in-seq-split
check near one-rank 4 in --tp 2 --dp 2
check near one-rank 4 in --tp 2 --dp 2 --moe-tp 2
check near one-rank 4 in --tp 2 --dp 2 --ep 2
check near one-rank 6 in --tp 2 --dp 3 --ep 2
check near one-rank 8 in --tp 4 --dp 2
check near one-rank 4 in --tp 2 --pp 2
check near one-rank 6 in --tp 2 --pp 3
check near one-rank 8 in --tp 4 --pp 2
check near one-rank 8 in --tp 2 --pp 4
check exact one-rank 4 in --pp 2 --dp 2 --ep 1
check exact one-rank 6 in --pp 3 --dp 2 --ep 1
check near one-rank 4 in --pp 2 --dp 2
check exact one-rank 4 in --pp 2 --cp 2 --ep 1
check exact one-rank 4 in --pp 2 --cp 2 --ep 1 --cp-mode in-seq-split
check exact one-rank 6 in --pp 3 --cp 2 --ep 1
check near one-rank 8 in --pp 2 --cp 2 --tp 2
check near one-rank 8 in --pp 2 --cp 2 --tp 2 --cp-mode in-seq-split
check exact one-rank 4 in --dp 2 --cp 2 --ep 1
check near one-rank 4 in --dp 2 --cp 2
check near one-rank 8 in --dp 2 --cp 2 --tp 2
check exact one-rank 8 in --pp 2 --dp 2 --cp 2 --ep 1
check near one-rank 8 in --pp 2 --dp 2 --tp 2 --ep 2 --moe-tp 2

# --no-overlap changes the order of work, not the results. Where tp stands beside cp or dp the order of a row's sum depends on its
# place in the step, and the place on what else there was to do: one request after the other.
requests yes | grep -v sampled >"$dir/solo"
job 4 overlapped solo --cp 2 --tp 2 --max-sequences 1 || { cat "$dir/log"; exit 1; }
check exact overlapped 4 solo --cp 2 --tp 2 --max-sequences 1 --no-overlap
check near one-rank 4 in --cp 2 --tp 2 --no-overlap
job 4 overlapped in --dp 4 || { cat "$dir/log"; exit 1; }
check exact overlapped 4 in --dp 4 --no-overlap
job 4 overlapped in --tp 4 || { cat "$dir/log"; exit 1; }
check exact overlapped 4 in --tp 4 --no-overlap
check exact one-rank 4 in --pp 2 --cp 2 --ep 1 --no-overlap

# SG#18280: the caches of the real model, quantised keys and scales gathered under cp. Still every bit.
job 1 fp8 in --kv-dtype fp8 || { cat "$dir/log"; exit 1; }
check exact fp8 2 in --cp 2 --ep 1 --kv-dtype fp8
check exact fp8 3 in --cp 3 --ep 1 --kv-dtype fp8 --cp-mode in-seq-split
check exact fp8 4 in --pp 2 --cp 2 --ep 1 --kv-dtype fp8
job 1 bf16 in --kv-dtype bf16 || { cat "$dir/log"; exit 1; }
check exact bf16 2 in --cp 2 --ep 1 --kv-dtype bf16

# SG#23268: pages found in the prefix cache, and the rest of the prompt computed by several. That some were found is checked.
for mode in round-robin-split in-seq-split; do
    job 2 hit in --cp 2 --ep 1 --cp-mode "$mode" || { cat "$dir/log"; exit 1; }
    if ! grep '"custom_id":"prefix-[1-3]"' "$dir/hit.jsonl" | grep -q '"cached_tokens":128'; then
        echo "no prompt of --cp 2 --cp-mode $mode was found in the prefix cache"
        failed=1
    fi
    check exact hit 2 in --cp 2 --ep 1 --cp-mode "$mode" --no-prefix-cache
done

# Uneven: one request among replicas, fewer than there are stages, one after the other.
job 1 one-alone one || { cat "$dir/log"; exit 1; }
check exact one-alone 3 one --dp 3 --ep 1
check near one-alone 8 one --dp 4 --tp 2
check exact one-alone 8 one --pp 2 --dp 2 --cp 2 --ep 1
check exact one-alone 4 one --pp 4
job 1 few-alone few || { cat "$dir/log"; exit 1; }
check exact few-alone 4 few --pp 4
check exact few-alone 8 few --pp 2 --cp 4 --ep 1 --cp-mode in-seq-split
check near few-alone 8 few --pp 2 --dp 4 --max-sequences 1
job 1 in-turn in --max-sequences 2 || { cat "$dir/log"; exit 1; } # n: 2 needs two
check exact one-rank 1 in --max-sequences 2
check exact in-turn 4 in --pp 4 --max-sequences 2

echo "$n_grids grids, $([ "$failed" -eq 0 ] && echo all as on one rank || echo SOME DIFFER)"
exit "$failed"
