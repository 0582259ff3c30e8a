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

/*
 * Handle a segment that a socket of this host sends.
 *
 * Returns NEXT if it belongs to no spliced pair; or, for our socket of a pair, if the segment may
 * leave: with the acknowledgement and the window of the other end. DROP for all other segments of
 * our sockets.
 */
inlined int filter_own_segment(struct __sk_buff *skb, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct splice_key key = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct splice_direction *from_peer, *to_peer;
	struct ipv4 *iph;
	struct ipv6 *ip6h;
	struct tcp *tcp;
	__u32 *word;
	__u32 index, state, header, seq, ack, edge, window, answer;
	__u64 sum = 0;
	int i, at, is_empty;

	if (data + HEADERS_BYTES(v6) > data_end)
		return NEXT; /* a socket's packets have all their headers in the linear part */
	iph = data + ETHERNET_BYTES;
	ip6h = data + ETHERNET_BYTES;
	if (v6 ? ip6h->next != PROTOCOL_TCP : iph->version != 0x45 || iph->protocol != PROTOCOL_TCP)
		return NEXT;
	tcp = data + TCP_OFFSET(v6);
	if (!may_have_flow(tcp->sport))
		return NEXT;
	read_addresses(key.target, key.source, data + ETHERNET_BYTES, v6);
	key.sport = tcp->dport;
	key.dport = tcp->sport;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!splice)
		return NEXT;
	state = READ_ONCE(splice->state);
	if (state == PF_SPLICE_FREE || state == PF_SPLICE_ARMED)
		return NEXT;
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
	if ((tcp->flags & SYN) && (tcp->flags & ACK) && splice->worker == PF_EXPRESS_NO_WORKER)
		return state == PF_SPLICE_ASKED ? bpf_redirect(NOWHERE, 0) : DROP;
	if (state == PF_SPLICE_ASKED) {
		/*
		 * Our stack may have made a socket of the handshake all the same. It sends neither
		 * payload nor a FIN before it is known whether express or a worker has the client
		 * (`join_pair`); it sends them again later.
		 */
		header = (__u32)(tcp->offset >> 4) * 4;
		if (flow->direction == PF_UP &&
		    ((tcp->flags & FIN) || skb->len > TCP_OFFSET(v6) + header))
			return DROP;
		return NEXT;
	}
	from_peer =
		flow->direction == PF_UP ? &splice->direction[PF_UP] : &splice->direction[PF_DOWN];
	to_peer =
		flow->direction == PF_UP ? &splice->direction[PF_DOWN] : &splice->direction[PF_UP];
	if ((tcp->flags & RST) && state == PF_SPLICE_ACTIVE &&
	    (from_peer->tail_open || to_peer->tail_open)) {
		/*
		 * Only this socket could have retransmitted the tail, and it ends: the pair cannot
		 * go on.
		 */
		state = PF_SPLICE_RESET;
		WRITE_ONCE(splice->state, state);
		/*
		 * The RST may come from a firewall rule of this host instead: then the worker
		 * lives, and must learn of it.
		 */
		notify_worker(splice, index);
	}
	word = (__u32 *)tcp;
	if (state == PF_SPLICE_RESET && (tcp->flags & RST)) {
		/*
		 * The socket's numbers are those of the handover. Write those that the peer expects
		 * now.
		 */
		set_field(&word[1], bpf_htonl((__u32)READ_ONCE(from_peer->last_ack)), &sum);
		if (tcp->flags & ACK)
			set_field(&word[2], bpf_htonl((__u32)READ_ONCE(from_peer->last_end)), &sum);
		bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(sum), 0);
		/*
		 * Later segments of this peer go to the stack, which has no such socket and answers
		 * with a RST.
		 */
		map_delete(MAP_FLOWS_FD, &key);
		return NEXT;
	}
	if (state == PF_SPLICE_BEGINNING && (tcp->flags & (SYN | FIN | RST)))
		return NEXT; /* sent by the kernel by itself: our worker is waiting for `control` */
	if (tcp->flags & SYN) {
		/* A new connection from a port whose previous pair has ended. */
		if (splice->direction[PF_UP].fin_acked && splice->direction[PF_DOWN].fin_acked) {
			delete_flows(splice);
			return NEXT;
		}
	}
	if (state == PF_SPLICE_RESET || (tcp->flags & (SYN | FIN | RST)))
		return DROP; /* SYN, FIN and RST pass between the two ends; our socket sends none */
	/*
	 * Our socket may still receive a packet that passed `ingress` before the pair was ACTIVE.
	 * The sender repeats that packet, to the other end then; but from now on our socket expects
	 * the number behind it.
	 */
	seq = bpf_ntohl(tcp->seq);
	ack = bpf_ntohl(tcp->ack);
	header = (__u32)(tcp->offset >> 4) * 4;
	is_empty = skb->len == TCP_OFFSET(v6) + header;
	if (!is_empty)
		advance(&from_peer->socket_sent_end, seq + skb->len - TCP_OFFSET(v6) - header);
	if (state == PF_SPLICE_BEGINNING) {
		if (after(ack, from_peer->begin_seq))
			ack = from_peer->begin_seq;
		/* This acknowledgement may advertise a window that is larger than any before. */
		window = (__u32)bpf_ntohs(tcp->window) << (to_peer->other_scale & 15);
		advance(&from_peer->max_edge, ack + window);
		if (window > from_peer->max_window)
			from_peer->max_window = window;
	} else {
		if (after(ack, from_peer->socket_expected_seq))
			from_peer->socket_expected_seq = ack;
		if (is_empty) {
			/*
			 * Empty segments of our socket pass in three cases: as an answer that is
			 * allowed; as a probe of a closed window for which the tail waits; and, as
			 * long as the peer has sent nothing to the other end, to repeat the
			 * acknowledgement of what came before (the last packet of a handshake is
			 * such a segment).
			 */
			if (!from_peer->answer &&
			    (__u32)from_peer->last_end != from_peer->begin_seq &&
			    !(from_peer->tail_open && before(seq, (__u32)from_peer->last_ack)))
				return DROP;
			answer = READ_ONCE(from_peer->answer);
			from_peer->answer = 0;
			/*
			 * For a probe by the keeper: the number in front of the one that the peer
			 * expects, as in TCP's own keepalives (RFC 9293, 3.8.4). Otherwise, with
			 * the tail acknowledged: the number that the peer expects next, since our
			 * socket's own number may be far behind.
			 */
			if (answer == PF_ANSWER_PROBE)
				set_field(&word[1],
					  bpf_htonl((__u32)READ_ONCE(from_peer->last_ack) - 1),
					  &sum);
			else if (!from_peer->tail_open)
				set_field(&word[1],
					  bpf_htonl((__u32)READ_ONCE(to_peer->last_end) +
						    to_peer->seq_delta),
					  &sum);
		} else if (!before(seq, from_peer->tail_end)) {
			return DROP; /* never: our socket has sent nothing behind the tail */
		} else if (!from_peer->tail_open) {
			/*
			 * The peer has acknowledged the tail, but our socket missed that
			 * acknowledgement. It would retransmit until it gives up, and its port
			 * would be free. Let it send: the peer answers with an acknowledgement, of
			 * which `ingress` gives our socket a copy.
			 */
			from_peer->missed_ack = 1;
		}
		/*
		 * Do not acknowledge what our socket alone has received since the beginning, or its
		 * sender would forget it: acknowledge only what the other end has acknowledged. The
		 * window is the other end's, too.
		 */
		ack = expected_seq(from_peer, to_peer);
		edge = to_peer->window_edge + to_peer->ack_delta;
		edge = after(edge, ack) ? edge - ack : 0;
		set_field(&word[3],
			  (word[3] & ~bpf_htonl(0xffff)) |
				  bpf_htonl(window_field(edge, to_peer->other_scale)),
			  &sum);
	}
	set_field(&word[2], bpf_htonl(ack), &sum);
	/* Options behind the timestamps (SACK) may acknowledge what our socket alone has received.
	 */
	at = 0;
	if (header > 20 && (void *)(word + 7) <= data_end && word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		at = 3;
		if (state == PF_SPLICE_ACTIVE)
			set_field(&word[6],
				  bpf_htonl(own_tsval(from_peer, to_peer, bpf_ntohl(word[6]))),
				  &sum);
	}
#pragma unroll
	for (i = 0; i < 10; i++) {
		if (i >= at && 20u + 4 * i < header) {
			if ((void *)(word + 6 + i) > data_end)
				return DROP; /* never: its headers are in the linear part */
			set_field(&word[5 + i], bpf_htonl(NO_OP_WORD), &sum);
		}
	}
	bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(sum), 0);
	return NEXT;
}
