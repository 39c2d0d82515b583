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

"""Work that can block on tenants' data, in child processes with deadlines.

System calls on a device, filesystem or share of a tenant can block for as long
as the tenant or the storage likes. In a thread of the privileged daemon, that
would occupy the thread, and soon all of its pool. A child process is killed at
its deadline. One that cannot be killed, in an uninterruptible system call, is
left behind, and the thread continues.

The child is forked and does not execute a program, since it needs the modules
that the daemon has loaded. It has the capabilities of the daemon.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
import contextlib
import errno
import functools
import logging
import os
import pickle
import selectors
import signal
import time
from typing import Any, ParamSpec, TypeVar

_Parameters = ParamSpec('_Parameters')
_Result = TypeVar('_Result')

#: Seconds for a child to exit after it has returned its result or was killed.
_EXIT_TIME = 2.0

#: Children that did not exit in time.
_left: set[int] = set()


def killable(deadline: float) -> Callable[
        [Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Decorate a function to run in a child process.

    :param deadline: seconds after which the child is killed.
    :returns: the decorator; the function then raises :class:`TimeoutError`, a
        kind of OSError, if it does not return in time.
    """
    def decorate(function: Callable[_Parameters, _Result]
                 ) -> Callable[_Parameters, _Result]:
        @functools.wraps(function)
        def wrapper(*args: _Parameters.args, **kwargs: _Parameters.kwargs
                    ) -> _Result:
            return run(deadline, functools.partial(
                function, *args, **kwargs), name=function.__name__)
        return wrapper
    return decorate


def run(deadline: float, function: Callable[[], _Result],
        keep: Collection[int] = (), name: str = '') -> _Result:
    """Call a function in a child process.

    :param deadline: seconds after which the child is killed.
    :param function: the function; its result must be serializable.
    :param keep: file descriptors that it needs.
    :param name: its name for the error.
    :returns: its result.
    :raises TimeoutError: if it does not return in time.
    :raises ChildProcessError: if the child ends without a result.
    :raises Exception: what the function raises.
    """
    _reap_left()
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        _child(function, writing, keep)
    os.close(writing)
    try:
        answer = _read(reading, time.monotonic() + deadline)
    finally:
        os.close(reading)
        if not _has_exited(process, 0):
            # It and what it has started; it may not have its session yet.
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(process, signal.SIGKILL)
            if not _has_exited(process, _EXIT_TIME):
                _left.add(process)
    name = name or getattr(function, '__name__', 'It')
    if answer is None:
        raise TimeoutError(errno.ETIMEDOUT, f'{name} did not finish within '
                           f'{deadline:.0f} seconds')
    if not answer:
        raise ChildProcessError(errno.ECHILD, f'{name} ended unexpectedly')
    succeeded, result, records = pickle.loads(answer)
    for logger, level, message in records:
        logging.getLogger(logger).log(level, '%s', message)
    if not succeeded:
        raise result
    return result


def _child(function: Callable[[], Any], writing: int, keep: Collection[int]
           ) -> None:
    """Call the function and send its result; never returns."""
    try:
        os.setsid()
        # Descriptors of the daemon, such as its connection to nova-compute,
        # must not be kept open by a child that is left behind.
        first = 3
        for descriptor in sorted({writing, *keep}):
            os.closerange(first, descriptor)
            first = descriptor + 1
        os.closerange(first, os.sysconf('SC_OPEN_MAX'))
        # Handlers may have locks that other threads held at the fork.
        records: list[tuple[str, int, str]] = []
        logging.Logger.handle = (  # type: ignore[method-assign]
            lambda self, record: records.append(
                (record.name, record.levelno, record.getMessage())))
        try:
            answer = pickle.dumps((True, function(), records))
        except Exception as error:
            try:
                answer = pickle.dumps((False, error, records))
            except Exception:
                answer = pickle.dumps(
                    (False, OSError(errno.EIO, str(error)), records))
        with open(writing, 'wb') as stream:
            stream.write(answer)
    finally:
        os._exit(0)


def _read(descriptor: int, deadline: float) -> bytes | None:
    """Read until the child closes the pipe; None after the deadline."""
    answer = bytearray()
    # Not select.poll: eventlet, with which Nova 31 and 32 run, removes it.
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            if selector.select(left):
                part = os.read(descriptor, 1 << 20)
                if not part:
                    return bytes(answer)
                answer += part


def _has_exited(process: int, timeout: float) -> bool:
    """Wait for a child, and reap it."""
    deadline = time.monotonic() + (timeout or 0.05)
    pause = 0.0005
    while True:
        try:
            if os.waitpid(process, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.05)


def _reap_left() -> None:
    for process in list(_left):
        try:
            exited = os.waitpid(process, os.WNOHANG)[0]
        except ChildProcessError:
            exited = process
        if exited:
            _left.discard(process)
