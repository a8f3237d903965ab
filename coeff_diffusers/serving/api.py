"""The two deployments: `Api` speaks HTTP and needs no model; behind it, each replica of `Images` holds a pipeline."""

import asyncio
import base64
import hmac
import io
import json
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import ray
import torch
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL.PngImagePlugin import PngInfo
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ReplicaState
from starlette.exceptions import HTTPException as NoSuchPath
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..console import hush
from .door import Door, Place
from .folder import SubjectFolder
from .pipeline import DeviceError, SubjectPipeline
from .ports import stay_on_this_machine
from .requests import Answer, Image, ImageRequest, ImageResponse, Problem, Refusal, Subject, Subjects
from .settings import ServeSettings, token_of

TRIES = 3  # of a request whose replica dies
MAX_JSON = 1 << 20  # bytes of a request's body, a file's apart
MESSAGE = 4000  # characters of one that a client may have made long
Batched = tuple[ImageRequest, Place]
logger = logging.getLogger("ray.serve")


def images_of(items: list[Batched]) -> int:
    return sum(place.images for _, place in items)


@serve.deployment(name="Images")
class Images:
    """A pipeline."""

    def __init__(self, settings: ServeSettings) -> None:
        stay_on_this_machine()
        hush()
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self.settings = settings
        self.pipeline = SubjectPipeline(settings)
        self.door = Door(settings.max_batch_size)
        self.thread = ThreadPoolExecutor(1)  # of its own, for those that load subjects may all be waiting for the Hub
        batch: Any = self.batch
        batch.set_max_batch_size(settings.max_batch_size)
        batch.set_batch_wait_timeout_s(settings.batch_wait_timeout_s)
        self.broken: BaseException | None = None

    async def make(self, request: ImageRequest) -> Answer | Refusal:
        """The images of a request, made in a batch with others'."""
        try:
            request = await asyncio.to_thread(self.pipeline.check, request)
        except Refusal as refusal:
            return refusal
        if self.door.waiting >= self.settings.max_queued_requests:
            return Refusal(503, "too many requests wait")
        async with self.door.through(self.pipeline.kind(request), request.num_images_per_prompt) as place:
            answer: Answer | Refusal = await self.batch((request, place))
        return answer

    @serve.batch(batch_size_fn=images_of)
    async def batch(self, items: list[Batched]) -> list[Answer | Refusal]:
        with self.door.closed():
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.thread, self._make, items)

    def _make(self, items: list[Batched]) -> list[Answer | Refusal]:
        requests = [request for request, _ in items]
        try:
            made = self.pipeline.make(requests, lambda: all(place.gone for _, place in items))
        except DeviceError as error:
            self.broken = error  # nothing can be computed on the device any more; Ray starts another replica
            raise
        return [
            images if isinstance(images, Refusal) else self._answer(request, images)
            for request, images in zip(requests, made)
        ]

    def _answer(self, request: ImageRequest, images: list[Any]) -> Answer:
        settings = self.pipeline.settings_of(request)
        files = [png(image, settings | {"seed": int(request.seed or 0) + i}) for i, image in enumerate(images)]
        return Answer(tuple(files), settings)

    def check_file(self, name: str, data: bytes) -> Refusal | None:
        """Why this is no coefficient file for the pipeline."""
        try:
            self.pipeline.check_file(name, data)
        except Refusal as refusal:
            return refusal
        return None

    def check_health(self) -> None:
        if self.broken is not None:
            raise RuntimeError(f"the device of this replica cannot be used any more: {self.broken}")


def png(image: Any, settings: dict[str, Any]) -> bytes:
    """The file, with its settings as JSON in the entry `parameters`."""
    about, file = PngInfo(), io.BytesIO()
    about.add_text("parameters", json.dumps(settings))
    image.save(file, format="PNG", pnginfo=about)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- HTTP

app = FastAPI(title="coeff_diffusers", version=__version__, description="Images of many subjects by one model.")


