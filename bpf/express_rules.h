/*
 * Which rule takes a connection, by its first packet. pyforwarder/core/express/reading.py describes
 * in the same order what is read here, and what is left to userspace.
 *
 * Only what is certain is decided here. A message that is incomplete, or has an unusual form, is
 * left to userspace, whose parsers know all forms.
 *
 * The verifier walks every iteration of a loop. Therefore the variables of a loop are in a map
 * (`scratch`): the verifier knows no value of these, so all iterations look the same to it, and it
 * walks the body once.
 */
#pragma once

#include "express.h"
#include "maps.h"
#include "splice_packet.h"

#define RECORD_HEADER  5
#define MESSAGE_HEADER 4
#define HANDSHAKE      22
#define CLIENT_HELLO   1
#define MAX_FRAGMENT   (1 << 14)

#define SERVER_NAME	   0
#define ALPN		   16
#define SUPPORTED_VERSIONS 43

/* One per processor; no other program of this type preempts the one that uses it. */
struct express_scratch {
	__u8 bytes[PF_EXPRESS_BYTES + 64];
	struct express_name_key name;
	__u64 holds, fails; /* conditions that hold and that fail, as bits */
	__u64 offered;	    /* conditions that a protocol in the ClientHello's ALPN list fulfils */
	__u64 there[PF_EXPRESS_WORDS]; /* of the first bytes: a 1 for each bit that was received */
	__u32 size, name_at, name_bytes;
	/* For read_hello(): the types of the extensions so far, and where these two are. */
	__u32 kinds[PF_EXPRESS_EXTENSIONS];
	__u32 at, server_name_at, server_name_bytes, alpn_at, alpn_bytes;
	/* For read_request(): where each state was entered last, and how often. */
	__u32 last[PF_EXPRESS_STATES], count[PF_EXPRESS_STATES];
};

enum hello {
	PF_NO_HELLO,
	PF_SHORT_HELLO,	   /* too few bytes to tell */
	PF_UNREAD_HELLO,   /* a ClientHello, of which nothing else is known */
	PF_NAMELESS_HELLO, /* without a server name */
	PF_NAMED_HELLO,
};

enum request {
	PF_NO_REQUEST,
	PF_UNKNOWN_REQUEST,
	PF_REQUEST,	 /* only its method is known */
	PF_HOST_REQUEST, /* its method and its host are known */
};

/* A byte of the packet; the index is bounded for the verifier. */
inlined __u32 byte_at(const struct express_scratch *scratch, __u32 at)
{
	barrier_var(at);
	at &= PF_EXPRESS_BYTES - 1;
	return scratch->bytes[at];
}

/* A 16-bit number of the packet, in network byte order. */
inlined __u32 uint16_at(const struct express_scratch *scratch, __u32 at)
{
	return byte_at(scratch, at) << 8 | byte_at(scratch, at + 1);
}

/*
 * Copy a name into the key: backwards, in lower case, without a final dot. Returns 0; not 0: the
 * name has no valid length.
 */
inlined int take_name(struct express_scratch *scratch, __u32 table, __u32 kind)
{
	struct express_name_key *key = &scratch->name;
	__u32 bytes = scratch->name_bytes, last = scratch->name_at + bytes - 1, i;
	__u64 byte;

	if (bytes == 0 || bytes > PF_EXPRESS_NAME_BYTES)
		return -1;
	if (byte_at(scratch, last) == '.') {
		bytes--;
		last--;
	}
	if (bytes == 0)
		return -1;
	scratch->name_bytes = bytes;
	__builtin_memset(key, 0, sizeof(*key));
	key->prefix_bits = (4 + 1 + bytes + 1) * 8;
	key->table = table;
	key->kind = kind;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_NAME_BYTES; i++) {
		if (i >= READ_ONCE(scratch->name_bytes))
			break;
		/*
		 * A capital letter: neither difference is negative. A branch would multiply the
		 * verifier's paths.
		 */
		byte = byte_at(scratch, last - i);
		key->name[i] = byte | ~((byte - 'A') | ('Z' - byte)) >> 63 << 5;
	}
	return 0;
}

