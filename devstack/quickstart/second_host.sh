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

# A second compute host on this machine: an LXD with its storage pool, an Open
# vSwitch with OVN's controller, a metadata agent and a nova-compute in
# namespaces of their own for network, mounts and host name. A veth pair between
# the public bridges is its network cable: tunnels, migrations and floating IPs
# go over it. It shares the kernel with the first host, and its processes see
# those of the first.
#
# It reaches the control plane as the first host does, at the loopback address:
# haproxy listens there in its network namespace. Unix sockets (OVN's databases,
# MariaDB for the checks of this script) need nothing.

readonly -a SECOND_DAEMONS=(nova-compute neutron-ovn-agent ovn-controller
    ovs-vswitchd ovsdb-server lxd lxcfs)
readonly SECOND_NETNS=nova-lxd-compute-2
# Both ends of the veth pair have this name.
readonly UPLINK=lxd-compute-2
# What nova-compute, Neutron's agent and the checks connect to.
readonly -a SECOND_APIS=(keystone placement glance neutron nova-api
    nova-metadata cinder-api rabbitmq)

# Address of the compute host for other compute hosts.
host_address() {
    if ((COMPUTES == 1)); then
        printf '%s' "$LOCAL"
    else
        printf '%s' "$PUBLIC_NET.$HOST_NUMBER"
    fi
}

# Prints the PID of a daemon of the second host. Its namespaces live as long as
# one of them does.
second_host_pid() {
    local RUN=$RUN name
    daemon_pid compute-2 && return 0
    RUN=$SECOND_HOME/run
    for name in "${SECOND_DAEMONS[@]}"; do
        daemon_pid "$name" && return 0
    done
    return 1
}

# on_second_host FUNCTION [argument]...: runs a function of this script in the
# second host.
on_second_host() (
    local pid
    pid=$(second_host_pid) || die 'The second compute host is not running.'
    [[ -z ${LOCK:-} ]] || exec {LOCK}>&-
    exec nsenter --target "$pid" --net --mount --uts \
        env QUICKSTART_HOST_NUMBER=2 "QUICKSTART_PREFIX=$PREFIX" "$SELF" "$@"
)

declare_second_host() {
    local who='Second compute host'
    if [[ $COMPUTES == 1 ]]; then
        [[ ! -d $SECOND_HOME ]] ||
            step second-removal "$who: removal" nova-api lxd ovn
        return 0
    fi
    step compute-2 "$who: namespaces" ovs
    step compute-2-apis "$who: connection to the APIs" compute-2
    step second-network "$who: Open vSwitch and OVN" compute-2 ovn
    step second-lxd "$who: LXD and its storage pool" compute-2 lxd
    step second-agent "$who: metadata for guests" second-network \
        compute-2-apis neutron-db
    step second-nova-compute "$who: nova-compute" nova-conductor placement \
        identity driver second-lxd second-network compute-2-apis cinder-volume
}

# -- starting

step_compute_2() {
    if ! daemon_running compute-2; then
        stop_second_host
        mkdir -p "$SECOND_HOME"/{etc,log,run,data/undo}
        chmod 755 "$SECOND_HOME"
        chmod 700 "$SECOND_HOME/etc"
        chmod 711 "$SECOND_HOME/data"
        printf '%s-2\n' "$HOST" >"$SECOND_HOME/data/host"
        daemon_start compute-2 unshare --net --mount --uts \
            --propagation private sleep infinity
        wait_until 'Namespaces' 10 compute-2 holds_namespaces
        on_second_host prepare_namespaces || {
            daemon_stop compute-2
            return 1
        }
    fi
    connect_second_host
}

holds_namespaces() {
    [[ $(<"/proc/$(daemon_pid compute-2)/comm") == sleep ]]
}

# In the second host, before anything else.
prepare_namespaces() {
    local directory
    hostname "$HOST"
    ip link set lo up
    # What the first host has mounted would stay in use here.
    for directory in "$PREFIX"/{data,lxd,run} /run/nova-lxd-py /run/netns \
        /var/lib/lxcfs; do
        unmount_below "$directory"
    done
    mkdir -p /run/netns
    mount -t tmpfs -o mode=755 tmpfs /run/netns
    mount_sysfs
}

# /sys shows the network namespace of the process that mounts it; everything
# that is mounted below it, such as the control groups, stays.
mount_sysfs() {
    local new=$RUN/sys target
    mkdir -p "$new"
    mount -t sysfs sysfs "$new"
    awk '$5 == "/sys" { top = $1 } $2 == top { print $5 }' \
        /proc/self/mountinfo | while read -r target; do
        mount --rbind "$target" "$new${target#/sys}"
    done
    mount --move "$new" /sys
    rmdir "$new"
}

# Connects the public bridge with the second host.
connect_second_host() {
    local pid
    pid=$(daemon_pid compute-2)
    if [[ ! -e /sys/class/net/$UPLINK ]]; then
        # Open vSwitch does not open a new device of an old port.
        vsctl --if-exists del-port "$UPLINK"
        ip link add "$UPLINK" type veth peer name "$UPLINK" netns "$pid"
        ip netns delete "$SECOND_NETNS" 2>/dev/null || :
        ip netns attach "$SECOND_NETNS" "$pid"
    fi
    add_uplink
}

