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

# The guest image: built, downloaded or a local file. An image that was in
# $FILES before belongs to the user and is kept by clean.sh.

# Leaves a complete image in $FILES, or none. One that exists is used as it is.
function get_nova_lxd_image {
    local file=$FILES/$DEFAULT_IMAGE_FILE_NAME
    [[ ! -s $file ]] || return 0
    if [[ -z $NOVA_LXD_IMAGE ]]; then
        sudo "$NOVA_LXD_DIR/devstack/build_guest_image.sh" "$file.part"
        sudo chown "$STACK_USER" "$file.part"
    elif [[ $NOVA_LXD_IMAGE =~ ^https?:// ]]; then
        wget --progress=dot:giga --tries=5 --output-document="$file.part" \
            "$NOVA_LXD_IMAGE"
    else
        cp "${NOVA_LXD_IMAGE#file://}" "$file.part"
    fi
    mv "$file.part" "$file"
    echo "$file" >>"$NOVA_LXD_IMAGE_NOTE"
}

# Glance's format inspection accepts archives of containers as raw and bare.
function upload_nova_lxd_image {
    local name
    local -a names=("$DEFAULT_IMAGE_NAME")
    # Tempest needs a second image to rebuild servers.
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
    local file
    rm -f "$FILES/$DEFAULT_IMAGE_FILE_NAME.part"
    [[ -e $NOVA_LXD_IMAGE_NOTE ]] || return 0
    while read -r file; do
        rm -f "$file"
    done <"$NOVA_LXD_IMAGE_NOTE"
    rm "$NOVA_LXD_IMAGE_NOTE"
}
