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

"""Checks at start-up of nova-compute.

Each problem stops the service with one sentence that says what is wrong and
how to correct it, instead of failing the first instance. Nothing is changed on
the host, except that the driver's LXD project and Nova's instances directory
are created, and that LXD is made to listen at ``[lxd] migration_address``.
"""

from __future__ import annotations

from collections.abc import Callable
import time
from typing import Any

from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.preflight import host_checks
from nova_lxd_py.virt.preflight import instance_names
from nova_lxd_py.virt.preflight import lxd_checks

LOG = logging.getLogger(__name__)

#: Seconds between attempts to connect to LXD.
RETRY_DELAY = 1.0


def check(session: lxd.Session, conf: Any) -> None:
    """Run all checks, and connect to LXD.

    See :meth:`nova.virt.driver.ComputeDriver.init_host`.

    :param session: the LXD session; LXD need not answer yet.
    :param conf: the configuration, normally ``nova.conf.CONF``.
    :raises StartupError: if a check fails; the message says what to correct.
    """
    instance_names.check_name_template(conf.instance_name_template)
    host_checks.check_instances_path(conf.instances_path)
    host_checks.check_console_command(conf.lxd.serial_console_command)
    host_checks.check_config_drives(session, conf.lxd)

    def check_lxd() -> None:
        session.connect()
        lxd_checks.check_single(session)
        lxd_checks.check_extensions(session, conf.lxd)
        lxd_checks.check_project(session, conf)
        lxd_checks.check_pool(session, conf.lxd)
        host_checks.check_cpus(session, conf)
        host_checks.check_devices(session, conf.lxd)
        lxd_checks.check_migration(session, conf.lxd)

    wait_for_lxd(session, conf.lxd.startup_timeout, check_lxd)
    host_checks.report_uid_ranges(session, conf.lxd)
    host_checks.report_kernel_limits(session, conf.lxd)
    host_checks.report_device_activation(session)
    host_checks.report_server(session)


def wait_for_lxd(session: lxd.Session, timeout: float,
                 step: Callable[[], None]) -> None:
    """Call a function until LXD answers all of its requests.

    An LXD that is starting may not listen yet, may close connections, or may
    answer later than ``[lxd] request_timeout`` while it starts instances.

    :param session: the LXD session.
    :param timeout: seconds to wait for LXD.
    :param step: the function, which may be called repeatedly.
    :raises StartupError: if LXD does not answer in time, or an answer shows
        that waiting longer is useless.
    """
    deadline = time.monotonic() + timeout
    waiting = False
    while True:
        try:
            step()
            return
        except (errors.Unreachable, errors.DeadlineExceeded) as exc:
            if time.monotonic() >= deadline:
                waited = (f' (after {timeout:.0f} seconds, [lxd] '
                          f'startup_timeout)' if timeout else '')
                raise exception_mapping.StartupError(
                    f'LXD at {session.endpoint} cannot be used: {exc}'
                    f'{waited}') from exc
            if not waiting:
                LOG.warning('LXD does not answer yet; waiting for up to %d '
                            'seconds ([lxd] startup_timeout): %s', timeout,
                            exc)
                waiting = True
            time.sleep(min(RETRY_DELAY,
                           max(0.0, deadline - time.monotonic())))
        except errors.PermissionDenied as exc:
            raise exception_mapping.StartupError(
                f'LXD at {session.endpoint} denies nova-compute access that '
                f'it needs: {exc}') from exc
        except errors.LXDError as exc:
            raise exception_mapping.StartupError(
                f'LXD at {session.endpoint} cannot be used: {exc}') from exc
