"""The Ray engine: the same store as one process writes, whatever is killed."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faults import Chaos, same, survive
from stub_job import Stub, make_data, run

from minexp.data.store import read_store
from minexp.errors import MinexpError, RequestError

ray = pytest.importorskip("ray")
KILLS = int(os.environ.get("MINEXP_KILLS", "3"))  # more where there is time: a new driver takes half a minute
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "d.npy", 2000)


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> Path:
    run(data, data.parent / "undisturbed")
    return data.parent / "undisturbed"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One of this machine, that claims to have a GPU."""
    here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(num_cpus=3, num_gpus=1, runtime_env={"env_vars": here}, **quiet)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_actors_on_shares_of_a_gpu_store_what_one_process_stores(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    images = np.load(data)[:300]
    images[200, 0, 0, 0] = 5
    np.save(tmp_path / "d.npy", images)
    stub, options = Stub(fate=((5, "oh"),)), {"engine": "ray", "workers": 2, "gpus": 0.5}
    summary = run(tmp_path / "d.npy", tmp_path / "out", stub, **options)
    assert (summary["rows"], summary["errors"]) == (300, 1)
    run(tmp_path / "d.npy", tmp_path / "one", stub)
    assert same(tmp_path / "out", tmp_path / "one")
    # What one engine began, the other ends.
    run(data, tmp_path / "both", part=(1, 2))
    summary = run(data, tmp_path / "both", **options)
    assert (summary["rows"], summary["resumed"]) == (2000, 976)
    assert same(tmp_path / "both", undisturbed)


@pytest.mark.usefixtures("cluster")
def test_what_cannot_be_done_is_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RequestError, match=r"4 workers need 5 CPUs, one CPU being for reading: the cluster has 3"
    ):
        run(data, tmp_path / "out", engine="ray", workers=4)
    with pytest.raises(RequestError, match=r"2 workers need 4 GPUs.*: the cluster has 1"):
        run(data, tmp_path / "out", engine="ray", workers=2, gpus=2)
    assert not (tmp_path / "out").exists()
    images = np.load(data)[:20]
    images[7, 0, 0, 0] = 5
    np.save(tmp_path / "d.npy", images)
    stub = Stub(fate=((5, "oh"),))
    with pytest.raises(MinexpError, match="d.npy#7: ZeroDivisionError: oh .--on-error skip") as caught:
        run(tmp_path / "d.npy", tmp_path / "out", stub, engine="ray", errors=0, batch=8)
    assert caught.value.exit_code == 3


@pytest.mark.usefixtures("cluster")
def test_an_image_that_kills_every_actor_ends_the_job(data: Path, tmp_path: Path) -> None:
    images = np.load(data)[:20]
    images[9, 0, 0, 0] = 3
    np.save(tmp_path / "d.npy", images)
    with pytest.raises(
        MinexpError, match="every process that works on the images 0 to 19 dies.*--workers find"
    ):
        run(tmp_path / "d.npy", tmp_path / "out", Stub(fate=((3, "kill"),)), engine="ray")


def test_killed_actors_and_drivers_lose_and_double_nothing(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    chaos, out = Chaos(str(tmp_path / "chaos"), KILLS, parents=2), tmp_path / "out"
    summary = survive(chaos, data, out, engine="ray", workers=2, batch=64, seconds=0.05)
    assert chaos.given == KILLS and summary["begun"] == 1 + KILLS // 2
    assert summary["rows"] == 2000 == read_store(out).num_rows
    assert same(out, undisturbed)
