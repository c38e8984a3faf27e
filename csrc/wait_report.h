/* wait_report.h - the report of a wait that timed out (shm layer; internal part). */
#ifndef XCCL_WAIT_REPORT_H
#define XCCL_WAIT_REPORT_H

#include "wait.h"

/* Name of what this rank is in. */
const char *xccl_wait_operation(const xccl_world_t *world);

/* Describes what is missing and what every rank does, as text and for xccl_error_missing; returns TIMEOUT. */
int xccl_wait_fail_timeout(xccl_world_t *world, const xccl_wait_t *wait);

#endif
