"""The certificate: what is claimed, in JSON and in words, and what is not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_moe.certification.inference import LEARNED, QUALITY, SPEEDUP, median_lower_bound
from var_moe.certification.judging import Verdict, describe_apart, learned_p, worst_test
from var_moe.certification.ordering import POWER
from var_moe.certification.plan import CertifySettings, Named, Study
from var_moe.certification.scoring import Unit, UnitScorer
from var_moe.evaluation.evaluator import Evaluator
from var_moe.optimization.preparation import EncodedText
from var_moe.optimization.selection import Standing, winner
from var_moe.routing.base import RoutingPolicy
from var_moe.storage import SCHEMA_VERSION, provenance, sha256_of

ONE_TEXT = "the documents are parts of one text, and not independent of each other"


def percent(value: float, digits: int = 2, *, sign: bool = False) -> str:
    """A share as a percentage."""
    return f"{100 * value:{'+' if sign else ''}.{digits}f}%"


def confidence_of(alpha: float) -> str:
    """1 - alpha as it is said."""
    return f"{100 * (1 - alpha):g}%"


def claim_sentence(
    *,
    alpha: float,
    bound: float,
    text: Mapping[str, Any],
    verdict: Mapping[str, Any],
    claims: Sequence[Mapping[str, Any]],
    confirmatory: bool,
) -> str:
    """The claims that hold, in one sentence, with what was measured."""
    low, high = verdict["degradation_interval"]
    source = f"{text['dataset']} ({text['split']} part)"
    decided = verdict.get("decided_by")
    if decided:
        names = [part["dataset"] for part in text["datasets"]]
        source = f"each of {', '.join(names)} ({text['split']} part)"
    sentence = (
        f"with {confidence_of(alpha)} confidence, on text like {source}, perplexity rises by less "
        f"than {100 * bound:g}% against the unmodified model"
    )
    for claim in claims:
        if claim["name"] == SPEEDUP and claim["holds"]:
            sentence += f", at {claim['at_least']:.3f} or more times its speed on this machine"
        if claim["name"] == LEARNED and claim["holds"]:
            sentence += f", and the router alone decides less than {claim['limit_pct']:g}%"
    sentence += (
        f"; measured {percent(verdict['degradation'], sign=True)} "
        f"[{percent(low)}, {percent(high)}] on "
        + (f"{decided}, the worst, of " if decided else "")
        + f"{verdict['documents']:,} documents"
    )
    speeds = [claim for claim in claims if claim["name"] == SPEEDUP and claim["holds"]]
    if speeds:
        sentence += f", {speeds[0]['measured']:.3f}x"
    sentence = sentence[0].upper() + sentence[1:] + "."
    return sentence if confirmatory else f"Not confirmatory: {sentence}"


def refusal_sentence(*, bound: float, alpha: float, why: str, nearest: Mapping[str, Any]) -> str:
    """That nothing is certified, why, and how near it came."""
    sentence = f"Not certified: {why}"
    value, upper = nearest["degradation"], nearest["degradation_upper"]
    worst = nearest.get("decided_by") or nearest.get("worst_dataset")
    place = f" on {worst}, the worst" if worst else ""
    return (
        f"{sentence}. Nearest miss: {nearest['name']}, measured {percent(value, sign=True)}"
        f"{place}, upper bound {percent(upper, sign=True)} against {100 * bound:g}% "
        f"(one-sided, {confidence_of(alpha)})"
    )


def not_claimed(
    *, sequential: bool, speed: bool, document_cache: bool, datasets: bool | None = None
) -> list[str]:
    """What a reader might take the certificate for, and must not.

    Args:
        sequential, speed, document_cache: what the certificate is of.
        datasets: of several data sets, whether the claim is about each; None for one.
    """
    whole = "each data set's whole" if datasets else "the whole"
    found = [
        "Other text: the claim is about text that the certify part is a random sample of.",
        f"Each document, or each kind of document: it is about the perplexity of {whole}.",
        "Answers, benchmarks or generated text: perplexity alone was measured.",
        "Other weights, tokenizers, dtypes or versions than those listed.",
        "The shown intervals: they describe single measurements and are no joint claims.",
        "An exact error rate: the tests hold for many pages, and come close for few.",
    ]
    if datasets is False:
        found.append(
            "The data sets apart: their rows describe, and have no error rate (--robust claims it "
            "of each)."
        )
    if speed:
        found.append(
            "Other hardware, batches or backends: the speedup is of this machine and setting, of "
            "scoring, not of generation."
        )
    if document_cache:
        found.append(
            "A cache that is kept over documents: it was emptied at each document's start "
            "(cache_scope 'document')."
        )
    if sequential:
        found.append("Text that was not reached: units were scored until the claim was decided.")
    return found


def how_tested(*, sequential: bool, ordered: bool, robust: bool = False) -> dict[str, str]:
    """The procedure, for people."""
    each = "; of each data set, the largest decides" if robust else ""
    return {
        "procedure": "fixed sequence, safest to fastest, ended by the first failure"
        if ordered
        else "Holm over all candidates",
        "test": "asymptotic confidence sequence (arXiv:2103.06476), valid at every look"
        if sequential
        else f"the larger p-value of a one-sided t test and a studentised bootstrap{each}",
        "unit": "page: all documents whose ids share what stands before '#'",
    }


@dataclass(frozen=True, kw_only=True)
class Work:
    """A frozen study, ready for its certify part."""

    settings: CertifySettings
    study: Study
    named: Mapping[str, Named]
    rows: Sequence[Mapping[str, Any]]
    policies: Mapping[str, RoutingPolicy | None]
    claims: Mapping[str, float]
    evaluator: Evaluator
    folder: Path
    validation: EncodedText
    say: Callable[[str], None]


def head(
    work: Work, text: EncodedText, *, units: int, documents: int, power: list[str]
) -> dict[str, Any]:
    """What stands in every certificate, whatever comes of it."""
    settings = work.settings
    identity = dict(work.study.identity)
    document_cache = any("cache_scope" in one.config.settings for one in work.named.values())
    return {
        "schema_version": SCHEMA_VERSION,
        "max_degradation": settings.max_degradation,
        "alpha": settings.alpha,
        "alpha_by_claim": dict(work.claims),
        "sequential": settings.sequential,
        "robust": settings.robust,
        **how_tested(
            sequential=settings.sequential, ordered=settings.ordered, robust=settings.robust
        ),
        "text": {**text.to_dict(), "documents": documents, "units": units},
        "ordering_text": work.validation.to_dict(),
        "candidates": [one.to_dict() for one in work.named.values()],
        "order": [dict(row) for row in work.rows],
        "power": power,
        "hashes": {
            "certify_part": text.data_hash,
            "validation": work.validation.data_hash,
            "profile": identity["profile_hash"],
            "compensation": identity["compensation_hashes"],
            "study": work.study.hash,
            # Fixes which of the part's documents, in which order, were drawn.
            "units": sha256_of([text.data_hash, str(settings.max_samples), str(settings.seed)]),
        },
        "identity": identity,
        "settings": settings.to_dict(),
        "not_claimed": not_claimed(
            sequential=settings.sequential,
            speed=SPEEDUP in work.claims,
            document_cache=document_cache,
            datasets=None if not text.parts else settings.robust,
        ),
        "provenance": provenance(),
    }


def too_few(work: Work, there: Mapping[str, int]) -> dict[str, Any]:
    """No candidate has a fair chance: said before the part is spent."""
    alpha = work.claims[QUALITY]
    possible = [row for row in work.rows if row["units_needed"] is not None]
    if possible:
        near = min(possible, key=lambda row: row["units_needed"])
        why = (
            f"too few documents: {near['units_needed']:,} pages needed to certify "
            f"{near['name']}, {there[near['name']]:,} there; the certify part was not opened"
        )
    else:
        near = min(work.rows, key=lambda row: row["degradation_upper"])
        why = (
            "no candidate is below the bound on the ordering part; the certify part was not opened"
        )
    return {
        "certified": False,
        "confirmatory": False,
        "not_confirmatory_because": ["the certify part was not opened"],
        "tests": [],
        "claims": [],
        "by_dataset": [],
        "nearest_miss": {**near, "config": work.named[near["name"]].config.to_dict()},
        "sentence": refusal_sentence(
            bound=work.settings.max_degradation, alpha=alpha, why=why, nearest=near
        ),
    }


def conclusion(
    work: Work,
    verdicts: Sequence[Verdict],
    evaluator: Evaluator,
    units: Sequence[Unit],
    head: Mapping[str, Any],
    *,
    confirmatory: bool,
) -> dict[str, Any]:
    """The fastest that passed, with every claim about it; or the nearest miss."""
    settings = work.settings
    passed = [verdict for verdict in verdicts if verdict.passed]
    if not passed:
        near = min(verdicts, key=lambda verdict: verdict.interval.upper)
        row = near.to_dict()
        return {
            "certified": False,
            "claims": [],
            "nearest_miss": {**row, "config": work.named[near.name].config.to_dict()},
            "by_dataset": _apart(work, near, evaluator, units),
            "sentence": refusal_sentence(
                bound=settings.max_degradation,
                alpha=work.claims[QUALITY],
                why=f"{near.name} was not shown to keep {100 * settings.max_degradation:g}% "
                f"(p = {near.p:.3g}, level {work.claims[QUALITY]:g}{_more_text(work, near)})",
                nearest=row,
            ),
        }
    # All of them passed, and the order is from the safest: of two equally fast ones the first.
    best = winner(
        passed,
        lambda one: Standing(keeps_bound=True, experts_per_token=one.measured.experts_per_token),
    )
    assert best is not None
    claims = _further_claims(work, best, evaluator, units)
    failed = [claim for claim in claims if claim.get("asked") and not claim["holds"]]
    sentence = claim_sentence(
        alpha=settings.alpha,
        bound=settings.max_degradation,
        text=head["text"],
        verdict=best.to_dict(),
        claims=claims,
        confirmatory=confirmatory,
    )
    config = work.named[best.name].config.to_dict()
    if failed:
        sentence = (
            f"Not certified: a learned share below {settings.max_learned_pct:g}% was not shown "
            f"(measured {best.measured.learned_pct:.1f}%). What holds: {sentence}"
        )
    return {
        "certified": not failed,
        "certified_name": best.name,
        "certified_config": config,
        "claims": claims,
        "by_dataset": _apart(work, best, evaluator, units),
        "nearest_miss": {**best.to_dict(), "config": config} if failed else None,
        "sentence": sentence,
    }


def _apart(
    work: Work, verdict: Verdict, evaluator: Evaluator, units: Sequence[Unit]
) -> list[dict[str, Any]]:
    return describe_apart(
        verdict.measured,
        units,
        evaluator,
        work.policies[verdict.name],
        confidence=1 - work.settings.alpha,
        alpha=work.claims[QUALITY],
        judged=work.settings.robust,
    )


def _more_text(work: Work, near: Verdict) -> str:
    """How many pages the ordering part asked for, where there were fewer."""
    need = next(row.get("units_needed") for row in work.rows if row["name"] == near.name)
    have = len(near.measured.tokens)
    if near.by_dataset:
        have = worst_test(near.by_dataset).units
    if need is None or need <= have:
        return ""
    return f"; {need:,} pages give it a chance of {100 * POWER:.0f}%, {have:,} were there"


def _further_claims(
    work: Work, best: Verdict, evaluator: Evaluator, units: Sequence[Unit]
) -> list[dict[str, Any]]:
    """Quality, which holds, and what else is claimed of the configuration."""
    policy = work.policies[best.name]
    claims: list[dict[str, Any]] = [
        {
            "name": QUALITY,
            "holds": True,
            "asked": True,
            "alpha": work.claims[QUALITY],
            "bound": work.settings.max_degradation,
            "p": best.p,
        }
    ]
    if LEARNED in work.claims:
        claims.append(_learned_claim(work, best, evaluator, units))
    if SPEEDUP in work.claims and policy is not None:
        claims.append(_speedup_claim(work, policy, evaluator))
    return claims


def _learned_claim(
    work: Work, best: Verdict, evaluator: Evaluator, units: Sequence[Unit]
) -> dict[str, Any]:
    settings, alpha = work.settings, work.claims[LEARNED]
    limit = settings.max_learned_pct
    assert limit is not None
    found = best.measured
    if settings.sequential:
        # The quality test ended when it was decided; the tiers need the whole part.
        scorer = UnitScorer(evaluator, units)
        found = scorer.all(work.policies[best.name], what=f"tiers: {best.name}")
    best_at = len(found.decisions) if settings.sequential else None
    p = learned_p(found, limit, best_at=best_at, alpha=alpha)
    return {
        "name": LEARNED,
        "holds": p <= alpha,
        "asked": True,
        "alpha": alpha,
        "limit_pct": limit,
        "measured_pct": found.learned_pct,
        "p": p,
    }


def _speedup_claim(work: Work, policy: RoutingPolicy, evaluator: Evaluator) -> dict[str, Any]:
    speed = evaluator.speed(policy, blocks=work.settings.blocks)
    low = median_lower_bound(speed.speedup.blocks, work.claims[SPEEDUP])
    return {
        "name": SPEEDUP,
        # A bound at or below 1 is true and says nothing: it is not claimed.
        "holds": low is not None and low > 1,
        "asked": False,
        "alpha": work.claims[SPEEDUP],
        "at_least": low,
        "measured": speed.speedup.median,
        "block_ratios": list(speed.speedup.blocks),
        **{name: value for name, value in speed.to_dict().items() if name != "speedup"},
    }
