"""The certificate: what is claimed, in words and in JSON, and what is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.certification.testing import LEARNED, QUALITY, SPEEDUP

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


__all__ = ["QUALITY", "claim_sentence", "how_tested", "not_claimed", "refusal_sentence"]
