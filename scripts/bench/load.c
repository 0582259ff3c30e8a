// SPDX-License-Identifier: MIT
/*
 * load: both ends of every measurement, in one process.
 *
 * In C because on a small machine the ends share the CPUs with what they measure: a connection
 * costs a Python loop about as much as it costs HAProxy, so half of every ratio would be the
 * generator's own cost.  One process for client and server, so that both read the same clock and
 * bytes can be counted where they arrive, not where they disappear into a kernel queue.  It may
 * stand in two network namespaces at once: a socket stays in the namespace it was made in.
 *
 * usage: load MODE [key=value]...      modes and keys: see `modes` and `keys` at the end
 * Each report is one line of JSON on stdout.  Exit 1 with words on stderr when a connection could
 * not be made or broke; numbers of a broken run are never printed.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S	  1000000000ULL
#define NS_PER_MS	  1000000ULL
#define HEADER_BYTES	  16	       /* what a client sends first, and the server echoes */
#define MESSAGE_BYTES	  64	       /* a request of the connection modes */
#define MOST_REQUEST	  2048	       /* one that is read from a file */
#define VARIED_BYTES	  8	       /* of it: no two clients say the same */
#define CHUNK_BYTES	  (128 * 1024) /* one send or recv of a bulk stream */
#define PACE_CHUNK_BYTES  (64 * 1024)  /* one burst of a paced stream */
#define DELAY_CHUNK_BYTES (16 * 1024)  /* what gets one time stamp in mode `delay` */
#define ACK		  "06OK56"
#define ACK_BYTES	  6
#define PATIENCE_S	  10  /* a peer that is silent for that long is broken */
#define SOAK_STRIDE	  128 /* bytes between two soakers' counters: two cache lines */

struct options {
	const char *client_ns, *server_ns;    /* paths of namespaces; "-": the one we are in */
	uint32_t to_ip, source_ip, server_ip; /* host order; the first of `*_count` addresses */
	uint32_t to_count, source_count, server_count;
	uint16_t to_port, server_port;
	double seconds, warm_up_s, calibrate_s, quiet_s;
	double bytes_per_s, connections_per_s, datagrams_per_s; /* 0: as fast as it goes */
	uint64_t cap_bytes, answer_bytes; /* answer_bytes: to one request of mode connect */
	int pairs, trips, client_cpu, server_cpu, datagram_bytes;
	bool down; /* bytes flow from server to client */
	bool server_closes, instruction;
	bool waits; /* sessions talk until the caller has seen enough */
	const char *soak_file;
	const char *request_file; /* what a client of mode connect says; 64 bytes of no meaning */
	size_t vary_at; /* where VARIED_BYTES of it are others in each connection; 0: nowhere */
};

struct pair {
	int client, server;
};

static struct options opt = {
	.client_ns = "-",
	.server_ns = "-",
	.to_count = 1,
	.source_count = 1,
	.server_count = 1,
	.seconds = 1,
	.warm_up_s = 0.2,
	.calibrate_s = 0.5,
	.quiet_s = 0.5,
	.cap_bytes = 1ULL << 30,
	.answer_bytes = MESSAGE_BYTES,
	.pairs = 1,
	.trips = 8,
	.datagram_bytes = MESSAGE_BYTES,
	.client_cpu = -1,
	.server_cpu = -1,
};

static atomic_bool stop;
static int listener_fd = -1, client_ns_fd = -1;

static void __attribute__((noreturn, format(printf, 1, 2))) die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("load: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	va_end(arguments);
	/* not exit(): other threads may be running */
	_exit(1);
}

static void die_errno(const char *what)
{
	die("%s: %s", what, strerror(errno));
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static void sleep_until_ns(uint64_t when_ns)
{
	struct timespec when = { (time_t)(when_ns / NS_PER_S), (long)(when_ns % NS_PER_S) };

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR)
		;
}

static void sleep_s(double seconds)
{
	sleep_until_ns(now_ns() + (uint64_t)(seconds * NS_PER_S));
}

static void *reserve(size_t count, size_t size)
{
	void *memory = calloc(count ? count : 1, size);

	if (!memory)
		die("out of memory");
	return memory;
}

static pthread_t start(void *(*run)(void *), void *argument)
{
	pthread_t thread;

	errno = pthread_create(&thread, NULL, run, argument);
	if (errno)
		die_errno("pthread_create");
	return thread;
}

static void stay_on_cpu(int cpu)
{
	cpu_set_t set;

	if (cpu < 0)
		return;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		die_errno("sched_setaffinity");
}

/* ---- samples ---------------------------------------------------------------------------- */

struct samples {
	uint64_t *ns;
	size_t count, room;
};

static void add_sample(struct samples *samples, uint64_t ns)
{
	if (samples->count == samples->room) {
		samples->room = samples->room ? samples->room * 2 : 1 << 16;
		samples->ns = realloc(samples->ns, samples->room * sizeof(*samples->ns));
		if (!samples->ns)
			die("out of memory");
	}
	samples->ns[samples->count++] = ns;
}

static int compare_u64(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

/* The nearest-rank percentile of sorted samples, in microseconds. */
static double percentile_us(const struct samples *samples, double percent)
{
	size_t rank = (size_t)(percent / 100 * (double)samples->count + 0.999999);

	if (rank > samples->count)
		rank = samples->count;
	return (double)samples->ns[rank ? rank - 1 : 0] / 1e3;
}

/* `name` is put in front of what they are called. */
static void print_samples(struct samples *samples, const char *name)
{
	if (!samples->count)
		die("not one round was completed in the window");
	qsort(samples->ns, samples->count, sizeof(*samples->ns), compare_u64);
	printf("\"%scount\": %zu, \"%sp50_us\": %.3f, \"%sp99_us\": %.3f, \"%smax_us\": %.3f", name,
	       samples->count, name, percentile_us(samples, 50), name, percentile_us(samples, 99),
	       name, percentile_us(samples, 100));
}

/* ---- sockets ---------------------------------------------------------------------------- */

static struct sockaddr_in address_of(uint32_t first_ip, uint32_t count, uint16_t port, uint64_t n)
{
	return (struct sockaddr_in){
		.sin_family = AF_INET,
		.sin_port = htons(port),
		.sin_addr.s_addr = htonl(first_ip + (uint32_t)(n % count)),
	};
}

static void set_option(int fd, int level, int name, int value)
{
	if (setsockopt(fd, level, name, &value, sizeof(value)))
		die_errno("setsockopt");
}

static void set_patience(int fd)
{
	struct timeval patience = { .tv_sec = PATIENCE_S };

	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience)) ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)))
		die_errno("setsockopt");
}

static void set_blocking(int fd, bool blocking)
{
	int flags = fcntl(fd, F_GETFL);

	if (flags < 0 || fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK))
		die_errno("fcntl");
}

