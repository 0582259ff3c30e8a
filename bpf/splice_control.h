/*
 * How a pair begins: the state of our two sockets is read, and the offsets between the sequence
 * numbers of the two connections are computed from it.
 */
#pragma once

#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_valid.h"

/*
 * Read the state of the socket that receives from `from` into `seen`.
 *
 * Returns 0 if it is ESTABLISHED and has no gap in its receive queue, else PF_BUSY_... bits.
 */
inlined __u32 read_socket(struct __sk_buff *skb, const struct splice_key *from, __u32 family,
			  struct splice_look *seen)
{
	struct bpf_sock *sk = find_socket(skb, from, family);
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
	/* The SYN takes a sequence number of its own, which bytes_received does not count. */
	seen->isn = seen->rcv_nxt - (__u32)read64(tcp, TCP_SOCK_BYTES_RECEIVED) - 1;
	seen->snd_una = read32(tcp, TCP_SOCK_SND_UNA);
	seen->snd_nxt = read32(tcp, TCP_SOCK_SND_NXT);
	seen->edge = seen->snd_una + read32(tcp, TCP_SOCK_SND_WND);
	seen->most_window = read32(tcp, TCP_SOCK_MAX_WINDOW);
	seen->ecn = *(volatile __u8 *)((void *)tcp + TCP_SOCK_ECN_FLAGS);
	seen->promised = read32(tcp, TCP_SOCK_RCV_WUP) + read32(tcp, TCP_SOCK_RCV_WND);
	/*
	 * Segments behind a gap may have been acknowledged selectively (SACK): their sender does
	 * not send them again.
	 */
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

/*
 * Whether the peer is a socket of this host that another forwarder has spliced.
 *
 * Returns PF_BUSY_FOREIGN then, else 0.
 */
inlined __u32 check_peer_socket(struct __sk_buff *skb, const struct splice_key *from, __u32 family)
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
	sk = find_socket(skb, &beyond, family);
	if (!sk)
		return 0;
	tcp = (struct tcp_sock *)bpf_skc_to_tcp_sock(sk);
	if (tcp && read32(tcp, SOCK_SK_PRIORITY) == PF_SPLICE_PRIORITY)
		busy = PF_BUSY_FOREIGN;
	bpf_sk_release(sk);
	return busy;
}

/* The record whose index the keeper has put into the packet; NULL: there is none. */
inlined struct splice *requested_splice(struct __sk_buff *skb)
{
	__u32 index;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &index, 4))
		return NULL;
	return map_lookup(MAP_SPLICES_FD, &index);
}

/*
 * Take note that the peer has acknowledged the whole tail, if our socket knows that it has: that
 * acknowledgement may have passed `ingress` right before the pair became ACTIVE.
 */
inlined void note_tail_acknowledged(struct splice *splice, struct splice_direction *from_peer,
				    const struct splice_look *seen)
{
	if (splice->state == PF_SPLICE_ACTIVE && from_peer->tail_open &&
	    seen->snd_una == from_peer->tail_end) {
		advance(&from_peer->last_ack, seen->snd_una);
		from_peer->tail_open = 0;
	}
}

/*
 * Whether the peer's window cannot be expressed to the other end. That end gets it in units of our
 * other socket's window scale, rounded down: a window of less than two units would look closed most
 * of the time, or always.
 */
inlined int is_window_coarse(const struct splice_direction *from_peer,
			     const struct splice_look *seen)
{
	return seen->most_window >> (from_peer->other_scale & 15) < 2;
}

/*
 * Set what `egress` may advance from BEGINNING on: the end of what our socket has sent to this
 * peer, and the right edge of the window that it has advertised.
 */
inlined void set_bounds_before_beginning(struct splice_direction *from_peer,
					 const struct splice_look *seen)
{
	from_peer->begin_seq = seen->rcv_nxt;
	from_peer->socket_sent_end = seen->snd_nxt;
	from_peer->max_edge = seen->promised;
	from_peer->max_window = seen->promised - seen->rcv_nxt;
	if (from_peer->max_window < MIN_LARGEST_WINDOW)
		from_peer->max_window = MIN_LARGEST_WINDOW;
}

/*
 * Set the state in which a direction becomes ACTIVE. `seen` is the socket that receives from this
 * peer, `beyond` the socket of the other connection, `tail` the end of what our socket still sends
 * to this peer.
 */
inlined void init_direction(struct splice_direction *from_peer, const struct splice_look *seen,
			    const struct splice_look *beyond, __u32 tail)
{
	from_peer->last_ack = seen->snd_una;
	from_peer->last_end = from_peer->contiguous_end = from_peer->begin_seq =
		from_peer->socket_expected_seq = seen->rcv_nxt;
	advance(&from_peer->socket_sent_end, seen->snd_nxt);
	advance(&from_peer->max_edge, seen->promised);
	/* The other end's window, in this peer's numbers: our bytes for that end come before it. */
	advance(&from_peer->max_edge, beyond->edge - from_peer->seq_delta);
	if (from_peer->max_window < beyond->most_window)
		from_peer->max_window = beyond->most_window;
	from_peer->ts_recent = seen->ts_recent;
	from_peer->ts_recent_s = from_peer->last_received_s =
		(__u32)(bpf_ktime_get_ns() / NS_PER_S);
	from_peer->window_edge = seen->edge;
	from_peer->unread = seen->unread;
	from_peer->tail_end = tail;
	from_peer->tail_open = seen->snd_una != tail;
	from_peer->answer = 0;
	from_peer->has_last_tsval = 0;
	from_peer->missed_ack = 0;
}
