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

# OVN: both databases in one server, northd and the controller of this host.

readonly OVN_DB=unix:$OVN_SOCKET

step_ovn() {
    ((HOST_NUMBER > 1)) || start_ovn_central
    start_ovn_controller
}

start_ovn_central() {
    local name
    for name in nb sb; do
        ovsdb_file "$DATA/ovs/ovn$name.db" "/usr/share/ovn/ovn-$name.ovsschema"
    done
    daemon_start ovn-db "${OVS_ENV[@]}" ovsdb-server "$DATA/ovs/ovnnb.db" \
        "$DATA/ovs/ovnsb.db" --remote="punix:$OVN_SOCKET" \
        --unixctl="$OVS_RUN/ovn-db.ctl" -vconsole:warn -vsyslog:off
    wait_until 'OVN databases' 20 ovn-db env "${OVS_ENV[@]}" ovn-nbctl \
        --db="$OVN_DB" --timeout=5 init
    env "${OVS_ENV[@]}" ovn-sbctl --db="$OVN_DB" --timeout=10 init
    daemon_start ovn-northd "${OVS_ENV[@]}" ovn-northd \
        --ovnnb-db="$OVN_DB" --ovnsb-db="$OVN_DB" \
        --unixctl="$OVS_RUN/ovn-northd.ctl" -vconsole:warn -vsyslog:off
}

start_ovn_controller() {
    vsctl --no-wait set Open_vSwitch . \
        external-ids:ovn-remote="$OVN_DB" \
        external-ids:ovn-encap-type=geneve \
        external-ids:ovn-encap-ip="$(host_address)" \
        external-ids:ovn-bridge="$BRIDGE_INTEGRATION" \
        external-ids:ovn-bridge-datapath-type=netdev \
        external-ids:ovn-bridge-mappings="public:$BRIDGE_PUBLIC"
    # One host is the gateway of all routers.
    ((HOST_NUMBER > 1)) || vsctl --no-wait set Open_vSwitch . \
        external-ids:ovn-cms-options=enable-chassis-as-gw
    daemon_start ovn-controller "${OVS_ENV[@]}" ovn-controller "$OVSDB" \
        -vconsole:warn -vsyslog:off
    wait_until 'OVN chassis' 30 ovn-controller chassis_registered
}

chassis_registered() {
    [[ -n $(env "${OVS_ENV[@]}" ovn-sbctl --db="$OVN_DB" --timeout=5 --bare \
        --columns=name find Chassis name="$(system_id)") ]]
}
