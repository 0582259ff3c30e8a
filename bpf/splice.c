/*
 * The splice datapath (sched_cls at tcx, on both sides of every interface): packets of a joined
 * pair get the addresses, ports, sequence and acknowledgement numbers, timestamps and windows of
 * the other connection, and go on. The two ends talk TCP end to end; nothing is buffered here,
 * nothing acknowledged and nothing resent. ../README.md tells how a pair gets here.
 *
 * ingress  what the two peers send to us, and what routers say of it (ICMP)
 * egress   what our own two sockets of a pair send: nothing any more
 * probe    run by the keeper (BPF_PROG_TEST_RUN): by which interfaces our sockets reach the peers,
 *	    and whether they have been told by now that all they had sent has come
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
#include "maps.h"
#include "splice.h"

#define NEXT -1 /* TCX_NEXT: whatever else looks at packets here, then the stack */
#define DROP 2	/* TCX_DROP */

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd

/* Where things are. `v6` is a constant wherever these are used: every function has two forms. */
#define ETHERNET_BYTES	  14
#define IP_BYTES(v6)	  ((v6) ? 40 : 20)
#define TCP_AT(v6)	  (ETHERNET_BYTES + IP_BYTES(v6))
#define OPTIONS_AT(v6)	  (TCP_AT(v6) + 20)
#define HEADERS_BYTES(v6) OPTIONS_AT(v6)

#define PROTOCOL_ICMP	1
#define PROTOCOL_TCP	6
#define PROTOCOL_ICMPV6 58

/* On the copy of a packet that is for our own socket: it has been looked at already. */
#define FOR_OUR_SOCKET 0x5046

/* What is sent on begins a new life: the peer has not reckoned with the way behind us. */
#define HOPS 64

/* How far behind the last acknowledgement a reset is believed: more than any window in use. */
#define RESET_REACH (1 << 26)

#define FIN 0x01
#define SYN 0x02
#define RST 0x04
#define ACK 0x10
#define URG 0x20

#define ECN_OF_TOS 3	      /* of the second byte of IPv4 */
#define ECN_OF_V6  0x00300000 /* of the first word of IPv6 */
#define ECN_OF_TCP 0x01c00000 /* AE, CWR and ECE, of the fourth word of TCP */
#define FIN_OF_TCP 0x00010000
#define URG_OF_TCP 0x00200000

#define NO_OP_WORD     0x01010101
#define TIMESTAMP_WORD 0x0101080a /* no-op, no-op, kind 8, 10 bytes: as everybody writes it */
#define SACK_WORD      0x01010500 /* no-op, no-op, kind 5, and the length in the last byte */

#define F_PSEUDO BPF_F_PSEUDO_HDR
#define F_IPV6	 (1 << 7) /* BPF_F_IPV6: newer than some kernels, and than bcc's header */

struct ipv4 {
	__u8 version, tos;
	__be16 total_bytes, id, fragment;
	__u8 ttl, protocol;
	__u16 checksum;
	__be32 source, target;
};

struct ipv6 {
	__be32 version;
	__be16 payload_bytes;
	__u8 next, hops;
	__be32 source[4], target[4];
};

struct tcp {
	__be16 sport, dport;
	__be32 seq, ack;
	__u8 offset, flags;
	__be16 window;
	__u16 checksum;
	__be16 urgent;
};

struct icmp {
	__u8 type, code;
	__u16 checksum;
	__be32 rest;
};

/* bcc 0.26 declares it with three parameters; the kernel has four. */
static int (*redirect_neigh)(__u32 interface, void *next_hop, int bytes,
			     __u64 flags) = (void *)BPF_FUNC_redirect_neigh;

#define volatile_read(field) (*(volatile typeof(field) *)&(field))
#define inlined		     static inline __attribute__((always_inline))

/* Of two sequence numbers, as TCP compares them. */
#define before(one, other) ((__s32)((one) - (other)) < 0)
#define after(one, other)  ((__s32)((one) - (other)) > 0)

