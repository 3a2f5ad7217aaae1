#!/bin/sh
# Runs the contract test of a level as if every strategy had to keep everything, and shows how it fails. That is what it is for, so a
# test that fails is a success here. What cargo and the test runner say around it is left out.
#
#   infra/red.sh PACKAGE [STRATEGY]
set -eu
cd "$(dirname "$0")/.."

package=$1 strategy=${2:-}
target=${package%%-*}
file=tests/$target/contract.rs
[ -e "$file" ] || file=tests/$target/main.rs
log=$(mktemp)
trap 'rm -f "$log"' EXIT

run() { OVERSOLD_RED=1 RUST_BACKTRACE=0 cargo test --quiet --package "$package" --test "$target" -- "$@"; }

# A case of the contract's table gives the strategy its name: case NAME, strategy, instances, promises. The first of each: the same on another
# number of instances adds nothing to see. The contract's test is called a_sale_keeps_its_guarantee; one that asks for it in one exact order, that and more.
cases() { sed -n 's|^#\[case::\([a-z0-9_]*\)("\([a-z/-]*\)", [0-9]*, [A-Z].*|\1 \2|p' "$file" | awk '!seen[$2]++'; }

listed=$(run --list --format terse) # builds it too, so errors of the compiler are seen here
tests=$(cases | while read -r case name; do
    [ -n "$strategy" ] && [ "$name" != "$strategy" ] ||
        echo "$listed" | sed -n "s/^\(\(contract::\)\{0,1\}a_sale_keeps_its_guarantee[a-z_]*::case_[0-9]*_$case\): test\$/\1/p"
done)
if [ -z "$tests" ]; then
    echo "The contract of $package has no case for the strategy $strategy. It has:" >&2
    cases | sed 's/.* /    /' >&2
    exit 2
fi

# shellcheck disable=SC2086 # one word for each test
run --exact $tests >"$log" 2>&1 || true
awk '
    /^---- .* stdout ----$/ { print "test " $2 " ... FAILED"; next }
    / panicked at / { shown = 1; next }
    /^note: run with/ || /^failures:$/ { shown = 0 }
    shown
    /^test result: / { sub(/; 0 ignored.*/, ""); print }
' "$log"
echo
if grep -q '^test result: ok' "$log"; then
    echo "Nothing is red: this keeps the contract."
elif grep -q ': guarantee broken: ' "$log"; then
    echo "Red, and meant to be: the contract asks for more than is kept here. What broke, and how it came about, stands above."
else
    echo "This failed, but not as it is meant to:" >&2
    cat "$log" >&2
    exit 1
fi
