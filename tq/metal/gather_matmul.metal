// y[p] = W[e] x[p] for many pairs p, best sorted by their expert e: each threadgroup computes a tile of y.
//
// A tile of BM rows is multiplied with one expert after the other, those of each run of equal numbers: sorted, that is
// one for most tiles, and any order is correct.
#include "tile.metal"

// body
    threadgroup float table[TABLE];
    threadgroup typename Staged<T>::four staged_x[BM * TILE_STRIDE / 4];
    threadgroup typename Staged<T>::weights staged_w[BN * TILE_STRIDE / 4];
    const uint thread_index = thread_index_in_threadgroup;
    const Levels decoder = read_levels<FORM>(levels, TABLE, table, thread_index, TILE_THREADS);
    const uint end = min((threadgroup_position_in_grid.x + 1) * BM, uint(x_shape[0]));
    const uint first = threadgroup_position_in_grid.y * BN;
    const MatrixShape shape = {uint(w_shape[1]), uint(x_shape[1]), uint(w_shape[2]), uint(scales_shape[2])};
    uint start = threadgroup_position_in_grid.x * BM;
    while (start < end) {
        const uint number = experts[start];
        uint next = end;
        for (uint at = start + thread_index_in_simdgroup; at < end; at += 32) {
            if (experts[at] != number) {
                next = at;
                break;
            }
        }
        next = simd_min(next);
        const size_t row = size_t(SLOTS ? slots[number] : number) * shape.rows;
        multiply_tile<T, BITS, GROUP, FORM, WHOLE, BM, BN, BIAS>(
            x + size_t(start) * shape.columns, next - start, w + row * shape.words, scales + row * shape.groups, shape,
            decoder, first, bias + (BIAS ? row : 0), y + size_t(start) * shape.rows, thread_index, staged_x,
            staged_w);
        start = next;
    }