inlined __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (__u16)sum;
}

inlined void tell(struct splice *splice, __u32 index)
{
	struct splice_event event = { .index = index, .worker = splice->worker, .id = splice->id };
	__u32 worker = splice->worker;
	void *ring = map_lookup(MAP_RINGS_FD, &worker);

	if (ring)
		bpf_ringbuf_output(ring, &event, sizeof(event), 0);
}

/* Move a number in the packet on, and keep count of what that does to the checksum. */
inlined void shift(__be32 *field, __u32 delta, __u64 *sum)
{
	__u32 before = *field, after = bpf_htonl(bpf_ntohl(before) + delta);

	*sum += (__u32)~before;
	*sum += after;
	*field = after;
}

/* Put another number in its place, likewise. */
inlined void put(__be32 *field, __u32 after, __u64 *sum)
{
	*sum += (__u32) ~*field;
	*sum += after;
	*field = after;
}

/* How many edges a selective acknowledgement at this place has; negative: it is something else. */
inlined int count_edges(__be32 *option, void *data_end, __u32 bytes)
{
	__u32 size;

	if ((void *)(option + 1) > data_end)
		return -1;
	size = bpf_ntohl(option[0]) - SACK_WORD;
	/* Two bytes of kind and length, and at most four blocks of two edges. */
	if (size < 2 || size > 34 || size + 2 > bytes)
		return -1;
	return (int)(size - 2) / 4;
}

/* The edges of a selective acknowledgement at a place in the header that the compiler knows. */
inlined int shift_edges(__be32 *option, void *data_end, __u32 bytes, __u32 delta, __u64 *sum)
{
	int i, edges = count_edges(option, data_end, bytes);

	if (edges < 0)
		return -1;
#pragma unroll
	for (i = 0; i < 8; i++) {
		if (i < edges) {
			if ((void *)(option + i + 2) > data_end)
				return -1;
			shift(&option[i + 1], delta, sum);
		}
	}
	return 0;
}

/*
 * The timestamp of a packet to a peer that two clocks speak to, ours and the other end's, until it
 * has the tail: none may be older than one that was sent before, or it would be thrown away (PAWS,
 * RFC 7323).
 */
inlined __u32 stamp(struct splice_direction *peer, __u32 tsval, const int ours)
{
	if (volatile_read(peer->stamped) && before(tsval, peer->stamp))
		return peer->stamp;
	if (volatile_read(peer->tail_open)) {
		peer->stamp = tsval;
		peer->stamped = 1;
	} else if (!ours && peer->stamped) {
		peer->stamped = 0; /* the other end's clock is ahead, and alone from here on */
	}
	return tsval;
}

/*
 * The options as Linux, BSD and Windows write them once a connection stands: timestamps, edges or
 * both, each behind two no-ops. Not 0: they are something else.
 */
inlined int shift_options(__be32 *option, void *data_end, __u32 bytes, struct splice_direction *way,
			  struct splice_direction *back, __u64 *sum)
{
	if (bytes >= 12 && (void *)(option + 3) <= data_end &&
	    option[0] == bpf_htonl(TIMESTAMP_WORD)) {
		put(&option[1], bpf_htonl(stamp(back, bpf_ntohl(option[1]) + way->tsval_delta, 0)),
		    sum);
		if (option[2])
			shift(&option[2], way->tsecr_delta, sum);
		if (bytes == 12)
			return 0;
		return shift_edges(option + 3, data_end, bytes - 12, way->ack_delta, sum);
	}
	return shift_edges(option, data_end, bytes, way->ack_delta, sum);
}

/* What is acknowledged selectively of the tail alone: our socket knows of nothing behind it. */
inlined void clip_edges(__be32 *option, void *data_end, __u32 bytes, __u32 tail, __u64 *sum)
{
	int i, edges = count_edges(option, data_end, bytes);

#pragma unroll
	for (i = 0; i < 8; i++) {
		if (i < edges) {
			if ((void *)(option + i + 2) > data_end)
				return; /* never: the header is in front */
			/* A block that begins behind the tail is empty then, and ignored. */
			if (after(bpf_ntohl(option[i + 1]), tail))
				put(&option[i + 1], bpf_htonl(tail), sum);
		}
	}
}

