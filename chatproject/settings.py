"""Settings of the host site, read from the environment; secure unless ``DEBUG`` says otherwise.

- ``DEBUG``: ``1`` for development: no secret key needed, plain HTTP, static files from their sources.
- ``SECRET_KEY``: required without ``DEBUG``.
- ``ALLOWED_HOSTS``: host names, comma-separated.
- ``CSRF_TRUSTED_ORIGINS``: origins such as ``https://chat.example``, comma-separated.
- ``HTTPS``: ``0`` where browsers reach the site by plain HTTP. Otherwise the proxy in front must set
  ``X-Forwarded-Proto`` itself and never pass on a visitor's.
- ``DATABASE_URL``: such as ``postgresql://user:password@host/name``. Without it: SQLite beside ``manage.py``.
- ``REDIS_URL``: such as ``redis://host:6379/0``. Without it: the in-memory channel layer, for one process.
- ``REDIS_LAYER``: which layer of channels_redis, ``pubsub`` (the default) or ``core``.
- ``STATIC_ROOT``: where ``collectstatic`` puts what is served without ``DEBUG``.
- ``ANTHROPIC_API_KEY``, ``ANTHROPIC_BASE_URL``: read by the app. Without a key the demo provider answers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dj_database_url
from csp.constants import NONE, SELF
from django.core.exceptions import ImproperlyConfigured

BASE_DIR = Path(__file__).resolve().parent.parent


def env_flag(name: str, *, default: bool = False) -> bool:
    """Whether the variable says yes."""
    value = os.environ.get(name, "").lower()
    return value in ("1", "true", "yes", "on") if value else default


def env_list(name: str) -> list[str]:
    """The comma-separated parts of the variable."""
    return [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]


def database(url: str) -> dict[str, Any]:
    """Django's settings of the database at ``url``."""
    config: dict[str, Any] = {**dj_database_url.parse(url)}
    options = config.setdefault("OPTIONS", {})
    if config["ENGINE"].endswith("sqlite3"):
        options["init_command"] = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"
        options["transaction_mode"] = "IMMEDIATE"  # a writer waits its turn instead of failing half-way
        options["timeout"] = 20
    else:
        options["pool"] = {"min_size": 1, "max_size": 20}
    return config


def channel_layer(url: str, kind: str) -> dict[str, Any]:
    """Channels' settings of the layer over the Redis at ``url``; in memory if that is empty."""
    if not url:
        return {"BACKEND": "channels.layers.InMemoryChannelLayer"}
    backends = {
        "pubsub": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "core": "channels_redis.core.RedisChannelLayer",
    }
    config: dict[str, Any] = {"hosts": [url], "prefix": "chat"}
    if kind == "core":
        config["capacity"] = 10_000  # per process; beyond it, and by default beyond 100, it drops without a word
    return {"BACKEND": backends[kind], "CONFIG": config}


DEBUG = env_flag("DEBUG")
HTTPS = env_flag("HTTPS", default=not DEBUG)
SECRET_KEY = os.environ.get("SECRET_KEY") or ("only-for-development" if DEBUG else "")
if not SECRET_KEY:
    raise ImproperlyConfigured("set SECRET_KEY, or DEBUG=1 on your own machine")
ALLOWED_HOSTS = env_list("ALLOWED_HOSTS")
CSRF_TRUSTED_ORIGINS = env_list("CSRF_TRUSTED_ORIGINS")

INSTALLED_APPS = [
    "daphne",  # first, so that runserver serves WebSockets
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "servestatic",
    "channels",
    "streaming_chat",
    "chatproject",
]
# Each can run on the event loop: one that cannot would send every request through a thread.
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "csp.middleware.CSPMiddleware",
    "servestatic.middleware.ServeStaticMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.locale.LocaleMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "chatproject.urls"
ASGI_APPLICATION = "chatproject.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASES = {"default": database(os.environ.get("DATABASE_URL") or f"sqlite:///{BASE_DIR / 'db.sqlite3'}")}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
CHANNEL_LAYERS = {"default": channel_layer(os.environ.get("REDIS_URL", ""), os.environ.get("REDIS_LAYER", "pubsub"))}

STREAMING_CHAT: dict[str, Any] = {}

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "home"
LOGOUT_REDIRECT_URL = "home"

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"

STATIC_URL = "static/"
STATIC_ROOT = Path(os.environ.get("STATIC_ROOT") or BASE_DIR / "staticfiles")
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if DEBUG
        else "servestatic.storage.CompressedManifestStaticFilesStorage"
    },
}
MEDIA_ROOT = BASE_DIR / "media"

CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [NONE],
        "script-src": [SELF],
        "style-src": [SELF],
        "img-src": [SELF, "data:"],
        "font-src": [SELF],
        "connect-src": [SELF],
        "form-action": [SELF],
        "base-uri": [NONE],
        "frame-ancestors": [NONE],
    },
}
SECURE_SSL_REDIRECT = HTTPS
SECURE_REDIRECT_EXEMPT = [r"^health/$"]
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if HTTPS else None
SECURE_HSTS_SECONDS = 365 * 24 * 60 * 60 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = HTTPS
SECURE_HSTS_PRELOAD = HTTPS
SESSION_COOKIE_SECURE = HTTPS
CSRF_COOKIE_SECURE = HTTPS
X_FRAME_OPTIONS = "DENY"

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "{asctime} {levelname} {name}: {message}", "style": "{"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
    "loggers": {
        "django": {"handlers": [], "level": "INFO"},
        "streaming_chat": {"level": "INFO"},
    },
}
