/* The inner loops of making batches: blocks read and held against their CRC32C, rows of tokens widened to what a model
 * takes while EOS is looked for, and the arithmetic of the order. Plain C and POSIX; kernel.py compiles and binds it,
 * and says what does the same without it. Nothing here is reached by more than one thread with the same memory. */

#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define SSE42 __attribute__((target("sse4.2")))
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,prefer-vector-width=512")))
#define FOLDING __attribute__((target("avx512f,vpclmulqdq,sse4.2")))
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <sys/auxv.h>
#ifndef HWCAP_CRC32
#define HWCAP_CRC32 (1 << 7)
#endif
#endif

#define INLINE static inline __attribute__((always_inline))

/* ---- CRC32C ---------------------------------------------------------------------------------------------------------
 * Reflected, polynomial 0x1EDC6F41. A message is cut into three lanes whose CRCs are taken side by side, for one step of
 * the CPU's instruction takes three times as long as it takes to begin the next; they are joined as zlib's crc32_combine
 * does it: crc(A B) = crc(A) x^(8 |B|) mod P + crc(B). Where the CPU multiplies polynomials in wide vectors, the message
 * is folded instead (below), which is twice as fast. */

#define POLYNOMIAL 0x82f63b78u

/* a b mod P; bit 31 is x^0 */
static uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = b & 1 ? b >> 1 ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

/* x^(8 bytes) mod P */
static uint32_t power(uint64_t bytes) {
    uint32_t result = 1u << 31, square = 1u << 23;
    for (; bytes; bytes >>= 1, square = multiply(square, square))
        if (bytes & 1) result = multiply(result, square);
    return result;
}

static uint32_t table[8][256];

static __attribute__((constructor)) void make_table(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = crc & 1 ? crc >> 1 ^ POLYNOMIAL : crc >> 1;
        table[0][byte] = crc;
    }
    for (int step = 1; step < 8; step++)
        for (uint32_t byte = 0; byte < 256; byte++)
            table[step][byte] = table[step - 1][byte] >> 8 ^ table[0][table[step - 1][byte] & 255];
}

