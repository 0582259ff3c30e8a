/*
 * The splice datapath (sched_cls at tcx, on both sides of every interface): packets of a joined
 * pair get the addresses, ports, sequence and acknowledgement numbers, timestamps and windows of
 * the other connection, and go on. The two ends talk TCP end to end; nothing is buffered here,
 * nothing acknowledged and nothing resent. ../README.md tells how a pair gets here.
 *
 * ingress  what the two peers send to us, and what routers say of it (ICMP)
 * egress   what our own two sockets of a pair send: nothing any more
 * probe    run by the keeper (BPF_PROG_TEST_RUN): by which interfaces our sockets reach the peers,
 *	    and whether they have been told by now that all they had sent has come; has the worker
 *	    look at the pair if it is asked to
 * control  run by the keeper, too: lets a pair begin, at whatever moment
 *
 * A forwarder copies bytes one to one. So one constant for each direction takes the numbers of the
 * one connection to those of the other, for all time: those of a byte that is read here and will be
 * written there.
 *
 * What had come to our sockets when the pair began, and was not yet with the other end (the tail),
 * stays theirs: userspace reads and writes the rest of it, our sockets send it, get the
 * acknowledgements of it, and send it again if need be. Everything behind it is between the ends.
 *
 * Why no packet can be lost or counted twice at that moment: `control` first lets our sockets
 * acknowledge nothing more than they have (BEGINNING), then looks how far that is. A packet that
 * had passed `ingress` before it knew better, and reaches our socket after the look, is not
 * acknowledged: then its sender sends it again, and that goes to the other end. It is as if it had
 * been lost.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_options.h"
#include "splice_packet.h"
#include "splice_valid.h"

#define NEXT -1 /* TCX_NEXT: whatever else looks at packets here, then the stack */
#define DROP 2	/* TCX_DROP */

#define HEARD_TICK_BITS 6 /* of jiffies: 0.6 s where there are 100 of them in a second */

#define VLAN_NUMBER  0xfff /* of a tag */
#define ACCURATE_ECN 0x10  /* of tcp_sock.ecn_flags: AccECN (RFC 9768), on kernels that have it */

/* What is sent on begins a new life: the peer has not reckoned with the way behind us. */
#define HOPS 64

/* On the copy of a packet that is for our own socket: it has been looked at already. */
#ifndef FOR_OUR_SOCKET
#define FOR_OUR_SOCKET 0x5046 /* each load has a number of its own, which nobody can know */
#endif

/* bcc 0.26 declares it with three parameters; the kernel has four. */
static int (*redirect_neigh)(__u32 interface, void *next_hop, int bytes,
			     __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

#ifdef MAP_EXPRESS_PROGRAMS_FD
static long (*tail_call)(void *context, void *map, __u32 index) = (void *)BPF_FUNC_tail_call;

/* Another program goes on with this packet (express_connect.c); if there is none it returns. */
#define go_on_with_express(skb, place) tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), place)
#else
#define go_on_with_express(skb, place) ((void)0)
#endif

inlined void tell(struct splice *splice, __u32 index)
{
	struct splice_event event = { .index = index, .worker = splice->worker, .id = splice->id };
	__u32 worker = splice->worker;
	void *ring = map_lookup(MAP_RINGS_FD, &worker);

	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

/*
 * A connection begins, and its packets come by here under these addresses: that is what the keeper
 * wants to know of a pair. Behind a NAT rule of this host a socket has other ones. What comes again
 * counts where it came first: a device on top of another one sees it, too.
 */
inlined void remember_handshake(struct splice_key *key, __u32 interface, __u32 isn)
{
	struct splice_handshake *known = map_lookup(MAP_HANDSHAKES_FD, key);
	struct splice_handshake handshake = { .interface = interface, .isn = isn };

	if (!known || known->isn != isn)
		map_update(MAP_HANDSHAKES_FD, key, &handshake);
}

#define read32(structure, offset) (*(volatile __u32 *)((void *)(structure) + (offset)))
#define read64(structure, offset) (*(volatile __u64 *)((void *)(structure) + (offset)))

/* The socket that gets what comes from here; the caller releases it. */
inlined struct bpf_sock *find(struct __sk_buff *skb, const struct splice_key *from, __u32 family)
{
	struct bpf_sock_tuple tuple = {};
	int i;

	if (family == PF_IPV6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			tuple.ipv6.saddr[i] = from->source[i];
			tuple.ipv6.daddr[i] = from->target[i];
		}
		tuple.ipv6.sport = from->sport;
		tuple.ipv6.dport = from->dport;
		return (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), -1,
							     0);
	}
	tuple.ipv4.saddr = from->source[3];
	tuple.ipv4.daddr = from->target[3];
	tuple.ipv4.sport = from->sport;
	tuple.ipv4.dport = from->dport;
	return (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), -1, 0);
}

/*
 * Whether our own socket is there: it is not between a worker's death and the adoption of its
 * pairs. A listener that would get a SYN in its place would begin a connection with the pair's
 * addresses.
 */
inlined int has_socket(struct __sk_buff *skb, const struct splice_key *from, const int v6)
{
	struct bpf_sock *sk = find(skb, from, v6 ? PF_IPV6 : PF_IPV4);
	__u32 state;

	if (!sk)
		return 0;
	state = sk->state;
	bpf_sk_release(sk);
	return state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT;
}

inlined void forget(struct splice *splice)
{
	struct splice_key key = splice->way[PF_UP].from;

	map_delete(MAP_FLOWS_FD, &key);
	key = splice->way[PF_DOWN].from;
	map_delete(MAP_FLOWS_FD, &key);
}

inlined __u32 window_field(__u32 bytes, __u8 scale)
{
	bytes >>= scale & 15;
	return bytes > 65535 ? 65535 : bytes;
}

/* A rewritten packet goes on: up the stack of this host, or out. */
inlined int send_on(__u32 interface)
{
	return interface ? redirect_neigh(interface, NULL, 0, 0) : NEXT;
}

