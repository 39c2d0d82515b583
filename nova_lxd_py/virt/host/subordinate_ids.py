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

"""Number of user ids that LXD can assign to containers on this host.

LXD maps unprivileged containers to the range of root in ``/etc/subuid`` and
``/etc/subgid``. The first 65536 ids are for containers without a range of
their own; each isolated container gets another 65536.
"""

from __future__ import annotations

#: Ids in the range of a container: a complete 16-bit id space.
RANGE = 65536

#: Ids that LXD and Incus use (from 1000000) if these files do not exist.
BUILT_IN = 1_000_000_000

_FILES = ('/etc/subuid', '/etc/subgid')


def capacity(endpoint: str, files: tuple[str, str] = _FILES) -> int:
    """Return the number of ranges for isolated containers.

    :param endpoint: path of LXD's socket; the LXD snap does not see the
        host's files.
    :param files: the files with subordinate user and group ids.
    :returns: number of ranges, including those in use.
    """
    if endpoint.startswith('/var/snap/'):
        size = BUILT_IN
    else:
        size = min(_subordinate_ids(path) for path in files)
    return max(0, (size - RANGE) // RANGE)


def _subordinate_ids(path: str) -> int:
    """Return the number of ids in root's first entry of a file.

    LXD uses only this entry for the ranges of isolated containers.

    :param path: path of a file of lines ``name:first id:number of ids``.
    :returns: number of ids, 0 if there is no entry.
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
