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

"""What pytest needs to run these tests; stestr and unittest need none."""

import os
import sys

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')


def pytest_runtest_setup(item):
    """Reconcile pytest with nova.test.TestCase.

    At its end Nova's base class deletes all public attributes of a test,
    among them the method that pytest has put there and wants to take away
    itself; each test would fail after it has passed.
    """
    nova_test = sys.modules.get('nova.test')
    if nova_test is None or hasattr(nova_test.TestCase, '_clears_for_pytest'):
        return
    clear = nova_test.TestCase._clear_attrs

    def clear_but_keep_method(test):
        kept = test.__dict__.get(test._testMethodName)
        clear(test)
        if kept is not None:
            setattr(test, test._testMethodName, kept)

    nova_test.TestCase._clear_attrs = clear_but_keep_method
    nova_test.TestCase._clears_for_pytest = True
