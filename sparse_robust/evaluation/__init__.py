"""How accurate and how robust a model is, image by image."""

from sparse_robust.evaluation.evaluate import Evaluation, PerImage, evaluate

__all__ = ["Evaluation", "PerImage", "evaluate"]
