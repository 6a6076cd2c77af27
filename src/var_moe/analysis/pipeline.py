"""`profile_full_pipeline`: the analysis of a model that is at hand, with texts as they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.analysis.systems import AnalysisSettings, analyse
from var_moe.config import VARConfig
from var_moe.data.documents import require_documents
from var_moe.data.encoding import as_documents, check_documents
from var_moe.evaluation.evaluator import Evaluator, Progress, SpeedSetting
from var_moe.models.loading import LoadedModel
from var_moe.optimization.candidate import Candidate

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile

log = logging.getLogger(__name__)


def profile_full_pipeline(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str] | Any,
    *,
    config: Candidate | VARConfig | None = None,
    profile: RoutingProfile | None = None,
    settings: AnalysisSettings | None = None,
    setting: SpeedSetting | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profile a model's parts with and without VAR, and compare measured with predicted speedup.

    Args:
        model: a transformers MoE causal language model.
        tokenizer: its tokenizer.
        texts: what `var_moe.data.text.as_documents` takes: texts, or token ids.
        config: a `VARConfig` or another `Candidate`; by default the balanced preset.
        profile: routing statistics of other text. Without one, half of the texts are profiled
            and speed is measured on the other half.
        settings: how much is measured; by default `AnalysisSettings.quick`.
        setting: batch and sequence of the timed forwards.
        output: folder for ``systems_analysis.json`` and ``profile_report.json``.
        progress: called with a stage's name, steps done and in all.

    Returns:
        What these files hold: the analysis, with the parts under ``profile``.

    Raises:
        UsageError: the model is no MoE, or there is too little text.
    """
    from var_moe.calibration.collect import collect_profile

    loaded = LoadedModel.of(model, tokenizer)
    documents = as_documents(texts, tokenizer)
    check_documents(documents, model, tokenizer, "texts")
    if profile is None:
        require_documents(documents, 2, "profiling one half and timing the other")
        half = len(documents) // 2
        log.warning("no profile given: %d of the %d documents are profiled", half, len(documents))
        calibration, documents = documents[:half], documents[half:]
        profile = collect_profile(
            loaded, calibration, dataset="texts", data_hash="given", max_tokens=None
        )
    else:
        profile.check_loaded(loaded)
    found = analyse(
        Evaluator(loaded, documents, setting=setting or SpeedSetting()),
        profile,
        Candidate.of(config or VARConfig.preset("balanced")),
        settings or AnalysisSettings.quick(),
        progress=progress,
    )
    if output is not None:
        found.save(output)
    return {**found.systems, "profile": found.components}
