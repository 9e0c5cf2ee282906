"""An embedder for several services: models on a machine with a GPU, behind HTTP.

    GET  /models                      the models in memory
    GET  /models/{weights_id}         whether the model is loaded; it begins to load where it is not in memory
    POST /models/{weights_id}/embed   a note: its text, its picture, or both -> its vector
    GET  /metrics, /healthz           for Prometheus; the process answers

A model is named by its weights, so a vector is never that of another model. Notes of all callers that wait together
are one batch.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi import Path as PathParameter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from pydantic import Field
from starlette.exceptions import HTTPException

from notellm2_core import __version__
from notellm2_core.config.methods import InputKind
from notellm2_core.lake.lake import Lake
from notellm2_core.model.weights import saved_weights_id
from notellm2_core.release.release import NAME, Release
from notellm2_core.serving.embedding import EmbedderBusy
from notellm2_core.serving.embedding_process import EmbeddingProcess
from notellm2_core.serving.guard import Guard, needs
from notellm2_core.serving.keys import Keys
from notellm2_core.serving.note_routes import note_of
from notellm2_core.serving.problems import ERRORS, add_handlers
from notellm2_core.serving.requests import Body, NoteText
from notellm2_core.serving.search_routes import unless_left
from notellm2_core.serving.timed import PROMETHEUS, TEXT_ANSWER, Timed, request_seconds
from notellm2_core.serving.workers import Workers

_MOST = 2  # models in memory: that of the release that answers, and of the one before it or of a challenger
_IN_USE_SECONDS = 30.0  # since somebody asked for a model; services ask every few seconds
FindModel = Callable[[str], Path]  # the folder of the model with these weights; raises KeyError where there is none

WeightsId = Annotated[str, PathParameter(max_length=128, pattern="^[0-9a-f]+$")]


class Models:
    """The models in memory, each in a process of its own. Any number of threads ask."""

    def __init__(self, find: FindModel) -> None:
        self._find, self._lock = find, threading.Lock()
        self._models: dict[str, EmbeddingProcess] = {}
        self._asked: dict[str, float] = {}  # when somebody last asked for it

    @property
    def loaded(self) -> Mapping[str, EmbeddingProcess]:
        return dict(self._models)

    def get(self, weights_id: str) -> EmbeddingProcess:
        """A model. Where it is not in memory, it begins to load, and the one that nobody has asked for longest leaves.

        Raises KeyError where there is no such model, and EmbedderBusy where those in memory are in use.
        """
        with self._lock:
            if weights_id not in self._models:
                folder = self._find(weights_id)
                self._make_room()
                self._models[weights_id] = EmbeddingProcess(
                    folder, waits=False, weights_id=weights_id, gives_way=bool(self._models)
                )
            self._asked[weights_id] = time.monotonic()
            return self._models[weights_id]

    def _make_room(self) -> None:
        if len(self._models) < _MOST:
            return
        oldest = min(self._asked, key=self._asked.__getitem__)
        if time.monotonic() - self._asked[oldest] < _IN_USE_SECONDS:
            raise EmbedderBusy(f"{_MOST} other models are in use here")
        del self._asked[oldest]
        self._models.pop(oldest).close()

    def collect(self) -> Iterator[Metric]:
        """The state of the models in memory, for Prometheus."""
        loaded = GaugeMetricFamily("notellm2_model_loaded", "Whether notes can be embedded.", labels=["weights_id"])
        waiting = GaugeMetricFamily("notellm2_embedding_waiting", "Notes that wait for it.", labels=["weights_id"])
        for weights_id, model in self.loaded.items():
            loaded.add_metric([weights_id], float(model.is_running))
            waiting.add_metric([weights_id], model.num_waiting)
        yield from (loaded, waiting)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for model in self._models.values():
                model.close()


def models_in(lake: Lake) -> FindModel:
    """Finds the models of the releases of a lake."""

    def find(weights_id: str) -> Path:
        for dataset in reversed(lake.datasets(NAME)):
            if (release := Release(dataset)).weights_id == weights_id:
                return release.path / "model"
        raise KeyError(weights_id)

    return find


def only_model(folder: Path) -> tuple[FindModel, str]:
    """Finds the model of a folder alone; and its weights. Raises ValueError where there is none."""
    known = {saved_weights_id(folder): folder}
    return known.__getitem__, next(iter(known))


class NoteToEmbed(NoteText):
    """A note."""

    inputs: Annotated[InputKind, Field(description="What the model reads of it.")] = "multimodal"


class ModelAnswer(Body):
    weights_id: str
    is_loaded: bool
    waiting: int = Field(description="Notes that wait for it.")
    problem: str | None = Field(description="Why it could not be loaded; it is tried again.")


class VectorAnswer(Body):
    weights_id: str = Field(description="The model that made the vector.")
    vector: list[float] = Field(description="Of length 1.")
    image: str = Field(description="What became of the picture.")


def make_embedder_app(models: Models, keys: Keys) -> FastAPI:
    """The application. It does not close the models."""
    app = FastAPI(title="NoteLLM-2 embedder", version=__version__, summary="Notes to vectors.")
    registry = CollectorRegistry()
    registry.register(models)
    app.add_middleware(Guard, keys=keys)
    app.add_middleware(Timed, seconds=request_seconds(registry))
    add_handlers(app)
    calls = Workers("models", 2, 1024)
    options: dict[str, Any] = {"dependencies": needs(keys, "read"), "responses": ERRORS}

    async def model_of(weights_id: str) -> EmbeddingProcess:
        try:
            return await calls.run(models.get, weights_id)
        except KeyError:
            raise HTTPException(404, f"there is no model {weights_id} here") from None

    @app.get("/models", response_model=list[ModelAnswer], **options)
    async def loaded() -> list[ModelAnswer]:
        """The models in memory."""
        return [_described(weights_id, model) for weights_id, model in models.loaded.items()]

    @app.get("/models/{weights_id}", response_model=ModelAnswer, **options)
    async def describe(weights_id: WeightsId) -> ModelAnswer:
        """A model; it begins to load where it is not in memory. Who asks for it keeps it there for half a minute."""
        return _described(weights_id, await model_of(weights_id))

    @app.post("/models/{weights_id}/embed", response_model=VectorAnswer, **options)
    async def embed(weights_id: WeightsId, note: NoteToEmbed, request: Request) -> VectorAnswer:
        """The vector of a note by this model, as soon as it is loaded."""
        model = await model_of(weights_id)
        embedding = model.submit(note_of("note", note), note.image, note.inputs)
        try:
            embedded = await unless_left(request, asyncio.wrap_future(embedding))
        finally:
            embedding.cancel()
        return VectorAnswer(weights_id=weights_id, vector=embedded.vector.tolist(), image=embedded.image)

    @app.get("/metrics", dependencies=needs(keys, "read"), responses=ERRORS | TEXT_ANSWER)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(generate_latest(registry), media_type=PROMETHEUS)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    return app


def _described(weights_id: str, model: EmbeddingProcess) -> ModelAnswer:
    return ModelAnswer(
        weights_id=weights_id, is_loaded=model.is_running, waiting=model.num_waiting, problem=model.problem
    )
