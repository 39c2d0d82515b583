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

"""Plugging and unplugging of ports, whatever their VIF type.

The manager finds the plugin for each port (stevedore namespace
``nova_lxd_py.vif``, entry points named by VIF type), converts exceptions to
Nova's, and waits for Neutron's events.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import sys
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
from nova_lxd_py.virt.vif import labels
from nova_lxd_py.virt.vif import port_index
from nova_lxd_py.virt.vif import qos
from nova_lxd_py.virt.vif import veth

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

NAMESPACE = 'nova_lxd_py.vif'

#: Plugin name for ports of type ``ovs`` with ``ovs_hybrid_plug``.
HYBRID = 'ovs_hybrid'

#: What Nova raises if Neutron's events do not arrive in time. Nova 31, which
#: runs with eventlet only, raises that library's timeout.
EVENT_TIMEOUT: type[BaseException] = (
    exception.InstanceEventTimeout
    if hasattr(exception, 'InstanceEventTimeout')
    else sys.modules['eventlet'].Timeout)

#: VIF types of ports that are not bound to a host.
_UNBOUND_TYPES = (model.VIF_TYPE_UNBOUND, model.VIF_TYPE_BINDING_FAILED)

# As many characters of the port's id as devname() has, so that the two names
# can be matched by eye.
_DEVICE_ID_LENGTH = 11


def device_name(vif: model.VIF) -> str:
    """Return the name of a port's LXD device.

    :param vif: the port.
    :returns: ``nic-`` and the first 11 characters of the port's id. It does
        not depend on the order of the instance's ports.
    """
    return 'nic-' + _short_id(vif)


def _short_id(vif: model.VIF) -> str:
    return vif['id'][:_DEVICE_ID_LENGTH]


class VIFManager:
    """Plugs and unplugs the ports of instances."""

    def __init__(self) -> None:
        os_vif.initialize()
        self._plugins = plugin_loader.load(
            NAMESPACE, base.VIFPlugin,  # type: ignore[type-abstract]
            'VIF', 'Ports')
        self._index = port_index.PortIndex()

    @property
    def supported_types(self) -> list[str]:
        """Names of the plugins, for error messages."""
        return sorted(self._plugins)

    def plug(self, instance: objects.Instance,
             network_info: Iterable[model.VIF], *,
             guest_stopped: bool = False) -> None:
        """Plug each port, or repair a plugged one.

        The traffic of a running guest is not interrupted. After a failure the
        ports before the one that failed stay plugged; call :meth:`unplug` for
        all of them.

        :param instance: the instance that the ports are bound to.
        :param network_info: the ports.
        :param guest_stopped: set it before a start, when the instance is known
            not to run: then a device that a guest unknown to LXD still holds
            is replaced. LXD could not start the instance otherwise.
        :raises nova.exception.VirtualInterfacePlugException: if a port cannot
            be plugged. No other exception is raised, since any other would
            end a starting nova-compute (``ComputeManager._init_instance``).
        """
        for vif in network_info:
            plugin = self._plugin(vif)
            try:
                limits = qos.limits(instance.flavor)
                with _lock(vif):
                    try:
                        plugin.plug(instance, vif, limits=limits,
                                    guest_stopped=guest_stopped)
                    finally:
                        self._index.note(instance, vif)
            except Exception as error:
                LOG.error('Port %(port)s could not be plugged: %(error)s',
                          {'port': vif['id'], 'error': error},
                          exc_info=not _is_logged(error), instance=instance)
                # Tenants see this message: no details of the host in it.
                raise exception.VirtualInterfacePlugException(_(
                    'Port %(port)s could not be connected to the host '
                    '(%(kind)s); the log of nova-compute has the details') % {
                        'port': vif['id'],
                        'kind': type(error).__name__}) from error

    def recreate(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Replace the host's devices of a port that a guest may hold.

        The guest loses its network device.

        :param instance: the instance that the port is bound to.
        :param vif: the port; Neutron may have deleted it already.
        :raises nova.exception.VirtualInterfacePlugException: if the port
            cannot be plugged.
        """
        self.plug(instance, [self._as_bound(vif)], guest_stopped=True)

    def block(self, instance: objects.Instance) -> None:
        """Drop all packets to a guest that has been frozen.

        Otherwise the host's kernel, which the network stack of a container
        belongs to, goes on answering for it. Errors are logged only: the guest
        is frozen nevertheless.

        :param instance: the instance. Its ports are found on the host.
        """
        for vif in self._index.ports(instance):
            try:
                with _lock(vif):
                    veth.VethPair(vif).block()
            except Exception as error:
                LOG.warning('Port %(port)s of the frozen server still answers '
                            'pings, since packets to it could not be blocked: '
                            '%(error)s', {'port': vif['id'], 'error': error},
                            instance=instance)

    def unblock(self, instance: objects.Instance) -> None:
        """Undo :meth:`block`, before the guest is thawed. Idempotent.

        :param instance: the instance.
        :raises nova.exception.VirtualInterfacePlugException: if packets to a
            port are still dropped.
        """
        for vif in self._index.ports(instance):
            try:
                with _lock(vif):
                    veth.VethPair(vif).unblock()
            except Exception as error:
                LOG.error('Packets to port %(port)s are still blocked: '
                          '%(error)s', {'port': vif['id'], 'error': error},
                          instance=instance)
                raise exception.VirtualInterfacePlugException(_(
                    'Packets to port %(port)s are still blocked (%(kind)s); '
                    'the log of nova-compute has the details') % {
                        'port': vif['id'],
                        'kind': type(error).__name__}) from error

    def unplug(self, instance: objects.Instance,
               network_info: Iterable[model.VIF] | None) -> None:
        """Unplug each port. Idempotent; raises nothing.

        The guest must be stopped, or the NIC removed from it before. If a port
        cannot be unplugged, that is logged, and the other ports are unplugged.

        :param instance: the instance that the ports were bound to.
        :param network_info: the ports; Neutron may have deleted them already.
        """
        for vif in network_info or []:
            try:
                bound = self._as_bound(vif)
                plugin = self._plugin(bound)
                with _lock(vif):
                    plugin.unplug(instance, bound)
            except Exception as error:
                LOG.error('Port %(port)s could not be unplugged, its network '
                          'device %(device)s or its switch port may be left '
                          'on this host: %(error)s',
                          {'port': vif['id'], 'device': base.devname(vif),
                           'error': error},
                          exc_info=not _is_logged(error), instance=instance)

    def unplug_all(self, instance: objects.Instance,
                   network_info: Iterable[model.VIF] | None,
                   devices: Mapping[str, Mapping[str, str]]) -> None:
        """Unplug all ports that an instance has on this host.

        As :meth:`unplug`, also for ports of which Nova does not know any more,
        see :mod:`.labels`.

        :param instance: the instance.
        :param network_info: the ports that Nova knows.
        :param devices: the devices of the LXD instance; empty without one.
        """
        vifs = {_short_id(vif): vif for vif in network_info or []}
        for vif in (*self._index.ports(instance),
                    *labels.ports_of_nics(devices)):
            if _short_id(vif) not in vifs:
                LOG.warning('Unplugging port %s..., which the server has on '
                            'this host, but not in Nova', _short_id(vif),
                            instance=instance)
                vifs[_short_id(vif)] = vif
        self.unplug(instance, vifs.values())
        # Forget those that are gone.
        self._index.ports(instance)

    def devices(self, network_info: Iterable[model.VIF]
                ) -> dict[str, dict[str, str]]:
        """Return the LXD devices of all ports.

        :param network_info: the ports; the guest sees them in this order as
            ``eth0``, ``eth1`` and so on.
        :returns: LXD devices by name, see :func:`device_name`.
        :raises nova.exception.VirtualInterfacePlugException: if no plugin
            supports the type of a port.
        """
        return {device_name(vif): self.device(vif, f'eth{number}')
                for number, vif in enumerate(network_info)}

    def device(self, vif: model.VIF, guest_name: str) -> dict[str, str]:
        """Return the LXD device of one port.

        :param vif: the port.
        :param guest_name: name of the network device in the guest.
        :returns: configuration of the LXD device.
        :raises nova.exception.VirtualInterfacePlugException: if no plugin
            supports the type of the port.
        """
        return self._plugin(vif).device(vif, guest_name)

    @contextlib.contextmanager
    def plugged(self, virtapi: Any, instance: objects.Instance,
                network_info: Iterable[model.VIF]) -> Iterator[None]:
        """Plug ports, run the block, then wait for ``network-vif-plugged``.

        Neutron needs some time to wire a port up, in which the block can do
        something useful, such as creating the container without starting it::

            undo.callback(vifs.unplug, instance, network_info)
            with vifs.plugged(virtapi, instance, network_info):
                guests.create(...)
            guest.start()

        Only ports that are not active are waited for: Neutron sends no event
        for the others. ``vif_plugging_timeout`` and ``vif_plugging_is_fatal``
        apply. The caller has to unplug after a failure.

        :param virtapi: Nova's VirtAPI.
        :param instance: the instance, which does not run yet.
        :param network_info: its ports.
        :raises nova.exception.VirtualInterfacePlugException: if a port cannot
            be plugged; the block is not entered then.
        :raises nova.exception.VirtualInterfaceCreateException: if Neutron does
            not wire a port up, and ``vif_plugging_is_fatal`` is set.
        """
        vifs = list(network_info)
        try:
            # The third argument's name differs between releases of Nova.
            with virtapi.wait_for_instance_event(
                    instance, _plug_events(vifs), CONF.vif_plugging_timeout,
                    error_callback=_neutron_failed):
                self.plug(instance, vifs, guest_stopped=True)
                yield
        except EVENT_TIMEOUT as error:
            LOG.warning('Timed out after %d seconds (vif_plugging_timeout) '
                        'waiting for network-vif-plugged events; see the logs '
                        'of Neutron and of its agent or ovn-controller on '
                        'this host',
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
        """Return an unbound port with the VIF type that it probably had.

        A port can be unbound in Neutron while its instance exists; its devices
        must be removed nevertheless.
        """
        if vif['type'] not in _UNBOUND_TYPES:
            return vif
        bound = model.VIF.hydrate(dict(vif, type=model.VIF_TYPE_OVS))
        if bound['network'] and not bound['network']['bridge']:
            bound['network']['bridge'] = CONF.neutron.ovs_bridge
        return bound


def _lock(vif: model.VIF) -> contextlib.AbstractContextManager[Any]:
    """Return the lock of a port.

    Not every operation of Nova that plugs holds the lock of the instance.
    """
    return lockutils.lock(f'nova-lxd-vif-{vif["id"]}')


def _is_logged(error: Exception) -> bool:
    """Return whether the error needs no traceback in the log."""
    return isinstance(error, (os_vif.exception.ExceptionBase,
                              exception.NovaException))


def _plug_events(vifs: list[model.VIF]) -> list[tuple[str, str]]:
    if not CONF.vif_plugging_timeout:
        return []
    return [('network-vif-plugged', vif['id']) for vif in vifs
            if vif.get('active', True) is False]


def _neutron_failed(event_name: str, instance: objects.Instance) -> bool:
    """Handle a failure event of Neutron, or a shutdown of nova-compute.

    :returns: False, to stop waiting.
    :raises nova.exception.VirtualInterfaceCreateException: if
        ``vif_plugging_is_fatal`` is set.
    """
    LOG.error('Neutron could not wire up a port: event %s failed',
              event_name, instance=instance)
    if CONF.vif_plugging_is_fatal:
        raise exception.VirtualInterfaceCreateException()
    return False
