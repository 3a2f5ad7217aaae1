#!/bin/sh
# Runs every test alone, in a process and on backends of its own: what passes only after another test fails here. By hand; it takes a while.
#
#   infra/isolated-tests.sh [-t SECONDS] PACKAGE… [-- FILTER]      such as: infra/isolated-tests.sh lv3-redis-lock -- lock::
set -eu

# A test that takes longer than this has failed.
limit=120
if [ "${1:-}" = -t ]; then limit=${2:?how many seconds}; shift 2; fi
case $limit in "" | 0 | *[!0-9]*) echo "isolated-tests: -t takes a number of seconds, not \`$limit\`" >&2; exit 2 ;; esac
packages= filter=
while [ $# != 0 ]; do
    if [ "$1" = -- ]; then filter=${2:-}; break; fi
    packages="$packages $1"
    shift
done
[ -n "$packages" ] || { echo "isolated-tests: it takes packages, such as lv3-redis-lock" >&2; exit 2; }
# A test that is run alone must not find a server that another one has used.
unset DATABASE_URL REDIS_URL KAFKA_BOOTSTRAP_SERVERS
logs=$(mktemp -d)

passed=0 ignored=0 failed=0
for package in $packages; do
    # Each test program, by its name in the line `Executable tests/lv3/main.rs (target/debug/deps/lv3-…)`.
    cargo test --package "$package" --no-run 2>"$logs/build" || { cat "$logs/build"; exit 1; }
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p' "$logs/build" >"$logs/programs"
    while read -r program; do
        "$program" --list --format terse | sed -n 's/: test$//p' | grep -F -- "$filter" >"$logs/tests" || true
        while read -r test; do
            started=$(date +%s)
            code=0
            timeout -k 10 "$limit" "$program" --exact "$test" >"$logs/log" 2>&1 </dev/null || code=$?
            took=$(($(date +%s) - started))
            if [ "$code" = 0 ] && grep -q '^test result: ok. 1 passed' "$logs/log"; then
                passed=$((passed + 1))
            elif [ "$code" = 0 ]; then
                ignored=$((ignored + 1))
            else
                failed=$((failed + 1))
                mv "$logs/log" "$logs/failed-$failed"
                [ "$code" != 124 ] || note=", stopped after $limit s"
                echo "FAILED alone after $took s${note:-}: $package $test ($logs/failed-$failed)"
                note=
                grep -A4 'panicked at' "$logs/failed-$failed" | sed 's/^/    /' || true
            fi
        done <"$logs/tests"
    done <"$logs/programs"
done
echo "each alone: $passed passed, $failed failed, $ignored ignored"
[ "$failed" = 0 ] || exit 1
rm -rf "$logs"
