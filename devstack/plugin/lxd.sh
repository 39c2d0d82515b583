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

# The host's LXD, from the distribution's packages or the snap, or its Incus.
# clean.sh removes only what the plugin has installed or created.

# Sets NOVA_LXD_KIND to the kind that the plugin has installed, or that it
# finds.
function find_nova_lxd_daemon {
    if [[ -s $NOVA_LXD_STATE/kind ]]; then
        NOVA_LXD_KIND=$(<"$NOVA_LXD_STATE/kind")
    elif [[ -S /var/snap/lxd/common/lxd/unix.socket ]]; then
        NOVA_LXD_KIND=snap
    elif [[ -S /var/lib/lxd/unix.socket ]]; then
        NOVA_LXD_KIND=package
    elif [[ -S /var/lib/incus/unix.socket ]]; then
        NOVA_LXD_KIND=incus
    else
        return 1
    fi
}

# Sets NOVA_LXD_SOCKET and NOVA_LXD_CLIENT (a command) for NOVA_LXD_KIND, or for
# the kind that is installed.
function use_nova_lxd_daemon {
    [[ -n ${NOVA_LXD_KIND:-} ]] || find_nova_lxd_daemon
    case $NOVA_LXD_KIND in
    package)
        NOVA_LXD_SOCKET=/var/lib/lxd/unix.socket
        NOVA_LXD_CLIENT=lxc
        ;;
    snap)
        NOVA_LXD_SOCKET=/var/snap/lxd/common/lxd/unix.socket
        NOVA_LXD_CLIENT=/snap/bin/lxc
        ;;
    incus)
        NOVA_LXD_SOCKET=/var/lib/incus/unix.socket
        NOVA_LXD_CLIENT=incus
        LXD_GROUP=incus-admin
        ;;
    esac
}

# nova_lxc ARGUMENT...: run the client as root.
function nova_lxc {
    sudo -H "$NOVA_LXD_CLIENT" "$@" </dev/null
}

# Checks that the distribution has a package in version 4 or later. Ubuntu has
# empty packages named "lxd", with low versions.
function nova_lxd_package_available {
    apt-cache policy "$1" 2>/dev/null |
        grep -qE '^ +Candidate: ([0-9]+:)?([4-9]|[1-9][0-9]+)\.'
}

# Prints the source to install from.
function choose_nova_lxd_source {
    if [[ $NOVA_LXD_SOURCE != auto ]]; then
        echo "$NOVA_LXD_SOURCE"
    elif nova_lxd_package_available lxd; then
        echo package
    elif systemctl --quiet is-active snapd.socket; then
        echo snap
    elif nova_lxd_package_available incus; then
        echo incus
    fi
}

# Records for clean.sh what was created: the text on standard input.
function note_nova_lxd {
    mkdir -p "$NOVA_LXD_STATE"
    cat >"$NOVA_LXD_STATE/$1"
}

# install_nova_lxd_packages NAME...: install packages and record the subordinate
# ids that they add: Debian's package does not remove them again.
function install_nova_lxd_packages {
    local file before
    before=$(mktemp --directory)
    for file in subuid subgid; do
        [[ -e /etc/$file ]] || sudo touch "/etc/$file"
        cp "/etc/$file" "$before"
    done
    install_package "$@"
    echo "$@" | note_nova_lxd packages
    for file in subuid subgid; do
        # grep fails if there are none.
        grep -vxFf "$before/$file" "/etc/$file" | note_nova_lxd "$file" || :
    done
    rm -r "$before"
}

function install_nova_lxd_daemon {
    if find_nova_lxd_daemon && [[ $NOVA_LXD_SOURCE == auto ||
            $NOVA_LXD_SOURCE == "$NOVA_LXD_KIND" ]]; then
        echo "Using the $NOVA_LXD_KIND that is installed already."
    else
        NOVA_LXD_KIND=$(choose_nova_lxd_source)
        case $NOVA_LXD_KIND in
        package)
            install_nova_lxd_packages lxd lxd-client
            ;;
        snap)
            # The socket gets this group if it exists.
            getent group lxd >/dev/null || sudo groupadd --system lxd
            sudo snap install lxd --channel="$NOVA_LXD_SNAP_CHANNEL"
            echo lxd | note_nova_lxd snap
            ;;
        incus)
            install_nova_lxd_packages incus incus-client
            ;;
        '')
            die $LINENO "This distribution has neither LXD nor Incus. Install" \
                "one of them, then run stack.sh again."
            ;;
        *)
            die $LINENO "NOVA_LXD_SOURCE is $NOVA_LXD_SOURCE; it must be" \
                "auto, package, snap or incus."
            ;;
        esac
    fi
    # The host may have another kind as well, which must be left alone.
    echo "$NOVA_LXD_KIND" | note_nova_lxd kind
    use_nova_lxd_daemon
    case $NOVA_LXD_POOL_DRIVER in
    btrfs) install_package btrfs-progs ;;
    zfs) install_package zfsutils-linux ;;
    lvm) install_package lvm2 thin-provisioning-tools ;;
    esac
    add_nova_lxd_subordinate_ids
    sudo "$NOVA_LXD_DIR/tools/kernel_limits.sh" raise "$NOVA_LXD_STATE/limits"
    wait_for_nova_lxd
}

