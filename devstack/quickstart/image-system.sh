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

# The guest image of this distribution: systemd, sshd and cloud-init, reduced so
# that it boots fast.

readonly SYSTEM_FILES=$HERE/guest-system
readonly -a SYSTEM_PACKAGES=(systemd-sysv systemd-resolved udev dbus
    openssh-server cloud-init curl iproute2 iputils-ping sudo ca-certificates less
    nano)

# Prints the mirror from which apt of this host gets the distribution.
system_mirror() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Identifier: Packages' | awk -v suite="$GUEST_SUITE" '
        $2 == suite && $3 == "main" { print $1; exit }'
}

# Units that are useless in a container, or wait for hardware.
readonly -a MASKED_UNITS=(apt-daily.timer apt-daily-upgrade.timer
    dpkg-db-backup.timer e2scrub_all.timer fstrim.timer e2scrub_reap.service
    systemd-udev-settle.service systemd-modules-load.service
    systemd-hwdb-update.service kmod-static-nodes.service
    systemd-pstore.service systemd-timesyncd.service
    systemd-firstboot.service systemd-homed.service getty@tty1.service
    sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount
    dev-hugepages.mount proc-sys-fs-binfmt_misc.automount
    systemd-binfmt.service systemd-random-seed.service
    systemd-network-generator.service motd-news.timer man-db.timer)

build_system_image() {
    local target=$1 mirror components=main proxy
    local root=$CACHE/images/system.root
    mirror=$(system_mirror)
    [[ -n $mirror ]] || die "apt has no source for $GUEST_SUITE main."
    [[ $GUEST_IMAGE != ubuntu ]] || components=main,universe
    proxy=$(apt-config dump --format '%v' Acquire::http::Proxy)
    [[ -z $proxy ]] || export http_proxy=$proxy
    rm -rf "$root"
    debootstrap_system "$mirror" "$components" "$root"
    trim_system "$root"
    mksquashfs "$root" "$target" -noappend -no-progress -comp zstd \
        -Xcompression-level 6
    rm -rf "$root"
}

debootstrap_system() {
    local mirror=$1 components=$2 root=$3 include
    include=$(IFS=, && echo "${SYSTEM_PACKAGES[*]}")
    if command -v mmdebstrap >/dev/null && mmdebstrap --mode=root \
        --variant=minbase --components="$components" --include="$include" \
        --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='force-unsafe-io' \
        "$GUEST_SUITE" "$root" "deb $mirror $GUEST_SUITE ${components/,/ }"
    then
        return 0
    fi
    rm -rf "$root"
    debootstrap --variant=minbase --components="$components" \
        --include="$include" "$GUEST_SUITE" "$root" "$mirror"
}

trim_system() {
    local root=$1 unit
    cp -r "$SYSTEM_FILES/." "$root/"
    sed -i "s/@USER@/$GUEST_IMAGE/" "$root/etc/cloud/cloud.cfg.d/90_quickstart.cfg"
    for unit in "${MASKED_UNITS[@]}"; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    chroot "$root" systemctl enable systemd-networkd.service \
        systemd-resolved.service ssh.service
    chroot "$root" systemctl set-default multi-user.target
    ln -sf /run/systemd/resolve/resolv.conf "$root/etc/resolv.conf"
    # Each server creates its own identity.
    rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/hostname" \
        "$root/var/lib/dbus/machine-id"
    : >"$root/etc/machine-id"
    mkdir -p "$root/config-drive"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* \
        "$root"/usr/share/{doc,man,info,locale}/* "$root"/var/log/*.log \
        "$root"/etc/dpkg/dpkg.cfg.d/99mmdebstrap
}
