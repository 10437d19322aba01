"""HTML out of plain values: every text is escaped here, and only here."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Union

VOID = frozenset({"meta", "circle", "line", "rect", "path"})
"""Elements without content."""


class Html(str):
    """Text that is markup already."""


Node = Union[str, "Html", int, float, None, Iterable["Node"]]


def tag(name: str, /, *children: Node, **attributes: object) -> Html:
    """One element.

    Args:
        name: Its name.
        children: Texts, which are escaped; elements; nested sequences of both; None is nothing.
        attributes: A trailing underscore is dropped (`class_`), others become hyphens; None and False are left
            out, True stands without a value.
    """
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{shown}>" if name == "meta" else f"<{name}{shown}/>")
    return Html(f"<{name}{shown}>{join(*children)}</{name}>")


def join(*nodes: Node) -> Html:
    """The nodes one after the other."""
    return Html("".join(map(_one, nodes)))


def _one(node: Node) -> str:
    if node is None:
        return ""
    if isinstance(node, Html):
        return str(node)
    if isinstance(node, (str, int, float)):
        return html.escape(str(node))
    return join(*node)
