"""Commands that say whether all is well."""

import typer


def health(context: typer.Context) -> None:
    """Ask gateway, streamer or Triton whether it is well: one line, and exit status 0 or 1."""
    from sluice.health import main

    raise typer.Exit(main(context.args))


def doctor() -> None:
    """Say what is missing here and what to do about it; exits 1 when something is."""
    from sluice.doctor import examine, render

    findings = examine()
    render(findings)
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)
