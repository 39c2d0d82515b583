#!/usr/bin/env python3
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

"""Draw the documentation's diagrams: one SVG file beside each text file.

Run it without arguments after a change to ``doc/source/images/*.txt``; a unit
test fails if a drawing does not match its text. Two kinds of text exist.
Empty lines and lines that begin with ``#`` are ignored.

A grid of boxes; column, row, width and height are numbers of cells, and a box
named after ``frame`` only has a title at its top::

    grid 4
    box driver 0 0 4 1 "driver" "The class that Nova loads"
    frame host 0 1 4 2 "Compute host"
    arrow driver host "calls"

A sequence of calls (``->``) and replies (``-->``), top to bottom::

    sequence
    actor nova "Nova"
    actor lxd "LXD"
    nova -> lxd: Create the instance
    note lxd: What happens there
    section Failure
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
import pathlib
import re
import shlex
import textwrap

DIRECTORY = (pathlib.Path(__file__).resolve().parent.parent / 'doc' /
             'source' / 'images')

_FONT = 'font-family="Helvetica, Arial, sans-serif"'
_INK, _LINE, _FILL, _FRAME = '#1b2631', '#51606e', '#eaf2f8', '#f7f9fa'
#: Pixels that a character of the 12 pixel font takes on average.
_CHARACTER = 6.2
_LEADING = 15


def draw(text: str) -> str:
    """Draw one diagram.

    :param text: its description, in one of the forms described above.
    :returns: an SVG document.
    :raises ValueError: if a line cannot be understood.
    """
    lines = [line.strip() for line in text.splitlines()
             if line.strip() and not line.lstrip().startswith('#')]
    kind, *arguments = lines[0].split()
    if kind == 'grid':
        return _grid(int(arguments[0]), lines[1:])
    if kind == 'sequence':
        return _sequence(lines[1:])
    raise ValueError(f'unknown kind of diagram: {lines[0]}')


def _document(width: float, height: float, parts: Iterable[str]) -> str:
    return '\n'.join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'{_FONT} font-size="12" fill="{_INK}">',
        '<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" '
        f'refY="4" orient="auto"><path d="M0,0 L9,4 L0,8 z" fill="{_LINE}"/>'
        '</marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        *parts, '</svg>']) + '\n'


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" rx="4" fill="{fill}" stroke="{_LINE}"/>')


def _words(x: float, y: float, text: str, *, bold: bool = False,
           anchor: str = 'middle', background: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ''
    drawn = (f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{weight}>'
             f'{escape(text)}</text>')
    if not background:
        return drawn
    width = len(text) * (_CHARACTER + bold) + 6
    left = x - (width / 2 if anchor == 'middle' else 3)
    return (f'<rect x="{left:.0f}" y="{y - 11:.0f}" width="{width:.0f}" '
            f'height="14" fill="white" fill-opacity="0.85"/>{drawn}')


def _wrap(text: str, width: float) -> list[str]:
    return textwrap.wrap(text, max(int(width / _CHARACTER), 8))


def _line(x1: float, y1: float, x2: float, y2: float, *,
          dashed: bool = False) -> str:
    style = ' stroke-dasharray="5 4"' if dashed else ''
    return (f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" '
            f'stroke="{_LINE}"{style} marker-end="url(#head)"/>')


# -- boxes ------------------------------------------------------------------

_CELL_WIDTH, _CELL_HEIGHT, _GAP = 176, 64, 16


def _grid(columns: int, lines: list[str]) -> str:
    places: dict[str, tuple[float, float, float, float]] = {}
    boxes: list[str] = []
    arrows: list[str] = []
    rows = 0.0
    for line in lines:
        kind, *words = shlex.split(line)
        if kind in ('box', 'frame'):
            name = words[0]
            column, row, across, down = map(float, words[1:5])
            x = _GAP + column * (_CELL_WIDTH + _GAP)
            y = _GAP + row * (_CELL_HEIGHT + _GAP)
            width = across * (_CELL_WIDTH + _GAP) - _GAP
            height = down * (_CELL_HEIGHT + _GAP) - _GAP
            places[name] = x, y, width, height
            rows = max(rows, row + down)
            boxes += _cell(kind, places[name], words[5:])
        elif kind == 'arrow':
            arrows += _arrow(places[words[0]], places[words[1]],
                             words[2] if len(words) > 2 else '')
        else:
            raise ValueError(f'unknown line: {line}')
    return _document(columns * (_CELL_WIDTH + _GAP) + _GAP,
                     rows * (_CELL_HEIGHT + _GAP) + _GAP, boxes + arrows)


def _cell(kind: str, place: tuple[float, float, float, float],
          words: list[str]) -> list[str]:
    x, y, width, height = place
    if kind == 'frame':
        return [_box(x - 8, y - 8, width + 16, height + 16, _FRAME),
                _words(x, y + 8, words[0], bold=True, anchor='start')]
    rows = [row for text in words[1:] for row in _wrap(text, width - 12)]
    top = y + height / 2 - len(rows) * _LEADING / 2 + 4
    middle = x + width / 2
    return [_box(x, y, width, height, _FILL),
            _words(middle, top, words[0], bold=True),
            *(_words(middle, top + (number + 1) * _LEADING, row)
              for number, row in enumerate(rows))]


def _arrow(start: tuple[float, float, float, float],
           end: tuple[float, float, float, float], text: str) -> list[str]:
    x1, y1, width1, height1 = start
    x2, y2, width2, height2 = end
    left, right = max(x1, x2), min(x1 + width1, x2 + width2)
    if left < right:
        across = (left + right) / 2
        down = y2 > y1
        y, other = (y1 + height1, y2) if down else (y1, y2 + height2)
        parts = [_line(across, y, across, other)]
        middle, level = across, (y + other) / 2 + 4
    else:
        level = (max(y1, y2) + min(y1 + height1, y2 + height2)) / 2
        x, other = (x1 + width1, x2) if x2 > x1 else (x1, x2 + width2)
        parts = [_line(x, level, other, level)]
        middle, level = (x + other) / 2, level - 6
    if text:
        parts.append(_words(middle, level, text, background=True))
    return parts


# -- sequences --------------------------------------------------------------

_LANE, _LANE_BOX, _STEP = 170, 146, 14


def _sequence(lines: list[str]) -> str:
    actors: dict[str, int] = {}
    heads: list[str] = []
    parts: list[str] = []
    y = 76.0
    for line in lines:
        call = re.fullmatch(r'(\w+) (-->|->) (\w+): (.*)', line)
        if line.startswith('actor '):
            _, name, title = shlex.split(line)
            x = 12 + len(actors) * _LANE
            actors[name] = x + _LANE_BOX // 2
            heads += [_box(x, 12, _LANE_BOX, 30, _FILL),
                      _words(x + _LANE_BOX / 2, 31, title, bold=True)]
        elif call:
            start, end = actors[call[1]], actors[call[3]]
            drawn, y = _call(start, end, call[4], y, call[2] == '-->')
            parts += drawn
        elif line.startswith('note '):
            name, _, text = line[5:].partition(': ')
            drawn, y = _note(actors[name], text, y)
            parts += drawn
        elif line.startswith('section '):
            y += 10
            parts += [f'<line x1="12" y1="{y:.0f}" x2="'
                      f'{len(actors) * _LANE - 12}" y2="{y:.0f}" '
                      f'stroke="{_LINE}" stroke-dasharray="1 3"/>',
                      _words(12, y + _LEADING, line[8:], bold=True,
                             anchor='start', background=True)]
            y += _LEADING + 22
        else:
            raise ValueError(f'unknown line: {line}')
    lanes = [f'<line x1="{x}" y1="42" x2="{x}" y2="{y:.0f}" '
             f'stroke="{_LINE}" stroke-dasharray="2 3"/>'
             for x in actors.values()]
    return _document(len(actors) * _LANE, y + 12, heads + lanes + parts)


def _call(start: int, end: int, text: str, y: float, reply: bool
          ) -> tuple[list[str], float]:
    if start == end:
        return _note(start, text, y)
    rows = _wrap(text, max(abs(end - start), _LANE) - 14)
    middle = (start + end) / 2
    parts = [_words(middle, y + number * _LEADING, row, background=True)
             for number, row in enumerate(rows)]
    y += len(rows) * _LEADING - 8
    return [*parts, _line(start, y, end, y, dashed=reply)], y + _STEP + 12


def _note(middle: int, text: str, y: float) -> tuple[list[str], float]:
    rows = _wrap(text, _LANE_BOX - 10)
    top = y - 14
    height = len(rows) * _LEADING + 8
    return ([_box(middle - _LANE_BOX / 2, top, _LANE_BOX, height, 'white'),
             *(_words(middle, top + 15 + number * _LEADING, row)
               for number, row in enumerate(rows))],
            top + height + _STEP + 16)


def main() -> None:
    """Draw all diagrams of the documentation."""
    for path in sorted(DIRECTORY.glob('*.txt')):
        path.with_suffix('.svg').write_text(
            draw(path.read_text(encoding='utf-8')), encoding='utf-8')


if __name__ == '__main__':
    main()
