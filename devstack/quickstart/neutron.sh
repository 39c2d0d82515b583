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

# Neutron with ML2/OVN, and the agent that serves metadata to the guests.

configure_neutron() {
    mkdir -p "$ETC/neutron" "$DATA/neutron"
    cat >"$ETC/neutron/neutron.conf" <<EOF
[DEFAULT]
log_file = $LOG/neutron.log
use_stderr = false
state_path = $DATA/neutron
transport_url = $(rabbit_url)
core_plugin = ml2
service_plugins = ovn-router,segments,port_forwarding,qos,trunk,placement
auth_strategy = keystone
dhcp_agent_notification = false
notify_nova_on_port_status_changes = true
notify_nova_on_port_data_changes = true
api_paste_config = $VENV/etc/neutron/api-paste.ini
api_workers = 1
rpc_workers = 0
host = $HOST

[database]
connection = $(database_url neutron)

[nova]
$(auth_options nova)

[placement]
$(auth_options placement)

[oslo_concurrency]
lock_path = $DATA/neutron/lock

$(token_sections neutron)

$(messaging_sections)

[agent]
root_helper =
EOF
    cat >"$ETC/neutron/ml2_conf.ini" <<EOF
[ml2]
type_drivers = flat,geneve
tenant_network_types = geneve
mechanism_drivers = ovn
extension_drivers = port_security,qos

[ml2_type_flat]
flat_networks = public

[ml2_type_geneve]
vni_ranges = 1:65535
max_header_size = 38

[securitygroup]
enable_security_group = true

[ovn]
ovn_nb_connection = $OVN_DB
ovn_sb_connection = $OVN_DB
ovn_metadata_enabled = true
enable_distributed_floating_ip = true
EOF
    configure_neutron_agent
}

configure_neutron_agent() {
    mkdir -p "$ETC/neutron" "$DATA/neutron"
    cat >"$ETC/neutron/agent.ini" <<EOF
[DEFAULT]
log_file = $LOG/neutron-ovn-agent.log
use_stderr = false
state_path = $DATA/neutron
host = $HOST
nova_metadata_host = $LOCAL
nova_metadata_port = ${PORT[nova-metadata]}
metadata_proxy_shared_secret = $(secret)
metadata_workers = 0

[agent]
root_helper =
extensions = metadata

[ovs]
ovsdb_connection = $OVSDB

[ovn]
ovn_nb_connection = $OVN_DB
ovn_sb_connection = $OVN_DB

[oslo_concurrency]
lock_path = $DATA/neutron/lock
$(privsep_sections "$ETC/neutron/agent.ini" privsep privsep_dhcp_release \
        privsep_ovs_vsctl privsep_namespace privsep_conntrack privsep_link)
EOF
}

step_neutron_db() {
    configure_neutron
    make_schema neutron neutron \
        "${CLEAN_ENV[@]}" "$VENV/bin/neutron-db-manage" \
        --config-file "$ETC/neutron/neutron.conf" \
        --config-file "$ETC/neutron/ml2_conf.ini" upgrade heads
}

step_neutron() {
    WATCH="$ETC/neutron/neutron.conf $ETC/neutron/ml2_conf.ini" \
        wsgi_start neutron neutron.wsgi.api:application "${PORT[neutron]}" \
        OS_NEUTRON_CONFIG_DIR="$ETC/neutron" \
        OS_NEUTRON_CONFIG_FILES='neutron.conf;ml2_conf.ini'
}

neutron_daemon() {
    WATCH="$ETC/neutron/neutron.conf $ETC/neutron/ml2_conf.ini" \
        daemon_start "$1" "$VENV/bin/$1" \
        --config-file "$ETC/neutron/neutron.conf" \
        --config-file "$ETC/neutron/ml2_conf.ini" --log-file "$LOG/$1.log"
}

# Repairs what differs between Neutron's database and OVN's. Servers do not
# wait for these two.
step_neutron_workers() {
    neutron_daemon neutron-ovn-maintenance-worker
    neutron_daemon neutron-periodic-workers
}

step_neutron_agent() {
    local shared=$PREFIX/etc/neutron/neutron.conf
    WATCH="$shared $ETC/neutron/agent.ini" \
        daemon_start neutron-ovn-agent "${OVS_ENV[@]}" \
        "$VENV/bin/neutron-ovn-agent" \
        --config-file "$shared" \
        --config-file "$ETC/neutron/agent.ini" \
        --log-file "$LOG/neutron-ovn-agent.log"
    wait_until neutron-ovn-agent 60 neutron-ovn-agent \
        test -S "$DATA/neutron/metadata_proxy"
}
