"""Functions that fetch the arrays of a pytree of known structure.

To flatten a module, JAX calls back into Python for each node, which reads every field through
the `__getattribute__` of Equinox, and two structures are compared after that. Code that is
written for one structure does the same in a sixth of the time.
"""

import dataclasses
import functools as ft
import itertools
import operator
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._tree.cache import is_equal
from .._tree.flat import split_arrays
from .._tree.units import split_unit


# The lists and dicts in a module, and what is in each of them.
Contents = Sequence[tuple[Collection[Any], Sequence[Any]]]

# Gives the dynamic leaves in leaf order, or `None` for a pytree of another kind.
Reader = Callable[[Any], list[Any] | None]
IsDynamic = Callable[[Any], bool]


def make_reader(
    tree: Any,
    is_dynamic: IsDynamic,
    is_known: Callable[[type], bool] = lambda kind: True,
    check: Reader = lambda leaves: leaves,
) -> Reader:
    """Writes a function for pytrees that differ from `tree` in their dynamic leaves only.

    If a leaf has a type that `is_known` does not know, the leaves are what `check` gives.
    """
    if type(tree) is dict and len(tree) > 1 and all(map(is_dynamic, tree.values())):
        return _make_dict_reader(tree, is_known, check)
    writer = _Writer(is_dynamic)
    writer.write_node(tree, "tree")
    return writer.compile(is_known, check)


def _make_dict_reader(tree: dict[Any, Any], is_known: Any, check: Reader) -> Reader:
    num_items, get_items = len(tree), operator.itemgetter(*sorted(tree))

    def read(tree: Any) -> Any:
        if type(tree) is not dict or len(tree) != num_items:
            return None
        try:
            leaves = get_items(tree)
        except KeyError:
            return None
        return leaves if all(map(is_known, map(type, leaves))) else check(leaves)

    return read


def find_contents(module: eqx.Module) -> Contents | None:
    """What may change in a module: its lists and dicts. Or `None`, if more than that may.

    Modules are immutable, but for their `__init__`.
    """
    nodes: list[Any] = []
    note: Any = nodes.append  # returns `None`, so that nothing is a leaf for it
    leaves = jtu.tree_leaves(module, is_leaf=note)
    node_types = set(map(type, nodes)) - set(map(type, leaves)) - {list, dict, type(None)}
    is_immutable = all(issubclass(each, eqx.Module | tuple) for each in node_types)
    if not is_immutable or not _is_initialized(module):
        return None
    mutable = [node for node in nodes if type(node) in (list, dict)]
    values = [node.values() for node in mutable if type(node) is dict]
    return [(each, list(each)) for each in [*mutable, *values]]


def _is_initialized(module: eqx.Module) -> bool:
    for key, value in vars(module).items():
        try:
            setattr(module, key, value)
        except dataclasses.FrozenInstanceError:
            return True
        return False
    return True


def make_guard(
    module: eqx.Module,
    contents: Contents,
    leaves: list[Any],
    read: Reader,
    forget: Callable[[Any], None],
) -> Reader:
    """Writes a reader that knows the leaves of one module, and uses `read` for any other.

    `contents` are the containers in the module that may change, and what is in them. `forget`
    is called when the module is no more.
    """
    objects: dict[str, Any] = {"find_module": weakref.ref(module, forget), "leaves": leaves}
    objects |= {"read": read, "is_same": operator.is_}
    conditions = ["tree is find_module()"]
    for i, (node, held) in enumerate(contents):
        objects |= {f"node{i}": node, f"held{i}": held}
        conditions += [f"len(node{i}) == {len(held)}", f"all(map(is_same, node{i}, held{i}))"]
        if type(node) is list and len(held) <= 8:  # a call less
            items = {f"held{i}_{j}": item for j, item in enumerate(held)}
            objects |= items
            conditions[-1:] = [f"node{i}[{j}] is {name}" for j, name in enumerate(items)]
    exec(
        f"def guard(tree): return leaves if {' and '.join(conditions)} else read(tree)", objects
    )
    return objects["guard"]


# The dict of a module, without a call of `Module.__getattribute__`.
_get_fields = vars(eqx.Module)["__dict__"].__get__


