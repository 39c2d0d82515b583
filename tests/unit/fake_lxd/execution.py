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

"""Commands in guests, and what guests print."""

from __future__ import annotations

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import interactive
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state


def _default_handler(instance: state.Instance, command: list[str],
                     environment: dict[str, str], stdin: interactive.Stdin
                     ) -> tuple[int, bytes, bytes]:
    """A guest with four commands; tests bring others themselves."""
    if command[0] == 'cat':
        return 0, stdin.read(), b''
    if command[0] == 'true':
        return 0, b'', b''
    if command[0] == 'false':
        return 1, b'', b''
    if command[0] == 'echo':
        return 0, ' '.join(command[1:]).encode() + b'\n', b''
    raise FileNotFoundError(command[0])


def _run(daemon, instance: state.Instance, body: dict,
         stdin: interactive.Stdin) -> tuple[int, bytes, bytes]:
    command = list(body.get('command') or [])
    daemon.exec_log.append((instance.name, command))
    handler = daemon.exec_handler or _default_handler
    return handler(instance, command, dict(body.get('environment') or {}),
                   stdin)


@routing.route('POST', '/1.0/instances/{name}/exec')
def execute(daemon, request, name):
    body = request.json()
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        if not instance.is_running:
            raise errors.bad_request('Instance is not running')
        if instance.status == state.FROZEN:
            raise errors.bad_request('Instance is frozen')
    resources = {'containers': [f'/1.0/containers/{name}'],
                 'instances': [instance.path]}
    records = bool(body.get('record-output'))
    if body.get('wait-for-websocket'):
        return interactive.execute(
            daemon, request, instance, body,
            lambda stdin: _run(daemon, instance, body, stdin))

    def work(operation: operations.Operation):
        if not body.get('command'):
            raise errors.bad_request(
                'Failed to retrieve PID of executing child process')
        result: dict = {}
        try:
            code, out, err = _run(daemon, instance, body,
                                  interactive.Stdin())
            missing = False
        except FileNotFoundError:
            code, out, err, missing = 127, b'', b'', True
        if records:
            result['output'] = {}
            for key, stream, content in (('1', 'stdout', out),
                                         ('2', 'stderr', err)):
                log = f'exec_{operation.id}.{stream}'
                instance.logs[log] = content
                result['output'][key] = f'{instance.path}/logs/{log}'
        result['return'] = code
        operation.metadata = result
        daemon.events.lifecycle(
            'instance-exec', instance.project, instance.path,
            context={'command': body['command']})
        if missing:
            raise errors.bad_request('Command not found')

    return daemon.operations.run(request, 'Executing command', resources,
                                 work)


@routing.route('GET', '/1.0/instances/{name}/logs')
def list_logs(daemon, request, name):
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        return routing.sync([f'{instance.path}/logs/{log}'
                             for log in sorted(instance.logs)])


def _log(daemon, request, name: str, log: str) -> state.Instance:
    instance = daemon.store.instances.get((request.project, name))
    if instance is None:
        raise errors.not_found(
            f'Failed to fetch instance "{name}" in project '
            f'"{request.project}": Instance not found')
    if not (log.startswith('exec_') or log in (
            'lxc.log', 'lxc.conf', 'forkstart.log', 'console.log')):
        raise errors.bad_request(f'log file name {log} not valid')
    return instance


@routing.route('GET', '/1.0/instances/{name}/logs/{log}')
def get_log(daemon, request, name, log):
    with daemon.store.lock:
        instance = _log(daemon, request, name, log)
        if log not in instance.logs:
            raise errors.internal(
                f'open /var/log/lxd/{instance.project}_{name}/{log}: no such '
                f'file or directory')
        content = instance.logs[log]
    daemon.events.lifecycle(
        'instance-log-retrieved', instance.project,
        f'{instance.path}/backups/{log}', by_api=True)
    return routing.content(request, content, log)


@routing.route('DELETE', '/1.0/instances/{name}/logs/{log}')
def delete_log(daemon, request, name, log):
    with daemon.store.lock:
        instance = _log(daemon, request, name, log)
        if log not in instance.logs:
            raise errors.not_found(
                f'remove /var/log/lxd/{instance.project}_{name}/{log}: no '
                f'such file or directory')
        del instance.logs[log]
    daemon.events.lifecycle(
        'instance-log-deleted', instance.project,
        f'{instance.path}/backups/{log}', by_api=True)
    return routing.empty()


@routing.route('GET', '/1.0/instances/{name}/console')
def get_console(daemon, request, name):
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        if instance.console is None:
            where = '' if instance.is_running else (
                f'/var/log/lxd/{instance.project}_{name}/console.log')
            raise errors.internal(
                f'open {where}: no such file or directory')
        content = instance.console
    daemon.events.lifecycle('instance-console-retrieved', instance.project,
                            instance.path)
    return routing.content(request, content, '')


@routing.route('DELETE', '/1.0/instances/{name}/console')
def clear_console(daemon, request, name):
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        instance.console = None
    daemon.events.lifecycle('instance-console-reset', instance.project,
                            instance.path)
    return routing.empty()
