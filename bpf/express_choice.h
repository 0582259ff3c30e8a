/*
 * What express_choosing.h and userspace share: among which servers of an upstream the program
 * chooses. Data only; pyforwarder/datapath/express/choice_abi.py mirrors it.
 *
 * A choice is written at a number that no listener refers to, and stays as it is while one does:
 * where something has changed the listener is given another number.
 */
#pragma once

#define PF_EXPRESS_TURNS   256 /* of a round */
#define PF_EXPRESS_SERVERS 64  /* of which one is chosen by the client's address */

/* In `target` of a listener: what is below is the number of a choice. */
#define PF_EXPRESS_CHOICE 0x80000000u

/* Logarithms to the base 2, in units of 2^-32; between two steps there are straight lines. */
#define PF_EXPRESS_LOG_STEPS 256
#define PF_EXPRESS_LOG_ERROR 16384 /* of which no logarithm is further off */

enum pf_express_choice {
	PF_EXPRESS_NO_CHOICE = 0,
	PF_EXPRESS_IN_TURN,
	PF_EXPRESS_BY_CLIENT,
};

struct express_drawing {
	__u64 seed;
	__u32 target, weight; /* a place in the map of targets; at least 1 */
};

struct express_choice {
	__u64 turn; /* counted by all processors */
	__u32 kind, count;
	__u32 in_turn[PF_EXPRESS_TURNS]; /* targets */
	struct express_drawing drawing[PF_EXPRESS_SERVERS];
};

struct express_logs {
	__u64 of[PF_EXPRESS_LOG_STEPS + 1]; /* of 1 + n/256 */
};

/* By target: what became of connections, as far as all is well counted up to 2^32. */
struct express_outcome {
	__u32 opened, failed;
	__u32 in_a_row; /* have failed, since one was opened */
	__u32 padding;
};
