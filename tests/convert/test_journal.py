"""The journal drops what a kill has torn and keeps all else; the lock lets one process in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernieq.convert import Staging
from ernieq.convert.journal import Journal
from ernieq.errors import OutputExistsError, OutputLockedError


def written(path: Path, count: int = 3) -> list[dict[str, object]]:
    journal = Journal(path)
    for number in range(count):
        journal.append("unit", number=number, error=0.1 + number / 3, names=["a", "b"])
    journal.close()
    return journal.events()


def test_events_come_back_exactly_and_one_is_a_line_of_json(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    events = written(path)
    again = Journal(path)
    assert again.events() == events
    assert again.events("layer") == []
    assert again.damaged == 0
    assert [json.loads(line)["number"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_a_last_line_torn_at_any_byte_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    events = written(tmp_path / "whole.jsonl")
    raw = (tmp_path / "whole.jsonl").read_bytes()
    begin = raw[:-1].rindex(b"\n") + 1
    for length in range(begin, len(raw)):
        path = tmp_path / "torn.jsonl"
        path.write_bytes(raw[:length])
        journal = Journal(path)
        assert journal.events() == events[:2]
        assert journal.damaged == (length > begin)
        journal.append("unit", number=9)
        journal.close()
        assert [event["number"] for event in Journal(path).events()] == [0, 1, 9]


def test_a_line_that_was_altered_is_ignored_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    events = written(path)
    path.write_bytes(path.read_bytes().replace(b'"number": 1', b'"number": 7'))
    journal = Journal(path)
    assert journal.events() == [events[0], events[2]]
    assert journal.damaged == 1


def test_a_second_holder_of_a_staging_directory_is_refused_by_name(tmp_path: Path) -> None:
    with (
        Staging(tmp_path / "packed"),
        pytest.raises(OutputLockedError, match=r"packed is being written by process \d+ on "),
        Staging(tmp_path / "packed"),
    ):
        pass
    with Staging(tmp_path / "packed"):
        pass  # the lock went with its holder
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_ernieq_has_not_made_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "packed.partial").mkdir()
    (tmp_path / "packed.partial" / "thesis.tex").write_text("x")
    with (
        pytest.raises(OutputExistsError, match=r"packed\.partial is no unfinished work"),
        Staging(tmp_path / "packed", restart=True),
    ):
        pass
    assert (tmp_path / "packed.partial" / "thesis.tex").read_text() == "x"


def test_an_output_set_aside_by_a_kill_is_put_back(tmp_path: Path) -> None:
    with Staging(tmp_path / "packed") as staging:
        staging.begin({"identity": {}})
        staging.journal.append("unit", key="a")
        staging.folder("replaced").joinpath("config.json").write_text("{}")
    with Staging(tmp_path / "packed", restart=True):
        assert (tmp_path / "packed" / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
