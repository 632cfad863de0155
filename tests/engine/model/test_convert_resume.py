"""An interrupted conversion goes on to the same bytes, wherever it stopped and whatever became of its files."""

import errno
import os
import shutil
import subprocess

import pytest
from engine.model.conversions import OPTIONS, content, n_tensors, plan_of, run, stop

from tq.engine.events import Note, Progress
from tq.engine.model import convert as convert_module
from tq.engine.model import encoding
from tq.engine.model import plan as plan_module
from tq.engine.model.convert import convert
from tq.engine.model.journal import NAME, Journal
from tq.engine.model.safetensors import plan_shards
from tq.engine.model.unfinished import partial_folder
from tq.errors import TQError


@pytest.fixture(params=["one shard", "many shards"])
def shards(request, monkeypatch):
    """A result in one file, and in about ten."""
    if request.param == "many shards":
        monkeypatch.setattr(plan_module, "plan_shards", lambda tensors: plan_shards(tensors, 20_000))
    return request.param


@pytest.fixture
def whole(source, tmp_path, shards):
    """What an uninterrupted run writes."""
    run(source, tmp_path / "whole")
    files = content(tmp_path / "whole")
    assert (len([name for name in files if name.endswith(".safetensors")]) > 5) == (shards == "many shards")
    return files


# --- going on ---


def test_it_goes_on_from_every_tensor(source, tmp_path, whole):
    for n in range(n_tensors(source) + 1):
        out = tmp_path / f"out{n}"
        stop(source, out, n)
        events = run(source, out)
        notes = [event.message for event in events if isinstance(event, Note)]
        assert notes == ([f"resuming: {n} of {n_tensors(source)} tensors are done"] if n else [])
        assert content(out) == whole, n
        shutil.rmtree(out)


