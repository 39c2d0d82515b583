#!/usr/bin/env bash
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

# Runs an OpenStack cloud with the LXD driver on this machine.

set -euo pipefail

SELF=$(readlink -f "${BASH_SOURCE[0]}")
HERE=${SELF%.sh}
REPO=$(readlink -f "$HERE/../..")
PATH=$PATH:/usr/sbin:/sbin

for part in settings output steps process packages python database messaging \
    lxd ovs ovn openstack keystone glance placement neutron nova second_host \
    lvm cinder image-tiny image-system images network client status up down; do
    # shellcheck source=/dev/null
    . "$HERE/$part.sh"
done
# shellcheck source=tools/as_root.sh
. "$REPO/tools/as_root.sh"

usage() {
    cat <<EOF
Usage: $0 COMMAND [option]...

Run an OpenStack cloud on this machine whose servers are LXD containers:
keystone, glance, placement, neutron with OVN, nova with this driver, cinder if
requested, and the services they need, all below $PREFIX. Needs root; the
script runs itself with sudo if it is not root already.

  up                    install what is missing, start what does not run and
                        boot a first server; safe to repeat
      --server lxd|incus
                        what runs the containers (default: LXD, or Incus if
                        the distribution has no LXD)
      --pool btrfs|dir  storage pool of the servers (default: btrfs on a file)
      --pool-size SIZE  size of that file, which is sparse (default $POOL_SIZE)
      --no-server       do not boot a first server (--server undoes it)
      --no-nat          guests reach only this host (--nat undoes it)
      --with-cinder     install cinder as well (--no-cinder undoes it)
      --computes 1|2    compute hosts (default 1). The second one has its own
                        LXD, Open vSwitch, address and nova-compute; its
                        services have names such as nova-compute-2
  status                show which services run and whether they work
  down                  stop everything, keep servers and data
  restart NAME...       restart services, for example nova-compute
  logs NAME [-f]        show the end of a service's log
  purge [--keep-cache]  remove everything except the distribution's packages;
                        with --keep-cache keep the Python environment and
                        the guest images

Environment: QUICKSTART_PREFIX (default /opt/nova-lxd),
QUICKSTART_PORT_OFFSET (added to every port), QUICKSTART_PUBLIC_NET and
QUICKSTART_PRIVATE_NET (first three numbers of a network; the private one has
4094 addresses),
QUICKSTART_COMPUTE_DRIVER (another compute driver, for comparisons),
QUICKSTART_PATIENCE (factor for all timeouts, for a slow machine). Options and
settings of "up" are saved, except for the prefix.
EOF
}

parse_up_options() {
    while (($#)); do
        case $1 in
        --pool)
            [[ ${2:-} == btrfs || ${2:-} == dir ]] ||
                die '--pool takes btrfs or dir.'
            POOL_DRIVER=$2
            shift
            ;;
        --pool-size)
            [[ ${2:-} =~ ^[0-9]+[GT]iB$ ]] ||
                die '--pool-size takes a size such as 20GiB.'
            POOL_SIZE=$2
            shift
            ;;
        --no-server) WITH_SERVER=no ;;
        --server)
            case ${2:-} in
            lxd | incus)
                CONTAINER_SERVER=$2
                shift
                ;;
            *) WITH_SERVER=yes ;;
            esac
            ;;
        --no-nat) WITH_NAT=no ;;
        --nat) WITH_NAT=yes ;;
        --with-cinder | --cinder) WITH_CINDER=yes ;;
        --no-cinder) WITH_CINDER=no ;;
        --computes)
            [[ ${2:-} == [12] ]] || die '--computes takes 1 or 2.'
            COMPUTES=$2
            shift
            ;;
        *) die "Unknown option of up: $1; see $0 --help." ;;
        esac
        shift
    done
    compare_with_saved
}

