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
 * connection. All that is not certain goes that way from the beginning.
 */
#include <uapi/linux/bpf.h>

#include "abi.h"
#include "express_ask.h"
#include "express_begin.h"
#include "express_choosing.h"
#include "express_connect.h"
#include "express_join.h"
#include "express_make.h"
#include "express_places.h"
#include "express_read.h"
#include "express_round.h"
#include "express_rules.h"
#include "express_wait.h"
#include "maps.h"
#include "splice.h"
#include "splice_packet.h"
#include "splice_valid.h"
#include "splice_verdicts.h"

#define PLACES_AT_ONCE 16 /* in one run of `go_round` */

/* What the rules say of the first bytes. */
int by_rules(struct __sk_buff *skb)
{
	struct express_network_key network = {};
	struct express_listener *listener;
	struct asking *asking = asking_of();
	__u32 at, family, number, six, address[4];
	const __u32 *source;
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
	/* Without a branch, or the verifier goes through all rules twice. */
	six = -(((family ^ 6) - 1) >> 31);
	source = asking->key.source;
	address[0] = (source[0] & six) | (source[3] & ~six);
	address[1] = source[1] & six;
	address[2] = source[2] & six;
	address[3] = source[3] & six;
	__builtin_memcpy(network.address, address, 16);
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

/*
 * Run by the keeper, as often in one call as there are places, by PLACES_AT_ONCE. It never leaves
 * one half done, no matter when the keeper is killed.
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
