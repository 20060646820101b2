"""The report of an artifact folder: read, with what else is known of it, and shown."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvcc.fronts import Front, read_front
from kvcc.report.facts import report_facts
from kvcc.report.figures import Facts, Figure
from kvcc.report.page import report_html, sections_of
from kvcc.runtime.calibrated import Calibrated

if TYPE_CHECKING:
    from kvcc.checking import Verdict
    from kvcc.runtime.artifact import Artifact


@dataclass(frozen=True)
class Extras:
    """What a report can show beside what an artifact holds.

    `profile` is a profile's folder, in place of what the artifact recorded of its own; `front` a file of
    `kvcc compare -o` or `kvcc plan -o`.
    """

    profile: Path | None = None
    front: Path | None = None


def render_report(artifact: Path, verdict: "Verdict | None", extras: Extras | None = None) -> str:
    """The report of an artifact folder, as HTML.

    Without `verdict` it shows the accuracy stored in the artifact, if any. Raises ArtifactError, and for `extras`
    ProfileError and DataError.
    """
    return report_html(stored_facts(artifact, extras, verdict))


def stored_facts(artifact: Path, extras: Extras | None = None, verdict: "Verdict | None" = None) -> Facts:
    """`report_facts` of an artifact folder, with `verdict` or the accuracy stored in it; raises as `render_report`."""
    found = _read(artifact)
    manifest = found.manifest
    calibration, front = _extras(found, extras or Extras())
    return report_facts(
        found.plan,
        manifest.model,
        manifest.recipe,
        _provenance(found),
        found.accuracy if verdict is None else verdict.as_dict(),
        calibration=calibration,
        front=front,
    )


def report_figures(artifact: Path, extras: Extras | None = None) -> list[Figure]:
    """The figures of an artifact's report, in its order. Raises what `render_report` does."""
    facts = stored_facts(artifact, extras)
    return [figure for section in sections_of(facts) for figure in section.figures]


def _extras(artifact: "Artifact", extras: Extras) -> tuple[Calibrated | None, Front | None]:
    """What is known of the calibration, and a front with this artifact in it."""
    manifest, plan = artifact.manifest, artifact.plan
    calibration, front = manifest.calibration, None
    if extras.profile is not None:
        from kvcc.key_energy import calibrated
        from kvcc.profile import Profile

        profile = Profile.load(extras.profile)
        profile.require_model(manifest.model)
        calibration = calibrated(profile, plan, artifact.tables)
    if extras.front is not None:
        front = read_front(extras.front, manifest.recipe, plan.bits_per_element())
    return calibration, front


def _read(artifact: Path) -> "Artifact":
    import torch

    from kvcc.runtime.artifact import read_artifact

    return read_artifact(artifact, verify="sizes", device=torch.device("cpu"))


def _provenance(artifact: "Artifact") -> dict[str, Any]:
    """Where the artifact comes from. Its report is not among the files: no page can state its own digest."""
    manifest = artifact.manifest
    files = {name: entry.sha256 for name, entry in sorted(manifest.files.items()) if name != "report.html"}
    licence = {"licence": manifest.licence} if manifest.licence else {}
    return {"kvcc": manifest.kvcc_version, "torch": manifest.torch_version, **licence, "files": files}
