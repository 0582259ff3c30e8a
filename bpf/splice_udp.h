/*
 * UDP sessions: datagrams get the addresses and ports of the other side, and are forwarded.
 * ../README.md says how a session gets here.
 *
 * No datagram must be forwarded here. What is not supported (fragments, IP options, datagrams that
 * are longer than the MTU of the next interface, or have no hops left) passes to our own sockets,
 * and userspace copies it, as it does before a session begins. If our sockets are gone, because all
 * our processes have died, it is dropped: otherwise the stack would answer with an ICMP error (port
 * unreachable), and the sender would end the session.
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

#define MAX_EXTENSIONS 4 /* in one packet; more than one is rare */

#define UDP_OFFSET(v6)	       TCP_OFFSET(v6)
#define UDP_PAYLOAD_OFFSET(v6) (UDP_OFFSET(v6) + 8)
#define UDP_CSUM_OFFSET(v6)    (UDP_OFFSET(v6) + 6)

#define NOT_UDP_SESSION -2 /* the packet belongs to no session */

#define LAST_SEEN_PRECISION_NS 1000000000ull

/*
 * No path has a smaller MTU: RFC 8200 says so of IPv6, and Linux accepts no smaller one for IPv4
 * (min_pmtu, ip-sysctl.rst).
 */
#define MIN_MTU(v6) ((v6) ? 1280 : 552)

#define FOUND_CLIENT 1
#define FOUND_SERVER 2

struct udp {
	__be16 sport, dport, bytes;
	__u16 checksum;
};

/* Count an invalid datagram by its kind, in the counters of the session's worker. */
inlined void count_invalid_datagram(const struct session *session, __u32 kind)
{
	__u32 word = session->worker * BLOCK_WORDS + INVALID_FIRST + kind;
	__u64 *count = map_lookup(MAP_COUNTERS_FD, &word);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* Look up the socket that receives datagrams with these addresses. The caller releases it. */
inlined struct bpf_sock *find_datagram_socket(struct __sk_buff *skb, const struct splice_key *from,
					      const int v6)
{
	struct bpf_sock_tuple tuple = {};

	fill_tuple(&tuple, from, v6);
	if (v6)
		return bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv6), -1, 0);
	return bpf_sk_lookup_udp(skb, &tuple, sizeof(tuple.ipv4), -1, 0);
}

/*
 * Pass a datagram to the socket that receives it, whose process copies it. Returns NEXT; DROP if
 * there is no socket.
 */
inlined int pass_to_udp_socket(struct __sk_buff *skb, const struct splice_key *from, const int v6)
{
	struct bpf_sock *sk = find_datagram_socket(skb, from, v6);

	if (!sk)
		return DROP;
	bpf_sk_release(sk);
	return NEXT;
}

/*
 * Whether neither sender has sent for the idle timeout: then the session is over. Normally its
 * worker ends it before that; if all our processes have died, it ends here. A datagram that only
 * our sockets can receive (a fragment) counts only when a worker has copied it: a fragment may
 * never become a datagram.
 */
inlined int has_expired(const struct session *session, __u64 now_ns)
{
	__u64 last_ns = READ_ONCE(session->began_ns);
	__u64 up_ns = READ_ONCE(session->direction[PF_UP].last_ns);
	__u64 down_ns = READ_ONCE(session->direction[PF_DOWN].last_ns);
	__u32 slot;
	struct pair *pair;

	if (up_ns > last_ns)
		last_ns = up_ns;
	if (down_ns > last_ns)
		last_ns = down_ns;
	if (now_ns <= last_ns || now_ns - last_ns <= READ_ONCE(session->idle_ns))
		return 0;
	slot = session->slot;
	pair = map_lookup(MAP_PAIRS_FD, &slot);
	if (!pair || READ_ONCE(pair->id) != session->id)
		return 1;
	last_ns = READ_ONCE(pair->last_ns);
	return now_ns > last_ns && now_ns - last_ns > READ_ONCE(session->idle_ns);
}

