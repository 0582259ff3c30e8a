/*
 * What our own two sockets of a spliced pair may still send: segments of the tail, and answers that
 * `ingress` or the keeper has allowed (`answer`).
 */
#pragma once

#include "splice_options.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_ports.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

/* No such interface: the packet is dropped, but the sender gets no error. */
#define NOWHERE 0

/* A segment of our own socket of a pair, as one step hands it to the next. */
struct own_segment {
	struct tcp *tcp;
	void *data_end;
	struct splice *splice;
	struct splice_direction *from_peer; /* the direction of the packets that the socket receives
					     */
	struct splice_direction *to_peer;   /* the other one */
	__u32 index, direction, state;	    /* of the pair's record */
	__u32 header;			    /* bytes of the TCP header, options included */
	__u32 bytes;			    /* bytes of payload */
	__u32 seq, ack;			    /* as the socket has sent them */
	__u64 sum;			    /* changes of fields, for the checksum */
};

/*
 * Find the pair of a segment, and fill in `segment`. `key` gets the addresses of the packets that
 * the socket receives.
 *
 * Returns 1; or 0 if the segment belongs to no spliced pair.
 */
inlined int find_own_pair(struct __sk_buff *skb, struct splice_key *key,
			  struct own_segment *segment, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *iph = data + ETHERNET_BYTES;
	struct ipv6 *ip6h = data + ETHERNET_BYTES;
	struct tcp *tcp = data + TCP_OFFSET(v6);
	struct splice_flow *flow;
	struct splice *splice;

	if (data + HEADERS_BYTES(v6) > data_end)
		return 0; /* a socket's packets have all their headers in the linear part */
	if (v6 ? ip6h->next != PROTOCOL_TCP : iph->version != 0x45 || iph->protocol != PROTOCOL_TCP)
		return 0;
	if (!may_have_flow(tcp->sport))
		return 0;
	read_addresses(key->target, key->source, data + ETHERNET_BYTES, v6);
	key->sport = tcp->dport;
	key->dport = tcp->sport;
	flow = map_lookup(MAP_FLOWS_FD, key);
	if (!flow)
		return 0;
	segment->index = flow->index;
	segment->direction = flow->direction;
	splice = map_lookup(MAP_SPLICES_FD, &segment->index);
	if (!splice)
		return 0;
	segment->state = READ_ONCE(splice->state);
	if (segment->state == PF_SPLICE_FREE || segment->state == PF_SPLICE_ARMED)
		return 0;
	segment->splice = splice;
	segment->from_peer = segment->direction == PF_UP ? &splice->direction[PF_UP]
							 : &splice->direction[PF_DOWN];
	segment->to_peer = segment->direction == PF_UP ? &splice->direction[PF_DOWN]
						       : &splice->direction[PF_UP];
	segment->tcp = tcp;
	segment->data_end = data_end;
	segment->header = (__u32)(tcp->offset >> 4) * 4;
	segment->bytes = skb->len - TCP_OFFSET(v6) - segment->header;
	segment->seq = bpf_ntohl(tcp->seq);
	segment->ack = bpf_ntohl(tcp->ack);
	return 1;
}

/*
 * Handle a segment with SYN, FIN or RST: these pass between the two ends, and our socket sends none
 * but the reset of a pair that is reset.
 *
 * Returns NEXT if it may leave, else DROP.
 */
inlined int filter_own_control(struct __sk_buff *skb, struct splice_key *key,
			       struct own_segment *segment, const int v6)
{
	struct splice_direction *from_peer = segment->from_peer, *to_peer = segment->to_peer;
	struct splice *splice = segment->splice;
	struct tcp *tcp = segment->tcp;
	__u32 *word = (__u32 *)tcp;

