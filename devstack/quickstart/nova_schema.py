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

"""Creates nova's databases: ``nova_schema.py CONFIG-FILE CELL0-URL HOST``.

What five calls of nova-manage do (api_db sync, cell_v2 map_cell0, db sync,
cell_v2 create_cell, cell_v2 discover_hosts), with its own command classes and
in one process, since each call would import all of nova again.
"""

from __future__ import annotations

import os
import sys

# nova-manage has no concurrency, so native threads are enough.
os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', 'true')

# First: it selects the concurrency mode.
from nova.cmd import manage  # noqa: E402

from nova import config  # noqa: E402
from nova import context  # noqa: E402
from nova import exception  # noqa: E402
from nova import objects  # noqa: E402

CELL = 'cell1'


def check(step: str, result: int | None) -> None:
    """Exit where nova-manage would have failed.

    :param step: the name of the command.
    :param result: what the command returned; 0 and None are success.
    """
    if result:
        sys.exit(f'nova-manage {step} failed with {result}')


def map_host(host: str) -> None:
    """Map the compute host to the cell before its first report.

    :param host: name of the host, as in nova.conf.
    """
    admin = context.get_admin_context()
    cells = objects.CellMappingList.get_all(admin)
    cell = next(cell for cell in cells if cell.name == CELL)
    try:
        objects.HostMapping.get_by_host(admin, host)
    except exception.HostMappingNotFound:
        objects.HostMapping(admin, host=host, cell_mapping=cell).create()


def main() -> None:
    config_file, cell0_url, host = sys.argv[1:]
    config.parse_args(['nova-manage', '--config-file', config_file])
    objects.register_all()
    check('api_db sync', manage.ApiDbCommands().sync())
    cells = manage.CellV2Commands()
    check('cell_v2 map_cell0', cells.map_cell0(database_connection=cell0_url))
    check('db sync', manage.DbCommands().sync())
    names = [cell.name for cell in objects.CellMappingList.get_all(
        context.get_admin_context())]
    if CELL not in names:
        check('cell_v2 create_cell', cells.create_cell(name=CELL))
    map_host(host)


if __name__ == '__main__':
    main()
