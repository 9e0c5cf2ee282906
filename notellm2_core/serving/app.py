"""The HTTP interface of the service.

Every answer names the release and the place in the log that it was made from. Errors are problem+json. Searches run on
threads beside the event loop, which only reads and writes; the model has a process of its own.
"""

from pathlib import Path as FilePath
from typing import Annotated, Any

import faiss
from fastapi import FastAPI, Path, Response
from starlette.exceptions import HTTPException

from notellm2_core import __version__
from notellm2_core.serving.forms import Forms
from notellm2_core.serving.guard import Guard, needs
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.live_release import LiveRelease
from notellm2_core.serving.metrics import Metrics
from notellm2_core.serving.note_routes import add_reads, add_writes
from notellm2_core.serving.problems import ERRORS, add_handlers
from notellm2_core.serving.search_routes import add_events, add_searches
from notellm2_core.serving.service import NotReady, Service
from notellm2_core.serving.timed import PROMETHEUS, TEXT_ANSWER, Timed
from notellm2_core.serving.workers import Workers

_PAGE = FilePath(__file__).parent / "page"
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE_HEADERS = {
    # Nothing from elsewhere, and no text that becomes markup: a note's title is what anybody has written.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
}  # fmt: skip
_NUM_EXAMPLES = 12
_MOST_WAITING = 32  # searches: at 3 ms each, the last one waits for 0.1 s


def make_app(service: Service, keys: Keys, takes_events: bool = False) -> FastAPI:
    """The application. It does not close the service. takes_events: somebody writes them to files."""
    app = FastAPI(title="NoteLLM-2", version=__version__, summary="Multimodal item-to-item recall.")
    metrics = Metrics(service)
    app.add_middleware(Forms)
    searches = Workers(
        "search", 2, _MOST_WAITING, _one_thread_of_faiss, metrics.observe_search, metrics.refused_searches.inc
    )
    app.add_middleware(Guard, keys=keys, searches=searches)
    app.add_middleware(Timed, seconds=metrics.request_seconds)
    add_handlers(app)
    reads = Workers("read", 2, 256)  # of texts and pictures: few pictures are decoded at a time
    add_writes(app, service, keys, Workers("write", 64, 256))
    add_reads(app, service, keys, reads)
    add_searches(app, service, keys, metrics, reads, searches)
    add_events(app, service, keys, takes_events)
    _add_releases(app, service, keys)
    _add_state(app, service, keys, metrics, reads)
    _add_page(app)
    return app


def _one_thread_of_faiss() -> None:
    """FAISS has a number of threads for each thread that calls it."""
    faiss.omp_set_num_threads(1)


def _add_releases(app: FastAPI, service: Service, keys: Keys) -> None:
    switches = Workers("switch", 1, 4)

    @app.get("/releases", dependencies=needs(keys, "read"), responses=ERRORS, tags=["releases"])
    async def releases() -> dict[str, Any]:
        """The releases in memory, the one that answers first. `examples`: a dozen notes to begin with."""
        return {
            "releases": [
                {
                    "release": r.id, "week": r.week, "seq": r.index.delta.view.seq,
                    "notes": len(r.index.index.note_ids), "examples": _examples(r),
                }
                for r in service.releases.in_memory
            ]
        }  # fmt: skip

    @app.post("/releases/{release_id}:activate", dependencies=needs(keys, "admin"), responses=ERRORS, tags=["releases"])
    async def activate(release_id: Annotated[str, Path(max_length=128)]) -> dict[str, str]:
        """Answer from another release, once it has caught up with the log. A restart begins with the champion again."""
        try:
            release = await switches.run(service.releases.activate, release_id)
        except (ValueError, TimeoutError) as e:
            raise HTTPException(409, f"{e}; {service.current.id} stays") from None
        return {"release": release.id}


def _examples(release: LiveRelease) -> list[str]:
    """Some notes of the release that are there, from all over it: a person begins with them."""
    ids = release.index.index.note_ids
    some = [ids[row] for row in range(0, len(ids), max(1, len(ids) // _NUM_EXAMPLES))]
    return [str(note_id) for note_id in some if release.index.delta.number(note_id) is not None][:_NUM_EXAMPLES]


def _add_state(app: FastAPI, service: Service, keys: Keys, metrics: Metrics, reads: Workers) -> None:
    @app.get("/metrics", dependencies=needs(keys, "read"), responses=ERRORS | TEXT_ANSWER, tags=["state"])
    async def show_metrics() -> Response:
        """For Prometheus."""
        return Response(await reads.run(metrics.show), media_type=PROMETHEUS)

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
    files = {file.name: file for file in _PAGE.iterdir() if file.suffix in _PAGE_TYPES}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return await page_file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if (file := files.get(name)) is None:
            raise HTTPException(404, "there is no such page")
        return Response(file.read_bytes(), media_type=_PAGE_TYPES[file.suffix], headers=_PAGE_HEADERS)
