"""`treadle doctor`: report what is installed, what the machine has, and what commands lack."""

from __future__ import annotations

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson


@command("doctor")
def report_installation(as_json: AsJson = False) -> None:
    """List the installed packages, the machine's features, and for each command the missing packages."""
    from treadle.progress import working
    from treadle.reporting.installation_report import installation_facts, installation_lines
    from treadle.reporting.tables import console

    with working("looking at packages and the machine", shown=not as_json):
        facts = installation_facts()
    if as_json:
        print_json(facts)
        return
    out = console()
    for each in installation_lines(facts):
        out.print(each, soft_wrap=isinstance(each, str))
