#!/bin/sh
# Sees to it that there is wrk, which sends the load of `oversold bench`. `make bench` runs it first.
# What it installs it says before it does; with nothing to install it says nothing. pgbench comes with Postgres.
set -eu

say() { echo "setup: $*" >&2; }

if command -v wrk >/dev/null; then exit 0; fi

if command -v apt-get >/dev/null; then
    sudo=
    if [ "$(id -u)" != 0 ]; then
        sudo=sudo
        command -v sudo >/dev/null || { say "there is no wrk. As root: apt-get install wrk"; exit 3; }
    fi
    say "installing wrk with apt-get${sudo:+, with sudo}: package wrk, under 1 MB to download"
    $sudo apt-get update -qq >&2
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends wrk >&2
elif [ "$(uname -s)" = Darwin ]; then
    say "there is no wrk. Do this: brew install wrk"
    exit 3
else
    say "there is no wrk; install it with your package manager"
    exit 3
fi
