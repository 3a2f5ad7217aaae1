#!/bin/sh
# Sees to it that there is what single tests and the stand need, and that is no backend: pgbouncer, the connection pooler; nginx;
# Prometheus and its exporters; Docker Compose; and for the live page Chromium, Node and the packages of npm in tests/live, which go to
# target/tools/live.
#
#   infra/test-tools.sh [NAME…]   all of them unless named: pgbouncer, nginx, prometheus, prometheus-…-exporter, docker-compose, live
#
# `.ci/run` runs it first. What it installs it says before it does; with nothing to install it says nothing. k6 is built by `make load`.
set -eu
cd "$(dirname "$0")/.."

say() { echo "setup: $*" >&2; }

all="pgbouncer nginx prometheus prometheus-node-exporter prometheus-postgres-exporter prometheus-redis-exporter docker-compose live"
# shellcheck disable=SC2086 # one word for each
[ $# -gt 0 ] || set -- $all
missing='' megabytes=0 live=
# add PACKAGE MEGABYTES COMMAND…: unless one of the commands is here
add() {
    package=$1 size=$2
    shift 2
    for command; do
        if command -v "$command" >/dev/null || [ -x "/usr/sbin/$command" ]; then return; fi
    done
    missing="${missing:+$missing }$package" megabytes=$((megabytes + size))
}
for tool; do
    case $tool in
    pgbouncer | nginx) add "$tool" 1 "$tool" ;;
    prometheus) add prometheus 25 prometheus ;;
    prometheus-*-exporter) add "$tool" 4 "$tool" ;;
    docker-compose)
        # As a plugin it is newer.
        docker compose version >/dev/null 2>&1 || add docker-compose 10 docker-compose
        ;;
    live)
        live=yes
        add chromium 100 chromium chromium-browser google-chrome
        add nodejs 15 node
        add npm 5 npm
        ;;
    *)
        say "there is no tool $tool; there are $all"
        exit 2
        ;;
    esac
done

if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null; then
        say "missing: $missing. Install what is missing with your package manager"
        exit 3
    fi
    sudo=
    if [ "$(id -u)" != 0 ]; then
        sudo=sudo
        command -v sudo >/dev/null || { say "missing: $missing. As root: apt-get install $missing"; exit 3; }
    fi
    say "installing with apt-get${sudo:+, with sudo}: $missing, about $megabytes MB to download. No server is left running"
    # The packages of servers would start one each at once, which policy-rc.d forbids, and again with every start of the machine.
    rule=
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        rule=/usr/sbin/policy-rc.d
        trap '$sudo rm -f "$rule"' EXIT
        printf '#!/bin/sh\nexit 101\n' | $sudo tee "$rule" >/dev/null
        $sudo chmod 755 "$rule"
    fi
    $sudo apt-get update -qq >&2
    # shellcheck disable=SC2086 # one word for each package
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $missing >&2
    for package in $missing; do
        case $package in
        pgbouncer | nginx | prometheus*) $sudo update-rc.d "$package" disable >&2 || say "$package may start with this machine" ;;
        esac
    done
fi

tools=target/tools/live
if [ -n "$live" ] && ! cmp -s tests/live/package-lock.json "$tools/installed"; then
    say "installing puppeteer-core and axe-core with npm into $tools, about 10 MB to download"
    mkdir -p "$tools"
    cp tests/live/package.json tests/live/package-lock.json "$tools/"
    npm ci --prefix "$tools" --ignore-scripts --no-audit --no-fund --loglevel=error >&2
    cp tests/live/package-lock.json "$tools/installed"
fi
