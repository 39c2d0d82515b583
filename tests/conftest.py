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

"""Hooks of pytest; the tests also run with stestr and unittest, without them.

Environment variables:

* ``NOVA_LXD_TEST_SEED``: seed of the random numbers. Failed tests report the
  seed with which they ran.
* ``NOVA_LXD_TEST_SHARE``: a directory that several processes of pytest have
  in common (see run_tests.sh). Each test file is run by the first process
  that comes to it.
"""

import collections
import itertools
import os
import pathlib
import random
import signal
import sys

import pytest

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')

SEED = os.environ.setdefault('NOVA_LXD_TEST_SEED', str(
    random.SystemRandom().randrange(1, 1 << 31)))
SHARE = os.environ.get('NOVA_LXD_TEST_SHARE')

#: Files that take a minute for one test.
LONG = ('test_volumes_random.py', 'test_guest_reboots.py',
        'test_cloud_init_keys.py', 'test_many.py')

#: Change or kill what the other tests in their directory need.
LAST = ('test_campaign.py', 'test_two_hosts.py')


def pytest_configure(config):
    # Tests with daemons clean up after an exception, not when they are killed;
    # and a shell's background jobs ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Run the longest files first, so that processes end together.

    Without several processes the order stays, except for the last files.
    """
    count = collections.Counter(item.path for item in items if SHARE)
    items.sort(key=lambda item: (
        item.path.name in LAST,
        bool(SHARE) and item.path.name not in LONG,
        -count[item.path]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Leave out the files that another process has claimed.

    pytest's own loop tears down what the next test does not need, which would
    be one of a file that is left out.
    """
    if not SHARE or session.testsfailed or session.config.option.collectonly:
        return None
    for name, items in itertools.groupby(
            session.items, lambda item: item.nodeid.partition('::')[0]):
        if not _claim(name.replace('/', '.')):
            continue
        for item, following in itertools.pairwise([*items, None]):
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
    return True


def _claim(name):
    try:
        pathlib.Path(SHARE, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item, settings):
    """Use a signal for timeouts in both of Nova's concurrency modes.

    With eventlet pytest-timeout does not recognise the main thread, and would
    end the whole process. The signal is repeated for cleanups that hang too.
    """
    if not settings.timeout:
        return None
    import pytest_timeout

    def expired(number, frame):
        pytest_timeout.timeout_sigalrm(item, settings)

    signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, settings.timeout)
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item):
    signal.setitimer(signal.ITIMER_REAL, 0)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        report.sections.append(
            ('Random numbers', f'NOVA_LXD_TEST_SEED={SEED}'))
    return report


def pytest_runtest_setup(item):
    random.seed(f'{SEED} {item.nodeid}')
    _keep_test_method()


def _keep_test_method():
    """Reconcile pytest with nova.test.TestCase.

    At its end Nova's base class deletes all public attributes of a test,
    among them the method that pytest has set and deletes itself; each test
    would fail after it has passed.
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
