"""Chat templates, tested without a process: the sandbox's output, its limits, and the error messages."""

from __future__ import annotations

import inspect
import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")

from treadle.chatting import template_worker as worker
from treadle.chatting import templates
from treadle.chatting.conversation import CAPACITY, Conversation
from treadle.chatting.prompts import ChatPrompt
from treadle.chatting.template_worker import environment
from treadle.chatting.templates import ChatTemplate
from treadle.ir.errors import CheckpointError, FrontendError, UsageError

MADE = environment()


def rendered(template: str, most: int = 1000, **values: Any) -> dict[str, Any]:
    return worker.render(MADE, {"template": template, "values": values, "most": most})


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("  {% if 1 %}\n a\n  {% endif %}\nb", " a\nb"),  # lines with only statements leave no text
        ("{% generation %}a{% set b = 1 %}{% endgeneration %}{{ b is defined }}", "aFalse"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{{ {'é': '<'} | tojson }}", '{"é": "<"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ 'é' | tojson(ensure_ascii=True) }}", '"\\u00e9"'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True) }}{{ cycler('c').next() }}", '{"a": 2, "b": 1}c'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ {'items': 1}['items'] }}{{ {'pop': 2}.pop }}{{ [5, 6].index(6) }}{{ (7, 8).count(8) }}", "1211"),
        ("{% set n = namespace(x=1) %}{{ n.x }}{% for i in [1] %}{{ loop.first }}{% endfor %}", "1True"),
        ("{{ 'a-b'.split('-')[1].upper() }}{{ {'a': 1}.get('b', 2) }}", "B2"),
    ],
)  # fmt: skip
def test_allowed_template_features(template: str, text: str) -> None:
    assert rendered(template) == {"text": text}


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ 'a'.format(1) }}", "it accesses format of str"),
        ("{{ {}.pop(1) }}", "it accesses pop of dict"),
        ("{{ [1].append(2) }}", "it accesses append of list"),
        ("{{ (1,).__class__ }}", "it accesses __class__ of tuple"),
        ("{{ cycler('a').__init__ }}", "it accesses __init__ of Cycler"),
        ("{{ raise_exception.real }}{{ 5 .real }}", "it accesses real of int"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
        ("{% if %}", "Expected an expression, got 'end of statement block', line 1"),
        ("a\n{% for %}", "Expected an expression, got 'end of statement block', line 2"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply"),
    ],
)
def test_forbidden_template_features(template: str, error: str) -> None:
    assert rendered(template) == {"error": error}


def test_a_template_that_refuses_is_told_apart() -> None:
    assert rendered("{{ raise_exception('no') }}") == {"error": "no", "refused": True}


def test_a_text_is_as_long_as_it_may_be() -> None:
    assert rendered("{% for i in [1, 2] %}ab{% endfor %}", most=4) == {"text": "abab"}
    assert rendered("{% for i in [1, 2] %}ab{% endfor %}", most=3) == {"error": "it writes more than 3 characters"}


def test_memory_that_is_not_there_is_told() -> None:
    def from_string(text: str) -> None:
        raise MemoryError

    request = {"template": "", "values": {}, "most": 1}
    report = {"error": "it needs more memory than the limit"}
    assert worker.render(SimpleNamespace(from_string=from_string), request) == report


def test_a_process_that_renders_has_memory_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[str, Any] = {}

    def setrlimit(name: str, limit: tuple[int, int]) -> None:
        limits[name] = limit
        if name == "files":
            raise ValueError("not allowed")  # the other limits must still be set

    names = {"RLIMIT_AS": "memory", "RLIMIT_FSIZE": "files", "RLIMIT_CORE": "core"}
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(setrlimit=setrlimit, **names))
    worker.confine(99)
    assert limits == {"memory": (99, 99), "files": (0, 0), "core": (0, 0)}
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(setrlimit=setrlimit, RLIMIT_NPROC="processes"))
    worker.confine(99)
    assert limits.pop("processes") == (0, 0)
    monkeypatch.setitem(sys.modules, "resource", None)
    worker.confine(5)
    assert limits["memory"] == (99, 99)


class _Flushed(io.StringIO):
    count = 0

    def flush(self) -> None:
        self.count += 1


