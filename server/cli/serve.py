"""``x2l serve``. Its options are the settings themselves, one for one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize

from kvstore.errors import StoreError
from server.config import Settings, SettingsError, load_settings

if TYPE_CHECKING:
    from server.models.base import ModelSpec, VideoModel

_TYPICAL_PIXELS = 1280, 720


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command("serve")(_with_setting_options(serve))


def serve(**options: Any) -> None:
    """Serves a model until SIGTERM or Ctrl-C.

    Every option is also an environment variable X2L_<NAME>. Sizes take units (20GB, 64MiB).
    """
    settings = load_settings(**options)
    from server.app import open_backend  # torch takes seconds to load: after the settings are known to be good
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
        for name, value in (_summary(settings, backend.model) | {"address": server.address}).items():
            print(f"{name:8} {value}", flush=True)
        server.serve_forever()
    finally:
        backend.close()


def _summary(settings: Settings, model: VideoModel) -> dict[str, str]:
    """What the server will do, before it does it."""
    from torch import nn

    from kvstore.open import without_password

    spec = model.spec
    # A model keeps its modules as attributes; the contract asks for none in particular.
    modules = [value for value in vars(model).values() if isinstance(value, nn.Module)]
    num_parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
    token_nbytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * model.dtype.itemsize
    low_mb, high_mb = (nbytes / 1e6 for nbytes in _hour_nbytes(settings, spec, token_nbytes))
    chunk_s = spec.frames_per_chunk / spec.fps
    reload = spec.default_reload if settings.reload is None else settings.reload
    modes = [f"{mode} up to {timedelta(seconds=int(most_s))}" for mode, most_s in longest_videos(settings, model)]
    served = f" as {settings.served_model_name}" if settings.served_model_name else ""
    return {
        "model": f"{spec.name}{served}, {num_parameters / 1e6:.1f} M parameters",
        "device": f"{model.device}, {str(model.dtype).removeprefix('torch.')}",
        "store": without_password(settings.store),
        "chunk": f"{spec.frames_per_chunk} frames of {spec.tokens_per_frame} tokens, {chunk_s:g} s at {spec.fps:g} fps",
        "prefill": ", ".join(modes),
        "ratios": f"{spec.low_ratio} (detailed) and {spec.high_ratio} (small), re-load {reload} chunks",
        "KV": f"{token_nbytes / 1024:g} KiB a token",
        "size": f"{low_mb:.1f} MB (detailed) and {high_mb:.1f} MB (small) of KVs per video-hour",
        "access": f"{len(settings.api_key)} API keys" if settings.api_key else "no API key",
    }


def longest_videos(settings: Settings, model: VideoModel) -> Iterator[tuple[str, float]]:
    """The prefill modes that videos come to, in their order, each with the longest video in seconds; at the model's own
    sampling."""
    spec = model.spec
    bound_s = min(settings.max_duration_s, settings.max_frames / spec.fps)
    if spec.max_duration_s is not None:
        bound_s = min(bound_s, spec.max_duration_s)
    before_s = 0.0
    for mode, num_frames in model.prefill_modes(*_TYPICAL_PIXELS, spec.fps):
        most_s = min(num_frames / spec.fps, bound_s)
        if most_s > before_s:
            yield mode, most_s
            before_s = most_s


def _hour_nbytes(settings: Settings, spec: ModelSpec, token_nbytes: int) -> tuple[float, float]:
    """Bytes of an hour's L-KVs and of its H-KVs in the store, at the model's own sampling."""
    num_frames = 3600 * spec.fps
    num_tokens = num_frames * spec.tokens_per_frame
    low_nbytes, high_nbytes = num_tokens / spec.low_ratio * token_nbytes, num_tokens / spec.high_ratio * token_nbytes
    if settings.kv_dtype == "int8":  # a byte each, and a float32 per channel and chunk
        num_channels = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
        low_nbytes = num_channels * (num_tokens / spec.low_ratio + 4 * num_frames / spec.frames_per_chunk)
    return low_nbytes, high_nbytes


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
