/* copy.h - copies of large buffers (gas layer). */
#ifndef XCCL_COPY_H
#define XCCL_COPY_H

#include <stdint.h>

/* memcpy, but as fast whatever the alignments: the one of the C library uses `rep movsb`, which loses up to half where
 * destination and source are a few bytes apart modulo a page. NumPy's large arrays begin 16 bytes behind a page, shared
 * ones on it. */
void xccl_copy(void *to, const void *from, uint64_t bytes);

/* Copies with non-temporal stores: the destination's lines are written to memory without being fetched first, and are
 * in no cache afterwards. Complete on return: a later release store publishes it. The ranges do not overlap. */
void xccl_copy_streaming(void *to, const void *from, uint64_t bytes);

/* From this size on a copy by one of `ranks` ranks had better be streaming: source and destination together fill the
 * rank's share of the last-level cache, so whoever reads the destination would not find it there anyway. */
uint64_t xccl_copy_streaming_bytes(int ranks);

#endif
