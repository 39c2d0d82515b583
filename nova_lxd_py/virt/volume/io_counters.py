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

"""What has been read from and written to the volumes of servers.

The kernel counts the requests to a block device as long as the device exists,
which may be longer than a volume is attached: loop devices are reused. So the
counters at the time when a volume is attached are stored with its LXD device,
and subtracted from later ones.
"""

from __future__ import annotations

import dataclasses

from nova_lxd_py.virt.volume import device_identity

#: The unit of the kernel's ``stat`` file, whatever the device's is.
_SECTOR = 512


@dataclasses.dataclass(frozen=True)
class Counters:
    """Completed requests to a block device, and their bytes."""

    read_requests: int
    read_bytes: int
    written_requests: int
    written_bytes: int

    def since(self, baseline: Counters) -> Counters:
        """Return what has been added to earlier counters of the device.

        :param baseline: the earlier counters.
        :returns: the differences; these counters if they are lower, since the
            device has been recreated then.
        """
        pairs = list(zip(dataclasses.astuple(self),
                         dataclasses.astuple(baseline), strict=True))
        if any(now < before for now, before in pairs):
            return self
        return Counters(*(now - before for now, before in pairs))


def parse_stat(text: str) -> Counters:
    """Parse the kernel's ``/sys/dev/block/<number>/stat``.

    Its fields are described in the kernel's ``Documentation/block/stat.rst``.
    Newer kernels have more of them, at the end, for discarded sectors and
    flushes.

    :param text: content of the file.
    :raises ValueError: if it is something else.
    """
    fields = [int(word) for word in text.split()]
    if len(fields) < 11:
        raise ValueError(f'not the statistics of a block device: {text!r}')
    (read_requests, _merged, read_sectors, _milliseconds,
     written_requests, _merged, written_sectors) = fields[:7]
    return Counters(read_requests, read_sectors * _SECTOR,
                    written_requests, written_sectors * _SECTOR)


def read(path: str) -> Counters | None:
    """Read the counters of a block device; needs no privileges.

    :param path: path of the device on the host.
    :returns: None if there is no such device, or the kernel has no counters
        of it.
    """
    try:
        return parse_stat(device_identity.statistics(path) or '')
    except (device_identity.WrongDevice, ValueError):
        return None


def store(key: str, path: str) -> dict[str, str]:
    """Return the key of an LXD object that :func:`since_stored` needs.

    :param key: name of the key.
    :param path: path of a block device on the host.
    :returns: the key with the present counters; nothing if there are none.
    """
    counters = read(path)
    return {} if counters is None else {
        key: ' '.join(map(str, dataclasses.astuple(counters)))}


def since_stored(stored: str | None, path: str) -> Counters | None:
    """Return what has happened to a block device since :func:`store`.

    :param stored: value of the key.
    :param path: path of the device on the host.
    :returns: None if the key is missing, or the device.
    """
    try:
        baseline = Counters(*(int(word) for word in (stored or '').split()))
    except (TypeError, ValueError):
        return None
    counters = read(path)
    return None if counters is None else counters.since(baseline)
