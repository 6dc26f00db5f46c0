"""What this program needs from pip and from the system: what is there, and the command that brings what is not."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

DISTRIBUTION = "ms_pangu_quant"
_OPTIONAL = 'extra == "endpoint"'  # what a command needs; other extras are for those who work on this project
_MODULES = {"yaml": "pyyaml"}  # modules whose distribution is called otherwise
_MANAGERS = {  # program -> what it is told, with {0} for sudo and {1} for the package
    "apt-get": "{0}apt-get update && {0}apt-get install -y {1}",
    "dnf": "{0}dnf install -y {1}",
    "yum": "{0}yum install -y {1}",
    "zypper": "{0}zypper install -y {1}",
    "apk": "{0}apk add {1}",
    "pacman": "{0}pacman -S --noconfirm {1}",
}
_PACKAGES = {  # what is needed -> its package, where no other is named for a manager
    "compiler": {"apt-get": "g++", "apk": "g++", "pacman": "gcc", "": "gcc-c++"},
    "bubblewrap": {"": "bubblewrap"},
}


@dataclass(frozen=True)
class Package:
    """A requirement ("mindspore==2.9.0") and the installed version, None where there is none."""

    name: str
    requirement: str
    version: str | None
    fits: bool


def version(name: str = DISTRIBUTION) -> str | None:
    """Of a package; None where it is not installed, as this program may run from a folder."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def packages() -> list[Package]:
    """What setup.py requires on this platform, extras left out, in its order."""
    from packaging.requirements import Requirement

    found = []
    for text in requirements():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        installed = version(wanted.name)
        fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
        found.append(Package(wanted.name, f"{wanted.name}{wanted.specifier}", installed, fits))
    return found


def requirements() -> Iterator[str]:
    """Of the installed distribution, those of its extras too; none where it runs from a folder without being installed."""
    try:
        yield from metadata.requires(DISTRIBUTION) or ()
    except metadata.PackageNotFoundError:
        return


def missing_module(error: ModuleNotFoundError) -> str | None:
    """One line for an import that failed because a requirement is not installed; None if it is not one of ours."""
    module = (error.name or "").partition(".")[0]
    wanted = _normalized(_MODULES.get(module, module))
    for text in requirements():
        name = re.match(r"[\w.-]+", text)
        if name and _normalized(name[0]) == wanted and ("extra ==" not in text or _OPTIONAL in text):
            return f"{name[0]} is not installed; pip install {quoted(text.partition(';')[0].strip())}"
    return None


def quoted(requirement: str) -> str:
    """As a shell takes it: < and > would redirect."""
    return f"'{requirement}'" if re.search(r"[<>=!~;\[ ]", requirement) else requirement


def system_command(what: str) -> str | None:
    """The command that installs "compiler" or "bubblewrap" with this system's package manager; None where none is known."""
    manager = next((name for name in _MANAGERS if shutil.which(name)), None)
    if manager is None:
        return None
    names = _PACKAGES[what]
    sudo = "sudo " if os.geteuid() != 0 else ""
    return _MANAGERS[manager].format(sudo, names.get(manager, names[""]))


def _normalized(name: str) -> str:
    """As package indexes compare names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