class LimitedBody:
    """Reads no more of a body than `MAX_JSON`: FastAPI reads all of it before it asks for the token."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_JSON and scope["method"] != "PUT":  # a file has a limit of its own
                raise HTTPException(413, f"the body must have {MAX_JSON:,} bytes at most")
            return message

        await self.app(scope, limited if scope["type"] == "http" else receive, send)


app.add_middleware(LimitedBody)
bearer = HTTPBearer(auto_error=False, description="Asked for where the server has a token.")


def authorized(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
    """Raises Refusal unless the request has the server's token, or the server has none."""
    api: Any = serve.get_replica_context().servable_object
    token = api.token
    given = "" if credentials is None else credentials.credentials
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise Refusal(401, "the header Authorization must be 'Bearer ' and the server's token")


@app.exception_handler(Refusal)
def refused(request: Request, refusal: Refusal) -> JSONResponse:
    problem = Problem(field=refusal.field, message=refusal.message)
    return JSONResponse(problem.model_dump(), refusal.status, headers=refusal.headers)


@app.exception_handler(RequestValidationError)
def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Of several problems the first, and the others in the message."""
    listed: dict[str | None, str] = {}
    for each in error.errors():
        known = each["type"] != "json_invalid" and len(each["loc"]) > 1
        text = f"the body is no JSON: {each['ctx']['error']}" if each["type"] == "json_invalid" else each["msg"]
        field = str(each["loc"][1]) if known else None  # further down are names of pydantic's own, and of clients
        listed[field] = f"{listed[field]}, or: {text}" if field in listed else text
    if None in listed and "json" not in request.headers.get("content-type", ""):
        listed[None] += "; the body must be JSON, and the header Content-Type must be application/json"
    texts = [f"{field}: {text}" if field else text for field, text in listed.items()]
    message = "; ".join(texts) if len(listed) > 1 else next(iter(listed.values()))
    return JSONResponse(Problem(field=next(iter(listed)), message=message[:MESSAGE]).model_dump(), 422)


@app.exception_handler(NoSuchPath)
def unknown(request: Request, error: NoSuchPath) -> JSONResponse:
    """Of paths and methods that there are not, and of bodies that cannot be read."""
    return JSONResponse(Problem(message=str(error.detail)).model_dump(), error.status_code, headers=error.headers)


@app.exception_handler(Exception)
def failed(request: Request, error: Exception) -> JSONResponse:
    """Of what nobody thought of; the log has all of it."""
    return JSONResponse(Problem(message=f"the server failed: {type(error).__name__}").model_dump(), 500)


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": text}
    for status, text in {
        401: "No token, or another one.",
        404: "There is no such subject.",
        405: "The subjects are on the Hub, and only read.",
        413: "The file is too large.",
        422: "Something cannot be asked for; `field` says what.",
        503: "All are busy; Retry-After says how many seconds to wait.",
    }.items()
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: PROBLEMS[status] for status in (401, *statuses)}


@serve.deployment(name="Api")
@serve.ingress(app)
class Api:
    """The HTTP side.

    Args:
        settings: of the server.
        images: handle of `Images`.
    """

    def __init__(self, settings: ServeSettings, images: Any) -> None:
        stay_on_this_machine()
        self.settings, self.images = settings, images
        self.token = token_of(settings)
        self.folder = SubjectFolder(settings.adapters)
        self.seconds = 1.0  # that a request takes, of late

    @app.post(
        "/v1/images",
        response_model=ImageResponse,
        responses=responses(404, 422, 503) | {200: {"content": {"image/png": {}}}},
        dependencies=[Depends(authorized)],
    )
    async def make(self, request: ImageRequest) -> Any:
        """Images of a prompt, by the base model or a subject."""
        began = time.monotonic()
        answer = await self._ask("make", request)
        self.seconds += 0.2 * (time.monotonic() - began - self.seconds)
        if request.response_format == "png":
            headers = {"X-Seed": str(answer.settings["seed"])}
            return Response(answer.images[0], media_type="image/png", headers=headers)
        files = [base64.b64encode(file).decode() for file in answer.images]
        images = [Image(seed=answer.settings["seed"] + i, b64_json=text) for i, text in enumerate(files)]
        return ImageResponse(images=images, settings=answer.settings)

    @app.get("/v1/subjects", responses=responses(), dependencies=[Depends(authorized)])
    def subjects(self) -> Subjects:
        """All names."""
        return Subjects(subjects=self.folder.names())

    @app.get("/v1/subjects/{name}", responses=responses(404, 422), dependencies=[Depends(authorized)])
    def subject(self, name: str) -> Subject:
        """What a subject's file says of itself."""
        return self.folder.describe(name)

    @app.put(
        "/v1/subjects/{name}",
        status_code=204,
        responses=responses(405, 413, 422, 503) | {201: {"description": "There was none of the name."}},
        openapi_extra={"requestBody": {"content": {"application/octet-stream": {}}, "required": True}},
        dependencies=[Depends(authorized)],
    )
    async def put(self, name: str, request: Request) -> Response:
        """The body is a coefficient file. One that was there is replaced; the next images are made by the new."""
        await asyncio.to_thread(self.folder.check_name, name)
        data = await self._body(request)
        await self._ask("check_file", name, data)
        new = await asyncio.to_thread(self.folder.put, name, data)
        return Response(status_code=201 if new else 204)

    @app.delete(
        "/v1/subjects/{name}",
        status_code=204,
        responses=responses(404, 405),
        dependencies=[Depends(authorized)],
    )
    def delete(self, name: str) -> None:
        """Removes a subject's file."""
        self.folder.delete(name)

    @app.get("/healthz", responses={503: PROBLEMS[503]})
    def healthz(self) -> dict[str, int]:
        """How many replicas can make images; 503 if there is none. Needs no token."""
        found = serve.status().applications[serve.get_replica_context().app_name].deployments["Images"].replica_states
        running = found.get(ReplicaState.RUNNING, 0)
        if not running:
            raise Refusal(503, "no replica is running", headers={"Retry-After": "5"})
        return {"replicas": running}

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """What a replica of `Images` answers. One that dies is replaced, and another is asked."""
        for _ in range(TRIES):
            try:
                answer = await getattr(self.images, method).remote(*arguments)
            except BackPressureError as error:
                raise self._busy("too many requests wait") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                logger.warning("a replica died: %s", error)
                continue
            if isinstance(answer, Refusal):
                raise self._busy(answer.message) if answer.status == 503 else answer
            return answer
        raise self._busy(f"{TRIES} replicas died of it")

    def _busy(self, why: str) -> Refusal:
        return Refusal(503, why, headers={"Retry-After": str(math.ceil(self.seconds))})

    async def _body(self, request: Request) -> bytes:
        most, data = self.settings.max_upload_size, bytearray()
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise Refusal(413, f"a coefficient file of a subject must have {most:,} bytes at most")
        return bytes(data)


def resources(settings: ServeSettings) -> dict[str, float]:
    """What Ray sets aside for a replica: a GPU if there is any, else an equal share of this machine's threads."""
    gpus = settings.num_gpus
    if gpus is None:
        gpus = 1 if torch.cuda.is_available() else 0
    cpus = settings.num_cpus
    if cpus is None:
        cpus = 1 if gpus else max(1, torch.get_num_threads() // settings.num_replicas)
    return {"num_gpus": gpus, "num_cpus": cpus}


def application(settings: ServeSettings) -> Any:
    """Both deployments, as the settings have them; a config file of Ray may say otherwise."""
    api: Any = Api  # a deployment, and no class, since it was decorated
    pipelines: Any = Images
    images = pipelines.options(
        num_replicas=settings.num_replicas,
        ray_actor_options=resources(settings),
        max_ongoing_requests=10_000,  # the door has a limit; Ray's asks the replica again and again, which computes
    ).bind(settings)
    return api.options(
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,  # they wait for images
    ).bind(settings, images)
