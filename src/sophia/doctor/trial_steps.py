"""Checks of a model: what Sophia finds in it, and twenty steps beside AdamW."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sophia.checks import SophiaWarning
from sophia.diagnostics import advice
from sophia.doctor.findings import Finding
from sophia.doctor.given_model import Subject, SubjectError
from sophia.doctor.what_is_proved import of_account, of_outputs
from sophia.optimizer import Sophia
from sophia.refresh.account import Account, OfOutput, outputs_in

__all__ = ["check_training"]

Optimizer = torch.optim.Optimizer


@dataclass
class _Run:
    """Losses and seconds of an optimizer's steps, and on which of them h was renewed."""

    subject: Subject
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    refreshed: list[int] = field(default_factory=list)

    def step(self) -> None:
        before = self._refreshes()
        begun = _clock(self.subject)
        self.optimizer.zero_grad()
        loss = self.subject.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.seconds.append(_clock(self.subject) - begun)
        if self._refreshes() > before:
            self.refreshed.append(len(self.losses))
        self.losses.append(float(loss.detach()))

    def _refreshes(self) -> float:
        return float(self.optimizer.param_groups[0].get("refreshes", 0))


def _clock(subject: Subject) -> float:
    """Seconds of the processor, which other programs do not stretch; of the wall for work on a GPU."""
    if any(p.is_cuda for p in subject.model.parameters()):
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def check_training(
    make_subject: Callable[[], Subject],
    make_optimizer: Callable[[Any], Any] | None = None,
    *,
    steps: int = 20,
    lr: float = 1e-3,
) -> list[Finding]:
    """Attach to a model, then train it for some steps, and its like with AdamW beside it.

    Args:
        make_subject: makes a model and its loss; called twice.
        make_optimizer: takes the model and returns the optimizer, or an optimizer class of torch's manner;
            ``Sophia(model, lr=lr)`` by default.
        steps: of each.
        lr: of both, where it is ours to choose.
    """
    accounts: list[Account] = []  # of the refreshes
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SophiaWarning)
        findings = list(_training(make_subject, make_optimizer, steps, lr, accounts))
    said = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, SophiaWarning))
    return [*findings, *(_warned(text, accounts) for text in said)]


def _warned(text: str, accounts: Sequence[Account]) -> Finding:
    # Of what costs more than it might, with an h that is right, the user need not be rid.
    of_cost = any(account.rows.words == text for account in accounts)
    return Finding("training", "note" if of_cost else "wrong", f"Sophia warns: {text}")


def _training(
    make_subject: Callable[[], Subject],
    make_optimizer: Callable[[Any], Any] | None,
    steps: int,
    lr: float,
    accounts: list[Account],
) -> Iterator[Finding]:
    try:
        run = _begun(make_subject(), make_optimizer, lr)
    except SubjectError:
        raise
    except Exception as error:
        yield Finding("model", "wrong", f"the optimizer cannot be made: {type(error).__name__}: {error}")
        return
    yield from _attached(run)
    if isinstance(run.optimizer, Sophia):
        run.optimizer._refresher.accounts = accounts
    try:
        seen = _outputs_seen(run)
    except SubjectError:
        raise
    except Exception as error:
        yield Finding("model", "wrong", f"{type(error).__name__}: {error}")
        return
    if isinstance(run.optimizer, Sophia) and run.optimizer._was_found:
        yield Finding("model", "ok", f"Sophia {run.optimizer._of_model()}")
    other = make_subject()
    other.model.train()
    control = _Run(other, torch.optim.AdamW(other.model.parameters(), lr=lr))
    for step in range(steps):
        try:
            run.step()
        except SubjectError:
            raise
        except Exception as error:
            if not accounts:
                yield from of_outputs(seen)
            yield Finding("training", "wrong", f"step {step} ends with {type(error).__name__}: {error}")
            return
        control.step()
    yield from of_account(accounts[0]) if accounts else of_outputs(seen)
    yield _falling(run)
    yield from _refreshes(run, steps)
    yield _cost(run, control)


