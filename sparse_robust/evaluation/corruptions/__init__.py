"""The 15 common corruptions of ImageNet-C, made on tensors of any size, and accuracy under them."""

from sparse_robust.evaluation.corruptions.corrupt import CORRUPTIONS, SEVERITIES, Corruption, corrupt
from sparse_robust.evaluation.corruptions.report import CorruptionReport, corruption_accuracy

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corruption", "CorruptionReport", "corrupt", "corruption_accuracy"]
