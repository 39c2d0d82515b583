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

"""Send the same requests to the fake LXD of the unit tests and a real one.

Status codes, error texts, the shape of answers and lifecycle events have to
agree. What unit tests find out about the driver is worth as much as the tests
in ``test_fake_matches_lxd*`` pass.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from typing import Any

import testtools

from tests.functional import busybox_image
from tests.functional import lxd_daemon
from tests import raw_lxd
from tests.unit import fake_lxd

ROOT = {'root': {'type': 'disk', 'path': '/', 'pool': 'default'}}
FROM_IMAGE = {'type': 'image', 'alias': 'busybox'}

_numbers = itertools.count(1)
_UUID = re.compile(r'[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-'
                   r'[0-9a-f]{12}')
HASH = re.compile(r'[0-9a-f]{64}')
_TIME = re.compile(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z')


def shape_of(value: Any) -> Any:
    """Keys and types of an answer, without the values."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    if isinstance(value, str):
        return 'time' if _TIME.fullmatch(value) else 'text'
    return type(value).__name__


def differences(real: Any, fake: Any, where: str = '') -> list[str]:
    """Say where two answers differ."""
    if isinstance(real, dict) and isinstance(fake, dict):
        return [line for key in sorted({*real, *fake}, key=str)
                for line in differences(real.get(key, 'nothing'),
                                        fake.get(key, 'nothing'),
                                        f'{where}/{key}')]
    if isinstance(real, list) and isinstance(fake, list) and len(
            real) == len(fake):
        return [line for index, pair in enumerate(zip(real, fake))
                for line in differences(*pair, f'{where}/{index}')]
    if real == fake:
        return []
    return [f'{where or "/"}: LXD has {real!r}, the fake {fake!r}']


