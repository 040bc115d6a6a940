"""The server under load, with OpenAI's client: equality, throughput, bursts, prefixes, memory; also for other servers.

    treadle fetch smollm2
    python benchmarks/serving.py                                              # each answer compared with the one alone
    python benchmarks/serving.py --load throughput --quantize int8            # greedy, sampled, with log probabilities
    python benchmarks/serving.py --load burst --quantize int8 --rows 24       # pauses of streams while prompts arrive
    python benchmarks/serving.py --load prefix --rows 8 --prefix-cache 256MB  # a prompt that comes back
    python benchmarks/serving.py --load memory --requests 5000                # does memory grow?
    python benchmarks/serving.py --load throughput --before ../before         # in turns with another checkout
    python benchmarks/serving.py --load throughput --peer llama_cpp           # or xllamacpp, if it is installed

A server is started on a free port, in a process of its own. Rates are given per second of wall time and per second of
the server's CPU time, which other processes hardly change if the server has one thread.

    equality    `--alone` requests run one after the other, then all requests with `--flight` in flight, of 20 to 200
                tokens each; every tenth is abandoned in the middle of its stream. Decoding is greedy, and every
                response must equal the one alone. The target: at least 4 times the tokens a second of one at a time
    throughput  32 prompts of 26 to 393 tokens, 64 new tokens each, `--flight` in flight: greedy, with temperature 1 and
                top-p 0.95, and with the log probabilities of 5 tokens
    burst       16 prompts of 400 tokens arrive while 8 streams of 300 tokens run
    prefix      a prompt of 900 tokens, 50 others of 60 tokens, and the first one again
    memory      the resident size after 10% of the requests, and after all
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
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
WAYS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1, "top_p": 0.95, "seed": 1},
    "logprobs": {"temperature": 0, "logprobs": 5},
}
"""Request fields of the throughput load."""
PEERS = ("llama_cpp", "xllamacpp")
_XLLAMACPP = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel = sys.argv[1], int(sys.argv[2]), int(sys.argv[4])
params.n_ctx, params.cpuparams.n_threads, params.cpuparams_batch.n_threads = int(sys.argv[3]), *[int(sys.argv[5])] * 2
server = xllamacpp.Server(params)
time.sleep(10**9)
"""


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


