"""Conversations, who takes part in them, and their tree of messages."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Self

from django.conf import settings
from django.db import connections, models
from django.db.models import Exists, F, OuterRef, Q
from django.db.models.functions import Now
from django.utils.translation import gettext_lazy as _
from uuid_utils.compat import uuid7

if TYPE_CHECKING:
    from django.contrib.auth.base_user import AbstractBaseUser
    from django.contrib.auth.models import AnonymousUser


class ConversationQuerySet(models.QuerySet["Conversation"]):
    """Conversations, and the one door through which transports reach them."""

    def visible_to(self, user: AbstractBaseUser | AnonymousUser) -> Self:
        """Those that ``user`` owns or takes part in; none for an anonymous or inactive user."""
        if not user.is_authenticated or not user.is_active:
            return self.none()
        takes_part = Participant.objects.filter(conversation=OuterRef("pk"), user_id=user.pk)
        return self.filter(Q(owner_id=user.pk) | Exists(takes_part))

    def touch(self, **changes: Any) -> int:
        """Make ``changes``, raise the revision by one and note the time; the number of rows.

        Call it in the transaction of whatever else viewers must hear of.
        """
        return self.update(revision=F("revision") + 1, updated_at=Now(), **changes)


class Conversation(models.Model):
    """A tree of messages with one current branch, which ends at ``leaf``."""

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.CASCADE, null=True, blank=True, related_name="owned_conversations"
    )
    title = models.CharField(_("title"), max_length=200, blank=True)
    system_prompt = models.TextField(_("system prompt"), blank=True, help_text=_("Empty: the site's own."))
    model = models.CharField(_("model"), max_length=100, blank=True, help_text=_("Empty: the site's default."))
    options = models.JSONField(_("options"), default=dict, blank=True)
    """Overrides of the site's max_tokens, thinking, effort, stop_sequences, send_user_id and prompt_caching."""
    leaf = models.ForeignKey("Message", models.SET_NULL, null=True, blank=True, related_name="+")
    revision = models.PositiveBigIntegerField(_("revision"), default=0, editable=False)
    """Grows by one with every change that viewers must hear of, in the change's own transaction."""
    created_at = models.DateTimeField(_("created"), db_default=Now(), editable=False)
    updated_at = models.DateTimeField(_("updated"), db_default=Now(), editable=False)
    archived_at = models.DateTimeField(_("archived"), null=True, blank=True)

    objects = ConversationQuerySet.as_manager()

    class Meta:
        verbose_name = _("conversation")
        verbose_name_plural = _("conversations")
        indexes = [models.Index(fields=["owner", "-updated_at", "-id"], name="conversation_by_owner")]

    def __str__(self) -> str:
        return f"conversation {self.pk}"


class Participant(models.Model):
    """What a user other than the owner may do in a conversation."""

    class Role(models.TextChoices):
        OWNER = "owner", _("owner")
        EDITOR = "editor", _("editor")
        VIEWER = "viewer", _("viewer")

    conversation = models.ForeignKey(Conversation, models.CASCADE, related_name="participants")
    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="conversation_roles")
    role = models.CharField(_("role"), max_length=10, choices=Role)
    created_at = models.DateTimeField(_("created"), db_default=Now(), editable=False)

    class Meta:
        verbose_name = _("participant")
        verbose_name_plural = _("participants")
        constraints = [
            models.UniqueConstraint(fields=["conversation", "user"], name="participant_once"),
            models.CheckConstraint(condition=Q(role__in=["owner", "editor", "viewer"]), name="participant_role_known"),
        ]

    def __str__(self) -> str:
        return f"participant {self.pk}"


class MessageQuerySet(models.QuerySet["Message"]):
    """Messages, and their way through the tree."""

    def path(self, leaf_id: uuid.UUID | None, *, limit: int | None = None) -> list[Message]:
        """The messages from the root to ``leaf_id``, oldest first; only the last ``limit`` of them if given.

        One query; its cost grows with what it returns, not with the conversation.
        """
        if leaf_id is None:
            return []
        connection = connections[self.db]
        table = connection.ops.quote_name(self.model._meta.db_table)
        steps = "" if limit is None else f"LIMIT {int(limit)}"
        # The recursion is walked from the leaf upwards, so LIMIT ends it early on both databases.
        statement = f"""
            WITH RECURSIVE path AS (
                SELECT {table}.*, 1 AS steps FROM {table} WHERE id = %s
                UNION ALL
                SELECT {table}.*, path.steps + 1 FROM {table} JOIN path ON {table}.id = path.parent_id
            )
            SELECT * FROM path {steps}
        """  # noqa: S608
        leaf = self.model._meta.pk.get_db_prep_value(leaf_id, connection)
        found = sorted(self.raw(statement, [leaf]), key=lambda message: -message.steps)
        return list(found)


class Message(models.Model):
    """One node of the tree. ``blocks`` are the truth; ``text`` is their words, for search and lists.

    On PostgreSQL the first migration adds a generated full-text column ``search`` over ``text``.
    """

    class Role(models.TextChoices):
        USER = "user", _("user")
        ASSISTANT = "assistant", _("assistant")

    id = models.UUIDField(primary_key=True, default=uuid7, editable=False)
    conversation = models.ForeignKey(Conversation, models.CASCADE, related_name="messages")
    parent = models.ForeignKey("self", models.CASCADE, null=True, blank=True, related_name="children")
    role = models.CharField(_("role"), max_length=10, choices=Role)
    author = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.SET_NULL, null=True, blank=True, related_name="chat_messages"
    )
    blocks: models.JSONField[Any, list[dict[str, Any]]] = models.JSONField(_("blocks"), default=list)
    text = models.TextField(_("text"), blank=True)
    client_id = models.CharField(_("client id"), max_length=64, null=True, blank=True)  # noqa: DJ001
    """Chosen by the sender, so that sending again changes nothing. Null, not empty: nulls are never equal."""
    created_at = models.DateTimeField(_("created"), db_default=Now(), editable=False)

    objects = MessageQuerySet.as_manager()

    if TYPE_CHECKING:
        steps: int

    class Meta:
        verbose_name = _("message")
        verbose_name_plural = _("messages")
        constraints = [
            models.UniqueConstraint(fields=["conversation", "client_id"], name="message_client_id_once"),
            models.CheckConstraint(condition=Q(role__in=["user", "assistant"]), name="message_role_known"),
            models.CheckConstraint(condition=~Q(parent=F("id")), name="message_not_its_own_parent"),
        ]

    def __str__(self) -> str:
        return f"message {self.pk}"
