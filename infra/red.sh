#!/bin/sh
# Runs the contract test of a level as if every strategy had to keep everything, and shows how it fails. That is what it is for, so a
# test that fails is a success here.
#
#   infra/red.sh PACKAGE [STRATEGY]
set -eu

package=$1 strategy=${2:-}
target=$(echo "$package" | tr - _)
name=$(basename "$strategy" | tr - _)

run() { OVERSOLD_RED=1 RUST_BACKTRACE=0 cargo test --quiet --package "$package" --test "$target" -- "$@"; }

# On one instance: the same on three adds nothing to see.
tests=$(run --list --format terse | sed -n 's/: test$//p' | grep '^a_sale_keeps_its_guarantee::' | grep -v '_on_three$') || true
[ -z "$name" ] || tests=$(echo "$tests" | grep "_$name\$") || {
    echo "The contract of $package has no case for the strategy $strategy." >&2
    exit 2
}
# shellcheck disable=SC2086 # one word for each test
if run --exact $tests; then
    echo "Nothing is red: this strategy keeps the contract."
else
    echo "Red, and meant to be: the contract asks for more than this strategy keeps. Its verdict, and how it came about, stand above."
fi
