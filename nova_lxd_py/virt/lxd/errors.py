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

"""Errors of the LXD client, independent of HTTP.

They are raised by this package, and by modules above it that find out about a
condition of the same kind themselves. The virt driver's modules handle those
that they can recover from; :mod:`nova_lxd_py.virt.exception_mapping` converts
the others to Nova exceptions.
"""

from __future__ import annotations


class LXDError(Exception):
    """LXD, or the connection to it, failed.

    :param message: the reason. It must not contain secrets, because it is
        logged.
    :param code: the status code of LXD's answer, if there was one.
    """

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class Unreachable(LXDError):
    """No LXD answers at the configured endpoint."""


class ConnectionFailed(Unreachable):
    """The connection to LXD failed, and the request may be sent again: LXD
    has not received it, or it only reads."""


class PermissionDenied(LXDError):
    """LXD denies access to nova-compute."""


class NotFound(LXDError):
    """The named object does not exist."""


class InstanceNotFound(NotFound):
    """An LXD instance does not exist: neither a pool, nor a project, an image
    or a file is what is missing."""


class AlreadyExists(LXDError):
    """An object with this name exists already."""


class Busy(LXDError):
    """Another operation on the instance is running; a retry may succeed."""


class PreconditionFailed(LXDError):
    """The object was changed between read and write (ETag mismatch)."""


class InvalidRequest(LXDError):
    """LXD refused the request as invalid; a retry fails as well."""


class OperationFailed(LXDError):
    """LXD accepted the request, and the operation failed."""


class Transient(OperationFailed):
    """LXD's daemon could not carry out a request for the moment: its database
    is busy, or it is starting or stopping."""


class DiskFull(OperationFailed):
    """The root disk of an instance is full, and its quota has been extended
    as far as it may be."""


class NotRunning(OperationFailed):
    """An instance does not run, so its processes cannot be frozen or thawed.
    """


class OperationLost(OperationFailed):
    """LXD does not know the operation any more; its outcome is unknown.

    LXD forgets an operation five seconds after it has finished, and all
    operations when it restarts.
    """


class DeadlineExceeded(LXDError):
    """LXD did not answer or finish within the timeout."""
