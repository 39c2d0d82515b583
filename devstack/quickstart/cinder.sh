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

# Cinder, with back ends of both families of volumes.
#
# Where the kernel has device-mapper and iSCSI, "lvm" is Cinder's usual back end
# and gives block devices (see lvm.sh). A small machine has neither, so there
# are two more that need nothing of the kernel but loop devices: "loop" gives
# real block devices through os-brick's connector for local ones; "nfs" is
# Cinder's own driver with a directory of this host as the share, which gives
# files.

CINDER_SHARE=$DATA/cinder/share
# First on the PATH of the services that mount the share.
CINDER_BIN=$BIN/cinder

# mount(8) that bind-mounts a directory of this host for an NFS share.
write_mount() {
    mkdir -p "$CINDER_BIN"
    cat >"$CINDER_BIN/mount" <<'EOF'
#!/bin/sh
# nova-lxd quickstart: bind-mounts the directory behind an NFS share.
share=
for last; do
    case $last in
    127.0.0.1:/*) share=${last#127.0.0.1:} ;;
    esac
done
[ -z "$share" ] || exec /bin/mount --bind "$share" "$last"
exec /bin/mount "$@"
EOF
    # Cinder only checks that it exists.
    printf '#!/bin/sh\nexit 0\n' >"$CINDER_BIN/mount.nfs"
    chmod 755 "$CINDER_BIN/mount" "$CINDER_BIN/mount.nfs"
}

# Prints the back ends, the default one first.
volume_backends() {
    cat "$DATA/cinder/backends"
}

# Checks whether LVM with iSCSI is one of them.
has_lvm() {
    [[ " $(volume_backends 2>/dev/null) " == *' lvm '* ]]
}

# The modules of the kernel may differ after a reboot of the host.
choose_volume_backends() {
    local backends='loop nfs'
    [[ -n $(lvm_lacks) ]] || backends="lvm $backends"
    mkdir -p "$DATA/cinder"
    echo "$backends" >"$DATA/cinder/backends"
}

# Reports the volume back ends, and why LVM with iSCSI is not among them.
say_volume_backends() {
    local types='loop (block devices), nfs (files on a share) and multiattach'
    types+=' (block devices for several servers)'
    if has_lvm; then
        say "Volumes: types lvm (over iSCSI, the default), $types."
    else
        say "Volumes: types $types."
        say "  No LVM with iSCSI: $(lvm_lacks)."
    fi
}

configure_cinder() {
    local file=$ETC/cinder/cinder.conf backends
    backends=$(volume_backends)
    mkdir -p "$ETC/cinder" "$DATA/cinder/loop" "$CINDER_SHARE" \
        "$DATA/cinder/state"
    write_mount
    echo "127.0.0.1:$CINDER_SHARE" >"$ETC/cinder/nfs_shares"
    {
        cat <<EOF
[DEFAULT]
use_stderr = false
state_path = $DATA/cinder/state
host = $HOST
my_ip = $LOCAL
transport_url = $(rabbit_url)
auth_strategy = keystone
api_paste_config = $VENV/etc/cinder/api-paste.ini
resource_query_filters_file = $VENV/etc/cinder/resource_filters.json
glance_api_servers = $(service_url glance)
enabled_backends = ${backends// /,}
default_volume_type = ${backends%% *}
image_conversion_dir = $DATA/cinder/conversion

[database]
connection = $(database_url cinder)

[loop]
volume_driver = loop_backend.LoopDriver
volume_backend_name = loop
loop_directory = $DATA/cinder/loop

[nfs]
volume_driver = cinder.volume.drivers.nfs.NfsDriver
volume_backend_name = nfs
nfs_shares_config = $ETC/cinder/nfs_shares
nfs_mount_point_base = $DATA/cinder/mnt
nas_secure_file_operations = true
nas_secure_file_permissions = false

[oslo_concurrency]
lock_path = $DATA/cinder/lock

[nova]
$(auth_options nova)

[service_user]
send_service_user_token = true
$(auth_options cinder)

$(token_sections cinder)

$(messaging_sections)

EOF
        ! has_lvm || configure_lvm
        privsep_sections "$file" cinder_sys_admin privsep_osbrick
    } >"$file"
}

step_cinder_packages() {
    choose_volume_backends
    "$REPO/tools/udev_rule.sh" install "$DATA/undo/udev"
    install_packages qemu-utils
    ! has_lvm || install_packages "${LVM_PACKAGES[@]}"
    "$VENV/bin/python" -c 'import cinder' 2>/dev/null ||
        pip_install --compile-bytecode -c "$REPO/constraints.txt" cinder
}

step_cinder_lvm() {
    ! has_lvm || start_lvm
}

step_cinder_db() {
    echo 'CREATE DATABASE IF NOT EXISTS cinder CHARACTER SET utf8mb3' \
        'COLLATE utf8mb3_general_ci;' | sql
    configure_cinder
    make_schema cinder cinder "${CLEAN_ENV[@]}" "$VENV/bin/cinder-manage" \
        --config-file "$ETC/cinder/cinder.conf" db sync
}

step_cinder_api() {
    PYARGV="--config-file $ETC/cinder/cinder.conf" \
        WATCH=$ETC/cinder/cinder.conf \
        wsgi_start cinder-api cinder.wsgi.api:application \
        "${PORT[cinder-api]}"
}

# cinder_daemon NAME
cinder_daemon() {
    WATCH="$ETC/cinder/cinder.conf $VENV/.constraints $HERE/cinder_backends/loop_backend.py" \
        daemon_start "$1" PATH="$CINDER_BIN:$VENV/bin:$PATH" \
        PYTHONPATH="$HERE/cinder_backends" PYTHONDONTWRITEBYTECODE=1 \
        "$VENV/bin/$1" --config-file "$ETC/cinder/cinder.conf" \
        --log-file "$LOG/$1.log"
}

# cinder_reports NAME COUNT: so many services of a daemon have reported since it
# was started, which they do when they are ready.
cinder_reports() {
    local pid age
    pid=$(daemon_pid "$1") || return 1
    age=$(($(date +%s) - $(stat -c %Y "/proc/$pid")))
    (($(sql cinder -e "SELECT COUNT(*) FROM services WHERE deleted = 0 AND
        services.binary = '$1' AND updated_at IS NOT NULL AND
        TIMESTAMPDIFF(SECOND, updated_at, UTC_TIMESTAMP()) <= $age") >= $2))
}

step_cinder_scheduler() {
    cinder_daemon cinder-scheduler
    wait_until cinder-scheduler 60 cinder-scheduler \
        cinder_reports cinder-scheduler 1
}

# Every back end has a service.
step_cinder_volume() {
    cinder_daemon cinder-volume
    wait_until cinder-volume 90 cinder-volume \
        cinder_reports cinder-volume "$(volume_backends | wc -w)"
}

# Every back end has a volume type.
step_volume_types() {
    VOLUME_TYPES=$(volume_backends) cloud_setup volume-types
}

stop_cinder() {
    local name
    for name in "${CINDER_DAEMONS[@]}"; do
        daemon_stop "$name" 20 &
    done
    wait
}

# Releases the devices of volumes and unmounts the share.
release_cinder() {
    release_lvm
    detach_loops
    unmount_below "$DATA/cinder"
}