/* What an ICMP packet's pseudo-header adds to its checksum, but for the length. */
inlined __u64 pseudo_sum(const struct ipv6 *six)
{
	__u64 sum = bpf_htons(PROTOCOL_ICMPV6);
	int i;

#pragma unroll
	for (i = 0; i < 4; i++)
		sum += (__u64)six->source[i] + six->target[i];
	return sum;
}

#include "splice_udp.h"

/*
 * A router cannot pass on what we sent in a peer's name: say so to that peer, about the packet that
 * it knows. Without this, a connection whose path became narrower would hang.
 */
inlined int translate_error(struct __sk_buff *skb, const int v6)
{
	const int about_at = TCP_AT(v6) + 8, ports_at = about_at + IP_BYTES(v6);
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *way, *back;
	struct ipv4 *four;
	struct ipv6 *six;
	struct icmp *icmp;
	__be32 *ports;
	__u32 index, seq, bytes;
	__u64 sum = 0, addresses = 0;

	if (bpf_skb_pull_data(skb, ports_at + 8))
		return NEXT; /* not an error about a TCP packet: too short */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_at + 8 > data_end)
		return NEXT;
	icmp = data + TCP_AT(v6);
	if (v6 ? icmp->type < 1 || icmp->type > 3 : icmp->type != 3 && icmp->type != 11)
		return NEXT; /* no error, or one without a meaning for TCP */
	four = data + about_at;
	six = data + about_at;
	if (v6 ? six->next != PROTOCOL_TCP
	       : four->version != 0x45 || four->protocol != PROTOCOL_TCP)
		return NEXT;
	/* As it would come from the peer that our packet was for. */
	take_addresses(key.target, key.source, data + about_at, v6);
	ports = data + ports_at;
	key.sport = *((__u16 *)ports + 1);
	key.dport = *(__u16 *)ports;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice || volatile_read(splice->state) != PF_SPLICE_ACTIVE)
		return NEXT;
	/* `back` translates what the sender sends: undo that. */
	way = flow->direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	back = flow->direction == PF_UP ? &splice->way[PF_DOWN] : &splice->way[PF_UP];
	seq = bpf_ntohl(ports[1]);
	if (volatile_read(way->tail_open) && before(seq, way->tail))
		return NEXT; /* our own socket has sent that, and sees to it */
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid(splice, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack has no use for it, either */
	}
	if (!comes_by(way, skb->ifindex)) {
		count_invalid(splice, PF_INVALID_INTERFACE);
		return DROP;
	}
	six = data + ETHERNET_BYTES;
	four = data + ETHERNET_BYTES;
	bytes = v6 ? bpf_ntohs(six->payload_bytes) : bpf_ntohs(four->total_bytes) - IP_BYTES(0);
	if (bytes + TCP_AT(v6) > skb->len || (!v6 && !is_whole_header(four))) {
		count_invalid(splice, PF_INVALID_HEADER);
		return DROP;
	}
	/* It can be only about what is under way (RFC 5927). */
	if (before(seq, (__u32)volatile_read(way->last_ack)) || after(seq, sent_to(way, back))) {
		count_invalid(splice, PF_INVALID_ERROR);
		return DROP;
	}
	sum = v6 ? pseudo_sum(six) + bpf_htons(bytes & 0xffff) : 0;
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: as if it had been lost */
	if (is_corrupt(skb, TCP_AT(v6), TCP_AT(v6) + 2, bytes, sum)) {
		count_invalid(splice, PF_INVALID_CHECKSUM);
		return DROP;
	}
	sum = 0;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + ports_at + 8 > data_end)
		return DROP; /* never: it was there a moment ago */
	ports = data + ports_at;
	four = data + about_at;

	put(&ports[0], (__u32)back->from.sport | (__u32)back->from.dport << 16, &sum);
	shift(&ports[1], -back->seq_delta, &sum);
	/*
	 * The addresses inside: with IPv4 they and the checksum beside them make up for each other.
	 */
	give_addresses(data + about_at, back->from.source, back->from.target, v6);
	if (v6)
		sum += (__u16)~back->address_sum;
	else
		four->checksum =
			(__u16)~fold((__u64)(__u16)~four->checksum + (__u16)~back->address_sum);
	/* It comes from us, as far as that peer knows. */
	if (v6) {
		int i;

		six = data + ETHERNET_BYTES;
#pragma unroll
		for (i = 0; i < 4; i++) {
			put(&six->source[i], back->from.target[i], &addresses);
			put(&six->target[i], back->from.source[i], &addresses);
		}
		six->hops = HOPS;
	} else {
		four = data + ETHERNET_BYTES;
		put(&four->source, back->from.target[3], &addresses);
		put(&four->target, back->from.source[3], &addresses);
		addresses += (__u16)~bpf_htons((__u16)four->ttl << 8);
		addresses += (__u16)bpf_htons(HOPS << 8);
		four->ttl = HOPS;
		four->checksum = (__u16)~fold((__u64)(__u16)~four->checksum + fold(addresses));
	}
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 2, 0, fold(sum), 0);
	if (v6)
		replace_pseudo(skb, TCP_AT(v6) + 2, fold(addresses), v6);
	return send_on(way->interface);
}

/*
 * What a packet says about the tail is for our own socket. It gets the packet as one whose bytes
 * have come before, with the number that it expects next behind them, however many bytes have
 * passed it by since. If `again` they have come before indeed, and it answers that.
 */
