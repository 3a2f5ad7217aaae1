# Ends what a run of the suite or the rush has made, once the run itself has ended: by itself, by a panic, by Ctrl-C or by SIGKILL.
#
#   sh keeper.sh keep FOLDER [STALE…] <PIPE    sweeps the stale folders, waits for the pipe to end, then clears FOLDER
#   sh keeper.sh clear FOLDER                  removes a folder of data, or ends and removes all that FOLDER knows of
#   sh keeper.sh run FOLDER NAME PROGRAM…      signs the book of FOLDER, then becomes PROGRAM
#
# FOLDER/pids/NAME        a process, in a group of its own: its pid, and when it was born
# FOLDER/containers/NAME  a container that exists or is about to: the engine's address, or an empty line for the default
# FOLDER/elsewhere/NAME   a folder in another place
# FOLDER/…                everything else that is to go
set -u

# When a process was born, so that one that was given an old pid is left alone. Nothing for a process that has ended.
born() {
    if [ -d /proc/self ]; then
        read -r stat 2>/dev/null <"/proc/$1/stat" || return 0
        # The name stands in parentheses and may hold anything; behind it come the state and, as the 20th word, the start in ticks.
        set -- ${stat##*) }
        [ "$1" = Z ] || echo "${20}"
    else
        LC_ALL=C TZ=UTC ps -o state= -o lstart= -p "$1" | while read -r state start; do
            case $state in Z*) ;; *) echo "$start" ;; esac
        done
    fi
}

# Sends a signal to the group of every process of the book that is alive. Says no when none is.
signal() {
    found=no
    for entry in "$2"/pids.closed/*; do
        [ -f "$entry" ] || continue
        read -r pid start <"$entry" || continue
        if [ -n "$start" ] && [ "$(born "$pid")" = "$start" ]; then
            found=yes
            [ "$1" = 0 ] || kill -s "$1" -- "-$pid"
        fi
    done
    [ "$found" = yes ]
}

# The engine may still be making a container whose maker has died, so one that is not there is asked for again for a while. Says no when it may
# still be there: the engine does not answer, or does not remove it.
remove_container() {
    tries=0
    while [ "$tries" -lt 20 ]; do
        tries=$((tries + 1))
        if command -v docker; then
            if docker ${2:+-H "$2"} container inspect "$1"; then
                docker ${2:+-H "$2"} container rm --force --volumes "$1" && return
            fi
        else
            socket=${2:-unix:///var/run/docker.sock}
            curl --fail --unix-socket "${socket#unix://}" -X DELETE "http://docker/containers/$1?force=true&v=true" && return
        fi
        sleep 0.5
    done
    is_no_container "$1" "$2"
}

# Whether the engine says that there is no such container.
is_no_container() {
    if command -v docker >/dev/null; then
        listed=$(docker ${2:+-H "$2"} container ls --all --quiet --filter "name=^/?$1\$") && [ -z "$listed" ]
    else
        socket=${2:-unix:///var/run/docker.sock}
        answer=$(curl --silent --output /dev/null --write-out '%{http_code}' --unix-socket "${socket#unix://}" "http://docker/containers/$1/json")
        [ "$answer" = 404 ]
    fi
}

# What is done is struck out. While something is not, the book stays, so that the next run tries again.
clear_folder() {
    # From here on nobody can sign: whoever has not yet, fails to and gives up.
    [ ! -d "$1/pids" ] || mv "$1/pids" "$1/pids.closed"
    signal INT "$1"
    signal CONT "$1"
    tries=0
    while signal 0 "$1" && [ "$tries" -lt 50 ]; do
        tries=$((tries + 1))
        sleep 0.1
    done
    signal KILL "$1"
    for entry in "$1"/containers/*; do
        [ -f "$entry" ] || continue
        read -r engine <"$entry"
        remove_container "${entry##*/}" "$engine" && rm -f "$entry"
    done
    for entry in "$1"/elsewhere/*; do
        [ -f "$entry" ] || continue
        read -r elsewhere <"$entry"
        remove_folder "$elsewhere" && rm -f "$entry"
    done
    for entry in "$1"/containers/* "$1"/elsewhere/*; do
        [ ! -f "$entry" ] || return 1
    done
    remove_folder "$1"
}

remove_folder() {
    # A Postgres that was killed leaves a segment of shared memory, which its lock file names. A machine may have room for only a few.
    for lock in "$1"/data/postmaster.pid "$1"/*/data/postmaster.pid; do
        [ -f "$lock" ] || continue
        segment=$(sed -n '7s/.* //p' "$lock")
        [ -z "$segment" ] || ipcrm -m "$segment"
    done
    # Children of a killed process may take a moment to notice, and write until then.
    tries=0
    until rm -rf "$1" && [ ! -e "$1" ]; do
        tries=$((tries + 1))
        [ "$tries" -lt 50 ] || return 1
        sleep 0.1
    done
}

case $1 in
run)
    folder=$2 name=$3
    shift 3
    # Written aside and moved, so that the book never shows half an entry.
    echo "$$ $(born $$)" >"$folder/pids/.$name" && mv "$folder/pids/.$name" "$folder/pids/$name" || exit 1
    exec "$@"
    ;;
clear)
    clear_folder "$2"
    ;;
keep)
    trap '' HUP INT QUIT TERM
    cd /
    folder=$2
    shift 2
    for stale; do
        (clear_folder "$stale" </dev/null) &
    done
    while read -r _; do :; done
    clear_folder "$folder" </dev/null
    ;;
esac
