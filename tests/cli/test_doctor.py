"""What the doctor says of machines that lack something."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from hsplitlora_flwr.cli import doctor
from hsplitlora_flwr.cli.doctor import LOOK, OK, WRONG, Finding


def installed_but(**versions: str) -> dict[str, list[Finding]]:
    def look_up(name: str) -> str:
        if name in versions:
            if versions[name]:
                return versions[name]
            raise PackageNotFoundError(name)
        return version(name)

    found: dict[str, list[Finding]] = {}
    for finding in doctor.packages(look_up):
        found.setdefault(finding.level, []).append(finding)
    return found


def test_packages_that_are_missing_or_old_are_named_with_what_to_do() -> None:
    assert set(installed_but()) == {OK}
    [old] = installed_but(torch="1.0")[WRONG]
    assert "torch 1.0" in old.found and old.cure == "pip install --upgrade 'hsplitlora-flwr'"
    [missing] = installed_but(peft="")[WRONG]
    assert "peft is missing" in missing.found


def test_a_node_without_the_simulation_is_not_wrong() -> None:
    found = installed_but(ray="")
    assert WRONG not in found
    assert [one.cure for one in found[LOOK]] == ["pip install --upgrade 'hsplitlora-flwr[simulation]'"]


def test_programs_that_are_nowhere_are_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert {finding.level for finding in doctor.programs(tmp_path)} == {WRONG}
    assert {finding.level for finding in doctor.programs()} == {OK}


def test_an_address_that_is_not_this_machine_is_told_from_loopback() -> None:
    own, other = doctor.ports("192.0.2.1")  # kept for documentation: nobody has it
    assert (own.level, other.level) == (OK, LOOK)
    assert "transport.address" in other.cure


def test_scarce_memory_and_disk_are_said(tmp_path: Path) -> None:
    assert [finding.level for finding in doctor.memory(1e9)] == [LOOK]
    assert [finding.level for finding in doctor.memory(64e9)] == [OK]
    assert [finding.level for finding in doctor.disk([tmp_path / "not" / "yet"], float("inf"))] == [LOOK]


def test_proxies_are_named_without_their_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy:3128")
    [finding] = doctor.proxies()
    assert finding.level == LOOK and "https_proxy" in finding.found and "secret" not in f"{finding}"


def test_a_model_that_is_not_here_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSPLITLORA_CACHE", str(tmp_path))
    assert [finding.level for finding in doctor.model()] == [LOOK]
    (tmp_path / "smollm2-135m").mkdir()
    assert [finding.level for finding in doctor.model()] == [OK]


@pytest.mark.parametrize(("level", "status"), [(OK, 0), (LOOK, 0), (WRONG, 1)])
def test_only_what_a_run_needs_makes_the_status_1(level: str, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.show([Finding(OK, "python", "3"), Finding(level, "disk", "full", "make room")]) == status
    assert capsys.readouterr().out == f"ok    python: 3\n{level:<6}disk: full\n      make room\n"
