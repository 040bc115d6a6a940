"""Each rank reads only its part of a checkpoint: checked by the bytes that the rank counts, and by the pages of the
file that are loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from treadle.frontends.binding import Source, bind
from treadle.frontends.deferred_arrays import DeferredArray, stored_bytes
from treadle.frontends.safetensors_file import SafetensorsFile
from treadle.ir.errors import CheckpointError
from treadle.ir.transforms.balances import balances_of
from treadle.passes.framework.manager import PassManager
from treadle.passes.pipelines import RECOGNITION
from treadle.passes.sharding.plan import ShardingPlan
from treadle.resolving import Resolved, resolve
from treadle.sharding import plan_graph, shard_model
from treadle.sharding.rank_models import _weights_text, load_part

DIM, HIDDEN, VOCAB, HEADS = 256, 512, 1024, 8
Array = np.ndarray[Any, Any]

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}


def shapes(vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    layer = "model.layers.0"
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (vocab, DIM),
        f"{layer}.input_layernorm.weight": (DIM,),
        f"{layer}.post_attention_layernorm.weight": (DIM,),
        f"{layer}.mlp.gate_proj.weight": (HIDDEN, DIM),
        f"{layer}.mlp.up_proj.weight": (HIDDEN, DIM),
        f"{layer}.mlp.down_proj.weight": (DIM, HIDDEN),
    }
    return {**found, **{f"{layer}.self_attn.{n}_proj.weight": (DIM, DIM) for n in "qkvo"}}


def written(folder: Path, dtype: str, vocab: int = VOCAB) -> Path:
    """Write a Llama whose numbers all dtypes represent exactly."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.integers(-64, 65, shape) / np.float32(64) for name, shape in shapes(vocab).items()}
    path = folder / "model.safetensors"
    if dtype == "bf16":
        torch = pytest.importorskip("torch")
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file({n: torch.from_numpy(a).to(torch.bfloat16) for n, a in drawn.items()}, path)
    else:
        save_file({name: a.astype({"f32": np.float32, "f16": np.float16}[dtype]) for name, a in drawn.items()}, path)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": vocab}))
    return path


def planned(resolved: Resolved, recipe: str, mesh: str) -> ShardingPlan:
    graph = PassManager(RECOGNITION).run(resolved.graph).graph
    return plan_graph(graph, mesh, recipe=recipe)


def touched(path: Path) -> int:
    """Return the number of bytes of a mapped file that are in this process's memory."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        pytest.skip("the system does not report the pages of a process")
    total, inside = 0, False
    for line in lines:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("recipe", ["megatron", "fsdp"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_ranks_read_their_parts_and_count_them(tmp_path: Path, dtype: str, recipe: str) -> None:
    written(tmp_path, dtype)
    whole, resolved = resolve(tmp_path).weights, resolve(tmp_path, deferred=True)
    assert whole is not None
    plan = planned(resolved, recipe, "tp=4" if recipe == "megatron" else "dp=4")
    width, counted = 4 if dtype == "f32" else 2, 0
    for rank in range(4):
        own, loaded = load_part(plan, rank, resolved.weights)
        assert loaded == width * sum(part.size for part in own.values())
        counted += loaded
        for name in ("embed.weight", "layer.0.mlp.down.weight"):
            split = next(axis for axis, dim in enumerate(plan.weights[name].dims) if dim is not None)
            assert own[name].dtype == np.float32
            assert np.array_equal(own[name], np.split(whole[name], 4, axis=split)[rank])
    norms = sum(shape[0] for shape in shapes().values() if len(shape) == 1)
    copies = 3 * norms if recipe == "megatron" else 0
    assert counted == width * (sum(np.prod(shape) for shape in shapes().values()) + copies)


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "int4"])
def test_ranks_quantize_their_parts(tmp_path: Path, scheme: str) -> None:
    """Smoothing adds vectors to the graph that are not in the file."""
    written(tmp_path, "f32")
    weights = resolve(tmp_path, deferred=True).weights
    plan = shard_model(tmp_path, "tp=2", recipe="megatron", quantize=scheme)
    vectors = {b.vector for b in balances_of(plan.graph)}
    assert bool(vectors) == (scheme == "int8")
    for rank in range(2):
        own, loaded = load_part(plan, rank, weights)
        assert vectors <= own.keys()
        assert loaded > sum(part.nbytes for part in own.values())


def test_a_rank_touches_its_part_of_the_file(tmp_path: Path) -> None:
    """Systems map a file in runs of up to 2 MB, so the test's tables are large. Planning loads none of their pages."""
    path = written(tmp_path, "bf16", vocab=32768)
    resolved = resolve(tmp_path, deferred=True)
    plan = planned(resolved, "megatron", "tp=4")
    assert touched(path) <= 4 << 20
    own, loaded = load_part(plan, 1, resolved.weights)
    size = path.stat().st_size
    assert loaded < 0.26 * size
    assert loaded * 0.9 < touched(path) < 0.7 * size
    assert own["embed.weight"].shape == (8192, DIM)


