"""Globs over dotted paths, turned into regular expressions."""

import functools as ft
import re


_TOKEN = re.compile(r"\*|\[!?[^\]]+\]|.", re.DOTALL)
_INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")


@ft.lru_cache
def compile_glob(glob: str) -> re.Pattern[str]:
    """A regular expression for the names that `glob` matches, and all below them."""
    choices = "|".join(_translate(choice, glob) for choice in _expand_braces(glob, glob))
    return re.compile(f"(?:{choices})(?:\\..*)?", re.DOTALL)


def _expand_braces(glob: str, whole: str) -> list[str]:
    braces = _INNERMOST_BRACES.search(glob)
    if braces is None:
        if "{" in glob or "}" in glob:
            raise ValueError(f"The path {whole!r} has a brace without its partner.")
        return [glob]
    before, after = glob[: braces.start()], glob[braces.end() :]
    return [
        expanded
        for choice in braces[1].split(",")
        for expanded in _expand_braces(before + choice + after, whole)
    ]


def _translate(glob: str, whole: str) -> str:
    segments = glob.split(".")
    # What a path names includes everything under it, so a last `**` adds nothing.
    while len(segments) > 1 and segments[-1] == "**":
        segments.pop()
    if segments in ([""], ["**"]):
        return ".*"
    *inner, last = segments
    return "".join(
        r"(?:.*\.)?" if segment == "**" else _translate_segment(segment, whole) + r"\."
        for segment in inner
    ) + _translate_segment(last, whole)


def _translate_segment(segment: str, whole: str) -> str:
    if "**" in segment:
        raise ValueError(
            f"In the path {whole!r}, `**` must stand alone between two dots. "
            "For a part of one segment, write `*`."
        )
    return "".join(_translate_token(token, whole) for token in _TOKEN.findall(segment))


def _translate_token(token: str, whole: str) -> str:
    if token == "*":
        return r"[^.]*"
    if token == "[":
        raise ValueError(f"The path {whole!r} has a `[` without its `]`.")
    if token.startswith("["):
        negated = token.startswith("[!")
        members = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("[", r"\[")
        return f"[{'^.' if negated else ''}{members.replace('^', chr(92) + '^')}]"
    return re.escape(token)
