// Runs the kernels of kernels.cu on the CPU, the very source: a thread of a block is a coroutine that
// runs to the next __syncthreads(), a block runs to its end before the next begins. What a kernel
// may not rely on, the order of threads and blocks, can be turned round.
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct Index {
    unsigned x;
};
static Index threadIdx, blockIdx, gridDim;
static jmp_buf scheduler;
static jmp_buf* running;

static void __syncthreads() {  // jumps, since swapcontext takes two system calls
    if (!_setjmp(*running)) _longjmp(scheduler, 1);
}
static void __threadfence() {}
static unsigned atomicAdd(unsigned* to, unsigned value) {
    *to += value;
    return *to - value;
}
static float __ldcg(const float* from) { return *from; }
static float __fmul_rn(float a, float b) { return a * b; }
static float __fsub_rn(float a, float b) { return a - b; }
using std::min;

struct Half;
static float to_float(Half x);
static Half to_half(float x);
struct float4 {
    float x, y, z, w;
};
alignas(16) static float memory[(227 << 8) + 1024];  // all that a block may have on an H100; a guard
static float* shared_memory() { return memory; }
static float to_tf32(float x);
static void add_products(const float* a, const float* b, float* sums);
#include SOURCE
#include CONVOLUTIONS
static float to_tf32(float x) {
    if (x != x) return x;
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x1000) & ~0x1fffu;
    memcpy(&x, &bits, sizeof x);
    return x;
}
// As the comment in convolutions.cu says where each thread has its values; the block's warps all
// multiply at once. What does not fit into the sum is cut off, as tensor cores do.
static void add_products(const float* a, const float* b, float* sums) {
    static float left[THREADS][4], right[THREADS][2];
    const int me = threadIdx.x, first = me / WARP * WARP, g = me % WARP / 4, t = me % 4;
    memcpy(left[me], a, sizeof left[me]);
    memcpy(right[me], b, sizeof right[me]);
    __syncthreads();
    for (int i = 0; i < 4; ++i) {
        const int row = g + i / 2 * 8, column = 2 * t + i % 2;
        double sum = sums[i];
        for (int k = 0; k < 8; ++k) {
            const double x = left[first + row % 8 * 4 + k % 4][row / 8 + k / 4 * 2];
            sum += x * right[first + column * 4 + k % 4][k / 4];
        }
        sums[i] = sum;
        if (fabs(sums[i]) > fabs(sum)) sums[i] = nextafterf(sums[i], 0);
    }
    __syncthreads();
}
static float to_float(Half x) {
    _Float16 y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static Half to_half(float x) {
    const _Float16 y = x;
    Half half;
    memcpy(&half, &y, sizeof half);
    return half;
}

struct Kernel {
    std::string name;
    std::vector<int> sizes;  // of the arguments
    std::function<void(void**)> call;
};

template <typename... A, size_t... I>
void apply(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <typename... A> Kernel make(const char* name, void (*kernel)(A...)) {
    return {name, {int(sizeof(A))...}, [kernel](void** arguments) {
                apply(kernel, arguments, std::index_sequence_for<A...>());
            }};
}

static std::vector<Kernel> kernels = {
#define KERNEL(...) make(#__VA_ARGS__, __VA_ARGS__),
#include LIST
};

constexpr int STACK = 32 << 10;
struct Coroutine {
    ucontext_t start;
    jmp_buf here;
    bool started, finished;
};
static std::vector<Coroutine> threads;
static std::vector<char> stacks;
static std::function<void()> body;

static void enter(int t) {
    for (;;) {  // once per block
        body();
        threads[t].finished = true;
        __syncthreads();
    }
}

static void make_threads(int count) {
    threads.assign(count, Coroutine());
    stacks.resize(size_t(count) * STACK);
    for (int t = 0; t < count; ++t) {
        ucontext_t& start = threads[t].start;
        getcontext(&start);
        start.uc_stack.ss_sp = stacks.data() + size_t(t) * STACK;
        start.uc_stack.ss_size = STACK;
        start.uc_link = nullptr;
        makecontext(&start, reinterpret_cast<void (*)()>(enter), 1, t);
    }
}

// Runs thread t to the next barrier or to its end.
static __attribute__((noinline)) void resume(int t) {
    threadIdx.x = t;
    running = &threads[t].here;
    if (_setjmp(scheduler)) return;
    if (threads[t].started) _longjmp(*running, 1);
    threads[t].started = true;
    setcontext(&threads[t].start);
}

// Whether all threads came to each __syncthreads() together.
static bool run_block(int count, bool reversed) {
    if (int(threads.size()) != count) make_threads(count);
    for (Coroutine& each : threads) each.finished = false;
    for (;;) {
        int finished = 0;
        for (int k = 0; k < count; ++k) {
            const int t = reversed ? count - 1 - k : k;
            resume(t);
            finished += threads[t].finished;
        }
        if (finished == count) return true;
        if (finished) {
            threads.clear();
            return false;
        }
    }
}

// Returns nullptr, or what is wrong.
extern "C" const char* launch(const char* name, int grid, int block, int shared, int count,
                              const int* sizes, void** arguments, bool reversed) {
    const auto found = std::find_if(kernels.begin(), kernels.end(),
                                    [&](const Kernel& kernel) { return kernel.name == name; });
    if (found == kernels.end()) return "no such kernel";
    if (found->sizes != std::vector<int>(sizes, sizes + count)) return "wrong arguments";
    if (block != THREADS) return "not launched with THREADS threads";
    body = [&] { found->call(arguments); };
    gridDim.x = grid;
    for (int b = 0; b < grid; ++b) {
        if (shared) std::fill(memory, std::end(memory), NAN);  // until something is written
        blockIdx.x = reversed ? grid - 1 - b : b;
        if (!run_block(block, reversed)) return "threads ended while others waited at a barrier";
        for (float* each = memory + shared / 4; shared && each < std::end(memory); ++each) {
            if (!isnan(*each)) return "it has written beyond its shared memory";
        }
    }
    return nullptr;
}
