/* process.h - what the kernel knows of the processes of a world (shm layer; internal).
 *
 * Two sources. /proc tells of processes in the own PID namespace. For those of other containers there are locks: each
 * rank holds a lock on one byte of the object, its creator on one more, and the kernel drops them when the holder ends,
 * however it ends. A lock belongs to an open file description, so each holder opens the object for itself.
 */
#ifndef XCCL_PROCESS_H
#define XCCL_PROCESS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct xccl_process_t {
    char state; /* letter of /proc: R, S, Z, ... */
    uint64_t start_time;
} xccl_process_t;

/* What /proc says of a process of the own PID namespace; false if it cannot be read. */
bool xccl_process_read(int pid, xccl_process_t *out);

/* Number of the PID namespace that /proc shows and this process lives in; 0 if those differ or cannot be told. */
uint64_t xccl_process_namespace(void);

/* Another open file description of what `fd` refers to, with the same access; -1 and errno on failure. */
int xccl_process_reopen(int fd);

/* Locks one byte for the open file description `fd`; false if somebody else holds it, or there are no such locks. */
bool xccl_process_hold(int fd, uint64_t byte);

/* Somebody else holds `byte`; also true when that cannot be told. */
bool xccl_process_is_held(int fd, uint64_t byte);

/* Returns when nobody else holds `byte`; false if that cannot be told. */
bool xccl_process_await_release(int fd, uint64_t byte);

#endif
