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

"""The fake LXD against a real one: lifecycle events."""

from __future__ import annotations

from collections.abc import Callable
import json
import time
from typing import Any
import uuid

import websocket

from tests.fixtures import contract


class EventContract(contract.ContractTest):
    """Lifecycle events.

    :ivar no_exec: whether to leave out commands in guests.
    """

    no_exec = False

    def setUp(self):
        super().setUp()
        self.import_image()
        self.channels = []
        for api in (self.fake_api, self.real_api):
            channel = api.events(type='lifecycle')
            channel.settimeout(1.5)
            self.addCleanup(channel.close)
            self.channels.append(channel)
            self._until_heard(channel, lambda api=api: api.must(
                'PATCH', '/1.0/profiles/default', {
                    'config': {'user.heard': str(uuid.uuid4())}}))

    def _collect(self, channel: websocket.WebSocket) -> list[Any]:
        found = []
        while True:
            try:
                event = json.loads(channel.recv())
            except websocket.WebSocketTimeoutException:
                return found
            self.assertEqual(
                {'type', 'timestamp', 'metadata', 'location', 'project'},
                set(event))
            metadata = event['metadata']
            if 'log-' in metadata['action'] or (
                    # Of the changes in setUp.
                    metadata['action'] == 'profile-updated' and
                    event['project'] == self.project):
                continue
            found.append({
                'action': metadata['action'],
                'source': contract.HASH.sub('HASH', metadata['source']),
                'context': metadata.get('context'),
                'requestor': 'requestor' in metadata,
                'project': event['project']})

    def _until_heard(self, channel: websocket.WebSocket,
                     change: Callable[[], Any]) -> Any:
        """Make a change until an event reports it.

        Neither server says when it has added the listener, which is after its
        answer.
        """
        deadline = time.monotonic() + 60
        while True:
            change()
            try:
                return json.loads(channel.recv())
            except websocket.WebSocketTimeoutException:
                self.assertLess(time.monotonic(), deadline)

    def _collect_until(self, action: str) -> list[Any]:
        """Collect events of the real LXD up to one, and those soon after it.

        A real guest does not stop at once.
        """
        found: list[Any] = []
        deadline = time.monotonic() + 60
        while action not in [event['action'] for event in found]:
            self.assertLess(time.monotonic(), deadline, found)
            found += self._collect(self.channels[1])
        return found

    def _same_events(self) -> list[str]:
        fake, real = self._complete([], [])
        self.agree(real, fake)
        return [event['action'] for event in fake]

    def _complete(self, fake: list[Any], real: list[Any]
                  ) -> tuple[list[Any], list[Any]]:
        """Collect the other events of both; one may be slower."""
        deadline = time.monotonic() + 60
        while True:
            fake, real = (
                [event for event in [*found, *self._collect(channel)]
                 if event['action'] != 'instance-exec' or not self.no_exec]
                for found, channel in zip((fake, real), self.channels))
            if len(fake) == len(real) or time.monotonic() > deadline:
                return fake, real

    def test_what_the_api_does(self):
        for api in (self.fake_api, self.real_api):
            api.must('POST', '/1.0/instances', {'name': 'c1',
                                                'source': contract.FROM_IMAGE})
            state = '/1.0/instances/c1/state'
            api.must('PUT', state, {'action': 'start'})
            api.must('PATCH', '/1.0/instances/c1',
                     {'config': {'user.a': 'b'}})
            api.must('PUT', state, {'action': 'freeze'})
            api.must('PUT', state, {'action': 'unfreeze'})
            api.must('PUT', state, {'action': 'restart', 'force': True})
            api.must('POST', '/1.0/instances/c1/exec', {
                'command': ['true'], 'record-output': True,
                'wait-for-websocket': False})
            api.must('POST', '/1.0/instances/c1/snapshots', {'name': 's'})
            api.must('DELETE', '/1.0/instances/c1/snapshots/s')
            api.must('PUT', state, {'action': 'stop', 'force': True})
            self.retry(lambda api=api, state=state: api.call(
                'PUT', state, {'action': 'start'}))
            if api is self.real_api:
                self.until_booted()
            api.must('PUT', state, {'action': 'stop', 'timeout': 30})
            self.retry(lambda api=api: api.call(
                'POST', '/1.0/instances/c1', {'name': 'c2'}))
            api.must('DELETE', '/1.0/instances/c2')
        self.assertIn('instance-shutdown', self._same_events())

    def test_failed_creation(self):
        for api in (self.fake_api, self.real_api):
            api.call('POST', '/1.0/instances', {
                'name': 'c1', 'source': contract.FROM_IMAGE,
                'devices': {'root': {**contract.ROOT['root'],
                                     'size': '1MiB'}}})
        # No event reports its deletion.
        self.assertEqual(['instance-created'], self._same_events())

    def test_what_guests_do(self):
        for api in (self.fake_api, self.real_api):
            api.must('POST', '/1.0/instances', {'name': 'c1',
                                                'source': contract.FROM_IMAGE})
            api.must('PUT', '/1.0/instances/c1/state', {'action': 'start'})
        self.no_exec = True
        self.fake.guest_reboot('c1')
        self._in_guest('reboot')
        real = self._collect_until('instance-restarted')
        self.fake.guest_poweroff('c1')
        self._in_guest('poweroff')
        real += self._collect_until('instance-shutdown')
        fake, real = self._complete([], real)
        self.assertEqual(real, fake)
        self.assertEqual(
            ['instance-created', 'instance-started', 'instance-shutdown',
             'instance-restarted', 'instance-shutdown'],
            [event['action'] for event in fake])
        self.stop_hook('c1')
        for api in (self.fake_api, self.real_api):
            instance = api.must('GET', '/1.0/instances/c1')
            self.assertEqual('Stopped', instance['status'])
            self.assertEqual(
                'STOPPED', instance['config']['volatile.last_state.power'])

    def _in_guest(self, command: str) -> None:
        self.until_booted()
        self.real_api.must('POST', '/1.0/instances/c1/exec', {
            'command': [command], 'record-output': True,
            'wait-for-websocket': False})

    def test_other_projects_are_not_shown(self):
        for api, channel in zip((self.fake_api, self.real_api),
                                self.channels):
            api.must('PATCH', '/1.0/profiles/default', {
                'config': {'user.seen': '1'}},
                params={'project': 'default'})
            self.assertEqual([], self._collect(channel))
            self.assertRaises(
                websocket.WebSocketBadStatusException, api.events,
                **{'all-projects': 'true'})
            everything = api.events(**{
                'all-projects': 'true', 'type': 'lifecycle',
                'project': None})
            self.addCleanup(everything.close)
            everything.settimeout(1)
            event = self._until_heard(everything, lambda api=api: api.must(
                'PATCH', '/1.0/profiles/default', {
                    'config': {'user.seen': str(uuid.uuid4())}},
                params={'project': 'default'}))
            self.assertEqual(
                ('profile-updated', 'default', '/1.0/profiles/default'),
                (event['metadata']['action'], event['project'],
                 event['metadata']['source']))
