"""Healing on a tiny model: it helps, it resumes, and it leaves the model alone."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from var_moe.calibration import heal as healing
from var_moe.calibration.distill import Distillation
from var_moe.calibration.heal import HealSettings, heal
from var_moe.calibration.looks import Look
from var_moe.calibration.weights import Differences, weights_of
from var_moe.errors import UsageError
from var_moe.routing.compensation import Compensation

QUICK = HealSettings(parts=("router", "norms"), tokens=2500, rate=1e-3)
ALL = 1e9  # nats: a tau at which every token runs its first expert alone


class KilledError(Exception):
    """The run ends here."""


@pytest.fixture(scope="module")
def case(make_loaded, make_cuts):
    loaded = make_loaded(2)
    return loaded, make_cuts(loaded)[0]


def run(case, documents, settings=QUICK, **more):
    loaded, damage = case
    options = {
        "damage": damage,
        "taus": [ALL, ALL],
        "looks_taus": [ALL],
        "compensation": Compensation.empty(layers=2, experts=8, hidden=64),
        "settings": settings,
        "tokens_per_batch": 400,
        **more,
    }
    return heal(loaded, documents, **options)


def snapshot(model):
    """Everything of a model that healing might leave changed."""
    return {
        "dict": {name: id(value) for name, value in model.__dict__.items()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": [name for name, p in model.named_parameters() if p.grad is not None],
        "backend": model.get_experts_implementation(),
        "training": model.training,
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        if name == "values":
            assert list(one[name]) == list(other[name])
            assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])
        else:
            assert one[name] == other[name], name


def logits(loaded):
    ids = torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        return loaded.model(ids).logits


@pytest.fixture(scope="module")
def unbroken(case, documents):
    return run(case, documents, replace(QUICK, control=True))


def test_it_helps_on_held_out_text(unbroken):
    before, after = unbroken.report["steps"]
    assert before["name"] == "compensation"
    assert after["name"] == "router,norms"
    assert after["kept"]
    diverged = [step["held_out_divergence_nats"][0] for step in (before, after)]
    assert diverged[1] < 0.995 * diverged[0]
    relative = after["relative_divergence_at_equal_experts"]
    assert relative == pytest.approx(diverged[1] / diverged[0])
    assert after["experts_per_token"] == [1.0]
    assert len(after["held_out_degradation"]) == len(after["taus"]) == 1
    assert before["held_out_degradation_uncut"] == pytest.approx(0, abs=1e-6)


def test_what_is_healed_is_what_was_asked_for(unbroken, case):
    names = set(unbroken.compensation.healed.changes)
    assert names == set(weights_of(case[0].model, ("router", "norms")))
    assert {name.split(".", 3)[-1] for name in names} == {
        "mlp.gate.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "weight",  # the last norm's
    }
    assert all(len(change) == 1 for change in unbroken.compensation.healed.changes.values())


@pytest.mark.parametrize(
    ("parts", "expected"), [(("router",), "mlp.gate"), (("norms",), "norm.weight")]
)
def test_one_part_alone(parts, expected, case):
    assert all(expected in name for name in weights_of(case[0].model, parts))


def test_gradients_reach_only_the_differences_asked_for(case):
    model = case[0].model
    names = weights_of(model, ("router",))
    differences = Differences(model, names)
    ids = torch.arange(20)[None]
    differences.called(model)(input_ids=ids).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in differences.parameters())
    assert not any(p.grad is not None for p in model.parameters())


def test_the_compensation_is_trained_along(unbroken):
    vectors = [part.vectors for part in unbroken.compensation.layers]
    assert all(one[:-1].any() for one in vectors)
    assert not any(one[-1].any() for one in vectors)


def test_the_control_is_reported(unbroken):
    control, step = unbroken.report["control"], unbroken.report["steps"][1]
    assert control["steps"] == step["steps"] > 3
    assert control["tokens"] == step["tokens"]
    # The tiny model is random: any training on text makes its perplexity smaller.
    assert control["held_out_degradation_uncut"] < -0.01


def test_no_control_unless_asked_for(case, documents):
    found = run(case, documents, replace(QUICK, tokens=500))
    assert found.report["steps"][1]["steps"] == 2
    assert found.report["control"] is None


def test_the_model_is_the_same_afterwards(case, documents):
    loaded = case[0]
    before, out = snapshot(loaded.model), logits(loaded)
    run(case, documents, replace(QUICK, tokens=500, control=True))
    assert_same(before, snapshot(loaded.model))
    assert torch.equal(out, logits(loaded))


def test_the_model_is_the_same_after_an_exception(case, documents):
    loaded = case[0]
    before = snapshot(loaded.model)

    def kill(what, done, total):
        raise KilledError

    with pytest.raises(KilledError):
        run(case, documents, progress=kill)
    assert_same(before, snapshot(loaded.model))


def check_teacher(case, documents, monkeypatch, settings):
    """Its logits of a batch are those of the model outside, also in the last step."""
    loaded = case[0]
    seen = []
    plain = healing.forward

    def watched(model, batch, device, **options):
        found = plain(model, batch, device, **options)
        if not torch.is_grad_enabled():
            seen.append((batch, found))
        return found

    monkeypatch.setattr(healing, "forward", watched)
    run(case, documents, settings)
    batch, teacher = seen[-1]
    assert len(seen) > 3
    with torch.no_grad():
        own = loaded.model(input_ids=batch.ids, attention_mask=batch.valid.long()).logits
    at = batch.counted
    torch.testing.assert_close(teacher[at], own[at], rtol=1e-4, atol=1e-4)


def test_the_teacher_is_the_unmodified_model_at_all_times(case, documents, monkeypatch):
    check_teacher(case, documents, monkeypatch, replace(QUICK, tokens=1500, rate=1e-2))


def test_the_control_knows_no_cuts(case, documents, monkeypatch):
    phases, now = set(), [""]
    plain = Distillation.as_student

    def watched(self, policy, compensation, batch):
        phases.add(now[0])
        plain(self, policy, compensation, batch)

    def tell(what, done, total):
        now[0] = what

    monkeypatch.setattr(Distillation, "as_student", watched)
    run(case, documents, replace(QUICK, tokens=1000, control=True), progress=tell)
    assert now == ["control of router,norms"]
    # The control's first step is told when it is over; what comes before it is healing.
    assert phases == {"", "healing router,norms"}


def test_damages_are_taken_again_in_the_healed_state(case, documents, monkeypatch):
    from var_moe.calibration import calibrate
    from var_moe.calibration.collect import collect_profile
    from var_moe.calibration.fit_compensation import FitSettings

    data, seen = {"dataset": "tiny", "data_hash": "h"}, []
    plain = calibrate.calibration_trace

    def watched(*args, **options):
        seen.append(options["compensation"])
        return plain(*args, **options)

    monkeypatch.setattr(calibrate, "calibration_trace", watched)
    monkeypatch.setattr(healing, "better", lambda relative: True)
    found = calibrate.learn_compensation(
        case[0],
        collect_profile(case[0], documents, **data, max_tokens=None),
        documents,
        data=data,
        settings=FitSettings(
            rank=4, regress_tokens=0, tokens=2500, tokens_per_batch=400, rate=1e-2
        ),
        healing=replace(QUICK, tokens=800),
    )
    assert len(seen) == 2
    assert seen[0].healed is None
    assert set(seen[1].healed.changes) == set(weights_of(case[0].model, ("router", "norms")))
    assert found.compensation is seen[1]
    assert found.head["healed"]["hash"] == found.compensation.healed.hash
    assert [step["name"] for step in found.head["heal"]["steps"]] == [
        "compensation",
        "router,norms",
    ]


@pytest.mark.parametrize("steps", [1, 3, 6, 9])
def test_a_killed_run_goes_on_to_the_same_end(steps, case, documents, unbroken, tmp_path):
    settings, calls = replace(QUICK, control=True), []

    def kill(what, done, total):
        calls.append(what)
        if len(calls) == steps:
            raise KilledError

    path = tmp_path / "state.pt"
    with pytest.raises(KilledError):
        run(case, documents, settings, checkpoint=path, progress=kill)
    found = run(case, documents, settings, checkpoint=path)
    assert found.report == unbroken.report
    assert found.compensation.hash == unbroken.compensation.hash
    seen = []
    again = run(case, documents, settings, checkpoint=path, progress=lambda *a: seen.append(a))
    assert not seen  # an ended run gives the same again, without a step
    assert again.compensation.hash == unbroken.compensation.hash


def test_a_step_that_does_not_help_is_not_kept(case, documents):
    found = run(case, documents, replace(QUICK, tokens=800, rate=100.0))
    assert not found.report["steps"][1]["kept"]
    assert found.compensation.healed is None
    assert found.files is None
    start = Compensation.empty(layers=2, experts=8, hidden=64)
    assert found.compensation.hash == start.hash


def test_a_look_is_compared_at_equal_experts_per_token():
    def look(experts, diverged):
        return Look((1.0, 2.0, 3.0), experts, diverged, (0.0,) * 3, 0.0)

    before = look((1.8, 1.6, 1.4), (0.01, 0.02, 0.04))
    assert before.relative(before) == pytest.approx(1)
    # On the same line, further along: more experts, so less divergence, and no gain.
    assert look((1.9, 1.7, 1.5), tuple(2**0.5 / 2 * np.array((0.01, 0.02, 0.04)))).relative(
        before
    ) == pytest.approx(2**0.0)
    assert look((1.8, 1.6, 1.4), (0.005, 0.01, 0.02)).relative(before) == pytest.approx(0.5)
    flat = look((1.5, 1.5, 1.5), (0.01, 0.02, 0.04))  # nothing to draw a line through
    assert look((1.4, 1.5, 1.6), (0.02, 0.04, 0.08)).relative(flat) == pytest.approx(2)


def test_the_student_counts_what_it_runs(case, documents):
    """Against the kept pairs of the policy's own decisions, by hand on one batch."""
    from var_moe.calibration.distill import forward
    from var_moe.evaluation.batching import batches, collate
    from var_moe.execution.dispatch import attach, detach, pair_backend
    from var_moe.routing.fixed_k import FixedKPolicy

    loaded = case[0]
    session = Distillation(pair_backend("sorted"))
    batch = collate(next(batches(documents[:7], 400, window=64)))
    before = attach(loaded.model, session)
    try:
        session.as_student(FixedKPolicy(1), None, batch)
        with torch.no_grad():
            forward(loaded.model, batch, torch.device("cpu"))
    finally:
        detach(loaded.model, before)
    assert session.executed == 2 * int(batch.counted.sum())


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"parts": ("routers",)}, "routers"),
        ({"parts": ()}, "expected some of router, norms, lora"),
        ({"parts": ("norms",), "tokens": 0}, "tokens = 0"),
        ({"parts": ("norms",), "rate": 0.0}, "rate = 0.0"),
        ({"parts": ("norms",), "lora_rank": 0}, "lora_rank = 0"),
    ],
)
def test_impossible_settings_are_refused(values, word):
    with pytest.raises(UsageError, match=word):
        HealSettings(**values)


def test_missing_peft_is_named_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"needs peft: pip install 'var-moe\[heal\]'") as found:
        HealSettings(parts=("lora",))
    assert found.value.exit_code == 2