inlined int give_to_our_socket(struct __sk_buff *skb, struct splice_direction *way, __u32 header,
			       __u32 bytes, int again, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	__u32 *word = data + TCP_AT(v6);
	__u32 known = (__u32)volatile_read(way->sent);
	__u64 sum = 0;

	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	/*
	 * What our socket has sent, and no more: an edge behind that a firewall of this host takes
	 * for an acknowledgement of bytes that it has not seen (nf_conntrack_proto_tcp.c,
	 * tcp_in_window), and our socket would never hear that its bytes come.
	 */
	if (after(known, way->tail))
		known = way->tail;
	if (!again)
		put(&word[1], bpf_htonl(volatile_read(way->ours) - bytes), &sum);
	if (after(bpf_ntohl(word[2]), way->tail))
		put(&word[2], bpf_htonl(way->tail), &sum);
	put(&word[3], word[3] & ~bpf_htonl(FIN_OF_TCP | SYN_OF_TCP | RST_OF_TCP | URG_OF_TCP),
	    &sum);
	if (header > 32 && (void *)(word + 6) <= data_end && word[5] == bpf_htonl(TIMESTAMP_WORD))
		clip_edges(word + 8, data_end, header - 32, known, &sum);
	else if (header > 20)
		clip_edges(word + 5, data_end, header - 20, known, &sum);
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
	return NEXT;
}

/*
 * Our own socket answers (RFC 5961, 3 and 4: a challenge acknowledgement): a peer without a
 * connection answers that with a reset of the right number, and a peer that has one ignores it. A
 * SYN is what our socket answers so, at any number; a mute socket takes nothing else.
 *
 * To the server our socket has connected, so there it must be a SYN-ACK: a firewall of this host
 * (nf_conntrack_proto_tcp.c, tcp_conntracks) takes a SYN of the end that was connected to for
 * invalid.
 */
inlined int challenge(struct __sk_buff *skb, struct splice_direction *way, __u32 direction,
		      const struct splice_key *from, const int v6)
{
	void *data, *data_end;
	__u32 *word, flags = direction == PF_UP ? SYN_OF_TCP : SYN_OF_TCP | ACK_OF_TCP;
	__u64 sum = 0;

	if (!has_socket(skb, from, v6))
		return DROP; /* it will be there when this is sent again */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	word = data + TCP_AT(v6);
	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	way->answer = PF_ANSWER;
	put(&word[2], 0, &sum);
	put(&word[3], (word[3] & ~bpf_htonl(FLAGS_OF_TCP)) | bpf_htonl(flags), &sum);
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
	return NEXT;
}

/* A packet that is longer than what the interface in front of it takes is lost, and reported. */
inlined int is_too_long(struct __sk_buff *skb, struct splice *splice, __u32 index,
			struct splice_direction *way, __u32 seq, __u32 header, __u32 total,
			const int v6)
{
	__u32 mtu = 0, bytes = skb->gso_size ? skb->gso_size + IP_BYTES(v6) + header : total;

	if (!way->interface)
		return 0;
	/* What it answers is of the whole of an aggregate; what it writes is what is asked for. */
	bpf_check_mtu(skb, way->interface, &mtu, 0, 0);
	if (!mtu || bytes <= mtu)
		return 0;
	way->narrow_seq = seq;
	if (!volatile_read(way->narrow_mtu)) {
		*(volatile __u32 *)&way->narrow_mtu = mtu;
		tell(splice, index);
	}
	return 1;
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
	/* As on every datapath a pair is idle as long as no byte moves, whatever else is said. */
	if (is_more)
		seen->last_ns = bpf_ktime_get_ns();
}

