/*
 * The first bytes of a client: are they what is behind a handshake, and such as can be saved?
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_connect.h"
#include "express_make.h"
#include "express_places.h"
#include "express_read.h"
#include "maps.h"
#include "splice_packet.h"
#include "splice_verdicts.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "it reads the kernel's bit-fields"
#endif

#define LEAST_MSS 536 /* RFC 9293, 3.7.1 */

static long (*tail_call)(void *context, void *map, __u32 index) = (void *)BPF_FUNC_tail_call;

#define read8(structure, offset)  (*(volatile __u8 *)((void *)(structure) + (offset)))
#define read16(structure, offset) (*(volatile __u16 *)((void *)(structure) + (offset)))
#define read32(structure, offset) (*(volatile __u32 *)((void *)(structure) + (offset)))

/*
 * What one program has found out, for the next: together they would be too much for the verifier.
 * Of each processor; nothing else of ours runs there in between, as no kernel with PREEMPT_RT is
 * trusted (pyforwarder/datapath/proof/apart.py).
 */
struct asking {
	struct splice_key key;
	struct seen seen;
	struct express_listener_key listener;
	__u32 options; /* of the handshake, as in inet_request_sock */
	__u32 mss, room;
	__u32 family, at;  /* where the first bytes are in the packet */
	__u32 table, rule; /* which one has decided, and what */
	__u32 choice, target;
};

inlined struct asking *asking_of(void)
{
	__u32 zero = 0;

	return map_lookup(MAP_EXPRESS_ASKING_FD, &zero);
}

/* How many of the saved bytes go in one packet: as many as in the client's, in whole words. */
inlined __u32 segment_of(const struct express_listener *listener)
{
	return listener->told_mss < LEAST_MSS ? 0 : (listener->told_mss - 12) & ~3;
}

/* Whether so many first bytes go in one packet, or in two, as `store_saved` and `store_rest` do. */
inlined int fits(__u32 bytes, __u32 segment)
{
	return bytes <= segment || (segment < PF_EXPRESS_SAVED / 2 && bytes <= 2 * segment);
}

