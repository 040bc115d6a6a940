"""`treadle explain`: reports on fusion, layouts, storage, memory, quantization, sharding, the step and GPUs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import NOTHING_CERTIFIED, AsJson, Axis, Device, ModelName, OptionKeywords, Recipe, mesh_flags
from treadle.files.nearest_names import NearestNames, check_suffix
from treadle.ir.errors import UsageError
from treadle.program.option_table import EXPLAINED


@command(
    "explain",
    takes=[f"explain {subject}" for subject in EXPLAINED],
    defaults={"target": None},  # device has another default than the other subjects
    judges=lambda options: bool(options["expect"]),
)
def explain_sites(
    model: ModelName,
    subject: Annotated[
        str | None,
        typer.Argument(
            metavar="SUBJECT",
            help="fusion, layouts, storage, memory, quantization, sharding, step or device.",
            show_default=False,
        ),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(metavar="OP=N", help="Exit with 1 unless a run has N ops OP, such as attention=12. Repeatable."),
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
    *,
    keywords: OptionKeywords,
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

    device: the program for a device, by default --target cuda, which need not be here. With the torch backend, for a
    GPU: the form of each attention, how quantized weights are read, and for each entry what prevents its capture as a
    CUDA graph. With the tvm backend, also for opencl, webgpu and metal: each kernel, its form and its resources, and
    for each entry launches, copies, device memory and the limits that it exceeds.
    """
    from treadle.program.flag_values import parse_axes
    from treadle.program.options import CompileOptions

    subject = _known_subject(model, subject)
    options = CompileOptions.of(f"explain {subject}", keywords)
    if subject == "sharding" and mesh is None:
        hint = mesh_flags(recipe, axis)
        raise UsageError("sharding needs a mesh", received=f"explain {model} sharding", hint=hint)
    if subject not in ("memory", "sharding") and svg is not None:
        raise UsageError("--svg applies to memory and sharding only", received=f"explain {model} {subject}")
    if svg is not None:
        check_suffix(svg, [".svg"], "a drawing")
    if subject != "memory" and against is not None:
        raise UsageError("--against applies to memory only", received=f"explain {model} {subject}")
    if against is not None and as_json:
        raise UsageError("--against prints text, and --json prints one object", hint="one of them")
    split = {"mesh": mesh, "recipe": recipe, "axes": parse_axes(axis or ()) or None, "device": device}
    if subject != "sharding" and any(value is not None for value in split.values()):
        message = "--mesh, --recipe, --axis and --device apply to sharding only"
        raise UsageError(message, received=f"explain {model} {subject}")
    if subject != "fusion" and expect:
        raise UsageError("--expect applies to fusion only", received=f"explain {model} {subject}")
    if subject == "fusion":
        _fusion(model, keywords, expect or (), bool(options.certify), as_json)
    elif subject == "memory":
        _memory(model, keywords, svg, against, as_json)
    elif subject == "sharding":
        _sharding(model, keywords, split, svg, as_json)
    else:
        _report(model, subject, keywords, as_json)


def _known_subject(model: str, subject: str | None) -> str:
    """Return the subject. Raises UsageError if it is missing or unknown, or stands in the place of the model."""
    if subject is None and model in EXPLAINED:
        raise UsageError(
            "explain needs a model",
            received=f"explain {model}",
            hint=f"treadle explain MODEL {model}, such as gpt2 for MODEL",
        )
    if subject is None:
        raise UsageError("explain needs a subject", received=f"explain {model}", hint="one of " + ", ".join(EXPLAINED))
    if subject not in EXPLAINED:
        near = NearestNames(EXPLAINED).of(subject, 1, 0.65)  # "atention" is not "quantization"
        hint = f"{near[0]}?" if near else "one of " + ", ".join(EXPLAINED)
        if model in EXPLAINED:  # the arguments are in the other order
            hint = f"treadle explain {shlex.quote(subject)} {model}"
        raise UsageError("unknown subject to explain", received=repr(subject), hint=hint)
    return subject


def _fusion(model: str, keywords: dict[str, Any], expect: Sequence[str], certify: bool, as_json: bool) -> None:
    from treadle.explaining.fusion import explain_fusion, parse_expected
    from treadle.fitting import fit_prose, fitted
    from treadle.progress import working

    with working(f"looking for fused ops in {model}", shown=not as_json):
        found = explain_fusion(model, expect=parse_expected(expect), **keywords)
    if as_json:
        facts = [c.as_dict() for record in found.optimized.log for c in record.certificates]
        print_json(found.as_dict() | ({"certificates": facts} if certify else {}))
    else:
        print(fitted(str(found), lambda _, width: found.text(width)))
        if certify:
            print("\n" + fitted(found.optimized.log.certified() or NOTHING_CERTIFIED, fit_prose))
    if not found.met:
        raise typer.Exit(1)


def _report(model: str, subject: str, keywords: dict[str, Any], as_json: bool) -> None:
    """Print the report on a subject without options of its own."""
    from treadle.explaining.device import explain_device
    from treadle.explaining.layouts import explain_layouts
    from treadle.explaining.quantization import explain_quantization
    from treadle.explaining.step import explain_step
    from treadle.explaining.storage import explain_storage
    from treadle.fitting import fit_prose, fitted
    from treadle.progress import working

    functions: dict[str, tuple[Callable[..., Any], str]] = {
        "layouts": (explain_layouts, "lowering"),
        "storage": (explain_storage, "lowering"),
        "quantization": (explain_quantization, "planning the quantization of"),
        "step": (explain_step, "deriving the step of"),
        "device": (explain_device, "lowering"),
    }
    explain, doing = functions[subject]
    with working(f"{doing} {model}", shown=not as_json):
        found = explain(model, **keywords)
    if as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))


def _memory(
    model: str,
    keywords: dict[str, Any],
    svg: Path | None,
    against: Path | None,
    as_json: bool,
) -> None:
    from treadle.explaining.memory import compare_memory, explain_memory, read_memory
    from treadle.explaining.memory_drawing import draw_memory, write_drawing
    from treadle.fitting import fit_prose, fitted
    from treadle.progress import working

    config = keywords.get("config", {})
    axes = {name: size for name, size in config.items() if name.isupper()}  # settings are lowercase
    given = {**keywords, "config": {name: value for name, value in config.items() if name not in axes}}
    given["sizes"] = {**(given.get("sizes") or {}), **axes}
    with working(f"lowering {model}", shown=not as_json):
        found = explain_memory(model, **given)
    if svg is not None:
        write_drawing(svg, draw_memory(found))
    if against is not None:
        print(compare_memory(read_memory(against), found.as_dict()))
    elif as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))
        if svg is not None:
            print(f"wrote {svg}")


def _sharding(
    model: str,
    keywords: dict[str, Any],
    split: dict[str, Any],
    svg: Path | None,
    as_json: bool,
) -> None:
    from treadle.explaining.memory_drawing import write_drawing
    from treadle.explaining.sharding import explain_sharding
    from treadle.explaining.sharding_drawing import draw_sharding
    from treadle.fitting import fit_prose, fitted
    from treadle.progress import working

    asked = {name: value for name, value in split.items() if value is not None}
    with working(f"planning {model}", shown=not as_json):
        found = explain_sharding(model, **asked, **keywords)
    if svg is not None:
        write_drawing(svg, draw_sharding(found))
    if as_json:
        print_json(found.as_dict())
    else:
        print(fitted(str(found), fit_prose))
        if svg is not None:
            print(f"wrote {svg}")
