# shellcheck shell=bash
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

# `down` stops everything that `up` started; `purge` removes it.

# Ends processes that our daemons started and left behind.
kill_strays() {
    local -a strays
    mapfile -t strays < <({
        grep -lzsFx "NOVA_LXD_QUICKSTART=$PREFIX" /proc/[0-9]*/environ |
            cut -d/ -f3
        daemon_processes '*'
    } | sort -un | same_pid_namespace | grep -vx "$$")
    ((${#strays[@]})) || return 0
    kill -TERM "${strays[@]}" 2>/dev/null || :
    sleep 0.5
    kill -KILL "${strays[@]}" 2>/dev/null || :
}

# Prints the interfaces that are ports of our own Open vSwitch.
ovs_interfaces() {
    daemon_running ovsdb-server || return 0
    vsctl --bare --columns=name find Interface type=\"\" 2>/dev/null |
        grep -v '^$' || :
}

# Prints the network namespaces in which our agent serves metadata. The host may
# have others: only ours have a configuration below the prefix.
metadata_namespaces() {
    local name
    for name in $(ip netns list 2>/dev/null | awk '/^ovnmeta-/ { print $1 }')
    do
        [[ ! -e $DATA/neutron/ovn-metadata-proxy/${name#ovnmeta-}.conf ]] ||
            echo "$name"
    done
}

stop_all() {
    local name link
    local -a links=() namespaces=()
    read -ra links -d '' <<<"$(ovs_interfaces)" || :
    read -ra namespaces -d '' <<<"$(metadata_namespaces)" || :
    stop_second_host
    for name in nova-compute neutron-ovn-agent; do
        daemon_stop "$name" 20 &
    done
    wait
    stop_lxd
    # Mounted volumes, and shares with volumes.
    unmount_below "$DATA/nova"
    leave_targets
    # The rest can stop in parallel: first the services, then what they depend
    # on.
    for name in "${DAEMONS[@]}"; do
        case $name in
        lxd | lxcfs | mariadb | rabbitmq | epmd | ov*) continue ;;
        esac
        daemon_stop "$name" &
    done
    wait
    for name in ovn-controller ovn-northd rabbitmq mariadb; do
        daemon_stop "$name" 30 &
    done
    wait
    stop_vswitchd
    for name in ovn-db ovsdb-server epmd; do
        daemon_stop "$name"
    done
    kill_strays
    release_cinder
    for name in "${namespaces[@]}"; do
        ip netns delete "$name" 2>/dev/null || :
    done
    for link in "${links[@]}"; do
        ip link delete "$link" 2>/dev/null || :
    done
    undo_nat
    rm -f "$OVS_RUN"/*.ctl "$OVS_RUN"/*.mgmt "$OVS_RUN"/*.snoop
}

command_down() {
    local begin
    begin=$(now_us)
    if [[ ! -d $DATA ]]; then
        say "There is no quickstart cloud at $PREFIX."
        return 0
    fi
    say 'Stopping servers and services…'
    stop_all >"$LOG/down.log" 2>&1
    say "Stopped after $(elapsed "$begin") s. Servers and data are kept;" \
        "$SELF up starts them again."
}

undo_subordinate_ids() {
    local name line
    for name in subuid subgid; do
        [[ -s $DATA/undo/$name ]] || continue
        line=$(<"$DATA/undo/$name")
        sed -i "\|^$line\$|d" "/etc/$name"
    done
}

# Checks that this is the host's PID namespace: a container does not see all
# processes.
in_first_pid_namespace() {
    [[ $(readlink /proc/self/ns/pid) == 'pid:[4026531836]' ]]
}

# Detaches loop devices whose file is below the prefix. A container sees the
# loop devices of its host as well and must leave them alone; for config drives,
# whose files are deleted, the two cannot be told apart.
detach_loops() {
    local device inode file
    losetup --list --noheadings --output NAME,BACK-INO,BACK-FILE 2>/dev/null |
        while read -r device inode file; do
            if [[ $file == "$PREFIX"/* && -e $file &&
                $(stat -c %i "$file") == "$inode" ]]; then
                losetup --detach "$device" || :
            elif [[ $file == "$PREFIX"/*/config-drives/*' (deleted)' ]] &&
                in_first_pid_namespace; then
                losetup --detach "$device" || :
            fi
        done
}

# rm cannot remove btrfs subvolumes, which a pool in a directory has.
delete_subvolumes() {
    [[ ! -d $1/storage-btrfs ]] || find "$1/storage-btrfs" -depth -inum 256 \
        -type d -exec btrfs subvolume delete {} + >/dev/null 2>&1 || :
}

command_purge() {
    local begin path
    begin=$(now_us)
    if [[ ! -d $PREFIX ]]; then
        say "There is no quickstart cloud at $PREFIX."
        return 0
    fi
    [[ -e $PREFIX/settings || -d $DATA ]] ||
        die "$PREFIX does not look like a quickstart cloud; not removed."
    say 'Stopping servers and services…'
    mkdir -p "$LOG"
    stop_all >"$LOG/down.log" 2>&1
    say 'Removing files…'
    undo_client
    forget_targets
    "$REPO/tools/udev_rule.sh" remove "$DATA/undo/udev"
    undo_subordinate_ids
    "$REPO/tools/kernel_limits.sh" restore "$DATA/undo/kernel-limits"
    allow_service_start
    unmount_below "$PREFIX"
    detach_loops
    [[ ! -s $DATA/undo/devices ]] || xargs -r rm -f <"$DATA/undo/devices"
    delete_subvolumes "$LXD_HOME"
    delete_subvolumes "$SECOND_HOME/lxd"
    if [[ $KEEP_CACHE == yes ]]; then
        for path in "$PREFIX"/* "$PREFIX"/.[!.]*; do
            [[ $path == "$VENV" || $path == "$CACHE" ]] || rm -rf "$path"
        done
        say "Kept: $VENV and $CACHE."
    else
        rm -rf "$PREFIX"
    fi
    rm -f /run/lock/nova-lxd-quickstart.lock
    say "Removed after $(elapsed "$begin") s. Packages of the distribution" \
        "stay installed."
}
