"""``Sophia(model.parameters())``: the module that owns the parameters is found, and is the one that
``Sophia(model)`` would record, or an error says why not.
"""

import copy
import gc
import logging
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from sophia import Sophia
from sophia.distributed.wrappers import unwrapped
from tiny import GPT, Bare, T, data

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "update_every": 2}


class Around(nn.Module):
    """A wrapper that passes the call on."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args):
        return self.inner(*args)


class Beside(nn.Module):
    """A module that holds the model but is not called: its ``training_step`` is."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.meter = nn.Linear(2, 2)

    def training_step(self, x, y):
        return loss_of(self.model, x, y)


class Tied(nn.Module):
    """A language model whose backbone owns all of its parameters, as the head is the table of tokens."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.backbone[0].weight

    def forward(self, ids):
        return self.head(self.backbone(ids))


def loss_of(call, x, y):
    return F.cross_entropy(call(x).flatten(0, 1), y.flatten())


def train(opt, call, steps=3, batch=None):
    x, y = data(8) if batch is None else batch
    for _ in range(steps):
        opt.zero_grad()
        loss_of(call, x, y).backward()
        opt.step()


def same(one, other):
    """Whether two optimizers of equal models have done the same, bit for bit."""
    pairs = zip(one._parameters(), other._parameters(), strict=True)
    return all(
        torch.equal(p, q) and torch.equal(one.state[p]["hessian"], other.state[q]["hessian"])
        for p, q in pairs
    )


def hooked(model):
    """The modules inside ``model`` that have hooks before their forward."""
    return [module for module in model.modules() if module._forward_pre_hooks]


# ---- every form in which torch takes parameters ----

FORMS = {
    "parameters": lambda m: m.parameters(),
    "list": lambda m: list(m.parameters()),
    "named_parameters": lambda m: m.named_parameters(),
    "groups": lambda m: [
        {"params": [p for p in m.parameters() if p.ndim > 1]},
        {"params": (p for p in m.parameters() if p.ndim < 2), "weight_decay": 0.0},
    ],
    "named groups": lambda m: [{"params": list(m.named_parameters()), "lr": 2e-3}],
    "one tensor a group": lambda m: [{"params": p} for p in m.parameters()],
    "generator of groups": lambda m: ({"params": [p]} for p in m.parameters()),
}


@pytest.mark.parametrize("rule", ["paper", "damped"])
@pytest.mark.parametrize("form", FORMS)
def test_found_is_given(form, rule):
    """Other groups, another module, or a first forward that is lost: B and h of step 0 differ."""
    found, given = Bare(), Bare()
    one = Sophia(FORMS[form](found), rule=rule, **SETTINGS)
    other = Sophia(FORMS[form](given), model=given, rule=rule, **SETTINGS)
    train(one, found, 1)
    assert one._model is found
    assert one.stats()["B"] == T  # a row of eight
    train(one, found, 3)
    train(other, given, 1)
    train(other, given, 3)
    assert same(one, other)
    keys = ("lr", "weight_decay", "rule", "scale", "refreshes")
    of = [[tuple(group[key] for key in keys) for group in opt.param_groups] for opt in (one, other)]
    assert of[0] == of[1]


def test_arguments_that_torch_refuses_are_refused_in_its_words():
    """A search for the owner of nothing, whose error hides what is wrong."""
    p = nn.Parameter(torch.ones(2))
    for given, error, words in (
        ([], ValueError, "empty parameter list"),
        (p, TypeError, "should be an iterable"),
        ([{"params": {p}}], TypeError, "ordered"),
        ([{"lr": 1.0}], KeyError, "params"),
        ([1.0], TypeError, "can only optimize Tensors"),
    ):
        for rule in ("paper", "damped"):
            with pytest.raises(error, match=words):
                Sophia(given, rule=rule)


# ---- wrappers, before and after the optimizer ----

WRAPPERS = {
    "around": Around,
    "data parallel": nn.DataParallel,
    "two": lambda m: Around(Around(m)),
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "around a compiled one": lambda m: Around(torch.compile(m, backend="eager")),
}


@pytest.mark.parametrize("first", ["wrapper", "optimizer"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_leads_to_the_module_of_the_given_one(wrapper, first):
    """The wrong module: of no call, or of outputs that accept no backward."""
    torch._dynamo.reset()
    model = Bare()
    if first == "optimizer":
        opt = Sophia(model.parameters(), **SETTINGS)
        call = WRAPPERS[wrapper](model)
        expected = model
    else:
        call = WRAPPERS[wrapper](model)
        opt = Sophia(call.parameters(), **SETTINGS)
        expected = unwrapped(call)[0]
    train(opt, call)
    assert opt._model is expected
    assert hooked(call) == [opt._model]
    given = Bare()
    around = WRAPPERS[wrapper](given)
    other = Sophia(given.parameters(), model=given if first == "optimizer" else around, **SETTINGS)
    train(other, around)
    assert same(opt, other)


def test_the_module_that_is_called_not_the_one_that_holds_it():
    """A LightningModule, of which ``training_step`` is called."""
    holder = Beside(Bare())
    opt = Sophia(holder.model.parameters(), **SETTINGS)
    for _ in range(2):
        opt.zero_grad()
        holder.training_step(*data(8)).backward()
        opt.step()
    assert opt._model is holder.model
    assert hooked(holder) == [holder.model]


def test_a_backbone_that_owns_the_tied_head_is_not_the_model():
    """Hidden states taken for logits, as all parameters are those of the backbone."""
    x, y = torch.randint(0, 9, (8, 5)), torch.randint(0, 9, (8, 5))
    model = Tied()
    opt = Sophia(model.parameters(), **SETTINGS)
    train(opt, model, batch=(x, y))
    assert opt._model is model
    assert hooked(model) == [model]


@pytest.mark.parametrize("rule", ["damped", "spectral"])
@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
def test_kinds_of_tensors_are_those_of_the_given_model(rule, wrapper):
    """The last layer of a backbone taken for the head, which moves at another rate."""
    wrap = WRAPPERS.get(wrapper, lambda m: m)
    for made, named in ((Tied, 4), (GPT, 26)):
        model = made()
        assert len(list(model.parameters())) >= named // 2
        owner = wrap(model)
        assert owner is not None
        found = Sophia(model.parameters(), rule=rule)
        given = Sophia(model.parameters(), model=model, rule=rule)
        of = [
            [(g["rule"], g["scale"], [id(p) for p in g["params"]]) for g in opt.param_groups]
            for opt in (found, given)
        ]
        assert of[0] == of[1]


def test_owners_that_tell_another_head_are_refused():
    """An encoder's last layer is a head if the encoder is the model, and none if the whole is."""
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), nn.Linear(5, 2))
    with pytest.raises(
        ValueError, match=r"Sequential and Sequential both own .*\(5, 4\).*Pass Sophia\(model"
    ):
        Sophia(model[0].parameters(), rule="damped")
    assert hooked(model) == []
    assert len(Sophia(model[0].parameters(), model=model, rule="damped").param_groups) == 2


