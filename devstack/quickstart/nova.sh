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

# Nova: API, metadata API, conductor, scheduler, the proxy of serial consoles,
# and nova-compute with the driver.

# nova_common ADDRESS: prints what the control plane and the compute hosts have
# in common.
nova_common() {
    cat <<EOF
[DEFAULT]
use_stderr = false
state_path = $DATA/nova
host = $HOST
my_ip = $1
transport_url = $(rabbit_url)
allow_resize_to_same_host = true

[oslo_concurrency]
lock_path = $DATA/nova/lock

[service_user]
send_service_user_token = true
$(auth_options nova)

[placement]
$(auth_options placement)

[glance]
$(auth_options nova)

[cinder]
catalog_info = block-storage::publicURL
os_region_name = $REGION
$(auth_options nova)

[neutron]
service_metadata_proxy = true
metadata_proxy_shared_secret = $(secret)
$(auth_options nova)

$(token_sections nova)

$(messaging_sections)

[vnc]
enabled = false

[spice]
enabled = false

[serial_console]
enabled = true
base_url = ws://$LOCAL:${PORT[nova-serialproxy]}/
proxyclient_address = $1
serialproxy_host = $LOCAL
serialproxy_port = ${PORT[nova-serialproxy]}
EOF
}

configure_nova() {
    mkdir -p "$ETC/nova"
    # The WSGI applications expect both files in one directory.
    ln -sfn "$VENV/etc/nova/api-paste.ini" "$ETC/nova/api-paste.ini"
    {
        nova_common "$LOCAL"
        cat <<EOF

[api_database]
connection = $(database_url nova_api)

[database]
connection = $(database_url nova)

[api]
auth_strategy = keystone

[wsgi]
api_paste_config = $VENV/etc/nova/api-paste.ini

[conductor]
workers = 1

[scheduler]
workers = 1
discover_hosts_in_cells_interval = 60

[filter_scheduler]
# Nova's defaults, the filters for flavors with pinned CPUs, huge pages and PCI
# devices, and those for scheduler hints.
enabled_filters = ComputeFilter,ComputeCapabilitiesFilter,ImagePropertiesFilter,ServerGroupAntiAffinityFilter,ServerGroupAffinityFilter,NUMATopologyFilter,PciPassthroughFilter,SameHostFilter,DifferentHostFilter
EOF
    } >"$ETC/nova/nova.conf"
    configure_nova_compute
}

# nova-compute must not know the databases: it has its own file.
configure_nova_compute() {
    local file=$ETC/nova/nova-compute.conf
    mkdir -p "$ETC/nova" "$DATA/nova/instances"
    {
        nova_common "$(host_address)"
        cat <<EOF

[DEFAULT]
compute_driver = $COMPUTE_DRIVER
resume_guests_state_on_host_boot = true
force_config_drive = false
instances_path = $DATA/nova/instances
# Nova's default.
reimage_timeout_per_gb = $((20 * PATIENCE))
reserved_host_memory_mb = 512
# For hundreds of idle containers, which need little of what their flavors
# promise: an idle Debian takes 60 MiB or so, caches included, and clones of an
# image share its blocks.
cpu_allocation_ratio = 512.0
ram_allocation_ratio = 16.0
disk_allocation_ratio = 64.0

[os_vif_ovs]
ovsdb_connection = $OVSDB

[lxd]
endpoint = $LXD_HOME/unix.socket
project = nova
storage_pool = $POOL_NAME
# All users of this cloud are trusted with their volumes.
volume_filesystems = ext4
EOF
        ((COMPUTES == 1)) ||
            printf 'migration_address = %s\n' "$(host_address)"
        # Every nova-compute of a machine needs its own.
        ((HOST_NUMBER == 1)) ||
            printf 'volume_root_directory = %s\n' "$RUN/volumes"
        privsep_sections "$file" nova_sys_admin privsep_osbrick \
            vif_plug_ovs_privileged vif_plug_linux_bridge_privileged \
            nova_lxd_py_privileged nova_lxd_py_privileged_network
    } >"$file"
}

step_nova_db() {
    configure_nova
    # The cell mappings hold the host name and passwords of this cloud.
    OF_THIS_CLOUD='nova_api.cell_mappings nova_api.host_mappings' \
        make_schema nova 'nova_api nova nova_cell0' \
        "${CLEAN_ENV[@]}" "$VENV/bin/python" "$HERE/nova_schema.py" \
        "$ETC/nova/nova.conf" "$(database_url nova_cell0)" "$HOST"
}

step_nova_api() {
    WATCH="$ETC/nova/nova.conf $VENV/.driver" \
        wsgi_start nova-api nova.wsgi.osapi_compute:application \
        "${PORT[nova-api]}" OS_NOVA_CONFIG_DIR="$ETC/nova"
}

step_nova_metadata() {
    WATCH=$ETC/nova/nova.conf \
        wsgi_start nova-metadata nova.wsgi.metadata:application \
        "${PORT[nova-metadata]}" OS_NOVA_CONFIG_DIR="$ETC/nova"
}

# nova_daemon NAME FILE
nova_daemon() {
    local name=$1 conf=$2
    WATCH="${WATCH:-} $ETC/nova/$conf $VENV/.constraints" \
        daemon_start "$name" "${OVS_ENV[@]}" "$VENV/bin/$name" \
        --config-file "$ETC/nova/$conf" --log-file "$LOG/$name.log"
}

step_nova_conductor() {
    nova_daemon nova-conductor nova.conf
    wait_until nova-conductor 60 nova-conductor service_row nova-conductor
}

step_nova_scheduler() {
    nova_daemon nova-scheduler nova.conf
}

# The first server does not wait for it.
step_nova_serialproxy() {
    nova_daemon nova-serialproxy nova.conf
}

# Checks that a service has reported to the database since it was started, or
# for the first time.
service_row() {
    local pid age
    pid=$(daemon_pid "$1") || return 1
    age=$(($(date +%s) - $(stat -c %Y "/proc/$pid")))
    [[ $(sql nova -e "SELECT COUNT(*) FROM services WHERE deleted = 0 AND
        services.binary = '$1' AND host = '$HOST' AND (last_seen_up IS NULL OR
        TIMESTAMPDIFF(SECOND, last_seen_up, UTC_TIMESTAMP()) <= $age)") != 0 ]]
}

step_nova_compute() {
    # nova-compute mounts the share of the volumes itself.
    WATCH=$VENV/.driver PATH=$CINDER_BIN:$PATH \
        nova_daemon nova-compute nova-compute.conf
    wait_until nova-compute 120 nova-compute compute_node_known
}

compute_node_known() {
    service_row nova-compute &&
        [[ $(sql nova -e "SELECT COUNT(*) FROM compute_nodes
            WHERE deleted = 0 AND host = '$HOST'") != 0 ]]
}
