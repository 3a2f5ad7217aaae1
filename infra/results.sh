#!/usr/bin/env bash
# Measures everything that the book says in figures: about 12 minutes on two cores, after the build. Nothing else may run beside it.
#
#   infra/results.sh              into results/, in release
#   infra/results.sh --list       says the names of the result files, and measures nothing
#   infra/results.sh --try DIR    one short round of each in a debug build, into DIR: shows that the commands work, and measures nothing
set -euo pipefail
cd "$(dirname "$0")/.."

folder=results
profile=release
list=
rush=(--rounds 5)
bench=(--seconds 2 --rounds 3)
pools=(--pools 1,2,4,8,64 --seconds 1 --rounds 3)
waiters=(--waiters 1000)
locked_backlog=(--drain 3000 --rounds 3)
backlog=(--drain 100000 --rounds 3)
paid_backlog=(--drain 20000 --rounds 3)
case ${1:-} in
--list) list=yes ;;
--try)
    folder=$2
    profile=dev
    rush=(--rounds 1)
    bench=(--seconds 1 --rounds 1)
    pools=(--pools 1,2 --seconds 1 --rounds 1)
    waiters=(--waiters 100 --rounds 1)
    locked_backlog=(--drain 100 --rounds 1)
    backlog=(--drain 2000 --rounds 1)
    paid_backlog=(--drain 200 --rounds 1)
    ;;
esac

began=$SECONDS
# measure NAME WORDS…: what `oversold WORDS…` writes to NAME.json
measure() {
    local name=$1
    shift
    if [ -n "$list" ]; then
        echo "$name"
        return
    fi
    echo "=== $((SECONDS - began)) s: $name ==="
    cargo run --quiet --profile "$profile" --package oversold -- "$@" --json "$folder/$name.json"
}

# All strategies in one run, with the same buyers, clicks and tickets: they take turns in each round, so other load affects them alike.
measure road rush --clicks 2 "${rush[@]}"
measure road-3 rush --clicks 2 --instances 3 "${rush[@]}"
# LV.1 as `make rush LEVEL=lv1` runs it, and one click for each buyer elsewhere.
measure lv1-rush rush lv1 "${rush[@]}"
measure lv2-rush-once rush lv2 --clicks 1 "${rush[@]}"
measure lv3-rush-3-once rush lv3 --clicks 1 --instances 3 "${rush[@]}"
measure lv4-rush-once rush lv4 --clicks 1 "${rush[@]}"

for strategy in mutex pessimistic optimistic conditional-update; do
    measure "lv2-bench-$strategy" bench "lv2/$strategy" "${bench[@]}"
done
for strategy in pessimistic conditional-update; do
    measure "lv2-pools-$strategy" bench "lv2/$strategy" "${pools[@]}"
done
for strategy in spin rlock fenced; do
    measure "lv3-bench-$strategy" bench "lv3/$strategy" "${bench[@]}"
    measure "lv3-waiters-$strategy" bench "lv3/$strategy" "${waiters[@]}"
    measure "lv3-waiters-3-$strategy" bench "lv3/$strategy" "${waiters[@]}" --instances 3
done
measure lv3-lock bench lv3/rlock --lock "${bench[@]}"
for strategy in locked single-writer; do
    measure "lv4-accept-$strategy" bench "lv4/$strategy" "${bench[@]}"
done
measure lv4-drain-locked bench lv4/locked "${locked_backlog[@]}"
measure lv4-drain-single-writer bench lv4/single-writer "${backlog[@]}"
measure lv4-payments bench lv4/single-writer --payments approve=100 "${paid_backlog[@]}"
[ -n "$list" ] || echo "=== $((SECONDS - began)) s: all measured ==="