inlined int translate(struct __sk_buff *skb, const int v6)
{
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *way, *back;
	struct ipv4 *four;
	struct ipv6 *six;
	struct tcp *tcp;
	struct segment segment = {};
	__u32 *word;
	__u32 index, state, total, header, seq, ack, window, change, was, n, edge, floor, number,
		direction, mark, tick;
	__u64 sum = 0;
	__u8 flags;
	int ring = 0, alone, is_copy = skb->mark == FOR_OUR_SOCKET, is_news = 0, is_piece = 0,
	    verdict, at;

	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + HEADERS_BYTES(v6) > data_end) {
		if (bpf_skb_pull_data(skb, HEADERS_BYTES(v6)))
			return NEXT; /* shorter than any TCP packet */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return NEXT;
	}
	four = data + ETHERNET_BYTES;
	six = data + ETHERNET_BYTES;
	if (v6) {
		if (six->next == PROTOCOL_ICMPV6)
			return translate_error(skb, 1);
		if (six->next != PROTOCOL_TCP)
			return NEXT;
		total = bpf_ntohs(six->payload_bytes) + IP_BYTES(1);
	} else {
		if (four->version != 0x45 || (four->fragment & bpf_htons(0x1fff)))
			return NEXT; /* a piece without a beginning the stack does not take, either
				      */
		is_piece = !!(four->fragment & bpf_htons(0x2000));
		if (four->protocol == PROTOCOL_ICMP)
			return is_piece ? NEXT : translate_error(skb, 0);
		if (four->protocol != PROTOCOL_TCP)
			return NEXT;
		total = bpf_ntohs(four->total_bytes);
	}
	if (skb->gso_size)
		total = skb->len - ETHERNET_BYTES; /* more than the field can hold, perhaps */
	tcp = data + TCP_AT(v6);
	flags = tcp->flags;
	take_addresses(key.source, key.target, data + ETHERNET_BYTES, v6);
	key.sport = tcp->sport;
	key.dport = tcp->dport;
	if ((flags & SYN) && skb->pkt_type == HOST_PACKET)
		remember_handshake(&key, skb->ifindex, bpf_ntohl(tcp->seq));
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow) {
		if (is_copy)
			return DROP;
		go_on_with_express(skb, v6 ? PF_EXPRESS_BEGIN6 : PF_EXPRESS_BEGIN4);
		return NEXT;
	}
	index = flow->index;
	direction = flow->direction;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice)
		return NEXT;
	way = direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	back = direction == PF_UP ? &splice->way[PF_DOWN] : &splice->way[PF_UP];
	state = volatile_read(splice->state);
	if (state != PF_SPLICE_ACTIVE && (state != PF_SPLICE_RESET || is_copy)) {
		if (is_copy)
			return DROP;
		if (state == PF_SPLICE_ASKED)
			go_on_with_express(skb, v6 ? PF_EXPRESS_ASKED6 : PF_EXPRESS_ASKED4);
		return NEXT;
	}

	/* Is it what a host takes at all, and does it come from where that peer is? */
	if (skb->pkt_type != HOST_PACKET) {
		count_invalid(splice, PF_INVALID_NOT_FOR_US);
		return NEXT; /* the stack has no use for it, either */
	}
	if (!comes_by(way, skb->ifindex)) {
		count_invalid(splice, PF_INVALID_INTERFACE);
		return DROP;
	}
	if (is_piece) {
		count_invalid(splice, PF_INVALID_FRAGMENT);
		return DROP; /* with the beginning all of it is lost */
	}
	header = (__u32)(tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES(v6) + header || total > skb->len - ETHERNET_BYTES ||
	    (!v6 && !is_whole_header(data + ETHERNET_BYTES))) {
		count_invalid(splice, PF_INVALID_HEADER);
		return DROP;
	}
	seq = bpf_ntohl(tcp->seq);
	ack = bpf_ntohl(tcp->ack);
	n = total - IP_BYTES(v6) - header;
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return DROP; /* no memory: as if it had been lost */
	if (!is_copy && is_corrupt(skb, TCP_AT(v6), TCP_AT(v6) + 16, n + header,
				   (__u64)way->pseudo_sum + bpf_htons((n + header) & 0xffff))) {
		count_invalid(splice, PF_INVALID_CHECKSUM);
		return DROP;
	}
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + TCP_AT(v6) + header > data_end) {
		if (bpf_skb_pull_data(skb, TCP_AT(v6) + header))
			return DROP; /* no memory: as if it had been lost */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
	}
	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	tcp = data + TCP_AT(v6);
	word = (__u32 *)tcp;
	if (is_copy) {
		skb->mark = 0;
		return give_to_our_socket(skb, way, header, n, 0, v6);
	}

	if ((flags & SYN) && (flags & (FIN | RST))) {
		/* Our socket would take one with both for a reset (RFC 9293, 3.10.7.4). */
		count_invalid(splice, PF_INVALID_FLAGS);
		return DROP;
	}
	if (flags & SYN) {
		/* The end of this pair is past, and its ports serve again. */
		if (way->fin_acked && back->fin_acked) {
			forget(splice);
			return NEXT;
		}
		if (state == PF_SPLICE_RESET) {
			/* The other end may have to be reset still. */
			map_delete(MAP_FLOWS_FD, &key);
			return NEXT;
		}
		/*
		 * Never from end to end. The last packet of the handshake was lost, and the server
		 * has no connection yet: our socket must answer again. Nobody else could, as until
		 * then the server takes only what echoes the timestamp of its SYN-ACK. Or this peer
		 * has started anew, and gets a challenge.
		 */
		if (!(flags & ACK))
			count_invalid(splice, PF_INVALID_SYN);
		if (!has_socket(skb, &key, v6))
			return DROP; /* it will be there when this is sent again */
		way->answer = PF_ANSWER;
		return NEXT;
	}
	if (flags & RST) {
		if (state == PF_SPLICE_RESET)
			return DROP; /* so is this pair */
		if (!is_exact_reset(seq, way, back)) {
			count_invalid(splice, PF_INVALID_RESET);
			if (after(seq, (__u32)volatile_read(way->limit)) ||
			    before(seq, expected_of(way, back) - way->reach))
				return DROP;
			return challenge(skb, way, direction, &key, v6);
		}
		if (!splice->reset) {
			splice->reset = 1 + direction;
			tell(splice, index);
		}
		/*
		 * The worker has our sockets reset both ends, whatever becomes of this packet. Who
		 * has still to get a byte of the tail expects another number: it would answer with
		 * a challenge (RFC 5961), which nobody could take up, and then no other for half a
		 * second: also not the RST with the right number, which is our socket's.
		 */
		if (volatile_read(back->tail_open))
			return DROP;
		floor = ack;
		alone = 0;
		goto rewrite;
	}
	if (!(flags & ACK)) {
		count_invalid(splice, PF_INVALID_FLAGS);
		return DROP;
	}
	segment.seq = seq;
	segment.end = seq + n + (flags & FIN);
	segment.ack = ack;
	segment.flags = flags;
	if (header >= 32 && (void *)(word + 8) <= data_end &&
	    word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		segment.has_timestamp = 1;
		segment.tsval = bpf_ntohl(word[6]);
	}
	verdict = judge(&segment, way, back);
	if (verdict >= PF_INVALID) {
		count_invalid(splice, verdict - PF_INVALID);
		return DROP;
	}
	if (state == PF_SPLICE_RESET) {
		/*
		 * Nothing that our sockets would answer is right any more. But their RST must have
		 * the number that the peer expects: it ignores an older one.
		 */
		if (verdict == PF_VALID)
			advance(&way->last_ack, ack);
		return DROP;
	}
	if (is_too_long(skb, splice, index, way, seq, header, total, v6))
		return DROP; /* and the worker tells this peer (ICMP) */

	/* It is believed from here on. */
	tick = (__u32)(bpf_jiffies64() >> HEARD_TICK_BITS);
	if (way->heard_tick != tick) {
		way->heard_tick = tick;
		way->heard_s = (__u32)(bpf_ktime_get_ns() / NS_PER_S);
	}
	if (n && (verdict == PF_OLD || !after(segment.end, (__u32)volatile_read(way->last_end)))) {
		__sync_fetch_and_add(&way->again, n);
		if (has_too_much_again(way)) {
			if (way->fin_acked && back->fin_acked) {
				count_invalid(splice, PF_INVALID_SEQUENCE);
				return DROP; /* nothing is missing any more */
			}
			show_bytes(splice, way, direction);
		}
	}
	alone = !n && !(flags & FIN);
	floor = ack;
	window = (__u32)bpf_ntohs(tcp->window) << (way->shift_left & 15);
	edge = ack + window;
	if (way->tail_open && before(ack, way->tail)) {
		/* The rest is acknowledged by us, as it was before. */
		floor = way->tail;
		/* Told twice, our socket would take it for a sign of loss. */
		is_news = verdict == PF_VALID &&
			  (edge != way->edge || after(ack, (__u32)way->last_ack) || header > 32);
	} else if (way->tail_open && verdict == PF_VALID) {
		way->tail_open = 0;
		ring = is_news = 1;
	} else if (volatile_read(way->deaf) && verdict == PF_VALID) {
		/* Our socket sends the tail again: what told it that it has come was lost. */
		way->deaf = 0;
		is_news = 1;
	}
	if (verdict == PF_VALID && !before(ack, (__u32)volatile_read(way->last_ack))) {
		way->edge = edge;
		advance(&back->limit, edge + way->ack_delta);
		if (window > back->reach)
			back->reach = window;
	}
	if (volatile_read(back->tail_open) && before(seq, way->begin)) {
		/*
		 * Bytes of before the beginning, again, or a probe: our socket has these bytes, and
		 * says so. The other end may have none of them yet, nor our own words (a PROXY
		 * header) in front of them, whose numbers they would get there.
		 */
		if (after(ack, (__u32)volatile_read(way->last_ack))) {
			/* It may be the only packet that acknowledges the other end's FIN. */
			advance(&way->last_ack, ack);
			ring |= take_acknowledgement(back, ack + way->ack_delta);
			show_bytes(splice, back, 1 - direction);
		}
		way->answer = PF_ANSWER;
		if (ring)
			tell(splice, index);
		return give_to_our_socket(skb, way, header, n, 1, v6);
	}
	if (floor != ack && alone && !before(seq, (__u32)volatile_read(way->last_end))) {
		/* Nothing else is in it: the other end would take it for a sign of loss. */
		advance(&way->last_ack, ack);
		return give_to_our_socket(skb, way, header, 0, 0, v6);
	}
	if (is_news) {
		/*
		 * It is for both. If our socket cannot be told that the tail has come, it sends it
		 * again, and `egress` sees that it is deaf.
		 */
		mark = skb->mark;
		skb->mark = FOR_OUR_SOCKET;
		bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
		skb->mark = mark;
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return DROP; /* never: it was there a moment ago */
		tcp = data + TCP_AT(v6);
	}
	if (verdict == PF_VALID) {
		if (!alone)
			__sync_fetch_and_add(&way->packets, 1);
		ring |= take_in(&segment, way, back);
		show_bytes(splice, way, direction);
		if (after(ack, (__u32)volatile_read(way->last_ack))) {
			advance(&way->last_ack, ack);
			ring |= take_acknowledgement(back, ack + way->ack_delta);
			show_bytes(splice, back, 1 - direction);
		}
	}
	if (ring)
		tell(splice, index);

