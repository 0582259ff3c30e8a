/*
 * Connections that have ended, and their places: one place at a time, from `go_round`, which the
 * keeper runs over all places.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_connect.h"
#include "express_numbers.h"
#include "express_places.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

/*
 * The bytes that a direction has carried, computed from its FIN: programs that ran at the same time
 * may have stored an older count.
 */
inlined __u64 carried_bytes(const struct splice_direction *from_peer)
{
	__u64 bytes = from_peer->bytes;

	return bytes +
	       (__u64)(__s64)(__s32)(from_peer->fin_seq - 1 - from_peer->begin_seq - (__u32)bytes);
}

/*
 * Whether the numbers that the server has seen are below those of the next connection from this
 * port. Our sequence numbers increase by one in 64 ns, our timestamps by one in 1 ms; a connection
 * that was faster than either has overtaken them.
 */
inlined int may_reuse_port_early(const struct express_ask *ask, const struct splice_direction *up,
				 __u64 now_ns)
{
	__u64 age_ns = now_ns - ask->begun_ns;
	__u32 ahead_ms = up->ts_recent - ask->first_client_tsval;

	return (__u64)ahead_ms * NS_PER_MS <= age_ns && up->bytes < age_ns / 65;
}

/* The time at which a resting connection has ended. */
inlined __u64 end_time_ns(const struct express_round *round, const struct express_ask *ask,
			  const struct splice *splice)
{
	__u64 ends_ns = ask->resting_since_ns, told_ns;

	/*
	 * The notification of the end (notify_worker()) may have come a moment after the end was
	 * counted.
	 */
	if (splice->worker == PF_EXPRESS_NO_WORKER) {
		told_ns = READ_ONCE(splice->clocks.end_noticed_ns);
		if (told_ns > ends_ns && told_ns < round->now_ns)
			ends_ns = told_ns;
	}
	return ends_ns;
}

/* Make a place LEAVING whose connection has rested for long enough. */
inlined void end_resting(struct express_round *round, struct express_ask *ask,
			 struct splice *splice, __u32 place, __u64 word)
{
	__s64 rested_ns = round->now_ns - ask->resting_since_ns;
	__u64 shortest_ns = round->least_rest_here_ns < round->least_rest_ns
				    ? round->least_rest_here_ns
				    : round->least_rest_ns;

	/*
	 * Most of them: it cannot have rested for long enough, wherever its ends are, and however
	 * its place is to be reused. Its record, which is in no cache, is not looked at.
	 */
	if (rested_ns < (__s64)shortest_ns)
		return;
	rested_ns = round->now_ns - end_time_ns(round, ask, splice);
	/* A record that no packet finds any more has rested before. */
	int is_soon = round->is_short || READ_ONCE(splice->state) == PF_SPLICE_FREE;
	int is_here = !splice->direction[PF_UP].interface && !splice->direction[PF_DOWN].interface;
	__u64 least_ns = is_here ? round->least_rest_here_ns : round->least_rest_ns;

	if (!may_reuse_port_early(ask, &splice->direction[PF_UP], round->now_ns))
		least_ns = round->rest_ns;
	if (READ_ONCE(ask->port_lost) || rested_ns < (__s64)(is_soon ? least_ns : round->rest_ns))
		return;
	delete_flows_of_place(splice, place);
	start_leaving(ask, splice, word, round->now_ns);
	round->leaving++;
}

/* Free a place that is LEAVING, once no program can still be running that may have found it. */
inlined void free_after_leaving(struct express_round *round, struct express_ask *ask,
				struct splice *splice, __u32 place, __u64 word)
{
	round->leaving++;
	/*
	 * Exchanged with the same state as a barrier: `resting_since_ns` must not be the value from
	 * before start_leaving() has stored that state.
	 */
	if (READ_ONCE(ask->port_lost) || !change_state(ask, word, PF_EXPRESS_LEAVING) ||
	    ask->resting_since_ns > round->passed_ns ||
	    !change_state(ask, word, PF_EXPRESS_FILLING))
		return;
	free_place(ask, splice, place);
	round->leaving--;
	round->freed++;
	round->unused++;
}

/*
 * Add an ended connection that no worker knows of to the sums of its key, if it needs no report of
 * its own. The place becomes RESTING.
 */
inlined void count_ended(struct express_round *round, struct express_ask *ask,
			 struct splice *splice, __u64 word)
{
	struct express_end_key key = {};
	struct express_ends *ends;
	__u64 ends_ns;

	if (splice->worker != PF_EXPRESS_NO_WORKER || !splice->id ||
	    ask->counted_number == (__u32)(word >> 3) ||
	    READ_ONCE(splice->state) != PF_SPLICE_ACTIVE || !splice->direction[PF_UP].fin_acked ||
	    !splice->direction[PF_DOWN].fin_acked)
		return;
	key.table = ask->listener_table;
	key.rule = ask->rule;
	key.target = ask->target;
	key.port = splice->direction[PF_UP].from.dport;
	ends = map_lookup(MAP_EXPRESS_ENDS_FD, &key);
	if (!ends || ask->begun_ns < ends->since_ns)
		return;
	/*
	 * Only the keeper, which runs this program, moves a connection from this state to another.
	 */
	ends->pairs++;
	ends->bytes[PF_UP] += carried_bytes(&splice->direction[PF_UP]);
	ends->bytes[PF_DOWN] += carried_bytes(&splice->direction[PF_DOWN]);
	splice->id = 0;
	/* Resting counts from the end, however late this round is. See end_time_ns(), too. */
	ends_ns = READ_ONCE(splice->clocks.end_noticed_ns);
	ask->resting_since_ns =
		ends_ns > ask->begun_ns && ends_ns < round->now_ns ? ends_ns : round->now_ns;
	change_state(ask, word, PF_EXPRESS_RESTING);
	round->counted++;
}
