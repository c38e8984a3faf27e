#include "layers.h"
int xccl_p2p_open(xccl_comm_t *comm, int64_t deadline) {
    (void)comm;
    (void)deadline;
    return XCCL_OK;
}
int xccl_p2p_close(xccl_comm_t *comm, int64_t deadline) {
    (void)comm;
    (void)deadline;
    return XCCL_OK;
}
void xccl_p2p_discard(xccl_comm_t *comm) {
    (void)comm;
}
