"""Run MiniLM's exported page in headless Chromium: `python -m tests.fuzz.web_pages [--text TEXT] [--tokens 32]`.

The model is exported by `treadle export minilm --inputs lengths --to web`, served from this machine, and run on
SwiftShader on one text, padded to a number of tokens. The hidden states of the text's tokens are compared with NumPy's,
within 1e-4. Prints the seconds that the browser takes to compile each kernel; one that takes more than a minute ends
the run. The exit status is 1 for a difference. `playwright` and `chromium` must be installed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from treadle.__main__ import main as command
from treadle.sentence_embedding import SentenceEmbedder

Array = np.ndarray[Any, Any]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
)
"""Flags of Chromium for WebGPU without a GPU."""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine, and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}"  # a browser has WebGPU only for a secure origin
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_CHANGED = """(text) => 'ready' in document.documentElement.dataset
    || document.getElementById('state').textContent !== text"""
_RUN = """async (inputs) => {
    try {
        return Object.fromEntries(
            Object.entries(await model.run(inputs)).map(([name, array]) => [name, Array.from(array)]));
    } catch (error) {
        return error.message;
    }
}"""


def run_page(
    folder: Path, runs: Sequence[Mapping[str, list[float]]], seconds: int = 60
) -> tuple[list[dict[str, Array] | str], dict[str, float]]:
    """Run an exported page in Chromium, once for each set of inputs. Return the outputs of each run, flat, or the text
    of its error, and the seconds of each kernel's compilation, by the kernel's file.
    """
    from playwright.sync_api import sync_playwright

    facts = json.loads((folder / "model.json").read_text())
    with served(folder) as address, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=list(FLAGS))
        page = chromium.new_page()
        page.set_default_timeout(1000 * seconds)
        page.goto(f"{address}/index.html")
        while not page.evaluate("'ready' in document.documentElement.dataset"):
            state = page.inner_text("#state")
            try:
                page.wait_for_function(_CHANGED, arg=state)
            except Exception as error:
                raise AssertionError(f"no progress in {seconds} s: {state}") from error
        state = page.inner_text("#state")
        assert state == "ready", state
        made = [page.evaluate(_RUN, dict(inputs)) for inputs in runs]
        times = page.evaluate("model.kernels.map((kernel) => kernel.seconds)")
        chromium.close()
    arrays = [
        each if isinstance(each, str) else {name: np.array(values, np.float64) for name, values in each.items()}
        for each in made
    ]
    return arrays, {kernel["file"]: time for kernel, time in zip(facts["kernels"], times, strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", default="A compiler for transformers runs this text in a browser.")
    parser.add_argument("--tokens", type=int, default=32, help="number of tokens of the page")
    options = parser.parse_args()
    embedder = SentenceEmbedder.open("minilm", backend="numpy")
    batch = embedder.tokenizer.batch([options.text])
    (count,) = batch.lengths.tolist()
    tokens = np.zeros((1, options.tokens), np.int64)
    tokens[0, :count] = batch.ids[0, :count]
    with tempfile.TemporaryDirectory() as name:
        sizes = f"B=1,S={options.tokens}"
        sys.argv = ["treadle", "export", "minilm", "--inputs", "lengths", "--to", "web", "-o", name, "--sizes", sizes]
        with suppress(SystemExit):
            command()
        (made,), times = run_page(Path(name), [{"tokens": tokens[0].tolist(), "lengths": [count]}])
    assert not isinstance(made, str), made
    for file, seconds in times.items():
        print(f"{file}: compiled in {seconds:.1f} s")
    expected = np.asarray(embedder.model(tokens=tokens, lengths=np.array([count]))["hidden"])
    worst = float(np.abs(made["hidden"].reshape(expected.shape) - expected)[:, :count].max())
    print(f"{count} tokens in Chromium: off by {worst:.1e}")
    return not worst <= 1e-4


if __name__ == "__main__":
    sys.exit(main())
