"""Document losses for resampling, recorded once on the demo's validation text.

The rows are whole pages, drawn at random: sections of one page are not independent, and a
simulation that resamples them must keep them together.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from var_moe.config import VARConfig
from var_moe.storage import atomic_write_text

POLICIES: dict[str, tuple[str, dict[str, float]]] = {
    "top_p_0.90": ("top_p", {"p": 0.90}),
    "top_p_0.80": ("top_p", {"p": 0.80}),
    "top_p_0.70": ("top_p", {"p": 0.70}),
    "random_skip_0.10": ("random_skip", {"share": 0.10}),
    "fixed_k_1": ("fixed_k", {"k": 1}),
}
"""Column -> a policy of the registry that needs no calibration, and its settings."""

VAR: dict[str, VARConfig] = {
    f"{mode}_{confidence:.2f}": VARConfig(
        frequency_threshold=10,
        entropy_threshold=0.8,
        confidence_threshold=confidence,
        cache_size=4000,
        context_window_size=context,
        mode=mode,
        cache_scope="document",
    )
    for mode, confidence, context in (
        ("verified", 0.90, 4),
        ("verified", 0.80, 4),
        ("verified", 0.72, 4),
        ("plain", 0.80, 4),
        ("plain", 0.70, 2),
    )
}


def record(path: Path, *, profile_folder: Path, documents: int, model: str = "demo") -> None:
    """Score pages of validation text under each policy and write a table of losses.

    Args:
        path: CSV: page, tokens, baseline, and a column per policy (nats summed over a document).
        profile_folder: routing profile of the model, for VAR's table and residual means.
        documents: about how many; the last page is taken whole.
        model: name or folder.
    """
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.data.documents import page_of
    from var_moe.evaluation.evaluator import Evaluator
    from var_moe.models.loading import load_model
    from var_moe.optimization.preparation import read_text
    from var_moe.routing.registry import make_policy
    from var_moe.routing.var import VARPolicy

    loaded = load_model(model)
    profile = RoutingProfile.load(profile_folder)
    profile.check_loaded(loaded)
    text = read_text("demo", "validation", loaded)
    pages = sorted({page_of(document.id) for document in text.documents})
    chosen: list[str] = []
    count = 0
    for at in np.random.default_rng(7).permutation(len(pages)):
        if count >= documents:
            break
        chosen.append(pages[at])
        count += sum(page_of(document.id) == pages[at] for document in text.documents)
    scored = [document for document in text.documents if page_of(document.id) in chosen]
    evaluator = Evaluator(loaded, scored)
    columns = {"baseline": evaluator.baseline_losses.nll}
    policies = {name: make_policy(*given) for name, given in POLICIES.items()}
    for name, config in VAR.items():
        policies[name] = VARPolicy(config, profile.table(), residuals=profile.residuals)
    for name, policy in policies.items():
        columns[name] = evaluator.losses(policy)[0].nll
        print(f"{name}: recorded", flush=True)
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["page", "tokens", *columns])
    for row, document in enumerate(scored):
        values = [f"{losses[row]:.4f}" for losses in columns.values()]
        tokens = int(evaluator.baseline_losses.tokens[row])
        table.writerow([page_of(document.id), tokens, *values])
    atomic_write_text(path, buffer.getvalue())
