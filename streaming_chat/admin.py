"""Conversations, turns and usage in the Django admin: found by id, user and state; read, not changed.

Lists hold no text, not even titles, and no look-up reaches any: who may see that a conversation exists need not read
it. Its words are on one page, the transcript, which asks for the permission to view messages, too.

The number of queries of a page does not depend on how many rows there are, and no query counts or sorts a table.
"""

from __future__ import annotations

import json
import operator
import uuid
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, cast

from django.contrib import admin
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db.models import F, Model, Q, QuerySet, prefetch_related_objects
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils import timezone
from django.utils.functional import cached_property
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext_lazy as _

from .blocks import Block, text_of
from .models import Conversation, Message, Turn, UsageRecord
from .protocol import MessageForm
from .snapshot import message_forms

if TYPE_CHECKING:
    from django.contrib.admin.options import _FieldGroups
    from django.urls import URLPattern

    _ModelAdmin: TypeAlias = admin.ModelAdmin[Any]
else:
    _ModelAdmin = admin.ModelAdmin

LISTED_ROWS: Final = 10_000
"""How far back a list goes; a filter or a search reaches what is older."""
LISTED_MODELS: Final = 1_000
"""Rows, the newest ones, whose models the filter offers."""
FOUND_USERS: Final = 100
"""Users that a search for people considers."""
TRANSCRIPT_MESSAGES: Final = 50


class CappedPaginator(Paginator):  # type: ignore[type-arg]
    """Pages of the first :data:`LISTED_ROWS`, so that neither the count nor the last page costs a walk of the table."""

    @cached_property
    def count(self) -> int:
        """The number of rows, at most :data:`LISTED_ROWS`."""
        rows = cast("QuerySet[Any]", self.object_list)
        return rows[:LISTED_ROWS].count()


# ------------------------------------------------------------------------------------------------ filters


class PeriodFilter(admin.SimpleListFilter):
    """Rows of the last so many days."""

    title = _("period")
    parameter_name = "days"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Iterable[tuple[str, Any]]:
        return [("1", _("the last day")), ("7", _("the last 7 days")), ("30", _("the last 30 days"))]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() not in ("1", "7", "30"):
            return queryset
        return queryset.filter(pk__gte=_first_id(timezone.now() - timedelta(days=int(self.value() or 1))))


class ModelFilter(admin.SimpleListFilter):
    """Rows of one model."""

    title = _("model")
    parameter_name = "model"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Iterable[tuple[str, Any]]:
        newest = model_admin.model.objects.order_by("-pk").values_list("model", flat=True)[:LISTED_MODELS]
        return [(name, name) for name in sorted(set(newest)) if name]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(model=self.value()) if self.value() else queryset


class _ChoiceFilter(admin.SimpleListFilter):
    options: Iterable[tuple[str, Any]]
    column: str

    def lookups(self, request: HttpRequest, model_admin: Any) -> Iterable[tuple[str, Any]]:
        return self.options

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.column: self.value()}) if self.value() else queryset


class StatusFilter(_ChoiceFilter):
    """Turns by their status."""

    title = _("status")
    parameter_name = column = "status"
    options = Turn.Status.choices


class StateFilter(StatusFilter):
    """Conversations by the status of their latest turn."""

    column = "leaf__turn__status"


class QualityFilter(_ChoiceFilter):
    """Usage records by how sure they are."""

    title = _("quality")
    parameter_name = column = "quality"
    options = UsageRecord.Quality.choices


def _first_id(at: datetime) -> uuid.UUID:
    """The smallest id of a row made at that time or later: ids begin with it, and the primary key is an index."""
    return uuid.UUID(int=int(at.timestamp() * 1000) << 80)


# ------------------------------------------------------------------------------------------------ lists


class ReadOnlyAdmin(_ModelAdmin):
    """A list that is newest first, and a page for each row, both to be read."""

    user_column: ClassVar[str]
    id_columns: ClassVar[tuple[str, ...]]
    """What a search for an id compares."""

    actions = None
    ordering = ("-pk",)
    sortable_by = ()
    paginator = CappedPaginator
    list_per_page = 50
    list_max_show_all = 0
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    search_fields = ("id",)  # turns the search on; `get_search_results` says what is searched
    search_help_text = _("An id, or a part of a user's name or email address.")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest | None = None) -> bool:
        """Allow the filters' own parameters only: Django's default lets ``?title__startswith=`` guess texts."""
        return lookup in {f.parameter_name for f in self.list_filter}  # type: ignore[union-attr]

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        term = search_term.strip()
        if not term:
            return queryset, False
        try:
            key = uuid.UUID(term)
        except ValueError:
            return queryset.filter(**{f"{self.user_column}__in": _users_like(term)}), False
        return queryset.filter(reduce(operator.or_, (Q(**{column: key}) for column in self.id_columns))), False

    def _link(self, model: type[Model], key: uuid.UUID | None, page: str = "change") -> SafeString | str:
        if key is None:
            return self.get_empty_value_display()
        name = f"{self.admin_site.name}:{model._meta.app_label}_{model._meta.model_name}_{page}"
        return format_html('<a href="{}">{}</a>', reverse(name, args=[key]), key)


