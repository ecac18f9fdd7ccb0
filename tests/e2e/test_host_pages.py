"""The host site's own pages: welcome, login, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal

import pytest
from django.contrib.auth import get_user_model

from tests import services

if TYPE_CHECKING:
    from playwright.async_api import Page

PRODUCTION = {
    "DJANGO_SETTINGS_MODULE": "chatproject.settings",
    "DEBUG": "0",
    "HTTPS": "0",
    "SECRET_KEY": "only-for-this-test",
    "ALLOWED_HOSTS": "127.0.0.1",
}
PATHS = ["/", "/accounts/login/", "/no/such/page/"]


@pytest.fixture(scope="session")
def static_root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The collected static files."""
    directory = str(tmp_path_factory.mktemp("static"))
    command = [sys.executable, "manage.py", "collectstatic", "--no-input", "--verbosity", "0"]
    environment = os.environ | PRODUCTION | {"STATIC_ROOT": directory}
    subprocess.run(command, cwd=services.ROOT, env=environment, check=True)
    return directory


@pytest.fixture
def site_environment(static_root: str) -> dict[str, str]:
    """As in production, but without TLS in front."""
    return {**PRODUCTION, "STATIC_ROOT": static_root}


async def violations(page: Page) -> list[tuple[str, Any]]:
    """What axe-core finds wrong, as pairs of rule and place."""
    await page.evaluate(services.axe_source())
    report = await page.evaluate("axe.run()")
    return [(found["id"], [node["target"] for node in found["nodes"]]) for found in report["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_pages_are_accessible_and_fit_the_screen(
    site: services.Site, page: Page, scheme: Literal["light", "dark"], width: int
) -> None:
    await page.emulate_media(color_scheme=scheme)
    await page.set_viewport_size({"width": width, "height": 640})
    for path in PATHS:
        await page.goto(site.url + path)
        assert await violations(page) == [], path
        assert await page.evaluate("document.documentElement.scrollWidth") <= width, path


async def test_a_visitor_logs_in_and_out_by_keyboard(site: services.Site, page: Page) -> None:
    await get_user_model().objects.acreate_user("ada", password="difference engine")
    await page.goto(site.url)
    await page.get_by_role("main").get_by_role("link", name="Log in").press("Enter")
    await page.get_by_label("Username").fill("ada")
    await page.get_by_label("Password").fill("wrong")
    await page.keyboard.press("Enter")
    assert "correct username and password" in await page.get_by_role("alert").inner_text()

    await page.get_by_label("Password").fill("difference engine")
    await page.keyboard.press("Enter")
    await page.wait_for_url("**/chat/**")

    await page.goto(f"{site.url}/admin/")
    assert page.url == f"{site.url}/admin/login/?next=/admin/"  # no staff

    await page.goto(f"{site.url}/no/such/page/")
    await page.get_by_role("button", name="Log out").press("Enter")
    await page.wait_for_url(f"{site.url}/")
    await page.goto(f"{site.url}/accounts/login/")
    assert await page.get_by_label("Password").is_visible()


async def test_pages_forbid_what_they_do_not_need(site: services.Site, page: Page) -> None:
    for path in PATHS:
        response = await page.goto(site.url + path)
        assert response is not None
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy, path
        assert "unsafe" not in policy, path
        assert response.headers["x-frame-options"] == "DENY", path
