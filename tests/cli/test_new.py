"""The app that ``hsplitlora new`` writes; tests/system/test_own_app.py runs it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from hsplitlora_flwr.cli import new as starter
from hsplitlora_flwr.cli.new import new
from hsplitlora_flwr.config import Config, ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "embedding.md"


def test_the_page_shows_what_is_written() -> None:
    page, written = PAGE.read_text(), starter.files("notes-app", "/srv/notes-app")
    for language, file in (("python", "notes.py"), ("toml", "pyproject.toml")):
        assert f"```{language}\n{written[file]}```" in page
    [commands] = re.findall(r"^```\n(cd .*?)^```", page, re.DOTALL | re.MULTILINE)
    assert f"```\n{commands}```" in written["README.md"] and "cd /srv/notes-app\n" in commands


def test_its_settings_are_taken(tmp_path: Path) -> None:
    folder = tmp_path / "my-app"
    assert f"cd {folder}\n" in new(folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-app"
    settings = {
        f"{section}.{key}": value
        for section, keys in project["tool"]["flwr"]["app"]["config"].items()
        for key, value in keys.items()
    }
    config = Config.from_run_config(settings)
    assert Path(config.data.path) == folder / "notes" and config.clients.count == 2
    assert [len(list((folder / "notes" / site).glob("*.txt"))) for site in ("site-0", "site-1")] == [4, 4]
    compile((folder / "notes.py").read_text(), "notes.py", "exec")


@pytest.mark.parametrize(("name", "proposed"), [("my_app", "my-app"), ("2nd app", "nd-app"), ("...", "my-app")])
def test_a_name_that_flower_does_not_take_is_refused_with_one_that_it_does(
    name: str, proposed: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"cannot be the name of a Flower app: .*; {proposed} can$"):
        new(tmp_path / name)


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(ConfigError, match="is there already; name a new folder"):
            new(tmp_path / name)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert new(tmp_path / "empty")


def test_a_path_that_settings_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in its path"):
        new(tmp_path / "it's" / "app")
    assert not (tmp_path / "it's").exists()


def test_the_command_says_how_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["hsplitlora new", str(tmp_path / "app")])
    for status, stream, text in ((0, "out", "flwr run . --stream"), (2, "err", "is there already")):
        with pytest.raises(SystemExit) as end:
            starter.command()
        assert end.value.code == status and text in getattr(capsys.readouterr(), stream)
