"""Files of damages and compensations: back as they were, or refused in one line that says which."""

from __future__ import annotations

import json
from dataclasses import replace
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from damages import compensation_of, damage_model
from var_moe.calibration.collect import collect_profile
from var_moe.calibration.fitted_files import (
    COMPENSATION_FILE,
    DAMAGE_FILE,
    FOLDER,
    HEAD_FILE,
    FittedCompensation,
    load_compensation,
    load_damages,
    save_damages,
)
from var_moe.calibration.profile import RoutingProfile
from var_moe.data.documents import TextDocument
from var_moe.data.encoding import encode
from var_moe.errors import UsageError
from var_moe.models.identity import identity
from var_moe.models.loading import LoadedModel
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.registry import make_policy

LAYERS, EXPERTS, HIDDEN, VOCABULARY = 3, 8, 64, 300


@pytest.fixture(scope="module")
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="module")
def plain(loaded, tiny_texts, tiny_tokenizer):
    texts = [TextDocument(str(i), "s", text) for i, text in enumerate(tiny_texts[:10])]
    documents = encode(texts, tiny_tokenizer)
    return collect_profile(loaded, documents, dataset="t", data_hash="h", max_tokens=None)


def damages(compensation=None, **more):
    return damage_model(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=2,
        vocabulary=VOCABULARY,
        compensation=compensation,
        **more,
    )


def learned(loaded, *, rank=2, seed=0, **head):
    compensation = compensation_of(
        layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, top_k=2, rank=rank, seed=seed
    )
    damage = damages(compensation, hidden=HIDDEN, seed=seed)
    return FittedCompensation(damage=damage, head={**identity(loaded), **head})


def save(folder, fitted):
    fitted.save(folder)
    return folder


def refused(load, *args, names):
    with pytest.raises(UsageError) as caught:
        load(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert str(names) in message
    return message


@pytest.fixture
def folder(loaded, tmp_path):
    return save(tmp_path / "one", learned(loaded, dataset="t"))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_compensation_comes_back(rank, loaded, tmp_path):
    fitted = learned(loaded, rank=rank, fit={"rank": rank})
    save(tmp_path / "deep" / "folder", fitted)
    found = load_compensation(tmp_path / "deep" / "folder", loaded)
    assert found.compensation.hash == fitted.compensation.hash
    assert found.damage.hash == fitted.damage.hash
    assert found.compensation.rank == rank
    assert found.head["fit"] == {"rank": rank}
    for one, two in zip(found.compensation.layers, fitted.compensation.layers, strict=True):
        for left, right in zip(one.tensors().values(), two.tensors().values(), strict=True):
            assert torch.equal(left, right)
    names = {path.name for path in (tmp_path / "deep" / "folder").iterdir()}
    assert names == {COMPENSATION_FILE, DAMAGE_FILE, HEAD_FILE}


def test_saving_again_replaces_all(folder, loaded):
    other = learned(loaded, rank=0, seed=3)
    save(folder, other)
    assert load_compensation(folder).damage.hash == other.damage.hash


@pytest.mark.parametrize("missing", [COMPENSATION_FILE, DAMAGE_FILE, HEAD_FILE])
def test_a_missing_file(missing, folder):
    (folder / missing).unlink()
    refused(load_compensation, folder, names=folder / missing)


@pytest.mark.parametrize("size", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", [COMPENSATION_FILE, DAMAGE_FILE, HEAD_FILE])
def test_a_truncated_file(name, size, folder):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(size * len(whole))])
    refused(load_compensation, folder, names=folder / name)


@pytest.mark.parametrize("name", [COMPENSATION_FILE, DAMAGE_FILE, HEAD_FILE])
def test_files_of_two_folders(name, folder, loaded, tmp_path):
    other = save(tmp_path / "other", learned(loaded, seed=1))
    (folder / name).write_bytes((other / name).read_bytes())
    message = refused(load_compensation, folder, names=folder)
    assert "not belong" in message


def edit_head(folder, **changes):
    path = folder / HEAD_FILE
    head = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in head.items() if v is not None}))


