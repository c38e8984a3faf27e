/* api.c - opens and closes a communicator with all its layers. */
#include "cma.h"
#include "comm.h"
#include "layers.h"
#include "status.h"
#include "wait.h"

int xccl_comm_open_layers(xccl_comm_t *comm, int64_t deadline) {
    int status = xccl_coll_open(comm, deadline);
    if (status != XCCL_OK)
        return status;
    status = xccl_p2p_open(comm, deadline);
    if (status != XCCL_OK)
        xccl_coll_discard(comm);
    return status;
}

int xccl_comm_open(xccl_world_t *world, xccl_comm_t **out) {
    xccl_comm_t *comm = NULL;
    int status = xccl_comm_create_world(world, &comm);
    if (status != XCCL_OK)
        return status;
    xccl_cma_probe(world);
    status = xccl_comm_open_layers(
        comm, xccl_deadline_at(world, xccl_deadline(world, world->header->config.init_timeout_ns)));
    if (status != XCCL_OK) {
        xccl_comm_destroy(comm);
        return status;
    }
    world->opened_sequence = atomic_load_explicit(&world->ranks[world->rank].sequence, memory_order_relaxed);
    *out = comm;
    return XCCL_OK;
}

int xccl_comm_split(xccl_comm_t *parent, int64_t color, int64_t key, int64_t timeout_ns, xccl_comm_t **out) {
    int status = xccl_comm_check(parent);
    if (status != XCCL_OK)
        return status;
    status = xccl_op_begin(parent->world, XCCL_OP_SPLIT);
    if (status != XCCL_OK)
        return status;
    int64_t deadline = xccl_deadline_at(parent->world, xccl_deadline(parent->world, timeout_ns));
    xccl_comm_t *comm = NULL;
    status = xccl_comm_settle(parent, xccl_comm_create_split(parent, color, key, deadline, &comm));
    if (status == XCCL_OK && comm) {
        status = xccl_comm_open_layers(comm, deadline);
        if (status != XCCL_OK)
            xccl_comm_destroy(comm);
    }
    if (status == XCCL_OK)
        *out = comm;
    return status;
}

int xccl_comm_close(xccl_comm_t *comm, int64_t timeout_ns) {
    int status = xccl_check_usable(comm->world);
    if (status == XCCL_ERR_USAGE)
        return status;
    if (status == XCCL_ERR_ABORTED || comm->broken) {
        /* the members are out of step: there is nobody to complete anything with */
        xccl_comm_discard(comm);
        return XCCL_OK;
    }
    status = xccl_op_begin(comm->world, XCCL_OP_CLOSE);
    if (status != XCCL_OK)
        return status;
    int64_t deadline = xccl_deadline_at(comm->world, xccl_deadline(comm->world, timeout_ns));
    status = xccl_comm_settle(comm, xccl_p2p_close(comm, deadline));
    if (status == XCCL_OK && comm->context != 0)
        status = xccl_comm_settle(comm, xccl_coll_close(comm, deadline));
    if (status != XCCL_OK)
        return status;
    xccl_comm_discard(comm);
    return XCCL_OK;
}

void xccl_comm_discard(xccl_comm_t *comm) {
    xccl_p2p_discard(comm);
    xccl_coll_discard(comm);
    xccl_comm_destroy(comm);
}
