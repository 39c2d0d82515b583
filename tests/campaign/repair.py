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
"""Repairs servers and volumes as a user or an operator would after a fault."""

from __future__ import annotations

import contextlib
import tempfile
import time
from typing import Any

from openstack import exceptions

from tests.campaign import actions
from tests.campaign import plan
from tests.campaign.project import Failed
from tests.campaign.project import patiently
from tests.campaign.project import Project
from tests.fixtures import cloud
from tests.fixtures import other_host

#: Seconds after which Nova is taken to have lost a task.
STUCK = 30 * cloud.PATIENCE
_STEADY = ('available', 'in-use')


class Repair:
    """Finds out what an interrupted operation has left, and repairs it.

    :param project: the project.
    :param actions_: what is done with servers.
    """

    def __init__(self, project: Project, actions_: actions.Actions) -> None:
        self._project = project
        self._actions = actions_

    def run(self, slot: plan.Slot, operation: plan.Operation,
            stuck: bool = False) -> list[str]:
        """Bring a server back into a status from which it goes on.

        :param slot: the server.
        :param operation: what was done with it.
        :param stuck: whether it has been waited for long enough.
        :returns: what was necessary.
        :raises Failed: if it does not get there.
        """
        if slot.server is None:
            # Nova has refused to create it.
            slot.status = None
            self._volumes(slot, [])
            return []
        how: list[str] = []
        if operation.name in ('resize', 'confirm', 'revert', 'delete'):
            self._project.note_migrations(slot.server)
        server = self._settled(slot, how, 0 if stuck else STUCK)
        if server is not None and operation.name == 'delete':
            how.append('deleted again')
            self._project.api.compute.delete_server(slot.server)
            self._actions.wait_gone(slot)
            server = None
        if server is None:
            if operation.name != 'delete':
                raise Failed('the server is gone')
            slot.status = slot.server = slot.port = slot.data = None
            self._volumes(slot, how)
            return how
        if operation.name.startswith('create') and (
                operation.name != 'create_image') and (
                server.status != plan.ACTIVE):
            how.append('built again')
            self.give_up(slot)
            return how
        if server.status == 'ERROR':
            self._error(slot, operation, how)
        else:
            self._adopt(slot, server)
        self._volumes(slot, how)
        self._flavor_and_port(slot)
        return how

    def reboot(self, slot: plan.Slot) -> list[str]:
        """Hard reboot a server that runs for Nova, but does not answer.

        :returns: what was done.
        """
        if slot.status != plan.ACTIVE:
            return []
        self._actions.reboot_hard(slot)
        return ['hard rebooted']

    def _settled(self, slot: plan.Slot, how: list[str], timeout: float
                 ) -> Any:
        """Wait until Nova does nothing with a server, or has lost the task."""
        deadline = time.monotonic() + timeout
        while True:
            server = self._actions.server(slot)
            if server is None or (
                    server.task_state is None and
                    server.status not in ('BUILD', 'SHELVED')):
                return server
            if time.monotonic() > deadline:
                break
            time.sleep(1)
        if server.status == 'BUILD':
            # Nova cannot reset what no cell has.
            return server
        how.append(f'reset from {server.status}/{server.task_state}')
        if server.status == 'SHELVED' and server.task_state is None:
            self._project.operator.compute.post(
                f'/servers/{slot.server}/action',
                json={'shelveOffload': None})
            self._actions.wait(slot, plan.OFFLOADED)
        else:
            patiently(lambda: self._project.operator.compute.
                      reset_server_state(slot.server, 'error'))
        return self._actions.server(slot)

    def _error(self, slot: plan.Slot, operation: plan.Operation,
               how: list[str]) -> None:
        """Repair a server in ERROR."""
        slot.status = plan.ACTIVE
        if operation.name == 'rebuild':
            # Nova detaches volumes for it and attaches them again.
            for volume in slot.attached():
                if self._steady(volume).status not in _STEADY:
                    how.append('volume reset')
                    self._reset(slot, volume)
            how.append('rebuilt again')
            self._actions.rebuild(slot)
            return
        try:
            self._actions.reboot_hard(slot)
            how.append('hard rebooted')
        except (Failed, exceptions.SDKException):
            if operation.name in ('resize', 'revert'):
                self._refresh(slot, how)
            elif operation.name in ('shelve', 'unshelve') and (
                    not slot.from_volume):
                # Nova has lost its place in it: the root is in the image.
                self._from_image(slot)
                how.append('created from the shelved image')
            else:
                raise

    def _from_image(self, slot: plan.Slot) -> None:
        """Create a server from the image of a shelved one, and delete that.

        :raises Failed: if there is no image.
        """
        # An interrupted shelve may have left another one.
        images = patiently(lambda: [
            image.id for image in self._project.api.image.images(
                name=f'campaign-{slot.number}-shelved', status='active',
                sort='created_at:desc')
            if image.instance_uuid == slot.server])
        if not images:
            raise Failed('there is no image of the shelved server')
        data = slot.data
        self.give_up(slot)
        self._actions.create_from(slot, images[0])
        slot.status, slot.data = plan.ACTIVE, data

    def _refresh(self, slot: plan.Slot, how: list[str]) -> None:
        """Let Cinder connect the volumes of a server again.

        Nova disconnects them in the middle of a resize, and only its second
        half or this procedure connects them again.

        :raises Failed: if the server has no volumes.
        """
        assert slot.server
        volumes = patiently(lambda: [
            attachment.volume_id for attachment in
            self._project.api.compute.volume_attachments(slot.server)])
        if not volumes:
            raise Failed('no hard reboot repairs it, and it has no volumes')
        patiently(lambda: self._project.operator.compute.
                  reset_server_state(slot.server, 'active'))
        self._actions.stop(slot)
        with tempfile.NamedTemporaryFile('w+') as connector:
            connector.write(_nova_manage('get_connector', '--json'))
            connector.flush()
            for volume in volumes:
                _nova_manage('refresh', slot.server, volume, connector.name)
        self._actions.start(slot)
        how.append('volume attachments refreshed')

    def _adopt(self, slot: plan.Slot, server: Any) -> None:
        """Go on from a status that Nova says."""
        if server.status not in plan.STATUSES:
            raise Failed(f'it is {server.status}')
        slot.status = server.status
        if slot.address is None:
            slot.address = actions.address_of(server)

    def _volumes(self, slot: plan.Slot, how: list[str]) -> None:
        """Find out which volumes a server has."""
        for volume in list(slot.volumes):
            found = self._steady(volume)
            if found.status not in _STEADY:
                how.append(f'volume reset from {found.status}')
                self._reset(slot, volume)
                self._detach(slot, volume)
            elif found.status == 'available' and self._is_known(slot, volume):
                # Nova has lost the end of attaching it, and neither Nova nor
                # Cinder offers a way out.
                how.append('volume left alone that only Nova lists')
                slot.volumes.remove(volume)
                continue
            found = self._actions.volume(volume.identifier)
            mine = [attachment for attachment in found.attachments
                    if attachment['server_id'] == slot.server]
            volume.size = found.size
            if not mine:
                volume.path = None
            elif volume.path is None:
                volume.path = mine[0]['device']

    def _steady(self, volume: plan.Volume) -> Any:
        """Wait for a volume with which nothing is done, or not any more.

        :returns: the volume.
        """
        deadline = time.monotonic() + STUCK
        while (found := self._actions.volume(volume.identifier)
               ).status not in _STEADY and time.monotonic() < deadline:
            time.sleep(1)
        return found

    def _is_known(self, slot: plan.Slot, volume: plan.Volume) -> bool:
        """Whether Nova takes a volume for one of the server's."""
        return bool(slot.server) and volume.identifier in patiently(lambda: [
            attachment.volume_id for attachment in
            self._project.api.compute.volume_attachments(slot.server)])

    def _reset(self, slot: plan.Slot, volume: plan.Volume) -> None:
        """Let Cinder say about a volume what Nova says."""
        attached = self._is_known(slot, volume)
        patiently(lambda: self._project.operator.block_storage.
                  reset_volume_status(
                      volume.identifier, 'in-use' if attached else 'available',
                      'attached' if attached else 'detached'))

    def _detach(self, slot: plan.Slot, volume: plan.Volume) -> None:
        """Detach a volume from the server that has it for Nova, if any."""
        if self._is_known(slot, volume):
            self._project.api.compute.delete_volume_attachment(
                slot.server, volume.identifier)
            self._actions.wait_volume(volume.identifier, 'available')
            volume.path = None

    def _flavor_and_port(self, slot: plan.Slot) -> None:
        server = self._actions.server(slot)
        large = server.flavor.ram == self._project.flavors[1].ram
        # The other one counts until the resize is confirmed.
        slot.large = large != (slot.status == plan.VERIFY_RESIZE)
        slot.port = next((
            port for port, network in self._actions.ports(slot).items()
            if network == self._project.side.id), None)

    def give_up(self, slot: plan.Slot) -> None:
        """Delete a server; another one takes its place."""
        server, slot.status, slot.port = slot.server, None, None
        slot.data = slot.server = slot.address = None
        if server is None:
            return
        with contextlib.suppress(exceptions.SDKException):
            self._project.operator.compute.reset_server_state(server, 'error')
        patiently(lambda: self._project.api.compute.delete_server(
            server, ignore_missing=True))
        # Those may not be usable for a while, or for ever.
        slot.volumes = slot.free()


def _nova_manage(*arguments: str) -> str:
    """Run ``nova-manage volume_attachment`` as an operator on the host."""
    files = [f'--config-file={other_host.ETC / name}'
             for name in ('nova.conf', 'nova-compute.conf')]
    return cloud.run(
        str(other_host.BIN / 'nova-manage'), *files, 'volume_attachment',
        *arguments, env=other_host.THREADS).stdout
