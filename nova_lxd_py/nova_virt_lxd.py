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

"""The module that Nova imports as ``nova.virt.lxd``.

See ``nova_lxd_py.loader``.
"""

from nova import version

# Checked before the driver is imported: with an older Nova, that import fails
# with an ImportError that does not tell the cause. The version of Nova in a
# checkout without tags is 0.
_release = version.version_info.version_string()
if 0 < int(_release.split('.')[0]) < 31:
    raise ImportError(
        'nova-lxd-py needs Nova 31 (2025.1) or later, this is Nova %s. '
        'Upgrade Nova, or uninstall nova-lxd-py and choose another '
        'compute_driver.' % _release)

from nova_lxd_py.virt import driver  # noqa: E402

LXDDriver = driver.LXDDriver

__all__ = ['LXDDriver']
