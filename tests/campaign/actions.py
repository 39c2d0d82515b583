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
"""The operations of a campaign, done and waited for through the APIs."""

from __future__ import annotations

from collections.abc import Callable
import subprocess
import time
from typing import Any

from openstack import exceptions

from tests.campaign import plan
from tests.campaign.project import Failed
from tests.campaign.project import patiently
from tests.campaign.project import Project
from tests.campaign.project import Stuck
from tests.campaign.project import TIMEOUT
from tests.campaign.project import VOLUME_TIMEOUT
from tests.fixtures import cloud

#: Seconds after which a server that does nothing will not do it any more.
IDLE = 30 * cloud.PATIENCE
#: Seconds in which a guest can be reached, also while LXD starts again.
GUEST_TIMEOUT = 60 * cloud.PATIENCE

_FILE = '/root/campaign'


def address_of(server: Any) -> str:
    """Return a server's address in the network that it was created in."""
    return server.addresses['campaign'][0]['addr']


class Actions:
    """What is done with servers and volumes.

    :param project: the project.
    :param timeout: seconds in which a server gets into a status.
    """

    def __init__(self, project: Project, timeout: float = TIMEOUT) -> None:
        self._project = project
        self._timeout = timeout
        self._host = cloud.Host()
        self._image = cloud.CloudTestCase.image_id(
            project.operator, cloud.TINY)

    def perform(self, slot: plan.Slot, operation: plan.Operation) -> None:
        """Do an operation and wait until it is done.

        :raises Failed: if it is not done.
        """
        getattr(self, operation.name)(slot)
        if operation.after != plan.SAME:
            slot.status = operation.after

    # -- waiting

    def server(self, slot: plan.Slot) -> Any:
        """Return Nova's server, None if there is none."""
        try:
            return patiently(lambda: self._project.api.compute.get_server(
                slot.server))
        except exceptions.NotFoundException:
            return None

    def wait(self, slot: plan.Slot, status: str) -> None:
        """Wait for a status.

        :raises Failed: if it is not reached.
        :raises Stuck: if the server has been in another task for so long that
            Nova must have lost it.
        """
        deadline = time.monotonic() + self._timeout
        idle: float | None = None
        while True:
            server = self.server(slot)
            if server is None:
                raise Failed('the server is gone')
            now = time.monotonic()
            state = f'{server.status}/{server.task_state}'
            if server.task_state is None:
                if server.status == status:
                    return
                if server.status == 'ERROR':
                    raise Failed(f'ERROR, not {status}: '
                                 f'{(server.fault or {}).get("message")}')
                idle = idle or now
                # A build waits for the scheduler without a task.
                if now - idle > IDLE and server.status != 'BUILD':
                    raise Failed(f'it stays {state}, not {status}')
            else:
                idle = None
            if now > deadline:
                raise Stuck(f'{state} after {self._timeout:.0f} s, '
                            f'not {status}')
            time.sleep(0.5)

    def _until(self, what: str, condition: Callable[[], Any],
               timeout: float = 60 * cloud.PATIENCE) -> None:
        """Wait for something.

        :raises Failed: if it does not come.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise Failed(f'no {what} after {timeout} s')
            time.sleep(0.5)

    def volume(self, identifier: str) -> Any:
        return patiently(lambda: self._project.api.block_storage.get_volume(
            identifier))

    def wait_volume(self, identifier: str, status: str) -> None:
        """Wait for the status of a volume."""
        deadline = time.monotonic() + IDLE

        def reached() -> bool:
            found = self.volume(identifier).status
            if found != status and (found.startswith('error') or (
                    found in ('available', 'in-use') and
                    time.monotonic() > deadline)):
                raise Failed(f'volume {identifier} is {found}')
            return found == status
        self._until(f'volume {identifier} {status}', reached, VOLUME_TIMEOUT)

    # -- servers

    def create(self, slot: plan.Slot) -> None:
        self.create_from(slot, self._image)

    def create_from(self, slot: plan.Slot, image: str) -> None:
        self._boot(slot, image_id=image)

    def create_from_volume(self, slot: plan.Slot) -> None:
        self._boot(slot, block_device_mapping=[{
            'boot_index': 0, 'source_type': 'image',
            'destination_type': 'volume', 'uuid': self._image,
            'volume_size': 1, 'volume_type': 'loop',
            'delete_on_termination': True}])

    def _boot(self, slot: plan.Slot, **source: Any) -> None:
        slot.from_volume = 'image_id' not in source
        slot.data = slot.port = slot.address = None
        slot.large = False
        created = self._project.api.compute.create_server(
            name=f'campaign-{slot.number}',
            flavor_id=self._project.flavors[0].id,
            networks=[{'uuid': self._project.network.id}], **source)
        slot.server = created.id
        self.wait(slot, plan.ACTIVE)
        slot.address = address_of(self.server(slot))

    def _act(self, slot: plan.Slot, name: str, status: str,
             *arguments: Any) -> None:
        getattr(self._project.api.compute, f'{name}_server')(
            slot.server, *arguments)
        self.wait(slot, status)

    def stop(self, slot: plan.Slot) -> None:
        self._act(slot, 'stop', plan.SHUTOFF)

    def start(self, slot: plan.Slot) -> None:
        self._act(slot, 'start', plan.ACTIVE)

    def reboot_soft(self, slot: plan.Slot) -> None:
        self._act(slot, 'reboot', plan.ACTIVE, 'SOFT')

    def reboot_hard(self, slot: plan.Slot) -> None:
        self._act(slot, 'reboot', plan.ACTIVE, 'HARD')

    def pause(self, slot: plan.Slot) -> None:
        self._act(slot, 'pause', plan.PAUSED)

    def unpause(self, slot: plan.Slot) -> None:
        self._act(slot, 'unpause', plan.ACTIVE)

    def suspend(self, slot: plan.Slot) -> None:
        self._act(slot, 'suspend', plan.SUSPENDED)

    def resume(self, slot: plan.Slot) -> None:
        self._act(slot, 'resume', plan.ACTIVE)

    def rescue(self, slot: plan.Slot) -> None:
        self._act(slot, 'rescue', plan.RESCUE)

    def unrescue(self, slot: plan.Slot) -> None:
        self._act(slot, 'unrescue', plan.ACTIVE)

    def rebuild(self, slot: plan.Slot) -> None:
        slot.data = None
        self.rebuild_from(slot, self._image)

    def rebuild_from(self, slot: plan.Slot, image: str) -> None:
        """Rebuild a server with an image, also if it boots from a volume."""
        assert slot.status
        answer = self._project.api.compute.post(
            f'/servers/{slot.server}/action', microversion='2.93',
            json={'rebuild': {'imageRef': image}})
        exceptions.raise_from_response(answer)
        self.wait(slot, slot.status)

    def resize(self, slot: plan.Slot) -> None:
        self._act(slot, 'resize', plan.VERIFY_RESIZE,
                  self._project.flavors[not slot.large].id)

    def confirm(self, slot: plan.Slot) -> None:
        self._project.api.compute.confirm_server_resize(slot.server)
        self.wait(slot, plan.ACTIVE)
        slot.large = not slot.large

    def revert(self, slot: plan.Slot) -> None:
        self._project.api.compute.revert_server_resize(slot.server)
        self.wait(slot, plan.ACTIVE)

    def shelve(self, slot: plan.Slot) -> None:
        self._act(slot, 'shelve', plan.OFFLOADED)

    def unshelve(self, slot: plan.Slot) -> None:
        self._act(slot, 'unshelve', plan.ACTIVE)

    def create_image(self, slot: plan.Slot) -> None:
        assert slot.status
        image = self._project.api.compute.create_server_image(
            slot.server, f'campaign-{slot.number}')
        try:
            self.wait(slot, slot.status)
            self._until('image', lambda: patiently(
                lambda: self._project.api.image.get_image(image.id)
            ).status == 'active', VOLUME_TIMEOUT)
        except exceptions.NotFoundException:
            raise Failed('the image is gone') from None
        finally:
            patiently(lambda: self._project.api.image.delete_image(
                image.id, ignore_missing=True))

    def metadata(self, slot: plan.Slot) -> None:
        value = str(slot.random.random())
        self._project.api.compute.set_server_metadata(
            slot.server, campaign=value)
        if self.server(slot).metadata.get('campaign') != value:
            raise Failed('the metadata is not there')

    def console(self, slot: plan.Slot) -> None:
        self._project.api.compute.create_server_remote_console(
            slot.server, protocol='serial', type='serial')

    def delete(self, slot: plan.Slot) -> None:
        self._project.api.compute.delete_server(
            slot.server, ignore_missing=True)
        self.wait_gone(slot)

    def wait_gone(self, slot: plan.Slot) -> None:
        """Wait for the end of a server that is being deleted."""
        def gone() -> bool:
            server = self.server(slot)
            if server is not None and server.status == 'ERROR' and (
                    server.task_state is None):
                raise Failed(f'ERROR, not deleted: '
                             f'{(server.fault or {}).get("message")}')
            return server is None
        self._until(f'end of the server {slot.server}', gone, TIMEOUT)
        for volume in slot.attached():
            self.wait_volume(volume.identifier, 'available')
            volume.path = None
        slot.server = slot.port = slot.data = None

    # -- volumes and ports

    def attach_volume(self, slot: plan.Slot) -> None:
        free = slot.free()
        volume = (slot.random.choice(free) if free
                  else self._new_volume(slot))
        path = next(path for path in plan.PATHS if path not in {
            other.path for other in slot.volumes})
        self._project.api.compute.create_volume_attachment(
            slot.server, volume_id=volume.identifier, device=path)
        volume.path = path
        self.wait_volume(volume.identifier, 'in-use')

    def _new_volume(self, slot: plan.Slot) -> plan.Volume:
        kind, mode = slot.random.choice((
            ('loop', 'block'), ('loop', 'filesystem'), ('nfs', 'block')))
        metadata = {'lxd_volume_mode': mode}
        created = self._project.api.block_storage.create_volume(
            size=1, name=f'campaign-{slot.number}', volume_type=kind,
            metadata=metadata)
        self.wait_volume(created.id, 'available')
        volume = plan.Volume(created.id, kind, mode)
        slot.volumes.append(volume)
        return volume

    def detach_volume(self, slot: plan.Slot) -> None:
        volume = slot.random.choice(slot.attached())
        self._project.api.compute.delete_volume_attachment(
            slot.server, volume.identifier)
        self.wait_volume(volume.identifier, 'available')
        volume.path = None

    def extend_volume(self, slot: plan.Slot) -> None:
        volume = slot.random.choice(slot.extendable())
        size = volume.size + 1
        answer = self._project.api.block_storage.post(
            f'/volumes/{volume.identifier}/action', microversion='3.42',
            json={'os-extend': {'new_size': size}})
        exceptions.raise_from_response(answer)
        self._until(f'volume {volume.identifier} of {size} GiB', lambda: (
            self.volume(volume.identifier).size == size and
            self.volume(volume.identifier).status == 'in-use'), VOLUME_TIMEOUT)
        volume.size = size

    def attach_port(self, slot: plan.Slot) -> None:
        created = self._project.api.compute.create_server_interface(
            slot.server, net_id=self._project.side.id)
        slot.port = created.port_id
        self._until('the port', lambda: slot.port in self.ports(slot))

    def detach_port(self, slot: plan.Slot) -> None:
        self._project.api.compute.delete_server_interface(
            slot.port, slot.server)
        self._until('the end of the port', lambda: slot.port not in
                    self.ports(slot))
        slot.port = None

    def ports(self, slot: plan.Slot) -> dict[str, str]:
        """Networks of a server's ports by the ports' IDs."""
        return patiently(lambda: {
            port.id: port.network_id for port in
            self._project.api.network.ports(device_id=slot.server)})

    # -- in the guest

    def check(self, slot: plan.Slot) -> list[str]:
        """Compare data of a running server, write where there is none.

        :returns: what is wrong.
        :raises Failed: if the guest cannot be reached.
        """
        if slot.status != plan.ACTIVE:
            return []
        wrong = []
        if slot.data is None:
            slot.data = self._write(slot, _FILE)
        elif slot.data != self._read(slot, _FILE):
            wrong.append('the data in its root is lost')
        for volume in slot.attached():
            assert volume.path
            target = (volume.path if volume.mode == 'block' else
                      f'/mnt/{volume.path.rpartition("/")[2]}/campaign')
            if volume.data is None:
                volume.data = self._write(slot, target)
            elif volume.data != self._read(slot, target):
                wrong.append(f'the data of volume {volume.identifier} '
                             f'({volume.kind}, {volume.mode}) at {target} is '
                             'lost')
        self._until(f'answer of {slot.address}', lambda: self._answers(slot),
                    GUEST_TIMEOUT)
        return wrong

    def _write(self, slot: plan.Slot, target: str) -> str:
        # A device has to be there: the guest must not make a file of it.
        return self._execute(
            slot, f'case {target} in /dev/*) [ -b {target} ];; esac && '
            'dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null && '
            f'dd if=/tmp/data of={target} bs=64k conv=fsync 2>/dev/null && '
            'sync && sha256sum </tmp/data')

    def _read(self, slot: plan.Slot, target: str) -> str:
        return self._execute(
            slot, f'dd if={target} bs=64k count=4 2>/dev/null | sha256sum')

    def _execute(self, slot: plan.Slot, script: str) -> str:
        """Run a script in a guest, also if LXD is just being restarted."""
        assert slot.server
        deadline = time.monotonic() + GUEST_TIMEOUT
        while True:
            try:
                return self._host.execute(
                    self._host.name_of(slot.server), script).strip()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                if time.monotonic() > deadline:
                    raise Failed(f'in the guest: {error}') from None
            time.sleep(1)

    def _answers(self, slot: plan.Slot) -> bool:
        """Whether the guest's SSH server answers on the first network."""
        done = subprocess.run(
            ['ip', 'netns', 'exec', f'ovnmeta-{self._project.network.id}',
             'bash', '-c', f'exec 3<>/dev/tcp/{slot.address}/22'],
            timeout=30, check=False, capture_output=True)
        return done.returncode == 0
