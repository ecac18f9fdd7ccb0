"""A streaming LLM chat for any Django site. Whatever a viewer was shown is stored, whatever happens next.

A prompt goes down, its answer comes back up::

    consumers, sse, api, views      a command comes in
    turns                           the use case: rights, one transaction, then tell the others
    generation.runner               claims the queued turn and owns its task
    generation.engine               asks the provider, merges what comes, watches the deadlines
    journal                         commits the new entries of all running turns, then publishes them
    hub                             gives every viewer each entry once and in order, from the group or the database
    consumers, sse                  send it on

The journal in the database is the truth; the channel layer only makes it fast.
"""

from __future__ import annotations

__version__ = "0.1.0"
