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

"""Makes this driver importable as ``nova.virt.lxd``.

Nova loads ``compute_driver = lxd.LXDDriver`` from ``nova.virt.lxd`` and cannot
load a driver from outside its own package. Importing this module registers a
finder for exactly this name, which loads ``nova_lxd_py.nova_virt_lxd``,
wherever Nova is installed.

A ``.pth`` file of the package imports this module in every interpreter of the
environment. Therefore it imports only ``sys``, and not Nova: nova-compute must
be able to monkey patch before other modules are loaded.
"""

import sys

ALIAS = 'nova.virt.lxd'


class NovaVirtLXDFinder:
    """Meta path finder for one module name."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        """Find the module spec of ``nova.virt.lxd``.

        :param fullname: dotted name of the module to import.
        :param path: ``__path__`` of the parent package; unused.
        :param target: module to reload; unused.
        :returns: the module's spec, or None for any other name.
        """
        if fullname != ALIAS:
            return None
        from importlib import util
        from os import path as os_path
        return util.spec_from_file_location(
            fullname,
            os_path.join(os_path.dirname(__file__), 'nova_virt_lxd.py'))


def install():
    """Register the finder, once per interpreter.

    It is appended to ``sys.meta_path``: it is called only for modules that no
    other finder knows, so that other imports are not slowed down.
    """
    if NovaVirtLXDFinder not in sys.meta_path:
        sys.meta_path.append(NovaVirtLXDFinder)


install()
