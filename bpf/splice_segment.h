/*
 * What a packet of a pair says, and to whom: a SYN is for our own socket, a reset and a segment are
 * judged, remembered, and for the other end (GO_ON), for our socket (NEXT) or for nobody (DROP).
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "maps.h"
#include "splice.h"
#include "splice_arrival.h"
#include "splice_errors.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_tail.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define HEARD_TICK_BITS 6 /* of jiffies: 0.6 s where there are 100 of them in a second */

/* For so long a client's first bytes are thought to be under way again. */
#define UNHEARD_S 4

/*
 * A SYN, never from end to end. NEXT: our socket, or a listener, answers it. DROP: nobody does.
 */
inlined int take_syn(struct __sk_buff *skb, const struct packet *packet, struct splice_key *from,
		     const int v6)
{
	struct splice_direction *way = packet->way;

	if (packet->flags & (FIN | RST)) {
		/* Our socket would take one with both for a reset (RFC 9293, 3.10.7.4). */
		count_invalid(packet->splice, PF_INVALID_FLAGS);
		return DROP;
	}
	/* The end of this pair is past, and its ports serve again. */
	if (way->fin_acked && packet->back->fin_acked) {
		forget(packet->splice);
		return NEXT;
	}
	if (packet->state == PF_SPLICE_RESET) {
		/* The other end may have to be reset still. */
		map_delete(MAP_FLOWS_FD, from);
		return NEXT;
	}
	/*
	 * The last packet of the handshake was lost, and the server has no connection yet: our
	 * socket must answer again. Nobody else could, as until then the server takes only what
	 * echoes the timestamp of its SYN-ACK. Or this peer has started anew, and gets a challenge.
	 */
	if (!(packet->flags & ACK))
		count_invalid(packet->splice, PF_INVALID_SYN);
	if (!has_socket(skb, from, v6))
		return DROP; /* it will be there when this is sent again */
	way->answer = PF_ANSWER;
	return NEXT;
}

#ifdef MAP_EXPRESS_PROGRAMS_FD
/*
 * Whether a server that says of a packet that there is no such connection (a reset without an
 * acknowledgement) may have one as soon as the first bytes come. With SYN cookies it has none
 * before: were those bytes lost, it says so of what came behind them. As long as it has
 * acknowledged nothing they come again.
 */
inlined int may_know_later(const struct splice *splice, const struct splice_direction *way)
{
	return splice->id >> PF_EXPRESS_ID_BIT &&
	       (__u32)volatile_read(way->last_ack) == way->tail &&
	       (__u32)(bpf_ktime_get_ns() / NS_PER_S) - way->heard_s < UNHEARD_S;
}
#endif

/* A reset. GO_ON: it is believed. NEXT: our socket challenges its sender. */
inlined int take_reset(struct __sk_buff *skb, struct packet *packet, const struct splice_key *from,
		       const int v6)
{
	struct splice_direction *way = packet->way, *back = packet->back;
	struct splice *splice = packet->splice;

#ifdef MAP_EXPRESS_PROGRAMS_FD
	/* Our own (express_join.h), which has lost its mark. */
	if (bpf_ntohs(packet->tcp->window) == FOR_OUR_STACK >> 16 &&
	    bpf_ntohs(packet->tcp->urgent) == (FOR_OUR_STACK & 0xffff))
		return NEXT;
#endif
	if (packet->state == PF_SPLICE_RESET)
		return DROP; /* so is this pair */
	if (!is_exact_reset(packet->seq, way, back)) {
		count_invalid(splice, PF_INVALID_RESET);
		if (after(packet->seq, (__u32)volatile_read(way->limit)) ||
		    before(packet->seq, expected_of(way, back) - way->reach))
			return DROP;
		return challenge(skb, way, packet->direction, from, v6);
	}
#ifdef MAP_EXPRESS_PROGRAMS_FD
	if (packet->direction == PF_DOWN && !(packet->flags & ACK) && may_know_later(splice, way)) {
		count_invalid(splice, PF_INVALID_RESET);
		return DROP;
	}
#endif
	if (!splice->reset) {
		splice->reset = 1 + packet->direction;
		tell(splice, packet->index);
	}
	/*
	 * The worker has our sockets reset both ends, also if this packet is lost. A peer that has
	 * still to get a byte of the tail expects another number: it would answer with a challenge
	 * (RFC 5961), which nobody could take up, and then no other for half a second: also not the
	 * RST with the right number, which is our socket's.
	 */
	if (volatile_read(back->tail_open))
		return DROP;
	packet->acknowledged = packet->ack;
	packet->is_pure_ack = 0;
	return GO_ON;
}

/* What there is to believe or not. */
inlined void read_segment(const struct packet *packet, struct segment *segment)
{
	const __u32 *word = (__u32 *)packet->tcp;

	segment->seq = packet->seq;
	segment->end = packet->seq + packet->bytes + (packet->flags & FIN);
	segment->ack = packet->ack;
	segment->flags = packet->flags;
	if (packet->header >= 32 && (void *)(word + 8) <= packet->data_end &&
	    word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		segment->has_timestamp = 1;
		segment->tsval = bpf_ntohl(word[6]);
	}
}

/* This peer is there: it has sent what is believed. */
inlined void note_heard(struct splice_direction *way)
{
	__u32 tick = (__u32)(bpf_jiffies64() >> HEARD_TICK_BITS);

	if (way->heard_tick != tick) {
		way->heard_tick = tick;
		way->heard_s = (__u32)(bpf_ktime_get_ns() / NS_PER_S);
	}
}

