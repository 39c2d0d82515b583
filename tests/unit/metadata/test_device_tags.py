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

"""Device tags, with Nova's objects in a database."""

from __future__ import annotations

from typing import Any
import uuid
import warnings

from nova import context as nova_context
from nova.network import model
from nova import objects
from nova import test
from nova.tests.unit import utils as test_utils

from nova_lxd_py.virt.metadata import device_tags

MACS = [f'fa:16:3e:00:01:{number:02x}' for number in range(4)]


class DeviceTagsTestCase(test.TestCase):

    def setUp(self) -> None:
        super().setUp()
        # Nova's fixtures turn SQLAlchemy 2.1's warnings about Nova's own
        # queries into errors.
        warnings.filterwarnings('ignore', message=r'The noload\(\) option')
        self.context = nova_context.get_admin_context()
        self.instance = test_utils.get_test_instance(self.context, obj=True)

    def stored(self) -> list[objects.DeviceMetadata]:
        """Return what the metadata service reads."""
        known = objects.Instance.get_by_uuid(
            self.context, self.instance.uuid,
            expected_attrs=['device_metadata']).device_metadata
        return list(known.devices) if known else []

    def tags(self) -> list[list[str]]:
        return [device.tags for device in self.stored()]

    def port(self, number: int, tag: str | None, **kwargs: Any) -> model.VIF:
        port = str(uuid.uuid4())
        objects.VirtualInterface(
            self.context, address=f'{MACS[number]}/{port}', uuid=port,
            tag=tag, instance_uuid=self.instance.uuid).create()
        return model.VIF(id=port, address=MACS[number],
                         network=model.Network(id=str(uuid.uuid4())),
                         **kwargs)

    def disk(self, tag: str | None, **kwargs: Any
             ) -> objects.BlockDeviceMapping:
        kwargs = {'destination_type': 'local', 'boot_index': -1, **kwargs}
        disk = objects.BlockDeviceMapping(
            self.context, instance_uuid=self.instance.uuid, tag=tag, **kwargs)
        disk.create()
        return disk

    def volume(self, tag: str | None, name: str = '/dev/vdb'
               ) -> objects.BlockDeviceMapping:
        return self.disk(tag, source_type='volume', destination_type='volume',
                         volume_id=str(uuid.uuid4()), device_name=name)

    def publish(self, *ports: model.VIF) -> None:
        device_tags.publish(self.context, self.instance, ports)

    def test_ports(self) -> None:
        self.publish(self.port(0, 'outside'), self.port(1, None),
                     self.port(2, 'inside'))
        self.assertEqual([(MACS[0], ['outside']), (MACS[2], ['inside'])],
                         [(nic.mac, nic.tags) for nic in self.stored()])
        self.assertFalse(any(nic.vf_trusted for nic in self.stored()))
        self.assertFalse(any('vlan' in nic for nic in self.stored()))

    def test_vlan(self) -> None:
        """The guest has to know it, whether the port is tagged or not."""
        self.publish(
            self.port(0, None, vnic_type=model.VNIC_TYPE_DIRECT,
                      details={model.VIF_DETAILS_VLAN: '42'}),
            self.port(1, 'data', vnic_type=model.VNIC_TYPE_DIRECT,
                      profile={'trusted': 'true'}))
        first, second = self.stored()
        self.assertEqual((42, [], False),
                         (first.vlan, first.tags, first.vf_trusted))
        self.assertEqual((['data'], True), (second.tags, second.vf_trusted))
        self.assertNotIn('vlan', second)

    def test_disks(self) -> None:
        self.disk('system', source_type='image', boot_index=0,
                  image_id=str(uuid.uuid4()))
        self.disk(None, source_type='blank')
        self.disk('scratch', source_type='blank')
        self.disk('swap', source_type='blank', guest_format='swap')
        self.volume(None)
        volume = self.volume('database', '/dev/vdc')
        self.publish()
        self.assertEqual(
            [('/', ['system'], None), ('/mnt/ephemeral1', ['scratch'], None),
             ('/dev/vdc', ['database'], volume.volume_id)],
            [(disk.path, disk.tags,
              disk.serial if 'serial' in disk else None)
             for disk in self.stored()])

    def test_untagged_disks(self) -> None:
        self.disk(None, source_type='image', boot_index=0,
                  image_id=str(uuid.uuid4()))
        self.disk(None, source_type='blank')
        self.volume(None)
        self.publish()
        self.assertEqual([], self.stored())

    def test_no_tags_any_more(self) -> None:
        self.publish(self.port(0, 'outside'))
        self.publish(self.port(1, None))
        self.assertEqual([], self.stored())
        # Nothing to save.
        self.instance.save = None
        self.publish()

    def test_port_is_attached(self) -> None:
        self.publish(self.port(0, 'outside'))
        device_tags.publish_port(self.context, self.instance,
                                 self.port(1, 'inside'))
        self.assertEqual([['outside'], ['inside']], self.tags())
        device_tags.publish_port(self.context, self.instance,
                                 self.port(2, None))
        self.assertEqual([['outside'], ['inside']], self.tags())

    def test_port_is_attached_twice(self) -> None:
        port = self.port(0, 'outside')
        for _time in range(2):
            device_tags.publish_port(self.context, self.instance, port)
        self.assertEqual([['outside']], self.tags())

    def test_volume_is_attached(self) -> None:
        self.publish(self.port(0, 'outside'))
        volume = self.volume('database', 'vdb')
        for _time in range(2):
            device_tags.publish_volume(self.instance, volume)
        self.assertEqual([['outside'], ['database']], self.tags())
        # Nova's names of devices may lack the directory.
        self.assertEqual('/dev/vdb', self.stored()[1].path)
        device_tags.unpublish_volume(self.instance, str(uuid.uuid4()))
        self.assertEqual([['outside'], ['database']], self.tags())
        device_tags.unpublish_volume(self.instance, volume.volume_id)
        self.assertEqual([['outside']], self.tags())
