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

"""A stateful LXD for unit tests.

It listens on a real unix socket, so that the driver's own code runs on it
through pylxd and websocket-client, and it behaves as LXD 5.0.2 does; a
functional test compares the two. :class:`FakeLXD` is the fixture to use.
"""

from tests.unit.fake_lxd import fixture

FakeLXD = fixture.FakeLXD

__all__ = ['FakeLXD']