def test_requests_are_answered_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is flushed immediately, because the caller waits for it."""
    memory: list[int] = []
    asked = [json.dumps({"template": each, "values": {}, "most": 9}) + "\n" for each in ("a", "{{ b")]
    monkeypatch.setattr(worker, "confine", memory.append)
    monkeypatch.setattr(sys, "path", ["here"])
    monkeypatch.setattr(sys, "argv", ["worker", "jinja", "77"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(asked)))
    out = _Flushed()
    monkeypatch.setattr(sys, "stdout", out)
    worker.main()
    first, *answers = out.getvalue().splitlines()
    assert out.count == 3
    assert (first, memory, sys.path) == ("ready", [77], ["here", "jinja"])
    assert [list(json.loads(each)) for each in answers] == [["text"], ["error"]]


# -- the caller --------------------------------------------------------------------------------------------------------


class _Worker:
    """A stand-in for the process: it answers, exits, or times out."""

    said: list[str | None] = []
    made: list[_Worker] = []

    def __init__(self, folder: str, memory: int) -> None:
        self.memory, self.asked, self.ended = memory, list[tuple[Any, float]](), False
        self.made.append(self)

    def answer(self, seconds: float) -> str | None:
        assert seconds == 60.0, "a machine may be busy"
        return self.said.pop(0)

    def ask(self, request: str, seconds: float) -> str | None:
        self.asked.append((json.loads(request), seconds))
        return self.said.pop(0)

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[_Worker]:
    _Worker.made = []
    monkeypatch.setattr(templates, "_Worker", _Worker)
    return _Worker.made


TALK = [{"role": "user", "content": "a"}]


def test_a_template_is_given_what_it_may_name(processes: list[_Worker]) -> None:
    _Worker.said = ["ready", '{"text": "b"}', '{"text": "c"}']
    made = ChatTemplate("t", {"bos_token": "<s>"})
    assert [made.render(TALK), made.render(TALK, reply=False, tools=[1], more=2)] == ["b", "c"]
    (process,) = processes
    assert process.memory == 512 << 20
    values = {"bos_token": "<s>", "documents": None, "messages": TALK}
    for (request, seconds), more in zip(
        process.asked,
        ({"tools": None, "add_generation_prompt": True}, {"tools": [1], "more": 2, "add_generation_prompt": False}),
        strict=True,
    ):
        assert request == {"template": "t", "values": {**values, **more}, "most": 4 << 20}
        assert seconds == 2.0
    made.close()
    assert process.ended


@pytest.mark.parametrize(
    ("said", "kind", "received", "lives"),
    [
        ('{"error": "e", "refused": true}', UsageError, "e", True),
        ('{"error": "e"}', CheckpointError, "e", True),
        (json.dumps({"error": "e" * 401}), CheckpointError, "e" * 400 + "... (401 characters)", True),
        ("", CheckpointError, "it needs more memory than the limit", False),
        (None, CheckpointError, "it takes longer than 0.25 s", False),
    ],
)
def test_errors_of_failing_renderings(
    said: str | None, kind: type[Exception], received: str, lives: bool, processes: list[_Worker]
) -> None:
    """If the process has exited or was killed, a new process renders the next conversation."""
    _Worker.said = ["ready", said, *(["ready"] if not lives else []), '{"text": "b"}']
    made = ChatTemplate("t", seconds=0.25, memory=5, characters=6)
    with pytest.raises(kind, match="the model's chat template") as error:
        made.render(TALK)
    assert error.value.received == received  # type: ignore[attr-defined]
    assert made.render(TALK) == "b"
    assert [each.ended for each in processes] == ([False] if lives else [True, False])
    assert processes[-1].memory == 5
    assert processes[-1].asked[-1][0]["most"] == 6


def test_a_process_that_does_not_start_is_ended(processes: list[_Worker]) -> None:
    _Worker.said = [None, "ready", '{"text": "b"}']
    made = ChatTemplate("t")
    with pytest.raises(FrontendError, match="did not start") as error:
        made.render(TALK)
    assert error.value.received == "None"
    assert processes[0].ended
    assert made.render(TALK) == "b"


def test_a_template_is_a_megabyte_long_at_most(processes: list[_Worker]) -> None:
    ChatTemplate("x" * (1 << 20))
    with pytest.raises(CheckpointError, match="the chat template is longer than the limit") as error:
        ChatTemplate("x" * ((1 << 20) + 1))
    assert error.value.received == "1048577 characters, limit 1048576"
    assert not processes, "none starts before a conversation"


def test_a_process_is_given_nothing_but_its_folder_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets no environment variables of its parent. A daemon thread reads its output."""
    started: dict[str, Any] = {}
    threads: list[Any] = []
    ended: list[str] = []

    class Pipe(io.StringIO):
        broken = False

        def flush(self) -> None:
            if self.broken:
                raise BrokenPipeError

        def close(self) -> None:
            self.flush()
            super().close()

    def start(command: list[str], **how: Any) -> Any:
        started.update(how, command=command)
        calls = {name: lambda name=name: ended.append(name) for name in ("kill", "wait")}
        return SimpleNamespace(stdin=Pipe(), stdout=io.StringIO(" ready\n"), **calls)

    monkeypatch.setattr(templates.subprocess, "Popen", start)
    thread = templates.threading.Thread
    monkeypatch.setattr(templates.threading, "Thread", lambda **how: threads.append(how["daemon"]) or thread(**how))
    monkeypatch.setenv("SECRET", "1")
    monkeypatch.setenv("SYSTEMROOT", "windows")
    own = templates._Worker("folder", 5)
    python, alone, script, *rest = started["command"]
    assert (python, alone, rest) == (sys.executable, "-I", ["folder", "5"])
    assert script.endswith("template_worker.py")
    assert started["env"] == {"SYSTEMROOT": "windows"}
    assert (started["encoding"], started["stderr"]) == ("utf-8", templates.subprocess.DEVNULL)
    assert threads == [True]
    assert [own.answer(20.0), own.answer(20.0), own.answer(0.01)] == ["ready", "", None]
    pipe: Any = own.process.stdin
    assert own.ask("a", 0.01) is None
    assert pipe.getvalue() == "a\n"
    pipe.broken = True
    assert own.ask("b", 0.01) == ""
    pipe.broken = False
    own.end()
    own.end()
    assert ended == ["kill", "wait"]
    assert pipe.closed