# ---- compilers ----

COMPILED = {
    "before": lambda m, build, **how: (c := torch.compile(m, **how), build(c)),
    "after": lambda m, build, **how: (build(m), torch.compile(m, **how))[::-1],
    "in place, before": lambda m, build, **how: (m.compile(**how), build(m), m)[:0:-1],
    "in place, after": lambda m, build, **how: (build(m), m.compile(**how), m)[::-2],
    "an inner one in place": lambda m, build, **how: (m.inner.compile(**how), build(m), m)[:0:-1],
}


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("looked_at", [False, True], ids=["trained", "looked at, trained"])
def test_no_graph_breaks_and_none_is_made_again(kind, fullgraph, looked_at):
    """A hook on an owner inside the compiled one, which its compiler would meet."""
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    model = Around(Tied())
    build = lambda m: Sophia(m.parameters(), **SETTINGS)
    call, opt = COMPILED[kind](model, build, backend=compiler, fullgraph=fullgraph)
    batch = torch.randint(0, 9, (8, 5)), torch.randint(0, 9, (8, 5))
    if looked_at:
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode:
                call(batch[0])
    train(opt, call, 5, batch)
    assert opt.stats()["refreshes"] == 3
    assert len(graphs) == counters["stats"]["unique_graphs"] == (2 if looked_at else 1)
    assert not counters["graph_break"]


