"""The commands of ``x2l``."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from typer.core import TyperGroup

from server.cli import ask, bench, demo, files, make_video, serve
from server.cli.text import printable
from server.client import ServerError
from server.config import SettingsError


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"x2l {version('video-x2l-server')}")
        raise typer.Exit


class _Commands(TyperGroup):
    """With what typer says of a bad value freed of the validator's own words."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(
    name="x2l",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # in a box of 80 columns, half of what x2l serve --help has to say would be cut off
)


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Ask long videos questions."""


serve.add_to(app)
files.add_to(app)
ask.add_to(app)
demo.add_to(app)
make_video.add_to(app)
bench.add_to(app)


def main() -> None:
    """Runs a command; what goes wrong is one line on stderr and exit code 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ServerError, SettingsError, OSError) as error:
        fail(str(error))
    except httpx.HTTPError as error:
        url = error.request.url
        fail(f"cannot talk to the server at {url.scheme}://{url.netloc.decode()}: {error or type(error).__name__}")
    except httpx.InvalidURL as error:
        fail(f"not a server address: {error}")


def fail(message: str) -> None:
    """One line on stderr, exit code 1."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"x2l: {printable(message)}", markup=False)
    sys.exit(1)
