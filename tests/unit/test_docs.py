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

"""The documentation is complete, and all that it names exists."""

from __future__ import annotations

import ast
import configparser
import functools
import importlib
import importlib.util
import json
import pathlib
import re

from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py import extra_specs
from nova_lxd_py.virt import driver

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / 'doc' / 'source'
PACKAGE = ROOT / 'nova_lxd_py'
MATRIX = SOURCE / 'support-matrix.ini'
DOCUMENTS = [*sorted(SOURCE.rglob('*.rst')), MATRIX,
             *sorted(ROOT.glob('*.rst'))]
NOTES = sorted((ROOT / 'releasenotes' / 'notes').glob('*.yaml'))


def _text(path):
    """Read a document whose names may be broken across lines."""
    return re.sub(r'\s+', ' ', path.read_text(encoding='utf-8'))


def _named(pattern, paths):
    """List what a pattern finds in documents.

    :returns: pairs of a document and a match.
    """
    return [(path.relative_to(ROOT), match) for path in paths
            for match in re.findall(pattern, _text(path))]


def _strings(pattern):
    """Collect string literals of the driver's code that match a pattern."""
    found = set()
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.Constant) and isinstance(
                    node.value, str) and re.fullmatch(pattern, node.value):
                found.add(node.value)
    return found


@functools.cache
def _tree(path):
    return ast.parse(path.read_text(encoding='utf-8'))


class NamedTestsTestCase(base.BaseTestCase):
    """Tests in the support matrix and in documents."""

    def test_exist(self):
        named = _named(r'\btests\.(?:unit|functional|cloud|packaging)'
                       r'[\w.]*\w', DOCUMENTS)
        self.assertGreater(len(named), 80)
        for document, name in named:
            self.assertTrue(self._exists(name), f'{document}: {name}')

    def test_files_exist(self):
        named = _named(
            r'(?<![\w/.-])(?:tests|tools|devstack|benchmarks|etc|doc)/'
            r'[\w./-]*\w', DOCUMENTS)
        self.assertGreater(len(named), 20)
        for document, name in named:
            if name.startswith('doc/build/'):
                continue
            found = list(ROOT.glob(name + '*'))
            # It names files of DevStack and tempest as well.
            if not found and str(document).endswith('devstack.rst'):
                continue
            self.assertTrue(found, f'{document}: {name}')

    def _exists(self, name):
        # Tests that need root or a cloud cannot be imported everywhere.
        words = name.split('.')
        for count in range(len(words), 0, -1):
            file = ROOT.joinpath(*words[:count]).with_suffix('.py')
            if file.is_file():
                rest = words[count:]
                return not rest or self._has(file, *rest)
            if ROOT.joinpath(*words[:count]).is_dir():
                return count == len(words)
        return False

    def _has(self, file, cls, method=None):
        classes = {node.name: node for node in _tree(file).body
                   if isinstance(node, ast.ClassDef)}
        if method is None:
            # A class from which no test is derived proves nothing.
            return cls in classes and any(
                self._methods(file, classes, name, set()) and (
                    name == cls or self._derives(classes, name, cls))
                for name in classes)
        return method in self._methods(file, classes, cls, set())

    def _derives(self, classes, name, ancestor):
        bases = [base.id for base in classes[name].bases
                 if isinstance(base, ast.Name) and base.id in classes]
        return ancestor in bases or any(
            self._derives(classes, base, ancestor) for base in bases)

    def _methods(self, file, classes, name, seen):
        if name not in classes or name in seen:
            return set()
        node = classes[name]
        found = {each.name for each in node.body
                 if isinstance(each, ast.FunctionDef)}
        found |= {target.id for each in node.body
                  if isinstance(each, ast.Assign)
                  for target in each.targets if isinstance(target, ast.Name)}
        found = {each for each in found if each.startswith('test')}
        for parent in node.bases:
            if isinstance(parent, ast.Name):
                found |= self._methods(file, classes, parent.id, seen | {name})
        if not found and any(not isinstance(parent, ast.Name)
                             for parent in node.bases):
            # Its tests are those of a class of Nova's.
            found = {'test'}
        return found


