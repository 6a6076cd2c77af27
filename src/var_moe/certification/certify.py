"""Certify: freeze candidates, order them, open the certify part once, state what is proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import RoutingProfile
from var_moe.certification.inference import (
    LEARNED,
    QUALITY,
    SPEEDUP,
    QualityClaim,
    blocks_needed,
    split_alpha,
)
from var_moe.certification.judging import judge_all, judged_apart
from var_moe.certification.ordering import (
    LEAST_POWER,
    Pilot,
    order_candidates,
    power_line,
    units_there,
)
from var_moe.certification.plan import CertifySettings, Ledger, Study, find_candidates
from var_moe.certification.scoring import Unit, UnitScorer
from var_moe.certification.statement import ONE_TEXT, Work, conclusion, head, too_few
from var_moe.data.documents import shuffled_pages
from var_moe.data.text import check_robust
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.evaluator import Evaluator, Progress
from var_moe.evaluation.perplexity import Groups
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
LEAST_UNITS = 10


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
    reuse: bool = False,
    output: Path | None = None,
    profile_path: Path | None = None,
    compensation: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Certify the fastest configuration of a results folder that keeps a bound.

    Candidates are frozen to ``certificate_frozen.json``, ordered on the ordering half of
    validation, and tested on the certify part, which the folder's ledger lets confirm once.
    Writes ``certificate.json``, ``certificate.html`` and, where it holds,
    ``certified_config.json``.

    Args:
        loaded: the model.
        results: results folder of `tune`.
        dataset: name or path of the text, or several as ``a,b,c``; its parts are validation and
            certify. Each of several is also reported apart.
        settings: what to claim and how.
        reuse: allow a certify part that was opened before; the certificate is then marked as
            not confirmatory.
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
        folder,
        max_degradation=settings.max_degradation,
        at_most=settings.candidates,
        top_k=loaded.top_k,
    )
    profile = find_profile(folder / CONFIG_FILE, profile_path)
    profile.check_loaded(loaded)
    if compensation is not None:
        profile = profile.with_compensation(load_compensation(compensation, loaded))
    validation = read_text(dataset, "validation", loaded)
    _, ordering_half = halves(validation.documents)
    ordering = sample_documents(ordering_half, settings.ordering_samples, settings.seed)
    evaluator = Evaluator(loaded, ordering, setting=settings.setting, progress=progress)
    policies = {
        name: None if one.policy == "native" else one.make(profile)
        for name, one in candidates.items()
    }
    study = Study(
        candidates=candidates,
        settings=settings.to_dict(),
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
    claims = _claims(settings, policies)
    rows = study.freeze(place)
    say(f"frozen: {len(candidates)} candidates, study {study.hash[:12]}")
    # Only now, with the candidates on disk, is the certify part read; it is scored when the order
    # is on disk as well.
    text = read_text(dataset, settings.split, loaded)
    _check_apart(text, validation, profile)
    ledger = Ledger(folder)
    opened_before = ledger.objection(text.data_hash, study.hash, reuse=reuse)
    if rows is None:
        rows = _order(settings, settings.quality(claims[QUALITY]), evaluator, policies)
        study.write(place, rows)
    work = Work(
        settings=settings,
        study=study,
        rows=rows,
        policies=policies,
        claims=claims,
        validation=validation,
    )
    objections = [opened_before] if opened_before else []
    if not text.independent:
        objections.append(ONE_TEXT)
    result = _tested(work, text, ledger, evaluator, objections, say)
    return _write(place, result, ledger)


def _claims(
    settings: CertifySettings, policies: Mapping[str, RoutingPolicy | None]
) -> Mapping[str, float]:
    """Each claim that will be made, with its part of alpha."""
    names = [QUALITY]
    if settings.blocks and any(policies.values()):
        names.append(SPEEDUP)
    if settings.max_learned_pct is not None:
        names.append(LEARNED)
    shares = split_alpha(settings.alpha, names)
    if SPEEDUP in shares and settings.blocks < blocks_needed(shares[SPEEDUP]):
        raise UsageError(
            f"blocks = {settings.blocks}: a speedup bound at {100 * shares[SPEEDUP]:g}% needs at "
            f"least {blocks_needed(shares[SPEEDUP])} blocks, or 0 for no speedup claim"
        )
    return shares


def _order(
    settings: CertifySettings,
    claim: QualityClaim,
    evaluator: Evaluator,
    policies: Mapping[str, RoutingPolicy | None],
) -> list[dict[str, Any]]:
    if not settings.ordered:
        return [{"name": name} for name in policies]
    units = shuffled_pages(evaluator.documents, seed=settings.seed)
    judged = _judged(units, settings, "ordering candidates")
    return order_candidates(UnitScorer(evaluator, units, judged=judged), policies, claim)


def _judged(units: Sequence[Unit], settings: CertifySettings, step: str) -> Groups:
    """The data sets that a claim must hold on; refuses too little text of any."""
    judged = judged_apart(units, robust=settings.robust)
    counts = {f" of {name!r}": len(at) for name, at in judged.items()} or {"": len(units)}
    for name, count in counts.items():
        if count < LEAST_UNITS:
            raise UsageError(
                f"too few pages{name} for {step}: {count}, at least {LEAST_UNITS} needed"
            )
    return judged


def _check_apart(text: EncodedText, validation: EncodedText, profile: RoutingProfile) -> None:
    """Refuse a certify part that was profiled, or with documents that were tuned on."""
    if text.data_hash == profile.head["data_hash"]:
        raise UsageError(f"{text.dataset}: {text.split!r} was profiled; what was can't certify")
    seen = {document.ids.tobytes() for document in validation.documents}
    same = sum(document.ids.tobytes() in seen for document in text.documents)
    if same:
        raise UsageError(
            f"{text.dataset}: {same} of the {len(text.documents)} documents of {text.split!r} are "
            "also in 'validation'; what was tuned on can't certify"
        )


def _tested(
    work: Work,
    text: EncodedText,
    ledger: Ledger,
    evaluator: Evaluator,
    objections: list[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Open the certify part for a frozen study, and test; what ``certificate.json`` will hold."""
    settings, claim = work.settings, work.quality
    documents = sample_documents(text.documents, settings.max_samples, settings.seed)
    units = shuffled_pages(documents, seed=settings.seed)
    judged = _judged(units, settings, "certifying")
    there, chances, power = {}, [], []
    for row in work.rows if settings.ordered else ():
        count = there[row["name"]] = units_there(row, len(units), judged)
        pilot = Pilot.of_row(row)
        chances.append(pilot.chance(count, alpha=claim.alpha, sequential=claim.sequential))
        power.append(power_line(row, count, chances[-1]))
        say(power[-1])
    known = head(work, text, units=len(units), documents=len(documents), power=power)
    if chances and max(chances) < LEAST_POWER:
        return {**known, "opened": False, **too_few(work, there)}
    ledger.open(text.data_hash, work.study.hash, text.to_dict(), confirmatory=not objections)
    evaluator = evaluator.with_documents(documents)
    scorer = UnitScorer(evaluator, units, judged=judged)
    verdicts = judge_all(scorer, work.rows, work.policies, claim, ordered=settings.ordered)
    confirmatory = not objections
    return {
        **known,
        "opened": True,
        "confirmatory": confirmatory,
        "not_confirmatory_because": objections,
        "tests": [verdict.to_dict() for verdict in verdicts],
        **conclusion(work, verdicts, evaluator, units, known["text"], confirmatory=confirmatory),
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
