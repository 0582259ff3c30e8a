/*
 * The first bytes of a client: do they follow a handshake, and can they be saved?
 */
#pragma once

#include <uapi/linux/bpf.h>

#include "express_connect.h"
#include "express_make.h"
#include "express_places.h"
#include "express_read.h"
#include "maps.h"
#include "splice_packet.h"
#include "splice_socket.h"
#include "splice_verdicts.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "it reads the kernel's bit-fields"
#endif

#define MIN_MSS 536 /* RFC 9293, 3.7.1 */

/*
 * What one program has read, for the next one in the chain of tail calls: as one program they would
 * exceed the verifier's limit. One per processor; no other of our programs runs on the processor in
 * between, as kernels with PREEMPT_RT are refused (pyforwarder/datapath/proof/apart.py).
 */
struct request_context {
	struct splice_key key;
	struct parsed_segment parsed;
	struct express_listener_key listener;
	__u32 options; /* options of the handshake, the bit-fields of inet_request_sock */
	__u32 mss, room;
	__u32 family, at;  /* `at`: offset of the first bytes in the packet */
	__u32 table, rule; /* the table that has decided, and its rule */
	__u32 choice, target;
};

_Static_assert(sizeof(struct request_context) == PF_EXPRESS_CONTEXT_BYTES, "the map's value");

/* The processor's context of a chain of tail calls. */
inlined struct request_context *get_context(void)
{
	__u32 zero = 0;

	return map_lookup(MAP_EXPRESS_ASKING_FD, &zero);
}

/*
 * How many of the saved bytes go into one packet: as many as a packet of the client can have (the
 * MSS that it was told, less the timestamps), in whole words.
 */
inlined __u32 max_saved_segment(const struct express_listener *listener)
{
	return listener->advertised_mss < MIN_MSS ? 0 : (listener->advertised_mss - 12) & ~3;
}

/*
 * Whether so many first bytes fit into one packet or two, as store_saved() and store_rest() send
 * them.
 */
inlined int fits(__u32 bytes, __u32 segment)
{
	return bytes <= segment || (segment < PF_EXPRESS_SAVED / 2 && bytes <= 2 * segment);
}

/*
 * Check a packet with no known pair: does it have the first bytes of a client behind a handshake
 * that the kernel has just done, and can they be saved? If so, tail-call the program that decides
 * by the rules.
 *
 * Returns NEXT: a worker gets the connection. DROP: it is the last packet of the handshake, which
 * the kernel is not to see yet.
 */
inlined int check_first_bytes(struct __sk_buff *skb, const int v6)
{
	struct splice_key key = {};
	struct parsed_segment parsed = {};
	struct express_listener_key asked = {};
	struct express_listener *listener;
	struct request_context *context = get_context();
	struct bpf_sock *sk;
	void *request;
	__u32 mss, room, number, device, state, i;
	__u16 options;
	__u8 odd, timeouts;

	if (!context || parse_addresses(skb, &key, v6))
		return NEXT;
#pragma unroll
	for (i = 0; i < 4; i++)
		asked.address[i] = key.target[i];
	asked.port = key.dport;
	listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &asked);
	if (!listener) {
#pragma unroll
		for (i = 0; i < 4; i++)
			asked.address[i] = 0;
		listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &asked);
		if (!listener)
			return NEXT;
	}
	context->listener = asked;
	if (parse_segment(skb, &key, &parsed, v6))
		return NEXT; /* the stack handles it */
	if ((parsed.flags & (SYN | RST | ACK)) != ACK)
		return NEXT;
	/*
	 * The key of a listener does not say by which interface a link-local address (fe80::/10) is
	 * meant.
	 */
	if (v6 && (key.source[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000))
		return NEXT;

	sk = find_socket(skb, &key, v6 ? PF_IPV6 : PF_IPV4);
	if (!sk)
		return NEXT;
	request = (void *)bpf_skc_to_tcp_request_sock(sk);
	if (!request) {
		/*
		 * With SYN cookies the lookup finds the listener: this packet makes the connection,
		 * so this is counted once for each. A stray packet finds the listener, too. Any
		 * other socket means that a worker has the connection already.
		 */
		state = sk->state;
		bpf_sk_release(sk);
		if (state == BPF_TCP_LISTEN)
			count_event(PF_COUNT_NO_REQUEST);
		return NEXT;
	}
	number = (read32(request, TCP_REQUEST_SOCK_RCV_ISN) + 1 - parsed.seq) |
		 (read32(request, TCP_REQUEST_SOCK_SNT_ISN) + 1 - parsed.ack);
	odd = read8(request, TCP_REQUEST_SOCK_IS_MPTCP) |
	      read8(request, TCP_REQUEST_SOCK_TFO_LISTENER);
#ifdef TCP_REQUEST_SOCK_REQ_USEC_TS /* Linux 6.7 */
	odd |= read8(request, TCP_REQUEST_SOCK_REQ_USEC_TS);
#endif
#ifdef TCP_REQUEST_SOCK_ACCECN_OK /* Linux 6.18 */
	odd |= read8(request, TCP_REQUEST_SOCK_ACCECN_OK);
#endif
	/*
	 * Bit-fields, from the lowest bit up (little-endian): num_timeout follows one other bit;
	 * snd_wscale and rcv_wscale have four bits, tstamp_ok, sack_ok, wscale_ok and ecn_ok one
	 * each.
	 */
	timeouts = read8(request, REQUEST_SOCK_NUM_TIMEOUT) >> 1;
	options = read16(request, INET_REQUEST_SOCK_SND_WSCALE);
	mss = read16(request, REQUEST_SOCK_MSS);
	room = read32(request, SOCK_COMMON_SKC_RCV_WND);
	device = read32(request, SOCK_COMMON_SKC_BOUND_DEV_IF);
	bpf_sk_release(sk);
	/*
	 * A listener that is bound to a device, or is in a VRF: several listeners may have the same
	 * address, and the key does not say which one this is.
	 */
	if (device) {
		count_event(PF_COUNT_DEVICE); /* counted once: a worker gets the connection */
		return NEXT;
	}
	if (odd | (options & 0x800)) {
		count_event(PF_COUNT_ODD_REQUEST);
		return NEXT;
	}
	if (number) {
		count_event(PF_COUNT_ODD_NUMBERS);
		return NEXT;
	}
	if (!parsed.bytes) {
		if (timeouts || (parsed.flags & FIN)) {
			count_event(PF_COUNT_SILENT);
			return NEXT; /* no bytes yet: only a worker can wait for some */
		}
		count_event(PF_COUNT_DEFERRED);
		return DROP;
	}
	if ((parsed.flags & URG) || !!(options & 0x100) != parsed.has_timestamp ||
	    parsed.header != (parsed.has_timestamp ? 32 : 20)) {
		count_event(PF_COUNT_ODD_PACKET);
		return NEXT;
	}
	if (parsed.bytes > PF_EXPRESS_SAVED || !(parsed.flags & (PSH | FIN)) ||
	    !fits(parsed.bytes, max_saved_segment(listener))) {
		count_event(PF_COUNT_LONG);
		return NEXT;
	}

	context->key = key;
	context->parsed = parsed;
	context->options = options;
	context->mss = mss;
	context->room = room;
	context->family = v6 ? 6 : 4;
	context->at = TCP_OFFSET(v6) + parsed.header;
	tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), PF_EXPRESS_BY_RULES);
	return NEXT; /* the program is not loaded: the daemon is ending */
}
