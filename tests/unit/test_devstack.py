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

"""The DevStack plugin: its shell code and what it assumes of DevStack.

devstack/verify.sh proves the whole of it; here is what can be checked in
seconds.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

import fixtures
from oslotest import base
import yaml

REPO = pathlib.Path(__file__).resolve().parents[2]
DEVSTACK = REPO / 'devstack'
SCRIPTS = sorted([
    DEVSTACK / 'settings', DEVSTACK / 'override-defaults',
    *DEVSTACK.glob('*.sh'), *(DEVSTACK / 'plugin').glob('*.sh'),
    *(REPO / 'tools').glob('*.sh')])
SAMPLES = sorted(DEVSTACK.glob('local.conf*.sample'))

# What DevStack has of its own when it reads the files of a plugin.
DEVSTACK_FUNCTIONS = r"""
set -eu
DEST=/opt/stack FILES=$PWD DATA_DIR=$PWD/data STACK_USER=$(id -un)
ENABLED_SERVICES=${ENABLED_SERVICES-key,n-cpu,n-novnc,g-api,tempest}
PLUGINS='' DISABLED=''
define_plugin() { PLUGINS+="$1 "; }
is_service_enabled() {
    local name
    for name; do [[ ,$ENABLED_SERVICES, != *,$name,* ]] || return 0; done
    return 1
}
enable_service() { ENABLED_SERVICES=${ENABLED_SERVICES%,},$1; }
disable_service() {
    local name
    for name; do
        ENABLED_SERVICES=,$ENABLED_SERVICES,
        ENABLED_SERVICES=${ENABLED_SERVICES/,$name,/,}
    done
}
enable_plugin() { PLUGINS+="$* "; }
echo_summary() { echo "$@"; }
die() { shift; echo "$@"; exit 1; }
"""


def run(script: str, *, cwd: pathlib.Path | str = REPO,
        **environment: str) -> str:
    """What a piece of shell code prints.

    :raises subprocess.CalledProcessError: when it fails
    """
    return subprocess.run(
        ['bash', '-c', DEVSTACK_FUNCTIONS + script], check=True, cwd=cwd,
        env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', **environment},
        stdout=subprocess.PIPE, text=True).stdout.strip()


class _Files(fixtures.Fixture):
    """A temporary directory, as a path."""

    def _setUp(self) -> None:
        self.path = pathlib.Path(self.useFixture(fixtures.TempDir()).path)


class ScriptsTestCase(base.BaseTestCase):
    """Shell code that nothing else runs in the unit tests."""

    def test_syntax(self):
        for script in SCRIPTS:
            subprocess.run(['bash', '-n', script], check=True)


class SettingsTestCase(base.BaseTestCase):
    """devstack/settings and devstack/override-defaults."""

    def read(self, script: str, **environment: str) -> str:
        return run(f'. {DEVSTACK}/override-defaults\n'
                   f'. {DEVSTACK}/settings\n{script}', **environment)

    def test_plugin_has_the_name_under_which_it_is_enabled(self):
        self.assertEqual('nova-lxd-py', self.read('echo $PLUGINS'))

    def test_clean_reads_settings_alone(self):
        self.assertEqual('lxd nova', run(
            f'. {DEVSTACK}/settings\necho $VIRT_DRIVER $NOVA_LXD_POOL'))

    def test_serial_console_takes_the_place_of_vnc(self):
        self.assertEqual('key,n-cpu,g-api,tempest,n-sproxy', self.read(
            'echo $ENABLED_SERVICES').strip(','))

    def test_no_proxy_where_there_was_none(self):
        self.assertEqual('n-cpu', self.read(
            'echo $ENABLED_SERVICES', ENABLED_SERVICES='n-cpu'))

    def test_settings_of_local_conf_win(self):
        self.assertEqual('fast zfs mine', self.read(
            'echo $NOVA_LXD_POOL $NOVA_LXD_POOL_DRIVER $DEFAULT_IMAGE_NAME',
            NOVA_LXD_POOL='fast', NOVA_LXD_POOL_DRIVER='zfs',
            DEFAULT_IMAGE_NAME='mine'))

    def test_image_of_a_virtual_machine_is_not_downloaded(self):
        file = 'cirros-0.6.3-x86_64-disk.img'
        images = self.read(
            'echo "$IMAGE_URLS $DEFAULT_IMAGE_NAME"',
            IMAGE_URLS=f'https://example.org/own.qcow2,'
                       f'https://example.org/{file}',
            DEFAULT_IMAGE_NAME=file.removesuffix('.img'),
            DEFAULT_IMAGE_FILE_NAME=file)
        self.assertNotIn('cirros', images)
        self.assertIn('https://example.org/own.qcow2 ', images)

    def test_image_from_elsewhere(self):
        self.assertEqual('alpine-3.20 alpine-3.20.tar.xz', self.read(
            'echo $DEFAULT_IMAGE_NAME $DEFAULT_IMAGE_FILE_NAME',
            NOVA_LXD_IMAGE='https://example.org/alpine-3.20.tar.xz'))


class PluginTestCase(base.BaseTestCase):
    """devstack/plugin.sh."""

    def phase(self, *arguments: str, services: str = '') -> str:
        """The functions that a phase calls, by their names."""
        calls = '\n'.join(
            f'{name}() {{ echo {name}; }}' for name in (
                'install_nova_lxd_daemon', 'install_nova_lxd_driver',
                'create_nova_lxd_pool', 'configure_nova_lxd',
                'load_nova_lxd_metadefs', 'upload_nova_lxd_image',
                'configure_nova_lxd_tempest', 'remove_nova_lxd_servers',
                'remove_nova_lxd_daemon', 'remove_nova_lxd_image'))
        plugin = (DEVSTACK / 'plugin.sh').read_text().replace(
            'function nova_lxd_stack', f'{calls}\nfunction nova_lxd_stack')
        # Arguments of "." are those of the script, as with DevStack.
        return run(
            f'. {DEVSTACK}/settings\n'
            f'DATABASE_BACKENDS=mysql\n'
            f'echo_summary() {{ :; }}\n'
            f'set -- {" ".join(arguments)}\n{plugin}',
            ENABLED_SERVICES=services)

    def test_first_machine(self):
        services = 'mysql,g-api,n-cpu,tempest'
        for phase, calls in {
                'pre-install': 'install_nova_lxd_daemon',
                'install': 'install_nova_lxd_driver',
                'post-config': 'create_nova_lxd_pool\nconfigure_nova_lxd\n'
                               'load_nova_lxd_metadefs',
                'extra': 'upload_nova_lxd_image',
                'test-config': 'configure_nova_lxd_tempest'}.items():
            self.assertEqual(
                calls, self.phase('stack', phase, services=services), phase)
        self.assertEqual('remove_nova_lxd_servers',
                         self.phase('unstack', services=services))
        self.assertEqual('remove_nova_lxd_daemon\nremove_nova_lxd_image',
                         self.phase('clean', services=services))

    def test_further_machine_makes_no_images(self):
        self.assertEqual('', self.phase('stack', 'extra', services='n-cpu'))
        self.assertEqual('', self.phase(
            'stack', 'test-config', services='n-cpu'))

    def test_controller_has_no_lxd(self):
        services = 'mysql,g-api,n-api'
        for phase in 'pre-install', 'test-config':
            self.assertEqual('', self.phase('stack', phase,
                                            services=services))
        # For the validation of extra specs.
        self.assertEqual('install_nova_lxd_driver', self.phase(
            'stack', 'install', services=services))
        self.assertEqual('', self.phase('stack', 'install',
                                        services='mysql,g-api'))

    def test_subordinate_ids(self):
        """No line is needed twice, and none of the others is taken."""
        files = self.useFixture(_Files())
        functions = (DEVSTACK / 'plugin' / 'lxd.sh').read_text().replace(
            '/etc/sub', f'{files.path}/sub')
        (files.path / 'subuid').write_text('stack:100000:65536\n')
        (files.path / 'subgid').write_text('root:5:7000000\n')
        script = (f'. {DEVSTACK}/settings\nNOVA_LXD_STATE=$PWD/state\n'
                  f'{functions}\nsudo() {{ "$@"; }}\n'
                  'restart_nova_lxd() { :; }\nNOVA_LXD_KIND=package\n'
                  'add_nova_lxd_subordinate_ids\n')
        for _ in range(2):
            run(script, cwd=files.path)
            self.assertEqual(
                'root:1000000:1000000000\nstack:100000:65536\n',
                (files.path / 'subuid').read_text())
            self.assertEqual('root:5:7000000\n',
                             (files.path / 'subgid').read_text())
        self.assertEqual('root:1000000:1000000000\n',
                         (files.path / 'state' / 'subuid.own').read_text())

    def test_clean_takes_back_the_lines_that_came_with_lxd(self):
        files = self.useFixture(_Files())
        functions = (DEVSTACK / 'plugin' / 'lxd.sh').read_text().replace(
            '/etc/', f'{files.path}/')
        for name in 'subuid', 'subgid':
            (files.path / name).write_text('stack:100000:65536\n')
        run(f'. {DEVSTACK}/settings\nNOVA_LXD_STATE=$PWD/state\n'
            f'{functions}\nsudo() {{ "$@"; }}\n'
            'restart_nova_lxd() { :; }\nfind_nova_lxd_daemon() { return 1; }\n'
            'uninstall_package() { :; }\nNOVA_LXD_KIND=none\n'
            'install_package() {\n'
            f'    echo root:165536:65536 | tee -a {files.path}/subuid\n}}\n'
            'install_nova_lxd_packages lxd\nadd_nova_lxd_subordinate_ids\n'
            f'grep -q ^root:1000000: {files.path}/subuid\n'
            f'grep -q ^root:1000000: {files.path}/subgid\n'
            'remove_nova_lxd_daemon', cwd=files.path)
        for name in 'subuid', 'subgid':
            self.assertEqual('stack:100000:65536\n',
                             (files.path / name).read_text())
        self.assertFalse((files.path / 'state').exists())


class UdevRuleTestCase(base.BaseTestCase):
    """tools/udev_rule.sh."""

    def setUp(self) -> None:
        super().setUp()
        self.root = self.useFixture(_Files()).path
        self.target = self.root / 'etc/udev/rules.d/62-nova-lxd-py.rules'
        self.touch('run/udev/control')

    def touch(self, path: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def rule(self, command: str) -> str:
        return subprocess.run(
            [REPO / 'tools' / 'udev_rule.sh', command, self.root / 'stamp'],
            check=True, text=True, stdout=subprocess.PIPE,
            env={**os.environ, 'UDEV_RULE_ROOT': str(self.root)}).stdout

    def test_there_and_back(self):
        for _ in range(2):
            self.rule('install')
            self.assertIn('GOTO', self.target.read_text())
            # A volume that is attached by now is no disk of the host.
            self.touch('dev/disk/by-path/ip-192.0.2.1-iscsi-iqn.x-lun-1')
        for _ in range(2):
            self.rule('remove')
            self.assertFalse(self.target.exists())

    def test_rule_of_the_operator_stays(self):
        self.touch('etc/udev/rules.d/62-nova-lxd-py.rules')
        self.rule('install')
        self.rule('remove')
        self.assertEqual('', self.target.read_text())

    def test_disks_over_a_network(self):
        self.touch('dev/disk/by-path/pci-0000:05:00.0-fc-0x50-lun-0')
        self.assertIn('was not installed', self.rule('install'))
        self.assertFalse(self.target.exists())

    def test_host_without_udev(self):
        (self.root / 'run/udev/control').unlink()
        self.rule('install')
        self.assertFalse(self.target.exists())


class KernelLimitsTestCase(base.BaseTestCase):
    """tools/kernel_limits.sh."""

    INSTANCES = 'fs.inotify.max_user_instances'
    KEYS = 'kernel.keys.maxkeys'
    FILES = 'fs.file-max'

    def setUp(self) -> None:
        super().setUp()
        self.root = self.useFixture(_Files()).path
        self.set(self.INSTANCES, 128)
        self.set(self.KEYS, 200)
        # systemd sets it at boot.
        self.set(self.FILES, 2 ** 63 - 1)

    def file(self, name: str) -> pathlib.Path:
        return self.root / 'proc/sys' / name.replace('.', '/')

    def set(self, name: str, value: int) -> None:
        self.file(name).parent.mkdir(parents=True, exist_ok=True)
        self.file(name).write_text(f'{value}\n')

    def get(self, name: str) -> int:
        return int(self.file(name).read_text())

    def limits(self, command: str) -> str:
        return subprocess.run(
            [REPO / 'tools' / 'kernel_limits.sh', command,
             self.root / 'undo' / 'record'],
            check=True, text=True, stdout=subprocess.PIPE,
            env={**os.environ, 'KERNEL_LIMITS_ROOT': str(self.root)}).stdout

    def test_there_and_back(self):
        for _ in range(2):
            self.limits('raise')
            self.assertEqual(1048576, self.get(self.INSTANCES))
            self.assertEqual(20000, self.get(self.KEYS))
        for _ in range(2):
            self.limits('restore')
            self.assertEqual(128, self.get(self.INSTANCES))
            self.assertEqual(200, self.get(self.KEYS))
        self.assertEqual(2 ** 63 - 1, self.get(self.FILES))

    def test_after_a_reboot(self):
        self.limits('raise')
        self.set(self.INSTANCES, 256)
        self.limits('raise')
        self.assertEqual(1048576, self.get(self.INSTANCES))
        self.limits('restore')
        self.assertEqual(128, self.get(self.INSTANCES))
        self.limits('raise')
        self.set(self.INSTANCES, 128)
        self.limits('restore')
        self.assertEqual(128, self.get(self.INSTANCES))

    def test_value_of_the_operator_stays(self):
        self.limits('raise')
        self.set(self.INSTANCES, 4096)
        self.set(self.KEYS, 30000)
        self.limits('restore')
        self.assertEqual(4096, self.get(self.INSTANCES))
        self.assertEqual(30000, self.get(self.KEYS))

    def test_higher_values_stay(self):
        self.set(self.INSTANCES, 2097152)
        self.limits('raise')
        self.assertEqual(2097152, self.get(self.INSTANCES))

    def test_limits_that_cannot_be_changed(self):
        """The kernel of a sandbox ignores the change; others are missing."""
        self.file(self.INSTANCES).unlink()
        self.file(self.INSTANCES).symlink_to('/dev/null')
        # Reads as nothing, which counts as 0.
        said = self.limits('raise')
        self.assertRegex(said, f'cannot be raised here: {self.INSTANCES}=')
        self.assertRegex(said, 'do not exist here:.* vm.max_map_count')
        self.assertNotIn(self.KEYS, said)
        self.assertEqual(20000, self.get(self.KEYS))
        self.limits('restore')
        self.assertEqual(200, self.get(self.KEYS))


class ImageTestCase(base.BaseTestCase):
    """devstack/plugin/image.sh."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.useFixture(_Files()).path
        (self.path / 'files').mkdir()
        self.source = self.path / 'mine.squashfs'
        self.source.write_text('new')
        self.file = self.path / 'files' / 'mine.squashfs'

    def image(self, command: str) -> None:
        run(f'FILES=$PWD/files\n. {DEVSTACK}/override-defaults\n'
            f'. {DEVSTACK}/settings\n. {DEVSTACK}/plugin/image.sh\n'
            f'{command}', cwd=self.path, NOVA_LXD_IMAGE=str(self.source))

    def test_taken_away_again(self):
        for _ in range(2):
            self.image('get_nova_lxd_image')
            self.assertEqual('new', self.file.read_text())
        self.image('remove_nova_lxd_image')
        self.assertEqual([], list((self.path / 'files').iterdir()))
        self.assertTrue(self.source.exists())
        self.image('remove_nova_lxd_image')

    def test_one_that_was_there_stays(self):
        self.file.write_text('old')
        self.image('get_nova_lxd_image')
        self.image('remove_nova_lxd_image')
        self.assertEqual('old', self.file.read_text())

    def test_half_a_copy_is_none(self):
        self.assertRaises(
            subprocess.CalledProcessError, self.image,
            'cp() { echo half >"$2"; return 1; }\nget_nova_lxd_image')
        self.assertFalse(self.file.exists())
        self.image('get_nova_lxd_image')
        self.assertEqual('new', self.file.read_text())


