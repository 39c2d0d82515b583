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

# Runs a command of this machine on its distribution's kernel, which has what
# the running kernel may lack: device-mapper, iSCSI, online growth of ext4 as
# root. The kernel boots in QEMU with this machine's files; changes to them are
# discarded. Without KVM it is slow: minutes instead of seconds (ACCEL=kvm in
# the environment uses KVM).
#
#   tools/debian_kernel.sh COMMAND [ARGUMENT...]
#
# for instance
#
#   tools/debian_kernel.sh ./run_tests.sh functional -- -k Encrypted
#
# Needs the packages that COMMAND needs, and qemu-system-x86 and busybox-static.
# The exit status is that of COMMAND, up to 120. The environment variables
# MEMORY (8G), DISK (20G) and CPUS size the machine.
set -euo pipefail

usage() { sed -n '/^# Runs/,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//'; }

(($#)) || { usage; exit 2; }
# shellcheck source=tools/as_root.sh
. "$(dirname "$0")/as_root.sh"
as_root "$0" "$@"
[[ ! $PWD/ =~ ^/(tmp|var/tmp|mnt)/ ]] ||
    { echo "Run it outside of /tmp, /var/tmp and /mnt." >&2; exit 1; }
busybox=$(command -v busybox) ||
    { echo "busybox is missing (package busybox-static)." >&2; exit 1; }
command -v qemu-system-x86_64 >/dev/null ||
    { echo "QEMU is missing (package qemu-system-x86)." >&2; exit 1; }

work=$(mktemp -d /var/tmp/debian-kernel.XXXX)
trap 'rm -rf "$work"' EXIT
say() { printf '[%3ds] %s\n' "$SECONDS" "$*" >&2; }

# Extracted, not installed, so that the boot loader of this machine is not
# updated.
package=$(apt-cache depends linux-image-amd64 |
    awk '$1 == "Depends:" && $2 ~ /^linux-image-/ {print $2; exit}')
say "Downloading ${package:?no kernel in the package lists (apt-get update)}"
(cd "$work" && apt-get download -qq -o APT::Sandbox::User=root "$package")
dpkg-deb --extract "$work"/*.deb "$work/kernel"
# Where the modules are depends on the release.
[[ -e $work/kernel/lib ]] || ln -s usr/lib "$work/kernel/lib"
kernel=("$work"/kernel/boot/vmlinuz-*)
version=${kernel[0]##*/vmlinuz-}
depmod -b "$work/kernel" "$version"

say "Making its initial RAM disk"
first=$work/first
mkdir -p "$first"/{bin,dev,proc,lower,scratch,root}
cp "$busybox" "$first/bin/busybox"
modules=(virtio_pci virtio_blk 9pnet_virtio 9p overlay crc32c_generic ext4)
mkdir -p "$first/lib/modules/$version"
for module in "${modules[@]}"; do
    modprobe -d "$work/kernel" -S "$version" --show-depends "$module" |
        awk '$1 == "insmod" {print $2}'
done | sort -u | while read -r file; do
    install -D "$file" "$first/lib/modules/${file#*/lib/modules/}"
done
depmod -b "$first" "$version" 2>/dev/null
cat >"$first/init" <<END
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
for module in ${modules[*]}; do modprobe \$module; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro \
    machine /lower
mount -t devtmpfs dev /dev
mount -t ext4 /dev/vda /scratch
mkdir -p /scratch/upper /scratch/work /scratch/tmp
chmod 1777 /scratch/tmp
mount -t overlay -o lowerdir=/lower,upperdir=/scratch/upper,workdir=/scratch/work \
    overlay /root
mkdir -p /root/usr/lib/modules
mount --bind /lower$work/kernel/lib/modules /root/usr/lib/modules
mount --bind /lower$work /root/mnt
mount --bind /scratch/tmp /root/tmp
mount --bind /scratch/tmp /root/var/tmp
umount /proc /dev
exec switch_root /root /bin/bash /mnt/second
END
chmod +x "$first/init"
(cd "$first" && find . | busybox cpio -o -H newc | gzip -1) \
    >"$work/initrd"

{
    cat <<'END'
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8 TERM=dumb
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -snf /proc/self/fd /dev/fd
mkdir -p /run/lock
echo 1 >/proc/sys/net/ipv4/ip_forward
hostname debian-kernel
ip link set lo up
/lib/systemd/systemd-udevd --daemon
udevadm trigger --action=add
udevadm settle
# Modules that an init system loads at boot.
modprobe --all loop btrfs tun
# QEMU's network, which reaches this machine's.
for link in /sys/class/net/e*; do
    ip address add 10.0.2.15/24 dev "${link##*/}"
    ip link set "${link##*/}" up
    ip route add default via 10.0.2.2
done
END
    printf 'cd %q\n' "$PWD"
    printf '%q ' "$@"
    cat <<'END'
</dev/null
status=$?
sync
# QEMU ends with the double of this, and one, and with 1 if it failed itself.
printf "\\x$(printf %x "$((status > 120 ? 121 : status + 1))")" |
    dd of=/dev/port bs=1 seek=$((0xf4)) 2>/dev/null
echo o >/proc/sysrq-trigger
sleep 60
END
} >"$work/second"

truncate -s "${DISK:-20G}" "$work/scratch"
mkfs.ext4 -q -F "$work/scratch"

say "Starting Linux $version"
status=0
qemu-system-x86_64 -machine q35 -accel "${ACCEL:-tcg}" -cpu max \
    -smp "${CPUS:-$(nproc)}" -m "${MEMORY:-8G}" -display none -serial stdio -monitor none -no-reboot \
    -nic user,model=virtio-net-pci -kernel "${kernel[0]}" -initrd "$work/initrd" \
    -append "console=ttyS0 panic=-1 apparmor=0 ${KERNEL_ARGUMENTS:-quiet}" \
    -fsdev "local,id=machine,path=/,security_model=none,readonly=on,multidevs=remap" \
    -device virtio-9p-pci,fsdev=machine,mount_tag=machine \
    -drive "file=$work/scratch,if=virtio,format=raw,cache=unsafe" \
    -device isa-debug-exit,iobase=0xf4,iosize=0x04 </dev/null || status=$?
if ((status % 2 == 0 || status == 1)); then
    echo "The machine ended before the command did." >&2
    exit 1
fi
exit $((status / 2 - 1))
