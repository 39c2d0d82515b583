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

import time
from typing import Any

from openstack import exceptions

from tests.campaign import actions
from tests.campaign import plan
from tests.campaign.project import Failed
from tests.campaign.project import patiently
from tests.campaign.project import Project
from tests.fixtures import cloud

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

    def run(self, slot: plan.Slot, operation: plan.Operation) -> list[str]:
        """Bring a server back into a status from which it goes on.

        :returns: what was necessary.
        :raises Failed: if it does not get there.
        """
        if slot.server is None:
            # Nova has refused to create it.
            slot.status = None
            self._volumes(slot, [])
            return []
        how: list[str] = []
        server = self._settled(slot, how)
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

    def _settled(self, slot: plan.Slot, how: list[str]) -> Any:
        """Wait until Nova does nothing with a server, or has lost the task."""
        deadline = time.monotonic() + STUCK
        while True:
            server = self._actions.server(slot)
            if server is None or (
                    server.task_state is None and
                    server.status not in ('BUILD', 'SHELVED')):
                return server
            if time.monotonic() > deadline:
                break
            time.sleep(1)
        how.append(f'reset from {server.status}/{server.task_state}')
        if server.status == 'BUILD':
            patiently(lambda: self._project.operator.compute.
                      reset_server_state(slot.server, 'error'))
        elif server.status == 'SHELVED' and server.task_state is None:
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
            how.append('rebuilt again')
            self._actions.rebuild(slot)
            return
        try:
            self._actions.reboot_hard(slot)
            how.append('hard rebooted')
        except (Failed, exceptions.SDKException):
            if operation.name != 'unshelve':
                raise
            # Killed before the root was complete: it is in the image.
            self._actions.rebuild_from(slot, patiently(
                lambda: self._project.api.image.find_image(
                    f'campaign-{slot.number}-shelved',
                    ignore_missing=False)).id)
            how.append('rebuilt from the shelved image')

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
            deadline = time.monotonic() + STUCK
            while (found := self._actions.volume(volume.identifier)
                   ).status not in _STEADY:
                if time.monotonic() > deadline:
                    how.append(f'volume reset from {found.status}')
                    self._reset(slot, volume)
                    break
                time.sleep(1)
            found = self._actions.volume(volume.identifier)
            mine = [attachment for attachment in found.attachments
                    if attachment['server_id'] == slot.server]
            volume.size = found.size
            if not mine:
                volume.path = None
            elif volume.path is None:
                volume.path = mine[0]['device']

    def _reset(self, slot: plan.Slot, volume: plan.Volume) -> None:
        """Detach a volume that neither Nova nor Cinder goes on with."""
        storage = self._project.operator.block_storage
        known = patiently(lambda: [
            attachment.volume_id for attachment in
            self._project.api.compute.volume_attachments(slot.server)
        ]) if slot.server else []
        attached = volume.identifier in known
        patiently(lambda: storage.reset_volume_status(
            volume.identifier, 'in-use' if attached else 'available',
            'attached' if attached else 'detached'))
        if attached:
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
        patiently(lambda: self._project.operator.compute.reset_server_state(
            server, 'error'))
        patiently(lambda: self._project.api.compute.delete_server(
            server, ignore_missing=True))
        # Those may not be usable for a while, or for ever.
        slot.volumes = slot.free()
