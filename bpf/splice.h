/*
 * What splice.c and its keeper share. Data only; pyforwarder/datapath/splice_abi.py mirrors it.
 */
#pragma once

enum pf_splice_state {
	PF_SPLICE_FREE = 0,
	PF_SPLICE_HOLD,	  /* bytes that come are dropped, and come again; our sockets talk */
	PF_SPLICE_MUTE,	  /* our sockets do not either: for the moment of one look */
	PF_SPLICE_ACTIVE, /* end to end */
	PF_SPLICE_RESET,  /* our sockets may send their last word, a RST */
};

#define PF_SPLICE_ODD 3

/* Why `control` did not let a pair begin, as bits. */
#define PF_BUSY_GONE	1
#define PF_BUSY_UNREAD	2
#define PF_BUSY_UNACKED 4

/* The addresses of packets that come from one peer, in wire order. Key of the map `flows`. */
struct splice_key {
	__u32 source, target;
	__u16 sport, dport;
};

struct splice_flow {
	__u32 index; /* into the map `splices` */
	__u32 direction;
};

/* What is done to packets that come from one peer: PF_UP from the client, PF_DOWN from the server.
 */
struct splice_direction {
	struct splice_key from;
	__u32 source, target; /* the new addresses, in wire order */
	__u16 sport, dport;
	__u32 interface; /* where they go; 0: they are for this host, on the interface they came by
			  */
	__u32 seq_delta, ack_delta, tsval_delta, tsecr_delta;
	__u32 last_ack; /* the highest acknowledgement this peer has sent, in its own numbers */
	__u32 last_end; /* the end of what this peer has sent, in its own numbers */
	__u32 fin_seq;	/* the number behind its FIN */
	__u32 fin;	/* not 0: it has sent one */
	__u32 fin_acked;
	__u8 shift_left, shift_right; /* of its windows */
	__u16 padding;
	__u32 reserved;
};

struct splice {
	struct splice_direction way[2]; /* index: PF_UP, PF_DOWN */
	__u64 id;			/* of the pair */
	__u64 tries;
	__u32 state; /* enum pf_splice_state */
	__u32 worker;
	__u32 slot;  /* into the map `pairs`, where the bytes are counted */
	__u32 reset; /* 1: by the client, 2: by the server, PF_SPLICE_ODD: unknown TCP options */
	__u32 client_clock, server_clock; /* our sockets' timestamp clocks, right before control */
};

struct splice_event {
	__u32 index;
	__u32 worker;
	__u64 id;
};

struct splice_look {
	__u32 rcv_nxt, write_seq, ts_recent;
};
