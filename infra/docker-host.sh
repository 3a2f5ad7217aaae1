#!/bin/sh
# Prints the address of the Docker engine that both set-up and suite use, and nothing where there is none:
# DOCKER_HOST; else the address of the docker CLI's current context (`docker context use`, DOCKER_CONTEXT); else, as the default context is
# no choice, the first socket that is there of Docker, rootless Docker, Docker Desktop, and Podman.
#
# infra/setup.sh runs it, and so does the harness, which contains it: tests/harness/src/backends/docker/engine.rs.
set -u

if [ -n "${DOCKER_HOST:-}" ]; then
    echo "$DOCKER_HOST"
    exit
fi
default=/var/run/docker.sock
context=
if command -v docker >/dev/null; then
    context=$(docker context inspect --format '{{.Endpoints.docker.Host}}' 2>/dev/null)
fi
case $context in
"" | "unix://$default") ;;
*)
    echo "$context"
    exit
    ;;
esac
home=${HOME:-/nowhere}
runtime=${XDG_RUNTIME_DIR:-/run/user/$(id -u 2>/dev/null)}
for socket in "$default" "$runtime/docker.sock" "$home/.docker/run/docker.sock" "$home/.docker/desktop/docker.sock" \
    "$runtime/podman/podman.sock" /run/podman/podman.sock "$home/.local/share/containers/podman/machine/podman.sock"; do
    if [ -S "$socket" ]; then
        echo "unix://$socket"
        exit
    fi
done
