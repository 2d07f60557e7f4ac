// Calls the kernels of one instruction-set level (csrc/cpu/kernels.cpp) with random odd sizes and compares them with
// plain loops in float64; for sanitizers and mutants, without PyTorch.
//
// Every array is a heap block of exactly its size, at times one element off alignment; the gaps between strided rows,
// outputs and workspaces start as NaN. Threads are fresh std::threads. Usage: driver SEED CASES [OPERATION]. Exit code 3
// and a line with the operation and its sizes: a result is wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

#define VF_TABLE_(level) kernels_##level
#define VF_TABLE(level) VF_TABLE_(level)

namespace vit_fast {
extern const Kernels VF_TABLE(VF_LEVEL);
}

using namespace vit_fast;
using Doubles = std::vector<double>;

static const Kernels& table = VF_TABLE(VF_LEVEL);
static uint64_t state;
static std::string sizes;  // of the case that runs

static int64_t integer(int64_t first, int64_t last) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return first + static_cast<int64_t>((state >> 11) % static_cast<uint64_t>(last - first + 1));
}
static bool chance() { return integer(0, 1); }
static double uniform() { return integer(0, 1 << 24) / double(1 << 23) - 1; }
static double normal() { return (uniform() + uniform() + uniform()) * 1.0; }
template <class T>
static T one_of(std::vector<T> values) {
  return values[integer(0, static_cast<int64_t>(values.size()) - 1)];
}
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t size_of(Type type) {
  return type == Type::float32 ? 4 : type == Type::float16 || type == Type::bfloat16 ? 2 : 1;
}

static double get(const void* p, Type type, int64_t i) {
  const char* at = static_cast<const char*>(p) + i * size_of(type);
  if (type == Type::float32) {
    float x;
    memcpy(&x, at, 4);
    return x;
  }
  if (type == Type::float16) {
    _Float16 x;
    memcpy(&x, at, 2);
    return static_cast<double>(static_cast<float>(x));
  }
  if (type == Type::bfloat16) {
    uint16_t half;
    memcpy(&half, at, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
  return type == Type::int8 ? *reinterpret_cast<const int8_t*>(at) : *reinterpret_cast<const uint8_t*>(at);
}

static void set(void* p, Type type, int64_t i, double value) {
  char* at = static_cast<char*>(p) + i * size_of(type);
  if (type == Type::float32) {
    const float x = static_cast<float>(value);
    memcpy(at, &x, 4);
  } else if (type == Type::float16) {
    const _Float16 x = static_cast<_Float16>(static_cast<float>(value));
    memcpy(at, &x, 2);
  } else if (type == Type::bfloat16) {
    const float x = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t half = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    memcpy(at, &half, 2);
  } else if (type == Type::int8) {
    *reinterpret_cast<int8_t*>(at) = static_cast<int8_t>(value);
  } else {
    *reinterpret_cast<uint8_t*>(at) = static_cast<uint8_t>(value);
  }
}

// A heap block of exactly `count` elements, all bits set: NaN.
class Array {
 public:
  Array(Type type, int64_t count, int64_t offset = 0) : type_(type) {
    const size_t bytes = (count + offset) * size_of(type);
    block_ = static_cast<char*>(malloc(bytes ? bytes : 1));
    memset(block_, 0xff, bytes ? bytes : 1);
    first_ = block_ + offset * size_of(type);
  }
  Array(Array&& other) : type_(other.type_), block_(other.block_), first_(other.first_) { other.block_ = nullptr; }
  Array(const Array&) = delete;
  ~Array() { free(block_); }
  void* data() const { return first_; }
  float* floats() const { return reinterpret_cast<float*>(first_); }
  double operator[](int64_t i) const { return get(first_, type_, i); }
  void put(int64_t i, double value) { set(first_, type_, i, value); }
  Type type() const { return type_; }

 private:
  Type type_;
  char *block_, *first_;
};

// Random rows at a stride; the last row ends where the block does.
struct Rows {
  int64_t stride;
  Array array;
  Rows(Type type, int64_t rows, int64_t width, double spread = 1, double mean = 0)
      : stride(width + one_of<int64_t>({0, 0, 1, 5})),
        array(type, rows ? (rows - 1) * stride + width : 0, integer(0, 1)) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = 0; i < width; i++) array.put(r * stride + i, mean + spread * normal());
  }
  double at(int64_t row, int64_t i) const { return array[row * stride + i]; }
};

static Array vector(Type type, int64_t count, double spread = 1, double mean = 0) {
  Array out(type, count, integer(0, 1));
  for (int64_t i = 0; i < count; i++) out.put(i, mean + spread * normal());
  return out;
}

struct Workspace {
  void* data;
  explicit Workspace(int64_t bytes) {
    if (posix_memalign(&data, 64, bytes ? bytes : 1)) abort();
    memset(data, 0xff, bytes);
  }
  ~Workspace() { free(data); }
};

static Pool pool() {
  return {integer(1, 3), [](void (*body)(void*, int64_t), void* context, int64_t slots) {
            std::vector<std::thread> threads;
            for (int64_t slot = 0; slot < slots; slot++) threads.emplace_back(body, context, slot);
            for (auto& thread : threads) thread.join();
          }};
}

static double tolerance(Type type) {
  return type == Type::float32 ? 1e-5 : type == Type::float16 ? 2e-3 : 1.5e-2;
}

// `largest`: of the terms that cancel, where they are larger than every value.
static void compare(const char* what, const Doubles& actual, const Doubles& golden, double allowed,
                    double largest = 1e-3) {
  for (double g : golden) largest = std::fmax(largest, std::fabs(g));
  for (size_t i = 0; i < golden.size(); i++)
    if (!(std::fabs(actual[i] - golden[i]) <= allowed * largest)) {
      printf("wrong: %s [%zu] is %.9g, expected %.9g; %s\n", what, i, actual[i], golden[i], sizes.c_str());
      exit(3);
    }
}

