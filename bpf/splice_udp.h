/*
 * UDP sessions: datagrams get the addresses and ports of the other side's, and go on. ../README.md
 * tells how a session gets here.
 *
 * Nothing here has to be: what is not understood (fragments, options of IP, what is too long for
 * the interface, whose life ends here) is passed to our own sockets, and userspace copies it, as it
 * does before a session begins. If there is no socket any more, because all of us have died, it is
 * dropped: the stack would answer that nobody listens, and end the session at the sender.
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "maps.h"
#include "sessions.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define PROTOCOL_HOP_BY_HOP 0
#define PROTOCOL_UDP	    17
#define PROTOCOL_ROUTING    43
#define PROTOCOL_FRAGMENT   44
#define PROTOCOL_OPTIONS    60

#define MOST_EXTENSIONS 4 /* of one packet; hardly any has two */

#define UDP_AT(v6)	TCP_AT(v6)
#define DATAGRAM_AT(v6) (UDP_AT(v6) + 8)
#define CHECKSUM_AT(v6) (UDP_AT(v6) + 6)

#define NO_DATAGRAM -2 /* a packet that is none of a session's */

#define SEEN_EVERY_NS 1000000000ull

/*
 * No path takes less: IPv6 has that of RFC 8200, and of IPv4 Linux itself believes no less
 * (min_pmtu, ip-sysctl.rst).
 */
#define LEAST_MTU(v6) ((v6) ? 1280 : 552)

#define FOUND_CLIENT 1
#define FOUND_SERVER 2

struct udp {
	__be16 sport, dport, bytes;
	__u16 checksum;
};

inlined void count_invalid_datagram(const struct session *session, __u32 kind)
{
	__u32 word = session->worker * BLOCK_WORDS + INVALID_FIRST + kind;
	__u64 *count = map_lookup(MAP_COUNTERS_FD, &word);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* The socket that datagrams of these addresses are for, if there is one; the caller releases it. */
inlined struct bpf_sock *find_datagram_socket(struct __sk_buff *skb, const struct splice_key *from,
					      const int v6)
{
	struct bpf_sock_tuple tuple = {};

	fill_tuple(&tuple, from, v6);
	if (v6)
		return bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv6), -1, 0);
	return bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), -1, 0);
}

/* Userspace copies it, if anybody is there. */
inlined int pass_datagram(struct __sk_buff *skb, const struct splice_key *from, const int v6)
{
	struct bpf_sock *sk = find_datagram_socket(skb, from, v6);

	if (!sk)
		return DROP;
	bpf_sk_release(sk);
	return NEXT;
}

/*
 * Whether nobody has spoken for so long that the session is over. Its worker ends it before that;
 * if all of us have died, it ends by itself. What only our sockets could take counts when a worker
 * has copied it: a fragment may never become a datagram.
 */
inlined int is_over(const struct session *session, __u64 now_ns)
{
	__u64 last_ns = volatile_read(session->began_ns);
	__u64 up_ns = volatile_read(session->way[PF_UP].last_ns);
	__u64 down_ns = volatile_read(session->way[PF_DOWN].last_ns);
	__u32 slot;
	struct pair *pair;

	if (up_ns > last_ns)
		last_ns = up_ns;
	if (down_ns > last_ns)
		last_ns = down_ns;
	if (now_ns <= last_ns || now_ns - last_ns <= volatile_read(session->idle_ns))
		return 0;
	slot = session->slot;
	pair = map_lookup(MAP_PAIRS_FD, &slot);
	if (!pair || volatile_read(pair->id) != session->id)
		return 1;
	last_ns = volatile_read(pair->last_ns);
	return now_ns > last_ns && now_ns - last_ns > volatile_read(session->idle_ns);
}

/* The sender has spoken; whether that is written down, which it is once in a second. */
inlined int note_sender(struct session_direction *way, __u64 now_ns)
{
	int is_due = now_ns - volatile_read(way->last_ns) > SEEN_EVERY_NS;

	if (is_due)
		way->last_ns = now_ns;
	return is_due;
}

/*
 * The first piece of one that came in several, or one behind options or extension headers: `at` is
 * where UDP begins.
 * Nobody can tell here whether it is true and becomes whole, so it is no sign of its sender.
 */
