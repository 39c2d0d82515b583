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

"""Configure tempest for the quickstart cloud.

run_tests.sh calls ``configure.py write DIRECTORY``. For DevStack's plugin
``configure.py features`` prints the feature flags for any cloud, and
``configure.py skips`` the tests to exclude. The flags are read from the
support matrix, so that tests run exactly for the features that are documented
as supported.
"""

from __future__ import annotations

import configparser
import os
import pathlib
import sys
from typing import Any

import openstack
from openstack import connection
import yaml

REPO = pathlib.Path(__file__).resolve().parents[2]
PREFIX = pathlib.Path(os.environ.get('QUICKSTART_PREFIX', '/opt/nova-lxd'))
MATRIX = REPO / 'doc' / 'source' / 'support-matrix.ini'
SKIPS = pathlib.Path(__file__).with_name('skips.yaml')
ADMIN_CLOUD = 'nova-lxd-admin'

# Name of the first volume in a guest, if the user does not give one.
VOLUME_DEVICE = 'sdb'

# Some tests need a second image with an SSH server.
SECOND_IMAGE = 'tempest-second'

# The option of [compute-feature-enabled] and the row of the support matrix
# that decides on it.
FEATURES = {
    'block_migration_for_live_migration': 'operation.live-migrate',
    'cold_migration': 'operation.migrate',
    'console_output': 'operation.console.serial.log',
    'interface_attach': 'operation.attach-interface',
    'live_migration': 'operation.live-migrate',
    'pause': 'operation.pause',
    'personality': 'operation.guest.setup.inject.file',
    'rescue': 'operation.rescue',
    'resize': 'operation.resize',
    'serial_console': 'operation.console.serial.interactive',
    'shelve': 'operation.shelve',
    'shelve_migrate': 'operation.migrate',
    'snapshot': 'operation.snapshot',
    'spice_console': 'operation.console.vnc',
    'suspend': 'operation.suspend',
    'swap_volume': 'operation.swap-volume',
    'vnc_console': 'operation.console.vnc',
    'volume_backed_live_migration': 'operation.live-migrate',
    'volume_multiattach': 'operation.multiattach-volume',
    'vtpm_live_migration': 'operation.live-migrate',
}

# Other features that system containers lack.
LIMITS = {
    # Between hosts it depends on both of them.
    'can_migrate_between_any_hosts': False,
    # Its only test logs in with the password, as the user that cloud-init
    # creates; the image accepts keys only, as those of distributions do. It
    # also takes the floating IP of the server of the other tests.
    'change_password': False,
    # Tempest expects a disk that the guest mounts; here it is a directory,
    # which works without that.
    'config_drive': False,
    # Containers have no disk bus.
    'ide_bus': False,
}


def features() -> dict[str, bool]:
    """Return the options of [compute-feature-enabled] by the support matrix.

    :raises KeyError: if the matrix lacks a row.
    """
    matrix = configparser.ConfigParser(interpolation=None)
    matrix.read(MATRIX)
    found = {option: matrix[row]['driver.lxd'] in ('complete', 'partial')
             for option, row in FEATURES.items()}
    # The quickstart cloud has no key manager.
    return {**found, 'attach_encrypted_volume': False}


def skips() -> dict[str, str]:
    """Return regular expressions of excluded tests, each with its reason."""
    entries = yaml.safe_load(SKIPS.read_text()) or []
    return {entry['test']: entry['reason'].strip() for entry in entries}