class SupportMatrixTestCase(base.BaseTestCase):
    """doc/source/support-matrix.ini."""

    def setUp(self):
        super().setUp()
        self.matrix = configparser.ConfigParser(interpolation=None)
        self.matrix.read(MATRIX)
        self.operations = [name for name in self.matrix.sections()
                           if name.startswith('operation.')]

    def test_rows_name_tests(self):
        self.assertGreater(len(self.operations), 30)
        for name in self.operations:
            section = self.matrix[name]
            if section['driver.lxd'] in ('complete', 'partial'):
                self.assertRegex(section.get('driver-notes.lxd', ''),
                                 r'\btests\.', f'{name} names no test')

    def test_capabilities_agree(self):
        """The driver's capabilities are those of the support matrix."""
        capabilities = driver.LXDDriver.capabilities
        for operation, capability in (
                ('operation.attach-interface', 'supports_attach_interface'),
                ('operation.extend-volume', 'supports_extend_volume'),
                ('operation.attach-tagged-interface',
                 'supports_tagged_attach_interface'),
                ('operation.device-tags', 'supports_device_tagging'),
                ('operation.attach-tagged-volume',
                 'supports_tagged_attach_volume'),
                ('operation.multiattach-volume', 'supports_multiattach'),
                ('operation.trusted-certs', 'supports_trusted_certs')):
            self.assertEqual(
                self.matrix[operation]['driver.lxd'] != 'missing',
                bool(capabilities.get(capability)), operation)
        # Nova has no capability for it.
        self.assertEqual(
            self.matrix['operation.swap-volume']['driver.lxd'] != 'missing',
            'swap_volume' in vars(driver.LXDDriver))


class NamedModulesTestCase(base.BaseTestCase):
    """Modules, classes and functions of the driver in documents."""

    def test_exist(self):
        named = _named(r'\bnova_lxd_py(?:\.\w+)+', DOCUMENTS)
        self.assertGreater(len(named), 20)
        for document, name in named:
            # Entry point groups and a file beside the package.
            if name in ('nova_lxd_py.vif', 'nova_lxd_py.volume',
                        'nova_lxd_py.pth'):
                continue
            self.assertTrue(self._resolves(name), f'{document}: {name}')

    def test_packages_are_drawn(self):
        drawing = (SOURCE / 'images' / 'layers.txt').read_text()
        drawn = set(re.findall(r'^box \w+ .*? "(\w+)"', drawing, re.M))
        self.assertEqual(
            {path.stem for path in (PACKAGE / 'virt').iterdir()
             if path.name not in ('__init__.py', '__pycache__')}, drawn)

    def test_modules_in_sequences_exist(self):
        for path in (SOURCE / 'images').glob('*.txt'):
            for name in re.findall(r'^actor \w+ "([a-z]+\.\w+)"',
                                   path.read_text(), re.M):
                self.assertTrue(self._resolves('nova_lxd_py.virt.' + name),
                                f'{path.name}: {name}')

    def _resolves(self, name):
        words = name.split('.')
        found = importlib.import_module(words[0])
        for count, word in enumerate(words[1:], 2):
            if not hasattr(found, word):
                if importlib.util.find_spec('.'.join(words[:count])) is None:
                    return False
                importlib.import_module('.'.join(words[:count]))
            found = getattr(found, word)
        return True


class OptionsTestCase(base.BaseTestCase):
    """Options of the ``[lxd]`` group."""

    def test_named_ones_exist(self):
        known = {option.dest for option in conf.ALL_OPTS}
        # Release notes name options that have been removed, too.
        named = _named(r'\[lxd\] (\w+)', DOCUMENTS)
        self.assertGreater(len(named), 20)
        for document, name in named:
            self.assertIn(name, known, str(document))

    def test_all_are_documented(self):
        self.assertIn('.. show-options:: nova_lxd_py',
                      _text(SOURCE / 'configuration' / 'index.rst'))
        for option in conf.ALL_OPTS:
            self.assertTrue((option.help or '').strip(), option.name)