# ---- more than one module, more than one optimizer ----


def test_two_wrappers_in_turn_are_ambiguous():
    """Half of the forwards would be lost without a word."""
    model = Bare()
    one, two = Around(model), Around(model)
    opt = Sophia(model.parameters(), **SETTINGS)
    del model
    one.inner.train()
    x, y = data(8)
    other = Sophia(two.parameters(), **SETTINGS)
    for call in (one, two):
        loss_of(call, x, y).backward()
    before = [p.clone() for p in one.parameters()]
    for built in (opt, other):
        with pytest.raises(RuntimeError, match=r"training forwards of Around and Around were seen"):
            built.step()
    assert all(map(torch.equal, before, one.parameters()))
    other.attach(one)
    loss_of(one, x, y).backward()
    other.step()


@pytest.mark.parametrize("backward", ["of the sum", "one by one"])
def test_two_wrappers_in_one_step_are_ambiguous(backward):
    """The same with one backward for both, which has not come when the second is called."""
    model = Bare()
    one, two = Around(model), Around(model)
    opt = Sophia(model.parameters(), **SETTINGS)
    x, y = data(8)
    losses = [loss_of(call, x, y) for call in (one, two)]
    for loss in [sum(losses)] if backward == "of the sum" else losses:
        loss.backward()
    with pytest.raises(RuntimeError, match="not known"):
        opt.step()


@pytest.mark.parametrize("probe", ["inner", "another"])
def test_a_forward_that_is_not_trained_does_not_decide(probe):
    """A summary of shapes, or a look at the first batch, before the training."""
    model = Bare()
    call, another = Around(model), Around(model)
    opt = Sophia(model.parameters(), **SETTINGS)
    x, y = data(8)
    (model if probe == "inner" else another)(x)
    train(opt, call, 1, (x, y))
    assert opt._model is call
    given = Bare()
    other = Sophia(given.parameters(), model=given, **SETTINGS)
    train(other, given, 1, (x, y))
    assert same(opt, other)
    assert hooked(another) == []


@pytest.mark.parametrize("first", ["part", "whole"])
def test_a_part_called_alone_and_in_the_whole(first):
    """The forwards of the one or of the other would be lost."""
    holder = Around(Bare())
    opt = Sophia(holder.parameters(), **SETTINGS)
    x, y = data(8)
    for call in (holder.inner, holder) if first == "part" else (holder, holder.inner):
        loss_of(call, x, y).backward()
    with pytest.raises(
        RuntimeError, match=r"training forwards of (Bare and Around|Around and Bare) were seen"
    ):
        opt.step()


@pytest.mark.parametrize("mode", ["training", "evaluation", "no gradients"])
def test_a_validation_through_another_module(mode):
    """As in a LightningModule that calls itself to validate, and its model to train, before and after."""
    module = Around(Bare())
    opt = Sophia(module.parameters(), **SETTINGS)
    x, y = data(8)
    given = Bare()
    other = Sophia(given.parameters(), model=given, **SETTINGS)

    def validate():
        module.train(mode == "training")
        with torch.set_grad_enabled(mode != "no gradients"):
            module(x)
        module.train()

    for half in (slice(0, 4), slice(4, 8)):
        validate()
        loss_of(module.inner, x[half], y[half]).backward()
        validate()
        loss_of(given, x[half], y[half]).backward()
    for each in (opt, other):
        each.step()
    assert opt._model is module.inner
    assert same(opt, other)
    assert hooked(module) == [module.inner]


