"""`from_torch`: modules imported through torch.export compute the module's numbers, or are refused with the module's
line.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import treadle
from tests.torch_modules import Applied, assert_equal, drawn
from treadle.frontends.torch_export.lines import scope_of, source_in
from treadle.ir.errors import FrontendError

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional

VOCAB = 37


# -- Hugging Face models -------------------------------------------------------------------------------------------

_ENCODER = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "use_cache": False}
_BART = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 24,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
}
_GPT2 = {"vocab_size": VOCAB, "n_positions": 24, "n_embd": 32, "n_head": 4, "n_layer": 2, "use_cache": False}
_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_heads": 4, "num_layers": 2}
_VIT = {**_ENCODER, "image_size": 12, "patch_size": 4, "num_channels": 2}
_WHISPER = {
    **{k: v for k, v in _BART.items() if k != "max_position_embeddings"},
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 12,
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {**_GPT2, "bos_token_id": 0, "eos_token_id": 0}),
    "bert": ("BertModel", _ENCODER),
    "t5-encoder": ("T5EncoderModel", _T5),
    "llama": ("LlamaForCausalLM", _DECODER),
    "mistral": ("MistralForCausalLM", {**_DECODER, "sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}),
    "clip-text": ("CLIPTextModel", {**_ENCODER, "bos_token_id": 0, "eos_token_id": 5}),
    "bart-encoder": ("BartModel", _BART),
}


MASKS = {
    "bert": "mask(b t)",
    "mistral": "causal, window(3), mask(b t)",
    "gemma": "causal, mask(b t)",
    "t5-encoder": "bias(b t), t5_relative(32, 128, bidirectional)",
}
"""The terms of each attention, of families that differ in them."""
KEY_HEADS = {"bert": 4, "mistral": 2, "gemma": 1, "t5-encoder": 4}


def built(architecture: str, config: Mapping[str, Any], attention: str = "sdpa") -> Any:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, architecture)
    module = drawn(cls(cls.config_class(**config, attn_implementation=attention)))
    return module.encoder if architecture in ("BartModel", "WhisperModel") else module


def tokens(batch: int, length: int) -> dict[str, Any]:
    """Draw token ids, and a mask whose rows end at different positions."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ends = torch.tensor([length, length - 2, length - 1])[:batch, None]
    return {
        "input_ids": torch.randint(0, VOCAB, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length)[None] < ends).long(),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_at_any_size(family: str) -> None:
    """Qwen2's attention is exported as several ops, the others' as one operator. Both become one op."""
    eager = family == "qwen2"
    module = built(*FAMILIES[family], attention="eager" if eager else "sdpa")
    example = tokens(2, 7)
    model = treadle.from_torch(module, example, dynamic={"input_ids": "B S", "attention_mask": "B S"})
    assert {str(size) for size in model.symbols.values()} == {"B", "S"}
    assert not model.opaque
    assert ("scaled_dot_product_attention.default" in model.operators) is not eager
    exe = assert_equal(model, module, example, tokens(3, 11), tokens(1, 5))
    attention: list[Any] = [node for _, node in exe.graph.walk() if node.op.name == "attention"]
    assert len(attention) == 2
    if family in MASKS:
        assert [", ".join(term.text for term in node.op.terms) for node in attention] == [MASKS[family]] * 2
        assert {node.inputs[1].type.shape[1].constant for node in attention} == {KEY_HEADS[family]}


def test_nodes_say_their_module_and_line() -> None:
    module = built(*FAMILIES["bart-encoder"])
    model = treadle.from_torch(module, tokens(2, 7))
    attention = [n for n in model.graph.main.nodes if n.op.name == "attention"]
    assert [n.scope for n in attention] == ["layers.0.self_attn", "layers.1.self_attn"]
    source = attention[0].source
    assert source is not None
    assert source.file.startswith("transformers/")
    assert {str(n) for v in model.graph.main.inputs for n in v.type.shape} == {"2", "7"}  # no axis was named


def test_tied_weights_enter_once() -> None:
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    example = (torch.tensor([[1, 4, 0]]),)
    model = treadle.from_torch(tied, example)
    assert len(model.weights) == 1
    assert_equal(model, tied, example)


