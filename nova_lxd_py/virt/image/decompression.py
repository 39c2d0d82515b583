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
"""Decompression of an image piece by piece while it is transferred.

Every piece that comes out is small, whatever goes in: an image made to expand
into terabytes must not get the memory of nova-compute either.
"""

from __future__ import annotations

import abc
import bz2
from collections.abc import Callable, Iterator
import lzma
from typing import Any

try:  # Twice as fast, but not made for every processor.
    from isal import isal_zlib as zlib
except ImportError:
    import zlib  # type: ignore[no-redef]

try:  # Python >= 3.14 has it in its library.
    from compression import (  # type: ignore[import-not-found]
        zstd as _zstd_stdlib)
    zstandard: Any = None
except ImportError:
    _zstd_stdlib = None
    import zstandard

#: Bytes that come out at a time at most (zstd: up to 16 MiB).
PIECE = 1 << 18
#: Memory that a stream may ask for to be decompressed. ``xz -9`` needs 65 MiB,
#: the zstd tool by default refuses a window above 128 MiB.
MAX_MEMORY = 256 << 20
MAX_ZSTD_WINDOW = 1 << 27

#: Memory that a single small block may ask for.
_BLOCK_MEMORY = 16 << 20

_BLOCK_ERRORS: tuple[type[Exception], ...] = (
    zlib.error, lzma.LZMAError, EOFError,
    (_zstd_stdlib or zstandard).ZstdError)  # type: ignore[assignment]

#: How a compressed stream begins.
MAGICS: dict[str, tuple[bytes, ...]] = {
    'gzip': (b'\x1f\x8b\x08',),
    'bzip2': (b'BZh',),
    'xz': (b'\xfd7zXZ\x00',),
    'lzma': (b'\x5d\x00\x00',),
    'zstd': (b'\x28\xb5\x2f\xfd',),
}
_LONGEST_MAGIC = 6
#: zlib's word for gzip with the largest window.
_GZIP = 16 + 15
#: Frames without content, which zstd allows between others.
_ZSTD_SKIPPABLE = tuple(bytes([0x50 + n]) + b'\x2a\x4d\x18'
                        for n in range(16))


class Corrupt(Exception):
    """The stream cannot be decompressed."""


class _Engine(abc.ABC):
    """Decompresses one stream, up to its end."""

    #: The errors by which the library says that the data is bad.
    errors: tuple[type[Exception], ...] = ()

    @abc.abstractmethod
    def push(self, data: bytes) -> Iterator[bytes]:
        """Decompress data.

        :returns: the decompressed pieces.
        """

    @property
    @abc.abstractmethod
    def eof(self) -> bool:
        """Whether the stream has ended."""

    @property
    @abc.abstractmethod
    def rest(self) -> bytes:
        """What followed after the end of the stream."""


class _LibraryEngine(_Engine):
    """The interface that bz2, lzma and compression.zstd share."""

    def __init__(self, engine: Any, errors: tuple[type[Exception], ...]
                 ) -> None:
        self._engine = engine
        self.errors = errors

    def push(self, data: bytes) -> Iterator[bytes]:
        piece = self._engine.decompress(data, PIECE)
        while True:
            if piece:
                yield piece
            if self._engine.eof or (self._engine.needs_input and not piece):
                return
            piece = self._engine.decompress(b'', PIECE)

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def rest(self) -> bytes:
        return self._engine.unused_data


class _GzipEngine(_Engine):
    errors = (zlib.error,)  # type: ignore[assignment]

    def __init__(self) -> None:
        self._engine = zlib.decompressobj(wbits=_GZIP)

    def push(self, data: bytes) -> Iterator[bytes]:
        while True:
            piece = self._engine.decompress(data, PIECE)
            if piece:
                yield piece
            data = self._engine.unconsumed_tail
            if self._engine.eof or (not data and len(piece) < PIECE):
                return

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def rest(self) -> bytes:
        return self._engine.unused_data


class _ZstandardEngine(_Engine):
    # It has no limit for what comes out at a time; a zstd block of 4 bytes
    # can stand for 128 KiB, so only little may go in.
    _SLICE = 512

    def __init__(self) -> None:
        self._engine = zstandard.ZstdDecompressor(
            max_window_size=MAX_ZSTD_WINDOW).decompressobj()
        self._rest = b''
        self.errors = (zstandard.ZstdError,)

    def push(self, data: bytes) -> Iterator[bytes]:
        view = memoryview(data)
        gathered, size = [], 0
        for start in range(0, len(data), self._SLICE):
            piece = self._engine.decompress(view[start:start + self._SLICE])
            gathered.append(piece)
            size += len(piece)
            if size >= PIECE:
                yield b''.join(gathered)
                gathered, size = [], 0
            if self._engine.eof:
                self._rest = (self._engine.unused_data +
                              data[start + self._SLICE:])
                break
        if size:
            yield b''.join(gathered)

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def rest(self) -> bytes:
        return self._rest