rewrite:
	/* Whatever way it came: then the verifier takes them for one, and goes on but once. */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	tcp = data + TCP_AT(v6);
	if (header > 20) {
		at = shift_options(data + OPTIONS_AT(v6), data_end, header - 20, way, back, &sum);
		if (at >= 0) {
			/* Between the ends nobody has agreed on it. */
			count_invalid(splice, PF_INVALID_OPTION);
			if (blank_options(skb, OPTIONS_AT(v6) + 4 * at, header - 20 - 4 * at, &sum))
				return DROP; /* never: it is in front */
			data = (void *)(long)skb->data;
			data_end = (void *)(long)skb->data_end;
			if (data + HEADERS_BYTES(v6) > data_end)
				return DROP; /* never: it was there a moment ago */
			tcp = data + TCP_AT(v6);
		}
	}
	word = data + TCP_AT(v6);
	put(&word[0], (__u32)way->sport | (__u32)way->dport << 16, &sum);
	number = seq + way->seq_delta;
	/* The other end takes an acknowledgement only from within its window, tail and all. */
	if (alone && volatile_read(back->tail_open) && after(number, back->edge))
		number = back->edge;
	put(&word[1], bpf_htonl(number), &sum);
	if (flags & ACK)
		put(&word[2], bpf_htonl(floor + way->ack_delta), &sum);
	/*
	 * Urgent bytes stay where they stand in the stream, as on every datapath: a reader who
	 * knows nothing of them would lose one.
	 */
	was = bpf_ntohl(word[3]);
	change = was & ~URG_OF_TCP;
	if (way->no_ecn)
		change &= ~ECN_OF_TCP;
	/* What is left of the window behind the tail. */
	window = (was & 0xffff) << (way->shift_left & 15);
	window = floor - ack < window ? window - (floor - ack) : 0;
	change = (change & 0xffff0000) | window_field(window, way->shift_right);
	put(&word[3], bpf_htonl(change), &sum);
	sum += (__u16)~tcp->urgent;
	tcp->urgent = 0;

	give_addresses(data + ETHERNET_BYTES, way->source, way->target, v6);
	if (v6) {
		six = data + ETHERNET_BYTES;
		if (way->no_ecn)
			six->version &= ~bpf_htonl(ECN_OF_V6);
		six->hops = HOPS;
	} else {
		__u64 ip_sum;

		four = data + ETHERNET_BYTES;
		ip_sum = (__u64)(__u16)~four->checksum + way->address_sum;
		ip_sum += (__u16)~bpf_htons((__u16)four->ttl << 8);
		ip_sum += (__u16)bpf_htons(HOPS << 8);
		four->ttl = HOPS;
		if (way->no_ecn) {
			ip_sum += (__u16)~bpf_htons(four->tos);
			four->tos &= ~ECN_OF_TOS;
			ip_sum += (__u16)bpf_htons(four->tos);
		}
		four->checksum = (__u16)~fold(ip_sum);
	}
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
	replace_pseudo(skb, TCP_AT(v6) + 16, (__u16)way->address_sum, v6);
	return send_on(way->interface);
}

