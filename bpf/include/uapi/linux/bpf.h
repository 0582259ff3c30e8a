/* bcc carries its own copy of the UAPI header and puts it on the include path. */
#pragma once
#include <linux/bpf.h>
