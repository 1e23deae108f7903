"""Data sets: real images in the package, those of torchvision and the Hub, own folders; splits, fractions, loaders."""

from sparse_robust.data.augment import Augment
from sparse_robust.data.data import Data
from sparse_robust.data.load import check_data_name, data_from_tensors, data_sources, load_data
from sparse_robust.data.loaders import Batch, EvalLoader, TrainLoader, eval_loader, train_loader
from sparse_robust.data.spec import DataSpec
from sparse_robust.data.split import TEST_IDS, VALIDATION_IDS, MemorySplit, ReaderSplit, Split, StreamSplit, View

__all__ = [
    "TEST_IDS",
    "VALIDATION_IDS",
    "Augment",
    "Batch",
    "Data",
    "DataSpec",
    "EvalLoader",
    "MemorySplit",
    "ReaderSplit",
    "Split",
    "StreamSplit",
    "TrainLoader",
    "View",
    "check_data_name",
    "data_from_tensors",
    "data_sources",
    "eval_loader",
    "load_data",
    "train_loader",
]