inlined int pass_unusual(struct __sk_buff *skb, __u32 at, const int v6)
{
	struct splice_key key = {};
	__u8 head[40];
	__u32 ports;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, head, IP_BYTES(v6)) ||
	    bpf_skb_load_bytes(skb, at, &ports, 4))
		return NEXT; /* too short for UDP */
	take_addresses(key.source, key.target, head, v6);
	key.sport = ports & 0xffff;
	key.dport = ports >> 16;
	if (!map_lookup(MAP_SESSION_FLOWS_FD, &key))
		return NEXT;
	return pass_datagram(skb, &key, v6);
}

/*
 * Whether a datagram may go on by itself from now on.
 *
 * Nothing that our socket has got may be overtaken. Userspace says how many datagrams it has sent
 * on of those that were passed to it: all of them, so none is left behind this one. If that never
 * comes to be, as more come than it can copy, it says so, and the last ones are overtaken.
 *
 * And one that our socket has sent on must have left this host with the very addresses, and by the
 * interface, that this one would get: behind a NAT rule or in a tunnel they are others, and what
 * goes out past that would be lost. No peer can forge that.
 */
inlined int may_latch(struct session *session, struct session_direction *way, __u32 direction)
{
	__u32 slot = session->slot;
	struct pair *pair = map_lookup(MAP_PAIRS_FD, &slot);
	struct worker_direction *told;

	if (!pair || volatile_read(pair->id) != session->id || !volatile_read(way->has_left))
		return 0;
	told = direction == PF_UP ? &pair->worker[PF_UP] : &pair->worker[PF_DOWN];
	return volatile_read(told->consumed_bytes) == volatile_read(way->passed) ||
	       volatile_read(told->armed) == PF_SESSION_NOW;
}

/* A packet of a socket of this host as it leaves: see may_latch. It is not changed. */
inlined void note_leaving(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct session *session;
	struct session_direction *way;
	struct ipv4 *four = data + ETHERNET_BYTES;
	struct ipv6 *six = data + ETHERNET_BYTES;
	struct udp *udp = data + UDP_AT(v6);
	__u32 index;

	if (data + DATAGRAM_AT(v6) > data_end)
		return; /* a socket's packets have all their headers in front */
	/* Fragments have these in the first piece only: others tell nothing. */
	if (v6 ? six->next != PROTOCOL_UDP
	       : four->version != 0x45 || four->protocol != PROTOCOL_UDP ||
			    (four->fragment & bpf_htons(0x3fff)))
		return;
	/* As the answer to it would come. */
	take_addresses(key.target, key.source, data + ETHERNET_BYTES, v6);
	key.sport = udp->dport;
	key.dport = udp->sport;
	flow = map_lookup(MAP_SESSION_FLOWS_FD, &key);
	if (!flow)
		return;
	index = flow->index;
	session = map_lookup(MAP_SESSIONS_FD, &index);
	if (!session || volatile_read(session->state) != PF_SESSION_ACTIVE)
		return;
	way = flow->direction == PF_UP ? &session->way[PF_DOWN] : &session->way[PF_UP];
	if (!way->has_left && skb->ifindex == (way->interface ? way->interface : LOOPBACK))
		way->has_left = 1;
}

/* Count what goes on: so many datagrams, which have so many bytes together, without headers. */
inlined void count_datagrams(struct session *session, struct session_direction *way,
			     __u32 direction, __u32 datagrams, __u32 bytes, __u64 now_ns,
			     int is_due)
{
	__u32 slot = session->slot;
	struct pair *pair = map_lookup(MAP_PAIRS_FD, &slot);
	struct verdict_direction *seen;

	__sync_fetch_and_add(&way->bytes, bytes);
	__sync_fetch_and_add(&way->packets, datagrams);
	/* The record is another's once the worker has let go of this one. */
	if (!pair || pair->id != session->id)
		return;
	seen = direction == PF_UP ? &pair->verdict[PF_UP] : &pair->verdict[PF_DOWN];
	seen->redirected_bytes = volatile_read(way->bytes);
	seen->redirected_packets = volatile_read(way->packets);
	if (is_due)
		seen->last_ns = now_ns;
}

