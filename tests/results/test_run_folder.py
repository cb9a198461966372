from qexp.results.run_folder import RunFolder, remove_leftovers


def test_leftovers_of_killed_runs_are_removed_and_those_of_running_ones_stay(tmp_path) -> None:
    for name in ("runs/killed", "references/killed", "runs/running"):
        (tmp_path / name / "offload" / "transformer").mkdir(parents=True)
        (tmp_path / name / "result.json").write_text("{}")
    with RunFolder(tmp_path / "runs/running").locked(print):
        remove_leftovers(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*/offload")] == ["runs/running/offload"]
    assert len(list(tmp_path.glob("*/*/result.json"))) == 3
