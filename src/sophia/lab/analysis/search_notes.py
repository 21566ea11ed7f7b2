"""Notes on the search behind a protocol's settings: whether there was one, and which settings lie at an
edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sophia.lab.config.search_space import WARMUP, at_edge, read_kind
from sophia.lab.support.errors import UsageError

__all__ = ["edges", "unsearched"]


def unsearched(protocol: Mapping[str, Any]) -> str:
    """A sentence that names the contenders without a setting of their own, or nothing.

    >>> unsearched({"contenders": {"adamw": {"settings": {"lr": 0.005}}, "lion": {"settings": {}}}})
    'Nothing was searched for lion: it runs with defaults, most of them made for other sizes, and a verdict is one about defaults. For tuned settings: sophia sweep, then compare with its tuned.toml.'
    """  # noqa: E501
    names = [
        str(label)
        for label, entry in _by_name(protocol, "contenders").items()
        if isinstance(entry, Mapping) and not entry.get("settings") and entry.get("warmup") is None
    ]
    if not names:
        return ""
    many = len(names) > 1
    return (
        f"Nothing was searched for {', '.join(names)}: {'they run' if many else 'it runs'} with defaults, "
        "most of them made for other sizes, and a verdict is one about defaults. For tuned settings: "
        "sophia sweep, then compare with its tuned.toml."
    )


def edges(protocol: Mapping[str, Any]) -> tuple[str, ...]:
    """A sentence for every contender with a setting at the edge of the space that its search declared.

    >>> space = {"lr": {"low": 1e-3, "high": 1e-2}, "warmup": [0.05, 0.1, 0.2]}
    >>> edges({"contenders": {"adamw": {"settings": {"lr": 3e-3}, "warmup": 0.2}},
    ...        "search": {"spaces": {"adamw": space}}})
    ('adamw: warmup 0.2 lies at the edge of the space that was searched, so the optimum may lie outside',)
    """
    found = []
    spaces = _by_name(_by_name(protocol, "search"), "spaces")
    for label, entry in _by_name(protocol, "contenders").items():
        chosen = {**_by_name(entry, "settings"), WARMUP: _by_name(entry).get(WARMUP)}
        try:  # the records may be anybody's
            space = {name: read_kind(kind, str(name)) for name, kind in _by_name(spaces, label).items()}
            here = {name: kind for name, kind in space.items() if chosen.get(name) is not None}
            names = at_edge(here, chosen)
        except (UsageError, TypeError, ValueError):
            continue
        if names:
            what = ", ".join(f"{name} {chosen[name]}" for name in names)
            found.append(
                f"{label}: {what} {'lie' if len(names) > 1 else 'lies'} at the edge of the space that was "
                "searched, so the optimum may lie outside"
            )
    return tuple(found)


def _by_name(value: Any, key: str | None = None) -> Mapping[str, Any]:
    inner = value.get(key) if key is not None and isinstance(value, Mapping) else value
    return inner if isinstance(inner, Mapping) else {}
