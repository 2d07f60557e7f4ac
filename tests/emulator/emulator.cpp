// The scheduler of fibres, the memory model and the instructions of a warp; emulator.h tells what is modelled.
#include "emulator.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"

#ifndef __x86_64__
#error "the switch between fibres is written for x86-64"
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

emulator::Index threadIdx, blockIdx, blockDim, gridDim;

// Saves the registers that a call preserves and the stack pointer, and takes another's.
extern "C" void vf_switch(void** save, void* next);
asm(R"(
.text
.globl vf_switch
.type vf_switch, @function
vf_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size vf_switch, .-vf_switch
)");

namespace emulator {
namespace {

constexpr int WARP = 32, MAX_THREADS = 1024, MANY = 0xffff;
constexpr size_t STACK = 256 * 1024;

enum class State { READY, AT_WARP, AT_BLOCK, DONE };

struct Copy {
    int place;       // first byte in shared memory
    const void* source;  // null: zeros
    int group;       // −1: not committed yet
};

struct Fibre {
    void* stack_pointer;
    State state;
    void (*meeting)(void* const*);  // what its warp waits for
    void* given;
    int line;
    int groups;  // committed
    std::vector<Copy> copies;
};

// What has happened to two bytes of shared memory. An epoch is the number of barriers passed.
struct Cell {
    uint16_t writer = MANY, reader = MANY, reader_warp = MANY;
    uint8_t written = 0, in_flight = 0, was_read = 0;
    uint32_t write_block = 0, write_warp = 0, read_block = 0, read_warp = 0;
};

struct View {
    char* base;
    std::string name;
    int64_t element, count;
    std::vector<int64_t> sizes, strides;  // in elements, by falling stride
    bool writable, updated, dense;  // updated: an input that is overwritten in place
    std::vector<int32_t> writers;   // by linear index; −1: none; empty where not all blocks run
};

struct Shared {
    unsigned char* memory = nullptr;
    int size = 0;
    std::vector<Cell> cells;
};

bool has_views = false;  // whether a test has begun a run
int64_t last_blocks;     // how many blocks of a launch run, from its end; 0: all
std::vector<View> views;
std::string error;
uint64_t seed, random_state;
int64_t counts[6];  // launches, blocks, meetings of warps, block barriers, ldmatrix phases, bank conflicts in them
Shared shared;
std::vector<Fibre> fibres;
std::vector<int> ready;
std::vector<uint32_t> warp_epoch;
uint32_t block_epoch;
int current, at_block, done, shared_limit = 232448;
bool aborted;
void *scheduler, *stacks;
const std::function<void()>* body;
#ifdef __SANITIZE_ADDRESS__
const void* scheduler_bottom;
size_t scheduler_size;
#endif

char* stack_of(int thread) { return static_cast<char*>(stacks) + thread * STACK; }

void to_scheduler([[maybe_unused]] bool for_ever) {
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &fake, scheduler_bottom, scheduler_size);
#endif
    vf_switch(&fibres[current].stack_pointer, scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, &scheduler_bottom, &scheduler_size);
#endif
}

void to_fibre(int thread) {
    current = thread;
    threadIdx.x = static_cast<unsigned>(thread);
#ifdef __SANITIZE_ADDRESS__
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_of(thread), STACK);
#endif
    vf_switch(&scheduler, fibres[thread].stack_pointer);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

[[noreturn]] void fail(int line, const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    error = "block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(current) + ", line " +
            std::to_string(line) + ": " + text;
    aborted = true;
    to_scheduler(true);
    abort();
}

void fibre_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
    (*body)();
    if (!fibres[current].copies.empty()) fail(0, "ends without cp_async_wait for its copies");
    fibres[current].state = State::DONE;
    done++;
    to_scheduler(true);
    abort();
}

void give_way(State state) {
    fibres[current].state = state;
    to_scheduler(false);
}

void wake(int thread) {
    fibres[thread].state = State::READY;
    if (thread != current) ready.push_back(thread);
}

uint64_t random_number() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

void stuck() {
    int waiting = -1, gone = -1, other = -1;
    for (int i = 0; i < static_cast<int>(fibres.size()); i++) {
        if (fibres[i].state == State::DONE) gone = i;
        if (fibres[i].state == State::AT_BLOCK) waiting = i;
        if (fibres[i].state == State::AT_WARP) other = i;
    }
    const int shown = waiting >= 0 ? waiting : other;
    error = "block " + std::to_string(blockIdx.x) + ": divergent barrier: thread " + std::to_string(shown) +
            " waits at line " + std::to_string(fibres[shown].line) + ", ";
    const int absent = waiting >= 0 && other >= 0 ? other : gone;
    error += "thread " + std::to_string(absent) + (absent == other ? " at line " + std::to_string(fibres[other].line) : " has ended");
}

