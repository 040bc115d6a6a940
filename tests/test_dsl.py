"""The DSL: legal declarations, the treatment of names and bounds, and the errors for mistakes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import pytest

import treadle.frontends.language as t
from treadle.frontends import attention_layers, layers
from treadle.ir.errors import FrontendError, GraphError, RuleError, TreadleError
from treadle.ir.initial_values import Init
from treadle.ir.op_registry import OPS
from treadle.ir.sizing.size_bounds import Bounds
from treadle.ir.verifier import verify
from treadle.program.weights import initial_weights

FILE = Path(__file__).name


def at(function: Callable[..., Any], text: str) -> str:
    """Return the location of a function's line that contains a text, in the form that errors use."""
    lines, first = inspect.getsourcelines(function)
    (number,) = [n for n, each in enumerate(lines, first) if text in each]
    return f"tests/{FILE}:{number}"


# -- declarations --------------------------------------------------------------------------------------------------


@t.model
def sample(x: t.f32["B 4"], y: t.f32["B 4"] | None, *, scale=2.0, bias=True):
    """Scales its input.

    The rest is not its description.
    """
    x = x * scale
    if y is not None:
        x = x + y
    return x + t.parameter("b", 4) if bias else x


def test_a_declaration_describes_itself() -> None:
    assert (sample.name, sample.description) == ("sample", "Scales its input.")
    assert [(i.name, str(i.type), i.optional) for i in sample.declared_inputs] == [
        ("x", "f32[B, 4]", False),
        ("y", "f32[B, 4]", True),
    ]
    assert sample.defaults == {"scale": 2.0, "bias": True}
    assert sample.source.startswith("@t.model\ndef sample(")
    assert repr(sample.configure(scale=3.0)) == "<model sample(scale=3.0)>"


def test_configuring_changes_a_copy() -> None:
    changed = sample.configure(scale=3.0).configure(bias=False, inputs=("y",))
    assert changed.config == {"scale": 3.0, "bias": False}
    assert changed.optional_inputs == ("y",)
    assert changed.configure(scale=1.0).optional_inputs == ("y",), "omitted settings are unchanged"
    assert changed.configure(inputs=("x",)).optional_inputs == (), "a required input may be named"
    assert (sample.config, sample.optional_inputs) == ({}, ())


def test_optional_inputs_are_in_the_graph_when_given() -> None:
    assert [v.name for v in sample.graph().main.inputs] == ["x"]
    assert [n.op.name for n in sample.graph().main.nodes] == ["mul", "add"]
    assert [v.name for v in sample.configure(inputs=("y",)).graph().main.inputs] == ["x", "y"]
    assert [n.op.name for n in sample.configure(inputs=("y",), bias=False).graph().main.nodes] == ["mul", "add"]


def test_a_decorator_may_be_called() -> None:
    @t.model()
    def model(x: t.f32["B"]):
        return x

    assert model.name == "model"


def no_type(x):
    return x


def type_of_python(x: int):
    return x


def any_number(*x: t.f32["B"]):
    return x


def any_options(x: t.f32["B"], **options):
    return x


@pytest.mark.parametrize("function", [no_type, type_of_python, any_number, any_options], ids=lambda f: f.__name__)
def test_inputs_need_types(function: Callable[..., Any]) -> None:
    model = t.model(function)
    name = "options" if function is any_options else "x"
    for use in (model.graph, lambda: model.configure(), lambda: model.declared_inputs):
        with pytest.raises(FrontendError) as caught:
            use()
        assert caught.value.what == f"input {name} of model {function.__name__} needs a type"
        assert caught.value.source == f"{FILE}:{inspect.getsourcelines(function)[1]}, model {function.__name__}"


@pytest.mark.parametrize("annotation", [t.f32, Annotated[t.Tensor, t.f32]], ids=["short", "annotated"])
def test_a_dtype_without_axes_leads_to_a_type(annotation: Any) -> None:
    def layer(x):
        return t.linear(x, 4, name="l")

    layer.__annotations__["x"] = annotation
    with pytest.raises(FrontendError, match="the type of input x of model layer has no axes") as caught:
        t.model(layer).graph()
    mended = re.match(r"x: (.*\]), with", str(caught.value.hint))
    assert mended is not None
    layer.__annotations__["x"] = eval(mended[1], {"t": t, "Annotated": Annotated})
    assert t.model(layer).graph().main.outputs


