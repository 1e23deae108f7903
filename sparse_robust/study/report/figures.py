"""All pictures of a report, in the order of the page."""

from __future__ import annotations

from typing import Any

from sparse_robust.study.report.curves import accuracy_curves, finder_curves, overlap_curves, time_bars
from sparse_robust.study.report.examples import choose, describe, example_picture
from sparse_robust.study.report.matrices import density_map, overlap_matrix, win_matrix
from sparse_robust.study.report.ranking import ranking_pictures
from sparse_robust.study.report.style import Picture, drawing
from sparse_robust.study.report.tables import rounded
from sparse_robust.study.results import StudyResults


def draw_all(report: dict[str, Any], results: StudyResults) -> list[Picture]:
    """Draw every picture that the data allow.

    All but the example images are drawn from ``report`` alone. What the example pictures show is added to
    ``report["examples"]``, and files that cannot be read to ``report["warnings"]``.
    """
    report["examples"] = []
    pictures: list[Picture | None] = []
    with drawing():
        pictures += [accuracy_curves(report), win_matrix(report), finder_curves(report), *ranking_pictures(report)]
        for target in dict.fromkeys(t for t, _ in results.targets()):
            shown, warnings = choose(results, target)
            report["warnings"] += warnings
            report["examples"] += rounded(describe(results, shown))
            pictures.append(example_picture(results, shown, report["thetas"]))
        pictures += [density_map(report), overlap_matrix(report), overlap_curves(report), time_bars(report)]
    return [p for p in pictures if p is not None]
