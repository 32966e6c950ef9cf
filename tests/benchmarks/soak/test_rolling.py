"""A rolling restart of real processes under load: no request fails, whichever process goes away and however."""

from pathlib import Path

import pytest

from benchmarks.soak.__main__ import rolling_restart, soak
from benchmarks.soak.fleet import Fleet
from benchmarks.soak.rolling import WAYS, Step, drain, plan, terminate, unlist


def test_every_process_goes_away_in_every_way_that_it_has(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, gateways=(1, 2))
    steps = plan(fleet, list(WAYS))
    assert [member.name for way, member in steps if way is terminate] == [
        "redis", "vision-0", "vision-1", "language-0", "language-1", "gateway-0", "gateway-1"
    ]  # fmt: skip
    assert {member.name for way, member in steps if way is drain} == {member.name for member in fleet.members} - {"redis"}
    assert [member for way, member in steps if way is unlist] == [*fleet.vision, *fleet.language]


def test_a_name_resolves_to_the_workers_of_its_kind_that_are_listed(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    for worker in fleet.workers:
        fleet.names.add(worker)
    fleet.names.remove(fleet.vision[0])
    assert fleet.names.path.read_text() == '{"vision": ["127.0.1.2"], "language": ["127.0.2.1", "127.0.2.2"]}'
    fleet.names.add(fleet.vision[0])
    assert '"vision": ["127.0.1.2", "127.0.1.1"]' in fleet.names.path.read_text()


def _steps(fleet: Fleet) -> list[Step]:
    return [
        (terminate, fleet.redis),
        (terminate, fleet.gateways[0]), (drain, fleet.gateways[1]),
        (terminate, fleet.vision[0]), (drain, fleet.vision[1]), (unlist, fleet.vision[0]),
        (drain, fleet.language[0]), (terminate, fleet.language[1]),
    ]  # fmt: skip


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_no_request_fails_while_everything_is_restarted(tmp_path: Path) -> None:
    problems = await soak(rolling_restart(_steps, 3.0), (1, 2), 0, tmp_path, tmp_path / "rolling.json")
    assert not problems, (tmp_path / "rolling.json").read_text()