Vectors = Annotated[t.Tensor, t.f32["B 4"]]


@t.model
def annotated(
    x: Vectors,
    y: Vectors | None = None,
    z: Optional[Annotated[t.Tensor, "no type", t.i64["B"]]] = None,  # noqa: UP045
    w: Annotated[t.Tensor | None, t.i64["B"]] = None,
    *,
    factor: float = 2.0,
) -> t.Tensor:
    """Types in the form in which type checkers read them."""
    return x * factor if y is None else x + y


def test_types_that_checkers_read() -> None:
    assert [(i.name, str(i.type), i.optional) for i in annotated.declared_inputs] == [
        ("x", "f32[B, 4]", False),
        ("y", "f32[B, 4]", True),
        ("z", "i64[B]", True),
        ("w", "i64[B]", True),
    ]
    assert annotated.defaults == {"factor": 2.0}
    assert [n.op.name for n in annotated.graph().main.nodes] == ["mul"]
    assert [n.op.name for n in annotated.configure(inputs=["y"]).graph().main.nodes] == ["add"]


def test_a_model_has_its_functions_signature() -> None:
    assert str(inspect.signature(annotated)).endswith("*, factor: 'float' = 2.0) -> 't.Tensor'")
    assert inspect.getdoc(annotated) == "Types in the form in which type checkers read them."
    assert (annotated.__name__, annotated.__module__) == ("annotated", __name__)
    assert repr(annotated.configure(factor=t.gelu)) == "<model annotated(factor=gelu)>"


def test_inputs_of_a_model_inside_another_go_by_name() -> None:
    @t.model
    def outer(x: Vectors):
        return annotated(annotated(x=x), y=x, factor=3.0)

    assert [n.op.name for n in outer.graph().main.nodes] == ["mul", "add"]


def test_an_input_has_no_default() -> None:
    def model(x: Vectors = 3):
        return x

    with pytest.raises(FrontendError, match="input x of model model has a default") as caught:
        t.model(model).graph()
    assert caught.value.received == "3"


def test_a_type_that_python_cannot_read() -> None:
    def model(x: missing.f32["B"]):
        return x

    for use in (t.model(model).graph, t.model(model).configure):
        with pytest.raises(FrontendError, match="the inputs' types of model model cannot be read: NameError") as caught:
            use()
        assert caught.value.source is not None
        assert caught.value.source.startswith(FILE)


def test_unknown_options_and_inputs() -> None:
    with pytest.raises(FrontendError, match="model sample has no option size") as option:
        sample.configure(size=3, scale=1.0)
    assert option.value.hint == "one of scale, bias"
    with pytest.raises(FrontendError) as misspelt:
        sample.configure(scal=3)
    assert misspelt.value.hint == "did you mean scale? one of scale, bias"
    with pytest.raises(FrontendError, match="model sample has no input z") as unknown:
        sample.configure(inputs=("z", "y"))
    assert unknown.value.hint == "one of x, y"


def test_an_option_without_a_default() -> None:
    @t.model
    def model(x: t.f32["B"], *, factor):
        return x * factor

    with pytest.raises(FrontendError, match="model model needs a value for factor") as caught:
        model.graph()
    assert caught.value.hint == "model.configure(factor=...)"
    assert len(model.configure(factor=2.0).graph().main.nodes) == 1


