// What lies between the convolutions, on the GPU: batch normalization with shortcut and ReLU, the
// pooling, the linear layer, the loss, momentum SGD and augmentation.
//
// Activations are channels last: rows of `channels` values, one row per pixel, T = float or Half,
// aligned to 16 bytes and with a multiple of Vector<T>::N channels. All else is float32. Every
// kernel is launched with THREADS threads per block. A sum over rows is taken per block, the blocks'
// results are added by the last block to finish, always in the order of the blocks: the same bits
// whatever order the blocks ran in. ReLU lets NaN through, as NumPy's maximum does.
//
// The file needs no header. The tests run it on the CPU as it stands, with EMULATED defined.

constexpr int THREADS = 256;

struct Half {  // IEEE 754 binary16
    unsigned short bits;
};

#ifndef EMULATED
__device__ inline float to_float(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ inline Half to_half(float x) {
    Half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
#endif

__device__ inline float to_float(float x) { return x; }
template <typename T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline Half from_float<Half>(float x) { return to_half(x); }

// 16 bytes of consecutive values, read and written at once.
template <typename T> struct alignas(16) Vector {
    static constexpr int N = 16 / sizeof(T);
    T values[N];
};

template <typename T> __device__ inline void load(const T* from, float* values) {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
    for (int j = 0; j < Vector<T>::N; ++j) values[j] = to_float(vector.values[j]);
}

template <typename T> __device__ inline void store(T* to, const float* values) {
    Vector<T> vector;
#pragma unroll
    for (int j = 0; j < Vector<T>::N; ++j) vector.values[j] = from_float<T>(values[j]);
    *reinterpret_cast<Vector<T>*>(to) = vector;
}

__device__ inline int thread() { return blockIdx.x * THREADS + threadIdx.x; }

__device__ inline float relu(float x) { return x <= 0 ? 0.f : x; }

// ---- Sums --------------------------------------------------------------------------------------

// Each of the first lanes * groups threads has put its K values at shared[k * THREADS + thread].
// Afterwards thread t < groups finds there the sum over the threads t, t + groups, ...
template <int K, typename V> __device__ inline void sum_lanes(V* shared, int lanes, int groups) {
    const int lane = threadIdx.x / groups;
    for (int n = lanes; n > 1;) {
        const int half = (n + 1) / 2;
        __syncthreads();
        if (lane + half < n) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                shared[k * THREADS + threadIdx.x] +=
                    shared[k * THREADS + threadIdx.x + half * groups];
            }
        }
        n = half;
    }
    __syncthreads();
}

// Whether this block is the last of the grid to arrive; it then sees what all others have written
// before. `arrived` is 0 before the kernel and after it.
__device__ inline bool is_last_block(unsigned* arrived) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1u) == gridDim.x - 1;
        if (last) *arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// Sums over all blocks of first(block, parts of it) and of second, for the channel threadIdx.x %
// channels; parts: (blocks, 2, channels), and a function gets the two of a block.
struct Sums {
    double first, second;
};
template <typename F, typename G>
__device__ inline Sums sum_blocks(const float* parts, int channels, F first, G second) {
    __shared__ double shared[2 * THREADS];
    const int lanes = THREADS / channels, lane = threadIdx.x / channels;
    const int channel = threadIdx.x % channels;
    double a = 0, b = 0;
    if (lane < lanes) {
#pragma unroll 8  // so many are on their way from the memory at once
        for (int block = lane; block < (int)gridDim.x; block += lanes) {
            const float* part = parts + block * 2 * channels + channel;
            const float x = __ldcg(part), y = __ldcg(part + channels);
            a += first(block, x, y);
            b += second(block, x, y);
        }
    }
    shared[threadIdx.x] = a;
    shared[THREADS + threadIdx.x] = b;
    sum_lanes<2>(shared, lanes, channels);
    return {shared[channel], shared[THREADS + channel]};
}

// ---- Batch normalization -----------------------------------------------------------------------

