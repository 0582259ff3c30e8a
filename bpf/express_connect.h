/*
 * What express_connect.c and its keeper share: connections that the kernel opens to a server, in
 * the place of a worker. Data only; pyforwarder/datapath/express/connect_abi.py mirrors it.
 */
#pragma once

#define PF_EXPRESS_RULES 64   /* of a listener */
#define PF_EXPRESS_SAVED 4096 /* bytes of a client's first packet that can be kept */

/* Beside enum pf_splice_state: a server was asked for, and has not answered. */
#define PF_SPLICE_ASKED 5

/* `worker` of a pair that no worker knows of yet: no ring and no counters have that number. */
#define PF_EXPRESS_NO_WORKER 0xfffffffe

/* Set in the id of a pair that the kernel has opened, and in no other; nothing is above it. */
#define PF_EXPRESS_ID_BIT 52

/* The places of the programs that others go on with (PROG_ARRAY). */
#define PF_EXPRESS_BEGIN4    0
#define PF_EXPRESS_BEGIN6    1
#define PF_EXPRESS_ASKED4    2
#define PF_EXPRESS_ASKED6    3
#define PF_EXPRESS_BY_RULES  4
#define PF_EXPRESS_ASK4	     5
#define PF_EXPRESS_ASK6	     6
#define PF_EXPRESS_BY_CHOICE 7
#define PF_EXPRESS_PROGRAMS  8

/* The lower bits of `word`; those above count the connections that have had the place. */
enum pf_express_state {
	PF_EXPRESS_FREE = 0,
	PF_EXPRESS_FILLING, /* by the program that has taken it out of the queue */
	PF_EXPRESS_ASKED,
	PF_EXPRESS_JOINED,
	PF_EXPRESS_RESTING, /* its end is known; what comes late is its own still */
	PF_EXPRESS_LEAVING, /* no packet finds it; a program that has found it may run still */
	PF_EXPRESS_STATE_MASK = 7,
};

enum pf_express_count {
	PF_COUNT_DEFERRED,    /* handshakes whose last packet was kept from the stack */
	PF_COUNT_TAKEN,	      /* a server was asked for */
	PF_COUNT_COMMITTED,   /* and has answered */
	PF_COUNT_REFUSED,     /* or has refused, or the two ends would not understand each other */
	PF_COUNT_UNANSWERED,  /* or has said nothing */
	PF_COUNT_ENDED,	      /* the client has ended it before the server answered */
	PF_COUNT_ASKED_AGAIN, /* SYNs that were sent again */
	/* Left to the ordinary path, and why. */
	PF_COUNT_NO_REQUEST,  /* no handshake is known: SYN cookies, a stray packet, a worker's */
	PF_COUNT_ODD_REQUEST, /* MPTCP, TFO, ECN... */
	PF_COUNT_ODD_NUMBERS, /* not the first bytes behind a handshake */
	PF_COUNT_ODD_PACKET,  /* lengths, flags, options, checksum */
	PF_COUNT_LONG,	      /* more than is kept, or not the last of what was written */
	PF_COUNT_UNDECIDED,   /* by the rules */
	PF_COUNT_NO_TARGET,   /* no way to that server is known, or it has refused just now */
	PF_COUNT_NO_PORT,
	PF_COUNT_TAKEN_PORT, /* of the same connection, by another processor */
	PF_COUNT_FAILED,     /* no memory */
	PF_COUNT_DEVICE,     /* a listener of one device */
	PF_COUNT_SILENT,     /* it has said nothing for a second */
	PF_COUNTS,
};

struct express_listener_key {
	__u32 address[4]; /* as in a splice_key; all zero: any */
	__u16 port;	  /* wire order */
	__u16 padding;
};

struct express_listener {
	__u32 table;	/* of rules */
	__u32 owner;	/* see struct splice */
	__u16 told_mss; /* what our kernel tells clients at most */
	__u16 padding;
	__u32 target[PF_EXPRESS_RULES];	   /* of each: a place in the map of targets, or a choice */
	__u16 answer_ms[PF_EXPRESS_RULES]; /* its server has to answer; 0: as the keeper says */
};

/* A server, and how it is reached. */
struct express_target {
	__u32 source[4], server[4];
	__u16 port; /* wire order */
	__u16 mss;  /* what our interfaces can carry */
	__u32 out;  /* the interface; 0: this is no target */
	__u32 by[2];
	__u32 padding;
	__u64 not_before_ns; /* it has refused, or not answered: until then it is not asked */
};

/* A place: record `first + place` of the splices, port `first_port + place` of ours. */
struct express_ask {
	__u64 word;
	__u64 begun_ns;
	__u64 rests_ns;	  /* since when, if it does; or leaves */
	__u32 c0, k0, i0; /* first numbers: the client's, our kernel's, ours to the server */
	__u32 tc, tk;	  /* timestamps of the client's packet: its own, and the one it echoes */
	__u32 sum;	  /* of the saved bytes, folded */
	__u32 saved;
	/* The number of the last connection that a worker has counted, or was told of the end of
	 * alone; the keeper's. */
	__u32 counted;
	__u32 window; /* of the client, in bytes */
	__u32 room;   /* that our kernel has told the client of */
	__u32 client_interface;
	__u32 target, listener_table, rule;
	__u32 segment;	   /* of the saved bytes, those in the first of two packets, or all */
	__u32 segment_sum; /* of these */
	__u32 first_tc;	   /* as `tc` was when the server was asked first */
	__u32 port_lost;   /* not 0: another program may have the port; the keeper's */
	__u16 window_field, mss, told_mss, answer_ms;
	__u8 client_scale, kernel_scale, has_timestamps, has_sack, has_scale, has_fin;
	__u8 macs[12]; /* of the client's packet */
	__u8 padding[6];
	__u8 bytes[PF_EXPRESS_SAVED];
};

/*
 * Ends that nobody needs to be told of one by one: those of all connections that have this in
 * common. The keeper makes an entry, and takes what is in it: only then are they a worker's.
 */
struct express_end_key {
	__u32 table, rule, target;
	__u32 port; /* of the listener, in wire order */
};

struct express_ends {
	__u64 since_ns; /* connections that have begun before are not among them */
	__u64 round;	/* another one, each time a worker has been told of them */
	__u64 pairs;
	__u64 bytes[2]; /* index: PF_UP, PF_DOWN */
};

/* A walk of `go_round` through all places, as the keeper wants it. */
struct express_round {
	__u64 now_ns;
	/* No program runs any more that ran when the walk of that `now_ns`, or one before, ended.
	 */
	__u64 passed_ns;
	/* While places are short, of `lo` and of other interfaces; and else. */
	__u64 least_rest_here_ns, least_rest_ns, rest_ns;
	__u32 next; /* the place to go on with */
	__u32 is_short;
	__u32 counted, freed, unused; /* so far */
	__u32 leaving;		      /* places that are, as far as it has come */
};