def _begun(subject: Subject, make: Callable[[Any], Any] | None, lr: float) -> _Run:
    subject.model.train()
    if make is None:
        return _Run(subject, Sophia(subject.model, lr=lr))
    factory: Any = make
    if isinstance(make, type) and issubclass(make, Optimizer) and not issubclass(make, Sophia):
        return _Run(subject, factory(subject.model.parameters(), lr=lr))
    optimizer = factory(subject.model)
    if not isinstance(optimizer, Optimizer):
        raise SubjectError(
            f"--optimizer made {type(optimizer).__name__}, not a torch.optim.Optimizer. Give a function that "
            "takes the model and returns one, or a class"
        )
    return _Run(subject, optimizer)


def _attached(run: _Run) -> Iterator[Finding]:
    """What a Sophia is attached to, if it is."""
    optimizer, name = run.optimizer, type(run.subject.model).__name__
    size = sum(p.numel() for p in run.subject.model.parameters())
    yield Finding("model", "ok", f"{name}, {size:,} parameters", {"model": name, "parameters": size})
    if not isinstance(optimizer, Sophia) or (optimizer._recorder is None and optimizer._search is None):
        kind = type(optimizer).__name__
        yield Finding(
            "model",
            "note",
            f"{kind} is not attached to the model, so there is nothing to be found. Whether it is Sophia is "
            "another question: sophia audit module:Class",
        )


def _outputs_seen(run: _Run) -> tuple[OfOutput, ...]:
    """What one forward and backward show, for a step that does not come to its refresh."""
    optimizer = run.optimizer
    if not isinstance(optimizer, Sophia) or (optimizer._recorder is None and optimizer._search is None):
        return ()
    loss = run.subject.loss()
    loss.backward()  # type: ignore[no-untyped-call]
    recorder = optimizer._recorder
    if recorder is None:  # none of the modules that own the parameters was called: the step will say it
        return ()
    reached = any(recording.reached for recording in recorder.recordings)
    seen = outputs_in(recorder) if reached else ()
    optimizer.zero_grad()
    return seen


def _falling(run: _Run) -> Finding:
    first, last = statistics.mean(run.losses[:5]), statistics.mean(run.losses[-5:])
    data = {"losses": run.losses}
    text = f"loss {run.losses[0]:.4g} at first, {run.losses[-1]:.4g} after {len(run.losses)} steps"
    if all(map(math.isfinite, run.losses)) and last < first:
        return Finding("training", "ok", text, data)
    return Finding(
        "training",
        "wrong",
        f"{text}: it does not fall (first and last five: {first:.4g}, {last:.4g}). Try --lr, or a batch that "
        "stays the same",
        data,
    )


def _refreshes(run: _Run, steps: int) -> Iterator[Finding]:
    if not isinstance(run.optimizer, Sophia):
        return
    every = run.optimizer.param_groups[0]["update_every"]
    expected = list(range(0, steps, every))
    stats = run.optimizer.stats()
    data = {"refreshed": run.refreshed, "expected": expected, **stats}
    if run.refreshed == expected:
        yield Finding(
            "training", "ok", f"h was renewed on the steps {expected}, from B = {stats['B']:.0f}", data
        )
    else:
        yield Finding(
            "training",
            "wrong",
            f"h was renewed on the steps {run.refreshed}, but update_every={every} means {expected}",
            data,
        )
    hint = advice(stats)
    if hint:
        yield Finding("training", "note", f"{hint} (after {steps} steps h is young: not a judgement yet)")


def _cost(run: _Run, control: _Run) -> Finding:
    """Medians without the first step, in which memory is asked for and kernels are chosen."""
    theirs = statistics.median(control.seconds[1:])
    plain = [s for i, s in enumerate(run.seconds) if i and i not in run.refreshed]
    renewing = [s for i, s in enumerate(run.seconds) if i and i in run.refreshed]
    ratio = statistics.median(plain) / theirs if plain else math.nan
    data = {"step_over_adamw": ratio}
    text = f"a step (forward, backward, update) takes {ratio:.2f} of AdamW's time"
    if renewing and isinstance(run.optimizer, Sophia):
        every = run.optimizer.param_groups[0]["update_every"]
        refresh = statistics.median(renewing) / theirs
        average = (ratio * (every - 1) + refresh) / every if plain else refresh
        data |= {"refresh_step_over_adamw": refresh, "average_over_adamw": average}
        text += f", one with a refresh {refresh:.2f}: {average:.2f} on average with update_every={every}"
    return Finding("training", "ok", f"{text} (a rough figure, from few steps)", data)
