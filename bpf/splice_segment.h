/*
 * Segments of a pair. A SYN is for our own socket. A reset and any other segment are checked and
 * recorded; they are for the other end (CONTINUE), for our socket (NEXT), or invalid (DROP).
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

/* For so long a client may still be retransmitting its first bytes. */
#define FIRST_BYTES_RESENT_FOR_S 4

/*
 * Handle a SYN, which never passes to the other end. Returns NEXT: our socket, or a listener,
 * answers it. DROP: it is not answered.
 */
inlined int handle_syn(struct __sk_buff *skb, const struct packet *packet, struct splice_key *from,
		       const int v6)
{
	struct splice_direction *from_peer = packet->from_peer;

	if (packet->flags & (FIN | RST)) {
		/* Our socket would take a SYN with RST for a reset (RFC 9293, 3.10.7.4). */
		count_invalid(packet->splice, PF_INVALID_FLAGS);
		return DROP;
	}
	/* This pair has ended, and its ports are used for a new connection. */
	if (from_peer->fin_acked && packet->to_peer->fin_acked) {
		delete_flows(packet->splice);
		return NEXT;
	}
	if (packet->state == PF_SPLICE_RESET) {
		/* The other end may still have to be reset: delete only this end's flow. */
		map_delete(MAP_FLOWS_FD, from);
		return NEXT;
	}
	/*
	 * Either the last packet of the handshake was lost, and the server has no connection yet:
	 * our socket must answer its SYN-ACK again. The other end cannot, as the server accepts
	 * only a packet that echoes the timestamp of its SYN-ACK. Or this peer has started anew,
	 * and gets a challenge from our socket.
	 */
	if (!(packet->flags & ACK))
		count_invalid(packet->splice, PF_INVALID_SYN);
	if (!has_own_socket(skb, from, v6))
		return DROP; /* our socket will exist when the peer repeats this */
	from_peer->answer = PF_ANSWER;
	return NEXT;
}

/*
 * Whether a server that answers a packet with a reset without ACK (no such connection) may still
 * get this connection from the client's first bytes. With SYN cookies a server has no connection
 * before these bytes arrive: if they were lost, it resets what came behind them. As long as the
 * server has acknowledged nothing, the client repeats them.
 */
inlined int may_accept_later(const struct splice *splice, const struct splice_direction *from_peer)
{
	return splice->id >> PF_EXPRESS_ID_BIT &&
	       (__u32)READ_ONCE(from_peer->last_ack) == from_peer->tail_end &&
	       (__u32)(bpf_ktime_get_ns() / NS_PER_S) - from_peer->last_received_s <
		       FIRST_BYTES_RESENT_FOR_S;
}

/*
 * Handle a reset. Returns CONTINUE: it is valid, and forwarded. NEXT: our socket challenges its
 * sender. DROP: it is invalid, or must not reach the other end.
 */
inlined int handle_reset(struct __sk_buff *skb, struct packet *packet,
			 const struct splice_key *from, const int v6)
{
	struct splice_direction *from_peer = packet->from_peer, *to_peer = packet->to_peer;
	struct splice *splice = packet->splice;

	/* Our own reset for the stack (express_join.h), which has lost its mark. */
	if (HAS_EXPRESS && bpf_ntohs(packet->tcp->window) == FOR_OUR_STACK >> 16 &&
	    bpf_ntohs(packet->tcp->urgent) == (FOR_OUR_STACK & 0xffff))
		return NEXT;
	if (packet->state == PF_SPLICE_RESET)
		return DROP; /* this pair is reset already */
	if (!is_reset_seq_exact(packet->seq, from_peer, to_peer)) {
		count_invalid(splice, PF_INVALID_RESET);
		if (after(packet->seq, (__u32)READ_ONCE(from_peer->max_edge)) ||
		    before(packet->seq, expected_seq(from_peer, to_peer) - from_peer->max_window))
			return DROP;
		return challenge(skb, from_peer, packet->direction, from, v6);
	}
	if (HAS_EXPRESS && packet->direction == PF_DOWN && !(packet->flags & ACK) &&
	    may_accept_later(splice, from_peer)) {
		count_invalid(splice, PF_INVALID_RESET);
		return DROP;
	}
	if (!splice->reset) {
		splice->reset = 1 + packet->direction;
		notify_worker(splice, packet->index);
	}
	/*
	 * The worker resets both ends by our sockets, even if this packet is lost. A peer that has
	 * not received the whole tail expects another number: it would answer this reset with a
	 * challenge (RFC 5961), which no one could answer, and then send no other challenge for
	 * half a second: not even for the RST with the right number, which comes from our socket.
	 */
	if (READ_ONCE(to_peer->tail_open))
		return DROP;
	packet->acknowledged = packet->ack;
	packet->is_pure_ack = 0;
	return CONTINUE;
}

