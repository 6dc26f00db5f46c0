"""Packages that answers may import beside the standard library: their own files, with those of what they require.

They are the ones that this program's environment has, so their versions are part of what a verdict depends on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from packaging.requirements import InvalidRequirement, Requirement

from ms_pangu_quant.errors import RequestError
from ms_pangu_quant.installation import quoted

_NO_MODULES = (".pth", ".egg-link", ".dist-info", ".egg-info")


@dataclass(frozen=True)
class GuestPackages:
    """versions  name -> installed version.
    entries   name of a module, a package or a folder of libraries -> where it is installed.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[str, Path] = field(default_factory=dict)


STANDARD_LIBRARY = GuestPackages(MappingProxyType({}), MappingProxyType({}))


def find_packages(wanted: Sequence[str]) -> GuestPackages:
    """wanted  names, or requirements such as "numpy==1.26.4".

    Raises RequestError where one is not installed beside this program, in such a version, or as files of its own.
    """
    versions: dict[str, str] = {}
    entries: dict[str, Path] = {}
    waiting = [_parsed(text) for text in wanted]
    while waiting:
        requirement = waiting.pop(0)
        try:
            found = metadata.distribution(requirement.name)
        except (metadata.PackageNotFoundError, ValueError):
            raise RequestError(_refusal(requirement, "is not installed beside this program")) from None
        if not requirement.specifier.contains(found.version, prereleases=True):
            raise RequestError(_refusal(requirement, f"is installed as {found.version}"))
        name = found.metadata["Name"]
        if name in versions:
            continue
        files = _entries(found)
        if not files:
            raise RequestError(f"guest packages: {name} has no files of its own (is it installed as editable?)")
        versions[name] = found.version
        entries |= files
        needed = (Requirement(text) for text in found.requires or ())
        waiting += [each for each in needed if each.marker is None or each.marker.evaluate({"extra": ""})]
    return GuestPackages(dict(sorted(versions.items())), dict(sorted(entries.items())))


def _parsed(text: str) -> Requirement:
    try:
        return Requirement(text)
    except InvalidRequirement:
        raise RequestError(f"guest packages: got {text!r}, wanted names such as numpy, or numpy==1.26.4") from None


def _refusal(requirement: Requirement, why: str) -> str:
    wanted = quoted(f"{requirement.name}{requirement.specifier}")
    return f"guest packages: {requirement.name} {why}; pip install {wanted}, or leave it out"


def _entries(found: metadata.Distribution) -> dict[str, Path]:
    """What it has put into the folder of packages."""
    names = {file.parts[0] for file in found.files or () if file.parts} - {"..", "__pycache__"}
    places = {name: Path(str(found.locate_file(name))) for name in names if not name.endswith(_NO_MODULES)}
    return {name: path for name, path in places.items() if path.exists() and not name.startswith("__editable__")}
