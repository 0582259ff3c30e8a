/*
 * Connections that are decided by their first packet, and opened, in the kernel. The programs of
 * splice.c go on here (BPF_MAP_TYPE_PROG_ARRAY) with packets that no pair is known for, and with
 * those of pairs whose server was asked for.
 *
 * begin4 begin6  the first bytes of a client: is it what is behind a handshake?
 * by_rules       what the rules say
 * by_choice      which of an upstream's servers is next, if there are several
 * ask4 ask6      and a SYN to that server
 * asked4 asked6  what client and server say until the server has answered
 * go_round       run by the keeper: counts connections that have ended, frees their places
 * let_go         run by the keeper, too: a server has not answered
 *
 * The listener is an ordinary one, and our kernel does the handshake with the client. What it has
 * then is a request (request_sock), as long as nothing but the handshake has come: the last packet
 * of that is kept from it, as with TCP_DEFER_ACCEPT, but for a second only. The first bytes meet
 * `begin`. If the rules decide on them here, they are kept, and the packet becomes a SYN to the
 * server. The server's answer becomes the acknowledgement with those bytes, and a reset for our own
 * stack, which forgets the request. From then on this is a pair as any other (splice.c).
 *
 * Nobody has acknowledged a byte by then. So all this can be undone until the server has answered:
 * the bytes that were kept go up the stack as if they came just now, and a worker has the
 * connection. Whatever is not certain goes that way from the beginning.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"
#include "splice_ports.h"
#include "splice_socket.h"
#include "splice_valid.h"

#include "express_choosing.h"
#include "express_connect.h"
#include "express_numbers.h"
#include "express_rules.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "it reads the kernel's bit-fields"
#endif

#define NEXT -1 /* TCX_NEXT */
#define DROP 2	/* TCX_DROP */

#define HOPS 64
#define PSH  0x08

#define NS_PER_MS 1000000
/* A server that has refused is not asked again for so long: the worker sees to it meanwhile. */
#define REFUSED_FOR_NS (1 * (__u64)NS_PER_S)
/* Nor one that could not understand the client: it will not be another in a second. */
#define MISMATCHED_FOR_NS (10 * (__u64)NS_PER_S)

#define EEXIST 17 /* errno.h */

#define LEAST_MSS 536 /* RFC 9293, 3.7.1 */

#define PLACES_AT_ONCE 16 /* in one run of `go_round` */

/* On a packet that is for our own stack: it has been looked at already. */
#ifndef FOR_OUR_STACK
#define FOR_OUR_STACK 0x5047
#endif

static int (*redirect_neigh)(__u32 interface, void *next_hop, int bytes,
			     __u64 flags) = (void *)BPF_FUNC_redirect_neigh;
static long (*tail_call)(void *context, void *map, __u32 index) = (void *)BPF_FUNC_tail_call;
static long (*queue_push)(void *map, const void *value,
			  __u64 flags) = (void *)BPF_FUNC_map_push_elem;
static long (*queue_pop)(void *map, void *value) = (void *)BPF_FUNC_map_pop_elem;

#define update_new(fd, key, value) \
	bpf_map_update_elem_((uintptr_t)bpf_pseudo_fd(1, fd), key, value, BPF_NOEXIST)

#define read8(structure, offset)  (*(volatile __u8 *)((void *)(structure) + (offset)))
#define read16(structure, offset) (*(volatile __u16 *)((void *)(structure) + (offset)))
#define read32(structure, offset) (*(volatile __u32 *)((void *)(structure) + (offset)))

/* What was read of a packet. */
struct seen {
	__u32 seq, ack, header, bytes, tsval, tsecr, window;
	__u32 sum; /* enum sum */
	__u8 flags, has_timestamp;
};

#define PF_HEADERS_WORDS (10 + 16)
#define TCP_WORD(v6)	 (IP_BYTES(v6) / 4) /* where TCP's header begins among them */

/* A packet that is made out of another one; of each processor, the stack is too small. */
struct made {
	/* Headers of IP and TCP, with options. */
	__be32 old[PF_HEADERS_WORDS], new[PF_HEADERS_WORDS];
	__u32 source[4], target[4];
	__u32 seq, ack;
	__u16 sport, dport, window; /* the ports in wire order */
	__u8 flags, option_words;
	__be32 option[5];
	__u32 bytes;	    /* of what is saved: all of it, or 0 */
	__u32 sum, old_sum; /* of the payload, as it will be and as it was */
	__u32 known;	    /* enum sum: of the packet's checksum */
	/* What the server's SYN-ACK says. */
	__u32 at, server_mss, server_tsval;
	__u8 has_timestamps, has_scale, scale, padding;
	__u16 urgent, more_padding;
};

/*
 * What one program has found out, for the next: together they would be too much for the verifier.
 * Of each processor; nothing else of ours runs there in between.
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

inlined void count(__u32 what)
{
	__u64 *n = map_lookup(MAP_EXPRESS_COUNTS_FD, &what);

	if (n)
		__sync_fetch_and_add(n, 1);
}

/* 1..most, a power of two, in the verifier's words. The caller has looked. */
inlined __u32 at_least_one(__u32 bytes, __u32 most)
{
	bytes--;
	hide(bytes);
	bytes &= most - 1;
	return bytes + 1;
}

inlined int send_on(__u32 interface)
{
	return interface ? redirect_neigh(interface, NULL, 0, 0) : NEXT;
}

/* What became of a server that was asked for, for who decides which servers rest. */
inlined void opened(__u32 target)
{
	struct express_outcome *outcome = map_lookup(MAP_EXPRESS_OUTCOMES_FD, &target);

	if (!outcome)
		return; /* never */
	__sync_fetch_and_add(&outcome->opened, 1);
	*(volatile __u32 *)&outcome->in_a_row = 0;
}

inlined void failed(__u32 target)
{
	struct express_outcome *outcome = map_lookup(MAP_EXPRESS_OUTCOMES_FD, &target);

	if (!outcome)
		return; /* never */
	__sync_fetch_and_add(&outcome->in_a_row, 1);
	__sync_fetch_and_add(&outcome->failed, 1);
}

/* From one state to another, unless another processor has been quicker, or another connection. */
inlined int change(struct express_ask *ask, __u64 word, __u64 state)
{
	__u64 next = (word & ~(__u64)PF_EXPRESS_STATE_MASK) | state;

	return __sync_val_compare_and_swap(&ask->word, word, next) == word;
}

inlined int is_in(__u64 word, __u64 state)
{
	return (word & PF_EXPRESS_STATE_MASK) == state;
}

/* The place is free again, behind all others that are. No program may have it from before. */
inlined void give_back(struct express_ask *ask, struct splice *splice, __u32 place)
{
	*(volatile __u32 *)&splice->state = PF_SPLICE_FREE;
	*(volatile __u64 *)&ask->word &= ~(__u64)PF_EXPRESS_STATE_MASK;
	queue_push(map_pointer(MAP_EXPRESS_PLACES_FD), &place, 0);
}

