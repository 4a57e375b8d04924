"""The Flower app of docs/embedding.md, as its author would run it: with data and a model of their own."""

from __future__ import annotations

import json
import re
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM

from hsplitlora_flwr.cli.superlink import open_superlink, started_run
from tests.system.conftest import PROJECT


def blocks(language: str) -> list[str]:
    """The blocks of a language on that page."""
    found = re.findall(
        rf"^```{language}\n(.*?)^```", (PROJECT / "docs" / "embedding.md").read_text(), re.DOTALL | re.MULTILINE
    )
    return [str(block) for block in found]


def test_the_app_of_the_page_runs(tiny_folder: Path, tmp_path: Path) -> None:
    app, notes, results = tmp_path / "notes", tmp_path / "srv", tmp_path / "results"
    app.mkdir()
    [code] = [block for block in blocks("python") if "split_client_app(load_data" in block]
    [project] = [block for block in blocks("toml") if "notes:server" in block]
    (app / "notes.py").write_text(code)
    (app / "pyproject.toml").write_text(project)
    for site in range(2):
        (notes / f"site-{site}").mkdir(parents=True)
        for index in range(4 + site):
            (notes / f"site-{site}" / f"note {index}.txt").write_text(f"What site {site} wrote down, number {index}.")
    values = {"model.path": tiny_folder, "data.path": notes, "run.dir": results, "train.steps": 2}
    lines = (
        f"{key} = {json.dumps(value if isinstance(value, int) else str(value))}\n" for key, value in values.items()
    )
    (tmp_path / "run.toml").write_text("".join(lines))
    log = tmp_path / "flwr.log"
    with open_superlink("", app, tmp_path / "superlink.log") as link:
        with link.stream(app, tmp_path / "run.toml", "num-supernodes=2 client-resources-num-cpus=1", log) as process:
            process.wait(timeout=500)
        run_id = started_run(log)
        assert run_id and link.status(run_id).text == "finished:completed", log.read_text()
    summary = json.loads((results / "summary.json").read_text())
    assert [client["examples"] for client in summary["rounds"][0]["clients"]] == [4, 5]
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), str(results / "adapter"))
