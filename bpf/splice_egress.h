/*
 * What our own two sockets of a pair may still say: about the tail, and what a peer is to answer.
 */
#pragma once

#include "splice_options.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_ports.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define NOWHERE 0 /* no interface: the packet is gone, and was sent */

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
	if (!may_be_ours(tcp->sport))
		return NEXT;
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
	/*
	 * The kernel's own socket of a handshake (request_sock), which express has not let have the
	 * client's first bytes, repeats its SYN-ACK: that client has long got it. As long as a
	 * server is asked for it also answers a client that begins anew, or is not believed.
	 *
	 * Where such a packet cannot be sent the kernel forgets the request (reqsk_timer_handler,
	 * net/ipv4/inet_connection_sock.c). So it is to believe that it was, as long as a worker
	 * may have to go on with it. Once the server has answered it is to forget it: perhaps it
	 * has not heard that, as the packet that says so was lost in this host.
	 */
	if ((tcp->flags & SYN) && (tcp->flags & ACK) && splice->worker == PF_EXPRESS_NO_WORKER)
		return state == PF_SPLICE_ASKED ? bpf_redirect(NOWHERE, 0) : DROP;
	if (state == PF_SPLICE_ASKED) {
		/*
		 * A socket that our stack has made of the handshake all the same says nothing
		 * before it is known whose the client is (`join`): it sends that again.
		 */
		header = (__u32)(tcp->offset >> 4) * 4;
		if (flow->direction == PF_UP &&
		    ((tcp->flags & FIN) || skb->len > TCP_AT(v6) + header))
			return DROP;
		return NEXT;
	}
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
		return DROP; /* the two ends say SYN, FIN and RST themselves */
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