def test_it_goes_on_when_it_is_interrupted_again_and_again(source, tmp_path, whole):
    for n in range(n_tensors(source)):
        stop(source, tmp_path / "out", 1 if n else 0)
    run(source, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def unfinished(folder):
    """The shard that was being written: the last one."""
    return max(folder.glob("*.safetensors"))


def cut(n_bytes):
    def damage(folder):
        path = unfinished(folder)
        os.truncate(path, max(0, path.stat().st_size - n_bytes))

    return damage


def flip(offset):
    """Other bytes in the unfinished shard, as a power cut may leave them."""

    def damage(folder):
        path = unfinished(folder)
        data = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        if len(data) > start + offset:
            data[start + offset] ^= 0xFF
            path.write_bytes(data)

    return damage


def append_garbage(folder):
    with unfinished(folder).open("ab") as file:
        file.write(b"\0" * 1000)


def damaged_header(folder):
    path = unfinished(folder)
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def delete_first(folder):
    min(folder.glob("*.safetensors")).unlink()


def shorten_first(folder):
    path = min(folder.glob("*.safetensors"))
    os.truncate(path, path.stat().st_size - 1)


def cut_journal(n_bytes):
    return lambda folder: os.truncate(folder / NAME, max(0, (folder / NAME).stat().st_size - n_bytes))


def append_to_journal(data):
    def damage(folder):
        with (folder / NAME).open("ab") as file:
            file.write(data)

    return damage


def garbage_in_journal(folder):
    lines = (folder / NAME).read_bytes().splitlines(keepends=True)
    lines[len(lines) // 2] = b"\0" * len(lines[len(lines) // 2])
    (folder / NAME).write_bytes(b"".join(lines))


DAMAGES = {
    "end of shard cut by 1": cut(1),
    "end of shard cut by 700": cut(700),
    "shard emptied": cut(1 << 40),
    "first byte of shard": flip(0),
    "later byte of shard": flip(600),
    "bytes after the end": append_garbage,
    "header of shard": damaged_header,
    "shard deleted": lambda folder: unfinished(folder).unlink(),
    "all shards deleted": lambda folder: [path.unlink() for path in folder.glob("*.safetensors")],
    "first shard deleted": delete_first,
    "first shard shortened": shorten_first,
    "newline of journal": cut_journal(1),
    "last line of journal": cut_journal(9),
    "journal emptied": cut_journal(1 << 40),
    "half a line after the journal": append_to_journal(b'{"crc": 12'),
    "a line of another kind": append_to_journal(b'{"size": 12}\n[3]\n'),
    "journal ahead of the shard": append_to_journal(b'{"crc": 12}\n' * 3),
    "hole in the journal": garbage_in_journal,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_it_goes_on_inside_of_a_tensor_and_from_damage(source, tmp_path, whole, damage):
    for n in (1, 9, n_tensors(source) - 1):
        out = tmp_path / f"out{n}"
        stop(source, out, n)
        damage(partial_folder(out))
        # And once more, from the state that the repair left.
        stop(source, out, 1)
        run(source, out)
        assert content(out) == whole, n


def test_a_journal_cut_anywhere_in_its_first_line_begins_anew(source, tmp_path, whole):
    stop(source, tmp_path / "out", 2)
    partial = partial_folder(tmp_path / "out")
    identity = len((partial / NAME).read_bytes().splitlines(keepends=True)[0])
    for length in range(0, identity, 7):
        os.truncate(partial / NAME, length)
        stop(source, tmp_path / "out", 2)
    run(source, tmp_path / "out")
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_it_goes_on_when_all_tensors_are_done(source, tmp_path, whole, monkeypatch, name):
    """Stopped between the last tensor and the rename."""
    monkeypatch.setattr(convert_module, "_finish", lambda plan, partial: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path / "out")
    monkeypatch.undo()
    (partial_folder(tmp_path / "out") / name).write_text("cut o")
    if len([n for n in whole if n.endswith(".safetensors")]) > 1:
        monkeypatch.setattr(plan_module, "plan_shards", lambda tensors: plan_shards(tensors, 20_000))
    events = run(source, tmp_path / "out")
    assert [event.done for event in events if isinstance(event, Progress)] == [events[-2].total]
    assert events[-1].weights == 0
    assert content(tmp_path / "out") == whole


def test_nothing_is_encoded_twice(source, tmp_path, monkeypatch):
    stop(source, tmp_path / "out", 9)
    done = sum(t.spec is not None for t in plan_of(source).tensors[:9])
    encoded = []
    encode = encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda *a: encoded.append(a[0].shape) or encode(*a))
    run(source, tmp_path / "out")
    assert 0 < len(encoded) == sum(t.spec is not None for t in plan_of(source).tensors) - done


@pytest.mark.parametrize("other", [{"bits": 4}, {"bits": 3}, OPTIONS | {"dtype": "float32"}, {"format": "turboquant"}])
def test_other_settings_are_refused_and_restart_begins_anew(source, tmp_path, other):
    stop(source, tmp_path / "out", 5)
    before = content(partial_folder(tmp_path / "out"))
    with pytest.raises(TQError, match="unfinished conversion with other settings or of another source") as error:
        run(source, tmp_path / "out", **{"bits": 2} | other)
    assert "--restart" in error.value.hint
    assert content(partial_folder(tmp_path / "out")) == before  # still there to be finished
    (partial_folder(tmp_path / "out") / "model-00009-of-00009.safetensors").write_text("of another plan")
    (partial_folder(tmp_path / "out") / "templates").mkdir()
    run(source, tmp_path / "out", restart=True, **{"bits": 2} | other)
    run(source, tmp_path / "whole", **{"bits": 2} | other)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_settings_that_change_no_size_are_other_settings(source, tmp_path):
    """In turboquant's layout, a matrix has signs whether it is rotated or not."""
    stop(source, tmp_path / "out", 5, format="turboquant", bits=3)
    with pytest.raises(TQError, match="unfinished conversion with other settings"):
        run(source, tmp_path / "out", format="turboquant", bits=3, rotation="none")


def test_another_source_is_refused(source, tmp_path, make_checkpoint):
    shutil.copytree(source, tmp_path / "m")
    stop(tmp_path / "m", tmp_path / "out", 5)
    os.utime(tmp_path / "m" / "model.safetensors", ns=(1, 1))
    with pytest.raises(TQError, match="or of another source"):
        run(tmp_path / "m", tmp_path / "out")


def test_restart_without_anything_to_throw_away_is_an_ordinary_run(source, tmp_path):
    run(source, tmp_path / "out", restart=True)
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("restart", [False, True])
def test_two_at_once_are_refused(source, tmp_path, restart):
    events = convert(plan_of(source), tmp_path / "out")
    for _ in range(6):
        next(events)
    before = content(partial_folder(tmp_path / "out"))
    with pytest.raises(TQError, match="another tq convert is writing"):
        run(source, tmp_path / "out", restart=restart)
    assert content(partial_folder(tmp_path / "out")) == before
    list(events)  # the first one is not disturbed
    assert (tmp_path / "out").is_dir()


def test_an_interruption_ends_the_lock(source, tmp_path):
    stop(source, tmp_path / "out", 3)
    Journal(partial_folder(tmp_path / "out"), "other", restart=True).close()


def test_a_journal_keeps_its_whole_lines_and_goes_on_after_them(tmp_path):
    journal = Journal(tmp_path, "work")
    for crc in (10, 200, 3000):
        journal.add(crc)
    journal.close()
    data = (tmp_path / NAME).read_bytes()
    for length in range(len(data) + 1):
        (tmp_path / NAME).write_bytes(data[:length])
        kept = [10, 200, 3000][: max(0, data[:length].count(b"\n") - 1)]
        journal = Journal(tmp_path, "work")
        assert journal.crcs == kept
        journal.add(7)
        journal.close()
        journal = Journal(tmp_path, "work")
        assert journal.crcs == [*kept, 7]
        journal.rewind(1)
        journal.add(8)
        journal.close()
        journal = Journal(tmp_path, "work")
        assert journal.crcs == [[*kept, 7][0], 8]
        journal.close()


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if made.returncode:
        pytest.skip(f"a file system cannot be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder):
    """A file that leaves no byte free."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        with pytest.raises(OSError) as error:
            while True:
                file.write(b"\0" * 4096)
        assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("n", [0, 1, 4, 12, 20])
def test_a_disk_that_fills_up_loses_nothing(source, tmp_path, small_disk, whole, monkeypatch, n):
    """Somebody else takes the space after n tensors; once it is free again, the same command finishes."""
    monkeypatch.setattr(convert_module, "SPARE_BYTES", 0)
    out = small_disk / "out"
    with pytest.raises(TQError) as error:
        for event in convert(plan_of(source), out):
            if isinstance(event, Progress):
                if n == 0:
                    fill(small_disk)
                n -= 1
    assert error.value.message.startswith("the disk is full: ")
    assert error.value.hint == "free some space and run the same command again"
    assert not out.exists()
    (small_disk / "ballast").unlink()
    run(source, out)
    assert content(out) == whole


def test_a_disk_that_fills_up_at_the_end_loses_nothing(source, tmp_path, small_disk, whole, monkeypatch):
    """All tensors are written; there is no room for the model card."""
    monkeypatch.setattr(convert_module, "SPARE_BYTES", 0)
    out = small_disk / "out"
    with pytest.raises(TQError, match="the disk is full: "):
        for event in convert(plan_of(source), out):
            if isinstance(event, Progress) and event.label == "finishing":
                fill(small_disk)
    (small_disk / "ballast").unlink()
    events = run(source, out)
    assert events[-1].weights == 0
    assert content(out) == whole