def test_a_part_that_is_run_again_in_the_backward():
    """Activation checkpointing calls a part that owns all parameters outside of the whole's forward."""

    class Checkpointed(Tied):
        def forward(self, ids):
            return self.head(torch.utils.checkpoint.checkpoint(self.backbone, ids, use_reentrant=False))

    x, y = torch.randint(0, 9, (8, 5)), torch.randint(0, 9, (8, 5))
    model = Checkpointed()
    opt = Sophia(model.parameters(), **SETTINGS)
    train(opt, model, batch=(x, y))
    assert opt._model is model


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, z):
        return self.net(z)


def test_a_generator_and_its_discriminator():
    """Two optimizers, two modules, one of which runs inside the other's step."""

    def play(given):
        torch.manual_seed(0)
        g, d = Generator(), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        settings = {**SETTINGS, "likelihood": "bernoulli"}
        opt_d = Sophia(d.parameters(), model=d if given else None, **settings)
        opt_g = torch.optim.SGD(g.parameters(), 1e-2)
        for _ in range(3):
            opt_d.zero_grad()
            fake = g(torch.randn(8, 3)).detach()
            for x, label in ((torch.randn(8, 4), 1.0), (fake, 0.0)):
                F.binary_cross_entropy_with_logits(d(x), torch.full((8, 1), label)).backward()
            opt_d.step()
            opt_g.zero_grad()
            F.binary_cross_entropy_with_logits(d(g(torch.randn(8, 3))), torch.ones(8, 1)).backward()
            opt_g.step()
        assert opt_d._model is d
        return opt_d

    assert same(play(False), play(True))


def test_two_optimizers_over_parts_of_one_model():
    """A part that is not called alone: its module is that of the whole."""
    model, given = Bare(), Bare()
    both = []
    for net, named in ((model, None), (given, given)):
        body = Sophia(net.blocks.parameters(), model=named, **SETTINGS)
        ours = {id(p) for p in net.blocks.parameters()}
        rest = Sophia([p for p in net.parameters() if id(p) not in ours], model=named, **SETTINGS)
        x, y = data(8)
        for _ in range(3):
            net.zero_grad()
            loss_of(net, x, y).backward()
            body.step()
            rest.step()
        assert body._model is rest._model is net
        both.append((body, rest))
    assert all(same(one, other) for one, other in zip(*both, strict=True))
    assert hooked(model) == [model]


# ---- errors ----


def test_nobody_owns_all(monkeypatch):
    """Two models under one optimizer: the refresh would run half of what is trained."""
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)  # whoever froze the collector before, it is said
    encoder, decoder = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), Generator()
    parameters = [*encoder.parameters(), *decoder.parameters()]
    with pytest.raises(
        ValueError,
        match=r"^Sophia got parameters but no model.*all 8 .*\((Sequential|Generator) holds 4 of 8, "
        r"(Sequential|Generator) holds 4 of 8\).*one that holds them all",
    ):
        Sophia(parameters)
    with pytest.raises(ValueError, match=r"all 1 of them \(no module alive holds any\)"):
        Sophia([nn.Parameter(torch.ones(2))])
    assert hooked(encoder) == hooked(decoder) == []


def test_a_frozen_part_may_lie_elsewhere():
    """A teacher, or a network that measures, among the ``self.parameters()`` of a LightningModule."""
    holder = Beside(Bare())
    holder.meter.requires_grad_(False)
    for named in (None, holder.model):
        opt = Sophia(holder.parameters(), model=named, **SETTINGS)
        holder.training_step(*data(8)).backward()
        opt.step()
        assert opt._model is holder.model
    holder.meter.requires_grad_(True)
    for _ in range(2):
        holder.training_step(*data(8)).backward()
        if opt.param_groups[0]["step"] == 1:
            opt.step()
    with pytest.raises(RuntimeError, match=r"2 of 30 optimizer parameters are not, or no longer"):
        opt.step()


