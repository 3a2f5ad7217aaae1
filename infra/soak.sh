#!/bin/sh
# Runs the suite again and again, a line a run, to find what fails once in a while. Every fourth run has one core kept busy by somebody else.
# Looks each time for what a run left behind: processes, folders, containers.
#
#   infra/soak.sh [RUNS [CARGO-TEST-ARGUMENTS…]]
set -eu

runs=${1:-20}
case $runs in "" | 0 | *[!0-9]*) echo "soak: it takes how many runs, not \`$runs\`" >&2; exit 2 ;; esac
[ $# = 0 ] || shift
logs=$(mktemp -d)

# By their arguments: the reapers (oversold-run-…), Postgres and Kafka (their data is in a folder oversold-…), Redis, and servers of a level.
processes() { ps -eo pid=,args= | awk '/oversold[- ]|redis-server|lv[0-9]-[a-z-]+/ && !/awk|infra\/soak\.sh/ { print "process " $0 }'; }
folders() { find "${TMPDIR:-/tmp}" /dev/shm -maxdepth 1 -name 'oversold-*' ! -name 'oversold-pull-failed-*' 2>/dev/null | sed 's/^/folder /'; }
containers() { DOCKER_HOST=$("${0%/*}/docker-host.sh") docker ps --all --filter 'name=^/?oversold-' --format 'container {{.Names}}' 2>/dev/null || true; }
traces() { { processes; folders; containers; } | LC_ALL=C sort; }
left_behind() { LC_ALL=C comm -13 "$logs/before" "$logs/after"; }
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
    # The reaper clears up once the test program has ended, so it is a moment behind it.
    tries=0
    while traces >"$logs/after" && [ -n "$(left_behind)" ] && [ "$tries" -lt 50 ]; do
        tries=$((tries + 1))
        sleep 0.2
    done
    behind=$(left_behind | wc -l)
    printf 'run %2d: %3d s, %s passed, %s failed, %s ignored, %s left behind%s\n' "$run" "$took" \
        "$(sum passed "$logs/$run")" "$(sum failed "$logs/$run")" "$(sum ignored "$logs/$run")" "$behind" "$note"
    if [ "$code" != 0 ]; then
        failed=$((failed + 1))
        grep -E '^test .*FAILED|panicked' "$logs/$run" | sed 's/^/    /' || true
    fi
    if [ "$behind" != 0 ]; then
        left=$((left + 1))
        left_behind | cut -c1-200 | sed 's/^/    left behind: /'
    fi
    run=$((run + 1))
done
echo "$runs runs: $failed failed, $left left something behind"
if [ "$failed" = 0 ] && [ "$left" = 0 ]; then
    rm -rf "$logs"
else
    echo "logs: $logs"
    exit 1
fi