class RunningServer:
    """A server in a process of its own: Treadle's, from this checkout or another one, or a peer's."""

    def __init__(self, options: argparse.Namespace, checkout: Path | None = None) -> None:
        self.options = options
        self.name = options.peer or (str(checkout) if checkout else "treadle")
        if options.peer:
            command, self.address = self._peer()
        else:
            command = self._treadle(has_prefix_cache=checkout is None)
        tree = (checkout or Path(__file__).parent.parent).resolve()  # `python -m` finds the package there
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment)
        self._clients: list[Any] = []
        if not options.peer:
            assert self.process.stdout is not None
            self.address = json.loads("".join(iter(self.process.stdout.readline, "}\n")) + "}")["address"]

    def _treadle(self, *, has_prefix_cache: bool) -> list[str]:
        options = self.options
        command = [sys.executable, "-m", "treadle", "serve", options.model, "--port", "0", "--json"]
        command += ["--backend", options.backend, "--threads", str(options.threads)]
        command += ["--context", str(options.context), "--rows", str(options.rows or options.flight)]
        more = ("quantize", "widen", *(("prefix_cache", "step_tokens") if has_prefix_cache else ()))
        for name in more:
            value = getattr(options, name)
            command += [f"--{name.replace('_', '-')}", str(value)] if value else []
        return command

    def _peer(self) -> tuple[list[str], str]:
        options = self.options
        if find_spec(options.peer) is None:
            raise SystemExit(f"{options.peer} is not installed")
        from treadle.program.places import find_place

        file, rows, threads = str(find_place(options.model)), options.rows or options.flight, str(options.threads)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        size = str(options.context * (rows if options.peer == "xllamacpp" else 1))
        commands = {
            "llama_cpp": ["-m", "llama_cpp.server", "--model", file, "--port", str(port), "--n_ctx", size,
                          "--n_threads", threads, "--n_threads_batch", threads],
            "xllamacpp": ["-c", _XLLAMACPP, file, str(port), size, str(rows), threads],
        }  # fmt: skip
        return [sys.executable, *commands[options.peer]], f"http://127.0.0.1:{port}/v1"

    @property
    def seconds(self) -> float:
        """Seconds of CPU time of the process (Linux)."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident(self) -> float:
        """Megabytes of memory of the process (Linux)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))

    def client(self) -> Any:
        import openai

        self._clients.append(openai.AsyncOpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=3600))
        return self._clients[-1]

    async def measured(self, load: Load) -> dict[str, Any]:
        """Return the facts of a load."""
        try:
            return await load(self, self.options)
        finally:
            while self._clients:
                await self._clients.pop().close()

    async def ready(self) -> None:
        """Wait until the server answers."""
        await self.measured(self._ready)

    async def _ready(self, _: RunningServer, options: argparse.Namespace) -> dict[str, Any]:
        import openai

        client = self.client()
        for _ in range(600):
            try:
                await client.completions.create(model=options.model, prompt="warm", max_tokens=4)
                return {}
            except openai.APIConnectionError:
                await asyncio.sleep(0.5)
        raise SystemExit(f"{self.name} does not answer")

    def end(self) -> int:
        """End the process; return its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--load", choices=list(LOADS), default="equality")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--flight", type=int, default=16)
    parser.add_argument("--rows", type=int, help="rows of the server; by default as many as requests in flight")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--alone", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200, help="equality: most tokens of a request; the fewest are 20")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--quantize", help="as in `treadle serve`: int8 rounds the activations of weights in blocks")
    parser.add_argument("--widen", help="as in `treadle serve`: blocks stores the weights in float32")
    parser.add_argument("--prefix-cache", help="as in `treadle serve`")
    parser.add_argument("--step-tokens", help="as in `treadle serve`")
    parser.add_argument("--before", type=Path, help="another checkout, which is measured in turns with this one")
    parser.add_argument("--peer", choices=PEERS, help="another server, in place of Treadle's")
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="throughput: kinds of requests"
    )
    parser.add_argument("--turns", type=int, default=1, help="number of measurements of each server")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    places = [None] if options.before is None else [options.before, None]
    servers = [RunningServer(options, place) for place in places]
    found: list[dict[str, Any]] = []
    try:
        for server in servers:
            asyncio.run(server.ready())
        for _ in range(options.turns):
            for server in servers:
                facts = asyncio.run(server.measured(LOADS[options.load]))
                found.append({"server": server.name, **facts})
                print(json.dumps(found[-1]) if options.json else lines_of(found[-1]), flush=True)
    finally:
        codes = [server.end() for server in servers]
    return int(any(each.get("wrong") or each.get("failed") for each in found) or any(codes[-1:]))


def lines_of(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"{name:>32}  {value:.4g}" if isinstance(value, float) else f"{name:>32}  {value}"
                     for name, value in facts.items())  # fmt: skip


# -- loads -------------------------------------------------------------------------------------------------------------


async def equality(server: RunningServer, options: argparse.Namespace) -> dict[str, Any]:
    import openai

    client = server.client()

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
    alone: dict[int, str | None] = {}
    tokens, started = 0, time.perf_counter()
    for asked in requests[: options.alone]:
        alone[asked.number], count = await ask(asked, False)
        tokens += count
    rate_alone = tokens / (time.perf_counter() - started) if options.alone else None

    wrong, failed, memory = list[int](), list[str](), list[float]()
    total = 0

    async def one(asked: Asked) -> None:
        nonlocal total
        try:
            text, count = await ask(asked, asked.is_left)
        except openai.APIError as error:
            failed.append(str(error))
            return
        total += count
        if not asked.is_left and asked.number in alone and text != alone[asked.number]:
            wrong.append(asked.number)
        if asked.number % max(1, len(requests) // 10) == 0:
            memory.append(server.resident)

    started, seconds = time.perf_counter(), server.seconds
    await in_flight([one(asked) for asked in requests], options.flight)
    rate, rate_of_cpu = total / (time.perf_counter() - started), total / (server.seconds - seconds)
    return {
        "requests": len(requests),
        "compared": sum(1 for asked in requests if asked.number in alone and not asked.is_left),
        "left": sum(asked.is_left for asked in requests),
        "wrong": wrong,
        "failed": failed,
        "tokens_per_second": rate,
        "tokens_per_cpu_second": rate_of_cpu,
        "tokens_per_second_alone": rate_alone,
        "times_alone": rate / rate_alone if rate_alone else None,
        "target": None if not rate_alone else "met" if rate / rate_alone >= TARGET else "missed",
        "resident_mb": [round(each) for each in [*memory, server.resident]],
    }


async def throughput(server: RunningServer, options: argparse.Namespace) -> dict[str, Any]:
    client, rng = server.client(), np.random.default_rng(5)
    sizes = np.linspace(26, 393, 32).astype(int)
    prompts = [prompt_of(int(size), rng) for size in rng.permutation(sizes)]
    found: dict[str, Any] = {}
    for way in ("warm", *options.ways):
        fields = WAYS.get(way, WAYS["greedy"])

        async def one(number: int, way: str = way, fields: Mapping[str, Any] = fields) -> int:
            text = f"{way} {time.monotonic_ns()} {prompts[number]}"  # no prefix of an earlier prompt
            plain = {"model": options.model, "prompt": text, "max_tokens": 64, **fields}
            more = {} if options.peer else {"extra_body": {"ignore_eos": True}}
            if options.before is not None:
                more = {}
            done = await client.completions.create(**plain, **more)
            return int(done.usage.completion_tokens)

        started, seconds = time.perf_counter(), server.seconds
        tokens = sum(await in_flight([one(number) for number in range(32)], options.flight))
        found[f"{way}_tokens_per_second"] = tokens / (time.perf_counter() - started)
        found[f"{way}_tokens_per_cpu_second"] = tokens / (server.seconds - seconds)
    for way in options.ways if "greedy" in options.ways else ():
        found[f"{way}_of_greedy"] = found[f"{way}_tokens_per_cpu_second"] / found["greedy_tokens_per_cpu_second"]
    return {name: value for name, value in found.items() if not name.startswith("warm")}


async def burst(server: RunningServer, options: argparse.Namespace) -> dict[str, Any]:
    client, rng = server.client(), np.random.default_rng(6)
    times: list[list[float]] = [[] for _ in range(8)]
    began = asyncio.Event()

    async def stream(number: int) -> None:
        plain = {"model": options.model, "prompt": prompt_of(20, rng), "max_tokens": 300, "temperature": 0}
        async for _ in await client.completions.create(**plain, stream=True):
            times[number].append(time.perf_counter())
            if min(map(len, times)) >= 20:
                began.set()

    async def first(number: int) -> float:
        await began.wait()
        plain = {"model": options.model, "prompt": prompt_of(400, rng), "max_tokens": 64, "temperature": 0}
        started, seconds = time.perf_counter(), 0.0
        async for _ in await client.completions.create(**plain, stream=True):
            seconds = seconds or time.perf_counter() - started
        return seconds

    streams = [asyncio.ensure_future(stream(number)) for number in range(8)]
    firsts = await asyncio.gather(*[first(number) for number in range(16)])
    await asyncio.gather(*streams)
    pauses = [np.diff(each) for each in times]
    return {
        "longest_pause_of_median": float(max(each.max() / np.median(each) for each in pauses)),
        "median_pause_ms": float(np.median(np.concatenate(pauses)) * 1e3),
        "longest_pause_ms": float(np.concatenate(pauses).max() * 1e3),
        "median_first_token_s": float(np.median(firsts)),
        "longest_first_token_s": float(max(firsts)),
    }


async def prefix(server: RunningServer, options: argparse.Namespace) -> dict[str, Any]:
    client, rng = server.client(), np.random.default_rng(7)

    async def ask(prompt: str) -> Any:
        done = await client.completions.create(model=options.model, prompt=prompt, max_tokens=4, temperature=0)
        return done.choices[0].text, done.usage

    long = prompt_of(900, rng)
    text, used = await ask(long)
    await in_flight([ask(prompt_of(60, rng)) for _ in range(50)], 8)
    again, usage = await ask(long)
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return {
        "prompt_tokens": used.prompt_tokens,
        "computed_again": usage.prompt_tokens - cached,
        "wrong": [] if text == again else [0],
    }


async def memory(server: RunningServer, options: argparse.Namespace) -> dict[str, Any]:
    client, sizes = server.client(), list[float]()

    async def one(number: int) -> None:
        plain = {"model": options.model, "prompt": f"{number} {PROMPTS[number % len(PROMPTS)]}", "max_tokens": 20}
        await client.completions.create(**plain, temperature=number % 2, seed=number)
        if (number + 1) % max(1, options.requests // 10) == 0:
            sizes.append(server.resident)

    await in_flight([one(number) for number in range(options.requests)], options.flight)
    sizes.append(server.resident)
    return {"resident_mb": [round(each) for each in sizes], "last_of_first": sizes[-1] / sizes[0]}


Load = Callable[[RunningServer, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]
LOADS: Mapping[str, Load] = {
    "equality": equality, "throughput": throughput, "burst": burst, "prefix": prefix, "memory": memory,
}  # fmt: skip


def drawn(options: argparse.Namespace) -> list[Asked]:
    rng = np.random.default_rng(0)
    least = min(20, options.tokens)
    counts = rng.integers(least, options.tokens + 1, options.requests)
    return [Asked(i, PROMPTS[i % len(PROMPTS)], int(count)) for i, count in enumerate(counts)]


def prompt_of(size: int, rng: np.random.Generator) -> str:
    """Return a text of about this number of tokens that no other text begins with."""
    words = (
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "dog",
        "ran",
        "to",
        "his",
        "house",
        "in",
        "rain",
        "with",
        "no",
    )
    return " ".join(str(word) for word in rng.choice(words, size))


async def in_flight(tasks: list[Coroutine[Any, Any, Any]], count: int) -> list[Any]:
    """Run coroutines, at most `count` at a time; return their results."""
    turns = asyncio.Semaphore(count)

    async def one(task: Coroutine[Any, Any, Any]) -> Any:
        async with turns:
            return await task

    return await asyncio.gather(*[one(task) for task in tasks])


if __name__ == "__main__":
    sys.exit(main())