inlined void forget(struct splice *splice)
{
	struct splice_key key = splice->way[PF_UP].from;

	map_delete(MAP_FLOWS_FD, &key);
	key = splice->way[PF_DOWN].from;
	map_delete(MAP_FLOWS_FD, &key);
}

/* Addresses of a packet as they stand in a key. */
inlined void take_addresses(__u32 *key_source, __u32 *key_target, void *ip, const int v6)
{
	struct ipv4 *four = ip;
	struct ipv6 *six = ip;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			key_source[i] = six->source[i];
			key_target[i] = six->target[i];
		}
		return;
	}
	key_source[0] = key_source[1] = key_target[0] = key_target[1] = 0;
	key_source[2] = key_target[2] = bpf_htonl(0xffff);
	key_source[3] = four->source;
	key_target[3] = four->target;
}

/* And the other way round. */
inlined void give_addresses(void *ip, const __u32 *source, const __u32 *target, const int v6)
{
	struct ipv4 *four = ip;
	struct ipv6 *six = ip;
	int i;

	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			six->source[i] = source[i];
			six->target[i] = target[i];
		}
		return;
	}
	four->source = source[3];
	four->target = target[3];
}

/* Let a checksum in the packet follow changed addresses of the pseudo-header. */
inlined void replace_pseudo(struct __sk_buff *skb, __u32 at, __u16 sum, const int v6)
{
	/* IPv6 has no checksum of its own that would make up for it: newer kernels want to know. */
	if (v6 && !bpf_l4_csum_replace(skb, at, 0, sum, F_PSEUDO | F_IPV6))
		return;
	bpf_l4_csum_replace(skb, at, 0, sum, F_PSEUDO);
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
	__u32 index;
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
	if (volatile_read(way->tail_open) && before(bpf_ntohl(ports[1]), way->tail))
		return NEXT; /* our own socket has sent that */

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
	__u64 sum = 0;

	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was there a moment ago */
	if (!again)
		put(&word[1], bpf_htonl(volatile_read(way->ours) - bytes), &sum);
	if (after(bpf_ntohl(word[2]), way->tail))
		put(&word[2], bpf_htonl(way->tail), &sum);
	put(&word[3], word[3] & ~bpf_htonl(FIN_OF_TCP | URG_OF_TCP), &sum);
	if (header > 32 && (void *)(word + 6) <= data_end && word[5] == bpf_htonl(TIMESTAMP_WORD))
		clip_edges(word + 8, data_end, header - 32, way->tail, &sum);
	else if (header > 20)
		clip_edges(word + 5, data_end, header - 20, way->tail, &sum);
	bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0);
	return NEXT;
}

