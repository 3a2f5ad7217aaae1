#!/bin/sh
# Fetches the jars of pom.xml with Maven into a folder of this user's, and prints it. What is there already is not fetched again.
#
#   infra/kafka/fetch.sh           fetches, and says so before it does
#   infra/kafka/fetch.sh --check   only tells by its exit code whether they are there
set -eu
cd "$(dirname "$0")"

# As in tests/src/backends/kafka/native.rs. A broker that root starts runs as another user, who may not look into root's home.
if [ "$(id -u)" = 0 ]; then cache=/var/cache; else cache=${XDG_CACHE_HOME:-$HOME/.cache}; fi
jars=$cache/oversold/kafka

made_from=$(cksum <pom.xml)
if [ "$(cat "$jars/made-from" 2>/dev/null)" != "$made_from" ]; then
    [ "${1:-}" != --check ] || exit 1
    command -v mvn >/dev/null || { echo "kafka: the jars are fetched with Maven, and there is no mvn" >&2; exit 1; }
    echo "kafka: fetching the jars of Kafka with Maven into $jars: about 55 MB, once" >&2
    mkdir -p "${jars%/*}"
    # Beside the place, so that nobody finds half of them.
    new=$(mktemp -d "$jars.XXXXXX")
    trap 'rm -rf "$new"' EXIT
    mvn --quiet --batch-mode -Dstyle.color=never --file pom.xml dependency:copy-dependencies -DoutputDirectory="$new" -DincludeScope=runtime >&2
    echo "$made_from" >"$new/made-from"
    chmod -R a+rX "$new"
    rm -rf "$jars"
    mv "$new" "$jars"
    trap - EXIT
fi
[ "${1:-}" = --check ] || echo "$jars"
