"""Search with the same number of trials for every contender, each over its own declared space.

The first trials are spread evenly over the space (a scrambled Halton sequence); the rest are proposed by
Optuna's TPE from what has been seen. The rule, the space, the seed and the number of trials are fixed before
the first trial. A trial is an ordinary run, whose configuration's hash is its folder: a search that was
killed goes on without repeating anything, and proposes what it would have proposed. Nothing is pruned,
because an early loss does not tell the last one.

The seed of a search is none of a comparison's. A trial that diverges loses to every one that does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from sophia.lab.config.protocol_parts import Search
from sophia.lab.config.run import Run, Setting
from sophia.lab.config.search_space import Choice, LogRange, Space
from sophia.lab.training.run_folder import Record
from sophia.lab.training.trackers import Trackers
from sophia.lab.training.workers import Events, execute

__all__ = ["Trial", "begun_runs", "best", "rounds", "search"]


@dataclass(frozen=True)
class Trial:
    """One point of the space, and the loss it gave."""

    contender: str
    number: int
    point: Mapping[str, Setting]
    loss: float | None
    """None if it diverged."""
    run: str
    """Hash of the run."""


def search(
    spaces: Mapping[str, Space],
    make_run: Callable[[str, Mapping[str, Setting]], Run],
    rule: Search,
    folder: Path,
    *,
    workers: int,
    events: Events,
    save_every: int = 100,
    trackers: Trackers | None = None,
) -> list[Trial]:
    """Do the trials that are missing and return all, in the order contender by contender.

    Args:
        spaces: for each contender, what may vary.
        make_run: (contender, point) -> the run of that trial.
        rule: trials, how they are chosen, and the seed.
        folder: gets ``journal.log`` (Optuna's) and ``runs/``.
        workers: runs at a time.
        events: told of progress.
        save_every: steps between two checkpoints of a run.
        trackers: they get the curves of the runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    storage = _storage(folder)
    studies = {name: _study(name, space, rule, storage) for name, space in spaces.items()}
    runs = folder / "runs"
    while True:
        asked = [
            (name, trial, _point(spaces[name], trial.params))
            for name, study in studies.items()
            for trial in _open(study, spaces[name], rule)
        ]
        if not asked:
            break
        configs = {(name, trial.number): make_run(name, point) for name, trial, point in asked}
        # The contenders in turn, so that a search that is stopped has treated them alike.
        order = sorted(configs, key=lambda key: (key[1], list(spaces).index(key[0])))
        execute(
            [configs[key] for key in order],
            runs,
            workers=workers,
            events=events,
            save_every=save_every,
            trackers=trackers,
        )
        for name, trial, _ in asked:
            result = Record(runs, configs[name, trial.number]).result()
            assert result is not None, "execute raises for runs without a result"
            loss = result["loss"]
            studies[name].tell(trial.number, math.inf if loss is None else float(loss), skip_if_finished=True)
    return [
        Trial(name, t.number, point := _point(spaces[name], t.params), _loss(t), make_run(name, point).hash)
        for name, study in studies.items()
        for t in study.trials[: rule.trials]
    ]


def rounds(
    spaces: Mapping[str, Space],
    make_run: Callable[[str, Mapping[str, Setting]], Run],
    rule: Search,
    folder: Path,
) -> list[list[str]]:
    """The contender of every trial that is left, in the order of the trials; a round begins when the one
    before has ended. Arguments are those of `search`.
    """
    ended = dict.fromkeys(spaces, 0)
    run = dict.fromkeys(spaces, 0)  # trials whose run has ended, while others of their round have not
    if (folder / "journal.log").exists():
        storage = _storage(folder)
        for study in optuna.get_all_study_summaries(storage):
            name = study.study_name
            trials = optuna.load_study(study_name=name, storage=storage).trials
            ended[name] = sum(trial.state.is_finished() for trial in trials)
            begun = [_point(spaces[name], t.params) for t in trials if t.state == TrialState.RUNNING]
            run[name] = sum(Record(folder / "runs", make_run(name, p)).result() is not None for p in begun)
    found = []
    while any(count < rule.trials for count in ended.values()):
        wanted = {name: _wanted(count, rule) for name, count in ended.items()}
        left = {name: wanted[name] - count - run[name] for name, count in ended.items()}
        if any(left.values()):
            found.append([n for turn in range(max(left.values())) for n in left if turn < left[n]])
        ended, run = wanted, dict.fromkeys(spaces, 0)
    return found


def begun_runs(
    spaces: Mapping[str, Space], make_run: Callable[[str, Mapping[str, Setting]], Run], folder: Path
) -> list[Run]:
    """The runs of all trials that were begun before. Arguments are those of `search`."""
    if not (folder / "journal.log").exists():
        return []
    storage = _storage(folder)
    names = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    return [
        make_run(name, _point(spaces[name], trial.params))
        for name in names
        for trial in optuna.load_study(study_name=name, storage=storage).trials
        if trial.state != TrialState.WAITING
    ]


def best(trials: Sequence[Trial], contender: str) -> Trial | None:
    """The trial of a contender with the lowest loss; None if all diverged."""
    finished = [t for t in trials if t.contender == contender and t.loss is not None]
    return min(finished, key=lambda t: t.loss or 0.0, default=None)


def _study(name: str, space: Space, rule: Search, storage: BaseStorage) -> optuna.Study:
    # TPE takes the evenly spread trials for its own random ones.
    sampler = optuna.samplers.TPESampler(seed=rule.seed, n_startup_trials=rule.spread, multivariate=False)
    study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
    if study.trials:
        _replay(study, space, rule)
    else:
        _spread(study, space, rule)
    return study


def _spread(study: optuna.Study, space: Space, rule: Search) -> None:
    points = qmc.Halton(len(space), seed=rule.seed).random(min(rule.spread, rule.trials))
    for row in points.tolist():
        study.enqueue_trial(
            {setting: _at(kind, u) for (setting, kind), u in zip(space.items(), row, strict=True)}
        )


def _replay(study: optuna.Study, space: Space, rule: Search) -> None:
    """Ask again, in memory, for what was asked before: a sampler keeps the state of its random numbers
    nowhere, and one made anew would propose from its first numbers.
    """
    shadow = optuna.create_study(sampler=study.sampler)
    _spread(shadow, space, rule)
    begun = [t for t in study.trials if t.state != TrialState.WAITING]
    for batch in (begun[: rule.spread], *([trial] for trial in begun[rule.spread :])):
        for _ in batch:
            shadow.ask(fixed_distributions=_distributions(space))
        for trial in batch:
            if trial.state.is_finished():
                shadow.tell(trial.number, trial.value)


def _open(study: optuna.Study, space: Space, rule: Search) -> list[FrozenTrial]:
    """Trials to be done now: begun ones first, then all that are spread, then one at a time."""
    finished = [t for t in study.trials if t.state.is_finished()]
    running = [t for t in study.trials if t.state == TrialState.RUNNING]
    for _ in range(_wanted(len(finished), rule) - len(finished) - len(running)):
        study.ask(fixed_distributions=_distributions(space))
    return [t for t in study.get_trials() if t.state == TrialState.RUNNING]


def _wanted(finished: int, rule: Search) -> int:
    """How many trials of a contender are finished after the next round."""
    return min(rule.trials, rule.spread if finished < rule.spread else finished + 1)


def _storage(folder: Path) -> JournalStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(folder / "journal.log")))


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    # A choice is searched by its place: the values are ordered, and a place can be spread evenly.
    return {
        name: FloatDistribution(kind.low, kind.high, log=True)
        if isinstance(kind, LogRange)
        else IntDistribution(0, len(kind.values) - 1)
        for name, kind in space.items()
    }


def _at(kind: LogRange | Choice, u: float) -> float | int:
    if isinstance(kind, Choice):
        return int(u * len(kind.values))
    return float(kind.low * (kind.high / kind.low) ** u)


def _point(space: Space, params: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings from Optuna's numbers; three digits are enough and can be written down."""
    return {
        name: float(f"{params[name]:.2e}") if isinstance(kind, LogRange) else kind.values[params[name]]
        for name, kind in space.items()
    }


def _loss(trial: FrozenTrial) -> float | None:
    return trial.value if trial.value is not None and math.isfinite(trial.value) else None