// Mean and variance of the channels of x (rows, channels), a multiple of `chunk` rows per block.
// Writes into stats (4, channels): mean, 1 / sqrt(var + eps), scale and shift, with which
// x * scale + shift is normalized; moves the running averages as Chainer does. parts: (blocks, 2,
// channels).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    moments(const T* x, int rows, int channels, int chunk, float* parts, unsigned* arrived,
            const float* gamma, const float* beta, float eps, float decay, float* average_mean,
            float* average_var, float* stats) {
    constexpr int N = Vector<T>::N;
    __shared__ float shared[2 * N * THREADS];
    const int groups = channels / N, lanes = THREADS / groups;
    const int lane = threadIdx.x / groups, c = threadIdx.x % groups * N;
    const int begin = blockIdx.x * chunk, end = min(begin + chunk, rows);
    // Relative to the block's first row: the mean may be large beside the deviation.
    float first[N], total[N] = {}, square[N] = {};
    load(x + (size_t)begin * channels + c, first);
    if (lane < lanes) {
#pragma unroll 4
        for (int i = begin + lane; i < end; i += lanes) {
            float v[N];
            load(x + (size_t)i * channels + c, v);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float d = v[j] - first[j];
                total[j] += d;
                square[j] += d * d;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        shared[j * THREADS + threadIdx.x] = total[j];
        shared[(N + j) * THREADS + threadIdx.x] = square[j];
    }
    sum_lanes<2 * N>(shared, lanes, groups);
    if (lane == 0) {
        const float count = end - begin;
        float* mine = parts + (size_t)blockIdx.x * 2 * channels + c;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float sum = shared[j * THREADS + threadIdx.x];
            const float squares = shared[(N + j) * THREADS + threadIdx.x] - sum * sum / count;
            mine[j] = first[j] + sum / count;
            mine[channels + j] = squares < 0 ? 0.f : squares;
        }
    }
    if (!is_last_block(arrived)) return;
    const auto weight = [=](int block) { return (double)min(chunk, rows - block * chunk); };
    const Sums sums = sum_blocks(
        parts, channels, [=](int block, float own, float) { return weight(block) * own; },
        [=](int block, float own, float around) { return around + weight(block) * own * own; });
    const int channel = threadIdx.x;
    if (channel >= channels) return;
    const double mean = sums.first / rows, all = sums.second - sums.first * mean;
    const double squares = all < 0 ? 0 : all, var = squares / rows, inverse = 1 / sqrt(var + eps);
    const double scale = gamma[channel] * inverse;
    stats[channel] = mean;
    stats[channels + channel] = inverse;
    stats[2 * channels + channel] = scale;
    stats[3 * channels + channel] = beta[channel] - mean * scale;
    average_mean[channel] = decay * average_mean[channel] + (1 - decay) * (float)mean;
    const float unbiased = squares / (rows > 1 ? rows - 1 : 1);
    average_var[channel] = decay * average_var[channel] + (1 - decay) * unbiased;
}

// Scale and shift of a normalization at test time, into stats as `moments` does.
extern "C" __global__ void __launch_bounds__(THREADS)
    fixed_moments(const float* gamma, const float* beta, float eps, const float* average_mean,
                  const float* average_var, int channels, float* stats) {
    const int channel = thread();
    if (channel >= channels) return;
    const double inverse = 1 / sqrt((double)average_var[channel] + eps);
    const double scale = gamma[channel] * inverse;
    stats[channel] = average_mean[channel];
    stats[channels + channel] = inverse;
    stats[2 * channels + channel] = scale;
    stats[3 * channels + channel] = beta[channel] - average_mean[channel] * scale;
}

// y = relu(x * scale + shift + A(shortcut)), x and y (N, height, width, channels). Without stats,
// scale is 1 and shift 0; without a shortcut, A is 0; without rectify, there is no ReLU. The shortcut is (N, height_in, width_in,
// channels_in): A takes every step-th pixel and appends channels of zeros (option A).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    normalize(const T* x, const float* stats, const T* shortcut, T* y, int rectify, int rows,
              int channels, int height, int width, int step, int height_in, int width_in, int channels_in) {
    constexpr int N = Vector<T>::N;
    const int groups = channels / N;
    const int row = thread() / groups, c = thread() % groups * N;
    if (row >= rows) return;
    const size_t at = (size_t)row * channels + c;
    float v[N];
    load(x + at, v);
    if (stats) {
        const float *scale = stats + 2 * channels + c, *shift = stats + 3 * channels + c;
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = fmaf(v[j], scale[j], shift[j]);
    }
    if (shortcut && c < channels_in) {
        const int image = row / (height * width), pixel = row % (height * width);
        const int h = pixel / width * step, w = pixel % width * step;
        float added[N];
        load(shortcut + (((size_t)image * height_in + h) * width_in + w) * channels_in + c, added);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] += added[j];
    }
    if (rectify) {
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = relu(v[j]);
    }
    store(y + at, v);
}

