"""A certificate: its section in a report, its own page, and the card of an exported policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_moe.report.blocks import (
    BAD,
    GOOD,
    Answer,
    Facts,
    Headline,
    Notes,
    Picture,
    Report,
    Section,
    Table,
    environment,
    pictures,
    render,
    section,
)
from var_moe.report.folder import Results
from var_moe.report.theme import (
    GREEN,
    GREY,
    RED,
    change_interval,
    empty_figure,
    interval_bars,
    limit,
    line_at,
    percent,
)


def certificate_section(results: Results) -> Section:
    """The certificate."""
    certificate = results["certificate"]
    return section(
        "certificate",
        "Certificate" if certificate["certified"] else "Certificate: not given",
        Notes("Not confirmatory, because", certificate["not_confirmatory_because"]),
        pictures(tests_figure(certificate)),
        _by_dataset(certificate),
        Notes("What is not claimed", certificate["not_claimed"]),
        intro=f"At most {100 * certificate['alpha']:g}% of such certificates are wrong. With every "
        "hash and p-value it stands in certificate.html.",
    )


def tests_figure(certificate: Mapping[str, Any]) -> Picture | None:
    """Each candidate's degradation on the certify part, with its interval and the bound."""
    tests = certificate["tests"]
    if not tests:
        return None
    figure = empty_figure("perplexity change, %", "", height=140 + 34 * len(tests), legend=False)
    won = certificate["certified_name"] if certificate["certified"] else None
    names = [f"{test['name']} ★" if test["name"] == won else test["name"] for test in tests]
    values = [test["degradation"] for test in tests]
    ends = [test["degradation_interval"] for test in tests]
    figure.add_scatter(
        y=names,
        x=[100 * value for value in values],
        error_x=interval_bars(values, ends, scale=100, color=GREY),
        text=[
            "{experts_per_token:.3f} experts per token<br>p = {p:.2g}".format(**t) for t in tests
        ],
        mode="markers",
        marker={
            "color": [GREEN if test["passed"] else RED for test in tests],
            "symbol": ["circle" if test["passed"] else "x" for test in tests],
            "size": 10,
        },
    )
    bound = certificate["max_degradation"]
    line_at(figure, f"bound {limit(bound)}", x=100 * bound)
    figure.update_yaxes(categoryorder="array", categoryarray=names, autorange="reversed")
    return Picture(
        name="certificate-tests",
        title="Candidates, the safest first",
        caption="Tested in this order on text that nothing was chosen on, until one fails (a "
        "cross); the last that passed is certified.",
        figure=figure,
    )


def _by_dataset(certificate: Mapping[str, Any]) -> Table | None:
    return Table.of(
        "Each data set",
        certificate.get("by_dataset", ()),
        {
            "data set": "{dataset}",
            "perplexity before": "{baseline_perplexity:.3f}",
            "after": "{perplexity:.3f}",
            "change [95%]": change_interval,
            "upper bound": lambda row: percent(row["degradation_upper"]),
            "pages / documents": "{units:,} / {documents:,}",
        },
        caption="" if certificate.get("robust") else "Described, not claimed.",
    )


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """The page of a certificate, which needs no network.

    Args:
        certificate: what ``certificate.json`` holds.
    """
    holds = bool(certificate["certified"])
    title = "Certificate" if holds else "Not certified"
    if holds and not certificate["confirmatory"]:
        title = "Certificate, not confirmatory"
    nearest = (certificate.get("nearest_miss") or {}).get("config")
    shares = ", ".join(f"{name} {part:g}" for name, part in certificate["alpha_by_claim"].items())
    procedure = {
        "candidates": certificate["procedure"],
        "test": certificate["test"],
        "unit": certificate["unit"],
        "alpha": f"{certificate['alpha']:g}, of which: {shares}",
        "bound": limit(certificate["max_degradation"]),
    }
    top = Headline(
        title=title,
        question="",
        answers=[Answer(certificate["sentence"], GOOD if holds else BAD)],
        configuration=certificate.get("certified_config") or nearest,
    )
    all_of_it = section(
        "certificate",
        "What was tested",
        Notes("Not confirmatory, because", certificate["not_confirmatory_because"]),
        Table.of("Claims", certificate["claims"], _CLAIM),
        _tests(certificate),
        _by_dataset(certificate),
        Facts("How it was tested", procedure),
        Notes("Said before the certify part was opened", certificate["power"]),
        Notes("What this does not claim", certificate["not_claimed"]),
        Facts("Provenance", _provenance(certificate)),
    )
    return render(Report(top, [all_of_it]))


