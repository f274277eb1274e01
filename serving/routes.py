"""The routes of serve.py: HTTP in, requests to the engine's thread, answers out.

    app = make_app(served, service, Door(key, body=16 << 20))        # for uvicorn

Each route reads its body with a measure, asks, and answers in the shape of its API, errors too. A
client that goes away frees the rows of its request at once.
"""

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serving.answers import CHAT, COMPLETION, Answer
from serving.asked import Asked, Served, read_chat, read_completion
from serving.fields import Fields, Refused, read_body
from serving.lightllm import generated, pieces, read_generate
from serving.metrics import CONTENT_TYPE, Metrics
from serving.service import Job, Service
from serving.work import Failed

RETRY_AFTER = {"Retry-After": "1"}  # seconds
GONE = (None, None)  # stands for an event when the client has left
Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Door:
    """What a request goes through first. key: that clients must show, None: no key; body: bytes of
    one at most; scores_prompts: whether /generate tells of the prompt's tokens."""

    key: str | None
    body: int
    scores_prompts: bool = False

    def check_key(self, request: Request) -> None:
        if self.key is None:
            return
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(shown.encode(), self.key.encode()):
            raise Refused("the key is missing or wrong", code="invalid_api_key", status=401)

    async def body_of(self, request: Request) -> Fields:
        """The fields of a request's object."""
        parts, size = [], 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self.body:
                raise Refused(f"the body has more than {self.body:,} bytes", status=413)
        return Fields(await run_in_threadpool(read_body, b"".join(parts)))


def answer_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """ASCII: a text may hold half of a surrogate pair, which UTF-8 has not."""
    content = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Response(content, status, headers, media_type="application/json")


# ---------------------------------------------------------------------------------------------
# Events of a request


async def _leaves(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def events_of(
    service: Service, asked: Asked, request: Request
) -> AsyncGenerator[tuple[Job, Any], None]:
    """All events of a request as they come. Refused where it fails; ClientDisconnect where nobody
    waits any more. What is left when this is closed is cancelled."""
    come: asyncio.Queue = asyncio.Queue()
    jobs = service.submit(asked, come.put_nowait)
    watch = asyncio.create_task(_leaves(request))
    watch.add_done_callback(lambda _: come.put_nowait(GONE))
    try:
        while any(job.awaited for job in jobs) or not come.empty():
            job, event = await come.get()
            if job is None:
                raise ClientDisconnect
            if isinstance(event, Failed):
                raise Refused(event.reason, status=event.status)
            yield job, event
    finally:
        watch.cancel()
        service.cancel(jobs)


# ---------------------------------------------------------------------------------------------
# The API


class Routes:
    """The handlers, over one model."""

    def __init__(self, served: Served, service: Service, door: Door):
        self.served, self.service, self.door = served, service, door
        self.metrics = Metrics()

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, read_completion, COMPLETION)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, read_chat, CHAT)

    async def _generate(self, request: Request, read: Callable, kind: str) -> Response:
        fields = await self.door.body_of(request)
        asked = await run_in_threadpool(read, self.served, fields)
        answer = Answer(self.served, asked, kind)
        events = events_of(self.service, asked, request)
        if asked.stream:
            first = await anext(events)  # a request that cannot be had has a status of its own
            return StreamingResponse(_stream(answer, first, events), media_type="text/event-stream")
        async for job, event in events:
            answer.take(job.index, event)
        return await run_in_threadpool(lambda: answer_json(answer.whole()))

    async def generate(self, request: Request) -> Response:
        """lightllm's, its errors too: 417 for what is wrong with a request."""
        try:
            answer, details = await self._read_generate(request)
            async for job, event in events_of(self.service, answer.asked, request):
                answer.take(job.index, event)
        except Refused as refused:
            return _refused_generate(refused)
        return await run_in_threadpool(lambda: answer_json(generated(answer, details)))

    async def generate_stream(self, request: Request) -> Response:
        """The same piece by piece, as lightllm writes it: no space, nothing after the last."""
        try:
            answer, _ = await self._read_generate(request)
            if answer.asked.n > 1:
                raise Refused("parameters.best_of must be 1 in a stream", "parameters.best_of")
            told = pieces(answer, events_of(self.service, answer.asked, request))
            first = await anext(told)
        except Refused as refused:
            return _refused_generate(refused)
        return StreamingResponse(_pieces(first, told), media_type="text/event-stream")

    async def _read_generate(self, request: Request) -> tuple[Answer, bool]:
        fields = await self.door.body_of(request)
        asked, details = await run_in_threadpool(
            read_generate, self.served, fields, self.door.scores_prompts
        )
        return Answer(self.served, asked, COMPLETION), details

    async def models(self, request: Request) -> Response:
        served = self.served
        model = {"id": served.name, "object": "model", "created": served.created}
        model |= {"owned_by": "roseval", "root": served.name, "max_model_len": served.context}
        model |= {"vocab_size": served.texts.vocab_size, "dtype": served.dtype}
        return answer_json({"object": "list", "data": [model]})

    async def tokenize(self, request: Request) -> Response:
        fields = await self.door.body_of(request)
        self.served.check_model(fields)
        text, special = fields.any("prompt"), fields.flag("add_special_tokens", True)
        strings = fields.flag("return_token_strs")
        fields.refuse_rest({})
        if not isinstance(text, str):
            raise Refused("prompt must be a text", "prompt")
        ids = await run_in_threadpool(self.served.texts.encode, text, special)
        found = {"count": len(ids), "max_model_len": self.served.context, "tokens": ids}
        if strings:
            found["token_strs"] = [self.served.texts.piece(i) for i in ids]
        return answer_json(found)

    async def detokenize(self, request: Request) -> Response:
        fields = await self.door.body_of(request)
        self.served.check_model(fields)
        ids = fields.any("tokens")
        fields.refuse_rest({})
        if not isinstance(ids, list):
            raise Refused("tokens must be a list of token ids", "tokens")
        text = self.served.texts.decode(self.served.texts.checked(ids))
        return answer_json({"prompt": text, "text": text})

    async def tokenizer_info(self, request: Request) -> Response:
        tokenizer = self.served.texts.tokenizer
        specials = dict.fromkeys(("eos_token", "bos_token", "pad_token"))
        found = specials | {k: tokenizer.special_tokens.get(k) for k in specials}
        found |= {"tokenizer_class": type(tokenizer).__name__, "add_bos": self.served.texts.bos}
        return answer_json(found | {"chat_template": self.served.template})

    async def health(self, request: Request) -> Response:
        ended = self.service.error is not None
        return answer_json({"status": "ended" if ended else "ok"}, 503 if ended else 200)

    async def tell_metrics(self, request: Request) -> Response:
        service = self.service
        gauges = {"sequences_unfinished": service.unfinished, "rows": service.work.capacity.rows}
        text = self.metrics.text(gauges, service.counts)
        return Response(text, media_type=CONTENT_TYPE)


