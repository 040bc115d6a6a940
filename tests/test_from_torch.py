"""`from_torch`: modules imported through torch.export give the module's own numbers, or are refused with their line.

Float32 through a few layers on two implementations: both round at 2^-24 an operation, over sums of tens of terms, so
2e-5 of the largest output is far above rounding and far below any mistake.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import treadle
from treadle.frontends.torch_export.model import TorchModel

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional

VOCAB = 37
ROOM = 2e-5
BACKENDS = ("numpy", "torch")


def leaves(result: Any) -> list[Any]:
    """The tensors of a module's result, in order."""
    from torch.utils import _pytree as pytree

    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def assert_equal(model: TorchModel, module: Any, *examples: Any) -> treadle.Compiled:
    """Hold an imported module against itself in torch, on every backend. Returns it compiled."""
    # Of the same passes on the same graph, one certificate will do.
    executables = [
        treadle.compile(model, backend=name, certify=None if name == "numpy" else False) for name in BACKENDS
    ]
    for example in examples:
        with torch.no_grad():
            wanted = leaves(module(**example) if isinstance(example, Mapping) else module(*example))
        for exe in executables:
            got = exe(**model.arguments(example))
            assert len(got) == len(wanted)
            for (name, ours), theirs in zip(got.items(), wanted, strict=True):
                held = theirs.numpy()
                assert ours.dtype == held.dtype, name
                assert ours.shape == held.shape, name
                room = ROOM * max(float(np.abs(held).max()), 1e-3) if held.dtype.kind == "f" else 0
                np.testing.assert_allclose(ours, held, rtol=0, atol=room, err_msg=name)
    return executables[0]


def drawn(module: Any) -> Any:
    """Every weight drawn anew, norms and biases too, so that two of them in each other's place would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            mean = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            weight.normal_(mean, 0.2, generator=generator)
    return module.eval()


# -- models of Hugging Face's --------------------------------------------------------------------------------------

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
    "qwen2": ("Qwen2ForCausalLM", _DECODER),
    "gemma": ("GemmaForCausalLM", {**_DECODER, "num_key_value_heads": 1, "head_dim": 8}),
    "clip-text": ("CLIPTextModel", {**_ENCODER, "bos_token_id": 0, "eos_token_id": 5}),
    "bart-encoder": ("BartModel", _BART),
}


def built(architecture: str, config: Mapping[str, Any], attention: str = "sdpa") -> Any:
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, architecture)
    module = drawn(cls(cls.config_class(**config, attn_implementation=attention)))
    return module.encoder if architecture in ("BartModel", "WhisperModel") else module


def tokens(batch: int, length: int) -> dict[str, Any]:
    """Ids and a mask whose rows end at different places."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ends = torch.tensor([length, length - 2, length - 1])[:batch, None]
    return {
        "input_ids": torch.randint(0, VOCAB, (batch, length), generator=generator),
        "attention_mask": (torch.arange(length)[None] < ends).long(),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_language_models_at_any_size(family: str) -> None:
    """Qwen2's attention in its parts, the others' as one operator: either way it is one op in the end."""
    eager = family == "qwen2"
    module = built(*FAMILIES[family], attention="eager" if eager else "sdpa")
    example = tokens(2, 7)
    model = treadle.from_torch(module, example, dynamic={"input_ids": "B S", "attention_mask": "B S"})
    assert {str(size) for size in model.symbols.values()} == {"B", "S"}
    assert not model.opaque
    assert ("scaled_dot_product_attention.default" in model.operators) is not eager
    exe = assert_equal(model, module, example, tokens(3, 11), tokens(1, 5))
    assert sum(node.op.name == "attention" for _, node in exe.graph.walk()) == 2


def test_nodes_say_their_module_and_line() -> None:
    module = built(*FAMILIES["bart-encoder"])
    model = treadle.from_torch(module, tokens(2, 7))
    attention = [n for n in model.graph.main.nodes if n.op.name == "attention"]
    assert [n.scope for n in attention] == ["layers.0.self_attn", "layers.1.self_attn"]
    source = attention[0].source
    assert source is not None
    assert source.file.startswith("transformers/")
    assert {str(n) for v in model.graph.main.inputs for n in v.type.shape} == {"2", "7"}  # nothing was named


def test_tied_weights_enter_once() -> None:
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    example = (torch.tensor([[1, 4, 0]]),)
    model = treadle.from_torch(tied, example)
    assert len(model.weights) == 1
    assert_equal(model, tied, example)


def test_vision_and_speech_encoders() -> None:
    vit = built("ViTModel", _VIT)
    example = {"pixel_values": torch.randn(2, 2, 12, 12)}
    model = treadle.from_torch(vit, example, dynamic={"pixel_values": {0: "B"}})
    assert_equal(model, vit, example, {"pixel_values": torch.randn(1, 2, 12, 12)})
    whisper = built("WhisperModel", _WHISPER)
    speech = {"input_features": torch.randn(2, 8, 20)}
    model = treadle.from_torch(whisper, speech, dynamic={"input_features": {0: "B"}})
    assert_equal(model, whisper, speech, {"input_features": torch.randn(3, 8, 20)})


# -- a module of one's own -----------------------------------------------------------------------------------------


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


class Masked(nn.Module):  # type: ignore[misc]
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


@pytest.mark.parametrize("mask", ["none", "bool", "row", "float", "causal", "grouped", "one head"])
def test_attention_means_what_it_means_in_torch(mask: str) -> None:
    torch.manual_seed(0)
    heads = 2 if mask == "grouped" else 4
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 5, 8), torch.randn(2, heads, 5, 6)
    given, options = None, dict[str, Any](scale=0.3)
    match mask:
        case "bool":
            given = torch.rand(2, 1, 3, 5) > 0.4
            given[1, :, 1] = False  # a row that sees nothing: zeros
        case "row":
            given = torch.rand(1, 5) > 0.4
        case "float":
            given = torch.randn(4, 3, 5)
        case "causal":
            options = {"is_causal": True}
        case "grouped":
            options = {"enable_gqa": True}
        case "one head":
            q, k, v, given = q[:, 0], k[:, 0], v[:, 0], torch.rand(2, 3, 5) > 0.2
    module = Masked(**options)
    example = (q, k, v) if given is None else (q, k, v, given)
    assert_equal(treadle.from_torch(module, example), module, example)


