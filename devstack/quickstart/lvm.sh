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

# What Cinder's back end "lvm" needs, if the kernel has it: a volume group on a
# file, and an iSCSI target that exports its volumes to the initiator of the
# same host.

# LVM warns of every open file that it has not opened itself.
export LVM_SUPPRESS_FD_WARNINGS=1

readonly -a LVM_PACKAGES=(lvm2 thin-provisioning-tools open-iscsi lsscsi)
readonly -a LVM_MODULES=(dm_mod dm_thin_pool iscsi_tcp target_core_mod
    target_core_iblock iscsi_target_mod)

LVM_FILE=$DATA/cinder/lvm
# Sparse.
LVM_SIZE=20G
VOLUME_GROUP=nova-lxd-volumes
# Distinguishes our targets from those of others.
TARGET_PREFIX=iqn.2010-10.org.openstack.quickstart:
TARGETS=/sys/kernel/config/target/iscsi
# Where Cinder saves targets for the next boot.
SAVED_TARGETS=/etc/target/saveconfig.json
ISCSI_PORT=$((3260 + PORT_OFFSET))

# Prints why this host cannot have LVM with iSCSI, or nothing.
lvm_lacks() {
    local module lacking='' name
    for module in "${LVM_MODULES[@]}"; do
        [[ -d /sys/module/$module ]] || modprobe --quiet "$module" ||
            lacking+=", no $module"
    done
    if [[ -n $lacking ]]; then
        echo "the kernel has ${lacking#, }"
    elif [[ ! -c /dev/mapper/control ]]; then
        echo 'a container has no devices of its own'
    else
        for name in $(iscsi_targets); do
            [[ $name == "$TARGET_PREFIX"* ]] && continue
            # Cinder restores its targets only if there are no others.
            echo "this host offers other iSCSI targets, such as $name"
            return 0
        done
    fi 2>/dev/null
}

iscsi_targets() {
    [[ ! -d $TARGETS ]] || find "$TARGETS" -mindepth 1 -maxdepth 1 \
        -name 'iqn.*' -printf '%f\n'
}

# Checks whether the host runs its own iscsid.
other_iscsid() {
    ! daemon_running iscsid && pidof iscsid >/dev/null
}

make_volume_group() {
    local device
    [[ -e $LVM_FILE ]] || truncate --size "$LVM_SIZE" "$LVM_FILE"
    device=$(losetup --associated "$LVM_FILE" --noheadings --output NAME)
    [[ -n $device ]] || device=$(losetup --find --show "$LVM_FILE")
    pvs "$device" >/dev/null 2>&1 || pvcreate "$device"
    vgs "$VOLUME_GROUP" >/dev/null 2>&1 ||
        vgcreate "$VOLUME_GROUP" "$device"
    vgchange --activate y "$VOLUME_GROUP"
}

iscsid_answers() {
    local status=0
    iscsiadm --mode session || status=$?
    # 21: there are no sessions.
    ((status == 0 || status == 21))
}

start_iscsid() {
    local name=/etc/iscsi/initiatorname.iscsi
    if other_iscsid; then
        echo "The host's own iscsid is used."
        return 0
    fi
    grep -qs '^InitiatorName=' "$name" ||
        printf 'InitiatorName=%s\n' "$(iscsi-iname)" >"$name"
    daemon_start iscsid iscsid --foreground
    wait_until iscsid 30 iscsid iscsid_answers
}

start_lvm() {
    mountpoint -q /sys/kernel/config ||
        mount -t configfs configfs /sys/kernel/config
    # Creating the directory loads the module of the iSCSI target.
    mkdir -p "$TARGETS" "${SAVED_TARGETS%/*}"
    make_volume_group
    start_iscsid
}

configure_lvm() {
    cat <<EOF
[lvm]
volume_driver = cinder.volume.drivers.lvm.LVMVolumeDriver
volume_backend_name = lvm
volume_group = $VOLUME_GROUP
target_helper = lioadm
target_protocol = iscsi
target_prefix = $TARGET_PREFIX
target_ip_address = $LOCAL
target_port = $ISCSI_PORT
use_chap_auth = true
EOF
}

# Logs out of our targets while iscsid still runs. Nothing may be mounted.
leave_targets() {
    local path name
    for path in /sys/class/iscsi_session/*/targetname; do
        [[ -e $path ]] || continue
        name=$(<"$path")
        [[ $name == "$TARGET_PREFIX"* ]] || continue
        iscsiadm --mode node --targetname "$name" --logout || :
        iscsiadm --mode node --targetname "$name" --op delete || :
    done
}

# Removes targets and volume group from the kernel; both are restored from what
# is on the disk.
release_lvm() {
    local name
    [[ -e $LVM_FILE ]] || return 0
    for name in $(iscsi_targets); do
        [[ $name != "$TARGET_PREFIX"* ]] ||
            "$VENV/bin/cinder-rtstool" delete "$name" || :
    done
    vgchange --activate n "$VOLUME_GROUP" || :
}

# Removes what Cinder has saved of our targets.
forget_targets() {
    if grep -qs "$TARGET_PREFIX" "$SAVED_TARGETS"; then
        rm -f "$SAVED_TARGETS"
        rmdir "${SAVED_TARGETS%/*}" 2>/dev/null || :
    fi
}
