#!/bin/sh
# Sends the rush to a server of a level, or of one strategy, with Goose and then with k6: load/run.sh LEVEL[/STRATEGY] [ARGUMENTS…]
# `make load` runs it. With --payments approve=90,decline=8,hang=2 a payment service runs beside the server. Exit code: 0 only if every guarantee that should hold held, and what should break was seen to; see `load --help`.
set -eu
cd "$(dirname "$0")/.."

[ $# -gt 0 ] || { echo "load/run.sh takes a level or a strategy: load/run.sh lv1/read-then-write"; exit 2; }
infra/target-folder.sh
[ -x target/tools/bin/k6 ] || make --no-print-directory target/tools/bin/k6
cargo build --quiet --package oversold
cargo build --quiet --package load
# What it starts goes with it, however it ends.
exec "${CARGO_TARGET_DIR:-target}/debug/load" rush "$@"
