# The reaper: stops and removes what a process has started, once the process has ended, whether
# normally, by a panic, by Ctrl-C or by SIGKILL.
#
#   sh reaper.sh keep FOLDER [STALE…] <PIPE    clears the stale folders, waits for the end of the pipe, then clears FOLDER
#   sh reaper.sh clear FOLDER                  removes a data folder, or stops and removes everything registered in FOLDER
#   sh reaper.sh run FOLDER NAME PROGRAM…      registers itself in FOLDER, then executes PROGRAM
#
# FOLDER/pids/NAME        a process in its own process group: its pid and start time
# FOLDER/containers/NAME  a container that exists or is being created: the engine's address, or an empty line for the default
# FOLDER/elsewhere/NAME   a folder outside FOLDER
# FOLDER/…                everything else that is to be removed
set -u

# The start time of a process, so that a process with a reused pid is left alone. Empty for a
# process that has ended.
start_time() {
    if [ -d /proc/self ]; then
        read -r stat 2>/dev/null <"/proc/$1/stat" || return 0
        # The name is in parentheses and may contain anything. The state follows it, and the start
        # time in ticks is the 20th word.
        set -- ${stat##*) }
        [ "$1" = Z ] || echo "${20}"
    else
        LC_ALL=C TZ=UTC ps -o state= -o lstart= -p "$1" | while read -r state start; do
            case $state in Z*) ;; *) echo "$start" ;; esac
        done
    fi
}

# Sends a signal to the process group of every registered process that is alive, and forgets those
# that have ended. Fails if there is none.
signal() {
    found=no
    for entry in "$2"/pids.closed/*; do
        [ -f "$entry" ] || continue
        read -r pid start <"$entry" || continue
        if [ -n "$start" ] && [ "$(start_time "$pid")" = "$start" ]; then
            found=yes
            [ "$1" = 0 ] || kill -s "$1" -- "-$pid"
        else
            rm -f "$entry"
        fi
    done
    [ "$found" = yes ]
}

# Removes a container. The engine may still be creating it after its creator has died, so an absent
# container is retried for a while. Fails if the container may still exist: the engine does not
# answer, or does not remove it.
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

# Whether the engine reports that the container does not exist.
is_no_container() {
    if command -v docker >/dev/null; then
        listed=$(docker ${2:+-H "$2"} container ls --all --quiet --filter "name=^/?$1\$") && [ -z "$listed" ]
    else
        socket=${2:-unix:///var/run/docker.sock}
        answer=$(curl --silent --output /dev/null --write-out '%{http_code}' --unix-socket "${socket#unix://}" "http://docker/containers/$1/json")
        [ "$answer" = 404 ]
    fi
}

# Removes each entry once it is dealt with. While an entry remains, the folder remains, so that the
# next run tries again.
clear_folder() {
    # From here on no process can register: one that has not done so fails and exits.
    [ ! -d "$1/pids" ] || mv "$1/pids" "$1/pids.closed"
    signal INT "$1"
    # What a script has started in the background ignores SIGINT, and so does Java there.
    signal TERM "$1"
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
    # A killed Postgres leaves a shared memory segment, which its lock file names. A machine may
    # have room for only a few.
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
    # Written to a temporary name and moved, so that no partial entry is ever visible.
    echo "$$ $(start_time $$)" >"$folder/pids/.$name" && mv "$folder/pids/.$name" "$folder/pids/$name" || exit 1
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