/* Collect what check_segment() looks at. */
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

/* Record when the last valid packet of this peer has come. */
inlined void note_last_received(struct splice_direction *from_peer)
{
	__u32 tick = current_tick();

	if (from_peer->last_received_tick != tick) {
		from_peer->last_received_tick = tick;
		from_peer->last_received_s = (__u32)(bpf_ktime_get_ns() / NS_PER_S);
	}
}

/*
 * Count repeated bytes. Returns CONTINUE; DROP if there are more than can have been lost, and both
 * ends have acknowledged everything.
 */
inlined int count_repeated(const struct packet *packet)
{
	struct splice_direction *from_peer = packet->from_peer;

	__sync_fetch_and_add(&from_peer->repeated_bytes, packet->bytes);
	if (has_excess_repeats(from_peer)) {
		if (from_peer->fin_acked && packet->to_peer->fin_acked) {
			count_invalid(packet->splice, PF_INVALID_SEQUENCE);
			return DROP;
		}
		publish_bytes(packet->splice, from_peer, packet->direction);
	}
	return CONTINUE;
}

/*
 * Split the acknowledgement between our socket (the tail) and the other end: sets how much the
 * other end gets. `ring` is set if the worker must be notified.
 *
 * Returns 1 if our socket gets a copy of the packet.
 */
inlined int split_acknowledgement(struct packet *packet, __u32 edge, int checked, int *ring)
{
	struct splice_direction *from_peer = packet->from_peer;
	__u32 ack = packet->ack;

	packet->acknowledged = ack;
	if (from_peer->tail_open && before(ack, from_peer->tail_end)) {
		/*
		 * The bytes up to the tail's end were acknowledged to the other end by our socket.
		 */
		packet->acknowledged = from_peer->tail_end;
		/* No copy of a duplicate: our socket would take it for a sign of loss. */
		return checked == SEGMENT_VALID &&
		       (edge != from_peer->window_edge || after(ack, (__u32)from_peer->last_ack) ||
			packet->header > 32);
	}
	if (from_peer->tail_open && checked == SEGMENT_VALID) {
		from_peer->tail_open = 0;
		*ring = 1;
		return 1;
	}
	if (READ_ONCE(from_peer->missed_ack) && checked == SEGMENT_VALID) {
		/* Our socket retransmits the tail: the acknowledgement for it was lost. */
		from_peer->missed_ack = 0;
		return 1;
	}
	return 0;
}

/*
 * Record an acknowledgement. Returns 1 if the worker must be notified of what it means for the
 * other end's FIN.
 */
inlined int note_acknowledgement(const struct packet *packet)
{
	struct splice_direction *from_peer = packet->from_peer, *to_peer = packet->to_peer;
	int ring;

	if (!after(packet->ack, (__u32)READ_ONCE(from_peer->last_ack)))
		return 0;
	advance(&from_peer->last_ack, packet->ack);
	ring = record_acknowledgement(to_peer, packet->ack + from_peer->ack_delta);
	publish_bytes(packet->splice, to_peer, 1 - packet->direction);
	return ring;
}

/*
 * Handle a segment that is neither SYN nor RST. Returns CONTINUE: it is valid, and for the other
 * end. NEXT: it is for our socket. DROP: it is invalid, too long for the next interface, or the
 * pair is reset.
 */
