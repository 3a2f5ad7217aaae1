#!/bin/sh
# Runs the suite again and again, a line a run, to find what fails once in a while. Every fourth run has one core kept busy by somebody else.
# Looks each time for what a run left behind: processes, folders, containers.
#
#   infra/soak.sh [RUNS [CARGO-TEST-ARGUMENTS…]]
set -eu

runs=${1:-20}
[ $# = 0 ] || shift
logs=$(mktemp -d)

processes() { ps -eo pid=,args= | awk '/oversold-run-|lv[0-9]-[a-z-]*$/ && !/awk/ { print $1 }' | sort; }
folders() { find "${TMPDIR:-/tmp}" -maxdepth 1 -name 'oversold-*' 2>/dev/null | sort; }
containers() { docker ps --all --quiet --filter label=oversold 2>/dev/null | sort || true; }
traces() { { processes; folders; containers; } | LC_ALL=C sort; }
sum() { grep -oE "[0-9]+ $1" "$2" | awk '{ n += $1 } END { print n + 0 }'; }

cargo test --no-run --quiet "$@"
failed=0 left=0
run=1
while [ "$run" -le "$runs" ]; do
    busy= note=
    if [ $((run % 4)) = 0 ]; then
        sh -c 'while :; do :; done' &
        busy=$! note=", one core busy"
    fi
    traces >"$logs/before"
    started=$(date +%s)
    code=0
    cargo test --quiet "$@" >"$logs/$run" 2>&1 </dev/null || code=$?
    took=$(($(date +%s) - started))
    [ -z "$busy" ] || kill "$busy"
    # The keeper clears up once the test program has ended, so it is a moment behind it.
    tries=0
    while traces >"$logs/after" && [ -n "$(LC_ALL=C comm -13 "$logs/before" "$logs/after")" ] && [ "$tries" -lt 50 ]; do
        tries=$((tries + 1))
        sleep 0.2
    done
    behind=$(LC_ALL=C comm -13 "$logs/before" "$logs/after" | wc -l)
    printf 'run %2d: %3d s, %s passed, %s failed, %s ignored, %s left behind%s\n' "$run" "$took" \
        "$(sum passed "$logs/$run")" "$(sum failed "$logs/$run")" "$(sum ignored "$logs/$run")" "$behind" "$note"
    if [ "$code" != 0 ]; then
        failed=$((failed + 1))
        grep -E '^test .*FAILED|panicked' "$logs/$run" | sed 's/^/    /' || true
    fi
    [ "$behind" = 0 ] || left=$((left + 1))
    run=$((run + 1))
done
echo "$runs runs: $failed failed, $left left something behind"
if [ "$failed" = 0 ] && [ "$left" = 0 ]; then
    rm -rf "$logs"
else
    echo "logs: $logs"
    exit 1
fi