inlined int forward_datagram(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct session *session;
	struct session_direction *way;
	struct ipv4 *four;
	struct ipv6 *six;
	struct udp *udp;
	__u32 index, direction, bytes, datagrams = 1, total, mtu = 0, longest;
	__u64 ports = 0, addresses = 0, now_ns;
	__u16 checksum;
	__u8 hops;
	int is_due;

	if (data + DATAGRAM_AT(v6) > data_end) {
		if (bpf_skb_pull_data(skb, DATAGRAM_AT(v6)))
			return NEXT; /* shorter than any datagram: the stack drops it */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + DATAGRAM_AT(v6) > data_end)
			return NEXT;
	}
	udp = data + UDP_AT(v6);
	take_addresses(key.source, key.target, data + ETHERNET_BYTES, v6);
	key.sport = udp->sport;
	key.dport = udp->dport;
	flow = map_lookup(MAP_SESSION_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	direction = flow->direction;
	session = map_lookup(MAP_SESSIONS_FD, &index);
	if (!session || volatile_read(session->state) != PF_SESSION_ACTIVE)
		return NEXT;
	now_ns = bpf_ktime_get_coarse_ns();
	if (is_over(session, now_ns))
		return pass_datagram(skb, &key, v6); /* for the socket that has that port by now */
	way = direction == PF_UP ? &session->way[PF_UP] : &session->way[PF_DOWN];
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid_datagram(session, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack has no use for it, either */
	}
	if (way->by && way->by != skb->ifindex) {
		count_invalid_datagram(session, PF_INVALID_INTERFACE);
		return pass_datagram(skb, &key, v6); /* the stack knows whether that may be */
	}
	four = data + ETHERNET_BYTES;
	six = data + ETHERNET_BYTES;
	total = v6 ? bpf_ntohs(six->payload_bytes) + IP_BYTES(1) : bpf_ntohs(four->total_bytes);
	hops = v6 ? six->hops : four->ttl;
	bytes = bpf_ntohs(udp->bytes);
	checksum = udp->checksum;
	if (skb->gso_size) {
		bytes = skb->len - UDP_AT(v6);
		datagrams = skb->gso_segs;
		if (!datagrams)
			return pass_datagram(skb, &key, v6);
		longest = skb->gso_size + DATAGRAM_AT(v6) - ETHERNET_BYTES;
	} else {
		if (bytes < 8 || bytes + IP_BYTES(v6) != total ||
		    total > skb->len - ETHERNET_BYTES || (!v6 && !is_whole_header(four))) {
			count_invalid_datagram(session, PF_INVALID_HEADER);
			return pass_datagram(skb, &key, v6);
		}
		longest = total;
	}
	if (checksum ? is_corrupt(skb, UDP_AT(v6), CHECKSUM_AT(v6), bytes,
				  (__u64)way->pseudo_sum + bpf_htons(bytes & 0xffff))
		     : v6 || is_summed_elsewhere(skb, CHECKSUM_AT(v6))) {
		count_invalid_datagram(session, PF_INVALID_CHECKSUM);
		return DROP; /* and so does the stack */
	}
	is_due = note_sender(way, now_ns);
	if (hops < 2)
		return pass_datagram(skb, &key, v6); /* it has come as far as it may go */
	if (way->interface) {
		/* It answers for the whole of an aggregate; it writes what is asked for. */
		bpf_check_mtu(skb, way->interface, &mtu, 0, 0);
		if (!mtu || longest > mtu)
			return pass_datagram(skb, &key, v6); /* our socket can make pieces of it */
	}
	if (!volatile_read(way->latched)) {
		if (!may_latch(session, way, direction)) {
			__sync_fetch_and_add(&way->passed, datagrams);
			return pass_datagram(skb, &key, v6);
		}
		way->latched = 1;
	}
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: as if it had been lost */

	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + DATAGRAM_AT(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	count_datagrams(session, way, direction, datagrams, bytes - 8, now_ns, is_due);
	put(data + UDP_AT(v6), (__u32)way->sport | (__u32)way->dport << 16, &ports);
	give_addresses(data + ETHERNET_BYTES, way->source, way->target, v6);
	if (v6) {
		six = data + ETHERNET_BYTES;
		six->hops = hops - 1;
	} else {
		four = data + ETHERNET_BYTES;
		addresses = (__u64)(__u16)~four->checksum + way->address_sum;
		addresses += (__u16)~bpf_htons((__u16)hops << 8);
		addresses += (__u16)bpf_htons((__u16)(hops - 1) << 8);
		four->ttl = hops - 1;
		four->checksum = (__u16)~fold(addresses);
	}
	/* A sum of 0 means that there is none: it stays, and no other becomes it (RFC 768). */
	bpf_l4_csum_replace(skb, CHECKSUM_AT(v6), 0, fold(ports), BPF_F_MARK_MANGLED_0);
	if (!v6 || bpf_l4_csum_replace(skb, CHECKSUM_AT(v6), 0, (__u16)way->address_sum,
				       F_PSEUDO | BPF_F_MARK_MANGLED_0 | F_IPV6))
		bpf_l4_csum_replace(skb, CHECKSUM_AT(v6), 0, (__u16)way->address_sum,
				    F_PSEUDO | BPF_F_MARK_MANGLED_0);
	return send_on(way->interface);
}

/*
 * Whether the error may be true of the datagram that it quotes: too long is only what is longer
 * than the path takes, and that a port is nobody's only the host says whose port it is.
 */
inlined int may_be_error(const struct icmp *icmp, const void *quoted, int is_of_peer, const int v6)
{
	const struct ipv4 *four = quoted;
	const struct ipv6 *six = quoted;
	__u32 mtu, total;

	if (v6 ? icmp->type == 2 : icmp->type == 3 && icmp->code == 4) {
		mtu = bpf_ntohl(icmp->rest);
		if (!v6)
			mtu &= 0xffff; /* RFC 1191; the rest is RFC 4884's */
		total = v6 ? bpf_ntohs(six->payload_bytes) + IP_BYTES(1)
			   : bpf_ntohs(four->total_bytes);
		return mtu >= LEAST_MTU(v6) && total > mtu;
	}
	if (v6 ? icmp->type == 1 && icmp->code == 4 : icmp->type == 3 && icmp->code == 3)
		return is_of_peer;
	return 1;
}

/*
 * A router, or the host that it was for, cannot take what we sent in a sender's name: say so to
 * that sender, about the datagram that it knows. Our own socket hears of it, too, if the server
 * itself says so: userspace ends a session whose server is gone, so that the next datagram finds
 * another one; and how long a path's packets may be this host must know for those that our socket
 * sends.
 */
inlined int translate_datagram_error(struct __sk_buff *skb, const int v6)
{
	const int about_at = UDP_AT(v6) + 8, ports_at = about_at + IP_BYTES(v6);
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct session *session;
	struct session_direction *way, *back;
	struct ipv4 *four;
	struct ipv6 *six;
	struct icmp *icmp;
	struct udp *udp;
	__u32 index, bytes;
	__u64 sum = 0, addresses = 0, inner = 0;
	__u16 before;
	__u8 hops;
	int is_unreachable, is_too_big, is_of_peer, i;

	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_at + 8 > data_end) {
		if (bpf_skb_pull_data(skb, ports_at + 8))
			return NO_DATAGRAM; /* too short to quote one */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + ports_at + 8 > data_end)
			return NO_DATAGRAM;
	}
	icmp = data + UDP_AT(v6);
	if (v6 ? icmp->type < 1 || icmp->type > 4 : icmp->type != 3 && icmp->type != 11)
		return NO_DATAGRAM;
	is_too_big = v6 ? icmp->type == 2 : icmp->type == 3 && icmp->code == 4;
	is_unreachable = !is_too_big && icmp->type == (v6 ? 1 : 3);
	four = data + about_at;
	six = data + about_at;
	if (v6 ? six->next != PROTOCOL_UDP
	       : four->version != 0x45 || four->protocol != PROTOCOL_UDP)
		return NO_DATAGRAM;
	/* As it would come from the host that our datagram was for. */
	take_addresses(key.target, key.source, data + about_at, v6);
	udp = data + ports_at;
	key.sport = udp->dport;
	key.dport = udp->sport;
	flow = map_lookup(MAP_SESSION_FLOWS_FD, &key);
	if (!flow)
		return NO_DATAGRAM;
	index = flow->index;
	session = map_lookup(MAP_SESSIONS_FD, &index);
	if (!session || volatile_read(session->state) != PF_SESSION_ACTIVE ||
	    is_over(session, bpf_ktime_get_coarse_ns()))
		return NO_DATAGRAM;
	/* `back` changes what the sender sends: undo that. */
	way = flow->direction == PF_UP ? &session->way[PF_UP] : &session->way[PF_DOWN];
	back = flow->direction == PF_UP ? &session->way[PF_DOWN] : &session->way[PF_UP];
	six = data + ETHERNET_BYTES;
	four = data + ETHERNET_BYTES;
	hops = v6 ? six->hops : four->ttl;
	if (is_copy(skb, hops)) {
		unmark_copy(skb, v6);
		return NEXT;
	}
	is_of_peer = v6 ? six->source[0] == key.source[0] && six->source[1] == key.source[1] &&
				     six->source[2] == key.source[2] &&
				     six->source[3] == key.source[3]
			: four->source == key.source[3];
	/* By any interface: this host would believe it of a path to the server. */
	if (skb->pkt_type == HOST_PACKET && !may_be_error(icmp, data + about_at, is_of_peer, v6)) {
		count_invalid_datagram(session, PF_INVALID_ERROR);
		return DROP;
	}
	if (!volatile_read(back->latched))
		return NEXT; /* our own socket has sent that, and hears of it */
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid_datagram(session, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack has no use for it, either */
	}
	if (way->by && way->by != skb->ifindex) {
		count_invalid_datagram(session, PF_INVALID_INTERFACE);
		return NEXT; /* our own socket may hear of it */
	}
	bytes = v6 ? bpf_ntohs(six->payload_bytes) : bpf_ntohs(four->total_bytes) - IP_BYTES(0);
	if (bytes + UDP_AT(v6) > skb->len || (int)bytes < ports_at + 8 - UDP_AT(v6) ||
	    (!v6 && !is_whole_header(four))) {
		count_invalid_datagram(session, PF_INVALID_HEADER);
		return DROP;
	}
	if (is_corrupt_error(skb, UDP_AT(v6), UDP_AT(v6) + 2, bytes,
			     v6 ? pseudo_sum(six) + bpf_htons(bytes & 0xffff) : 0)) {
		count_invalid_datagram(session, PF_INVALID_CHECKSUM);
		return DROP;
	}
	if (is_too_big || (is_unreachable && is_of_peer && flow->direction == PF_DOWN))
		copy_to_our_socket(skb, hops, v6);
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: as if it had been lost */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_at + 8 > data_end)
		return DROP; /* never: it was there a moment ago */
	udp = data + ports_at;
	four = data + about_at;
	six = data + about_at;

	/* What is quoted: as that sender has sent it. */
	put(data + ports_at, (__u32)back->from.sport | (__u32)back->from.dport << 16, &inner);
	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			put(&six->source[i], back->from.source[i], &inner);
			put(&six->target[i], back->from.target[i], &inner);
		}
	} else {
		put(&four->source, back->from.source[3], &addresses);
		put(&four->target, back->from.target[3], &addresses);
		before = four->checksum;
		four->checksum = (__u16)~fold((__u64)(__u16)~before + fold(addresses));
		sum += (__u16)~before;
		sum += four->checksum;
		inner += fold(addresses);
		addresses = 0;
	}
	sum += fold(inner);
	before = udp->checksum;
	if (before) {
		udp->checksum = (__u16)~fold((__u64)(__u16)~before + fold(inner));
		if (!udp->checksum)
			udp->checksum = 0xffff;
		sum += (__u16)~before;
		sum += udp->checksum;
	}
	addresses = answer_from_us(data, &back->from, v6);
	bpf_l4_csum_replace(skb, UDP_AT(v6) + 2, 0, fold(sum), 0);
	if (v6)
		replace_pseudo(skb, UDP_AT(v6) + 2, fold(addresses), v6);
	return send_on(way->interface);
}

