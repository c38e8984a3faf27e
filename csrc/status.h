/* status.h - the calling thread's error message. The function that first finds an error describes it;
 * those above it pass the status on unchanged. */
#ifndef XCCL_STATUS_H
#define XCCL_STATUS_H

#include "xccl.h"

/* Records the message and returns `status`, so that callers write `return xccl_fail(...)`. */
int xccl_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* As xccl_fail, for an error that is about world rank `rank`. */
int xccl_fail_about(int status, int rank, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* As xccl_fail with ": <strerror(error)>" appended and status XCCL_ERR_SYSTEM. */
int xccl_fail_errno(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* From now on the messages of this thread name the seed of the perturbed world that it works in; 0: of none. */
void xccl_status_name_seed(uint64_t seed);

#endif
