"""`treadle explain`: reports on fusion, layouts, storage, memory, quantization, sharding and the decoding step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import (
    NOTHING_CERTIFIED,
    AsJson,
    Axis,
    BackendName,
    CacheName,
    Certify,
    Config,
    Device,
    Dtype,
    Limit,
    ModelName,
    OptionalInputs,
    Quantize,
    Recipe,
    Widen,
    names_of,
)
from treadle.ir.errors import UsageError


@command("explain", judges=lambda options: bool(options["expect"]))
def explain_sites(
    model: ModelName,
    subject: Annotated[
        str,
        typer.Argument(
            metavar="SUBJECT",
            help="fusion, layouts, storage, memory, quantization, sharding or step.",
            show_default=False,
        ),
    ],
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="OP=N", help="Exit with 1 unless a run has N ops OP, such as attention=12. Repeatable."),
    ] = None,
    certify: Certify = False,
    config: Config = None,
    limit: Limit = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    widen: Widen = None,
    inputs: OptionalInputs = None,
    cache: CacheName = None,
    backend: BackendName = "numpy",
    sizes: Annotated[
        str | None,
        typer.Option(metavar="B=1,S=128", help="memory, sharding: the sizes of symbolic axes.", show_default=False),
    ] = None,
    donate: Annotated[
        list[str] | None,
        typer.Option(metavar="INPUT", help="memory: an input that callers donate. Repeatable.", show_default=False),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="memory: draw the arena over time; sharding: the mesh and the timetable.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="memory: show what grew since --json wrote FILE.", show_default=False),
    ] = None,
    mesh: Annotated[
        str | None,
        typer.Option(metavar="AXES", help="sharding: the mesh of devices, such as tp=2,dp=2.", show_default=False),
    ] = None,
    recipe: Recipe = None,
    axis: Axis = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Explain what the compiler did, and why.

    fusion: for every place where a fused op could stand, the rule that fused it, or the reason why not.

    layouts: for every weight, the layout in which a backend reads it, how that is derived when weights are bound, and
    which kernels need it.

    storage: for every value and weight, its memory on a backend, its layout, its lifetime, and why.

    memory: the peak of a run, the values alive at the peak, why, and what would lower it.

    quantization: for every weight, its encoding under --quantize, its bytes, and why; with int8 also the activations.

    sharding: for a model split over --mesh, every collective and its reason, memory per device, the bottleneck, and the
    change that would save the most.

    step: the derived decoding step, its states with their sizes, and what each op became.
    """
    from treadle.explaining.fusion import explain_fusion, parse_expected
    from treadle.explaining.layouts import explain_layouts
    from treadle.explaining.memory import explain_memory
    from treadle.explaining.quantization import explain_quantization
    from treadle.explaining.sharding import explain_sharding
    from treadle.explaining.step import explain_step
    from treadle.explaining.storage import explain_storage
    from treadle.fitting import fit_prose, fitted
    from treadle.option_values import parse_axes, parse_config
    from treadle.progress import working

    functions: dict[str, Callable[..., Any]] = {
        "fusion": explain_fusion,
        "layouts": explain_layouts,
        "storage": explain_storage,
        "memory": explain_memory,
        "quantization": explain_quantization,
        "sharding": explain_sharding,
        "step": explain_step,
    }
    if subject not in functions:
        raise UsageError("unknown subject to explain", received=repr(subject), hint="one of " + ", ".join(functions))
    if cache is not None and subject != "step":
        raise UsageError("--cache applies to step only", received=f"explain {model} {subject}")
    chosen = parse_config(config or (), limit or (), functions[subject]) | {"inputs": names_of(inputs)}
    chosen |= {"dtype": dtype, "quantize": quantize, "widen": names_of(widen) or ()}
    if subject not in ("memory", "sharding") and (sizes is not None or svg is not None):
        raise UsageError("--sizes and --svg apply to memory and sharding only", received=f"explain {model} {subject}")
    if subject != "memory" and (donate or against is not None):
        raise UsageError("--donate and --against apply to memory only", received=f"explain {model} {subject}")
    if against is not None and as_json:
        raise UsageError("--against prints text, and --json prints one object", hint="one of them")
    split = {"mesh": mesh, "recipe": recipe, "axes": parse_axes(axis or ()) or None, "device": device}
    if subject != "sharding" and any(value is not None for value in split.values()):
        message = "--mesh, --recipe, --axis and --device apply to sharding only"
        raise UsageError(message, received=f"explain {model} {subject}")
    if subject != "fusion":
        if expect or certify:
            raise UsageError("--expect and --certify apply to fusion only", received=f"explain {model} {subject}")
        if subject == "memory":
            _memory(model, backend, chosen | {"donate": donate or ()}, sizes, svg, against, as_json)
        elif subject == "sharding":
            _sharding(model, chosen, split, sizes, svg, as_json)
        elif subject == "step":
            _step(model, chosen | {"cache": cache}, as_json)
        elif subject == "quantization":
            _quantization(model, chosen, as_json)
        else:
            _lowered(model, subject, backend, chosen, as_json)
        return
    chosen["certify"] = certify or None
    chosen["expect"] = parse_expected(expect or ())
    with working(f"looking for fused ops in {model}", shown=not as_json):
        found = explain_fusion(model, **chosen)
    if as_json:
        facts = [c.as_dict() for record in found.optimized.log for c in record.certificates]
        print_json(found.as_dict() | ({"certificates": facts} if certify else {}))
    else:
        print(fitted(str(found), lambda _, width: found.text(width)))
        if certify:
            print("\n" + fitted(found.optimized.log.certified() or NOTHING_CERTIFIED, fit_prose))
    if not found.met:
        raise typer.Exit(1)


