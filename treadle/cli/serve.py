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


@command("serve", takes=["generate"])
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
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all interfaces.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", help="Port to listen on; 0 for any free port.", min=0, max=65535)
    ] = 8000,
    rows: Annotated[int, typer.Option(metavar="N", help="Maximum number of texts generated at a time.", min=1)] = 16,
    context: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of tokens of a text, including its prompt.", min=1)
    ] = 2048,
    queue: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of waiting texts; further ones get HTTP status 429.", min=1)
    ] = 256,
    seconds: Annotated[float, typer.Option(metavar="S", help="Time limit of a request in seconds.", min=0.1)] = 600.0,
    body: Annotated[int, typer.Option(metavar="BYTES", help="Maximum size of a request in bytes.", min=1)] = 1 << 20,
    key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the API key that clients must send.", show_default=False),
    ] = None,
    reuse: Annotated[
        bool | None,
        typer.Option(
            "--reuse/--no-reuse",
            help="Reuse cached prefixes of prompts. By default if this keeps answers bitwise identical.",
            show_default=False,
        ),
    ] = None,
    *,
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
    from treadle.serving.application import Limits
    from treadle.serving.models import Opening, ServedWriter
    from treadle.serving.running import serve

    key = None if key_file is None else _read_key(key_file)
    opening = Opening(rows, context, queue, reuse)
    served = []
    for model in models:
        with working(f"compiling {model}", shown=not as_json):
            served.append(opening.open(model, **keywords))
    names = [each.name for each in served]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two models would be served as {twice}", hint="NAME=MODEL, to rename one of them")

    def ready(address: str) -> None:
        if as_json:
            models = [{"name": each.name, "writes": isinstance(each, ServedWriter)} for each in served]
            print_json({"address": address, "models": models})
            sys.stdout.flush()
            return
        for each in served:
            print(f"{each.name}: {each.description}", file=sys.stderr)
        if key is None and host not in ("127.0.0.1", "::1", "localhost"):
            print("anyone who can reach this address can send requests: --key-file sets an API key", file=sys.stderr)
        print(f"serving at {address}", file=sys.stderr, flush=True)

    serve(served, host=host, port=port, limits=Limits(body=body, seconds=seconds), key=key, ready=ready)


def _read_key(path: Path) -> str:
    """Return the key in a file's first line. Raises UsageError if there is none."""
    from treadle.files.contained_files import read_regular
    from treadle.ir.errors import UsageError

    data = read_regular(path, 1 << 16, str(path))
    try:
        key = data.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or len(key.split()) != 1:
        raise UsageError(f"{path} has no key", hint="one word of ASCII characters")
    return key
