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

"""Adds the cloud's entries to a user's clouds.yaml, or removes them.

``clouds_yaml.py add FILE COPY`` and ``clouds_yaml.py remove FILE``. The file
is edited as text between two marker lines, which keeps comments and order, and
is replaced only if the result parses with all other entries unchanged. COPY is
a file with our entries only.
"""

from __future__ import annotations

import os
import pathlib
import pwd
import sys
from typing import Any

import yaml

BEGIN = '# BEGIN {cloud} quickstart (removed by its purge)'
END = '# END {cloud} quickstart'


def entries() -> dict[str, Any]:
    """Return our entries: the demo user and the administrator."""
    result = {}
    for suffix, user, project in (('', 'demo', 'demo'),
                                  ('-admin', 'admin', 'admin')):
        result[os.environ['QS_CLOUD'] + suffix] = {
            'auth': {
                'auth_url': os.environ['QS_URL_KEYSTONE'] + '/v3',
                'username': user,
                'password': os.environ['QS_SECRET'],
                'project_name': project,
                'user_domain_name': 'Default',
                'project_domain_name': 'Default',
            },
            'region_name': os.environ['QS_REGION'],
            'identity_api_version': 3,
        }
    return result


def without_ours(text: str) -> str:
    """Remove the lines between our markers."""
    cloud = os.environ['QS_CLOUD']
    kept = []
    inside = False
    for line in text.splitlines(keepends=True):
        if line.strip() == BEGIN.format(cloud=cloud):
            inside = True
        elif line.strip() == END.format(cloud=cloud):
            inside = False
        elif not inside:
            kept.append(line)
    return ''.join(kept)


def with_ours(text: str) -> str:
    """Insert our entries below ``clouds:``, indented as the others."""
    cloud = os.environ['QS_CLOUD']
    lines = text.splitlines(keepends=True)
    at = next((number for number, line in enumerate(lines)
               if line.split('#')[0].rstrip() == 'clouds:'), None)
    if at is None:
        if lines and not lines[-1].endswith('\n'):
            lines[-1] += '\n'
        lines.append('clouds:\n')
        at = len(lines) - 1
    indent = 2
    for line in lines[at + 1:]:
        if line.strip() and not line.lstrip().startswith('#'):
            indent = len(line) - len(line.lstrip()) or 2
            break
    margin = ' ' * indent
    block = yaml.safe_dump(entries(), sort_keys=False,
                           default_flow_style=False)
    ours = [margin + BEGIN.format(cloud=cloud) + '\n']
    ours += [margin + line for line in block.splitlines(keepends=True)]
    ours.append(margin + END.format(cloud=cloud) + '\n')
    return ''.join(lines[:at + 1] + ours + lines[at + 1:])


def parse(text: str) -> dict[str, Any]:
    content = yaml.safe_load(text) or {}
    content['clouds'] = dict(content.get('clouds') or {})
    return content


def write(path: pathlib.Path, text: str, owner: pwd.struct_passwd) -> None:
    """Replace a file atomically; new directories belong to its owner."""
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        os.chown(parent, owner.pw_uid, owner.pw_gid)
    # Follows a symbolic link, as dotfile managers make them.
    real = pathlib.Path(os.path.realpath(path))
    mode = 0o600
    if real.exists():
        status = real.stat()
        mode = status.st_mode & 0o777
        owner = pwd.getpwuid(status.st_uid)
    scratch = real.with_name(real.name + '.quickstart')
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, 'w', encoding='utf-8') as target:
        target.write(text)
    os.chmod(scratch, mode)
    os.chown(scratch, owner.pw_uid, owner.pw_gid)
    os.replace(scratch, real)


def add(path: pathlib.Path, copy: pathlib.Path) -> None:
    owner = pwd.getpwnam(os.environ['QS_OWNER'])
    write(copy, yaml.safe_dump({'clouds': entries()}, sort_keys=False), owner)
    old = path.read_text(encoding='utf-8') if path.exists() else ''
    base = without_ours(old)
    before = parse(base)
    new = with_ours(base)
    after = parse(new)
    for name, entry in entries().items():
        if (name in before['clouds'] or
                after['clouds'].pop(name, None) != entry):
            sys.exit(f'{path} cannot take the entry {name}: it has one of '
                     f'this name, or an unusual form. Use '
                     f'OS_CLIENT_CONFIG_FILE={copy} instead.')
    if after != before:
        sys.exit(f'{path} has an unusual form and was left alone. Use '
                 f'OS_CLIENT_CONFIG_FILE={copy} instead.')
    if new != old:
        write(path, new, owner)


def remove(path: pathlib.Path) -> None:
    old = path.read_text(encoding='utf-8')
    new = without_ours(old)
    if new == old:
        return
    if new.strip() in ('', 'clouds:'):
        path.unlink()
        for directory in (path.parent, path.parent.parent):
            try:
                directory.rmdir()
            except OSError:
                break
        return
    write(path, new, pwd.getpwuid(path.stat().st_uid))


def main() -> None:
    command, *paths = sys.argv[1:]
    if command == 'add':
        add(pathlib.Path(paths[0]), pathlib.Path(paths[1]))
    else:
        remove(pathlib.Path(paths[0]))


if __name__ == '__main__':
    main()
