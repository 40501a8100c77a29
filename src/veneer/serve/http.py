"""Many adapters on one base behind HTTP, in the form of OpenAI's interface: `model` names the adapter."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from .. import __version__
from ..errors import ConfigError, VeneerError
from .batching import Batcher, Request
from .opened import Opened

BASE = "base"


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(BASE, description="an adapter's name, or 'base'")
    max_tokens: int = Field(128, ge=1)
    temperature: float = Field(0.0, ge=0, le=10)
    stream: Literal[False] = False
    user: str | None = None


class Message(BaseModel):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class ChatAsked(_Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


class TextAsked(_Asked):
    """POST /v1/completions."""

    prompt: str | list[str]


def create_app(opened: Opened, most: int = 16, wait: float = 0.01) -> FastAPI:
    """The application: /v1/models, /v1/chat/completions, /v1/completions and /health.

    Requests that come within `wait` seconds share a batch of at most `most` rows, whatever their adapters. A mistake of the
    asker is status 400 with what, where and the nearest fix. Raises: CapabilityError (see `Batcher`).
    """
    batcher = Batcher(opened, most, wait)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="Veneer", version=__version__, lifespan=life)
    app.state.batcher = batcher
    tools = opened.tokenizer

    @app.exception_handler(VeneerError)
    async def refuse(request: Any, e: Exception) -> JSONResponse:
        return JSONResponse({"error": {"message": str(e), "type": type(e).__name__}}, status_code=400)

    @app.exception_handler(RequestValidationError)
    async def mistaken(request: Any, e: Exception) -> JSONResponse:
        found = [f"{'.'.join(str(p) for p in one['loc'][1:])}: {one['msg'].lower()}" for one in e.errors()]  # type: ignore[attr-defined]
        return JSONResponse({"error": {"message": "; ".join(found), "type": "RequestError"}}, status_code=422)

    async def answer(kind: str, asked: _Asked, prompts: list[list[int]], form: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        adapter = None if asked.model == BASE else asked.model
        waiting = [batcher.ask(Request(tuple(ids), adapter, asked.max_tokens, asked.temperature)) for ids in prompts]
        found = await asyncio.gather(*map(asyncio.wrap_future, waiting))
        choices = [
            {"index": i, **form(tools.decode(ids, skip_special_tokens=True)), "finish_reason": "length" if len(ids) == asked.max_tokens else "stop"}
            for i, ids in enumerate(found)
        ]
        given, made = (sum(map(len, ids)) for ids in (prompts, found))
        usage = {"prompt_tokens": given, "completion_tokens": made, "total_tokens": given + made}
        return {"id": f"veneer-{uuid.uuid4().hex[:12]}", "object": kind, "created": int(time.time()), "model": asked.model, "choices": choices, "usage": usage}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"base": opened.base, "adapters": opened.names}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": n, "object": "model", "owned_by": "veneer"} for n in (BASE, *opened.names)]}

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked) -> dict[str, Any]:
        if not getattr(tools, "chat_template", None):
            raise ConfigError("the tokenizer has no chat template", fix="Use /v1/completions")
        messages = [m.model_dump() for m in asked.messages]
        ids = tools.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return await answer("chat.completion", asked, [ids], lambda text: {"message": {"role": "assistant", "content": text}})

    @app.post("/v1/completions")
    async def complete(asked: TextAsked) -> dict[str, Any]:
        prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
        return await answer("text_completion", asked, [tools(p)["input_ids"] for p in prompts], lambda text: {"text": text})

    return app
