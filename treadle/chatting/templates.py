"""Chat templates: render a conversation as the text that a model was trained to continue.

    template = ChatTemplate("{% for m in messages %}...{% endfor %}", {"bos_token": "<s>"})
    template.render([{"role": "user", "content": "Hello"}])

A template is a program in Jinja's language, and comes from a model's file. It runs in Jinja's sandbox, in a separate
process. The process has limited memory, cannot write files or start processes, and is killed on a timeout.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treadle.files.installation import pip_install
from treadle.files.shown_names import printable
from treadle.ir.errors import CheckpointError, FrontendError, UsageError

Message = Mapping[str, Any]
"""A message: "role" ("system", "user" or "assistant"), "content", and further keys that the template may use."""

_WORKER = Path(__file__).with_name("template_worker.py")
_START_SECONDS = 60.0
_SECONDS = 2.0
_MEMORY = 512 << 20
_CHARACTERS = 4 << 20
_TEMPLATE_CHARACTERS = 1 << 20


class ChatTemplate:
    """A template and the special tokens that it may refer to."""

    def __init__(
        self,
        template: str,
        special: Mapping[str, str] | None = None,
        *,
        seconds: float = _SECONDS,
        memory: int = _MEMORY,
        characters: int = _CHARACTERS,
    ) -> None:
        """Check the template's length. The process starts when the first conversation is rendered.

        special     special tokens by their roles, such as bos_token
        seconds     time limit of a rendering
        memory      memory limit of the process in bytes, if the operating system enforces it
        characters  maximum length of the rendered text

        Raises CheckpointError for a template that is too long, and FrontendError if jinja2 is not installed.
        """
        found = importlib.util.find_spec("jinja2")
        if found is None or found.origin is None:
            raise FrontendError("chat templates need the package jinja2", hint=pip_install("chat"))
        if len(template) > _TEMPLATE_CHARACTERS:
            raise CheckpointError(
                "the chat template is longer than the limit",
                received=f"{len(template)} characters, limit {_TEMPLATE_CHARACTERS}",
            )
        self.template, self.special = template, dict(special or {})
        self.seconds, self.memory, self.characters = seconds, memory, characters
        self._folder = str(Path(found.origin).parent.parent)
        self._worker: _Worker | None = None
        self._turn = threading.Lock()
        self._variables: frozenset[str] | None = None

    @property
    def variables(self) -> frozenset[str]:
        """The names of all variables that the template reads. Raises CheckpointError if the template has an error."""
        with self._turn:
            if self._variables is None:
                answer = self._ask(json.dumps({"template": self.template}))
                self._variables = frozenset(self._checked(answer)["variables"])
            return self._variables

    def render(self, messages: Sequence[Message], *, reply: bool = True, **values: Any) -> str:
        """Return the text of a conversation.

        reply   True to end the text with the start of a reply
        values  further variables of the template, such as tools=[...]

        Raises UsageError if the template rejects the conversation; CheckpointError if the template fails or exceeds its
        limits.
        """
        try:
            request = json.dumps(
                {
                    "template": self.template,
                    "values": {
                        **self.special,
                        "tools": None,
                        "documents": None,
                        **values,
                        "messages": list(map(dict, messages)),
                        "add_generation_prompt": reply,
                    },
                    "most": self.characters,
                }
            )
        except (TypeError, ValueError) as error:
            raise UsageError(
                "a conversation must consist of strings, numbers and lists of them", received=str(error)
            ) from None
        with self._turn:
            answer = self._ask(request)
        return str(self._checked(answer)["text"])

    @staticmethod
    def _checked(answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer of the process. Raises the error that it reports."""
        if "error" not in answer:
            return answer
        what = printable(str(answer["error"]), 400)
        if answer.get("refused"):
            raise UsageError("the model's chat template refuses the conversation", received=what)
        raise CheckpointError("the model's chat template cannot be rendered", received=what, within="chat template")

    def close(self) -> None:
        """Kill the process. The next rendering starts another one."""
        with self._turn:
            self._end()

    def _ask(self, request: str) -> dict[str, Any]:
        if self._worker is None:
            self._worker = _Worker(self._folder, self.memory)
            started = self._worker.answer(_START_SECONDS)
            if started != "ready":
                self._end()
                raise FrontendError("the process that renders chat templates did not start", received=str(started))
        line = self._worker.ask(request, self.seconds)
        if line:
            return dict(json.loads(line))
        self._end()
        too_long = f"it takes longer than {self.seconds:g} s"
        return {"error": too_long if line is None else "it needs more memory than the limit"}

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Worker:
    """A process that answers each line of input with a line of output."""

    def __init__(self, folder: str, memory: int) -> None:
        command = [sys.executable, "-I", str(_WORKER), folder, str(memory)]
        pipe, needed = subprocess.PIPE, ("SYSTEMROOT",)  # Windows cannot start Python without it
        environment = {name: os.environ[name] for name in needed if name in os.environ}
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8", env=environment
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_pass_on, args=(self.process.stdout, self._lines), daemon=True).start()
        self._end = weakref.finalize(self, _end_process, self.process)

    def ask(self, request: str, seconds: float) -> str | None:
        """Send a request to the process. Return its response line: "" if the process has exited, None on a timeout."""
        stream = self.process.stdin
        assert stream is not None
        try:
            stream.write(request + "\n")
            stream.flush()
        except OSError:
            return ""
        return self.answer(seconds)

    def answer(self, seconds: float) -> str | None:
        """Return the next line, without the line break: "" if the process has exited, None on a timeout."""
        try:
            return self._lines.get(timeout=seconds).strip()
        except queue.Empty:
            return None

    def end(self) -> None:
        """Kill the process."""
        self._end()


def _pass_on(stream: Any, lines: queue.SimpleQueue[str]) -> None:
    """Put the lines of a process's output into a queue, and an empty line at the end of the output."""
    for line in stream:
        lines.put(line)
    lines.put("")


def _end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            try:
                stream.close()
            except OSError:
                continue