class ExtraSpecsTestCase(base.BaseTestCase):
    """Extra specs of the ``lxd:`` namespace."""

    def test_named_ones_exist(self):
        named = _named(r'\blxd:\w+', [*DOCUMENTS, *NOTES])
        for document, name in named:
            self.assertIn(name, extra_specs.EXTRA_SPECS, str(document))

    def test_all_are_documented(self):
        text = _text(SOURCE / 'configuration' / 'extra-specs.rst')
        for spec in {*extra_specs.EXTRA_SPECS, *_strings(r'lxd:\w+')}:
            self.assertIn(f'``{spec}``', text)

    def test_strings_of_the_driver_are_in_the_table(self):
        self.assertEqual(set(extra_specs.EXTRA_SPECS), _strings(r'lxd:\w+'))

    def test_metadefs_are_those_of_the_table(self):
        definitions = json.loads(
            (ROOT / 'etc' / 'metadefs' / 'compute-lxd-flavor.json')
            .read_text())['properties']
        self.assertEqual(set(extra_specs.EXTRA_SPECS), set(definitions))
        for name, spec in extra_specs.EXTRA_SPECS.items():
            found = definitions[name]
            choices = (['true', 'false'] if spec.type is bool
                       else list(spec.choices))
            self.assertEqual(
                (spec.description, 'integer' if spec.type is int else 'string',
                 spec.minimum, spec.maximum, choices),
                (found['description'], found['type'], found.get('minimum'),
                 found.get('maximum'), found.get('enum', [])), name)


class InstanceKeysTestCase(base.BaseTestCase):
    """Keys on LXD's objects."""

    def test_are_documented(self):
        text = _text(SOURCE / 'reference' / 'instance-keys.rst')
        self.assertEqual(_strings(r'user\.nova\.\w+'),
                         set(re.findall(r'``(user\.nova\.\w+)``', text)))


class PrivilegedTestCase(base.BaseTestCase):
    """Functions that run as root."""

    def test_are_documented(self):
        text = (SOURCE / 'reference' / 'privileged.rst').read_text()
        sections = re.split(r'^nova_lxd_py\.virt\.privileged\.(\w+)\n-+\n',
                            text, flags=re.M)[1:]
        documented = {
            module: set(re.findall(r'``(\w+)``', ' '.join(re.findall(
                r'^   \* - (.*)', section, re.M))))
            for module, section in zip(sections[::2], sections[1::2])}
        found = {}
        for path in (PACKAGE / 'virt' / 'privileged').glob('*.py'):
            names = {node.name for node in _tree(path).body
                     if isinstance(node, ast.FunctionDef) and any(
                         'entrypoint' in ast.unparse(each)
                         for each in node.decorator_list)}
            if names:
                found[path.stem] = names
        self.assertGreater(len(found), 5)
        self.assertEqual(found, documented)

    def test_capabilities_are_documented(self):
        text = _text(SOURCE / 'reference' / 'privileged.rst')
        for path in (PACKAGE / 'virt' / 'privileged').glob('*.py'):
            for name in re.findall(r'capabilities\.(CAP_\w+)',
                                   path.read_text(encoding='utf-8')):
                self.assertIn(f'``{name}``', text)


class DiagramsTestCase(base.BaseTestCase):
    """doc/source/images."""

    def test_are_current(self):
        spec = importlib.util.spec_from_file_location(
            'draw_diagrams', ROOT / 'tools' / 'draw_diagrams.py')
        drawing = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(drawing)
        texts = sorted((SOURCE / 'images').glob('*.txt'))
        self.assertGreater(len(texts), 3)
        for path in texts:
            self.assertEqual(
                drawing.draw(path.read_text(encoding='utf-8')),
                path.with_suffix('.svg').read_text(encoding='utf-8'),
                f'{path.name} has changed: run tools/draw_diagrams.py')
