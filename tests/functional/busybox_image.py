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

"""The smallest image that boots: a static busybox and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
import io
import os
import tarfile
import time

_BUSYBOX = ('/bin/busybox', '/usr/bin/busybox')

_APPLETS = """
    ash cat chmod chown chpasswd date dd df echo env false free getty grep
    halt head hostname id ifconfig init ip kill ln ls mkdir mount mv nproc
    ping poweroff ps pwd reboot rm route sed sh sleep stat sync tail tar
    touch true udhcpc umount uname vi wc wget
    """.split()

_INITTAB = b"""\
::sysinit:/bin/sh -c 'echo booted; /bin/hostname -F /etc/hostname'
::respawn:/bin/sleep 100000
::ctrlaltdel:/bin/reboot
::shutdown:/bin/echo going down
"""

_METADATA = """\
architecture: {architecture}
creation_date: {now}
properties:
  architecture: {architecture}
  description: busybox for tests
  os: busybox
templates:
  /etc/hostname:
    when: [create, copy, rename]
    template: hostname.tpl
"""


def busybox() -> str | None:
    """Find a busybox.

    :returns: its path, or None where the package busybox-static is missing.
    """
    for path in _BUSYBOX:
        if os.path.exists(path):
            return path
    return None


def files(extra: Mapping[str, bytes | str] | None = None
          ) -> dict[str, tuple[bytes, int] | str | None]:
    """What is in the root filesystem.

    :param extra: more files by path, scripts (``#!``) among them; text is
        the target of a link.
    :returns: by path without leading slash: content and mode, the target of
        a link, or None for a folder.
    """
    path = busybox()
    if path is None:
        raise RuntimeError('busybox-static is not installed')
    with open(path, 'rb') as source:
        program = source.read()
    found: dict[str, tuple[bytes, int] | str | None] = {
        name: None for name in (
            'bin', 'dev', 'etc', 'mnt', 'proc', 'root', 'run', 'sbin', 'sys',
            'tmp', 'usr', 'usr/bin', 'var', 'var/log')}
    found['bin/busybox'] = (program, 0o755)
    # LXC knows by this link which signals this init understands.
    found['sbin/init'] = '/bin/busybox'
    for applet in _APPLETS:
        found[f'bin/{applet}'] = 'busybox'
    found['etc/inittab'] = (_INITTAB, 0o644)
    found['etc/passwd'] = (b'root:x:0:0:root:/root:/bin/sh\n', 0o644)
    found['etc/shadow'] = (b'root:*:19000:0:99999:7:::\n', 0o640)
    found['etc/group'] = (b'root:x:0:\n', 0o644)
    found['etc/hostname'] = (b'busybox\n', 0o644)
    for name, content in (extra or {}).items():
        if isinstance(content, bytes):
            mode = 0o755 if content.startswith(b'#!') else 0o644
            found[name.lstrip('/')] = (content, mode)
        else:
            found[name.lstrip('/')] = content
    return found


def _add(archive: tarfile.TarFile, name: str,
         entry: tuple[bytes, int] | str | None) -> None:
    member = tarfile.TarInfo(name)
    member.mtime = int(time.time())
    if entry is None:
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(member)
    elif isinstance(entry, str):
        member.type, member.linkname = tarfile.SYMTYPE, entry
        member.mode = 0o777
        archive.addfile(member)
    else:
        content, member.mode = entry
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def unified(extra: Mapping[str, bytes | str] | None = None,
            architecture: str | None = None) -> bytes:
    """Build a unified LXD image: one tarball with metadata and rootfs/.

    :param extra: more files and links, see :func:`files`.
    :param architecture: what it claims to be for; by default the host's.
    """
    stream = io.BytesIO()
    metadata = _METADATA.format(
        architecture=architecture or os.uname().machine,
        now=int(time.time()))
    with tarfile.open(fileobj=stream, mode='w:gz', compresslevel=1
                      ) as archive:
        _add(archive, 'metadata.yaml', (metadata.encode(), 0o644))
        _add(archive, 'templates', None)
        _add(archive, 'templates/hostname.tpl',
             (b'{{ container.name }}\n', 0o644))
        _add(archive, 'rootfs', None)
        for name, entry in files(extra).items():
            _add(archive, f'rootfs/{name}', entry)
    return stream.getvalue()


def rootfs(extra: Mapping[str, bytes | str] | None = None, mode: str = 'w:gz'
           ) -> bytes:
    """Build a tarball of the root filesystem alone.

    :param extra: more files and links, see :func:`files`.
    :param mode: as for tarfile.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, entry in files(extra).items():
            _add(archive, name, entry)
    return stream.getvalue()
