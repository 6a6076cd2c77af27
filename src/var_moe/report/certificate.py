"""The certificate as a page: one HTML file, light and dark, printable, without a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from var_moe.report.wording import percent

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --good: #57c878; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
.claim { border-left: 5px solid var(--bad); padding: .6rem 1rem; font-size: 1.15rem }
.holds { border-color: var(--good) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
code { overflow-wrap: anywhere; font-size: .85em }
@media print {
  body { max-width: none; font-size: 11pt }
  h2 { break-after: avoid } tr { break-inside: avoid }
}
""".strip()


def certificate_page(certificate: Mapping[str, Any]) -> str:
    """The page of a certificate.

    Args:
        certificate: what ``certificate.json`` holds.
    """
    holds = bool(certificate["certified"])
    title = "Certificate" if holds else "Not certified"
    if holds and not certificate["confirmatory"]:
        title = "Certificate, not confirmatory"
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="claim{" holds" if holds else ""}">{escape(certificate["sentence"])}</p>',
        *_section("Not confirmatory, because", _list(certificate["not_confirmatory_because"])),
        *_section("Claims", _claims(certificate)),
        *_section("Tests, in their order", _tests(certificate)),
        *_section(_apart_title(certificate), _apart(certificate)),
        *_section("How it was tested", _facts(_procedure(certificate))),
        *_section("Said before the certify part was opened", _list(certificate["power"])),
        *_section("Configuration", _configuration(certificate)),
        *_section("What this does not claim", _list(certificate["not_claimed"])),
        *_section("Provenance", _facts(_provenance(certificate))),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{escape(title)}</h2>", content] if content else []


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    body = "".join(
        "<tr>" + f"<td>{escape(row[0])}</td>" + "".join(_cell(cell) for cell in row[1:]) + "</tr>"
        for row in rows
    )
    if not body:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    return f'<td class="n">{escape(text)}</td>'


def _facts(rows: Mapping[str, Any]) -> str:
    body = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(str(value))}</code></td></tr>"
        for name, value in rows.items()
    )
    return f'<div class="scroll"><table>{body}</table></div>'


def _claims(certificate: Mapping[str, Any]) -> str:
    said = {
        "quality": lambda c: f"degradation < {100 * c['bound']:g}%",
        "speedup": lambda c: (
            "speedup: too few blocks"
            if c["at_least"] is None
            else f"speedup of at least {c['at_least']:.3f} (measured {c['measured']:.3f})"
        ),
        "learned_pct": lambda c: (
            f"learned routing < {c['limit_pct']:g}% (measured {c['measured_pct']:.1f}%)"
        ),
    }
    return _table(
        ("claim", "part of alpha", "p", "holds"),
        [
            (
                said[claim["name"]](claim),
                f"{claim['alpha']:g}",
                f"{claim['p']:.2g}" if "p" in claim else "",
                "yes" if claim["holds"] else "no",
            )
            for claim in certificate["claims"]
        ],
    )


def _tests(certificate: Mapping[str, Any]) -> str:
    done = {row["name"]: row for row in certificate["tests"]}
    rows = []
    for place in certificate["order"]:
        before = percent(place["degradation"]) if "degradation" in place else ""
        test = done.get(place["name"])
        if test is None:
            rows.append((place["name"], before, "not tested", *[""] * 6))
            continue
        low, high = test["degradation_interval"]
        rows.append(
            (
                place["name"],
                before,
                f"{percent(test['degradation'])} [{percent(low)}, {percent(high)}]",
                f"{test['p_t']:.3g}" if "p_t" in test else "",
                f"{test['p_bootstrap']:.3g}" if "p_bootstrap" in test else "",
                f"{test['p']:.3g}",
                f"{test['experts_per_token']:.3f}",
                f"{test['units']:,} / {test['documents']:,}",
                "passed" if test["passed"] else "failed",
            )
        )
    headings = (
        *("candidate", "ordering part", "certify part", "p (t)", "p (bootstrap)", "p that decides"),
        *("experts/token", "pages / documents", ""),
    )
    return _table(headings, rows)


def _apart_title(certificate: Mapping[str, Any]) -> str:
    claimed = bool(certificate.get("robust"))
    return "Each data set" if claimed else "Each data set (descriptive, not claimed)"


def _apart(certificate: Mapping[str, Any]) -> str:
    rows = []
    for row in certificate.get("by_dataset", ()):
        low, high = row["degradation_interval"]
        rows.append(
            (
                row["dataset"],
                f"{row['baseline_perplexity']:.3f}",
                f"{row['perplexity']:.3f}",
                f"{percent(row['degradation'])} [{percent(low)}, {percent(high)}]",
                percent(row["degradation_upper"]),
                f"{row['experts_per_token']:.3f}",
                f"{row['units']:,} / {row['documents']:,}",
            )
        )
    headings = (
        *("data set", "PPL baseline", "PPL", "degradation", "upper bound", "experts/token"),
        "pages / documents",
    )
    return _table(headings, rows)


def _procedure(certificate: Mapping[str, Any]) -> dict[str, Any]:
    shares = ", ".join(f"{name} {part:g}" for name, part in certificate["alpha_by_claim"].items())
    return {
        "candidates": certificate["procedure"],
        "test": certificate["test"],
        "unit": certificate["unit"],
        "alpha": f"{certificate['alpha']:g}, of which: {shares}",
        "bound": f"{100 * certificate['max_degradation']:g}%",
    }


def _configuration(certificate: Mapping[str, Any]) -> str:
    found = certificate.get("certified_config")
    if not found and certificate.get("nearest_miss"):
        found = certificate["nearest_miss"].get("config")
    return _facts(found) if found else ""


def _provenance(certificate: Mapping[str, Any]) -> dict[str, Any]:
    text, origin, identity = (certificate[key] for key in ("text", "provenance", "identity"))
    hashes = {
        f"hash of {name.replace('_', ' ')}": value
        for name, value in certificate["hashes"].items()
        if value
    }
    return {
        "model": f"{identity['model']} {identity['revision'] or ''} {identity['dtype']}".strip(),
        "text": f"{text['dataset']}, {text['split']}: {text['documents']:,} documents on "
        f"{text['units']:,} pages ({text['note']})",
        **hashes,
        **{name: version for name, version in origin["versions"].items() if version},
        "commit": origin["commit"] or "unknown",
        "hardware": ", ".join(str(value) for value in origin["hardware"].values()),
    }
