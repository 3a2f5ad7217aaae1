#!/bin/sh
# Builds the images of the backends on a machine that can't pull them: no registry is needed, only a Debian mirror and a Docker engine;
# for Kafka also Maven, which fetches its jars.
#
#   infra/images/build.sh [NAME…]   postgres, redis and kafka unless named; for the stand also nginx, prometheus and levels: the servers that
#                                   cargo has built here, from target/debug, or from the folder that OVERSOLD_PREBUILT names
#
# Prints the lines to run in the shell, so that the suite uses them:
#   eval "$(infra/images/build.sh)"
# What is there already, and was built from the same files, is not built again. OVERSOLD_DEBIAN_MIRROR names another mirror.
set -eu
cd "$(dirname "$0")"

all="postgres redis kafka"
stand="nginx prometheus levels"
servers="lv1-race-condition lv2-db-lock lv3-redis-lock lv4-kafka payment-service"
base=oversold/debian:bookworm
# Without one, debootstrap takes its own default.
mirror=${OVERSOLD_DEBIAN_MIRROR:-}

say() { echo "build: $*" >&2; }
fail() { say "$*"; exit 1; }

have() { docker image inspect "$1" >/dev/null 2>&1; }
bytes() { docker image inspect --format '{{.Size}}' "$1"; }

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

# The files that an image is made from.
sources() {
    case $1 in
    kafka) ls kafka/* ../kafka/pom.xml ;;
    levels)
        echo "$levels"
        for server in $servers; do echo "$prebuilt/$server"; done
        ;;
    *) ls "$1"/* ;;
    esac
}

build() {
    image=oversold/$1:local
    # shellcheck disable=SC2046 # one word for each file
    made_from=$(cat $(sources "$1") | cksum | tr ' ' -)
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
        arguments=
        if [ "$1" = levels ]; then
            context=$(mktemp -d)
            trap 'rm -rf "$context"' EXIT
            mkdir "$context/prebuilt"
            (cd "$prebuilt" && install --strip $servers "$context/prebuilt/")
            cp "$levels" "$context/Dockerfile"
            arguments="--build-arg RUST_IMAGE=$base --build-arg BASE_IMAGE=$base"
        fi
        say "building $image"
        # The legacy builder does all that is needed, and is there with every engine. The network of the host reaches what the host reaches.
        # shellcheck disable=SC2086 # one word for each argument
        DOCKER_BUILDKIT=0 docker build --network host --label "oversold.made-from=$made_from" $arguments --tag "$image" "$context" >&2
        [ "$context" = "$1" ] || rm -rf "$context"
        trap - EXIT
        say "$image: $((($(bytes "$image") - $(bytes "$base")) / 1048576)) MiB over its base"
    fi
    echo "export OVERSOLD_$(echo "$1" | tr '[:lower:]' '[:upper:]')_IMAGE=$image"
}

DOCKER_HOST=$(../docker-host.sh)
export DOCKER_HOST
docker version >/dev/null 2>&1 || fail "no Docker engine answers"
levels=../stand/Dockerfile
prebuilt=${OVERSOLD_PREBUILT:-${CARGO_TARGET_DIR:-../../target}/debug}
[ $# -gt 0 ] || set -- $all
for name; do
    case " $all $stand " in *" $name "*) ;; *) fail "there is no image $name; there are: $all $stand" ;; esac
    if [ "$name" = levels ]; then
        for server in $servers; do
            [ -x "$prebuilt/$server" ] || fail "$prebuilt/$server is not built: cargo build --workspace --bins"
        done
    fi
done
for name; do
    build "$name"
done
