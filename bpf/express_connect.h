/*
 * Connections that the kernel opens to a server in place of a worker: records shared by
 * express_connect.c and its keeper. Data only; pyforwarder/datapath/express/connect_abi.py mirrors
 * it.
 */
#pragma once

#define PF_EXPRESS_RULES 64   /* of a listener */
#define PF_EXPRESS_SAVED 4096 /* bytes of a client's first packet that can be saved */

/* Places that one run of `go_round` handles. */
#define PF_EXPRESS_PLACES_AT_ONCE 16

/*
 * Sizes of two records that programs hand on to each other, and the keeper never reads: struct
 * request_context (express_begin.h) and struct new_packet (express_make.h). It makes the maps.
 */
#define PF_EXPRESS_CONTEXT_BYTES    128
#define PF_EXPRESS_NEW_PACKET_BYTES 308

/* `worker` of a pair that no worker knows of yet: no ring and no counters have that number. */
#define PF_EXPRESS_NO_WORKER 0xfffffffe

/* The highest bit of an id; set only for pairs that the kernel has opened. */
#define PF_EXPRESS_ID_BIT 52

/* Indexes of the programs in the PROG_ARRAY, for tail calls. */
#define PF_EXPRESS_BEGIN4    0
#define PF_EXPRESS_BEGIN6    1
#define PF_EXPRESS_ASKED4    2
#define PF_EXPRESS_ASKED6    3
#define PF_EXPRESS_BY_RULES  4
#define PF_EXPRESS_ASK4	     5
#define PF_EXPRESS_ASK6	     6
#define PF_EXPRESS_BY_CHOICE 7

/*
 * State of a place: the lower bits of `word`. The bits above count the connections that the place
 * has had.
 */
enum pf_express_state {
	PF_EXPRESS_FREE = 0,
	PF_EXPRESS_FILLING, /* owned by the program that has taken it from the queue */
	PF_EXPRESS_ASKED,
	PF_EXPRESS_JOINED,
	PF_EXPRESS_RESTING, /* the connection has ended; late packets are still matched to it */
	PF_EXPRESS_LEAVING, /* no packet finds it; a program that has may still run */
	PF_EXPRESS_STATE_MASK = 7,
};

enum pf_express_count {
	PF_COUNT_DEFERRED,    /* handshakes whose last packet was withheld from the stack */
	PF_COUNT_TAKEN,	      /* a server was asked (SYN) */
	PF_COUNT_COMMITTED,   /* the server has answered */
	PF_COUNT_REFUSED,     /* it has refused, or its options do not fit those of the client */
	PF_COUNT_UNANSWERED,  /* it has not answered in time */
	PF_COUNT_ENDED,	      /* the client has reset it before the server answered */
	PF_COUNT_ASKED_AGAIN, /* SYNs that were retransmitted */
	/* Connections left to the stack and a worker, by cause. */
	PF_COUNT_NO_REQUEST,  /* no request_sock: SYN cookies, a stray packet, or a worker has it */
	PF_COUNT_ODD_REQUEST, /* MPTCP, TFO, ECN... */
	PF_COUNT_ODD_NUMBERS, /* not the first sequence numbers behind a handshake */
	PF_COUNT_ODD_PACKET,  /* lengths, flags, options, checksum */
	PF_COUNT_LONG,	      /* more than can be saved, or without PSH: more bytes follow */
	PF_COUNT_UNDECIDED,   /* the rules cannot be decided here */
	PF_COUNT_NO_TARGET,   /* no route to the server is known, or it has just refused */
	PF_COUNT_NO_PORT,
	/* Another processor is opening the same connection, or another pair has the port. */
	PF_COUNT_TAKEN_PORT,
	PF_COUNT_FAILED, /* no memory */
	PF_COUNT_DEVICE, /* a listener that is bound to a device */
	PF_COUNT_SILENT, /* the client has sent no byte for a second */
	PF_COUNTS,
};

