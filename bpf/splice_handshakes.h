/*
 * How connections began lately, by the addresses of packets that come from a peer.
 *
 * The map is an array of sets of four. Which set it is, and what marks an entry in it, is drawn
 * from the addresses with the numbers in the first element, which nobody knows: so nobody can
 * choose an entry to push out by other addresses. A sender of SYNs in a peer's name, from its port,
 * can: four between a handshake and the begin of its pair, which is copied then. Fewer change
 * nothing, as each connection is asked for by its own ISN.
 * pyforwarder/datapath/splice/handshakes.py reads it. Not a hash (LRU_HASH): that takes a
 * microsecond for each SYN, and every connection has two of them.
 *
 * Programs on two processors may write to the same set. Then entries may be lost, or have another's
 * mark: such an entry has another ISN than the connection that is asked for.
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"

/* pyforwarder/datapath/splice/handshakes.py does the same. */
inlined __u64 mark_of(const struct splice_key *key, const struct splice_handshakes *secret)
{
	const __u32 *word = (const __u32 *)key;
	__u64 mark = secret->latest[0].mark;
	__u32 i;

#pragma unroll
	for (i = 0; i < sizeof(*key) / 4; i++) {
		mark = (mark ^ word[i]) * secret->latest[1].mark;
		mark ^= mark >> 32;
	}
	return mark;
}

/*
 * A connection begins, and its packets come by here under these addresses: that is what the keeper
 * wants to know of a pair. Behind a NAT rule of this host a socket has other ones. What comes again
 * counts where it came first: a device on top of another one sees it, too.
 */
inlined void remember_handshake(const struct splice_key *key, __u32 interface, __u32 isn)
{
	__u32 number = 0, i;
	struct splice_handshakes *set = map_lookup(MAP_HANDSHAKES_FD, &number);
	__u64 mark;

	if (!set)
		return; /* never */
	mark = mark_of(key, set);
	number = 1 + (mark >> 32) % PF_HANDSHAKE_SETS;
	set = map_lookup(MAP_HANDSHAKES_FD, &number);
	if (!set)
		return; /* never */
#pragma unroll
	for (i = 0; i < PF_HANDSHAKE_WAYS; i++) {
		if (set->latest[i].mark == mark && (__u32)set->latest[i].began == isn)
			return;
	}
#pragma unroll
	for (i = PF_HANDSHAKE_WAYS - 1; i > 0; i--)
		set->latest[i] = set->latest[i - 1];
	set->latest[0].mark = mark;
	set->latest[0].began = (__u64)interface << 32 | isn;
}
