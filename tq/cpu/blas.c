/* The matrix products that MLX asks of a BLAS, handed on to the OpenBLAS inside NumPy's wheel.
 *
 * MLX calls cblas_sgemm and cblas_dgemm with 32-bit sizes; NumPy's OpenBLAS has 64-bit sizes and names of its own.
 * Its addresses arrive at run time, so this file links with nothing.
 *
 * OpenBLAS's own threads wait for each other by spinning within one product: with one other busy program on two cores
 * they are ten times slower than a single thread. Here a product is cut into parts that need not wait for each other;
 * threads take parts until none is left, and each part is one single-threaded call.
 */
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
enum {
    PARTS_PER_THREAD = 4,     /* so that a thread that was held up leaves its share to the others */
    LEAST_WIDTH = 64,         /* rows or columns of a part: OpenBLAS works in tiles of up to 48 */
    LEAST_WORK = 1 << 19,     /* multiplications worth a part: some 40 us, where waking a thread takes up to 30 */
};

static int threads = 1, openblas_threads = 1;
static void (*set_openblas_threads)(int);
static long calls;

/* One job at a time; `owner` is held by the thread whose job it is. */
static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER, lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER, idle = PTHREAD_COND_INITIALIZER;
static struct {
    void (*run)(const void *job, int part);
    const void *job; /* NULL: nothing to join */
    int parts, next, active;
    uint64_t number;
} pool;

static void take_parts(void (*run)(const void *, int), const void *job, int parts)
{
    for (int part; (part = __atomic_fetch_add(&pool.next, 1, __ATOMIC_RELAXED)) < parts;)
        run(job, part);
}

static void *worker(void *unused)
{
    uint64_t seen = 0;
    (void)unused;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (pool.job == NULL || pool.number == seen)
            pthread_cond_wait(&wake, &lock);
        seen = pool.number;
        pool.active++;
        pthread_mutex_unlock(&lock);
        take_parts(pool.run, pool.job, pool.parts);
        pthread_mutex_lock(&lock);
        if (--pool.active == 0)
            pthread_cond_signal(&idle);
    }
    return NULL;
}

/* Runs all parts of a job and returns when they are done; alone if the pool is busy. */
static void run_parts(void (*run)(const void *, int), const void *job, int parts)
{
    if (parts < 2 || pthread_mutex_trylock(&owner) != 0) {
        for (int part = 0; part < parts; part++)
            run(job, part);
        return;
    }
    pthread_mutex_lock(&lock);
    pool.run = run, pool.job = job, pool.parts = parts, pool.next = 0, pool.number++;
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&lock);
    take_parts(run, job, parts);
    pthread_mutex_lock(&lock);
    pool.job = NULL;
    while (pool.active)
        pthread_cond_wait(&idle, &lock);
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&owner);
}

/* How many parts a product is cut into along a side of `size`, for `work` multiplications in all. */
static int count_parts(int size, int64_t work)
{
    int64_t parts = threads > 1 ? (int64_t)threads * PARTS_PER_THREAD : 1;
    if (parts > size / LEAST_WIDTH)
        parts = size / LEAST_WIDTH;
    if (parts > work / LEAST_WORK)
        parts = work / LEAST_WORK;
    return parts > 1 ? (int)parts : 1;
}

/* A row-major C = alpha op(A) op(B) + beta C, cut by rows or by columns of C. One row times a matrix goes to gemv,
 * which is up to 7 times faster at it than gemm. */
