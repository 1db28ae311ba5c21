"""Two "nodes" on loopback addresses without ssh: one deepspeed launcher each, started by launchers/multi_node.sh."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end import tiny
from tests.end_to_end.commands import ROOT, compt, free_port, launcher_environment


def test_two_nodes_without_ssh_train_the_chain_of_two_ranks(tmp_path: Path) -> None:
    links = [
        {"model": "s.json", "steps": 3},
        {"model": "m.json", "steps": 2, "grow": {"operator": "exact"}, "align": {"weight": 1.0}},
    ]
    recipe = tiny.write_recipe(tmp_path, links=links, controls=[])
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            ["bash", str(ROOT / "launchers" / "multi_node.sh"), str(recipe), "--run-dir", str(tmp_path / "run")],
            cwd=tmp_path,
            env=launcher_environment(
                HOSTFILE=str(hostfile), NO_SSH="1", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (1, 0)  # in any order
    ]
    try:
        said = [node.communicate(timeout=250)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(text[-3000:] for text in said)
    assert tiny.ledger(tmp_path / "run")["machine"]["world"] == 2
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert compt("train", recipe, "--run-dir", tmp_path / "one", folder=tmp_path).codes == [0]
    for link in ("s", "m"):
        assert tiny.losses(tmp_path / "run", link) == pytest.approx(tiny.losses(tmp_path / "one", link), abs=1e-4)