class LoopDevicesTestCase(base.BaseTestCase):
    """Loop devices, as far as they are the driver's, go with the rest."""

    #: Stands for losetup: notes what it is to detach.
    LOSETUP = r"""
sudo() { "$@"; }
losetup() {
    if [[ $1 == --detach ]]; then
        echo "$2"
    else
        local name=NAME,BACK-FILE row
        for row; do [[ $row != NAME,BACK-INO,* ]] || name=$row; done
        if [[ $name == NAME,BACK-INO,* ]]; then
            cat "$PWD/loops"
        else
            sed -E 's/^([^ ]+) [0-9]+ /\1 /' "$PWD/loops"
        fi
    fi
}
"""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.useFixture(_Files()).path
        drive = 'config-drives/config-drive-x (deleted)'
        (self.path / 'loops').write_text(
            f'/dev/loop1 7 {self.path}/data/nova/{drive}\n'
            f'/dev/loop2 8 /elsewhere/data/nova/{drive}\n'
            f'/dev/loop3 9 /var/lib/other.img\n'
            f'/dev/loop4 9 {self.path}/data/other (deleted)\n')

    def test_devstack(self):
        self.assertEqual('/dev/loop1', run(
            f'{self.LOSETUP}\n. {DEVSTACK}/plugin/lxd.sh\n'
            'NOVA_STATE_PATH=$PWD/data/nova\ndetach_nova_lxd_loops',
            cwd=self.path))

    def quickstart(self, namespace: str) -> list[str]:
        return run(
            f'{self.LOSETUP}\n. {DEVSTACK}/quickstart/down.sh\n'
            f"readlink() {{ echo '{namespace}'; }}\n"
            'PREFIX=$PWD DATA=$PWD/data\ndetach_loops',
            cwd=self.path).split()

    def test_quickstart(self):
        disk = self.path / 'disk'
        disk.write_text('')
        with (self.path / 'loops').open('a') as loops:
            loops.write(f'/dev/loop5 {disk.stat().st_ino} {disk}\n'
                        f'/dev/loop6 {disk.stat().st_ino + 1} {disk}\n')
        self.assertEqual(['/dev/loop1', '/dev/loop5'],
                         self.quickstart('pid:[4026531836]'))
        # What it cannot tell from its host's is none of a container's.
        self.assertEqual(['/dev/loop5'], self.quickstart('pid:[4026532222]'))


