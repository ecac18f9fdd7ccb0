"""Sample accounts and conversations for ``make demo``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.utils import timezone

from chatproject.samples import ACCOUNTS, CONVERSATIONS
from streaming_chat.blocks import text_block, text_of
from streaming_chat.conf import get_settings
from streaming_chat.models import Conversation, Message, Turn, UsageRecord

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from django.contrib.auth.models import User


class Command(BaseCommand):
    """Creates what is missing; what is there stays as it is."""

    help = "Create the sample accounts and conversations, and print how to log in. Needs DEBUG."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--url", default="http://127.0.0.1:8000/", help="where the site is, to print it")

    def handle(self, *args: Any, url: str, **options: Any) -> None:
        if not settings.DEBUG:
            raise CommandError("The sample accounts have known passwords: this needs DEBUG=1.")
        for account in ACCOUNTS:
            with transaction.atomic():
                _seed(account.name, account.password, staff=account.staff)
        self.stdout.write(f"\n  {'account':<10} {'password':<16} is\n  {'-' * 7:<10} {'-' * 8:<16} {'-' * 2}")
        for account in ACCOUNTS:
            self.stdout.write(f"  {account.name:<10} {account.password:<16} {account.role}")
        self.stdout.write(f"\n  Answers come from {_provider()}.")
        self.stdout.write(self.style.SUCCESS(f"  Open {url}  (Ctrl-C ends it, the data stays)\n"))


def _seed(name: str, password: str, *, staff: bool) -> None:
    users = get_user_model()
    if users.objects.filter(username=name).exists():
        return
    user = users.objects.create_user(name, password=password, is_staff=staff)
    if staff:
        may_view = Permission.objects.filter(content_type__app_label="streaming_chat", codename__startswith="view_")
        user.user_permissions.set(may_view)
    for title, exchanges in CONVERSATIONS.get(name, {}).items():
        _converse(user, title, exchanges)


def _converse(user: User, title: str, exchanges: list[tuple[str, str]]) -> None:
    conversation = Conversation.objects.create(owner=user, title=title)
    leaf: Message | None = None
    for prompt, reply in exchanges:
        asked = _say(conversation, leaf, Message.Role.USER, prompt, author=user)
        leaf = _say(conversation, asked, Message.Role.ASSISTANT, reply)
        now = timezone.now()
        turn = Turn.objects.create(
            conversation=conversation,
            prompt=asked,
            reply=leaf,
            requested_by=user,
            status=Turn.Status.COMPLETED,
            attempt=1,
            stop_reason="end_turn",
            provider="demo",
            model="demo",
            end_seq=0,
            started_at=now,
            first_text_at=now,
            finished_at=now,
        )
        UsageRecord.objects.create(
            turn=turn,
            conversation=conversation,
            user=user,
            provider="demo",
            model="demo",
            quality=UsageRecord.Quality.EXACT,
            input_tokens=len(prompt) // 4,
            output_tokens=len(reply) // 4,
            finished_at=now,
        )
    conversation.leaf = leaf
    conversation.save(update_fields=["leaf"])


def _say(
    conversation: Conversation, parent: Message | None, role: str, text: str, author: User | None = None
) -> Message:
    blocks = [text_block(text)]
    return Message.objects.create(
        conversation=conversation,
        parent=parent,
        role=role,
        author=author,
        blocks=blocks,
        text=text_of(blocks),
    )


def _provider() -> str:
    chat = get_settings()
    provider = chat.resolved_provider()
    if provider == "anthropic":
        address = chat.resolved_base_url()
        return f"Claude ({chat.model})" + (f" at {address}" if address else "")
    if provider == "demo":
        return "the demo provider: canned words, no model. Set ANTHROPIC_API_KEY to talk to Claude"
    return provider
