/*
 * Access of the packet programs to a pair: its record, its two sockets, its worker.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "abi.h"
#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_socket.h"
#include "splice_valid.h"

/* Send an event about a pair to the ring of its worker, which reads the record then. */
inlined void notify_worker(struct splice *splice, __u32 index)
{
	struct splice_event event = { .index = index, .worker = splice->worker, .id = splice->id };
	__u32 worker = splice->worker;
	void *ring;

	if (worker == PF_EXPRESS_NO_WORKER) {
		/*
		 * No worker has a ring for it. The keeper looks at such records regularly; store
		 * when this was.
		 */
		WRITE_ONCE(splice->clocks.end_noticed_ns, bpf_ktime_get_ns());
		return;
	}
	ring = map_lookup(MAP_RINGS_FD, &worker);
	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

/* Delete both flows of a pair: later packets go to the stack. */
inlined void delete_flows(struct splice *splice)
{
	struct splice_key key = splice->direction[PF_UP].from;

	map_delete(MAP_FLOWS_FD, &key);
	key = splice->direction[PF_DOWN].from;
	map_delete(MAP_FLOWS_FD, &key);
}

/* Store in the pair table (`show`) how many bytes and packets a direction has carried. */
inlined void publish_bytes(struct splice *splice, struct splice_direction *from_peer,
			   __u32 direction)
{
	__u32 slot = splice->slot;
	struct pair *pair;
	struct kernel_direction *seen;
	int is_more = count_bytes(from_peer);

	pair = map_lookup(MAP_PAIRS_FD, &slot);
	/* The slot may serve another pair by now, if the worker has released this one. */
	if (!pair || pair->id != splice->id)
		return;
	seen = direction == PF_UP ? &pair->kernel[PF_UP] : &pair->kernel[PF_DOWN];
	seen->redirected_bytes = visible_bytes(from_peer);
	seen->redirected_packets = from_peer->packets;
	/* As on every datapath, only new bytes end idleness: segments without any do not. */
	if (is_more)
		seen->last_ns = bpf_ktime_get_coarse_ns();
}
