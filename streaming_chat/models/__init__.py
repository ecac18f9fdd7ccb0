"""The tables. Only :mod:`streaming_chat.turns` and the journal write to them."""

from __future__ import annotations

from .conversation import Conversation, Message, Participant
from .turn import JournalEntry, Turn
from .usage import UsageRecord

__all__ = ["Conversation", "JournalEntry", "Message", "Participant", "Turn", "UsageRecord"]
