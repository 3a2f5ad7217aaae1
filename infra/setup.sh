#!/bin/sh
# Sees to it that there is what a build takes, and that the services are to be had, each in the order in which the suite looks for it.
# `make rush` and `make test` run it first.
#
#   infra/setup.sh [postgres|redis|kafka…]   Postgres unless named
#
# What it installs it says before it does; with nothing to install it says nothing.
set -eu

say() { echo "setup: $*" >&2; }

forced=${OVERSOLD_BACKENDS:-}
case $forced in
"" | native | docker) ;;
*)
    say "OVERSOLD_BACKENDS is \`$forced\`; expected \`docker\` or \`native\`"
    exit 2
    ;;
esac

# What differs between the services.
about() {
    case $1 in
    postgres)
        name=Postgres image=${OVERSOLD_POSTGRES_IMAGE:-postgres:17-alpine} url=${DATABASE_URL:-}
        programs="the folder of initdb and postgres in OVERSOLD_POSTGRES_BIN"
        apt=postgresql megabytes=80 dnf=postgresql-server pacman=postgresql brew=postgresql@17
        example=DATABASE_URL=postgres://user:password@host:5432/name
        ;;
    redis)
        name=Redis image=${OVERSOLD_REDIS_IMAGE:-redis:7-alpine} url=${REDIS_URL:-}
        programs="the folder of redis-server in OVERSOLD_REDIS_BIN"
        apt=redis-server megabytes=2 dnf=redis pacman=redis brew=redis
        example=REDIS_URL=redis://user:password@host:6379/0
        ;;
    kafka)
        name=Kafka image=${OVERSOLD_KAFKA_IMAGE:-apache/kafka-native:4.1.1} url=${KAFKA_BOOTSTRAP_SERVERS:-}
        programs="the folder of its jars in OVERSOLD_KAFKA_JARS"
        apt="default-jre-headless maven" megabytes=90 dnf="java-21-openjdk-headless maven" pacman="jre-openjdk-headless maven" brew="openjdk maven"
        example=KAFKA_BOOTSTRAP_SERVERS=host:9092
        ;;
    tools)
        # Kafka's client is C and C++, and comes with a configure and a Makefile. The suite finds processes with ps.
        name=
        for tool in c++ make ps; do
            command -v "$tool" >/dev/null || name="${name:+$name, }$tool"
        done
        programs= apt="g++ make procps" megabytes=60 dnf="gcc-c++ make procps-ng" pacman="gcc make procps-ng"
        ;;
    *)
        say "there is no service $1; there are postgres, redis and kafka"
        exit 2
        ;;
    esac
}

native_postgres() {
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

native_redis() {
    if [ -n "${OVERSOLD_REDIS_BIN:-}" ]; then
        [ -x "$OVERSOLD_REDIS_BIN/redis-server" ]
        return
    fi
    command -v redis-server >/dev/null || [ -x /opt/homebrew/bin/redis-server ] || [ -x /usr/local/bin/redis-server ]
}

native_kafka() {
    has_java || return 1
    if [ -n "${OVERSOLD_KAFKA_JARS:-}" ]; then
        for jar in "$OVERSOLD_KAFKA_JARS"/kafka_2*.jar; do
            [ ! -e "$jar" ] || return 0
        done
        return 1
    fi
    "${0%/*}/kafka/fetch.sh" --check
}

has_java() {
    for java in "${JAVA_HOME:-/nowhere}/bin/java" /opt/homebrew/opt/openjdk/bin/java /usr/local/opt/openjdk/bin/java; do
        [ ! -x "$java" ] || return 0
    done
    command -v java >/dev/null
}

# The engine is the one that the suite finds.
DOCKER_HOST=$("${0%/*}/docker-host.sh")
export DOCKER_HOST

has_docker() { command -v docker >/dev/null; }

# Asks the engine where there is no docker CLI, as the suite needs none.
ask() { curl --silent --fail --output /dev/null --unix-socket "${DOCKER_HOST#unix://}" "$@" 2>/dev/null; }

engine() {
    case $DOCKER_HOST in
    unix://* | tcp://* | http://*) ;;
    # The suite reaches no engine over ssh.
    *) return 1 ;;
    esac
    if has_docker; then docker version >/dev/null 2>&1; else ask --max-time 5 http://docker/_ping; fi
}

has_image() {
    if has_docker; then docker image inspect "$image" >/dev/null 2>&1; else ask "http://docker/images/$image/json"; fi
}

