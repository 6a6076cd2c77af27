"""Certify: freeze candidates, order them, open the certify part once, state what is proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import RoutingProfile
from var_moe.certification.judging import groups_to_test, judge_in_order
from var_moe.certification.ordering import order_candidates, power_line
from var_moe.certification.plan import CertifySettings, Ledger, Study, find_candidates
from var_moe.certification.scoring import UnitScorer
from var_moe.certification.statement import ONE_TEXT, conclusion, head, too_few
from var_moe.data.documents import shuffled_pages
from var_moe.data.text import check_robust
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.evaluator import Evaluator, Progress
from var_moe.models.checks import check_droppable
from var_moe.optimization.preparation import EncodedText, halves, read_text, sample_documents
from var_moe.optimization.results import CONFIG_FILE
from var_moe.optimization.validation import find_profile
from var_moe.report.certificate import certificate_page
from var_moe.routing.base import RoutingPolicy
from var_moe.storage import atomic_write_json, atomic_write_text, check_output_folder, jsonable

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel


CERTIFICATE_FILE = "certificate.json"
PAGE_FILE = "certificate.html"
CERTIFIED_CONFIG_FILE = "certified_config.json"
ORDERING_DOCUMENTS = 300


class NotCertifiedError(VarMoeError):
    """A claim could not be certified; `certificate` is what was written all the same."""

    def __init__(self, message: str, certificate: dict[str, Any]) -> None:
        super().__init__(message)
        self.certificate = self.result = certificate


def certify(
    loaded: LoadedModel,
    results: Path,
    *,
    dataset: str,
    settings: CertifySettings | None = None,
    output: Path | None = None,
    profile_path: Path | None = None,
    compensation: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Certify the fastest configuration of a results folder that keeps a bound.

    Candidates are frozen to ``certificate_frozen.json``, ordered on the ordering half of
    validation, and tested on the certify part, which the folder's ledger lets be used for one
    certificate only. Writes ``certificate.json``, ``certificate.html`` and, where it holds,
    ``certified_config.json``.

    Args:
        loaded: the model.
        results: results folder of `tune`.
        dataset: name or path of the text, or several as ``a,b,c``; its parts are validation and
            certify. Each of several is also reported apart.
        settings: what to claim and how.
        output: folder of the certificate; the results folder by default.
        profile_path: profile folder, where none lies in the results folder.
        compensation: folder of the learned compensation, where it is not the profile's own.
        progress: called with a stage's name, steps done and in all.
        say: called with each line worth showing.

    Returns:
        What ``certificate.json`` holds.

    Raises:
        UsageError: bad input, too little text, or a certify part that was opened before.
        NotCertifiedError: a claim does not hold; the nearest miss is in the certificate.
    """
    settings = settings or CertifySettings()
    check_robust(settings.robust, dataset)
    check_droppable(loaded.name, loaded.top_k)
    folder = Path(results)
    place = check_output_folder(output or folder)
    candidates = find_candidates(
        folder, max_degradation=settings.max_degradation, at_most=settings.candidates
    )
    profile = find_profile(folder / CONFIG_FILE, profile_path)
    profile.check_loaded(loaded)
    if compensation is not None:
        profile = profile.with_compensation(load_compensation(compensation, loaded))
    validation = read_text(dataset, "validation", loaded)
    policies = {
        name: None if one.policy == "native" else one.make(profile)
        for name, one in candidates.items()
    }
    study = Study(
        candidates=candidates,
        settings=settings,
        identity={
            "model": loaded.name,
            "revision": loaded.revision,
            "dtype": loaded.dtype,
            "device": str(loaded.device.type),
            "dataset": dataset,
            "validation_hash": validation.data_hash,
            "profile_hash": profile.hash,
            "compensation_hashes": {
                name: policy.compensation.hash
                for name, policy in policies.items()
                if policy is not None and policy.compensation is not None
            },
        },
    )
    rows = study.freeze(place)
    say(f"frozen: {len(candidates)} candidates, study {study.hash[:12]}")
    # The certify part is read with the candidates on disk, and scored with their order on disk.
    text = read_text(dataset, "certify", loaded)
    _check_apart(text, validation, profile)
    ledger = Ledger(folder)
    ledger.check_unused(text.data_hash, study.hash)
    ordering = sample_documents(halves(validation.documents)[1], ORDERING_DOCUMENTS, settings.seed)
    evaluator = Evaluator(loaded, ordering, setting=settings.setting, progress=progress)
    if rows is None:
        units = shuffled_pages(ordering, seed=settings.seed)
        judged = groups_to_test(units, robust=settings.robust, step="ordering candidates")
        rows = order_candidates(UnitScorer(evaluator, units), policies, judged, study.quality)
        study.write(place, rows)
    result = _tested(study, rows, policies, text, validation, ledger, evaluator, say)
    return _write(place, result, ledger)


