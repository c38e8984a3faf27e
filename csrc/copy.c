#include "copy.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>

enum { SMALL = 2048 }; /* below, the head and the tail of the copy cost more than alignment */

__attribute__((target("avx2"))) static void copy_avx2(unsigned char *out, const unsigned char *in, uint64_t bytes) {
    uint64_t at = -(uintptr_t)out & 63; /* no store crosses a line */
    memcpy(out, in, 64);
    for (; at + 128 <= bytes; at += 128) {
        __m256i a = _mm256_loadu_si256((const __m256i *)(in + at));
        __m256i b = _mm256_loadu_si256((const __m256i *)(in + at + 32));
        __m256i c = _mm256_loadu_si256((const __m256i *)(in + at + 64));
        __m256i d = _mm256_loadu_si256((const __m256i *)(in + at + 96));
        _mm256_store_si256((__m256i *)(out + at), a);
        _mm256_store_si256((__m256i *)(out + at + 32), b);
        _mm256_store_si256((__m256i *)(out + at + 64), c);
        _mm256_store_si256((__m256i *)(out + at + 96), d);
    }
    memcpy(out + at, in + at, bytes - at);
}

void xccl_copy(void *to, const void *from, uint64_t bytes) {
    if (bytes >= SMALL && __builtin_cpu_supports("avx2"))
        copy_avx2(to, from, bytes);
    else if (bytes > 0)
        memcpy(to, from, bytes);
}

void xccl_copy_streaming(void *to, const void *from, uint64_t bytes) {
    unsigned char *out = to;
    const unsigned char *in = from;
    /* whole lines of the destination: stores to a part of one would have to wait for the rest of it */
    uint64_t head = -(uintptr_t)out & 63;
    if (head > bytes)
        head = bytes;
    memcpy(out, in, head);
    uint64_t at = head;
    for (; at + 64 <= bytes; at += 64) {
        __m128i a = _mm_loadu_si128((const __m128i *)(in + at));
        __m128i b = _mm_loadu_si128((const __m128i *)(in + at + 16));
        __m128i c = _mm_loadu_si128((const __m128i *)(in + at + 32));
        __m128i d = _mm_loadu_si128((const __m128i *)(in + at + 48));
        _mm_stream_si128((__m128i *)(out + at), a);
        _mm_stream_si128((__m128i *)(out + at + 16), b);
        _mm_stream_si128((__m128i *)(out + at + 32), c);
        _mm_stream_si128((__m128i *)(out + at + 48), d);
    }
    memcpy(out + at, in + at, bytes - at);
    /* non-temporal stores are not ordered by a release store: this fence does it */
    _mm_sfence();
}
#else
void xccl_copy(void *to, const void *from, uint64_t bytes) {
    if (bytes > 0)
        memcpy(to, from, bytes);
}

void xccl_copy_streaming(void *to, const void *from, uint64_t bytes) {
    memcpy(to, from, bytes);
}
#endif

/* Of the kernel, because sysconf(_SC_LEVEL3_CACHE_SIZE) is wrong by the number of cores under some hypervisors. */
static uint64_t last_level_cache(void) {
    uint64_t kilobytes = 0;
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "re");
    char text[32];
    if (file) {
        if (fgets(text, sizeof text, file))
            kilobytes = strtoull(text, NULL, 10);
        fclose(file);
    }
    return kilobytes ? kilobytes << 10 : 32 << 20;
}

uint64_t xccl_copy_streaming_bytes(int ranks) {
    return last_level_cache() / (2 * (uint64_t)ranks);
}
