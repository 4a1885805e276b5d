"""
The commands of ``sluice``, in the order of its help.

Each imports what it needs when it runs: ``--help`` does not wait for torch.
"""

from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from gateway.settings import GatewaySettings
from rpc.settings import unknown_variables
from serving.settings import TritonSettings
from sluice.commands import checks, datasets, keys, questions, releases, runs, searches, services, streams
from sluice.commands.progress import say
from sluice.settings import UpSettings
from streamer.settings import StreamerSettings

__all__ = ["SECTIONS", "app"]

SECTIONS = (GatewaySettings, StreamerSettings, TritonSettings, UpSettings)
"""Every section of settings."""

app = typer.Typer(
    help="Train image classifiers from a network stream of samples and serve them over gRPC.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the names of settings off
)


@app.callback(invoke_without_command=True)
def _version(
    show: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
) -> None:
    if show:
        print(f"sluice {installed_version('sluice')}")
        raise typer.Exit
    for line in unknown_variables(SECTIONS):
        say(f"warning: {line}")


app.command()(services.up)
app.command()(services.demo)
app.command()(services.streamer)
app.command()(services.gateway)
app.command()(services.triton)
app.command()(runs.train)
app.command()(runs.evaluate)
app.command()(releases.export)
app.command()(releases.publish)
app.command()(releases.rollback)
app.command()(releases.route)
app.command()(questions.classify)
app.command()(questions.compare)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(
    checks.health
)
app.command()(questions.loadtest)
app.command()(checks.doctor)

data = typer.Typer(help="Data sets on this machine.", no_args_is_help=True, rich_markup_mode=None)
data.command()(datasets.fetch)
data.command()(datasets.pack)
app.add_typer(data, name="data")

key = typer.Typer(help="API keys of the gateway.", no_args_is_help=True, rich_markup_mode=None)
key.command()(keys.add)
key.command("list")(keys.list_keys)
key.command()(keys.remove)
app.add_typer(key, name="keys")

stream = typer.Typer(
    help="A running streamer, and proof of what was read from it.", no_args_is_help=True, rich_markup_mode=None
)
stream.command()(streams.verify)
stream.command("ls")(streams.list_datasets)
stream.command()(streams.bench)
app.add_typer(stream, name="stream")

tune = typer.Typer(
    help="Search for the best settings of a run; see docs/tune-your-own-data.md.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
tune.callback()(searches.search)
tune.command()(searches.resume)
tune.command()(searches.show)
tune.command("best")(searches.best)
app.add_typer(tune, name="tune")