class QuickstartNetworkTestCase(base.BaseTestCase):
    """devstack/quickstart/settings.sh: the private network."""

    def test_aligned(self):
        for numbers, network in (('', '10.24.0.0/20'),
                                 # Saved by clouds of earlier versions.
                                 ('10.24.4', '10.24.0.0/20'),
                                 ('192.168.255', '192.168.240.0/20')):
            self.assertEqual(network, run(
                f'. {DEVSTACK}/quickstart/settings.sh\necho $PRIVATE_CIDR',
                QUICKSTART_PREFIX='/nonexistent',
                QUICKSTART_PRIVATE_NET=numbers))


class SecondHostTestCase(base.BaseTestCase):
    """devstack/quickstart/second_host.sh."""

    def setUp(self) -> None:
        super().setUp()
        self.prefix = self.useFixture(_Files()).path

    def quickstart(self, script: str, **environment: str) -> str:
        """What a piece of shell code prints with the quickstart's parts."""
        parts = ' '.join(re.search(  # type: ignore[union-attr]
            r'for part in ([^;]*);', (DEVSTACK / 'quickstart.sh').read_text()
        )[1].replace('\\', ' ').split())
        return run(f'HERE={DEVSTACK}/quickstart REPO={REPO} SELF=up.sh\n'
                   f'for part in {parts}; do\n. $HERE/$part.sh\ndone\n'
                   f'{script}',
                   QUICKSTART_PREFIX=str(self.prefix), **environment)

    def steps(self, script: str) -> list[str]:
        return self.quickstart(
            f'{script} GUEST_IMAGE=debian\n'
            'declare_steps\nprintf "%s\\n" "${STEP_ORDER[@]}"\n'
            'for name in "${STEP_ORDER[@]}"; do\n'
            '    declare -F "step_${name//-/_}" >/dev/null\n'
            '    for need in ${STEP_NEEDS[$name]}; do\n'
            '        [[ " ${STEP_ORDER[*]} " == *" $need "* ||\n'
            '            $need == cinder-volume ]]\n'
            '    done\ndone').split()

    def test_one_host_takes_no_more_steps(self):
        one = self.steps('COMPUTES=1')
        self.assertFalse([name for name in one if 'second' in name or
                          'compute-2' in name])
        two = self.steps('COMPUTES=2')
        self.assertEqual(one, [name for name in two if name in one])
        self.assertIn('second-nova-compute', two)
        # It is taken away when there is one.
        (self.prefix / 'compute-2').mkdir()
        self.assertEqual({'second-removal'},
                         set(self.steps('COMPUTES=1')) - set(one))

    def test_paths(self):
        """What belongs to a host differs, what belongs to the cloud not."""
        script = 'printf "%s\\n" '
        own = '$LXD_HOME $ETC $LOG $RUN $DATA $OVS_RUN $OVSDB'
        first = self.quickstart(script + own).split()
        second = self.quickstart(script + own,
                                 QUICKSTART_HOST_NUMBER='2').split()
        for before, after in zip(first, second, strict=True):
            self.assertEqual(before.replace(
                str(self.prefix), f'{self.prefix}/compute-2'), after)
        common = '$VENV $CACHE $MYSQL_SOCKET $OVN_DB $SECRET_FILE'
        self.assertEqual(
            self.quickstart(script + common),
            self.quickstart(script + common, QUICKSTART_HOST_NUMBER='2'))

    def test_addresses(self):
        address = 'host_address'
        self.assertEqual('127.0.0.1', self.quickstart(address))
        self.assertEqual('172.24.4.1',
                         self.quickstart(f'COMPUTES=2\n{address}'))
        self.assertEqual('172.24.4.2', self.quickstart(
            f'COMPUTES=2\n{address}', QUICKSTART_HOST_NUMBER='2'))

    def test_cloud_that_is_down(self):
        """Nobody knows whether the second host has servers."""
        script = 'COMPUTES=1\ncheck_second_host_unused'
        self.assertEqual('', self.quickstart(script))
        (self.prefix / 'compute-2').mkdir()
        error = self.assertRaises(subprocess.CalledProcessError,
                                  self.quickstart, script)
        self.assertIn('up.sh up --computes 2', error.stdout)