def _zstd_engine() -> _Engine:
    if _zstd_stdlib is None:
        return _ZstandardEngine()
    parameter = _zstd_stdlib.DecompressionParameter.window_log_max
    return _LibraryEngine(
        _zstd_stdlib.ZstdDecompressor(
            options={parameter: MAX_ZSTD_WINDOW.bit_length() - 1}),
        (_zstd_stdlib.ZstdError,))


_ENGINES: dict[str, Callable[[], _Engine]] = {
    'gzip': _GzipEngine,
    'bzip2': lambda: _LibraryEngine(bz2.BZ2Decompressor(),
                                    (OSError, EOFError)),
    'xz': lambda: _LibraryEngine(
        lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_MEMORY),
        (lzma.LZMAError,)),
    'lzma': lambda: _LibraryEngine(
        lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=MAX_MEMORY),
        (lzma.LZMAError,)),
    'zstd': _zstd_engine,
}


def decompress_block(compression: str, data: bytes, limit: int) -> bytes:
    """Decompress a block of known largest size.

    :param compression: ``gzip`` (here: zlib), ``xz`` or ``zstd``.
    :param data: the whole compressed block.
    :param limit: bytes that may come out.
    :raises Corrupt: if it is damaged, or more would come out.
    """
    try:
        if compression == 'zstd' and _zstd_stdlib is None:
            return _zstandard_block(data, limit)
        engine: Any
        if compression == 'gzip':
            engine = zlib.decompressobj()
        elif compression == 'xz':
            engine = lzma.LZMADecompressor(lzma.FORMAT_XZ,
                                           memlimit=_BLOCK_MEMORY)
        else:
            engine = _zstd_stdlib.ZstdDecompressor()
        found = engine.decompress(data, limit + 1)
    except _BLOCK_ERRORS as exc:
        raise Corrupt(str(exc)) from exc
    if len(found) > limit or not engine.eof:
        raise Corrupt('a block is larger than the format allows, or broken '
                      'off')
    return found


def _zstandard_block(data: bytes, limit: int) -> bytes:
    # The library would allocate the size that a frame declares.
    if zstandard.frame_content_size(data) > limit:
        raise Corrupt('a block is larger than the format allows')
    return zstandard.ZstdDecompressor(
        max_window_size=MAX_ZSTD_WINDOW).decompress(
            data, max_output_size=limit)


def detect(head: bytes) -> str | None:
    """Recognise a compression by its first bytes.

    :param head: the beginning of a stream, six bytes or more.
    :returns: a key of MAGICS; None for what is not compressed, or in a way
        that LXD cannot undo.
    """
    for name, magics in MAGICS.items():
        if head.startswith(magics):
            return name
    return None


class Decompressor:
    """Decompresses a stream, also one that consists of several one after
    another, as parallel compressors write them.

    :param compression: a key of MAGICS.
    """

    def __init__(self, compression: str) -> None:
        self._compression = compression
        self._starts = MAGICS[compression]
        if compression == 'zstd':
            self._starts += _ZSTD_SKIPPABLE
        self._engine: _Engine | None = _ENGINES[compression]()
        self._between = b''

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decompress the next part of the stream.

        :param data: compressed bytes.
        :returns: decompressed pieces, each small.
        :raises Corrupt: if the stream is damaged.
        """
        data = self._between + data
        self._between = b''
        while data:
            if self._engine is None:
                # Tools pad with zeros up to a tape's or a disk's block size.
                data = data.lstrip(b'\0')
                if len(data) < _LONGEST_MAGIC:
                    self._between = data
                    return
                if not data.startswith(self._starts):
                    raise Corrupt('something else follows after the end of '
                                  'its compressed data')
                self._engine = _ENGINES[self._compression]()
            try:
                yield from self._engine.push(data)
            except self._engine.errors as exc:
                raise Corrupt(f'its {self._compression} data is damaged '
                              f'({exc})') from exc
            if not self._engine.eof:
                return
            data = self._engine.rest
            self._engine = None

    def finish(self) -> None:
        """Check that the stream has been complete.

        :raises Corrupt: if it is truncated.
        """
        if self._engine is not None or self._between:
            raise Corrupt(f'its {self._compression} data breaks off before '
                          f'the end')
