/* Prints what the kernel computes of pseudo-random input, for machines that can't load it into Python: LEVEL as there. */

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "kernel.c"

static uint64_t state = 1;

static uint64_t next(void) { return state = mix64(state + 0x9E3779B97F4A7C15u); }

static uint32_t digest(const void *of, size_t bytes) {
    uint32_t crc = ~0u;
    for (size_t k = 0; k < bytes; k++) crc = step1_table(crc, ((const uint8_t *)of)[k]);
    return ~crc;
}

int main(int count, char **arguments) {
    if (count < 2) return 2;
    int level = atoi(arguments[1]);
    fprintf(stderr, "%d\n", headrace_features(level));
    static uint8_t bytes[1 << 17];
    for (size_t k = 0; k < sizeof bytes; k++) bytes[k] = (uint8_t)next();
    for (int64_t length = 0; length < 1100; length++)
        printf("crc %" PRId64 " %08x\n", length, (unsigned)headrace_crc32c(bytes + length % 9, length, level));
    printf("crc all %08x\n", (unsigned)headrace_crc32c(bytes, sizeof bytes, level));
    for (int64_t wide = 2; wide <= 4; wide += 2)
        for (int64_t length = 2; length < 400; length += 17) {
            enum { ROWS = 6, SIZE = 3 };
            const void *sources[ROWS];
            int64_t samples[ROWS], into[SIZE * 400];
            int32_t ends[ROWS * 400];
            for (int row = 0; row < ROWS; row++) {
                sources[row] = bytes + wide * (int64_t)(next() % 10000);
                samples[row] = next() % 5 ? row : -1;
            }
            uint32_t eos = wide == 2 ? *(const uint16_t *)sources[1] : *(const uint32_t *)sources[1];
            struct rows rows = {sources, samples, ROWS, length, wide, SIZE, ends, eos, level};
            for (int batch = 0; batch < ROWS / SIZE; batch++) {
                int32_t *from = rows.ends;
                int64_t found = headrace_batch(&rows, batch, into);
                printf("batch %" PRId64 " %" PRId64 " %" PRId64 " %08x %08x\n", wide, length, found,
                       (unsigned)digest(into, (size_t)(SIZE * length) * sizeof *into),
                       (unsigned)digest(from, (size_t)(found >> 1) * sizeof *from));
            }
        }
    static const int64_t sizes[] = {1, 2, 10, 1000003, 2147483647, 9007199254740993, 4611686018427387904};
    for (int which = 0; which < 7; which++)
        for (int inverse = 0; inverse < 2; inverse++) {
            uint64_t keys[ROUNDS];
            int64_t indices[50], numbers[50];
            for (int round = 0; round < ROUNDS; round++) keys[round] = next();
            for (int k = 0; k < 50; k++) {
                indices[k] = (int64_t)(next() % (uint64_t)sizes[which]);
                numbers[k] = (int64_t)(next() >> 2);
            }
            headrace_walk(50, indices, &sizes[which], 0, keys, 0, which % 2 ? numbers : NULL, inverse);
            printf("walk %" PRId64 " %08x\n", sizes[which], (unsigned)digest(indices, sizeof indices));
        }
    return 0;
}