class SamplesTestCase(base.BaseTestCase):
    """devstack/local.conf*.sample."""

    def sections(self, path: pathlib.Path) -> dict[str, str]:
        """Sections of a local.conf, the way DevStack splits it."""
        sections: dict[str, str] = {}
        name = ''
        for line in path.read_text().splitlines():
            if line.startswith('[[') and line.endswith(']]'):
                name = line[2:-2]
                sections[name] = ''
            elif name:
                sections[name] += line + '\n'
        return sections

    def test_they_can_be_read(self):
        self.assertEqual(2, len(SAMPLES))
        for path in SAMPLES:
            localrc = self.sections(path)['local|localrc']
            words = run(f'{localrc}\necho $VIRT_DRIVER $PLUGINS').split()
            self.assertEqual(['lxd', 'nova-lxd-py'], words[:2])

    def test_defaults_are_those_of_the_settings(self):
        """Lines that are commented out say what holds without them."""
        shown = [line.lstrip('#') for line in
                 (DEVSTACK / 'local.conf.sample').read_text().splitlines()
                 if line.startswith('#NOVA_LXD_')]
        self.assertGreater(len(shown), 6)
        for line in shown:
            name, _, value = line.partition('=')
            self.assertEqual(value, run(
                f'. {DEVSTACK}/override-defaults\n. {DEVSTACK}/settings\n'
                f'echo "${name}"'), name)


