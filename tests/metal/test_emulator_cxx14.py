"""What came into C++ with C++17 is told: Metal 3 is C++14."""

import numpy as np
import pytest
from metal.emulator import Kernel

pytestmark = pytest.mark.usefixtures("emulator")


@pytest.mark.parametrize(
    "header",
    [
        "int f(int x) { if constexpr (true) { return x; } return 0; }",
        "template <typename T> struct P { T x; P(T v) : x(v) {} };\ninline int f() { return P(3).x; }",
        "template <typename... T> int f(T... x) { return (0 + ... + x); }",
        "inline constant constexpr int N = 3;",
        "struct P { int x, y; };\ninline int f() { P p = {1, 2}; auto [a, b] = p; return a + b; }",
        "namespace a::b { int f() { return 1; } }",
    ],
)
def test_what_is_newer_is_told(header):
    kernel = Kernel("k", ["a"], ["o"], "o[0] = a[0];", header=header + "\n")
    found = kernel.typecheck([np.zeros(9, np.float32)], ["float32"])
    assert any("k.header:" in line and "before C++17" in line for line in found), found
