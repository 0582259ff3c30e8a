/*
 * Connections that are decided by their first packet, and opened, in the kernel. The programs of
 * splice.c tail-call these (BPF_MAP_TYPE_PROG_ARRAY) with packets of no known pair, and with those
 * of pairs whose server was asked and has not answered.
 *
 * begin4 begin6   the first bytes of a client: do they follow a handshake?
 * by_rules        which rule takes the connection
 * by_choice       which of an upstream's servers is next, if there are several
 * ask4 ask6       a SYN to that server
 * asked4 asked6   packets of client and server until the server has answered
 * go_round        run by the keeper: counts connections that have ended, frees their places
 * end_connection  run by the keeper as well: ends a connection whose server has not answered
 *
 * The listener is an ordinary one, and the kernel does the handshake with the client. It has only a
 * request (request_sock) for the client as long as nothing but the handshake has arrived: the last
 * packet of the handshake is withheld from it, as with TCP_DEFER_ACCEPT, but for a second only. The
 * first bytes are handled by `begin4` or `begin6`. If the rules can be decided here, the bytes are
 * saved, and the packet becomes a SYN to the server. The server's answer becomes the
 * acknowledgement with those bytes, and a reset for our own stack, which drops the request. From
 * then on this is a pair as any other (splice.c).
 *
 * By then no byte has been acknowledged. So all this can be undone until the server has answered:
 * the saved bytes go up the stack as if they had just arrived, and a worker gets the connection.
 * Every uncertain connection takes that path from the beginning.
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

/*
 * Decide which rule takes the connection, and tail-call the program that asks the rule's server.
 * Returns NEXT if the rules cannot be decided here: a worker gets the connection.
 */
int by_rules(struct __sk_buff *skb)
{
	struct express_network_key network = {};
	struct express_listener *listener;
	struct request_context *context = get_context();
	__u32 at, family, number, six, address[4];
	const __u32 *source;
	int result;

	if (!context)
		return NEXT; /* never */
	listener = map_lookup(MAP_EXPRESS_LISTENERS_FD, &context->listener);
	if (!listener)
		return NEXT;
	family = context->family;
	context->table = network.table = listener->table;
	network.prefix_bits = (4 + 1 + 16) * 8;
	network.family = family;
	/* Without a branch: otherwise the verifier walks all rules twice. */
	six = -(((family ^ 6) - 1) >> 31);
	source = context->key.source;
	address[0] = (source[0] & six) | (source[3] & ~six);
	address[1] = source[1] & six;
	address[2] = source[2] & six;
	address[3] = source[3] & six;
	__builtin_memcpy(network.address, address, 16);
	at = context->at;
	result = decide(skb, network.table, &network, at, context->parsed.bytes);
	if (result < 0) {
		count_event(PF_COUNT_UNDECIDED);
		return NEXT;
	}
	context->rule = result;
	number = result;
	barrier_var(number);
	number &= PF_EXPRESS_RULES - 1;
	number = listener->target[number];
	if (number & PF_EXPRESS_CHOICE) {
		context->choice = number & ~PF_EXPRESS_CHOICE;
		tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD), PF_EXPRESS_BY_CHOICE);
		return NEXT;
	}
	context->target = number;
	tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD),
		  family == 6 ? PF_EXPRESS_ASK6 : PF_EXPRESS_ASK4);
	return NEXT;
}

/* Choose a server of the rule's upstream, and tail-call the program that asks it. */
int by_choice(struct __sk_buff *skb)
{
	struct request_context *context = get_context();
	const int v6 = context && context->family == 6;

	if (!context)
		return NEXT; /* never */
	context->target = choose(context->choice, context->key.source, v6);
	tail_call(skb, map_pointer(MAP_EXPRESS_PROGRAMS_FD),
		  v6 ? PF_EXPRESS_ASK6 : PF_EXPRESS_ASK4);
	return NEXT;
}

/*
 * Handle a packet of client or server until the server has answered.
 *
 * Returns NEXT: for our own stack. DROP: invalid, or repeated by its sender. Or the verdict of a
 * redirect.
 */
