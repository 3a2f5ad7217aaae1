#!/bin/sh
# A Docker engine for as long as a build runs, on a machine that has none.
#
#   eval "$(infra/docker-engine.sh start)"   uses the engine that answers; else starts one, installed from Debian's packages if need be
#   infra/docker-engine.sh stop              stops the one that `start` started
#
# The engine that is started has a socket, a data folder and a log of its own, beside those of an engine of the system. `start` prints the
# DOCKER_HOST to use on stdout, and everything for people on stderr. The data folder stays, so that an image is built once.
set -eu

run=/run/oversold-engine
data=/var/lib/oversold-engine
host=unix://$run/docker.sock

say() { echo "docker-engine: $*" >&2; }
fail() { say "$*"; exit 1; }

answers() { docker ${1:+-H "$1"} version >/dev/null 2>&1; }

# The pid of the engine that was started here, if it is still that engine.
engine_pid() {
    [ -s "$run/dockerd.pid" ] || return 1
    pid=$(cat "$run/dockerd.pid")
    case $(ps -o args= -p "$pid") in *"$run"*) echo "$pid" ;; *) return 1 ;; esac
}

start() {
    if answers "$("${0%/*}/docker-host.sh")"; then
        say "an engine answers already"
        return
    fi
    if ! answers "$host"; then
        [ "$(id -u)" = 0 ] || fail "no engine answers; starting one takes root"
        install_engine
        # --exec-root and a pid file of its own keep it apart from an engine of the system.
        mkdir -p "$run" "$data"
        # Of an engine that died here, the policy of before is there already.
        [ -s "$run/forward" ] || iptables -S FORWARD 2>/dev/null | sed -n 's/^-P FORWARD //p' >"$run/forward" || true
        say "starting dockerd; its log is $run/log"
        setsid dockerd -H "$host" --data-root "$data" --exec-root "$run/exec" --pidfile "$run/dockerd.pid" \
            >"$run/log" 2>&1 </dev/null &
        tries=0
        until answers "$host"; do
            tries=$((tries + 1))
            if [ "$tries" -gt 300 ] || { [ "$tries" -gt 5 ] && ! engine_pid >/dev/null; }; then
                tail -n 20 "$run/log" >&2
                fail "dockerd does not answer"
            fi
            sleep 0.2
        done
    fi
    say "an engine answers at $host"
    echo "export DOCKER_HOST=$host"
}

install_engine() {
    missing=
    command -v dockerd >/dev/null && command -v docker >/dev/null || missing=docker.io
    command -v iptables >/dev/null || missing="$missing iptables"
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || fail "install a Docker engine: there is no apt-get here to do it with"
    say "installing with apt-get:" $missing
    apt-get update -qq >&2
    # shellcheck disable=SC2086 # one word for each package
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $missing >&2
}

stop() {
    pid=$(engine_pid) || { say "there is none to stop"; return; }
    # The reaper of a run that has just ended needs it to remove the run's containers.
    tries=0
    while [ "$tries" -lt 100 ] && [ -n "$(docker -H "$host" container ls --all --quiet --filter name=oversold-)" ]; do
        tries=$((tries + 1))
        sleep 0.2
    done
    say "stopping dockerd"
    kill -s TERM "$pid"
    tries=0
    while engine_pid >/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -le 150 ] || fail "dockerd (pid $pid) does not end"
        sleep 0.2
    done
    # The network namespaces of its containers may still be mounted there.
    mount -t nsfs | awk -v run="$run/" 'index($3, run) == 1 { print $3 }' | xargs -r umount
    # Its rules all name it, as those of another engine would. It had also set what becomes of a packet to forward that no rule names.
    # (The one that has just ended may still be a zombie.)
    if ! ps -eo stat=,comm= | grep -q '^[^Z].* dockerd$'; then
        iptables-save | grep -vi docker | iptables-restore
        [ ! -s "$run/forward" ] || iptables -P FORWARD "$(cat "$run/forward")"
    fi
    rm -rf "$run"
}

case ${1:-} in
start) start ;;
stop) stop ;;
*) echo "usage: $0 start|stop" >&2; exit 2 ;;
esac
