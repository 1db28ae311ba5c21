"""Where the tokenizer of a run's checkpoint is looked for: what the ledger says, else the link's own export."""

from __future__ import annotations

from pathlib import Path

from compt_megatron.chain.ledger import Entry, Ledger
from compt_megatron.chain.run_tokenizer import recorded_tokenizer, with_companions


def test_a_checkpoint_of_a_run_has_the_tokenizer_of_its_link(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (data / name).write_text("{}")
    recorded = {"s": str(data / "tokenizer.json"), "m": str(tmp_path / "moved" / "tokenizer.json"), "l": None}
    links = [Entry(name, "model", tokenizer=file) for name, file in recorded.items()]
    Ledger("run", "recipe.yaml", "", links=links).save(run)
    export = run / "m" / "export" / "tokenizer.json"
    export.parent.mkdir(parents=True)
    export.write_text("{}")
    for place in ("checkpoints/step_00000003", "initial", "export"):
        assert recorded_tokenizer(run / "s" / place) == data / "tokenizer.json"
        assert recorded_tokenizer(run / "m" / place) == export, "the data have moved"
        assert recorded_tokenizer(run / "l" / place) is None, "there is none"
        assert recorded_tokenizer(run / "other" / place) is None
        assert recorded_tokenizer(tmp_path / "data" / place) is None, "no run"
    (run / "chain.json").write_text("{}")
    assert recorded_tokenizer(run / "s" / "initial") is None, "another program's file"
    found = with_companions(data / "tokenizer.json")
    assert found == {name: data / name for name in ("tokenizer.json", "special_tokens_map.json")}
    assert with_companions(None) == {}
