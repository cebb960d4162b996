"""The demos as tools of agents, by a client of the protocol."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

mcp = pytest.importorskip("mcp", reason="pip install 'gradio[mcp]'")

from mcp.client.streamable_http import streamablehttp_client  # noqa: E402

from apps.demos.server import Serving  # noqa: E402


async def called(address: str, calls: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tools that there are, and what some of them answer."""
    async with streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _):
        async with mcp.ClientSession(read, write) as session:
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            return tools, {name: await session.call_tool(name, given) for name, given in calls.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_agents_call_pages_as_tools(serve: Any):
    address = serve("see", serving=Serving(mcp=True))
    given = {"sample": "cat", "model": "tf_efficientnet_lite0"}
    tools, answers = asyncio.run(called(address, {"see": given, "attend": {"model": "shapes_biformer"}}))
    assert {*tools} == {"see", "attend"} and "vision models" in tools["see"].description
    assert not tools["see"].inputSchema.get("required")
    assert not answers["see"].isError, answers["see"].content
    texts = [part.text for part in answers["see"].content if part.type == "text"]
    assert any(re.search(r"'label_1': '(tiger|Egyptian|tabby)[^']*cat'", text) for text in texts), texts
    assert answers["attend"].isError and "no picture yet" in answers["attend"].content[0].text.lower()