# -- results of a model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: x * 2.0, ["output"]),
        (lambda x: t.tanh(x), ["output"]),
        (lambda x: t.tanh(x, name="gate"), ["gate"]),
        (lambda x: t.linear(x, 3, name="head"), ["head"]),
        (lambda x: {"a": x, "b": t.tanh(x)}, ["a", "b"]),
        (lambda x: (x, t.tanh(x)), ["output0", "output1"]),
        (lambda x: [x], ["output0"]),
        (lambda x: t.top_k(x, k=2), ["output0", "output1"]),
        (lambda x: t.constant(1.0), ["output"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_outputs_have_names(returned: Callable[..., Any], names: list[str]) -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        return returned(x)

    graph = model.graph()
    verify(graph)
    assert list(graph.main.outputs) == names


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda x: None, "model model returns nothing"),
        (lambda x: 3, "the output of model model is not one of its tensors\n  received  int"),
        (lambda x: {"a": x, "b": None}, "output b of model model is not one of its tensors\n  received  NoneType"),
        (lambda x: (x, [x]), "output output1 of model model is not one of its tensors\n  received  list"),
        (lambda x: {}, "model model returns no outputs"),
        (lambda x: (), "model model returns no outputs"),
        (lambda x: {1: x}, "model model returns outputs whose names are not strings\n  received  1"),
    ],
    ids=lambda value: value.split("\n")[0] if isinstance(value, str) else "",
)
def test_returning_anything_else(returned: Callable[..., Any], said: str) -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        return returned(x)

    with pytest.raises(FrontendError) as caught:
        model.graph()
    assert str(caught.value).startswith(said)
    assert f"from      {FILE}:" in str(caught.value)


# -- tracing -------------------------------------------------------------------------------------------------------


OUTSIDE: dict[str, Callable[[], Any]] = {
    "op": lambda: t.gelu(None),
    "layer": lambda: t.linear(None, 3, name="f"),  # type: ignore[arg-type]
    "parameter": lambda: t.parameter("w", 3),
    "scope": lambda: t.scope("a").__enter__(),
    "stack": lambda: next(iter(t.stack("h", 2))),
    "constant": lambda: t.constant(1.0),
    "bound": lambda: t.bound("S", upper=3),
    "shared": lambda: t.shared_parameter("w"),
}


@pytest.mark.parametrize("use", OUTSIDE)
def test_outside_a_model(use: str) -> None:
    with pytest.raises(FrontendError, match="this can only be used while a model is traced") as caught:
        OUTSIDE[use]()
    first = inspect.getsourcelines(OUTSIDE[use])[1]
    assert caught.value.source == f"tests/{FILE}:{first}"


def test_a_model_is_no_function_outside_another() -> None:
    with pytest.raises(FrontendError, match="model sample is declared, not compiled") as caught:
        sample(1.0)
    assert caught.value.hint == "treadle.compile(sample), which returns an executable"


def test_a_call_outside_a_model_is_compiled_with_its_options() -> None:
    @t.model
    def activated(x: t.f32["B 4"], *, act: Any = t.relu, width: int) -> t.Tensor:
        return act(t.linear(x, width, name="f"))

    with pytest.raises(FrontendError, match="is declared, not compiled") as caught:
        activated(1.0, act=t.gelu, width=3)
    assert (caught.value.hint or "").startswith("treadle.compile(activated, act=t.gelu, width=3)")
    assert (caught.value.hint or "").endswith("which returns an executable")
    with pytest.raises(FrontendError) as caught:
        activated(1.0, act=lambda x: x)
    assert (caught.value.hint or "").startswith("treadle.compile(activated, act=...)")
    with pytest.raises(FrontendError, match="must consist of numbers"):  # not: width is a function
        activated.configure(width="wide").graph()


def test_attention_without_heads_keeps_its_options() -> None:
    @t.model
    def plain(x: t.f32["B S 8"]) -> t.Tensor:
        return t.attention(x, x, x, mask=t.causal, scale=1.0)

    with pytest.raises(RuleError, match="q must have rank 4") as caught:
        plain.graph()
    assert "for x in (q, k, v)], mask=..., scale=...))" in (caught.value.hint or "")


def test_a_stack_in_a_with_statement_keeps_its_number() -> None:
    @t.model
    def twice(x: t.f32["B 8"]) -> t.Tensor:
        with t.stack("h", 2):  # type: ignore[attr-defined]
            return x

    with pytest.raises(FrontendError, match="is a loop, not a block") as caught:
        twice.graph()
    assert caught.value.hint == 'for i in t.stack("h", 2):'


def wrong_sizes(x: t.f32["B 4"]):
    with t.scope("inner"):
        return x + t.parameter("w", 5)


def misspelt(x: t.f32["B 4"]):
    return x.shape.reversed()


def index(x: t.f32["B 4"]):
    return x[:, 4]


def truth(x: t.f32["B 4"]):
    return x if x > 0.0 else -x


def wrong_name(x: t.f32["B 4"]):
    return t.gelo(x)