/*
 * Find the only host name of a server_name extension. Returns 0; not 0: the extension has another
 * form (RFC 6066, 3).
 */
inlined int find_server_name(struct express_scratch *scratch)
{
	__u32 at = scratch->server_name_at, length = scratch->server_name_bytes;
	__u32 bytes, i;
	__u64 byte, bad = 0;

	if (length < 5 || uint16_at(scratch, at) != length - 2 || byte_at(scratch, at + 2) != 0)
		return -1;
	bytes = uint16_at(scratch, at + 3);
	if (bytes != length - 5 || bytes == 0 || bytes > PF_EXPRESS_NAME_BYTES)
		return -1;
	scratch->name_at = at + 5;
	scratch->name_bytes = bytes;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_NAME_BYTES; i++) {
		if (i >= READ_ONCE(scratch->name_bytes))
			break;
		/* The sign of either difference; a branch would multiply the verifier's paths. */
		byte = byte_at(scratch, at + 5 + i);
		bad |= (byte - 0x21) | (0x7e - byte);
	}
	return bad >> 63 ? -1 : 0;
}

/* Look up the bits of the conditions that a protocol name of `bytes` bytes at `at` fulfils. */
inlined __u64 ask_for_protocol(struct express_scratch *scratch, __u32 table, __u32 at, __u32 bytes)
{
	struct express_name_key *key = &scratch->name;
	__u64 *bits;
	__u32 i;

	__builtin_memset(key, 0, sizeof(*key));
	key->prefix_bits = (4 + 1 + 1 + bytes) * 8;
	key->table = table;
	key->kind = PF_EXPRESS_IN_ALPN;
	key->name[0] = bytes;
	scratch->name_bytes = bytes;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_ALPN_BYTES; i++) {
		if (i >= READ_ONCE(scratch->name_bytes))
			break;
		key->name[i + 1] = byte_at(scratch, at + i);
	}
	bits = map_lookup(MAP_EXPRESS_NAMES_FD, key);
	return bits ? *bits : 0;
}

/*
 * Whether an ALPN extension is a valid list of names (RFC 7301, 3.1); the conditions that they
 * fulfil are added to `offered`.
 */
inlined int is_alpn(struct express_scratch *scratch, const struct express_table *table, __u32 index)
{
	__u32 at = scratch->alpn_at, length = scratch->alpn_bytes, end = at + length, bytes;
	int i;

	if (length < 2 || uint16_at(scratch, at) != length - 2)
		return 0;
	scratch->at = at + 2;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_ALPN_NAMES; i++) {
		at = scratch->at;
		if (at == end)
			return 1;
		bytes = byte_at(scratch, at);
		if (bytes == 0 || at + 1 + bytes > end)
			return 0;
		if (table->alpn && bytes <= PF_EXPRESS_ALPN_BYTES)
			scratch->offered |= ask_for_protocol(scratch, index, at + 1, bytes);
		scratch->at = at + 1 + bytes;
	}
	return scratch->at == end;
}

/*
 * Read a ClientHello (RFC 8446, 4.1.2). Its server name, if it has one, is left in `name_at` and
 * `name_bytes`, the conditions on ALPN that hold in `offered`.
 */
