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

"""Interface to libblkid, which identifies the content of block devices.

mount, udev and the program blkid use this library, too. Running the program
would take nearly as much time again as the probe itself.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools

# From blkid/blkid.h.
_SUBLKS_TYPE, _SUBLKS_USAGE = 1 << 5, 1 << 7
_NOTHING, _AMBIVALENT = 1, -2

_Value = ctypes.POINTER(ctypes.c_char_p)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL('libblkid.so.1', use_errno=True)
    probe, number = ctypes.c_void_p, ctypes.c_int
    library.blkid_new_probe.restype = probe
    for name, *arguments in (
            ('free_probe', probe),
            ('do_safeprobe', probe),
            ('probe_enable_partitions', probe, number),
            ('probe_enable_superblocks', probe, number),
            ('probe_set_superblocks_flags', probe, number),
            ('probe_set_device', probe, number, ctypes.c_int64,
             ctypes.c_int64),
            ('probe_lookup_value', probe, ctypes.c_char_p, _Value,
             ctypes.c_void_p)):
        getattr(library, f'blkid_{name}').argtypes = arguments
    library.blkid_free_probe.restype = None
    return library


def probe(descriptor: int) -> dict[str, str] | None:
    """Identify the content of a block device by its signatures.

    :param descriptor: file descriptor of the device, open for reading.
    :returns: ``TYPE`` and ``USAGE`` of the content and ``PTTYPE`` of a
        partition table, as far as they exist; an empty dictionary if
        signatures contradict each other; None if there is no signature.
    :raises OSError: if the device cannot be read.
    """
    library = _library()
    with contextlib.ExitStack() as stack:
        prober = library.blkid_new_probe()
        if not prober:
            raise MemoryError('libblkid cannot allocate memory')
        stack.callback(library.blkid_free_probe, prober)
        if (library.blkid_probe_set_device(prober, descriptor, 0, 0) or
                library.blkid_probe_enable_superblocks(prober, 1) or
                library.blkid_probe_set_superblocks_flags(
                    prober, _SUBLKS_TYPE | _SUBLKS_USAGE) or
                library.blkid_probe_enable_partitions(prober, 1)):
            raise OSError(errno.EIO, 'libblkid does not accept the device')
        result = library.blkid_do_safeprobe(prober)
        if result == _NOTHING:
            return None
        if result == _AMBIVALENT:
            return {}
        if result:
            raise OSError(errno.EIO, 'libblkid cannot read the device')
        found, value = {}, ctypes.c_char_p()
        for name in ('TYPE', 'USAGE', 'PTTYPE'):
            if library.blkid_probe_lookup_value(
                    prober, name.encode(), ctypes.byref(value), None) == 0:
                found[name] = (value.value or b'').decode()
        return found