class JobsTestCase(base.BaseTestCase):
    """zuul.d: what it refers to exists."""

    #: Jobs and templates of OpenDev's own projects.
    ELSEWHERE = {'base', 'devstack-tempest', 'openstack-tox',
                 'openstack-tox-pep8', 'openstack-tox-py311',
                 'openstack-tox-py312', 'openstack-tox-py313'}

    def setUp(self) -> None:
        super().setUp()
        directory = REPO / 'zuul.d'
        self.jobs = {
            entry['job']['name']: entry['job'] for entry in
            yaml.safe_load((directory / 'jobs.yaml').read_text())}
        self.project = yaml.safe_load(
            (directory / 'project.yaml').read_text())[0]['project']

    def test_only_one_configuration(self):
        """Zuul reads the first that it finds and ignores the others."""
        self.assertEqual(['zuul.d'], sorted(
            path.name for path in REPO.iterdir() if path.name in (
                'zuul.yaml', '.zuul.yaml', 'zuul.d', '.zuul.d')))

    def test_every_job_exists_and_is_used(self):
        used = {job for pipeline in self.project.values()
                if isinstance(pipeline, dict) for job in pipeline['jobs']}
        parents = {job['parent'] for job in self.jobs.values()}
        self.assertEqual(set(), (used | parents) - set(self.jobs) -
                         self.ELSEWHERE)
        self.assertEqual(set(), set(self.jobs) - used - parents)

    def test_what_they_name_exists(self):
        environments = (REPO / 'tox.ini').read_text()
        stages = re.search(r'readonly -a STAGES=\(([^)]*)\)',
                           (REPO / 'run_tests.sh').read_text())
        assert stages
        playbooks = set()
        for job in self.jobs.values():
            names = job.get('vars', {})
            re.compile(names.get('tempest_test_regex', ''))
            if job['parent'] == 'openstack-tox':
                self.assertIn(f'[testenv:{names["tox_envlist"]}]',
                              environments)
            if 'run' in job:
                playbooks.add(REPO / job['run'])
                self.assertIn(names['run_tests_stage'],
                              stages[1].split(), job['name'])
        self.assertEqual(set((REPO / 'playbooks').iterdir()), playbooks)

    def test_playbooks_run_scripts_of_this_repository(self):
        for path in (REPO / 'playbooks').iterdir():
            for play in yaml.safe_load(path.read_text()):
                for task in play['tasks']:
                    program = task['command'].split()[0]
                    self.assertTrue((REPO / program).exists(), program)
