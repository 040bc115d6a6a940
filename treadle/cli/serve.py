"""`treadle serve`: models behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from treadle.cli.application import command, print_json
from treadle.cli.completing import complete_model
from treadle.cli.options import OptionKeywords
from treadle.serving.serving_settings import ServingSettings


@command("serve", takes=["generate"], defaults={"target": None}, settings=[ServingSettings])
def serve_models(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Models that generate or embed: each as MODEL, or as NAME=MODEL.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ],
    *,
    settings: ServingSettings,
    keywords: OptionKeywords,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the server is ready.")] = False,
) -> None:
    """Serve completions, chat and embeddings to OpenAI clients until interrupted."""
    from treadle.files.installation import pip_install
    from treadle.ir.errors import FrontendError, UsageError
    from treadle.progress import working

    missing = [name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise FrontendError(f"serving needs the package {missing[0]}", hint=pip_install("serve"))
    from treadle.serving.models import ServedWriter
    from treadle.serving.running import serve

    is_shared = len({each.rpartition("=")[2] for each in models}) > 1
    _refuse_declarations_together(models, keywords.get("weights"), keywords.get("tokenizer"))
    key, log = settings.read_key(), settings.open_log()
    served = []
    for model in models:
        with working(f"compiling {model}", shown=not as_json):
            served.append(settings.opening.open(model, prefers_own=is_shared, **keywords))
    names = [each.name for each in served]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two models would be served as {twice}", hint="NAME=MODEL, to rename one of them")

    def ready(address: str) -> None:
        for each in served:
            for note in each.notes:
                print(note, file=sys.stderr)
        if as_json:
            models = [{"name": each.name, "writes": isinstance(each, ServedWriter)} for each in served]
            print_json({"address": address, "models": models})
            sys.stdout.flush()
            return
        for each in served:
            print(f"{each.name}: {each.description}", file=sys.stderr)
        if key is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
            print("anyone who can reach this address can send requests: --key-file sets an API key", file=sys.stderr)
        print(f"serving at {address}", file=sys.stderr, flush=True)

    serve(
        served,
        host=settings.host,
        port=settings.port,
        limits=settings.limits,
        key=key,
        log=log,
        origins=settings.origins,
        ready=ready,
    )


def _refuse_declarations_together(models: list[str], weights: object, tokenizer: object) -> None:
    """Raise UsageError for several models with a declaration among them, whose weights no option names."""
    from treadle.files.shown_names import printable
    from treadle.frontends.model_folder import ModelFolder
    from treadle.ir.errors import UsageError
    from treadle.program.further_models import compiled_apart
    from treadle.program.source import ModelSource
    from treadle.program.trained_folders import DeclarationReference

    named = [each.partition("=") if "=" in each else ("", "", each) for each in models]
    if len({place for _, _, place in named}) < 2:
        return
    of_one = Path(str(weights)) if weights is not None else None
    stored = DeclarationReference.read(ModelFolder.find(of_one)) if of_one is not None and of_one.is_dir() else None
    commands, served = [], []
    for name, equals, place in named:
        function = place.rstrip("/").rpartition("/")[2].rpartition(":")[2]
        file = f"{name or function}.treadle"
        folder = str(of_one) if stored is not None and stored.label == place else "FOLDER"
        found = compiled_apart(ModelSource.open(place), place, file, folder)
        if found is not None:
            commands.append(f"`{found[1]}`")
        served.append(f"{name}{equals}{place if found is None else file}")
    if tokenizer is not None:  # of the models that have none
        served.append(f"--tokenizer {printable(str(tokenizer))}")
    if commands:
        raise UsageError(
            "--weights names the weights of one model, and several models are served",
            received=f"serve {' '.join(models)}",
            hint=f"{', '.join(commands)}, then `treadle serve {' '.join(served)}`",
        )