INLINE uint64_t word(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* one step of eight bytes, and of one */
INLINE uint32_t step8_table(uint32_t crc, uint64_t value) {
    uint32_t low = crc ^ (uint32_t)value, high = (uint32_t)(value >> 32);
    return table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
           table[3][high & 255] ^ table[2][high >> 8 & 255] ^ table[1][high >> 16 & 255] ^ table[0][high >> 24];
}
INLINE uint32_t step1_table(uint32_t crc, uint8_t value) { return crc >> 8 ^ table[0][(crc ^ value) & 255]; }

/* ``first`` and ``last``: the powers by which the CRC of a lane moves over the second lane, and over the third */
#define DEFINE_CRC(NAME, TARGET, STEP8, STEP1)                                                                          \
    TARGET static uint32_t NAME(const uint8_t *bytes, size_t count, uint32_t first, uint32_t last) {                    \
        size_t lane = count / 24 * 8;                                                                                   \
        uint32_t a = ~0u, b = ~0u, c = ~0u;                                                                             \
        const uint8_t *end = bytes + count, *at = bytes;                                                                \
        for (; at < bytes + lane; at += 8) {                                                                            \
            a = (uint32_t)STEP8(a, word(at));                                                                           \
            b = (uint32_t)STEP8(b, word(at + lane));                                                                    \
            c = (uint32_t)STEP8(c, word(at + 2 * lane));                                                                \
        }                                                                                                               \
        for (at = bytes + 3 * lane; end - at >= 8; at += 8) c = (uint32_t)STEP8(c, word(at));                           \
        for (; at < end; at++) c = STEP1(c, *at);                                                                       \
        return multiply(multiply(~a, first) ^ ~b, last) ^ ~c;                                                           \
    }

DEFINE_CRC(crc_table, , step8_table, step1_table)
#if defined(__x86_64__)
DEFINE_CRC(crc_hardware, SSE42, _mm_crc32_u64, _mm_crc32_u8)
#elif defined(__aarch64__) && defined(__linux__)
#pragma GCC push_options
#pragma GCC target("+crc")
DEFINE_CRC(crc_hardware, , __crc32cd, __crc32cb)
#pragma GCC pop_options
#endif

#if defined(__x86_64__)
/* Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009): 128 bits of the
 * message are moved on by D bits, modulo P, as the sum of their halves times x^(D + 64) and x^D; what a product of
 * reflected polynomials lacks or has too much (a bit, and the 32 of a CRC) is in the exponent. */
#define STRIDE 256

static uint64_t by_stride[2], by_vector[2];

static __attribute__((constructor)) void make_folds(void) {
    struct { uint64_t *at; int bits; } folds[] = {{by_stride, 8 * STRIDE}, {by_vector, 512}};
    for (int fold = 0; fold < 2; fold++)
        for (int half = 0; half < 2; half++) {
            uint32_t value = 1u << 31;
            for (int bits = folds[fold].bits + (half ? -33 : 31); bits; bits--)
                value = value & 1 ? value >> 1 ^ POLYNOMIAL : value >> 1;
            folds[fold].at[half] = value;
        }
}

FOLDING INLINE __m512i moved_on(__m512i bits, __m512i by, __m512i next) {
    __m512i low = _mm512_clmulepi64_epi128(bits, by, 0x00), high = _mm512_clmulepi64_epi128(bits, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96); /* the sum of the three */
}

FOLDING static uint32_t crc_folded(const uint8_t *at, size_t count) {
    const uint8_t *end = at + count;
    uint64_t crc = ~0u;
    if (count >= STRIDE) {
        __m512i a = _mm512_xor_si512(_mm512_loadu_si512(at), _mm512_zextsi128_si512(_mm_cvtsi32_si128(-1)));
        __m512i b = _mm512_loadu_si512(at + 64), c = _mm512_loadu_si512(at + 128), d = _mm512_loadu_si512(at + 192);
        __m512i by = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)by_stride));
        for (at += STRIDE; end - at >= STRIDE; at += STRIDE) {
            a = moved_on(a, by, _mm512_loadu_si512(at));
            b = moved_on(b, by, _mm512_loadu_si512(at + 64));
            c = moved_on(c, by, _mm512_loadu_si512(at + 128));
            d = moved_on(d, by, _mm512_loadu_si512(at + 192));
        }
        by = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)by_vector));
        a = moved_on(moved_on(moved_on(a, by, b), by, c), by, d);
        for (; end - at >= 64; at += 64) a = moved_on(a, by, _mm512_loadu_si512(at));
        uint64_t left[8]; /* a message with the same CRC as all that came before */
        _mm512_storeu_si512(left, a);
        crc = 0;
        for (int i = 0; i < 8; i++) crc = _mm_crc32_u64(crc, left[i]);
    }
    for (; end - at >= 8; at += 8) crc = _mm_crc32_u64(crc, word(at));
    for (; at < end; at++) crc = _mm_crc32_u8((uint32_t)crc, *at);
    return ~(uint32_t)crc;
}

static int folds(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("sse4.2");
}
#else
static int folds(void) { return 0; }
#endif

static int has_crc(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2") != 0;
#elif defined(__aarch64__) && defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_CRC32) != 0;
#else
    return 0;
#endif
}

/* The CRC32C of ``count`` bytes. ``level``: what may be used of this CPU, 0: what any of its kind has, 1: the CRC32C
 * instruction and wider vectors too, 2: all. */
