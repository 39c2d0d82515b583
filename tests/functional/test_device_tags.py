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

"""Device tags in the guest's metadata, with Nova's database and LXD."""

from __future__ import annotations

import json
import os
import sys
from typing import Any
import unittest
import uuid
import warnings

import fixtures
from nova.api.metadata import base as metadata_base
from nova import exception
from nova.network import model
from nova import objects
from nova import test
from nova.tests.unit import utils as test_utils
from oslo_utils import units

from nova_lxd_py.virt.metadata import device_tags
from nova_lxd_py.virt import privileged
from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import faulty_proxy
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DeviceTagsTest(test.TestCase):

    def setUp(self) -> None:
        paste = os.path.join(sys.prefix, 'etc', 'nova', 'api-paste.ini')
        if os.path.exists(paste):
            self.flags(api_paste_config=paste, group='wsgi')
        # Nova's base class keeps tests from reading the host's /sys.
        content = busybox_image.unified()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.SysFsPoisonFixture', fixtures.Fixture))
        super().setUp()
        # Nova's fixtures turn SQLAlchemy 2.1's warnings about Nova's own
        # queries into errors.
        warnings.filterwarnings('ignore', message=r'The noload\(\) option')
        for context in (privileged.context, privileged.network_context):
            context.set_client_mode(False)
            self.addCleanup(context.set_client_mode, True)
        self.proxy = self.useFixture(
            faulty_proxy.FaultyProxy(lxd_daemon.shared().endpoint))
        self.host = self.useFixture(driver_host.DriverHost(
            endpoint=self.proxy.path, database=True))
        self.storage = self.useFixture(lab_volumes.Storage(
            lab_volumes.LocalVolume, database=True))
        self.image = self.host.image(content)
        instance = test_utils.get_test_instance(
            self.host.context, test_utils.get_test_flavor(
                self.host.context, {'root_gb': 1, 'memory_mb': 128,
                                    'vcpus': 1, 'ephemeral_gb': 1,
                                    'swap': 0}), obj=True)
        instance.image_ref = self.image.id
        instance.hostname = 'tagged'
        instance.config_drive = 'True'
        instance.save()
        self.instance = self.stored(instance.uuid)

    def stored(self, instance_uuid: str) -> objects.Instance:
        """Return the instance as it is in the database."""
        return objects.Instance.get_by_uuid(
            self.host.context, instance_uuid, expected_attrs=[
                'device_metadata', 'flavor', 'info_cache', 'metadata',
                'system_metadata'])

    def port(self, number: int, tag: str | None, **kwargs: Any) -> model.VIF:
        """Create a port as Nova describes it during a build."""
        port = str(uuid.uuid4())
        mac = f'fa:16:3e:00:01:{number:02x}'
        objects.VirtualInterface(
            self.host.context, address=f'{mac}/{port}', uuid=port, tag=tag,
            instance_uuid=self.instance.uuid).create()
        network = model.Network(id=str(uuid.uuid4()), label='net', subnets=[],
                                mtu=1442)
        vif = model.VIF(id=port, address=mac, network=network,
                        type=model.VIF_TYPE_TAP, devname=f'tap{port}'[:14],
                        active=True, details={}, **kwargs)
        self.addCleanup(self.host.driver.unplug_vifs, self.instance, [vif])
        return vif

    def disk(self, tag: str | None, **kwargs: Any
             ) -> objects.BlockDeviceMapping:
        kwargs.setdefault('destination_type', 'local')
        described = objects.BlockDeviceMapping(
            self.host.context, instance_uuid=self.instance.uuid, tag=tag,
            **kwargs)
        described.create()
        return described

    def attach(self, tag: str | None, path: str) -> lab_volumes.Volume:
        """Attach a volume as the compute manager does."""
        volume = self.storage.volume()
        described = self.disk(
            tag, source_type='volume', destination_type='volume',
            volume_id=volume.id, device_name=path, boot_index=None,
            volume_size=volume.size // units.Gi)
        try:
            self.host.driver.attach_volume(
                self.host.context, volume.connection(), self.instance, path)
        except exception.NovaException:
            described.destroy()
            raise
        return volume

    def spawn(self, ports: list[model.VIF]) -> None:
        self.host.spawn(self.instance, self.image, model.NetworkInfo(ports))

    def served(self) -> list[dict[str, Any]]:
        """Return the devices in the answer of the metadata service."""
        answer = metadata_base.InstanceMetadata(
            self.stored(self.instance.uuid),
            network_info=model.NetworkInfo())
        return json.loads(answer.lookup('/openstack/latest/meta_data.json')
                          )['devices']

    def on_drive(self) -> list[dict[str, Any]]:
        return json.loads(self.host.run(
            self.instance, 'cat',
            '/config-drive/openstack/latest/meta_data.json'))['devices']

    def test_ports_and_disks(self) -> None:
        self.disk('system', source_type='image', boot_index=0,
                  image_id=self.image.id)
        self.disk(None, source_type='blank', boot_index=-1)
        self.disk('scratch', source_type='blank', boot_index=-1)
        self.disk(None, source_type='blank', boot_index=-1,
                  guest_format='swap')
        self.spawn([self.port(1, 'outside'), self.port(2, None),
                    self.port(3, 'inside')])
        wanted = [
            {'type': 'nic', 'mac': 'fa:16:3e:00:01:01', 'bus': 'none',
             'address': 'none', 'vf_trusted': False, 'tags': ['outside']},
            {'type': 'nic', 'mac': 'fa:16:3e:00:01:03', 'bus': 'none',
             'address': 'none', 'vf_trusted': False, 'tags': ['inside']},
            {'type': 'disk', 'path': '/', 'bus': 'none', 'address': 'none',
             'tags': ['system']},
            {'type': 'disk', 'path': '/mnt/ephemeral1', 'bus': 'none',
             'address': 'none', 'tags': ['scratch']}]
        self.assertEqual(wanted, self.on_drive())
        self.assertEqual(wanted, self.served())

    def test_nothing_is_tagged(self) -> None:
        self.spawn([self.port(1, None)])
        self.assertEqual([], self.on_drive())
        self.assertEqual([], self.served())

    def test_rebuilt_without_tags(self) -> None:
        port = self.port(1, 'outside')
        self.spawn([port])
        self.host.driver.destroy(self.host.context, self.instance, [port])
        self.spawn([])
        self.assertEqual([], self.served())

    def test_attached_later(self) -> None:
        self.spawn([self.port(1, 'outside')])
        for number, tag in ((2, 'inside'), (3, None)):
            self.host.driver.attach_interface(
                self.host.context, self.instance, self.image,
                self.port(number, tag))
        self.assertEqual(
            [('fa:16:3e:00:01:01', ['outside']),
             ('fa:16:3e:00:01:02', ['inside'])],
            [(device['mac'], device['tags']) for device in self.served()])
        self.assertIn('fa:16:3e:00:01:02', self.host.run(
            self.instance, 'cat', '/sys/class/net/eth1/address'))

    def test_volumes(self) -> None:
        self.spawn([self.port(1, 'outside')])
        self.attach(None, '/dev/vdb')
        self.assertEqual(1, len(self.served()))
        volume = self.attach('database', '/dev/vdc')
        # LXD refuses the device, after the metadata was published.
        self.proxy.spoil(0, faulty_proxy.Spoil.REFUSE)
        with self.assertRaises(exception.NovaException):
            self.attach('nothing', '/dev/vdd')
        self.proxy.behave()
        self.assertEqual(['outside'], self.served()[0]['tags'])
        self.assertEqual(
            [{'type': 'disk', 'path': '/dev/vdc', 'serial': volume.id,
              'bus': 'none', 'address': 'none', 'tags': ['database']}],
            self.served()[1:])
        # A rebuilt instance has it from the beginning.
        self.instance.device_metadata = None
        self.instance.save()
        device_tags.publish(self.host.context, self.instance, [])
        self.assertEqual(['database'], self.served()[0]['tags'])
