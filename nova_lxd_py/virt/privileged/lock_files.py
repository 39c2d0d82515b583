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
"""Lock files that the user of nova-compute cannot create.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import contextlib
import os

from nova_lxd_py.virt import privileged

#: What the name of a lock file ends with.
SUFFIX = '.nova-compute.lock'


def path(directory: str) -> str:
    """Return the lock file of a directory, which is beside it.

    :param directory: path of the directory, which need not exist.
    """
    return os.path.realpath(directory) + SUFFIX


@privileged.context.entrypoint
def create(directory: str, uid: int) -> None:
    """Create the lock file of a directory for a user. Idempotent.

    :param directory: path of the directory, which need not exist.
    :param uid: the user, who owns the file if it has not existed.
    :raises OSError: if it cannot be created.
    """
    if (not isinstance(directory, str) or '\0' in directory or
            not os.path.isabs(directory)):
        raise ValueError(f'{directory!r} is not the path of a directory')
    if not isinstance(uid, int) or uid < 0:
        raise ValueError(f'{uid!r} is not a user')
    name = path(directory)
    os.makedirs(os.path.dirname(name), mode=0o711, exist_ok=True)
    # The owner of a file that exists is never changed: it may be a link.
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL |
                             os.O_NOFOLLOW | os.O_CLOEXEC, mode=0o644)
        try:
            os.fchown(descriptor, uid, -1)
        finally:
            os.close(descriptor)
