"""Backbones: any timm classifier, with normalisation inside, small-image stems, new heads and strict weights."""

from sparse_robust.models.build import build_model
from sparse_robust.models.checkpoint import ModelFile, load_model, load_state, read_model_file, save_model
from sparse_robust.models.create import create_model
from sparse_robust.models.head import head_names, replace_head
from sparse_robust.models.importing import import_weights
from sparse_robust.models.normalization import default_normalization, get_normalization, set_normalization
from sparse_robust.models.positional import import_by_position
from sparse_robust.models.report import CheckpointMismatch, ImportReport
from sparse_robust.models.sizes import check_input_size, min_input_size
from sparse_robust.models.spec import ModelSpec, spec_of
from sparse_robust.models.stem import use_small_stem

__all__ = [
    "CheckpointMismatch",
    "ImportReport",
    "ModelFile",
    "ModelSpec",
    "build_model",
    "check_input_size",
    "create_model",
    "default_normalization",
    "get_normalization",
    "head_names",
    "import_by_position",
    "import_weights",
    "load_model",
    "load_state",
    "min_input_size",
    "read_model_file",
    "replace_head",
    "save_model",
    "set_normalization",
    "spec_of",
    "use_small_stem",
]
