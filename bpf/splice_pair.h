/*
 * A pair as its packets' programs know it: its record, our two sockets, the worker that has them.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "abi.h"
#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_socket.h"
#include "splice_valid.h"

inlined void tell(struct splice *splice, __u32 index)
{
	struct splice_event event = { .index = index, .worker = splice->worker, .id = splice->id };
	__u32 worker = splice->worker;
	void *ring;

	if (worker == PF_EXPRESS_NO_WORKER) {
		/* It is looked at by the clock, and says when it has ended. */
		*(volatile __u64 *)&splice->client_clock = bpf_ktime_get_ns();
		return;
	}
	ring = map_lookup(MAP_RINGS_FD, &worker);
	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

inlined void forget(struct splice *splice)
{
	struct splice_key key = splice->way[PF_UP].from;

	map_delete(MAP_FLOWS_FD, &key);
	key = splice->way[PF_DOWN].from;
	map_delete(MAP_FLOWS_FD, &key);
}

/* Tell userspace, through the pair's record, how many bytes a direction has carried. */
inlined void show_bytes(struct splice *splice, struct splice_direction *way, __u32 direction)
{
	__u32 slot = splice->slot;
	struct pair *pair;
	struct verdict_direction *seen;
	int is_more = count_bytes(way);

	pair = map_lookup(MAP_PAIRS_FD, &slot);
	/* The pair's record is another's once the worker has let go of this one. */
	if (!pair || pair->id != splice->id)
		return;
	seen = direction == PF_UP ? &pair->verdict[PF_UP] : &pair->verdict[PF_DOWN];
	seen->redirected_bytes = shown_bytes(way);
	seen->redirected_packets = way->packets;
	/* As on every datapath a pair is idle as long as no byte moves, also if segments do. */
	if (is_more)
		seen->last_ns = bpf_ktime_get_coarse_ns();
}