/* What comes from there is for the stack, unless another pair has that place by now. */
inlined void forget_flow(struct splice_key *key, __u32 index)
{
	struct splice_flow *flow = map_lookup(MAP_FLOWS_FD, key);

	if (flow && flow->index == index)
		map_delete(MAP_FLOWS_FD, key);
}

inlined void forget_flows(struct splice *splice, __u32 place)
{
	struct splice_key key = splice->way[PF_UP].from;

	forget_flow(&key, place + FIRST_SPLICE);
	key = splice->way[PF_DOWN].from;
	forget_flow(&key, place + FIRST_SPLICE);
}

/*
 * No packet finds the connection any more, whose word is this one. A program that has found it just
 * before may have been stopped in the middle (by the host of a virtual machine, for seconds), and
 * write to the place, or send what it says, when it goes on. So the place is another's when no such
 * program runs any more (`free_left`).
 */
inlined void leave(struct express_ask *ask, struct splice *splice, __u64 word, __u64 now_ns)
{
	*(volatile __u32 *)&splice->state = PF_SPLICE_FREE;
	ask->rests_ns = now_ns;
	change(ask, word, PF_EXPRESS_LEAVING); /* a barrier, too */
}

/* Likewise, by who has made it FILLING, which nobody else changes. */
inlined void leave_at_once(struct express_ask *ask, struct splice *splice, __u32 place, __u64 word)
{
	forget_flows(splice, place);
	/* Behind that: a round that is later has the keeper wait for all that may have found it. */
	leave(ask, splice, (word & ~(__u64)PF_EXPRESS_STATE_MASK) | PF_EXPRESS_FILLING,
	      bpf_ktime_get_ns());
}

inlined __u64 sum_of_address(const __u32 *address, const int v6)
{
	if (!v6)
		return address[3];
	return (__u64)address[0] + address[1] + address[2] + address[3];
}

/* The addresses and ports of a TCP packet; not 0: it is none that is looked at. */
inlined int take_key(struct __sk_buff *skb, struct splice_key *key, const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *four = data + ETHERNET_BYTES;
	struct ipv6 *six = data + ETHERNET_BYTES;
	struct tcp *tcp = data + TCP_AT(v6);

	if (data + HEADERS_BYTES(v6) > data_end)
		return -1; /* never: `ingress` has seen to it */
	if (v6 ? six->next != PROTOCOL_TCP
	       : four->version != 0x45 || four->protocol != PROTOCOL_TCP ||
			    (four->fragment & bpf_htons(0x3fff)))
		return -1;
	take_addresses(key->source, key->target, data + ETHERNET_BYTES, v6);
	key->sport = tcp->sport;
	key->dport = tcp->dport;
	return 0;
}

/*
 * Read a packet whose addresses are known; not 0: it is not whole, or not as a host would take it.
 * Pointers to it are void afterwards.
 */
inlined int look_at(struct __sk_buff *skb, const struct splice_key *key, struct seen *seen,
		    const int v6)
{
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct ipv4 *four = data + ETHERNET_BYTES;
	struct ipv6 *six = data + ETHERNET_BYTES;
	struct tcp *tcp = data + TCP_AT(v6);
	__u32 *word, total, header;

	if (skb->pkt_type != HOST_PACKET || skb->vlan_present)
		return -1;
	if (data + HEADERS_BYTES(v6) > data_end)
		return -1;
	total = v6 ? bpf_ntohs(six->payload_bytes) + IP_BYTES(1) : bpf_ntohs(four->total_bytes);
	header = (__u32)(tcp->offset >> 4) * 4;
	if (header < 20 || total < IP_BYTES(v6) + header || total > skb->len - ETHERNET_BYTES ||
	    (skb->gso_size && total != skb->len - ETHERNET_BYTES) ||
	    (!v6 && !is_whole_header(data + ETHERNET_BYTES)))
		return -1;
	seen->sum = judge_sum(skb, TCP_AT(v6), TCP_AT(v6) + 16, total - IP_BYTES(v6),
			      sum_of_address(key->source, v6) + sum_of_address(key->target, v6) +
				      bpf_htons(PROTOCOL_TCP) +
				      bpf_htons((total - IP_BYTES(v6)) & 0xffff));
	if (seen->sum == PF_SUM_WRONG)
		return -1;
	if (bpf_skb_pull_data(skb, TCP_AT(v6) + header))
		return -1;
	data = (void *)(long)skb->data;
	data_end = (void *)(long)skb->data_end;
	if (data + HEADERS_BYTES(v6) > data_end)
		return -1;
	word = data + TCP_AT(v6);
	seen->seq = bpf_ntohl(word[1]);
	seen->ack = bpf_ntohl(word[2]);
	seen->flags = (bpf_ntohl(word[3]) >> 16) & 0xff;
	seen->window = bpf_ntohl(word[3]) & 0xffff;
	seen->header = header;
	seen->bytes = total - IP_BYTES(v6) - header;
	seen->has_timestamp = 0;
	seen->tsval = seen->tsecr = 0;
	if (header >= 32 && (void *)(word + 8) <= data_end &&
	    word[5] == bpf_htonl(TIMESTAMP_WORD)) {
		seen->has_timestamp = 1;
		seen->tsval = bpf_ntohl(word[6]);
		seen->tsecr = bpf_ntohl(word[7]);
	}
	return 0;
}

/* Nothing is said of the new packet; of the old one what is known of its checksum (enum sum). */
inlined struct made *to_make(__u32 known)
{
	__u32 zero = 0;
	struct made *made = map_lookup(MAP_EXPRESS_MADE_FD, &zero);

	if (!made)
		return NULL;
	/* `make` writes the headers before it reads them. */
	__builtin_memset((void *)made->source, 0,
			 sizeof(*made) - sizeof(made->old) - sizeof(made->new));
	made->known = known;
	return made;
}

inlined void to_server(struct made *made, const struct splice *splice)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		made->source[i] = splice->way[PF_UP].source[i];
		made->target[i] = splice->way[PF_UP].target[i];
	}
	made->sport = splice->way[PF_UP].sport;
	made->dport = splice->way[PF_UP].dport;
}

inlined void from_client(struct made *made, const struct splice *splice,
			 const struct express_ask *ask)
{
	int i;

#pragma unroll
	for (i = 0; i < 4; i++) {
		made->source[i] = splice->way[PF_UP].from.source[i];
		made->target[i] = splice->way[PF_UP].from.target[i];
	}
	made->sport = splice->way[PF_UP].from.sport;
	made->dport = splice->way[PF_UP].from.dport;
	made->seq = ask->c0 + 1;
	made->ack = ask->k0 + 1;
}

/* So many bytes of options of the old packet, 40 at most; not 0: they are not there. */
inlined int load_options(struct __sk_buff *skb, struct made *made, __u32 bytes, const int v6)
{
	__be32 *options = made->old + TCP_WORD(v6) + 5;

	/* Who reads beyond the end reads zeros. */
	__builtin_memset(options, 0, 44);
	bytes = at_least_one(bytes, 64);
	return bpf_skb_load_bytes(skb, OPTIONS_AT(v6), options, bytes > 40 ? 40 : bytes);
}

