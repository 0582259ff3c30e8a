/*
 * Places, in which connections are opened: their states, the queue of free places, and the counters
 * of outcomes.
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

/* Add 1 to a counter (PF_COUNT_...). */
inlined void count_event(__u32 what)
{
	__u64 *n = map_lookup(MAP_EXPRESS_COUNTS_FD, &what);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* Count outcomes by target; the code that decides which servers are up reads these counters. */
inlined void count_opened(__u32 target)
{
	struct express_outcome *outcome = map_lookup(MAP_EXPRESS_OUTCOMES_FD, &target);

	if (!outcome)
		return; /* never */
	__sync_fetch_and_add(&outcome->opened, 1);
	WRITE_ONCE(outcome->in_a_row, 0);
}

/* Likewise for a connection that failed. */
inlined void count_failed(__u32 target)
{
	struct express_outcome *outcome = map_lookup(MAP_EXPRESS_OUTCOMES_FD, &target);

	if (!outcome)
		return; /* never */
	__sync_fetch_and_add(&outcome->in_a_row, 1);
	__sync_fetch_and_add(&outcome->failed, 1);
}

/*
 * Change the state of a place. Returns 0, and changes nothing, if another processor has changed it
 * first, or it has another connection.
 */
inlined int change_state(struct express_ask *ask, __u64 word, __u64 state)
{
	__u64 next = (word & ~(__u64)PF_EXPRESS_STATE_MASK) | state;

	return __sync_val_compare_and_swap(&ask->word, word, next) == word;
}

/* Whether a place's word has this state. */
inlined int has_state(__u64 word, __u64 state)
{
	return (word & PF_EXPRESS_STATE_MASK) == state;
}

/* Free a place: it goes to the end of the queue. The caller knows that no program still uses it. */
inlined void free_place(struct express_ask *ask, struct splice *splice, __u32 place)
{
	WRITE_ONCE(splice->state, PF_SPLICE_FREE);
	*(volatile __u64 *)&ask->word &= ~(__u64)PF_EXPRESS_STATE_MASK;
	queue_push(map_pointer(MAP_EXPRESS_PLACES_FD), &place, 0);
}

/* Delete a flow, unless it leads to another record by now: its packets go to the stack then. */
inlined void delete_flow_of_place(struct splice_key *key, __u32 index)
{
	struct splice_flow *flow = map_lookup(MAP_FLOWS_FD, key);

	if (flow && flow->index == index)
		map_delete(MAP_FLOWS_FD, key);
}

/* Delete both flows of a place. */
inlined void delete_flows_of_place(struct splice *splice, __u32 place)
{
	struct splice_key key = splice->direction[PF_UP].from;

	delete_flow_of_place(&key, place + FIRST_SPLICE);
	key = splice->direction[PF_DOWN].from;
	delete_flow_of_place(&key, place + FIRST_SPLICE);
}

/*
 * Make a place LEAVING whose flows are deleted, if its word is still `word`. A program that has
 * found the record just before may have been suspended in the middle (by the hypervisor of a
 * virtual machine, for seconds), and may write to the place or send a packet when it continues. So
 * the place is reused only when no such program can still be running (free_after_leaving()).
 */
inlined void start_leaving(struct express_ask *ask, struct splice *splice, __u64 word, __u64 now_ns)
{
	WRITE_ONCE(splice->state, PF_SPLICE_FREE);
	ask->resting_since_ns = now_ns;
	change_state(ask, word, PF_EXPRESS_LEAVING); /* also a barrier */
}

/*
 * Delete the flows of a place, and make it LEAVING. The caller has made it FILLING, a state that no
 * other program changes.
 */
inlined void abandon_place(struct express_ask *ask, struct splice *splice, __u32 place, __u64 word)
{
	delete_flows_of_place(splice, place);
	/*
	 * The time is read after the deletion: the keeper's next round then waits for all programs
	 * that may have found the flows.
	 */
	start_leaving(ask, splice, (word & ~(__u64)PF_EXPRESS_STATE_MASK) | PF_EXPRESS_FILLING,
		      bpf_ktime_get_ns());
}
