"""The server as a process, without serving: its address, the arguments of uvicorn, and models as they are opened."""

from __future__ import annotations

import gc
import mmap
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from treadle.chatting.prompts import ChatPrompt
from treadle.files import available_memory
from treadle.ir.errors import TreadleError, UsageError
from treadle.ir.target import Target
from treadle.program.options import CompileOptions
from treadle.runtime.row_inputs import RowPrompt
from treadle.serving import models, running
from treadle.serving.application import Limits
from treadle.serving.models import CAPACITY, QUEUE, ROWS, Opening, ServedEmbedder, ServedWriter
from treadle.serving.refusals import RequestRefusal, refused
from treadle.serving.requests import Prompt
from treadle.serving.running import CONNECTIONS, serve
from treadle.serving.serving_settings import ServingSettings

# -- the process -------------------------------------------------------------------------------------------------------


class _Recorder:
    """A stand-in for uvicorn and its server that records its arguments."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.handlers: list[Any] = []
        self.listening: Any = None
        self.drain = 0.0
        self.signals: list[int] = []
        self.frozen = 0

    def config(self, application: Any, **settings: Any) -> Any:
        self.settings = {"application": application, **settings}
        return "config"

    def process(self, config: Any, server: Any, drain: float, ready: Any) -> Any:
        assert config == "config"
        self.drain, self.ready = drain, ready
        return SimpleNamespace(run=self.run, handle_exit=lambda number, frame: self.signals.append(number))

    def run(self, sockets: list[socket.socket]) -> None:
        (self.listening,) = sockets
        assert self.listening.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        socket.create_connection(self.listening.getsockname()[:2], timeout=10).close()
        self.handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        self.frozen = gc.get_freeze_count()
        if threading.current_thread() is threading.main_thread():
            signal.raise_signal(signal.SIGTERM)
        self.ready()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    made = _Recorder()
    monkeypatch.setattr(running.uvicorn, "Config", made.config)
    monkeypatch.setattr(running, "_Process", made.process)
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a collection of all tests' objects takes seconds
    return made


@pytest.mark.parametrize(("drain", "seconds"), [(None, 30.0), (0.2, 0.2)])
def test_a_server_listens_before_it_says_so(drain: float | None, seconds: float, recorder: _Recorder) -> None:
    said: list[str] = []
    given: dict[str, Any] = {"limits": Limits(), "ready": said.append}
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    serve([], host="127.0.0.1", port=0, **given, **({} if drain is None else {"drain": drain}))
    (address,) = said
    assert address.startswith("http://127.0.0.1:") and address.endswith("/v1")
    assert recorder.settings.pop("application") is not None
    assert recorder.settings == {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "limit_concurrency": 1024,
        "timeout_graceful_shutdown": 2,
    }
    assert recorder.drain == seconds
    assert CONNECTIONS == 1024
    assert recorder.frozen > 0 == gc.get_freeze_count(), "the collector skips the models' objects only meanwhile"
    assert recorder.signals == [signal.SIGTERM], "a signal before uvicorn has its handlers ends the server, too"
    assert recorder.listening.fileno() == -1, "it is closed"
    assert all(mine is not other for mine, other in zip(recorder.handlers, before, strict=True))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_server_in_a_thread_leaves_signals_alone(recorder: _Recorder) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    how: dict[str, Any] = {"host": "127.0.0.1", "port": 0, "limits": Limits()}
    thread = threading.Thread(target=serve, args=([],), kwargs=how)
    thread.start()
    thread.join(20)
    assert recorder.handlers == before


def test_server_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Socket:
        def __init__(self, *kind: Any) -> None:
            calls.append(kind)

        def __getattr__(self, name: str) -> Any:
            return lambda *given: calls.append((name, *given))

    monkeypatch.setattr(running.socket, "socket", Socket)
    for host, family in (("::1", socket.AF_INET6), ("0.0.0.0", socket.AF_INET)):
        calls.clear()
        running._listen(host, 5)
        reuse = ("setsockopt", socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        assert calls == [(family, socket.SOCK_STREAM), reuse, ("bind", (host, 5)), ("listen", 2048)]


def test_unavailable_addresses_are_reported() -> None:
    with pytest.raises(UsageError, match=r"the server cannot listen at 127\.0\.0\.1, port 99999") as error:
        running._listen("127.0.0.1", 99_999)
    hint: Any = error.value.hint
    assert (hint, hint.command) == ("another port, or host", "another --port, or --host")
    assert error.value.received


# -- models ------------------------------------------------------------------------------------------------------------


def writer(context: int | None = None, **more: Any) -> Any:
    """A language model that records the arguments of its session."""
    made = SimpleNamespace(sessions=[], images=None, **more)

    def session(**how: Any) -> Any:
        made.sessions.append(how)
        held = SimpleNamespace(chunk=9, rows=(), free=3, capacity=how["capacity"], nbytes=2_600_000, vocabulary=5)
        held.prompt = lambda ids, **inputs: RowPrompt(ids)
        return held

    made.model = SimpleNamespace(derived=SimpleNamespace(context=context))
    made.positions = None
    made.session, made.read_images = session, list
    return made


@pytest.mark.parametrize(("context", "capacity"), [(None, 50), (49, 49), (51, 50)])
def test_rows_are_as_long_as_the_model_takes(
    context: int | None, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "free_memory", lambda: None)
    held = writer(context)
    served = ServedWriter("m", held, rows=3, capacity=50, queue=4)
    assert held.sessions == [{"rows": 3, "capacity": capacity, "resumes": None}]
    assert served.scheduler.queue == 4
    assert served.description == f"3 rows of {capacity} tokens, 3 MB of caches"


@pytest.mark.parametrize(
    ("free", "rows"), [(None, 16), (32 * 2_600_000, 16), (32 * 2_600_000 - 1, 15), (8_000_000, 1), (2_600_000, 1)]
)
def test_rows_are_as_many_as_half_of_the_free_memory_takes(
    free: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "free_memory", lambda: free)
    held = writer()
    served = ServedWriter("m", held)
    assert held.sessions[-1] == {"rows": rows, "capacity": 2048, "resumes": None}
    assert bool(served.notes) == (rows < 16)
    assert all("of memory are free" in note for note in served.notes)


@pytest.mark.parametrize(
    ("sizes", "free"), [({"rows": 3}, 7_000_000), ({}, 2_000_000), ({"rows": 2, "prefixes": 10**9}, 10**9)]
)
def test_caches_larger_than_memory_are_refused(sizes: Any, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "free_memory", lambda: free)
    with pytest.raises(UsageError, match="there is not enough memory for the caches of m") as error:
        ServedWriter("m", writer(), **sizes)
    assert str(error.value.received).endswith("are free")


def test_a_context_beyond_the_models_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "free_memory", lambda: None)
    held = writer()
    held.positions = 8192
    served = ServedWriter("m", held, rows=1, capacity=20_000)
    assert served.notes == ["m has 8,192 positions, so its rows have 8,192 tokens, not 20,000"]
    assert held.sessions == [{"rows": 1, "capacity": 8192, "resumes": None}]
    assert ServedWriter("m", held, rows=1).notes == []


def test_free_memory_is_the_least_of_the_machines_and_the_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(available_memory, "_GROUPS", [(tmp_path, "max", "current", "inactive_file")])
    assert available_memory.free_memory() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\n")
    assert available_memory.free_memory() == 5120
    for name, text in (("max", "max"), ("current", "4000"), ("memory.stat", "anon 1\ninactive_file 1000\n")):
        (tmp_path / name).write_text(text)
    assert available_memory.free_memory() == 5120, "the group has no limit"
    (tmp_path / "max").write_text("6000\n")
    assert available_memory.free_memory() == 3000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux allocates pages on request")
def test_pages_that_were_allocated_in_advance_cause_no_faults() -> None:
    memory = np.zeros(1 << 23, np.uint8)
    memory[5000] = 7
    part = memory[4000 : 1 << 22]
    if not available_memory.prefault(part):
        pytest.skip("the kernel is older than 5.14")
    assert memory[5000] == 7
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    part[:: mmap.PAGESIZE] += 1
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 20
    assert not available_memory.prefault(memory[:0])


def test_systems_that_allocate_no_pages_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not available_memory.prefault(np.zeros(9000, np.uint8))


@pytest.mark.parametrize(
    ("given", "report"),
    [
        ({"prefix_cache": "much"}, "prefix_cache must be a number of bytes"),
        ({"log_file": Path("x")}, "only --log accepts --log-file"),
        ({"origins": ("example.org",)}, "an origin is a scheme and a host"),
        ({"origins": ("*", "https://a.b/c")}, "an origin is a scheme and a host"),
        ({"log": "xml"}, "there is no such format of the request log"),
        ({"log": "json", "log_file": Path("/nowhere/x")}, "the request log /nowhere/x cannot be written"),
    ],
)
def test_settings_of_a_server(given: dict[str, Any], report: str) -> None:
    with pytest.raises(UsageError, match=report):
        ServingSettings(**given).open_log()
    whole = ServingSettings(prefix_cache="2MB", step_tokens=9, rows=3, origins=("*", "http://a.b:9"))
    assert whole.opening == Opening(3, None, 256, None, 9, 2_000_000, clips=False)
    assert (whole.open_log(), whole.read_key(), whole.limits) == (None, None, Limits())


def test_a_template_gets_the_variables_that_it_uses() -> None:
    served = ServedWriter.__new__(ServedWriter)
    served.name = "m"
    template: Any = SimpleNamespace(
        variables=frozenset({"mood", "messages", "bos", "reasoning_effort"}), special=["bos"]
    )
    found = served._template_values(template, {"mood": 1, "reasoning_effort": "none"})
    assert found == {"mood": 1, "reasoning_effort": "none"}
    for name, field in (("messages", "chat_template_kwargs"), ("bos", "chat_template_kwargs")):
        with pytest.raises(RequestRefusal, match=f"chat_template_kwargs.{name} is not supported") as error:
            served._template_values(template, {name: 1})
        assert (error.value.status, error.value.field) == (400, field)
    template.variables = frozenset({"mood"})
    assert served._template_values(template, {"reasoning_effort": "none"}) == {}
    with pytest.raises(RequestRefusal, match="reasoning_effort is not supported"):
        served._template_values(template, {"reasoning_effort": "low"})


def test_a_number_of_tokens_beyond_a_row_is_refused_or_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "free_memory", lambda: None)
    served = ServedWriter("m", writer(), rows=1, capacity=10)
    how: Any = SimpleNamespace(most=7, default=16, most_field="max_tokens")
    assert served.most_tokens((1,) * 4, how) == 7
    with pytest.raises(RequestRefusal, match="max_tokens is 7, and a prompt of 5 tokens leaves room for 6") as error:
        served.most_tokens((1,) * 5, how)
    assert (error.value.status, error.value.field, error.value.code) == (400, "max_tokens", "context_length_exceeded")
    served.clips = True
    assert served.most_tokens((1,) * 5, how) == 6
    how.most = None
    assert served.most_tokens((1,) * 5, how) == 6, "a default is reduced in any case"
    how.default = None
    assert served.most_tokens((1,) * 2, how) == 9


def test_prompts_and_talks_are_read_as_tokens() -> None:
    """The text of a conversation already contains its special tokens."""
    closed: list[Any] = []
    template = SimpleNamespace(render=lambda messages, **values: f"<{messages[0]}>", close=lambda: closed.append(1))
    asked: list[Any] = []

    def tokens(texts: list[str], **how: Any) -> list[list[int]]:
        asked.append((texts, how))
        return [[1, 2]]

    shows = SimpleNamespace(text=lambda ids: f"{ids}")
    templates = [template]
    held = writer(tokens=tokens, chat_template=lambda: templates.pop(), tokenizer=shows)
    held.chat_prompt = lambda template, messages, images: ChatPrompt(
        held.tokens([template.render(messages)], special=False)[0]
    )
    served = ServedWriter("m", held, rows=1, capacity=5, queue=4)
    assert served.prompt_ids(Prompt(text="a")) == (1, 2)
    assert [served.chat_prompt([text]).tokens for text in ("b", "c")] == [[1, 2]] * 2  # type: ignore[list-item]
    assert served.prompt_ids(Prompt(ids=(3,))) == (3,)
    assert asked == [(["a"], {}), (["<b>"], {"special": False}), (["<c>"], {"special": False})]
    assert served.shown(4) == "[4]"
    with pytest.raises(RequestRefusal, match="token 9 is not in the vocabulary; received ids are 0 to 4") as error:
        served.prompt_ids(Prompt(ids=(9,)))
    assert (error.value.status, error.value.field) == (400, "prompt")
    held.tokens = lambda texts, **how: [[]]
    with pytest.raises(RequestRefusal, match="the prompt has no tokens; a prompt of at least one token") as error:
        served.chat_prompt(["d"])  # type: ignore[list-item]
    assert (error.value.status, error.value.field) == (400, "messages")
    served.close(drain=0.0)
    assert closed == [1]


def test_waiting_embedding_requests_are_counted() -> None:
    waiting: list[int] = []
    embedder: Any = SimpleNamespace(width=3, embed_reporting=lambda texts, truncate: waiting.append(served._present))
    served = ServedEmbedder("m", embedder, queue=1)
    for _ in range(2):
        served.embed(["a"])
    assert [*waiting, served._present] == [1, 1, 0]
    assert served.description == "embeddings of 3 numbers"


def test_an_error_is_an_answer_on_a_line() -> None:
    refusal = refused(TreadleError("a\n b", received="c\nd", hint="e"), field="f", code="g")
    assert (refusal.message, refusal.status, refusal.field, refusal.code) == ("a b; received c d; e", 400, "f", "g")
    assert refusal.body["error"]["type"] == "invalid_request_error"
    refusal = refused(TreadleError("a"), status=500)
    assert (refusal.message, refusal.body["error"]) == (
        "a", {"message": "a", "type": "server_error", "param": None, "code": None}
    )  # fmt: skip
    assert refusal.headers == {}
    kinds = {status: RequestRefusal(status, "a").body["error"]["type"] for status in (401, 404, 429, 499, 503)}
    assert kinds == {
        401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
        499: "invalid_request_error", 503: "server_error",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name", "place"),
    [("a/b/", "b", "a/b/"), ("smollm2", "smollm2", "smollm2"), ("x=a/b", "x", "a/b"), ("x=a=b", "x", "a=b")],
)
def test_a_model_is_opened_under_its_name(model: str, name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is opened for generation, or, if it generates nothing, for embeddings."""
    given: list[Any] = []
    held = writer()
    monkeypatch.setattr(models, "free_memory", lambda: None)
    monkeypatch.setattr(CompileOptions, "open", lambda self, model: model)
    monkeypatch.setattr(models.TextWriter, "open", lambda *words, **how: given.append((words, how)) or held)
    monkeypatch.setattr(models.SentenceEmbedder, "open", lambda *words, **how: given.append((words, how)) or "e")
    opening = Opening()
    assert opening == Opening(None, None, 256, None, None, None, clips=False)
    assert (ROWS, CAPACITY, QUEUE) == (16, 2048, 256)
    options = {"backend": "numpy", "target": Target("cpu"), "layers": 1}
    served = Opening(2, 30, 4, resumes=True).open(model, cache="bf16", **options)
    assert isinstance(served, ServedWriter)
    assert (served.name, served.scheduler.queue) == (name, 4)
    assert held.sessions == [{"rows": 2, "capacity": 30, "resumes": True}]
    chosen = {"backend": "numpy", "target": Target("cpu"), "config": {"layers": 1}}
    assert given == [((place,), {"cache": "bf16", **chosen})]

    def writes_not(*words: Any, **how: Any) -> None:
        raise models.NotGeneratingError("it writes nothing")

    monkeypatch.setattr(models.TextWriter, "open", writes_not)
    embeds = Opening(queue=5).open(model, cache="bf16", **options)
    assert isinstance(embeds, ServedEmbedder)
    assert (embeds.name, embeds.queue, embeds.embedder) == (name, 5, "e")
    assert given[1:] == [((place,), chosen)]

    def embeds_not(*words: Any, **how: Any) -> None:
        raise models.NotEmbeddingError("it embeds nothing")

    monkeypatch.setattr(models.SentenceEmbedder, "open", embeds_not)
    with pytest.raises(UsageError, match="it writes nothing"):
        opening.open(model)


@pytest.mark.parametrize("model", ["=a", "/", ""])
def test_a_model_has_a_name(model: str) -> None:
    with pytest.raises(UsageError, match="a model needs a name to be served under") as error:
        Opening().open(model)
    assert (error.value.received, error.value.hint) == (model, "NAME=MODEL")
