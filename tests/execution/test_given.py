"""What `routed` and the forwards inside it are given: followed, or refused in words."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_callers import prompt, var
from torch import Tensor

from damages import compensation_of, damage_model
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.execution.session import routed
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.decision import ForwardContext
from var_moe.routing.per_layer_k import LayerSensitivity, PerLayerKPolicy
from var_moe.routing.simple import FixedKPolicy, NativePolicy

LAYERS, EXPERTS, HIDDEN, WORDS = 3, 8, 64, 300


@pytest.fixture(scope="module")
def model(make_tiny_mixtral):
    return make_tiny_mixtral()


@pytest.fixture
def ids() -> Tensor:
    return torch.cat((prompt(4), prompt(4).flip(1)))  # (2, 9)


def looking(**sizes: int) -> DamagePolicy:
    """A damage policy that looks at its layers' inputs."""
    given = {"layers": LAYERS, "experts": EXPERTS, "vocabulary": WORDS, "hidden": HIDDEN, **sizes}
    return DamagePolicy(1e-2, damage=damage_model(top_k=2, **given))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "demo"}, "model is str"),
        ({"model": torch.nn.Linear(2, 2)}, "model is Linear: expected a transformers model"),
        ({"policy": None}, "policy is NoneType"),
        ({"policy": VARConfig()}, "policy is VARConfig: expected one that make_policy returned"),
        ({"guard": "guard.json"}, "guard is str: expected one that Guard.load"),
    ],
)
def test_other_things_are_refused_by_name(model, change, said):
    given: dict[str, Any] = {"model": model, "policy": NativePolicy(), **change}
    with pytest.raises(UsageError, match=said), routed(**given):
        pass


@pytest.mark.parametrize("which", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_hook_that_cannot_be_registered_leaves_nothing_behind(model, ids, which, monkeypatch):
    before, hooks = model.get_experts_implementation(), dict(model._forward_pre_hooks)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more hooks")

    policy = NativePolicy()
    with monkeypatch.context() as patch:
        patch.setattr(model, which, refuse)
        with pytest.raises(RuntimeError, match="no more hooks"), routed(model, policy):
            pass
    assert dict(model._forward_pre_hooks) == hooks
    assert model.get_experts_implementation() == before
    with routed(model, policy):
        model(ids)


def test_a_block_is_entered_once(model, ids):
    block = routed(model, NativePolicy())
    with block as session:
        with pytest.raises(UsageError, match="entered before"), block:
            pass
        model(ids)
        assert session.report().tokens == ids.numel()
    with pytest.raises(UsageError, match="call routed"), block:
        pass


def test_our_own_dispatch_is_no_backend(model):
    with pytest.raises(UsageError, match="expected one of"):
        routed(model, NativePolicy(), backend="var_moe").__enter__()


def per_layer(_model: Any) -> PerLayerKPolicy:
    loss = ((1.0, 0.0),) * LAYERS
    return PerLayerKPolicy(1.5, sensitivity=LayerSensitivity(measure="made up", loss=loss))


@pytest.mark.parametrize(
    ("sizes", "policy", "said"),
    [
        ({"layers": 2}, per_layer, "layers = 3, the model has 2"),
        ({"layers": 5}, per_layer, "layers = 3, the model has 5"),
        ({"layers": 5}, var, "layers = 3, the model has 5"),
        ({"vocabulary": 400}, var, "vocabulary = 300, the model has 400"),
        ({"vocabulary": 400}, lambda _model: looking(), "vocabulary = 300, the model has 400"),
        ({"experts": 4}, lambda _model: looking(), "experts = 8, the model has 4"),
        ({}, lambda _model: looking(hidden=32), "hidden = 32, the model has 64"),
    ],
)
def test_what_was_calibrated_on_a_model_of_other_sizes_is_refused(
    model, sizes, policy, said, make_tiny_mixtral
):
    with pytest.raises(UsageError, match=said):
        routed(make_tiny_mixtral(**sizes), policy(model)).__enter__()


def test_a_tokenizer_may_have_more_ids_than_its_model(model, ids):
    with routed(model, looking(vocabulary=WORDS + 7)):
        model(ids)


def test_a_table_of_another_k_is_refused(model, make_tiny_mixtral, ids):
    other = make_tiny_mixtral(top_k=3)
    with routed(other, var(model)), pytest.raises(UsageError, match="the model's K = 3 has 2"):
        other(ids)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"input_ids": torch.ones(9, dtype=torch.int64)}, r"input_ids of shape \(9,\)"),
        ({"input_ids": [[1, 2]]}, "input_ids list"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, r"attention_mask of shape \(2, 1, 9, 9\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"of shape \(2, 5\) for tokens of \(2, 9\)"),
        ({"attention_mask": torch.ones(3, 9)}, r"of shape \(3, 9\) for tokens of \(2, 9\)"),
        ({"attention_mask": {"full_attention": torch.ones(2, 1, 9, 9)}}, "attention_mask dict"),
    ],
)
def test_inputs_that_do_not_tell_their_tokens_are_refused(model, ids, given, said):
    with routed(model, var(model)) as session:
        with pytest.raises(UsageError, match=said):
            model(**{"input_ids": ids, **given})
        model(ids)
        assert session.report().tokens == ids.numel()