/* Count bytes that have come before. DROP: nothing is missing any more. */
inlined int count_again(const struct packet *packet)
{
	struct splice_direction *way = packet->way;

	__sync_fetch_and_add(&way->again, packet->bytes);
	if (has_too_much_again(way)) {
		if (way->fin_acked && packet->back->fin_acked) {
			count_invalid(packet->splice, PF_INVALID_SEQUENCE);
			return DROP;
		}
		show_bytes(packet->splice, way, packet->direction);
	}
	return GO_ON;
}

/*
 * What the packet says of the tail that our socket sends to this peer: how much of what is
 * acknowledged the other end is told. 1: our socket is to have a copy. `ring`: and the worker
 * is to know.
 */
inlined int split_acknowledgement(struct packet *packet, __u32 edge, int verdict, int *ring)
{
	struct splice_direction *way = packet->way;
	__u32 ack = packet->ack;

	packet->acknowledged = ack;
	if (way->tail_open && before(ack, way->tail)) {
		/* The rest is acknowledged by us, as it was before. */
		packet->acknowledged = way->tail;
		/* Told twice, our socket would take it for a sign of loss. */
		return verdict == PF_VALID &&
		       (edge != way->edge || after(ack, (__u32)way->last_ack) ||
			packet->header > 32);
	}
	if (way->tail_open && verdict == PF_VALID) {
		way->tail_open = 0;
		*ring = 1;
		return 1;
	}
	if (volatile_read(way->deaf) && verdict == PF_VALID) {
		/* Our socket sends the tail again: what told it that it has come was lost. */
		way->deaf = 0;
		return 1;
	}
	return 0;
}

/* Remember an acknowledgement; 1: the worker is to know what it says of the other end's FIN. */
inlined int note_acknowledgement(const struct packet *packet)
{
	struct splice_direction *way = packet->way, *back = packet->back;
	int ring;

	if (!after(packet->ack, (__u32)volatile_read(way->last_ack)))
		return 0;
	advance(&way->last_ack, packet->ack);
	ring = take_acknowledgement(back, packet->ack + way->ack_delta);
	show_bytes(packet->splice, back, 1 - packet->direction);
	return ring;
}

/* A segment that acknowledges. GO_ON: it is believed, and for the other end. */
inlined int take_segment(struct __sk_buff *skb, struct packet *packet, const int v6)
{
	struct splice_direction *way = packet->way, *back = packet->back;
	struct splice *splice = packet->splice;
	struct segment segment = {};
	__u32 window, edge;
	int verdict, ring = 0, is_for_both;

	if (!(packet->flags & ACK)) {
		count_invalid(splice, PF_INVALID_FLAGS);
		return DROP;
	}
	read_segment(packet, &segment);
	verdict = judge(&segment, way, back);
	if (verdict >= PF_INVALID) {
		count_invalid(splice, verdict - PF_INVALID);
		return DROP;
	}
	if (packet->state == PF_SPLICE_RESET) {
		/*
		 * Nothing that our sockets would answer is right any more. But their RST must have
		 * the number that the peer expects: it ignores an older one.
		 */
		if (verdict == PF_VALID)
			advance(&way->last_ack, packet->ack);
		return DROP;
	}
	if (is_too_long(skb, splice, packet->index, way, packet->seq, packet->header, packet->total,
			v6))
		return DROP; /* and the worker tells this peer (ICMP) */

	/* It is believed from here on. */
	verdict = forgotten(verdict);
	note_heard(way);
	if (packet->bytes &&
	    (verdict == PF_OLD || !after(segment.end, (__u32)volatile_read(way->last_end))) &&
	    count_again(packet) == DROP)
		return DROP;
	packet->is_pure_ack = forgotten(!packet->bytes && !(packet->flags & FIN));
	window = (__u32)bpf_ntohs(packet->tcp->window) << (way->shift_left & 15);
	edge = packet->ack + window;
	is_for_both = split_acknowledgement(packet, edge, verdict, &ring);
	is_for_both = forgotten(is_for_both);
	ring = forgotten(ring);
	if (verdict == PF_VALID && !before(packet->ack, (__u32)volatile_read(way->last_ack))) {
		way->edge = edge;
		advance(&back->limit, edge + way->ack_delta);
		if (window > back->reach)
			back->reach = window;
	}
	if (volatile_read(back->tail_open) && before(packet->seq, way->begin)) {
		/*
		 * Bytes of before the beginning, again, or a probe: our socket has these bytes, and
		 * says so. The other end may have none of them yet, nor our own words (a PROXY
		 * header) in front of them, whose numbers they would get there. But it may be the
		 * only packet that acknowledges the other end's FIN.
		 */
		ring |= note_acknowledgement(packet);
		way->answer = PF_ANSWER;
		if (ring)
			tell(splice, packet->index);
		return give_to_our_socket(skb, way, packet->header, packet->bytes, 1, v6);
	}
	if (packet->acknowledged != packet->ack && packet->is_pure_ack &&
	    !before(packet->seq, (__u32)volatile_read(way->last_end))) {
		/* Nothing else is in it: the other end would take it for a sign of loss. */
		advance(&way->last_ack, packet->ack);
		return give_to_our_socket(skb, way, packet->header, 0, 0, v6);
	}
	/*
	 * If our socket cannot be told that the tail has come, it sends it again, and `egress` sees
	 * that it is deaf.
	 */
	if (is_for_both)
		copy_to_our_socket(skb, packet->hops, v6);
	if (verdict == PF_VALID) {
		if (!packet->is_pure_ack)
			__sync_fetch_and_add(&way->packets, 1);
		ring = forgotten(ring | take_in(&segment, way, back));
		show_bytes(splice, way, packet->direction);
		ring = forgotten(ring | note_acknowledgement(packet));
	}
	if (ring)
		tell(splice, packet->index);
	return GO_ON;
}
