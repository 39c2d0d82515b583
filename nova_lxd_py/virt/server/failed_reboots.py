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
"""Reboots by guests that LXD cannot complete.

LXD restarts a guest that reboots itself. Root in a guest can rename or delete
a network device that was attached while the guest ran; then LXD does not find
the device when it stops the guest, the kernel deletes it with the guest, and
LXD cannot start the guest without it.
"""

from __future__ import annotations

from nova.compute import power_state
from nova.compute import vm_states
from nova import conf as nova_conf
from nova import context as nova_context
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.vif import manager as vif_manager

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)


class RebootCompleter:
    """Starts guests whose reboot has failed.

    :param guests: the driver's LXD instances.
    :param vifs: plugs ports.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 vifs: vif_manager.VIFManager) -> None:
        self._guests = guests
        self._vifs = vifs

    def complete(self, uuid: str) -> bool:
        """Start a guest that LXD has stopped for a reboot and not started.

        Everything but the network devices is as it was while the guest ran.

        :param uuid: UUID of the server.
        :returns: whether it runs; errors are logged only.
        """
        try:
            with self._guests.changing(_look_up(uuid)):
                # Look it up again: Nova may have stopped it while this waited
                # for the lock.
                return self._start(_look_up(uuid))
        except Exception as exc:
            # Not only LXD: Nova's database may be unreachable.
            LOG.warning('Could not complete the reboot of a guest: %s', exc,
                        instance_uuid=uuid)
            return False

    def _start(self, instance: objects.Instance) -> bool:
        if (instance.host != CONF.host or instance.task_state is not None or
                instance.vm_state != vm_states.ACTIVE):
            return False
        guest = self._guests.active(instance)
        if guest.power_state == power_state.SHUTDOWN:
            LOG.info('Starting the guest, since LXD could not complete its '
                     'reboot', instance=instance)
            self._vifs.plug(instance, instance.get_network_info(),
                            guest_stopped=True)
            guest.start()
        return True


def _look_up(uuid: str) -> objects.Instance:
    return objects.Instance.get_by_uuid(
        nova_context.get_admin_context(), uuid,
        expected_attrs=['flavor', 'info_cache'])