def test_a_gguf_is_read_in_parts(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("torch")
    from tests.fuzz.gguf_files import Sizes, tensors, write_model

    sizes = Sizes(dim=64, hidden=128)
    write_model(tmp_path / "model.gguf", sizes, tensors(sizes), "Q8_0")
    resolved = resolve(tmp_path / "model.gguf", deferred=True)
    assert resolved.weights is not None
    plan = planned(resolved, "fsdp", "dp=2")
    parts = [load_part(plan, rank, resolved.weights) for rank in range(2)]
    held = sum(np.asarray(a).nbytes for a in resolved.weights.values())
    assert sum(loaded for _, loaded in parts) == held
    q = "layer.0.attn.q.weight"
    assert np.array_equal(np.concatenate([own[q] for own, _ in parts]), resolved.weights[q])


def test_a_part_of_a_deferred_array_is_that_part_of_the_converted_one(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": np.arange(24, dtype=np.float16).reshape(6, 4)}, path)
    file = SafetensorsFile.open(path)
    table = {"a": Source("w", transpose=True, rows=(1, 3))}
    found = bind({"a": ((2, 6), "f32")}, table, file, deferred=True).arrays["a"]
    assert isinstance(found, DeferredArray)
    assert found.shape == (2, 6)
    assert found.dtype == np.float32
    wanted = np.arange(24, dtype=np.float32).reshape(6, 4).T[1:3]
    part = found[:, 2:4]
    assert np.array_equal(part, wanted[:, 2:4])
    assert np.array_equal(np.asarray(found), wanted)
    assert stored_bytes(found, part) == 2 * 4
    assert not part.flags.writeable
    doubled = found.then(lambda x: 2 * x, np.dtype(np.float32))
    assert np.array_equal(doubled[0], 2 * wanted[0])


def test_values_too_large_for_a_narrower_dtype_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": np.array([1.0, 1e6], np.float32)}, path)
    found = bind({"w": ((2,), "f16")}, {}, SafetensorsFile.open(path), deferred=True).arrays["w"]
    assert found[:1] == 1
    with pytest.raises(CheckpointError, match="would become infinite"):
        found[1:]


def test_ranks_compare_the_shapes_and_the_ends_of_weights() -> None:
    """The check reads eight numbers at each end of each dimension, which is little."""
    held = np.arange(40.0)
    text = _weights_text({"w": held}, 0)
    for at, differs in ((0, True), (7, True), (8, False), (31, False), (32, True), (39, True)):
        other = held.copy()
        other[at] += 1
        assert (_weights_text({"w": other}, 0) != text) == differs
    for changed in ({"v": held}, {"w": held.reshape(5, 8)}, {"w": held.view(np.int64)}, {"w": held, "v": held}):
        assert _weights_text(changed, 0) != text
    assert _weights_text(None, 5) == "drawn from 5"
