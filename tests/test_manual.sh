#!/bin/sh
# The options that --help, the manual page and the completion know are the same ones.
set -eu
manual=${TR_SRCDIR:?}/src/trireme.1.in
completion=$TR_SRCDIR/src/trireme.bash-completion
status=0
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT

# one_per_line: the long options in a text, sorted.
one_per_line()
{
    grep -oE -e '(^|[^-[:alnum:]])--[a-z][a-z0-9-]+' | grep -oE -e '--[a-z][a-z0-9-]+' | sort -u
}

for command in batch bench comm plan doctor profile; do
    of=$command
    [ "$command" != comm ] || of='bench comm'
    # Options stand at the start of a line of the help; its prose may name others.
    # shellcheck disable=SC2086 # one word or two
    "${TRIREME:?}" $of --help | grep -E -e '^ +(-[a-zA-Z], )?--' | sed 's/\(--[a-z0-9-]*\).*/\1/' |
        one_per_line >"$tmp/help"
    [ -s "$tmp/help" ]
    title=$(echo "$command" | tr '[:lower:]' '[:upper:]')
    awk -v title=".SH $title OPTIONS" '/^\.SH / { here = $0 == title } here && /^\.BI? / { gsub(/\\-/, "-"); print }' \
        "$manual" | one_per_line >"$tmp/manual"
    sed -n "s/^ *$command) _trireme_words '\(.*\)' \"\$word\".*/\1/p" "$completion" |
        one_per_line >"$tmp/completion"
    for other in manual completion; do
        diff "$tmp/help" "$tmp/$other" ||
            { echo "trireme $of --help (<) and the $other (>) differ" && status=1; }
    done
done
exit "$status"
