// The 3x3 convolutions of the report's networks, padding 1, on tensor cores. Images and their gradients
// are of type T, filters and their gradients float32.
//
// A block computes a tile: ROWS rows of the output in each of IMAGES images. It copies the pixels that
// the tile needs, with a frame of zeros around an image, and the filters to shared memory, and
// multiplies them by `add_products`: 16 x 8 by 8 x 8 values at a time, one of the nine places of the
// filter after the other. A factor is rounded to 10 bits of mantissa (TF32), which is all that a Half
// has; with EXACT it is the sum of two such numbers, and of their products all but the smallest is
// taken: float32, nearly.
//
// Rows of shared memory are padded, so that the 32 threads of a warp read from 32 banks at stride 1,
// and from 16 at stride 2. The file comes after kernels.cu in one program; it needs compute
// capability 8.0.

constexpr int WARP = 32, WARPS = THREADS / WARP;
constexpr int PLACES = 9;  // of a filter

#ifndef EMULATED
extern __shared__ float4 dynamic_shared[];
__device__ inline float* shared_memory() { return reinterpret_cast<float*>(dynamic_shared); }

__device__ inline float to_tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __uint_as_float(y);
}

// sums (16, 8) += a (16, 8) b (8, 8). With g = lane / 4 and t = lane % 4, a thread has of a the values
// (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); of b (t, g), (t + 4, g); of the sums (g, 2t),
// (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void add_products(const float* a, const float* b, float* sums) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#endif

// N values as factors: themselves if they have been rounded before, else as a sum of two numbers.
template <int N, bool EXACT> struct Factor {
    float high[N], low[EXACT ? N : 1];

    __device__ inline void split() {
        if constexpr (EXACT) {
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float value = high[i];
                high[i] = to_tf32(value);
                low[i] = to_tf32(value - high[i]);
            }
        }
    }
};

// With EXACT the products are summed apart first: tensor cores cut off what does not fit into the sum
// that they add to, of a long sum more than is in the small products.
template <bool EXACT>
__device__ inline void add_products(const Factor<4, EXACT>& a, const Factor<2, EXACT>& b, float* sums) {
    if (EXACT) {
        float part[4] = {};
        add_products(a.low, b.high, part);
        add_products(a.high, b.low, part);
        add_products(a.high, b.high, part);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += part[i];
    } else {
        add_products(a.high, b.high, sums);
    }
}

// Copy 16 bytes of values to shared memory, ready to be factors.
template <typename T, bool EXACT> __device__ inline void put(float* values, float* to) {
    constexpr int N = Vector<T>::N;
    if (!EXACT && N == 4) {  // a Half needs no rounding
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = to_tf32(values[j]);
    }
#pragma unroll
    for (int j = 0; j < N; j += 4) store(to + j, values + j);
}

// The part of the input that a tile needs, in shared memory: (IMAGES, HEIGHT, BREADTH, PITCH). The
// images have SIDE x SIDE pixels of CHANNELS values; PADDED of them are a multiple of 8, with zeros.
template <int CHANNELS, int WIDTH, int ROWS, int IMAGES, int STRIDE, int GAP> struct Input {
    static constexpr int SIDE = WIDTH * STRIDE;
    static constexpr int HEIGHT = (ROWS - 1) * STRIDE + 3, BREADTH = (WIDTH - 1) * STRIDE + 3;
    static constexpr int PADDED = CHANNELS < 8 ? 8 : CHANNELS, PITCH = PADDED + GAP;
    static constexpr int SIZE = IMAGES * HEIGHT * BREADTH * PITCH;

    // Where the first of the nine pixels for the output's pixel p lies, and how far on another is.
    static __device__ inline int first(int p) {
        const int column = p % WIDTH, row = p / WIDTH % ROWS, image = p / WIDTH / ROWS;
        return ((image * HEIGHT + row * STRIDE) * BREADTH + column * STRIDE) * PITCH;
    }
    static __device__ inline int place(int r, int s) { return (r * BREADTH + s) * PITCH; }

    // Copy the tile whose first row of the output is `row` in the image number `image` of `images`.
    template <bool EXACT, typename T>
    static __device__ inline void fill(float* to, const T* x, int images, int image, int row) {
        constexpr int N = Vector<T>::N, VECTORS = PADDED / N;
#pragma unroll 4
        for (int i = threadIdx.x; i < IMAGES * HEIGHT * BREADTH * VECTORS; i += THREADS) {
            const int c = i % VECTORS * N, pixel = i / VECTORS;
            const int w = pixel % BREADTH - 1, h = pixel / BREADTH % HEIGHT + row * STRIDE - 1;
            const int n = pixel / BREADTH / HEIGHT + image;
            float v[N] = {};
            if (c < CHANNELS && n < images && h >= 0 && h < SIDE && w >= 0 && w < SIDE) {
                load(x + (((size_t)n * SIDE + h) * SIDE + w) * CHANNELS + c, v);
            }
            put<T, EXACT>(v, to + pixel * PITCH + c);
        }
    }
};