def test_a_tensor_of_two_names_enters_once() -> None:
    """A buffer that shares a parameter's memory is the same tensor. Another view of that memory, or a tensor without
    elements, is not.
    """

    class Shared(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.randn(5, 5))
            self.register_buffer("again", self.own.detach())
            self.register_buffer("turned", self.own.detach().T)
            self.none = nn.Parameter(torch.zeros(0, 5))
            self.nothing = nn.Parameter(torch.zeros(0, 5))

        def forward(self, x: Any) -> Any:
            whole = torch.cat([self.none, x, self.nothing])
            return whole @ self.own + whole @ self.again + whole @ self.turned

    module, x = Shared(), torch.randn(3, 5)
    model = treadle.from_torch(module, (x,))
    assert set(model.graph.parameters) <= {"own", "turned", "none", "nothing"}
    assert {"own", "turned"} <= set(model.graph.parameters)
    assert_equal(model, module, (x,))


def test_vision_and_speech_encoders() -> None:
    vit = built("ViTModel", _VIT)
    example = {"pixel_values": torch.randn(2, 2, 12, 12)}
    model = treadle.from_torch(vit, example, dynamic={"pixel_values": {0: "B"}})
    assert_equal(model, vit, example, {"pixel_values": torch.randn(1, 2, 12, 12)})
    whisper = built("WhisperModel", _WHISPER)
    speech = {"input_features": torch.randn(2, 8, 20)}
    model = treadle.from_torch(whisper, speech, dynamic={"input_features": {0: "B"}})
    assert_equal(model, whisper, speech, {"input_features": torch.randn(3, 8, 20)})


# -- a user's module -----------------------------------------------------------------------------------------------


class Block(nn.Module):  # type: ignore[misc]
    """Layers of torch.nn, slices, assignments in place, a constant and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.shift = torch.linspace(0, 1, 16)
        self.register_buffer("places", torch.arange(9))

    def forward(self, x: Any, hidden: Any = None) -> dict[str, Any]:
        y = self.encoder(x, src_key_padding_mask=hidden)
        y = y * torch.tensor([2.0]) + self.shift
        y[:, 0] = 1.0
        kept = y.masked_fill(hidden[..., None], 0.0)
        ends = kept.cumsum(1)[:, -1]
        return {"states": y, "pooled": (ends, [x.shape[1] * kept.mean(1), y.argmax(-1) + self.places[1]])}


def test_a_module_of_ones_own() -> None:
    torch.manual_seed(0)
    module = drawn(Block())

    def example(batch: int, length: int) -> dict[str, Any]:
        ends = torch.tensor([length, length - 3, length - 1])[:batch, None]
        return {"x": torch.randn(batch, length, 16), "hidden": torch.arange(length)[None] >= ends}

    model = treadle.from_torch(module, example(2, 5), dynamic={"x": "B S 16", "hidden": "B S"})
    assert list(model.graph.main.outputs) == ["states", "pooled_0", "pooled_1_0", "pooled_1_1"]
    assert not model.opaque
    assert_equal(model, module, example(2, 5), example(3, 8), example(1, 4))


def test_small_buffers_become_constants_and_larger_ones_weights() -> None:
    class Held(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.few = nn.Parameter(torch.randn(3))
            for count in (16, 17):
                self.register_buffer(f"floats{count}", torch.randn(count))
            for count in (4096, 4097):
                self.register_buffer(f"places{count}", torch.randint(0, 9, (count,)))

        def forward(self, x: Any) -> Any:
            floats, places = self.floats16.sum() + self.floats17.sum(), self.places4096.sum() + self.places4097.sum()
            return x + self.few.sum() + floats + places

    module, x = Held(), torch.randn(2)
    model = treadle.from_torch(module, (x,))
    assert list(model.graph.parameters) == ["few", "floats17", "places4097"]
    assert_equal(model, module, (x,))


def test_arguments_in_containers_go_by_the_names_that_the_graph_has() -> None:
    class Nested(nn.Module):  # type: ignore[misc]
        def forward(self, first: Any, pair: Any, scale: float = 1.0) -> Any:
            return first["a"] * scale + pair[0] @ pair[1]

    module = Nested()
    named = {"first": {"a": torch.randn(2, 2)}, "pair": [torch.randn(2, 3), torch.randn(3, 2)], "scale": 2.0}
    for example in (named, tuple(named.values())):
        model = treadle.from_torch(module, example)
        assert list(model.arguments(example)) == ["first_a", "pair_0", "pair_1"]
        assert_equal(model, module, example)
    with pytest.raises(treadle.TreadleError, match="pair_0 is not a dense tensor") as caught:
        model.arguments({"pair": [torch.eye(2).to_sparse()]})
    assert "pair_0.to_dense()" in str(caught.value)


class Turned(nn.Module):  # type: ignore[misc]
    """Attention with heads that are rotated in pairs before they are transposed, in GPT-J's two ways and in Llama's."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 32)
        self.register_buffer("frequencies", 100.0 ** -(torch.arange(0, 8, 2).float() / 8))

    def turn(self, x: Any) -> Any:
        angles = torch.outer(torch.arange(x.shape[1]).float(), self.frequencies)[None, :, None, :]
        if self.way == "repeated":
            cos, sin = (torch.repeat_interleave(table, 2, 3) for table in (angles.cos(), angles.sin()))
            return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin
        if self.way == "strided":
            one, two = x[..., ::2], x[..., 1::2]
        else:
            one, two = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack((one * cos - two * sin, one * sin + two * cos), -1).flatten(3)

    def forward(self, x: Any) -> Any:
        heads = (*x.shape[:2], 4, 8)
        q, k = (self.turn(each(x).view(heads)).transpose(1, 2) for each in (self.q, self.k))
        return torch.softmax(q @ k.transpose(2, 3) * 8**-0.5, -1) @ x.view(heads).transpose(1, 2)


