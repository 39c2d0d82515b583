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

"""Mutations of statements, in addition to those of cosmic-ray.

Cosmic-ray changes expressions. A guard is often a statement: a check that
raises, a lock, a call without a result.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from cosmic_ray.operators import operator
import parso
from parso.python import tree

_NOTHING = '__import__("contextlib").nullcontext()'


class _Statement(operator.Operator):
    """Replaces a statement."""

    def replacement(self, node: Any) -> str | None:
        """Return the code to put in place of a node, or None to keep it."""
        raise NotImplementedError()

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if self.replacement(node) is not None:
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        prefix = node.get_first_leaf().prefix
        return parso.parse(f'{prefix}{self.replacement(node)}')

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class RemoveCall(_Statement):
    """``call()`` becomes ``pass``, where the result is not used."""

    def replacement(self, node: Any) -> str | None:
        if (node.type in ('atom_expr', 'await')
                and node.parent is not None
                and node.parent.type == 'simple_stmt'
                and node.get_last_leaf().value == ')'):
            return 'pass'
        return None


class RemoveRaise(_Statement):
    """``raise X`` becomes ``pass``."""

    def replacement(self, node: Any) -> str | None:
        return 'pass' if (node.type == 'raise_stmt'
                          or (node.type == 'keyword'
                              and node.value == 'raise'
                              and node.parent.type == 'simple_stmt')) else None


class ReturnNone(_Statement):
    """``return X`` becomes ``return None``."""

    def replacement(self, node: Any) -> str | None:
        # Callers mostly treat None and False alike.
        if (node.type == 'return_stmt' and
                node.children[1].get_code().strip() not in ('None', 'False')):
            return 'return None'
        return None


class RemoveContext(operator.Operator):
    """``with lock:`` becomes a block without it."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        for item in self._items(node):
            yield item.start_pos, item.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        item = list(self._items(node))[index]
        node.children[node.children.index(item)] = parso.parse(
            f'{item.get_first_leaf().prefix}{_NOTHING}')
        return node

    @staticmethod
    def _items(node: Any) -> Iterator[Any]:
        if isinstance(node, tree.WithStmt):
            for item in node.children[1:-2:2]:
                # What is bound to a name is used, so that the error would
                # be another one.
                if item.type != 'with_item':
                    yield item

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class RemoveHandler(operator.Operator):
    """``except X:`` becomes ``except ():``, which handles nothing.

    Cosmic-ray's own operator fails with names that have a dot.
    """

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == 'except_clause':
            yield node.children[1].start_pos, node.children[1].end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1] = parso.parse(' ()')
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class NegateCondition(operator.Operator):
    """``if X:`` becomes ``if not (X):``, and so with ``while`` and ``Y if X``.

    Cosmic-ray's own operator negates only the first part of ``a and b``.
    """

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        for number in self._conditions(node):
            condition = node.children[number]
            yield condition.start_pos, condition.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        number = self._conditions(node)[index]
        condition = node.children[number]
        prefix = condition.get_first_leaf().prefix
        code = condition.get_code(include_prefix=False)
        node.children[number] = parso.parse(f'{prefix}not ({code})')
        return node

    @staticmethod
    def _conditions(node: Any) -> list[int]:
        return [number + 1 for number, child
                in enumerate(getattr(node, 'children', ()))
                if child.type == 'keyword'
                and child.value in ('if', 'elif', 'while')]

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


OPERATORS = {f'statement/{one.__name__}': one for one in
             (RemoveCall, RemoveRaise, ReturnNone, RemoveContext,
              RemoveHandler, NegateCondition)}

#: Operators of cosmic-ray that are left out, as a regular expression: those
#: that are replaced here, and comparisons of values by ``is``, which CPython
#: answers like ``==`` or warns of.
EXCLUDED = (r'core/(ExceptionReplacer|AddNot'
            r'|ReplaceComparisonOperator_(?!Is_|IsNot_)\w+_(Is|IsNot)'
            r'|ReplaceComparisonOperator_(Is_Eq|IsNot_NotEq))$')


class NotBehaviour(ast.NodeVisitor):
    """Finds annotations and calls that write to the log.

    :ivar ranges: first and last position of each; a position is a line (from
                  1) and a column (from 0).
    """

    def __init__(self, source: str):
        self.ranges: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.visit(ast.parse(source))

    def __contains__(self, position: tuple[int, int]) -> bool:
        return any(begin <= position < end for begin, end in self.ranges)

    def _leave_out(self, node: ast.expr | None) -> None:
        if node is not None:
            self.ranges.append((
                (node.lineno, node.col_offset),
                (node.end_lineno or 0, node.end_col_offset or 0)))

    def visit_arg(self, node: ast.arg) -> None:
        self._leave_out(node.annotation)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._leave_out(node.returns)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._leave_out(node.annotation)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if (isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == 'LOG'):
            self._leave_out(node)
        else:
            self.generic_visit(node)
