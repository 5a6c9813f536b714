from typing import Any

import pytest

from tests.launch.commands import run
from tests.registries import scratch_registries
from tests.test_kills import trials, write_grid
from tests.test_resume import outcome


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How each trial of that grid ends which nothing disturbs, in processes of this machine."""
    folder = write_grid(tmp_path_factory.mktemp("whole"))
    process = run(folder, "grid.yaml")
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    with scratch_registries():
        return {home.name: outcome(home) for home in trials(folder / "runs")}
