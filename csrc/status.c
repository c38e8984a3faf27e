#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Long enough for a timeout report with one line a rank of a large world; longer ones are cut at the end. */
static _Thread_local char message[32768];
static _Thread_local int about = -1;

const char *xccl_error_message(void) {
    return message;
}

int xccl_error_rank(void) {
    return about;
}

int xccl_fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    about = -1;
    /* A status may come from another rank's memory: whatever it is, this is a failure. */
    return status < 0 ? status : XCCL_ERR_SYSTEM;
}

int xccl_fail_about(int status, int rank, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    about = rank;
    return status;
}

int xccl_fail_damaged(const char *operation, int rank, int peer, const char *field, uint64_t got, uint64_t least,
                      uint64_t most) {
    return xccl_fail(XCCL_ERR_SYSTEM,
                     "%s on rank %d: damaged shared memory: %s from rank %d is %llu, expected %llu to %llu; a store of "
                     "some rank went astray: AddressSanitizer or a debugger's watchpoint may show whose",
                     operation, rank, field, peer, (unsigned long long)got, (unsigned long long)least,
                     (unsigned long long)most);
}

int xccl_fail_errno(int error, const char *format, ...) {
    va_list args;
    va_start(args, format);
    int length = vsnprintf(message, sizeof message, format, args);
    va_end(args);
    about = -1;
    if (length >= 0 && (size_t)length < sizeof message)
        snprintf(message + length, sizeof message - (size_t)length, ": %s", strerror(error));
    return XCCL_ERR_SYSTEM;
}
