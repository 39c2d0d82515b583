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

"""Loading of VIF and volume plugins through stevedore."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from oslo_log import log as logging
from stevedore import extension

LOG = logging.getLogger(__name__)

_Plugin = TypeVar('_Plugin')


def load(namespace: str, kind: type[_Plugin], subject: str, refused: str,
         arguments: Sequence[Any] = ()) -> dict[str, _Plugin]:
    """Load the plugins of a stevedore namespace.

    A plugin that cannot be loaded is logged and omitted.

    :param namespace: the entry point group.
    :param kind: the base class of the plugins.
    :param subject: kind of plugin for log messages, such as ``VIF``.
    :param refused: what needs the plugin, for log messages, such as ``Ports``.
    :param arguments: arguments of the plugins' constructors.
    :returns: plugins by the names of their entry points.
    """
    def report(_manager: Any, entry_point: Any, error: BaseException) -> None:
        LOG.error('The %(subject)s plugin %(name)s (%(target)s) could not be '
                  'loaded: %(error)s. %(refused)s of this type will be '
                  'refused.', {
                      'subject': subject, 'name': entry_point.name,
                      'target': entry_point.value, 'error': error,
                      'refused': refused})

    found = {}
    for name, plugin in extension.ExtensionManager(
            namespace, invoke_on_load=True, invoke_args=tuple(arguments),
            on_load_failure_callback=report).items():
        if isinstance(plugin.obj, kind):
            found[name] = plugin.obj
        else:
            LOG.error('The %(subject)s plugin %(name)s (%(target)s) is not a '
                      '%(kind)s. %(refused)s of this type will be refused.', {
                          'subject': subject, 'name': name,
                          'target': plugin.entry_point.value,
                          'kind': kind.__name__, 'refused': refused})
    return found
