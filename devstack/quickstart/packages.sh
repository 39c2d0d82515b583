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

# The distribution's packages.

# Packages for the first steps; few, so that the Python environment and the
# guest image can be made while the servers are being unpacked.
readonly -a FIRST_PACKAGES=(python3 python3-venv ca-certificates curl
    debootstrap mmdebstrap busybox-static dropbear-bin squashfs-tools
    genisoimage xz-utils zstd)

readonly -a SERVER_PACKAGES=(mariadb-server rabbitmq-server
    openvswitch-switch ovn-central ovn-host haproxy lxcfs uidmap
    btrfs-progs ethtool iproute2 iptables nftables kmod openssh-client
    dnsmasq-base attr rsync acl procps util-linux)

package_installed() {
    [[ -z $(missing_packages "$1") ]]
}

# Calls dpkg-query once: each call reads the whole database.
missing_packages() {
    local name
    local -A have=()
    while read -r name; do
        have[$name]=1
    done < <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" \
        2>/dev/null | sed -n 's/^installed //p')
    for name; do
        [[ -n ${have[$name]:-} ]] || printf '%s ' "$name"
    done
}

# Debian 12 and 13 package LXD, Debian 13 and Ubuntu 24.04 package Incus.
lxd_packages() {
    if [[ ${CONTAINER_SERVER:-} == incus ]]; then
        echo incus-base incus-client
    # With -q grep could end before apt-cache, which would be an error then.
    elif package_installed lxd || apt-cache show lxd 2>/dev/null |
        grep '^Version: [1-9]*:*5' >/dev/null; then
        echo lxd lxd-client
    else
        echo incus
    fi
}

# Keeps dpkg from starting the services of new packages: this cloud runs its
# own. An existing policy of the operator is restored afterwards.
forbid_service_start() {
    local policy=/usr/sbin/policy-rc.d
    if [[ -e $policy && ! -e $policy.nova-lxd ]]; then
        mv "$policy" "$policy.nova-lxd"
    fi
    printf '#!/bin/sh\n# nova-lxd quickstart, for the time of an install\nexit 101\n' \
        >"$policy"
    chmod 755 "$policy"
}

allow_service_start() {
    local policy=/usr/sbin/policy-rc.d
    if grep -qs 'nova-lxd quickstart' "$policy"; then
        rm -f "$policy"
    fi
    if [[ -e $policy.nova-lxd ]]; then
        mv "$policy.nova-lxd" "$policy"
    fi
}

install_packages() {
    local -a missing
    read -ra missing <<<"$(missing_packages "$@")"
    ((${#missing[@]})) || return 0
    echo "Installing: ${missing[*]}"
    trap allow_service_start EXIT
    forbid_service_start
    # Completes an interrupted installation.
    DEBIAN_FRONTEND=noninteractive dpkg --configure -a
    DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 apt-get install --yes --quiet \
        --no-install-recommends -o Dpkg::Use-Pty=0 \
        -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 \
        -o Dpkg::Options::=--force-confold \
        -o Dpkg::Options::=--force-unsafe-io "${missing[@]}"
    disable_units "${missing[@]}"
}

# The services of new packages must not start at the next boot either: they
# would use the ports of ours.
disable_units() {
    local -a units
    command -v systemctl >/dev/null || return 0
    read -ra units -d '' < <(dpkg-query -L "$@" 2>/dev/null | sed -n \
        's#^\(/usr\)\?/lib/systemd/system/\([^/@]*\.\(service\|socket\)\)$#\2#p' |
        grep -v '^\(ssh\|dbus\|systemd\)') || :
    ((${#units[@]})) || return 0
    echo "Disabling at boot: ${units[*]}"
    systemctl disable "${units[@]}" || :
}

step_packages_first() {
    local -a missing
    read -ra missing <<<"$(missing_packages "${FIRST_PACKAGES[@]}" \
        "${SERVER_PACKAGES[@]}")"
    if ((${#missing[@]})); then
        apt-get update --quiet -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3
    fi
    install_packages "${FIRST_PACKAGES[@]}"
}

step_packages() {
    if [[ $CONTAINER_SERVER == incus ]] && ! package_installed incus-base &&
        ! apt-cache show incus-base >/dev/null 2>&1; then
        echo 'This distribution has no Incus; Debian 13 has it.'
        return 1
    fi
    # shellcheck disable=SC2046 # one or two words
    install_packages "${SERVER_PACKAGES[@]}" $(lxd_packages)
}