@pytest.mark.parametrize(
    ("context", "asked", "capacity"), [(None, None, 4096), (4097, None, 4096), (300, None, 300), (9999, 5000, 5000)]
)
def test_a_conversation_is_as_long_as_the_model_takes(context: int | None, asked: int | None, capacity: int) -> None:
    given: dict[str, Any] = {}
    model = SimpleNamespace(derived=SimpleNamespace(context=context), session=lambda **how: given.update(how))
    writer: Any = SimpleNamespace(model=model, session=model.session, chat_template=lambda: "t")
    talk = Conversation.open(writer, system="s", capacity=asked)
    assert given == {"rows": 1, "capacity": capacity, "resumes": True}
    assert talk.messages == [{"role": "system", "content": "s"}]
    assert Conversation.open(writer).messages == []
    assert CAPACITY == 4096


def test_a_turn_is_read_as_the_template_wrote_it() -> None:
    """Each turn is tokenized without added special tokens, and draws other random numbers."""
    asked: list[Any] = []
    chosen = iter([4, 9, 4, 4])
    session = SimpleNamespace(
        capacity=3, who_takes="the model", full="error", length=lambda row: 1,
        resume=lambda ids, **inputs: asked.append(("resume", ids)) or 0,
        prefill=lambda tokens: asked.append(("prefill", tokens)) or {0: np.zeros(10)},
        step=lambda tokens: asked.append(("step", tokens)) or {0: np.zeros(10)},
        close=lambda row, keep: asked.append(("close", row, keep)),
    )  # fmt: skip

    class Sampling:
        """A sampling under the name of the public class, which the checks of arguments read."""

        def choose(self, scores: Any, row: int, step: int) -> int:
            asked.append(("draw", row, step))
            return next(chosen)

    sampling: Any = Sampling()
    tokens = [[1, 2], [1, 2, 3], [1, 2, 3, 4]]
    writer: Any = SimpleNamespace(
        end=(9,),
        asked=SimpleNamespace(rules=None),
        tokenizer=SimpleNamespace(text=lambda ids, **_: "x" * len(ids)),
        tokens=lambda texts, **how: asked.append((texts, how)) or [tokens.pop(0)],
        read_images=list,
    )
    writer.chat_prompt = lambda template, messages, images: ChatPrompt(
        writer.tokens([template.render(messages)], special=False)[0]
    )
    template: Any = SimpleNamespace(render=lambda messages: f"{len(messages)}")
    talk = Conversation(writer, template, session)  # type: ignore[arg-type]
    pieces = list(talk.say("a", most=5, sampling=sampling))
    assert [(piece.id, piece.ending) for piece in pieces] == [(4, None), (9, "end")]
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    first = [(["1"], {"special": False}), ("resume", [1, 2]), ("prefill", {0: [2]})]
    assert asked == [*first, ("draw", 1, 0), ("step", {0: 4}), ("draw", 1, 1)]
    asked.clear()
    pieces = list(talk.say("b", most=2, sampling=sampling))
    assert [piece.ending for piece in pieces] == [None, "count"]
    assert asked[1:4] == [("close", 0, True), ("resume", [1, 2, 3]), ("prefill", {0: [2, 3]})]
    assert ("draw", 3, 1) in asked
    before = list(talk.messages)
    with pytest.raises(UsageError, match="the conversation has 4 tokens, the model takes 3") as error:
        next(talk.say("c"))
    assert error.value.hint == "a new conversation"
    with pytest.raises(UsageError, match="a reply must have 1 token or more") as error:
        next(talk.say("c", most=0))
    assert error.value.received == "0"
    assert talk.messages == before
    assert inspect.signature(Conversation.say).parameters["most"].default == 512
