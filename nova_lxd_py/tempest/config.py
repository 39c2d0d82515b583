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

GROUP = cfg.OptGroup(name='lxd', title='Clouds whose servers are containers '
                                       'of LXD')

OPTIONS = [
    cfg.BoolOpt(
        'own_uid_ranges',
        default=True,
        help='The compute hosts have subordinate ids enough for servers of '
             'flavors with the extra spec lxd:isolated.'),
    cfg.BoolOpt(
        'nesting',
        default=True,
        help='Flavors may have the extra spec lxd:nested_allowed.'),
    cfg.BoolOpt(
        'mounted_volumes',
        default=False,
        help='Volumes can be mounted for servers: [lxd] volume_filesystems '
             'of the compute hosts names filesystems, and their kernel has '
             'idmapped mounts of them.'),
    cfg.IntOpt(
        'longest_pause',
        default=500,
        min=1,
        help='Milliseconds for which a process in a server may be kept from '
             'running while an image of the server is made, or while it is '
             'resized. Far below what a stop and a start would take, and '
             'above what a busy host does to it anyway.'),
]
