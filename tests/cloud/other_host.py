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

"""A second compute host on the same machine, for as long as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import pathlib
import subprocess
import tempfile
from typing import Any

from openstack import exceptions

from tests.cloud import cloud

ETC = cloud.PREFIX / 'etc' / 'nova'
BIN = cloud.PREFIX / 'venv' / 'bin'
_THREADS = {'OS_NOVA_DISABLE_EVENTLET_PATCHING': '1'}


@contextlib.contextmanager
def running(admin: Any, name: str, settings: str) -> Iterator[None]:
    """Run another nova-compute beside the quickstart's.

    :param admin: an administrator's connection.
    :param name: of the host; a new one for each time.
    :param settings: what its nova.conf says besides that of the quickstart.
    """
    service = None
    with tempfile.TemporaryDirectory() as folder:
        override = pathlib.Path(folder, 'nova.conf')
        override.write_text(
            f'[DEFAULT]\nhost = {name}\nstate_path = {folder}\n'
            f'instances_path = {folder}\n{settings}')
        override.chmod(0o600)
        with open(os.path.join(folder, 'log'), 'wb') as log:
            process = subprocess.Popen(
                [BIN / 'nova-compute', '--config-file',
                 ETC / 'nova-compute.conf', '--config-file', override],
                env={**os.environ, **_THREADS}, stdout=log, stderr=log)
        try:
            service = cloud.wait_for(
                f'the compute host {name}',
                lambda: next(admin.compute.services(
                    host=name, binary='nova-compute'), None), 90)
            cloud.run(str(BIN / 'nova-manage'), '--config-file',
                      str(ETC / 'nova.conf'), 'cell_v2', 'discover_hosts',
                      env=_THREADS)
            cloud.wait_for(
                f'the hypervisor of {name}',
                lambda: [found for found in admin.compute.hypervisors(
                    details=True)
                    if found.service_details['host'] == name], 90)
            yield
        finally:
            process.terminate()
            process.wait(60)
            if service is not None:
                cloud.wait_for(f'the end of {name}',
                               lambda: _deleted(admin, service), 30)


def _deleted(admin: Any, service: Any) -> bool:
    try:
        admin.compute.delete_service(service)
    except exceptions.HttpException as exc:
        # nova-api fails once where it has not seen the resource provider.
        if exc.status_code != 500:
            raise
        return False
    return True
