/*
 * The latest handshakes, by the addresses of the packets of the peer that has sent the SYN or the
 * SYN-ACK.
 *
 * The map is an array of sets of four entries. The set and the mark of an entry are hashed from the
 * addresses with the two secrets in the first element. As no one knows these, no one can choose
 * addresses that evict a given entry. SYNs that are sent in a peer's name, from its port, cannot
 * evict its entry either: as long as this host has a connection with those addresses, another SYN
 * is not recorded (`has_connection`). Each connection is looked up by its own ISN.
 * pyforwarder/datapath/splice/handshakes.py reads the map. It is not an LRU_HASH, which takes a
 * microsecond for each SYN, and every connection has two of them.
 *
 * Programs on two processors may write to the same set at once. Then entries may be lost, or get
 * another entry's mark: such an entry has another ISN than the connection that is looked up.
 */
#pragma once

#include "maps.h"
#include "splice.h"
#include "splice_packet.h"
#include "splice_socket.h"

/*
 * The hash that marks an entry; the upper half of it chooses the set.
 * pyforwarder/datapath/splice/handshakes.py computes the same.
 *
 * The ports are the last word, and ports of one client's connections are consecutive: after a
 * single multiplication their hashes would be multiples of one number, and with some secrets they
 * would all fall into a few sets.
 */
inlined __u64 handshake_mark(const struct splice_key *key, const struct splice_handshakes *secret)
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
 * Whether this host has a connection with these addresses, or a request for one (request_sock). The
 * kernel answers a SYN with another number by a challenge then (RFC 5961, 4; tcp_check_req). A peer
 * that really has started anew sends its SYN again when the old connection has ended.
 */
inlined int has_connection(struct __sk_buff *skb, const struct splice_key *key, const int v6)
{
	__u32 state = socket_state(skb, key, v6);

	return state && state != BPF_TCP_LISTEN && state != BPF_TCP_SYN_SENT &&
	       state != BPF_TCP_TIME_WAIT && state != BPF_TCP_CLOSE;
}

/*
 * Record that a connection begins with this SYN or SYN-ACK, and by which interface. The keeper
 * splices only pairs whose packets it knows to pass here with the addresses of their sockets:
 * behind a NAT rule of this host a socket has other addresses. A repeated SYN counts at the
 * interface where it was seen first: a device on top of another one sees it, too.
 */
inlined void remember_handshake(struct __sk_buff *skb, const struct splice_key *key, __u32 isn,
				const int v6)
{
	__u32 number = 0, i, is_known = 0;
	struct splice_handshakes *set = map_lookup(MAP_HANDSHAKES_FD, &number);
	__u64 mark;

	if (!set)
		return; /* never */
	mark = handshake_mark(key, set);
	number = 1 + (mark >> 32) % PF_HANDSHAKE_SETS;
	set = map_lookup(MAP_HANDSHAKES_FD, &number);
	if (!set)
		return; /* never */
#pragma unroll
	for (i = 0; i < PF_HANDSHAKES_PER_SET; i++) {
		if (set->latest[i].mark != mark)
			continue;
		if ((__u32)set->latest[i].began == isn)
			return;
		is_known = 1;
	}
	/*
	 * Looked up only if the mark is known, which is rare: the lookup takes as long as all the
	 * rest.
	 */
	if (is_known && has_connection(skb, key, v6))
		return;
#pragma unroll
	for (i = PF_HANDSHAKES_PER_SET - 1; i > 0; i--)
		set->latest[i] = set->latest[i - 1];
	set->latest[0].mark = mark;
	set->latest[0].began = (__u64)skb->ifindex << 32 | isn;
}
