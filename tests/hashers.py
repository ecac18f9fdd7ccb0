"""Quick passwords for the tests."""

from __future__ import annotations

from django.contrib.auth.hashers import PBKDF2PasswordHasher


class OneRoundHasher(PBKDF2PasswordHasher):
    """Django's own, without the work that makes it safe. Any Django site accepts what it makes."""

    iterations = 1
