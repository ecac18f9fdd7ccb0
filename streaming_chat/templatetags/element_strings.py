"""What the element says. The page hands it the translations; the TypeScript table is written from this one."""

from __future__ import annotations

from typing import Final

from ..exceptions import STOP_REASONS


def _(sentence: str) -> str:
    """Mark ``sentence`` for translation; the template tag translates it."""
    return sentence


STRINGS: Final[dict[str, str]] = {
    # the conversation
    "conversation": _("Conversation"),
    "you": _("You"),
    "assistant": _("Assistant"),
    "greeting": _("What would you like to know?"),
    "earlier": _("Show earlier messages"),
    "latest": _("Jump to the latest"),
    "image": _("Image: {name}"),
    "code": _("Code"),
    "table": _("Table"),
    "thinking": _("Thinking"),
    "tool": _("Tool"),
    "tool_running": _("{name}: running"),
    "tool_done": _("{name}: done"),
    # the composer
    "placeholder": _("Write a message"),
    "send": _("Send"),
    "stop": _("Stop"),
    "stopping": _("Stopping…"),
    "hint": _("Enter to send, Shift+Enter for a new line"),
    "remaining": _("{count} characters left"),
    "too_long": _("{count} characters too many"),
    "read_only": _("You may read this conversation, but not write in it."),
    # a message on its way
    "sending": _("Sending…"),
    "queued": _("Will be sent when you are back online"),
    "unconfirmed": _("Not confirmed yet."),
    "not_sent": _("Not sent."),
    "resend": _("Send again"),
    "edit": _("Edit"),
    "discard": _("Discard"),
    # a reply in progress
    "in_queue": _("Waiting for a free place"),
    "waiting": _("Waiting for the assistant"),
    "still_waiting": _("Still working on it"),
    "using_tool": _("Using a tool"),
    "writing": _("Writing"),
    "seconds": _("{count} s"),
    # the end of a reply
    "stopped": _("This reply was stopped."),
    "interrupted": _("The reply was interrupted. What you see is saved."),
    "timed_out": _("The reply took too long and was ended. What you see is saved."),
    "failed": _("Something went wrong. What you see is saved."),
    "max_tokens": STOP_REASONS["max_tokens"],
    "context_full": STOP_REASONS["model_context_window_exceeded"],
    "pause_turn": STOP_REASONS["pause_turn"],
    "refusal": STOP_REASONS["refusal"],
    "empty": _("The assistant had nothing to say."),
    "retry": _("Try again"),
    "copy": _("Copy"),
    "copied": _("Copied"),
    "tokens": _("{count} tokens"),
    "about_tokens": _("about {count} tokens"),
    # the connection
    "reconnecting": _("Reconnecting. Your text is safe."),
    "too_many": _("Too many windows are open. Close some; this one tries again by itself."),
    "reconnect": _("Reconnect now"),
    "back": _("Back online"),
    "offline": _("You are offline. Messages are sent when you are back."),
    "signed_out": _("Please sign in again. Your draft is kept."),
    "sign_in": _("Sign in"),
    "deleted": _("This conversation is gone."),
    "not_created": _("The conversation could not be started. Your text is kept."),
    "dismiss": _("Dismiss"),
    "demo": _("Demo: answers are canned. Set ANTHROPIC_API_KEY to talk to Claude."),
    # spoken to screen readers only
    "say_replying": _("The assistant is replying."),
    "say_still": _("Still replying."),
    "say_done": _("Reply complete."),
    "say_copied": _("Copied to the clipboard."),
}
