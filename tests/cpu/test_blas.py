"""MLX's matrix products really go to OpenBLAS, are right, and every way in which that cannot be has its reason."""

import ctypes
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

from tq.cpu import blas

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux needs it")
ROW_MAJOR, COLUMN_MAJOR, NO_TRANS, TRANS = 101, 102, 111, 112
SHAPES = [(1, 1, 1), (1, 7, 5), (1, 300, 257), (2, 3, 4), (5, 1, 9), (33, 65, 17), (128, 64, 1), (1, 1, 64)]


@pytest.fixture
def library():
    return blas._load(blas._build())


def fresh(code, **environment):
    """What `code` prints in a new process, where nothing is imported yet."""
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STATE = "from tq.cpu import blas; state = blas.enable(); print(state.active, state.reason, sep='|')"
MULTIPLY = "; import mlx.core as mx; a = mx.ones((3, 3)); print((a @ a).tolist()[0][0], blas.calls())"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
def test_mlx_agrees_with_float64(shape, transposed):
    m, n, k = shape
    rng = np.random.default_rng(m * 1000 + n)
    a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    x = mx.array(a.T).T if transposed[0] else mx.array(a)
    y = mx.array(b.T).T if transposed[1] else mx.array(b)
    before = blas.calls()
    found = np.array(x.astype(mx.float32) @ y.astype(mx.float32))
    assert blas.calls() > before
    np.testing.assert_allclose(found, a @ b, rtol=0, atol=1e-5 * np.sqrt(k))


