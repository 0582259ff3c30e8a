/*
 * Which servers of an upstream the program chooses among, shared by express_choosing.h and
 * userspace. Data only; pyforwarder/datapath/express/choice_abi.py mirrors it.
 *
 * A choice is written at an index that no listener refers to, and does not change while a listener
 * refers to it: after a change the listener gets another index.
 */
#pragma once

#define PF_EXPRESS_TURNS   256 /* targets of a round */
#define PF_EXPRESS_SERVERS 64  /* servers of which one is chosen by the client's address */

/* Flag in `target` of a listener: the lower bits are the index of a choice. */
#define PF_EXPRESS_CHOICE 0x80000000u

/* Logarithms to the base 2, in units of 2^-32, interpolated linearly between the steps. */
#define PF_EXPRESS_LOG_STEPS 256
#define PF_EXPRESS_LOG_ERROR 16384 /* bound of the error of a logarithm */

enum pf_express_choice {
	PF_EXPRESS_NO_CHOICE = 0,
	PF_EXPRESS_IN_TURN,
	PF_EXPRESS_BY_CLIENT,
};

struct express_drawing {
	__u64 seed;
	__u32 target, weight; /* index in the map of targets; a weight of at least 1 */
};

struct express_choice {
	__u64 turn; /* incremented by all processors */
	__u32 kind, count;
	__u32 in_turn[PF_EXPRESS_TURNS]; /* targets */
	struct express_drawing drawing[PF_EXPRESS_SERVERS];
};

struct express_logs {
	__u64 of[PF_EXPRESS_LOG_STEPS + 1]; /* of[n] is the logarithm of 1 + n/256 */
};

/* By target: outcomes of connections, as counters that wrap at 2^32. */
struct express_outcome {
	__u32 opened, failed;
	__u32 in_a_row; /* failed since the last one was opened */
	__u32 padding;
};
