"""Hidden matrices told from embeddings, head and vectors; parameter groups by kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sophia.step.groups import is_vector
from sophia.step.rules import RULES, Rule

__all__ = [
    "groups_by_kind",
    "hidden_matrices",
    "model_that_tells_kinds",
    "move_by_kind",
    "rule_of",
    "rules_of",
]


def hidden_matrices(model: nn.Module) -> set[int]:
    """The ids of a model's matrices that are neither embedding nor head.

    Embeddings are the weights of ``nn.Embedding`` and ``nn.EmbeddingBag`` and what is tied to them; the head
    is what ``get_output_embeddings()`` of transformers gives, or else the linear layer registered last.
    """
    return {id(p) for p in _hidden(model) if p.ndim == 2}


def move_by_kind(params: Any, rule: Rule) -> bool:
    """Whether kinds of tensors must be told apart for some of these groups. One that names its scale is done
    with that.
    """
    if isinstance(params, (list, tuple)) and params and isinstance(params[0], Mapping):
        return any("scale" not in group and rule_of(group, rule).needs_model for group in params)
    return rule.needs_model


def groups_by_kind(params: Iterable[Any], model: nn.Module, rule: Rule) -> list[dict[str, Any]]:
    """Groups by kinds of tensors, of those that a rule with kinds moves: theirs if they name one, or this.

    Hidden matrices are moved by that rule; hidden tensors that are no matrices (kernels of convolutions,
    stacked experts) by ``rule.otherwise``, as far as its hidden matrices; embeddings, head and vectors by it
    too, further.
    """
    given = list(params)
    groups: list[dict[str, Any]] = []
    hidden_dimensions = {id(p): p.ndim for p in _hidden(model)}
    for group in given if given and isinstance(given[0], Mapping) else [{"params": given}]:
        mine = rule_of(group, rule)
        if "scale" in group or not mine.needs_model:
            groups.append(dict(group))
            continue
        other = mine.otherwise or mine
        (hidden, rest), (of_other, _) = mine.kind_scales or (1.0, 1.0), other.kind_scales or (1.0, 1.0)
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        kinds: dict[tuple[str, float], list[Any]] = {
            (mine.name, hidden): [],
            (other.name, of_other): [],
            (other.name, rest): [],
        }
        for member in members:
            dimensions = hidden_dimensions.get(id(member[1] if isinstance(member, tuple) else member))
            by = mine if dimensions == 2 else other
            kinds[by.name, rest if dimensions is None else hidden if by is mine else of_other].append(member)
        for (name, scale), some in kinds.items():
            groups += [{**group, "params": some, "rule": name, "scale": scale}] if some else []
        groups += [] if members else [dict(group)]  # torch has words for an empty group
    return groups


def rule_of(group: Mapping[str, Any], rule: Rule) -> Rule:
    """The rule that a group names, or else this one. A name that is none is refused with the group."""
    name = group.get("rule", rule.name)
    return RULES.get(name, rule) if isinstance(name, str) else rule


def rules_of(params: Any, rule: Rule) -> list[Rule]:
    """Those of some groups, or this one for parameters."""
    if isinstance(params, list) and params and all(isinstance(group, Mapping) for group in params):
        return [rule_of(group, rule) for group in params]
    return [rule]


def model_that_tells_kinds(owners: Sequence[nn.Module], parameters: Sequence[Tensor]) -> nn.Module | None:
    """The model among modules that all own these parameters, of which some are wrappers of it and some its
    parts; None if there is none.

    A part may lack the head: a backbone owns a head's weight that is tied to its embeddings, and the linear
    layer registered last is another there. So who names the head is believed, or else who has these
    parameters in the most places; then all must tell the same.

    Raises:
        ValueError: they do not.
    """
    ours = {id(parameter) for parameter in parameters if parameter.requires_grad}
    ours = ours or {id(parameter) for parameter in parameters}
    telling = [m for m in owners if callable(f := getattr(m, "get_output_embeddings", None)) and f()]
    if not telling:
        places = [sum(id(p) in ours for m in o.modules() for p in m._parameters.values()) for o in owners]
        telling = [owner for owner, number in zip(owners, places, strict=True) if number == max(places)]
    told = [{id(p) for p in _hidden(owner)} & ours for owner in telling]
    for owner, hidden in zip(telling, told, strict=True):
        if hidden != told[-1]:
            shape = next(tuple(p.shape) for p in parameters if id(p) in hidden ^ told[-1])
            raise ValueError(
                f"{type(owner).__name__} and {type(telling[-1]).__name__} both own the parameters, and in "
                f"one of them the matrix of shape {shape} is the head (the linear layer registered last), "
                "which moves by another rate than hidden matrices, in the other it is not. Pass "
                "Sophia(model, ...) or Sophia(params, model=model, ...)"
            )
    return telling[-1] if telling else None


def _hidden(model: nn.Module) -> list[Tensor]:
    """What has two dimensions or more, and not only one number a row, and is neither embedding nor head."""
    named = getattr(model, "get_output_embeddings", None)
    head = named() if callable(named) else None
    if head is None:
        head = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    outer = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    outer |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    return [
        p
        for name, p in model.named_parameters()
        if not is_vector(name, p.shape) and p.ndim >= 2 and id(p) not in outer
    ]
