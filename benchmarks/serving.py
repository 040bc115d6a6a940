"""The server under load: OpenAI's client, many texts in flight, each compared with the same text alone.

    treadle fetch smollm2
    python benchmarks/serving.py [--requests 200] [--flight 16] [--alone 200] [--widen blocks] [--json]
    python benchmarks/serving.py --requests 5000 --alone 0 --tokens 20      # does memory grow?

A server is started on a free port, in a process of its own. First `--alone` requests run one after the other; then all
requests, with `--flight` of them in flight, of 20 to 200 tokens each. Every tenth is abandoned in the middle of its
stream. Decoding is greedy, so that every completed response must equal the one alone, character by character. The
target: at least 4 times the tokens a second of one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TARGET = 4.0
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was",
    "To make bread one needs",
    "def fibonacci(n):",
    "The three laws of motion say that",
    "Dear Sir or Madam,",
    "In the year 2050 people",
    "The difference between a list and a tuple is",
)
LEAVES = 10  # one in this many is abandoned


@dataclass(frozen=True)
class Asked:
    """One request: a prompt, and the number of tokens."""

    number: int
    prompt: str
    most: int

    @property
    def is_left(self) -> bool:
        """True if its stream is abandoned in the middle."""
        return self.number % LEAVES == LEAVES - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--flight", type=int, default=16)
    parser.add_argument("--alone", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200, help="most tokens of a request; the fewest are 20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--quantize", help="as in `treadle serve`: int8 rounds the activations of weights in blocks")
    parser.add_argument("--widen", help="as in `treadle serve`: blocks stores the weights in float32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    command = [sys.executable, "-m", "treadle", "serve", options.model, "--port", "0", "--json"]
    command += ["--backend", options.backend, "--threads", str(options.threads), "--context", "512"]
    command += ["--rows", str(options.flight)]
    for way in ("quantize", "widen"):
        command += [f"--{way}", getattr(options, way)] if getattr(options, way) else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = json.loads("".join(iter(server.stdout.readline, "}\n")) + "}")["address"]
        found = asyncio.run(load(address, options, server.pid))
    finally:
        server.terminate()
        found_code = server.wait(60)
    found["ended"] = found_code
    report(found, options.json)
    return int(bool(found["wrong"]))


def drawn(options: argparse.Namespace) -> list[Asked]:
    rng = np.random.default_rng(0)
    least = min(20, options.tokens)
    counts = rng.integers(least, options.tokens + 1, options.requests)
    return [Asked(i, PROMPTS[i % len(PROMPTS)], int(count)) for i, count in enumerate(counts)]


async def load(address: str, options: argparse.Namespace, pid: int) -> dict[str, Any]:
    import openai

    client = openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=3600)

    async def ask(asked: Asked, leaves: bool) -> tuple[str | None, int]:
        options_of = {"model": options.model, "prompt": asked.prompt, "max_tokens": asked.most, "temperature": 0}
        if not leaves:
            done = await client.completions.create(**options_of)
            return done.choices[0].text, done.usage.completion_tokens
        count = 0
        stream = await client.completions.create(**options_of, stream=True)
        async for _ in stream:
            count += 1
            if count == asked.most // 2:
                await stream.close()
                break
        return None, count

    requests = drawn(options)
    await ask(Asked(0, "warm", 4), False)
    alone: dict[int, str | None] = {}
    tokens, started = 0, time.perf_counter()
    for asked in requests[: options.alone]:
        alone[asked.number], count = await ask(asked, False)
        tokens += count
    rate_alone = tokens / (time.perf_counter() - started) if options.alone else None

    turns, wrong, failed, memory = asyncio.Semaphore(options.flight), list[int](), list[str](), list[float]()
    total = 0
    started = time.perf_counter()

    async def one(asked: Asked) -> None:
        nonlocal total
        async with turns:
            try:
                text, count = await ask(asked, asked.is_left)
            except openai.APIError as error:
                failed.append(str(error))
                return
            total += count
            if not asked.is_left and asked.number in alone and text != alone[asked.number]:
                wrong.append(asked.number)
            if asked.number % 100 == 99:
                memory.append(resident(pid))

    await asyncio.gather(*[one(asked) for asked in requests])
    memory.append(resident(pid))
    rate = total / (time.perf_counter() - started)
    return {
        "model": options.model,
        "requests": len(requests),
        "flight": options.flight,
        "compared": sum(1 for asked in requests if asked.number in alone and not asked.is_left),
        "left": sum(asked.is_left for asked in requests),
        "wrong": wrong,
        "failed": failed,
        "tokens_per_second": rate,
        "tokens_per_second_alone": rate_alone,
        "times_alone": rate / rate_alone if rate_alone else None,
        "resident_mb": memory,
    }


def resident(pid: int) -> float:
    """Return the megabytes of memory of a process (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def report(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    print(f"{found['model']}: {found['requests']} requests, {found['flight']} in flight, {found['left']} left early")
    print(f"  {found['tokens_per_second']:.0f} tokens per second")
    if found["times_alone"] is not None:
        met = "met" if found["times_alone"] >= TARGET else "missed"
        print(f"  {found['times_alone']:.2f} times {found['tokens_per_second_alone']:.0f}, one at a time: {met}")
    print(f"  {found['compared']} responses compared with the same requests alone, {len(found['wrong'])} differ")
    print(f"  {len(found['failed'])} failed{': ' + found['failed'][0] if found['failed'] else ''}")
    memory = found["resident_mb"]
    print(f"  memory {memory[0]:.0f} MB after 100, {max(memory):.0f} at most, {memory[-1]:.0f} in the end")


if __name__ == "__main__":
    sys.exit(main())
