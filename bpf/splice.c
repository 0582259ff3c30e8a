/*
 * The splice datapath (sched_cls at tcx, on both sides of every interface): packets of a joined
 * pair get the addresses, ports, sequence and acknowledgement numbers, timestamps and windows of
 * the other connection, and go on. The two ends talk TCP end to end; nothing is buffered here,
 * nothing acknowledged and nothing resent. ../README.md tells how a pair gets here.
 *
 * ingress  what the two peers send to us, and what routers say of it (ICMP)
 * egress   what our own two sockets of a pair send: nothing any more
 * probe    run by the keeper (BPF_PROG_TEST_RUN): by which interfaces our sockets reach the peers,
 *	    and whether they have been told by now that all they had sent has come; has the worker
 *	    look at the pair if it is asked to
 * control  run by the keeper, too: lets a pair begin, at any moment
 *
 * A forwarder copies bytes one to one. So one constant for each direction takes the numbers of the
 * one connection to those of the other, for all time: those of a byte that is read here and will be
 * written there.
 *
 * What had come to our sockets when the pair began, and was not yet with the other end (the tail),
 * stays theirs: userspace reads and writes the rest of it, our sockets send it, get the
 * acknowledgements of it, and send it again if need be. Everything behind it is between the ends.
 *
 * Why no packet can be lost or counted twice at that moment: `control` first lets our sockets
 * acknowledge nothing more than they have (BEGINNING), then looks how far that is. A packet that
 * had passed `ingress` before it knew better, and reaches our socket after the look, is not
 * acknowledged: then its sender sends it again, and that goes to the other end. It is as if it had
 * been lost.
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

#define VLAN_NUMBER  0xfff /* of a tag */
#define ACCURATE_ECN 0x10  /* of tcp_sock.ecn_flags: AccECN (RFC 9768), on kernels that have it */

/*
 * What becomes of a packet at `ingress`: each step has a verdict, or the next one has the packet.
 */
inlined int translate(struct __sk_buff *skb, const int v6)
{
	struct packet packet = {};
	struct splice_key from = {};
	int verdict;

	verdict = read_headers(skb, &packet, &from, v6);
	if (verdict == AN_ERROR)
		return translate_error(skb, v6);
	if (verdict != GO_ON)
		return verdict;
	verdict = find_pair(skb, &packet, &from, v6);
	if (verdict != GO_ON)
		return verdict;
	verdict = check_headers(skb, &packet, v6);
	if (verdict != GO_ON)
		return verdict;
	verdict = pull_header(skb, &packet, v6);
	if (verdict != GO_ON)
		return verdict;
	if (packet.is_copy) {
		unmark_copy(skb, v6);
		return give_to_our_socket(skb, packet.way, packet.header, packet.bytes, 0, v6);
	}
	if (packet.flags & SYN)
		return take_syn(skb, &packet, &from, v6);
	if (packet.flags & RST)
		verdict = take_reset(skb, &packet, &from, v6);
	else
		verdict = take_segment(skb, &packet, v6);
	return verdict == GO_ON ? rewrite(skb, &packet, v6) : verdict;
}

int ingress(struct __sk_buff *skb)
{
	int verdict;

	/*
	 * One with a tag is not yet where it belongs: it comes again, by its own interface. A tag
	 * of number 0 has a priority, and says nothing of where (IEEE 802.1Q, 6.9.1).
	 */
	if (skb->vlan_present && (skb->vlan_tci & VLAN_NUMBER))
		return NEXT;
#ifdef MAP_EXPRESS_PROGRAMS_FD
	if (skb->mark == FOR_OUR_STACK) {
		skb->mark = 0;
		return NEXT;
	}
#endif
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		verdict = take_datagram(skb, 0);
		return verdict == NO_DATAGRAM ? translate(skb, 0) : verdict;
	}
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6)) {
		verdict = take_datagram(skb, 1);
		return verdict == NO_DATAGRAM ? translate(skb, 1) : verdict;
	}
	return NEXT;
}

int egress(struct __sk_buff *skb)
{
	/* Forwarded, ours or another's: not from a socket of this host. */
	if (skb->ingress_ifindex)
		return NEXT;
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV4)) {
		note_leaving(skb, 0);
		return silence(skb, 0);
	}
	if (skb->protocol == bpf_htons(ETHERTYPE_IPV6)) {
		note_leaving(skb, 1);
		return silence(skb, 1);
	}
	return NEXT;
}

