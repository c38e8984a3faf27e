/* copy.h - copies of large buffers, through the caches or around them. */
#ifndef XCCL_COPY_H
#define XCCL_COPY_H

#include <stdint.h>

/* memcpy, but as fast whatever the alignments: the one of the C library uses `rep movsb`, which loses up to half where
 * destination and source are a few bytes apart modulo a page. NumPy's large arrays begin 16 bytes behind a page, shared
 * ones on it. */
void xccl_copy(void *to, const void *from, uint64_t bytes);

/* As memcpy, with non-temporal stores: the lines of `dst` are neither fetched before they are written, nor do they
 * displace others. Worth it when nobody reads them soon, or only a core that shares no cache with this one. Ordered
 * before the stores that follow, as memcpy's. */
void xccl_copy_streaming(void *dst, const void *src, uint64_t bytes);

/* From this size on a copy by one of `ranks` ranks had better be streaming: source and destination together fill the
 * rank's share of the last-level cache, so whoever reads the destination would not find it there anyway. */
uint64_t xccl_copy_streaming_bytes(int ranks);

/* The faster of both for a buffer of `whole` bytes, of which this may be a part. */
static inline void xccl_copy_part(void *to, const void *from, uint64_t bytes, uint64_t whole,
                                  uint64_t streaming_bytes) {
    if (whole >= streaming_bytes)
        xccl_copy_streaming(to, from, bytes);
    else
        xccl_copy(to, from, bytes);
}

/* Ticks of a steady clock, to compare durations; a read costs a few nanoseconds. */
uint64_t xccl_ticks(void);

#endif