def _said(claim: Mapping[str, Any]) -> str:
    if claim["name"] == "quality":
        return f"degradation < {limit(claim['bound'])}"
    if claim["name"] == "learned_pct":
        return f"learned routing < {claim['limit_pct']:g}% (measured {claim['measured_pct']:.1f}%)"
    if claim["at_least"] is None:
        return "speedup: too few blocks"
    return f"speedup of at least {claim['at_least']:.3f} (measured {claim['measured']:.3f})"


_CLAIM: dict[str, Any] = {
    "claim": _said,
    "part of alpha": "{alpha:g}",
    "p": lambda claim: f"{claim['p']:.2g}" if "p" in claim else "",
    "holds": lambda claim: "yes" if claim["holds"] else "no",
}


def _tests(certificate: Mapping[str, Any]) -> Table | None:
    """Each candidate: what the ordering part said of it, and its test if it had one."""
    done = {row["name"]: row for row in certificate["tests"]}
    results = {None: "not tested", True: "passed", False: "failed"}

    def tested(one: Any) -> Any:
        return lambda place: one(done[place["name"]]) if place["name"] in done else ""

    def p_value(name: str) -> Any:
        return tested(lambda test: f"{test[name]:.3g}" if name in test else "")

    return Table.of(
        "Tests, in their order",
        certificate["order"],
        {
            "candidate": "{name}",
            "ordering part": lambda place: percent(place.get("degradation")),
            "certify part [95%]": tested(change_interval),
            "p (t)": p_value("p_t"),
            "p (bootstrap)": p_value("p_bootstrap"),
            "p that decides": p_value("p"),
            "experts per token": tested("{experts_per_token:.3f}".format_map),
            "pages / documents": tested("{units:,} / {documents:,}".format_map),
            "": lambda place: results[done.get(place["name"], {}).get("passed")],
        },
    )


def _provenance(certificate: Mapping[str, Any]) -> dict[str, str]:
    text, origin, identity = (certificate[key] for key in ("text", "provenance", "identity"))
    hashes = certificate["hashes"].items()
    return {
        "model": f"{identity['model']} {identity['revision'] or ''} {identity['dtype']}".strip(),
        "text": f"{text['dataset']}, {text['split']}: {text['documents']:,} documents on "
        f"{text['units']:,} pages ({text['note']})",
        **{f"hash of {name.replace('_', ' ')}": value for name, value in hashes if value},
        **{name: version for name, version in origin["versions"].items() if version},
        "commit": origin["commit"] or "unknown",
        "hardware": ", ".join(map(str, origin["hardware"].values())),
    }


def model_card(head: Mapping[str, Any], *, folder: str) -> str:
    """Markdown with the Hub's own front matter.

    Args:
        head: what ``var_moe.json`` holds.
        folder: name by which the example loads it.
    """
    about = head["model"]
    # Of a local model its folder's name alone: where it lay says nothing elsewhere.
    name = about["model"] if about["revision"] else Path(about["model"]).name
    local = not about["revision"] and about["model"] != "demo"
    template = environment(html=False).get_template("model_card.md.jinja")
    card: str = template.render(
        **{"certificate": None, **head},
        folder=folder,
        name=name,
        place=f"path/to/{name}" if local else about["model"],
    )
    return card
