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
#include "splice_control.h"
#include "splice_egress.h"
#include "splice_errors.h"
#include "splice_options.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_tail.h"
#include "splice_udp.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define HEARD_TICK_BITS 6 /* of jiffies: 0.6 s where there are 100 of them in a second */

#define VLAN_NUMBER  0xfff /* of a tag */
#define ACCURATE_ECN 0x10  /* of tcp_sock.ecn_flags: AccECN (RFC 9768), on kernels that have it */

#ifdef MAP_EXPRESS_PROGRAMS_FD
static long (*tail_call)(void *context, void *map, __u32 index) = (void *)BPF_FUNC_tail_call;

/* Another program goes on with this packet (express_connect.c); if there is none it returns. */
#define go_on_with_express(skb, place) tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), place)
#else
#define go_on_with_express(skb, place) ((void)0)
#endif

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
	__u32 index, state, total, header, seq, ack, window, change, was, n, edge, acknowledged,
		number, direction, mark, tick;
	__u64 sum = 0;
	__u8 flags;
	int ring = 0, is_pure_ack, is_copy = skb->mark == FOR_OUR_SOCKET, is_for_both = 0,
	    is_piece = 0, verdict, at;

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
#ifdef MAP_EXPRESS_PROGRAMS_FD
		/* Our own (express_connect.c, `join`), which has lost its mark. */
		if (bpf_ntohs(tcp->window) == FOR_OUR_STACK >> 16 &&
		    bpf_ntohs(tcp->urgent) == (FOR_OUR_STACK & 0xffff))
			return NEXT;
#endif
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
		acknowledged = ack;
		is_pure_ack = 0;
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
	is_pure_ack = !n && !(flags & FIN);
	acknowledged = ack;
	window = (__u32)bpf_ntohs(tcp->window) << (way->shift_left & 15);
	edge = ack + window;
	if (way->tail_open && before(ack, way->tail)) {
		/* The rest is acknowledged by us, as it was before. */
		acknowledged = way->tail;
		/* Told twice, our socket would take it for a sign of loss. */
		is_for_both =
			verdict == PF_VALID &&
			(edge != way->edge || after(ack, (__u32)way->last_ack) || header > 32);
	} else if (way->tail_open && verdict == PF_VALID) {
		way->tail_open = 0;
		ring = is_for_both = 1;
	} else if (volatile_read(way->deaf) && verdict == PF_VALID) {
		/* Our socket sends the tail again: what told it that it has come was lost. */
		way->deaf = 0;
		is_for_both = 1;
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
	if (acknowledged != ack && is_pure_ack &&
	    !before(seq, (__u32)volatile_read(way->last_end))) {
		/* Nothing else is in it: the other end would take it for a sign of loss. */
		advance(&way->last_ack, ack);
		return give_to_our_socket(skb, way, header, 0, 0, v6);
	}
	if (is_for_both) {
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
		if (!is_pure_ack)
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
	if (is_pure_ack && volatile_read(back->tail_open) && after(number, back->edge))
		number = back->edge;
	put(&word[1], bpf_htonl(number), &sum);
	if (flags & ACK)
		put(&word[2], bpf_htonl(acknowledged + way->ack_delta), &sum);
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
	window = acknowledged - ack < window ? window - (acknowledged - ack) : 0;
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

int egress(struct __sk_buff *skb)
{
	/* Forwarded, ours or another's: not from a socket of this host. */
	if (skb->ingress_ifindex)
		return NEXT;
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		note_leaving(skb, 0);
		return silence(skb, 0);
	}
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6)) {
		note_leaving(skb, 1);
		return silence(skb, 1);
	}
	return NEXT;
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
