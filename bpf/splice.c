/*
 * The splice datapath (sched_cls at tcx, on both sides of every interface): packets of a joined
 * pair get the addresses, ports, sequence and acknowledgement numbers, timestamps and windows of
 * the other connection, and are forwarded. The two ends talk TCP end to end; nothing is buffered,
 * acknowledged or retransmitted here. ../README.md says how a pair gets here.
 *
 * ingress  packets of the two peers, and ICMP errors about forwarded packets
 * egress   packets of our own two sockets of a pair: nearly all are dropped
 * probe    run by the keeper (BPF_PROG_TEST_RUN): reads the interfaces by which our sockets reach
 *          the peers, and whether the peers have acknowledged the whole tail by now; has the
 *          worker look at the pair on request
 * control  run by the keeper as well: lets a pair begin, at any moment
 * find_session
 *          likewise: tells which sockets of this host would receive a session's datagrams
 *
 * A forwarder copies bytes one to one. So one constant for each direction translates the sequence
 * numbers of one connection into those of the other, for its whole life: the difference between the
 * number at which a byte is read here and the number at which it is written there.
 *
 * The tail is what had reached our sockets when the pair began, and had not reached the other end
 * yet. It stays with our sockets: userspace reads and writes the rest of it, our sockets send it,
 * receive its acknowledgements, and retransmit it if need be. Everything behind the tail passes
 * between the two ends.
 *
 * Why no packet is lost or doubled at that moment: `control` first keeps our sockets from
 * acknowledging more than they have received (BEGINNING), and then reads how far that is. A packet
 * that passed `ingress` before this state was set, and reaches our socket after the read, is not
 * acknowledged. Its sender retransmits it, and the retransmission goes to the other end: it is
 * treated like a lost packet.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "express_connect.h"
#include "maps.h"
#include "splice.h"
#include "splice_arrival.h"
#include "splice_control.h"
#include "splice_egress.h"
#include "splice_errors.h"
#include "splice_options.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_rewrite.h"
#include "splice_segment.h"
#include "splice_tail.h"
#include "splice_udp.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define VLAN_NUMBER  0xfff /* the VLAN's number in a tag */
#define ACCURATE_ECN 0x10  /* in tcp_sock.ecn_flags: AccECN (RFC 9768), on kernels that have it */

/*
 * Handle a TCP packet, or an ICMP error about one, at `ingress`: each step returns a verdict, or
 * CONTINUE for the next step. Returns the verdict.
 */
inlined int forward_tcp(struct __sk_buff *skb, const int v6)
{
	struct packet packet = {};
	struct splice_key from = {};
	int verdict;

	verdict = read_headers(skb, &packet, &from, v6);
	if (verdict == ICMP_ERROR)
		return translate_icmp_error(skb, v6);
	if (verdict != CONTINUE)
		return verdict;
	verdict = find_pair(skb, &packet, &from, v6);
	if (verdict != CONTINUE)
		return verdict;
	verdict = check_headers(skb, &packet, v6);
	if (verdict != CONTINUE)
		return verdict;
	verdict = pull_header(skb, &packet, v6);
	if (verdict != CONTINUE)
		return verdict;
	if (packet.is_copy) {
		unmark_copy(skb, v6);
		return pass_to_own_socket(skb, packet.from_peer, packet.header, packet.bytes, 0,
					  v6);
	}
	if (packet.flags & SYN)
		return handle_syn(skb, &packet, &from, v6);
	if (packet.flags & RST)
		verdict = handle_reset(skb, &packet, &from, v6);
	else
		verdict = handle_segment(skb, &packet, v6);
	return verdict == CONTINUE ? rewrite(skb, &packet, v6) : verdict;
}

/*
 * What arrives at an interface.
 *
 * Returns NEXT: for the stack. DROP: invalid, counted by its kind. Or the verdict of the redirect
 * to the other end.
 */
int ingress(struct __sk_buff *skb)
{
	int verdict;

	/*
	 * A packet with a VLAN tag arrives a second time, by the VLAN's own interface: pass it. A
	 * tag of number 0 carries only a priority, and names no VLAN (IEEE 802.1Q, 6.9.1).
	 */
	if (skb->vlan_present && (skb->vlan_tci & VLAN_NUMBER))
		return NEXT;
	if (HAS_EXPRESS && skb->mark == FOR_OUR_STACK) {
		skb->mark = 0;
		return NEXT;
	}
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		verdict = handle_udp(skb, 0);
		return verdict == NOT_UDP_SESSION ? forward_tcp(skb, 0) : verdict;
	}
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6)) {
		verdict = handle_udp(skb, 1);
		return verdict == NOT_UDP_SESSION ? forward_tcp(skb, 1) : verdict;
	}
	return NEXT;
}

/*
 * What sockets of this host send by an interface.
 *
 * Returns NEXT, or DROP for most packets of our sockets of spliced pairs.
 */
int egress(struct __sk_buff *skb)
{
	/* A forwarded packet (by us or by the host's routing): not from a socket of this host. */
	if (skb->ingress_ifindex)
		return NEXT;
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		note_own_datagram(skb, 0);
		return filter_own_segment(skb, 0);
	}
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6)) {
		note_own_datagram(skb, 1);
		return filter_own_segment(skb, 1);
	}
	return NEXT;
}

/*
 * Run by the keeper: read a pair's sockets into its record.
 *
 * Returns 0, or PF_BUSY_GONE if there is no such record.
 */