/* Where UDP begins behind extension headers of IPv6 (RFC 8200, 4); 0: nobody can tell here. */
inlined __u32 find_udp(struct __sk_buff *skb, __u8 next)
{
	__u32 at = UDP_AT(1);
	__u8 head[4];
	int i;

#pragma unroll
	for (i = 0; i < MOST_EXTENSIONS; i++) {
		if (next != PROTOCOL_FRAGMENT && next != PROTOCOL_HOP_BY_HOP &&
		    next != PROTOCOL_ROUTING && next != PROTOCOL_OPTIONS)
			return 0;
		if (bpf_skb_load_bytes(skb, at, head, 4))
			return 0;
		if (next == PROTOCOL_FRAGMENT) {
			if (head[2] || head[3] & 0xf8)
				return 0; /* not the first piece, which alone has the ports */
			at += 8;
		} else {
			at += ((__u32)head[1] + 1) * 8;
		}
		next = head[0];
		if (next == PROTOCOL_UDP)
			return at;
	}
	return 0;
}

/* A packet that may be a session's; NO_DATAGRAM if it is not, and then it is as it was. */
inlined int take_datagram(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *four;
	struct ipv6 *six;
	__u32 at;

	if (data + UDP_AT(v6) > data_end) {
		if (bpf_skb_pull_data(skb, UDP_AT(v6)))
			return NO_DATAGRAM;
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + UDP_AT(v6) > data_end)
			return NO_DATAGRAM;
	}
	if (v6) {
		six = data + ETHERNET_BYTES;
		if (six->next == PROTOCOL_UDP)
			return forward_datagram(skb, 1);
		if (six->next == PROTOCOL_ICMPV6)
			return translate_datagram_error(skb, 1);
		at = find_udp(skb, six->next);
		return at ? pass_unusual(skb, at, 1) : NO_DATAGRAM;
	}
	four = data + ETHERNET_BYTES;
	if (four->protocol == PROTOCOL_UDP) {
		if (four->version == 0x45 && !(four->fragment & bpf_htons(0x3fff)))
			return forward_datagram(skb, 0);
		if (four->fragment & bpf_htons(0x1fff))
			return NEXT; /* without its beginning nobody can tell whose it is */
		return pass_unusual(skb, ETHERNET_BYTES + (four->version & 15) * 4, 0);
	}
	if (four->protocol == PROTOCOL_ICMP && four->version == 0x45 &&
	    !(four->fragment & bpf_htons(0x3fff)))
		return translate_datagram_error(skb, 0);
	return NO_DATAGRAM;
}