static Doubles values(const Array& array, int64_t count) {
  Doubles out(count);
  for (int64_t i = 0; i < count; i++) out[i] = array[i];
  return out;
}

static Type float_type() { return one_of<Type>({Type::float32, Type::float16, Type::bfloat16}); }
static int64_t odd_size(int64_t last) { return integer(1, chance() ? last : 9); }
static int64_t head_size() { return integer(0, 4) ? odd_size(70) : one_of<int64_t>({32, 64, 80, 96, 127, 128, 257}); }

template <class... T>
static void note(const char* operation, T... numbers) {
  sizes = operation;
  ((sizes += " " + std::to_string(static_cast<int64_t>(numbers))), ...);
}

// The formulas.

static double activated(double z, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return z / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case Activation::quick_gelu:
      return z / (1 + std::exp(-1.702 * z));
    case Activation::relu:
      return z > 0 ? z : 0;
    case Activation::silu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

static Doubles normalised(const Doubles& x, double eps, bool rms = false, double* mean_out = nullptr,
                          double* rstd_out = nullptr) {
  double mean = 0, square = 0;
  for (double v : x) mean += rms ? 0 : v / x.size();
  for (double v : x) square += (v - mean) * (v - mean) / x.size();
  const double rstd = 1 / std::sqrt(square + eps);
  Doubles out;
  for (double v : x) out.push_back((v - mean) * rstd);
  if (mean_out) *mean_out = mean, *rstd_out = rstd;
  return out;
}

// weight(n, k), bias(n)
template <class Weight, class Bias>
static Doubles affine(const Doubles& x, int64_t features, const Weight& weight, const Bias& bias) {
  Doubles out(features);
  for (int64_t n = 0; n < features; n++) {
    out[n] = bias(n);
    for (size_t k = 0; k < x.size(); k++) out[n] += x[k] * weight(n, static_cast<int64_t>(k));
  }
  return out;
}

static Doubles activated(const Doubles& z, Activation activation) {
  Doubles out;
  const size_t half = z.size() / 2;
  if (vit_fast::is_gated(activation))
    for (size_t i = 0; i < half; i++) out.push_back(activated(z[i], vit_fast::of_gate(activation)) * z[half + i]);
  else
    for (double v : z) out.push_back(activated(v, activation));
  return out;
}

// Philox4x32-10, one counter at a time: 1/(1 − p) where an element is kept, else 0.
static double mask_of(const Dropout& drop, int64_t index) {
  if (!drop.given) return 1;
  uint32_t c[4] = {static_cast<uint32_t>(index), static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(drop.seed), static_cast<uint32_t>(static_cast<uint64_t>(drop.seed) >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    memcpy(c, next, sizeof(c));
    k[0] += 0x9E3779B9, k[1] += 0xBB67AE85;
  }
  const int32_t word = static_cast<int32_t>(c[0]);
  const float uniform = static_cast<float>(word < 0 ? -word - 1 : word) * 4.6566127342e-10f;
  return uniform > drop.p ? 1 / (1 - static_cast<double>(drop.p)) : 0;
}

static Dropout dropout() {
  const float p = one_of<float>({0.1f, 0.5f, 0.9f});
  return {integer(-(int64_t(1) << 50), int64_t(1) << 50), p, 1 / (1 - p), true};
}

// The operations.

static void run_keep_mask() {
  KeepMask m{dropout(), integer(0, 9) ? integer(0, 70) : one_of<int64_t>({16383, 16384, 16385, 40000}), nullptr, pool()};
  note("keep_mask", m.count);
  Array keep(Type::uint8, m.count, integer(0, 1));
  m.keep = static_cast<uint8_t*>(keep.data());
  table.keep_mask(m);
  Doubles golden;
  for (int64_t i = 0; i < m.count; i++) golden.push_back(mask_of(m.dropout, i) > 0);
  compare("keep", values(keep, m.count), golden, 0);
}

// q, k and v of attention: each of its own, or the thirds of one tensor.
struct AttentionInputs {
  Type type;
  bool packed, many;  // many: more keys than a block of them
  int64_t batch, num_heads, queries, keys, size, width;
  float scale;
  Rows q, k, v;
  Doubles plain[3];  // [tokens, width] of each

  explicit AttentionInputs(int64_t most_queries)
      : type(float_type()), packed(chance()), many(integer(0, 9) == 0), batch(many ? 1 : integer(1, 2)),
        num_heads(many ? 1 : integer(1, 3)), queries(odd_size(most_queries)),
        keys(many ? one_of<int64_t>({511, 512, 513, 1025}) : odd_size(70)), size(many ? odd_size(40) : head_size()),
        width(num_heads * size),
        scale(one_of<float>({0.5f, -0.3f, 0.0f, 1.0f}) / std::sqrt(static_cast<float>(size))),
        q(type, batch * tokens(0), packed ? 3 * width : width, one_of<double>({1, 4})),
        k(type, packed ? 0 : batch * keys, width, one_of<double>({1, 4})), v(type, packed ? 0 : batch * keys, width) {
    if (packed) queries = keys;
    for (int i = 0; i < 3; i++)
      for (int64_t row = 0; row < batch * tokens(i); row++)
        for (int64_t column = 0; column < width; column++) plain[i].push_back(rows(i).at(row, first(i) + column));
  }

  int64_t tokens(int which) const { return which || packed ? keys : queries; }
  const Rows& rows(int which) const { return packed || which == 0 ? q : which == 1 ? k : v; }
  int64_t first(int which) const { return packed ? which * width : 0; }
  double at(int which, int64_t b, int64_t token, int64_t column) const {
    return plain[which][(b * tokens(which) + token) * width + column];
  }
  template <class Call>
  void give(Call& a) {
    a.type = type, a.pool = pool(), a.scale = scale;
    a.batch = batch, a.num_heads = num_heads, a.queries = queries, a.keys = keys, a.head_size = size;
    const void** data[] = {&a.q, &a.k, &a.v};
    int64_t* strides[] = {a.q_stride, a.k_stride, a.v_stride};
    for (int i = 0; i < 3; i++) {
      *data[i] = static_cast<char*>(rows(i).array.data()) + first(i) * size_of(type);
      strides[i][0] = tokens(i) * rows(i).stride, strides[i][1] = rows(i).stride;
    }
  }
  // The probabilities of a query, and the logarithm of their sum before they are divided by it.
  Doubles softmax(int64_t b, int64_t head, int64_t query, double& lse) const {
    Doubles weights(keys);
    double top = -INFINITY, total = 0;
    for (int64_t j = 0; j < keys; j++) {
      for (int64_t d = head * size; d < (head + 1) * size; d++) weights[j] += scale * at(0, b, query, d) * at(1, b, j, d);
      top = std::fmax(top, weights[j]);
    }
    for (double& w : weights) total += w = std::exp(w - top);
    for (double& w : weights) w /= total;
    lse = top + std::log(total);
    return weights;
  }
};

static void run_attention() {
  AttentionInputs in(40);
  Attention a{};
  in.give(a);
  if (chance()) a.dropout = dropout();
  note("attention", static_cast<int>(a.type), in.packed, a.batch, a.num_heads, a.queries, a.keys, a.head_size,
       a.dropout.given);
  Array out(a.type, a.batch * a.queries * in.width), lse(Type::float32, a.batch * a.num_heads * a.queries);
  a.out = out.data(), a.lse = chance() ? lse.floats() : nullptr;
  Workspace workspace(table.attention_workspace(a));
  a.workspace = workspace.data;
  table.attention(a);
  Doubles golden(a.batch * a.queries * in.width), golden_lse(a.batch * a.num_heads * a.queries);
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t h = 0; h < a.num_heads; h++)
      for (int64_t i = 0; i < a.queries; i++) {
        const int64_t row = (b * a.num_heads + h) * a.queries + i;
        const Doubles weights = in.softmax(b, h, i, golden_lse[row]);
        for (int64_t d = h * a.head_size; d < (h + 1) * a.head_size; d++)
          for (int64_t j = 0; j < a.keys; j++)
            golden[(b * a.queries + i) * in.width + d] +=
                weights[j] * mask_of(a.dropout, row * a.keys + j) * in.at(2, b, j, d);
      }
  compare("out", values(out, golden.size()), golden, 2 * tolerance(a.type));
  if (a.lse) compare("lse", values(lse, golden_lse.size()), golden_lse, 1e-5);
}

static void run_attention_bwd() {
  AttentionInputs in(70);
  AttentionBackward g{};
  in.give(g);
  if (chance()) g.dropout = dropout();
  note("attention_bwd", static_cast<int>(g.type), in.packed, g.batch, g.num_heads, g.queries, g.keys, g.head_size,
       g.dropout.given);
  const int64_t rows = g.batch * g.queries;
  Rows out(g.type, rows, in.width), grad(g.type, rows, in.width);
  Array lse(Type::float32, g.batch * g.num_heads * g.queries, integer(0, 1));
  // dq, dk and dv as the inputs are: each of its own, or the thirds of one tensor.
  Array separate[] = {Array(g.type, g.batch * in.tokens(0) * in.q.stride, integer(0, 1)),
                      Array(g.type, in.packed ? 0 : g.batch * g.keys * in.k.stride, integer(0, 1)),
                      Array(g.type, in.packed ? 0 : g.batch * g.keys * in.v.stride, integer(0, 1))};
  void** grads[] = {&g.dq, &g.dk, &g.dv};
  int64_t* strides[] = {g.dq_stride, g.dk_stride, g.dv_stride};
  for (int i = 0; i < 3; i++) {
    *grads[i] = static_cast<char*>(separate[in.packed ? 0 : i].data()) + in.first(i) * size_of(g.type);
    strides[i][0] = in.tokens(i) * in.rows(i).stride, strides[i][1] = in.rows(i).stride;
  }
  Doubles golden[3];
  double largest[] = {1e-3, 1e-3, 1e-3};
  for (int i = 0; i < 3; i++) golden[i].resize(g.batch * in.tokens(i) * in.width);
  for (int64_t b = 0; b < g.batch; b++)
    for (int64_t h = 0; h < g.num_heads; h++)
      for (int64_t i = 0; i < g.queries; i++) {
        const int64_t row = (b * g.num_heads + h) * g.queries + i, first = h * g.head_size, last = first + g.head_size;
        double log_sum, delta = 0;
        const Doubles weights = in.softmax(b, h, i, log_sum);
        Doubles masked(g.keys), product(g.keys);  // of the probabilities; of grad and v
        lse.put(row, log_sum);
        for (int64_t j = 0; j < g.keys; j++) masked[j] = mask_of(g.dropout, row * g.keys + j);
        for (int64_t d = first; d < last; d++) {
          double value = 0;
          const double dout = grad.at(b * g.queries + i, d);
          for (int64_t j = 0; j < g.keys; j++) {
            value += weights[j] * masked[j] * in.at(2, b, j, d);
            product[j] += dout * in.at(2, b, j, d) * masked[j];
            golden[2][(b * g.keys + j) * in.width + d] += weights[j] * masked[j] * dout;
          }
          out.array.put((b * g.queries + i) * out.stride + d, value);
          delta += dout * value;
        }
        for (int64_t j = 0; j < g.keys; j++) {
          const double score = g.scale * weights[j] * (product[j] - delta);
          const double terms = std::fabs(g.scale * weights[j]) * (std::fabs(product[j]) + std::fabs(delta));
          for (int64_t d = first; d < last; d++) {
            largest[0] = std::fmax(largest[0], terms * std::fabs(in.at(1, b, j, d)));
            largest[1] = std::fmax(largest[1], terms * std::fabs(in.at(0, b, i, d)));
            golden[0][(b * g.queries + i) * in.width + d] += score * in.at(1, b, j, d);
            golden[1][(b * g.keys + j) * in.width + d] += score * in.at(0, b, i, d);
          }
        }
      }
  g.out = out.array.data(), g.grad = grad.array.data(), g.lse = lse.floats();
  g.out_stride[0] = g.queries * out.stride, g.out_stride[1] = out.stride;
  g.grad_stride[0] = g.queries * grad.stride, g.grad_stride[1] = grad.stride;
  Workspace workspace(table.attention_bwd_workspace(g));
  g.workspace = workspace.data;
  table.attention_bwd(g);
  const char* names[] = {"dq", "dk", "dv"};
  for (int i = 0; i < 3; i++) {
    Doubles actual;
    for (int64_t r = 0; r < g.batch * in.tokens(i); r++)
      for (int64_t c = 0; c < in.width; c++)
        actual.push_back(separate[in.packed ? 0 : i][r * in.rows(i).stride + in.first(i) + c]);
    compare(names[i], actual, golden[i], 4 * tolerance(g.type), largest[i]);
  }
}

static void run_layer_norm() {
  LayerNorm n{};
  n.type = float_type(), n.out_type = chance() ? n.type : float_type(), n.pool = pool();
  n.rows = integer(0, 3) ? odd_size(50) : integer(200, 400), n.width = 3 + odd_size(200), n.eps = 1e-6f;
  n.rms = chance();
  note("layer_norm", static_cast<int>(n.type), static_cast<int>(n.out_type), n.rms, n.rows, n.width);
  Rows x(n.type, n.rows, n.width, 1, one_of<double>({0, 3}));
  Array weight = vector(Type::float32, n.width), bias = vector(Type::float32, n.width);
  Array out(n.out_type, n.rows * n.width), mean(Type::float32, n.rows), rstd(Type::float32, n.rows);
  const bool with_weight = chance(), with_bias = chance(), with_stats = chance();
  n.x = x.array.data(), n.stride = x.stride, n.out = out.data();
  n.weight = with_weight ? weight.floats() : nullptr, n.bias = with_bias ? bias.floats() : nullptr;
  n.mean = with_stats ? mean.floats() : nullptr, n.rstd = with_stats ? rstd.floats() : nullptr;
  table.layer_norm(n);
  Doubles golden, means(n.rows), rstds(n.rows);
  for (int64_t r = 0; r < n.rows; r++) {
    Doubles row;
    for (int64_t i = 0; i < n.width; i++) row.push_back(x.at(r, i));
    row = normalised(row, n.eps, n.rms, &means[r], &rstds[r]);
    for (int64_t i = 0; i < n.width; i++)
      golden.push_back(row[i] * (with_weight ? weight[i] : 1) + (with_bias ? bias[i] : 0));
  }
  compare("out", values(out, golden.size()), golden, tolerance(n.out_type));
  if (with_stats) compare("mean", values(mean, n.rows), means, 1e-5), compare("rstd", values(rstd, n.rows), rstds, 1e-5);
}

static void run_layer_norm_bwd() {
  LayerNormBackward n{};
  n.type = float_type(), n.pool = pool(), n.rms = chance();
  n.rows = integer(0, 3) ? odd_size(70) : integer(200, 400), n.width = 3 + odd_size(200);
  note("layer_norm_bwd", static_cast<int>(n.type), n.rms, n.rows, n.width);
  const Rows x(n.type, n.rows, n.width, 1, one_of<double>({0, 3})), grad(n.type, n.rows, n.width);
  const Array weight = vector(Type::float32, n.width);
  Array mean(Type::float32, n.rows, integer(0, 1)), rstd(Type::float32, n.rows, integer(0, 1));
  const Array dx(n.type, n.rows * n.width, integer(0, 1)), dweight(Type::float32, n.width, integer(0, 1));
  const Array dbias(Type::float32, n.width, integer(0, 1));
  const bool with_weight = chance();
  Doubles golden, dweights(n.width), dbiases(n.width);
  for (int64_t r = 0; r < n.rows; r++) {
    Doubles row, dn;
    double row_mean, row_rstd, total = 0, projected = 0;
    for (int64_t i = 0; i < n.width; i++) row.push_back(x.at(r, i));
    row = normalised(row, 1e-6, n.rms, &row_mean, &row_rstd);
    mean.put(r, row_mean), rstd.put(r, row_rstd);
    for (int64_t i = 0; i < n.width; i++) {
      const double dy = grad.at(r, i);
      dweights[i] += dy * row[i], dbiases[i] += dy;
      dn.push_back(with_weight ? dy * weight[i] : dy);
      total += n.rms ? 0 : dn[i] / n.width, projected += dn[i] * row[i] / n.width;
    }
    for (int64_t i = 0; i < n.width; i++) golden.push_back(row_rstd * (dn[i] - total - row[i] * projected));
  }
  n.x = x.array.data(), n.stride = x.stride, n.grad = grad.array.data(), n.grad_stride = grad.stride;
  n.weight = with_weight ? weight.floats() : nullptr, n.mean = mean.floats(), n.rstd = rstd.floats();
  n.dx = dx.data(), n.dweight = dweight.floats(), n.dbias = dbias.floats();
  const Workspace workspace(table.layer_norm_bwd_workspace(n));
  n.workspace = workspace.data;
  table.layer_norm_bwd(n);
  compare("dx", values(dx, golden.size()), golden, 2 * tolerance(n.type));
  compare("dweight", values(dweight, n.width), dweights, 1e-5);
  compare("dbias", values(dbias, n.width), dbiases, 1e-5);
}

static void run_linear() {
  Linear l{};
  l.type = float_type(), l.pool = pool(), l.normalise = chance(), l.rms = chance(), l.eps = 1e-6f;
  Weight& w = l.weight;
  w.type = chance() ? l.type : float_type();
  w.width = integer(0, 6) ? 3 + odd_size(100) : one_of<int64_t>({255, 256, 257, 700});
  l.rows = odd_size(140);
  const bool with_residual = !l.normalise && chance(), with_bias = chance(), with_gamma = chance(), with_scale = chance();
  if (!with_residual)
    l.activation = static_cast<Activation>(integer(0, 8));
  const bool gated = vit_fast::is_gated(l.activation);
  const int64_t features = odd_size(90);
  w.features = gated ? 2 * features : features;
  l.out_type = w.type;
  note("linear", static_cast<int>(l.type), static_cast<int>(w.type), static_cast<int>(l.activation), l.normalise, l.rms,
       with_residual, l.rows, w.width, w.features);
  Rows x(l.type, l.rows, w.width), weight(w.type, w.features, w.width, 1 / std::sqrt(w.width));
  Array bias = vector(Type::float32, w.features), gamma = vector(Type::float32, features);
  Array ln_weight = vector(Type::float32, w.width), ln_bias = vector(Type::float32, w.width);
  Array mean(Type::float32, l.rows), rstd(Type::float32, l.rows), out(l.out_type, l.rows * features);
  l.rows_per_scale = l.rows % 3 ? l.rows : l.rows / 3;
  Array row_scale = vector(Type::float32, l.rows / l.rows_per_scale), residual = vector(l.out_type, l.rows * features);
  const bool affine_norm = chance(), with_stats = l.normalise && chance(), with_z = !with_residual && chance();
  Array z(l.out_type, with_z ? l.rows * w.features : 0);
  l.x = x.array.data(), l.stride = x.stride, l.out = out.data();
  w.data = weight.array.data(), w.stride = weight.stride, w.bias = with_bias ? bias.floats() : nullptr;
  if (affine_norm) l.ln_weight = ln_weight.floats(), l.ln_bias = ln_bias.floats();
  if (with_stats) l.mean = mean.floats(), l.rstd = rstd.floats();
  if (with_z) l.z = z.data();
  if (with_residual) {
    l.residual = residual.data();
    if (chance()) l.dropout = dropout();
    l.gamma = with_gamma ? gamma.floats() : nullptr, l.row_scale = with_scale ? row_scale.floats() : nullptr;
  }
  Workspace workspace(table.linear_workspace(l));
  l.workspace = workspace.data;
  table.linear(l);
  Doubles golden, means(l.rows), rstds(l.rows), zs;
  for (int64_t r = 0; r < l.rows; r++) {
    Doubles row;
    for (int64_t i = 0; i < w.width; i++) row.push_back(x.at(r, i));
    if (l.normalise) {
      row = normalised(row, l.eps, l.rms, &means[r], &rstds[r]);
      for (int64_t i = 0; affine_norm && i < w.width; i++) row[i] = row[i] * ln_weight[i] + ln_bias[i];
    }
    row = affine(row, w.features, [&](int64_t n, int64_t k) { return weight.at(n, k); },
                 [&](int64_t n) { return with_bias ? bias[n] : 0; });
    zs.insert(zs.end(), row.begin(), row.end());
    row = activated(row, l.activation);
    for (int64_t n = 0; n < features; n++) {
      double value = row[n] * mask_of(l.dropout, r * features + n);
      if (l.gamma) value *= gamma[n];
      if (l.row_scale) value *= row_scale[r / l.rows_per_scale];
      golden.push_back(with_residual ? residual[r * features + n] + value : value);
    }
  }
  compare("out", values(out, golden.size()), golden, 2 * tolerance(w.type));
  if (with_z) compare("z", values(z, zs.size()), zs, 2 * tolerance(w.type));
  if (with_stats) compare("mean", values(mean, l.rows), means, 1e-5), compare("rstd", values(rstd, l.rows), rstds, 1e-5);
}

static void run_patch_embed() {
  PatchEmbed p{};
  p.type = chance() ? Type::uint8 : float_type(), p.pool = pool();
  p.batch = integer(1, 3), p.channels = integer(1, 4);
  int64_t image[2];
  for (int i = 0; i < 2; i++) {
    p.patch[i] = odd_size(17), p.step[i] = integer(1, p.patch[i] + 2), p.grid[i] = integer(1, 4);
    image[i] = p.patch[i] + (p.grid[i] - 1) * p.step[i];
  }
  Weight& w = p.weight;
  w.type = p.out_type = float_type();
  w.features = odd_size(70), w.width = w.stride = p.channels * p.patch[0] * p.patch[1];
  p.prefix = integer(0, 2);
  const bool last = chance(), per_image = chance(), with_bias = chance(), with_pos = chance(), with_mean = chance();
  note("patch_embed", static_cast<int>(p.type), static_cast<int>(w.type), p.batch, p.channels, image[0], image[1],
       p.patch[0], p.patch[1], p.step[0], p.step[1], w.features, p.prefix, last);
  const int64_t patches = p.grid[0] * p.grid[1], pixels = image[0] * image[1];
  p.stride[0] = p.channels * pixels, p.stride[1] = last ? 1 : pixels;
  p.stride[2] = last ? image[1] * p.channels : image[1], p.stride[3] = last ? p.channels : 1;
  Array images(p.type, p.batch * p.stride[0], integer(0, 1));
  for (int64_t i = 0; i < p.batch * p.stride[0]; i++)
    images.put(i, p.type == Type::uint8 ? static_cast<double>(integer(0, 255)) : normal());
  Array weight = vector(w.type, w.features * w.width, 1 / std::sqrt(w.width)), bias = vector(Type::float32, w.features);
  Array pos = vector(Type::float32, patches * w.features), mean = vector(Type::float32, p.channels);
  Array std_dev = vector(Type::float32, p.channels, 0.1, 1);
  Array prefix = vector(w.type, (per_image ? p.batch : 1) * p.prefix * w.features);
  Array out(w.type, p.batch * (p.prefix + patches) * w.features);
  p.images = images.data(), p.out = out.data(), w.data = weight.data(), w.bias = with_bias ? bias.floats() : nullptr;
  p.pos_embed = with_pos ? pos.floats() : nullptr, p.prefix_tokens = p.prefix ? prefix.data() : nullptr;
  p.prefix_stride = per_image ? p.prefix * w.features : 0;
  if (with_mean) p.mean = mean.floats(), p.std = std_dev.floats();
  Workspace workspace(table.patch_embed_workspace(p));
  p.workspace = workspace.data;
  table.patch_embed(p);
  Doubles golden;
  for (int64_t b = 0; b < p.batch; b++) {
    for (int64_t i = 0; i < p.prefix * w.features; i++) golden.push_back(prefix[b * p.prefix_stride + i]);
    for (int64_t patch = 0; patch < patches; patch++) {
      Doubles row;
      for (int64_t c = 0; c < p.channels; c++)
        for (int64_t y = 0; y < p.patch[0]; y++)
          for (int64_t x = 0; x < p.patch[1]; x++) {
            const int64_t top = patch / p.grid[1] * p.step[0] + y, left = patch % p.grid[1] * p.step[1] + x;
            double v = images[b * p.stride[0] + c * p.stride[1] + top * p.stride[2] + left * p.stride[3]];
            if (p.type == Type::uint8) v /= 255;
            row.push_back(with_mean ? (v - mean[c]) / std_dev[c] : v);
          }
      row = affine(row, w.features, [&](int64_t n, int64_t k) { return weight[n * w.width + k]; },
                   [&](int64_t n) { return with_bias ? bias[n] : 0; });
      for (int64_t n = 0; n < w.features; n++) golden.push_back(row[n] + (with_pos ? pos[patch * w.features + n] : 0));
    }
  }
  compare("out", values(out, golden.size()), golden, 2 * tolerance(w.type));
}

// A weight as kernels/packing.py packs it, and its plain values.
struct Packed {
  int64_t rows, columns, group, panels, groups;
  Type type;
  Doubles plain, bias_values, integers, scales;
  Array weight, gain, scale, sums, bias;
  static int64_t group_of(Type type) { return type == Type::int8 ? 4 : type == Type::bfloat16 ? 2 : 1; }

  Packed(Type type, int64_t rows, int64_t columns, bool gated)
      : rows(rows), columns(columns), group(group_of(type)),
        panels(gated ? ceil_div(rows / 2, 16) : ceil_div(rows, 32)), groups(ceil_div(columns, group)), type(type),
        weight(type, panels * groups * 32 * group), gain(Type::float32, groups * group), scale(Type::float32, panels * 32),
        sums(Type::float32, panels * 32), bias(Type::float32, panels * 32) {
    for (int64_t i = 0; i < panels * groups * 32 * group; i++) weight.put(i, 0);
    int32_t* integer_sums = static_cast<int32_t*>(sums.data());
    for (int64_t i = 0; i < panels * 32; i++) scale.put(i, 0), bias.put(i, 0), integer_sums[i] = 0;
    Array rounded(type == Type::int8 ? Type::float32 : type, 1);
    for (int64_t i = 0; i < groups * group; i++) gain.put(i, i < columns ? std::exp(-std::fabs(normal())) : 0);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t half = rows / 2, unit = gated ? r % half : r;
      const int64_t place = gated ? unit / 16 * 32 + unit % 16 + (r < half ? 0 : 16) : r;
      double largest = 0, total = 0;
      for (int64_t c = 0; c < columns; c++) {
        rounded.put(0, normal() / std::sqrt(columns));
        plain.push_back(rounded[0]);
        largest = std::fmax(largest, std::fabs(rounded[0]));
      }
      const double step = type == Type::int8 ? largest / 127 : 1;
      for (int64_t c = 0; c < columns; c++) {
        double& value = plain[r * columns + c];
        const int64_t i = ((place / 32 * groups + c / group) * 32 + place % 32) * group + c % group;
        if (type == Type::int8) value = std::nearbyint(value / step), total += value;
        weight.put(i, value);
        value *= step;
      }
      bias.put(place, 0.3 * normal());
      bias_values.push_back(bias[place]);
      scale.put(place, step), integer_sums[place] = static_cast<int32_t>(total);
    }
  }
  PackedLinear view() const {
    const bool quantised = type == Type::int8;
    return {weight.data(), quantised ? gain.floats() : nullptr, quantised ? scale.floats() : nullptr,
            quantised ? static_cast<const int32_t*>(sums.data()) : nullptr, bias.floats(), panels, groups};
  }
  Doubles operator()(Doubles x) const {
    if (type == Type::int8) {  // rows as uint8
      for (int64_t c = 0; c < columns; c++) x[c] *= gain[c];
      double low = 0, high = 0;
      for (double v : x) low = std::fmin(low, v), high = std::fmax(high, v);
      const double step = high > low ? (high - low) / 255 : 1, zero = std::nearbyint(-low / step);
      for (double& v : x) v = (std::fmin(std::fmax(std::nearbyint(v / step + zero), 0), 255) - zero) * step;
    }
    return affine(x, rows, [&](int64_t n, int64_t k) { return plain[n * columns + k]; },
                  [&](int64_t n) { return bias_values[n]; });
  }
};

