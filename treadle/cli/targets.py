"""`treadle targets`: report the devices of this machine, and the level of proof of each target."""

from __future__ import annotations

from treadle.cli.application import command, print_json
from treadle.cli.options import AsJson


@command("targets")
def report_targets(as_json: AsJson = False) -> None:
    """List this machine's devices, what to install for others, and for each target what the tests prove.

    No device is opened. The levels, from the strongest: executed on the device, executed in software, assembled,
    emitted. docs/devices.md has the details.
    """
    from treadle.progress import working
    from treadle.reporting.tables import console
    from treadle.reporting.target_report import target_facts, target_lines

    with working("looking for devices", shown=not as_json):
        facts = target_facts()
    if as_json:
        print_json(facts)
        return
    out = console()
    for each in target_lines(facts):
        out.print(each, soft_wrap=isinstance(each, str))