def test_one_mask_for_all_rows(model, ids):
    with routed(model, var(model)) as session:
        model(ids, attention_mask=torch.ones(1, 9))
        assert session.report().tokens == ids.numel()


def test_packed_rows_are_refused_where_earlier_tokens_count(model, ids):
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    with routed(model, var(model)), pytest.raises(UsageError, match="a row of its own"):
        model(ids[:1], position_ids=packed)
    with routed(model, var(model)) as session:
        model(ids[:1], position_ids=torch.arange(9)[None])
        batch = ForwardContext.of(ids[:1])
        session.announce(batch)  # whoever says what the tokens are is believed
        model(ids[:1], position_ids=packed)
        # Left padding: transformers' own positions begin anew after it.
        mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
        model(ids[:1], attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=1))
    with routed(model, NativePolicy()):
        model(ids[:1], position_ids=packed)


def test_continuous_batching_is_refused_at_once(model, ids, caplog):
    with (
        caplog.at_level(logging.ERROR),
        routed(model, NativePolicy()),
        pytest.raises(UsageError, match="continuous batching"),
    ):
        model.generate_batch(ids.tolist())
    assert "init_continuous_batching" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: torch.save(m, "/dev/null")])
def test_a_copy_made_inside_is_refused(model, ids, copied: Callable[[Any], Any]):
    with routed(model, NativePolicy()):
        with pytest.raises((TypeError, AttributeError)):
            copied(model)
        model(ids)
    copied(model)


def test_experts_set_to_another_backend_inside_are_noticed(model, ids):
    before = model.get_experts_implementation()
    with routed(model, NativePolicy()):
        model.set_experts_implementation("eager")
        with pytest.raises(UsageError, match="set_experts_implementation"):
            model(ids)
    assert model.get_experts_implementation() == before


def test_another_model_of_the_same_config_object_is_refused(model, ids):
    other = type(model)(model.config)
    with routed(model, NativePolicy()):
        with pytest.raises(UsageError, match="shares its config"):
            other(ids)
        model(ids)
    other(ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_may_change_inside(make_tiny_mixtral, ids, dtype):
    model = make_tiny_mixtral()
    means = compensation_of(layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, top_k=2, rank=2)
    with routed(model, FixedKPolicy(1).compensated(means)), torch.no_grad():
        model(ids)
        model.to(dtype)
        assert model(ids).logits.dtype == dtype


def test_autocast_leaves_the_prediction_as_precise_as_it_was_fitted(model, ids):
    part = looking().damage.layer(0, torch.device("cpu"))
    hidden = torch.randn((5, HIDDEN), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hint = part.hint(hidden)
        with routed(model, looking()), torch.no_grad():
            model(ids)
    assert hint is not None
    assert torch.equal(hint, part.hint(hidden))


def test_a_thread_that_comes_too_late_holds_nobody_up(model, ids):
    """It had its turn as the block was left: the hook that ends a turn is gone by then."""
    told, done = threading.Event(), threading.Event()

    def late() -> None:
        with pytest.raises(UsageError, match="wait for the threads"):
            session.before_forward(model, (ids,), {})
        told.set()
        done.wait(60)  # a thread that has ended could lend its number to the next

    with routed(model, NativePolicy()) as session:
        pass
    threading.Thread(target=late, daemon=True).start()
    assert told.wait(60)
    report = threading.Thread(target=session.report, daemon=True)
    report.start()
    report.join(10)
    done.set()
    assert not report.is_alive()
