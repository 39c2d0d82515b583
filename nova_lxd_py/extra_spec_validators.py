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

"""Validators for ``lxd`` namespaced extra specs.

nova-api loads this module from the entry point group
``nova.api.extra_spec_validators``, and refuses what does not fit the table in
:mod:`.extra_specs`.
"""

from __future__ import annotations

from typing import Any

from nova.api.validation.extra_specs import base

from nova_lxd_py import extra_specs


def register() -> list[base.ExtraSpecValidator]:
    """Return the validators.

    Called by :func:`nova.api.validation.extra_specs.validators
    .load_validators`. Nova refuses other names of their namespace itself.
    """
    return [base.ExtraSpecValidator(name=name, description=spec.description,
                                    value=_value(spec))
            for name, spec in extra_specs.EXTRA_SPECS.items()]


def _value(spec: extra_specs.ExtraSpec) -> dict[str, Any]:
    """Describe values as :class:`base.ExtraSpecValidator` has them."""
    values = {'type': spec.type, 'min': spec.minimum, 'max': spec.maximum,
              'enum': spec.choices or None, 'pattern': spec.pattern}
    return {key: value for key, value in values.items() if value is not None}
