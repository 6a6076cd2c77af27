"""The top of a report: what was asked, the answer in one sentence, the figures that count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import BAD, GOOD, Answer, Card, Headline
from var_moe.report.folder import Results
from var_moe.report.wording import between, factor, kind, limit, percent, speedup


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
        return Headline(
            title="Unfinished results",
            question="What was measured before the command ended?",
            answers=(),
        )
    return Headline(
        title="Routing profile",
        question="How does the unmodified model route this text?",
        answers=(),
    )


def _certified(certificate: Mapping[str, Any] | None) -> tuple[Answer, ...]:
    if certificate is None:
        return ()
    tone = GOOD if certificate["certified"] else BAD
    return (Answer(sentence=certificate["sentence"], tone=tone),)


def _certificate_cards(results: Results) -> tuple[Card, ...]:
    """What is certified, and what was measured of the same configuration."""
    certificate = results.get("certificate")
    if certificate is None or not certificate["certified"]:
        return ()
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
        cards.append(
            Card(
                label="certified speed",
                value=f"≥ {factor(speed['at_least'])}",
                detail=f"measured {factor(speed['measured'])} {between(speed['speedup_95'])}",
                tone=GOOD,
            )
        )
    geometry = (results.get("metadata") or {}).get("geometry", {})
    return (*cards, _experts_card(test, geometry.get("top_k")))


def _experts_card(row: Mapping[str, Any], top_k: int | None) -> Card:
    return Card(
        label="executed experts per token",
        value=f"{row['experts_per_token']:.2f}",
        detail=f"of {top_k}" if top_k else "",
    )


def _measured_cards(row: Mapping[str, Any], top_k: int, bound: float, where: str) -> list[Card]:
    kept = row["degradation_upper_95"] < bound
    cards = []
    if row.get("speedup") is not None:
        cards.append(
            Card(
                label=f"speedup, {where}",
                value=factor(row["speedup"]),
                detail=f"95% interval {between(row['speedup_95'])}",
            )
        )
    cards += [
        Card(
            label=f"perplexity, {where}",
            value=percent(row["degradation"]),
            detail=f"95% upper bound {percent(row['degradation_upper_95'])}, limit {limit(bound)}",
            tone=GOOD if kept else BAD,
        ),
        _experts_card(row, top_k),
    ]
    return cards


def _of_search(results: Results) -> Headline:
    search, metadata = results.get("search"), results.get("metadata")
    if "identity" not in metadata:
        return _of_own_search(search)
    settings, identity = metadata["settings"], metadata["identity"]
    bound, top_k = metadata["max_degradation"], metadata["geometry"]["top_k"]
    best = search["best_params"]
    what = kind(best) if best else _asked(settings)
    row = results.winner
    cards = _measured_cards(row, top_k, bound, "validation") if row else []
    validation, certificate = results.get("validation"), results.get("certificate")
    chosen = metadata["answer"]
    if certificate and certificate.get("certified_config") not in (None, best):
        chosen = f"Chosen by the search, not certified: {chosen[:1].lower()}{chosen[1:]}"
    answers = (
        *_certified(certificate),
        *_held_out(validation, known=(best, (certificate or {}).get("certified_config"))),
        Answer(sentence=chosen, tone=GOOD if best else BAD),
    )
    return Headline(
        title=f"{identity['model']} on {identity['dataset']}",
        question=f"Which configuration ({what}) runs the model {identity['model']} fastest, "
        f"while its perplexity on {identity['dataset']} text rises by less than {limit(bound)}?",
        answers=answers,
        # The search's winner and the certified configuration are not one: figures of one alone.
        cards=_certificate_cards(results) or tuple(cards),
        configuration=(certificate or {}).get("certified_config")
        or best
        or metadata.get("search", {}).get("nearest_miss", {}).get("config"),
    )


def _of_own_search(search: Mapping[str, Any]) -> Headline:
    """Of a search that a program made and saved: what it searched is not known."""
    best = search["best_params"]
    found = (
        f"The best score is {search['best_score']:.4g}."
        if best
        else "No parameters keep the bound."
    )
    return Headline(
        title=f"Search by the {search['method']} method",
        question="Which parameters score best?",
        answers=(Answer(sentence=found, tone=GOOD if best else BAD),),
        configuration=best,
    )


def _of_bound(results: Results) -> Headline:
    found = results.get("metadata")
    identity = found["identity"]
    return Headline(
        title=f"{identity['model']} on {identity['dataset']}",
        question="Which verified configuration of an earlier search runs fastest, while perplexity "
        f"rises by less than {limit(found['max_degradation'])}?",
        answers=(Answer(sentence=found["answer"], tone=GOOD),),
    )


def _of_guard(results: Results) -> Headline:
    rows = results.get("guard")["checks"]
    told = [f"{row['text']}: {'no alarm' if row['alarm_at'] is None else 'alarm'}" for row in rows]
    return Headline(
        title="Guard",
        question="Does the guard tell other text from that it was calibrated on?",
        answers=(Answer(sentence=f"{'; '.join(told)}."),),
    )


def _asked(settings: Mapping[str, Any]) -> str:
    return f"policy {settings['policy']}" if settings.get("policy") else "VAR"


def _held_out(
    found: Mapping[str, Any] | None, known: tuple[Any, ...] | None = None
) -> tuple[Answer, ...]:
    """The answer on held-out text, which may be of none of the ``known`` configurations."""
    if found is None:
        return ()
    what = (
        "it" if known is None or found["config"] in known else f"another ({kind(found['config'])})"
    )
    chosen = "was profiled or" if found.get("seen") else "nothing was"
    kept = found["degradation_upper_95"] < found["max_degradation"]
    split = found["text"]["split"]
    return (
        Answer(
            sentence=f"On {split}, which {chosen} chosen on, {what} "
            f"{'keeps' if kept else 'breaks'} the bound of {limit(found['max_degradation'])}: "
            f"{percent(found['degradation'])} (95% upper bound "
            f"{percent(found['degradation_upper_95'])}) at {factor(found['speedup'])} "
            f"{between(found['speedup_95'])}.",
            tone=GOOD if kept else BAD,
        ),
    )


def _of_validation(results: Results) -> Headline:
    found = results.get("validation")
    text, config = found["text"], found["config"]
    return Headline(
        title=f"{found['model']['name']} on {text['dataset']} ({text['split']})",
        question=f"Does the configuration ({kind(config)}) keep perplexity within "
        f"{limit(found['max_degradation'])} on {text['split']}, and how fast is it?",
        answers=(*_certified(results.get("certificate")), *_held_out(found)),
        cards=tuple(
            _measured_cards(found, found["top_k"], found["max_degradation"], text["split"])
        ),
        configuration=config,
    )


def _of_certificate(results: Results) -> Headline:
    found = results.get("certificate")
    text = found["text"]
    return Headline(
        title=f"Certificate: {found['identity']['model']} on {text['dataset']}",
        question=f"Which configuration surely keeps perplexity within "
        f"{limit(found['max_degradation'])}?",
        answers=_certified(found),
        cards=_certificate_cards(results),
        configuration=found.get("certified_config"),
    )


def _of_seeds(results: Results) -> Headline:
    found = results.get("stability")
    experts, speed = found["spread"]["experts_per_token"], found["spread"]["speedup"]
    runs, kept = found["runs"], [run for run in found["runs"] if run["found"]]
    sentence = f"{len(kept)} of {len(runs)} seeds kept the bound"
    if experts is not None:
        sentence += (
            f", with {experts['min']:.3f} to {experts['max']:.3f} experts per token (a spread of "
            f"{100 * experts['spread_relative']:.1f}%) at {factor(speed['min'])} to "
            f"{factor(speed['max'])} ({100 * speed['spread_relative']:.1f}%, which is partly the "
            "machine's timing)"
        )
    return Headline(
        title=f"Seeds: {found['model']} on {found['dataset']}",
        question="Does the answer depend on the seed of the search?",
        answers=(Answer(sentence=f"{sentence}.", tone=GOOD if kept == runs else BAD),),
    )


def _of_comparison(results: Results) -> Headline:
    found = results.get("comparison")
    text = found["text"]
    least: dict[str, list[str]] = {}  # of each policy that is ahead somewhere
    for target in found["targets_experts_per_token"]:
        rows = [row for row in found["rows"] if row["target_experts_per_token"] == target]
        if rows:
            best = min(rows, key=lambda row: row["degradation"])
            told = f"{percent(best['degradation'])} at {target:g}"
            least.setdefault(best["name"], []).append(told)
    sentence = "; ".join(f"{name} ({', '.join(told)})" for name, told in least.items())
    return Headline(
        title=f"Policies: {found['model']['name']} on {text['dataset']} ({text['split']})",
        question="At equally many executed experts per token, which policy costs least?",
        answers=(
            Answer(sentence=f"At equal experts per token, least costs {sentence}.", tone=GOOD),
        )
        if least
        else (),
    )


def _of_evaluation(results: Results) -> Headline:
    found = results.get("evaluation")
    text = found["text"]
    told = [
        f"{row['name']}: {percent(row['degradation'])} perplexity (95% upper bound "
        f"{percent(row['degradation_upper_95'])}), {speedup(row)}, "
        f"{row['experts_per_token']:.2f} experts per token."
        for row in found["rows"]
        if row["name"] != "baseline"
    ]
    return Headline(
        title=f"{found['model']['name']} on {text['dataset']} ({text['split']})",
        question="What does each policy cost, and what does it bring?",
        answers=tuple(Answer(sentence=line) for line in told),
    )


def _of_analysis(results: Results) -> Headline:
    found = results.get("analysis")
    compared, name = found["comparison"], found["model"]["name"]
    worst = [
        row["name"].replace("_", " ") for row in found["bottlenecks"] if row["severity"] != "info"
    ]
    bounds = f" What bounds it: {', '.join(worst)}." if worst else " No bottleneck was found."
    faster = compared["actual_speedup_95"][0] > 1
    return Headline(
        title=f"Systems analysis of {name}",
        question=f"Where does the time of a forward go with {found['var']['kind']}?",
        answers=(
            Answer(
                sentence=f"{factor(compared['actual_speedup'])} "
                f"{between(compared['actual_speedup_95'])} the speed of the unmodified model at "
                f"{found['var']['var_stats']['experts_per_token']:.2f} experts per token.{bounds}",
                tone=GOOD if faster else BAD,
            ),
        ),
        configuration=found["var"]["config"],
    )


def _of_routing(results: Results) -> Headline:
    found = results.get("routing")
    told = "; ".join(f"{row['claim']}: {row['verdict']}" for row in found["hypotheses"])
    return Headline(
        title=f"Routing of {found['model']} on {found['dataset']}",
        question="Is routing predictable enough for a static table?",
        answers=(Answer(sentence=f"{told[:1].upper()}{told[1:]}."),),
    )