inlined int handle_segment(struct __sk_buff *skb, struct packet *packet, const int v6)
{
	struct splice_direction *from_peer = packet->from_peer, *to_peer = packet->to_peer;
	struct splice *splice = packet->splice;
	struct segment segment = {};
	__u32 window, edge;
	int checked, ring = 0, copy_to_own;

	if (!(packet->flags & ACK)) {
		count_invalid(splice, PF_INVALID_FLAGS);
		return DROP;
	}
	read_segment(packet, &segment);
	checked = check_segment(&segment, from_peer, to_peer);
	if (checked >= SEGMENT_INVALID) {
		count_invalid(splice, checked - SEGMENT_INVALID);
		return DROP;
	}
	if (packet->state == PF_SPLICE_RESET) {
		/*
		 * Our sockets' answers would have old numbers. But record the acknowledgement:
		 * their RST must have the number that the peer expects, since it ignores an older
		 * one.
		 */
		if (checked == SEGMENT_VALID)
			advance(&from_peer->last_ack, packet->ack);
		return DROP;
	}
	if (exceeds_mtu(skb, splice, packet->index, from_peer, packet->seq, packet->header,
			packet->total, v6))
		return DROP; /* the keeper reports it to this peer (ICMP) */

	/* The segment is valid from here on. */
	checked = unknown_to_verifier(checked);
	note_last_received(from_peer);
	if (packet->bytes &&
	    (checked == SEGMENT_OLD ||
	     !after(segment.end, (__u32)READ_ONCE(from_peer->last_end))) &&
	    count_repeated(packet) == DROP)
		return DROP;
	packet->is_pure_ack = unknown_to_verifier(!packet->bytes && !(packet->flags & FIN));
	window = (__u32)bpf_ntohs(packet->tcp->window) << (from_peer->peer_scale & 15);
	edge = packet->ack + window;
	copy_to_own = split_acknowledgement(packet, edge, checked, &ring);
	copy_to_own = unknown_to_verifier(copy_to_own);
	ring = unknown_to_verifier(ring);
	if (checked == SEGMENT_VALID &&
	    !before(packet->ack, (__u32)READ_ONCE(from_peer->last_ack))) {
		from_peer->window_edge = edge;
		advance(&to_peer->max_edge, edge + from_peer->ack_delta);
		if (window > to_peer->max_window)
			to_peer->max_window = window;
	}
	if (READ_ONCE(to_peer->tail_open) && before(packet->seq, from_peer->begin_seq)) {
		/*
		 * Bytes from before the beginning that are repeated, or a window probe: our socket
		 * has these bytes, and acknowledges them. The other end may not have received them
		 * yet, nor the bytes that we send in front of them (a PROXY header), whose numbers
		 * they would get there. But this may be the only packet that acknowledges the other
		 * end's FIN.
		 */
		ring |= note_acknowledgement(packet);
		from_peer->answer = PF_ANSWER;
		if (ring)
			notify_worker(splice, packet->index);
		return pass_to_own_socket(skb, from_peer, packet->header, packet->bytes, 1, v6);
	}
	if (packet->acknowledged != packet->ack && packet->is_pure_ack &&
	    !before(packet->seq, (__u32)READ_ONCE(from_peer->last_end))) {
		/*
		 * It acknowledges a part of the tail, and nothing else: the other end would take it
		 * for a duplicate acknowledgement, a sign of loss.
		 */
		advance(&from_peer->last_ack, packet->ack);
		return pass_to_own_socket(skb, from_peer, packet->header, 0, 0, v6);
	}
	/*
	 * If the copy is lost, our socket retransmits the tail, and `egress` sees that it missed
	 * the acknowledgement.
	 */
	if (copy_to_own)
		copy_to_own_socket(skb, packet->hops, v6);
	if (checked == SEGMENT_VALID) {
		if (!packet->is_pure_ack)
			__sync_fetch_and_add(&from_peer->packets, 1);
		ring = unknown_to_verifier(ring | record_segment(&segment, from_peer, to_peer));
		publish_bytes(splice, from_peer, packet->direction);
		ring = unknown_to_verifier(ring | note_acknowledgement(packet));
	}
	if (ring)
		notify_worker(splice, packet->index);
	return CONTINUE;
}