/* Record the time of the sender's datagram, once a second. Returns 1 if it was recorded now. */
inlined int note_sender_time(struct session_direction *from_peer, __u64 now_ns)
{
	int is_due = now_ns - READ_ONCE(from_peer->last_ns) > LAST_SEEN_PRECISION_NS;

	if (is_due)
		from_peer->last_ns = now_ns;
	return is_due;
}

/*
 * Pass the first fragment of a datagram, or a datagram behind IP options or extension headers; `at`
 * is the offset of its UDP header. It does not count as a sign of its sender, since its checksum
 * cannot be verified here, and a fragment may never become a whole datagram.
 *
 * Returns NEXT; DROP if it is a session's, and there is no socket.
 */
inlined int pass_fragment_or_options(struct __sk_buff *skb, __u32 at, const int v6)
{
	struct splice_key key = {};
	__u8 head[40];
	__u32 ports;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, head, IP_BYTES(v6)) ||
	    bpf_skb_load_bytes(skb, at, &ports, 4))
		return NEXT; /* too short for a UDP header */
	read_addresses(key.source, key.target, head, v6);
	key.sport = ports & 0xffff;
	key.dport = ports >> 16;
	if (!map_lookup(MAP_SESSION_FLOWS_FD, &key))
		return NEXT;
	return pass_to_udp_socket(skb, &key, v6);
}

/*
 * Whether datagrams of a direction may be forwarded from now on (the direction is latched).
 *
 * No datagram may overtake one that our socket has received. Userspace stores how many of the
 * datagrams that were passed to it it has copied. If these are all of them, none is queued in front
 * of this one. If that never happens, because more arrive than it can copy, userspace stores
 * PF_SESSION_NOW, and the last ones are overtaken.
 *
 * And a datagram that our socket has sent must have left this host with the same addresses, and by
 * the same interface, that this one would get. Behind a NAT rule or in a tunnel they are different,
 * and datagrams that bypass it would be lost. A peer cannot forge this, as it is seen at `egress`.
 */
inlined int may_latch(struct session *session, struct session_direction *from_peer, __u32 direction)
{
	__u32 slot = session->slot;
	struct pair *pair = map_lookup(MAP_PAIRS_FD, &slot);
	struct worker_direction *told;

	if (!pair || READ_ONCE(pair->id) != session->id || !READ_ONCE(from_peer->has_left))
		return 0;
	told = direction == PF_UP ? &pair->worker[PF_UP] : &pair->worker[PF_DOWN];
	return READ_ONCE(told->consumed_bytes) == READ_ONCE(from_peer->passed) ||
	       READ_ONCE(told->armed) == PF_SESSION_NOW;
}

/*
 * Record that a datagram of our own socket has left as the program would forward it (`has_left`,
 * see may_latch()). The packet is not changed.
 */
inlined void note_own_datagram(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct session *session;
	struct session_direction *from_peer;
	struct ipv4 *iph = data + ETHERNET_BYTES;
	struct ipv6 *ip6h = data + ETHERNET_BYTES;
	struct udp *udp = data + UDP_OFFSET(v6);
	__u32 index;

	if (data + UDP_PAYLOAD_OFFSET(v6) > data_end)
		return; /* a socket's packets have all their headers in the linear part */
	/* Only a first fragment has the ports: fragments are ignored. */
	if (v6 ? ip6h->next != PROTOCOL_UDP
	       : iph->version != 0x45 || iph->protocol != PROTOCOL_UDP ||
			    (iph->fragment & bpf_htons(0x3fff)))
		return;
	/* The addresses that the answer to it would have. */
	read_addresses(key.target, key.source, data + ETHERNET_BYTES, v6);
	key.sport = udp->dport;
	key.dport = udp->sport;
	flow = map_lookup(MAP_SESSION_FLOWS_FD, &key);
	if (!flow)
		return;
	index = flow->index;
	session = map_lookup(MAP_SESSIONS_FD, &index);
	if (!session || READ_ONCE(session->state) != PF_SESSION_ACTIVE)
		return;
	from_peer = flow->direction == PF_UP ? &session->direction[PF_DOWN]
					     : &session->direction[PF_UP];
	if (!from_peer->has_left &&
	    skb->ifindex == (from_peer->interface ? from_peer->interface : LOOPBACK))
		from_peer->has_left = 1;
}

