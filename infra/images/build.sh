#!/bin/sh
# Builds the images of the backends on a machine that can't pull them: no registry is needed, only a Debian mirror and a Docker engine;
# for Kafka also Maven, which fetches its jars.
#
#   infra/images/build.sh [postgres|redis|kafka…]  all of them unless named
#
# Prints the lines to run in the shell, so that the suite uses them:
#   eval "$(infra/images/build.sh)"
# What is there already, and was built from the same files, is not built again. OVERSOLD_DEBIAN_MIRROR names another mirror.
set -eu
cd "$(dirname "$0")"

all="postgres redis kafka"
base=oversold/debian:bookworm
# Without one, debootstrap takes its own default.
mirror=${OVERSOLD_DEBIAN_MIRROR:-}

say() { echo "build: $*" >&2; }
fail() { say "$*"; exit 1; }

have() { docker image inspect "$1" >/dev/null 2>&1; }

build_base() {
    ! have "$base" || return 0
    [ "$(id -u)" = 0 ] || fail "the first build makes a base image with debootstrap, which takes root"
    missing=
    command -v debootstrap >/dev/null || missing=debootstrap
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || missing="$missing debian-archive-keyring"
    if [ -n "$missing" ]; then
        command -v apt-get >/dev/null || fail "debootstrap is needed, and there is no apt-get here to install it with"
        say "installing with apt-get:" $missing
        apt-get update -qq >&2
        # shellcheck disable=SC2086 # one word for each package
        DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $missing >&2
    fi
    say "making $base with debootstrap"
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase bookworm "$root" ${mirror:+"$mirror"} >"$root.log" 2>&1 || { tail -n 20 "$root.log" >&2; fail "debootstrap failed"; }
    rm -rf "$root.log" "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
    tar -C "$root" -c . | docker import - "$base" >/dev/null
    rm -rf "$root"
    trap - EXIT
}

# What an image is made from besides the files of its folder.
besides() { [ "$1" != kafka ] || echo ../kafka/pom.xml; }

build() {
    image=oversold/$1:local
    made_from=$(cat "$1"/* $(besides "$1") | cksum | tr ' ' -)
    if [ "$(docker image inspect --format '{{index .Config.Labels "oversold.made-from"}}' "$image" 2>/dev/null)" != "$made_from" ]; then
        build_base
        context=$1
        if [ "$1" = kafka ]; then
            jars=$(../kafka/fetch.sh) || fail "OVERSOLD_BACKENDS=native infra/setup.sh kafka installs what it takes"
            context=$(mktemp -d)
            trap 'rm -rf "$context"' EXIT
            cp kafka/* "$context"
            cp -R "$jars" "$context/jars"
        fi
        say "building $image"
        # The legacy builder does all that is needed, and is there with every engine. The network of the host reaches what the host reaches.
        DOCKER_BUILDKIT=0 docker build --network host --label "oversold.made-from=$made_from" --tag "$image" "$context" >&2
        [ "$context" = "$1" ] || rm -rf "$context"
        trap - EXIT
    fi
    echo "export OVERSOLD_$(echo "$1" | tr '[:lower:]' '[:upper:]')_IMAGE=$image"
}

DOCKER_HOST=$(../docker-host.sh)
export DOCKER_HOST
docker version >/dev/null 2>&1 || fail "no Docker engine answers"
[ $# -gt 0 ] || set -- $all
for name; do
    [ -f "$name/Dockerfile" ] || fail "there is no image $name; there are: $all"
done
for name; do
    build "$name"
done
