"""The commands `notellm2 serve` and `notellm2 keys`."""

import argparse
import ipaddress
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from notellm2_core.serving.keys import SCOPES, Keys, add_key

if TYPE_CHECKING:
    from notellm2_core.lake.ledger import State
    from notellm2_core.serving.experiment import Experiment
    from notellm2_core.serving.served_releases import ServedReleases

PORT, EMBEDDER_PORT = 8080, 8090
KINDS = ("ab", "interleave")  # of experiments; here, because the parser imports no more than it needs


def add_serving_commands(commands: Any) -> None:
    """Add the commands to the parser's subcommands."""
    serve = commands.add_parser("serve", help="answer over HTTP: write notes, find similar ones, recommend")
    config = "configuration whose champion is served; default: NOTELLM2_CONFIG"
    serve.add_argument("--config", type=Path, help=config)
    release = "id of the release to serve, whatever the champion is; default: the champion, and each new one"
    serve.add_argument("--release", help=release)
    log = "URL of the log of notes, sqlite:///FILE or postgresql://HOST/DATABASE; default: serving.log"
    serve.add_argument("--log", help=log)
    engine = "URL of a Milvus that searches the release, as in serving.engine; default: serving.engine, or FAISS"
    serve.add_argument("--engine", help=engine)
    _add_address(serve, PORT)
    serve.add_argument("--experiment", choices=KINDS, help="two releases beside each other, on a share of the users")
    challenger = "id of the second release of an experiment; previous: with each new champion, the one before it"
    serve.add_argument("--challenger", help=challenger)
    serve.add_argument("--share", type=float, default=0.5, help="of the users; default: %(default)s")
    serve.set_defaults(run=_serve)

    embedder = commands.add_parser("embedder", help="embed the notes of services, on a machine with a GPU")
    lake = "configuration in whose lake the models are; default: NOTELLM2_CONFIG"
    embedder.add_argument("--config", type=Path, help=lake)
    first = "id of a release whose model is loaded at once; the others are when a service asks for them"
    embedder.add_argument("--release", help=first)
    embedder.add_argument("--model", type=Path, help="folder of a model: then there is no other, and no lake is needed")
    _add_address(embedder, EMBEDDER_PORT)
    embedder.set_defaults(run=_embedder)

    compact = commands.add_parser("compact", help="make the notes of the log part of the releases that are served")
    compact.add_argument("--config", type=Path, help="their configuration; default: NOTELLM2_CONFIG")
    compact.add_argument("--log", help=log)
    compact.set_defaults(run=_compact)

    _add_experiments(
        commands.add_parser("experiments", help="two releases beside each other: what users did, or would")
    )

    keys = commands.add_parser("keys", help="add a key of the service, and print it once")
    keys.add_argument("action", choices=["add"])
    keys.add_argument("--keys", type=Path, required=True, help="file of keys; made if it does not exist")
    keys.add_argument("--name", required=True, help="whose key it is")
    keys.add_argument("--scope", choices=SCOPES, default="read", help="default: %(default)s")
    keys.set_defaults(run=_add_key)


def _add_address(parser: argparse.ArgumentParser, port: int) -> None:
    parser.add_argument("--keys", type=Path, help="file of keys; without one, only this machine is listened to")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=port, help="default: %(default)s")


def _add_experiments(experiments: argparse.ArgumentParser) -> None:
    kinds = experiments.add_subparsers(required=True, metavar="|".join((*KINDS, "replay")))
    config = "that of the service; default: NOTELLM2_CONFIG"
    for kind, what in zip(KINDS, ("a release per user", "lists of both"), strict=True):
        report = kinds.add_parser(kind, help=f"what an experiment of the service says: {what}")
        report.add_argument("--config", type=Path, help=config)
        report.add_argument("--champion", required=True, help="id of the release that most users had")
        report.add_argument("--challenger", required=True, help="id of the other release")
        report.add_argument("--events", type=Path, help="folder of the events; default: serving.events")
        report.set_defaults(run=_report, what=kind)
    offline = kinds.add_parser("replay", help="the held-out clicks of the challenger's week, asked of both")
    offline.add_argument("champion", help="id of the release that was live")
    offline.add_argument("challenger", help="id of the other release")
    offline.add_argument("--config", type=Path, help=config)
    offline.set_defaults(run=_replay)


def _add_key(options: argparse.Namespace) -> None:
    print(add_key(options.keys, options.name, options.scope))


