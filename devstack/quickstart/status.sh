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

# `status`: which services run and whether they work.

readonly -a CINDER_DAEMONS=(cinder-volume cinder-scheduler cinder-api)
# All daemons in the order in which they are stopped, without those of the
# second compute host.
readonly -a DAEMONS=(nova-compute "${CINDER_DAEMONS[@]}" nova-scheduler
    nova-api nova-metadata nova-serialproxy nova-conductor
    neutron-periodic-workers neutron-ovn-maintenance-worker neutron-ovn-agent
    neutron glance placement keystone ovn-controller
    ovn-northd ovn-db ovs-vswitchd ovsdb-server lxd lxcfs iscsid rabbitmq epmd
    mariadb compute-2-apis compute-2)

readonly -a HTTP_SERVICES=(keystone glance placement neutron nova-api
    nova-metadata cinder-api)

# Checks whether this cloud needs the daemon.
is_wanted() {
    case $1 in
    cinder-*) [[ $WITH_CINDER == yes ]] ;;
    iscsid) [[ $WITH_CINDER == yes ]] && has_lvm && ! other_iscsid ;;
    compute-2*) [[ $COMPUTES == 2 ]] ;;
    esac
}

# Prints a line for each daemon that should run and does not.
dead_daemons() {
    local name
    for name in "${DAEMONS[@]}"; do
        # The host's own lxcfs will do.
        [[ $name != lxcfs ]] || continue
        is_wanted "$name" || continue
        daemon_running "$name" || printf '%s is not running\n' "$name"
    done
    [[ $COMPUTES == 1 ]] || dead_second_daemons
}

# Prints a line for each HTTP service that does not answer.
silent_services() {
    local name
    for name in "${HTTP_SERVICES[@]}"; do
        is_wanted "$name" || continue
        http_answers "$(service_url "$name")/" ||
            printf '%s does not answer at %s\n' "$name" "$(service_url "$name")"
    done
}

# Prints the problems, and fails if there are any.
health_problems() {
    local problems
    problems=$(dead_daemons)
    if [[ -z $problems ]]; then
        ip -4 address show dev "$BRIDGE_PUBLIC" 2>/dev/null |
            grep -q " $PUBLIC_NET\.1/" ||
            problems+="$BRIDGE_PUBLIC has lost its address"$'\n'
        [[ $WITH_NAT == no ]] ||
            nft list table ip nova_lxd_quickstart >/dev/null 2>&1 ||
            problems+='The NAT rules for guests are missing'$'\n'
        problems+=$(silent_services)
        # Checks through the APIs that the services see each other.
        [[ -n $problems ]] || problems=$(cloud_setup health 2>&1 | tail -n 5)
    fi
    [[ -n $problems ]] || return 0
    printf '%s\n' "$problems"
    return 1
}

# show_daemon NAME [TITLE]
show_daemon() {
    local name=$1 title=${2:-$1} pid memory
    if pid=$(daemon_pid "$name"); then
        memory=$(awk '/^VmRSS/ { printf "%d", $2 / 1024 }' "/proc/$pid/status")
        say "$(printf '  %-32s pid %-8s %5s MiB' "$title" "$pid" "$memory")"
    elif [[ $name == lxcfs ]]; then
        say "$(printf '  %-32s %s' "$title" "the host's, or not running")"
    else
        say "$(printf '  %-32s %s' "$title" "${RED}not running$PLAIN")"
    fi
}

command_status() {
    local name problems
    if [[ ! -e $PREFIX/settings ]]; then
        say "There is no quickstart cloud at $PREFIX."
        return 3
    fi
    title "Quickstart cloud at $PREFIX"
    for name in "${DAEMONS[@]}"; do
        ! is_wanted "$name" || show_daemon "$name"
    done
    [[ $COMPUTES == 1 ]] || show_second_host
    if problems=$(health_problems); then
        say "${GREEN}All services answer.$PLAIN"
        show_how_to_go_on
    else
        say "${RED}Not healthy:$PLAIN"
        say "${problems//$'\n'/; }"
        say "Run $SELF up to repair it."
        return 1
    fi
}
