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

# Tests the DevStack plugin on a fresh machine: a plain Debian in a system
# container, which is removed afterwards.
#
#   devstack/verify.sh [OPTION...] MIRRORS
#
# MIRRORS is a directory with git repositories of devstack, requirements,
# keystone, glance, placement, nova, neutron, cinder, tempest and
# os-test-images, as bare clones named NAME, NAME.git, openstack/NAME.git or
# openstack+NAME/repo.
#
#   --suite bookworm|trixie  the Debian to use (default bookworm)
#   --tempest REGEX          the tests to run (default: a few smoke tests)
#   --logs DIRECTORY         where logs are kept (default: a temporary one)
#   --keep                   leave the machine as it is at the end or failure
#
# stack.sh installs the code that is committed here, a server is made with it
# and entered through its floating IP, tempest runs, and unstack.sh and clean.sh
# must leave nothing of LXD's. One line is printed per step, with its time.
#
# Workarounds for what this machine's kernel lacks (Open vSwitch, iSCSI,
# device-mapper) are in the configuration written here, not in the plugin.
set -euo pipefail

usage() { sed -n '/^# Tests/,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }

readonly -a REPOSITORIES=(devstack requirements keystone glance placement nova
    neutron cinder tempest os-test-images)
suite=bookworm
keep=false
logs=''
mirrors=''
tempest='tempest\.api\.compute\.servers\.test_create_server\.|tempest\.api\.compute\.servers\.test_server_actions\.ServerActionsTestJSON\.test_(reboot_server_hard|stop_start_server|resize_server_confirm$)|tempest\.scenario\.test_server_basic_ops|tempest\.api\.compute\.volumes\.test_attach_volume\.AttachVolumeTestJSON\.test_list_get_volume'
arguments=("$@")
while (($#)); do
    case $1 in
    --suite) suite=${2:?}; shift ;;
    --tempest) tempest=${2:?}; shift ;;
    --logs) logs=${2:?}; shift ;;
    --keep) keep=true ;;
    -*) usage; exit 2 ;;
    *) mirrors=$1 ;;
    esac
    shift
done
[[ -n $mirrors ]] || { usage; exit 2; }
[[ -d $mirrors ]] || { echo "There is no directory $mirrors." >&2; exit 2; }
repo=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=tools/as_root.sh
. "$repo/tools/as_root.sh"
as_root "$0" "${arguments[@]}"

mirrors=$(readlink -f "$mirrors")
work=$(mktemp -d /var/tmp/devstack.XXXX)
logs=$(readlink -m "${logs:-$(mktemp -d /var/tmp/devstack-logs.XXXX)}")
mkdir -p "$logs"
container=devstack-$suite
readonly STACK=/opt/stack/devstack

say() { :; }

# shellcheck source=tools/system_container.sh
. "$repo/tools/system_container.sh"

# Name and number of the running step.
running=''
steps=0

cleanup() {
    local status=$?
    trap - EXIT
    [[ -z $running ]] || failed
    if $keep; then
        echo "Kept. Enter: LXD_DIR=$LXD_DIR lxc exec $container -- su - stack"
    else
        # The quickstart's back end keeps loop devices of volumes in use.
        container_run bash -c "$(declare -f detach_volumes); detach_volumes" \
            >/dev/null 2>&1 || :
        container_down
    fi
    ((status == 0)) || echo "FAILED. Logs: $logs"
    exit "$status"
}

detach_volumes() {
    losetup --noheadings --output NAME,BACK-FILE |
        awk '$2 ~ "^/opt/stack/data/cinder/loop/" {print $1}' |
        xargs --no-run-if-empty --max-args 1 losetup --detach
}

failed() {
    exec 1>&3 2>&4
    printf '%-52s FAILED %4ds\n' "$running" $((SECONDS - before))
    tail -n 40 "$log" | sed 's/^/    /'
}
trap cleanup EXIT