static int open_namespace(const char *path)
{
	int fd;

	if (!strcmp(path, "-"))
		return -1;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		die("%s: %s", path, strerror(errno));
	return fd;
}

static void enter_namespace(int fd)
{
	if (fd >= 0 && setns(fd, CLONE_NEWNET))
		die_errno("setns");
}

/* Makes the listener in the server's namespace, then stays in the client's for good. */
static void take_places(void)
{
	struct sockaddr_in any = {
		.sin_family = AF_INET,
		.sin_port = htons(opt.server_port),
		.sin_addr.s_addr = htonl(INADDR_ANY), /* many server addresses, one listener */
	};
	int server_ns_fd = open_namespace(opt.server_ns);

	client_ns_fd = open_namespace(opt.client_ns);
	enter_namespace(server_ns_fd);
	listener_fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener_fd < 0)
		die_errno("socket");
	set_option(listener_fd, SOL_SOCKET, SO_REUSEADDR, 1);
	set_option(listener_fd, IPPROTO_TCP, TCP_NODELAY, 1); /* accepted sockets inherit it */
	if (bind(listener_fd, (struct sockaddr *)&any, sizeof(any)) || listen(listener_fd, 4096))
		die_errno("the server's port");
	enter_namespace(client_ns_fd);
}

static int client_socket(uint64_t n)
{
	struct sockaddr_in source = address_of(opt.source_ip, opt.source_count, 0, n);
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die_errno("socket");
	if (opt.source_ip) {
		/* the port is chosen by connect, which knows the other side: more of them */
		set_option(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1);
		if (bind(fd, (struct sockaddr *)&source, sizeof(source)))
			die_errno("a client's source address");
	}
	set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
	return fd;
}

static void send_all(int fd, const void *data, size_t size)
{
	const char *next = data;

	while (size) {
		ssize_t sent = send(fd, next, size, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			die_errno("send");
		next += sent;
		size -= (size_t)sent;
	}
}

static void receive_all(int fd, void *data, size_t size, const char *who)
{
	ssize_t got = recv(fd, data, size, MSG_WAITALL);

	if (got < 0)
		die("%s waits for %zu bytes: %s", who, size, strerror(errno));
	if ((size_t)got != size)
		die("%s got %zd of %zu bytes and then the end", who, got, size);
}

/*
 * Makes `opt.pairs` connections whose both ends are ours, each proven by round trips: a forwarder
 * may accept long before it connects.  Enough trips also bring a pair past a forwarder's
 * threshold for short connections, so that what is measured is its lasting state.
 */
static struct pair *make_pairs(void)
{
	struct pair *pairs = reserve((size_t)opt.pairs, sizeof(*pairs));
	char sent[HEADER_BYTES], got[HEADER_BYTES];

	set_patience(listener_fd);
	for (int i = 0; i < opt.pairs; i++) {
		struct sockaddr_in to =
			address_of(opt.to_ip, opt.to_count, opt.to_port, (uint64_t)i);
		int fd = client_socket((uint64_t)i);

		set_patience(fd);
		if (connect(fd, (struct sockaddr *)&to, sizeof(to)))
			die("pair %d of %d: connect: %s", i, opt.pairs, strerror(errno));
		snprintf(sent, sizeof(sent), "pfb %011d", i);
		pairs[i].client = fd;
		pairs[i].server = -1;
		for (int trip = 0; trip < opt.trips; trip++) {
			send_all(fd, sent, sizeof(sent));
			if (pairs[i].server < 0) {
				pairs[i].server = accept4(listener_fd, NULL, NULL, SOCK_CLOEXEC);
				if (pairs[i].server < 0)
					die("pair %d of %d never reached the server: %s", i,
					    opt.pairs, strerror(errno));
				set_patience(pairs[i].server);
			}
			receive_all(pairs[i].server, got, sizeof(got), "the server");
			if (memcmp(sent, got, sizeof(sent)))
				die("pair %d of %d: the server got other bytes than were sent", i,
				    opt.pairs);
			send_all(pairs[i].server, got, sizeof(got));
			receive_all(fd, got, sizeof(got), "the client");
			if (memcmp(sent, got, sizeof(sent)))
				die("pair %d of %d: the client got other bytes than were sent", i,
				    opt.pairs);
		}
	}
	return pairs;
}

static int sender_of(const struct pair *pair)
{
	return opt.down ? pair->server : pair->client;
}

static int receiver_of(const struct pair *pair)
{
	return opt.down ? pair->client : pair->server;
}

static int make_epoll(void)
{
	int fd = epoll_create1(EPOLL_CLOEXEC);

	if (fd < 0)
		die_errno("epoll_create1");
	return fd;
}

static void watch(int epoll, int operation, int fd, uint32_t events, uint64_t token)
{
	struct epoll_event event = { .events = events, .data.u64 = token };

	if (epoll_ctl(epoll, operation, fd, &event))
		die_errno("epoll_ctl");
}

static int wait_events(int epoll, struct epoll_event *events, int room, int timeout_ms)
{
	int count = epoll_wait(epoll, events, room, timeout_ms);

	if (count < 0 && errno != EINTR)
		die_errno("epoll_wait");
	return count < 0 ? 0 : count;
}

/* Blocks until the caller has measured: it closes our stdin or writes a line. */
static void wait_for_caller(void)
{
	char line[16];

	fflush(stdout);
	if (read(STDIN_FILENO, line, sizeof(line)) < 0)
		die_errno("stdin");
}

/* ---- mode rtt: one message back and forth ------------------------------------------------- */

static struct pair *rtt_pairs;

static void *echo_one(void *unused)
{
	char message[MESSAGE_BYTES];
	int fd = rtt_pairs[0].server;

	(void)unused;
	stay_on_cpu(opt.server_cpu);
	for (;;) {
		ssize_t got = recv(fd, message, sizeof(message), MSG_WAITALL);

		if (!got)
			return NULL;
		if (got != sizeof(message))
			die("the server lost its connection: %s", strerror(errno));
		send_all(fd, message, sizeof(message));
	}
}

static void *echo_many(void *unused)
{
	struct epoll_event events[64];
	char message[4096];
	int epoll = make_epoll(), open = opt.pairs;

	(void)unused;
	for (int i = 0; i < opt.pairs; i++)
		watch(epoll, EPOLL_CTL_ADD, rtt_pairs[i].server, EPOLLIN, (uint64_t)i);
	while (open) {
		int count = wait_events(epoll, events, 64, -1);

		for (int i = 0; i < count; i++) {
			int fd = rtt_pairs[events[i].data.u64].server;
			ssize_t got = recv(fd, message, sizeof(message), MSG_DONTWAIT);

			if (got > 0) {
				send_all(fd, message, (size_t)got);
			} else if (!got) {
				watch(epoll, EPOLL_CTL_DEL, fd, 0, 0);
				open--;
			} else if (errno != EAGAIN) {
				die_errno("the server lost its connection");
			}
		}
	}
	close(epoll);
	return NULL;
}

/* One connection is served by blocking calls, the shortest way there is: epoll would add its own
 * microsecond to every target and so flatten the ratios. */
static void ping_one(struct samples *samples, uint64_t from_ns, uint64_t until_ns)
{
	char message[MESSAGE_BYTES] = "ping";
	int fd = rtt_pairs[0].client;

	stay_on_cpu(opt.client_cpu);
	for (uint64_t begin = now_ns(); begin < until_ns;) {
		uint64_t end;

		send_all(fd, message, sizeof(message));
		receive_all(fd, message, sizeof(message), "the client");
		end = now_ns();
		if (begin >= from_ns)
			add_sample(samples, end - begin);
		begin = end;
	}
}

static void ping_many(struct samples *samples, uint64_t from_ns, uint64_t until_ns)
{
	struct epoll_event events[64];
	char message[MESSAGE_BYTES] = "ping";
	int epoll = make_epoll(), under_way = opt.pairs;
	uint64_t *begin = reserve((size_t)opt.pairs, sizeof(*begin));
	size_t *missing = reserve((size_t)opt.pairs, sizeof(*missing));

	for (int i = 0; i < opt.pairs; i++) {
		watch(epoll, EPOLL_CTL_ADD, rtt_pairs[i].client, EPOLLIN, (uint64_t)i);
		begin[i] = now_ns();
		missing[i] = sizeof(message);
		send_all(rtt_pairs[i].client, message, sizeof(message));
	}
	while (under_way) {
		int count = wait_events(epoll, events, 64, PATIENCE_S * 1000);

		if (!count)
			die("%d of %d round trips never ended", under_way, opt.pairs);
		for (int i = 0; i < count; i++) {
			uint64_t which = events[i].data.u64, end;
			ssize_t got = recv(rtt_pairs[which].client, message, missing[which],
					   MSG_DONTWAIT);

			if (got <= 0)
				die("the client lost its connection");
			missing[which] -= (size_t)got;
			if (missing[which])
				continue;
			end = now_ns();
			if (begin[which] >= from_ns && end < until_ns)
				add_sample(samples, end - begin[which]);
			if (end >= until_ns) {
				under_way--;
				continue;
			}
			begin[which] = end;
			missing[which] = sizeof(message);
			send_all(rtt_pairs[which].client, message, sizeof(message));
		}
	}
	close(epoll);
	free(begin);
	free(missing);
}

static void run_rtt(void)
{
	struct samples samples = { 0 };
	uint64_t from_ns, until_ns;
	pthread_t server;

	take_places();
	rtt_pairs = make_pairs();
	server = start(opt.pairs == 1 ? echo_one : echo_many, NULL);
	from_ns = now_ns() + (uint64_t)(opt.warm_up_s * NS_PER_S);
	until_ns = from_ns + (uint64_t)(opt.seconds * NS_PER_S);
	(opt.pairs == 1 ? ping_one : ping_many)(&samples, from_ns, until_ns);
	for (int i = 0; i < opt.pairs; i++)
		shutdown(rtt_pairs[i].client, SHUT_WR);
	pthread_join(server, NULL);
	printf("{\"trips_per_s\": %.1f, ", (double)samples.count / opt.seconds);
	print_samples(&samples, "");
	printf("}\n");
}

/* ---- mode bulk: streams, as fast as they go or paced --------------------------------------- */

static struct pair *bulk_pairs;
static atomic_uint_fast64_t bytes_sent, bytes_received;

static void *send_bulk(void *unused)
{
	struct epoll_event events[64];
	char *chunk = reserve(1, CHUNK_BYTES);
	int epoll = make_epoll();

	(void)unused;
	for (int i = 0; i < opt.pairs; i++)
		watch(epoll, EPOLL_CTL_ADD, sender_of(&bulk_pairs[i]), EPOLLOUT, (uint64_t)i);
	while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
		int count = wait_events(epoll, events, 64, 50);

		for (int i = 0; i < count; i++) {
			ssize_t sent = send(sender_of(&bulk_pairs[events[i].data.u64]), chunk,
					    CHUNK_BYTES, MSG_NOSIGNAL | MSG_DONTWAIT);

			if (sent > 0)
				atomic_fetch_add_explicit(&bytes_sent, (uint64_t)sent,
							  memory_order_relaxed);
			else if (errno != EAGAIN)
				die_errno("the sender lost its connection");
		}
	}
	for (int i = 0; i < opt.pairs; i++)
		shutdown(sender_of(&bulk_pairs[i]), SHUT_WR);
	close(epoll);
	free(chunk);
	return NULL;
}

