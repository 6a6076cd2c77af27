"""The README of an exported configuration: what it is, what is certified, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_card(head: Mapping[str, Any], *, folder: str) -> str:
    """Markdown with the Hub's own front matter.

    Args:
        head: what ``var_moe.json`` holds.
        folder: name by which the example loads it.
    """
    about = head["model"]
    parts = [
        _front_matter(about),
        f"# {head['policy']} for {_name(about)}\n\n"
        "A configuration for var_moe: it makes a "
        "Mixture-of-Experts model faster by running fewer experts per token. It holds no weights "
        "of the model.",
        _settings(head),
        "## Quality\n\n" + _quality(head.get("certificate")),
        _loading(about, folder),
        _limits(head),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(about: Mapping[str, Any]) -> str:
    lines = ["library_name: var_moe", "tags: [mixture-of-experts, inference]"]
    if about["revision"]:  # a model of the Hub
        lines.append(f"base_model: {about['model']}")
    return "\n".join(["---", *lines, "---"])


def _settings(head: Mapping[str, Any]) -> str:
    about, text = head["model"], head["text"]
    rows = [
        ("model", _name(about) + (f" at {about['revision']}" if about["revision"] else "")),
        ("layers, experts, experts per token", "{layers}, {experts}, {top_k}".format(**about)),
        ("policy", head["policy"]),
        *((name, value) for name, value in head["settings"].items()),
        ("compensation", head["compensation"] or "the policy's own"),
        ("calibrated on", f"{text['tokens']:,} tokens of {text['dataset']}"),
    ]
    table = [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *table])


def _quality(certificate: Mapping[str, Any] | None) -> str:
    if certificate is None:
        return (
            "This configuration is **not certified**: nothing is claimed of its quality on text "
            "that it was not chosen on. `var-moe certify` certifies one."
        )
    lines = [f"**{certificate['sentence']}**"]
    if not certificate["confirmatory"]:
        lines.append("Not confirmatory: the text had been certified on before.")
    claims = "\n".join(f"- {line}" for line in certificate["not_claimed"])
    return "\n\n".join([*lines, "What is not claimed:\n\n" + claims])


def _name(about: Mapping[str, Any]) -> str:
    """Of a local model its folder's name alone: where it lay says nothing elsewhere."""
    name: str = about["model"]
    return name if about["revision"] else Path(name).name


def _loading(about: Mapping[str, Any], folder: str) -> str:
    local = not about["revision"] and about["model"] != "demo"
    name = f"path/to/{_name(about)}" if local else about["model"]
    return (
        "## Use\n\n```python\n"
        "from var_moe import load_model, routed\n\n"
        f'loaded = load_model("{name}")\n'
        f'with routed(loaded, "{folder}"):\n'
        '    loaded.model.generate(**loaded.tokenizer("Once", return_tensors="pt"))\n'
        "```"
    )


def _limits(head: Mapping[str, Any]) -> str:
    about = head["model"]
    return (
        "## Limits\n\n"
        f"- For {_name(about)} alone: another model, tokenizer or number of experts per token "
        "is refused.\n"
        "- It was calibrated on the text above; other text can cost more.\n"
        "- The speedup depends on machine, batch and experts backend; measure it with "
        "`var-moe evaluate`."
    )
