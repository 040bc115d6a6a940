"""Serve a model over HTTP, and use it with OpenAI's client: a completion, a stream, and several requests at once.

    pip install openai
    python examples/openai_server.py MODEL "The capital of France is" [BACKEND]

MODEL generates text: a folder, a GGUF file, or a fetched model such as smollm2. `treadle serve MODEL` alone serves
until Ctrl-C (docs/serving.md).

Cost: SmolLM2-135M (98 MB, 4 bits) with 4 rows of 128 tokens took 4.4 s of CPU time and 230 MB of memory for all
requests and the start, on two cores of an EPYC with tvm and compiled kernels in the cache.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

try:
    import openai
except ModuleNotFoundError:
    raise SystemExit("this example needs OpenAI's client: pip install openai") from None


def start(model: str, backend: str) -> tuple[subprocess.Popen, dict]:
    """Start a server on a free port. Return its process, and what it prints when it listens."""
    command = [sys.executable, "-m", "treadle", "serve", model, "--backend", backend, "--port", "0"]
    command += ["--rows", "4", "--context", "128", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    printed = ""
    for line in server.stdout:  # one JSON object, whose last line is a brace
        printed += line
        if line == "}\n":
            return server, json.loads(printed)
    raise SystemExit(server.wait())  # the server has printed the reason


def main(model: str, prompt: str, backend: str = "tvm", most: int = 24) -> None:
    started = time.perf_counter()
    server, facts = start(model, backend)
    try:
        client = openai.OpenAI(base_url=facts["address"], api_key="none")
        name = client.models.list().data[0].id
        print(f"{name} at {facts['address']} after {time.perf_counter() - started:.1f} s")

        def complete(text: str) -> str:
            done = client.completions.create(model=name, prompt=text, max_tokens=most, temperature=0)
            return done.choices[0].text

        print(prompt + complete(prompt))

        print("streamed:", end=" ")
        for piece in client.completions.create(model=name, prompt=prompt, max_tokens=most, stream=True, seed=1):
            print(piece.choices[0].text, end="", flush=True)
        print()

        # The server computes requests of several clients together, each in a row of its own.
        with ThreadPoolExecutor(4) as clients:
            started = time.perf_counter()
            answers = list(clients.map(complete, [prompt] * 4))
        print(f"four at once: {time.perf_counter() - started:.2f} s, equal: {len(set(answers)) == 1}")
    finally:
        server.terminate()
        print("exit status of the server:", server.wait(timeout=60))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) - 1 <= 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
