"""The certificate: what is claimed, in JSON and in words, and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.certification.inference import LEARNED, QUALITY, SPEEDUP, median_lower_bound
from var_moe.certification.judging import Verdict, describe_apart, learned_p
from var_moe.certification.ordering import POWER
from var_moe.certification.plan import CertifySettings, Study
from var_moe.certification.scoring import UnitScorer
from var_moe.evaluation.evaluator import Evaluator
from var_moe.optimization.preparation import EncodedText
from var_moe.optimization.selection import Standing, winner
from var_moe.routing.base import RoutingPolicy
from var_moe.storage import SCHEMA_VERSION, provenance, sha256_of

Row = Mapping[str, Any]
ONE_TEXT = "the documents are parts of one text, and not independent of each other"


def head(
    study: Study,
    rows: Sequence[Row],
    text: EncodedText,
    validation: EncodedText,
    *,
    units: int,
    documents: int,
    power: list[str],
) -> dict[str, Any]:
    """What stands in every certificate, whatever comes of it.

    ``rows`` are the candidates in their order, which ``validation`` gave; ``units`` and
    ``documents`` of ``text``, the certify part, are tested on; ``power`` was said before.
    """
    settings, content = study.settings, study.to_dict()
    identity = content["identity"]
    test = "the larger p-value of a one-sided t test and a studentised bootstrap"
    return {
        "schema_version": SCHEMA_VERSION,
        "max_degradation": settings.max_degradation,
        "alpha": settings.alpha,
        "alpha_by_claim": dict(study.claims),
        "robust": settings.robust,
        "procedure": "fixed sequence, safest to fastest, ended by the first failure",
        "test": test + ("; of each data set, the largest decides" if settings.robust else ""),
        "unit": "page: all documents whose ids share what stands before '#'",
        "text": {**text.to_dict(), "documents": documents, "units": units},
        "ordering_text": validation.to_dict(),
        "candidates": content["candidates"],
        "order": [dict(row) for row in rows],
        "power": power,
        "hashes": {
            "certify_part": text.data_hash,
            "validation": validation.data_hash,
            "profile": identity["profile_hash"],
            "compensation": identity["compensation_hashes"],
            "study": study.hash,
            # Fixes which of the part's documents, in which order, were drawn.
            "units": sha256_of([text.data_hash, str(settings.max_samples), str(settings.seed)]),
        },
        "identity": identity,
        "settings": content["settings"],
        "not_claimed": _not_claimed(study, several=bool(text.parts)),
        "provenance": provenance(),
    }


def _not_claimed(study: Study, *, several: bool) -> list[str]:
    """What a reader might take the certificate for, and must not."""
    settings = study.settings
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
    if SPEEDUP in study.claims:
        lines.append(
            "Other hardware, batches or backends: the speedup is of this machine and setting, of "
            "scoring, not of generation."
        )
    if any("cache_scope" in one.settings for one in study.candidates.values()):
        lines.append(
            "A cache that is kept over documents: it was emptied at each document's start "
            "(cache_scope 'document')."
        )
    return lines


def too_few(study: Study, rows: Sequence[Row], there: Mapping[str, int]) -> dict[str, Any]:
    """No candidate has a fair chance with the units there: said before the part is spent."""
    possible = [row for row in rows if row["units_needed"] is not None]
    if possible:
        near = min(possible, key=lambda row: row["units_needed"])
        name, needed = near["name"], near["units_needed"]
        why = f"too few documents: {needed:,} pages needed to certify {name}, {there[name]:,} there"
    else:
        near = min(rows, key=lambda row: row["degradation_upper"])
        why = "no candidate is below the bound on the ordering part"
    return {
        **_refused(study, near, f"{why}; the certify part was not opened"),
        "confirmatory": False,
        "not_confirmatory_because": ["the certify part was not opened"],
        "tests": [],
        "by_dataset": [],
    }


def conclusion(
    study: Study,
    rows: Sequence[Row],
    policies: Mapping[str, RoutingPolicy | None],
    verdicts: Sequence[Verdict],
    scorer: UnitScorer,
    text: Row,
) -> dict[str, Any]:
    """The fastest that passed, with every claim about it; or the nearest miss.

    ``text`` is what the certificate says of the certify part, which ``scorer`` holds.
    """
    settings, claim = study.settings, study.quality
    # Of those that passed, ordered from the safest: of two equally fast ones the first.
    best = winner(
        verdicts,
        lambda one: Standing(
            keeps_bound=one.passed, experts_per_token=one.measured.experts_per_token
        ),
    )
    chosen = best or min(verdicts, key=lambda one: one.worst.interval.upper)
    policy, row = policies[chosen.name], chosen.to_dict()
    apart = describe_apart(chosen.measured, scorer.units, claim, robust=settings.robust)
    if best is None:
        why = f"p = {chosen.p:.3g}, level {claim.alpha:g}"
        have = chosen.worst.units
        need = next(one["units_needed"] for one in rows if one["name"] == chosen.name)
        if need is not None and need > have:
            why += f"; {need:,} pages give it a chance of {100 * POWER:.0f}%, {have:,} were there"
        why = f"{chosen.name} was not shown to keep {100 * claim.bound:g}% ({why})"
        return {**_refused(study, row, why), "by_dataset": apart}
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
    limit = settings.max_learned_pct
    if limit is not None:
        p, alpha = learned_p(best.measured, limit), study.claims[LEARNED]
        claims.append(
            {
                "name": LEARNED,
                "holds": p <= alpha,
                "asked": True,
                "alpha": alpha,
                "limit_pct": limit,
                "measured_pct": best.measured.learned_pct,
                "p": p,
            }
        )
    if SPEEDUP in study.claims and policy is not None:
        blocks, alpha = settings.blocks, study.claims[SPEEDUP]
        claims.append(_speedup_claim(scorer.evaluator, policy, blocks=blocks, alpha=alpha))
    sentence = _sentence(settings, text, row, claims)
    failed = any(one["asked"] and not one["holds"] for one in claims)
    if failed:
        sentence = (
            f"Not certified: a learned share below {limit:g}% was not shown "
            f"(measured {best.measured.learned_pct:.1f}%). What holds: {sentence}"
        )
    config = study.candidates[best.name].to_dict()
    return {
        "certified": not failed,
        "certified_name": best.name,
        "certified_config": config,
        "claims": claims,
        "by_dataset": apart,
        "nearest_miss": {**row, "config": config} if failed else None,
        "sentence": sentence,
    }


def _speedup_claim(
    evaluator: Evaluator, policy: RoutingPolicy, *, blocks: int, alpha: float
) -> dict[str, Any]:
    speed = evaluator.speed(policy, blocks=blocks)
    low = median_lower_bound(speed.speedup.blocks, alpha)
    return {
        "name": SPEEDUP,
        # A bound at or below 1 is true and says nothing: it is not claimed.
        "holds": low is not None and low > 1,
        "asked": False,
        "alpha": alpha,
        "at_least": low,
        "measured": speed.speedup.median,
        "block_ratios": list(speed.speedup.blocks),
        **{name: value for name, value in speed.to_dict().items() if name != "speedup"},
    }


def _sentence(settings: CertifySettings, text: Row, verdict: Row, claims: Sequence[Row]) -> str:
    """The claims that hold, in one sentence, with what was measured."""
    source, worst = text["dataset"], ""
    if "decided_by" in verdict:
        source = f"each of {', '.join(part['dataset'] for part in text['datasets'])}"
        worst = f"{verdict['decided_by']}, the worst, of "
    sentence = (
        f"With {100 * (1 - settings.alpha):g}% confidence, on text like {source} "
        f"({text['split']} part), perplexity rises by less than "
        f"{100 * settings.max_degradation:g}% against the unmodified model"
    )
    holding = {claim["name"]: claim for claim in claims if claim["holds"]}
    if SPEEDUP in holding:
        least = holding[SPEEDUP]["at_least"]
        of = f" of generating {settings.setting.described}" if settings.setting.decodes else ""
        sentence += f", at {least:.3f} or more times its speed{of} on this machine"
    if LEARNED in holding:
        limit = holding[LEARNED]["limit_pct"]
        sentence += f", and the router alone decides less than {limit:g}%"
    low, high = verdict["degradation_interval"]
    sentence += (
        f"; measured {verdict['degradation']:+.2%} [{low:.2%}, {high:.2%}] on "
        f"{worst}{verdict['documents']:,} documents"
    )
    if SPEEDUP in holding:
        sentence += f", {holding[SPEEDUP]['measured']:.3f}x"
    sentence += "."
    return sentence if text["independent_documents"] else f"Not confirmatory: {sentence}"


def _refused(study: Study, nearest: Row, why: str) -> dict[str, Any]:
    """What a certificate holds where no claim does: why, and how near it came."""
    claim = study.quality
    worst = nearest.get("decided_by") or nearest.get("worst_dataset")
    place = f" on {worst}, the worst" if worst else ""
    sentence = (
        f"Not certified: {why}. Nearest miss: {nearest['name']}, measured "
        f"{nearest['degradation']:+.2%}{place}, upper bound {nearest['degradation_upper']:+.2%} "
        f"against {100 * claim.bound:g}% (one-sided, {100 * (1 - claim.alpha):g}%)"
    )
    return {
        "certified": False,
        "claims": [],
        "nearest_miss": {**nearest, "config": study.candidates[nearest["name"]].to_dict()},
        "sentence": sentence,
    }