// Gradients of gamma and beta, and the coefficients (3, channels) of `input_gradient`, from the
// gradient gy of relu(x * scale + shift + A(shortcut)). Where y, its value, is given, it tells what
// the ReLU let through, and the gradient before the ReLU is written to g, which the shortcut needs;
// otherwise x tells. Gradients of type T come multiplied by 1 / unscale. parts: (blocks, 2,
// channels).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    gradient_sums(const T* x, const T* gy, const T* y, T* g, const float* stats, const float* gamma,
                  int rows, int channels, int chunk, float* parts, unsigned* arrived,
                  int of_batch, float unscale, float* ggamma, float* gbeta, float* coefficients) {
    constexpr int N = Vector<T>::N;
    __shared__ float shared[2 * N * THREADS];
    const int groups = channels / N, lanes = THREADS / groups;
    const int lane = threadIdx.x / groups, c = threadIdx.x % groups * N;
    const int begin = blockIdx.x * chunk, end = min(begin + chunk, rows);
    float mean[N], scale[N], shift[N], total[N] = {}, product[N] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) {
        mean[j] = stats[c + j];
        scale[j] = stats[2 * channels + c + j];
        shift[j] = stats[3 * channels + c + j];
    }
    if (lane < lanes) {
#pragma unroll 2
        for (int i = begin + lane; i < end; i += lanes) {
            const size_t at = (size_t)i * channels + c;
            float v[N], d[N], m[N];
            load(x + at, v);
            load(gy + at, d);
            if (y) load(y + at, m);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if ((y ? m[j] : fmaf(v[j], scale[j], shift[j])) <= 0) d[j] = 0;
                total[j] += d[j];
                product[j] += d[j] * (v[j] - mean[j]);
            }
            if (y) store(g + at, d);
        }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        shared[j * THREADS + threadIdx.x] = total[j];
        shared[(N + j) * THREADS + threadIdx.x] = product[j];
    }
    sum_lanes<2 * N>(shared, lanes, groups);
    if (lane == 0) {
        float* mine = parts + (size_t)blockIdx.x * 2 * channels + c;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            mine[j] = shared[j * THREADS + threadIdx.x];
            mine[channels + j] = shared[(N + j) * THREADS + threadIdx.x];
        }
    }
    if (!is_last_block(arrived)) return;
    const Sums sums = sum_blocks(
        parts, channels, [](int, float x, float) { return x; }, [](int, float, float y) { return y; });
    const double sum = sums.first, centred = sums.second;
    const int channel = threadIdx.x;
    if (channel >= channels) return;
    // With the statistics of the batch, xhat = (x - mean) / s:
    // gx = gamma / s * (g - mean(g) - xhat * mean(g * xhat)); with fixed ones, gx = gamma / s * g.
    const double inverse = stats[channels + channel], factor = gamma[channel] * inverse;
    const double slope = of_batch ? -factor * centred * inverse * inverse / rows : 0;
    const double offset = of_batch ? -factor * sum / rows - slope * stats[channel] : 0;
    ggamma[channel] = centred * inverse * unscale;
    gbeta[channel] = sum * unscale;
    coefficients[channel] = factor;
    coefficients[channels + channel] = slope;
    coefficients[2 * channels + channel] = offset;
}

// gx = factor * g + slope * x + offset: the gradient of a normalization's input. With stats, g is
// the gradient after the ReLU, and x tells what the ReLU let through.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    input_gradient(const T* x, const T* g, const float* stats, const float* coefficients, T* gx,
                   int rows, int channels) {
    constexpr int N = Vector<T>::N;
    const int groups = channels / N;
    const int row = thread() / groups, c = thread() % groups * N;
    if (row >= rows) return;
    const size_t at = (size_t)row * channels + c;
    float v[N], d[N];
    load(x + at, v);
    load(g + at, d);
    if (stats) {
        const float *scale = stats + 2 * channels + c, *shift = stats + 3 * channels + c;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (fmaf(v[j], scale[j], shift[j]) <= 0) d[j] = 0;
        }
    }
    const float* factor = coefficients + c;
    const float *slope = factor + channels, *offset = slope + channels;