	if ((tcp->flags & RST) && segment->state == PF_SPLICE_ACTIVE &&
	    (from_peer->tail_open || to_peer->tail_open)) {
		/*
		 * Only this socket could have retransmitted the tail, and it ends: the pair cannot
		 * go on.
		 */
		segment->state = PF_SPLICE_RESET;
		WRITE_ONCE(splice->state, PF_SPLICE_RESET);
		/*
		 * The RST may come from a firewall rule of this host instead: then the worker
		 * lives, and must learn of it.
		 */
		notify_worker(splice, segment->index);
	}
	if (segment->state == PF_SPLICE_RESET && (tcp->flags & RST)) {
		/*
		 * The socket's numbers are those of the handover. Write those that the peer expects
		 * now.
		 */
		set_field(&word[1], bpf_htonl((__u32)READ_ONCE(from_peer->last_ack)),
			  &segment->sum);
		if (tcp->flags & ACK)
			set_field(&word[2], bpf_htonl((__u32)READ_ONCE(from_peer->last_end)),
				  &segment->sum);
		bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(segment->sum), 0);
		/*
		 * Later segments of this peer go to the stack, which has no such socket and answers
		 * with a RST.
		 */
		map_delete(MAP_FLOWS_FD, key);
		return NEXT;
	}
	if (segment->state == PF_SPLICE_BEGINNING)
		return NEXT; /* sent by the kernel by itself: our worker is waiting for `control` */
	if ((tcp->flags & SYN) && splice->direction[PF_UP].fin_acked &&
	    splice->direction[PF_DOWN].fin_acked) {
		/* A new connection from a port whose previous pair has ended. */
		delete_flows(splice);
		return NEXT;
	}
	return DROP;
}

/*
 * Check a segment of a pair that is ACTIVE, and write the numbers and the window that its peer is
 * to see.
 *
 * Returns NEXT if it may leave, else DROP.
 */
inlined int filter_own_numbers(struct own_segment *segment)
{
	struct splice_direction *from_peer = segment->from_peer, *to_peer = segment->to_peer;
	__u32 *word = (__u32 *)segment->tcp;
	__u32 edge, answer;

	if (after(segment->ack, from_peer->socket_expected_seq))
		from_peer->socket_expected_seq = segment->ack;
	if (!segment->bytes) {
		/*
		 * Empty segments of our socket pass in three cases: as an answer that is allowed;
		 * as a probe of a closed window for which the tail waits; and, as long as the peer
		 * has sent nothing to the other end, to repeat the acknowledgement of what came
		 * before (the last packet of a handshake is such a segment).
		 */
		if (!from_peer->answer && (__u32)from_peer->last_end != from_peer->begin_seq &&
		    !(from_peer->tail_open && before(segment->seq, (__u32)from_peer->last_ack)))
			return DROP;
		answer = READ_ONCE(from_peer->answer);
		from_peer->answer = 0;
		/*
		 * For a probe by the keeper: the number in front of the one that the peer expects,
		 * as in TCP's own keepalives (RFC 9293, 3.8.4). Otherwise, with the tail
		 * acknowledged: the number that the peer expects next, since our socket's own
		 * number may be far behind.
		 */
		if (answer == PF_ANSWER_PROBE)
			set_field(&word[1], bpf_htonl((__u32)READ_ONCE(from_peer->last_ack) - 1),
				  &segment->sum);
		else if (!from_peer->tail_open)
			set_field(
				&word[1],
				bpf_htonl((__u32)READ_ONCE(to_peer->last_end) + to_peer->seq_delta),
				&segment->sum);
	} else if (!before(segment->seq, from_peer->tail_end)) {
		return DROP; /* never: our socket has sent nothing behind the tail */
	} else if (!from_peer->tail_open) {
		/*
		 * The peer has acknowledged the tail, but our socket missed that acknowledgement.
		 * It would retransmit until it gives up, and its port would be free. Let it send:
		 * the peer answers with an acknowledgement, of which `ingress` gives our socket a
		 * copy.
		 */
		from_peer->missed_ack = 1;
	}
	/*
	 * Do not acknowledge what our socket alone has received since the beginning, or its sender
	 * would forget it: acknowledge only what the other end has acknowledged. The window is the
	 * other end's, too.
	 */
	segment->ack = expected_seq(from_peer, to_peer);
	edge = to_peer->window_edge + to_peer->ack_delta;
	edge = after(edge, segment->ack) ? edge - segment->ack : 0;
	set_field(&word[3],
		  (word[3] & ~bpf_htonl(0xffff)) |
			  bpf_htonl(window_field(edge, to_peer->other_scale)),
		  &segment->sum);
	return NEXT;
}

/*
 * Note what a segment says while the pair is BEGINNING, and let it acknowledge nothing behind the
 * beginning.
 *
 * Our socket may still receive a packet that passed `ingress` before the pair was ACTIVE. The
 * sender repeats that packet, to the other end then; but from now on our socket expects the number
 * behind it.
 */
