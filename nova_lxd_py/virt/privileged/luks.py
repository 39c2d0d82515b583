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

"""Costs of key derivation in LUKS headers of tenants.

The header of an encrypted volume says how much time and memory each attempt at
its key takes. cryptsetup, which os-brick runs without a deadline, spends that.
Tenants can write a header: they make a volume of an image of one.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Iterator
import os
import re
import struct

MAGIC = b'LUKS\xba\xbe'
_SECONDARY_MAGIC = b'SKUL\xba\xbe'

#: PBKDF2: about half a minute of a slow CPU. cryptsetup chooses what takes two
#: seconds of the computer on which it formats.
MOST_ITERATIONS = 50_000_000
#: Argon2: KiB of memory, of which cryptsetup uses 1 GiB at most by default;
#: and passes over it.
MOST_MEMORY = 2 << 20
MOST_WORK = 64 << 20

#: Where LUKS2 can have its second header, and its largest size.
_SECONDARY = tuple(0x4000 << shift for shift in range(9))
_LARGEST = 0x400000
_JSON = 4096

_NUMBER = re.compile(rb'[\'"](iterations|time|memory)[\'"]\s*:\s*(\d+)')


def refusal(descriptor: int) -> str:
    """Return the reason for which a volume with a LUKS header must not be
    opened.

    :param descriptor: file descriptor of the device, open for reading.
    :returns: description of what the header has; '' if there is no reason.
    :raises OSError: if the device cannot be read.
    """
    start = os.pread(descriptor, 592, 0)
    if start.startswith(MAGIC + b'\0\1') and len(start) == 592:
        # The digest of the key and eight slots.
        found = [struct.unpack_from('>I', start, 164)[0]] + [
            struct.unpack_from('>I', start, 208 + 48 * slot + 4)[0]
            for slot in range(8)]
        return _judge(found, [], [])
    numbers: dict[bytes, list[int]] = {
        b'iterations': [], b'time': [], b'memory': []}
    for text in _texts(descriptor):
        if b'\\u' in text:
            return 'escaped letters in its header'
        # Not parsed: cryptsetup accepts more than what is JSON.
        for name, number in _NUMBER.findall(text):
            numbers[name].append(int(number))
    return _judge(numbers[b'iterations'], numbers[b'time'],
                  numbers[b'memory'])


def _texts(descriptor: int) -> Iterator[bytes]:
    """Yield the JSON of each header; cryptsetup may use either of two."""
    for offset in (0, *_SECONDARY):
        header = os.pread(descriptor, 16, offset)
        if len(header) == 16 and header[:6] in (MAGIC, _SECONDARY_MAGIC):
            size, = struct.unpack_from('>Q', header, 8)
            yield os.pread(descriptor, max(min(size, _LARGEST) - _JSON, 0),
                           offset + _JSON).split(b'\0')[0]


def _judge(iterations: list[int], time: list[int], memory: list[int]) -> str:
    most_memory = max(memory, default=0)
    if (max(iterations, default=0) > MOST_ITERATIONS or
            most_memory > MOST_MEMORY or
            most_memory * max(time, default=0) > MOST_WORK):
        return 'a key derivation that costs too much'
    return ''
