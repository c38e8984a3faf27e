/* status.h - the calling thread's error message. The function that first finds an error describes it;
 * those above it pass the status on unchanged. */
#ifndef XCCL_STATUS_H
#define XCCL_STATUS_H

#include "xccl.h"

/* An error of this thread, kept for later. */
typedef struct xccl_failure_t {
    int about;
    xccl_rank_info_t lost;
    char text[];
} xccl_failure_t;

/* The last error, with all that is known of it; NULL: no memory. To be freed. */
xccl_failure_t *xccl_failure_keep(void);

/* Makes a kept error the last one again, and returns `status`. */
int xccl_failure_again(const xccl_failure_t *failure, int status);

/* Records the message and returns `status`, so that callers write `return xccl_fail(...)`. */
int xccl_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* As xccl_fail, for an error that is about world rank `rank`. */
int xccl_fail_about(int status, int rank, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Fails with PEER_LOST about `rank`, and keeps `info` for xccl_error_lost. */
int xccl_fail_lost(int rank, const xccl_rank_info_t *info, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Fails with SYSTEM: `field`, which `peer` wrote, cannot be true. */
int xccl_fail_damaged(const char *operation, int rank, int peer, const char *field, uint64_t got, uint64_t least,
                      uint64_t most);

/* As xccl_fail with ": <strerror(error)>" appended and status XCCL_ERR_SYSTEM. */
int xccl_fail_errno(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* From now on the messages of this thread name the seed of the perturbed world that it works in; 0: of none. */
void xccl_status_name_seed(uint64_t seed);

#endif