/*
 * The packet becomes the other one, without the saved bytes, for which there is room then. Right
 * for CHECKSUM_PARTIAL, too: a sum in the packet follows by what changes. Not 0: it failed, and
 * the packet may be anything.
 */
inlined int make(struct __sk_buff *skb, struct made *made, const int v6)
{
	__be32 *old = made->old + TCP_WORD(v6), *new = made->new + TCP_WORD(v6);
	__u32 words, header, bytes = made->bytes, old_bytes, new_bytes;
	__u64 sum = 0, ip_sum = 0, pseudo;
	__u16 old_checksum, checksum;
	int i;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, made->old, IP_BYTES(v6) + 20))
		return -1;
	words = bpf_ntohl(old[3]) >> 28;
	hide(words);
	words &= 15;
	if (words < 5)
		return -1;
	old_checksum = old[4] & 0xffff; /* as it lies in memory */
	header = 20 + (made->option_words & 7) * 4;
	if (header > 40 || bytes > PF_EXPRESS_SAVED)
		return -1;
	new[0] = (__u32)made->sport | (__u32)made->dport << 16;
	new[1] = bpf_htonl(made->seq);
	new[2] = bpf_htonl(made->ack);
	new[3] = bpf_htonl(header << 26 | (__u32)made->flags << 16 | made->window);
	new[4] = bpf_htonl(made->urgent); /* and no checksum so far */
#pragma unroll
	for (i = 0; i < 5; i++)
		new[5 + i] = i < made->option_words ? made->option[i] : 0;

	new_bytes = header + bytes;
	if (v6) {
		old_bytes = bpf_ntohl(made->old[1]) >> 16;
		made->new[0] = bpf_htonl(0x60000000);
		made->new[1] = bpf_htonl(new_bytes << 16 | PROTOCOL_TCP << 8 | HOPS);
#pragma unroll
		for (i = 0; i < 4; i++) {
			made->new[2 + i] = made->source[i];
			made->new[6 + i] = made->target[i];
			ip_sum += (__u64)(__u32)~made->old[2 + i] + made->source[i];
			ip_sum += (__u64)(__u32)~made->old[6 + i] + made->target[i];
		}
		pseudo = ip_sum;
	} else {
		old_bytes = (bpf_ntohl(made->old[0]) & 0xffff) - IP_BYTES(0);
		made->new[0] = bpf_htonl(0x45000000 | (IP_BYTES(0) + new_bytes));
		made->new[1] = bpf_htonl(0x00004000); /* never in pieces */
		made->new[2] = bpf_htonl(HOPS << 24 | PROTOCOL_TCP << 16);
		made->new[3] = made->source[3];
		made->new[4] = made->target[3];
		ip_sum = (__u64)made->new[0] + made->new[1] + made->new[2] + made->new[3] +
			 made->new[4];
		made->new[2] |= (__u32)(__u16)~fold(ip_sum) << 16;
		pseudo = (__u64)(__u32)~made->old[3] + (__u32)~made->old[4] + made->new[3] +
			 made->new[4];
	}
	pseudo += (__u16)~bpf_htons(old_bytes & 0xffff);
	pseudo += bpf_htons(new_bytes & 0xffff);

	/* As in `rewrite` (splice_rewrite.h). */
	if (made->known == PF_SUM_PARTIAL) {
		checksum = fold((__u64)old_checksum + fold(pseudo));
	} else {
		if (words > 5 && load_options(skb, made, (words - 5) * 4, v6))
			return -1;
		old[4] &= bpf_htonl(0xffff); /* but for the checksum */
		sum = (__u32)bpf_csum_diff(old, words * 4, new, header & 63, 0);
		sum += (__u64)made->sum + (__u16)~made->old_sum;
		checksum = made->known == PF_SUM_KNOWN
				   ? (__u16)~fold((__u64)fold(sum) + (__u16)~old_checksum +
						  fold(pseudo))
				   : old_checksum;
	}
	new[4] |= checksum;
	if (bpf_skb_change_tail(skb, TCP_AT(v6) + new_bytes, 0))
		return -1;
	if (header == 40 ? bpf_skb_store_bytes(skb, ETHERNET_BYTES, made->new, IP_BYTES(v6) + 40, 0)
	    : header == 32
		    ? bpf_skb_store_bytes(skb, ETHERNET_BYTES, made->new, IP_BYTES(v6) + 32, 0)
		    : bpf_skb_store_bytes(skb, ETHERNET_BYTES, made->new, IP_BYTES(v6) + 20, 0))
		return -1;
	if (made->known != PF_SUM_OTHER)
		return 0;
	if (bpf_l4_csum_replace(skb, TCP_AT(v6) + 16, 0, fold(sum), 0))
		return -1;
	replace_pseudo(skb, TCP_AT(v6) + 16, fold(pseudo), v6);
	return 0;
}

/* Behind `make`: the bytes that were saved, as many as it has made room for. */
inlined int store_saved(struct __sk_buff *skb, struct express_ask *ask, const struct made *made,
			const int v6)
{
	return bpf_skb_store_bytes(skb, OPTIONS_AT(v6) + (made->option_words & 7) * 4, ask->bytes,
				   at_least_one(made->bytes, PF_EXPRESS_SAVED), 0);
}

/* Likewise those behind the first packet's. */
inlined int store_rest(struct __sk_buff *skb, struct express_ask *ask, const struct made *made,
		       const int v6)
{
	__u32 from = ask->segment;

	hide(from);
	from &= PF_EXPRESS_SAVED / 2 - 1;
	return bpf_skb_store_bytes(skb, OPTIONS_AT(v6) + (made->option_words & 7) * 4,
				   ask->bytes + from,
				   at_least_one(made->bytes, PF_EXPRESS_SAVED / 2), 0);
}

/* A SYN to the server, out of any packet whose payload adds `old_sum`. */
inlined int send_syn(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask,
		     __u32 tsval, __u32 old_sum, __u32 known, const int v6)
{
	struct made *made = to_make(known);

	if (!made)
		return DROP; /* never */
	to_server(made, splice);
	made->seq = ask->i0;
	made->flags = SYN;
	made->option_words = 5;
	made->old_sum = old_sum;
	made->window = ask->window > 65535 ? 65535 : ask->window;
	made->option[0] = bpf_htonl(0x02040000 | ask->mss);
	made->option[1] = bpf_htonl(ask->has_sack ? 0x04020101 : NO_OP_WORD);
	made->option[2] = made->option[3] = bpf_htonl(NO_OP_WORD);
	made->option[4] =
		bpf_htonl(ask->has_scale ? 0x01030300u | (ask->client_scale & 15) : NO_OP_WORD);
	if (ask->has_timestamps) {
		made->option[1] = bpf_htonl(ask->has_sack ? 0x0402080a : TIMESTAMP_WORD);
		made->option[2] = bpf_htonl(tsval + splice->way[PF_UP].tsval_delta);
		made->option[3] = 0;
	}
	if (make(skb, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* the client sends its bytes again, and they become a SYN then */
	}
	return send_on(splice->way[PF_UP].interface);
}

/* What the saved bytes add to a checksum; those behind the end, up to a whole word, are 0. */
inlined __u32 sum_of_saved(struct express_ask *ask, __u32 bytes)
{
	__u32 sum = 0, at, left, i;

	bytes = (bytes + 3) & ~3;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_SAVED / 512; i++) {
		at = i * 512;
		if (at >= bytes)
			break;
		left = bytes - at;
		hide(left);
		if (left > 512)
			left = 512;
		hide(left);
		left &= 1023 & ~3;
		if (left > 512)
			left = 512;
		sum = (__u32)bpf_csum_diff(NULL, 0, (void *)ask->bytes + at, left, sum);
	}
	return fold(sum);
}

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