int probe(struct __sk_buff *skb)
{
	struct splice *splice = requested_splice(skb);
	struct splice_look client = {}, server = {};
	struct splice_key key;
	__u32 family, index, ring;

	if (!splice || bpf_skb_load_bytes(skb, ETHERNET_BYTES, &index, 4) ||
	    bpf_skb_load_bytes(skb, ETHERNET_BYTES + 4, &ring, 4))
		return PF_BUSY_GONE;
	family = splice->family;
	key = splice->direction[PF_UP].from;
	if (!(read_socket(skb, &key, family, &client) & PF_BUSY_GONE))
		note_tail_acknowledged(splice, &splice->direction[PF_UP], &client);
	key = splice->direction[PF_DOWN].from;
	if (!(read_socket(skb, &key, family, &server) & PF_BUSY_GONE))
		note_tail_acknowledged(splice, &splice->direction[PF_DOWN], &server);
	if (splice->state == PF_SPLICE_FREE) {
		/*
		 * Only before the pair begins: later our sockets do not look up their routes any
		 * more, and the keeper tracks them.
		 */
		splice->out[PF_UP] = client.out;
		splice->out[PF_DOWN] = server.out;
		splice->isn[PF_UP] = client.isn;
		splice->isn[PF_DOWN] = server.isn;
	}
	if (ring)
		notify_worker(splice, index);
	return 0;
}

/*
 * Run by the keeper: let an ARMED pair begin.
 *
 * Returns 0, or PF_BUSY_... bits, and the pair is ARMED as before.
 */
int control(struct __sk_buff *skb)
{
	struct splice *splice = requested_splice(skb);
	struct splice_key key;
	struct splice_look client = {}, server = {};
	__u32 family, busy, up, down, up_tail, down_tail, client_time, server_time;
	__u64 until_ns;

	if (!splice || splice->state != PF_SPLICE_ARMED ||
	    bpf_skb_load_bytes(skb, ETHERNET_BYTES + 8, &until_ns, 8))
		return PF_BUSY_GONE;
	family = splice->family;
	/*
	 * One socket after the other: read together, the verifier would walk all combinations of
	 * their states.
	 */
	key = splice->direction[PF_UP].from;
	busy = read_socket(skb, &key, family, &client);
	if (!busy)
		busy = check_peer_socket(skb, &key, family);
	if (!busy) {
		key = splice->direction[PF_DOWN].from;
		busy = read_socket(skb, &key, family, &server);
	}
	if (!busy)
		busy = check_peer_socket(skb, &key, family);
	if (busy)
		return (int)busy;
	if (is_window_coarse(&splice->direction[PF_UP], &client) ||
	    is_window_coarse(&splice->direction[PF_DOWN], &server))
		return PF_BUSY_COARSE;
	/* With AccECN the same header bits mean something else than with RFC 3168. */
	if ((client.ecn | server.ecn) & ACCURATE_ECN)
		splice->direction[PF_UP].no_ecn = splice->direction[PF_DOWN].no_ecn = 1;
	/*
	 * From here on `egress` acknowledges no more than this, until both sockets have been read.
	 */
	set_bounds_before_beginning(&splice->direction[PF_UP], &client);
	set_bounds_before_beginning(&splice->direction[PF_DOWN], &server);
	WRITE_ONCE(splice->state, PF_SPLICE_BEGINNING);
	/* A full barrier: the sockets must not be read before the state is stored. */
	__sync_fetch_and_add(&splice->barrier, 1);
	/*
	 * The clock is read after that, too: a worker that finds the record neither BEGINNING nor
	 * ACTIVE once the moment has passed then knows that the pair will not begin.
	 */
	busy = bpf_ktime_get_ns() > until_ns ? PF_BUSY_LATE : 0;
	key = splice->direction[PF_UP].from;
	if (!busy)
		busy = read_socket(skb, &key, family, &client);
	if (!busy) {
		key = splice->direction[PF_DOWN].from;
		busy = read_socket(skb, &key, family, &server);
	}
	if (busy) {
		WRITE_ONCE(splice->state, PF_SPLICE_ARMED);
		return (int)busy;
	}
	/*
	 * The end of what userspace will have written to each socket once it has read and written
	 * everything that had arrived.
	 */
	up_tail = server.write_seq + splice->direction[PF_UP].pending + client.unread;
	down_tail = client.write_seq + splice->direction[PF_DOWN].pending + server.unread;
	up = up_tail - client.rcv_nxt;
	down = down_tail - server.rcv_nxt;
	/* One tick more than the clock's last reading: the socket may have sent since then. */
	server_time = splice->clocks.server + 1 - client.ts_recent;
	client_time = splice->clocks.client + 1 - server.ts_recent;
	splice->direction[PF_UP].seq_delta = up;
	splice->direction[PF_UP].ack_delta = -down;
	splice->direction[PF_UP].tsval_delta = server_time;
	splice->direction[PF_UP].tsecr_delta = -client_time;
	init_direction(&splice->direction[PF_UP], &client, &server, down_tail);
	splice->direction[PF_DOWN].seq_delta = down;
	splice->direction[PF_DOWN].ack_delta = -up;
	splice->direction[PF_DOWN].tsval_delta = client_time;
	splice->direction[PF_DOWN].tsecr_delta = -server_time;
	init_direction(&splice->direction[PF_DOWN], &server, &client, up_tail);
	__sync_fetch_and_add(&splice->barrier, 1);
	WRITE_ONCE(splice->state, PF_SPLICE_ACTIVE);
	return 0;
}

/* Run by the keeper: which sockets would receive a session's datagrams, as bits. */
int find_session(struct __sk_buff *skb)
{
	return find_session_sockets(skb);
}
