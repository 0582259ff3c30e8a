/* bcc includes this name; no program of ours needs anything from it. */
#pragma once