/* Count forwarded datagrams: their number, and the bytes of their payloads together. */
inlined void count_datagrams(struct session *session, struct session_direction *from_peer,
			     __u32 direction, __u32 datagrams, __u32 bytes, __u64 now_ns,
			     int is_due)
{
	__u32 slot = session->slot;
	struct pair *pair = map_lookup(MAP_PAIRS_FD, &slot);
	struct kernel_direction *seen;

	__sync_fetch_and_add(&from_peer->bytes, bytes);
	__sync_fetch_and_add(&from_peer->packets, datagrams);
	/* The slot may serve another session by now, if the worker has released this one. */
	if (!pair || pair->id != session->id)
		return;
	seen = direction == PF_UP ? &pair->kernel[PF_UP] : &pair->kernel[PF_DOWN];
	seen->redirected_bytes = READ_ONCE(from_peer->bytes);
	seen->redirected_packets = READ_ONCE(from_peer->packets);
	if (is_due)
		seen->last_ns = now_ns;
}

/*
 * Handle a UDP datagram at `ingress`.
 *
 * Returns NEXT: it is no session's, or is for our socket. DROP: its checksum is wrong, or our
 * socket does not exist. Or the verdict of the redirect to the other side.
 */
inlined int forward_datagram(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct session *session;
	struct session_direction *from_peer;
	struct ipv4 *iph;
	struct ipv6 *ip6h;
	struct udp *udp;
	__u32 index, direction, bytes, datagrams = 1, total, mtu = 0, longest;
	__u64 ports = 0, addresses = 0, now_ns;
	__u16 checksum;
	__u8 hops;
	int is_due;

	if (data + UDP_PAYLOAD_OFFSET(v6) > data_end) {
		if (bpf_skb_pull_data(skb, UDP_PAYLOAD_OFFSET(v6)))
			return NEXT; /* shorter than a UDP header: the stack discards it */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + UDP_PAYLOAD_OFFSET(v6) > data_end)
			return NEXT;
	}
	udp = data + UDP_OFFSET(v6);
	read_addresses(key.source, key.target, data + ETHERNET_BYTES, v6);
	key.sport = udp->sport;
	key.dport = udp->dport;
	flow = map_lookup(MAP_SESSION_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	direction = flow->direction;
	session = map_lookup(MAP_SESSIONS_FD, &index);
	if (!session || READ_ONCE(session->state) != PF_SESSION_ACTIVE)
		return NEXT;
	now_ns = bpf_ktime_get_coarse_ns();
	if (has_expired(session, now_ns))
		return pass_to_udp_socket(skb, &key,
					  v6); /* for the socket that has this port by now */
	from_peer = direction == PF_UP ? &session->direction[PF_UP] : &session->direction[PF_DOWN];
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid_datagram(session, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack discards it, too */
	}
	if (from_peer->from_interface && from_peer->from_interface != skb->ifindex) {
		count_invalid_datagram(session, PF_INVALID_INTERFACE);
		return pass_to_udp_socket(skb, &key,
					  v6); /* the stack decides whether it accepts it */
	}
	iph = data + ETHERNET_BYTES;
	ip6h = data + ETHERNET_BYTES;
	total = v6 ? bpf_ntohs(ip6h->payload_bytes) + IP_BYTES(1) : bpf_ntohs(iph->total_bytes);
	hops = v6 ? ip6h->hops : iph->ttl;
	bytes = bpf_ntohs(udp->bytes);
	checksum = udp->checksum;
	if (skb->gso_size) {
		bytes = skb->len - UDP_OFFSET(v6);
		datagrams = skb->gso_segs;
		if (!datagrams)
			return pass_to_udp_socket(skb, &key, v6);
		longest = skb->gso_size + UDP_PAYLOAD_OFFSET(v6) - ETHERNET_BYTES;
	} else {
		if (bytes < 8 || bytes + IP_BYTES(v6) != total ||
		    total > skb->len - ETHERNET_BYTES || (!v6 && !is_ipv4_header_valid(iph))) {
			count_invalid_datagram(session, PF_INVALID_HEADER);
			return pass_to_udp_socket(skb, &key, v6);
		}
		longest = total;
	}
	if (checksum ? has_bad_csum(skb, UDP_OFFSET(v6), UDP_CSUM_OFFSET(v6), bytes,
				    (__u64)from_peer->pseudo_sum + bpf_htons(bytes & 0xffff))
		     : v6 || has_misplaced_csum(skb, UDP_CSUM_OFFSET(v6))) {
		count_invalid_datagram(session, PF_INVALID_CHECKSUM);
		return DROP; /* the stack would drop it, too */
	}
	is_due = note_sender_time(from_peer, now_ns);
	if (hops < 2)
		return pass_to_udp_socket(skb, &key, v6); /* its hop limit is used up */
	if (from_peer->interface) {
		/*
		 * The return value is about the whole aggregate; only the MTU that is written is
		 * used.
		 */
		bpf_check_mtu(skb, from_peer->interface, &mtu, 0, 0);
		if (!mtu || longest > mtu)
			return pass_to_udp_socket(skb, &key,
						  v6); /* our socket can send it in fragments */
	}
	if (!READ_ONCE(from_peer->latched)) {
		if (!may_latch(session, from_peer, direction)) {
			__sync_fetch_and_add(&from_peer->passed, datagrams);
			return pass_to_udp_socket(skb, &key, v6);
		}
		from_peer->latched = 1;
	}
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: a lost packet */

	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + UDP_PAYLOAD_OFFSET(v6) > data_end)
		return DROP; /* never: it was in the linear part a moment ago */
	count_datagrams(session, from_peer, direction, datagrams, bytes - 8, now_ns, is_due);
	set_field(data + UDP_OFFSET(v6), (__u32)from_peer->sport | (__u32)from_peer->dport << 16,
		  &ports);
	write_addresses(data + ETHERNET_BYTES, from_peer->source, from_peer->target, v6);
	if (v6) {
		ip6h = data + ETHERNET_BYTES;
		ip6h->hops = hops - 1;
	} else {
		iph = data + ETHERNET_BYTES;
		addresses = (__u64)(__u16)~iph->checksum + from_peer->address_sum;
		addresses += (__u16)~bpf_htons((__u16)hops << 8);
		addresses += (__u16)bpf_htons((__u16)(hops - 1) << 8);
		iph->ttl = hops - 1;
		iph->checksum = (__u16)~csum_fold(addresses);
	}
	/*
	 * A checksum of 0 means that there is none: it stays 0, and no other becomes 0 (RFC 768).
	 */
	bpf_l4_csum_replace(skb, UDP_CSUM_OFFSET(v6), 0, csum_fold(ports), BPF_F_MARK_MANGLED_0);
	if (!v6 || bpf_l4_csum_replace(skb, UDP_CSUM_OFFSET(v6), 0, (__u16)from_peer->address_sum,
				       F_PSEUDO | BPF_F_MARK_MANGLED_0 | F_IPV6))
		bpf_l4_csum_replace(skb, UDP_CSUM_OFFSET(v6), 0, (__u16)from_peer->address_sum,
				    F_PSEUDO | BPF_F_MARK_MANGLED_0);
	return forward_by(from_peer->interface);
}