@pytest.mark.parametrize("key", ["schema_version", "hash", "by_pair", "layers", "experts", "top_k"])
def test_a_head_without_its_keys(key, folder, loaded):
    edit_head(folder, **{key: None})
    refused(load_compensation, folder, loaded, names=folder)


@pytest.mark.parametrize(
    "changes",
    [{"schema_version": 99}, {"layers": "many"}, {"layers": LAYERS + 1}, {"by_pair": False}],
    ids=str,
)
def test_a_head_with_odd_values(changes, folder):
    edit_head(folder, **changes)
    refused(load_compensation, folder, names=folder)


def test_a_head_that_is_no_object(folder):
    (folder / HEAD_FILE).write_text("[1]")
    refused(load_compensation, folder, names=folder / HEAD_FILE)


def test_no_folder(tmp_path):
    assert "var-moe fit-compensation" in refused(
        load_compensation, tmp_path / "none", names=tmp_path / "none"
    )


def test_a_tensor_that_is_missing(folder):
    for name, tensor in ((COMPENSATION_FILE, "layer.1.vectors"), (COMPENSATION_FILE, "layer.1.up")):
        whole = (folder / name).read_bytes()
        tensors = load_file(folder / name)
        del tensors[tensor]
        save_file(tensors, folder / name)
        refused(load_compensation, folder, names=folder)
        (folder / name).write_bytes(whole)
    load_compensation(folder)


def test_another_models_compensation(folder, make_tiny_mixtral, tiny_tokenizer, plain):
    model = make_tiny_mixtral()
    model.model.layers[1].mlp.gate.weight.mul_(1.02)
    other = LoadedModel.of(model, tiny_tokenizer, name="other")
    message = refused(load_compensation, folder, other, names=folder)
    assert "'tiny' does not fit model 'other': the routers have other weights" in message
    deeper = LoadedModel.of(make_tiny_mixtral(layers=2), tiny_tokenizer, name="deeper")
    fitted = learned(deeper)
    with pytest.raises(UsageError, match="'deeper' does not fit the profile of 'tiny'"):
        plain.with_compensation(fitted)


def test_damages_come_back_by_name(tmp_path):
    compensation = compensation_of(layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, top_k=2)
    known = {"none": damages(seed=1), "means": damages(compensation, hidden=HIDDEN)}
    path = tmp_path / DAMAGE_FILE
    save_damages(known, path)
    found = load_damages(path, {"none": None, "means": compensation, "learned": None})
    assert {name: one.hash for name, one in found.items()} == {
        name: one.hash for name, one in known.items()
    }
    for name, tensor in found["means"].tensors().items():
        assert torch.equal(tensor, known["means"].tensors()[name])
    assert list(load_damages(path, {"none": None})) == ["none"]


def test_damages_of_another_kind_are_refused(tmp_path):
    path = tmp_path / DAMAGE_FILE
    save_damages({"none": damages()}, path)
    other = compensation_of(layers=LAYERS, experts=EXPERTS, hidden=HIDDEN, top_k=2)
    assert "not belong" in refused(load_damages, path, {"none": other}, names=path)
    tensors = load_file(path)
    for note in ({"none": "x"}, {"schema_version": "99", "none": damages().hash}):
        save_file(tensors, path, metadata=note)
        assert "schema" in refused(load_damages, path, {"none": None}, names=path)
    del tensors["none.slope"]
    save_file(tensors, path, metadata={"schema_version": "1", "none": damages().hash})
    assert "'none.slope' is missing" in refused(load_damages, path, {"none": None}, names=path)


def means(plain):
    return plain.compensations()["means"]


@pytest.fixture
def whole(plain):
    """A profile with damages for rescaled cuts and for residual means."""
    return replace(plain, damages={"none": damages(), "means": damages(means(plain), seed=1)})


def test_a_profile_with_damages_comes_back(whole, tmp_path):
    whole.save(tmp_path)
    found = RoutingProfile.load(tmp_path)
    assert found.hash == whole.hash
    assert {name: one.hash for name, one in found.damages.items()} == {
        name: one.hash for name, one in whole.damages.items()
    }
    assert found.learned is None