/*
 * Whether the socket that gets datagrams of these addresses has this mark, and this peer (a port,
 * 0: none): a listener that is connected to a client would draw it to itself. Between the look-up
 * and the look at what was found a worker could connect it and undo that; not both times.
 */
inlined int has_marked_socket(struct __sk_buff *skb, const struct splice_key *from, __u32 mark,
			      __be16 peer_port, const int v6)
{
	struct bpf_sock *sk;
	int found, i;

#pragma unroll
	for (i = 0; i < 2; i++) {
		sk = find_datagram_socket(skb, from, v6);
		if (!sk)
			return 0;
		found = sk->priority == mark && sk->dst_port == peer_port;
		bpf_sk_release(sk);
		if (!found)
			return 0;
	}
	return 1;
}

/*
 * Which of the sockets that the keeper has marked would get the datagrams that a session would
 * take, as bits. A worker cannot have those of another socket sent on.
 */
inlined int find_session_sockets(struct __sk_buff *skb)
{
	struct session *session;
	struct splice_key key;
	__u32 index, mark;
	int found = 0, v6;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &index, 4))
		return 0;
	session = map_lookup(MAP_SESSIONS_FD, &index);
	if (!session)
		return 0;
	mark = session->mark;
	v6 = session->family == PF_IPV6;
	key = session->way[PF_UP].from;
	if (v6 ? has_marked_socket(skb, &key, mark, 0, 1)
	       : has_marked_socket(skb, &key, mark, 0, 0))
		found |= FOUND_CLIENT;
	key = session->way[PF_DOWN].from;
	if (v6 ? has_marked_socket(skb, &key, mark, key.sport, 1)
	       : has_marked_socket(skb, &key, mark, key.sport, 0))
		found |= FOUND_SERVER;
	return found;
}