inlined void limit_own_ack(struct own_segment *segment)
{
	struct splice_direction *from_peer = segment->from_peer;
	__u32 window;

	if (after(segment->ack, from_peer->begin_seq))
		segment->ack = from_peer->begin_seq;
	/* This acknowledgement may advertise a window that is larger than any before. */
	window = (__u32)bpf_ntohs(segment->tcp->window) << (segment->to_peer->other_scale & 15);
	advance(&from_peer->max_edge, segment->ack + window);
	if (window > from_peer->max_window)
		from_peer->max_window = window;
}

/*
 * Overwrite the options but for timestamps in their usual place, which get the other end's clock:
 * those behind them (SACK) may acknowledge what our socket alone has received.
 *
 * Returns NEXT; or DROP if they are not in the linear part, which never happens to a socket's
 * packet.
 */
inlined int hide_own_options(struct own_segment *segment)
{
	__u32 *word = (__u32 *)segment->tcp;
	int i, at = 0;

	if (segment->header > 20 && (void *)(word + 7) <= segment->data_end &&
	    word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		at = 3;
		if (segment->state == PF_SPLICE_ACTIVE)
			set_field(&word[6],
				  bpf_htonl(own_tsval(segment->from_peer, segment->to_peer,
						      bpf_ntohl(word[6]))),
				  &segment->sum);
	}
#pragma unroll
	for (i = 0; i < 10; i++) {
		if (i >= at && 20u + 4 * i < segment->header) {
			if ((void *)(word + 6 + i) > segment->data_end)
				return DROP;
			set_field(&word[5 + i], bpf_htonl(NO_OP_WORD), &segment->sum);
		}
	}
	return NEXT;
}

/*
 * Handle a segment that a socket of this host sends.
 *
 * Returns NEXT if it belongs to no spliced pair; or, for our socket of a pair, if the segment may
 * leave: with the acknowledgement and the window of the other end. DROP for all other segments of
 * our sockets.
 */
inlined int filter_own_segment(struct __sk_buff *skb, const int v6)
{
	struct splice_key key = {};
	struct own_segment segment = {};
	struct tcp *tcp;

	if (!find_own_pair(skb, &key, &segment, v6))
		return NEXT;
	tcp = segment.tcp;
	/*
	 * The request_sock of the client's handshake, from which express has kept the client's
	 * first bytes, retransmits its SYN-ACK; that client has received it long ago. While a
	 * server is asked, it also answers a client that starts anew, or whose segment is invalid.
	 *
	 * When such a SYN-ACK cannot be sent, the kernel drops the request (reqsk_timer_handler,
	 * net/ipv4/inet_connection_sock.c). As long as a worker may have to take the connection
	 * over, the kernel must therefore believe that the SYN-ACK was sent. Once the server has
	 * answered, the kernel is to drop the request: the reset with which express tells it so may
	 * have been lost within this host.
	 */
	if ((tcp->flags & SYN) && (tcp->flags & ACK) &&
	    segment.splice->worker == PF_EXPRESS_NO_WORKER)
		return segment.state == PF_SPLICE_ASKED ? bpf_redirect(NOWHERE, 0) : DROP;
	if (segment.state == PF_SPLICE_ASKED) {
		/*
		 * Our stack may have made a socket of the handshake all the same. It sends neither
		 * payload nor a FIN before it is known whether express or a worker has the client
		 * (`join_pair`); it sends them again later.
		 */
		if (segment.direction == PF_UP && ((tcp->flags & FIN) || segment.bytes))
			return DROP;
		return NEXT;
	}
	if (tcp->flags & (SYN | FIN | RST))
		return filter_own_control(skb, &key, &segment, v6);
	if (segment.state == PF_SPLICE_RESET)
		return DROP; /* the pair is reset, and its peer is told so by a RST */
	if (segment.bytes)
		advance(&segment.from_peer->socket_sent_end, segment.seq + segment.bytes);
	if (segment.state == PF_SPLICE_BEGINNING)
		limit_own_ack(&segment);
	else if (filter_own_numbers(&segment) == DROP)
		return DROP;
	set_field((__u32 *)tcp + 2, bpf_htonl(segment.ack), &segment.sum);
	if (hide_own_options(&segment) == DROP)
		return DROP;
	bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(segment.sum), 0);
	return NEXT;
}