uint32_t headrace_crc32c(const uint8_t *bytes, int64_t count, int level) {
#if defined(__x86_64__)
    if (level > 1 && folds()) return crc_folded(bytes, (size_t)count);
#endif
    static _Thread_local int64_t known = -1;
    static _Thread_local uint32_t first, last;
    if (count != known) {
        int64_t lane = count / 24 * 8;
        first = power((uint64_t)lane), last = power((uint64_t)(count - 2 * lane)), known = count;
    }
#if defined(__x86_64__) || (defined(__aarch64__) && defined(__linux__))
    if (level && has_crc()) return crc_hardware(bytes, (size_t)count, first, last);
#endif
    return crc_table(bytes, (size_t)count, first, last);
}

/* ---- reading --------------------------------------------------------------------------------------------------------
 * Fill into[k] with ``size`` bytes of the file from byte offsets[k] on, k = 0 .. count - 1, and hold their CRC32C against
 * expected[k] (NULL: don't). Returns how many were read and right before the first one that was not: short, refused by
 * the disk or other bytes. ``at``: always the k that is being read, for others to look at. */
int64_t headrace_read(int descriptor, int64_t count, const int64_t *offsets, uint8_t *const *into, int64_t size,
                      const uint32_t *expected, volatile int64_t *at, int level) {
    for (int64_t k = 0; k < count; k++) {
        *at = k;
        for (int64_t done = 0; done < size;) {
            ssize_t got = pread(descriptor, into[k] + done, (size_t)(size - done), (off_t)(offsets[k] + done));
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return k;
            done += got;
        }
        if (expected && headrace_crc32c(into[k], size, level) != expected[k]) return k;
    }
    return count;
}

/* ---- rows -> batches ------------------------------------------------------------------------------------------------*/

struct rows {
    const void *const *sources; /* [count] where the tokens of each row lie */
    const int64_t *samples;     /* [count] negative: a hole, which is filled with EOS; its source is not looked at */
    int64_t count;
    int64_t length; /* tokens of a row, T + 1: the sequence and the token that follows it */
    int64_t token_bytes;
    int64_t size;  /* rows of a batch */
    int32_t *ends; /* where the ends of the next batch go; each batch moves it on */
    uint32_t eos;
    int level; /* as above */
};

#define CHUNK 128
#define LINE 64

/* Tokens to int64, and whether one of them is EOS. */
#define WIDEN(TOKEN, COUNT)                                                                                             \
    TOKEN found = 0;                                                                                                    \
    for (int64_t i = 0; i < (COUNT); i++) into[i] = from[i];                                                            \
    for (int64_t i = 0; i < (COUNT); i++) found |= (TOKEN)(from[i] == eos)

/* One row; what is found goes to ``ends``, counted from ``base``. Meanwhile the row at ``next`` is brought near: rows lie
 * anywhere in memory, and the CPU guesses none of them by itself. */
#define DEFINE_ROW(NAME, TARGET, TOKEN)                                                                                 \
    TARGET static int32_t *NAME(const TOKEN *restrict from, int64_t length, uint32_t token, int64_t *restrict into,     \
                                const char *next, int32_t *ends, int32_t base) {                                        \
        const TOKEN eos = (TOKEN)token;                                                                                 \
        for (int64_t place = 0; place < length; place += CHUNK, from += CHUNK, into += CHUNK) {                         \
            int64_t count = length - place < CHUNK ? length - place : CHUNK;                                            \
            int any;                                                                                                    \
            if (next)                                                                                                   \
                for (int64_t line = 0; line < CHUNK * (int64_t)sizeof(TOKEN); line += LINE, next += LINE)               \
                    __builtin_prefetch(next, 0, 3);                                                                     \
            if (count == CHUNK) {                                                                                       \
                WIDEN(TOKEN, CHUNK);                                                                                    \
                any = found;                                                                                            \
            } else {                                                                                                    \
                WIDEN(TOKEN, count);                                                                                    \
                any = found;                                                                                            \
            }                                                                                                           \
            if (any)                                                                                                    \
                for (int64_t i = 0; i < count; i++)                                                                     \
                    if (from[i] == eos) *ends++ = base + (int32_t)(place + i);                                          \
        }                                                                                                               \
        return ends;                                                                                                    \
    }

