"""`treadle diff`: the differences between two builds of a model, and conditions on them for CI."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson, ModelName, OptionKeywords, Sizes, flags_of, keywords_of
from treadle.ir.errors import Hint, TreadleError, UsageError
from treadle.program.option_table import declared_options


def _side_command() -> typer.Typer:
    """Return a command with the options of one build, for parsing the text of `--a` and `--b`."""
    flags = flags_of(["inspect"], {"backend": None}, ())

    def side(**given: Any) -> dict[str, Any]:
        return keywords_of(given, {})

    side.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
    side.__annotations__ = {each.name: each.annotation for each in flags}
    made = typer.Typer(add_completion=False)
    made.command(add_help_option=False)(side)
    return made


@command("diff", takes=["inspect"], judges=lambda options: bool(options["fail_if"]))
def diff_builds(
    model: ModelName,
    other: Annotated[
        str | None,
        typer.Argument(metavar="B", help="The model of the second build, by default the same.", show_default=False),
    ] = None,
    a: Annotated[str | None, typer.Option("--a", metavar="OPTIONS", help="Further options of the first build.")] = None,
    b: Annotated[
        str | None,
        typer.Option("--b", metavar="OPTIONS", help="Further options of the second build: '--quantize int8'."),
    ] = None,
    fail_if: Annotated[
        str | None,
        typer.Option(metavar="CONDITIONS", help="Exit with 1 if one of these conditions holds.", show_default=False),
    ] = None,
    sizes: Sizes = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write both graphs, side by side, to an HTML file.", show_default=False),
    ] = None,
    *,
    keywords: OptionKeywords,
    as_json: AsJson = False,
) -> None:
    """Print the differences between two builds: ops, layers, fusions, memory, FLOPs, bytes, weights and kernels.

    MODEL@PASS is a build up to a pass, such as gpt2@fuse-gelu. Options apply to both builds; to an artifact next to a
    model, only those apply that do not compile it again. Options inside --a or --b apply only to the first or the
    second build.

    CONDITIONS is CONDITION, CONDITION, ... A condition is QUANTITY SIGN NUMBER, such as 'attention<12, peak>1.05x,
    flops>1.01x'.

    SIGN is <, <=, >, >=, = or !=.

    NUMBER is 12 or 1.5, followed by x for that multiple of the value in the first build, by k, M, G or T, or for bytes
    by B, kB, MB, GB, KiB, MiB or GiB.

    QUANTITY is the name of an op (the number of times it runs in the second build, alone or inside larger fused ops),
    or one of ops, added, removed, changed, lost (fusions), peak, flops, bytes, weights, bits, widened (weights stored
    in more bits), kernels, generic (kernels that run element by element).
    """
    from treadle.artifacts.reading import is_artifact
    from treadle.comparing.builds import open_build, split_pass
    from treadle.comparing.conditions import check_conditions, parse_conditions
    from treadle.comparing.differences import compare
    from treadle.files.nearest_names import check_suffix
    from treadle.fitting import fit_prose, fitted
    from treadle.program.flag_values import parse_sizes
    from treadle.progress import working
    from treadle.report.building import SUFFIXES
    from treadle.report.comparison import comparison_report

    if report is not None:
        check_suffix(report, SUFFIXES, "an HTML page")
    conditions = parse_conditions(fail_if) if fail_if is not None else ()
    asked = parse_sizes(sizes) or None
    builds = []
    sides = [(model, a, parse_side("--a", a)), (model if other is None else other, b, parse_side("--b", b))]
    differing = {each for *_, own in sides for each in own}
    are_files = [is_artifact(split_pass(name)[0]) for name, *_ in sides]
    for (name, text, own), is_file in zip(sides, are_files, strict=True):
        applied = keywords if not is_file or all(are_files) else _of_artifacts(keywords)
        shared = {each: value for each, value in applied.items() if each in differing and each not in own}
        for each in ("config", "limits"):
            if each in own and each in applied:  # the last value of a name counts
                own[each] = {**applied[each], **own[each]}
        shown = " ".join(filter(None, (name, *_flags_text(shared), text)))
        try:
            with working(f"building {shown}", shown=not as_json):
                made = open_build(name, name=shown, **{**applied, **own})
        except TreadleError as error:
            if other is not None:
                _hint_for_side(error, name, [(model, a), (other, b)])
            raise
        builds.append(made)
    found = compare(*builds, sizes=asked)
    outcomes = check_conditions(conditions, found)
    if report is not None:
        with working(f"writing {report}", shown=not as_json):
            comparison_report(found).save(report)
    if as_json:
        print_json(found.as_dict() | {"conditions": [each.as_dict() for each in outcomes]})
    else:
        lines = [str(found), *([""] if outcomes else []), *map(str, outcomes)]
        print(fitted("\n".join(lines), fit_prose))
        if report is not None:
            print(f"wrote {report}")
    if any(each.holds for each in outcomes):
        raise typer.Exit(1)


def _hint_for_side(error: TreadleError, name: str, sides: Sequence[tuple[str, str | None]]) -> None:
    """Let the hint of an error, which names options for the model `name`, name them for this side alone."""
    hint = error.hint
    differ = any(model != name for model, _ in sides)
    if not differ or not isinstance(hint, Hint) or hint.replaces != name or len(hint.words) < 2:
        return
    added, changed = shlex.join(hint.words[1:]), [hint.words[0] if model == name else model for model, _ in sides]
    texts = [" ".join(filter(None, (text, added if model == name else None))) for model, text in sides]
    options = [word for flag, text in zip(("--a", "--b"), texts, strict=True) if text for word in (flag, text)]
    error.hint = Hint(str(hint), shlex.join(["treadle", "diff", *changed, *options]))


def _of_artifacts(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that apply to a compiled model."""
    known = declared_options()
    return {name: value for name, value in options.items() if name in known and "artifact" in known[name].takers}


def _flags_text(options: Mapping[str, Any]) -> list[str]:
    """Return options with a single value as they are written on the command line."""
    flags = {name: option.flag.name for name, option in declared_options().items() if option.flag is not None}
    return [
        f"--{flags[name]} {value}"
        for name, value in options.items()
        if name in flags and isinstance(value, str | int | float) and not isinstance(value, bool)
    ]


def parse_side(side: str, text: str | None) -> dict[str, Any]:
    """Return the options that are set in the text of `--a` or `--b`. Raises UsageError for text that is not options."""
    if text is None:
        return {}
    try:
        words = shlex.split(text)
        values: dict[str, Any] = typer.main.get_command(_side_command()).main(words, side, standalone_mode=False)
    except ValueError as error:
        raise UsageError(f"{side} must be options: {error}", received=text, hint=f'{side} "--quantize int8"') from None
    except Exception as error:
        if not hasattr(error, "format_message"):  # an error of typer's own, such as an unknown option
            raise
        raise UsageError(f"{side}: {error.format_message()}", received=text, hint=f'{side} "--quantize int8"') from None
    return values