/* What the rules say of the first bytes. */
int by_rules(struct __sk_buff *skb)
{
	struct express_network_key network = {};
	struct express_listener *listener;
	struct asking *asking = asking_of();
	__u32 at, family, number;
	int said;

	if (!asking)
		return NEXT; /* never */
	listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &asking->listener);
	if (!listener)
		return NEXT;
	family = asking->family;
	asking->table = network.table = listener->table;
	network.prefix_bits = (4 + 1 + 16) * 8;
	network.family = family;
	if (family == 6)
		__builtin_memcpy(network.address, asking->key.source, 16);
	else
		__builtin_memcpy(network.address, &asking->key.source[3], 4);
	at = asking->at;
	said = decide(skb, network.table, &network, at, asking->seen.bytes);
	if (said < 0) {
		count(PF_COUNT_UNDECIDED);
		return NEXT;
	}
	asking->rule = said;
	number = said;
	hide(number);
	number &= PF_EXPRESS_RULES - 1;
	number = listener->target[number];
	if (number & PF_EXPRESS_CHOICE) {
		asking->choice = number & ~PF_EXPRESS_CHOICE;
		tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), PF_EXPRESS_BY_CHOICE);
		return NEXT;
	}
	asking->target = number;
	tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD),
		  family == 6 ? PF_EXPRESS_ASK6 : PF_EXPRESS_ASK4);
	return NEXT;
}

/* The rules have said which upstream. */
int by_choice(struct __sk_buff *skb)
{
	struct asking *asking = asking_of();
	const int v6 = asking && asking->family == 6;

	if (!asking)
		return NEXT; /* never */
	asking->target = choose(asking->choice, asking->key.source, v6);
	tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD),
		  v6 ? PF_EXPRESS_ASK6 : PF_EXPRESS_ASK4);
	return NEXT;
}

/*
 * Read a byte of each of its lines. It was used long ago, and is in no cache: so the lines come all
 * at once, and not one after the other.
 */
#define touch(start, bytes)                                                                   \
	do {                                                                                  \
		__u32 touched;                                                                \
		_Pragma("unroll") for (touched = 0; touched < (bytes); touched += 64)(void) * \
			(volatile __u8 *)((void *)(start) + touched);                         \
	} while (0)

/* The rules have said which server: ask it. */
inlined int ask_server(struct __sk_buff *skb, const int v6)
{
	struct asking *asking = asking_of();
	struct splice_key key;
	struct seen seen;
	struct splice_flow flow = {};
	struct express_listener *listener;
	struct express_target *target;
	struct express_ask *ask;
	struct splice *splice;
	struct splice_direction *way, *back;
	__u32 place = 0, index, number, i, rule, options, out, segment;
	__u64 now_ns, word, secret;
	int said;

	if (!asking)
		return NEXT; /* never */
	listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &asking->listener);
	if (!listener || listener->table != asking->table)
		return NEXT; /* it has got other rules just now */
	key = asking->key;
	seen = asking->seen;
	options = asking->options;
	rule = asking->rule;
	hide(rule);
	rule &= PF_EXPRESS_RULES - 1;
	/* It may have been told another MSS than in `begin`. */
	segment = segment_of(listener);
	if (!fits(seen.bytes, segment)) {
		count(PF_COUNT_LONG);
		return NEXT;
	}
	number = asking->target;
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (!target)
		return NEXT; /* never */
	now_ns = bpf_ktime_get_ns();
	/* Once: the keeper may forget the way meanwhile, and 0 would be a way to `lo`. */
	out = volatile_read(target->out);
	/* From `lo` out would need an answer to `lo` that our stack would not take. */
	if (!out || volatile_read(target->not_before_ns) > now_ns ||
	    (skb->ifindex == LOOPBACK && out != LOOPBACK) || asking->mss < LEAST_MSS ||
	    listener->told_mss > target->mss) {
		count(PF_COUNT_NO_TARGET);
		return NEXT;
	}
	if (queue_pop(map_pointer(MAP_EXPRESS_PLACES_FD), &place)) {
		count(PF_COUNT_NO_PORT);
		return NEXT;
	}
	index = place + FIRST_SPLICE;
	ask = map_lookup(MAP_EXPRESS_ASKS_FD, &place);
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!ask || !splice)
		return NEXT; /* never */
	touch(splice, sizeof(*splice));
	touch(ask, 256);
	/* Ours alone from here on, as long as no packet finds it. */
	word = (ask->word & ~(__u64)PF_EXPRESS_STATE_MASK) + PF_EXPRESS_STATE_MASK + 1;
	*(volatile __u64 *)&ask->word = word | PF_EXPRESS_FILLING;
	ask->begun_ns = now_ns;
	ask->c0 = seen.seq - 1;
	ask->k0 = seen.ack - 1;
	secret = keyed(target->source, target->server, bpf_htons((__u16)(FIRST_PORT + place)),
		       target->port);
	ask->i0 = (__u32)(now_ns >> 6) + (__u32)secret;
	ask->tc = ask->first_tc = seen.tsval;
	ask->tk = seen.tsecr;
	ask->has_scale = !!(options & 0x400);
	ask->has_sack = !!(options & 0x200);
	ask->has_timestamps = seen.has_timestamp;
	ask->client_scale = ask->has_scale ? options & 15 : 0;
	ask->kernel_scale = ask->has_scale ? options >> 4 & 15 : 0;
	ask->window_field = seen.window;
	ask->window = seen.window << (ask->client_scale & 15);
	ask->room = asking->room;
	ask->mss = asking->mss < target->mss ? asking->mss : target->mss;
	ask->told_mss = listener->told_mss;
	ask->answer_ms = listener->answer_ms[rule];
	ask->client_interface = skb->ifindex;
	ask->target = number;
	ask->rule = rule;
	ask->listener_table = listener->table;
	ask->has_fin = seen.flags & FIN;
	bpf_skb_load_bytes(skb, 0, ask->macs, 12);

	/* What is behind the bytes is not summed up with them. */
	ask->saved = seen.bytes;
	{
		__u32 last = (seen.bytes - 1) & (PF_EXPRESS_SAVED - 1) & ~3;

		hide(last);
		last &= PF_EXPRESS_SAVED - 4;
		*(__u32 *)(ask->bytes + last) = 0;
	}
	said = bpf_skb_load_bytes(skb, TCP_AT(v6) + seen.header, ask->bytes,
				  at_least_one(seen.bytes, PF_EXPRESS_SAVED));
	ask->sum = ask->segment_sum = sum_of_saved(ask, seen.bytes);
	ask->segment = segment;
	if (ask->segment < seen.bytes)
		ask->segment_sum = sum_of_saved(ask, ask->segment);
	else
		ask->segment = seen.bytes;

	__builtin_memset(splice->way, 0, sizeof(splice->way));
	way = &splice->way[PF_UP];
	back = &splice->way[PF_DOWN];
	way->from = key;
