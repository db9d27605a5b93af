"""Which children a module's forward calls with one and the same tensor, read off its source."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

# what is in another part of one of these may not be run, or be run in another state
_BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.Try, ast.ExceptHandler, ast.With, ast.match_case,
)  # fmt: skip
# nothing is known of what is in these: when it is run, or whether all of it is
_OPAQUE = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp,
    ast.GeneratorExp,
)  # fmt: skip
_EXITS = (ast.Return, ast.Raise, ast.Break, ast.Continue, ast.Yield)


def called_with_one_input(parent: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of attributes that `parent.forward` calls as ``self.name(x)`` with the same local variable x.

    Nothing is bound to the variable in between, and either all calls of a group are made or none. Empty where the
    source cannot be read or the instance has a forward of its own.
    """
    return () if "forward" in parent.__dict__ else _groups_of(type(parent).forward)


@functools.cache
def _groups_of(function: Any) -> tuple[tuple[str, ...], ...]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # made at run time, or not from one function's source
        return ()
    if not isinstance(tree, ast.FunctionDef) or not tree.args.args:
        return ()
    calls = _Calls(tree.args.args[0].arg)
    calls.walk(tree.body)
    counts = Counter(name for name, _ in calls.found)
    groups: dict[Any, list[str]] = {}
    for name, place in calls.found:
        if counts[name] == 1:
            groups.setdefault(place, []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


class _Calls:
    """Calls ``self.name(variable)`` in the order of evaluation, each with its place.

    Two calls in one place have the same variable with the same value, and are both made or neither is.
    """

    def __init__(self, self_name: str) -> None:
        self.found: list[tuple[str, Any]] = []
        self._self = self_name
        self._branch: tuple[Any, ...] = ()
        self._bindings: Counter[str] = Counter()
        self._exits = 0

    def walk(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            if isinstance(node, _OPAQUE):
                continue
            if isinstance(node, _BRANCHES):
                self._branches(node)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                self.walk([] if node.value is None else [node.value])  # before its targets, unlike its fields
                self.walk(targets)
            else:
                self.walk(ast.iter_child_nodes(node))
                self._note(node)

    def _branches(self, node: ast.AST) -> None:
        outside = self._branch
        for field, value in ast.iter_fields(node):
            self._branch = (*outside, (node, field))
            self.walk(part for part in (value if isinstance(value, list) else [value]) if isinstance(part, ast.AST))
        self._branch = outside

    def _note(self, node: ast.AST) -> None:
        if isinstance(node, _EXITS):
            self._exits += 1
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            self._bindings[node.id] += 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
            owner, arguments = node.func.value, node.args
            ours = isinstance(owner, ast.Name) and owner.id == self._self
            if ours and len(arguments) == 1 and isinstance(arguments[0], ast.Name):
                variable = arguments[0].id
                place = variable, self._bindings[variable], self._branch, self._exits
                self.found.append((node.func.attr, place))
