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

"""Start, stop, restart, freeze: what LXD does, and what the guest does."""

from __future__ import annotations

import json
import time

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import devices
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state

#: Seconds LXD gives a clean shutdown when the client sets no limit.
_LONG = 600

_TITLES = {'start': 'Starting', 'stop': 'Stopping', 'restart': 'Restarting',
           'freeze': 'Freezing', 'unfreeze': 'Unfreezing'}


@routing.route('PUT', '/1.0/instances/{name}/state')
def change_state(daemon, request, name):
    body = request.json()
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
    action = body.get('action') or ''
    if action not in _TITLES:
        raise errors.bad_request(f"Unknown action: '{action}'")
    timeout = body.get('timeout', -1)
    if body.get('force'):
        timeout = 0
    elif timeout < 0:
        timeout = _LONG

    def work(operation: operations.Operation) -> None:
        if action == 'start':
            start(daemon, operation, instance)
        elif action == 'stop':
            stop(daemon, operation, instance, timeout)
        elif action == 'restart':
            restart(daemon, operation, instance, timeout)
        elif action == 'freeze':
            freeze(daemon, instance)
        else:
            unfreeze(daemon, instance)

    return daemon.operations.run(
        request, f'{_TITLES[action]} instance',
        {'instances': [instance.path]}, work)


def busy(instance: state.Instance, prefix: str) -> errors.APIError:
    return errors.bad_request(
        f'{prefix}: Instance is busy running a "{instance.busy}" operation')


def _event(daemon, action: str, instance: state.Instance,
           by_api: bool = True) -> None:
    daemon.events.lifecycle(f'instance-{action}', instance.project,
                            instance.path, by_api=by_api)


def start(daemon, operation: operations.Operation | None,
          instance: state.Instance) -> None:
    with daemon.store.lock:
        if instance.is_running:
            raise errors.bad_request('The instance is already running')
        if instance.busy:
            raise busy(instance, 'Failed to create instance start operation')
        _boot(daemon, operation, instance)
    _event(daemon, 'started', instance)


def _boot(daemon, operation: operations.Operation | None,
          instance: state.Instance) -> None:
    """Make the container run; the store is locked."""
    config, wanted = daemon.store.expanded(instance)
    root = devices.root_of(wanted) or {}
    following = config.get('volatile.idmap.next', '[]')
    if instance.files is None:
        raise errors.bad_request(
            f'Failed to handle idmapped storage: No such file or directory: '
            f'"/var/lib/lxd/storage-pools/{root.get("pool")}/containers/'
            f'{instance.project}_{instance.name}/rootfs"')
    take_volumes(daemon, instance, wanted, following)
    # The files are shifted, and stay so, when a device fails then.
    shifted = config.get('volatile.last_state.idmap', '[]')
    shifts = shifted != following
    if instance.too_low_quota is not None:
        name = f'{instance.project}_{instance.name}'
        raise errors.bad_request(
            f'Failed to handle idmapped storage: Failed to change ownership '
            f'of: /var/lib/lxd/storage-pools/{root.get("pool")}/containers/'
            f'{name}/rootfs' if shifts else
            f'Failed clearing ownership: chown /var/lib/lxd/containers/{name}'
            f': disk quota exceeded')
    if not (daemon.idmapped_mounts and shifted == '[]'):
        instance.config['volatile.last_state.idmap'] = following
    instance.config['volatile.idmap.current'] = following
    devices.start(daemon, instance, wanted)
    instance.config['volatile.last_state.power'] = 'RUNNING'
    instance.config.pop('volatile.apply_template', None)
    instance.status = state.RUNNING
    instance.pid = 4000 + len(daemon.requests)
    instance.last_used_at = clock.now()
    instance.print_line('booted')
    instance.stopped_event.clear()
    if operation is not None and shifts:
        operation.update(container_progress='')


def take_volumes(daemon, instance: state.Instance,
                 wanted: devices.Devices, idmap: str) -> None:
    """Shift custom volumes for an instance, unless another one has them."""
    owner = daemon.store.project_with('storage.volumes', instance.project,
                                      'Project not found')
    for device in wanted.values():
        if device.get('type') != 'disk' or device.get('path') == '/':
            continue
        volume = daemon.store.volumes.get(
            (owner, device.get('pool', ''), device.get('source', '')))
        if volume is None or volume.config.get('security.shifted') == 'true':
            continue
        before = volume.config.get('volatile.idmap.next')
        others = [other for other in daemon.store.instances.values()
                  if other is not instance and other.is_running
                  and any(d.get('source') == volume.name
                          for d in other.devices.values())]
        if others and before is not None and json.loads(
                before) != json.loads(idmap):
            raise errors.bad_request(
                'Idmaps of container and storage volume are not identical')
        volume.config['volatile.idmap.last'] = idmap
        volume.config['volatile.idmap.next'] = idmap


def stop(daemon, operation: operations.Operation, instance: state.Instance,
         timeout: float) -> None:
    """Stop an instance.

    :param timeout: seconds for a clean shutdown; 0 kills it.
    """
    if timeout == 0:
        with daemon.store.lock:
            if not instance.is_running:
                raise errors.bad_request('The instance is already stopped')
            if instance.busy not in ('', 'stop'):
                raise busy(instance,
                           'Failed to create instance stop operation')
            _down(daemon, instance, 'stop')
        _finish_stop(daemon, instance, 'stopped')
        return
    _shutdown(daemon, operation, instance, timeout, 'stop')
    with daemon.store.lock:
        killed = not instance.busy and not instance.is_running
        if instance.is_running:
            _down(daemon, instance, 'stop')
    if killed:
        # Somebody else stopped it for good meanwhile.
        _event(daemon, 'shutdown', instance)
        return
    _finish_stop(daemon, instance, 'shutdown')