inlined int translate(struct __sk_buff *skb, const int v6)
{
	void *data, *data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *way, *back;
	struct pair *pair;
	struct verdict_direction *seen;
	struct ipv4 *four;
	struct ipv6 *six;
	struct tcp *tcp;
	__u32 *word;
	__u32 slot, index, state, total, header, seq, ack, end, acked, window, change, was, n, edge,
		floor, number;
	__u64 sum = 0;
	__u64 counted;
	__u8 flags;
	int ring = 0, alone, is_copy = skb->tc_index == FOR_OUR_SOCKET, is_news = 0;

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
		if (four->version != 0x45 || (four->fragment & bpf_htons(0x3fff)))
			return NEXT;
		if (four->protocol == PROTOCOL_ICMP)
			return translate_error(skb, 0);
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
	if (flags & SYN) {
		/*
		 * A connection begins, and its packets come by here under these addresses: that is
		 * what the keeper wants to know of a pair. Behind a NAT rule of this host a socket
		 * has other ones.
		 */
		struct splice_handshake handshake = { .interface = skb->ifindex,
						      .isn = bpf_ntohl(tcp->seq) };

		map_update(MAP_HANDSHAKES_FD, &key, &handshake);
	}
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return is_copy ? DROP : NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice)
		return NEXT;
	way = flow->direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	back = flow->direction == PF_UP ? &splice->way[PF_DOWN] : &splice->way[PF_UP];
	state = volatile_read(splice->state);
	header = (__u32)(tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES(v6) + header)
		return NEXT; /* broken: the stack drops it */
	seq = bpf_ntohl(tcp->seq);
	ack = bpf_ntohl(tcp->ack);
	n = total - IP_BYTES(v6) - header;

	if (state == PF_SPLICE_RESET) {
		/*
		 * Nothing that our sockets would answer is right any more. But their RST must have
		 * the number that the peer expects: it ignores an older one.
		 */
		if ((flags & ACK) && after(ack, way->last_ack))
			way->last_ack = ack;
		return DROP;
	}
	if (state != PF_SPLICE_ACTIVE)
		return is_copy ? DROP : NEXT;
	if (header > 20 && data + TCP_AT(v6) + header > data_end) {
		if (bpf_skb_pull_data(skb, TCP_AT(v6) + header))
			return DROP; /* no memory: as if it had been lost */
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return DROP; /* never: it was there a moment ago */
		tcp = data + TCP_AT(v6);
	}
	if (is_copy) {
		skb->tc_index = 0;
		return give_to_our_socket(skb, way, header, n, 0, v6);
	}

	alone = !n && !(flags & (SYN | FIN | RST));
	floor = ack;
	if ((flags & (SYN | ACK | RST)) == ACK) {
		edge = ack + ((__u32)bpf_ntohs(tcp->window) << (way->shift_left & 15));
		if (way->tail_open && before(ack, way->tail)) {
			/* The rest is acknowledged by us, as it was before. */
			floor = way->tail;
			/* Told twice, our socket would take it for a sign of loss. */
			is_news = edge != way->edge || after(ack, way->last_ack) || header > 32;
		} else if (way->tail_open) {
			way->tail_open = 0;
			ring = is_news = 1;
		}
		way->edge = edge;
	}
	if (volatile_read(back->tail_open) && before(seq, way->begin) && !(flags & (SYN | RST))) {
		/*
		 * Bytes of before the beginning, again, or a probe: our socket has these bytes, and
		 * says so. The other end may have none of them yet, nor our own words (a PROXY
		 * header) in front of them, whose numbers they would get there.
		 */
		if ((flags & ACK) && after(ack, way->last_ack))
			way->last_ack = ack;
		way->answer = 1;
		if (ring)
			tell(splice, index);
		return give_to_our_socket(skb, way, header, n, 1, v6);
	}
	if (floor != ack && alone && !before(seq, way->last_end)) {
		/* Nothing else is in it: the other end would take it for a sign of loss. */
		if (after(ack, way->last_ack))
			way->last_ack = ack;
		return give_to_our_socket(skb, way, header, 0, 0, v6);
	}
	if (is_news) {
		/*
		 * It is for both. If our socket cannot be told that the tail has come, it sends it
		 * until it gives up, and `egress` drops that.
		 */
		skb->tc_index = FOR_OUR_SOCKET;
		bpf_clone_redirect(skb, skb->ifindex, BPF_F_INGRESS);
		skb->tc_index = 0;
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return DROP; /* never: it was there a moment ago */
		tcp = data + TCP_AT(v6);
	}
	if (flags & SYN) {
		if ((way->fin_acked && back->fin_acked) || splice->reset) {
			/* The end of this pair is past, and its ports serve again. */
			forget(splice);
			return NEXT;
		}
		/*
		 * The last packet of the handshake was lost, and the server has no connection yet:
		 * our socket must answer again. Nobody else could: until then the server takes only
		 * what echoes the timestamp of its SYN-ACK.
		 */
		if (flags & ACK)
			return NEXT;
	} else if (header > 20) {
		if (shift_options(data + OPTIONS_AT(v6), data_end, header - 20, way, back, &sum)) {
			/* Such a pair cannot go on: it ends with a reset, unless a stranger
			 * guesses. */
			if (seq - way->last_end < RESET_REACH && !splice->reset) {
				splice->reset = PF_SPLICE_ODD;
				tell(splice, index);
			}
			return DROP;
		}
		data = (void *)(long)skb->data;
		data_end = (void *)(long)skb->data_end;
		if (data + HEADERS_BYTES(v6) > data_end)
			return DROP; /* never: it was there a moment ago */
		tcp = data + TCP_AT(v6);
	}

	/* What the peers have said, for the end of the pair and for a reset of ours. */
	end = seq + n + (flags & FIN);
	acked = ack + way->ack_delta; /* in the numbers of whom it is for */
	if ((flags & ACK) && after(ack, way->last_ack))
		way->last_ack = ack;
	if (after(end, way->last_end))
		way->last_end = end;
	if ((flags & FIN) && !way->fin) {
		way->fin_seq = end;
		__sync_fetch_and_add(&way->fin, 1);
		ring = 1;
	}
	/*
	 * Counted by how far the peer has got, and stored, not added: two processors may be here at
	 * once, and what one of them puts back the next packet puts right. A FIN is no byte.
	 */
	if (n || (flags & FIN)) {
		counted = way->bytes;
		counted += (__s64)(__s32)(end - (flags & FIN) - (way->begin + (__u32)counted));
		if ((__s64)(counted - way->bytes) > 0)
			way->bytes = counted;
		__sync_fetch_and_add(&way->packets, 1);
	}
	slot = splice->slot;
	pair = map_lookup(MAP_PAIRS_FD, &slot);
	/* The pair's record is another's once the worker has let go of this one. */
	if (pair && pair->id == splice->id) {
		seen = flow->direction == PF_UP ? &pair->verdict[PF_UP] : &pair->verdict[PF_DOWN];
		seen->redirected_bytes = way->bytes;
		seen->redirected_packets = way->packets;
		seen->last_ns = bpf_ktime_get_ns();
	}
	if ((flags & ACK) && volatile_read(back->fin) && !back->fin_acked &&
	    !before(acked, back->fin_seq)) {
		back->fin_acked = 1;
		ring = 1;
	}
	/* A reset far from what the other side expects is a stranger's guess: it is judged there.
	 */
	if ((flags & RST) && !splice->reset &&
	    seq + way->seq_delta - back->last_ack < RESET_REACH) {
		splice->reset = 1 + flow->direction;
		ring = 1;
	}
	if ((flags & RST) && volatile_read(back->tail_open)) {
		/*
		 * The other end expects a byte of the tail. It would answer this with a challenge
		 * (RFC 5961), which nobody could take up, and then no other for half a second: also
		 * not the RST with the right number, which is our socket's.
		 */
		if (ring)
			tell(splice, index);
		return DROP;
	}

	word = (__u32 *)tcp;
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
	if (!(flags & SYN)) {
		/* What is left of the window behind the tail. */
		window = (was & 0xffff) << (way->shift_left & 15);
		window = floor - ack < window ? window - (floor - ack) : 0;
		change = (change & 0xffff0000) | window_field(window, way->shift_right);
	}
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
	if (ring)
		tell(splice, index);
	return send_on(way->interface);
}

