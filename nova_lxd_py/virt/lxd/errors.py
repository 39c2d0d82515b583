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

"""What can go wrong between the driver and LXD, without a trace of HTTP.

Raised by the modules of this package; operation modules catch the ones they
can repair, and :mod:`nova_lxd_py.virt.exception_mapping` turns the rest into
the Nova exception whose effect is right.
"""

from __future__ import annotations


class LXDError(Exception):
    """Anything that LXD, or the way to it, refused.

    :param message: what happened, in words an operator can act on; never
        holds secrets, since Nova may show it to people.
    :param code: the status code LXD gave, if it gave one.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Unreachable(LXDError):
    """No LXD answers at the configured endpoint."""


class PermissionDenied(LXDError):
    """LXD answers, but nova-compute may not use it."""


class MissingExtension(LXDError):
    """The LXD server lacks an API extension that the driver needs."""


class NotFound(LXDError):
    """The named object does not exist."""


class AlreadyExists(LXDError):
    """An object of that name exists already."""


class Busy(LXDError):
    """Another operation holds the instance; trying again later can work."""


class PreconditionFailed(LXDError):
    """The object changed between reading and writing it (ETag mismatch)."""


class InvalidRequest(LXDError):
    """LXD refused the request as it was put; the same again fails again."""


class OperationFailed(LXDError):
    """LXD took the request and then could not carry it out."""


class OperationLost(OperationFailed):
    """LXD no longer knows the operation, so its outcome is unknown.

    LXD forgets an operation five seconds after its end, and all of them when
    it restarts.
    """


class DeadlineExceeded(LXDError):
    """LXD did not finish within the configured time."""
