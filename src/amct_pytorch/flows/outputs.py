"""Names of the files that a flow writes beside each other."""

from __future__ import annotations

import os
from pathlib import Path

from amct_pytorch.errors import ArgumentTypeError, ArgumentValueError
from amct_pytorch.files import PathLike

FILE_NAMES = {
    "fake_quant": "fake_quant_model.onnx",
    "deploy": "deploy_model.onnx",
    "ledger": "ledger.json",
}

# A save_path that ends like one of these was meant for another argument.
OTHER_FILES = (".txt", ".json", ".cfg")


def output_path(save_path: PathLike, which: str, what: str = "save_path") -> Path:
    """Where a file goes under a user's `save_path`, which is a folder and a prefix.

    ``out/net`` gives ``out/net_deploy_model.onnx``; an empty prefix (``out/``, or a folder
    that exists) gives ``out/deploy_model.onnx``.

    Args:
        save_path: folder + prefix.
        which: key of `FILE_NAMES`.
        what: the argument's name, for messages.

    Raises:
        ArgumentTypeError, ArgumentValueError: `save_path` is no path, or empty, or a text file
            that exists.
    """
    text = os.fspath(save_path) if isinstance(save_path, os.PathLike) else save_path
    if not isinstance(text, str):
        raise ArgumentTypeError(
            f"{what} is of type {type(save_path).__name__}; allowed are str and os.PathLike"
        )
    if not text or "\0" in text:
        raise ArgumentValueError(f"{what} is {text!r}; it must be a folder and a prefix")
    if text.endswith(OTHER_FILES) and os.path.isfile(text):  # noqa: PTH113 (likewise)
        raise ArgumentValueError(
            f"{what} is {text!r}, a file that exists; it must be a folder and a prefix, such as "
            "'out/net' (was it meant for another argument?)"
        )
    if text.endswith(("/", os.sep)) or os.path.isdir(text):  # noqa: PTH112 (False for a name too long)
        return Path(text) / FILE_NAMES[which]
    return Path(f"{text}_{FILE_NAMES[which]}")
