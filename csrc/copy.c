#include "copy.h"

#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#include <x86intrin.h>
#else
#include <time.h>
#endif

#include "cache.h"

enum { LINE = 64 };

/* ---- through the caches ---- */

#if defined(__x86_64__)
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

#else
void xccl_copy(void *to, const void *from, uint64_t bytes) {
    if (bytes > 0)
        memcpy(to, from, bytes);
}
#endif

/* ---- around the caches ---- */

/* Whole lines to an aligned address. The wider the store, the better: a line that is written in parts may leave the
 * core in parts, and memory takes each for a write of its own. */
#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void stream_512(unsigned char *dst, const unsigned char *src,
                                                          uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += LINE)
        _mm512_stream_si512((void *)(dst + at), _mm512_loadu_si512((const void *)(src + at)));
}

__attribute__((target("avx2"))) static void stream_256(unsigned char *dst, const unsigned char *src, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += LINE) {
        __m256i low = _mm256_loadu_si256((const void *)(src + at));
        __m256i high = _mm256_loadu_si256((const void *)(src + at + LINE / 2));
        _mm256_stream_si256((void *)(dst + at), low);
        _mm256_stream_si256((void *)(dst + at + LINE / 2), high);
    }
}

static void stream_128(unsigned char *dst, const unsigned char *src, uint64_t bytes) {
    for (uint64_t at = 0; at < bytes; at += sizeof(__m128i))
        _mm_stream_si128((void *)(dst + at), _mm_loadu_si128((const void *)(src + at)));
}

static void stream_lines(unsigned char *dst, const unsigned char *src, uint64_t bytes) {
    if (__builtin_cpu_supports("avx512f"))
        stream_512(dst, src, bytes);
    else if (__builtin_cpu_supports("avx2"))
        stream_256(dst, src, bytes);
    else
        stream_128(dst, src, bytes);
    /* non-temporal stores are weakly ordered: a release store alone would not wait for them */
    _mm_sfence();
}
#else
static void stream_lines(unsigned char *dst, const unsigned char *src, uint64_t bytes) {
    memcpy(dst, src, bytes);
}
#endif

void xccl_copy_streaming(void *dst, const void *src, uint64_t bytes) {
    unsigned char *to = dst;
    const unsigned char *from = src;
    uint64_t head = -(uintptr_t)to % LINE;
    head = head < bytes ? head : bytes;
    memcpy(to, from, head);
    uint64_t lines = (bytes - head) / LINE * LINE;
    stream_lines(to + head, from + head, lines);
    memcpy(to + head + lines, from + head + lines, bytes - head - lines);
}

uint64_t xccl_copy_streaming_bytes(int ranks) {
    return xccl_cache_bytes() / (2 * (uint64_t)ranks);
}

uint64_t xccl_ticks(void) {
#if defined(__x86_64__)
    return __rdtsc();
#elif defined(__aarch64__)
    uint64_t ticks;
    __asm__ volatile("mrs %0, cntvct_el0" : "=r"(ticks));
    return ticks;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
#endif
}
