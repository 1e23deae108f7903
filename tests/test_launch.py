"""Launch files: each is read by Accelerate, says how it is used, and starts what it promises."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.yaml"))


def launch_arguments(file: Path, *more: str) -> argparse.Namespace:
    """What Accelerate makes of a launch file, through its own parser and checks."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(file), *more, "-m", "sparse_robust", "doctor"]
    arguments: argparse.Namespace = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    return arguments


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )


def test_there_are_launch_files_for_a_gpu_and_a_node() -> None:
    assert {"one_gpu.yaml", "one_node.yaml"} <= {file.name for file in LAUNCH_FILES}


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_launch_files_are_read_by_accelerate_and_explained(file: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    assert isinstance(load_config_from_file(str(file)), ClusterConfig)
    text = file.read_text()
    assert f"accelerate launch --config_file launch/{file.name}" in text, "say how to use it"
    assert file.name in (ROOT / "launch" / "README.md").read_text()
    # Every key must mean something: Accelerate refuses unknown ones, and YAML must not turn a word into a truth value.
    assert isinstance(yaml.safe_load(text)["distributed_type"], str)
    assert isinstance(yaml.safe_load(text)["mixed_precision"], str)


def test_launch_files_resolve_to_what_they_promise() -> None:
    one = launch_arguments(ROOT / "launch" / "one_gpu.yaml")
    assert (one.num_processes, one.multi_gpu, one.gpu_ids, one.mixed_precision) == (1, False, "0", "no")
    node = launch_arguments(ROOT / "launch" / "one_node.yaml")
    assert (node.num_processes, node.multi_gpu, node.gpu_ids, node.mixed_precision) == (8, True, "all", "bf16")
    four = launch_arguments(ROOT / "launch" / "one_node.yaml", "--num_processes", "4")
    assert four.num_processes == 4


@pytest.mark.slow
def test_one_gpu_file_runs_the_command_line() -> None:
    study = ["-m", "sparse_robust", "study", "run", "--config", "quickstart", "--dry-run"]
    launched = launch("--config_file", "launch/one_gpu.yaml", *study)
    assert launched.returncode == 0, launched.stderr
    assert "pretrain" in launched.stdout


@pytest.mark.slow
@pytest.mark.distributed
def test_one_node_file_makes_a_group_of_its_processes(tmp_path: Path) -> None:
    """As launch/README.md says to try it without GPUs."""
    script = tmp_path / "probe.py"
    script.write_text(
        "import torch, accelerate\n"
        "a = accelerate.Accelerator()\n"
        "total = a.reduce(torch.tensor([1.0 + a.process_index]))\n"
        "print(f'rank {a.process_index} of {a.num_processes}, sum {total.item()}\\n', end='', flush=True)\n"
        "a.end_training()\n"
    )
    node = ["--config_file", "launch/one_node.yaml", "--num_processes", "2", "--mixed_precision", "no"]
    launched = launch(*node, "--main_process_port", "0", str(script), ACCELERATE_USE_CPU="true")
    assert launched.returncode == 0, launched.stderr
    assert set(launched.stdout.split("\n")) >= {"rank 0 of 2, sum 3.0", "rank 1 of 2, sum 3.0"}