# step TEXT COMMAND...: runs a command with its output in a log file, and prints
# the line that begins with "RESULT:".
step() {
    running=$1
    shift
    ((++steps))
    log=$logs/$(printf '%02d' "$steps")-${1//_/-}.log
    before=$SECONDS
    exec 3>&1 4>&2 >"$log" 2>&1
    "$@"
    exec 1>&3 2>&4
    printf '%-52s ok %8ds%s\n' "$running" $((SECONDS - before)) \
        "$(sed -n 's/^RESULT: /   /p' "$log" | tail -n 1)"
    running=''
}

# -- features of this machine's kernel ----------------------------------------

has_module() { [[ -e /sys/module/$1 ]] || modprobe --quiet "$1" 2>/dev/null; }

# The kernel's iSCSI, initiator and target, and what LVM needs.
has_iscsi() {
    has_module dm_mod && has_module iscsi_tcp && has_module target_core_mod &&
        [[ -e /dev/mapper/control ]]
}

mirror_of() {
    local path
    for path in "$1" "$1.git" "openstack/$1.git" "openstack/$1" \
            "openstack+$1/repo"; do
        if [[ -e $mirrors/$path/HEAD || -e $mirrors/$path/.git ]]; then
            echo "$path"
            return 0
        fi
    done
    echo "There is no repository of $1 in $mirrors." >&2
    return 1
}

# -- steps --------------------------------------------------------------------

make_rootfs() {
    local name
    for name in "${REPOSITORIES[@]}"; do
        mirror_of "$name"
    done
    container_tools
    container_rootfs "$suite" adduser curl iptables kmod lsb-release locales \
        openssh-client python3 sudo wget
    git clone --quiet --bare "$repo" "$work/rootfs/srv/nova-lxd-py.git"
    git -C "$work/rootfs/srv/nova-lxd-py.git" branch --force verify HEAD
    # Host name and fully qualified name are the same: Open vSwitch uses one and
    # Nova the other, and OVN binds ports only if both are equal.
    echo "$container" >"$work/rootfs/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$container" \
        >"$work/rootfs/etc/hosts"
    # DevStack installs hundreds of packages.
    printf '%s\n' force-unsafe-io 'path-exclude=/usr/share/man/*' \
        'path-exclude=/usr/share/doc/*' 'path-exclude=/usr/share/locale/*' \
        >"$work/rootfs/etc/dpkg/dpkg.cfg.d/verify"
    # This cloud need not survive a power failure.
    mkdir -p "$work/rootfs/etc/mysql/mariadb.conf.d"
    printf '[mysqld]\ninnodb_flush_log_at_trx_commit = 0\n' \
        >"$work/rootfs/etc/mysql/mariadb.conf.d/99-verify.cnf"
    # The repositories belong to another user.
    printf '[safe]\n\tdirectory = *\n' >"$work/rootfs/etc/gitconfig"
    mkdir -p "$work/rootfs/srv/git/openstack" "$work/rootfs/srv/mirrors"
    work_round_kernel
}

# drop_in UNIT: the text on standard input is added to a unit.
drop_in() {
    mkdir -p "$work/rootfs/etc/systemd/system/$1.d"
    cat >"$work/rootfs/etc/systemd/system/$1.d/verify.conf"
}

work_round_kernel() {
    if ! has_module openvswitch; then
        # ovn-controller makes br-int with what it finds there. The connection
        # tracking in user space of Open vSwitch 3.1 aborts now and then; its
        # own monitor restarts it faster than systemd, and changes nothing else.
        drop_in ovs-vswitchd.service <<'EOF'
[Service]
ExecStart=
ExecStart=/usr/share/openvswitch/scripts/ovs-ctl --no-ovsdb-server --system-id=random --no-record-hostname start $OVS_CTL_OPTS
ExecStartPost=/usr/bin/ovs-vsctl --no-wait set open . external-ids:ovn-bridge-datapath-type=netdev
EOF
    fi
    if ! has_iscsi; then
        drop_in iscsid.service <<'EOF'
[Unit]
ConditionVirtualization=
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStartPre=
ExecStart=
ExecStart=/bin/true
EOF
        # The quickstart's back end needs only loop devices.
        cp "$repo/devstack/quickstart/cinder_backends/loop_backend.py" \
            "$work/rootfs/srv/"
        drop_in devstack@c-vol.service <<'EOF'
[Service]
User=root
Environment=PYTHONPATH=/srv
Environment=PATH=/opt/stack/data/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin
EOF
        # DevStack adds rootwrap to the secure_path of its own user only.
        echo 'Defaults:root !secure_path' >"$work/rootfs/etc/sudoers.d/verify"
    fi
    # lxcfs shows guests their own CPUs and memory; its unit does not start in a
    # container.
    drop_in lxcfs.service <<'EOF'
[Unit]
ConditionVirtualization=
EOF
}

start_machine() {
    local name
    container_up
    lxc config device add "$container" mirrors disk source="$mirrors" \
        path=/srv/mirrors readonly=true
    container_run apt-get update --quiet
    # Copies, since the user "stack" may not be able to read the mirrors, and
    # git makes hard links when the owner of a repository clones it.
    for name in "${REPOSITORIES[@]}"; do
        container_run cp -rL "/srv/mirrors/$(mirror_of "$name")" \
            "/srv/git/openstack/$name.git"
    done
    container_run git clone --quiet /srv/git/openstack/devstack.git "$STACK"
    container_run "$STACK/tools/create-stack-user.sh"
    container_run chown -R stack:stack /opt/stack /srv/git
    write_local_conf | container_run tee "$STACK/local.conf"
    container_run chown stack:stack "$STACK/local.conf"
}

write_local_conf() {
    local address variable
    address=$(container_run ip -4 -o addr show dev eth0 |
        sed 's/.* inet \([0-9.]*\).*/\1/')
    cat <<EOF
[[local|localrc]]
HOST_IP=$address
ADMIN_PASSWORD=verify
DATABASE_PASSWORD=verify
RABBIT_PASSWORD=verify
SERVICE_PASSWORD=verify
GIT_BASE=/srv/git
# Not from the network.
TEMPEST_VENV_UPPER_CONSTRAINTS=/opt/stack/requirements/upper-constraints.txt
LOGFILE=/opt/stack/logs/stack.sh.log
LOGDIR=/opt/stack/logs
LOG_COLOR=False
API_WORKERS=1
ENABLE_KSM=False
ENABLE_KSMTUNED=False
disable_service horizon etcd3 dstat
enable_plugin nova-lxd-py /srv/nova-lxd-py.git verify
EOF
    for variable in http_proxy https_proxy no_proxy; do
        [[ -z ${!variable:-} ]] || echo "$variable=${!variable}"
    done
    if ! grep -qw btrfs /proc/filesystems && ! has_module btrfs; then
        echo NOVA_LXD_POOL_DRIVER=dir
    fi
    if ! has_module openvswitch; then
        echo OVS_DATAPATH_TYPE=netdev
    fi
    # DevStack lets services have 2048 open files. Neutron's haproxy wants some
    # more, which root may not take here.
    grep -q '^CapEff:.*[13579bdf].\{6\}$' /proc/self/status ||
        echo "ULIMIT_NOFILE=$(ulimit -Hn)"
    if ! has_iscsi; then
        cat <<'EOF'
CINDER_ENABLED_BACKENDS=loop:loop

[[post-config|$CINDER_CONF]]
[loop]
volume_driver = loop_backend.LoopDriver
volume_backend_name = loop
loop_directory = /opt/stack/data/cinder/loop
EOF
    fi
}

as_stack() { container_run sudo -u stack -H bash -c "cd $STACK && $1"; }

stack() {
    local status=0
    # Daemons that it leaves when it fails would keep a pipe open.
    as_stack 'VERBOSE_NO_TIMESTAMP=True ./stack.sh </dev/null \
        >/opt/stack/stack.out 2>&1' || status=$?
    container_run cat /opt/stack/stack.out
    ((status == 0)) || return "$status"
    # The userspace datapath does not complete the checksums of the host's own
    # packets.
    has_module openvswitch || {
        container_run apt-get install --yes --quiet ethtool
        container_run ethtool -K br-ex tx off
    }
}

boot_server() {
    as_stack '
        . ./openrc demo demo >/dev/null
        set -eu
        image=$(openstack image list --status active -f value -c Name | sort | head -n 1)
        openstack keypair create --private-key /opt/stack/verify.key verify >/dev/null
        group=$(openstack security group create verify -f value -c id)
        openstack security group rule create --protocol tcp --dst-port 22 "$group" >/dev/null
        openstack security group rule create --protocol icmp "$group" >/dev/null
        before=$(date +%s)
        openstack server create --image "$image" --flavor ds512M --network private \
            --key-name verify --security-group "$group" --wait verify
        after=$(date +%s)
        address=$(openstack floating ip create public -f value -c floating_ip_address)
        openstack server add floating ip verify "$address"
        user=${image%%-*}
        chmod 600 /opt/stack/verify.key
        for _ in $(seq 60); do
            if said=$(ssh -i /opt/stack/verify.key -o StrictHostKeyChecking=no \
                    -o UserKnownHostsFile=/dev/null -o ConnectTimeout=5 \
                    "$user@$address" "hostname; systemd-detect-virt; curl -s http://169.254.169.254/openstack/latest/meta_data.json | head -c 20"); then
                echo "$said"
                echo "RESULT: ACTIVE after $((after - before))s, then $(echo $said)"
                exit 0
            fi
            sleep 2
        done
        openstack console log show verify | tail -n 30
        exit 1'
}

attach_volume() {
    as_stack '
        . ./openrc demo demo >/dev/null
        set -eu
        openstack volume create --size 1 verify >/dev/null
        for _ in $(seq 60); do
            [ "$(openstack volume show verify -f value -c status)" != available ] || break
            sleep 1
        done
        openstack server add volume verify verify
        for _ in $(seq 60); do
            state=$(openstack volume show verify -f value -c status)
            [ "$state" != in-use ] || break
            sleep 1
        done
        address=$(openstack floating ip list -f value -c "Floating IP Address" | head -n 1)
        user=$(openstack image list -f value -c Name | sort | head -n 1)
        ssh -i /opt/stack/verify.key -o StrictHostKeyChecking=no \
            -o UserKnownHostsFile=/dev/null "${user%%-*}@$address" \
            "ls -l /dev/vdb /dev/sdb 2>/dev/null; sudo blockdev --getsize64 /dev/vdb || sudo blockdev --getsize64 /dev/sdb"
        echo "RESULT: $state"
        [ "$state" = in-use ]'
}

run_tempest() {
    local status=0
    as_stack "cd /opt/stack/tempest &&
        .tox/tempest/bin/tempest run --concurrency 2 \
        --exclude-list etc/nova-lxd-py-skips --regex '$tempest'" ||
        status=$?
    echo "RESULT: $(as_stack 'cd /opt/stack/tempest &&
        .tox/tempest/bin/stestr last' 2>&1 |
        sed -n 's/^ - \(Passed\|Failed\|Skipped\): */\1 /p' | tr '\n' ' ')"
    return "$status"
}