inlined int handle_while_asked(struct __sk_buff *skb, const int v6)
{
	struct splice_key key = {};
	struct parsed_segment parsed = {};
	struct splice_flow *flow;
	struct splice *splice;
	struct express_ask *ask;
	struct splice_direction *from_peer;
	struct new_packet *packet;
	__u32 index, place, direction;
	__u64 word;

	if (parse_addresses(skb, &key, v6))
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
	word = READ_ONCE(ask->word);
	if (!has_state(word, PF_EXPRESS_ASKED))
		return DROP; /* another processor is changing the state: the sender repeats it */
	from_peer = direction == PF_UP ? &splice->direction[PF_UP] : &splice->direction[PF_DOWN];
	if (skb->pkt_type != HOST_PACKET)
		return NEXT; /* the stack discards it, too */
	if (!may_arrive_by(from_peer, skb->ifindex) || parse_segment(skb, &key, &parsed, v6))
		return DROP;
	if (direction == PF_UP)
		return handle_client_while_asked(skb, splice, ask, place, word, &parsed, v6);
	if (parsed.flags & RST) {
		if (!(parsed.flags & ACK) || parsed.ack != ask->own_isn + 1)
			return DROP;
		return give_to_worker(skb, splice, ask, place, word, parsed.sum, 0, 1, v6);
	}
	if ((parsed.flags & (SYN | ACK)) == (SYN | ACK) && parsed.ack == ask->own_isn + 1)
		return join_pair(skb, splice, ask, place, word, &parsed, v6);
	/*
	 * The server still has an old connection of this port. Reset it, so that the next SYN
	 * begins a new one. Not if the packet acknowledges what we have sent (RFC 9293, 3.10.7.3).
	 */
	if (!(parsed.flags & ACK) || parsed.bytes || parsed.ack == ask->own_isn + 1)
		return DROP;
	packet = new_packet(parsed.sum);
	if (!packet)
		return DROP; /* never */
	address_to_server(packet, splice);
	packet->seq = parsed.ack;
	packet->flags = RST;
	if (build_packet(skb, packet, v6))
		return DROP;
	return forward_by(splice->direction[PF_UP].interface);
}

/*
 * The first bytes of a client. Two programs, as every function is compiled once for IPv4 and once
 * for IPv6.
 */
int begin4(struct __sk_buff *skb)
{
	return check_first_bytes(skb, 0);
}

int begin6(struct __sk_buff *skb)
{
	return check_first_bytes(skb, 1);
}

/* A SYN to the chosen server, likewise. */
int ask4(struct __sk_buff *skb)
{
	return ask_server(skb, 0);
}

int ask6(struct __sk_buff *skb)
{
	return ask_server(skb, 1);
}

/* A packet of client or server until the server has answered, likewise. */
int asked4(struct __sk_buff *skb)
{
	return handle_while_asked(skb, 0);
}

int asked6(struct __sk_buff *skb)
{
	return handle_while_asked(skb, 1);
}

/*
 * Run by the keeper (BPF_PROG_TEST_RUN): end the connection of a place, because it is over, or
 * because its server has not answered in time; that server is not asked again before
 * `not_before_ns`. The place becomes LEAVING.
 *
 * Returns 1; 0 if the place has another connection, or the state has changed meanwhile.
 */
int end_connection(struct __sk_buff *skb)
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
	    (!has_state(request.word, PF_EXPRESS_ASKED) &&
	     !has_state(request.word, PF_EXPRESS_JOINED) &&
	     !has_state(request.word, PF_EXPRESS_RESTING) &&
	     !has_state(request.word, PF_EXPRESS_LEAVING)) ||
	    !change_state(ask, request.word, PF_EXPRESS_FILLING))
		return 0;
	number = ask->target;
	target = map_lookup(MAP_EXPRESS_TARGETS_FD, &number);
	if (has_state(request.word, PF_EXPRESS_ASKED)) {
		count_event(PF_COUNT_UNANSWERED);
		count_failed(number);
		if (target)
			WRITE_ONCE(target->not_before_ns, request.not_before_ns);
	}
	abandon_place(ask, splice, request.place, request.word);
	return 1;
}

/*
 * Run by the keeper (BPF_PROG_TEST_RUN with `repeat`): handle the next PF_EXPRESS_PLACES_AT_ONCE
 * places. A place is never left half changed, whenever the keeper is killed.
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
	for (i = 0; i < PF_EXPRESS_PLACES_AT_ONCE; i++) {
		place = round->next;
		index = place + FIRST_SPLICE;
		ask = map_lookup(MAP_EXPRESS_ASKS_FD, &place);
		if (!ask)
			return 0; /* that was the last place */
		round->next = place + 1;
		word = READ_ONCE(ask->word);
		if (has_state(word, PF_EXPRESS_FREE))
			round->unused++;
		if (!has_state(word, PF_EXPRESS_JOINED) && !has_state(word, PF_EXPRESS_RESTING) &&
		    !has_state(word, PF_EXPRESS_LEAVING))
			continue;
		splice = map_lookup(MAP_SPLICES_FD, &index);
		if (!splice)
			return 0; /* never */
		if (has_state(word, PF_EXPRESS_JOINED))
			count_ended(round, ask, splice, word);
		else if (has_state(word, PF_EXPRESS_RESTING))
			end_resting(round, ask, splice, place, word);
		else
			free_after_leaving(round, ask, splice, place, word);
	}
	return 0;
}
