"""What a dry run checks: that names are known and files are there. Nothing is fetched for it."""

from __future__ import annotations

from pathlib import Path

import torch

from sparse_robust.data import Data, DataSpec, check_data_name, load_data
from sparse_robust.models import build_model, check_input_size
from sparse_robust.study.network import NetworkConfig


def data_here(spec: DataSpec) -> Data | None:
    """Load a data set; None for one that a run would fetch first, whose name alone is checked.

    Raises:
        UsageError, FileError: as `load_data`.
    """
    check_data_name(spec)
    prefix, _, rest = spec.name.partition(":")
    if spec.download or (prefix == "hf" and not Path(rest).expanduser().exists()):
        return None
    return load_data(spec)


def check_network(config: NetworkConfig, data: Data | None = None) -> None:
    """Build a network without its weights, and let it see the shape of an image of ``data``.

    Raises:
        UsageError, FileError: as `create_model` and `check_input_size`; one of the Hub is not looked up.
    """
    spec = config.spec() if data is None else config.for_data(data)
    if spec.name.startswith(("hf-hub:", "hf_hub:")):
        return
    with torch.device("meta"):
        network = build_model(spec)
    if data is not None:
        check_input_size(network, *data.size)
