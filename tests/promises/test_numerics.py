"""The versions of Sophia's numbers: ten steps of a tiny GPT on every path, against stored values.

The values stand in numerics.json beside this file. They were made, and are made again, by

    python tests/promises/test_numerics.py --write

which refuses where numbers have changed and no version has been raised.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from sophia import Sophia, numerics
from sophia.likelihoods import Categorical

if __name__ == "__main__":  # started as a script, to write the values
    sys.path.insert(0, str(Path(__file__).parents[1]))
from needs import skip_if_probes_are_others
from tiny import GPT, V

STORED = Path(__file__).with_name("numerics.json")
STEPS, ROWS, LENGTH = 10, 8, 12
SINGLE = Categorical(pairs=0)

# By name: the parts that the case goes through, arguments of Sophia, and what the loop does otherwise. In
# float64, where the order of sums, the kernel and the processor cannot be seen: they leave 1e-14.
CASES = {
    "paper, gnb": ("paper gnb", {}, {}),
    "half of the rows": ("paper gnb", {"fraction": 0.5}, {}),
    "two micro-batches, one of them used": ("paper gnb", {"fraction": 0.5}, {"micro_batches": 2}),
    "four micro-batches, all used": ("paper gnb", {}, {"micro_batches": 4}),
    "padding": ("paper gnb", {}, {"padding": True}),
    "clipped gradients": ("paper gnb", {}, {"clip": 0.5}),
    "resumed": ("paper gnb", {}, {"resumed": 5}),
    "single labels": ("paper gnb_single", {"likelihood": SINGLE}, {}),
    "hutchinson": ("paper hutchinson", {"estimator": "hutchinson", "gamma": 0.01}, {}),
    "empirical fisher": ("paper empirical_fisher", {"estimator": "empirical_fisher"}, {}),
    "damped": ("damped gnb", {"rule": "damped"}, {}),
    "damped, half of the rows": ("damped gnb", {"rule": "damped", "fraction": 0.5}, {}),
    "damped, hutchinson": ("damped hutchinson", {"rule": "damped", "estimator": "hutchinson"}, {}),
    "spectral": ("spectral", {"rule": "spectral", "fraction": 1 / 8}, {}),
    "spectral, resumed": ("spectral", {"rule": "spectral", "fraction": 1 / 8}, {"resumed": 5}),
    "whitened": ("whitened", {"rule": "whitened", "fraction": 1 / 8}, {}),
    "whitened, resumed": ("whitened", {"rule": "whitened", "fraction": 1 / 8}, {"resumed": 5}),
    "float32": ("paper gnb", {}, {"dtype": torch.float32}),
    "state in bfloat16": ("paper gnb", {"state_dtype": torch.bfloat16}, {"dtype": torch.float32}),
    "forwards in bfloat16": ("paper gnb", {}, {"dtype": torch.float32, "autocast": True}),
}

KEPT = {
    "hessian": "h",
    "exp_avg_sq": "v",
    "mean_squares": "mean squares",
    "basis_squares": "mean squares along Q",
    "second_moment": "M",
}
"""What a rule divides by, by its name in the state."""

# The others agree to 1e-6. Measured with and without the compiled kernel, by one thread and two, and with
# the plain instructions of the processor (ATEN_CPU_CAPABILITY=default):
TOLERANCE = {
    "float32": 5e-6,  # 6e-7: rounding
    "state in bfloat16": 5e-5,  # 6e-6: an entry whose float32 differs in its last bit is rounded elsewhere
    "forwards in bfloat16": 0.1,  # 2e-2: processors add up products of bfloat16 differently
}


def steps(
    settings,
    *,
    micro_batches=1,
    padding=False,
    clip=None,
    resumed=None,
    dtype=torch.float64,
    autocast=False,
):
    """The losses of ten steps; then the sum of h and the distance gone, by kind of tensor."""
    model = GPT().to(dtype)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():  # uniform numbers are the same on every processor, normal ones are not
        for name, p in model.named_parameters():
            width = 0.4 if p.ndim > 1 else 0.1
            p.copy_(torch.rand(p.shape, generator=draw, dtype=torch.float64).sub_(0.5).mul_(width))
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    start = [p.detach().clone() for p in model.parameters()]
    # eps: the gradients of the biases of keys are rounding, and m over the default of 1e-12 would show it.
    settings = {"lr": 1e-2, "update_every": 3, "fraction": 1.0, "seed": 5, "eps": 1e-6, **settings}
    opt = Sophia(model, **settings)
    losses = []
    for step in range(STEPS):
        if step == resumed:
            saved = opt.state_dict()
            opt.detach()
            opt = Sophia(model, **settings)
            opt.load_state_dict(saved)
        ids = torch.randint(V, (ROWS, LENGTH + 1), generator=draw)
        inputs, targets = ids[:, :-1], ids[:, 1:].clone()
        for row in range(ROWS if padding else 0):
            targets[row, LENGTH - row :] = -1
        opt.zero_grad()
        loss = 0.0
        for x, y in zip(inputs.chunk(micro_batches), targets.chunk(micro_batches), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                part = model(x, y)[1] / micro_batches
            part.backward()
            loss += float(part.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        losses.append(loss)
    found = {f"loss of step {step}": loss for step, loss in enumerate(losses)}
    for kind in ("tables", "matrices", "vectors"):
        own = [
            (p, before)
            for (name, p), before in zip(model.named_parameters(), start, strict=True)
            if kind == ("vectors" if p.ndim == 1 else "matrices" if "blocks" in name else "tables")
        ]
        for name, words in KEPT.items():
            kept = [opt.state[p][name].double().sum() for p, _ in own if name in opt.state[p]]
            found |= {f"{words} of {kind}": float(sum(kept))} if kept else {}
        found[f"way of {kind}"] = float(sum((p.detach() - before).double().abs().sum() for p, before in own))
    return found


def run(case, **more):
    _, settings, loop = CASES[case]
    return steps({**settings, **more}, **loop)


def furthest(found, stored):
    """The largest relative difference of two sets of values, and where it is."""
    return max((abs(found[where] - value) / abs(value), where) for where, value in stored.items())


def changed(case, stored):
    """What to do about numbers that are not the stored ones; None if they are."""
    parts = CASES[case][0].split()
    if case not in stored["values"]:
        return None
    difference, where = furthest(run(case), stored["values"][case])
    if difference <= TOLERANCE.get(case, 1e-6):
        return None
    return (
        f"{case}: the {where} is {difference:.1e} off what it was, so Sophia computes other numbers than it "
        "did, and runs of before and after are two optimizers under one name. If that is not meant, mend it. "
        f"If it is: raise the part whose numbers changed ({' or '.join(parts)}) by a line in the HISTORY of "
        "src/sophia/numerics.py and a line in CHANGELOG.md, then make the values again: "
        "python tests/promises/test_numerics.py --write"
    )


@pytest.mark.parametrize("case", CASES)
def test_numbers_change_with_their_version_alone(case):
    """Else results of two optimizers would stand under the name of one run."""
    if "hutchinson" in case:
        skip_if_probes_are_others()
    stored = json.loads(STORED.read_text())
    assert case in stored["values"], "a new case: make the values again by the command at the top"
    if message := changed(case, stored):
        pytest.fail(message, pytrace=False)


def test_the_values_are_those_of_todays_versions():
    """Else a version could be raised and the numbers stay, or a part be left out."""
    assert json.loads(STORED.read_text())["versions"] == dict(numerics.VERSIONS)
    assert {part for parts, _, _ in CASES.values() for part in parts.split()} == set(numerics.VERSIONS)


@pytest.mark.parametrize("case", [name for name, (parts, _, _) in CASES.items() if "gnb" in parts.split()])
def test_single_labels_in_place_of_pairs_are_seen(case):
    """Else the values would let pass the very change for which they were made."""
    stored = json.loads(STORED.read_text())["values"][case]
    difference, _ = furthest(run(case, likelihood=SINGLE), stored)
    assert difference > 2 * TOLERANCE.get(case, 1e-6)


def test_every_version_says_what_it_changed():
    """Else a number would be raised and nobody could say why."""
    for part, lines in numerics.HISTORY.items():
        for line in lines:
            commit, _, what = line.partition(" ")
            assert len(commit) == 7, part
            assert set(commit) <= set("0123456789abcdef"), part
            assert len(what) > 10, part


def write():
    """Make the values again. Refuses where numbers changed under a version that has not."""
    torch.set_num_threads(1)
    if STORED.exists():
        stored = json.loads(STORED.read_text())
        for case, (parts, _, _) in CASES.items():
            same = all(stored["versions"].get(part) == numerics.VERSIONS[part] for part in parts.split())
            if same and (message := changed(case, stored)):
                raise SystemExit(message)
    content = {"versions": dict(numerics.VERSIONS), "values": {case: run(case) for case in CASES}}
    STORED.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
