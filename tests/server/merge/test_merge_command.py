"""`mi-server merge` leaves no directory unless the merge was completed."""

from pathlib import Path

import pytest

from server.merge import merge_command


def test_the_help_states_each_default_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        merge_command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text
    assert str(merge_command.INSTRUCT_DIRECTORY) not in text
    assert "how to merge (default: interpolation)" in text


def test_a_merge_that_is_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_command, "write_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_command.main(["--lambda", "0.5", "--out", str(tmp_path / "merged")])
    assert not [*tmp_path.iterdir()]
