"""docs/hosts/fastai.md: an optimizer made anew at each fit, of parameters alone."""

from functools import partial

import pytest
import torch
from pages import refreshed, run, watching
from small_models import Classifier, examples

pytest.importorskip("fastai.callback.training", reason="needs fastai (extra [hosts-images])")

import fastai.callback.schedule  # noqa: F401  # fit_one_cycle
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper

from sophia import Sophia

pytestmark = pytest.mark.filterwarnings("ignore")


def dls():
    rows = list(zip(*examples(96), strict=True))
    return DataLoaders(DataLoader(rows, bs=4, shuffle=False), DataLoader(rows[:8], bs=4), device="cpu")


def test_page():
    """A wrapper that hands over parameters, and steps that its callback leaves out."""
    _, steps = run("fastai.md", "A learner", dls=dls(), model=Classifier())
    assert [taken.step for taken in steps] == list(range(12))
    assert refreshed(steps) == [0, 10]
    assert {taken.counted for taken in steps} == {4}


def learner(model, **settings):
    opt_func = partial(OptimWrapper, opt=Sophia)
    accumulation = GradientAccumulation(n_acc=8)
    return Learner(
        dls(), model, loss_func=torch.nn.CrossEntropyLoss(), opt_func=opt_func, cbs=[accumulation], **settings
    )


def test_one_cycle_moves_the_decay_of_m_alone():
    """A schedule of fastai's that reaches for the decay of h, or for a setting that is not there."""
    learn = learner(Classifier())
    with watching() as steps, learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 6e-4)
    assert refreshed(steps) == [0, 10]
    assert len({taken.lr for taken in steps}) == 12
    first, second = learn.opt.opt.param_groups[0]["betas"]
    assert 0.85 < first < 0.95
    assert second == 0.99


def test_frozen_layers_have_no_curvature_until_they_are_unfrozen():
    """``freeze`` and ``unfreeze``: state for what does not train, or none for what does."""
    model = Classifier()

    def splitter(model):
        return [list(model.hidden.parameters()), list(model.head.parameters())]

    learn = learner(model, splitter=splitter)
    learn.freeze()
    with watching() as steps, learn.no_bar(), learn.no_logging():
        learn.fit(1, 6e-4)
    assert refreshed(steps) == [0, 10]
    assert set(learn.opt.opt.state) == set(model.head.parameters())
    learn.unfreeze()  # and fastai empties the state
    assert not learn.opt.opt.state
    with watching() as steps, learn.no_bar(), learn.no_logging():
        learn.fit(1, 6e-4)
    assert [taken.step for taken in steps] == list(range(12, 24))
    assert refreshed(steps) == [20]
    assert bool(learn.opt.opt.state[model.hidden.weight]["hessian"].any())
