/*
 * Places, in which connections are opened: their states, the queue of those that are free, and what
 * becomes of servers, as far as it is counted.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_choice.h"
#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

static long (*queue_push)(void *map, const void *value,
			  __u64 flags) = (void *)BPF_FUNC_map_push_elem;

inlined void count(__u32 what)
{
	__u64 *n = map_lookup(MAP_EXPRESS_COUNTS_FD, &what);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* What became of a server that was asked for, for who decides which servers rest. */
inlined void opened(__u32 target)
{
	struct express_outcome *outcome = map_lookup(MAP_EXPRESS_OUTCOMES_FD, &target);

	if (!outcome)
		return; /* never */
	__sync_fetch_and_add(&outcome->opened, 1);
	*(volatile __u32 *)&outcome->in_a_row = 0;
}

inlined void failed(__u32 target)
{
	struct express_outcome *outcome = map_lookup(MAP_EXPRESS_OUTCOMES_FD, &target);

	if (!outcome)
		return; /* never */
	__sync_fetch_and_add(&outcome->in_a_row, 1);
	__sync_fetch_and_add(&outcome->failed, 1);
}

/* From one state to another, unless another processor has been quicker, or another connection. */
inlined int change(struct express_ask *ask, __u64 word, __u64 state)
{
	__u64 next = (word & ~(__u64)PF_EXPRESS_STATE_MASK) | state;

	return __sync_val_compare_and_swap(&ask->word, word, next) == word;
}

inlined int is_in(__u64 word, __u64 state)
{
	return (word & PF_EXPRESS_STATE_MASK) == state;
}

/* The place is free again, behind all others that are. No program may have it from before. */
inlined void give_back(struct express_ask *ask, struct splice *splice, __u32 place)
{
	*(volatile __u32 *)&splice->state = PF_SPLICE_FREE;
	*(volatile __u64 *)&ask->word &= ~(__u64)PF_EXPRESS_STATE_MASK;
	queue_push(map_pointer(MAP_EXPRESS_PLACES_FD), &place, 0);
}

/* What comes from there is for the stack, unless another pair has that place by now. */
inlined void forget_flow(struct splice_key *key, __u32 index)
{
	struct splice_flow *flow = map_lookup(MAP_FLOWS_FD, key);

	if (flow && flow->index == index)
		map_delete(MAP_FLOWS_FD, key);
}

inlined void forget_flows(struct splice *splice, __u32 place)
{
	struct splice_key key = splice->way[PF_UP].from;

	forget_flow(&key, place + FIRST_SPLICE);
	key = splice->way[PF_DOWN].from;
	forget_flow(&key, place + FIRST_SPLICE);
}

/*
 * No packet finds the connection any more, whose word is this one. A program that has found it just
 * before may have been stopped in the middle (by the host of a virtual machine, for seconds), and
 * write to the place, or send what it says, when it goes on. So the place is another's when no such
 * program runs any more (`free_left`).
 */
inlined void leave(struct express_ask *ask, struct splice *splice, __u64 word, __u64 now_ns)
{
	*(volatile __u32 *)&splice->state = PF_SPLICE_FREE;
	ask->rests_ns = now_ns;
	change(ask, word, PF_EXPRESS_LEAVING); /* a barrier, too */
}

/* Likewise, by who has made it FILLING, which nobody else changes. */
inlined void leave_at_once(struct express_ask *ask, struct splice *splice, __u32 place, __u64 word)
{
	forget_flows(splice, place);
	/* Behind that: a round that is later has the keeper wait for all that may have found it. */
	leave(ask, splice, (word & ~(__u64)PF_EXPRESS_STATE_MASK) | PF_EXPRESS_FILLING,
	      bpf_ktime_get_ns());
}
