"""Hints of `from_torch` that depend on the module, followed to the letter: a module in evaluation mode that ignores it,
caches in the output, and experts that transformers runs on parts of the tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import treadle
from tests.torch_modules import Applied, Rule, assert_equal

torch = pytest.importorskip("torch")
nn: Any = pytest.importorskip("torch.nn")
F: Any = torch.nn.functional

X = torch.randn(3, 4)


def hint_of(module: Any, example: Any) -> str:
    with pytest.raises(treadle.TreadleError) as refused:
        treadle.from_torch(module, example)
    return refused.value.hint or ""


# -- examples of another dtype -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("module", [nn.Linear(4, 2), nn.LayerNorm(4), nn.Sequential(nn.GELU(), nn.Linear(4, 2))])
def test_an_example_of_another_dtype_is_converted(dtype: str, module: Any) -> None:
    """Also NumPy's float64. A hint in words of the DSL, such as `t.cast`, would be none for a module."""
    hint = hint_of(module, (X.to(getattr(torch, dtype)),))
    code = hint.partition(", ")[0]
    assert code == "input.to(torch.float32)" and "the dtype of the module's weights" in hint
    model = treadle.from_torch(module, (eval(code, {"torch": torch, "input": X.double()}),))
    assert model.graph.main.inputs[0].type.dtype is treadle.f32


def test_arrays_become_tensors_of_the_usual_dtype() -> None:
    for array in (X.numpy(), X.double().numpy()):
        code = hint_of(nn.Linear(4, 2), (array,))
        treadle.from_torch(nn.Linear(4, 2), (eval(code, {"torch": torch, "input": array}),))


# -- modules that ignore eval() ------------------------------------------------------------------------------------


class Own(nn.Module):  # type: ignore[misc]
    """A module whose `forward` calls a function of its own mode, as the hint says, or always in training mode."""

    def __init__(self, rule: Callable[[Any, Any, bool], Any], heeds: bool) -> None:
        super().__init__()
        self.rule, self.heeds = rule, heeds
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: Any) -> Any:
        return self.rule(self, x, self.training if self.heeds else True)


FUNCTIONAL: dict[str, tuple[Callable[[Any, Any, bool], Any], str]] = {
    "dropout": (lambda m, x, training: F.dropout(x, 0.5, training=training), "training=self.training"),
    "dropout1d": (lambda m, x, training: F.dropout1d(x, 0.5, training=training), "training=self.training"),
    "alpha dropout": (lambda m, x, training: F.alpha_dropout(x, 0.5, training=training), "training=self.training"),
    "native dropout": (lambda m, x, training: torch.native_dropout(x, 0.5, training)[0], "train=self.training"),
    "attention": (
        lambda m, x, training: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if training else 0.0),
        "dropout_p=p if self.training else 0.0",
    ),
    "batch norm": (
        lambda m, x, training: F.batch_norm(x, m.mean, m.variance, training=training),
        "training=self.training",
    ),
    "instance norm": (
        lambda m, x, training: F.instance_norm(x[None], m.mean[:3], m.variance[:3], use_input_stats=training),
        "use_input_stats=self.training",
    ),
}
"""Functions that compute as in training unless an argument says otherwise, and the argument that does."""


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_a_function_in_training_mode_names_its_argument_and_not_eval_alone(name: str) -> None:
    rule, argument = FUNCTIONAL[name]
    module = nn.Sequential(Own(rule, heeds=False))
    both = hint_of(module, (X,))
    assert both.startswith("module.eval()")
    assert argument in both
    with pytest.raises(treadle.TreadleError, match=r"from +\S*test_torch_hints\.py:\d+") as refused:
        treadle.from_torch(module.eval(), (X,))
    assert argument in (refused.value.hint or "")
    assert "module.eval()" not in (refused.value.hint or "")
    heeding = nn.Sequential(Own(rule, heeds=True)).eval()
    assert_equal(treadle.from_torch(heeding, (X,)), heeding, (X,))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.AlphaDropout(0.5),
        nn.BatchNorm1d(4),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_of_torch_in_training_mode_needs_eval_alone(layer: Any) -> None:
    module = nn.Sequential(layer, Applied(lambda x: x * 2))
    assert hint_of(module, (X,)) == "module.eval()"
    assert_equal(treadle.from_torch(module.eval(), (X,)), module, (X,))


