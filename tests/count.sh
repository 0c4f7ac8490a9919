#!/bin/sh
# count.sh BUILDDIR: print "PASSED FAILED SKIPPED" of the last make check there. A CMocka program counts by its cases, a
# script as one. A program that ended badly without saying which case failed counts as one failure.
set -eu
passed=0 failed=0 skipped=0

# cases LOG WORD: the sum over the groups' closing lines "[  WORD  ] N test(s)".
cases()
{
    awk -v word="$2" '$1 == "[" && $2 == word && $3 == "]" && $5 ~ /^test\(s\)/ { n += $4 } END { print n + 0 }' "$1"
}

for trs in "$1"/tests/*.trs; do
    [ -f "$trs" ] || continue
    log=${trs%.trs}.log
    result=$(sed -n 's/^:test-result: *//p' "$trs" | head -n 1)
    p=$(cases "$log" PASSED) f=$(cases "$log" FAILED) s=$(cases "$log" SKIPPED)
    case $result in
    PASS) [ $((p + f + s)) -gt 0 ] || p=1 ;;
    SKIP) [ "$s" -gt 0 ] || s=1 ;;
    *) [ "$f" -gt 0 ] || f=1 ;;
    esac
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done
echo "$passed $failed $skipped"