def test_a_list_of_modules_is_not_the_one_that_is_called():
    """``nn.ModuleList`` has no forward: hooks on it wait for ever."""
    layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"Linear holds 2 of 4, Linear holds 2 of 4"):
        Sophia(layers.parameters())


def test_objects_frozen_by_the_collector():
    """``gc.freeze()``, before a fork, hides what is alive."""
    model = nn.Linear(2, 2)
    gc.freeze()
    try:
        with pytest.raises(
            ValueError, match=r"no module alive holds any; modules made before gc\.freeze\(\)"
        ):
            Sophia(model.parameters())
    finally:
        gc.unfreeze()


class ByMethod(Bare):
    """A model of which another method than its forward is trained, as stable-baselines3's policies."""

    def evaluate(self, x):
        return self.forward(x)


@pytest.mark.parametrize("how", ["evaluation mode", "by a method", "no gradients"])
def test_nothing_was_called(how):
    """The names of the candidates, and what to do."""
    model = ByMethod()
    opt = Sophia(model.parameters(), **SETTINGS)
    x, y = data(8)
    if how == "by a method":
        loss_of(model.evaluate, x, y).backward()
    else:
        with torch.set_grad_enabled(how != "no gradients"):
            model.eval()(x)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before = [p.clone() for p in model.parameters()]
    where = r"no module that owns the parameters \(ByMethod\) ran|ByMethod ran no forward in training mode"
    with pytest.raises(RuntimeError, match=rf"a Hessian refresh is due.*({where})"):
        opt.step()
    assert all(map(torch.equal, before, model.parameters()))
    model.zero_grad()
    train(opt, model.train(), 1)  # the search goes on
    assert opt._model is model


def test_parameters_that_were_replaced():
    """As by a wrapper made after the optimizer: it trains what nobody uses any more."""
    model = Bare()
    opt = Sophia(model.parameters(), **SETTINGS)
    assert opt._model is None
    model.norm.weight = nn.Parameter(torch.ones_like(model.norm.weight))
    with pytest.raises(RuntimeError, match=r"1 of 28 optimizer parameters are not, or no longer"):
        model(data(8)[0])


# ---- what is said ----


def test_which_module_is_said(caplog):
    """Wrong modules that nobody sees."""
    model = Around(Bare())
    with caplog.at_level(logging.INFO, logger="sophia"):
        opt = Sophia(model.parameters(), **SETTINGS)
        assert repr(opt).startswith(
            "Sophia (will record the first that is called in training of Around, Bare\n"
        )
        train(opt, model)
    assert [record.getMessage() for record in caplog.records] == [
        "Sophia records the training forwards of Around, found by its parameters: of the modules that own "
        "them (Around, Bare) it was called"
    ]
    assert repr(opt).startswith("Sophia (records Around, found by its parameters\nParameter Group 0\n")
    assert repr(Sophia(model)).startswith("Sophia (records Around, given\n")
    assert repr(copy.deepcopy(opt)).startswith("Sophia (no model attached\n")
    assert repr(Sophia(model, mode="manual")).startswith("Sophia (\n")


def test_nothing_is_warned_of():
    """Users run with warnings as errors."""
    model = Around(Bare())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(Sophia(model.parameters(), fraction=1.0, **SETTINGS), model)


# ---- copies, state, groups, by hand ----


