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

"""Requests without the trace function of coverage."""

from __future__ import annotations

from collections.abc import Iterator
import sys
import threading
from typing import Any

from oslotest import base
import requests

from tests.fixtures import untraced


def _stream() -> Iterator[bytes]:
    yield b'{}'


class UntracedTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.called: set[str] = set()

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        self.called.add(frame.f_code.co_name)
        return self._trace

    def trace(self, action: Any) -> None:
        """Call a function in a thread of its own, traced."""
        errors: list[Exception] = []

        def run() -> None:
            sys.settrace(self._trace)
            try:
                action()
            except Exception as exc:
                errors.append(exc)
            finally:
                sys.settrace(None)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        self.assertEqual([], errors)

    def test_function(self) -> None:
        def left_out() -> None:
            raise ValueError

        def called_after() -> None:
            pass

        def action() -> None:
            self.assertRaises(ValueError, untraced.untraced(left_out))
            called_after()

        self.trace(action)
        self.assertNotIn('left_out', self.called)
        self.assertIn('called_after', self.called)

    def test_traced_again(self) -> None:
        def left_out() -> None:
            untraced.traced(asked_for)

        def asked_for() -> None:
            pass

        before = threading.gettrace()
        threading.settrace(self._trace)  # type: ignore[arg-type]
        self.addCleanup(threading.settrace, before)  # type: ignore[arg-type]
        self.trace(untraced.untraced(left_out))
        self.assertNotIn('left_out', self.called)
        self.assertIn('asked_for', self.called)

    def send(self, **kwargs: Any) -> None:
        with untraced.UntracedRequests(), requests.Session() as session:
            session.mount('test://', _Adapter())
            session.request('POST', 'test://lxd/', **kwargs)

    def test_requests(self) -> None:
        for content in (None, b'', b'{}'):
            self.trace(lambda: self.send(data=content))
        self.trace(lambda: self.send(json={}))
        self.assertNotIn('prepare_body', self.called)
        self.assertIn('close', self.called)

    def test_stream(self) -> None:
        self.trace(lambda: self.send(data=_stream()))
        self.assertIn('_stream', self.called)
        self.assertIn('prepare_body', self.called)


class _Adapter(requests.adapters.BaseAdapter):
    """Reads the content and answers with nothing."""

    def send(self, request: requests.PreparedRequest, *args: Any,
             **kwargs: Any) -> requests.Response:
        list(request.body or b'')
        response = requests.Response()
        response.status_code = 200
        response.request, response.url = request, str(request.url)
        response._content = b''
        return response

    def close(self) -> None:
        pass
