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

# Our own LXD, or Incus if that is wanted or the distribution has no LXD package.

# Sets CONTAINER_DAEMON, CONTAINER_CLIENT, LXD_ENV and LXD_SOCKET.
find_lxd() {
    local path
    LXD_SOCKET=$LXD_HOME/unix.socket
    LXD_ENV=(LXD_DIR="$LXD_HOME" INCUS_DIR="$LXD_HOME" HOME="$DATA/lxd-client")
    if [[ $CONTAINER_SERVER != incus ]] && path=$(command -v lxd) &&
        [[ $(readlink -f "$path") != */snap* ]]; then
        CONTAINER_DAEMON=$path
        CONTAINER_CLIENT=$(command -v lxc)
        return 0
    fi
    [[ $CONTAINER_SERVER != lxd ]] || return 1
    for path in /usr/libexec/incus/incusd /usr/sbin/incusd /usr/bin/incusd; do
        if [[ -x $path ]]; then
            CONTAINER_DAEMON=$path
            CONTAINER_CLIENT=$(command -v incus)
            return 0
        fi
    done
    return 1
}

lxc() {
    "${CLEAN_ENV[@]}" "${LXD_ENV[@]}" "$CONTAINER_CLIENT" "$@" </dev/null
}

# Isolated containers need 65536 subordinate ids each.
ensure_subordinate_ids() {
    local file name start count last=999999
    for file in /etc/subuid /etc/subgid; do
        [[ -e $file ]] || touch "$file"
        if awk -F: '$1 == "root" || $1 == "0" { n += $3 }
                    END { exit !(n >= 6553600) }' "$file"; then
            continue
        fi
        while IFS=: read -r name start count; do
            [[ -n $name && $count =~ ^[0-9]+$ ]] || continue
            ((start + count > last)) && last=$((start + count - 1))
        done <"$file"
        echo "root:$((last + 1)):1000000000" | tee -a "$file" \
            >"$DATA/undo/${file##*/}"
    done
}

# A host that is a container may lack loop devices.
ensure_loop_devices() {
    local i
    modprobe loop 2>/dev/null || :
    [[ -e /dev/loop-control ]] || mknod /dev/loop-control c 10 237 || :
    for ((i = 0; i < 8; i++)); do
        [[ ! -e /dev/loop$i ]] || continue
        if mknod "/dev/loop$i" b 7 "$i"; then
            echo "/dev/loop$i" >>"$DATA/undo/devices"
        fi
    done
}

# With lxcfs, /proc shows guests their own limits.
start_lxcfs() {
    local dir=/var/lib/lxcfs
    command -v lxcfs >/dev/null && [[ -e /dev/fuse ]] || return 0
    # An lxcfs that was killed leaves its mount.
    if ! stat "$dir" >/dev/null 2>&1; then
        umount -l "$dir" 2>/dev/null || :
    fi
    if mountpoint -q "$dir"; then
        return 0
    fi
    mkdir -p "$dir"
    # lxcfs keeps one pid file per host; ours goes below the prefix.
    daemon_start lxcfs lxcfs --pidfile="$RUN/lxcfs.own.pid" "$dir"
    if ! wait_until lxcfs 10 lxcfs mountpoint -q "$dir"; then
        echo 'Continuing without lxcfs: guests see the CPUs of the host.'
        daemon_stop lxcfs
    fi
}

create_pool() {
    local driver=$POOL_DRIVER
    if lxc storage show "$POOL_NAME" >/dev/null 2>&1; then
        return 0
    fi
    if [[ $driver == btrfs ]]; then
        ensure_loop_devices
        modprobe btrfs 2>/dev/null || :
        if lxc storage create "$POOL_NAME" btrfs size="$POOL_SIZE"; then
            return 0
        fi
        if [[ $(stat -f -c %T "$PREFIX") == btrfs ]] && lxc storage create \
            "$POOL_NAME" btrfs source="$LXD_HOME/storage-btrfs"; then
            return 0
        fi
        warn 'LXD cannot create a btrfs pool on a loop file here. Using a' \
            'directory: slower, and without disk quotas.'
    fi
    lxc storage create "$POOL_NAME" dir
}

# `purge` restores the limits.
raise_kernel_limits() {
    local line
    "$REPO/tools/kernel_limits.sh" raise "$DATA/undo/kernel-limits" |
        while read -r line; do
            warn "$line"
        done
}

# To publish an image of a guest, LXD looks up the name of each file's owner,
# none of which this host knows. nss-systemd comes last: it takes ten times as
# long as the files of the host, and aborts LXD if another thread has closed its
# descriptor (seen with 5.0.2 under load). An empty file instead of its library
# disables it, for LXD only.
without_systemd_names() {
    mkdir -p "$DATA/lxd-libraries"
    : >"$DATA/lxd-libraries/libnss_systemd.so.2"
}

is_incus() { [[ ${CONTAINER_DAEMON##*/} == incusd ]]; }

# Commands that LXD's daemon has itself, and Incus' client.
lxd_admin() {
    local -a program=("$CONTAINER_DAEMON")
    ! is_incus || program=("$CONTAINER_CLIENT" admin)
    timeout 40 "${CLEAN_ENV[@]}" "${LXD_ENV[@]}" "${program[@]}" "$@" \
        </dev/null
}

# A later `up` must not take the other one.
save_server() {
    CONTAINER_SERVER=lxd
    ! is_incus || CONTAINER_SERVER=incus
    save_settings
}

run_lxd() {
    NOFILE=1048576 \
        daemon_start lxd "${LXD_ENV[@]}" LD_LIBRARY_PATH="$DATA/lxd-libraries" \
        "$CONTAINER_DAEMON" --group root &&
        wait_until LXD 60 lxd lxd_admin waitready --timeout=30
}

step_lxd() {
    find_lxd
    save_server
    mkdir -p "$LXD_HOME" "$DATA/lxd-client"
    chmod 711 "$LXD_HOME"
    ensure_subordinate_ids
    raise_kernel_limits
    start_lxcfs
    without_systemd_names
    # LXD 5.0 panics if it is notified of a guest's end before it is ready, as
    # after a crash while it stopped one.
    run_lxd || { echo 'Restarting LXD.' && run_lxd; }
    create_pool
    lxc config set images.auto_update_interval=0
}

# Stops guests by force, and the daemon.
stop_lxd() {
    local project
    if daemon_running lxd && find_lxd; then
        lxc query '/1.0/projects' | grep -o '/1.0/projects/[^"]*' |
            while read -r project; do
                timeout 60 "${CLEAN_ENV[@]}" "${LXD_ENV[@]}" \
                    "$CONTAINER_CLIENT" stop --all --force \
                    --project "${project##*/}" </dev/null || :
            done
        lxd_admin shutdown --timeout 20 || :
    fi
    daemon_stop lxd 20
    unmount_below "$LXD_HOME"
    if daemon_running lxcfs; then
        daemon_stop lxcfs
        umount -l /var/lib/lxcfs 2>/dev/null || :
    fi
}

# Unmounts everything below a directory, innermost first.
unmount_below() {
    local target
    awk -v top="$1/" 'index($5 "/", top) == 1 { print $5 }' \
        /proc/self/mountinfo | sort -r | while read -r target; do
        umount "$target" 2>/dev/null || umount -l "$target" || :
    done
}
