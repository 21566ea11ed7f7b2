"""The mechanisms that make h what it claims to be, each with what stands in its place when it is taken out,
and with tests that must fail then.

``take_out_mechanisms.py`` runs these tests with and without; ``tests/promises/test_mechanisms.py`` holds the
table to the sources. A mechanism is taken out in the least way: what is there instead is what the library
would do had nobody thought of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sophia.likelihoods.weights import Reading

__all__ = ["MECHANISMS", "Mechanism"]


@dataclass(frozen=True)
class Mechanism:
    """A row of the table."""

    name: str
    target: str
    """``module:attribute`` or ``module:Class.attribute``."""
    instead: Callable[[Any], Any]
    """What stands in the target's place, from what stood there."""
    tests: tuple[str, ...]
    """Node ids. Each fails without the mechanism, and takes seconds."""

    def find(self) -> tuple[Any, str, Any]:
        """The owner of the target, its name there, and the target."""
        module, path = self.target.split(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        return owner, name, getattr(owner, name)

    def take_out(self) -> None:
        """Replace the target, wherever a module of the library has imported it. For a process of its own."""
        owner, name, original = self.find()
        replacement = self.instead(original)
        setattr(owner, name, replacement)
        for module in [m for n, m in sys.modules.items() if n.startswith("sophia.")]:
            for other, value in list(vars(module).items()):
                if value is original:
                    setattr(module, other, replacement)


def constant(value: Any) -> Callable[[Any], Any]:
    """Always the same result, whatever the arguments."""
    return lambda original: lambda *args, **kwargs: value


nothing = constant(None)


def zeros_are_skipped(original: Any) -> Any:
    """An estimate of zeros is taken for a broken pass."""

    def examined(self: Any, estimate: Any, *args: Any) -> Any:
        if not any(d is not None and bool(d.any()) for d in estimate.diagonal):
            return "all zero", None
        return original(self, estimate, *args)

    return examined


def first_ones(purpose: str) -> Callable[[Any], Any]:
    """The first of those that count, where they are drawn for ``purpose``."""

    def instead(original: Any) -> Any:
        def drawn(counting: list[bool], number: int, key: tuple[int | str, ...]) -> Any:
            chosen, share = original(counting, number, key)
            if key[-1] == purpose:
                order = sorted(range(len(counting)), key=lambda place: (not counting[place], place))
                chosen = sorted(order[:number])
            return chosen, share

        return drawn

    return instead


def drawn_from_all(original: Any) -> Any:
    """Those in which nothing counts may be drawn too."""
    return lambda counting, number, key: original([True] * len(counting), number, key)


def share_of_one(original: Any) -> Any:
    """A part that stands for itself alone."""
    return lambda *args: (original(*args)[0], 1.0)


def unmeasured(original: Any) -> Any:
    """As if ``.grad`` were never touched between backward and step."""
    return lambda measured, whole, scaler, **settings: original(None, whole, scaler, **settings)


def random_as_usual(original: Any) -> Any:
    """Random operations that are not held still."""
    return lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))


def first_dimension(original: Any) -> Any:
    """Rows looked for in the first dimension alone."""
    return lambda *args: original(*args)[:1]


def with_tensor_hooks(original: Any) -> Any:
    """Hooks on parameters that run in the refresh."""
    return lambda *args, **settings: original(*args, **{**settings, "tensor_hooks": True})


def one_stream(original: Any) -> Any:
    """The same noise for all outputs of a micro-batch."""
    return lambda self, purpose: original(self, "labels")


def all_items(original: Any) -> Any:
    """The loss of a part, divided by the items of the whole."""
    return lambda kwargs, part, whole: kwargs


def whole_gradient(original: Any) -> Any:
    """What came through a view of an output, taken for the output's own."""
    return lambda part, gradient, *, always: gradient


def through_others_too(original: Any) -> Any:
    """What came through other returned tensors, counted with what came to them."""

    def gradients(self: Any, wanted: Any, pairs: Any) -> Any:
        tensors, arrived = [t for t, _ in pairs], [g for _, g in pairs]
        return list(torch.autograd.grad(tensors, wanted, arrived, retain_graph=True, allow_unused=True))

    return gradients


FAULTS, REFRESH = "tests/promises/test_faults_", "tests/refresh/test_"
ORDER = f"{FAULTS}selection.py::test_order_of_a_batch_does_not_decide_h"
WEIGHTED = f"{FAULTS}weights.py::test_h_is_the_curvature_of_the_weighted_loss"
ROWS = f"{FAULTS}rows.py::test_rows_are_cut_only_where_they_are_independent"
ALL_OUTPUTS = f"{FAULTS}outputs.py::test_all_outputs_of_the_loss_count"
SKIPPED = f"{REFRESH}arrivals.py::test_a_batch_skipped_by_the_loop_does_not_count"
COMPILED = "tests/integrations/test_loss_code_bases.py::test_its_loss_in_a_compiled_graph_has_the_same_h"
HIDDEN = f"{FAULTS}hidden_logits.py::test_"
FUSED = f"{FAULTS}fused_losses.py::test_"
TOLD = f"{FAULTS}losses.py::test_losses_that_are_no_cross_entropy_are_told"

