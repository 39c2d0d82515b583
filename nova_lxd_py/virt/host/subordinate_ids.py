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

"""How many user ids LXD can give to containers on this host.

LXD gives unprivileged containers ids from the range of root in ``/etc/subuid``
and ``/etc/subgid``. The first 65536 of them serve containers without a range
of their own; each isolated one gets another 65536.
"""

from __future__ import annotations

#: Ids in the range of one container: a whole 16-bit user id space.
RANGE = 65536

#: Ids that LXD and Incus take (from 1000000) where the system has no files.
BUILT_IN = 1_000_000_000

_FILES = ('/etc/subuid', '/etc/subgid')


def capacity(endpoint: str, files: tuple[str, str] = _FILES) -> int:
    """Count the ranges that isolated containers can have.

    :param endpoint: path of LXD's socket; the snap's LXD does not see the
        host's files.
    :param files: the files with subordinate user and group ids.
    :returns: how many ranges fit, those in use included.
    """
    if endpoint.startswith('/var/snap/'):
        size = BUILT_IN
    else:
        size = min(_subordinate_ids(path) for path in files)
    return max(0, (size - RANGE) // RANGE)


def _subordinate_ids(path: str) -> int:
    """Read how many ids root has.

    LXD takes ranges for isolated containers from the first entry only.

    :param path: a file of lines ``name:first id:number of ids``.
    :returns: the number in root's first entry, 0 if it has none.
    """
    try:
        with open(path, encoding='utf-8', errors='replace') as stream:
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return BUILT_IN
    for line in lines:
        words = line.split('#')[0].strip().split(':')
        if len(words) == 3 and words[0] in ('root', '0'):
            try:
                return int(words[2])
            except ValueError:
                continue
    return 0