static void *send_paced(void *unused)
{
	char *chunk = reserve(1, PACE_CHUNK_BYTES);
	uint64_t step_ns = (uint64_t)(PACE_CHUNK_BYTES / opt.bytes_per_s * NS_PER_S);
	uint64_t due_ns = now_ns();

	(void)unused;
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	for (uint64_t n = 0; !atomic_load_explicit(&stop, memory_order_relaxed); n++) {
		uint64_t late_ns;

		send_all(sender_of(&bulk_pairs[n % (uint64_t)opt.pairs]), chunk, PACE_CHUNK_BYTES);
		atomic_fetch_add_explicit(&bytes_sent, PACE_CHUNK_BYTES, memory_order_relaxed);
		due_ns += step_ns;
		late_ns = now_ns() - due_ns;
		if ((int64_t)late_ns < 0)
			sleep_until_ns(due_ns);
		else if (late_ns > 100 * NS_PER_MS)
			due_ns = now_ns(); /* hopeless: do not make up for it in one long burst */
	}
	for (int i = 0; i < opt.pairs; i++)
		shutdown(sender_of(&bulk_pairs[i]), SHUT_WR);
	free(chunk);
	return NULL;
}

static void *receive_bulk(void *unused)
{
	struct epoll_event events[64];
	char *chunk = reserve(1, CHUNK_BYTES);
	int epoll = make_epoll(), open = opt.pairs;

	(void)unused;
	for (int i = 0; i < opt.pairs; i++)
		watch(epoll, EPOLL_CTL_ADD, receiver_of(&bulk_pairs[i]), EPOLLIN, (uint64_t)i);
	while (open) {
		int count = wait_events(epoll, events, 64, PATIENCE_S * 1000);

		if (!count)
			die("nothing arrived for %d s", PATIENCE_S);
		for (int i = 0; i < count; i++) {
			int fd = receiver_of(&bulk_pairs[events[i].data.u64]);
			ssize_t got = recv(fd, chunk, CHUNK_BYTES, MSG_DONTWAIT);

			if (got > 0) {
				atomic_fetch_add_explicit(&bytes_received, (uint64_t)got,
							  memory_order_relaxed);
			} else if (!got) {
				watch(epoll, EPOLL_CTL_DEL, fd, 0, 0);
				open--;
			} else if (errno != EAGAIN) {
				die_errno("the receiver lost its connection");
			}
		}
	}
	close(epoll);
	free(chunk);
	return NULL;
}

