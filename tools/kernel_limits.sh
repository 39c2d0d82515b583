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

# kernel_limits.sh raise|restore RECORD: the kernel's limits that hundreds of
# containers with systemd reach. RECORD is a file with the values before and
# after the change, one "NAME OLD NEW" a line. Limits are never lowered. Prints
# the names of those that cannot be changed, which is no error. Runs as root.

set -eu

# Most values are those of "Server settings for a LXD production setup" in LXD's
# documentation. It has 2000 for kernel.keys.maxkeys, but a guest with systemd
# has about 20 keys, and guests that share a range of host uids share that limit.
readonly LIMITS='
fs.aio-max-nr                   524288
fs.file-max                     2097152
fs.inotify.max_queued_events    1048576
fs.inotify.max_user_instances   1048576
fs.inotify.max_user_watches     1048576
kernel.keys.maxbytes            2000000
kernel.keys.maxkeys             20000
kernel.pty.max                  8192
net.ipv4.neigh.default.gc_thresh1 2048
net.ipv4.neigh.default.gc_thresh2 4096
net.ipv4.neigh.default.gc_thresh3 8192
net.ipv6.neigh.default.gc_thresh1 2048
net.ipv6.neigh.default.gc_thresh2 4096
net.ipv6.neigh.default.gc_thresh3 8192
vm.max_map_count                262144
'
readonly SYSCTLS=${KERNEL_LIMITS_ROOT:-}/proc/sys RECORD=${2:?}

# value NAME: fails if the kernel does not have that limit, or not here.
value() {
    [[ -e $SYSCTLS/${1//.//} ]] && cat "$SYSCTLS/${1//.//}"
}

# change NAME VALUE: the kernel may refuse it, or ignore it without an error.
change() {
    { echo "$2" >"$SYSCTLS/${1//.//}"; } 2>/dev/null &&
        [[ $(value "$1") == "$2" ]]
}

# Remembers the first value of a limit, not the one of a later call.
remember() {
    local name=$1 old=$2 new=$3 first
    first=$(awk -v name="$name" '$1 == name { print $2 }' "$RECORD")
    sed -i "/^$name /d" "$RECORD"
    echo "$name ${first:-$old} $new" >>"$RECORD"
}

raise() {
    local name wanted old absent='' refused=''
    mkdir -p "${RECORD%/*}"
    touch "$RECORD"
    while read -r name wanted; do
        [[ -n $name ]] || continue
        if ! old=$(value "$name"); then
            absent+=" $name"
        elif ((old < wanted)); then
            # Recorded first, for a script that is interrupted.
            remember "$name" "$old" "$wanted"
            change "$name" "$wanted" || refused+=" $name=$wanted"
        fi
    done <<<"$LIMITS"
    [[ -z $refused ]] ||
        echo "These kernel limits cannot be raised here:$refused."
    [[ -z $absent ]] ||
        echo "These kernel limits do not exist here:$absent. In a container," \
            'set them on its host.'
}

restore() {
    local name old new
    [[ -e $RECORD ]] || return 0
    while read -r name old new; do
        # Somebody else has changed it, or the machine was rebooted.
        [[ $(value "$name") == "$new" ]] || continue
        change "$name" "$old" || echo "$name stays $new instead of $old."
    done <"$RECORD"
    rm -f "$RECORD"
}

case $1 in
raise | restore) "$1" ;;
*)
    echo "Usage: $0 raise|restore RECORD" >&2
    exit 2
    ;;
esac
