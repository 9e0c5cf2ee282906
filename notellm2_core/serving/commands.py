"""The commands `notellm2 serve` and `notellm2 keys`."""

import argparse
import ipaddress
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from notellm2_core.serving.keys import SCOPES, Keys, add_key

PORT = 8080


def add_serving_commands(commands: Any) -> None:
    """Add the commands to the parser's subcommands."""
    serve = commands.add_parser("serve", help="answer over HTTP: write notes, find similar ones, recommend")
    config = "configuration whose champion is served; default: NOTELLM2_CONFIG"
    serve.add_argument("--config", type=Path, help=config)
    release = "id of the release to serve, whatever the champion is; default: the champion, and each new one"
    serve.add_argument("--release", help=release)
    log = "URL of the log of notes, sqlite:///FILE or postgresql://HOST/DATABASE; default: serving.log"
    serve.add_argument("--log", help=log)
    serve.add_argument("--keys", type=Path, help="file of keys; without one, only this machine is listened to")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=int, default=PORT, help="default: %(default)s")
    serve.set_defaults(run=_serve)

    compact = commands.add_parser("compact", help="make the notes of the log part of the releases that are served")
    compact.add_argument("--config", type=Path, help="their configuration; default: NOTELLM2_CONFIG")
    compact.add_argument("--log", help=log)
    compact.set_defaults(run=_compact)

    keys = commands.add_parser("keys", help="add a key of the service, and print it once")
    keys.add_argument("action", choices=["add"])
    keys.add_argument("--keys", type=Path, required=True, help="file of keys; made if it does not exist")
    keys.add_argument("--name", required=True, help="whose key it is")
    keys.add_argument("--scope", choices=SCOPES, default="read", help="default: %(default)s")
    keys.set_defaults(run=_add_key)


def _add_key(options: argparse.Namespace) -> None:
    print(add_key(options.keys, options.name, options.scope))


def _serve(options: argparse.Namespace) -> None:
    keys = Keys() if options.keys is None else Keys.load(options.keys)
    require_local_or_keys(options.host, keys)
    try:
        import uvicorn
        from threadpoolctl import threadpool_limits

        from notellm2_core.serving.app import make_app
        from notellm2_core.serving.log import NoteLog
        from notellm2_core.serving.service import Service
        from notellm2_core.serving.watcher import Watcher
    except ImportError as e:
        raise ValueError(f"`notellm2 serve` needs {e.name}: pip install 'notellm2[serve]'") from None
    from notellm2_core.config.load import config_in_force
    from notellm2_core.lake.catalog import Catalog
    from notellm2_core.lake.lake import Lake
    from notellm2_core.lake.ledger import Ledger
    from notellm2_core.serving.compaction import log_url

    config = config_in_force(str(options.config or ""))
    lake, ledger = Lake(Path(config.lake)), Ledger(Path(config.lake), config.name)
    release = options.release or ledger.state().champion
    if release is None:
        raise ValueError(f"no release of {config.name} is live in {config.lake}: run the pipeline, or name a --release")
    ledger.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(closing(NoteLog.open(log_url(config, ledger, options.log))))
        service = stack.enter_context(closing(Service(lake, log, release, Catalog(config).source)))
        stack.enter_context(closing(Watcher(service, ledger, follows_champion=options.release is None)))
        threadpool_limits(1, "blas")  # products of small matrices, on the threads that search
        uvicorn.run(make_app(service, keys), host=options.host, port=options.port, log_level="warning")


def _compact(options: argparse.Namespace) -> None:
    try:
        from notellm2_core.serving.compaction import compact_served
    except ImportError as e:
        raise ValueError(f"`notellm2 compact` needs {e.name}: pip install 'notellm2[serve]'") from None
    from notellm2_core.config.load import config_in_force

    config = config_in_force(str(options.config or ""))
    compacted = compact_served(config, options.log)
    for release_id, result in compacted.items():
        print(f"{release_id}: {result}")
    if not compacted:
        print(f"no release of {config.name} has been served yet")


def require_local_or_keys(host: str, keys: Keys) -> None:
    """Raises ValueError for an address that other machines reach, without keys."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not is_local and not keys.keys:
        raise ValueError(f"--host {host} is reached from other machines: it needs --keys (`notellm2 keys add`)")
