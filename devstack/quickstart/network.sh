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

# Networks, flavors, key pair and the first server.

# cloud_setup COMMAND...: see cloud.py.
cloud_setup() {
    "${CLEAN_ENV[@]}" QS_SECRET="$(secret)" QS_REGION="$REGION" \
        QS_HOST="$HOST" QS_COMPUTES="$COMPUTES" QS_CLOUD="$CLOUD" \
        QS_URL_KEYSTONE="$(service_url keystone)" \
        QS_URL_GLANCE="$(service_url glance)" \
        QS_URL_PLACEMENT="$(service_url placement)" \
        QS_URL_NEUTRON="$(service_url neutron)" \
        QS_URL_NOVA="$(service_url nova-api)" \
        QS_URL_CINDER="$(is_wanted cinder-api && service_url cinder-api)" \
        QS_PUBLIC_NET="$PUBLIC_NET" QS_PRIVATE_NET="$PRIVATE_CIDR" \
        QS_NAMESERVERS="$(nameservers)" \
        QS_PUBLIC_KEY="$PREFIX/keys/id_ed25519.pub" \
        QS_ADDRESS_FILE="$DATA/first-address" \
        QS_SERVER_IMAGE="${SERVER_IMAGE:-}" \
        QS_SERVER_FLAVOR=lxd.small QS_IMAGES="${IMAGE_WORDS:-}" \
        QS_VOLUME_TYPES="${VOLUME_TYPES:-}" QS_PATIENCE="$PATIENCE" \
        "$VENV/bin/python" "$HERE/cloud.py" "$@"
}

# Prints the name servers of this host that guests can reach as well.
nameservers() {
    awk '$1 == "nameserver" && $2 ~ /^[0-9.]+$/ && $2 !~ /^127\./ { print $2 }' \
        /etc/resolv.conf | head -n 3 | tr '\n' ' '
}

step_network() {
    cloud_setup network
}

step_flavors() {
    if [[ ! -s $PREFIX/keys/id_ed25519 ]]; then
        mkdir -p "$PREFIX/keys"
        ssh-keygen -q -t ed25519 -N '' -C quickstart \
            -f "$PREFIX/keys/id_ed25519"
    fi
    # Only the user of the cloud may read the private key.
    chown "$INVOKER" "$PREFIX/keys/id_ed25519"
    cloud_setup flavors quotas keypair
}

step_server() {
    # shellcheck disable=SC2153 # set in images.sh
    SERVER_IMAGE=$GUEST_IMAGE cloud_setup server
    elapsed "$UP_BEGIN" >"$LOG/steps/server.when"
}

# ACTIVE means that init runs; logging in needs cloud-init as well.
step_login() {
    local address end=$((SECONDS + 90 * PATIENCE))
    address=$(<"$DATA/first-address")
    until ssh_banner "$address"; do
        if ((SECONDS >= end)); then
            warn "The first server does not answer on SSH at $address yet;" \
                "see: openstack --os-cloud $CLOUD console log show first"
            return 0
        fi
        sleep 0.3
    done
}

ssh_banner() {
    timeout 3 bash -c "exec 4<>/dev/tcp/$1/22 && read -r -n 4 -u 4 word &&
        [[ \$word == SSH- ]]" 2>/dev/null
}

# Gives guests NAT to the networks of this host: an nftables table, forwarding.
step_nat() {
    local forward=/proc/sys/net/ipv4/ip_forward
    if [[ $(<$forward) != 1 ]]; then
        [[ -e $DATA/undo/ip_forward ]] || cat $forward >"$DATA/undo/ip_forward"
        echo 1 >$forward || :
    fi
    nft -f - <<EOF || warn 'Guests cannot reach other hosts: nft failed.'
table ip nova_lxd_quickstart
delete table ip nova_lxd_quickstart
table ip nova_lxd_quickstart {
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr $PUBLIC_NET.0/24 oifname != "$BRIDGE_PUBLIC" masquerade
    }
}
EOF
}

undo_nat() {
    nft delete table ip nova_lxd_quickstart 2>/dev/null || :
    if [[ -s $DATA/undo/ip_forward ]]; then
        cat "$DATA/undo/ip_forward" >/proc/sys/net/ipv4/ip_forward || :
        rm -f "$DATA/undo/ip_forward"
    fi
}
