"""From calibration text to predicted damages, and on to a learned compensation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

from var_moe.calibration.fit_compensation import KEPT_SHARES, FitSettings, fit_compensation
from var_moe.calibration.fit_damage import fit_damage, predicted, tau_for
from var_moe.calibration.fitted_files import FittedCompensation
from var_moe.calibration.without_backward import trace_without_backward
from var_moe.models.checks import check_droppable
from var_moe.models.identity import identity
from var_moe.models.moe_layers import experts_shape
from var_moe.routing.compensation import Compensation
from var_moe.storage import provenance
from var_moe.tracing.record import NoBackwardError, record_trace

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.data.documents import EncodedDocument
    from var_moe.evaluation.evaluator import Progress
    from var_moe.models.loading import LoadedModel
    from var_moe.routing.damage import DamageModel
    from var_moe.tracing.trace import RoutingTrace

log = logging.getLogger(__name__)

DAMAGE_TOKENS = 150_000
"""Calibration tokens of a damage pass."""
HIDDEN_BYTES = 4 * 2**30
"""Above this the layers' inputs are not recorded, and damages are predicted without them."""


def calibration_trace(
    loaded: LoadedModel,
    documents: Sequence[EncodedDocument],
    *,
    data: Mapping[str, str],
    compensation: Compensation | None,
    tokens: int = DAMAGE_TOKENS,
    folder: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RoutingTrace:
    """Record what damages are fitted to: one backward pass on labels sampled from the model.

    Where the model allows none, sizes of changes stand in (`calibration.without_backward`), and
    this is logged. ``data`` has ``dataset`` and ``data_hash`` for the trace's head; damages with
    ``compensation`` in place are taken, too; at most ``tokens`` are drawn with ``seed``. The trace
    grows in ``folder``, so that a killed pass goes on there; by default in memory.
    """
    about = identity(loaded)
    hidden = experts_shape(loaded.model)["hidden"]
    told = partial(progress, "predicting damages") if progress else None
    try:
        return record_trace(
            loaded,
            documents,
            dataset=data["dataset"],
            data_hash=data["data_hash"],
            folder=folder,
            compensation=compensation,
            sampled_labels=True,
            stored=False,
            hidden=2 * hidden * about["layers"] * tokens <= HIDDEN_BYTES,
            max_tokens=tokens,
            seed=seed,
            progress=told,
        )
    except NoBackwardError as error:
        log.warning("%s; damages are estimated from the sizes of changes instead", error)
        return trace_without_backward(
            loaded, documents, compensation=compensation, tokens=tokens, seed=seed, progress=told
        )


def with_damages(
    loaded: LoadedModel,
    profile: RoutingProfile,
    documents: Sequence[EncodedDocument],
    *,
    data: Mapping[str, str],
    tokens: int = DAMAGE_TOKENS,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> RoutingProfile:
    """The profile with its damages: for rescaled cuts, and with residual means where K = 2.

    It is returned as it is where there is nothing to drop (K = 1), or for 0 tokens. See
    `calibration_trace`; ``folder`` is removed at the end.
    """
    if not tokens or loaded.top_k == 1:
        return profile
    means = profile.compensations().get("means")
    trace = calibration_trace(
        loaded,
        documents,
        data=data,
        compensation=means,
        tokens=tokens,
        folder=folder,
        progress=progress,
    )
    vocabulary = int(profile.head["vocabulary"])
    damages = {"none": fit_damage(trace, vocabulary=vocabulary)}
    if means is not None:
        damages["means"] = fit_damage(trace, vocabulary=vocabulary, compensation=means)
    if folder is not None:
        rmtree(folder, ignore_errors=True)
    return replace(profile, damages=damages)


def learn_compensation(
    loaded: LoadedModel,
    profile: RoutingProfile,
    documents: Sequence[EncodedDocument],
    *,
    data: Mapping[str, str],
    settings: FitSettings | None = None,
    damage_tokens: int = DAMAGE_TOKENS,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> FittedCompensation:
    """Fit a compensation, and the damages with it in place.

    Decisions are cut by the profile's damages (with residual means where it has them) at taus
    that leave 55-80% of the experts.

    Args:
        loaded: the model.
        profile: of the same model.
        documents: calibration text.
        data: ``dataset`` and ``data_hash``.
        settings: of the fit.
        damage_tokens: of the damage passes, before and after.
        checkpoint: file that a killed fit goes on from; it is there until you remove it.
        progress: called with what is done, steps done and in all.

    Raises:
        UsageError: too little text, or a model with one expert per token.
        VarMoeError: the fit is no better than none, see `fit_compensation`.
    """
    check_droppable(loaded.name, loaded.top_k)
    about = identity(loaded)
    start = profile.compensations().get("means")
    vocabulary, top_k = int(profile.head["vocabulary"]), int(about["top_k"])

    def damages(compensation: Compensation | None) -> tuple[DamageModel, RoutingTrace]:
        trace = calibration_trace(
            loaded,
            documents,
            data=data,
            compensation=compensation,
            tokens=damage_tokens,
            progress=progress,
        )
        return fit_damage(trace, vocabulary=vocabulary, compensation=compensation), trace

    before, trace = damages(start)
    sizes = predicted(trace, before)
    taus = [tau_for(sizes, max(1.0, share * top_k)) for share in KEPT_SHARES]
    empty = Compensation.empty(**experts_shape(loaded.model))
    compensation, fit = fit_compensation(
        loaded,
        documents,
        damage=before,
        taus=taus,
        start=start or empty,
        settings=settings,
        checkpoint=checkpoint,
        progress=progress,
    )
    after, _ = damages(compensation)
    head = {
        **about,
        **data,
        "profile_hash": profile.hash,
        "fit": fit,
        "damage_tokens": damage_tokens,
        "provenance": provenance(),
    }
    return FittedCompensation(damage=after, head=head)