/*
 * Whether an ICMP error can be true for the datagram that it quotes. "Too big" must name an MTU
 * that is smaller than the datagram, and "port unreachable" must come from the host that has the
 * port.
 */
inlined int is_icmp_error_plausible(const struct icmp *icmp, const void *quoted, int is_of_peer,
				    const int v6)
{
	const struct ipv4 *iph = quoted;
	const struct ipv6 *ip6h = quoted;
	__u32 mtu, total;

	if (v6 ? icmp->type == 2 : icmp->type == 3 && icmp->code == 4) {
		mtu = bpf_ntohl(icmp->rest);
		if (!v6)
			mtu &= 0xffff; /* RFC 1191; the upper half belongs to RFC 4884 */
		total = v6 ? bpf_ntohs(ip6h->payload_bytes) + IP_BYTES(1)
			   : bpf_ntohs(iph->total_bytes);
		return mtu >= MIN_MTU(v6) && total > mtu;
	}
	if (v6 ? icmp->type == 1 && icmp->code == 4 : icmp->type == 3 && icmp->code == 3)
		return is_of_peer;
	return 1;
}

/*
 * Translate an ICMP error about a datagram that we have sent in a sender's name, and send it to
 * that sender, with the datagram that the sender knows quoted. Our own socket gets a copy in two
 * cases. If the server itself reports that it is unreachable: userspace then ends the session, so
 * that the next datagram finds another server. And if the datagram was too big: this host must know
 * the path's MTU for the datagrams that our socket sends.
 *
 * Returns NOT_UDP_SESSION if the packet is no error about a session; NEXT if it is for our own
 * socket; DROP if it is invalid, counted by the kind. Else the verdict of the redirect.
 */
