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

"""Options of the tempest plugin."""

from oslo_config import cfg

GROUP = cfg.OptGroup(name='lxd',
                     title='Clouds whose servers are LXD containers')

OPTIONS = [
    cfg.BoolOpt(
        'own_uid_ranges',
        default=True,
        help='Whether the compute hosts have enough subordinate ids for '
             'servers of flavors with the extra spec lxd:isolated.'),
    cfg.BoolOpt(
        'nesting',
        default=True,
        help='Whether flavors may have the extra spec lxd:nested_allowed.'),
    cfg.BoolOpt(
        'mounted_volumes',
        default=False,
        help='Whether volumes can be attached in filesystem mode: [lxd] '
             'volume_filesystems is set on the compute hosts, and their '
             'kernel supports idmapped mounts of these filesystems.'),
    cfg.IntOpt(
        'longest_pause',
        default=500,
        min=1,
        help='Maximum time in milliseconds for which a process in a server '
             'may not run while an image of the server is created, or while '
             'it is resized. Must be well below the time that a stop and a '
             'start take, and above the scheduling delays of a busy host.'),
]
