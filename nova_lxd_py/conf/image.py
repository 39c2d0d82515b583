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

"""Options of images and snapshots."""

from __future__ import annotations

from oslo_config import cfg

image_opts = [
    cfg.IntOpt(
        'image_max_unpacked_gb',
        default=100, min=1, max=65536,
        help="""
Maximum size in GiB of an unpacked image. The import of an image that turns
out to be larger, for example one made to fill the disk of the host, is aborted
and the image is refused.
"""),
    cfg.IntOpt(
        'image_parallel_imports',
        default=2, min=1, max=64,
        help="""
Number of different images that are imported into LXD at the same time. An
image is imported only once, regardless of how many instances wait for it.
"""),
]

snapshot_opts = [
    cfg.StrOpt(
        'snapshot_compression',
        default='zstd',
        choices=[
            ('zstd', 'fastest; about the size of gzip'),
            ('gzip', 'three times slower; supported by every LXD'),
            ('xz', 'smallest and by far the slowest'),
            ('none', 'no compression; slower than zstd on most disks, because '
                     'more data is written, sent and stored'),
        ],
        help="""
Compression of the image that LXD creates for a snapshot, a backup or a shelved
instance. LXD creates one image at a time, so that this also limits the
rate of snapshots of a host. If the host lacks the program for the chosen
compression, gzip is used.
"""),
]