struct express_listener_key {
	__u32 address[4]; /* as in a splice_key; all zero: any */
	__u16 port;	  /* wire order */
	__u16 padding;
};

struct express_listener {
	__u32 table;	      /* number of its table of rules */
	__u32 owner;	      /* see struct splice */
	__u16 advertised_mss; /* largest MSS that our kernel advertises to clients */
	__u16 padding;
	__u32 target[PF_EXPRESS_RULES];	   /* of each rule: index of a target, or of a choice */
	__u16 answer_ms[PF_EXPRESS_RULES]; /* time for its server to answer; 0: the keeper's */
};

/* A server, and how it is reached. */
struct express_target {
	__u32 source[4], server[4];
	__u16 port; /* wire order */
	__u16 mss;  /* what fits the MTU of our interfaces */
	__u32 out;  /* the interface; 0: the entry is unused */
	__u32 from_interfaces[2];
	__u32 padding;
	__u64 not_before_ns; /* after a refusal, or no answer, it is not asked until then */
};

/*
 * A place: record FIRST_SPLICE + place of the map `splices`, and local port FIRST_PORT + place. The
 * client's first bytes are in a map of their own, so that all of these lie close together:
 * `go_round` walks over them up to fifty times a second.
 */
struct express_ask {
	__u64 word;
	__u64 begun_ns;
	__u64 resting_since_ns; /* since when it is RESTING or LEAVING */
	__u32 client_isn, kernel_isn,
		own_isn; /* ISNs: the client's, our kernel's to the client, ours to the server */
	__u32 client_tsval, client_tsecr; /* TSval and TSecr of the client's packet */
	__u32 saved_sum;		  /* checksum of the saved bytes, folded */
	__u32 saved_bytes;
	/*
	 * Number of the last connection of this place whose end a worker has counted, or was told
	 * of by itself. Written by the keeper.
	 */
	__u32 counted_number;
	__u32 client_window; /* window of the client, in bytes */
	__u32 kernel_window; /* window that our kernel has advertised to the client */
	__u32 client_interface;
	__u32 target, listener_table, rule;
	__u32 first_segment_bytes; /* how many of the saved bytes go into the first of two packets;
				      or all */
	__u32 first_segment_sum;   /* checksum of these */
	__u32 first_client_tsval;  /* `client_tsval` when the server was asked for the first time */
	__u32 port_lost; /* not 0: another program may have the port; written by the keeper */
	__u16 window_field, mss, advertised_mss, answer_ms;
	__u8 client_scale, kernel_scale, has_timestamps, has_sack, has_scale, has_fin;
	__u8 macs[12]; /* addresses in the Ethernet header of the client's packet */
	__u8 padding[6];
};

/*
 * Sums over ended connections that need no report of their own: all with this key in common. The
 * keeper creates an entry, and takes the sums out of it; only then does a worker count them.
 */
struct express_end_key {
	__u32 table, rule, target;
	__u32 port; /* port of the listener, in wire order */
};

struct express_ends {
	__u64 since_ns; /* connections that began before are not in it */
	__u64 round;	/* a new number each time that the sums were reported to a worker */
	__u64 pairs;
	__u64 bytes[2]; /* index: PF_UP, PF_DOWN */
};

/* Parameters and results of a walk of `go_round` over all places. */
struct express_round {
	__u64 now_ns;
	/*
	 * Every program that ran when the walk with this `now_ns`, or an earlier one, ended has
	 * returned since.
	 */
	__u64 passed_ns;
	/*
	 * How long places rest: while places are short, with both ends on `lo`, and with others;
	 * and otherwise.
	 */
	__u64 least_rest_here_ns, least_rest_ns, rest_ns;
	__u32 next; /* the place to continue with */
	__u32 is_short;
	__u32 counted, freed, unused; /* results so far */
	__u32 leaving;		      /* places that are LEAVING, among those walked so far */
};
