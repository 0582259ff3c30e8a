/*
 * What becomes of connections that have ended, as the keeper goes round over all places.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_connect.h"
#include "express_numbers.h"
#include "express_places.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

/* What a direction has carried, by its FIN: programs that met may have stored an older count. */
inlined __u64 carried_bytes(const struct splice_direction *way)
{
	__u64 bytes = way->bytes;

	return bytes + (__u64)(__s64)(__s32)(way->fin_seq - 1 - way->begin - (__u32)bytes);
}

/*
 * Whether the numbers that a server has seen are below those of the next connection: ours rise by
 * one in 64 ns, and its timestamps by one in 1 ms.
 */
inlined int was_slow(const struct express_ask *ask, const struct splice_direction *up, __u64 now_ns)
{
	__u64 age_ns = now_ns - ask->begun_ns;
	__u32 ahead_ms = up->recent - ask->first_tc;

	return (__u64)ahead_ms * NS_PER_MS <= age_ns && up->bytes < age_ns / 65;
}

/* When the end was of a connection that rests. */
inlined __u64 end_of(const struct express_round *round, const struct express_ask *ask,
		     const struct splice *splice)
{
	__u64 ends_ns = ask->rests_ns, told_ns;

	/* What the end itself says (`tell`) may have come a moment after the end was counted. */
	if (splice->worker == PF_EXPRESS_NO_WORKER) {
		told_ns = *(volatile __u64 *)&splice->client_clock;
		if (told_ns > ends_ns && told_ns < round->now_ns)
			ends_ns = told_ns;
	}
	return ends_ns;
}

/* When a connection has rested, no packet finds it any more. */
inlined void leave_rested(struct express_round *round, struct express_ask *ask,
			  struct splice *splice, __u32 place, __u64 word)
{
	__s64 rested_ns = round->now_ns - end_of(round, ask, splice);
	/* What no packet finds any more has lingered before. */
	int is_soon = round->is_short || volatile_read(splice->state) == PF_SPLICE_FREE;
	int is_here = !splice->way[PF_UP].interface && !splice->way[PF_DOWN].interface;
	__u64 least_ns = is_here ? round->least_rest_here_ns : round->least_rest_ns;

	if (!was_slow(ask, &splice->way[PF_UP], round->now_ns))
		least_ns = round->rest_ns;
	if (volatile_read(ask->port_lost) ||
	    rested_ns < (__s64)(is_soon ? least_ns : round->rest_ns))
		return;
	forget_flows(splice, place);
	leave(ask, splice, word, round->now_ns);
	round->leaving++;
}

inlined void free_left(struct express_round *round, struct express_ask *ask, struct splice *splice,
		       __u32 place, __u64 word)
{
	round->leaving++;
	/* To the same state, which is a barrier: not `rests_ns` of before `leave` with that. */
	if (volatile_read(ask->port_lost) || !change(ask, word, PF_EXPRESS_LEAVING) ||
	    ask->rests_ns > round->passed_ns || !change(ask, word, PF_EXPRESS_FILLING))
		return;
	give_back(ask, splice, place);
	round->leaving--;
	round->freed++;
	round->unused++;
}

/* Count a connection that has ended without a worker, if nobody needs to be told of it alone. */
inlined void count_ended(struct express_round *round, struct express_ask *ask,
			 struct splice *splice, __u64 word)
{
	struct express_end_key key = {};
	struct express_ends *ends;
	__u64 ends_ns;

	if (splice->worker != PF_EXPRESS_NO_WORKER || !splice->id ||
	    ask->counted == (__u32)(word >> 3) ||
	    volatile_read(splice->state) != PF_SPLICE_ACTIVE || !splice->way[PF_UP].fin_acked ||
	    !splice->way[PF_DOWN].fin_acked)
		return;
	key.table = ask->listener_table;
	key.rule = ask->rule;
	key.target = ask->target;
	key.port = splice->way[PF_UP].from.dport;
	ends = map_lookup(MAP_EXPRESS_ENDS_FD, &key);
	if (!ends || ask->begun_ns < ends->since_ns)
		return;
	/* Nobody but the keeper, which runs this, takes a connection from here to anywhere else. */
	ends->pairs++;
	ends->bytes[PF_UP] += carried_bytes(&splice->way[PF_UP]);
	ends->bytes[PF_DOWN] += carried_bytes(&splice->way[PF_DOWN]);
	splice->id = 0;
	/* However late this is: since the end. See `end_of`, too. */
	ends_ns = *(volatile __u64 *)&splice->client_clock;
	ask->rests_ns =
		ends_ns > ask->begun_ns && ends_ns < round->now_ns ? ends_ns : round->now_ns;
	change(ask, word, PF_EXPRESS_RESTING);
	round->counted++;
}
