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

"""Freezing of instances, so that snapshots of their disks are consistent.

The processes of a container can only be stopped altogether, so this is done
only for instances whose image has ``os_require_quiesce``. A key of the LXD
instance says that it is frozen for a snapshot, so that it is thawed whatever
happens to nova-compute or LXD meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import threading
import time

from nova.compute import power_state
from nova import exception
from nova import objects
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.volume import server_volumes

LOG = logging.getLogger(__name__)

#: Seconds between attempts to thaw an instance while LXD cannot be reached.
RETRY_INTERVAL = 1
#: Seconds after which an instance is thawed although Nova has not asked for
#: that: nova-api, which does, may have ended. It only asks Cinder to begin
#: with a snapshot of each volume, and does not wait for them.
DEADLINE = 300


class Quiescer:
    """Freezes instances for snapshots of their disks and thaws them again.

    :param options: the ``[lxd]`` option group.
    :param guests: the driver's LXD instances.
    :param volumes: Cinder volumes.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 guests: registry.GuestRegistry,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._options = options
        self._guests = guests
        self._volumes = volumes
        #: For quiesced instances that Nova has yet to unquiesce, by UUID.
        self._deadlines: dict[str, threading.Timer] = {}

    def quiesce(self, instance: objects.Instance,
                image_meta: objects.ImageMeta) -> None:
        """Freeze an instance, so that its volumes are consistent.

        See :meth:`nova.virt.driver.ComputeDriver.quiesce`.

        :param instance: the instance.
        :param image_meta: its image.
        :raises nova.exception.InstanceQuiesceNotSupported: if the image does
            not ask for it, or if the cached data of a volume cannot be
            written.
        """
        if not _must_quiesce(image_meta):
            # A snapshot of its volumes is made all the same, and gets at
            # least what has been written until now.
            with self._guests.changing(instance):
                self._volumes.flush(instance, self._guests.active(instance))
            raise exception.InstanceQuiesceNotSupported(
                instance_id=instance.uuid,
                reason='a container is quiesced by freezing it; set '
                       'os_require_quiesce=true on its image to allow that')
        with self._guests.changing(instance):
            guest = self._guests.active(instance)
            with contextlib.ExitStack() as failure:
                if guest.power_state == power_state.RUNNING:
                    # Nova does not call unquiesce then.
                    failure.callback(self._unfreeze_logged, guest)
                    self._freeze(guest)
                failed = self._volumes.flush(instance, guest)
                if failed:
                    raise exception.InstanceQuiesceNotSupported(
                        instance_id=instance.uuid,
                        reason='the host could not write its cached data of '
                               f'volumes {", ".join(failed)}')
                failure.pop_all()
            self._forget_deadline(instance)
            timer = threading.Timer(DEADLINE, self._expire, (instance,))
            timer.daemon = True
            self._deadlines[instance.uuid] = timer
            timer.start()

    def unquiesce(self, instance: objects.Instance) -> None:
        """Thaw an instance after :meth:`quiesce`; a thawed one is a success.

        See :meth:`nova.virt.driver.ComputeDriver.unquiesce`.
        """
        with self._guests.changing(instance):
            # From here on, :meth:`thaw` completes what fails.
            self._forget_deadline(instance)
            self._retry_unreachable(lambda: self._unquiesce(instance))

    def _forget_deadline(self, instance: objects.Instance) -> None:
        timer = self._deadlines.pop(instance.uuid, None)
        if timer is not None:
            timer.cancel()

    def _expire(self, instance: objects.Instance) -> None:
        """Thaw an instance that Nova has not unquiesced."""
        with self._guests.changing(instance):
            if self._deadlines.pop(instance.uuid, None) is None:
                return
            LOG.error('Thawing the guest: it was quiesced %d seconds ago, and '
                      'Nova has not unquiesced it', DEADLINE,
                      instance=instance)
            # What fails is completed by thaw().
            with _errors_logged(instance.uuid):
                self._retry_unreachable(lambda: self._unquiesce(instance))

    def _unquiesce(self, instance: objects.Instance) -> None:
        guest = self._guests.active(instance)
        if lxd_guest.KEY_QUIESCED in guest.config:
            self._unfreeze(guest)

    @contextlib.contextmanager
    def quiesced(self, instance: objects.Instance,
                 guest: lxd_guest.Guest) -> Iterator[None]:
        """Keep a guest frozen within the context if its image asks for it.

        :param instance: the instance, whose lock is held.
        :param guest: its LXD instance, just read.
        :raises errors.LXDError: if LXD cannot freeze or thaw it.
        """
        if (guest.power_state != power_state.RUNNING or
                not _must_quiesce(instance.image_meta)):
            yield
            return
        LOG.info('Freezing the guest while its root disk is copied, since the '
                 'image has os_require_quiesce', instance=instance)
        try:
            self._freeze(guest)
            yield
        finally:
            self._retry_unreachable(lambda: self._unfreeze(guest))

    def thaw(self) -> None:
        """Thaw instances that stayed frozen after they had been quiesced, such
        as while LXD could not be reached; errors are logged only.

        Instances that Nova has yet to unquiesce stay frozen.
        """
        with _errors_logged():
            for guest in self._guests.all():
                if (lxd_guest.KEY_QUIESCED in guest.config and
                        guest.role != roles.SNAPSHOT):
                    with _errors_logged(guest.uuid):
                        self._thaw(guest)

    def _thaw(self, guest: lxd_guest.Guest) -> None:
        with self._guests.lock(guest.uuid):
            if guest.uuid in self._deadlines:
                return
            with contextlib.suppress(errors.InstanceNotFound):
                if lxd_guest.KEY_QUIESCED in guest.reload().config:
                    LOG.warning('Thawing LXD instance %s, which an '
                                'interrupted snapshot left frozen',
                                guest.name, instance_uuid=guest.uuid)
                    self._unfreeze(guest)

    def _retry_unreachable(self, action: Callable[[], None]) -> None:
        """Call a function, again while LXD cannot be reached, such as while
        it restarts, for ``[lxd] request_timeout``."""
        deadline = time.monotonic() + self._options.request_timeout
        while True:
            try:
                return action()
            except (errors.Unreachable, errors.OperationLost,
                    errors.DeadlineExceeded):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_INTERVAL)

    def _unfreeze_logged(self, guest: lxd_guest.Guest) -> None:
        with _errors_logged(guest.uuid):
            self._unfreeze(guest)

    @staticmethod
    def _freeze(guest: lxd_guest.Guest) -> None:
        guest.update(config={lxd_guest.KEY_QUIESCED: 'true'})
        with contextlib.suppress(errors.NotRunning):
            guest.freeze()

    @staticmethod
    def _unfreeze(guest: lxd_guest.Guest) -> None:
        with contextlib.suppress(errors.NotRunning):
            guest.unfreeze()
        guest.update(config={lxd_guest.KEY_QUIESCED: None})


def _must_quiesce(image_meta: objects.ImageMeta) -> bool:
    return bool(image_meta.properties.get('os_require_quiesce', False))


@contextlib.contextmanager
def _errors_logged(uuid: str | None = None) -> Iterator[None]:
    """Log errors of LXD only; :meth:`Quiescer.thaw` is called again.

    :param uuid: UUID of the instance, if it is only one.
    """
    try:
        yield
    except errors.LXDError as exc:
        LOG.warning('Could not thaw after a snapshot: %s', exc,
                    instance_uuid=uuid)
