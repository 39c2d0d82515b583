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

# udev_rule.sh install|remove STAMP: the udev rule that keeps a compute host from
# activating what tenants write on volumes. STAMP is a file that says that the
# rule was installed by this script. Runs as root.

set -eu

readonly RULE=62-nova-lxd-py.rules
readonly ROOT=${UDEV_RULE_ROOT:-}
SOURCE=$(dirname "$(readlink -f "$0")")/../etc/udev/$RULE
readonly SOURCE TARGET=$ROOT/etc/udev/rules.d/$RULE STAMP=$2

reload() {
    [[ -n $ROOT ]] || udevadm control --reload || :
}

# Whether the host has disks of its own of kinds that volumes have.
has_such_disks() {
    compgen -G "$ROOT/dev/disk/by-path/*-iscsi-*" ||
        compgen -G "$ROOT/dev/disk/by-path/*-fc-*"
} >/dev/null

case $1 in
install)
    # Without udev nothing is activated.
    [[ -e $ROOT/run/udev/control ]] || exit 0
    if [[ ! -e $STAMP ]]; then
        [[ ! -e $TARGET ]] || exit 0
        if has_such_disks; then
            echo "The udev rule $RULE was not installed: this host has disks" \
                'over iSCSI or Fibre Channel. Install a version without the' \
                'lines for these.'
            exit 0
        fi
    fi
    install -D -m 644 "$SOURCE" "$TARGET"
    mkdir -p "${STAMP%/*}"
    touch "$STAMP"
    reload
    ;;
remove)
    [[ -e $STAMP ]] || exit 0
    rm -f "$TARGET" "$STAMP"
    reload
    ;;
*)
    echo "Usage: $0 install|remove STAMP" >&2
    exit 2
    ;;
esac