def _check_apart(text: EncodedText, validation: EncodedText, profile: RoutingProfile) -> None:
    """Refuse a certify part that was profiled, or with documents that were tuned on."""
    if text.data_hash == profile.head["data_hash"]:
        raise UsageError(
            f"{text.dataset}: {text.split!r} was profiled; certify on text that was not used"
        )
    seen = {document.ids.tobytes() for document in validation.documents}
    same = sum(document.ids.tobytes() in seen for document in text.documents)
    if same:
        raise UsageError(
            f"{text.dataset}: {same} of the {len(text.documents)} documents of {text.split!r} are "
            "also in 'validation'; certify on text that was not tuned on"
        )


def _tested(
    study: Study,
    rows: Sequence[Mapping[str, Any]],
    policies: Mapping[str, RoutingPolicy | None],
    text: EncodedText,
    validation: EncodedText,
    ledger: Ledger,
    evaluator: Evaluator,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Open the certify part for a frozen study, and test; what ``certificate.json`` will hold."""
    settings, claim = study.settings, study.quality
    documents = sample_documents(text.documents, settings.max_samples, settings.seed)
    units = shuffled_pages(documents, seed=settings.seed)
    judged = groups_to_test(units, robust=settings.robust, step="certifying")
    there = {
        row["name"]: len(judged[row["worst_dataset"]] if "worst_dataset" in row else units)
        for row in rows
    }
    power = [power_line(row, there[row["name"]]) for row in rows]
    for line in power:
        say(line)
    known = head(
        study, rows, text, validation, units=len(units), documents=len(documents), power=power
    )
    even = [(row["units_for_even_chance"], there[row["name"]]) for row in rows]
    if not any(need is not None and need <= count for need, count in even):
        return {**known, "opened": False, **too_few(study, rows, there)}
    objections = [] if text.independent else [ONE_TEXT]
    about = {name: known["text"][name] for name in ("dataset", "split", "documents")}
    ledger.open(text.data_hash, study.hash, confirmatory=not objections, **about)
    scorer = UnitScorer(evaluator.with_documents(documents), units)
    order = [row["name"] for row in rows]
    verdicts = judge_in_order(scorer, policies, order, judged, claim)
    return {
        **known,
        "opened": True,
        "confirmatory": not objections,
        "not_confirmatory_because": objections,
        "tests": [verdict.to_dict() for verdict in verdicts],
        **conclusion(study, rows, policies, verdicts, scorer, known["text"]),
    }


def _write(folder: Path, result: dict[str, Any], ledger: Ledger) -> dict[str, Any]:
    """Write the files, each whole; raise where a claim does not hold."""
    clean: dict[str, Any] = jsonable(result)
    config = folder / CERTIFIED_CONFIG_FILE
    if clean["certified"]:
        atomic_write_json(config, clean["certified_config"])
    else:
        config.unlink(missing_ok=True)
    atomic_write_text(folder / PAGE_FILE, certificate_page(clean))
    atomic_write_json(folder / CERTIFICATE_FILE, clean)
    if clean["opened"]:
        hashes = clean["hashes"]
        ledger.finish(hashes["certify_part"], hashes["study"], certified=clean["certified"])
    if not clean["certified"]:
        raise NotCertifiedError(
            f"{clean['sentence']}; it is saved in {folder / CERTIFICATE_FILE}", clean
        )
    return clean