template <typename T> struct alignas(2 * sizeof(T)) Pair {
    T first, second;
};

template <typename T> __device__ inline void store_pair(T* to, float first, float second) {
    *reinterpret_cast<Pair<T>*>(to) = {from_float<T>(first), from_float<T>(second)};
}

// y (images, WIDTH, WIDTH, K), the convolution of x (images, WIDTH * STRIDE, WIDTH * STRIDE,
// CHANNELS) with W (K, channels, 3, 3); with BACK the gradient of a convolution's input, x being
// the gradient of its output and W (CHANNELS, K, 3, 3) its filters, at STRIDE 1. A block computes KB
// of the K channels.
template <typename T, int CHANNELS, int K, int KB, int WIDTH, int ROWS, int IMAGES, int STRIDE,
          bool BACK, bool EXACT>
__global__ void __launch_bounds__(THREADS)
    convolve(const T* x, const float* W, T* y, int images, int channels) {
    using In = Input<CHANNELS, WIDTH, ROWS, IMAGES, STRIDE, 4>;
    constexpr int C = In::PADDED, PITCH = KB + 8, PARTS = K / KB;
    constexpr int MS = IMAGES * ROWS * WIDTH / WARPS / 16, NS = KB / 8;
    static_assert(MS * WARPS * 16 == IMAGES * ROWS * WIDTH && NS * 8 * PARTS == K, "tiles");
    static_assert(WIDTH % ROWS == 0 && (IMAGES == 1 || ROWS == WIDTH), "pixels in a row");
    // Filters are (9, C, PITCH), each of the nine a bank further on, to be written at once.
    constexpr int NEXT = C * PITCH + 1;
    float *tile = shared_memory(), *filters = tile + In::SIZE;
    const int part = blockIdx.x % PARTS * KB, number = blockIdx.x / PARTS;
    const int row = number % (WIDTH / ROWS) * ROWS, image = number / (WIDTH / ROWS) * IMAGES;
    In::template fill<EXACT>(tile, x, images, image, row);
#pragma unroll 4
    for (int i = threadIdx.x; i < PLACES * C * KB; i += THREADS) {
        const int place = i % PLACES;
        const int c = BACK ? i / PLACES / KB : i / PLACES % C;
        const int k = BACK ? i / PLACES % KB : i / PLACES / C;
        float v = 0;
        if (BACK) {
            if (part + k < channels) v = W[(c * channels + part + k) * PLACES + PLACES - 1 - place];
        } else if (c < channels) {
            v = W[((part + k) * channels + c) * PLACES + place];
        }
        filters[place * NEXT + c * PITCH + k] = EXACT ? v : to_tf32(v);
    }
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    int from[MS][2];
#pragma unroll
    for (int m = 0; m < MS; ++m) {
        from[m][0] = In::first((warp * MS + m) * 16 + g) + t;
        from[m][1] = In::first((warp * MS + m) * 16 + g + 8) + t;
    }
    float sums[MS][NS][4] = {};
    __syncthreads();
#pragma unroll 1
    for (int r = 0; r < 3; ++r) {
#pragma unroll
        for (int s = 0; s < 3; ++s) {
#pragma unroll
            for (int c = 0; c < C; c += 8) {
                Factor<2, EXACT> b[NS];
#pragma unroll
                for (int n = 0; n < NS; ++n) {
                    const float* w = filters + (r * 3 + s) * NEXT + (c + t) * PITCH + n * 8 + g;
                    b[n].high[0] = w[0];
                    b[n].high[1] = w[4 * PITCH];
                    b[n].split();
                }
#pragma unroll
                for (int m = 0; m < MS; ++m) {
                    const float* upper = tile + from[m][0] + In::place(r, s) + c;
                    const float* lower = tile + from[m][1] + In::place(r, s) + c;
                    Factor<4, EXACT> a = {{upper[0], lower[0], upper[4], lower[4]}, {}};
                    a.split();
#pragma unroll
                    for (int n = 0; n < NS; ++n) add_products(a, b[n], sums[m][n]);
                }
            }
        }
    }
    // A tile's pixels lie in a row in memory.
    T* to = y + ((size_t)image * WIDTH + row) * WIDTH * K + part + 2 * t;
#pragma unroll
    for (int m = 0; m < MS; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int p = (warp * MS + m) * 16 + half * 8 + g;
            if (image + p / (ROWS * WIDTH) >= images) continue;
#pragma unroll
            for (int n = 0; n < NS; ++n) {
                store_pair(to + p * K + n * 8, sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
            }
        }
    }
}

// The gradient of the filters of `convolve` from x and gy (images, WIDTH, WIDTH, K), added up over the
// tiles of a block: parts (gridDim / (K / KB), 9, K, PADDED). A warp has SHARES-th of the
// pixels, 16 of the KB channels of gy and 8 * CS of x.
template <typename T, int CHANNELS, int K, int KB, int WIDTH, int ROWS, int IMAGES, int STRIDE,
          bool EXACT>