MECHANISMS = (
    # which part of a step is run again
    Mechanism(
        "estimates that are zero by right are averaged",
        "sophia.refresh.refresher:Refresher.examined",
        zeros_are_skipped,
        (f"{FAULTS}selection.py::test_an_estimate_that_is_zero_by_right_is_averaged[zero-four-classes]",),
    ),
    Mechanism(
        "rows are drawn",
        "sophia.refresh.replay:_drawn",
        first_ones("rows"),
        (f"{ORDER}[selection-ordered-rows]",),
    ),
    Mechanism(
        "micro-batches are drawn",
        "sophia.refresh.replay:_drawn",
        first_ones("micro-batches"),
        (f"{REFRESH}choice.py::test_the_two_forwards_of_a_gan_step_both_come_in",),
    ),
    Mechanism(
        "they are drawn among those that count",
        "sophia.refresh.replay:_drawn",
        drawn_from_all,
        (
            f"{REFRESH}choice.py::test_rows_without_a_label_cost_no_refresh[random]",
            f"{REFRESH}choice.py::test_a_micro_batch_without_labels_is_not_the_one_that_is_taken",
        ),
    ),
    Mechanism(
        "a part stands for the whole",
        "sophia.refresh.replay:_drawn",
        share_of_one,
        (f"{ORDER}[selection-ordered-rows]",),
    ),
    # what its predictions weigh
    Mechanism(
        "weights are read from the gradient",
        "sophia.likelihoods.categorical:Categorical.weights",
        constant(Reading(None)),
        (f"{WEIGHTED}[weights-sum]", f"{WEIGHTED}[weights-by-row]"),
    ),
    Mechanism(
        "the scale of a GradScaler is taken out of h",
        "sophia.refresh.gradient_scale:grad_scaler",
        nothing,
        (f"{WEIGHTED}[weights-scaler-sum]",),
    ),
    Mechanism(
        "what a host divides .grad by reaches h",
        "sophia.refresh.gradient_scale:factor_of",
        unmeasured,
        (f"{WEIGHTED}[weights-host-divides]",),
    ),
    Mechanism(
        "outputs have labels of their own",
        "sophia.refresh.replay:Replay.generator",
        one_stream,
        (f"{ALL_OUTPUTS}[outputs-two-heads-dict]",),
    ),
    Mechanism(
        "all outputs of the loss join",
        "sophia.refresh.other_outputs:OtherOutputs.settle",
        nothing,
        (f"{ALL_OUTPUTS}[outputs-two-heads-tuple]", f"{ALL_OUTPUTS}[outputs-chunks]"),
    ),
    Mechanism(
        "views of one output are told apart",
        "sophia.refresh.other_outputs:own_gradient",
        whole_gradient,
        (f"{ALL_OUTPUTS}[outputs-two-views]",),
    ),
    Mechanism(
        "losses that are no cross-entropy are told",
        "sophia.refresh.misread:Misread.check",
        nothing,
        (f"{TOLD}[losses-focal]", f"{TOLD}[losses-signed-advantages]", f"{TOLD}[losses-squared-error]"),
    ),
    Mechanism(
        "gradients that were thrown away do not count",
        "sophia.refresh.arrivals:Arrivals.drop_thrown_away",
        nothing,
        (f"{SKIPPED}[one micro-batch-clear, forward, backward-to_none]",),
    ),
    # whether its rows may be cut
    Mechanism(
        "rows are proved independent",
        "sophia.refresh.cuts:Cuts._dependence",
        nothing,
        (f"{ROWS}[rows-batchnorm]", f"{ROWS}[rows-square-mask]"),
    ),
    Mechanism(
        "in the proof no layer is zero",
        "sophia.refresh.independence:awake",
        constant(nullcontext()),
        (f"{REFRESH}choice.py::test_what_begins_as_zero_is_not_taken_for_independence[0.0]",),
    ),
    Mechanism(
        "in the proof nothing is random",
        "sophia.refresh.independence:Still.__torch_dispatch__",
        random_as_usual,
        (f"{REFRESH}choice.py::test_random_layers_and_dropout_do_not_look_like_dependence",),
    ),
    Mechanism(
        "rows are found behind the time",
        "sophia.refresh.division:divisions_of",
        first_dimension,
        (f"{REFRESH}choice.py::test_rows_are_found_behind_the_time[6-None]",),
    ),
    Mechanism(
        "documents of a packed row are found",
        "sophia.refresh.division:starts_of_documents",
        nothing,
        (f"{REFRESH}choice.py::test_a_packed_row_gives_some_of_its_documents[position_ids]",),
    ),
    # whether it is the same function, and leaves no trace
    Mechanism(
        "a repetition is proved",
        "sophia.refresh.proof:prove",
        constant(()),
        (f"{REFRESH}proof.py::test_an_object_that_cannot_be_put_back_is_said_once",),
    ),
    Mechanism(
        "a forward begins from the state that it had",
        "sophia.refresh.conditions:Conditions.begin_again",
        nothing,
        (f"{REFRESH}proof.py::test_the_modes_of_the_forward_are_those_of_its_repetition",),
    ),
    Mechanism(
        "state is put back",
        "sophia.refresh.moved_state:State.restore",
        nothing,
        (
            f"{FAULTS}replay.py::test_replay_moving_state_is_restored_or_refused[buffer]",
            f"{FAULTS}replay.py::test_replay_moving_state_is_restored_or_refused[parameter]",
        ),
    ),
    Mechanism(
        "other parameters than the model's are refused",
        "sophia.refresh.refusals:check_own_parameters",
        nothing,
        (f"{FAULTS}replay.py::test_other_parameters_are_replayed_or_refused[replay-perturbed-weights]",),
    ),
    Mechanism(
        "per-example gradients are refused",
        "sophia.refresh.refusals:check_no_gradients_of_rows",
        nothing,
        (f"{FAULTS}replay.py::test_replay_per_sample_gradients_are_refused",),
    ),
    Mechanism(
        "hooks on parameters are set aside",
        "sophia.refresh.sandbox:sandbox",
        with_tensor_hooks,
        (f"{FAULTS}replay.py::test_replay_tensor_hooks_on_parameters_do_not_see_the_refresh",),
    ),
    Mechanism(
        "random generators are put back",
        "sophia.refresh.noise:Noise.restore",
        nothing,
        (f"{REFRESH}recorder.py::test_a_refresh_leaves_gradients_buffers_and_generators_bit_for_bit",),
    ),
    Mechanism(
        "inputs written to since are noticed",
        "sophia.refresh.recording:Recording.overwritten",
        constant(False),
        (f"{REFRESH}refresher.py::test_inputs_overwritten_since_the_forward_are_noticed",),
    ),
    Mechanism(
        "the loss of a part stands for the whole",
        "sophia.refresh.model_outputs:items_of_part",
        all_items,
        (f"{FAULTS}replay.py::test_replay_hutchinson_and_a_router_loss[0.125]",),
    ),
    Mechanism(
        "a mean loss inside a graph is weighed by what arrives in it",
        "sophia.refresh.counted:_weights_of_mean",
        nothing,
        (
            f"{REFRESH}recorder.py::"
            "test_a_loss_inside_a_compiled_graph_is_weighed_by_what_arrives_in_it[GPT-one-300.0]",
        ),
    ),
    Mechanism(
        "a sample stands for the others where weights differ",
        "sophia.refresh.sampled_reading:_are_equal",
        constant(True),
        (
            f"{REFRESH}sampled_reading.py::"
            "test_weights_that_differ_again_stand_for_the_others_and_are_read_in_full_next",
        ),
    ),
    Mechanism(
        "cut replays leave compiled graphs alone",
        "sophia.refresh.eager:eager",
        lambda original: nullcontext,
        (f"{REFRESH}eager.py::test_as_many_graphs_as_under_adamw[in place-static]",),
    ),
    # what a model keeps to itself
    Mechanism(
        "predictions in the graph of a loss are found",
        "sophia.refresh.loss_graph:found_inside",
        constant([]),
        (f"{HIDDEN}a_model_that_returns_its_loss_alone[capped]",),
    ),
    Mechanism(
        "a loss inside a compiled graph is run again outside of it",
        "sophia.refresh.loss_graph:LossGraph.seen",
        lambda original: lambda self: nullcontext(),
        (f"{COMPILED}[modded-nanogpt]",),
    ),
    Mechanism(
        "predictions before the output layer are found",
        "sophia.refresh.one_more_forward:Finding._read_hidden",
        constant(False),
        (f"{FUSED}a_fused_loss_inside_of_the_model[mean]", f"{FUSED}hidden_states_and_a_loss_outside[768]"),
    ),
    Mechanism(
        "what arrives before the output layer must be a cross-entropy's",
        "sophia.likelihoods.before_the_head:Fit.share",
        constant(1.0),
        (f"{FUSED}a_head_outside_of_the_model_is_told",),
    ),
    Mechanism(
        "a gradient that came through another output is not counted twice",
        "sophia.refresh.one_more_forward:Finding._gradients_in",
        through_others_too,
        (f"{FAULTS}before_the_head.py::test_states_that_are_returned_beside_the_loss_made_of_them[states]",),
    ),
    Mechanism(
        "a micro-batch in which nothing counts takes the layer of the others",
        "sophia.refresh.unseen:_take_over",
        nothing,
        (
            f"{FAULTS}before_the_head.py::test_a_micro_batch_without_a_label_before_the_head[first]",
            f"{FAULTS}before_the_head.py::test_a_first_step_without_any_label",
        ),
    ),
    Mechanism(
        "rows are found where all positions lie in one dimension",
        "sophia.refresh.division:_flattened",
        nothing,
        (f"{REFRESH}choice.py::test_rows_are_found_where_all_positions_lie_in_one_dimension[5-TimeFirst]",),
    ),
    Mechanism(
        "ends of documents are cut with the row",
        "sophia.refresh.division:_are_ends",
        constant(False),
        (f"{REFRESH}choice.py::test_ends_of_documents_are_cut_with_the_row",),
    ),
)
