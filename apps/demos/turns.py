"""Who may wait in the line: so many in all, so many of one visitor, so many from one address."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from .host import HEAVY

__all__ = ["bound"]

_FULL = "many visitors are waiting here: try again in a minute"


def bound(queue: Any, per_client: int, per_address: int) -> None:
    """Makes a queue of Gradio's refuse, in words, whoever has enough waiting or running already.

    A client is a session: one tab of a browser, or one `gradio_client.Client`; calls that name no session are one
    client per address. As a session is a name that clients choose, an address has a limit of its own: it keeps one
    machine from filling the line under many names, and is as much as visitors behind one router have together. User
    names are not looked at: with `--auth`, all visitors have the same. Events that run no model are over in a moment
    and do not count.

    Args:
        queue: Of the blocks, not yet started.
        per_client: How many requests of one client.
        per_address: How many requests from one address.
    """
    push = queue.push

    async def pushed(body: Any, request: Any, username: str | None) -> Any:
        events = _heavy(queue, body, request)
        mine = [event for event in events if _session(event) == body.session_hash]
        if len(mine) >= per_client:
            raise HTTPException(429, f"{len(mine)} requests of yours are waiting or running: let one of them end first")
        if len(events) >= per_address:
            raise HTTPException(429, f"{len(events)} requests from your address are waiting or running: try again soon")
        _forget(queue)
        taken, answer, state = await push(body=body, request=request, username=username)
        return taken, _FULL if state == "queue_full" else answer, state

    queue.push = pushed


def _heavy(queue: Any, body: Any, request: Any) -> list[Any]:
    """What the address of a request has waiting or running, if the request is for a model."""
    wanted = queue.blocks.fns.get(body.fn_index)
    if wanted is None or wanted.concurrency_id != HEAVY:
        return []
    return [
        event
        for event in queue.event_ids_to_events.values()
        if event.concurrency_id == HEAVY and _address(event.request) == _address(request)
    ]


def _address(request: Any) -> str | None:
    return request.client.host if request.client else None


def _session(event: Any) -> str | None:
    # Gradio names the session of an event that came with none after the event
    return None if event.session_hash == event._id else event.session_hash


def _forget(queue: Any) -> None:
    """Drops the empty sets that Gradio keeps of every session that ever asked for something."""
    if len(queue.pending_event_ids_session) > 1000:
        for session, events in [*queue.pending_event_ids_session.items()]:
            if not events and session not in queue.pending_messages_per_session:
                del queue.pending_event_ids_session[session]