class _Writer:
    """The source of a reader, line by line, and the objects that it refers to."""

    def __init__(self, is_dynamic: IsDynamic):
        self._is_dynamic = is_dynamic
        self._lines: list[str] = []
        self._indent = 2 * "    "
        self._names = map("x{}".format, itertools.count())
        self._objects: dict[str, Any] = {
            "get_fields": _get_fields,
            "is_equal": is_equal,
            "split_unit": split_unit,
        }

    def compile(self, is_known: Any, check: Reader) -> Reader:
        self._objects |= {"is_known": is_known, "check": check}
        source = [
            "def read(tree):",
            "    leaves = []",
            "    try:",
            *self._lines,
            "        return leaves if all(map(is_known, map(type, leaves))) else check(leaves)",
            "    except KeyError:",
            "        return None",
        ]
        exec("\n".join(source), self._objects)
        return self._objects["read"]

    def write_node(self, node: Any, name: str) -> None:
        """Reads a node like this one, which the variable `name` holds."""
        kind = type(node)
        if node is None:
            self._refuse(f"{name} is not None")
        elif isinstance(node, eqx.Module):
            self._refuse(f"type({name}) is not {self._refer(kind)}")
            self._write_module(node, name)
        elif kind is dict:
            self._refuse(f"type({name}) is not dict or len({name}) != {len(node)}")
            self._write_items(node, sorted(node), name)
        elif kind in (list, tuple):
            self._refuse(f"type({name}) is not {kind.__name__} or len({name}) != {len(node)}")
            self._write_sequence(node, name)
        elif (unit := split_unit(node)[1]) is not None:
            self._refuse(f"type({name}) is not {self._refer(kind)}")
            number, held = next(self._names), self._refer(unit)
            self._write(f"{number}, unit = split_unit({name})")
            self._refuse(f"unit is not {held} and not is_equal(unit, {held})")
            self.write_node(split_unit(node)[0], number)
        elif not jtu.all_leaves([node]):
            part = next(self._names)
            known = _describe(node, self._is_dynamic)
            read = ft.partial(_read_like, known, self._is_dynamic)
            self._write(f"{part} = {self._refer(read)}({name})")
            self._refuse(f"{part} is None")
            self._write(f"leaves += {part}")
        elif self._is_dynamic(node):
            self._write(f"leaves.append({name})")
        else:
            held = self._refer(node)
            self._refuse(f"{name} is not {held} and not is_equal({name}, {held})")

    def _write_module(self, module: eqx.Module, name: str) -> None:
        # Beside its fields, a module holds what `eqx.module_update_wrapper` gave it.
        held = vars(module)
        is_static = {
            f.name: f.metadata.get("static", False) for f in dataclasses.fields(module)
        }
        fields, value = next(self._names), next(self._names)
        self._write(f"{fields} = get_fields({name})")
        self._refuse(f"len({fields}) != {len(held)}")
        for key in held:
            if is_static.get(key, True):
                self._write_field(f"{fields}[{key!r}]", held[key], value)
        dynamic = [key for key, static in is_static.items() if key in held and not static]
        self._write_items(held, dynamic, fields)

    def _write_field(self, source: str, constant: Any, value: str) -> None:
        if constant is None or type(constant) is bool:
            self._refuse(f"{source} is not {constant}")
        elif type(constant) in (int, str):
            self._refuse(f"{source} != {constant!r}")
        else:
            held = self._refer(constant)
            self._write(f"{value} = {source}")
            self._refuse(f"{value} is not {held} and not is_equal({value}, {held})")

    def _write_items(self, items: dict[Any, Any], keys: Sequence[Any], name: str) -> None:
        """Reads values of a dict: several leaves at once, and other nodes one by one."""
        for start, stop in self._find_runs([items[key] for key in keys]):
            if stop - start > 2 and self._is_leaf(items[keys[start]]):
                getter = self._refer(operator.itemgetter(*keys[start:stop]))
                self._write(f"leaves += {getter}({name})")
                continue
            for key in keys[start:stop]:
                text = repr(key) if type(key) is str else self._refer(key)
                value = next(self._names)
                self._write(f"{value} = {name}[{text}]")
                self.write_node(items[key], value)

    def _write_sequence(self, nodes: Sequence[Any], name: str) -> None:
        """Reads a list or a tuple: nodes of one kind in a loop, or all at once."""
        for start, stop in self._find_runs(nodes):
            part = name if stop - start == len(nodes) else f"{name}[{start}:{stop}]"
            if self._is_leaf(nodes[start]):
                self._write(f"leaves += {part}")
                continue
            item = next(self._names)
            if stop - start == 1:  # Python nests 20 loops at the most
                self._write(f"{item} = {name}[{start}]")
                self.write_node(nodes[start], item)
                continue
            self._write(f"for {item} in {part}:")
            indent, self._indent = self._indent, self._indent + "    "
            self.write_node(nodes[start], item)
            self._indent = indent

    def _find_runs(self, nodes: Sequence[Any]) -> Iterator[tuple[int, int]]:
        """Where nodes of one kind begin and end."""
        kinds = [_describe(node, self._is_dynamic) for node in nodes]
        start = 0
        for stop in range(1, len(nodes) + 1):
            if stop == len(nodes) or not is_equal(kinds[stop], kinds[start]):
                yield start, stop
                start = stop

    def _is_leaf(self, node: Any) -> bool:
        return jtu.all_leaves([node]) and self._is_dynamic(node)

    def _write(self, line: str) -> None:
        self._lines.append(self._indent + line)

    def _refuse(self, condition: str) -> None:
        self._write(f"if {condition}: return None")

    def _refer(self, value: Any) -> str:
        """A name of the source for this object."""
        name = next(self._names)
        self._objects[name] = value
        return name


def _describe(node: Any, is_dynamic: IsDynamic) -> tuple[Any, ...]:
    """What a pytree is apart from its dynamic leaves, to be compared."""
    rest = split_arrays(node, is_dynamic).rest
    return rest.structure, rest.indices, [(type(leaf), leaf) for leaf in rest.constants]


def _read_like(known: tuple[Any, ...], is_dynamic: IsDynamic, node: Any) -> list[Any] | None:
    """The dynamic leaves of a node of this description, whatever its type."""
    if not is_equal(_describe(node, is_dynamic), known):
        return None
    return list(split_arrays(node, is_dynamic).diff)