def test_a_shared_layer_that_is_called_twice_is_found() -> None:
    layer = Own(FUNCTIONAL["dropout"][0], heeds=False)
    module = nn.Sequential(nn.Identity(), layer, layer).eval()
    assert "training=self.training" in hint_of(module, (X,))


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (2, 3, 4, 5)])
def test_batch_norm_without_running_statistics_takes_those_of_the_batch(shape: tuple[int, ...]) -> None:
    norm: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    module = norm(3, track_running_stats=False).eval()
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    x = torch.randn(shape) * 3 + 1
    assert_equal(treadle.from_torch(module, (x,)), module, (x,))


def test_a_module_that_writes_to_its_tensors_in_evaluation_mode_is_not_sent_to_eval() -> None:
    class Counting(nn.Module):  # type: ignore[misc]
        def __init__(self, writes: bool) -> None:
            super().__init__()
            self.writes = writes
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            if not self.writes:
                calls = self.calls + 1
                return x + calls, calls
            self.calls.add_(1)
            return x + self.calls

    assert hint_of(Counting(writes=True), (X,)).startswith("module.eval()")
    hint = hint_of(Counting(writes=True).eval(), (X,))
    assert "eval()" not in hint
    assert "a new tensor" in hint
    other = Counting(writes=False).eval()
    assert_equal(treadle.from_torch(other, (X,)), other, (X,))


# -- modules of transformers ---------------------------------------------------------------------------------------

