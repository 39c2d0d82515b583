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

"""Fuzzing of what reads images: archives, compressed streams, squashfs.

Run by ``./run_tests.sh fuzz``, or directly::

    python tests/fuzz/fuzz_images.py [-max_total_time=600] DIRECTORY...

with options and corpus directories of libFuzzer. See README.rst.
"""

from __future__ import annotations

from collections.abc import Iterable
import sys

import atheris

with atheris.instrument_imports(include=['nova_lxd_py.virt.image']):
    from nova_lxd_py.virt.image import decompression
    from nova_lxd_py.virt.image import format_inspector
    from nova_lxd_py.virt.image import rootfs_rules
    from nova_lxd_py.virt.image import tar

#: Bytes that an image may have when unpacked.
LIMIT = 8 << 20
COMPRESSIONS = sorted(decompression.MAGICS)


def inspect(parts: Iterable[bytes]) -> None:
    """Inspect an image, and check what is made of it."""
    inspector = format_inspector.Inspector(LIMIT)
    output = []
    try:
        for part in parts:
            output += inspector.process(part)
        output += inspector.end()
    except format_inspector.UnacceptableImage as exc:
        assert exc.reason
        return
    assert inspector.content is not None
    if inspector.kind is format_inspector.Kind.UNIFIED:
        check_output(b''.join(output))
    else:
        assert not output


def check_output(archive: bytes) -> None:
    """Read what LXD would unpack: it must keep all the rules by itself."""
    assert len(archive) % tar.BLOCK == 0
    checker = rootfs_rules.Checker()

    def member(found: tar.Member) -> None:
        checker.check(found)

    walker = tar.Walker(member)
    walker.feed(archive)
    walker.finish()


def with_checksums(data: bytes) -> bytes:
    """Correct the checksums of headers, which no mutation would hit."""
    blocks = []
    for start in range(0, len(data), tar.BLOCK):
        block = bytearray(data[start:start + tar.BLOCK])
        if len(block) == tar.BLOCK and block[257:262] == b'ustar':
            tar.with_checksum(block)
        blocks.append(bytes(block))
    return b''.join(blocks)


def test_archive(choice: int, data: bytes) -> None:
    data = with_checksums(data)
    size = (1 << 16, 512, 100, 1)[choice % 4]
    inspect(data[start:start + size] for start in range(0, len(data), size))


def test_raw(choice: int, data: bytes) -> None:
    inspect([data])


def test_compressed(choice: int, data: bytes) -> None:
    decompressor = decompression.Decompressor(
        COMPRESSIONS[choice % len(COMPRESSIONS)])
    total = 0
    try:
        for piece in decompressor.feed(data):
            total += len(piece)
            if total > LIMIT:
                return
        decompressor.finish()
    except decompression.Corrupt:
        pass


def test_block(choice: int, data: bytes) -> None:
    """A metadata block of a squashfs."""
    try:
        found = decompression.decompress_block(
            ('gzip', 'xz', 'zstd')[choice % 3], data, 8192)
    except decompression.Corrupt:
        return
    assert len(found) <= 8192


TARGETS = test_archive, test_raw, test_compressed, test_block


def test_one_input(data: bytes) -> None:
    """Run the target that the first byte selects."""
    if data:
        choice, target = divmod(data[0], len(TARGETS))
        TARGETS[target](choice, data[1:])


if __name__ == '__main__':
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
