"""``x2l make-video``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("make-video")(make)


def make(
    out: Annotated[Path, typer.Argument(metavar="OUT.mp4", dir_okay=False, help="The video; OUT.json stands beside.")],
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 0,
    chunks: Annotated[int, typer.Option(help="Length in chunks of the bundled model.")] = 16,
) -> None:
    """Makes a synthetic video and its questions with answers."""
    from server.models.tiny.make_video import make_video

    try:
        make_video(out, seed=seed, chunks=chunks)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}") from None
    print(out)