#pragma unroll
	for (i = 0; i < 4; i++) {
		way->source[i] = back->from.target[i] = target->source[i];
		way->target[i] = back->from.source[i] = target->server[i];
		back->source[i] = key.target[i];
		back->target[i] = key.source[i];
	}
	way->sport = back->from.dport = bpf_htons((__u16)(FIRST_PORT + place));
	way->dport = back->from.sport = target->port;
	back->sport = key.dport;
	back->dport = key.sport;
	way->interface = skb->ifindex == LOOPBACK && out == LOOPBACK ? 0 : out;
	back->interface = skb->ifindex == LOOPBACK ? 0 : skb->ifindex;
	way->by[0] = way->by[1] = skb->ifindex;
	back->by[0] = target->by[0];
	back->by[1] = target->by[1];
	way->pseudo_sum = fold(sum_of_address(key.source, v6) + sum_of_address(key.target, v6) +
			       bpf_htons(PROTOCOL_TCP));
	back->pseudo_sum = fold(sum_of_address(back->from.source, v6) +
				sum_of_address(back->from.target, v6) + bpf_htons(PROTOCOL_TCP));
	/* For each of the two the other way round. */
	i = fold(sum_of_address(target->source, v6) + sum_of_address(target->server, v6));
	number = fold(sum_of_address(key.source, v6) + sum_of_address(key.target, v6));
	way->address_sum = fold((__u64)(__u16)~number + i);
	back->address_sum = fold((__u64)(__u16)~i + number);
	way->seq_delta = ask->i0 - ask->c0;
	way->tsval_delta = (__u32)(now_ns / NS_PER_MS) + (__u32)(secret >> 32) - seen.tsval;
	splice->tries = 0;
	splice->worker = PF_EXPRESS_NO_WORKER;
	splice->slot = splice->last_slot = PF_NO_SLOT;
	splice->reset = 0;
	splice->family = v6 ? 6 : 4;
	splice->out[PF_UP] = skb->ifindex;
	splice->out[PF_DOWN] = out;
	splice->isn[PF_UP] = ask->c0;
	splice->owner = listener->owner;
	splice->keep_idle_s = splice->keep_interval_s = splice->keep_count = 0;
	/* Below 2^53, so that it is exact in a browser, too; no worker counts so far. */
	splice->id = 1ull << PF_EXPRESS_ID_BIT | (__u64)index << 30 | ((word >> 3) & 0x3fffffff);
	*(volatile __u32 *)&splice->state = PF_SPLICE_ASKED;

	mark_port(way->from.dport);
	mark_port(way->sport);
	flow.index = index;
	flow.direction = PF_DOWN;
	key = back->from;
	if (said || update_new(MAP_FLOWS_FD, &key, &flow)) {
		give_back(ask, splice, place);
		count(PF_COUNT_TAKEN_PORT);
		return NEXT;
	}
	flow.direction = PF_UP;
	key = way->from;
	said = update_new(MAP_FLOWS_FD, &key, &flow);
	if (said) {
		leave_at_once(ask, splice, place, word);
		count(PF_COUNT_TAKEN_PORT);
		/* Another processor has its like, which is the one that goes on; or no room. */
		return said == -EEXIST ? DROP : NEXT;
	}
	/* From here on the answers count; what came before is none. */
	__sync_fetch_and_add(&splice->tries, 1);
	*(volatile __u64 *)&ask->word = word | PF_EXPRESS_ASKED;
	count(PF_COUNT_TAKEN);
	return send_syn(skb, splice, ask, seen.tsval, ask->sum, seen.sum, v6);
}

/* A packet of the client's while its server is asked for. */
inlined int wait(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask, __u32 place,
		 __u64 word, const struct seen *seen, const int v6)
{
	if (seen->flags & SYN)
		return NEXT; /* the request is still there */
	if (seen->flags & RST) {
		/*
		 * At the number that comes next, or would if all that was sent had come; other ones
		 * our kernel judges, which takes them for the end of the request or does not. If
		 * that was the client's end, it says so again when it hears from the server.
		 */
		__u32 ahead = seen->seq - ask->c0 - 1;

		if ((ahead && ahead != ask->saved && ahead != ask->saved + !!ask->has_fin) ||
		    !change(ask, word, PF_EXPRESS_FILLING))
			return NEXT;
		leave_at_once(ask, splice, place, word);
		count(PF_COUNT_ENDED);
		return NEXT;
	}
	if (seen->bytes && seen->seq == ask->c0 + 1 && seen->bytes <= PF_EXPRESS_SAVED &&
	    seen->has_timestamp == ask->has_timestamps && seen->ack == ask->k0 + 1) {
		/* It waits: so does the server, perhaps. What has grown meanwhile comes again. */
		__u32 sum;

		/*
		 * The server must not see anything older afterwards; so not either because an old
		 * packet comes late. What the newest one echoes is what the client has heard last:
		 * it takes nothing older than that, and echoes nothing else.
		 */
		if (!before(seen->tsval, ask->tc)) {
			ask->tc = seen->tsval;
			ask->tk = seen->tsecr;
		}
		if (seen->bytes == ask->saved)
			sum = ask->sum;
		else if (seen->bytes == ask->segment)
			sum = ask->segment_sum;
		else {
			/* It has grown meanwhile: our stack takes it as it is, and a worker. */
			if (!change(ask, word, PF_EXPRESS_FILLING))
				return DROP;
			leave_at_once(ask, splice, place, word);
			count(PF_COUNT_LONG);
			return NEXT;
		}
		count(PF_COUNT_ASKED_AGAIN);
		return send_syn(skb, splice, ask, ask->tc, sum, seen->sum, v6);
	}
	return DROP; /* as if it had been lost: it is sent again */
}

/* A packet for our own stack as if it came from the client. */
inlined int to_our_stack(struct __sk_buff *skb, struct express_ask *ask)
{
	__u32 interface = ask->client_interface;

	if (skb->ifindex == interface)
		return NEXT;
	skb->mark = FOR_OUR_STACK;
	if (bpf_skb_store_bytes(skb, 0, ask->macs, 12, 0))
		return DROP;
	return bpf_redirect(interface, BPF_F_INGRESS);
}

/*
 * No server, or a worker has the client: the bytes go to our own stack after all, and a worker sees
 * to it.
 */
