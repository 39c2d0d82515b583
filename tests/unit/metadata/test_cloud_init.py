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

"""Unit tests of LXD's cloud-init keys."""

from __future__ import annotations

import base64
import json

from nova.network import model
from nova import objects
from oslotest import base

from nova_lxd_py.virt.metadata import cloud_init

objects.register_all()


def make_instance(**kwargs: object) -> objects.Instance:
    values: dict[str, object] = {
        'uuid': '9a9a9a9a-9a9a-4a9a-9a9a-9a9a9a9a9a9f', 'hostname': 'web-1',
        'user_data': None, 'key_data': None}
    return objects.Instance(**{**values, **kwargs})


def make_vif(subnets: list[model.Subnet], mac: str = 'fa:16:3e:00:00:01',
             **meta: object) -> model.VIF:
    return model.VIF(id='p', address=mac, network=model.Network(
        id='n', bridge='br-int', label='net', subnets=subnets, **meta))


def make_subnet(cidr: str, address: str, version: int = 4,
                gateway: str | None = None, **meta: object) -> model.Subnet:
    return model.Subnet(
        cidr=cidr, version=version,
        ips=[model.FixedIP(address=address, version=version)],
        gateway=model.IP(address=gateway) if gateway else None,
        dns=[model.IP(address='192.0.2.53')] if version == 4 else [], **meta)


class CloudInitTestCase(base.BaseTestCase):

    def test_user_data(self) -> None:
        encoded = base64.b64encode('#!/bin/sh\necho ü'.encode()).decode()
        config = cloud_init.config(make_instance(user_data=encoded), [])
        self.assertEqual('#!/bin/sh\necho ü', config['cloud-init.user-data'])

    def test_no_user_data(self) -> None:
        self.assertNotIn('cloud-init.user-data',
                         cloud_init.config(make_instance(), []))

    def test_user_data_that_is_not_text(self) -> None:
        for content in (base64.b64encode(b'\x1f\x8b\xff').decode(), '%%%x'):
            self.assertNotIn('cloud-init.user-data', cloud_init.config(
                make_instance(user_data=content), []))

    def test_vendor_data(self) -> None:
        """Tenants' input stays data, whatever it looks like."""
        key = 'ssh-ed25519 AAAA me\nruncmd: [evil]'
        text = cloud_init.config(make_instance(
            hostname='a"\n- b', key_data=key), [])['cloud-init.vendor-data']
        first, rest = text.split('\n', 1)
        self.assertEqual('#cloud-config', first)
        self.assertEqual({
            'hostname': 'a"\n- b', 'preserve_hostname': False,
            'ssh_authorized_keys': ['ssh-ed25519 AAAA me', 'runcmd: [evil]']},
            json.loads(rest))

    def test_dhcp(self) -> None:
        vif = make_vif([make_subnet('10.0.0.0/24', '10.0.0.5',
                                    dhcp_server='10.0.0.1')], mtu=1442)
        self.assertEqual({'version': 2, 'ethernets': {'eth0': {
            'match': {'macaddress': 'fa:16:3e:00:00:01'},
            'set-name': 'eth0', 'mtu': 1442, 'dhcp4': True}}},
            cloud_init.network_config([vif]))

    def test_static(self) -> None:
        subnet = make_subnet('10.0.0.0/24', '10.0.0.5', gateway='10.0.0.1')
        subnet['routes'] = [model.Route(cidr='10.9.0.0/16', gateway=model.IP(
            address='10.0.0.9'))]
        link = cloud_init.network_config([make_vif([subnet])])[
            'ethernets']['eth0']
        self.assertEqual(['10.0.0.5/24'], link['addresses'])
        self.assertEqual([{'to': '0.0.0.0/0', 'via': '10.0.0.1'},
                          {'to': '10.9.0.0/16', 'via': '10.0.0.9'}],
                         link['routes'])
        self.assertEqual({'addresses': ['192.0.2.53']}, link['nameservers'])

    def test_several_ports_and_ipv6(self) -> None:
        vifs = [make_vif([make_subnet('2001:db8::/64', '2001:db8::5', 6,
                                      ipv6_address_mode='slaac')]),
                make_vif([make_subnet('2001:db8:1::/64', '2001:db8:1::5', 6,
                                      '2001:db8:1::1')], 'fa:16:3e:00:00:02')]
        ethernets = cloud_init.network_config(vifs)['ethernets']
        self.assertEqual(['eth0', 'eth1'], sorted(ethernets))
        self.assertTrue(ethernets['eth0']['accept-ra'])
        self.assertNotIn('addresses', ethernets['eth0'])
        self.assertEqual(['2001:db8:1::5/64'], ethernets['eth1']['addresses'])
        self.assertEqual([{'to': '::/0', 'via': '2001:db8:1::1'}],
                         ethernets['eth1']['routes'])

    def test_port_without_subnet(self) -> None:
        self.assertEqual(
            {'match': {'macaddress': 'fa:16:3e:00:00:01'},
             'set-name': 'eth0'},
            cloud_init.network_config([make_vif([])])['ethernets']['eth0'])