function wait_for_nova_lxd {
    # The first request starts a socket-activated daemon.
    nova_lxc query /1.0 >/dev/null
    case $NOVA_LXD_KIND in
    package) sudo lxd waitready --timeout=60 ;;
    snap) sudo /snap/bin/lxd waitready --timeout=60 ;;
    incus) sudo incus admin waitready --timeout=60 ;;
    esac
}

function restart_nova_lxd {
    case $NOVA_LXD_KIND in
    package) sudo systemctl restart lxd ;;
    incus) sudo systemctl restart incus ;;
    esac
    wait_for_nova_lxd
}

# Servers with isolated id maps need 65536 subordinate ids each. LXD takes them
# from the first line for root. The snap has its own range.
function add_nova_lxd_subordinate_ids {
    local file line have
    [[ $NOVA_LXD_KIND != snap ]] || return 0
    for file in /etc/subuid /etc/subgid; do
        [[ -e $file ]] || sudo touch "$file"
        have=$(awk -F: '$1 == "root" || $1 == "0" { print $3; exit }' "$file")
        # Enough for a hundred servers.
        if ((${have:-0} >= 6553600)); then
            continue
        fi
        line=$(awk -F: 'BEGIN { last = 1000000 }
            $2 + $3 > last { last = $2 + $3 }
            END { print "root:" last ":1000000000" }' "$file")
        sudo sed -i "1i$line" "$file"
        # sed inserts nothing into an empty file.
        grep -qx "$line" "$file" || echo "$line" | sudo tee -a "$file"
        echo "$line" | note_nova_lxd "${file##*/}.own"
        NOVA_LXD_RESTART=yes
    done
    if [[ ${NOVA_LXD_RESTART:-} == yes ]]; then
        restart_nova_lxd
    fi
}

function create_nova_lxd_pool {
    local -a options=()
    use_nova_lxd_daemon
    # nova-compute creates the project; clean.sh deletes it.
    nova_lxc project show "$NOVA_LXD_PROJECT" >/dev/null 2>&1 ||
        echo "$NOVA_LXD_PROJECT" | note_nova_lxd project
    if nova_lxc storage show "$NOVA_LXD_POOL" >/dev/null 2>&1; then
        return 0
    fi
    if [[ -n $NOVA_LXD_POOL_SOURCE ]]; then
        options=(source="$NOVA_LXD_POOL_SOURCE")
    elif [[ $NOVA_LXD_POOL_DRIVER != dir ]]; then
        options=(size="$NOVA_LXD_POOL_SIZE")
        sudo modprobe loop || :
    fi
    nova_lxc storage create "$NOVA_LXD_POOL" "$NOVA_LXD_POOL_DRIVER" \
        "${options[@]}" ||
        die $LINENO "LXD cannot create a $NOVA_LXD_POOL_DRIVER pool here." \
            "Set NOVA_LXD_POOL_DRIVER to another driver; dir works everywhere."
    echo "$NOVA_LXD_POOL" | note_nova_lxd pool
}

# Removes the servers from LXD, not through Nova, whose API may not answer any
# more. A project that did not exist before is deleted with all that is in it.
function remove_nova_lxd_servers {
    local name target
    find_nova_lxd_daemon || return 0
    use_nova_lxd_daemon
    # nova-compute would report the deletions as actions of users.
    stop_process n-cpu
    if nova_lxc project show "$NOVA_LXD_PROJECT" >/dev/null 2>&1; then
        if [[ -s $NOVA_LXD_STATE/project &&
                $(<"$NOVA_LXD_STATE/project") == "$NOVA_LXD_PROJECT" ]]; then
            empty_nova_lxd_project
        else
            remove_nova_lxd_instances
        fi
    fi
    # Ports of servers.
    for name in $(sudo ovs-vsctl --bare --columns=name find Interface \
            'external_ids:vm-uuid!=""' 2>/dev/null); do
        sudo ovs-vsctl --if-exists del-port "$name"
        sudo ip link delete "$name" 2>/dev/null || :
    done
    # Volumes mounted for servers: unstack.sh removes this directory with all
    # that is mounted below it.
    awk -v top="$NOVA_STATE_PATH/" 'index($5, top) == 1 { print $5 }' \
            /proc/self/mountinfo | sort -r | while read -r target; do
        sudo umount "$target" || sudo umount --lazy "$target"
    done
    detach_nova_lxd_loops
    sudo "$NOVA_LXD_DIR/tools/udev_rule.sh" remove "$NOVA_LXD_STATE/udev"
}

# Detaches loop devices of volumes that are files, and of config drives, whose
# files have been deleted.
function detach_nova_lxd_loops {
    local device file
    sudo losetup --list --noheadings --output NAME,BACK-FILE |
            while read -r device file; do
        if [[ $file == "$NOVA_STATE_PATH"/* ]]; then
            sudo losetup --detach "$device" || :
        fi
    done
}

# Deletes the driver's instances from a project that others may use as well.
function remove_nova_lxd_instances {
    local name role
    nova_lxc list --project "$NOVA_LXD_PROJECT" --format csv \
            --columns n,user.nova.role | while IFS=, read -r name role; do
        [[ -z $role ]] || nova_lxc delete --force "$name" \
            --project "$NOVA_LXD_PROJECT" || :
    done
}

function empty_nova_lxd_project {
    local name pool
    local -a project=(--project "$NOVA_LXD_PROJECT")
    for name in $(nova_lxc list "${project[@]}" --format csv --columns n); do
        nova_lxc delete --force "$name" "${project[@]}" || :
    done
    for name in $(nova_lxc image list "${project[@]}" --format csv --columns f); do
        nova_lxc image delete "$name" "${project[@]}" || :
    done
    for pool in $(nova_lxc query /1.0/storage-pools | tr -d '[]",'); do
        pool=${pool##*/}
        for name in $(nova_lxc query "/1.0/storage-pools/$pool/volumes/custom?project=$NOVA_LXD_PROJECT" |
                tr -d '[]",' | sed 's/?.*//'); do
            nova_lxc storage volume delete "$pool" "${name##*/}" \
                "${project[@]}" || :
        done
    done
    nova_lxc project delete "$NOVA_LXD_PROJECT" ||
        echo "Keeping the LXD project $NOVA_LXD_PROJECT: it is not empty."
}

# Removes the storage pool and LXD if the plugin has created them.
function remove_nova_lxd_daemon {
    local file line
    local -a packages
    if find_nova_lxd_daemon; then
        use_nova_lxd_daemon
        if [[ -s $NOVA_LXD_STATE/pool ]]; then
            nova_lxc storage delete "$(cat "$NOVA_LXD_STATE/pool")" || :
        fi
    fi
    if [[ -s $NOVA_LXD_STATE/packages ]]; then
        read -ra packages <"$NOVA_LXD_STATE/packages"
        case $NOVA_LXD_KIND in
        package) sudo systemctl stop lxd.socket lxd.service || : ;;
        incus) sudo systemctl stop incus.socket incus.service || : ;;
        esac
        uninstall_package "${packages[@]}"
        case $NOVA_LXD_KIND in
        package) remove_nova_lxd_data /var/lib/lxd /var/log/lxd /var/cache/lxd ;;
        incus) remove_nova_lxd_data /var/lib/incus /var/log/incus /var/cache/incus ;;
        esac
    fi
    if [[ -s $NOVA_LXD_STATE/snap ]]; then
        sudo snap remove --purge lxd
    fi
    for file in subuid subgid; do
        [[ -d $NOVA_LXD_STATE ]] || break
        while read -r line; do
            sudo sed -i "/^$line\$/d" "/etc/$file"
        done < <(cat "$NOVA_LXD_STATE/$file" "$NOVA_LXD_STATE/$file.own" 2>/dev/null)
    done
    sudo "$NOVA_LXD_DIR/tools/kernel_limits.sh" restore "$NOVA_LXD_STATE/limits"
    sudo rm -rf "$NOVA_LXD_STATE"
}

# Removes what LXD's package leaves when it is purged: directories with mounts.
function remove_nova_lxd_data {
    local directory target
    for directory; do
        awk -v top="$directory/" 'index($5, top) == 1 { print $5 }' \
                /proc/self/mountinfo | sort -r | while read -r target; do
            sudo umount "$target" || sudo umount --lazy "$target" || :
        done
        sudo rm -rf --one-file-system "$directory"
    done
}
