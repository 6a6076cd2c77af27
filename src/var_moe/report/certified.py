"""What a certificate says: the claim, and each candidate's test in its order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Notes, Picture, Section, Table, pictures, section
from var_moe.report.folder import Results
from var_moe.report.theme import GREEN, RED, empty_figure, interval_bars, line_at
from var_moe.report.wording import between, limit, percent


def certificate_section(results: Results) -> Section | None:
    """The certificate, where one was asked for."""
    certificate = results.get("certificate")
    if certificate is None:
        return None
    return section(
        "certificate",
        "Certificate" if certificate["certified"] else "Certificate: not given",
        [
            Notes(lines=certificate["not_confirmatory_because"], title="Not confirmatory, because")
            if certificate["not_confirmatory_because"]
            else None,
            pictures(tests_figure(certificate)),
            _by_dataset(certificate),
            Notes(lines=certificate["not_claimed"], title="What is not claimed"),
        ],
        intro=f"At most {100 * certificate['alpha']:g}% of such certificates are wrong. With every "
        "hash and p-value it stands in certificate.html.",
    )


def tests_figure(certificate: Mapping[str, Any]) -> Picture | None:
    """Each candidate's degradation on the certify part, with its interval and the bound."""
    tests = certificate.get("tests") or []
    if not tests:
        return None
    figure = empty_figure("perplexity change, %", "", height=140 + 34 * len(tests))
    for passed, name, colour in ((True, "passed", GREEN), (False, "failed", RED)):
        some = [test for test in tests if bool(test["passed"]) is passed]
        if not some:
            continue
        values = [test["degradation"] for test in some]
        ends = [test["degradation_interval"] for test in some]
        figure.add_scatter(
            y=[_label(test, certificate) for test in some],
            x=[100 * value for value in values],
            error_x=interval_bars(values, ends, scale=100),
            text=[
                f"{test['experts_per_token']:.3f} experts per token<br>p = {test['p']:.2g}"
                for test in some
            ],
            mode="markers",
            marker={"color": colour, "size": 10},
            name=name,
        )
    bound = certificate["max_degradation"]
    line_at(figure, f"bound {limit(bound)}", x=100 * bound)
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=[_label(test, certificate) for test in tests],
        autorange="reversed",
    )
    return Picture(
        name="certificate-tests",
        title="Candidates, the safest first",
        caption="Tested in this order on text that nothing was chosen on, until one fails; the "
        "last that passed is certified.",
        figure=figure,
    )


def _label(test: Mapping[str, Any], certificate: Mapping[str, Any]) -> str:
    won = certificate["certified"] and test["name"] == certificate["certified_name"]
    return f"{test['name']}{' ★' if won else ''}"


def _by_dataset(certificate: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            row["dataset"],
            f"{row['units']:,}",
            f"{row['baseline_perplexity']:.3f}",
            f"{percent(row['degradation'])} {_interval(row)}",
            percent(row["degradation_upper"]),
            f"{row['experts_per_token']:.3f}",
        )
        for row in certificate.get("by_dataset", ())
    ]
    if not rows:
        return None
    headings = ("data set", "pages", "perplexity", "change [95%]", "upper", "experts per token")
    return Table(
        title="Each data set",
        headings=headings,
        rows=rows,
        caption="" if certificate.get("robust") else "Described, not claimed.",
    )


def _interval(row: Mapping[str, Any]) -> str:
    return between([100 * end for end in row["degradation_interval"]], digits=2)