def _users_like(term: str) -> list[Any]:
    user = get_user_model()
    columns = {user.USERNAME_FIELD, user.get_email_field_name()} & {field.name for field in user._meta.get_fields()}
    matches = reduce(operator.or_, (Q(**{f"{column}__icontains": term}) for column in columns))
    return list(user._default_manager.filter(matches).order_by("pk").values_list("pk", flat=True)[:FOUND_USERS])


@admin.register(Conversation)
class ConversationAdmin(ReadOnlyAdmin):
    """Conversations, and what was said in them for those who may read it."""

    user_column = "owner"
    id_columns = ("id", "turns__id", "leaf_id")
    list_display = ("id", "owner", "state", "model", "created_at", "updated_at", "is_archived")
    list_select_related = ("owner",)
    list_filter = (StateFilter, PeriodFilter)
    fields = ("id", "owner", "state", "model", "created_at", "updated_at", "archived_at", "turns")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Conversation]:
        rows: QuerySet[Conversation] = super().get_queryset(request).defer("title", "system_prompt", "options")
        return rows.annotate(latest_status=F("leaf__turn__status"))

    def get_fields(self, request: HttpRequest, obj: Conversation | None = None) -> _FieldGroups:
        return (*self.fields, "transcript") if _may_read(request) else self.fields

    def get_readonly_fields(self, request: HttpRequest, obj: Conversation | None = None) -> Any:
        return self.get_fields(request, obj)

    @admin.display(description=_("state"))
    def state(self, conversation: Any) -> str:
        """The status of the latest turn."""
        status = conversation.latest_status
        return str(Turn.Status(status).label) if status else self.get_empty_value_display()

    @admin.display(description=_("archived"), boolean=True)
    def is_archived(self, conversation: Conversation) -> bool:
        return conversation.archived_at is not None

    @admin.display(description=_("turns"))
    def turns(self, conversation: Conversation) -> SafeString:
        """A link to the conversation's turns."""
        address = reverse(f"{self.admin_site.name}:streaming_chat_turn_changelist")
        return format_html('<a href="{}?q={}">{}</a>', address, conversation.pk, _("All turns"))

    @admin.display(description=_("transcript"))
    def transcript(self, conversation: Conversation) -> SafeString:
        """A link to what was said."""
        address = reverse(f"{self.admin_site.name}:streaming_chat_conversation_transcript", args=[conversation.pk])
        return format_html('<a href="{}">{}</a>', address, _("Read"))

    # ---------------------------------------------------------------- deleting

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return admin.ModelAdmin.has_delete_permission(self, request, obj)

    def get_deleted_objects(
        self, objs: Any, request: HttpRequest
    ) -> tuple[list[Any], dict[str, int], set[str], list[Any]]:
        """Count what goes with a conversation, instead of listing every message of it."""
        keys = [conversation.pk for conversation in objs]
        counts = {
            str(model._meta.verbose_name_plural): model._default_manager.filter(conversation__in=keys).count()
            for model in (Message, Turn)
        }
        return [str(conversation) for conversation in objs], counts, set(), []

    def delete_model(self, request: HttpRequest, obj: Conversation) -> None:
        """Delete it with its messages. A running turn ends at its next commit, and viewers close in seconds."""
        # The order of locks is that of every other change.
        list(Conversation.objects.select_for_update(no_key=True).filter(pk=obj.pk).values_list("pk"))
        super().delete_model(request, obj)

    # ---------------------------------------------------------------- the transcript

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.transcript_view)
        name = "streaming_chat_conversation_transcript"
        return [path("<uuid:conversation_id>/transcript/", view, name=name), *super().get_urls()]

    def transcript_view(self, request: HttpRequest, conversation_id: uuid.UUID) -> HttpResponse:
        """What was said, on the current branch; ``?before=`` a message, the page that leads up to it.

        Raises:
            PermissionDenied: The user may not view conversations, or not messages.
            Http404: There is no such conversation, or no such message in it.
        """
        if not _may_read(request):
            raise PermissionDenied
        conversation = get_object_or_404(Conversation.objects.select_related("owner"), pk=conversation_id)
        leaf_id = conversation.leaf_id
        if "before" in request.GET:
            leaf_id = _parent_of(conversation, request.GET["before"])
        found = Message.objects.path(leaf_id, limit=TRANSCRIPT_MESSAGES + 1)
        shown = found[-TRANSCRIPT_MESSAGES:]
        prefetch_related_objects(shown, "author")
        context = {
            **self.admin_site.each_context(request),
            "title": _("Transcript"),
            "opts": self.opts,
            "conversation": conversation,
            "entries": [_entry(m, form) for m, form in zip(shown, message_forms(shown), strict=True)],
            "before": shown[0].pk if len(found) > len(shown) else None,
            "is_latest": "before" not in request.GET,
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/streaming_chat/conversation/transcript.html", context)


def _may_read(request: HttpRequest) -> bool:
    return request.user.has_perms(["streaming_chat.view_conversation", "streaming_chat.view_message"])


def _parent_of(conversation: Conversation, message_id: str) -> uuid.UUID | None:
    try:
        found = conversation.messages.filter(pk=uuid.UUID(message_id)).values_list("parent_id", flat=True)
    except ValueError:
        raise Http404 from None
    if not found:
        raise Http404
    return found[0]


def _entry(message: Message, form: MessageForm) -> dict[str, Any]:
    """One message as the template shows it."""
    turn = form["turn"]
    return {
        "message": message,
        "author": form["author"],
        "parts": _parts(form["blocks"]),
        "turn": turn,
        "status": None if turn is None else Turn.Status(turn["status"]).label,
    }


def _parts(blocks: list[Block]) -> list[dict[str, str]]:
    """The blocks, neighbouring texts as one; what is no text as indented JSON."""
    parts: list[dict[str, str]] = []
    for block in blocks:
        if block.get("type") != "text":
            document = json.dumps(block, ensure_ascii=False, indent=2)
            parts.append({"kind": str(block.get("type")), "json": document})
            continue
        if not parts or "text" not in parts[-1]:
            parts.append({"text": ""})
        parts[-1]["text"] += text_of([block])
    return parts


# ------------------------------------------------------------------------------------------------ turns and usage


@admin.register(Turn)
class TurnAdmin(ReadOnlyAdmin):
    """Turns: how each went, and how long it took."""

    user_column = "requested_by"
    id_columns = ("id", "conversation_id", "prompt_id", "reply_id")
    list_display = (
        *("id", "conversation_link", "requested_by", "status", "error_code", "stop_reason", "model"),
        *("queued_at", "first_text_seconds", "seconds"),
    )
    list_select_related = ("requested_by",)
    list_filter = (StatusFilter, PeriodFilter, ModelFilter)
    fields = readonly_fields = (
        *("id", "conversation_link", "prompt_id", "reply_id", "requested_by"),
        *("status", "error_code", "stop_reason", "stop_requested_at", "attempt", "end_seq"),
        *("provider", "model", "timeout_seconds"),
        *("queued_at", "started_at", "first_text_at", "finished_at", "first_text_seconds", "seconds", "usage"),
    )

    @admin.display(description=_("conversation"))
    def conversation_link(self, turn: Turn) -> SafeString | str:
        return self._link(Conversation, turn.conversation_id)

    @admin.display(description=_("time to first text (s)"))
    def first_text_seconds(self, turn: Turn) -> float | None:
        return _seconds(turn.queued_at, turn.first_text_at)

    @admin.display(description=_("duration (s)"))
    def seconds(self, turn: Turn) -> float | None:
        return _seconds(turn.queued_at, turn.finished_at)

    @admin.display(description=_("usage"))
    def usage(self, turn: Turn) -> SafeString:
        """A link to the turn's provider requests."""
        address = reverse(f"{self.admin_site.name}:streaming_chat_usagerecord_changelist")
        return format_html('<a href="{}?q={}">{}</a>', address, turn.pk, _("All requests"))


@admin.register(UsageRecord)
class UsageRecordAdmin(ReadOnlyAdmin):
    """What each provider request cost. Outlives conversations and users."""

    user_column = "user"
    id_columns = ("id", "conversation_id", "turn_id")
    list_display = (
        *("id", "turn_link", "user", "model", "quality", "error_code", "input_tokens", "output_tokens"),
        *("cache_read_input_tokens", "requested_at", "duration_ms"),
    )
    list_select_related = ("user",)
    list_filter = (QualityFilter, PeriodFilter, ModelFilter)
    fields = readonly_fields = (
        *("id", "turn_link", "conversation_link", "user", "provider", "model", "request_id", "quality", "error_code"),
        *("input_tokens", "output_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"),
        *("thinking_tokens", "cost_micro_usd", "raw"),
        *("requested_at", "finished_at", "first_text_ms", "duration_ms"),
    )

    @admin.display(description=_("turn"))
    def turn_link(self, record: UsageRecord) -> SafeString | str:
        return self._link(Turn, record.turn_id)

    @admin.display(description=_("conversation"))
    def conversation_link(self, record: UsageRecord) -> SafeString | str:
        return self._link(Conversation, record.conversation_id)


def _seconds(start: datetime, end: datetime | None) -> float | None:
    return None if end is None else round((end - start).total_seconds(), 1)
