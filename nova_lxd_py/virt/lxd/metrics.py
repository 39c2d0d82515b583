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

"""LXD's metrics of an instance.

They contain more than the instance state, such as the time of each CPU, but
LXD always collects them for all instances. Therefore they are used for
requests of operators and not in periodic tasks. They need the API extension
``metrics``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import re

from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

_LINE = re.compile(r'(\w+)\{(.*)\} (\S+)')
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Labels = dict[str, str]


class Metrics:
    """Metrics of one instance.

    :param samples: tuples of the name without its prefix, labels and value.
    """

    def __init__(self, samples: Iterable[tuple[str, Labels, float]] = ()
                 ) -> None:
        self._samples: dict[str, list[tuple[Labels, float]]] = {}
        for name, labels, value in samples:
            self._samples.setdefault(name, []).append((labels, value))

    def all(self, name: str) -> list[tuple[Labels, float]]:
        """Return the samples of a metric, such as one for each CPU.

        :param name: LXD's name of the metric without its prefix ``lxd_``.
        :returns: pairs of labels and value.
        """
        return self._samples.get(name, [])

    def get(self, name: str, **labels: str) -> float | None:
        """Return one value of a metric.

        :param name: LXD's name of the metric without its prefix ``lxd_``.
        :param labels: labels that the sample must have.
        :returns: the value, or None if there is no such sample.
        """
        for found, value in self.all(name):
            if labels.items() <= found.items():
                return value
        return None


def read(session: lxd.Session, instance: str) -> Metrics:
    """Read the metrics of an instance.

    :param session: the LXD session.
    :param instance: LXD's name of the instance.
    :returns: the metrics; empty if LXD does not support them, or if a
        restricted certificate may not read them.
    :raises errors.LXDError: if the request fails.
    """
    if not session.has_extension('metrics'):
        return Metrics()
    try:
        prefix = session.kind.metrics_prefix
        with session.download('metrics') as (_headers, chunks):
            return Metrics(
                (name.removeprefix(prefix), labels, value)
                for name, labels, value in _parse(_lines(chunks))
                if labels.get('name') == instance and
                labels.get('project') == session.project)
    except (errors.PermissionDenied, errors.NotFound) as exc:
        LOG.debug('Metrics of LXD instance %s are not available: %s',
                  instance, exc)
        return Metrics()


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    rest = b''
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b'\n')
        for line in lines:
            yield line.decode(errors='replace')
    yield rest.decode(errors='replace')


def _parse(lines: Iterable[str]) -> Iterator[tuple[str, Labels, float]]:
    for line in lines:
        match = _LINE.fullmatch(line.strip())
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        yield match[1], dict(_LABEL.findall(match[2])), value