int ingress(struct __sk_buff *skb)
{
	int verdict;

	/*
	 * One with a tag is not yet where it belongs: it comes again, by its own interface. A tag
	 * of number 0 has a priority, and says nothing of where (IEEE 802.1Q, 6.9.1).
	 */
	if (skb->vlan_present && (skb->vlan_tci & VLAN_NUMBER))
		return NEXT;
#ifdef MAP_EXPRESS_PROGRAMS_FD
	if (skb->mark == FOR_OUR_STACK) {
		skb->mark = 0;
		return NEXT;
	}
#endif
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		verdict = take_datagram(skb, 0);
		return verdict == NO_DATAGRAM ? translate(skb, 0) : verdict;
	}
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6)) {
		verdict = take_datagram(skb, 1);
		return verdict == NO_DATAGRAM ? translate(skb, 1) : verdict;
	}
	return NEXT;
}

inlined int silence(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *way, *back;
	struct ipv4 *four;
	struct ipv6 *six;
	struct tcp *tcp;
	__u32 *word;
	__u32 index, state, header, seq, ack, edge, window, answer;
	__u64 sum = 0;
	int i, at, is_empty;

	if (data + HEADERS_BYTES(v6) > data_end)
		return NEXT; /* a socket's packets have all their headers in front */
	four = data + ETHERNET_BYTES;
	six = data + ETHERNET_BYTES;
	if (v6 ? six->next != PROTOCOL_TCP
	       : four->version != 0x45 || four->protocol != PROTOCOL_TCP)
		return NEXT;
	tcp = data + TCP_AT(v6);
	take_addresses(key.target, key.source, data + ETHERNET_BYTES, v6);
	key.sport = tcp->dport;
	key.dport = tcp->sport;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice)
		return NEXT;
	state = volatile_read(splice->state);
	if (state == PF_SPLICE_FREE || state == PF_SPLICE_ARMED)
		return NEXT;
	way = flow->direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	back = flow->direction == PF_UP ? &splice->way[PF_DOWN] : &splice->way[PF_UP];
	if ((tcp->flags & RST) && state == PF_SPLICE_ACTIVE &&
	    (way->tail_open || back->tail_open)) {
		/* The socket that could send the tail again has died: this pair cannot go on. */
		*(volatile __u32 *)&splice->state = state = PF_SPLICE_RESET;
		/* Or a rule of this host's firewall has said it: then the worker lives. */
		tell(splice, index);
	}
	word = (__u32 *)tcp;
	if (state == PF_SPLICE_RESET && (tcp->flags & RST)) {
		/* The socket's numbers are those of the handover: give the peer's own. */
		put(&word[1], bpf_htonl((__u32)volatile_read(way->last_ack)), &sum);
		if (tcp->flags & ACK)
			put(&word[2], bpf_htonl((__u32)volatile_read(way->last_end)), &sum);
		bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
		/* What the peer still says is answered by the kernel, which knows no such socket.
		 */
		map_delete(MAP_FLOWS_FD, &key);
		return NEXT;
	}
	if (state == PF_SPLICE_BEGINNING && (tcp->flags & (SYN | FIN | RST)))
		return NEXT; /* the kernel's own: our worker waits */
	if (tcp->flags & SYN) {
		/* A new connection from a port that served a pair which has ended. */
		if (splice->way[PF_UP].fin_acked && splice->way[PF_DOWN].fin_acked) {
			forget(splice);
			return NEXT;
		}
	}
	if (state == PF_SPLICE_RESET || (tcp->flags & (SYN | FIN | RST)))
		return DROP; /* begin and end are between the two ends */
	/*
	 * It may still get a packet that passed `ingress` before that knew the pair. Its sender
	 * sends that again, to the other end; but our socket expects what is behind it from now on.
	 */
	seq = bpf_ntohl(tcp->seq);
	ack = bpf_ntohl(tcp->ack);
	header = (__u32)(tcp->offset >> 4) * 4;
	is_empty = skb->len == TCP_AT(v6) + header;
	if (!is_empty)
		advance(&way->sent, seq + skb->len - TCP_AT(v6) - header);
	if (state == PF_SPLICE_BEGINNING) {
		if (after(ack, way->begin))
			ack = way->begin;
		/* It may be told of more room than ever. */
		window = (__u32)bpf_ntohs(tcp->window) << (back->shift_right & 15);
		advance(&way->limit, ack + window);
		if (window > way->reach)
			way->reach = window;
	} else {
		if (after(ack, way->ours))
			way->ours = ack;
		if (is_empty) {
			/*
			 * An answer to what has come again; a probe of the window that the tail
			 * waits for. And as long as the peer has sent nothing to the other end, our
			 * socket may repeat that it has got what came before: the last packet of a
			 * handshake is such a one.
			 */
			if (!way->answer && (__u32)way->last_end != way->begin &&
			    !(way->tail_open && before(seq, (__u32)way->last_ack)))
				return DROP;
			answer = volatile_read(way->answer);
			way->answer = 0;
			/*
			 * A number in front of what the peer expects, as of TCP's own keepalives
			 * (RFC 9293, 3.8.4). Otherwise: what our socket has sent last may be long
			 * ago.
			 */
			if (answer == PF_ANSWER_PROBE)
				put(&word[1], bpf_htonl((__u32)volatile_read(way->last_ack) - 1),
				    &sum);
			else if (!way->tail_open)
				put(&word[1],
				    bpf_htonl((__u32)volatile_read(back->last_end) +
					      back->seq_delta),
				    &sum);
		} else if (!before(seq, way->tail)) {
			return DROP; /* never: it has sent no more than the tail */
		} else if (!way->tail_open) {
			/*
			 * It has not heard that this has come, and would send it until it gives up
			 * and its port is free. The peer answers what it has got before, and
			 * `ingress` has our socket hear that.
			 */
			way->deaf = 1;
		}
		/*
		 * What has come to our socket since is not acknowledged here, the sender must not
		 * forget it: only what went to the other end. And the window is the other end's.
		 */
		ack = expected_of(way, back);
		edge = back->edge + back->ack_delta;
		edge = after(edge, ack) ? edge - ack : 0;
		put(&word[3],
		    (word[3] & ~bpf_htonl(0xffff)) |
			    bpf_htonl(window_field(edge, back->shift_right)),
		    &sum);
	}
	put(&word[2], bpf_htonl(ack), &sum);
	/* Behind the timestamps may be what our socket alone has got. */
	at = 0;
	if (header > 20 && (void *)(word + 7) <= data_end && word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		at = 3;
		if (state == PF_SPLICE_ACTIVE)
			put(&word[6], bpf_htonl(own_stamp(way, back, bpf_ntohl(word[6]))), &sum);
	}
