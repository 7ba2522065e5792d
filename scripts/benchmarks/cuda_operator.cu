// Multi-scale deformable sampling as a plain CUDA operator, in the manner of the original one: the peer that the Pallas
// kernels are timed against. The type of values is chosen when this is compiled (VALUES_BFLOAT16); sums are float32.
// A warp is one (query, head): its threads are the channels, so a head has 32 of them.
//
//   value [B, S, H, 32], locations [B, Q, H, L, P, 2], weights [B, Q, H, L, P], out and gradient [B, Q, H, 32]
//   levels [L, 3]: height, width and first token of each level

#ifdef VALUES_BFLOAT16
typedef unsigned short Value;
__device__ __forceinline__ float widen(Value x) { return __uint_as_float((unsigned)x << 16); }
__device__ __forceinline__ Value narrow(float x) {
  unsigned bits = __float_as_uint(x);
  // To the nearest, ties to even.
  return (Value)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
typedef float Value;
__device__ __forceinline__ float widen(Value x) { return x; }
__device__ __forceinline__ Value narrow(float x) { return x; }
#endif

struct Sizes {
  int batch, tokens, queries, heads, levels, points;
};

// The four pixels around a place on a level: weights along each axis, and rows of the value table, or -1 outside.
struct Corners {
  float across[2], down[2];
  long long row[2][2];

  __device__ Corners(const Sizes& sizes, const int* level, int image, int head, float x, float y) {
    int height = level[0], width = level[1];
    float px = x * width - 0.5f, py = y * height - 0.5f;
    int x0 = (int)floorf(px), y0 = (int)floorf(py);
    across[1] = px - x0, across[0] = 1.0f - across[1];
    down[1] = py - y0, down[0] = 1.0f - down[1];
    bool near = px > -1.0f && py > -1.0f && px < width && py < height;
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 2; ++i) {
        bool inside = near && x0 + i >= 0 && x0 + i < width && y0 + j >= 0 && y0 + j < height;
        long long token = (long long)image * sizes.tokens + level[2] + (long long)(y0 + j) * width + x0 + i;
        row[j][i] = inside ? token * sizes.heads + head : -1;
      }
  }
};

extern "C" __global__ void forward(int batch, int tokens, int queries, int heads, int level_count, int points,
                                   const int* levels, const Value* value, const float* locations, const float* weights,
                                   Value* out) {
  Sizes sizes = {batch, tokens, queries, heads, level_count, points};
  long long warp = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  int lane = threadIdx.x % 32;
  if (warp >= (long long)sizes.batch * sizes.queries * sizes.heads) return;
  int head = warp % sizes.heads, image = warp / ((long long)sizes.heads * sizes.queries);
  float total = 0.0f;
  for (int sample = 0; sample < sizes.levels * sizes.points; ++sample) {
    long long place = warp * sizes.levels * sizes.points + sample;
    Corners corners(sizes, levels + 3 * (sample / sizes.points), image, head, locations[2 * place], locations[2 * place + 1]);
    float weight = weights[place];
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 2; ++i)
        if (corners.row[j][i] >= 0)
          total += weight * corners.down[j] * corners.across[i] * widen(value[corners.row[j][i] * 32 + lane]);
  }
  out[warp * 32 + lane] = narrow(total);
}

__device__ __forceinline__ float sum_over_warp(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

extern "C" __global__ void backward(int batch, int tokens, int queries, int heads, int level_count, int points,
                                    const int* levels, const Value* value, const float* locations, const float* weights,
                                    const Value* gradient, float* grad_value, float* grad_locations, float* grad_weights) {
  Sizes sizes = {batch, tokens, queries, heads, level_count, points};
  long long warp = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  int lane = threadIdx.x % 32;
  if (warp >= (long long)sizes.batch * sizes.queries * sizes.heads) return;
  int head = warp % sizes.heads, image = warp / ((long long)sizes.heads * sizes.queries);
  float own = widen(gradient[warp * 32 + lane]);
  for (int sample = 0; sample < sizes.levels * sizes.points; ++sample) {
    long long place = warp * sizes.levels * sizes.points + sample;
    const int* level = levels + 3 * (sample / sizes.points);
    Corners corners(sizes, level, image, head, locations[2 * place], locations[2 * place + 1]);
    float weight = weights[place], of_x = 0.0f, of_y = 0.0f, of_weight = 0.0f;
    for (int j = 0; j < 2; ++j)
      for (int i = 0; i < 2; ++i)
        if (corners.row[j][i] >= 0) {
          long long where = corners.row[j][i] * 32 + lane;
          float product = widen(value[where]) * own;
          of_weight += corners.down[j] * corners.across[i] * product;
          of_x += (i ? 1.0f : -1.0f) * corners.down[j] * product;
          of_y += (j ? 1.0f : -1.0f) * corners.across[i] * product;
          atomicAdd(grad_value + where, weight * corners.down[j] * corners.across[i] * own);
        }
    of_x = sum_over_warp(of_x), of_y = sum_over_warp(of_y), of_weight = sum_over_warp(of_weight);
    if (lane == 0) {
      grad_locations[2 * place] = of_x * weight * level[1];
      grad_locations[2 * place + 1] = of_y * weight * level[0];
      grad_weights[place] = of_weight;
    }
  }
}