inlined int fall_back(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask,
		      __u32 place, __u64 word, __u32 known, int is_worker_s, const int has_failed,
		      const int v6)
{
	struct made *made = to_make(known);
	struct express_target *target;
	__u32 number = ask->target;
	int verdict;

	if (!made || !change(ask, word, PF_EXPRESS_FILLING))
		return DROP; /* the client has ended it just now */
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (target && !is_worker_s)
		*(volatile __u64 *)&target->not_before_ns =
			bpf_ktime_get_ns() + (has_failed ? REFUSED_FOR_NS : MISMATCHED_FOR_NS);
	count(is_worker_s ? PF_COUNT_NO_REQUEST : PF_COUNT_REFUSED);
	if (has_failed)
		failed(number);
	from_client(made, splice, ask);
	made->flags = ACK | PSH | (ask->has_fin ? FIN : 0);
	made->window = ask->window_field;
	made->bytes = ask->saved;
	made->sum = ask->sum;
	if (ask->has_timestamps) {
		made->option_words = 3;
		made->option[0] = bpf_htonl(TIMESTAMP_WORD);
		made->option[1] = bpf_htonl(ask->tc);
		made->option[2] = bpf_htonl(ask->tk);
	}
	verdict = DROP; /* the client sends it again, and the target is not asked then */
	if (make(skb, made, v6) || store_saved(skb, ask, made, v6))
		count(PF_COUNT_FAILED);
	else
		verdict = to_our_stack(skb, ask);
	leave_at_once(ask, splice, place, word);
	return verdict;
}

inlined __u32 option_at(const struct made *made, __u32 at, const int v6)
{
	hide(at);
	at &= 63; /* all of it is in `made` */
	return ((const __u8 *)(made->old + TCP_WORD(v6) + 5))[at];
}

/* What a SYN-ACK agrees to. Its options are in `made->old`; the loop's state is, too, see above. */
inlined void read_options(struct made *made, __u32 header, const int v6)
{
	__u32 end = header - 20, i, kind, length, at;

	*(volatile __u32 *)&made->at = 0;
	made->server_mss = LEAST_MSS;
#pragma clang loop unroll(disable)
	for (i = 0; i < 24; i++) {
		at = volatile_read(made->at);
		if (at >= end || at >= 36)
			break;
		kind = option_at(made, at, v6);
		if (kind == 0)
			break;
		length = 1;
		if (kind != 1) {
			length = option_at(made, at + 1, v6);
			if (length < 2)
				break;
		}
		if (kind == 2)
			made->server_mss =
				option_at(made, at + 2, v6) << 8 | option_at(made, at + 3, v6);
		if (kind == 3) {
			made->has_scale = 1;
			made->scale = option_at(made, at + 2, v6);
		}
		if (kind == 8) {
			made->has_timestamps = 1;
			made->server_tsval = option_at(made, at + 2, v6) << 24 |
					     option_at(made, at + 3, v6) << 16 |
					     option_at(made, at + 4, v6) << 8 |
					     option_at(made, at + 5, v6);
		}
		*(volatile __u32 *)&made->at = at + length;
	}
}

/* A direction as it begins. */
inlined void start(struct splice_direction *way, __u32 said, __u32 heard, __u32 window, __u32 room,
		   __u32 tsval, __u32 now_s)
{
	way->last_ack = heard;
	way->last_end = way->next = way->begin = way->ours = said;
	way->edge = heard + window;
	way->limit = said + room;
	way->reach = room > LEAST_REACH ? room : LEAST_REACH;
	way->tail = heard;
	way->sent = heard;
	way->recent = tsval;
	way->recent_s = way->heard_s = now_s;
	way->heard_tick = (__u32)(bpf_jiffies64() >> 6);
}

inlined void swap_macs(struct __sk_buff *skb)
{
	__u8 macs[12], swapped[12];

	bpf_skb_load_bytes(skb, 0, macs, 12);
	__builtin_memcpy(swapped, macs + 6, 6);
	__builtin_memcpy(swapped + 6, macs, 6);
	bpf_skb_store_bytes(skb, 0, swapped, 12, 0);
}

/*
 * Whether our stack has made a socket of the client's handshake all the same. What came behind the
 * handshake may have passed `begin` on another processor, before the first bytes were taken there.
 */
inlined int has_come_up(struct __sk_buff *skb, const struct splice *splice, const int v6)
{
	struct splice_key from = splice->way[PF_UP].from;
	__u32 state = state_of_socket(skb, &from, v6);

	return state && state != BPF_TCP_NEW_SYN_RECV && state != BPF_TCP_LISTEN &&
	       state != BPF_TCP_TIME_WAIT;
}

