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

"""Projects and profiles."""

from __future__ import annotations

from typing import Any

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state

_FEATURES = ('features.images', 'features.networks', 'features.profiles',
             'features.storage.volumes')
_KEYS = frozenset(_FEATURES) | frozenset("""
    backups.compression_algorithm images.auto_update_cached
    images.auto_update_interval images.compression_algorithm
    images.default_architecture images.remote_cache_expiry limits.containers
    limits.cpu limits.disk limits.instances limits.memory limits.networks
    limits.processes limits.virtual-machines restricted
    restricted.backups restricted.cluster.groups restricted.cluster.target
    restricted.containers.interception restricted.containers.lowlevel
    restricted.containers.nesting restricted.containers.privilege
    restricted.devices.disk restricted.devices.disk.paths
    restricted.devices.gpu restricted.devices.infiniband
    restricted.devices.nic restricted.devices.pci restricted.devices.proxy
    restricted.devices.unix-block restricted.devices.unix-char
    restricted.devices.unix-hotplug restricted.devices.usb
    restricted.idmap.gid restricted.idmap.uid restricted.networks.access
    restricted.networks.subnets restricted.networks.uplinks
    restricted.networks.zones restricted.snapshots
    restricted.virtual-machines.lowlevel
    """.split())


def _check(config: dict[str, str]) -> None:
    for key in sorted(config):
        if key not in _KEYS and not key.startswith('user.'):
            raise errors.bad_request(
                f'Invalid project configuration key "{key}"')


def _suffix(project: str) -> str:
    return '' if project == 'default' else f'?project={project}'


def _used_by(store: state.Store, name: str) -> list[str]:
    used = [instance.path + _suffix(name)
            for (owner, _), instance in store.instances.items()
            if owner == name]
    used += [f'/1.0/profiles/{profile}{_suffix(name)}'
             for owner, profile in store.profiles if owner == name
             and store.projects[name].config.get('features.profiles')
             == 'true']
    used += [f'/1.0/images/{fingerprint}{_suffix(name)}'
             for owner, fingerprint in store.images if owner == name]
    used += [f'/1.0/storage-pools/{pool}/volumes/custom/{volume}'
             f'{_suffix(name)}'
             for owner, pool, volume in store.volumes if owner == name]
    return used


def _shown(store: state.Store, project: state.Project) -> dict[str, Any]:
    return {'config': dict(project.config),
            'description': project.description, 'name': project.name,
            'used_by': _used_by(store, project.name)}


def _find(store: state.Store, name: str, prefix: str = '') -> state.Project:
    try:
        return store.projects[name]
    except KeyError:
        raise errors.not_found(f'{prefix}Project not found') from None


@routing.route('GET', '/1.0/projects')
def list_projects(daemon, request):
    with daemon.store.lock:
        projects = [daemon.store.projects[name]
                    for name in sorted(daemon.store.projects)]
        if request.query.get('recursion') == '1':
            return routing.sync([_shown(daemon.store, project)
                                 for project in projects])
        return routing.sync([f'/1.0/projects/{project.name}'
                             for project in projects])


@routing.route('POST', '/1.0/projects')
def create_project(daemon, request):
    body = request.json()
    name = body.get('name') or ''
    if not name:
        raise errors.bad_request('No name provided')
    if ' ' in name:
        raise errors.bad_request('Project names may not contain spaces')
    if '/' in name:
        raise errors.bad_request('Project names may not contain slashes')
    config = dict(body.get('config') or {})
    _check(config)
    with daemon.store.lock:
        if name in daemon.store.projects:
            raise errors.conflict(
                f'Failed creating project "{name}": Failed adding database '
                f'record: This "projects" entry already exists')
        for feature in _FEATURES:
            if feature != 'features.networks':
                config.setdefault(feature, 'true')
        daemon.store.projects[name] = state.Project(
            name, config, body.get('description') or '')
        if config['features.profiles'] == 'true':
            daemon.store.profiles[name, 'default'] = state.Profile(
                'default', description=f'Default LXD profile for project '
                                       f'{name}')
    daemon.events.lifecycle('project-created', name, f'/1.0/projects/{name}',
                            by_api=True)
    return routing.created(f'/1.0/projects/{name}')


@routing.route('GET', '/1.0/projects/{name}')
def get_project(daemon, request, name):
    with daemon.store.lock:
        project = _find(daemon.store, name)
        return routing.sync(
            _shown(daemon.store, project),
            etag_of=(project.description, project.config))


def _update(daemon, request, name):
    body = request.json()
    with daemon.store.lock:
        project = _find(daemon.store, name, f'Fetch project "{name}": '
                        if request.method == 'DELETE' else '')
        request.check_etag(project.description, project.config)
        # 5.0.2's PATCH replaces the config as a whole, too.
        config = dict(body.get('config') or {})
        _check(config)
        project.config = config
        if request.method == 'PUT' or 'description' in body:
            project.description = body.get('description') or ''
    daemon.events.lifecycle('project-updated', name, f'/1.0/projects/{name}',
                            by_api=True)
    return routing.empty()


