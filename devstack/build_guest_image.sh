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

# Builds the guest image that the quickstart cloud and DevStack use: systemd,
# sshd and cloud-init of this host's distribution, as a squashfs file.
#
#   devstack/build_guest_image.sh FILE
#
# Upload it with "openstack image create --disk-format raw --container-format
# bare --file FILE NAME". The user who gets the SSH key is named after the
# distribution.
set -euo pipefail

if (($# != 1)) || [[ $1 == -* ]]; then
    sed -n '/^# Builds/,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
fi

SELF=$(readlink -f "${BASH_SOURCE[0]}")
HERE=${SELF%/*}/quickstart
# shellcheck source=tools/as_root.sh
. "${SELF%/*}/../tools/as_root.sh"
as_root "$SELF" "$@"

target=$(readlink -m "$1")
CACHE=$(mktemp -d "${target%/*}/.guest-image.XXXX")
mkdir "$CACHE/images"
trap 'rm -rf "$CACHE"' EXIT

die() { echo "$*" >&2; exit 1; }

for tool in debootstrap mksquashfs; do
    command -v "$tool" >/dev/null ||
        die "$tool is missing: apt install debootstrap squashfs-tools"
done
# shellcheck source=devstack/quickstart/images.sh
. "$HERE/images.sh"
# shellcheck source=devstack/quickstart/image-system.sh
. "$HERE/image-system.sh"

guest_distribution
build_system_image "$CACHE/image"
mv "$CACHE/image" "$target"
