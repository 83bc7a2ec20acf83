"""A pretrained model's folder: the tensors of its safetensors files, by name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from torchft.errors import MismatchError, SettingsError
from torchft.parameter_server.core.shape import ModelShape

__all__ = ["files_of", "read_model", "rows_of_model"]


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder by name, on the CPU.

    Raises:
        SettingsError: there is no safetensors file, or one is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in files_of(folder):
        try:
            found |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise SettingsError(f"cannot read {path}: {error}") from None
    return found


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by name. Raises SettingsError where there is none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SettingsError(
            f"{folder} has no .safetensors file: save the model with "
            "save_pretrained(..., safe_serialization=True), or start without a model and the first "
            "worker's weights begin the run"
        )
    return files


def rows_of_model(shape: ModelShape, tensors: dict[str, Tensor]) -> list[Tensor]:
    """One fp32 row `[1, n]` a fragment, of the tensors that workers train.

    Raises:
        MismatchError: a trained tensor is missing there, or has another shape.
    """
    for parameter in shape.parameters:
        tensor = tensors.get(parameter.name)
        if tensor is None or tuple(tensor.shape) != parameter.shape:
            seen = "absent" if tensor is None else f"{list(tensor.shape)}"
            raise MismatchError(
                f"{parameter.name} is {list(parameter.shape)} at the worker and {seen} in the "
                "server's model: train the model that the server was started with"
            )
    rows = [shape.new_row(fragment.index) for fragment in shape.fragments]
    for fragment, row in enumerate(rows):
        for name, view in shape.views(fragment, row).items():
            view.copy_(tensors[name])
    return rows