routing.route('PUT', '/1.0/projects/{name}')(_update)
routing.route('PATCH', '/1.0/projects/{name}')(_update)


@routing.route('DELETE', '/1.0/projects/{name}')
def delete_project(daemon, request, name):
    if name == 'default':
        raise errors.APIError(403, "The 'default' project cannot be deleted")
    with daemon.store.lock:
        _find(daemon.store, name, f'Fetch project "{name}": ')
        used = [path for path in _used_by(daemon.store, name)
                if not path.startswith('/1.0/profiles/default')]
        if used:
            raise errors.internal('Only empty projects can be removed')
        del daemon.store.projects[name]
        daemon.store.profiles.pop((name, 'default'), None)
    daemon.events.lifecycle('project-deleted', name, f'/1.0/projects/{name}',
                            by_api=True)
    return routing.empty()


def _owner(daemon, request) -> str:
    return daemon.store.project_with(
        'profiles', request.project,
        f'Failed loading project "{request.project}": Project not found')


def _profile(daemon, owner: str, name: str, prefix: str = ''
             ) -> state.Profile:
    try:
        return daemon.store.profiles[owner, name]
    except KeyError:
        raise errors.not_found(f'{prefix}Profile not found') from None


def _profile_shown(daemon, owner: str, profile: state.Profile
                   ) -> dict[str, Any]:
    users = [instance.path + _suffix(instance.project)
             for instance in daemon.store.instances.values()
             if profile.name in instance.profiles
             and daemon.store.project_with('profiles', instance.project, '')
             == owner]
    return {'config': dict(profile.config),
            'description': profile.description,
            'devices': {key: dict(value)
                        for key, value in profile.devices.items()},
            'name': profile.name, 'used_by': users}


@routing.route('GET', '/1.0/profiles')
def list_profiles(daemon, request):
    with daemon.store.lock:
        owner = _owner(daemon, request)
        profiles = [profile for (project, _), profile
                    in sorted(daemon.store.profiles.items())
                    if project == owner]
        if request.query.get('recursion') == '1':
            return routing.sync([_profile_shown(daemon, owner, profile)
                                 for profile in profiles])
        return routing.sync([f'/1.0/profiles/{profile.name}{_suffix(owner)}'
                             for profile in profiles])


@routing.route('POST', '/1.0/profiles')
def create_profile(daemon, request):
    body = request.json()
    with daemon.store.lock:
        owner = _owner(daemon, request)
        name = body.get('name') or ''
        if not name:
            raise errors.bad_request('No name provided')
        if (owner, name) in daemon.store.profiles:
            raise errors.internal(
                f'Error inserting "{name}" into database: The profile '
                f'already exists')
        daemon.store.profiles[owner, name] = state.Profile(
            name, dict(body.get('config') or {}),
            dict(body.get('devices') or {}), body.get('description') or '')
    daemon.events.lifecycle('profile-created', owner,
                            f'/1.0/profiles/{name}', by_api=True)
    return routing.created(f'/1.0/profiles/{name}')


@routing.route('GET', '/1.0/profiles/{name}')
def get_profile(daemon, request, name):
    with daemon.store.lock:
        owner = _owner(daemon, request)
        profile = _profile(daemon, owner, name, 'Fetch profile: ')
        return routing.sync(
            _profile_shown(daemon, owner, profile),
            etag_of=(profile.config, profile.description, profile.devices))


def _update_profile(daemon, request, name):
    body = request.json()
    with daemon.store.lock:
        owner = _owner(daemon, request)
        glue = ' ' if request.method == 'PUT' else '='
        profile = _profile(daemon, owner, name,
                           f'Failed to retrieve profile{glue}"{name}": ')
        request.check_etag(profile.config, profile.description,
                           profile.devices)
        config = dict(body.get('config') or {})
        devices = dict(body.get('devices') or {})
        if request.method == 'PATCH':
            config = {**profile.config, **config}
            devices = {**profile.devices, **devices}
        profile.config = {key: value for key, value in config.items()
                          if value}
        profile.devices = devices
        if request.method == 'PUT' or 'description' in body:
            profile.description = body.get('description') or ''
    daemon.events.lifecycle('profile-updated', owner,
                            f'/1.0/profiles/{name}', by_api=True)
    return routing.empty()


routing.route('PUT', '/1.0/profiles/{name}')(_update_profile)
routing.route('PATCH', '/1.0/profiles/{name}')(_update_profile)


@routing.route('DELETE', '/1.0/profiles/{name}')
def delete_profile(daemon, request, name):
    with daemon.store.lock:
        owner = _owner(daemon, request)
        profile = _profile(daemon, owner, name)
        if name == 'default':
            raise errors.APIError(
                403, 'The "default" profile cannot be deleted')
        if _profile_shown(daemon, owner, profile)['used_by']:
            raise errors.bad_request('Profile is currently in use')
        del daemon.store.profiles[owner, name]
    daemon.events.lifecycle('profile-deleted', owner,
                            f'/1.0/profiles/{name}', by_api=True)
    return routing.empty()