DEFINE_ROW(row16_plain, , uint16_t)
DEFINE_ROW(row32_plain, , uint32_t)
#if defined(__x86_64__)
DEFINE_ROW(row16_avx2, AVX2, uint16_t)
DEFINE_ROW(row32_avx2, AVX2, uint32_t)
DEFINE_ROW(row16_avx512, AVX512, uint16_t)
DEFINE_ROW(row32_avx512, AVX512, uint32_t)
#endif

typedef int32_t *row16(const uint16_t *restrict, int64_t, uint32_t, int64_t *restrict, const char *, int32_t *, int32_t);
typedef int32_t *row32(const uint32_t *restrict, int64_t, uint32_t, int64_t *restrict, const char *, int32_t *, int32_t);

/* 0: plain, 1: AVX2, 2: AVX-512 */
static int width(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return 2;
    if (__builtin_cpu_supports("avx2")) return 1;
#endif
    return 0;
}

/* The rows of batch ``number`` as int64 [size, T + 1] into ``into``. ``rows->ends`` [size T + 1] gets where the tokens,
 * the last of each row left out, seen as one flat row of size T, are EOS: ascending. Returns twice how many these are,
 * and one more if no row that is no hole has an EOS before its last token but one. */
int64_t headrace_batch(struct rows *rows, int number, int64_t *into) {
    row16 *widen16 = row16_plain;
    row32 *widen32 = row32_plain;
#if defined(__x86_64__)
    static row16 *const kinds16[] = {row16_plain, row16_avx2, row16_avx512};
    static row32 *const kinds32[] = {row32_plain, row32_avx2, row32_avx512};
    int kind = rows->level ? width() : 0;
    widen16 = kinds16[kind], widen32 = kinds32[kind];
#endif
    int64_t length = rows->length, single = 1;
    int32_t *ends = rows->ends, *found = ends, tokens = (int32_t)(length - 1);
    for (int64_t k = 0; k < rows->size; k++, into += length) {
        int64_t row = number * rows->size + k;
        int32_t base = (int32_t)k * tokens, *before = found;
        if (rows->samples[row] < 0) {
            for (int64_t i = 0; i < length; i++) into[i] = rows->eos;
            for (int32_t i = 0; i < tokens; i++) *found++ = base + i;
            continue;
        }
        int more = row + 1 < rows->count && rows->samples[row + 1] >= 0;
        const char *next = more ? rows->sources[row + 1] : NULL;
        if (rows->token_bytes == 2)
            found = widen16(rows->sources[row], length, rows->eos, into, next, found, base);
        else
            found = widen32(rows->sources[row], length, rows->eos, into, next, found, base);
        if (found > before && found[-1] == base + tokens) found--; /* the token that follows is nobody's end */
        if (found > before && before[0] < base + tokens - 1) single = 0;
    }
    rows->ends = found;
    return (found - ends) << 1 | single;
}

/* ---- the order ------------------------------------------------------------------------------------------------------
 * permutation.py says what this is; here it is done index by index, with the same integers. */

#define ROUNDS 8

INLINE uint64_t mix64(uint64_t value) {
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
    value = (value ^ value >> 27) * 0x94D049BB133111EBu;
    return value ^ value >> 31;
}

INLINE uint64_t shift(uint64_t moved, uint64_t by, uint64_t side, uint64_t key, int inverse) {
    uint64_t step = (mix64(by ^ key) >> 32) * side >> 32;
    step = (inverse ? side - step : step) + moved;
    return step >= side ? step - side : step;
}

/* the least integer w with (double)w >= the root of ``size`` as a double */
static uint64_t width_of(uint64_t size) {
    double root = __builtin_sqrt((double)size);
    uint64_t width = (uint64_t)root;
    return (double)width < root ? width + 1 : width;
}

