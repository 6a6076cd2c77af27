"""A results folder's configuration as one folder to keep, share and load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import RoutingProfile
from var_moe.certification.certify import CERTIFICATE_FILE
from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate, load_candidate
from var_moe.optimization.results import CONFIG_FILE, METADATA_FILE
from var_moe.optimization.validation import find_profile
from var_moe.report.certificate import model_card
from var_moe.serving.folder import CARD_FILE, save_exported
from var_moe.storage import atomic_write_text, check_output_folder, entries_of, read_json

_QUOTED = ("sentence", "confirmatory", "not_claimed", "alpha", "max_degradation", "text")


def export(
    results: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    profile: str | Path | None = None,
    compensation: str | Path | None = None,
) -> dict[str, Any]:
    """Write the folder that `routed(model, folder)` takes in place of a policy.

    It holds ``var_moe.json`` (what, for which model, from where), ``var_moe.safetensors`` (the
    parts of the profile that the policy needs) and ``README.md``, a model card.

    Args:
        results: results folder of `tune`.
        output: folder to write.
        config: another configuration than the results' ``best_config.json``, such as their
            ``certified_config.json``.
        profile: profile folder, where none lies in the results folder.
        compensation: folder of the learned compensation, where it is not the profile's own.

    Returns:
        What ``var_moe.json`` holds.

    Raises:
        UsageError: something is missing in the results, or is not what the search used.
    """
    folder, place = Path(results), check_output_folder(output)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; expected the results of `var-moe tune`")
    path = Path(config) if config is not None else folder / CONFIG_FILE
    candidate = load_candidate(path)
    known = find_profile(folder / CONFIG_FILE, Path(profile) if profile is not None else None)
    if compensation is not None:
        known = known.with_compensation(load_compensation(compensation))
    stand_in = candidate.make(known).compensation
    fitted = None if stand_in is None else stand_in.hash
    _check_compensation(folder, path, fitted)
    certificate = _certificate(folder, candidate, known, fitted)
    head = save_exported(
        place,
        policy=candidate.policy,
        settings=candidate.settings,
        compensation=candidate.compensation,
        calibration=known.calibration(candidate.compensation),
        profile=known.head,
        certificate=certificate,
    )
    atomic_write_text(place / CARD_FILE, model_card(head, folder=place.name))
    return head


def _check_compensation(folder: Path, config: Path, fitted: str | None) -> None:
    """Refuse a compensation that was fitted anew since the search."""
    if config.parent.resolve() != folder.resolve() or not (folder / METADATA_FILE).is_file():
        return
    metadata = read_json(folder / METADATA_FILE, what="metadata of a search")
    with entries_of(folder / METADATA_FILE):
        recorded = metadata.get("identity", {}).get("compensation_hash")
    if recorded is not None and fitted is not None and recorded != fitted:
        raise UsageError(
            f"{folder}: was searched with compensation {recorded[:12]}, but the profile's is "
            f"{fitted[:12]}; give the folder of that one with --compensation"
        )


def _certificate(
    folder: Path, candidate: Candidate, profile: RoutingProfile, fitted: str | None
) -> dict[str, Any] | None:
    """What the results' certificate says of this configuration; None where that is nothing."""
    path = folder / CERTIFICATE_FILE
    if not path.is_file():
        return None
    certificate: Mapping[str, Any] = read_json(path, what="certificate")
    with entries_of(path):
        if not certificate["certified"] or certificate["certified_config"] != candidate.to_dict():
            return None
        hashes, name = certificate["hashes"], certificate["certified_name"]
        if (hashes["profile"], hashes["compensation"].get(name)) != (profile.hash, fitted):
            return None
        return {key: certificate[key] for key in _QUOTED}
