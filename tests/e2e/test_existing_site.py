"""The package in somebody else's site: built, installed, and put in with nothing but the README's lines."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import aiohttp
import pytest

from tests import wire
from tests.services import ROOT, START_SECONDS

if TYPE_CHECKING:
    from playwright.async_api import Page

FENCE = re.compile(r"^```(?P<language>\S+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
PASSWORD = "difference engine"
OWN_SOCKET = """
from channels.generic.websocket import AsyncWebsocketConsumer
from django.urls import path


class Echo(AsyncWebsocketConsumer):
    async def receive(self, text_data=None, bytes_data=None):
        await self.send(text_data=text_data)


websocket_urlpatterns = [path("echo/", Echo.as_asgi())]
"""
OWN_PAGE = """
from django.views.generic import TemplateView

urlpatterns += [path("help/", TemplateView.as_view(template_name="help.html"))]
"""
ASK = """
import asyncio

from django.contrib.auth import get_user_model

user = get_user_model().objects.get(username="ada")
reply = asyncio.run(ask(user))
print()
asyncio.run(ask_more(user, reply.conversation_id))
"""

pytestmark = pytest.mark.timeout(300)


def section(document: str, heading: str) -> list[tuple[str, str]]:
    """The code blocks under ``heading``, each with its language."""
    text = (ROOT / document).read_text()
    body = re.split(rf"^#+ {re.escape(heading)}$", text, maxsplit=1, flags=re.MULTILINE)[1]
    body = re.split(r"^## ", body, maxsplit=1, flags=re.MULTILINE)[0]
    return [(match["language"], match["code"]) for match in FENCE.finditer(body)]


# ------------------------------------------------------------------------------------------------ the distributions


@dataclass(frozen=True, slots=True)
class Distributions:
    """What would be uploaded."""

    sdist: Path
    wheel: Path

    def sdist_names(self) -> set[str]:
        """The sdist's files, without its top directory."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive if member.isfile()}

    def wheel_names(self) -> set[str]:
        """The wheel's files."""
        with zipfile.ZipFile(self.wheel) as archive:
            return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """An sdist, and the wheel that is built of it, by the package's own build hook."""
    directory = tmp_path_factory.mktemp("distributions")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(directory), str(ROOT)], cwd=directory)
    (sdist,), (wheel,) = directory.glob("*.tar.gz"), directory.glob("*.whl")
    return Distributions(sdist, wheel)


def app_files() -> set[str]:
    """What is in the app's directory."""
    files = (path for path in (ROOT / "streaming_chat").rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_whole_app_and_nothing_else(distributions: Distributions) -> None:
    names = {name for name in distributions.wheel_names() if ".dist-info/" not in name}
    assert names == app_files()
    assert {
        "streaming_chat/py.typed",
        "streaming_chat/migrations/0001_initial.py",
        "streaming_chat/templates/streaming_chat/element.html",
        "streaming_chat/static/streaming_chat/streaming-chat.js",
        "streaming_chat/static/streaming_chat/streaming-chat.css",
    } <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in distributions.wheel_names())


def test_the_sdist_holds_what_a_build_needs_and_no_tests(distributions: Distributions) -> None:
    names = distributions.sdist_names()
    assert {name for name in names if name.startswith("streaming_chat/")} == app_files()
    assert {
        "CHANGELOG.md",
        "LICENSE",
        "PKG-INFO",
        "README.md",
        "frontend/package-lock.json",
        "frontend/src/index.ts",
        "hatch_build.py",
        "pyproject.toml",
    } <= names
    top = {name.partition("/")[0] for name in names}
    assert top.isdisjoint({"tests", "benchmarks", "chatproject", "docs", "templates", ".venv", ".cache"})
    assert not any("node_modules" in name for name in names)


# ------------------------------------------------------------------------------------------------ the site


