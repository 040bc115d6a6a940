"""`treadle embed`: sentence embeddings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, Column, ModelName, OptionKeywords


@command("embed", takes=["embed"])
def embed_sentences(
    model: ModelName,
    sentences: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SENTENCES", help="Sentences to embed. By default the lines of --file or of standard input."
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option(metavar="PATH", help="Text file with one sentence per line; - is standard input.")
    ] = None,
    column: Column = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Print pairwise similarities instead of vectors.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write DIR/embeddings.npy.", show_default=False)
    ] = None,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Embed sentences with a sentence encoder, such as the fetched minilm; print one vector per line."""
    from treadle.files.nearest_names import check_folder
    from treadle.npy_files import write_npy
    from treadle.program.given_texts import read_sentences
    from treadle.progress import working
    from treadle.reporting.arrays import shortest, similarity_tables
    from treadle.reporting.counts import counted
    from treadle.reporting.tables import console, print_whole
    from treadle.sentence_embedding import SentenceEmbedder

    check_folder(output, "embeddings.npy")
    texts = read_sentences(sentences or [], file, column, command=["embed", model])
    with working(f"compiling {model}", shown=not as_json):
        embedder = SentenceEmbedder.open(model, **keywords)
    with working(f"embedding {counted(len(texts), 'sentence')}", shown=not as_json):
        embedded = embedder.embed_reporting(texts)
    vectors, near = embedded.vectors, embedded.vectors @ embedded.vectors.T
    files = write_npy(output, {"embeddings": vectors}) if output is not None else []
    cut = embedded.cut
    if cut and not as_json:
        which = ", ".join(str(i + 1) for i in cut[:10]) + (", ..." if len(cut) > 10 else "")
        print(
            f"truncated to {counted(embedder.tokenizer.max_tokens or 0, 'token')}: "
            f"sentence{'s' * (len(cut) > 1)} {which}",
            file=sys.stderr,
        )
    if as_json:
        facts: dict[str, Any] = {
            "model": embedder.model.name,
            "backend": embedder.model.backend,
            "sentences": [
                {"text": text, "tokens": tokens, "cut": i in cut, "vector": shortest(vector)}
                for i, (text, tokens, vector) in enumerate(zip(texts, embedded.tokens, vectors, strict=True))
            ],
            "files": list(map(str, files)),
        }
        print_json({**facts, "similarity": shortest(near)} if similarity else facts)
    elif similarity:
        for table in similarity_tables(texts, near, console().width if sys.stdout.isatty() else None):
            print_whole(table)
    elif not files:
        for vector in vectors:
            print(" ".join(map(str, shortest(vector))))
    for written in files if not as_json else []:
        print(f"wrote {written}")
