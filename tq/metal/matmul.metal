// y = x W^T for many rows of x: each threadgroup computes a tile of y.
#include "tile.metal"

// body
    threadgroup float table[TABLE];
    threadgroup typename Staged<T>::four staged_x[BM * TILE_STRIDE / 4];
    threadgroup typename Staged<T>::weights staged_w[BN * TILE_STRIDE / 4];
    const uint thread_index = thread_index_in_threadgroup;
    const Levels decoder = read_levels<FORM>(levels, TABLE, table, thread_index, TILE_THREADS);
    // Neighbouring threadgroups read the same rows of W.
    const uint row = threadgroup_position_in_grid.x * BM, first = threadgroup_position_in_grid.y * BN;
    const MatrixShape shape = {uint(w_shape[0]), uint(x_shape[1]), uint(w_shape[1]), uint(scales_shape[1])};
    multiply_tile<T, BITS, GROUP, FORM, WHOLE, BM, BN, BIAS>(
        x + size_t(row) * shape.columns, min(uint(BM), uint(x_shape[0]) - row), w, scales, shape, decoder, first, bias,
        y + size_t(row) * shape.rows, thread_index, staged_x, staged_w);
