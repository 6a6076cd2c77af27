"""The top of a report: what was asked, the answer in one sentence, the figures that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from var_moe.report.blocks import BAD, GOOD, PLAIN, Answer, Card, Headline
from var_moe.report.folder import Results
from var_moe.report.theme import (
    between,
    change_interval,
    factor,
    kind,
    limit,
    percent,
    speedup,
)


def headline(results: Results) -> Headline:
    """The headline of whatever a folder holds."""
    for name, made in (
        ("search", _of_search),
        ("validation", _of_validation),
        ("certificate", _of_certificate),
        ("stability", _of_seeds),
        ("comparison", _of_comparison),
        ("evaluation", _of_evaluation),
        ("analysis", _of_analysis),
        ("routing", _of_routing),
        ("guard", _of_guard),
        ("metadata", _of_another_bound),
    ):
        if name in results.parts:
            return made(results)
    if results.left_out:
        return Headline(
            title="Unfinished results", question="What was measured before the command ended?"
        )
    return Headline(title="Routing profile", question="How does the model route this text?")


def _on_text(result: Mapping[str, Any]) -> str:
    return f"{result['model']['name']} on {result['text']['dataset']} ({result['text']['split']})"


def _tone(good: bool) -> str:
    return GOOD if good else BAD


def _certified(results: Results) -> list[Answer]:
    certificate = results.get("certificate")
    if certificate is None:
        return []
    return [Answer(certificate["sentence"], _tone(certificate["certified"]))]


def _held_out(measured: Mapping[str, Any], which: str = "it") -> Answer:
    """What held-out text says of a configuration."""
    bound, upper = measured["max_degradation"], measured["degradation_upper_95"]
    chosen = "was profiled or" if measured.get("seen") else "nothing was"
    kept = upper < bound
    return Answer(
        f"On {measured['text']['split']}, which {chosen} chosen on, {which} "
        f"{'keeps' if kept else 'breaks'} the bound of {limit(bound)}: "
        f"{percent(measured['degradation'])} (95% upper bound {percent(upper)}) at "
        f"{speedup(measured)}.",
        _tone(kept),
    )


def _experts_card(row: Mapping[str, Any], top_k: int | None) -> Card:
    of = f"of {top_k}" if top_k else ""
    return Card("executed experts per token", f"{row['experts_per_token']:.2f}", of)


def _certificate_cards(results: Results) -> list[Card]:
    """What is certified, and what was measured of the same configuration."""
    certificate = results.get("certificate")
    if certificate is None or not certificate["certified"]:
        return []
    test = {row["name"]: row for row in certificate["tests"]}[certificate["certified_name"]]
    bound = f"< {limit(certificate['max_degradation'])}"
    told = f"measured {change_interval(test)}"
    cards = [Card("certified perplexity rise", bound, told, GOOD)]
    speed = {claim["name"]: claim for claim in certificate["claims"]}.get("speedup", {})
    if speed.get("at_least"):
        told = f"measured {factor(speed['measured'])} {between(speed['speedup_95'])}"
        cards.append(Card("certified speed", f"≥ {factor(speed['at_least'])}", told, GOOD))
    geometry = (results.get("metadata") or {}).get("geometry", {})
    return [*cards, _experts_card(test, geometry.get("top_k"))]


def _measured_cards(row: Mapping[str, Any], bound: float, where: str) -> list[Card]:
    cards = []
    if row.get("speedup") is not None:
        ends = f"95% interval {between(row['speedup_95'])}"
        cards = [Card(f"speedup, {where}", factor(row["speedup"]), ends)]
    upper = row["degradation_upper_95"]
    told = f"95% upper bound {percent(upper)}, limit {limit(bound)}"
    quality = Card(f"perplexity, {where}", percent(row["degradation"]), told, _tone(upper < bound))
    return [*cards, quality, _experts_card(row, row["top_k"])]


def _of_search(results: Results) -> Headline:
    search, metadata = results["search"], results["metadata"]
    best = search["best_params"]
    if "identity" not in metadata:  # a program's own search: what it searched is not known
        score = f"The best score is {search['best_score']:.4g}."
        return Headline(
            title=f"Search by the {search['method']} method",
            question="Which parameters score best?",
            answers=[Answer(score if best else "No parameters keep the bound.", _tone(bool(best)))],
            configuration=best,
        )
    identity, bound = metadata["identity"], metadata["max_degradation"]
    policy = metadata["settings"].get("policy")
    what = kind(best) if best else f"policy {policy}" if policy else "VAR"
    certified = (results.get("certificate") or {}).get("certified_config")
    chosen = metadata["answer"]
    if certified not in (None, best):
        chosen = f"Chosen by the search, not certified: {chosen[:1].lower()}{chosen[1:]}"
    answers = [*_certified(results), Answer(chosen, _tone(bool(best)))]
    held_out = results.get("validation")
    if held_out is not None:
        own = held_out["config"] in (best, certified)
        which = "it" if own else f"another ({kind(held_out['config'])})"
        answers.insert(-1, _held_out(held_out, which))
    cards, row = _certificate_cards(results), results.winner
    if not cards and row:  # they may be of another configuration: figures of one alone
        cards = _measured_cards(row, bound, "validation")
    nearest = metadata.get("search", {}).get("nearest_miss", {}).get("config")
    return Headline(
        title=f"{identity['model']} on {identity['dataset']}",
        question=f"Which configuration ({what}) runs the model {identity['model']} fastest, "
        f"while its perplexity on {identity['dataset']} text rises by less than {limit(bound)}?",
        answers=answers,
        cards=cards,
        configuration=certified or best or nearest,
    )


def _of_another_bound(results: Results) -> Headline:
    metadata = results["metadata"]
    return Headline(
        title=f"{metadata['identity']['model']} on {metadata['identity']['dataset']}",
        question="Which verified configuration of an earlier search runs fastest, while perplexity "
        f"rises by less than {limit(metadata['max_degradation'])}?",
        answers=[Answer(metadata["answer"], GOOD)],
    )


def _of_validation(results: Results) -> Headline:
    validation = results["validation"]
    split, config = validation["text"]["split"], validation["config"]
    bound = validation["max_degradation"]
    return Headline(
        title=_on_text(validation),
        question=f"Does the configuration ({kind(config)}) keep perplexity within {limit(bound)} "
        f"on {split}, and how fast is it?",
        answers=[*_certified(results), _held_out(validation)],
        cards=_measured_cards(validation, bound, split),
        configuration=config,
    )


def _of_certificate(results: Results) -> Headline:
    certificate = results["certificate"]
    return Headline(
        title=f"Certificate: {certificate['identity']['model']} on "
        f"{certificate['text']['dataset']}",
        question="Which configuration is certified to keep perplexity within "
        f"{limit(certificate['max_degradation'])}?",
        answers=_certified(results),
        cards=_certificate_cards(results),
        configuration=certificate.get("certified_config"),
    )


def _of_seeds(results: Results) -> Headline:
    stability = results["stability"]
    experts, speed = stability["spread"]["experts_per_token"], stability["spread"]["speedup"]
    runs, kept = len(stability["runs"]), sum(run["found"] for run in stability["runs"])
    sentence = f"{kept} of {runs} seeds kept the bound"
    if experts is not None:
        sentence += (
            f", with {experts['min']:.3f} to {experts['max']:.3f} experts per token (a spread of "
            f"{100 * experts['spread_relative']:.1f}%) at {factor(speed['min'])} to "
            f"{factor(speed['max'])} ({100 * speed['spread_relative']:.1f}%, which is partly the "
            "machine's timing)"
        )
    return Headline(
        title=f"Seeds: {stability['model']} on {stability['dataset']}",
        question="Does the answer depend on the seed of the search?",
        answers=[Answer(f"{sentence}.", _tone(kept == runs))],
    )


def _of_comparison(results: Results) -> Headline:
    comparison = results["comparison"]
    least: dict[str, list[str]] = {}  # of each policy that is ahead somewhere
    for target in comparison["targets_experts_per_token"]:
        rows = [row for row in comparison["rows"] if row["target_experts_per_token"] == target]
        if rows:
            best = min(rows, key=lambda row: row["degradation"])
            told = f"{percent(best['degradation'])} at {target:g}"
            least.setdefault(best["name"], []).append(told)
    ahead = "; ".join(f"{name} ({', '.join(told)})" for name, told in least.items())
    sentence = f"At equal experts per token, the smallest rise of perplexity has {ahead}."
    return Headline(
        title=f"Policies: {_on_text(comparison)}",
        question="At equally many executed experts per token, which policy costs least?",
        answers=[Answer(sentence, GOOD)] if least else [],
    )


def _of_evaluation(results: Results) -> Headline:
    evaluation = results["evaluation"]
    return Headline(
        title=_on_text(evaluation),
        question="What does each policy cost, and what does it bring?",
        answers=[
            Answer(
                f"{row['name']}: {percent(row['degradation'])} perplexity (95% upper bound "
                f"{percent(row['degradation_upper_95'])}), {speedup(row)}, "
                f"{row['experts_per_token']:.2f} experts per token."
            )
            for row in evaluation["rows"]
            if row["name"] != "baseline"
        ],
    )


def _of_analysis(results: Results) -> Headline:
    analysis = results["analysis"]
    compared, stats = analysis["comparison"], analysis["var"]["var_stats"]
    named = _listed(analysis["bottlenecks"])
    return Headline(
        title=f"Systems analysis of {analysis['model']['name']}",
        question=f"Where does the time of a forward go with {analysis['var']['kind']}?",
        answers=[
            Answer(
                f"{factor(compared['actual_speedup'])} {between(compared['actual_speedup_95'])} "
                f"the speed of the unmodified model at {stats['experts_per_token']:.2f} experts "
                f"per token. {named}",
                _tone(compared["actual_speedup_95"][0] > 1),
            )
        ],
        configuration=analysis["var"]["config"],
    )


def _listed(bottlenecks: Sequence[Mapping[str, Any]]) -> str:
    names = [row["name"].replace("_", " ") for row in bottlenecks if row["severity"] != "info"]
    return f"What bounds it: {', '.join(names)}." if names else "No bottleneck was found."


def _of_routing(results: Results) -> Headline:
    routing = results["routing"]
    told = "; ".join(f"{row['claim']}: {row['verdict']}" for row in routing["hypotheses"])
    return Headline(
        title=f"Routing of {routing['model']} on {routing['dataset']}",
        question="Is routing predictable enough for a static table?",
        answers=[Answer(f"{told[:1].upper()}{told[1:]}.", PLAIN)],
    )


def _of_guard(results: Results) -> Headline:
    rows = results["guard"]["checks"]
    told = [f"{row['text']}: {'no alarm' if row['alarm_at'] is None else 'alarm'}" for row in rows]
    return Headline(
        title="Guard",
        question="Does the guard tell other text from that it was calibrated on?",
        answers=[Answer(f"{'; '.join(told)}.")],
    )
