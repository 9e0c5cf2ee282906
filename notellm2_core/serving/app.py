"""The HTTP interface of the service.

Every answer names the release and the place in the log that it was made from. Errors are problem+json. Searches run on
threads beside the event loop, which only reads and writes; the model has a process of its own.
"""

from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import FastAPI, Path, Response
from starlette.exceptions import HTTPException

from notellm2_core import __version__
from notellm2_core.serving.guard import Guard, needs
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.metrics import Metrics, Timed
from notellm2_core.serving.note_routes import add_reads, add_writes
from notellm2_core.serving.problems import ERRORS, add_handlers
from notellm2_core.serving.search_routes import add_events, add_searches
from notellm2_core.serving.service import NotReady, Service
from notellm2_core.serving.workers import Workers

_PAGE = FilePath(__file__).parent / "page"
_PAGE_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_POLICY = "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"


def make_app(service: Service, keys: Keys, takes_events: bool = False) -> FastAPI:
    """The application. It does not close the service. takes_events: somebody writes them to files."""
    app = FastAPI(title="NoteLLM-2", version=__version__, summary="Multimodal item-to-item recall.")
    metrics = Metrics(service)
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(Timed, metrics=metrics)
    add_handlers(app)
    reads = Workers("read", 2, 256)  # of texts and pictures: few pictures are decoded at a time
    add_writes(app, service, keys, Workers("write", 64, 256))
    add_reads(app, service, keys, reads)
    add_searches(app, service, keys, metrics, reads)
    add_events(app, service, keys, takes_events)
    _add_releases(app, service, keys)
    _add_state(app, service, keys, metrics, reads)
    _add_page(app)
    return app


def _add_releases(app: FastAPI, service: Service, keys: Keys) -> None:
    switches = Workers("switch", 1, 4)

    @app.get("/releases", dependencies=needs(keys, "read"), responses=ERRORS, tags=["releases"])
    async def releases() -> dict[str, Any]:
        """The releases in memory, the one that answers first."""
        return {
            "releases": [
                {"release": r.id, "week": r.week, "seq": r.index.delta.view.seq, "notes": len(r.index.index.note_ids)}
                for r in service.releases.in_memory
            ]
        }

    @app.post("/releases/{release_id}:activate", dependencies=needs(keys, "admin"), responses=ERRORS, tags=["releases"])
    async def activate(release_id: Annotated[str, Path(max_length=128)]) -> dict[str, str]:
        """Answer from another release, once it has caught up with the log. A restart begins with the champion again."""
        try:
            release = await switches.run(service.releases.activate, release_id)
        except (ValueError, TimeoutError) as e:
            raise HTTPException(409, f"{e}; {service.current.id} stays") from None
        return {"release": release.id}


def _add_state(app: FastAPI, service: Service, keys: Keys, metrics: Metrics, reads: Workers) -> None:
    text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @app.get("/metrics", dependencies=needs(keys, "read"), responses=ERRORS | text, tags=["state"])
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(await reads.run(metrics.show), media_type="text/plain; version=0.0.4")

    @app.get("/healthz", tags=["state"])
    async def healthz() -> dict[str, str]:
        """The process answers. It asks neither the disk nor the model."""
        return {"status": "ok"}

    @app.get("/readyz", responses=ERRORS, tags=["state"])
    async def readyz() -> dict[str, Any]:
        """The release shows all entries of the log that were there at the start."""
        if not service.is_ready:
            raise NotReady("the log of notes is still being read")
        return {"status": "ready", "release": service.current.id}


def _add_page(app: FastAPI) -> None:
    def file(name: str) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return Response((_PAGE / name).read_bytes(), media_type=_PAGE_TYPES[name], headers=headers)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in _PAGE_TYPES:
            raise HTTPException(404, "there is no such page")
        return file(name)