// A linear layer of a prepared block that no stack describes.
static void run_packed_linear() {
  Linear l{};
  l.type = l.out_type = float_type(), l.pool = pool();
  const Type type = integer(0, 2) ? l.type : Type::int8;
  l.rows = odd_size(90), l.normalise = chance(), l.rms = chance(), l.eps = 1e-5f;
  const int64_t width = 3 + odd_size(100), features = odd_size(90);
  const bool with_residual = chance(), with_gamma = chance(), affine_norm = chance();
  l.activation = with_residual ? Activation::none : static_cast<Activation>(integer(0, 5));
  note("packed_linear", static_cast<int>(l.type), static_cast<int>(type), static_cast<int>(l.activation), l.normalise,
       with_residual, l.rows, width, features);
  const Rows x(l.type, l.rows, width);
  const Packed weight(type, features, width, false);
  const Array ln_weight = vector(Type::float32, width), ln_bias = vector(Type::float32, width);
  const Array gamma = vector(Type::float32, features), residual = vector(l.type, l.rows * features);
  const Array out(l.type, l.rows * features);
  const PackedLinear packed = weight.view();
  l.x = x.array.data(), l.stride = x.stride, l.out = out.data();
  l.weight = {nullptr, nullptr, type, features, width, 0}, l.packed = &packed;
  if (affine_norm) l.ln_weight = ln_weight.floats(), l.ln_bias = ln_bias.floats();
  if (with_residual) l.residual = residual.data(), l.gamma = with_gamma ? gamma.floats() : nullptr;
  const Workspace workspace(table.linear_workspace(l));
  l.workspace = workspace.data;
  table.linear(l);
  Doubles golden;
  for (int64_t r = 0; r < l.rows; r++) {
    Doubles row;
    for (int64_t i = 0; i < width; i++) row.push_back(x.at(r, i));
    if (l.normalise) {
      row = normalised(row, l.eps, l.rms);
      for (int64_t i = 0; affine_norm && i < width; i++) row[i] = row[i] * ln_weight[i] + ln_bias[i];
    }
    row = activated(weight(row), l.activation);
    for (int64_t n = 0; n < features; n++)
      golden.push_back(with_residual ? residual[r * features + n] + row[n] * (l.gamma ? gamma[n] : 1) : row[n]);
  }
  compare("out", values(out, golden.size()), golden, type == Type::int8 ? 0.03 : 2 * tolerance(type));
}