def test_nobody_is_kept_alive():
    """An optimizer that holds wrappers which the user has thrown away, or hooks that stay without it."""
    model = Bare()
    wrapper = Around(model)
    gone = weakref.ref(wrapper)
    opt = Sophia(model.parameters(), **SETTINGS)
    del wrapper
    gc.collect()
    assert gone() is None
    alive = weakref.ref(opt)
    assert hooked(model) == [model]
    gc.disable()  # by counting references alone
    try:
        del opt
        assert alive() is None
    finally:
        gc.enable()
    assert hooked(model) == []


def test_copies_and_pickles():
    """Copies that record the original's forwards, or pickles that need this library."""
    model = Around(Bare())
    opt = Sophia(model.parameters(), **SETTINGS)
    twin, copied = copy.deepcopy(model), copy.deepcopy(opt)
    loaded = pickle.loads(pickle.dumps(model))
    for other in (twin, loaded):
        other(data(8)[0])
    assert opt._model is None
    with pytest.raises(RuntimeError, match=r"no model is attached .*opt\.attach\(model\)"):
        train(copied, model, 1)
    train(opt, model, 1)


@pytest.mark.parametrize("at", [1, 2])
def test_a_resumed_run_goes_on(at):
    """A state loaded before the first forward ends the search, or a refresh is not on its step."""
    runs = []
    for resumed in (False, True):
        model = Bare()
        opt = Sophia(model.parameters(), **SETTINGS)
        train(opt, model, at)
        if resumed:
            weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
            model = Bare()
            model.load_state_dict(weights)
            opt = Sophia(model.parameters(), **SETTINGS)
            opt.load_state_dict(state)
        train(opt, model, 4)
        runs.append(opt)
    assert same(*runs)


def test_by_hand():
    """attach() and detach() before the first forward are the user's word."""
    model = Around(Bare())
    opt = Sophia(model.parameters(), **SETTINGS)
    opt.attach(model.inner)
    assert hooked(model) == [model.inner]
    train(opt, model, 1)
    assert repr(opt).startswith("Sophia (records Bare, given\n")
    opt = Sophia(model.parameters(), **SETTINGS)
    opt.detach()
    assert hooked(model) == [model.inner]  # the first optimizer's
    with pytest.raises(RuntimeError, match="no model is attached"):
        train(opt, model, 1)


def test_groups_that_join():
    """Parameters that no candidate owns."""
    model, stranger = Around(Bare()), nn.Linear(2, 2)
    parameters = list(model.parameters())
    opt = Sophia(parameters[:3], **SETTINGS)
    opt.add_param_group({"params": parameters[3:], "lr": 1e-4})
    with pytest.raises(ValueError, match=r"Bare holds 28 of 30, Linear holds 2 of 30"):
        opt.add_param_group({"params": stranger.parameters()})
    assert len(opt.param_groups) == 2
    train(opt, model)
    assert opt._model is model


def test_a_manual_one_looks_for_nothing():
    """Hooks of an optimizer that needs none."""
    model = Bare()
    Sophia(model.parameters(), mode="manual")
    assert hooked(model) == []
    with pytest.raises(ValueError, match="tells hidden matrices"):
        Sophia(model.parameters(), mode="manual", rule="damped")


def test_frozen_forwards_and_those_of_others_do_not_decide():
    """A forward that cannot be a training step's: of a model that is frozen at the time, or of torch.func."""
    model = Bare()
    call = Around(model)
    opt = Sophia(model.parameters(), **SETTINGS)
    model.requires_grad_(False)
    model(data(8)[0])
    model.requires_grad_(True)
    torch.func.functional_call(model, dict(model.named_parameters()), (data(2)[0],))
    assert opt._model is model
    train(opt, call, 1)
    assert opt._model is call


def test_the_search_is_cheap():
    """A hook that stays on the parts of a model, run at every call."""
    model = Around(Bare())
    opt = Sophia(model.parameters(), **SETTINGS)
    train(opt, model, 1)
    assert opt._search is None
    assert [len(module._forward_pre_hooks) for module in model.modules() if module._forward_pre_hooks] == [1]