#pragma unroll
    for (int j = 0; j < N; ++j) d[j] = factor[j] * d[j] + (slope[j] * v[j] + offset[j]);
    store(gx + at, d);
}

// g = gy where y is above 0, else 0: the gradient before a ReLU.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    masked(const T* gy, const T* y, T* g, int size) {
    constexpr int N = Vector<T>::N;
    const int i = thread() * N;
    if (i >= size) return;
    float v[N], d[N];
    load(y + i, v);
    load(gy + i, d);
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (v[j] <= 0) d[j] = 0;
    }
    store(g + i, d);
}

// y += x.
template <typename T>
__global__ void __launch_bounds__(THREADS) add(const T* x, T* y, int size) {
    constexpr int N = Vector<T>::N;
    const int i = thread() * N;
    if (i >= size) return;
    float a[N], b[N];
    load(x + i, a);
    load(y + i, b);
#pragma unroll
    for (int j = 0; j < N; ++j) b[j] += a[j];
    store(y + i, b);
}

// gx (rows, channels_in), the gradient of the shortcut's input, from g, that of A(shortcut). Shapes
// are those of `normalize`; rows = N * height_in * width_in.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    shortcut_gradient(const T* g, T* gx, int rows, int channels, int height, int width, int step,
                      int height_in, int width_in, int channels_in) {
    constexpr int N = Vector<T>::N;
    const int groups = channels_in / N;
    const int row = thread() / groups, c = thread() % groups * N;
    if (row >= rows) return;
    const int image = row / (height_in * width_in), pixel = row % (height_in * width_in);
    const int h = pixel / width_in, w = pixel % width_in;
    float v[N] = {};
    if (h % step == 0 && w % step == 0) {
        load(g + (((size_t)image * height + h / step) * width + w / step) * channels + c, v);
    }
    store(gx + (size_t)row * channels_in + c, v);
}

// ---- Between float32, channels first, and T, channels last --------------------------------------

// y (N, height, width, padded) = x (N, channels, height, width) of any strides (in values), with
// channels of zeros appended. Filters (K, C, 3, 3) likewise.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    pack(const float* x, T* y, int size, int channels, int height, int width, int padded,
         int stride_n, int stride_c, int stride_h, int stride_w) {
    const int i = thread();
    if (i >= size) return;
    const int c = i % padded, pixel = i / padded;
    const int w = pixel % width, h = pixel / width % height, n = pixel / width / height;
    float v = 0;
    if (c < channels) v = x[(size_t)n * stride_n + c * stride_c + h * stride_h + w * stride_w];
    y[i] = from_float<T>(v);
}

// y (N, channels, pixels) = x (N, pixels, padded) multiplied by factor, without what was appended.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    unpack(const T* x, float* y, int size, int channels, int pixels, int padded, float factor) {
    const int i = thread();
    if (i >= size) return;
    const int pixel = i % pixels, c = i / pixels % channels, n = i / pixels / channels;
    y[i] = to_float(x[((size_t)n * pixels + pixel) * padded + c]) * factor;
}

// ---- Pooling, linear layer, loss -----------------------------------------------------------------

// y (N, channels) = the mean over the pixels of x (N, pixels, channels).
template <typename T>
__global__ void __launch_bounds__(THREADS)
    average(const T* x, float* y, int size, int channels, int pixels) {
    const int i = thread();
    if (i >= size) return;
    const T* first = x + (size_t)(i / channels) * pixels * channels + i % channels;
    float total = 0;
    for (int pixel = 0; pixel < pixels; ++pixel) total += to_float(first[pixel * channels]);
    y[i] = total / pixels;
}

// gx (N, pixels, channels) = gy (N, channels) times factor at every pixel.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    average_gradient(const float* gy, T* gx, int size, int channels, int pixels, float factor) {
    const int i = thread();
    if (i >= size) return;
    const int image = i / channels / pixels;
    gx[i] = from_float<T>(gy[image * channels + i % channels] * factor);
}