/* The soakers' counters: how often an idle-priority loop came round, machine-wide. */
static volatile uint64_t *soak_counters;
static size_t soakers;

static void open_soakers(void)
{
	int fd = open(opt.soak_file, O_RDONLY | O_CLOEXEC);
	struct stat status;
	void *memory;

	if (fd < 0 || fstat(fd, &status))
		die("%s: %s", opt.soak_file, strerror(errno));
	memory = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		die_errno("mmap");
	soak_counters = memory;
	soakers = (size_t)status.st_size / SOAK_STRIDE;
}

static uint64_t soaked(void)
{
	uint64_t sum = 0;

	for (size_t i = 0; i < soakers; i++)
		sum += soak_counters[i * SOAK_STRIDE / sizeof(*soak_counters)];
	return sum;
}

/*
 * What the soakers get per second while nothing flows: the whole machine, except what it does
 * anyhow.  Taken right before the measurement and right after, because it drifts.  `quiet` tells
 * how much of the machine that was: the mean over that of the best slice, in which nothing else
 * ran.
 */
static double calibrate(double *quiet)
{
	uint64_t begin_ns = now_ns(), first = soaked(), slice_ns = begin_ns, slice = first;
	double best_per_s = 0, mean_per_s;
	uint64_t end_ns = begin_ns + (uint64_t)(opt.calibrate_s * NS_PER_S);

	while (slice_ns < end_ns) {
		uint64_t count, now;
		double per_s;

		sleep_s(0.02);
		now = now_ns();
		count = soaked();
		per_s = (double)(count - slice) / ((double)(now - slice_ns) / NS_PER_S);
		if (per_s > best_per_s)
			best_per_s = per_s;
		slice = count;
		slice_ns = now;
	}
	mean_per_s = (double)(slice - first) / ((double)(slice_ns - begin_ns) / NS_PER_S);
	if (mean_per_s <= 0)
		die("the soakers do not run");
	*quiet = mean_per_s / best_per_s;
	return mean_per_s;
}

static void run_bulk(void)
{
	uint64_t received, begin_ns, end_ns, left = 0;
	double seconds, idle_per_s = 0, quiet = 0, quiet_after;
	pthread_t sender, receiver;

	take_places();
	bulk_pairs = make_pairs();
	if (opt.soak_file) {
		open_soakers();
		sleep_s(0.05);
		idle_per_s = calibrate(&quiet);
	}
	receiver = start(receive_bulk, NULL);
	sender = start(opt.bytes_per_s > 0 ? send_paced : send_bulk, NULL);
	sleep_s(opt.warm_up_s);
	begin_ns = now_ns();
	received = atomic_load(&bytes_received);
	if (opt.soak_file)
		left = soaked();
	sleep_s(opt.seconds);
	end_ns = now_ns();
	received = atomic_load(&bytes_received) - received;
	if (opt.soak_file)
		left = soaked() - left;
	atomic_store(&stop, true);
	pthread_join(sender, NULL);
	pthread_join(receiver, NULL);
	if (atomic_load(&bytes_sent) != atomic_load(&bytes_received))
		die("%llu bytes were sent and %llu arrived before a clean end",
		    (unsigned long long)atomic_load(&bytes_sent),
		    (unsigned long long)atomic_load(&bytes_received));
	if (!received)
		die("nothing arrived in the window");
	if (opt.soak_file) {
		idle_per_s = (idle_per_s + calibrate(&quiet_after)) / 2;
		if (quiet_after < quiet)
			quiet = quiet_after;
	}
	seconds = (double)(end_ns - begin_ns) / NS_PER_S;
	printf("{\"bytes\": %llu, \"seconds\": %.6f, \"bytes_per_s\": %.1f",
	       (unsigned long long)received, seconds, (double)received / seconds);
	if (opt.soak_file)
		printf(", \"quiet\": %.4f, \"cpu_s\": %.6f", quiet,
		       (double)soakers * seconds * (1 - (double)left / (idle_per_s * seconds)));
	printf("}\n");
}

/* ---- mode soak: what nobody else wanted of the CPUs ----------------------------------------- */

struct soaker {
	int cpu;
	volatile uint64_t *counter;
};

static void *soak(void *argument)
{
	struct soaker *self = argument;
	struct sched_param parameter = { 0 };

	stay_on_cpu(self->cpu);
	if (sched_setscheduler(0, SCHED_IDLE, &parameter))
		die_errno("sched_setscheduler");
	for (;;) {
		for (int i = 0; i < 1000; i++)
			__asm__ volatile("" : "+r"(i)); /* registers only: no cache is disturbed */
		(*self->counter)++;
	}
	return NULL;
}

static void run_soak(void)
{
	struct soaker list[CPU_SETSIZE];
	size_t count = 0, size;
	cpu_set_t allowed;
	void *memory;
	int fd;

	/* Under autogroup a session is scheduled as one entity of normal weight, even one of idle
	 * threads only: it would take half a CPU from a kernel worker that wants it.  So: a session
	 * of our own, at the lowest weight.  Where the kernel has no autogroup there is no file. */
	setsid();
	fd = open("/proc/self/autogroup", O_WRONLY | O_CLOEXEC);
	if (fd >= 0) {
		if (write(fd, "19", 2) != 2)
			die_errno("/proc/self/autogroup");
		close(fd);
	}
	if (sched_getaffinity(0, sizeof(allowed), &allowed))
		die_errno("sched_getaffinity");
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &allowed))
			list[count++].cpu = cpu;
	size = count * SOAK_STRIDE;
	fd = open(opt.soak_file, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0 || ftruncate(fd, (off_t)size))
		die("%s: %s", opt.soak_file, strerror(errno));
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		die_errno("mmap");
	for (size_t i = 0; i < count; i++) {
		list[i].counter = (uint64_t *)((char *)memory + i * SOAK_STRIDE);
		start(soak, &list[i]);
	}
	printf("{\"soakers\": %zu}\n", count);
	wait_for_caller();
	_exit(0);
}

/* ---- mode delay: how long a byte is under way while a stream flows -------------------------- */

static atomic_uint_fast64_t *stamps_ns;
static uint64_t stamps;
static struct pair delay_pair;

