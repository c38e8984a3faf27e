/* layers.h - what a communicator opens and closes above the gas layer. */
#ifndef XCCL_LAYERS_H
#define XCCL_LAYERS_H

#include "comm.h"

/* open: collective; allocates the layer's blocks. close: collective; gives them back. discard: local, talks to nobody.
 */
/* Opens all layers above a fresh communicator, or none. Collective. */
int xccl_comm_open_layers(xccl_comm_t *comm, int64_t deadline);

int xccl_coll_open(xccl_comm_t *comm, int64_t deadline);
int xccl_coll_close(xccl_comm_t *comm, int64_t deadline);
void xccl_coll_discard(xccl_comm_t *comm);

int xccl_p2p_open(xccl_comm_t *comm, int64_t deadline);
/* Completes pending sends. Then, unless it is the world communicator (which each rank leaves alone), gives the rings
 * back. */
int xccl_p2p_close(xccl_comm_t *comm, int64_t deadline);
void xccl_p2p_discard(xccl_comm_t *comm);

#endif
