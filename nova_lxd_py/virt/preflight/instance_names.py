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

"""Check of Nova's template for the names of instances."""

from __future__ import annotations

import re

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.guest import roles

#: Names that LXD accepts for instances, which are DNS host names.
_LXD_NAME = re.compile(r'[A-Za-z](?:[A-Za-z0-9-]*[A-Za-z0-9])?')
#: LXD takes 63 characters, the suffix of a snapshot's instance included.
_LONGEST_NAME = 63 - len(roles.LONGEST_SUFFIX)
#: Fields of an instance that a tenant cannot choose.
_NAME_FIELDS = frozenset({'id', 'uuid', 'project_id', 'user_id'})
#: Sample instances: the smallest and largest id, and UUIDs that begin and end
#: with digits and letters.
_SAMPLES = (
    (1, '00000000-0000-4000-8000-000000000001'),
    (2, 'ffffffff-ffff-4fff-bfff-ffffffffffff'),
    (2 ** 31 - 1, '9a9a9a9a-9a9a-4a9a-9a9a-9a9a9a9a9a9f'),
)


def check_name_template(template: str) -> None:
    """Check that instances get unique names that LXD accepts.

    Nova formats the template with the id of the instance, or with its fields
    if it contains ``%(field)s``.

    :param template: ``[DEFAULT] instance_name_template``.
    :raises StartupError: if it produces other names.
    """
    fields = set(re.findall(r'%\((\w*)\)', template))
    foreign = sorted(fields - _NAME_FIELDS)
    if foreign:
        raise exception_mapping.StartupError(
            f'[DEFAULT] instance_name_template is "{template}", but instance '
            f'names can contain only the fields '
            f'{", ".join(sorted(_NAME_FIELDS))}, not {", ".join(foreign)}')
    names = [_render(template, number, uuid) for number, uuid in _SAMPLES]
    for name in names:
        if len(name) > _LONGEST_NAME or not _LXD_NAME.fullmatch(name):
            raise exception_mapping.StartupError(
                f'[DEFAULT] instance_name_template is "{template}", which '
                f'produces names such as "{name}"; LXD accepts at most '
                f'{_LONGEST_NAME} letters, digits and dashes, beginning with '
                f'a letter and not ending with a dash')
    if len(set(names)) < len(names):
        raise exception_mapping.StartupError(
            f'[DEFAULT] instance_name_template is "{template}", which '
            f'produces the same name for several instances; use the default, '
            f'or uuid')


def _render(template: str, number: int, uuid: str) -> str:
    """Render a name as :attr:`nova.objects.Instance.name` does."""
    try:
        return template % number
    except (TypeError, ValueError):
        pass
    # Ids of Keystone have 32 digits; those of LDAP users have 64.
    values = {'id': number, 'uuid': uuid, 'project_id': '0' * 31 + 'f',
              'user_id': '0' * 63 + 'f'}
    try:
        return template % values
    except (KeyError, TypeError, ValueError):
        return uuid
