"""The host site's settings, on the databases and channel layers that ``CHAT_TEST_BACKEND`` names.

``sqlite``: SQLite and the in-memory layer. ``pubsub``, ``core``: PostgreSQL and that Redis layer.
"""

from __future__ import annotations

import os

from tests import services

os.environ["DEBUG"] = "1"

from chatproject.settings import *  # noqa: F403
from chatproject.settings import channel_layer, database

BACKEND = os.environ.get("CHAT_TEST_BACKEND", "sqlite")

if BACKEND == "sqlite":
    # A file, because the journal's thread has a connection of its own.
    DATABASES = {"default": database(f"sqlite:///{services.run_directory() / 'unused.sqlite3'}")}
    DATABASES["default"]["TEST"] = {"NAME": str(services.run_directory() / "test.sqlite3")}
    CHANNEL_LAYERS = {"default": channel_layer("", BACKEND)}
else:
    DATABASES = {"default": database(services.postgres_url())}
    CHANNEL_LAYERS = {"default": channel_layer(services.redis_url(), BACKEND)}
    CHANNEL_LAYERS["default"]["CONFIG"]["prefix"] = f"chat-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"

PASSWORD_HASHERS = ["tests.hashers.OneRoundHasher"]

STATIC_ROOT = services.run_directory() / "static"
STATIC_ROOT.mkdir(exist_ok=True)
