"""`python -m fam_ext`: versions, what is compiled, and which backend each operation takes here."""

from __future__ import annotations

from fam_ext.ops.backends import Info, info


def _print_rich(facts: Info) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    versions = Table(title="versions", show_header=False)
    for name, version in facts.versions.items():
        versions.add_row(name, version or "not installed")
    build = Table(title="compiled library", show_header=False)
    build.add_row("loaded", "yes" if facts.native else escape(f"no: {facts.reason}"))
    for key, value in facts.build.items():
        build.add_row(key, escape(str(value)))
    build.add_row("Triton kernels", escape(facts.triton))
    operations = Table("operation", "device", "backend", "why", title="operations")
    for row in facts.rows():
        operations.add_row(*map(escape, row))
    for table in (versions, build, operations):
        console.print(table)


def main() -> None:
    facts = info()
    try:
        _print_rich(facts)
    except ImportError:  # rich is optional
        print(facts)


if __name__ == "__main__":
    main()