inlined enum hello read_hello(struct express_scratch *scratch, const struct express_table *table,
			      __u32 index, __u32 size)
{
	__u32 at, end, kind, length, round, i, seen;
	__u64 twice;

	if (byte_at(scratch, 0) != HANDSHAKE || (size > 1 && byte_at(scratch, 1) != 3) ||
	    (size > 2 && byte_at(scratch, 2) > 4))
		return PF_NO_HELLO;
	length = uint16_at(scratch, 3);
	if (size > 4 && (length == 0 || length > MAX_FRAGMENT))
		return PF_NO_HELLO;
	if (size > RECORD_HEADER && byte_at(scratch, RECORD_HEADER) != CLIENT_HELLO)
		return PF_NO_HELLO;
	if (size <= RECORD_HEADER)
		return PF_SHORT_HELLO;
	at = RECORD_HEADER + MESSAGE_HEADER;
	if (size < at)
		return PF_UNREAD_HELLO;
	end = at + (byte_at(scratch, 6) << 16 | uint16_at(scratch, 7));
	/* The ClientHello continues in another record, or in another packet. */
	if (end > RECORD_HEADER + length || end > size)
		return PF_UNREAD_HELLO;
	at += 2 + 32; /* version, random */
	if (at + 1 > end || byte_at(scratch, at) > 32)
		return PF_UNREAD_HELLO;
	at += 1 + byte_at(scratch, at); /* session id */
	if (at + 2 > end)
		return PF_UNREAD_HELLO;
	at += 2 + uint16_at(scratch, at); /* cipher suites */
	if (at + 1 > end)
		return PF_UNREAD_HELLO;
	at += 1 + byte_at(scratch, at); /* compression methods */
	if (at == end)
		return PF_NAMELESS_HELLO;
	if (at + 2 > end || at + 2 + uint16_at(scratch, at) != end)
		return PF_UNREAD_HELLO;
	at += 2;
	scratch->server_name_at = scratch->alpn_at = 0;
	scratch->at = at;
#pragma clang loop unroll(disable)
	for (round = 0; round < PF_EXPRESS_EXTENSIONS; round++) {
		at = scratch->at;
		if (at >= end)
			break;
		if (at + 4 > end)
			return PF_UNREAD_HELLO;
		kind = uint16_at(scratch, at);
		length = uint16_at(scratch, at + 2);
		at += 4;
		if (at + length > end)
			return PF_UNREAD_HELLO;
		twice = 0;
#pragma clang loop unroll(disable)
		for (i = 0; i < PF_EXPRESS_EXTENSIONS; i++) {
			seen = round;
			barrier_var(seen);
			if (i >= seen)
				break;
			twice |= ((__u64)scratch->kinds[i] ^ kind) -
				 1; /* negative if the two are equal */
		}
		if (twice >> 63)
			return PF_UNREAD_HELLO;
		scratch->kinds[round] = kind;
		if (kind == SERVER_NAME) {
			scratch->server_name_at = at;
			scratch->server_name_bytes = length;
		} else if (kind == ALPN) {
			scratch->alpn_at = at;
			scratch->alpn_bytes = length;
		} else if (kind == SUPPORTED_VERSIONS &&
			   (length == 0 || byte_at(scratch, at) != length - 1 ||
			    byte_at(scratch, at) % 2)) {
			return PF_UNREAD_HELLO;
		}
		scratch->at = at + length;
	}
	if (scratch->at != end || (scratch->alpn_at && !is_alpn(scratch, table, index)))
		return PF_UNREAD_HELLO;
	if (!scratch->server_name_at)
		return PF_NAMELESS_HELLO;
	return find_server_name(scratch) ? PF_UNREAD_HELLO : PF_NAMED_HELLO;
}

/*
 * Read the head of an HTTP request (RFC 9112, 2 to 5). pyforwarder/core/express/request_grammar.py
 * has written the automaton into a map: the next state by state and class of byte.
 */
