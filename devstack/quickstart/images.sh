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

# Guest images, built once and kept below the prefix.

# The image is of this host's distribution, whose packages apt can reach here.
guest_distribution() {
    # shellcheck disable=SC1091
    . /etc/os-release
    GUEST_IMAGE=$ID
    GUEST_SUITE=$VERSION_CODENAME
}

# Prints a string that changes when an image has to be rebuilt.
image_key() {
    (
        cd "$HERE" || exit
        find "guest-$1" "image-$1.sh" -type f -exec sha256sum {} + | sort |
            sha256sum | cut -c1-12
    )
}

image_file() {
    printf '%s/images/%s-%s.%s' "$CACHE" "$1" "$(image_key "$2")" "$3"
}

tiny_image_file() {
    image_file tiny tiny tar.gz
}

guest_image_file() {
    image_file "$GUEST_IMAGE-$GUEST_SUITE" system squashfs
}

step_tiny_image() {
    local file
    file=$(tiny_image_file)
    [[ -s $file ]] && return 0
    mkdir -p "$CACHE/images"
    build_tiny_image "$file.part"
    mv "$file.part" "$file"
}

step_guest_image() {
    local file
    file=$(guest_image_file)
    [[ -s $file ]] && return 0
    mkdir -p "$CACHE/images"
    build_system_image "$file.part"
    mv "$file.part" "$file"
}

step_upload() {
    local tiny system
    tiny=$(tiny_image_file)
    system=$(guest_image_file)
    # name=file=key=distribution=GiB of disk at least
    IMAGE_WORDS="tiny=$tiny=$(image_key tiny)=busybox=0"
    IMAGE_WORDS+=" $GUEST_IMAGE=$system=$(image_key system)=$GUEST_IMAGE=1"
    cloud_setup images
}
