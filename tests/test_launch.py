"""Launch files: each is read by Accelerate, says how it is used, and starts what it promises."""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
LAUNCH_FILES = sorted((ROOT / "launch").glob("*.yaml"))
NEEDS_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="needs DeepSpeed (make test-distributed installs it)"
)


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


def test_there_are_launch_files_for_every_kind_of_machine() -> None:
    expected = {"one_gpu", "one_node", "many_nodes", "fsdp2", "zero2", "zero3"}
    assert expected <= {file.stem for file in LAUNCH_FILES}


@pytest.mark.parametrize("file", LAUNCH_FILES, ids=lambda file: file.stem)
def test_launch_files_are_read_by_accelerate_and_explained(file: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    assert isinstance(load_config_from_file(str(file)), ClusterConfig)
    text = file.read_text()
    assert f"accelerate launch --config_file launch/{file.name}" in text, "say how to use it"
    assert file.name in (ROOT / "launch" / "README.md").read_text()
    # Every key must mean something: Accelerate refuses unknown ones, and YAML must not turn a word into a truth value.
    assert isinstance(yaml.safe_load(text)["distributed_type"], str)
    assert isinstance(yaml.safe_load(text).get("mixed_precision", "no"), str)


def test_launch_files_resolve_to_what_they_promise() -> None:
    one = launch_arguments(ROOT / "launch" / "one_gpu.yaml")
    assert (one.num_processes, one.multi_gpu, one.gpu_ids, one.mixed_precision) == (1, False, "0", "no")
    node = launch_arguments(ROOT / "launch" / "one_node.yaml")
    assert (node.num_processes, node.multi_gpu, node.gpu_ids, node.mixed_precision) == (8, True, "all", "bf16")
    four = launch_arguments(ROOT / "launch" / "one_node.yaml", "--num_processes", "4")
    assert four.num_processes == 4
    many = launch_arguments(ROOT / "launch" / "many_nodes.yaml", "--machine_rank", "1")
    assert (many.num_machines, many.num_processes, many.machine_rank, many.multi_gpu) == (2, 16, 1, True)
    fsdp = launch_arguments(ROOT / "launch" / "fsdp2.yaml")
    assert (fsdp.use_fsdp, str(fsdp.fsdp_version), fsdp.num_processes, fsdp.mixed_precision) == (True, "2", 8, "bf16")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_say_the_stage_and_leave_precision_to_autocast(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    monkeypatch.chdir(ROOT)
    resolved = launch_arguments(ROOT / "launch" / f"zero{stage}.yaml")
    assert resolved.use_deepspeed and resolved.num_processes == 8 and resolved.mixed_precision == "no"
    config = HfDeepSpeedConfig(resolved.deepspeed_config_file)
    assert config.get_value("zero_optimization.stage") == stage
    assert config.get_value("zero_allow_untested_optimizer") is True
    assert config.get_value("torch_autocast.enabled") is True
    assert not config.get_value("bf16.enabled") and not config.get_value("fp16.enabled")
    if find_spec("deepspeed") is not None:  # DeepSpeed knows every word of it
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        given = json.loads(Path(resolved.deepspeed_config_file).read_text())["zero_optimization"]
        fields = DeepSpeedZeroConfig.model_fields.items()
        assert set(given) <= {name for name, _ in fields} | {field.alias for _, field in fields}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "one_gpu",
        "fsdp2",
        pytest.param("zero2", marks=[NEEDS_DEEPSPEED, pytest.mark.distributed]),
        pytest.param("zero3", marks=[NEEDS_DEEPSPEED, pytest.mark.distributed]),
    ],
)
def test_launch_files_run_the_command_line(name: str) -> None:
    study = ["-m", "sparse_robust", "study", "run", "--config", "quickstart", "--dry-run"]
    words = ["--config_file", f"launch/{name}.yaml", "--num_processes", "1", *study]
    launched = launch(*words, ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu")
    assert launched.returncode == 0, launched.stderr
    assert "pretrain" in launched.stdout


PROBE = (
    "import torch, accelerate\n"
    "a = accelerate.Accelerator()\n"
    "total = a.reduce(torch.tensor([1.0 + a.process_index]))\n"
    "print(f'rank {a.process_index} of {a.num_processes}, sum {total.item()}\\n', end='', flush=True)\n"
    "a.end_training()\n"
)


@pytest.mark.slow
@pytest.mark.distributed
def test_many_nodes_file_makes_a_group_of_its_machines(tmp_path: Path) -> None:
    """Two launches, as on two machines, that find each other at one address."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["--config_file", "launch/many_nodes.yaml", "--num_processes", "2", "--mixed_precision", "no"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    with ThreadPoolExecutor() as pool:
        nodes = [
            pool.submit(launch, *words, "--machine_rank", rank, str(script), ACCELERATE_USE_CPU="true")
            for rank in ("0", "1")
        ]
        launched = [node.result() for node in nodes]
    assert [node.returncode for node in launched] == [0, 0], launched[0].stderr + launched[1].stderr
    lines = {line for node in launched for line in node.stdout.split("\n")}
    assert lines >= {"rank 0 of 2, sum 3.0", "rank 1 of 2, sum 3.0"}


@pytest.mark.slow
@pytest.mark.distributed
def test_one_node_file_makes_a_group_of_its_processes(tmp_path: Path) -> None:
    """As launch/README.md says to try it without GPUs."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    node = ["--config_file", "launch/one_node.yaml", "--num_processes", "2", "--mixed_precision", "no"]
    launched = launch(*node, "--main_process_port", "0", str(script), ACCELERATE_USE_CPU="true")
    assert launched.returncode == 0, launched.stderr
    assert set(launched.stdout.split("\n")) >= {"rank 0 of 2, sum 3.0", "rank 1 of 2, sum 3.0"}
