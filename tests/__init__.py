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

"""Tests of the driver.

Nova monkey-patches for eventlet when its test modules are imported, unless
told otherwise first. Native threads are what nova-compute uses from release
34 on; set OS_NOVA_DISABLE_EVENTLET_PATCHING=0 to test with eventlet.
"""

import os

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')

try:
    from nova import monkey_patch
except ImportError:
    # Some tests of the packaging make do without Nova.
    pass
else:
    # Libraries import eventlet where they find it, which is too late for
    # Nova's decision. Nova 31 decides when the module is imported.
    if hasattr(monkey_patch, 'patch'):
        monkey_patch.patch()
