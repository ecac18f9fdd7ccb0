"""Turns and their journal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Self

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.db.models.functions import Now
from django.utils.translation import gettext_lazy as _
from uuid_utils.compat import uuid7

from .conversation import Conversation, Message

if TYPE_CHECKING:
    import uuid
    from datetime import datetime


class TurnQuerySet(models.QuerySet["Turn"]):
    """Turns."""

    def timed(self) -> Self:
        """With the database's time as ``now``, by which all ages are measured, and with their usage records."""
        return self.annotate(now=Now()).prefetch_related("usage_records")


class Turn(models.Model):
    """One prompt and the reply that is made to it.

    ``queued → running → completed | stopped | timed_out | failed | interrupted``; also ``queued → stopped | failed``.
    A terminal status is final. Every change of status is one conditional UPDATE, so any number of processes may try.
    """

    class Status(models.TextChoices):
        QUEUED = "queued", _("queued")
        RUNNING = "running", _("running")
        COMPLETED = "completed", _("completed")
        STOPPED = "stopped", _("stopped")
        TIMED_OUT = "timed_out", _("timed out")
        FAILED = "failed", _("failed")
        INTERRUPTED = "interrupted", _("interrupted")

    ACTIVE: Final = (Status.QUEUED, Status.RUNNING)

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    conversation = models.ForeignKey(Conversation, models.CASCADE, related_name="turns")
    prompt = models.ForeignKey(Message, models.CASCADE, related_name="prompted_turns")
    reply = models.OneToOneField(Message, models.CASCADE, related_name="turn")
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.SET_NULL, null=True, blank=True, related_name="chat_turns"
    )
    status = models.CharField(_("status"), max_length=12, choices=Status, default=Status.QUEUED)
    attempt = models.PositiveSmallIntegerField(_("attempt"), default=0)
    """How often the turn was claimed."""
    lease_token = models.UUIDField(null=True, editable=False)
    """Names the one claim whose process may write; every write checks it."""
    lease_expires_at = models.DateTimeField(null=True, editable=False)
    stop_requested_at = models.DateTimeField(_("stop requested"), null=True, editable=False)
    timeout_seconds = models.FloatField(_("timeout (s)"), null=True, editable=False)
    """Asked for by the caller; null means the site's own limit."""
    stop_reason = models.CharField(_("stop reason"), max_length=50, blank=True)
    """The provider's word for why it ended, such as ``end_turn`` or ``max_tokens``."""
    stop_details = models.JSONField(_("stop details"), default=dict, blank=True)
    """Whatever the provider said beside the reason, such as the category of a refusal."""
    error_code = models.CharField(_("error"), max_length=50, blank=True)
    """A key of :data:`streaming_chat.exceptions.TURN_ERRORS`; empty if all went well."""
    provider = models.CharField(_("provider"), max_length=50, blank=True)
    model = models.CharField(_("model"), max_length=100, blank=True)
    """The one that was asked; once the turn is over, the one that answered."""
    end_seq = models.PositiveIntegerField(_("last entry"), null=True)
    """Number of the last journal entry; null until the turn is terminal. Outlives the entries."""
    queued_at = models.DateTimeField(_("queued"), db_default=Now(), editable=False)
    started_at = models.DateTimeField(_("started"), null=True, editable=False)
    first_text_at = models.DateTimeField(_("first text"), null=True, editable=False)
    finished_at = models.DateTimeField(_("finished"), null=True, editable=False)

    objects = TurnQuerySet.as_manager()

    if TYPE_CHECKING:
        now: datetime

    class Meta:
        verbose_name = _("turn")
        verbose_name_plural = _("turns")
        constraints = [
            models.UniqueConstraint(
                fields=["conversation"], condition=Q(status__in=["queued", "running"]), name="turn_one_active"
            ),
            models.CheckConstraint(
                condition=Q(
                    status__in=[
                        "queued",
                        "running",
                        "completed",
                        "stopped",
                        "timed_out",
                        "failed",
                        "interrupted",
                    ]
                ),
                name="turn_status_known",
            ),
            models.CheckConstraint(
                condition=Q(status="running", lease_token__isnull=False, lease_expires_at__isnull=False)
                | (~Q(status="running") & Q(lease_token__isnull=True, lease_expires_at__isnull=True)),
                name="turn_leased_while_running",
            ),
            models.CheckConstraint(
                condition=Q(status__in=["queued", "running"], finished_at__isnull=True, end_seq__isnull=True)
                | (~Q(status__in=["queued", "running"]) & Q(finished_at__isnull=False, end_seq__isnull=False)),
                name="turn_ended_when_terminal",
            ),
        ]
        indexes = [
            # Not on lease_expires_at: it changes with every commit, and an index on it would make each a new row.
            models.Index(
                fields=["status", "queued_at"], condition=Q(status__in=["queued", "running"]), name="turn_active"
            ),
            models.Index(fields=["-queued_at", "-id"], name="turn_newest"),
            models.Index(fields=["finished_at"], name="turn_finished"),
        ]

    def __str__(self) -> str:
        return f"turn {self.pk}"

    @property
    def active(self) -> bool:
        """Whether the turn is queued or running."""
        return self.status in self.ACTIVE


class JournalEntry(models.Model):
    """Entry ``seq`` (1, 2, 3 …) of a turn: operations on the reply's blocks, as the JSON text that viewers get.

    Immutable. Written by the turn's one owner; deleted some time after the turn's end, when the reply holds the text.
    """

    pk = models.CompositePrimaryKey("turn_id", "seq")
    turn = models.ForeignKey(Turn, models.CASCADE, related_name="entries", db_index=False)
    seq = models.PositiveIntegerField()
    ops = models.TextField()

    if TYPE_CHECKING:
        turn_id: uuid.UUID

    class Meta:
        verbose_name = _("journal entry")
        verbose_name_plural = _("journal entries")
        constraints = [models.CheckConstraint(condition=Q(seq__gte=1), name="journal_seq_from_one")]

    def __str__(self) -> str:
        return f"journal entry {self.turn_id}/{self.seq}"
