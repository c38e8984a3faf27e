"""The directive `xccl-options`: the table of options, made from the table that the program itself uses."""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from xccl.options import OPTIONS, Option

COLUMNS = {"Environment": 24, "Python": 24, "Default": 12, "Unit": 10, "Meaning": 50}


class OptionsTable(SphinxDirective):
    """One row for each option: its variable, its attribute of `xccl.rc`, default, unit and help."""

    def run(self) -> list[nodes.Node]:
        group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in COLUMNS.values()), cols=len(COLUMNS))
        group += nodes.thead("", row([nodes.Text(name) for name in COLUMNS]))
        body = nodes.tbody()
        for option in OPTIONS:
            body += row(
                [
                    nodes.literal("", option.variable),
                    nodes.literal("", f"xccl.rc.{option.name}"),
                    nodes.literal("", shown(option)),
                    nodes.Text(option.unit.replace("|", ", ")),
                    nodes.Text(option.help),
                ]
            )
        group += body
        return [nodes.table("", group)]


def shown(option: Option) -> str:
    """The default as a user would write it: 64K instead of 65536, 300 instead of 300.0."""
    if option.unit == "bytes":
        for suffix, shift in (("G", 30), ("M", 20), ("K", 10)):
            if option.default and int(option.default) % (1 << shift) == 0:
                return f"{int(option.default) >> shift}{suffix}"
    return f"{option.default:g}" if isinstance(option.default, float) else str(option.default)


def row(cells: list[nodes.Node]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("xccl-options", OptionsTable)
    return {"parallel_read_safe": True}
