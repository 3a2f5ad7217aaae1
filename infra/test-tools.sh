#!/bin/sh
# Sees to it that there is what single tests need, which are ignored without it: pgbouncer, the connection pooler.
# `.ci/run` runs it first. What it installs it says before it does; with nothing to install it says nothing. k6 is built by `make load`.
set -eu

say() { echo "setup: $*" >&2; }

if command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ]; then exit; fi
if ! command -v apt-get >/dev/null; then
    say "there is no pgbouncer; install it with your package manager"
    exit 3
fi
sudo=
if [ "$(id -u)" != 0 ]; then
    sudo=sudo
    command -v sudo >/dev/null || { say "there is no pgbouncer. As root: apt-get install pgbouncer"; exit 3; }
fi
say "installing pgbouncer with apt-get${sudo:+, with sudo}, about 1 MB to download. No server is left running"
# The package would start a server at once, which policy-rc.d forbids, and again with every start of the machine.
rule=
if [ ! -e /usr/sbin/policy-rc.d ]; then
    rule=/usr/sbin/policy-rc.d
    trap '$sudo rm -f "$rule"' EXIT
    printf '#!/bin/sh\nexit 101\n' | $sudo tee "$rule" >/dev/null
    $sudo chmod 755 "$rule"
fi
$sudo apt-get update -qq >&2
$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends pgbouncer >&2
$sudo update-rc.d pgbouncer disable >&2 || say "pgbouncer may start with this machine"
