"""Pages as units, and losses by chunks: the same as those of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from var_moe.calibration.collect import collect_profile
from var_moe.certification.scoring import UnitScorer
from var_moe.config import VARConfig
from var_moe.data.documents import EncodedDocument, shuffled_pages
from var_moe.evaluation.evaluator import Evaluator
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.models.loading import LoadedModel
from var_moe.routing.simple import TopPPolicy
from var_moe.routing.var import VARPolicy


@pytest.fixture(scope="module")
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer)


@pytest.fixture(scope="module")
def sections():
    """Forty sections on sixteen pages, which repeat contexts of each other."""
    rng = np.random.default_rng(4)
    pattern = rng.integers(1, 300, size=40)
    return [
        EncodedDocument(
            f"page{number % 16}#{number}",
            "made",
            np.concatenate([pattern[: 10 + number % 20], rng.integers(1, 300, size=number % 7)]),
        )
        for number in range(40)
    ]


@pytest.fixture(scope="module")
def evaluator(loaded, sections):
    setting = SpeedSetting(batch_size=2, sequence=32, forwards=1)
    return Evaluator(loaded, sections, setting=setting)


def test_the_unmodified_model_changes_nothing(evaluator, sections):
    measured = UnitScorer(evaluator, shuffled_pages(sections, seed=0), chunk_units=5).measure(None)
    assert (measured.change == 0).all()
    assert measured.tokens.sum() == sum(len(one.ids) - 1 for one in sections)
    assert (measured.experts_per_token, measured.learned_pct) == (2.0, 100.0)
    assert len(measured.decisions) == 4  # chunks of 5, 5, 5, 1 pages


def test_chunks_are_as_the_whole(evaluator, sections, loaded):
    """No decision depends on another document: the premise of every test on units."""
    profile = collect_profile(loaded, sections, dataset="made", data_hash="x", max_tokens=None)
    config = VARConfig(
        frequency_threshold=2,
        entropy_threshold=1.4,
        confidence_threshold=0.6,
        context_window_size=2,
        mode="plain",
        cache_scope="document",
    )
    units = shuffled_pages(sections, seed=0)
    for policy in (VARPolicy(config, profile.table()), TopPPolicy(0.7)):
        measured = UnitScorer(evaluator, units, chunk_units=3).measure(policy)
        whole, report = evaluator.losses(policy)
        change = dict(
            zip(
                (one.id for one in sections),
                whole.nll - evaluator.baseline_losses.nll,
                strict=True,
            )
        )
        expected = [sum(change[one.id] for one in unit) for unit in units]
        assert measured.change == pytest.approx(expected, abs=1e-3)
        assert measured.executed.sum() == sum(report.executed_pairs)
        assert measured.learned.sum() == sum(row[2] for row in report.tier_counts)
        assert measured.experts_per_token == pytest.approx(report.experts_per_token)
        assert measured.learned_pct == pytest.approx(report.learned_pct)
        assert measured.documents.sum() == 40
        assert abs(measured.change).max() > 0.05  # it does change something


def test_a_shared_cache_would_couple_documents(evaluator, sections, loaded):
    """The same check sees a cache that is kept over documents."""
    profile = collect_profile(loaded, sections, dataset="made", data_hash="x", max_tokens=None)
    config = VARConfig(
        frequency_threshold=10**6, confidence_threshold=0.6, context_window_size=2, mode="plain"
    )
    units = shuffled_pages(sections, seed=0)
    policy = VARPolicy(config, profile.table())
    measured = UnitScorer(evaluator, units, chunk_units=3).measure(policy)
    assert measured.executed.sum() != sum(evaluator.losses(policy)[1].executed_pairs)