// A head of q or k, normalised and turned.
static void prepare_head(const PreparedBlocks& s, double* x, int64_t D, bool is_k, int64_t head, int64_t token) {
  const vit_fast::HeadNorm& norm = is_k ? s.k_norm : s.q_norm;
  if (norm.given) {
    const Doubles y = normalised(Doubles(x, x + D), norm.eps, s.rms);
    for (int64_t d = 0; d < D; d++)
      x[d] = y[d] * (norm.weight ? norm.weight[d] : 1) + (norm.bias ? norm.bias[d] : 0);
  }
  if (!s.rope.cos || token < s.rope.prefix) return;
  const int64_t at = head * s.rope.stride[1] + (token - s.rope.prefix) * s.rope.stride[2];
  const Doubles y(x, x + D);
  for (int64_t d = 0; d < D; d++) {
    const int64_t partner = s.rope.interleaved ? d ^ 1 : (d + D / 2) % D;
    const double other = partner > d ? -y[partner] : y[partner];
    x[d] = y[d] * s.rope.cos[at + d] + other * s.rope.sin[at + d];
  }
}

static void run_prepared_blocks() {
  PreparedBlocks s{};
  s.type = one_of<Type>({Type::float32, Type::float16, Type::bfloat16, Type::int8, Type::int8}), s.pool = pool();
  s.activation = static_cast<Activation>(integer(1, 8));
  const bool gated = vit_fast::is_gated(s.activation);
  const bool long_rows = integer(0, 19) == 0;  // more keys than attention takes at a time
  s.depth = integer(1, 2), s.batch = long_rows ? 1 : integer(1, 2), s.num_heads = long_rows ? 1 : integer(1, 3);
  s.tokens = long_rows ? one_of<int64_t>({512, 513, 545}) : odd_size(60);
  const int64_t D = integer(0, 3) ? 3 + odd_size(20) : one_of<int64_t>({32, 33, 64, 80}), C = s.num_heads * D, hidden = 3 + odd_size(80), rows = s.batch * s.tokens;
  s.width = C, s.scale = 1 / std::sqrt(static_cast<float>(D)), s.eps1 = 1e-6f, s.eps2 = 1e-5f;
  s.hidden = ceil_div(hidden, Packed::group_of(s.type)) * Packed::group_of(s.type);
  note("prepared_blocks", static_cast<int>(s.type), static_cast<int>(s.activation), s.depth, s.batch, s.tokens,
       s.num_heads, D, hidden);
  std::vector<Packed> linears;
  std::vector<PackedBlock> blocks;
  for (int64_t b = 0; b < s.depth; b++) {
    linears.emplace_back(s.type, 3 * C, C, false);
    linears.emplace_back(s.type, C, C, false);
    linears.emplace_back(s.type, gated ? 2 * hidden : hidden, C, gated);
    linears.emplace_back(s.type, C, hidden, false);
    const auto last = linears.end();
    blocks.push_back({last[-4].view(), last[-3].view(), last[-2].view(), last[-1].view()});
  }
  s.rms = chance(), s.out_eps = chance() ? 1e-5f : -1, s.hidden_eps = chance() ? 1e-4f : -1;
  s.hidden_features = hidden;
  const Array q_weight = vector(Type::float32, D), k_bias = vector(Type::float32, D);
  if (chance()) s.q_norm = {q_weight.floats(), nullptr, 1e-3f, true}, s.k_norm = {nullptr, k_bias.floats(), 1e-3f, true};
  const bool per_head = chance(), with_rope = D % 2 == 0 && chance(), with_bias = chance();
  s.rope.prefix = integer(0, s.tokens), s.rope.interleaved = chance();
  const int64_t turned = s.tokens - s.rope.prefix, heads_of_bias = per_head ? s.num_heads : 1;
  const Array cos = vector(Type::float32, heads_of_bias * turned * D), sin = vector(Type::float32, heads_of_bias * turned * D);
  if (with_rope) {
    s.rope.cos = cos.floats(), s.rope.sin = sin.floats();
    s.rope.stride[1] = per_head ? turned * D : 0, s.rope.stride[2] = D;
  }
  const Array bias = vector(Type::float32, s.batch * heads_of_bias * s.tokens * s.tokens);
  if (with_bias) {
    for (int64_t row = 0; row < s.batch * heads_of_bias * s.tokens; row++)
      for (int64_t j = 1; j < s.tokens; j++)  // the first key stays
        if (integer(0, 4) == 0) static_cast<float*>(bias.data())[row * s.tokens + j] = -INFINITY;
    s.bias.data = bias.floats();
    s.bias.stride[2] = s.tokens, s.bias.stride[1] = per_head ? s.tokens * s.tokens : 0;
    s.bias.stride[0] = heads_of_bias * s.tokens * s.tokens;
  }
  Array x = vector(Type::float32, rows * C);
  std::vector<Doubles> golden(rows);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < C; i++) golden[r].push_back(x[r * C + i]);
  s.x = x.floats(), s.blocks = blocks.data();
  Workspace workspace(table.prepared_blocks_workspace(s));
  s.workspace = workspace.data;
  table.prepared_blocks(s);
  for (int64_t b = 0; b < s.depth; b++) {
    const Packed *qkv = &linears[4 * b], *proj = qkv + 1, *fc1 = qkv + 2, *fc2 = qkv + 3;
    std::vector<Doubles> heads(rows);
    for (int64_t r = 0; r < rows; r++) {
      heads[r] = (*qkv)(normalised(golden[r], s.eps1, s.rms));
      for (int64_t h = 0; h < 2 * s.num_heads; h++)
        prepare_head(s, &heads[r][h * D], D, h / s.num_heads, h % s.num_heads, r % s.tokens);
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t first = r / s.tokens * s.tokens;
      Doubles out(C);
      for (int64_t h = 0; h < s.num_heads; h++) {
        Doubles weights(s.tokens);
        double total = 0;
        for (int64_t j = 0; j < s.tokens; j++) {
          for (int64_t d = h * D; d < (h + 1) * D; d++) weights[j] += s.scale * heads[r][d] * heads[first + j][C + d];
          if (s.bias.data)
            weights[j] += s.bias.data[r / s.tokens * s.bias.stride[0] + h * s.bias.stride[1] +
                                      r % s.tokens * s.bias.stride[2] + j];
          total += weights[j] = std::exp(weights[j]);
        }
        for (int64_t j = 0; j < s.tokens; j++)
          for (int64_t d = h * D; d < (h + 1) * D; d++) out[d] += weights[j] / total * heads[first + j][2 * C + d];
      }
      out = (*proj)(s.out_eps < 0 ? out : normalised(out, s.out_eps, s.rms));
      for (int64_t i = 0; i < C; i++) golden[r][i] += out[i];
    }
    for (Doubles& row : golden) {
      Doubles hidden = activated((*fc1)(normalised(row, s.eps2, s.rms)), s.activation);
      if (s.hidden_eps >= 0) hidden = normalised(hidden, s.hidden_eps, s.rms);
      const Doubles out = (*fc2)(hidden);
      for (int64_t i = 0; i < C; i++) row[i] += out[i];
    }
  }
  Doubles flat;
  for (const Doubles& row : golden) flat.insert(flat.end(), row.begin(), row.end());
  const double allowed = s.type == Type::int8 ? 0.03 : 2 * tolerance(s.type);
  compare("x", values(x, rows * C), flat, allowed);
}

int main(int count, char** words) {
  if (count < 3) return 2;
  state = 88172645463325252ull ^ (strtoull(words[1], nullptr, 10) * 0x9e3779b97f4a7c15ull);
  const struct {
    const char* name;
    void (*run)();
  } operations[] = {{"keep_mask", run_keep_mask},
                    {"attention", run_attention},
                    {"attention_bwd", run_attention_bwd},
                    {"layer_norm", run_layer_norm},
                    {"layer_norm_bwd", run_layer_norm_bwd},
                    {"linear", run_linear},
                    {"packed_linear", run_packed_linear},
                    {"patch_embed", run_patch_embed},
                    {"prepared_blocks", run_prepared_blocks}};
  const int cases = atoi(words[2]);
  int done = 0;
  for (int i = 0; i < cases; i++)
    for (const auto& operation : operations)
      if (count < 4 || std::string(words[3]) == operation.name) operation.run(), done++;
  printf("%d cases at level %s\n", done, table.level);
  return done ? 0 : 2;
}