inlined enum request read_request(struct express_scratch *scratch)
{
	__u32 zero = 0, i, state = PF_EXPRESS_START, class, at, bytes, end;
	const struct express_grammar *grammar = map_lookup(MAP_EXPRESS_GRAMMAR_FD, &zero);

	if (!grammar)
		return PF_UNKNOWN_REQUEST; /* never */
	scratch->count[PF_EXPRESS_METHOD] = scratch->count[PF_EXPRESS_HOST] = 0;
	scratch->last[PF_EXPRESS_HOST] = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_HEAD_BYTES; i++) {
		if (i >= READ_ONCE(scratch->size))
			break;
		class = grammar->class[scratch->bytes[i]] & (PF_EXPRESS_CLASSES - 1);
		/*
		 * The verifier of Linux 6.1 derives no bound from the `|` of a constant and a
		 * number.
		 */
		at = state * PF_EXPRESS_CLASSES + class;
		barrier_var(at);
		at &= PF_EXPRESS_STATES * PF_EXPRESS_CLASSES - 1;
		state = grammar->following[at];
		state &= PF_EXPRESS_STATES - 1;
		scratch->last[state] = i;
		scratch->count[state]++;
		if (state <= PF_EXPRESS_READ)
			break;
	}
	bytes = scratch->count[PF_EXPRESS_METHOD];
	if (state == PF_EXPRESS_NO_REQUEST || bytes > PF_EXPRESS_METHOD_BYTES)
		return PF_NO_REQUEST;
	if (state == PF_EXPRESS_UNKNOWN || (state > PF_EXPRESS_READ && state < PF_EXPRESS_LINE))
		return PF_UNKNOWN_REQUEST;
	end = scratch->last[PF_EXPRESS_HOST] + 1;
	scratch->name_bytes = scratch->count[PF_EXPRESS_HOST];
	scratch->name_at = end - scratch->name_bytes;
	/* In other forms the request target may name another host than the Host header. */
	if (state != PF_EXPRESS_READ || byte_at(scratch, bytes + 1) != '/' ||
	    (bytes == 7 && byte_at(scratch, 0) == 'C' && byte_at(scratch, 1) == 'O' &&
	     byte_at(scratch, 2) == 'N' && byte_at(scratch, 3) == 'N'))
		return PF_REQUEST;
	return PF_HOST_REQUEST;
}

/* The bits of the conditions on requests that this method fulfils. */
inlined __u64 fulfilled(const struct express_scratch *scratch, const struct express_table *table)
{
	__u64 bits = table->any_method;
	__u32 i, j, bytes = scratch->count[PF_EXPRESS_METHOD], differs;

#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_METHODS; i++) {
		if (i >= READ_ONCE(table->method_count))
			break;
		differs = 0;
#pragma clang loop unroll(disable)
		for (j = 0; j < PF_EXPRESS_METHOD_BYTES; j++) {
			if (j >= READ_ONCE(scratch->count[PF_EXPRESS_METHOD]))
				break;
			differs |= table->method[i].text[j] ^ scratch->bytes[j];
		}
		differs |= table->method[i].bytes ^ bytes;
		bits |= differs ? 0 : table->method[i].bits;
	}
	return bits;
}

/*
 * Compare the packet with fixed bytes: an alternative is excluded by the first byte that differs.
 */
inlined void look_for_bytes(struct express_scratch *scratch, const struct express_table *table)
{
	const __u64 *packet = (const __u64 *)scratch->bytes;
	__u64 holds = 0, possible = 0, differs;
	__u32 i, j, bytes, size = READ_ONCE(scratch->size);

#pragma unroll
	for (j = 0; j < PF_EXPRESS_WORDS; j++) {
		bytes = size > 8 * j ? size - 8 * j : 0;
		scratch->there[j] = bytes >= 8 ? ~0ULL : ((1ULL << (8 * bytes)) - 1);
	}
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_PREFIXES; i++) {
		if (i >= READ_ONCE(table->prefix_count))
			break;
		differs = 0;
#pragma unroll
		for (j = 0; j < PF_EXPRESS_WORDS; j++)
			differs |= (packet[j] ^ table->prefix[i].value[j]) &
				   table->prefix[i].mask[j] & READ_ONCE(scratch->there[j]);
		if (differs)
			continue;
		possible |= table->prefix[i].bit;
		if (READ_ONCE(scratch->size) >= table->prefix[i].end)
			holds |= table->prefix[i].bit;
	}
	scratch->holds |= holds;
	scratch->fails |= table->prefixes & ~possible;
}