int ingress(struct __sk_buff *skb)
{
	/* One with a tag is not yet where it belongs: it comes again, by its own interface. */
	if (skb->vlan_present)
		return NEXT;
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4))
		return translate(skb, 0);
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6))
		return translate(skb, 1);
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
	__u32 index, state, header, seq, ack, edge;
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
		/* Whoever could send the tail again has died: this pair cannot go on. */
		*(volatile __u32 *)&splice->state = state = PF_SPLICE_RESET;
	}
	word = (__u32 *)tcp;
	if (state == PF_SPLICE_RESET && (tcp->flags & RST)) {
		/* The socket's numbers are those of the handover: give the peer's own. */
		put(&word[1], bpf_htonl(way->last_ack), &sum);
		if (tcp->flags & ACK)
			put(&word[2], bpf_htonl(way->last_end), &sum);
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
		if ((splice->way[PF_UP].fin_acked && splice->way[PF_DOWN].fin_acked) ||
		    splice->reset) {
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
	if (state == PF_SPLICE_BEGINNING) {
		if (after(ack, way->begin))
			ack = way->begin;
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
			if (!way->answer && way->last_end != way->begin &&
			    !(way->tail_open && before(seq, way->last_ack)))
				return DROP;
			way->answer = 0;
		} else if (!way->tail_open || !before(seq, way->tail)) {
			return DROP; /* it does not know yet that this has come */
		}
		/*
		 * What has come to our socket since is not acknowledged here, the sender must not
		 * forget it: only what went to the other end. And the window is the other end's.
		 */
		ack = volatile_read(back->last_ack) + back->ack_delta;
		if (before(ack, way->begin))
			ack = way->begin;
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
			put(&word[6], bpf_htonl(stamp(way, bpf_ntohl(word[6]), 1)), &sum);
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
	seen->edge = seen->snd_una + read32(tcp, TCP_SOCK_SND_WND);
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
	if (splice->state == PF_SPLICE_ACTIVE && seen->snd_una == way->tail)
		way->tail_open = 0;
}

int probe(struct __sk_buff *skb)
{
	struct splice *splice = asked_for(skb);
	struct splice_look client = {}, server = {};
	struct splice_key key;
	__u32 family;

	if (!splice)
		return PF_BUSY_GONE;
	family = splice->family;
	key = splice->way[PF_UP].from;
	if (!(look(skb, &key, family, &client) & PF_BUSY_GONE))
		settle(splice, &splice->way[PF_UP], &client);
	key = splice->way[PF_DOWN].from;
	if (!(look(skb, &key, family, &server) & PF_BUSY_GONE))
		settle(splice, &splice->way[PF_DOWN], &server);
	splice->out[PF_UP] = client.out;
	splice->out[PF_DOWN] = server.out;
	splice->isn[PF_UP] = client.isn;
	splice->isn[PF_DOWN] = server.isn;
	return 0;
}

/* Where a direction stands as it begins: packets from the one socket's peer, to `tail`. */
inlined void begin(struct splice_direction *way, const struct splice_look *seen, __u32 tail)
{
	way->last_ack = seen->snd_una;
	way->last_end = way->begin = way->ours = seen->rcv_nxt;
	way->edge = seen->edge;
	way->unread = seen->unread;
	way->tail = tail;
	way->tail_open = seen->snd_una != tail;
	way->answer = 0;
	way->stamped = 0;
}

int control(struct __sk_buff *skb)
{
	struct splice *splice = asked_for(skb);
	struct splice_key key;
	struct splice_look client = {}, server = {};
	__u32 family, busy, up, down, up_tail, down_tail, client_time, server_time;

	if (!splice || splice->state != PF_SPLICE_ARMED)
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
	/* So far, and not further, until it is known how far that is. */
	splice->way[PF_UP].begin = client.rcv_nxt;
	splice->way[PF_DOWN].begin = server.rcv_nxt;
	*(volatile __u32 *)&splice->state = PF_SPLICE_BEGINNING;
	/* The look must not come before that: a full barrier. */
	__sync_fetch_and_add(&splice->tries, 1);
	key = splice->way[PF_UP].from;
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
	begin(&splice->way[PF_UP], &client, down_tail);
	splice->way[PF_DOWN].seq_delta = down;
	splice->way[PF_DOWN].ack_delta = -up;
	splice->way[PF_DOWN].tsval_delta = client_time;
	splice->way[PF_DOWN].tsecr_delta = -server_time;
	begin(&splice->way[PF_DOWN], &server, up_tail);
	__sync_fetch_and_add(&splice->tries, 1);
	*(volatile __u32 *)&splice->state = PF_SPLICE_ACTIVE;
	return 0;
}
