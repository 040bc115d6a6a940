"""`treadle explain MODEL device`: the form of a program on a GPU, without a GPU."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from tests.command_line import with_last_values
from treadle.cli import app
from treadle.explaining.device import explain_device

SMALL: dict[str, Any] = {"layers": 2, "dim": 64, "heads": 4, "vocab": 100}


def test_each_encoding_is_named_with_its_reads() -> None:
    weights = explain_device("gpt2", quantize="int4", **SMALL).weights
    reads = {(m[1], m[2]) for line in weights if (m := re.match(r"(?:main|h): (\S+, \w+).*?: (.*?)(?:    |$)", line))}
    assert ("mlp.down.weight, int4_groups", "decoded in each call, directly before linear") in reads
    assert ("wte.weight, int8_rows", "rows are selected, and only these are decoded") in reads
    assert ("wte.weight, int8_rows", "decoded in each call, directly before linear") in reads
    assert any("models/gpt2.py:66, scope mlp.down" in line for line in weights)
    products = explain_device("gpt2", quantize="int8", **SMALL).weights
    assert sum("a product of 8-bit integers" in line for line in products if line.startswith("h: ")) == 4
    assert explain_device("gpt2", **SMALL).weights == ()


def test_the_step_is_part_of_the_report() -> None:
    stepped, other = (explain_device(name, **SMALL, **more) for name, more in (("gpt2", {}), ("bert", {"hidden": 64})))
    assert [line.split(":")[0] for line in stepped.capture] == ["main", "prefill", "step", "verify"]
    assert [line.split(":")[0] for line in other.capture] == ["main"]
    reason = "rows of different lengths in a cache    (models/gpt2.py:65, scope attn)"
    assert any(reason in line for line in stepped.attention)
    donated = explain_device("gpt2", donate=("tokens",), **SMALL)
    assert "input tokens is donated" in donated.capture[0] and donated.capture[1:] == stepped.capture[1:]


def test_a_collective_prevents_the_capture() -> None:
    from tests.sharded_models import recognized
    from treadle.backends.torch.capture_decision import notes_on_capture
    from treadle.passes.sharding.rank_programs import rank_program
    from treadle.passes.sharding.recipes import shard

    plan = shard(recognized("gpt2"), "tp=2", recipe="megatron")
    (first, *_) = notes_on_capture(rank_program(plan, 0), None)
    assert re.fullmatch(
        r"main: not captured as a CUDA graph: \w+ communicates with other ranks through the host    \(.*gpt2.py:.*\)",
        first,
    )


def test_the_command_prints_the_report() -> None:
    words = ["explain", "gpt2", "device", "--set", "layers=1", "--target", "h100"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("gpt2 on h100, with the torch backend\n\nattention:\n")
    facts = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert facts["target"] == "h100" and len(facts["capture"]) == 4


def test_a_target_on_the_command_line_is_refused_if_it_is_not_a_device() -> None:
    """Also the CPU, which is the default of other subjects. The hint names devices of the backend, and works."""
    small = ["explain", "gpt2", "device", "--set", "layers=1"]
    for target, more in (("cpu", []), ("arm64", []), ("cpu", ["--backend", "torch"]), ("cpu", ["--backend", "tvm"])):
        done = CliRunner().invoke(app, [*small, "--target", target, *more])
        assert done.exit_code == 2 and f"{target} is not a device" in done.stderr, done.output
        (hint,) = re.findall(r"try +(--target .*)", done.stderr)
        assert ("webgpu" in hint) == ("torch" not in more)
        followed = CliRunner().invoke(app, [*small, *more, *hint.split(",")[0].split()])
        assert followed.exit_code == 0 and " on cuda, " in followed.stdout


def test_a_device_of_another_backend_is_refused_without_the_cpu() -> None:
    words = "explain gpt2 device --set layers=1 --target opencl --backend torch"
    done = CliRunner().invoke(app, words.split())
    assert done.exit_code == 2
    (hint,) = re.findall(r"try +(--backend .*)", done.stderr)
    for way in hint.split("; or "):
        followed = CliRunner().invoke(app, with_last_values("explain", f"{words} {way}"))
        assert followed.exit_code == 0, followed.output


def test_threads_do_not_apply_to_a_device() -> None:
    for words, what in (
        (["device", "--threads", "2"], "threads do not apply to a program for a device"),
        (["layouts", "--threads", "2", "--target", "cuda"], "threads apply to CPUs, not to cuda"),
    ):
        done = CliRunner().invoke(app, ["explain", "gpt2", *words])
        assert done.exit_code == 2 and what in done.stderr, done.output
        assert "leave --threads out" in done.stderr


def test_a_subject_without_a_model_asks_for_the_model() -> None:
    done = CliRunner().invoke(app, ["explain", "device", "--target", "cuda"])
    assert done.exit_code == 2 and "explain needs a model" in done.stderr
    assert "treadle explain MODEL device, such as gpt2 for MODEL" in done.stderr