/*
 * The index of the rule that takes a connection whose first bytes are at `at`. -1: userspace must
 * decide. `network` has the client's address.
 */
inlined int decide(struct __sk_buff *skb, __u32 index, struct express_network_key *network,
		   __u32 at, __u32 size)
{
	struct express_table *table = map_lookup(MAP_EXPRESS_TABLES_FD, &index);
	__u32 zero = 0, i, load;
	struct express_scratch *scratch = map_lookup(MAP_EXPRESS_SCRATCH_FD, &zero);
	enum hello hello;
	enum request request;
	__u64 *bits, holds;

	if (!table || !scratch || size == 0 || size > PF_EXPRESS_BYTES || size > table->most_bytes)
		return -1;
	/* Bounded to 1..PF_EXPRESS_BYTES for the verifier. */
	load = size - 1;
	barrier_var(load);
	load &= PF_EXPRESS_BYTES - 1;
	if (bpf_skb_load_bytes(skb, at, scratch->bytes, load + 1))
		return -1;

	scratch->size = size;
	scratch->holds = scratch->fails = scratch->offered = 0;
	if (table->networks) {
		bits = map_lookup(MAP_EXPRESS_NETWORKS_FD, network);
		holds = bits ? *bits & table->networks : 0;
		scratch->holds |= holds;
		scratch->fails |= table->networks & ~holds;
	}
	if (table->prefixes)
		look_for_bytes(scratch, table);
	if (table->hello | table->server_names | table->alpn) {
		hello = read_hello(scratch, table, index, size);
		if (hello == PF_NO_HELLO)
			scratch->fails |= table->hello | table->server_names | table->alpn;
		else if (hello != PF_SHORT_HELLO)
			scratch->holds |= table->hello;
		if (hello == PF_NAMELESS_HELLO || hello == PF_NAMED_HELLO) {
			holds = scratch->offered & table->alpn;
			scratch->holds |= holds;
			scratch->fails |= table->alpn & ~holds;
		}
		if (hello == PF_NAMELESS_HELLO)
			scratch->fails |= table->server_names;
		if (hello == PF_NAMED_HELLO && table->server_names &&
		    !take_name(scratch, index, PF_EXPRESS_IN_HELLO)) {
			bits = map_lookup(MAP_EXPRESS_NAMES_FD, &scratch->name);
			holds = bits ? *bits & table->server_names : 0;
			scratch->holds |= holds;
			scratch->fails |= table->server_names & ~holds;
		}
	}
	if (table->requests | table->hosts) {
		request = read_request(scratch);
		if (request == PF_NO_REQUEST)
			scratch->fails |= table->requests | table->hosts;
		else if (request != PF_UNKNOWN_REQUEST) {
			holds = fulfilled(scratch, table);
			scratch->holds |= holds;
			scratch->fails |= table->requests & ~holds;
		}
		if (request == PF_HOST_REQUEST && table->hosts &&
		    !take_name(scratch, index, PF_EXPRESS_IN_REQUEST)) {
			bits = map_lookup(MAP_EXPRESS_NAMES_FD, &scratch->name);
			holds = bits ? *bits & table->hosts : 0;
			scratch->holds |= holds;
			scratch->fails |= table->hosts & ~holds;
		}
	}
#pragma clang loop unroll(disable)
	for (i = 0; i < PF_EXPRESS_CLAUSES; i++) {
		const struct express_clause *clause = &table->clause[i];

		if (i >= READ_ONCE(table->clause_count))
			break;
		if ((clause->holds & scratch->fails) | (clause->fails & scratch->holds))
			continue;
		if ((clause->holds & ~scratch->holds) | (clause->fails & ~scratch->fails))
			return -1; /* it may match: no later rule may win now */
		if (clause->rule > 63 || !(table->targets >> clause->rule & 1))
			return -1;
		return (int)clause->rule;
	}
	return -1;
}