pull() {
    say "pulling the image $image"
    if has_docker; then docker pull --quiet "$image" >&2; else ask -X POST "http://docker/images/create?fromImage=$image" && has_image; fi
}

install_native() {
    # Java and Maven are packages, the jars are not.
    if [ "$1" = kafka ]; then
        [ -z "${OVERSOLD_KAFKA_JARS:-}" ] || return 1
        { has_java && command -v mvn >/dev/null; } || install_packages kafka || return 1
        "${0%/*}/kafka/fetch.sh" >/dev/null
        return
    fi
    install_packages "$1"
}

install_packages() {
    command -v apt-get >/dev/null || return 1
    sudo=
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || return 1
        sudo=sudo
    fi
    note=". No server is left running"
    [ "$1" != tools ] || note=
    say "installing $name with apt-get${sudo:+, with sudo}: $apt, about $megabytes MB to download$note"
    # What apt says is shown only if it fails.
    apt_log=$(mktemp)
    if ! {
        "without_a_server_$1" &&
            $sudo apt-get update -qq &&
            # shellcheck disable=SC2086 # one word for each package
            $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $apt
    } >"$apt_log" 2>&1; then
        cat "$apt_log" >&2
        rm -f "$apt_log"
        return 1
    fi
    rm -f "$apt_log"
    "afterwards_$1"
    $sudo rm -f ${rule:+"$rule"}
    trap - EXIT
}

# The package would make a database cluster of its own and start it. Nobody here needs that one.
without_a_server_postgres() {
    rule=/etc/postgresql-common/createcluster.d/oversold.conf
    trap '$sudo rm -f "$rule"' EXIT
    $sudo mkdir -p "${rule%/*}" && echo "create_main_cluster = false" | $sudo tee "$rule" >/dev/null
}

afterwards_postgres() { :; }

# The package would start a server at once, which policy-rc.d forbids, and again with every start of the machine.
without_a_server_redis() {
    rule=
    [ -e /usr/sbin/policy-rc.d ] || rule=/usr/sbin/policy-rc.d
    [ -n "$rule" ] || return 0
    trap '$sudo rm -f "$rule"' EXIT
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$rule" >/dev/null && $sudo chmod 755 "$rule"
}

afterwards_redis() { $sudo update-rc.d redis-server disable >&2 || say "redis-server may start with this machine"; }

without_a_server_kafka() { rule=; }

afterwards_kafka() { :; }

without_a_server_tools() { rule=; }

afterwards_tools() { :; }

what_to_run() {
    say "there is no $name, and none can be installed from here. Do one of these:"
    package_to_install
    [ "$name" != Kafka ] || say "    and then run infra/setup.sh kafka again, which fetches its jars"
    say "  start a Docker engine                 (the image $image is pulled)"
    say "  export $example"
    exit 1
}

package_to_install() {
    case $(uname -s) in
    Darwin) say "  brew install $brew" ;;
    *)
        if command -v apt-get >/dev/null; then
            say "  apt-get install $apt                  (as root)"
        elif command -v dnf >/dev/null; then
            say "  sudo dnf install $dnf"
        elif command -v pacman >/dev/null; then
            say "  sudo pacman -S $pacman"
        else
            say "  install $name with your package manager${programs:+, or name $programs}"
        fi
        ;;
    esac
}

see_to_tools() {
    about tools
    [ -n "$name" ] || return 0
    install_packages tools && return
    say "there is no $name, which a build or the suite takes. Do this:"
    case $(uname -s) in
    Darwin) say "  xcode-select --install" ;;
    *) package_to_install ;;
    esac
    exit 1
}

see_to() {
    case $forced in
    "")
        [ -z "$url" ] || return 0
        if engine && has_image; then return; fi
        if "native_$1"; then return; fi
        if engine; then
            if pull; then return; fi
            say "it can't be pulled, so $name is needed on this machine itself"
        fi
        install_native "$1" || what_to_run
        ;;
    native)
        "native_$1" || install_native "$1" || what_to_run
        ;;
    docker)
        engine || { say "OVERSOLD_BACKENDS is \`docker\`, and no Docker engine answers: start one"; exit 1; }
        has_image || pull || {
            say "it can't be pulled; infra/images/build.sh builds one without a registry"
            exit 1
        }
        ;;
    esac
}

[ $# -gt 0 ] || set -- postgres
for service; do
    about "$service"
done
case " $* " in *" kafka "*) "${0%/*}/target-folder.sh" ;; esac
for service; do
    about "$service"
    see_to "$service"
done
see_to_tools
