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

"""Maps LXD's errors to the Nova exceptions that have the right effect."""

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

#: The reason that the owner of a server sees; LXD's own text can name paths
#: of the host and goes to the log only.
_PUBLIC_REASON = ('LXD could not carry out "{operation}" on this server; the '
                  'log of nova-compute has the reason')

_DISK_FULL = ('the root disk of this server is full: delete files in it, in a '
              'rescue instance if it does not start, or resize the server to '
              'a flavor with a larger disk')

#: Nova takes InstanceNotFound from these methods for a server that has been
#: deleted meanwhile, records no fault and leaves it in BUILD or "deleting".
_NEVER_MISSING = frozenset({'cleanup', 'destroy', 'spawn'})


class StartupError(exception.InvalidConfiguration):
    """nova-compute cannot start; the message has the reason."""


class LXDRequestFailed(exception.NovaException):
    msg_fmt = '%(reason)s'


def convert_exception(exc: errors.LXDError, operation: str, instance: Any
                      ) -> exception.NovaException:
    """Return the Nova exception for an LXD error.

    :param exc: the LXD error.
    :param operation: name of the driver's method.
    :param instance: the :class:`nova.objects.Instance` it was called for, or
        None.
    :returns: the exception to raise.
    """
    if (isinstance(exc, errors.InstanceNotFound) and instance is not None and
            operation not in _NEVER_MISSING):
        return exception.InstanceNotFound(instance_id=instance.uuid)
    if isinstance(exc, (errors.Unreachable, errors.PermissionDenied)):
        # Never a wrong power state, for which Nova would stop servers.
        return exception.HypervisorUnavailable(host=cfg.CONF.host)
    if isinstance(exc, errors.DiskFull):
        return LXDRequestFailed(reason=_DISK_FULL)
    return LXDRequestFailed(
        reason=_PUBLIC_REASON.format(operation=operation))


def map_exceptions(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a driver method so that it raises Nova's exceptions instead of
    LXD's errors.

    :param method: a method of the driver.
    :returns: the wrapped method.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except errors.LXDError as exc:
            bound = signature.bind(*args, **kwargs).arguments
            instance = bound.get('instance')
            LOG.error('Driver method %s failed: %s', method.__name__, exc,
                      instance=instance)
            raise convert_exception(exc, method.__name__, instance) from exc
    return wrapper


def map_all_exceptions(cls: type) -> type:
    """Apply :func:`map_exceptions` to every public method of a class.

    :param cls: the driver class.
    :returns: the same class.
    """
    for name, member in list(vars(cls).items()):
        if inspect.isfunction(member) and not name.startswith('_'):
            setattr(cls, name, map_exceptions(member))
    return cls
