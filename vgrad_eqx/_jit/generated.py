"""Generated functions that extract the arrays of a pytree like a given one, or build one.

To flatten a module, JAX calls back into Python for each node, which reads every field through
the `__getattribute__` of Equinox, and two structures are compared after that. Code that is
written for one structure does the same in a sixth of the time.
"""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from .._tree.cache import is_equal
from .._tree.flat import split_arrays
from .._tree.types import PyTree, Unit
from .._tree.units import split_unit


Arrays = tuple[list[Any], list[Any]]


def make_reader(
    first: Any,
    others: dict[str, Any],
    is_array: Callable[[Any], bool],
    check: Callable[[Sequence[Any], Sequence[Any]], bool],
) -> Callable[..., Arrays | None]:
    """Generates a function of a pytree and of others, passed by position in this order.

    It returns the arrays of the first, and those of the others, or `None` for pytrees that
    differ from these in anything else. Where a leaf has another type than here, `check` of
    the arrays decides.
    """
    code = _Code(is_array)
    code.read(first, "first")
    num_first = len(code.arrays)
    for name, tree in others.items():
        code.read(tree, name)
    arrays = code.arrays[:num_first], code.arrays[num_first:]
    types, other_types = (
        list(map(type, split_arrays(tree, is_array).diff))
        for tree in (first, [*others.values()])
    )
    code.objects |= {"check": check, "types": types, "other_types": other_types}
    lines = [
        *code.lines,
        f"arrays = [{', '.join(arrays[0])}]",
        f"others = [{', '.join(arrays[1])}]",
        "if [*map(type, arrays)] != types or [*map(type, others)] != other_types:",
        "    if not check(arrays, others): return None",
    ]
    body = [f"        {line}" for line in lines]
    head = f"def read({', '.join(['first', *others])}):\n    try:"
    tail = "    except KeyError: return None\n    return arrays, others"
    return code.compile("\n".join([head, *body, tail]), "read")


def make_builder(
    tree: PyTree, is_array: Callable[[Any], bool]
) -> Callable[[Sequence[Any]], Any]:
    """Generates a function that returns this pytree with other arrays."""
    code = _Code(is_array)
    result = code.build(tree)
    unpacked = f"{', '.join(code.arrays)}, = arrays" if code.arrays else "pass"
    lines = [f"    {line}" for line in [unpacked, *code.lines, f"return {result}"]]
    return code.compile("\n".join(["def build(arrays):", *lines]), "build")


# The dict of a module, without a call of `Module.__getattribute__`.
_FIELDS = vars(eqx.Module)["__dict__"]
# What `eqx.module_update_wrapper` sets.
_WRAPPER_FIELDS = ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__")


