"""`--launcher ray`: on a cluster of two nodes, one of which is lost, and on one of its own."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gla_ablate.cli import main
from gla_ablate.errors import ConfigError
from gla_ablate.launch.on_ray import Share, address, share
from gla_ablate.launch.state import State
from tests.launch.commands import run
from tests.test_cli import PLUGIN as GATES_OF_THE_COMMAND
from tests.test_cli import TINY, statuses
from tests.test_kills import PAUSE, parent, paused, training, trials, wait_for, write_grid
from tests.test_resume import outcome

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's"),
    pytest.mark.xdist_group("clusters"),  # one at a time
]
MARK = "GLA_TEST_OF_RAY"  # in the environment of all that a command starts


@pytest.fixture
def grid(tmp_path: Path, scratch_registry: None) -> Path:
    return write_grid(tmp_path)


def on_ray(folder: Path, *arguments: str, ray: str = "local") -> subprocess.Popen[str]:
    """The command, through the cluster at that address."""
    return run(folder, *arguments, "--launcher", "ray", RAY_ADDRESS=ray, **{MARK: str(folder)})


OURS = (b"gla_ablate.trial", b"ray::Host", b"raylet/raylet", b"gcs_server")  # Ray's agents take a minute to end


def left_over(folder: Path) -> list[str]:
    """The commands of the trials, and of Ray's processes that hold them, that `on_ray` started there and are alive."""
    found, mark = [], f"{MARK}={folder}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if any(name in command for name in OURS) and mark in (process / "environ").read_bytes():
                found.append(command.replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue
    return found


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Of so many nodes as the test's parameter says, of one CPU each."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    for _ in range(request.param - 1):
        cluster.add_node(**options)
    yield cluster
    cluster.shutdown()


def on_second_node(cluster: Any, running: dict[Path, dict[str, Any]]) -> tuple[Path, int]:
    """The trial there, and its process."""
    (node,) = cluster.worker_nodes
    raylets = [p.process.pid for p in node.all_processes["raylet"]]
    ((home, pid),) = [(home, x["pid"]) for home, x in running.items() if parent(parent(x["pid"])) in raylets]
    return home, pid


@pytest.mark.parametrize("cluster", [2], indirect=True, ids=["2 nodes"])
def test_a_lost_node_s_trial_goes_on_elsewhere_as_if_nothing_had_been(cluster: Any, grid: Path, whole: Any) -> None:
    (grid / PAUSE).touch()
    process = on_ray(grid, "grid.yaml", ray=cluster.address)
    home, pid = on_second_node(cluster, paused(grid, process))
    gone = (pid, parent(pid))  # with Ray's worker: a machine that is gone saves nothing, and tells nothing
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for each in gone:
            os.kill(each, number)
        if number == signal.SIGSTOP:
            cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    (grid / PAUSE).unlink()
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    assert "2 at a time on a Ray cluster of 2 nodes" in out
    assert (
        f"killed       {home.name}: its node or its Ray worker was lost" in out
        and out.count(f"started      {home.name}") == 2
    )
    assert State.read(home).first_step == 41
    assert {home.name: outcome(home) for home in trials(grid / "runs")} == whole


@pytest.mark.parametrize("cluster", [1], indirect=True, ids=["1 node"])
def test_trials_wait_for_a_place_and_one_that_fails_leaves_the_others_alone(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "gates.py").write_text(GATES_OF_THE_COMMAND)
    broken = "grid: {model.gate: [{name: e2e_broken}, {name: none}]}\nplugins: [gates.py]\n"
    (tmp_path / "t.yaml").write_text(TINY + broken)
    process = on_ray(tmp_path, "t.yaml", "--jobs", "2", ray=cluster.address)
    seen = set()
    while process.poll() is None:
        running = [name for name, status in statuses(tmp_path / "runs" / "t").items() if status == "running"]
        seen.add(len(running))
        time.sleep(0.02)
    out, _ = process.communicate()
    assert process.returncode == 1 and "1 at a time on a Ray cluster of 1 node" in out
    assert seen == {0, 1}  # of two jobs, since the node has one CPU
    assert statuses(tmp_path / "runs" / "t") == {"e2e_broken": "diverged", "none": "finished"}
    assert "loss is nan at step 1" in out


def test_nothing_outlives_a_killed_launcher_and_an_interrupted_one_ends_in_order(grid: Path) -> None:
    command = ("grid.yaml", "trainer.max_steps=20000", "--jobs", "2")
    first = on_ray(grid, *command)
    wait_for(lambda: len(training(grid / "runs", 0)) == 2 or first.poll() is not None)
    wait_for(lambda: len(list(grid.glob("runs/grid/*/checkpoints/last.ckpt"))) == 2)
    assert first.poll() is None
    first.kill()
    first.wait()
    wait_for(lambda: not left_over(grid), 30)
    since = time.time()
    second = on_ray(grid, *command)
    wait_for(lambda: len(training(grid / "runs", since)) == 2 or second.poll() is not None)
    os.killpg(second.pid, signal.SIGINT)
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 130, out
    assert "interrupted; the same command goes on" in out and "Traceback" not in out
    for home in trials(grid / "runs"):
        state = State.read(home)
        assert state.status == "interrupted" and state.first_step > 40, state
    wait_for(lambda: not left_over(grid), 10)


@pytest.mark.parametrize(
    ("nodes", "jobs", "per_gpu", "threads", "expected"),
    [
        ([(8, 0), (3, 0)], None, None, None, Share(1, 0, 11)),
        ([(8, 0), (3, 0)], None, None, 2, Share(2, 0, 5)),
        ([(8, 0), (3, 0)], 2, None, None, Share(4, 0, 2)),  # two on the first: the second has but three
        ([(8, 0), (3, 0)], 3, None, None, Share(3, 0, 3)),
        ([(2, 0)], 5, None, None, Share(1, 0, 2)),
        ([(16, 4), (64, 8), (8, 0)], None, None, None, Share(4, 1, 12)),
        ([(16, 4)], None, 2, None, Share(2, 0.5, 8)),
        ([(14, 1)], None, 7, None, Share(2, 0.1428, 7)),  # seven sevenths, as Ray rounds them, are more than one
        ([(16, 4)], 3, None, None, Share(4, 1, 3)),
        ([(2, 4)], None, None, None, Share(1, 1, 2)),
    ],
)
def test_a_cluster_is_shared_evenly(
    nodes: list[tuple[int, int]], jobs: int | None, per_gpu: int | None, threads: int | None, expected: Share
) -> None:
    assert share([{"CPU": c, "GPU": g} for c, g in nodes], jobs, per_gpu, threads, gpu=True) == expected


def test_without_gpus_for_the_launcher_none_is_asked_for() -> None:
    assert share([{"CPU": 4, "GPU": 2}], None, None, None, gpu=False) == Share(1, 0, 4)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([{"CPU": 4}], {"per_gpu": 2}, "--per-gpu: there is no GPU"),
        ([{"CPU": 4}, {"CPU": 4}], {"threads": 8}, "a trial takes 8 CPUs"),
        ([{"memory": 4}], {}, "no node has as many"),
    ],
)
def test_a_cluster_that_holds_no_trial_is_refused(
    nodes: list[dict[str, float]], options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        share(nodes, **{"jobs": None, "per_gpu": None, "threads": None, "gpu": True, **options})


def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (tmp_path / "t.yaml").write_text(TINY)
    assert main([str(tmp_path / "t.yaml"), "--out", str(tmp_path / "runs"), "--launcher", "ray"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_without_ray_it_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "--launcher ray: needs ray, which isn't installed: pip install -e '.[ray]'" in refused(tmp_path, capsys)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "RAY_ADDRESS: got ray://"),
        ("127.0.0.1:1", "RAY_ADDRESS: nothing answers at '127.0.0.1:1'; takes host:port"),
        ("nonsense", "RAY_ADDRESS: nothing answers at 'nonsense'"),
    ],
)
def test_an_address_of_no_cluster_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str, message: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert message in refused(tmp_path, capsys)
    assert not (tmp_path / "runs").exists()


def test_a_cluster_that_is_gone_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    assert address() is None
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    assert address() is None
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "ray" / "ray_current_cluster").write_text(here := f"127.0.0.1:{server.getsockname()[1]}")
        assert address() == here
        monkeypatch.setenv("RAY_ADDRESS", here)
        assert address() == here
        monkeypatch.setenv("RAY_ADDRESS", "local")
        assert address() is None


def test_a_trial_on_several_devices_asks_for_as_many_gpus_of_one_node() -> None:
    nodes = [{"CPU": 16, "GPU": 4}, {"CPU": 32, "GPU": 7}, {"CPU": 8, "GPU": 1}]
    assert share(nodes, None, None, None, gpu=True, devices=2) == Share(8, 2, 5)
    assert share([{"CPU": 8}], None, None, None, gpu=True, devices=2) == Share(2, 0, 4)
    with pytest.raises(ConfigError, match=r"trainer.devices: got 8, takes at most 7, the GPUs of a node"):
        share(nodes, None, None, None, gpu=True, devices=8)
