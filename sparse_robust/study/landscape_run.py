"""``sparse-robust landscape``: the loss around transferred networks, and the paths on which they came there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import update_bn

from sparse_robust.data import Data, DataSpec, eval_loader
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.landscape import DEFAULT_GRID, DEFAULT_MARGIN, DIRECTIONS, loss_landscape
from sparse_robust.files import atomic_write
from sparse_robust.models import load_model
from sparse_robust.study import stages
from sparse_robust.study.context import Context
from sparse_robust.study.load import build, read_spec
from sparse_robust.study.preflight import data_here
from sparse_robust.tickets import Ticket

TRAJECTORY = "trajectory"
"""Folder of a transfer's path; see `Trajectory`."""
PICTURE = "landscape"
REBN_IMAGES = 1000
"""So many training images give the running statistics of a grid point, where they are estimated anew."""


@dataclass(frozen=True, kw_only=True)
class LandscapeRun:
    """``sparse-robust landscape``: clean loss on test images in a plane of weights around each of some transfers."""

    runs: tuple[str, ...]
    """Folders of transfers that were run with trajectory=true, in the order of the panels."""
    columns: int = 3
    """Panels in a row."""
    directions: str = "pca"
    """pca, along the path of training, or random, filter-normalised."""
    grid: int = DEFAULT_GRID
    """Points along each direction."""
    margin: float = DEFAULT_MARGIN
    """The grid covers so many times the extent of the path."""
    images: int | None = 1000
    """So many of the test images, evenly spaced over the file; None for all."""
    rebn: bool = False
    """Estimate the running statistics of batch norms anew at every point, on training images."""
    seed: int = 0
    """Of random directions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple(map(str, self.runs)))
        if not self.runs or self.columns < 1:
            raise UsageError("name the folders of transfers (runs=[a, b]), and one column of panels or more.")
        if self.directions not in DIRECTIONS:
            raise UsageError(f"directions are {' or '.join(DIRECTIONS)}, got {self.directions!r}.")

    def check(self, *, trust_pickle: bool = False) -> None:
        """Check, before anything is computed, that the transfers are there."""
        for run in map(Path, self.runs):
            spec = _transfer_of(run)
            path_files(run)
            data_here(build(DataSpec, spec["data"]))

    def execute(self, folder: Path, context: Context) -> dict[str, Any]:
        """Run it in ``folder``: the picture is landscape.png and .svg, the numbers are in result.json."""
        from sparse_robust.study.report.landscape import landscape_picture

        task = context.progress.task("landscape", len(self.runs) * self.grid**2)
        try:
            panels = [self._panel(Path(run), context, task.advance) for run in self.runs]
        finally:
            task.close()
        drawn = landscape_picture(panels, self.columns)

        def save() -> None:
            atomic_write(folder / f"{PICTURE}.png", lambda path: path.write_bytes(drawn.png))
            atomic_write(folder / f"{PICTURE}.svg", lambda path: path.write_bytes(drawn.svg))

        context.on_main(save)
        return {"panels": panels, "directions": self.directions}

    def _panel(self, run: Path, context: Context, advance: Any) -> dict[str, Any]:
        spec, files = _transfer_of(run), path_files(run)
        data = context.data(build(DataSpec, spec["data"]))
        model = load_model(run / stages.WEIGHTS)
        states = [load_file(file) for file in files]
        model.load_state_dict(states[-1])
        model.to(context.accelerator.device)
        ticket = spec.get("ticket")
        masks = stages.without_head(Ticket.load(ticket).masks, model) if ticket is not None else None
        names = [name for name, _ in model.named_parameters()]
        loader = eval_loader(data.test, context.eval_batch_size, device=context.accelerator.device, limit=self.images)
        found = loss_landscape(
            model,
            [{name: state[name] for name in names} for state in states],
            loader,
            masks=masks,
            directions=self.directions,
            grid=self.grid,
            margin=self.margin,
            seed=self.seed,
            settle=_resettling(data, context) if self.rebn else None,
            advance=advance,
        )
        return {
            "run": str(run),
            "title": run.name,
            "final_loss": found.final_loss,
            "explained": found.explained,
            "x": found.x.tolist(),
            "y": found.y.tolist(),
            "losses": found.losses.tolist(),
            "path": found.path.tolist(),
            "images": found.images,
        }


def path_files(run: Path) -> list[Path]:
    """Return the points of a transfer's path, in order.

    Raises:
        UsageError: if there are none.
    """
    files = sorted((run / TRAJECTORY).glob("*.safetensors"))
    if not files:
        raise UsageError(
            f"{run} holds no path of training. Run the transfer with trajectory=true: "
            "sparse-robust transfer --out FOLDER trajectory=true ..."
        )
    return files


def _transfer_of(run: Path) -> dict[str, Any]:
    if not (run / "result.json").exists():
        raise UsageError(f"{run} is no finished run: result.json is missing.")
    spec = read_spec(run / "spec.yaml")
    if spec.get("kind") != "TransferRun":
        raise UsageError(f"{run} is a {spec.get('kind')}, and landscapes are drawn of transfers.")
    return spec


def _resettling(data: Data, context: Context) -> Any:
    loader = eval_loader(data.train, context.eval_batch_size, device=context.accelerator.device, limit=REBN_IMAGES)
    images = [batch.x for batch in loader]

    def settle(model: nn.Module) -> None:
        update_bn(images, model)

    return settle
