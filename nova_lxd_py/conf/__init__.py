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

"""The ``[lxd]`` options of nova.conf."""

from __future__ import annotations

from collections.abc import Iterable

from nova import conf as nova_conf
from oslo_config import cfg

from nova_lxd_py.conf import connection
from nova_lxd_py.conf import image
from nova_lxd_py.conf import instance
from nova_lxd_py.conf import migration
from nova_lxd_py.conf import volume

lxd_group = cfg.OptGroup(
    'lxd',
    title='LXD driver options',
    help="""
Options of the LXD compute driver (``compute_driver = lxd.LXDDriver``), which
runs instances as LXD system containers on the compute host.
""")

ALL_OPTS = (connection.connection_opts + connection.timeout_opts +
            instance.instance_opts + instance.device_opts +
            image.image_opts + migration.migration_opts +
            image.snapshot_opts + volume.volume_opts)


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register the ``[lxd]`` options.

    :param conf: the configuration to extend, normally ``nova.conf.CONF``.
    """
    conf.register_group(lxd_group)
    conf.register_opts(ALL_OPTS, group=lxd_group)


def list_opts() -> Iterable[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """List the options for oslo-config-generator and the documentation.

    :returns: pairs of group and options.
    """
    return [(lxd_group, ALL_OPTS)]


CONF = nova_conf.CONF
register_opts(CONF)