async def _stream(answer: Answer, first: tuple, events: AsyncGenerator) -> AsyncIterator[str]:
    """Server-sent events, the last one [DONE]. What fails on the way is an event too."""
    try:
        with contextlib.suppress(ClientDisconnect):
            for chunk in answer.chunks(first[0].index, first[1]):
                yield _event(chunk)
            async for job, event in events:
                for chunk in answer.chunks(job.index, event):
                    yield _event(chunk)
            if answer.asked.tells_usage:
                yield _event(answer.last_chunk())
    except Refused as refused:
        yield _event(refused.body())
    finally:
        await events.aclose()
    yield "data: [DONE]\n\n"


async def _pieces(first: dict, told: AsyncGenerator) -> AsyncIterator[str]:
    """lightllm's events. What fails on the way is one too."""
    try:
        with contextlib.suppress(ClientDisconnect):
            yield _event(first, "data:")
            async for piece in told:
                yield _event(piece, "data:")
    except Refused as refused:
        yield _event({"error": refused.message}, "data:")
    finally:
        await told.aclose()


def _refused_generate(refused: Refused) -> Response:
    """As lightllm says it."""
    status = 417 if refused.status == 400 else refused.status
    headers = RETRY_AFTER if status in (429, 503) else None
    return answer_json({"message": refused.message}, status, headers)


def _event(value: Any, before: str = "data: ") -> str:
    return f"{before}{json.dumps(value, allow_nan=False, separators=(',', ':'))}\n\n"


# ---------------------------------------------------------------------------------------------
# The application


def make_app(served: Served, service: Service, door: Door) -> Starlette:
    routes = Routes(served, service, door)

    def guarded(path: str, handler: Handler) -> Handler:
        async def handle(request: Request) -> Response:
            status = 500
            try:
                door.check_key(request)
                response = await handler(request)
                status = response.status_code
                return response
            except Refused as refused:
                status = refused.status
                raise
            except ClientDisconnect:
                status = 499
                return Response(status_code=status)  # nobody reads it
            finally:
                routes.metrics.count(path, status)

        return handle

    open_to_all = [Route("/health", routes.health)]
    asked = [
        ("POST", "/v1/completions", routes.completions),
        ("POST", "/v1/chat/completions", routes.chat_completions),
        ("GET", "/v1/models", routes.models),
        ("POST", "/tokenize", routes.tokenize),
        ("POST", "/detokenize", routes.detokenize),
        ("GET", "/tokenizer_info", routes.tokenizer_info),
        ("POST", "/generate", routes.generate),
        ("POST", "/generate_stream", routes.generate_stream),
        ("GET", "/metrics", routes.tell_metrics),
    ]
    kept = [Route(path, guarded(path, handler), methods=[verb]) for verb, path, handler in asked]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.start(asyncio.get_running_loop())
        yield
        await run_in_threadpool(service.stop)

    handlers: dict = {Refused: _refused, HTTPException: _not_found, Exception: _broken}
    return Starlette(routes=open_to_all + kept, lifespan=lifespan, exception_handlers=handlers)


async def _refused(request: Request, error: Any) -> Response:
    headers = RETRY_AFTER if error.status in (429, 503) else None
    return answer_json(error.body(), error.status, headers)


async def _not_found(request: Request, error: Any) -> Response:
    path = f"{request.method} {request.url.path!r:.100}: {error.detail}"
    return answer_json(Refused(path, status=error.status_code).body(), error.status_code)


async def _broken(request: Request, error: Exception) -> Response:
    """With its traceback on standard error, which the server prints."""
    refused = Refused(f"the server failed ({type(error).__name__})", status=500)
    return answer_json(refused.body(), 500)
