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

"""Fast spawn with a real LXD: templates, clones and uid ranges."""

from __future__ import annotations

import os
from typing import Any
import unittest

import fixtures
from nova.compute import power_state
from nova import exception
from nova import objects

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import session
from tests.fixtures import busybox_image
from tests.fixtures import concurrent_calls
from tests.fixtures import driver_case
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

CONF = conf.CONF
NO_LXD = lxd_daemon.missing()
NEEDS_TEMPLATES = unittest.skipIf(
    lxd_daemon.IS_INCUS, 'Incus mounts root disks idmapped, so that servers '
    'need no templates and have uid ranges of their own')


class TemplateTestCase(driver_case.DriverCase, unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.session = session.Session(CONF.lxd)
        self.session.connect()
        self.guests = registry.GuestRegistry(self.session)
        self.image = self.host.image()
        # The first server of an image is made from the image itself.
        self.host.driver.destroy(self.host.context, self.spawn(), [])

    def spawn(self, project: str = 'p1', **kwargs: Any) -> objects.Instance:
        return self.host.spawn(self.host.instance(
            self.image, kwargs.pop('extra_specs', None), project_id=project,
            **kwargs), self.image)

    def templates(self) -> list[lxd_guest.Guest]:
        return [guest for guest in self.guests.all()
                if templates.KEY_TEMPLATE in guest.config]

    def config(self, server: objects.Instance) -> Any:
        return self.guests.get(server).config

    def first_uid(self, server: objects.Instance) -> int:
        """Return the uid of the guest's root on the host, by the kernel."""
        return int(self.host.run(server, 'cat', '/proc/self/uid_map'
                                 ).split()[1])

    def tree(self, name: str) -> dict[str, tuple[int, ...]]:
        """Return mode, size and change time of a stopped instance's files."""
        assert self.host.lxd.directory is not None
        top = (self.host.lxd.directory / 'storage-pools' / self.host.lxd.pool
               / 'containers' / f'{self.host.project}_{name}' / 'rootfs')
        found = {}
        for directory, directories, files in os.walk(top):
            for entry in directories + files:
                path = os.path.join(directory, entry)
                status = os.lstat(path)
                found[os.path.relpath(path, top)] = (
                    status.st_mode, status.st_size, status.st_mtime_ns)
        return found


@unittest.skipIf(NO_LXD, NO_LXD or '')
class CloneTest(TemplateTestCase):

    @NEEDS_TEMPLATES
    def test_clones_run(self) -> None:
        first, second = self.spawn(), self.spawn(root_gb=2)
        template, = self.templates()
        for server in (first, second):
            self.assertEqual(power_state.RUNNING, self.host.state(server))
            self.assertEqual(int(template.config['volatile.idmap.base']),
                             self.first_uid(server))
            # Correctly shifted: root in the guest owns its files.
            self.assertEqual('0', self.host.run(
                server, 'stat', '-c', '%u', '/etc/passwd').strip())
            self.host.run(server, 'touch', '/etc/written')
            self.assertNotIn(templates.KEY_TEMPLATE, self.config(server))
            # LXD does not get the templates of the image's metadata.
            self.assertEqual('busybox', self.host.run(
                server, 'cat', '/etc/hostname').strip())
        self.assertEqual('2GiB', self.guests.get(second).devices['root'][
            'size'])
        self.assertEqual(2, self.host.driver.get_num_instances())
        self.assertEqual({first.uuid, second.uuid},
                         set(self.host.driver.list_instance_uuids()))

    @NEEDS_TEMPLATES
    def test_template_is_the_image_untouched(self) -> None:
        self.spawn()
        template, = self.templates()
        self.session.post('instances', body={
            'name': 'reference', 'profiles': [],
            'source': {'type': 'image', 'fingerprint': template.config[
                templates.KEY_TEMPLATE]},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': self.host.lxd.pool}}})
        self.assertEqual(self.tree('reference'), self.tree(template.name))
        self.assertEqual('Stopped', template.status)

    def test_clones_are_apart(self) -> None:
        first, second = self.spawn(), self.spawn()
        self.host.run(first, 'sh', '-c', 'echo x > /etc/mine')
        self.assertEqual('', self.host.run(
            second, 'sh', '-c', 'cat /etc/mine || true'))
        self.assertNotEqual(self.config(first)['volatile.uuid'],
                            self.config(second)['volatile.uuid'])

    def test_lxd_restart(self) -> None:
        """Neither template nor range holder is ever started by LXD."""
        lxd = lxd_daemon.RealLXD().__enter__()
        self.addCleanup(lxd.close)
        host = driver_host.DriverHost(lxd)
        host.setUp()
        self.addCleanup(host.cleanUp)
        image = host.image()
        for _ in range(2):
            host.spawn(host.instance(image), image)
        lxd.restart()
        self.assertEqual(
            {'Stopped'},
            {entry['status'] for entry in host.lxd_instances().values()
             if entry['config']['user.nova.role'] == roles.TEMPLATE})
        host.spawn(host.instance(image), image)

    @NEEDS_TEMPLATES
    def test_server_outlives_template_and_image(self) -> None:
        server = self.spawn()
        self.session.delete('images', self.templates()[0].config[
            templates.KEY_TEMPLATE])
        self.host.driver.manage_image_cache(self.host.context, [server])
        self.assertEqual([], self.templates())
        self.host.driver.reboot(self.host.context, server, [], 'HARD')
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        again = self.spawn()
        self.assertEqual(self.first_uid(server), self.first_uid(again))

    @NEEDS_TEMPLATES
    def test_first_server_of_new_image(self) -> None:
        image = self.host.image(busybox_image.unified({'etc/new': b'x'}))
        servers = [self.host.spawn(
            self.host.instance(image, project_id='p1'), image)]
        self.assertEqual([], self.templates())
        servers.append(self.host.spawn(
            self.host.instance(image, project_id='p1'), image))
        self.assertEqual(1, len(self.templates()))
        self.assertEqual(1, len({self.first_uid(server)
                                 for server in servers}))

    @NEEDS_TEMPLATES
    def test_half_made_template(self) -> None:
        """As a crash leaves it: created, with its obstacle, not shifted."""
        self.spawn()
        template, = self.templates()
        name, config = template.name, dict(template.config)
        template.delete()
        self.guests.create(
            name, {'type': 'image',
                   'fingerprint': config[templates.KEY_TEMPLATE]},
            {key: value for key, value in config.items()
             if key.startswith(('user.', 'security.'))},
            {'root': {'type': 'disk', 'path': '/',
                      'pool': self.host.lxd.pool},
             'never-starts': {'type': 'nic', 'nictype': 'physical',
                              'parent': 'nova-has-no-such-nic'}})
        server = self.spawn()
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertEqual(['root'], list(self.templates()[0].devices))

    @NEEDS_TEMPLATES
    def test_many_first_servers(self) -> None:
        servers = concurrent_calls.run_all([self.spawn] * 6)
        for server in servers:
            self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertEqual(1, len(self.templates()))
        self.assertEqual(1, len({self.first_uid(server)
                                 for server in servers}))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class RangeTest(TemplateTestCase):

    def test_ranges_do_not_overlap(self) -> None:
        """Created at the same time, some with ranges of their own."""
        own = {'lxd:isolated': 'true'}

        def server(number: int) -> objects.Instance:
            return self.spawn(f'p{number % 3}',
                              extra_specs=own if number % 2 else None)

        servers = concurrent_calls.run_all([
            lambda number=number: server(number) for number in range(10)])
        first_of_all = 100000 if not os.path.exists('/etc/subuid') else min(
            int(line.split(':')[1]) for line in open('/etc/subuid')
            if line.startswith('root:'))
        owners: dict[int, set[str]] = {}
        for number, made in enumerate(servers):
            self.assertIsInstance(made, objects.Instance)
            owners.setdefault(self.first_uid(made), set()).add(
                made.uuid if number % 2 else made.project_id)
        self.assertEqual({1}, {len(found) for found in owners.values()})
        # Projects share a range only where that saves shifting files.
        self.assertEqual(10 if lxd_daemon.IS_INCUS else 8, len(owners))
        # Nor do they overlap partly, also not with LXD's common range.
        bases = sorted(owners)
        self.assertGreaterEqual(bases[0], first_of_all + 65536)
        for lower, higher in zip(bases, bases[1:]):
            self.assertGreaterEqual(higher - lower, 65536)

    def test_lxds_own_allocation_respects_them(self) -> None:
        server = self.spawn()
        self.session.post('instances', body={
            'name': 'theirs', 'profiles': [], 'source': {'type': 'none'},
            'config': {'security.idmap.isolated': 'true'},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': self.host.lxd.pool}}})
        base = int(self.session.get('instances', 'theirs')['config'][
            'volatile.idmap.base'])
        self.assertGreaterEqual(abs(base - self.first_uid(server)), 65536)

    @unittest.skipUnless(os.path.exists('/etc/subuid'),
                         'LXD has a billion ids where no file says how many')
    @NEEDS_TEMPLATES
    def test_ranges_run_out(self) -> None:
        first = self.spawn('p1')
        ids = next(int(line.split(':')[2]) for line in open('/etc/subuid')
                   if line.startswith('root:'))
        # LXD's common range, and all but two others.
        self.session.post('instances', body={
            'name': 'theirs', 'profiles': [], 'source': {'type': 'none'},
            'config': {'security.idmap.isolated': 'true',
                       'security.idmap.size': str((ids // 65536 - 3) * 65536)},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': self.host.lxd.pool}}})
        second = self.spawn('p2')
        self.host.driver.destroy(self.host.context, first, [])
        # Its range may be used again soon.
        self.assertRaises(exception.NovaException, self.spawn, 'p3')
        patch = fixtures.MonkeyPatch(
            'nova_lxd_py.virt.guest.uid_ranges.GRACE', 0)
        with patch:
            third = self.spawn('p3')
            self.assertRaises(exception.NovaException, self.spawn, 'p4')
        self.assertNotEqual(self.first_uid(second), self.first_uid(third))

    def test_privileged(self) -> None:
        server = self.spawn(extra_specs={'lxd:privileged_allowed': 'true'})
        self.assertEqual(0, self.first_uid(server))
        self.assertEqual([], self.templates())


@unittest.skipIf(NO_LXD, NO_LXD or '')
@unittest.skipUnless(lxd_daemon.IS_INCUS, 'LXD 5.0 shifts root disks')
class IdmappedTest(TemplateTestCase):

    def test_own_ranges_and_no_templates(self) -> None:
        servers = [self.spawn() for _number in range(3)]
        self.assertEqual([], self.templates())
        self.assertEqual(3, len({self.first_uid(server)
                                 for server in servers}))
        for server in servers:
            # Nothing was shifted, and the guest's root owns its files.
            self.assertEqual('[]', self.config(server)[
                'volatile.last_state.idmap'])
            self.assertEqual('0', self.host.run(
                server, 'stat', '-c', '%u', '/etc/passwd').strip())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class OffTest(TemplateTestCase):

    def setUp(self) -> None:
        CONF.set_override('idmap_isolation', 'off', 'lxd')
        self.addCleanup(CONF.clear_override, 'idmap_isolation', 'lxd')
        super().setUp()

    def test_common_range(self) -> None:
        first, second = self.spawn('p1'), self.spawn('p2')
        self.assertEqual(self.first_uid(first), self.first_uid(second))
        self.assertEqual('0', self.host.run(
            second, 'stat', '-c', '%u', '/etc/passwd').strip())
        self.assertEqual(0 if lxd_daemon.IS_INCUS else 1,
                         len(self.templates()))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DirPoolTest(TemplateTestCase):

    pool_driver = 'dir'

    def test_no_templates(self) -> None:
        first, second = self.spawn(), self.spawn()
        self.assertEqual([], self.templates())
        self.assertNotEqual(self.first_uid(first), self.first_uid(second))

    def test_range_per_project(self) -> None:
        CONF.set_override('idmap_isolation', 'project', 'lxd')
        self.addCleanup(CONF.clear_override, 'idmap_isolation', 'lxd')
        first, second = self.spawn(), self.spawn()
        other = self.spawn('p2')
        self.assertEqual([], self.templates())
        self.assertEqual(self.first_uid(first), self.first_uid(second))
        self.assertNotEqual(self.first_uid(first), self.first_uid(other))
