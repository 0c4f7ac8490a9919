#!/bin/bash
# A job heeds USR1, TERM and INT also where a library that it loads has taken them (tests/fault/take_signals.c).
set -u
: "${TRIREME:?}" "${TR_SRCDIR:?}" "${TR_BUILDDIR:?}"
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
one_rank
export OMP_NUM_THREADS=1
if grep -q -e '__tsan_init' -e '__asan_init' "$TRIREME"; then
    skip "skipped: a sanitizer's program cannot be preloaded"
fi
scratch signals
${CC:-cc} -std=gnu17 -D_GNU_SOURCE -O1 -fPIC -shared -I"$TR_BUILDDIR" "$TR_SRCDIR/tests/fault/take_signals.c" -o "$dir/take.so" \
    2>"$dir/log" || skip "skipped: no C compiler that makes a library: $(head -n 1 "$dir/log")"
# Nobody waits for its end: minutes.
printf '{"custom_id":"r","method":"POST","url":"/v1/completions","body":{"prompt":"The","max_tokens":15000,"ignore_eos":true}}\n' \
    >"$dir/in"
for signal in USR1 TERM INT; do
    LD_PRELOAD="$dir/take.so" "$TRIREME" batch -m "$TR_SRCDIR/models/tiny" -i "$dir/in" -o "$dir/$signal" --max-model-len 16000 \
        --grace 0 --save-every 1 >"$dir/log" 2>&1 &
    job=$!
    await_in_job test -s "$dir/$signal.saved"
    kill -"$signal" "$job"
    # Where the signal was lost nobody waits for the end.
    await_in_job logged 'nothing new is begun' || kill -9 "$job" 2>/dev/null
    ended
    is "$signal that was taken" 75 "$status"
done
done_checking