#define DEFINE(T, name)                                                                                       \
    static void (*name##gemm)(int, int, int, int64_t, int64_t, int64_t, T, const T *, int64_t, const T *,     \
                              int64_t, T, T *, int64_t);                                                      \
    static void (*name##gemv)(int, int, int64_t, int64_t, T, const T *, int64_t, const T *, int64_t, T, T *,  \
                              int64_t);                                                                       \
    typedef struct {                                                                                          \
        int trans_a, trans_b;                                                                                 \
        int64_t m, n, k, lda, ldb, ldc, rows, columns; /* rows and columns of a part */                       \
        T alpha, beta;                                                                                        \
        const T *a, *b;                                                                                       \
        T *c;                                                                                                 \
    } name##product;                                                                                          \
    static void name##part(const void *job, int part)                                                         \
    {                                                                                                         \
        name##product p = *(const name##product *)job;                                                        \
        int64_t row = p.rows < p.m ? part * p.rows : 0, column = p.columns < p.n ? part * p.columns : 0;      \
        p.a += p.trans_a == NO_TRANS ? row * p.lda : row;                                                     \
        p.b += p.trans_b == NO_TRANS ? column : column * p.ldb;                                               \
        p.c += row * p.ldc + column;                                                                          \
        p.m = p.m - row < p.rows ? p.m - row : p.rows;                                                        \
        p.n = p.n - column < p.columns ? p.n - column : p.columns;                                            \
        if (p.m != 1) {                                                                                       \
            name##gemm(ROW_MAJOR, p.trans_a, p.trans_b, p.m, p.n, p.k, p.alpha, p.a, p.lda, p.b, p.ldb,       \
                       p.beta, p.c, p.ldc);                                                                   \
            return;                                                                                           \
        }                                                                                                     \
        int64_t stride = p.trans_a == NO_TRANS ? 1 : p.lda;                                                   \
        if (p.trans_b == NO_TRANS)                                                                            \
            name##gemv(ROW_MAJOR, TRANS, p.k, p.n, p.alpha, p.b, p.ldb, p.a, stride, p.beta, p.c, 1);         \
        else                                                                                                  \
            name##gemv(ROW_MAJOR, NO_TRANS, p.n, p.k, p.alpha, p.b, p.ldb, p.a, stride, p.beta, p.c, 1);      \
    }                                                                                                         \
    void cblas_##name##gemm(int order, int trans_a, int trans_b, int m, int n, int k, T alpha, const T *a,    \
                            int lda, const T *b, int ldb, T beta, T *c, int ldc)                              \
    {                                                                                                         \
        name##product p = {trans_a, trans_b, m, n, k, lda, ldb, ldc, m, n, alpha, beta, a, b, c};             \
        __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED);                                                      \
        if (m <= 0 || n <= 0)                                                                                 \
            return;                                                                                           \
        if (order != ROW_MAJOR) { /* columns of C = A B are rows of C' = B' A' */                             \
            name##product q = {trans_b, trans_a, n, m, k, ldb, lda, ldc, n, m, alpha, beta, b, a, c};         \
            p = q;                                                                                            \
        }                                                                                                     \
        int64_t *side = p.m > p.n ? &p.rows : &p.columns, size = *side;                                       \
        int parts = count_parts((int)size, p.m * p.n * p.k);                                                  \
        *side = (size + parts - 1) / parts;                                                                   \
        parts = (int)((size + *side - 1) / *side);                                                            \
        set_openblas_threads(1);                                                                              \
        run_parts(name##part, &p, parts);                                                                     \
        set_openblas_threads(openblas_threads); /* NumPy's own products keep theirs */                        \
    }

DEFINE(float, s)
DEFINE(double, d)

/* How many products have gone through here. */
long tq_blas_calls(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }

/* Takes OpenBLAS's functions and its number of threads, and starts our own. Returns how many those are. */
int tq_blas_init(int wanted, int openblas_threads_, void *set_threads, void *sgemm_, void *sgemv_, void *dgemm_,
                 void *dgemv_)
{
    openblas_threads = openblas_threads_;
    *(void **)&set_openblas_threads = set_threads;
    *(void **)&sgemm = sgemm_, *(void **)&sgemv = sgemv_, *(void **)&dgemm = dgemm_, *(void **)&dgemv = dgemv_;
    pthread_t thread;
    while (threads < wanted && pthread_create(&thread, NULL, worker, NULL) == 0) {
        pthread_detach(thread);
        threads++;
    }
    return threads;
}
