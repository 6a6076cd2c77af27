"""What is compared on, the methods' names, and where finished runs stand; imports no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SETUP_FILE = "setup.json"

LABELS = {
    "random": "random search",
    "tpe": "TPE (Optuna)",
    "gp": "GP (Optuna)",
    "skopt": "GP (scikit-optimize)",
    "replay": "replay",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is compared on; a folder holds runs of one setting.

    Args:
        model, dataset: of all runs.
        documents: of the search half of validation, in each full evaluation; by default so few
            that one takes 1.4 s of one core, and the 2,100 of ten seeds less than 50 minutes.
        ordering_documents: of the ordering half, for the choice of the final configuration.
        test_documents: of test, for its last measurement.
        evaluations: full evaluations of each method but replay.
        replay_evaluations: those of replay.
        candidates: how many are measured again on the ordering text at the most.
        max_degradation: the bound.
        mode: of VAR.
        threads: of torch.
    """

    model: str = "demo"
    dataset: str = "demo"
    documents: int = 24
    ordering_documents: int = 150
    test_documents: int = 200
    evaluations: int = 50
    replay_evaluations: int = 10
    candidates: int = 8
    max_degradation: float = 0.01
    mode: str = "verified"
    threads: int = 1


def run_file(folder: Path, method: str, seed: int) -> Path:
    """Where a finished run stands."""
    return folder / "runs" / f"seed-{seed:02d}" / f"{method}.json"
