#!/usr/bin/env bash
#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

# Tests the two commands of the README on a fresh machine: a plain Debian with
# an init system in a system container, which is removed afterwards.
#
#   tools/fresh_machine.sh bookworm|trixie [--keep] [COMMAND...]
#
# COMMAND runs in the clone inside the container after the two commands, for
# example "./run_tests.sh cloud". The last line of the output is the time that
# "quickstart.sh up" took. With --keep the container stays.
set -euo pipefail

usage() { sed -n '/^# Tests/,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }

arguments=("$@")
case "${1:-}" in
    bookworm|trixie) suite=$1; shift ;;
    *) usage; exit 2 ;;
esac
keep=false
if [[ "${1:-}" == --keep ]]; then keep=true; shift; fi
repo=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tools/as_root.sh
. "$repo/tools/as_root.sh"
as_root "$0" "${arguments[@]}"

work=$(mktemp -d /var/tmp/fresh.XXXX)
container=fresh-$suite

say() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }

# shellcheck source=tools/system_container.sh
. "$repo/tools/system_container.sh"

cleanup() {
    local status=$?
    trap - EXIT
    if $keep; then
        say "Kept. Enter: LXD_DIR=$LXD_DIR lxc exec $container -- bash"
        exit "$status"
    fi
    say "Removing the machine"
    container_down
    exit "$status"
}
trap cleanup EXIT

container_tools
container_rootfs "$suite"
git clone --quiet --bare "$repo" "$work/rootfs/srv/nova-lxd-py.git"
container_up

say "The two commands"
container_run git clone --quiet /srv/nova-lxd-py.git nova-lxd-py
dir=/root/nova-lxd-py
before=$SECONDS
container_run ./devstack/quickstart.sh up
took=$((SECONDS - before))
if (($#)); then
    say "$*"
    container_run "$@"
fi
say "Debian $suite: first server ACTIVE after $took seconds"
