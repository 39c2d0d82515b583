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

"""The jobs of Zuul."""

from __future__ import annotations

import pathlib
import re

from oslotest import base
import yaml

REPO = pathlib.Path(__file__).resolve().parents[2]


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
