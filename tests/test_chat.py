"""Chat: templates render as in Hugging Face, hostile templates hit limits, and conversations continue over several
turns.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("jinja2")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import treadle as t
from tests.task_models import byte_level
from treadle.chatting import templates
from treadle.chatting.conversation import Conversation
from treadle.chatting.templates import ChatTemplate
from treadle.cli import app
from treadle.continuation import TextWriter
from treadle.ir.errors import CheckpointError, FrontendError, UsageError

CHATML = """\
{%- if messages[0].role != 'system' -%}<|system|>be kind
{% endif -%}
{%- for message in messages -%}
{{ bos_token if loop.first }}<|{{ message['role'] }}|>{{ message.content | trim }}{{ eos_token }}
{% endfor -%}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TALK = [
    {"role": "system", "content": " You are brief. "},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sits"},
    {"role": "user", "content": "œ <b> & \n second line"},
]
TEMPLATES = [
    CHATML,
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}{% endif %}"
    "{{ ns.n }}{{ m.content.strip().split('\n')[-1].upper() }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{% macro say(m) %}[{{ m.role | capitalize }}] {{ m | tojson }}{% endmacro %}"
    "{% for m in messages[1:] %}{{ say(m) }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for m in [{'copy': 1, 'pop': 'x'}] %}{{ m['copy'] }}{{ m.get('pop') }}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.get('content', '') ~ '|' }}{% endgeneration %}"
    "{{ m.items() | list | length }}{% endfor %}{{ tools is none }}{{ missing is defined }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("reply", [True, False])
def test_renders_as_hugging_face(template: str, reply: bool) -> None:
    tokenizer = byte_level()
    ours = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    for talk in (TALK, TALK[1:], TALK[3:]):
        wanted = tokenizer.apply_chat_template(
            talk, chat_template=template, tokenize=False, add_generation_prompt=reply
        )
        assert ours.render(talk, reply=reply) == wanted
    ours.close()


HOSTILE = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10000000000 }}",
    "{{ 9 ** (9 ** (9 ** 9)) }}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | sum }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ 'x' | center(10000000000) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ ''['__cl' ~ 'ass__'] }}{{ (''|attr('__class__')).mro() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ lipsum() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ unknown.attribute.of }}",
    "{% if %}",
    "{{ 1 / 0 }}",
    "{% for m in messages %}",
    "(" * 3000 + "{{ " + "(" * 3000,
]


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_what_hostile_templates_come_to(template: str) -> None:
    """A hostile template fails with an error that names the cause, and the next conversation is rendered."""
    made = ChatTemplate(template, seconds=1.5, memory=400 << 20, characters=100_000)
    made._ask(json.dumps({"template": "", "values": {}, "most": 1}))  # starts the process
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="cannot be rendered") as refused:
        made.render(TALK)
    assert refused.value.received
    assert time.monotonic() - started < 60  # far above 1.5 s: the test machine may be busy
    made.template = "{{ messages[1].content }}"
    made.seconds = 60.0
    assert made.render(TALK) == "the cat"
    made.close()


def test_what_a_template_refuses_and_what_is_no_conversation() -> None:
    made = ChatTemplate("{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}")
    with pytest.raises(UsageError, match="refuses the conversation") as refused:
        made.render(TALK)
    assert refused.value.received == "too many"
    with pytest.raises(UsageError, match="strings, numbers"):
        made.render([{"role": "user", "content": object()}])
    with pytest.raises(CheckpointError, match="longer than the limit"):
        ChatTemplate("x" * (2 << 20))
    assert made.render(TALK[:1]) == ""
    worker = made._worker
    assert worker is not None
    process: subprocess.Popen[str] = worker.process
    made.close()
    assert process.poll() is not None


# -- conversations ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small random GPT-2 with a chat template."""
    place, tokenizer = tmp_path_factory.mktemp("chat"), byte_level()
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=300, n_embd=32, n_layer=2, n_head=4, eos_token_id=2, bos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    model.generation_config.repetition_penalty = 1.3  # the folder's rules apply to replies, too
    model.save_pretrained(place)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(place)
    return place