OPERATORS: dict[str, Any] = {
    "integers": lambda x: ((x * 7).int() // 3, torch.div((x * 9).int(), 4, rounding_mode="trunc"), (x * 9).long() % -4),
    "promotion": lambda x: (x.int() + 0.5, x.int() / 2, x > 0.1, x.int() == x, x.double() - x, 1 - x, 2.0**x),
    "choices": lambda x: (torch.where(x > 0, x, 1.5), x.clamp(-0.5, 0.5), x.clamp(min=0.1), torch.maximum(x, -x)),
    "functions": lambda x: (F.softplus(x), F.hardswish(x), F.leaky_relu(x), x.ceil(), x.trunc(), x.round(), F.mish(x)),
    "along": lambda x: (x.var(-1), x.std(0, correction=0), x.logsumexp(1), x.norm(dim=-1), x.amin((0, 2)), x.sum()),
    "extremes": lambda x: (*x.max(1), x.argmin(-1, keepdim=True), *x.topk(2, -1), *x.sort(1, descending=True)),
    "truths": lambda x: ((x > 0).any(-1), (x > -3).all(), (x > 0).sum(0), ~(x > 0) | (x < 1), (x > 0) ^ (x > 1)),
    "softmax": lambda x: (x.softmax(1), x.log_softmax(-1), F.softmax(x, -1, dtype=torch.float64)),
    "norms": lambda x: (F.layer_norm(x, x.shape[1:]), F.rms_norm(x, x.shape[-1:]), F.group_norm(x, 3), F.normalize(x)),
    "places": lambda x: (x[:, 1], x[..., ::2], x[:, [2, 0, -1]], x[[0, 1], :, [3, -2]], x.flip(1), x.roll(1, -1)),
    "picks": lambda x: (x.gather(1, x[:, :2].argsort(1)), x.index_select(-1, torch.tensor([3, 0])), x[None, 1:, -2:]),
    "joins": lambda x: (torch.stack([x, -x], 1), torch.cat([x, x[:, :1].double()], 1), *x.chunk(2, -1), *x.unbind(1)),
    "repeats": lambda x: (x.repeat(1, 2, 1), x.repeat_interleave(3, dim=-1), x.tile(2)),
    "pads": lambda x: (F.pad(x, (1, 2, -1, 0), value=3), F.pad(x, (0, 1))),
    "views": lambda x: (x.reshape(4, -1), x.view(2, 3, 2, 2).transpose(1, 2).reshape(4, 6), x.mT, x.movedim(0, 2)),
    "cuts": lambda x: (x.reshape(2, 6, 2), x.reshape(6, 4).reshape(3, 8), x.flatten(), x.reshape(2, 2, 6)),
    "triangles": lambda x: (x.tril(), x.triu(1), torch.ones(3, 4).tril(-1) * x, torch.eye(4) + x[0, :1]),
    "made": lambda x: (torch.arange(4) + x, torch.arange(1, 3, 0.5) * x, torch.full_like(x, 2), x.new_zeros(2)),
    "differences": lambda x: (x.diff(dim=1), (x > 0).diff(prepend=x[..., :1] > 1)),
    "products": lambda x: (x @ x.mT, torch.einsum("bij,bkj->bik", x, x), x[0] @ x[1, 0]),
    "sums": lambda x: (torch.baddbmm(x @ x.mT, x, x.mT), torch.addmm(x[0, :, 0], x[0], x[1].mT, alpha=0.5, beta=2)),
    "convolutions": lambda x: (
        F.conv1d(x, x[:, :, :3]),
        F.conv1d(x, x[0, :, None, :2], padding="same", groups=3),
        F.conv1d(x[0], x[:, :, :2], padding=2, stride=2, dilation=2),
        F.conv2d(x[:, None], x[:1, None, :2, :2], x[0, 0, :1], padding=(1, 0)),
    ),
    "writes": lambda x: (torch.slice_scatter(x, x[:, :1] * 2, 1, 1, 2), x.select_scatter(x[:, 0], 1, -1)),
}


class Applied(nn.Module):  # type: ignore[misc]
    def __init__(self, rule: Any) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Any) -> Any:
        return self.rule(x)


