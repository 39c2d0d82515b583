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

"""What differs between the Nova releases that the driver supports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nova import utils


def spawn(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a short task in Nova's default pool, with its logging context.

    Nova 34 moved the helper out of ``nova.utils``.

    :param function: what to run.
    :returns: Nova's handle on the task.
    """
    try:
        from nova import thread_pool_factory
    except ImportError:
        return utils.spawn(function, *args, **kwargs)
    return thread_pool_factory.spawn(function, *args, **kwargs)
