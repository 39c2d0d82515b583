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

"""The whole driver in this process, with a real LXD behind it.

Nova's services, Neutron and Glance are stood in for; everything between
``LXDDriver`` and the container is real. The quickstart cloud's tests cover
the rest.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any
import uuid

import fixtures
from nova.compute import power_state
from nova.compute import vm_states
from nova import context as nova_context
from nova import objects
from nova.tests import fixtures as nova_fixtures
from nova.tests.unit import fake_flavor
from nova.virt import driver as nova_driver
from oslo_concurrency import lockutils

from nova_lxd_py import conf
from nova_lxd_py.virt import driver
from tests.functional import busybox_image
from tests.functional import lxd_daemon
from tests import memory_glance

CONF = conf.CONF


class VirtAPI:
    """Nova's side of waiting for events: Neutron reports at once."""

    @contextlib.contextmanager
    def wait_for_instance_event(self, instance: Any, names: Any,
                                timeout: int = 300,
                                error_callback: Any = None) -> Any:
        yield


class DriverHost(fixtures.Fixture):
    """A driver that serves one host.

    :param lxd: the LXD to use; by default one shared by the process.
    :param endpoint: path of a socket that leads to it, if not its own.
    :param glance: where images come from; an empty one by default.
    :param database: whether the test has Nova's database, which is stood in
        for otherwise.
    :param options: values for ``[lxd]``.

    :ivar driver: the driver, past ``init_host``.
    :ivar glance: where its images come from.
    :ivar events: Nova lifecycle events that it reported.
    :ivar project: its LXD project.
    """

    def __init__(self, lxd: lxd_daemon.RealLXD | None = None,
                 endpoint: str | None = None,
                 glance: memory_glance.MemoryGlance | None = None,
                 database: bool = False, **options: Any) -> None:
        super().__init__()
        self.glance = glance or memory_glance.MemoryGlance()
        self.lxd = lxd or lxd_daemon.shared()
        self._database = database
        self._endpoint = endpoint or self.lxd.endpoint
        self._options = options
        self.project = 'nova-' + uuid.uuid4().hex[:8]
        self.context = nova_context.RequestContext('user', 'project',
                                                   is_admin=True)
        self._number = 0

    def _setUp(self) -> None:
        objects.register_all()
        folder = self.useFixture(fixtures.TempDir()).path
        settings = {'endpoint': self._endpoint, 'project': self.project,
                    'storage_pool': self.lxd.pool, 'startup_timeout': 5,
                    **self._options}
        self._set('host', 'testhost')
        self._set('state_path', folder)
        self._set('instances_path', os.path.join(folder, 'instances'))
        lockutils.set_defaults(folder)
        for name, value in settings.items():
            self._set(name, value, 'lxd')
        self.useFixture(nova_fixtures.PrivsepFixture())
        self.useFixture(fixtures.MonkeyPatch(
            'nova.image.glance.API', lambda: self.glance))
        if not self._database:
            self.useFixture(fixtures.MonkeyPatch(
                'nova.objects.Instance.get_bdms',
                lambda instance: objects.BlockDeviceMappingList(objects=[])))
            self.useFixture(fixtures.MonkeyPatch(
                'nova.objects.VirtualInterfaceList.get_by_instance_uuid',
                lambda *args: []))
        # What Neutron adds to a config drive.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.network.security_group_api.get_instance_security_groups',
            lambda *args, **kwargs: []))
        self.events: list[Any] = []
        self.addCleanup(self._remove_project)
        self.driver = self.start_driver()

    def _set(self, name: str, value: Any, group: str | None = None) -> None:
        CONF.set_override(name, value, group)
        self.addCleanup(CONF.clear_override, name, group)

    def start_driver(self) -> driver.LXDDriver:
        """Start a driver, as a restarted nova-compute would."""
        started = driver.LXDDriver(VirtAPI())
        started.register_event_listener(self.events.append)
        started.init_host(CONF.host)
        self.addCleanup(started.cleanup_host, CONF.host)
        return started

    @staticmethod
    def another_driver() -> driver.LXDDriver:
        """Make a driver with connections of its own for a process that is
        copied from this one."""
        return driver.LXDDriver(VirtAPI())

    def restart_driver(self) -> None:
        """Replace the driver, which keeps nothing in memory that matters."""
        self.driver.cleanup_host(CONF.host)
        self.driver = self.start_driver()

    # -- things to work with ------------------------------------------------

    def image(self, content: bytes | None = None, **kwargs: Any
              ) -> objects.ImageMeta:
        """Upload an image to Glance, by default a busybox."""
        image_id = self.glance.add(content or busybox_image.unified(),
                                   **kwargs)
        return self.glance.meta(image_id)

    def instance(self, image: objects.ImageMeta | None = None,
                 extra_specs: dict[str, str] | None = None, **fields: Any
                 ) -> objects.Instance:
        """Describe a server to the driver, the way Nova does.

        :param image: its image.
        :param extra_specs: extra specs of its flavor.
        :param fields: fields of the flavor (``vcpus``, ``memory_mb``,
            ``root_gb``, ``ephemeral_gb``, ``swap``) or of the instance.
        """
        self._number += 1
        flavor = {'vcpus': 1, 'memory_mb': 128, 'root_gb': 1,
                  'ephemeral_gb': 0, 'swap': 0}
        flavor.update({key: fields.pop(key) for key in list(fields)
                       if key in flavor})
        made = fake_flavor.fake_flavor_obj(
            self.context, name='test', extra_specs=extra_specs or {},
            expected_attrs=['extra_specs'], **flavor)
        values: dict[str, Any] = {
            'id': self._number, 'uuid': str(uuid.uuid4()),
            'display_name': f'server {self._number}', 'project_id': 'project',
            'user_id': 'user', 'hostname': f'server-{self._number}',
            'vm_state': vm_states.ACTIVE, 'task_state': None,
            'image_ref': image.id if image else '', 'config_drive': '',
            'system_metadata': {}, 'metadata': {}, 'key_name': None,
            'key_data': None, 'user_data': None, 'host': CONF.host,
            'node': CONF.host, 'root_device_name': '/dev/root',
            'availability_zone': 'nova', 'launch_index': 0,
            'reservation_id': 'r-1', 'kernel_id': '', 'ramdisk_id': '',
            'os_type': 'linux', 'trusted_certs': None, 'vcpu_model': None,
            'launched_at': None, 'created_at': None, 'deleted': False,
            'numa_topology': None, 'ec2_ids': objects.EC2Ids(
                instance_id='i-1', ami_id='ami-1', kernel_id=None,
                ramdisk_id=None),
            'reservation_id': 'r-1',
            'keypairs': objects.KeyPairList(objects=[]),
            'pci_devices': objects.PciDeviceList(objects=[]),
            'security_groups': objects.SecurityGroupList(objects=[]),
            'device_metadata': None, 'memory_mb': flavor['memory_mb'],
            'vcpus': flavor['vcpus'], 'root_gb': flavor['root_gb'],
            'ephemeral_gb': flavor['ephemeral_gb'],
            'default_ephemeral_device': None, 'default_swap_device': None,
            'power_state': power_state.NOSTATE, 'resources': None,
            'migration_context': None, 'tags': objects.TagList(objects=[]),
            **fields}
        server = objects.Instance(self.context, **values)
        server.flavor = made
        server.old_flavor = server.new_flavor = None
        return server

    def spawn(self, instance: objects.Instance | None = None,
              image: objects.ImageMeta | None = None, network_info: Any = (),
              **kwargs: Any) -> objects.Instance:
        """Make a server.

        :param kwargs: more arguments of the driver's ``spawn``.
        :returns: it.
        """
        image = image or self.image()
        if instance is None:
            instance = self.instance(image)
        self.driver.spawn(
            self.context, instance, image, kwargs.pop('injected_files', []),
            kwargs.pop('admin_password', None), {}, list(network_info),
            **kwargs)
        return instance

    # -- looking at it ------------------------------------------------------

    def lxd_instances(self) -> dict[str, dict[str, Any]]:
        """All instances in the driver's project, by name."""
        found = self.lxd.api.must('GET', '/1.0/instances', params={
            'project': self.project, 'recursion': '1'})
        return {entry['name']: entry for entry in found}

    def lxd_volumes(self) -> list[str]:
        """Names of the custom volumes in the driver's project."""
        found = self.lxd.api.must(
            'GET', f'/1.0/storage-pools/{self.lxd.pool}/volumes/custom',
            params={'project': self.project, 'recursion': '1'})
        return [entry['name'] for entry in found]

    def state(self, instance: objects.Instance) -> int:
        """The server's power state, as LXD says."""
        return self.driver.get_info(instance, use_cache=False).state

    def wait_for_state(self, instance: objects.Instance, state: int,
                       timeout: float = 20) -> None:
        """Wait until a server is in a power state.

        :raises AssertionError: it is not, in time.
        """
        deadline = time.monotonic() + timeout
        while self.state(instance) != state:
            if time.monotonic() > deadline:
                raise AssertionError(
                    f'{instance.name} is in state {self.state(instance)}, '
                    f'not {state}')
            time.sleep(0.1)

    def run(self, instance: objects.Instance, *command: str) -> str:
        """Run a command in the guest.

        :returns: its output.
        :raises AssertionError: it failed.
        """
        api = self.lxd.api
        name = instance.name
        params = {'project': self.project}
        answer = api.must(
            'POST', f'/1.0/instances/{name}/exec',
            {'command': list(command), 'record-output': True,
             'wait-for-websocket': False,
             'environment': {'PATH': '/bin:/sbin:/usr/bin:/usr/sbin'}},
            params=params)
        outputs = answer['output']
        texts = [api.request('GET', outputs[key], params=params).body
                 for key in ('1', '2')]
        out, err = (text.decode() if isinstance(text, bytes) else str(text)
                    for text in texts)
        if answer['return'] != 0:
            raise AssertionError(f'{command}: {out}{err}')
        return out

    def _remove_project(self) -> None:
        api, params = self.lxd.api, {'project': self.project}
        for name, entry in self.lxd_instances().items():
            if entry['status'] != 'Stopped':
                api.request('PUT', f'/1.0/instances/{name}/state',
                            {'action': 'stop', 'force': True}, params=params)
            deadline = time.monotonic() + 20
            while True:
                try:
                    api.must('DELETE', f'/1.0/instances/{name}',
                             params=params)
                    break
                except AssertionError:
                    # LXD may still be busy with what the test began.
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)
        for name in self.lxd_volumes():
            api.must('DELETE', f'/1.0/storage-pools/{self.lxd.pool}/volumes/'
                     f'custom/{name}', params=params)
        for image in api.must('GET', '/1.0/images', params={
                **params, 'recursion': '1'}):
            api.must('DELETE', f'/1.0/images/{image["fingerprint"]}',
                     params=params)
        api.must('DELETE', f'/1.0/projects/{self.project}')


def load_driver() -> nova_driver.ComputeDriver:
    """Load the driver by the name that operators configure."""
    return nova_driver.load_compute_driver(VirtAPI(), 'lxd.LXDDriver')
