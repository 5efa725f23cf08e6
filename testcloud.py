#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["pyzmq>=24"]
# ///
"""testcloud: run a pile of shell commands on many machines, bring every result back.

On this machine, as many commands at once as it has CPUs:

    ls *.log | python testcloud.py client --local gzip -k {}

On hosts that you reach by ssh, and on this one (:). Nothing must be installed there, and
the files of your working tree go along (--sync):

    ls tests/test_*.py | python testcloud.py client -S alpha,4/beta,: --sync pytest -q {}

In a standing cloud. Each of its three commands may run on a machine of its own:

    python testcloud.py broker                             one, in the middle
    python testcloud.py worker --connect HOST              one on each machine that helps
    seq 5 | awk '{print "./pi.py " $1}' | python testcloud.py client --connect HOST

The client sends its commands, one a line, to the broker. The broker gives them to workers
with a free slot. Results go back the same way. Without --connect everything happens on
this machine. Between machines it needs a key, which broker, workers and clients find
beside the script:

    python testcloud.py keygen                             once, then copy testcloud.key

`status` shows who is there and what they do, and `cancel` stops a client's run.

The client reports every command exactly once, whatever is lost meanwhile. It exits with 0
if all commands passed, and with 1 if one failed. Wrong usage is 2. If not everything
could be run or written, it is 3.

    python testcloud.py help                               the manual, by topic
    python testcloud.py ROLE --help                        the options of a role
"""
# SPDX-License-Identifier: MIT
from __future__ import annotations  # testcloud needs Python 3.9 or newer

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    sys.path.append(sys.path.pop(0))  # a types.py beside this script must not hide Python's own

import gc
import signal

PYTHON: tuple[int, int] = (3, 9)  # testcloud needs Python 3.9 or newer
# 2.7 to 3.6 cannot compile this file: their SyntaxError shows the import or the line above
if sys.version_info < PYTHON:
    sys.stderr.write(f"testcloud: needs Python 3.9 or newer, and {sys.executable} is "
                     f"{sys.version.split()[0]}: start it with another python3\n")
    sys.exit(3)
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback during the imports
# new objects before Python looks for cycles: the imports make few, and a large tree none
gc.set_threshold(50_000)

# ruff: noqa: E402
import argparse
import array
import bisect
import codecs
import contextlib
import errno
import functools
import hashlib
import heapq
import io
import itertools
import json
import logging
import math
import os
import queue
import re
import select
import shlex
import shutil
import stat
import struct
import tempfile
import threading
import time
import unicodedata
import zlib
from collections import Counter, OrderedDict, deque
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    Callable,
    Collection,
    Container,
    Deque,
    Dict,
    FrozenSet,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

with contextlib.suppress(ImportError):  # on Windows, which main() refuses with a plain message
    import fcntl
    import resource
    import termios

if TYPE_CHECKING:
    import socket
    import subprocess
    import xml.etree.ElementTree as ET

    import zmq

__version__ = "0.1.0"

# === Names and numbers ================================================================
#
# The names that both ends of the wire share, and the limits and times that shape the whole
# program, each with its reason. Times are in seconds. Those in Times are options of the
# roles that use them. A number that only one section needs is at the head of that section.

MANUAL: Dict[str, str] = {}  # texts for `testcloud.py help`, each in the section that it is about

MANUAL["limits"] = """\
@limits

Short commands are sent ahead, so that a slot need not wait for the network. The broker
takes back those that wait for a slot while another worker has a free one, or for longer
than 0.1 s.

Until the end, the client keeps all outputs in unlinked files in $TMPDIR, for the result
hash. --brief changes nothing in that.

Machines that somebody works at

    $ testcloud.py worker --nice 10 --max-load 4 --memfree 2G

@options worker --max-load --memfree --nice

Past --max-load or --memfree a worker takes no new commands, and hands back those that
have not started. It goes on below 0.9 of that load, or above SIZE / 0.9 of free memory.
In a container the memory of its cgroup counts, too. A system that does not tell its free
memory gets a notice.

A SIZE may end with k, M or G.
"""

MANUAL["times"] = """\
@times

    --ready-interval  It is shorter if the broker's deadlines are. After a broker's start,
                      older commands wait so long, and at least 2 s, for the worker that
                      may still run them.
    --queued-timeout  Then the command goes to another worker.
    --client-lease    The broker then stops the client's commands.
    --lost-grace      A chained broker has --worker-expiry instead. With less than 1 s, a
                      worker that is stopped just then may start commands that were given
                      to others.
    --crash-limit     It counts workers that ran the command or had just got it.
    --kill-grace      It is for the process group of a command.

A TIME may have a unit: 500ms, 30s, 5m, 2h, 1d. Without one it is in seconds.
"""

# --- names
Seconds = float
Peer = bytes  # a connection's routing id at a ROUTER; b"" on a DEALER
Run = str  # names one client's run for all brokers and workers: the token on the wire
TaskKey = Tuple[Run, int, int]  # (run, id, attempt): one attempt of one command
Fields = Dict[str, Any]  # the decoded JSON of a line

CLIENTS = "clients"  # a broker's link to its clients
WORKERS = "workers"  # a broker's link to its workers
BROKER = "broker"  # the link of a client, a worker or a chained broker to its broker

BROKER_ROLE, CLIENT_ROLE, WORKER_ROLE = "broker", "client", "worker"
ROLE_OF = {CLIENTS: CLIENT_ROLE, WORKERS: WORKER_ROLE}  # of the peers on a broker's link

# exit statuses of ours; a signal's is 128 and its number
SOME_FAILED, WRONG_USAGE, UNABLE = 1, 2, 3

CLIENT_PORT = 2224
WORKER_PORT = 2225
PLAIN = "plain."  # prefix of a plain client's run, which ends with its broker

# --- sizes on the wire, in bytes
MAX_FRAME = 4 * 1024 * 1024  # libzmq closes a connection that sends a larger frame
BATCH_BYTES = MAX_FRAME // 16  # a body is closed past this size
INLINE = 64 * 1024  # of output inside a RESULT; the client fetches a larger one
PLAIN_INLINE = 256 * 1024  # for plain clients, who cannot fetch: the rest is cut off
#   MAX_FRAME has room for it: in JSON a control character takes six bytes
MAX_RESULT = 1024 * 1024  # of a plain worker; a longer one is cut to PLAIN_INLINE
CHUNK_SIZE = 512 * 1024  # large enough for speed, and sent in much less than a heartbeat
MAX_COMMAND = 512 * 1024  # of a command's JSON; Linux takes 128 KiB of shell text
OTHER_FIELDS = 2048  # of a command's JSON for all but cmd and cwd: numbers, names of workers
MAX_READY_TASKS = 10_000  # in one READY, at some 50 bytes each; more come in several READYs
MAX_READY_LOCKS = 500  # the same, of locks, whose names in JSON may take 2,400 bytes each
MAX_FRAMES = 8  # in one message

# --- limits of the memory of broker, client and worker (beside those in Links)
WINDOW = 4096  # commands that our client keeps at the broker at once
CREDIT = 32 * 1024 * 1024  # bytes of one client's results at the broker that lack their DONE
SPOOL_COST = 256 * 1024  # of CREDIT for a large output: its worker keeps a file open
FETCH_AHEAD = 8  # chunks on their way to one client: hides the round trip
MAX_PARTS = 100  # READYs that a broker keeps until the last of their series comes
MAX_CACHED_CONSTRAINTS = 100  # constraints whose eligible workers the broker remembers
READ_AHEAD = 4 * WINDOW  # lines of its input that a client holds before it can send them
MAX_BULK = 128  # chunks that a worker reads before it sends them
MAX_STOPPED = 1000  # stopped runs that a broker remembers: their clients may be away
MAX_UNANSWERED = 1000  # greetings whose time is remembered: many more than a lease has

# --- limits of work, logs and answers
MAX_BAD_LINES = 100  # in one body; the rest of it is ignored
MAX_COMPLAINTS = 20  # lines in the log about different bad messages, per COMPLAINT_INTERVAL
COMPLAINT_INTERVAL: Seconds = 10.0
ANSWERS_PER_SECOND = 5  # of each verb to a plain or unknown peer: ends a loop of answers
MAX_REASONS = 3  # for which a client's commands wait, in one line for people
MAX_UNFIT = 10  # hosts with too old workers, in one OK: enough for people
MAX_DEPTH = 8  # brokers in one chain; a longer one is taken for a mistake
STATUS_LIMIT = 100  # characters of a name in STATUS, and labels of a worker
MAX_PASSED_OVER = 16  # better workers that a task skips before its eligible ones are searched
MAX_LANES = 64  # of a client that one look goes through, in turns if there are more
SPAWN_LIMIT = 5  # failed starts of one command on machines that lack memory or the like

# --- how much is given ahead
PREFETCH = 16  # commands per slot that a worker may be given beyond its slots
PREFETCH_TIME = 80.0  # ms that these may take together, by the times of earlier commands
RECALL_DELAY: Seconds = PREFETCH_TIME / 1000 + 0.02  # one that still waits then goes elsewhere
REFILL_FRACTION = 1 / 16  # of the window: a client submits more when so much of it is free

# --- how long lines wait to share a message
OK_DELAY: Seconds = 0.05  # the broker's answers to greetings
REPORT_DELAY: Seconds = 0.01  # QUEUED, and the reports of a worker's slots
DONE_DELAY: Seconds = 0.05  # DONE
MAX_DONE = CREDIT // 8 // INLINE  # tasks in one DONE, so that credit comes back early

# --- other waits
TREE_TIMEOUT: Seconds = 60.0  # for a part of a tree: many hosts may share a slow uplink
ANNOUNCE_DELAY: Seconds = 0.05  # for the end of the input, which tells how many commands there are
NOTICE_DELAY: Seconds = 0.7  # a shorter wait gets no notice
ASK_DELAY: Seconds = 0.1  # from a wait's begin until the client asks the broker what for
OUTPUT_GRACE: Seconds = 0.1  # for output after its command's leader exited, or was killed
FINAL_WRITE_TIME: Seconds = 1.0  # for the transcript of an interrupted client
RECONNECT: Tuple[int, int] = (100, 1000)  # ms between attempts to connect, first and longest
REJOIN_TIME: Seconds = 2 * RECONNECT[1] / 1000  # all peers are back after a broker's restart

# --- times of the protocol


class Times(NamedTuple):
    """The times of the protocol, in seconds, and two limits: options of the command line."""

    ready_interval: Seconds = 2.0  # READY and HELLO: 2,000 workers make 1,000 messages a second
    missed_oks: int = 4  # unanswered greetings: then the connection is taken for dead
    queued_timeout: Seconds = 5.0  # a worker that is silent so long is stuck or stopped
    worker_expiry: Seconds = 10.0  # longer than missed_oks * ready_interval: it reconnects first
    client_lease: Seconds = 30.0  # survives a laptop's short sleep
    lost_grace: Seconds = 1.0  # a broken connection is usually back after RECONNECT
    kill_grace: Seconds = 2.0  # between SIGTERM and SIGKILL
    crash_limit: int = 3  # workers lost with one command: then it is suspected to be the cause


GREETING_FRACTION = 0.4  # of the broker's patience, between greetings: one may be lost or late
LEASE_FRACTION = 2 / 3  # of it: clocks differ, and the lease begins before the broker hears us
MIN_GREETING_INTERVAL: Seconds = 0.01  # however little patience the broker has
MAX_BACKOFF = 16  # times ready_interval between attempts to join, if the broker is slow
LONG_PAUSE: Seconds = Times().lost_grace / 2  # a process that was stopped for longer may have lost
#   its connection unnoticed, and after lost_grace its commands


# === Messages =========================================================================
#
# A table holds every verb: its way through the cloud, and a check for each field. decode()
# checks a line against the table, so that the machines see well-formed messages only. It
# raises ProtocolError for all that a peer got wrong.

MANUAL["protocol"] = """\
    worker > broker            READY
    broker > worker            OK
    client > broker            {"cmd":"pi 2"}
    broker > worker            {"cmd":"pi 2"}
    worker > broker > client   QUEUED {"cmd":"pi 2"}
    worker > broker > client   RESULT {"cmd":"pi 2","exitcode":0,"stdout":"3.12\\n","time":8}
    worker > broker            READY
    broker > worker            OK

A client or worker in another language needs no more than this. Such a peer is called
plain. testcloud's own brokers, workers and clients say more: see the messages below.

Frames and text

The transport is ZeroMQ over TCP, encrypted with CURVE if there is a key. The broker binds
a ROUTER for clients (port 2224) and a ROUTER for workers (port 2225). A peer connects a
DEALER.

The frames of a message are [body]. Commands between broker and worker, and the answers to
them, have the frames ["", token, body]. The token names a client's run or command. A
worker does not read it, and sends it back with each answer.

A body is UTF-8 text of one line or more, `VERB {json}`. A line that begins with { is a
command. In JSON, bytes that are not UTF-8 are lone surrogates U+DC80 to U+DCFF (PEP 383),
as in Python's surrogateescape. A CHUNK is alone in its body, and its bytes are in the
frame after it.

Plain clients

A plain client sends {"cmd": ...}, with "cwd" if it likes. Its JSON is at most 512 KiB. It
gets QUEUED and RESULT, each in a message of its own. In a RESULT, time is in
milliseconds.

It gets the first 256 KiB of an output, to the end of a character, and a mark. Bytes that
are not UTF-8 become U+FFFD. If testcloud has a reason for a failure, that is the last
line of stdout.

Plain workers

A plain worker has one slot, and is free when it says READY. With READY {"weight": 5} it
is preferred. It takes one command, and answers QUEUED, RESULT and READY again.

While idle it should repeat READY every few seconds. After 10 s of silence it gets a
command only if no other worker has room. If it does not answer QUEUED in 5 s, it gets
nothing more until it says READY. After a restart of the broker it must say READY again.

READY after QUEUED, without a RESULT between them, says that the command is lost, as if
the worker had crashed. To break off a command, the worker says READY or closes its
connection. A RESULT that cannot be read is a failure with exit code 126.

Errors

A message that nobody understands changes nothing. The answer is ERROR {"message": ...,
"reason": ...}. A plain peer gets at most five ERRORs a second. It gets as many OKs for a
READY without a RESULT before it; one OK more comes late. A worker that takes OK for a
command answers QUEUED OK. From then on it gets neither OK nor ERROR.

All messages

@messages

Tasks

A task is one attempt of one command, as its broker sees it. The table has each state, and
the states that may follow it.

@moves

Slots and locks

A command may need several slots of one worker (it is wide), and a lock. A lock has one
holder in the cloud. The topmost broker gives it to a task with a worker, or to a broker
below for one of its clients. The worker has it until it says RESULT or LOST, is given up,
or joins without the task. The lock "" is the run's own (--serial): its own broker gives
it.

Trees

A command may name a tree (--sync): directories, links, and files with their hashes. Its
worker has a workspace for each run of a client. It fetches from the client what its host
lacks, and then runs the setup. Until then the command takes no slot: it is a scout, one
for each host. The client's other commands go to workers that are prepared. A host is
unfit for a run if it cannot make the workspace, or if its setup fails.
"""


class ProtocolError(Exception):
    """A peer's line is not a valid message; the text says why."""


# --- bytes and text


def to_text(data: bytes) -> str:
    """Return any bytes as text from which to_bytes() makes the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """Return the bytes of a text from to_text() or from a peer's JSON."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte
        return text.encode("utf-8", "surrogatepass")


def in_utf8(text: str) -> str:
    """Replace lone surrogates by U+FFFD: other languages' JSON does not know them."""
    return to_bytes(text).decode("utf-8", "replace")


# --- checks of fields

Check = Callable[[Any], bool]


def described(what: str, check: Check) -> Check:
    """Describe a check by what it accepts. Errors say: this field must be `what`."""
    check.__doc__ = what
    return check


def list_of(what: str, check: Check) -> Check:
    return described("a list of " + what,
                     lambda value: type(value) is list and all(map(check, value)))


def rows_of(needs: Dict[str, Check], may_have: Dict[str, Check]) -> Check:
    """Return a check for a list of objects with these fields."""
    fields = {**needs, **may_have}
    return list_of("objects as of STATUS", lambda row: type(row) is dict
                   and needs.keys() <= row.keys()
                   and all(check(row[name]) for name, check in fields.items() if name in row))


MAX_COUNT = 2**53  # all JSON readers agree up to there
count = described("a whole number from 0 to 2**53",
                  lambda value: type(value) is int and 0 <= value <= MAX_COUNT)
integer = described("a whole number of 32 bits",
                    lambda value: type(value) is int and -(2**31) <= value < 2**31)
number = described("a number from 0 to 10**18",
                   lambda value: type(value) in (int, float) and 0 <= value < 1e18)
slot_count = described("a whole number up to 2**20",  # the sum over many workers is a count
                       lambda value: count(value) and value <= 2**20)
width = described("a whole number from 1 to 2**20", lambda value: slot_count(value) and value > 0)
flag = described("true or false", lambda value: type(value) is bool)
text = described("a text", lambda value: type(value) is str)
name = described("a name of 1 to 200 ASCII characters",  # the name of a run becomes a token
                 lambda value: type(value) is str and value.isascii() and 0 < len(value) <= 200)
environment = described("an object of texts, whose names have no = in them", lambda value:
                        type(value) is dict and all(
                            name and "=" not in name and "\0" not in name + str(word) and text(word)
                            for name, word in value.items()))
counts = list_of("whole numbers", count)
texts = list_of("texts", text)
pairs = list_of("[id, attempt]", lambda row: counts(row) and len(row) == 2)
triples = list_of("[run, id, attempt]", lambda row: type(row) is list and len(row) == 3
                  and name(row[0]) and counts(row[1:]))
lock_name = described("a text of at most 200 characters", lambda value: text(value)
                      and len(value) <= 200)
lock_rows = list_of("[lock] or [lock, run, id, attempt]", lambda row: type(row) is list
                    and len(row) in (1, 4) and lock_name(row[0]) and (
                        len(row) == 1 or name(row[1]) and counts(row[2:])))
spans = list_of("[offset, size]", lambda row: counts(row) and len(row) == 2)
tree_name = described("the 64 hex digits of a hash", lambda value: text(value)
                      and re.fullmatch("[0-9a-f]{64}", value) is not None)
returned = list_of("[mode, size], or [] for a missing file",
                   lambda row: counts(row) and len(row) in (0, 2))
machines = list_of("[host, slots, label, label...]", lambda row: type(row) is list
                   and len(row) > 1 and text(row[0]) and slot_count(row[1]) and texts(row[2:]))

# --- the table of messages


class Spec(NamedTuple):
    """A row of MESSAGES: a verb's way through the cloud, what it says, and its fields."""

    way: str
    means: str
    needs: Dict[str, Check]
    may_have: Dict[str, Check]


COMMAND = "{"  # the verb of a line that is a command
COUNTS = dict.fromkeys(("running", "held", "done", "failed"), count)
WORKER_ROWS = rows_of({
    "name": text, "host": text, "kind": text,  # worker, plain or broker
    "below": texts, "labels": texts, "slots": count, "weight": integer, **COUNTS,
    "load": number,  # 0 if unknown
    "there": flag, "silent": number},  # silent: for so many seconds
    {"cache": count})
CLIENT_ROWS = rows_of({
    "host": text, "kind": text,  # client, plain or above
    "there": flag, "queued": count, **COUNTS, "waits_for": text}, {"pid": count})  # 0 if unknown

MESSAGES: Dict[str, Spec] = {
    COMMAND: Spec("client > broker > worker",
        "run this command: cmd, cwd; id and attempt", {"cmd": text}, {
        "cwd": text, "id": count, "attempt": count,
        "again": flag,  # submitted before: a worker may run it already
        "had": text,  # the worker that had it, by name
        "avoid": text,  # a worker: only if there is no other
        "careful": flag,  # workers were lost with it: no other commands wait behind it
        "elsewhere": flag,  # wait for a worker other than `avoid`, if there is one
        "on": text, "not_on": text,  # hosts: wait for this one, or for another, if it exists
        "never_on": texts,  # hosts: if there is no other, the command is LOST
        "needs": texts,  # labels that a worker must have
        "slots": width,  # of one worker, which the command takes while it runs
        "lock": lock_name,  # one command at a time has it; "" is the run's own
        "delay": number,  # seconds between two starts of this run, at least
        "name": text,  # what the client's reports call it
        "timeout": number,  # seconds to run; 0 for no limit
        "limit": count,  # bytes of output to keep; 0 for all
        "env": environment,  # variables to set
        "shell": text,  # runs the command: a path, or a name in the worker's PATH; "": /bin/sh
        "split": flag,  # send the output in PIECES, of stdout and of stderr
        "tree": tree_name,  # run in a workspace with this tree; then cwd is below its top
        "manifest": count,  # bytes of the tree's manifest
        "return": texts,  # files to send with the output: paths from cwd
        "report": flag,  # the last one is of this run only: an older file counts as missing
        "cut": count}),  # bytes of output to send at most, inline
    "HELLO": Spec("client > broker",
        "my run; when joining: my unreported commands", {"run": name}, {
        "join": count, "beat": count, "unreported": counts, "version": text, "host": text,
        "pid": count, "backlog": count,  # commands that the client has not submitted yet
        "stops": flag}),  # it understands STOP
    "READY": Spec("worker > broker", "my name and slots; when joining: my tasks", {}, {
        "name": name, "join": count, "beat": count, "slots": slot_count, "weight": integer,
        "running": triples, "held": triples, "version": text, "user": text,
        "host": text,  # NAME/ID
        "labels": texts,
        "load": number,  # load average of its machine
        "cache": count,  # bytes of its workspaces
        "more": flag,  # a part of its tasks: more READYs follow
        "parts": count,  # how many such parts came before
        "below": texts,  # of a chained broker: the brokers of its subtree,
        "crew": machines,  # the machines of its workers,
        "widest": machines,  # the same as crew, with the slots of the largest worker there,
        "depth": count,  # and the brokers in its longest chain
        "locks": lock_rows}),  # that its tasks have; without a task: for its own clients
    "OK": Spec("broker > client, worker", "answer to HELLO or READY: workers, slots", {}, {
        "join": count, "beat": count,  # the number of the greeting that it answers
        "broker": text, "workers": count, "slots": count, "hosts": count, "above": texts,
        "lacks": text,  # labels of the client's commands that no worker has now
        "note": text,  # for the user who started the worker
        "trees": flag,  # this broker passes trees on
        "resources": flag,  # it knows slots, locks and delays, as do all brokers above
        "waits_for": text,  # the lock that the client's commands wait for, and who has it
        "unfit": texts,  # hosts with workers that are too old for the client's commands
        "host": text,  # the name that the broker shows for the worker's host
        "patience": number}),  # seconds of silence before the broker gives up a peer
    "WHO": Spec("broker > client, worker", "I do not know you (any more): join again", {}, {}),
    "QUEUED": Spec("worker > broker > client", "the worker has it, and it has not ended", {}, {
        "cmd": text, "tasks": pairs, "worker": text, "host": text,
        "preparing": text}),  # takes no slot yet: FILES or SETUP of its workspace come first
    "RESULT": Spec("worker > broker > client",
        "the command has ended: exitcode, stdout, time (ms)", {"exitcode": integer}, {
        "id": count, "attempt": count, "cmd": text, "stdout": text, "time": number,
        "started": number, "size": count, "worker": text, "host": text, "signal": count,
        "slot": count, "reason": text,
        "ran": flag,  # it did run, although exit code 126 has a reason
        "returned": returned,  # of its "return"; the contents follow the output in its stream
        "split": flag}),  # the output is in PIECES
    "LOST": Spec("worker > broker > client",
        "this attempt will bring no result", {"tasks": pairs, "why": text}, {
        "fault": text,  # CRASH, SPAWN, NOWHERE, UNFIT or ""
        "may_run": flag,  # it keeps its lock: LOST comes again when it certainly does not run
        "worker": text, "host": text, "output": text}),  # output: of a failed setup
    "DONE": Spec("client > broker > worker", "I have the result, forget it", {"tasks": pairs}, {}),
    "CANCEL": Spec("client > broker > worker",
        "stop and forget; without tasks: all of the run", {}, {"tasks": pairs}),
    "FETCH": Spec("client < broker > worker",
        "send me a part of this large output, or of this tree", {
        "id": count, "attempt": count, "offset": count, "size": count}, {
        "tree": tree_name,  # of its stream, not of the command's output
        "spans": spans,  # several, with `size` bytes together; the first is at `offset`
        "anew": flag,  # earlier requests, or their answers, may be lost: forget them
        "again": flag,  # what came had the wrong hash
        "got": count, "of": count, "host": text}),  # bytes that this host has, and lacked
    "CHUNK": Spec("client < broker > worker", "a part of a large output, or of a tree", {
        "id": count, "attempt": count, "offset": count}, {
        "tree": tree_name, "size": count,  # as in the FETCH
        "why": text}),  # instead of data: this tree is not there any more
    "RESEND": Spec("broker > worker",
        "send your last message about this task again", {"tasks": pairs}, {}),
    "RECALL": Spec("client > broker > worker",
        "hand this task back, unless you have started it", {"tasks": pairs}, {}),
    "BYE": Spec("client, worker > broker", "I am leaving", {}, {}),
    "SHUN": Spec("client > broker > broker",
        "use these hosts only if there are no others", {"hosts": texts}, {}),
    "LOCK": Spec("broker < > broker",
        "may a command of my clients have this lock? / it may", {"lock": lock_name}, {
        "has": flag,  # a command below has it already, from a broker that is gone
        "by": text}),  # who wants it, or from above: who has it; without: you have it
    "UNLOCK": Spec("broker > broker", "my clients need this lock no more", {"lock": lock_name}, {}),
    "STOP": Spec("client > broker > client", "stop the run of this client, if it is yours", {}, {
        "pid": count, "host": text,  # of the client, as in STATUS
        "by": text,  # who wants it
        "why": text,  # in the answer: why not, or ""
        "away": flag}),  # in the answer: the client is told when it joins again
    "STATUS": Spec("client > broker > client", "the workers and clients, and their work", {}, {
        "broker": text, "above": texts, "workers": WORKER_ROWS, "clients": CLIENT_ROWS}),
    "ERROR": Spec("any > any",
        "the fault in your message, which changed nothing", {}, {"message": text, "reason": text}),
}


class Message(NamedTuple):
    """A line that a machine received, with its origin."""

    link: str
    peer: Peer
    token: Run
    verb: str
    fields: Fields
    line: bytes
    data: Any  # the bytes of a CHUNK, or a buffer with them


# --- lines: encode and decode


def refuse_constant(name: str) -> None:
    """Refuse NaN and Infinity, which only Python takes for JSON."""
    raise ValueError(name + " is no JSON")


encoder: Any = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
encode_parts: Callable[[Any, int], Iterable[str]] = encoder.iterencode
with contextlib.suppress(AttributeError, TypeError):  # its encode() makes one of these each time
    encode_parts = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
        None, encoder.default, json.encoder.encode_basestring, None, ":", ",", False, False, True)
decoder: Any = json.JSONDecoder(parse_constant=refuse_constant)


def dump(value: Any) -> str:
    """Return the JSON text of a value."""
    return "".join(encode_parts(value, 0))


def load(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError."""
    try:
        value, end = decoder.scan_once(text, 0)  # takes half the time of decode()
        if end == len(text):
            return value
    except StopIteration:
        pass
    return decoder.decode(text)  # which allows space around it, and explains errors


def encode(verb: str, fields: Optional[Fields] = None) -> bytes:
    """Return a line, without a newline in it or after it."""
    if fields is None:
        return verb.encode()
    body = dump(fields).encode("utf-8", "backslashreplace")  # which JSON reads for surrogates
    return body if verb == COMMAND else verb.encode() + b" " + body


def decode(line: bytes) -> Tuple[str, Fields]:
    """Return a line's verb and fields, checked against MESSAGES. Raises ProtocolError."""
    if line[:1] == b"{":
        verb, body = COMMAND, line
    else:
        head, _, body = line.partition(b" ")
        verb = head.decode("ascii", "replace")
    spec = MESSAGES.get(verb)
    if spec is None:
        raise ProtocolError("unknown verb")
    fields: Any = {}
    if body:
        try:
            fields = load(body.decode())
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"{verb} without valid JSON: {str(error)[:80]}") from None
    if type(fields) is not dict:
        raise ProtocolError(f"{verb} needs a JSON object")
    for name, check in spec.needs.items():
        if name not in fields or not check(fields[name]):
            raise ProtocolError(f"{verb} needs {name!r}: {check.__doc__}")
    may_have = spec.may_have
    for name, value in fields.items():
        if name in may_have and not may_have[name](value):
            raise ProtocolError(f"{verb} wants {name!r} to be {may_have[name].__doc__}")
    return verb, fields


def fingerprint(key: str) -> str:
    """Return 16 digits of a public key's hash, or "" without a key.

    Names of runs begin with it, names of workers end with it: no other key can use them, also
    after a broker's restart."""
    return hashlib.sha256(key.encode()).hexdigest()[:16] if key else ""


def require_run(token: Run) -> None:
    """Raise ProtocolError if the token is no name of a run: READY could not list the command."""
    if not name(token):
        raise ProtocolError("a command needs the name of its run as token")


# --- text for people

MAX_TEXT = 1000  # characters of a reason or a name from elsewhere
HIGH_BYTES = "".join(map(chr, range(0xdca0, 0xdd00)))  # on some terminals they are letters
NOT_PRINTABLE_ASCII = re.compile("[^ -~]+")


def cut_mark(sent: int, size: int) -> str:
    return f"\n[testcloud: output cut after {sent} of {size} bytes]\n"


def noun(number: float, what: str) -> str:
    """Return the word for so many."""
    return what if number == 1 else what + "s"


def plural(number: int, what: str) -> str:
    return f"{number} {noun(number, what)}"


def grouped(number: int, what: str) -> str:
    """The same with 1,234."""
    return f"{number:,} {noun(number, what)}"


def duration(seconds: Seconds, whole: bool = False) -> str:
    """For people: 8.14 ms, 1.23 s, 63.1 s, 2 min 3 s, 2 h 3 min; in whole seconds: 0 s, 63 s."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 120:
        return f"{minutes // 60} h {minutes % 60} min"
    if minutes >= 2:
        return f"{minutes} min {rest} s"
    if whole:
        return f"{round(seconds)} s"
    if seconds < 1:
        return f"{seconds * 1000:.2f} ms"
    return f"{seconds:.{2 if seconds < 10 else 1}f} s"


def amount(size: float) -> str:
    """For people: 7 bytes, 12 kB, 1.5 MB, 80 MB, 2.1 GB."""
    power = 0
    while size >= 999.5 and power < 3:
        size, power = size / 1000, power + 1
    return f"{size:.{int(power > 0 and size < 9.95)}f} {('bytes', 'kB', 'MB', 'GB')[power]}"


def truncate(text: str, limit: int = MAX_TEXT) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def truncate_middle(text: str, limit: int = MAX_TEXT) -> str:
    """Cut a long text in its middle: names and commands differ at their ends."""
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:limit - 3 - half]}...{text[len(text) - half:]}"


def printable(value: Union[str, bytes], limit: int = 80) -> str:
    """Return a peer's text, safe to show on one line of a terminal or log."""
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return escape_unprintable(truncate(shown, limit), "")


def escape_command(command: str) -> str:
    """Escape only what would steer a terminal or hide a part of the command."""
    return escape_unprintable(command, "\t" + HIGH_BYTES)


def escape_unprintable(text: str, keep: str = "\t\n") -> str:
    """Escape characters that are invisible, move others, or stand for a byte."""
    return NOT_PRINTABLE_ASCII.sub(lambda found: "".join(
        c if c.isprintable() or c in keep else escape_of(c) for c in found[0]), text)


def escape_of(c: str) -> str:
    return f"\\x{ord(c) & 0xff:02x}" if "\udc80" <= c <= "\udcff" else repr(c)[1:-1]


def natural_order(names: Sequence[object]) -> List[object]:
    """A key for sorting: host2 comes before host10."""
    return [[(len(part), part) if at % 2 else part  # no int(): a host's name may have many digits
             for at, part in enumerate(re.split(r"(\d+)", str(name)))] for name in names]


# === Machines =========================================================================
#
# Broker, worker and client are machines without I/O. The loop (section Event loop) tells a
# machine what happened and when: receive, connected, disconnected, tick. The machine puts
# lines into its outbox and orders into its effects; the loop takes both. Lines to the same
# receiver leave in one body: this batching makes the program fast.

MANUAL["promises"] = """\
Every command is reported exactly once

A client reports every command once, whichever broker, worker or connection is killed,
paused, cut or restarted meanwhile.

A command starts again only for a reason

Failures are tried again with --retries. Otherwise testcloud starts a command again only
in three cases:

- It could not be started on its host: exit code 126 or 127 within a second.
- Its worker is gone, or silent past its deadline.
- Its client was silent for longer than --client-lease, because it was stopped or asleep.
  The broker stops the commands of such a client. They run again when the client is back,
  which it then says.

So a command may run more than once: a worker that was cut off may have run it, too. Such
a worker starts nothing more when it has not heard from its broker for two thirds of the
deadline. While the broker itself is stopped or too busy, no deadline of others passes.

A broker keeps nothing on disk. After its restart, clients and workers tell it all that it
must know, and no command runs twice. There are four exceptions:

- A worker takes longer than 10 s (--worker-expiry) to find the new broker. If the client
  had not heard yet that the worker has the command, 2 s are too long.
- The worker is a plain one, which does not tell what it runs (see `help protocol`).
- The broker has got a key meanwhile.
- Below a chained broker, a worker may start what is already lost for the broker above,
  until these deadlines are over.

A command may be what brings workers down. It has failed when --crash-limit workers (3)
were lost that ran it or had just got it. The client keeps this count, also when the
broker restarts. Only a broker that dies in the same moment as the worker takes its
knowledge with it.

Nothing is left behind

When a command ends, is cancelled, or loses its worker, its processes are gone within
seconds. That includes processes in sessions of their own (setsid). The commands of a
client that leaves are gone as fast. If the client cannot say goodbye (kill -9, or no
broker), they are gone after --client-lease. There are three limits:

- Commands survive if a worker and its supervisor are killed at once.
- A process that hangs in the kernel cannot be killed. The worker's log names it.
- Without Linux, only the process group of a command is killed.

Memory is bounded

If too many results wait for a client, no more of its commands start (see `help limits`).
Other clients go on. Large outputs wait on the worker's disk until they are fetched.

No silent wait

If testcloud waits for something, it says for what, within a second.

How this is tested

- `make test` simulates worlds with crashes, pauses, cut and silent connections, and
  chains of three brokers. `make soak MINUTES=60` simulates more.
- `make chaos` kills, stops and cuts off real processes by a schedule. Each command must
  be reported once, start again only where a worker was lost, and leave no process.
- `make fuzz` sends a million messages, from true ones to noise, to every socket of the
  program while it works.
"""


class Outgoing(NamedTuple):
    """A body to be sent: on which link, to which peer, for which run."""

    link: str
    peer: Peer
    token: Run
    body: bytes
    data: Any  # as of a Message


class Log(NamedTuple):
    """Effect: write a line to the operator's log."""

    level: int
    text: str


class Notice(NamedTuple):
    """Effect: write a line to stderr for the user; with --quiet only errors."""

    text: str
    error: bool = False


class Reconnect(NamedTuple):
    """Effect: close this link's socket and connect a new one."""

    link: str


class Exit(NamedTuple):
    """Effect: end the program with this status."""

    status: int


def batch_lines(lines: List[bytes], limit: int) -> Iterator[bytes]:
    """Join the lines into bodies of about `limit` bytes, each of at least one line."""
    size = 0
    batch: List[bytes] = []
    for line in lines:
        if batch and size + len(line) > limit:
            yield b"\n".join(batch)
            size, batch = 0, []
        size += len(line)
        batch.append(line)
    yield b"\n".join(batch)


class RecentTexts:
    """Texts that came within the last `interval` seconds. They are not shown again."""

    def __init__(self, interval: Seconds) -> None:
        self.interval = interval
        self.until: Dict[str, Seconds] = {}  # by text

    def is_new(self, text: str, now: Seconds, limit: float) -> bool:
        """Note that a text has come. Return whether to show it: it is not among the recent texts,
        and these are fewer than `limit`."""
        self.until = {old: until for old, until in self.until.items() if until > now}
        known = text in self.until
        if not known and len(self.until) >= limit:
            return False
        self.until[text] = now + self.interval
        return not known


class Machine:
    """Base of broker, worker and client: lines in, lines out, one table of handlers."""

    # by (link, verb): the name of the method
    HANDLERS: Dict[Tuple[str, str], str] = {}

    def __init__(self) -> None:
        # by receiver: batches of lines with the same token, in the order of say(); an OK that
        # ends joining must not overtake earlier lines
        self.outbox: Dict[Tuple[str, Peer], List[Tuple[Run, List[bytes]]]] = {}
        self.bulk: List[Outgoing] = []  # CHUNKs: each in its own message, after the lines
        self.effects: List[Any] = []
        self.now: Seconds = 0.0  # the time of the present event
        self.wait = Wait()
        self.last_complaint = ""  # the reason in the last ERROR from a peer
        self.complaints = RecentTexts(COMPLAINT_INTERVAL)  # the reasons of bad messages

    def say(self, link: str, peer: Peer, token: Run, verb: str,
            fields: Optional[Fields] = None) -> None:
        self.send_line(link, peer, token, encode(verb, fields))

    def send_line(self, link: str, peer: Peer, token: Run, line: bytes) -> None:
        batches = self.outbox.setdefault((link, peer), [])
        if not batches or batches[-1][0] != token:
            batches.append((token, []))
        batches[-1][1].append(line)

    def log(self, level: int, message: str) -> None:
        self.effects.append(Log(level, message))

    def receive(self, link: str, peer: Peer, token: Run, body: bytes, data: Any,
                now: Seconds) -> None:
        """Handle each line of a body. Bad lines change nothing; ERROR answers the first."""
        self.now = now
        self.heard(link, peer)
        bad = 0
        if not body.strip(b"\n"):
            self.complain(link, peer, token, body, "an empty message")
        for line in filter(None, body.split(b"\n")):
            try:
                self.handle(link, peer, token, line, data)
            except ProtocolError as error:
                bad += 1
                if bad == 1:
                    self.complain(link, peer, token, line, str(error))
                elif bad > MAX_BAD_LINES:
                    break
        self.settle()

    def handle(self, link: str, peer: Peer, token: Run, line: bytes, data: Any) -> None:
        """Call the handler of this line. Raises ProtocolError."""
        verb, fields = decode(line)
        handler = self.HANDLERS.get((link, verb))
        if handler is None:
            other = next((other for other, known in self.HANDLERS if known == verb), "")
            raise ProtocolError(f"{verb} is not understood on the link to {link}" + (
                f", but on that to {other}: is the port right?" if other else ""))
        if self.accepts(link, verb):
            getattr(self, handler)(Message(link, peer, token, verb, fields, line, data))

    def complain(self, link: str, peer: Peer, token: Run, line: bytes, reason: str) -> None:
        """Answer a bad message with ERROR, and log it. A bad ERROR gets no answer."""
        if self.complaints.is_new(reason, self.now, MAX_COMPLAINTS):
            self.log(logging.WARNING, f"bad message on {link}: {reason}: {printable(line)}")
        if not line.startswith(b"ERROR"):
            self.say(link, peer, token, "ERROR", {"message": printable(line), "reason": reason})

    def report_wait(self, cause: str) -> None:
        """Tell the user what we wait for now; "" for nothing."""
        notice = self.wait.notice(cause, self.now)
        if notice:
            self.effects.append(Notice(notice))

    def on_error(self, message: Message) -> None:
        reason = printable(message.fields.get("reason", ""), 200)
        about = printable(message.fields.get("message", ""))
        level = logging.DEBUG if reason == self.last_complaint else logging.WARNING
        self.last_complaint = reason  # one warning, not one per heartbeat
        self.log(level, f"peer on {message.link} complains: {reason}: {about}")

    def take(self) -> Tuple[List[Outgoing], List[Any]]:
        """Return all that is to be sent and done now, and forget it."""
        outgoing: List[Outgoing] = []
        for (link, peer), batches in self.outbox.items():
            limit = BATCH_BYTES if self.knows_batches(link, peer) else 0
            for token, lines in batches:
                outgoing += [Outgoing(link, peer, token, body, b"")
                             for body in batch_lines(lines, limit)]
        outgoing += self.bulk
        effects, self.effects = self.effects, []
        self.outbox, self.bulk = {}, []
        return outgoing, effects

    def knows_batches(self, link: str, peer: Peer) -> bool:
        """Return whether this peer can read a body of several lines. Plain peers cannot."""
        return True

    # --- events from the loop

    def heard(self, link: str, peer: Peer) -> None:
        """The peer sent something: it is alive."""

    def accepts(self, link: str, verb: str) -> bool:
        """Return whether this verb is accepted now. Others are dropped without an answer."""
        return True

    def settle(self) -> None:
        """All lines of a body, or a tick, have been handled."""

    def connected(self, link: str, now: Seconds) -> None:
        """The link to the broker is up."""

    def disconnected(self, link: str, peer: Peer, now: Seconds) -> None:
        """The connection is closed."""

    def refused(self, link: str, why: str, now: Seconds) -> None:
        """The link to the broker cannot come up: `why`."""

    def key_changed(self, mark: str) -> None:
        """We connect with another key from now on; our names carry its fingerprint, `mark`."""

    def identified(self, link: str, peer: Peer, key: str, own: bool = False) -> None:
        """The peer of a new connection has proven that it holds this public key. `own`: it is
        in the cloud's own key file, and no holder's."""

    def revoked(self, link: str, peer: Peer, now: Seconds) -> None:
        """The peer's key was revoked, and its connection closed."""

    def paused(self, gap: Seconds, now: Seconds) -> None:
        """The process was stopped or busy: it is `gap` seconds late."""

    def tick(self, now: Seconds) -> None:
        """Do what is due at this time."""

    def deadline(self) -> Seconds:
        """Return when tick() must be called next, at the latest."""
        return math.inf


class Session:
    """A peer's session with its broker: join, send heartbeats, join again.

    A greeting (HELLO or READY) is a heartbeat with a number; an OK names the greeting that it
    answers. A joining greeting lists all tasks. Only its own OK ends joining: older messages
    cannot. The peer joins again on a new connection, after WHO, and on a new socket when the
    broker is silent.

    The broker gives tasks to others when their peer is silent for longer than its patience.
    So each OK is a lease, which begins when its greeting was sent; without a lease the peer
    starts nothing. A command without a lease may be old. It waits for the OK to a later
    greeting: by then all that the broker said about it has arrived.
    """

    def __init__(self, owner: Machine, verb: str, greeting: Callable[[bool], Fields],
                 times: Times) -> None:
        self.owner = owner
        self.verb = verb  # HELLO or READY
        self.greeting = greeting
        self.times = times
        self.up = False  # whether the connection is up
        self.trouble = ""  # why it is not
        self.joined = False
        self.number = 0  # of the last greeting
        self.unanswered = 0  # greetings since the broker was heard
        self.ready_interval = max(times.ready_interval, OK_DELAY)  # the OK takes OK_DELAY
        self.interval = self.ready_interval
        self.backoff = 1  # intervals between attempts to join
        self.next_greeting: Seconds = 0.0
        self.heard_at: Seconds = -math.inf
        self.patience: Seconds = math.inf  # the broker's
        self.sent: Dict[int, Seconds] = {}  # unanswered greetings by number: when they were sent
        self.lease_began: Seconds = -math.inf
        self.doubted_at: Seconds = -math.inf
        self.announced: Fields = {}  # fields of the joining greeting

    def greet(self, now: Seconds) -> None:
        fields = self.greeting(not self.joined)
        self.number += 1
        fields["beat" if self.joined else "join"] = self.number
        if not self.joined:
            self.announced = fields
        self.sent[self.number] = now
        if len(self.sent) > MAX_UNANSWERED:
            del self.sent[min(self.sent)]
        for part in split_greeting(fields):
            self.owner.say(BROKER, b"", "", self.verb, part)
        self.unanswered += 1
        self.next_greeting = now + (1 if self.joined else self.backoff) * self.interval

    def join(self, now: Seconds) -> None:
        self.joined = False
        self.greet(now)

    def join_again(self, now: Seconds) -> None:
        """Join anew, unless that is under way."""
        if self.joined:
            self.join(now)

    def connected(self, now: Seconds) -> None:
        self.up = True
        self.trouble = ""
        self.unanswered = 0
        self.join(now)

    def disconnected(self) -> None:
        self.up = False
        self.joined = False

    def heard(self, now: Seconds) -> None:
        self.unanswered = 0
        self.heard_at = now

    def paused(self, gap: Seconds, now: Seconds) -> None:
        """Join again if the lease or the connection may be lost: the broker may have given our
        commands to others, also those that wait in our socket."""
        self.heard_at += gap
        if self.joined and (gap > LONG_PAUSE or not self.leased()):
            self.join(now)

    def accepts(self, verb: str) -> bool:
        """Return whether to handle this verb. While we join, records may differ: the broker takes
        back all other tasks when it finds them missing."""
        return self.joined or verb in ("OK", "WHO", "ERROR", "CANCEL", "RECALL")

    def on_ok(self, fields: Fields) -> bool:
        """Handle an OK; return whether it ends joining."""
        if "patience" in fields:
            self.patience = fields["patience"]
            self.interval = min(self.ready_interval, max(
                self.patience * GREETING_FRACTION, MIN_GREETING_INTERVAL))
        joins = not self.joined and self.number > 0 and fields.get("join") == self.number
        if joins:
            self.joined = self.up = True
            self.backoff = 1
        elif not self.joined and "join" in fields:  # to an earlier attempt: the broker is slow
            self.backoff = min(2 * self.backoff, MAX_BACKOFF)
            self.next_greeting = self.owner.now + self.backoff * self.interval
        if self.joined:
            self.next_greeting = min(self.next_greeting, self.owner.now + self.interval)
        answered = self.sent.get(fields.get("join" if joins else "beat", 0))
        if self.joined and answered is not None:
            self.lease_began = answered
            self.sent = {number: when for number, when in self.sent.items() if when > answered}
        return joins

    def leased(self) -> bool:
        """Return whether we hold a lease: the broker has given our commands to no other worker."""
        return self.joined and self.lease_began > self.doubted_at \
            and self.owner.now < self.lease_ends()

    def lease_ends(self) -> Seconds:
        return self.lease_began + LEASE_FRACTION * self.patience

    def on_command(self) -> None:
        """A command has come: doubt it if there is no lease."""
        if not self.leased():
            self.doubted_at = self.owner.now

    def tick(self, now: Seconds) -> None:
        if now < self.next_greeting:
            return
        if self.unanswered > self.times.missed_oks:
            self.unanswered = 0
            self.disconnected()
            self.owner.effects.append(Reconnect(BROKER))
        if self.up:
            self.greet(now)
        else:  # no greeting: the broker might hear it after the one that follows connected()
            self.unanswered += 1
            self.next_greeting = now + self.interval


TASK_LISTS = ("running", "held", "locks")  # the fields of READY that may be long


def split_greeting(fields: Fields) -> List[Fields]:
    """Return a greeting in parts that fit a frame: all but the last have `more`."""
    lists = {key: fields[key] for key in TASK_LISTS if key in fields}
    limits = {**dict.fromkeys(lists, MAX_READY_TASKS), "locks": MAX_READY_LOCKS}
    if sum(map(len, lists.values())) <= MAX_READY_TASKS \
            and all(len(rows) <= limits[key] for key, rows in lists.items()):
        return [fields]
    parts = [{"name": fields["name"], "join": fields["join"], "more": True,
              key: rows[at:at + limits[key]]}
             for key, rows in lists.items() for at in range(0, len(rows), limits[key])]
    return [*parts, {**fields, **{key: [] for key in lists}, "parts": len(parts)}]


class Wait:
    """Tracks a wait: its cause, its notices, its time limit."""

    def __init__(self, limit: Seconds = math.inf) -> None:
        self.limit = limit
        self.cause = ""  # "" if there is no wait
        self.since: Seconds = 0.0  # when this cause began
        self.began: Seconds = 0.0  # when the wait began, over all causes
        self.said = ""  # the cause in the last notice

    def notice(self, cause: str, now: Seconds) -> str:
        """Note what we wait for now, "" for nothing; return the notice that is due, or ""."""
        if cause != self.cause:
            if not self.cause:
                self.began = now
            self.cause, self.since = cause, now
        if not cause and self.said:
            self.said = ""
            return "the wait is over, going on"
        if cause and cause != self.said and now >= self.since + NOTICE_DELAY:
            self.said = cause
            return cause
        return ""

    def timed_out(self, now: Seconds) -> bool:
        return bool(self.cause) and now >= self.began + self.limit

    def deadline(self) -> Seconds:
        if not self.cause:
            return math.inf
        notice = self.since + NOTICE_DELAY if self.said != self.cause else math.inf
        return min(notice, self.began + self.limit)


class HostNames:
    """Short names for hosts, whose workers tell their identity NAME/ID.

    Hosts with the same NAME are shown as vm, vm~2, in the order in which they are seen. A
    broker tells its workers these names, so that all users see the same. The identity of a
    plain worker is only a name."""

    def __init__(self) -> None:
        self.identities: Dict[str, str] = {}  # by name
        self.names: Dict[Tuple[str, str], str] = {}  # by NAME without ~N, and ID

    def key(self, identity: str) -> Tuple[str, str]:
        name, _, id = identity.rpartition("/")
        return (name or id).partition("~")[0], id if name else ""

    def name_of(self, identity: str) -> str:
        base, id = key = self.key(identity)
        if key not in self.names:
            name = identity.rpartition("/")[0] or identity
            numbered = (f"{base}~{n}" for n in itertools.count(2))
            while name in self.identities:
                name = next(numbered)
            self.names[key] = name
            self.identities[name] = identity
        return self.names[key]

    def identity_of(self, name: str) -> str:
        return self.identities.get(name, name)

    def forget(self, identity: str) -> None:
        self.identities.pop(self.names.pop(self.key(identity), ""), None)


class SessionMachine(Machine):
    """Base of worker and client: one link, BROKER, and a session on it."""

    def __init__(self, verb: str, times: Times, wait: Seconds) -> None:
        super().__init__()
        self.times = times
        self.session = Session(self, verb, self.greeting, times)
        self.wait = Wait(wait)

    def greeting(self, joining: bool) -> Fields:
        """Return the fields of HELLO or READY; when joining, with all that we have."""
        raise NotImplementedError

    def tell_broker(self, verb: str, fields: Optional[Fields] = None) -> None:
        self.say(BROKER, b"", "", verb, fields)

    def heard(self, link: str, peer: Peer) -> None:
        self.session.heard(self.now)

    def connected(self, link: str, now: Seconds) -> None:
        self.now = now
        self.session.connected(now)
        self.settle()

    def disconnected(self, link: str, peer: Peer, now: Seconds) -> None:
        self.now = now
        self.session.disconnected()
        self.settle()

    def refused(self, link: str, why: str, now: Seconds) -> None:
        self.now = now
        self.session.trouble = why
        self.settle()

    def on_who(self, message: Message) -> None:
        self.session.join_again(self.now)

    def on_error(self, message: Message) -> None:
        if self.session.joined:  # before, the notice of the wait is enough
            super().on_error(message)


# === Tasks ============================================================================
#
# A Task is one attempt of one command. A broker has one for each attempt that a client has
# submitted and not confirmed yet. MOVES says which state may follow which.

RECOVERING, WAITING, ASSIGNED = "RECOVERING", "WAITING", "ASSIGNED"
RUNNING, DELIVERED, GONE = "RUNNING", "DELIVERED", "GONE"

MOVES: Dict[str, Tuple[str, ...]] = {
    RECOVERING: (RUNNING, DELIVERED, GONE),
    WAITING: (ASSIGNED, RUNNING, DELIVERED, GONE),
    ASSIGNED: (WAITING, RUNNING, DELIVERED, GONE),
    RUNNING: (WAITING, RUNNING, DELIVERED, GONE),
    DELIVERED: (DELIVERED, GONE),
    GONE: (),
}
STATES = {RECOVERING: "resubmitted to a new broker", WAITING: "in its client's queue",
          ASSIGNED: "sent to a worker", RUNNING: "accepted by the worker (QUEUED)",
          DELIVERED: "RESULT passed on, no DONE yet", GONE: "no task of the broker any more"}
BUSY = (ASSIGNED, RUNNING)  # the states in which a task takes a slot, unless it is preparing

CRASH, SPAWN = "crash", "spawn"  # faults: the worker was lost; it could not start a process;
NOWHERE = "nowhere"  # there is no other host
UNFIT = "unfit"  # no workspace can be made on this host

FILES, SETUP = "files", "setup"  # how a workspace is prepared, while its commands take no slot
TREES = "(trees)"  # label of workers that know trees; no user can give it
RESOURCES = "(resources)"  # the same, of those that know slots and locks
# what versions with these labels know, the newest last; flags of OK have the same names
KNOWN_BY_LABEL = {TREES: "--sync", RESOURCES: "--slots-each, --lock, --serial and --delay"}


Lock = Tuple[Run, str]  # the run whose own lock it is, "" for all; its name


class Faults:
    """Counts the losses of a command, by fault."""

    __slots__ = ("crashes", "spawns")

    def __init__(self) -> None:
        self.crashes = 0  # workers that were lost while they had it
        self.spawns = 0  # attempts that failed because the machine was short of something

    def count(self, fault: str, why: str, times: Times) -> str:
        """Count a fault ("" is none). Return why the command must not be tried again, or ""."""
        self.crashes += fault == CRASH
        self.spawns += fault == SPAWN
        if self.crashes >= times.crash_limit:
            return (f"{self.crashes} workers were lost while they had it, and it is "
                    f"suspected to be the cause; last: {why}")
        if self.spawns >= SPAWN_LIMIT:
            return f"could not be started, {self.spawns} times; last: {why}"
        return ""


class Place(NamedTuple):
    """The slots of one worker on one host with the same labels. A chained broker has several."""

    host: str
    labels: FrozenSet[str]
    slots: int  # of the largest worker there
    worker: WorkerSlots


class Constraints(NamedTuple):
    """The places where a task may run.

    `needs`, `never_on` and `slots` are strict. The others are preferences: each holds as long as
    a place is left, in the order of eligible()."""

    needs: FrozenSet[str] = frozenset()  # labels
    excluded: FrozenSet[str] = frozenset()  # hosts
    on: str = ""  # a host
    not_on: str = ""  # a host
    avoid: str = ""  # name of a worker
    never_on: FrozenSet[str] = frozenset()  # hosts
    slots: int = 1  # of one worker

    def eligible(self, places: Iterable[Place]) -> Set[WorkerSlots]:
        """Return the workers of these places that may run the task."""
        left = [it for it in places
                if it.slots >= self.slots and self.needs <= it.labels
                and it.host not in self.never_on]
        for prefers in (lambda it: it.host not in self.excluded,
                        lambda it: not self.on or it.host == self.on,
                        lambda it: it.host != self.not_on,
                        lambda it: it.worker.name != self.avoid):
            left = list(filter(prefers, left)) or left
        return {it.worker for it in left}


UNCONSTRAINED = Constraints()
NONE: FrozenSet[str] = frozenset()


class Task:
    """One attempt of one command."""

    __slots__ = ("client", "id", "attempt", "key", "state", "line", "worker", "avoid",
                 "constraints", "lock", "delay", "order", "since", "reserved_at", "reserved_since",
                 "preparing", "told_above", "had", "careful", "faults", "cost", "result", "plain",
                 "has_ended")

    def __init__(self, client: ClientRecord, id: int, attempt: int, line: bytes) -> None:
        self.client = client
        self.id = id
        self.attempt = attempt
        self.key: TaskKey = (client.run, id, attempt)
        self.state = WAITING
        self.line = line  # as the client sent it; b"" if only its worker reported it
        self.worker: Optional[WorkerRecord] = None  # in ASSIGNED, RUNNING and DELIVERED
        self.avoid = ""  # name of the worker that lost the attempt before
        self.constraints = UNCONSTRAINED
        self.lock: Optional[Lock] = None
        self.delay: Seconds = 0.0  # from its start to the next one of its client, at least
        self.order = 0  # its place in its client's queue
        self.since: Seconds = 0.0  # when it began to take slots
        self.reserved_at: Optional[WorkerSlots] = None  # a worker with a reservation for it
        self.reserved_since: Seconds = math.inf  # time of its first reservation
        self.preparing = ""  # FILES or SETUP while BUSY: its workspace is not there yet
        self.told_above = ""  # the same, as the broker above knows it
        self.had = ""  # in RECOVERING: name of the worker that had it last
        self.careful = False  # workers were lost with it: no other task waits behind it
        self.faults = Faults()  # of a plain client's command; other clients count themselves
        self.cost = 0  # in DELIVERED: bytes that wait for its client
        self.result = b""  # RESULT of a plain worker, which does not keep it
        self.plain: Fields = {}  # cmd and cwd of a plain client's command
        self.has_ended = False  # a worker has joined with its result: it has no lock any more

    @property
    def slots(self) -> int:
        return self.constraints.slots

    @property
    def needs_tree(self) -> bool:
        return TREES in self.constraints.needs


def stream_size(result: Fields) -> int:
    """Return the bytes of a RESULT's output and of the files that follow it (--return)."""
    rows: List[List[int]] = result.get("returned", [])
    size: int = result.get("size", 0)
    return size + sum(row[1] for row in rows if row)


# === Trees ============================================================================
#
# A tree is what a working directory holds: directories, files and links, each an Entry. Its
# manifest lists them, and its id is the manifest's hash. A command may name the tree in which
# it runs. The stream of a tree is its manifest, then the contents of its files in order. A
# worker that lacks the tree fetches spans of this stream from the command's client: first the
# manifest, then the contents that its host has not seen yet. Nothing here touches files.

DIRECTORY, FILE, LINK = "d", "f", "l"  # kinds of entries
NO_NAMES = frozenset(("", ".", ".."))  # in a path of a tree
MAX_ENTRIES = 1_000_000  # of a tree: a manifest of them takes some 100 MB
MAX_MANIFEST = 256 * 1024 * 1024  # bytes, unpacked
MAX_SPANS = 1000  # in one FETCH, at some 20 bytes each
OFFERED_AHEAD = 16 * CHUNK_SIZE  # to all workers: bounds our memory, and the wait of other messages
SETUP_OUTPUT = INLINE // 2  # bytes: the end of what a failed setup has printed
TRANSFER_NOTICE: Seconds = 1.0  # a transfer or setup that takes longer is told,
TRANSFER_INTERVAL: Seconds = 10.0  # and told again
Span = Tuple[int, int]  # offset in a stream, size


class TreeError(Exception):
    """A manifest is invalid; the text says why."""


class Entry(NamedTuple):
    """A directory, file or link of a tree."""

    path: str  # relative to the top, with / between names
    kind: str
    mode: int  # permission bits; 0 of a link
    size: int  # bytes of a file's content; else 0
    content: str  # a file's SHA-256 in hex; a link's target; else ""
    mtime: int  # of a file, in ns since 1970; else 0. Workers keep only the order of these times


class Tree:
    """A tree: its entries and its head, which says what belongs to its workspaces.

    The head has `origin` and `name` (whose tree it is), `setup` (a command, "" for none), `cwd`
    (where it runs), `setup_for` (a hash: setup runs again if it changes), `fresh` ("" or a word:
    a workspace with another word is emptied)."""

    def __init__(self, head: Fields, entries: List[Entry], manifest: bytes) -> None:
        self.head = head
        self.entries = entries  # by path: a directory comes before what is in it
        self.manifest = manifest
        self.id = hashlib.sha256(manifest).hexdigest()
        sizes = (entry.size for entry in entries)
        self.offsets = [*itertools.accumulate(sizes, initial=len(manifest))]  # in the stream
        self.size = self.offsets[-1] - len(manifest)  # bytes of all contents

    def spans_of(self, indexes: Iterable[int]) -> List[Span]:
        """Return where the contents of these entries are in the stream; indexes ascend."""
        spans: List[Span] = []
        for index in indexes:
            offset, size = self.offsets[index], self.entries[index].size
            if spans and sum(spans[-1]) == offset:
                spans[-1] = (spans[-1][0], spans[-1][1] + size)
            elif size:
                spans.append((offset, size))
        return spans

    def pieces_of(self, spans: Iterable[Span]) -> Iterator[Tuple[int, int, int]]:
        """Yield (index, offset, size) of the parts of contents that these spans hold. The part of a
        span that is outside of the contents is left out."""
        for start, size in spans:
            end = min(start + size, self.offsets[-1])
            start = max(start, self.offsets[0])
            index = bisect.bisect_right(self.offsets, start) - 1
            while start < end:
                part = min(self.offsets[index + 1], end) - start
                if part:
                    yield index, start - self.offsets[index], part
                start, index = start + part, index + 1


def make_tree(head: Fields, entries: Iterable[Entry]) -> Tree:
    """Return the tree of these entries, which may come in any order."""
    ordered = sorted(entries)
    return Tree(head, ordered, zlib.compress(
        dump([head, ordered]).encode("utf-8", "backslashreplace"), 1))


def parse_tree(manifest: bytes) -> Tree:
    """Return the tree of a manifest from elsewhere. Raises TreeError."""
    try:
        unpacker = zlib.decompressobj()
        unpacked = unpacker.decompress(manifest, MAX_MANIFEST)
        if not unpacker.eof or unpacker.unused_data:
            raise TreeError(f"a manifest is at most {MAX_MANIFEST} bytes")
        if unpacked.count(b",") > 10 * MAX_ENTRIES:  # 6 in each entry, and those in names
            raise TreeError(f"it has more than the {MAX_ENTRIES} entries that are the limit")
        head, rows = load(unpacked.decode())
        if len(rows) > MAX_ENTRIES:
            raise TreeError(f"{len(rows)} entries, and {MAX_ENTRIES} is the limit")
        entries = [Entry(*row) for row in rows]
    except (ValueError, TypeError, RecursionError, zlib.error) as error:
        raise TreeError(f"no manifest: {str(error)[:80]}") from None
    if type(head) is not dict or not all(type(value) is str for value in head.values()):
        raise TreeError("its head is no object of texts")
    directories, last = {""}, ""
    for entry in entries:
        if not is_valid(entry) or entry.path <= last:
            raise TreeError(f"invalid entry: {printable(repr(entry))}")
        if entry.path.rpartition("/")[0] not in directories:
            raise TreeError(f"not in a directory: {printable(entry.path)}")
        if entry.kind == DIRECTORY:
            directories.add(entry.path)
        last = entry.path
    return Tree(head, entries, manifest)


def path_below(cwd: str, path: str) -> str:
    """Return a path from a directory of a tree as one from the top; "" if that is no file's."""
    joined = os.path.normpath(f"{cwd or '.'}/{path}")
    outside = path.startswith("/") or joined.split("/")[0] in NO_NAMES
    no_file = path.rstrip("/").split("/")[-1] in NO_NAMES
    return "" if outside or no_file or "\0" in joined else joined


def is_valid(entry: Entry) -> bool:
    """Return whether an entry has valid fields, and a path that stays below the top."""
    path, kind, mode, size, content, mtime = entry
    return (type(path) is str and "\0" not in path
            and NO_NAMES.isdisjoint(path.split("/"))
            and type(mode) is int and 0 <= mode <= 0o777
            and count(size) and (kind == FILE or not size) and type(content) is str
            and type(mtime) is int and (
                kind == DIRECTORY and not content
                or kind == LINK and content != "" and "\0" not in content
                or kind == FILE and tree_name(content)))


class TreeFetcher:
    """Fetches spans of a tree's stream, in order: a worker's end of the transfer.

    At most FETCH_AHEAD requests are under way, or have answers that are not stored yet. After
    TREE_TIMEOUT they are sent again. `ask(spans, flags)` sends a FETCH with these flags, which
    tells the client what has come."""

    def __init__(self, ask: Callable[[List[Span], Fields], None]) -> None:
        self.ask = ask
        self.wanted: Deque[Span] = deque()  # not requested yet
        self.asked: Deque[List[Span]] = deque()  # requested, the oldest first
        self.unstored = 0  # answers
        self.flags: Fields = {"anew": True}  # of the next request
        self.overdue_at: Seconds = math.inf  # when to send the requests again

    def fetch(self, spans: Iterable[Span], now: Seconds) -> None:
        """Fetch these spans after those that are still wanted."""
        self.wanted.extend(spans)
        self.request(now)

    def fetch_again(self, spans: Sequence[Span], now: Seconds) -> None:
        """Fetch these spans next: what came had the wrong hash."""
        self.wanted.extendleft(reversed(spans))
        self.flags["again"] = True
        self.request(now)

    def stop(self) -> None:
        """Want nothing any more."""
        self.wanted.clear()
        self.asked.clear()
        self.unstored, self.overdue_at, self.flags = 0, math.inf, {"anew": True}

    def request(self, now: Seconds) -> None:
        while self.wanted and len(self.asked) + self.unstored < FETCH_AHEAD:
            spans: List[Span] = []
            room = CHUNK_SIZE
            while self.wanted and room and len(spans) < MAX_SPANS:
                offset, size = self.wanted.popleft()
                part = min(size, room)
                spans.append((offset, part))
                room -= part
                if part < size:
                    self.wanted.appendleft((offset + part, size - part))
            self.asked.append(spans)
            self.ask(spans, self.flags)
            self.flags = {}
        self.overdue_at = now + TREE_TIMEOUT if self.asked else math.inf

    def accept(self, offset: int, size: int, now: Seconds) -> List[Span]:
        """Return the spans that this answer has; [] if it is not the next that we wait for."""
        if not self.asked or self.asked[0][0][0] != offset or total_size(self.asked[0]) != size:
            return []
        spans = self.asked.popleft()
        self.unstored += 1
        self.overdue_at = now + TREE_TIMEOUT if self.asked else math.inf
        return spans

    def stored(self, now: Seconds) -> None:
        self.unstored = max(0, self.unstored - 1)  # stop() may have come first
        before = len(self.asked)
        self.request(now)
        if 0 < len(self.asked) == before:
            self.ask([], {})  # ask for nothing: the client must know that the answer has come

    def repeat(self, now: Seconds) -> None:
        """Send the requests again: they, or their answers, may be lost."""
        for spans in reversed(self.asked):
            self.wanted.extendleft(reversed(spans))
        self.asked.clear()
        self.flags["anew"] = True
        self.request(now)

    def tick(self, now: Seconds) -> None:
        if self.overdue_at <= now:
            self.repeat(now)

    def check(self) -> None:
        """Raise AssertionError if its records disagree. For tests."""
        assert bool(self.asked) == (self.overdue_at < math.inf), self.overdue_at
        assert len(self.asked) + self.unstored <= FETCH_AHEAD
        assert self.asked or self.unstored or not self.wanted


def total_size(spans: Iterable[Span]) -> int:
    return sum(size for _, size in spans)


def spans_asked(fields: Fields) -> Sequence[Span]:
    """Return the spans that a FETCH of a tree asks for."""
    spans: Sequence[Span] = fields.get("spans", [(fields["offset"], fields["size"])])
    return spans


class Transfer:
    """A worker's requests for a tree, as its client sees them."""

    def __init__(self, now: Seconds) -> None:
        self.since = now
        self.host = ""
        self.got = self.size = 0  # bytes that the worker has of those that it lacked
        self.requests: Deque[Fields] = deque()  # the fields of each FETCH
        self.on_way: Deque[int] = deque()  # bytes of each answer that the worker may not have yet
        self.setup = False  # it has all, and runs the setup

    def kind(self) -> str:
        """Return what the host does, for people."""
        return "running the setup" if self.setup else (
            "sending" if self.size else "preparing the workspace")


class TreeOffer:
    """Answers the requests for a tree, by turns: a client's end of its transfers.

    Answers of at most OFFERED_AHEAD bytes are on their way to all workers together, or one to
    each. The worker's next FETCH tells how much of that it has got."""

    def __init__(self) -> None:
        self.tree: Optional[Tree] = None  # None: it is not known yet, or any more
        self.transfers: Dict[int, Transfer] = {}  # by the id of the command that asks
        self.on_way = 0  # bytes

    def add(self, fields: Fields, host: str, now: Seconds) -> None:
        """Note a FETCH for the present tree."""
        transfer = self.transfers.setdefault(fields["id"], Transfer(now))
        got = fields.get("got", 0)
        transfer.host, transfer.size = host, fields.get("of", 0)
        if fields.get("anew"):
            self.settle_answers(transfer, math.inf)
            transfer.requests.clear()
        self.settle_answers(transfer, got - transfer.got)
        transfer.got = got
        if fields["size"] and len(transfer.requests) < FETCH_AHEAD:
            transfer.requests.append(fields)

    def settle_answers(self, transfer: Transfer, size: float) -> None:
        """Take answers of so many bytes as received."""
        while transfer.on_way and transfer.on_way[0] <= size:
            part = transfer.on_way.popleft()
            size -= part
            self.on_way -= part

    def forget(self, id: int) -> None:
        """A command needs nothing any more."""
        transfer = self.transfers.pop(id, None)
        if transfer:
            self.settle_answers(transfer, math.inf)

    def note(self, id: int, host: str, setup: bool, now: Seconds) -> None:
        """A workspace is being prepared for a command; setup: it has its tree already."""
        if setup:
            self.forget(id)
        transfer = self.transfers.setdefault(id, Transfer(now))
        transfer.host, transfer.setup = host or transfer.host, setup

    def take_all(self) -> List[Fields]:
        """Return all requests, and forget them."""
        found = [fields for one in self.transfers.values() for fields in one.requests]
        for id in [*self.transfers]:
            self.forget(id)
        return found

    def next_requests(self) -> Iterator[Fields]:
        """Yield the requests to be answered now, from each transfer in turn."""
        busy = True
        while busy:
            busy = False
            for transfer in self.transfers.values():
                if transfer.requests and (
                        not transfer.on_way
                        or self.on_way + transfer.requests[0]["size"] <= OFFERED_AHEAD):
                    busy = True
                    fields = transfer.requests.popleft()
                    transfer.on_way.append(fields["size"])
                    self.on_way += fields["size"]
                    yield fields

    def words(self, now: Seconds) -> List[str]:
        """Return what hosts wait for that need longer than TRANSFER_NOTICE, for people."""
        found = []
        for kind in ("preparing the workspace", "sending", "running the setup"):
            slow = {one.host: one for one in self.transfers.values() if one.host
                    and one.kind() == kind and now >= one.since + TRANSFER_NOTICE}
            if not slow:
                continue
            hosts = printable(", ".join(slow)) if len(slow) < 4 else f"{len(slow)} hosts"
            if kind == "sending":
                most = sum(one.size for one in slow.values())
                unit, name = (1e6, "MB") if most >= 1e6 else (1e3, "kB")
                got, size = sum(one.got for one in slow.values()) / unit, most / unit
                found.append(f"sending {got:.1f} of {size:.{int(size < 10)}f} {name} to {hosts}")
            else:
                spent = now - min(one.since for one in slow.values())
                found.append(f"{kind} on {hosts} for {duration(spent, whole=True)}")
        return found

    def check(self, window: Dict[int, Command]) -> None:
        """Raise AssertionError if its records disagree. For tests."""
        assert self.transfers.keys() <= window.keys()
        assert self.on_way == sum(sum(one.on_way) for one in self.transfers.values())
        assert self.tree or not any(one.requests for one in self.transfers.values())


class TreeUnknown(NamedTuple):
    """Event of a workspace: the manifest of this tree is not here. FillTree brings it."""


class TreePlanned(NamedTuple):
    """Event: these spans of the tree's stream must be fetched. It comes before TreeReady, also
    without spans."""

    spans: List[Span]


class TreeStored(NamedTuple):
    """Event: a PutTree was carried out. Exactly one for each, after its TreeWrong if any."""


class TreeWrong(NamedTuple):
    """Event: these contents came with the wrong hash, and must be fetched again."""

    spans: List[Span]


class TreeReady(NamedTuple):
    """Event: the workspace has exactly this tree."""

    path: str
    setup: str  # a command that must run first; "" for none


class TreeFailed(NamedTuple):
    """Event: there can be no workspace. `why` has the cause and what to do, on one line."""

    why: str


class TreeReleased(NamedTuple):
    """Event: the run's workspace is free. The last event before its next FindTree."""


TreeEvent = Union[TreeUnknown, TreePlanned, TreeStored, TreeWrong, TreeReady, TreeFailed,
                  TreeReleased]


# === Locks ============================================================================
#
# A lock has one holder at a time, among all tasks of the cloud that name it. The topmost broker
# decides. A broker below asks it (LOCK) for each task of its own clients that could start, and
# gives the lock back (UNLOCK) after that: brokers take turns. A task has its lock from the
# assignment until its worker says that it has ended or never began, or is given up: the task itself
# may be gone before. After a broker's start nobody gets a lock until each worker has joined, and
# said what its tasks have, or is given up. Waiting tasks are in parked lanes, which nobody looks at
# until the lock is free.


class Locks:
    """Who has which lock, and who waits for it."""

    def __init__(self) -> None:
        # for each: its client, for people; several only if a worker was given up too soon, or
        # tells of a task that another one has
        self.holders: Dict[Lock, Dict[Tuple[WorkerSlots, TaskKey], Union[ClientQueue, str]]] = {}
        self.parked: Dict[Lock, Dict[Lane, None]] = {}
        self.wanted: Dict[Lock, Dict[WorkerSlots, str]] = {}  # by brokers below, for these clients
        self.taken: Set[Lock] = set()  # wanted by brokers below, since our clients had them last
        self.is_open = True  # False: we have just started, and do not know all holders
        self.doubted: Set[Lock] = set()  # runs' own, which our predecessor may have given
        self.above: Optional[Set[Lock]] = None  # locks from the broker above, if we are chained
        self.asked: Dict[Lock, str] = {}  # of it; and who has them there, as it said
        self.unlocked: Set[Lock] = set()  # go back after each task: others may wait for them there
        self.claims: Set[Lock] = set()  # had before we could ask it: by tasks of our predecessor
        self.news: Set[Lock] = set()  # with another holder, and brokers below that want them

    def is_closed(self, lock: Lock) -> bool:
        """Return whether a task must wait for this lock."""
        if lock in self.holders:
            return True
        if self.above is not None and not lock[0]:
            return bool(self.asked.get(lock))
        return not self.is_open and (not lock[0] or lock in self.doubted)

    def may_have(self, lock: Lock) -> bool:
        """Return whether a task may get this lock, which has no holder, without asking above."""
        return bool(lock[0]) or (self.is_open if self.above is None else lock in self.above)

    def hold(self, lock: Lock, key: TaskKey, worker: WorkerSlots,
             by: Union[ClientQueue, str]) -> None:
        self.holders.setdefault(lock, {})[worker, key] = by
        worker.locks[key] = lock
        if self.doubted:
            self.doubted.discard(lock)
        if self.wanted and lock in self.wanted:
            self.news.add(lock)
        if self.above is not None and not self.may_have(lock):
            self.claims.add(lock)

    def drop(self, lock: Lock, key: TaskKey, worker: WorkerSlots) -> bool:
        """Note that a task does not have the lock any more. Return whether that is free now."""
        tasks = self.holders.get(lock)
        if tasks is None or tasks.pop((worker, key), None) is None or tasks:
            return False
        del self.holders[lock]
        if self.above is not None and lock in self.above:
            self.above.discard(lock)
            self.unlocked.add(lock)
        return True

    def words(self, lock: Lock) -> str:
        """Return the lock and who has it, for people."""
        if lock[0]:
            return "its command before it (--serial)"
        by = self.holder(lock) or self.asked.get(lock, "")
        if by:
            return f"lock {lock[1]}, held by {by}"
        return f"lock {lock[1]}" + (
            ", which the broker above has not given yet" if self.above is not None else
            "" if self.is_open else
            "; the broker has just been started")  # a worker may come that has it

    def holder(self, lock: Lock) -> str:
        """Return who has the lock, for people; "" if nobody has it."""
        by = next(iter(self.holders.get(lock, {}).values()), "")
        return by if isinstance(by, str) else by.words()


def key_of_broker(lock: Lock) -> TaskKey:
    """Return what stands for all tasks below a chained broker that may have this lock."""
    return (lock[1], -1, -1)


# === Scheduler ========================================================================
#
# Which waiting task goes to which worker. Clients take turns; within one client, retries go
# first, then wide tasks (of several slots) while much waits, then in order. Among eligible workers
# a free slot counts first, then weight, then the number of free slots. Workers with short commands
# get extra tasks (prefetch); a free slot elsewhere recalls them. A task that must not wait behind
# others reserves the next free slots of a worker. The scheduler knows no messages and no peers. The
# cost of a decision without constraints does not grow with the number of workers or clients.
#
# The tasks of a client that differ in nothing but their order are a lane. A lane that must wait
# does not block others. While a wide task waits for the slots that it has reserved, others may
# use those: at first, and while what it waits for has run for longer than the others mostly take.
#
# A worker is prepared for a client if it has a workspace with the tree of its tasks. Another worker
# gets one task at a time, a scout: it waits there for the workspace, and takes no slot meanwhile.
# A chained broker gets a scout for each host. A free slot of a prepared worker recalls scouts.

RETRIES, FIRSTS, ROTATED = range(3)  # ranks of lanes
DURATION_WEIGHT = 1 / 8  # of a new duration in the mean of a client's commands
# Wide tasks go first if more waits than all slots take in so many rounds: no slots must be emptied
# for them then, and narrow ones fill the rest. At the end narrow ones alone would leave slots idle.
WIDE_FIRST = 2


class Lane:
    """The waiting tasks of one client with the same constraints and lock, in order."""

    __slots__ = ("client", "kind", "constraints", "lock", "rank", "tasks")

    def __init__(self, client: ClientQueue, kind: Tuple[int, bool, Optional[Lock]],
                 constraints: Constraints) -> None:
        self.client = client
        self.kind = kind
        self.rank, _, self.lock = kind
        self.constraints = constraints
        self.tasks: Deque[Task] = deque()

    def has_waiting(self) -> bool:
        """Drop tasks from the front until one is WAITING. Return whether there is one."""
        while self.tasks and self.tasks[0].state != WAITING:
            self.tasks.popleft()
        return bool(self.tasks)


class ClientQueue:
    """The waiting tasks of one client."""

    __slots__ = ("from_above", "tasks", "lanes", "ready", "orders", "in_turn", "excluded", "owed",
                 "prepared", "busy", "debt", "start_at", "typical", "waiting_slots", "wide_first")

    def __init__(self, from_above: bool = False) -> None:
        self.from_above = from_above  # run of the broker above: starts only with a lease
        self.tasks: Dict[int, Task] = {}  # all that are not GONE, by id
        # lanes with waiting tasks, by constraints and kind: rank, careful, lock
        self.lanes: Dict[Constraints, Dict[Tuple[int, bool, Optional[Lock]], Lane]] = {}
        # heap of those that are not parked: (rank, width(), order of the first task, lane)
        self.ready: List[Tuple[int, int, int, Lane]] = []
        self.orders = 0
        self.in_turn = False  # is in Scheduler.turns
        self.excluded: FrozenSet[str] = frozenset()  # hosts to use only if there are no others
        self.owed = 0  # bytes of results that the client has not confirmed (DONE)
        self.prepared: Set[WorkerSlots] = set()  # these have a workspace for it
        self.busy = 0  # BUSY tasks
        self.debt = 0  # turns to pass over, if others can use them: wide tasks take several
        self.start_at: Seconds = -math.inf  # nothing starts before (--delay)
        self.typical: Seconds = math.inf  # mean duration of its last commands; inf: unknown
        self.waiting_slots = 0  # that its waiting tasks need
        self.wide_first = False  # its wide tasks go first

    def words(self) -> str:
        """Return the client's name for people."""
        return ""

    def append(self, task: Task, retry: bool) -> None:
        self.orders += 1
        task.order = self.orders
        self.waiting_slots += task.constraints.slots
        group = self.lanes.setdefault(task.constraints, {})
        kind = RETRIES if retry else FIRSTS, task.careful, task.lock
        lane = group.get(kind)
        if lane is not None:
            lane.tasks.append(task)
        else:
            lane = group[kind] = Lane(self, kind, task.constraints)
            lane.tasks.append(task)
            self.push(lane)

    def push(self, lane: Lane, last: bool = False) -> None:
        """Put a lane among those to be looked at, behind all others if `last`. Drop an empty
        one."""
        if not lane.has_waiting():
            self.drop(lane)
            return
        if last:
            self.orders += 1
            heapq.heappush(self.ready, (ROTATED, 0, self.orders, lane))
        else:
            heapq.heappush(self.ready, (
                lane.rank, self.width(lane), lane.tasks[0].order, lane))

    def width(self, lane: Lane) -> int:
        """Return what its width counts among lanes: those with less go first."""
        return 1 - lane.constraints.slots if self.wide_first else 0

    def let_wide_first(self, wide_first: bool) -> None:
        self.wide_first = wide_first
        if any(constraints.slots > 1 for constraints in self.lanes):
            self.ready = [(rank, self.width(lane) if rank != ROTATED else 0, order, lane)
                          for rank, _, order, lane in self.ready]
            heapq.heapify(self.ready)

    def first(self) -> Optional[Lane]:
        """Return the most urgent lane."""
        while self.ready:
            rank, _, order, lane = self.ready[0]
            if lane.has_waiting() and (rank == ROTATED or order == lane.tasks[0].order):
                return lane
            self.push(self.pop())  # its first task has gone
        return None

    def pop(self) -> Lane:
        """Take the first() lane. The caller pushes it again, or parks it."""
        return heapq.heappop(self.ready)[3]

    def drop(self, lane: Lane) -> None:
        group = self.lanes[lane.constraints]
        del group[lane.kind]
        if not group:
            del self.lanes[lane.constraints]

    def waiting(self) -> Iterator[Lane]:
        """Yield the lanes with waiting tasks."""
        for group in self.lanes.values():
            yield from filter(Lane.has_waiting, group.values())

    def first_of_each(self) -> List[Task]:
        """Return a waiting task for each set of constraints, of MAX_LANES at most."""
        firsts = (next(filter(Lane.has_waiting, group.values()), None)
                  for group in self.lanes.values())
        return [*itertools.islice((lane.tasks[0] for lane in firsts if lane), MAX_LANES)]


class WorkerSlots:
    """The slots of one worker, or of all workers below a chained broker, and their tasks."""

    __slots__ = ("name", "slots", "weight", "capacity", "ready", "silent", "prefetch", "tasks",
                 "busy", "careful", "busy_with", "slots_with", "hosts_with", "prepared",
                 "preparing", "widest", "locks", "stamp")

    def __init__(self, name: str) -> None:
        self.name = name
        self.slots = 1
        self.weight = 0
        # slots by host and labels; several only of a chained broker
        self.capacity: Dict[Tuple[str, FrozenSet[str]], int] = {(name, frozenset()): 1}
        self.widest = self.capacity  # the slots of the largest worker there
        self.ready = False  # connected, and may be given tasks
        self.silent = False  # a plain worker that has not said READY for long: the last choice
        self.prefetch = 0  # tasks that it may be given beyond its slots
        self.tasks: Dict[TaskKey, Task] = {}  # ASSIGNED, RUNNING and DELIVERED
        self.busy = 0  # slots of its tasks that are BUSY, without scouts
        self.careful = 0  # such tasks that are careful
        self.busy_with: Counter[FrozenSet[str]] = Counter()  # their slots, by needed labels
        self.slots_with: Dict[FrozenSet[str], int] = {}  # cache: slots with these labels
        self.hosts_with: Dict[FrozenSet[str], int] = {}  # cache: hosts of these slots
        self.prepared: Set[ClientQueue] = set()  # the same, by worker
        self.preparing: Counter[ClientQueue] = Counter()  # scouts
        self.locks: Dict[TaskKey, Lock] = {}  # that its tasks have, also those that are GONE
        self.stamp = 0  # of its entry in Scheduler.ranking; older entries are stale

    def count(self, task: Task, change: int) -> None:
        """Count a BUSY task in (1) or out (-1)."""
        if task.preparing:
            self.preparing[task.client] += change
            if not self.preparing[task.client]:
                del self.preparing[task.client]
            return
        needs, slots = task.constraints.needs, task.constraints.slots
        self.busy += change * slots
        if task.careful:
            self.careful += change
        if needs and change:
            self.busy_with[needs] += change * slots
            if not self.busy_with[needs]:
                del self.busy_with[needs]

    def taking(self) -> List[Task]:
        """Return the tasks that take its slots, the oldest first."""
        return [task for task in self.tasks.values() if task.state in BUSY and not task.preparing]

    def running(self) -> List[Task]:
        """Return the tasks that run: the oldest. With 0 slots, all its BUSY tasks run."""
        tasks = self.taking()
        used = itertools.accumulate(task.slots for task in tasks)
        return [task for task, n in zip(tasks, used) if n <= (self.slots or n)]

    def queued(self) -> List[Task]:
        """Return the tasks beyond its slots, and scouts."""
        running = {*self.running()}
        return [task for task in self.tasks.values()
                if task.state in BUSY and task not in running]

    def free(self) -> int:
        """Return the number of free slots; less than 0 if tasks wait for one."""
        return self.slots - self.busy if self.ready else 0

    def order(self) -> int:
        """Return its class: 0 it has a free slot, 1 it has none, 2 it may be gone."""
        return 2 if self.silent else int(self.free() <= 0)

    def has_room(self) -> bool:
        """Return whether it may be given another task. No task waits behind a careful one."""
        return self.ready and self.busy < self.slots + (0 if self.careful else self.prefetch)

    def fits(self, task: Task) -> bool:
        """Return whether slots with the labels that the task needs are free."""
        needs = task.constraints.needs
        if not needs or len(self.capacity) == 1:  # its slots are all alike
            return True
        if needs not in self.slots_with:
            self.slots_with[needs] = sum(
                n for (_, labels), n in self.capacity.items() if needs <= labels)
        return self.busy_with[needs] + task.slots <= self.slots_with[needs]

    def set_prepared(self, client: ClientQueue, is_prepared: bool) -> None:
        """Note whether it has a workspace for this client."""
        if is_prepared:
            self.prepared.add(client)
            client.prepared.add(self)
        else:
            self.prepared.discard(client)
            client.prepared.discard(self)

    def forget_prepared(self) -> None:
        """Forget its workspaces: a scout will find out."""
        for client in [*self.prepared]:
            self.set_prepared(client, False)

    def may_prepare(self, task: Task) -> bool:
        """Return whether the task may use a workspace here, or be a scout for one."""
        client, needs = task.client, task.constraints.needs
        scouts = self.preparing[client]
        if client in self.prepared:
            return not scouts or self.free() > scouts
        if needs not in self.hosts_with:
            self.hosts_with[needs] = len({
                host for (host, labels), n in self.capacity.items() if n and needs <= labels})
        return scouts < self.hosts_with[needs]


Eligible = Optional[FrozenSet[WorkerSlots]]  # workers that may run a task; None: all


class Scheduler:
    """Decides which waiting task goes to which worker."""

    def __init__(self) -> None:
        self.workers: Dict[WorkerSlots, None] = {}  # connected, an ordered set
        self.away: Dict[WorkerSlots, None] = {}  # with a broken connection: may come back
        self.slots = 0  # of all connected workers
        self.has_lease = False  # tasks from the broker above may start
        self.turns: Deque[ClientQueue] = deque()  # clients with waiting tasks, round robin
        # heap of workers with room, the best first: (order, -weight, -free, stamp, worker)
        self.ranking: List[Tuple[int, int, int, int, WorkerSlots]] = []
        self.stamps = 0  # entries of the ranking so far
        self.prefetched: Deque[Tuple[Task, Seconds]] = deque()  # (task, time) of tasks beyond slots
        self.scouts: Dict[Task, bool] = {}  # the oldest first; True: it is recalled
        self.reservations: Dict[WorkerSlots, Task] = {}  # the task for its next free slots
        self.locks = Locks()
        self.delayed: Dict[ClientQueue, Seconds] = {}  # when their next task may start
        self.now: Seconds = 0.0  # of the present decisions
        self.waiting_news: Set[ClientQueue] = set()  # began to wait for a lock or several slots
        self.capacity_changed = False  # slots, weights or labels, since the owner last looked
        # caches, until capacity changes
        self.widest_by_labels: Dict[FrozenSet[str], int] = {}
        self.places_by_host: Dict[str, List[Place]] = {}
        self.with_slots = 0  # how many workers have slots
        self.eligible_for: Dict[Constraints, Eligible] = {}
        self.saturated: Set[FrozenSet[WorkerSlots]] = set()  # sets of workers without room
        self.expecting = False  # more hosts are about to join

    # --- workers

    def add_worker(self, worker: WorkerSlots) -> None:
        """Add a worker that has connected, also again. change_worker() makes it ready."""
        if worker not in self.workers:
            self.workers[worker] = None
            self.slots += worker.slots
        self.away.pop(worker, None)
        worker.ready = False
        worker.forget_prepared()
        self.note_capacity_change()

    def change_worker(self, worker: WorkerSlots, slots: int, weight: int,
                      capacity: Dict[Tuple[str, FrozenSet[str]], int],
                      widest: Optional[Dict[Tuple[str, FrozenSet[str]], int]] = None) -> None:
        """Note what a connected worker has told of itself, and make it ready."""
        told = slots, weight, capacity, capacity if widest is None else widest
        if told != (worker.slots, worker.weight, worker.capacity, worker.widest):
            self.slots += slots - worker.slots
            worker.slots, worker.weight, worker.capacity, worker.widest = told
            worker.slots_with, worker.hosts_with = {}, {}
            worker.prefetch = min(worker.prefetch, PREFETCH * slots)
            self.note_capacity_change()
        elif worker.ready:
            return
        worker.ready = True
        self.rank(worker)

    def suspend_worker(self, worker: WorkerSlots) -> None:
        """Give no tasks to a worker whose connection broke. It may come back."""
        if worker in self.workers:
            del self.workers[worker]
            self.away[worker] = None
            self.slots -= worker.slots
            worker.ready = False
            worker.forget_prepared()
            self.forget_wants(worker)
            self.rank(worker)
            self.note_capacity_change()

    def remove_worker(self, worker: WorkerSlots) -> None:
        """Remove a worker. The caller releases its locks, and moves its tasks."""
        self.suspend_worker(worker)
        del self.away[worker]

    def expect(self, expecting: bool) -> None:
        """Note whether more hosts are about to join. Tasks that need another host wait for them."""
        self.expecting = expecting
        self.note_capacity_change()

    def note_capacity_change(self) -> None:
        """Drop the caches and reservations, which a change of capacity makes wrong."""
        self.capacity_changed = True
        self.widest_by_labels.clear()
        self.places_by_host.clear()
        self.eligible_for.clear()
        self.saturated.clear()
        self.reservations.clear()

    def learn_duration(self, client: ClientQueue, worker: WorkerSlots, ms: float) -> None:
        """Update the client's typical duration after a command of `ms`, and the prefetch: each
        short command raises it by one."""
        if ms < math.inf:
            mean = client.typical if client.typical < math.inf else ms / 1000
            client.typical = mean + DURATION_WEIGHT * (ms / 1000 - mean)
        each = min(PREFETCH, PREFETCH_TIME / max(ms, 1))
        worker.prefetch = min(worker.prefetch + 1, int(each * worker.slots))

    # --- tasks

    def submit(self, task: Task, retry: bool) -> None:
        """Add a WAITING task to its client's queue."""
        task.client.append(task, retry)
        self.take_turn(task.client)

    def take_turn(self, client: ClientQueue) -> None:
        """Add the client to the turns if it has tasks."""
        if not client.in_turn and client.ready:
            client.in_turn = True
            self.turns.append(client)

    def leave_turn(self, client: ClientQueue) -> None:
        client.in_turn = False
        self.turns.remove(client)

    def remove_client(self, client: ClientQueue) -> None:
        """Remove a client that has no tasks any more."""
        if client.in_turn:
            self.leave_turn(client)
        self.delayed.pop(client, None)
        for worker in [*client.prepared]:
            worker.set_prepared(client, False)

    def move(self, task: Task, state: str, worker: Optional[WorkerRecord], now: Seconds) -> None:
        """Change a task's state and all indexes that depend on it. A task has a worker in
        ASSIGNED and RUNNING, and in DELIVERED unless the worker is plain."""
        assert state in MOVES[task.state], (task.key, task.state, state)
        old, was_busy, is_busy = task.worker, task.state in BUSY, state in BUSY
        if task.state == WAITING and task.order:
            task.client.waiting_slots -= task.constraints.slots
        task.state, task.worker = state, worker
        if was_busy != is_busy:
            task.client.busy += 1 if is_busy else -1
        if old is not worker or was_busy != is_busy:
            if old is not None:
                old.tasks.pop(task.key, None)
                old.count(task, -1 if was_busy else 0)
            if task.preparing:
                self.set_preparing(task, "")
            if state == ASSIGNED and worker is not None and self.is_scout(task, worker):
                self.set_preparing(task, FILES)
            if worker is not None:
                worker.tasks[task.key] = task
                worker.count(task, 1 if is_busy else 0)
                if is_busy:
                    self.note_start(task, worker, old, now)
                self.rank(worker)
            if old is not None and old is not worker and was_busy:
                self.rank(old)
        self.note_if_queued(task, now)
        if state == GONE:
            task.client.tasks.pop(task.id, None)
            self.charge(task, 0)

    def note_start(self, task: Task, worker: WorkerSlots, old: Optional[WorkerSlots],
                   now: Seconds) -> None:
        """Note that a task takes slots of a worker, and has its lock there."""
        client, task.since = task.client, now
        if task.lock is not None and task.key not in worker.locks:
            self.hold_lock(task, worker)
        if old is not None and old is not worker:
            self.release_lock(old, task.key)
        if task.state == ASSIGNED:
            client.debt = task.slots - 1
            if task.delay:
                client.start_at = self.delayed[client] = now + task.delay

    def note_if_queued(self, task: Task, now: Seconds) -> None:
        if self.is_queued(task):
            self.prefetched.append((task, now))

    def prepare(self, task: Task, preparing: str, now: Seconds) -> None:
        """Note how the worker of a RUNNING task prepares its workspace; "": it is there."""
        worker = task.worker
        assert worker is not None and task.state == RUNNING, task.key
        if preparing or task.needs_tree:
            worker.set_prepared(task.client, not preparing)
        if preparing != task.preparing:
            self.recount(task, worker, preparing, now)

    def recount(self, task: Task, worker: WorkerSlots, preparing: str, now: Seconds) -> None:
        """Change whether a RUNNING task takes a slot."""
        worker.count(task, -1)
        task.since = now
        self.set_preparing(task, preparing)
        worker.count(task, 1)
        self.rank(worker)
        self.note_if_queued(task, now)

    def set_preparing(self, task: Task, preparing: str) -> None:
        """Set it while no worker counts the task."""
        task.preparing = preparing
        if preparing:
            self.scouts[task] = False
        else:
            self.scouts.pop(task, None)

    def charge(self, task: Task, cost: int) -> None:
        """Set the cost of a task's result, in bytes. At CREDIT the client's tasks wait: results
        must not fill our memory and the disks of workers."""
        task.client.owed += cost - task.cost
        task.cost = cost
        self.take_turn(task.client)

    # --- eligible workers

    def places(self) -> Dict[str, List[Place]]:
        """Return all places of connected workers, by host."""
        if not self.places_by_host:
            self.with_slots = sum(worker.slots > 0 for worker in self.workers)
            for worker in self.workers:
                for (host, labels), slots in worker.widest.items():
                    place = Place(host, labels, slots, worker)
                    self.places_by_host.setdefault(host, []).append(place)
        return self.places_by_host

    def has_labels(self, needs: FrozenSet[str], slots: int = 0) -> bool:
        """Return whether a worker with these labels is there, and has so many slots."""
        if not self.widest_by_labels:
            for worker in self.workers:
                for (_, labels), n in worker.widest.items():
                    self.widest_by_labels[labels] = max(n, self.widest_by_labels.get(labels, 0))
        return any(needs <= labels and n >= slots for labels, n in self.widest_by_labels.items())

    def eligible(self, task: Task) -> Eligible:
        """Return the connected workers that may be given this task; None if all may."""
        constraints, excluded = task.constraints, task.client.excluded
        if constraints is UNCONSTRAINED and not excluded:
            return None
        never_on = constraints.never_on
        if self.expecting and constraints.not_on:
            never_on |= {constraints.not_on}
        if excluded or never_on is not constraints.never_on:
            constraints = constraints._replace(excluded=excluded, never_on=never_on)
        if constraints not in self.eligible_for:
            # if all are overloaded, nobody knows how many slots they have
            is_known = constraints.slots > 1 and self.has_labels(NONE, 1)
            if not self.has_labels(constraints.needs, constraints.slots if is_known else 0):
                return frozenset()  # not cached: a client can name any
            if len(self.eligible_for) >= MAX_CACHED_CONSTRAINTS:
                self.eligible_for.clear()
                self.saturated.clear()
            self.eligible_for[constraints] = self.find_eligible(constraints)
        return self.eligible_for[constraints]

    def find_eligible(self, constraints: Constraints) -> Eligible:
        by_host, on = self.places(), constraints.on
        near = () if on in constraints.excluded else by_host.get(on, ())
        found = constraints.eligible(near)  # mostly enough: only the places on that host
        if not found:
            found = constraints.eligible(itertools.chain.from_iterable(by_host.values()))
        return frozenset(found) if len(found) < self.with_slots else None

    def is_unplaceable(self, task: Task) -> bool:
        """Return whether the task fits no worker and must not wait for one. Only tasks with
        never_on, or from the broker above, must not wait."""
        never_on = task.constraints.never_on
        if self.expecting:
            return False
        if never_on:
            if any(host not in never_on for worker in self.away for host, _ in worker.capacity):
                return False  # its host may come back
        elif not task.client.from_above:
            return False
        return self.eligible(task) == frozenset()

    # --- choosing the worker for a task

    def rank(self, worker: WorkerSlots) -> None:
        """Rank the worker as it is now. Its older entry is stale."""
        self.stamps += 1
        worker.stamp = self.stamps
        if not worker.has_room():
            return
        if self.saturated:
            self.saturated = {full for full in self.saturated if worker not in full}
        heapq.heappush(self.ranking, (
            worker.order(), -worker.weight, -worker.free(), self.stamps, worker))
        if len(self.ranking) > 2 * len(self.workers) + 64:  # most are stale
            self.ranking = [row for row in self.ranking if row[3] == row[4].stamp]
            heapq.heapify(self.ranking)

    def may_start(self, client: ClientQueue) -> bool:
        """Return whether tasks of this client may be assigned now."""
        return client.owed < CREDIT and (self.has_lease or not client.from_above) \
            and client.start_at <= self.now

    def must_wait(self, task: Task) -> bool:
        """Return whether another one has the task's lock. The broker above decides for its own."""
        return task.lock is not None and not task.client.from_above \
            and self.locks.is_closed(task.lock)

    def is_reserved(self, worker: WorkerSlots, task: Optional[Task]) -> bool:
        """Return whether the worker's next free slots are for another task."""
        holder = self.reservations.get(worker)
        if holder is None or holder is task:
            return False
        among = self.eligible(holder)
        if holder.state == WAITING and self.may_start(holder.client) \
                and (among is None or worker in among) \
                and not self.must_wait(holder) and self.may_have_lock(holder) \
                and not self.lacks_lease(holder):
            return task is None or not self.may_fill(worker, holder, task)
        del self.reservations[worker]
        return False

    def may_fill(self, worker: WorkerSlots, holder: Task, task: Task) -> bool:
        """Return whether a task may use slots that are reserved for a wide one: it takes none that
        this will need, or it mostly ends earlier than what this waits for. We guess that a command
        goes on for as long as it has run. Tasks that began after the reservation count as just
        begun: so they delay the wide one only once. Of a client whose commands nobody knows, one
        may try. Tasks of the same client also may until the wide one has waited for as long as
        they mostly take: perhaps it finds free slots meanwhile."""
        missing = holder.slots - worker.free()
        if holder.slots == 1 or missing <= 0 or task.slots > worker.free():
            return False
        if task.client is holder.client \
                and self.now - holder.reserved_since < task.client.typical:
            return True
        ages = sorted((self.now - one.since if one.since <= holder.reserved_since else 0.0,
                       one.slots) for one in worker.taking())
        for age, slots in ages:
            missing -= slots
            if missing <= 0:
                client = task.client
                return -missing >= task.slots or client.typical < age or (
                    age > 0 and client.typical == math.inf and not client.busy)
        return False

    def may_take(self, worker: WorkerSlots, task: Optional[Task]) -> bool:
        if task is None:
            return not self.is_reserved(worker, task)
        slots = task.slots
        if slots > 1 and slots > worker.free() and not self.is_scout(task, worker) \
                or self.reservations and self.is_reserved(worker, task):
            return False
        return worker.fits(task) and (not task.needs_tree or worker.may_prepare(task))

    def is_scout(self, task: Task, worker: WorkerSlots) -> bool:
        """Return whether the task would wait there for a workspace, and take no slot."""
        return task.needs_tree and task.client not in worker.prepared

    def best_worker(self, task: Optional[Task] = None) -> Optional[WorkerSlots]:
        """Return the best worker with room for this task (None: for any task), or None. Among
        workers with the same order(), prepared ones are first, and the one to avoid is last."""
        avoid, among = ("", None) if task is None else (task.avoid, self.eligible(task))
        first = self.first_ranked()
        if first is None or among in self.saturated:
            return None
        if task is not None and task.needs_tree:
            return self.best_with_tree(task, among, first)
        passed_over: List[Tuple[int, int, int, int, WorkerSlots]] = []
        avoided = best = None
        wide = task is not None and task.slots > 1
        limit = MAX_LANES if wide else math.inf if among is None else MAX_PASSED_OVER
        while best is None and len(passed_over) < limit and self.first_ranked() is not None:
            row = self.ranking[0]
            if among is not None and row[4] not in among or not self.may_take(row[4], task):
                passed_over.append(heapq.heappop(self.ranking))
            elif row[4].name == avoid and avoided is None:
                avoided = heapq.heappop(self.ranking)
                passed_over.append(avoided)
            else:
                best = row[4]
        for row in passed_over:
            heapq.heappush(self.ranking, row)
        if best is None and task is not None and wide and self.has_reservation(task):
            among = frozenset(filter(None, [task.reserved_at, avoided and avoided[4]]))
        if best is None and (among is not None or wide):
            return self.best_among(self.workers if among is None else among, task, avoid)
        if avoided is not None and (best is None or best.order() > avoided[4].order()):
            best = avoided[4]
        return best

    def first_ranked(self) -> Optional[WorkerSlots]:
        """Return the first worker of the ranking, and drop stale entries before it: a client keeps
        its turn if no worker has room, so the ranking must be empty then."""
        while self.ranking and self.ranking[0][3] != self.ranking[0][4].stamp:
            heapq.heappop(self.ranking)
        return self.ranking[0][4] if self.ranking else None

    def best_with_tree(self, task: Task, among: Eligible,
                       first: WorkerSlots) -> Optional[WorkerSlots]:
        """Return the same as best_worker(). Once all workers are prepared, the first one is mostly
        the best. Before, prepared ones are not among the first."""
        if task.client in first.prepared and (among is None or first in among) \
                and first.name != task.avoid and self.may_take(first, task):
            return first
        prepared = task.client.prepared
        best = self.best_among(prepared if among is None else prepared & among, task, task.avoid)
        if best is not None and best.order() == 0:
            return best
        return self.best_among(self.workers if among is None else among, task, task.avoid)

    def best_among(self, workers: Collection[WorkerSlots], task: Optional[Task],
                   avoid: str) -> Optional[WorkerSlots]:
        """Return the same as best_worker(), by looking at each of these workers."""
        with_room = [worker for worker in workers if worker.has_room()]
        if not with_room and workers and isinstance(workers, frozenset):
            self.saturated.add(workers)
        client = task.client if task is not None and task.needs_tree else None
        return min((worker for worker in with_room if self.may_take(worker, task)), default=None,
                   key=lambda it: (it.order(), client is not None and client not in it.prepared,
                                   it.name == avoid, -it.weight, -it.free(), it.stamp))

    # --- decisions: which task goes to which worker; reserving and recalling

    def decisions(self, now: Seconds) -> Iterator[Tuple[Task, Optional[WorkerSlots]]]:
        """Yield tasks to be assigned, each with its worker; or with None if it is unplaceable. The
        caller must move a task before it asks for the next."""
        self.now = now
        if self.delayed:
            self.end_delays(now)
        passed_over = 0  # clients in a row without a task for a worker with room
        while passed_over < len(self.turns) and self.first_ranked() is not None:
            client = self.turns[0]
            lane = self.next_lane(client) if self.may_start(client) else None
            if lane is None:
                self.turns.popleft()
                client.in_turn = False
                continue
            self.turns.rotate(-1)
            if client.debt and not passed_over and len(self.turns) > 1:
                client.debt -= 1
                continue
            passed_over += 1
            for task, worker in self.look_at(client, lane):
                yield task, worker
                passed_over = 0
            if passed_over and not self.ranking:
                self.turns.rotate(1)  # this client keeps its turn

    def end_delays(self, now: Seconds) -> None:
        for client in [client for client, when in self.delayed.items() if when <= now]:
            del self.delayed[client]
            self.take_turn(client)

    def look_at(self, client: ClientQueue,
                first: Optional[Lane]) -> Iterator[Tuple[Task, Optional[WorkerSlots]]]:
        """Yield the client's unplaceable tasks before the first that has a worker, and this one.
        Look at MAX_LANES lanes, round robin, if there are more that must wait. `first`: its
        next_lane()."""
        passed_over: List[Lane] = []
        worker: Optional[WorkerSlots] = None
        chained = self.locks.above is not None
        while worker is None and len(passed_over) < MAX_LANES and self.ranking:
            lane, first = first or self.next_lane(client), None
            if lane is None:
                break
            task = client.pop().tasks[0]
            passed_over.append(lane)
            if chained and self.lacks_lease(task):
                continue
            worker = self.best_worker(task)
            if worker is None and not self.ranking:
                break
            if worker is None and self.is_unplaceable(task):
                yield task, None
                continue
            to_reserve = self.worker_to_reserve(task, worker)
            if lane.lock is not None and (worker or to_reserve) and self.lacks_lock(task):
                self.park(passed_over.pop())
                worker = None
            elif to_reserve is not None:
                self.reserve(task, to_reserve)
                worker = None
            elif worker is not None:
                yield task, worker
                if lane.lock is not None and lane.has_waiting() and self.must_wait(lane.tasks[0]):
                    self.park(passed_over.pop())
        for lane in passed_over:
            client.push(lane, last=len(passed_over) == MAX_LANES)

    def next_lane(self, client: ClientQueue) -> Optional[Lane]:
        """Return the client's most urgent lane that need not wait for a lock; park others."""
        if client.wide_first != (client.waiting_slots > WIDE_FIRST * self.slots):
            client.let_wide_first(not client.wide_first)
        while True:
            lane = client.first()
            if lane is None or lane.lock is None or not self.must_wait(lane.tasks[0]):
                return lane
            self.park(client.pop())

    def worker_to_reserve(self, task: Task, best: Optional[WorkerSlots]) -> Optional[WorkerSlots]:
        """Return the worker whose next free slots the task must reserve now, or None. It must not
        queue at the best one if it is careful or delays others, or not all workers may run it; a
        scout needs no slot. A wide task, or one for which we have got a lock, reserves those of
        the worker with most of them free now."""
        if best is not None and best.free() > 0:
            return None
        among = self.eligible(task)
        has_lock = task.lock is not None and self.locks.above is not None \
            and task.lock in self.locks.above and not task.client.from_above
        if best is not None:
            must_not_queue = task.careful or task.delay or among is not None or has_lock
            return best if must_not_queue and not self.is_scout(task, best) else None
        if task.slots == 1 and not has_lock or self.has_reservation(task):
            return None
        workers = [worker for worker in (self.workers if among is None else among)
                   if worker.ready and worker.slots >= task.slots
                   and not self.is_reserved(worker, task)
                   and not self.is_scout(task, worker)]
        self.waiting_news.add(task.client)
        before = task.reserved_at  # which may not run it any more
        if before is not None and self.reservations.get(before) is task:
            del self.reservations[before]
        return min(workers, default=None, key=lambda it: (
            it.silent, -it.free(), -it.weight, it.stamp))

    def reserve(self, task: Task, worker: WorkerSlots) -> None:
        self.reservations[worker], worker.prefetch = task, 0  # no other task may overtake it
        task.reserved_at, task.reserved_since = worker, min(task.reserved_since, self.now)
        self.rank(worker)

    def has_reservation(self, task: Task) -> bool:
        at, among = task.reserved_at, self.eligible(task)
        return at is not None and self.reservations.get(at) is task \
            and (among is None or at in among)

    # --- locks

    def park(self, lane: Lane) -> None:
        """Look at a lane no more until its lock is free."""
        assert lane.lock is not None
        self.locks.parked.setdefault(lane.lock, {})[lane] = None
        self.waiting_news.add(lane.client)

    def unpark(self, lock: Lock) -> None:
        for lane in self.locks.parked.pop(lock, ()):
            client = lane.client
            if client.in_turn and not client.ready:  # its turn was before the others began to wait
                self.leave_turn(client)
            client.push(lane)
            if lane.tasks:  # else its client may have left
                self.take_turn(client)

    def unpark_all(self) -> None:
        """Look again at all lanes whose lock has no holder."""
        for lock in self.locks.parked.keys() - self.locks.holders.keys():
            self.unpark(lock)

    def may_have_lock(self, task: Task) -> bool:
        """Return whether a task may get its lock, which has no holder, without asking above."""
        return task.lock is None or task.client.from_above or self.locks.may_have(task.lock)

    def lacks_lease(self, task: Task) -> bool:
        """Return whether the broker above may have given us up, and the task's lock to others."""
        return task.lock is not None and not task.lock[0] and self.locks.above is not None \
            and not self.has_lease

    def lacks_lock(self, task: Task) -> bool:
        """Return whether the broker above must give the task's lock first. It will be asked. Until
        then the task reserves nothing: the lock's holder may need those very slots."""
        if task.lock is None or self.may_have_lock(task):
            return False
        self.locks.asked.setdefault(task.lock, "")
        return True

    def needed_locks(self) -> Set[Lock]:
        """Return the locks with holders, and those of tasks with a reservation."""
        return {*self.locks.holders, *(
            task.lock for worker, task in [*self.reservations.items()]
            if task.lock is not None and self.is_reserved(worker, None))}

    def hold_lock(self, task: Task, worker: WorkerSlots) -> None:
        """Note that a task has its lock. The broker above keeps account of those of its own."""
        assert task.lock is not None
        if task.client.from_above:
            worker.locks[task.key] = task.lock
            return
        self.locks.hold(task.lock, task.key, worker, task.client)
        if task.lock in self.locks.wanted:
            self.locks.taken.add(task.lock)

    def release_lock(self, worker: WorkerSlots, key: TaskKey) -> None:
        """Note that a task certainly does not run on this worker (any more)."""
        lock = worker.locks.pop(key, None)
        if lock is not None and self.locks.drop(lock, key, worker):
            self.offer_lock(lock)

    def offer_lock(self, lock: Lock) -> None:
        """Give a free lock to a lane that waits for it, unless it is the turn of a broker below."""
        if lock not in self.locks.taken:
            self.unpark(lock)

    def take_lock(self, lock: Lock) -> None:
        """The broker above has given us a lock. Its task gets the next free slot, if none is free:
        else the lock would go back, again and again, while other tasks run."""
        lanes = [*filter(Lane.has_waiting, self.locks.parked.get(lock, ()))]
        self.offer_lock(lock)
        for lane in lanes[:1]:
            task = lane.tasks[0]
            to_reserve = self.worker_to_reserve(task, self.best_worker(task))
            if to_reserve is not None:
                self.reserve(task, to_reserve)

    def forget_wants(self, worker: WorkerSlots) -> None:
        """A broker below wants no lock any more."""
        for lock, brokers in [*self.locks.wanted.items()]:
            brokers.pop(worker, None)
            if not brokers:
                del self.locks.wanted[lock]
                self.locks.taken.discard(lock)
                if lock not in self.locks.holders:
                    self.unpark(lock)

    def locks_for_brokers(self) -> Iterator[Tuple[Lock, WorkerSlots]]:
        """Give free locks to the brokers below that want them, and yield both."""
        for lock, brokers in [*self.locks.wanted.items()]:
            if lock in self.locks.holders or self.locks.above is not None and not self.has_lease:
                continue
            if not self.locks.may_have(lock):
                if self.locks.above is not None:
                    self.locks.asked.setdefault(lock, "")
                continue
            worker = next(iter(brokers))
            self.locks.taken.discard(lock)
            self.locks.hold(lock, key_of_broker(lock), worker, brokers.pop(worker))
            yield lock, worker
            if not brokers:
                del self.locks.wanted[lock]

    def unplaceable(self, clients: Iterable[ClientQueue]) -> Iterator[Task]:
        """Yield the unplaceable tasks of these clients, also while no worker has room: with
        MAX_LANES sets of constraints each. The caller must move a task before it asks for the next.
        """
        for client in clients:
            for group in [*itertools.islice(client.lanes.values(), MAX_LANES)]:
                for lane in filter(Lane.has_waiting, [*group.values()]):
                    while lane.has_waiting() and self.is_unplaceable(lane.tasks[0]):
                        yield lane.tasks[0]
                    if lane.tasks:  # so the others of the group are placeable, too
                        break

    def recalls(self, now: Seconds) -> List[Task]:
        """Return the tasks to recall from their workers: another worker has a free slot for them,
        or they have waited for RECALL_DELAY."""
        tasks: List[Task] = []
        queue = self.prefetched
        while queue and (not self.is_queued(queue[0][0]) or queue[0][1] + RECALL_DELAY <= now):
            tasks.append(queue.popleft()[0])
        best = self.best_worker() if queue else None
        free = best.free() if best and not best.silent else 0
        while queue and free > 0:
            tasks.append(queue.pop()[0])
            if self.is_queued(tasks[-1]):
                free -= 1
        tasks = [task for task in dict.fromkeys(tasks) if self.is_queued(task)]
        for task in tasks:
            assert task.worker is not None
            task.worker.prefetch = 0  # prefetch again only after short commands
            self.rank(task.worker)
        return [*tasks, *self.scouts_to_recall()] if self.scouts else tasks

    def scouts_to_recall(self) -> List[Task]:
        """Return the scouts for which prepared workers have free slots, the latest first. Waiting
        tasks of their clients come before them."""
        found: List[Task] = []
        # they will take slots that are still free
        under_way = sum(task.slots for task, is_recalled in self.scouts.items() if is_recalled)
        for client in {task.client: None for task in self.scouts}:
            if not self.may_start(client) or self.next_lane(client):
                continue
            free = {worker: worker.free() - worker.preparing[client] for worker in client.prepared
                    if worker.free() > worker.preparing[client] and not worker.silent}
            room = sum(free.values()) - under_way
            for task in [task for task in reversed(self.scouts) if task.client is client
                         and task.state == RUNNING and not self.scouts[task]] if free else ():
                among = self.eligible(task)
                if room >= task.slots and any(
                        worker is not task.worker and (among is None or worker in among)
                        and self.may_take(worker, task) for worker in free):
                    self.scouts[task] = True
                    found.append(task)
                    room -= task.slots
        return found

    def is_queued(self, task: Task) -> bool:
        """Return whether its worker has more tasks than slots."""
        worker = task.worker
        return task.state == RUNNING and worker is not None and worker.busy > worker.slots \
            and not task.preparing

    def deadline(self) -> Seconds:
        """Return the time of the next recall by RECALL_DELAY, or of the next start (--delay)."""
        recall = self.prefetched[0][1] + RECALL_DELAY if self.prefetched else math.inf
        return min([recall, *self.delayed.values()])

    def check(self) -> None:
        """Raise AssertionError if indexes disagree. For tests."""
        assert self.slots == sum(worker.slots for worker in self.workers)
        assert not self.workers.keys() & self.away.keys()
        for client in self.turns:
            assert client.in_turn and self.turns.count(client) == 1
        for worker in (*self.workers, *self.away):
            both = [task for task in worker.tasks.values() if task.state in BUSY]
            busy = [task for task in both if not task.preparing]
            scouts = [task for task in both if task.preparing]
            assert worker.preparing == Counter(task.client for task in scouts), worker.name
            assert self.scouts.keys() >= {*scouts}
            assert worker in self.workers or not worker.prepared
            assert all(worker in client.prepared for client in worker.prepared)
            assert all(key == task.key and task.worker is worker
                       for key, task in worker.tasks.items())
            assert worker.busy == sum(task.slots for task in busy), worker.name
            assert worker.careful == sum(task.careful for task in busy)
            with_labels: Counter[FrozenSet[str]] = Counter()
            for task in busy:
                with_labels[task.constraints.needs] += task.slots
            del with_labels[frozenset()]
            assert worker.busy_with == with_labels, worker.name
            ranked = [row[:3] for row in self.ranking if row[3:] == (worker.stamp, worker)]
            assert ranked == [(worker.order(), -worker.weight, -worker.free())] * worker.has_room()
            assert worker in self.workers or not worker.ready
        assert all(task.preparing and task.state in BUSY for task in self.scouts)
        fresh = Scheduler()
        fresh.workers = self.workers
        assert self.places_by_host in ({}, fresh.places())
        fresh.has_labels(frozenset())
        assert self.widest_by_labels in ({}, fresh.widest_by_labels)
        for constraints, eligible in self.eligible_for.items():
            assert eligible == fresh.find_eligible(constraints), constraints
        assert self.reservations.keys() <= self.workers.keys()
        self.check_locks()
        for workers in self.saturated:
            assert workers <= self.workers.keys()
            assert not any(worker.has_room() for worker in workers)

    def check_locks(self) -> None:
        """Raise AssertionError if records of locks disagree, or a lane is parked for nothing."""
        locks, there = self.locks, {*self.workers, *self.away}
        for lock, tasks in locks.holders.items():
            assert tasks and all(worker in there and worker.locks.get(key) == lock
                                 for worker, key in tasks), lock
        for lock, lanes in locks.parked.items():
            assert locks.is_closed(lock) or lock in locks.asked or lock in locks.wanted, lock
            assert all(lane.lock == lock and not lane.client.from_above for lane in lanes)
        assert all({*brokers} <= {*self.workers} for brokers in locks.wanted.values())
        assert locks.taken <= locks.wanted.keys(), locks.taken
        assert locks.above is not None or not locks.asked and not locks.claims


# === Registry =========================================================================
#
# The registry holds the clients and workers of a broker, connected or away, with their names, keys
# and last signs of life. A client is known by its run, a worker by its name; either may come back
# over another connection. Names contain the fingerprint of the key: no other key can use them. The
# registry knows peers and times, but no messages and no queues.


class ClientRecord(ClientQueue):
    """The broker's record of a client and its tasks: of a run."""

    __slots__ = ("run", "peer", "claimed", "lost", "last_id", "announced", "join", "host", "pid",
                 "stops", "backlog", "workspaces", "told_excluded", "needs", "last_needs",
                 "told_wait", "done", "failed")

    def __init__(self, run: Run, from_above: bool, peer: Optional[Peer]) -> None:
        super().__init__(from_above)
        self.run = run
        self.peer = peer  # None while it is away
        self.claimed = peer is not None  # False: only workers have spoken of it so far
        # by id: the last attempt that we called LOST, and its fault. Kept until a later attempt
        # comes, or for a run of the broker above, which tells us less, until the run is over
        self.lost: Dict[int, Tuple[int, str]] = {}
        self.last_id = 0  # of a plain client's commands, which we number
        self.announced: Set[int] = set()  # ids of its HELLO that it has not submitted yet
        self.join = 0  # number of its last HELLO that told what it has
        self.host, self.pid = "", 0
        self.stops = False  # it understands STOP
        self.backlog = 0  # commands that it keeps for later, as it told last
        self.workspaces: Set[str] = set()  # names of workers that may have one for it
        self.told_excluded: Dict[str, Seconds] = {}  # brokers below: when they got its SHUN
        self.needs: FrozenSet[str] = frozenset()  # TREES, RESOURCES, if its commands need them
        self.last_needs: Tuple[FrozenSet[str], int] = (self.needs, 1)  # labels and slots
        self.told_wait = False  # that its tasks wait for a lock or several slots
        self.done = self.failed = 0  # results passed on, and how many of these were failures

    @property
    def link(self) -> str:
        return BROKER if self.from_above else CLIENTS

    @property
    def plain(self) -> bool:
        return not self.from_above and self.run.startswith(PLAIN)

    @property
    def shown_host(self) -> str:
        return self.host[:STATUS_LIMIT] or "?"

    def words(self) -> str:
        return printable(f"{self.pid or '?'}@{self.shown_host}", 200)

    def may_submit(self, id: int) -> bool:
        """Return whether a command that we do not know may still be submitted to us."""
        return self.from_above or not self.claimed or id in self.announced


class WorkerRecord(WorkerSlots):
    """The broker's record of a worker, or of a chained broker."""

    __slots__ = ("peer", "plain", "below", "depth", "join", "host", "user", "labels", "load",
                 "cache", "done", "failed", "no_answers")

    def __init__(self, peer: Optional[Peer], name: str, plain: bool) -> None:
        super().__init__(name)
        self.peer = peer  # None while its connection is broken
        self.plain = plain
        self.below: List[str] = []  # names of the brokers of its subtree, itself included
        self.depth = 0  # brokers in its longest chain
        self.join = 0  # number of its last READY that told what it has
        self.host = name  # its host's identity, unless it is plain or a chained broker
        self.user = ""  # that runs its commands; "" if unknown
        self.labels: FrozenSet[str] = frozenset()
        self.load = 0.0  # average of its machine; 0 if unknown
        self.cache = 0  # bytes of its workspaces
        self.done = self.failed = 0  # as in ClientRecord
        self.no_answers = False  # a plain worker that takes our answers for commands


class Registry:
    """The clients and workers of a broker."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.clients: Dict[Run, ClientRecord] = {}
        self.run_of: Dict[Peer, Run] = {}  # connected clients
        self.workers: Dict[Peer, WorkerRecord] = {}  # connected
        self.named: Dict[str, WorkerRecord] = {}  # all but plain workers, connected or away
        self.at_host: Dict[str, Dict[WorkerRecord, None]] = {}  # the same, by host
        self.host_names = HostNames()
        self.plain_peers = 0  # number of plain peers that we have named
        self.away: Dict[WorkerRecord, Seconds] = {}  # with a broken connection: until when
        # runs that are over: until when a worker that was away may have commands of them
        self.departed: Dict[Run, Seconds] = {}
        # last sign of life, the longest silent first
        self.workers_seen: OrderedDict[WorkerRecord, Seconds] = OrderedDict()
        self.clients_seen: OrderedDict[ClientRecord, Seconds] = OrderedDict()
        self.stopped: Dict[Run, str] = {}  # runs that must stop, and who wants it
        self.keys: Dict[Tuple[str, Peer], str] = {}  # public keys of connections
        self.owners: Set[Tuple[str, Peer]] = set()  # connections with the cloud's own key
        self.keyed = False  # all connections have keys
        self.lenient_until = -math.inf  # no deadline ends before this time
        self.leniency: Seconds = 0.0  # seconds that this adds after a pause

    # --- clients

    def client_at(self, peer: Peer) -> Optional[ClientRecord]:
        run = self.run_of.get(peer)
        return None if run is None else self.clients[run]

    def require_client(self, run: Run, from_above: bool, peer: Optional[Peer],
                       now: Seconds) -> ClientRecord:
        """Return the run's client; a new one if there is none yet."""
        client = self.clients.get(run)
        if client is None:
            client = self.clients[run] = ClientRecord(run, from_above, peer)
        elif not client.claimed and peer is not None:
            client.from_above, client.peer, client.claimed = from_above, peer, True
        self.see(self.clients_seen, client, now)
        return client

    def connect_client(self, client: ClientRecord, peer: Peer) -> None:
        """Set the peer of a run, which may have had another."""
        if not client.from_above and client.peer is not None:
            self.run_of.pop(client.peer, None)
        client.from_above, client.peer = False, peer
        self.run_of[peer] = client.run
        self.departed.pop(client.run, None)

    def add_plain_client(self, peer: Peer, broker: str, now: Seconds) -> None:
        self.plain_peers += 1
        run = self.run_of[peer] = f"{PLAIN}{broker}.{self.plain_peers}"
        self.require_client(run, False, peer, now)

    def disconnect_client(self, peer: Peer) -> ClientRecord:
        client = self.clients[self.run_of.pop(peer)]
        client.peer = None
        return client

    def remove_client(self, client: ClientRecord, now: Seconds) -> None:
        """The run is over."""
        self.clients_seen.pop(client, None)
        self.clients.pop(client.run, None)
        if not client.from_above:
            if client.peer is not None:
                self.run_of.pop(client.peer, None)
            self.departed[client.run] = now + self.times.client_lease

    def stop(self, client: ClientRecord, by: str) -> None:
        """Note that a run must stop. Its client may be away for longer than we remember it."""
        self.stopped[client.run] = by
        if len(self.stopped) > MAX_STOPPED:
            del self.stopped[next(iter(self.stopped))]

    # --- workers

    def add_worker(self, name: str, host: str) -> WorkerRecord:
        """Return a new worker. `host` is the identity that it has told (see HostNames)."""
        worker = self.named[name] = WorkerRecord(None, name, False)
        base, _, id = host.rpartition("/")
        worker.host = f"{self.host_names.name_of(host)}/{id}" if base else host
        self.at_host.setdefault(worker.host, {})[worker] = None
        return worker

    def add_plain_worker(self, peer: Peer, now: Seconds) -> WorkerRecord:
        self.plain_peers += 1
        given = peer[:1] == b"\0"  # made by libzmq, and no name to show
        name = f"{PLAIN}{self.plain_peers}" if given else printable(peer)
        worker = WorkerRecord(peer, name, True)
        self.connect_worker(worker, peer, now)
        return worker

    def connect_worker(self, worker: WorkerRecord, peer: Peer, now: Seconds) -> None:
        """Set the peer of a worker, which may have had another."""
        self.away.pop(worker, None)
        if worker.peer is not None:
            self.workers.pop(worker.peer, None)
        worker.peer = peer
        self.workers[peer] = worker
        self.see(self.workers_seen, worker, now)

    def disconnect_worker(self, worker: WorkerRecord, now: Seconds) -> None:
        """Its connection is broken. It is away until it connects again or its grace is over. A
        chained broker gets more: all that runs below it would be lost with it."""
        self.workers.pop(worker.peer or b"", None)
        worker.peer = None
        grace = self.times.worker_expiry if worker.below else self.times.lost_grace
        self.away[worker] = max(now + grace, self.lenient_until)

    def remove_worker(self, worker: WorkerRecord) -> None:
        if worker.peer is not None:
            self.workers.pop(worker.peer, None)
            worker.peer = None
        self.away.pop(worker, None)
        self.workers_seen.pop(worker, None)
        if not worker.plain:
            del self.named[worker.name]
            del self.at_host[worker.host][worker]
            if not self.at_host[worker.host]:
                del self.at_host[worker.host]
                self.host_names.forget(worker.host)

    def others_of_user(self, worker: WorkerRecord) -> List[WorkerRecord]:
        """Return connected workers of the same user on the same host, as after a lost ssh."""
        return [other for other in self.at_host[worker.host] if other is not worker
                and worker.user and other.user == worker.user and other.peer is not None]

    # --- keys of connections

    def identified(self, link: str, peer: Peer, key: str, own: bool) -> None:
        self.keyed = True
        self.keys[link, peer] = key
        if own:
            self.owners.add((link, peer))

    def forget_key(self, link: str, peer: Peer) -> None:
        self.keys.pop((link, peer), None)
        self.owners.discard((link, peer))

    def fingerprint_of(self, link: str, peer: Peer) -> str:
        """Return what the names must carry that this peer may use; "" without keys. Raises
        ProtocolError if the peer's connection is closed already."""
        if self.keyed and (link, peer) not in self.keys:
            raise ProtocolError("this connection has been given up: connect again")
        return fingerprint(self.keys.get((link, peer), ""))

    def may_stop(self, client: ClientRecord, peer: Peer) -> bool:
        """Return whether this peer has the key of the client, or the cloud's own; without keys
        everybody may. Raises ProtocolError as fingerprint_of()."""
        own = self.fingerprint_of(CLIENTS, peer)
        return client.run.startswith(own) or (CLIENTS, peer) in self.owners

    # --- signs of life

    def heard(self, link: str, peer: Peer, now: Seconds) -> None:
        if link == CLIENTS and peer in self.run_of:
            self.see(self.clients_seen, self.clients[self.run_of[peer]], now)
        elif link == WORKERS and peer in self.workers:
            self.see(self.workers_seen, self.workers[peer], now)

    def see(self, seen: OrderedDict[Any, Seconds], who: Any, now: Seconds) -> None:
        seen[who] = now
        seen.move_to_end(who)

    def silent_workers(self, now: Seconds) -> List[WorkerRecord]:
        """Return the workers that have been silent for longer than worker_expiry."""
        return self.silent(self.workers_seen, self.times.worker_expiry, now)

    def silent_clients(self, now: Seconds) -> List[ClientRecord]:
        """Return the clients that have been silent for longer than client_lease."""
        return self.silent(self.clients_seen, self.times.client_lease, now)

    def silent(self, seen: OrderedDict[Any, Seconds], patience: Seconds, now: Seconds) -> List[Any]:
        return list(itertools.takewhile(lambda who: seen[who] + patience <= now, seen))

    def overdue_workers(self, now: Seconds) -> List[WorkerRecord]:
        """Return the workers that have been away for too long. Forget runs that are long over."""
        for run in [run for run, until in self.departed.items() if until <= now]:
            del self.departed[run]
        return [worker for worker, until in self.away.items() if until <= now]

    def paused(self, gap: Seconds, now: Seconds) -> Seconds:
        """Move all deadlines after a pause of our own, of `gap` seconds. Return the time before
        which none may end: until then the broker reads what came meanwhile, and peers return."""
        if self.lenient_until < now - gap:
            self.leniency = 0.0
        self.lenient_until += gap
        rest = min(gap, max(REJOIN_TIME, self.times.ready_interval))
        if rest > self.leniency:  # else no deadline ever ends if pauses are frequent
            self.leniency, self.lenient_until = rest, max(self.lenient_until, now + rest)
        grace = self.lenient_until
        for seen, patience in self.watched():
            for who, when in seen.items():
                seen[who] = max(when + gap, grace - patience)
        for worker, until in self.away.items():
            self.away[worker] = max(until + gap, grace)
        for run in self.departed:
            self.departed[run] += gap
        return grace

    def watched(self) -> List[Tuple[OrderedDict[Any, Seconds], Seconds]]:
        return [(self.workers_seen, self.times.worker_expiry),
                (self.clients_seen, self.times.client_lease)]

    def deadline(self) -> Seconds:
        """Return when the first of them is silent or away for too long."""
        due = [*self.away.values(), *itertools.islice(self.departed.values(), 1)]
        for seen, patience in self.watched():
            due += [when + patience for when in itertools.islice(seen.values(), 1)]
        return min(due, default=math.inf)

    def check(self) -> None:
        """Raise AssertionError if indexes disagree. For tests."""
        assert set(self.clients_seen) == set(self.clients.values())
        for peer, run in self.run_of.items():
            assert self.clients[run].peer == peer and not self.clients[run].from_above
        for client in self.clients.values():
            assert client.from_above or client.peer is None \
                or self.run_of[client.peer] == client.run
        known = {*self.workers.values(), *self.named.values()}
        assert set(self.workers_seen) == known
        assert all(self.workers[peer].peer == peer for peer in self.workers)
        for worker in known:
            assert (worker.peer is None) == (worker in self.away), worker.name
            assert worker.plain or worker in self.at_host[worker.host]
        assert sum(map(len, self.at_host.values())) == len(self.named)


# === Upstream =========================================================================
#
# Towards the broker above it, a chained broker is a worker with the slots of all workers below
# it. The runs that it gets from there are clients to it. This class holds that conversation: the
# session, the capacity that it has reported, and the losses that it could not report yet.


class Upstream:
    """A broker's link to the broker above. Without one (`chained` is false) it never joins."""

    def __init__(self, owner: Dispatcher, chained: bool) -> None:
        self.owner = owner
        self.chained = chained
        self.session = Session(owner, "READY", self.greeting, owner.times)
        if not chained:
            self.session.next_greeting = math.inf
        self.above: List[str] = []  # the brokers above us, nearest first
        self.knows_locks = True  # the broker above, and all above it: as far as we know
        self.reported: Fields = {}  # capacity(), as the broker above knows it
        self.unsent: Dict[TaskKey, Fields] = {}  # LOSTs that the broker above could not hear
        self.may_run: Set[TaskKey] = set()  # said to be LOST, and may still have their lock

    def wait_reason(self) -> str:
        """Return what we wait for, in words; "" if we have joined, or are not chained."""
        if not self.chained or self.session.joined:
            return ""
        absent = self.session.trouble or ("" if self.session.up else "not there (yet)")
        return "waiting for the broker above" + (absent and ": " + absent)

    # --- to the broker above

    def capacity(self) -> Fields:
        """Return what the broker above must know of the workers below: fields of READY."""
        workers = self.owner.registry.workers.values()
        crew: Counter[Tuple[str, FrozenSet[str]]] = Counter()
        widest: Dict[Tuple[str, FrozenSet[str]], int] = {}
        for worker in workers:
            crew.update(worker.capacity)
            for place, n in worker.widest.items():
                widest[place] = max(n, widest.get(place, 0))
        below = {name for worker in workers for name in worker.below}
        return {"slots": self.owner.scheduler.slots,
                "weight": max((it.weight for it in workers), default=0),
                "crew": rows_of_places(crew),
                **({"widest": rows_of_places(widest)} if widest != crew else {}),
                "below": [self.owner.name, *sorted(below)],
                "depth": 1 + max((worker.depth for worker in workers), default=0)}

    def report_changes(self) -> None:
        """Greet the broker above if our capacity is not what it knows."""
        if self.session.joined and self.reported != self.capacity():
            self.session.greet(self.owner.now)

    def greeting(self, joining: bool) -> Fields:
        self.reported = self.capacity()
        fields: Fields = {"name": self.owner.name, "version": __version__, **self.reported}
        cache = sum(worker.cache for worker in self.owner.registry.workers.values())
        if cache:
            fields["cache"] = min(cache, MAX_COUNT)
        if joining:
            fields["labels"] = [*KNOWN_BY_LABEL]  # workers below have them, too, if they know
            tasks = self.tasks()
            running = [task.key for task in tasks if task.state != DELIVERED]
            fields["held"] = [list(task.key) for task in tasks if task.state == DELIVERED]
            # losses are announced as well, so that the broker above listens to their LOST
            present = {task.key for task in tasks}
            running += [key for key in self.unsent if key not in present]
            fields["running"] = [list(key) for key in running]
            fields["locks"] = self.locks()
        return fields

    def locks(self) -> List[List[Any]]:
        """Return the locks of tasks from above, and those of our own clients: fields of READY.
        From now on, the broker above gives us the latter."""
        registry, locks = self.owner.registry, self.owner.scheduler.locks
        locks.claims.clear()
        locks.unlocked.clear()
        locks.above = {lock for lock in locks.holders if not lock[0]}
        rows: List[List[Any]] = [[lock[1]] for lock in sorted(locks.above)]
        for worker in (*registry.workers.values(), *registry.away):
            for key, lock in worker.locks.items():
                client = registry.clients.get(key[0])
                if (worker, key) not in locks.holders.get(lock, {}) and (
                        client is None or client.from_above):
                    rows.append([lock[1], *key])
                    if key not in worker.tasks:
                        self.may_run.add(key)
        return rows

    def tasks(self) -> List[Task]:
        """Return the tasks that the broker above gave us, or may have given our predecessor."""
        return [task for client in self.owner.registry.clients.values()
                if client.from_above or not client.claimed
                for task in client.tasks.values()]

    def send_line(self, run: Run, line: bytes) -> None:
        """Say something if the broker above can hear it. It asks when we have joined."""
        if self.session.joined:
            self.owner.send_line(BROKER, b"", run, line)

    def say_queued(self, tasks: List[Task], preparing: str, host: str = "") -> None:
        """Say QUEUED for tasks of one run. Each counts there as it is `preparing` here."""
        fields: Fields = {"tasks": [[task.id, task.attempt] for task in tasks],
                          "worker": self.owner.name}
        if preparing:
            fields.update(preparing=preparing, host=host)
        for task in tasks:
            task.told_above = preparing
        self.send_line(tasks[0].client.run, encode("QUEUED", fields))

    def report_lost(self, key: TaskKey, fields: Fields, may_run: bool = False) -> None:
        """Say LOST, or keep it until we have joined."""
        if may_run:
            self.may_run.add(key)
            fields = dict(fields, may_run=True)
        if self.chained and not self.session.joined:
            self.unsent[key] = fields
        else:
            self.send_line(key[0], encode("LOST", fields))

    def disown(self, run: Run, rows: List[List[int]], found: List[Task]) -> None:
        """Say LOST for each [id, attempt] without a task."""
        have = {(task.id, task.attempt) for task in found}
        for id, attempt in rows:
            if (id, attempt) not in have:
                self.say_lost((run, id, attempt), "unknown")

    def say_lost(self, key: TaskKey, why: str) -> None:
        run, id, attempt = key
        self.owner.say(BROKER, b"", run, "LOST", self.unsent.get(
            key, {"tasks": [[id, attempt]], "why": why,
                  **({"may_run": True} if key in self.may_run else {})}))

    # --- from the broker above

    def on_ok(self, fields: Fields) -> None:
        self.knows_locks = fields.get("resources", False)
        if self.session.on_ok(fields):
            self.owner.scheduler.locks.asked.clear()
            self.owner.asked.clear()
            self.owner.scheduler.unpark_all()
            self.owner.scheduler.capacity_changed = True  # it may have, since we announced it
            self.catch_up(self.session.announced)
            # what workers asked a client meanwhile may be lost; without a line: they may prepare
            self.owner.instruct([("RESEND", task) for task in self.tasks()
                                 if task.state == RUNNING and (task.preparing or not task.line)])

    def catch_up(self, announced: Fields) -> None:
        """Report what has changed since the broker above got our announcement."""
        running = {tuple(row) for row in announced["running"]}
        known = running | {tuple(row) for row in announced["held"]}
        present = {task.key: task for task in self.tasks()}
        for key in sorted(known):
            task = present.get(key)
            if task is None:
                self.say_lost(key, "lost below a chained broker")
            elif task.state == DELIVERED and task.key in running:
                self.owner.remind(task)
        for task in present.values():
            if task.told_above:  # else it takes a slot, as the broker above thinks now
                self.say_queued([task], task.told_above)
        self.unsent.clear()
        if not known.issuperset(present):
            self.session.join_again(self.owner.now)

    def check(self) -> None:
        """Raise AssertionError if its records disagree. For tests."""
        assert self.chained or not (self.session.joined or self.unsent or self.above)
        assert all(key[1:] == tuple(fields["tasks"][0]) for key, fields in self.unsent.items())


# === Dispatcher =======================================================================
#
# The life of a task at the broker: submitted, assigned, confirmed (QUEUED), delivered or lost, and
# the messages at each step. Clients own their commands: when an attempt is lost, the broker says
# LOST and drops the task, and the client decides about another attempt. Plain clients know no LOST,
# so the broker owns their commands. It keeps nothing on disk: clients and workers tell it when they
# join all it must know, also what its predecessor knew (a broker that died before this one began).


class Dispatcher(Machine):
    """The tasks of a broker. It uses Registry (peers), Scheduler (assignment) and Upstream."""

    def __init__(self, name: str, times: Times = Times(), chained: bool = False,
                 now: Seconds = 0.0) -> None:
        super().__init__()
        self.name = name  # this incarnation
        self.times = times
        self.started = now
        self.scheduler = Scheduler()
        self.registry = Registry(times)
        self.upstream = Upstream(self, chained)
        self.unconfirmed: Dict[Task, Seconds] = {}  # ASSIGNED: deadline of QUEUED, earliest first
        self.recovering: Dict[Task, Seconds] = {}  # RECOVERING: deadline
        self.recovery_at: Seconds = math.inf  # the earliest of these, or earlier still
        self.asked: Set[Lock] = set()  # LOCKs that the broker above has heard
        self.untold: List[Task] = []  # from above, which gets QUEUED once they are assigned
        self.scheduler.locks.above = set() if chained else None
        self.scheduler.locks.is_open = False

    # --- submitting

    def check_news(self, client: ClientRecord, fields: Fields) -> bool:
        """Return whether this attempt is new. If it is known or lost, tell the client again."""
        id, attempt = fields["id"], fields["attempt"]
        client.announced.discard(id)
        known = client.tasks.get(id)
        if known is not None and known.attempt >= attempt:
            if known.attempt == attempt:  # else it was delayed
                self.learn(known, fields)
                self.remind(known)
            return False
        lost, fault = client.lost.get(id, (-1, ""))
        if lost >= attempt:  # submitted before our LOST was heard
            self.say_lost(client, id, attempt, "lost before", fault if lost == attempt else "")
            return False
        return True

    def learn(self, task: Task, fields: Fields) -> None:
        """Learn what a task needs that only its worker has told us of so far."""
        worker = task.worker
        if task.line or worker is None or task.state not in BUSY or task.client.plain:
            return
        worker.count(task, -1)
        task.constraints = constraints_of(fields)
        worker.count(task, 1)
        self.scheduler.rank(worker)
        lock = None if task.has_ended else lock_of(fields, task.client.run)
        if lock != task.lock:
            self.scheduler.release_lock(worker, task.key)
            task.lock = lock
            if lock is not None:
                self.scheduler.hold_lock(task, worker)

    def submit(self, client: ClientRecord, message: Message) -> Task:
        """Queue a new attempt. It replaces an older one of the same command."""
        id, attempt = message.fields["id"], message.fields["attempt"]
        if not client.from_above:
            client.lost.pop(id, None)
        if id in client.tasks:
            self.drop([client.tasks[id]])
        if client.backlog and attempt == 1 and not message.fields.get("again"):
            client.backlog -= 1
        task = Task(client, id, attempt, message.line)
        task.avoid = message.fields.get("avoid", "")
        task.careful = message.fields.get("careful", False)
        task.constraints = constraints_of(message.fields)
        task.lock = lock_of(message.fields, client.run)
        task.delay = message.fields.get("delay", 0.0)
        if task.delay and message.fields.get("again"):  # our predecessor may have started one
            client.start_at = max(client.start_at, self.started + task.delay)
            self.scheduler.delayed[client] = client.start_at
        if client.from_above:
            self.upstream.session.on_command()
            if task.needs_tree:
                self.untold.append(task)
            else:
                self.upstream.say_queued([task], "")
        self.queue(task, message.fields)
        return task

    def queue(self, task: Task, fields: Fields = {}) -> None:
        """Queue a new task. A client's task that was submitted to our predecessor waits for its
        worker first (RECOVERING)."""
        client, again = task.client, fields.get("again", False)
        client.tasks[task.id] = task
        if again and not client.from_above:
            task.had = fields.get("had", "")
            until = self.started + (self.times.worker_expiry if task.had
                                    else max(REJOIN_TIME, self.times.ready_interval))
            if task.had in self.registry.named:  # which has joined, and did not list it
                self.lose(task, "was never started")
                return
            if self.now < until:
                task.state = RECOVERING
                self.recovering[task] = until
                self.recovery_at = min(self.recovery_at, until)
                return
        self.scheduler.submit(task, again or task.attempt > 1)
        if self.scheduler.is_unplaceable(task):
            self.lose_unplaceable(task)

    def lose_unplaceable_of(self, clients: Iterable[ClientQueue]) -> None:
        """Lose those tasks of these clients that no worker here may run."""
        for task in self.scheduler.unplaceable(clients):
            self.lose_unplaceable(task)

    def expect_hosts(self, expecting: bool, now: Seconds) -> None:
        """Note whether more hosts are about to join."""
        if expecting != self.scheduler.expecting:
            self.now = now
            self.scheduler.expect(expecting)
            self.lose_unplaceable_of([*self.registry.clients.values()])
            self.settle()

    def lose_unplaceable(self, task: Task) -> None:
        if task.constraints.never_on:
            self.lose(task, "there is no other host", NOWHERE)
        else:
            self.lose(task, "nobody here has the labels or slots that it needs", told=True)

    # --- assigning

    def move(self, task: Task, state: str, worker: Optional[WorkerRecord] = None) -> None:
        """Change a task's state and deadlines, here and in the Scheduler."""
        if task.state == ASSIGNED:
            self.unconfirmed.pop(task, None)
        elif task.state == RECOVERING:
            self.recovering.pop(task, None)
        self.scheduler.move(task, state, worker, self.now)
        if state == ASSIGNED:
            self.unconfirmed[task] = max(
                self.now + self.times.queued_timeout, self.registry.lenient_until)

    def dispatch(self) -> None:
        """Carry out what the scheduler decides."""
        self.scheduler.has_lease = self.upstream.session.leased()
        if self.upstream.chained:
            self.lose_unplaceable_of(
                [client for client in self.scheduler.turns if client.from_above])
        for task, worker in self.scheduler.decisions(self.now):
            if isinstance(worker, WorkerRecord):
                self.assign(task, worker)
            else:
                self.lose_unplaceable(task)
        untold, self.untold = self.untold, []
        for task in untold:  # waiting for a workspace takes no slot: others may use free ones
            waits = task.state == WAITING and any(
                worker.free() > 0 for worker in self.scheduler.workers)
            if task.state != GONE:
                self.upstream.say_queued([task], FILES if waits else task.preparing)
        if self.scheduler.prefetched or self.scheduler.scouts:
            self.instruct([("RECALL", task) for task in self.scheduler.recalls(self.now)])
        locks = self.scheduler.locks
        if locks.wanted or locks.news or locks.above is not None:
            self.settle_locks()

    def settle_locks(self) -> None:
        """Give locks to brokers below. Ask the broker above for those that our clients' tasks
        need, and give back those that they do not need any more."""
        locks, joined = self.scheduler.locks, self.upstream.session.joined
        for lock, worker in self.scheduler.locks_for_brokers() if locks.wanted else ():
            assert isinstance(worker, WorkerRecord)
            self.say(WORKERS, worker.peer or b"", "", "LOCK", {"lock": lock[1]})
        while locks.news:
            lock = locks.news.pop()
            for worker in locks.wanted.get(lock, ()):
                self.tell_holder(worker, lock)
        if locks.above is None or not joined or not self.upstream.knows_locks:
            return
        for lock in sorted(locks.unlocked | (
                locks.above - self.scheduler.needed_locks() if locks.above else set())):
            locks.above.discard(lock)
            self.say(BROKER, b"", "", "UNLOCK", {"lock": lock[1]})
        locks.unlocked.clear()
        for lock in sorted(locks.claims & locks.holders.keys()):
            locks.above.add(lock)
            self.say(BROKER, b"", "", "LOCK", {
                "lock": lock[1], "has": True, "by": locks.holder(lock)})
        locks.claims.clear()
        for lock in sorted(locks.asked.keys() - self.asked):
            by = [*locks.wanted.get(lock, {}).values()] or [
                lane.client.words() for lane in locks.parked.get(lock, ())]
            self.say(BROKER, b"", "", "LOCK", {"lock": lock[1], "by": (by or [""])[0]})
        self.asked = {*locks.asked}

    def tell_holder(self, worker: WorkerSlots, lock: Lock) -> None:
        """Tell a broker below that wants this lock who has it."""
        locks = self.scheduler.locks
        by = locks.holder(lock) or locks.asked.get(lock, "")
        if by and isinstance(worker, WorkerRecord) and worker.peer is not None:
            self.say(WORKERS, worker.peer, "", "LOCK", {"lock": lock[1], "by": by})

    def release_lock(self, worker: WorkerRecord, key: TaskKey) -> None:
        """A task certainly does not run on this worker. The broker above may wait for that."""
        self.scheduler.release_lock(worker, key)
        if key in self.upstream.may_run:
            self.upstream.may_run.discard(key)
            self.upstream.unsent.get(key, {}).pop("may_run", None)
            self.upstream.say_lost(key, "it has ended")

    def release_by_token(self, worker: WorkerRecord, token: str) -> None:
        """Note that a plain worker has ended this command, which may be given up already."""
        for key in [key for key in worker.locks if token_of(key) == token]:
            self.release_lock(worker, key)

    def open_locks(self) -> None:
        """Give locks again: all workers of our predecessor have joined, or are given up."""
        if self.now >= self.started + self.times.worker_expiry:
            self.scheduler.locks.is_open = True
            self.scheduler.locks.doubted.clear()
            self.scheduler.unpark_all()

    def assign(self, task: Task, worker: WorkerRecord) -> None:
        self.move(task, ASSIGNED, worker)
        client, peer = task.client, worker.peer or b""
        if task.needs_tree:
            client.workspaces.add(worker.name)
        if worker.below and client.told_excluded.get(worker.name, -math.inf) \
                < self.now - self.times.client_lease / 2:  # it may have forgotten the run
            self.tell_excluded(client, [worker])
        if worker.plain:
            worker.ready = False
            self.send_line(WORKERS, peer, token_of(task.key), task.line)
        elif client.plain:  # our workers need id and attempt
            self.say(WORKERS, peer, client.run, COMMAND, dict(
                task.plain, id=task.id, attempt=task.attempt, cut=PLAIN_INLINE))
        else:
            self.send_line(WORKERS, peer, client.run, task.line)

    def tell_excluded(self, client: ClientRecord, brokers: List[WorkerRecord]) -> None:
        """Let brokers below exclude the same hosts for this client."""
        for broker in brokers if client.excluded else ():
            client.told_excluded[broker.name] = self.now
            self.say(WORKERS, broker.peer or b"", client.run, "SHUN",
                     {"hosts": sorted(client.excluded)})

    def instruct(self, orders: List[Tuple[str, Task]]) -> None:
        """Say these verbs to the workers of the tasks, in one line per worker, run and verb.
        Plain workers know no orders. Workers that are away learn all when they join."""
        rows: Dict[Tuple[Peer, Run, str], List[List[int]]] = {}
        for verb, task in orders:
            worker = task.worker
            if worker is not None and worker.peer is not None and not worker.plain:
                rows.setdefault((worker.peer, task.client.run, verb), []).append(
                    [task.id, task.attempt])
        for (peer, run, verb), tasks in rows.items():
            self.say(WORKERS, peer, run, verb, {"tasks": tasks})

    def drop(self, tasks: List[Task]) -> None:
        """Drop tasks, here and at their workers."""
        if self.upstream.chained:
            self.upstream.may_run.update(
                task.key for task in tasks if task.client.from_above and task.worker is not None
                and task.key in task.worker.locks)
        self.instruct([("DONE" if task.state == DELIVERED else "CANCEL", task) for task in tasks])
        for task in tasks:
            self.move(task, GONE)

    # --- answers

    def tell_client(self, client: ClientRecord, line: bytes) -> None:
        """Send a line to a client if it is connected. Else it asks when it is back."""
        if client.from_above:
            self.upstream.send_line(client.run, line)
        elif client.peer is not None:
            self.send_line(CLIENTS, client.peer, "", line)

    def tell_queued(self, tasks: List[Task], host: str = "") -> None:
        """Tell the client of these tasks that their worker has them, and whether it prepares a
        workspace first, on this host. The broker above knows the rest."""
        if not tasks:
            return
        client, worker, preparing = tasks[0].client, tasks[0].worker, tasks[0].preparing
        if client.plain:
            for task in tasks:
                self.tell_client(task.client, b"QUEUED " + task.line)
        elif client.from_above:
            news = [task for task in tasks if task.told_above != preparing]
            if news:
                self.upstream.say_queued(news, preparing, host)
        else:
            fields: Fields = {"tasks": [[task.id, task.attempt] for task in tasks],
                              "worker": worker.name if worker else ""}
            if preparing:
                fields.update(preparing=preparing, host=host)
            self.tell_client(client, encode("QUEUED", fields))

    def remind(self, task: Task) -> None:
        """Let the client hear again what was said last of this task, if anything."""
        if task.state == RUNNING:
            self.tell_queued([task], task.worker.host if task.worker else "")
            if task.preparing:  # what its worker asked of the client may be lost
                self.instruct([("RESEND", task)])
        elif task.state == DELIVERED and task.result:
            self.tell_client(task.client, task.result)
        elif task.state == DELIVERED:
            self.instruct([("RESEND", task)])

    def tasks_of(self, client: ClientRecord, rows: List[List[int]]) -> List[Task]:
        """Return the client's tasks that match these [id, attempt], each once."""
        wanted = {id: attempt for id, attempt in rows if id in client.tasks}
        return [client.tasks[id] for id, attempt in wanted.items()
                if client.tasks[id].attempt == attempt]

    def deliver(self, task: Task, worker: WorkerRecord, fields: Fields, line: bytes) -> None:
        """Pass on a result: its line, or these fields if worker or client are plain."""
        if task.state in BUSY:  # only the first RESULT counts
            for record in (task.client, worker):
                record.done += 1
                record.failed += fields["exitcode"] != 0
            if not worker.plain:
                self.scheduler.learn_duration(task.client, worker, fields.get("time", math.inf))
        if task.client.plain:
            self.move(task, DELIVERED, worker)
            self.tell_client(task.client, encode("RESULT", plain_result(task, fields)))
            self.drop([task])
        elif worker.plain:  # it does not keep its results, so we do
            task.result = encode("RESULT", dict(
                fields, id=task.id, attempt=task.attempt, worker=worker.name, host=worker.host))
            self.move(task, DELIVERED, None)
            self.scheduler.charge(task, len(task.result))
            self.tell_client(task.client, task.result)
        else:
            self.move(task, DELIVERED, worker)
            spooled = SPOOL_COST if stream_size(fields) > INLINE else 0
            self.scheduler.charge(task, len(line) + spooled)
            self.tell_client(task.client, line)

    # --- lost attempts: why a command is started twice
    #
    # An attempt is lost, and the owner of its command may begin another, if
    #   its worker left, was silent for too long, or did not reconnect in time;
    #   its worker did not confirm it (QUEUED) in time, or joined without it;
    #   its worker says LOST: it could not start it, was stopped, or had no slot (RECALL);
    #   its worker did not come back after a restart of the broker (RECOVERING);
    #   no worker here may run it (unplaceable);
    #   its host cannot make the workspace (UNFIT).
    # The owner is the client (Client.lose), or for a plain client this broker (try_again).
    # Commands that failed are tried again by their client only (RetryPolicy).

    def lose(self, task: Task, why: str, fault: str = "", told: bool = False,
             more: Fields = {}) -> None:
        """Give up an attempt that brings no result. `told`: it certainly does not run. Otherwise
        it may still run, and nothing that a worker says about it counts any more."""
        worker, client = task.worker, task.client
        if client.plain and task.state in BUSY:
            self.try_again(task, why, fault)
            return
        if not client.from_above or not told:
            client.lost[task.id] = (task.attempt, "" if fault == UNFIT else fault)
        may_run = worker is not None and task.key in worker.locks
        self.say_lost(client, task.id, task.attempt, why, fault, worker.name if worker else "",
                      more, may_run)
        self.move(task, GONE)

    def say_lost(self, client: ClientRecord, id: int, attempt: int, why: str,
                 fault: str = "", worker: str = "", more: Fields = {},
                 may_run: bool = False) -> None:
        fields = {"tasks": [[id, attempt]], "why": why, "fault": fault, "worker": worker, **more}
        if client.from_above:
            self.upstream.report_lost((client.run, id, attempt), fields, may_run)
        else:
            self.tell_client(client, encode("LOST", fields))

    def try_again(self, task: Task, why: str, fault: str) -> None:
        """Queue another attempt of a plain client's command, unless it was lost too often."""
        worker = task.worker
        verdict = task.faults.count(fault, why, self.times)
        if verdict:
            self.tell_client(task.client, encode("RESULT", plain_result(task, {
                "exitcode": NOT_RUN, "time": 0.0, "reason": verdict})))
            self.drop([task])
            return
        self.move(task, WAITING)
        task.attempt += 1
        task.key = (task.client.run, task.id, task.attempt)
        task.avoid = worker.name if worker else ""
        task.careful = task.faults.crashes > 0
        self.scheduler.submit(task, True)

    def give_up_waiting(self, task: Task) -> None:
        """No QUEUED in time: take the task back. The worker gets nothing until it speaks."""
        worker = task.worker
        assert worker is not None
        worker.ready = False
        why = f"worker {printable(worker.name)} did not confirm it"
        self.log(logging.WARNING, f"{why}: command {task.id} of run "
                                  f"{printable(task.client.run, 8)}")
        self.instruct([("CANCEL", task)])
        self.lose(task, why)

    def expire_tasks(self) -> None:
        """Lose the tasks whose worker did not answer in time."""
        now = self.now
        for task in list(itertools.takewhile(
                lambda task: self.unconfirmed[task] <= now, self.unconfirmed)):
            self.give_up_waiting(task)
        if self.recovery_at <= now:
            for task in [task for task, until in self.recovering.items() if until <= now]:
                self.lose(task, "the worker that had it did not come back",
                          CRASH if task.had else "")
            self.recovery_at = min(self.recovering.values(), default=math.inf)

    def shift_deadlines(self, gap: Seconds, grace: Seconds) -> None:
        """Move deadlines after a pause of `gap` seconds. None ends before the time `grace`."""
        self.started += gap
        for deadlines in (self.unconfirmed, self.recovering):
            for task, until in deadlines.items():
                deadlines[task] = max(until + gap, grace)
        self.recovery_at = max(self.recovery_at + gap, grace)

    # --- joining workers: make our records match theirs

    def reconcile(self, worker: WorkerRecord, fields: Fields) -> Tuple[
            Dict[Run, List[List[int]]], List[Tuple[str, Task]], List[Tuple[str, Task]]]:
        """Make our records match the worker's READY. Return three things: the [id, attempt] that
        it must stop, by run; orders to hand back tasks of our predecessor, if their client has
        not joined or is above (it may have given them to others); and orders to send held results
        again."""
        running = {tuple(row) for row in fields.get("running", ())}
        held = {tuple(row) for row in fields.get("held", ())}
        told = running | held
        locks = self.told_locks(worker, fields)
        never_came = [task for key, task in worker.tasks.items() if key not in told]
        never_came += [task for task in self.recovering
                       if task.had == worker.name and task.key not in told]
        for task in never_came:
            self.lose(task, "was never started")
        unwanted: Dict[Run, List[List[int]]] = {}
        recall, resend = [], []
        known = {*worker.tasks}
        for key in sorted(told):
            adopted = self.adopt(worker, key, locks, key in held)
            if adopted is None:
                unwanted.setdefault(key[0], []).append([key[1], key[2]])
            elif key in held:
                resend.append(("RESEND", adopted))
            elif not adopted.client.claimed or (
                    adopted.client.from_above and not adopted.line and key not in known):
                recall.append(("RECALL", adopted))
        if told or locks:
            self.upstream.session.join_again(self.now)  # the broker above may look for these
        return unwanted, recall, resend

    def told_locks(self, worker: WorkerRecord, fields: Fields) -> Dict[TaskKey, Lock]:
        """Return the locks of a joining worker's tasks. Note who has them now."""
        found: Dict[TaskKey, Lock] = {}
        for text, *key in fields.get("locks", ()):
            run = key[0] if key else ""
            lock = (run if not text else "", text)
            found[(run, key[1], key[2]) if key else key_of_broker(lock)] = lock
        running = {tuple(row) for row in fields.get("running", ())}
        for key, lock in [*worker.locks.items()]:
            if found.get(key, lock if key in running else None) != lock:
                self.release_lock(worker, key)
        for key, lock in found.items():
            client = self.registry.clients.get(key[0])
            if key[1] >= 0 and (client.from_above if client else self.upstream.chained):
                worker.locks[key] = lock
            else:
                self.scheduler.locks.hold(lock, key, worker, client or (
                    "a client that is away" if key[1] >= 0 else
                    f"a client of {printable(worker.name)}"))
        return found

    def adopt(self, worker: WorkerRecord, key: TaskKey, locks: Dict[TaskKey, Lock],
              has_ended: bool) -> Optional[Task]:
        """Take over an attempt that a worker reports. Return None if it is not wanted there."""
        run, id, attempt = key
        client = self.registry.clients.get(run)
        if client is None:
            from_above = self.upstream.chained
            if run in self.registry.departed or run.startswith(PLAIN) and not from_above:
                return None
            # from our predecessor: its client may still come back
            client = self.registry.require_client(run, from_above, None, self.now)
        if client.lost.get(id, (-1, ""))[0] >= attempt:
            return None
        task = client.tasks.get(id)
        if task is not None and not task.line and task.attempt < attempt:
            self.drop([task])  # both are from our predecessor: the later attempt counts
            task = None
        if task is None:
            if not client.may_submit(id):
                return None
            task = client.tasks[id] = Task(client, id, attempt, b"")
            # an older worker does not tell: it may have the run's own lock
            task.lock = locks.get(key, None if RESOURCES in worker.labels else (run, ""))
        if task.attempt != attempt or not self.may_have(worker, task):
            return None
        if task.worker is worker and task.state == DELIVERED:
            return task
        if has_ended:  # it must not stand for the task that has its lock now
            task.has_ended, task.lock = True, None
        is_news = task.state != RUNNING or task.preparing
        self.move(task, DELIVERED if task.state == DELIVERED else RUNNING, worker)
        if task.preparing:  # the worker says so again, unless it has ended meanwhile
            self.scheduler.recount(task, worker, "", self.now)
        if is_news:
            self.tell_queued([task])
        return task

    def may_have(self, worker: WorkerRecord, task: Task) -> bool:
        """Return whether this worker may have this task: from us, from our predecessor, or in the
        place of a chained broker that died (with the same key)."""
        if worker is task.worker or worker.name == task.had:
            return True
        if task.worker is None and (
                not task.line or task.state == RECOVERING and not task.had):
            return True
        before = task.had if task.worker is None else task.worker.name
        is_gone = task.worker is None or task.worker.peer is None and bool(task.worker.below)
        return bool(before and is_gone and worker.below) \
            and key_mark(before) == key_mark(worker.name)

    def check(self) -> None:
        """Raise AssertionError if indexes disagree. For tests."""
        self.registry.check()
        self.scheduler.check()
        self.upstream.check()
        assert {*self.scheduler.workers} == {*self.registry.workers.values()}
        assert {*self.scheduler.away} == {*self.registry.away}
        turns = {*self.scheduler.turns}
        assert turns == {it for it in self.registry.clients.values() if it.in_turn}
        tasks = {task for client in self.registry.clients.values()
                 for task in client.tasks.values()}
        assert self.recovering.keys() == {task for task in tasks if task.state == RECOVERING}
        assert self.unconfirmed.keys() == {task for task in tasks if task.state == ASSIGNED}
        for client in self.registry.clients.values():
            assert client.owed == sum(task.cost for task in client.tasks.values())
            assert client.busy == sum(task.state in BUSY for task in client.tasks.values())
            assert client.waiting_slots == sum(
                task.slots for task in client.tasks.values() if task.state == WAITING)
            for id, task in client.tasks.items():
                assert task.client is client and task.id == id and task.state != GONE
                if task.worker is not None:
                    assert task.worker.tasks[task.key] is task
                else:
                    assert task.state in (RECOVERING, WAITING) or task.result, task.state
                if task.state == WAITING:
                    lanes = [lane for rank in (RETRIES, FIRSTS)
                             for lane in [client.lanes[task.constraints].get(
                                 (rank, task.careful, task.lock))]
                             if lane and task in lane.tasks]
                    assert len(lanes) == 1, task.key
                    parked = lanes[0] in self.scheduler.locks.parked.get(task.lock or ("", ""), ())
                    assert parked or any(row[3] is lanes[0] for row in client.ready), task.key
                    assert parked or client.in_turn or not self.scheduler.may_start(client)
        for worker in (*self.scheduler.workers, *self.scheduler.away):
            assert {*worker.tasks.values()} <= tasks, worker.name


CONSTRAINTS = {"needs", "elsewhere", "on", "not_on", "never_on", "slots"}  # fields of a command


def constraints_of(fields: Fields) -> Constraints:
    if CONSTRAINTS.isdisjoint(fields):
        return UNCONSTRAINED
    return make_constraints(
        tuple(fields.get("needs", ())), fields.get("on", ""), fields.get("not_on", ""),
        fields.get("avoid", "") if fields.get("elsewhere") else "",
        tuple(fields.get("never_on", ())), fields.get("slots", 1))


@functools.lru_cache(16)  # most commands of a run have the same ones; each may be large
def make_constraints(needs: Tuple[str, ...], on: str, not_on: str, avoid: str,
                     never_on: Tuple[str, ...], slots: int) -> Constraints:
    return Constraints(frozenset(needs), frozenset(), on, not_on, avoid, frozenset(never_on), slots)


def lock_of(fields: Fields, run: Run) -> Optional[Lock]:
    """Return the lock of a command: "" is its run's own."""
    lock = fields.get("lock")
    return None if lock is None else ("", lock) if lock else (run, "")


def rows_of_places(slots: Dict[Tuple[str, FrozenSet[str]], int]) -> List[List[Any]]:
    return sorted([host, n, *sorted(labels)] for (host, labels), n in slots.items())


def token_of(key: TaskKey) -> str:
    """Return the token that names a task for a plain worker."""
    return "{} {} {}".format(*key)


def key_mark(name: str) -> str:
    """Return the fingerprint of the key at the end of a worker's name; "" if there is none."""
    return name.partition(".")[2]


# === Membership =======================================================================
#
# How clients and workers join, stay and leave: HELLO, READY, OK, WHO, BYE, STATUS, connections and
# silence. Greetings are answered together, because one answer wakes a whole process. Plain and
# unknown peers get few answers: they may answer our answers.

TAKEN_FOR_COMMANDS = (b"QUEUED OK", b"QUEUED ERROR", b"QUEUED WHO")  # of a worker: our answers


class AnswerLimit:
    """Limits answers, to plain and unknown peers because they may answer back without end."""

    def __init__(self) -> None:
        self.answers: Counter[Tuple[str, str, Peer]] = Counter()  # by verb, link and peer
        self.ends_at: Seconds = math.inf  # of the second in which we count

    def exceeded(self, verb: str, link: str, peer: Peer, now: Seconds) -> bool:
        """Count an answer. Return whether it is one too many in this second."""
        self.ends_at = min(self.ends_at, now + 1)
        self.answers[verb, link, peer] += 1
        return self.answers[verb, link, peer] > ANSWERS_PER_SECOND

    def forgive(self, verb: str, link: str, peer: Peer) -> None:
        self.answers.pop((verb, link, peer), None)

    def restart(self) -> List[Peer]:
        """Begin a new second. Return the workers that got fewer OKs than they asked for."""
        answers, self.answers, self.ends_at = self.answers, Counter(), math.inf
        return [peer for (verb, link, peer), n in answers.items()
                if verb == "OK" and link == WORKERS and n > ANSWERS_PER_SECOND]


class PartialReadys:
    """Incomplete READYs, by peer, the oldest first."""

    def __init__(self, patience: Seconds) -> None:
        self.patience = patience
        self.parts: Dict[Peer, Tuple[Seconds, List[Fields]]] = {}  # deadline, parts

    def add(self, peer: Peer, fields: Fields, now: Seconds) -> None:
        """Keep a part. All peers together get MAX_PARTS: a peer whose parts are dropped for
        later ones must join again. Raises ProtocolError if it is no such part."""
        size = max(len(fields.get(key, ())) for key in TASK_LISTS)
        if "join" not in fields or size > MAX_READY_TASKS:
            raise ProtocolError(
                f"READY with 'more' needs 'join', and at most {MAX_READY_TASKS} tasks")
        _, parts = self.parts.pop(peer, (0.0, []))
        if parts and parts[0]["join"] != fields["join"]:
            parts = []
        part = {key: fields[key] for key in ("join", *TASK_LISTS) if key in fields}
        self.parts[peer] = now + self.patience, [*parts, part]
        while sum(len(parts) for _, parts in self.parts.values()) > MAX_PARTS:
            del self.parts[next(iter(self.parts))]

    def whole(self, peer: Peer, last: Fields) -> Fields:
        """Return the READY whose last part this is. Raises ProtocolError if a part is missing."""
        _, parts = self.parts.pop(peer, (0.0, []))
        parts = [part for part in parts if part["join"] == last["join"]]
        if len(parts) != last.get("parts", 0):
            raise ProtocolError("READY without its other parts: join again")
        return dict(last, **{key: [row for part in (*parts, last) for row in part.get(key, ())]
                             for key in TASK_LISTS})

    def forget(self, peer: Peer) -> None:
        self.parts.pop(peer, None)

    def expire(self, now: Seconds) -> None:
        for peer in [peer for peer, (until, _) in self.parts.items() if until <= now]:
            del self.parts[peer]

    def deadline(self) -> Seconds:
        return next((until for until, _ in self.parts.values()), math.inf)


class Membership(Dispatcher):
    """The clients and workers of a broker. It calls the Dispatcher, and Broker calls both."""

    def __init__(self, name: str, times: Times = Times(), chained: bool = False,
                 now: Seconds = 0.0) -> None:
        super().__init__(name, times, chained, now)
        self.limit = AnswerLimit()
        self.partial = PartialReadys(times.worker_expiry)
        self.greeted: Dict[Tuple[str, Peer], int] = {}  # the last beat of peers that wait for OK
        self.viewers: Dict[Peer, None] = {}  # peers that wait for STATUS
        self.answer_at: Seconds = math.inf  # when they get it
        self.had_slots = False  # as last sent to clients

    def heard(self, link: str, peer: Peer) -> None:
        self.registry.heard(link, peer, self.now)
        if link == BROKER:
            self.upstream.session.heard(self.now)

    def say(self, link: str, peer: Peer, token: Run, verb: str,
            fields: Optional[Fields] = None) -> None:
        """The same, but plain and unknown peers get a limited number of answers."""
        if verb in ("OK", "ERROR", "WHO") and not self.knows_batches(link, peer):
            worker = self.registry.workers.get(peer) if link == WORKERS else None
            if self.limit.exceeded(verb, link, peer, self.now) or worker and worker.no_answers:
                return
        super().say(link, peer, token, verb, fields)

    def complain(self, link: str, peer: Peer, token: Run, line: bytes, reason: str) -> None:
        """The same. An ERROR to a plain worker has no token, so that its answer has none."""
        worker = self.registry.workers.get(peer) if link == WORKERS else None
        if link == WORKERS and worker is None:
            token = ""
        elif worker is not None and worker.plain:
            worker.no_answers |= line.startswith(TAKEN_FOR_COMMANDS)
            if line.startswith(b"RESULT"):
                self.release_by_token(worker, token)
            for task in list(worker.tasks.values()) if line.startswith(b"RESULT") else ():
                if token == token_of(task.key):
                    self.deliver(task, worker, {
                        "exitcode": NOT_RUN, "time": 0.0, "ran": True,
                        "reason": f"its result cannot be read: {reason}"}, line)
                    self.limit.forgive("OK", WORKERS, peer)
            token = ""
        super().complain(link, peer, token, line, reason)

    def knows_batches(self, link: str, peer: Peer) -> bool:
        if link == CLIENTS:
            return not self.registry.run_of.get(peer, PLAIN).startswith(PLAIN)
        worker = self.registry.workers.get(peer)
        return link == BROKER or worker is not None and not worker.plain

    # --- clients

    def on_hello(self, message: Message) -> None:
        run, peer = message.fields["run"], message.peer
        if not run.isalnum():  # the run of a plain client has a dot
            raise ProtocolError("HELLO wants 'run' to be letters and digits")
        known = self.registry.client_at(peer)
        if "join" in message.fields:
            if known is not None and known.run != run:
                raise ProtocolError("HELLO from a peer that is another run already")
            self.join_client(run, message, known is None)
        elif known is None or known.run != run:
            self.say(CLIENTS, peer, "", "WHO")
        else:
            known.backlog = message.fields.get("backlog", 0)
            self.answer_soon(CLIENTS, peer, message.fields.get("beat", 0))

    def join_client(self, run: Run, message: Message, is_new: bool) -> None:
        """A client has told all that it wants: drop the rest."""
        peer, fields = message.peer, message.fields
        if not run.startswith(self.registry.fingerprint_of(CLIENTS, peer)):
            raise ProtocolError(
                "this run belongs to another key: it begins with our fingerprint")
        before = self.registry.clients.get(run)
        if fields["join"] <= (before.join if before else 0):  # delayed on an older connection
            return
        client = self.registry.require_client(run, False, peer, self.now)
        was_known = client.join > 0
        client.join, client.backlog = fields["join"], fields.get("backlog", 0)
        client.host, client.pid = fields.get("host", ""), fields.get("pid", 0)
        if not was_known:
            self.claim_locks(client)
        client.stops = fields.get("stops", False)
        self.registry.connect_client(client, peer)
        if is_new:
            self.log(logging.INFO, f"client {printable(client.host)} joined")
        wanted = set(fields.get("unreported", ()))
        self.drop([task for id, task in client.tasks.items() if id not in wanted])
        client.announced = wanted.difference(client.tasks)
        client.lost = {id: row for id, row in client.lost.items() if id in wanted}
        self.say(CLIENTS, peer, "", "OK", dict(self.state_for_client(), join=client.join))
        self.tell_stop(client)

    def tell_stop(self, client: ClientRecord) -> None:
        """Tell a client that its run must stop, if it must, and the client is there."""
        by = self.registry.stopped.get(client.run)
        if by is not None and client.peer is not None:
            self.say(CLIENTS, client.peer, "", "STOP", {"by": by})

    def claim_locks(self, client: ClientRecord) -> None:
        """A client has joined. Workers may have spoken of it before: until now its tasks counted as
        those of the broker above."""
        locks, own = self.scheduler.locks, (client.run, "")
        held = [(key, lock, worker) for worker in (*self.scheduler.workers, *self.scheduler.away)
                for key, lock in worker.locks.items() if key[0] == client.run]
        for key, lock, worker in held:
            locks.hold(lock, key, worker, client)
        if held:  # it gets a READY without them
            self.upstream.session.join_again(self.now)
        if client.join > 1 and not locks.is_open and own not in locks.holders:
            locks.doubted.add(own)  # it was the client of a broker before us

    def on_client_bye(self, message: Message) -> None:
        client = self.registry.client_at(message.peer)
        if client is not None:
            self.forget_client(client, "left")

    def forget_client(self, client: ClientRecord, why: str) -> None:
        """The run is over: stop its tasks and drop every trace of it."""
        self.release_workspaces(client)
        self.drop(list(client.tasks.values()))
        self.scheduler.remove_client(client)
        self.registry.remove_client(client, self.now)
        if not client.from_above:
            self.log(logging.INFO, f"client {why}")

    def release_workspaces(self, client: ClientRecord) -> None:
        """Let workers release their workspaces of this run (CANCEL without tasks)."""
        for peer, worker in self.registry.workers.items():
            if worker.name in client.workspaces:
                worker.set_prepared(client, False)
                self.say(WORKERS, peer, client.run, "CANCEL")
        client.workspaces.clear()

    # --- workers

    def on_ready(self, message: Message) -> None:
        peer, fields = message.peer, message.fields
        worker = self.registry.workers.get(peer)
        if "name" not in fields:
            self.on_plain_ready(message, worker)
        elif fields.get("more"):
            self.partial.add(peer, fields, self.now)
        elif self.name in fields.get("below", ()):
            if not self.upstream.chained:
                raise ProtocolError("we cannot be below you: we have no broker above us")
            # it does not join; if it is really above us, this answer tells it so
            self.say(WORKERS, peer, "", "OK", self.state_for_worker())
        elif fields.get("depth", 0) + len(self.upstream.above) + 1 > MAX_DEPTH:
            raise ProtocolError(f"chain of more than {MAX_DEPTH} brokers")
        elif "join" in fields:
            self.join_worker(message)
        elif worker is None or worker.name != fields["name"]:
            self.say(WORKERS, peer, "", "WHO")
        else:
            self.update_worker(worker, fields)
            self.answer_soon(WORKERS, peer, fields.get("beat", 0))

    def on_plain_ready(self, message: Message, worker: Optional[WorkerRecord]) -> None:
        if worker is None:
            worker = self.registry.add_plain_worker(message.peer, self.now)
            self.scheduler.add_worker(worker)
            self.log(logging.INFO, f"plain worker {worker.name} joined")
        elif not worker.plain:
            raise ProtocolError("READY needs the name given before")
        worker.weight = message.fields.get("weight", worker.weight)
        worker.silent = False
        for task in [task for task in worker.tasks.values() if task.state == RUNNING]:
            self.release_lock(worker, task.key)
            self.lose(task, f"worker {printable(worker.name)} said READY instead of its result",
                      CRASH)
        if not worker.tasks:  # else it has not seen its command yet
            worker.ready = True
        self.scheduler.rank(worker)
        self.say(WORKERS, message.peer, "", "OK")

    def update_worker(self, worker: WorkerRecord, fields: Fields) -> None:
        worker.below = fields.get("below", worker.below)
        worker.depth = fields.get("depth", worker.depth)
        worker.load = fields.get("load", worker.load)
        worker.cache = fields.get("cache", worker.cache)
        worker.labels = frozenset(fields["labels"]) if "labels" in fields else worker.labels
        slots, weight = fields.get("slots", worker.slots), fields.get("weight", worker.weight)
        capacity = widest = {(worker.host, worker.labels): slots}
        if "crew" in fields:
            hidden = KNOWN_BY_LABEL.keys() - worker.labels  # an older broker does not pass them on
            crew = fields["crew"]
            capacity, widest = (
                {(host, frozenset(labels) - hidden): n for host, n, *labels in rows}
                for rows in (crew, fields.get("widest") or crew))
        self.scheduler.change_worker(worker, slots, weight, capacity, widest)

    def join_worker(self, message: Message) -> None:
        """A worker has told all that it has: make our records match."""
        peer, name, join = message.peer, message.fields["name"], message.fields["join"]
        known = self.registry.workers.get(peer)
        if known is not None and (known.plain or known.name != name):
            raise ProtocolError("READY with a name other than before")
        if not name.endswith(self.registry.fingerprint_of(WORKERS, peer)):
            raise ProtocolError("this name belongs to another key: it ends with our fingerprint")
        worker = self.registry.named.get(name)
        if worker is not None and join <= worker.join:  # delayed on an older connection
            return
        fields = self.partial.whole(peer, message.fields)
        if worker is None:
            worker = self.registry.add_worker(name, fields.get("host") or name)
            self.log(logging.INFO, f"worker {printable(name)} joined")
        worker.join, worker.user = join, fields.get("user", "")
        self.registry.connect_worker(worker, peer, self.now)
        self.scheduler.add_worker(worker)
        self.scheduler.forget_wants(worker)
        self.update_worker(worker, fields)
        for client in self.registry.clients.values() if worker.below else ():
            self.tell_excluded(client, [worker])
        unwanted, recall, resend = self.reconcile(worker, fields)
        for run, tasks in unwanted.items():  # before OK lets it start them
            self.say(WORKERS, peer, run, "CANCEL", {"tasks": tasks})
        self.instruct(recall)
        note = self.note_of_others(worker) if join == 1 else ""  # not at each new broker
        self.say(WORKERS, peer, "", "OK", dict(
            self.state_for_worker(), join=join, note=note, host=worker.host))
        for run, tasks in unwanted.items() if worker.below else ():
            # in between, its own workers may have told it of these
            self.say(WORKERS, peer, run, "CANCEL", {"tasks": tasks})
        self.instruct(resend)

    def note_of_others(self, worker: WorkerRecord) -> str:
        """Return a line for a worker whose user has other workers on the same host, or ""."""
        others = self.registry.others_of_user(worker)
        if not others:
            return ""
        slots = plural(sum(other.slots for other in others), "slot")
        host = printable(worker.host.partition("/")[0])
        note = (f"{printable(worker.user)} runs {plural(len(others), 'other worker')} on {host} "
                f"already, with {slots} ({printable(others[0].name)}): stop what is not wanted, or "
                f"they share its CPUs")
        self.log(logging.WARNING, f"worker {printable(worker.name)}: {note}")
        return note

    def on_worker_bye(self, message: Message) -> None:
        worker = self.registry.workers.get(message.peer)
        if worker is not None:
            self.forget_worker(worker, "left", "")

    def forget_worker(self, worker: WorkerRecord, why: str, fault: str) -> None:
        """The worker will not come back: its tasks are lost."""
        self.scheduler.remove_worker(worker)
        for key in [*worker.locks]:
            self.release_lock(worker, key)
        self.registry.remove_worker(worker)
        self.log(logging.INFO, f"worker {printable(worker.name)} {why}")
        for task in list(worker.tasks.values()):
            self.lose(task, f"worker {printable(worker.name)} {why}",
                      fault if task.state in BUSY else "")  # it may have died before QUEUED

    # --- answers

    def answer_soon(self, link: str, peer: Peer, beat: int = 0) -> None:
        """Say OK to a peer, but not at once: one wake-up serves many."""
        self.greeted[link, peer] = beat or self.greeted.get((link, peer), 0)
        self.answer_at = min(self.answer_at, self.now + OK_DELAY)

    def answer_greetings(self) -> None:
        greeted, self.greeted, self.answer_at = self.greeted, {}, math.inf
        lines = {CLIENTS: encode("OK", self.state_for_client()),
                 WORKERS: encode("OK", self.state_for_worker())}
        for (link, peer), beat in greeted.items():
            line, client = lines[link], self.registry.client_at(peer)
            unmet = self.unmet_needs(client) if link == CLIENTS and client is not None else None
            if unmet:
                line = encode("OK", dict(self.state_for_client(), **unmet))
            self.send_line(link, peer, "", b'%s,"beat":%d}' % (line[:-1], beat))
        viewers, self.viewers = self.viewers, {}
        status = encode("STATUS", self.status()) if viewers else b""
        for peer in viewers:
            self.send_line(CLIENTS, peer, "", status)

    def announce_capacity(self) -> None:
        """Slots, weights or labels have changed: tell the broker above, and clients if the first
        slot has come or the last has gone."""
        self.upstream.report_changes()
        has_slots = self.scheduler.slots > 0
        if self.had_slots != has_slots:
            self.had_slots = has_slots
            for peer, run in self.registry.run_of.items():
                if not run.startswith(PLAIN):
                    self.say(CLIENTS, peer, "", "OK", self.state_for_client())

    def state_of_cloud(self) -> Fields:
        return {"broker": self.name, "workers": len(self.registry.workers),
                "slots": self.scheduler.slots, "patience": self.times.client_lease,
                "resources": not self.upstream.chained or self.upstream.knows_locks}

    def state_for_client(self) -> Fields:
        return dict(self.state_of_cloud(), hosts=len(self.scheduler.places()), trees=True)

    def unmet_needs(self, client: ClientRecord) -> Fields:
        """Return fields of OK about what the client's commands lack, wait for, or cannot use."""
        unfit = [host for host, places in sorted(self.scheduler.places().items())
                 if not all(client.needs <= place.labels for place in places)
                 ][:MAX_UNFIT] if client.needs else []
        waits = [why for why in self.waits(client)
                 if not why.startswith(("a free slot", "a worker", "a workspace"))]
        return {name: value for name, value in (
            ("lacks", self.lacks(client)), ("unfit", unfit),
            ("waits_for", "; ".join(waits[:MAX_REASONS]))) if value}

    def state_for_worker(self) -> Fields:
        return dict(self.state_of_cloud(), above=[self.name] + self.upstream.above,
                    patience=min(self.times.worker_expiry, self.times.queued_timeout))

    def on_status(self, message: Message) -> None:
        """Tell the status soon, once for all peers that ask meanwhile: it is large."""
        if not self.limit.exceeded("STATUS", CLIENTS, message.peer, self.now):
            self.viewers[message.peer] = None
            self.answer_at = min(self.answer_at, self.now + OK_DELAY)

    def status(self) -> Fields:
        """Return the fields of STATUS. It tells no commands and no names of runs."""
        registry = self.registry
        workers = [*registry.named.values(), *(w for w in registry.workers.values() if w.plain)]
        queued = Counter(task.client for worker in workers for task in worker.queued())
        return {"broker": self.name, "above": self.upstream.above,
                "workers": [worker_status(worker, self.now - registry.workers_seen[worker])
                            for worker in workers],
                "clients": [client_status(client, queued[client], self.waited_for(client))
                            for client in registry.clients.values()]}

    def waited_for(self, client: ClientRecord) -> str:
        """Return what keeps the waiting tasks of a client from running."""
        if client.owed >= CREDIT:
            return "itself: it does not take its results"
        waits = self.waits(client)[:MAX_REASONS] or ["a workspace with its tree"]
        return waits[0] if waits == ["a worker"] else self.lacks(client) or "; ".join(waits)

    def waits(self, client: ClientRecord) -> List[str]:
        """Return what the client's waiting tasks wait for, each once."""
        lanes = itertools.islice(client.waiting(), MAX_LANES)
        return [*dict.fromkeys(self.wait_of(lane) for lane in lanes)]

    def wait_of(self, lane: Lane) -> str:
        client, needs, locks = lane.client, lane.constraints.needs, self.scheduler.locks
        labels = needs - KNOWN_BY_LABEL.keys()
        if lane.lock is not None and lane in locks.parked.get(lane.lock, ()):
            return locks.words(lane.lock)
        if client.start_at > self.now:
            return "the time of its next start (--delay)"
        if lane.constraints.slots > 1:
            return f"{lane.constraints.slots} slots on one worker"
        if not self.scheduler.slots and not labels:
            return "a worker"
        if TREES in needs and not client.prepared:
            return "a workspace with its tree"
        return "a free slot" + (f" with {label_words(labels)}" if labels else "")

    def lacks(self, client: ClientRecord) -> str:
        """Return the worker that tasks of a client lack, in words; "" if they lack none."""
        for task in client.first_of_each():
            needs, slots = task.constraints.needs, task.slots
            if task.constraints is UNCONSTRAINED or self.scheduler.has_labels(needs, slots):
                continue
            what = [*([label_words(needs)] if needs - {RESOURCES} or slots == 1 else []),
                    *([f"{slots} slots"] if slots > 1 else [])]
            busy = " that takes something new" if slots == 1 and self.scheduler.has_labels(
                needs) else ""
            return f"a worker with {' and '.join(what)}{busy}" if needs or slots > 1 else ""
        return ""

    # --- connections: identified, revoked, closed

    def identified(self, link: str, peer: Peer, key: str, own: bool = False) -> None:
        self.registry.identified(link, peer, key, own)

    def revoked(self, link: str, peer: Peer, now: Seconds) -> None:
        self.now = now
        why = "has no valid key any more"
        client, worker = self.registry.client_at(peer), self.registry.workers.get(peer)
        if link == CLIENTS and client is not None:
            self.forget_client(client, why)
        elif link == WORKERS and worker is not None:
            self.forget_worker(worker, why, "")
        self.settle()

    def disconnected(self, link: str, peer: Peer, now: Seconds) -> None:
        self.now = now
        self.registry.forget_key(link, peer)
        if link == BROKER:
            self.upstream.session.disconnected()
        elif link == CLIENTS and peer in self.registry.run_of:
            client = self.registry.disconnect_client(peer)
            if client.plain:
                self.forget_client(client, "left")
        elif link == WORKERS:
            self.partial.forget(peer)
            worker = self.registry.workers.get(peer)
            if worker is not None and worker.plain:
                self.forget_worker(worker, "is gone", CRASH)
            elif worker is not None:
                self.scheduler.suspend_worker(worker)
                self.registry.disconnect_worker(worker, now)
        self.settle()

    # --- silence

    def expire_silent(self) -> None:
        """Forget workers and clients that have been silent for too long."""
        registry, silence = self.registry, "has been silent for too long"
        for worker in registry.silent_workers(self.now):
            if worker.plain and (worker.tasks or worker.ready):
                worker.silent = True  # it cannot speak while it runs, or says READY only once
                self.scheduler.rank(worker)
                registry.see(registry.workers_seen, worker, self.now)
            else:
                self.forget_worker(worker, silence, CRASH)
        for client in registry.silent_clients(self.now):
            above = client.from_above and client.tasks \
                and self.upstream.session.heard_at + self.times.client_lease > self.now
            if above or (client.plain and client.peer is not None):  # these have no heartbeat
                registry.see(registry.clients_seen, client, self.now)
            else:
                self.forget_client(client, silence)


def worker_status(worker: WorkerRecord, silent: Seconds) -> Fields:
    """Return a worker's row of STATUS."""
    states = Counter(task.state for task in worker.tasks.values())
    labels = {name[:STATUS_LIMIT] for _, labels in worker.capacity
              for name in labels - KNOWN_BY_LABEL.keys()}
    return {"name": worker.name[:STATUS_LIMIT], "host": worker.host[:STATUS_LIMIT],
            "kind": "broker" if worker.below else "plain" if worker.plain else "worker",
            "below": worker.below, "slots": worker.slots, "labels": sorted(labels)[:STATUS_LIMIT],
            "running": len(worker.running()), "held": states[DELIVERED], "done": worker.done,
            "failed": worker.failed, "weight": worker.weight, "load": worker.load,
            "there": worker.peer is not None, "silent": round(silent, 1), "cache": worker.cache}


def client_status(client: ClientRecord, queued: int, waits_for: str) -> Fields:
    """Return a client's row of STATUS. So many of its tasks wait at workers for a slot."""
    states = Counter(task.state for task in client.tasks.values())
    if not states[WAITING] and not any(task.preparing for task in client.tasks.values()):
        waits_for = "" if not states[RECOVERING] else \
            "workers that may have them since before the broker's start"
    return {"host": client.shown_host, "pid": client.pid,
            "kind": "above" if client.from_above else "plain" if client.plain else "client",
            "there": client.peer is not None,
            "queued": states[WAITING] + states[RECOVERING] + client.backlog + queued,
            "running": states[ASSIGNED] + states[RUNNING] - queued, "held": states[DELIVERED],
            "done": client.done, "failed": client.failed, "waits_for": waits_for}


# === Broker ===========================================================================
#
# The protocol of commands and answers: one handler for each message, and the machine's clock.


class Broker(Membership):
    """The whole broker. Its links are CLIENTS, WORKERS and, if it is chained, BROKER."""

    # --- from clients and from the broker above

    def client_of(self, message: Message) -> Optional[ClientRecord]:
        """Return the client that said this. An unknown peer is asked to join (WHO)."""
        if message.link == BROKER:
            if message.token not in self.registry.clients and message.verb not in (COMMAND, "SHUN"):
                return None
            require_run(message.token)
            run = self.registry.require_client(message.token, True, b"", self.now)
            return run if run.from_above else None
        client = self.registry.client_at(message.peer)
        if client is None:
            self.say(CLIENTS, message.peer, "", "WHO")
        return client

    def asked_for(self, message: Message, rows: List[List[int]]) -> List[Task]:
        """Return the tasks of these [id, attempt] that we have. The broker above gets LOST for the
        others; a client needs no answer, because it owns its commands."""
        client = self.client_of(message)
        found = self.tasks_of(client, rows) if client else []
        if message.link == BROKER and len(found) < len(rows):
            self.upstream.disown(message.token, rows, found)
        return found

    def on_command(self, message: Message) -> None:
        if message.link == CLIENTS and message.peer not in self.registry.run_of:
            if "id" in message.fields:
                self.say(CLIENTS, message.peer, "", "WHO")
                return
            self.registry.add_plain_client(message.peer, self.name, self.now)
            self.log(logging.INFO, f"plain client {printable(message.peer)} joined")
        client = self.client_of(message)
        if client is None:
            return
        if len(message.line) > MAX_COMMAND:
            raise ProtocolError(f"a command is at most {MAX_COMMAND} bytes of JSON")
        if client.plain:
            client.last_id += 1
            task = Task(client, client.last_id, 1, message.line)
            task.plain = {k: v for k, v in message.fields.items() if k in ("cmd", "cwd")}
            self.queue(task)
        elif "id" not in message.fields or "attempt" not in message.fields:
            raise ProtocolError("a command needs 'id' and 'attempt'")
        elif self.check_news(client, message.fields):
            task = self.submit(client, message)
            if task.constraints is not UNCONSTRAINED:
                self.note_needs(client, task.constraints)

    def note_needs(self, client: ClientRecord, constraints: Constraints) -> None:
        needs = constraints.needs, constraints.slots
        if needs != client.last_needs:
            client.needs |= needs[0] & KNOWN_BY_LABEL.keys()
            client.last_needs = needs
            if not client.from_above and client.peer is not None:
                self.answer_soon(CLIENTS, client.peer)  # OK reports missing labels

    def on_shun(self, message: Message) -> None:
        client = self.client_of(message)
        if client is not None:
            client.excluded = frozenset(message.fields["hosts"])
            self.tell_excluded(client, [w for w in self.registry.workers.values() if w.below])

    def on_done(self, message: Message) -> None:
        client = self.client_of(message)
        if client is not None:
            self.drop(self.tasks_of(client, message.fields["tasks"]))
            for id, attempt in message.fields["tasks"]:
                client.announced.discard(id)
                if not client.from_above and client.lost.get(id, (math.inf,))[0] <= attempt:
                    del client.lost[id]

    def on_cancel(self, message: Message) -> None:
        """Stop these tasks, or all of the run. Each is answered with LOST when it has stopped."""
        client = self.client_of(message)
        rows = message.fields.get("tasks")
        if rows is None:
            tasks = list(client.tasks.values()) if client and not client.plain else []
            if client is not None and client.from_above:  # its client has gone
                self.release_workspaces(client)
        else:
            tasks = self.asked_for(message, rows)
        stops = []
        for task in tasks:
            worker = task.worker
            if task.state in BUSY and worker and worker.peer is not None and not worker.plain:
                stops.append(("CANCEL", task))
            else:
                if worker is not None:  # what it says when it is back does not count
                    task.client.lost[task.id] = (task.attempt, "")
                self.say_lost(task.client, task.id, task.attempt, "cancelled",
                              may_run=worker is not None and task.key in worker.locks)
                self.drop([task])
        self.instruct(stops)

    def on_stop(self, message: Message) -> None:
        """Stop a client's run for another client (testcloud.py cancel), and answer."""
        registry, fields = self.registry, message.fields
        pid, host, by = fields.get("pid", 0), fields.get("host", ""), fields.get("by", "")
        if not pid or not host:
            raise ProtocolError("STOP needs 'pid' and 'host'")
        found = [client for client in registry.clients.values()
                 if (client.pid, client.shown_host) == (pid, host)]
        allowed = [client for client in found if registry.may_stop(client, message.peer)]
        why, away = self.why_not_stopped(found, allowed), False
        if not why:
            client = allowed[0]
            self.log(logging.INFO, f"client {pid}@{printable(host)} is stopped by {printable(by)}")
            registry.stop(client, by[:STATUS_LIMIT])
            self.tell_stop(client)
            away = client.peer is None
        self.say(CLIENTS, message.peer, "", "STOP", {"why": why, "away": away})

    def why_not_stopped(self, found: List[ClientRecord], allowed: List[ClientRecord]) -> str:
        """Return why no client can be stopped, of those with a name, and what to do; or ""."""
        if not found:
            above = any(client.from_above for client in self.registry.clients.values())
            return "there is no such client (see: testcloud.py status)" + (
                "; clients of the broker above are stopped there" if above else "")
        if not allowed:
            return "it has another key: stop it with that key, or with the cloud's own"
        there = "on its own machine"
        if len(allowed) > 1:
            return f"there are {len(allowed)} clients with this name: stop the right one {there}"
        return "" if allowed[0].stops else f"it is too old to be told: stop it {there}"

    def on_fetch(self, message: Message) -> None:
        row = [message.fields["id"], message.fields["attempt"]]
        for task in self.asked_for(message, [row]):
            worker = task.worker
            if task.state != ASSIGNED and worker and worker.peer is not None and not worker.plain:
                self.send_line(WORKERS, worker.peer, task.client.run, message.line)

    def on_tree_chunk(self, message: Message) -> None:
        """Pass a part of a tree on to the worker that has this very task of the sender."""
        if "tree" not in message.fields:
            raise ProtocolError("a CHUNK to a worker needs 'tree'")
        row = [message.fields["id"], message.fields["attempt"]]
        for task in self.asked_for(message, [row]):
            worker, client = task.worker, task.client
            if task.state in BUSY and worker and worker.peer is not None \
                    and not worker.plain and not client.plain:
                self.bulk.append(Outgoing(
                    WORKERS, worker.peer, client.run, message.line, message.data))

    def on_resend(self, message: Message) -> None:
        for task in self.asked_for(message, message.fields["tasks"]):
            self.remind(task)

    def on_recall(self, message: Message) -> None:
        for task in self.asked_for(message, message.fields["tasks"]):
            if task.state == WAITING:
                self.lose(task, RECALLED, told=True)
            elif task.state in BUSY:
                self.instruct([("RECALL", task)])

    # --- from workers

    def worker_of(self, message: Message) -> Optional[WorkerRecord]:
        """Return the worker that said this. An unknown peer is asked to join (WHO)."""
        worker = self.registry.workers.get(message.peer)
        if worker is None and not {"id", "tasks"} & set(message.fields):
            raise ProtocolError("say READY first")
        if worker is None:
            self.say(WORKERS, message.peer, "", "WHO")
        return worker

    def tasks_at(self, worker: WorkerRecord, message: Message) -> List[Task]:
        """Return the tasks of this worker that the message is about. Tasks that it does not have
        (any more) are left out: an old attempt changes nothing."""
        if worker.plain:
            tasks = [task for task in worker.tasks.values() if token_of(task.key) == message.token]
            if not tasks:
                raise ProtocolError("not the token of a command that you have")
            return tasks
        fields, token, tasks_by_key = message.fields, message.token, worker.tasks
        rows = fields.get("tasks")
        if rows is None:
            if "id" not in fields or "attempt" not in fields:
                raise ProtocolError(f"{message.verb} needs 'id' and 'attempt'")
            found = tasks_by_key.get((token, fields["id"], fields["attempt"]))
            return [found] if found else []
        keys = {(token, id, attempt): None for id, attempt in rows}
        return [tasks_by_key[key] for key in keys if key in tasks_by_key]

    def on_queued(self, message: Message) -> None:
        worker = self.worker_of(message)
        if worker is None:
            return
        preparing, news = message.fields.get("preparing", ""), []
        if preparing not in ("", FILES, SETUP):
            raise ProtocolError(f"QUEUED wants 'preparing' to be {FILES} or {SETUP}")
        for task in self.tasks_at(worker, message):
            before = task.state, task.preparing
            if task.state == ASSIGNED:
                self.move(task, RUNNING, worker)
            if task.state == RUNNING and not task.client.plain:
                self.scheduler.prepare(task, preparing, self.now)
            if (task.state, task.preparing) != before:
                news.append(task)
        self.tell_queued(news, self.host_of(worker, message))

    def host_of(self, worker: WorkerRecord, message: Message) -> str:
        """Return the identity of the host that a message is about."""
        told: str = message.fields.get("host", "") if worker.below else ""
        return told or worker.host

    def on_result(self, message: Message) -> None:
        worker = self.worker_of(message)
        if worker is None:
            return
        fields = plain_workers_fields(message) if worker.plain else message.fields
        if worker.plain:
            self.release_by_token(worker, message.token)
        elif worker.locks:
            self.release_lock(worker, (
                message.token, fields.get("id", 0), fields.get("attempt", 0)))
        for task in self.tasks_at(worker, message):
            self.deliver(task, worker, fields, message.line)
            if worker.plain:  # it works, so its next READY is no storm
                self.limit.forgive("OK", WORKERS, message.peer)

    def on_chunk(self, message: Message) -> None:
        worker = self.worker_of(message)
        for task in self.tasks_at(worker, message) if worker is not None else ():
            client = task.client
            if client.peer is not None:
                token = client.run if client.from_above else ""
                self.bulk.append(
                    Outgoing(client.link, client.peer, token, message.line, message.data))

    def on_tree_fetch(self, message: Message) -> None:
        """Pass on a worker's request for a part of a tree, to the client of a task that it has."""
        worker = self.worker_of(message)
        if worker is not None and ("tree" not in message.fields or worker.plain):
            raise ProtocolError("a worker's FETCH needs 'tree', 'id' and 'attempt'")
        for task in self.tasks_at(worker, message) if worker is not None else ():
            if task.state in BUSY and not task.client.plain:
                self.tell_client(task.client, message.line)

    def on_lost(self, message: Message) -> None:
        worker, fields = self.worker_of(message), message.fields
        if worker is None:
            return
        fault, more = fields.get("fault", ""), {}
        if fault == UNFIT:
            more = {"host": self.host_of(worker, message),
                    "output": fields.get("output", "")[-INLINE:]}
        for id, attempt in () if fields.get("may_run") else fields["tasks"]:
            self.release_lock(worker, (message.token, id, attempt))
        for task in self.tasks_at(worker, message):
            elsewhere = fault == NOWHERE and self.scheduler.eligible(task) != frozenset()
            # there may be no other host below that broker, but elsewhere
            self.lose(task, printable(fields["why"], 500), "" if elsewhere else fault, True, more)
            more = {name: value for name, value in more.items() if name == "host"}

    # --- locks, between brokers

    def broker_below(self, message: Message) -> WorkerRecord:
        worker = self.worker_of(message)
        if worker is None or not worker.below or not message.fields["lock"]:
            raise ProtocolError(f"{message.verb} needs a lock of the cloud, from a broker below")
        return worker

    def on_lock_wanted(self, message: Message) -> None:
        """A broker below wants a lock for one of its clients, or has it already."""
        worker, locks = self.broker_below(message), self.scheduler.locks
        lock, by = ("", message.fields["lock"]), printable(message.fields.get("by", "?"), 200)
        if message.fields.get("has") or key_of_broker(lock) in worker.locks:
            locks.hold(lock, key_of_broker(lock), worker, by)
        else:
            locks.wanted.setdefault(lock, {})[worker] = by
            self.tell_holder(worker, lock)

    def on_unlock(self, message: Message) -> None:
        lock = ("", message.fields["lock"])
        self.release_lock(self.broker_below(message), key_of_broker(lock))

    def on_lock(self, message: Message) -> None:
        """The broker above has given us a lock, or says who has it."""
        lock, locks = ("", message.fields["lock"]), self.scheduler.locks
        by = printable(message.fields.get("by", ""), 200)
        if by and lock in locks.asked:
            locks.asked[lock] = by
            locks.news.add(lock)
        elif not by and locks.above is not None:
            locks.asked.pop(lock, None)
            locks.above.add(lock)
            self.scheduler.take_lock(lock)

    # --- from the broker above

    def accepts(self, link: str, verb: str) -> bool:
        return link != BROKER or self.upstream.chained and self.upstream.session.accepts(verb)

    def on_ok(self, message: Message) -> None:
        self.upstream.above = message.fields.get("above", [])
        if self.name in self.upstream.above:
            self.log(logging.ERROR, "this broker is chained to itself in a loop of brokers: "
                                    "correct --upstream")
            self.effects.append(Exit(WRONG_USAGE))
            return
        self.upstream.on_ok(message.fields)
        for client in self.registry.clients.values():
            if client.from_above:
                self.scheduler.take_turn(client)

    def on_who(self, message: Message) -> None:
        self.upstream.session.join_again(self.now)

    def connected(self, link: str, now: Seconds) -> None:
        self.now = now
        self.upstream.session.connected(now)
        self.settle()

    def refused(self, link: str, why: str, now: Seconds) -> None:
        self.now = now
        self.upstream.session.trouble = why
        self.settle()

    # --- time

    def settle(self) -> None:
        if self.answer_at <= self.now:
            self.answer_greetings()
        if self.limit.ends_at <= self.now:
            for peer in self.limit.restart():
                if peer in self.registry.workers:  # a plain one may be waiting for its OK
                    self.say(WORKERS, peer, "", "OK")
        if not self.scheduler.locks.is_open:
            self.open_locks()
        self.dispatch()
        if self.scheduler.waiting_news:
            self.tell_waiting()
        if self.scheduler.capacity_changed:
            self.scheduler.capacity_changed = False
            self.announce_capacity()
        self.report_wait(self.upstream.wait_reason())

    def tell_waiting(self) -> None:
        """Tell clients soon that their tasks wait for a lock or several slots: later OKs tell it
        every READY interval."""
        news, self.scheduler.waiting_news = self.scheduler.waiting_news, set()
        for client in news:
            if isinstance(client, ClientRecord) and not client.told_wait \
                    and client.peer is not None and not client.from_above and not client.plain:
                client.told_wait = True
                self.answer_soon(CLIENTS, client.peer)

    def tick(self, now: Seconds) -> None:
        self.now = now
        self.expire_silent()
        for worker in self.registry.overdue_workers(now):
            self.forget_worker(worker, "is gone", CRASH)
        self.partial.expire(now)
        self.expire_tasks()
        self.upstream.session.tick(now)
        self.settle()

    def paused(self, gap: Seconds, now: Seconds) -> None:
        self.now = now
        self.shift_deadlines(gap, self.registry.paused(gap, now))
        self.upstream.session.paused(gap, now)

    def deadline(self) -> Seconds:
        return min(self.recovery_at, self.answer_at, self.limit.ends_at, self.partial.deadline(),
                   next(iter(self.unconfirmed.values()), math.inf), self.registry.deadline(),
                   self.scheduler.deadline(), self.wait.deadline(),
                   math.inf if self.scheduler.locks.is_open
                   else self.started + self.times.worker_expiry,
                   self.upstream.session.next_greeting)

    HANDLERS = {
        (CLIENTS, "HELLO"): "on_hello", (CLIENTS, COMMAND): "on_command",
        (CLIENTS, "DONE"): "on_done", (CLIENTS, "CANCEL"): "on_cancel",
        (CLIENTS, "FETCH"): "on_fetch", (CLIENTS, "BYE"): "on_client_bye",
        (CLIENTS, "SHUN"): "on_shun", (BROKER, "SHUN"): "on_shun",
        (CLIENTS, "CHUNK"): "on_tree_chunk", (BROKER, "CHUNK"): "on_tree_chunk",
        (CLIENTS, "RECALL"): "on_recall",
        (CLIENTS, "STATUS"): "on_status", (CLIENTS, "STOP"): "on_stop",
        (CLIENTS, "ERROR"): "on_error",
        (WORKERS, "READY"): "on_ready", (WORKERS, "QUEUED"): "on_queued",
        (WORKERS, "RESULT"): "on_result", (WORKERS, "LOST"): "on_lost",
        (WORKERS, "CHUNK"): "on_chunk", (WORKERS, "FETCH"): "on_tree_fetch",
        (WORKERS, "BYE"): "on_worker_bye",
        (WORKERS, "LOCK"): "on_lock_wanted", (WORKERS, "UNLOCK"): "on_unlock",
        (BROKER, "LOCK"): "on_lock",
        (WORKERS, "ERROR"): "on_error",
        (BROKER, "OK"): "on_ok", (BROKER, "WHO"): "on_who", (BROKER, COMMAND): "on_command",
        (BROKER, "DONE"): "on_done", (BROKER, "CANCEL"): "on_cancel",
        (BROKER, "FETCH"): "on_fetch", (BROKER, "RESEND"): "on_resend",
        (BROKER, "RECALL"): "on_recall", (BROKER, "ERROR"): "on_error",
    }


NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte


def cut_output(output: bytes, size: int) -> str:
    """Return as text what a plain client gets of an output: at most PLAIN_INLINE bytes, whole
    characters, and a mark if that is not all. `size` counts all bytes, `output` has the first."""
    size = max(size, len(output))
    if len(output) == size <= PLAIN_INLINE + 100:  # as much as a mark, which may be there already
        return to_text(output)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(output[:PLAIN_INLINE])
    kept = min(len(output), PLAIN_INLINE) - len(decoder.getstate()[0])
    return to_text(output[:kept]) + cut_mark(kept, size)


def plain_workers_fields(message: Message) -> Fields:
    """Return the fields that we pass on of a plain worker's RESULT, with bounded output."""
    fields = message.fields
    stdout = NO_BYTE.sub("\ufffd", fields.get("stdout", ""))
    if len(message.line) > MAX_RESULT:
        stdout = cut_output(to_bytes(stdout), 0)
    return {"exitcode": fields["exitcode"], "time": fields.get("time", 0.0), "stdout": stdout}


def plain_result(task: Task, fields: Fields) -> Fields:
    """Return a RESULT as plain clients know it, from that of any worker."""
    stdout = cut_output(to_bytes(fields.get("stdout", "")), fields.get("size", 0))
    if fields.get("reason"):
        stdout += f"testcloud: {fields['reason']}\n"
    return {"cmd": task.plain["cmd"], "exitcode": fields["exitcode"], "stdout": in_utf8(stdout),
            "time": fields.get("time", 0.0)}


# === Worker ===========================================================================
#
# The worker's bookkeeping: the commands that it has accepted, those that run, and the
# results that it holds until their client has them. A worker accepts each command when it
# arrives (QUEUED) and gives it to the Runner, which starts it when a slot is free and the
# worker has a lease. Start, Recall and Kill are orders to the Runner. The Runner's events
# come in as started(), printed() and finished().

SH = "/bin/sh"  # runs commands, without --shell
NOT_RUN = 126  # exit code of a command that could not be started, as in sh
TIMED_OUT = 124  # exit code of a command that ran longer than its timeout, as in timeout(1)
LOAD_HYSTERESIS = 0.9  # of --max-load: an overloaded worker takes commands again below this;
#   with --memfree it must have so much more
WORKER_STOPPED = "its worker was stopped"
RECALLED = "it waited for a slot"


class Start(NamedTuple):
    """Effect: put this command into the Runner's queue."""

    job: Job


class StartSetup(NamedTuple):
    """Effect: start this command at once. It takes no slot."""

    job: Job


class Recall(NamedTuple):
    """Effect: take this command out of the queue, unless it was started."""

    job: Job


class Kill(NamedTuple):
    """Effect: take this command out of the queue, or send it SIGTERM; SIGKILL if hard."""

    job: Job
    hard: bool


class FindTree(NamedTuple):
    """Effect: take a free workspace that has this tree, for a run."""

    run: Run
    id: str


class FillTree(NamedTuple):
    """Effect: let the run's workspace get the tree of this manifest."""

    run: Run
    manifest: bytes


class PutTree(NamedTuple):
    """Effect: store the contents of these spans of the tree's stream."""

    run: Run
    spans: List[Span]
    data: Any  # a buffer


class EndSetup(NamedTuple):
    """Effect: note that the setup has passed in the run's workspace."""

    run: Run


class ReleaseTree(NamedTuple):
    """Effect: the run needs its workspace no more."""

    run: Run


TreeStep = Union[FindTree, FillTree, PutTree, EndSetup]


PIECE_HEADER = struct.Struct("!BI")  # before each piece of a split output: stream, size


class Output:
    """Output of a command, in memory or in an unlinked file.

    One thread may write while another reads: tempfile.SpooledTemporaryFile does not allow that."""

    def __init__(self, limit: int = 0, split: bool = False) -> None:
        self.limit = limit or sys.maxsize  # bytes; the rest is counted and dropped
        self.split = split  # store pieces of stdout (1) and stderr (2), each with its header
        self.kept = 0  # bytes of the command's output that are stored
        self.dropped = 0  # bytes beyond the limit
        self.failure = ""  # why the rest could not be stored
        self.size = 0  # bytes of it, with headers and the mark at the end
        self.total = 0  # bytes stored: returned files follow the output
        self.head = bytearray()  # the whole output, until there is a file
        self.file: Optional[IO[bytes]] = None

    def write(self, data: bytes, stream: int = 1) -> None:
        """Append data. An error sets `failure`; after it nothing is stored."""
        room = max(0, self.limit - self.kept)
        self.dropped += max(0, len(data) - room)
        self.store(data[:room], stream)

    def end(self) -> None:
        """Append a mark if data was dropped. Call this after the last write()."""
        if self.dropped:
            self.store(to_bytes(cut_mark(self.kept, self.kept + self.dropped)), 1)

    def store(self, data: bytes, stream: int) -> None:
        if not data or self.failure:
            return
        try:
            self.append(PIECE_HEADER.pack(stream, len(data)) + data if self.split else data)
        except OSError as error:
            self.failure = error.strerror or "error"
        else:
            self.size = self.total
            self.kept += len(data)

    def append(self, data: bytes) -> None:
        """Append data to what is stored. Raises OSError."""
        if self.file is None and self.total + len(data) > INLINE:
            self.move_to_file()
        if self.file is None:
            self.head += data
        else:
            write_all(self.file, data, self.total)
        self.total += len(data)

    def append_file(self, file: int, size: int, wanted: Callable[[], bool]) -> int:
        """Append up to `size` bytes of an open file, while it is wanted. Return how many there
        are. Raises OSError; then nothing is appended."""
        start = self.total
        try:
            while self.total < start + size and wanted():
                data = os.read(file, min(CHUNK_SIZE, start + size - self.total))
                if not data:
                    break
                self.append(data)
        except OSError:
            self.total = start
            del self.head[start:]
            if self.file is not None:
                os.ftruncate(self.file.fileno(), start)  # a full disk gets its room back
            raise
        return self.total - start

    def move_to_file(self) -> None:
        file = open_spool()
        try:
            write_all(file, self.head, 0)
        except OSError:
            file.close()
            raise
        self.file = file
        self.head = bytearray()

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes; fewer only at the end. Raises OSError."""
        size = min(size, self.total - offset)
        if size <= 0:
            return b""
        head = self.head  # before self.file is read: move_to_file() sets that first
        if self.file is None:
            return bytes(head[offset:offset + size])
        return os.pread(self.file.fileno(), size, offset)

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # a network's disk may fail; the data is not needed
                self.file.close()


def write_all(file: IO[bytes], data: Any, offset: int) -> None:
    """Write a whole buffer at this offset of a file. Raises OSError."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(file.fileno(), rest, offset)
        rest, offset = rest[done:], offset + done


def open_spool() -> IO[bytes]:
    """Open an unlinked file, unbuffered: a full disk must fail the write, not a later read."""
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    raise_file_limit()  # only now: commands inherit the limit
    return tempfile.TemporaryFile(buffering=0)


class ExitRecord(NamedTuple):
    """The end of a command, as the Runner reports it."""

    exitcode: int
    time: float  # ms
    started: float  # seconds since 1970
    output: Any  # an Output, or an object with its size, read() and close()
    signal: int = 0  # the signal that killed it
    reason: str = ""  # a failure that is not the command's own
    slot: int = 0  # the slot that it ran in, from 1
    requeue: bool = False  # not started: another worker may start it
    returned: Sequence[List[int]] = ()  # of its files: [mode, size], or [] for a missing one


def requeued(reason: str) -> ExitRecord:
    """Return the record of a command that another worker may start: this one did not."""
    return ExitRecord(NOT_RUN, 0.0, time.time(), Output(), reason=reason, requeue=True)


class Job:
    """A command that the worker has accepted."""

    def __init__(self, key: TaskKey, fields: Fields) -> None:
        self.key = key
        self.cmd: str = fields["cmd"]
        self.cwd: Optional[str] = fields.get("cwd")
        self.timeout: Seconds = fields.get("timeout", 0)  # 0: none
        self.limit: int = fields.get("limit", 0)  # bytes of output, 0: none
        # for plain clients: bytes of output in the RESULT, which must fit in a frame; 0: no cut
        self.cut: int = min(fields.get("cut", 0), PLAIN_INLINE)
        self.env: Dict[str, str] = fields.get("env", {})
        self.shell: str = fields.get("shell") or SH
        self.split: bool = fields.get("split", False)
        self.tree: str = fields.get("tree", "")  # id, "" for none
        self.manifest = min(fields.get("manifest", 0), MAX_MANIFEST)  # bytes of the tree's
        self.returns: List[str] = fields.get("return", [])  # files to send: paths from cwd
        self.report: bool = fields.get("report", False)  # the last one must not be an older file
        self.slots: int = fields.get("slots", 1)  # of the worker, which it takes while it runs
        self.lock: Optional[str] = fields.get("lock")  # "" is its run's own; None: none
        self.top = ""  # the workspace, once it has the tree
        self.preparing = ""  # FILES or SETUP, until then
        self.state = WAITING  # then RUNNING, DELIVERED (the worker holds the result), GONE
        self.deadline: Seconds = math.inf  # when its timeout ends
        self.killed = False  # the Runner has been told to kill it
        self.cancelled = ""  # why it was cancelled
        self.record: Optional[ExitRecord] = None  # once it has ended
        self.output: Optional[Output] = None  # once it is started
        self.live_from = -1  # offset of the output that its client waits for; -1: none
        self.output_told = False  # the Runner has reported that output


# the states of a workspace
FINDING, LISTING, PLANNING, FILLING = "FINDING", "LISTING", "PLANNING", "FILLING"
SETTING_UP, READY, FAILED, RELEASING = "SETTING_UP", "READY", "FAILED", "RELEASING"
RELEASE_AFTER: Seconds = 60.0  # without a command of its run, whose end we may not have heard


class TreeUse:
    """The use of a workspace by a run, and how far it is prepared.

    FINDING (is the tree here?) > LISTING (fetch its manifest) > PLANNING (what is missing?) >
    FILLING (fetch that) > SETTING_UP > READY. Another tree begins at FINDING again, when no
    command of the last one is left. FAILED: the host is unfit. RELEASING ends each of them."""

    def __init__(self, run: Run, fetcher: TreeFetcher) -> None:
        self.run = run
        self.fetcher = fetcher
        self.state = ""
        self.tree = ""  # id
        self.size = 0  # bytes to fetch in this state
        self.got = 0  # of those
        self.manifest = bytearray()  # as far as it has come
        self.waiting: Dict[TaskKey, Job] = {}  # preparing, some maybe for another tree
        self.asks_for: Optional[Job] = None  # the job that its requests name
        self.active = 0  # jobs that the Runner has
        self.path = ""  # of the workspace
        self.setup: Optional[Job] = None  # while it runs
        self.model: Fields = {}  # of the job for which it is prepared: cwd, env and shell of setup
        self.why = self.output = ""  # why it FAILED, and what the setup printed
        self.leaving = False  # release it when nothing runs there any more
        self.release_at: Seconds = math.inf

    def is_idle(self) -> bool:
        """Return whether nothing happens in its workspace: no command, no setup, and no event of
        the files is due."""
        files = self.state in ("", LISTING, READY, FAILED) or self.state == FILLING and (
            self.fetcher.unstored == 0 and bool(self.fetcher.asked))
        return files and not self.active and not self.setup

    def next_job(self) -> Optional[Job]:
        """Return a job whose tree is to come next: no job needs the present one any more."""
        if self.state == FAILED or not self.is_idle():
            return None
        jobs = list(self.waiting.values())
        return jobs[0] if jobs and all(job.tree != self.tree for job in jobs) else None

    def check(self, jobs: Dict[TaskKey, Job]) -> None:
        """Raise AssertionError if its records disagree. For tests."""
        mine = {key: job for key, job in jobs.items() if key[0] == self.run and job.tree}
        assert self.waiting == {key: job for key, job in mine.items() if job.preparing}
        assert self.active == sum(job.state in (WAITING, RUNNING) and not job.preparing
                                  for job in mine.values())
        assert not self.active or self.state == READY, self.state
        self.fetcher.check()


class Worker(SessionMachine):
    """A worker's bookkeeping. Its link is BROKER."""

    def __init__(self, name: str, slots: int, weight: int = 0, host: str = "",
                 times: Times = Times(), wait: Seconds = math.inf,
                 address: Optional[str] = "", drain: Seconds = 0.0, labels: Sequence[str] = (),
                 max_load: float = math.inf, memfree: int = 0, user: str = "") -> None:
        super().__init__("READY", times, wait)
        self.user = user
        self.labels = sorted(labels)
        self.max_load = max_load  # the worker takes commands while the load is lower,
        self.memfree = memfree  # and so many bytes of memory are free
        self.overloaded = False
        self.load = -1.0  # the machine's load average; -1: unknown
        self.drain = drain  # seconds for running commands when the worker is stopped
        self.name = name  # of this incarnation
        self.slots = slots
        self.weight = weight
        self.host = host
        self.address = address  # the broker's, for notices
        self.jobs: Dict[TaskKey, Job] = {}
        # [id, attempt] to report QUEUED, by run and what is prepared
        self.accepted: Dict[Tuple[Run, str], List[List[int]]] = {}
        self.uses: Dict[Run, TreeUse] = {}
        self.cache_bytes = 0  # of all workspaces
        self.report_at: Seconds = math.inf  # the deadline for reporting these
        self.kill_at: Dict[Job, Seconds] = {}  # time of SIGTERM, then of SIGKILL
        self.exit_status: Optional[int] = None  # None until stop()
        self.leave_at: Seconds = math.inf  # the deadline for leaving
        self.has_left = False

    def greeting(self, joining: bool) -> Fields:
        slots = 0 if self.exit_status is not None or self.overloaded else self.slots
        fields: Fields = {"name": self.name, "slots": slots, "weight": self.weight}
        if self.load >= 0:
            fields["load"] = round(self.load, 2)
        if self.cache_bytes:
            fields["cache"] = min(self.cache_bytes, MAX_COUNT)  # a client may name any size
        if joining:
            fields.update(host=self.host, version=__version__, labels=self.labels, user=self.user)
            live = [job for job in self.jobs.values() if not job.cancelled]
            fields["running"] = [list(job.key) for job in live if job.state != DELIVERED]
            fields["held"] = [list(job.key) for job in live if job.state == DELIVERED]
            fields["locks"] = [[job.lock, *job.key] for job in self.locked_jobs()]
        return fields

    def locked_jobs(self) -> List[Job]:
        """Return the jobs that have a lock. A cancelled one has it until it ends, with LOST."""
        return [job for job in self.jobs.values()
                if job.lock is not None and job.state != DELIVERED]

    def key_changed(self, mark: str) -> None:
        self.name = f"{self.name.partition('.')[0]}.{mark}"

    def accepts(self, link: str, verb: str) -> bool:
        return self.session.accepts(verb)

    # --- reports to the broker

    def send_line(self, link: str, peer: Peer, token: Run, line: bytes) -> None:
        if self.report_at < math.inf:
            self.report_accepted()
        super().send_line(link, peer, token, line)

    def report_accepted(self) -> None:
        """Report QUEUED. Not joined: the next READY lists these commands."""
        accepted, self.accepted, self.report_at = self.accepted, {}, math.inf
        for (run, what), rows in accepted.items() if self.session.joined else ():
            tasks = [row for row in rows if not self.says_enough((run, row[0], row[1]))]
            more = {"preparing": what, "host": self.host} if what else {}
            if tasks:
                self.say(BROKER, b"", run, "QUEUED", {"tasks": tasks, **more})

    def says_enough(self, key: TaskKey) -> bool:
        """Return whether this command's RESULT needs no QUEUED before it. A plain client wants
        both, and QUEUED also tells that a workspace is there."""
        job = self.jobs.get(key)
        return job is not None and job.state == DELIVERED and not job.tree and not job.cut

    def report_state(self, key: TaskKey) -> None:
        """Report QUEUED, RESULT, or LOST for a command that the worker does not have."""
        job = self.jobs.get(key)
        if job is None or job.cancelled:  # this one says LOST again when it has ended
            more: Fields = {"may_run": True} if job and job.lock is not None else {}
            self.report_lost(key, "unknown to the worker", **more)
        elif job.state == DELIVERED:
            self.report_result(job)
        else:
            self.accepted.setdefault((key[0], job.preparing), []).append([key[1], key[2]])
            self.report_at = min(self.report_at, self.now + REPORT_DELAY)

    def report_lost(self, key: TaskKey, why: str, fault: str = "", **more: Any) -> None:
        if self.session.joined:
            self.say(BROKER, b"", key[0], "LOST", {
                "tasks": [[key[1], key[2]]], "why": why, "fault": fault, "worker": self.name,
                **more})

    def report_result(self, job: Job) -> None:
        run, id, attempt = job.key
        record = job.record
        assert record is not None
        fields = {"id": id, "attempt": attempt, "exitcode": record.exitcode, "time": record.time,
                  "started": record.started, "size": record.output.size, "worker": self.name,
                  "host": self.host}
        fields.update((name, value) for name, value in (
            ("slot", record.slot), ("split", job.split), ("signal", record.signal)) if value)
        if record.reason:
            fields.update(reason=record.reason, ran=record.time > 0)
        if record.returned:
            fields["returned"] = record.returned
        if job.cut or record.output.size <= INLINE:
            total = stream_size(fields)
            size = job.cut or (total if total <= INLINE else record.output.size)
            try:
                fields["stdout"] = to_text(record.output.read(0, size))
            except OSError as error:
                self.report_unreadable(job, error)
                return
        self.say(BROKER, b"", run, "RESULT", fields)

    def report_unreadable(self, job: Job, error: OSError) -> None:
        """Report that an output cannot be read, as the result of its command."""
        assert job.record is not None
        job.record.output.close()
        job.record = job.record._replace(
            exitcode=NOT_RUN, signal=0, output=Output(), returned=(),
            reason=f"its output cannot be read on the worker: {error.strerror}")
        self.report_result(job)

    def send_chunk(self, key: TaskKey, output: Any, offset: int, size: int) -> None:
        """Send a part of an output to the client. Raises OSError."""
        data = output.read(offset, min(size, CHUNK_SIZE))
        line = encode("CHUNK", {"id": key[1], "attempt": key[2], "offset": offset})
        self.bulk.append(Outgoing(BROKER, b"", key[0], line, data))

    # --- messages of the broker

    def on_ok(self, message: Message) -> None:
        if self.session.on_ok(message.fields):
            self.log(logging.INFO, "joined the broker")
            self.host = message.fields.get("host", self.host)
            if message.fields.get("note"):
                self.effects.append(Notice(f"notice: {printable(message.fields['note'], 500)}"))
            announced = [*self.session.announced["running"],
                         *(row[1:] for row in self.session.announced["locks"])]
            for run, id, attempt in dict.fromkeys(map(tuple, announced)):
                job = self.jobs.get((run, id, attempt))
                # it has just ended; or READY cannot tell that it takes no slot
                if job is None or job.state == DELIVERED or job.preparing:
                    self.report_state((run, id, attempt))
            for use in self.uses.values():
                use.fetcher.repeat(self.now)

    def on_command(self, message: Message) -> None:
        fields = message.fields
        if "id" not in fields or "attempt" not in fields:
            raise ProtocolError("a command needs 'id' and 'attempt'")
        require_run(message.token)
        self.session.on_command()
        key = (message.token, fields["id"], fields["attempt"])
        if self.exit_status is not None:
            self.report_lost(key, WORKER_STOPPED)
            return
        if key not in self.jobs:
            job = Job(key, fields)
            self.jobs[key] = job
            if job.tree:
                self.use_workspace(job)
            else:
                self.effects.append(Start(job))
        self.report_state(key)

    def jobs_of(self, message: Message) -> List[Job]:
        """Return the jobs that the message names; all of its run if it names none."""
        rows = message.fields.get("tasks")
        if rows is None:
            return [job for key, job in self.jobs.items() if key[0] == message.token]
        keys = [(message.token, id, attempt) for id, attempt in rows]
        return [self.jobs[key] for key in keys if key in self.jobs]

    def on_done(self, message: Message) -> None:
        for job in self.jobs_of(message):
            if job.state == DELIVERED:
                self.forget(job)

    def on_cancel(self, message: Message) -> None:
        for job in self.jobs_of(message):
            self.stop_job(job, "cancelled")
        use = self.uses.get(message.token)
        if "tasks" not in message.fields and use is not None:
            use.leaving = True

    def on_resend(self, message: Message) -> None:
        for id, attempt in message.fields["tasks"]:
            self.report_state((message.token, id, attempt))
        if message.token in self.uses:
            self.uses[message.token].fetcher.repeat(self.now)

    def on_recall(self, message: Message) -> None:
        for job in self.jobs_of(message):
            self.recall(job)

    def recall(self, job: Job) -> None:
        """Hand a job back, unless it was started."""
        if job.preparing:
            self.stop_job(job, RECALLED)
        elif job.state == WAITING and not job.killed:
            self.effects.append(Recall(job))

    def on_fetch(self, message: Message) -> None:
        fields = message.fields
        key, offset = (message.token, fields["id"], fields["attempt"]), fields["offset"]
        job = self.jobs.get(key)
        if job is None:
            self.report_lost(key, "unknown to the worker")
        elif job.record is None:
            job.live_from = offset
            self.printed(job, self.now)
        elif len(self.bulk) < MAX_BULK:  # our clients ask for less at once
            try:
                self.send_chunk(key, job.record.output, offset, fields["size"])
            except OSError as error:
                self.report_unreadable(job, error)

    # --- workspaces

    def use_workspace(self, job: Job) -> None:
        """Start a job in the workspace of its run, when that has the job's tree."""
        run = job.key[0]
        if run not in self.uses:
            self.uses[run] = TreeUse(run, TreeFetcher(
                lambda spans, flags: self.ask(self.uses[run], spans, flags)))
        use = self.uses[run]
        use.leaving = use.leaving and use.state == RELEASING
        if use.state == READY and use.tree == job.tree and not use.leaving:
            self.start_in(use, job)
        else:
            job.preparing = SETUP if use.state == SETTING_UP else FILES
            use.waiting[job.key] = job

    def start_in(self, use: TreeUse, job: Job) -> None:
        job.preparing, job.top = "", use.path
        job.cwd = os.path.join(use.path, job.cwd) if job.cwd else use.path
        use.active += 1
        self.effects.append(Start(job))

    def advance(self, use: TreeUse) -> None:
        """Do what is due in a workspace, after anything has changed."""
        if use.state == FAILED:
            for job in [*use.waiting.values()]:
                self.forget(job)
                self.report_lost(job.key, use.why, UNFIT, host=self.host, output=use.output)
                use.output = "" if self.session.joined else use.output
        unused = not use.waiting and not use.active
        use.release_at = min(use.release_at, self.now + RELEASE_AFTER) if unused else math.inf
        if use.leaving and use.setup and not use.setup.cancelled:
            self.stop_job(use.setup, "cancelled")
        if use.leaving and unused and not use.setup and use.state != RELEASING:
            use.fetcher.stop()
            use.state = RELEASING
            self.effects.append(ReleaseTree(use.run))
        first = use.next_job()
        if first is not None:
            use.state, use.tree, use.size, use.got = FINDING, first.tree, first.manifest, 0
            use.model = {"cwd": first.cwd or "", "env": first.env, "shell": first.shell}
            use.manifest.clear()
            use.fetcher.stop()
            self.effects.append(FindTree(use.run, use.tree))
        if use.asks_for is None or use.asks_for.key not in use.waiting:
            use.asks_for = next((job for job in use.waiting.values() if job.tree == use.tree), None)
            use.fetcher.repeat(self.now)

    def ask(self, use: TreeUse, spans: List[Span], flags: Fields) -> None:
        """Ask the client of a waiting job for a part of its tree."""
        job = use.asks_for
        if job is not None and self.session.joined:
            more: Fields = {"spans": spans} if len(spans) > 1 else {}
            if use.state == FILLING:  # people see how far it is
                more["of"] = use.size
            self.say(BROKER, b"", use.run, "FETCH", {
                "id": job.key[1], "attempt": job.key[2], "tree": use.tree, "host": self.host,
                "offset": spans[0][0] if spans else 0, "size": total_size(spans), "got": use.got,
                **more, **flags})

    def on_chunk(self, message: Message) -> None:
        use, fields, data = self.uses.get(message.token), message.fields, message.data
        if use is None or use.tree != fields.get("tree") or use.state not in (LISTING, FILLING):
            return
        if fields.get("why"):
            for job in [job for job in use.waiting.values() if job.tree == use.tree]:
                self.stop_job(job, printable(fields["why"], 200))
            return
        spans = use.fetcher.accept(fields["offset"], len(data), self.now)
        use.got += total_size(spans)
        if spans and use.state == FILLING:
            self.effects.append(PutTree(use.run, spans, data))
        elif spans:
            use.manifest += data
            use.fetcher.stored(self.now)
            if use.got >= use.size:
                use.state = PLANNING
                self.effects.append(FillTree(use.run, bytes(use.manifest)))
                use.manifest.clear()

    def tree_told(self, run: Run, event: TreeEvent, now: Seconds) -> None:
        """Note what has happened to the files of a run's workspace."""
        self.now = now
        use = self.uses.get(run)
        if use is None:
            return
        if isinstance(event, TreeReleased):
            use.state, use.leaving, use.tree = "", False, ""
            if not use.waiting:
                del self.uses[run]
        elif use.state == RELEASING:
            pass
        elif isinstance(event, TreeUnknown):
            use.state = LISTING
            use.fetcher.fetch([(0, use.size)], now)
        elif isinstance(event, TreePlanned):
            use.state, use.size, use.got = FILLING, total_size(event.spans), 0
            use.fetcher.stop()  # its next request tells that `got` begins anew
            use.fetcher.fetch(event.spans, now)
        elif isinstance(event, TreeStored):
            use.fetcher.stored(now)
        elif isinstance(event, TreeWrong):
            use.size += total_size(event.spans)  # its client counts on a `got` that only grows
            use.fetcher.fetch_again(event.spans, now)
        elif isinstance(event, TreeFailed):
            use.state, use.why = FAILED, event.why
        elif event.setup:
            use.path = event.path
            self.set_up(use, event.setup)
        else:
            use.path = event.path
            self.tree_ready(use)
        self.settle()

    def set_up(self, use: TreeUse, command: str) -> None:
        use.state = SETTING_UP
        cwd = os.path.join(use.path, use.model["cwd"])
        use.setup = Job((use.run, 0, 1), {
            **use.model, "cmd": command, "cwd": cwd, "tree": use.tree})
        use.setup.top = use.path
        self.effects.append(StartSetup(use.setup))
        for key, job in use.waiting.items():
            if job.tree == use.tree and job.preparing != SETUP:
                job.preparing = SETUP
                self.report_state(key)

    def set_up_ended(self, use: TreeUse, job: Job, record: ExitRecord) -> None:
        use.setup = None
        if record.exitcode == 0:
            self.effects.append(EndSetup(use.run))
            self.tree_ready(use)
        elif job.cancelled or all(one.tree != use.tree for one in use.waiting.values()):
            use.state, use.tree = "", ""  # a command that has come meanwhile begins anew
        else:
            use.state = FAILED
            use.why = record.reason or (
                f"the setup was killed by signal {record.signal}" if record.signal else
                f"the setup ended with exit code {record.exitcode}")
            with contextlib.suppress(OSError):
                start = max(0, record.output.size - SETUP_OUTPUT)
                use.output = to_text(record.output.read(start, SETUP_OUTPUT))
        record.output.close()

    def tree_ready(self, use: TreeUse) -> None:
        """Start the commands that have waited for this tree."""
        use.state = READY
        for job in [job for job in use.waiting.values() if job.tree == use.tree]:
            del use.waiting[job.key]
            self.start_in(use, job)
            self.report_state(job.key)

    # --- events of the Runner, and the load

    def start_deadline(self) -> Seconds:
        """Return the end of the lease: later the broker may give commands to other workers."""
        return self.session.lease_ends() if self.session.leased() else -math.inf

    def started(self, job: Job, when: Seconds, now: Seconds) -> None:
        """Note that a command was started at `when`. Short commands have no start event."""
        self.now = now
        job.state = RUNNING
        if job.timeout and not job.killed:
            job.deadline = when + job.timeout
            self.kill_no_later(job, job.deadline)

    def printed(self, job: Job, now: Seconds) -> None:
        """Send the new output of a command if its client waits for it."""
        self.now = now
        job.output_told = False
        if job.output and 0 <= job.live_from < job.output.size and job.state != GONE:
            offset, job.live_from = job.live_from, -1
            with contextlib.suppress(OSError):  # the result will report it
                self.send_chunk(job.key, job.output, offset, job.output.size - offset)

    def finished(self, job: Job, record: ExitRecord, now: Seconds) -> None:
        """Report the end of a command. Call settle() after the last one of a batch."""
        self.now = now
        self.kill_at.pop(job, None)
        job.record = record
        use = self.uses.get(job.key[0]) if job.tree else None
        if use is not None and job is use.setup:
            self.set_up_ended(use, job, record)
            return
        if use is not None:
            use.active -= 1
        if job.cancelled or record.requeue:
            self.forget(job)
            fault = "" if job.cancelled or record.reason == RECALLED else SPAWN
            self.report_lost(job.key, job.cancelled or record.reason, fault)
            return
        if job.killed and record.time >= job.timeout * 1000:  # else it ended just before
            job.record = record._replace(exitcode=TIMED_OUT, signal=0, reason=(
                f"stopped after {job.timeout:g} {noun(job.timeout, 'second')} (see --timeout)"))
        job.state = DELIVERED
        if self.session.joined:  # else the next READY lists it
            self.report_result(job)

    def forget(self, job: Job) -> None:
        """Drop a job that has ended, and its output."""
        if job.record:
            job.record.output.close()
        job.state = GONE
        self.jobs.pop(job.key, None)
        if job.preparing:
            del self.uses[job.key[0]].waiting[job.key]

    def stop_job(self, job: Job, why: str) -> None:
        """Drop a job that does not run any more, or not yet; kill any other, or take it out of the
        queue. Report LOST."""
        if job.record or job.preparing:
            self.forget(job)
            self.report_lost(job.key, why)
        else:
            job.cancelled = job.cancelled or why
            self.kill(job)

    def kill(self, job: Job) -> None:
        """Send a job SIGTERM now, and SIGKILL after the grace."""
        if not job.killed:
            job.killed = True
            self.kill_at[job] = self.now + self.times.kill_grace
            self.effects.append(Kill(job, False))

    def kill_no_later(self, job: Job, when: Seconds) -> None:
        self.kill_at[job] = min(self.kill_at.get(job, math.inf), when)

    def set_load(self, load: float, now: Seconds, free: float = math.inf) -> None:
        """Note the load average, and the bytes of free memory. At max_load, or with less than
        memfree, stop taking commands and hand back waiting ones."""
        self.load, slack = load, LOAD_HYSTERESIS if self.overloaded else 1
        busy = load >= self.max_load * slack
        if (busy or free * slack < self.memfree) == self.overloaded:
            return
        self.now, self.overloaded = now, not self.overloaded
        if self.overloaded:
            self.log(logging.INFO, (
                f"load {load:.1f}: no new commands until it is below "
                f"{LOAD_HYSTERESIS * self.max_load:g}" if busy else
                f"{amount(free)} of memory free: no new commands until it is "
                f"{amount(self.memfree / LOAD_HYSTERESIS)}"))
            for job in [*self.jobs.values()]:
                self.recall(job)
        if self.session.joined:
            self.session.greet(now)

    # --- time, and the end

    def paused(self, gap: Seconds, now: Seconds) -> None:
        self.now = now
        self.session.paused(gap, now)

    def tick(self, now: Seconds) -> None:
        self.now = now
        self.session.tick(now)
        for use in self.uses.values():
            use.fetcher.tick(now)
            use.leaving |= use.release_at <= now
        for job in [job for job, when in self.kill_at.items() if when <= now]:
            if job.killed:
                self.kill_at[job] = math.inf
                self.effects.append(Kill(job, True))
            elif job.deadline <= now:
                self.kill(job)
            else:
                self.stop_job(job, WORKER_STOPPED)
        self.settle()
        if self.wait.timed_out(now):
            self.effects.append(Notice("gave up " + self.wait.cause, True))
            self.stop(3, now)

    def deadline(self) -> Seconds:
        uses = (min(use.fetcher.overdue_at, math.inf if use.leaving else use.release_at)
                for use in self.uses.values())
        return min(self.session.next_greeting, *self.kill_at.values(), self.leave_at,
                   self.report_at, self.wait.deadline(), *uses)

    def settle(self) -> None:
        """Report what is due. A stopping worker leaves when it holds no job."""
        for use in [*self.uses.values()]:
            self.advance(use)
        if self.report_at <= self.now:
            self.report_accepted()
        if self.exit_status is None:
            self.report_wait(broker_wait_reason(self.session, self.address, WORKER_ROLE))
        elif not self.has_left:
            # without a broker no client can fetch results
            busy = any(self.session.joined or job.state != DELIVERED for job in self.jobs.values())
            if self.now >= self.leave_at or not busy:
                self.leave()

    def stop(self, status: int, now: Seconds) -> None:
        """Start no more commands. Let others run for `drain` seconds, then stop them and leave.
        Clients have a little longer to fetch results. A second call leaves at once."""
        self.now = now
        if self.exit_status is not None:
            self.leave_at = now
        else:
            self.exit_status, self.wait = status, Wait()  # no longer for a broker
            self.leave_at = now + self.drain + 2 * self.times.kill_grace
            if self.session.joined:
                self.session.greet(now)
            for job in [job for job in self.jobs.values() if job.state != DELIVERED]:
                if not self.drain:
                    self.stop_job(job, WORKER_STOPPED)
                    continue
                self.recall(job)
                if not job.preparing:
                    self.kill_no_later(job, now + self.drain)
            for use in self.uses.values():
                use.leaving = True
        self.settle()

    def leave(self) -> None:
        if self.session.up and not self.locked_jobs():  # BYE frees locks while these are alive
            self.tell_broker("BYE")
        self.effects.append(Exit(self.exit_status or 0))
        self.has_left, self.leave_at = True, math.inf

    HANDLERS = {
        (BROKER, "OK"): "on_ok", (BROKER, "WHO"): "on_who", (BROKER, COMMAND): "on_command",
        (BROKER, "DONE"): "on_done", (BROKER, "CANCEL"): "on_cancel",
        (BROKER, "FETCH"): "on_fetch", (BROKER, "RESEND"): "on_resend",
        (BROKER, "RECALL"): "on_recall", (BROKER, "ERROR"): "on_error",
        (BROKER, "CHUNK"): "on_chunk",
    }


def label_words(names: Iterable[str]) -> str:
    return printable(" and ".join(
        f"a version that knows {KNOWN_BY_LABEL[name]}" if name in KNOWN_BY_LABEL
        else f"--label {name}"
        for name in sorted(names)), 300)


def broker_wait_reason(session: Union[Session, StatusClient], address: Optional[str],
                       role: str) -> str:
    """Return why the broker does not answer, and what to do; "" if it does. It has no address in
    the process of a client, who knows that better."""
    if address is None:
        return ""
    if session.joined:
        silent = f"the broker at {address} does not answer; is it stopped, or its machine busy?"
        return f"waiting: {silent}" if session.unanswered > 1 else ""
    if session.trouble:
        return f"waiting: {session.trouble}"
    if session.up:
        return (f"waiting for an answer: something listens at {address}, but it does not answer "
                f"as a broker does to a {role}; is that the port for {role}s?")
    here = "//localhost:" in address or is_loopback(address)
    return f"waiting: no broker at {address} (yet); start one with: testcloud.py broker" + (
        "" if here else f" (there; with {KEY_FILE}, or it listens to its own machine only)")


# === Processes ========================================================================
#
# The system calls for commands. Each command leads a process group, so that one signal
# reaches its children. A process that leaves the group becomes an orphan when its parent
# ends. Linux makes it our child, because we are a subreaper, and we kill it. The process
# that runs commands is the child of a supervisor. When that child ends, even by SIGKILL,
# the supervisor kills all its descendants. Commands survive only if both are killed at once.

PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
POSIX_SPAWN_SETPGROUP, POSIX_SPAWN_SETSIGDEF = 2, 4  # of spawn.h
F_SETPIPE_SZ = 1031  # of linux/fcntl.h; Python 3.9 lacks it
MAX_FILES = 2**20  # open files; some systems refuse more
PIPE_SIZE = 64 * 1024  # bytes that a new pipe holds
LARGE_PIPE = 1024 * 1024  # bytes that a pipe may hold without privileges
MAX_OPEN_DIRECTORIES = 64  # below one top
REAP_TIMEOUT: Seconds = 1.0  # for killed orphans to end; others hang in the kernel


# --- files and terminal


def read_text(path: str) -> str:
    """Return a small file's text, "" if it cannot be read."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read()
    return ""


def open_no_link(name: Union[str, bytes], flags: int, folder: Optional[int]) -> int:
    """Open a name in an open directory. Return its descriptor. Raises OSError, also for a link."""
    try:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.EMLINK):
            raise OSError(error.errno, "there is a link in its path, or a file in place of a "
                                       "directory") from None
        raise


@contextlib.contextmanager
def open_regular(name: bytes, folder: Optional[int] = None) -> Iterator[Tuple[int, os.stat_result]]:
    """Open a regular file to read it. Yield its descriptor and status. Raises OSError."""
    file = open_no_link(name, os.O_RDONLY | os.O_NONBLOCK, folder)  # a FIFO would block
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        yield file, status
    finally:
        os.close(file)


def open_directory(name: Union[str, bytes], parent: int, widen: bool = True) -> int:
    """Open a directory that is no link. `widen`: let us do everything in it."""
    try:
        opened = open_no_link(name, os.O_RDONLY | os.O_DIRECTORY, parent)
    except PermissionError:
        if not widen:
            raise
        make_writable(name, parent)
        opened = open_no_link(name, os.O_RDONLY | os.O_DIRECTORY, parent)
    mode = stat.S_IMODE(os.fstat(opened).st_mode)
    if widen and mode & 0o700 != 0o700:
        os.fchmod(opened, mode | 0o700)
    return opened


def make_writable(name: Union[str, bytes], parent: int) -> None:
    """Let us do everything in a directory. Raises PermissionError if it is none."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), name)
    os.chmod(name, 0o700, dir_fd=parent)


class Directories:
    """Directories below `top`, each opened by its name in the one above, through no link.
    `widen`: let us do everything in them. `make`: make those that are missing."""

    def __init__(self, top: int, widen: bool = False, make: bool = False) -> None:
        self.top, self.widen, self.make = top, widen, make
        self.opened: OrderedDict[str, int] = OrderedDict()  # by path, the oldest first

    def get(self, path: str) -> int:
        """Return the descriptor of a directory until the next call. Raises OSError."""
        names = []
        while path and path not in self.opened:
            path, _, name = path.rpartition("/")
            names.append(name)
        opened = self.opened[path] if path else self.top
        for name in reversed(names):
            path = f"{path}/{name}" if path else name
            if self.make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(to_bytes(name), dir_fd=opened)
            opened = self.opened[path] = open_directory(to_bytes(name), opened, self.widen)
            if len(self.opened) > MAX_OPEN_DIRECTORIES:
                os.close(self.opened.popitem(last=False)[1])
        return opened

    def place(self, path: str) -> Tuple[int, bytes]:
        """Return the directory of a path, and the name in it."""
        parent, _, name = path.rpartition("/")
        return self.get(parent), to_bytes(name)

    def close(self) -> None:
        while self.opened:
            os.close(self.opened.popitem()[1])
        if self.top >= 0:
            os.close(self.top)
        self.top = -1


@contextlib.contextmanager
def directory_below(top: str, path: str, make: bool = False) -> Iterator[Tuple[int, bytes]]:
    """Open the directory of a path below `top`. Yield its descriptor and the path's last name. With
    `make`, missing directories are made. Raises OSError."""
    folder = os.open(to_bytes(top), os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.closing(Directories(folder, make=make)) as directories:
        yield directories.place(path)


def raise_file_limit() -> int:
    """Raise the limit of our open files as far as the system allows. Return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    with contextlib.suppress(OSError, ValueError):  # macOS has a lower limit of its own
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def set_close_on_exec() -> None:
    """Hide our inherited files from commands, except stdin, stdout and stderr."""
    for entry in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ():
        with contextlib.suppress(OSError):  # listdir() has closed its own by now
            if int(entry) > 2:
                os.set_inheritable(int(entry), False)


def has_terminal() -> bool:
    """Return whether we, and so our commands, have a controlling terminal."""
    with contextlib.suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    return False


def detach_terminal() -> None:
    """Give up our controlling terminal: a command that asks for a password must fail, not wait.
    Ctrl-C still reaches our process group. A session's leader must not call this."""
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        try:
            fcntl.ioctl(terminal, termios.TIOCNOTTY)
        finally:
            os.close(terminal)


# --- facts about a process


def pidfd(pid: int) -> int:
    """Return a file descriptor that is readable when the process ends; -1 if there is none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # not Linux, an old kernel, or forbidden
        return -1


def group_is_alive(leader: int) -> bool:
    """Return whether a process group has living members; false where there is no /proc."""
    with contextlib.suppress(OSError):
        for entry in filter(str.isdigit, os.listdir("/proc")):
            state = read_text(f"/proc/{entry}/stat").rpartition(")")[2].split()[:3]
            if state and state[0] not in "XZ" and int(state[2]) == leader:
                return True
    return False


def start_ticks(pid: int) -> float:
    """Return the start time of a process, in the system's ticks; inf if it is gone."""
    _, _, fields = read_text(f"/proc/{pid}/stat").rpartition(")")
    return int(fields.split()[19]) if fields else math.inf


def environment_of(pid: int) -> Dict[str, str]:
    """Return the environment that a process got at its start; {} if we may not see it."""
    rows = (row.partition("=") for row in read_text(f"/proc/{pid}/environ").split("\0"))
    return {name: value for name, _, value in rows}


# --- children and orphans


def become_subreaper() -> int:
    """Become the parent of orphans below us. Return a file for read_children(), -1 without one."""
    with contextlib.suppress(ImportError, OSError, AttributeError):  # not Linux
        import ctypes
        if ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0:
            return os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)
    return -1


def read_children(file: int) -> List[int]:
    """Return the pids of the children that our main thread started, and of orphans."""
    parts: List[bytes] = []
    while not parts or parts[-1]:  # the system gives them in parts
        parts.append(os.pread(file, 65536, sum(map(len, parts))))
    return [int(pid) for pid in b"".join(parts).split()]


def reaped(pid: int) -> bool:
    """Reap this child if it has ended. Return whether it has."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    return True


def kill_descendants(children_file: int) -> List[int]:
    """Kill our children, and theirs as they become ours. Return the pids that do not end."""
    deadline = time.monotonic() + REAP_TIMEOUT
    while time.monotonic() < deadline:
        for pid in read_children(children_file):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.001)
        except ChildProcessError:  # no child is left; an empty read_children() does not prove it
            return []
    return read_children(children_file)


# --- signals and supervisor


NOT_FATAL = {"SIGCHLD", "SIGCONT", "SIGKILL", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG",
             "SIGWINCH", "SIGINFO", "SIGIO" if sys.platform != "linux" else ""}
FAULTS = {"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS"}  # no handler would run
# Popen() resets the first two for commands; the others would interrupt one call for ever
IGNORED_SIGNALS = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTTIN, signal.SIGTTOU}


def signals_to_handle(but: Set[str] = NOT_FATAL | FAULTS) -> Set[int]:
    """Return the signals that would end us, without those that we ignore: SIGHUP under nohup,
    SIGINT and SIGQUIT in the background of a script."""
    left_out = {getattr(signal, name, None) for name in but}
    return {number for number in signal.valid_signals() - left_out
            if signal.getsignal(number) != signal.SIG_IGN}


def supervise(run: Callable[[int], int]) -> int:
    """Call run(control) in a child process. When it ends, kill its descendants.

    The child reads from the descriptor `control` a byte for each signal that we get. Its end of
    file means that we have ended. Return the child's exit status, 128 + signal if it was killed.
    Where the system does not give us orphans, call run(-1) without a child.
    """
    children_file = become_subreaper()
    if children_file < 0:
        print_notice("notice: this system does not show processes that have left their command's "
                     "process group: they may survive it")
        return run(-1)
    control, signals = os.pipe()
    # not by a handler: it would miss a signal that comes just before waitpid()
    awaited = {signal.SIGCHLD, *signals_to_handle(NOT_FATAL)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(signals)
        os.close(children_file)
        return run(control)
    os.close(control)
    pid, status = 0, 0
    while pid != child:
        number = signal.sigwait(awaited)
        if number == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
        else:
            with contextlib.suppress(OSError):  # it has just ended
                os.write(signals, bytes([number]))
    stuck = kill_descendants(children_file)
    if stuck:
        print_notice(f"these processes cannot be killed: {' '.join(map(str, stuck))}")
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        print_notice(f"process {child} was killed by signal {-code}: so were its commands")
        return 128 - code
    return code


# --- the process of a command


class Process:
    """A command's first process. A shell is the leader of its process group."""

    def __init__(self, pid: int = 0) -> None:
        self.pid = self.group = pid  # 0 while it is being started
        self.pipes: Tuple[int, ...] = ()  # of its output; two if stdout and stderr are split
        self.signalled = 0  # the last signal sent, SIGTERM or SIGKILL
        self.status: Optional[int] = None  # once it is reaped

    def has_ended(self) -> bool:
        """Return whether it has ended. waitid() leaves it a zombie: its pid stays taken."""
        if hasattr(os, "waitid"):
            options = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self.pid, options) is not None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.status = status
        return pid != 0

    def wait(self) -> int:
        """Reap it. Return its exit code, or the negative number of the signal that killed it."""
        if self.status is None:
            self.status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(self.status)

    def signal(self, number: int) -> None:
        """Signal its group; without a pid, only note the signal. Call this before wait()."""
        self.signalled = number
        if self.pid == 0:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(self.pid) != self.group:  # it joined another group
                os.kill(self.pid, number)
                os.kill(self.pid, signal.SIGCONT)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)
            os.killpg(self.group, signal.SIGCONT)  # a stopped group handles SIGTERM only then


ALL, COMMANDS = "all roles", "commands"
# whose environment has the variable, and its meaning
VARIABLES: Dict[str, Tuple[str, str]] = {
    "TESTCLOUD": (CLIENT_ROLE, "options of your own; those on the command line beat them"),
    "TESTCLOUD_BROKER": (ALL, "the broker, for want of --connect: best a host without a port"),
    "TESTCLOUD_KEY_FILE": (ALL, "the key file, for want of --key"),
    "TESTCLOUD_SSH": (ALL, "the ssh command, for want of --ssh"),
    "XDG_CONFIG_HOME": (ALL, "where keys and files of hosts are (default: ~/.config)"),
    "XDG_CACHE_HOME": (ALL, "where workspaces and times of commands are (default: ~/.cache)"),
    "TMPDIR": (ALL, "where unlinked files for outputs are (default: /tmp)"),
    "NO_COLOR": (CLIENT_ROLE, "with any value: no colours with --color auto"),
    "TERM": (CLIENT_ROLE, "dumb: no colours, and no line at the bottom"),
    "MANPAGER": ("help", "shows a topic on a terminal, in place of PAGER"),
    "PAGER": ("help", "shows a topic on a terminal (default: less)"),
    "SSH_CONNECTION": (WORKER_ROLE, "from sshd: the worker ends with that connection"),
    "PWD": (COMMANDS, "its directory"),
    "TESTCLOUD_RUN": (COMMANDS, "the name of the client's run"),
    "TESTCLOUD_SEQ": (COMMANDS, "its number in the run, from 1"),
    "TESTCLOUD_ATTEMPT": (COMMANDS, "the number of this attempt, from 1"),
    "TESTCLOUD_SLOT": (COMMANDS, "its slot on this worker, from 1"),
    "TESTCLOUD_SLOTS": (COMMANDS, "how many slots it takes"),
    "TESTCLOUD_WORKER": (COMMANDS, "the name of its worker"),
}
# each command has its own values of these; ours may come from a parent testcloud
COMMAND_VARIABLES = {name.encode() for name, (whose, _) in VARIABLES.items() if whose == COMMANDS}


class Spawner:
    """libc's posix_spawn(), with a process group for each process.

    os.posix_spawn() cannot set a directory. It also stops all threads until the new process runs
    its program: most of a short command's time. Raises OSError, ImportError or AttributeError if
    libc lacks it."""

    STRUCT = 1024  # bytes for a struct of libc; known ones need at most 350

    def __init__(self) -> None:
        import ctypes
        self.ctypes = ctypes
        self.libc = ctypes.CDLL(None)
        self.quick = ctypes.PyDLL(None)  # for calls that take less time than to share the GIL
        self.set_directory = self.quick.posix_spawn_file_actions_addchdir_np
        self.attributes: Dict[int, Any] = {}  # by process group; 0: of its own

    def texts(self, rows: Sequence[Optional[bytes]]) -> Any:
        """Return a C array of these texts, and a NULL."""
        return (self.ctypes.c_char_p * (len(rows) + 1))(*rows)

    def attributes_of(self, group: int) -> Any:
        if group not in self.attributes:
            attributes = self.ctypes.create_string_buffer(self.STRUCT)
            # not sigfillset(): it leaves out libc's own signals, which may be ignored
            default = self.ctypes.create_string_buffer(b"\xff" * self.STRUCT)
            self.libc.posix_spawnattr_init(attributes)
            self.libc.posix_spawnattr_setflags(attributes,
                                               POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGDEF)
            self.libc.posix_spawnattr_setsigdefault(attributes, default)
            self.libc.posix_spawnattr_setpgroup(attributes, group)
            self.attributes[group] = attributes
        return self.attributes[group]

    def actions(self, cwd: Optional[bytes], stdout: int, stderr: int) -> Any:
        """Return what a new process does before its program begins. free() it."""
        actions = self.ctypes.create_string_buffer(self.STRUCT)
        self.quick.posix_spawn_file_actions_init(actions)
        self.quick.posix_spawn_file_actions_addopen(actions, 0, b"/dev/null", os.O_RDWR, 0)
        self.quick.posix_spawn_file_actions_adddup2(actions, stdout, 1)
        self.quick.posix_spawn_file_actions_adddup2(actions, stderr, 2)
        if cwd is not None:
            self.set_directory(actions, cwd)
        return actions

    def free(self, actions: Any) -> None:
        self.quick.posix_spawn_file_actions_destroy(actions)

    def spawn(self, program: bytes, argv: Sequence[bytes], variables: Any, actions: Any,
              group: int = 0) -> int:
        """Start a program in a process group. Return its pid. `variables` are of texts(). No text
        may contain a NUL. Raises OSError."""
        pid = self.ctypes.c_int()
        error = self.libc.posix_spawn(self.ctypes.byref(pid), program, actions,
                                      self.attributes_of(group), self.texts(argv), variables)
        if error:
            raise OSError(error, os.strerror(error))
        return pid.value


class Setting:
    """What commands find: a directory and variables, as libc wants them. It is made once for many
    commands. Only one thread may use it: each spawn() changes the array of variables."""

    VARYING = 3  # places for variables that differ from command to command
    MAX_ACTIONS = 64  # the same files come again and again

    def __init__(self, spawner: Optional[Spawner], cwd: Optional[bytes],
                 variables: Dict[bytes, bytes]) -> None:
        self.spawner, self.cwd, self.variables = spawner, cwd, variables
        self.actions: Dict[Tuple[int, int], Any] = {}  # by stdout and stderr
        rows = [b"%s=%s" % row for row in variables.items()]
        self.varying = slice(len(rows), len(rows) + self.VARYING)
        self.array: Any = spawner and spawner.texts([*rows, *[None] * self.VARYING])

    def spawn(self, program: bytes, argv: Sequence[bytes], varying: Sequence[Optional[bytes]],
              stdout: int, stderr: int, group: int = 0) -> int:
        """Start a program with VARYING more variables, NAME=VALUE, in a process group. Return its
        pid. No text may contain a NUL. Raises OSError."""
        assert self.spawner is not None
        actions = self.actions.get((stdout, stderr))
        if actions is None:
            if len(self.actions) == self.MAX_ACTIONS:
                self.close()
            actions = self.actions[stdout, stderr] = self.spawner.actions(self.cwd, stdout, stderr)
        self.array[self.varying] = varying
        return self.spawner.spawn(program, argv, self.array, actions, group)

    def close(self) -> None:
        while self.actions and self.spawner:
            self.spawner.free(self.actions.popitem()[1])


def is_transient(error: Exception) -> bool:
    """Return whether the system lacks a resource that it may have in a moment."""
    return isinstance(error, OSError) and error.errno in (
        errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


# --- CPUs and memory


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use: by affinity and by cgroup quota."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cpus = os.cpu_count() or 1
    return max(1, min([cpus] + [int(quota) for quota in cgroup_quotas()]))


CGROUPS, OWN_CGROUP = "/sys/fs/cgroup", "/proc/self/cgroup"


def cgroup_directories(controller: str, root: str, own: str) -> Iterator[Tuple[str, bool]]:
    """Yield the directories of our cgroup and those above it; true: of version 2."""
    for line in read_text(own).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers or controller in controllers.split(","):
            names = [root, controllers, *filter(None, path.split("/"))]
            for depth in range(2, len(names) + 1):
                yield os.path.join(*names[:depth]), not controllers


def cgroup_quotas(root: str = CGROUPS, own: str = OWN_CGROUP) -> List[float]:
    """Return the quotas, in CPUs, of our cgroup and those above it (versions 2 and 1)."""
    quotas = []
    for folder, newer in cgroup_directories("cpu", root, own):
        files = ("cpu.max",) if newer else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = (word for file in files for word in read_text(os.path.join(folder, file)).split())
        quota = [int(word) for word in words if word.isdigit()]
        if len(quota) == 2:
            quotas.append(quota[0] / max(1, quota[1]))
    return quotas


def free_memory(meminfo: str = "/proc/meminfo", root: str = CGROUPS,
                own: str = OWN_CGROUP) -> float:
    """Return the bytes that commands can get: of the machine, or of our cgroup or one above it if
    that has less. math.inf: the system does not tell."""
    def value(file: str, before: str, after: str = "") -> float:
        found = re.search(f"^{before}([0-9]+){after}$", read_text(file), re.M)
        return int(found[1]) if found else math.nan
    free = [1024 * value(meminfo, "MemAvailable: *", " kB")]
    for folder, newer in cgroup_directories("memory", root, own):
        limit, used, cache = ("max", "current", "inactive_file") if newer else (
            "limit_in_bytes", "usage_in_bytes", "total_inactive_file")
        # the system drops that cache when commands need its memory
        free.append(value(f"{folder}/memory.{limit}", "") - value(f"{folder}/memory.{used}", "")
                    + value(f"{folder}/memory.stat", f"{cache} "))
    return min((size for size in free if not math.isnan(size)), default=math.inf)


def oom_kills(root: str = CGROUPS, own: str = OWN_CGROUP) -> int:
    """Return the number of processes in our cgroup (version 2) that the OOM killer has killed."""
    path = re.search("^0::(.*)$", read_text(own), re.M)
    events = read_text(f"{root}{path[1]}/memory.events") if path else ""
    return int((re.findall("^oom_kill ([0-9]+)$", events, re.M) or ["0"])[0])


# === Running commands =================================================================
#
# Each slot is a thread, which waits for the one command that it runs. Slots share nothing
# with the machines. The loop fills the queue and takes events. A free slot takes its next
# job itself. A wide job runs in one thread while the threads of its other slots wait; none
# overtakes it in the queue. Events wake the loop when the queue runs low, or after
# REPORT_DELAY. Not concurrent.futures: it cannot hold jobs back when a lease ends.

MANUAL["environment"] = """\
@variables

What a command finds

@options client --cwd --env --shell

Directory: that of the client, which must exist on the worker. -C DIR is relative to it
($PWD, with its links), and ~ is the home on the worker. With --sync it is in the
workspace.

Variables: those of the worker, those of --env, and those above. --env may be repeated.

Shell: /bin/sh. `--shell bash` is for <(...), arrays and pipefail. A name is looked up in
the worker's PATH. A relative path counts from the command's directory. ~ is not expanded,
and $SHELL changes nothing. Plain workers use their own shell.

Input and signals: stdin is /dev/null. There is no terminal, and no signal is ignored or
blocked.

A command of plain words (`pytest -q tests/a.py`) starts without the shell, in half the
time. This is so where /bin/sh is known to do nothing but start it (bash, dash). A command
sees that in nothing but process numbers and the order of variables. `ps` shows a defunct
sh for each slot of such a worker, if /bin/sh is dash: it leads the process groups of
these commands.

How a command ends

Each command runs in a process group of its own. It ends when its first process ends. What
it left behind may go on writing to its output for 0.1 s (`exec > >(tee log)`), while its
slot is taken. Then this is killed: processes in the background, and on Linux also those
in a session of their own (setsid, double fork).

A process may wipe the variables above and lose its parent. It is killed when all commands
have ended that ran when it was started.

On Linux a worker is two processes: a supervisor, and its child that does the work. When
either is killed, even with `kill -9`, the other one kills all commands. `client --local`
is built likewise.
"""

SPAWN_DELAYS: Tuple[Seconds, ...] = (0.05, 0.1, 0.2, 0.4)  # then the command is LOST (SPAWN)
POLL_INTERVAL: Seconds = 0.02  # between checks where there is no pidfd
REAP_INTERVAL: Seconds = 1.0  # between checks for orphans: zombies must not pile up
LOW_WATER = 2  # queued commands per slot: with fewer the loop is woken at once
MAX_LATE_READS = 16  # after a command was killed: more than its pipes hold
OUT_OF_MEMORY = ("killed while its machine (or cgroup) was out of memory: give the worker fewer "
                 "slots (-j), or more memory")

# start of a command (by time.monotonic()), new output, or end
Event = Tuple[Job, Union[Seconds, Output, ExitRecord]]


def shell_path(shell: str) -> str:
    """Return the path of a shell; look up a name in our PATH. Raises FileNotFoundError."""
    path = shell if "/" in shell else shutil.which(shell)
    if path is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), shell)
    return path


def reason_not_started(job: Job, error: Exception) -> str:
    """Return why a command could not be started, and what to do about it."""
    if not isinstance(error, OSError):
        return f"cannot start it: {error}"  # e.g. a NUL byte
    if job.cwd is not None and error.filename == to_bytes(job.cwd):
        fix = "does git ignore it? (see --sync-list)" if job.top else \
            "it must exist on the worker (see --cwd)"
        return f"cannot enter directory {printable(job.cwd, 500)}: {error.strerror}; {fix}"
    if error.errno == errno.E2BIG:
        return "cannot start it: the command and its environment are too long for the system"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"this worker has no shell {printable(job.shell, 500)} (see --shell)"
    if error.errno in (errno.EACCES, errno.ENOEXEC):
        return (f"this worker cannot execute the shell {printable(job.shell, 500)}: "
                f"{error.strerror} (see --shell)")
    return f"cannot start it: {error.strerror}"


# --- commands that need no shell
#
# With a command of plain words, sh only looks for the program and runs it. We do that instead: sh
# takes half of a short command's time. As GNU make, we leave to sh what it may know better. A
# command line needs no shell if all of this is true:

# it has only words of characters without a meaning to any shell, and begins with no assignment,
PLAIN_WORDS = re.compile(rb"[ \t]*[\w./][\w./:,@%+-]*(?:[ \t]+[\w./:,@%+=-]+)*[ \t]*", re.ASCII)
# nor with a builtin or keyword of any common sh (dash, bash, ksh, mksh, zsh, busybox);
SHELL_WORDS = frozenset(b"""
    . [ alias autoload bg bind break builtin bye caller case cd chdir command compgen complete
    compopt continue coproc declare dirs disable disown do done echo echotc elif else emulate
    enable end esac eval exec exit export false fc fg fi float for foreach function functions
    getconf getln getopts global hash help hist history if in integer jobs kill let limit local log
    logout mapfile nameref newgrp nocorrect noglob popd print printf pushd pushln pwd read readarray
    readonly rehash rename repeat return rmdir sched select set setopt shift shopt sleep source
    suspend test then time times trap true type typeset ulimit umask unalias unfunction unhash
    unlimit unset unsetopt until wait whence where which while zmodload""".split())
# --env sets no variable that a shell would drop or change;
PASSED_ON = re.compile(r"(?!(?:(?:OLD)?PWD|SHLVL|(?:BASH_)?ENV|SHELLOPTS|BASHOPTS|POSIXLY_CORRECT"
                       r"|_)$)[A-Za-z_]\w*", re.ASCII)
# the first file of the program's name in PATH is executable; and sh passes on what it got, and
EXECS = "execs"  # replaces itself by the program: bash and others; or
WAITS = "waits"  # starts it in another process, and tells which signal killed it: most dashes
TRY_SH_AFTER = 20  # commands without a need for a shell: the trial takes as long as some of these


def told_by_sh(status: int) -> str:
    """Return what a sh that WAITS says when a signal has ended its program, with this status."""
    if os.WTERMSIG(status) in (signal.SIGINT, signal.SIGPIPE):
        return ""
    dumped = " (core dumped)" if os.WCOREDUMP(status) else ""
    return f"{signal.strsignal(os.WTERMSIG(status))}{dumped}\n"


def find_program(word: bytes, path: List[bytes], cwd: bytes) -> bytes:
    """Return the path of a command's program, as every shell finds it; b"" if they may differ."""
    for place in [cwd] if b"/" in word else path:
        found = os.path.join(place, word)
        if not found.startswith(b"/"):
            return b""
        try:
            is_file = stat.S_ISREG(os.stat(found).st_mode)
        except FileNotFoundError:
            continue
        except OSError:
            return b""
        if is_file and os.access(found, os.X_OK):
            return word if b"/" in word else found
        return b""
    return b""


class Launcher:
    """Starts commands, each in a process group of its own."""

    def __init__(self, worker: str) -> None:
        self.worker = worker  # its name
        self.plain_commands = 0  # that need no shell
        self.sh_way: Optional[str] = None  # EXECS, WAITS, or "" for another; None: not tried yet
        self.sets_underscore = False  # sh sets $_ to the program's path
        self.groups: Dict[int, int] = {}  # by slot: see group_of()
        self.settings: Dict[int, CommandSetting] = {}  # by slot: of its last command
        self.inherited = {name: value for name, value in os.environb.items()
                          if name not in COMMAND_VARIABLES}
        self.file_limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # before we raise ours
        self.spawner: Optional[Spawner] = None
        if not has_terminal():  # with a terminal, only Popen can start a session
            with contextlib.suppress(ImportError, OSError, AttributeError):
                self.spawner = Spawner()
                set_close_on_exec()

    def start(self, job: Job, slot: int) -> Tuple[int, int, Tuple[int, ...]]:
        """Start a job's command. Return its pid, its process group and its output pipes. Another
        group than its own means: it has no shell that WAITS for it. Raises OSError, ValueError."""
        setting = self.setting(job, slot)
        pipes: List[Tuple[int, int]] = []
        pid = 0
        try:
            for _ in range(1 + job.split):
                pipes.append(os.pipe())
            pid, group = self.start_in(setting, job, slot, pipes[0][1], pipes[-1][1])
            return pid, group, tuple([pipe for pipe, _ in pipes])
        finally:
            for pipe, end in pipes:
                os.close(end)
                if not pid:
                    os.close(pipe)
            if not slot:
                setting.close()

    def setting(self, job: Job, slot: int) -> CommandSetting:
        """Return what a job's command finds in its slot: mostly the same as the one before."""
        key = (job.key[0], job.cwd, job.env, job.shell, job.slots)
        setting = self.settings.get(slot)
        if setting is None or setting.key != key:
            if setting is not None:
                setting.close()
            setting = CommandSetting(self, job, slot, key)
            if slot:
                self.settings[slot] = setting
        return setting

    def start_in(self, setting: CommandSetting, job: Job, slot: int, stdout: int,
                 stderr: int) -> Tuple[int, int]:
        """Start a job's command. Return its pid and process group. Raises OSError, ValueError."""
        cmd, (_, id, attempt) = to_bytes(job.cmd), job.key
        numbers = (b"TESTCLOUD_SEQ=%d" % id, b"TESTCLOUD_ATTEMPT=%d" % attempt)
        limited = resource.getrlimit(resource.RLIMIT_NOFILE) != self.file_limit  # we have raised it
        if setting.may_lack_shell and not limited and self.sh_way != "" \
                and PLAIN_WORDS.fullmatch(cmd):
            pid, group = self.start_without_shell(setting, cmd, numbers, slot, stdout, stderr)
            if pid:
                return pid, group
        apart = b" " if cmd[:1] in (b"-", b"+") else b""  # else the shell reads an option
        argv = [setting.shell, b"-c", apart + cmd]
        if limited:  # a first shell lowers it again
            argv = [b"/bin/sh", b"-c", b'ulimit -Sn "$0"; exec "$@"', b"%d" % self.file_limit[0],
                    *argv]
        pid = self.start_shell(setting, argv, (*numbers, setting.underscore), stdout, stderr)
        return pid, pid

    def start_shell(self, setting: CommandSetting, argv: List[bytes],
                    varying: Sequence[Optional[bytes]], stdout: int, stderr: int) -> int:
        """Start a shell. Return its pid. Popen tries what Spawner cannot start: it says why."""
        if self.spawner and b"\0" not in b"".join((*argv, setting.cwd or b"")):
            try:
                return setting.spawn(argv[0], argv, varying, stdout, stderr)
            except OSError:
                pass
        import subprocess
        more = dict(row.split(b"=", 1) for row in varying if row is not None)
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=setting.cwd,
            env={**setting.variables, **more}, start_new_session=True)
        process.returncode = 0  # Process reaps it, not Popen
        return process.pid

    def start_without_shell(self, setting: CommandSetting, cmd: bytes, numbers: Tuple[bytes, bytes],
                            slot: int, stdout: int, stderr: int) -> Tuple[int, int]:
        """Start the program of plain words if it needs no shell. Return its pid and process group,
        or zeros."""
        argv = cmd.split()
        if argv[0] in SHELL_WORDS:
            return 0, 0
        program = find_program(argv[0], setting.path, setting.cwd or b"")
        self.plain_commands += bool(program)
        if not program or self.plain_commands < TRY_SH_AFTER or not self.way_of_sh():
            return 0, 0
        underscore = b"_=" + program if self.sets_underscore else setting.underscore
        try:
            group = self.group_of(slot) if self.sh_way == WAITS else 0
            pid = setting.spawn(program, argv, (*numbers, underscore), stdout, stderr, group)
            return pid, group or pid
        except OSError:  # the shell says why, or interprets a script without #!
            return 0, 0

    def group_of(self, slot: int) -> int:
        """Return a process group whose leader is a zombie. Raises OSError.

        Without a shell that WAITS, a program must not lead its group: setsid(1) and others do
        different things then. Only one that leads none can join it."""
        if slot not in self.groups:
            self.groups[slot] = self.spawn([SH.encode(), b"-c", b":"], None, 2)
        return self.groups[slot]

    def spawn(self, argv: List[bytes], cwd: Optional[bytes], stdout: int) -> int:
        """Start a program that is no command. Return its pid. Raises OSError."""
        variables = self.inherited if cwd is None else {**self.inherited, b"PWD": cwd}
        with contextlib.closing(Setting(self.spawner, cwd, variables)) as setting:
            return setting.spawn(argv[0], argv, [None] * Setting.VARYING, stdout, stdout)

    def close(self) -> None:
        """Reap the zombies. Those of threads that have ended may be gone: they became children of
        the main thread, where kill_orphans() reaps them."""
        for leader in self.groups.values():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(leader, 0)
        self.groups.clear()

    def way_of_sh(self) -> str:
        """Return what sh does with plain words, "" if that is unknown. Try it at the first call."""
        if self.sh_way is None:
            try:
                self.sh_way = self.try_sh()
            except (OSError, ValueError):
                self.sh_way = ""
        return self.sh_way

    def try_sh(self) -> str:
        """Compare what programs get from us and through sh. Raises OSError, ValueError."""
        if any(name.startswith(b"BASH_FUNC_") for name in self.inherited):
            return ""  # a function may have the name of any program
        _, direct = self.output_of([b"/usr/bin/env"])
        _, through_sh = self.output_of([SH.encode(), b"-c", b"/usr/bin/env"])
        process, leader = self.output_of([SH.encode(), b"-c", b"/usr/bin/readlink /proc/self"])
        added = {*through_sh.split(b"\n")} ^ {*direct.split(b"\n")}
        self.sets_underscore = b"_=/usr/bin/env" in added
        if not all(line.startswith(b"_=") for line in added) \
                or len(added) > 2 * self.sets_underscore:
            return ""
        if int(leader) == process.pid:
            return EXECS
        process, told = self.output_of([SH.encode(), b"-c", b"/bin/sh -c 'kill -USR1 $$'"])
        waits = process.wait() == 128 + signal.SIGUSR1 and told.decode() == told_by_sh(
            signal.SIGUSR1)
        return WAITS if waits else ""

    def output_of(self, argv: List[bytes]) -> Tuple[Process, bytes]:
        """Return the ended process of a program, and its outputs."""
        ours, theirs = os.pipe()
        with open(ours, "rb") as stream:
            try:
                process = Process(self.spawn(argv, b"/", theirs))
            finally:
                os.close(theirs)
            output = stream.read()
        process.wait()
        return process, output


class CommandSetting(Setting):
    """The Setting of a run's commands in a slot."""

    def __init__(self, launcher: Launcher, job: Job, slot: int, key: Tuple[object, ...]) -> None:
        """Raises FileNotFoundError: there is no such shell."""
        self.key = key  # of all commands that find this
        self.shell = to_bytes(shell_path(job.shell))
        pwd = job.env.get("PWD") or job.cwd or os.environ.get("PWD", "")
        variables = {**launcher.inherited,
                     **{to_bytes(name): to_bytes(value) for name, value in job.env.items()},
                     b"TESTCLOUD_RUN": to_bytes(job.key[0]), b"TESTCLOUD_SLOT": b"%d" % slot,
                     b"TESTCLOUD_SLOTS": b"%d" % job.slots,
                     b"TESTCLOUD_WORKER": to_bytes(launcher.worker), b"PWD": to_bytes(pwd)}
        for name in (b"TESTCLOUD_SEQ", b"TESTCLOUD_ATTEMPT"):  # those of --env do not count
            variables.pop(name, None)
        underscore = variables.pop(b"_", None)
        self.underscore = None if underscore is None else b"_=" + underscore
        self.path = variables.get(b"PATH", b"").split(b":")
        super().__init__(launcher.spawner, None if job.cwd is None else to_bytes(job.cwd),
                         variables)
        self.may_lack_shell = bool(  # a command of plain words
            slot and launcher.spawner and job.shell == SH and job.cwd
            and job.cwd.startswith("/") and job.cwd == os.path.normpath(job.cwd)
            and all(map(PASSED_ON.fullmatch, job.env)))


def enlarge_pipe(pipe: int) -> None:
    """Let a pipe hold more, so that its ends take turns less often."""
    with contextlib.suppress(OSError):  # not Linux, not a pipe, or too many large pipes
        fcntl.fcntl(pipe, F_SETPIPE_SZ, LARGE_PIPE)


class OutputReader:
    """Collects a command's output, in the thread of its slot."""

    def __init__(self, runner: Runner, job: Job, process: Process, output: Output,
                 began: Seconds) -> None:
        self.runner, self.job, self.process = runner, job, process
        self.output, self.began = output, began
        self.report_at = min(began + REPORT_DELAY, runner.wake_at)  # to report the start
        self.sizes = dict.fromkeys(process.pipes, PIPE_SIZE)  # by open pipe: bytes to read at once
        self.poller = select.poll()
        for pipe in process.pipes:
            self.poller.register(pipe, select.POLLIN)

    def read_until_end(self) -> None:
        """Read until the leader ends, then OUTPUT_GRACE longer. After SIGTERM, read until the
        group is dead: its other members have until SIGKILL."""
        self.wait_for_leader()
        while self.process.signalled == signal.SIGTERM and group_is_alive(self.process.group):
            self.poll(time.monotonic() + POLL_INTERVAL)
        deadline = time.monotonic() + OUTPUT_GRACE  # e.g. tee may still write
        while self.sizes and time.monotonic() < deadline:
            self.poll(deadline)

    def read_rest(self) -> None:
        """Read the rest of the pipes after the group is killed, and close them."""
        deadline = time.monotonic() + OUTPUT_GRACE
        for _ in range(MAX_LATE_READS):
            if not self.sizes or not self.poll(deadline):
                break
        for pipe in self.process.pipes:
            os.close(pipe)

    def wait_for_leader(self) -> None:
        leader = pidfd(self.process.pid)
        if leader < 0:
            while not self.process.has_ended():
                self.poll(time.monotonic() + POLL_INTERVAL)
            return
        self.poller.register(leader, select.POLLIN)
        while leader not in self.poll(math.inf):
            pass
        self.poller.unregister(leader)
        os.close(leader)

    def poll(self, until: Seconds) -> List[int]:
        """Read what arrives before `until`. Return the descriptors that were ready."""
        now = time.monotonic()
        if now >= self.report_at:
            self.report_at = math.inf
            self.runner.report(self.job, self.began, urgent=True)
        if 0 <= self.job.live_from < self.output.size and not self.job.output_told:
            self.job.output_told = True
            self.runner.report(self.job, self.output, urgent=True)
        until = min(until, self.report_at)
        patience = None if until == math.inf else max(0.0, until - now) * 1000
        ready = [file for file, _ in self.poller.poll(patience)]
        for pipe in ready:
            if pipe in self.sizes:
                self.read(pipe)
        return ready

    def read(self, pipe: int) -> None:
        data = os.read(pipe, self.sizes[pipe])
        if not data:
            del self.sizes[pipe]
            self.poller.unregister(pipe)
            return
        self.output.write(data, 1 if pipe == self.process.pipes[0] else 2)
        if len(data) == PIPE_SIZE:  # it was full
            self.sizes[pipe] = LARGE_PIPE // 4
            enlarge_pipe(pipe)


class Returns:
    """The files that a command brings back. Works in the thread of its slot."""

    def __init__(self, job: Job) -> None:
        """Look at the files before the command is started."""
        self.job = job
        self.top = job.top or job.cwd or "."  # without a tree, files are below the directory
        cwd = os.path.relpath(job.cwd or "/", job.top) if job.top else ""
        self.paths = [path_below(cwd, path) for path in job.returns]
        self.before = [self.signature(path) for path in self.paths]

    def signature(self, path: str) -> Signature:
        with contextlib.suppress(OSError), directory_below(self.top, path) as (folder, name):
            return signature_of(os.stat(name, dir_fd=folder, follow_symlinks=False))
        return ()

    def append_to(self, record: ExitRecord) -> ExitRecord:
        """Append the files to a command's output. Return the record of both. Why a file that is
        there does not come is a reason, also if the command has passed."""
        returned: List[List[int]] = []
        reason = record.reason
        for given, path, before in zip(self.job.returns, self.paths, self.before):
            returned.append([])
            try:
                with directory_below(self.top, path) as (folder, name), \
                        open_regular(name, folder) as (file, status):
                    # an old report must not look like that of a command that crashed
                    report = self.job.report and len(returned) == len(self.paths)
                    if not (record.exitcode or report) or signature_of(status) != before:
                        returned[-1] = [status.st_mode & 0o777, record.output.append_file(
                            file, status.st_size, lambda: not self.job.cancelled)]
            except FileNotFoundError:
                pass
            except OSError as error:
                reason = reason or f"{printable(given)} does not come back: {error.strerror}"
        return record._replace(returned=returned, reason=reason)


class Runner:
    """Runs jobs in threads. It calls wake(), in any thread, when the loop must take events.
    With `subreaper`, the main thread has no children but orphans."""

    def __init__(self, slots: int, wake: Callable[[], None], name: str = "",
                 subreaper: bool = False, nice: int = 0) -> None:
        self.nice = nice  # added to our niceness for commands
        if nice and sys.platform != "linux":  # only on Linux each thread has its own
            with contextlib.suppress(OSError):
                os.nice(nice)
        self.wake = wake
        self.slots = self.free = slots
        self.launcher = Launcher(name)
        self.children_file = become_subreaper() if subreaper else -1
        self.oom_kills, self.oom_at = oom_kills(), -math.inf  # count, and time of its last increase
        self.stuck: Set[int] = set()  # orphans that cannot be killed
        self.start_deadline: Seconds = math.inf  # see start_jobs()
        self.waiting: OrderedDict[TaskKey, Job] = OrderedDict()  # the queue
        self.threads: List[threading.Thread] = []  # one for each used slot
        self.events: Deque[Event] = deque()
        self.wake_at: Seconds = math.inf  # deadline of the next wake-up
        self.woken = False  # the loop was woken, and has not taken the events yet
        # for the queue, and for signals only to processes not yet reaped; wake() must not take it
        self.lock = threading.Lock()
        self.idle = threading.Condition(self.lock)  # idle slots wait on it
        self.processes: Dict[TaskKey, Process] = {}  # of the commands that run
        self.closing = False  # no job starts any more

    # --- for the loop

    def enqueue(self, job: Job) -> None:
        """Put a job into the queue. Call start_jobs() after the last one of a batch."""
        job.slots = min(job.slots, self.slots)  # more would never be free
        with self.lock:
            self.waiting[job.key] = job

    def start_apart(self, job: Job) -> None:
        """Start a job at once, in a thread of its own: it takes no slot."""
        with self.lock:
            self.processes[job.key] = Process()
        thread = threading.Thread(target=self.work_apart, args=(job,), daemon=True, name="setup")
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more threads
            del self.processes[job.key]
            self.report(job, requeued(str(error)), urgent=True)

    def start_jobs(self, until: Seconds) -> None:
        """Let slots start jobs until `until` (the end of the lease)."""
        self.start_deadline = until
        now = time.monotonic()
        if now >= self.wake_at:  # the slot that should have woken us is busy
            self.wake_loop()
        with self.lock:
            wanted = len(self.waiting) if now < until else 0
            self.idle.notify(wanted)
        self.add_threads(min(wanted, self.slots - len(self.threads)))

    def add_threads(self, count: int) -> None:
        """Start threads for slots. Without any thread, hand the queue back."""
        try:
            for slot in range(len(self.threads) + 1, len(self.threads) + 1 + count):
                thread = threading.Thread(target=self.work, args=(slot,), daemon=True, name="slot")
                thread.start()
                self.threads.append(thread)
        except RuntimeError as error:  # the system has no more threads
            while self.waiting and not self.threads:
                self.report(self.waiting.popitem(last=False)[1], requeued(str(error)))

    def recall(self, job: Job) -> bool:
        """Hand a job back if it is in the queue. Return whether it was."""
        with self.lock:
            waited = self.waiting.pop(job.key, None) is not None
        if waited:
            self.report(job, requeued(RECALLED), urgent=True)
        return waited

    def kill(self, job: Job, hard: bool) -> None:
        """Hand a job back if it is in the queue; otherwise signal its process group."""
        if self.recall(job):
            return
        with self.lock:
            if job.key in self.processes:
                self.processes[job.key].signal(signal.SIGKILL if hard else signal.SIGTERM)

    def take_events(self) -> List[Event]:
        """Return the events since the last call. Short commands have no start event."""
        self.woken, self.wake_at = False, math.inf
        return [self.events.popleft() for _ in range(len(self.events))]

    def close(self) -> None:
        """Kill running commands, and let the threads end."""
        with self.lock:
            self.closing = True
            for process in self.processes.values():
                process.signal(signal.SIGKILL)
            self.idle.notify_all()
        for thread in self.threads:
            thread.join(1.0)
        self.launcher.close()
        if self.children_file >= 0:
            kill_descendants(self.children_file)
            os.close(self.children_file)
            self.children_file = -1

    # --- in any thread

    def report(self, job: Job, what: Union[Seconds, Output, ExitRecord],
               urgent: bool = False) -> None:
        """Add an event, and wake the loop if it should not wait."""
        now = time.monotonic()
        self.events.append((job, what))
        self.wake_at = min(self.wake_at, now + REPORT_DELAY)
        if urgent or now >= self.wake_at or len(self.waiting) < LOW_WATER * self.slots:
            self.wake_loop()

    def wake_loop(self) -> None:
        if not self.woken:
            self.woken = True
            self.wake()

    # --- in the thread of a slot

    def work(self, slot: int) -> None:
        """Run jobs in this slot, numbered from 1."""
        self.set_niceness()
        job = self.next_job()
        while job is not None:
            self.report(job, self.record_of(job, slot))
            job = self.next_job(job.slots)

    def work_apart(self, job: Job) -> None:
        """Run a job in no slot."""
        self.set_niceness()
        self.report(job, self.record_of(job, 0), urgent=True)

    def set_niceness(self) -> None:
        if self.nice and sys.platform == "linux":  # a command inherits its thread's niceness
            with contextlib.suppress(OSError):
                os.nice(self.nice)

    def next_job(self, freed: int = 0) -> Optional[Job]:
        """Free so many slots. Wait for a job that may be started. Return it, or None after
        close()."""
        with self.lock:
            self.free += freed
            while not self.closing:
                late = bool(self.waiting) and time.monotonic() >= self.start_deadline
                first = next(iter(self.waiting.values()), None)
                if first and not late and first.slots <= self.free:
                    del self.waiting[first.key]
                    self.processes[first.key] = Process()
                    self.free -= first.slots
                    if self.waiting and self.free:  # a wide job has ended, or held others up
                        self.idle.notify()
                    return first
                if self.events or late:  # the loop waits for a new lease
                    self.wake_loop()
                self.idle.wait()
        return None

    def record_of(self, job: Job, slot: int) -> ExitRecord:
        """Run a job. Return its record, whatever happens: a bug fails this command only."""
        try:
            return self.run(job, slot)
        except Exception as error:
            return ExitRecord(NOT_RUN, 0.0, time.time(), Output(), slot=slot,
                              reason=f"testcloud failed to run it: {error!r}")
        finally:
            if job.key in self.processes:  # the start failed
                with self.lock:
                    del self.processes[job.key]

    def run(self, job: Job, slot: int) -> ExitRecord:
        """Run a job's command to its end. Return its record."""
        job.output = output = Output(job.limit, job.split)
        job.cwd = job.cwd and os.path.expanduser(job.cwd)
        returns = Returns(job) if job.returns else None
        wall, began = time.time(), time.monotonic()
        process = self.processes[job.key]
        try:
            self.start_process(job, slot, process)
        except (OSError, ValueError) as error:
            return ExitRecord(NOT_RUN, 0.0, wall, output, reason=reason_not_started(job, error),
                              slot=slot, requeue=is_transient(error))
        reader = OutputReader(self, job, process, output, began)
        try:
            reader.read_until_end()
        finally:
            self.kill_leftovers(job, process)
            code = process.wait()
            reader.read_rest()
        if code < 0 and process.group != process.pid and not process.signalled:
            assert process.status is not None
            output.write(told_by_sh(process.status).encode(), 2)
            code = 128 - code
        output.end()
        record = self.exit_record(code, output, wall, began, slot)
        return returns.append_to(record) if returns and not job.cancelled else record

    def exit_record(self, code: int, output: Output, wall: Seconds, began: Seconds,
                    slot: int) -> ExitRecord:
        """Return the record of an ended command. The code is that of Process.wait()."""
        spent, reason = (time.monotonic() - began) * 1000, ""
        if output.failure:
            reason = f"no room for its output on the worker: {output.failure}"
        elif code in (-signal.SIGKILL, 128 + signal.SIGKILL) and self.oom_killed_since(began):
            reason = OUT_OF_MEMORY
        if code < 0:
            return ExitRecord(128 - code, spent, wall, output, -code, reason, slot)
        return ExitRecord(NOT_RUN if output.failure else code, spent, wall, output, 0, reason, slot)

    def start_process(self, job: Job, slot: int, process: Process) -> None:
        """Start a job's command; retry if the machine lacks a resource. Raises as start()."""
        for delay in (*SPAWN_DELAYS, 0.0):
            try:
                pid, group, pipes = self.launcher.start(job, slot)
                break
            except OSError as error:
                if not delay or not is_transient(error):
                    raise
                if error.errno == errno.EMFILE:
                    raise_file_limit()
                self.wake_loop()  # events must not wait for this
                time.sleep(delay)
                if time.monotonic() >= self.start_deadline or process.signalled:
                    raise
        with self.lock:
            process.pid, process.group, process.pipes = pid, group, pipes
            if process.signalled:
                process.signal(process.signalled)

    def oom_killed_since(self, when: Seconds) -> bool:
        """Return whether the OOM killer has killed a process of our cgroup since then."""
        count = oom_kills()
        if count > self.oom_kills:
            self.oom_at, self.oom_kills = time.monotonic(), count
        return self.oom_at >= when

    # --- leftover processes

    def kill_leftovers(self, job: Job, process: Process) -> None:
        """Kill what is left of a command. Its leader has ended, and is a zombie where possible."""
        with self.lock:
            self.processes.pop(job.key, None)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.group, signal.SIGKILL)
        deadline = time.monotonic() + REAP_TIMEOUT
        for killed in iter(self.kill_orphans, []):
            if time.monotonic() >= deadline:
                self.stuck.update(killed)
                logging.warning("processes that cannot be killed: %s", killed)
                return
            time.sleep(0.001)

    def kill_orphans(self) -> List[int]:
        """Reap ended orphans; kill those of ended commands. Return the pids of the latter, except
        `stuck`. They may leave orphans: call again until there are none."""
        if self.children_file < 0 or not (self.stuck or read_children(self.children_file)):
            return []  # mostly: without the lock
        with self.lock:
            orphans = [pid for pid in read_children(self.children_file) if not reaped(pid)]
            self.stuck.intersection_update(orphans)
            killed = [pid for pid in orphans if self.command_has_ended(pid)]
            for pid in killed:
                with contextlib.suppress(OSError):  # the process belongs to another user now
                    os.kill(pid, signal.SIGKILL)
            return [pid for pid in killed if pid not in self.stuck]

    def command_has_ended(self, orphan: int) -> bool:
        """Return whether the command of an orphan has ended. Without our variables, the orphan may
        belong to any older running command."""
        variables = environment_of(orphan)
        if "TESTCLOUD_WORKER" in variables:
            key = tuple(variables.get("TESTCLOUD_" + name) for name in ("RUN", "SEQ", "ATTEMPT"))
            alive = [(run, str(id), str(attempt)) for run, id, attempt in self.processes]
            return variables["TESTCLOUD_WORKER"] != self.launcher.worker or key not in alive
        began = start_ticks(orphan)
        return all(process.pid and start_ticks(process.pid) > began
                   for process in self.processes.values())

    def reap(self, now: Seconds) -> None:
        """Kill and reap orphans. The loop calls this every REAP_INTERVAL."""
        self.kill_orphans()
        self.oom_killed_since(now)  # note old kills: they are not the next command's


# === Workspaces =======================================================================
#
# A workspace is a directory on a worker's host. It has the tree of a client's run, and what
# commands made there. It stays for later runs, until newer ones need its room. In the
# directory of all workspaces (~/.cache/testcloud/trees), a workspace NAME has
#
#     NAME/          the workspace itself
#     NAME.lock      locked by the process that uses it; last used at its mtime; has its bytes on
#                    disk, with a sign while they may be more, as they were not measured since
#     NAME.state     a State: what we have put there, as far as we know
#     NAME.new/      files that will replace others when they are complete
#     .gone-...      directories that are being removed
#
# Each run has a thread for its workspace. Nothing outside of a workspace is ever changed: each
# directory in it is opened by its name in the one above, and no link is followed.

CACHE_LIMIT = 10 * 10**9  # bytes of all workspaces, unless --cache says otherwise,
CACHE_FRACTION = 1 / 10  # or this part of the free disk, if that is less
MAX_SOURCES = 4  # other workspaces that are searched for a content, the latest first
MAX_WRONG = 3  # times that a content may come with the wrong hash
MAX_TICKS = 20  # ms to wait for the file system's clock
CLOSE_WAIT: Seconds = 1.0  # for workspaces to be measured, at the end of a worker
LOCK_TRIES = 3  # 1 ms apart: measure() locks what nobody uses, but not for long
NAME_LIMIT = 20  # characters: sockets in a workspace have paths of at most 108 bytes
TREES_NAME = "trees"  # of the directory of all workspaces
LOCK, STATE, PARTS, GONE_PREFIX = ".lock", ".state", ".new", ".gone-"
SIGNATURE = 4  # numbers in a file's signature
SECOND = 10**9  # ns
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CTIME = 2  # place in a signature
Signature = Tuple[int, ...]
Content = Tuple[str, int]  # hash, size


class Stopped(Exception):
    """The run needs its workspace no more."""


class NoWorkspace(Exception):
    """There can be no workspace with this tree; the text says why, for people."""


# --- the directory of all workspaces


def cache_path(name: str, about: str = "") -> str:
    """Return a path in our directory of what can be made anew; "" if the user has no home. There
    may be a file for each text that it is `about`."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(cache):
        return ""
    file = hashlib.sha256(to_bytes(about)).hexdigest()[:16] + ".json"
    return os.path.join(cache, "testcloud", name, *[file] * bool(about))


def cache_limit(given: int = 0, directory: str = "") -> int:
    """Return the bytes that all workspaces may take: `given`, or what suits the disk."""
    if given:
        return given
    place = directory or cache_path(TREES_NAME)
    used = cache_usage(place)  # counts as free: else the limit would fall as it is used
    while not os.path.isdir(place) and place != os.path.dirname(place):
        place = os.path.dirname(place)
    with contextlib.suppress(OSError):
        disk = os.statvfs(place)
        free = disk.f_bavail * disk.f_frsize + used
        return min(CACHE_LIMIT, int(free * CACHE_FRACTION))
    return CACHE_LIMIT


def cache_usage(directory: str) -> int:
    """Return the bytes of all workspaces."""
    with contextlib.suppress(OSError), CacheDirectory(directory) as cache:
        return cache.used()
    return 0


def usage_noted(lock: int) -> Tuple[int, bool]:
    """Return the bytes of a workspace, and whether they were measured since its last use."""
    text = os.pread(lock, 20, 0)
    with contextlib.suppress(ValueError):
        return int(text), text.isdigit()
    return 0, False


def note_usage(lock: int, size: int, measured: bool) -> None:
    with contextlib.suppress(OSError):
        os.pwrite(lock, (b"%020d" if measured else b"%+020d") % size, 0)


class CacheDirectory:
    """The directory of all workspaces, open."""

    def __init__(self, path: str, make: bool = False) -> None:
        self.path = path
        if make:
            os.makedirs(path, 0o700, exist_ok=True)
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.stop = threading.Event()  # somebody waits: measure and sweep later

    def __enter__(self) -> CacheDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def lock(self, name: str, tries: int = 1) -> int:
        """Lock a workspace. Return the descriptor of its lock, -1 if it is in use."""
        while tries:
            with contextlib.ExitStack() as stack:
                lock = open_no_link(to_bytes(name + LOCK), os.O_RDWR | os.O_CREAT, self.fd)
                stack.callback(os.close, lock)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    found = os.stat(name + LOCK, dir_fd=self.fd, follow_symlinks=False)
                    if os.path.samestat(os.fstat(lock), found):
                        stack.pop_all()
                        return lock
                except FileNotFoundError:
                    pass  # the workspace was removed just now
                except BlockingIOError:
                    tries -= 1
                    time.sleep(0.001)
        return -1

    def open(self, name: str) -> IO[bytes]:
        return open(os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.fd), "rb")

    def names(self, suffix: str) -> List[str]:
        return [name[:-len(suffix)] for name in os.listdir(self.fd) if name.endswith(suffix)]

    def usage(self) -> List[Tuple[int, str, int, bool]]:
        """Return (time of the last use, name, bytes, whether they were measured since) of each
        workspace, the oldest first."""
        found = []
        for name in self.names(LOCK):
            with contextlib.suppress(OSError), self.open(name + LOCK) as lock:
                found.append((os.fstat(lock.fileno()).st_mtime_ns, name,
                              *usage_noted(lock.fileno())))
        return sorted(found)

    def used(self) -> int:
        return sum(size for _, _, size, _ in self.usage())

    def measure(self) -> None:
        """Measure the workspaces that nobody uses, where that was not done since their last use.
        Whoever wants one meanwhile need not wait: it is locked for moments only."""
        for last, name, _, measured in reversed(self.usage()):
            lock = -1 if measured else self.lock(name)
            if lock >= 0:
                self.remove(name + PARTS, self.fd)  # of a process that was killed
                os.close(lock)
                size = self.disk_usage(os.path.join(self.path, name))
                lock = -1 if self.stop.is_set() else self.lock(name)
            if lock >= 0:
                if os.fstat(lock).st_mtime_ns == last:
                    note_usage(lock, size, True)
                    os.utime(lock, ns=(last, last))
                os.close(lock)

    def disk_usage(self, path: str) -> int:
        """Return the bytes that a directory takes on disk, as far as we may look."""
        total, directories = 0, [path]
        while directories and not self.stop.is_set():
            with contextlib.suppress(OSError), os.scandir(directories.pop()) as found:
                for entry in found:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        directories.append(entry.path)
        return total

    def make_room(self, limit: int) -> int:
        """Remove the oldest workspaces that nobody uses, until all together are within the limit.
        The one that was used last stays. Return the bytes of those that are left."""
        usage = self.usage()
        used = sum(size for _, _, size, _ in usage)
        for _, name, size, _ in usage[:-1]:
            if used <= limit:
                break
            lock = self.lock(name)
            if lock >= 0:
                for part in (name, name + PARTS, name + STATE, name + STATE + PARTS, name + LOCK):
                    self.remove(part, self.fd)
                os.close(lock)
                used -= size
        self.sweep()
        return used

    def remove(self, name: Union[str, bytes], parent: int) -> None:
        """Remove whatever has this name, if anything. What is in a directory goes in sweep()."""
        try:
            os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError):  # macOS says EPERM for a directory
            try:
                self.set_aside(name, parent)
            except PermissionError:  # to be moved, it must be writable
                make_writable(name, parent)
                self.set_aside(name, parent)

    def set_aside(self, name: Union[str, bytes], parent: int) -> str:
        aside = GONE_PREFIX + os.urandom(8).hex()
        os.rename(name, aside, src_dir_fd=parent, dst_dir_fd=self.fd)
        return aside

    def sweep(self) -> None:
        """Remove the directories that were set aside, also those of a process that was killed.
        Their subdirectories are set aside, too: however deep they are, none is out of reach."""
        waiting = [name for name in os.listdir(self.fd) if name.startswith(GONE_PREFIX)]
        while waiting and not self.stop.is_set():
            name = waiting.pop()
            with contextlib.suppress(OSError):  # another process does the same, or it is busy
                directory = open_directory(name, self.fd)
                try:
                    with os.scandir(directory) as found:
                        entries = [*found]
                    for entry in entries:
                        with contextlib.suppress(FileNotFoundError):
                            if not entry.is_dir(follow_symlinks=False):
                                os.unlink(entry.name, dir_fd=directory)
                                continue
                            make_writable(entry.name, directory)
                            waiting.append(self.set_aside(entry.name, directory))
                finally:
                    os.close(directory)
                os.rmdir(name, dir_fd=self.fd)


# --- what we know of a workspace


def signature_of(found: os.stat_result) -> Signature:
    """Return what changes with a file's content: size, times and inode."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & sys.maxsize


def entries_of(manifest: bytes) -> List[Entry]:
    """Return the entries of a manifest of ours."""
    if not manifest:
        return []
    return [Entry(*row) for row in load(zlib.decompress(manifest).decode())[1]]


class State(NamedTuple):
    """What we know of a workspace, as its state file has it."""

    mark: str = ""  # of the clients whose workspace it is
    tree: str = ""  # its tree; "" while that changes
    setup: str = ""  # key of the last setup that has passed
    fresh: str = ""  # word of the last run with --fresh
    last: int = 0  # the latest time that we gave a file, in ns since 1970
    stamp: int = 0  # signatures with this ctime or a later one prove nothing: see wait_for_tick()
    manifest: bytes = b""  # of the last tree that was complete
    signatures: bytes = b""  # of its entries, as we left them
    also: bytes = b""  # manifest: what there may be besides, from updates that did not end

    def encode(self) -> bytes:
        fields = dict(zip(self._fields, self[:-3]), sizes=[len(part) for part in self[-3:]])
        data = b"\n".join((dump(fields).encode("utf-8", "backslashreplace"), b"".join(self[-3:])))
        return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def decode_state(data: bytes) -> State:
    """Return a state. Raises ValueError if it is broken."""
    digest, _, rest = data.partition(b"\n")
    if digest != hashlib.sha256(rest).hexdigest().encode():
        raise ValueError("broken state")
    head, _, body = rest.partition(b"\n")
    fields = load(head.decode())
    first, second, third = itertools.accumulate(fields.pop("sizes"))
    return State(**fields, manifest=body[:first], signatures=body[first:second],
                 also=body[second:third])


def read_state(cache: CacheDirectory, name: str) -> Optional[State]:
    """Return a workspace's state; None if there is none, or it is broken."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError), \
            cache.open(name + STATE) as file:
        return decode_state(file.read())
    return None


def find_workspaces(cache: CacheDirectory, mark: str, tree: str) -> Iterator[str]:
    """Yield the workspaces that have this tree, for clients with this mark."""
    for name in sorted(cache.names(STATE), key=lambda name: (len(name), name)):
        with contextlib.suppress(OSError, ValueError, IndexError, AttributeError), \
                cache.open(name + STATE) as file:
            fields = load(file.read(4096).split(b"\n")[1].decode())
            if (fields.get("mark"), fields.get("tree")) == (mark, tree):
                yield name


def setup_key(tree: Tree) -> str:
    """Return what changes when the setup must run again."""
    head = tree.head
    what = head.get("setup_for") or [entry[:5] for entry in tree.entries]
    machine = [sys.platform, os.uname().machine]  # hosts may share a home
    return hashlib.sha256(dump([head.get("setup"), head.get("cwd"), machine, what]).encode(
        "utf-8", "backslashreplace")).hexdigest()


def alike(entries: Iterable[Entry]) -> Iterator[Tuple[str, str]]:
    """Yield paths that some file systems take for the same."""
    seen: Dict[str, str] = {}
    for entry in entries:
        path = entry.path
        folded = path.lower() if path.isascii() else \
            unicodedata.normalize("NFC", path).casefold()
        other = seen.setdefault(folded, path)
        if other != path:
            yield other, path


# --- one workspace


class Part:
    """A file that is not complete: in NAME.new, or in its place (name "") if nothing is there."""

    def __init__(self, file: int, name: bytes) -> None:
        self.file, self.name = file, name
        self.hash = hashlib.sha256()
        self.size = 0


class Workspace:
    """A workspace that we have locked, until close()."""

    def __init__(self, cache: CacheDirectory, name: str, lock: int, mark: str,
                 stop: threading.Event) -> None:
        self.cache, self.name, self.lock, self.stop = cache, name, lock, stop
        self.path = os.path.join(cache.path, name)
        self.current = ""  # the path that we are at, for messages
        self.parts = -1  # descriptor of NAME.new
        self.partial: Dict[int, Part] = {}  # by index
        self.directories = Directories(-1, True)
        self.state = read_state(cache, name) or State(mark)

    def open(self) -> None:
        """Open the workspace. If we do not know what is there, make an empty one."""
        if self.state.manifest or self.state.also:
            with contextlib.suppress(OSError):  # a command has put something else there
                self.directories.top = open_directory(self.name, self.cache.fd)
                return
        self.state = State(self.state.mark, fresh=self.state.fresh)
        self.cache.remove(self.name, self.cache.fd)
        os.mkdir(self.name, 0o755, dir_fd=self.cache.fd)
        self.directories.top = open_directory(self.name, self.cache.fd)

    def close_directories(self) -> None:
        for index in [*self.partial]:
            self.drop_part(index)
        self.directories.close()
        if self.parts >= 0:
            os.close(self.parts)
            self.parts = -1
            self.cache.remove(self.name + PARTS, self.cache.fd)

    def close(self) -> None:
        try:
            self.close_directories()
            os.utime(self.lock)  # it is in use until now
        finally:
            os.close(self.lock)

    def at(self, entry: Entry) -> Tuple[int, bytes]:
        """Return where an entry is: its directory, and its name in it."""
        if self.stop.is_set():
            raise Stopped
        self.current = entry.path
        return self.directories.place(entry.path)

    def write(self, part: Part, data: Any) -> None:
        """Write to a file. While the disk is full, remove the oldest workspace that nobody uses."""
        part.hash.update(data)
        part.size += len(data)
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(part.file, view):]
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                os.utime(self.lock)  # the one that was used last stays
                used = self.cache.used()
                if self.cache.make_room(used - 1) == used:
                    raise

    def write_state(self, **changes: Any) -> None:
        """Replace the state file. What we know is then what the file says."""
        self.current = ""
        self.state = self.state._replace(**changes)
        name = self.name + STATE
        file = os.open(name + PARTS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600,
                       dir_fd=self.cache.fd)
        try:
            self.write(Part(file, b""), self.state.encode())
        finally:
            os.close(file)
        os.rename(name + PARTS, name, src_dir_fd=self.cache.fd, dst_dir_fd=self.cache.fd)

    # --- comparing

    def fill(self, tree: Tree, limit: int) -> List[Span]:
        """Do all towards this tree that needs nothing from elsewhere. Return what does."""
        self.close_directories()  # an update to another tree may not have come to its end
        fresh = tree.head.get("fresh", "")
        if fresh and fresh != self.state.fresh:
            self.state = State(self.state.mark, fresh=fresh)
        self.open()
        self.tree = tree
        note_usage(self.lock, max(tree.size, usage_noted(self.lock)[0]), False)
        self.signatures = array.array("q", bytes(8 * SIGNATURE * len(tree.entries)))
        self.modes: List[int] = []  # entries that get their mode at the end
        self.touched: List[int] = []  # files that get a new time
        self.wrong: Counter[int] = Counter()
        # files whose contents are missing, by the first with the same content
        self.missing: Dict[int, List[int]] = {}
        # what was here, or may have been: entry, number of its signature (-1: it has none)
        doubtful = {entry.path: (entry, -1) for entry in entries_of(self.state.also)}
        last = tree.entries if self.state.manifest == tree.manifest else \
            entries_of(self.state.manifest)
        old = {**doubtful, **{entry.path: (entry, index) for index, entry in enumerate(last)}}
        different = self.compare(old)
        gone = sorted(old.keys() - {entry.path for entry in tree.entries}, reverse=True)
        if different or gone:
            firsts: Dict[Content, int] = {}
            for index in different:
                entry = tree.entries[index]
                if entry.kind == FILE:
                    first = firsts.setdefault((entry.content, entry.size), index)
                    self.missing.setdefault(first, []).append(index)
            self.cache.make_room(limit)
            self.begin(different)
            kept = self.remove_old([old[path][0] for path in gone], doubtful, firsts)
            self.make_directories_and_links(different)
            self.fill_from_here(set(different), firsts, kept)
        return tree.spans_of(sorted(self.missing))

    def compare(self, old: Dict[str, Tuple[Entry, int]]) -> List[int]:
        """Return the indexes of entries that are not here as they should be."""
        signatures = array.array("q", self.state.signatures)
        different, absent = [], set()
        for index, entry in enumerate(self.tree.entries):
            parent = entry.path.rpartition("/")[0]
            if parent in absent or not self.is_here(index, entry, old.get(entry.path), signatures):
                different.append(index)
                if entry.kind == DIRECTORY:
                    absent.add(entry.path)
        oldest = min((self.tree.entries[index].mtime for index in different
                      if self.tree.entries[index].kind == FILE), default=None)
        if oldest is not None:  # what was written later at home must be newer here, too
            written = set(different)
            for index, entry in enumerate(self.tree.entries):
                if entry.kind == FILE and entry.mtime >= oldest and index not in written:
                    known = old.get(entry.path)
                    if known is None or known[0].mtime != entry.mtime:
                        self.touched.append(index)
        return different

    def is_here(self, index: int, entry: Entry, known: Optional[Tuple[Entry, int]],
                signatures: Sequence[int]) -> bool:
        """Return whether an entry is here as it should be. Repair a file's mode."""
        directory, name = self.at(entry)
        try:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        if entry.kind == DIRECTORY:
            if not stat.S_ISDIR(found.st_mode):
                return False
            if stat.S_IMODE(found.st_mode) != entry.mode or entry.mode & 0o700 != 0o700:
                self.modes.append(index)
            return True
        if entry.kind == LINK:
            return (stat.S_ISLNK(found.st_mode)
                    and os.readlink(name, dir_fd=directory) == to_bytes(entry.content))
        if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
            return False
        signature = signature_of(found)
        start = SIGNATURE * known[1] if known else 0
        # a file that has another name, too, is replaced: we must not change its mode
        if (known is None or known[0].content != entry.content
                or signature[CTIME] >= self.state.stamp
                or tuple(signatures[start:start + SIGNATURE]) != signature) \
                and (found.st_nlink != 1 or not self.read_content(directory, name, entry)):
            return False
        if stat.S_IMODE(found.st_mode) != entry.mode:
            os.chmod(name, entry.mode, dir_fd=directory)
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        self.note_signature(index, found)
        return True

    def note_signature(self, index: int, found: os.stat_result) -> None:
        start = SIGNATURE * index
        self.signatures[start:start + SIGNATURE] = array.array("q", signature_of(found))

    def read_content(self, directory: int, name: bytes, entry: Entry,
                     write: Callable[[bytes], object] = len) -> bool:
        """Read a file in pieces, and write() them. Return whether it has this entry's content."""
        digest, size = hashlib.sha256(), 0
        with contextlib.ExitStack() as stack:
            try:
                file, status = stack.enter_context(open_regular(name, directory))
            except OSError:
                return False
            if status.st_size != entry.size:
                return False
            for data in iter(lambda: os.read(file, CHUNK_SIZE), b""):
                if self.stop.is_set():
                    raise Stopped
                size += len(data)
                if size > entry.size:
                    return False
                digest.update(data)
                write(data)
        return digest.hexdigest() == entry.content

    # --- changing

    def begin(self, different: List[int]) -> None:
        """Note what will be here, and choose the times of the files that we write."""
        last = self.state.last + 1000
        if self.state.tree:  # Python's .pyc files know the whole second of a source file only
            last = (last // SECOND + 1) * SECOND
        base = max(time.time_ns(), last)  # finish() waits until then
        order = sorted({self.tree.entries[index].mtime for index in
                        itertools.chain(different, self.touched)})
        # us: Python's and other programs' times are floating-point numbers
        self.times = {mtime: base + 1000 * rank for rank, mtime in enumerate(order)}
        also = self.tree.manifest
        if self.state.also:
            rows = {entry.path: entry for entry in entries_of(self.state.also)}
            rows.update((entry.path, entry) for entry in self.tree.entries)
            also = make_tree({}, rows.values()).manifest
        self.write_state(tree="", also=also, last=base + 1000 * len(order))
        self.cache.remove(self.name + PARTS, self.cache.fd)
        os.mkdir(self.name + PARTS, 0o700, dir_fd=self.cache.fd)
        self.parts = open_directory(self.name + PARTS, self.cache.fd)
        self.refuse_alike()

    def refuse_alike(self) -> None:
        """Raise NoWorkspace if this file system takes two paths of the tree for the same."""
        for one, other in alike(self.tree.entries):
            names = [to_bytes(path.rpartition("/")[2]) for path in (one, other)]
            if names[0] != names[1]:
                os.close(os.open(names[0], os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=self.parts))
                with contextlib.suppress(FileNotFoundError):
                    os.stat(names[1], dir_fd=self.parts, follow_symlinks=False)
                    raise NoWorkspace(
                        f"the file system of {self.cache.path} takes {printable(one)} and "
                        f"{printable(other)} for the same: rename or --exclude one of them")
                os.unlink(names[0], dir_fd=self.parts)

    def remove_old(self, entries: List[Entry], doubtful: Container[str],
                   firsts: Dict[Content, int]) -> Set[int]:
        """Remove what belongs to the tree no more; `doubtful` paths may be of any kind. Keep files
        whose content is wanted elsewhere: most were renamed. Return the entries that want it."""
        kept = set()
        for entry in entries:
            try:
                directory, name = self.at(entry)
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except OSError:  # a command has removed it, or one of its directories
                continue
            if stat.S_ISDIR(found.st_mode):
                if entry.kind == DIRECTORY or entry.path in doubtful:
                    with contextlib.suppress(OSError):  # what commands made in it stays
                        os.rmdir(name, dir_fd=directory)
            elif entry.kind != DIRECTORY or entry.path in doubtful:
                first = firsts.get((entry.content, entry.size))
                if first is not None and stat.S_ISREG(found.st_mode) and found.st_nlink == 1:
                    os.rename(name, b"old%d" % first, src_dir_fd=directory, dst_dir_fd=self.parts)
                    kept.add(first)
                else:
                    os.unlink(name, dir_fd=directory)
        return kept

    def make_directories_and_links(self, different: List[int]) -> None:
        for index in different:
            entry = self.tree.entries[index]
            if entry.kind == FILE:
                continue
            directory, name = self.at(entry)
            if entry.kind == LINK:
                os.symlink(to_bytes(entry.content), b"link", dir_fd=self.parts)
                self.move_in(b"link", directory, name)
                continue
            self.cache.remove(name, directory)
            os.mkdir(name, 0o700, dir_fd=directory)
            self.modes.append(index)

    def move_in(self, part: bytes, directory: int, name: bytes) -> None:
        """Move what is complete to its place, whatever is there."""
        try:
            os.rename(part, name, src_dir_fd=self.parts, dst_dir_fd=directory)
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST, errno.EPERM):
                raise
            self.cache.remove(name, directory)
            os.rename(part, name, src_dir_fd=self.parts, dst_dir_fd=directory)

    def fill_from_here(self, different: Set[int], firsts: Dict[Content, int],
                       kept: Set[int]) -> None:
        """Fill what is missing with contents that this host has."""
        for first in [*self.missing]:
            entry = self.tree.entries[first]
            if not entry.size and not self.store(first, 0, b""):
                raise NoWorkspace(f"{printable(entry.path)} has a wrong hash in its manifest")
            old = b"old%d" % first
            if entry.size and first in kept and self.read_content(self.parts, old, entry):
                self.partial[first] = Part(
                    os.open(old, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.parts), old)
                self.finish_file(first)
                self.complete(first)
        self.fill_from(self.directories, (entry for index, entry in enumerate(self.tree.entries)
                                          if index not in different), firsts)
        for _, name, _, _ in self.cache.usage()[:-MAX_SOURCES - 2:-1]:
            state = read_state(self.cache, name) if self.missing and name != self.name else None
            if state:
                with contextlib.suppress(OSError), contextlib.closing(Directories(
                        open_directory(name, self.cache.fd, False), False)) as directories:
                    for manifest in (state.manifest, state.also):
                        self.fill_from(directories, entries_of(manifest), firsts)

    def fill_from(self, directories: Directories, entries: Iterable[Entry],
                  firsts: Dict[Content, int]) -> None:
        """Fill what is missing with the contents of these entries."""
        for entry in entries if self.missing else ():
            first = firsts.get((entry.content, entry.size)) if entry.kind == FILE else None
            if first in self.missing:
                with contextlib.suppress(OSError):
                    if self.copy(first, directories, entry.path):
                        self.complete(first)

    def copy(self, index: int, directories: Directories, path: str) -> bool:
        """Copy a file to an entry's place. Return whether it had the entry's content."""
        part = self.open_part(index)
        try:
            right = self.read_content(*directories.place(path), self.tree.entries[index],
                                      functools.partial(self.write, part))
            if right:
                self.finish_file(index)
        finally:
            self.drop_part(index)  # unless it is finished
        return right

    def open_part(self, index: int) -> Part:
        """Begin to write a file. In its own directory, a file system finds room much faster."""
        self.drop_part(index)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW
        directory, name = self.at(self.tree.entries[index])
        try:
            part = Part(os.open(name, flags | os.O_EXCL, 0o600, dir_fd=directory), b"")
        except FileExistsError:
            name = b"%d" % index
            part = Part(os.open(name, flags | os.O_TRUNC, 0o600, dir_fd=self.parts), name)
        self.partial[index] = part
        return part

    def finish_file(self, index: int) -> None:
        """Give a file with the right content its mode, time and place."""
        entry, part = self.tree.entries[index], self.partial[index]
        directory, name = self.at(entry)
        os.fchmod(part.file, entry.mode | stat.S_IRUSR)  # it may have to be copied
        if not entry.mode & stat.S_IRUSR:
            self.modes.append(index)
        time = self.times[entry.mtime]
        os.utime(part.file, ns=(time, time))
        if part.name:
            self.move_in(part.name, directory, name)
        self.note_signature(index, os.fstat(part.file))
        os.close(self.partial.pop(index).file)

    def complete(self, first: int) -> None:
        """Copy a content that is here now to all other files that have it."""
        for index in self.missing.pop(first):
            path = self.tree.entries[first].path
            if index != first and not self.copy(index, self.directories, path):
                raise NoWorkspace(f"a process on this host has just changed {printable(path)} in "
                                  f"{self.path}: stop it")

    # --- contents from elsewhere

    def put(self, spans: List[Span], data: Any) -> List[Span]:
        """Store contents. Return those that were wrong. Raises NoWorkspace at the third time."""
        view, start, wrong = memoryview(data), 0, set()
        for index, offset, size in self.tree.pieces_of(spans):
            if index in self.missing and not self.store(index, offset, view[start:start + size]):
                wrong.add(index)
                self.wrong[index] += 1
                if self.wrong[index] >= MAX_WRONG:
                    raise NoWorkspace(f"{printable(self.tree.entries[index].path)} came with the "
                                      f"wrong content {MAX_WRONG} times: does it change?")
            start += size
        return self.tree.spans_of(sorted(wrong))

    def store(self, index: int, offset: int, data: Any) -> bool:
        """Store a piece of a file. Return false if the file is wrong."""
        entry = self.tree.entries[index]
        if offset == 0:
            self.open_part(index)
        part = self.partial.get(index)
        if part is None:
            return True  # the rest of a file that is asked for again
        self.write(part, data)
        if part.size < entry.size:
            return True
        if part.hash.hexdigest() != entry.content:
            self.drop_part(index)
            return False
        self.finish_file(index)
        self.complete(index)
        return True

    def drop_part(self, index: int) -> None:
        """Remove a file that is not complete."""
        part = self.partial.pop(index, None)
        if part is not None:
            os.close(part.file)
            with contextlib.suppress(OSError):
                directory, name = self.directories.place(self.tree.entries[index].path)
                os.unlink(part.name or name, dir_fd=self.parts if part.name else directory)

    # --- the end of an update

    def finish(self) -> Tuple[str, str]:
        """Make the workspace exactly this tree. Return its path, and the setup that must run."""
        tree = self.tree
        self.stop.wait(min(max(self.state.last - time.time_ns(), 0) / 1e9, 1.0))
        for index in self.touched:
            entry = tree.entries[index]
            directory, name = self.at(entry)
            new = self.times[entry.mtime]
            os.utime(name, ns=(new, new), dir_fd=directory, follow_symlinks=False)
            self.note_signature(index, os.stat(name, dir_fd=directory, follow_symlinks=False))
        for index in sorted(self.modes, reverse=True):  # what is in a directory comes first
            entry = tree.entries[index]
            directory, name = self.at(entry)
            if entry.kind == DIRECTORY:
                os.fchmod(self.directories.get(entry.path), entry.mode)
            else:
                os.chmod(name, entry.mode, dir_fd=directory)
                self.note_signature(index, os.stat(name, dir_fd=directory, follow_symlinks=False))
        self.close_directories()
        setup = tree.head.get("setup", "")
        if setup and self.state.setup == setup_key(tree):
            setup = ""
        signatures = self.signatures.tobytes()
        if setup and self.state.setup or self.state.also or \
                (tree.id, signatures) != (self.state.tree, self.state.signatures):
            self.write_state(
                tree=tree.id, setup="" if setup else self.state.setup, manifest=tree.manifest,
                signatures=signatures, also=b"", stamp=self.wait_for_tick())
        return self.path, setup

    def wait_for_tick(self) -> int:
        """Wait until a change would give a file a later ctime than any that we know. Return that
        time. If it takes too long, files with this ctime are compared by content the next time."""
        latest = max(self.signatures[CTIME::SIGNATURE], default=0)
        for _ in range(MAX_TICKS):
            os.utime(self.lock)  # also says when we were last used
            if os.fstat(self.lock).st_ctime_ns > latest:
                break
            time.sleep(0.001)
        return os.fstat(self.lock).st_ctime_ns

    def end_setup(self) -> None:
        self.write_state(setup=setup_key(self.tree))


# --- the workspaces of a worker


def reason_no_tree(error: OSError, directory: str, path: str) -> str:
    """Return why a tree cannot be written, and what to do about it."""
    what = error.strerror or str(error)
    if error.errno in DISK_FULL:
        return (f"no room for the working tree in {directory}: {what}: free some, or set "
                f"XDG_CACHE_HOME on this host to a directory on another disk")
    if not path:
        return (f"cannot make a workspace in {directory}: {what}: set XDG_CACHE_HOME on this host "
                f"to a directory that we can write to")
    if error.errno in (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL):
        return (f"the file system of {directory} cannot have the name {printable(path)}: {what}: "
                f"rename or --exclude it")
    return f"cannot write {printable(path)} in {directory}: {what}"


class WorkspaceThread:
    """The thread of a run's workspace, in which all its methods run."""

    def __init__(self, space: Workspaces, run: Run) -> None:
        self.space, self.run, self.mark = space, run, run[:-32]
        self.steps: queue.SimpleQueue[Optional[TreeStep]] = queue.SimpleQueue()
        self.stop = threading.Event()
        self.cache: Optional[CacheDirectory] = None
        self.workspace: Optional[Workspace] = None
        self.filling = False
        self.wanted = ""  # id of the tree
        self.thread = threading.Thread(target=self.work, daemon=True, name="workspace")

    def tell(self, event: TreeEvent) -> None:
        if not self.stop.is_set():
            self.space.told(self.run, event)

    def work(self) -> None:
        for step in iter(self.steps.get, None):
            self.do(step)
        self.leave()

    def do(self, step: TreeStep) -> None:
        try:
            self.STEPS[type(step)](self, *step[1:])
        except Stopped:
            pass
        except (NoWorkspace, TreeError) as error:
            self.fail(str(error))
        except OSError as error:
            path = self.workspace.current if self.workspace else ""
            self.fail(reason_no_tree(error, self.space.directory, path))
        except Exception as error:  # a bug fails this run only
            self.fail(f"testcloud failed to make a workspace: {error!r}")

    def fail(self, why: str) -> None:
        self.filling = False
        if self.workspace:  # what is not complete only fills the disk
            with contextlib.suppress(OSError):
                self.workspace.close_directories()
        self.tell(TreeFailed(why))

    def find(self, tree: str) -> None:
        """Lock a workspace that has this tree, and fill it with that again; or say that there is
        none."""
        self.wanted, self.filling = tree, False
        if not self.space.directory:
            raise NoWorkspace("there is no place for workspaces, as this user has no home: set "
                              "XDG_CACHE_HOME on this host")
        if self.cache is None:
            self.cache = CacheDirectory(self.space.directory, make=True)
            self.cache.stop = self.stop
        for name in [] if self.workspace else find_workspaces(self.cache, self.mark, tree):
            if self.take(name):
                break
        if self.workspace and self.workspace.state.tree == tree:
            self.fill(self.workspace.state.manifest)
        else:
            self.tell(TreeUnknown())

    def fill(self, manifest: bytes) -> None:
        tree = parse_tree(manifest)
        if tree.id != self.wanted:
            raise TreeError("the manifest of the working tree came with the wrong hash")
        workspace = self.lock(tree.head)
        spans = workspace.fill(tree, self.space.limit)
        self.filling = True
        self.tell(TreePlanned(spans))
        self.finish_if_complete()

    def lock(self, head: Fields) -> Workspace:
        """Return the run's workspace: the one that it has, or the first that is free."""
        title = re.sub(r"[^A-Za-z0-9_-]", "_", head.get("name", ""))[:NAME_LIMIT] or "tree"
        whose = dump([self.mark, head.get("origin", "")]).encode("utf-8", "backslashreplace")
        base = f"{title}-{hashlib.sha256(whose).hexdigest()[:12]}"
        if self.workspace and not re.fullmatch(re.escape(base) + "(-[0-9]+)?", self.workspace.name):
            self.workspace.close()  # it had another tree of the same client
            self.workspace = None
        for number in itertools.count(1) if self.workspace is None else ():
            if self.take(base if number == 1 else f"{base}-{number}"):
                break
        assert self.workspace
        return self.workspace

    def take(self, name: str) -> bool:
        """Lock a workspace. Return false if it is in use."""
        assert self.cache
        lock = self.cache.lock(name, LOCK_TRIES)
        if lock >= 0:
            self.workspace = Workspace(self.cache, name, lock, self.mark, self.stop)
        return lock >= 0

    def put(self, spans: List[Span], data: Any) -> None:
        if self.filling and self.workspace and not self.stop.is_set():
            wrong = self.workspace.put(spans, data)
            if wrong:
                self.tell(TreeWrong(wrong))
            self.tell(TreeStored())
            self.finish_if_complete()

    def finish_if_complete(self) -> None:
        if self.workspace and not self.workspace.missing:
            self.filling = False
            path, setup = self.workspace.finish()
            self.tell(TreeReady(path, setup))
            self.tidy()  # while commands run

    def end_setup(self) -> None:
        if self.workspace:
            with contextlib.suppress(OSError):  # then it will run again
                self.workspace.end_setup()

    def tidy(self) -> None:
        """Keep within the limit, as far as we can."""
        if self.cache:
            with contextlib.suppress(OSError):
                self.cache.measure()
                self.space.used = self.cache.make_room(self.space.limit)

    def leave(self) -> None:
        """Unlock the workspace, and then measure it: the next run must not wait for that."""
        if self.workspace:
            with contextlib.suppress(OSError):
                self.workspace.close()
        self.space.told(self.run, TreeReleased())
        if self.cache:
            with self.cache:
                self.cache.stop = threading.Event()
                self.tidy()

    STEPS: Dict[Any, Callable[..., None]] = {
        FindTree: find, FillTree: fill, PutTree: put, EndSetup: end_setup}


class Workspaces:
    """The workspaces of a worker. Its methods return at once; told(run, event), in any thread,
    tells what has become of them."""

    def __init__(self, limit: int, told: Callable[[Run, TreeEvent], None],
                 directory: str = "") -> None:
        self.limit, self.told = limit, told
        self.directory = directory or cache_path(TREES_NAME)
        self.used = cache_usage(self.directory)
        self.threads: Dict[Run, WorkspaceThread] = {}
        self.leaving: List[threading.Thread] = []  # released, but maybe not at their end

    def order(self, step: TreeStep) -> None:
        """Let the thread of the run carry out this effect. Its FindTree comes first."""
        run = step.run
        if isinstance(step, FindTree) and run not in self.threads:
            self.threads[run] = WorkspaceThread(self, run)
            try:
                self.threads[run].thread.start()
            except RuntimeError as error:  # the system has no more threads
                del self.threads[run]
                self.told(run, TreeFailed(f"cannot make a workspace: {error}"))
        if run in self.threads:
            self.threads[run].steps.put(step)

    def release(self, run: Run) -> None:
        thread = self.threads.pop(run, None)
        if thread is None:
            self.told(run, TreeReleased())
        else:
            thread.stop.set()
            thread.steps.put(None)
            self.leaving = [*filter(threading.Thread.is_alive, self.leaving), thread.thread]

    def close(self) -> None:
        for run in [*self.threads]:
            self.release(run)
        deadline = time.monotonic() + CLOSE_WAIT
        for thread in self.leaving:
            thread.join(max(0.0, deadline - time.monotonic()))


# === Client ===========================================================================
#
# The client owns the commands. It keeps a window of them at the broker and remembers each one
# until it is reported. After each join it submits all unreported commands again.
#
#   RetryPolicy   decides whether and where a command is tried again
#   HostWait      holds commands until an absent host returns
#   Rechecks      holds commands that passed and are rechecked
#   Fetcher       fetches output that is not in a RESULT
#
# These four send nothing and read no clock. The Client calls them.

MANUAL["failures"] = """\
    $ ls tests/test_*.py | testcloud.py client --retries 3 --timeout 5m pytest -q {}

The client tries a command that fails up to three times, and stops one that runs for more
than five minutes.

@options client --timeout --retries --fail-fast --fail-on-flaky --allow-empty

Exit codes of a command

    124        it ran longer than --timeout
    126        it could not be started, or here is no room for its output: a line says why
    127        the shell did not find the program
    128 + N    signal N killed it, as in a shell

Retries

    FAIL            it failed each time
    FLAKY           it failed, and passed in the end
    ONLY ON host    it failed twice on this host, and passed elsewhere

--retries 3 tells whether a command or a host is at fault. The second try is on another
host, if there is one. The third is on the first host again. N counts all tries, as in GNU
parallel. When nothing else is left to do, a retry waits at most 10 s for a slot on the
first host: then it is FLAKY.

FLAKY and ONLY ON count as passed, but not with --fail-on-flaky. The transcript, the
summary, the joblog and the reports name them (FAILED ONLY ON host). --json, --junit and
--html have the last 4 KiB that a failed try printed. They have nothing of outputs over 64
KiB, nor of a failure after a pass.

If three commands fail on one host and nowhere else, this host is excluded for the rest of
the run. A notice says so. On an excluded host one failure is enough for ONLY ON.

Commands that cannot be started

An end with 126 or 127 within a second means: the worker lacks a program, a directory or a
shell. The command is tried on other hosts, at most 8, until one can start it. If it
passes there, it has passed. With --retries 1 nothing is tried again.

If a host cannot start three commands in a row that others can, it is excluded. If a host
that could start others is gone, the command waits for it, at most 10 s.

If a machine only lacked processes, memory or descriptors for a moment, the command is
tried again there and then elsewhere, five times in all.

If a worker is lost, its commands run elsewhere (see `help promises`).

The end of a run

--fail-fast stops everything after N failures. Ctrl-C stops the run's commands on all
workers. A second Ctrl-C leaves at once. `testcloud.py cancel` stops a run from elsewhere
(see `help status`).

If not everything could be run, the summary says so. An input without commands is an
error, but not with --allow-empty: mostly the program that should write them has failed.

Exit statuses

@statuses
"""


OK, FAIL = "OK", "FAIL"  # verdicts: passed; failed on each try
FLAKY, ONLY = "FLAKY", "ONLY"  # failed, passed later; failed on one host only
TRY_OUTPUT = 4 * 1024  # bytes to keep of a failed try's inline output
ALL_TRY_OUTPUTS = 16 * 1024 * 1024  # bytes to keep of all of these in a run
EXCLUDE_AFTER = 3  # commands that fail only on one host: then it is excluded
NOT_FOUND = 127
NO_TESTS = 5  # pytest's exit code
CANNOT_START = (126, NOT_FOUND)  # exit codes of sh: cannot execute, not found
START_TIME = 1000.0  # ms; a command that took so long was started
START_HOSTS = 8  # hosts to try for a command that cannot be started
HOST_WAIT: Seconds = 10.0  # for a host to come back
RECHECK_WAIT: Seconds = 10.0  # for a recheck: the host may be busy for hours


class Try(NamedTuple):
    """An attempt with a result. A lost attempt has none."""

    exitcode: int
    host: str
    worker: str = ""
    slot: int = 0
    started: float = 0.0  # seconds since 1970; 0 if unknown
    spent: float = 0.0  # ms
    size: int = 0  # bytes of its output, if that is not reported
    output: bytes = b""  # the end of that output
    ran: bool = False  # its worker says that it was started
    reason: str = ""  # why it could not be run, or was stopped

    @property
    def did_start(self) -> bool:
        return self.ran or self.exitcode not in CANNOT_START or self.spent >= START_TIME

    def last_words(self) -> str:
        """Return the output, for people."""
        cut = self.size - len(self.output)
        mark = f"[... {cut} bytes left out ...]\n" if cut else ""
        return mark + self.output.decode("utf-8", "backslashreplace")


def try_of(fields: Fields) -> Try:
    """Return the try that a RESULT describes, without its output."""
    return Try(fields["exitcode"], fields.get("host", "?"), fields.get("worker", ""),
               fields.get("slot", 0), fields.get("started", 0.0), fields.get("time", 0.0),
               ran=fields.get("ran", False), reason=fields.get("reason", ""))


def inline_output(result: Fields) -> Optional[bytes]:
    """Return the output of a RESULT that has all of it; else None: it is to be fetched."""
    output = to_bytes(result.get("stdout", ""))
    size = result.get("size", 0)
    if "returned" in result and len(output) > size:  # the first bytes of the files
        output = output[:size]
    return output if len(output) >= size else None


def with_last_words(one: Try, fields: Fields, room: int) -> Try:
    """Return the try with the end of its inline output, of at most `room` bytes."""
    output = inline_output(fields) or b""
    if fields.get("split"):
        output = b"".join(piece for _, piece in PieceReader().take(output))
    last = output[max(0, len(output) - room):]
    if len(last) < len(output):
        last = last.lstrip(bytes(range(0x80, 0xc0)))  # the rest of a character
    return one._replace(size=len(output) or fields.get("size", 0), output=last)


def verdict_of(tries: Sequence[Try], excluded: Container[str] = ()) -> str:
    """Return the verdict. Tries that did not start are ignored if others started. ONLY means:
    passed elsewhere, and failed twice on one host (once if it is excluded)."""
    tries = [one for one in tries if one.did_start] or tries
    passed = [one.host for one in tries if one.exitcode == 0]
    failed = [one.host for one in tries if one.exitcode != 0]
    if not failed or not passed:
        return FAIL if failed else OK
    proven = len(failed) > 1 or failed[0] in excluded
    return ONLY if proven and len({*failed}) == 1 and failed[0] not in passed else FLAKY


def only_host(tries: Sequence[Try]) -> str:
    """Return the host that failed a command with the verdict ONLY."""
    return next(one.host for one in tries if one.exitcode and one.did_start)


def could_not_start_on(tries: Iterable[Try]) -> List[str]:
    """Return the hosts that could not start the command, sorted."""
    return sorted({one.host for one in tries if not one.did_start})


class Command:
    """A command that the client has not reported yet."""

    def __init__(self, id: int, cmd: str, cwd: str, returns: Sequence[str] = (),
                 own: Fields = {}, wrong: str = "") -> None:
        self.id = id
        self.cmd = cmd
        self.cwd = cwd
        self.returns = returns  # files to bring back: paths from cwd
        self.own = own  # fields that replace those of the run's options
        self.wrong = wrong  # why it cannot be run
        self.attempt = 1
        self.faults = Faults()
        self.tries: Dict[int, Try] = {}  # by attempt, oldest first
        self.constraints: Fields = {}  # of this attempt: where it may run
        self.provisional: Fields = {}  # RESULT to report unless a better one comes
        self.provisional_shown = 0  # bytes of its output that were shown live
        self.wait_until: Seconds = 0.0  # deadline of its HostWait; 0: it never waited
        self.gave_up_waiting = False
        self.submitted = False  # this attempt was
        self.worker = ""  # that confirmed this attempt with QUEUED
        self.put_off = False  # to be submitted when there is a tree
        self.preparing = False  # its worker prepares a workspace
        self.may_have_run = False  # an earlier attempt may
        self.since: Seconds = 0.0  # time of that QUEUED
        self.avoid = ""  # worker that failed or lost the last attempt
        self.result: Fields = {}  # RESULT whose output is being fetched
        self.reading: Fields = {}  # RESULT whose tests are being read
        self.shown = 0  # bytes of this attempt's output that were shown live
        self.verdict = OK  # valid when reported

    @property
    def title(self) -> str:
        """Return what reports call it."""
        return self.own.get("name") or self.cmd

    @property
    def rechecking(self) -> bool:
        """Return whether it passed, and is tried once more where it failed."""
        return self.provisional.get("exitcode") == 0

    def fields(self) -> Fields:
        """Return the fields of its attempt, without constraints."""
        optional = {
            "again": self.submitted, "had": self.worker, "avoid": self.avoid,
            "careful": self.faults.crashes > 0,
            "return": [] if self.rechecking else [*self.returns],
            "limit": int(self.rechecking)}  # 1 byte: only the exit code of a recheck counts
        return {"id": self.id, "attempt": self.attempt, "cmd": self.cmd, "cwd": self.cwd,
                **{name: value for name, value in optional.items() if value}}


TOO_LONG = f"a command is at most {MAX_COMMAND} bytes of JSON"


def refusal(command: Command, line: bytes, read_tests: bool) -> str:
    """Return why a command is not submitted, with this line; "" if it is. `read_tests`: the last
    file that it returns is its JUnit file."""
    if command.wrong:
        return command.wrong
    in_tree = not command.cwd or command.cwd.split("/")[0] not in ("", "~")
    for at, path in enumerate(command.returns, 1):
        if not path_below(command.cwd if in_tree else "", path):
            option = "junit-from" if read_tests and at == len(command.returns) else "return"
            return (f"--{option} {printable(path) or repr('')} is no file below the directory of "
                    f"{'--sync' if in_tree else 'its command'}")
    return TOO_LONG if len(line) > MAX_COMMAND - OTHER_FIELDS else ""


class RunOptions(NamedTuple):
    """Options of a run."""

    timeout: Seconds = 0  # of each command; 0: none
    tries: int = 0  # at most; 0: one (more if it cannot start); 1: exactly one
    max_output: int = 0  # bytes of output to keep; 0: all
    env: Dict[str, str] = {}  # variables to set
    shell: Optional[str] = None  # that runs the commands, a path or a name; None: /bin/sh
    needs: Tuple[str, ...] = ()  # labels that the worker must have
    split: bool = False  # keep stdout and stderr apart
    live: bool = False  # show output while the command runs
    slots: int = 0  # of one worker, which each command takes; 0: one
    lock: Optional[str] = None  # that each command needs; "": the run's own (--serial)
    delay: Seconds = 0.0  # between two starts
    fail_fast: int = 0  # failures that stop the run; 0: never stop
    fail_on_flaky: bool = False  # flaky commands count as failed
    fail_on_missing: bool = False  # so do those that did not make a file of --return
    sync: bool = False  # run in workspaces with our tree
    read_tests: bool = False  # the last file of each command is its JUnit file (--junit-from)

    def fields(self) -> Fields:
        """Return the fields that each command of the run has."""
        given = {"timeout": self.timeout, "limit": self.max_output, "env": self.env,
                 "shell": self.shell, "needs": [*self.needs], "split": self.split,
                 "report": self.read_tests, "slots": self.slots, "lock": self.lock,
                 "delay": self.delay}
        return {name: value for name, value in given.items() if value or value == ""}


def asks_resources(fields: Fields) -> bool:
    """Return whether a broker must know RESOURCES to carry these fields out."""
    return fields.get("slots", 1) > 1 or "lock" in fields or fields.get("delay", 0) > 0


class RunStarted(NamedTuple):
    """Effect: the run has started. `commands` is their number, None while input goes on."""

    commands: Optional[int]


class AnswerFetch(NamedTuple):
    """Effect: read what this FETCH asks for of the tree, and call answer()."""

    fields: Fields


class FetchedOutput(NamedTuple):
    """Effect: store the next part of a large output. Offset 0 begins another output."""

    offset: int
    data: Any  # a buffer with a length


class ReturnedPart(NamedTuple):
    """Effect: store the next part of the contents of a result's files. Offset 0 begins them."""

    command: Command
    attempt: int
    rows: List[List[int]]  # of its files: [mode, size], or [] for a missing one
    offset: int
    data: Any

    def pieces(self) -> Iterator[Tuple[int, int, Any]]:
        """Yield what it has of each file: the file's index, the offset there, and the data."""
        at, data = 0, memoryview(self.data)
        for index, row in enumerate(self.rows[:len(self.command.returns)]):
            end = at + (row[1] if row else 0)
            piece = data[max(0, at - self.offset):max(0, end - self.offset)]
            if piece:
                yield index, max(0, self.offset - at), piece
            at = end


class ReadTests(NamedTuple):
    """Effect: read the JUnit file of a try, which has come, and call tests_read()."""

    command: Command
    result: Fields


class LiveOutput(NamedTuple):
    """Effect: a running command printed this. Offset 0 begins another try."""

    command: Command
    offset: int
    data: Any


class ProvisionalResult(NamedTuple):
    """Effect: store this result, which may be reported later. Its ReturnedParts came before."""

    command: Command
    result: Fields
    output: Optional[bytes]  # None: the FetchedOutput


class FinalResult(NamedTuple):
    """Effect: report this result. Its ReturnedParts came before."""

    command: Command
    result: Fields
    output: Optional[bytes]  # None: the FetchedOutput, or that of the ProvisionalResult
    provisional: bool = False  # it is the ProvisionalResult


def missing_files(returns: Sequence[str], result: Fields) -> List[str]:
    """Return the files that a command should have made, and has not."""
    return [path for path, row in zip(returns, result.get("returned", ())) if not row]


def fail_if_missing(command: Command, result: Fields) -> None:
    """Let a command fail that has passed without making all its files (--fail-on-missing)."""
    missing = missing_files(command.returns, result)
    if missing:
        result["exitcode"] = result["exitcode"] or 1
        result["reason"] = result.get("reason") or (
            f"it did not make {printable(missing[0], 300)} (--fail-on-missing)")


class RetryPolicy:
    """Decides whether and where a command is tried again, and which hosts are excluded.

    Failures alternate between another host and the first host. After a pass elsewhere, the first
    host is rechecked: it may be the cause. A command that could not be started is tried on other
    hosts until one starts it. An excluded host gets a command only if there is no other host."""

    def __init__(self, max_tries: int) -> None:
        self.max_tries = max_tries  # RunOptions.tries
        self.excluded: Set[str] = set()
        self.failed_only_on: Counter[str] = Counter()  # commands with the verdict ONLY, by host
        self.started_elsewhere: Counter[str] = Counter()  # commands that only others could start
        self.failed_starts: Counter[str] = Counter()  # the same, consecutive

    def check(self) -> None:
        assert self.excluded <= {*self.failed_only_on, *self.started_elsewhere}, self.excluded
        for host, number in self.failed_starts.items():
            assert number <= self.started_elsewhere[host], host

    def next_constraints(self, command: Command) -> Optional[Fields]:
        """Return the constraints of the next try; None: there is none."""
        tries = [*command.tries.values()]
        last = tries[-1]
        if last.did_start:
            tries = [one for one in tries if one.did_start]
        elif self.max_tries != 1 and sum(not one.did_start for one in tries) < START_HOSTS \
                and not command.rechecking and not command.gave_up_waiting:
            return {"never_on": could_not_start_on(tries)}
        if len(tries) >= self.max_tries:
            return None
        first = tries[0].host
        if last.exitcode:
            return {"not_on": first} if len(tries) % 2 else {"on": first}
        recheck = len(tries) == 2 and last.host != first and first not in self.excluded
        return {"on": first} if recheck else None

    def learn(self, verdict: str, tries: Sequence[Try]) -> Dict[str, str]:
        """Learn from a reported command. Return the newly excluded hosts, each with the reason."""
        suspects: List[Tuple[Counter[str], str, str]] = []
        if verdict == ONLY:
            suspects.append((self.failed_only_on, only_host(tries),
                             "failed there, twice each, and nowhere else"))
        unable = could_not_start_on(tries)
        if unable and any(one.did_start for one in tries):
            self.started_elsewhere.update(unable)
            suspects += [(self.failed_starts, host, "in a row could not be started there, and "
                          "could elsewhere") for host in unable]
        new = {}
        for failures, host, why in suspects:
            failures[host] += 1
            if failures[host] >= EXCLUDE_AFTER and host not in self.excluded:
                new[host] = why
        self.excluded.update(new)
        return new


class HostWait:
    """Holds commands until an absent host returns, for HOST_WAIT at most.

    Only hosts that started a command before count. Whenever the cloud changes, the commands are
    submitted again."""

    def __init__(self) -> None:
        self.commands: Dict[int, Command] = {}
        self.can_start: Set[str] = set()  # hosts that started a command
        self.cloud: Tuple[int, ...] = ()  # its size at the last change

    def check(self, window: Dict[int, Command]) -> None:
        for id, command in self.commands.items():
            assert window[id] is command and not command.gave_up_waiting, id
            assert command.wait_until > 0, id

    def add(self, command: Command, now: Seconds) -> bool:
        """Hold the command. Return False if there is no host to wait for, or no time."""
        able = self.can_start.difference(could_not_start_on(command.tries.values()))
        command.wait_until = command.wait_until or now + HOST_WAIT
        if able and now < command.wait_until and not command.gave_up_waiting:
            self.commands[command.id] = command
            return True
        self.can_start -= able  # waited too long for them: no other command waits
        command.gave_up_waiting = True
        return False

    def cloud_changed(self, cloud: Tuple[int, ...]) -> List[Command]:
        """Note the size of the cloud. Return the commands to submit again."""
        changed, self.cloud = cloud != self.cloud, cloud
        return [*self.commands.values()] if changed else []

    def restart(self) -> None:
        """Forget all commands and deadlines: a new broker may not know all hosts yet."""
        for command in self.commands.values():
            command.wait_until = 0.0
        self.commands.clear()

    def overdue(self, now: Seconds) -> List[Command]:
        return [command for command in self.commands.values() if command.wait_until <= now]

    def hosts(self) -> str:
        """Return the names of the absent hosts, for people."""
        unable = {host for command in self.commands.values()
                  for host in could_not_start_on(command.tries.values())}
        return printable(", ".join(sorted(self.can_start - unable)), 300)


class Rechecks:
    """Holds commands that passed and are rechecked.

    They end RECHECK_WAIT after all else has ended. A command at a worker gets three times its
    first time more."""

    def __init__(self) -> None:
        self.commands: Dict[int, Command] = {}
        self.alone_since: Seconds = math.inf  # when nothing else was left to do
        self.deadline: Seconds = math.inf  # next time to check for overdue commands

    def check(self, window: Dict[int, Command]) -> None:
        passed = {id: command for id, command in window.items() if command.rechecking}
        assert passed == self.commands, (passed, self.commands)

    def overdue(self, alone: bool, now: Seconds) -> List[Command]:
        """Return the commands to report as they are; `alone`: nothing else is left to do."""
        if not alone:
            self.alone_since = self.deadline = math.inf
        elif self.alone_since == math.inf:
            self.alone_since, self.deadline = now, now + RECHECK_WAIT
        if now < self.deadline:
            return []
        due = {id: self.alone_since + RECHECK_WAIT + (
            3 * command.provisional.get("time", 0.0) / 1000 if command.worker else 0.0)
            for id, command in self.commands.items()}
        self.deadline = min((at for at in due.values() if at > now), default=math.inf)
        return [self.commands[id] for id, at in due.items() if at <= now]


class Fetcher:
    """Fetches output and files that are not in a RESULT. `ask(command, offset, size)` sends a
    FETCH.

    Files follow the output in one stream; no chunk has bytes of both. Large outputs are fetched one
    at a time, in order, FETCH_AHEAD chunks ahead. Live output is requested of all running commands,
    one chunk ahead. After `timeout` a chunk is requested again: the request or the chunk may be
    lost."""

    def __init__(self, ask: Callable[[Command, int, int], None], timeout: Seconds,
                 live: bool) -> None:
        self.ask = ask
        self.timeout = timeout
        self.queue: Deque[Command] = deque()  # commands with a large output; the first is fetched
        self.partial: Fields = {}  # RESULT whose output is stored in part
        self.stored = self.asked = 0  # bytes of it stored, bytes requested
        self.overdue_at: Seconds = math.inf  # when to request it again
        self.live = live
        self.live_overdue_at: Seconds = math.inf

    def check(self, window: Dict[int, Command]) -> None:
        assert bool(self.queue) == (self.overdue_at < math.inf), self.overdue_at
        assert not self.queue or self.queue[0].result is self.partial
        for command in self.queue:
            assert window[command.id] is command and command.result, command.id
            assert self.queue.count(command) == 1, command.id

    def add(self, command: Command, result: Fields, now: Seconds) -> None:
        """Fetch the output of this RESULT. Continue a partly stored output."""
        command.result = command.result or result
        if command not in self.queue:
            self.queue.append(command)
            if len(self.queue) == 1:
                self.request(now)

    def remove(self, command: Command, now: Seconds) -> None:
        """Forget the command's RESULT, if its output is being fetched."""
        if command.result:
            command.result = {}
            if command in self.queue:
                self.queue.remove(command)
                self.request(now)

    def restart(self) -> None:
        """Forget all requests: a RESULT whose output still exists will come again."""
        self.queue.clear()
        self.asked, self.overdue_at = self.stored, math.inf

    def request(self, now: Seconds) -> None:
        """Request up to FETCH_AHEAD chunks of the first output."""
        if not self.queue:
            self.overdue_at = math.inf
            return
        self.overdue_at = now + self.timeout
        command = self.queue[0]
        if command.result is not self.partial:
            self.partial = command.result
            self.stored = self.asked = len(inline_output(self.partial) or b"")
        size, total = self.partial.get("size", 0), stream_size(self.partial)
        while self.asked < min(total, self.stored + FETCH_AHEAD * CHUNK_SIZE):
            part = min(CHUNK_SIZE, (size if self.asked < size else total) - self.asked)
            self.ask(command, self.asked, part)
            self.asked += part

    def accept_chunk(self, command: Command, offset: int, size: int, now: Seconds) -> bool:
        """Return whether this chunk is the next part of the first output, and request more."""
        if not self.queue or self.queue[0] is not command or offset != self.stored:
            return False
        self.stored += size
        self.request(now)
        return True

    def listen(self, command: Command, now: Seconds) -> None:
        """Request the live output that comes next, if the command is running."""
        if self.live and command.worker and not command.result and not command.rechecking:
            self.live_overdue_at = min(self.live_overdue_at, now + self.timeout)
            self.ask(command, command.shown, CHUNK_SIZE)

    def tick(self, window: Iterable[Command], now: Seconds) -> None:
        if self.overdue_at <= now:
            self.asked = self.stored
            self.request(now)
        if self.live_overdue_at <= now:
            self.live_overdue_at = math.inf
            for command in window:
                self.listen(command, now)


class Client(SessionMachine):
    """A client's run: submits commands, reports each one once, and leaves. Its link is BROKER."""

    def __init__(self, run: Run, times: Times = Times(), wait: Seconds = math.inf,
                 address: str = "", host: str = "", options: RunOptions = RunOptions(),
                 pid: int = 0) -> None:
        super().__init__("HELLO", times, wait)
        self.run = run
        self.options = options
        self.common = options.fields()
        self.address = address  # for notices
        self.host, self.pid = host, pid
        self.host_names = HostNames()  # people see names, the broker gets identities
        # input
        self.timings: Dict[str, float] = {}  # seconds by command; empty once the backlog is sorted
        self.last_id = 0  # of the input's commands, skipped ones too
        self.input_ended = False
        self.cut_short = False  # input was left unread
        self.announced = False  # RunStarted is out
        self.announce_at: Seconds = math.inf  # its deadline
        # commands
        self.backlog: Deque[Command] = deque()  # not submitted yet
        self.window: Dict[int, Command] = {}  # submitted
        self.retry_policy = RetryPolicy(options.tries)
        self.host_wait = HostWait()
        self.rechecks = Rechecks()
        self.fetcher = Fetcher(self.ask, 2 * times.ready_interval, options.live)
        self.offer = TreeOffer()
        self.transfers_shown = False  # a progress line shows them
        self.notice_at: Seconds = math.inf  # else a notice does, then
        self.unfit: Dict[str, str] = {}  # hosts without a workspace, and why
        self.old_hosts: Set[str] = set()  # hosts with workers that are too old for our commands
        self.asks = {label for label, asked in (  # what the broker must know
            (TREES, options.sync), (RESOURCES, asks_resources(self.common))) if asked}
        self.known: Set[str] = set()  # what it knows
        self.waits_for = ""  # a lock and who has it, in words
        self.try_room = ALL_TRY_OUTPUTS  # bytes
        self.done: List[List[int]] = []  # [id, attempt] for the next DONE
        self.done_at: Seconds = math.inf  # its deadline
        # counts
        self.accepted = 0  # commands of the window that a worker confirmed
        self.total = self.reported = self.failed = self.flaky = 0
        self.stopped = self.never_ran = 0  # cancelled: they ran, or never ran
        self.workers = self.slots = self.hosts = 0  # of the cloud, as the broker says
        self.most_slots = sys.maxsize  # that there will be
        self.wanted_hosts = 0  # of -S; 0 with a broker elsewhere
        self.connected_hosts: Optional[int] = None  # None: the first logins are under way
        self.expecting = False  # more hosts are about to connect
        self.lacks = ""  # a missing worker, in words
        self.long_pause: Tuple[Seconds, Seconds] = (0, 0)  # over the lease; until when to tell it
        # the end of the run
        self.status: Optional[int] = None  # exit status of a cancelled run
        self.leave_at: Seconds = math.inf
        self.left = False

    def greeting(self, joining: bool) -> Fields:
        fields: Fields = {"run": self.run, "backlog": len(self.backlog)}
        if joining:
            fields.update(unreported=list(self.window), host=self.host, pid=self.pid,
                          version=__version__, stops=True)
        return fields

    def key_changed(self, mark: str) -> None:
        self.run = mark + self.run[-32:]

    def accepts(self, link: str, verb: str) -> bool:
        return self.session.accepts(verb) and not self.left

    # --- commands out

    def add(self, cmd: str, cwd: str, returns: Sequence[str] = (), own: Fields = {},
            wrong: str = "") -> None:
        """Add a command. Its own fields replace those of the options. With `wrong` it fails for
        this reason. Call settle() after the last one of a batch."""
        self.total += 1
        self.last_id += 1
        if asks_resources(own):
            self.asks.add(RESOURCES)
        self.backlog.append(Command(self.last_id, cmd, cwd, returns, own, wrong))

    def skip(self) -> None:
        """Count an input command that does not run."""
        self.last_id += 1

    def end_input(self, now: Seconds) -> None:
        self.now = now
        self.input_ended = True
        self.settle()

    def settle(self) -> None:
        self.start_run()
        if self.session.joined:
            self.check_broker()
            self.fill_window()
        if self.done_at <= self.now or len(self.done) >= MAX_DONE:
            self.send_done()
        self.effects += map(AnswerFetch, self.offer.next_requests())
        if self.offer.transfers and not self.transfers_shown and self.notice_at == math.inf:
            self.notice_at = self.now + TRANSFER_NOTICE
        if self.left:
            return
        self.stop_rechecking()
        if self.status is None:
            self.stop_early()
            self.check_wait(self.wait_reason())
        if self.input_ended and not self.backlog and not self.window and not self.left:
            self.leave(SOME_FAILED if self.failures else 0)

    def check_wait(self, reason: str) -> None:
        """Tell what we wait for; but first ask the broker for the reason, if it may know more."""
        if not reason:
            self.waits_for = ""  # it would be out of date in the next wait
        elif reason != self.wait.cause and not self.waits_for and self.session.joined \
                and RESOURCES in self.asks:
            self.session.next_greeting = min(self.session.next_greeting, self.now + ASK_DELAY)
        self.report_wait(reason)

    def start_run(self) -> None:
        """Sort and announce the commands when the input has ended, or takes too long."""
        if self.backlog and self.session.joined:
            self.announce_at = min(self.announce_at, self.now + ANNOUNCE_DELAY)
        if self.input_ended or self.announce_at <= self.now:
            if self.timings and self.backlog and self.session.joined:
                self.sort_backlog()
            if self.announce_at < math.inf:
                self.announce()

    @property
    def window_size(self) -> int:
        """Return how many commands the broker may have. With --serial it is one: the next command
        must not start if this one fails, is tried again, or is lost, also with its tree."""
        return 1 if self.options.lock == "" else WINDOW

    def fill_window(self) -> None:
        """Submit commands if enough of the window is free."""
        size = 0 if self.left or self.lacks_tree() else self.window_size
        count = min(size - len(self.window), len(self.backlog))
        if self.timings or count < min(REFILL_FRACTION * size, len(self.backlog)):
            return
        stop_at = self.options.fail_fast or math.inf
        # one that is refused leaves the window at once
        while self.backlog and len(self.window) < size and self.failures < stop_at:
            command = self.backlog.popleft()
            self.window[command.id] = command
            self.submit(command)

    def sort_backlog(self) -> None:
        """Put unknown commands first, then long ones, if the backlog is complete, and if more than
        one can run at a time."""
        timings, self.timings = self.timings, {}
        if self.input_ended and 1 not in (self.slots, self.most_slots) \
                and self.options.lock is None:
            self.backlog = deque(sorted(
                self.backlog, key=lambda command: -timings.get(command.cmd, math.inf)))

    def announce(self) -> None:
        """Tell the user, once, that the run has started."""
        if not self.announced:
            self.announced = True
            self.effects.append(RunStarted(self.total if self.input_ended else None))

    def submit(self, command: Command) -> None:
        """Submit the command's attempt. A command that is refused fails at its first submit."""
        command.put_off = self.lacks_tree()
        if command.put_off:
            return
        identity = self.host_names.identity_of
        constraints = {key: [*map(identity, value)] if key == "never_on" else identity(value)
                       for key, value in command.constraints.items()}
        if self.unfit:
            constraints["never_on"] = [*{*constraints.get("never_on", ()),
                                         *map(identity, self.unfit)}]
        given = {**self.common, **command.own}
        wide_or_locked = given.get("slots", 1) > 1 or bool(given.get("lock"))
        labels = [TREES] * self.options.sync + [RESOURCES] * wide_or_locked
        if labels:
            given["needs"] = [*given.get("needs", ()), *labels]
        line = encode(COMMAND, {**constraints, **given, **command.fields()})
        first = command.attempt == 1 and not command.submitted
        command.submitted = True
        wrong = refusal(command, line, self.options.read_tests) if first else ""
        if wrong:
            self.fail(command, wrong)
        else:
            self.send_line(BROKER, b"", "", line)

    # --- our tree

    def lacks_tree(self) -> bool:
        """Return whether commands must wait for their tree."""
        return self.options.sync and self.offer.tree is None

    def set_tree(self, tree: Optional[Tree], now: Seconds) -> None:
        """Run commands in this tree from now on. None: files have changed, wait for the next."""
        self.now = now
        self.offer.tree = tree
        if tree is None:
            for fields in self.offer.take_all():
                self.answer(fields, None)
            return
        waiting = [[id, command.attempt] for id, command in self.window.items()
                   if command.submitted and not command.put_off
                   and (not command.worker or command.preparing)]
        if waiting and tree.id != self.common["tree"] and self.session.joined:
            # workers must not change between both trees all the time
            self.tell_broker("RECALL", {"tasks": waiting})
        self.common.update(tree=tree.id, manifest=len(tree.manifest))
        for command in [*self.window.values()] if self.session.joined else ():
            if command.put_off:
                self.submit(command)
        self.settle()

    def on_fetch(self, message: Message) -> None:
        """Answer a worker's request for our tree, if it has the command that it names."""
        fields, tree = message.fields, self.offer.tree
        command = self.command_of(fields["id"], fields["attempt"])
        if command is None or not self.options.sync or "tree" not in fields:
            return
        spans = spans_asked(fields)
        if len(spans) > MAX_SPANS or not fields["size"] == total_size(spans) <= CHUNK_SIZE:
            raise ProtocolError(f"a FETCH of a tree is of {CHUNK_SIZE} bytes in {MAX_SPANS} spans "
                                f"at most")
        if tree is None or tree.id != fields["tree"]:
            self.answer(fields, None)
        else:
            self.offer.add(fields, self.host_names.name_of(fields.get("host", "?")), self.now)

    def answer(self, fields: Fields, data: Optional[bytes]) -> None:
        """Answer this FETCH of our tree. None: that tree is not there any more."""
        chunk = {name: fields[name] for name in ("id", "attempt", "offset", "tree")}
        if data is None:
            self.tell_broker("CHUNK", {**chunk, "why": "a file of its tree has changed"})
        else:
            self.bulk.append(Outgoing(BROKER, b"", "", encode(
                "CHUNK", {**chunk, "size": len(data)}), data))

    def on_ok(self, message: Message) -> None:
        self.known = {label for label in KNOWN_BY_LABEL if message.fields.get(label.strip("()"))}
        self.check_broker()
        if self.left:
            return
        self.tell_old_hosts(message.fields.get("unfit", ()))
        cloud = self.workers, self.slots, self.hosts = tuple(
            message.fields.get(name, 0) for name in ("workers", "slots", "hosts"))
        self.lacks, self.waits_for = (
            printable(message.fields.get(name, ""), 300) for name in ("lacks", "waits_for"))
        waiting = self.host_wait.cloud_changed(cloud)
        for command in waiting if self.session.joined else ():
            self.next_attempt(command, "")
        if self.session.on_ok(message.fields):
            self.host_wait.restart()
            self.fetcher.restart()
            self.resubmit()

    def check_broker(self) -> None:
        """Give up if the broker is too old for our commands."""
        if not self.asks <= self.known and not self.left:
            self.effects.append(Notice(
                f"the broker at {self.address}, or one above it, is older than this program, and "
                f"knows no {KNOWN_BY_LABEL[min(self.asks - self.known)]}: update it", True))
            self.leave(UNABLE)

    def tell_old_hosts(self, hosts: Iterable[str]) -> None:
        """Tell once which hosts have workers that are too old for our commands."""
        new = {*map(self.host_names.name_of, hosts)} - self.old_hosts
        self.old_hosts |= new
        if new and self.asks:
            newest = [what for label, what in KNOWN_BY_LABEL.items() if label in self.asks][-1]
            self.effects.append(Notice(
                f"not used: {printable(', '.join(sorted(new)), 300)}: an older version of this "
                f"program runs there, which knows no {newest}"))

    def resubmit(self) -> None:
        """Submit all commands again, and repeat SHUN and CANCEL."""
        if self.accepted and self.now < self.long_pause[1]:  # results that came in time are read
            self.effects.append(Notice(
                f"was stopped for {self.long_pause[0]:.0f} s, longer than --client-lease: "
                f"{plural(self.accepted, 'command')} will be started again"))
        self.long_pause = (0, 0)
        for command in self.window.values():
            self.submit(command)
        if self.retry_policy.excluded or self.unfit:
            self.send_excluded()
        if self.status is not None:
            self.tell_broker("CANCEL")

    # --- results in

    def command_of(self, id: int, attempt: int) -> Optional[Command]:
        """Return the command whose present attempt this is; None if it is over."""
        command = self.window.get(id)
        return command if command is not None and command.attempt == attempt else None

    def set_worker(self, command: Command, worker: str) -> None:
        """Note which worker has the command's attempt, "" for none."""
        if bool(worker) != bool(command.worker):
            self.accepted += 1 if worker else -1
        command.worker = worker

    def on_queued(self, message: Message) -> None:
        fields = message.fields
        what, host = fields.get("preparing"), fields.get("host", "")
        for id, attempt in fields.get("tasks", ()):
            command = self.command_of(id, attempt)
            if command is not None:
                if not command.worker:
                    command.since = self.now
                self.set_worker(command, fields.get("worker") or "?")
                command.preparing = bool(what)
                if what:
                    self.offer.note(command.id, host and self.host_names.name_of(host),
                                    what == SETUP, self.now)
                else:
                    self.offer.forget(command.id)
                self.fetcher.listen(command, self.now)

    def on_result(self, message: Message) -> None:
        fields = message.fields
        if "id" not in fields or "attempt" not in fields:
            raise ProtocolError("RESULT needs 'id' and 'attempt'")
        if "host" in fields:
            fields["host"] = self.host_names.name_of(fields["host"])
        command = self.command_of(fields["id"], fields["attempt"])
        if command is not None and self.options.fail_on_missing:
            fail_if_missing(command, fields)
        if command is None:  # reported before: our DONE was lost
            self.acknowledge(fields["id"], fields["attempt"])
        elif command.result == fields:
            self.fetcher.add(command, fields, self.now)
        else:  # it differs from an earlier one if the command ran again after our lease ended
            self.fetcher.remove(command, self.now)
            self.host_wait.commands.pop(command.id, None)
            self.take_result(command, fields)

    def take_result(self, command: Command, fields: Fields) -> None:
        """Conclude a try. Fetch its large output first, if it is needed."""
        command.tries[command.attempt] = this = try_of(fields)
        if this.did_start:
            if self.wait.cause:  # none does wait, though no QUEUED has said so
                self.report_wait("")
            self.retry_policy.failed_starts.pop(this.host, None)
            self.host_wait.can_start.add(this.host)
        constraints = self.next_constraints(command)
        retried = this.exitcode and not command.rechecking and constraints
        if retried:
            self.keep_words(command, fields)
        output = to_bytes(fields.get("stdout", ""))
        # with never_on it is reported after all if no other host can start the command
        needed = not command.rechecking and (
            not retried or "never_on" in retried or self.options.read_tests)
        if needed and len(output) < stream_size(fields):
            self.fetcher.add(command, fields, self.now)
            return
        if needed and fields.get("returned"):
            self.effects.append(ReturnedPart(
                command, command.attempt, fields["returned"], 0, output[fields.get("size", 0):]))
        self.complete(command, fields)

    def keep_words(self, command: Command, fields: Fields) -> None:
        """Keep the end of a failed try's output."""
        kept = with_last_words(try_of(fields), fields, min(TRY_OUTPUT, self.try_room))
        command.tries[command.attempt] = kept
        self.try_room -= len(kept.output)

    def complete(self, command: Command, fields: Fields) -> None:
        """Conclude a try whose output and files are here, once its tests have been read. Until
        then no other output is fetched: it would replace this one."""
        if self.options.read_tests and not command.rechecking:
            command.reading = fields
            self.effects.append(ReadTests(command, fields))
        else:
            self.conclude_fetched(command, fields)

    def conclude_fetched(self, command: Command, fields: Fields) -> None:
        """Conclude a try whose output and files need no more to be fetched."""
        self.fetcher.remove(command, self.now)
        self.conclude(command, fields, inline_output(fields), self.next_constraints(command))

    def tests_read(self, command: Command, fields: Fields, fault: str) -> None:
        """Conclude a try. With a fault of its JUnit file it has failed."""
        if self.left or command.reading is not fields:  # it was cancelled, or lost meanwhile
            return
        if fault and not fields["exitcode"]:
            fields.update(exitcode=1, reason=fields.get("reason") or fault)
            self.keep_words(command, fields)
        self.conclude_fetched(command, fields)
        self.settle()

    def next_constraints(self, command: Command) -> Optional[Fields]:
        return self.retry_policy.next_constraints(command) if self.status is None else None

    def conclude(self, command: Command, fields: Fields, output: Optional[bytes],
                 constraints: Optional[Fields]) -> None:
        """Begin the next try with these constraints, or report this one. Fetched output: None."""
        if constraints is None and command.rechecking:
            self.report(command, command.provisional)
        elif constraints is None:
            self.report(command, fields, output)
        else:
            if not fields["exitcode"] or "never_on" in constraints:
                command.provisional, command.provisional_shown = fields, command.shown
                self.effects.append(ProvisionalResult(command, fields, output))
            if command.rechecking:
                self.rechecks.commands[command.id] = command
            self.acknowledge(command.id, command.attempt)
            self.next_attempt(command, fields.get("worker", ""), constraints)

    def next_attempt(self, command: Command, avoid: str,
                     constraints: Optional[Fields] = None) -> None:
        """Begin another attempt: with constraints another try, else the same try again."""
        self.end_attempt(command)
        if constraints is not None:
            command.constraints = dict(constraints, elsewhere=True)
        command.attempt += 1
        command.submitted = False
        command.avoid = avoid
        command.shown = 0
        if self.session.joined:
            self.submit(command)

    def end_attempt(self, command: Command) -> None:
        self.fetcher.remove(command, self.now)
        self.host_wait.commands.pop(command.id, None)
        self.offer.forget(command.id)
        command.put_off = command.preparing = False
        command.reading = {}
        self.set_worker(command, "")

    def forget(self, command: Command) -> None:
        """Take a command out of the window."""
        self.end_attempt(command)
        self.rechecks.commands.pop(command.id, None)
        del self.window[command.id]

    def report(self, command: Command, result: Fields, output: Optional[bytes] = None) -> None:
        self.announce()
        self.forget(command)
        self.acknowledge(command.id, command.attempt)
        if result is command.provisional:
            command.shown = command.provisional_shown
        tries, excluded = [*command.tries.values()], self.retry_policy.excluded
        command.verdict = FAIL if result["exitcode"] else verdict_of(tries, excluded)
        self.reported += 1
        self.failed += command.verdict == FAIL
        self.flaky += command.verdict in (FLAKY, ONLY)
        self.effects.append(FinalResult(command, result, output, result is command.provisional))
        for host, why in self.retry_policy.learn(command.verdict, tries).items():
            self.send_excluded()
            last = [one for one in tries if one.host == host][-1]
            words = last.reason or last.last_words().strip().rpartition("\n")[2]
            self.effects.append(Notice(
                f"EXCLUDING host {printable(host)} for the rest of this run, if there are others: "
                f"{EXCLUDE_AFTER} commands {why}" + (
                    f" (the last one: {printable(words, 300)})" if words else "")))

    @property
    def failures(self) -> int:
        """Return the number of reported commands that count as failed."""
        return self.failed + (self.flaky if self.options.fail_on_flaky else 0)

    def fail(self, command: Command, reason: str) -> None:
        """Report that a command could not be run."""
        self.report(command, {"exitcode": NOT_RUN, "time": 0.0, "reason": reason}, b"")

    def stop_rechecking(self) -> None:
        """Report overdue rechecks as passed."""
        rest = len(self.window) < self.window_size and (self.backlog or not self.input_ended)
        alone = not rest and 0 < len(self.window) == len(self.rechecks.commands)
        for command in self.rechecks.overdue(alone, self.now):
            self.report(command, command.provisional)

    def send_excluded(self) -> None:
        self.tell_broker("SHUN", {"hosts": sorted(
            map(self.host_names.identity_of, self.retry_policy.excluded.union(self.unfit)))})

    def acknowledge(self, id: int, attempt: int) -> None:
        """Let the worker forget this attempt: the next DONE lists it."""
        self.done.append([id, attempt])
        self.done_at = min(self.done_at, self.now + DONE_DELAY)

    def send_done(self) -> None:
        if self.done and self.session.joined:
            self.tell_broker("DONE", {"tasks": self.done})
            self.done, self.done_at = [], math.inf

    # --- lost attempts: the next attempt of a command

    def on_lost(self, message: Message) -> None:
        for id, attempt in message.fields["tasks"]:
            command = self.command_of(id, attempt)
            if command is not None:
                self.lose(command, message.fields)

    def lose(self, command: Command, fields: Fields) -> None:
        """Begin the next attempt of a command, or give the command up."""
        may_have_run = self.has_begun(command)
        command.may_have_run |= not command.preparing
        self.end_attempt(command)
        command.tries.pop(command.attempt, None)  # it ended, but its output is lost
        fault = fields.get("fault", "")
        if fault == UNFIT and self.status is None:
            self.note_unfit(fields)
        reason = command.faults.count(fault, printable(fields["why"], 200), self.times)
        if reason or self.status is not None:
            self.give_up(command, reason, may_have_run)
        elif fault == NOWHERE and not command.provisional and self.unfit:
            self.effects.append(Notice(NONE_LEFT, True))
            self.cancel(UNABLE, self.now)
            self.give_up(command, "", may_have_run)
        elif fault != NOWHERE or not command.provisional:
            self.next_attempt(command, fields.get("worker", ""))
        elif not self.host_wait.add(command, self.now):
            self.conclude(command, command.provisional, None, self.next_constraints(command))

    def has_begun(self, command: Command) -> bool:
        """Return whether the command may have run, or may run now."""
        return command.may_have_run or bool(
            command.tries or command.worker and not command.preparing)

    def note_unfit(self, fields: Fields) -> None:
        """Note that no workspace can be made on a host. Tell it once."""
        host, why = self.host_names.name_of(fields.get("host", "?")), fields["why"]
        if host not in self.unfit:
            self.unfit[host] = why
            self.send_excluded()
            output = fields.get("output", "")
            self.effects.append(Notice(
                f"host {printable(host)} is out of this run: {printable(why, 300)}" + (
                    "\n" + escape_unprintable(output).rstrip("\n") if output else ""), True))

    def give_up(self, command: Command, reason: str, may_have_run: bool) -> None:
        """End a command that gets no other attempt. It may have passed before."""
        if command.rechecking:
            self.report(command, command.provisional)
        elif self.status is None:
            self.fail(command, reason)
        else:
            self.stopped += may_have_run
            self.never_ran += not may_have_run
            self.forget(command)

    # --- outputs

    def ask(self, command: Command, offset: int, size: int) -> None:
        if self.session.joined:
            self.tell_broker("FETCH", {
                "id": command.id, "attempt": command.attempt, "offset": offset, "size": size})

    def on_chunk(self, message: Message) -> None:
        offset, size = message.fields["offset"], len(message.data)
        command = self.command_of(message.fields["id"], message.fields["attempt"])
        if command is None or not size:
            return
        if self.fetcher.accept_chunk(command, offset, size, self.now):
            result = command.result
            rows, output = result.get("returned", []), result.get("size", 0)
            self.effects.append(
                ReturnedPart(command, command.attempt, rows, offset - output, message.data)
                if rows and offset >= output else FetchedOutput(offset, message.data))
            if self.fetcher.stored >= stream_size(result):
                self.complete(command, result)
        elif self.options.live and not command.result and offset == command.shown:
            self.effects.append(LiveOutput(command, offset, message.data))
            command.shown += size
            self.fetcher.listen(command, self.now)

    def set_live(self, wanted: bool) -> None:
        """Request live output from now on, or no more while its reader is slow."""
        self.fetcher.live = wanted and self.options.live
        self.fetcher.live_overdue_at = self.now if wanted else math.inf

    # --- time, and the end

    def paused(self, gap: Seconds, now: Seconds) -> None:
        for command in self.host_wait.commands.values():
            command.wait_until += gap
        if gap > self.session.patience:
            self.long_pause = gap, now + self.session.patience

    def tick(self, now: Seconds) -> None:
        self.now = now
        if self.left:
            return
        self.session.tick(now)
        self.fetcher.tick(self.window.values(), now)
        if self.notice_at <= now:
            self.effects += map(Notice, self.offer.words(now))
            self.notice_at = now + TRANSFER_INTERVAL if self.offer.transfers else math.inf
        late = self.host_wait.overdue(now) if self.session.joined else ()
        if late:
            self.effects.append(Notice(f"gave up waiting for {self.host_wait.hosts()}"))
        for command in late:
            self.next_attempt(command, "")  # the last one before it gives up
        self.settle()
        timed_out = self.wait.timed_out(now)
        if not self.left and (timed_out or self.leave_at <= now):
            if timed_out:
                self.effects.append(Notice("gave up " + self.wait.cause, True))
            self.leave(UNABLE)

    def deadline(self) -> Seconds:
        """Return when tick() is due. The end of a HostWait may wait for the next heartbeat."""
        if self.left:
            return math.inf
        announce = math.inf if self.announced else self.announce_at
        done = self.done_at if self.session.joined else math.inf
        return min(self.session.next_greeting, announce, done, self.leave_at, self.notice_at,
                   self.rechecks.deadline, self.fetcher.overdue_at, self.fetcher.live_overdue_at,
                   self.wait.deadline())

    def wait_reason(self) -> str:
        """Return what the run waits for, and what to do; "" for nothing."""
        return broker_wait_reason(self.session, self.address, CLIENT_ROLE) or (
            slot_wait_reason(self) if self.window else "")

    def stop_early(self) -> None:
        """Cancel the run if --fail-fast asks for it."""
        rest = self.window or self.backlog or not self.input_ended
        if rest and 0 < self.options.fail_fast <= self.failures:
            have = "has" if self.failures == 1 else "have"
            self.effects.append(Notice(
                f"stopping: {plural(self.failures, 'command')} {have} failed (--fail-fast)"))
            self.cancel(SOME_FAILED, self.now)

    def on_stop(self, message: Message) -> None:
        """A user stops this run with `testcloud.py cancel`. It is told again when we join."""
        if self.status is None:
            by = printable(message.fields.get("by", ""), 2 * STATUS_LIMIT) or "?"
            self.effects.append(Notice(f"stopped by {by} (testcloud.py cancel)", True))
            self.cancel(128 + signal.SIGTERM, self.now)

    def cancel(self, status: int, now: Seconds) -> None:
        """Stop all commands. Leave 2 * kill_grace later; at once if not joined, or called again."""
        self.now = now
        self.cut_short |= not self.input_ended
        self.input_ended = True
        self.never_ran += len(self.backlog)
        self.backlog.clear()
        first = self.status is None
        self.status = self.status or status
        for command in [*self.window.values()]:
            if command.put_off or command.id in self.host_wait.commands:
                self.give_up(command, "", self.has_begun(command))
        if first and self.session.joined:
            self.wait = Wait()  # no more wait notices
            self.leave_at = now + 2 * self.times.kill_grace
            self.tell_broker("CANCEL")
            self.settle()
        elif not self.left:
            self.leave(status)

    def leave(self, status: int) -> None:
        """Say BYE and exit: with the status of a cancelled run, or else with this one."""
        self.send_done()
        if self.session.up:  # an unanswered HELLO may have reached the broker
            self.tell_broker("BYE")
        self.left = True
        self.effects.append(Exit(status if self.status is None else self.status))

    HANDLERS = {
        (BROKER, "OK"): "on_ok", (BROKER, "WHO"): "on_who", (BROKER, "QUEUED"): "on_queued",
        (BROKER, "RESULT"): "on_result", (BROKER, "CHUNK"): "on_chunk",
        (BROKER, "LOST"): "on_lost", (BROKER, "ERROR"): "on_error",
        (BROKER, "FETCH"): "on_fetch", (BROKER, "STOP"): "on_stop",
    }


def slot_wait_reason(client: Client) -> str:
    """Return why no command runs, and what to do; "" if one runs."""
    if client.wanted_hosts and not client.slots:
        if client.accepted or client.connected_hosts is None:
            return ""
        return "waiting: no host " + (
            "that is connected takes commands" if client.connected_hosts else "is connected")
    if not client.slots:
        return f"waiting: the broker at {client.address} has no worker" + (
            " that takes new commands: each is over its --max-load or lacks its --memfree, is "
            "stopping, or is a broker without workers" if client.workers else
            " (yet); start one with: testcloud.py worker")
    if client.lacks:
        return f"waiting for {client.lacks}; there is none among {plural(client.workers, 'worker')}"
    if client.accepted or client.fetcher.queue:
        return ""
    absent = client.host_wait
    if absent.commands:
        return (f"waiting for {absent.hosts()} to come back: "
                f"{plural(len(absent.commands), 'command')} could not be started elsewhere")
    if client.expecting:
        return (f"waiting for more hosts to connect: {client.connected_hosts} of "
                f"{client.wanted_hosts} are there, and cannot run what is left")
    if client.waits_for:
        return f"waiting for {client.waits_for}"
    which, first = str(client.slots), next(iter(client.window.values()))
    needs = first.own.get("needs", client.options.needs)
    if needs:
        which = f"of workers with {label_words(needs)}"
    never_on = first.constraints.get("never_on", ())
    if never_on:
        which = f"of hosts other than {printable(', '.join(never_on), 300)}"
    return f"waiting for a free slot: all {which} are busy, or the broker has just been started"


class ShowStatus(NamedTuple):
    """Effect: show this STATUS."""

    fields: Fields


class StatusClient(Machine):
    """Asks the broker for the state of the cloud, once or repeatedly. Its link is BROKER."""

    def __init__(self, address: str, wait: Seconds, interval: Seconds = math.inf) -> None:
        super().__init__()
        self.address = address  # for notices
        self.interval = interval  # between questions; inf: ask once
        self.up = self.joined = False  # connected; answered since then
        self.trouble = ""  # why the link cannot come up
        self.ask_at: Seconds = math.inf
        self.unanswered = 0  # questions
        self.wait = Wait(wait)
        self.host_names = HostNames()
        self.question: Tuple[str, Optional[Fields]] = ("STATUS", None)

    def connected(self, link: str, now: Seconds) -> None:
        self.up, self.trouble, self.ask_at, self.unanswered = True, "", now, 0
        self.tick(now)

    def disconnected(self, link: str, peer: Peer, now: Seconds) -> None:
        self.now, self.up, self.joined, self.ask_at = now, False, False, math.inf
        self.settle()

    def refused(self, link: str, why: str, now: Seconds) -> None:
        self.now, self.trouble = now, why
        self.settle()

    def on_status(self, message: Message) -> None:
        if not {"broker", "workers", "clients"} <= message.fields.keys():
            raise ProtocolError("STATUS needs 'broker', 'workers' and 'clients'")
        self.joined, self.unanswered = True, 0
        for row in message.fields["workers"]:
            row["host"] = self.host_names.name_of(row["host"])
        self.effects.append(ShowStatus(message.fields))
        if self.interval == math.inf:
            self.effects.append(Exit(0))

    def settle(self) -> None:
        self.report_wait(broker_wait_reason(self, self.address, CLIENT_ROLE))

    def tick(self, now: Seconds) -> None:
        self.now = now
        if self.ask_at <= now:
            self.say(BROKER, b"", "", *self.question)
            self.unanswered += 1
            self.ask_at = now + self.interval
        self.settle()
        if self.wait.timed_out(now):
            self.effects += [Notice("gave up " + self.wait.cause, True), Exit(UNABLE)]

    def deadline(self) -> Seconds:
        return min(self.ask_at, self.wait.deadline())

    HANDLERS = {(BROKER, "STATUS"): "on_status", (BROKER, "ERROR"): "on_error"}


class Canceller(StatusClient):
    """Asks the broker, once, to stop the run of a client: PID@HOST, as status shows it."""

    def __init__(self, address: str, wait: Seconds, client: Tuple[int, str], by: str) -> None:
        super().__init__(address, wait)
        pid, host = client
        self.client = f"{pid}@{printable(host)}"
        self.question = "STOP", {"pid": pid, "host": host, "by": by}

    def on_stop(self, message: Message) -> None:
        self.joined = True
        why = printable(message.fields.get("why", ""), 300)
        stops = "stops when it is back: its connection is broken" \
            if message.fields.get("away") else "has been told to stop"
        self.effects += [Notice(f"cannot stop {self.client}: {why}" if why else
                                f"{self.client} {stops}", bool(why)),
                         Exit(SOME_FAILED if why else 0)]

    def on_error(self, message: Message) -> None:
        """The broker does not understand us: only an older one knows no STOP."""
        reason = printable(message.fields.get("reason", ""), 200)
        self.effects += [Notice(
            f"the broker at {self.address} cannot stop clients ({reason}): update it, or stop "
            f"{self.client} on its own machine", True), Exit(UNABLE)]

    HANDLERS = {(BROKER, "STOP"): "on_stop", (BROKER, "ERROR"): "on_error"}


# === Reporting ========================================================================
#
# Reports turns each result into an Outcome, and passes it to one reporter for each format.
# The shared parts come first (stored results, stdout and the terminal, files); then each
# format has its section. The seed is the first testcloud, in PHP: the transcript keeps its
# format, and the result hash is the same.

MANUAL["reports"] = """\
    $ ls tests/test_*.py | testcloud.py client --junit a.xml --html a.html pytest -q {}
    $ git ls-files '*.sh' | testcloud.py client --raw -f --quiet shellcheck {}

The first line writes two reports beside the usual output. The second one prints the
outputs of failures, and nothing else.

What to show

@options client --progress --keep-order --tag --live --raw --brief --fail-only --slow
@options client --color --max-output --verbose --quiet

Results come on stdout as commands end, between a first line and the summary with the
result hash. Notices, warnings, advice and progress go to stderr.
An output has stdout and stderr in their order, and is passed on as it is. In the line
with the command, characters that would steer the terminal are escapes (\\x1b). A command
with many lines of the input (-n) is cut there. Reports, joblog and --json have all of it.

--progress shows how many commands are done, failed and running, the rate, the time left
and the workers. It is on if stderr is a terminal, but not if stdout is a pipe or TERM is
dumb. Where stderr is no terminal, it prints a line every 10 s, with the command that
takes longest. Without -p it prints that line only after a minute without other output.

--tag puts the line of the input and a tab before each line of output, but not with --raw
and --json. --live does so while the commands run. Then -k, -b and -f count only for the
lines of the results.

--raw keeps stdout and stderr apart, and prints nothing else on stdout. --max-output puts
a mark that says how much was cut off. --slow is seen with colours only. --verbose says
which host ran what.

A slow reader of stdout (`client | less`) holds up nothing but itself.

Reports in files

@options client --junit --html --results --force

Each of them is written whole or not at all, also after Ctrl-C. The page of --html has a
picture of the run, its failures and a filter, in one file.

--results makes a directory in DIR for each command, when it is reported. It has the files
stdout, stderr, cmd and exitcode. It is named by the command's name (--jsonl) or number,
and a / makes subdirectories. A name that clashes, or leads out of DIR, fails its command
before it runs.

DIR must be empty, but with --resume or --force. --force replaces the files of commands
that run again. All else stays, also what other commands left there.

If a report cannot be written any more (a full disk), the client names it. The run goes
on, and ends with status 3.

Tests

    $ ls tests/test_*.py | testcloud.py client --junit out.xml \\
          --junit-from 'reports/{#}.xml' pytest -q --junitxml=reports/{#}.xml {}

@options client --junit-from

Most test tools can write a JUnit file: pytest, PHPUnit, gotestsum, Jest. Each command
writes one of its own, below its directory. {#} and the like stand for the command's
arguments, as in a template. The client reads these files, from all hosts. Then --junit
has a case for each test, and --html and the summary count tests:

    2 of 64,204 tests failed in 1 of 18 commands

Below the first 10 failed commands, the summary names up to 10 of their tests. It does the
same for flaky commands.

Each suite of a file is a suite of the report. Its hostname is the host, and it has the
command as a property. A suite within a suite is put beside it.

If the file says that tests failed, the command has failed: with exit code 1, if its own
is 0. The same holds for a file that cannot be used:

    the command did not write it: an old file does not count
    it is no JUnit, or no whole XML
    it has a DOCTYPE, or is too large (see `help limits`)
    it counts failures, but no test case has one; or a failure is outside of test cases
    another command has the same file: then the second command does not run

A command is a test case of its own, in the suite testcloud, if no test shows how it ended:

    its file cannot be used
    it failed, and no test did (a crash after the tests, a coverage threshold)
    it is FLAKY or ONLY ON (see `help failures`), and no test is flaky
    it is FLAKY or ONLY ON, and --fail-on-flaky makes that a failure

This case has the output of the command.

With --retries the file of the reported try counts. A test that failed in an earlier try
gets the elements flakyFailure or flakyError, if it did not fail in the end. Otherwise it
gets rerunFailure or rerunError. Maven's surefire does the same. A test is known by its
suite, class and name; of equal ones, the first is the first of another try. The summary
counts tests only, not commands that are test cases. What the last try did not run is not
in the report.

With --sync the files come back into the tree, as those of --return. Without it they stay
where the command wrote them. Long texts lose their middle. When all texts together have
16 MiB, each further one is cut to 100 characters.

Result hash

@options client --expect

The hash tells whether two runs gave the same results, whoever ran what when. It takes the
commands in byte order, equal ones by exit code and then output. It starts from the text
Array. Each step is sha1(previous + command + exitcode + output), in lower-case hex.
--expect counts for --junit and --html, too. With -n, later runs may have other commands,
and so another hash.

With --results and --raw, stdout and stderr come apart. So the hash of commands that write
to both may differ from that of other runs, and so may their order in the transcript.
"""

Put = Callable[[Iterable[bytes]], None]  # queues the pieces of a text to be written
OutputOf = Callable[["Outcome"], Iterator[bytes]]  # reads an output in pieces
NAMED_FAILURES = 10  # in the summary: they fit on a screen


class Outcome(NamedTuple):
    """A reported command."""

    seq: int  # its number in the input, from 1
    cmd: str
    exitcode: int
    verdict: str
    failed: bool  # a flaky command may count as failed
    only_on: str  # the host, if the verdict is ONLY
    host: str  # of the reported try; "" if it never ran, as for the next three
    worker: str
    slot: int  # from 1
    started: float  # seconds since 1970
    spent: float  # ms
    signal: int
    reason: str  # why it could not be run, or was stopped
    tries: Tuple[Try, ...]  # the others, in order
    shown: int  # bytes of its output that were shown live
    stored: StoredResult
    line: str  # of the input, from which the command was made; its name, if it has one
    occurrence: int  # number of equal commands before it in the input; 0 without a joblog
    returned: Optional[List[str]] = None  # files that were written; None without --return
    name: str = ""  # of the command, instead of its text
    lines: int = 1  # of the input, in a batch (-n)
    nth: int = 0  # number of tries before the reported one
    did_start: bool = True  # in the reported try
    tests: Optional[Tests] = None  # that its JUnit file has; None: no file was to come

    @property
    def title(self) -> str:
        """Return what reports call it."""
        return self.name or self.cmd

    @property
    def cause(self) -> str:
        """Return why it failed or was stopped, as far as we know; or ""."""
        if self.failed and not self.reason and self.tests is not None:
            return self.tests.describe()
        return self.reason

    @property
    def ended_itself(self) -> bool:
        """Return whether its time tells how long it takes, though it may have failed."""
        tests_failed = self.tests is not None and self.reason == self.tests.failure_reason
        return bool(self.host) and (not self.reason or tests_failed)


class Summary(NamedTuple):
    """The end of a run."""

    complete: bool
    ran: int
    flaky: int
    only_on: Dict[str, int]  # commands that failed only there, by host
    skipped: int  # commands that an earlier run has done
    skipped_failed: int  # skipped commands that failed
    spent: Seconds
    hash: str
    wrong_hash: str = ""  # the error message, if another hash was expected
    started_elsewhere: Dict[str, int] = {}  # commands that only others could start, by host
    codes: Dict[str, int] = {}  # failed commands by kind
    failures: Sequence[Outcome] = ()  # the first NAMED_FAILURES
    flaky_ones: Sequence[Outcome] = ()  # of those that did not fail; as many
    bad_hosts: str = ""  # advice about hosts where everything failed
    rerun: str = ""  # command line that runs the failures again, if any
    empty: bool = False  # the input had no commands, and that is an error
    tests: Optional[Counter[str]] = None  # test cases by kind, with --junit-from
    unused_hosts: Sequence[str] = ()  # hosts that were given up
    skipped_failures: Sequence[str] = ()  # the first NAMED_FAILURES skipped commands that failed

    def all_passed(self) -> bool:
        return self.complete and not (self.codes or self.skipped_failed or self.empty)

    def trouble(self) -> str:
        """Return the fault of the whole run, or ""."""
        if not self.complete:
            return "not all commands were executed"
        earlier = f"{plural(self.skipped_failed, 'command')} failed in an earlier run"
        return "the input had no commands" if self.empty else "; ".join(
            filter(None, (self.wrong_hash, earlier * bool(self.skipped_failed))))


def describe_tries(outcome: Outcome, escape: Callable[[str], str]) -> str:
    """Return the exit codes and hosts of all tries, in order."""
    tries: List[Union[Outcome, Try]] = [
        *outcome.tries[:outcome.nth], outcome, *outcome.tries[outcome.nth:]]
    words = (f"{one.exitcode} on {escape(one.host or '?')}"
             + ("" if one.did_start else " (not started)") for one in tries)
    runs = ((how, len([*equal])) for how, equal in itertools.groupby(words))
    shown = ", ".join(how if n == 1 else f"{how} ({n} times)" for how, n in runs)
    return f"tried {len(tries)} times: exit code {truncate_middle(shown)}"


class Reporter:
    """Reports in one format. The loop's thread calls it; a Writer's thread reads the outputs."""

    path = ""  # of its file, if any

    def expect(self, seq: int) -> None:
        """Note that this command will be reported."""

    def started(self, commands: Optional[int]) -> None:
        """Report the start, with the number of commands; None: the input has not ended."""

    def live(self, seq: int, line: str, offset: int, data: bytes) -> None:
        """Show output of the command of this input line. Offset 0 begins another try."""

    def result(self, outcome: Outcome) -> None:
        """Report a command. Raises OSError."""

    def ended(self, summary: Summary) -> None:
        """Report the end of the run. Raises OSError."""


class Reports:
    """Turns the client's effects into outcomes for all reporters, and counts for the summary."""

    def __init__(self, client: Client, store: ResultStore, reporters: Sequence[Reporter],
                 files: Optional[ReturnedFiles] = None,
                 tests: Optional[TestFiles] = None) -> None:
        self.client = client
        self.store = store
        self.files = files  # with --return
        self.tests = tests  # with --junit-from
        self.reporters = list(reporters)
        self.provisional: Dict[int, Tuple[StoredResult, str]] = {}  # by command, as of put()
        # of unreported commands: (name, line, occurrence, lines)
        self.expected: Dict[int, Tuple[str, str, int, int]] = {}
        self.pieces: Dict[int, PieceReader] = {}  # of split outputs that are shown live
        self.codes: Counter[str] = Counter()  # failures by kind
        self.test_counts: Counter[str] = Counter()
        self.failures: List[Outcome] = []  # the first NAMED_FAILURES
        self.flaky_ones: List[Outcome] = []  # of those that did not fail; as many
        self.passes: Counter[str] = Counter()  # passed commands by host
        self.fails: Counter[str] = Counter()  # failed commands by host
        self.write_failed = False  # a report could not be written
        self.times = array.array("d")  # ms; a list would take four times the memory
        self.began = time.monotonic()

    def expect(self, seq: int, line: str, occurrence: int = 0, name: str = "",
               lines: int = 1) -> None:
        """Note a command of this input line. Reports call it by its name, if it has one."""
        self.expected[seq] = name, name or line, occurrence, lines
        for reporter in self.reporters:
            reporter.expect(seq)

    def started(self, effect: RunStarted) -> None:
        self.tell_all(lambda reporter: reporter.started(effect.commands))

    def live(self, effect: LiveOutput) -> None:
        id, data = effect.command.id, bytes(effect.data)
        line = self.expected[id][1]
        if self.store.split:
            if effect.offset == 0:
                self.pieces[id] = PieceReader()
            data = b"".join(piece for _, piece in self.pieces[id].take(data))
        self.tell_all(lambda reporter: reporter.live(id, line, effect.offset, data))

    def keep(self, effect: ProvisionalResult) -> None:
        self.provisional[effect.command.id] = self.put(effect)

    def put(self, effect: Union[ProvisionalResult, FinalResult]) -> Tuple[StoredResult, str]:
        """Store a result, or a failure if its output has no room. Return it and the reason."""
        cmd, output = to_bytes(effect.command.cmd), effect.output
        if output and self.store.split and not effect.result.get("split"):  # of a plain worker
            output = PIECE_HEADER.pack(1, len(output)) + output
        try:
            return self.store.put(cmd, effect.result["exitcode"], output), ""
        except OSError as error:
            return (self.store.put(cmd, NOT_RUN, b""), f"no room for its output in "
                    f"{tempfile.gettempdir()} of the client: {error.strerror}")

    def report(self, effect: FinalResult) -> None:
        command, result = effect.command, effect.result
        provisional = self.provisional.pop(command.id, None)
        self.pieces.pop(command.id, None)
        stored, lost = provisional if provisional and effect.provisional else self.put(effect)
        self.store.results.append(stored)
        verdict = FAIL if stored.exitcode else command.verdict
        tries = [row for attempt, row in command.tries.items() if attempt != result.get("attempt")]
        nth = sum(attempt < result.get("attempt", math.inf) for attempt in command.tries)
        name, line, occurrence, lines = self.expected.pop(command.id)
        returned = self.files.finish(effect) if self.files else None
        outcome = Outcome(
            command.id, command.cmd, stored.exitcode, verdict,
            failed=verdict == FAIL or verdict != OK and self.client.options.fail_on_flaky,
            only_on=only_host(tries) if verdict == ONLY else "", host=result.get("host", ""),
            worker=result.get("worker", ""), slot=result.get("slot", 0),
            started=result.get("started", 0.0), spent=result.get("time", 0.0),
            signal=result.get("signal", 0), reason=lost or result.get("reason", ""),
            tries=tuple(tries), shown=command.shown, stored=stored, line=line,
            occurrence=occurrence, returned=returned, name=name, lines=lines,
            nth=nth, did_start=try_of(result).did_start,
            tests=self.tests.finish(command.id, result.get("attempt", 0)) if self.tests else None)
        self.count(outcome)
        self.tell_all(lambda reporter: reporter.result(outcome))

    def count(self, outcome: Outcome) -> None:
        if outcome.failed:
            self.codes["flaky" if not outcome.exitcode else f"exit code {outcome.exitcode}"] += 1
            if len(self.failures) < NAMED_FAILURES:
                self.failures.append(outcome)
        elif outcome.verdict != OK and len(self.flaky_ones) < NAMED_FAILURES:
            self.flaky_ones.append(outcome)
        if outcome.did_start:
            (self.fails if outcome.verdict == FAIL else self.passes)[outcome.host] += 1
        self.times.append(outcome.spent)
        if self.tests:
            self.test_counts += case_counts(outcome)

    def tell_all(self, tell: Callable[[Reporter], None]) -> None:
        """Tell all reporters. Drop a reporter that cannot write its file."""
        for reporter in [*self.reporters]:
            try:
                tell(reporter)
            except OSError as error:
                self.reporters.remove(reporter)
                self.write_failed = True
                print_notice(f"cannot write {printable(reporter.path)}: {error.strerror}; this "
                             "report is given up")

    def bad_hosts(self) -> str:
        """Return advice about hosts where all failed, while some passed elsewhere; or ""."""
        bad = [host for host, failed in self.fails.most_common(NAMED_FAILURES)
               if host and failed >= EXCLUDE_AFTER and self.passes and not self.passes[host]]
        failed = sum(self.fails[host] for host in bad)
        total = plural(sum(self.fails.values()), "failure")
        advice = (f"{failed} of {total} were on {printable(', '.join(bad), 300)}, where nothing "
                  f"passed; try --retries 3")
        return advice if bad else ""

    def end(self, complete: bool, skipped: int = 0, skipped_failed: int = 0,
            expected: Optional[str] = None, rerun: str = "", may_be_empty: bool = True,
            unused_hosts: Sequence[str] = (), skipped_failures: Sequence[str] = ()) -> Summary:
        client, found, ran = self.client, self.store.hash(), len(self.store.results)
        wrong = f"the result hash is {found}, and not {expected} as expected"
        summary = Summary(
            complete, ran, client.flaky, only_on=dict(client.retry_policy.failed_only_on),
            started_elsewhere=dict(client.retry_policy.started_elsewhere),
            skipped=skipped, skipped_failed=skipped_failed, skipped_failures=skipped_failures,
            spent=time.monotonic() - self.began,
            hash=found, wrong_hash=wrong if expected and expected != found else "",
            codes=dict(self.codes), failures=self.failures, rerun=rerun,
            flaky_ones=self.flaky_ones,
            bad_hosts="" if client.options.tries > 1 else self.bad_hosts(),
            empty=complete and not may_be_empty and not ran and not skipped,
            tests=self.test_counts if self.tests else None, unused_hosts=unused_hosts)
        self.tell_all(lambda reporter: reporter.ended(summary))
        return summary


class Filter(Reporter):
    """Filters outcomes (--fail-only) and orders them (--keep-order)."""

    def __init__(self, reporters: Sequence[Reporter], fail_only: bool, keep_order: bool) -> None:
        self.reporters = reporters
        self.fail_only = fail_only
        self.keep_order = keep_order
        self.order: Deque[int] = deque()  # commands to pass on next
        self.early: Dict[int, Outcome] = {}  # outcomes that wait for an earlier one

    def expect(self, seq: int) -> None:
        if self.keep_order:
            self.order.append(seq)

    def started(self, commands: Optional[int]) -> None:
        for reporter in self.reporters:
            reporter.started(commands)

    def result(self, outcome: Outcome) -> None:
        self.early[outcome.seq] = outcome
        if not self.keep_order:
            self.order.append(outcome.seq)
        while self.order and self.order[0] in self.early:
            self.send_line(self.early.pop(self.order.popleft()))

    def send_line(self, outcome: Outcome) -> None:
        if outcome.verdict != OK or not self.fail_only:
            for reporter in self.reporters:
                reporter.result(outcome)

    def ended(self, summary: Summary) -> None:
        for seq in sorted(self.early):  # those before them never ran
            self.send_line(self.early[seq])
        for reporter in self.reporters:
            reporter.ended(summary)


# === Stored results ===================================================================
#
# The result hash takes commands in byte order. So all outputs wait in unlinked files until
# the end. Memory holds one block of them at a time.

BLOCK_SIZE = 3 * 256 * 1024  # bytes of an output in memory at once; a multiple of 3, for base64


class StoredResult(NamedTuple):
    """The parts of a result that the hash covers."""

    cmd: bytes
    exitcode: int
    file: int  # index into ResultStore.files
    offset: int
    size: int


class ResultStore:
    """Stores the results with their outputs, and makes the seed's hash of them."""

    def __init__(self, split: bool = False) -> None:
        self.split = split  # outputs consist of pieces, each after a PIECE_HEADER
        self.results: List[StoredResult] = []  # reported ones
        self.files = open_spool(), open_spool()  # inline outputs; fetched ones, which come in parts
        self.ends = [0, 0]  # bytes of each file that belong to results
        self.stored = 0  # bytes of the output being fetched, after these
        self.failure: Optional[OSError] = None  # why it cannot be stored

    def put_part(self, part: FetchedOutput) -> None:
        """Store the next part of a fetched output. An error is raised by put()."""
        self.stored = part.offset + len(part.data)
        if part.offset == 0:
            self.failure = None
        if not self.failure:
            try:
                write_all(self.files[1], part.data, self.ends[1] + part.offset)
            except OSError as error:
                self.failure = error
                os.ftruncate(self.files[1].fileno(), self.ends[1])

    def put(self, cmd: bytes, exitcode: int, output: Optional[bytes]) -> StoredResult:
        """Store a result; None is the fetched output. Raises OSError if it has no room."""
        if output is None and self.failure:
            raise self.failure
        file, size = (1, self.stored) if output is None else (0, len(output))
        if output:
            write_all(self.files[0], output, self.ends[0])
        result = StoredResult(cmd, exitcode, file, self.ends[file], size)
        self.ends[file] += size
        return result

    def streams(self, result: StoredResult, start: int = 0) -> Iterator[Tuple[int, bytes]]:
        """Yield an output in pieces of at most BLOCK_SIZE bytes, each with its stream: 1 is
        stdout, 2 stderr. Leave out the first `start` bytes that are stored. Thread-safe."""
        file, reader = self.files[result.file].fileno(), PieceReader()

        def read(begin: int, end: int) -> Iterator[Tuple[int, bytes]]:
            for at in range(begin, end, BLOCK_SIZE):
                block = os.pread(file, min(BLOCK_SIZE, end - at), result.offset + at)
                yield from reader.take(block) if self.split else [(1, block)]
        if self.split:  # what is left out may end within a piece
            deque(read(0, start), 0)
        yield from read(start, result.size)

    def output(self, result: StoredResult, start: int = 0) -> Iterator[bytes]:
        return (piece for _, piece in self.streams(result, start))

    def compare(self, a: StoredResult, b: StoredResult) -> int:
        """Return -1, 0 or 1: the byte order of two outputs."""
        left, right = in_blocks(self.output(a)), in_blocks(self.output(b))
        for x, y in itertools.zip_longest(left, right, fillvalue=b""):
            if x != y:
                return -1 if x < y else 1
        return 0

    def hash(self) -> str:
        """Return the seed's result hash: a sha1 chain over the results in order of command, exit
        code and output. Each link hashes the last hex digest ('Array' at first) and a result."""
        def head(result: StoredResult) -> Tuple[bytes, int]:
            return result.cmd, result.exitcode
        total = "Array"
        for _, same in itertools.groupby(sorted(self.results, key=head), key=head):
            for result in sorted(same, key=functools.cmp_to_key(self.compare)):
                sha = hashlib.sha1(total.encode() + result.cmd + b"%d" % result.exitcode)
                for piece in self.output(result):
                    sha.update(piece)
                total = sha.hexdigest()
        return total


class PieceReader:
    """Takes a split output apart."""

    def __init__(self) -> None:
        self.stream, self.left = 1, 0  # of the present piece; bytes of it that are to come
        self.head = b""  # a part of a PIECE_HEADER

    def take(self, block: bytes) -> Iterator[Tuple[int, bytes]]:
        """Yield the pieces in the next block, each with its stream. A block may end anywhere."""
        data, at = self.head + block, 0
        while at < len(data) and (self.left or len(data) - at >= PIECE_HEADER.size):
            if not self.left:
                self.stream, self.left = PIECE_HEADER.unpack_from(data, at)
                at += PIECE_HEADER.size
            piece = data[at:at + self.left]
            at, self.left = at + len(piece), self.left - len(piece)
            if piece:
                yield self.stream, piece
        self.head = data[at:]


def in_blocks(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the same bytes in blocks of BLOCK_SIZE; the last one may be shorter."""
    rest = b""
    for piece in pieces:
        rest = rest + piece if rest else piece
        while len(rest) >= BLOCK_SIZE:
            yield rest[:BLOCK_SIZE]
            rest = rest[BLOCK_SIZE:]
    if rest:
        yield rest


def head_and_tail(pieces: Iterable[bytes], first: int, last: int) -> Tuple[bytes, int, bytes]:
    """Return the first bytes, the number of bytes left out, and the last bytes of an output."""
    head, tail, size = b"", b"", 0
    for piece in pieces:
        room = first - len(head)
        head += piece[:room]
        tail = (tail + piece[room:])[-last:]
        size += len(piece)
    return head, size - len(head) - len(tail), tail


# === Terminal and stdout ==============================================================
#
# A thread writes to stdout, because its reader may stop reading for hours. The last line of
# the terminal shows the progress. It is hidden while something else is written.


class ProgressLine:
    """Shows the progress in the last line of the terminal, unless an output has not ended its."""

    def __init__(self) -> None:
        self.text = ""  # to show
        self.drawn = 0  # columns of the text on the screen
        self.mid_line = False  # the last output did not end its line
        self.last_write: Seconds = 0.0  # time.monotonic() when something visible was written
        self.lock = threading.RLock()

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        with self.lock:
            self.draw("")
            yield
            self.draw("" if self.mid_line else self.text)

    def redraw(self) -> None:
        with self.hidden():
            pass

    @contextlib.contextmanager
    def at_line_start(self) -> Iterator[None]:
        """Hide it while the caller writes whole lines to stderr; end an output's line first."""
        self.last_write = time.monotonic()
        with self.hidden():
            sys.stderr.writelines(self.finish_line())
            yield

    def finish_line(self) -> Iterator[str]:
        """Yield a newline if the last output needs one."""
        if self.mid_line:
            self.mid_line = False
            yield "\n"

    def tracked(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield pieces of output, and note whether they end their line."""
        for piece in pieces:
            if piece:
                self.mid_line = piece[-1:] != b"\n"
            yield piece

    def draw(self, text: str) -> None:
        if not text and not self.drawn:
            return
        dumb = is_dumb()
        with contextlib.suppress(OSError, ValueError):  # the terminal has gone
            columns = max(10, screen_size(2)[0])
            text = text[:columns - 1]
            rows = (self.drawn - 1) // columns  # not 0 if the terminal has become narrower
            # not \033[J: at the top of a screen, tmux and others take that for a new page
            clear = f"{' ' * min(self.drawn, columns - 1)}\r" if dumb else "\033[K"
            wipe = "\r" + clear + (0 if dumb else rows) * f"\033[A{clear}"
            sys.stderr.write((wipe if self.drawn else "") + text)
            sys.stderr.flush()
        self.drawn = len(text)


def is_dumb() -> bool:
    """Return whether the terminal cannot move its cursor."""
    return os.environ.get("TERM", "dumb") == "dumb"


def screen_size(file: int) -> Tuple[int, int]:
    """Return columns and rows of a terminal; 80 and 24 if unknown. Raises OSError."""
    columns, rows = os.get_terminal_size(file)
    return columns or 80, rows or 24


PROGRESS_LINE = ProgressLine()


def print_notice(text: str) -> None:
    """Write a line to stderr for the user."""
    if sys.stderr is not None:  # closed: print() would take stdout
        with contextlib.suppress(OSError), PROGRESS_LINE.at_line_start():
            print(f"testcloud: {text}", file=sys.stderr, flush=True)


class LogHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes the log to stderr, and not over the progress line."""

    def emit(self, record: logging.LogRecord) -> None:
        with PROGRESS_LINE.at_line_start():
            super().emit(record)


class Writer:
    """Writes to a file descriptor in a thread of its own: a write may block for hours."""

    MAX_BACKLOG = 4 * 1024 * 1024  # bytes; with more the thread is behind

    def __init__(self, file: int, failed: Callable[[OSError], None]) -> None:
        self.file = file
        # the thread calls these
        self.failed = failed
        self.ended: Callable[[], None] = lambda: None  # when all is written
        self.caught_up: Callable[[], None] = lambda: None  # when it is no longer behind
        self.batch: List[Iterable[bytes]] = []  # the items until flush()
        self.batches: queue.SimpleQueue[Optional[List[Iterable[bytes]]]] = queue.SimpleQueue()
        self.taken = self.written = 0  # bytes of items with a size
        self.awaited = False  # caught_up() is due
        threading.Thread(target=self.write, daemon=True, name="output").start()

    def put(self, item: Iterable[bytes], size: int = 0) -> None:
        """Write an item after flush(). Its size in bytes counts as backlog."""
        self.taken += size
        self.batch.append(self.counted(item, size) if size else item)

    def counted(self, item: Iterable[bytes], size: int) -> Iterator[bytes]:
        yield from item
        self.written += size
        if self.awaited and self.taken - self.written <= self.MAX_BACKLOG:
            self.awaited = False
            self.caught_up()

    def is_behind(self) -> bool:
        """Return whether the backlog is too large. If so, caught_up() follows."""
        self.awaited = True  # first: the thread may catch up just now
        self.awaited = self.taken - self.written > self.MAX_BACKLOG
        return self.awaited

    def flush(self) -> None:
        if self.batch:
            self.batches.put(self.batch)
            self.batch = []

    def redraw(self) -> None:
        """Draw the progress line, unless a write blocks."""
        if self.batches.empty():
            self.batches.put([])

    def end(self, ended: Callable[[], None]) -> None:
        """Write the rest, then call ended() in the thread."""
        self.ended = ended
        self.flush()
        self.batches.put(None)

    def write(self) -> None:
        try:
            shared = os.isatty(self.file)  # with the progress line
            seen = shared or stat.S_ISFIFO(os.fstat(self.file).st_mode) or (
                sys.stderr is not None and os.path.sameopenfile(self.file, 2))
            tracked = PROGRESS_LINE.tracked if shared and os.isatty(2) else iter
            # not sys.stdout: its lock, held by this thread, would abort the exit of Python
            with io.BufferedWriter(BlockingFile(self.file, "w", closefd=False)) as out:
                for batch in iter(self.batches.get, None):
                    with PROGRESS_LINE.hidden() if shared else contextlib.nullcontext():
                        out.writelines(tracked(itertools.chain.from_iterable(batch)))
                        if self.batches.empty() or shared:
                            out.flush()
                    if batch and seen:
                        PROGRESS_LINE.last_write = time.monotonic()
                    if PROGRESS_LINE.text and not shared:
                        PROGRESS_LINE.redraw()
            self.ended()
        except OSError as error:
            self.failed(error)


# === Report files =====================================================================
#
# A report file is replaced as a whole, or stays unchanged. Pipes, devices and our own stdout
# and stderr are written directly.

UNFINISHED = ".testcloud-"  # begins the names of files that are not whole yet
STANDARD_STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}  # a rename would replace these links


def is_replaceable(path: str) -> bool:
    """Return whether a path is a regular file or nothing yet, and not our stdout or stderr."""
    try:
        return path not in STANDARD_STREAMS and stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True


def write_atomically(path: str, pieces: Iterable[str], durable: bool = True) -> None:
    """Replace a file when the new one is complete, with `durable` on the disk. Raises OSError."""
    if not is_replaceable(path):
        with open_text(open_blocking(path, "w")) as stream:
            stream.writelines(pieces)
        return
    target = os.path.realpath(path)  # a link stays a link
    new = os.path.join(os.path.dirname(target), UNFINISHED + os.urandom(8).hex())
    file = BlockingFile(new, "x")  # not tempfile: its files are private, whatever the umask
    try:
        with open_text(file) as stream:
            with contextlib.suppress(OSError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode))
            stream.writelines(pieces)
            stream.flush()
            if durable:
                os.fsync(file.fileno())
        try:
            os.replace(new, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            shutil.copyfile(new, target)  # a mount point, as Docker makes of a single file
            os.unlink(new)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


MAX_CACHED = 20  # files of one kind in our cache; the oldest go
# names of these files; others may be there if somebody calls a directory testcloud
CACHED_FILE = re.compile(rf"[0-9a-f]+\.json|{re.escape(UNFINISHED)}.*")


def write_cache(path: str, text: str) -> None:
    """Write a file of cache_path(). Remove the oldest files beside it. It may fail."""
    directory = os.path.dirname(path)
    with contextlib.suppress(OSError):
        os.makedirs(directory, 0o700, exist_ok=True)
        write_atomically(path, [text], durable=False)
        files = [file for file in os.scandir(directory) if CACHED_FILE.fullmatch(file.name)]
        for old in sorted(files, key=lambda file: file.stat().st_mtime)[:-MAX_CACHED]:
            os.unlink(old.path)


class BlockingFile(io.FileIO):
    """File that blocks even if ssh, say, has set our shared terminal or pipe to O_NONBLOCK."""

    def readinto(self, buffer: Any) -> int:
        return self.until_done(super().readinto, buffer, select.POLLIN)

    def write(self, data: Any) -> int:
        return self.until_done(super().write, data, select.POLLOUT)

    def until_done(self, act: Callable[[Any], Optional[int]], data: Any, event: int) -> int:
        done = act(data)
        while done is None:
            poller = select.poll()
            poller.register(self, event)
            poller.poll()
            done = act(data)
        return done


def open_blocking(path: str, mode: str) -> BlockingFile:
    """Return an open file or pipe. A notice tells if that takes long. Raises OSError."""
    words = f"waiting for {printable(path)}: it is a pipe, and its other end is not open"
    timer = threading.Timer(NOTICE_DELAY, print_notice, [words])
    timer.daemon = True
    if not is_replaceable(path):
        timer.start()
    ours = None if mode == "r" else STANDARD_STREAMS.get(path)
    try:
        return BlockingFile(path if ours is None else os.dup(ours), mode)
    finally:
        timer.cancel()


def open_text(file: BlockingFile) -> IO[str]:
    return io.TextIOWrapper(io.BufferedWriter(file), "utf-8", "surrogateescape", "")


def make_blocking(name: str) -> None:
    """Let sys.stdout or sys.stderr block, unless it is closed or replaced."""
    stream = getattr(sys, name)
    if stream is not None and stream is getattr(sys, f"__{name}__"):
        raw = BlockingFile(stream.fileno(), "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(
            io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True))


class FinalReport(Reporter):
    """Report file about all outcomes, written at the end of the run."""

    def __init__(self, path: str, store: ResultStore) -> None:
        """Check that the file can be written. Raises OSError."""
        self.path = path
        self.store = store
        self.outcomes: List[Outcome] = []
        folder = os.path.dirname(os.path.realpath(path))
        if os.path.isdir(path):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if is_replaceable(path) and not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES) if os.path.isdir(folder)
                          else "no such directory")

    def result(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def output_of(self, outcome: Outcome) -> Iterator[bytes]:
        return self.store.output(outcome.stored)

    def ended(self, summary: Summary) -> None:
        write_atomically(self.path, self.content(summary))

    def content(self, summary: Summary) -> Iterator[str]:
        raise NotImplementedError


# === Returned files ===================================================================
#
# Files that commands bring back (--return) are written below a directory, the tree's top here.
# Contents go to a temporary name beside the file as they come. The file gets its own name when
# its result is reported: it is whole or unchanged, and of the reported try. No link is followed.


class ReturnedFiles:
    """Writes returned files below `top`. `tell(text, error)` tells the user what is not there;
    missing files only with `tell_missing`. `replacing(path)` comes before a file is replaced."""

    def __init__(self, top: str, tell: Callable[[str, bool], None], tell_missing: bool = True,
                 replacing: Callable[[str], None] = lambda path: None) -> None:
        self.top = top
        self.tell = tell
        self.tell_missing = tell_missing
        self.replacing = replacing
        self.mark = UNFINISHED + os.urandom(8).hex()  # temporary names begin with it
        # by command: (the command, attempts of which something was stored)
        self.begun: Dict[int, Tuple[Command, Set[int]]] = {}
        self.faults: Dict[str, str] = {}  # why a file is not stored, by temporary name
        self.lacking = self.unwritten = 0  # commands without a file; files

    def files_of(self, command: Command, attempt: int) -> Iterator[Tuple[str, str]]:
        """Yield the path of each file, and its temporary path."""
        for index, path in enumerate(command.returns):
            path = path_below(command.cwd, path)
            folder = path[:len(path) - len(os.path.basename(path))]
            yield path, f"{folder}{self.mark}-{command.id}-{attempt}-{index}"

    def put_part(self, part: ReturnedPart) -> None:
        """Store the next part of the files' contents. An error is told by finish()."""
        _, attempts = self.begun.setdefault(part.command.id, (part.command, set()))
        if part.offset == 0 and part.attempt in attempts:  # they begin anew
            self.drop(part.command, part.attempt)
        attempts.add(part.attempt)
        names = [new for _, new in self.files_of(part.command, part.attempt)]
        for index, offset, piece in part.pieces():
            new = names[index]
            if new not in self.faults:
                try:
                    with self.opened(new) as (file, _):
                        write_all(file, piece, offset)
                except OSError as error:
                    self.faults[new] = error.strerror or "error"

    @contextlib.contextmanager
    def opened(self, new: str) -> Iterator[Tuple[IO[bytes], int]]:
        """Open a temporary file. Yield it with the descriptor of its directory. Raises OSError."""
        with directory_below(self.top, new, make=True) as (folder, name), \
                open(open_no_link(name, os.O_WRONLY | os.O_CREAT, folder), "wb", 0) as file:
            yield file, folder

    def finish(self, effect: FinalResult) -> List[str]:
        """Give the files of a result their names. Return the paths of those that are there."""
        command, result = effect.command, effect.result
        attempt, rows = result.get("attempt", 0), result.get("returned", ())
        _, others = self.begun.pop(command.id, (command, set()))
        others.discard(attempt)
        written = []
        for (path, new), row in zip(self.files_of(command, attempt), rows):
            full = os.path.join(self.top, path)
            try:
                if row:
                    self.rename(new, path, *row)
                    written.append(full)
            except OSError as error:
                others.add(attempt)
                self.unwritten += 1
                if self.unwritten <= NAMED_FAILURES:
                    self.tell(f"cannot write {printable(full, 300)}: {error.strerror}", True)
        for other in others:
            self.drop(command, other)
        missing = missing_files(command.returns, result)
        reason = result.get("reason", "")
        if missing and self.tell_missing and not (reason and result["exitcode"]):
            self.lacking += 1
            if self.lacking <= NAMED_FAILURES:
                names, host = printable(", ".join(missing), 300), printable(result.get("host", "?"))
                self.tell(f"{printable(command.title)} brought no "
                          f"{noun(len(missing), 'file')} {names} from {host}"
                          + (f": {printable(reason, 300)}" if reason else ""), False)
        return written

    def rename(self, new: str, path: str, mode: int, size: int) -> None:
        """Give a whole file its name and mode. Raises OSError."""
        if new in self.faults:
            raise OSError(errno.EIO, self.faults[new])
        name = to_bytes(os.path.basename(path))
        with self.opened(new) as (file, folder):  # an empty one was not begun
            if os.fstat(file.fileno()).st_size != size:
                raise OSError(errno.EIO, "its worker sent only a part")
            os.fchmod(file.fileno(), mode & 0o777)
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if not stat.S_ISREG(there.st_mode):
                    raise OSError(errno.EEXIST, "what is there is no regular file")
                self.replacing(path)
            os.rename(to_bytes(os.path.basename(new)), name, src_dir_fd=folder, dst_dir_fd=folder)

    def drop(self, command: Command, attempt: int) -> None:
        """Remove what is stored of an attempt."""
        for _, new in self.files_of(command, attempt):
            self.faults.pop(new, None)
            with contextlib.suppress(OSError), directory_below(self.top, new) as (folder, name):
                os.unlink(name, dir_fd=folder)

    def close(self) -> None:
        """Remove what belongs to no reported result."""
        for command, attempts in self.begun.values():
            for attempt in attempts:
                self.drop(command, attempt)

    def tell_rest(self) -> None:
        """Tell in numbers what was not told one by one."""
        if self.unwritten:
            self.tell(f"{plural(self.unwritten, 'file')} of --return could not be written", True)
        if self.lacking > NAMED_FAILURES:
            self.tell(f"{plural(self.lacking - NAMED_FAILURES, 'other command')} brought not all "
                      f"files of --return", False)


# === Results ==========================================================================
#
# --results writes a directory for each command, with files as GNU parallel's. A directory is
# made below a temporary one, and gets its name when it is whole. No link below DIR is followed.

NAME_SIZE = 1000  # bytes of a command's name: with DIR it makes a path, of 1024 bytes on macOS
PART_SIZE = 255  # bytes of each part of it, a file name


class Results(Reporter):
    """Writes the directories of commands in a thread: outputs are large, and disks slow."""

    def __init__(self, top: str, store: ResultStore, replace: bool) -> None:
        """Check that we can write there. `replace` what is there. Raises OSError, UsageError."""
        os.makedirs(top, exist_ok=True)
        if not replace and os.listdir(top):
            raise UsageError(f"--results {printable(top, 300)}: there is something in it: name "
                             f"another directory, or add --force, to replace old results")
        if not os.access(top, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        self.path = self.top = top
        self.store = store
        self.replace = replace
        self.places: Dict[bytes, bool] = {}  # names in use: true of a command, false of a parent
        self.refused: Set[int] = set()  # commands without a directory
        self.directories = Directories(os.open(top, os.O_RDONLY | os.O_DIRECTORY), make=True)
        self.temporary = UNFINISHED + os.urandom(8).hex()
        self.outcomes: queue.SimpleQueue[Optional[Outcome]] = queue.SimpleQueue()
        self.failure: Optional[Exception] = None  # that ended the thread
        self.thread = threading.Thread(target=self.work, daemon=True, name="results")
        self.thread.start()

    def refusal(self, seq: int, name: str) -> str:
        """Reserve the directory of a command; name "": its number. Return why it gets none."""
        path = to_bytes(name or str(seq))
        parts, why = path.split(b"/"), ""
        parents = [b"/".join(parts[:n]) for n in range(1, len(parts))] \
            if len(path) <= NAME_SIZE else []
        if b"\0" in path or not {b"", b".", b".."}.isdisjoint(parts):
            why = "is no path below the directory of --results"
        elif len(path) > NAME_SIZE or max(map(len, parts)) > PART_SIZE:
            why = f"is longer than {NAME_SIZE} bytes, or than {PART_SIZE} between two /"
        elif path in self.places or any(map(self.places.get, parents)):
            why = "is that of another command, or a directory above or below it"
        if why:
            self.refused.add(seq)
            return f"its name {printable(name) or seq} {why}"
        self.places.update(dict.fromkeys(parents, False))
        self.places[path] = True
        return ""

    def result(self, outcome: Outcome) -> None:
        if self.failure:
            raise self.failure
        if outcome.seq not in self.refused:
            self.outcomes.put(outcome)

    def ended(self, summary: Summary) -> None:
        self.close()
        if self.failure:
            raise self.failure

    def close(self) -> None:
        """Write what was reported, and remove the rest."""
        self.outcomes.put(None)
        self.thread.join()

    def work(self) -> None:
        try:
            for outcome in iter(self.outcomes.get, None):
                self.write(outcome, outcome.name or str(outcome.seq))
        except Exception as error:  # the loop's thread raises it
            self.failure = error
        self.directories.close()
        shutil.rmtree(os.path.join(self.top, self.temporary), ignore_errors=True)

    def write(self, outcome: Outcome, name: str) -> None:
        """Write the directory of a command. Raises OSError."""
        self.path = os.path.join(self.top, name)  # for the message
        new, top = f"{self.temporary}/{outcome.seq}", self.directories.top
        folder = self.directories.get(new)
        with contextlib.ExitStack() as files:
            out, err, cmd, exitcode = (
                files.enter_context(open(os.open(
                    file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder), "wb"))
                for file in ("stdout", "stderr", "cmd", "exitcode"))
            for stream, piece in self.store.streams(outcome.stored):
                (err if stream == 2 else out).write(piece)
            cmd.write(to_bytes(outcome.cmd) + b"\n")
            exitcode.write(b"%d\n" % outcome.exitcode)
        parent, last = self.directories.place(name)
        if self.replace:
            with contextlib.suppress(FileNotFoundError):
                os.rename(last, new + "-old", src_dir_fd=parent, dst_dir_fd=top)
                shutil.rmtree(os.path.join(self.top, new + "-old"), ignore_errors=True)
        os.rename(new, last, src_dir_fd=top, dst_dir_fd=parent)


# === Transcript =======================================================================
#
# The seed's transcript: a line for each command, its output, and at the end a summary. With
# --raw the outputs go to stdout and stderr unchanged. With --live they are shown line by line
# while the commands run.

STYLES = {  # SGR codes of the seed's colours
    "ok": "1;92", "ok cmd": "32", "fail": "1;91", "fail cmd": "31", "flaky": "1;93",
    "flaky cmd": "33", "time": "37", "slow": "4;31", "all ok": "4;32", "some failed": "4;31",
}


RERUN_WORTH = 6  # commands; to run fewer all again is simple
BATCH_TITLE = 200  # characters of a command with many lines of the input: they are alike


class Transcript(Reporter):
    """Writes the transcript without the outputs."""

    def __init__(self, client: Client, say: Put, colour: bool = False, slow: float = math.inf,
                 verbose: bool = False, brief: bool = False, quiet: bool = False) -> None:
        self.client = client
        self.say = say
        self.colour = colour
        self.slow = slow  # ms
        self.verbose = verbose
        self.brief = brief  # only the summary
        self.quiet = quiet  # only failures, and the summary if there are any

    def paint(self, style: str, text: str) -> str:
        return f"\033[{STYLES[style]}m{text}\033[0m" if self.colour else text

    def line(self, text: str) -> None:
        self.say([to_bytes(text + "\n")])

    def headline(self, outcome: Outcome) -> str:
        """Return the ending and text of a command. With several hosts, a failure names its host."""
        if outcome.verdict == OK:
            style, words = "ok", "OK! "
        elif outcome.verdict == FAIL:
            # a greeting tells of hosts, but a short run has none
            several = max(self.client.hosts, self.client.wanted_hosts) > 1 or any(
                one.host != outcome.host for one in outcome.tries)
            named = several and outcome.host
            where = f" on {printable(outcome.host)}:" if named else ""
            style, words = "fail", f"FAIL({outcome.exitcode}){where} "
        else:
            only = f"FAILED ONLY ON {printable(outcome.only_on)}"
            style, words = "flaky", f"{only if outcome.only_on else 'FLAKY'}! "
        title = escape_command(outcome.title)
        if outcome.lines > 1 and len(title) > BATCH_TITLE:
            title = f"{title[:BATCH_TITLE]}... ({outcome.lines} lines)"
        return self.paint(style, words) + self.paint(style + " cmd", truncate_middle(title) + " ")

    def started(self, commands: Optional[int]) -> None:
        if not self.brief and not self.quiet:
            self.line("Releasing the hounds: " + (
                "commands to execute as they come" if commands is None else
                f"{plural(commands, 'command')} to execute"))

    def result(self, outcome: Outcome) -> None:
        if self.brief or self.quiet and outcome.verdict == OK:
            return
        took = "⌚" + seed_duration(outcome.spent / 1000, ms=True)
        self.line(self.headline(outcome)
                  + self.paint("slow" if outcome.spent > self.slow else "time", took))
        for why in filter(None, (describe_signal(outcome), printable(outcome.cause, 1000))):
            self.line(f"testcloud: {why}")
        if outcome.tries and outcome.verdict != OK:
            self.line(f"testcloud: {describe_tries(outcome, printable)}")
        if self.verbose:
            print_notice(f"{printable(outcome.title)} ran on {printable(outcome.host or '?')}")

    def ended(self, summary: Summary) -> None:
        if self.quiet and summary.all_passed():
            return
        nothing = summary.complete and not summary.ran and not summary.skipped_failed
        passed = summary.all_passed()
        self.line(self.paint("all ok" if passed else "some failed", (
            "No commands to execute" if nothing else
            "All commands successfully executed ☃" if passed else
            "Some commands failed :(" if summary.complete else
            "Not all commands were executed :(")))
        if summary.skipped or not nothing:
            for line in itertools.chain(self.failures(summary), self.totals(summary)):
                self.line(line)

    def failures(self, summary: Summary) -> Iterator[str]:
        """Yield the number of failures by kind, the first failures, and what to do."""
        failed = sum(summary.codes.values())
        if failed:
            codes = ", ".join(f"{n} {'' if how == 'flaky' else 'with '}{how}"
                              for how, n in sorted(summary.codes.items(), key=natural_order))
            yield f"{failed} of {plural(summary.ran, 'command')} failed: {codes}"
        yield from self.named(summary.failures, failed)
        if summary.bad_hosts:
            yield summary.bad_hosts
        if summary.codes.keys() == {f"exit code {NOT_FOUND}"}:
            yield (f"{NOT_FOUND}: the shell did not find the program: name it by its path, or see "
                   f"--env PATH=... and --setup (testcloud.py help hosts); bash needs --shell bash")
        if any(one.exitcode == NO_TESTS and "pytest" in one.cmd for one in summary.failures):
            yield f"{NO_TESTS}: pytest found no test; this may be right (testcloud.py help pytest)"
        if summary.rerun and (failed or summary.skipped_failed):
            yield f"To run just these again: {summary.rerun}"
        elif failed and summary.ran >= RERUN_WORTH and not (summary.rerun or self.quiet):
            yield ("Use --joblog FILE, and a later run with --resume-failed runs only the failures "
                   "again")

    def named(self, outcomes: Sequence[Outcome], total: int) -> Iterator[str]:
        """Yield these commands, of so many. Below them: the first NAMED_FAILURES tests of all."""
        room = NAMED_FAILURES
        for outcome in outcomes:
            yield "  " + self.headline(outcome).rstrip()
            tests = outcome.tests or Tests()
            if outcome.failed and outcome.tests and not tests.failures:
                yield f"    {tests.describe()}"
            for kind, those, count in (("failed", tests.failed, tests.failures),
                                       ("flaky", tests.flaky, tests.counts["flaky"])):
                found = those[:room]
                room -= len(found)
                for test in found:
                    words = filter(None, (test.title, test.first_line))
                    yield f"    {kind}: " + ": ".join(printable(text, 200) for text in words)
                if count > len(found):
                    more = plural(count - len(found), f"more {kind} test")
                    yield f"    {'and ' if found else ''}{more}"
        if total > len(outcomes):
            yield f"  and {total - len(outcomes)} more"

    def totals(self, summary: Summary) -> Iterator[str]:
        if summary.tests is not None and summary.ran:
            yield describe_tests(summary.tests, sum(summary.codes.values()), summary.ran)
        if summary.flaky:
            hosts = ", ".join(f"{n} FAILED ONLY ON {printable(host)}"
                              for host, n in summary.only_on.items())
            yield (f"Flaky: {summary.flaky} of {summary.ran} failed at first, and passed elsewhere "
                   f"or later" + (f": {hosts}" if hosts else ""))
            if summary.flaky_ones:
                yield from self.named(summary.flaky_ones, summary.flaky)
        for host, n in summary.started_elsewhere.items():
            yield (f"{plural(n, 'command')} could not be started on {printable(host)}, and ran "
                   f"elsewhere")
        if summary.skipped:
            failed = f", {summary.skipped_failed} of which failed" if summary.skipped_failed else ""
            again = ": they run again if you remove its joblog" * (
                not summary.ran and not summary.skipped_failed)
            yield f"Skipped {summary.skipped} that an earlier run has done{failed}{again}"
            for command in summary.skipped_failures:
                yield "  " + truncate_middle(escape_command(command))
        if summary.unused_hosts:
            yield f"Hosts that could not be used: {printable(', '.join(summary.unused_hosts), 300)}"
        of_these = "" if summary.complete else "of these "
        yield (f"Ran {plural(summary.ran, 'command')} in ⌚{seed_duration(summary.spent)}"
               + (f", result hash {of_these}is {summary.hash}" if summary.ran else ""))


def seed_duration(seconds: Seconds, ms: bool = False) -> str:
    """Return a time in the seed's format; 10 s and more as duration()."""
    if seconds >= 10:
        return duration(seconds)
    return f"{seconds * 1000:.2f}ms" if ms else f"{seconds:.2f}s"


def describe_signal(outcome: Outcome) -> str:
    """Return the signal that ended a command, or a process whose exit code it passed on; or ""."""
    number = outcome.signal or (0 if outcome.reason else outcome.exitcode - 128)
    try:
        name = signal.Signals(number).name
    except ValueError:  # no signal, or it has no name
        return f"killed by signal {number}" if outcome.signal else ""
    return (f"killed by {name}" if outcome.signal else
            f"exit code {outcome.exitcode} is that of a process killed by {name}")


class TextOutput(Reporter):
    """Writes the output of each command, after its line of the transcript."""

    def __init__(self, store: ResultStore, put: Put, tag: bool = False) -> None:
        self.store = store
        self.put = put
        self.tag = tag

    def result(self, outcome: Outcome) -> None:
        output = self.store.output(outcome.stored)
        if self.tag:
            output = tag_lines(outcome.line, output)
        self.put(itertools.chain(end_line(output), [b"\n"]))


class RawOutput(Reporter):
    """Writes stdout and stderr of each command unchanged (--raw)."""

    def __init__(self, store: ResultStore, out: Put, err: Put) -> None:
        self.store = store
        self.out = out
        self.err = err

    def result(self, outcome: Outcome) -> None:
        self.out(self.stream(outcome, 1))
        self.err(end_line(self.stream(outcome, 2)))  # our own lines follow

    def stream(self, outcome: Outcome, wanted: int) -> Iterator[bytes]:
        return (piece for stream, piece in self.store.streams(outcome.stored) if stream == wanted)


class LiveLines(Reporter):
    """Writes tagged lines of running commands as they come (--live), and the rest with a result.
    More than BLOCK_SIZE bytes without a newline count as a line."""

    def __init__(self, store: ResultStore, put: Callable[[Iterable[bytes], int], None]) -> None:
        self.store = store
        self.put = put
        self.begun: Dict[int, Tuple[str, bytes]] = {}  # by command: (tag, unended line)

    def live(self, seq: int, line: str, offset: int, data: bytes) -> None:
        lines, newline, rest = (self.begun_line(seq, offset) + data).rpartition(b"\n")
        if len(rest) > BLOCK_SIZE:
            lines, newline, rest = lines + newline + rest, b"\n", b""
        self.put(tag_lines(line, [lines + newline]), len(lines) + 1)
        self.begun[seq] = line, rest

    def begun_line(self, seq: int, offset: int) -> bytes:
        """Remove and return the unended line; offset 0 ends that of an earlier try."""
        _, begun = self.begun.pop(seq, ("", b""))
        return begun + b"\n" if begun and offset == 0 else begun

    def result(self, outcome: Outcome) -> None:
        begun = self.begun_line(outcome.seq, outcome.shown)
        rest = self.store.output(outcome.stored, outcome.shown)
        self.put(end_line(tag_lines(outcome.line, itertools.chain([begun], rest))), 0)

    def ended(self, summary: Summary) -> None:
        for line, begun in self.begun.values():
            self.put(end_line(tag_lines(line, [begun])), 0)


def end_line(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield an output, and a newline if it does not end with one."""
    last = b"\n"
    for piece in pieces:
        yield piece
        last = piece[-1:]
    if last != b"\n":
        yield b"\n"


def tag_lines(tag: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines, each after the tag and a tab."""
    head, at_start = to_bytes(escape_command(tag)) + b"\t", True
    for piece in pieces:
        for line in piece.splitlines(True):
            yield head + line if at_start else line
            at_start = line.endswith(b"\n")


# === JSON Lines =======================================================================
#
# One JSON object a line for each result, in ASCII. Bytes that are not UTF-8 are U+FFFD; then
# another field NAME_base64 has the exact bytes.

MANUAL["json"] = """\
    $ testcloud.py client --local --json 'echo {}' ::: a

@options client --json

Each result is an object on a line of stdout. Nothing else is there. `help commands` has
the JSON of the input.

    seq          place in the input, from 1
    command      its text
    name         what reports call it, if it has a name
    exitcode     of the command (see `help failures`)
    verdict      OK, FAIL, FLAKY or ONLY
    only_on      the host of ONLY, else ""
    host         where it ran
    worker       the name of its worker
    slot         the worker's slot, from 1
    started      seconds since 1970
    time         milliseconds
    signal       the signal that killed it, or 0
    reason       why it could not be run, or ""
    tries        the other tries: exitcode, host, worker, slot, started, time, reason,
                 output
    returned     with --return: paths of the files that came back
    tests        with --junit-from: its tests, failures, errors, skipped and flaky, and a
                 fault if its file cannot be used
    output       its output; not with --brief

The output of a try is its last 4 KiB, if it failed and is at most 64 KiB long. Bytes that
are not UTF-8 are U+FFFD. Only then there is output_base64 (command_base64), with the
exact bytes.
"""


class JsonLines(Reporter):
    """--json: a line for each result."""

    def __init__(self, store: ResultStore, put: Put, brief: bool) -> None:
        self.store = store
        self.put = put
        self.brief = brief  # without outputs

    def result(self, outcome: Outcome) -> None:
        fields = outcome._asdict()
        for name in ("stored", "shown", "failed", "cmd", "spent", "line", "occurrence", "lines",
                     "nth", "did_start"):
            del fields[name]
        for name, there in (("returned", outcome.returned is not None), ("name", outcome.name),
                            ("tests", outcome.tests)):
            if not there:
                del fields[name]
        if outcome.tests:
            fault = {"fault": outcome.tests.fault} if outcome.tests.fault else {}
            fields["tests"] = {**{name: outcome.tests.counts[name] for name in TEST_COUNTS},
                               **fault}
        fields.update(time=outcome.spent, tries=[*map(self.try_fields, outcome.tries)],
                      **text_fields("command", to_bytes(outcome.cmd)))
        self.put(self.line(dump_utf8(fields), outcome))

    def try_fields(self, one: Try) -> Fields:
        fields = dict(one._asdict(), time=one.spent)
        for name in ("spent", "size", "output", "ran"):
            del fields[name]
        return fields if self.brief else dict(fields, **text_fields("output", one.output))

    def line(self, head: str, outcome: Outcome) -> Iterator[bytes]:
        """Yield the line in pieces: an output may be large."""
        if self.brief:
            yield head.encode() + b"\n"
            return
        decoder, exact = codecs.getincrementaldecoder("utf-8")("replace"), True
        yield head[:-1].encode() + b', "output": "'
        for piece in itertools.chain(self.store.output(outcome.stored), [b""]):
            begun, _ = decoder.getstate()  # the start of a character
            text = decoder.decode(piece, final=not piece)
            exact = exact and (begun + piece).startswith(text.encode())
            yield json.dumps(text)[1:-1].encode()
        if not exact:
            yield b'", "output_base64": "'
            for block in in_blocks(self.store.output(outcome.stored)):
                yield in_base64(block).encode()
        yield b'"}\n'


def text_fields(name: str, data: bytes) -> Fields:
    """Return a field with this text, and NAME_base64 with the bytes if they are not UTF-8."""
    text = data.decode("utf-8", "replace")
    exact = {} if text.encode() == data else {name + "_base64": in_base64(data)}
    return {name: text, **exact}


def dump_utf8(value: Any) -> str:
    """Return JSON in ASCII, with U+FFFD for bytes that are not UTF-8."""
    text = json.dumps(value)
    return json.dumps(load(in_utf8(dump(value)))) if "\\ud" in text else text


def in_base64(data: bytes) -> str:
    import base64  # late, as all modules for reports: each takes time at every start
    return base64.b64encode(data).decode()


# === Joblog ===========================================================================
#
# The joblog of GNU parallel: a line of columns for each result. It is written at once, to
# survive a crash. --resume reads it and skips the commands that an earlier run has done.

MANUAL["joblog"] = """\
    $ ls tests/test_*.py | testcloud.py client --joblog log pytest -q {}
    $ ls tests/test_*.py | testcloud.py client --joblog log --resume-failed pytest -q {}

The second line runs only what failed in the first run, or did not run.

@options client --joblog --resume --resume-failed --timings

The joblog

    Seq Host Starttime JobRuntime Send Receive Exitval Signal Command

It has a line for each result, with these nine columns of GNU parallel. The client writes
it as results come. One client at a time writes a joblog. Behind the host stands (flaky) or
(only on HOST).

Resume

--resume runs only the commands that are not in the joblog. The input may have more
commands than before, in any order. A command is known by its text, and by how often that
text came before it in the input. The column Send has this number, as a negative one. GNU
parallel has bytes there.

--resume-failed also runs the failures again. With --fail-on-flaky, FLAKY and ONLY ON are
failures. Summary, hash and reports are of what ran this time. Failures that are skipped
are one failed test case of --junit.

After a run with -n, --resume runs the lines of the input that no command in the joblog
had. With --resume-failed it also runs all lines of failed commands. A smaller N than
before, or none, shows which of them fail. The template must be the same, with {} and not
{1}. New commands get new numbers. A template with {#} makes other commands if lines come
before the old ones.

After a `kill -9` of the client, only what was under way is lost. With -k the joblog may
have results that were not shown yet. --resume-failed shows failures again.

Longest first

The client remembers how long commands took, in ~/.cache/testcloud ($XDG_CACHE_HOME). It
begins with those that it does not know, and then takes the longest. --timings takes the
times of a joblog instead. If the input is slow to come, or there is one slot (--local -j1,
-S 1/HOST), commands start in the order of the input. --serial keeps it in all cases. With
-n the times are those of lines and their files. A line that it does not know has the mean
of the others.

After a run of more than two seconds, the client says how many slots would have been of
use, if slots were the bottleneck.
"""

JOBLOG_HEADER = "Seq\tHost\tStarttime\tJobRuntime\tSend\tReceive\tExitval\tSignal\tCommand\n"


class JobLog(Reporter):
    """Writes a joblog, and locks it until the end of the run."""

    def __init__(self, path: str, rows: Sequence[str]) -> None:
        """Begin with these lines of an earlier run. Raises OSError."""
        self.path = path
        self.files = contextlib.ExitStack()
        self.file = self.files.enter_context(open_locked(path))
        if rows:
            write_atomically(path, [JOBLOG_HEADER, *rows])
            if not os.path.samestat(os.stat(path), os.fstat(self.file.fileno())):
                self.file = self.files.enter_context(open_locked(path))
        else:
            if is_replaceable(path):
                self.file.truncate(0)
            self.write(JOBLOG_HEADER)

    def write(self, line: str) -> None:
        rest = to_bytes(line)
        while rest:
            rest = rest[self.file.write(rest):]

    def result(self, outcome: Outcome) -> None:
        self.write(joblog_line(outcome))

    def ended(self, summary: Summary) -> None:
        self.files.close()


def open_locked(path: str) -> BlockingFile:
    """Return a file to append to, locked until it is closed. Raises OSError."""
    file = open_blocking(path, "a")
    try:
        if is_replaceable(path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise OSError(error.errno, "another client writes it") from None
    except OSError:  # a network file system without locks
        pass
    return file


def joblog_line(outcome: Outcome) -> str:
    """Return GNU parallel's columns: times in seconds, NUL for a newline in the command. Host gets
    the verdict of a flaky command, too, and Send (0 in GNU parallel's) minus the occurrence."""
    verdict = {FLAKY: " (flaky)", ONLY: f" (only on {outcome.only_on})"}.get(outcome.verdict, "")
    host = printable(outcome.host or ":") + printable(verdict)
    return (f"{outcome.seq}\t{host}\t{outcome.started:.3f}\t{outcome.spent / 1000:10.3f}\t"
            f"{-outcome.occurrence}\t{outcome.stored.size}\t{outcome.exitcode}\t{outcome.signal}\t"
            + outcome.cmd.replace("\n", "\0") + "\n")


def is_time(seconds: Seconds) -> bool:
    """Return whether we can reckon with this: it is finite and no mistake."""
    return abs(seconds) < 1e9  # NaN is not; a clock may have been set back


class JobLogRow(NamedTuple):
    """A command of an earlier run."""

    seq: int
    command: str
    occurrence: int  # number of equal commands before it in the input; 0 in GNU parallel's
    failed: bool
    seconds: float
    line: str


def read_joblog(path: str, flaky_fails: bool = False) -> List[JobLogRow]:
    """Return the rows of a joblog, ours or GNU parallel's. Raises OSError, SetupError."""
    rows, damaged = [], 0
    with io.BufferedReader(open_blocking(path, "r")) as file:
        head = file.readline(len(JOBLOG_HEADER))
        if not JOBLOG_HEADER.encode().startswith(head):
            raise SetupError(f"{printable(path)} is no joblog: its first line is another")
        for raw in file:
            if not raw.endswith(b"\n"):  # its writer was killed
                break
            try:
                rows.append(joblog_row(to_text(raw), flaky_fails))
            except ValueError:
                damaged += 1
    if damaged:
        print_notice(f"{printable(path)}: passing over {plural(damaged, 'damaged line')}")
    return rows


def joblog_row(line: str, flaky_fails: bool) -> JobLogRow:
    """Return the row in a line. Raises ValueError."""
    seq, host, _, seconds, send, _, exitcode, signal, command = line.rstrip("\n").split("\t", 8)
    flaky = re.search(r" \((flaky|only on .*)\)$", host) is not None
    failed = int(exitcode) != 0 or int(signal) != 0 or flaky and flaky_fails
    if not is_time(float(seconds)):
        raise ValueError("no time")
    return JobLogRow(int(seq), command.replace("\0", "\n"), max(0, -int(send)), failed,
                     float(seconds), line)


class EarlierRun:
    """Joblog of an earlier run. Commands match by text and occurrence, not by position."""

    def __init__(self, rows: Sequence[JobLogRow], failures_too: bool,
                 lines_of: Optional[Callable[[str], Sequence[str]]] = None) -> None:
        """Keep the last row of each command; no failures if `failures_too` shall run again. With
        `lines_of`, which returns the lines in a batch's command, has_done() is about lines."""
        self.rows: Dict[Tuple[str, int], JobLogRow] = {}
        moved: Dict[Tuple[int, str, int], int] = {}  # true occurrences of GNU parallel's rows
        free: Counter[str] = Counter()
        for row in rows:
            known_as = row.seq, row.command, row.occurrence
            occurrence = moved.get(known_as, row.occurrence)
            if self.rows.get((row.command, occurrence), row).seq != row.seq:
                while (row.command, occurrence) in self.rows:
                    occurrence = free[row.command]
                    free[row.command] += 1
                moved[known_as] = occurrence
            self.rows[row.command, occurrence] = row
        if failures_too:
            self.rows = {key: row for key, row in self.rows.items() if not row.failed}
        self.done, self.first_seq = self.rows, 1
        self.by_line = bool(lines_of and rows)
        if lines_of:  # lines of other batches than ours
            self.done, occurrences = {}, Counter[str]()
            for row in self.rows.values():
                for line in lines_of(row.command):
                    self.done[line, occurrences[line]] = row
                    occurrences[line] += 1
            # not the number of an earlier batch: its files may be named by it
            self.first_seq += max((row.seq for row in rows), default=0)
        self.seen: Counter[str] = Counter()  # commands or lines of the input
        self.counted: Set[int] = set()  # the rows in these counts, by id()
        self.skipped = self.skipped_failed = 0
        self.failures: List[str] = []  # the first NAMED_FAILURES commands of these

    def next_occurrence(self, command: str) -> int:
        """Return the number of equal commands before this one of the input, and count it."""
        self.seen[command] += 1
        return self.seen[command] - 1

    def has_line(self, line: str) -> bool:
        """Return whether a batch had the next line of the input; false without `lines_of`."""
        return self.by_line and self.has_done(line, self.next_occurrence(line))

    def has_done(self, command: str, occurrence: int) -> bool:
        row = self.done.get((command, occurrence))
        if row and id(row) not in self.counted:
            self.counted.add(id(row))
            self.skipped += 1
            self.skipped_failed += row.failed
            if row.failed and len(self.failures) < NAMED_FAILURES:
                self.failures.append(row.command)
        return row is not None


# === JUnit ============================================================================
#
# The report for Jenkins, GitLab and GitHub, in the dialect of Jenkins' xunit plugin
# (junit-10.xsd), with the elements in the order of surefire's schema. A <testcase> holds:
#
#   failure        the command ran and did not exit with 0, also after a timeout or signal;
#                  or it is flaky, if that counts
#   error          the command could not be run
#   rerunFailure   another failed try of a command that failed
#   flakyFailure   a failed try of a command that passed
#   system-out     where and when the command ran, and its tries
#
# The output is in the text of the failure, which all readers show. Readers match tests with
# earlier runs by suite, class and name, so none of these names a host. One element at a time
# is in memory.

JUNIT_NAME = 240  # characters of a command in a name: GitLab keeps 255, Jenkins makes a URL
JUNIT_HEAD = 16 * 1024  # first bytes of an output
JUNIT_TAIL = 32 * 1024  # last bytes of it: GitHub takes 64 KiB with an annotation
JUNIT_SHORT = 100  # characters of each text past this size of a report:
JUNIT_SIZE = 16 * 1024 * 1024  # characters with outputs: GitLab reads up to 30 MB
WHOLE_RUN = "(the whole run)"  # test case of Summary.trouble()
# terminal colours, and the characters that XML 1.0 forbids
# not compiled: that takes 1.5 ms of a start
NOT_XML = "\x1b\\[[0-9;:]*[mK]|[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


class JUnit(FinalReport):
    """Report for Jenkins, GitLab and GitHub."""

    def __init__(self, path: str, store: ResultStore, tests: Optional[TestFiles] = None) -> None:
        super().__init__(path, store)
        self.tests = tests

    def content(self, summary: Summary) -> Iterator[str]:
        return junit_xml("testcloud", self.outcomes, self.output_of, summary.trouble(),
                         summary.spent * 1000, self.tests)


# --- the report: one <testcase> for each command without tests of its own

def junit_xml(name: str, outcomes: Iterable[Outcome], output_of: OutputOf, trouble: str,
              spent: float, tests: Optional[TestFiles] = None) -> Iterator[str]:
    """Yield the report of a run of `spent` ms. An output is read when its piece is made. `trouble`
    becomes a test case: otherwise a run with missing commands looks like a success."""
    ran = sorted(outcomes)
    outcomes = [outcome for outcome in ran if has_own_case(outcome)]
    suites = [(suite, outcome) for outcome in ran if outcome.tests
              for suite in outcome.tests.suites]
    counts: Counter[str] = sum(map(own_counts, outcomes), Counter())
    counts.update(dict.fromkeys(("tests", "errors"), int(bool(trouble))))
    if tests:  # the times of all suites add up
        spent = sum(map(own_time, outcomes))
    suite = xml_element("testsuite", "\n", name=name, **suite_numbers(counts, spent))
    for each, _ in suites:
        counts.update(each.counts)
        spent += each.spent
    began = min(filter(None, (iso_time(outcome.started) for outcome in outcomes)), default="")
    if began:
        suite.set("timestamp", began)
    numbers = suite_numbers(counts, spent)
    del numbers["skipped"]  # the schema has none
    frame = xml_text(xml_element("testsuites", "\n", suite, name=name, **numbers))
    head, end, tail = frame.rpartition("</testsuite>")
    top, start, head = head.partition("<testsuite ")
    yield '<?xml version="1.0" encoding="UTF-8"?>\n' + top
    for each, outcome in suites:
        yield from tests.suite_xml(each, outcome) if tests else ()
    if suites and not (outcomes or trouble):
        yield tail + "\n"
        return
    yield start + head
    yield from own_cases(name, outcomes, output_of, trouble, tests.room if tests else JUNIT_SIZE)
    yield f"{end}\n{tail}\n"


def own_cases(name: str, outcomes: Sequence[Outcome], output_of: OutputOf, trouble: str,
              room: int) -> Iterator[str]:
    """Yield the test cases of commands, with outputs while there is room, and of `trouble`."""
    names = unique_names([*(outcome.title for outcome in outcomes), WHOLE_RUN])
    for outcome, shown in zip(outcomes, names):
        case = xml_element("testcase", name=shown, classname=name,
                           time=in_seconds(own_time(outcome)))
        case.extend(junit_parts(outcome, shown, output_of if room > 0 else None))
        piece = xml_text(case)
        room -= len(piece) if outcome.verdict != OK else 0
        yield piece + "\n"
    if trouble:
        error = xml_element("error", trouble, type="WholeRun", message=trouble)
        yield xml_text(xml_element("testcase", "", error, name=next(names), classname=name,
                                   time=in_seconds(0))) + "\n"


def suite_numbers(counts: Counter[str], spent: float) -> Dict[str, str]:
    """Return the attributes of a suite that count its test cases, and their time in ms."""
    return {"time": in_seconds(spent), **{name: str(counts[name]) for name in TEST_COUNTS[:4]}}


def has_own_case(outcome: Outcome) -> bool:
    """Return whether a command is a test case: no test of its own tells how it ended."""
    tests = outcome.tests
    if tests is None or tests.fault:
        return True
    return not tests.failures if outcome.failed else (
        outcome.verdict != OK and not tests.counts["flaky"])


def own_counts(outcome: Outcome) -> Counter[str]:
    """Return what a command adds to a report as a test case."""
    kind = "errors" if could_not_run(outcome) else "failures"
    return Counter({"tests": 1, kind: int(outcome.failed)})


def own_time(outcome: Outcome) -> float:
    """Return the ms that a command took besides its tests."""
    tests = sum(suite.spent for suite in outcome.tests.suites) if outcome.tests else 0.0
    return max(0.0, outcome.spent - tests)


# --- inside a <testcase>

def junit_parts(outcome: Outcome, shown: str,
                output_of: Optional[OutputOf]) -> List[ET.Element]:
    """Return the elements in the <testcase> with this name; `output_of` None: without outputs."""
    tag = "rerunFailure" if outcome.failed else "flakyFailure"
    parts = [rerun_element(tag, one, output_of is not None) for one in outcome.tries
             if one.exitcode and outcome.verdict != OK]
    if outcome.failed:
        output = ("[output left out: the report is long]" if output_of is None else
                  excerpt(output_of(outcome)) if outcome.exitcode else failed_outputs(outcome))
        command = "" if xml_legal(outcome.cmd) == shown else \
            f"command: {truncate(outcome.cmd, JUNIT_HEAD)}\n"
        kind, message = how_failed(outcome)
        text = f"{message}\n{command}\n{output}"
        if could_not_run(outcome):  # surefire has an error last, and a failure first
            parts.append(xml_element("error", text, type=kind, message=message))
        else:
            parts.insert(0, xml_element("failure", text, type=kind, message=message))
    story = "\n".join(story_of(outcome))
    return [*parts, xml_element("system-out", story)] if story else parts


def rerun_element(tag: str, one: Try, with_output: bool) -> ET.Element:
    """Return the element for a failed try, other than the reported one."""
    how = f"exit code {one.exitcode} on {truncate(one.host)}"
    text = "\n\n".join(filter(None, (how, one.last_words() if with_output else "")))
    return xml_element(tag, "", xml_element("stackTrace", text), type="ExitCode", message=how)


def failed_outputs(outcome: Outcome) -> str:
    """Return the outputs of the failed tries."""
    return "\n\n".join(f"on {truncate(one.host)}:\n{one.last_words()}"
                       for one in outcome.tries if one.exitcode and one.size)


def could_not_run(outcome: Outcome) -> bool:
    """Return whether testcloud, not the command, set the exit code."""
    return outcome.exitcode == NOT_RUN and bool(outcome.reason or not outcome.host)


def how_failed(outcome: Outcome) -> Tuple[str, str]:
    """Return the type and the message of a failure or error."""
    if outcome.verdict in (FLAKY, ONLY):
        return outcome.verdict.title(), describe_tries(outcome, truncate)
    what = f"exit code {outcome.exitcode}"
    kind = "Signal" if outcome.signal else "ExitCode"
    if outcome.exitcode == TIMED_OUT:
        kind = "Timeout"
    if could_not_run(outcome):
        kind, what = "NotRun", "could not be run"
    where = f" on {truncate(outcome.host)}" if outcome.host else ""
    killed = f", signal {outcome.signal}" if outcome.signal else ""
    return kind, what + where + killed + (f": {truncate(outcome.cause)}" if outcome.cause else "")


def story_of(outcome: Outcome) -> Iterator[str]:
    """Yield lines about where and when a command ran, and about its tries."""
    if outcome.host:
        yield (f"ran on {truncate(outcome.host)} (worker {truncate(outcome.worker)}, slot "
               f"{outcome.slot}) at {iso_time(outcome.started) or 'an unknown time'}")
    if outcome.tries:
        yield f"{outcome.verdict}: {describe_tries(outcome, truncate)}"
    if outcome.only_on:
        yield f"failed on {truncate(outcome.only_on)} only"


# --- XML, names, times

def unique_names(commands: Iterable[str]) -> Iterator[str]:
    """Yield names of test cases: GitLab ignores a repeated name, others mix the cases up."""
    used: Dict[str, int] = {}
    for command in commands:
        name = first = truncate(xml_legal(command), JUNIT_NAME)
        while name in used:
            used[first] += 1
            name = f"{first} [{used[first]}]"
        used[name] = 1
        yield name


def excerpt(pieces: Iterable[bytes]) -> str:
    """Return an output without its middle if it is long. Bytes that are not UTF-8: \\xff."""
    head, left_out, tail = head_and_tail(pieces, JUNIT_HEAD, JUNIT_TAIL)
    mark = b"\n[... %d bytes left out ...]\n" % left_out if left_out else b""
    return (head + mark + tail).decode("utf-8", "backslashreplace")


def in_seconds(ms: float) -> str:
    return f"{ms / 1000:.3f}"


def iso_time(since_1970: float) -> str:
    """Return a time in ISO 8601; "" if it is unknown or out of range."""
    from datetime import datetime, timezone
    with contextlib.suppress(OverflowError, OSError, ValueError):
        if since_1970 > 0:
            return datetime.fromtimestamp(since_1970, timezone.utc).isoformat(timespec="seconds")
    return ""


def xml_legal(text: str) -> str:
    """Return the text with escapes for characters that XML forbids: no library does that."""
    return re.sub(NOT_XML, lambda odd: escape_of(odd[0]) if len(odd[0]) == 1 else "", text)


def xml_element(tag: str, text: str = "", *children: ET.Element, **attributes: str) -> ET.Element:
    from xml.etree.ElementTree import Element  # late
    element = Element(tag, {key: xml_legal(value) for key, value in attributes.items()})
    element.text = xml_legal(text)
    element.extend(children)
    return element


def xml_text(element: ET.Element) -> str:
    from xml.etree.ElementTree import tostring
    return tostring(element, "unicode")


# --- files of commands (--junit-from)
#
# Each command writes a JUnit file. Their test cases are copied to a spool when they come, and
# from there to the report. A suite of the report is a suite of a file with test cases of its
# own: most readers know no suites within suites.

JUNIT_FILE_SIZE = 16 * 1024 * 1024  # bytes of a file
JUNIT_ELEMENTS = 500_000  # in a file: so many hold up the loop for 10 s, a third of a lease
JUNIT_DEPTH = 50  # elements within each other
JUNIT_PARTS = 10_000  # elements in a test case: they are in memory
JUNIT_BLOCK = 256 * 1024  # bytes read at once
NAMED_TESTS = 20  # failed tests of a command in a page
TEST_COUNTS = ("tests", "failures", "errors", "skipped", "flaky")
CASE_PARTS = ("properties", "skipped", "failure", "rerunFailure", "rerunError", "flakyFailure",
              "flakyError", "error", "system-out", "system-err")  # in surefire's order
FLAKY_PARTS = ("flakyFailure", "flakyError")
INNER_PARTS = ("property", "stackTrace", "system-out", "system-err")
PART_ATTRIBUTES = ("message", "type", "name", "value")
SUITE_PARTS = ("testcase", "properties", "system-out", "system-err")
# which test a test case is: suite, class, name, and how many such were before it. Not by file:
# each host has another path
TestKey = Tuple[str, str, str, int]


class JUnitError(ValueError):
    """A command's JUnit file is of no use; the text says why."""


class FailedTest(NamedTuple):
    """A failed test case of a try."""

    classname: str
    name: str
    kind: str  # Failure or Error
    type: str
    message: str
    text: str
    key: TestKey = ("", "", "", 0)
    passed_on: str = ""  # the host, if it passed in an earlier try

    @property
    def title(self) -> str:
        name = self.name if self.name.startswith(self.classname) else \
            f"{self.classname} {self.name}"
        return name + f" (passed on {self.passed_on})" * bool(self.passed_on)

    @property
    def first_line(self) -> str:
        return truncate((self.message or self.text).strip().partition("\n")[0])


class Suite:
    """A suite of a command's JUnit file."""

    def __init__(self, attributes: Dict[str, str], failures_before: int = 0) -> None:
        self.name = attributes.get("name", "")
        self.listed = False  # among those of its file
        self.counts_failures = any(
            re.fullmatch("[0-9,]*[1-9][0-9,]*", attributes.get(name, "").strip())
            for name in TEST_COUNTS[1:3])
        self.failures_before = failures_before  # in its file
        self.attributes = {name: attributes[name] for name in ("timestamp", "package", "file")
                           if attributes.get(name)}
        self.counts: Counter[str] = Counter()
        self.spent = 0.0  # ms
        # where its XML is in the spool: (offset, size)
        self.properties: List[Tuple[int, int]] = []
        self.parts: List[Tuple[int, int]] = []


class Tests:
    """The tests of a try, as its JUnit file has them."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault  # why the file is of no use
        self.failure_reason = fault  # of the try, if its exit code is 0
        self.suites: List[Suite] = []
        self.counts: Counter[str] = Counter()
        self.failed: List[FailedTest] = []  # the first NAMED_TESTS, when it is reported
        self.passed: Set[int] = set()  # hashes of TestKeys, until it is reported
        self.flaky: List[FailedTest] = []  # the first NAMED_FAILURES; without text

    @property
    def failures(self) -> int:
        return self.counts["failures"] + self.counts["errors"]

    def describe(self) -> str:
        """Return in words what failed."""
        total = grouped(self.counts["tests"], "test")
        return self.fault or (
            f"{self.failures:,} of {total} failed" if self.failures else
            f"no failure in its {total}" if self.counts["tests"] else "it ran no tests")


def case_counts(outcome: Outcome) -> Counter[str]:
    """Return the tests of a command, and whether it failed and none of them shows why."""
    counts = Counter(outcome.tests.counts if outcome.tests else {})
    shown = outcome.verdict in (FLAKY, ONLY) and counts["flaky"]  # with --fail-on-flaky
    counts.update(unexplained=int(outcome.failed and has_own_case(outcome) and not shown))
    return counts


def describe_tests(counts: Counter[str], failed_commands: int, commands: int) -> str:
    """Return the tests of a run in words."""
    failed, among = counts["failures"] + counts["errors"], grouped(commands, "command")
    words, shown = grouped(counts["tests"], "test"), failed_commands - counts["unexplained"]
    words = (f"{failed:,} of {words} failed in {shown:,} of {among}" if failed else
             f"{words} in {among}: no test failed")
    words += "".join(f", {counts[kind]:,} {kind}" for kind in TEST_COUNTS[3:] if counts[kind])
    unexplained = grouped(counts["unexplained"], "command")
    return words + f"; no test shows why {unexplained} failed" * (counts["unexplained"] > 0)


class JUnitParser:
    """Target of an XMLParser. `take(suite, element)` gets the parts of each suite. Raises
    JUnitError if the file is not JUnit, or tells of failures that no test case has."""

    def __init__(self, take: Callable[[Suite, ET.Element], None]) -> None:
        self.take = take
        self.open: List[Suite] = []
        self.path: List[str] = []  # tags of open elements
        self.elements = 0
        self.failures = 0  # test cases of all suites that failed
        self.builder: Optional[ET.TreeBuilder] = None  # of a part
        self.level = self.size = 0  # of the part: its depth in the path, its elements

    def doctype(self, *_: object) -> None:
        raise JUnitError("has a DOCTYPE, which may make it endless")

    def start(self, tag: str, attributes: Dict[str, str]) -> None:
        from xml.etree.ElementTree import TreeBuilder
        tag = tag.rpartition("}")[2]  # without a namespace
        if not self.path and tag not in ("testsuites", "testsuite"):
            raise JUnitError(f"is not JUnit: it begins with <{printable(tag)}>")
        self.path.append(tag)
        self.elements += 1
        if self.elements > JUNIT_ELEMENTS:
            raise JUnitError(f"has more than {JUNIT_ELEMENTS:,} elements")
        if len(self.path) > JUNIT_DEPTH:
            raise JUnitError(f"has more than {JUNIT_DEPTH} elements within each other")
        if self.builder is not None:
            self.size += 1
            if self.size > JUNIT_PARTS:
                raise JUnitError(f"has a test case with more than {JUNIT_PARTS:,} elements")
        elif tag in ("testsuites", "testsuite"):
            self.open.append(Suite(attributes, self.failures))
            return
        elif tag in ("failure", "error") and self.path[-2].startswith("testsuite"):
            raise JUnitError(f"has <{tag}> outside of a test case")
        elif tag in SUITE_PARTS:
            self.builder, self.level, self.size = TreeBuilder(), len(self.path), 1
        if self.builder is not None:
            self.builder.start(tag, attributes)

    def data(self, text: str) -> None:
        if self.builder is not None:
            self.builder.data(text)

    def end(self, tag: str) -> None:
        tag = self.path.pop()
        if self.builder is None:
            if tag in ("testsuites", "testsuite"):
                suite = self.open.pop()
                if suite.counts_failures and self.failures == suite.failures_before:
                    raise JUnitError("counts failures, and has no test case that failed")
            return
        self.builder.end(tag)
        if len(self.path) < self.level:
            part = self.builder.close()
            self.failures += part.tag == "testcase" and any(
                child.tag in ("failure", "error") for child in part)
            self.take(self.open[-1], part)
            self.builder = None


class TestFiles:
    """Reads the JUnit files of commands, and keeps their test cases for the report."""

    def __init__(self) -> None:
        self.incoming, self.spool = open_spool(), open_spool()
        # of files that have begun to come, by (command, attempt): their place, or the error
        self.places: Dict[Tuple[int, int], Union[int, OSError]] = {}
        self.incoming_end = self.spool_end = 0  # bytes
        self.room = JUNIT_SIZE  # characters
        self.tries: Dict[int, Dict[int, Tests]] = {}  # by command and attempt, until finish()
        self.owners: Dict[str, int] = {}  # commands by file

    def clash(self, seq: int, command: InputCommand) -> str:
        """Return why a command cannot have its file; "" if it can."""
        path = command.returns[-1]
        owner = self.owners.setdefault(os.path.normpath(os.path.join(command.cwd, path)), seq)
        return "" if owner == seq else (
            f"its --junit-from {printable(path)} is that of command {owner}, too: name it by "
            f"{{#}}, the number of the command")

    def put_part(self, part: ReturnedPart) -> None:
        """Store the next part of a file. An error is told by read()."""
        key = part.command.id, part.attempt
        for index, offset, piece in part.pieces():
            size = part.rows[index][1]
            if index < len(part.command.returns) - 1 or size > JUNIT_FILE_SIZE:
                continue
            if key not in self.places:
                self.places[key] = self.incoming_end
                self.incoming_end += size
            place = self.places[key]
            try:
                if isinstance(place, int):
                    write_all(self.incoming, piece, place + offset)
            except OSError as error:
                self.places[key] = error

    def read(self, command: Command, result: Fields) -> str:
        """Read the file of a try. Return why the try has failed, if its exit code is 0."""
        path = f"its {printable(command.returns[-1], 200)}"
        attempt, last = result["attempt"], len(command.returns) - 1
        row = (result.get("returned", [])[last:] or [[]])[0]
        earlier = self.tries.setdefault(command.id, {})
        earlier.pop(attempt, None)
        tests = Tests()
        try:
            if not row:
                raise JUnitError("was not written")
            hosts = {number: command.tries[number].host for number in earlier}
            self.parse(tests, self.places.pop((command.id, attempt), 0), row[1],
                       [(hosts[number], test) for number, old in earlier.items()
                        for test in old.failed],
                       {test: hosts[number] for number, old in earlier.items()
                        for test in old.passed})
        except (OSError, SyntaxError, ValueError, LookupError) as error:
            why = str(error)
            if isinstance(error, SyntaxError):  # of XML
                why = f"is no whole XML: {error}"
            elif not isinstance(error, JUnitError):  # such as an unknown encoding
                why = f"cannot be read: {getattr(error, 'strerror', error)}"
            tests = Tests(f"{path} {why} (--junit-from)")
        if not self.places:
            self.incoming_end = 0
        earlier[attempt] = tests
        if tests.failures:
            tests.failure_reason = f"{tests.describe()}, by {path} (--junit-from)"
        return tests.failure_reason

    def parse(self, tests: Tests, place: Union[int, OSError], size: int,
              earlier: Sequence[Tuple[str, FailedTest]], passed: Dict[int, str]) -> None:
        """Read a file. `earlier` has the failed tests of earlier tries, each with its host, and
        `passed` the hosts of passed ones, by the hashes of their keys."""
        from xml.etree.ElementTree import XMLParser  # late
        if isinstance(place, OSError):
            raise place
        if not size or size > JUNIT_FILE_SIZE:
            raise JUnitError("is empty" if not size else
                             f"has more than {JUNIT_FILE_SIZE // 2**20} MiB")
        known: Dict[TestKey, List[Tuple[str, FailedTest]]] = {}
        for host, test in earlier:
            known.setdefault(test.key, []).append((host, test))
        seen: Counter[int] = Counter()  # hashes of the names of tests

        def take(suite: Suite, part: ET.Element) -> None:
            if not suite.listed:
                tests.suites.append(suite)
                suite.listed = True
            if part.tag == "testcase":
                given = part.attrib
                names = (suite.name, given.get("classname") or given.get("class", ""),
                         given.get("name", ""))
                hashed = hash(names)
                key = (*names, seen[hashed])
                seen[hashed] += 1
                self.put(suite.parts, self.test_case(
                    tests, suite, part, key, known.get(key, ()), passed.get(hash(key), "")))
            elif part.tag == "properties":
                for each in part.iter("property"):
                    self.put(suite.properties, self.copy(each))
            else:
                self.put(suite.parts, self.copy(part))
        parser = XMLParser(target=JUnitParser(take))
        for at in range(place, place + size, JUNIT_BLOCK):
            parser.feed(os.pread(self.incoming.fileno(), min(JUNIT_BLOCK, place + size - at), at))
        parser.close()

    def test_case(self, tests: Tests, suite: Suite, case: ET.Element, key: TestKey,
                  earlier: Sequence[Tuple[str, FailedTest]], passed_on: str) -> ET.Element:
        """Return the test case for the report, and count it. `earlier` has its failures in earlier
        tries, each with its host. `passed_on` is the host of one that it passed."""
        given, (_, classname, name, _) = case.attrib, key
        parts = [self.copy(part) for part in case if part.tag in CASE_PARTS]
        bad = next((part for part in parts if part.tag in ("failure", "error")), None)
        for host, test in earlier:
            where = f"on {truncate(host)}"
            parts.append(xml_element(
                ("flaky" if bad is None else "rerun") + test.kind, "",
                xml_element("stackTrace", f"{where}:\n{test.text or test.message}"),
                type=test.type, message=f"{where}: {test.message}"))
        if bad is not None:
            tests.failed.append(FailedTest(
                classname, name, bad.tag.title(), bad.attrib.get("type") or bad.tag.title(),
                bad.attrib.get("message", ""), bad.text or "", key, passed_on))
            if passed_on:
                bad.text = f"{bad.text or ''}\n\nIt passed on {truncate(passed_on)}."
        tags = {part.tag for part in parts}
        kind = (bad.tag + "s").replace("ss", "s") if bad is not None else (
            "skipped" if "skipped" in tags else "flaky" if tags & {*FLAKY_PARTS} else "")
        if kind == "flaky" and len(tests.flaky) < NAMED_FAILURES:
            first = next(part for part in parts if part.tag in FLAKY_PARTS)
            test = FailedTest(classname, name, "", "", first.attrib.get("message", ""),
                              first.text or "")
            tests.flaky.append(test._replace(text="", message=test.first_line))
        if bad is None and kind != "skipped":
            tests.passed.add(hash(key))
        spent = parse_seconds(given.get("time", ""))
        for counts in (tests.counts, suite.counts):
            counts["tests"] += 1
            counts[kind] += 1
        suite.spent += spent * 1000
        parts.sort(key=lambda part: CASE_PARTS.index(part.tag))
        places = {key: given[key] for key in ("file", "line") if key in given}
        return xml_element("testcase", "", *parts, name=name, classname=classname, **places,
                           time=f"{spent:.3f}")

    def copy(self, part: ET.Element) -> ET.Element:
        """Return a copy for the report: only what readers know, with texts of bounded length."""
        texts = {key: self.shorten(part.attrib[key]) for key in PART_ATTRIBUTES
                 if key in part.attrib}
        children = [self.copy(child) for child in part if child.tag in INNER_PARTS]
        return xml_element(part.tag, self.shorten(part.text or ""), *children, **texts)

    def shorten(self, text: str) -> str:
        if self.room <= 0:
            return truncate(text, JUNIT_SHORT)
        cut = len(text) - JUNIT_HEAD - JUNIT_TAIL
        if cut > 0:
            text = (f"{text[:JUNIT_HEAD]}\n[... {cut} characters left out ...]\n"
                    f"{text[-JUNIT_TAIL:]}")
        self.room -= len(text)
        return text

    def put(self, places: List[Tuple[int, int]], element: ET.Element) -> None:
        """Append an element to the spool, and its place to these. Raises OSError."""
        data = xml_text(element).encode() + b"\n"
        write_all(self.spool, data, self.spool_end)
        offset, size = places.pop() if places and sum(places[-1]) == self.spool_end else (
            self.spool_end, 0)
        places.append((offset, size + len(data)))
        self.spool_end += len(data)

    def finish(self, id: int, attempt: int) -> Optional[Tests]:
        """Return the tests of the reported try of a command, and forget its others."""
        for key in [key for key in self.places if key[0] == id]:
            del self.places[key]
        tests = self.tries.pop(id, {}).get(attempt)
        if tests is not None:  # no more is shown
            tests.passed.clear()
            tests.failed = [test._replace(text="", message=test.first_line)
                            for test in tests.failed[:NAMED_TESTS]]
        return tests

    def suite_xml(self, suite: Suite, outcome: Outcome) -> Iterator[str]:
        """Yield a suite of the report. Raises OSError."""
        command = xml_element("property", name="command", value=truncate(outcome.cmd, JUNIT_NAME))
        head, properties, end = xml_text(xml_element(
            "testsuite", "\n", xml_element("properties", "\n", command),
            name=suite.name or truncate(outcome.title, JUNIT_NAME), hostname=outcome.host,
            **suite.attributes, **suite_numbers(suite.counts, suite.spent),
        )).partition("</properties>")
        yield head
        yield from self.text(suite.properties)
        yield properties + "\n"
        yield from self.text(suite.parts)
        yield end + "\n"

    def text(self, places: Iterable[Tuple[int, int]]) -> Iterator[str]:
        blocks = (os.pread(self.spool.fileno(), min(JUNIT_BLOCK, offset + size - at), at)
                  for offset, size in places for at in range(offset, offset + size, JUNIT_BLOCK))
        return codecs.iterdecode(blocks, "utf-8")


def parse_seconds(text: str) -> Seconds:
    """Return the time of a test case; surefire may write 1,234.5, others 0,125. What is no time
    counts as 0."""
    if text.count(",") == 1 and "." not in text:
        text = text.replace(",", ".")
    with contextlib.suppress(ValueError):
        seconds = float(text.replace(",", ""))
        return seconds if 0 <= seconds < 1e9 else 0.0
    return 0.0


# === HTML report ======================================================================
#
# One file that shows a whole run and needs neither network nor server. Failures and flaky
# commands are plain HTML. The script draws the timeline and the list from JSON, a page at a
# time: 100,000 commands stay quick. All text from outside is escaped. If an escape is
# missing, the Content-Security-Policy still allows only our script, by its hash.

HTML_OUTPUT = 32 * 1024  # bytes from either end of an output: the reasons are there
HTML_OUTPUTS = 32 * 1024 * 1024  # of all failures together: browsers get slow past it
HTML_ENTRIES = 1000  # failures, and flaky commands, outside of the list
# with marks, for readers who see no colours
VERDICT_LABELS = {OK: "✓ OK", FAIL: "✗ FAIL", FLAKY: "~ FLAKY", ONLY: "◐ FAIL ON 1 HOST"}


class HtmlReport(FinalReport):
    """Page of facts, failures, flaky commands, a timeline, and a list to filter."""

    def content(self, summary: Summary) -> Iterator[str]:
        hosts = {one.host for one in all_tries(self.outcomes)} - {""}
        facts = [("took", duration(summary.spent)), ("hosts", str(len(hosts))),
                 ("result hash" if summary.complete else "result hash of these", summary.hash)]
        facts += [(f"failed only on {host}", str(n)) for host, n in summary.only_on.items()]
        facts += [(f"could not start on {host}", str(n))
                  for host, n in summary.started_elsewhere.items()]
        return html_page(f"testcloud, {time.strftime('%Y-%m-%d %H:%M')}", self.outcomes,
                         self.output_of, facts, summary.trouble())


def html_page(title: str, outcomes: Iterable[Outcome], output_of: OutputOf,
              facts: Sequence[Tuple[str, str]], trouble: str = "") -> Iterator[str]:
    """Yield the report. An output is read when its piece is made."""
    outcomes = sorted(outcomes)
    counts = Counter(outcome.verdict for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.verdict == FAIL]
    flaky = [outcome for outcome in outcomes if outcome.verdict in (FLAKY, ONLY)]
    failures = sum(outcome.failed for outcome in outcomes)
    end = min(HTML_OUTPUT, HTML_OUTPUTS // (2 * max(1, min(len(failed), HTML_ENTRIES))))
    pieces: Dict[str, Iterable[str]] = {
        "hash": [in_base64(hashlib.sha256(HTML_SCRIPT.encode()).digest())],
        "title": [html_line(title)],
        "state": [FAIL if failures or trouble else OK],
        "headline": [html_line(html_headline(outcomes, failures, trouble))],
        "counts": (f'<a href="#verdict={verdict}">{html_badge(verdict)} {counts[verdict]:,}</a>\n'
                   for verdict in VERDICT_LABELS if counts[verdict]),
        "facts": (f"<div><dt>{html_line(name)}<dd>{html_line(fact)}</div>\n"
                  for name, fact in facts),
        "failures": html_entries(failed, lambda outcome: html_output(output_of(outcome), end)),
        "flaky": html_entries(flaky, lambda outcome: ""),
        "options": (f'<option value="{key}">{label}' for key, label in VERDICT_LABELS.items()),
        "data": html_data(outcomes),
        "script": [HTML_SCRIPT],
    }
    # not string.Template: it needs the whole text in memory
    for at, part in enumerate(re.split(r"\{\{(\w+)\}\}", HTML_TEMPLATE)):
        yield from pieces[part] if at % 2 else [part]


def html_headline(outcomes: Sequence[Outcome], failed: int, trouble: str) -> str:
    total = len(outcomes)
    if any(outcome.tests for outcome in outcomes):
        counts: Counter[str] = sum(map(case_counts, outcomes), Counter())
        return describe_tests(counts, failed, total) + (trouble and f"; {trouble}")
    words = grouped(total, "command") if total else "No commands"
    if failed:
        words = f"{failed:,} of {words} failed"
    elif total and not trouble:
        words += ", all passed"
    return words + (trouble and f"; {trouble}")


# --- entries, outputs, badges

def html_entries(outcomes: Sequence[Outcome], output: Callable[[Outcome], str]) -> Iterator[str]:
    """Yield articles about failed or flaky commands. The outputs of other tries are folded."""
    for outcome in outcomes[:HTML_ENTRIES]:
        seq, ending = outcome.seq, describe_ending(outcome)
        if outcome.host:
            ending += (f"; {outcome.host}, slot {outcome.slot} of {outcome.worker}, "
                       f"{duration(outcome.spent / 1000)}")
        yield (f'<article id="c{seq}"><h3><a href="#seq={seq}">{seq}</a> '
               f"<code>{html_line(outcome.title)}</code></h3>\n"
               f"<p>{html_badge(outcome.verdict)} {html_line(ending)}</p>\n"
               f"{html_tests(outcome.tests)}{output(outcome)}")
        for one in outcome.tries:
            if one.output:
                excerpt = html_output([one.last_words().encode()], HTML_OUTPUT)
                yield (f"<details><summary>Exit code {one.exitcode} on {html_line(one.host)}"
                       f"</summary>{excerpt}</details>\n")
        yield "</article>\n"
    if len(outcomes) > HTML_ENTRIES:
        yield f"<p>The list of all commands has {len(outcomes) - HTML_ENTRIES:,} more.</p>\n"
    if not outcomes:
        yield "<p>None.</p>\n"


def html_tests(tests: Optional[Tests]) -> str:
    """Return a list of the first failed tests."""
    lines = [f"<code>{html_line(test.title)}</code> {html_line(test.first_line)}\n"
             for test in (tests.failed if tests else ())]
    if tests and tests.failures > len(lines):
        lines.append(f"and {tests.failures - len(lines):,} more")
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>\n" if lines else ""


def html_output(parts: Iterable[bytes], end: int) -> str:
    """Return an output, or `end` bytes from either end if it is longer than both."""
    head, left_out, tail = head_and_tail(parts, end, end)
    if not left_out:
        head, tail = head + tail, b""
    texts = (part.decode("utf-8", "replace").replace("\r\n", "\n") for part in (head, tail))
    first, last = map(html_escape, map(escape_unprintable, texts))
    cut = f"<mark>{left_out:,} bytes left out</mark>" if left_out else ""
    return f'<pre tabindex="0">\n{first}{cut}{last}</pre>' if head else "<p>It wrote nothing.</p>"


def html_badge(verdict: str) -> str:
    return f'<b class="badge {verdict}">{VERDICT_LABELS[verdict]}</b>'


def html_line(text: str) -> str:
    """Return a text from outside as one line of HTML, also for an attribute."""
    return html_escape(one_line(text))


def html_escape(text: str) -> str:
    import html  # late
    return html.escape(text)


def one_line(text: str) -> str:
    return escape_unprintable(text).replace("\n", "\\n")


def describe_ending(outcome: Outcome) -> str:
    """Return the ending of a command, its other tries, and the text if it has a name, in words."""
    words = [f"exit code {outcome.exitcode}"]
    if outcome.exitcode == TIMED_OUT:
        words.append("timed out")
    if outcome.signal:
        words.append(describe_signal(outcome))
    if outcome.cause:
        words.append(outcome.cause)
    if outcome.only_on:
        words.append(f"failed only on {outcome.only_on}")
    if outcome.tries:
        words.append(describe_tries(outcome, str))
    if outcome.name:
        words.append(f"command: {outcome.cmd}")
    return "; ".join(words)


def all_tries(outcomes: Iterable[Outcome]) -> Iterator[Union[Outcome, Try]]:
    for outcome in outcomes:
        yield outcome
        yield from outcome.tries


# --- template and script, and the data for the script

def html_data(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """Yield JSON for the script: the slots (rows of the timeline), commands and other tries."""
    started = [one for one in all_tries(outcomes) if one.started]
    began = min((one.started for one in started), default=0.0)
    slots = sorted({(one.host, one.worker, one.slot) for one in started}, key=natural_order)
    rows = {slot: row for row, slot in enumerate(slots)}

    def bar(one: Union[Outcome, Try]) -> Tuple[int, float, float]:
        return (rows[one.host, one.worker, one.slot] if one.started else -1,
                round(max(0.0, one.started - began) * 1000, 1), round(one.spent, 2))
    shown = script_json([(one_line(host), one_line(worker), slot) for host, worker, slot in slots])
    yield f'{{"began":{began},\n"labels":{script_json(VERDICT_LABELS)},\n"rows":{shown},\n'
    yield '"commands":['
    for at, outcome in enumerate(outcomes):
        ending = one_line(describe_ending(outcome))
        yield (",\n" if at else "\n") + script_json((
            outcome.seq, one_line(outcome.title), outcome.verdict, *bar(outcome),
            "" if ending == "exit code 0" else ending))
    tries = [(outcome.seq, one.exitcode, *bar(one))
             for outcome in outcomes for one in outcome.tries]
    yield f'],\n"tries":{script_json(tries)}}}'


def script_json(value: object) -> str:
    """Return JSON that cannot end the script element around it."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


HTML_TEMPLATE = r"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'sha256-{{hash}}'; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{title}}</title>
<style>
:root { color-scheme: light dark;
  --OK: #5aa9e0; --FAIL: #d9480f; --FLAKY: #e6b000; --ONLY: #8a4fd0 }
body { max-width: 1500px; margin: auto; padding: 1rem; font: 15px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1, h3, p, dd { margin: 0 } h2 { margin: 2rem 0 .5rem } h2, h3 { font-size: 1.1em }
header { border-left: 8px solid var(--OK); padding-left: 1rem }
header.FAIL { border-color: var(--FAIL) }
.bar, dl, #list summary { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; align-items: baseline }
.bar, dl, pre, article { margin: .6rem 0 }
dt, small { font-size: 13px; opacity: .7 }
code, pre { font: 13px/1.45 ui-monospace, monospace }
pre, #lanes { overflow: auto; max-height: 26rem; background: #8881; border: 1px solid #8884 }
pre { padding: .6rem; white-space: pre-wrap }
mark { display: block }
article { content-visibility: auto; contain-intrinsic-size: auto 9rem }
.badge { font-size: 12px } .badge::before { content: "■ "; color: var(--OK) }
.FAIL::before { color: var(--FAIL) } .FLAKY::before { color: var(--FLAKY) }
.ONLY::before { color: var(--ONLY) }
input, select, button { font: inherit } #q { flex: 1 1 14rem }
#lanes { max-height: 70vh } canvas { position: sticky; left: 0; top: 0; display: block }
#tip { position: fixed; inset: auto 0 0; padding: .4rem 1rem; white-space: pre-line;
  background: CanvasText; color: Canvas }
#list details { padding: .2rem 0; border-bottom: 1px solid #8884 }
#list [open] { background: #8882 } #list summary { cursor: pointer }
#list summary > * { flex: 0 0 8rem } #list summary span:first-child { flex-basis: 3rem }
#list summary code { flex: 1 1 20rem }
html:not(.js) .js { display: none }
</style></head><body>
<header class="{{state}}"><h1>{{headline}}</h1><p>{{title}}</p></header>
<div class="bar">{{counts}}</div>
<dl>{{facts}}</dl>
<nav class="bar" aria-label="Sections"><a href="#failures">Failures</a> <a href="#flaky">Flaky</a>
<a class="js" href="#timeline">Timeline</a> <a class="js" href="#commands">All commands</a></nav>
<section id="failures"><h2>Failures</h2>
{{failures}}</section>
<section id="flaky"><h2>Flaky: passed in the end, or elsewhere</h2>
{{flaky}}</section>
<noscript><p>The timeline and the list of all commands need JavaScript.</p></noscript>
<section id="timeline" class="js"><h2>Timeline</h2>
<div class="bar">
<label>Zoom <input id="zoom" type="range" min="0" max="12" step=".5" value="0"></label>
<small id="caption"></small></div>
<div id="lanes" tabindex="0" role="region" aria-label="Timeline"><div>
<canvas role="img" aria-label="A row for each slot, a bar for each command; the list has them all">
</canvas></div></div><div id="tip" role="tooltip" hidden></div></section>
<section id="commands" class="js"><h2>All commands</h2>
<div class="bar" role="search"><input id="q" type="search" aria-label="Text to filter by"
placeholder="Filter: command, host, reason"><select id="verdict" aria-label="Verdict to filter by">
<option value="">any verdict{{options}}</select>
<label><input id="slowest" type="checkbox"> Slowest first</label>
<button id="back">Previous</button><button id="next">Next</button>
<small id="found" role="status"></small></div><div id="list"></div></section>
<script type="application/json" id="data">{{data}}</script>
<script>{{script}}</script></body></html>
"""

HTML_SCRIPT = r""""use strict";
document.documentElement.classList.add("js");
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent);
const {began, labels, rows} = data;  // a row is [host, worker, slot]
const commands = data.commands.map(([seq, cmd, verdict, row, at, spent, note]) =>
  ({seq, cmd, verdict, row, at, spent, note: note || "exit code 0", shown: true}));
const bySeq = new Map(commands.map(c => [c.seq, c]));
const tries = data.tries.map(([seq, code, row, at, spent]) => Object.assign(  // for their bars
  Object.create(bySeq.get(seq)), {row, at, spent, note: `another try: exit code ${code}`,
    verdict: code ? "FAIL" : "OK", faint: .4}));
let chosen = null, found = commands, first = 0;  // of the page of those found

function where({row}) {
  return row < 0 ? "never ran" : `${rows[row][0]}, slot ${rows[row][2]} of ${rows[row][1]}`;
}
function duration(ms) {  // as duration() of testcloud.py
  const s = ms / 1000, whole = Math.round(s), min = Math.floor(whole / 60);
  if (s < 1) return ms.toFixed(2) + " ms";
  if (whole < 120) return s.toFixed(s < 10 ? 2 : 1) + " s";
  return min < 120 ? `${min} min ${whole % 60} s` : `${Math.floor(min / 60)} h ${min % 60} min`;
}
function element(parent, tag, text, name = "") {  // no text becomes an element
  const made = parent.appendChild(document.createElement(tag));
  made.textContent = text; made.className = name;
  return made;
}

// The timeline: a canvas as large as its box. The box scrolls over the whole run.
const lanes = $("lanes"), canvas = lanes.querySelector("canvas"), pen = canvas.getContext("2d");
const AXIS = 24, GUTTER = 170, HEIGHT = Math.max(4, Math.min(22, 480 / rows.length));  // pixels
const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, ...[1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900,
  1800, 3600, 7200, 21600, 43200, 86400].map(s => s * 1000)];  // ms between marks of the axis
const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name);
const colours = Object.fromEntries(Object.keys(labels).map(verdict => [verdict, colour(verdict)]));
const bars = rows.map(() => []), firsts = new Map(), lasts = new Map();
const ORDER = ["OK", "FLAKY", "ONLY", "FAIL"];  // of painting: failures on top
for (const c of [...commands, ...tries]) if (c.row >= 0) {
  const host = rows[c.row][0];
  c.rank = c.faint ? -1 : ORDER.indexOf(c.verdict);
  bars[c.row].push(c);
  firsts.set(host, Math.min(c.at, firsts.get(host) ?? c.at));
  lasts.set(host, Math.max(c.at + c.spent, lasts.get(host) ?? 0));
}
for (const row of bars) row.sort((a, b) => a.rank - b.rank || a.at - b.at);
const total = Math.max(1, ...lasts.values());
const longest = Math.max(1, ...[...lasts].map(([host, last]) => last - firsts.get(host)));
const align = total > 4 * longest + 60000;  // no run has such a gap: the clock of a host is wrong
const span = align ? longest : total, time = at => new Date(began * 1000 + at).toLocaleString();
$("caption").textContent = !rows.length ? "Nothing ran." : `From ${time(0)}` +
  (align ? ". The clocks of hosts differ: each begins with its first command." : "");
let scale = 1;  // pixels a ms

const from = c => align ? firsts.get(rows[c.row][0]) : 0;
const xOf = c => GUTTER - lanes.scrollLeft + (c.at - from(c)) * scale;
const yOf = row => AXIS - lanes.scrollTop + row * HEIGHT;
function layout() {
  scale = (lanes.clientWidth - GUTTER - 8) / span * 2 ** $("zoom").value;
  canvas.parentNode.style.width = GUTTER + 8 + span * scale + "px";
  canvas.parentNode.style.height = AXIS + 8 + rows.length * HEIGHT + "px";
  paint();
}
function paint() {
  const W = lanes.clientWidth, H = lanes.clientHeight, dots = devicePixelRatio;
  canvas.width = W * dots; canvas.height = H * dots;
  canvas.style.width = W + "px"; canvas.style.height = H + "px";
  pen.scale(dots, dots); pen.textBaseline = "middle"; pen.font = "12px system-ui, sans-serif";
  const fill = (style, x, y, w, h) => { pen.fillStyle = style; pen.fillRect(x, y, w, h); };
  const ink = getComputedStyle(canvas).color, names = [];
  let free = AXIS + 7 - HEIGHT / 2;  // where the next name fits
  for (let row = Math.floor(lanes.scrollTop / HEIGHT); row < rows.length && yOf(row) < H; row++) {
    const y = yOf(row), zero = xOf({row, at: 0}), [host, , slot] = rows[row];
    let end = GUTTER, rank;  // bars that end before this x are hidden
    for (const c of bars[row]) {
      const x = zero + c.at * scale, w = Math.max(c.spent * scale, 2);
      if (c.rank !== rank) { rank = c.rank; end = GUTTER; }
      if (x > W || x + c.spent * scale < end) continue;
      pen.globalAlpha = c.shown ? c.faint ?? 1 : .15;
      const thin = rank > 0 ? 0 : HEIGHT / 8;
      fill(colours[c.verdict], x, y + thin, w - (w > 4), HEIGHT - 2 * thin);
      if (c.shown) end = x + w;
    }
    pen.globalAlpha = 1;
    if (host !== rows[row - 1]?.[0]) fill("#8884", GUTTER, y, W, 1);
    if (y < free) continue;
    names.push([`${host} · ${slot}`, y + HEIGHT / 2]);
    free = y + 14;
  }
  pen.clearRect(0, 0, GUTTER, H);
  pen.fillStyle = ink;
  for (const [name, y] of names) pen.fillText(name, 8, y, GUTTER - 16);
  if (chosen?.row >= 0) {
    pen.lineWidth = 2; pen.strokeStyle = ink;
    pen.strokeRect(xOf(chosen) - 1, yOf(chosen.row), Math.max(chosen.spent * scale, 2) + 2, HEIGHT);
  }
  pen.clearRect(0, 0, W, AXIS);
  const step = STEPS.find(step => step * scale > 90) ?? 90 / scale;
  const before = lanes.scrollLeft / scale;  // ms
  for (let n = Math.ceil(before / step); n * step <= Math.min(span, before + W / scale); n++) {
    const x = GUTTER + (n * step - before) * scale;
    fill("#8884", x, 0, 1, H);
    pen.fillStyle = ink;
    pen.fillText(n ? duration(n * step).replace(/\.0+ /, " ") : "0", x + 4, AXIS / 2);
  }
}
function under(event) {  // the bar at the pointer that was painted last
  const x = event.offsetX, row = Math.floor((event.offsetY - yOf(0)) / HEIGHT);
  if (x < GUTTER || event.offsetY < AXIS || !bars[row]) return undefined;
  return [...bars[row]].reverse().find(c => x > xOf(c) - 3 && x < xOf(c) + c.spent * scale + 3);
}
canvas.onpointermove = event => {
  const c = under(event);
  canvas.style.cursor = c ? "pointer" : "default";
  $("tip").hidden = !c;
  if (c) $("tip").textContent = `${c.seq}: ${c.cmd.slice(0, 300)}
    ${labels[c.verdict]}, ${c.note}; ${duration(c.spent)} on ${where(c)}`;
};
canvas.onpointerleave = () => { $("tip").hidden = true; };
canvas.onclick = event => {
  const c = under(event);
  if (c) location.hash = "seq=" + c.seq;
};
lanes.onscroll = paint;
$("zoom").oninput = () => {  // what is in the middle stays there
  const middle = (lanes.clientWidth - GUTTER) / 2, at = (lanes.scrollLeft + middle) / scale;
  layout();
  lanes.scrollLeft = at * scale - middle;
};

// The list: only a page of it are elements. An opened command has all that is known of it.
const PAGE = 200, LONG = 500, list = $("list");
function show(at) {  // the page with the command of this index
  first = at - at % PAGE;
  list.replaceChildren();
  for (const c of found.slice(first, first + PAGE)) {
    const item = element(list, "details", ""), head = element(item, "summary", "");
    item.id = "l" + c.seq;
    item.ontoggle = () => { if (item.open) choose(c, item); };
    element(head, "span", c.seq);
    element(head, "b", labels[c.verdict], "badge " + c.verdict);
    element(head, "span", duration(c.spent));
    element(head, "code", c.cmd.length > LONG ? c.cmd.slice(0, LONG) + "…" : c.cmd);
    element(head, "span", c.row < 0 ? "never ran" : rows[c.row][0]);
  }
  $("back").hidden = !first;
  $("next").hidden = first + PAGE >= found.length;
}
function filter() {
  const text = $("q").value.toLowerCase(), verdict = $("verdict").value;
  for (const c of commands) c.shown = (!verdict || c.verdict === verdict)
    && (!text || `${c.cmd}\n${c.note}\n${where(c)}`.toLowerCase().includes(text));
  found = commands.filter(c => c.shown);
  if ($("slowest").checked) found.sort((a, b) => b.spent - a.spent);
  $("found").textContent = `${found.length} of ${commands.length}`;
  show(0); paint();
}
function choose(c, item) {  // fill in an opened command, and bring its bar in sight
  chosen = c;
  remember();
  if (c.row >= 0) lanes.scrollTo(xOf(c) + lanes.scrollLeft - (lanes.clientWidth + GUTTER) / 2,
    c.row * HEIGHT - lanes.clientHeight / 2);
  paint();
  if (item.children.length > 1) return;
  element(item, "p", `${c.note}; ${where(c)}` + (c.row < 0 ? "" : `; from ${time(c.at)}`));
  if (c.cmd.length > LONG) element(item, "pre", c.cmd);
  for (const part of document.querySelectorAll(`#c${c.seq} > p ~ *`))
    item.append(part.cloneNode(true));
}
function remember() {  // in the address, which a user may pass on
  const words = Object.entries({q: $("q").value, verdict: $("verdict").value, seq: chosen?.seq});
  history.replaceState(null, "", "#" + new URLSearchParams(words.filter(([, value]) => value)));
}
function arrive() {  // what the address asks for: #q=TEXT&verdict=FAIL&seq=17
  if (!location.hash.includes("=")) return;  // a section
  const words = new URLSearchParams(location.hash.slice(1));
  const c = bySeq.get(Number(words.get("seq")));
  $("q").value = words.get("q") || ""; $("verdict").value = words.get("verdict") || "";
  filter();
  $("commands").scrollIntoView();
  if (!c?.shown) return;
  show(found.indexOf(c));
  $("l" + c.seq).open = true;
  $("l" + c.seq).scrollIntoView({block: "center"});
}
$("q").oninput = $("verdict").onchange = $("slowest").onchange = () => { filter(); remember(); };
$("back").onclick = () => show(first - PAGE);
$("next").onclick = () => show(first + PAGE);
addEventListener("hashchange", arrive);
matchMedia("(prefers-color-scheme: dark)").onchange = paint;
new ResizeObserver(layout).observe(lanes);
layout(); filter(); arrive();
"""


# === Timings and progress =============================================================
#
# Timings lets the next run begin with the longest commands. The rest tells a user how far a
# run is, and at its end whether more slots would have made it faster.


class Timings(Reporter):
    """Keeps the times of commands in a file, the latest last."""

    MAX_COMMANDS = 20_000  # about 1.4 MB, read in 10 ms
    MIN_LONGEST: Seconds = 0.05  # the order of shorter commands hardly matters

    def __init__(self, path: str) -> None:
        self.path = path
        # of this run, by command, the latest last: seconds, and whether it failed
        self.fresh: OrderedDict[str, Tuple[Seconds, bool]] = OrderedDict()
        self.most = self.MAX_COMMANDS  # of these: older ones would not be written
        self.longest: Seconds = 0.0  # of all

    def result(self, outcome: Outcome) -> None:
        if outcome.ended_itself:
            self.longest = max(self.longest, outcome.spent / 1000)
            self.fresh[outcome.cmd] = outcome.spent / 1000, outcome.exitcode != 0
            self.fresh.move_to_end(outcome.cmd)
            if len(self.fresh) > self.most:
                self.fresh.popitem(last=False)

    def ended(self, summary: Summary) -> None:
        if self.longest >= self.MIN_LONGEST:
            write_cache(self.path, json.dumps(self.learned()))

    def learned(self) -> Dict[str, Any]:
        """Return what to write: the times of earlier runs and the new ones."""
        known = read_timings(self.path)  # again: other clients may have ended
        for cmd, (spent, _) in self.fresh.items():
            known.pop(cmd, None)
            known[cmd] = spent
        return dict([*known.items()][-self.MAX_COMMANDS:])


class LineTimings(Timings):
    """Keeps the times of lines of the input, of which commands have several (-n)."""

    MAX_COMMANDS = 100_000  # lines, about 8 MB; nothing but a run with -n reads them

    def __init__(self, path: str, lines_of: Callable[[str], List[str]], size: int) -> None:
        """`lines_of` returns the lines in a command, `size` of them in the mean."""
        super().__init__(path)
        self.lines_of = lines_of
        self.most = math.ceil(self.MAX_COMMANDS / size)

    def learned(self) -> Dict[str, Any]:
        # a command's own report may have the times of its lines: these would be better than shares
        times = read_line_times(self.path)
        times.learn([(self.lines_of(cmd), *row) for cmd, row in self.fresh.items()])
        return times.to_json(self.MAX_COMMANDS)


def file_of(line: str) -> str:
    """Return the file of a line, the text before its first "::"; "" if there is none."""
    file, mark, _ = line.partition("::")
    return file if mark else ""


def files_of(lines: Sequence[str]) -> List[str]:
    """Return the distinct files of lines."""
    return [*filter(None, dict.fromkeys(map(file_of, lines)))]


class LineTimes:
    """The times of the lines of batches, and of their files.

    Only a batch's sum is measured: a time for each line, and one for each file that it has lines
    of, however many (imports, fixtures). How often a file was cut tells the two apart. So the
    latest batches of all lines are kept, and learn() fits the times to them and the new ones."""

    PRIOR = 0.05  # a new file's own time, of that of its lines: the least that a fit can find
    LEAST_SHARE = 0.1  # of a batch's mean, for a line that was short: it may have changed
    RELAXATION = 0.5  # below 1, batches that contradict each other have a compromise
    SWEEPS = 50  # by then, times are within some percent
    MAX_STEPS = 2_000_000  # lines in all sweeps: about a second

    def __init__(self) -> None:
        self.lines: Dict[str, float] = {}  # seconds
        self.files: Dict[str, float] = {}  # seconds of each batch with lines of the file
        self.batches: List[Tuple[Seconds, List[str]]] = []  # no two have the same line

    def seconds(self, lines: Sequence[str], mean: Seconds) -> Seconds:
        """Return how long a batch takes. Unknown lines take `mean`."""
        return sum(self.lines.get(line, mean) for line in lines) + sum(
            self.files.get(file, 0.0) for file in files_of(lines))

    def learn(self, batches: Sequence[Tuple[Sequence[str], Seconds, bool]]) -> None:
        """Learn from batches: lines, seconds, whether it failed."""
        ran = [(max(spent, 1e-6), [*dict.fromkeys(lines)]) for lines, spent, failed in batches
               if lines and not (failed and spent < self.seconds(lines, 0.0))]  # it ended early
        known = [self.lines[line] for _, lines in ran for line in lines if line in self.lines]
        mean = mean_of(known)
        for spent, lines in ran:
            for line in lines:
                self.lines.setdefault(line, mean if known else spent / len(lines))
            new = {file: 0.0 for file in files_of(lines) if file not in self.files}
            for line in lines:
                if file_of(line) in new:
                    new[file_of(line)] += self.PRIOR * self.lines[line]
            self.files.update(new)
        self.fit([*self.batches, *ran] if ran else [])
        seen = {line for _, lines in ran for line in lines}
        self.batches = [batch for batch in self.batches if seen.isdisjoint(batch[1])]
        for spent, lines in ran:
            fresh = [line for line in lines if line in seen]  # it may be in several batches
            seen.difference_update(fresh)
            self.batches += [(spent, fresh)] * bool(fresh)

    def fit(self, batches: Sequence[Tuple[Seconds, List[str]]]) -> None:
        """Scale the times in each batch towards its sum, by turns (multiplicative algebraic
        reconstruction; R. Gordon, R. Bender, G. T. Herman, 1970)."""
        times, costs = self.lines, self.files
        rows = [(spent, lines, files_of(lines)) for spent, lines in batches]
        steps = sum(len(lines) for _, lines in batches) or 1
        for _ in range(max(2, min(self.SWEEPS, self.MAX_STEPS // steps))):
            for spent, lines, files in rows:
                found = [times[line] for line in lines]
                least = max(1e-6, self.LEAST_SHARE * sum(found) / len(found))
                found = [max(seconds, least) for seconds in found]
                ratio = (spent / (sum(found) + sum(costs[file] for file in files))
                         ) ** self.RELAXATION
                for line, seconds in zip(lines, found):
                    times[line] = seconds * ratio
                for file in files:
                    costs[file] = max(1e-6, costs[file] * ratio)

    def to_json(self, most: int) -> Dict[str, Any]:
        """Return what read_line_times() reads, with up to `most` lines. Those of the batches are
        the last ones, in order, so that a batch is the number of its lines."""
        lines = dict(self.lines)
        for line in itertools.chain.from_iterable(lines for _, lines in self.batches):
            lines[line] = lines.pop(line)
        lines = {line: round(seconds, 6) for line, seconds in [*lines.items()][-most:]}
        files = {file: round(self.files[file], 6) for file in map(file_of, lines) if file}
        return {"files": files, "batches": [[spent, len(lines)] for spent, lines in self.batches],
                "lines": lines}


def read_line_times(path: str) -> LineTimes:
    """Return the times in a file; none if it cannot be read."""
    times = LineTimes()
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError, TypeError,
                             KeyError):
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        lines, files, sizes = found["lines"], found["files"], found["batches"]
        numbers = [*lines.values(), *files.values(), *itertools.chain.from_iterable(sizes)]
        if {*map(type, numbers)} <= {int, float} and all(
                is_time(number) and number >= 0 for number in numbers):
            texts, batches = [*lines], []
            for spent, size in reversed(sizes):
                if 0 < size <= len(texts):
                    batches.append((spent, texts[-size:]))
                    del texts[-size:]
            times.lines, times.batches = lines, batches[::-1]
            times.files = {**dict.fromkeys(filter(None, map(file_of, lines)), 1e-6), **files}
    return times


def mean_of(times: Sequence[float]) -> Seconds:
    """Return the mean; 1 s without times, which makes all equal."""
    return max(sum(times) / len(times), 1e-6) if times else 1.0


def read_timings(path: str) -> Dict[str, float]:
    """Return seconds by command; {} if the file cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            found: Dict[str, float] = json.load(file)
        times = found.values()
        return found if {*map(type, times)} <= {int, float} and all(map(is_time, times)) else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


PER_COMMAND: Seconds = 5e-5  # of broker and client, however many slots there are


def advice_on_slots(times: Sequence[float], slots: int) -> str:
    """Return advice for times in seconds: the fewest slots for a run within 10 % of the best."""
    longest = max(*times, 1e-3)
    best = max(longest, PER_COMMAND * len(times))
    enough, most = max(1, math.ceil(sum(times) / (1.1 * best))), len(times)
    while enough < most:  # bisect has a key from Python 3.10 on
        middle = (enough + most) // 2
        if makespan(times, middle) > 1.1 * best:
            enough = middle + 1
        else:
            most = middle
    if enough <= slots:
        return (f"longest command {duration(longest)}: more slots than {enough} do not help, only "
                f"shorter commands")
    return (f"longest command {duration(longest)}; with {enough} slots this run would take "
            f"{duration(max(best, makespan(times, enough)))}; more would not help")


def makespan(times: Sequence[float], slots: int) -> float:
    """Return the seconds of a run, the longest commands first (R. L. Graham, 1969)."""
    if len(times) > 20_000:  # then the lower bound is close
        return max(max(times), sum(times) / slots)
    ends = [0.0] * slots
    for spent in sorted(times, reverse=True):
        heapq.heapreplace(ends, ends[0] + spent)
    return max(ends)


PROGRESS_INTERVAL: Seconds = 0.2  # between updates of the progress line
SILENCE_INTERVAL: Seconds = 60.0  # without a terminal: some services end a silent job
STEADY_INTERVAL: Seconds = 10.0  # between notices of --progress without a terminal


class Progress:
    """Shows the progress: in the progress line, or every `interval` seconds in a notice.

    The interval begins again when anything else is written, unless `steady`."""

    def __init__(self, client: Client, writer: Writer, interval: Seconds = 0,
                 steady: bool = False) -> None:
        self.client = client
        self.writer = writer
        self.interval = interval
        self.steady = steady
        self.began = PROGRESS_LINE.last_write = time.monotonic()
        self.due = self.began + (interval or NOTICE_DELAY)

    def update(self) -> None:
        now = time.monotonic()
        if now < self.due or self.client.left:
            return
        spent = now - self.began
        if not self.interval:
            self.due = now + PROGRESS_INTERVAL
            with contextlib.suppress(OSError):  # the terminal has gone
                PROGRESS_LINE.text = progress_text(self.client, spent, screen_size(2)[0] - 1)
            self.writer.redraw()
            return
        if self.steady or now >= PROGRESS_LINE.last_write + self.interval:
            print_notice(progress_notice(self.client, spent, now))
        self.due = (now if self.steady else PROGRESS_LINE.last_write) + self.interval


def progress_of(settings: argparse.Namespace, client: Client, writer: Writer) -> Optional[Progress]:
    """Return a line for a terminal, notices elsewhere; None: quiet, a dumb terminal or a pager."""
    if sys.stderr is None or settings.verbose is None:
        return None
    if not sys.stderr.isatty():
        interval = STEADY_INTERVAL if settings.progress else SILENCE_INTERVAL
        return Progress(client, writer, interval, settings.progress)
    piped = stat.S_ISFIFO(os.fstat(1).st_mode)
    return Progress(client, writer) if settings.progress or not is_dumb() and not piped else None


def progress_text(client: Client, spent: Seconds, columns: float = math.inf) -> str:
    """Return the progress. Too few columns: parts with the lowest numbers are left out."""
    rate = client.reported / max(spent, 0.001)
    eta = client.reported and client.input_ended
    preparing = sum(command.preparing for command in client.window.values())
    hosts = f"{client.connected_hosts or 0} of {plural(client.wanted_hosts, 'host')}"
    parts = [part for part in (
        (7, f"{client.reported}/{client.total}{'' if client.input_ended else '+'} done"),
        (5, f"{client.failed} failed" if client.failed else ""),
        (4, f"{client.flaky} flaky" if client.flaky else ""),
        (6, ", ".join(client.offer.words(client.now))),
        (3, f"{min(client.accepted - preparing, client.slots)} running"),
        (0, (f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s") if client.reported else ""),
        (6, f"ETA {duration((client.total - client.reported) / rate, whole=True)}" if eta else ""),
        (2, hosts if client.wanted_hosts else plural(client.workers, "worker")),
        (1, plural(client.slots, "slot"))) if part[1]]
    while sum(len(text) + 2 for _, text in parts) > columns + 2:
        parts.remove(min(parts))
    return ", ".join(text for _, text in parts)


def progress_notice(client: Client, spent: Seconds, now: Seconds) -> str:
    """Return the progress, and the command that has been running for longest."""
    text = progress_text(client, spent)
    held = [command for command in client.window.values() if command.worker]
    if not held:
        return text
    longest = min(held, key=lambda command: command.since)
    return f"{text}; for {duration(now - longest.since, whole=True)}: {printable(longest.title)}"


# === Status tables ====================================================================
#
# The answer to STATUS for people: lines about the whole cloud, then a table of workers and
# one of clients. A table is a list of lines.

MANUAL["status"] = """\
    $ testcloud.py status
    $ testcloud.py status --watch
    $ testcloud.py cancel 4711@vm

@options status,cancel --connect
@options status --watch --json --wait
@options cancel PID@HOST --wait

Status

It shows the workers: their slots, what runs, what is done and how much of that failed. It
shows the load of their machines, and when the broker last heard them. It shows the
clients: what they still have to be run, and what they wait for. It shows the brokers
below. It needs a client's key, and shows no commands.

--watch goes on until q, also while there is no broker.

What is done counts from the start of the broker. A client with more than 4,096 commands,
or with --serial, keeps some for later. It tells the broker every two seconds how many.

Cancel

It stops the run of a client, by PID and host as status shows them. The client says who
stopped it, stops its commands and exits with 143. A client whose connection is broken is
told when it is back.

cancel needs the key of that client, or the cloud's own. Clients with --local or -S have
no broker that it could ask.

JSON

status --json prints an object on a line:

    broker    its name
    above     names of the brokers above it
    workers   for each: name, host, kind (worker, broker, plain), below (names of
              brokers), labels, slots, running, done, failed (of those done), held
              (results that were not taken yet), weight, load, there (connected), silent
              (for seconds), and cache (bytes of workspaces), if it is known
    clients   for each: host, pid, kind (client, plain, above: the broker above), there,
              queued, running, held, done, failed, waits_for
"""


def status_tables(fields: Fields, broker: str, columns: int = 0) -> List[List[str]]:
    """Return the tables. To fit into the columns (0: any number), long names are cut."""
    workers = sorted(fields["workers"], key=lambda row: (row["host"], row["name"]))
    clients = fields["clients"]
    there = [row for row in workers if row["there"]]
    running = sum(row["running"] for row in there)
    slots = sum(max(row["slots"], row["running"]) for row in there)
    whole = [f"{broker}: {plural(len(there), 'worker')}, {running} of {plural(slots, 'slot')} "
             f"busy, {plural(len(clients), 'client')}"]
    if fields.get("above"):
        whole.append(f"below {', '.join(fields['above'])}")
    tables = [whole]
    if workers:
        head = ["HOST", "SLOTS", "RUNNING", "DONE", "FAILED", "WEIGHT", "LOAD", "CACHE", "SEEN", ""]
        rows = [head, *map(worker_row, workers)]
        if not any(row.get("cache") for row in workers):
            rows = [[*row[:7], *row[8:]] for row in rows]
        tables.append(align_columns(rows, columns))
    if clients:
        head = ["CLIENT", "PID", "QUEUED", "RUNNING", "DONE", "FAILED", "WAITS FOR"]
        tables.append(align_columns([head, *map(client_row, clients)], columns))
    return [[printable(line, 1000) for line in lines] for lines in tables]


def worker_row(row: Fields) -> List[str]:
    """Return the cells for a worker, or for a broker below and the brokers below that."""
    notes = [] if row["there"] else ["connection lost"]
    if row["kind"] != WORKER_ROLE:
        notes.append(" ".join([row["kind"], *row["below"]]))
    elif not row["slots"]:
        notes.append("takes nothing new")
    notes += [f"label {name}" for name in row["labels"]]
    cells = [str(row[name]) for name in ("host", "slots", "running", "done", "failed", "weight")]
    load = f"{row['load']:.1f}" if row["kind"] == WORKER_ROLE else ""  # a broker does not report it
    cache = amount(row["cache"]) if row.get("cache") else ""
    return [*cells, load, cache, f"{row['silent']:.0f} s ago", "; ".join(notes)]


def client_row(row: Fields) -> List[str]:
    kind = {"above": " (broker above)", "plain": " (plain)"}.get(row["kind"], "")
    cells = [str(row[name]) for name in ("queued", "running", "done", "failed")]
    return [row["host"] + kind, str(row.get("pid") or ""), *cells,
            row["waits_for"] if row["there"] else "its connection"]


def align_columns(rows: List[List[str]], columns: int = 0) -> List[str]:
    """Return the table of these cells: texts in the first and last column, numbers between. The
    first column is cut if the screen has too few columns."""
    rows = [[truncate_middle(printable(cell, MAX_TEXT), 60) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    last = len(widths) - 1
    if columns:
        widths[0] = min(widths[0], max(12, columns - 1 - 2 * last - sum(widths[1:])))
        rows = [[truncate_middle(row[0], widths[0]), *row[1:]] for row in rows]
    return ["  ".join(cell.ljust(width) if at in (0, last) else cell.rjust(width)
                      for at, (cell, width) in enumerate(zip(row, widths))).rstrip()
            for row in rows]


def join_tables(tables: Sequence[Sequence[str]]) -> List[str]:
    """Return the lines of the tables, with an empty line between two tables."""
    return [line for lines in tables for line in ("", *lines)][1:]


def fit_to_screen(tables: Sequence[Sequence[str]], columns: int, rows: int) -> List[str]:
    """Return the lines that fit on a screen; the cursor takes its last row. Long lines are wrapped,
    or cut if there are too many. Then each table gets its share of rows."""
    import textwrap  # late: only --watch needs it
    wrap = textwrap.TextWrapper(max(10, columns - 1), subsequent_indent="    ",
                                break_on_hyphens=False).wrap
    wrapped = join_tables([[piece for line in lines for piece in wrap(line)] for lines in tables])
    if len(wrapped) < rows:
        return wrapped
    shown, room = [[line[:columns - 1] for line in lines] for lines in tables], rows - 1
    for nth, lines in enumerate(sorted(shown, key=len)):
        share = room // (len(tables) - nth)
        left_out = len(lines) - share
        if left_out > 0:
            del lines[share:]
            if share > 1:
                lines[-1] = f"({left_out + 1} more lines)"[:columns - 1]
        room -= len(lines)
    return [line for lines in shown for line in lines]


# === Addresses and pyzmq ==============================================================
#
# Reads addresses as people write them, and finds pyzmq. Opens no connection.

IPC_PATH_MAX = 107  # bytes of a Unix socket's path; the system adds a NUL
ADDRESS = re.compile(r"(?:tcp://)?(\[[^]]+\]|[^][:/ ]+)(?::0*([0-9]{1,5}))?")  # host, port


class UsageError(Exception):
    """Wrong usage: exit status 2."""


class SetupError(Exception):
    """This machine lacks something: exit status 3."""


def require_zmq() -> None:
    """Import zmq and socket late: --help and --local do not need them. Raises SetupError."""
    global socket, zmq
    import socket
    try:
        import zmq
    except ImportError:
        python = venv_python()
        raise SetupError("Python's package pyzmq is missing: " + (
            f"run this with {printable(python, 1000)}, which has it" if python else
            "apt install python3-zmq (or, beside this script: python3 -m venv .venv && "
            ".venv/bin/pip install pyzmq); or use client --local or client -S HOSTS")) from None


def venv_python() -> str:
    """Return the python of .venv beside the script if that has pyzmq, else ""."""
    import glob
    venv = beside_script(".venv", True)
    pattern = os.path.join("lib", "python*", "site-packages", "zmq", "__init__.py")
    found = glob.glob(os.path.join(glob.escape(venv), pattern))
    return os.path.join(venv, "bin", "python") if found else ""


def use_venv_python() -> None:
    """If only .venv has pyzmq (as after `make demo`), import it from there, or restart with the
    python there if that is another one. This runs a program there: so .venv and its directory
    must belong to this user."""
    from importlib.machinery import PathFinder
    tried = os.environ.pop("TESTCLOUD_VENV_TRIED", "")
    if PathFinder.find_spec("zmq") is not None or tried:
        return
    python = venv_python()
    with contextlib.suppress(OSError):
        owners = {os.lstat(beside_script(name, True)).st_uid for name in ("", ".venv")}
        if not python or owners != {os.geteuid()}:
            return
        packages = os.path.join(beside_script(".venv", True), "lib",
                                "python{}.{}".format(*sys.version_info), "site-packages")
        same = os.path.realpath(python) == os.path.realpath(sys.executable)
        if same and os.path.isdir(os.path.join(packages, "zmq")):
            sys.path.append(packages)  # a restart would take twice the time
        else:
            os.execve(python, [python, os.path.abspath(__file__), *sys.argv[1:]],
                      {**os.environ, "TESTCLOUD_VENV_TRIED": "1"})


def parse_address(text: str, port: int, listen: bool = False) -> str:
    """Return the ZeroMQ endpoint for tcp://host:port, host:port, host or ipc://path. `port` is
    the default. Host * and port 0 are only for a listener. Raises UsageError."""
    if text.startswith("ipc://"):
        size = len(to_bytes(text[len("ipc://"):]))
        if in_utf8(text) != text or not 0 < size <= IPC_PATH_MAX:
            raise UsageError(f"cannot use {text!r}: a path of an ipc:// address is UTF-8 text of 1 "
                             f"to {IPC_PATH_MAX} bytes")
        return text
    match = ADDRESS.fullmatch(text) if text.isascii() else None
    number = int(match[2] or port) if match else 0
    if match is None or number > 65535:
        raise UsageError(f"cannot read address {text!r}: write tcp://host:port, host:port, host or "
                         f"ipc://path; IPv6 as [::1]:port; a port is a number from 0 to 65535")
    if not listen and (match[1] == "*" or number == 0):
        raise UsageError(f"cannot connect to {text!r}: give the host and port of a broker (* and "
                         f"port 0 are for listening)")
    return f"tcp://{match[1]}:{number}"


def split_tcp(address: str) -> Tuple[str, int]:
    """Return host (without brackets) and port of a tcp endpoint."""
    host, _, port = address[len("tcp://"):].rpartition(":")
    return host.strip("[]"), int(port)


def resolve(address: str) -> str:
    """Return the endpoint with its host name resolved. Raises SetupError."""
    if address.startswith(("ipc://", "tcp://*:")):
        return address
    import socket
    host, port = split_tcp(address)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SetupError(f"cannot find host {host!r} ({error}): check its name") from None
    # IPv4 first, as libzmq connects: otherwise localhost would be two addresses
    family, _, _, _, (ip, *_) = min(found, key=lambda row: row[0] != socket.AF_INET)
    return f"tcp://[{ip}]:{port}" if family == socket.AF_INET6 else f"tcp://{ip}:{port}"


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach the (resolved) endpoint."""
    return address.startswith(("ipc://", "tcp://127.", "tcp://[::1]"))


def call_libc(function: str, argument: int) -> None:
    """Call a function of the C library, if there is one of that name."""
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes
        getattr(ctypes.CDLL(None), function)(argument)


# === Event loop =======================================================================
#
# One loop serves all roles: it moves messages, and tells machines the time. Threads reach it
# only through post(). zmq.Poller waits for everything: selectors and asyncio cannot wait for
# ZeroMQ sockets.

MAX_POLL_TIME: Seconds = 0.25  # the loop notices each stop longer than this + MIN_PAUSE
MIN_PAUSE: Seconds = 0.25  # a round this late was not slow: the process was stopped


class Adapter(NamedTuple):
    """A machine with its links and effects."""

    machine: Machine
    links: Dict[str, Link]  # by name
    effects: Dict[type, Callable[[Any], object]]  # a function for each kind of effect


class EventLoop:
    """Waits for messages, timers and threads, and calls the machines, until one of them exits."""

    def __init__(self, sockets: bool) -> None:
        if sockets:
            require_zmq()
            # ROUTERs number their peers from rand() on, which libzmq does not seed. It aborts if
            # a peer has chosen the next number as its routing id.
            call_libc("srand", int.from_bytes(os.urandom(4), "little"))
        self.context: Any = zmq.Context() if sockets else None
        self.poller: Any = zmq.Poller() if sockets else select.poll()
        self.adapters: List[Adapter] = []
        self.links: List[SocketLink] = []
        self.callbacks: Dict[Any, Callable[[Seconds], object]] = {}  # by descriptor or socket
        self.writable = zmq.POLLOUT if sockets else select.POLLOUT
        self.posted: Deque[Callable[[Seconds], None]] = deque()
        self.wake_in, self.wake_out = os.pipe()
        os.set_blocking(self.wake_in, False)
        os.set_blocking(self.wake_out, False)
        self.add_reader(self.wake_in, lambda now: os.read(self.wake_in, 4096))
        self.expected: Seconds = math.inf  # the latest time for the next call of clock()
        self.status: Optional[int] = None  # of run()
        self.refusals = RefusalLog()
        self.each_round: List[Callable[[], None]] = [self.refusals.flush]

    def add(self, machine: Machine, effects: Dict[type, Callable[[Any], object]]) -> Adapter:
        """Return a new adapter for this machine, without links."""
        adapter = Adapter(machine, {}, {
            Log: lambda effect: logging.log(effect.level, "%s", effect.text),
            Notice: lambda effect: print_notice(effect.text),
            Reconnect: lambda effect: adapter.links[effect.link].reconnect(),
            Exit: lambda effect: self.exit(effect.status), **effects})
        self.adapters.append(adapter)
        return adapter

    def exit(self, status: int) -> None:
        """Let run() return this status. The first status counts."""
        if self.status is None:
            self.status = status

    def post(self, function: Callable[[Seconds], None]) -> None:
        """Call function(now) in the loop. Any thread or signal handler may post."""
        self.posted.append(function)
        with contextlib.suppress(OSError):  # full: the loop wakes anyway; or closed
            os.write(self.wake_out, b"!")

    def add_reader(self, file: Any, function: Callable[[Seconds], object]) -> None:
        """Call function(now) whenever the descriptor or ZeroMQ socket is readable."""
        self.callbacks[file] = function
        self.poller.register(file, select.POLLIN)

    def add_writer(self, file: int, function: Callable[[Seconds], object]) -> None:
        """Call function(now) whenever the descriptor is writable."""
        self.callbacks[file] = function
        self.poller.register(file, self.writable)

    def remove(self, file: int) -> None:
        """Stop calling the function of a descriptor, if there is one. Call this before close()."""
        if self.callbacks.pop(file, None):
            self.poller.unregister(file)

    def every(self, interval: Seconds, function: Callable[[Seconds], None]) -> None:
        """Call function(now) in a round of the loop, at most once in `interval` seconds."""
        due = -math.inf

        def call_if_due() -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due:
                due = now + interval
                function(now)
        self.each_round.append(call_if_due)

    def on_signals(self, handler: Callable[[int, Seconds], None], control: int = -1) -> None:
        """Call handler(128 + number, now) in the loop for each of signals_to_handle().

        A supervisor sends its signals on by the pipe `control`. Ctrl-C in a terminal reaches
        both processes, and must count once. So the supervisor's signals are counted, and our
        own signal counts as the first of them.
        """
        handled = 0
        passed_on = itertools.count(1)

        def handle(number: int, count: int, now: Seconds) -> None:
            nonlocal handled
            if count > handled:
                handled = count
                handler(128 + number, now)

        def read_control(now: Seconds) -> None:
            numbers = os.read(control, 100)
            for number in numbers:
                handle(number, next(passed_on), now)
            if not numbers:  # the supervisor was killed
                self.exit(128 + signal.SIGKILL)
        self.catch_signals(lambda number: self.post(
            lambda now: handle(number, 1 if control >= 0 else handled + 1, now)))
        if control >= 0:
            self.add_reader(control, read_control)

    def catch_signals(self, caught: Callable[[int], None]) -> None:
        """Call caught(number) on each of signals_to_handle(). Commands must inherit no blocked
        or ignored signal: all are unblocked, and those ignored get an empty handler."""
        handled = signals_to_handle()
        for number in signal.valid_signals() - IGNORED_SIGNALS:
            if number in handled:
                signal.signal(number, lambda number, _: caught(number))
            elif signal.getsignal(number) == signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # ends a poll() that begins between the signal and its Python handler
        signal.set_wakeup_fd(self.wake_out, warn_on_full_buffer=False)

    def run(self) -> int:
        """Return the status of the first exit(). Until then, move messages and call machines."""
        while True:
            self.flush()
            for function in self.each_round:
                function()
            if self.status is not None:
                return self.status
            self.wait()

    def clock(self) -> Seconds:
        """Return the time. If the process was stopped meanwhile, call paused() first."""
        now = time.monotonic()
        if now > self.expected + MIN_PAUSE:
            for adapter in self.adapters:
                adapter.machine.paused(now - self.expected, now)
        self.expected = now
        return now

    def wait(self) -> None:
        """Wait until something is due, and hand it to the machines. A deadline counts if it
        passed before poll() returned: messages that came before it are read first."""
        before, now = self.expected, self.clock()
        deadlines = [adapter.machine.deadline() for adapter in self.adapters]
        due = min([*deadlines, *(link.retry_at for link in self.links)])
        if now > before + MIN_PAUSE or any(link.unread for link in self.links):
            due = now  # machines may react to the pause; or a link has more to read
        self.expected = min(max(due, now), now + MAX_POLL_TIME)
        ready = dict(self.poller.poll(math.ceil((self.expected - now) * 1000)))
        polled = self.clock()
        for link in self.links:  # connections first: a worker without one starts nothing
            link.read_events(ready, polled)
        for file in [file for file in self.callbacks if file in ready]:
            if file in self.callbacks:  # an earlier function may have removed it
                self.callbacks[file](self.clock())
        while self.posted:
            self.posted.popleft()(self.clock())
        for link in self.links:
            link.read_messages(ready)
            if link.retry_at <= polled:
                link.retry(self.clock())
        for adapter, deadline in zip(self.adapters, deadlines):
            if deadline <= polled:
                adapter.machine.tick(polled)

    def flush(self) -> None:
        """Send the machines' messages and carry out their effects, until there are no more."""
        busy = True
        while busy:
            busy = False
            self.clock()  # machines that learn of a pause may have other messages
            for adapter in self.adapters:
                messages, effects = adapter.machine.take()
                busy = busy or bool(messages or effects)
                for message in messages:
                    adapter.links[message.link].send(message)
                for effect in effects:
                    adapter.effects[type(effect)](effect)

    def close(self) -> None:
        for link in self.links:
            link.close(linger=1000)  # ms, for the last BYE
        if self.context is not None:
            self.context.term()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        os.close(self.wake_in)
        os.close(self.wake_out)


# === Links ============================================================================
#
# A link carries a machine's messages: through a ROUTER, a DEALER, a stream such as that of
# ssh, or calls to a machine in the same process. It calls the machine's receive(), and for its
# connections connected(), disconnected(), refused(), revoked() and identified(). Sending never
# blocks: a slow peer gets a bounded backlog; then a ROUTER closes its connection, a stream ends,
# and a DEALER drops the backlog.

NOBLOCK, SNDMORE_NOBLOCK = 1, 3  # of zmq.h; pyzmq's own are enums, which are slow to combine
MAX_READ_TIME: Seconds = 0.1  # for a socket's messages; then timers and other links have a turn
SEND_RETRY: Seconds = 0.02  # between attempts to send to a peer whose queue is full
REFUSED_RETRY: Seconds = 1.0  # between connections to a broker that refused our key
PROBE_TIMEOUT: Seconds = 1.0  # for a greeting: a broker sends it at once
SPARE_FILES = 8  # with fewer left, the broker says that no more peers can connect

# --- memory limits of slow and flooding peers
HWM = 50  # messages in libzmq, per peer and direction: most of a few KiB, none over MAX_FRAME
MAX_BACKLOG = 500  # messages for a slow peer, beyond those in libzmq
MAX_BACKLOG_BYTES = 34 * 1024 * 1024  # of those: more than CREDIT, which limits our own clients

# --- memory limits of unfinished messages
MEMORY_LIMIT = 128 * 1024 * 1024  # bytes of this process; below it endless messages are tolerated
MEMORY_PER_PEER = 64 * 1024  # more for each peer: with 2,000 idle ones a broker has 122 MB
MAX_HANDSHAKE = 64 * 1024  # bytes from a connection that has not sent a whole message yet
MAX_UNFINISHED = 16 * 1024 * 1024  # bytes of a message: ours are at most MAX_FRAME
MEMORY_INTERVAL: Seconds = 0.2  # between checks of our memory
TRIM_INTERVAL: Seconds = 5.0  # between malloc_trim() calls: each takes time
TCP_INFO_SIZE, BYTES_RECEIVED_AT = 136, 128  # in struct tcp_info, up to tcpi_bytes_received


def frames_of(outgoing: Outgoing) -> List[Any]:
    """Return the frames of a message, without routing id."""
    token, body, data = outgoing.token, outgoing.body, outgoing.data
    frames = [b"", token.encode(), body] if token else [body]
    return [*frames, data] if len(data) else frames


def parse_frames(frames: List[Any]) -> Optional[Tuple[Run, bytes, Any]]:
    """Return the token, body and data in these frames; None if there are too many. The data
    stays a frame object: a broker passes it on without a copy."""
    first, *rest = frames
    if len(first):
        return ("", first.bytes, rest[0] if rest else b"") if len(rest) < 2 else None
    if len(rest) < 2:
        return "", rest[0].bytes if rest else b"", b""
    if len(rest) > 3:
        return None
    return rest[0].bytes.decode("ascii", "replace"), rest[1].bytes, rest[2] if rest[2:] else b""


class Link:
    """A machine's way to its peers."""

    def send(self, outgoing: Outgoing) -> None:
        """Send a message, or keep it until the peer can take it. Must not block."""
        raise NotImplementedError

    def reconnect(self) -> None:
        """Open a new connection, if there can be one: the old one may be dead without a sign."""


class LocalLink(Link):
    """A link to another machine in this process: a call, which cannot break."""

    def __init__(self, other: Machine, other_link: str, peer: Peer) -> None:
        self.other = other
        self.other_link = other_link
        self.peer = peer  # our routing id there

    def send(self, outgoing: Outgoing) -> None:
        self.other.receive(self.other_link, self.peer, outgoing.token, outgoing.body,
                           outgoing.data, time.monotonic())


RECORD = struct.Struct("!BIII")  # before each record of a stream: kind, sizes of its three parts
MESSAGE, CONTROL = 0, 1  # kinds of records
OPENED, BROKEN = 2, 3  # what else a RecordReader finds
READ_SIZE = 1024 * 1024  # bytes read from a stream at once; other streams have a turn in between
MAX_MARK_LINE = 4096  # bytes
BEAT_INTERVAL: Seconds = 2.0  # between keepalives on a stream
MAX_SILENT_BEATS = 15  # then it has ended
MAX_SILENCE: Seconds = MAX_SILENT_BEATS * BEAT_INTERVAL  # as long as the lease of a client


class RecordReader:
    """Finds the records in the bytes of a stream.

    With a mark, it skips what login shells print before it. The rest of the mark's line is the
    reason why there are no records, or empty.
    """

    def __init__(self, mark: bytes = b"") -> None:
        self.mark = mark  # b"" once it was found
        self.buffer = bytearray()  # the beginning of a record; before the mark, noise

    def feed(self, data: bytes) -> Iterator[Tuple[int, List[Any]]]:
        """Yield the kind and the parts of each record that is whole now. The parts of a CONTROL are
        its words, that of OPENED is the reason, that of BROKEN is what is wrong."""
        self.buffer += data
        try:
            if self.mark:
                yield from self.find_mark()
            while not self.mark and self.has_record():
                yield self.take_record()
        except (ValueError, RecursionError) as error:
            yield BROKEN, [f"sent an invalid record: {error}"]

    def find_mark(self) -> Iterator[Tuple[int, List[Any]]]:
        before, found, rest = self.buffer.partition(self.mark)
        reason, ended, records = rest.partition(b"\n")
        if ended:
            self.buffer, self.mark = records, b""
            yield OPENED, [to_text(bytes(reason))]
        else:  # in a MiB of noise, too, each byte is searched about once
            self.buffer = self.buffer[-MAX_MARK_LINE:]

    def has_record(self) -> bool:
        """Return whether a whole record has come. Raises ValueError."""
        if len(self.buffer) < RECORD.size:
            return False
        kind, *sizes = RECORD.unpack_from(self.buffer)
        if kind > CONTROL or max(sizes) > MAX_FRAME:
            raise ValueError(f"kind {kind}, sizes {sizes}")
        total: int = RECORD.size + sum(sizes)
        return len(self.buffer) >= total

    def within_message(self) -> bool:
        """Return whether a part of a message has come."""
        return not self.mark and len(self.buffer) > RECORD.size and self.buffer[0] == MESSAGE

    def take_record(self) -> Tuple[int, List[Any]]:
        kind, *sizes = RECORD.unpack_from(self.buffer)
        ends = list(itertools.accumulate(sizes, initial=RECORD.size))
        with memoryview(self.buffer) as view:
            parts: List[Any] = [bytes(view[a:b]) for a, b in zip(ends, ends[1:])]
        del self.buffer[:ends[-1]]
        if kind == CONTROL:
            parts = json.loads(parts[1])
            if not isinstance(parts, list):
                raise ValueError("a control that is no list")
        return kind, parts


class StreamLink(Link):
    """A link on a stream, without the I/O. Both ends are of this class.

    A record is a message, with token, body and data as its parts; or a control, whose body is a
    list in JSON: a key of the other end's `controls`, and arguments. An empty one is a keepalive.
    Our end waits for `mark` first; a reason behind it is the end of the stream.
    """

    def __init__(self, machine: Machine, name: str, peer: Peer,
                 controls: Dict[str, Callable[..., object]],
                 ended: Callable[[str, Seconds], object], mark: bytes,
                 opened: Callable[[Seconds], object], clock: Callable[[], Seconds]) -> None:
        self.machine = machine
        self.name = name
        self.peer = peer
        self.controls = controls  # by name: functions, called with the arguments and the time
        self.ended = ended  # called once, with the reason
        self.opened = opened  # called when the mark was found
        self.clock = clock
        self.reader = RecordReader(mark)
        self.closed = False
        self.half_closed = False  # the other end reads no more; what it has sent may still come
        self.silent_beats = 0  # since something came; not a time: that passes while we are stopped

    def write(self, data: bytes) -> None:
        """Write these bytes, or keep them until the stream can take them."""
        raise NotImplementedError

    def close(self) -> None:
        """Close our end. The other end notices that."""
        self.closed = True

    def send(self, outgoing: Outgoing) -> None:
        self.write_record(MESSAGE, outgoing.token.encode(), outgoing.body, outgoing.data)

    def control(self, *words: Any) -> None:
        """Call one of the other end's controls."""
        self.write_record(CONTROL, b"", json.dumps(words).encode(), b"")

    def reconnect(self) -> None:
        self.control("reconnect")

    def write_record(self, kind: int, *parts: Any) -> None:
        self.write(b"".join((RECORD.pack(kind, *map(len, parts)), *parts)))

    def beat(self, now: Seconds) -> None:
        """Send a keepalive; end a stream that is silent. Call this every BEAT_INTERVAL."""
        self.silent_beats += 1
        if self.half_closed:
            self.end("", now)
        elif self.reader.mark:
            return
        elif self.silent_beats > MAX_SILENT_BEATS:
            self.end(f"silent for {MAX_SILENCE:g} seconds", now)
        else:
            self.control()

    def received(self, data: bytes) -> None:
        """Hand over each record that is whole now. No data is the end of the stream."""
        self.silent_beats = 0
        for kind, parts in self.reader.feed(data):
            if self.closed:
                return
            # each record has its own time: a pause may come in between
            self.hand_over(kind, parts, self.clock())
        if self.reader.within_message() and not self.closed:  # it may take long
            self.machine.now = self.clock()
            self.machine.heard(self.name, self.peer)
        if not data:
            self.end("", self.clock())

    def hand_over(self, kind: int, parts: List[Any], now: Seconds) -> None:
        """Give a message to the machine, or call a control."""
        if kind == MESSAGE:
            token, body, data = parts
            self.machine.receive(self.name, self.peer, token.decode("ascii", "replace"), body, data,
                                 now)
        elif kind == CONTROL:
            name, *arguments = parts or [""]
            control = self.controls.get(name) if isinstance(name, str) else None
            if control is not None:
                control(*arguments, now)
            elif parts:
                self.end(f"sent an unknown control: {printable(repr(name))}", now)
        elif kind == OPENED and not parts[0]:
            self.opened(now)
        else:
            self.end(parts[0], now)

    def end(self, why: str, now: Seconds) -> None:
        """Close our end, and tell why: "" if the other end has closed its."""
        if not self.closed:
            self.close()
            self.ended(why, now)


def readable(file: int) -> bool:
    """Return whether a read would not block. select() cannot take numbers above 1023."""
    poller = select.poll()
    poller.register(file, select.POLLIN)
    return bool(poller.poll(0))


class PipeLink(StreamLink):
    """A link on two descriptors, such as stdin and stdout of ssh."""

    def __init__(self, loop: EventLoop, machine: Machine, name: str, peer: Peer, incoming: int,
                 outgoing: int, controls: Dict[str, Callable[..., object]],
                 ended: Callable[[str, Seconds], object], mark: bytes = b"",
                 opened: Callable[[Seconds], object] = lambda now: None) -> None:
        super().__init__(machine, name, peer, controls, ended, mark, opened, loop.clock)
        self.loop = loop
        self.incoming = incoming  # -1 when it is closed
        self.outgoing = outgoing  # the same
        self.backlog: Deque[memoryview] = deque()  # records that the stream has not taken yet
        self.backlog_bytes = 0
        os.set_blocking(incoming, False)
        os.set_blocking(outgoing, False)
        loop.add_reader(incoming, self.read)

    def write(self, data: bytes) -> None:
        if self.closed or self.half_closed:
            return
        self.backlog.append(memoryview(data))
        self.backlog_bytes += len(data)
        if len(self.backlog) == 1:
            self.write_backlog()
        elif self.backlog_bytes > MAX_BACKLOG_BYTES or len(self.backlog) > 100 * MAX_BACKLOG:
            self.end("does not read what it is sent", time.monotonic())

    def write_backlog(self, _: Seconds = 0.0) -> None:
        try:
            while self.backlog:
                done = os.write(self.outgoing, self.backlog[0])
                self.backlog_bytes -= done
                self.backlog[0] = self.backlog[0][done:]
                if not self.backlog[0]:
                    self.backlog.popleft()
            self.loop.remove(self.outgoing)
        except BlockingIOError:
            if self.outgoing not in self.loop.callbacks:
                self.loop.add_writer(self.outgoing, self.write_backlog)
            if self.backlog_bytes > LARGE_PIPE // 4:
                enlarge_pipe(self.outgoing)
        except OSError:
            self.half_closed = True
            self.backlog.clear()
            self.loop.remove(self.outgoing)

    def read(self, now: Seconds) -> None:
        """Read what came, and hand it over."""
        try:
            data = os.read(self.incoming, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if len(data) == PIPE_SIZE:  # it was full
            enlarge_pipe(self.incoming)
        self.received(data)

    def stop_writing(self) -> None:
        """Close our half of the stream, and hand over no more. The other end will notice, and end.
        Call close() later."""
        self.closed = True
        self.backlog.clear()
        if self.outgoing >= 0:
            self.loop.remove(self.outgoing)
            os.close(self.outgoing)
            self.outgoing = -1

    def close(self) -> None:
        self.stop_writing()
        if self.incoming >= 0:
            self.loop.remove(self.incoming)
            os.close(self.incoming)
            self.incoming = -1


class PeerLinks(Link):
    """A broker's link to workers, each with a link of its own."""

    def __init__(self) -> None:
        self.links: Dict[Peer, StreamLink] = {}

    def send(self, outgoing: Outgoing) -> None:
        if outgoing.peer in self.links:  # else the peer is lost, as the broker will hear
            self.links[outgoing.peer].send(outgoing)


class SocketLink(Link):
    """Base of ROUTER and DEALER links: options, monitor, backlogs of slow peers."""

    up = True  # can messages be sent? A DEALER needs a connection
    retry_at: Seconds = math.inf  # when the loop must call retry()
    unread = False  # read_messages() left messages for the next round

    def __init__(self, loop: EventLoop, adapter: Adapter, name: str, address: str) -> None:
        self.loop = loop
        self.adapter = adapter
        self.name = name
        self.address = address
        self.ipv6 = "[" in resolve(address)  # once: a later look-up could fail, and take long
        self.backlogs: Dict[Peer, Deque[Outgoing]] = {}  # of peers whose queue in libzmq is full
        self.socket: Any = None
        self.send_frame: Any = None  # the socket's send()
        self.monitor: Any = None
        adapter.links[name] = self
        loop.links.append(self)

    def open(self, kind: int, events: int) -> None:
        """Make the socket, and its monitor for failures and these other events."""
        self.socket = sock = self.loop.context.socket(kind)
        # pyzmq's own send() only adds options that we do not use, and takes twice as long
        self.send_frame = super(zmq.Socket, sock).send  # type: ignore[misc]
        sock.linger = 0
        sock.sndhwm = sock.rcvhwm = HWM
        sock.maxmsgsize = MAX_FRAME
        sock.handshake_ivl = 5000  # ms; the default of 30 s would hide a hang
        sock.tcp_keepalive = 1  # finds connections whose other end is gone; in seconds:
        sock.tcp_keepalive_idle, sock.tcp_keepalive_intvl, sock.tcp_keepalive_cnt = 30, 10, 3
        sock.ipv6 = self.ipv6
        self.monitor = sock.get_monitor_socket(
            events | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        self.loop.poller.register(sock, zmq.POLLIN)
        self.loop.poller.register(self.monitor, zmq.POLLIN)

    def close(self, linger: int) -> None:
        """Close the socket. libzmq has `linger` ms more to send its messages."""
        if self.socket is not None:
            self.loop.poller.unregister(self.socket)
            self.loop.poller.unregister(self.monitor)
            self.socket.disable_monitor()
            self.monitor.close(0)
            self.socket.close(linger)
            self.socket = self.monitor = None
            self.unread, self.retry_at = False, math.inf
            self.backlogs.clear()

    def read_events(self, ready: Dict[Any, int], now: Seconds) -> None:
        """Read the monitor's events. `ready` has the sockets that poll() found readable."""
        while self.monitor in ready:
            try:
                parts = self.monitor.recv_multipart(NOBLOCK)
            except zmq.Again:
                return
            event, value = struct.unpack("=hi", parts[0])
            self.on_event(event, value, now)

    def on_event(self, event: int, value: int, now: Seconds) -> None:
        """Handle an event of the monitor. Its value is mostly a descriptor."""
        raise NotImplementedError

    def send(self, outgoing: Outgoing) -> None:
        backlog = self.backlogs.get(outgoing.peer)
        if self.socket is None:  # a worker may have ended before its last messages were sent
            return
        if backlog is not None:
            backlog.append(outgoing)
            size = sum(len(one.body) + len(one.data) for one in backlog)
            if len(backlog) > MAX_BACKLOG or size > MAX_BACKLOG_BYTES:
                logging.info("a peer on %s does not read: connection closed", self.name)
                self.disconnect(outgoing.peer)
                self.forget(outgoing.peer, time.monotonic())
        elif not self.send_now(outgoing):
            self.backlogs[outgoing.peer] = deque([outgoing])
            self.retry_at = time.monotonic() + SEND_RETRY

    def send_now(self, outgoing: Outgoing) -> bool:
        """Send, or drop if the peer is lost. Return False if its queue in libzmq is full."""
        try:
            if outgoing.peer:  # at a ROUTER
                self.send_frame(outgoing.peer, SNDMORE_NOBLOCK)
            *first, last = frames_of(outgoing)
            for frame in first:
                self.send_frame(frame, SNDMORE_NOBLOCK)
            self.send_frame(last, NOBLOCK)
        except zmq.Again:
            return not self.up  # without a connection: drop it, as the machine will join again
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.forget(outgoing.peer, time.monotonic())
        return True

    def retry(self, now: Seconds) -> None:
        """Try again to send the backlogs."""
        for peer, backlog in list(self.backlogs.items()):
            while backlog and self.send_now(backlog[0]):
                backlog.popleft()
            if not backlog:
                self.backlogs.pop(peer, None)
        self.retry_at = now + SEND_RETRY if self.backlogs else math.inf

    def disconnect(self, peer: Peer) -> None:
        """Close a peer's connection."""

    def forget(self, peer: Peer, now: Seconds) -> None:
        """Forget a lost peer and its backlog: on a new connection it must join first."""
        self.backlogs.pop(peer, None)
        self.adapter.machine.disconnected(self.name, peer, now)

    def read_messages(self, ready: Dict[Any, int]) -> None:
        """Read for MAX_READ_TIME. Each message has its own time: a pause may come in between."""
        until = self.loop.clock() + MAX_READ_TIME
        going_on = self.unread or self.socket in ready or self.monitor in ready
        while going_on:
            now = self.loop.clock()
            self.unread = self.read_message(now)
            going_on = self.unread and now <= until

    def read_message(self, now: Seconds) -> bool:
        """Return False if no message waits. Otherwise read one, and hand it over."""
        raise NotImplementedError

    def hand_over(self, peer: Peer, frames: List[Any], now: Seconds) -> None:
        parsed = parse_frames(frames)
        if parsed is None:
            self.adapter.machine.complain(self.name, peer, "", b"", "too many frames")
        else:
            self.adapter.machine.receive(self.name, peer, *parsed, now)

    def rest_of_message(self, frame: Any) -> List[Any]:
        """Return a message's frames from this one on. Those beyond MAX_FRAMES are dropped."""
        frames = [frame]
        while frame.more:  # faster than to ask the socket for RCVMORE
            frame = self.socket.recv(0, copy=False)
            if len(frames) < MAX_FRAMES:
                frames.append(frame)
        return frames


class RouterLink(SocketLink):
    """A broker's link to its clients, or to its workers.

    A lost peer is detected in two ways: sending to it fails, or the monitor reports that its
    descriptor was closed. A connection's opening is reported before its first message, its
    closing mostly after its last. So events are read before messages, and handled after.

    A plain peer may choose its routing id, and use it again before we know that its last
    connection is gone. The new connection takes over.
    """

    def __init__(self, loop: EventLoop, adapter: Adapter, name: str, address: str,
                 authenticator: Optional[Authenticator] = None) -> None:
        super().__init__(loop, adapter, name, address)
        self.authenticator = authenticator
        self.keyed = authenticator is not None and authenticator.keys is not None
        self.count_anew: Callable[[int], object] = lambda descriptor: None  # the MemoryGuard's
        self.key_of: Dict[Peer, str] = {}  # public keys; "" if not self.keyed
        self.descriptor_of: Dict[Peer, int] = {}
        self.peer_at: Dict[int, Peer] = {}  # by descriptor
        self.pending: Dict[int, str] = {}  # connections without a message yet: descriptor, address
        self.monitored: List[Tuple[int, int]] = []  # events that are read but not handled
        self.failure = (0, 0)  # (event, detail) of a failed handshake; its closing comes next
        self.file_limit = raise_file_limit()  # each peer needs an open file
        self.socket_file = ""  # of an ipc:// address
        self.open(zmq.ROUTER, zmq.EVENT_ACCEPTED)
        self.socket.router_mandatory = 1  # or messages to a lost peer vanish without an error
        if not self.keyed:  # with keys no peer may take over the id of another
            self.socket.router_handover = 1  # or the second peer with an id gets no answer
        self.socket.backlog = 4096
        if authenticator is not None:
            authenticator.protect(self)
        self.bind()

    def bind(self) -> None:
        """Listen. Raises SetupError."""
        endpoint = resolve(self.address)
        path = endpoint[len("ipc://"):] if endpoint.startswith("ipc://") else ""
        # libzmq would remove any file with this path
        if os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            raise SetupError(f"cannot listen on {endpoint}: this file is no socket; name another")
        try:
            if path and security_mechanism(endpoint) is not None:
                raise zmq.ZMQError(errno.EADDRINUSE)
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise SetupError(f"Address already in use: is another broker running on "
                                 f"{self.address}?") from None
            what = "a directory that exists" if path else "an address of this machine"
            raise SetupError(f"cannot listen on {self.address} ({os.strerror(error.errno or 0)}): "
                             f"is that {what}, and may you use it?") from None
        self.address = self.socket.last_endpoint.rstrip(b"\0").decode()
        self.socket_file = self.address[len("ipc://"):] if path else ""

    def close(self, linger: int) -> None:
        super().close(linger)
        with contextlib.suppress(OSError):  # libzmq does not remove it
            os.unlink(self.socket_file)

    def on_event(self, event: int, value: int, now: Seconds) -> None:
        self.monitored.append((event, value))
        if event == zmq.EVENT_ACCEPTED and value >= self.file_limit - SPARE_FILES:
            limit, self.file_limit = self.file_limit, sys.maxsize  # warn once
            print_notice(f"no more peers can connect: this process may have only {limit} open "
                         f"files; start the broker with a higher limit (ulimit -n, or LimitNOFILE= "
                         f"of systemd)")

    def read_message(self, now: Seconds) -> bool:
        try:
            peer = self.socket.recv(NOBLOCK)
        except zmq.Again:
            self.handle_events(now)
            return False
        frame = self.socket.recv(0, copy=False)
        key = frame.get("User-Id") if self.keyed else ""
        # ids from libzmq are unique, but an id that the peer chose may have a new connection
        if peer not in self.descriptor_of or peer[:1] != b"\0" or self.key_of[peer] != key:
            self.register(peer, key, frame, now)
        self.count_anew(self.descriptor_of.get(peer, -1))
        frames = self.rest_of_message(frame)
        if not self.keyed or self.check_key(peer):
            self.hand_over(peer, frames, now)
        return True

    def register(self, peer: Peer, key: str, frame: Any, now: Seconds) -> None:
        """Record the descriptor and key of a peer's connection, if it is new."""
        try:
            descriptor = frame.get(zmq.SRCFD)
        except zmq.ZMQError:
            return
        if self.descriptor_of.get(peer) == descriptor and self.key_of[peer] == key:
            return
        # this peer's last connection is gone, and the last one with this descriptor
        for old in (peer, self.peer_at.get(descriptor, peer)):
            if old in self.descriptor_of:
                self.forget(old, now)
        self.read_events({self.monitor: zmq.POLLIN}, now)
        # events up to its opening are about earlier connections
        opened = max((at for at, row in enumerate(self.monitored)
                      if row == (zmq.EVENT_ACCEPTED, descriptor)), default=-1)
        self.monitored = [row for at, row in enumerate(self.monitored)
                          if row[1] != descriptor or at > opened]
        self.pending.pop(descriptor, None)
        self.peer_at[descriptor] = peer
        self.descriptor_of[peer] = descriptor
        self.key_of[peer] = key
        if self.keyed:
            assert self.authenticator is not None
            self.adapter.machine.identified(self.name, peer, key, self.authenticator.owns(key))

    def forget(self, peer: Peer, now: Seconds) -> None:
        descriptor = self.descriptor_of.pop(peer, -1)
        self.peer_at.pop(descriptor, None)
        self.key_of.pop(peer, None)
        super().forget(peer, now)

    def handle_events(self, now: Seconds) -> None:
        """Handle the monitor's events, after all messages."""
        events, self.monitored = self.monitored, []
        for event, value in events:
            if event == zmq.EVENT_ACCEPTED:
                self.pending[value] = peer_address(value)
                self.count_anew(value)
            elif event != zmq.EVENT_DISCONNECTED:
                self.failure = event, value
            elif value in self.peer_at:
                self.forget(self.peer_at[value], now)
            elif value in self.pending:
                self.loop.refusals.closed(self, self.pending.pop(value), *self.failure, now)
                self.failure = (0, 0)

    def check_key(self, peer: Peer) -> bool:
        """Return whether a peer's key is (still) accepted. If not, disconnect the peer. Its
        routing id must be libzmq's (5 bytes, first 0): another may be that of a lost peer."""
        assert self.authenticator is not None
        if len(peer) == 5 and peer[:1] == b"\0" \
                and self.authenticator.allows(ROLE_OF[self.name], self.key_of.get(peer, "")):
            return True
        self.disconnect(peer)
        return False

    def disconnect_revoked(self, now: Seconds) -> None:
        """Disconnect the peers whose keys are not accepted any more, and tell the machine."""
        for peer in list(self.key_of):
            if not self.check_key(peer):
                self.adapter.machine.revoked(self.name, peer, now)

    def disconnect(self, peer: Peer) -> None:
        """Close a peer's connection. libzmq cannot, but it notices the shutdown of its socket."""
        with contextlib.suppress(OSError, KeyError), \
                borrowed_socket(self.descriptor_of[peer]) as connection:
            connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def borrowed_socket(descriptor: int) -> Iterator[socket.socket]:
    """Yield a socket object for libzmq's descriptor. It raises OSError if that is closed."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def peer_address(descriptor: int) -> str:
    """Return the host at the other end of a connection, to show; "" if it is closed."""
    with contextlib.suppress(OSError), borrowed_socket(descriptor) as connection:
        address = connection.getpeername()
        return printable(str(address[0])) if address else "this machine"
    return ""


class MemoryGuard:
    """Closes connections with an endless message, while memory is short.

    libzmq keeps all frames of a message until the last one. Only Linux tells how many bytes
    came on a connection.
    """

    def __init__(self, loop: EventLoop, links: List[RouterLink]) -> None:
        self.refusals = loop.refusals
        self.links = links
        self.short = False  # memory is short
        self.received: Dict[int, int] = {}  # by descriptor: bytes at the last message, or later
        for link in links:
            link.count_anew = lambda descriptor: self.received.pop(descriptor, 0)
        loop.every(MEMORY_INTERVAL, self.check_memory)
        loop.every(TRIM_INTERVAL, self.trim)

    def check_memory(self, now: Seconds) -> None:
        """Close endless connections if this process uses too much memory."""
        pages = read_text("/proc/self/statm").split()
        used = int(pages[1]) * resource.getpagesize() if pages else 0
        peers = sum(len(link.peer_at) for link in self.links)
        self.short = used >= MEMORY_LIMIT + MEMORY_PER_PEER * peers
        if not self.short:
            self.received.clear()
            return
        for link in self.links:
            for descriptor in (*link.pending, *link.peer_at):
                self.check_connection(descriptor, descriptor in link.pending, now)

    def check_connection(self, descriptor: int, pending: bool, now: Seconds) -> None:
        """Close a connection on which too much came since its last message."""
        seen = descriptor in self.received  # it was there in the last check, too
        with contextlib.suppress(OSError), borrowed_socket(descriptor) as connection:
            size = bytes_received(connection)
            before = self.received.setdefault(descriptor, 0 if pending else size)
            if size - before > (MAX_HANDSHAKE if pending and seen else MAX_UNFINISHED):
                host = printable(connection.getpeername()[0])
                self.refusals.add(now, f"closed {host}: its message does not end")
                connection.shutdown(socket.SHUT_RDWR)

    def trim(self, now: Seconds) -> None:
        """Give free memory back to the system: glibc keeps the memory of freed messages."""
        if self.short:
            call_libc("malloc_trim", 0)


def bytes_received(connection: socket.socket) -> int:
    """Return the bytes received on a connection (see linux/tcp.h), 0 on old systems. Raises
    OSError if the connection is closed, or is not TCP."""
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    new = len(info) == TCP_INFO_SIZE
    return int(struct.unpack_from("=Q", info, BYTES_RECEIVED_AT)[0]) if new else 0


class DealerLink(SocketLink):
    """The link of a client, a worker or a chained broker to its broker."""

    up = False

    def __init__(self, loop: EventLoop, adapter: Adapter, name: str, address: str, role: str = "",
                 keys: Optional[Keys] = None, hint: str = "",
                 renew: Callable[[], Optional[Keys]] = lambda: None) -> None:
        super().__init__(loop, adapter, name, address)
        self.listener_seen = False  # our last connection was accepted
        self.refused = False  # libzmq may not connect again: we do, at retry_at
        self.probing = False  # a thread is in probe()
        self.role = role
        self.keys = keys
        self.hint = hint  # how to get a key
        self.renew = renew  # returns the keys to use from now on, or None
        self.connect()

    def connect(self) -> None:
        self.open(zmq.DEALER, zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_RETRIED
                  | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self.socket.immediate = 1  # queue nothing for a broker that is not there
        self.socket.reconnect_ivl, self.socket.reconnect_ivl_max = RECONNECT
        if self.keys is not None:
            self.socket.curve_serverkey = self.keys.broker.encode()
            self.socket.curve_publickey, self.socket.curve_secretkey = (
                key.encode() for key in self.keys.pairs[self.role])
        try:
            self.socket.connect(self.address)
        except zmq.ZMQError as error:
            raise SetupError(f"cannot connect to {self.address} ({os.strerror(error.errno or 0)}): "
                             f"is that the address of a broker?") from None

    def reconnect(self) -> None:
        self.close(0)
        self.up = self.refused = False
        self.connect()

    def retry(self, now: Seconds) -> None:
        if not self.refused:
            super().retry(now)
            return
        keys = self.renew()
        if keys is not None and keys != self.keys:
            self.keys = keys
            self.adapter.machine.key_changed(fingerprint(keys.pairs[self.role].public))
        self.reconnect()

    def read_message(self, now: Seconds) -> bool:
        try:
            frame = self.socket.recv(NOBLOCK, copy=False)
        except zmq.Again:
            return False
        self.hand_over(b"", self.rest_of_message(frame), now)
        return True

    def on_event(self, event: int, value: int, now: Seconds) -> None:
        if event == zmq.EVENT_CONNECTED:  # something listens: a broker, or something else
            self.listener_seen = True
            if not self.refused:
                self.tell_refusal("", now)
        elif event == zmq.EVENT_CONNECT_RETRIED:  # nothing listens; or a connection has ended
            if not self.listener_seen:
                self.tell_refusal(None, now)
            self.listener_seen = False
        else:
            self.up = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            if self.up:
                self.adapter.machine.connected(self.name, now)
            elif event == zmq.EVENT_DISCONNECTED:
                self.forget(b"", now)
            else:
                self.handshake_failed(event, value, now)

    def handshake_failed(self, event: int, detail: int, now: Seconds) -> None:
        """Find the reason, and connect again later. The event tells only of a refused key: for
        other failures a thread probes what listens there."""
        if not self.refused:
            self.refused, self.retry_at = True, now + REFUSED_RETRY
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.tell_refusal(str(detail), now)
        elif not self.probing:
            self.probing = True
            threading.Thread(target=self.probe, daemon=True, name="probe").start()

    def probe(self) -> None:
        found = security_mechanism(self.address)
        self.probing = False
        self.loop.post(lambda now: self.tell_refusal(found, now))

    def tell_refusal(self, found: Optional[str], now: Seconds) -> None:
        """Tell the machine why it has no connection. `found` is the ZAP status for our key, or
        the answer of security_mechanism()."""
        reasons = {
            ZAP_UNKNOWN_KEY: "does not accept our key: it has been revoked, or was not made with "
                             "the broker's own file (a new one: testcloud.py keygen --role ...)",
            ZAP_OTHER_ROLE: f"does not accept our key: that is not the port for {self.role}s",
            "CURVE": f"{'has another key than ours' if self.keys else 'wants a key'}: {self.hint}",
            "NULL": "has no key, but we have one: start it again, now that there is a key (or "
                    "use --insecure here as well)" if self.keys else ""}
        reason = reasons.get(found or "")
        why = f"the broker at {self.address} {reason}" if reason else (
            f"something listens at {self.address} that does not answer as a broker: are host and "
            f"port right?")
        if not self.up:
            self.adapter.machine.refused(self.name, "" if found is None else why, now)


def security_mechanism(address: str) -> Optional[str]:
    """Return NULL or CURVE, from the greeting of a ZeroMQ socket (rfc.zeromq.org/spec/37); "" if
    something else listens there, or says nothing; None if nothing listens."""
    try:
        if address.startswith("ipc://"):
            probe = socket.socket(socket.AF_UNIX)
            probe.connect(address[len("ipc://"):])
        else:
            probe = socket.create_connection(split_tcp(resolve(address)), PROBE_TIMEOUT)
    except (OSError, SetupError):
        return None
    greeting = b""
    with probe, contextlib.suppress(OSError):
        probe.settimeout(PROBE_TIMEOUT)
        probe.sendall(b"\xff" + bytes(8) + b"\x7f\3")  # enough for its whole greeting
        while len(greeting) < 32:
            part = probe.recv(64)
            greeting += part or bytes(32)
    mechanism = greeting[12:32] if greeting[:1] == b"\xff" else b""
    return mechanism.rstrip(b"\0").decode("ascii", "replace")


# === Key files ========================================================================
#
# CURVE (libzmq's, rfc.zeromq.org/spec/26) encrypts connections and proves the identity of both
# ends. A cloud's own key file has the key pair of its broker, a pair for each other role, and
# the public keys of its holders. A holder has a file with a pair for one role. Keys are text:
# 40 characters of Z85.

MANUAL["keys"] = """\
    $ testcloud.py keygen
    $ testcloud.py keygen --role worker --name lab
    $ testcloud.py keygen --role client --name ann
    $ testcloud.py keygen --revoke ann

The first command makes the key of a new cloud: testcloud.key beside the script. The next
two make a key for one role in it: testcloud-lab.key and testcloud-ann.key in the current
directory. Copy each to its machine, as testcloud.key beside the script there. From the
last command on, the broker refuses the key of ann.

Run these on the broker's machine: the broker reads the file that they change.

@options keygen FILE --role --name --revoke --key

Without a key

A broker runs whatever it is sent. So without a key only its own machine, with all of its
users, can reach it: it listens on loopback. Another address needs --insecure, and you
must name it, as in `--insecure --clients '*' --workers '*'`. Workers and clients without
a key trust no broker on another machine.

With a key

The broker listens on all interfaces. Each connection is encrypted with CURVE, of ZeroMQ.
Nobody connects without a key.

A machine with the cloud's own file can be broker, worker or client. Give machines that
you trust less a key for one role:

    holding                    at the clients' port             at the workers' port
    the cloud's own file       as a client, but `cancel`        as a worker
                               stops any run
    a client's file            submits; cancels and fetches     refused: it cannot take
                               its own commands only            commands
    a worker's file            refused: it cannot submit,       takes commands, and answers
                               cancel or fetch                  for those that it was given
    a revoked file             refused, and an open connection is closed
    no key, or one of another  refused                          refused
    cloud

A worker gets the tree of a run only while it has a command of that run. A broker below
another one has a worker's file: it asks for locks, and may keep them. A client sees how
many commands others have (status), and nothing else of them.

The broker cannot tell apart those that share a file. Give each person a file of their own
to keep their runs apart.

Workers and clients check the broker, too: only the cloud's own file has its secret.
Others can neither read the messages nor send them again.

Which key is taken

@options broker,worker,client,status,cancel --key --insecure

The key file is that of --key, else of $TESTCLOUD_KEY_FILE, else testcloud.key beside the
script. The last place is ~/.config/testcloud/testcloud.key ($XDG_CONFIG_HOME). --insecure
takes none, even if there is one. `client --local` and `client -S` need none. A file is
refused if other users can read it, or if it belongs to another user.

--sync takes a key file along that is in your tree: let git ignore it, or --exclude it.

New and revoked keys

The broker looks at its file every second. It accepts a new key at the next connection of
its holder. It closes the connection of a revoked key, and stops a revoked client's
commands.

If the cloud's own file has leaked, remove it, make another, copy that everywhere, and
start everything again.

What a key does not do

A key does not protect a worker from its commands. It does not protect the commands'
results and trees from their worker. Commands run as the user that started the worker.
They can read its key, and the workspaces of others there. So start the worker as a user
of its own:

    $ sudo useradd --system --create-home testcloud
    $ sudo install -D -m 644 testcloud.py /opt/testcloud/testcloud.py
    $ sudo install -o testcloud -m 600 testcloud-lab.key /opt/testcloud/testcloud.key
    $ sudo -u testcloud python3 /opt/testcloud/testcloud.py worker --connect hub

Or start it in a container that is given nothing else:

    $ docker run --rm --init --user "$(id -u)" --cap-drop ALL \\
          --security-opt no-new-privileges -v "$PWD":/work -w /work python:3 \\
          sh -c 'pip install -qt /tmp/p pyzmq &&
                 PYTHONPATH=/tmp/p python testcloud.py worker --connect hub'

Or start it under systemd. The broker likewise, with `broker` instead of `worker --connect
hub`:

    [Unit]
    Description=testcloud worker
    Wants=network-online.target
    After=network-online.target
    StartLimitIntervalSec=0

    [Service]
    User=testcloud
    ExecStart=/usr/bin/python3 /opt/testcloud/testcloud.py worker --connect hub
    Restart=always
    RestartSec=5
    KillMode=mixed
    ReadWritePaths=-/srv/work
    NoNewPrivileges=yes
    CapabilityBoundingSet=
    ProtectSystem=strict
    ProtectHome=yes
    ProtectKernelTunables=yes
    ProtectKernelModules=yes
    ProtectControlGroups=yes
    PrivateTmp=yes
    PrivateDevices=yes
    CacheDirectory=testcloud
    Environment=XDG_CACHE_HOME=%C/testcloud
    RestrictNamespaces=yes
    RestrictSUIDSGID=yes
    LockPersonality=yes
    MemoryMax=80%

    [Install]
    WantedBy=multi-user.target

Attacks on a broker

Connections that are not authenticated are cheap. The broker closes those that do not
finish the handshake in 5 s. On Linux, when memory is short, it also closes those that
send a message without end. Its log says which connections it refused, and why.

The holder of a valid key can do more. It can give the broker so much to do that others
wait, or stop it through a bug of libzmq. So let systemd start the broker again
(Restart=always): it loses nothing.
"""

KEY_FILE = "testcloud.key"
Z85_KEY = re.compile(r"[0-9a-zA-Z.:+=^!/*?&<>()[\]{}@%$#-]{40}")
MAX_KEY_FILE = 1024 * 1024  # bytes: thousands of holders


class KeyPair(NamedTuple):
    """A public key and its secret key."""

    public: str
    secret: str


class KeyHolder(NamedTuple):
    """A person or machine that has a key file for one role."""

    name: str
    role: str
    public: str


class Keys(NamedTuple):
    """The content of a key file."""

    broker: str  # the public key of the broker
    secret: str = ""  # its secret key: only in the cloud's own file
    pairs: Dict[str, KeyPair] = {}  # by role: the pair to connect with
    holders: Tuple[KeyHolder, ...] = ()  # who else may connect: only in the cloud's own file

    def suffice_for(self, role: str) -> bool:
        """Return whether a broker, worker or client can start with these keys."""
        return bool(self.secret) if role == BROKER_ROLE else role in self.pairs

    def to_json(self) -> str:
        fields: Fields = {"broker": {"public": self.broker}}
        if self.secret:
            fields["broker"]["secret"] = self.secret
        fields.update((role, pair._asdict()) for role, pair in self.pairs.items())
        if self.holders:
            fields["holders"] = [holder._asdict() for holder in self.holders]
        return json.dumps(fields, indent=1) + "\n"


def keys_from_json(text: str) -> Keys:
    """Return the keys in a file's text. Raises ValueError, whose text shows nothing secret."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        fields = json.loads(text)
        broker = fields["broker"]
        found = Keys(
            broker["public"], broker.get("secret", ""),
            {role: KeyPair(**fields[role]) for role in ROLE_OF.values() if role in fields},
            tuple(KeyHolder(**row) for row in fields.get("holders", ())))
        keys = [found.broker, *filter(None, [found.secret]),
                *(holder.public for holder in found.holders),
                *itertools.chain(*found.pairs.values())]
        complete = len(found.pairs) >= (len(ROLE_OF) if found.secret else 1)
        if complete and all(map(Z85_KEY.fullmatch, keys)):
            return found
    raise ValueError("it is no key file, or damaged: copy it again (a new cloud's: testcloud.py "
                     "keygen)")


def new_pair() -> KeyPair:
    """Return a new key pair. Raises SetupError."""
    require_zmq()
    if not zmq.has("curve"):
        raise SetupError("this pyzmq has no encryption (CURVE): install its wheel from PyPI, or "
                         "Debian's python3-zmq")
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def find_key_file(given: Optional[str]) -> str:
    """Return the path of the key file: the given one, $TESTCLOUD_KEY_FILE's, the one beside the
    script, or the one in the user's configuration; "" if there is none."""
    named = given or os.environ.get("TESTCLOUD_KEY_FILE", "")
    if named:
        return named
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    places = [beside_script(KEY_FILE), beside_script(KEY_FILE, True),
              os.path.join(config, "testcloud", KEY_FILE)]
    return next(filter(os.path.lexists, places), "")


def beside_script(name: str, real: bool = False) -> str:
    """Return a path beside the script; if `real`, beside the target of its symbolic link."""
    script = os.path.realpath(__file__) if real else os.path.abspath(__file__)
    return os.path.join(os.path.dirname(script), name)


def read_keys(path: str) -> Keys:
    """Return the keys in a file that only this user can read. Raises SetupError."""
    shown = printable(path, 1000)
    try:
        with open(path, "rb", opener=lambda at, flags: os.open(at, flags | os.O_NONBLOCK)) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise SetupError(f"cannot use the key {shown}: it is no file")
            if facts.st_uid != os.geteuid():
                raise SetupError(f"refusing the key {shown}: it belongs to another user, who can "
                                 f"read and change it; copy it, and use the copy")
            if facts.st_mode & 0o077:
                raise SetupError(f"refusing the key {shown}: other users may read or write it; if "
                                 f"none has, protect it with: chmod 600 {shlex.quote(shown)}")
            return keys_from_json(to_text(file.read(MAX_KEY_FILE)))
    except OSError as error:
        raise SetupError(f"cannot read the key {shown}: {error.strerror}; see --key, and "
                         f"testcloud.py keygen") from None
    except ValueError as error:
        raise SetupError(f"cannot use the key {shown}: {error}") from None


def write_keys(path: str, keys: Keys) -> None:
    """Write a new file that only this user can read. Raises SetupError."""
    try:
        private = functools.partial(os.open, mode=0o600)
        with open(path, "x", encoding="ascii", opener=private) as file:
            file.write(keys.to_json())
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise SetupError(f"{printable(path)} is there already, and is not overwritten: name "
                         f"another file, or remove it") from None
    except OSError as error:
        raise SetupError(f"cannot write {printable(path)}: {error.strerror}; name another file"
                         ) from None


@contextlib.contextmanager
def locked_key_file(path: str) -> Iterator[Callable[[Keys], None]]:
    """Yield a function that replaces a cloud's key file, and keep the file locked. Read it while
    it is locked: otherwise one of two changes at once may be lost. Raises SetupError."""
    path = os.path.realpath(path)

    def replace(keys: Keys) -> None:
        new = f"{path}.{os.urandom(4).hex()}"
        try:
            write_keys(new, keys)
            with file_errors("write", path):
                os.replace(new, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(new)
    with file_errors("change", path):
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield replace
    finally:
        os.close(folder)


# === Authentication and revoked keys ==================================================
#
# A broker with a key accepts only known keys, each on the port of its role. A revoked key
# (keygen --revoke) takes these steps:
#
#   1. Authenticator.reload_keys() reads the changed file, within KEY_FILE_INTERVAL.
#   2. RouterLink.disconnect_revoked() closes the connections with that key.
#   3. Membership.revoked() cancels the commands of that client; the commands of that worker
#      are lost and start again elsewhere.
#   4. Authenticator.answer() refuses new connections with that key; RefusalLog logs them.
#   5. DealerLink.tell_refusal(), at the other end, gives the reason to client or worker.
#      DealerLink.retry() connects again, also with a new key.
#
# RefusalLog keeps refused connections from filling the log.

KEY_FILE_INTERVAL: Seconds = 1.0  # between checks of the key file
ZAP_OK, ZAP_UNKNOWN_KEY, ZAP_OTHER_ROLE = "200", "400", "500"  # our answers to libzmq
MAX_REFUSALS = 10  # lines in the log per REFUSAL_INTERVAL
REFUSAL_INTERVAL: Seconds = 10.0  # a reason that did not occur for so long is logged again
REFUSAL_DELAY: Seconds = 1.2  # a vague reason waits for a better one: longer than REFUSED_RETRY


class Authenticator:
    """Tells libzmq which connections to accept (ZAP, rfc.zeromq.org/spec/27).

    Without keys it accepts all. It is needed then, too: without ZAP libzmq accepts a browser's
    bytes as messages.
    """

    def __init__(self, loop: EventLoop, path: str) -> None:
        """Use the keys in this file, "" for none. Raises SetupError."""
        self.loop = loop
        self.path = path
        self.links: List[RouterLink] = []
        self.version = self.file_version()  # taken before reading: a later change is seen
        self.keys: Optional[Keys] = None
        self.allowed: Set[Tuple[str, str]] = set()  # (role, public key)
        if path:
            self.use(load_keys(path, BROKER_ROLE))
        self.socket = loop.context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")
        loop.add_reader(self.socket, self.answer)
        loop.every(KEY_FILE_INTERVAL, self.reload_keys)

    def close(self) -> None:
        self.loop.poller.unregister(self.socket)
        self.socket.close()

    def use(self, keys: Keys) -> None:
        """Replace the accepted keys."""
        self.keys = keys
        self.allowed = {(role, pair.public) for role, pair in keys.pairs.items()}
        self.allowed.update((holder.role, holder.public) for holder in keys.holders)

    def protect(self, link: RouterLink) -> None:
        """Let libzmq ask us about the connections of a link."""
        self.links.append(link)
        link.socket.zap_domain = ROLE_OF[link.name].encode()
        link.socket.zap_enforce_domain = 1  # no answer means: refuse
        if self.keys is not None:
            link.socket.curve_server = 1
            link.socket.curve_secretkey = self.keys.secret.encode()

    def allows(self, role: str, key: str) -> bool:
        """Return whether a public key is accepted for this role."""
        return self.keys is None or (role, key) in self.allowed

    def owns(self, key: str) -> bool:
        """Return whether a public key is the cloud's own, and no holder's."""
        pairs = self.keys.pairs if self.keys else {}
        return key in {pair.public for pair in pairs.values()}

    def answer(self, now: Seconds) -> None:
        """Answer the ZAP requests that wait, one per handshake."""
        from zmq.utils import z85
        while True:
            try:
                request = self.socket.recv_multipart(NOBLOCK)
            except zmq.Again:
                return
            _, request_id, domain, address, _, mechanism, *credentials = request
            role = domain.decode()
            key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
            status = ZAP_OK
            if not self.allows(role, key):
                status, why = ZAP_UNKNOWN_KEY, "revoked, or unknown"
                if any(self.allows(other, key) for other in ROLE_OF.values()):
                    status, why = ZAP_OTHER_ROLE, "for another role"
                self.loop.refusals.add(
                    now, f"refused a {role} at {printable(address)}: its key is {why}")
            self.socket.send_multipart(
                [b"1.0", request_id, status.encode(), b"", key.encode(), b""])

    def file_version(self) -> Tuple[int, ...]:
        """Return what identifies a version of the key file; () if there is no file."""
        with contextlib.suppress(OSError):
            facts = os.stat(self.path)
            return facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size
        return ()

    def reload_keys(self, now: Seconds) -> None:
        """Read a changed key file again, and disconnect the peers whose keys were revoked."""
        version = self.file_version()
        if self.keys is None or version in (self.version, ()):
            return
        self.version = version
        try:
            keys = read_keys(self.path)
        except SetupError as error:
            logging.warning("%s; the broker keeps the old keys. Repair the file.", error)
            return
        if keys.secret != self.keys.secret:
            logging.warning("%s holds the key of another cloud. The old key stays; restart the "
                            "broker to use the new one.", self.path)
            return
        self.use(keys)
        logging.info("read the keys again: of %d holders", len(keys.holders))
        for link in self.links:
            link.disconnect_revoked(now)


class RefusalLog:
    """Logs refused connections: each reason once, and MAX_REFUSALS per interval."""

    def __init__(self) -> None:
        self.seen: Dict[str, Seconds] = {}  # by reason: when it last occurred
        self.delayed: Dict[str, Tuple[Seconds, str]] = {}  # by reason: (time to log, `unless`)
        self.logged: Deque[Seconds] = deque([-math.inf] * MAX_REFUSALS, MAX_REFUSALS)

    def add(self, now: Seconds, reason: str, unless: str = "") -> None:
        """Log a reason; with `unless` after REFUSAL_DELAY, if no reason with that text came."""
        self.seen = {old: when for old, when in self.seen.items() if when + REFUSAL_INTERVAL > now}
        if reason not in self.seen:
            if unless:
                self.delayed.setdefault(reason, (now + REFUSAL_DELAY, unless))
                return
            if self.logged[0] + REFUSAL_INTERVAL > now:
                return
            self.logged.append(now)
            logging.warning("%s", reason)
        self.seen[reason] = now

    def flush(self) -> None:
        """Log the delayed reasons that are due."""
        now = time.monotonic()
        for reason in [reason for reason, (due, _) in self.delayed.items() if due <= now]:
            _, unless = self.delayed.pop(reason)
            if not any(unless in old for old in self.seen):
                self.add(now, reason)

    def closed(self, link: RouterLink, address: str, event: int, detail: int,
               now: Seconds) -> None:
        """Log a connection from `address` ("" if unknown) that was closed before its first
        message. `event` and `detail` are from the monitor; 0 if no handshake failed."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return  # the Authenticator has logged it
        vague = event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or not address
        route = f"{f' from {address}' if address else ''} to {link.address} failed: "
        reason = f"connection{route}{failure(link.keyed, event, detail)}"
        self.add(now, reason, unless=route if vague else "")  # unless that route has a better one


def failure(keyed: bool, event: int, detail: int) -> str:
    """Return why a connection to a broker, with or without a key, sent no message."""
    if not event:
        return "it sent nothing; it is probably not testcloud (browser, ssh, port scan)"
    if not keyed:
        return ("it uses a key, this broker has none (make one: testcloud.py keygen); or it is not "
                "testcloud")
    copy = f"(it needs a copy of our {KEY_FILE})"
    if detail == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return f"it has the key of another cloud {copy}"
    return f"it has no key {copy}, or is not testcloud"


# === Options ==========================================================================
#
# OPTIONS has a row for each option of each role. The parser, --help and completion are made
# from it. A row is written as in a manual: "-j --slots N" has two names, and the word in
# capitals stands for its value. VALUE_TYPES checks the value.


class Option(NamedTuple):
    """A row of OPTIONS: the arguments of argparse's add_argument()."""

    names: Tuple[str, ...]
    settings: Dict[str, Any]


# --- values of options


def checked(kind: Callable[[str], Any], fits: Callable[[Any], bool],
            called: str) -> Callable[[str], Any]:
    """Return a type for argparse: kind(text), if it fits. Otherwise the text is not `called`."""
    def value_of(text: str) -> Any:
        with contextlib.suppress(ValueError, TypeError, re.error):
            value = kind(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{printable(text) or repr(text)} is not {called}")
    return value_of


def parse_size(text: str) -> int:
    """Return bytes; the number may end with k, M or G. Raises ValueError."""
    factor = {"k": 2**10, "m": 2**20, "g": 2**30}.get(text[-1:].lower(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def parse_duration(text: str) -> Seconds:
    """Return seconds; the number may end with ms, s, m, h or d. Raises ValueError."""
    number = text.rstrip("msdh")
    units = {"": 1, "ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
    return float(number) * units.get(text[len(number):], math.nan)


def parse_client(text: str) -> Tuple[int, str]:
    """Return the two parts of PID@HOST. Raises ValueError."""
    pid, _, host = text.partition("@")
    return int(pid), host


LABEL = (str, lambda text: name(text) and text.isprintable() and " " not in text
         and text not in KNOWN_BY_LABEL, "a label (of ASCII characters, without spaces)")
# checked()'s arguments, by the option's name or else by the word for its value. No text may be
# empty: that comes from a variable of the shell that is not set.
VALUE_TYPES: Dict[str, Tuple[Callable[[str], Any], Callable[[Any], Any], str]] = {
    "--slots": (int, width, "a number of slots, from 1 (without it: a slot for each CPU)"),
    "--slots-each": (int, width, "a number of slots, from 1"),
    "--lock": (str, lambda text: text and lock_name(text), "a name (up to 200 characters)"),
    "--nice": (int, count, "a number from 0"), "--label": LABEL, "--need": LABEL,
    "--host": (str, lambda text: text.isprintable() and re.fullmatch("[^/~ ]{1,64}", text),
               "a host name (up to 64 characters, without spaces, / and ~)"),
    "LOGIN": (str, str.strip, "a login"),
    "PID@HOST": (parse_client, lambda client: count(client[0]) and all(client),
                 "a client (such as 4711@vm2)"),
    "--sync": (str, lambda text: True, "a directory"),  # "" is the work tree around us
    "--exclude": (lambda text: (True, text), lambda rule: rule[1], "a pattern"),
    "--include": (lambda text: (False, text), lambda rule: rule[1], "a pattern"),
    "COMMAND": (str, lambda text: text.strip() and "\n" not in text, "a command"),
    "ADDR": (str, bool, "an address"), "DIR": (str, bool, "a directory"),
    "FILE": (str, bool, "a file name"), "JOBLOG": (str, bool, "a file name"),
    "PATH": (str, lambda path: path and "\0" not in path, "a path"),
    "--max-args": (int, lambda n: n >= 1, "a number from 1 (pytest-xdist's -n is -j here)"),
    "NAME": (str, bool, "a name"), "N": (int, lambda n: n >= 1, "a number from 1"),
    "TIME": (parse_duration, lambda span: span > 0 and number(span),
             "a time (such as 90 or 90s, 500ms, 5m, 2h, 1d)"),
    "W": (int, integer, "a weight: a whole number"),
    "X": (float, lambda load: load > 0, "a number over 0"),
    "MS": (float, lambda ms: ms >= 0, "a number of milliseconds"),
    "SIZE": (parse_size, lambda n: n >= 1 and count(n), "a size (such as 64k, 10M, 2G)"),
    "HASH": (str.lower, lambda text: re.fullmatch("[0-9a-f]{40}", text), "a result hash"),
    "REGEX": (re.compile, lambda regex: not regex.match(""),
              "a regular expression of what separates columns (write '\\|' for a bar)"),
}


def option(usage: str, help: str, **settings: Any) -> Option:
    """Return a row of OPTIONS, with more settings for argparse."""
    *names, value = usage.split()
    if value.startswith("-"):
        return Option((*names, value), {"action": "store_true", "help": help, **settings})
    kind = VALUE_TYPES.get(names[-1] if names else "") or VALUE_TYPES.get(value)
    return Option(tuple(names) or (settings.pop("dest", value.lower()),), {
        "metavar": value, "type": checked(*kind) if kind else None, "help": help, **settings})


def time_option(name: str, help: str) -> Option:
    """Return the row of a field of Times, with its default."""
    default = Times._field_defaults[name]
    value, unit = ("N", "") if isinstance(default, int) else ("TIME", " s")
    return option(f"--{name.replace('_', '-')} {value}", f"{help} (default: {default:g}{unit})",
                  default=default)


# --- the table of options

CONNECT = option("--connect ADDR", "the broker (default: $TESTCLOUD_BROKER or localhost)")
KEY = option("--key FILE", "key file (else: $TESTCLOUD_KEY_FILE, beside the script)")
INSECURE = option("--insecure", "no key: no encryption, and anybody can connect")
WAIT = option("--wait TIME", "give up (status 3) after waiting so long", default=math.inf)
VERBOSE = option("-v --verbose", "say more on stderr")
READY_INTERVAL = time_option("ready_interval", "interval of our heartbeats")
MISSED_OKS = time_option("missed_oks", "reconnect after N unanswered ones")
CRASH_LIMIT = time_option("crash_limit", "a command that lost N workers has failed")
KILL_GRACE = time_option("kill_grace", "from SIGTERM to SIGKILL")
CACHE = option("--cache SIZE", "of workspaces (default: 10G, or a tenth of the free disk)",
               default=0)
HELP = option("-h --help", "show this", action="help")
HOSTS = [
    option("-S --sshlogin LOGIN", "run on hosts, by ssh: [N/][user@]host,... (: is here)",
           action="append", default=[]),
    option("--sshloginfile --slf FILE", "hosts in a file, one a line", action="append", default=[]),
    option("--ssh COMMAND", "instead of ssh (default: $TESTCLOUD_SSH or ssh)"),
    option("--via COMMAND", "run through this: [N/]docker exec -i box",
           action="append", default=[]),
    option("--python COMMAND", "Python on the hosts (default: a new enough one)")]
SHELLS = ("bash", "zsh", "fish")

# options without a row in a client's --help, so that it fits a screen: another row names them,
# or an error, or the help of a worker
HIDDEN = {"--sync-list", "--sync-max", "--include", "--setup-once-for", "--fresh", "--cache",
          "--quiet", "--resume-failed", "--allow-empty", "--kill-grace", "--ready-interval",
          "--missed-oks", "--crash-limit", "--serial", "--delay", "--fail-on-missing", "--force",
          "--junit-from"}
OPTIONS: Dict[str, Tuple[str, List[Tuple[str, List[Option]]]]] = {  # by role: purpose, groups
    "broker": ("take commands from clients and give them to workers", [
        ("where", [
            option("--clients ADDR", f"listen for clients (default: port {CLIENT_PORT})"),
            option("--workers ADDR", f"listen for workers (default: port {WORKER_PORT})"),
            option("--upstream ADDR", "join that broker as a worker with all our slots"),
            option("--upstream-key FILE", "a worker's key for it (default: our own)"),
            KEY, INSECURE, VERBOSE]),
        ("times", [
            time_option("queued_timeout", "for a worker to confirm a command"),
            time_option("worker_expiry", "forget a worker silent for so long"),
            time_option("client_lease", "forget a client silent for so long"),
            time_option("lost_grace", "for a lost worker to reconnect"),
            CRASH_LIMIT, READY_INTERVAL, MISSED_OKS])]),
    "worker": ("run commands for a broker (if started by ssh without -t: until ssh ends)", [
        ("where", [CONNECT, KEY, INSECURE, WAIT, VERBOSE, *HOSTS]),
        ("what it takes", [
            option("-j --slots N", "commands at once (default: the CPUs we may use)", default=0),
            option("--weight W", "the highest are used first (default: 0)", default=0),
            option("--label NAME", "for client --need NAME; may be repeated",
                   action="append", default=[]),
            option("--host NAME", "name of this machine in reports (default: its own)"),
            option("--max-load X", "take no more at a load average from X on", default=math.inf),
            option("--memfree SIZE", "take no more while less memory is free", default=0),
            option("--nice N", "niceness of commands (default: 0)", default=0),
            CACHE,
            option("--drain TIME", "for running commands when told to stop (default: 0)",
                   default=0.0)]),
        ("times", [READY_INTERVAL, MISSED_OKS, KILL_GRACE])]),
    "client": ("run commands, one a line from stdin, and report their results", [
        ("what to run", [
            option("TEMPLATE", "{} is the line, {1} a column; then ::: ARGS or :::: FILE",
                   nargs=argparse.REMAINDER),
            option("--jsonl", "lines are JSON objects: cmd, name, env, slots, lock..."),
            option("-0 --null", "NUL ends a line of stdin, not newline"),
            option("-n --max-args N", "so many lines for each command", default=1),
            option("--colsep REGEX", "what separates the columns of a line"),
            option("-C --cwd DIR", "directory on the worker: relative to ours, or ~ there"),
            option("--env NAME", "set a variable as it is here; also: NAME=VALUE",
                   action="append", default=[]),
            option("--shell PATH", "shell of the commands, path or name (default: /bin/sh)"),
            option("--return FILE", "bring this file of each command back; --fail-on-missing",
                   action="append", default=[], dest="returns"),
            option("--dry-run", "only print the commands; --sync-list: what goes along"),
            option("--sync-list", "only print sizes and names of the files that go along"),
            option("--sync DIR", "take this along (default: git's work tree around us)", nargs="?"),
            option("--setup COMMAND", "first in each workspace; --setup-once-for FILE, --fresh"),
            option("--setup-once-for FILE", "run the setup again only if this file changes",
                   action="append", default=[]),
            option("--fresh", "begin with empty workspaces"), CACHE,
            option("--sync-max SIZE", "refuse a larger tree (default: 2G)", default=0),
            option("--exclude PATTERN", "not these files, as in .gitignore; --include: these",
                   action="append", dest="filters", default=[]),
            option("--include PATTERN", "these files, though ignored or excluded",
                   action="append", dest="filters", default=[])]),
        ("where", [
            CONNECT,
            option("--local", "run on this machine, without a broker"),
            *HOSTS,
            option("-j --slots N", "commands at once, here or on each host (default: CPUs)",
                   default=0),
            option("--need NAME", "only on workers with this --label", action="append", default=[]),
            option("--slots-each N", "slots that each command takes (default: 1)", default=0),
            option("--lock NAME", "one at a time in the cloud; --serial, --delay TIME"),
            option("--serial", "one command at a time"),
            option("--delay TIME", "at least so long between two starts", default=0.0),
            KEY, INSECURE, WAIT]),
        ("failures", [
            option("--timeout TIME", "stop a command that runs longer: 500ms, 30s, 5m, 2h, 1d",
                   default=0.0),
            option("--retries N", "try up to N times, in turn on another host", default=0),
            option("--fail-fast N", "stop everything after N failures (default: 1)",
                   nargs="?", const=1, default=0),
            option("--fail-on-flaky", "a command that is FLAKY or ONLY ON has failed"),
            option("--fail-on-missing", "a command that makes no file of --return has failed"),
            option("--expect HASH", "fail if the result hash is another one"),
            option("--allow-empty", "an input without commands is no error"),
            CRASH_LIMIT, KILL_GRACE, READY_INTERVAL, MISSED_OKS]),
        ("what to show", [
            option("-p --progress", "a line at the bottom (default: on a terminal)"),
            option("-k --keep-order", "results in the order of the input"),
            option("--tag", "each line of output after its line of the input"),
            option("--live", "lines of output as they come, tagged"),
            option("--raw", "the commands' own stdout and stderr"),
            option("--json", "a JSON object a line for each result"),
            option("-b --brief", "leave the outputs out"),
            option("-f --fail-only", "show failures only"),
            option("-s --slow MS", "underline what took longer than MS milliseconds",
                   default=math.inf),
            option("--color WHEN", "auto (on a terminal; the default), always, never",
                   choices=("auto", "always", "never"), default="auto"),
            option("--max-output SIZE", "keep so much of each output: 64k, 10M, 2G", default=0),
            option("-v --verbose", "say more on stderr; --quiet: only errors"),
            option("--quiet", "only errors on stderr", action="store_const", dest="verbose",
                   const=None)]),
        ("reports", [
            option("--joblog FILE", "a line for each result, as of GNU parallel"),
            option("--resume", "skip commands in the joblog; --resume-failed: passed"),
            option("--resume-failed", "skip commands that passed by the joblog"),
            option("--junit FILE", "JUnit XML for CI; --junit-from FILE: of what tests wrote"),
            option("--junit-from FILE", "count the tests in a JUnit file of each command"),
            option("--html FILE", "a page with a picture of the run"),
            option("--results DIR", "a directory for each command; --force: replace old ones"),
            option("--force", "replace what commands left in the DIR of --results"),
            option("--timings JOBLOG", "begin with the commands that took longest there")])]),
    "status": ("show the workers and clients of a broker", [
        ("what to show", [
            CONNECT,
            option("--watch", "again and again, until q or Ctrl-C"),
            option("--json", "as JSON, an object a line"),
            option("--wait TIME", "give up after so long (default: 5 s; with --watch: never)"),
            KEY, INSECURE, VERBOSE])]),
    "cancel": ("stop the run of a client, which says who stopped it", [
        ("which", [
            option("PID@HOST", "the client, as status shows it", dest="client"),
            CONNECT,
            option("--wait TIME", "give up (status 3) after so long (default: 5 s)"),
            KEY, INSECURE, VERBOSE])]),
    "keygen": ("make the key of a cloud, or a key for one role in it", [
        ("what to make", [
            option("FILE", f"where (default: {KEY_FILE} beside the script; with --role: "
                   "testcloud-NAME.key in the current directory)", nargs="?"),
            option("--role ROLE", "a key for a worker or a client, and nothing else",
                   choices=tuple(ROLE_OF.values())),
            option("--name NAME", "name of its holder (default: the role)"),
            option("--revoke NAME", "the key of this holder is not accepted any more"),
            KEY, VERBOSE])]),
    "completion": ("print a script with which a shell completes our options", [
        ("for which", [option("SHELL", f"one of {', '.join(SHELLS)}", choices=SHELLS)])]),
    "help": ("show the manual", [
        ("what to show", [option("TOPIC", "one topic, or a role (default: the list of topics)",
                                 nargs="?")])]),
}
EXAMPLES = {CLIENT_ROLE: """\
ls tests/test_*.py | testcloud.py client pytest -q {}   each file on some worker
testcloud.py client --local gzip -k {} ::: *.log        on this machine alone
testcloud.py client -S alpha,beta --sync < file         on hosts, with our files

"""}
USAGE = {CLIENT_ROLE: " [TEMPLATE ...]  < commands", "cancel": " PID@HOST", "keygen": " [FILE]",
         "completion": " SHELL", "help": " [TOPIC]"}


def options_of(role: str) -> List[Option]:
    return [*(row for _, rows in OPTIONS[role][1] for row in rows), HELP]


def times_from(settings: argparse.Namespace) -> Times:
    """Return the Times of a command line; those that its role has not keep their default."""
    given = vars(settings)
    return Times(**{name: given[name] for name in Times._fields if name in given})


# === Completion =======================================================================
#
# Scripts with which a shell completes roles, options and the values to choose from. For all
# other words it offers files.


def option_names(row: Option) -> List[str]:
    return [name for name in row.names if name.startswith("-")]


def bash_completion() -> str:
    """Return a script for bash. zsh understands it after bashcompinit."""
    # by pattern: number of the word, word before it, role, word
    words: Dict[str, Iterable[str]] = {'"1 "*': OPTIONS, '*" -- "*': (), '"2 help "*': TOPICS}
    for role in OPTIONS:
        rows = options_of(role)
        words[f'*" {role} -"*'] = sorted(name for row in rows for name in option_names(row))
        words.update({f'*" {name} "*' if name[0] == "-" else f'"2 {role} "*':
                      row.settings["choices"]
                      for row in rows if "choices" in row.settings for name in row.names})
    cases = "\n".join(f"    {pattern}) words='{' '.join(found)}';;"
                      for pattern, found in words.items())
    return f"""\
_testcloud() {{
  local words= current="${{COMP_WORDS[COMP_CWORD]}}"
  case "$COMP_CWORD ${{COMP_WORDS[COMP_CWORD-1]}} ${{COMP_WORDS[1]}} $current" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _testcloud testcloud testcloud.py"""


def fish_completion() -> Iterator[str]:
    """Yield the lines of a script for fish, which shows help, too."""
    yield "complete -c testcloud -w testcloud.py"
    start = "complete -c testcloud.py -n"
    for topic, (summary, _) in TOPICS.items():
        yield f"{start} '__fish_seen_subcommand_from help' -f -a {topic} -d {shlex.quote(summary)}"
    for role, (purpose, _) in OPTIONS.items():
        yield f"{start} __fish_use_subcommand -f -a {role} -d {shlex.quote(purpose)}"
        for row in options_of(role):
            words = [f"-{'s' if len(name) == 2 else 'l'} {name.lstrip('-')}"
                     for name in option_names(row)]
            if "choices" in row.settings:
                words.append(f"-x -a '{' '.join(row.settings['choices'])}'")
            elif "metavar" in row.settings and words:
                words.append("-r")
            yield (f"{start} '__fish_seen_subcommand_from {role}' {' '.join(words)} "
                   f"-d {shlex.quote(row.settings['help'])}") if words else ""


def run_completion(settings: argparse.Namespace) -> int:
    zsh = "autoload -Uz compinit bashcompinit && compinit -u && bashcompinit\n"
    print_line("\n".join(fish_completion()) if settings.shell == "fish" else
               zsh * (settings.shell == "zsh") + bash_completion())
    return 0


# === Broker and worker ================================================================
#
# Each run_ROLE() function builds a loop from the settings of the command line, runs it and
# returns the exit status. It raises UsageError or SetupError for what a user can mend.


def print_line(text: str) -> None:
    """Print a line to stdout at once: scripts wait for it. Raises SetupError."""
    with file_errors("write to", "stdout"):
        print(text, flush=True)


@contextlib.contextmanager
def file_errors(doing: str, path: str) -> Iterator[None]:
    """Turn an OSError into a SetupError that says what cannot be done with this file."""
    try:
        yield
    except BrokenPipeError:
        raise  # as if SIGPIPE had ended us
    except OSError as error:
        raise SetupError(f"cannot {doing} {printable(path)}: {error.strerror}") from None


# --- names, addresses and keys of a role


def host_name() -> str:
    """Return what socket.gethostname() does. The import of socket would take 2 ms."""
    return os.uname().nodename


def unique_name(keys: Optional[Keys] = None) -> str:
    """Return a name for this process, HOST-PID-RANDOM. With keys, it shows that it is ours."""
    host = "".join(c if c.isalnum() or c in "-_" else "-" for c in host_name())
    name = f"{host[:40]}-{os.getpid()}-{os.urandom(4).hex()}"
    return f"{name}.{fingerprint(keys.pairs[WORKER_ROLE].public)}" if keys else name


def user_name() -> str:
    with contextlib.suppress(ImportError, KeyError):  # a container's user may have no name
        import pwd  # late: only cancel needs it
        return pwd.getpwuid(os.getuid()).pw_name
    return f"user {os.getuid()}"


def host_identity(given: Optional[str]) -> str:
    """Return NAME/ID of this machine. Clones differ in the boot's id, containers in the name."""
    marks = read_text("/etc/machine-id") + read_text("/proc/sys/kernel/random/boot_id")
    if not marks:  # no Linux
        import uuid
        marks = str(uuid.getnode())
    return f"{given or host_name()[:64]}/{hashlib.sha256(marks.encode()).hexdigest()[:12]}"


def broker_address(settings: argparse.Namespace, port: int) -> str:
    """Return the address of the broker to connect to. Raises UsageError, SetupError."""
    address = parse_address(
        settings.connect or os.environ.get("TESTCLOUD_BROKER") or "localhost", port)
    resolve(address)
    return address


def load_keys(path: str, role: str) -> Keys:
    """Return the keys in a file. Raises SetupError if they are not for this role."""
    keys = read_keys(path)
    if not keys.suffice_for(role):
        made = "keygen" if role == BROKER_ROLE else f"keygen --role {role}"
        raise SetupError(f"the key {printable(path)} is not for a {role}: ask the cloud's owner "
                         f"for one made with: testcloud.py {made}")
    return keys


def find_keys(settings: argparse.Namespace, role: str) -> Tuple[str, Optional[Keys]]:
    """Return the key file and its keys; ("", None) without. Raises UsageError, SetupError."""
    if settings.insecure and settings.key:
        raise UsageError("--insecure uses no key, and --key names one: give one of them only")
    path = "" if settings.insecure else find_key_file(settings.key)
    return path, load_keys(path, role) if path else None


def keys_to_connect(settings: argparse.Namespace, role: str, address: str) -> Optional[Keys]:
    """Return the keys for a connection to this broker. Raises UsageError, SetupError."""
    _, keys = find_keys(settings, role)
    if keys is None and not settings.insecure and not is_loopback(resolve(address)):
        raise UsageError(f"{address} is on another machine, and trusted only with a key: copy the "
                         f"cloud's {KEY_FILE} beside this script (or see --key and --insecure)")
    return keys


def connect(loop: EventLoop, adapter: Adapter, address: str, role: str, keys: Optional[Keys],
            settings: argparse.Namespace) -> None:
    """Link the adapter to its broker. Keys that are found later replace refused ones."""
    def renew() -> Optional[Keys]:
        with contextlib.suppress(UsageError, SetupError):
            return find_keys(settings, role)[1]
        return None
    DealerLink(loop, adapter, BROKER, address, role, keys,
               f"copy its cloud's {KEY_FILE} beside this script (see --key)", renew)


def listen_addresses(settings: argparse.Namespace, keys: Optional[Keys]) -> Tuple[str, str]:
    """Return where a broker listens for clients and for workers. Raises UsageError, SetupError."""
    default = "127.0.0.1" if keys is None else "*"
    found = (parse_address(settings.clients or default, CLIENT_PORT, listen=True),
             parse_address(settings.workers or default, WORKER_PORT, listen=True))
    for address in map(resolve, found) if keys is None and not settings.insecure else ():
        if not is_loopback(address):
            raise UsageError(
                f"{address} can be reached from the network, and needs a key: make one with: "
                f"testcloud.py keygen (--insecure: anybody may run commands here)")
    return found


# --- running a broker


def run_broker(settings: argparse.Namespace) -> int:
    path, keys = find_keys(settings, BROKER_ROLE)
    addresses = listen_addresses(settings, keys)
    if settings.upstream_key and not settings.upstream:
        raise UsageError("--upstream-key goes with --upstream")
    upstream = parse_address(settings.upstream, WORKER_PORT) if settings.upstream else ""
    upstream_keys = load_keys(settings.upstream_key, WORKER_ROLE) if settings.upstream_key else keys
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(EventLoop(sockets=True)))
        authenticator = stack.enter_context(contextlib.closing(Authenticator(loop, path)))
        broker = Broker(unique_name(upstream_keys), times_from(settings), bool(upstream),
                        time.monotonic())
        adapter = loop.add(broker, {})
        clients = RouterLink(loop, adapter, CLIENTS, addresses[0], authenticator)
        workers = RouterLink(loop, adapter, WORKERS, addresses[1], authenticator)
        MemoryGuard(loop, [clients, workers])
        loop.on_signals(lambda status, now: loop.exit(status))
        print_line(f"Listening for clients on {clients.address}")
        print_line(f"Listening for workers on {workers.address}")
        if keys is not None:
            logging.info("encrypted, and only for those with a key: %s", printable(path, 1000))
        elif not settings.insecure:
            logging.info("for this machine only, as there is no key (testcloud.py keygen)")
        for link in (clients, workers):
            if keys is None and not is_loopback(link.address):
                print_notice(f"warning: {link.address} needs no key, and can be reached from the "
                             f"network: ANYBODY CAN RUN COMMANDS on all workers, and forge results")
        if upstream:
            DealerLink(loop, adapter, BROKER, upstream, WORKER_ROLE, upstream_keys,
                       "have a key made there (testcloud.py keygen --role worker), and name it "
                       "with --upstream-key")
            print_line(f"Joining the broker at {upstream}")
        return loop.run()


# --- running a worker


def watch_ssh(worker: Worker) -> Callable[[], None]:
    """Return a function for each round of the loop. It stops a worker when the ssh that started
    it has ended: then two of its pipes are broken. `ssh -n` breaks stdin alone, at once."""
    poller = select.poll()
    lasting = has_terminal() or signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # under nohup
    if "SSH_CONNECTION" not in os.environ or lasting:
        return lambda: None
    for file in range(3):
        poller.register(file, 0)

    def look() -> None:
        broken = {file for file, event in poller.poll(0)
                  if event & (select.POLLHUP | select.POLLERR)}
        if 0 in broken and len(broken) > 1:
            poller.unregister(0)
            worker.stop(128 + signal.SIGHUP, time.monotonic())
    return look


LOAD_INTERVAL: Seconds = 1.0  # the system updates its load average slowly


def watch_load(loop: EventLoop, worker: Worker) -> None:
    """Tell a worker its machine's load and free memory every LOAD_INTERVAL."""
    if worker.memfree and free_memory() == math.inf:
        print_notice("--memfree is ignored: this system does not tell how much memory is free")

    def look(now: Seconds) -> None:
        with contextlib.suppress(OSError, AttributeError):  # the system does not know it
            worker.set_load(os.getloadavg()[0], now, free_memory() if worker.memfree else math.inf)
    loop.every(LOAD_INTERVAL, look)


def attach_runner(loop: EventLoop, worker: Worker, subreaper: bool, nice: int = 0,
                  cache: int = 0) -> Tuple[Adapter, Callable[[], None]]:
    """Give a worker its adapter to the loop, the Runner of its commands, and their Workspaces.
    Return the adapter, and a function that ends both."""
    def deliver(now: Seconds) -> None:
        for job, what in runner.take_events():
            if isinstance(what, ExitRecord):
                worker.finished(job, what, now)
            elif isinstance(what, Output):
                worker.printed(job, now)
            else:
                worker.started(job, what, now)
        worker.settle()

    def start_jobs() -> None:
        now = loop.clock()  # first: after a pause it tells the worker that its lease may be over
        runner.start_jobs(min(now + LONG_PAUSE, worker.start_deadline()))
    runner = Runner(worker.slots, lambda: loop.post(deliver), worker.name, subreaper, nice)
    loop.each_round.append(start_jobs)
    loop.every(REAP_INTERVAL, runner.reap)
    spaces = Workspaces(cache_limit(cache), lambda run, event: loop.post(
        lambda now: worker.tree_told(run, event, now)))
    adapter = loop.add(worker, {
        Start: lambda effect: runner.enqueue(effect.job),
        StartSetup: lambda effect: runner.start_apart(effect.job),
        Recall: lambda effect: runner.recall(effect.job),
        Kill: lambda effect: runner.kill(effect.job, effect.hard),
        **dict.fromkeys((FindTree, FillTree, PutTree, EndSetup), spaces.order),
        ReleaseTree: lambda effect: spaces.release(effect.run)})

    def note_usage(now: Seconds) -> None:
        worker.cache_bytes = spaces.used
    loop.every(LOAD_INTERVAL, note_usage)

    def close() -> None:
        runner.close()
        spaces.close()
    return adapter, close


def run_worker(settings: argparse.Namespace) -> int:
    address = broker_address(settings, WORKER_PORT)
    keys = keys_to_connect(settings, WORKER_ROLE, address)
    logins = logins_of(settings)
    if logins:
        return run_relays(settings, logins, address, keys)

    def join(loop: EventLoop, adapter: Adapter, worker: Worker) -> None:
        connect(loop, adapter, address, WORKER_ROLE, keys, settings)
        print_line(f"Connecting to {address} to run commands in {plural(worker.slots, 'slot')}")
    return supervise(lambda control: worker_process(
        settings, new_worker(settings, address, keys), control, join, True))


def new_worker(settings: argparse.Namespace, address: Optional[str], keys: Optional[Keys] = None,
               shared: bool = True) -> Worker:
    """Return a worker with the settings of its command line. In a cloud that is shared with
    others, it is told of other workers of its user."""
    return Worker(unique_name(keys), settings.slots or usable_cpus(), settings.weight,
                  host_identity(settings.host), times_from(settings), settings.wait, address,
                  settings.drain, [*settings.label, *KNOWN_BY_LABEL], settings.max_load,
                  settings.memfree, f"user {os.getuid()}" if shared else "")


def worker_process(settings: argparse.Namespace, worker: Worker, control: int,
                   join: Callable[[EventLoop, Adapter, Worker], None], sockets: bool) -> int:
    """Run a worker; control is the descriptor of its supervisor, or -1 without one. join() gives
    it the link to its broker."""
    import subprocess  # noqa: F401  # now: later its file may be that of another Python
    ssh_watch = watch_ssh(worker)  # while we still have our terminal
    if control >= 0:
        detach_terminal()
    with contextlib.closing(EventLoop(sockets)) as loop:
        adapter, close = attach_runner(loop, worker, control >= 0, settings.nice, settings.cache)
        loop.each_round.append(ssh_watch)
        watch_load(loop, worker)
        join(loop, adapter, worker)
        loop.on_signals(worker.stop, control)
        with contextlib.ExitStack() as stack:
            stack.callback(close)
            return loop.run()


# === Hosts ============================================================================
#
# Hosts that need nothing but ssh (-S), or another way to a shell (--via). On each we start a
# worker, whose link is stdin and stdout of ssh. The program is sent first, over the same
# stream, and runs from memory: the host keeps no file, and needs only sh and Python. When
# the stream ends, the worker ends. A client has its own broker; worker -S relays to another.
#
#     our end                                  the host
#     BOOTSTRAP, as an argument                sh reads a line from stdin, and runs it:
#     start_script()                           looks for a Python, and starts it with BOOT:
#     the program, compressed                  Python runs it from memory: run_from_memory()
#     skips all before the mark                prints the mark, which ends the noise
#     records of a PipeLink                    records of a PipeLink

MANUAL["hosts"] = """\
    $ ls tests/test_*.py | testcloud.py client -S alpha,4/beta,: --sync pytest -q {}
    $ testcloud.py client --via '2/docker exec -i box' gzip -k {} ::: *.log
    $ testcloud.py worker -S alpha,beta --connect hub

The first command runs each file on alpha, on beta (four at once) or here (:). --sync
takes your files along (see `help trees`). The second one runs two commands at once in a
container. The third one lets two hosts work for a standing cloud, until you stop it.

The client starts a worker on each host, and is the broker of these workers. They end with
the client. You need not install, start or stop anything on a host. The client needs no
pyzmq.

`worker -S` does the same for the broker of a standing cloud. Its other options count for
each of its hosts. Only the machine on which it runs needs pyzmq and the key.

Name the hosts

@options client,worker --sshlogin --sshloginfile --ssh --via --python

N is the number of slots of a host, as in GNU parallel. The default is -j, else the number
of CPUs that a process may use there. -S, --sshloginfile and --via may be repeated. A host
that you name twice gets two workers. In a file of hosts, # begins a comment. The file ..
is ~/.config/testcloud/sshloginfile ($XDG_CONFIG_HOME).

--via takes a command that passes stdin and stdout on. testcloud appends /bin/sh -c TEXT
to it. More examples: '2/kubectl exec -i pod --' and 'sudo -n -u ci'.

Without --python the first new enough Python in the PATH of the login is taken: python3,
or python3.13 down to python3.9.

ssh

Your ssh configuration counts: aliases, ports, ProxyJump, agents, ControlMaster. Some
settings do not: ConnectTimeout, ServerAliveInterval, ServerAliveCountMax, RemoteCommand
and forwardings.

--ssh sets the times: --ssh 'ssh -o ConnectTimeout=60'. For large outputs it can choose a
fast cipher: --ssh 'ssh -c aes128-gcm@openssh.com'. Its command must understand the
options of OpenSSH.

ssh never asks for a password (BatchMode). `ssh-copy-id HOST` puts your key there. A key
with a passphrase must be in an agent (ssh-add). At most eight logins are under way at
once. sshd drops logins if there are more than ten (MaxStartups).

What a host needs

It needs /bin/sh, and Python 3.9 or newer, but no pyzmq. The program comes through ssh and
runs from memory. It opens no port. Without --sync it writes no file, but for an unlinked
one in $TMPDIR for each output over 64 KiB.

What commands find there

With --sync, commands run in a copy of your tree. Without it they run in the same path as
here, which must exist there. --cwd names another one.

Their environment is that of a login without a terminal: `ssh HOST env` shows it. It often
lacks what .bashrc or .profile add to the PATH. So name a program by its path, as in
`.venv/bin/pytest -q {}`. Or set the variable: --env PATH=.venv/bin:/usr/bin:/bin

A host that cannot be used

Commands start as soon as the first host is there. A command that this host cannot run
waits for the other hosts, for up to 10 s.

If testcloud cannot reach or use a host, it says the cause and the fix on stderr. It does
not try this host again; the others go on. With no host left the exit status is 3.

A host that is lost

Its commands run elsewhere at once. So do those that had ended, if their large outputs
(over 64 KiB) were not fetched yet. testcloud tries the host again after 1, 2, 4 ... 60 s.
These times begin again with 1 s if the host was there for a minute.

If a host does not answer, a notice says so after 8 s. The host is lost after about 15 s,
when ssh notices that the network is cut, or else after 30 s.

When ssh ends, for whatever reason, all that it started on the host ends at once. If the
network is cut and the host cannot notice, that takes 30 s. So a client that is stopped
for longer (Ctrl-Z) loses its hosts, and what ran there runs again.

Names of hosts in results

Results name a host as -S does, without the user. With --via, with : and with worker -S,
it has the name that `hostname` prints there. With client -S all hosts run everything:
labels (--need) are for a standing cloud.

Slurm and Kubernetes

    $ srun -N 8 python3 testcloud.py worker --connect hub --drain 20

This runs eight workers of a standing cloud. scancel ends them: Slurm gives them 30 s. On
Kubernetes, a Job does the same. Its image has Python, pyzmq, the script and its key:

    apiVersion: batch/v1
    kind: Job
    metadata: {name: workers}
    spec:
      parallelism: 8
      template:
        spec:
          restartPolicy: Never
          containers:
          - name: worker
            image: IMAGE
            command: [python3, testcloud.py, worker, --connect, hub, --drain, "20"]
"""

# A login shell may be csh or fish, which read quotes, ! and \ in their own ways. So what it sees
# is one constant text without them, and the script comes on stdin. sh reads no byte too many.
BOOTSTRAP = 'read -r line; eval "$line"'
# tells a version that is too old; Python 2 must understand it, too
PROBE = ("import sys; sys.version_info >= (3, 9) or "
         "sys.exit(', %s is %s' % (sys.executable, sys.version.split()[0]))")
# read() may take more than the program: nothing follows before the mark
BOOT = ("from __future__ import annotations; import sys, zlib; "
        "names = {{'__name__': 'testcloud'}}; [exec(compile(part, 'testcloud.py', 'exec'), names) "
        "for part in zlib.decompress(sys.stdin.buffer.read({size})).split(bytes(1))]; "
        "names['run_from_memory'](sys.argv[1])")
PYTHONS = ("python3", *(f"python3.{minor}" for minor in range(13, PYTHON[1] - 1, -1)))
NONE_LEFT = "none of the hosts can be used: giving up"
NO_PYTHON = "no python"  # stands behind the mark, before versions that are too old
SSH_OPTIONS = (
    "-T", "-x", "-o", "ClearAllForwardings=yes",  # only stdin and stdout
    "-o", "RemoteCommand=none",  # not that of the user's configuration
    "-o", "BatchMode=yes",  # never ask for a password
    "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")

MAX_LOGINS = 8  # under way at once: sshd drops logins at random if more than 10 are (MaxStartups)
LOGIN_TIME: Seconds = 2.0  # a login that takes longer waits for the network, not for sshd
START_TIMEOUT: Seconds = 30.0  # from starting ssh to the mark
END_TIME: Seconds = 2.0  # for ssh to end after its stream, then it is killed
CLOSE_TIME: Seconds = 3.0  # the same at our own end: workers stop their commands first
RETRY_DELAYS: Tuple[Seconds, Seconds] = (1.0, 60.0)  # before a host is tried again: first, longest
HEARD_NOTHING = 128 + signal.SIGHUP  # exit status of a worker whose stream has ended
MAX_DROPPED = 6  # logins that sshd drops in a row: then it is no accident
WORKER_SETTINGS: Fields = {  # options of a worker that reach a host; a client's has these defaults
    "weight": 0, "label": [], "max_load": math.inf, "memfree": 0, "nice": 0, "drain": 0.0,
    "wait": math.inf, "cache": 0, "verbose": False}
SILENT_BEATS = 4  # of a host, before the user hears of it
SAME_INTERVAL: Seconds = 5.0  # in which workers say the same once
HOST_INTERVAL: Seconds = 0.05  # between looks at what is due

# by what ssh says: the cause, and what to do; {} is its command for the host
SSH_FAILURES = (
    ("Could not resolve hostname|open failed: connect failed: .*(not known|name resolution)",
     "unknown host: check its name, or define it in ~/.ssh/config"),
    ("open failed: administratively prohibited",
     "its jump host forbids to go on from there (see AllowTcpForwarding in its sshd_config)"),
    ("banner exchange: .* (invalid format|could not read protocol version)",
     "what listens there is no sshd: is the port right?"),
    ("UNPROTECTED PRIVATE KEY FILE",
     "ssh ignores a private key that others may read: chmod 600 it, then: {}"),
    ("REMOTE HOST IDENTIFICATION HAS CHANGED",
     "its host key has changed: if you know why, remove the old one ({keygen}), then: {}"),
    ("Host key verification failed|No .*host key is known",
     "its host key is not known here: accept it once with: {}"),
    ("Permission denied|Too many authentication failures",
     "it accepts none of your keys: copy one there with ssh-copy-id {host}, or if it has a "
     "passphrase, load it with ssh-add"),
    ("Connection refused", "connection refused: is sshd running there, and on this port?"),
    ("timed out|No route to host|Network is unreachable|Host is down",
     "cannot be reached: is it on, and is its address right?"))
DROPPED = "kex_exchange_identification|Connection (closed|reset) by|MaxStartups"


# --- logins


class Login(NamedTuple):
    """A host as the user names it."""

    name: str  # in messages
    slots: int  # 0: the CPUs there
    command: Tuple[str, ...]  # that runs BOOTSTRAP there
    check: str  # a command to try by hand: it prints ok
    login: str = ""  # by hand, with ssh
    alias: Optional[str] = None  # its name in results; None: its own
    python: str = ""  # for sh; "": the one of --python, or the first that is new enough
    peer: Peer = b""


def names_hosts(settings: argparse.Namespace) -> bool:
    return bool(settings.sshlogin or settings.sshloginfile or settings.via)


def logins_of(settings: argparse.Namespace) -> List[Login]:
    """Return the hosts of -S, --sshloginfile and --via. Raises UsageError, SetupError."""
    if not names_hosts(settings):
        if settings.python or settings.ssh:
            raise UsageError("--python and --ssh go with hosts: -S or --via")
        return []
    if settings.subcommand == CLIENT_ROLE and (settings.local or settings.connect):
        raise UsageError("-S and --via need no broker, and no --local: this machine is -S : (for a "
                         "standing cloud: worker -S LOGIN --connect ADDR)")
    if settings.subcommand == WORKER_ROLE and settings.host:
        raise UsageError("--host names this machine; with -S and --via each host has its own name")
    for text in settings.sshlogin:
        if text.rstrip()[-1:] == ",":
            raise UsageError(f"-S {printable(text)}: no host follows the last comma: write hosts "
                             f"without spaces, as in -S alpha,beta")
    words = [word for text in settings.sshlogin for word in text.split(",")]
    for path in settings.sshloginfile:
        words += read_logins(path)
    logins = [parse_login(word, settings) for word in map(str.strip, words) if word]
    logins += [parse_via(text, settings) for text in settings.via]
    if not logins:
        raise UsageError("there is no host in -S or --sshloginfile")
    for name, n in Counter(login.name for login in logins).items():
        if n > 1:
            print_notice(f"{name} is named {n} times: it gets {n} workers, each with its own slots")
    return [login._replace(peer=b"%d" % at) for at, login in enumerate(logins)]


def read_logins(path: str) -> List[str]:
    """Return the logins in a file, one a line; # begins a comment."""
    if path == "-":
        raise UsageError("--sshloginfile cannot be stdin: that has the commands")
    if path == "..":
        config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        path = os.path.join(config, "testcloud", "sshloginfile")
    with file_errors("read", path), open(path, encoding="utf-8-sig", errors="replace") as file:
        return [line.partition("#")[0].strip() for line in file]


def split_command(text: str, option: str) -> List[str]:
    """Return the words of a command. Raises UsageError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"{option} {printable(text)}: {error}") from None
    if not words or "\0" in text:
        raise UsageError(f"{option} {printable(text)}: that is no command")
    return words


def split_slots(text: str, settings: argparse.Namespace) -> Tuple[int, str]:
    """Return N and the rest of [N/]TEXT; without N, that of -j. Raises UsageError."""
    match = re.fullmatch(r"([0-9]+)/(.+)", text, re.S)
    if match is None:
        return settings.slots, text
    slots = int(match[1][:20])  # of thousands of digits, int() would raise ValueError
    if not VALUE_TYPES["--slots"][1](slots):
        raise UsageError(f"{printable(text)}: cannot have {printable(match[1])} slots")
    return slots, match[2]


def parse_login(text: str, settings: argparse.Namespace) -> Login:
    """Return the host of a LOGIN. Raises UsageError."""
    slots, host = split_slots(text, settings)
    if host == ":":
        return Login("this machine", slots, ("/bin/sh", "-c", BOOTSTRAP), "/bin/sh -c 'echo ok'",
                     python=shlex.quote(sys.executable))
    if not re.fullmatch(r"(ssh://)?[^\s\0/-][^\s\0/]*", host):
        raise UsageError(f"-S {printable(text)}: write [N/][user@]host; options of ssh belong into "
                         f"~/.ssh/config, or into --ssh 'ssh -p 2222'")
    ssh = split_command(settings.ssh or os.environ.get("TESTCLOUD_SSH") or "ssh", "--ssh")
    alias = re.sub(r"^ssh://(.*?)(:[0-9]+)?$", r"\1", host).rpartition("@")[2]
    return Login(host, slots, (*ssh, *SSH_OPTIONS, host, f"exec /bin/sh -c '{BOOTSTRAP}'"),
                 shlex.join([*ssh, host, "echo", "ok"]), shlex.join([*ssh, host]),
                 alias if VALUE_TYPES["--host"][1](alias) else None)


def parse_via(text: str, settings: argparse.Namespace) -> Login:
    """Return the host of a --via. Raises UsageError."""
    slots, command = split_slots(text, settings)
    words = split_command(command, "--via")
    if os.path.basename(words[0]) == "ssh":
        raise UsageError("--via cannot use ssh, whose login shell reads all words anew: write -S "
                         "HOST (options of ssh: in ~/.ssh/config, or --ssh 'ssh -p 2222')")
    return Login(printable(command), slots, (*words, "/bin/sh", "-c", BOOTSTRAP),
                 f"{command} /bin/sh -c 'echo ok'")


def names_of(logins: List[Login]) -> str:
    """Return the hosts and their slots, as far as they are known, for people."""
    words = []
    for (name, slots), n in Counter((login.name, login.slots) for login in logins).items():
        known = [plural(slots, "slot")] * (slots > 0) + [f"{n} workers"] * (n > 1)
        words.append(printable(name) + (f" ({', '.join(known)})" if known else ""))
    return ", ".join(words)


# --- what is sent before the mark


def start_script(pythons: Sequence[str], mark: str, size: int, settings: Fields) -> str:
    """Return the line that the host's sh runs: it starts the first Python that is new enough, or
    prints the mark and why there is none. `size` is that of the program, in bytes."""
    texts = {"probe": PROBE, "boot": BOOT.format(size=size), "settings": json.dumps(settings)}
    steps = [*(f"{name}={shlex.quote(text)}" for name, text in texts.items()), "why="]
    for python in pythons:
        known = f"command -v {python} >/dev/null && " if python in PYTHONS else ""
        # -I, -S: its directory and installed packages do not count; Python 2 knows only -E for
        # -I. -B: it writes no file
        steps.append(f'{known}why="$why"$({python} -ES -c "$probe" 2>&1 </dev/null) && '
                     f'exec {python} -IBS -c "$boot" "$settings"')
    script = "; ".join([*steps, f"echo '{mark}{NO_PYTHON}'\"$why\""])
    # in two parts: a shell or a terminal that shows what it reads must not show the mark
    return script.replace(mark, f"{mark[:9]}''{mark[9:]}")


# what a worker on a host needs of this file: with half of it, it starts sooner
WORKER_SECTIONS = frozenset((
    "Names and numbers", "Messages", "Machines", "Tasks", "Trees", "Worker", "Processes",
    "Running commands", "Workspaces",
    "Terminal and stdout", "Addresses and pyzmq", "Event loop", "Links", "Key files",
    "Authentication and revoked keys", "Options", "Broker and worker", "Hosts"))


COMPILED_SIZE = 25_000  # characters of the program that are compiled at once: in the cache of a CPU


def worker_program(source: str) -> List[str]:
    """Return the imports and WORKER_SECTIONS of this file, without the manual, in parts. Each
    line keeps its number."""
    # with ^ for \n, these would take four times as long
    source = re.sub(r'(?s)\nMANUAL\[.*?\n"""(?=\n)', lambda one: "\n" * one[0].count("\n"), source)
    start, *rest = re.split(r"\n# === (.+?) =+(?=\n)", source)
    parts, size, line = [start], 0, start.count("\n")
    for title, text in zip(rest[::2], rest[1::2]):
        if size > COMPILED_SIZE:
            parts.append("\n" * line)
            size = 0
        taken = title in WORKER_SECTIONS
        parts[-1] += "\n" + (text if taken else "\n" * text.count("\n"))
        size += len(text) * taken
        line += 1 + text.count("\n")
    return parts


# --- on the host


def worker_controls(worker: Worker) -> Dict[str, Callable[..., object]]:
    """Return what our end of the stream may call at the worker's end."""
    return {"connected": lambda now: worker.connected(BROKER, now),
            "disconnected": lambda now: worker.disconnected(BROKER, b"", now),
            "refused": lambda why, now: worker.refused(BROKER, why, now),
            "key_changed": lambda mark, now: worker.key_changed(mark),
            "stop": worker.stop}


def run_from_memory(text: str) -> None:
    """Run a worker whose broker is at the other end of stdin and stdout; then exit. `text` has its
    settings, in JSON."""
    settings = argparse.Namespace(**json.loads(text))
    incoming, outgoing = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as null:
        os.dup2(null.fileno(), 0)
    os.dup2(2, 1)  # the stream is ours alone: what anything prints goes to stderr
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    logging.basicConfig(level=logging.DEBUG if settings.verbose else logging.WARNING,
                        handlers=[LogHandler()], format="testcloud: %(message)s")

    def join(loop: EventLoop, adapter: Adapter, worker: Worker) -> None:
        link = PipeLink(loop, worker, BROKER, b"", incoming, outgoing, worker_controls(worker),
                        lambda why, now: loop.exit(HEARD_NOTHING))
        adapter.links[BROKER] = link
        link.write(settings.mark.encode() + b"\n")
        loop.every(BEAT_INTERVAL, link.beat)
    os._exit(supervise(lambda control: worker_process(
        settings, new_worker(settings, settings.address, None, settings.shared), control, join,
        False)))


# --- at our end


class BrokerUplink:
    """The way of a host's messages to the broker in our process."""

    def __init__(self, machine: Machine, links: PeerLinks, peer: Peer) -> None:
        self.machine = machine
        self.links = links.links
        self.peer = peer

    def opened(self, link: StreamLink, now: Seconds) -> None:
        """The stream is open."""
        self.links[self.peer] = link
        link.control("connected")

    def ended(self, now: Seconds) -> None:
        """The stream has ended, and its worker."""
        if self.links.pop(self.peer, None):
            self.machine.disconnected(WORKERS, self.peer, now)

    def reconnect(self) -> None:
        """The worker asks for another connection, as its broker is silent."""
        if self.peer in self.links:
            self.links[self.peer].control("connected")


class Relay(Machine):
    """The way of a host's messages to a broker elsewhere: through a DEALER, unread."""

    peer = b""

    def __init__(self, loop: EventLoop, connect: Callable[[Adapter], None]) -> None:
        super().__init__()
        self.machine = self
        self.adapter = loop.add(self, {})
        self.connect = connect  # gives the adapter a DealerLink
        self.link: Optional[StreamLink] = None  # while the stream is open

    # --- the stream

    def opened(self, link: StreamLink, now: Seconds) -> None:
        self.link = self.adapter.links[WORKERS] = link
        try:
            self.reconnect()
        except SetupError as error:  # the broker's name cannot be resolved just now
            link.end(str(error), now)
            return
        dealer = self.adapter.links[BROKER]
        if isinstance(dealer, DealerLink) and dealer.keys:
            link.control("key_changed", fingerprint(dealer.keys.pairs[WORKER_ROLE].public))

    def ended(self, now: Seconds) -> None:
        dealer = self.adapter.links.get(BROKER)
        if self.link and isinstance(dealer, DealerLink):
            dealer.close(1000)  # ms, for a BYE
        self.link = None

    def reconnect(self) -> None:
        """Connect to the broker, anew if need be. Raises SetupError."""
        if BROKER in self.adapter.links:
            self.adapter.links[BROKER].reconnect()
        else:
            self.connect(self.adapter)

    # --- events: messages go on, and the worker's end is told of our connection

    def receive(self, link: str, peer: Peer, token: Run, body: bytes, data: Any,
                now: Seconds) -> None:
        other = WORKERS if link == BROKER else BROKER
        self.bulk.append(Outgoing(other, b"", token, body, data))

    def control(self, *words: str) -> None:
        if self.link:
            self.link.control(*words)

    def connected(self, link: str, now: Seconds) -> None:
        self.control("connected")

    def disconnected(self, link: str, peer: Peer, now: Seconds) -> None:
        self.control("disconnected")

    def refused(self, link: str, why: str, now: Seconds) -> None:
        self.control("refused", why)

    def key_changed(self, mark: str) -> None:
        self.control("key_changed", mark)


class Host:
    """A host on which we start a worker, again whenever its stream has ended."""

    def __init__(self, hosts: Hosts, login: Login,
                 uplink: Union[BrokerUplink, Relay]) -> None:
        self.hosts = hosts
        self.login = login
        self.uplink = uplink
        self.process: Optional[subprocess.Popen[bytes]] = None  # ssh, while it runs
        self.link: Any = None  # a PipeLink, while it runs
        self.stderr = -1
        self.line = b""  # of its stderr, not yet ended
        self.said: Deque[str] = deque(maxlen=20)  # lines of stderr that are not our worker's
        self.why = ""  # the stream has ended
        self.began = self.opened_at = self.ended_at = -math.inf
        self.due: Seconds = -math.inf  # when to start; inf: it cannot be used
        self.delay = RETRY_DELAYS[0]  # before the next start
        self.up = self.was_up = self.silent = False
        self.dropped = 0  # logins, before it was up

    def start(self, now: Seconds) -> None:
        """Start ssh, and send it all that must come before the mark."""
        self.began, self.why, self.line = now, "", b""
        self.said.clear()
        pipes: List[Tuple[int, int]] = []
        try:
            for _ in range(3):
                pipes.append(os.pipe())
            stdin, stdout, stderr = pipes
            import subprocess
            self.process = subprocess.Popen(
                self.login.command, stdin=stdin[0], stdout=stdout[1], stderr=stderr[1],
                start_new_session=True)  # Ctrl-C in our terminal is for us alone
        except (OSError, ValueError) as error:
            for end in itertools.chain(*pipes):
                os.close(end)
            cause = (f"cannot run {printable(self.login.command[0])} here: "
                     f"{getattr(error, 'strerror', error)} (see --ssh and --via)")
            if self.was_up:  # we had too many processes or files at this moment
                self.try_later(cause, now)
            else:
                self.fail(cause, now)
            return
        for end in (stdin[0], stdout[1], stderr[1]):
            os.close(end)
        mark = os.urandom(16).hex()
        self.link = PipeLink(
            self.hosts.loop, self.uplink.machine, WORKERS, self.uplink.peer, stdout[0], stdin[1],
            {"reconnect": lambda *_: self.uplink.reconnect()}, self.ended, mark.encode(),
            self.opened)
        self.stderr = stderr[0]
        os.set_blocking(self.stderr, False)
        self.hosts.loop.add_reader(self.stderr, self.read_stderr)
        self.link.write(self.hosts.script(self.login, mark))
        self.link.write(self.hosts.program)

    def read_stderr(self, now: Seconds, over: bool = False) -> None:
        """Show what the worker says, and keep what ssh says: it may be the cause of an end. If all
        is over, the last line counts, too, without its end."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.stderr, READ_SIZE)
            if not data:
                self.hosts.loop.remove(self.stderr)
        *lines, rest = (self.line + data + b"\n" * over).split(b"\n")
        self.line = rest[-MAX_MARK_LINE:]
        for line in lines:
            text = to_text(line)
            if self.up and text.startswith("testcloud: "):
                self.hosts.worker_said(self, printable(text[len("testcloud: "):], 1000), now)
            elif text.strip():
                self.said.append(text.strip()[:MAX_MARK_LINE])

    def tell(self, text: str, error: bool = False) -> None:
        self.hosts.tell(f"{printable(self.login.name)}: {text}", error)

    def opened(self, now: Seconds) -> None:
        self.read_stderr(now)  # what was said before is of no interest any more
        if self.was_up:
            self.tell("is back")
        self.up = self.was_up = True
        self.silent = False
        self.opened_at = now
        self.said.clear()
        self.uplink.opened(self.link, now)

    def note_silence(self) -> None:
        """Tell when the host has been silent for long, and when it is heard again."""
        silent = self.link.silent_beats >= SILENT_BEATS
        if self.up and silent != self.silent and not self.link.closed:
            self.silent = silent
            self.tell(f"has not answered for {SILENT_BEATS * BEAT_INTERVAL:g} s" if silent else
                      "answers again")

    def ended(self, why: str, now: Seconds) -> None:
        """The stream has ended. Wait for the end of ssh, for at most END_TIME."""
        self.why, self.ended_at = why, now
        self.signal(signal.SIGCONT)  # a worker that is stopped must see the end, too
        self.uplink.ended(now)

    def tick(self, now: Seconds) -> None:
        """Look whether the process has ended, or must."""
        assert self.process is not None
        over = self.process.poll() is not None
        if self.link.closed:
            if over or now >= self.ended_at + END_TIME:
                self.finish(now)
        elif over and not readable(self.link.incoming):
            self.link.end("", now)  # another process holds the stream
        elif not self.up and now >= self.began + START_TIMEOUT:
            self.link.end(f"not ready after {START_TIMEOUT:g} seconds: does its login shell wait "
                          f"for something? try: {self.login.check}", now)

    def finish(self, now: Seconds) -> None:
        """The process has ended: try again, or give the host up."""
        status = self.kill()
        self.link.close()
        self.read_stderr(now, over=True)
        self.hosts.loop.remove(self.stderr)
        os.close(self.stderr)
        was_up, self.up = self.up, False
        if self.hosts.stopping:
            return
        if was_up and now > self.opened_at + RETRY_DELAYS[1]:
            self.delay = RETRY_DELAYS[0]
        cause, final = self.cause(status, was_up)
        if final and not self.was_up or status == UNABLE:  # its worker gave up: --wait
            self.fail(cause, now)
            return
        self.try_later(f"lost: {cause}" if was_up else cause, now)

    def try_later(self, cause: str, now: Seconds) -> None:
        self.due = now + self.delay
        if self.was_up or self.dropped != 1:  # once is normal: others log in at the same time
            self.tell(f"{cause}; trying again in {self.delay:g} s")
        self.delay = min(2 * self.delay, RETRY_DELAYS[1])

    def kill(self) -> Optional[int]:
        """Kill what is left of the process group. Return the exit status of ssh, None if it ran."""
        assert self.process is not None
        import subprocess
        status = self.process.poll()
        self.signal(signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # of another user, as that of sudo
            self.process.wait(REAP_TIMEOUT)
        self.process = None
        return status

    def signal(self, number: int) -> None:
        """Send a signal to the process group of ssh."""
        assert self.process is not None
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, number)

    def cause(self, status: Optional[int], was_up: bool) -> Tuple[str, bool]:
        """Return why the stream has ended, with what to do, and whether that is final. `status` is
        that of ssh; None: we had to kill it."""
        said = "\n".join(self.said)
        if self.why.startswith(NO_PYTHON):
            return self.no_python(self.why[len(NO_PYTHON):].strip(", ")), True
        if self.why:
            return printable(self.why, 1000), True
        if was_up and status == HEARD_NOTHING:
            return "its worker heard nothing from here for too long", True
        if status == 255 and not was_up:
            for pattern, cause in SSH_FAILURES:
                for line in filter(re.compile(pattern).search, self.said):
                    words = f" ({printable(line, 300)})" * line.startswith("ssh: ")
                    keygen = next((line for line in self.said if line.startswith("ssh-keygen ")),
                                  "ssh-keygen -R")
                    return cause.format(self.login.login, host=self.login.name,
                                        keygen=printable(keygen)) + words, True
            if re.search(DROPPED, said):
                self.dropped += 1
                if self.dropped < MAX_DROPPED:
                    return self.why_dropped(), False
                return f"{self.why_dropped()}; gave up after {self.dropped} tries", True
        noise = [] if was_up else to_text(bytes(self.link.reader.buffer)).split("\n")
        last = [lines[-1:] for lines in ([*filter(str.strip, noise)], [*self.said])]
        words = printable("; ".join(itertools.chain(*last)), 300)
        ended = "closed its stdout" if status is None else f"killed by signal {-status}" \
            if status < 0 else f"ended with status {status}"
        if "probe=" in words:  # sh complains of our script
            words = "its login shell's start files read our stdin, or redefine a command"
        cause = f"{self.login.command[0]} {ended}" + (f" ({words})" if words else "")
        return cause if was_up else f"{cause}: try: {self.login.check}", True

    def why_dropped(self) -> str:
        """Return why sshd, or a program on the way to it, has dropped the login."""
        reasons = [line for line in self.said if not re.search(DROPPED + "|^Warning: ", line)]
        if reasons:
            return f"the connection was closed before the login ({printable(reasons[-1], 300)})"
        return "its sshd, or one on the way to it, drops logins (see MaxStartups)"

    def no_python(self, found: str) -> str:
        given, found = printable(self.hosts.settings.python or ""), printable(found, 300)
        if given:
            return f"--python {given} is no Python 3.9 or newer there: {found}"
        if found:
            return (f"its Python is too old ({found}), testcloud needs 3.9 or newer: name another "
                    f"with --python")
        return ("it has no python3 (nor python3.13 to python3.9): install it, or name it with "
                "--python")

    def wait_for_end(self, now: Seconds, over: bool) -> None:
        """Look whether ssh has ended; kill it if its time is over. Drop what still comes."""
        if self.process is None:
            return
        if over or self.process.poll() is not None:
            self.finish(now)
            return
        self.read_stderr(now)
        with contextlib.suppress(OSError):
            os.read(self.link.incoming, READ_SIZE)

    def fail(self, cause: str, now: Seconds) -> None:
        """Give the host up."""
        self.due = math.inf
        self.tell(cause, True)
        self.hosts.failed(now)


class Hosts:
    """Keeps a worker running on each host. Start few at a time."""

    def __init__(self, loop: EventLoop, settings: argparse.Namespace, address: Optional[str],
                 uplink: Callable[[Login], Union[BrokerUplink, Relay]],
                 none_left: Callable[[Seconds], None],
                 tell: Callable[[str, bool], None]) -> None:
        self.loop = loop
        self.settings = settings
        self.address = address  # of the broker, for notices
        self.none_left = none_left  # called when no host can be used
        self.tell = tell
        self.stopping = False
        self.status = 0  # of the end, when stopping
        self.stop_by: Seconds = math.inf  # when to exit at the latest
        self.shown = RecentTexts(SAME_INTERVAL)  # what workers said
        with file_errors("read", __file__), open(__file__, encoding="utf-8") as file:
            self.source = file.read()
        self.hosts = [Host(self, login, uplink(login)) for login in settings.logins]
        if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < MAX_LOGINS * (len(self.hosts) + 8):
            raise_file_limit()  # not for few: the workers on this machine inherit it
        loop.every(HOST_INTERVAL, self.look)
        loop.every(BEAT_INTERVAL, self.beat)

    @functools.cached_property
    def program(self) -> bytes:
        """The program for the hosts, compressed: while the first login is under way."""
        return zlib.compress("\0".join(worker_program(self.source)).encode())

    def script(self, login: Login, mark: str) -> bytes:
        """Return the line that starts the worker of a host."""
        shared = self.settings.subcommand == WORKER_ROLE
        given = {name: value for name, value in vars(self.settings).items()
                 if name in WORKER_SETTINGS or name in Times._fields}
        settings = {**WORKER_SETTINGS, **given, "slots": login.slots, "mark": mark,
                    "host": None if shared else login.alias, "shared": shared,
                    "address": self.address}
        python = login.python or self.settings.python
        script = start_script([python] if python else PYTHONS, mark, len(self.program), settings)
        return script.encode() + b"\n"

    def look(self, now: Seconds) -> None:
        """Start the hosts that are due, and look after the others."""
        for host in self.hosts:
            if host.process is not None:
                host.tick(now)
        logins = sum(host.process is not None and not host.up and now < host.began + LOGIN_TIME
                     for host in self.hosts)
        for host in self.hosts:
            if host.process is None and host.due <= now and logins < MAX_LOGINS \
                    and not self.stopping:
                host.start(now)
                logins += 1
        if now >= self.stop_by or self.stopping and not any(host.process for host in self.hosts):
            self.loop.exit(self.status)

    def beat(self, now: Seconds) -> None:
        for host in self.hosts:
            if host.process is not None and not host.link.closed:
                host.link.beat(now)
                host.note_silence()

    def worker_said(self, host: Host, text: str, now: Seconds) -> None:
        """Show what a worker says, unless others have just said the same, or very much."""
        if self.shown.is_new(text, now, math.inf if self.settings.verbose else MAX_COMPLAINTS):
            host.tell(text)

    def are_coming(self) -> bool:
        """Return whether a host may still come up for the first time."""
        return any(not host.was_up and host.due < math.inf for host in self.hosts)

    def given_up(self) -> List[str]:
        return [host.login.name for host in self.hosts if host.due == math.inf]

    def failed(self, now: Seconds) -> None:
        if len(self.given_up()) == len(self.hosts):
            self.none_left(now)

    def stop(self, status: int, now: Seconds) -> None:
        """Let all workers leave, then exit. A second call exits at once."""
        if self.stopping:
            self.loop.exit(status)
        self.stopping, self.status = True, status
        self.stop_by = now + self.settings.drain + 2 * self.settings.kill_grace + CLOSE_TIME
        for host in self.hosts:
            if host.process is not None and not host.up:
                host.link.end("stopped", now)
            elif host.process is not None:
                host.link.control("stop", status)

    def close(self) -> None:
        """End all streams, and wait until their workers have ended."""
        self.stopping = True
        for host in self.hosts:
            if host.process is not None and host.up:
                host.link.stop_writing()
            elif host.process is not None:
                host.finish(time.monotonic())
        began, said = time.monotonic(), False
        while any(host.process for host in self.hosts):
            now = time.monotonic()
            if now > began + NOTICE_DELAY and not said:
                said = True
                left = names_of([host.login for host in self.hosts if host.process])
                self.tell(f"waiting {CLOSE_TIME:g} s for the workers to end on {left}", False)
            for host in self.hosts:
                host.wait_for_end(now, now >= began + CLOSE_TIME)
            time.sleep(0.005)


def run_relays(settings: argparse.Namespace, logins: List[Login], address: str,
               keys: Optional[Keys]) -> int:
    """Run workers on hosts for a broker elsewhere."""
    settings.logins = logins
    with contextlib.closing(EventLoop(sockets=True)) as loop:
        def uplink(login: Login) -> Relay:
            return Relay(loop, lambda adapter: connect(
                loop, adapter, address, WORKER_ROLE, keys, settings))

        def none_left(now: Seconds) -> None:
            print_notice(NONE_LEFT)
            loop.exit(UNABLE)
        with contextlib.closing(Hosts(loop, settings, address, uplink, none_left,
                                      lambda text, error: print_notice(text))) as hosts:
            loop.on_signals(hosts.stop)
            print_line(f"Connecting to {names_of(logins)} to run commands for {address}")
            return loop.run()


# === Making and revoking keys =========================================================
#
# keygen writes the file of a new cloud; or, into the cloud's own file, which keys for one
# role exist. A holder of such a key gets a file of its own.


def run_keygen(settings: argparse.Namespace) -> int:
    if settings.role and settings.revoke or settings.name and not settings.role:
        raise UsageError("--name goes with --role, and --revoke with neither")
    if not settings.role and not settings.revoke:
        make_cloud(settings.file or beside_script(KEY_FILE))
        return 0
    own = find_key_file(settings.key)
    if not own:
        raise SetupError("there is no cloud's key yet: make it first, with: testcloud.py keygen")
    with locked_key_file(own) as replace:
        keys = read_keys(own)
        if not keys.suffice_for(BROKER_ROLE):
            raise SetupError(f"{printable(own)} is a holder's key, and cannot make or revoke keys: "
                             f"use the cloud's own (see --key)")
        if settings.revoke:
            replace(without_holder(keys, settings.revoke))
            print_line(f"Revoked the key of {settings.revoke} in {printable(own, 1000)}: the "
                       f"broker that reads this file refuses it")
        else:
            name = settings.name or settings.role
            path = settings.file or f"testcloud-{name}.key"
            replace(with_holder(keys, settings.role, name, path))
            print_line(f"Wrote {printable(path, 1000)}: copy it to the {settings.role}'s machine, "
                       f"as {KEY_FILE} beside the script")
    return 0


def make_cloud(path: str) -> None:
    """Write the key file of a new cloud. Raises SetupError."""
    broker = new_pair()
    pairs = {role: new_pair() for role in ROLE_OF.values()}
    write_keys(path, Keys(broker.public, broker.secret, pairs))
    print_line(f"Wrote {printable(path, 1000)}: the key of a new cloud, for machines that you "
               f"trust with all of it")


def without_holder(keys: Keys, name: str) -> Keys:
    """Return the keys without this holder's. Raises UsageError if there is no such holder."""
    rest = tuple(holder for holder in keys.holders if holder.name != name)
    if rest == keys.holders:
        names = ", ".join(printable(holder.name) for holder in keys.holders) or "nobody"
        raise UsageError(f"there is no key of {printable(name)} (any more), only of: {names}")
    return keys._replace(holders=rest)


def with_holder(keys: Keys, role: str, name: str, path: str) -> Keys:
    """Write a new holder's file; return the keys with it. Raises UsageError, SetupError."""
    if not re.fullmatch("[A-Za-z0-9_-]{1,100}", name) or not name.strip("-_"):
        raise UsageError("a name has letters, digits, - and _ only, up to 100 of them")
    if any(holder.name == name for holder in keys.holders):
        raise UsageError(f"there is a key of {name} already: choose another --name, or --revoke it")
    pair = new_pair()
    more = keys._replace(holders=(*keys.holders, KeyHolder(name, role, pair.public)))
    if len(more.to_json()) > MAX_KEY_FILE:
        raise UsageError(f"there are {len(keys.holders)} names, and no more fit: --revoke some")
    write_keys(path, Keys(keys.broker, pairs={role: pair}))
    return more


# === Working tree =====================================================================
#
# --sync sends a directory of the client along with its commands. A WorkingTree lists it: git
# tells what it ignores, and the patterns of --exclude and --include change that. The files are
# hashed, with a cache of hashes, and read when a worker asks for them. A file that is not as it
# was hashed is copied to a temporary file, so that one that always changes can be sent, too.

MANUAL["trees"] = """\
    $ ls tests/test_*.py | testcloud.py client -S alpha,: --sync pytest -q {}
    $ ls tests/test_*.py | testcloud.py client -S alpha,: --sync \\
          --setup 'python3 -m venv .venv && .venv/bin/pip install -q pytest -e .' \\
          --setup-once-for pyproject.toml --return 'reports/{#}.xml' \\
          '.venv/bin/pytest -q --junitxml=reports/{#}.xml {}'
    $ testcloud.py client --sync --exclude '*.mp4' --sync-list

With --sync, commands run in a workspace on their host. That is a copy of your working
tree as it is now, with changes that you have not committed. The second command makes a
.venv in each workspace first, and brings back a report of each test file. The third one
runs nothing: it prints the size and path of all that would go along.

--sync works alike with -S, with --via, in a standing cloud and with --local. There it
keeps the run apart from your editor.

The tree

@options client --sync --sync-list --sync-max --exclude --include

The tree is DIR, else the git work tree around the current directory, else the current
directory. If the word after --sync could be DIR or a command, write --sync=DIR or --sync
-- COMMAND.

Commands run in the same place of the workspace as you are in the tree. If you are outside
of DIR, they run at its top. --cwd is relative to that place. What is not in the tree must
be on the host: programs, a home, a database.

In a git work tree, all goes along that git does not ignore, also submodules and empty
directories. .git stays here: say --include .git for tools that ask git for a version.
Elsewhere all files go along. Then leave out a .venv, which belongs to this machine:
--exclude .venv

--exclude has the meaning of a line of .gitignore in the top directory, --include that of
a line with !. Both may be repeated. The last one that matches a path decides.

Modes and links are kept. Times are not, but their order is, so that make sees the same. A
link that leads out of the tree, a socket, and what you cannot read stay here, with a
notice.

If a file changes while it is sent, it goes as it was at one moment. Commands that begin
later run with that.

A larger tree than --sync-max is mostly a mistake, and refused.

Setup

@options client --setup --setup-once-for --fresh

The setup runs once in each workspace, before any other command. It runs in the directory
of the commands, with their --env and --shell. --timeout does not count for it.

It runs again when its text, that directory or the tree has changed. With --setup-once-for
it runs again when one of these files has changed, such as a lock file. Their paths are
relative to that directory, and the option may be repeated.

If the setup fails, its output is shown, and the host is out of this run. With no host
left the exit status is 3.

Files that come back

@options client --return --fail-on-missing

--return brings a file back to the same place here, also if the command failed. {}, {#}
and the like stand for the command's arguments, as in a template. The option may be
repeated. It takes no pattern (*), because commands share a workspace: a pattern would
match files of others. The path is relative to the directory of the command. If it leads
out of the tree, the command fails with exit code 126, and does not run.

A file comes back whole or not at all, with its permissions. It must be a regular file,
and no link is followed. --max-output does not limit it, and the result hash does not
cover it. With --retries it is the file of the try that is reported. If several commands
bring the same file, the last one stays.

A missing file is a notice. With --fail-on-missing it is a failure with exit code 1. After
a failure, a file that the command did not write counts as missing. If a file cannot be
written here, the run goes on and ends with exit status 3.

Files that come back do not change the tree of this run. But they would belong to the next
tree, for which the setup runs again: let git ignore them, or --exclude them.

A client that is killed (kill -9) may leave a file .testcloud-... in the tree. It never
goes along: remove it.

What crosses the network

Only what a host lacks is sent, once for each host. After a change of one file, that is
this file and the list of all files.

On each host, one command waits for the workspace, and takes no slot. The others start on
hosts that are ready; in the end this one starts, too.

If a step takes longer than a second, a notice says so: sending 12.3 of 80 MB to beta

A host may be unable to make a workspace: no room, a file name that it cannot have, a
setup that fails. testcloud names it with the reason, and it is out of this run. So are
workers of a version without --sync.

Workspaces stay on their hosts

@options client,worker --cache

They are in ~/.cache/testcloud/trees ($XDG_CACHE_HOME) of the host's user.

The next run brings its workspace up to date exactly. Files that are gone here go there,
and files that commands changed are as here again. What commands made stays: .venv,
node_modules, build outputs.

The commands of one run share a workspace, and runs at the same time get one each. The run
of a killed client counts until its lease is over (--client-lease). A killed run leaves
nothing that the next run takes for whole.

When all workspaces together are larger than --cache, or the disk is full, the oldest go.
One that is in use stays, and so does the last one. In a standing cloud, --cache is an
option of its workers. `testcloud.py status` shows how much they take.
"""

SYNC_MAX = 2 * 1024**3  # bytes of a tree; a larger one is mostly a forgotten build or data set
READ_BLOCK = 1024 * 1024  # bytes read at once; hashing needs no more memory
HASHERS = 4  # threads at most: hashlib lets others run, and one disk has not much more to give
RACY: int = 2 * 10**9  # ns; a younger file may change again within the resolution of its times
MAX_LEFT_OUT = 5  # files left out that are named; the others are counted
MAX_LINKS = 40  # that one link may lead through, as in Linux
REPOSITORY_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX",
                        "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_NAMESPACE")
Listed = Tuple[bytes, int, bool, bool]  # a directory: path, mode, ignored, brought back
Stamp = Tuple[int, int, int, int, int]  # of a file: mode, size, mtime and ctime in ns, inode


class StaleFiles(Exception):
    """These entries of a tree, by index, are not as they were hashed."""

    def __init__(self, indexes: List[int]) -> None:
        super().__init__(indexes)
        self.indexes = indexes


# --- patterns


class PathFilter(NamedTuple):
    """A pattern of --exclude or --include, with gitignore's meaning."""

    exclude: bool
    whole: bool  # compared with the whole path, because it has a /; else with the last name
    only_directories: bool  # it ends with /
    matches: Callable[[bytes], Any]


def path_filter(exclude: bool, pattern: str) -> PathFilter:
    if pattern[:1] == "!":
        exclude, pattern = not exclude, pattern[1:]
    glob = to_bytes(pattern)
    only_directories = glob.endswith(b"/")
    glob = glob[:-1] if only_directories else glob
    regex = GLOB_TOKEN.sub(regex_of, glob.removeprefix(b"/"))
    return PathFilter(exclude, b"/" in glob, only_directories,
                      re.compile(regex, re.DOTALL).fullmatch)


NEVER = b"(?!)"  # a regex that matches nothing, as git lets invalid patterns do
GLOB_TOKEN = re.compile(
    rb"((?:(?<=/)|\A)\*\*+(?:/|\Z|(?=\\/)))|\*+|\\.?|"
    rb"\[[!^]?(?:\[:[a-z]*:\]|\\.|[^\\])(?:\[:[a-z]*:\]|\\.|[^\]\\])*\]|.", re.DOTALL)
SET_ITEM = re.compile(rb"\[:([a-z]*):\]|\\?(.)(?:-\\?(.))?", re.DOTALL)


def regex_of(found: Any) -> bytes:
    """Return the regular expression of a part of a glob."""
    token: bytes = found[0]
    if found[1]:
        return b"(?:.*/)?" if token[-1:] == b"/" else b".*"
    if token[:1] == b"*":
        return b"[^/]*"
    if token == b"?":
        return b"[^/]"
    if token[:1] == b"[":
        return set_of_bytes(token[1:-1]) if len(token) > 1 else NEVER
    if token[:1] == b"\\":
        return re.escape(token[1:]) or NEVER
    return re.escape(token)


def set_of_bytes(items: bytes) -> bytes:
    """Return the regular expression of what is between [ and ] in a glob."""
    negated = items[:1] in (b"!", b"^")
    members: Set[int] = set()
    for kind, first, last in SET_ITEM.findall(items, int(negated)):
        if kind:
            is_member = getattr(str, "is" + kind.decode(), None)
            if is_member is None:
                return NEVER
            members.update(c for c in range(128) if is_member(chr(c)))
        else:
            members.update(first, range(first[0], (last or first)[0] + 1))
    listed = b"".join(re.escape(bytes([c])) for c in sorted(members - {ord("/")}))
    return b"[^/" + listed + b"]" if negated else b"[" + listed + b"]" if listed else NEVER


# --- the tree


def working_tree_top(given: str) -> str:
    """Return the directory of --sync; "" is the work tree of git around us, else the current
    directory. Raises UsageError."""
    if given and not os.path.isdir(given):
        raise UsageError(f"--sync {printable(given)}: there is no such directory")
    try:
        here = os.path.realpath(given or ".")
    except FileNotFoundError:
        raise UsageError("the current directory is gone: go to another one") from None
    top = here if given else git_top(here)
    home = os.path.expanduser("~")  # as it is if the user has none
    if not top and os.path.isabs(home) and os.path.join(
            os.path.realpath(home), "").startswith(os.path.join(here, "")):
        raise UsageError(f"--sync would take all of {printable(here)} along: go to a project's "
                         f"directory, or name one with --sync=DIR")
    return top or here


def git_top(path: str) -> str:
    """Return the top of the work tree around this real path, "" if there is none."""
    while not os.path.lexists(os.path.join(path, ".git")):
        if path == os.path.dirname(path):
            return ""
        path = os.path.dirname(path)
    return path


def origin_of(top: str) -> Fields:
    """Return the fields of a tree's head that tell whose directory it is."""
    machine = read_text("/etc/machine-id").strip() or host_name()
    name = re.sub("[^A-Za-z0-9._-]", "_", os.path.basename(top))[:40]
    return {"origin": hashlib.sha256(to_bytes(f"{os.getuid()}\n{machine}\n{top}")).hexdigest(),
            "name": name if name.strip(".") else "tree"}


def leads_out(path: str, links: Dict[str, str]) -> bool:
    """Return whether the link at this path leads out of the tree; links: all targets by path."""
    place: List[str] = path.split("/")[:-1]
    ahead, followed = links[path].split("/")[::-1], 1
    if not ahead[-1]:
        return True  # an absolute path
    while ahead:
        name = ahead.pop()
        if name == ".." and not place:
            return True
        if name == "..":
            place.pop()
        elif name not in ("", "."):
            place.append(name)
            target = links.get("/".join(place))
            if target is not None and followed < MAX_LINKS:
                if target[:1] == "/":
                    return True
                followed += 1
                place.pop()
                ahead += target.split("/")[::-1]
    return False


def stamp_of(status: os.stat_result) -> Stamp:
    return (status.st_mode & 0o777, status.st_size, status.st_mtime_ns, status.st_ctime_ns,
            status.st_ino)


class WorkingTree:
    """A directory of the client that goes along with its commands.

    One thread at a time may call it. `seen` and `hashed` tell another one how far look() is."""

    def __init__(self, top: str, filters: Iterable[Tuple[bool, str]] = (),
                 head: Optional[Fields] = None, limit: int = SYNC_MAX,
                 cache_path: str = "", setup_for: Sequence[str] = ()) -> None:
        self.top = os.path.realpath(top)
        self.start = os.path.join(os.fsencode(self.top), b"")  # of all paths
        self.filters = [path_filter(*given) for given in filters][::-1]  # the last match wins
        self.head = {**origin_of(self.top), **(head or {})}
        self.setup_for = setup_for  # paths of files: the setup runs again if they change
        self.limit = limit
        self.cache_path = cache_path
        self.seen = 0  # entries
        self.hashed = 0  # bytes
        self.notices: List[str] = []
        self.missing: Dict[str, str] = {}  # what is left out, and why
        self.entries: Dict[str, Entry] = {}
        self.hidden: Dict[str, Entry] = {}  # ignored directories: an --include may be below
        self.stamps: Dict[str, Stamp] = {}  # of files, when they were listed or hashed
        self.ignored: Set[bytes] = set()  # paths
        self.copies: Dict[str, int] = {}  # of files that changed: offset in the copy
        self.copy: Optional[IO[bytes]] = None
        self.proven: Set[str] = set()  # files that were hashed a second time
        self.tree = make_tree(self.head, [])

    @property
    def left_out(self) -> List[str]:
        """Lines for people: what does not go along."""
        lines = [f"{printable(path, 200)} is left out: {why}"
                 for path, why in itertools.islice(self.missing.items(), MAX_LEFT_OUT)]
        more = len(self.missing) - len(lines)
        rest = [f"{plural(more, 'other')} cannot go along, either"] if more else []
        return [*self.notices, *lines, *rest]

    def look(self) -> Tree:
        """List and hash the files. Raises UsageError for a tree that is too large, SetupError."""
        self.scan()
        self.check_size()
        self.hash_files()
        return self.make()

    def make(self) -> Tree:
        """Return the tree of the entries. Raises UsageError."""
        if self.setup_for:
            hashed = hashlib.sha256()
            for path in self.setup_for:
                if path not in self.entries:
                    cwd = self.head.get("cwd") or "."
                    meant = os.path.relpath(path, cwd)  # it was written as from the top
                    hint = f": write {os.path.relpath(meant, cwd)}" if meant in self.entries else ""
                    raise UsageError(f"--setup-once-for {printable(path)}: there is no such file "
                                     f"in the tree of {printable(self.top)}{printable(hint)}")
                hashed.update(to_bytes(f"{path}\n{self.entries[path].content}\n"))
            self.head["setup_for"] = hashed.hexdigest()
        self.tree = make_tree(self.head, self.entries.values())
        return self.tree

    def check_size(self) -> None:
        """Raise UsageError if there is too much to send."""
        size = sum(entry.size for entry in self.entries.values())
        if size <= self.limit and len(self.entries) <= MAX_ENTRIES:
            return
        sizes: Counter[str] = Counter()
        for entry in self.entries.values():
            sizes[entry.path.partition("/")[0]] += entry.size
        largest = ", ".join(f"{printable(name)} ({amount(part)})"
                            for name, part in sizes.most_common(3))
        files = sum(entry.kind == FILE for entry in self.entries.values())
        what = f"{printable(self.top)} has {amount(size)} in {plural(files, 'file')}"
        if size <= self.limit:
            raise UsageError(f"{what} or more, and {MAX_ENTRIES} may go along: leave some out with "
                             f"--exclude (the largest: {largest})")
        raise UsageError(f"{what}, the largest are {largest}: leave out what commands do not need "
                         f"with --exclude, or allow it with --sync-max {size // 1024**3 + 1}G")

    # --- listing

    def scan(self) -> None:
        """List the tree without the contents of files. Raises SetupError."""
        ours = os.path.realpath(cache_path("")) if cache_path("") else ""
        if ours.startswith(self.top + "/"):  # workspaces in the tree would take each other along
            self.ignored.add(to_bytes(os.path.relpath(ours, self.top)))
        top = git_top(self.top)
        if top:
            self.ask_git(top, to_text(os.fsencode(os.path.relpath(self.top, top))))
        links: Dict[str, str] = {}
        stack: List[Listed] = [(b"", 0, False, False)]
        while stack and len(self.entries) <= MAX_ENTRIES:
            stack += self.scan_directory(*stack.pop(), links)
        venvs = sorted(path[:-len("pyvenv.cfg")] for path in self.entries
                       if path.endswith("/pyvenv.cfg"))
        self.notices += [f"{printable(venv[:-1], 200)} goes along, but no venv works elsewhere: "
                         f"let git ignore it, or say --exclude /{printable(venv, 200)}"
                         for venv in venvs]
        for name in links:
            if leads_out(name, links):
                del self.entries[name]
                if name.startswith(tuple(venvs)):
                    continue
                self.missing[name] = "this link leads out of the tree"

    def scan_directory(self, path: bytes, mode: int, ignored: bool, included: bool,
                       links: Dict[str, str]) -> List[Listed]:
        """Add a directory and the files in it; note its links. Return its directories. Raises
        SetupError."""
        try:
            with os.scandir(self.start + path) as found:
                listed = [*found]
        except OSError as error:
            if not path:
                raise SetupError(f"cannot read {printable(self.top)}: {error.strerror}") from None
            if error.errno != errno.ENOENT:
                self.leave_out(to_text(path), error)
            return []
        if path:
            self.add(Entry(to_text(path), DIRECTORY, mode, 0, "", 0), ignored)
            if not ignored and not included and any(one.name == b".git" for one in listed):
                self.ask_git(os.path.join(self.top, os.fsdecode(path)), "", to_text(path) + "/")
        self.seen += len(listed)
        directories: List[Listed] = []
        start = path + b"/" * bool(path)
        for one in listed:
            inner = start + one.name
            try:
                below = self.state(inner, one.is_dir(follow_symlinks=False), ignored, included)
                if below is None:
                    continue
                status = one.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    directories.append((inner, stamp_of(status)[0], *below))
                elif not below[0]:
                    self.add_file(inner, status, links)
            except FileNotFoundError:
                pass
            except OSError as error:  # such as in a directory without the x of its mode
                self.leave_out(to_text(inner), error)
        return directories

    def state(self, path: bytes, is_directory: bool, ignored: bool,
              included: bool) -> Optional[Tuple[bool, bool]]:
        """Return whether this path is ignored, and whether --include brought it back; None if
        nothing below it can go along. The two flags are those of its directory."""
        name = path.rpartition(b"/")[2]
        if name == b".git" or name.startswith(UNFINISHED.encode()):
            ignored, included = True, False  # unless it is included by name
        ignored = ignored or path in self.ignored
        for rule in self.filters:
            if (is_directory or not rule.only_directories) and rule.matches(
                    path if rule.whole else name):
                return None if rule.exclude else (False, included or ignored)
        if ignored and not (is_directory and any(not rule.exclude for rule in self.filters)):
            return None
        return ignored, included

    def add(self, entry: Entry, ignored: bool = False) -> None:
        if ignored:
            self.hidden[entry.path] = entry
            return
        self.entries[entry.path] = entry
        parent = entry.path.rpartition("/")[0]
        while parent in self.hidden:
            self.entries[parent] = self.hidden.pop(parent)
            parent = parent.rpartition("/")[0]

    def add_file(self, path: bytes, status: os.stat_result, links: Dict[str, str]) -> None:
        name, stamp = to_text(path), stamp_of(status)
        if stat.S_ISREG(status.st_mode):
            self.add(Entry(name, FILE, stamp[0], stamp[1], "", stamp[2]))
            self.stamps[name] = stamp
        elif stat.S_ISLNK(status.st_mode):
            links[name] = to_text(os.readlink(self.full_path(name)))
            self.add(Entry(name, LINK, 0, 0, links[name], 0))
        else:
            self.missing[name] = "it is no file, directory or link"

    def leave_out(self, path: str, error: OSError) -> None:
        self.entries.pop(path, None)
        self.stamps.pop(path, None)
        self.missing[path] = (error.strerror or str(error)).lower()

    def full_path(self, path: str) -> bytes:
        return self.start + to_bytes(path)

    def leave_out_all(self, wanted: int, why: int) -> None:
        """Leave out all files without this access; why: its error."""
        for path in [*self.stamps]:
            if not os.access(self.full_path(path), wanted):
                self.leave_out(path, OSError(why, os.strerror(why)))

    def ask_git(self, root: str, inside: str, prefix: str = "") -> None:
        """Note what git ignores in this work tree, or `inside` it; prefix: of our paths for
        git's. Raises SetupError."""
        # its own repository only; and a repository from elsewhere could name a program to start
        environ = {name: value for name, value in os.environ.items()
                   if name not in REPOSITORY_VARIABLES}
        environ.update(GIT_OPTIONAL_LOCKS="0", LC_ALL="C",
                       GIT_CEILING_DIRECTORIES=os.path.dirname(root))
        inside = "" if inside == "." else inside + "/" * bool(inside)
        words = ["git", "-c", "core.fsmonitor=false", "--literal-pathspecs", "status", "-z",
                 "--porcelain", "--ignored=matching", "-uall", "--no-renames",
                 "--ignore-submodules=all", *(["--", inside] if inside else [])]
        import subprocess
        try:
            done = subprocess.run(words, cwd=root, env=environ,
                                  stdin=subprocess.DEVNULL, capture_output=True)
        except OSError as error:
            self.notices.append(f"cannot run git ({error.strerror}): files go along that git would "
                                f"ignore in {printable(root)}")
            return
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").split("\n")
            fatal = [*filter(lambda line: line.startswith("fatal:"), lines), "fatal: no reason"][0]
            fix = [line.strip() for line in lines if line.startswith("\tgit config")]
            why = ": fix it with ".join([fatal, *fix[-1:]])
            if "not a git repository" not in why and "invalid gitfile" not in why:
                raise SetupError(f"git cannot list {printable(root)}: {printable(why, 300)}")
            if not prefix:  # else the work tree around it has told about its files
                self.notices.append(f"{printable(root)} has a .git that is no repository: all its "
                                    f"files go along")
            return
        for row in done.stdout.split(b"\0"):
            path = to_text(row[3:]).rstrip("/")
            if row[:2] == b"!!":  # it may be the top itself, named by the user: "" ignores nothing
                self.ignored.add(to_bytes(prefix + path[len(inside):]))

    # --- hashing

    def hash_files(self) -> None:
        """Fill in the contents of the entries, from the cache or from the files."""
        now = time.time_ns()
        known = read_hashes(self.cache_path)
        unknown = []
        for path, stamp in self.stamps.items():
            row = known.get(path)
            if row and row[:-1] == [*stamp]:
                self.entries[path] = Entry(path, FILE, stamp[0], stamp[1], row[-1], stamp[2])
                self.hashed += stamp[1]
            else:
                unknown.append(path)
        work = iter(unknown)
        threads = [threading.Thread(target=self.hash_some, args=(work,), daemon=True)
                   for _ in range(min(HASHERS, usable_cpus(), len(unknown)) - 1)]
        for thread in threads:
            thread.start()
        self.hash_some(work)
        for thread in threads:
            thread.join()
        if unknown or len(known) > len(self.stamps):
            self.write_hashes(now)

    def hash_some(self, work: Iterator[str]) -> None:
        for path in work:  # threads may share a list's iterator
            try:
                self.hash_file(path)
            except FileNotFoundError:  # deleted just now
                del self.entries[path], self.stamps[path]
            except OSError as error:
                self.leave_out(path, error)

    def hash_file(self, path: str, copy: Optional[IO[bytes]] = None) -> None:
        """Hash a file as it is now, and copy it. Raises OSError."""
        with open_regular(self.full_path(path)) as (file, status):
            hashed, size = hashlib.sha256(), 0
            room = min(READ_BLOCK, status.st_size + 1)  # one more: a short block is the last
            block = bytes(room)
            while len(block) == room:
                block = os.read(file, room)
                hashed.update(block)
                size += len(block)
                self.hashed += len(block)
                if copy:
                    copy.write(block)
        mode, _, mtime, *_ = self.stamps[path] = stamp_of(status)
        self.entries[path] = Entry(path, FILE, mode, size, hashed.hexdigest(), mtime)

    def write_hashes(self, now: int) -> None:
        """Remember the hashes of files that were old enough at this time."""
        rows = {path: [*stamp, self.entries[path].content] for path, stamp in self.stamps.items()
                if max(stamp[2:4]) < now - RACY}
        write_cache(self.cache_path, dump(rows))

    # --- reading

    def read(self, tree: Tree, spans: Iterable[Span], again: bool = False) -> bytes:
        """Return the bytes of these spans of the tree's stream. With `again`, hash the files
        anew, because a worker got wrong bytes. Raises StaleFiles."""
        parts: List[bytes] = []
        stale: Set[int] = set()
        for start, size in spans:
            parts.append(tree.manifest[start:start + size])
            for index, offset, length in tree.pieces_of([(start, size)]):
                entry = tree.entries[index]
                part = self.read_part(entry, offset, length, again and index not in stale)
                parts.append(part)
                if len(part) != length:
                    stale.add(index)
        if stale:
            raise StaleFiles(sorted(stale))
        return b"".join(parts)

    def read_part(self, entry: Entry, offset: int, size: int, again: bool) -> bytes:
        """Return a part of a file's content; b"" if the file is not as it was hashed."""
        path = entry.path
        if self.entries.get(path) != entry:
            return b""
        if path in self.copies and self.copy:
            return os.pread(self.copy.fileno(), size, self.copies[path] + offset)
        with contextlib.suppress(OSError):
            if again and path not in self.proven:
                self.proven.add(path)  # once: a worker could ask for it again and again
                self.hash_file(path)
                if self.entries[path] != entry:
                    return b""
            with open_regular(self.full_path(path)) as (file, status):
                part = os.pread(file, size, offset)
                if stamp_of(status) == self.stamps[path] == stamp_of(os.fstat(file)):
                    return part
        return b""

    def refresh(self, indexes: Iterable[int]) -> Tree:
        """Return the tree as it is now, after StaleFiles. Files that are not there any more leave
        it, and the others are served from copies from now on. Raises SetupError."""
        if not os.path.isdir(self.top):
            raise SetupError(f"{printable(self.top)} is gone: it was moved or removed while it was "
                             f"sent")
        now, gone = time.time_ns(), False
        for index in indexes:
            hashed = self.tree.entries[index]
            path = hashed.path
            self.copies.pop(path, None)
            try:
                self.copy_file(hashed)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise SetupError(f"cannot copy {printable(path)}, which changes, to "
                                     f"{tempfile.gettempdir()}: {error.strerror}") from None
                gone = gone or error.errno == errno.ENOENT
                self.leave_out(path, error)
        if gone:  # mostly with others: each found by its own would send the commands back again
            self.leave_out_all(os.F_OK, errno.ENOENT)
        self.write_hashes(now)
        return self.make()

    def copy_file(self, hashed: Entry) -> None:
        """Hash a file anew, and serve a copy of it from now on. Raises OSError."""
        self.copy = self.copy or tempfile.TemporaryFile()
        start = self.copy.seek(0, os.SEEK_END)
        self.hash_file(hashed.path, self.copy)
        self.copy.flush()
        self.copies[hashed.path] = start
        if self.entries[hashed.path]._replace(mtime=hashed.mtime) == hashed:
            self.entries[hashed.path] = hashed  # so that the tree keeps its id

    def keep(self, path: str) -> None:
        """Keep a copy of a file that --return is about to replace: the tree stays as it is."""
        entry = self.entries.get(path)
        if entry is not None and entry.kind == FILE and path not in self.copies:
            with contextlib.suppress(OSError):
                self.copy_file(entry)


def read_hashes(path: str) -> Dict[str, List[Any]]:
    """Return stamps and hashes by path; {} if the file cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            found: Dict[str, List[Any]] = json.load(file)
        return found if all(type(row) is list and len(row) == 6 and tree_name(row[-1])
                            for row in found.values()) else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


# === Command templates ================================================================
#
# A client's arguments are TEMPLATE [::: ARGUMENTS]..., as in GNU parallel. Rows of arguments
# come from stdin, from files or from the command line. Each row fills the template's
# placeholders, quoted for the shell, and makes a command. A template that would do something
# else than it seems to say is refused, above all one with a placeholder within quotes. With
# --jsonl a row is an object, with fields of the protocol's command and without a template.

MANUAL["commands"] = """\
    $ testcloud.py client --local < commands
    $ ls tests/test_*.py | testcloud.py client pytest -q {}
    $ testcloud.py client 'convert {} {.}.jpg && rm {}' ::: *.png
    $ testcloud.py client --env A=1 make {1} CC={2} ::: debug release ::: gcc clang
    $ find . -type f -print0 | testcloud.py client -0 gzip
    $ pytest --collect-only -q --disable-warnings > list && \\
          grep :: list | testcloud.py client -n 50 pytest -q

In the first line each line of the input is a command. The others have a template, which
makes a command of each line (see `help environment` for what a command finds).

Input and template

@options client TEMPLATE --null --max-args --colsep --dry-run

Blank lines are skipped, and so are a byte order mark and a CR at the end. The first
command starts before the last line has arrived; with -n that may be different, as told
below. A template has these places, as in GNU parallel:

    {}          the line, quoted for the shell; with -n all lines of the command
    {.}         without extension
    {/}         without directory
    {//}        its directory
    {/.}        without directory and extension
    {1}, {2/}   one column (--colsep), one line (-n) or one source
    {#}         the number of the command, from 1
    {''1}       the text {1} itself; in double quotes: {""1}
    ::: A B     these arguments, instead of the input
    :::: F G    the lines of these files; - is the input
    :::+ A B    linked to the arguments before, one to one; files: ::::+

A template without a placeholder gets the line appended. {#} alone is one: then no command
has its line, which the client tells. Several sources are combined in
all ways, but for linked ones.

The words of a template are joined with spaces, and the shell reads the result. So a word
with a space in it is refused beside others. So is {} in quotes, because the line is
quoted already. The message says how to write it. Options of testcloud stand before the
template.

A command should take some tenths of a second at least, because each one starts its
program anew. So take whole files of tests, or some dozens of single tests with -n.

Several lines for each command

In the first run with -n N, each command has N lines, or fewer if it would be longer than
120 KiB. The client divides the time of a command among its lines, and remembers that if
any command took 50 ms. In later runs with the same template in the same directory, N is a
mean: a command has few slow lines or many fast ones. So each command takes about as long
as the others. The longest start first. After some runs the times of lines are better.

The lines of a command are neighbours in the input, because they may need the same
fixtures. A line that takes longer than the other commands has a command of its own.
Choose N so that there are several commands for each slot.

The file of a line is the text before its first "::", as in tests/test_a.py::test_b. Each
command with lines of a file takes the time of the file's imports and fixtures. The client
learns these times: a later run cuts a slow file into a few more commands than before. If
the file itself takes long, the next runs leave it whole. Else they cut it further.

The client must know all lines for this. It waits up to 5 s for the end of the input. If
there are more lines to come then, each command has N lines. The same holds with --serial
and --lock, with placeholders other than {} and {#}, and if these touch each other.

JSON

@options client --jsonl

    {"cmd": "pytest -q tests/unit", "name": "unit"}
    {"cmd": "make -j$TESTCLOUD_SLOTS", "slots": 4, "timeout": 600}
    {"cmd": "pytest -q tests/db", "lock": "db", "env": {"DB": "test"}}
    {"cmd": "npm test", "cwd": "web", "needs": ["node"]}
    {"cmd": "./report", "lock": "", "shell": "bash"}

Each line of the input is an object. Its fields replace options, for its command alone:

    cmd       the command
    name      what reports call it; the joblog keeps the text of the command
    slots     --slots-each
    lock      --lock; "" is the run's own lock (--serial)
    needs     --need: a list of labels
    cwd       --cwd
    env       --env: an object; it adds to the option
    shell     --shell
    timeout   --timeout, in seconds
    delay     --delay, in seconds
    limit     --max-output, in bytes
    return    --return: a list of files

A line with an unknown field or a wrong type is a failed command, with the number of the
line. The others run. --dry-run prints objects that have what the options say, too.

Slots

@options client --slots-each

A command may take several slots of one worker (it is wide). A worker with fewer slots
never gets it. If no worker has enough slots, the client says so within a second. With
--local the command fails at once.

A wide command goes before the narrow ones of its client. If too few slots are free, it
reserves the next free slots of one worker. Others use these meanwhile only if they will
probably end before the commands that it waits for. The guess is that those go on for as
long as they have run. So a wide command waits for what ran there before it, and for one
more command in each slot.

Locks

@options client --lock --serial --delay

Of all commands in the cloud with a lock, one runs at a time, whosever it is. --serial is
a lock of this run alone: other clients' commands go on. It also keeps the order of the
input: the next command starts when this one has been reported, with all its retries. But
it may run on another host, in another copy of the tree (--sync). With --local and -S each
run has its own broker, so --lock counts in this run only.

A lock is free when its command has ended, not when it is only told to stop. It is also
free when its worker is given up. If that worker is only cut off, the command may still
run for a while.

A broker that has just started gives no lock for 10 s (--worker-expiry), because workers
that have it may come back. For --serial that counts only if the broker restarted during
the run. In a chain the topmost broker gives the locks.

Brokers and workers of an older version know no slots, locks and delays. Such a broker
ends the run with status 3. Such a worker gets no wide command and no command with a lock
of the cloud. The client names it.
"""

MANUAL["pytest"] = """\
    $ find tests -name 'test_*.py' | testcloud.py client -S alpha,: --sync \\
          'pytest -q {}; exit $(($? == 5 ? 0 : $?))'
    $ pytest --collect-only -q --disable-warnings > tests.txt && \\
          grep :: tests.txt | testcloud.py client -S alpha,: --sync -n 50 pytest -q

The first command runs each file. pytest ends with 5 if it finds no test in a file, or if
a file skips itself: here that is a pass. The second command runs batches of 50 tests. See
`help reports` for one JUnit report of all.

Files or batches

Each command starts pytest and imports your code anew. So let it take some ten seconds:
choose the N of -n by that. From the second run on, batches take about equally long. A file
that skips itself has no name in the list, and pytest also takes files named *_test.py.

Make the list of tests in pytest's rootdir, for their names begin there. If pytest cannot
import a file, its tests are not in the list. But pytest says why there and fails, so that
after && nothing runs. --disable-warnings keeps names in warnings out of the list. If your
addopts have -v or -q, write --verbosity=-1 instead of -q.

Each command is a process of its own. A test that needs what earlier tests did may fail
there. `pytest FILE` alone fails in the same way. xdist's worker_id is master in all of
them: take $TESTCLOUD_SLOT.

With --retries the whole command runs again, and its last try counts for all of its tests.
If a test had passed before, its failure says where. So let a command with flaky tests be
short. Of a command that hangs (--timeout), -v shows
which test did.

What a host needs

It needs pytest and what your code imports. --setup installs them in a .venv (see `help
trees`). Without it, name where they are: --env PATH=/opt/venv/bin:/usr/bin:/bin

If your code is in src, and --setup does not install it, say --env PYTHONPATH=src. So do
with : and --local --sync, if your own python has it by `pip install -e`: that is not the
copy, and has no coverage.

Tests that disturb each other

If tests use the same port, give each host one slot: -S 1/alpha,1/beta. If they use the
same database, give them a lock. Here those that have the word db:

    $ { grep -L db tests/test_*.py | sed 's/.*/{"cmd": "pytest -q &"}/'; \\
        grep -l db tests/test_*.py | sed 's/.*/{"cmd": "pytest -q &", "lock": "db"}/'; } | \\
        testcloud.py client --local --jsonl

On Linux, each command can have a network of its own, with only localhost in it:

    $ ls tests/test_*.py | testcloud.py client --local \\
          "unshare -rn sh -c 'ip link set lo up; pytest -q \\$0' {}"

Coverage

    $ ls tests/test_*.py | testcloud.py client --local --sync --return '.coverage.{#}' \\
          'COVERAGE_FILE=.coverage.{#} coverage run -m pytest -q {}'
    $ coverage combine && coverage report

Set relative_files = true for coverage, because each copy of the tree has another path.
Do not set parallel = true: it changes the names of the files. With pytest-cov:

    $ ls tests/test_*.py | testcloud.py client --local --sync --return '.coverage.{#}' \\
          'COVERAGE_FILE=.coverage.{#} pytest -q --cov --cov-report= {}'

If tests start processes that are measured, too, combine their files in the command:

    $ ls tests/test_*.py | testcloud.py client --local --sync --return '.coverage.{#}' \\
          'export COVERAGE_FILE=.coverage.{#}; coverage run -p -m pytest -q {}; \\
          s=$?; coverage combine -q; exit $s'

Let git ignore .coverage and .coverage.*, but not .coveragerc.
"""

Arguments = Tuple[str, ...]  # of one command: a line of input, its columns, or several lines
SOURCE_MARKS = (":::", ":::+", "::::", "::::+")  # arguments or files; + links to those before
# "#", or the number of an argument (none: all) and a modifier; not after an unescaped $
PLACEHOLDER = re.compile(r"(?<!(?<!\$)\$)\{(?:#|([1-9]\d*)?(\.|//?|/\.)?)\}")
PARALLEL_ONLY = r"(?<!(?<!\$)\$)\{(?:-?\d*[./+]*|0?%|##|0#|=.*?=)\}"  # GNU parallel's others
MODIFIERS: Dict[str, Callable[[str], str]] = {
    "": str, "/": os.path.basename, ".": lambda path: re.sub(r"\.[^/.]*$", "", path),
    "//": lambda path: os.path.dirname(path.rstrip("/")) or "/" * path.startswith("/") or ".",
    "/.": lambda path: MODIFIERS["."](os.path.basename(path))}


# --- templates


def fill_template(template: str, arguments: Arguments, seq: int) -> str:
    """Return the command for these arguments; seq is its number."""
    if not template:
        return " ".join(arguments)
    if PLACEHOLDER.search(template):
        return fill_placeholders(template, arguments, seq, shlex.quote)
    return f"{template} {' '.join(map(shlex.quote, arguments))}"


def fill_placeholders(template: str, arguments: Arguments, seq: int,
                      quote: Callable[[str], str] = str) -> str:
    def fill(place: re.Match[str]) -> str:
        if place[0] == "{#}":
            return str(seq)
        chosen = arguments[int(place[1]) - 1:int(place[1])] if place[1] else arguments
        return " ".join(quote(MODIFIERS[place[2] or ""](text)) for text in chosen)
    return PLACEHOLDER.sub(fill, template)


def check_template(words: List[str], most: float) -> str:
    """Return the template that these words make, for up to `most` arguments. Raises UsageError."""
    template = " ".join(words)
    if len(words) > 1 and any(not word or re.search(r"\s", word) for word in words):
        late = [word for word in words if word[:1] == "-" and re.search(r"\s", words[0])]
        raise UsageError("a word of the template has a space in it or is empty: quote the whole "
                         "template, with {} outside of its inner quotes, as in: "
                         "'rm -rf \"a b\"/{}'"
                         + (f"; options of ours stand before it: {late[0]}" if late else ""))
    given = PLACEHOLDER.search(template)
    for place, context in placeholders(template if given else template + " {}"):
        wrong = misuse(place, context, most)
        if wrong and place == "{}" and not given:
            raise UsageError(f"without a {{}} the line comes after the template, and stands "
                             f"{CONTEXTS[context]} there: write {{}} where it goes")
        if wrong:
            quote = '"' if context == '"' else "'"
            raise UsageError(
                f"{place} {wrong}; to pass it on as it is, write {{{2 * quote}{place[1:]}")
    return template


def check_returns(option: str, files: List[str], most: float) -> None:
    """Raise UsageError if an option's file is a pattern, or commands cannot fill a placeholder."""
    for file in files:
        if os.path.isabs(file):
            raise UsageError(f"{option}: {printable(file, 300)} begins with /: write it as from "
                             f"the directory of the command, as in reports/{{#}}.xml")
        if "*" in file:  # commands of a host share a workspace: it may match files of others
            raise UsageError(f"{option}: {printable(file, 300)} would be a pattern: name one file "
                             f"for each command, with {{#}} for its number, as in "
                             f"{printable(file.replace('*', '{#}'), 300)}")
    for place in re.finditer(f"{PARALLEL_ONLY}|{PLACEHOLDER.pattern}", "\n".join(files)):
        wrong = misuse(place[0], "", most)
        if wrong:
            raise UsageError(f"{option}: {place[0]} {wrong}")


def misuse(place: str, context: str, most: float) -> str:
    """Return why a placeholder cannot be meant in this context; "" if it can."""
    known = PLACEHOLDER.fullmatch(place)
    if not known:
        return ("is known only where it runs: there it is $TESTCLOUD_SLOT" if "%" in place else
                "has no meaning here")
    if int(known[1] or 0) > most:
        return "is an argument that no command has (see --colsep, -n, and :::)"
    if context and place != "{#}":
        return (f"stands {CONTEXTS[context]}, and is quoted itself: write it outside of that, as "
                f"in: cat \"my dir\"/{{}}")
    return ""


# contexts in which a quoted argument cannot be right, by what begins them; "$" is for $'...'
CONTEXTS = {"'": "in quotes", '"': "in quotes", "$": "in quotes", "`": "in `...`",
            "\\": "after a backslash", "<": "in a here-document", "#": "in a comment"}
# "" is outside of all, "(" in parentheses: there, and in $(...), quoting begins anew
CONTEXT_ENDS = {"'": "'", "$": "'", '"': '"', "`": "`", "(": ")", "#": "\n"}
CONTEXT_STARTS = {"": "' \" ` ( $( $' #", "(": "' \" ` ( $( $' #", "`": "' \" ( $( $'", '"': "` $("}
# not compiled: only a client with a template needs it, once
SHELL_TOKENS = (rf"{PARALLEL_ONLY}|{PLACEHOLDER.pattern}|"
                r"""\\(?={)|\\.|\$[('$]|[()'"`\n]|(?<![^\s;&|()])#""")


def placeholders(template: str) -> Iterator[Tuple[str, str]]:
    """Yield placeholders, ours and GNU parallel's, each with its key in CONTEXTS, or ""."""
    contexts, token = [""], ""
    here = re.search(r"(?<!<)<<(?!<)[^\n]*\n", template)  # a here-document, but not <<<
    for found in re.finditer(SHELL_TOKENS, template, re.S):
        before, token, context = token, found[0], contexts[-1]
        if token[0] == "{":
            in_here = here is not None and found.end() > here.end()
            yield token, context.strip("(") or "\\" * (before == "\\") or "<" * in_here
            continue
        if context in ("'", "#") or context == "$" and token == "$'":
            token = token[-1]  # no escapes there
        if token == CONTEXT_ENDS.get(context):
            contexts.pop()
        elif token in CONTEXT_STARTS.get(context, "").split():
            contexts.append("$" if token == "$'" else token[-1])


# --- arguments and input


def split_sources(words: List[str]) -> Tuple[List[str], List[Tuple[str, List[str]]]]:
    """Return a template's words and the sources after it: each one's mark and words."""
    marks = [at for at, word in enumerate(words) if word in SOURCE_MARKS]
    ends = [*marks[1:], len(words)]
    return words[:marks[0]] if marks else words, [
        (words[at], words[at + 1:end]) for at, end in zip(marks, ends)]


def columns(sources: List[Tuple[str, List[str]]]) -> int:
    """Return how many arguments these sources make for a command."""
    return sum(len(files) if mark.startswith("::::") else 1 for mark, files in sources)


def joined(rows: Iterable[Iterable[Arguments]]) -> Iterator[Arguments]:
    """Make one row of several, each time."""
    return (tuple(itertools.chain.from_iterable(row)) for row in rows)


def read_arguments(settings: argparse.Namespace) -> Iterator[Arguments]:
    """Return rows of arguments, read lazily. Raises SetupError, and on reading OSError."""
    groups: List[List[Iterable[Arguments]]] = []  # of sources that are linked
    for mark, words in settings.sources or [("::::", ["-"])]:
        lists: List[Iterable[str]] = [words]
        if mark.startswith("::::"):
            lists = [read_lines(open_input(path), settings.null) for path in words]
            # else a blank line is an argument, too, or counts in the numbers of lines
            if len(settings.sources) < 2 > len(lists) and not settings.jsonl:
                lists = [filter(str.strip, lists[0])]
        for lines in lists:
            split = settings.colsep.split if settings.colsep else lambda line: [line]
            rows: Iterable[Arguments] = map(tuple, map(split, lines))
            if mark.endswith("+") and groups:
                groups[-1].append(rows)
            else:
                groups.append([rows])
    linked = [joined(zip(*group)) for group in groups]
    found = linked[0] if len(linked) == 1 else joined(itertools.product(*linked))
    all_rows = settings.template or settings.jsonl
    return (row for row in found if all_rows or "".join(row).strip())


def open_input(path: str) -> int:
    """Return a descriptor for a file of arguments; - is stdin. Raises SetupError."""
    with file_errors("read", path):
        return 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def read_lines(file: int, null: bool) -> Iterator[str]:
    """Yield the lines of a descriptor; with null, they end with NUL. Raises OSError."""
    # not sys.stdin: its lock, held by a thread, would abort the exit of Python
    mark = codecs.BOM_UTF8
    with io.BufferedReader(BlockingFile(file, "r", closefd=file != 0)) as stream:
        for line in bounded_lines(stream, b"\0" if null else b"\n"):
            line, mark = line.removeprefix(mark), b""
            yield to_text(line if null else line.rstrip(b"\r"))


def bounded_lines(file: IO[bytes], end: bytes) -> Iterator[bytes]:
    """Yield lines, each cut one byte after MAX_COMMAND: it is too long for a command anyway."""
    rest = b""
    for part in iter(lambda: file.read1(65536), b""):  # type: ignore[attr-defined]
        *lines, last = (rest + part).split(end)
        yield from (line[:MAX_COMMAND + 1] for line in lines)
        rest = last[:MAX_COMMAND + 1]
    if rest:
        yield rest


# --- commands

# fields that a line of --jsonl may have; our client sets the others
LINE_FIELDS: Dict[str, Check] = {
    "cmd": text, "name": described("a text, and not empty", lambda value: text(value) and value),
    **{name: MESSAGES[COMMAND].may_have[name] for name in (
        "cwd", "env", "timeout", "slots", "lock", "delay", "shell", "limit", "return")},
    "needs": list_of("labels (of ASCII characters, without spaces)", LABEL[1])}


def parse_line(line: str) -> Fields:
    """Return the fields in a line of --jsonl. Raises ProtocolError."""
    if len(to_bytes(line)) > MAX_COMMAND:
        raise ProtocolError(TOO_LONG)
    try:
        fields = load(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"it is no JSON: {str(error).replace('line 1 ', '')[:80]}") from None
    if not isinstance(fields, dict) or "cmd" not in fields:
        raise ProtocolError('it is no JSON object with a "cmd"')
    for name, value in fields.items():
        if name not in LINE_FIELDS:
            raise ProtocolError(f'unknown field "{printable(name, 50)}"; there are: '
                                + ", ".join(LINE_FIELDS))
        if not LINE_FIELDS[name](value):
            raise ProtocolError(f'"{name}" must be {LINE_FIELDS[name].__doc__}')
    if not fields["cmd"].strip():
        raise ProtocolError('"cmd" is empty')
    return fields


class InputCommand(NamedTuple):
    """A command as the input and the options have it."""

    cmd: str
    line: str  # the row of the input; with --jsonl the name, or else the command
    cwd: str
    returns: Sequence[str]
    own: Fields = {}  # see Command
    wrong: str = ""  # why it cannot be run


class CommandMaker:
    """Makes a command of each row of the input."""

    def __init__(self, settings: argparse.Namespace, options: RunOptions) -> None:
        self.settings = settings
        self.options = options
        self.top = None if settings.sync is None else working_tree_top(settings.sync)
        self.cwd = self.place(settings.cwd)

    def place(self, given: Optional[str]) -> str:
        """Return the directory of commands with this --cwd. Raises UsageError."""
        return working_directory(given) if self.top is None else directory_within(self.top, given)

    def make(self, row: Arguments, seq: int) -> Optional[InputCommand]:
        """Return the command of this row; seq is its number. None: it is a blank line."""
        if self.settings.jsonl:
            if not row[0].strip():
                return None
            try:
                return self.make_of_object(row[0], seq)
            except (ProtocolError, UsageError) as error:
                return InputCommand(row[0], row[0], self.cwd, (), wrong=f"line {seq}: {error}")
        return InputCommand(fill_template(self.settings.template, row, seq), " ".join(row),
                            self.cwd, self.returns(row, seq))

    def make_of_object(self, line: str, seq: int) -> InputCommand:
        own = parse_line(line)
        cmd: str = own.pop("cmd")
        title: str = own.get("name", cmd)
        cwd, returns = own.pop("cwd", None), own.pop("return", None)
        if returns and self.settings.sync is None:
            raise ProtocolError('"return" needs --sync')
        if "env" in own:
            own["env"] = {**self.options.env, **own["env"]}
        return InputCommand(cmd, title, self.cwd if cwd is None else self.place(cwd),
                            self.returns((title,), seq, returns), own)

    def line_of(self, command: InputCommand) -> bytes:
        """Return a line of --jsonl that makes this command without the options."""
        fields = {"cmd": command.cmd, "cwd": os.path.join(*filter(None, (self.top, command.cwd))),
                  **self.options.fields(), **command.own}
        returns = command.returns[:-1] if self.settings.junit_from else command.returns
        if returns:
            fields["return"] = returns
        return encode(COMMAND, {name: fields[name] for name in fields if name in LINE_FIELDS})

    def returns(self, row: Arguments, seq: int, own: Optional[List[str]] = None) -> List[str]:
        """Return the files that come back: its own or those of --return; last its JUnit file."""
        patterns = [*(self.settings.returns if own is None else ()),
                    *filter(None, (self.settings.junit_from,))]
        return [*(own or ()), *(fill_placeholders(file, row, seq) for file in patterns)]


# --- batches: commands with several lines of the input (-n)

SHELL_TEXT = 120 * 1024  # bytes of a command: Linux takes 128 KiB of shell text
PACK_WAIT: Seconds = 5.0  # for the end of the input: a program may have to find its tests


class Batches:
    """Puts `size` lines of the input into each row of arguments, or fewer, if a command of so many
    would be too long.

    If times of lines are known, it waits for the whole input. Then `size` is a mean, and each row
    should take as long as the others. A row has neighbours, in order: they may share what is set
    up for a file."""

    def __init__(self, size: int, template: str) -> None:
        self.size = size
        self.template = template
        self.pattern = batch_pattern(template) if size > 1 else None
        self.times = LineTimes()
        self.mean: Seconds = 1.0  # of unknown lines
        self.packed = False
        self.held: List[str] = []
        # what a command has of each line: keys of MODIFIERS
        self.places = [place[2] or "" for place in PLACEHOLDER.finditer(template)
                       if place[0] != "{#}"] or [""]
        self.room = SHELL_TEXT - len(to_bytes(template))  # bytes for lines in a command
        self.length = 0  # bytes of the held lines in a command
        # a command must have all its lines: the template names them, as {1} {2}
        self.needs_all = any(place[1] for place in PLACEHOLDER.finditer(template))
        self.give_up_at: Seconds = math.inf

    def lines_of(self, command: str) -> List[str]:
        """Return the lines in a command; none if another template has made it."""
        found = self.pattern.fullmatch(command) if self.pattern else None
        return split_quoted(found["lines"]) if found else []

    def seconds(self, row: Arguments) -> Seconds:
        """Return how long a row should take."""
        return self.times.seconds(row, self.mean)

    def take(self, row: Optional[Arguments], earlier: EarlierRun, now: Seconds) -> List[Arguments]:
        """Take a row of the input, None at its end. Return the rows that are complete."""
        if row is None:
            return self.end()
        if earlier.has_line(row[0]):
            return []
        if self.size == 1:
            return [row]
        if not self.held:
            self.give_up_at = now + PACK_WAIT
        self.held += row
        self.length += self.length_of(row[0])
        return self.check(now)

    def check(self, now: Seconds) -> List[Arguments]:
        """Return rows of `size` lines, unless it waits for the whole input. It gives that up if
        the input is too long, or takes too long."""
        if self.times.lines and now < self.give_up_at \
                and len(self.held) <= LineTimings.MAX_COMMANDS:
            return []
        self.times, self.give_up_at = LineTimes(), math.inf
        full = len(self.held) >= self.size or self.length > self.room
        return self.cut(self.full_rows()) if full else []

    def length_of(self, line: str) -> int:
        """Return the bytes that a line takes in a command, as far as they matter."""
        return 0 if self.needs_all else sum(
            len(to_bytes(shlex.quote(MODIFIERS[place](line)) + " ")) for place in self.places)

    def full_rows(self) -> List[int]:
        """Return the ends of the rows to which no more lines can come."""
        ends, start, length = [], 0, 0
        for at, line in enumerate(self.held):
            added = self.length_of(line)
            if at > start and length + added > self.room:
                ends.append(at)
                start, length = at, 0
            length += added
            if at + 1 - start == self.size:
                ends.append(at + 1)
                start, length = at + 1, 0
        return ends

    def end(self) -> List[Arguments]:
        """Return the last rows."""
        times = self.times.lines
        known = [times[line] for line in self.held if line in times]
        if not known:
            return self.cut([*self.full_rows(), len(self.held)])
        self.mean, self.packed = mean_of(known), True
        return self.cut(partition(
            [times.get(line, self.mean) for line in self.held], [*map(self.length_of, self.held)],
            math.ceil(len(self.held) / self.size), self.room, [*map(file_of, self.held)],
            self.times))

    def cut(self, ends: Iterable[int]) -> List[Arguments]:
        """Return rows of the lines up to each of these ends. Hold the rest."""
        bounds = [0, *ends]
        rows = [tuple(self.held[start:end]) for start, end in zip(bounds, bounds[1:])]
        del self.held[:bounds[-1]]
        self.length = sum(map(self.length_of, self.held))
        return [row for row in rows if row]


def batch_pattern(template: str) -> Optional[re.Pattern[str]]:
    """Return what finds the lines in a template's commands; None if not all of them are there."""
    if not PLACEHOLDER.search(template):
        template += " {}"
    places = [place[0] for place in PLACEHOLDER.finditer(template)]
    if {*places} - {"{#}"} != {"{}"}:
        return None
    texts = PLACEHOLDER.split(template)[::PLACEHOLDER.groups + 1]
    if not all(re.search("[^0-9]", text) for text in texts[1:-1]):
        return None  # in {}{#} nobody knows where the number begins
    found = {"{#}": "[0-9]+", "{}": "(?P=lines)"}
    patterns = [found[place] for place in places]
    patterns[places.index("{}")] = "(?P<lines>.*)"
    return re.compile("".join(itertools.chain.from_iterable(
        zip(map(re.escape, texts), [*patterns, ""]))), re.S)


def split_quoted(text: str) -> List[str]:
    """Return the words of a text, as shlex.split() does. That takes a second for 1 MB."""
    words = re.findall(r"""(?:[^\s'"\\]+|'[^']*'|"[^"]*"|\\.)+""", text, re.S)
    return [re.sub(r"""'([^']*)'|"([^"]*)"|\\(.)""", r"\1\2\3", word, flags=re.S)
            for word in words]


FULL = 2  # a part of a file has lines for so many times what the file itself takes


def bounds_of(files: Sequence[str]) -> Tuple[List[int], List[int]]:
    """Return where the file of each line begins, and where it ends. "" is a file of one line."""
    begins: List[int] = []
    ends: List[int] = []
    for file, group in itertools.groupby(files):
        here, length = len(begins), len([*group])
        for at in range(here, here + length):
            begins.append(here if file else at)
            ends.append(here + length if file else at + 1)
    return begins, ends


def partition(times: Sequence[Seconds], sizes: Sequence[int], count: int, most: int,
              files: Sequence[str], known: LineTimes) -> List[int]:
    """Return the ends of up to `count` parts of a sequence, of which the longest is short.

    A part of several lines takes no longer than a limit, the lowest that suffices. There are two
    exceptions. A file that takes long itself is not cut into small parts, as each pays for that.
    And a file gets few parts more than before: that shows what the file itself takes. A part has
    `most` bytes at most, though there are more parts then."""
    parts = Counter(file for _, lines in known.batches for file in files_of(lines))
    begins, wholes = bounds_of(files)
    # integers: their sums are exact
    costs = [round(known.files.get(file, 0.0) * 1e6) for file in files]
    line_sums = [0, *itertools.accumulate(max(1, round(seconds * 1e6)) for seconds in times)]
    cost_sums = [0, *itertools.accumulate(
        cost * (begin == at) for at, (cost, begin) in enumerate(zip(costs, begins)))]
    time_sums = [line + cost for line, cost in zip(line_sums, cost_sums)]
    size_sums = [0, *itertools.accumulate(sizes)]

    def ends(limit: int) -> List[int]:
        found = [0]
        while found[-1] < len(times):
            start = found[-1]
            begin, whole, before = begins[start], wholes[start], parts[files[start]]
            again = costs[start] * (start > begin)
            end = bisect.bisect_right(time_sums, time_sums[start] + limit - again) - 1
            # one part tells less of a file than two: both may have had slow neighbours
            allowed = (before + 1 if before < 3 else 2 * before) if before else len(times)
            left = allowed - (len(found) - bisect.bisect_right(found, begin))
            share = (line_sums[whole] - line_sums[start]) / max(1, left)
            end = max(end, min(whole, max(
                bisect.bisect_left(line_sums, line_sums[start] + share),
                bisect.bisect_right(line_sums, line_sums[start] + FULL * costs[start]) - 1)))
            found.append(max(start + 1, min(
                end, bisect.bisect_right(size_sums, size_sums[start] + most) - 1)))
        return found[1:]
    low, high = 0, time_sums[-1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(ends(middle)) <= count else (middle, high)
    return ends(high)


class InputReader:
    """Reads rows of arguments in a thread, until READ_AHEAD wait to be submitted."""

    def __init__(self, loop: EventLoop, client: Client,
                 take: Callable[[Optional[Arguments], Seconds], None],
                 source: Iterator[Arguments]) -> None:
        self.loop = loop
        self.client = client
        self.take = take  # called in the loop's thread
        self.source = source
        self.rows: Deque[Optional[Arguments]] = deque()  # read, not delivered; None is the end
        self.posted = False  # the loop will call deliver()
        threading.Thread(target=self.read, daemon=True, name="stdin").start()

    def read(self) -> None:
        try:
            for row in self.source:
                self.hand_over(row)
                while len(self.rows) + len(self.client.backlog) > READ_AHEAD:
                    time.sleep(0.05)  # the client needs longer for READ_AHEAD commands
        except OSError as error:
            print_notice(f"cannot read the input: {error.strerror}")
            self.loop.post(lambda now: self.client.cancel(UNABLE, now))
        self.hand_over(None)

    def hand_over(self, row: Optional[Arguments]) -> None:
        self.rows.append(row)
        if not self.posted:
            self.posted = True
            self.loop.post(self.deliver)

    def deliver(self, now: Seconds) -> None:
        self.posted = False
        while self.rows:
            self.take(self.rows.popleft(), now)
        self.client.now = now
        self.client.settle()


# === Running a client =================================================================
#
# A ClientRun ties the client's machine to its input, its display and its reports. All checks
# of the settings come first, so that wrong usage costs no command and no old report.


def run_client(settings: argparse.Namespace) -> int:
    if settings.template[:1] == ["--"]:
        del settings.template[0]
    words, settings.sources = split_sources(settings.template)
    check_client(settings, words)
    if settings.sync_list:
        return print_tree(settings)
    most = math.inf if settings.colsep else max(settings.max_args, columns(settings.sources))
    settings.template = check_template(words, most)
    if {place[0] for place in PLACEHOLDER.finditer(settings.template)} == {"{#}"}:
        if settings.max_args > 1:
            raise UsageError("-n gives each command several lines, and the template has no place "
                             "for them: write {} where they go")
        if settings.verbose is not None:
            print_notice("no command has its line of the input: the template has {#}, but no {}")
    check_returns("--return", settings.returns, most)
    check_returns("--junit-from", [settings.junit_from or ""], most)
    if sys.stdout is None:
        raise SetupError("stdout is closed: there is nowhere to report to")
    if settings.dry_run:
        return print_commands(settings)
    settings.logins = logins_of(settings)
    if settings.need and runs_all(settings):
        print_notice(runs_all(settings))
        settings.need = []
    if settings.lock and (settings.local or settings.logins) and settings.verbose is not None:
        print_notice("--lock counts in this run only: other runs have other brokers (see "
                     "--connect)")
    if settings.local:
        return supervise(lambda control: client_process(settings, "this machine", control))
    if settings.logins:
        return client_process(settings, names_of(settings.logins), -1)
    if settings.slots or settings.cache:
        raise UsageError("-j and --cache need --local or -S: in a cloud these are options of the "
                         "workers, which have slots and workspaces")
    return client_process(settings, broker_address(settings, CLIENT_PORT), -1)


def check_client(settings: argparse.Namespace, words: List[str]) -> None:
    """Raise UsageError for options that do not go together, or with the template's words."""
    sources, several = settings.sources, settings.max_args > 1
    reports = [os.path.realpath(path) for path in (settings.joblog, settings.junit, settings.html)
               if path and is_replaceable(path)]  # two may be one device
    for wrong, why in (
            ((settings.resume or settings.resume_failed) and not settings.joblog,
             "--resume and --resume-failed need --joblog: the log of the earlier run"),
            (settings.sync is None and (
                settings.setup or settings.fresh or settings.returns
                or (settings.filters or settings.sync_max) and not settings.sync_list),
             "--exclude, --include, --sync-max, --setup, --fresh and --return need --sync"),
            (settings.setup_once_for and not settings.setup,
             "--setup-once-for goes with --setup: it says when that runs again"),
            (settings.raw + settings.json + settings.live > 1,
             "--raw, --json and --live are three ways to show outputs: choose one"),
            (len({*reports}) < len(reports),
             "--joblog, --junit and --html need a file each"),
            (settings.force and not settings.results,
             "--force needs --results: it replaces the results of earlier commands"),
            (any(mark.startswith("::::") and not files for mark, files in sources),
             "there is no file after ::::"),
            (any(mark in (":::", ":::+") and not row for mark, row in sources)
             and not settings.allow_empty,
             "there is no argument after ::: (if there may be none: --allow-empty)"),
            (not sources and sys.stdin is None, "stdin is closed: there are no commands to read"),
            (settings.jsonl and (words or several or settings.colsep or columns(sources) > 1),
             "--jsonl reads objects from one source: without TEMPLATE, -n and --colsep"),
            (settings.serial and settings.lock,
             "--serial and --lock are locks, and a command has one: choose one"),
            (not words and (several or settings.colsep),
             "-n and --colsep need a TEMPLATE, for the arguments that they make"),
            (settings.fail_on_missing and not settings.returns,
             "--fail-on-missing needs --return: the files that each command makes"),
            (several and (settings.colsep or columns(sources) > 1),
             "-n goes with one source of arguments, and without --colsep")):
        if wrong:
            raise UsageError(why)


def runs_all(settings: argparse.Namespace) -> str:
    """Return a notice if labels mean nothing, because no worker can have one; or ""."""
    where = "--local this machine runs" if settings.local else "-S all hosts run"
    alone = settings.local or settings.logins
    return f"with {where} everything, whatever --need and \"needs\" say" if alone else ""


NO_COMMANDS = ("no commands in the input: did the program fail that writes them? (if there may be "
               "none: --allow-empty)")


def print_commands(settings: argparse.Namespace) -> int:
    """Print what would be run. Returns the exit status."""
    maker, batches = CommandMaker(settings, run_options(settings)), batches_of(settings)
    earlier = earlier_run(settings, batches)
    found, status = False, 0
    stdout = BlockingFile(1, "w", closefd=False)
    with file_errors("write to", "stdout"), io.BufferedWriter(stdout) as out:
        rows = itertools.chain(read_arguments(settings), [None])
        made = (made for row in rows for made in batches.take(row, earlier, time.monotonic()))
        for seq, row in enumerate(made, earlier.first_seq):
            command = maker.make(row, seq)
            found |= command is not None
            if command is None:
                continue
            if command.wrong:
                print_notice(command.wrong)
                status = SOME_FAILED
            elif not earlier.has_done(command.cmd, earlier.next_occurrence(command.cmd)):
                out.write((maker.line_of(command) if settings.jsonl else to_bytes(command.cmd))
                          + b"\n")
    if found or earlier.skipped or settings.allow_empty:
        return status
    print_notice(NO_COMMANDS)
    return WRONG_USAGE


def print_tree(settings: argparse.Namespace) -> int:
    """Print the size and path of all that --sync would send. Returns the exit status."""
    tree = WorkingTree(working_tree_top(settings.sync or ""), settings.filters)
    tree.scan()
    tree.leave_out_all(os.R_OK, errno.EACCES)
    for line in tree.left_out:
        print_notice(line)
    parents = {path.rpartition("/")[0] for path in tree.entries}
    stdout = BlockingFile(1, "w", closefd=False)
    with file_errors("write to", "stdout"), io.BufferedWriter(stdout) as out:
        for path, entry in sorted(tree.entries.items()):
            if path not in parents:  # a directory only if it is empty
                end = "/" * (entry.kind == DIRECTORY)
                out.write(to_bytes(f"{entry.size}\t{escape_unprintable(path, '')}{end}\n"))
    return 0


def added_environment(settings: argparse.Namespace) -> Dict[str, str]:
    """Return the variables that --env sets. Raises UsageError."""
    env = {}
    for word in settings.env:
        name, given, value = word.partition("=")
        if not given and name not in os.environ:
            raise UsageError(f"--env {printable(name)}: there is no such variable here")
        env[name] = value if given else os.environ[name]
    if not environment(env):
        raise UsageError("--env needs the name of a variable, or NAME=VALUE")
    if len(encode("", env)) > MAX_COMMAND // 4:
        raise UsageError(f"--env: the variables are longer than {MAX_COMMAND // 4} bytes together")
    return env


def working_directory(given: Optional[str]) -> str:
    """Return an absolute path, or one from the worker's home, ~. Raises UsageError."""
    try:
        if given and given.partition("/")[0] == "~":
            return given
        here = os.environ.get("PWD", "")  # with its links: on workers they may lead elsewhere
        if not (os.path.isabs(here) and os.path.normpath(here) == here and os.path.isdir(here)
                and os.path.samefile(here, ".")):
            here = ""
        return os.path.abspath(os.path.join(here, given or ""))
    except FileNotFoundError:
        raise UsageError("the current directory is gone: name another one with --cwd") from None


def earlier_run(settings: argparse.Namespace, batches: Batches) -> EarlierRun:
    """Return what the joblog has of an earlier run; nothing without --resume. Raises SetupError."""
    rows: List[JobLogRow] = []
    if settings.resume or settings.resume_failed:
        with file_errors("read", settings.joblog), contextlib.suppress(FileNotFoundError):
            rows = read_joblog(settings.joblog, settings.fail_on_flaky)
    lines_of = batches.lines_of if batches.pattern else None
    if rows and settings.template and not settings.colsep and columns(settings.sources) < 2 \
            and batches.size == 1:  # if that run had -n, its lines count, too
        batched = Batches(2, settings.template)
        if any(len(batched.lines_of(row.command)) > 1 for row in rows):
            lines_of = batched.lines_of
    return EarlierRun(rows, settings.resume_failed, lines_of)


def batches_of(settings: argparse.Namespace) -> Batches:
    """Return what makes batches of the input. Raises SetupError."""
    batches = Batches(settings.max_args, settings.template)
    if batches.pattern and not (settings.serial or settings.lock):  # there, order is all
        if not settings.timings:
            batches.times = read_line_times(timings_path(batches))
            return batches
        with file_errors("read", settings.timings):
            batches.times.learn([(batches.lines_of(row.command), row.seconds, row.failed)
                                 for row in read_joblog(settings.timings)])
    return batches


def timings_path(batches: Batches) -> str:
    """Return the file that remembers times: of commands, or of a template's lines here. Tests of
    other projects may have the same names."""
    about = os.environ.get("PWD", "") + "\n" + batches.template
    return cache_path("lines", about) if batches.pattern else cache_path("timings.json")


def known_timings(settings: argparse.Namespace) -> Dict[str, float]:
    """Return the seconds that commands took, each of a row of the input. Raises SetupError."""
    if not settings.timings:
        return read_timings(cache_path("timings.json"))
    with file_errors("read", settings.timings):
        return {row.command: row.seconds for row in read_joblog(settings.timings)}


# --- display and reports


def file_reporters(settings: argparse.Namespace, store: ResultStore, earlier: EarlierRun,
                   tests: Optional[TestFiles]) -> List[Reporter]:
    """Return the reporters that write files. Raises SetupError if one cannot be written."""
    found: List[Reporter] = []
    replace = settings.force or settings.resume or settings.resume_failed
    kept = [row.line for row in earlier.rows.values()]
    makers: Tuple[Tuple[str, Callable[[str], Reporter]], ...] = (
        (settings.junit, lambda path: JUnit(path, store, tests)),
        (settings.html, lambda path: HtmlReport(path, store)),
        (settings.results, lambda path: Results(path, store, replace)),
        (settings.joblog, lambda path: JobLog(path, kept)))  # last: it empties a file
    for path, make in makers:
        if path:
            with file_errors("write", path):
                found.append(make(path))
    return found


def use_colour(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return choice == "always"


class Display:
    """The output of a client on stdout and stderr.

    With --raw or --json stdout has the outputs only, and the transcript goes to stderr. The
    options choose the reporters."""

    def __init__(self, settings: argparse.Namespace, store: ResultStore,
                 failed: Callable[[OSError], None], client: Client) -> None:
        self.out = Writer(1, failed)
        # of stderr only what --raw passes on must be written
        needed = settings.raw and not settings.brief and sys.stderr is not None
        self.err = Writer(2, failed if needed else lambda error: None) if (
            settings.raw or settings.json) else None
        write, colour = self.tell if self.err else self.out.put, use_colour(settings.color)
        self.quiet = settings.verbose is None and self.err is not None
        self.transcript = Transcript(client, write, colour, settings.slow, settings.verbose,
                                     settings.json, self.quiet)
        shown: List[Reporter] = [self.transcript]
        if settings.json:
            shown.append(JsonLines(store, self.out.put, settings.brief))
        elif self.err and not settings.brief:  # --raw
            shown.append(RawOutput(store, self.out.put, self.err.put))
        elif not settings.brief and not settings.live:
            shown.append(TextOutput(store, self.out.put, settings.tag))
        self.reporters: List[Reporter] = [Filter(shown, settings.fail_only, settings.keep_order)]
        if settings.live:
            self.reporters.insert(0, LiveLines(store, self.out.put))

    def tell(self, line: Iterable[bytes]) -> None:
        """Put a line among the outputs that stderr gets."""
        if self.err:
            ends = (end.encode() for end in PROGRESS_LINE.finish_line())
            self.err.put(itertools.chain(ends, line))

    def flush(self) -> None:
        self.out.flush()
        if self.err:
            self.err.flush()

    def end(self, ended: Callable[[], None]) -> None:
        """Call ended() when stdout is written. The summary on stderr waits for that a moment, as
        both may be one pipe."""
        shown, written = threading.Event(), threading.Event()

        def all_shown() -> None:
            shown.set()
            ended()
        self.out.end(all_shown)
        if self.err:
            shown.wait(FINAL_WRITE_TIME / 4)
            self.err.end(written.set)
            written.wait(FINAL_WRITE_TIME)


def remove_progress_line() -> None:
    PROGRESS_LINE.text = ""
    PROGRESS_LINE.redraw()


# --- the working tree


def directory_within(top: str, given: Optional[str]) -> str:
    """Return the place of commands in the tree with this top: that of the current directory, and
    --cwd from there. Raises UsageError."""
    here = os.path.relpath(os.path.realpath("."), top)
    base = top if here.split("/")[0] == ".." else os.path.realpath(".")
    place = os.path.relpath(os.path.join(base, given or ""), top)
    if place.split("/")[0] in ("..", "~") or given and given[:1] == "~":
        raise UsageError(f"--cwd {printable(given or '')} is not in the tree of --sync: commands "
                         f"run in {printable(top)}, or below it")
    return "" if place == "." else place


def working_tree(settings: argparse.Namespace, top: str, cwd: str) -> WorkingTree:
    head = {"setup": settings.setup or "", "cwd": cwd,
            "fresh": os.urandom(8).hex() if settings.fresh else ""}
    return WorkingTree(top, settings.filters, head, settings.sync_max or SYNC_MAX,
                       cache_path("hashes", os.path.realpath(top)),
                       [os.path.normpath(os.path.join(cwd, path))
                        for path in settings.setup_once_for])


class TreeReader:
    """Reads the working tree for a run: lists it in a thread, and parts of files in the loop."""

    def __init__(self, loop: EventLoop, client: Client, files: WorkingTree,
                 tell: Callable[[str], object]) -> None:
        self.loop = loop
        self.client = client
        self.files = files
        self.tell = tell
        self.told: Set[str] = set()  # what is left out
        self.notice_at = math.inf  # when to tell how far a look is
        loop.every(TRANSFER_NOTICE, self.tell_look)
        loop.post(lambda now: self.start(files.look))  # after logins were started

    def start(self, look: Callable[[], Tree]) -> None:
        """Let the client have the tree of look(), which takes its time."""
        self.notice_at = time.monotonic() + TRANSFER_NOTICE

        def work() -> None:
            try:
                tree = look()
            except Exception as error:
                self.loop.post(functools.partial(self.failed, error))
            else:
                self.loop.post(lambda now: self.client.set_tree(tree, now))
                self.loop.post(self.tell_left_out)
        threading.Thread(target=work, daemon=True, name="tree").start()

    def failed(self, error: Exception, now: Seconds) -> None:
        if not self.client.left:
            self.client.leave(UNABLE)
        self.loop.flush()
        raise error

    def tell_look(self, now: Seconds) -> None:
        if now >= self.notice_at:
            self.notice_at = now + TRANSFER_INTERVAL
            self.tell(f"reading the working tree: {plural(self.files.seen, 'name')}, "
                      f"{amount(self.files.hashed)}")

    def tell_left_out(self, now: Seconds) -> None:
        self.notice_at = math.inf
        for line in self.files.left_out:
            if line not in self.told:
                self.told.add(line)
                self.tell(line)

    def keep(self, path: str) -> None:
        """Keep what --return is about to replace, unless a thread looks at the files."""
        if self.client.offer.tree is not None:
            self.files.keep(path)

    def answer(self, effect: AnswerFetch) -> None:
        """Answer a FETCH, or look at the files anew: they are not as they were."""
        fields, tree = effect.fields, self.client.offer.tree
        data = None
        if tree is not None and tree.id == fields["tree"]:
            try:
                data = self.files.read(tree, spans_asked(fields), fields.get("again", False))
            except StaleFiles as stale:
                self.client.set_tree(None, self.client.now)
                self.start(functools.partial(self.files.refresh, stale.indexes))
        self.client.answer(fields, data)


# --- the run


class ClientRun:
    """One run of a client in a loop, from its input to its reports."""

    def __init__(self, settings: argparse.Namespace, client: Client, loop: EventLoop) -> None:
        self.settings = settings
        self.client = client
        self.loop = loop
        self.maker = CommandMaker(settings, client.options)
        top = self.maker.top
        self.batches = batches_of(settings)
        self.earlier = earlier_run(settings, self.batches)
        client.last_id = self.earlier.first_seq - 1
        if not self.batches.pattern:
            client.timings = known_timings(settings)
        times = timings_path(self.batches)
        store = ResultStore(client.options.split)
        self.display = Display(settings, store, self.output_failed, client)
        self.told_needs = False
        # no other worker will come with --local; elsewhere one may
        logins = settings.logins or ()
        if settings.local:
            client.most_slots = settings.slots or usable_cpus()
        elif logins and all(login.slots for login in logins):
            client.most_slots = sum(login.slots for login in logins)
        self.display.out.caught_up = lambda: loop.post(lambda now: client.set_live(True))
        self.files = ReturnedFiles(top or "", self.tell, not settings.fail_on_missing,
                                   lambda path: self.tree.keep(path))
        self.tests = TestFiles() if settings.junit_from else None
        self.hosts: Optional[Hosts] = None
        returns = top is not None and (settings.returns or settings.jsonl or self.tests)
        self.reports = reports = Reports(client, store, [
            *self.display.reporters, *file_reporters(settings, store, self.earlier, self.tests),
            LineTimings(times, self.batches.lines_of, settings.max_args)
            if self.batches.pattern else Timings(times)],
            self.files if returns else None, self.tests)
        self.results = next((it for it in reports.reporters if isinstance(it, Results)), None)
        self.adapter = loop.add(client, {
            RunStarted: reports.started, FetchedOutput: store.put_part, LiveOutput: self.live,
            ReturnedPart: self.put_part, ReadTests: self.read_tests,
            ProvisionalResult: reports.keep, FinalResult: reports.report,
            Notice: lambda effect: self.tell(effect.text, effect.error)})
        if top is not None:
            self.tree = TreeReader(
                loop, client, working_tree(settings, top, self.maker.cwd), self.tell)
            self.adapter.effects[AnswerFetch] = self.tree.answer
        progress = progress_of(settings, client, self.display.out)
        client.transfers_shown = progress is not None and not progress.interval
        loop.each_round += [self.display.flush, *([progress.update] if progress else [])]
        if self.batches.times.lines:
            loop.every(MAX_POLL_TIME, self.check_batches)

    def take(self, row: Optional[Arguments], now: Seconds) -> None:
        """Take a row of the input. None is its end."""
        if not self.client.input_ended:  # else it was interrupted
            for made in self.batches.take(row, self.earlier, now):
                self.add(made)
        if row is None:
            self.client.end_input(now)

    def check_batches(self, now: Seconds) -> None:
        """Add the batches that waited too long for the rest of the input."""
        rows = [] if self.client.input_ended else self.batches.check(now)
        for row in rows:
            self.add(row)
        if rows:
            self.client.now = now
            self.client.settle()

    def add(self, arguments: Arguments) -> None:
        """Add the command for a row of the input, unless an earlier run has done it."""
        settings, client = self.settings, self.client
        command = self.maker.make(arguments, client.last_id + 1)
        if command is None:
            client.skip()
            return
        name, wrong = command.own.get("name", ""), command.wrong
        if self.results and settings.jsonl:  # only there commands have names, which may clash
            clash = self.results.refusal(client.last_id + 1, name)
            wrong = wrong or clash and f"line {client.last_id + 1}: {clash}"
        if self.tests and not wrong:
            wrong = self.tests.clash(client.last_id + 1, command)
        slots = command.own.get("slots", client.options.slots)
        if settings.local and slots > client.most_slots:
            wrong = wrong or (
                f"it takes {slots} slots, and this machine has {client.most_slots} (-j)")
        occurrence = self.earlier.next_occurrence(command.cmd) if settings.joblog else 0
        if self.earlier.has_done(command.cmd, occurrence):
            client.skip()
            return
        if command.own.get("needs") and runs_all(settings):
            command.own["needs"] = []
            if not self.told_needs:
                self.tell(runs_all(settings))
            self.told_needs = True
        if self.batches.packed:
            client.timings[command.cmd] = self.batches.seconds(arguments)
        client.add(command.cmd, command.cwd, command.returns, command.own, wrong)
        self.reports.expect(client.last_id, command.line, occurrence, name,
                            len(arguments) if settings.max_args > 1 else 1)

    def put_part(self, part: ReturnedPart) -> None:
        if self.reports.files:
            self.reports.files.put_part(part)
        if self.tests:
            self.tests.put_part(part)

    def read_tests(self, effect: ReadTests) -> None:
        assert self.tests is not None
        fault = self.tests.read(effect.command, effect.result)
        self.client.tests_read(effect.command, effect.result, fault)

    def interrupt(self, status: int, now: Seconds) -> None:
        if self.client.left:  # only the display is still being written
            self.loop.exit(status)
        else:
            self.client.cancel(status, now)

    def tell(self, text: str, error: bool = False) -> None:
        if error or self.settings.verbose is not None:
            print_notice(text)

    def live(self, effect: LiveOutput) -> None:
        self.reports.live(effect)
        if self.display.out.is_behind():
            self.client.set_live(False)

    def output_failed(self, error: OSError) -> None:
        """Raise an error of a writer's thread in the loop."""
        def fail(now: Seconds) -> None:
            raise error
        self.loop.post(fail)

    def run(self) -> int:
        """Run to the end, and return the exit status. When results cannot be written, stop the
        commands and raise SetupError."""
        try:
            return self.end(self.loop.run())
        except OSError as error:
            if not self.client.left:
                self.client.leave(UNABLE)
            self.loop.flush()
            if isinstance(error, BrokenPipeError):
                raise
            raise SetupError(f"cannot write the results ({error.strerror}): is there room on the "
                             f"disk, and in {tempfile.gettempdir()}?") from None

    def end(self, status: int) -> int:
        """Report a run that ended with this status; return the client's exit status."""
        settings, client, earlier = self.settings, self.client, self.earlier
        remove_progress_line()
        complete = status in (0, SOME_FAILED) and client.reported == client.total \
            and not client.cut_short
        if not complete:
            report_incomplete(client, status)
        summary = self.reports.end(
            complete, earlier.skipped, earlier.skipped_failed, settings.expect,
            rerun_command(settings), settings.allow_empty, [*dict.fromkeys([
                *client.unfit, *(self.hosts.given_up() if self.hosts else ())])], earlier.failures)
        write_failed = self.reports.write_failed or self.files.unwritten > 0
        status = exit_status(summary, write_failed, status)
        if status > 128:
            written = threading.Event()
            self.display.end(written.set)
            written.wait(FINAL_WRITE_TIME)
            return status
        self.loop.status = None
        self.display.end(lambda: self.loop.post(lambda now: self.loop.exit(status)))
        status = self.loop.run()
        alike = not (settings.jsonl or settings.serial or settings.lock or settings.delay)
        slots = client.slots // (settings.slots_each or 1) if alike else 0
        self.files.tell_rest()
        for line in final_notices(summary, self.reports.times, slots):
            self.tell(line, line == summary.wrong_hash)
        return status


def run_options(settings: argparse.Namespace) -> RunOptions:
    """Return the options of a run. Raises UsageError."""
    return RunOptions(
        settings.timeout, settings.retries, settings.max_output, added_environment(settings),
        settings.shell, tuple(settings.need),
        split=settings.raw or settings.results is not None, live=settings.live,
        slots=settings.slots_each, lock="" if settings.serial else settings.lock,
        delay=settings.delay, fail_fast=settings.fail_fast,
        fail_on_flaky=settings.fail_on_flaky, fail_on_missing=settings.fail_on_missing,
        sync=settings.sync is not None, read_tests=settings.junit_from is not None)


def client_process(settings: argparse.Namespace, address: str, control: int) -> int:
    """Run a client; control is the descriptor of its supervisor, or -1 without one."""
    alone = settings.local or settings.logins  # no broker elsewhere
    keys = None if alone else keys_to_connect(settings, CLIENT_ROLE, address)
    run = fingerprint(keys.pairs[CLIENT_ROLE].public if keys else "") + os.urandom(16).hex()
    client = Client(run, times_from(settings), settings.wait, address, host_name(),
                    run_options(settings), os.getpid())
    source = read_arguments(settings)
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(EventLoop(sockets=not alone)))
        stack.callback(remove_progress_line)
        client_run = ClientRun(settings, client, loop)
        stack.callback(client_run.files.close)
        if client_run.results:
            stack.callback(client_run.results.close)
        loop.on_signals(client_run.interrupt, control)
        if not settings.sources and sys.stdin.isatty():
            client_run.tell("reading commands from the terminal, one a line; end with Ctrl-D")
        InputReader(loop, client, client_run.take, source)
        if not settings.json and not client_run.display.quiet:
            client_run.display.transcript.line(f"Connecting to {address}")
        if settings.logins:
            stack.enter_context(contextlib.closing(run_on_hosts(settings, client_run)))
        elif settings.local:
            # with a terminal as stdin, keep it: Ctrl-Z stops us
            if control >= 0 and not (sys.stdin and sys.stdin.isatty()):
                detach_terminal()
            stack.callback(run_locally(
                loop, client, client.most_slots, times_from(settings), control >= 0,
                settings.cache))
        else:
            connect(loop, client_run.adapter, address, CLIENT_ROLE, keys, settings)
        return client_run.run()


def add_broker(loop: EventLoop, client: Client, times: Times) -> Tuple[Broker, Adapter]:
    """Put a broker into the client's process, and link them. Return it with its adapter."""
    # forever, in seconds: a stopped process stops both alike
    broker = Broker("local", times._replace(client_lease=1e9), now=-math.inf)  # it has no past
    # what it logs for an operator is of interest with --verbose only
    adapter = loop.add(broker, {Log: lambda effect: logging.info("%s", effect.text)})
    adapter.links[CLIENTS] = LocalLink(client, BROKER, b"")
    loop.adapters[0].links[BROKER] = LocalLink(broker, CLIENTS, b"client")
    loop.post(lambda now: client.connected(BROKER, now))
    return broker, adapter


def run_locally(loop: EventLoop, client: Client, slots: int, times: Times,
                subreaper: bool, cache: int = 0) -> Callable[[], None]:
    """Put a broker and a worker into the client's process. Return a function that ends the
    worker's commands."""
    forever = 1e9  # seconds: a stopped process stops all three alike
    broker, broker_adapter = add_broker(
        loop, client, times._replace(queued_timeout=forever, worker_expiry=forever))
    worker = Worker(unique_name(), slots, host=host_name(), times=times,
                    labels=[*KNOWN_BY_LABEL])
    adapter, close = attach_runner(loop, worker, subreaper, cache=cache)
    adapter.links[BROKER] = LocalLink(broker, WORKERS, b"worker")
    broker_adapter.links[WORKERS] = LocalLink(worker, BROKER, b"")
    loop.post(lambda now: worker.connected(BROKER, now))
    return close


def run_on_hosts(settings: argparse.Namespace, run: ClientRun) -> Hosts:
    """Put a broker into the client's process, and start its workers on the hosts."""
    # a stream tells when it ends, and does not come back: a silent worker is only slow until then
    broker, adapter = add_broker(run.loop, run.client, times_from(settings)._replace(
        lost_grace=0.0, worker_expiry=MAX_SILENCE))
    adapter.links[WORKERS] = links = PeerLinks()

    def none_left(now: Seconds) -> None:
        run.tell(NONE_LEFT, True)
        run.client.cancel(UNABLE, now)

    began = time.monotonic()

    def count_hosts(now: Seconds) -> None:
        if links.links or now > began + 2 * LOGIN_TIME:
            run.client.connected_hosts = len(links.links)
        coming = hosts.are_coming() or len(broker.registry.workers) < len(links.links)
        run.client.expecting = coming and now < began + HOST_WAIT
        broker.expect_hosts(run.client.expecting, now)
    run.client.wanted_hosts = len(settings.logins)
    run.loop.every(HOST_INTERVAL, count_hosts)
    hosts = run.hosts = Hosts(run.loop, settings, None, lambda login: BrokerUplink(
        broker, links, login.peer), none_left, run.tell)
    return hosts


# --- the end of the run


def report_incomplete(client: Client, status: int) -> None:
    """Tell how much was done of a run that ended early."""
    how = "interrupted" if status > 128 else "gave up" if status > SOME_FAILED else "stopped early"
    unknown = len(client.window)
    more = f", {unknown} not run or unknown" if unknown else ""
    print_notice(f"{how}: {plural(client.reported, 'command')} reported, {client.stopped} stopped, "
                 f"{client.never_ran + len(client.backlog)} never ran{more}")


def rerun_command(settings: argparse.Namespace) -> str:
    """Return the command line that runs a run's failures again; "" without a joblog."""
    if not settings.joblog:
        return ""
    given = separate_template(settings.argv[1:])
    end = given.index("--") if "--" in given else len(given)
    own = ["--sync" if word == "--sync=" else word
           for word in given[:end] if word not in ("--resume", "--resume-failed")]
    words = ["python3", sys.argv[0], CLIENT_ROLE, "--resume-failed", *own, *given[end:]]
    return "... | " * (not settings.sources) + truncate_middle(shlex.join(words))


def exit_status(summary: Summary, write_failed: bool, status: int) -> int:
    """Return a client's exit status; status is that of its run without reports and hash."""
    if write_failed:
        status = max(status, UNABLE)
    if summary.empty:
        return status or WRONG_USAGE
    # codes: of outputs without room, too
    failed = summary.codes or summary.skipped_failed or summary.wrong_hash
    return status or (SOME_FAILED if failed else 0)


# a run gets advice about slots only if each of these is reached:
ADVICE_MIN_RUN: Seconds = 2.0  # its duration
ADVICE_MIN_COMMAND = 100.0  # ms; its longest command
ADVICE_MIN_SHARE = 0.6  # of its time the slots were the limit: not input, other clients or retries


def final_notices(summary: Summary, times: Sequence[float], slots: int) -> Iterator[str]:
    """Yield what to say after all results. times: ms of each command; slots: 0 if no limit."""
    if summary.empty:
        yield NO_COMMANDS
    if summary.wrong_hash:
        yield summary.wrong_hash
    worth_it = summary.spent >= ADVICE_MIN_RUN and max(times, default=0) >= ADVICE_MIN_COMMAND
    if summary.complete and len(times) > 1 and worth_it and slots:
        all_spent = [spent / 1000 for spent in times]
        if makespan(all_spent, slots) > ADVICE_MIN_SHARE * summary.spent:
            yield advice_on_slots(all_spent, slots)


# === Showing the status, and cancel ===================================================
#
# status asks a broker and prints its tables. --watch on a terminal shows them on its alternate
# screen; it gives that back at the end, on Ctrl-Z and after an error. cancel asks a broker to stop
# a client, and waits for it in the same way.

STATUS_INTERVAL: Seconds = 1.0  # between updates of status --watch
STATUS_WAIT: Seconds = 5.0  # for a broker, without --watch


def run_status(settings: argparse.Namespace) -> int:
    address = broker_address(settings, CLIENT_PORT)
    keys = keys_to_connect(settings, CLIENT_ROLE, address)
    if sys.stdout is None:
        raise SetupError("stdout is closed: there is nowhere to show it")
    wait = settings.wait or (math.inf if settings.watch else STATUS_WAIT)
    machine = StatusClient(address, wait, STATUS_INTERVAL if settings.watch else math.inf)
    screen = None
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(contextlib.closing(EventLoop(sockets=True)))
        loop.on_signals(lambda status, now: loop.exit(status))
        effects: Dict[type, Callable[[Any], object]] = {
            ShowStatus: lambda effect: print_status(effect, settings, address)}
        if settings.watch and not settings.json and not is_dumb() and sys.stdout.isatty():
            screen = stack.enter_context(contextlib.closing(StatusScreen(loop, address)))
            effects = {ShowStatus: screen.show, Notice: screen.tell}
        connect(loop, loop.add(machine, effects), address, CLIENT_ROLE, keys, settings)
        loop.post(machine.tick)
        status = loop.run()
    if screen and status == UNABLE:
        print_notice(screen.notice)  # it was on the other screen
    return status


def print_status(effect: ShowStatus, settings: argparse.Namespace, address: str) -> None:
    if settings.json:
        print_line(dump_utf8(effect.fields))
        return
    columns = screen_size(1)[0] if sys.stdout.isatty() else 0
    lines = join_tables(status_tables(effect.fields, address, columns))
    print_line("\n".join([*lines, ""] if settings.watch else lines))


class StatusScreen:
    """The alternate screen of a terminal, with the last status and what was said since."""

    def __init__(self, loop: EventLoop, address: str) -> None:
        self.loop = loop
        self.address = address
        self.tables: List[List[str]] = []
        self.notice = ""
        # the terminal's settings, if it is our stdin
        self.saved = termios.tcgetattr(0) if sys.stdin is not None and sys.stdin.isatty() else None
        if self.saved:
            loop.add_reader(0, self.key_pressed)
        signal.signal(signal.SIGWINCH, lambda *_: loop.post(lambda now: self.draw()))
        self.open()

    def open(self) -> None:
        print_line("\033[?1049h")
        if self.saved:
            raw = termios.tcgetattr(0)
            raw[3] &= ~(termios.ICANON | termios.ECHO)
            termios.tcsetattr(0, termios.TCSADRAIN, raw)
            signal.signal(signal.SIGTSTP, lambda *_: self.loop.post(self.pause))
        self.draw()

    def close(self) -> None:
        with contextlib.suppress(OSError, SetupError):
            print_line("\033[?1049l")
            if self.saved:
                termios.tcsetattr(0, termios.TCSADRAIN, self.saved)

    def pause(self, now: Seconds) -> None:
        self.close()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # it stops us, if there is a shell that can go on
        self.open()

    def key_pressed(self, now: Seconds) -> None:
        keys = os.read(0, 100)
        if not keys or b"q" in keys.lower():
            self.loop.exit(0)

    def show(self, effect: ShowStatus) -> None:
        self.tables = status_tables(effect.fields, self.address, screen_size(1)[0])
        self.notice = ""
        self.draw()

    def tell(self, effect: Notice) -> None:
        self.notice = effect.text
        self.draw()

    def draw(self) -> None:
        notice = [[f"testcloud: {self.notice}"]] if self.notice else []
        lines = fit_to_screen([*notice, *self.tables], *screen_size(1))
        print_line("\033[H" + "\033[K\n".join(lines) + "\033[K\033[J")


def run_cancel(settings: argparse.Namespace) -> int:
    address = broker_address(settings, CLIENT_PORT)
    keys = keys_to_connect(settings, CLIENT_ROLE, address)
    machine = Canceller(address, settings.wait or STATUS_WAIT, settings.client,
                        f"{user_name()}@{host_name()}")
    with contextlib.closing(EventLoop(sockets=True)) as loop:
        loop.on_signals(lambda status, now: loop.exit(status))
        connect(loop, loop.add(machine, {}), address, CLIENT_ROLE, keys, settings)
        loop.post(machine.tick)
        return loop.run()


# === Manual ===========================================================================
#
# `testcloud.py help TOPIC` prints a text of MANUAL. In it a line that begins with @ stands for
# rows of a table that the program uses: TABLES says which.

MANUAL["start"] = """\
    $ ls *.log | testcloud.py client --local gzip -k {}

The client runs a command for each line of its input, here on this machine. As many run at
once as there are CPUs. `testcloud.py` stands for `python3 testcloud.py`, or for the
script in a directory of your PATH. It needs Python 3.9 or newer, on Linux, macOS or
another POSIX system. On Windows, use it inside WSL.

Hosts

    $ ls tests/test_*.py | testcloud.py client -S alpha,beta,: --sync pytest -q {}

This client runs the commands on two hosts by ssh, and here (:). Your files go along.
Nothing must be installed on the hosts, and nothing stays running there (see `help hosts`).

A standing cloud on this machine

    $ testcloud.py broker &
    $ testcloud.py worker &
    $ seq 5 | awk '{print "./pi.py " $1}' | testcloud.py client
    $ kill %1 %2

A standing cloud has one broker, and serves many clients. A client sends its commands to
the broker. The broker gives them to workers with a free slot. Results go back the same
way. The last line stops the cloud: Ctrl-C and SIGTERM stop every role.

A standing cloud needs pyzmq 24 or newer. Many systems refuse a plain `pip install`
("externally managed"). Take one of these:

    $ sudo apt install python3-zmq
    $ python3 -m venv .venv && .venv/bin/pip install -q pyzmq
    $ uv run testcloud.py status

The first one is for Debian and Ubuntu. If python3 has no pyzmq, the program takes that of
a .venv beside the script. The script and the .venv must belong to you. uv fetches what
the file says that it needs (PEP 723).

Many short runs

    $ ln -s testcloud.py __main__.py && python3 . client --local true ::: a

Python compiles the script at each start, which takes most of a short run. In a directory
with such a link it keeps the compiled program in __pycache__, if it can write there. Name
the directory in place of the script. Then a start takes less than half of the time, and a
broker or worker less than half of the memory.

A standing cloud on several machines

    hub$    testcloud.py keygen; testcloud.py broker &
    hub$    scp testcloud.py testcloud.key other:
    other$  python3 testcloud.py worker --connect hub
    mine$   scp hub:testcloud.py hub:testcloud.key .
    mine$   ls tests/test_*.py | python3 testcloud.py client --connect hub pytest -q {}

Each machine needs the script, pyzmq and a key (see `help keys`). A broker that was started
before keygen has no key: stop it first. Firewalls must let TCP through to the broker's
machine. Clients connect to port 2224, and workers to port 2225.

The client, and where its commands run

@options client --local --slots --need

--local and -S need no broker and no pyzmq. Without them the client connects to --connect,
else to $TESTCLOUD_BROKER, else to this machine. --need may be repeated. Without --wait
the client waits for ever, and says what for.

The broker

@options broker --clients --workers --upstream --upstream-key
@options broker,worker,status,cancel,keygen --verbose

The broker prints a line for each address on which it listens. ADDR is tcp://HOST:PORT,
HOST:PORT, HOST, or ipc://PATH. The host * is all interfaces, and port 0 is a free port,
which the line names. An IPv6 address stands in brackets.

Clients share the slots fairly, in turns of one command. A command of four slots costs its
client four turns.

With --upstream the broker joins another broker as a worker. It has the slots of all its
workers, and their highest --weight. It may have clients of its own. To join a cloud of
other people it needs a worker's key of theirs (--upstream-key). In a loop of brokers, one
of them ends with status 2.

The worker

@options worker --slots --weight --label --host --drain
@options worker,client --connect --wait

A worker runs as many commands at once as it has slots. By default these are the CPUs that
it may use, by affinity and cgroup quota. The workers with the highest --weight are used
first. Among equals, the one with the most free slots is next.

Start it before or after the broker. It waits for the broker, and joins it again after
each restart. What it runs goes on. Each start gives the worker a new name.

Ctrl-C, SIGTERM and other signals that end a process stop a worker. It takes no more
commands, and hands back those that have not started. The others have --drain to end. Then
it stops them, and they run elsewhere. A second signal ends the worker immediately. Then
its commands keep their locks (--lock) for --lost-grace.

A worker that was started by `ssh HOST`, without a terminal and without nohup, stops when
that connection ends. To keep it, redirect its outputs.

A second worker of the same user on a host gets a notice, and the broker logs it. Hosts
are told apart by machine id and boot id. The broker calls a second host of one name vm~2.
--host gives a better name. Two names on one machine count as two hosts.

Other roles

@options completion SHELL
@options help TOPIC

    $ eval "$(testcloud.py completion bash)"
    $ testcloud.py completion fish | source

For zsh write `completion zsh` in the first line. Then the shell completes roles, options
and topics of a testcloud.py in the PATH.
"""


class Topic(NamedTuple):
    """A row of TOPICS: its line in the list of topics, and the roles whose --help names it."""

    summary: str
    roles: Tuple[str, ...]


ALL_ROLES = tuple(OPTIONS)
CLOUD = ("broker", "worker", "client")  # what a standing cloud has
TOPICS: Dict[str, Topic] = {  # in the order in which a new user needs them
    "start": Topic("this machine, several hosts, a standing cloud; how to stop it", ALL_ROLES),
    "commands": Topic("what runs: lines, templates, JSON, slots, locks", ("client",)),
    "hosts": Topic("run on hosts that you reach by ssh, or another way", ("client", "worker")),
    "trees": Topic("take the files of your working tree along (--sync)", ("client", "worker")),
    "keys": Topic("who may take part, and how a worker is confined",
                  (*CLOUD, "status", "cancel", "keygen")),
    "failures": Topic("retries, timeouts, flaky commands, bad hosts, exit statuses", ALL_ROLES),
    "reports": Topic("what to show, JUnit, the HTML page, outputs in files", ("client",)),
    "pytest": Topic("files or batches of tests, hosts, locks, coverage", ("client",)),
    "joblog": Topic("a line for each result; resume, and longest first", ("client",)),
    "json": Topic("an object for each result, on stdout", ("client",)),
    "status": Topic("who is in the cloud; stop a run", ("status", "cancel")),
    "times": Topic("heartbeats, deadlines and leases", CLOUD),
    "promises": Topic("what holds when machines and connections are lost", CLOUD),
    "protocol": Topic("the messages, for peers in other languages", ("broker", "worker")),
    "limits": Topic("how much of what: sizes, counts, memory", CLOUD),
    "environment": Topic("variables, and what a command finds when it starts", ALL_ROLES),
}
MANUAL_WIDTH = 92  # columns of a topic: two windows fit beside each other on a large screen


# --- tables

EXIT_STATUSES: Tuple[Tuple[str, str, str], ...] = (  # role, status, meaning
    ("all roles", f"{WRONG_USAGE}", "wrong usage"),
    ("", f"{UNABLE}", "something is missing: pyzmq, a file, a usable key, room on a disk"),
    ("", "128 + N", "signal N ended it: 130 by Ctrl-C, 143 by SIGTERM"),
    ("", f"{128 + signal.SIGPIPE}", "the reader of its stdout closed it (SIGPIPE)"),
    ("client", "0", "every command was run and exited with 0, in the end (--retries)"),
    ("", f"{SOME_FAILED}", "a command failed, was flaky (--fail-on-flaky) or made no file "
     "(--fail-on-missing); or the result hash differs (--expect)"),
    ("", f"{WRONG_USAGE}", "no commands at all (--allow-empty)"),
    ("", f"{UNABLE}", "not everything could be run or written: no broker, worker or host"),
    ("", "129, 143", "its terminal was closed; `cancel` stopped it"),
    ("broker, worker", f"{WRONG_USAGE}", "a loop of brokers"),
    ("", f"{UNABLE}", "it cannot listen, or (--wait) found no broker"),
    ("status", f"{UNABLE}", "it found no broker (--wait)"),
    ("cancel", f"{SOME_FAILED}", "there is no such client, or it may not be stopped"),
    ("", f"{UNABLE}", "it found no broker (--wait), or none that knows `cancel`"),
)
LIMITS: Tuple[Tuple[str, str], ...] = (
    ("a command", f"{MAX_COMMAND // 1024} KiB of JSON; Linux takes 128 KiB of shell text"),
    ("an output within its result", f"{INLINE // 1024} KiB; a larger one waits on its worker's "
     "disk until it is fetched"),
    ("commands of a client at its broker", f"{WINDOW:,}; the client keeps the others"),
    ("lines for -n by their times", f"{LineTimings.MAX_COMMANDS:,} within {PACK_WAIT:g} s"),
    ("a command of -n", f"{SHELL_TEXT // 1024} KiB: then it has fewer lines"),
    ("results that wait for a client", f"{CREDIT // 2**20} MiB, or {CREDIT // SPOOL_COST} outputs "
     f"over {INLINE // 1024} KiB"),
    ("commands sent ahead", f"{PREFETCH} for each slot, and {PREFETCH_TIME:.0f} ms of work"),
    ("slots of a worker", f"{2**20:,}"),
    ("open files of a worker (ulimit -n)", "2 for each running command, 3 with --raw or --results"),
    ("the name of a lock", "200 characters"),
    ("the name of a command (--results)", f"{NAME_SIZE} bytes, {PART_SIZE} for each part"),
    ("brokers in a chain", str(MAX_DEPTH)),
    ("logins by ssh under way", str(MAX_LOGINS)),
    ("a tree (--sync)", f"{MAX_ENTRIES:,} files and directories; --sync-max"),
    ("an output in --junit", f"its first {JUNIT_HEAD // 1024} and last {JUNIT_TAIL // 1024} KiB; "
     f"all outputs {JUNIT_SIZE // 2**20} MiB"),
    ("a file of --junit-from", f"{JUNIT_FILE_SIZE // 2**20} MiB; {JUNIT_ELEMENTS:,} elements, "
     f"{JUNIT_PARTS:,} in a test case, {JUNIT_DEPTH} within each other"),
    ("an output in --html", f"its first and last {HTML_OUTPUT // 1024} KiB; all outputs "
     f"{HTML_OUTPUTS // 2**20} MiB, of {HTML_ENTRIES:,} failures"),
)


def option_rows(roles: str, *names: str) -> Iterator[Tuple[str, str]]:
    """Yield rows for options of these roles ("client,worker"), which they share."""
    role = roles.partition(",")[0]
    rows = {name: row for row in options_of(role)
            for name in option_names(row) or [row.settings["metavar"]]}
    for name in names:
        row = rows[name]
        value = row.settings.get("metavar", "")
        if row.settings.get("nargs") == "?":
            value = f"[{value}]"
        yield f"{', '.join(option_names(row)) or role} {value}".rstrip(), row.settings["help"]


def time_rows() -> Iterator[Tuple[str, ...]]:
    """Yield rows for the fields of Times: option, default, roles, meaning."""
    for field in Times._fields:
        name = f"--{field.replace('_', '-')}"
        rows = {role: row for role in OPTIONS for row in options_of(role) if name in row.names}
        meaning, _, default = next(iter(rows.values())).settings["help"].partition(" (default: ")
        yield name, default.rstrip(")"), ", ".join(rows), meaning


TABLES: Dict[str, Callable[..., Iterable[Sequence[str]]]] = {
    "@messages": lambda: ((verb, spec.way, spec.means) for verb, spec in MESSAGES.items()),
    "@moves": lambda: ((state, "> " + " ".join(after), STATES[state])
                       for state, after in MOVES.items() if after),
    "@statuses": lambda: EXIT_STATUSES, "@limits": lambda: LIMITS,
    "@variables": lambda: ((name, *row) for name, row in VARIABLES.items()),
    "@options": option_rows, "@times": time_rows}


def fill_topic(text: str) -> Iterator[str]:
    """Yield the lines of a topic, with rows in place of lines with @. Several of these, one after
    the other, make one table."""
    import textwrap  # late: it is rarely needed
    for is_table, lines in itertools.groupby(text.splitlines(), lambda line: line[:1] == "@"):
        if not is_table:
            yield from lines
            continue
        rows = [row for name, *words in map(str.split, lines) for row in TABLES[name](*words)]
        widths = [max(map(len, column)) + 2 for column in zip(*rows)][:-1]
        for *cells, last in rows:
            start = "    " + "".join(cell.ljust(width) for cell, width in zip(cells, widths))
            yield from textwrap.wrap(last, MANUAL_WIDTH, initial_indent=start,
                                     subsequent_indent=" " * len(start), break_on_hyphens=False)


def topic_text(name: str) -> str:
    return "\n".join([f"{name}: {TOPICS[name].summary}", "", *fill_topic(MANUAL[name])])


def nearest_topic(word: str) -> str:
    """Return the topic or role that is spelt like this, else the topic that has the word most
    often; "" if there is none."""
    import difflib  # late: it is rarely needed
    names, word = [*TOPICS, *OPTIONS], word.lower()
    near = difflib.get_close_matches(word, names, 1, 0.75)
    if not near:
        counts = {topic: re.findall("[a-z]+(?:-[a-z]+)*", topic_text(topic).lower()).count(word)
                  for topic in TOPICS}
        near = [topic for topic in TOPICS if counts[topic] == max(counts.values()) > 0]
    return [*near, *difflib.get_close_matches(word, names, 1, 0.5), ""][0]


def show_in_pager(text: str) -> None:
    """Show a text in the user's pager, or the system's. Ctrl-C is for the pager."""
    signal.signal(signal.SIGINT, lambda number, frame: None)
    pagers = os.environ.pop("MANPAGER", ""), os.environ.pop("PAGER", "")
    pager = next(filter(str.strip, pagers), "")
    if not pager:
        import pydoc  # late: it is slow to import
        pydoc.pager(text + "\n")
        return
    import subprocess  # late
    status = subprocess.run(pager, shell=True, input=to_bytes(text + "\n")).returncode
    if status in (NOT_RUN, NOT_FOUND):
        print_line(text)
        print_notice(f"cannot run {printable(pager)}: correct $MANPAGER or $PAGER")


def run_help(settings: argparse.Namespace) -> int:
    """Show a topic, the help of a role, or the topics."""
    topic = settings.topic
    if topic is None:
        print_line("\n".join(["testcloud.py help TOPIC shows one of", "", *(
            f"    {name:13}{summary}" for name, (summary, _) in TOPICS.items()), "",
            "testcloud.py ROLE --help shows the options of a role. The roles:",
            "    " + ", ".join(OPTIONS)]))
    elif topic not in TOPICS:
        if topic in OPTIONS:
            parse([topic, "--help"])  # it exits
        near = nearest_topic(topic)
        hint = f": did you mean {near}?" if near else ""
        raise UsageError(f"no topic '{printable(topic)}'{hint} (see: testcloud.py help)")
    elif sys.stdout is None or not sys.stdout.isatty():
        print_line(topic_text(topic))
    else:
        show_in_pager(topic_text(topic))
    return 0


# === Command line =====================================================================
#
# main() parses the command line and runs a role. Each error that a user can cause becomes one
# line on stderr and an exit status.


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line.

    The help of a role begins with examples and has no other blank lines: it fits a screen."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message} (see: {self.prog} --help)")

    def format_help(self) -> str:
        role, text = self.prog.split()[-1], super().format_help()
        return EXAMPLES.get(role, "") + text.replace("\n\n", "\n") if role in OPTIONS else text


class HelpFormatter(argparse.HelpFormatter):
    """Shows a value once for all names of an option, and only the names that fit in a column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=25, width=80)

    def add_argument(self, action: argparse.Action) -> None:
        if not (self._prog.endswith(CLIENT_ROLE) and HIDDEN.intersection(action.option_strings)):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = f" {self._format_args(action, str(action.metavar))}" if action.nargs != 0 else ""
        text = ", ".join(action.option_strings) + value
        return text if len(text) <= 21 else action.option_strings[0] + value


def role_parser(role: str, make: Callable[..., argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Return the parser of a role, which make() makes."""
    purpose, groups = OPTIONS[role]
    parser = make(prog=f"testcloud.py {role}", description=purpose.capitalize() + ".",
                  usage=f"testcloud.py {role} [OPTIONS]{USAGE.get(role, '')}",
                  add_help=False, allow_abbrev=False, formatter_class=HelpFormatter)
    for title, rows in groups:
        group = parser.add_argument_group(title)
        for row in rows:
            group.add_argument(*row.names, **row.settings)
    group.add_argument(*HELP.names, **HELP.settings)
    topics = [topic for topic, (_, roles) in TOPICS.items() if role in roles]
    parser.epilog = f"topics (testcloud.py help TOPIC): {', '.join(topics)}"
    return parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="testcloud.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"testcloud {__version__}")
    roles = parser.add_subparsers(title="roles", dest="subcommand", required=True, metavar="ROLE")
    for role, (purpose, _) in OPTIONS.items():
        role_parser(role, functools.partial(roles.add_parser, role, help=purpose))
    return parser


# options of xargs, GNU parallel and pytest, and what to do here instead
FOREIGN_OPTIONS = {
    "-P --max-procs --jobs": "use -j N --local, or -S N/HOST; in a cloud each worker has its slots",
    "--numprocesses": "use -j N --local, or -S N/HOST",
    "-a --arg-file": "end the template with :::: FILE",
    "--link --xapply": "put :::+ before the second source",
    "-I --replace -i": "write {} in the template where the line goes",
    "-d --delimiter": "end each argument with a NUL (tr , '\\0'), and use -0",
    "-L --max-lines -N --max-replace-args -X -m --xargs -l": "use -n N",
    "-r --no-run-if-empty": "use --allow-empty", "-q --quote": "write the template as one word",
    "-u --ungroup --line-buffer --linebuffer --lb": "use --live", "--tagstring": "use --tag",
    "--halt --halt-on-error -H --maxfail": "use --fail-fast N",
    "-x --exitfirst": "use --fail-fast, which stops at the first failure",
    "--eta --bar": "use --progress", "--files": "use --results DIR",
    "--wd --workdir": "use --cwd DIR", "--dryrun": "use --dry-run",
    "--retry-failed": "use --resume-failed", "--reruns": "use --retries N",
    "--lf --last-failed": "use --joblog FILE --resume-failed",
    "--dist": "not needed: a command for each file does what loadfile does",
    "--pipe --pipepart --spreadstdin": "commands have no stdin: give them names of files",
    "--transfer --transferfile --trc --basefile --cleanup":
        "--sync takes the whole directory along, and --return FILE brings files back",
    "--nonall --onall": "each command runs once: start a client for each host (-S HOST)",
    "--csv": "use --colsep ,", "--header": "take that line off (tail -n +2), and use {1}",
    "--plus": "of its placeholders only {.}, {/}, {//} and {/.} are known",
    "--shuf": "pipe the input through shuf", "--group": "not needed: only --live mixes outputs",
    "--load": "use --max-load X of a worker (none has it with --local and -S)",
    "--memfree": "use --memfree SIZE of a worker (none has it with --local and -S)",
    "--nice": "use --nice N of a worker; with --local and -S, write nice before each command",
    "--sem --semaphore --id": "use --lock NAME",
    "-M --controlmaster": "not needed; see ControlMaster in ssh_config(5)",
    "--sshdelay": f"not needed: at most {MAX_LOGINS} logins are under way at once",
    "-t": "use --verbose", "--silent": "use --quiet", "--retry": "did you mean --retries?"}


def unknown_argument(role: str, word: str) -> UsageError:
    """Return the error for an argument that a role does not have, with a hint if there is one."""
    name = word.partition("=")[0] if word.startswith("--") else word[:2]
    foreign = FOREIGN_OPTIONS.items() if role == CLIENT_ROLE else ()
    hints = [how for names, how in foreign if name in names.split()]
    if not hints and name.startswith("--"):
        import difflib  # late: it is rarely needed
        ours = [other[2:] for row in options_of(role) for other in row.names
                if other[2:3] == name[2:3]]
        near = difflib.get_close_matches(name[2:], ours, 1, 0.66)
        hints = [f"did you mean --{one}?" for one in near]
    hint = f": {hints[0]}" if hints else ""
    return UsageError(f"{role} has no {'option' if word.startswith('-') else 'argument'} "
                      f"{printable(word)}{hint} (see: testcloud.py {role} --help)")


def parse(argv: List[str]) -> argparse.Namespace:
    """Return the settings of a command line. Raises UsageError."""
    role = argv[0] if argv else "--help"
    if role not in (*OPTIONS, "-h", "--help", "--version"):
        import difflib  # late: it is rarely needed
        near = difflib.get_close_matches(role, OPTIONS, 1, 0.66)
        raise UsageError((f"no role {printable(role)}: did you mean {near[0]}?" if near else
                          f"the role is missing: testcloud.py client {printable(role)} ...")
                         + " (see: testcloud.py --help)")
    if argv and argv[0] in OPTIONS:  # the parser of one role is made in less time
        settings = argparse.Namespace(subcommand=argv[0])
        settings, rest = role_parser(argv[0], Parser).parse_known_args(argv[1:], settings)
    else:
        settings, rest = build_parser().parse_known_args(argv)
    if rest:
        raise unknown_argument(settings.subcommand, rest[0])
    return settings


def is_sync_directory(word: str, after: str) -> bool:
    """Return whether the word after --sync is its DIR, not an option or the template's first;
    after: the next word. Raises UsageError if it may be both."""
    # one that is not there: it ends with /, or a template in quotes follows
    mistyped = not re.search(r"\s", word) and (
        word.endswith("/") or "/" in word and bool(re.search(r"\s", after)))
    if word[:1] in ("", "-") or not (os.path.isdir(word) or mistyped):
        return False
    if "/" not in word and word not in (".", "..") and shutil.which(word):
        raise UsageError(f"--sync {printable(word)}: this is a directory and a command: write "
                         f"--sync={printable(word)}, or --sync -- {printable(word)}")
    return True


def separate_template(argv: List[str]) -> List[str]:
    """Return a client's arguments with -- before the template: its options are not ours. A number
    is joined to its option: argparse would take "-1" for an option, as "-0" is one."""
    valued = {name: "metavar" in row.settings
              for row in options_of(CLIENT_ROLE) for name in row.names}
    separated, rest = [], deque(argv)
    while rest and rest[0].startswith("-") and rest[0] not in ("-", "--"):
        word = rest.popleft()
        name = word
        if not word.startswith("--"):  # -kj 4, -kj4: the first that has a value ends it
            at = next((at for at, c in enumerate(word) if valued.get("-" + c)), 0)
            name = "-" + word[at] if at == len(word) - 1 else ""
        if word == "--fail-fast":
            given = rest and re.fullmatch(r"\d+|-[1-9.].*", rest[0])
            word += "=" + (rest.popleft() if given else "1")
        elif word == "--sync":
            following = [*itertools.islice(rest, 2), "", ""]
            word += "=" + (rest.popleft() if is_sync_directory(*following[:2]) else "")
        elif word == "--sync=":
            raise UsageError("--sync= needs a directory")
        elif valued.get(name) and rest and re.fullmatch(r"-[1-9.].*", rest[0]):
            word += "=" * word.startswith("--") + rest.popleft()
        elif valued.get(name) and rest:
            if rest[0] in SOURCE_MARKS:
                raise UsageError(f"{word} needs a value, before {rest[0]}")
            separated.append(word)
            word = rest.popleft()
        separated.append(word)
    return [*separated, *(["--"] if rest and rest[0] != "--" else []), *rest]


# of each group, those on the command line replace those of $TESTCLOUD
EXCLUSIVE = (("local", "connect", "sshlogin", "sshloginfile", "via"), ("raw", "json", "live"),
             ("serial", "lock"))


def parse_with_own(argv: List[str]) -> argparse.Namespace:
    """Return the settings of a command line; a client's begins with the options of $TESTCLOUD.
    Raises UsageError."""
    if argv[:1] != [CLIENT_ROLE]:
        return parse(argv)
    try:
        own = separate_template(shlex.split(os.environ.get("TESTCLOUD", "")))
        if own and parse([CLIENT_ROLE, *own]).template:
            raise ValueError("it has a template")
    except (ValueError, UsageError) as error:
        raise UsageError(f"$TESTCLOUD is to have options for clients: {error}") from None
    words = separate_template(argv[1:])
    settings = parse([CLIENT_ROLE, *own, *words])
    given = vars(parse([CLIENT_ROLE, *words])) if own else {}
    for names in EXCLUSIVE:
        if any(map(given.get, names)):
            vars(settings).update((name, given[name]) for name in names)
    if own and not names_hosts(settings):  # those of $TESTCLOUD went with its hosts
        for name in ("ssh", "python", *(["slots"] if not settings.local else [])):
            setattr(settings, name, given[name])
    return settings


RUN = {"broker": run_broker, "worker": run_worker, "client": run_client, "status": run_status,
       "cancel": run_cancel, "keygen": run_keygen, "completion": run_completion, "help": run_help}


def main(argv: Optional[List[str]] = None) -> int:
    """Run the program; return its exit status."""
    if os.name != "posix":
        print_notice("needs Linux, macOS or another POSIX system; on Windows use it inside WSL")
        return UNABLE
    make_blocking("stdout")
    make_blocking("stderr")
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, commands have no exit status
        given = sys.argv[1:] if argv is None else argv
        settings = parse_with_own(given)
        settings.argv = given
        verbose = getattr(settings, "verbose", False)  # None: --quiet
        level = logging.DEBUG if verbose else logging.INFO
        if settings.subcommand == CLIENT_ROLE and not verbose:
            level = logging.ERROR if verbose is None else logging.WARNING
        logging.basicConfig(level=level, handlers=[LogHandler()], format="%(asctime)s %(message)s")
        alone = settings.subcommand == CLIENT_ROLE and (settings.local or names_hosts(settings))
        if argv is None and settings.subcommand not in ("completion", "help") and not alone:
            use_venv_python()
        return RUN[settings.subcommand](settings)
    except UsageError as error:
        print_notice(str(error))
        return WRONG_USAGE
    except SetupError as error:
        print_notice(str(error))
        return UNABLE
    except BrokenPipeError:  # the reader of our stdout has closed it, as if SIGPIPE had ended us
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    os._exit(main())  # all is written and closed; Python would take 10 ms to take itself apart
