#!/bin/sh
# Makes the cluster when it is not there yet, then becomes the server.
set -eu

case ${1:-} in
"" | -*) set -- postgres "$@" ;;
esac
if [ "$1" != postgres ]; then
    exec "$@"
fi

: "${POSTGRES_USER:=postgres}" "${POSTGRES_DB:=$POSTGRES_USER}"
: "${POSTGRES_PASSWORD:?has to be set}"

# Postgres refuses to run as root.
if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA"
    chown postgres:postgres "$PGDATA"
    exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi

if [ ! -s "$PGDATA/PG_VERSION" ]; then
    umask 077
    printf '%s' "$POSTGRES_PASSWORD" >/tmp/password
    initdb --username="$POSTGRES_USER" --pwfile=/tmp/password --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8 --no-sync >&2
    rm /tmp/password
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"

    # Nobody outside can reach this server yet. Its log goes to stdout: testcontainers waits until a server said there that it is ready, and
    # then for another that says so on stderr.
    export PGPASSWORD="$POSTGRES_PASSWORD"
    pg_ctl --wait --options="-c listen_addresses= -c fsync=off" start
    if [ "$POSTGRES_DB" != postgres ]; then
        createdb --username="$POSTGRES_USER" --maintenance-db=postgres "$POSTGRES_DB"
    fi
    pg_ctl --wait --mode=fast stop
    unset PGPASSWORD
fi

exec "$@" -c "listen_addresses=*"
