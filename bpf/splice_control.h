/*
 * How a pair begins: our two sockets as they are, and the numbers that follow from them.
 */
#pragma once

#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_valid.h"

#define read32(structure, offset) (*(volatile __u32 *)((void *)(structure) + (offset)))
#define read64(structure, offset) (*(volatile __u64 *)((void *)(structure) + (offset)))

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