inlined int begin(struct __sk_buff *skb, const int v6)
{
	struct splice_key key = {};
	struct seen seen = {};
	union {
		struct express_listener_key listener;
		struct bpf_sock_tuple tuple;
	} asked = {};
	struct express_listener *listener;
	struct asking *asking = asking_of();
	struct bpf_sock *sk;
	void *request;
	__u32 mss, room, number, device, state, i;
	__u16 options;
	__u8 odd, timeouts;

	if (!asking || take_key(skb, &key, v6))
		return NEXT;
#pragma unroll
	for (i = 0; i < 4; i++)
		asked.listener.address[i] = key.target[i];
	asked.listener.port = key.dport;
	listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &asked.listener);
	if (!listener) {
#pragma unroll
		for (i = 0; i < 4; i++)
			asked.listener.address[i] = 0;
		listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &asked.listener);
		if (!listener)
			return NEXT;
	}
	asking->listener = asked.listener;
	if (look_at(skb, &key, &seen, v6))
		return NEXT; /* the stack knows what to do with it */
	if ((seen.flags & (SYN | RST | ACK)) != ACK)
		return NEXT;
	/* Of link-local addresses (fe80::/10) a key does not say by which interface. */
	if (v6 && (key.source[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return NEXT;

	__builtin_memset(&asked, 0, sizeof(asked));
	if (v6) {
#pragma unroll
		for (i = 0; i < 4; i++) {
			asked.tuple.ipv6.saddr[i] = key.source[i];
			asked.tuple.ipv6.daddr[i] = key.target[i];
		}
		asked.tuple.ipv6.sport = key.sport;
		asked.tuple.ipv6.dport = key.dport;
		sk = (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &asked.tuple,
							   sizeof(asked.tuple.ipv6), -1, 0);
	} else {
		asked.tuple.ipv4.saddr = key.source[3];
		asked.tuple.ipv4.daddr = key.target[3];
		asked.tuple.ipv4.sport = key.sport;
		asked.tuple.ipv4.dport = key.dport;
		sk = (struct bpf_sock *)bpf_skc_lookup_tcp(skb, &asked.tuple,
							   sizeof(asked.tuple.ipv4), -1, 0);
	}
	if (!sk)
		return NEXT;
	request = (void *)bpf_skc_to_tcp_request_sock(sk);
	if (!request) {
		/*
		 * With SYN cookies it is the listener, once for each: this packet makes a
		 * connection. Nor does a stray packet have another. Else a worker has it already.
		 */
		state = sk->state;
		bpf_sk_release(sk);
		if (state == BPF_TCP_LISTEN)
			count(PF_COUNT_NO_REQUEST);
		return NEXT;
	}
	number = (read32(request, TCP_REQUEST_SOCK_RCV_ISN) + 1 - seen.seq) |
		 (read32(request, TCP_REQUEST_SOCK_SNT_ISN) + 1 - seen.ack);
	odd = read8(request, TCP_REQUEST_SOCK_IS_MPTCP) |
	      read8(request, TCP_REQUEST_SOCK_TFO_LISTENER);
#ifdef TCP_REQUEST_SOCK_REQ_USEC_TS /* Linux 6.7 */
	odd |= read8(request, TCP_REQUEST_SOCK_REQ_USEC_TS);
#endif
#ifdef TCP_REQUEST_SOCK_ACCECN_OK /* Linux 6.18 */
	odd |= read8(request, TCP_REQUEST_SOCK_ACCECN_OK);
#endif
	/*
	 * Bit-fields, from the lowest bit up (little-endian): num_timeout behind one bit;
	 * snd_wscale and rcv_wscale of four, tstamp_ok, sack_ok, wscale_ok and ecn_ok of one.
	 */
	timeouts = read8(request, REQUEST_SOCK_NUM_TIMEOUT) >> 1;
	options = read16(request, INET_REQUEST_SOCK_SND_WSCALE);
	mss = read16(request, REQUEST_SOCK_MSS);
	room = read32(request, SOCK_COMMON_SKC_RCV_WND);
	device = read32(request, SOCK_COMMON_SKC_BOUND_DEV_IF);
	bpf_sk_release(sk);
	/*
	 * Of a listener that is bound to a device, or in a VRF: there may be several with one
	 * address, and a key does not say which, nor whose.
	 */
	if (device) {
		count(PF_COUNT_DEVICE); /* once: it becomes a connection of a worker's */
		return NEXT;
	}
	if (odd | (options & 0x800)) {
		count(PF_COUNT_ODD_REQUEST);
		return NEXT;
	}
	if (number) {
		count(PF_COUNT_ODD_NUMBERS);
		return NEXT;
	}
	if (!seen.bytes) {
		if (timeouts || (seen.flags & FIN)) {
			count(PF_COUNT_SILENT);
			return NEXT; /* it says nothing: only a worker can wait for that */
		}
		count(PF_COUNT_DEFERRED);
		return DROP;
	}
	if ((seen.flags & URG) || !!(options & 0x100) != seen.has_timestamp ||
	    seen.header != (seen.has_timestamp ? 32 : 20)) {
		count(PF_COUNT_ODD_PACKET);
		return NEXT;
	}
	if (seen.bytes > PF_EXPRESS_SAVED || !(seen.flags & (PSH | FIN)) ||
	    !fits(seen.bytes, segment_of(listener))) {
		count(PF_COUNT_LONG);
		return NEXT;
	}

	asking->key = key;
	asking->seen = seen;
	asking->options = options;
	asking->mss = mss;
	asking->room = room;
	asking->family = v6 ? 6 : 4;
	asking->at = TCP_AT(v6) + seen.header;
	tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), PF_EXPRESS_BY_RULES);
	return NEXT; /* it is not there: the daemon ends */
}
