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

# Our own Open vSwitch with the userspace datapath, which needs no kernel module
# and does not interfere with an Open vSwitch of the host.

readonly OVSDB=unix:$OVS_RUN/db.sock
readonly -a OVS_ENV=(
    OVS_RUNDIR="$OVS_RUN" OVS_LOGDIR="$LOG/ovs" OVS_DBDIR="$DATA/ovs"
    OVS_SYSCONFDIR="$ETC" OVN_RUNDIR="$OVS_RUN" OVN_LOGDIR="$LOG/ovs"
    OVN_DBDIR="$DATA/ovs"
)

vsctl() {
    env "${OVS_ENV[@]}" ovs-vsctl --db="$OVSDB" --timeout=30 "$@"
}

# Creates a database file, or converts an existing one to the installed schema.
ovsdb_file() {
    local file=$1 schema=$2
    if [[ ! -s $file ]]; then
        ovsdb-tool create "$file" "$schema"
    elif [[ $(ovsdb-tool needs-conversion "$file" "$schema") == yes ]]; then
        ovsdb-tool convert "$file" "$schema"
    fi
}

# Checks whether a process of this network namespace has the tap interface open.
tap_is_open() {
    local pid own
    own=$(readlink /proc/self/ns/net)
    while read -r pid; do
        [[ $(readlink "/proc/$pid/ns/net") != "$own" ]] || return 0
    done < <(grep -lsx "iff:[[:space:]]*$1" /proc/[0-9]*/fdinfo/* |
        cut -d/ -f3 | sort -u)
    return 1
}

# Prints the name of a foreign interface that has the name of one of our
# bridges.
foreign_bridge() {
    local name
    daemon_running ovs-vswitchd && return 1
    for name in "$BRIDGE_INTEGRATION" "$BRIDGE_PUBLIC"; do
        [[ -e /sys/class/net/$name ]] || continue
        # Our taps remain when ovs-vswitchd is killed.
        if [[ ! -e /sys/class/net/$name/tun_flags ]] || tap_is_open "$name"
        then
            printf '%s' "$name"
            return 0
        fi
    done
    return 1
}

# Removes the tap interfaces that Open vSwitch left behind.
remove_taps() {
    local name
    for name in "$BRIDGE_INTEGRATION" "$BRIDGE_PUBLIC" ovs-netdev; do
        if [[ -e /sys/class/net/$name/tun_flags ]] && ! tap_is_open "$name"
        then
            ip link delete "$name"
        fi
    done
}

# Stops ovs-vswitchd, which removes its interfaces.
stop_vswitchd() {
    if daemon_running ovs-vswitchd; then
        timeout 10 ovs-appctl -t "$OVS_RUN/ovs-vswitchd.ctl" exit --cleanup ||
            :
    fi
    daemon_stop ovs-vswitchd
    remove_taps
}

step_ovs() {
    local name
    mkdir -p "$OVS_RUN" "$LOG/ovs" "$DATA/ovs"
    if name=$(foreign_bridge); then
        die "The interface $name exists already: another Open vSwitch or a" \
            "network of this host uses it. The quickstart cloud needs the" \
            "names $BRIDGE_INTEGRATION and $BRIDGE_PUBLIC."
    fi
    daemon_running ovs-vswitchd || remove_taps
    ovsdb_file "$DATA/ovs/conf.db" /usr/share/openvswitch/vswitch.ovsschema
    daemon_start ovsdb-server "${OVS_ENV[@]}" ovsdb-server \
        "$DATA/ovs/conf.db" --remote="punix:$OVS_RUN/db.sock" \
        --unixctl="$OVS_RUN/ovsdb-server.ctl" -vconsole:warn -vsyslog:off
    wait_until 'OVS database' 20 ovsdb-server vsctl --no-wait show
    vsctl --no-wait init -- set Open_vSwitch . \
        external-ids:system-id="$(system_id)" \
        external-ids:hostname="$HOST" \
        external-ids:rundir="$OVS_RUN"
    # Connection tracking in Open vSwitch 3.1 may abort while many servers are
    # created ("conn_type == CT_CONN_TYPE_DEFAULT failed"); --monitor restarts
    # it.
    daemon_start ovs-vswitchd "${OVS_ENV[@]}" ovs-vswitchd "$OVSDB" --monitor \
        --unixctl="$OVS_RUN/ovs-vswitchd.ctl" -vconsole:warn -vsyslog:off
    wait_until 'Open vSwitch' 30 ovs-vswitchd vsctl \
        --may-exist add-br "$BRIDGE_PUBLIC" \
        -- set bridge "$BRIDGE_PUBLIC" datapath_type=netdev \
        other-config:hwaddr="fa:16:3e:00:00:0$HOST_NUMBER" \
        -- --may-exist add-br "$BRIDGE_INTEGRATION" \
        -- set bridge "$BRIDGE_INTEGRATION" datapath_type=netdev \
        fail-mode=secure other-config:disable-in-band=true
    wait_until "$BRIDGE_PUBLIC" 20 ovs-vswitchd \
        test -e "/sys/class/net/$BRIDGE_PUBLIC"
    ip link set "$BRIDGE_INTEGRATION" up
    ip link set "$BRIDGE_PUBLIC" up
    ip address replace "$PUBLIC_NET.$HOST_NUMBER/24" dev "$BRIDGE_PUBLIC"
    # The userspace datapath does not complete checksums.
    ethtool -K "$BRIDGE_PUBLIC" tx off
    ((HOST_NUMBER == 1)) || add_uplink
}

# A stable name for this host in OVN.
system_id() {
    [[ -s $DATA/system-id ]] || cat /proc/sys/kernel/random/uuid \
        >"$DATA/system-id"
    cat "$DATA/system-id"
}
