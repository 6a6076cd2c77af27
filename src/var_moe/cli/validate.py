"""``var-moe tune --validate``: one configuration on held-out text."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from var_moe.cli.compensation import parse_compensation
from var_moe.cli.output import Answer
from var_moe.config import MAX_DEGRADATION
from var_moe.errors import UsageError


def validate(
    config: Path,
    *,
    compensation: str | None,
    model: str | None,
    dataset: str | None,
    split: str,
    max_degradation: float | None,
    robust: bool,
    output: Path | None,
    profile: Path | None,
    mode: str | None,
    max_samples: int | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    quiet: bool,
) -> Answer:
    """Check, measure, print; for the arguments see `cli.tune.tune`."""
    from var_moe.config import check_bound
    from var_moe.data.text import check_dataset, check_robust, names_of
    from var_moe.models.loading import check_name
    from var_moe.optimization.candidate import load_candidate
    from var_moe.storage import check_output_folder

    load_candidate(config)
    name, place = parse_compensation(compensation)
    if name is not None and place is None:
        raise UsageError(f"--compensation {name}: the configuration names it; expected a folder")
    searched = search_of(config)
    model = model or searched.model
    dataset = dataset or searched.dataset
    if max_degradation is None:
        max_degradation = searched.max_degradation
    bound = check_bound(max_degradation)
    if robust:
        check_robust(robust, dataset)
    else:  # as its search did, where the text is of several data sets again
        robust = searched.robust and len(names_of(dataset)) > 1
    if output:
        check_output_folder(output)
    check_name(model)
    check_dataset(dataset)
    if not quiet:
        print(f"validating {config} of {model} on {dataset} ({split}) ...", file=sys.stderr)
    from var_moe.cli.progress import StageProgress
    from var_moe.cli.report import make_report
    from var_moe.cli.tables import print_validation
    from var_moe.models.loading import load_model
    from var_moe.optimization.validation import find_profile
    from var_moe.optimization.validation import validate as run_validate

    find_profile(config, profile)
    with StageProgress() as progress:
        loaded = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        result = run_validate(
            loaded,
            config,
            dataset=dataset,
            split=split,
            max_degradation=bound,
            robust=robust,
            output=output,
            profile_path=profile,
            compensation=place,
            mode=mode,
            max_samples=max_samples,
            progress=None if quiet else progress,
        )
    print_validation(result, folder=output or config.parent)
    make_report(output or config.parent)
    return Answer(result)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A search's model, dataset, bound and judgement; of an unknown one, those of the demo."""

    model: str = "demo"
    dataset: str = "demo"
    max_degradation: float = MAX_DEGRADATION
    robust: bool = False


def search_of(config: Path) -> Searched:
    """That of the search, as far as the file beside its configuration says so."""
    from var_moe.optimization.results import METADATA_FILE
    from var_moe.storage import entries_of, read_json

    beside = config.parent / METADATA_FILE
    if not beside.is_file():
        return Searched()
    metadata = read_json(beside, what="metadata of a search")
    with entries_of(beside):
        known = {**metadata.get("identity", {}), **metadata.get("settings", {})}
    names = ("model", "dataset", "max_degradation", "robust")
    return Searched(**{key: known[key] for key in names if key in known})