@pytest.mark.parametrize("group", OPERATORS)
def test_operators(group: str) -> None:
    """Values apart from each other by more than rounding, so that orders are told."""
    values = torch.randperm(24, generator=torch.Generator().manual_seed(1)).float().reshape(2, 3, 4)
    x = (values - 11.3) / 5
    module = Applied(OPERATORS[group])
    assert_equal(treadle.from_torch(module, (x,)), module, (x,))


# -- sizes ---------------------------------------------------------------------------------------------------------


class Sized(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        if x.shape[0] == 1:
            return x * 3
        if x.shape[1] > 3:
            x = x + 1
        return x * 2 if x.shape[1] <= 6 else x


def test_a_size_that_the_code_branches_on_is_bounded_as_it_was_traced() -> None:
    model = treadle.from_torch(Sized(), (torch.randn(3, 5),), dynamic={"x": "A N"})
    assert model.graph.symbols["A"].lower == 2
    assert (model.graph.symbols["N"].lower, model.graph.symbols["N"].upper) == (4, 6)
    assert_equal(model, Sized(), (torch.randn(2, 4),), (torch.randn(5, 6),))
    exe = treadle.compile(model)
    for shape in ((1, 5), (2, 3), (2, 7)):
        with pytest.raises(treadle.TreadleError, match="must be at"):
            exe(x=np.ones(shape, np.float32))


class Parity(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        if x.shape[0] % 2 == 0:
            return x * 2
        return x


class Ordered(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any, y: Any) -> Any:
        if x.shape[0] > y.shape[0]:
            return x.sum(0)
        return y.sum(0)


def test_a_branch_that_bounds_cannot_say_is_refused() -> None:
    with pytest.raises(treadle.TreadleError, match="branches on a size") as caught:
        treadle.from_torch(Parity(), (torch.randn(4, 2),), dynamic={"x": {0: "N"}})
    assert "Mod(N, 2)" in str(caught.value)
    assert "test_from_torch.py" in str(caught.value)
    pair = (torch.randn(4, 2), torch.randn(3, 2))
    with pytest.raises(treadle.TreadleError, match="branches on a size"):
        treadle.from_torch(Ordered(), pair, dynamic={"x": {0: "N"}, "y": {0: "M"}})
    assert_equal(treadle.from_torch(Ordered(), pair), Ordered(), pair)


# -- refusals ------------------------------------------------------------------------------------------------------


class DataBranch(nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return x
        return -x


class Counting(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        self.calls.add_(1)
        return x + self.calls


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (DataBranch(), "branches on data"),
        (Applied(lambda x: torch.linalg.svd(x)[1]), "svd"),
        (Applied(lambda x: x[x > 0]), "index.Tensor: by truth values"),
        (Applied(torch.fft.rfft), "complex|fft"),
        (nn.Dropout(0.5), "dropout in training mode"),
        (Counting(), "changes a tensor"),
        (Applied(lambda x: x.undefined()), "cannot trace the module"),
    ],
    ids=["branch", "operator", "mask", "complex", "training", "buffer", "attribute"],
)
def test_what_is_not_taken_is_refused(module: Any, words: str) -> None:
    with pytest.raises(treadle.TreadleError, match=words) as caught:
        treadle.from_torch(module, (torch.randn(3, 4),))
    if isinstance(module, Applied | DataBranch):
        assert "test_from_torch.py:" in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("example", "dynamic", "words"),
    [
        ((torch.ones(2, 3), 1), None, "does not fit"),
        ({"y": torch.ones(2)}, None, "does not fit"),
        ([torch.ones(2)], None, "a tuple of arguments"),
        ((torch.ones(2, 3),), {"z": "B"}, "no tensor of the example"),
        ((torch.ones(2, 3),), {"x": "B"}, "1 dimensions, it has 2"),
        ((torch.ones(2, 3),), {"x": {5: "B"}}, "no dimension 5"),
        ((torch.ones(2, 3),), {"x": {0: "B", 1: "B"}}, "2 and 3 in the example"),
        ((torch.ones(2, 3),), {"x": {0: "2B"}}, "identifier"),
    ],
)
def test_examples_and_names_that_do_not_fit(example: Any, dynamic: Any, words: str) -> None:
    with pytest.raises(treadle.TreadleError, match=words):
        treadle.from_torch(Sized(), example, dynamic=dynamic)


def test_a_dimension_that_the_module_fixes() -> None:
    with pytest.raises(treadle.TreadleError, match="dimension 1 of input is 4, whatever its name"):
        treadle.from_torch(nn.Linear(4, 2), (torch.randn(3, 4),), dynamic={"input": "N D"})


def test_it_takes_modules_alone() -> None:
    with pytest.raises(treadle.TreadleError, match=r"takes a torch\.nn\.Module"):
        treadle.from_torch(lambda x: x, (torch.ones(2),))


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
