/*
 * What our own socket still receives of a spliced pair: acknowledgements of the tail, and packets
 * that it is to answer.
 */
#pragma once

#include "splice_options.h"
#include "splice_packet.h"
#include "splice_pair.h"
#include "splice_verdicts.h"

/*
 * Turn a packet into one for our own socket, which it tells what the peer has acknowledged of the
 * tail. Its bytes get the numbers right before the number that our socket expects next, so that the
 * socket takes them for old ones, however many bytes have passed between the ends. If `again`, they
 * are old bytes indeed, and keep their numbers: the socket answers them.
 *
 * Returns NEXT: the packet goes up the stack. DROP: never.
 */
inlined int pass_to_own_socket(struct __sk_buff *skb, struct splice_direction *from_peer,
			       __u32 header, __u32 bytes, int again, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	__u32 *word = data + TCP_OFFSET(v6);
	__u32 known = (__u32)READ_ONCE(from_peer->socket_sent_end);
	__u64 sum = 0;

	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was in the linear part a moment ago */
	/*
	 * Limit SACK to what our socket has sent. For conntrack an edge behind that acknowledges
	 * bytes that it has not seen (nf_conntrack_proto_tcp.c, tcp_in_window): with `ct state
	 * invalid drop` our socket would receive no acknowledgement any more.
	 */
	if (after(known, from_peer->tail_end))
		known = from_peer->tail_end;
	if (!again)
		set_field(&word[1], bpf_htonl(READ_ONCE(from_peer->socket_expected_seq) - bytes),
			  &sum);
	if (after(bpf_ntohl(word[2]), from_peer->tail_end))
		set_field(&word[2], bpf_htonl(from_peer->tail_end), &sum);
	set_field(&word[3], word[3] & ~bpf_htonl(FIN_OF_TCP | SYN_OF_TCP | RST_OF_TCP | URG_OF_TCP),
		  &sum);
	if (header > 32 && (void *)(word + 6) <= data_end && word[5] == bpf_htonl(TIMESTAMP_WORD))
		clip_sack(word + 8, data_end, header - 32, known, &sum);
	else if (header > 20)
		clip_sack(word + 5, data_end, header - 20, known, &sum);
	bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(sum), 0);
	return NEXT;
}

/*
 * Turn a packet into one that our own socket answers with a challenge acknowledgement (RFC 5961, 3
 * and 4). A peer without a connection answers the challenge with a reset at the right number; a
 * peer with a connection ignores it. The packet becomes a SYN: our socket answers one of any number
 * with a challenge, and a mute socket receives nothing else.
 *
 * The packet of a server becomes a SYN-ACK instead, since our socket has connected to it: conntrack
 * takes a SYN from the end that was connected to for invalid (nf_conntrack_proto_tcp.c,
 * tcp_conntracks).
 *
 * Returns NEXT: the packet goes up the stack. DROP: our socket does not exist at the moment.
 */
inlined int challenge(struct __sk_buff *skb, struct splice_direction *from_peer, __u32 direction,
		      const struct splice_key *from, const int v6)
{
	void *data, *data_end;
	__u32 *word, flags = direction == PF_UP ? SYN_OF_TCP : SYN_OF_TCP | ACK_OF_TCP;
	__u64 sum = 0;

	if (!has_own_socket(skb, from, v6))
		return DROP; /* our socket will exist when the peer repeats this */
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	word = data + TCP_OFFSET(v6);
	if (data + HEADERS_BYTES(v6) > data_end)
		return DROP; /* never: it was in the linear part a moment ago */
	from_peer->answer = PF_ANSWER;
	set_field(&word[2], 0, &sum);
	set_field(&word[3], (word[3] & ~bpf_htonl(FLAGS_OF_TCP)) | bpf_htonl(flags), &sum);
	bpf_l4_csum_replace(skb, TCP_OFFSET(v6) + 16, 0, csum_fold(sum), 0);
	return NEXT;
}
