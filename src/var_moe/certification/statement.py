"""The certificate: what is claimed, in JSON and in words, and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from var_moe.certification.inference import (
    LEARNED,
    QUALITY,
    SPEEDUP,
    QualityClaim,
    median_lower_bound,
)
from var_moe.certification.judging import Verdict, describe_apart, learned_p
from var_moe.certification.ordering import POWER
from var_moe.certification.plan import CertifySettings, Study
from var_moe.certification.scoring import Unit, UnitScorer
from var_moe.evaluation.evaluator import Evaluator
from var_moe.optimization.preparation import EncodedText
from var_moe.optimization.selection import Standing, winner
from var_moe.routing.base import RoutingPolicy
from var_moe.storage import SCHEMA_VERSION, provenance, sha256_of

ONE_TEXT = "the documents are parts of one text, and not independent of each other"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A frozen study, ready for its certify part."""

    settings: CertifySettings
    study: Study
    rows: Sequence[Mapping[str, Any]]  # the candidates in their order
    policies: Mapping[str, RoutingPolicy | None]
    claims: Mapping[str, float]  # each claim's part of alpha
    validation: EncodedText

    @property
    def quality(self) -> QualityClaim:
        """What is tested of every candidate."""
        return self.settings.quality(self.claims[QUALITY])

    def missed(self, row: Mapping[str, Any], why: str) -> dict[str, Any]:
        """What a certificate holds where no claim does: why, and the nearest miss."""
        return {
            "certified": False,
            "claims": [],
            "nearest_miss": {**row, "config": self.study.candidates[row["name"]].to_dict()},
            "sentence": _refusal(self.quality, why, row),
        }


def _percent(value: float, *, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.2f}%"


def _sentence(
    work: Work,
    text: Mapping[str, Any],
    verdict: Mapping[str, Any],
    claims: Sequence[Mapping[str, Any]],
    *,
    confirmatory: bool,
) -> str:
    """The claims that hold, in one sentence, with what was measured."""
    source, worst = text["dataset"], ""
    if "decided_by" in verdict:
        source = f"each of {', '.join(part['dataset'] for part in text['datasets'])}"
        worst = f"{verdict['decided_by']}, the worst, of "
    sentence = (
        f"With {100 * (1 - work.settings.alpha):g}% confidence, on text like {source} "
        f"({text['split']} part), perplexity rises by less than "
        f"{100 * work.settings.max_degradation:g}% against the unmodified model"
    )
    holding = {claim["name"]: claim for claim in claims if claim["holds"]}
    if SPEEDUP in holding:
        least = holding[SPEEDUP]["at_least"]
        sentence += f", at {least:.3f} or more times its speed on this machine"
    if LEARNED in holding:
        limit = holding[LEARNED]["limit_pct"]
        sentence += f", and the router alone decides less than {limit:g}%"
    low, high = verdict["degradation_interval"]
    sentence += (
        f"; measured {_percent(verdict['degradation'], sign=True)} "
        f"[{_percent(low)}, {_percent(high)}] on {worst}{verdict['documents']:,} documents"
    )
    if SPEEDUP in holding:
        sentence += f", {holding[SPEEDUP]['measured']:.3f}x"
    return f"{sentence}." if confirmatory else f"Not confirmatory: {sentence}."


def _refusal(claim: QualityClaim, why: str, nearest: Mapping[str, Any]) -> str:
    """That nothing is certified, why, and how near it came."""
    worst = nearest.get("decided_by") or nearest.get("worst_dataset")
    place = f" on {worst}, the worst" if worst else ""
    return (
        f"Not certified: {why}. Nearest miss: {nearest['name']}, measured "
        f"{_percent(nearest['degradation'], sign=True)}{place}, upper bound "
        f"{_percent(nearest['degradation_upper'], sign=True)} against {100 * claim.bound:g}% "
        f"(one-sided, {100 * (1 - claim.alpha):g}%)"
    )


def not_claimed(work: Work, *, several: bool) -> list[str]:
    """What a reader might take the certificate for, and must not.

    Args:
        work: what the certificate is of.
        several: whether the text is several data sets.
    """
    settings = work.settings
    whole = "each data set's whole" if settings.robust else "the whole"
    lines = [
        "Other text: the claim is about text that the certify part is a random sample of.",
        f"Each document, or each kind of document: it is about the perplexity of {whole}.",
        "Answers, benchmarks or generated text: perplexity alone was measured.",
        "Other weights, tokenizers, dtypes or versions than those listed.",
        "The shown intervals: they describe single measurements and are no joint claims.",
        "An exact error rate: the tests hold for many pages, and come close for few.",
    ]
    if several and not settings.robust:
        lines.append(
            "The data sets apart: their rows describe, and have no error rate (--robust claims it "
            "of each)."
        )
    if SPEEDUP in work.claims:
        lines.append(
            "Other hardware, batches or backends: the speedup is of this machine and setting, of "
            "scoring, not of generation."
        )
    if any("cache_scope" in one.settings for one in work.study.candidates.values()):
        lines.append(
            "A cache that is kept over documents: it was emptied at each document's start "
            "(cache_scope 'document')."
        )
    if settings.sequential:
        lines.append("Text that was not reached: units were scored until the claim was decided.")
    return lines