class Cloud:
    """The tempest configuration of a cloud."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        clouds = yaml.safe_load((PREFIX / 'clouds.yaml').read_text())
        self._auth = clouds['clouds'][ADMIN_CLOUD]['auth']
        self._region = clouds['clouds'][ADMIN_CLOUD]['region_name']
        self._cloud: connection.Connection = openstack.connect(
            auth=self._auth, region_name=self._region,
            load_yaml_config=False, load_envvars=False)

    @property
    def image_file(self) -> pathlib.Path:
        return self._directory / 'image'

    def image(self) -> Any:
        """Return the image with sshd and cloud-init, named like its user."""
        for image in self._cloud.image.images(
                tag='quickstart', sort='created_at:desc'):
            if image.name != 'tiny':
                return image
        sys.exit('The cloud has no image with an SSH server; '
                 'devstack/quickstart.sh up makes one.')

    def second_image(self, image: Any) -> Any:
        """Return a copy of the image, whose content is also left in a file."""
        for old in self._cloud.image.images(name=SECOND_IMAGE):
            self._cloud.image.delete_image(old)
        self._cloud.image.download_image(
            image, output=str(self.image_file), stream=True)
        copy = self._cloud.image.create_image(
            SECOND_IMAGE, disk_format='raw', container_format='bare',
            visibility='public', min_disk=image.min_disk,
            min_ram=image.min_ram, allow_duplicates=True,
            os_distro=image.name, hw_architecture=os.uname().machine)
        with self.image_file.open('rb') as content:
            self._cloud.image.put(
                f'/images/{copy.id}/file', data=content,
                headers={'Content-Type': 'application/octet-stream',
                         'Accept': ''}).raise_for_status()
        return copy

    def remove_second_image(self) -> None:
        for image in self._cloud.image.images(name=SECOND_IMAGE):
            self._cloud.image.delete_image(image)

    def _computes(self) -> int:
        return sum(service.binary == 'nova-compute' and service.state == 'up'
                   for service in self._cloud.compute.services())

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the sections of tempest.conf."""
        image = self.image()
        second = self.second_image(image)
        public = self._cloud.network.find_network(
            'public', ignore_missing=False)
        services = {service.name for service in
                    self._cloud.identity.services()}
        extensions = sorted(extension.alias for extension in
                            self._cloud.network.extensions())
        return {
            'DEFAULT': {
                'log_file': self._directory / 'tempest.log',
            },
            'oslo_concurrency': {
                'lock_path': self._directory / 'locks',
            },
            'auth': {
                'use_dynamic_credentials': True,
                'create_isolated_networks': True,
                'admin_username': self._auth['username'],
                'admin_password': self._auth['password'],
                'admin_project_name': self._auth['project_name'],
                'admin_domain_name': self._auth['user_domain_name'],
            },
            'identity': {
                'uri_v3': self._auth['auth_url'],
                'auth_version': 'v3',
                'region': self._region,
            },
            'identity-feature-enabled': {
                'api_v2': False,
                'api_v2_admin': False,
            },
            'service_available': {
                'cinder': 'cinder' in services,
                'swift': False,
                'horizon': False,
            },
            'compute': {
                'image_ref': image.id,
                'image_ref_alt': second.id,
                # The same with a root disk of twice the size.
                'flavor_ref': 'lxd.tiny',
                'flavor_ref_alt': 'lxd.small',
                'min_compute_nodes': self._computes(),
                'max_microversion': 'latest',
                'build_timeout': 180,
                'hypervisor_type': 'lxd',
                'volume_device_name': VOLUME_DEVICE,
            },
            'compute-feature-enabled': {
                **features(),
                **LIMITS,
                'hostname_fqdn_sanitization': True,
                'nova_policy_roles': 'admin,manager,member,reader',
            },
            'validation': {
                'run_validation': True,
                'connect_method': 'floating',
                'network_for_ssh': public.name,
                'image_ssh_user': image.name,
                'image_alt_ssh_user': image.name,
                'connect_timeout': 10,
                'ssh_timeout': 120,
                'ping_timeout': 60,
            },
            'network': {
                'public_network_id': public.id,
                'floating_network_name': public.name,
                'project_networks_reachable': False,
                'build_timeout': 180,
            },
            'network-feature-enabled': {
                'api_extensions': ','.join(extensions),
                'ipv6': True,
                'ipv6_subnet_attributes': True,
                'port_security': 'port-security' in extensions,
            },
            'volume': {
                'max_microversion': 'latest',
                'build_timeout': 180,
                # Large enough for servers to boot from.
                'volume_size': 2,
                'volume_type_multiattach': 'multiattach',
            },
            'volume-feature-enabled': {
                'backup': False,
                'extend_attached_volume': True,
            },
            'image-feature-enabled': {
                'api_v2': True,
                'import_image': True,
            },
            'lxd': {
                'mounted_volumes': True,
                # Many guests share two CPUs, so stops take longer.
                'longest_pause': 3000,
            },
            'scenario': {
                'img_file': self.image_file,
                'img_disk_format': 'raw',
                'img_container_format': 'bare',
                # Debian empties /tmp when it boots.
                'target_dir': '/var/tmp',
                # systemd-networkd renews leases itself.
                'dhcp_client': '',
            },
        }


def write(directory: pathlib.Path) -> None:
    """Write tempest.conf and the list of excluded tests."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = configparser.ConfigParser(
        interpolation=None, default_section='none')
    for section, options in Cloud(directory).sections().items():
        config[section] = {name: str(value)
                           for name, value in options.items()}
    path = directory / 'tempest.conf'
    with open(path, 'w', encoding='utf-8',
              opener=lambda name, flags: os.open(name, flags, 0o600)) as out:
        config.write(out)
    (directory / 'skips').write_text(exclude_list())


def exclude_list() -> str:
    """Return the list for ``tempest run --exclude-list``."""
    return ''.join(f'{test}  # {" ".join(reason.split())}\n'
                   for test, reason in skips().items())


def print_features() -> None:
    """Print section, option and value of each flag, one a line."""
    for option, value in sorted({**features(), **LIMITS}.items()):
        print('compute-feature-enabled', option, value)
    print('compute', 'volume_device_name', VOLUME_DEVICE)
    print('volume-feature-enabled', 'extend_attached_volume', True)


def main() -> None:
    match sys.argv[1:]:
        case ['write', directory]:
            write(pathlib.Path(directory))
        case ['clean', directory]:
            Cloud(pathlib.Path(directory)).remove_second_image()
        case ['features']:
            print_features()
        case ['skips']:
            sys.stdout.write(exclude_list())
        case _:
            sys.exit('configure.py write|clean DIRECTORY, features, or skips')


if __name__ == '__main__':
    main()
