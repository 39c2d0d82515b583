# shellcheck shell=bash
# shellcheck disable=SC2154 # the script that sources this sets work, container
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

# A plain Debian with an init system in a system container, run by an LXD of its
# own and removed afterwards, for scripts that test on a fresh machine. They set
# container (its name) and work (a temporary directory), define say (a function
# that reports), and call container_down at the end.

export LXD_DIR=$work/lxd
container_bridge=nlp$$

container_tools() {
    local tool
    for tool in lxd lxc debootstrap dnsmasq nft; do
        command -v "$tool" >/dev/null || {
            say "Installing packages"
            DEBIAN_FRONTEND=noninteractive apt-get install -yq \
                --no-install-recommends lxd lxd-client debootstrap \
                dnsmasq-base nftables uidmap >/dev/null
            break
        }
    done
}

# container_rootfs SUITE [PACKAGE...]: makes a root filesystem in $work/rootfs,
# to which the caller can add files.
container_rootfs() {
    local suite=$1 mirror security packages
    shift
    packages=$(IFS=, && echo "systemd-sysv,dbus,iproute2,ca-certificates,git,procps${*:+,$*}")
    # A mirror that this machine uses can be reached from the container.
    # shellcheck disable=SC2016 # $(SITE) is for apt to expand
    mirror=$(apt-get indextargets --format '$(SITE)' | sort | uniq -c |
        sort -rn | awk '$2 !~ /security/ {print $2; exit}')
    mirror=${mirror:?no package mirror in the apt configuration}
    mirror=${mirror%/}
    # shellcheck disable=SC2016
    security=$(apt-get indextargets --format '$(SITE)' |
        awk '/security/ {print; exit}')
    say "Making a root filesystem of Debian $suite from $mirror"
    debootstrap --variant=minbase --include="$packages" "$suite" \
        "$work/rootfs" "$mirror" >"$work/debootstrap.log" 2>&1 || {
        tail -n 20 "$work/debootstrap.log" >&2
        return 1
    }
    {
        echo "deb $mirror $suite main"
        echo "deb $mirror $suite-updates main"
        [[ -z "$security" ]] || echo "deb ${security%/} $suite-security main"
    } >"$work/rootfs/etc/apt/sources.list"
    # Networks that inspect TLS have an authority of their own.
    cp /etc/ssl/certs/ca-certificates.crt "$work/rootfs/etc/ssl/certs/"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' \
        >"$work/rootfs/etc/pip.conf"
    rm -f "$work/rootfs/etc/resolv.conf"
    cp -L /etc/resolv.conf "$work/rootfs/etc/resolv.conf"
    cat >"$work/rootfs/etc/systemd/network/eth0.network" <<NET
[Match]
Name=eth0
[Network]
DHCP=ipv4
[DHCPv4]
UseDNS=no
NET
    mkdir -p "$work/rootfs/etc/systemd/system/multi-user.target.wants"
    ln -sf /lib/systemd/system/systemd-networkd.service \
        "$work/rootfs/etc/systemd/system/multi-user.target.wants/"
}

# Starts LXD, and the container from $work/rootfs.
container_up() {
    local subnet device number
    printf 'architecture: %s\ncreation_date: %d\n' "$(uname -m)" \
        "$(date +%s)" >"$work/metadata.yaml"
    tar -C "$work" -cf "$work/image.tar" metadata.yaml rootfs
    rm -rf "$work/rootfs"
    say "Starting LXD"
    mkdir -p "$LXD_DIR"
    setsid lxd --group root >"$work/lxd.log" 2>&1 &
    container_lxd=$!
    lxd waitready --timeout 60
    # Other scripts may use networks of the machine: take one that is free.
    subnet=$((RANDOM % 200 + 20))
    lxc network create "$container_bridge" \
        ipv4.address="10.$subnet.77.1/24" ipv4.nat=true ipv6.address=none \
        >/dev/null
    lxc storage create default dir >/dev/null
    lxc image import "$work/image.tar" --alias fresh >/dev/null
    rm -f "$work/image.tar"
    lxc init fresh "$container" --storage default --no-profiles \
        -c security.privileged=true -c security.nesting=true >/dev/null
    lxc config device add "$container" eth0 nic nictype=bridged \
        parent="$container_bridge" name=eth0 >/dev/null
    for device in fuse net/tun loop-control; do
        [[ -e /dev/$device ]] || continue
        lxc config device add "$container" "${device//\//-}" unix-char \
            source="/dev/$device" path="/dev/$device" >/dev/null
    done
    # A container does not see loop devices that the kernel creates later.
    for number in $(seq 0 63); do
        lxc config device add "$container" "loop$number" unix-block major=7 \
            minor="$number" path="/dev/loop$number" >/dev/null
    done
    lxc start "$container"
    container_wait || return
    container_cgroups
}

container_run() { lxc exec "$container" --cwd "${dir:-/root}" -- "$@"; }

container_wait() {
    local state
    say "Waiting for init system and network"
    for _ in $(seq 60); do
        state=$(container_run systemctl is-system-running 2>/dev/null || true)
        [[ "$state" == running || "$state" == degraded ]] &&
            container_run ip -4 route show default | grep -q . && {
            say "The init system is $state"
            return 0
        }
        sleep 1
    done
    echo "The container $container did not boot within 60 seconds: its init" \
        "system is '${state:-unknown}', its routes are" \
        "'$(container_run ip -4 route 2>/dev/null || :)'." >&2
    return 1
}

# Where a host mounts cgroup v1 controllers separately, a nested LXD fails if
# systemd mounts them together: use the host's layout in the container.
container_cgroups() {
    [[ -e /sys/fs/cgroup/cpuacct && ! -L /sys/fs/cgroup/cpuacct ]] || return 0
    # shellcheck disable=SC2016 # the shell inside expands them
    container_run bash -euc '
        mount -o remount,rw /sys/fs/cgroup
        for pair in cpu,cpuacct net_cls,net_prio; do
            [[ -d /sys/fs/cgroup/$pair ]] || continue
            umount "/sys/fs/cgroup/$pair" 2>/dev/null || true
            rmdir "/sys/fs/cgroup/$pair" || true
            for one in ${pair//,/ }; do
                rm -f "/sys/fs/cgroup/$one"
                grep -q "^$one[[:space:]]" /proc/cgroups || continue
                mkdir -p "/sys/fs/cgroup/$one"
                mount -t cgroup -o "$one" cgroup "/sys/fs/cgroup/$one" 2>/dev/null ||
                    rmdir "/sys/fs/cgroup/$one"
            done
        done'
}

container_down() {
    lxc delete --force "$container" >/dev/null 2>&1 || true
    lxc network delete "$container_bridge" >/dev/null 2>&1 || true
    lxd shutdown --timeout 30 >/dev/null 2>&1 || true
    [[ -z "${container_lxd:-}" ]] || wait "$container_lxd" 2>/dev/null || true
    # Mounts that a daemon has left below its directory.
    awk -v dir="$work/" 'index($2, dir) == 1 {print $2}' /proc/mounts |
        sort -r | xargs -r umount -l 2>/dev/null || true
    rm -rf "$work"
}