__global__ void __launch_bounds__(THREADS)
    filter_gradient(const T* x, const T* gy, float* parts, int images) {
    using In = Input<CHANNELS, WIDTH, ROWS, IMAGES, STRIDE, (CHANNELS <= 8 ? 0 : 8)>;
    constexpr int C = In::PADDED, PITCH = KB + 8, PARTS = K / KB, PIXELS = IMAGES * ROWS * WIDTH;
    constexpr int CS = C < 16 ? 1 : 2, SETS = KB / 16 * (C / 8 / CS), SHARES = WARPS / SETS;
    static_assert(SETS * SHARES == WARPS && PIXELS % (8 * SHARES) == 0, "warps");
    static_assert(SHARES / 2 * SETS * PLACES * CS * 4 * WARP <= In::SIZE + PIXELS * PITCH, "sums");
    float *tile = shared_memory(), *gradient = tile + In::SIZE;  // (PIXELS, PITCH)
    const int part = blockIdx.x % PARTS * KB;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int set = warp % SETS, share = warp / SETS;
    const int k = set % (KB / 16) * 16 + g, c = set / (KB / 16) * CS * 8;
    const int numbers = (images + IMAGES - 1) / IMAGES * (WIDTH / ROWS);
    float sums[PLACES][CS][4] = {};
    for (int number = blockIdx.x / PARTS; number < numbers; number += gridDim.x / PARTS) {
        const int row = number % (WIDTH / ROWS) * ROWS, image = number / (WIDTH / ROWS) * IMAGES;
        __syncthreads();  // the tile before has been read
        In::template fill<EXACT>(tile, x, images, image, row);
        const T* from = gy + ((size_t)image * WIDTH + row) * WIDTH * K + part;
        constexpr int N = Vector<T>::N;
#pragma unroll 4
        for (int i = threadIdx.x; i < PIXELS * KB / N; i += THREADS) {
            const int p = i / (KB / N), at = i % (KB / N) * N;
            float v[N] = {};
            if (image + p / (ROWS * WIDTH) < images) load(from + (size_t)p * K + at, v);
            put<T, EXACT>(v, gradient + p * PITCH + at);
        }
        __syncthreads();
#pragma unroll 1
        for (int p = share * 8; p < PIXELS; p += SHARES * 8) {
            const float* left = gradient + (p + t) * PITCH + k;
            const float* right = left + 4 * PITCH;
            Factor<4, EXACT> a = {{left[0], left[8], right[0], right[8]}, {}};
            a.split();
            const float* pixel = tile + In::first(p) + t * STRIDE * In::PITCH + c + g;
#pragma unroll
            for (int place = 0; place < PLACES; ++place) {
#pragma unroll
                for (int j = 0; j < CS; ++j) {
                    const float* at = pixel + In::place(place / 3, place % 3) + j * 8;
                    Factor<2, EXACT> b = {{at[0], at[4 * STRIDE * In::PITCH]}, {}};
                    b.split();
                    add_products(a, b, sums[place][j]);
                }
            }
        }
    }
    // The shares' sums, half of them added to the other half until one is left.
    float* all = &sums[0][0][0];
#pragma unroll 1
    for (int half = SHARES / 2; half > 0; half /= 2) {
        float* mine = tile + (share % half * SETS + set) * PLACES * CS * 4 * WARP + lane;
        __syncthreads();
        if (share >= half && share < 2 * half) {
#pragma unroll
            for (int i = 0; i < PLACES * CS * 4; ++i) mine[i * WARP] = all[i];
        }
        __syncthreads();
        if (share < half) {
#pragma unroll
            for (int i = 0; i < PLACES * CS * 4; ++i) all[i] += mine[i * WARP];
        }
    }
    if (share > 0) return;
    float* to = parts + (size_t)(blockIdx.x / PARTS) * PLACES * K * C + (part + k) * C + c + 2 * t;
#pragma unroll
    for (int place = 0; place < PLACES; ++place) {
#pragma unroll
        for (int j = 0; j < CS; ++j) {
            float* at = to + place * K * C + j * 8;
            store_pair(at, sums[place][j][0], sums[place][j][1]);
            store_pair(at + 8 * C, sums[place][j][2], sums[place][j][3]);
        }
    }
}

// gW (K, channels, 3, 3) = factor times the sum of parts (count, 9, K, padded), by WARPS threads for
// each value.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_parts(const float* parts, float* gW, int count, int filters, int padded, int channels,
              float factor) {
    __shared__ float shared[THREADS];
    const int size = PLACES * filters * padded, i = blockIdx.x * WARP + threadIdx.x % WARP;
    float total = 0;
    if (i < size) {
#pragma unroll 8
        for (int n = threadIdx.x / WARP; n < count; n += WARPS) total += parts[(size_t)n * size + i];
    }
    shared[threadIdx.x] = total;
    sum_lanes<1>(shared, WARPS, WARP);
    if (threadIdx.x >= WARP || i >= size) return;
    const int c = i % padded, k = i / padded % filters, place = i / padded / filters;
    if (c < channels) gW[(k * channels + c) * PLACES + place] = shared[threadIdx.x] * factor;
}
