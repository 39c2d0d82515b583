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

# The tiny guest image: a static busybox, a DHCP client and dropbear, for tests
# and experiments. Boots in a fraction of a second.

readonly TINY_FILES=$HERE/guest-tiny

# Copies a program with the libraries it needs.
copy_program() {
    local root=$1 program=$2 name=$3 library
    install -D -m 755 "$program" "$root$name"
    ldd "$program" | grep -o '/[^ ]*' | while read -r library; do
        install -D -m 755 "$(readlink -f "$library")" "$root$library"
    done
}

build_tiny_image() {
    local target=$1 root=$CACHE/images/tiny.root
    rm -rf "$root"
    mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,etc/dropbear,root/.ssh,proc} \
        "$root"/{sys,dev,run,tmp,var/log,lib,lib64,config-drive}
    install -m 755 "$(command -v busybox)" "$root/bin/busybox"
    chroot "$root" /bin/busybox --install -s
    copy_program "$root" "$(command -v dropbear)" /usr/sbin/dropbear
    cp -r "$TINY_FILES/." "$root/"
    chmod 755 "$root"/etc/init.d/* "$root"/usr/share/udhcpc/default.script
    chmod 700 "$root/root" "$root/root/.ssh"
    chmod 1777 "$root/tmp"
    rm -f "$root/sbin/init"
    ln -s ../bin/busybox "$root/sbin/init"
    chown -R 0:0 "$root"
    tar --numeric-owner --sort=name -C "$root" -czf "$target" .
    rm -rf "$root"
}
