/*
 * The rules of a listener as a table, which express_rules.h shares with userspace. Data only;
 * pyforwarder/datapath/express/abi.py mirrors it. pyforwarder/core/express/ makes the tables, and
 * describes in Python what the program does with them.
 *
 * Each condition of the rules is a bit. Two sets of bits say what is known of a packet: the
 * conditions that hold, and those that fail. A condition in neither set is unknown.
 */
#pragma once

#define PF_EXPRESS_VERSION 1

#define PF_EXPRESS_BYTES	4096 /* of a first packet that are read */
#define PF_EXPRESS_NAME_BYTES	128  /* of a server name or host */
#define PF_EXPRESS_EXTENSIONS	32   /* of a ClientHello */
#define PF_EXPRESS_ALPN_NAMES	16
#define PF_EXPRESS_ALPN_BYTES	32   /* of a protocol name that rules compare */
#define PF_EXPRESS_HEAD_BYTES	1024 /* of the head of a request, the empty line included */
#define PF_EXPRESS_METHOD_BYTES 24   /* of a request's method */
#define PF_EXPRESS_METHODS	16
#define PF_EXPRESS_CLAUSES	64
#define PF_EXPRESS_PREFIXES	64
#define PF_EXPRESS_WORDS	8 /* of 8 bytes: the part of a packet that prefixes compare */

/* Where a name was read (`kind` of a key). */
#define PF_EXPRESS_IN_HELLO   1
#define PF_EXPRESS_IN_REQUEST 2
#define PF_EXPRESS_IN_ALPN    3

/* The states of the automaton for a request's head that the program knows by name. */
#define PF_EXPRESS_NO_REQUEST 0
#define PF_EXPRESS_UNKNOWN    1
#define PF_EXPRESS_READ	      3 /* the last final state: reading stops at states up to this */
#define PF_EXPRESS_START      4
#define PF_EXPRESS_METHOD     5
#define PF_EXPRESS_LINE	      18 /* the first state behind the request line */
#define PF_EXPRESS_HOST	      29
#define PF_EXPRESS_STATES     64
#define PF_EXPRESS_CLASSES    32

struct express_grammar {
	__u8 class[256];
	__u8 following[PF_EXPRESS_STATES * PF_EXPRESS_CLASSES];
};

/* One alternative of a condition on fixed bytes, in memory order. */
struct express_prefix {
	__u64 bit;
	__u64 value[PF_EXPRESS_WORDS], mask[PF_EXPRESS_WORDS];
	__u32 end; /* offset in the packet behind its last byte */
	__u32 padding;
};

/* The rule takes a connection if all conditions in `holds` hold, and all in `fails` fail. */
struct express_clause {
	__u64 holds, fails;
	__u32 rule;
	__u32 padding;
};

struct express_method {
	__u64 bits; /* of the conditions that this method fulfils */
	__u32 bytes;
	__u8 text[PF_EXPRESS_METHOD_BYTES];
	__u32 padding;
};

struct express_table {
	__u64 targets; /* bits of the rules whose server the program can connect to */
	__u64 hello;   /* from here on bits of conditions; this one: a ClientHello begins */
	__u64 server_names, alpn, hosts, networks, prefixes, requests;
	__u64 any_method; /* those of `requests` that accept any method */
	__u32 most_bytes; /* a longer first packet is left to userspace */
	__u32 clause_count, prefix_count, method_count;
	struct express_method method[PF_EXPRESS_METHODS];
	struct express_clause clause[PF_EXPRESS_CLAUSES];
	struct express_prefix prefix[PF_EXPRESS_PREFIXES];
};

/*
 * Key of the map of names (LPM_TRIE), whose values are the bits of the conditions that such a name
 * fulfils. A name is stored backwards, so that a domain suffix is a prefix; a whole name ends in a
 * NUL. A protocol name (ALPN), which may contain any bytes, is stored forwards, behind its length.
 */
struct express_name_key {
	__u32 prefix_bits;
	__u32 table;
	__u8 kind;
	__u8 name[PF_EXPRESS_NAME_BYTES + 1];
	__u8 padding[2];
};

/* Key of the map of networks (LPM_TRIE), likewise. */
struct express_network_key {
	__u32 prefix_bits;
	__u32 table;
	__u8 family; /* 4 or 6 */
	__u8 address[16];
	__u8 padding[3];
};
