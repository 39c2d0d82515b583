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

# DevStack plugin: Nova with the LXD driver.
#
# DevStack sources this file once for each phase, with the mode and the phase as
# arguments; settings and override-defaults have been read by then. What is
# installed on a node depends on its services: LXD and the driver with
# nova-compute, the driver with Nova's API, the guest image with Glance.

# shellcheck source=devstack/plugin/lxd.sh
. "$NOVA_LXD_DIR/devstack/plugin/lxd.sh"
# shellcheck source=devstack/plugin/driver.sh
. "$NOVA_LXD_DIR/devstack/plugin/driver.sh"
# shellcheck source=devstack/plugin/image.sh
. "$NOVA_LXD_DIR/devstack/plugin/image.sh"

function nova_lxd_stack {
    case $1 in
    pre-install)
        if is_service_enabled n-cpu; then
            echo_summary "Installing LXD"
            install_nova_lxd_daemon
        fi
        ;;
    install)
        # The API validates extra specs of flavors with it.
        if is_service_enabled n-cpu n-api; then
            echo_summary "Installing nova-lxd-py"
            install_nova_lxd_driver
        fi
        ;;
    post-config)
        if is_service_enabled n-cpu; then
            echo_summary "Configuring nova-lxd-py"
            create_nova_lxd_pool
            configure_nova_lxd
        fi
        if is_service_enabled g-api; then
            load_nova_lxd_metadefs
        fi
        ;;
    extra)
        # Like stack.sh, upload images from the node with the database.
        # shellcheck disable=SC2086 # several words
        if is_service_enabled $DATABASE_BACKENDS && is_service_enabled g-api; then
            echo_summary "Uploading the guest image"
            upload_nova_lxd_image
        fi
        ;;
    test-config)
        if is_service_enabled tempest; then
            configure_nova_lxd_tempest
        fi
        ;;
    esac
}

case $1 in
stack)
    nova_lxd_stack "$2"
    ;;
unstack)
    if is_service_enabled n-cpu; then
        remove_nova_lxd_servers
    fi
    ;;
clean)
    # clean.sh has called unstack.sh before.
    if is_service_enabled n-cpu; then
        remove_nova_lxd_daemon
    fi
    remove_nova_lxd_image
    ;;
esac
