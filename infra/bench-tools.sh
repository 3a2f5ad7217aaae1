#!/bin/sh
# Sees to it that there is what `oversold bench` measures with: wrk, which sends its load, and redis-benchmark, the ceiling of a lock.
# `make bench` runs it first. What it installs it says before it does; with nothing to install it says nothing. pgbench comes with Postgres.
set -eu

say() { echo "setup: $*" >&2; }

# A tool, its package for apt-get and for brew, and the megabytes to download.
see_to() {
    tool=$1 apt=$2 brew=$3 megabytes=$4
    if command -v "$tool" >/dev/null; then return; fi
    if command -v apt-get >/dev/null; then
        sudo=
        if [ "$(id -u)" != 0 ]; then
            sudo=sudo
            command -v sudo >/dev/null || { say "there is no $tool. As root: apt-get install $apt"; exit 3; }
        fi
        say "installing $tool with apt-get${sudo:+, with sudo}: package $apt, about $megabytes MB to download"
        $sudo apt-get update -qq >&2
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "$apt" >&2
    elif [ "$(uname -s)" = Darwin ]; then
        say "there is no $tool. Do this: brew install $brew"
        exit 3
    else
        say "there is no $tool; install it with your package manager"
        exit 3
    fi
}

see_to wrk wrk wrk 1
see_to redis-benchmark redis-tools redis 1