def test_a_profile_that_has_no_damages_leaves_none_behind(plain, whole, tmp_path):
    whole.save(tmp_path)
    plain.save(tmp_path)
    assert not (tmp_path / DAMAGE_FILE).exists()
    assert RoutingProfile.load(tmp_path).damages == {}


def test_a_compensation_beside_a_profile_is_taken_up(whole, loaded, tmp_path):
    whole.save(tmp_path)
    fitted = learned(loaded)
    save(tmp_path / FOLDER, fitted)
    found = RoutingProfile.load(tmp_path)
    assert found.learned.damage.hash == fitted.damage.hash
    found.save(tmp_path)
    assert RoutingProfile.load(tmp_path).learned.damage.hash == fitted.damage.hash


def test_a_profile_takes_its_compensation_along(whole, loaded, tmp_path):
    fitted = learned(loaded)
    whole.with_compensation(fitted).save(tmp_path / "new")
    assert RoutingProfile.load(tmp_path / "new").learned.damage.hash == fitted.damage.hash


def test_a_profile_beside_a_damaged_or_foreign_part(
    whole, loaded, tmp_path, make_tiny_mixtral, tiny_tokenizer
):
    whole.save(tmp_path / "whole")
    save(tmp_path / "whole" / FOLDER, learned(loaded))
    for part in (DAMAGE_FILE, f"{FOLDER}/{COMPENSATION_FILE}", f"{FOLDER}/{DAMAGE_FILE}"):
        place = tmp_path / part.replace("/", "-")
        copytree(tmp_path / "whole", place)
        content = (place / part).read_bytes()
        (place / part).write_bytes(content[: len(content) // 2])
        refused(RoutingProfile.load, place, names=place / part)
    model = make_tiny_mixtral()
    model.model.layers[1].mlp.gate.weight.mul_(1.02)
    other = LoadedModel.of(model, tiny_tokenizer, name="other")
    save(tmp_path / "whole" / FOLDER, learned(other))
    message = refused(RoutingProfile.load, tmp_path / "whole", names=tmp_path / "whole" / FOLDER)
    assert "of model 'other' does not fit the profile of 'tiny'" in message


def test_damages_of_another_profile_are_refused(whole, plain, tmp_path):
    """Those with residual means belong to these means."""
    whole.save(tmp_path)
    moved = plain.residuals.table[0] + 1, *plain.residuals.table[1:]
    other = replace(plain, residuals=replace(plain.residuals, table=moved))
    save_damages({"means": damages(means(other))}, tmp_path / DAMAGE_FILE)
    refused(RoutingProfile.load, tmp_path, names=tmp_path / DAMAGE_FILE)


def test_calibration_picks_the_damages(whole, plain, loaded):
    fitted = learned(loaded)
    full = whole.with_compensation(fitted)
    known = {**whole.damages, "learned": fitted.damage}
    assert list(full.compensations()) == ["none", "means", "learned"]
    for name, damage in known.items():
        assert full.calibration(name)["damage"] is damage
        policy = make_policy("damage", {"tau": 0.1}, full.calibration(name))
        assert isinstance(policy, DamagePolicy)
        mine, theirs = policy.compensation, damage.compensation
        assert (mine and mine.hash) == (theirs and theirs.hash)
    assert full.calibration()["damage"] is fitted.damage
    assert whole.calibration()["damage"] is whole.damages["means"]
    bare = replace(whole, damages={"none": whole.damages["none"]})
    assert bare.calibration()["damage"] is bare.damages["none"]
    assert bare.calibration("means")["damage"] is None
    assert plain.calibration()["damage"] is None
    assert plain.calibration()["table"].count.shape == (LAYERS, VOCABULARY)


def test_an_unknown_compensation_is_refused(whole):
    with pytest.raises(UsageError, match=r"'learned': expected one of none, means; fit one with"):
        whole.calibration("learned")
    with pytest.raises(UsageError, match="compensation 'best': expected one of none, means"):
        whole.calibration("best")
    assert whole.calibration("none")["compensation"] is None
