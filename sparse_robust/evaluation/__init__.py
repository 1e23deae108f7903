"""How accurate and how robust a model is, image by image, and whether the number can be believed."""

from sparse_robust.evaluation.alarms import Alarm, run_alarms
from sparse_robust.evaluation.corruptions import CORRUPTIONS, CorruptionReport, corrupt, corruption_accuracy
from sparse_robust.evaluation.diagnose import Finding, diagnose
from sparse_robust.evaluation.evaluate import PRECISIONS, Stage, evaluate
from sparse_robust.evaluation.record import RobustnessRecord, make_record, write_record
from sparse_robust.evaluation.result import Evaluation, Progress, read_evaluation, summarise
from sparse_robust.evaluation.transfer import TransferMatrix, transfer_matrix
from sparse_robust.evaluation.verdicts import VerdictFile, Verdicts, read_verdicts

__all__ = [
    "CORRUPTIONS",
    "PRECISIONS",
    "Alarm",
    "CorruptionReport",
    "Evaluation",
    "Finding",
    "Progress",
    "RobustnessRecord",
    "Stage",
    "TransferMatrix",
    "VerdictFile",
    "Verdicts",
    "corrupt",
    "corruption_accuracy",
    "diagnose",
    "evaluate",
    "make_record",
    "read_evaluation",
    "read_verdicts",
    "run_alarms",
    "summarise",
    "transfer_matrix",
    "write_record",
]
