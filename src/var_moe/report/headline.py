"""The top of a report: what was asked, the answer in one sentence, the figures that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import BAD, GOOD, PLAIN, Answer, Card, Headline
from var_moe.report.folder import Results
from var_moe.report.theme import between, factor, kind, limit, percent, speedup


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
        ("metadata", _of_bound),
    ):
        if results.get(name) is not None:
            return made(results)
    if results.unfinished:
        return _headline("Unfinished results", "What was measured before the command ended?")
    return _headline("Routing profile", "How does the unmodified model route this text?")


def _headline(
    title: str, question: str, *sentences: str, good: bool | None = None, **more: Any
) -> Headline:
    """One whose answers are all of one tone."""
    tone = {None: PLAIN, True: GOOD, False: BAD}[good]
    answers = tuple(Answer(sentence=one, tone=tone) for one in sentences)
    return Headline(title=title, question=question, answers=answers, **more)


def _on_text(result: Mapping[str, Any]) -> str:
    return f"{result['model']['name']} on {result['text']['dataset']} ({result['text']['split']})"


def _certified(results: Results) -> list[Answer]:
    certificate = results.get("certificate")
    if certificate is None:
        return []
    tone = GOOD if certificate["certified"] else BAD
    return [Answer(sentence=certificate["sentence"], tone=tone)]


def _held_out(measured: Mapping[str, Any], which: str = "it") -> Answer:
    """What held-out text says of a configuration."""
    bound, upper = limit(measured["max_degradation"]), percent(measured["degradation_upper_95"])
    chosen = "was profiled or" if measured.get("seen") else "nothing was"
    kept = measured["degradation_upper_95"] < measured["max_degradation"]
    return Answer(
        sentence=f"On {measured['text']['split']}, which {chosen} chosen on, {which} "
        f"{'keeps' if kept else 'breaks'} the bound of {bound}: "
        f"{percent(measured['degradation'])} (95% upper bound {upper}) at {speedup(measured)}.",
        tone=GOOD if kept else BAD,
    )


def _certificate_cards(results: Results) -> list[Card]:
    """What is certified, and what was measured of the same configuration."""
    certificate = results.get("certificate")
    if certificate is None or not certificate["certified"]:
        return []
    name = certificate["certified_name"]
    test = next(row for row in certificate["tests"] if row["name"] == name)
    ends = between([100 * end for end in test["degradation_interval"]], digits=2)
    cards = [
        Card(
            label="certified perplexity rise",
            value=f"< {limit(certificate['max_degradation'])}",
            detail=f"measured {percent(test['degradation'])} {ends}",
            tone=GOOD,
        )
    ]
    speed = next((c for c in certificate["claims"] if c["name"] == "speedup"), None)
    if speed is not None and speed.get("at_least"):
        told = f"measured {factor(speed['measured'])} {between(speed['speedup_95'])}"
        value = f"≥ {factor(speed['at_least'])}"
        cards.append(Card(label="certified speed", value=value, detail=told, tone=GOOD))
    geometry = (results.get("metadata") or {}).get("geometry", {})
    return [*cards, _experts_card(test, geometry.get("top_k"))]


def _experts_card(row: Mapping[str, Any], top_k: int | None) -> Card:
    of = f"of {top_k}" if top_k else ""
    value = f"{row['experts_per_token']:.2f}"
    return Card(label="executed experts per token", value=value, detail=of)


def _measured_cards(row: Mapping[str, Any], top_k: int, bound: float, where: str) -> list[Card]:
    cards = []
    if row.get("speedup") is not None:
        ends = f"95% interval {between(row['speedup_95'])}"
        cards = [Card(label=f"speedup, {where}", value=factor(row["speedup"]), detail=ends)]
    upper = row["degradation_upper_95"]
    quality = Card(
        label=f"perplexity, {where}",
        value=percent(row["degradation"]),
        detail=f"95% upper bound {percent(upper)}, limit {limit(bound)}",
        tone=GOOD if upper < bound else BAD,
    )
    return [*cards, quality, _experts_card(row, top_k)]


def _of_search(results: Results) -> Headline:
    search, metadata = results.get("search"), results.get("metadata")
    best = search["best_params"]
    if "identity" not in metadata:  # a program's own search: what it searched is not known
        score = f"The best score is {search['best_score']:.4g}."
        return _headline(
            f"Search by the {search['method']} method",
            "Which parameters score best?",
            score if best else "No parameters keep the bound.",
            good=bool(best),
            configuration=best,
        )
    identity, bound = metadata["identity"], metadata["max_degradation"]
    policy = metadata["settings"].get("policy")
    what = kind(best) if best else f"policy {policy}" if policy else "VAR"
    certified = (results.get("certificate") or {}).get("certified_config")
    chosen = metadata["answer"]
    if certified not in (None, best):
        chosen = f"Chosen by the search, not certified: {chosen[:1].lower()}{chosen[1:]}"
    answers = [*_certified(results), Answer(sentence=chosen, tone=GOOD if best else BAD)]
    held_out = results.get("validation")
    if held_out is not None:
        own = held_out["config"] in (best, certified)
        which = "it" if own else f"another ({kind(held_out['config'])})"
        answers.insert(-1, _held_out(held_out, which))
    cards, row = _certificate_cards(results), results.winner
    if not cards and row:  # they may be of another configuration: figures of one alone
        cards = _measured_cards(row, metadata["geometry"]["top_k"], bound, "validation")
    nearest = metadata.get("search", {}).get("nearest_miss", {}).get("config")
    return Headline(
        title=f"{identity['model']} on {identity['dataset']}",
        question=f"Which configuration ({what}) runs the model {identity['model']} fastest, "
        f"while its perplexity on {identity['dataset']} text rises by less than {limit(bound)}?",
        answers=tuple(answers),
        cards=tuple(cards),
        configuration=certified or best or nearest,
    )


def _of_bound(results: Results) -> Headline:
    metadata = results.get("metadata")
    return _headline(
        f"{metadata['identity']['model']} on {metadata['identity']['dataset']}",
        "Which verified configuration of an earlier search runs fastest, while perplexity rises "
        f"by less than {limit(metadata['max_degradation'])}?",
        metadata["answer"],
        good=True,
    )


def _of_guard(results: Results) -> Headline:
    rows = results.get("guard")["checks"]
    told = [f"{row['text']}: {'no alarm' if row['alarm_at'] is None else 'alarm'}" for row in rows]
    question = "Does the guard tell other text from that it was calibrated on?"
    return _headline("Guard", question, f"{'; '.join(told)}.")


def _of_validation(results: Results) -> Headline:
    validation = results.get("validation")
    split, config = validation["text"]["split"], validation["config"]
    bound = validation["max_degradation"]
    return Headline(
        title=_on_text(validation),
        question=f"Does the configuration ({kind(config)}) keep perplexity within {limit(bound)} "
        f"on {split}, and how fast is it?",
        answers=(*_certified(results), _held_out(validation)),
        cards=tuple(_measured_cards(validation, validation["top_k"], bound, split)),
        configuration=config,
    )


def _of_certificate(results: Results) -> Headline:
    certificate = results.get("certificate")
    model, dataset = certificate["identity"]["model"], certificate["text"]["dataset"]
    return Headline(
        title=f"Certificate: {model} on {dataset}",
        question="Which configuration surely keeps perplexity within "
        f"{limit(certificate['max_degradation'])}?",
        answers=tuple(_certified(results)),
        cards=tuple(_certificate_cards(results)),
        configuration=certificate.get("certified_config"),
    )


def _of_seeds(results: Results) -> Headline:
    stability = results.get("stability")
    experts, speed = stability["spread"]["experts_per_token"], stability["spread"]["speedup"]
    kept = sum(run["found"] for run in stability["runs"])
    sentence = f"{kept} of {len(stability['runs'])} seeds kept the bound"
    if experts is not None:
        sentence += (
            f", with {experts['min']:.3f} to {experts['max']:.3f} experts per token (a spread of "
            f"{100 * experts['spread_relative']:.1f}%) at {factor(speed['min'])} to "
            f"{factor(speed['max'])} ({100 * speed['spread_relative']:.1f}%, which is partly the "
            "machine's timing)"
        )
    return _headline(
        f"Seeds: {stability['model']} on {stability['dataset']}",
        "Does the answer depend on the seed of the search?",
        f"{sentence}.",
        good=kept == len(stability["runs"]),
    )


def _of_comparison(results: Results) -> Headline:
    comparison = results.get("comparison")
    least: dict[str, list[str]] = {}  # of each policy that is ahead somewhere
    for target in comparison["targets_experts_per_token"]:
        rows = [row for row in comparison["rows"] if row["target_experts_per_token"] == target]
        if rows:
            best = min(rows, key=lambda row: row["degradation"])
            told = f"{percent(best['degradation'])} at {target:g}"
            least.setdefault(best["name"], []).append(told)
    ahead = "; ".join(f"{name} ({', '.join(told)})" for name, told in least.items())
    sentences = [f"At equal experts per token, least costs {ahead}."] if least else []
    question = "At equally many executed experts per token, which policy costs least?"
    return _headline(f"Policies: {_on_text(comparison)}", question, *sentences, good=True)


def _of_evaluation(results: Results) -> Headline:
    evaluation = results.get("evaluation")
    told = [
        f"{row['name']}: {percent(row['degradation'])} perplexity (95% upper bound "
        f"{percent(row['degradation_upper_95'])}), {speedup(row)}, "
        f"{row['experts_per_token']:.2f} experts per token."
        for row in evaluation["rows"]
        if row["name"] != "baseline"
    ]
    question = "What does each policy cost, and what does it bring?"
    return _headline(_on_text(evaluation), question, *told)


def _of_analysis(results: Results) -> Headline:
    analysis = results.get("analysis")
    compared, stats = analysis["comparison"], analysis["var"]["var_stats"]
    rows = [row for row in analysis["bottlenecks"] if row["severity"] != "info"]
    named = ", ".join(row["name"].replace("_", " ") for row in rows)
    bounds = f"What bounds it: {named}." if rows else "No bottleneck was found."
    return _headline(
        f"Systems analysis of {analysis['model']['name']}",
        f"Where does the time of a forward go with {analysis['var']['kind']}?",
        f"{factor(compared['actual_speedup'])} {between(compared['actual_speedup_95'])} the speed "
        f"of the unmodified model at {stats['experts_per_token']:.2f} experts per token. {bounds}",
        good=compared["actual_speedup_95"][0] > 1,
        configuration=analysis["var"]["config"],
    )


def _of_routing(results: Results) -> Headline:
    routing = results.get("routing")
    told = "; ".join(f"{row['claim']}: {row['verdict']}" for row in routing["hypotheses"])
    return _headline(
        f"Routing of {routing['model']} on {routing['dataset']}",
        "Is routing predictable enough for a static table?",
        f"{told[:1].upper()}{told[1:]}.",
    )