#pragma unroll
	for (i = 0; i < 10; i++) {
		if (i >= at && 20u + 4 * i < header) {
			if ((void *)(word + 6 + i) > data_end)
				return DROP; /* its headers are in front: never */
			put(&word[5 + i], bpf_htonl(NO_OP_WORD), &sum);
		}
	}
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
	return NEXT;
}

int egress(struct __sk_buff *skb)
{
	/* Forwarded, ours or another's: not from a socket of this host. */
	if (skb->ingress_ifindex)
		return NEXT;
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4))
		return silence(skb, 0);
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6))
		return silence(skb, 1);
	return NEXT;
}

/* One socket as it is now; 0 if it is connected both ways, and nothing is missing. */
inlined __u32 look(struct __sk_buff *skb, const struct splice_key *from, __u32 family,
		   struct splice_look *seen)
{
	struct bpf_sock *sk = find(skb, from, family);
	struct tcp_sock *tcp;
	void *route, *device;
	__u32 busy = 0;

	if (!sk)
		return PF_BUSY_GONE;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (!tcp) {
		bpf_sk_release(sk);
		return PF_BUSY_GONE;
	}
	seen->rcv_nxt = read32(tcp, TCP_SOCK_RCV_NXT);
	seen->write_seq = read32(tcp, TCP_SOCK_WRITE_SEQ);
	seen->ts_recent = read32(tcp, TCP_SOCK_RX_OPT + TCP_OPTIONS_RECEIVED_TS_RECENT);
	if (*(volatile __u8 *)((void *)tcp + SOCK_COMMON_SKC_STATE) != 1)
		busy |= PF_BUSY_GONE;
	seen->unread = seen->rcv_nxt - read32(tcp, TCP_SOCK_COPIED_SEQ);
	/* The SYN has a number of its own, which bytes_received does not count. */
	seen->isn = seen->rcv_nxt - (__u32)read64(tcp, TCP_SOCK_BYTES_RECEIVED) - 1;
	seen->snd_una = read32(tcp, TCP_SOCK_SND_UNA);
	seen->snd_nxt = read32(tcp, TCP_SOCK_SND_NXT);
	seen->edge = seen->snd_una + read32(tcp, TCP_SOCK_SND_WND);
	seen->most_window = read32(tcp, TCP_SOCK_MAX_WINDOW);
	seen->ecn = *(volatile __u8 *)((void *)tcp + TCP_SOCK_ECN_FLAGS);
	seen->promised = read32(tcp, TCP_SOCK_RCV_WUP) + read32(tcp, TCP_SOCK_RCV_WND);
	/* What is behind a gap may have been acknowledged selectively: its sender keeps it back. */
	if (read64(tcp, TCP_SOCK_OUT_OF_ORDER_QUEUE))
		busy |= PF_BUSY_UNREAD;
	route = *(void *volatile *)((void *)tcp + SOCK_SK_DST_CACHE);
	if (route) {
		device = *(void *volatile *)(route + DST_ENTRY_DEV);
		if (device)
			seen->out = read32(device, NET_DEVICE_IFINDEX);
	}
	bpf_sk_release(sk);
	return busy;
}

/* Whether the peer is a socket of this host that is itself spliced, by another forwarder. */
inlined __u32 look_beyond(struct __sk_buff *skb, const struct splice_key *from, __u32 family)
{
	struct splice_key beyond = {};
	struct bpf_sock *sk;
	struct tcp_sock *tcp;
	__u32 busy = 0;
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		beyond.source[i] = from->target[i];
		beyond.target[i] = from->source[i];
	}
	beyond.sport = from->dport;
	beyond.dport = from->sport;
	sk = find(skb, &beyond, family);
	if (!sk)
		return 0;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (tcp && read32(tcp, SOCK_SK_PRIORITY) == PF_SPLICE_PRIORITY)
		busy = PF_BUSY_FOREIGN;
	bpf_sk_release(sk);
	return busy;
}

inlined struct splice *asked_for(struct __sk_buff *skb)
{
	__u32 index;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &index, 4))
		return NULL;
	return map_lookup(MAP_SPLICES_FD, &index);
}

/* An acknowledgement of the tail's end may have passed `ingress` right before the pair began. */
inlined void settle(struct splice *splice, struct splice_direction *way,
		    const struct splice_look *seen)
{
	if (splice->state == PF_SPLICE_ACTIVE && way->tail_open && seen->snd_una == way->tail) {
		advance(&way->last_ack, seen->snd_una);
		way->tail_open = 0;
	}
}

int probe(struct __sk_buff *skb)
{
	struct splice *splice = asked_for(skb);
	struct splice_look client = {}, server = {};
	struct splice_key key;
	__u32 family, index, ring;

	if (!splice || bpf_skb_load_bytes(skb, ETHERNET_BYTES, &index, 4) ||
	    bpf_skb_load_bytes(skb, ETHERNET_BYTES + 4, &ring, 4))
		return PF_BUSY_GONE;
	family = splice->family;
	key = splice->way[PF_UP].from;
	if (!(look(skb, &key, family, &client) & PF_BUSY_GONE))
		settle(splice, &splice->way[PF_UP], &client);
	key = splice->way[PF_DOWN].from;
	if (!(look(skb, &key, family, &server) & PF_BUSY_GONE))
		settle(splice, &splice->way[PF_DOWN], &server);
	if (splice->state == PF_SPLICE_FREE) {
		/* Later the keeper knows better: our sockets do not ask for their routes any more.
		 */
		splice->out[PF_UP] = client.out;
		splice->out[PF_DOWN] = server.out;
		splice->isn[PF_UP] = client.isn;
		splice->isn[PF_DOWN] = server.isn;
	}
	if (ring)
		tell(splice, index);
	return 0;
}