// y (rows, classes) = x (rows, channels) W^T + b.
extern "C" __global__ void __launch_bounds__(THREADS)
    linear(const float* x, const float* W, const float* b, float* y, int rows, int classes,
           int channels) {
    const int i = thread();
    if (i >= rows * classes) return;
    const int row = i / classes, k = i % classes;
    float total = 0;
    for (int c = 0; c < channels; ++c) total += x[row * channels + c] * W[k * channels + c];
    y[i] = total + b[k];
}

// gx (rows, channels) = gy (rows, classes) W.
extern "C" __global__ void __launch_bounds__(THREADS)
    linear_input_gradient(const float* gy, const float* W, float* gx, int rows, int classes,
                          int channels) {
    const int i = thread();
    if (i >= rows * channels) return;
    const int row = i / channels, c = i % channels;
    float total = 0;
    for (int k = 0; k < classes; ++k) total += gy[row * classes + k] * W[k * channels + c];
    gx[i] = total;
}

// gW (classes, channels) = gy^T x and gb (classes,) = the sum of gy over its rows: block
// (k, c) adds its rows, c = channels standing for the bias.
extern "C" __global__ void __launch_bounds__(THREADS)
    linear_gradients(const float* x, const float* gy, float* gW, float* gb, int rows, int classes,
                     int channels) {
    __shared__ float shared[THREADS];
    const int k = blockIdx.x / (channels + 1), c = blockIdx.x % (channels + 1);
    float total = 0;
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        const float g = gy[row * classes + k];
        total += c < channels ? g * x[row * channels + c] : g;
    }
    shared[threadIdx.x] = total;
    sum_lanes<1>(shared, THREADS, 1);
    if (threadIdx.x == 0) {
        if (c < channels) {
            gW[k * channels + c] = shared[0];
        } else {
            gb[k] = shared[0];
        }
    }
}

// Mean cross entropy of logits y (rows, classes) and labels t (rows,), and its gradient g with
// respect to y. A label below 0 is left out, as Chainer does. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(const float* y, const int* t, int rows, int classes, float* loss, float* g) {
    __shared__ float shared[2 * THREADS];
    float total = 0, seen = 0;
    for (int row = threadIdx.x; row < rows; row += THREADS) seen += t[row] >= 0;
    shared[threadIdx.x] = seen;
    sum_lanes<1>(shared, THREADS, 1);
    const float count = shared[0] < 1 ? 1.f : shared[0];
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        const float* logits = y + row * classes;
        float* gradient = g + row * classes;
        float largest = logits[0], sum = 0;
        for (int k = 1; k < classes; ++k) largest = fmaxf(largest, logits[k]);
        for (int k = 0; k < classes; ++k) sum += expf(logits[k] - largest);
        const bool counts = t[row] >= 0;
        if (counts) total += logf(sum) + largest - logits[t[row]];
        for (int k = 0; k < classes; ++k) {
            const float p = expf(logits[k] - largest) / sum;
            gradient[k] = counts ? (p - (k == t[row])) / count : 0.f;
        }
    }
    __syncthreads();  // the count has been read
    shared[threadIdx.x] = total;
    sum_lanes<1>(shared, THREADS, 1);
    if (threadIdx.x == 0) *loss = shared[0] / count;
}

// y = x * factor, the factor on the device.
extern "C" __global__ void __launch_bounds__(THREADS)
    multiply(const float* x, const float* factor, float* y, int size) {
    const int i = thread();
    if (i < size) y[i] = x[i] * *factor;
}

// ---- The step around the network -----------------------------------------------------------------

// v = momentum * v - rate * (g + weight_decay * p); p += v. The rate is on the device, so that a
// captured step can go on with another. Nothing is done if *overflow; it may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    momentum_step(float* p, const float* g, float* v, const float* rate, const int* overflow,
                  float momentum, float weight_decay, int size) {
    const int i = thread();
    if (i >= size || (overflow && *overflow)) return;
    const float velocity = momentum * v[i] - *rate * (g[i] + weight_decay * p[i]);
    v[i] = velocity;
    p[i] += velocity;
}

// Set *overflow if a gradient is infinite or no number. All that write, write the same.
extern "C" __global__ void __launch_bounds__(THREADS)
    find_overflow(const float* g, int* overflow, int size) {
    const int i = thread();
    if (i < size && !isfinite(g[i])) *overflow = 1;
}

