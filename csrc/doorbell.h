/* doorbell.h - the futex on which a rank sleeps (shm layer; for wait.c). Ringing it is xccl_ring of wait.h. */
#ifndef XCCL_DOORBELL_H
#define XCCL_DOORBELL_H

#include "shm.h"

/* Before the rank says that it has attached. */
void xccl_doorbell_open(xccl_world_t *world);

/* From here on the rank is rung for everything that changes. It then looks once more, and sleeps with the value that is
 * returned, or not; then it disarms. */
uint32_t xccl_doorbell_arm(xccl_world_t *world);
void xccl_doorbell_disarm(xccl_world_t *world);

/* Sleeps for so long at most. True if rung since it was armed. */
bool xccl_doorbell_sleep(xccl_world_t *world, uint32_t bell, int64_t ns);

#endif