inlined int translate_udp_icmp_error(struct __sk_buff *skb, const int v6)
{
	const int quoted_offset = UDP_OFFSET(v6) + 8, ports_offset = quoted_offset + IP_BYTES(v6);
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct session *session;
	struct session_direction *from_peer, *to_peer;
	struct ipv4 *iph;
	struct ipv6 *ip6h;
	struct icmp *icmp;
	struct udp *udp;
	__u32 index, bytes;
	__u64 sum = 0, addresses = 0, inner = 0;
	__u16 before;
	__u8 hops;
	int is_unreachable, is_too_big, is_of_peer, i;

	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_offset + 8 > data_end) {
		if (bpf_skb_pull_data(skb, ports_offset + 8))
			return NOT_UDP_SESSION; /* too short to quote a datagram */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + ports_offset + 8 > data_end)
			return NOT_UDP_SESSION;
	}
	icmp = data + UDP_OFFSET(v6);
	if (v6 ? icmp->type < 1 || icmp->type > 4 : icmp->type != 3 && icmp->type != 11)
		return NOT_UDP_SESSION;
	is_too_big = v6 ? icmp->type == 2 : icmp->type == 3 && icmp->code == 4;
	is_unreachable = !is_too_big && icmp->type == (v6 ? 1 : 3);
	iph = data + quoted_offset;
	ip6h = data + quoted_offset;
	if (v6 ? ip6h->next != PROTOCOL_UDP : iph->version != 0x45 || iph->protocol != PROTOCOL_UDP)
		return NOT_UDP_SESSION;
	/* The addresses that a datagram from the receiver of our datagram would have. */
	read_addresses(key.target, key.source, data + quoted_offset, v6);
	udp = data + ports_offset;
	key.sport = udp->dport;
	key.dport = udp->sport;
	flow = map_lookup(MAP_SESSION_FLOWS_FD, &key);
	if (!flow)
		return NOT_UDP_SESSION;
	index = flow->index;
	session = map_lookup(MAP_SESSIONS_FD, &index);
	if (!session || READ_ONCE(session->state) != PF_SESSION_ACTIVE ||
	    has_expired(session, bpf_ktime_get_coarse_ns()))
		return NOT_UDP_SESSION;
	/* `to_peer` is the direction in which the quoted datagram went: undo its translation. */
	from_peer = flow->direction == PF_UP ? &session->direction[PF_UP]
					     : &session->direction[PF_DOWN];
	to_peer = flow->direction == PF_UP ? &session->direction[PF_DOWN]
					   : &session->direction[PF_UP];
	ip6h = data + ETHERNET_BYTES;
	iph = data + ETHERNET_BYTES;
	hops = v6 ? ip6h->hops : iph->ttl;
	if (is_copy(skb, hops)) {
		unmark_copy(skb, v6);
		return NEXT;
	}
	is_of_peer = v6 ? ip6h->source[0] == key.source[0] && ip6h->source[1] == key.source[1] &&
				     ip6h->source[2] == key.source[2] &&
				     ip6h->source[3] == key.source[3]
			: iph->source == key.source[3];
	/* Checked for any interface: this host would accept it for a path to the server. */
	if (skb->pkt_type == HOST_PACKET &&
	    !is_icmp_error_plausible(icmp, data + quoted_offset, is_of_peer, v6)) {
		count_invalid_datagram(session, PF_INVALID_ERROR);
		return DROP;
	}
	if (!READ_ONCE(to_peer->latched))
		return NEXT; /* our own socket has sent that datagram, and gets the error */
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid_datagram(session, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack discards it, too */
	}
	if (from_peer->from_interface && from_peer->from_interface != skb->ifindex) {
		count_invalid_datagram(session, PF_INVALID_INTERFACE);
		return NEXT; /* our own socket may get the error */
	}
	bytes = v6 ? bpf_ntohs(ip6h->payload_bytes) : bpf_ntohs(iph->total_bytes) - IP_BYTES(0);
	if (bytes + UDP_OFFSET(v6) > skb->len || (int)bytes < ports_offset + 8 - UDP_OFFSET(v6) ||
	    (!v6 && !is_ipv4_header_valid(iph))) {
		count_invalid_datagram(session, PF_INVALID_HEADER);
		return DROP;
	}
	if (has_bad_icmp_csum(skb, UDP_OFFSET(v6), UDP_OFFSET(v6) + 2, bytes,
			      v6 ? icmpv6_pseudo_sum(ip6h) + bpf_htons(bytes & 0xffff) : 0)) {
		count_invalid_datagram(session, PF_INVALID_CHECKSUM);
		return DROP;
	}
	if (is_too_big || (is_unreachable && is_of_peer && flow->direction == PF_DOWN))
		copy_to_own_socket(skb, hops, v6);
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: a lost packet */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_offset + 8 > data_end)
		return DROP; /* never: it was in the linear part a moment ago */
	udp = data + ports_offset;
	iph = data + quoted_offset;
	ip6h = data + quoted_offset;

	/* Restore the quoted datagram as the sender has sent it. */
	set_field(data + ports_offset,
		  (__u32)to_peer->from.sport | (__u32)to_peer->from.dport << 16, &inner);
	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			set_field(&ip6h->source[i], to_peer->from.source[i], &inner);
			set_field(&ip6h->target[i], to_peer->from.target[i], &inner);
		}
	} else {
		set_field(&iph->source, to_peer->from.source[3], &addresses);
		set_field(&iph->target, to_peer->from.target[3], &addresses);
		before = iph->checksum;
		iph->checksum = (__u16)~csum_fold((__u64)(__u16)~before + csum_fold(addresses));
		sum += (__u16)~before;
		sum += iph->checksum;
		inner += csum_fold(addresses);
		addresses = 0;
	}
	sum += csum_fold(inner);
	before = udp->checksum;
	if (before) {
		udp->checksum = (__u16)~csum_fold((__u64)(__u16)~before + csum_fold(inner));
		if (!udp->checksum)
			udp->checksum = 0xffff;
		sum += (__u16)~before;
		sum += udp->checksum;
	}
	addresses = address_icmp_error(data, &to_peer->from, v6);
	bpf_l4_csum_replace(skb, UDP_OFFSET(v6) + 2, 0, csum_fold(sum), 0);
	if (v6)
		replace_pseudo_csum(skb, UDP_OFFSET(v6) + 2, csum_fold(addresses), v6);
	return forward_by(from_peer->interface);
}

