"""The command line: one parser, one function a verb."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_robust import cli_study, cli_ticket
from sparse_robust._env import launched_processes, set_cublas_workspace
from sparse_robust._version import __version__
from sparse_robust.errors import SparseRobustError, UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sparse_robust.study.config import StudyConfig
    from sparse_robust.training.progress import ProgressReporter

TRACKERS = ("tensorboard", "trackio", "wandb")
OVERRIDES = "key=value pairs that change the configuration, such as recipe.epochs=5 or seeds=[0,1]; values are YAML"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0 done, 1 failed, 2 wrong usage, 85 told to stop and saved (start it
    again), 130 interrupted by Ctrl-C."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        return _run(arguments)
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """Show a warning without the path and the line of source that raised it."""
    return f"warning: {message}\n"


def _run(arguments: Sequence[str] | None) -> int:
    set_cublas_workspace()  # cuBLAS reads it with its first product, long before a recipe asks for deterministic
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional words in one run only; here they may stand between the options, too.
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif rest:
        options.overrides = [*options.overrides, *rest]
    if not hasattr(options, "function"):
        parser.print_help()
        return 2
    try:
        _check_numbers(options)
        if getattr(options, "tracker", None):
            from sparse_robust.study.doctor import require_tracker

            require_tracker(options.tracker)
        result: int = options.function(options)
        return result
    except SparseRobustError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        keeps = "dry_run" in options  # a verb that saves what it does
        again = " What was saved is kept, what came after is not: run the same command again to go on." if keeps else ""
        sys.stderr.write(f"\ninterrupted at once.{again}\n")
        return 130


def _check_numbers(options: argparse.Namespace) -> None:
    for name, least in (("checkpoint_seconds", 0), ("processes", 1), ("idle_minutes", 0)):
        value = getattr(options, name, None)
        if value is not None and not value >= least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="sparse-robust",
        description="Find, train, transfer and evaluate sparse networks that stay accurate and adversarially robust.",
        epilog="Runs on one device as it is, and on many as: accelerate launch -m sparse_robust VERB ...",
    )
    parser.add_argument("--version", action="version", version=f"sparse-robust {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB")

    study = verbs.add_parser("study", help="the whole protocol: pretrain, find, transfer, evaluate, report")
    actions = study.add_subparsers(title="actions", metavar="ACTION", required=True)
    run = _verb(actions, "run", study_run, "run what is not done yet, then write the report")
    _configuration(run, study=True)
    _running(run)
    run.add_argument("--processes", type=int, default=1, help="so many workers on this machine (default: 1)")
    _joining(run)
    submit = _verb(actions, "submit", study_submit, "start workers as jobs of a cluster, which share one folder")
    _configuration(submit, study=True)
    _running(submit)
    _joining(submit)
    cli_study.add_resources(submit)
    for name, function, text in (
        ("status", study_status, "what is done and what is to come"),
        ("report", study_report, "write report/index.html from the results there are"),
    ):
        action = _verb(actions, name, function, text)
        action.add_argument("--config", help="a preset or a YAML file, to find the folder by its name")
        action.add_argument("--out", type=Path, help="the study's folder (default: runs/NAME)")
        if name == "report":
            cli_study.add_criterion(action)

    for name, text in (
        ("pretrain", "train theta_p on the source task, or take a checkpoint"),
        ("find", "draw tickets from pre-trained weights"),
        ("transfer", "fine-tune a ticket on a downstream task"),
        ("evaluate", "how robust a weights file is: any attacks, curves, alarms, corruptions, transfer"),
        ("landscape", "draw the loss around transferred networks, and the paths of their training"),
    ):
        verb = _verb(verbs, name, single_run, text)
        verb.set_defaults(verb=name)
        _configuration(verb, study=False)
        _running(verb)
        verb.add_argument("--workers", type=int, default=0, help="loader processes of large data sets")
        verb.add_argument(
            "--checkpoint-seconds", type=float, default=60.0, help="time between checkpoints (default: 60)"
        )
        if name == "evaluate":
            _measuring(verb)
        if name == "find":
            _scoring(verb)

    ticket = verbs.add_parser("ticket", help=cli_ticket.SUMMARY)
    cli_ticket.add_actions(ticket.add_subparsers(title="actions", metavar="ACTION", required=True), _verb)

    bench = _verb(verbs, "bench", run_bench, "time kernels, attacks and training steps after a correctness gate")
    bench.add_argument("operations", nargs="*", help="names of operations (default: all)")
    bench.add_argument("--list", action="store_true", help="list the operations")
    bench.add_argument("--csv", type=Path, help="append the records to this file")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    bench.add_argument("--claims", action="store_true", help="time what the claims rest on, and say which of them hold")
    bench.add_argument("--base", metavar="REF", help="compare with this git revision, in turn (needs a checkout)")
    bench.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the records of --csv, and time nothing")

    _verb(verbs, "doctor", doctor, "what is installed, what works here, what to do about what does not")
    return parser


def _verb(parent: Any, name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(function=function)
    return parser


def _configuration(parser: argparse.ArgumentParser, *, study: bool) -> None:
    parser.add_argument(
        "--config",
        required=study,
        help="a YAML file" + (" or a preset: quickstart, small, criteria, reference, recommended" if study else ""),
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)


def _running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: one below runs/, named after the run)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and what would run, and stop")
    parser.add_argument("--tracker", choices=TRACKERS, help="also send the numbers there, through Accelerate")
    parser.add_argument(
        "--mixed-precision", choices=("no", "bf16", "fp16"), help="precision of training (default: Accelerate's)"
    )
    parser.add_argument(
        "--compile", choices=("inductor", "aot_eager", "eager"), help="backend that torch.compile trains the network by"
    )
    parser.add_argument("--trust-pickle", action="store_true", help="let checkpoint files run the code they contain")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def _joining(parser: argparse.ArgumentParser) -> None:
    """Add what every worker of a study is told."""
    parser.add_argument("--no-report", action="store_true", help="do not write the report at the end")
    parser.add_argument(
        "--idle-minutes", type=float, help="leave when there was nothing to do for so long (default: stay to the end)"
    )
    parser.add_argument("--run-name", help=argparse.SUPPRESS)  # the same for workers that are started together
    cli_study.add_criterion(parser)


SCORING = {
    "score": "what is kept: magnitude, snip, grasp, synflow, taylor, fisher, movement, hydra",
    "score_on": "whether scores with data see clean or adversarial images",
    "scope": "how the weights that stay are shared among layers: global, layerwise, uniform, erk",
    "pattern": "which weights go together: unstructured, 2:4, block:4x4, channel",
}


def _scoring(parser: argparse.ArgumentParser) -> None:
    """Add the shorthands of `find`; each is an override of find.*."""
    for name, text in SCORING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"find.{name}, {text}")


def _scoring_overrides(options: argparse.Namespace) -> list[str]:
    given = vars(options)
    return [f"find.{name}={given[name]!r}" for name in SCORING if given.get(name)]


def _measuring(parser: argparse.ArgumentParser) -> None:
    """Add the shorthands of `evaluate`; each is an override under another name."""
    parser.add_argument("--attacks", help="evaluation.attacks, by comma: pgd, autoattack, apgd-ce, square, ...")
    parser.add_argument("--eps", help="evaluation.eps, such as 8/255; several, by comma, give a robustness curve")
    parser.add_argument("--norm", choices=("Linf", "L2", "L1"), help="evaluation.norm")
    parser.add_argument("--attack-precision", choices=("fp32", "bf16"), help="evaluation.precision")
    parser.add_argument("--alarms", action="store_true", help="measure what would show that the robustness is not real")
    parser.add_argument("--corruptions", action="store_true", help="accuracy under the 15 common corruptions")


def _measuring_overrides(options: argparse.Namespace) -> list[str]:
    given = vars(options)
    overrides = [f"{name}=true" for name in ("alarms", "corruptions") if given.get(name)]
    if given.get("attacks"):
        overrides.append(f"evaluation.attacks=[{given['attacks']}]")
    if given.get("eps"):
        from sparse_robust.attacks import parse_eps

        *others, largest = sorted(given["eps"].replace(" ", "").split(","), key=parse_eps)
        overrides += [f"evaluation.eps={largest}", f"curve=[{', '.join(others)}]"]
    for name, key in (("norm", "norm"), ("attack_precision", "precision")):
        if given.get(name):
            overrides.append(f"evaluation.{key}={given[name]}")
    return overrides


def study_run(options: argparse.Namespace) -> int:
    """Run a study and write its report."""
    from sparse_robust.study.console import dry_run
    from sparse_robust.study.runner import Study

    config = _study_config(options)
    study = Study(config, options.out or Path("runs") / config.name, trust_pickle=options.trust_pickle)
    criterion = cli_study.criterion_of(options)
    if options.dry_run:
        dry_run(study)
        return 0
    from sparse_robust.bench import machine
    from sparse_robust.study.processes import run_processes
    from sparse_robust.study.report import write_report
    from sparse_robust.study.workers import run_study

    if options.processes > 1:
        return run_processes(options.processes, cli_study.worker_arguments(options, study))
    bars = None if options.run_name is None else False  # one of several workers: their bars would mix
    with _accelerator(options, study.folder) as accelerator, _progress(accelerator, options, bars) as progress:
        outcome = run_study(
            study, accelerator, progress, machine=asdict(machine(accelerator.device)), run=options.run_name,
            idle_seconds=None if options.idle_minutes is None else 60 * options.idle_minutes,
            report=None if options.no_report else partial(write_report, study.folder, criterion),
        )  # fmt: skip
    outcome.raise_failures()
    return 0


def study_submit(options: argparse.Namespace) -> int:
    """Start workers on a cluster."""
    from sparse_robust.study.console import dry_run
    from sparse_robust.study.runner import Study

    config = _study_config(options)
    study = Study(config, options.out or Path("runs") / config.name)
    cli_study.criterion_of(options)  # a name that every worker would refuse
    resources = cli_study.resources(options)
    if options.dry_run:
        dry_run(study)
        return 0
    return cli_study.submit(options, study, resources)


def study_status(options: argparse.Namespace) -> int:
    """Print which cells are done."""
    from sparse_robust.study.console import status

    status(_study_folder(options))
    return 0


def study_report(options: argparse.Namespace) -> int:
    """Write the report of a study, finished or not."""
    from sparse_robust.study.report import write_report

    sys.stdout.write(f"{write_report(_study_folder(options), cli_study.criterion_of(options))}\n")
    return 0


def single_run(options: argparse.Namespace) -> int:
    """Run one stage in one folder."""
    from sparse_robust.study.console import show_configuration, show_evaluation
    from sparse_robust.study.context import Context
    from sparse_robust.study.load import build, read_config
    from sparse_robust.study.runs import RUNS, described, execute, outcome, run_name

    overrides = [*options.overrides, *_scoring_overrides(options), *_measuring_overrides(options)]
    values = read_config(options.config, overrides, study=False)
    if options.verb == "find" and isinstance(finder := values.setdefault("find", {}), dict) and "recipe" not in finder:
        finder.setdefault("method", "oneshot")  # IMP has to be told how to train
    run = build(RUNS[options.verb], values)
    folder = options.out or Path("runs") / run_name(run)
    if options.dry_run:
        run.check(trust_pickle=options.trust_pickle)
        described(run, folder)
        show_configuration(run)
        return 0
    bars = False if options.verb == "evaluate" else None  # which has a display of its own
    with _accelerator(options, folder) as accelerator, _progress(accelerator, options, bars) as progress:
        context = Context(
            accelerator=accelerator, progress=progress, workers=options.workers, trust_pickle=options.trust_pickle,
            checkpoint_seconds=options.checkpoint_seconds, keep_weights=True,
        )  # fmt: skip
        row = execute(run, folder, context)
        main_process = accelerator.is_main_process
    if main_process:
        if options.verb == "evaluate":
            show_evaluation(folder, row)
        sys.stdout.write(f"{folder}: {outcome(run, row)}\n")
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Run benchmarks."""
    from sparse_robust.bench import command

    return command(
        options.operations, list_only=options.list, csv=options.csv, device=options.device, claims=options.claims,
        base=options.base, plot=options.plot,
    )  # fmt: skip