static void *send_stamped(void *unused)
{
	char *chunk = reserve(1, DELAY_CHUNK_BYTES);
	uint64_t step_ns = (uint64_t)(DELAY_CHUNK_BYTES / opt.bytes_per_s * NS_PER_S);
	uint64_t due_ns = now_ns();

	(void)unused;
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	for (uint64_t n = 0; n < stamps; n++) {
		atomic_store(&stamps_ns[n], now_ns());
		send_all(sender_of(&delay_pair), chunk, DELAY_CHUNK_BYTES);
		due_ns += step_ns;
		if (now_ns() < due_ns)
			sleep_until_ns(due_ns);
	}
	shutdown(sender_of(&delay_pair), SHUT_WR);
	free(chunk);
	return NULL;
}

static void run_delay(void)
{
	char *chunk = reserve(1, CHUNK_BYTES);
	struct samples samples = { 0 };
	uint64_t received = 0, arrived = 0;
	pthread_t sender;

	stamps = (uint64_t)(opt.seconds * opt.bytes_per_s / DELAY_CHUNK_BYTES);
	stamps_ns = reserve(stamps, sizeof(*stamps_ns));
	/* One trip only: a forwarder's change from its first way of moving bytes to its lasting one
	 * then happens in the measured stream, where a client would see it stall. */
	opt.trips = 1;
	opt.pairs = 1;
	take_places();
	delay_pair = make_pairs()[0];
	sender = start(send_stamped, NULL);
	for (;;) {
		ssize_t got = recv(receiver_of(&delay_pair), chunk, CHUNK_BYTES, 0);
		uint64_t now = now_ns();

		if (got < 0)
			die_errno("the receiver");
		if (!got)
			break;
		received += (uint64_t)got;
		for (; arrived < received / DELAY_CHUNK_BYTES; arrived++)
			add_sample(&samples, now - atomic_load(&stamps_ns[arrived]));
	}
	pthread_join(sender, NULL);
	if (received != stamps * DELAY_CHUNK_BYTES)
		die("%llu bytes arrived of %llu", (unsigned long long)received,
		    (unsigned long long)(stamps * DELAY_CHUNK_BYTES));
	printf("{");
	print_samples(&samples, "");
	printf("}\n");
}

/* ---- mode connect: new connections, one request and one answer each ------------------------ */

static char request_text[MOST_REQUEST];
static size_t request_bytes;

struct served {
	size_t got;
	uint64_t answered;
	uint32_t watched; /* events; 0: not in the epoll set */
};

static void read_request(void)
{
	ssize_t got;
	int fd;

	if (!opt.request_file) {
		request_bytes = MESSAGE_BYTES;
		memset(request_text, 'x', request_bytes);
		return;
	}
	fd = open(opt.request_file, O_RDONLY | O_CLOEXEC);
	got = fd < 0 ? -1 : read(fd, request_text, sizeof(request_text));
	if (got <= 0 || (size_t)got == sizeof(request_text))
		die("%s: a request has 1 to %zu bytes", opt.request_file, sizeof(request_text) - 1);
	request_bytes = (size_t)got;
	if (opt.vary_at && opt.vary_at + VARIED_BYTES > request_bytes)
		die("vary_at: the request ends before");
	close(fd);
}

/* The bytes that differ, in a request that begins there: the connection's number. */
static void vary(char *request, uint64_t n)
{
	if (!opt.vary_at)
		return;
	for (int i = 0; i < VARIED_BYTES; i++)
		request[opt.vary_at + (size_t)i] = "0123456789abcdef"[n >> 4 * i & 15];
}

/* Whether these bytes of a request, `at` of which came before, are what a client may say. */
static bool is_said(const char *bytes, size_t at, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		size_t place = at + i;

		if (bytes[i] != request_text[place] &&
		    !(opt.vary_at && place >= opt.vary_at && place < opt.vary_at + VARIED_BYTES))
			return false;
	}
	return true;
}

static void wait_for(int epoll, int fd, struct served *served, uint32_t events)
{
	if (served->watched != events)
		watch(epoll, served->watched ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, events,
		      (uint64_t)fd);
	served->watched = events;
}

/* One step of a connection: request, answer, end; closes it at its end. */
static void serve_event(int epoll, int fd, struct served *served)
{
	static char answer[CHUNK_BYTES];
	char request[MOST_REQUEST];
	ssize_t got, sent;

	while (served->got < request_bytes) {
		got = recv(fd, request, request_bytes - served->got, MSG_DONTWAIT);
		if (got < 0 && errno == EAGAIN) {
			wait_for(epoll, fd, served, EPOLLIN);
			return;
		}
		/* A client that gave up: its own side counts it. Other bytes: it gets no answer. */
		if (got <= 0 || !is_said(request, served->got, (size_t)got)) {
			close(fd);
			return;
		}
		served->got += (size_t)got;
	}
	while (served->answered < opt.answer_bytes) {
		uint64_t left = opt.answer_bytes - served->answered;

		sent = send(fd, answer, left < sizeof(answer) ? left : sizeof(answer),
			    MSG_NOSIGNAL);
		if (sent < 0 && errno == EAGAIN) {
			wait_for(epoll, fd, served, EPOLLOUT);
			return;
		}
		if (sent < 0) {
			close(fd);
			return;
		}
		served->answered += (uint64_t)sent;
		if (served->answered < opt.answer_bytes)
			continue;
		if (opt.server_closes) {
			close(fd);
			return;
		}
		wait_for(epoll, fd, served, EPOLLIN);
		return; /* the end cannot be here yet */
	}
	got = recv(fd, request, sizeof(request), MSG_DONTWAIT);
	if (got < 0 && errno == EAGAIN)
		return;
	close(fd);
}

