"""The process in which chat templates are rendered: Jinja's sandbox, with limits on memory, files and processes.

The file is run by its path, outside the package: `python -I template_worker.py JINJA'S_FOLDER MEMORY`. The process
reads requests and writes answers, each a line of JSON, until its input ends. `treadle.chatting.templates` sends the
requests, and kills the process on a timeout.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any

TEXT = frozenset(
    ["capitalize", "count", "endswith", "find", "index", "join", "lower", "lstrip", "removeprefix", "removesuffix"]
)
TEXT |= frozenset(
    ["replace", "rfind", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper"]
)
TEXT |= {"isalpha", "isdigit", "isspace"}
MAPPING = frozenset({"get", "items", "keys", "values"})
SEQUENCE = frozenset({"count", "index"})
"""Methods that templates may call: of strings (TEXT), of objects (MAPPING) and of lists (SEQUENCE)."""


def environment() -> Any:
    """Return the Jinja environment: it has the functions that Hugging Face provides to templates, and allows only the
    attributes that templates need.
    """
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext, Macro, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Cycler, Joiner, Namespace

    class Generation(Extension):
        """The tag {% generation %} ... {% endgeneration %}. It marks the assistant's text for training; here it has no
        effect.
        """

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            for kind, known in ((str, TEXT), (dict, MAPPING), ((list, tuple), SEQUENCE)):
                if isinstance(obj, kind):
                    return attr in known
            kinds = (LoopContext, Namespace, Macro, Cycler, Joiner, Undefined)
            return isinstance(obj, kinds) and not attr.startswith("_")

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            if isinstance(obj, dict) and attribute in obj:  # an entry whose key is also the name of a method
                return obj[attribute]
            raise SecurityError(f"it accesses {attribute} of {type(obj).__name__}")

        def wrap_str_format(self, value: Any) -> None:
            """Return None, so that `str.format` is refused: it accepts any width, and templates do not need it."""

    def refuse(message: object) -> None:
        raise TemplateError(str(message))

    def as_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = as_json
    made.globals.pop("lipsum", None)
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(str(form))
    return made


def render(made: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Return {"text": ...} with the rendered template, or {"error": ...}. `refused` is true if the template itself
    raised the error. For a request without values, return {"variables": ...} with the names that the template reads.
    """
    from jinja2.exceptions import TemplateError, TemplateSyntaxError
    from jinja2.meta import find_undeclared_variables

    try:
        if "values" not in request:
            return {"variables": sorted(find_undeclared_variables(made.parse(request["template"])))}
        most = request["most"]
        parts: list[str] = []
        for part in made.from_string(request["template"]).generate(**request["values"]):
            parts.append(part)
            most -= len(part)
            if most < 0:
                return {"error": f"it writes more than {request['most']} characters"}
        return {"text": "".join(parts)}
    except TemplateSyntaxError as error:
        return {"error": f"{error.message}, line {error.lineno}"}
    except TemplateError as error:
        kind = {"refused": True} if type(error) is TemplateError else {}
        return {"error": str(error.message), **kind}
    except MemoryError:
        return {"error": "it needs more memory than the limit"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def confine(memory: int) -> None:
    """Limit memory, files and processes to the needs of rendering, as far as the operating system supports it."""
    with contextlib.suppress(ImportError):
        import resource

        limits = {"RLIMIT_AS": memory, "RLIMIT_FSIZE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
        for name, limit in limits.items():
            with contextlib.suppress(AttributeError, ValueError, OSError):
                resource.setrlimit(getattr(resource, name), (limit, limit))


def main() -> None:
    """Answer requests from standard input until it ends."""
    sys.path.append(sys.argv[1])
    made = environment()
    made.from_string("{{ 'a' | trim }}").render()
    import jinja2.meta  # noqa: F401  no file can be read after `confine`

    confine(int(sys.argv[2]))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = json.dumps(render(made, json.loads(line)))
        except MemoryError:
            answer = json.dumps({"error": "it needs more memory than the limit"})
        print(answer, flush=True)


if __name__ == "__main__":
    main()
