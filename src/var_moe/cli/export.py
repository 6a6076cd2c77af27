"""``var-moe export``: a configuration with all that it needs, as one folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from var_moe.cli.output import CommandResult


def export(
    results: Path,
    *,
    output: Path | None = None,
    config: Path | None = None,
    profile: Path | None = None,
    compensation: Path | None = None,
) -> CommandResult:
    """Write a configuration, with the parts of the profile that it needs, as one folder.

    `routed(model, folder)` takes it in place of a policy, and so does the Hub id it is uploaded to.

    Args:
        results: results folder of `var-moe tune`.
        output: folder to write; by default export in the results folder.
        config: another configuration than best_config.json, such as certified_config.json.
        profile: profile folder, where none lies in the results folder.
        compensation: folder of a learned compensation, where it is not the profile's own.
    """
    print(f"exporting {results} ...", file=sys.stderr, flush=True)
    from var_moe.certification.exporting import export as run_export

    place = output or results / "export"
    head = run_export(results, place, config=config, profile=profile, compensation=compensation)
    certificate = head["certificate"]
    print(
        f"{head['policy']} for model {head['model']['model']}: "
        + (certificate["sentence"] if certificate else "not certified")
    )
    for path in sorted(place.iterdir()):
        print(f"  {path} ({path.stat().st_size / 1024:,.0f} KiB)")
    print(f"Next: with routed(model, {json.dumps(str(place))}) as session: ...")
    return CommandResult({**head, "folder": str(place)})