int probe(struct __sk_buff *skb)
{
	struct splice *splice = asked_for(skb);
	struct splice_look client = {}, server = {};
	struct splice_key key;
	__u32 family, index, ring;

	if (!splice || bpf_skb_load_bytes(skb, ETHERNET_BYTES, &index, 4) ||
	    bpf_skb_load_bytes(skb, ETHERNET_BYTES + 4, &ring, 4))
		return PF_BUSY_GONE;
	family = splice->family;
	key = splice->way[PF_UP].from;
	if (!(look(skb, &key, family, &client) & PF_BUSY_GONE))
		settle(splice, &splice->way[PF_UP], &client);
	key = splice->way[PF_DOWN].from;
	if (!(look(skb, &key, family, &server) & PF_BUSY_GONE))
		settle(splice, &splice->way[PF_DOWN], &server);
	if (splice->state == PF_SPLICE_FREE) {
		/* Later the keeper knows better: our sockets do not ask for their routes any more.
		 */
		splice->out[PF_UP] = client.out;
		splice->out[PF_DOWN] = server.out;
		splice->isn[PF_UP] = client.isn;
		splice->isn[PF_DOWN] = server.isn;
	}
	if (ring)
		tell(splice, index);
	return 0;
}

int control(struct __sk_buff *skb)
{
	struct splice *splice = asked_for(skb);
	struct splice_key key;
	struct splice_look client = {}, server = {};
	__u32 family, busy, up, down, up_tail, down_tail, client_time, server_time;
	__u64 until_ns;

	if (!splice || splice->state != PF_SPLICE_ARMED ||
	    bpf_skb_load_bytes(skb, ETHERNET_BYTES + 8, &until_ns, 8))
		return PF_BUSY_GONE;
	family = splice->family;
	/* One after the other, or the verifier would go through all combinations of what they say.
	 */
	key = splice->way[PF_UP].from;
	busy = look(skb, &key, family, &client);
	if (!busy)
		busy = look_beyond(skb, &key, family);
	if (!busy) {
		key = splice->way[PF_DOWN].from;
		busy = look(skb, &key, family, &server);
	}
	if (!busy)
		busy = look_beyond(skb, &key, family);
	if (busy)
		return (int)busy;
	if (is_coarse(&splice->way[PF_UP], &client) || is_coarse(&splice->way[PF_DOWN], &server))
		return PF_BUSY_COARSE;
	/* What one of them says by these bits the other would take for something else. */
	if ((client.ecn | server.ecn) & ACCURATE_ECN)
		splice->way[PF_UP].no_ecn = splice->way[PF_DOWN].no_ecn = 1;
	/* So far, and not further, until it is known how far that is. */
	prepare(&splice->way[PF_UP], &client);
	prepare(&splice->way[PF_DOWN], &server);
	*(volatile __u32 *)&splice->state = PF_SPLICE_BEGINNING;
	/* The look must not come before that: a full barrier. */
	__sync_fetch_and_add(&splice->tries, 1);
	/*
	 * The clock, too, is read after that: a worker that finds it neither BEGINNING nor ACTIVE
	 * once the moment has passed knows that it will not begin.
	 */
	busy = bpf_ktime_get_ns() > until_ns ? PF_BUSY_LATE : 0;
	key = splice->way[PF_UP].from;
	if (!busy)
		busy = look(skb, &key, family, &client);
	if (!busy) {
		key = splice->way[PF_DOWN].from;
		busy = look(skb, &key, family, &server);
	}
	if (busy) {
		*(volatile __u32 *)&splice->state = PF_SPLICE_ARMED;
		return (int)busy;
	}
	/* What userspace will have written when it has read and written all that had come. */
	up_tail = server.write_seq + splice->way[PF_UP].pending + client.unread;
	down_tail = client.write_seq + splice->way[PF_DOWN].pending + server.unread;
	up = up_tail - client.rcv_nxt;
	down = down_tail - server.rcv_nxt;
	/* One more than the clock's last reading: the socket may have spoken since. */
	server_time = splice->server_clock + 1 - client.ts_recent;
	client_time = splice->client_clock + 1 - server.ts_recent;
	splice->way[PF_UP].seq_delta = up;
	splice->way[PF_UP].ack_delta = -down;
	splice->way[PF_UP].tsval_delta = server_time;
	splice->way[PF_UP].tsecr_delta = -client_time;
	begin(&splice->way[PF_UP], &client, &server, down_tail);
	splice->way[PF_DOWN].seq_delta = down;
	splice->way[PF_DOWN].ack_delta = -up;
	splice->way[PF_DOWN].tsval_delta = client_time;
	splice->way[PF_DOWN].tsecr_delta = -server_time;
	begin(&splice->way[PF_DOWN], &server, &client, up_tail);
	__sync_fetch_and_add(&splice->tries, 1);
	*(volatile __u32 *)&splice->state = PF_SPLICE_ACTIVE;
	return 0;
}

int find_session(struct __sk_buff *skb)
{
	return find_session_sockets(skb);
}