def _serve(options: argparse.Namespace) -> None:
    keys = _keys(options)
    if (options.experiment is None) != (options.challenger is None):
        raise ValueError("--experiment and --challenger belong together")
    with _extra():
        import uvicorn
        from threadpoolctl import threadpool_limits

        from notellm2_core.serving.app import make_app
        from notellm2_core.serving.engine import open_engine
        from notellm2_core.serving.events import EventWriter
        from notellm2_core.serving.experiment import Experiment
        from notellm2_core.serving.log import NoteLog
        from notellm2_core.serving.log_url import log_url
        from notellm2_core.serving.service import Service
        from notellm2_core.serving.watcher import Watcher
    from notellm2_core.config.load import config_in_force
    from notellm2_core.lake.catalog import Catalog
    from notellm2_core.lake.lake import Lake
    from notellm2_core.lake.ledger import Ledger

    config = config_in_force(str(options.config or ""))
    lake, ledger = Lake(Path(config.lake)), Ledger(Path(config.lake), config.name)
    release = options.release or ledger.state().champion
    if release is None:
        raise ValueError(f"no release of {config.name} is live in {config.lake}: run the pipeline, or name a --release")
    ledger.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(closing(NoteLog.open(log_url(config, ledger, options.log))))
        engine = stack.enter_context(closing(open_engine(options.engine or config.serving.engine, lake)))
        embedder = config.serving.embedder
        service = stack.enter_context(closing(Service(lake, log, release, Catalog(config).source, engine, embedder)))
        if options.experiment is not None:
            _begin(service.releases, Experiment(options.experiment, options.challenger, options.share), ledger.state())
        stack.enter_context(closing(Watcher(service.releases, ledger, follows_champion=options.release is None)))
        events = config.serving.events
        if events is not None:
            stack.enter_context(closing(EventWriter(log, events)))
        threadpool_limits(1, "blas")  # products of small matrices, on the threads that search
        app = make_app(service, keys, takes_events=events is not None)
        uvicorn.run(app, host=options.host, port=options.port, log_level="warning", access_log=False)


def _embedder(options: argparse.Namespace) -> None:
    keys = _keys(options)
    if options.model is not None and (options.config or options.release):
        raise ValueError("--model takes the place of --config and --release")
    with _extra():
        import uvicorn

        from notellm2_core.serving.embedder import Models, make_embedder_app, models_in, only_model
    from notellm2_core.config.load import config_in_force
    from notellm2_core.lake.lake import Lake
    from notellm2_core.release.release import open_release

    first: str | None
    if options.model is not None:
        find, first = only_model(options.model)
    else:
        lake = Lake(Path(config_in_force(str(options.config or "")).lake))
        find, first = models_in(lake), options.release and open_release(lake, options.release).weights_id
    with closing(Models(find)) as models:
        if first:
            models.get(first)
        uvicorn.run(
            make_embedder_app(models, keys), host=options.host, port=options.port, log_level="warning", access_log=False
        )


def _keys(options: argparse.Namespace) -> Keys:
    """Raises ValueError for an address that other machines reach, without keys."""
    keys = Keys() if options.keys is None else Keys.load(options.keys)
    require_local_or_keys(options.host, keys)
    return keys


def _begin(releases: "ServedReleases", experiment: "Experiment", state: "State") -> None:
    """Begin an experiment; with PREVIOUS, now if the champion was promoted, and with each new one."""
    from notellm2_core.serving.experiment import PREVIOUS

    challenger: str | None = experiment.challenger
    if challenger == PREVIOUS:
        releases.after_switch = experiment
        was_promoted = bool(state.reigns) and state.reigns[-1].action == "promoted"
        challenger = state.previous if was_promoted else None
    if challenger is not None:
        releases.begin(replace(experiment, challenger=challenger))


def _compact(options: argparse.Namespace) -> None:
    with _extra():
        from notellm2_core.serving.compaction import compact_served
    from notellm2_core.config.load import config_in_force

    config = config_in_force(str(options.config or ""))
    compacted = compact_served(config, options.log)
    for release_id, result in compacted.items():
        print(f"{release_id}: {result}")
    if not compacted:
        print(f"no release of {config.name} has been served yet")


def _report(options: argparse.Namespace) -> None:
    with _extra():
        from notellm2_core.serving.experiment_report import read_exposures, to_markdown
        from notellm2_core.serving.exposures import compare, preference
    from notellm2_core.config.load import config_in_force
    from notellm2_core.config.source import EventSettings
    from notellm2_core.lake.lake import Lake
    from notellm2_core.release.release import open_release
    from notellm2_core.retrieval.index import Index
    from notellm2_core.schema import INDEX_FOLDER

    config = config_in_force(str(options.config or ""))
    if (folder := options.events or config.serving.events) is None:
        raise ValueError("name the folder of the events: --events, or serving.events")
    champion, challenger = (open_release(Lake(config.lake), i) for i in (options.champion, options.challenger))
    events = EventSettings.of(config.source)
    exposures = read_exposures(folder, options.what, champion.id, challenger.id, events)
    notes = Index.load(champion.path / INDEX_FOLDER).rows.keys()
    won = preference(exposures) if options.what == "interleave" else None
    print(to_markdown(compare(exposures, notes), won, exposures))


def _replay(options: argparse.Namespace) -> None:
    from notellm2_core.config.load import config_in_force
    from notellm2_core.config.settings import ReplaySettings
    from notellm2_core.lake.lake import Lake
    from notellm2_core.serving.replay import replay, to_markdown

    config = config_in_force(str(options.config or ""))
    settings = ReplaySettings.of(config.evaluation)
    print(to_markdown(replay(Lake(config.lake), options.champion, options.challenger, settings)))


@contextmanager
def _extra() -> Iterator[None]:
    """Raises ValueError for a package that only the extra `serve` installs."""
    try:
        yield
    except ImportError as e:
        raise ValueError(f"this command needs {e.name}: pip install -e '.[serve]', in the repository") from None


def require_local_or_keys(host: str, keys: Keys) -> None:
    """Raises ValueError for an address that other machines reach, without keys."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and not keys.keys:
        raise ValueError(f"--host {host} is reached from other machines: it needs --keys (`notellm2 keys add`)")