/*
 * The offset of the UDP header behind extension headers of IPv6 (RFC 8200, 4). 0: it cannot be
 * found here.
 */
inlined __u32 find_udp_header(struct __sk_buff *skb, __u8 next)
{
	__u32 at = UDP_OFFSET(1);
	__u8 head[4];
	int i;

#pragma unroll
	for (i = 0; i < MAX_EXTENSIONS; i++) {
		if (next != PROTOCOL_FRAGMENT && next != PROTOCOL_HOP_BY_HOP &&
		    next != PROTOCOL_ROUTING && next != PROTOCOL_OPTIONS)
			return 0;
		if (bpf_skb_load_bytes(skb, at, head, 4))
			return 0;
		if (next == PROTOCOL_FRAGMENT) {
			if (head[2] || head[3] & 0xf8)
				return 0; /* not the first fragment, which alone has the ports */
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

/*
 * Handle a packet that may belong to a session. Returns the verdict; NOT_UDP_SESSION if it does not
 * belong to one, and then the packet is unchanged.
 */
inlined int handle_udp(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *iph;
	struct ipv6 *ip6h;
	__u32 at;

	if (data + UDP_OFFSET(v6) > data_end) {
		if (bpf_skb_pull_data(skb, UDP_OFFSET(v6)))
			return NOT_UDP_SESSION;
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + UDP_OFFSET(v6) > data_end)
			return NOT_UDP_SESSION;
	}
	if (v6) {
		ip6h = data + ETHERNET_BYTES;
		if (ip6h->next == PROTOCOL_UDP)
			return forward_datagram(skb, 1);
		if (ip6h->next == PROTOCOL_ICMPV6)
			return translate_udp_icmp_error(skb, 1);
		at = find_udp_header(skb, ip6h->next);
		return at ? pass_fragment_or_options(skb, at, 1) : NOT_UDP_SESSION;
	}
	iph = data + ETHERNET_BYTES;
	if (iph->protocol == PROTOCOL_UDP) {
		if (iph->version == 0x45 && !(iph->fragment & bpf_htons(0x3fff)))
			return forward_datagram(skb, 0);
		if (iph->fragment & bpf_htons(0x1fff))
			return NEXT; /* a later fragment, which has no ports */
		return pass_fragment_or_options(skb, ETHERNET_BYTES + (iph->version & 15) * 4, 0);
	}
	if (iph->protocol == PROTOCOL_ICMP && iph->version == 0x45 &&
	    !(iph->fragment & bpf_htons(0x3fff)))
		return translate_udp_icmp_error(skb, 0);
	return NOT_UDP_SESSION;
}

/*
 * Whether the socket that receives datagrams with these addresses has this mark (SO_PRIORITY), and
 * is connected to this port of its peer (0: not connected). A listener's socket that is connected
 * to the client would be found because of that alone. The lookup is made twice, since a worker
 * could connect the socket between the lookup and the check, and disconnect it again; it cannot do
 * so both times.
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
 * Which of the two sockets that the keeper has marked would receive the datagrams of a session, as
 * bits (FOUND_CLIENT, FOUND_SERVER). So a worker cannot have datagrams of another process's socket
 * forwarded.
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
	key = session->direction[PF_UP].from;
	if (v6 ? has_marked_socket(skb, &key, mark, 0, 1)
	       : has_marked_socket(skb, &key, mark, 0, 0))
		found |= FOUND_CLIENT;
	key = session->direction[PF_DOWN].from;
	if (v6 ? has_marked_socket(skb, &key, mark, key.sport, 1)
	       : has_marked_socket(skb, &key, mark, key.sport, 0))
		found |= FOUND_SERVER;
	return found;
}
