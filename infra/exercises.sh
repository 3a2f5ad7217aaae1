#!/bin/sh
# Proves the exercises of the book: the contract test is red for just the reasons that the exercise names; with the solution applied it is
# red for just those that may remain, and of the level's tests of this strategy just those fail that the book says speak then.
#
#   infra/exercises.sh [NAME…]        a NAME is a folder of book/exercises
#
# It works on a copy of this checkout, changes that are not committed yet included. The copy is built into the same target folder, where
# the libraries are built already; so nothing else should build or test here meanwhile.
set -eu
cd "$(dirname "$0")/.."

here=$PWD
copy=$here/target/exercises
log=$(mktemp)
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$here/target}
# The copy is no repository; git must not look for one above it.
GIT_CEILING_DIRECTORIES=$here/target
export CARGO_TARGET_DIR GIT_CEILING_DIRECTORIES
trap 'rm -rf "$copy" "$log"' EXIT
trap 'exit 130' INT TERM

# shellcheck disable=SC2046 # names of folders, one word each
[ $# -gt 0 ] || set -- $(ls book/exercises)

# The value of a key in an exercise's file, without quotes, brackets and commas.
value() { sed -n "s/^$2 = //p" "book/exercises/$1/exercise.toml" | tr -d '[]",'; }
# The invariants that the contract test is red about, on one line.
red() {
    make --no-print-directory --silent -C "$copy" red "LEVEL=$1" "STRATEGY=$2" >"$log" 2>&1 || return 1
    sed -n 's/^BROKEN \(I[0-9]*\) .*/\1/p' "$log" | tr '\n' ' ' | sed 's/ $//'
}
# The level's tests that fail among those of this strategy and the one that holds broken strategies against their twins, on one line.
speaks() {
    cases=_$(echo "${2##*/}" | tr - _)
    (cd "$copy" && RUST_BACKTRACE=0 cargo test --quiet --package "$1" --tests --no-fail-fast -- --test-threads=1 "$cases" every_broken_twin) >"$log" 2>&1 || :
    # Cargo lists them once more at the end of each file, indented.
    sed -n 's/^    \([a-z0-9_]*\)\(::[a-z0-9_]*\)\{0,1\}$/\1/p' "$log" | sort -u | tr '\n' ' ' | sed 's/ $//'
}
failed=
fails() {
    echo "$1: $2" >&2
    [ "$#" -lt 3 ] || sed 's/^/    /' "$3" >&2
    failed="$failed $1"
}
# compare EXERCISE WHEN MUST MAY: holds what is red against what must be, and what may be besides: a race shows some of it only at times.
compare() {
    is=$(red "$(value "$1" level)" "$(value "$1" strategy)") || { fails "$1" "make red did not run" "$log"; return 1; }
    wrong=
    for code in $3; do case " $is " in *" $code "*) ;; *) wrong="$wrong, and not about $code" ;; esac; done
    for code in $is; do case " $3 $4 " in *" $code "*) ;; *) wrong="$wrong, and should not be about $code" ;; esac; done
    [ -z "$wrong" ] || { fails "$1" "$2 the solution the contract test is red about ${is:-nothing}$wrong" "$log"; return 1; }
}

rm -rf "$copy"
mkdir -p "$copy"
git ls-files --cached --others --exclude-standard | while read -r file; do [ ! -e "$file" ] || echo "$file"; done |
    tar -cf - -T - | tar -xf - -C "$copy"
# Cargo tells by its time whether a file has changed, and the one built last may be that of a solution.
sed -n 's|^+++ b/||p' book/exercises/*/solution.patch | sort -u | while read -r file; do touch "$copy/$file"; done

provable=
for exercise; do
    if [ ! -f "book/exercises/$exercise/exercise.toml" ] || [ ! -f "book/exercises/$exercise/solution.patch" ]; then
        fails "$exercise" "book/exercises/$exercise needs an exercise.toml and a solution.patch"
    elif compare "$exercise" "before" "$(value "$exercise" red)" "$(value "$exercise" may)"; then
        provable="$provable $exercise"
    fi
done
for exercise in $provable; do
    patch=$here/book/exercises/$exercise/solution.patch
    level=$(value "$exercise" level)
    package=$(sed -n "s/^package_$level := //p" Makefile)
    if ! git -C "$copy" apply "$patch" >"$log" 2>&1; then
        fails "$exercise" "the solution does not apply: make it anew from the code as it is" "$log"
        continue
    fi
    if compare "$exercise" "with" "$(value "$exercise" then)" ""; then
        must=$(value "$exercise" speaks)
        is=$(speaks "$package" "$(value "$exercise" strategy)")
        if ! grep -q '^running [1-9]' "$log"; then
            fails "$exercise" "with the solution no test of $package runs" "$log"
        elif [ "$is" = "$must" ]; then
            echo "$exercise: red ($(value "$exercise" red)) before its solution; with it ${must:-nothing} fails"
        else
            fails "$exercise" "with the solution ${is:-nothing} fails in $package, and should: ${must:-nothing}" "$log"
        fi
    fi
    git -C "$copy" apply --reverse "$patch"
done
[ -z "$failed" ] || { echo "not proved:$failed" >&2; exit 1; }