/* Indices whose rounds are taken side by side: each waits for the one before it, the CPU need not. */
#define LANES 4

struct lanes {
    uint64_t values[LANES], sizes[LANES], widths[LANES], heights[LANES];
    uint64_t keys[ROUNDS][LANES];
};

/* The lanes from ``first`` to ``last`` go through the network once. */
INLINE void network(struct lanes *of, int first, int last, int inverse) {
    uint64_t x[LANES], y[LANES];
    for (int lane = first; lane < last; lane++) {
        x[lane] = of->values[lane] / of->heights[lane];
        y[lane] = of->values[lane] - x[lane] * of->heights[lane];
    }
    for (int round = 0; round < ROUNDS; round += 2)
        for (int lane = first; lane < last; lane++) {
            if (inverse) {
                y[lane] = shift(y[lane], x[lane], of->heights[lane], of->keys[ROUNDS - 1 - round][lane], 1);
                x[lane] = shift(x[lane], y[lane], of->widths[lane], of->keys[ROUNDS - 2 - round][lane], 1);
            } else {
                x[lane] = shift(x[lane], y[lane], of->widths[lane], of->keys[round][lane], 0);
                y[lane] = shift(y[lane], x[lane], of->heights[lane], of->keys[round + 1][lane], 0);
            }
        }
    for (int lane = first; lane < last; lane++) of->values[lane] = x[lane] * of->heights[lane] + y[lane];
}

INLINE void walk(int64_t count, int64_t *indices, const int64_t *sizes, int64_t size_step, const uint64_t *keys,
                 int64_t key_step, const int64_t *numbers, int inverse) {
    struct lanes lanes;
    uint64_t size = 0, width = 0, height = 0;
    for (int64_t k = 0; k < count; k += LANES) {
        int64_t left = count - k < LANES ? count - k : LANES;
        for (int lane = 0; lane < LANES; lane++) {
            int64_t at = lane < left ? k + lane : k; /* what is left over does the first one's work again */
            uint64_t here = (uint64_t)sizes[at * size_step];
            if (here != size) size = here, width = width_of(size), height = (size + width - 1) / width;
            lanes.values[lane] = (uint64_t)indices[at];
            lanes.sizes[lane] = size, lanes.widths[lane] = width, lanes.heights[lane] = height;
            for (int round = 0; round < ROUNDS; round++) {
                uint64_t key = keys[at * key_step + round];
                lanes.keys[round][lane] = numbers ? mix64(key + (uint64_t)numbers[at] * 0x9E3779B97F4A7C15u) : key;
            }
        }
        network(&lanes, 0, LANES, inverse);
        for (int lane = 0; lane < left; lane++) {
            while (lanes.values[lane] >= lanes.sizes[lane]) network(&lanes, lane, lane + 1, inverse);
            indices[k + lane] = (int64_t)lanes.values[lane];
        }
    }
}

/* Where each of the ``indices`` [count] goes, in place, or (inverse) whence it comes: in the permutation of
 * range(sizes[k size_step]) with the keys from keys[k key_step] on, or, where there are ``numbers``, with output numbers[k]
 * of the streams that begin there. */
void headrace_walk(int64_t count, int64_t *indices, const int64_t *sizes, int64_t size_step, const uint64_t *keys,
                   int64_t key_step, const int64_t *numbers, int inverse) {
    if (inverse)
        walk(count, indices, sizes, size_step, keys, key_step, numbers, 1);
    else
        walk(count, indices, sizes, size_step, keys, key_step, numbers, 0);
}

/* What of this CPU is used: bits 0 and 1 how a CRC32C is computed (by tables, its instruction, folding), bits 2 and 3 the
 * width of vectors. */
int headrace_features(int level) { return level ? (level > 1 && folds() ? 2 : has_crc()) | width() << 2 : 0; }
