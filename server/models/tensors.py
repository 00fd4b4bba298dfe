"""A checkpoint's tensors where they lie: safetensors or pytorch_model.bin, in one file or in shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
_STRAY = ("embeddings.position_ids", "rotary_emb.inv_freq")
_MOST_NAMES = 10
_INITS = "torch.nn.init", "transformers.initialization"  # which puts its functions in place of the former's

M = TypeVar("M", bound=nn.Module)


class CheckpointError(ValueError):
    """Something is missing, left over or does not fit together; the message names it, in one line."""


class TensorFolder:
    """The tensors in a folder, by the names they have there. Nothing but :meth:`read` takes memory for them."""

    def __init__(self, folder: Path) -> None:
        """Finds the files: safetensors before pickles, sharded before single. Raises CheckpointError."""
        for name in (_SAFETENSORS, _PICKLE):
            if (folder / f"{name}{_INDEX}").is_file():
                self._files = _shards(folder / f"{name}{_INDEX}")
                return
            if (folder / name).is_file():
                self._files = [folder / name]
                return
        raise CheckpointError(f"{folder} holds no {_SAFETENSORS} and no {_PICKLE}, neither whole nor in shards")

    def outline(self) -> dict[str, Tensor]:
        """Every tensor's shape, as a tensor on the meta device. Raises CheckpointError."""
        found = {}
        for file in self._files:
            with _opened(file) as tensors:
                for name in tensors.names:
                    found[name] = torch.empty(tensors.shape(name), device="meta")
        return found

    def read(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors, those of floats in ``dtype``, copied to ``device`` one by one.

        The files are mapped, not read into memory, so that one tensor at most is held twice. Raises CheckpointError.
        """
        read = {}
        for file in self._files:
            with _opened(file) as tensors:
                for name in tensors.names:
                    tensor = tensors.get(name)
                    wanted = dtype if tensor.is_floating_point() else tensor.dtype
                    # A copy even where nothing changes: what stays must not hang on the file.
                    read[name] = tensor.to(device, wanted, copy=True)
        return read


@contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside have shapes and no values (the meta device): :func:`load_into` gives them some."""
    with torch.device("meta"), Uninitialised():
        yield


class Uninitialised(TorchFunctionMode):
    """Skips ``torch.nn.init``. Without values there is nothing to draw, and drawing on the meta device loads torch's
    compiler first: as long again as loading torch."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        drawing = getattr(func, "__module__", None) in _INITS
        return kwargs["tensor"] if drawing else func(*args, **kwargs)


def load_into(module: M, state: Mapping[str, Tensor], shown: Callable[[str], str] = str) -> M:
    """Gives ``module`` (which may be on the meta device) the tensors of ``state``, without a copy.

    ``shown`` is what errors call a tensor. Raises CheckpointError.
    """
    state = {name: tensor for name, tensor in state.items() if not name.endswith(_STRAY)}
    wanted = module.state_dict()
    common = wanted.keys() & state.keys()
    refuse_misfits(
        map(shown, wanted.keys() - state.keys()),
        map(shown, state.keys() - wanted.keys()),
        ((shown(name), state[name].shape, wanted[name].shape) for name in common),
    )
    module.load_state_dict(state, assign=True)
    return module


def refuse_misfits(
    missing: Iterable[str], left_over: Iterable[str], shapes: Iterable[tuple[str, Sequence[int], Sequence[int]]]
) -> None:
    """Raises CheckpointError if there are any; ``shapes`` are names with the shape found and the one wanted."""
    misshapen = (f"{name} {list(found)} instead of {list(wanted)}" for name, found, wanted in shapes if found != wanted)
    kinds = {"missing tensors": missing, "unexpected tensors": left_over, "tensors of another shape": misshapen}
    listed = {kind: _list(names) for kind, names in kinds.items()}
    if any(listed.values()):
        raise CheckpointError("; ".join(f"{kind}: {names}" for kind, names in listed.items() if names))


def first_line(error: Exception) -> str:
    """What an error says, shortly."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _SafeTensors:
    def __init__(self, file: Any) -> None:
        self._file = file
        self.names: list[str] = list(file.keys())

    def shape(self, name: str) -> list[int]:
        shape: list[int] = self._file.get_slice(name).get_shape()
        return shape

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class _Pickle:
    def __init__(self, file: Path, loaded: Any) -> None:
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise CheckpointError(f"{file.name} is no table of tensors")
        self._tensors = loaded
        self.names = [str(name) for name in loaded]

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def get(self, name: str) -> Tensor:
        tensor: Tensor = self._tensors[name]
        return tensor


@contextmanager
def _opened(file: Path) -> Iterator[_SafeTensors | _Pickle]:
    """One file, mapped. What goes wrong with it becomes a CheckpointError."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device="cpu") as opened:
                yield _SafeTensors(opened)
        else:
            # A pickle could run code without weights_only. One from before torch 1.6 cannot be mapped: refused.
            yield _Pickle(file, torch.load(file, map_location="cpu", mmap=True, weights_only=True))
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {first_line(error)}") from error


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index.name} is no index of shards") from error
    missing = [name for name in names if Path(name).name != name or not (index.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(f"{index.name} names files that are not there: {', '.join(missing) or 'none at all'}")
    return [index.parent / name for name in names]


def _list(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _MOST_NAMES
    return ", ".join(ordered[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