IDS = {"input_ids": torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a family that the zoo does not have, with experts."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    place = tmp_path_factory.mktemp("models") / "mixtral"
    transformers.MixtralForCausalLM(config).save_pretrained(place)
    return place


def read(place: Path, **options: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(place, **options).eval()


def follow(hint: str, module: Any) -> None:
    """Execute the first statement of a hint."""
    exec(re.split(r": |, and ", hint)[0], {"module": module})


def logits_agree(module: Any, example: Any = IDS) -> None:
    model = treadle.from_torch(module, example)
    exe = treadle.compile(model, backend="numpy")
    expected = module(**example).logits.detach().numpy()
    np.testing.assert_allclose(exe(**model.arguments(example))["logits"], expected, atol=1e-5)


def test_the_hints_of_a_family_that_the_zoo_does_not_have_lead_to_a_model(mixtral: Path) -> None:
    with pytest.raises(treadle.CheckpointError, match="which no family of the zoo reads") as refused:
        treadle.compile(mixtral)
    assert "module.config.use_cache = False" in (refused.value.hint or "")
    assert 'module.set_experts_implementation("batched_mm")' in (refused.value.hint or "")
    module = read(mixtral)
    first = hint_of(module, IDS)
    assert first.startswith("module.config.use_cache = False: ")
    follow(first, module)
    second = hint_of(module, IDS)
    assert second == 'module.set_experts_implementation("batched_mm")'
    follow(second, module)
    logits_agree(module)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # torch copies its program
def test_the_same_settings_serve_an_onnx_file(mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    module = read(mixtral)
    module.config.use_cache = False
    module.set_experts_implementation("batched_mm")
    torch.onnx.export(module, (IDS["input_ids"],), "model.onnx", dynamo=True)
    exe = treadle.compile("model.onnx", backend="numpy")
    (logits,) = exe(IDS["input_ids"].numpy()).values()
    np.testing.assert_allclose(logits, module(**IDS).logits.detach().numpy(), atol=1e-5)


def test_experts_that_are_computed_one_by_one_are_named_too(mixtral: Path) -> None:
    module = read(mixtral, use_cache=False, experts_implementation="eager")
    hint = hint_of(module, IDS)
    assert hint == 'module.set_experts_implementation("batched_mm")'
    follow(hint, module)
    logits_agree(module)


def test_a_module_within_another_is_named_by_its_path(mixtral: Path) -> None:
    class Wrapped(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleList([read(mixtral)])

        def forward(self, input_ids: Any) -> Any:
            return self.models[0](input_ids)

    module = Wrapped().eval()
    assert hint_of(module, IDS).startswith("module.models[0].config.use_cache = False")
    follow(hint_of(module, IDS), module)
    assert hint_of(module, IDS) == 'module.models[0].set_experts_implementation("batched_mm")'
    follow(hint_of(module, IDS), module)
    logits_agree(module)


def test_a_cache_that_the_example_asks_for_is_left_out_of_it(mixtral: Path) -> None:
    module = read(mixtral, use_cache=False, experts_implementation="batched_mm")
    assert hint_of(module, {**IDS, "use_cache": True}).startswith("use_cache=False in the example")
    logits_agree(module, {**IDS, "use_cache": False})


def test_other_refusals_of_such_a_module_keep_their_own_hints(mixtral: Path) -> None:
    inner = read(mixtral, use_cache=False, experts_implementation="batched_mm")
    module = Rule(lambda input_ids: inner(input_ids).logits.nonzero())
    assert "set_experts" not in hint_of(module, {"input_ids": IDS["input_ids"]})


def test_the_hint_for_an_output_of_an_unknown_class_names_containers_of_tensors() -> None:
    class Answer:
        def __init__(self, y: Any) -> None:
            self.y = y

    hint = hint_of(Applied(lambda x: Answer(x * 2)), (X,))
    assert hint.startswith("return tensors, or tuples, lists and dicts of them")
    other = Applied(lambda x: {"y": x * 2})
    assert_equal(treadle.from_torch(other, (X,)), other, (X,))


@pytest.mark.parametrize(
    ("example", "hint"),
    [
        ((2, 3), "(torch.zeros(2, 3),)"),
        ((torch.ones(2, 3), torch.ones(2, 3)), "(input,)"),
        ((), "(input,)"),
        ({"x": torch.ones(2, 3)}, "(input,)"),
    ],
)
def test_an_example_that_does_not_fit(example: Any, hint: str) -> None:
    """The hint is an example that fits."""
    module = nn.Linear(3, 4)
    with pytest.raises(treadle.UsageError, match="does not fit") as caught:
        treadle.from_torch(module, example)
    code, _, taken = str(caught.value.hint).partition(": ")
    assert (code, taken) == (hint, "its forward takes input")
    treadle.from_torch(module, eval(code, {"torch": torch, "input": torch.ones(2, 3)}))


def test_a_dimension_that_another_argument_fixes() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(mask, 0.0)

    x = torch.ones(2, 3)
    with pytest.raises(treadle.TreadleError, match="specialized dimension 0") as caught:
        treadle.from_torch(Masked(), (x, x > 0), dynamic={"x": "B _"})
    assert "call the dimension of size 2 of mask B too" in str(caught.value.hint)
    treadle.from_torch(Masked(), (x, x > 0), dynamic={"x": "B _", "mask": "B _"})


def test_a_dimension_of_torch_export() -> None:
    for dim, hint in ((torch.export.Dim("N"), "{'x': {0: 'N'}}"), (torch.export.Dim.DYNAMIC, "{'x': {0: 'B'}}")):
        with pytest.raises(treadle.UsageError, match="must be an identifier") as caught:
            treadle.from_torch(nn.ReLU(), {"input": torch.ones(2, 3)}, dynamic={"input": {0: dim}})
        assert caught.value.hint == hint.replace("x", "input")


def test_an_imported_module_is_compiled_before_it_runs() -> None:
    imported = treadle.from_torch(nn.Linear(3, 4), (torch.ones(2, 3),))
    with pytest.raises(treadle.TreadleError, match="imported, not compiled"):
        imported(torch.ones(2, 3))
    for name in ("eval", "state_dict", "forward"):
        with pytest.raises(treadle.UsageError, match=f"has no .{name}") as caught:
            getattr(imported, name)
        assert caught.value.hint
    assert imported.weights.keys() == {"weight", "bias"}
    with pytest.raises(treadle.UsageError, match="takes no configuration") as dynamic:
        treadle.compile(imported, dynamic=True)
    assert "dynamic= of t.from_torch" in str(dynamic.value.hint)


def test_a_class_of_modules_is_no_model() -> None:
    with pytest.raises(treadle.UsageError) as caught:
        treadle.compile(nn.Linear)  # type: ignore[arg-type]
    assert str(caught.value.hint).startswith("t.from_torch(module, example_inputs)")
    assert str(caught.value.hint).endswith("module = Linear(...)")