void run_block() {
    const int threads = static_cast<int>(blockDim.x);
    for (auto& cell : shared.cells) cell = Cell();
    memset(shared.memory, 0xff, shared.size);
    block_epoch = 1;
    warp_epoch.assign(threads / WARP, 1);
    at_block = done = 0;
    ready.clear();
    for (int i = threads - 1; i >= 0; i--) {
        Fibre& fibre = fibres[i];
        fibre.state = State::READY;
        fibre.groups = 0;
        fibre.copies.clear();
#ifdef __SANITIZE_ADDRESS__
        __asan_unpoison_memory_region(stack_of(i), STACK);  // a fibre never returns from its frames
#endif
        void** top = reinterpret_cast<void**>(stack_of(i) + STACK);
        *--top = nullptr;  // where a call would have left the stack
        *--top = reinterpret_cast<void*>(&fibre_main);
        for (int j = 0; j < 6; j++) *--top = nullptr;
        fibre.stack_pointer = top;
        ready.push_back(i);
    }
    while (!ready.empty() && !aborted) {
        if (seed) std::swap(ready[random_number() % ready.size()], ready.back());
        const int next = ready.back();
        ready.pop_back();
        to_fibre(next);
    }
    if (!aborted && done != threads) {
        aborted = true;
        stuck();
    }
}

// The element of a view at a byte offset: its linear index, −1 where there is none.
int64_t element_at(const View& view, int64_t offset) {
    if (offset < 0 || offset % view.element) return -1;
    offset /= view.element;
    if (view.dense) return offset < view.count ? offset : -1;
    int64_t index = 0;
    for (size_t i = 0; i < view.sizes.size(); i++) {
        const int64_t at = view.strides[i] ? std::min(offset / view.strides[i], view.sizes[i] - 1) : 0;
        offset -= at * view.strides[i];
        index = index * view.sizes[i] + at;
    }
    return offset == 0 ? index : -1;
}

Cell* cells_of(const void* address, int bytes, int line, const char* what) {
    const auto place = static_cast<const unsigned char*>(address) - shared.memory;
    if (place < 0 || place + bytes > shared.size) {
        fail(line, "%s of shared memory at byte %lld, it has %d", what, static_cast<long long>(place), shared.size);
    }
    if (place % bytes) fail(line, "misaligned %s of shared memory at byte %lld", what, static_cast<long long>(place));
    return &shared.cells[place / 2];
}

void note_write(Cell& cell, int line, bool by_copy) {
    const int warp = current / WARP;
    const uint32_t warps = warp_epoch[warp];
    if (cell.in_flight && !by_copy) fail(line, "writes shared memory to which a cp.async is in flight");
    if (cell.written && cell.writer != current && cell.write_block == block_epoch &&
        (cell.writer / WARP != warp || cell.write_warp == warps)) {
        fail(line, "data race: shared memory written by thread %d is overwritten without a barrier", cell.writer);
    }
    if (cell.was_read && cell.read_block == block_epoch && cell.reader != current &&
        (cell.reader_warp != warp || cell.read_warp == warps)) {
        if (cell.reader == MANY) fail(line, "data race: shared memory read by other threads is overwritten without a barrier");
        fail(line, "data race: shared memory read by thread %d is overwritten without a barrier", cell.reader);
    }
    cell.written = 1;
    cell.writer = static_cast<uint16_t>(current);
    cell.write_block = block_epoch;
    cell.write_warp = warps;
    cell.was_read = 0;
}

void note_read(Cell& cell, int thread, int line) {
    const int warp = thread / WARP;
    const uint32_t warps = warp_epoch[warp];
    if (cell.in_flight) fail(line, "reads shared memory before cp_async_wait");
    if (!cell.written) fail(line, "reads shared memory that was never written");
    if (cell.writer != thread && cell.write_block == block_epoch &&
        (cell.writer / WARP != warp || cell.write_warp == warps)) {
        fail(line, "data race: shared memory written by thread %d is read by thread %d without a barrier", cell.writer,
             thread);
    }
    const bool fresh = !cell.was_read || cell.read_block != block_epoch;
    cell.reader_warp = static_cast<uint16_t>(fresh || cell.reader_warp == warp ? warp : MANY);
    cell.reader = static_cast<uint16_t>(fresh || cell.reader == thread ? thread : MANY);
    cell.was_read = 1;
    cell.read_block = block_epoch;
    cell.read_warp = warps;
}