def how_tested(settings: CertifySettings) -> dict[str, str]:
    """The procedure, for people."""
    procedure = "Holm over all candidates"
    if settings.ordered:
        procedure = "fixed sequence, safest to fastest, ended by the first failure"
    test = "the larger p-value of a one-sided t test and a studentised bootstrap"
    if settings.sequential:
        test = "asymptotic confidence sequence (arXiv:2103.06476), valid at every look"
    elif settings.robust:
        test += "; of each data set, the largest decides"
    unit = "page: all documents whose ids share what stands before '#'"
    return {"procedure": procedure, "test": test, "unit": unit}


def head(
    work: Work, text: EncodedText, *, units: int, documents: int, power: list[str]
) -> dict[str, Any]:
    """What stands in every certificate, whatever comes of it."""
    settings, study = work.settings, work.study.content()
    identity = study["identity"]
    return {
        "schema_version": SCHEMA_VERSION,
        "max_degradation": settings.max_degradation,
        "alpha": settings.alpha,
        "alpha_by_claim": dict(work.claims),
        "sequential": settings.sequential,
        "robust": settings.robust,
        **how_tested(settings),
        "text": {**text.to_dict(), "documents": documents, "units": units},
        "ordering_text": work.validation.to_dict(),
        "candidates": study["candidates"],
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
        "settings": study["settings"],
        "not_claimed": not_claimed(work, several=bool(text.parts)),
        "provenance": provenance(),
    }


def too_few(work: Work, there: Mapping[str, int]) -> dict[str, Any]:
    """No candidate has a fair chance: said before the part is spent."""
    possible = [row for row in work.rows if row["units_needed"] is not None]
    if possible:
        near = min(possible, key=lambda row: row["units_needed"])
        name, needed = near["name"], near["units_needed"]
        why = f"too few documents: {needed:,} pages needed to certify {name}, {there[name]:,} there"
    else:
        near = min(work.rows, key=lambda row: row["degradation_upper"])
        why = "no candidate is below the bound on the ordering part"
    return {
        **work.missed(near, f"{why}; the certify part was not opened"),
        "confirmatory": False,
        "not_confirmatory_because": ["the certify part was not opened"],
        "tests": [],
        "by_dataset": [],
    }


def conclusion(
    work: Work,
    verdicts: Sequence[Verdict],
    evaluator: Evaluator,
    units: Sequence[Unit],
    text: Mapping[str, Any],
    *,
    confirmatory: bool,
) -> dict[str, Any]:
    """The fastest that passed, with every claim about it; or the nearest miss."""
    settings, claim = work.settings, work.quality
    # Of those that passed, ordered from the safest: of two equally fast ones the first.
    best = winner(
        verdicts,
        lambda one: Standing(
            keeps_bound=one.passed, experts_per_token=one.measured.experts_per_token
        ),
    )
    chosen = best or min(verdicts, key=lambda one: one.worst.interval.upper)
    policy, row = work.policies[chosen.name], chosen.to_dict()
    apart = describe_apart(chosen.measured, units, evaluator, policy, claim, judged=settings.robust)
    if best is None:
        why = (
            f"{chosen.name} was not shown to keep {100 * claim.bound:g}% "
            f"(p = {chosen.p:.3g}, level {claim.alpha:g}{_more_text(work, chosen)})"
        )
        return {**work.missed(row, why), "by_dataset": apart}
    claims: list[dict[str, Any]] = [
        {
            "name": QUALITY,
            "holds": True,
            "asked": True,
            "alpha": claim.alpha,
            "bound": claim.bound,
            "p": best.p,
        }
    ]
    if LEARNED in work.claims:
        claims.append(_learned_claim(work, best, evaluator, units))
    if SPEEDUP in work.claims and policy is not None:
        claims.append(_speedup_claim(work, policy, evaluator))
    sentence = _sentence(work, text, row, claims, confirmatory=confirmatory)
    failed = any(one["asked"] and not one["holds"] for one in claims)
    if failed:
        sentence = (
            f"Not certified: a learned share below {settings.max_learned_pct:g}% was not shown "
            f"(measured {best.measured.learned_pct:.1f}%). What holds: {sentence}"
        )
    config = work.study.candidates[best.name].to_dict()
    return {
        "certified": not failed,
        "certified_name": best.name,
        "certified_config": config,
        "claims": claims,
        "by_dataset": apart,
        "nearest_miss": {**row, "config": config} if failed else None,
        "sentence": sentence,
    }


def _more_text(work: Work, near: Verdict) -> str:
    """How many pages the ordering part asked for, where there were fewer."""
    need = next(row.get("units_needed") for row in work.rows if row["name"] == near.name)
    have = near.worst.units
    if need is None or need <= have:
        return ""
    return f"; {need:,} pages give it a chance of {100 * POWER:.0f}%, {have:,} were there"


def _learned_claim(
    work: Work, best: Verdict, evaluator: Evaluator, units: Sequence[Unit]
) -> dict[str, Any]:
    alpha, limit = work.claims[LEARNED], work.settings.max_learned_pct
    assert limit is not None
    measured, sequential = best.measured, work.settings.sequential
    if sequential:
        # The quality test ended when it was decided; the tiers need the whole part.
        scorer = UnitScorer(evaluator, units)
        measured = scorer.all(work.policies[best.name], what=f"tiers: {best.name}")
    p = learned_p(measured, limit, sequential=sequential, alpha=alpha)
    return {
        "name": LEARNED,
        "holds": p <= alpha,
        "asked": True,
        "alpha": alpha,
        "limit_pct": limit,
        "measured_pct": measured.learned_pct,
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
