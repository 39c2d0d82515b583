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

"""Images that attack the host, with a real LXD.

Each is uploaded to Glance, and an instance is created from it, as a tenant
does. A directory of the host must neither be visible in an instance nor
change.
"""

from __future__ import annotations

import io
import os
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from typing import Any
import unittest

from nova.compute import power_state
from nova import exception
from nova import objects

from nova_lxd_py.virt.image import cache
from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

METADATA = f"""\
architecture: {os.uname().machine}
creation_date: 1700000000
properties: {{os: busybox}}
"""
SEED = '/var/lib/cloud/seed/nocloud-net/meta-data'


def directory(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode = tarfile.DIRTYPE, 0o755
    return member


def link(name: str, target: str, hard: bool = False) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
    member.linkname = target
    return member


def device(name: str, block: bool, major: int, minor: int
           ) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = tarfile.BLKTYPE if block else tarfile.CHRTYPE
    member.devmajor, member.devminor = major, minor
    return member


def file(name: str, content: bytes = b'evil\n', **pax: str
         ) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.pax_headers = pax
    return member, content


class Archive:
    """An archive with members in the given order, after a root filesystem
    that boots.

    :param unified: whether it is an LXD image, with the files in rootfs/.
    :param metadata: metadata.yaml of an LXD image.
    :param system: whether to add the root filesystem.
    """

    def __init__(self, unified: bool = True, metadata: str = METADATA,
                 system: bool = True) -> None:
        self._stream = io.BytesIO()
        self._archive = tarfile.open(fileobj=self._stream, mode='w',
                                     format=tarfile.PAX_FORMAT)
        if unified:
            self.add(file('metadata.yaml', metadata.encode()))
        if system:
            if unified:
                self.add(directory('rootfs'))
            for name, entry in busybox_image.files().items():
                busybox_image._add(self._archive,
                                   f'rootfs/{name}' if unified else name,
                                   entry)

    def add(self, *members: Any) -> Archive:
        for member in members:
            if isinstance(member, tuple):
                self._archive.addfile(member[0], io.BytesIO(member[1]))
            else:
                self._archive.addfile(member)
        return self

    def data(self) -> bytes:
        self._archive.close()
        return self._stream.getvalue()


class HostileTestCase(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        # Not below /tmp, of which LXD may have its own.
        self.canary = tempfile.mkdtemp(prefix='canary-', dir='/var/tmp')
        self.addCleanup(shutil.rmtree, self.canary)
        os.chmod(self.canary, 0o755)
        pathlib.Path(self.canary, 'secret').write_text('secret')
        # A complete system, which could be booted.
        subprocess.run(['tar', '-C', self.canary, '-x'], check=True,
                       input=busybox_image.rootfs(mode='w'))
        self.before = self.census()
        self.addCleanup(self.assert_untouched)

    def census(self) -> dict[str, Any]:
        found = {}
        for path, names, files in os.walk(self.canary):
            for name in [*names, *files]:
                full = os.path.join(path, name)
                about = os.lstat(full)
                found[full] = (about.st_mode, about.st_uid, about.st_size,
                               about.st_nlink)
        return found

    def assert_untouched(self) -> None:
        self.assertEqual(self.before, self.census())

    def boot(self, data: bytes, **properties: str) -> objects.Instance:
        image = self.host.image(data, **properties)
        server = self.host.spawn(self.host.instance(image), image)
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        return server

    def images(self) -> list[dict[str, Any]]:
        return self.host.lxd.api.must('GET', '/1.0/images', params={
            'project': self.host.project, 'recursion': '1'})

    def assert_refused(self, reason: str, data: bytes) -> None:
        image = self.host.image(data)
        with self.assertRaisesRegex(exception.ImageUnacceptable, reason):
            self.host.spawn(self.host.instance(image), image)
        self.assertEqual({}, self.host.lxd_instances())
        self.assertEqual([], self.images())
        self.assert_untouched()

    def assert_refused_both(self, reason: str, *members: Any) -> None:
        """Add members of a root filesystem to both kinds of archives."""
        self.assert_refused(reason, Archive(unified=False).add(
            *members).data())
        moved = []
        for member in members:
            info = member[0] if isinstance(member, tuple) else member
            info.name = f'rootfs/{info.name}'
            if info.islnk() and not info.linkname.startswith('/'):
                info.linkname = f'rootfs/{info.linkname}'
            moved.append(member)
        self.assert_refused(reason, Archive().add(*moved).data())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class RootTest(HostileTestCase):
    """The root of the server becomes a directory of the host."""

    def test_directory_and_then_link(self) -> None:
        """LXD 5.0.2 boots the server from the host's directory."""
        self.assert_refused(
            r'root of its archive \(rootfs\) is a symbolic link',
            Archive(system=False).add(
                directory('rootfs'), link('rootfs', self.canary)).data())

    def test_link_only(self) -> None:
        self.assert_refused('root of its archive', Archive(
            system=False).add(link('rootfs', self.canary)).data())

    def test_link_after_the_system(self) -> None:
        self.assert_refused('root of its archive', Archive().add(
            link('rootfs', self.canary)).data())

    def test_link_with_another_spelling(self) -> None:
        for name in ('./rootfs', 'rootfs/.', './/rootfs/'):
            self.assert_refused('root of its archive', Archive(
                system=False).add(directory('rootfs'),
                                  link(name, self.canary)).data())

    def test_link_by_an_extended_header(self) -> None:
        hidden = link('harmless', self.canary)
        hidden.pax_headers = {'GNU.sparse.name': 'rootfs'}
        self.assert_refused('root of its archive', Archive(
            system=False).add(directory('rootfs'), hidden).data())

    def test_top_of_a_tarball(self) -> None:
        self.assert_refused('root of its archive', Archive(
            unified=False).add(link('.', self.canary)).data())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class ReplacedRootTest(HostileTestCase):
    """The root of a server becomes a link after it was made."""

    def replaced(self) -> objects.Instance:
        image = self.host.image(busybox_image.rootfs())
        server = self.host.spawn(self.host.instance(image), image)
        self.host.driver.power_off(server)
        root = (f'{self.host.lxd.directory}/storage-pools/'
                f'{self.host.lxd.pool}/containers/{self.host.project}_'
                f'{server.name}/rootfs')
        os.rename(root, f'{root}-moved')
        os.symlink(self.canary, root)
        self.addCleanup(os.unlink, root)
        self.addCleanup(shutil.rmtree, f'{root}-moved')
        return server

    def test_no_image_of_it(self) -> None:
        """An image would have files of the host."""
        server = self.replaced()
        image = self.host.glance.create(None, {'name': 'stolen'})
        with self.assertRaises(exception.NovaException):
            self.host.driver.snapshot(self.host.context, server, image['id'],
                                      lambda **kwargs: None)
        self.assertEqual(0, self.host.glance.get(None, image['id'])['size'])

    def test_no_rescue_of_it(self) -> None:
        """The rescue instance would have files of the host."""
        server = self.replaced()
        rescue = self.host.image(busybox_image.rootfs({'rescue': b'x'}))
        with self.assertRaises(exception.NovaException):
            self.host.driver.rescue(self.host.context, server, [], rescue,
                                    None, None, None)
        self.assertNotIn(f'{server.name}-rescue', self.host.lxd_instances())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class MemberTest(HostileTestCase):
    """Members that are written or linked outside the root."""

    def test_parent_directories(self) -> None:
        for name in ('../evil', 'etc/../../evil',
                     f'../../../../../../..{self.canary}/evil'):
            self.assert_refused_both(r'has "\.\." in its name', file(name))

    def test_absolute_names(self) -> None:
        self.assert_refused('absolute name', Archive().add(
            file(f'{self.canary}/evil')).data())
        self.assert_refused('absolute name', Archive(unified=False).add(
            file(f'{self.canary}/evil')).data())

    def test_names_in_extended_headers(self) -> None:
        for key in ('path', 'GNU.sparse.name'):
            for name in (f'{self.canary}/evil', '../evil'):
                self.assert_refused('has ".." in|absolute name', Archive(
                    unified=False).add(file('etc/x', **{key: name})).data())

    def test_written_through_a_link(self) -> None:
        self.assert_refused_both(
            'lies below .*a symbolic link', link('escape', self.canary),
            file('escape/evil'))

    def test_directory_replaced_by_a_link(self) -> None:
        self.assert_refused_both(
            'twice: as a directory and as a symbolic link',
            directory('escape'), link('escape', self.canary))

    def test_link_replaced_by_a_directory(self) -> None:
        self.assert_refused_both(
            'twice: as a symbolic link and as a directory',
            link('escape', self.canary), directory('escape'))

    def test_second_name_of_a_link(self) -> None:
        self.assert_refused_both(
            'lies below .*a symbolic link', link('escape', self.canary),
            link('second', 'escape', hard=True), file('second/evil'))

    def test_hard_links(self) -> None:
        secret = f'{self.canary}/secret'
        self.assert_refused_both('absolute name', link('s', secret, True))
        self.assert_refused_both(
            r'has "\.\." in', link('s', f'../../../../../../..{secret}', True))
        self.assert_refused_both(
            'no file before it', link('escape', self.canary),
            link('s', 'escape/secret', True))
        self.assert_refused('outside of rootfs/', Archive().add(
            link('rootfs/s', 'metadata.yaml', True)).data())

    def test_devices(self) -> None:
        for node in (device('dev/sda', True, 8, 0),
                     device('dev/loop0', True, 7, 0),
                     device('dev/mem', False, 1, 1),
                     device('home/mixer', False, 14, 0)):
            self.assert_refused_both('device node', node)

    def test_unknown_types(self) -> None:
        for kind in (b'D', b'M', b'V', b'Z'):
            odd = tarfile.TarInfo('etc/odd')
            odd.type = kind
            self.assert_refused_both('of a type', odd)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class MetadataTest(HostileTestCase):
    """Metadata of images, which LXD would obey."""

    def test_members_outside_the_root(self) -> None:
        """Such as backup.yaml, LXD's definition of the instance."""
        server = self.boot(Archive().add(
            file('backup.yaml'), directory('escape'),
            link('templates', self.canary)).data())
        self.assertNotIn('secret', self.host.run(server, 'ls', '/'))

    def test_templates(self) -> None:
        metadata = METADATA + f"""
templates:
  /escape/evil: {{when: [create, copy, start], template: evil.tpl}}
  {SEED}: {{when: [create, copy, start], template: evil.tpl}}
"""
        server = self.boot(Archive(metadata=metadata).add(
            directory('templates'), file('templates/evil.tpl'),
            link('rootfs/escape', self.canary),
            directory('rootfs' + SEED.rpartition('/')[0])).data())
        self.assertEqual('', self.host.run(
            server, 'ls', SEED.rpartition('/')[0]))

    def test_properties(self) -> None:
        """None reaches LXD, in particular none with the driver's own names."""
        metadata = METADATA.replace('{os: busybox}', """
  os: busybox
  nova.checked: 0123456789abcdef
  nova.unused_since: "1"
  nova.unpacked_bytes: "1"
  requirements.privileged: "true"
expiry_date: 1700000001""")
        server = self.boot(Archive(metadata=metadata).data())
        image, = self.images()
        self.assertEqual(
            {'architecture', 'description', cache.PROPERTY_IMAGE,
             cache.PROPERTY_SIZE}, set(image['properties']))
        self.assertGreater(int(image['properties'][cache.PROPERTY_SIZE]), 999)
        self.assertLess(image['expires_at'], '2000')
        config = self.host.lxd_instances()[server.name]['config']
        self.assertNotIn('image.os', config)

    def test_no_properties(self) -> None:
        for properties in ('', 'properties:\n', 'properties: []\n'):
            self.boot(Archive(metadata=METADATA.replace(
                'properties: {os: busybox}\n', properties)).data())

    def test_image_of_an_earlier_version(self) -> None:
        """An image that an earlier version has imported is not used."""
        image = self.host.image(Archive().data())
        hostile = Archive(system=False, metadata=METADATA.replace(
            '{os: busybox}', f'{{{cache.PROPERTY_IMAGE}: {image.id}}}')).add(
                directory('rootfs'), link('rootfs', self.canary)).data()
        api, params = self.host.lxd.api, {'project': self.host.project}
        stored = self.host.driver._services.session.upload(
            'images', chunks=[hostile],
            headers={'Content-Type': 'application/octet-stream'})
        api.must('POST', '/1.0/images/aliases', {
            'name': f'nova-{image.id}', 'target': stored['fingerprint']},
            params=params)
        server = self.host.spawn(self.host.instance(image), image)
        self.assertEqual('root:x:0:0:root:/root:/bin/sh', self.host.run(
            server, 'cat', '/etc/passwd').strip())
        self.assertEqual([image.id], self.host.glance.downloads)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class SparseTest(HostileTestCase):

    def test_image_of_a_server_with_a_sparse_file(self) -> None:
        """It fits into the flavor of the server that it was made of, as for
        unshelve."""
        image = self.host.image(busybox_image.rootfs())
        server = self.host.spawn(self.host.instance(image, root_gb=1), image)
        self.host.run(server, 'dd', 'if=/dev/urandom', 'of=/root/sparse',
                      'bs=1M', 'seek=1500', 'count=1')
        made = self.host.glance.create(None, {'name': 'shelved'})
        self.host.driver.snapshot(self.host.context, server, made['id'],
                                  lambda **kwargs: None)
        meta = self.host.glance.meta(made['id'])
        copy = self.host.spawn(self.host.instance(meta, root_gb=1), meta)
        size, blocks = self.host.run(
            copy, 'stat', '-c', '%s %b', '/root/sparse').split()
        self.assertEqual(1501 << 20, int(size))
        self.assertLess(int(blocks) * 512, 3 << 20)


@unittest.skipIf(NO_LXD, NO_LXD or '')
@unittest.skipUnless(shutil.which('mksquashfs'), 'mksquashfs is missing')
class SquashfsTest(HostileTestCase):

    def make(self, *definitions: str) -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            tree, made = os.path.join(directory, 'tree'), f'{directory}/image'
            os.mkdir(tree)
            subprocess.run(['tar', '-C', tree, '-x'], check=True,
                           input=busybox_image.rootfs(mode='w'))
            pseudo = [part for definition in definitions
                      for part in ('-p', definition)]
            subprocess.run(
                ['mksquashfs', tree, made, '-all-root', '-no-progress',
                 '-quiet', '-noI', *pseudo], check=True, capture_output=True)
            return pathlib.Path(made).read_bytes()

    def test_names(self) -> None:
        """unsquashfs of long ago writes where they lead to."""
        target = f'{self.canary}/new'.encode()
        for name, new in ((b'a' * len(target), target), (b'qq', b'..')):
            good = self.make(f'/root/{name.decode()} f 644 0 0 echo evil')
            place = good.rindex(name)
            self.assert_refused('a name that cannot be', good[:place] + new +
                                good[place + len(new):])

    def test_second_entry_behind_a_link(self) -> None:
        """CVE-2021-41072: what is written to the first is the link's."""
        good = self.make(f'/root/xx1 s 777 0 0 {self.canary}/new',
                         '/root/xx2 f 644 0 0 echo evil')
        self.assert_refused('xx1 twice', good.replace(b'xx2', b'xx1'))

    def test_directory_in_two_others(self) -> None:
        """Twenty levels of it are a million files."""
        good = self.make('/root/one d 755 0 0', '/root/two d 755 0 0')
        # An entry: the offset of its inode, its number, type and name.
        first, second = (good.rindex(name) - 8 for name in (b'one', b'two'))
        evil = bytearray(good)
        evil[second:second + 2] = good[first:first + 2]
        self.assert_refused('in two others', bytes(evil))

    def test_devices(self) -> None:
        self.boot(self.make('/dev/null c 666 0 0 1 3'))
        image = self.host.image(self.make('/dev/sda b 666 0 0 8 0'))
        with self.assertRaisesRegex(exception.ImageUnacceptable,
                                    'device node'):
            self.host.spawn(self.host.instance(image), image)