struct Matrices {
    uint32_t* registers;
    const void* row;
    bool transposed;
    int line;
};

void run_ldmatrix(void* const* lanes) {
    uint16_t tile[4][8][8];
    const int first = current / WARP * WARP;
    for (int i = 0; i < WARP; i++) {
        const auto& given = *static_cast<const Matrices*>(lanes[i]);
        Cell* cells = cells_of(given.row, 16, given.line, "ldmatrix");
        for (int j = 0; j < 8; j++) note_read(cells[j], first + i, given.line);
        memcpy(tile[i / 8][i % 8], given.row, 16);
    }
    for (int matrix = 0; matrix < 4; matrix++) {
        int banks[8] = {};
        for (int i = 0; i < 8; i++) {
            const auto* row = static_cast<const Matrices*>(lanes[matrix * 8 + i])->row;
            banks[(static_cast<const unsigned char*>(row) - shared.memory) / 16 % 8]++;
        }
        counts[4]++;
        counts[5] += *std::max_element(banks, banks + 8) - 1;
    }
    for (int i = 0; i < WARP; i++) {
        const auto& given = *static_cast<const Matrices*>(lanes[i]);
        const int row = i / 4, column = i % 4 * 2;
        for (int j = 0; j < 4; j++) {
            const uint16_t low = given.transposed ? tile[j][column][row] : tile[j][row][column];
            const uint16_t high = given.transposed ? tile[j][column + 1][row] : tile[j][row][column + 1];
            given.registers[j] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

struct Product {
    float* c;
    const uint32_t *a, *b;
    int depth;
    float (*widen)(uint16_t);
};

void run_mma(void* const* lanes) {
    float a[16][16], b[16][8];
    const auto& any = *static_cast<const Product*>(lanes[0]);
    for (int i = 0; i < WARP; i++) {
        const auto& given = *static_cast<const Product*>(lanes[i]);
        const int group = i / 4, pair = i % 4 * 2;
        for (int half = 0; half < any.depth / 8; half++) {
            for (int j = 0; j < 2; j++) {
                const int k = half * 8 + pair + j;
                a[group][k] = any.widen(static_cast<uint16_t>(given.a[half * 2] >> 16 * j));
                a[group + 8][k] = any.widen(static_cast<uint16_t>(given.a[half * 2 + 1] >> 16 * j));
                b[k][group] = any.widen(static_cast<uint16_t>(given.b[half] >> 16 * j));
            }
        }
    }
    for (int i = 0; i < WARP; i++) {
        float* c = static_cast<const Product*>(lanes[i])->c;
        for (int j = 0; j < 4; j++) {
            const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
            float sum = c[j];
            for (int k = 0; k < any.depth; k++) sum += a[row][k] * b[k][column];
            c[j] = sum;
        }
    }
}

struct Shuffle {
    float value, result;
    int lanes;
};

void run_shuffle(void* const* lanes) {
    for (int i = 0; i < WARP; i++) {
        auto& given = *static_cast<Shuffle*>(lanes[i]);
        given.result = static_cast<const Shuffle*>(lanes[i ^ given.lanes])->value;
    }
}

void run_warp_barrier(void* const*) { warp_epoch[current / WARP]++; }

}  // namespace

void warp_meets(void (*run)(void* const*), void* mine, int line) {
    Fibre& fibre = fibres[current];
    fibre.meeting = run;
    fibre.given = mine;
    fibre.line = line;
    const int first = current / WARP * WARP;
    void* lanes[WARP];
    for (int i = 0; i < WARP; i++) {
        const Fibre& other = fibres[first + i];
        if (first + i != current && other.state != State::AT_WARP) {
            if (other.state == State::DONE) fail(line, "divergent warp: lane %d has ended", i);
            give_way(State::AT_WARP);
            return;
        }
        if (other.meeting != run || other.line != line) {
            fail(line, "divergent warp: lane %d is at line %d", i, other.line);
        }
        lanes[i] = other.given;
    }
    counts[2]++;
    run(lanes);
    for (int i = WARP - 1; i >= 0; i--) wake(first + i);
}

void warp_barrier(unsigned mask, int line) {
    if (mask != 0xffffffffu) fail(line, "a barrier of a part of a warp");
    warp_meets(run_warp_barrier, nullptr, line);
}

void block_barrier(int line) {
    Fibre& fibre = fibres[current];
    fibre.line = line;
    if (++at_block < static_cast<int>(blockDim.x)) {
        give_way(State::AT_BLOCK);
        return;
    }
    for (const Fibre& other : fibres) {
        if (other.line != line) fail(line, "divergent barrier: another thread is at the barrier of line %d", other.line);
    }
    counts[3]++;
    at_block = 0;
    block_epoch++;
    for (int i = static_cast<int>(blockDim.x) - 1; i >= 0; i--) wake(i);
}

void global_access(const void* address, int64_t bytes, bool write, int line) {
    const char* what = write ? "writes" : "reads";
    if (!has_views) {
        if (reinterpret_cast<uintptr_t>(address) % bytes) fail(line, "%s misaligned", what);
        return;
    }
    const View* nearest = nullptr;
    for (View& view : views) {
        const int64_t offset = static_cast<const char*>(address) - view.base;
        int64_t index = element_at(view, offset);
        if (offset >= 0 && (!nearest || view.base > nearest->base)) nearest = &view;
        if (index < 0) continue;
        if (reinterpret_cast<uintptr_t>(address) % bytes) fail(line, "%s %s misaligned", what, view.name.c_str());
        if (write && !view.writable) fail(line, "writes to the input %s", view.name.c_str());
        for (int64_t at = 0; at < bytes; at += view.element) {
            index = element_at(view, offset + at);
            if (index < 0) fail(line, "%s beyond the view of %s", what, view.name.c_str());
            if (view.writers.empty()) continue;
            int32_t& writer = view.writers[index];
            const auto me = static_cast<int32_t>(blockIdx.x * MAX_THREADS + threadIdx.x);
            if (!write && writer < 0 && !view.updated) fail(line, "reads %s where it was not written", view.name.c_str());
            if (writer >= 0 && writer != me) fail(line, "%s what another thread wrote to %s", write ? "overwrites" : "reads", view.name.c_str());
            if (write) writer = me;
        }
        return;
    }
    const long long beyond = nearest ? static_cast<const char*>(address) - nearest->base : 0;
    fail(line, "%s outside of all views, %lld bytes after the begin of %s", what, beyond,
         nearest ? nearest->name.c_str() : "none");
}

void shared_access(const void* address, int bytes, bool write, int line) {
    Cell* cells = cells_of(address, bytes, line, write ? "write" : "read");
    for (int i = 0; i < std::max(1, bytes / 2); i++) {
        if (write) {
            note_write(cells[i], line, false);
        } else {
            note_read(cells[i], current, line);
        }
    }
}

void copy_async(void* address, const void* global, bool valid, int line) {
    Cell* cells = cells_of(address, 16, line, "cp.async");
    if (valid) global_access(global, 16, false, line);
    for (int i = 0; i < 8; i++) {
        note_write(cells[i], line, false);
        cells[i].in_flight = 1;
    }
    memset(address, 0xff, 16);
    const auto place = static_cast<int>(static_cast<unsigned char*>(address) - shared.memory);
    fibres[current].copies.push_back({place, valid ? global : nullptr, -1});
}

void copy_commit() {
    Fibre& fibre = fibres[current];
    for (Copy& copy : fibre.copies) {
        if (copy.group < 0) copy.group = fibre.groups;
    }
    fibre.groups++;
}

void copy_wait(int groups) {
    Fibre& fibre = fibres[current];
    std::erase_if(fibre.copies, [&](const Copy& copy) {
        if (copy.group < 0 || copy.group >= fibre.groups - groups) return false;
        if (copy.source) {
            memcpy(shared.memory + copy.place, copy.source, 16);
        } else {
            memset(shared.memory + copy.place, 0, 16);
        }
        for (int i = 0; i < 8; i++) {
            Cell& cell = shared.cells[copy.place / 2 + i];
            cell.in_flight = 0;
            note_write(cell, 0, true);
        }
        return true;
    });
}

void ldmatrix(uint32_t* registers, const void* row, bool transposed, int line) {
    Matrices mine = {registers, row, transposed, line};
    warp_meets(run_ldmatrix, &mine, line);
}

void mma(float* c, const uint32_t* a, const uint32_t* b, int depth, float (*widen)(uint16_t), int line) {
    Product mine = {c, a, b, depth, widen};
    warp_meets(run_mma, &mine, line);
}

float shuffle_xor(unsigned mask, float value, int lanes, int line) {
    if (mask != 0xffffffffu) fail(line, "a shuffle of a part of a warp");
    Shuffle mine = {value, 0.0f, lanes};
    warp_meets(run_shuffle, &mine, line);
    return mine.result;
}

unsigned char* shared_memory() { return shared.memory; }

void launch(int64_t grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    if (!error.empty() || grid == 0) return;
    aborted = true;
    if (threads <= 0 || threads > MAX_THREADS || threads % WARP) {
        error = "a block of " + std::to_string(threads) + " threads";
        return;
    }
    if (grid < 0 || grid > 0x7fffffff) {
        error = "a grid of " + std::to_string(grid) + " blocks";
        return;
    }
    if (shared_bytes > static_cast<size_t>(shared_limit)) {
        error = "asks for " + std::to_string(shared_bytes) + " bytes of shared memory, limit " + std::to_string(shared_limit);
        return;
    }
    aborted = false;
    counts[0]++;
    if (!stacks) {
        stacks = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    body = &kernel;
    blockDim.x = static_cast<unsigned>(threads);
    gridDim.x = static_cast<unsigned>(grid);
    fibres.assign(threads, Fibre());
    shared.size = static_cast<int>(shared_bytes);
    shared.memory = static_cast<unsigned char*>(aligned_alloc(16, (shared_bytes + 15) / 16 * 16));
    shared.cells.resize(shared_bytes / 2);
    const int64_t first = last_blocks ? std::max<int64_t>(0, grid - last_blocks) : 0;
    std::vector<unsigned> order(grid - first);
    std::iota(order.begin(), order.end(), static_cast<unsigned>(first));
    random_state = seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = order.size(); seed && i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
    for (unsigned block : order) {
        if (aborted) break;
        blockIdx.x = block;
        counts[1]++;
        run_block();
    }
    free(shared.memory);
}

void raise_unless_called_by_a_test() {
    if (!has_views && !error.empty()) throw std::runtime_error(std::exchange(error, ""));
}

float widen_half(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(fraction) * 0x1p-24f));
    return std::bit_cast<float>(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
}

uint16_t round_half(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7fff);
    if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // from 65520 up
    if (bits < 0x38800000) {  // below 2^-14: the last bit of 0.5 + x is that of a subnormal
        return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace emulator

vf::Limits vf::device_limits() { return {emulator::shared_limit, 8}; }

// What tests call. A run: begin, a view for each tensor, a launch of entry.cpp, error.
extern "C" {

void emulator_begin(int64_t schedule, int64_t shared_limit, int64_t last_blocks) {
    emulator::last_blocks = last_blocks;
    emulator::has_views = true;
    emulator::views.clear();
    emulator::error.clear();
    emulator::seed = static_cast<uint64_t>(schedule);
    emulator::shared_limit = static_cast<int>(shared_limit);
    memset(emulator::counts, 0, sizeof emulator::counts);
}

// Strides in elements. mode: 0 an input, 1 an output, 2 an input that is overwritten.
void emulator_view(void* base, const char* name, int64_t element, int64_t dim, const int64_t* sizes,
                   const int64_t* strides, int64_t mode) {
    emulator::View view{static_cast<char*>(base), name, element, 1, {}, {}, mode != 0, mode == 2, true, {}};
    std::vector<int64_t> order(dim);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return strides[i] > strides[j]; });
    for (int64_t i : order) {
        view.count *= sizes[i];
        if (sizes[i] == 1) continue;
        view.sizes.push_back(sizes[i]);
        view.strides.push_back(strides[i]);
    }
    int64_t below = 1;
    for (size_t i = view.sizes.size(); i-- > 0;) {
        view.dense &= view.strides[i] == below;
        below *= view.sizes[i];
    }
    if (mode && !emulator::last_blocks) view.writers.assign(view.count, -1);
    if (view.count) emulator::views.push_back(std::move(view));
}

const char* emulator_error() {
    for (const auto& view : emulator::views) {
        if (!emulator::error.empty()) break;
        const auto missing = std::count(view.writers.begin(), view.writers.end(), -1);
        if (missing) emulator::error = std::to_string(missing) + " elements of " + view.name + " were not written";
    }
    return emulator::error.c_str();
}

void emulator_counts(int64_t* counts) { memcpy(counts, emulator::counts, sizeof emulator::counts); }
}
