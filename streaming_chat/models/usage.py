"""What each provider request cost."""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from django.utils.translation import gettext_lazy as _
from uuid_utils.compat import uuid7

from .conversation import Conversation
from .turn import Turn


class UsageRecord(models.Model):
    """One provider request. Written before the request is sent, so that none is ever forgotten.

    Holds no text, and outlives its conversation, turn and user.
    """

    class Quality(models.TextChoices):
        OPEN = "open", _("open")
        """The request is under way, or its process died; recovery makes it an estimate."""
        EXACT = "exact", _("exact")
        """The provider's own final figures."""
        ESTIMATED = "estimated", _("estimated")
        """The stream ended before the final figures came."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    turn = models.ForeignKey(Turn, models.SET_NULL, null=True, blank=True, related_name="usage_records")
    conversation = models.ForeignKey(Conversation, models.SET_NULL, null=True, blank=True, related_name="usage_records")
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.SET_NULL, null=True, blank=True, related_name="chat_usage_records"
    )
    provider = models.CharField(_("provider"), max_length=50)
    model = models.CharField(_("model"), max_length=100)
    request_id = models.CharField(_("request id"), max_length=100, blank=True)
    """The provider's own id, for its support; empty if it never answered."""
    quality = models.CharField(_("quality"), max_length=10, choices=Quality, default=Quality.OPEN)
    error_code = models.CharField(_("error"), max_length=50, blank=True)
    input_tokens = models.PositiveBigIntegerField(_("input tokens"), default=0)
    output_tokens = models.PositiveBigIntegerField(_("output tokens"), default=0)
    cache_creation_input_tokens = models.PositiveBigIntegerField(_("tokens written to the cache"), default=0)
    cache_read_input_tokens = models.PositiveBigIntegerField(_("tokens read from the cache"), default=0)
    thinking_tokens = models.PositiveBigIntegerField(_("thinking tokens"), default=0)
    """Part of the output tokens."""
    cost_micro_usd = models.BigIntegerField(_("cost (micro-USD)"), null=True, blank=True)
    """Null: unknown."""
    raw = models.JSONField(_("provider's account"), default=dict, blank=True)
    requested_at = models.DateTimeField(_("requested"), db_default=Now(), editable=False)
    finished_at = models.DateTimeField(_("finished"), null=True, blank=True)
    first_text_ms = models.PositiveIntegerField(_("time to first text (ms)"), null=True, blank=True)
    duration_ms = models.PositiveIntegerField(_("duration (ms)"), null=True, blank=True)

    class Meta:
        verbose_name = _("usage record")
        verbose_name_plural = _("usage records")
        constraints = [
            models.CheckConstraint(
                condition=Q(quality="open", finished_at__isnull=True)
                | Q(quality__in=["exact", "estimated"], finished_at__isnull=False),
                name="usage_finished_unless_open",
            ),
        ]
        indexes = [
            models.Index(fields=["-requested_at", "-id"], name="usage_newest"),
            models.Index(fields=["requested_at"], condition=Q(quality="open"), name="usage_open"),
        ]

    def __str__(self) -> str:
        return f"usage record {self.pk}"
