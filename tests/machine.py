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

"""What the machine that runs the tests can do."""

from __future__ import annotations

import pathlib

# From linux/capability.h.
_CAP_SYS_RESOURCE = 24


def grows_ext4() -> bool:
    """Whether this machine grows ext4 filesystems that are mounted."""
    status = pathlib.Path('/proc/self/status').read_text()
    bounds = next(line.split()[1] for line in status.splitlines()
                  if line.startswith('CapBnd:'))
    return bool(int(bounds, 16) >> _CAP_SYS_RESOURCE & 1)