class ContractTest(testtools.TestCase):
    """Sends everything to both."""

    def setUp(self):
        super().setUp()
        reason = lxd_daemon.missing()
        if reason:
            self.skipTest(reason)
        self.lxd = lxd_daemon.shared()
        if os.environ.get('LXD_SOCKET'):
            version = self.lxd.api.must('GET', '/1.0')['environment'][
                'server_version']
            if not version.startswith('5.0.'):
                self.skipTest(f'the fake is an LXD 5.0, this is {version}')
        self.fake = self.useFixture(fake_lxd.FakeLXD())
        # As on any host, whatever a test names does not exist.
        self.fake.daemon.host_interfaces = set()
        self.fake.daemon.host_paths = set()
        self.project = f'contract{next(_numbers)}'
        self.lxd.add_project(self.project)
        self.fake.add_project(self.project)
        self.real_api = raw_lxd.Client(self.lxd.endpoint, self.project)
        self.fake_api = raw_lxd.Client(self.fake.endpoint, self.project)
        self.addCleanup(self._clean)
        self.fake_api.must('PUT', '/1.0/profiles/default', {
            'description': '', 'config': {}, 'devices': ROOT})

    def import_image(self):
        """Give both the same busybox."""
        content = busybox_image.unified()
        for api in (self.fake_api, self.real_api):
            fingerprint = api.must(
                'POST', '/1.0/images', content,
                headers={'Content-Type': 'application/octet-stream'}
            )['fingerprint']
            api.must('POST', '/1.0/images/aliases', {
                'name': 'busybox', 'target': fingerprint})

    def _clean(self):
        api = self.real_api
        for instance in api.must('GET', '/1.0/instances?recursion=1'):
            path = f'/1.0/instances/{instance["name"]}'
            if instance['config'].get('security.protection.delete'):
                api.must('PATCH', path, {'config': {
                    'security.protection.delete': ''}})
            api.call('PUT', f'{path}/state', {'action': 'stop',
                                              'force': True})
            self.retry(lambda path=path: api.call('DELETE', path))
        for image in api.must('GET', '/1.0/images'):
            api.call('DELETE', image.split('?')[0])
        for volume in api.must(
                'GET', '/1.0/storage-pools/default/volumes/custom'):
            api.call('DELETE', volume.split('?')[0])
        for profile in api.must('GET', '/1.0/profiles'):
            api.call('DELETE', profile.split('?')[0])
        api.must('DELETE', f'/1.0/projects/{self.project}')

    @staticmethod
    def retry(function):
        """Repeat what a stop hook may still be in the way of."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            answer = function()
            if 'busy' not in answer.error:
                return answer
            time.sleep(0.1)
        raise AssertionError(answer.error)

    def plain(self, text: Any) -> Any:
        """Take out what may differ from one LXD to another."""
        if not isinstance(text, str):
            return text
        directory = os.environ.get('LXD_DIR', self.lxd.directory)
        text = text.replace(str(directory), '/var/lib/lxd')
        text = re.sub(r'/var/lib/lxd/logs/', '/var/log/lxd/', text)
        text = re.sub(r'qgroup limit (-e )?\S+ \S+', 'qgroup limit', text)
        text = text.replace(self.project, 'PROJECT')
        text = _UUID.sub('UUID', text)
        return HASH.sub('HASH', text)

    def same(self, method: str, path: str, body: Any = None, *,
             shape: bool = True, values: bool = False,
             ignore: tuple[str, ...] = (), real_retries: bool = False,
             **kwargs: Any) -> tuple[raw_lxd.Answer, raw_lxd.Answer]:
        """Send a request to both and compare the answers.

        :param shape: whether keys and types have to agree.
        :param values: whether the metadata itself has to agree.
        :param ignore: keys of the metadata not to compare.
        :param real_retries: the real LXD may still be busy stopping.
        :returns: the answers of the fake and of the real one.
        """
        fake = self.fake_api.call(method, path, body, **kwargs)
        if real_retries:
            real = self.retry(lambda: self.real_api.call(
                method, path, body, **kwargs))
        else:
            real = self.real_api.call(method, path, body, **kwargs)
        what = f'{method} {path} {json.dumps(body)[:300]}' if not isinstance(
            body, bytes) else f'{method} {path}'
        self.assertEqual(real.status, fake.status,
                         f'{what}\nreal: {real.error}\nfake: {fake.error}')
        self.assertEqual(self.plain(real.error), self.plain(fake.error),
                         what)
        for header in ('etag', 'location'):
            self.assertEqual(header in real.headers, header in fake.headers,
                             f'{what}: {header}')
        if isinstance(real.body, dict):
            self.assertEqual(
                {key: real.body[key] for key in (
                    'type', 'status', 'status_code', 'error_code')},
                {key: fake.body[key] for key in (
                    'type', 'status', 'status_code', 'error_code')}, what)
        if (real.operation is None) != (fake.operation is None):
            self.fail(f'{what}: only one is asynchronous')
        if real.operation is not None:
            self._same_operation(what, real.operation, fake.operation)
        elif shape:
            left, right = (_without(answer.metadata, ignore)
                           for answer in (real, fake))
            self.agree(shape_of(left), shape_of(right), what)
            if values:
                self.agree(left, right, what)
        return fake, real

    def agree(self, real: Any, fake: Any, what: str = '') -> None:
        found = differences(real, fake)
        if found:
            self.fail('\n'.join([what, *found]))

    def _same_operation(self, what: str, real: dict, fake: dict) -> None:
        for key in ('class', 'description', 'status', 'status_code',
                    'may_cancel', 'resources', 'location'):
            self.assertEqual(real[key], fake[key], f'{what}: {key}')
        self.assertEqual(sorted(real), sorted(fake), what)

    def stop_hook(self, name: str) -> None:
        """Wait until the real LXD is done with stopping."""
        self.fake.wait_for(lambda: self.real_api.must(
            'GET', f'/1.0/instances/{name}')['config'].get(
                'volatile.last_state.power') == 'STOPPED')
        time.sleep(0.7)


def _without(value: Any, ignore: tuple[str, ...]) -> Any:
    if not ignore:
        return value
    if isinstance(value, dict):
        return {key: _without(item, ignore) for key, item in value.items()
                if key not in ignore}
    if isinstance(value, list):
        return [_without(item, ignore) for item in value]
    return value


class InstanceContractTest(ContractTest):
    """Instances."""

    def setUp(self):
        super().setUp()
        self.import_image()

    def create(self, name: str = 'c1', **kwargs: Any) -> None:
        self.same('POST', '/1.0/instances', {
            'name': name, 'source': FROM_IMAGE, **kwargs})

    def power(self, action: str, name: str = 'c1', real_retries: bool = False,
              **kwargs: Any) -> tuple[raw_lxd.Answer, raw_lxd.Answer]:
        return self.same('PUT', f'/1.0/instances/{name}/state',
                         {'action': action, **kwargs},
                         real_retries=real_retries)

    def compare(self, name: str = 'c1', **kwargs: Any) -> None:
        """Compare all that LXD tells of an instance."""
        fake, real = self.same('GET', f'/1.0/instances/{name}', **kwargs)
        for answer in (fake, real):
            for part in ('config', 'expanded_config'):
                config = answer.metadata[part]
                for key in ('volatile.uuid',
                            'volatile.cloud-init.instance-id'):
                    if key in config:
                        config[key] = 'UUID'
                # The host's subordinate ids decide.
                for key in config:
                    if key.startswith('volatile.idmap') or key == (
                            'volatile.last_state.idmap'):
                        config[key] = str(config[key] in ('[]', '0'))
            for key in ('created_at', 'last_used_at'):
                answer.metadata[key] = answer.metadata[key].startswith('1970')
        self.agree(real.metadata, fake.metadata, name)
