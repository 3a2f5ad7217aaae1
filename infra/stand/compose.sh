#!/bin/sh
# Starts and stops what docker-compose.yml describes. `make up`, `make down` and `make clean` run it.
#
#   infra/stand/compose.sh up             the services alone, published on 127.0.0.1
#   infra/stand/compose.sh up LEVEL       the stand of a level; STRATEGY names one of its strategies, GRAFANA=no leaves out Grafana and
#                                         the exporters
#   infra/stand/compose.sh down           stops and removes everything but the volumes
#   infra/stand/compose.sh clean          the volumes, too
#
# Images are pulled, and that of the levels is built; OVERSOLD_LEVELS_IMAGE and the like name others (infra/images/build.sh).
set -eu
cd "$(dirname "$0")/../.."

say() { echo "stand: $*" >&2; }
fail() { say "$*"; exit 3; }

DOCKER_HOST=$(infra/docker-host.sh)
export DOCKER_HOST
levels="lv1 lv2 lv3 lv4"

compose() {
    if [ "$compose" = plugin ]; then docker compose "$@"; else docker-compose "$@"; fi
}

# The stand takes no override file: it publishes no service.
stand() { compose --file docker-compose.yml "$@"; }

find_compose() {
    command -v docker >/dev/null || fail "there is no docker. Install it, or use \`cargo run -p oversold -- stand\`, which needs no containers"
    docker version >/dev/null 2>&1 || fail "no Docker engine answers. Start one, or use \`cargo run -p oversold -- stand\`, which needs none"
    if version=$(docker compose version --short 2>/dev/null); then
        compose=plugin
    elif version=$(docker-compose version --short 2>/dev/null); then
        compose=program
    else
        fail "there is no Docker Compose. Install it: apt-get install docker-compose, or docs.docker.com/compose/install"
    fi
    version=${version#v}
    case $version in
    1.29* | [2-9].* | [1-9][0-9].*) ;;
    *) fail "Docker Compose is version $version, and has to be 1.29 or newer" ;;
    esac
}

# A stand that swaps measures the disk.
enough_memory() {
    needed=3
    memory=$(docker info --format '{{.MemTotal}}')
    [ "$memory" -ge $((needed * 1000 * 1000 * 1000)) ] ||
        fail "the engine has $((memory / 1000 / 1000)) MB of memory, and the stand takes $needed GB. Give it more, or start the services alone: make up"
}

write_env() {
    [ ! -e .env ] || return 0
    secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
    token=$(secret)
    password=$(secret)
    [ ${#token} -eq 48 ] && [ ${#password} -eq 48 ] || fail "no secrets could be made from /dev/urandom"
    (
        umask 077
        sed "s/^OVERSOLD_ADMIN_TOKEN=\$/&$token/; s/^OVERSOLD_POSTGRES_PASSWORD=\$/&$password/" .env.example >.env.new
        mv .env.new .env
    )
    say "wrote .env, with an admin token and a password for Postgres"
}

build_levels() {
    [ -z "${OVERSOLD_LEVELS_IMAGE:-}" ] || return 0
    say "building oversold/levels: about ten minutes on two cores for the first time, seconds if nothing has changed"
    docker build --quiet --file infra/stand/Dockerfile --tag oversold/levels . >/dev/null
}

# A setting, from the environment or from .env.
setting() {
    eval "value=\${$1:-}"
    [ -n "$value" ] || [ ! -e .env ] || value=$(sed -n "s/^$1=//p" .env)
    echo "${value:-$2}"
}

# Runs what starts containers, and shows what Compose says. Fails with one clear line if a port is taken.
start() {
    log=$(mktemp)
    # The status of a pipe is that of tee.
    code=$({ { "$@" 2>&1 && echo 0 >&3 || echo 1 >&3; } | tee "$log" >&2; } 3>&1)
    port=$(sed -n 's/.*127\.0\.0\.1:\([0-9]*\).*\(address already in use\|port is already allocated\).*/\1/p' "$log" | head -n 1)
    rm -f "$log"
    [ "$code" != 0 ] || return 0
    [ -z "$port" ] || fail "port $port is taken. Stop what listens there, or choose another in .env (OVERSOLD_…_PORT)"
    return 1
}

up() {
    find_compose
    if [ -z "$1" ]; then
        # Version 1 has no --wait.
        wait=
        [ "$compose" = program ] || wait=--wait
        # shellcheck disable=SC2086 # one word or none
        start compose up --detach $wait || fail "they did not start. \`docker compose logs\` shows more"
        echo "export DATABASE_URL=postgres://oversold:oversold@127.0.0.1:$(setting OVERSOLD_POSTGRES_PORT 5432)/oversold"
        echo "export REDIS_URL=redis://127.0.0.1:$(setting OVERSOLD_REDIS_PORT 6379)/0"
        echo "export KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:$(setting OVERSOLD_KAFKA_PORT 9092)"
        return
    fi
    level=$1
    case " $levels " in *" $level "*) ;; *) fail "there is no level $level; there are $levels" ;; esac
    enough_memory
    write_env
    build_levels
    # No payments without a ticket that is held.
    if [ "${STRATEGY:-}" = locked ]; then
        export PAYMENT_URL=
    fi
    services="$level-nginx prometheus"
    if [ "${GRAFANA:-}" != no ]; then
        services="$services grafana postgres-exporter node-exporter"
        case $level in lv3 | lv4) services="$services redis-exporter" ;; esac
    fi
    # Of another level or strategy, which would serve beside this one.
    stop_levels
    # shellcheck disable=SC2086 # one word for each service
    if ! start stand --profile "$level" up --detach $services; then
        stand --profile "$level" logs --no-color --tail 3 "$level-migrate" >&2
        fail "it did not start. \`docker compose --profile $level logs\` shows more"
    fi
    for service in $services; do
        case $service in *-exporter) ;; *) wait_for "$service" ;; esac
    done
    echo "buyers      http://127.0.0.1:$(setting OVERSOLD_NGINX_PORT 8080)"
    [ "${GRAFANA:-}" = no ] || echo "Grafana     http://127.0.0.1:$(setting OVERSOLD_GRAFANA_PORT 3001)"
    echo "Prometheus  http://127.0.0.1:$(setting OVERSOLD_PROMETHEUS_PORT 9090)"
    echo "The admin token is in .env: OVERSOLD_ADMIN_TOKEN."
}

wait_for() {
    container=$(stand --profile "$level" ps --quiet "$1")
    tries=0
    until [ "$(docker inspect --format '{{.State.Health.Status}}' "$container")" = healthy ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 120 ] || fail "$1 is not healthy after a minute. \`docker compose --profile $level logs $1\` says why"
        sleep 0.5
    done
}

# Every profile, as Compose ignores the containers of others; and the override, which declares the volume of the services alone.
all() {
    # shellcheck disable=SC2046 # one word for each
    compose $(for level in $levels; do echo --profile "$level"; done) "$@"
}

stop_levels() {
    running=$(all ps --services 2>/dev/null | grep -E '^(lv[1-4]-|payment-service)' || true)
    # shellcheck disable=SC2086 # one word for each service
    [ -z "$running" ] || all rm --stop --force $running >/dev/null 2>&1
}

case ${1:-} in
up) up "${2:-}" ;;
down) find_compose && all down --remove-orphans ;;
clean) find_compose && all down --remove-orphans --volumes ;;
*) echo "usage: $0 up [LEVEL] | down | clean" >&2; exit 2 ;;
esac