static void *serve_connections(void *unused)
{
	struct epoll_event events[256];
	struct rlimit files;
	struct served *served;
	int epoll = make_epoll();

	(void)unused;
	if (getrlimit(RLIMIT_NOFILE, &files))
		die_errno("getrlimit");
	served = reserve(files.rlim_cur, sizeof(*served));
	set_blocking(listener_fd, false);
	watch(epoll, EPOLL_CTL_ADD, listener_fd, EPOLLIN, (uint64_t)listener_fd);
	while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
		int count = wait_events(epoll, events, 256, 50);

		for (int i = 0; i < count; i++) {
			int fd = (int)events[i].data.u64;

			if (fd != listener_fd) {
				serve_event(epoll, fd, &served[fd]);
				continue;
			}
			while ((fd = accept4(listener_fd, NULL, NULL,
					     SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
				served[fd] = (struct served){ 0 };
				serve_event(epoll, fd, &served[fd]);
			}
			if (errno != EAGAIN && errno != ECONNABORTED)
				die_errno("accept");
		}
	}
	close(epoll);
	return NULL;
}

struct asking { /* one connection of the client */
	int fd;
	bool is_sent, is_answered;
	uint64_t got, begin_ns;
	uint64_t read_ns, pause_ns; /* when bytes last came, and how long none have come at most */
	size_t request_bytes;
	char request[MOST_REQUEST + 100]; /* an instruction has at most 99 bytes */
};

/* How a connection of the client failed; END_: after its answer was there. */
enum failure {
	NOT_CONNECTED,
	RESET,
	ENDED_EARLY,
	WRONG_ANSWER,
	SILENT,
	END_RESET,
	END_SILENT,
	FAILURES
};

static const char *const failure_names[FAILURES] = {
	[NOT_CONNECTED] = "not_connected", [RESET] = "reset",	[ENDED_EARLY] = "ended_early",
	[WRONG_ANSWER] = "wrong_answer",   [SILENT] = "silent", [END_RESET] = "end_reset",
	[END_SILENT] = "end_silent",
};

static struct {
	int epoll;
	int free_count, *free_slots;
	struct asking *slots;
	uint64_t begun, done, failed, measured;
	uint64_t failures[FAILURES];
	uint64_t from_ns, until_ns;
	struct samples samples, pauses;
} asked;

static void fail_asking(struct asking *asking, enum failure why)
{
	asked.failures[why]++;
	close(asking->fd);
	asking->fd = -1;
	asked.failed++;
	asked.free_slots[asked.free_count++] = (int)(asking - asked.slots);
}

static void finish_asking(struct asking *asking)
{
	uint64_t now = now_ns();

	close(asking->fd);
	asking->fd = -1;
	asked.done++;
	if (now >= asked.from_ns && now < asked.until_ns)
		asked.measured++;
	asked.free_slots[asked.free_count++] = (int)(asking - asked.slots);
}

/* Writes the instruction for the n-th server, whose sum is right, and returns its length. */
static size_t write_instruction(char *to, size_t room, uint64_t n)
{
	struct sockaddr_in server = address_of(opt.server_ip, opt.server_count, opt.server_port, n);
	char ip[INET_ADDRSTRLEN], destination[64];
	unsigned int sum = 0;
	int length;

	inet_ntop(AF_INET, &server.sin_addr, ip, sizeof(ip));
	length = snprintf(destination, sizeof(destination), "%s:%u", ip, opt.server_port) + 4;
	snprintf(to, room, "%02d%s", length, destination);
	for (int i = 0; i < length - 2; i++)
		sum += (unsigned char)to[i];
	snprintf(to + length - 2, room - (size_t)length + 2, "%02u", sum % 100);
	return (size_t)length;
}

static void note_pause(struct asking *asking)
{
	uint64_t now = now_ns();

	if (asking->read_ns && now - asking->read_ns > asking->pause_ns)
		asking->pause_ns = now - asking->read_ns;
	asking->read_ns = now;
}

static void continue_asking(struct asking *asking)
{
	static char answer[CHUNK_BYTES];
	uint64_t expected = opt.answer_bytes + (opt.instruction ? ACK_BYTES : 0);

	if (!asking->is_sent) {
		ssize_t sent =
			send(asking->fd, asking->request, asking->request_bytes, MSG_NOSIGNAL);

		if (sent < 0 && errno == EAGAIN)
			return; /* still connecting; EPOLLOUT will come */
		if (sent != (ssize_t)asking->request_bytes) {
			fail_asking(asking, NOT_CONNECTED);
			return;
		}
		asking->is_sent = true;
		return; /* the answer cannot be here yet */
	}
	for (;;) {
		ssize_t got = recv(asking->fd, answer, sizeof(answer), 0);

		if (got < 0 && errno == EAGAIN)
			return;
		if (!got && asking->got == expected) {
			finish_asking(asking);
			return;
		}
		if (got <= 0) {
			fail_asking(asking, !got		  ? ENDED_EARLY
					    : asking->is_answered ? END_RESET
								  : RESET);
			return;
		}
		if (asking->got + (uint64_t)got > expected ||
		    (opt.instruction && !asking->got && got >= ACK_BYTES &&
		     memcmp(answer, ACK, ACK_BYTES))) {
			fail_asking(asking, WRONG_ANSWER);
			return;
		}
		asking->got += (uint64_t)got;
		note_pause(asking);
		if (asking->got == expected && !asking->is_answered) {
			uint64_t now = now_ns();

			asking->is_answered = true;
			if (asking->begin_ns >= asked.from_ns && now < asked.until_ns) {
				add_sample(&asked.samples, now - asking->begin_ns);
				add_sample(&asked.pauses, asking->pause_ns);
			}
			if (!opt.server_closes) {
				shutdown(asking->fd, SHUT_WR);
				return; /* the end cannot be here yet */
			}
		}
	}
}

static void begin_asking(void)
{
	struct asking *asking = &asked.slots[asked.free_slots[--asked.free_count]];
	uint64_t n = asked.begun++;
	struct sockaddr_in to = address_of(opt.to_ip, opt.to_count, opt.to_port, n);

	asking->begin_ns = now_ns();
	asking->read_ns = asking->pause_ns = 0;
	asking->fd = client_socket(n);
	set_blocking(asking->fd, false);
	asking->is_sent = asking->is_answered = false;
	asking->got = asking->request_bytes = 0;
	if (opt.instruction)
		asking->request_bytes =
			write_instruction(asking->request, sizeof(asking->request), n);
	memcpy(asking->request + asking->request_bytes, request_text, request_bytes);
	vary(asking->request + asking->request_bytes, n);
	asking->request_bytes += request_bytes;
	if (connect(asking->fd, (struct sockaddr *)&to, sizeof(to)) && errno != EINPROGRESS) {
		fail_asking(asking, NOT_CONNECTED);
		return;
	}
	watch(asked.epoll, EPOLL_CTL_ADD, asking->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
	      (uint64_t)(asking - asked.slots));
	continue_asking(asking); /* on loopback the connection is there already */
}

static void give_up_on_the_silent(void)
{
	uint64_t oldest_ns = now_ns() - PATIENCE_S * NS_PER_S;

	for (int i = 0; i < opt.pairs; i++)
		if (asked.slots[i].fd >= 0 && asked.slots[i].begin_ns < oldest_ns)
			fail_asking(&asked.slots[i],
				    asked.slots[i].is_answered ? END_SILENT : SILENT);
}

/* What the soakers have got, and what was done, from about `from_ns` to about `until_ns`. */
static struct window {
	uint64_t begin_ns, end_ns, soaked, done;
} window;

/* The exact moments do not matter, as what is counted is counted at the same ones. */
static void note_window(uint64_t now)
{
	if (!opt.soak_file || now < asked.from_ns || window.end_ns)
		return;
	if (!window.begin_ns)
		window = (struct window){ now, 0, soaked(), asked.done };
	else if (now >= asked.until_ns)
		window = (struct window){ window.begin_ns, now, soaked() - window.soaked,
					  asked.done - window.done };
}

static void run_connect(void)
{
	double step_ns = opt.connections_per_s > 0 ? NS_PER_S / opt.connections_per_s : 0;
	double idle_per_s = 0, quiet = 0, quiet_after, seconds;
	uint64_t begin_ns, swept_ns, give_up_ns;
	struct epoll_event events[64];
	pthread_t server;

	read_request();
	take_places();
	if (opt.soak_file) {
		open_soakers();
		sleep_s(opt.quiet_s);
		idle_per_s = calibrate(&quiet);
	}
	server = start(serve_connections, NULL);
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	asked.epoll = make_epoll();
	asked.slots = reserve((size_t)opt.pairs, sizeof(*asked.slots));
	asked.free_slots = reserve((size_t)opt.pairs, sizeof(*asked.free_slots));
	for (int i = 0; i < opt.pairs; i++) {
		asked.slots[i].fd = -1;
		asked.free_slots[asked.free_count++] = i;
	}
	begin_ns = swept_ns = now_ns();
	asked.from_ns = begin_ns + (uint64_t)(opt.warm_up_s * NS_PER_S);
	asked.until_ns = asked.from_ns + (uint64_t)(opt.seconds * NS_PER_S);
	give_up_ns = asked.until_ns + PATIENCE_S * NS_PER_S;
	for (uint64_t now = begin_ns; now < asked.until_ns || asked.free_count < opt.pairs;
	     now = now_ns()) {
		struct timespec timeout = { .tv_nsec = 50 * NS_PER_MS };
		int count;

		note_window(now);
		while (asked.free_count && now < asked.until_ns) {
			double due_ns = (double)begin_ns + step_ns * (double)asked.begun;

			if (step_ns > 0 && due_ns > (double)now) {
				double wait_ns = due_ns - (double)now;

				if (wait_ns < (double)timeout.tv_nsec)
					timeout.tv_nsec = (long)wait_ns;
				break;
			}
			begin_asking();
			/* A server that refuses everything fails every attempt at once. */
			if (asked.failed > 1000 && !asked.done)
				die("the first 1000 connections failed");
			if (step_ns == 0)
				now = now_ns();
		}
		count = epoll_pwait2(asked.epoll, events, 64, &timeout, NULL);
		if (count < 0 && errno != EINTR)
			die_errno("epoll_pwait2");
		for (int i = 0; i < count; i++)
			if (asked.slots[events[i].data.u64].fd >= 0)
				continue_asking(&asked.slots[events[i].data.u64]);
		if (now - swept_ns > NS_PER_S) {
			swept_ns = now;
			give_up_on_the_silent();
			if (now > give_up_ns)
				break;
		}
	}
	note_window(now_ns());
	atomic_store(&stop, true);
	pthread_join(server, NULL);
	printf("{\"connections_per_s\": %.2f, \"failed\": %llu, \"done\": %llu, ",
	       (double)asked.measured / opt.seconds, (unsigned long long)asked.failed,
	       (unsigned long long)asked.done);
	if (opt.soak_file) {
		sleep_s(opt.quiet_s); /* a forwarder may count later what has ended */
		idle_per_s = (idle_per_s + calibrate(&quiet_after)) / 2;
		if (quiet_after < quiet)
			quiet = quiet_after;
		if (!window.done)
			die("no connection ended in the window");
		seconds = (double)(window.end_ns - window.begin_ns) / NS_PER_S;
		printf("\"quiet\": %.4f, \"cpu_s\": %.6f, \"window_s\": %.6f, \"in_window\": "
		       "%llu, ",
		       quiet,
		       (double)soakers * seconds *
			       (1 - (double)window.soaked / (idle_per_s * seconds)),
		       seconds, (unsigned long long)window.done);
	}
	for (int i = 0; i < FAILURES; i++)
		printf("\"%s\": %llu, ", failure_names[i], (unsigned long long)asked.failures[i]);
	print_samples(&asked.samples, "");
	printf(", ");
	print_samples(&asked.pauses, "pause_");
	printf("}\n");
}

/* ---- mode idle: pairs that do nothing -------------------------------------------------------- */

static void run_idle(void)
{
	struct pair *pairs;
	char byte;

	take_places();
	printf("{\"ready\": true}\n");
	wait_for_caller(); /* it looks at the memory before the pairs and with them */
	pairs = make_pairs();
	printf("{\"pairs\": %d}\n", opt.pairs);
	wait_for_caller();
	for (int i = 0; i < opt.pairs; i++) {
		shutdown(pairs[i].client, SHUT_WR);
		if (recv(pairs[i].server, &byte, 1, 0))
			die("pair %d did not end cleanly at the server", i);
		close(pairs[i].server);
		if (recv(pairs[i].client, &byte, 1, 0))
			die("pair %d did not end cleanly at the client", i);
		close(pairs[i].client);
	}
	free(pairs);
}

/* ---- mode stall: a reader that stops reading ------------------------------------------------- */

/* The stream's n-th word, so that a lost, doubled or moved byte shows. */
static uint64_t pattern(uint64_t n)
{
	return (n + 1) * 0x9e3779b97f4a7c15ULL;
}

static uint64_t push(int fd, uint64_t offset)
{
	static uint64_t words[CHUNK_BYTES / 8 + 1];
	uint64_t first = offset / 8;
	ssize_t sent;

	for (size_t i = 0; i < sizeof(words) / 8; i++)
		words[i] = pattern(first + i);
	sent = send(fd, (char *)words + offset % 8, CHUNK_BYTES, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (sent < 0 && errno != EAGAIN)
		die_errno("the sender lost its connection");
	return sent > 0 ? (uint64_t)sent : 0;
}

static void drain(int fd, uint64_t expected)
{
	static unsigned char chunk[CHUNK_BYTES];
	uint64_t offset = 0, word = 0;

	for (;;) {
		ssize_t got = recv(fd, chunk, sizeof(chunk), 0);

		if (got < 0)
			die_errno("the reader that woke up");
		if (!got)
			break;
		for (ssize_t i = 0; i < got; i++, offset++) {
			if (offset % 8 == 0 || !i)
				word = pattern(offset / 8);
			if (chunk[i] != (unsigned char)(word >> (offset % 8 * 8)))
				die("byte %llu arrived wrong", (unsigned long long)offset);
		}
	}
	if (offset != expected)
		die("%llu bytes arrived of %llu", (unsigned long long)offset,
		    (unsigned long long)expected);
}

static void run_stall(void)
{
	uint64_t *offsets = reserve((size_t)opt.pairs, sizeof(*offsets));
	uint64_t moved_ns, most = 0, sum = 0;
	struct pair *pairs;

	take_places();
	pairs = make_pairs();
	printf("{\"ready\": true}\n");
	wait_for_caller();
	moved_ns = now_ns();
	while (now_ns() - moved_ns < (uint64_t)(opt.quiet_s * NS_PER_S)) {
		bool is_moved = false;

		for (int i = 0; i < opt.pairs; i++) {
			uint64_t sent = 0;

			if (offsets[i] < opt.cap_bytes)
				sent = push(sender_of(&pairs[i]), offsets[i]);
			offsets[i] += sent;
			is_moved |= sent > 0;
		}
		if (is_moved)
			moved_ns = now_ns();
		else
			sleep_s(0.002);
	}
	for (int i = 0; i < opt.pairs; i++) {
		sum += offsets[i];
		if (offsets[i] > most)
			most = offsets[i];
	}
	printf("{\"pairs\": %d, \"accepted_bytes\": %llu, \"most_bytes\": %llu, \"capped\": %s}\n",
	       opt.pairs, (unsigned long long)sum, (unsigned long long)most,
	       most >= opt.cap_bytes ? "true" : "false");
	wait_for_caller();
	for (int i = 0; i < opt.pairs; i++) {
		shutdown(sender_of(&pairs[i]), SHUT_WR);
		drain(receiver_of(&pairs[i]), offsets[i]);
	}
	printf("{\"verified_bytes\": %llu}\n", (unsigned long long)sum);
}

/* ---- arguments ------------------------------------------------------------------------------ */

#include "datagrams.h"

static double number(const char *text)
{
	char *end;
	double value = strtod(text, &end);

	if (*end || end == text || value < 0)
		die("no number: %s", text);
	return value;
}

/* `IP[+COUNT][:PORT]`: that many addresses from IP on. */
static void parse_range(const char *text, uint32_t *ip, uint32_t *count, uint16_t *port)
{
	char buffer[64], *colon, *plus;
	struct in_addr address;

	snprintf(buffer, sizeof(buffer), "%s", text);
	colon = strchr(buffer, ':');
	if (colon) {
		*colon = 0;
		*port = (uint16_t)number(colon + 1);
	}
	plus = strchr(buffer, '+');
	if (plus) {
		*plus = 0;
		*count = (uint32_t)number(plus + 1);
	}
	if (inet_pton(AF_INET, buffer, &address) != 1 || !*count)
		die("no address range: %s", text);
	*ip = ntohl(address.s_addr);
}

static void parse_option(const char *argument)
{
	const char *value = strchr(argument, '=');
	size_t length = value ? (size_t)(value - argument) : 0;
	uint16_t unused_port = 0;
	char key[32];

	if (!value || length >= sizeof(key))
		die("no key=value: %s", argument);
	memcpy(key, argument, length);
	key[length] = 0;
	value++;
	if (!strcmp(key, "client_ns"))
		opt.client_ns = value;
	else if (!strcmp(key, "server_ns"))
		opt.server_ns = value;
	else if (!strcmp(key, "to"))
		parse_range(value, &opt.to_ip, &opt.to_count, &opt.to_port);
	else if (!strcmp(key, "sources"))
		parse_range(value, &opt.source_ip, &opt.source_count, &unused_port);
	else if (!strcmp(key, "servers"))
		parse_range(value, &opt.server_ip, &opt.server_count, &opt.server_port);
	else if (!strcmp(key, "seconds"))
		opt.seconds = number(value);
	else if (!strcmp(key, "warm_up_s"))
		opt.warm_up_s = number(value);
	else if (!strcmp(key, "calibrate_s"))
		opt.calibrate_s = number(value);
	else if (!strcmp(key, "quiet_s"))
		opt.quiet_s = number(value);
	else if (!strcmp(key, "bytes_per_s"))
		opt.bytes_per_s = number(value);
	else if (!strcmp(key, "connections_per_s"))
		opt.connections_per_s = number(value);
	else if (!strcmp(key, "datagrams_per_s"))
		opt.datagrams_per_s = number(value);
	else if (!strcmp(key, "datagram_bytes"))
		opt.datagram_bytes = (int)number(value);
	else if (!strcmp(key, "cap_bytes"))
		opt.cap_bytes = (uint64_t)number(value);
	else if (!strcmp(key, "answer_bytes"))
		opt.answer_bytes = (uint64_t)number(value);
	else if (!strcmp(key, "pairs"))
		opt.pairs = (int)number(value);
	else if (!strcmp(key, "trips"))
		opt.trips = (int)number(value);
	else if (!strcmp(key, "client_cpu"))
		opt.client_cpu = (int)number(value);
	else if (!strcmp(key, "server_cpu"))
		opt.server_cpu = (int)number(value);
	else if (!strcmp(key, "down"))
		opt.down = number(value) > 0;
	else if (!strcmp(key, "server_closes"))
		opt.server_closes = number(value) > 0;
	else if (!strcmp(key, "instruction"))
		opt.instruction = number(value) > 0;
	else if (!strcmp(key, "waits"))
		opt.waits = number(value) > 0;
	else if (!strcmp(key, "soak_file"))
		opt.soak_file = value;
	else if (!strcmp(key, "request_file"))
		opt.request_file = value;
	else if (!strcmp(key, "vary_at"))
		opt.vary_at = (size_t)number(value);
	else
		die("unknown key: %s", key);
}

static const struct {
	const char *name;
	void (*run)(void);
} modes[] = {
	{ "rtt", run_rtt },	    { "bulk", run_bulk },	{ "delay", run_delay },
	{ "connect", run_connect }, { "idle", run_idle },	{ "stall", run_stall },
	{ "soak", run_soak },	    { "udp_rtt", run_udp_rtt }, { "udp_rate", run_udp_rate },
};

int main(int argc, char **argv)
{
	if (argc < 2)
		die("usage: load MODE [key=value]...");
	prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0); /* never outlive who measures */
	for (int i = 2; i < argc; i++)
		parse_option(argv[i]);
	if (opt.pairs < 1 || opt.trips < 1 || !opt.answer_bytes)
		die("pairs, trips and answer_bytes start at 1");
	if (opt.datagram_bytes < 1 || opt.datagram_bytes > MOST_DATAGRAM)
		die("datagram_bytes is 1 to %d", MOST_DATAGRAM);
	for (size_t i = 0; i < sizeof(modes) / sizeof(*modes); i++) {
		if (strcmp(modes[i].name, argv[1]))
			continue;
		modes[i].run();
		return 0;
	}
	die("unknown mode: %s", argv[1]);
}