def half_a_head(x: t.f32["B S 8"]):
    return t.self_attention(x, 3)


def float_width(x: t.f32["B 4"]):
    return t.mlp(x, 8 / 3 * 4)


def ragged(x: t.f32["B 4"]):
    return x + t.constant([[1, 2], [3]])


def strange_start(x: t.f32["B 4"]):
    return x * t.parameter("w", 4, init="xavier")


def declared_twice(x: t.f32["B 4"]):
    x = t.linear(x, 4, name="f")
    return t.linear(x, 4, name="f")


def misspelt_option(x: t.f32["B S 8"]):
    return t.self_attention(x, 4, casual=True)


def misspelt_attribute(x: t.f32["B 4"]):
    return t.softmax(x, axs=-1)


def missing_argument(x: t.f32["B 4"]):
    return t.linear(x, name="f")


def nothing_to_share(x: t.f32["B 4"]):
    return x * t.parameter("word.weight", 4) + t.shared_parameter("wrd.weight")


def bound_of_nothing(x: t.f32["B 4"]):
    t.bound("S", upper=4)
    return x


def bound_too_tight(x: t.f32["B 4"]):
    t.bound("B", lower=5)
    t.bound("B", upper=4)
    return x


def positions_beyond_the_table(x: t.i64["B 16"]):
    return t.embed(t.positions(x), 8, 4, name="wpe")


def no_vocabulary(x: t.f32["B 4"]):
    return t.unembed(x)


def division(x: t.f32["B 4"]):
    return x * (1 / 0)


MISTAKES: list[tuple[Callable[..., Any], str, type[TreadleError], str]] = [
    (wrong_sizes, "x + t", RuleError, "add: sizes disagree: 4 in x, 5 in y"),
    (misspelt, "return", FrontendError, "AttributeError: 'tuple' object has no attribute 'reversed'"),
    (index, "return", RuleError, "from 4 to 5 is outside an axis of size 4"),
    (truth, "return", GraphError, "no data-dependent branches"),
    (wrong_name, "return", FrontendError, "did you mean t.gelu"),
    (half_a_head, "return", FrontendError, "a width of 8 does not split into 3 heads"),
    (float_width, "return", TreadleError, "mlp: hidden must be an integer\n  received  10.6"),
    (ragged, "return", GraphError, "cannot build a constant from lists of different lengths"),
    (strange_start, "return", FrontendError, "parameter w: unknown initial value 'xavier'"),
    (declared_twice, "return", FrontendError, "parameter f.weight is declared twice"),
    (misspelt_option, "return", FrontendError, "did you mean causal=? t.self_attention(x, heads, *, causal=False,"),
    (misspelt_attribute, "return", GraphError, "did you mean axis=? softmax(x, *, axis=-1, name=None)"),
    (missing_argument, "return", FrontendError, "t.linear(x, out, *, bias=True, name)"),
    (nothing_to_share, "return", FrontendError, "did you mean word.weight?"),
    (bound_of_nothing, "t.bound", FrontendError, "no input has an axis 'S'"),
    (bound_too_tight, "upper=4", GraphError, "the bounds of B allow no size"),
    (positions_beyond_the_table, "return", FrontendError, "there are 16 positions, and 8 rows in the table wpe"),
    (no_vocabulary, "return", FrontendError, "unembed needs vocab=, or tied= the scope of an embedding"),
    (division, "return", FrontendError, "ZeroDivisionError: division by zero"),
]


@pytest.mark.parametrize(("function", "text", "kind", "said"), MISTAKES, ids=[m[0].__name__ for m in MISTAKES])
def test_mistakes_name_their_line(function: Callable[..., Any], text: str, kind: type[TreadleError], said: str) -> None:
    with pytest.raises(kind) as caught:
        t.model(function).graph()
    assert said in str(caught.value)
    assert caught.value.source is not None
    assert caught.value.source.split(",")[0] == at(function, text)