add_uplink() {
    ip link set "$UPLINK" up
    vsctl --may-exist add-port "$BRIDGE_PUBLIC" "$UPLINK"
}

step_compute_2_apis() {
    local file=$ETC/compute-2-apis.cfg name
    {
        cat <<EOF
global
    nbthread 1
defaults
    mode tcp
    timeout connect 10s
    # Connections to RabbitMQ may be quiet.
    timeout client 1d
    timeout server 1d
EOF
        for name in "${SECOND_APIS[@]}"; do
            cat <<EOF
listen $name
    bind $LOCAL:${PORT[$name]} namespace $SECOND_NETNS
    server first $LOCAL:${PORT[$name]}
EOF
        done
    } >"$file"
    WATCH=$file daemon_start compute-2-apis haproxy -db -f "$file"
    wait_until 'The connection to the APIs' 10 compute-2-apis on_second_host \
        port_open "${PORT[rabbitmq]}"
}

step_second_network() {
    on_second_host start_second_network
}

start_second_network() {
    step_ovs
    step_ovn
}

step_second_lxd() {
    on_second_host step_lxd
}

step_second_agent() {
    on_second_host start_second_agent
}

start_second_agent() {
    configure_neutron_agent
    step_neutron_agent
}

step_second_nova_compute() {
    on_second_host start_second_nova_compute
    "${CLEAN_ENV[@]}" "$VENV/bin/nova-manage" --config-file \
        "$ETC/nova/nova.conf" cell_v2 discover_hosts
}

start_second_nova_compute() {
    configure_nova_compute
    mkdir -p "$RUN/volumes"
    step_nova_compute
}

# Starts the whole second host, for restart.
start_second_host() {
    step_compute_2
    step_compute_2_apis
    step_second_network
    step_second_lxd
    step_second_agent
    step_second_nova_compute
}

# -- state

show_second_host() {
    local name RUN=$SECOND_HOME/run
    for name in "${SECOND_DAEMONS[@]}"; do
        show_daemon "$name" "$name-2"
    done
}

# Prints a line for each daemon of the second host that does not run.
dead_second_daemons() {
    local name RUN=$SECOND_HOME/run
    for name in "${SECOND_DAEMONS[@]}"; do
        [[ $name == lxcfs ]] || daemon_running "$name" ||
            printf '%s-2 is not running\n' "$name"
    done
}

# Checks that NAME is that of a daemon of the second host.
is_second_daemon() {
    [[ $1 == *-2 && " ${SECOND_DAEMONS[*]} " == *" ${1%-2} "* &&
        -d $SECOND_HOME ]]
}

# -- stopping

# In the second host: stops its guests by force, and its daemons.
stop_host() {
    local name
    for name in nova-compute neutron-ovn-agent; do
        daemon_stop "$name" 20 &
    done
    wait
    stop_lxd
    unmount_below "$DATA/nova"
    unmount_below "$RUN/volumes"
    # OVN forgets the host.
    daemon_stop ovn-controller 30
    stop_vswitchd
    daemon_stop ovsdb-server
}

# Stops the second host. With its last process go its mounts and network
# namespaces.
stop_second_host() {
    local pid mounts process
    local -a left=()
    if pid=$(second_host_pid); then
        mounts=$(readlink "/proc/$pid/ns/mnt")
        on_second_host stop_host || :
        daemon_stop compute-2-apis
        daemon_stop compute-2
        for process in /proc/[0-9]*; do
            [[ $(readlink "$process/ns/mnt") != "$mounts" ]] ||
                left+=("${process#/proc/}")
        done
        ((${#left[@]} == 0)) || kill -KILL "${left[@]}" 2>/dev/null || :
    fi
    ip netns delete "$SECOND_NETNS" 2>/dev/null || :
    ip link delete "$UPLINK" 2>/dev/null || :
    ! daemon_running ovsdb-server || vsctl --if-exists del-port "$UPLINK"
    rm -f "$SECOND_HOME"/run/ovs/*.{ctl,mgmt,snoop}
}

# -- removal

# Nova must know of no server on a host that goes for good.
check_second_host_unused() {
    local problem
    [[ $COMPUTES == 1 && -d $SECOND_HOME ]] || return 0
    daemon_running nova-api ||
        die "The cloud is down, and the second compute host may have" \
            "servers. Run \"$SELF up --computes 2\" first."
    problem=$(cloud_setup check-unused 2>&1) || die "$problem"
}

step_second_removal() {
    stop_second_host
    env "${OVS_ENV[@]}" ovn-sbctl --db="$OVN_DB" --timeout=10 --if-exists \
        chassis-del "$(<"$SECOND_HOME/data/system-id")"
    cloud_setup forget-host
    # The first host has nobody to migrate to.
    find_lxd
    lxc config unset core.https_address
    delete_subvolumes "$SECOND_HOME/lxd"
    rm -rf "$SECOND_HOME"
}
