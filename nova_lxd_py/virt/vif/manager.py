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

"""The ports of an instance, whatever their type.

This is what the rest of the driver knows of networking. It finds the plugin
for each port (stevedore namespace ``nova_lxd_py.vif``, entry points named by
VIF type), turns what goes wrong into Nova's exceptions, and waits for Neutron.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import contextlib
from typing import Any

from nova import conf as nova_conf
from nova import exception
from nova.i18n import _
from nova.network import model
from nova import objects
import os_vif
from oslo_concurrency import lockutils
from oslo_log import log as logging

from nova_lxd_py import plugin_loader
from nova_lxd_py.virt.vif import base
from nova_lxd_py.virt.vif import qos

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

NAMESPACE = 'nova_lxd_py.vif'

#: Plugin name for ports of type ``ovs`` that want a bridge of their own.
HYBRID = 'ovs_hybrid'

#: "Types" of ports that are bound to no host, or could not be.
_UNBOUND_TYPES = (model.VIF_TYPE_UNBOUND, model.VIF_TYPE_BINDING_FAILED)

# "lxc config device" and our own messages know a port by this name.
_DEVICE_NAME_LENGTH = 11


def device_name(vif: model.VIF) -> str:
    """Name the LXD device of a port.

    :returns: ``nic-`` and the first 11 characters of the port's id: the same
        as far as the port lives, at whichever place among the ports it is.
    """
    return 'nic-' + vif['id'][:_DEVICE_NAME_LENGTH]


class VIFManager:
    """Plugs, unplugs and describes the ports of instances."""

    def __init__(self) -> None:
        os_vif.initialize()
        self._plugins = plugin_loader.load(
            NAMESPACE, base.VIFPlugin,  # type: ignore[type-abstract]
            'VIF', 'Ports')

    @property
    def supported_types(self) -> list[str]:
        """Name the VIF types that there is a plugin for."""
        return sorted(self._plugins)

    def plug(self, instance: objects.Instance,
             network_info: Iterable[model.VIF], *,
             guest_stopped: bool = False) -> None:
        """Make the host's side of each port, or repair what is missing.

        A running guest does not notice. On failure the ports before the one
        that failed stay plugged; :meth:`unplug` takes back all of them.

        :param instance: whose ports they are.
        :param network_info: the ports.
        :param guest_stopped: set it before a start, when the instance is known
            not to run: then a device that an earlier, lost guest still holds
            is replaced. LXD could not start the instance otherwise.
        :raises nova.exception.VirtualInterfacePlugException: and nothing else;
            Nova stops a starting nova-compute for any other exception.
        """
        for vif in network_info:
            plugin = self._plugin(vif)
            try:
                limits = qos.limits(instance.flavor)
                with _lock(vif):
                    plugin.plug(instance, vif, limits=limits,
                                guest_stopped=guest_stopped)
            except Exception as error:
                LOG.error('Port %(port)s could not be plugged: %(error)s',
                          {'port': vif['id'], 'error': error},
                          exc_info=not _is_logged(error), instance=instance)
                # The tenant reads this: no details of the host in it.
                raise exception.VirtualInterfacePlugException(_(
                    'Port %(port)s could not be connected to the host '
                    '(%(kind)s); the log of nova-compute has the details') % {
                        'port': vif['id'],
                        'kind': type(error).__name__}) from error

    def unplug(self, instance: objects.Instance,
               network_info: Iterable[model.VIF] | None) -> None:
        """Remove the host's side of each port, be it there or not.

        A guest must not run, or have its NIC removed before. Nothing is
        raised: what could not be removed is logged, and the other ports still
        have their turn.

        :param instance: whose ports they are.
        :param network_info: the ports; Neutron may have deleted them already.
        """
        for vif in network_info or []:
            try:
                bound = self._as_bound(vif)
                plugin = self._plugin(bound)
                with _lock(vif):
                    plugin.unplug(instance, bound)
            except Exception as error:
                LOG.error('Port %(port)s could not be unplugged, something of '
                          'its network device %(device)s may be left on this '
                          'host: %(error)s',
                          {'port': vif['id'], 'device': base.devname(vif),
                           'error': error},
                          exc_info=not _is_logged(error), instance=instance)

    def devices(self, network_info: Iterable[model.VIF]
                ) -> dict[str, dict[str, str]]:
        """Describe each port as an LXD device.

        :param network_info: the ports, which the guest sees in this order as
            ``eth0``, ``eth1`` and so on.
        :returns: LXD devices by name, see :func:`device_name`.
        :raises nova.exception.VirtualInterfacePlugException: for a port of a
            type that there is no plugin for.
        """
        return {device_name(vif): self.device(vif, f'eth{number}')
                for number, vif in enumerate(network_info)}

    def device(self, vif: model.VIF, guest_name: str) -> dict[str, str]:
        """Describe one port as an LXD device, for one attached later.

        :param vif: the port.
        :param guest_name: what the guest shall see it as.
        :raises nova.exception.VirtualInterfacePlugException: for a port of a
            type that there is no plugin for.
        """
        return self._plugin(vif).device(vif, guest_name)

    @contextlib.contextmanager
    def plugged(self, virtapi: Any, instance: objects.Instance,
                network_info: Iterable[model.VIF]) -> Iterator[None]:
        """Plug before a block of code, and wait for Neutron after it.

        Neutron takes its time to wire a port up, in which the block can do
        something useful, such as making the container, without starting it::

            undo.callback(vifs.unplug, instance, network_info)
            with vifs.plugged(virtapi, instance, network_info):
                guests.create(...)
            guest.start()

        Only ports that are not active are waited for: Neutron says nothing
        more about the others. ``vif_plugging_timeout`` and
        ``vif_plugging_is_fatal`` apply. Unplugging after a failure is up to
        the caller.

        :param virtapi: Nova's VirtAPI.
        :param instance: the instance, which does not run yet.
        :param network_info: its ports.
        :raises nova.exception.VirtualInterfacePlugException: if a port could
            not be plugged; the block is not entered then.
        :raises nova.exception.VirtualInterfaceCreateException: if Neutron did
            not wire a port up, and that is fatal.
        """
        vifs = list(network_info)
        try:
            # Third by position: its name differs between releases of Nova.
            with virtapi.wait_for_instance_event(
                    instance, _plug_events(vifs), CONF.vif_plugging_timeout,
                    error_callback=_neutron_failed):
                self.plug(instance, vifs, guest_stopped=True)
                yield
        except exception.InstanceEventTimeout as error:
            LOG.warning('Neutron did not report all ports as wired up within '
                        '%d seconds (vif_plugging_timeout); see the logs of '
                        "Neutron and of its agent or controller on this host.",
                        CONF.vif_plugging_timeout, instance=instance)
            if CONF.vif_plugging_is_fatal:
                raise exception.VirtualInterfaceCreateException() from error

    def _plugin(self, vif: model.VIF) -> base.VIFPlugin:
        kind = vif['type']
        if kind in _UNBOUND_TYPES:
            raise exception.VirtualInterfacePlugException(_(
                'Port %(port)s is not bound to this host (%(kind)s). Neutron '
                'has no mechanism driver, or no live agent, that serves it '
                'here. Supported VIF types: %(supported)s') % {
                    'port': vif['id'], 'kind': kind,
                    'supported': ', '.join(self.supported_types)})
        if kind == model.VIF_TYPE_OVS and vif.is_hybrid_plug_enabled():
            kind = HYBRID
        plugin = self._plugins.get(kind)
        vnic_type = vif.get('vnic_type') or model.VNIC_TYPE_NORMAL
        if plugin is None or vnic_type not in plugin.vnic_types:
            raise exception.VirtualInterfacePlugException(_(
                'Port %(port)s of VIF type %(kind)s (vnic_type %(vnic)s) '
                'cannot be given to a container. Supported VIF types: '
                '%(supported)s') % {
                    'port': vif['id'], 'kind': kind, 'vnic': vnic_type,
                    'supported': ', '.join(self.supported_types)})
        return plugin

    @staticmethod
    def _as_bound(vif: model.VIF) -> model.VIF:
        """Make of an unbound port what it most likely was when it was plugged.

        Somebody may have unbound the port in Neutron while its server still
        existed; what was plugged must go nevertheless.
        """
        if vif['type'] not in _UNBOUND_TYPES:
            return vif
        bound = model.VIF.hydrate(dict(vif, type=model.VIF_TYPE_OVS))
        if bound['network'] and not bound['network']['bridge']:
            bound['network']['bridge'] = CONF.neutron.ovs_bridge
        return bound


def _lock(vif: model.VIF) -> contextlib.AbstractContextManager[Any]:
    """Let only one thread at a time work on a port.

    Nova's lock of the instance is not held in every operation that plugs.
    """
    return lockutils.lock(f'nova-lxd-vif-{vif["id"]}')


def _is_logged(error: Exception) -> bool:
    """Say whether the traceback is in the log already, or not worth it."""
    return isinstance(error, (os_vif.exception.ExceptionBase,
                              exception.NovaException))


def _plug_events(vifs: list[model.VIF]) -> list[tuple[str, str]]:
    if not CONF.vif_plugging_timeout:
        return []
    return [('network-vif-plugged', vif['id']) for vif in vifs
            if vif.get('active', True) is False]


def _neutron_failed(event_name: str, instance: objects.Instance) -> bool:
    """Handle that Neutron reports a failure, or that nova-compute ends.

    :returns: False, to stop waiting, unless that is fatal.
    """
    LOG.error('Neutron reports that a port could not be wired up (%s).',
              event_name, instance=instance)
    if CONF.vif_plugging_is_fatal:
        raise exception.VirtualInterfaceCreateException()
    return False
