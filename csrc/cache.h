/* cache.h - the last-level cache of the machine. */
#ifndef XCCL_CACHE_H
#define XCCL_CACHE_H

#include <stdint.h>

/* Bytes of the last-level cache of one core, which it may share with others. */
uint64_t xccl_cache_bytes(void);

#endif