def doctor(options: argparse.Namespace) -> int:
    """Print what works here."""
    from sparse_robust.study.doctor import examine

    return examine()


def _study_config(options: argparse.Namespace) -> StudyConfig:
    from sparse_robust.study.config import StudyConfig
    from sparse_robust.study.load import build, read_config

    return build(StudyConfig, read_config(options.config, options.overrides))


def _study_folder(options: argparse.Namespace) -> Path:
    from sparse_robust.study.load import read_config

    if options.out is None and options.config is None:
        raise UsageError("say which study: --out FOLDER, or --config PRESET for runs/PRESET.")
    folder: Path = options.out or Path("runs") / str(read_config(options.config).get("name"))
    if not (folder / "study.json").exists():
        raise UsageError(
            f"{folder} holds no study (no study.json): start one with sparse-robust study run --config quickstart."
        )
    return folder


@contextmanager
def _accelerator(options: argparse.Namespace, folder: Path) -> Iterator[Accelerator]:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from sparse_robust.files import ensure_writable

    ensure_writable(folder)
    project = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "trackers"))
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        dynamo_backend=options.compile,
        gradient_accumulation_steps=1,  # accumulation is the recipe's
        log_with=options.tracker,
        project_config=project,
    )
    if accelerator.num_processes < launched_processes():
        raise UsageError(
            f"{launched_processes()} processes were started and each sees only itself: without GPUs set "
            "ACCELERATE_USE_CPU=true and start with torchrun, so that they work together."
        )
    try:
        yield accelerator
    finally:
        accelerator.end_training()  # ends the process group, which must not outlive the work


def _progress(accelerator: Accelerator, options: argparse.Namespace, bars: bool | None = None) -> ProgressReporter:
    from sparse_robust.training.progress import ProgressReporter

    return ProgressReporter(accelerator.is_main_process and not options.quiet, bars)
