"""The server: one route for each action of the page, which calls a `Teacher`."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from demos.teach import kept, teacher
from demos.teach.pictures import MAX_BYTES
from demos.teach.security import MIDDLEWARE, TooLarge, read_body
from demos.teach.teacher import Busy, Teacher
from edge_dfcil import EdgeDfcilError

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
MAX_JSON = 2**16
MAX_PER_CLASS = 12  # dreams per class


class BadRequest(Exception):
    """A request that differs from those of this server's page."""


def create_app(lesson: Teacher, runtime: Path = RUNTIME) -> Starlette:
    """The server of one page.

    Parameters
    ----------
    runtime
        The folder of onnxruntime-web's files; without them the page says that the browser's answer is off.
    """
    routes = Routes(lesson, runtime)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        lesson.close()

    return Starlette(
        routes=[
            Route("/", routes.page),
            Route("/api/state", routes.state),
            Route("/api/events", routes.events),
            Route("/api/kept", routes.kept),
            Route("/api/model.onnx", routes.onnx),
            Route("/api/model.safetensors", routes.model_file),
            Route("/api/pictures", routes.add_picture, methods=["POST"]),
            Route("/api/discard", routes.discard, methods=["POST"]),
            Route("/api/teach", routes.teach, methods=["POST"]),
            Route("/api/cancel", routes.cancel, methods=["POST"]),
            Route("/api/predict", routes.predict, methods=["POST"]),
            Route("/api/sample", routes.sample, methods=["POST"]),
            Route("/api/forget", routes.forget, methods=["POST"]),
            Route("/api/rename", routes.rename, methods=["POST"]),
            Route("/api/dream", routes.dream, methods=["POST"]),
            Route("/api/export", routes.export, methods=["POST"]),
            Route("/runtime/{name}", routes.runtime_file),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=MIDDLEWARE,
        exception_handlers={
            EdgeDfcilError: _says(400),
            BadRequest: _says(400),
            Busy: _says(409),
            TooLarge: _says(413),
        },
        lifespan=lifespan,
    )


def _says(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Answers with the message of an error."""

    async def handle(request: Request, error: Exception) -> Response:
        # The unread rest of a body that is too large cannot be skipped cheaply: the connection is closed.
        headers = {"Connection": "close"} if status == 413 else None
        return JSONResponse({"error": str(error)}, status, headers)

    return handle


class Routes:
    """The handlers of the routes. Anything that computes runs in a thread, so that the server continues to answer."""

    def __init__(self, lesson: Teacher, runtime: Path) -> None:
        self._lesson, self._runtime = lesson, runtime

    async def page(self, request: Request) -> Response:
        return FileResponse(HERE / "static" / "index.html")

    async def state(self, request: Request) -> Response:
        has_runtime = all((self._runtime / name).is_file() for name in RUNTIME_FILES)
        limits = {
            "bytes": MAX_BYTES,
            "pictures": teacher.MAX_PICTURES,
            "classes": teacher.MAX_CLASSES,
            "name": teacher.MAX_NAME,
        }
        return JSONResponse(self._lesson.state() | {"runtime": has_runtime, "limits": limits})

    async def events(self, request: Request) -> Response:
        return StreamingResponse(self._lesson.feed.listen(), media_type="text/event-stream")

    async def kept(self, request: Request) -> Response:
        return JSONResponse([one.to_dict() for one in kept.tensors(self._lesson.learner.model)])

    async def onnx(self, request: Request) -> Response:
        if not self._lesson.is_exported:
            raise Busy("the file of the current model has not been made yet; POST /api/export makes it")
        return FileResponse(self._lesson.onnx_path, filename="model.onnx")

    async def model_file(self, request: Request) -> Response:
        return FileResponse(await run_in_threadpool(self._lesson.saved), filename="model.safetensors")

    async def runtime_file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in RUNTIME_FILES or not (self._runtime / name).is_file():
            return JSONResponse({"error": f"the server has no file {name}; run make runtime, and reload the page"}, 404)
        return FileResponse(self._runtime / name)

    async def add_picture(self, request: Request) -> Response:
        name, content = request.query_params.get("class", ""), await read_body(request, MAX_BYTES)
        return JSONResponse({"count": await run_in_threadpool(self._lesson.add_picture, name, content)})

    async def discard(self, request: Request) -> Response:
        self._lesson.discard(_text(await _values(request), "name"))
        return JSONResponse({})

    async def teach(self, request: Request) -> Response:
        values = await _values(request)
        ready, adapt = values.get("ready", []), values.get("adapt", False)
        if not isinstance(ready, list) or not all(isinstance(name, str) for name in ready) or not isinstance(adapt, bool):
            raise BadRequest("'ready' must be a list of names, and 'adapt' true or false")
        await run_in_threadpool(self._lesson.teach, ready, adapt)
        return JSONResponse({}, 202)

    async def cancel(self, request: Request) -> Response:
        self._lesson.cancel()
        return JSONResponse({})

    async def predict(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._lesson.predict, await read_body(request, MAX_BYTES)))

    async def sample(self, request: Request) -> Response:
        name, content = self._lesson.sample()
        return JSONResponse({"name": name, "png": base64.b64encode(content).decode()})

    async def forget(self, request: Request) -> Response:
        await run_in_threadpool(self._lesson.forget, _text(await _values(request), "name"))
        return JSONResponse({})

    async def rename(self, request: Request) -> Response:
        values = await _values(request)
        await run_in_threadpool(self._lesson.rename, _text(values, "name"), _text(values, "to"))
        return JSONResponse({})

    async def dream(self, request: Request) -> Response:
        per_class = (await _values(request)).get("per_class", 1)
        if type(per_class) is not int or not 1 <= per_class <= MAX_PER_CLASS:
            raise BadRequest(f"'per_class' must be a whole number from 1 to {MAX_PER_CLASS}")
        dreams = await run_in_threadpool(self._lesson.dream, per_class)
        return JSONResponse({"size": self._lesson.learner.image_size, "dreams": dreams})

    async def export(self, request: Request) -> Response:
        return JSONResponse({"version": await run_in_threadpool(self._lesson.export)})


async def _values(request: Request) -> dict[str, Any]:
    try:
        values = json.loads(await read_body(request, MAX_JSON) or b"{}")
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise BadRequest("the request's body must be a JSON object")
    return values


def _text(values: dict[str, Any], name: str) -> str:
    value = values.get(name)
    if not isinstance(value, str):
        raise BadRequest(f"{name!r} must be a string")
    return value
