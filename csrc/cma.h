/* cma.h - cross-memory attach: a rank reads the ordinary memory of a peer (gas layer; internal).
 *
 * The kernel copies from one process to another (process_vm_readv): once, where a message that goes through shared
 * memory is copied in and out. It takes a system call, and the right to trace the peer, which a container, Yama or a
 * PID namespace may refuse. So nothing depends on it. When a world opens, each rank tries to read a random word of each
 * of its peers, and tells them whether it found all. That proves more than the right: a PID may mean another process
 * here than there.
 */
#ifndef XCCL_CMA_H
#define XCCL_CMA_H

#include "shm.h"

/* Publishes the word that peers try to read. Before this rank says that it has attached. */
void xccl_cma_open(xccl_world_t *world);

/* Tries to read all peers, which have attached, and publishes the result; peers know it after the next sync. */
void xccl_cma_probe(xccl_world_t *world);

/* World rank `reader` can read the memory of all its peers. */
bool xccl_cma_can_read(const xccl_world_t *world, int reader);

/* Copies [address, address+bytes) of the process of world rank `rank` to `to`. PEER_LOST or SYSTEM if that fails. */
int xccl_cma_read(xccl_world_t *world, int rank, void *to, uint64_t address, uint64_t bytes);

/* The same the other way. */
int xccl_cma_write(xccl_world_t *world, int rank, const void *from, uint64_t address, uint64_t bytes);

#endif
