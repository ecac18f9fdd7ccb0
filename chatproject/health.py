"""``python -m chatproject.health``: exit with 0 if the site on this machine answers; for containers."""

from __future__ import annotations

import os
import urllib.request

if __name__ == "__main__":
    host = os.environ.get("ALLOWED_HOSTS", "localhost").split(",")[0].strip().lstrip(".*") or "localhost"
    request = urllib.request.Request("http://127.0.0.1:8000/health/", headers={"Host": host})
    urllib.request.urlopen(request, timeout=4).close()  # noqa: S310
