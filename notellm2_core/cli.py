"""The command `notellm2`: stages that are useful by themselves. Each subcommand imports its libraries when it runs."""

import argparse
import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from notellm2_core.config.options import add_options, settings_from
from notellm2_core.config.settings import IndexSettings, ReportSettings
from notellm2_core.config.source import NoteReadingSettings, SourceSettings
from notellm2_core.demo.commands import add_demo_commands
from notellm2_core.release.commands import add_release_commands
from notellm2_core.runtime.errors import user_errors
from notellm2_core.serving.commands import add_serving_commands


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="notellm2", description="Multimodal item-to-item recall (NoteLLM-2).")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="say what a run would make of your notes and events, in seconds")
    check.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="folder; default: source.path of CONFIG")
    check.add_argument("--config", type=Path, help="configuration; default: the defaults of its settings")
    check.add_argument("--json", action="store_true", help="print all counts and findings as JSON")
    check.set_defaults(run=_check)

    _add_model_commands(commands)
    _add_index_commands(commands.add_parser("index", help="build or search a FAISS index"))
    add_release_commands(commands.add_parser("release", help="list, promote or roll back releases"))

    add_serving_commands(commands)

    simulate = commands.add_parser("simulate", help="run simulated weeks whose truth is known")
    simulate.add_argument("what", choices=["weeks", "year"])
    simulate.add_argument("arguments", nargs=argparse.REMAINDER, help="see `notellm2 simulate year --help`")
    simulate.set_defaults(run=_simulate)

    evaluate = commands.add_parser("evaluate", help="print the exact metrics of pairs or qrels, as JSON")
    evaluate.add_argument("--embeddings", type=Path, required=True)
    evaluate.add_argument("--pairs", type=Path, required=True, help="a table, or qrels of TREC or BEIR")
    evaluate.add_argument("--queries", type=Path, help="the queries' embeddings, if they are no notes of --embeddings")
    add_options(evaluate, ReportSettings, "ks")
    evaluate.set_defaults(run=_evaluate)

    if not (arguments or sys.argv[1:]):
        parser.print_help(sys.stderr)
        sys.exit(2)
    options = parser.parse_args(arguments)
    with user_errors():
        options.run(options)


def _check(options: argparse.Namespace) -> None:
    from notellm2_core.check.check import DataSettings, check_source
    from notellm2_core.check.report import text_of
    from notellm2_core.config.load import load_config

    sections = {}
    if options.config is not None:
        config = load_config(options.config)
        sections = {name: getattr(config, name) for name in DataSettings.model_fields}
    settings = DataSettings(**sections)
    source = options.source or settings.source.path
    if source is None:
        raise ValueError("name the folder of your data: notellm2 check SOURCE")
    report = check_source(Path(source), settings)
    print(json.dumps(report, default=str) if options.json else text_of(report, settings.source))
    sys.exit(1 if report["stops"] else 0)


def _describe(options: argparse.Namespace) -> None:
    from notellm2_core.config.load import load_config
    from notellm2_core.model.describe import describe

    print(json.dumps(describe(load_config(options.config)), indent=1))


def _simulate(options: argparse.Namespace) -> None:
    """The simulation runs the graph, which this package knows nothing of: it is found by its entry point."""
    for simulation in entry_points(group="notellm2.simulate", name=options.what):
        sys.exit(simulation.load()(options.arguments))
    raise ValueError("this installation has no simulation: install the package again (make setup)")


def _embed(options: argparse.Namespace) -> None:
    from notellm2_core.config.load import load_config
    from notellm2_core.inference.embed_table import BATCH_NOTES, embed_notes
    from notellm2_core.notes.source_reader import read_note_table
    from notellm2_core.vision.image_status import described

    source = SourceSettings() if options.config is None else load_config(options.config).source
    table = read_note_table(options.notes, options.images, reading=NoteReadingSettings.of(source))
    batch_notes = BATCH_NOTES if options.batch_notes is None else options.batch_notes
    counts = embed_notes(options.model, table, options.out, options.inputs, options.dim, batch_notes)
    if faults := described(counts["images"]):
        total = sum(counts["images"].values()) - counts["images"]["missing"]
        print(f"warning: of {total} images, {faults}; --images names their folder", file=sys.stderr)
    print(json.dumps(counts))


def _package(options: argparse.Namespace) -> None:
    from notellm2_core.inference.package import package

    files = package(options.model, options.out, options.report, options.layout, options.license)
    print(json.dumps({"out": str(options.out), "files": files}))


def _index_build(options: argparse.Namespace) -> None:
    from notellm2_core.retrieval.build import build_index

    settings = settings_from(options, IndexSettings)
    built = build_index(options.embeddings, options.out, settings)
    recall = built["recall"].get(str(settings.search_k), 100)
    if recall < 100 * settings.target_recall:
        print(
            f"warning: recall@{settings.search_k} is {recall:.1f} %, below --target-recall {settings.target_recall}: "
            f"{settings.factory} compresses the vectors; use one that keeps more of them, or append ,RFlat",
            file=sys.stderr,
        )
    print(json.dumps(built))