/* The server's SYN-ACK. */
inlined int join(struct __sk_buff *skb, struct splice *splice, struct express_ask *ask, __u32 place,
		 __u64 word, const struct seen *seen, const int v6)
{
	struct made *made = to_make(seen->sum);
	struct splice_direction *way = &splice->way[PF_UP], *back = &splice->way[PF_DOWN];
	__u32 options = seen->header - 20, room, tsval, rest, now_s;
	__u8 macs[12], has_scale;
	int is_worker_s;

	if (!made || seen->bytes)
		return DROP; /* with data in it: if it is not repeated without, the keeper gives up
			      */
	if (options && load_options(skb, made, options, v6))
		return DROP;
	read_options(made, seen->header, v6);
	has_scale = made->has_scale;
	tsval = made->server_tsval;
	is_worker_s = has_come_up(skb, splice, v6);
	/*
	 * A window that is never scaled in this packet, and that the client is told of in steps of
	 * our kernel's scale: see `is_coarse`.
	 */
	if (is_worker_s || made->has_timestamps != ask->has_timestamps ||
	    made->server_mss < ask->told_mss || made->scale > 14 ||
	    seen->window >> (ask->kernel_scale & 15) < 2) {
		/*
		 * The ends would not understand each other, or a worker has the client, and may
		 * have said something to it: the server forgets it, too.
		 */
		to_server(made, splice);
		made->seq = ask->i0 + 1;
		made->flags = RST;
		if (make(skb, made, v6))
			return DROP; /* it comes again */
		if (splice->way[PF_UP].interface) {
			swap_macs(skb);
			bpf_clone_redirect(skb, splice->way[PF_UP].interface, 0);
			swap_macs(skb);
		} else {
			bpf_clone_redirect(skb, LOOPBACK, 0);
		}
		return fall_back(skb, splice, ask, place, word, seen->sum, is_worker_s, 0, v6);
	}
	if (!change(ask, word, PF_EXPRESS_FILLING))
		return DROP;

	way->ack_delta = seen->seq - ask->k0;
	back->seq_delta = ask->k0 - seen->seq;
	back->ack_delta = ask->c0 - ask->i0;
	/* So that what the client echoes is what the server has said. */
	back->tsval_delta = ask->tk - tsval;
	back->tsecr_delta = -way->tsval_delta;
	way->tsecr_delta = -back->tsval_delta;
	way->shift_left = ask->client_scale;
	way->shift_right = has_scale ? ask->client_scale : 0;
	back->shift_left = has_scale && ask->has_scale ? made->scale : 0;
	back->shift_right = ask->kernel_scale;
	splice->isn[PF_DOWN] = seen->seq;
	room = ask->room > seen->window ? ask->room : seen->window;
	now_s = bpf_ktime_get_ns() / NS_PER_S;
	start(way, ask->c0 + 1, ask->k0 + 1, ask->window, room, ask->tc, now_s);
	start(back, seen->seq + 1, ask->i0 + 1, seen->window, ask->window, tsval, now_s);
	/* The bytes that go with this packet. */
	way->last_end = way->next = ask->c0 + 1 + ask->saved;
	way->bytes = ask->saved;
	way->packets = ask->segment < ask->saved ? 2 : 1;
	if (ask->has_fin) {
		way->last_end = way->next + 1;
		way->fin_seq = (__u32)way->next + 1;
		way->fin_due = way->fin = 1;
	}
	__sync_fetch_and_add(&splice->tries, 1); /* a barrier: all that before the state */
	*(volatile __u32 *)&splice->state = PF_SPLICE_ACTIVE;
	*(volatile __u64 *)&ask->word = (word & ~(__u64)PF_EXPRESS_STATE_MASK) | PF_EXPRESS_JOINED;
	count(PF_COUNT_COMMITTED);
	opened(ask->target);

	/* Our stack forgets the request. Without options: nothing in it can be too old. */
	from_client(made, splice, ask);
	made->flags = RST | ACK;
	/*
	 * The mark alone is not enough. If somebody in front of `ingress` changes it (or makes a
	 * second packet without), this looks like a reset of the client's, at the number at which
	 * the pair would be reset; the kernel takes it at no other.
	 */
	made->window = FOR_OUR_STACK >> 16;
	made->urgent = FOR_OUR_STACK & 0xffff;
	if (make(skb, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* the client sends its bytes again, which go to the server */
	}
	skb->mark = FOR_OUR_STACK;
	if (ask->client_interface == LOOPBACK) {
		bpf_clone_redirect(skb, LOOPBACK, 0);
	} else {
		/* With another's address it would not be for this host. */
		bpf_skb_load_bytes(skb, 0, macs, 12);
		bpf_skb_store_bytes(skb, 0, ask->macs, 12, 0);
		bpf_clone_redirect(skb, ask->client_interface, BPF_F_INGRESS);
		bpf_skb_store_bytes(skb, 0, macs, 12, 0);
	}
	skb->mark = 0;

	to_server(made, splice);
	made->urgent = 0;
	made->seq = ask->i0 + 1;
	made->ack = seen->seq + 1;
	room = ask->window >> (way->shift_right & 15);
	made->window = room > 65535 ? 65535 : room;
	rest = ask->saved - ask->segment;
	made->flags = ACK | (rest ? 0 : PSH | (ask->has_fin ? FIN : 0));
	made->bytes = ask->segment;
	made->sum = ask->segment_sum;
	if (ask->has_timestamps) {
		made->option_words = 3;
		made->option[0] = bpf_htonl(TIMESTAMP_WORD);
		/* That of the last SYN, or later: older ones are thrown away (PAWS). */
		made->option[1] = bpf_htonl(ask->tc + way->tsval_delta);
		made->option[2] = bpf_htonl(tsval);
	}
	if (make(skb, made, v6) || store_saved(skb, ask, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* likewise */
	}
	/* It came from where these go to; if it did not, the client sends the rest again. */
	if (!rest || (way->interface && skb->ifindex != way->interface))
		return send_on(way->interface);
	if (way->interface)
		swap_macs(skb);
	bpf_clone_redirect(skb, skb->ifindex, 0);
	made->seq += ask->segment;
	made->flags = ACK | PSH | (ask->has_fin ? FIN : 0);
	made->bytes = rest;
	made->old_sum = ask->segment_sum;
	made->sum = fold((__u64)ask->sum + (__u16)~ask->segment_sum);
	if (make(skb, made, v6) || store_rest(skb, ask, made, v6)) {
		count(PF_COUNT_FAILED);
		return DROP; /* likewise */
	}
	return send_on(way->interface);
}

inlined int go_on(struct __sk_buff *skb, const int v6)
{
	struct splice_key key = {};
	struct seen seen = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct express_ask *ask;
	struct splice_direction *way;
	struct made *made;
	__u32 index, place, direction;
	__u64 word;

	if (take_key(skb, &key, v6))
		return NEXT;
	flow = map_lookup(MAP_FLOWS_FD, &key);
	if (!flow)
		return NEXT;
	index = flow->index;
	direction = flow->direction;
	place = index - FIRST_SPLICE;
	splice = map_lookup(MAP_SPLICES_FD, &index);
	ask = map_lookup(MAP_EXPRESS_ASKS_FD, &place);
	if (!splice || !ask)
		return NEXT;
	word = volatile_read(ask->word);
	if (!is_in(word, PF_EXPRESS_ASKED))
		return DROP; /* in this very moment: it is sent again */
	way = direction == PF_UP ? &splice->way[PF_UP] : &splice->way[PF_DOWN];
	if (skb->pkt_type != HOST_PACKET)
		return NEXT; /* the stack has no use for it, either */
	if (!comes_by(way, skb->ifindex) || look_at(skb, &key, &seen, v6))
		return DROP;
	if (direction == PF_UP)
		return wait(skb, splice, ask, place, word, &seen, v6);
	if (seen.flags & RST) {
		if (!(seen.flags & ACK) || seen.ack != ask->i0 + 1)
			return DROP;
		return fall_back(skb, splice, ask, place, word, seen.sum, 0, 1, v6);
	}
	if ((seen.flags & (SYN | ACK)) == (SYN | ACK) && seen.ack == ask->i0 + 1)
		return join(skb, splice, ask, place, word, &seen, v6);
	/*
	 * An old connection of this port is not over there: then the next SYN begins anew. Not if
	 * it acknowledges what we have sent (RFC 9293, 3.10.7.3).
	 */
	if (!(seen.flags & ACK) || seen.bytes || seen.ack == ask->i0 + 1)
		return DROP;
	made = to_make(seen.sum);
	if (!made)
		return DROP; /* never */
	to_server(made, splice);
	made->seq = seen.ack;
	made->flags = RST;
	if (make(skb, made, v6))
		return DROP;
	return send_on(splice->way[PF_UP].interface);
}

int begin4(struct __sk_buff *skb)
{
	return begin(skb, 0);
}

int begin6(struct __sk_buff *skb)
{
	return begin(skb, 1);
}

int ask4(struct __sk_buff *skb)
{
	return ask_server(skb, 0);
}

int ask6(struct __sk_buff *skb)
{
	return ask_server(skb, 1);
}

int asked4(struct __sk_buff *skb)
{
	return go_on(skb, 0);
}

int asked6(struct __sk_buff *skb)
{
	return go_on(skb, 1);
}

/*
 * Run by the keeper (BPF_PROG_TEST_RUN): the connection that has a place is over, or its server has
 * not answered in time, which is not asked until `not_before_ns` then. The place is LEAVING. 0:
 * another has it, or the connection has come further meanwhile.
 */
int let_go(struct __sk_buff *skb)
{
	struct {
		__u32 place, padding;
		__u64 word, not_before_ns;
	} request = {};
	struct express_ask *ask;
	struct express_target *target;
	struct splice *splice;
	__u32 index, number;

	if (bpf_skb_load_bytes(skb, ETHERNET_BYTES, &request, sizeof(request)))
		return 0;
	index = request.place + FIRST_SPLICE;
	ask = map_lookup(MAP_EXPRESS_ASKS_FD, &request.place);
	splice = map_lookup(MAP_SPLICES_FD, &index);
	if (!ask || !splice ||
	    (!is_in(request.word, PF_EXPRESS_ASKED) && !is_in(request.word, PF_EXPRESS_JOINED) &&
	     !is_in(request.word, PF_EXPRESS_RESTING) &&
	     !is_in(request.word, PF_EXPRESS_LEAVING)) ||
	    !change(ask, request.word, PF_EXPRESS_FILLING))
		return 0;
	number = ask->target;
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (is_in(request.word, PF_EXPRESS_ASKED)) {
		count(PF_COUNT_UNANSWERED);
		failed(number);
		if (target)
			*(volatile __u64 *)&target->not_before_ns = request.not_before_ns;
	}
	leave_at_once(ask, splice, request.place, request.word);
	return 1;
}

/* What a direction has carried, by its FIN: programs that met may have stored an older count. */
inlined __u64 carried_bytes(const struct splice_direction *way)
{
	__u64 bytes = way->bytes;

	return bytes + (__u64)(__s64)(__s32)(way->fin_seq - 1 - way->begin - (__u32)bytes);
}

/*
 * Whether the numbers that a server has seen are below those of the next connection: ours rise by
 * one in 64 ns, and its timestamps by one in 1 ms.
 */
inlined int was_slow(const struct express_ask *ask, const struct splice_direction *up, __u64 now_ns)
{
	__u64 age_ns = now_ns - ask->begun_ns;
	__u32 ahead_ms = up->recent - ask->first_tc;

	return (__u64)ahead_ms * NS_PER_MS <= age_ns && up->bytes < age_ns / 65;
}

/* When the end was of a connection that rests. */
inlined __u64 end_of(const struct express_round *round, const struct express_ask *ask,
		     const struct splice *splice)
{
	__u64 ends_ns = ask->rests_ns, told_ns;

	/* What the end itself says (`tell`) may have come a moment after the end was counted. */
	if (splice->worker == PF_EXPRESS_NO_WORKER) {
		told_ns = *(volatile __u64 *)&splice->client_clock;
		if (told_ns > ends_ns && told_ns < round->now_ns)
			ends_ns = told_ns;
	}
	return ends_ns;
}

/* When a connection has rested, no packet finds it any more. */
inlined void leave_rested(struct express_round *round, struct express_ask *ask,
			  struct splice *splice, __u32 place, __u64 word)
{
	__s64 rested_ns = round->now_ns - end_of(round, ask, splice);
	/* What no packet finds any more has lingered before. */
	int is_soon = round->is_short || volatile_read(splice->state) == PF_SPLICE_FREE;
	int is_here = !splice->way[PF_UP].interface && !splice->way[PF_DOWN].interface;
	__u64 least_ns = is_here ? round->least_rest_here_ns : round->least_rest_ns;

	if (!was_slow(ask, &splice->way[PF_UP], round->now_ns))
		least_ns = round->rest_ns;
	if (volatile_read(ask->astray) || rested_ns < (__s64)(is_soon ? least_ns : round->rest_ns))
		return;
	forget_flows(splice, place);
	leave(ask, splice, word, round->now_ns);
	round->leaving++;
}

inlined void free_left(struct express_round *round, struct express_ask *ask, struct splice *splice,
		       __u32 place, __u64 word)
{
	round->leaving++;
	/* To the same state, which is a barrier: not `rests_ns` of before `leave` with that. */
	if (volatile_read(ask->astray) || !change(ask, word, PF_EXPRESS_LEAVING) ||
	    ask->rests_ns > round->passed_ns || !change(ask, word, PF_EXPRESS_FILLING))
		return;
	give_back(ask, splice, place);
	round->leaving--;
	round->freed++;
	round->unused++;
}

/* Count a connection that has ended without a worker, if nobody needs to be told of it alone. */
inlined void count_ended(struct express_round *round, struct express_ask *ask,
			 struct splice *splice, __u64 word)
{
	struct express_end_key key = {};
	struct express_ends *ends;
	__u64 ends_ns;

	if (splice->worker != PF_EXPRESS_NO_WORKER || !splice->id ||
	    ask->counted == (__u32)(word >> 3) ||
	    volatile_read(splice->state) != PF_SPLICE_ACTIVE || !splice->way[PF_UP].fin_acked ||
	    !splice->way[PF_DOWN].fin_acked)
		return;
	key.table = ask->listener_table;
	key.rule = ask->rule;
	key.target = ask->target;
	key.port = splice->way[PF_UP].from.dport;
	ends = map_lookup(MAP_EXPRESS_ENDS_FD, &key);
	if (!ends || ask->begun_ns < ends->since_ns)
		return;
	/* Nobody but the keeper, which runs this, takes a connection from here to anywhere else. */
	ends->pairs++;
	ends->bytes[PF_UP] += carried_bytes(&splice->way[PF_UP]);
	ends->bytes[PF_DOWN] += carried_bytes(&splice->way[PF_DOWN]);
	splice->id = 0;
	/* However late this is: since the end. See `end_of`, too. */
	ends_ns = *(volatile __u64 *)&splice->client_clock;
	ask->rests_ns =
		ends_ns > ask->begun_ns && ends_ns < round->now_ns ? ends_ns : round->now_ns;
	change(ask, word, PF_EXPRESS_RESTING);
	round->counted++;
}

/*
 * Run by the keeper, as often in one call as there are places, by PLACES_AT_ONCE. It never leaves
 * one half done, at whatever moment the keeper is killed.
 */
int go_round(struct __sk_buff *skb)
{
	__u32 zero = 0, place, index, i;
	struct express_round *round = map_lookup(MAP_EXPRESS_ROUND_FD, &zero);
	struct express_ask *ask;
	struct splice *splice;
	__u64 word;

	(void)skb;
	if (!round)
		return 0; /* never */
#pragma clang loop unroll(disable)
	for (i = 0; i < PLACES_AT_ONCE; i++) {
		place = round->next;
		index = place + FIRST_SPLICE;
		ask = map_lookup(MAP_EXPRESS_ASKS_FD, &place);
		if (!ask)
			return 0; /* that was the last */
		round->next = place + 1;
		word = volatile_read(ask->word);
		if (is_in(word, PF_EXPRESS_FREE))
			round->unused++;
		if (!is_in(word, PF_EXPRESS_JOINED) && !is_in(word, PF_EXPRESS_RESTING) &&
		    !is_in(word, PF_EXPRESS_LEAVING))
			continue;
		splice = map_lookup(MAP_SPLICES_FD, &index);
		if (!splice)
			return 0; /* never */
		if (is_in(word, PF_EXPRESS_JOINED))
			count_ended(round, ask, splice, word);
		else if (is_in(word, PF_EXPRESS_RESTING))
			leave_rested(round, ask, splice, place, word);
		else
			free_left(round, ask, splice, place, word);
	}
	return 0;
}