LAYERS = {
    name: word
    for module in (layers, attention_layers)
    for name, word in vars(module).items()
    if inspect.isfunction(word) and word.__module__ == module.__name__
}


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("_") and name != "positive"])
def test_a_misspelt_option_of_a_layer(name: str) -> None:
    """Each option of each layer is tried without its second letter. The error names the option, the layer and the
    line.
    """
    signature = inspect.signature(LAYERS[name])
    required = [p.name for p in signature.parameters.values() if p.default is p.empty and p.name != "name"]
    for option in (p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY):
        wrong = option[0] + option[2:]

        @t.model
        def model(x: t.f32["B 4"]):
            return LAYERS[name](*[x] * len(required), **{wrong: None})  # noqa: B023  (called at once)

        with pytest.raises(FrontendError) as caught:
            model.graph()
        assert f"{name}() got an unexpected keyword argument '{wrong}'" in caught.value.what
        assert caught.value.hint is not None
        assert caught.value.hint.startswith(f"did you mean {option}=? t.{name}(")


ATTENTION: dict[str, Any] = {
    # an option of attention, and a value that differs from the default
    "kv_heads": 2, "head_dim": 6, "mask": t.causal, "bias": t.tensor_bias(np.ones((4, 3, 3), np.float32), "h s t"),
    "scale": 0.5, "softcap": 3.0, "projection_bias": False, "key_bias": False, "output_bias": False,
    "normalize": lambda x, name: t.rms_norm(x, name=name), "rotate": lambda x: x * 2.0, "name": "cross",
}  # fmt: skip


@pytest.mark.parametrize("option", ATTENTION)
def test_each_option_of_attention_reaches_it_by_every_name(option: str) -> None:
    given = {option: ATTENTION[option]}
    assert set(ATTENTION) == {
        p.name for p in inspect.signature(t.multi_head_attention).parameters.values() if p.kind is p.KEYWORD_ONLY
    }

    def graph(use: Callable[..., t.Tensor], **options: Any) -> Any:
        @t.model
        def model(x: t.f32["B 3 8"]):
            return {"y": use(x, **options)}

        return model.graph()

    def whole(x: t.Tensor, **options: Any) -> t.Tensor:
        return t.multi_head_attention(x, x, 4, **options)

    wanted = graph(whole, **given)
    assert wanted != graph(whole)
    assert graph(lambda x, **options: t.self_attention(x, 4, **options), **given) == wanted
    assert graph(lambda x, **options: t.cross_attention(x, x, 4, **options), **given) == wanted


@pytest.mark.parametrize("option", ["mask", "bias", "scale", "softcap"])
def test_each_option_of_attention_alone_is_taken(option: str) -> None:
    def ops(**options: Any) -> list[str]:
        @t.model
        def model(x: t.f32["B 4 3 8"]):
            return {"y": t.attention(x, x, x, **options)}

        return [str(node.op.attributes) + node.op.name for node in model.graph().main.nodes]

    assert ops(**{option: ATTENTION[option]}) != ops()


def test_a_mistake_in_the_users_helper_is_told_there() -> None:
    def helper(x: t.Tensor) -> t.Tensor:
        return x + t.parameter("w", 5)

    @t.model
    def model(x: t.f32["B 4"]):
        for _ in t.stack("h", 2):
            with t.scope("inner"):
                x = helper(x)
        return x

    with pytest.raises(RuleError) as caught:
        model.graph()
    assert caught.value.source == f"{at(helper, 'return')}, scope h.0.inner"


def test_a_function_of_the_users_is_not_taken_for_a_layer() -> None:
    def mlp(x: t.Tensor) -> t.Tensor:
        return x

    mlp.__qualname__ = "mlp"  # as for a function at the top of a file

    @t.model
    def model(x: t.f32["B 4"]):
        return mlp(x, hiden=3)

    with pytest.raises(FrontendError, match=r"mlp\(\) got an unexpected keyword argument 'hiden'") as own:
        model.graph()
    assert own.value.hint is None

    @t.model
    def other(x: t.f32["B 4"]):
        return t.mlp(x, hiden=3)

    with pytest.raises(FrontendError) as layer:
        other.graph()
    assert str(layer.value.hint).startswith("did you mean hidden=? t.mlp(x, hidden, ")


def test_a_parameter_declared_twice_names_both_lines() -> None:
    with pytest.raises(FrontendError) as caught:
        t.model(declared_twice).graph()
    first, now = at(declared_twice, "x = t.linear"), at(declared_twice, "return")
    assert caught.value.received == f"first at {first}, now at {now}"