class _Code:
    """The source of a function, line by line, and the objects that it refers to.

    `arrays` are the expressions of the arrays in leaf order.
    """

    def __init__(self, is_array: Callable[[Any], bool]):
        self._is_array = is_array
        self._names = map("x{}".format, itertools.count())
        self.arrays: list[str] = []
        self.lines: list[str] = []
        self.objects: dict[str, Any] = {
            "get_fields": _FIELDS.__get__,
            "set_fields": _FIELDS.__set__,
            "new": object.__new__,
            "is_equal": is_equal,
            "is_equal_unit": _is_equal_unit,
            "flatten_one_level": jtu.default_registry.flatten_one_level,
            "unflatten": jtu.tree_unflatten,
        }

    def compile(self, source: str, name: str) -> Any:
        exec(source, self.objects)
        return self.objects[name]

    def read(self, tree: PyTree, text: str) -> None:
        """Reads a pytree like this one, given by the expression `text`."""
        stack = [(tree, text)]
        while stack:
            node, text = stack.pop()
            if node is None:
                self._refuse(f"{text} is not None")
            elif not jtu.all_leaves([node]):
                stack += reversed(self._read_node(node, self._assign(text)))
            elif self._is_array(node):
                self.arrays.append(text)
            else:
                self._compare(text, node)

    def _read_node(self, node: Any, name: str) -> list[tuple[Any, str]]:
        """The children of a node, each with the expression that gives it."""
        self._refuse(f"type({name}) is not {self._refer(type(node))}")
        if isinstance(node, eqx.Module):
            dynamic, others, absent = _list_fields(node)
            fields, num_fields = self._assign(f"get_fields({name})"), len(dynamic) + len(others)
            is_absent = f"{self._refer(absent)}.isdisjoint({fields})"
            self._refuse(f"len({fields}) != {num_fields} and not {is_absent}")
            for key, value in others.items():
                self._compare(f"{fields}[{key!r}]", value)
            return [(value, f"{fields}[{key!r}]") for key, value in dynamic.items()]
        if type(node) is dict:
            self._refuse(f"len({name}) != {len(node)}")
            keys = sorted(node)
            if len(keys) > 1 and all(map(self._is_array, node.values())):
                self.arrays.append(f"*{self._refer(operator.itemgetter(*keys))}({name})")
                return []
            return [(node[key], f"{name}[{self._refer(key)}]") for key in keys]
        if slots := _find_slots(node):
            number, unit = split_unit(node)
            given, held = self._assign(f"{name}.{slots[1]}"), self._refer(unit)
            known = self._refer({})
            self._refuse(
                f"{given} is not {held} and {known}.get(id({given})) is not {given} "
                f"and not is_equal_unit({given}, {held}, {known})"
            )
            return [(number, f"{name}.{slots[0]}")]
        children = node
        if not isinstance(node, tuple | list):
            children, data = jtu.default_registry.flatten_one_level(node)
            opened = self._assign(f"flatten_one_level({name})")
            self._compare(f"{opened}[1]", data)
            name, children = self._assign(f"{opened}[0]"), list(children)
        self._refuse(f"len({name}) != {len(children)}")
        if children and all(map(self._is_array, children)):
            self.arrays.append(f"*{name}")
            return []
        return [(child, f"{name}[{i}]") for i, child in enumerate(children)]

    def build(self, tree: PyTree) -> str:
        """Builds a pytree like this one. Returns its name."""
        stack, opened = [tree], []
        while stack:
            node = stack.pop()
            children, write = self._open(node)
            opened.append((len(children), write))
            stack += reversed(children)
        built: list[str] = []
        for num_children, write in reversed(opened):  # children come after their parent
            built.append(write([built.pop() for _ in range(num_children)]))
        return built.pop()

    def _open(self, node: object) -> tuple[list[Any], Callable[[list[str]], str]]:
        """The children of a node, and a function that writes its code from their names."""
        if node is None or jtu.all_leaves([node]):
            text = "None" if node is None else self._build_leaf(node)
            return [], lambda names: text
        kind = self._refer(type(node))
        if isinstance(node, eqx.Module):
            return self._open_module(node, kind)
        if type(node) is dict:
            keys = sorted(node)
            before = [f"{self._refer(key)}: " for key in keys]
            return [node[key] for key in keys], lambda names: self._assign(
                f"{{{', '.join(map(operator.add, before, names))}}}"
            )
        if type(node) is list:
            return node, lambda names: self._assign(f"[{', '.join(names)}]")
        if isinstance(node, tuple):
            start = kind if hasattr(node, "_fields") else ""
            return list(node), lambda names: self._assign(
                f"{start}({''.join([f'{name}, ' for name in names])})"
            )
        if slots := _find_slots(node):
            return self._open_quantity(node, kind, slots)
        children, structure = jtu.tree_flatten(node, is_leaf=lambda x: x is not node)
        held = self._refer(structure)
        return children, lambda names: self._assign(f"unflatten({held}, [{', '.join(names)}])")

    def _open_module(self, module: eqx.Module, kind: str) -> Any:
        dynamic, others, _ = _list_fields(module)
        static = [f"{key!r}: {self._refer(value)}" for key, value in others.items()]

        def write(names: list[str]) -> str:
            fields = [f"{key!r}: {name}" for key, name in zip(dynamic, names, strict=True)]
            name = self._assign(f"new({kind})")
            self.lines.append(f"set_fields({name}, {{{', '.join([*fields, *static])}}})")
            return name

        return list(dynamic.values()), write

    def _open_quantity(self, quantity: Any, kind: str, slots: tuple[str, str]) -> Any:
        number, unit = split_unit(quantity)
        held = self._refer(unit)

        def write(names: list[str]) -> str:
            name = self._assign(f"new({kind})")
            self.lines.append(f"{name}.{slots[0]}, {name}.{slots[1]} = {names[0]}, {held}")
            return name

        return [number], write

    def _build_leaf(self, leaf: object) -> str:
        if not self._is_array(leaf):
            return self._refer(leaf)
        self.arrays.append(next(self._names))
        return self.arrays[-1]

    def _assign(self, text: str) -> str:
        name = next(self._names)
        self.lines.append(f"{name} = {text}")
        return name

    def _compare(self, text: str, constant: object) -> None:
        name, held = self._assign(text), self._refer(constant)
        self._refuse(f"{name} is not {held} and not is_equal({name}, {held})")

    def _refuse(self, condition: str) -> None:
        self.lines.append(f"if {condition}: return None")

    def _refer(self, value: object) -> str:
        """A name of the source for this object."""
        name = next(self._names)
        self.objects[name] = value
        return name


def _is_equal_unit(unit: Unit, other: object, known: dict[int, Any]) -> bool:
    """Remembers equal units by their `id`, since units never change and compare slowly."""
    if not is_equal(unit, other):
        return False
    if len(known) < _MOST_UNITS:
        known[id(unit)] = unit
    return True


_MOST_UNITS = 16


def _find_slots(node: Any) -> tuple[str, str] | None:
    """The slots of a Quantity for its mantissa and unit, if it has only these."""
    number, unit = split_unit(node)
    slots = getattr(type(node), "__slots__", ())
    if unit is None or len(slots) != 2 or hasattr(node, "__dict__"):
        return None
    for of_number, of_unit in itertools.permutations(slots):
        if getattr(node, of_number) is number and getattr(node, of_unit) is unit:
            return of_number, of_unit
    return None


def _list_fields(module: eqx.Module) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """The flattened fields, the other fields that matter, and the names of missing fields.

    Beside its fields, only what `eqx.module_update_wrapper` gave a module counts. A cached
    property does not.
    """
    is_static = {f.name: f.metadata.get("static", False) for f in dataclasses.fields(module)}
    is_static |= dict.fromkeys(_WRAPPER_FIELDS, True)
    held = {name: value for name, value in vars(module).items() if name in is_static}
    dynamic = {name: held[name] for name in is_static if name in held and not is_static[name]}
    others = {name: value for name, value in held.items() if is_static[name]}
    return dynamic, others, {*is_static} - {*held}
