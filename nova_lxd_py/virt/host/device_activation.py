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

"""Tools of the host that would activate what tenants write on volumes.

A volume is a block device of the host while it is attached. udev probes it,
and its rules for LVM, MD and btrfs activate signatures that they find: volume
groups and arrays of the tenant appear on the host, or take the place of the
host's own.
"""

from __future__ import annotations

from collections.abc import Iterable
import glob
import os
import re

#: The udev rule that the driver ships in etc/udev/.
RULE = '62-nova-lxd-py.rules'

_RULES = ('etc/udev/rules.d', 'run/udev/rules.d', 'usr/local/lib/udev/rules.d',
          'usr/lib/udev/rules.d', 'lib/udev/rules.d')
_PROGRAMS = ('sbin', 'usr/sbin', 'bin', 'usr/bin')
_LVM_FILTER = re.compile(r'^\s*(?:global_)?filter\s*=', re.MULTILINE)
_LVM_NO_DEVICES_FILE = re.compile(r'^\s*use_devicesfile\s*=\s*0', re.MULTILINE)
_MD_AUTO = re.compile(r'^\s*AUTO\b.*-all\b', re.MULTILINE | re.IGNORECASE)


def missing_settings(root: str = '/') -> list[str]:
    """List the settings that keep the host from activating volumes.

    :param root: root directory of the host.
    :returns: those that the host lacks; empty if it has no running udev.
    """
    if not os.path.exists(os.path.join(root, 'run/udev/control')):
        return []
    missing = []
    if _has(root, _PROGRAMS, 'lvm') and not _lvm_is_limited(root):
        missing.append('a global_filter or a devices file in '
                       '/etc/lvm/lvm.conf')
    if _has(root, _PROGRAMS, 'mdadm') and not _MD_AUTO.search(_read(
            root, 'etc/mdadm/mdadm.conf', 'etc/mdadm.conf',
            'etc/mdadm/mdadm.conf.d/*', 'etc/mdadm.conf.d/*')):
        missing.append('"AUTO -all" in mdadm.conf')
    if not _has(root, _RULES, RULE):
        missing.append(f'the udev rule {RULE}')
    return missing


def _lvm_is_limited(root: str) -> bool:
    configuration = _read(root, 'etc/lvm/lvm.conf', 'etc/lvm/lvmlocal.conf')
    if _LVM_FILTER.search(configuration):
        return True
    return (_has(root, ('etc/lvm/devices',), 'system.devices') and
            not _LVM_NO_DEVICES_FILE.search(configuration))


def _has(root: str, directories: Iterable[str], name: str) -> bool:
    return any(os.path.exists(os.path.join(root, directory, name))
               for directory in directories)


def _read(root: str, *patterns: str) -> str:
    """Read files as far as nova-compute may."""
    found = []
    for pattern in patterns:
        for path in sorted(glob.glob(os.path.join(root, pattern))):
            try:
                with open(path, encoding='utf-8', errors='replace') as stream:
                    found.append(stream.read())
            except OSError:
                continue
    return '\n'.join(found)
