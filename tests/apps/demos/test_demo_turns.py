"""Who may wait in the line of the demos' server, and what those are told who may not."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio", reason="pip install 'attnsuite[demo]'")

from apps.demos.server import Serving


def join(client: httpx.Client, session: str | None = None, kind: str = "", address: str | None = None) -> Any:
    body = {"data": [kind], **({} if session is None else {"session_hash": session})}
    headers = {"x-forwarded-for": address} if address else {}
    return client.post("/gradio_api/call/work", json=body, headers=headers)


def end(client: httpx.Client, event: Any) -> str:
    return client.get(f"/gradio_api/call/work/{event.json()['event_id']}").text


def test_a_client_has_few_turns_and_an_address_some_more(serve: Any, slow: threading.Event):
    address = serve(serving=Serving(per_client=2, per_address=5))
    with httpx.Client(base_url=address, timeout=60) as client:
        mine = [join(client, "mine") for _ in range(3)]
        assert [one.status_code for one in mine] == [200, 200, 429]
        assert "2 requests of yours are waiting or running" in mine[2].json()["detail"]
        assert [join(client, "other").status_code for _ in range(2)] == [200, 200]
        unnamed = [join(client) for _ in range(2)]
        invented = join(client, uuid.uuid4().hex)
        assert [one.status_code for one in (*unnamed, invented)] == [200, 429, 429]
        assert "from your address" in invented.json()["detail"]
        # as a proxy on this machine would say of whom it asks for
        far = [join(client, address="192.0.2.7") for _ in range(3)]
        assert [one.status_code for one in far] == [200, 200, 429]
        slow.set()
        assert "done" in end(client, unnamed[0])
        assert "done" in end(client, far[0])
        assert "done" in end(client, join(client, "mine"))


def test_a_full_line_refuses_in_words_and_empties(serve: Any, slow: threading.Event):
    address = serve(serving=Serving(queue=3, per_client=9, per_address=99), workers=1)
    with httpx.Client(base_url=address, timeout=60) as client:
        taken = [join(client, f"s{number}") for number in range(12)]
        codes = [one.status_code for one in taken]
        assert codes.count(200) in (3, 4) and set(codes) == {200, 503}  # one may be running already
        assert "many visitors are waiting" in next(one for one in taken if one.status_code == 503).json()["detail"]
        slow.set()
        for one in taken[:3]:
            assert "done" in end(client, one)
        assert "done" in end(client, join(client))


def test_who_leaves_gives_back_the_turn(serve: Any, slow: threading.Event):
    address = serve(serving=Serving(per_client=1, per_address=2), workers=1)
    with httpx.Client(base_url=address, timeout=60) as client:
        running, waiting = join(client, "one").json()["event_id"], join(client, "two").json()["event_id"]
        assert join(client, "two").status_code == 429
        cancel = {"session_hash": "two", "fn_index": 0, "event_id": waiting}
        assert client.post("/gradio_api/cancel", json=cancel).status_code == 200
        assert join(client, "two").status_code == 200
        slow.set()
        assert "done" in client.get(f"/gradio_api/call/work/{running}").text


@pytest.mark.parametrize("kind", ["memory", "cuda"])
def test_out_of_memory_is_said_and_the_next_is_served(serve: Any, slow: threading.Event, kind: str):
    slow.set()
    with httpx.Client(base_url=serve(), timeout=60) as client:
        assert "not enough memory on this server" in end(client, join(client, kind=kind))
        assert "done" in end(client, join(client))


def test_a_defect_tells_nothing_of_the_inside(serve: Any, slow: threading.Event, capfd: pytest.CaptureFixture[str]):
    slow.set()
    with httpx.Client(base_url=serve(), timeout=60) as client:
        answer = end(client, join(client, kind="defect"))
        assert "defect of the demo" in answer and "inside" not in answer
        assert "ZeroDivisionError: <b>inside</b>" in capfd.readouterr().err
        assert "done" in end(client, join(client))