// Count a step that was skipped, and be ready for the next one.
extern "C" __global__ void __launch_bounds__(THREADS)
    count_overflow(int* overflow, long long* skipped) {
    if (thread() > 0) return;
    *skipped += *overflow;
    *overflow = 0;
}

// resnet.random.bits, one key more.
__device__ inline unsigned long long mix(unsigned long long bits, unsigned long long key) {
    unsigned long long h = bits + key + 0x9E3779B97F4A7C15ull;
    h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9ull;
    h = (h ^ (h >> 27)) * 0x94D049BB133111EBull;
    return h ^ (h >> 31);
}

// A pixel in 0..1 without its mean, bit for bit as resnet.batches.Images has it.
__device__ inline float centred(float pixel, float mean) {
    return __fsub_rn(__fmul_rn(pixel, 1.f / 255), mean);  // no fused multiply-add
}

// The batch of `iteration`, augmented: x (batchsize, height, width, channels) and labels t, bit for
// bit as resnet.batches.Batches has it. images are uint8 (size, channels, height,
// width); orders (2, size) are the random orders of the passes over the images, that of pass e in
// row e % 2; `purpose` is resnet.random.AUGMENT.
extern "C" __global__ void __launch_bounds__(THREADS)
    augment(const unsigned char* images, const int* labels, const float* mean,
            const long long* orders, const long long* iteration, float* x, int* t, int batchsize,
            int size, int channels, int height, int width, int padding, long long seed,
            int purpose) {
    const int i = thread();
    const int pixels = height * width;
    if (i >= batchsize * pixels) return;
    const int position = i / pixels, h = i % pixels / width, w = i % width;
    const long long place = *iteration * batchsize + position;
    const long long image = orders[place / size % 2 * size + place % size];
    const unsigned long long bits = mix(mix(mix(mix(0, seed), purpose), *iteration), position);
    const unsigned offsets = 2 * padding + 1;
    const unsigned draw = (bits >> 32) * (2 * offsets * offsets) >> 32;
    const int top = draw / 2 / offsets, left = draw / 2 % offsets;
    const int row = h + top - padding;
    const int column = (draw % 2 ? width - 1 - w : w) + left - padding;
    const bool inside = row >= 0 && row < height && column >= 0 && column < width;
    for (int c = 0; c < channels; ++c) {
        const int at = (c * height + row) * width + column;
        x[(size_t)i * channels + c] =
            inside ? centred(images[image * channels * pixels + at], mean[at]) : 0.f;
    }
    if (i % pixels == 0) t[position] = labels[image];
}

// Images number iteration * batchsize and so on as they are, to be evaluated; arrays as for augment.
extern "C" __global__ void __launch_bounds__(THREADS)
    centre(const unsigned char* images, const int* labels, const float* mean,
           const long long* iteration, float* x, int* t, int batchsize, int channels, int pixels) {
    const int i = thread();
    if (i >= batchsize * pixels) return;
    const int pixel = i % pixels;
    const long long image = *iteration * batchsize + i / pixels;
    const unsigned char* from = images + image * channels * pixels;
#pragma unroll 1  // unrolled, it needs more registers than it is given
    for (int c = 0; c < channels; ++c) {
        const int at = c * pixels + pixel;
        x[(size_t)i * channels + c] = centred(from[at], mean[at]);
    }
    if (pixel == 0) t[i / pixels] = labels[image];
}

// The end of a step: loss and number of right answers of a batch, added to what is there, and the
// iteration, counted on. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish_step(const float* y, const int* t, const float* loss, int rows, int classes,
                double* loss_sum, long long* correct_sum, long long* iteration) {
    __shared__ int shared[THREADS];
    int correct = 0;
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        const float* logits = y + row * classes;
        int best = 0;  // the first of the largest, or the first that is no number, as in NumPy
        for (int k = 1; k < classes; ++k) {
            if (logits[k] > logits[best] || (isnan(logits[k]) && !isnan(logits[best]))) best = k;
        }
        correct += best == t[row];
    }
    shared[threadIdx.x] = correct;
    sum_lanes<1>(shared, THREADS, 1);
    if (threadIdx.x == 0) {
        *loss_sum += *loss;
        *correct_sum += shared[0];
        *iteration += 1;
    }
}
