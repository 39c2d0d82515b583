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

"""LXD's errors as the Nova exceptions whose effect is right."""

from __future__ import annotations

from collections.abc import Callable
import functools
import inspect
from typing import Any

from nova import exception
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors

LOG = logging.getLogger(__name__)

#: What the owner of a server may read; LXD's own words can name paths of the
#: host and go to the log only.
_FOR_TENANTS = ('LXD on the host could not carry out "{operation}" on this '
                'server; its log tells the operator why.')


class StartupError(exception.InvalidConfiguration):
    """nova-compute cannot start; the message says why."""


class LXDRequestFailed(exception.NovaException):
    msg_fmt = '%(reason)s'


def convert_exception(exc: errors.LXDError, operation: str, instance: Any
              ) -> exception.NovaException:
    """Find the Nova exception for an LXD error.

    :param exc: what went wrong.
    :param operation: the driver's method.
    :param instance: the server it was about, if any.
    :returns: the exception to raise.
    """
    if isinstance(exc, errors.NotFound) and instance is not None:
        return exception.InstanceNotFound(instance_id=instance.uuid)
    if isinstance(exc, (errors.Unreachable, errors.PermissionDenied)):
        # Never a false power state: Nova would stop servers for it.
        return exception.HypervisorUnavailable(host=cfg.CONF.host)
    return LXDRequestFailed(
        reason=_FOR_TENANTS.format(operation=operation))


def map_exceptions(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keep LXD's errors from leaving a driver method.

    :param method: a method of the driver.
    :returns: the same method, raising Nova's exceptions.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except errors.LXDError as exc:
            bound = signature.bind(*args, **kwargs).arguments
            instance = bound.get('instance')
            LOG.error('%s failed: %s', method.__name__, exc,
                      instance=instance)
            raise convert_exception(exc, method.__name__, instance) from exc
    return wrapper


def map_all_exceptions(cls: type) -> type:
    """Apply :func:`map_exceptions` to every public method a class defines.

    :param cls: the driver class.
    :returns: the same class.
    """
    for name, member in list(vars(cls).items()):
        if inspect.isfunction(member) and not name.startswith('_'):
            setattr(cls, name, map_exceptions(member))
    return cls