def test_a_failed_trace_leaves_nothing_behind() -> None:
    with pytest.raises(RuleError):
        t.model(wrong_sizes).graph()
    with pytest.raises(FrontendError, match="while a model is traced"):
        t.trace()
    assert sample.graph() == sample.graph()


def test_a_value_of_another_trace_is_caught() -> None:
    kept: list[t.Tensor] = []

    @t.model
    def first(x: t.f32["B 4"]):
        kept.append(x * 2.0)
        return x

    @t.model
    def second(x: t.f32["B 4"]):
        return x + kept[0]

    first.graph()
    with pytest.raises(TreadleError, match="operand 1 of add is not defined before it is used") as caught:
        verify(second.graph())
    assert caught.value.source == at(second.function, "x + kept")


# -- names, scopes and bounds --------------------------------------------------------------------------------------


def test_a_scope_without_a_with_statement_is_refused() -> None:
    @t.model
    def model(x: t.f32["B 8"]):
        t.scope("encoder")
        return t.linear(x, 8, name="f")

    with pytest.raises(FrontendError, match="scope 'encoder' names nothing: it was not entered") as caught:
        model.graph()
    assert caught.value.hint == 'with t.scope("encoder"):'
    assert (caught.value.source or "").startswith("tests/test_dsl.py:")


def test_a_scope_is_also_a_decorator() -> None:
    @t.scope("inner")
    def layer(x: t.Tensor) -> t.Tensor:
        return t.linear(x, 8, name="f")

    @t.model
    def model(x: t.f32["B 8"]):
        outer = t.scope("outer")
        with outer:
            return layer(x)

    assert [*model.graph().parameters] == ["outer.inner.f.weight", "outer.inner.f.bias"]


def test_scopes_name_parameters() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        with t.scope("encoder"):
            for _ in t.stack("layer", 2):
                x = t.mlp(t.layer_norm(x, name="ln"), 8)
        return t.linear(x, 3, bias=False, name="head")

    per_layer = ("ln.weight", "ln.bias", "mlp.up.weight", "mlp.up.bias", "mlp.down.weight", "mlp.down.bias")
    graph = model.graph()
    assert list(graph.parameters) == [f"encoder.layer.{i}.{p}" for i in range(2) for p in per_layer] + ["head.weight"]
    assert graph.initial["encoder.layer.0.ln.weight"] == Init("ones")
    assert graph.initial["encoder.layer.1.mlp.up.bias"] == Init("zeros")
    assert graph.initial["head.weight"] == Init("normal", 0.02)


def test_the_innermost_shared_parameter_counts() -> None:
    @t.model
    def model(x: t.f32["B 4"]):
        t.parameter("w", 4)
        with t.scope("a"):
            x = x * t.shared_parameter("w")
            t.parameter("w", 4)
            with t.scope("b"):
                return x + t.shared_parameter("w")

    mul, add = model.graph().main.nodes
    assert [v.name for v in (*mul.inputs[1:], *add.inputs[1:])] == ["w", "a.w"]


def test_positions_bound_their_axis() -> None:
    @t.model
    def model(tokens: t.i64["B S"], *, context=32, twice=16):
        x = t.embed(tokens, 100, 4, name="wte")
        return x + t.embed(t.positions(tokens), context, 4, name="a") + t.embed(t.positions(tokens), twice, 4, name="b")

    assert model.graph().symbols == {"B": Bounds(), "S": Bounds(1, 16)}, "the tighter of two counts; wte bounds nothing"
    assert model.configure(twice=64).graph().symbols["S"] == Bounds(1, 32)


def test_bounds_by_hand() -> None:
    @t.model
    def model(x: t.f32["B S"]):
        t.bound("S", lower=2, upper=64)
        t.bound("S", upper=100)
        return x

    assert model.graph().symbols == {"B": Bounds(), "S": Bounds(2, 64)}


def test_positions_of_a_fixed_axis_fit_their_table() -> None:
    @t.model
    def model(x: t.i64["B 16"]):
        return t.embed(t.positions(x), 16, 4, name="wpe")

    assert model.graph().symbols == {"B": Bounds()}


# -- a model in a model --------------------------------------------------------------------------------------------


