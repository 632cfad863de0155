"""float32 matrix products of MLX on Linux, as its wheel comes and through the BLAS bridge, in one run side by side.

python benchmarks/blas.py
"""

import json
import os
import subprocess
import sys
import time

from common import write

SHAPES = ((1, 576, 1536), (34, 576, 1536), (512, 576, 1536), (1, 4096, 4096), (32, 4096, 4096), (512, 2048, 2048))
SECONDS = 1.0


def measure() -> dict:
    """GFLOP/s of x @ w.T for each shape (rows, in, out), in this process."""
    from tq.cpu import blas

    state = blas.enable()
    import mlx.core as mx

    found = {}
    for rows, n, out in SHAPES:
        x, w = mx.random.normal((rows, n)), mx.random.normal((out, n))
        mx.eval(x, w, x @ w.T)
        times: list[float] = []
        while sum(times) < SECONDS or len(times) < 3:
            started = time.perf_counter()
            mx.eval(x @ w.T)
            times.append(time.perf_counter() - started)
        work = 2 * rows * n * out / 1e9
        best, median = min(times), sorted(times)[len(times) // 2]
        found[f"{rows} x {n} x {out}"] = {"best": round(work / best, 2), "median": round(work / median, 2)}
    return {"state": state.reason, "gflops": found}


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(measure()))
        return
    results = {}
    for name, setting in (("mlx as it comes", "off"), ("through tq", "")):
        done = subprocess.run(
            [sys.executable, __file__, "--one"],
            env={**os.environ, "TQ_BLAS": setting},
            stdout=subprocess.PIPE,
            check=True,
        )
        results[name] = json.loads(done.stdout)
    plain, ours = (results[name]["gflops"] for name in results)
    ratios = {shape: round(ours[shape]["median"] / plain[shape]["median"], 1) for shape in ours}
    write("blas", {**results, "ratio_of_medians": ratios})
    print(ratios)


if __name__ == "__main__":
    main()
