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

"""Tempest plugin, loaded by the entry point ``tempest.test_plugins``."""

import os
from typing import Any

from tempest.test_discover import plugins

from nova_lxd_py.tempest import config


class NovaLXDPlugin(plugins.TempestPlugin):
    """Tests for servers that are LXD containers."""

    def load_tests(self) -> tuple[str, str]:
        """Return the location of the tests.

        :returns: their directory, and the top-level directory for imports.
        """
        directory = os.path.dirname(os.path.abspath(__file__))
        top = os.path.dirname(os.path.dirname(directory))
        return os.path.join(directory, 'tests'), top

    def register_opts(self, conf: Any) -> None:
        """Register the options of section ``[lxd]``.

        :param conf: tempest's configuration.
        """
        conf.register_group(config.GROUP)
        conf.register_opts(config.OPTIONS, group=config.GROUP)

    def get_opt_lists(self) -> list[tuple[str, list[Any]]]:
        """List the options, for sample configuration files.

        :returns: pairs of section name and options.
        """
        return [(config.GROUP.name, config.OPTIONS)]
