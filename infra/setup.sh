#!/bin/sh
# Sees to it that there is a Postgres to be had, in the order in which the suite looks for one. `make rush` and `make test` run it first.
# What it installs it says before it does; with nothing to install it says nothing.
set -eu

say() { echo "setup: $*" >&2; }

image=${OVERSOLD_POSTGRES_IMAGE:-postgres:17-alpine}
forced=${OVERSOLD_BACKENDS:-}

native() {
    if [ -n "${OVERSOLD_POSTGRES_BIN:-}" ]; then
        [ -x "$OVERSOLD_POSTGRES_BIN/initdb" ]
        return
    fi
    command -v initdb >/dev/null && return
    for initdb in /usr/lib/postgresql/*/bin/initdb /usr/pgsql-*/bin/initdb /opt/homebrew/opt/postgresql*/bin/initdb \
        /usr/local/opt/postgresql*/bin/initdb /Applications/Postgres.app/Contents/Versions/*/bin/initdb; do
        [ ! -x "$initdb" ] || return 0
    done
    return 1
}

engine() { command -v docker >/dev/null && docker version >/dev/null 2>&1; }

has_image() { docker image inspect "$image" >/dev/null 2>&1; }

install_native() {
    command -v apt-get >/dev/null || return 1
    sudo=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || return 1
        sudo=sudo
    fi
    say "installing Postgres with apt-get${sudo:+, with sudo}: package postgresql, about 80 MB to download. No server is left running"
    # The package would make a database cluster of its own and start it. Nobody here needs that one.
    rule=/etc/postgresql-common/createcluster.d/oversold.conf
    trap '$sudo rm -f "$rule"' EXIT
    $sudo mkdir -p "${rule%/*}" &&
        echo "create_main_cluster = false" | $sudo tee "$rule" >/dev/null &&
        $sudo apt-get update -qq >&2 &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends postgresql >&2
}

what_to_run() {
    say "there is no Postgres, and none can be installed from here. Do one of these:"
    case $(uname -s) in
    Darwin) say "  brew install postgresql@17" ;;
    *)
        if command -v apt-get >/dev/null; then
            say "  apt-get install postgresql           (as root)"
        elif command -v dnf >/dev/null; then
            say "  sudo dnf install postgresql-server"
        elif command -v pacman >/dev/null; then
            say "  sudo pacman -S postgresql"
        else
            say "  install Postgres with your package manager, or name the folder of initdb and postgres in OVERSOLD_POSTGRES_BIN"
        fi
        ;;
    esac
    say "  start a Docker engine                 (the image $image is pulled)"
    say "  export DATABASE_URL=postgres://user:password@host:5432/name"
    exit 1
}

case $forced in
"")
    [ -z "${DATABASE_URL:-}" ] || exit 0
    if engine && has_image; then exit 0; fi
    if native; then exit 0; fi
    if engine; then
        say "pulling the image $image"
        if docker pull --quiet "$image" >&2; then exit 0; fi
        say "it can't be pulled, so Postgres is needed on this machine itself"
    fi
    install_native || what_to_run
    ;;
native)
    native || install_native || what_to_run
    ;;
docker)
    engine || { say "OVERSOLD_BACKENDS is \`docker\`, and no Docker engine answers: start one"; exit 1; }
    has_image || { say "pulling the image $image"; docker pull --quiet "$image" >&2; } || {
        say "it can't be pulled; infra/images/build.sh builds one without a registry"
        exit 1
    }
    ;;
*)
    say "OVERSOLD_BACKENDS is \`$forced\`; it takes \`docker\` or \`native\`"
    exit 2
    ;;
esac