def _shutdown(daemon, operation: operations.Operation,
              instance: state.Instance, timeout: float, action: str) -> None:
    """Wait until the guest obeys, or somebody kills it."""
    with daemon.store.lock:
        if not instance.is_running:
            raise errors.bad_request('The instance is already stopped')
        if instance.busy not in ('', 'stop'):
            raise busy(instance, 'Failed to create instance stop operation')
        if instance.status == state.FROZEN:
            instance.status = state.RUNNING
            _event(daemon, 'resumed', instance)
        guest = instance.guest
        instance.busy = action if action == 'restart' else 'stop'
    limit = timeout / daemon.speed
    obeys_after = (float('inf') if guest.ignores_shutdown
                   else guest.shutdown_time)
    generation = daemon.operations.generation
    began = time.monotonic()
    try:
        while True:
            left = min(limit, obeys_after) - (time.monotonic() - began)
            if left <= 0 or instance.stopped_event.wait(min(left, 0.02)):
                break
            daemon.operations.checkpoint(operation, generation)
    finally:
        with daemon.store.lock:
            instance.busy = ''
    if instance.stopped_event.is_set() or obeys_after <= limit:
        return
    raise errors.bad_request(
        'Failed shutting down instance, status is "Running": shutting down '
        'the container failed')


def _down(daemon, instance: state.Instance, action: str) -> None:
    """Make the container say Stopped while LXD is still at it."""
    instance.status = state.STOPPED
    instance.pid = 0
    instance.busy = action
    instance.stopped_event.set()
    instance.terminal.show(None)


def _finish_stop(daemon, instance: state.Instance, action: str,
                 by_api: bool = True) -> None:
    """Do what LXD's stop hook does."""
    if daemon.stop_hook_delay:
        time.sleep(daemon.stop_hook_delay)
    with daemon.store.lock:
        _config, wanted = daemon.store.expanded(instance)
        devices.stop(instance, list(wanted))
        instance.config['volatile.last_state.power'] = 'STOPPED'
        instance.busy = ''
        if instance.ephemeral:
            daemon.store.instances.pop((instance.project, instance.name),
                                       None)
    _event(daemon, action, instance, by_api)


def restart(daemon, operation: operations.Operation,
            instance: state.Instance, timeout: float) -> None:
    with daemon.store.lock:
        if instance.busy and not instance.is_running:
            raise busy(instance, 'Create restart operation')
        if not instance.is_running:
            raise errors.bad_request('The instance is already stopped')
    if timeout:
        _shutdown(daemon, operation, instance, timeout, 'restart')
    with daemon.store.lock:
        _config, wanted = daemon.store.expanded(instance)
        _down(daemon, instance, 'restart')
        devices.stop(instance, list(wanted))
        instance.config['volatile.last_state.power'] = 'STOPPED'
    if daemon.stop_hook_delay:
        time.sleep(daemon.stop_hook_delay)
    try:
        with daemon.store.lock:
            _boot(daemon, operation, instance)
    finally:
        with daemon.store.lock:
            instance.busy = ''
    _event(daemon, 'restarted', instance)


def freeze(daemon, instance: state.Instance) -> None:
    with daemon.store.lock:
        if not instance.is_running:
            raise errors.bad_request("The container isn't running")
        if instance.status == state.FROZEN:
            raise errors.bad_request('The container is already frozen')
        instance.status = state.FROZEN
    _event(daemon, 'paused', instance)


def unfreeze(daemon, instance: state.Instance) -> None:
    with daemon.store.lock:
        if not instance.is_running:
            raise errors.bad_request("The container isn't running")
        if instance.status != state.FROZEN:
            raise errors.bad_request('The container is already running')
        instance.status = state.RUNNING
    _event(daemon, 'resumed', instance)


def guest_poweroff(daemon, instance: state.Instance) -> None:
    """The guest goes down by itself."""
    with daemon.store.lock:
        if not instance.is_running:
            raise ValueError(f'{instance.name} is not running')
        _down(daemon, instance, 'stop' if daemon.is_up else '')
    if daemon.is_up:
        _finish_stop(daemon, instance, 'shutdown', by_api=False)


def guest_reboot(daemon, instance: state.Instance) -> None:
    """The guest restarts by itself; LXD does it for the guest."""
    guest_poweroff(daemon, instance)
    if not daemon.is_up:
        return
    time.sleep(daemon.reboot_gap)
    with daemon.store.lock:
        _boot(daemon, None, instance)
    _event(daemon, 'restarted', instance, by_api=False)


def daemon_start(daemon) -> None:
    """Start what stopped while the daemon was down, as LXD does."""
    with daemon.store.lock:
        found = [instance for instance in daemon.store.instances.values()
                 if not instance.is_running]
    for instance in found:
        with daemon.store.lock:
            config, _devices = daemon.store.expanded(instance)
            instance.busy = ''
            was_running = config.get('volatile.last_state.power') == 'RUNNING'
            autostart = config.get('boot.autostart')
            wanted = autostart == 'true' or (was_running
                                             and autostart != 'false')
            if not wanted:
                if was_running:
                    instance.config['volatile.last_state.power'] = 'STOPPED'
                continue
            try:
                _boot(daemon, None, instance)
            except errors.APIError:
                continue
        _event(daemon, 'started', instance, by_api=False)