def test_a_model_inside_another() -> None:
    @t.model
    def outer(x: t.f32["B 4"]):
        with t.scope("first"):
            x = sample(x)
        with t.scope("second"):
            return sample(x, x, scale=4.0)

    graph = outer.graph()
    assert list(graph.parameters) == ["first.b", "second.b"]
    assert [n.op.name for n in graph.main.nodes] == ["mul", "add", "mul", "add", "add"]


def test_a_model_inside_another_is_called_right() -> None:
    @t.model
    def unknown(x: t.f32["B 4"]):
        return sample(x, depth=3)

    with pytest.raises(FrontendError, match="model sample has no input or option depth"):
        unknown.graph()

    @t.model
    def too_few(x: t.f32["B 4"]):
        return sample()

    with pytest.raises(FrontendError, match="model sample is called without x") as caught:
        too_few.graph()
    assert caught.value.source == at(too_few.function, "return sample()")
    assert caught.value.hint == "sample(x, y, *, scale=2.0, bias=True)"

    @t.model
    def too_many(x: t.f32["B 4"]):
        return sample(x, x, 3.0)

    with pytest.raises(FrontendError, match="model sample is called with too many inputs"):
        too_many.graph()

    @t.model
    def misspelt(x: t.f32["B 4"]):
        return sample(x, skale=3.0)

    with pytest.raises(FrontendError, match="has no input or option skale") as near:
        misspelt.graph()
    assert (near.value.hint or "").startswith("did you mean scale?")


def test_tracing_one_model_while_another_is_traced() -> None:
    @t.model
    def outer(x: t.f32["B 4"]):
        inner = sample.graph()
        assert len(inner.parameters) == 1
        return x * 2.0

    graph = outer.graph()
    assert [n.op.name for n in graph.main.nodes] == ["mul"]
    assert graph.parameters == {}


# -- initial weights -----------------------------------------------------------------------------------------------


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    @t.model
    def model(x: t.f32["B 4"], *, extra=False):
        if extra:
            x = t.linear(x, 4, name="before")
        for _ in t.stack("h", 3 if extra else 2):
            x = t.linear(x, 4, name="f")
        return x * t.parameter("gain", 4, init="ones")

    plain = initial_weights(model.graph())
    more = initial_weights(model.configure(extra=True).graph())
    assert set(plain) < set(more)
    for name, array in plain.items():
        np.testing.assert_array_equal(array, more[name])
    assert (plain["gain"] == 1).all()
    assert not np.array_equal(plain["h.0.f.weight"], plain["h.1.f.weight"])
    assert not np.array_equal(plain["h.0.f.weight"], initial_weights(model.graph(), seed=1)["h.0.f.weight"])
    np.testing.assert_array_equal(plain["h.0.f.weight"], initial_weights(model.graph())["h.0.f.weight"])


# -- words ---------------------------------------------------------------------------------------------------------


def test_every_op_is_a_word() -> None:
    assert t.ops.layer_norm.__name__ == "layer_norm"
    assert t.layer_norm is not t.ops.layer_norm, "a layer has the name, its op is under ops"
    assert {"softmax", "einsum", "linear", "stack"} <= set(dir(t))
    assert not hasattr(t, "no_such_word")
    with pytest.raises(FrontendError, match=r"did you mean t\.softmax"):
        _ = t.softmx


@pytest.mark.parametrize("module", [t, t.ops])
def test_names_with_an_underscore_are_not_vocabulary(module: Any) -> None:
    """Python looks up such names in modules, and expects AttributeError."""
    with pytest.raises(AttributeError) as caught:
        _ = module._no_such_word
    assert type(caught.value) is AttributeError
    assert not [name for name in dir(module) if name.startswith("_")]
    assert dir(module) == sorted(dir(module))


def test_an_op_as_a_word_says_what_it_is() -> None:
    assert t.ops.softmax.__name__ == t.ops.softmax.__qualname__ == "softmax"
    assert t.ops.softmax is t.ops.softmax
    assert inspect.getdoc(t.ops.softmax) == inspect.getdoc(OPS["softmax"])
    assert list(inspect.signature(t.ops.softmax).parameters) == ["x", "axis", "name"]
    with pytest.raises(FrontendError, match="the DSL has no 'softmx'") as caught:
        _ = t.ops.softmx
    assert caught.value.hint == "did you mean t.softmax?"