@pytest.mark.parametrize("way", ["repeated", "strided", "unbound"])
def test_heads_turned_in_pairs_before_they_are_moved_are_rotary(way: str) -> None:
    module, example = drawn(Turned(way)).eval(), {"x": torch.randn(2, 5, 32)}
    model = treadle.from_torch(module, example, dynamic={"x": "B S 32"})
    made = assert_equal(model, module, example, {"x": torch.randn(3, 7, 32)})
    ops = [node.op.name for _, node in made.graph.walk()]
    assert (ops.count("rotary"), ops.count("attention")) == (2, 1)


def test_a_bfloat16_module_keeps_its_dtype() -> None:
    module = drawn(nn.Linear(4, 3)).bfloat16()
    x = torch.randn(2, 4).bfloat16()
    model = treadle.from_torch(module, (x,))
    assert str(next(iter(model.graph.main.outputs.values())).type) == "bf16[2, 3]"
    got = treadle.compile(model, backend="torch")(**model.arguments((x,)))["output"]
    np.testing.assert_allclose(got, module(x).detach().float().numpy(), rtol=2.0**-7, atol=2.0**-7)


def test_torch_is_loaded_by_the_call_alone() -> None:
    code = "import sys, treadle; treadle.from_torch; assert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_state_dict_with_unused_parameters_fits() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    module, x = Part().eval(), torch.randn(2, 4)
    imported = treadle.from_torch(module, (x,))
    assert imported.unused == ("other.weight", "other.bias")
    again = Part().eval()
    exe = treadle.compile(imported, weights=again.state_dict())
    np.testing.assert_allclose(exe(x=x.numpy())["output"], again(x).detach().numpy(), atol=1e-6)
    with pytest.raises(treadle.UsageError, match="the model lacks 1 of the parameters") as caught:
        treadle.compile(imported, weights={**again.state_dict(), "usedd.bias": x})
    assert caught.value.received == "usedd.bias"


def test_a_module_is_no_model_before_it_is_imported() -> None:
    module, example_inputs = nn.Linear(3, 4), (torch.ones(2, 3),)
    with pytest.raises(treadle.UsageError) as caught:
        treadle.compile(module)
    way, _, _ = str(caught.value.hint).partition(" in its place, where")
    imported = eval(way, {"t": treadle, "module": module, "example_inputs": example_inputs})
    exe = treadle.compile(imported)
    np.testing.assert_allclose(
        exe(input=example_inputs[0].numpy())["output"], module(*example_inputs).detach(), atol=1e-6
    )


