"""Parameter groups by patterns of names."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sophia.step.groups import Named, matrices_and_vectors

__all__ = ["groups_by_name"]

SETTINGS = (
    "lr",
    "betas",
    "gamma",
    "eps",
    "weight_decay",
    "rule",
    "damping",
    "scale",
    "update_every",
    "maximize",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)
"""What a group may have of its own."""


def groups_by_name(
    model: nn.Module, patterns: Mapping[str, Mapping[str, Any]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups with the settings of the first pattern that matches a parameter's name, and the rest. Of each,
    vectors are apart and not decayed, unless its pattern says how it decays.

    Raises:
        ValueError: a pattern that matches nothing, or only what earlier ones have, or an unknown setting.
    """
    for pattern, settings in patterns.items():
        if unknown := [name for name in settings if name not in SETTINGS]:
            close = difflib.get_close_matches(unknown[0], SETTINGS, n=1)
            raise ValueError(
                f"Sophia.groups: {pattern!r} sets {unknown[0]!r}, which is no setting of a parameter group, "
                f"so that it would have no effect. {f'Did you mean {close[0]!r}? ' if close else ''}There "
                f"are {', '.join(SETTINGS)}; what is for all, such as fraction, goes to Sophia(...)"
            )
    names: dict[int, list[str]] = defaultdict(list)  # all of a tied parameter
    for name, p in model.named_parameters(remove_duplicate=False):
        names[id(p)].append(name)
    members: dict[str, tuple[list[Named], list[Named]]] = {pattern: ([], []) for pattern in (*patterns, "")}
    for number, part in enumerate(matrices_and_vectors(model)):
        for name, p in part:
            matching = (q for q in patterns if any(fnmatchcase(each, q) for each in names[id(p)]))
            members[next(matching, "")][number].append((name, p))
    groups: list[dict[str, Any]] = []
    for pattern, (matrices, vectors) in members.items():
        settings = patterns.get(pattern, {})
        if pattern and not matrices and not vectors:
            raise ValueError(
                _unmatched(pattern, list(patterns), [name for several in names.values() for name in several])
            )
        if "weight_decay" in settings:
            groups.append({**settings, "params": matrices + vectors})
            continue
        groups.append({"weight_decay": weight_decay, **settings, "params": matrices})
        groups.append({"weight_decay": 0.0, **settings, "params": vectors})
    return [group for group in groups if group["params"]]


def _unmatched(pattern: str, patterns: list[str], names: list[str]) -> str:
    if matched := [name for name in names if fnmatchcase(name, pattern)]:
        earlier = next(q for q in patterns if fnmatchcase(matched[0], q))
        return (
            f"Sophia.groups: all that {pattern!r} matches is taken by patterns before it ({matched[0]} by "
            f"{earlier!r}), as the first that matches counts: it would have no effect. Put it before them, "
            "or leave it out"
        )
    text = pattern.strip("*")
    close = [name for name in names if text.lower() in name.lower()]
    close = close or difflib.get_close_matches(text, names, n=3, cutoff=0.4)
    near = f" Names near to it: {', '.join(close[:3])}." if close else ""
    return (
        f"Sophia.groups: {pattern!r} matches the name of no parameter, so that it would have no effect."
        f"{near} A pattern is matched with the whole name, as in a shell: '*embed*', 'blocks.0.*'; "
        "model.named_parameters() has the names"
    )
