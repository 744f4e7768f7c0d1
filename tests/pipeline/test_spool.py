"""What is kept for a store that is away: in order, whole, found again by another process."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.owner import lives, me, start_of
from pipeline.spool import Spool, spools

ABOUT = {"run_id": "r1", "name": "a run", "experiment_id": "1", "uri": "http://127.0.0.1:9"}


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(folder=tmp_path / "spool" / "r1")


def metrics(step: int) -> dict[str, Any]:
    return {"kind": "metrics", "metrics": [["loss", 0.5 / step, 1000 + step, step]]}


def test_entries_come_back_in_the_order_they_were_added(spool: Spool) -> None:
    for step in range(1, 4):
        spool.add(metrics(step), ABOUT)

    assert spool.entries == [metrics(step) for step in range(1, 4)]
    assert spools(spool.folder.parent) == [spool]
    assert spool.about == {**ABOUT, "owner": me()}


def test_a_spool_to_which_nothing_was_added_is_empty_and_leaves_nothing(spool: Spool) -> None:
    assert spool.is_empty
    assert spool.entries == []
    assert not spool.folder.parent.exists()


def test_a_file_and_a_folder_are_kept_though_their_own_are_gone(
    spool: Spool, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    (model / "data").mkdir(parents=True)
    (model / "data" / "weights").write_bytes(b"\x00\x01")
    text = tmp_path / "note.txt"
    text.write_text("é", encoding="utf-8")
    spool.add({"kind": "file", "folder": ""}, ABOUT, text)
    spool.add({"kind": "model", "metrics": {}}, ABOUT, model)
    text.unlink()
    (model / "data" / "weights").unlink()

    kept, folder = (spool.path_of(entry) for entry in spool.entries)

    assert kept is not None
    assert folder is not None
    assert (kept.name, kept.read_text(encoding="utf-8")) == ("note.txt", "é")
    assert (folder / "data" / "weights").read_bytes() == b"\x00\x01"


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_an_entry_that_a_kill_cut_short_is_left_out_and_written_over(
    spool: Spool, cut: int
) -> None:
    spool.add(metrics(1), ABOUT)
    spool.add(metrics(2), ABOUT)
    journal = spool.folder / "journal.jsonl"
    os.truncate(journal, journal.stat().st_size - cut)

    left = spool.entries
    spool.add(metrics(3), ABOUT)

    assert left == [metrics(1)]
    assert spool.entries == [metrics(1), metrics(3)]


def test_what_was_told_is_forgotten_and_the_folder_with_the_last_of_it(spool: Spool) -> None:
    for step in range(1, 4):
        spool.add(metrics(step), ABOUT)

    spool.keep(spool.entries[2:])
    kept = spool.entries
    spool.keep([])

    assert kept == [metrics(3)]
    assert spool.is_empty
    assert not spool.folder.exists()


def add_and_end(folder: Path) -> None:
    Spool(folder=folder).add(metrics(1), ABOUT)


def test_a_spool_is_left_once_the_process_that_added_to_it_is_gone(spool: Spool) -> None:
    spool.add(metrics(1), ABOUT)
    mine = spool.is_left

    process = multiprocessing.get_context("spawn").Process(target=add_and_end, args=(spool.folder,))
    process.start()
    process.join()

    assert not mine
    assert spool.is_left
    assert len(spool.entries) == 2


# --- owners ------------------------------------------------------------------------------


def test_a_process_that_runs_lives_and_one_that_ended_does_not() -> None:
    host = me().split(" ")[0]
    beyond = int(Path("/proc/sys/kernel/pid_max").read_text(encoding="ascii")) + 1

    assert lives(me()) is True
    assert lives(f"{host} {beyond} 1 {me().split(' ')[3]}") is False


def test_another_process_of_the_same_number_is_not_the_owner() -> None:
    host, pid, start, boot = me().split(" ")

    assert lives(f"{host} {pid} {int(start) + 3600} {boot}") is False
    assert lives(f"{host} {pid} {start} another-start-of-the-machine") is False


@pytest.mark.parametrize("owner", ["", "nonsense", "elsewhere.example 1 1 x", "a b c d"])
def test_of_another_machine_or_an_older_version_nothing_is_known(owner: str) -> None:
    assert lives(owner) is None


def test_a_process_that_nobody_has_waited_for_is_gone(tmp_path: Path) -> None:
    read, write = os.pipe()
    child = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", "read line"],
        {},
        file_actions=[
            (os.POSIX_SPAWN_DUP2, read, 0),
        ],
    )
    host = me().split(" ")[0]
    owner = f"{host} {child} {start_of(psutil.Process(child))} {me().split(' ')[3]}"
    alive = lives(owner)
    os.write(write, b"\n")
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        pass
    gone = lives(owner)
    os.waitpid(child, 0)
    os.close(read)
    os.close(write)

    assert (alive, gone) == (True, False)


def test_the_journal_is_text_that_people_can_read(spool: Spool) -> None:
    spool.add({"kind": "tags", "tags": {"error": "a\nb"}}, ABOUT)

    (line,) = (spool.folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"kind": "tags", "tags": {"error": "a\nb"}}
