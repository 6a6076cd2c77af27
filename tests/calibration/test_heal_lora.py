"""LoRA in healing: peft's adapters go through the experts seam, are merged, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from test_heal import ALL, KilledError, assert_same, check_teacher, logits, run, snapshot

from var_moe.calibration.fitted_files import load_compensation, save_compensation
from var_moe.calibration.heal import HealSettings
from var_moe.execution.session import routed
from var_moe.routing.damage import DamageModel, DamagePolicy

pytest.importorskip("peft")

from var_moe.calibration.adapters import adapters, targets

QUICK = HealSettings(parts=("router", "norms", "lora"), tokens=1200, rate=1e-3, control=True)


@pytest.fixture(scope="module")
def case(make_loaded, make_cuts):
    loaded = make_loaded(2)
    return loaded, make_cuts(loaded)[0]


@pytest.fixture(scope="module")
def unbroken(case, documents):
    before, out = snapshot(case[0].model), logits(case[0])
    found = run(case, documents, QUICK)
    assert_same(before, snapshot(case[0].model))
    assert torch.equal(out, logits(case[0]))
    return found


def policy(result, tau=ALL):
    damage = _damage(result.compensation)
    return DamagePolicy(tau, damage=damage)


def _damage(compensation):
    size = {"base": 1, "slope": 1, "curve": 1, "pair": 64, "first": 0, "dropped": 0}
    size |= {"token": 300, "bias": 0, "out": 0}
    tensors = {name: torch.zeros((2, width)) for name, width in size.items()}
    return DamageModel(**tensors, inner=torch.zeros((2, 0, 64)), compensation=compensation)


def test_the_teacher_is_the_unmodified_model_at_all_times(case, documents, monkeypatch):
    settings = HealSettings(parts=("lora",), tokens=1500, rate=1e-2)
    check_teacher(case, documents, monkeypatch, settings)


def test_what_is_adapted(case):
    linears, parameters = targets(case[0].model)
    assert {name.rpartition(".")[2] for name in linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(linears) == 8
    assert {name.rpartition(".")[2] for name in parameters} == {"gate_up_proj", "down_proj"}
    assert len(parameters) == 4


def test_adapters_train_go_off_and_leave_no_trace(case):
    model = case[0].model
    before, out = snapshot(model), logits(case[0])
    ids = torch.arange(40).reshape(2, 20)
    with adapters(model, rank=4, seed=0) as lora:
        assert torch.equal(out, logits(case[0]))  # they begin as no change
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.normal_(std=0.1)
        assert not torch.allclose(out, logits(case[0]), atol=1e-2)
        with lora.disabled():
            assert torch.equal(out, logits(case[0]))
        model(ids).logits.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in lora.parameters())
        mine = {id(p) for p in lora.parameters()}
        assert not any(p.grad is not None for p in model.parameters() if id(p) not in mine)
    assert_same(before, snapshot(model))


def test_adapters_leave_no_trace_after_an_exception(case):
    model = case[0].model
    before = snapshot(model)
    with pytest.raises(KilledError), adapters(model, seed=0):
        raise KilledError
    assert_same(before, snapshot(model))


def test_merged_factors_are_the_adapted_model(case):
    from var_moe.models.healed_weights import healed_weights
    from var_moe.routing.healed import Healed

    model = case[0].model
    with adapters(model, rank=4, seed=0) as lora:
        with torch.no_grad():
            for parameter in lora.parameters():
                parameter.normal_(std=0.1)
        adapted, changes = logits(case[0]), lora.changes()
    assert set(changes) == {f"{one}.weight" for one in targets(model)[0]} | set(targets(model)[1])
    with healed_weights(model, Healed(changes)):
        torch.testing.assert_close(logits(case[0]), adapted, rtol=1e-4, atol=1e-4)


def test_both_steps_help_and_the_control_has_both(unbroken):
    before, first, second = unbroken.report["steps"]
    assert [step["name"] for step in (before, first, second)] == [
        *("compensation", "router,norms", "lora")
    ]
    assert second["kept"]
    nats = [step["held_out_divergence_nats"][0] for step in (before, first, second)]
    assert nats[2] < nats[0]
    assert unbroken.report["control"]["steps"] == first["steps"] + second["steps"]
    lengths = {len(change) for change in unbroken.compensation.healed.changes.values()}
    assert lengths == ({1, 2} if first["kept"] else {2})


@pytest.mark.parametrize("steps", [1, 4, 6, 9])
def test_a_killed_run_goes_on_to_the_same_end(steps, case, documents, unbroken, tmp_path):
    calls = []

    def kill(what, done, total):
        calls.append(what)
        if len(calls) == steps:
            raise KilledError

    path, before = tmp_path / "state.pt", snapshot(case[0].model)
    with pytest.raises(KilledError):
        run(case, documents, QUICK, checkpoint=path, progress=kill)
    assert_same(before, snapshot(case[0].model))
    found = run(case, documents, QUICK, checkpoint=path)
    assert found.report == unbroken.report
    assert found.compensation.hash == unbroken.compensation.hash


def test_files_come_back_and_need_no_peft(unbroken, case, tmp_path, monkeypatch):
    import sys

    from var_moe.models.identity import identity

    damage = _damage(unbroken.compensation)
    head = {**identity(case[0]), "heal": unbroken.report, "healed": unbroken.files}
    save_compensation(tmp_path, damage, head=head)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    for name in [one for one in sys.modules if one.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    found = load_compensation(tmp_path, case[0])
    assert found.compensation.hash == unbroken.compensation.hash
    with routed(case[0].model, DamagePolicy(ALL, damage=damage)):
        wanted = logits(case[0])
    with routed(case[0].model, DamagePolicy(ALL, damage=found.damage)):
        assert torch.equal(logits(case[0]), wanted)


def test_peft_reads_the_adapter(case, documents, tmp_path, make_loaded):
    from peft import PeftModel

    from var_moe.models.healed_weights import healed_weights
    from var_moe.models.identity import identity

    settings = HealSettings(parts=("lora",), tokens=1200, rate=1e-3)
    result = run(case, documents, settings)
    head = {**identity(case[0]), "healed": result.files}
    save_compensation(tmp_path, _damage(result.compensation), head=head)
    assert not (tmp_path / "healed.safetensors").exists()
    with healed_weights(case[0].model, result.compensation.healed):
        wanted = logits(case[0])
    assert not torch.allclose(wanted, logits(case[0]), atol=1e-3)
    other = PeftModel.from_pretrained(make_loaded(2).model, tmp_path / "adapter").eval()
    with torch.inference_mode():
        found = other(torch.arange(40).reshape(2, 20)).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_told_divergence_is_that_of_the_routed_model(unbroken, case, documents):
    """By `routed` itself, from plain logits: healed weights and compensation are in place."""
    from var_moe.calibration.material import Material

    model = case[0].model
    held = Material(documents, window=256, tokens_per_batch=400, seed=0).held_out
    total = tokens = 0
    for document in held:
        ids = torch.from_numpy(document.ids)[None]
        with torch.inference_mode():
            teacher = model(ids).logits[0, :-1].log_softmax(-1)
            with routed(model, policy(unbroken)):
                student = model(ids).logits[0, :-1].log_softmax(-1)
        total += float((teacher.exp() * (teacher - student)).sum())
        tokens += len(teacher)
    kept = [step for step in unbroken.report["steps"] if step["kept"]][-1]
    assert total / tokens == pytest.approx(kept["held_out_divergence_nats"][0], rel=1e-3)