def test_an_imported_module_shows_as_one_line() -> None:
    model = treadle.from_torch(nn.Linear(3, 4), (torch.ones(2, 3),))
    assert repr(model) == "<imported Linear: (input: f32[2, 3]) -> (output: f32[2, 4]), 2 weights>"


NAMES: dict[str, tuple[Any, list[str]]] = {
    "a tensor": (lambda x: x, ["output"]),
    "a tuple of one": (lambda x: (x,), ["output"]),
    "a tuple": (lambda x: (x, [x * 2, x * 3]), ["output_0", "output_1_0", "output_1_1"]),
    "no tensors between": (lambda x: {"a": None, "n": 3, "b": x}, ["b"]),
    "odd keys": (lambda x: {"": x, "a b": x * 2, 3: x * 3}, ["output", "a_b", "output_3"]),
    "equal ones": (
        lambda x: {"a": {"b": x}, "a_b": x * 2, "a_b_2": x * 3, "a.b": x * 4},
        ["a_b", "a_b_2", "a_b_2_2", "a_b_3"],
    ),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_result_has_a_name_of_its_own(kind: str) -> None:
    rule, names = NAMES[kind]
    module, x = Applied(rule), torch.randn(2)
    model = treadle.from_torch(module, (x,))
    assert list(model.graph.main.outputs) == names
    assert_equal(model, module, (x,))


class Pair:
    """A container whose type is not registered with torch."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


def test_containers_that_tell_torch_no_names() -> None:
    pytree = pytest.importorskip("torch.utils._pytree")
    pytree.register_pytree_node(
        Pair, lambda p: ([p.first, p.second], None), lambda parts, _: Pair(*parts), serialized_type_name="tests.Pair"
    )
    module, x = Applied(lambda x: Pair(x, x + 1)), torch.randn(2)
    model = treadle.from_torch(module, (x,))
    assert list(model.graph.main.outputs) == ["output_0", "output_1"]
    assert_equal(model, module, (x,))


def test_a_dtype_that_numpy_lacks_is_no_argument() -> None:
    model = treadle.from_torch(Applied(lambda x: x * 2), (torch.randn(2),))
    with pytest.raises(treadle.FrontendError, match="x cannot be converted to a NumPy array") as caught:
        model.arguments({"x": torch.zeros(2).to(torch.float8_e4m3fn)})
    assert "Float8_e4m3fn" in str(caught.value.received)


def test_lines_of_generated_code_are_no_lines_of_the_users() -> None:
    made, own, torchs = (
        f'File "{name}", line 3' for name in ("<eval_with_key>.7", "model.py", "/site-packages/torch/a.py")
    )
    assert str(source_in("\n".join([own, torchs, made]))) == "model.py:3"
    assert str(source_in("\n".join([torchs, made]))) == "torch/a.py:3"
    assert source_in(made) is None
    assert source_in(None) is None
    assert scope_of(SimpleNamespace(meta={})) == ""


def test_an_example_of_size_one_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export may then write a size of 1 in place of a symbol."""

    def fails(*_: object) -> None:
        raise FrontendError("aten.view.default: reshape: x has 4*B elements, but the shape has 4")

    monkeypatch.setattr("treadle.frontends.torch_export.importer._imported", fails)
    for rows, hint in ((1, "an example in which the dimensions of dynamic= have a size of 2 or more"), (2, None)):
        with pytest.raises(FrontendError) as caught:
            treadle.from_torch(nn.ReLU(), (torch.ones(rows, 4),), dynamic={"input": "B _"})
        assert caught.value.hint == hint


def test_operators_that_are_registered_after_an_import_are_decomposed() -> None:
    """The first module is decomposed, too: its square is written in place."""
    x = torch.randn(2, 3)
    first = Applied(lambda x: x.clone().pow_(2))
    assert_equal(treadle.from_torch(first, (x,)), first, (x,))
    with torch.library._scoped_library("treadle_tests", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
        second = Applied(lambda x: torch.ops.treadle_tests.twice(x) + 1)
        assert_equal(treadle.from_torch(second, (x,)), second, (x,))