# Some settings can be changed by a later `up`, others are fixed when the cloud
# is made.
compare_with_saved() {
    local key
    ((${#SAVED[@]})) || return 0
    for key in CONTAINER_SERVER POOL_DRIVER POOL_SIZE PORT_OFFSET \
        PUBLIC_NET PRIVATE_NET; do
        [[ ${SAVED[$key]:-${!key}} == "${!key}" ]] ||
            die "This cloud was made with $key=${SAVED[$key]}. Purge it to" \
                "use $key=${!key}."
    done
    for key in WITH_SERVER WITH_NAT WITH_CINDER COMPUTE_DRIVER COMPUTES; do
        [[ ${SAVED[$key]:-} == "${!key}" ]] || SETTINGS_CHANGED=yes
    done
}

command_restart() {
    local name
    (($#)) || die 'restart needs the name of a service; see status.'
    for name; do
        [[ " ${DAEMONS[*]} " == *" $name "* ]] ||
            is_second_daemon "$name" ||
            die "There is no service $name; see $0 status."
    done
    HOST=$(<"$DATA/host")
    find_lxd || :
    for name; do
        restart_any "$name" >"$LOG/steps/restart-$name.log" 2>&1 || {
            tail -n 20 "$LOG/steps/restart-$name.log" >&3
            die "$name did not start."
        }
        say "$name was restarted, pid $(any_pid "$name")."
    done
}

# Restarts a service of either host.
restart_any() {
    if is_second_daemon "$1"; then
        on_second_host restart_service "${1%-2}"
    else
        restart_service "$1"
    fi
}

restart_service() {
    daemon_stop "$1" 30
    start_service "$1"
}

any_pid() {
    if is_second_daemon "$1"; then
        RUN=$SECOND_HOME/run daemon_pid "${1%-2}"
    else
        daemon_pid "$1"
    fi
}

# The step that starts a service.
start_service() {
    case $1 in
    epmd) step_rabbitmq ;;
    ovsdb-server | ovs-vswitchd) step_ovs ;;
    ovn-*) step_ovn ;;
    lxcfs) step_lxd ;;
    iscsid) step_cinder_lvm ;;
    neutron-ovn-agent) step_neutron_agent ;;
    compute-2) start_second_host ;;
    neutron-ovn-maintenance-worker | neutron-periodic-workers)
        step_neutron_workers
        ;;
    *) "step_${1//-/_}" ;;
    esac
}

command_logs() {
    local file=$LOG/${1:-}.log
    ! is_second_daemon "${1:-}" || file=$SECOND_HOME/log/${1%-2}.log
    [[ -e $file ]] || die "There is no log ${1:-}. Logs:" \
        "$(cd "$LOG" && printf '%s ' -- *.log)"
    tail -n 100 "${@:2}" "$file"
}

main() {
    local command=${1:---help}
    SETTINGS_CHANGED=''
    KEEP_CACHE=no
    if ((HOST_NUMBER > 1)); then
        # See on_second_host.
        HOST=$(<"$DATA/host")
        "$@"
        return
    fi
    case $command in
    -h | --help | help)
        usage
        return 0
        ;;
    up | down | status | restart | logs | purge) ;;
    *)
        usage >&2
        return 2
        ;;
    esac
    as_root "$SELF" "$@"
    shift
    case $command in
    up)
        parse_up_options "$@"
        leave_login_session up "$@"
        with_lock command_up
        ;;
    down) with_lock command_down ;;
    status)
        guest_distribution
        [[ ! -s $DATA/host ]] || HOST=$(<"$DATA/host")
        command_status
        ;;
    restart)
        leave_login_session restart "$@"
        with_lock command_restart "$@"
        ;;
    logs) command_logs "$@" ;;
    purge)
        [[ ${1:-} != --keep-cache ]] || KEEP_CACHE=yes
        with_lock command_purge
        ;;
    esac
}

# Allows one command at a time that changes something. Daemons must not inherit
# the lock, so each closes it when it starts.
with_lock() {
    exec {LOCK}>"/run/lock/nova-lxd-quickstart.lock"
    flock --nonblock "$LOCK" ||
        die 'Another quickstart command is running; wait for it.'
    "$@"
}

main "$@"