def test_a_template_is_told_tokens_that_special_tokens_map_alone_names(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    chosen = {"tokenizer_class": settings["tokenizer_class"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(chosen))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    )
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}")
    writer = TextWriter.open(tmp_path)
    wanted = transformers.AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False
    )
    assert writer.chat_template().render([{"role": "user", "content": "a"}]) == wanted == "<s></s>"


def test_a_conversation_goes_on_as_the_whole_would(folder: Path) -> None:
    writer = TextWriter.open(folder)
    talk = Conversation.open(writer, system="You are brief.")
    said: list[dict[str, Any]] = [{"role": "system", "content": "You are brief."}]
    template = writer.chat_template()
    for text in ("the cat", "a dog runs", "blue sky"):
        said.append({"role": "user", "content": text})
        rendered = template.render(said)
        wanted = "".join(p.text for p in writer.continued([rendered], most=12, special=False))
        assert "".join(piece.text for piece in talk.say(text, most=12)) == wanted
        said.append({"role": "assistant", "content": wanted})
        assert talk.messages == said
    assert writer.tokens([rendered], special=False)[0][:1] != writer.tokens([rendered])[0][:1] or rendered[:3] == "<s>"
    talk.forget()
    assert talk.messages == said[:1]
    broken = talk.say("the cat", most=12)
    next(broken)
    broken.close()  # type: ignore[attr-defined]
    assert talk.messages == said[:1]
    again = "".join(piece.text for piece in talk.say("the cat", most=12))
    assert again == said[2]["content"]
    with pytest.raises(UsageError, match="a reply must have 1 token or more"):
        list(talk.say("the cat", most=0))
    with pytest.raises(UsageError, match="a row of the session takes 20"):
        list(Conversation.open(writer, capacity=20).say("the cat " * 20))


def test_what_the_row_holds_is_not_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation.open(TextWriter.open(folder))
    fed: list[tuple[int, int]] = []  # for each call: length of the row before, number of new tokens
    prefill = type(talk.session).prefill

    def counted(self: Any, tokens: Any) -> Any:
        fed.extend((self.length(row), len(ids)) for row, ids in tokens.items())
        return prefill(self, tokens)

    monkeypatch.setattr(type(talk.session), "prefill", counted)
    list(talk.say("the cat", most=3, stop=["\0"]))
    list(talk.say("a dog", most=3))
    talk.messages[-1] = {"role": "assistant", "content": "other words"}
    list(talk.say("the log", most=3))
    talk.messages = talk.messages[:-2]
    list(talk.say("the log", most=3))
    (held, first), (second_held, second), (third_held, third), (again_held, again) = fed
    assert held == 0
    assert second_held >= first - 1
    assert third_held >= second_held + second - 1, "the changed text is read again, with everything after it"
    assert (again_held, again) == (third_held + third - 1, 1), "the row was longer: it is truncated"


def test_the_commands(folder: Path) -> None:
    run = CliRunner()
    report = json.loads(
        run.invoke(app, ["chat", str(folder), "--tokens", "6", "--json"], input="the cat\n\na dog\n").stdout
    )
    talk = t.load(folder).chat()
    for text in ("the cat", "a dog"):
        list(talk.say(text, most=6))
    assert report["messages"] == talk.messages
    shown = run.invoke(app, ["chat", str(folder), "--tokens", "6"], input="the cat\n/new\nthe cat\n/bye\nx\n").stdout
    assert shown == (str(talk.messages[1]["content"]) + "\n") * 2
    single = run.invoke(app, ["generate", str(folder), "the cat", "--chat", "--tokens", "6"])
    assert single.stdout == str(talk.messages[1]["content"]) + "\n"
    report = json.loads(run.invoke(app, ["generate", str(folder), "a", "--chat", "--system", "Be", "--json"]).stdout)
    assert report["texts"][0]["prompt"] == "a"


def test_what_renders_templates_is_missing_or_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(templates, "_WORKER", tmp_path / "missing.py")
    with pytest.raises(FrontendError, match="the process that renders chat templates did not start"):
        ChatTemplate("{{ messages }}").render(TALK)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FrontendError, match="chat templates need the package jinja2"):
        ChatTemplate("{{ messages }}")


def test_a_model_without_a_template(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match="has no chat template"):
        t.load(tmp_path).chat()
    assert "no chat template" in CliRunner().invoke(app, ["generate", str(tmp_path), "a", "--chat"]).stderr
