"""Globs over dotted paths, compiled to regular expressions that run in linear time."""

import functools as ft
import re
from collections.abc import Sequence
from typing import NoReturn

from .._tree.text import quote


# A star, a set of characters, or a character.
_TOKEN = re.compile(r"\*|\[!?[^\]]+\]|.", re.DOTALL)
_MEMBER = re.compile(r"(.)-(.)|(.)", re.DOTALL)
_MOST_CHOICES = 1000
_END = r"(?=\.|\Z)"  # of a segment


@ft.lru_cache
def compile_glob(glob: str) -> re.Pattern[str]:
    """A regular expression for `glob` itself, the names that it matches, and all below them.

    What a star or `**` skips is decided once, by an atomic group `(?>...)`: what follows it has
    a fixed number of characters or segments, so the first match leaves the most for the rest.
    """
    choices = [_translate(choice, glob) for choice, _ in _expand_braces(glob)]
    return re.compile(f"(?:{'|'.join([re.escape(glob), *choices])})(?:\\..*)?", re.DOTALL)


@ft.lru_cache
def list_paths(glob: str) -> tuple[str, ...]:
    """The names that a glob may spell out: itself, and those in its braces."""
    return tuple(dict.fromkeys([glob, *[choice for choice, _ in _expand_braces(glob)]]))


def find_unmatched(glob: str, names: Sequence[str]) -> str | None:
    """The glob, if it matches none of the names, or else an alternative that matches none.

    Not every combination of alternatives in braces must match, but each alternative must occur
    in one that does.
    """
    if not any(map(compile_glob(glob).fullmatch, names)):
        return glob
    if any(name == glob or name.startswith(f"{glob}.") for name in names):
        return None
    choices, matched = _expand_braces(glob), set()
    for choice, taken in choices:
        if not matched.issuperset(taken) and any(map(compile_glob(choice).fullmatch, names)):
            matched.update(taken)
    return next((choice for choice, taken in choices if not matched.issuperset(taken)), None)


def _refuse(glob: str, fault: str) -> NoReturn:
    shown = quote(glob, "'")
    raise ValueError(
        f"The path {shown} must be a glob, of `*`, `**`, `[01]`, `[!01]` and `{{a,b}}`. Got "
        f"one with {fault}. A set such as `[*]`, `[[]` or `[{{]` stands for the character."
    )


_Choice = tuple[str, frozenset[int]]


def _expand_braces(glob: str) -> list[_Choice]:
    """The globs without braces, each with the positions in `glob` of its alternatives."""
    # For each open brace, the choices before the last comma, and those after it.
    stack: list[tuple[list[_Choice], list[_Choice]]] = [([], [("", frozenset())])]
    for token in _TOKEN.finditer(glob):
        before, choices = stack[-1]
        is_inside = len(stack) > 1
        start = [("", frozenset([token.end()]))]
        if token[0] == "{":
            stack.append(([], start))
        elif token[0] == "}" and is_inside:
            stack.pop()
            outer, inner = stack[-1][1], before + choices
            if len(outer) * len(inner) > _MOST_CHOICES:
                _refuse(glob, f"braces for more than {_MOST_CHOICES:,} paths")
            outer[:] = [
                (text + more, taken | also) for text, taken in outer for more, also in inner
            ]
        elif token[0] == "," and is_inside:
            stack[-1] = (before + choices, start)
        elif token[0] == "}":
            _refuse(glob, "a `}` without its `{`")
        else:
            choices[:] = [(text + token[0], taken) for text, taken in choices]
    if len(stack) > 1:
        _refuse(glob, "a `{` without its `}`")
    return stack[0][1]


def _translate(glob: str, whole: str) -> str:
    # A path includes everything under the node that it names, so a last `**` adds nothing.
    runs: list[list[str]] = [[]]
    for segment in glob.split("."):
        if segment == "**":
            runs.append([])
        else:
            runs[-1].append(_translate_segment(segment, whole))
    first, *others = [r"\.".join(run) for run in runs]
    if not glob.replace("**", "").replace(".", ""):
        return ".*"
    found = [rf"(?>(?:[^.]*\.)*?{run}{_END})" for run in others if run]
    return r"\.".join([first, *found] if first else found)


def _translate_segment(segment: str, whole: str) -> str:
    if "**" in segment:
        _refuse(whole, "a `**` that does not stand alone between two dots")
    parts = [""]
    for token in _TOKEN.findall(segment):
        if token == "*":
            parts.append("")
        else:
            parts[-1] += _translate_token(token, whole)
    first, *others = parts
    if not others:
        return first
    found = "".join(f"(?>[^.]*?{part})" for part in others[:-1] if part)
    return f"(?>{first}{found}[^.]*{others[-1]}{_END})"


def _translate_token(token: str, whole: str) -> str:
    if token == "[":
        _refuse(whole, "a `[` without its `]`, or an empty set")
    if len(token) == 1:
        return re.escape(token)
    negated = token.startswith("[!") and len(token) > 3
    members = ""
    for low, high, single in _MEMBER.findall(token[1 + negated : -1]):
        if low > high:
            _refuse(whole, f"a reversed range `{low}-{high}`")
        members += re.escape(single) if single else f"{re.escape(low)}-{re.escape(high)}"
    return rf"(?!\.)[{'^' if negated else ''}{members}]"
