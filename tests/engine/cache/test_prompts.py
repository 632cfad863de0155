"""Stored prompts are found, exact, within their budget, and survive damage, crashes and other processes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache
from tiny_models import build

from tq.engine.cache import prompts
from tq.engine.cache.convert import convert_cache
from tq.engine.cache.prompts import PromptCache, common_prefix
from tq.engine.cache.settings import KVSettings
from tq.engine.cache.state import capture, leaves, restore
from tq.errors import TQError

ROOT = Path(__file__).parents[3]
KEY = "0123456789abcdef" * 4


@pytest.fixture
def store(tmp_path):
    return PromptCache(tmp_path / "prompts", 10**9, KEY)


def filled(tokens, layers=1, trimmable=True):
    """Caches whose keys are the token ids."""
    made = [KVCache() for _ in range(layers)]
    for cache in made:
        vectors = mx.broadcast_to(mx.array(tokens, mx.float32)[None, None, :, None], (1, 2, len(tokens), 8))
        cache.update_and_fetch(vectors, -vectors)
    if not trimmable:
        made.append(ArraysCache(2))
        made[-1][1] = mx.array([[float(sum(tokens))]])
    return made


def empty(layers=1, trimmable=True):
    return [KVCache() for _ in range(layers)] + ([] if trimmable else [ArraysCache(2)])


def files(store):
    return sorted(path for path in store.folder.iterdir() if path.suffix == ".safetensors")


TALK = list(range(1000, 1200))


def test_what_was_stored_is_found(store):
    assert store.save(TALK, filled(TALK, layers=3))
    tokens, caches = store.load([*TALK, 5], lambda: empty(3))
    assert tokens == TALK
    for cache in caches:
        keys, values = cache.keys_and_values()
        np.testing.assert_array_equal(keys[0, 1, :, 7], np.array(TALK, np.float32))
        np.testing.assert_array_equal(values[0, 0, :, 0], -np.array(TALK, np.float32))
        assert cache.offset == len(TALK)
    assert store.take_notes() == []


def test_the_longest_common_beginning_wins_and_then_the_smaller_file(store):
    store.save(TALK[:70], filled(TALK[:70]))
    store.save(TALK[:100] + [1] * 50, filled(TALK[:100] + [1] * 50))
    store.save(TALK[:100] + [2] * 30, filled(TALK[:100] + [2] * 30))
    assert store.load([*TALK, 5], empty)[0] == TALK[:100] + [2] * 30
    assert store.load([*TALK[:80], 5], empty)[0][:70] == TALK[:70]
    assert store.load([*TALK[:70], 5], empty)[0] == TALK[:70]  # all three have as much
    assert store.load([7, *TALK], empty) is None


def test_a_few_common_tokens_are_not_worth_a_large_file(store):
    long = list(range(2000))
    store.save(long, filled(long))
    assert store.load([*long[:249], 5, 6], empty) is None
    assert store.load([*long[:250], 5, 6], empty)[0] == long


def test_what_is_held_already_is_not_loaded(store):
    store.save(TALK, filled(TALK))
    assert store.load([*TALK, 5], empty, more_than=200) is None
    assert store.load([*TALK, 5], empty, more_than=199)[0] == TALK


def test_caches_that_cannot_be_trimmed_only_match_whole(store):
    store.save(TALK, filled(TALK, trimmable=False))
    assert store.load([*TALK[:199], 5, 6], lambda: empty(trimmable=False)) is None
    assert store.load(TALK, lambda: empty(trimmable=False)) is None  # the last token must be read
    tokens, caches = store.load([*TALK, 5], lambda: empty(trimmable=False))
    assert (tokens, caches[1][0], caches[1][1].item()) == (TALK, None, sum(TALK))


def test_short_prompts_are_not_stored(store):
    assert not store.save(TALK[: prompts.LEAST_TOKENS - 1], filled(TALK[: prompts.LEAST_TOKENS - 1]))
    assert not store.folder.exists()


def test_other_keys_find_nothing(store):
    store.save(TALK, filled(TALK))
    assert PromptCache(store.folder, 10**9, "f" * 64).load([*TALK, 5], empty) is None


def test_saving_again_writes_nothing(store):
    store.save(TALK, filled(TALK))
    before = files(store)[0].stat()
    assert store.save(TALK, filled(TALK))
    after = files(store)[0].stat()
    assert (before.st_ino, len(files(store))) == (after.st_ino, 1)
    assert after.st_mtime_ns > before.st_mtime_ns


def test_caches_of_other_classes_are_not_filled(store):
    store.save(TALK, filled(TALK))
    assert store.load([*TALK, 5], lambda: [RotatingKVCache(64)]) is None
    assert any("RotatingKVCache" in note for note in store.take_notes())
    assert len(files(store)) == 1


def test_room_for_more_tokens_is_not_stored(store):
    store.save(TALK, filled(TALK))
    assert files(store)[0].stat().st_size < 2 * 2 * 8 * 4 * len(TALK) + 4 * len(TALK) + 2000


# --- every kind of cache, by what the model says next ---

KINDS = [
    "llama",
    "gemma3_text",
    "deepseek_v3",
    "qwen3_next",
    "mamba2",
    "recurrent_gemma",
    "falcon_h1",
    "rwkv7",
    "llama4",
]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_goes_on_as_if_it_had_read_the_prompt(store, kind, packed):
    model = build(kind)

    def make():
        caches = make_prompt_cache(model)
        return convert_cache(caches, KVSettings(8, 4, sink=5), model) if packed else caches

    try:
        caches = make()
    except TQError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 160, 210).tolist()
    model(mx.array([tokens]), cache=caches)
    assert store.save(tokens, caches), store.take_notes()
    held, loaded = store.load([*tokens, 1], make)
    assert held == tokens
    for token in (3, 99, 7):
        expected, got = (model(mx.array([[token]]), cache=c) for c in (caches, loaded))
        np.testing.assert_array_equal(np.array(got), np.array(expected))


def test_a_captured_state_does_not_follow_the_cache():
    rotating, arrays = RotatingKVCache(4), ArraysCache(1)
    vectors = mx.random.normal((1, 1, 6, 8))
    rotating.update_and_fetch(vectors, vectors)
    arrays[0] = mx.ones((1, 3))
    state = capture([rotating, arrays])
    keys = np.array(rotating.keys)
    for _ in range(5):  # each overwrites a place in the ring
        rotating.update_and_fetch(vectors[:, :, :1], vectors[:, :, :1])
    arrays[0] += 1
    for _ in range(2):
        again = [RotatingKVCache(4), ArraysCache(1)]
        restore(state, again)
        np.testing.assert_array_equal(again[0].keys, keys)
        assert again[0].offset == 6 and again[1][0].tolist() == [[1, 1, 1]]
        again[0].update_and_fetch(vectors[:, :, :1], vectors[:, :, :1])
        again[1].cache[0] = None


def test_layers_with_several_caches_count_as_these():
    inner = filled(TALK, layers=2)
    assert leaves([CacheList(inner[0], CacheList(inner[1])), *filled(TALK)])[:2] == inner


def test_a_cache_without_a_state_to_set_is_not_stored(store):
    class Closed:
        state = property(lambda self: [])

        def is_trimmable(self):
            return False

    assert not store.save(TALK, [Closed()])


# --- budget ---


def test_what_was_used_longest_ago_makes_room(store):
    talks = [list(range(n, n + 100)) for n in range(0, 500, 100)]
    store.save(talks[0], filled(talks[0]))
    size = files(store)[0].stat().st_size
    store.budget_bytes = 3 * size + size // 2
    for talk in talks[1:3]:
        store.save(talk, filled(talk))
    for n, path in enumerate(sorted(files(store), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, ns=(n + 1, n + 1))
    assert store.load([*talks[0], 5], empty) is not None  # the oldest is used
    store.save(talks[3], filled(talks[3]))
    store.save(talks[4], filled(talks[4]))
    found = [store.load([*talk, 5], empty) is not None for talk in talks]
    assert found == [True, False, False, True, True]
    assert sum(path.stat().st_size for path in files(store)) <= store.budget_bytes


def test_what_is_larger_than_the_budget_pushes_nothing_out(store):
    store.save(TALK, filled(TALK))
    store.budget_bytes = files(store)[0].stat().st_size
    long = list(range(1000))
    assert not store.save(long, filled(long))
    assert len(files(store)) == 1
    assert len(store.take_notes()) == 1 and store.take_notes() == []


def test_the_budget_is_that_of_all_models(store):
    store.save(TALK, filled(TALK))
    other = PromptCache(store.folder, files(store)[0].stat().st_size, "f" * 64)
    other.save(TALK, filled(TALK))
    assert [path.name[:4] for path in files(store)] == ["ffff"]


# --- damage, and what is not ours ---


def bytes_to_spoil(path):
    size = path.stat().st_size
    return [0, 3, 9, 200, size // 2, size - 1]


@pytest.mark.parametrize("which", range(6))
def test_a_flipped_bit_is_found_and_the_file_dropped(store, which):
    store.save(TALK, filled(TALK))
    store.save(TALK[:90], filled(TALK[:90]))
    path = max(files(store), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[bytes_to_spoil(path)[which]] ^= 4
    path.write_bytes(content)
    assert store.load([*TALK, 5], empty)[0] == TALK[:90]
    assert not path.exists()
    assert len(store.take_notes()) == 1


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_dropped(store, keep):
    store.save(TALK, filled(TALK))
    path = files(store)[0]
    path.write_bytes(path.read_bytes()[:keep])
    assert store.load([*TALK, 5], empty) is None
    assert not path.exists()
    assert store.save(TALK, filled(TALK)) and store.load([*TALK, 5], empty)[0] == TALK


def test_files_of_another_version_are_dropped(store, monkeypatch):
    monkeypatch.setattr(prompts, "VERSION", 99)
    store.save(TALK, filled(TALK))
    old = files(store)[0]
    monkeypatch.undo()
    assert store.load([*TALK, 5], empty) is None
    assert not old.exists()


def test_a_file_of_another_name_is_never_touched(store):
    store.save(TALK, filled(TALK))
    ours = files(store)[0]
    copy = ours.read_bytes()
    foreign = {
        "notes.txt": b"mine",
        "model.safetensors": b"weights",
        f"backup-{ours.name}": copy,
        f"{ours.name}.bak": copy,
        f"{ours.stem}0.safetensors": copy,
        "0123456789abcdef.partial": b"x",
    }
    for name, content in foreign.items():
        (store.folder / name).write_bytes(content)
    target = store.folder.parent / "elsewhere"
    target.write_bytes(b"damaged")
    link = store.folder / "0123456789abcdef-0123456789abcdef-01234567.safetensors"
    link.symlink_to(target)
    folder = store.folder / "0123456789abcdef-1123456789abcdef-01234567.safetensors"
    folder.mkdir()
    store.budget_bytes = ours.stat().st_size + 10
    for n in range(3):  # each pushes the one before out
        talk = [n, *TALK]
        store.load(talk, empty)
        store.save(talk[:200], filled(talk[:200]))
    assert not ours.exists()
    assert {name: (store.folder / name).read_bytes() for name in foreign} == foreign
    assert link.is_symlink() and target.read_bytes() == b"damaged" and folder.is_dir()


def test_a_folder_that_cannot_be_made_is_one_note(tmp_path):
    (tmp_path / "file").write_text("")
    store = PromptCache(tmp_path / "file" / "prompts", 10**9, KEY)
    assert store.load(TALK, empty) is None
    assert not store.save(TALK, filled(TALK)) and not store.save(TALK, filled(TALK))
    assert len(store.take_notes()) == 1


def test_a_read_only_folder_still_serves(store, tmp_path):
    """As another user: root may write everywhere."""
    store.save(TALK, filled(TALK))
    store.folder.chmod(0o555)
    for path in files(store):
        path.chmod(0o444)
    code = (
        "import os; import mlx.core as mx; from mlx_lm.models.cache import KVCache\n"
        "from tq.engine.cache.prompts import PromptCache; from pathlib import Path\n"
        f"store = PromptCache(Path({str(store.folder)!r}), 10**9, {KEY!r})\n"
        "if os.geteuid() == 0:\n"
        "    for up in list(store.folder.parents)[:-2]: os.chmod(up, 0o755)\n"
        "    os.setuid(65534)\n"
        f"tokens, caches = store.load([*{TALK!r}, 5], lambda: [KVCache()])\n"
        f"assert tokens == {TALK!r} and caches[0].offset == 200\n"
        "mx.eval(caches[0].state); caches[0].trim(1)\n"
        f"assert not store.save(tokens[:-1], caches)\n"
        "print(store.take_notes())"
    )
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "read-only" in done.stdout


def test_a_full_disk_is_a_note_and_leaves_nothing(store, monkeypatch):
    def full(*_):
        raise TQError("the disk is full: X cannot be written")

    store.folder.mkdir()
    monkeypatch.setattr(prompts.ShardWriter, "append", full)
    assert not store.save(TALK, filled(TALK))
    assert store.take_notes() == ["the prompt cache is not kept: the disk is full: X cannot be written"]
    assert [path.name for path in store.folder.iterdir()] == [".lock"]


# --- other processes ---


def run(code, folder, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def saver(folder, before=""):
    return (
        "import os, signal; import mlx.core as mx; from mlx_lm.models.cache import KVCache\n"
        "from tq.engine.cache import prompts; from pathlib import Path\n"
        f"store = prompts.PromptCache(Path({str(folder)!r}), 10**9, {KEY!r})\n"
        "caches = [KVCache() for _ in range(4)]\n"
        "for cache in caches: cache.update_and_fetch(mx.ones((1, 2, 200, 8)), mx.ones((1, 2, 200, 8)))\n"
        f"{before}\n"
        f"store.save({TALK!r}, caches)\n"
    )


@pytest.mark.parametrize("written", [0, 9])
def test_kill_in_the_middle_of_a_save(store, tmp_path, written):
    before = (
        "append = prompts.ShardWriter.append\n"
        "def die(writer, name, array):\n"
        f"    if writer.finished == {written}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return append(writer, name, array)\n"
        "prompts.ShardWriter.append = die\n"
        "rename = Path.rename\n"
        "Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert run(saver(store.folder, before), tmp_path).returncode == -signal.SIGKILL
    assert [path.suffix for path in store.folder.iterdir() if path.name != ".lock"] == [".partial"]
    assert store.load([*TALK, 5], lambda: empty(4)) is None
    other = list(range(100))
    assert store.save(other, filled(other))  # the lock has died with its process
    assert {path.suffix for path in store.folder.iterdir() if path.name != ".lock"} == {".safetensors"}
    assert run(saver(store.folder), tmp_path).returncode == 0
    assert store.load([*TALK, 5], lambda: empty(4))[0] == TALK
    assert store.take_notes() == []


def test_processes_that_save_and_load_at_once(store, tmp_path):
    talks = [[n, *TALK] for n in range(6)]
    store.save(talks[0], filled(talks[0]))
    store.budget_bytes = int(3.5 * files(store)[0].stat().st_size)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_prompts import *\n"
        f"store = PromptCache(Path({str(store.folder)!r}), {store.budget_bytes}, KEY)\n"
        "seed = int(sys.argv[2])\n"
        "for n in range(12):\n"
        "    talk = [(seed * 7 + n * 5) % 6, *TALK]\n"
        "    found = store.load([*talk, 5], empty)\n"
        "    if found: assert found[1][0].keys[0, 0, :, 0].tolist() == found[0] == talk\n"
        "    assert store.save(talk, filled(talk))\n"
        "assert store.take_notes() == [], store.take_notes()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(seed)],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for seed in range(3)
    ]  # fmt: skip
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert sum(path.stat().st_size for path in files(store)) <= store.budget_bytes
    assert len(files(store)) == 3
    for path in files(store):
        assert prompts._checksum(path, prompts.read_headers(path)[0]) == path.stem[-8:]


def test_a_writer_waits_for_another_one_but_not_for_ever(store, monkeypatch):
    monkeypatch.setattr(prompts, "LOCK_SECONDS", 0.2)
    store.folder.mkdir()
    with store._lock():
        waiting = threading.Thread(target=store.save, args=(TALK, []))
        waiting.start()
        waiting.join()
    assert store.take_notes() == ["the prompt cache is not kept: another process has been writing to it for long"]


def test_common_beginning():
    assert [common_prefix(*pair) for pair in [([], [1]), ([1, 2], [1, 2, 3]), ([1, 9, 3], [1, 2, 3]), ([4], [5])]] == [
        0,
        2,
        1,
        0,
    ]
