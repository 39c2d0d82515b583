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

# The driver, its configuration and the configuration of tempest.

# DevStack's constraints pin older versions of cryptography and pyOpenSSL than
# pylxd requires, and Nova is tested with those. The driver works with them, so
# pylxd is installed without its dependencies.
function install_nova_lxd_driver {
    local rest
    rest=$(mktemp)
    grep -vE '^ *(#|$)|^(cryptography|cursive|pyOpenSSL|pylxd)\b' \
        "$NOVA_LXD_DIR/requirements.txt" >"$rest"
    # Other dependencies of pylxd.
    printf '%s\n' python-dateutil requests-toolbelt ws4py >>"$rest"
    pip_install -r "$rest"
    rm -f "$rest"
    pip_install --no-deps "$(grep '^pylxd' "$NOVA_LXD_DIR/requirements.txt" |
        cut -d' ' -f1)"
    pip_install --no-deps -e "$NOVA_LXD_DIR"
}

# DevStack copies this file for nova-compute when it starts it.
function configure_nova_lxd {
    use_nova_lxd_daemon
    iniset "$NOVA_CONF" DEFAULT compute_driver lxd.LXDDriver
    iniset "$NOVA_CONF" lxd endpoint "$NOVA_LXD_SOCKET"
    iniset "$NOVA_CONF" lxd project "$NOVA_LXD_PROJECT"
    iniset "$NOVA_CONF" lxd storage_pool "$NOVA_LXD_POOL"
    iniset "$NOVA_CONF" lxd volume_filesystems "$NOVA_LXD_VOLUME_FILESYSTEMS"
    sudo install -o root -g root -m 644 \
        "$NOVA_LXD_DIR/etc/nova/rootwrap.d/lxd.filters" \
        "$NOVA_CONF_DIR/rootwrap.d/"
    sudo "$NOVA_LXD_DIR/tools/udev_rule.sh" install "$NOVA_LXD_STATE/udev"
}

# Glance describes the extra specs of flavors to dashboards.
function load_nova_lxd_metadefs {
    "$GLANCE_BIN_DIR/glance-manage" --config-file "$GLANCE_API_CONF" \
        db load_metadefs --path "$NOVA_LXD_DIR/etc/metadefs"
}

# Sets the feature flags of the support matrix, as for the quickstart cloud, and
# writes the tests that do not apply to containers for "tempest run
# --exclude-list".
function configure_nova_lxd_tempest {
    local section option value
    local -a configure=("${DEVSTACK_VENV:-/usr}/bin/python3"
        "$NOVA_LXD_DIR/tests/tempest/configure.py")
    while read -r section option value; do
        iniset "$TEMPEST_CONFIG" "$section" "$option" "$value"
    done < <("${configure[@]}" features)
    # Works if Cinder has a volume type with multiattach.
    iniset "$TEMPEST_CONFIG" compute-feature-enabled volume_multiattach \
        "${ENABLE_VOLUME_MULTIATTACH:-False}"
    "${configure[@]}" skips >"$TEMPEST_DIR/etc/nova-lxd-py-skips"
    iniset "$TEMPEST_CONFIG" compute hypervisor_type lxd
    iniset "$TEMPEST_CONFIG" scenario img_disk_format raw
    iniset "$TEMPEST_CONFIG" scenario img_container_format bare
    # Guests empty /tmp when they boot.
    iniset "$TEMPEST_CONFIG" scenario target_dir /var/tmp
    # The guest's network service renews its lease itself.
    iniset "$TEMPEST_CONFIG" scenario dhcp_client ''
}
