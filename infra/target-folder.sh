#!/bin/sh
# Says so in one line if Kafka's client can't be built where cargo would build it: it is a C library, and its configure script takes no path
# with a space in it.
set -eu

target=${CARGO_TARGET_DIR:-${CARGO_BUILD_TARGET_DIR:-target}}
case $target in
/*) ;;
*) target=$(cd "${0%/*}/.." && pwd)/$target ;;
esac
case $target in *[[:space:]]*) ;; *) exit ;; esac
elsewhere=${HOME:-/var/tmp}/.cache
case $elsewhere in *[[:space:]]*) elsewhere=/var/tmp ;; esac
echo "setup: Kafka's client can't be built in \`$target\`, which has a space in it. Do this: export CARGO_TARGET_DIR=$elsewhere/oversold-target" >&2
exit 1