# Runs the commands on standard input, one a line. Each must succeed and print
# nothing.
nothing_left() {
    local command said status=0
    while read -r command; do
        said=$(container_run bash -o pipefail -c "$command" </dev/null) || {
            echo "Failed, so leftovers cannot be ruled out: $command"
            status=1
        }
        [[ -z $said ]] || {
            printf 'Left behind according to %s:\n%s\n' "$command" "$said"
            status=1
        }
    done
    return "$status"
}

unstack() {
    as_stack './unstack.sh </dev/null'
    nothing_left <<'EOF'
lxc project list --format csv | sed -n '/^nova,/p'
lxc list --all-projects --format csv
ip -o link | sed -nE '/ (tap|nlp)/p'
systemctl --no-legend --state=running list-units 'devstack@*'
sed -n '\| /opt/stack/data/nova|p' /proc/mounts
losetup --list --noheadings --output BACK-FILE | sed -n '\|^/opt/stack/data/nova|p'
EOF
}

clean() {
    as_stack './clean.sh </dev/null'
    nothing_left <<'EOF'
command -v lxd lxc || :
for path in /var/lib/lxd /opt/stack/data /etc/nova; do ! [ -e $path ] || echo $path; done
for file in /etc/subuid /etc/subgid; do ! [ -e $file ] || sed -n '/^root:/p' $file; done
sed -n '\|/var/lib/lxd|p' /proc/mounts
losetup --list --noheadings --output BACK-FILE | sed -n '\|/var/lib/lxd|p'
find /opt/stack/devstack/files -name '*.squashfs*'
EOF
}

collect_logs() {
    container_run tar -C /opt/stack -cf - logs devstack/local.conf \
        2>/dev/null | tar -C "$logs" -xf - || :
    container_run journalctl --no-pager -u 'devstack@*' \
        >"$logs/services.log" 2>/dev/null || :
}

echo "Debian $suite; logs in $logs"
step "A root filesystem of Debian $suite" make_rootfs
step 'A system container, DevStack and its user in it' start_machine
step 'stack.sh' stack
step 'A server, entered through its floating IP' boot_server
step 'A volume of Cinder in it' attach_volume
step 'tempest' run_tempest
collect_logs
step 'unstack.sh leaves nothing of servers' unstack
step 'clean.sh leaves nothing of LXD' clean
printf '%-52s ok %8ds\n' 'All' "$SECONDS"
