"""A guard around a routed model: calibrated, played to, falling back, and leaving no trace."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from var_moe.config import VARConfig
from var_moe.data.documents import EncodedDocument, one_per_page
from var_moe.errors import UsageError
from var_moe.evaluation.guarding import calibrate_guard, run_documents
from var_moe.execution.session import routed
from var_moe.models.loading import LoadedModel, load_model
from var_moe.routing.compensation import Compensation, LayerCompensation
from var_moe.routing.guard import Guard
from var_moe.routing.simple import TopPPolicy
from var_moe.routing.watch import DriftWarning


@pytest.fixture(scope="module")
def loaded(tiny_model_folder) -> LoadedModel:
    return load_model(str(tiny_model_folder))


def texts(number: int, *, low: int, high: int, seed: int) -> list[EncodedDocument]:
    """Documents of 10 to 40 random tokens from ids between ``low`` and ``high``."""
    rng = np.random.default_rng(seed)
    return [
        EncodedDocument(f"{seed}/{n}", "made", rng.integers(low, high, int(rng.integers(10, 40))))
        for n in range(number)
    ]


def policy() -> TopPPolicy:
    return TopPPolicy(0.75)


@pytest.fixture(scope="module")
def guard(loaded) -> Guard:
    return calibrate_guard(loaded, policy(), texts(160, low=0, high=300, seed=1))


DRIFTED = {"low": 40, "high": 44}  # four token ids, again and again


def logits(loaded, ids):
    with torch.inference_mode():
        return loaded.model(ids, use_cache=False).logits


IDS = torch.randint(0, 300, (2, 30), generator=torch.Generator().manual_seed(3))


def test_like_the_calibration_is_calm(loaded, guard) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with routed(loaded.model, policy(), guard=guard) as session:
            run_documents(loaded, session, texts(150, low=0, high=300, seed=2))
    report = session.report()
    assert report.guard is not None
    assert (report.guard.units, report.guard.alarm_at) == (150, None)
    assert report.drift is not None
    seen = {seen.name: seen for seen in report.guard.statistics}
    assert seen["cut_share"].seen == pytest.approx(report.drift["cut_share"], abs=0.02)


def test_a_policy_watches_without_changing_anything(loaded, guard) -> None:
    with routed(loaded.model, policy()) as session:
        expected, decided = logits(loaded, IDS), session.report()
    with routed(loaded.model, policy(), guard=guard) as session:
        assert torch.equal(logits(loaded, IDS), expected)
        report = session.report()
    assert report.tier_counts == decided.tier_counts
    assert report.drift == decided.drift
    assert decided.guard is None


def test_fallback_is_the_model_itself(loaded, guard) -> None:
    native = loaded.model.get_experts_implementation()
    before = logits(loaded, IDS)
    loaded.model.set_experts_implementation("grouped_mm")
    expected = logits(loaded, IDS)
    loaded.model.set_experts_implementation(native)
    falling = Guard(expectation=guard.expectation, action="fallback")
    with routed(loaded.model, policy(), guard=falling) as session:
        assert not torch.equal(logits(loaded, IDS), expected)
        with pytest.warns(DriftWarning, match="own routing decides"):
            run_documents(loaded, session, texts(150, **DRIFTED, seed=4))
        assert torch.equal(logits(loaded, IDS), expected)
        report = session.report()
        assert report.guard is not None
        assert report.guard.fallback
        assert report.guard.alarm_at == report.guard.units < 150
        assert report.experts_per_token < 2
        session.reset()  # what it did stays
        assert torch.equal(logits(loaded, IDS), expected)
        assert session.report().experts_per_token == 2
        guarded = session.report().guard
        assert guarded is not None
        assert guarded.fallback
    assert loaded.model.get_experts_implementation() == native
    assert torch.equal(logits(loaded, IDS), before)
    with routed(loaded.model, policy(), guard=falling) as session:  # a new stream
        assert not torch.equal(logits(loaded, IDS), expected)


def test_fallback_takes_the_compensation_away(loaded, guard) -> None:
    part = LayerCompensation(torch.full((65, 64), 0.01))
    stand_in = Compensation(layers=(part,) * 3, by_pair=True, experts=8)
    helped = policy().compensated(stand_in)
    documents = texts(160, low=0, high=300, seed=1)
    made = calibrate_guard(loaded, helped, documents, action="fallback")
    loaded.model.set_experts_implementation("grouped_mm")
    expected = logits(loaded, IDS)
    with routed(loaded.model, helped, guard=made) as session:
        assert not torch.equal(logits(loaded, IDS), expected)
        with pytest.warns(DriftWarning):
            run_documents(loaded, session, texts(150, **DRIFTED, seed=4))
        assert torch.equal(logits(loaded, IDS), expected)


def test_an_exception_leaves_the_model_as_it_was(loaded, guard) -> None:
    expected = logits(loaded, IDS)
    with pytest.raises(UsageError, match="input_ids"), routed(loaded.model, policy(), guard=guard):
        loaded.model(inputs_embeds=torch.zeros((1, 3, 64)))
    assert torch.equal(logits(loaded, IDS), expected)


def test_generated_texts_are_documents(loaded, guard) -> None:
    with routed(loaded.model, policy(), guard=guard) as session:
        for _ in range(2):
            loaded.model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
        open_still = session.report().guard
        session.end_documents()
        ended = session.report().guard
    assert open_still is not None
    assert ended is not None
    assert (open_still.units, ended.units) == (2, 4)


def test_the_order_of_windows_and_rows_changes_no_unit(loaded, guard) -> None:
    """A document longer than the window is one unit, its overlap counted once."""
    documents = [
        EncodedDocument("long", "made", np.random.default_rng(1).integers(0, 300, 700)),
        *texts(3, low=0, high=300, seed=5),
    ]
    assert loaded.window < 700
    with routed(loaded.model, policy(), guard=guard) as session:
        run_documents(loaded, session, documents, tokens_per_batch=300)
    report = session.report()
    assert report.guard is not None
    assert report.guard.units == 4
    assert report.tokens == sum(len(document.ids) for document in documents)


def test_another_policys_guard_is_refused(loaded, guard) -> None:
    with (
        pytest.raises(UsageError, match=r"policy p = 0.75, but this one has 0.5"),
        routed(loaded.model, TopPPolicy(0.5), guard=guard),
    ):
        pass


@pytest.mark.slow
class TestOnTheDemo:
    """The bundled model: verified VAR without a profile's table, as confidence alone decides."""

    @pytest.fixture
    def demo(self):
        from var_moe.optimization.preparation import halves, read_text

        loaded = load_model("demo")
        own, other = halves(read_text("demo", "validation", loaded).documents)
        kjv = read_text("demo-kjv", "validation", loaded).documents
        config = VARConfig(confidence_threshold=0.7, residuals=False, cache_scope="document")
        texts = [
            [replace(document, ids=document.ids[:128]) for document in one_per_page(one)[:150]]
            for one in (own, other, kjv)
        ]
        return loaded, self.var(loaded, config), *texts

    def var(self, loaded, config):
        from var_moe.models.identity import identity
        from var_moe.routing.var import RoutingTable, VARPolicy

        layers, size = identity(loaded)["layers"], loaded.model.config.vocab_size
        empty = torch.zeros((layers, size), dtype=torch.float64)
        table = RoutingTable(
            count=empty,
            entropy=empty,
            index=torch.zeros((layers, size, 1), dtype=torch.int64),
            weight=torch.ones((layers, size, 1)),
        )
        return VARPolicy(config, table)

    def test_other_pages_are_calm_and_another_domain_is_found(self, demo) -> None:
        loaded, var, own, other, kjv = demo
        made = calibrate_guard(loaded, var, own, action="fallback")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with routed(loaded.model, var, guard=made) as session:
                run_documents(loaded, session, other)
        calm = session.report()
        assert calm.guard is not None
        assert (calm.guard.units, calm.guard.alarm_at) == (len(other), None)
        assert calm.drift is not None
        assert 0.5 < calm.drift["agreement_by_tier"]["cached"] < 1
        with routed(loaded.model, var, guard=made) as session:
            with pytest.warns(DriftWarning):
                run_documents(loaded, session, kjv)
            found = session.report()
        assert found.guard is not None
        assert found.guard.alarm_at is not None
        assert 10 < found.guard.alarm_at < 90


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"action": "stop"}, "Guard.action = 'stop'"),
        ({"tolerance": -1}, "Guard.tolerance = -1"),
        ({"alpha": 1}, "alpha = 1"),
        ({"documents": 39}, r"39 document\(s\): calibrating a guard needs at least 40"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_played(loaded, change, said) -> None:
    def played(*_progress: object) -> None:
        raise AssertionError("it was played first")

    options = {name: value for name, value in change.items() if name != "documents"}
    documents = texts(change.get("documents", 40), low=0, high=300, seed=1)
    with pytest.raises(UsageError, match=said):
        calibrate_guard(loaded, policy(), documents, progress=played, **options)