def run(command: list[str], *, cwd: Path, **environment: str) -> str:
    """Run ``command`` as somebody with a fresh shell would; what it printed."""
    done = subprocess.run(
        command,
        check=False,
        cwd=cwd,
        env=bare_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


def bare_environment() -> dict[str, str]:
    """This process's environment without anything that could point to this repository or to a real provider."""
    ours = ("ANTHROPIC_", "CHAT_TEST_", "DJANGO_", "PYTHON", "PYTEST_", "COV_")
    names = ("DATABASE_URL", "REDIS_URL", "DEBUG", "SECRET_KEY", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if not key.startswith(ours) and key not in names}


@dataclass(frozen=True, slots=True)
class Project:
    """A Django project in an environment that has the wheel."""

    python: Path
    directory: Path

    def manage(self, *arguments: str, **environment: str) -> str:
        """Run ``manage.py``."""
        return run([str(self.python), "manage.py", *arguments], cwd=self.directory, **environment)

    def warnings(self) -> set[str]:
        """What Django's checks find, by their ids."""
        return set(re.findall(r"\((\w+\.[EW]\d+)\)", self.manage("check")))

    def append(self, path: str, code: str) -> None:
        """Put ``code`` at the end of a file."""
        file = self.directory / path
        file.write_text((file.read_text() if file.exists() else "") + "\n" + code)

    @contextmanager
    def serve(self) -> Iterator[str]:
        """Run the development server, which is Daphne; its address."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        log = self.directory / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [str(self.python), "manage.py", "runserver", "--noreload", f"127.0.0.1:{port}"],
                cwd=self.directory,
                env=bare_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not listens(port):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(START_SECONDS)
            sys.stderr.write(log.read_text())  # shown if the test failed


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def site_python(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment into which only the wheel was installed; its dependencies are borrowed from ours."""
    environment = tmp_path_factory.mktemp("environment")
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)], cwd=environment)
    python = environment / "bin" / "python"
    (packages,) = environment.glob("lib/python*/site-packages")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(distributions.wheel)]
    run([sys.executable, "-m", "pip", "--python", str(python), *install], cwd=environment)
    # A directory that a .pth file names is searched last, and the .pth files in it, such as of an editable install,
    # are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    imported = run([str(python), "-c", "import streaming_chat; print(streaming_chat.__file__)"], cwd=environment)
    assert Path(imported.strip()) == packages / "streaming_chat" / "__init__.py"
    return python


@pytest.fixture
def project(site_python: Path, tmp_path: Path) -> Project:
    """A new project with the README's lines, a page with the tag, and a user."""
    run([str(site_python), "-m", "django", "startproject", "mysite", "."], cwd=tmp_path)
    project = Project(site_python, tmp_path)
    for language, code in section("README.md", "Into your site in five lines"):
        if language == "python":
            project.append(code.partition("\n")[0].removeprefix("# "), code)
        elif language == "html+django":
            (tmp_path / "pages").mkdir()
            project.append("pages/help.html", f"<!doctype html><title>Help</title>{code}")
        elif "manage.py" in code:
            project.append("mysite/settings.py", 'TEMPLATES[0]["DIRS"] = [BASE_DIR / "pages"]\n')
            project.append("mysite/urls.py", OWN_PAGE)
            project.manage(*code.removeprefix("$ python manage.py ").split())
    project.manage(
        "createsuperuser",
        "--no-input",
        "--username=ada",
        "--email=ada@site.example",
        DJANGO_SUPERUSER_PASSWORD=PASSWORD,
    )
    return project


@asynccontextmanager
async def signed_in(url: str) -> AsyncIterator[tuple[aiohttp.ClientSession, dict[str, str]]]:
    """A session of Ada's, who logs in by the admin's form; and the headers that a change needs."""
    async with wire.network() as session:
        login = f"{url}/admin/login/"
        await session.get(login)
        form = {"username": "ada", "password": PASSWORD, "csrfmiddlewaretoken": csrf_token(session)}
        async with session.post(login, data=form, allow_redirects=False) as answer:
            assert answer.status == 302
            assert answer.headers["Server"] == "daphne"
        yield session, {"X-CSRFToken": csrf_token(session)}


def csrf_token(session: aiohttp.ClientSession) -> str:
    return next(cookie.value for cookie in session.cookie_jar if cookie.key == "csrftoken")


