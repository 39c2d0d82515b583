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

# The guest image: built, downloaded, or a file that is there.

function get_nova_lxd_image {
    local file=$FILES/$DEFAULT_IMAGE_FILE_NAME
    [[ ! -s $file ]] || return 0
    if [[ -z $NOVA_LXD_IMAGE ]]; then
        sudo "$NOVA_LXD_DIR/devstack/build_guest_image.sh" "$file"
        sudo chown "$STACK_USER" "$file"
    elif [[ $NOVA_LXD_IMAGE =~ ^https?:// ]]; then
        wget --progress=dot:giga --tries=5 --output-document="$file.part" \
            "$NOVA_LXD_IMAGE"
        mv "$file.part" "$file"
    else
        cp "${NOVA_LXD_IMAGE#file://}" "$file"
    fi
}

# Raw and bare is how Glance lets archives of containers pass.
function upload_nova_lxd_image {
    local name
    local -a names=("$DEFAULT_IMAGE_NAME")
    # Tempest rebuilds servers with another image.
    if is_service_enabled tempest; then
        names+=("$DEFAULT_IMAGE_NAME-alt")
    fi
    get_nova_lxd_image
    for name in "${names[@]}"; do
        if ! openstack --os-cloud devstack-admin image show "$name" \
                >/dev/null 2>&1; then
            _upload_image "$name" bare raw "$FILES/$DEFAULT_IMAGE_FILE_NAME" \
                hw_architecture="$(uname -m)"
        fi
    done
}

function remove_nova_lxd_image {
    rm -f "$FILES/$DEFAULT_IMAGE_FILE_NAME" "$FILES/$DEFAULT_IMAGE_FILE_NAME.part"
}
