"""The host site's own settings, for a server in a process of its own that needs other limits or middleware.

``TEST_STREAMING_CHAT`` holds ``STREAMING_CHAT`` as JSON, ``TEST_SETTINGS`` any other settings.
"""

from __future__ import annotations

import json
import os

from chatproject.settings import *  # noqa: F403

STREAMING_CHAT = json.loads(os.environ.get("TEST_STREAMING_CHAT", "{}"))
globals().update(json.loads(os.environ.get("TEST_SETTINGS", "{}")))
