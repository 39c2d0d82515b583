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

# `up`: installs what is missing, starts what does not run.

# Checks what would fail later with an unclear message.
check_host() {
    local id version
    # shellcheck source=/dev/null
    id=$(. /etc/os-release && echo "$ID")
    # shellcheck source=/dev/null
    version=$(. /etc/os-release && echo "${VERSION_ID:-}")
    case $id-$version in
    debian-12 | debian-13) ;;
    debian-* | ubuntu-*)
        warn "$id $version is not tested; Debian 12 and 13 are."
        ;;
    *)
        die "$id is not supported: Debian (best: 12) or Ubuntu is needed."
        ;;
    esac
    ((${#PREFIX} <= MAX_PREFIX_LENGTH)) ||
        die "QUICKSTART_PREFIX may have at most $MAX_PREFIX_LENGTH characters."
    [[ $PREFIX == /* && $PREFIX != *[[:space:]]* ]] ||
        die 'QUICKSTART_PREFIX must be an absolute path without spaces.'
    # nova-compute and the guests need about 3 GiB together.
    local available
    available=$(awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo)
    ((available >= 3000)) || daemon_running mariadb ||
        warn "Only $available MiB of memory are available; 4 GiB are needed."
}

# Checks that our ports and networks are free.
check_ports() {
    local name port taken=''
    for name in "${!PORT[@]}"; do
        port=${PORT[$name]}
        is_wanted "$name" || continue
        # RabbitMQ has a second port, for Erlang distribution.
        daemon_running "${name%-dist}" && continue
        port_open "$port" && taken+=" $port ($name)"
    done
    [[ -z $taken ]] || die "These ports are in use by other programs:$taken." \
        "Stop them, or set QUICKSTART_PORT_OFFSET (for example 20000) to" \
        "move all ports of the quickstart cloud."
}

check_networks() {
    local route
    daemon_running ovs-vswitchd && return 0
    for route in "$PUBLIC_NET.0/24" "$PRIVATE_CIDR"; do
        # Routes to the network, or to a part of it.
        if ip -4 route show root "$route" 2>/dev/null |
            grep -qv " $BRIDGE_PUBLIC "; then
            die "This host has a route to $route already. Set" \
                "QUICKSTART_PUBLIC_NET or QUICKSTART_PRIVATE_NET to the" \
                "first three numbers of another network."
        fi
    done
}

# Moves to a systemd scope, so that the cloud survives the end of the login
# session.
leave_login_session() {
    [[ -d /run/systemd/system && -z ${NOVA_LXD_SCOPE:-} ]] || return 0
    command -v systemd-run >/dev/null || return 0
    export NOVA_LXD_SCOPE=1
    exec systemd-run --scope --quiet --collect --slice=system.slice \
        --unit="nova-lxd-quickstart-$$" -p Delegate=yes -p TasksMax=infinity \
        "$SELF" "$@"
}

prepare_prefix() {
    mkdir -p "$PREFIX" "$ETC/uwsgi" "$LOG/steps" "$RUN" "$DATA/undo" "$CACHE"
    chmod 755 "$PREFIX"
    # Passwords are in there.
    chmod 700 "$ETC" "$DATA"
    chmod 711 "$DATA"
    make_secret
    [[ -s $DATA/host ]] || hostname >"$DATA/host"
    HOST=$(<"$DATA/host")
}

save_settings() {
    local key
    for key in CONTAINER_SERVER POOL_DRIVER POOL_SIZE WITH_SERVER WITH_NAT \
        WITH_CINDER COMPUTE_DRIVER COMPUTES PORT_OFFSET PUBLIC_NET \
        PRIVATE_NET; do
        printf '%s=%s\n' "$key" "${!key}"
    done >"$PREFIX/settings.new"
    # A step of the second host may be reading them.
    mv "$PREFIX/settings.new" "$PREFIX/settings"
}

# Checks that environment, driver and images match the checkout.
installed_as_wanted() {
    cmp -s "$REPO/constraints.txt" "$VENV/.constraints" &&
        [[ -s $VENV/.driver && $(<"$VENV/.driver") == "$(driver_stamp)" ]] &&
        [[ -s $(tiny_image_file) && -s $(guest_image_file) ]] &&
        [[ -x $BIN/openstack ]] && command -v openstack >/dev/null
}

declare_steps() {
    step packages-first 'Packages for the installation'
    step packages 'Packages of the servers' packages-first
    step venv 'OpenStack from PyPI' packages-first
    step driver 'The LXD driver' venv
    step tiny-image 'Guest image: tiny' packages-first
    step guest-image "Guest image: $GUEST_IMAGE" packages-first
    step mariadb 'MariaDB' packages
    step neutron-db 'Neutron: database' mariadb venv
    step rabbitmq 'RabbitMQ' packages
    step keystone-db 'Keystone: database' mariadb venv
    step nova-db 'Nova: databases' mariadb venv
    step ovs 'Open vSwitch' packages
    step ovn 'OVN' ovs
    step keystone 'Keystone' keystone-db
    step identity 'Users and endpoints' keystone
    step neutron 'Neutron' neutron-db ovn rabbitmq
    step lxd 'LXD and its storage pool' packages
    step placement-db 'Placement: database' mariadb venv
    step glance-db 'Glance: database' mariadb venv
    step placement 'Placement' placement-db
    # Makes requests to Placement when it starts.
    step nova-conductor 'Nova: conductor' nova-db rabbitmq identity placement
    # Restarting servers with volumes needs Cinder.
    step nova-compute 'Nova: compute host' nova-conductor placement identity \
        lxd driver ovs cinder-volume
    # Validates the extra specs of flavors by the driver's table.
    step nova-api 'Nova: API' nova-db rabbitmq identity driver
    step network 'Networks and router' neutron identity
    step glance 'Glance' glance-db
    step nova-scheduler 'Nova: scheduler' nova-conductor placement
    step upload 'Images into Glance' glance identity tiny-image guest-image
    step flavors 'Flavors, quotas and key pair' nova-api identity
    step neutron-agent 'Metadata for guests' ovn neutron-db
    step nova-metadata 'Nova: metadata API' nova-db rabbitmq identity
    step client 'The openstack command' identity
    [[ $WITH_CINDER == no ]] || declare_cinder_steps
    [[ $WITH_NAT == no ]] || step nat 'NAT for guests' ovs
    declare_second_host
    if [[ $WITH_SERVER == yes ]]; then
        step server 'The first server' nova-compute nova-api nova-scheduler \
            network upload flavors neutron-agent nova-metadata
        step neutron-workers 'Neutron: background workers' server
        step nova-serialproxy 'Nova: serial consoles' server
        step login 'The first server answers on SSH' server
    else
        step neutron-workers 'Neutron: background workers' neutron
        step nova-serialproxy 'Nova: serial consoles' nova-db identity
    fi
}

declare_cinder_steps() {
    step cinder-packages 'Cinder from PyPI' venv packages driver
    step cinder-db 'Cinder: database' mariadb cinder-packages rabbitmq
    step cinder-api 'Cinder: API' cinder-db identity
    step cinder-scheduler 'Cinder: scheduler' cinder-db
    step cinder-lvm 'Cinder: LVM with iSCSI' cinder-packages
    step cinder-volume 'Cinder: volumes' cinder-db cinder-lvm
    step volume-types 'Volume types' cinder-api
}

show_how_to_go_on() {
    local openstack=openstack address
    command -v openstack >/dev/null || openstack=$BIN/openstack
    say ''
    if [[ -s $DATA/first-address ]]; then
        address=$(<"$DATA/first-address")
        say "The first server is at $address. Log in:"
        say "  ssh -i $PREFIX/keys/id_ed25519 $GUEST_IMAGE@$address"
    fi
    say 'Another server:'
    say "  $openstack --os-cloud $CLOUD server create --image $GUEST_IMAGE" \
        "--flavor lxd.small \\"
    say '      --network private --key-name quickstart --wait second'
    say "As administrator: --os-cloud $CLOUD-admin. Other commands:" \
        "$SELF --help"
}

command_up() {
    local begin problems
    begin=$(now_us)
    UP_BEGIN=$begin
    check_host
    guest_distribution
    if [[ -e $PREFIX/settings && -s $DATA/host ]]; then
        HOST=$(<"$DATA/host")
        if daemon_running nova-compute && [[ -z $SETTINGS_CHANGED ]] &&
            installed_as_wanted && health_problems >/dev/null &&
            [[ $WITH_SERVER == no || -s $DATA/first-address ]] &&
            [[ $COMPUTES == 2 || ! -d $SECOND_HOME ]]; then
            say "The quickstart cloud is up already" \
                "(checked in $(elapsed "$begin") s)."
            show_how_to_go_on
            return 0
        fi
    fi
    title "Starting the quickstart cloud at $PREFIX"
    check_ports
    check_networks
    check_second_host_unused
    prepare_prefix
    save_settings
    [[ $WITH_NAT == yes ]] || undo_nat
    [[ $WITH_CINDER == yes ]] || stop_cinder
    declare_steps
    run_steps
    [[ -z $FAILED_STEPS ]] || exit 1
    say ''
    title "The cloud is up after $(elapsed "$begin") s."
    [[ ! -s $LOG/steps/server.when ]] ||
        say "The first server was ACTIVE after $(<"$LOG/steps/server.when") s."
    [[ $WITH_CINDER == no ]] || say_volume_backends
    show_how_to_go_on
}
