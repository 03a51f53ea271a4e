"""A description of the differences between a pytree and a file."""

import collections
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .._tree.text import quote, shorten, show
from .leaves import Entry
from .sources import Shards, Source


_MOST = 3  # of each kind, or the message would be too long to read

Rename = Mapping[str, str] | Callable[[str], str] | None


class Differences:
    """Entries that are wanted but missing or different in a file, and those not wanted.

    `fitting` has the names of the entries that match, by their name in the file. The text of
    this object lists the differences.
    """

    def __init__(
        self, wanted: Mapping[str, Entry], source: Source | Shards, rename: Rename, cast: bool
    ):
        names = {name: _rename(name, rename) for name in wanted}
        found = source.entries
        self.fitting: dict[str, list[str]] = collections.defaultdict(list)
        self._others: list[str] = []
        self._missing: list[tuple[str, str, Entry]] = []
        self._castable = False
        for name, file_name in names.items():
            if file_name not in found:
                self._missing.append((name, file_name, wanted[name]))
                continue
            entry, is_castable = found[file_name], False
            fits = wanted[name].fits(entry)
            if not fits:
                is_castable = wanted[name].fits_cast(entry)
            if fits or (cast and is_castable):
                self.fitting[file_name].append(name)
            else:
                where = "" if name == file_name else f" at {quote(file_name)}"
                self._others.append(
                    f"{wanted[name]} at {quote(name)}, and {entry}{where} in the file"
                )
                self._castable |= is_castable
        taken = set(names.values())
        self._left_over = {name: found[name] for name in found if name not in taken}

    def __bool__(self) -> bool:
        return bool(self._others or self._missing or self._left_over)

    def __str__(self) -> str:
        left_over = [
            f"nothing at {quote(name)}, and {entry} in the file"
            for name, entry in self._left_over.items()
        ]
        missing = [
            f"{entry} at {quote(name)}, and nothing in the file"
            + ("" if name == file_name else f" at {quote(file_name)}")
            + self._name_nearest(file_name)
            for name, file_name, entry in self._missing[:_MOST]
        ]
        missing += [""] * (len(self._missing) - len(missing))  # to be counted
        groups = [self._others, missing, left_over]
        return "; ".join(shorten(group, _MOST, "; ") for group in groups if group)

    def _name_nearest(self, file_name: str) -> str:
        nearest = find_nearest(file_name, self._left_over)
        return f" (nearest: {', '.join(map(quote, nearest))})" if nearest else ""

    @property
    def hint(self) -> str:
        hint = " Pass `cast=True` to convert dtypes." if self._castable else ""
        if self._missing and all(entry.is_python for _, _, entry in self._missing):
            hint += (
                " These are Python numbers in the model. To load only its arrays, use "
                "`vg.replace_states(model, vg.load(path, vg.states(model)))`."
            )
        if any("others." in name for name, _, _ in self._missing) or any(
            "others." in name for name in self._left_over
        ):
            hint += " States that `func` uses are known after `step.init(batch=...)`."
        return hint


def find_nearest(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, names, n=2, cutoff=0.5)


def _rename(name: str, rename: Rename) -> str:
    if rename is None:
        return name
    file_name = rename.get(name, name) if isinstance(rename, Mapping) else rename(name)
    if not isinstance(file_name, str):
        raise TypeError(
            "`load(rename=...)` must give the name of an array in the file. Got "
            f"{show(file_name)} for {quote(name)}. To keep the value in `like`, give a name "
            "that is not in the file, and pass `strict=False`."
        )
    return file_name


def check_rename(rename: object, names: Mapping[str, Any]) -> None:
    """Raises an error unless `rename` is a function or a dict from paths of arrays."""
    if not (rename is None or callable(rename) or isinstance(rename, Mapping)):
        raise TypeError(
            "`load(rename=...)` must be a dict from paths in `like` to names in the file, or a "
            f"function of a path. Got {show(rename)}."
        )
    for name in rename if isinstance(rename, Mapping) else ():
        if name not in names:
            nearest = list(map(quote, find_nearest(str(name), names)))
            near = f" Its nearest paths are {', '.join(nearest)}." if nearest else ""
            raise ValueError(
                f"`load(rename=...)` must have paths of arrays in `like`. Got {name!r}.{near}"
            )


def offer_rename(source: Source | Shards, wanted: Mapping[str, Entry]) -> str:
    """The call to make for a file of another program, with an example of a name."""
    found = source.entries
    listed = shorten(list(map(quote, found)), _MOST) or "nothing"
    pairs = {
        name: [each for each, there in found.items() if there.shape == entry.shape]
        for name, entry in wanted.items()
        if entry.kind == "array"
    }
    example = next(
        (
            f"{{{name!r}: {(find_nearest(name, alike) or alike)[0]!r}}}"
            for name, alike in pairs.items()
            if alike
        ),
        "{path: name}",
    )
    return (
        f"It is a safetensors file of another program, with {listed}. To load it, name each "
        f"array of `like`: `vg.load(path, like, rename={example})`, or with a function of its "
        "path"
    )
