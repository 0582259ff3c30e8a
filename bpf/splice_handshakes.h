/*
 * How connections began lately, by the addresses of packets that come from a peer.
 *
 * The map is an array of sets of four. Which set it is, and what marks an entry in it, is drawn
 * from the addresses with the numbers in the first element, which nobody knows: so nobody can
 * choose an entry to push out by other addresses. Nor by SYNs in a peer's name, from its port: as
 * long as this host has a connection with those addresses, none begins with another SYN
 * (`has_begun`). Each connection is asked for by its own ISN.
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
#include "splice_socket.h"

/*
 * pyforwarder/datapath/splice/handshakes.py does the same. Ports are the last word, and those of a
 * client's connections follow each other: after a single multiplication they would lie as multiples
 * of one number do, with some numbers all in a few sets.
 */
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
	mark *= secret->latest[1].mark;
	return mark ^ mark >> 32;
}

/*
 * Whether this host has a connection with these addresses, or a request for one (request_sock). To
 * a SYN with another number it answers with a challenge then (RFC 5961, 4; tcp_check_req): if that
 * is its peer's, which has started anew, it comes again when the connection has ended.
 */
inlined int has_begun(struct __sk_buff *skb, const struct splice_key *key, const int v6)
{
	__u32 state = state_of_socket(skb, key, v6);

	return state && state != BPF_TCP_LISTEN && state != BPF_TCP_SYN_SENT &&
	       state != BPF_TCP_TIME_WAIT && state != BPF_TCP_CLOSE;
}

/*
 * A connection begins, and its packets come by here under these addresses: that is what the keeper
 * wants to know of a pair. Behind a NAT rule of this host a socket has other ones. What comes again
 * counts where it came first: a device on top of another one sees it, too.
 */
inlined void remember_handshake(struct __sk_buff *skb, const struct splice_key *key, __u32 isn,
				const int v6)
{
	__u32 number = 0, i, is_known = 0;
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
		if (set->latest[i].mark != mark)
			continue;
		if ((__u32)set->latest[i].began == isn)
			return;
		is_known = 1;
	}
	/* Asked only then, which is seldom: it takes as long as all the rest. */
	if (is_known && has_begun(skb, key, v6))
		return;
#pragma unroll
	for (i = PF_HANDSHAKE_WAYS - 1; i > 0; i--)
		set->latest[i] = set->latest[i - 1];
	set->latest[0].mark = mark;
	set->latest[0].began = (__u64)skb->ifindex << 32 | isn;
}
