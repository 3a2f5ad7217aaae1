#!/bin/sh
# Fetches the jars of pom.xml with Maven into a folder of this user's, and prints it. What is there already is not fetched again. Beside them
# it leaves an archive of the classes that a broker loads, with which one starts in about a third of the time.
#
#   infra/kafka/fetch.sh           fetches, and says so before it does
#   infra/kafka/fetch.sh --check   only tells by its exit code whether they are there
set -eu
cd "$(dirname "$0")"

# As in tests/harness/src/backends/kafka/native.rs. A broker that root starts runs as another user, who may not look into root's home.
if [ "$(id -u)" = 0 ]; then cache=/var/cache; else cache=${XDG_CACHE_HOME:-$HOME/.cache}; fi
jars=$cache/oversold/kafka

# Starts a broker once, and keeps what it has loaded (class data sharing; without the archive, or with another Java, a broker starts slowly).
archive_classes() {
    java=java
    for home in "${JAVA_HOME:-/nowhere}" /opt/homebrew/opt/openjdk /usr/local/opt/openjdk; do
        [ ! -x "$home/bin/java" ] || { java=$home/bin/java; break; }
    done
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Should somebody have these ports, then the broker ends at once, and has loaded most of its classes by then.
    port=$((20000 + $$ % 5000 * 2))
    cat >"$work/server.properties" <<END
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$((port + 1))
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$((port + 1))
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT
log.dirs=$work/data
log.cleaner.dedupe.buffer.size=2097152
END
    set -- -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xmx512m -XX:-UsePerfData \
        -Dlog4j2.configurationFile="$PWD/../images/kafka/log4j2.properties" -cp "$jars/*"
    "$java" "$@" kafka.tools.StorageTool format --cluster-id 5L6g3nShT-eMCtK--X86sw --config "$work/server.properties" >"$work/log" 2>&1
    "$java" -XX:ArchiveClassesAtExit="$work/classes" "$@" kafka.Kafka "$work/server.properties" >>"$work/log" 2>&1 &
    broker=$!
    tries=0
    until grep -q "Kafka Server started" "$work/log" || [ "$tries" -ge 300 ] || ! kill -0 "$broker" 2>/dev/null; do
        tries=$((tries + 1))
        sleep 0.2
    done
    kill -s TERM "$broker" 2>/dev/null || :
    wait "$broker" || :
    if [ -s "$work/classes" ]; then
        chmod a+r "$work/classes"
        mv "$work/classes" "$jars.jsa"
    else
        echo "kafka: no archive of classes came of it, so brokers start slowly" >&2
    fi
    rm -rf "$work"
    trap - EXIT
}

made_from=$(cksum <pom.xml)
if [ "$(cat "$jars/made-from" 2>/dev/null)" != "$made_from" ]; then
    [ "${1:-}" != --check ] || exit 1
    command -v mvn >/dev/null || { echo "kafka: the jars are fetched with Maven, and there is no mvn" >&2; exit 1; }
    echo "kafka: fetching the jars of Kafka with Maven into $jars: about 55 MB, once" >&2
    mkdir -p "${jars%/*}"
    # Beside the place, so that nobody finds half of them.
    new=$(mktemp -d "$jars.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    # Without performance data, which would lie in the temporary folder.
    MAVEN_OPTS="${MAVEN_OPTS:-} -XX:-UsePerfData" \
        mvn --quiet --batch-mode --file pom.xml dependency:copy-dependencies -DoutputDirectory="$new" -DincludeScope=runtime >&2
    echo "$made_from" >"$new/made-from"
    chmod -R a+rX "$new"
    rm -rf "$jars" "$jars.jsa"
    mv "$new" "$jars"
    trap - EXIT
    archive_classes || :
fi
[ "${1:-}" = --check ] || echo "$jars"