/*
 * A window is told to the other end in steps of our other socket's scale, rounded down. One that
 * has less than two of them would look closed most of the time, or always.
 */
inlined int is_coarse(const struct splice_direction *way, const struct splice_look *seen)
{
	return seen->most_window >> (way->shift_right & 15) < 2;
}

/*
 * What `egress` may change from BEGINNING on: what our socket has sent to this peer, and what it
 * has promised to have room for.
 */
inlined void prepare(struct splice_direction *way, const struct splice_look *seen)
{
	way->begin = seen->rcv_nxt;
	way->sent = seen->snd_nxt;
	way->limit = seen->promised;
	way->reach = seen->promised - seen->rcv_nxt;
	if (way->reach < LEAST_REACH)
		way->reach = LEAST_REACH;
}

/* Where a direction stands as it begins: packets from the one socket's peer, to `tail`. */
inlined void begin(struct splice_direction *way, const struct splice_look *seen,
		   const struct splice_look *beyond, __u32 tail)
{
	way->last_ack = seen->snd_una;
	way->last_end = way->next = way->begin = way->ours = seen->rcv_nxt;
	advance(&way->sent, seen->snd_nxt);
	advance(&way->limit, seen->promised);
	/* The other end's window, in this peer's numbers: what that says is behind its tail. */
	advance(&way->limit, beyond->edge - way->seq_delta);
	if (way->reach < beyond->most_window)
		way->reach = beyond->most_window;
	way->recent = seen->ts_recent;
	way->recent_s = way->heard_s = (__u32)(bpf_ktime_get_ns() / NS_PER_S);
	way->edge = seen->edge;
	way->unread = seen->unread;
	way->tail = tail;
	way->tail_open = seen->snd_una != tail;
	way->answer = 0;
	way->stamped = 0;
	way->deaf = 0;
}

int control(struct __sk_buff *skb)
{
	struct splice *splice = asked_for(skb);
	struct splice_key key;
	struct splice_look client = {}, server = {};
	__u32 family, busy, up, down, up_tail, down_tail, client_time, server_time;
	__u64 until_ns;

	if (!splice || splice->state != PF_SPLICE_ARMED ||
	    bpf_skb_load_bytes(skb, ETHERNET_BYTES + 8, &until_ns, 8))
		return PF_BUSY_GONE;
	family = splice->family;
	/* One after the other, or the verifier would go through all combinations of what they say.
	 */
	key = splice->way[PF_UP].from;
	busy = look(skb, &key, family, &client);
	if (!busy)
		busy = look_beyond(skb, &key, family);
	if (!busy) {
		key = splice->way[PF_DOWN].from;
		busy = look(skb, &key, family, &server);
	}
	if (!busy)
		busy = look_beyond(skb, &key, family);
	if (busy)
		return (int)busy;
	if (is_coarse(&splice->way[PF_UP], &client) || is_coarse(&splice->way[PF_DOWN], &server))
		return PF_BUSY_COARSE;
	/* What one of them says by these bits the other would take for something else. */
	if ((client.ecn | server.ecn) & ACCURATE_ECN)
		splice->way[PF_UP].no_ecn = splice->way[PF_DOWN].no_ecn = 1;
	/* So far, and not further, until it is known how far that is. */
	prepare(&splice->way[PF_UP], &client);
	prepare(&splice->way[PF_DOWN], &server);
	*(volatile __u32 *)&splice->state = PF_SPLICE_BEGINNING;
	/* The look must not come before that: a full barrier. */
	__sync_fetch_and_add(&splice->tries, 1);
	/*
	 * The clock, too, is read after that: a worker that finds it neither BEGINNING nor ACTIVE
	 * once the moment has passed knows that it will not begin.
	 */
	busy = bpf_ktime_get_ns() > until_ns ? PF_BUSY_LATE : 0;
	key = splice->way[PF_UP].from;
	if (!busy)
		busy = look(skb, &key, family, &client);
	if (!busy) {
		key = splice->way[PF_DOWN].from;
		busy = look(skb, &key, family, &server);
	}
	if (busy) {
		*(volatile __u32 *)&splice->state = PF_SPLICE_ARMED;
		return (int)busy;
	}
	/* What userspace will have written when it has read and written all that had come. */
	up_tail = server.write_seq + splice->way[PF_UP].pending + client.unread;
	down_tail = client.write_seq + splice->way[PF_DOWN].pending + server.unread;
	up = up_tail - client.rcv_nxt;
	down = down_tail - server.rcv_nxt;
	/* One more than the clock's last reading: the socket may have spoken since. */
	server_time = splice->server_clock + 1 - client.ts_recent;
	client_time = splice->client_clock + 1 - server.ts_recent;
	splice->way[PF_UP].seq_delta = up;
	splice->way[PF_UP].ack_delta = -down;
	splice->way[PF_UP].tsval_delta = server_time;
	splice->way[PF_UP].tsecr_delta = -client_time;
	begin(&splice->way[PF_UP], &client, &server, down_tail);
	splice->way[PF_DOWN].seq_delta = down;
	splice->way[PF_DOWN].ack_delta = -up;
	splice->way[PF_DOWN].tsval_delta = client_time;
	splice->way[PF_DOWN].tsecr_delta = -server_time;
	begin(&splice->way[PF_DOWN], &server, &client, up_tail);
	__sync_fetch_and_add(&splice->tries, 1);
	*(volatile __u32 *)&splice->state = PF_SPLICE_ACTIVE;
	return 0;
}

int find_session(struct __sk_buff *skb)
{
	return find_session_sockets(skb);
}
