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

import pathlib
import subprocess

from oslotest import base

from tests.fixtures.devstack_shell import DEVSTACK
from tests.fixtures.devstack_shell import Files
from tests.fixtures.devstack_shell import REPO
from tests.fixtures.devstack_shell import run

SCRIPTS = sorted([
    DEVSTACK / 'settings', DEVSTACK / 'override-defaults',
    *DEVSTACK.glob('*.sh'), *(DEVSTACK / 'plugin').glob('*.sh'),
    *(REPO / 'tools').glob('*.sh')])
SAMPLES = sorted(DEVSTACK.glob('local.conf*.sample'))


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
        """List the functions that a phase calls."""
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
        files = self.useFixture(Files())
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
        files = self.useFixture(Files())
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


class ImageTestCase(base.BaseTestCase):
    """devstack/plugin/image.sh."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.useFixture(Files()).path
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
        self.path = self.useFixture(Files()).path
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