def _add_model_commands(commands: Any) -> None:
    add_demo_commands(commands.add_parser("demo", help="write the demo world: notes, images and behaviour logs"))

    describe = commands.add_parser("describe", help="print the parameter counts of a model, as JSON; reads no weights")
    describe.add_argument("--config", type=Path, required=True)
    describe.set_defaults(run=_describe)

    embed = commands.add_parser("embed", help="embed notes with a trained model")
    embed.add_argument("--model", required=True, help="folder of a trained model, or its hub name")
    embed.add_argument("--notes", type=Path, required=True, help="source folder, Parquet file or folder of Parquet")
    embed.add_argument("--config", type=Path, help="configuration whose settings of the source say how to read NOTES")
    embed.add_argument("--images", type=Path, help="folder that image_path is relative to; default: the notes' folder")
    embed.add_argument("--out", type=Path, required=True)
    embed.add_argument("--inputs", choices=["multimodal", "image", "text"], default="multimodal")
    embed.add_argument("--dim", type=int, help="truncate vectors to DIM dimensions and normalise them; default: all")
    embed.add_argument("--batch-notes", type=int, help="notes per batch; default: the default of export.batch_notes")
    embed.set_defaults(run=_embed)

    package = commands.add_parser("package", help="write a folder to share: weights, vision encoder, processor, card")
    package.add_argument("--model", type=Path, required=True, help="folder of a trained model")
    package.add_argument("--out", type=Path, required=True, help="a new folder")
    package.add_argument("--report", type=Path, help="dataset eval_recall, whose table goes into the card")
    package.add_argument("--layout", choices=["huggingface", "sentence-transformers"], default="huggingface")
    package.add_argument("--license", help="licence of the weights, in the hub's spelling; default: model.license")
    package.set_defaults(run=_package)


def _add_index_commands(index: argparse.ArgumentParser) -> None:
    commands = index.add_subparsers(required=True, metavar="build|search")
    build = commands.add_parser("build", help="build an index of embeddings")
    build.add_argument("--embeddings", type=Path, required=True)
    build.add_argument("--out", type=Path, required=True)
    add_options(build, IndexSettings, *IndexSettings.model_fields)
    build.set_defaults(run=_index_build)
    _add_index_search(commands.add_parser("search", help="print the nearest notes of a note, as JSON"))


def _add_index_search(search: argparse.ArgumentParser) -> None:
    search.add_argument("--index", type=Path, required=True)
    search.add_argument("--note-id", help="search for this note of the index")
    search.add_argument("--text", help="search for a note with this title; needs --model")
    search.add_argument("--image", type=Path, help="search for a note with this image; needs --model")
    search.add_argument("--queries", type=Path, help="search for each note of this table of embeddings: a line of each")
    search.add_argument(
        "--embeddings", type=Path, help="table that holds --note-id, where the index does not or has compressed it"
    )
    search.add_argument("--model", help="folder of the model that made the index's vectors, or its hub name")
    search.add_argument("--k", type=int, default=10, help="number of notes; the note itself is none of them")
    search.add_argument(
        "--params", help="FAISS's search parameters, such as efSearch=200, or exhaustive; default: those of the build"
    )
    search.set_defaults(run=_index_search)


def _index_search(options: argparse.Namespace) -> None:
    from notellm2_core.embeddings.table import read_embeddings
    from notellm2_core.inference import index_queries
    from notellm2_core.retrieval.index import Index

    by_note, by_model = options.note_id is not None, bool(options.text or options.image)
    if by_note + by_model + (options.queries is not None) != 1:
        raise ValueError("search by one of --note-id, --queries, or --text with or without --image.")
    if options.embeddings is not None and not by_note:
        raise ValueError("--embeddings belongs to --note-id.")
    if by_model != (options.model is not None):
        raise ValueError("--model belongs to --text and --image.")
    index = Index.load(options.index)
    if by_note:
        queries = index_queries.stored_note(index, options.note_id, options.embeddings)
    elif by_model:
        queries = index_queries.new_note(options.model, options.text, options.image, index.faiss_index.d)
    else:
        queries = read_embeddings(options.queries)
    for query, hits in index_queries.find_neighbours(index, queries, options.k, options.params):
        print(json.dumps(hits if options.queries is None else {"query_id": query, "hits": hits}))


def _evaluate(options: argparse.Namespace) -> None:
    from notellm2_core.evaluation.evaluate import evaluate_embeddings
    from notellm2_core.evaluation.pairs import LEFT_OUT

    metrics = evaluate_embeddings(options.embeddings, options.pairs, options.ks, options.queries)
    if left_out := ", ".join(f"{metrics[name]} {name.replace('_', ' ')}" for name in LEFT_OUT if metrics[name]):
        print(f"warning: {options.pairs} holds rows that are not counted: {left_out}", file=sys.stderr)
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
