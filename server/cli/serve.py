"""``x2l serve``. Its options are the settings themselves, one for one."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ByteSize

from kvstore.errors import StoreError
from server.config import Settings, SettingsError, load_settings


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("serve")(_with_setting_options(serve))


def serve(**options: Any) -> None:
    """Serves a model until SIGTERM or Ctrl-C.

    Every option is also an environment variable X2L_<NAME>. Sizes take units (20GB, 64MiB).
    """
    settings = load_settings(**options)
    from server.app import open_backend  # torch takes seconds to load: after the settings are known to be good
    from server.cli.plan import plan
    from server.serving import Server

    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s:     %(name)s: %(message)s")
    for client in ("httpx", "httpx2"):  # they note every request, such as those to the hub
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        backend = open_backend(settings)
    except (ValueError, StoreError) as error:
        raise SettingsError(str(error)) from error
    try:
        server = Server(settings, backend)
        for name, value in (
            plan(settings, backend.model, backend.engine.options) | {"address": server.address}
        ).items():
            print(f"{name:10} {value}", flush=True)
        # What is there by now stays: to look through it for garbage would hold up every thread for 100 ms and more.
        gc.collect()
        gc.freeze()
        server.serve_forever()
    finally:
        backend.close()


def _with_setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives ``command`` one option per setting. All but the flags go as text: Settings parses and checks them."""
    parameters = []
    for name, field in Settings.model_fields.items():
        default = field.get_default()
        kind: Any = str | None
        flag = f"--{name.replace('_', '-')}"
        if field.annotation is bool:
            kind, flag = bool | None, f"{flag}/--no-{name.replace('_', '-')}"
        elif isinstance(default, tuple):
            kind = list[str] | None
        if isinstance(default, ByteSize):
            default = default.human_readable(decimal=default % 1000 == 0)
        shown = "" if default in (None, ()) or field.default_factory else f" [default: {default}]"
        option = typer.Option(flag, help=f"{field.description}{shown}", metavar=name.upper(), show_default=False)
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        )

    def run(**options: Any) -> None:
        command(**options)

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
