#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Long enough for a timeout report with one line a rank of a large world; longer ones are cut at the end. */
static _Thread_local char message[32768];
static _Thread_local int about = -1;
static _Thread_local xccl_rank_info_t about_lost;
static _Thread_local uint64_t chaos_seed; /* 0: none */

const char *xccl_error_message(void) {
    return message;
}

int xccl_error_rank(void) {
    return about;
}

void xccl_status_name_seed(uint64_t seed) {
    chaos_seed = seed;
}

/* A message may be that of another rank, or of an earlier failure, which names the seed already. */
static void append_seed(void) {
    char text[48];
    if (chaos_seed == 0)
        return;
    snprintf(text, sizeof text, "XCCL_CHAOS=%llu", (unsigned long long)chaos_seed);
    size_t length = strlen(message);
    if (!strstr(message, text))
        snprintf(message + length, sizeof message - length, "\n(%s)", text);
}

int xccl_fail(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    append_seed();
    about = -1;
    /* A status may come from another rank's memory: whatever it is, this is a failure. */
    return status < 0 ? status : XCCL_ERR_SYSTEM;
}

int xccl_fail_about(int status, int rank, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    append_seed();
    about = rank;
    return status;
}

int xccl_fail_lost(int rank, const xccl_rank_info_t *info, const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    append_seed();
    about = rank;
    about_lost = *info;
    return XCCL_ERR_PEER_LOST;
}

xccl_failure_t *xccl_failure_keep(void) {
    size_t bytes = strlen(message) + 1;
    xccl_failure_t *failure = malloc(sizeof *failure + bytes);
    if (!failure)
        return NULL;
    failure->about = about;
    failure->lost = about_lost;
    memcpy(failure->text, message, bytes);
    return failure;
}

int xccl_failure_again(const xccl_failure_t *failure, int status) {
    if (!failure)
        return xccl_fail(status, "no memory for the error message");
    xccl_fail(status, "%s", failure->text);
    about = failure->about;
    about_lost = failure->lost;
    return status;
}

void xccl_error_lost(xccl_rank_info_t *out) {
    *out = about_lost;
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
    append_seed();
    return XCCL_ERR_SYSTEM;
}