@pytest.mark.parametrize("batch", [(3,), (2, 5)])
def test_batches_agree_with_float64(batch):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((*batch, 1, 9)), rng.standard_normal((9, 11))
    found = np.array(mx.array(a.astype(np.float32)) @ mx.array(b.astype(np.float32)))
    np.testing.assert_allclose(found, a @ b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", [ROW_MAJOR, COLUMN_MAJOR])
@pytest.mark.parametrize("trans_a", [NO_TRANS, TRANS])
@pytest.mark.parametrize("trans_b", [NO_TRANS, TRANS])
@pytest.mark.parametrize("precision", ["s", "d"])
@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 1, 4), (4, 1, 3), (6, 5, 3)])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.5, 2.0)])
def test_every_layout_with_padded_rows(library, order, trans_a, trans_b, precision, shape, alpha, beta):
    """The C interface itself, with leading dimensions larger than the matrices."""
    m, n, k = shape
    dtype, real = {"s": (np.float32, ctypes.c_float), "d": (np.float64, ctypes.c_double)}[precision]
    rng = np.random.default_rng(5)

    def stored(rows, columns, transpose):
        """A matrix (rows, columns), and how its possibly transposed self lies in padded memory."""
        matrix = rng.standard_normal((rows, columns)).astype(dtype)
        memory = matrix.T if transpose else matrix
        memory = memory if order == ROW_MAJOR else memory.T
        padded = np.full((memory.shape[0], memory.shape[1] + 3), np.nan, dtype)
        padded[:, : memory.shape[1]] = memory
        return matrix, padded

    a, a_memory = stored(m, k, trans_a == TRANS)
    b, b_memory = stored(k, n, trans_b == TRANS)
    c, c_memory = stored(m, n, False)
    expected = alpha * (a.astype(np.float64) @ b) + (beta * c if beta else 0)
    if beta == 0:
        c_memory[:] = np.nan  # beta = 0 must not read the output
    function = getattr(library, f"cblas_{precision}gemm")
    function.argtypes = [ctypes.c_int] * 6 + [real, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    function.argtypes += [real, ctypes.c_void_p, ctypes.c_int]
    function(
        order, trans_a, trans_b, m, n, k,
        alpha, a_memory.ctypes.data, a_memory.shape[1], b_memory.ctypes.data, b_memory.shape[1],
        beta, c_memory.ctypes.data, c_memory.shape[1],
    )  # fmt: skip
    found = c_memory[:, :-3] if order == ROW_MAJOR else c_memory[:, :-3].T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    if beta:
        assert np.isnan(c_memory[:, -3:]).all()  # the padding is not touched


def test_enable_is_idempotent_and_says_what_it_did():
    assert blas.enable() is blas.enable()
    assert blas.enable().active
    assert blas.enable().reason.startswith("OpenBLAS from NumPy's wheel, ")


POOL = """
import ctypes, threading
import numpy as np
from tq.cpu import blas
assert blas.enable().active
import mlx.core as mx
library = blas._load(blas._build())

def product(m, n, k, trans_a, trans_b, seed):
    # Through ctypes, which lets go of the interpreter: products of several callers really meet in the pool.
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    x = np.ascontiguousarray((a.T if trans_a else a).astype(np.float32))
    y = np.ascontiguousarray((b.T if trans_b else b).astype(np.float32))
    c = np.full((m, n), np.nan, np.float32)
    pointer = ctypes.c_void_p
    library.cblas_sgemm(
        101, 112 if trans_a else 111, 112 if trans_b else 111, m, n, k, ctypes.c_float(1),
        pointer(x.ctypes.data), x.shape[1], pointer(y.ctypes.data), y.shape[1],
        ctypes.c_float(0), pointer(c.ctypes.data), n,
    )
    return np.abs(c - a @ b).max() / np.sqrt(k)

SHAPES = [(1, 3001, 700), (2, 1999, 401), (517, 65, 300), (65, 517, 300), (128, 128, 128), (1027, 1, 1100)]
SHAPES.append((300, 301, 302))
worst = []

def caller(seed):
    for shape in SHAPES:
        for trans in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            worst.append(product(*shape, *trans, seed))

callers = [threading.Thread(target=caller, args=(seed,)) for seed in range(3)]
[t.start() for t in callers]
[t.join() for t in callers]
print(len(worst), max(worst) < 1e-5)
a = np.ones((600, 600))
print((a @ a == 600).all())
"""


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_products_cut_into_parts_agree_with_float64_from_several_callers_at_once(threads):
    assert fresh(POOL, TQ_THREADS=threads).split() == ["84", "True", "True"]


def test_a_second_process_uses_the_cached_library_without_a_compiler_run(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    assert fresh(STATE + MULTIPLY, **cache).splitlines()[1] == "3.0 1"
    (built,) = tmp_path.glob("tq/native/*.so")
    made = built.stat().st_mtime_ns
    assert fresh(STATE, **cache).startswith("True|")
    assert [path.stat().st_mtime_ns for path in tmp_path.glob("tq/native/*.so")] == [made]
    assert list(tmp_path.glob("tq/native/tmp*")) == []


def test_threads_follow_tq_threads_and_affinity():
    assert fresh(STATE, TQ_THREADS="1").endswith(", 1 thread")
    assert fresh(STATE, TQ_THREADS="3").endswith(", 3 threads")
    one_core = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); " + STATE
    assert fresh(one_core, TQ_THREADS="").endswith(", 1 thread")


@pytest.mark.parametrize(
    ("setup", "environment", "reason"),
    [
        ("", {"TQ_BLAS": "off"}, "switched off by TQ_BLAS=off"),
        ("", {"PATH": ""}, "no C compiler (cc, gcc or clang) was found"),
        ("", {"CC": "false"}, "false failed: no message"),
        ("", {"XDG_CACHE_HOME": "/dev/null"}, "the cache cannot be written"),
        ("import mlx.core; ", {}, "mlx was imported before"),
        # A user without a home, as in a container with an arbitrary user id.
        (
            "import pathlib; pathlib.Path.home = lambda: (_ for _ in ()).throw(RuntimeError()); ",
            {"XDG_CACHE_HOME": ""},
            "there is no cache folder: this user has no home folder",
        ),
        ("import sys; sys.modules['numpy'] = None; ", {}, "NumPy is not installed"),
        (
            "import importlib.util as u, types; u.find_spec = lambda n: types.SimpleNamespace(origin='/usr/x/y'); ",
            {},
            "this NumPy does not bring its own OpenBLAS",
        ),
    ],
)
def test_every_way_to_fail_leaves_plain_mlx_and_a_reason(setup, environment, reason):
    # A fresh cache, so that nothing built before hides a missing compiler.
    environment = {"XDG_CACHE_HOME": os.path.join(os.environ["HOME"], "empty"), **environment}
    state, product = fresh(setup + STATE + MULTIPLY, **environment).splitlines()
    active, said = state.split("|")
    assert active == "False"
    assert reason in said
    assert product == "3.0 0"


def test_a_library_that_cannot_be_loaded_is_a_reason(tmp_path):
    """As in a cache on a file system mounted noexec."""
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    fresh(STATE, **environment)
    (built,) = tmp_path.glob("tq/native/*.so")
    built.write_bytes(b"not a library")
    assert fresh(STATE, **environment).startswith("False|the built library cannot be loaded")


def test_a_wrong_number_of_threads_is_a_mistake_of_the_user(monkeypatch):
    code = "from tq.cpu import blas\ntry: blas.enable()\nexcept Exception as e: print(type(e).__name__, e)"
    assert fresh(code, TQ_THREADS="many") == "UsageError TQ_THREADS is 'many': it must be a positive number"
