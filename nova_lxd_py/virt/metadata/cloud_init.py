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

"""Values of LXD's ``cloud-init.*`` configuration keys.

Guests normally get their metadata from Nova's metadata service or config
drive. ``[lxd] cloud_init_keys`` adds a third source, for images whose
cloud-init supports only the LXD datasource. Everything that a tenant controls
is a value here, encoded as JSON (a subset of YAML); LXD passes the values to
the guest and does not interpret them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
import json
from typing import Any

from nova import objects
from oslo_log import log as logging

LOG = logging.getLogger(__name__)

KEY_USER_DATA = 'cloud-init.user-data'
KEY_VENDOR_DATA = 'cloud-init.vendor-data'
KEY_NETWORK = 'cloud-init.network-config'


def config(instance: objects.Instance, network_info: Iterable[Mapping]
           ) -> dict[str, str]:
    """Return the LXD configuration that cloud-init's LXD datasource reads.

    :param instance: the :class:`nova.objects.Instance`.
    :param network_info: its ports, in the order of the guest's devices.
    :returns: LXD configuration keys. They need LXD's API extension
        ``cloud_init``.
    """
    keys = {KEY_VENDOR_DATA: vendor_data(instance),
            KEY_NETWORK: json.dumps(network_config(network_info))}
    user_data = _user_data(instance)
    if user_data is not None:
        keys[KEY_USER_DATA] = user_data
    return keys


def _user_data(instance: objects.Instance) -> str | None:
    """Decode the user data.

    :returns: None if there is none, or if it is not text: LXD's configuration
        values are text.
    """
    if not instance.user_data:
        return None
    try:
        return base64.b64decode(instance.user_data).decode()
    except (binascii.Error, UnicodeDecodeError):
        LOG.warning('User data is not text, so cloud-init.user-data is not '
                    'set; the metadata service and the config drive have it',
                    instance=instance)
        return None


def vendor_data(instance: objects.Instance) -> str:
    """Return vendor data that sets the host name and the key pair.

    LXD has no keys of its own for these. In cloud-init, user data overrides
    vendor data.

    :param instance: the :class:`nova.objects.Instance`.
    :returns: a cloud-config document.
    """
    document: dict[str, Any] = {'hostname': instance.hostname,
                                'preserve_hostname': False}
    keys = (instance.key_data or '').strip().splitlines()
    if keys:
        document['ssh_authorized_keys'] = keys
    return '#cloud-config\n' + json.dumps(document)


def network_config(network_info: Iterable[Mapping]) -> dict[str, Any]:
    """Return an instance's network configuration in cloud-init's version 2.

    :param network_info: its ports, in the order of the guest's devices.
    :returns: the configuration, to be serialised as YAML or JSON.
    """
    return {'version': 2, 'ethernets': {
        f'eth{number}': _ethernet(f'eth{number}', vif)
        for number, vif in enumerate(network_info)}}


def _ethernet(name: str, vif: Mapping) -> dict[str, Any]:
    network = vif['network']
    link: dict[str, Any] = {'match': {'macaddress': vif['address']},
                            'set-name': name}
    mtu = (network.get('meta') or {}).get('mtu')
    if mtu:
        link['mtu'] = int(mtu)
    addresses: list[str] = []
    routes: list[dict[str, str]] = []
    servers: list[str] = []
    for subnet in network.get('subnets') or ():
        meta = subnet.get('meta') or {}
        version = subnet.get('version')
        mode = meta.get('ipv6_address_mode')
        if mode in ('slaac', 'dhcpv6-stateless'):
            link['accept-ra'] = True
            continue
        if meta.get('dhcp_server'):
            link[f'dhcp{version}'] = True
            continue
        prefix = subnet['cidr'].rpartition('/')[2]
        addresses += [f'{ip["address"]}/{prefix}' for ip in subnet['ips']]
        gateway = (subnet.get('gateway') or {}).get('address')
        if gateway:
            routes.append({'to': '0.0.0.0/0' if version == 4 else '::/0',
                           'via': gateway})
        routes += [{'to': route['cidr'], 'via': route['gateway']['address']}
                   for route in subnet.get('routes') or ()]
        servers += [server['address'] for server in subnet.get('dns') or ()]
    if addresses:
        link['addresses'] = addresses
    if routes:
        link['routes'] = routes
    if servers:
        link['nameservers'] = {'addresses': servers}
    return link