class Addresses(HTMLParser):
    """The addresses of a page's scripts and style sheets, and its elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: dict[str, dict[str, str | None]] = {}
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements[tag] = attributes
        if tag in ("script", "link") and (address := attributes.get("src" if tag == "script" else "href")):
            self.addresses.append(address)


async def chat_once(session: aiohttp.ClientSession, headers: dict[str, str], url: str) -> None:
    """One prompt and its streamed answer, over a WebSocket; then it is stored."""
    async with session.post(url + wire.api_path(), json={}, headers=headers) as answer:
        assert answer.status == 201
        conversation_id = (await answer.json())["id"]
    async with wire.open_socket(session, url, conversation_id) as chat:
        await chat.until("snapshot")
        accepted = await chat.ask({"type": "send", "client_id": "1", "text": "Hello from a new site"})
        assert accepted["type"] == "accepted"
        await chat.until("finished")
    deltas = [event for event in chat.view.history if event["type"] == "delta"]
    assert len(deltas) > 1
    assert chat.view.status == "completed"
    assert "Hello from a new site" in chat.view.text()
    async with session.get(url + wire.api_path(conversation_id, "/messages")) as answer:
        messages = (await answer.json())["items"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[1]["blocks"] == chat.view.blocks()


async def chat_in_the_browser(page: Page, url: str) -> None:
    """The same by hand, in the page that has the tag."""
    await page.goto(f"{url}/admin/login/?next=/help/")
    await page.get_by_label("Username").fill("ada")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{url}/help/")
    await page.get_by_role("textbox").fill("Hello from a browser")
    await page.keyboard.press("Enter")
    await page.get_by_role("heading", name="Hello from the demo").wait_for()


# ------------------------------------------------------------------------------------------------ what must work


async def test_a_new_project_with_the_lines_of_the_readme_chats(
    project: Project, distributions: Distributions, page: Page
) -> None:
    assert project.warnings() == {"streaming_chat.W005"}  # what the README says is worth adding
    project.manage("makemigrations", "--check", "--dry-run")
    with project.serve() as url:
        async with signed_in(url) as (session, headers):
            async with session.get(f"{url}/help/") as answer:
                assert answer.status == 200
                html = Addresses(await answer.text())
            assert html.elements["streaming-chat"]["provider"] == "demo"
            with zipfile.ZipFile(distributions.wheel) as wheel:
                for address in html.addresses:
                    async with session.get(urljoin(url, address)) as answer:
                        assert answer.status == 200
                        built = f"streaming_chat/static/streaming_chat/{address.rpartition('/')[2]}"
                        assert await answer.read() == wheel.read(built)
            assert len(html.addresses) == 2
            async with session.get(f"{url}/chat/") as answer:
                assert answer.status == 200
                assert "streaming-chat" in Addresses(await answer.text()).elements
            await chat_once(session, headers, url)
        await chat_in_the_browser(page, url)


async def test_a_site_with_sockets_and_database_options_of_its_own_keeps_them(project: Project) -> None:
    project.append("mysite/routing.py", OWN_SOCKET)
    (asgi,) = (code for _, code in section("docs/howto/embed.md", "ASGI") if "ProtocolTypeRouter" in code)
    (project.directory / "mysite" / "asgi.py").write_text(
        'import os\n\nos.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")\n' + asgi
    )
    (options,) = (code for _, code in section("docs/howto/embed.md", "SQLite"))
    project.append("mysite/settings.py", options)
    assert project.warnings() == set()
    with project.serve() as url:
        async with signed_in(url) as (session, headers):
            async with session.ws_connect(f"{url}/echo/", headers={"Origin": url}) as own:
                await own.send_str("still here")
                assert await own.receive_str(timeout=wire.PATIENCE_SECONDS) == "still here"
            await chat_once(session, headers, url)


def test_the_python_of_the_readme_runs_without_a_server(project: Project) -> None:
    (example,) = (code for language, code in section("README.md", "From Python") if language == "python")
    printed = project.manage("shell", "--no-imports", "--command", example + ASK)
    assert printed.count("Hello from the demo") == 2
    assert "> Why is the sky blue?" in printed
    assert "> And at sunset?" in printed
    assert re.search(r"^completed: \{'exact': True, ", printed, re.MULTILINE)
