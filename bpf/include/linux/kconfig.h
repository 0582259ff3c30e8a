/* bcc forces this include; CONFIG_BPF_SYSCALL is all that its own headers ask about. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