def _lowered(model: str, subject: str, backend: str, chosen: dict[str, Any], as_json: bool) -> None:
    """Print a report on a backend's passes: layouts or storage."""
    from treadle.explaining.layouts import Layouts, explain_layouts
    from treadle.explaining.storage import StorageReport, explain_storage
    from treadle.fitting import fit_prose, fitted
    from treadle.progress import working

    found: Layouts | StorageReport
    with working(f"lowering {model} for {backend}", shown=not as_json):
        if subject == "layouts":
            found = explain_layouts(model, backend=backend, **chosen)
        else:
            found = explain_storage(model, backend=backend, **chosen)
    if as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))


def _memory(
    model: str,
    backend: str,
    chosen: dict[str, Any],
    sizes: str | None,
    svg: Path | None,
    against: Path | None,
    as_json: bool,
) -> None:
    from treadle.explaining.memory import compare_memory, explain_memory, read_memory
    from treadle.explaining.memory_drawing import draw_memory, write_drawing
    from treadle.fitting import fit_prose, fitted
    from treadle.option_values import parse_sizes
    from treadle.progress import working

    asked = parse_sizes(sizes)
    asked |= {name: chosen.pop(name) for name in [*chosen] if name.isupper()}  # axes; settings are lowercase
    with working(f"lowering {model} for {backend}", shown=not as_json):
        found = explain_memory(model, backend=backend, sizes=asked, **chosen)
    if svg is not None:
        write_drawing(svg, draw_memory(found))
    if against is not None:
        print(compare_memory(read_memory(against), found.as_dict()))
    elif as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))


def _sharding(
    model: str,
    chosen: dict[str, Any],
    split: dict[str, Any],
    sizes: str | None,
    svg: Path | None,
    as_json: bool,
) -> None:
    from treadle.explaining.memory_drawing import write_drawing
    from treadle.explaining.sharding import explain_sharding
    from treadle.explaining.sharding_drawing import draw_sharding
    from treadle.fitting import fit_prose, fitted
    from treadle.option_values import parse_sizes
    from treadle.progress import working

    if split["mesh"] is None:
        raise UsageError("sharding needs a mesh", received=f"explain {model} sharding", hint="--mesh tp=2,dp=2")
    asked = {name: value for name, value in split.items() if value is not None}
    with working(f"planning {model}", shown=not as_json):
        found = explain_sharding(model, sizes=parse_sizes(sizes), **asked, **chosen)
    if svg is not None:
        write_drawing(svg, draw_sharding(found))
    if as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))


def _quantization(model: str, chosen: dict[str, Any], as_json: bool) -> None:
    from treadle.explaining.quantization import explain_quantization
    from treadle.fitting import fit_prose, fitted
    from treadle.progress import working

    with working(f"planning the quantization of {model}", shown=not as_json):
        found = explain_quantization(model, **chosen)
    if as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))


def _step(model: str, chosen: dict[str, Any], as_json: bool) -> None:
    from treadle.explaining.step import explain_step
    from treadle.fitting import fit_prose, fitted
    from treadle.progress import working

    with working(f"deriving the step of {model}", shown=not as_json):
        found = explain_step(model, **chosen)
    if as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))
