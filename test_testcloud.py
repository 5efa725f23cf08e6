#!/usr/bin/env python3
"""Tests of testcloud, in the order of the program: python test_testcloud.py [NAME ...]

SIM_SEEDS=N sets how many simulated runs there are, SIM_SEED=N runs only that one and
prints its story. What takes longer: python test_testcloud.py soak|chaos|fuzz|bench --help.
"""
# SPDX-License-Identifier: MIT
from __future__ import annotations

import sys

if __name__ == "__main__" and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    sys.path.append(sys.path.pop(0))  # as the program does, with the same reason

# ruff: noqa: E402
import argparse
import base64
import builtins
import concurrent.futures
import contextlib
import copy
import dis
import errno
import fcntl
import functools
import hashlib
import heapq
import html.parser
import io
import itertools
import json
import logging
import math
import os
import pathlib
import queue
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sysconfig
import tempfile
import threading
import time
import tracemalloc
import types
import unittest
import xml.etree.ElementTree as ET
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from unittest import mock

import testcloud as tc
from testcloud import BROKER, CLIENTS, COMMAND, WORKERS

HERE = os.path.dirname(os.path.abspath(__file__))
SCRIPT = os.path.join(HERE, "testcloud.py")
PATIENCE = 60.0  # seconds a test waits for what must happen; far more than it takes
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"  # a key of the developer's is not for the tests,
os.environ["XDG_CACHE_HOME"] = "/dev/null"  # nor are the timings
for own in ("TESTCLOUD_KEY_FILE", "TESTCLOUD", "TESTCLOUD_BROKER", "SSH_CONNECTION"):
    os.environ.pop(own, None)
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):  # ours may be ignored, theirs not
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


# === Helpers ==========================================================================


class FakeOutput:
    """An output that is only bytes, and the files after it."""

    def __init__(self, data=b"", files=b""):
        self.data = data
        self.size = len(data)
        self.files = files

    def read(self, offset, size):
        return (self.data + self.files)[offset:offset + size]

    def close(self):
        self.data = None


def exit_record(exitcode=0, output=b"", time=1.5, **more):
    return tc.ExitRecord(exitcode, time, 1700000000.0, FakeOutput(output), **more)


def wait_until_full(pipe):
    """Of which we have the end that is written to."""
    end = time.monotonic() + PATIENCE
    while select.select([], [pipe], [], 0)[1] and time.monotonic() < end:
        time.sleep(0.001)


def check_broker(broker):
    """All indexes of a broker agree with each other, and it has no more tasks than it may."""
    broker.check()
    for client in broker.registry.clients.values():
        assert not client.claimed or client.from_above or client.plain \
            or len(client.tasks) <= tc.WINDOW + tc.MAX_DONE


# === Messages =========================================================================


class MessagesTest(unittest.TestCase):
    EXAMPLES = {
        "{": {"cmd": "pi 2", "cwd": "/tmp", "shell": "bash", "id": 1, "attempt": 1, "again": True},
        "HELLO": {"run": "a1", "join": 1, "unreported": [1, 2]},
        "READY": {"name": "w", "slots": 2, "weight": -5, "running": [["a", 1, 1]], "held": [],
                  "below": ["x"], "crew": [["h1", 1], ["h2", 9, "gpu"]], "join": 3, "depth": 1},
        "OK": {"broker": "b", "join": 1, "workers": 2, "slots": 4, "above": []},
        "WHO": {},
        "QUEUED": {"tasks": [[1, 1]], "worker": "w"},
        "RESULT": {"id": 1, "attempt": 1, "exitcode": 3, "stdout": "☃\n\udcff", "time": 1.5},
        "LOST": {"tasks": [[1, 1]], "why": "gone", "fault": "crash"},
        "DONE": {"tasks": [[1, 1], [2, 1]]},
        "CANCEL": {"tasks": []},
        "FETCH": {"id": 1, "attempt": 1, "offset": 0, "size": 10},
        "CHUNK": {"id": 1, "attempt": 1, "offset": 0},
        "RESEND": {"tasks": [[1, 1]]},
        "RECALL": {"tasks": [[1, 1]]},
        "BYE": {},
        "SHUN": {"hosts": ["h"]},
        "STATUS": {"broker": "b", "workers": [], "clients": [{
            "host": "h", "pid": 77, "kind": "client", "there": True, "queued": 1, "running": 2,
            "held": 0, "done": 3, "failed": 1, "waits_for": "a worker"}]},
        "ERROR": {"message": "x", "reason": "y"},
    }

    def test_every_message_survives_the_wire(self):
        self.assertEqual(set(self.EXAMPLES), set(tc.MESSAGES))
        for verb, fields in self.EXAMPLES.items():
            line = tc.encode(verb, fields)
            self.assertNotIn(b"\n", line)
            line.decode("utf-8")
            self.assertEqual(tc.decode(line), (verb, fields))

    def test_bare_verbs(self):
        self.assertEqual(tc.encode("READY"), b"READY")
        self.assertEqual(tc.decode(b"READY"), ("READY", {}))

    def test_any_bytes_survive(self):
        for data in (bytes(range(256)), "☃é\u2028".encode(), b"\xed\xb3\xbf", b"\xff\xfe\x00"):
            line = tc.encode("RESULT", {"exitcode": 0, "stdout": tc.to_text(data)})
            self.assertEqual(tc.to_bytes(tc.decode(line)[1]["stdout"]), data)
            self.assertEqual(tc.to_bytes(json.loads(line[7:])["stdout"]), data)

    def test_bytes_that_are_no_utf_8_are_escapes_beside_characters(self):
        line = tc.encode("{", {"cmd": "☃\udcff"})
        self.assertEqual(line, '{"cmd":"☃\\udcff"}'.encode())

    def test_a_text_that_stands_for_no_bytes_is_still_written(self):
        self.assertEqual(tc.to_bytes("a\ud800"), b"a\xed\xa0\x80")

    MALFORMED = [
        b"NOPE", b"ready", b"READY{}", b"{", b"{]", b'{"cmd":1}', b"{}", b'["cmd"]', b"\xff\xfe",
        b'{"cmd":"x","shell":1}',
        b"QUEUED [", b"QUEUED 5", b'QUEUED {"tasks":5}', b'QUEUED {"tasks":[[1]]}',
        b'QUEUED {"tasks":[[1,"2"]]}', b'QUEUED {"tasks":[[-1,2]]}', b'RESULT {}', b"RESULT",
        b'RESULT {"exitcode":"0"}', b'RESULT {"exitcode":true}', b'RESULT {"exitcode":1.5}',
        b'RESULT {"exitcode":0,"time":NaN}', b'RESULT {"exitcode":0,"time":-1}',
        b'RESULT {"exitcode":0,"stdout":5}', b'RESULT {"exitcode":99999999999}',
        b'HELLO {}', b'HELLO {"run":"a","unreported":[1.5]}', b'READY {"slots":-1}',
        b'READY {"weight":"5"}', b'READY {"running":[["a",1]]}', b'READY {"below":[1]}',
        b'HELLO {"run":""}', b'HELLO {"run":"\xc3\xa9"}',
        b'READY {"held":[["\\ud800",1,1]]}', b'DONE {}', b'LOST {"tasks":[]}',
        b'FETCH {"id":1}', b'READY {"slots":9007199254740993}',
        b'READY {"name":"\xff"}', b"HELLO " + b"[" * 100000,
        b'READY {"slots":1' + b"0" * 9999 + b"}",
        b"\x00" * 1000, b"{" * 5000, b'QUEUED {"tasks":[[1,2,3]]}', b'READY {"crew":[["h"]]}',
        b'READY {"crew":[["h",1048577]]}', b'READY {"crew":[["h",1,5]]}',
        b'DONE {"tasks":[[9007199254740993,1]]}', b'RESULT {"exitcode":2147483648}',
        b'RESULT {"exitcode":0,"time":1e18}', b'HELLO {"run":"' + b"x" * 201 + b'"}',
        b'{"cmd":"x","again":1}', b'{"cmd":"x","env":{"A=":"b"}}', b'{"cmd":"x","env":{"":"b"}}',
        b'{"cmd":"x","env":{"A":1}}', b'{"cmd":"x","env":{"A":"\\u0000"}}', b'WHO {}}',
        b'READY {"colour":NaN}',
    ]

    def test_malformed_lines_raise_a_protocol_error_of_one_line(self):
        for line in self.MALFORMED:
            with self.subTest(line=line[:40]), self.assertRaises(tc.ProtocolError) as caught:
                tc.decode(line)
            self.assertNotIn("\n", str(caught.exception))
            self.assertLess(len(str(caught.exception)), 200)

    def test_an_error_says_which_field_must_be_what(self):
        for line, text in ((b"DONE {}", "DONE needs 'tasks': a list of [id, attempt]"),
                           (b'READY {"slots":-1}', "READY wants 'slots' to be a whole number up to "
                                                   "2**20")):
            with self.assertRaises(tc.ProtocolError) as caught:
                tc.decode(line)
            self.assertEqual(str(caught.exception), text)

    def test_a_row_of_status_has_all_its_fields_and_each_is_checked(self):
        row = self.EXAMPLES["STATUS"]["clients"][0]
        for name in row:
            less = {key: value for key, value in row.items() if key != name}
            bad = [{**row, name: None}] + [less] * (name != "pid")  # older clients do not tell it
            for wrong in bad:
                with self.assertRaises(tc.ProtocolError):
                    tc.decode(tc.encode("STATUS", {"clients": [row, wrong]}))

    def test_unknown_fields_are_allowed(self):
        self.assertEqual(tc.decode(b'READY {"colour":"red"}'), ("READY", {"colour": "red"}))

    def test_printable_shows_no_control_characters(self):
        self.assertEqual(tc.printable(b"a\x1b[31m\n\xff"), "a\\x1b[31m\\n\ufffd")
        self.assertEqual(tc.printable("x" * 100, 5), "xxxxx...")

    def test_a_command_keeps_tabs_and_what_may_be_letters_elsewhere(self):
        self.assertEqual(tc.escape_command("a\tb☃\udca0\udc9b\x1b\n\u202e"),
                         "a\tb☃\udca0\\x9b\\x1b\\n\\u202e")

    def test_the_ends_of_a_long_text_stay(self):
        for text, limit, wanted in (("abcdefgh", 8, "abcdefgh"), ("abcdefghi", 8, "abc...hi"),
                                    ("abcdefghi", 7, "ab...hi")):
            self.assertEqual(tc.truncate_middle(text, limit), wanted)

    def test_lines_fill_bodies_up_to_a_limit(self):
        lines = [b"1234", b"5", b"67890", b"x" * 20, b"y", b"z"]
        self.assertEqual([*tc.batch_lines(lines, 10)], [b"1234\n5\n67890", b"x" * 20, b"y\nz"])
        self.assertEqual([*tc.batch_lines(lines, 9)], [b"1234\n5", b"67890", b"x" * 20, b"y\nz"])
        self.assertEqual([*tc.batch_lines(lines, 0)], lines)

    def test_names_are_tied_to_a_key_by_16_digits(self):
        self.assertRegex(tc.fingerprint("a key"), "^[0-9a-f]{16}$")
        self.assertNotEqual(tc.fingerprint("a key"), tc.fingerprint("another"))
        self.assertEqual(tc.fingerprint(""), "")

    def test_parts_of_outputs_leave_after_all_lines(self):
        machine = tc.Machine()
        chunk = tc.Outgoing(CLIENTS, b"c", "", b"CHUNK {}", b"abc")
        machine.bulk.append(chunk)
        machine.say(CLIENTS, b"d", "", "OK")
        self.assertEqual(machine.take()[0], [tc.Outgoing(CLIENTS, b"d", "", b"OK", b""), chunk])
        self.assertEqual(machine.take(), ([], []))


# === Trees ============================================================================


def file_entry(path, content=b"", mode=0o644, mtime=0):
    return tc.Entry(path, tc.FILE, mode, len(content), hashlib.sha256(content).hexdigest(), mtime)


def directory_entry(path, mode=0o755):
    return tc.Entry(path, tc.DIRECTORY, mode, 0, "", 0)


def link_entry(path, target):
    return tc.Entry(path, tc.LINK, 0, 0, target, 0)


class TreesTest(unittest.TestCase):

    def tree(self):
        return tc.make_tree({"origin": "me", "name": "demo"}, [
            file_entry("a.txt", b"hello"), file_entry("b/c", b"12345678"), directory_entry("b"),
            directory_entry("a"), file_entry("a/empty"), link_entry("z", "b/c"),
            file_entry("a/\udcff\n", b"xyz")])

    def test_a_manifest_is_read_as_it_was_written(self):
        tree = self.tree()
        again = tc.parse_tree(tree.manifest)
        self.assertEqual((again.head, again.entries, again.id, again.offsets),
                         (tree.head, tree.entries, tree.id, tree.offsets))
        self.assertEqual([entry.path for entry in tree.entries],
                         ["a", "a.txt", "a/empty", "a/\udcff\n", "b", "b/c", "z"])
        self.assertEqual(tree.size, 16)

    def test_spans_and_pieces_are_inverse(self):
        tree = self.tree()
        start = len(tree.manifest)
        self.assertEqual(tree.spans_of([0, 1, 2, 3]), [(start, 8)])
        self.assertEqual(tree.spans_of([1, 5]), [(start, 5), (start + 8, 8)])
        self.assertEqual([*tree.pieces_of([(start, 16)])], [(1, 0, 5), (3, 0, 3), (5, 0, 8)])
        self.assertEqual([*tree.pieces_of([(start + 4, 2), (start + 15, 9)])],
                         [(1, 4, 1), (3, 0, 1), (5, 7, 1)])
        self.assertEqual([*tree.pieces_of([(0, start), (10**9, 5)])], [])
        for seed in range(200):
            rng = random.Random(seed)
            offset, size = rng.randrange(start + 20), rng.randrange(20)
            covered = sum(size for _, _, size in tree.pieces_of([(offset, size)]))
            inside = max(0, min(offset + size, start + 16) - max(offset, start))
            self.assertEqual(covered, inside, seed)

    def test_hostile_manifests(self):
        def packed(value):
            return zlib.compress(json.dumps(value).encode())
        good = [*file_entry("x")]
        for what, manifest in {
                "no manifest": b"nonsense", "no manifest: ": packed(7), "head": packed([7, []]),
                "bytes": zlib.compress(b"[" + b" " * (tc.MAX_MANIFEST + 1)),
                "is the limit": packed([{}, [0] * (tc.MAX_ENTRIES + 1)]),
                "more": zlib.compress(b"," * (10 * tc.MAX_ENTRIES + 1)),  # not even parsed
                "head is": packed([{"setup": 7}, []])}.items():
            with self.subTest(what), self.assertRaises(tc.TreeError) as raised:
                tc.parse_tree(manifest)
            self.assertIn(what.split(":")[0].split()[-1], str(raised.exception))
        self.assertEqual(tc.parse_tree(packed([{}, [good]])).entries[0].path, "x")
        for at, values in enumerate((
                ("", "/x", "../x", "a/../x", "./x", "a//x", "x/", "\0", 7, None), ("x", 1, "d"),
                (-1, 0o1000, "7", True and 2.0), (-1, 2**60, "1"),
                ("", "ab", "Z" * 64, "../" + "0" * 61, 7), ("", 1.5, None))):
            for value in values:
                entry = [*good]
                entry[at] = value
                with self.subTest(at=at, value=value), self.assertRaises(tc.TreeError):
                    tc.parse_tree(packed([{}, [entry]]))
        for rows in ([file_entry("x"), file_entry("x")], [file_entry("b"), file_entry("a")],
                     [file_entry("a/b")], [link_entry("a", "/etc"), file_entry("a/passwd")],
                     [file_entry("a"), file_entry("a/b")], [link_entry("a", "")]):
            with self.subTest(rows), self.assertRaises(tc.TreeError):
                tc.parse_tree(packed([{}, rows]))


class TreeFetcherTest(unittest.TestCase):

    def setUp(self):
        self.asked = []
        self.fetcher = tc.TreeFetcher(lambda spans, flags: self.asked.append((spans, flags)))

    def accept(self, offset, size, now=0.0):
        spans = self.fetcher.accept(offset, size, now)
        self.fetcher.check()
        return spans

    def take(self):
        asked, self.asked = self.asked, []
        self.fetcher.check()
        return asked

    def test_a_long_span_comes_in_chunks_and_only_so_many_are_under_way(self):
        size = tc.CHUNK_SIZE
        self.fetcher.fetch([(100, 20 * size + 1)], 0.0)
        asked = self.take()
        self.assertEqual(asked[0], ([(100, size)], {"anew": True}))
        self.assertEqual(asked[1:], [([(100 + n * size, size)], {})
                                     for n in range(1, tc.FETCH_AHEAD)])
        self.assertEqual(self.accept(100 + size, size), [])  # not the next
        self.assertEqual(self.accept(100, size - 1), [])
        self.assertEqual(self.accept(100, size), [(100, size)])
        self.assertEqual(self.take(), [])  # it is not stored yet
        self.fetcher.stored(1.0)
        self.assertEqual(self.take(), [([(100 + tc.FETCH_AHEAD * size, size)], {})])
        self.assertEqual(self.accept(100, size), [])  # it comes twice

    def test_who_has_nothing_more_to_ask_for_tells_what_has_come(self):
        """Else the client would hold back the rest: it cannot know that there is room."""
        self.fetcher.fetch([(0, 2 * tc.CHUNK_SIZE)], 0.0)
        self.take()
        self.accept(0, tc.CHUNK_SIZE)
        self.assertEqual(self.take(), [])
        self.fetcher.stored(0.0)
        self.assertEqual(self.take(), [([], {})])
        self.accept(tc.CHUNK_SIZE, tc.CHUNK_SIZE)
        self.fetcher.stored(0.0)  # the client sends no more
        self.assertEqual(self.take(), [])

    def test_short_spans_share_a_request(self):
        spans = [(10 * n, 3) for n in range(tc.MAX_SPANS + 1)]
        self.fetcher.fetch(spans, 0.0)
        self.assertEqual(self.take(), [(spans[:-1], {"anew": True}), (spans[-1:], {})])
        self.assertEqual(self.accept(0, 3 * tc.MAX_SPANS), spans[:-1])
        self.assertEqual(self.accept(10 * tc.MAX_SPANS, 3), spans[-1:])
        self.assertEqual(self.fetcher.overdue_at, math.inf)

    def test_what_does_not_come_is_asked_for_again(self):
        self.fetcher.fetch([(0, tc.CHUNK_SIZE + 5), (10**7, 2)], 0.0)
        first = self.take()
        self.assertEqual([spans for spans, _ in first],
                         [[(0, tc.CHUNK_SIZE)], [(tc.CHUNK_SIZE, 5), (10**7, 2)]])
        self.fetcher.tick(tc.TREE_TIMEOUT - 0.1)
        self.assertEqual(self.take(), [])
        self.accept(0, tc.CHUNK_SIZE, 10.0)
        self.fetcher.tick(tc.TREE_TIMEOUT + 9.9)
        self.assertEqual(self.take(), [])
        self.fetcher.tick(tc.TREE_TIMEOUT + 10)
        self.assertEqual(self.take(), [(first[1][0], {"anew": True})])

    def test_what_had_the_wrong_hash_comes_first_and_is_marked(self):
        self.fetcher.fetch([(0, tc.FETCH_AHEAD * tc.CHUNK_SIZE), (10**9, 7)], 0.0)
        self.take()
        self.accept(0, tc.CHUNK_SIZE)
        self.fetcher.fetch_again([(5, 10), (50, 1)], 0.0)
        self.fetcher.stored(0.0)
        self.assertEqual(self.take(), [([(5, 10), (50, 1), (10**9, 7)], {"again": True})])

    def test_it_can_be_told_to_stop(self):
        self.fetcher.fetch([(0, 5)], 0.0)
        self.fetcher.stop()
        self.fetcher.tick(1000.0)
        self.fetcher.stored(0.0)  # of before
        self.assertEqual(len(self.take()), 1)
        self.assertEqual(self.accept(0, 5), [])
        self.fetcher.fetch([(7, 5)], 0.0)
        self.assertEqual(self.take(), [([(7, 5)], {"anew": True})])


class TreeOfferTest(unittest.TestCase):

    def setUp(self):
        self.offer = tc.TreeOffer()
        self.offer.tree = tc.make_tree({}, [])

    def ask(self, id, number, got=0, host="h", now=0.0, **more):
        self.offer.add({"id": id, "attempt": 1, "offset": number * tc.CHUNK_SIZE, "got": got,
                        "size": tc.CHUNK_SIZE, "of": 100 * tc.CHUNK_SIZE, **more}, host, now)

    def answered(self):
        found = [(fields["id"], fields["offset"] // tc.CHUNK_SIZE)
                 for fields in self.offer.next_requests()]
        self.offer.check({1: None, 2: None, 3: None})
        return found

    def test_workers_take_turns_and_share_what_is_under_way(self):
        for id in (1, 2, 3):
            for number in range(tc.FETCH_AHEAD):
                self.ask(id, number)
        limit = tc.OFFERED_AHEAD // tc.CHUNK_SIZE
        self.assertEqual(self.answered(), [(at % 3 + 1, at // 3) for at in range(limit)])
        self.ask(3, tc.FETCH_AHEAD, got=2 * tc.CHUNK_SIZE)  # it has got two
        self.assertEqual(len(self.answered()), 2)
        self.offer.forget(1)
        self.assertEqual({id for id, _ in self.answered()}, {2, 3})
        self.offer.forget(2)
        self.offer.forget(3)
        self.assertEqual(self.offer.on_way, 0)

    def test_a_worker_may_only_tell_what_it_has_got(self):
        for id in (1, 2, 3):
            for number in range(tc.FETCH_AHEAD):
                self.ask(id, number)
        self.answered()
        self.assertEqual(self.answered(), [])
        self.ask(2, 0, got=tc.CHUNK_SIZE, size=0)
        self.assertEqual(len(self.answered()), 1)
        self.ask(2, 0, got=tc.CHUNK_SIZE, size=0)
        self.assertEqual(self.answered(), [])

    def test_each_worker_gets_one_answer_whatever_is_under_way(self):
        self.offer.on_way = 0
        for number in range(20):
            self.ask(1, number)
        self.answered()
        self.ask(2, 0)
        self.ask(2, 1)
        self.assertEqual(self.answered(), [(2, 0)])

    def test_a_worker_that_asks_anew_has_lost_the_answers(self):
        for number in range(20):
            self.ask(1, number)
        self.assertEqual(len(self.answered()), 16)
        self.ask(1, 3, got=3 * tc.CHUNK_SIZE, anew=True)
        self.assertEqual(self.answered(), [(1, 3)])
        self.assertEqual(self.offer.on_way, tc.CHUNK_SIZE)

    def test_what_takes_long_is_said(self):
        self.ask(1, 0, host="alpha")
        self.ask(1, 1, got=12_300_000, host="alpha")
        self.assertEqual(self.offer.words(0.9), [])
        self.assertEqual(self.offer.words(1.0), ["sending 12.3 of 52 MB to alpha"])
        self.offer.note_setup(1, "alpha", 2.0)
        self.assertEqual(self.offer.words(2.9), [])
        self.assertEqual(self.offer.words(3.0), ["running the setup on alpha for 1 s"])


class PathBelowTest(unittest.TestCase):
    def test_only_files_below_the_top_have_a_path(self):
        for cwd, path, found in (
                ("", "a", "a"), (".", "./a//b/", "a/b"), ("sub", "../a", "a"),
                ("s", "../s/a", "s/a"), ("s/t", "../../a\udcff", "a\udcff"),
                ("s", "x/../a", "s/a"), ("", "..a/...", "..a/..."),
                *((cwd, path, "") for cwd, path in (
                    ("", ""), ("", "."), ("s", ".."), ("", "../a"), ("s", "../../a"), ("", "/a"),
                    ("s", "/s/a"), ("..", "a"), ("", "a/../.."), ("", "a\0"), ("", "//a")))):
            self.assertEqual(tc.path_below(cwd, path), found, (cwd, path))


# === Scheduler ========================================================================


class SmallWorld:
    """A scheduler with a few workers, clients and tasks, beside an oracle that decides by brute
    force: it looks at the plain facts, without ranking, caches or limits."""

    HOSTS, LABELS = "gh", "xy"

    def __init__(self, seed):
        self.r = random.Random(seed)
        self.trees = self.r.choice((0.0, 0.5, 1.0))  # so many of the tasks need one
        self.prepared = set()  # (worker, client)
        self.scouts = {}  # the worker of each task that is preparing, the oldest first
        self.recalled = set()  # of these
        self.now = 0.0
        self.scheduler = tc.Scheduler()
        self.scheduler.has_lease = True
        self.clients = [tc.ClientRecord(f"r{n}", n == 2, b"") for n in range(self.r.randint(1, 3))]
        self.workers = []  # all that are not removed
        self.names = itertools.count()
        self.waited = Counter()  # decisions for others while a client had a task to be decided
        self.seen = Counter()
        for _ in range(self.r.randint(0, 3)):
            self.come()

    # the oracle

    def eligible(self, task):
        wanted = task.constraints
        places = [(host, worker) for worker in self.scheduler.workers
                  for (host, labels), slots in worker.capacity.items()
                  if slots and wanted.needs <= labels and host not in wanted.never_on
                  and not (self.scheduler.expecting and host == wanted.not_on)]
        for meets in (lambda host, worker: host not in task.client.excluded,
                      lambda host, worker: host == wanted.on,
                      lambda host, worker: host != wanted.not_on,
                      lambda host, worker: worker.name != wanted.avoid):
            places = [place for place in places if meets(*place)] or places
        return {worker for _, worker in places}

    def may_start(self, client):
        return client.owed < tc.CREDIT and (not client.from_above or self.scheduler.has_lease)

    def fits(self, worker, task):
        def busy_with(labels):
            return sum(other.constraints.needs == labels for other in self.busy(worker))
        needs = task.constraints.needs
        return not needs or len(worker.capacity) == 1 or busy_with(needs) < sum(
            slots for (_, labels), slots in worker.capacity.items() if needs <= labels)

    def busy(self, worker):
        return [task for task in worker.tasks.values()
                if task.state in tc.BUSY and task not in self.scouts]

    def is_scout(self, task, worker):
        return tc.TREES in task.constraints.needs and (worker, task.client) not in self.prepared

    def scouts_at(self, worker, client):
        return sum(task.client is client and at is worker for task, at in self.scouts.items())

    def may_prepare(self, worker, task):
        scouts = self.scouts_at(worker, task.client)
        if self.is_scout(task, worker):
            return scouts < len({host for (host, labels), slots in worker.capacity.items()
                                 if slots and task.constraints.needs <= labels})
        return tc.TREES not in task.constraints.needs or not scouts \
            or worker.slots - len(self.busy(worker)) > scouts

    def is_reserved(self, worker, task, reserved):
        holder = reserved.get(worker)
        return holder not in (None, task) and holder.state == tc.WAITING \
            and self.may_start(holder.client) and self.fits(worker, holder) \
            and worker in self.eligible(holder)

    def best(self, task, reserved, prefetch):
        """The workers of which each would be the best for this task."""
        def is_free_for(worker):
            busy = self.busy(worker)
            ahead = 0 if any(other.careful for other in busy) else prefetch[worker]
            if not worker.ready or len(busy) >= worker.slots + ahead \
                    or not self.fits(worker, task) or not self.may_prepare(worker, task):
                return False
            return not self.is_reserved(worker, task, reserved)

        def rank(worker):
            free = worker.slots - len(self.busy(worker))
            order = 2 if worker.silent else int(free <= 0)
            return (order, self.is_scout(task, worker), worker.name == task.avoid, -worker.weight,
                    -free)
        able = list(filter(is_free_for, self.eligible(task)))
        return {worker for worker in able if rank(worker) == min(map(rank, able))}

    def is_unplaceable(self, task):
        never, workers = task.constraints.never_on, self.scheduler.workers
        if self.scheduler.expecting:
            return False
        if self.eligible(task) or not never and not task.client.from_above:
            return False
        if never and any(host not in never for worker in self.scheduler.away
                         for host, _ in worker.capacity):
            return False
        return any(worker.slots for worker in workers) or not any(
            task.constraints.needs <= labels for worker in workers
            for _, labels in worker.capacity)

    def next_tasks(self, client):
        heads = [[task for task in queue if task.state == tc.WAITING][:1]
                 for queue in (*client.retries.values(), client.waiting)]
        return [task for head in heads for task in head] if self.may_start(client) else []

    def decide(self):
        """For each client in turn: the task to be decided, and its best workers."""
        reserved = dict(self.scheduler.reservations)
        prefetch = {worker: worker.prefetch for worker in self.scheduler.workers}
        found = {}
        for client in self.scheduler.turns:
            for task in self.next_tasks(client):
                best = self.best(task, reserved, prefetch)
                if best and all(len(self.busy(worker)) >= worker.slots
                                and not self.is_scout(task, worker) for worker in best) and (
                        task.careful or self.all_may(task)):
                    if len(best) > 1:  # either may be reserved: only one outcome is told apart
                        return found, True
                    (worker,) = best
                    reserved[worker], prefetch[worker] = task, 0
                elif best or self.is_unplaceable(task):
                    found[client] = task, best
                    break
        return found, False

    def all_may(self, task):
        return self.eligible(task) != {w for w in self.scheduler.workers if w.slots}

    # what happens

    def set_lease(self, has_lease):
        self.scheduler.has_lease = has_lease
        for client in self.clients:
            self.scheduler.take_turn(client)

    def come(self):
        worker = tc.WorkerRecord(b"", f"w{next(self.names)}", False)
        self.workers.append(worker)
        self.scheduler.add_worker(worker)
        self.change(worker)

    def change(self, worker):
        rows = {(self.r.choice(self.HOSTS),
                 frozenset([*self.r.sample(self.LABELS, self.r.randint(0, 2)),
                            *[tc.TREES] * (self.r.random() < 0.8)])):
                self.r.randint(0, 2) for _ in range(self.r.choice((1, 1, 1, 2)))}
        worker.silent = self.r.random() < 0.1
        self.scheduler.change_worker(worker, sum(rows.values()), self.r.choice((0, 0, 1)), rows)
        self.scheduler.rank(worker)

    def submit(self, client=None, attempt=1, avoid=""):
        client = client or self.r.choice(self.clients)
        client.last_id += 1
        task = tc.Task(client, client.last_id, attempt, b"{}")
        task.avoid, task.careful = avoid, attempt > 1 and self.r.random() < 0.2
        if self.r.random() < 0.4:
            def some(kinds):
                return frozenset(self.r.sample(kinds, self.r.choice((0, 0, 1, 2))))
            task.constraints = tc.Constraints(
                some(self.LABELS), on=self.r.choice(["", *self.HOSTS]),
                not_on=self.r.choice(["", *self.HOSTS]), avoid=self.r.choice(["", avoid]),
                never_on=some(self.HOSTS) if self.r.random() < 0.5 else frozenset())
        if self.r.random() < self.trees:
            task.constraints = task.constraints._replace(
                needs=task.constraints.needs | {tc.TREES})
        client.tasks[task.id] = task
        self.scheduler.submit(task, attempt > 1)

    def again(self, task):
        worker = task.worker
        self.scheduler.move(task, tc.GONE, None, self.now)
        self.scouts.pop(task, None)
        self.recalled.discard(task)
        self.submit(task.client, task.attempt + 1, worker.name if worker else "")

    def say_preparing(self, task, preparing):
        """The worker of a running task says how far its workspace is, if it is connected."""
        if task.worker not in self.scheduler.workers:
            return
        if task.preparing != preparing:
            self.recalled.discard(task)
            self.scouts.pop(task, None)
        if preparing:
            self.prepared.discard((task.worker, task.client))
            self.scouts[task] = task.worker
        else:
            self.scouts.pop(task, None)
            if tc.TREES in task.constraints.needs:
                self.prepared.add((task.worker, task.client))
        self.scheduler.prepare(task, preparing, self.now)

    def forget_prepared(self, worker):
        self.prepared = {pair for pair in self.prepared if pair[0] is not worker}

    def end(self, task):
        worker = task.worker
        self.scheduler.learn_duration(worker, self.r.choice((1.0, 1.0, 1.0, 1000.0)))
        self.scouts.pop(task, None)
        self.recalled.discard(task)
        self.scheduler.move(task, tc.DELIVERED, worker, self.now)
        self.scheduler.charge(task, self.r.choice((1, 1, 1, tc.CREDIT)))

    def step(self):
        r, running = self.r, [task for worker in self.workers for task in self.busy(worker)]
        there = list(self.scheduler.workers)
        kind = r.randrange(20)
        if kind < 5:
            client = r.choice(self.clients)
            for _ in range(r.choice((1, 1, 2, 5))):
                self.submit(client)
        elif kind < 8 and running:
            for task in r.sample(running, r.randint(1, len(running))):
                self.end(task)
        elif kind == 8 and running:
            self.again(r.choice(running))
        elif kind == 9 and len(self.workers) < 4:
            self.come()
        elif kind == 10 and there:
            self.change(r.choice(there))
        elif kind == 11 and there:
            worker = r.choice(there)
            self.forget_prepared(worker)
            self.scheduler.suspend_worker(worker)
        elif kind == 12 and self.workers:
            worker = r.choice(self.workers)
            self.forget_prepared(worker)
            if worker in self.scheduler.away and r.random() < 0.5:
                self.scheduler.add_worker(worker)
                self.change(worker)
            else:
                self.workers.remove(worker)
                self.scheduler.remove_worker(worker)
                for task in list(worker.tasks.values()):
                    self.again(task)
        elif kind == 13:
            holders = [task.client for task in self.scheduler.reservations.values()]
            client = r.choice(holders or self.clients)
            client.excluded = frozenset(r.sample(self.HOSTS, r.randint(0, 2)))
        elif kind == 14:
            self.set_lease(not self.scheduler.has_lease)
        elif kind == 15:
            for client in self.clients:
                for task in list(client.tasks.values()):
                    if task.state == tc.DELIVERED or task.state == tc.WAITING and r.random() < 0.1:
                        self.scheduler.move(task, tc.GONE, None, self.now)
        elif kind == 16:
            self.scheduler.expect(not self.scheduler.expecting)
        elif kind < 19 and self.scouts:
            for task in r.sample([*self.scouts], r.randint(1, len(self.scouts))):
                self.say_preparing(task, r.choice(("", "", "", tc.SETUP)))
        elif kind == 19 and running:
            self.say_preparing(r.choice(running), tc.FILES)
        self.now += r.choice((0.0, 0.01, 1.0))

    def settle(self):
        """Carry out all decisions, each compared with the oracle's."""
        for task in self.scheduler.unplaceable(self.clients):
            assert self.is_unplaceable(task)
            self.scheduler.move(task, tc.GONE, None, self.now)
        for client in self.clients:
            assert client.in_turn or not self.next_tasks(client), "nobody will look at it"
            assert client.owed == sum(task.cost for task in client.tasks.values())
        for worker in self.workers:
            assert worker.prepared == {it for at, it in self.prepared if at is worker}
        decisions = self.scheduler.decisions()
        while True:
            expected, either = self.decide()
            task, worker = next(decisions, (None, None))
            if either:
                self.seen["either"] += 1
            elif task is None:
                has_room = any(worker.has_room() for worker in self.scheduler.workers)
                for waiting, best in expected.values():
                    assert not best and not has_room, f"left waiting: {waiting.key}"
            else:
                client, (wanted, best) = next(iter(expected.items()))
                assert task is wanted, f"{task.key} before {wanted.key}"
                assert worker in best or not best and worker is None, f"{worker} is not of {best}"
            if task is None:
                break
            assert worker is None or worker in self.eligible(task) and worker.has_room()
            for client in self.clients:
                waits = client in expected and client is not task.client
                self.waited[client] = self.waited[client] + 1 if waits else 0
                assert self.waited[client] < 2 * len(self.clients), "unfair"
            if worker is None:
                self.seen["unplaceable"] += 1
                self.scheduler.move(task, tc.GONE, None, self.now)
            else:
                is_scout = self.is_scout(task, worker)
                self.seen["scout" if is_scout else "beyond slots" if worker.free() <= 0
                          else "free slot"] += 1
                self.seen["constrained"] += task.constraints != tc.UNCONSTRAINED
                self.scheduler.move(task, tc.ASSIGNED, worker, self.now)
                if is_scout:
                    self.scouts[task] = worker
                self.scheduler.move(task, tc.RUNNING, worker, self.now)
                if is_scout or tc.TREES in task.constraints.needs and self.r.random() < 0.1:
                    self.say_preparing(task, self.r.choice((tc.FILES, tc.FILES, "")))
        self.seen["reserved"] += len(self.scheduler.reservations)
        assert len(self.scheduler.eligible_for) <= tc.MAX_CACHED_CONSTRAINTS
        self.scheduler.check()

    def recall(self):
        free = [worker for worker in self.scheduler.workers if worker.ready and not worker.silent
                and len(self.busy(worker)) < worker.slots]
        prefetched = dict(self.scheduler.prefetched)
        queued = [task for worker in self.workers if worker.ready
                  for task in self.busy(worker) if len(self.busy(worker)) > worker.slots]
        scouts = self.scouts_to_recall()
        recalled = self.scheduler.recalls(self.now)
        assert len({*recalled}) == len(recalled)
        recalled = self.recall_scouts(scouts, recalled)
        self.seen["recalled"] += len(recalled)
        if {*free} - self.scheduler.reservations.keys() and prefetched.keys() & {*queued}:
            assert recalled, "a slot is free, and tasks wait elsewhere"
        assert free or not recalled or self.now >= min(
            prefetched[task] for task in recalled) + tc.RECALL_DELAY
        for task in recalled:
            assert len(self.busy(task.worker)) > task.worker.slots and not task.worker.prefetch
        for task in recalled:
            self.again(task)

    def scouts_to_recall(self):
        """For each client with nothing that waits: the scouts that fit a free slot of a worker that
        is prepared, and how many such slots no other scout is promised."""
        found = {}
        for client in self.clients:
            def room(worker, client=client):
                ours = (worker, client) in self.prepared and worker.ready and not worker.silent
                return ours * (worker.slots - len(self.busy(worker))
                               - self.scouts_at(worker, client))
            ours = [worker for worker in self.workers if room(worker) > 0]
            movable = {task for task, at in self.scouts.items()
                       if task.client is client and task not in self.recalled
                       and any(it is not at and it in self.eligible(task) and self.fits(it, task)
                               and not self.is_reserved(it, task, self.scheduler.reservations)
                               for it in ours)}
            if not self.next_tasks(client) and self.may_start(client):
                found[client] = movable, sum(map(room, ours)) - len(self.recalled)
        return found

    def recall_scouts(self, expected, recalled):
        """Recall the scouts among these tasks; the others."""
        scouts = [task for task in recalled if task in self.scouts]
        for client in self.clients:
            movable, room = expected.get(client, (set(), 0))
            mine = [task for task in scouts if task.client is client]
            assert {*mine} <= movable and len(mine) == min(len(movable), max(room, 0)), (
                [task.key for task in mine], [task.key for task in movable], room)
        self.recalled.update(scouts)
        for task in scouts:
            self.seen["recalled scout"] += 1
            if self.r.random() < 0.8:  # else its answer takes a while
                self.again(task)
        return [task for task in recalled if task not in scouts]

    def run(self, steps):
        for _ in range(steps):
            self.step()
            self.settle()
            self.recall()
            self.settle()
        self.finish()
        return self.seen

    def finish(self):
        """Nobody starves: when what runs ends, what is placeable runs, in as many steps."""
        self.set_lease(True)
        self.scheduler.expect(False)
        for worker in [*self.scheduler.away]:
            self.scheduler.add_worker(worker)
            self.scheduler.change_worker(worker, worker.slots, worker.weight, worker.capacity)
        for _ in range(10 + 2 * sum(len(client.tasks) for client in self.clients)):
            for client in self.clients:
                for task in [task for task in client.tasks.values() if task.state == tc.DELIVERED]:
                    self.scheduler.move(task, tc.GONE, None, self.now)
            self.settle()
            for task in [*self.scouts]:
                self.say_preparing(task, "")
            running = [task for worker in self.workers for task in self.busy(worker)]
            if running:
                self.end(self.r.choice(running))
        for client in self.clients:
            for task in self.next_tasks(client):
                assert not self.eligible(task), f"{task.key} starves"


class SchedulerTest(unittest.TestCase):
    WORLDS = 4000  # and 100 for each seed of `make soak`

    def run_worlds(self, seeds):
        seen = Counter()
        for seed in seeds:
            limits = random.Random(seed)
            try:
                with mock.patch.multiple(
                        tc, MAX_PASSED_OVER=limits.randint(0, 4),
                        MAX_CACHED_CONSTRAINTS=limits.randint(1, 4)):
                    seen += SmallWorld(seed).run(steps=limits.randint(1, 24))
            except Exception as error:
                raise AssertionError(f"small world {seed}: {error!r}") from error
        return seen

    def test_it_decides_as_brute_force_does(self):
        seen = self.run_worlds(range(self.WORLDS))
        for kind in ("free slot", "beyond slots", "constrained", "reserved", "unplaceable",
                     "recalled", "scout"):
            self.assertGreater(seen[kind], self.WORLDS // 50, seen)
        self.assertGreater(seen["recalled scout"], self.WORLDS // 100)
        self.assertLess(seen["either"], self.WORLDS)


# === Registry =========================================================================


class RegistryTest(unittest.TestCase):
    """Who is there, without any message: `now` is all that passes."""

    TIMES = tc.Times(worker_expiry=10, client_lease=30, lost_grace=1, ready_interval=2)

    def setUp(self):
        self.registry = tc.Registry(self.TIMES)
        self.addCleanup(self.registry.check)

    def worker(self, name, peer=b"w", now=0.0, **more):
        worker = self.registry.add_worker(name, name)
        for key, value in more.items():
            setattr(worker, key, value)
        self.registry.connect_worker(worker, peer, now)
        return worker

    def client(self, run, peer=b"c", now=0.0):
        client = self.registry.require_client(run, False, peer, now)
        self.registry.connect_client(client, peer)
        return client

    def test_a_client_that_comes_back_is_known_at_its_new_peer_only(self):
        client = self.client("r")
        self.registry.disconnect_client(b"c")
        self.assertIsNone(client.peer)
        self.assertIsNone(self.registry.client_at(b"c"))
        self.assertIs(self.client("r", b"d"), client)
        self.assertIs(self.client("r", b"e"), client)
        self.assertEqual((self.registry.client_at(b"d"), self.registry.client_at(b"e")),
                         (None, client))

    def test_a_run_of_which_only_workers_spoke_belongs_to_the_first_client(self):
        unclaimed = self.registry.require_client("r", True, None, 0.0)
        self.assertFalse(unclaimed.claimed)
        self.assertIs(self.client("r"), unclaimed)
        self.assertEqual((unclaimed.claimed, unclaimed.link), (True, CLIENTS))

    def test_a_run_that_is_over_is_remembered_for_a_lease(self):
        self.registry.remove_client(self.client("r"), 5.0)
        self.assertEqual((self.registry.clients, self.registry.run_of), ({}, {}))
        self.assertIn("r", self.registry.departed)
        self.assertEqual(self.registry.deadline(), 35.0)
        self.registry.overdue_workers(34.9)
        self.assertIn("r", self.registry.departed)
        self.registry.overdue_workers(35.0)
        self.assertFalse(self.registry.departed)
        self.registry.remove_client(self.client("r"), 50.0)
        self.client("r")
        self.assertFalse(self.registry.departed)

    def test_a_broken_connection_has_a_grace_and_that_of_a_broker_is_longer(self):
        worker, broker = self.worker("w"), self.worker("b", b"b", below=["b"])
        for it in (worker, broker):
            self.registry.disconnect_worker(it, 5.0)
        self.assertEqual((self.registry.away, self.registry.workers),
                         ({worker: 6.0, broker: 15.0}, {}))
        self.assertEqual(self.registry.overdue_workers(6.0), [worker])
        self.registry.remove_worker(worker)
        self.registry.connect_worker(broker, b"b2", 7.0)
        self.assertEqual(self.registry.workers, {b"b2": broker})
        self.assertEqual(self.registry.overdue_workers(99.0), [])

    def test_a_worker_that_comes_back_is_known_at_its_new_peer_only(self):
        worker = self.worker("w", b"old")
        self.registry.connect_worker(worker, b"new", 1.0)
        self.assertEqual(self.registry.workers, {b"new": worker})

    def test_silence_counts_from_the_last_sign_of_life_of_each(self):
        first, second = self.worker("w1", b"1"), self.worker("w2", b"2", now=1.0)
        client = self.client("r")
        self.assertEqual(self.registry.deadline(), 10.0)
        self.registry.heard(WORKERS, b"1", 4.0)
        self.registry.heard(CLIENTS, b"c", 4.0)
        self.registry.heard(WORKERS, b"nobody", 4.0)
        self.assertEqual(self.registry.silent_workers(10.9), [])
        self.assertEqual(self.registry.silent_workers(11.0), [second])
        self.assertEqual(self.registry.silent_workers(14.0), [second, first])
        self.assertEqual(self.registry.silent_clients(33.9), [])
        self.assertEqual(self.registry.silent_clients(34.0), [client])

    def test_no_deadline_passes_while_we_are_stopped_or_soon_after(self):
        worker, away = self.worker("w", b"1"), self.worker("a", b"2")
        client = self.client("r")
        self.registry.remove_client(self.client("gone", b"g"), 0.0)
        self.registry.disconnect_worker(away, 0.0)
        grace = self.registry.paused(100.0, 100.5)
        self.assertEqual(grace, 102.5)
        self.assertEqual(self.registry.silent_workers(109.9), [])
        self.assertEqual(self.registry.silent_workers(110.0), [worker, away])
        self.assertEqual(self.registry.silent_clients(129.9), [])
        self.assertEqual(self.registry.silent_clients(130.0), [client])
        self.assertEqual(self.registry.away[away], grace)
        self.assertEqual(self.registry.departed["gone"], 130.0)
        self.registry.disconnect_worker(worker, 101.0)
        self.assertEqual(self.registry.away[worker], grace)

    def test_names_belong_to_a_key_and_a_closed_connection_to_none(self):
        self.assertEqual(self.registry.fingerprint_of(CLIENTS, b"c"), "")
        self.registry.identified(CLIENTS, b"c", "key")
        self.assertEqual(self.registry.fingerprint_of(CLIENTS, b"c"), tc.fingerprint("key"))
        for link, peer in ((WORKERS, b"c"), (CLIENTS, b"d")):
            with self.assertRaises(tc.ProtocolError):
                self.registry.fingerprint_of(link, peer)
        self.registry.forget_key(CLIENTS, b"c")
        with self.assertRaises(tc.ProtocolError):
            self.registry.fingerprint_of(CLIENTS, b"c")

    def test_workers_of_one_user_on_one_host_are_found(self):
        first = self.worker("w1", b"1", user="ann")
        first.host = "vm"
        self.registry.at_host = {"vm": {first: None}}
        workers = [first]
        for n, user in enumerate(("ann", "bob", ""), 2):
            worker = self.registry.add_worker(f"w{n}", "vm")
            worker.user = user
            self.registry.connect_worker(worker, b"%d" % n, 0.0)
            workers.append(worker)
        self.assertEqual([[*map(workers.index, self.registry.others_of_user(it))]
                          for it in workers],
                         [[1], [0], [], []])
        self.registry.disconnect_worker(workers[1], 0.0)
        self.assertFalse(self.registry.others_of_user(first))


# === Machines: a broker with people around it, by story ===============================


def check_client(client):
    """A client has every command in one place, and its parts agree with its window."""
    window = client.window
    places = len(client.backlog) + len(window), client.reported, client.stopped, client.never_ran
    assert client.left or sum(places) == client.total, (places, client.total)
    assert client.accepted == sum(bool(command.worker) for command in window.values())
    assert all(window[id].worker for id in client.preparing)
    assert len(window) <= tc.WINDOW
    client.retry_policy.check()
    for part in (client.host_wait, client.rechecks, client.fetcher, client.offer):
        part.check(window)


class Desk:
    """A broker on its own; the tests speak for its peers and read its answers. All that
    the broker says is read line by line; quiet() fails if anything was not expected."""

    def __init__(self, chained=False, **times):
        self.now = 0.0
        self.broker = tc.Broker("b1", tc.Times(**times), chained, self.now)
        self.joins = 0  # numbers of READY and HELLO, for all peers
        self.letters = []
        self.logs = []

    def tell(self, link, peer, line, token="", data=b""):
        line = line if isinstance(line, bytes) else line.encode()
        self.broker.receive(link, peer, token, line, data, self.now)
        self.collect()

    def client(self, peer, line, token=""):
        self.tell(CLIENTS, peer, line, token)

    def worker(self, peer, line, token=""):
        self.tell(WORKERS, peer, line, token)

    def collect(self):
        check_broker(self.broker)
        frames, effects = self.broker.take()
        for frame in frames:
            for line in frame.body.split(b"\n"):
                verb, fields = tc.decode(line)
                self.letters.append((frame.link, frame.peer, frame.token, verb, fields, line))
        self.logs += [e for e in effects if isinstance(e, tc.Log)]
        self.effects = [e for e in effects if not isinstance(e, tc.Log)]

    def wait(self, seconds):
        """Let time pass, calling tick() when it is due."""
        end = self.now + seconds
        while self.now < end:
            self.now = max(self.now, min(end, self.broker.deadline()))
            self.broker.tick(self.now)
            self.collect()
            if self.broker.deadline() <= self.now < end:
                raise AssertionError("the broker spins")

    def answer(self, number=None, **fields):
        """The broker above says OK to our last greeting, or to that number."""
        session = self.broker.upstream.session
        self.tell(BROKER, b"", tc.encode("OK", dict(
            {"beat" if session.joined else "join": number or session.number}, **fields)))

    def gone(self, link, peer):
        self.broker.disconnected(link, peer, self.now)
        self.collect()

    def expect(self, peer, verb, token=None, **fields):
        """The first unread message to this peer is this one; its line."""
        for letter in self.letters:
            if letter[1] == peer:
                self.letters.remove(letter)
                _, _, got_token, got_verb, got, line = letter
                assert got_verb == verb, f"{got_verb} {got} instead of {verb}"
                assert token is None or got_token == token, got_token
                for name, value in fields.items():
                    assert got.get(name) == value, f"{name}: {got}"
                return got_token, line
        raise AssertionError(f"no {verb} for {peer!r}: {self.letters}")

    def quiet(self):
        assert not self.letters, self.letters

    def join(self, peer, slots=1, name=None, **fields):
        self.joins += 1
        fields = dict({"name": name or peer.decode(), "slots": slots, "join": self.joins,
                       "running": [], "held": []}, **fields)
        self.worker(peer, tc.encode("READY", fields))
        ok = next(letter for letter in self.letters if letter[1] == peer and letter[3] == "OK")
        before = [letter for letter in self.letters[:self.letters.index(ok)] if letter[1] == peer]
        assert {letter[3] for letter in before} <= {"CANCEL", "RECALL"}, before
        assert ok[4]["join"] == self.joins, ok
        self.letters.remove(ok)

    def hello(self, peer, run, unreported=(), **fields):
        join = self.joins = self.joins + 1
        self.client(peer, tc.encode("HELLO", dict(
            {"run": run, "join": join, "unreported": list(unreported)}, **fields)))
        self.expect(peer, "OK", join=join)

    def submit(self, peer, *ids, attempt=1, **more):
        for id in ids:
            self.client(peer, tc.encode("{", dict(
                {"id": id, "attempt": attempt, "cmd": f"c{id}"}, **more)))

    def run_one(self):
        """Have a worker run a client's command: b"w" the first one of b"c", whose run is r1."""
        self.join(b"w", slots=1)
        self.hello(b"c", "r1")
        self.submit(b"c", 1)
        self.takes(b"w", "r1", 1)

    def takes(self, worker, run, id, attempt=1):
        """The worker is given this command and confirms it."""
        self.expect(worker, "{", token=run, id=id, attempt=attempt)
        self.worker(worker, tc.encode("QUEUED", {"tasks": [[id, attempt]]}), run)

    def ends(self, worker, run, id, attempt=1, **more):
        self.worker(worker, tc.encode("RESULT", dict(
            {"id": id, "attempt": attempt, "exitcode": 0, "stdout": "", "time": 1, "size": 0},
            **more)), run)

    def tree_worker(self, peer, slots=1, **more):
        self.join(peer, slots=slots, **{"labels": [tc.TREES], "host": f"{peer.decode()}/1", **more})

    def submit_with_tree(self, peer, *ids, **more):
        self.submit(peer, *ids, **{"needs": [tc.TREES], "tree": "0" * 64, "manifest": 9, **more})

    def prepares(self, worker, run, id, preparing, attempt=1):
        """The worker says how far the workspace of a command is."""
        fields = {"tasks": [[id, attempt]], **({"preparing": preparing} if preparing else {})}
        self.worker(worker, tc.encode("QUEUED", fields), run)

    def scouts(self, worker, run, id, preparing=tc.FILES, attempt=1):
        """The worker is given this command, and says how far its workspace is."""
        self.expect(worker, "{", token=run, id=id, attempt=attempt)
        self.prepares(worker, run, id, preparing, attempt)

    def given(self, worker):
        """Confirm all commands that this worker was given, and return their ids."""
        given = [(token, fields) for _, peer, token, verb, fields, _ in self.letters
                 if (peer, verb) == (worker, "{")]
        self.letters = [letter for letter in self.letters if letter[1] != worker]
        for token, fields in given:
            self.worker(worker, tc.encode("QUEUED", {
                "tasks": [[fields["id"], fields["attempt"]]]}), token)
        return [fields["id"] for _, fields in given]

    def warm(self, worker):
        """Make a worker of one slot prove that its commands are short, then fill its slot."""
        self.hello(b"warm", "warm")
        self.join(worker, slots=1)
        for id in range(1, 6):
            self.submit(b"warm", id)
            self.takes(worker, "warm", id)
            if id < 5:
                self.ends(worker, "warm", id)
        self.letters.clear()

    def pause(self, seconds):
        """The broker is stopped for so long, as while its machine sleeps."""
        self.now += seconds
        self.broker.paused(seconds, self.now)
        self.broker.tick(self.now)
        self.collect()


class BrokerTest(unittest.TestCase):
    def setUp(self):
        self.desk = Desk()

    def test_a_retry_behind_many_kinds_that_were_cancelled_runs(self):
        d, last = self.desk, tc.MAX_RETRY_KINDS
        d.join(b"w", slots=1)
        for peer in (b"b", b"c"):
            d.hello(peer, peer.decode())
        d.submit(b"b", 1)
        d.takes(b"w", "b", 1)
        for id in range(1, last + 2):
            d.submit(b"c", id, attempt=2, not_on=f"h{id}")
        for left in range(1, last + 2):  # whichever is left, and wherever in the turns
            with self.subTest(left=left):
                broker = copy.deepcopy(d.broker)
                broker.receive(CLIENTS, b"c", "", tc.encode("CANCEL", {
                    "tasks": [[id, 2] for id in range(1, last + 2) if id != left]}), b"", 1.0)
                broker.take()
                broker.receive(WORKERS, b"w", "", b'READY {"name":"w","slots":2}', b"", 1.0)
                given = [frame.body for frame in broker.take()[0] if frame.peer == b"w"]
                self.assertEqual(len(given), 1, given)
                self.assertIn(b'"id":%d,' % left, given[0])

    def test_a_hello_with_the_number_of_no_join_makes_no_client(self):
        d = self.desk
        for n in range(10):
            d.client(b"c", tc.encode("HELLO", {"run": f"r{n}", "join": 0}))
        self.assertFalse(d.broker.registry.clients)
        d.quiet()

    def test_a_command_that_is_done_is_not_expected_any_more(self):
        d = self.desk
        d.hello(b"c", "r1", unreported=[1])
        d.join(b"w", running=[["r1", 1, 1]])
        d.ends(b"w", "r1", 1)
        d.client(b"c", tc.encode("DONE", {"tasks": [[1, 1]]}))
        d.letters.clear()
        d.worker(b"v", tc.encode("READY", {
            "name": "v", "slots": 1, "join": 99, "running": [["r1", 1, 1]]}))
        d.expect(b"v", "CANCEL", token="r1", tasks=[[1, 1]])

    def test_what_is_remembered_of_constraints_is_bounded(self):
        d = self.desk
        for n in range(3):
            d.join(b"w%d" % n, slots=1, host=f"h{n}", labels=["gpu"])
        d.join(b"x", slots=1)
        d.hello(b"c", "r1")
        for id in range(4 * tc.MAX_CACHED_CONSTRAINTS):
            d.submit(b"c", id, attempt=2, needs=["gpu"], not_on=f"h{id % 3}", on=f"h{id}")
        scheduler = d.broker.scheduler
        self.assertLessEqual(len(scheduler.saturated), tc.MAX_CACHED_CONSTRAINTS)
        d.client(b"c", "BYE")
        self.assertFalse([worker.busy_with for worker in scheduler.workers if worker.busy_with])

    def test_a_later_attempt_replaces_one_that_runs(self):
        d = self.desk
        d.run_one()
        d.letters.clear()
        d.submit(b"c", 1, attempt=2)
        d.expect(b"w", "CANCEL", tasks=[[1, 1]])
        d.takes(b"w", "r1", 1, attempt=2)

    def test_a_command_goes_to_a_worker_and_its_result_comes_back(self):
        d = self.desk
        d.join(b"w", slots=2)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]], worker="w")
        d.ends(b"w", "r1", 1, stdout="x")
        d.expect(b"c", "RESULT", id=1, stdout="x")
        d.client(b"c", 'DONE {"tasks":[[1,1]]}')
        d.expect(b"w", "DONE", token="r1", tasks=[[1, 1]])
        d.quiet()
        self.assertFalse(d.broker.registry.clients["r1"].tasks)

    def test_commands_wait_for_a_worker(self):
        d = self.desk
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2)
        d.quiet()
        d.join(b"w", slots=1)
        d.expect(b"c", "OK", slots=1)
        d.takes(b"w", "r1", 1)
        d.expect(b"c", "QUEUED")
        d.quiet()
        d.ends(b"w", "r1", 1)
        d.expect(b"c", "RESULT")
        d.takes(b"w", "r1", 2)

    def test_a_second_worker_of_the_same_user_and_host_is_told_once(self):
        def ready(peer, join=1, **more):
            d.worker(peer, tc.encode("READY", dict(
                {"name": peer.decode(), "slots": 2, "join": join, "host": "h", "user": "user 1"},
                **more)))
            note = next(row[4]["note"] for row in d.letters if row[1] == peer)
            d.letters.clear()
            return note
        d = self.desk
        for peer, more in ((b"v", {}), (b"w", {"host": "i"}), (b"x", {"user": "user 2"}),
                           (b"y", {"user": ""}), (b"z", {"user": ""})):
            self.assertEqual(ready(peer, **more), "")
        told = ready(b"b")
        self.assertIn("user 1 runs 1 other worker on h already, with 2 slots (v)", told)
        warnings = [log.text for log in d.logs if log.level == logging.WARNING]
        self.assertEqual(warnings, [f"worker b: {told}"])
        for peer in (b"v", b"b"):  # they come back, as to a new broker
            self.assertEqual(ready(peer, join=2), "")
        self.assertIn("2 other workers on h already, with 4 slots", ready(b"c"))
        d.gone(WORKERS, b"v")
        self.assertIn("2 other workers", ready(b"d"))

    def test_clients_take_turns(self):
        d = self.desk
        d.hello(b"c", "r1")
        d.hello(b"d", "r2")
        d.submit(b"c", *range(1, 100))
        d.submit(b"d", 1, 2)
        d.join(b"w", slots=4)
        got = [(m[2], m[4]["id"]) for m in d.letters if m[1] == b"w"]
        self.assertEqual(sorted(got), [("r1", 1), ("r1", 2), ("r2", 1), ("r2", 2)])

    def test_higher_weight_first_then_most_free_slots(self):
        d = self.desk
        d.join(b"a", slots=2)
        d.join(b"b", slots=3)
        d.join(b"h", slots=1, weight=5)
        d.hello(b"c", "r1")
        order = []
        for id in range(1, 7):
            d.submit(b"c", id)
            order += [m[1] for m in d.letters if m[3] == "{"]
            d.letters.clear()
        self.assertEqual(order[:2], [b"h", b"b"])
        self.assertEqual(Counter(order), {b"h": 1, b"b": 3, b"a": 2})

    def test_workers_are_given_some_ahead_as_far_as_commands_prove_short(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", *range(1, 100))
        self.assertEqual(d.given(b"w"), [1])
        d.ends(b"w", "r1", 1, time=tc.PREFETCH_TIME / 2)
        self.assertEqual(d.given(b"w"), [2, 3])
        d.ends(b"w", "r1", 2)
        self.assertEqual(d.given(b"w"), [4, 5])
        for id in range(3, 20):
            d.ends(b"w", "r1", id)
            given = d.given(b"w")
        self.assertEqual(given, [20 + tc.PREFETCH])
        for id in range(20, 20 + tc.PREFETCH - 2):
            d.ends(b"w", "r1", id, time=tc.PREFETCH_TIME / 2)
            self.assertEqual(d.given(b"w"), [])
        d.ends(b"w", "r1", 20 + tc.PREFETCH - 2, time=tc.PREFETCH_TIME / 2)
        self.assertEqual(d.given(b"w"), [21 + tc.PREFETCH])
        for id in range(20 + tc.PREFETCH - 1, 20 + tc.PREFETCH + 1):
            d.ends(b"w", "r1", id, time=tc.PREFETCH_TIME + 1)
            self.assertEqual(d.given(b"w"), [])
        d.ends(b"w", "r1", 21 + tc.PREFETCH, time=tc.PREFETCH_TIME + 1)
        self.assertEqual(d.given(b"w"), [22 + tc.PREFETCH])

    def test_a_free_slot_comes_before_room_beyond_the_slots(self):
        d = self.desk
        d.warm(b"w")
        d.join(b"v", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, avoid="v")
        self.assertEqual((d.given(b"v"), d.given(b"w")), ([1], []))
        d.submit(b"c", 2, 3)
        self.assertEqual((d.given(b"v"), d.given(b"w")), ([], [2, 3]))

    def test_what_waits_for_a_slot_is_recalled_for_a_free_one_elsewhere(self):
        d = self.desk
        d.warm(b"w")
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2)
        self.assertEqual(d.given(b"w"), [1, 2])
        d.join(b"v", slots=1)
        d.expect(b"w", "RECALL", token="r1", tasks=[[2, 1]])
        d.worker(b"w", 'LOST {"tasks":[[2,1]],"why":"handed back"}', "r1")
        d.letters.clear()
        d.submit(b"c", 2, attempt=2, avoid="w")
        self.assertEqual(d.given(b"v"), [2])
        d.worker(b"w", 'RESULT {"id":5,"attempt":1,"exitcode":0,"time":2000}', "warm")
        d.submit(b"c", 3)
        self.assertEqual(d.given(b"w"), [])  # it has 1, and proves short no more

    def test_what_waits_for_a_slot_for_long_is_recalled(self):
        d = self.desk
        d.warm(b"w")
        d.hello(b"c", "r1")
        d.submit(b"c", *range(1, 7))
        self.assertEqual(d.given(b"w"), [1, 2, 3, 4])
        d.letters.clear()
        d.wait(tc.RECALL_DELAY - 0.01)
        d.quiet()
        d.wait(0.02)
        d.expect(b"w", "RECALL", token="r1", tasks=[[1, 1], [2, 1], [3, 1], [4, 1]])
        d.wait(1)
        d.quiet()
        d.worker(b"w", 'LOST {"tasks":[[1,1],[2,1],[3,1],[4,1]],"why":"handed back"}', "r1")
        self.assertEqual(d.given(b"w"), [])  # 5 and 6 wait: commands are not short any more
        d.ends(b"w", "warm", 5)
        self.assertEqual(d.given(b"w"), [5, 6])

    def test_nothing_waits_behind_a_command_with_which_workers_were_lost(self):
        d = self.desk
        d.warm(b"w")
        d.hello(b"c", "r1")
        d.submit(b"c", 1, attempt=2, careful=True)
        self.assertEqual(d.given(b"w"), [])
        d.ends(b"w", "warm", 5)
        self.assertEqual(d.given(b"w"), [1])
        self.assertTrue(self.desk.broker.registry.named["w"].prefetch)
        d.submit(b"c", 2)
        self.assertEqual(d.given(b"w"), [])
        d.ends(b"w", "r1", 1, attempt=2)
        self.assertEqual(d.given(b"w"), [2])

    def test_unconfirmed_command_goes_to_another_worker(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.expect(b"w", "{")
        d.join(b"v", slots=1)
        d.wait(5.0)
        d.expect(b"w", "CANCEL", token="r1", tasks=[[1, 1]])
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="", worker="w")
        d.submit(b"c", 1, attempt=2, avoid="w")
        d.takes(b"v", "r1", 1, 2)
        d.expect(b"c", "QUEUED", tasks=[[1, 2]])
        d.ends(b"w", "r1", 1)  # too late: changes nothing
        d.quiet()
        d.ends(b"v", "r1", 1, 2)
        d.expect(b"c", "RESULT", attempt=2)

    LATE = ('QUEUED {"tasks":[[1,1]]}', 'LOST {"tasks":[[1,1]],"why":"cancelled"}',
            'CHUNK {"id":1,"attempt":1,"offset":0}', 'RESULT {"id":1,"attempt":1,"exitcode":1}')

    def test_a_worker_that_speaks_of_an_older_attempt_changes_nothing(self):
        """Although it has the next attempt of the same command."""
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.expect(b"w", "{", attempt=1)
        d.wait(5.0)  # it does not confirm
        d.worker(b"w", 'READY {"name":"w","slots":1}')
        d.letters.clear()
        d.submit(b"c", 1, attempt=2)
        d.expect(b"w", "{", attempt=2)
        for confirms in (True, False):
            for line in self.LATE:
                d.worker(b"w", line, "r1")
                d.quiet()
            if confirms:
                d.worker(b"w", 'QUEUED {"tasks":[[1,2]]}', "r1")
                d.expect(b"c", "QUEUED", tasks=[[1, 2]])
        d.ends(b"w", "r1", 1, 2, stdout="new")
        d.expect(b"c", "RESULT", attempt=2, stdout="new")
        d.quiet()

    def test_a_client_that_speaks_of_an_older_attempt_changes_nothing(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, attempt=2)
        d.takes(b"w", "r1", 1, 2)
        d.expect(b"c", "QUEUED", tasks=[[1, 2]])
        late = ('CANCEL {"tasks":[[1,1]]}', 'DONE {"tasks":[[1,1]]}',
                'FETCH {"id":1,"attempt":1,"offset":0,"size":1}')
        for ends in (True, False):
            for line in late:
                d.client(b"c", line)
                d.quiet()
            if ends:
                d.ends(b"w", "r1", 1, 2)
                d.expect(b"c", "RESULT", attempt=2)
        d.client(b"c", 'DONE {"tasks":[[1,2]]}')
        d.expect(b"w", "DONE", tasks=[[1, 2]])

    def test_a_later_attempt_from_its_client_ends_the_older_one(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)
        d.expect(b"c", "QUEUED")
        d.submit(b"c", 1, attempt=2)
        d.expect(b"w", "CANCEL", token="r1", tasks=[[1, 1]])
        d.takes(b"w", "r1", 1, 2)

    def test_a_command_that_is_done_is_not_wanted_from_another_worker(self):
        d = self.desk
        d.hello(b"c", "r1", unreported=[1])
        d.join(b"w", slots=1, held=[["r1", 1, 1]])
        d.submit(b"c", 1, again=True, had="w")
        d.client(b"c", 'DONE {"tasks":[[1,1]]}')
        d.letters.clear()
        d.join(b"v", slots=1, running=[["r1", 1, 1]])
        d.expect(b"v", "CANCEL", token="r1", tasks=[[1, 1]])
        d.quiet()

    def test_a_worker_that_does_not_confirm_is_given_nothing_until_it_speaks(self):
        d = self.desk
        d.join(b"w", slots=3)
        d.hello(b"c", "r1")
        d.submit(b"c", 9)
        d.takes(b"w", "r1", 9)
        d.expect(b"c", "QUEUED")
        d.submit(b"c", 1)
        d.expect(b"w", "{", id=1)
        d.wait(4.9)
        d.quiet()
        d.wait(0.2)
        d.expect(b"w", "CANCEL", token="r1", tasks=[[1, 1]])
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="")
        d.submit(b"c", 2)
        d.submit(b"c", 1, attempt=2)
        d.quiet()
        d.worker(b"w", 'READY {"name":"w","slots":3}')
        d.takes(b"w", "r1", 1, 2)
        d.takes(b"w", "r1", 2)

    def test_a_retry_prefers_another_worker_but_does_not_wait_for_one(self):
        d = self.desk
        d.join(b"w", slots=5)
        d.join(b"v", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, attempt=2, avoid="w")
        d.takes(b"v", "r1", 1, 2)
        d.submit(b"c", 2, attempt=2, avoid="w")
        d.takes(b"w", "r1", 2, 2)

    def test_a_failed_command_waits_for_another_worker_if_there_is_one(self):
        d = self.desk
        d.join(b"w", slots=5)
        d.join(b"v", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, attempt=2, avoid="w")
        d.takes(b"v", "r1", 1, 2)
        d.expect(b"c", "QUEUED")
        d.submit(b"c", 2, attempt=2, avoid="w", elsewhere=True)
        d.quiet()
        d.submit(b"c", 3)  # does not wait for the one before it
        d.takes(b"w", "r1", 3)
        d.letters.clear()
        d.ends(b"v", "r1", 1, 2)
        d.expect(b"c", "RESULT")
        d.takes(b"v", "r1", 2, 2)
        d.client(b"c", 'DONE {"tasks":[[1,2]]}')
        d.letters.clear()
        d.submit(b"c", 4, attempt=2, avoid="w", elsewhere=True)
        d.quiet()
        d.worker(b"v", "BYE")
        d.expect(b"c", "LOST", tasks=[[2, 2]])
        d.takes(b"w", "r1", 4, 2)

    def test_a_command_goes_to_the_host_that_it_wants_or_waits_for_it(self):
        d = self.desk
        for name, host in ((b"v", "h1"), (b"w", "h1"), (b"x", "h2")):
            d.join(name, slots=1, host=host)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2, attempt=2, on="h1", elsewhere=True, avoid="v")
        d.takes(b"w", "r1", 1, 2)
        d.expect(b"c", "QUEUED")
        d.quiet()  # v is what it would avoid, and w may be free soon
        d.submit(b"c", 3, 4, attempt=2, not_on="h1", elsewhere=True, avoid="v")
        d.takes(b"x", "r1", 3, 2)
        d.expect(b"c", "QUEUED")
        d.quiet()
        d.worker(b"x", "BYE")  # h1 is better than nothing, but for the one to avoid
        d.expect(b"c", "LOST", tasks=[[3, 2]])
        d.quiet()
        d.worker(b"w", "BYE")
        d.expect(b"c", "LOST", tasks=[[1, 2]])
        d.takes(b"v", "r1", 2, 2)

    def test_a_command_that_few_workers_may_run_goes_to_the_best_of_them(self):
        """The many others have a higher weight."""
        d = self.desk
        for n in range(50):
            d.join(b"o%d" % n, slots=1, weight=9)
        d.join(b"a", slots=2, labels=["gpu"])
        d.join(b"b", slots=3, labels=["gpu"])
        d.join(b"h", slots=1, weight=5, labels=["gpu"])
        d.hello(b"c", "r1")
        order = []
        for id in range(1, 7):
            d.submit(b"c", id, needs=["gpu"])
            order += [letter[1] for letter in d.letters if letter[3] == "{"]
            d.letters.clear()
        self.assertEqual(order[:2], [b"h", b"b"])
        self.assertEqual(Counter(order), {b"h": 1, b"b": 3, b"a": 2})

    def test_a_retry_that_few_workers_may_run_prefers_another_worker_with_a_free_slot(self):
        d = self.desk
        for n in range(50):
            d.join(b"o%d" % n, slots=1, weight=9)
        d.join(b"h", slots=1, weight=5, labels=["gpu"])
        d.join(b"a", slots=1, labels=["gpu"])
        d.hello(b"c", "r1")
        for id in (1, 2):  # the first one is short, so a might be given one ahead
            d.submit(b"c", id, attempt=2, needs=["gpu"], avoid="h")
            d.takes(b"a", "r1", id, 2)
            d.ends(b"a", "r1", id, 2) if id == 1 else None
        d.submit(b"c", 3, attempt=2, needs=["gpu"], avoid="h")
        d.takes(b"h", "r1", 3, 2)

    def test_the_workers_for_a_command_are_chosen_anew_when_workers_change(self):
        """First none is on another host than h1. When there is one, it is preferred."""
        for before, change, chosen in (
                (lambda d: None, lambda d: d.join(b"v"), b"v"),
                (lambda d: None, lambda d: d.worker(b"v", "READY"), b"v"),
                (lambda d: d.join(b"v", slots=0),
                 lambda d: d.worker(b"v", 'READY {"name":"v","slots":1}'), b"v"),
                (lambda d: d.join(b"m", below=["m"], crew=[["h1", 1]]),
                 lambda d: d.worker(b"m", 'READY {"name":"m","crew":[["h2",1]]}'), b"m"),
                (lambda d: (d.join(b"v"), d.gone(WORKERS, b"v")),
                 lambda d: d.join(b"v2", name="v"), b"v2")):
            d = Desk()
            d.join(b"w", slots=9, weight=5, host="h1")
            before(d)
            d.hello(b"c", "r1")
            d.submit(b"c", 1, attempt=2, not_on="h1", elsewhere=True)
            d.takes(b"w", "r1", 1, 2)
            change(d)
            d.letters.clear()
            d.submit(b"c", 2, attempt=2, not_on="h1", elsewhere=True)
            d.expect(chosen, "{", id=2)

    def test_a_command_goes_to_a_worker_that_gets_its_label_later(self):
        d = self.desk
        d.join(b"w")
        d.hello(b"c", "r1")
        d.submit(b"c", 1, needs=["gpu"])
        d.quiet()
        d.worker(b"w", 'READY {"name":"w","slots":1,"labels":["gpu"]}')
        d.takes(b"w", "r1", 1)

    def test_a_chained_broker_that_comes_back_is_told_again_which_hosts_to_shun(self):
        d = self.desk
        d.join(b"m", below=["m"])
        d.hello(b"c", "r1")
        d.client(b"c", 'SHUN {"hosts":["h1"]}')
        d.expect(b"m", "SHUN", token="r1", hosts=["h1"])
        d.gone(WORKERS, b"m")
        for peer, name in ((b"m2", "m"), (b"n", "n")):
            d.worker(peer, tc.encode("READY", {
                "name": name, "slots": 1, "join": 99, "below": [name], "running": [], "held": []}))
            d.expect(peer, "SHUN", token="r1", hosts=["h1"])

    def test_a_command_that_wants_a_host_without_its_label_goes_to_another_host(self):
        d = self.desk
        d.join(b"w", slots=1, host="h1", weight=5)
        d.join(b"v", slots=1, host="h2", labels=["gpu"])
        d.hello(b"c", "r1")
        d.submit(b"c", 1, attempt=2, needs=["gpu"], on="h1", elsewhere=True)
        d.takes(b"v", "r1", 1, 2)

    def test_a_chained_broker_is_all_the_hosts_below_it(self):
        for wishes, takes in (({"on": "h1"}, {b"a"}), ({"on": "h2"}, {b"a"}),
                              ({"on": "h3"}, {b"b"}),
                              ({"not_on": "h1"}, {b"a", b"b"}), ({"not_on": "h3"}, {b"a"}),
                              ({"on": "h9"}, {b"a", b"b"}), ({"needs": ["x"]}, {b"a", b"b"}),
                              ({"needs": ["x", "y"]}, set()), ({"needs": ["x", "z"]}, {b"b"}),
                              ({"needs": ["x"], "not_on": "h1"}, {b"b"}),
                              ({"needs": ["y"], "on": "h1"}, {b"a"})):
            d = Desk()
            d.join(b"a", slots=4, below=["a"], crew=[["h1", 4, "x"], ["h2", 4, "y"]])
            d.join(b"b", slots=3, below=["b"], crew=[["h3", 3, "x", "z"]])
            d.hello(b"c", "r1")
            d.submit(b"c", 1, 2, 3, attempt=2, **wishes, elsewhere=True)
            self.assertEqual({peer for _, peer, _, verb, *_ in d.letters if verb == "{"}, takes)
            d.letters.clear()
            d.client(b"c", 'SHUN {"hosts":["h1","h3"]}')
            d.letters.clear()
            if wishes != {"on": "h1"}:
                d.submit(b"c", 4)
                d.expect(b"a", "{")
                continue
            d.broker.registry.clients["r1"].told_excluded["a"] = -16.0  # it may have forgotten it
            d.submit(b"c", 4)
            d.expect(b"a", "SHUN", token="r1", hosts=["h1", "h3"])
            d.expect(b"a", "{")

    def one_labelled_slot_below(self):
        """The only slot with a label is below a chained broker, and taken; two commands wait."""
        d = self.desk
        d.join(b"m", slots=9, below=["m"], crew=[["h1", 1, "gpu"], ["h2", 8]])
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2, 3, needs=["gpu"])
        d.takes(b"m", "r1", 1)
        d.expect(b"c", "QUEUED")
        d.quiet()
        return d

    def test_a_chained_broker_has_only_so_many_slots_with_a_label(self):
        d = self.one_labelled_slot_below()
        d.join(b"v", slots=1, labels=["gpu"])
        d.takes(b"v", "r1", 2)
        d.expect(b"c", "QUEUED")
        d.hello(b"e", "r2")
        d.submit(b"e", *range(8))
        for id in range(8):
            d.takes(b"m", "r2", id)
        d.letters.clear()
        d.ends(b"m", "r2", 1, time=9999.0)  # the slot is for others than gpu
        d.submit(b"e", 8)
        d.expect(b"e", "RESULT")
        d.takes(b"m", "r2", 8)
        d.letters.clear()
        d.ends(b"m", "r1", 1)
        d.expect(b"c", "RESULT")
        d.takes(b"m", "r1", 3)

    def test_a_chained_broker_may_get_and_lose_slots_with_a_label(self):
        d = self.one_labelled_slot_below()
        d.worker(b"m", 'READY {"name":"m","slots":9,"crew":[["h1",2,"gpu"],["h2",7]]}')
        d.takes(b"m", "r1", 2)
        d.expect(b"c", "QUEUED")
        d.quiet()
        d.worker(b"m", 'READY {"name":"m","slots":9,"crew":[["h1",1,"gpu"],["h2",8]]}')
        d.ends(b"m", "r1", 1)
        d.expect(b"c", "RESULT")
        d.quiet()  # the other one takes the only slot
        d.ends(b"m", "r1", 2)
        d.expect(b"c", "RESULT")
        d.takes(b"m", "r1", 3)

    def test_a_command_waits_for_a_worker_with_the_labels_that_it_needs(self):
        d = self.desk
        d.join(b"w", slots=5, labels=["gpu"])
        d.hello(b"c", "r1")
        d.hello(b"e", "r2")
        d.submit(b"c", 1, needs=["gpu", "db"])
        d.quiet()
        d.submit(b"e", 1)
        d.takes(b"w", "r2", 1)
        d.expect(b"e", "QUEUED")
        d.client(b"c", 'HELLO {"run":"r1","beat":2}')
        d.wait(tc.OK_DELAY)
        d.expect(b"c", "OK", lacks="a worker with --label db and --label gpu")
        d.join(b"v", slots=0, labels=["db", "gpu", "x"])
        d.client(b"c", 'HELLO {"run":"r1","beat":2}')
        d.wait(tc.OK_DELAY)
        d.expect(b"c", "OK",
                 lacks="a worker with --label db and --label gpu that takes something new")
        d.worker(b"v", 'READY {"name":"v","slots":1}')
        d.takes(b"v", "r1", 1)
        d.expect(b"c", "QUEUED")
        d.client(b"c", 'HELLO {"run":"r1","beat":3}')
        d.wait(tc.OK_DELAY)
        d.expect(b"c", "OK", lacks=None)
        client = d.broker.registry.clients["r1"]
        client.needs = frozenset(["gpu"])  # there is a slot with such, but it is busy
        self.assertEqual(d.broker.waited_for(client), "a free slot with --label gpu")

    def test_hosts_that_a_client_shuns_are_used_if_there_are_no_others(self):
        d = self.desk
        d.join(b"v", slots=9, host="h1")
        d.join(b"w", slots=1, host="h2")
        d.hello(b"c", "r1")
        d.client(b"c", 'SHUN {"hosts":["h1"]}')
        d.submit(b"c", 1, 2)
        d.takes(b"w", "r1", 1)
        d.expect(b"c", "QUEUED")
        d.quiet()
        d.hello(b"e", "r2")
        d.submit(b"e", 1)  # others have nothing against it
        d.takes(b"v", "r2", 1)
        d.letters.clear()
        d.worker(b"w", "BYE")
        d.expect(b"c", "LOST")
        d.takes(b"v", "r1", 2)

    def test_the_status(self):
        d = self.desk
        d.join(b"w", slots=2, host="h1", labels=["gpu"], load=1.5)
        d.worker(b"v", "READY")
        d.expect(b"v", "OK")
        d.hello(b"c", "r1", host="mine", pid=77, backlog=6)
        d.submit(b"c", 1, 2, 3, 4)
        d.ends(b"w", "r1", 1, exitcode=3)
        d.letters.clear()
        d.client(b"s", "STATUS")
        d.wait(tc.OK_DELAY)
        status = tc.decode(d.expect(b"s", "STATUS")[1])[1]
        worker, plain = status["workers"]
        self.assertEqual([worker[name] for name in (
            "host", "slots", "running", "held", "done", "failed", "load", "labels", "there")],
            ["h1", 2, 2, 1, 1, 1, 1.5, ["gpu"], True])
        self.assertEqual((plain["kind"], plain["running"]), ("plain", 1))
        self.assertEqual(status["clients"], [{
            "host": "mine", "pid": 77, "kind": "client", "there": True, "queued": 2, "running": 3,
            "held": 1, "done": 1, "failed": 1, "waits_for": ""}])
        d.submit(b"c", 5, 6, 7)
        d.client(b"c", 'HELLO {"run":"r1","beat":2,"backlog":9}')
        d.submit(b"c", 5, again=True)  # it is none of the backlog
        d.client(b"s", "STATUS")
        d.wait(tc.OK_DELAY)
        status = tc.decode(d.expect(b"s", "STATUS")[1])[1]
        self.assertEqual(status["clients"][0]["waits_for"], "a free slot")
        # one of them waits at a worker for a slot
        self.assertEqual([status["clients"][0][name] for name in ("queued", "running")], [3 + 9, 3])
        d.worker(b"w", 'READY {"name":"w","slots":0,"beat":5}')  # as at a high load
        d.client(b"s", "STATUS")
        d.wait(tc.OK_DELAY)
        row = tc.decode(d.expect(b"s", "STATUS")[1])[1]["workers"][0]
        self.assertEqual([row[name] for name in ("slots", "running")],
                         [0, d.broker.registry.workers[b"w"].busy])

    def test_the_status_is_not_as_long_as_peers_like(self):
        d = self.desk
        d.join(b"w", host="h" * 9999, labels=[f"{n}" + "l" * 9999 for n in range(999)])
        d.hello(b"c", "r1", host="c" * 9999)
        d.client(b"s", "STATUS")
        d.wait(tc.OK_DELAY)
        self.assertLess(len(d.expect(b"s", "STATUS")[1]), 15_000)

    def test_the_status_is_told_once_to_who_asks_often(self):
        d = self.desk
        d.client(b"s", "\n".join(["STATUS"] * 500))
        d.client(b"t", "STATUS")
        d.wait(tc.OK_DELAY)
        self.assertEqual([letter[1] for letter in d.letters], [b"s", b"t"])

    def test_a_chained_broker_goes_on_where_one_before_it_died(self):
        for names, believed in ((("m1", "m2"), True), (("m1.key", "m2.key"), True),
                                (("m1.key", "m2.other"), False), (("m1.key", "m2"), False)):
            for restart in (False, True):
                d = Desk()
                if restart:
                    d.hello(b"c", "r1", [1])
                    d.submit(b"c", 1, again=True, had=names[0])
                else:
                    d.join(b"m", below=["m"], name=names[0])
                    d.hello(b"c", "r1")
                    d.submit(b"c", 1)
                    d.gone(WORKERS, b"m")
                d.letters.clear()
                d.worker(b"n", tc.encode("READY", {
                    "name": names[1], "join": 99, "slots": 1, "below": ["m"], "crew": [],
                    "running": [["r1", 1, 1]], "held": []}))
                said = [letter[3] for letter in d.letters if letter[1] == b"n"]
                self.assertEqual(said, ["OK"] if believed else ["CANCEL", "OK", "CANCEL"], names)
                d.letters.clear()
                d.ends(b"n", "r1", 1)
                self.assertEqual("RESULT" in [letter[3] for letter in d.letters], believed, names)

    def test_a_worker_is_not_believed_about_commands_that_it_was_not_given(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2)
        d.takes(b"w", "r1", 1)
        d.letters.clear()
        claim = tc.encode("READY", {"name": "v", "slots": 0, "join": 99, "held": [],
                                    "running": [["r1", 1, 1], ["r1", 2, 1]]})
        for trouble in (lambda: None, lambda: d.gone(WORKERS, b"w")):  # in its lost_grace
            trouble()
            d.worker(b"v", claim)
            d.expect(b"v", "CANCEL", "r1", tasks=[[1, 1], [2, 1]])
            d.expect(b"v", "OK")
            d.ends(b"v", "r1", 1)
            d.ends(b"v", "r1", 2)
            self.assertNotIn("RESULT", [letter[3] for letter in d.letters])
            d.worker(b"v", "BYE")
            d.letters.clear()

    def test_retries_that_have_gone_leave_no_trace_behind_one_that_waits(self):
        d = self.desk
        d.join(b"w", host="h1")
        d.join(b"v", host="h2")
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2, attempt=2, on="h1", elsewhere=True)
        for id in range(3, 100):
            d.submit(b"c", id, attempt=2)
            d.ends(b"v", "r1", id, attempt=2)
        self.assertLess(sum(map(len, d.broker.registry.clients["r1"].retries.values())), 5)
        d.client(b"c", tc.encode("CANCEL", {"tasks": [[2, 2]]}))
        d.submit(b"c", 100, attempt=2)
        self.assertFalse(d.broker.registry.clients["r1"].retries)

    def test_many_that_wait_for_hosts_do_not_make_us_look_at_all(self):
        d = self.desk
        for n in range(150):
            d.join(b"w%d" % n, slots=1, host=f"h{n}")
        d.hello(b"c", "r1")
        looked, eligible = [], tc.Constraints.eligible

        def counted(constraints, places):
            looked.append(len(places))
            return eligible(constraints, places)
        with mock.patch.object(tc.Constraints, "eligible", counted):
            for id in range(2 * 149):  # the second half has to wait
                d.submit(b"c", id, attempt=2, on=f"h{id % 149}", elsewhere=True)
            for _ in range(9):
                d.worker(b"w149", 'READY {"name":"w149","slots":1}')
        self.assertEqual({*looked}, {1})

    def test_many_retries_that_wait_for_a_host_keep_none_from_another(self):
        d = self.desk
        d.join(b"w", slots=1, host="h1")
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)
        d.join(b"v", slots=1, host="h2")
        d.hello(b"e", "r2")
        d.submit(b"e", *range(200), attempt=2, on="h1", elsewhere=True)
        d.submit(b"e", 200, attempt=2, on="h2", elsewhere=True)
        d.takes(b"v", "r2", 200, 2)

    def test_retries_of_many_kinds_come_to_their_turn(self):
        d = self.desk
        d.join(b"w", slots=1, host="h1")
        d.hello(b"c", "r1")
        for id in range(3 * tc.MAX_RETRY_KINDS):
            d.submit(b"c", id, attempt=2, needs=[f"l{id}"])
        d.submit(b"c", 3 * tc.MAX_RETRY_KINDS, attempt=2)
        for _ in range(4):
            d.worker(b"w", 'READY {"name":"w","slots":1}')
        d.takes(b"w", "r1", 3 * tc.MAX_RETRY_KINDS, 2)

    def test_retries_come_first_in_their_own_order(self):
        d = self.desk
        d.hello(b"c", "r1")
        d.submit(b"c", 8, 9)
        d.submit(b"c", 3, 4, 5, attempt=2)
        d.join(b"w", slots=5)
        got = [m[4]["id"] for m in d.letters if m[1] == b"w"]
        self.assertEqual(got, [3, 4, 5, 8, 9])

    def test_a_command_that_is_submitted_again_comes_before_new_ones(self):
        d = self.desk
        d.wait(60.0)  # no worker of the time before the broker's start is awaited any more
        d.hello(b"c", "r1", unreported=[3])
        d.submit(b"c", 8, 9)
        d.submit(b"c", 3, again=True)
        d.join(b"w", slots=3)
        self.assertEqual(d.given(b"w"), [3, 8, 9])

    def test_an_attempt_that_is_lost_while_it_is_submitted_again_is_not_run_again(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.expect(b"w", "{")
        d.hello(b"c", "r1", unreported=[1])
        d.join(b"v", slots=1)
        d.worker(b"w", "BYE")
        d.expect(b"c", "LOST", tasks=[[1, 1]])
        d.submit(b"c", 1, again=True)  # said before that LOST was heard
        d.expect(b"c", "LOST", tasks=[[1, 1]])
        d.quiet()
        d.submit(b"c", 1, attempt=2)
        d.takes(b"v", "r1", 1, 2)
        self.assertFalse(d.broker.registry.clients["r1"].lost)

    def test_an_ok_does_not_overtake_commands_said_before_it(self):
        d = self.desk
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        for number in (1, 2):  # both come in before anything goes out
            d.broker.receive(WORKERS, b"w", "", tc.encode("READY", {
                "name": "w", "slots": 1, "join": number, "running": [], "held": []}), b"", 0.0)
        frames, _ = d.broker.take()
        said = [tc.decode(frame.body) for frame in frames if frame.peer == b"w"]
        self.assertEqual([(verb, fields.get("join")) for verb, fields in said],
                         [("OK", 1), ("{", None), ("OK", 2)])

    def test_a_fault_that_the_client_did_not_hear_of_is_told_again(self):
        d = self.desk
        d.join(b"w")
        d.hello(b"c", "run1")
        d.submit(b"c", 1)
        d.takes(b"w", "run1", 1)
        d.expect(b"c", "QUEUED")
        d.gone(CLIENTS, b"c")
        d.gone(WORKERS, b"w")
        d.wait(2)
        d.hello(b"d", "run1", [1])
        d.submit(b"d", 1, again=True, had="w")
        d.expect(b"d", "LOST", tasks=[[1, 1]], fault=tc.CRASH)

    def test_an_older_attempt_that_comes_late_does_not_displace_the_newer(self):
        d = self.desk
        d.join(b"w")
        d.hello(b"c", "run1")
        d.submit(b"c", 1, attempt=2)
        d.takes(b"w", "run1", 1, 2)
        d.expect(b"c", "QUEUED", tasks=[[1, 2]])
        d.submit(b"c", 1, attempt=1)
        d.quiet()

    def test_a_command_may_take_many_times_the_expiry_of_its_worker(self):
        d = self.desk
        d.join(b"w")
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)
        for _ in range(100):
            d.wait(d.broker.times.ready_interval)
            d.worker(b"w", 'READY {"name":"w","slots":1}')
            d.client(b"c", 'HELLO {"run":"r1"}')
        self.assertEqual({letter[3] for letter in d.letters}, {"QUEUED", "OK"})

    def test_a_command_that_must_wait_alone_is_not_overtaken_for_ever(self):
        """Although workers are given others in advance, as long as these prove short."""
        self.overtake({"careful": True})

    def test_a_command_that_waits_for_its_host_is_not_overtaken_for_ever(self):
        self.overtake({"elsewhere": True, "on": "h1"}, {"elsewhere": True, "not_on": "h1"},
                      {"needs": ["l0"]})

    def test_a_slot_is_not_kept_for_a_client_that_does_not_take_its_results(self):
        d = self.desk
        d.join(b"w", slots=1, labels=["gpu"])
        d.join(b"v", slots=1, weight=5)
        for peer in (b"c", b"e"):
            d.hello(peer, peer.decode())
        d.submit(b"e", 1)
        d.submit(b"c", 1, 2, 3, needs=["gpu"])
        d.ends(b"w", "c", 1)  # it was short, so that it might be given another in advance
        self.assertTrue(d.broker.scheduler.reservations)
        d.submit(b"e", 2)
        d.letters.clear()
        with mock.patch.object(tc, "CREDIT", 10):
            d.ends(b"w", "c", 2)
        d.expect(b"w", "{", token="e")

    def test_a_slot_is_not_kept_on_a_host_that_is_shunned(self):
        d = self.desk
        d.join(b"w", slots=1, host="h1", labels=["gpu"])
        d.join(b"v", slots=1, host="h2", labels=["gpu"])
        d.join(b"x", slots=0, host="h3")  # that has it not: else all would do
        for peer in (b"c", b"e"):
            d.hello(peer, peer.decode())
        d.submit(b"c", 1, 2, 3, 4, 5, needs=["gpu"])
        d.worker(b"x", 'READY {"name":"x","slots":1}')
        d.ends(b"w", "c", next(task.id for task in d.broker.registry.named["w"].tasks.values()))
        self.assertIn("w", [worker.name for worker in d.broker.scheduler.reservations])
        d.client(b"c", 'SHUN {"hosts":["h1"]}')
        d.submit(b"e", 1, 2)
        d.letters.clear()
        d.ends(b"w", "c", next(task.id for task in d.broker.registry.named["w"].tasks.values()
                               if task.state in tc.BUSY))
        d.expect(b"c", "RESULT")
        d.expect(b"w", "{", token="e")

    def test_many_who_wait_for_a_busy_worker_cost_little_beside_idle_ones(self):
        d = self.desk
        d.join(b"w", labels=["gpu"])
        for n in range(50):
            d.join(b"v%d" % n)
        for n in range(10):
            d.hello(b"c%d" % n, f"r{n}")
            d.submit(b"c%d" % n, 1, 2, needs=["gpu"], attempt=2)
        d.hello(b"e", "e")
        d.letters.clear()
        with mock.patch.object(tc.heapq, "heappop", wraps=heapq.heappop) as popped:
            d.submit(b"e", 1)
        self.assertLess(popped.call_count, 50)
        self.assertEqual(d.letters[0][3], "{")

    def overtake(self, *wishes):
        for seed, wish in enumerate(wishes * (12 // len(wishes))):
            r, d = random.Random(seed), Desk()
            for n, name in enumerate((b"w", b"v")[:r.randint(1, 2)]):
                d.join(name, slots=r.randint(1, 3), host=f"h{n}", labels=[f"l{n}"])
            clients = [b"c", b"d", b"e"][:r.randint(1, 3)]
            for peer in clients:
                d.hello(peer, peer.decode())
                d.submit(peer, *range(1, 120))
            careful = r.choice([b"c", b"z"])  # its client may have no others
            d.hello(b"z", "z")
            started, rounds, limit = False, 0, math.inf
            while not started:
                given = [letter for letter in d.letters if letter[3] == COMMAND]
                started = any(letter[4]["id"] == 999 for letter in given)
                d.letters.clear()
                for _, peer, run, _, fields, _ in given:
                    row = [fields["id"], fields["attempt"]]
                    d.worker(peer, tc.encode("QUEUED", {"tasks": [row]}), run)
                busy = [task for worker in d.broker.registry.workers.values()
                        for task in worker.tasks.values()
                        if task.state == tc.RUNNING]
                task = r.choice(busy)
                rounds += 1
                if rounds == 50:  # what workers have already must end first
                    d.submit(careful, 999, attempt=2, **wish)
                    limit = rounds + len(busy) * (1 if "careful" in wish else 4) + 4 * len(clients)
                self.assertLess(rounds, limit, seed)
                d.ends(task.worker.peer, task.client.run, task.id, task.attempt)
                d.client(task.client.peer, tc.encode("DONE", {"tasks": [[task.id, task.attempt]]}))

    def test_several_workers_lost_at_the_same_moment(self):
        d = self.desk
        d.hello(b"c", "r1")
        d.submit(b"c", *range(1, 13))
        for n in range(6):
            d.join(b"w%d" % n, slots=2)
        for n in range(3):
            d.broker.disconnected(WORKERS, b"w%d" % n, d.now)
        d.letters.clear()
        while d.now < 11.0:
            d.client(b"c", 'HELLO {"run":"r1"}')
            d.wait(1.0)
        lost = [row for letter in d.letters if letter[3] == "LOST" for row in letter[4]["tasks"]]
        self.assertEqual(sorted(lost), [[n, 1] for n in range(1, 13)])
        registry = d.broker.registry
        self.assertFalse(registry.named or registry.workers or d.broker.scheduler.slots)

    def test_a_result_whose_done_was_lost_with_its_broker_is_forgotten_by_its_worker(self):
        """The client has it, and does not ask for it again, whoever comes first."""
        for client_first in (True, False):
            d = Desk()
            if client_first:
                d.hello(b"c", "r1")
            d.join(b"w", held=[["r1", 1, 1]])
            if client_first:
                d.expect(b"c", "OK")
                d.expect(b"w", "CANCEL", tasks=[[1, 1]])
            else:
                d.expect(b"w", "RESEND", tasks=[[1, 1]])
                d.ends(b"w", "r1", 1)
                d.hello(b"c", "r1")
                d.expect(b"w", "DONE", tasks=[[1, 1]])
            d.quiet()
            self.assertFalse(d.broker.registry.clients["r1"].tasks)

    def test_what_a_worker_has_may_come_in_parts(self):
        d = self.desk
        b = Bench(tc.Worker("w", 1))
        b.hear('OK {"join":1}')
        for n in range(1, 6):
            b.hear(tc.encode(COMMAND, {"cmd": "x", "id": n, "attempt": 1}), "r1")
        b.machine.finished(b.machine.jobs["r1", 1, 1], exit_record(), 0.0)
        b.collect()
        with mock.patch.object(tc, "MAX_READY_TASKS", 2):
            b.machine.connected(BROKER, 0.0)
            frames, _ = b.machine.take()
        d.hello(b"c", "r1", [1, 2, 3, 4, 5])
        for frame in frames:
            d.worker(b"w", frame.body)
        d.expect(b"w", "OK", join=2)
        d.expect(b"w", "RESEND", tasks=[[1, 1]])
        for n in range(2, 6):
            self.assertEqual(d.broker.registry.clients["r1"].tasks[n].state, tc.RUNNING)
        self.assertGreater(len(frames[0].body.split(b"\n")), 3)
        self.assertFalse(d.broker.partial.parts)

    def test_parts_of_what_a_worker_has_do_not_pile_up(self):
        d = self.desk

        def part(peer, join, rows=1):
            d.worker(peer, tc.encode("READY", {"name": peer.decode(), "join": join, "more": True,
                                               "held": [["r", n, 1] for n in range(rows)]}))
        for join in (1, 2):
            for _ in range(tc.MAX_PARTS - 1):
                part(b"w", join)
        self.assertEqual([part["join"] for part in d.broker.partial.parts[b"w"][1]],
                         [2] * (tc.MAX_PARTS - 1))
        part(b"v", 1)
        part(b"u", 1)
        self.assertEqual(sorted(d.broker.partial.parts), [b"u", b"v"])
        part(b"v", 1, tc.MAX_READY_TASKS + 1)
        d.expect(b"v", "ERROR")
        d.worker(b"w", tc.encode("READY", {"name": "w", "join": 2, "parts": tc.MAX_PARTS - 1}))
        d.expect(b"w", "ERROR", reason="READY without its other parts: join again")
        d.quiet()
        self.assertFalse(d.broker.registry.named)
        d.gone(WORKERS, b"v")
        self.assertEqual(list(d.broker.partial.parts), [b"u"])
        d.wait(11.0)  # it may have come only after its connection was gone
        self.assertFalse(d.broker.partial.parts)

    def test_what_is_known_of_a_lost_attempt_is_kept_until_its_command_is_reported(self):
        d = self.desk
        d.hello(b"c", "r1")
        for attempt in (1, 2):
            d.join(b"w%d" % attempt)
            d.submit(b"c", 1, attempt=attempt)
            d.worker(b"w%d" % attempt, "BYE")
        d.client(b"c", 'DONE {"tasks":[[1,1]]}')  # of a try before
        self.assertEqual(d.broker.registry.clients["r1"].lost, {1: (2, "")})
        d.hello(b"c2", "r1", [1])
        self.assertEqual(d.broker.registry.clients["r1"].lost, {1: (2, "")})
        d.client(b"c2", 'DONE {"tasks":[[1,2]]}')
        self.assertFalse(d.broker.registry.clients["r1"].lost)
        d.submit(b"c2", 1, attempt=3)
        d.join(b"w3")
        d.worker(b"w3", "BYE")
        d.hello(b"c3", "r1")  # it was reported, but that DONE was lost
        self.assertFalse(d.broker.registry.clients["r1"].lost)

    def test_silent_worker_expires_and_its_commands_are_lost(self):
        d = self.desk
        d.run_one()
        d.expect(b"c", "QUEUED")
        d.wait(9.0)
        d.quiet()
        d.wait(1.0)
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="crash")
        d.expect(b"c", "OK", slots=0)
        d.quiet()
        self.assertFalse(d.broker.registry.workers or d.broker.registry.named)

    def test_a_worker_that_dies_before_it_confirms_may_have_been_killed_by_the_command(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.expect(b"w", "{")
        d.gone(WORKERS, b"w")
        d.expect(b"c", "OK", slots=0)
        d.wait(1.0)
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="crash")

    def test_ready_keeps_a_worker_and_is_answered_with_ok(self):
        d = self.desk
        d.join(b"w", slots=1)
        for _ in range(20):
            d.wait(2.0)
            d.worker(b"w", 'READY {"name":"w","slots":1}')
            d.quiet()
            d.wait(tc.OK_DELAY)
            d.expect(b"w", "OK", broker="b1", slots=1)
        d.quiet()

    def test_broken_connection_is_a_lost_worker_only_after_a_grace(self):
        d = self.desk
        d.run_one()
        d.expect(b"c", "QUEUED")
        d.gone(WORKERS, b"w")
        d.expect(b"c", "OK", slots=0)
        d.wait(0.9)
        d.quiet()
        d.wait(0.1)
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="crash")

    def test_a_chained_broker_has_longer_to_come_back_than_a_worker(self):
        """All of its workers are behind that connection, and none of them need be lost."""
        d = self.desk
        d.join(b"m", below=["m"])
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.takes(b"m", "r1", 1)
        d.gone(WORKERS, b"m")
        d.letters.clear()
        d.wait(9.9)
        d.quiet()
        d.wait(0.2)
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="crash")

    def test_a_join_that_was_under_way_for_long_changes_nothing(self):
        d = self.desk
        d.run_one()
        d.letters.clear()
        d.worker(b"old", 'READY {"name":"w","slots":1,"join":1}')
        d.client(b"older", 'HELLO {"run":"r1","join":1,"unreported":[]}')
        d.quiet()
        d.ends(b"w", "r1", 1)
        d.expect(b"c", "RESULT", id=1)

    def test_silence_while_we_were_stopped_is_not_held_against_anybody(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.join(b"v", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2)
        d.expect(b"w", "{")
        d.expect(b"v", "{")
        d.gone(WORKERS, b"v")
        d.letters.clear()
        d.pause(1000.0)
        d.quiet()
        d.wait(tc.REJOIN_TIME - 0.1)  # for a moment nothing does: they need time to be back
        d.quiet()
        d.wait(0.2)
        d.expect(b"c", "LOST", tasks=[[2, 1]])
        d.wait(3.0)
        d.expect(b"c", "LOST", tasks=[[1, 1]])  # from now on it counts

    def deadline_moves(self, seconds, begin, verb, **times):
        """The broker says this verb so long after begin(desk), and its own stop does not count.
        When it goes on, there is always REJOIN_TIME left."""
        for age in (0.3, seconds - 0.3):
            with self.subTest(age=age):
                d = Desk(**times)
                begin(d)
                d.letters.clear()
                d.wait(age)
                d.pause(1000.0)
                d.wait(max(seconds - age, tc.REJOIN_TIME) - 0.1)
                self.assertNotIn(verb, [letter[3] for letter in d.letters])
                d.wait(0.2)
                self.assertIn(verb, [letter[3] for letter in d.letters])

    def test_a_stop_of_the_broker_is_no_silence_of_a_worker(self):
        self.deadline_moves(10.0, lambda d: d.run_one(), "LOST")

    def test_a_stop_of_the_broker_is_no_silence_of_a_client(self):
        self.deadline_moves(8.0, lambda d: d.run_one(), "CANCEL", client_lease=8.0)

    def test_a_stop_of_the_broker_is_no_absence_of_a_worker(self):
        def begin(d):
            d.run_one()
            d.gone(WORKERS, b"w")
        self.deadline_moves(1.0, begin, "LOST")
        self.deadline_moves(6.0, begin, "LOST", lost_grace=6.0)

    def test_a_stop_of_the_broker_does_not_shorten_the_time_to_confirm(self):
        def begin(d):
            d.join(b"w")
            d.hello(b"c", "r1")
            d.submit(b"c", 1)
        self.deadline_moves(5.0, begin, "CANCEL")

    def test_a_stop_of_the_broker_does_not_shorten_the_wait_for_workers_after_its_restart(self):
        def submit(d):
            d.hello(b"c", "r1", unreported=[1])
            d.submit(b"c", 1, again=True, had="w")
        self.deadline_moves(10.0, submit, "LOST")
        d = Desk()  # one command after the other
        d.hello(b"c", "r1", unreported=[1, 2])
        d.submit(b"c", 1, again=True)
        d.submit(b"c", 2, again=True, had="w")
        d.pause(1000.0)
        d.wait(9.0)
        d.expect(b"c", "LOST", tasks=[[1, 1]])
        d.quiet()
        d.wait(1.1)
        d.expect(b"c", "LOST", tasks=[[2, 1]])
        d = self.desk  # nor for a client that comes only after the stop
        d.wait(9.0)
        d.pause(1000.0)
        d.join(b"v")
        submit(d)
        d.quiet()
        d.wait(0.9)
        d.join(b"w", running=[["r1", 1, 1]])
        d.expect(b"c", "QUEUED", tasks=[[1, 1]], worker="w")

    def test_a_run_that_is_over_is_known_as_such_after_a_stop_of_the_broker(self):
        d = self.desk
        d.run_one()
        d.gone(WORKERS, b"w")
        d.client(b"c", "BYE")
        d.letters.clear()
        d.wait(20.0)
        d.pause(1000.0)
        d.wait(9.0)
        d.worker(b"w2", 'READY {"name":"w","slots":1,"join":99,"running":[["r1",1,1]]}')
        d.expect(b"w2", "CANCEL", token="r1", tasks=[[1, 1]])

    def test_a_worker_may_be_back_late_just_after_a_stop_of_the_broker(self):
        """It was stopped as well, if it runs on the same machine."""
        d = Desk(queued_timeout=0.5)
        d.join(b"w")
        d.hello(b"c", "r1")
        d.pause(1000.0)
        d.submit(b"c", 1)
        d.expect(b"w", "{")
        d.wait(tc.REJOIN_TIME - 0.1)
        d.quiet()
        d.wait(0.2)
        d.expect(b"w", "CANCEL")

    def test_who_is_stopped_again_and_again_gives_up_the_dead_all_the_same(self):
        for awake, gap in ((0.3, 0.4), (0.4, 0.4), (0.3, 3.0), (3.0, 20.0)):
            d = Desk()
            d.run_one()
            d.letters.clear()
            spent = 0.0
            while "LOST" not in [letter[3] for letter in d.letters]:
                d.client(b"c", 'HELLO {"run":"r1"}')
                d.now += awake
                spent += awake
                self.assertLess(spent, 20, (awake, gap))
                if d.broker.deadline() <= d.now:
                    d.broker.tick(d.now)
                    d.collect()
                d.now += gap
                d.broker.paused(gap, d.now)
                d.collect()

    def test_a_long_stop_just_after_a_short_one_is_as_good_as_any(self):
        d = self.desk
        d.run_one()
        d.letters.clear()
        for gap in (0.3, 60.0):
            d.now += gap
            d.broker.paused(gap, d.now)
            d.broker.tick(d.now)
            d.now += 0.1
        d.gone(WORKERS, b"w")
        d.wait(1.7)
        self.assertNotIn("LOST", [letter[3] for letter in d.letters])

    def test_what_a_worker_runs_for_a_client_that_does_not_want_it_is_cancelled(self):
        d = self.desk
        d.hello(b"c", "r1", unreported=[5])
        d.join(b"w", slots=2, running=[["r1", 5, 1], ["r1", 7, 1]])
        d.expect(b"w", "CANCEL", token="r1", tasks=[[7, 1]])
        d.expect(b"c", "QUEUED", tasks=[[5, 1]])

    def test_what_a_worker_runs_for_a_client_that_has_left_is_cancelled(self):
        d = self.desk
        d.run_one()
        d.gone(WORKERS, b"w")
        d.client(b"c", "BYE")
        d.letters.clear()
        d.join(b"w2", slots=1, name="w", running=[["r1", 1, 1]])
        d.expect(b"w2", "CANCEL", token="r1", tasks=[[1, 1]])
        d.hello(b"c3", "r1", unreported=[1])  # it had only been asleep
        d.wait(70.0)
        self.assertFalse(d.broker.registry.departed or d.broker.registry.clients)

    def test_after_a_restart_the_later_attempt_counts(self):
        d = self.desk
        d.join(b"w", slots=1, running=[["r1", 1, 1]])
        d.join(b"v", slots=1, running=[["r1", 1, 2]])
        d.expect(b"w", "RECALL")
        d.expect(b"v", "RECALL")
        d.expect(b"w", "CANCEL", tasks=[[1, 1]])
        d.quiet()
        d.join(b"u", slots=1, running=[["r1", 1, 1]])
        d.expect(b"u", "CANCEL", tasks=[[1, 1]])

    def test_a_client_that_takes_no_results_gets_no_more_commands_run(self):
        d = self.desk
        with mock.patch.object(tc, "CREDIT", 1000):
            d.join(b"w", slots=1)
            d.hello(b"c", "r1")
            d.submit(b"c", *range(1, 10))
            for id in (1, 2, 3):
                d.takes(b"w", "r1", id)
                d.ends(b"w", "r1", id, stdout="x" * 400, time=100)
            d.letters.clear()
            d.hello(b"d", "r2")
            d.submit(b"d", 1)
            d.takes(b"w", "r2", 1)  # another client's are run
            d.ends(b"w", "r2", 1, time=100)
            d.letters.clear()
            d.client(b"c", 'DONE {"tasks":[[1,1]]}')
            d.expect(b"w", "DONE")
            d.takes(b"w", "r1", 4)

    def test_results_count_until_they_are_confirmed_whoever_keeps_their_output(self):
        """A plain worker's are kept by the broker, large outputs and files by their worker."""
        for plain, outputs in (
                (True, {"stdout": "x" * 1000}), (False, {"size": tc.INLINE + 1}),
                (False, {"size": 1, "stdout": "x", "returned": [[], [0o644, tc.INLINE]]})):
            d = Desk()
            with mock.patch.object(tc, "CREDIT", 1000):
                d.worker(b"w", "READY") if plain else d.join(b"w", slots=1)
                d.hello(b"c", "r1")
                d.submit(b"c", 1, 2)
                token = next(letter[2] for letter in d.letters if letter[3] == "{")
                d.letters.clear()
                d.worker(b"w", tc.encode("RESULT", {
                    "id": 1, "attempt": 1, "exitcode": 0, "time": 100, **outputs}), token)
                d.worker(b"w", "READY") if plain else None
                d.expect(b"c", "RESULT")
                self.assertNotIn("{", [letter[3] for letter in d.letters])
                d.letters.clear()
                d.client(b"c", 'DONE {"tasks":[[1,1]]}')
                d.expect(b"w", "DONE") if not plain else None
                d.expect(b"w", "{", id=2)

    def test_worker_that_comes_back_in_time_keeps_what_it_runs(self):
        d = self.desk
        d.join(b"w", slots=3)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2, 3)
        d.takes(b"w", "r1", 1)
        d.takes(b"w", "r1", 2)
        d.gone(WORKERS, b"w")
        d.letters.clear()
        # 1 runs, 2 has ended meanwhile, 3 has never arrived
        d.join(b"w2", slots=3, name="w", running=[["r1", 1, 1]], held=[["r1", 2, 1]])
        d.expect(b"w2", "RESEND", token="r1", tasks=[[2, 1]])
        d.expect(b"c", "LOST", tasks=[[3, 1]], fault="")
        d.expect(b"c", "OK")
        d.ends(b"w2", "r1", 2)
        d.expect(b"c", "RESULT", id=2)
        d.quiet()

    def test_client_that_comes_back_gets_what_it_missed(self):
        d = self.desk
        d.join(b"w", slots=4)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2, 3)
        for id in (1, 2, 3):
            d.takes(b"w", "r1", id)
        d.ends(b"w", "r1", 1)
        d.ends(b"w", "r1", 2)
        d.letters.clear()
        d.gone(CLIENTS, b"c")
        d.ends(b"w", "r1", 3)
        d.quiet()
        d.hello(b"c2", "r1", unreported=[2, 3])  # 1 has been reported
        d.expect(b"w", "DONE", tasks=[[1, 1]])
        d.submit(b"c2", 2, 3, again=True)
        d.expect(b"w", "RESEND", tasks=[[2, 1]])
        d.expect(b"w", "RESEND", tasks=[[3, 1]])
        d.quiet()

    def test_silent_client_loses_its_lease(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2)
        d.takes(b"w", "r1", 1)
        d.letters.clear()
        for _ in range(15):
            d.wait(2.0)
            d.worker(b"w", 'READY {"name":"w","slots":1}')
            d.expect(b"w", "CANCEL", tasks=[[1, 1]]) if d.now >= 30 else None
            d.wait(tc.OK_DELAY)
            d.expect(b"w", "OK")
        d.quiet()
        self.assertFalse(d.broker.registry.clients or d.broker.registry.run_of)

    def test_client_bye_cancels_everything(self):
        for below in ([], ["w"]):  # a worker, and a chained broker
            d = Desk()
            d.join(b"w", slots=2, below=below)
            d.hello(b"c", "r1")
            d.submit(b"c", 1, 2, 3)
            d.takes(b"w", "r1", 1)
            d.takes(b"w", "r1", 2)
            d.ends(b"w", "r1", 2)
            d.letters.clear()
            d.client(b"c", "BYE")
            said = {(m[3], tuple(map(tuple, m[4]["tasks"]))) for m in d.letters}
            self.assertIn(("DONE", ((2, 1),)), said)
            self.assertTrue(any(verb == "CANCEL" and (1, 1) in tasks for verb, tasks in said))
            self.assertFalse(d.broker.registry.clients)

    def test_cancel_is_answered_when_the_worker_has_stopped(self):
        for below in ([], ["w"]):
            d = Desk()
            d.join(b"w", slots=1, below=below)
            d.hello(b"c", "r1")
            d.submit(b"c", 1, 2)
            d.takes(b"w", "r1", 1)
            d.letters.clear()
            d.client(b"c", "CANCEL")
            d.expect(b"w", "CANCEL", token="r1", tasks=[[1, 1]])
            d.expect(b"c", "LOST", tasks=[[2, 1]], why="cancelled")
            d.quiet()
            d.worker(b"w", 'LOST {"tasks":[[1,1]],"why":"cancelled"}', "r1")
            d.expect(b"c", "LOST", tasks=[[1, 1]])
            d.quiet()

    def test_after_a_restart_running_commands_are_adopted(self):
        d = self.desk  # a new broker, with clients and workers of a time before
        d.hello(b"c", "r1", unreported=[1, 2, 3, 4])
        d.submit(b"c", 1, 2, again=True, had="w")
        d.submit(b"c", 3, again=True)
        d.submit(b"c", 4)
        d.quiet()
        d.join(b"w", slots=4, running=[["r1", 1, 1]], held=[["r1", 2, 1]])
        d.expect(b"c", "QUEUED", tasks=[[1, 1]], worker="w")
        d.expect(b"w", "RESEND", tasks=[[2, 1]])
        d.expect(b"w", "{", id=4)
        d.expect(b"c", "QUEUED", tasks=[[2, 1]])
        d.expect(b"c", "OK")
        d.quiet()
        d.wait(2.0)  # nobody has it
        d.expect(b"c", "LOST", tasks=[[3, 1]], fault="")

    def test_after_a_restart_a_command_that_its_worker_does_not_have_is_lost_at_once(self):
        for worker_first in (True, False):
            d = Desk()
            if worker_first:
                d.join(b"w")
            d.hello(b"c", "r1", unreported=[1])
            d.submit(b"c", 1, again=True, had="w")
            if not worker_first:
                d.quiet()
                d.join(b"w")
            d.expect(b"c", "LOST", tasks=[[1, 1]], fault="")
            d.submit(b"c", 1, attempt=2)
            d.takes(b"w", "r1", 1, 2)

    def test_after_a_restart_a_worker_starts_nothing_that_only_it_has_spoken_of(self):
        """A broker before us may have called it LOST, and given it to others."""
        d = self.desk
        b = Bench(tc.Worker("w", 1))
        b.answer()
        for n in (1, 2):
            b.hear(tc.encode(COMMAND, {"cmd": "x", "id": n, "attempt": 1}), "r1")
        first, second = (b.effect(tc.Start).job for _ in range(2))
        b.machine.connected(BROKER, 0.0)
        b.collect()
        d.worker(b"w", tc.encode("READY", dict(b.lines[-1][2])))
        b.machine.finished(first, exit_record(), 0.0)  # so there is a slot
        b.collect()
        b.lines.clear()
        self.assertFalse(b.may_start())
        for _, _, token, _, _, line in d.letters:
            b.hear(line, token)
            if b.may_start():
                break
        self.assertEqual(b.effect(tc.Recall).job, second)
        b.quiet_but("LOST", "RESULT", "QUEUED")

    def test_after_a_restart_workers_may_come_first(self):
        d = self.desk
        d.join(b"w", slots=4, running=[["r1", 1, 1], ["r1", 2, 1]], held=[["r1", 3, 1]])
        d.expect(b"w", "RECALL", tasks=[[1, 1], [2, 1]])  # but it has started both
        d.expect(b"w", "RESEND", tasks=[[3, 1]])
        d.hello(b"c", "r1", unreported=[1, 3])
        d.expect(b"w", "CANCEL", tasks=[[2, 1]])
        d.submit(b"c", 1, 3, again=True)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]])
        d.expect(b"c", "QUEUED", tasks=[[3, 1]])
        d.ends(b"w", "r1", 3)
        d.expect(b"c", "RESULT", id=3)
        d.quiet()

    def test_results_of_a_client_that_never_comes_are_given_up_after_its_lease(self):
        d = self.desk
        d.join(b"w", slots=4, held=[["r1", 3, 1]])
        d.expect(b"w", "RESEND")
        for _ in range(16):
            d.wait(2.0)
            d.worker(b"w", 'READY {"name":"w","slots":4}')
        verbs = [m[3] for m in d.letters if m[3] != "OK"]
        self.assertEqual(verbs, ["CANCEL"])
        self.assertFalse(d.broker.registry.clients)

    def test_an_attempt_that_runs_elsewhere_is_cancelled_at_the_late_comer(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.submit(b"c", 1, attempt=2)
        d.takes(b"w", "r1", 1, 2)
        d.letters.clear()
        d.join(b"v", slots=1, running=[["r1", 1, 1]])
        d.expect(b"v", "CANCEL", tasks=[[1, 1]])
        d.quiet()

    def test_unknown_peers_are_asked_who_they_are(self):
        d = self.desk
        d.client(b"c", '{"cmd":"x","id":1,"attempt":1}')
        d.expect(b"c", "WHO")
        d.worker(b"w", 'RESULT {"id":1,"attempt":1,"exitcode":0}', "r1")
        d.expect(b"w", "WHO")
        d.worker(b"w", 'READY {"name":"w","slots":1}')
        d.expect(b"w", "WHO")
        d.client(b"c", 'HELLO {"run":"r1"}')
        d.expect(b"c", "WHO")
        d.quiet()
        self.assertFalse(d.broker.registry.clients or d.broker.registry.workers)

    def test_fetch_and_chunk_go_only_between_the_two_concerned(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.join(b"evil", slots=1, weight=-1)
        d.hello(b"c", "r1")
        d.hello(b"e", "r2")
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)
        d.ends(b"w", "r1", 1, size=100000)
        d.letters.clear()
        fetch = 'FETCH {"id":1,"attempt":1,"offset":0,"size":10}'
        d.client(b"e", fetch)
        d.quiet()
        d.client(b"c", fetch)
        d.expect(b"w", "FETCH", token="r1")
        chunk = b'CHUNK {"id":1,"attempt":1,"offset":0}'
        d.tell(WORKERS, b"evil", chunk, "r1", b"forged")
        d.quiet()
        d.ends(b"evil", "r1", 1, stdout="forged")
        d.quiet()
        d.broker.receive(WORKERS, b"w", "r1", chunk, b"0123456789", d.now)
        frames, _ = d.broker.take()
        self.assertEqual(frames, [tc.Outgoing(CLIENTS, b"c", "", chunk, b"0123456789")])

    def test_memory_of_peers_long_gone_is_freed(self):
        d = self.desk
        for n in range(200):
            d.join(b"w%d" % n, slots=2)
            d.hello(b"c%d" % n, f"r{n}")
            d.submit(b"c%d" % n, 1)
            d.client(b"p%d" % n, '{"cmd":"x"}')
            d.gone(CLIENTS, b"p%d" % n)
            d.wait(0.5)
        d.wait(3600)
        b = d.broker
        r = b.registry
        left = [r.clients, r.run_of, r.workers, r.named, r.away, r.workers_seen, r.clients_seen,
                b.recovering, b.unconfirmed, b.scheduler.workers, b.scheduler.away]
        self.assertEqual([len(index) for index in left], [0] * len(left))
        self.assertLess(len(b.scheduler.ranking), 100)


class NamesOfHostsTest(unittest.TestCase):
    """Workers tell NAME/ID; the broker says which NAME to tell from then on."""

    def join(self, desk, peer, host):
        desk.joins += 1
        desk.worker(peer, tc.encode("READY", {
            "name": peer.decode(), "slots": 1, "join": desk.joins, "host": host}))
        _, line = desk.expect(peer, "OK")
        return tc.decode(line)[1]["host"]

    def test_two_of_one_name_are_told_apart(self):
        d = Desk()
        for peer, told, known in ((b"a", "vm/1b", "vm/1b"), (b"b", "vm/1b", "vm/1b"),
                                  (b"c", "vm/2c", "vm~2/2c"), (b"d", "vm/3d", "vm~3/3d"),
                                  (b"e", "x/2c", "x/2c"), (b"f", "vm~2/2c", "vm~2/2c"),
                                  (b"g", "plain", "plain")):
            self.assertEqual(self.join(d, peer, told), known)
        self.assertEqual(len(d.broker.scheduler.places()), 5)

    def test_after_a_restart_of_the_broker_names_stay(self):
        d = Desk()
        self.assertEqual(self.join(d, b"c", "vm~2/2c"), "vm~2/2c")
        self.assertEqual(self.join(d, b"d", "vm/2c"), "vm~2/2c")  # it is one machine
        self.assertEqual(self.join(d, b"a", "vm/1b"), "vm/1b")
        d.worker(b"a", "BYE")
        self.assertEqual(self.join(d, b"e", "vm/2c"), "vm~2/2c")

    def test_a_plain_worker_is_no_host_of_the_same_name(self):
        names = tc.HostNames()
        self.assertEqual([*map(names.name_of, ("vm/1b", "vm", "vm/2c", "vm"))],
                         ["vm", "vm~2", "vm~3", "vm~2"])
        self.assertEqual(names.identities["vm~2"], "vm")

    def test_a_name_is_free_when_its_last_worker_is_forgotten(self):
        d = Desk()
        self.join(d, b"a", "vm/1b")
        self.join(d, b"b", "vm/1b")
        d.worker(b"a", "BYE")
        self.assertEqual(self.join(d, b"c", "vm/2c"), "vm~2/2c")
        d.worker(b"b", "BYE")  # it was started again, and has another id
        self.assertEqual(self.join(d, b"d", "vm/3d"), "vm/3d")
        d.worker(b"c", "BYE")
        d.worker(b"d", "BYE")
        names = d.broker.registry.host_names
        self.assertEqual((d.broker.registry.at_host, names.identities, names.names), ({}, {}, {}))


class SessionTest(unittest.TestCase):
    """Joins, heartbeats and leases, of a worker."""

    def setUp(self):
        self.worker = tc.Worker("w1", 1)
        self.bench = Bench(self.worker)
        self.session = self.worker.session

    def test_while_it_joins_it_does_not_join_again_at_each_who(self):
        b = self.bench
        b.expect("READY", join=1)
        b.hear("WHO")
        b.quiet()
        b.answer()
        b.hear("WHO")
        b.expect("READY", join=2)

    def test_a_complaint_of_the_broker_is_a_warning_once_and_nothing_while_it_joins(self):
        levels = []
        for line in ('ERROR {"reason":"x"}', 'OK {"join":1}', *['ERROR {"reason":"x"}'] * 2,
                     'ERROR {"reason":"y"}'):
            self.worker.receive(BROKER, b"", "", line.encode(), b"", 0.0)
            levels.append([log.level for log in self.worker.take()[1] if isinstance(log, tc.Log)])
        info, warning, debug = [logging.INFO], [logging.WARNING], [logging.DEBUG]
        self.assertEqual(levels, [[], info, warning, debug, warning])

    def test_without_a_connection_it_takes_a_new_socket_in_the_end(self):
        b = self.bench
        b.answer()
        self.worker.disconnected(BROKER, b"", b.now)
        b.wait(4 * 2.0)
        self.worker.connected(BROKER, b.now)  # counting begins anew
        b.wait(2 * 2.0)
        self.assertNotIn(tc.Reconnect(BROKER), b.effects)
        self.worker.disconnected(BROKER, b"", b.now)
        b.wait(4 * 2.0)
        self.assertIn(tc.Reconnect(BROKER), b.effects)

    def test_what_was_wrong_with_a_link_is_told_only_until_it_is_up(self):
        b = self.bench
        for link_is_up, wanted in ((False, True), (True, False)):
            self.worker.disconnected(BROKER, b"", b.now)
            self.worker.refused(BROKER, "the key is refused", b.now)
            if link_is_up:
                self.worker.connected(BROKER, b.now)
            b.wait(1.0)
            told = [effect.text for effect in b.effects if isinstance(effect, tc.Notice)]
            b.effects.clear()
            self.assertEqual(["the key is refused" in text for text in told], [wanted])

    def test_with_a_slow_broker_attempts_to_join_become_rare(self):
        b, session = self.bench, self.session
        waits = []
        for _ in range(8):
            b.hear(f'OK {{"join":{session.number - 1}}}')
            waits.append((session.next_greeting - b.now) / session.interval)
            b.wait(session.next_greeting - b.now)
        self.assertEqual(waits, [2, 4, 8, 16, 16, 16, 16, 16])
        b.answer()
        self.worker.connected(BROKER, b.now)
        self.assertEqual(session.next_greeting - b.now, session.interval)

    def test_a_broker_without_any_patience_gets_some_greetings(self):
        b = self.bench
        b.answer(patience=0)
        b.lines.clear()
        b.wait(10 * tc.MIN_GREETING_INTERVAL)
        self.assertLessEqual(len(b.lines), 11)

    def test_greetings_without_an_answer_are_few_in_memory(self):
        b = self.bench
        b.answer()
        with mock.patch.object(tc, "MAX_UNANSWERED", 3):
            for _ in range(9):
                b.wait(2.0)
                b.hear('CANCEL {"tasks":[]}')  # it says other things, so that we stay connected
        self.assertEqual([*self.session.sent], [8, 9, 10])

    def test_an_older_answer_does_not_shorten_the_lease(self):
        b = self.bench
        b.answer(patience=6)
        b.wait(4.0)
        ends = []
        for number in (self.session.number, self.session.number - 1):
            b.answer(number)
            ends.append(self.session.lease_ends())
        self.assertEqual(ends[0], ends[1])

    def test_a_short_stop_after_which_the_lease_is_over_makes_it_join_again(self):
        b = self.bench
        b.answer(patience=6)
        b.now = 0.7 * 6
        b.lines.clear()
        self.worker.paused(tc.LONG_PAUSE / 2, b.now)
        b.collect()
        b.expect("READY", join=2)

    def test_a_long_greeting_is_whole_in_its_parts(self):
        rows = [["r", n, 1] for n in range(9)]
        ready = {"name": "w", "join": 7, "slots": 2, "running": rows[:5], "held": rows[5:]}
        with mock.patch.object(tc, "MAX_READY_TASKS", 2):
            *parts, last = tc.split_greeting(ready)
        self.assertEqual([sum(len(part.get(key, ())) for key in ("running", "held"))
                          for part in parts], [2, 2, 1, 2, 2])
        self.assertEqual(sum((part.get("running", []) for part in parts), []), rows[:5])
        self.assertEqual(sum((part.get("held", []) for part in parts), []), rows[5:])
        self.assertEqual({(part["name"], part["join"], part["more"]) for part in parts},
                         {("w", 7, True)})
        self.assertEqual(last, dict(ready, running=[], held=[], parts=5))


class WaitTest(unittest.TestCase):
    def test_each_cause_has_a_notice_and_the_limit_is_for_all_of_them(self):
        delay, wait = tc.NOTICE_DELAY, tc.Wait(10.0)
        self.assertEqual(wait.deadline(), math.inf)
        for now, cause, notice, deadline in (
                (1.0, "a", "", 1 + delay), (1.1, "b", "", 1.1 + delay), (1.2, "b", "", 1.1 + delay),
                (1.1 + delay, "b", "b", 11.0), (9.0, "b", "", 11.0), (10.0, "c", "", 10 + delay),
                (10 + delay, "c", "c", 11.0), (10.9, "c", "", 11.0)):
            self.assertEqual((wait.notice(cause, now), wait.deadline()), (notice, deadline), now)
            self.assertFalse(wait.timed_out(now))
        self.assertTrue(wait.timed_out(11.0))
        for now, cause, notice in ((12.0, "", "the wait is over, going on"), (13.0, "", ""),
                                   (20.0, "a", ""), (20.1, "", ""), (20.2, "", "")):
            self.assertEqual(wait.notice(cause, now), notice, now)
            self.assertFalse(wait.timed_out(now))
        self.assertEqual(wait.deadline(), math.inf)


class TreesAtBrokerTest(unittest.TestCase):
    """Commands that run in a tree: who gets them, and the ways of the trees."""

    def setUp(self):
        self.desk = Desk()

    def test_one_scout_waits_for_the_workspace_and_takes_no_slot(self):
        d = self.desk
        d.tree_worker(b"w", slots=2)
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1, 2, 3)
        d.scouts(b"w", "r1", 1)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]], preparing=tc.FILES, host="w/1")
        d.prepares(b"w", "r1", 1, tc.FILES)  # no news
        d.prepares(b"w", "r1", 1, tc.SETUP)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]], preparing=tc.SETUP, host="w/1")
        d.hello(b"b", "r2")
        d.submit(b"b", 1, 2)
        d.takes(b"w", "r2", 1)
        d.takes(b"w", "r2", 2)
        d.expect(b"b", "QUEUED")
        d.expect(b"b", "QUEUED")
        d.quiet()
        d.ends(b"w", "r2", 1, time=1000)
        d.expect(b"b", "RESULT")
        d.quiet()
        d.prepares(b"w", "r1", 1, "")
        _, line = d.expect(b"c", "QUEUED", tasks=[[1, 1]])
        self.assertNotIn(b"preparing", line)
        d.quiet()  # both slots are busy
        d.ends(b"w", "r2", 2, time=1000)
        d.expect(b"b", "RESULT")
        d.scouts(b"w", "r1", 2, "")

    def test_a_scout_that_becomes_ready_behind_others_goes_elsewhere_soon(self):
        d = self.desk
        d.tree_worker(b"w")
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1)
        d.submit(b"c", 2)
        d.takes(b"w", "r1", 2)
        d.prepares(b"w", "r1", 1, "")
        d.letters.clear()
        d.wait(tc.RECALL_DELAY)
        d.expect(b"w", "RECALL", tasks=[[1, 1]])

    def test_a_prepared_worker_comes_first_and_its_free_slots_recall_scouts(self):
        d = self.desk
        d.tree_worker(b"w", slots=2)
        d.tree_worker(b"v", slots=2, weight=1)
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1, 2)
        d.scouts(b"v", "r1", 1)
        d.scouts(b"w", "r1", 2)
        d.submit_with_tree(b"c", 3)
        d.letters.clear()
        d.prepares(b"w", "r1", 2, "")
        d.expect(b"c", "QUEUED")
        d.scouts(b"w", "r1", 3, "")  # although v has more weight
        d.expect(b"c", "QUEUED", tasks=[[3, 1]])
        d.quiet()  # w has no slot for the scout at v
        d.ends(b"w", "r1", 2)
        d.expect(b"v", "RECALL", token="r1", tasks=[[1, 1]])
        d.expect(b"c", "RESULT")
        d.wait(0.5)  # once is enough
        d.letters = [letter for letter in d.letters if letter[3] not in ("OK", "READY")]
        d.quiet()
        d.worker(b"v", tc.encode("LOST", {"tasks": [[1, 1]], "why": tc.RECALLED}), "r1")
        d.expect(b"c", "LOST", tasks=[[1, 1]])
        d.submit_with_tree(b"c", 1, attempt=2, avoid="v")
        d.scouts(b"w", "r1", 1, "", attempt=2)

    def test_scouts_stay_while_other_commands_take_the_slots(self):
        d = self.desk
        d.tree_worker(b"w")
        d.tree_worker(b"v")
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1, 2, 3)
        d.scouts(b"w", "r1", 1)
        d.scouts(b"v", "r1", 2)
        d.prepares(b"w", "r1", 1, "")
        d.ends(b"w", "r1", 1)
        d.letters = [letter for letter in d.letters if letter[1] != b"c"]
        d.scouts(b"w", "r1", 3, "")
        d.expect(b"c", "QUEUED")
        d.quiet()

    def test_another_tree_is_prepared_by_a_scout_again(self):
        d = self.desk
        d.tree_worker(b"w", slots=3)
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1, "")
        d.submit_with_tree(b"c", 2, tree="1" * 64)
        d.scouts(b"w", "r1", 2)
        d.letters.clear()
        d.submit_with_tree(b"c", 3, tree="1" * 64)
        d.quiet()
        d.prepares(b"w", "r1", 2, "")
        d.scouts(b"w", "r1", 3, "")

    def test_after_a_broken_connection_a_scout_finds_out(self):
        d = self.desk
        d.tree_worker(b"w", slots=2)
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1, 2)
        d.scouts(b"w", "r1", 1)
        d.expect(b"c", "QUEUED", preparing=tc.FILES)
        d.gone(WORKERS, b"w")
        d.expect(b"c", "OK", slots=0)
        d.tree_worker(b"w2", slots=2, name="w", running=[["r1", 1, 1]], host="w/1")
        _, line = d.expect(b"c", "QUEUED", tasks=[[1, 1]])  # it may be ready since
        self.assertNotIn(b"preparing", line)
        d.expect(b"w2", "{", id=2)  # one may find out
        d.expect(b"c", "OK", slots=2)
        d.prepares(b"w2", "r1", 1, tc.FILES)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]], preparing=tc.FILES, host="w/1")
        d.prepares(b"w2", "r1", 2, tc.FILES)
        d.expect(b"c", "QUEUED", tasks=[[2, 1]], preparing=tc.FILES)
        d.submit_with_tree(b"c", 3)
        d.quiet()
        d.ends(b"w2", "r1", 1)  # whose QUEUED was lost
        d.expect(b"c", "RESULT")
        d.quiet()

    def test_after_a_restart_of_the_broker_what_runs_takes_a_slot_until_its_worker_says_more(self):
        d = self.desk
        d.tree_worker(b"w", running=[["r1", 1, 1]])
        d.hello(b"c", "r1", unreported=[1, 2])
        d.submit_with_tree(b"c", 1, again=True, had="w")
        d.submit_with_tree(b"c", 2)
        d.letters.clear()
        d.prepares(b"w", "r1", 1, tc.SETUP)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]], preparing=tc.SETUP)
        d.quiet()  # it is known to be a scout
        d.prepares(b"w", "r1", 1, "")
        d.ends(b"w", "r1", 1)
        d.scouts(b"w", "r1", 2, "")

    def test_parts_of_a_tree_go_from_the_client_to_the_worker_that_asked(self):
        d = self.desk
        d.tree_worker(b"w")
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1)
        d.letters.clear()
        fetch = tc.encode("FETCH", {"id": 1, "attempt": 1, "tree": "0" * 64, "offset": 0, "size": 9,
                                    "got": 0, "of": 9, "host": "w/1"})
        d.worker(b"w", fetch, "r1")
        self.assertEqual(d.expect(b"c", "FETCH"), ("", fetch))
        data = memoryview(b"contents!")
        chunk = tc.encode("CHUNK", {
            "id": 1, "attempt": 1, "tree": "0" * 64, "offset": 0, "size": 9})
        d.broker.receive(CLIENTS, b"c", "", chunk, data, d.now)
        (frame,), _ = d.broker.take()
        self.assertEqual(frame[:4], (WORKERS, b"w", "r1", chunk))
        self.assertIs(frame.data, data)  # not a copy
        d.gone(CLIENTS, b"c")
        d.worker(b"w", fetch, "r1")  # it will ask again
        d.quiet()
        d.hello(b"c2", "r1", unreported=[1])
        d.gone(WORKERS, b"w")
        d.expect(b"c2", "OK", slots=0)
        d.client(b"c2", chunk)
        d.quiet()

    def test_an_unfit_host_is_named_to_the_client_with_the_output_of_its_setup(self):
        d = self.desk
        d.tree_worker(b"w", slots=3)
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1, "")
        d.submit_with_tree(b"c", 2)
        d.scouts(b"w", "r1", 2, tc.SETUP)
        d.letters.clear()
        d.worker(b"w", tc.encode("LOST", {
            "tasks": [[1, 1], [2, 1]], "why": "the setup failed", "fault": tc.UNFIT,
            "host": "another/2", "output": "x" * tc.INLINE + "end"}), "r1")
        _, line = d.expect(b"c", "LOST", tasks=[[1, 1]], why="the setup failed", fault=tc.UNFIT,
                           host="w/1", worker="w")  # its own host, whatever it says
        output = tc.decode(line)[1]["output"]
        self.assertEqual((len(output), output[-4:]), (tc.INLINE, "xend"))
        _, line = d.expect(b"c", "LOST", tasks=[[2, 1]], fault=tc.UNFIT, host="w/1")
        self.assertNotIn(b"output", line)  # once is enough
        d.quiet()
        d.submit_with_tree(b"c", 1)  # before it heard that
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="")

    def test_when_all_hosts_are_unfit_there_is_no_other_for_each_command(self):
        d = self.desk
        for peer in (b"w", b"v"):
            d.tree_worker(peer)
        d.join(b"plain", host="plain/1")  # it knows no trees
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1, 2)
        for id, peer in ((1, b"w"), (2, b"v")):
            d.scouts(peer, "r1", id)
            d.expect(b"c", "QUEUED")
            d.worker(peer, tc.encode("LOST", {
                "tasks": [[id, 1]], "why": "no room", "fault": tc.UNFIT}), "r1")
            d.expect(b"c", "LOST", tasks=[[id, 1]], host=f"{peer.decode()}/1")
        never = {"never_on": ["w/1", "v/1"]}
        d.submit_with_tree(b"c", 1, 2, attempt=2, **never)
        d.submit_with_tree(b"c", 3, **never)
        for id, attempt in ((1, 2), (2, 2), (3, 1)):
            d.expect(b"c", "LOST", tasks=[[id, attempt]], fault=tc.NOWHERE)
        d.broker.expect_hosts(True, d.now)
        d.submit_with_tree(b"c", 4, **never)
        d.quiet()
        d.tree_worker(b"x")
        d.scouts(b"x", "r1", 4, "")

    def test_workers_release_the_workspace_of_a_client_that_has_gone(self):
        for end in ("BYE", "lease"):
            self.setUp()
            d = self.desk
            d.tree_worker(b"w")
            d.tree_worker(b"v")
            d.hello(b"c", "r1")
            d.submit_with_tree(b"c", 1, 2)
            d.scouts(b"w", "r1", 1, "")
            d.scouts(b"v", "r1", 2, tc.SETUP)
            d.ends(b"w", "r1", 1)
            d.client(b"c", 'DONE {"tasks":[[1,1]]}')
            d.tree_worker(b"x")
            d.letters.clear()
            if end == "BYE":
                d.client(b"c", "BYE")
            else:
                d.gone(CLIENTS, b"c")
                for _ in range(8):  # the workers stay
                    d.wait(4)
                    for peer in (b"w", b"v", b"x"):
                        d.worker(peer, tc.encode("READY", {"name": peer.decode()}))
            d.letters = [letter for letter in d.letters if letter[3] != "OK"]
            for peer in (b"w", b"v"):
                _, line = d.expect(peer, "CANCEL", token="r1")
                self.assertEqual(line, b"CANCEL")
            d.expect(b"v", "CANCEL", tasks=[[2, 1]])
            d.quiet()

    def test_a_cancelled_run_keeps_its_workspaces_until_its_client_goes(self):
        d = self.desk
        d.tree_worker(b"w")
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1, "")
        d.letters.clear()
        d.client(b"c", "CANCEL")
        d.expect(b"w", "CANCEL", tasks=[[1, 1]])
        d.quiet()

    def test_the_answer_to_a_greeting_tells_which_hosts_know_no_trees(self):
        d = self.desk
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.wait(tc.OK_DELAY)
        _, line = d.expect(b"c", "OK", trees=True,
                           lacks="a worker with a version that knows --sync")
        self.assertNotIn(b"unfit", line)
        d.join(b"v", host="old/1")
        d.tree_worker(b"w")
        d.scouts(b"w", "r1", 1)
        d.letters.clear()
        d.client(b"c", 'HELLO {"run":"r1"}')
        d.wait(tc.OK_DELAY)
        _, line = d.expect(b"c", "OK", trees=True, unfit=["old/1"])
        self.assertNotIn(b"lacks", line)
        d.hello(b"b", "r2")  # who needs none is not told
        d.client(b"b", 'HELLO {"run":"r2"}')
        d.wait(tc.OK_DELAY)
        _, line = d.expect(b"b", "OK")
        self.assertNotIn(b"unfit", line)

    def test_the_status_tells_what_workspaces_use_and_no_label_of_ours(self):
        d = self.desk
        d.tree_worker(b"w", labels=["gpu", tc.TREES], cache=5)
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1)
        d.letters.clear()
        d.client(b"s", "STATUS")
        d.wait(tc.OK_DELAY)
        (worker,), (client,) = (d.broker.status()[name] for name in ("workers", "clients"))
        self.assertEqual((worker["labels"], worker["cache"], worker["running"]), (["gpu"], 5, 0))
        self.assertEqual((client["queued"], client["running"]), (1, 0))

    # what peers may not do

    def test_a_worker_gets_no_part_of_the_tree_of_a_run_whose_commands_it_does_not_have(self):
        d = self.desk
        d.tree_worker(b"w")
        d.tree_worker(b"v")
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1)
        d.hello(b"b", "r2")
        d.submit(b"b", 1)
        d.takes(b"v", "r2", 1)
        d.letters.clear()

        def ask(peer, token, id=1, attempt=1):
            d.worker(peer, tc.encode("FETCH", {
                "id": id, "attempt": attempt, "tree": "0" * 64, "offset": 0, "size": 9}), token)
        ask(b"v", "r1")
        ask(b"w", "r1", id=2)
        ask(b"w", "r1", attempt=2)
        d.quiet()
        d.ends(b"w", "r1", 1)
        d.expect(b"c", "RESULT")
        ask(b"w", "r1")  # it has ended
        d.quiet()
        ask(b"v", "r2")
        d.expect(b"b", "FETCH")  # that client has no tree, and will not answer

    def test_plain_peers_have_no_part_in_trees(self):
        d = self.desk
        d.worker(b"p", "READY")
        d.client(b"q", '{"cmd":"x"}')
        d.letters.clear()
        fields = {"id": 1, "attempt": 1, "tree": "0" * 64, "offset": 0, "size": 9}
        d.worker(b"p", tc.encode("FETCH", fields), "plain.b1.2 1 1")
        d.expect(b"p", "ERROR")
        d.client(b"q", tc.encode("CHUNK", fields))
        d.quiet()
        d.tree_worker(b"w")
        d.client(b"q", '{"cmd":"x"}')
        d.scouts(b"w", d.letters[0][2], 2, tc.FILES)  # to the plain client it is queued
        d.expect(b"q", "QUEUED")
        d.worker(b"w", tc.encode("FETCH", dict(fields, id=2)), "plain.b1.2")
        d.quiet()

    def test_nobody_sends_a_part_of_a_tree_to_a_worker_of_others(self):
        d = self.desk
        d.tree_worker(b"w")
        d.hello(b"c", "r1")
        d.hello(b"b", "r2")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1)
        d.letters.clear()

        def send(peer, token="", **more):
            d.broker.receive(CLIENTS, peer, token, tc.encode("CHUNK", dict(
                {"id": 1, "attempt": 1, "tree": "0" * 64, "offset": 0, "size": 1}, **more)),
                b"x", d.now)
            return [frame for frame in d.broker.take()[0] if frame.link == WORKERS]
        self.assertEqual(send(b"b"), [])
        self.assertEqual(send(b"b", "r1"), [])
        self.assertEqual(send(b"stranger"), [])
        self.assertEqual(send(b"c", id=2), [])
        self.assertEqual(send(b"c", attempt=2), [])
        self.assertEqual(len(send(b"c")), 1)
        d.ends(b"w", "r1", 1)
        self.assertEqual(send(b"c"), [])

    def test_each_way_has_its_own_kind_of_parts(self):
        d = self.desk
        d.tree_worker(b"w")
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", 1)
        d.scouts(b"w", "r1", 1)
        d.letters.clear()
        fields = {"id": 1, "attempt": 1, "offset": 0, "size": 9}
        d.worker(b"w", tc.encode("FETCH", fields), "r1")
        d.expect(b"w", "ERROR", reason="a worker's FETCH needs 'tree', 'id' and 'attempt'")
        d.client(b"c", tc.encode("CHUNK", fields))
        d.expect(b"c", "ERROR", reason="a CHUNK to a worker needs 'tree'")
        d.worker(b"w", 'QUEUED {"tasks":[[1,1]],"preparing":"lunch"}', "r1")
        d.expect(b"w", "ERROR", reason="QUEUED wants 'preparing' to be files or setup")
        d.quiet()


class OnlyElsewhereTest(unittest.TestCase):
    """What only another host is to run, and is lost if there is none."""

    def setUp(self):
        self.desk = d = Desk()
        d.join(b"w", host="h1")
        d.hello(b"c", "r1")

    def submit(self, id=1, **more):
        self.desk.submit(b"c", id, attempt=2, never_on=["h1"], elsewhere=True, avoid="w", **more)

    def expect_nowhere(self, id=1):
        self.desk.expect(b"c", "LOST", tasks=[[id, 2]], fault=tc.NOWHERE)
        self.desk.quiet()
        self.assertNotIn(id, self.desk.broker.registry.clients["r1"].tasks)

    def test_it_is_lost_at_once_if_there_is_no_other_host(self):
        d = self.desk
        self.submit()
        self.expect_nowhere()
        d.submit(b"c", 9)
        d.takes(b"w", "r1", 9)
        d.expect(b"c", "QUEUED")
        d.join(b"v", host="h1")
        d.join(b"x", host="h2", slots=0)  # takes nothing
        d.submit(b"c", 8)
        d.takes(b"v", "r1", 8)
        d.expect(b"c", "QUEUED")
        for wishes in {}, {"needs": ["gpu"]}:  # although no slot is free
            d.broker.registry.clients["r1"].lost.clear()
            self.submit(**wishes)
            self.expect_nowhere()

    def test_it_waits_while_more_hosts_are_about_to_join(self):
        for joins in True, False:
            self.setUp()
            d = self.desk
            d.broker.expect_hosts(True, d.now)
            self.submit()
            d.submit(b"c", 2, attempt=2, not_on="h1")
            d.quiet()  # a wish, too, which h1 could have after all others
            d.submit(b"c", 3)
            d.takes(b"w", "r1", 3)
            d.expect(b"c", "QUEUED")
            if joins:
                d.join(b"v", host="h2", slots=2)
                self.assertEqual(sorted(d.given(b"v")), [1, 2])
            d.broker.expect_hosts(False, d.now)
            d.collect()
            if not joins:
                self.expect_nowhere()
                d.ends(b"w", "r1", 3)
                d.takes(b"w", "r1", 2, 2)

    def test_it_waits_for_the_other_host_while_there_is_one(self):
        for leaves in True, False:
            self.setUp()
            d = self.desk
            d.join(b"v", host="h2")
            d.submit(b"c", 7, not_on="h1", elsewhere=True)
            d.takes(b"v", "r1", 7)
            d.expect(b"c", "QUEUED")
            self.submit()
            d.quiet()
            if leaves:
                d.worker(b"v", "BYE")
                d.expect(b"c", "LOST", tasks=[[7, 1]])
            else:
                d.gone(WORKERS, b"v")
                d.submit(b"c", 8, never_on=["h1"])
                d.quiet()  # it may be back in a moment
                d.wait(d.broker.times.lost_grace)
                d.expect(b"c", "LOST", tasks=[[7, 1]])
            d.expect(b"c", "LOST", tasks=[[1, 2]], fault=tc.NOWHERE)
            if not leaves:
                d.expect(b"c", "LOST", tasks=[[8, 1]], fault=tc.NOWHERE)

    def test_all_that_wait_are_told_when_the_other_host_leaves(self):
        d = self.desk
        d.join(b"v", host="h2")
        d.submit(b"c", 99, not_on="h1", elsewhere=True)
        d.takes(b"v", "r1", 99)
        for id in range(50):
            self.submit(id)
        d.letters.clear()
        d.worker(b"v", "BYE")
        self.assertEqual(sum(letter[3] == "LOST" for letter in d.letters), 51)

    def test_a_host_that_is_set_aside_is_better_than_none(self):
        d = self.desk
        d.join(b"v", host="h2")
        d.client(b"c", 'SHUN {"hosts":["h2"]}')
        self.submit()
        d.takes(b"v", "r1", 1, attempt=2)

    def test_below_a_broker_there_may_be_no_other_host_but_elsewhere(self):
        d = self.desk
        d.join(b"m", slots=2, below=["m"], depth=1, crew=[["h1", 1], ["h2", 1]])
        self.submit()
        d.takes(b"m", "r1", 1, attempt=2)
        d.expect(b"c", "QUEUED")
        d.worker(b"m", tc.encode("READY", {"name": "m", "crew": [["h1", 2]], "slots": 2}))
        d.join(b"x", host="h3")
        d.worker(b"m", tc.encode("LOST", {"tasks": [[1, 2]], "why": "", "fault": tc.NOWHERE}), "r1")
        d.expect(b"c", "LOST", tasks=[[1, 2]], fault="")

    def test_it_runs_on_the_other_host(self):
        d = self.desk
        d.join(b"v", host="h2")
        self.submit()
        d.takes(b"v", "r1", 1, attempt=2)

    def test_a_broker_below_says_so_as_well(self):
        d = self.desk = Desk(chained=True)
        d.broker.connected(BROKER, d.now)
        d.collect()
        d.join(b"w", host="h1")
        d.answer(above=["b0"], patience=5)
        d.letters.clear()
        d.tell(BROKER, b"", tc.encode("{", {
            "cmd": "x", "id": 1, "attempt": 2, "never_on": ["h1"]}), "up")
        d.expect(b"", "QUEUED", token="up")
        d.expect(b"", "LOST", token="up", tasks=[[1, 2]], fault=tc.NOWHERE)

    def test_clients_are_told_how_many_hosts_there_are(self):
        d = self.desk
        d.join(b"v", host="h2")
        d.join(b"x", host="h2")
        d.joins += 1
        d.client(b"e", tc.encode("HELLO", {"run": "r2", "join": d.joins}))
        d.expect(b"e", "OK", hosts=2, workers=3)


class PlainPeersTest(unittest.TestCase):
    """Peers that know the seed's README only."""

    def setUp(self):
        self.desk = Desk()

    def test_a_silent_worker_is_the_last_choice_until_it_says_ready(self):
        d = self.desk
        d.worker(b"p", 'READY {"weight": 5}')
        d.expect(b"p", "OK")
        for peer in (b"p", b"w", b"p"):  # preferred by its weight; silent; there again
            d.join(b"w", slots=1)
            d.client(b"c", '{"cmd":"x"}')
            d.expect(peer, "{")
            d.worker(peer, "BYE") if peer == b"w" else d.gone(WORKERS, b"p")
            d.gone(CLIENTS, b"c")
            d.letters.clear()
            if peer == b"p":
                d.worker(b"p", 'READY {"weight": 5}')
                d.wait(d.broker.times.worker_expiry + 1)
                self.assertTrue(d.broker.registry.workers[b"p"].silent)
            else:
                d.worker(b"p", 'READY {"weight": 5}')
            d.letters.clear()

    def test_each_ready_after_a_result_has_an_ok_also_if_that_cannot_be_read(self):
        for result in ('RESULT {"exitcode":0}', "RESULT {broken"):
            with self.subTest(result):
                self.desk = d = Desk()
                d.worker(b"p", "READY")
                for _ in range(2 * tc.ANSWERS_PER_SECOND):  # all in one second
                    d.client(b"c", '{"cmd":"x"}')
                    token, _ = [letter[2:4] for letter in d.letters if letter[3] == "{"][-1]
                    d.worker(b"p", result, token)
                    d.letters.clear()
                    d.worker(b"p", "READY")
                    d.expect(b"p", "OK")

    def test_the_conversation_of_the_seed(self):
        d = self.desk
        d.worker(b"W", "READY")
        _, line = d.expect(b"W", "OK")
        self.assertEqual(line, b"OK")
        d.client(b"C", '{"cmd":"pi 2", "odd":1}')
        token, line = d.expect(b"W", "{")
        self.assertEqual(line, b'{"cmd":"pi 2", "odd":1}')
        self.assertTrue(token)
        d.worker(b"W", b"QUEUED " + line, token)
        _, line = d.expect(b"C", "QUEUED", cmd="pi 2")
        self.assertEqual(line, b'QUEUED {"cmd":"pi 2", "odd":1}')
        d.worker(b"W", 'RESULT {"cmd":"pi 2","exitcode":0,"stdout":"3.12\\n","time":13.95}', token)
        d.expect(b"C", "RESULT", cmd="pi 2", exitcode=0, stdout="3.12\n", time=13.95)
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        d.quiet()

    def test_plain_peers_get_one_message_per_line(self):
        d = self.desk
        d.broker.receive(WORKERS, b"W", "", b"READY\nREADY", b"", 0.0)
        d.broker.receive(CLIENTS, b"C", "", b'{"cmd":"a"}', b"", 0.0)
        d.broker.receive(CLIENTS, b"C", "", b'{"odd":"a"}', b"", 0.0)
        d.broker.receive(CLIENTS, b"C", "", b"nonsense", b"", 0.0)
        frames, _ = d.broker.take()
        self.assertEqual([(f.peer, f.body[:6]) for f in frames], [
            (b"W", b"OK"), (b"W", b"OK"), (b"W", b'{"cmd"'), (b"C", b"ERROR "), (b"C", b"ERROR ")])

    def test_two_equal_commands_are_two(self):
        d = self.desk
        d.join(b"w", slots=2)
        for _ in range(2):
            d.client(b"C", '{"cmd":"x"}')
        got = [m for m in d.letters if m[3] == "{"]
        self.assertEqual(len({m[4]["id"] for m in got}), 2)
        d.letters.clear()
        for _, _, run, _, fields, _ in got:
            d.worker(b"w", tc.encode("QUEUED", {"tasks": [[fields["id"], 1]]}), run)
            d.ends(b"w", run, fields["id"], stdout="o")
        self.assertEqual([m[3] for m in d.letters if m[1] == b"C"],
                         ["QUEUED", "RESULT", "QUEUED", "RESULT"])
        self.assertEqual([m[3] for m in d.letters if m[1] == b"w"], ["DONE", "DONE"])

    def test_a_plain_worker_has_one_slot_and_is_free_only_after_ready(self):
        d = self.desk
        d.worker(b"W", 'READY {"weight": 5}')
        d.expect(b"W", "OK")
        d.hello(b"c", "r1")
        d.submit(b"c", 1, 2)
        token, _ = d.expect(b"W", "{", id=1)
        for _ in range(3):
            d.worker(b"W", "READY")  # only refreshes it
            d.expect(b"W", "OK")
        d.worker(b"W", 'QUEUED {"cmd":"c1"}', token)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]])
        d.worker(b"W", 'RESULT {"cmd":"c1","exitcode":3,"stdout":"o","time":1}', token)
        d.expect(b"c", "RESULT", id=1, attempt=1, exitcode=3, stdout="o")
        d.quiet()
        d.worker(b"W", "READY")
        d.expect(b"W", "OK") if d.letters[0][3] == "OK" else None
        d.expect(b"W", "{", id=2)

    def test_a_running_plain_worker_is_silent_and_does_not_expire(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.client(b"C", '{"cmd":"x"}')
        d.expect(b"W", "OK")
        token, _ = d.expect(b"W", "{")
        d.worker(b"W", 'QUEUED {"cmd":"x"}', token)
        d.expect(b"C", "QUEUED")
        d.wait(3600)
        d.quiet()
        d.worker(b"W", 'RESULT {"cmd":"x","exitcode":0,"stdout":"","time":1}', token)
        d.expect(b"C", "RESULT")

    def test_a_worker_that_comes_back_late_with_a_plain_clients_command_is_too_late(self):
        d = self.desk
        for name in (b"w", b"v"):
            d.join(name, slots=1)
            if name == b"w":
                d.client(b"C", '{"cmd":"x"}')
                run, _ = d.expect(b"w", "{")
                d.worker(b"w", 'QUEUED {"tasks":[[1,1]]}', run)
        d.gone(WORKERS, b"w")
        d.wait(1.1)
        d.takes(b"v", run, 1, 2)
        d.ends(b"v", run, 1, 2)
        d.letters.clear()
        d.join(b"w2", slots=1, name="w", running=[[run, 1, 1], [run, 2, 1]])
        d.expect(b"w2", "CANCEL", token=run, tasks=[[1, 1], [2, 1]])
        d.quiet()

    def test_a_plain_worker_that_says_ready_only_once_is_the_last_choice(self):
        d = self.desk
        d.worker(b"W", 'READY {"weight":9}')
        d.expect(b"W", "OK")
        d.wait(3600)
        d.hello(b"c", "r1")
        self.assertEqual((d.broker.state_of_cloud()["workers"], d.broker.scheduler.slots), (1, 1))
        d.join(b"w", slots=1)
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)
        d.ends(b"w", "r1", 1)
        d.submit(b"c", 2, 3)  # the second may be given ahead, for the first was short
        for id in (2, 3):
            d.takes(b"w", "r1", id)
        d.submit(b"c", 4)
        token, _ = d.expect(b"W", "{", id=4)
        d.worker(b"W", 'QUEUED {"cmd":"c4"}', token)
        d.worker(b"W", 'RESULT {"cmd":"c4","exitcode":0}', token)
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        d.submit(b"c", 5)
        d.expect(b"W", "{", id=5)  # it is as good as any again

    def test_a_silent_plain_worker_that_does_not_take_its_command_is_out_until_it_says_ready(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.wait(60)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.expect(b"W", "OK")
        token, _ = d.expect(b"W", "{", id=1)
        d.wait(5)
        d.expect(b"c", "LOST", tasks=[[1, 1]], fault="")
        d.submit(b"c", 1, attempt=2)
        d.quiet()
        d.client(b"c", tc.encode("HELLO", {"run": "r1", "beat": 9}))
        d.wait(10)
        d.expect(b"c", "OK", slots=1)
        d.expect(b"c", "OK", slots=0)  # then it is known that there is no worker
        d.quiet()
        d.worker(b"W", 'QUEUED {"cmd":"c1"}', token)
        d.expect(b"W", "ERROR")
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        d.expect(b"W", "{", id=1, attempt=2)
        d.gone(WORKERS, b"W")
        self.assertFalse(d.broker.registry.workers)

    def test_a_plain_worker_that_is_ready_again_has_lost_what_it_ran(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        token, _ = d.expect(b"W", "{", id=1)
        d.worker(b"W", "READY")  # before it saw the command
        d.expect(b"W", "OK")
        d.quiet()
        d.worker(b"W", 'QUEUED {"cmd":"c1"}', token)
        d.expect(b"c", "QUEUED", tasks=[[1, 1]])
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        _, line = d.expect(b"c", "LOST", tasks=[[1, 1]], fault="crash", worker="W")
        self.assertIn(b"said READY instead of its result", line)
        d.quiet()
        d.wait(1)
        d.client(b"C", '{"cmd":"x"}')
        for _ in range(tc.Times().crash_limit):
            token, _ = d.expect(b"W", "{", cmd="x")
            d.worker(b"W", 'QUEUED {"cmd":"x"}', token)
            d.expect(b"C", "QUEUED")
            d.worker(b"W", "READY")
            d.expect(b"W", "OK")
        d.expect(b"C", "RESULT", cmd="x", exitcode=tc.NOT_RUN)
        d.quiet()

    def test_a_result_that_cannot_be_read_is_a_failure(self):
        for word in (b"", b" ", b" null", b" []", b" {}", b' {"exitcode":"0"}', b' {"exitcode":0,',
                     b' {"exitcode":0,"stdout":null}', b' {"exitcode":0,"stdout":"a\xff"}'):
            d = Desk()
            d.worker(b"W", "READY")
            d.expect(b"W", "OK")
            d.hello(b"c", "r1")
            for peer in (b"c", b"C"):
                d.submit(b"c", 1) if peer == b"c" else d.client(b"C", '{"cmd":"x"}')
                token, _ = d.expect(b"W", "{")
                d.worker(b"W", b"RESULT" + word, "another")
                d.expect(b"W", "ERROR", token="")
                d.quiet()
                d.worker(b"W", b"RESULT" + word, token)
                d.expect(b"W", "ERROR", token="")
                _, line = d.expect(peer, "RESULT", exitcode=tc.NOT_RUN)
                self.assertIn(b"its result cannot be read: RESULT", line)
                d.worker(b"W", "READY")
                d.expect(b"W", "OK")
                d.quiet()

    def seeds_worker(self, said):
        """What the seed's worker does with the next message: it takes all for commands."""
        for letter in [letter for letter in self.desk.letters if letter[1] == b"W"][:1]:
            self.desk.letters.remove(letter)
            _, _, token, verb, fields, line = letter
            said.append(verb)
            self.desk.worker(b"W", b"QUEUED " + line, token)
            result = None if verb != "{" else {
                "cmd": fields.get("cmd"), "exitcode": 0, "stdout": "o"}
            self.desk.worker(b"W", b"RESULT " + tc.dump(result).encode(), token)
            self.desk.worker(b"W", "READY")

    def test_a_worker_that_takes_our_answers_for_commands_gets_no_more_of_them(self):
        for first in ("READY", "nonsense", 'QUEUED {"id":1}'):
            self.desk, said = Desk(), []
            d = self.desk
            d.worker(b"W", first)
            d.hello(b"c", "r1")
            d.submit(b"c", *range(1, 10))
            for _ in range(100):
                self.seeds_worker(said)
                d.now += 0.001
            self.assertEqual(said.count("{"), 9)
            self.assertLess(len(said) - 9, 6, said)
            verbs = Counter(letter[3] for letter in d.letters if letter[1] == b"c")
            self.assertEqual((verbs["QUEUED"], verbs["RESULT"], verbs["LOST"]), (9, 9, 0))
            d.wait(20)
            d.submit(b"c", 10)
            self.assertEqual(d.letters[-1][1:4:2], (b"W", "{"))

    def test_answers_to_plain_peers_are_few(self):
        d = self.desk
        for _ in range(100):
            d.worker(b"W", "READY")
            d.worker(b"V", "nonsense")
            d.worker(b"U", 'QUEUED {"id":1}')
            for peer in (b"C", b"D"):
                d.client(peer, '{"cmd":"x"}') if peer == b"D" else None
                d.client(peer, "nonsense")
                d.client(peer, "")
        said = Counter(letter[1::2][:2] for letter in d.letters)
        errors = {(peer, "ERROR"): tc.ANSWERS_PER_SECOND for peer in (b"V", b"C", b"D")}
        self.assertEqual(said, {**errors, (b"W", "OK"): 5, (b"W", "{"): 1, (b"U", "WHO"): 5})
        d.letters.clear()
        d.wait(1)
        d.expect(b"W", "OK")  # one that it may be waiting for
        d.quiet()
        d.wait(1)
        self.assertFalse(d.broker.limit.answers)
        d.client(b"C", "nonsense")
        d.expect(b"C", "ERROR")

    def test_a_plain_worker_gets_an_answer_after_each_result_however_fast_it_is(self):
        d = self.desk
        d.hello(b"c", "r1")
        d.submit(b"c", *range(300))
        for id in range(300):
            d.worker(b"W", "READY")
            d.expect(b"W", "OK")
            token, _ = d.expect(b"W", "{", id=id)
            d.worker(b"W", b'QUEUED {"cmd":"c"}', token)
            d.worker(b"W", b'RESULT {"cmd":"c","exitcode":0}', token)
            d.letters.clear()

    def test_an_empty_message_is_answered(self):
        for link in (CLIENTS, WORKERS):
            self.desk.tell(link, b"x", "")
            self.desk.expect(b"x", "ERROR", message="", reason="an empty message")
            self.desk.quiet()

    def test_unconfirmed_command_of_a_plain_client_is_tried_elsewhere(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        d.client(b"C", '{"cmd":"x"}')
        token, _ = d.expect(b"W", "{")
        d.worker(b"V", "READY")
        d.expect(b"V", "OK")
        d.wait(5)
        token2, _ = d.expect(b"V", "{")
        self.assertNotEqual(token, token2)
        d.worker(b"W", 'RESULT {"cmd":"x","exitcode":0,"stdout":"late","time":1}', token)
        d.expect(b"W", "ERROR")
        d.worker(b"V", 'RESULT {"cmd":"x","exitcode":0,"stdout":"good","time":1}', token2)
        d.expect(b"C", "RESULT", stdout="good")
        d.quiet()

    def test_lost_workers_are_retried_until_the_command_is_poison(self):
        d = self.desk
        d.client(b"C", '{"cmd":"x"}')
        for n in range(tc.Times().crash_limit):
            peer = b"W%d" % n
            d.worker(peer, "READY")
            d.expect(peer, "OK")
            token, _ = d.expect(peer, "{")
            d.worker(peer, 'QUEUED {"cmd":"x"}', token)
            d.expect(b"C", "QUEUED")
            d.gone(WORKERS, peer)
        _, line = d.expect(b"C", "RESULT", cmd="x", exitcode=tc.NOT_RUN)
        self.assertIn(b"3 workers", line)
        d.quiet()

    def test_a_result_with_the_token_of_a_command_before_is_not_taken(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        old, _ = d.expect(b"W", "{", attempt=1)
        d.wait(5)  # it does not confirm
        d.expect(b"c", "LOST", tasks=[[1, 1]])
        d.submit(b"c", 1, attempt=2)
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        new, _ = d.expect(b"W", "{", attempt=2)
        for verb in ("QUEUED", "RESULT"):
            d.worker(b"W", f'{verb} {{"cmd":"c1","exitcode":1}}', old)
            d.expect(b"W", "ERROR")
            d.quiet()
        d.worker(b"W", 'RESULT {"cmd":"c1","exitcode":0}', new)
        d.expect(b"c", "RESULT", attempt=2, exitcode=0)

    def test_a_command_with_which_a_worker_was_lost_runs_alone(self):
        """It waits for a free slot, and no other command waits behind it."""
        d = self.desk
        d.worker(b"W", "READY")
        d.client(b"C", '{"cmd":"x"}')
        d.warm(b"w")
        d.gone(WORKERS, b"W")
        d.quiet()
        d.ends(b"w", "warm", 5)
        d.expect(b"warm", "RESULT")
        d.expect(b"w", "{", cmd="x", attempt=2)
        d.submit(b"warm", 6)
        d.quiet()

    def test_a_command_without_such_a_suspicion_may_be_given_ahead(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.client(b"C", '{"cmd":"x"}')
        d.warm(b"w")
        d.wait(5)  # W does not confirm it
        d.expect(b"w", "{", cmd="x", attempt=2)

    def test_a_retry_of_a_plain_client_goes_elsewhere_and_comes_before_its_new_commands(self):
        d = self.desk
        for peer, weight in ((b"w", 5), (b"v", 0)):
            d.join(peer, slots=1, weight=weight)
        d.client(b"C", '{"cmd":"x"}')
        for attempt, peer in enumerate((b"w", b"v", b"v"), 1):
            run, _ = d.expect(peer, "{", cmd="x", attempt=attempt)
            if attempt == 2:
                d.client(b"C", '{"cmd":"y"}')
                d.client(b"C", '{"cmd":"z"}')
                d.expect(b"w", "{", cmd="y")
            if attempt < 3:
                d.worker(peer, tc.encode("LOST", {
                    "tasks": [[1, attempt]], "why": "no memory", "fault": tc.SPAWN}), run)

    def test_each_worker_has_its_own_time_to_confirm(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.client(b"C", '{"cmd":"x"}')
        run, _ = d.expect(b"w", "{", cmd="x")
        d.wait(2)
        d.join(b"v", slots=1)
        d.worker(b"w", tc.encode("LOST", {
            "tasks": [[1, 1]], "why": "no memory", "fault": tc.SPAWN}), run)
        d.expect(b"v", "{", cmd="x", attempt=2)
        d.wait(4.9)
        d.quiet()
        d.wait(0.2)
        d.expect(b"v", "CANCEL", token=run, tasks=[[1, 2]])

    def test_id_and_attempt_of_a_plain_client_mean_nothing(self):
        d = self.desk
        d.join(b"w", slots=5)
        d.client(b"C", '{"cmd":"x"}')
        d.client(b"C", '{"cmd":"y","id":7,"attempt":0,"cut":1}')
        run, _ = d.expect(b"w", "{", cmd="x", id=1)
        d.expect(b"w", "{", cmd="y", id=2, attempt=1, cut=tc.PLAIN_INLINE)
        d.ends(b"w", run, 2, stdout="o")
        d.expect(b"C", "RESULT", cmd="y", stdout="o")

    def test_odd_fields_of_a_plain_workers_result_stop_there(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.expect(b"W", "OK")
        token, _ = d.expect(b"W", "{")
        deep = "[" * 500 + "]" * 500
        d.worker(b"W", '{"exitcode":0}', token)
        d.expect(b"W", "ERROR")
        d.worker(b"W", f'RESULT {{"exitcode":0,"stdout":"abc","size":99,"x":1e999,"y":{deep}}}',
                 token)
        _, line = d.expect(b"c", "RESULT", stdout="abc", size=None, host="W")
        self.assertNotIn(b"Infinity", line)

    def test_a_plain_worker_cannot_become_another(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.expect(b"W", "OK")
        d.worker(b"W", 'READY {"name":"W","join":1}')
        d.expect(b"W", "ERROR")
        self.assertEqual(len(d.broker.registry.workers), 1)

    def test_large_output_of_a_plain_worker_is_cut_with_a_mark_too(self):
        for size in (tc.PLAIN_INLINE, tc.PLAIN_INLINE + 1000, tc.MAX_RESULT - 1000, tc.MAX_RESULT):
            d = Desk()
            d.worker(b"W", "READY")
            d.expect(b"W", "OK")
            d.client(b"C", '{"cmd":"x"}')
            token, _ = d.expect(b"W", "{")
            d.worker(b"W", tc.encode("RESULT", {"exitcode": 0, "stdout": "x" * size}), token)
            stdout = json.loads(d.expect(b"C", "RESULT")[1][7:])["stdout"]
            mark = tc.cut_mark(tc.PLAIN_INLINE, size) if size > tc.PLAIN_INLINE else ""
            self.assertEqual(stdout, "x" * tc.PLAIN_INLINE + mark)

    def test_plain_clients_get_utf8_only_cut_between_characters(self):
        size = tc.PLAIN_INLINE
        for data, shown, sent in (
                (b"x" * (size - 1) + "☃".encode() * 99, "x" * (size - 1), size - 1),
                (b"x" * (size - 2) + "\U0001f40d".encode() * 99, "x" * (size - 2), size - 2),
                (b"\xff" + b"x" * size * 2, "\ufffd" + "x" * (size - 1), size),
                (b"a\xff\xe2\x98", "a\ufffd\ufffd", 4), ("\u2603".encode(), "\u2603", 3)):
            for kind in ("plain", "ours"):
                d = Desk()
                d.worker(b"W", "READY") if kind == "plain" else d.join(b"W")
                d.client(b"C", '{"cmd":"\\udc80\\ud83d"}')
                token = next(letter[2] for letter in d.letters if letter[3] == "{")
                more = {"stdout": tc.to_text(data)} if kind == "plain" else {
                    "stdout": tc.to_text(data[:size]), "size": len(data), "id": 1, "attempt": 1}
                d.worker(b"W", tc.encode("RESULT", dict(more, exitcode=0)), token)
                line, = (letter[5] for letter in d.letters if letter[3] == "RESULT")
                result = json.loads(line[7:])
                self.assertEqual(result["cmd"], "\udc80\ud83d")
                mark = tc.cut_mark(sent, len(data)) if sent < len(data) else ""
                self.assertEqual(result["stdout"], shown + mark)

    def test_what_is_long_only_as_json_is_not_cut(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.client(b"C", '{"cmd":"x"}')
        d.expect(b"W", "OK")
        token, _ = d.expect(b"W", "{")
        d.worker(b"W", tc.encode("RESULT", {"exitcode": 0, "stdout": "\1" * 200_000}), token)
        d.expect(b"C", "RESULT", stdout="\1" * 200_000)

    def test_large_output_is_cut_with_a_mark(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.client(b"C", '{"cmd":"x"}')
        run, line = d.expect(b"w", "{", cut=tc.PLAIN_INLINE)
        d.worker(b"w", tc.encode("RESULT", {"id": 1, "attempt": 1, "exitcode": 0, "time": 1,
                                            "stdout": "abc", "size": 1000}), run)
        _, line = d.expect(b"C", "RESULT")
        stdout = json.loads(line[7:])["stdout"]
        self.assertTrue(stdout.startswith("abc\n[testcloud: "), stdout)
        self.assertIn("3 of 1000 bytes", stdout)

    def test_messages_too_large_for_the_wire_are_not_passed_on(self):
        d = self.desk
        d.worker(b"W", "READY")
        d.hello(b"c", "r1")
        d.client(b"C", tc.encode("{", {"cmd": "x" * 3 * tc.MAX_COMMAND}))
        d.expect(b"C", "ERROR")
        for peer in (b"C", b"c"):
            d.submit(b"c", 1) if peer == b"c" else d.client(b"C", '{"cmd":"x"}')
            d.expect(b"W", "OK")
            token, _ = d.expect(b"W", "{")
            d.worker(b"W",
                     tc.encode("RESULT", {"exitcode": 3, "time": 1, "stdout": "\udcff" * 400000}),
                     token)
            _, line = d.expect(peer, "RESULT", exitcode=3)
            self.assertLess(len(line), tc.MAX_FRAME // 2)
            self.assertIn(f"cut after {tc.PLAIN_INLINE} of 400000 bytes", line.decode())
            d.worker(b"W", "READY")

    def test_a_plain_client_that_leaves_is_forgotten(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.client(b"C", '{"cmd":"x"}')
        d.client(b"C", '{"cmd":"y"}')
        d.gone(CLIENTS, b"C")
        d.expect(b"w", "{")
        d.expect(b"w", "CANCEL")
        self.assertFalse(d.broker.registry.clients)


class MisbehavingPeersTest(unittest.TestCase):
    """Whatever a peer says, in whatever state, nobody else notices."""

    def test_a_broker_that_was_up_for_days_remembers_nobody(self):
        r = random.Random(7)
        d = Desk()
        for n in range(1, 1500):
            client, worker = b"c%d" % n, b"w%d" % n
            run = f"r{n}"
            d.hello(client, run)
            d.submit(client, 1, 2, 3)
            d.submit(client, 4, 5, 6, needs=[f"l{n}"])
            d.client(b"C%d" % n, '{"cmd":"x"}')
            if r.random() < 0.8:
                d.join(worker, slots=r.randint(0, 3), labels=[f"l{n}"])
                d.worker(b"W%d" % n, "READY")
            for letter in [letter for letter in d.letters if letter[3] == "{"]:
                if r.random() < 0.5:
                    _, peer, token, _, fields, _ = letter
                    ids = {key: fields[key] for key in ("id", "attempt") if key in fields}
                    d.worker(peer, tc.encode("RESULT", {"exitcode": 0, "time": 1, **ids}), token)
            for link, peer in ((CLIENTS, client), (WORKERS, worker), (CLIENTS, b"C%d" % n),
                               (WORKERS, b"W%d" % n)):
                if peer[:1] in b"cw" and r.random() < 0.5:
                    d.tell(link, peer, "BYE")
                if peer[:1] in b"CW" or r.random() < 0.5:  # otherwise it is silent from now on
                    d.gone(link, peer)
            d.wait(r.choice((0.1, 10.0, 100.0)))
            d.letters.clear()
        d.wait(100)
        kept, parts = {}, [d.broker]  # the broker, and the objects of ours that it is made of
        for part in parts:
            for name, value in vars(part).items():
                if isinstance(value, (dict, list, set, deque)) and value and name != "effects":
                    kept[name] = value
                elif type(value).__module__ == tc.__name__ and hasattr(value, "__dict__"):
                    parts += [value] if value not in parts else []
        self.assertEqual(list(kept), [], kept)

    @mock.patch.object(tc, "MAX_COMPLAINTS", 1000)
    def test_malformed_lines_get_an_error_and_change_nothing(self):
        d = Desk()
        d.join(b"w", slots=1)
        d.hello(b"c", "r1")
        d.logs.clear()
        for line in MessagesTest.MALFORMED:
            new = b"x" + line[:20]  # a stranger gets only some answers
            for link, peer in ((CLIENTS, b"c"), (WORKERS, b"w"), (CLIENTS, new), (WORKERS, new)):
                d.tell(link, peer, line)
                d.expect(peer, "ERROR")
                d.quiet()
                if peer != new:
                    d.tell(link, peer, line)  # the same is not logged again
                    d.expect(peer, "ERROR")
                self.assertEqual(len(d.logs), 1)
                d.logs.clear()
                d.broker.complaints.until.clear()
        self.assertEqual((len(d.broker.registry.clients), len(d.broker.registry.workers)), (1, 1))
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)

    def test_a_body_of_noise_gets_one_answer_and_one_log_line(self):
        d = Desk()
        d.client(b"x", b"noise\n" * 10000)
        d.expect(b"x", "ERROR")
        d.quiet()
        self.assertEqual(len(d.logs), 1)

    def test_a_body_with_too_many_bad_lines_is_read_no_further(self):
        d = Desk()
        hello = b'HELLO {"run":"r1","join":1}'
        for more in (1, 0):
            d.client(b"x", b"noise\n" * (tc.MAX_BAD_LINES + more) + hello)
            self.assertEqual([letter[3] for letter in d.letters], ["ERROR"] + ["OK"] * (not more))
            d.letters.clear()

    def test_each_fault_is_logged_once_in_a_while_and_few_at_a_time(self):
        d = Desk()
        for n in range(2 * tc.MAX_COMPLAINTS):
            d.client(b"x", b"DONE " + b" " * n + b"x")  # the reason says at which character
        self.assertEqual(len(d.logs), tc.MAX_COMPLAINTS)
        for seconds, more in ((tc.COMPLAINT_INTERVAL - 1, 0), (2, 0), (tc.COMPLAINT_INTERVAL, 1)):
            d.now += seconds
            d.logs.clear()
            d.client(b"x", b"DONE x")
            self.assertEqual(len(d.logs), more)

    def test_a_verb_at_the_wrong_port_is_answered_with_the_right_one(self):
        d = Desk()
        d.worker(b"x", 'HELLO {"run":"r1"}')
        d.expect(b"x", "ERROR",
                 reason="HELLO is not understood on the link to workers, but on that "
                                       "to clients: is the port right?")

    def test_an_error_is_never_answered(self):
        d = Desk()
        for line in (b"ERROR", b"ERROR {}", b"ERROR {", b'ERROR {"reason":5}'):
            d.tell(CLIENTS, b"x", line)
            d.tell(WORKERS, b"x", line)
        d.quiet()

    def test_every_message_from_anybody_at_any_time(self):
        """Random true and half-true messages from strangers beside a good client's run."""
        for seed in range(150):
            r = random.Random(seed)
            d = Desk()
            d.join(b"good", slots=2)
            d.hello(b"c", "r1")
            d.submit(b"c", 1, 2, 3, 4)
            served = []
            for _ in range(60):
                link = r.choice([CLIENTS, WORKERS])
                peer = r.choice([b"x", b"y", b"z"])
                token = r.choice(["", "r1", "r2", "nonsense", "plain.b1.1", "plain.b1.1 1 1"])
                verb, fields = r.choice(list(MessagesTest.EXAMPLES.items()))
                fields = dict(fields)
                for name in list(fields):
                    if r.random() < 0.2:
                        del fields[name]
                if "run" in fields:
                    fields["run"] = r.choice(["r1", "r2", "plain.b1.1", "", "é"])
                    if fields["run"] == "r1":
                        continue  # who knows the run's name is its client: names are secret
                if r.random() < 0.1:
                    fields[r.choice(["id", "tasks", "name", "run"])] = r.choice([1, "", None, []])
                d.tell(link, peer, tc.encode(verb, fields), token)
                if r.random() < 0.1:
                    d.gone(link, peer)
                for letter in list(d.letters):
                    if letter[1] == b"good" and letter[3] == "{":
                        served.append((letter[2], letter[4]["id"]))
                        d.ends(b"good", letter[2], letter[4]["id"], letter[4]["attempt"])
                        d.client(b"c", tc.encode("DONE", {"tasks": [[letter[4]["id"], 1]]}))
                d.letters = [m for m in d.letters if m[1] == b"c"]
            results = [m[4]["id"] for m in d.letters if m[3] == "RESULT"]
            strangers = {i for (run, i) in served if run == "r1"}
            self.assertEqual(sorted(results), sorted(strangers), seed)


class ChainTest(unittest.TestCase):
    """A broker that is a worker to the broker above it."""

    def setUp(self):
        self.desk = d = Desk(chained=True)
        d.broker.connected(BROKER, 0.0)
        d.collect()
        d.expect(b"", "READY", name="b1", slots=0, join=1, below=["b1"], depth=1)
        d.tell(BROKER, b"", 'OK {"join":1,"broker":"b0","above":["b0"]}')

    def test_a_pause_of_ours_does_not_end_the_runs_from_above(self):
        d, clients = self.desk, self.desk.broker.registry.clients
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "r1")
        d.now += d.broker.times.client_lease - 1
        d.answer()  # the broker above is heard shortly before
        d.now += 100
        d.broker.paused(100.0, d.now)
        d.wait(5)
        self.assertIn("r1", clients)
        d.wait(d.broker.times.client_lease)
        self.assertNotIn("r1", clients)

    def test_it_announces_the_sum_of_slots_and_the_highest_weight(self):
        d = self.desk
        d.join(b"w", slots=2, weight=1)
        d.expect(b"", "READY", slots=2, weight=1)
        d.join(b"v", slots=3, weight=7)
        d.expect(b"", "READY", slots=5, weight=7)
        d.gone(WORKERS, b"v")
        d.expect(b"", "READY", slots=2, weight=1)
        d.worker(b"w", 'READY {"name":"w","slots":2,"weight":3}')
        d.expect(b"", "READY", slots=2, weight=3)
        d.quiet()

    def test_it_announces_hosts_with_labels_and_brokers_below(self):
        d = self.desk
        d.join(b"w", host="h2", labels=["y"])
        d.expect(b"", "READY", crew=[["h2", 1, "y"]])
        d.join(b"v", slots=5, below=["v", "u"], crew=[["h1", 2, "z", "x"], ["h2", 3, "y"]], depth=2)
        d.expect(b"", "READY", crew=[["h1", 2, "x", "z"], ["h2", 4, "y"]], below=["b1", "u", "v"],
                 depth=3)
        d.worker(b"v", 'READY {"name":"v","slots":1,"below":["v"],"crew":[["h3",1]],"depth":1}')
        d.expect(b"", "READY", crew=[["h2", 1, "y"], ["h3", 1]], below=["b1", "v"], depth=2)
        d.gone(WORKERS, b"w")
        d.expect(b"", "READY", slots=1, crew=[["h3", 1]])
        d.quiet()

    def test_many_kinds_of_retries_that_must_wait_keep_none_from_a_free_worker(self):
        d, many = self.desk, tc.MAX_RETRY_KINDS
        d.join(b"w", slots=1, host="h1", weight=5)
        d.hello(b"c", "r1")
        d.submit(b"c", 1)
        d.takes(b"w", "r1", 1)
        d.tell(BROKER, b"", b"\n".join(tc.encode(COMMAND, {  # the second half waits for h1
            "cmd": "x", "id": id, "attempt": 2, "not_on": f"x{id}",
            **({"on": "h1"} if id >= many else {})}) for id in range(2 * many)), "up")
        d.join(b"v", slots=1, host="h2")
        given = d.given(b"v")
        for _ in range(4):
            d.worker(b"v", 'READY {"name":"v","slots":1}')
            given += d.given(b"v")
        self.assertEqual(len(given), 1)

    def rejoin(self, meanwhile):
        """The link to the broker above breaks, and comes back; `meanwhile` happens after the
        greeting was sent and before its OK."""
        d = self.desk
        d.gone(BROKER, b"")
        d.broker.connected(BROKER, d.now)
        d.collect()
        greeting = [letter[4] for letter in d.letters if letter[3] == "READY"][-1]
        meanwhile()
        d.letters.clear()
        d.tell(BROKER, b"", tc.encode("OK", {"join": greeting["join"], "above": ["b0"]}))
        return greeting

    def test_a_result_that_comes_while_it_joins_is_told_after_the_ok(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.takes(b"w", "up", 1)
        greeting = self.rejoin(lambda: d.ends(b"w", "up", 1))
        self.assertEqual((greeting["running"], greeting["held"]), ([["up", 1, 1]], []))
        d.expect(b"w", "RESEND", token="up", tasks=[[1, 1]])

    def test_a_task_that_turns_up_while_it_joins_makes_it_join_again(self):
        d = self.desk
        self.rejoin(lambda: d.join(b"w", slots=1, running=[["up", 7, 1]]))
        d.expect(b"", "READY", running=[["up", 7, 1]])

    def test_a_loss_is_told_once(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.takes(b"w", "up", 1)
        d.gone(BROKER, b"")
        d.worker(b"w", "BYE")
        greeting = self.rejoin(lambda: None)
        self.assertEqual(greeting["running"], [["up", 1, 1]])
        d.expect(b"", "LOST", token="up", tasks=[[1, 1]], why="worker w left")
        self.assertEqual(self.rejoin(lambda: None)["running"], [])
        self.assertNotIn("LOST", [letter[3] for letter in d.letters])

    def test_hosts_are_shunned_of_whose_run_it_has_no_command_yet(self):
        d = self.desk
        d.join(b"w", slots=9, host="h1")
        d.join(b"v", slots=1, host="h2")
        d.tell(BROKER, b"", 'SHUN {"hosts":["h1"]}', "up")
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1,"needs":[],"elsewhere":true}', "up")
        d.takes(b"v", "up", 1)
        d.wait(1)
        self.assertNotIn("OK", [letter[3] for letter in d.letters])  # to nobody

    def test_hosts_that_a_client_above_shuns_are_told_to_brokers_below(self):
        d = self.desk
        d.join(b"m", below=["m"])
        d.letters.clear()
        d.tell(BROKER, b"", 'SHUN {"hosts":["h1"]}', "up")
        d.expect(b"m", "SHUN", token="up", hosts=["h1"])
        d.gone(WORKERS, b"m")
        d.worker(b"m2", 'READY {"name":"m","slots":1,"join":99,"below":["m"]}')
        d.expect(b"m2", "SHUN", token="up", hosts=["h1"])

    def test_what_nobody_has_the_labels_for_any_more_is_handed_back(self):
        d = self.desk
        d.join(b"w", slots=1, labels=["gpu"])
        d.join(b"v", slots=1)
        d.letters.clear()
        for id in (1, 2, 3):
            d.tell(BROKER, b"", f'{{"cmd":"x","id":{id},"attempt":1,"needs":["gpu"]}}', "up")
        d.takes(b"w", "up", 1)
        d.letters.clear()
        d.worker(b"w", "BYE")
        lost = [letter[4]["tasks"] for letter in d.letters if letter[3] == "LOST"]
        self.assertEqual(sorted(lost), [[[1, 1]], [[2, 1]], [[3, 1]]])
        self.assertIn("READY", [letter[3] for letter in d.letters])

    def test_what_nobody_has_the_labels_for_is_handed_back_while_all_are_busy(self):
        d = self.desk
        d.join(b"v", slots=1)
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.takes(b"v", "up", 1)
        d.letters.clear()
        for id in (2, 3):
            d.tell(BROKER, b"", f'{{"cmd":"x","id":{id},"attempt":1,"needs":["gpu"]}}', "up")
        lost = [letter[4]["tasks"] for letter in d.letters if letter[3] == "LOST"]
        self.assertEqual(sorted(lost), [[[2, 1]], [[3, 1]]])

    def test_slots_that_change_while_it_joins_are_told_at_once(self):
        d = Desk(chained=True)
        d.broker.connected(BROKER, 0.0)
        d.collect()
        d.expect(b"", "READY", slots=0, join=1)
        d.join(b"w", slots=2)
        d.tell(BROKER, b"", 'OK {"join":1,"broker":"b0","above":["b0"]}')
        d.expect(b"", "READY", slots=2)

    def test_commands_come_from_above_and_results_go_there(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.expect(b"", "READY")
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":4}', "up")
        d.expect(b"", "QUEUED", token="up", tasks=[[1, 4]])
        d.takes(b"w", "up", 1, 4)
        d.ends(b"w", "up", 1, 4, stdout="o")
        d.expect(b"", "RESULT", token="up", id=1, attempt=4, stdout="o")
        d.tell(BROKER, b"", 'DONE {"tasks":[[1,4]]}', "up")
        d.expect(b"w", "DONE", token="up")
        d.quiet()
        self.assertFalse(d.broker.registry.clients["up"].tasks)

    def test_what_is_recalled_from_above_is_handed_back_or_recalled_from_its_worker(self):
        d = self.desk
        d.join(b"w", slots=1)
        for id in (1, 2):
            d.tell(BROKER, b"", f'{{"cmd":"x","id":{id},"attempt":1}}', "up")
        d.takes(b"w", "up", 1)
        d.letters.clear()
        d.tell(BROKER, b"", 'RECALL {"tasks":[[1,1],[2,1],[3,1]]}', "up")
        d.expect(b"", "LOST", token="up", tasks=[[3, 1]])
        d.expect(b"", "LOST", token="up", tasks=[[2, 1]], fault="")
        d.expect(b"w", "RECALL", token="up", tasks=[[1, 1]])
        d.quiet()

    def test_a_cancel_from_above_reaches_all_who_have_the_commands(self):
        for cancel in ("CANCEL", 'CANCEL {"tasks":[[1,1],[2,1],[3,1]]}'):
            self.setUp()
            d = self.desk
            d.join(b"w", slots=1, weight=1)
            d.join(b"m", slots=1, below=["m"])
            for id in (1, 2, 3):
                d.tell(BROKER, b"", f'{{"cmd":"x","id":{id},"attempt":1}}', "up")
            d.takes(b"w", "up", 1)
            d.takes(b"m", "up", 2)
            d.letters.clear()
            d.tell(BROKER, b"", cancel, "up")
            d.expect(b"w", "CANCEL", token="up", tasks=[[1, 1]])
            d.expect(b"m", "CANCEL", token="up", tasks=[[2, 1]])
            d.expect(b"", "LOST", token="up", tasks=[[3, 1]], why="cancelled")
            d.quiet()
            for peer, id in ((b"w", 1), (b"m", 2)):
                d.worker(peer, f'LOST {{"tasks":[[{id},1]],"why":"cancelled"}}', "up")
                d.expect(b"", "LOST", token="up", tasks=[[id, 1]], why="cancelled")

    def test_a_slot_is_not_kept_for_the_broker_above_when_its_lease_is_over(self):
        d = self.desk
        d.join(b"w", slots=1, labels=["gpu"])
        d.join(b"v", slots=1)
        d.hello(b"c", "mine")
        d.answer(broker="b0", above=["b0"], patience=6)
        for id in (1, 2, 3):
            d.tell(BROKER, b"", f'{{"cmd":"x","id":{id},"attempt":1,"needs":["gpu"]}}', "up")
        d.takes(b"w", "up", 1)
        d.ends(b"w", "up", 1)  # it was short, so one more might be given ahead
        d.takes(b"w", "up", 2)
        d.submit(b"c", 1, 2)
        d.takes(b"v", "mine", 1)
        d.wait(4.1)
        d.letters.clear()
        d.ends(b"w", "up", 2)
        d.expect(b"", "RESULT", token="up", id=2)
        d.takes(b"w", "mine", 2)

    def test_without_an_answer_from_above_nothing_from_there_is_started(self):
        d = self.desk
        d.join(b"w", slots=2)
        d.hello(b"c", "mine")
        d.answer(broker="b0", above=["b0"], patience=6)
        d.letters.clear()
        for _ in range(3):
            d.wait(2.0)
            d.worker(b"w", 'READY {"name":"w"}')
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.submit(b"c", 1)
        d.letters = [letter for letter in d.letters if letter[3] not in ("READY", "OK")]
        d.expect(b"", "QUEUED", token="up")
        d.expect(b"w", "{", token="mine")
        d.quiet()
        d.answer(broker="b0", above=["b0"])  # to a greeting before it came
        d.quiet()
        d.wait(2.0)
        d.letters.clear()
        d.answer(broker="b0", above=["b0"])
        d.expect(b"w", "{", token="up")

    def test_the_plain_run_of_a_client_above_is_like_any_other(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.expect(b"", "READY")
        run = "plain.b0.1"
        d.tell(BROKER, b"", '{"cmd":"x","id":3,"attempt":2,"cut":10}', run)
        d.expect(b"", "QUEUED", token=run, tasks=[[3, 2]])
        d.takes(b"w", run, 3, 2)
        d.ends(b"w", run, 3, 2, stdout="o")
        d.expect(b"", "RESULT", token=run, id=3, attempt=2, stdout="o")
        d.quiet()

    def test_a_lost_worker_is_reported_upwards(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.takes(b"w", "up", 1)
        d.letters.clear()
        d.gone(WORKERS, b"w")
        d.expect(b"", "READY", slots=0)
        d.wait(1.0)
        d.expect(b"", "LOST", token="up", tasks=[[1, 1]], fault="crash")

    def lose_while_above_is_away(self, d):
        """A worker is lost with a command of the broker above, which is back only later."""
        d.join(b"w", slots=1)
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.takes(b"w", "up", 1)
        d.gone(BROKER, b"")
        d.gone(WORKERS, b"w")
        d.wait(1.0)
        d.letters.clear()
        d.broker.connected(BROKER, d.now)
        d.collect()

    def test_a_worker_lost_while_the_broker_above_is_away_is_reported_when_it_is_back(self):
        d = self.desk
        self.lose_while_above_is_away(d)
        d.expect(b"", "READY", running=[["up", 1, 1]], held=[],
                 join=d.broker.upstream.session.number)
        d.answer(broker="b0", above=["b0"])
        d.expect(b"", "LOST", token="up", tasks=[[1, 1]], fault="crash")
        d.quiet()
        self.assertFalse(d.broker.upstream.unsent)

    def test_a_loop_is_refused(self):
        d = Desk(chained=True)
        d.tell(BROKER, b"", 'OK {"above":["b0","b1"]}')
        self.assertEqual(d.effects, [tc.Exit(2)])

    def test_the_commands_of_a_broker_above_are_kept_for_a_lease_after_it_was_heard(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.tell(BROKER, b"", '{"id":1,"attempt":1,"cmd":"x"}', "up")
        d.takes(b"w", "up", 1)
        for _ in range(14):
            d.wait(2.0)
            d.worker(b"w", 'READY {"name":"w"}')
            d.tell(BROKER, b"", "OK")
        d.wait(1.9)
        d.tell(BROKER, b"", "OK")
        d.worker(b"w", 'READY {"name":"w"}')
        d.gone(BROKER, b"")
        d.letters.clear()
        for _ in range(13):
            d.wait(2.0)
            d.worker(b"w", 'READY {"name":"w"}')
        self.assertNotIn("CANCEL", [m[3] for m in d.letters])

    def test_a_stop_does_not_shorten_the_time_for_which_commands_from_above_are_kept(self):
        d = self.desk
        d.join(b"w", slots=1)
        d.tell(BROKER, b"", '{"id":1,"attempt":1,"cmd":"x"}', "up")
        d.takes(b"w", "up", 1)
        for seconds in [2.0] * 14 + [1000.0] + [2.0] * 13:
            if seconds == 1000.0:
                d.tell(BROKER, b"", "OK")
                d.gone(BROKER, b"")
                d.letters.clear()
                d.pause(seconds)
            else:
                d.wait(seconds)
            d.worker(b"w", 'READY {"name":"w"}')
        self.assertNotIn("CANCEL", [letter[3] for letter in d.letters])

    def test_after_a_long_stop_it_joins_again_before_it_starts_commands_from_above(self):
        """What came meanwhile may be given to others by now."""
        d = self.desk
        d.join(b"w", slots=1)
        d.answer(broker="b0", above=["b0"], patience=5)
        d.letters.clear()
        d.pause(1000.0)
        d.expect(b"", "READY", slots=1, running=[], held=[])
        d.tell(BROKER, b"", '{"id":1,"attempt":1,"cmd":"x"}', "up")
        d.quiet()
        d.answer(broker="b0", above=["b0"], patience=5)
        d.tell(BROKER, b"", '{"id":1,"attempt":2,"cmd":"x"}', "up")
        d.expect(b"", "QUEUED", token="up", tasks=[[1, 2]])
        d.takes(b"w", "up", 1, 2)

    def test_who_claims_to_be_above_a_broker_is_told_who_is_and_not_let_in(self):
        d = self.desk
        d.worker(b"w", 'READY {"name":"b9","join":1,"below":["b9","b1"]}')
        d.expect(b"w", "OK", above=["b1", "b0"], join=None)
        self.assertFalse(d.broker.registry.workers)
        self.assertFalse(d.effects)

    def test_a_chain_that_is_too_deep_is_refused(self):
        d = self.desk
        d.worker(b"w", 'READY {"name":"b9","join":1,"slots":1,"below":["b9"],"depth":7}')
        d.expect(b"w", "ERROR")
        self.assertFalse(d.broker.registry.workers)

    def test_what_its_workers_have_for_a_broker_above_is_announced(self):
        d = self.desk
        d.join(b"w", slots=2, running=[["up", 1, 1]], held=[["up", 2, 1]])
        _, line = d.expect(b"", "READY", running=[["up", 1, 1], ["up", 2, 1]])
        d.expect(b"w", "RECALL", tasks=[[1, 1]])
        d.expect(b"w", "RESEND", tasks=[[2, 1]])

    def test_what_is_asked_before_its_loss_was_told_is_answered_with_the_fault(self):
        d = self.desk
        self.lose_while_above_is_away(d)
        d.letters.clear()
        d.tell(BROKER, b"", 'RECALL {"tasks":[[1,1],[2,1]]}', "up")
        d.expect(b"", "LOST", tasks=[[1, 1]], fault=tc.CRASH)
        d.expect(b"", "LOST", tasks=[[2, 1]], why="unknown")
        d.quiet()

    def from_above(self, *ids, **more):
        self.desk.tell(BROKER, b"", b"\n".join(tc.encode(COMMAND, {
            "cmd": "x", "id": id, "attempt": 1, "needs": [tc.TREES], "tree": "0" * 64,
            "manifest": 9, **more}) for id in ids), "up")

    def tree_hosts(self, *peers, slots=1):
        for peer in peers:
            self.desk.tree_worker(peer, slots=slots)
        self.desk.letters.clear()

    def test_it_tells_above_which_commands_wait_for_a_workspace(self):
        d = self.desk
        self.tree_hosts(b"w", b"v")
        self.from_above(1, 2, 3)
        for id in 1, 2, 3:  # the third waits for a workspace, too: a slot is free
            d.expect(b"", "QUEUED", token="up", tasks=[[id, 1]], preparing=tc.FILES)
        d.scouts(b"w", "up", 1)  # no news
        d.scouts(b"v", "up", 2, tc.SETUP)
        d.expect(b"", "QUEUED", tasks=[[2, 1]], preparing=tc.SETUP, host="v/1", worker="b1")
        d.quiet()
        d.prepares(b"w", "up", 1, "")
        _, line = d.expect(b"", "QUEUED", tasks=[[1, 1]])
        self.assertNotIn(b"preparing", line)
        d.quiet()
        d.prepares(b"v", "up", 2, "")
        d.expect(b"", "QUEUED", tasks=[[2, 1]])
        self.from_above(4)  # no slot is free: it waits for one
        _, line = d.expect(b"", "QUEUED", tasks=[[4, 1]])
        self.assertNotIn(b"preparing", line)
        d.ends(b"w", "up", 1, time=1000)
        d.expect(b"", "RESULT")
        d.scouts(b"w", "up", 3, "")
        _, line = d.expect(b"", "QUEUED", tasks=[[3, 1]])
        self.assertNotIn(b"preparing", line)
        d.quiet()

    def test_after_it_has_joined_above_again_it_tells_what_waits_for_a_workspace(self):
        d = self.desk
        self.tree_hosts(b"w", b"v")
        self.from_above(1, 2)
        d.scouts(b"w", "up", 1, tc.SETUP)
        d.scouts(b"v", "up", 2)
        d.letters.clear()
        d.gone(BROKER, b"")
        d.broker.connected(BROKER, d.now)
        d.collect()
        d.letters.clear()
        d.prepares(b"v", "up", 2, "")  # while it joins
        d.quiet()
        d.answer()
        d.expect(b"", "QUEUED", tasks=[[1, 1]], preparing=tc.SETUP)
        d.quiet()

    def test_parts_of_a_tree_pass_through(self):
        d = self.desk
        self.tree_hosts(b"w")
        self.from_above(1)
        d.scouts(b"w", "up", 1)
        d.letters.clear()
        fetch = tc.encode("FETCH", {
            "id": 1, "attempt": 1, "tree": "0" * 64, "offset": 0, "size": 1})
        d.worker(b"w", fetch, "up")
        self.assertEqual(d.expect(b"", "FETCH"), ("up", fetch))
        chunk = tc.encode("CHUNK", {
            "id": 1, "attempt": 1, "tree": "0" * 64, "offset": 0, "size": 1})
        d.broker.receive(BROKER, b"", "up", chunk, b"x", d.now)
        self.assertEqual(d.broker.take()[0], [tc.Outgoing(WORKERS, b"w", "up", chunk, b"x")])
        d.broker.receive(BROKER, b"", "up", chunk.replace(b'"id":1', b'"id":2'), b"x", d.now)
        d.collect()
        d.expect(b"", "LOST", token="up", tasks=[[2, 1]])  # the broker above has it wrong
        d.quiet()

    def test_an_unfit_host_is_named_above(self):
        d = self.desk
        self.tree_hosts(b"w")
        d.tree_worker(b"x", host="", below=["x"], crew=[["deep/3", 1, tc.TREES]], depth=1)
        d.letters.clear()
        self.from_above(1, 2)
        d.scouts(b"w", "up", 1)
        d.scouts(b"x", "up", 2)
        d.letters.clear()
        for peer, id, host in ((b"w", 1, "w/1"), (b"x", 2, "deep/3")):
            d.worker(peer, tc.encode("LOST", {
                "tasks": [[id, 1]], "why": "no room", "fault": tc.UNFIT, "host": "deep/3",
                "output": "oh"}), "up")
            d.expect(b"", "LOST", token="up", tasks=[[id, 1]], fault=tc.UNFIT, host=host,
                     output="oh")

    def test_when_the_run_is_over_above_workers_release_its_workspaces(self):
        d = self.desk
        self.tree_hosts(b"w", b"v")
        self.from_above(1)
        d.scouts(b"w", "up", 1, "")
        d.ends(b"w", "up", 1)
        d.tell(BROKER, b"", 'DONE {"tasks":[[1,1]]}', "up")
        d.letters.clear()
        for _ in range(2):
            d.tell(BROKER, b"", "CANCEL", "up")
        self.assertEqual(d.expect(b"w", "CANCEL", token="up")[1], b"CANCEL")
        d.quiet()

    def test_it_passes_trees_on_and_says_so(self):
        d = self.desk
        d.gone(BROKER, b"")
        d.broker.connected(BROKER, d.now)
        d.collect()
        d.expect(b"", "READY", labels=[tc.TREES])
        d.answer()
        d.tree_worker(b"w", cache=5)
        d.tree_worker(b"v", cache=7)
        d.letters.clear()
        d.wait(2.0)
        d.expect(b"", "READY", cache=12)
        self.setUp()
        d = self.desk
        d.join(b"old", below=["old"], crew=[["h1", 1, "gpu", tc.TREES]], depth=1)  # cannot
        d.expect(b"", "READY", crew=[["h1", 1, "gpu"]])
        d.worker(b"old", tc.encode("READY", {
            "name": "old", "slots": 2, "below": ["old"], "crew": [["h1", 2, tc.TREES]]}))
        d.expect(b"", "READY", crew=[["h1", 2]])

    def test_a_broker_below_gets_a_scout_for_each_host_and_then_fills_its_slots(self):
        d = Desk()
        d.tree_worker(b"x", slots=6, host="", below=["x"], depth=1, crew=[
            ["h1", 2, tc.TREES], ["h2", 2, "gpu", tc.TREES], ["h3", 2]])
        d.hello(b"c", "r1")
        d.submit_with_tree(b"c", *range(1, 10))
        for id in 1, 2:
            d.scouts(b"x", "r1", id)
        d.expect(b"c", "QUEUED", preparing=tc.FILES, host="x")
        d.expect(b"c", "QUEUED")
        d.quiet()
        d.prepares(b"x", "r1", 1, "")
        d.expect(b"c", "QUEUED", tasks=[[1, 1]])
        given = [letter[4]["id"] for letter in d.letters if letter[1] == b"x"]
        self.assertEqual(given, [3, 4, 5])  # four slots know trees
        d.letters.clear()
        for id in given:  # it has one more slot on the host that is ready
            d.prepares(b"x", "r1", id, "" if id == 3 else tc.FILES)
        d.letters = [letter for letter in d.letters if letter[1] != b"c"]
        d.quiet()
        d.hello(b"b", "r2")
        d.submit(b"b", 1, 2, 3, 4)  # the slots that wait for a workspace are free for others
        self.assertEqual(sorted(d.given(b"x")), [1, 2, 3, 4])

    def test_what_is_handed_back_is_not_remembered_as_lost(self):
        d = self.desk
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.tell(BROKER, b"", 'RECALL {"tasks":[[1,1]]}', "up")
        d.expect(b"", "QUEUED")
        d.expect(b"", "LOST", tasks=[[1, 1]])
        self.assertFalse(d.broker.registry.clients["up"].lost)

    def test_who_comes_back_with_what_was_lost_meanwhile_does_not_start_it(self):
        """A broker below another does not know what the client wants; but what it called LOST it
        remembers, and also when a later attempt was here and is done."""
        d = self.desk
        d.join(b"w", slots=1)
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":1}', "up")
        d.takes(b"w", "up", 1)
        d.wait(11.0)
        d.join(b"v", slots=1)
        d.tell(BROKER, b"", '{"cmd":"x","id":1,"attempt":2}', "up")
        d.takes(b"v", "up", 1, 2)
        d.ends(b"v", "up", 1, 2)
        d.tell(BROKER, b"", 'DONE {"tasks":[[1,2]]}', "up")
        d.letters.clear()
        d.join(b"w2", name="w", running=[["up", 1, 1]])
        d.expect(b"w2", "CANCEL", tasks=[[1, 1]])


# === Simulation =======================================================================
#
# Brokers, workers and clients of the real program in one simulated world, with plain ones
# beside them: a clock, a network and a supply of faults, all drawn from one seed. While
# faults happen, safety is checked after each event; then the world is healed, and
# everything must finish. A run with the same seed is the same run.
#
# A command is known by its text. Each execution has an exit code and an output of its own,
# so that a report can be traced to the very attempt that it must come from.

RETURNS = ("f", "gone", "d/g")  # files of some commands in the simulation
SIM_INLINE = 60  # bytes, instead of INLINE: so that fetching is common
SIM_CHUNK = 25
SIM_HEAL = 45.0  # seconds of faults
SIM_END = 300.0  # by then all must be done
SIM_QUIET = 150.0  # after that all that is over must be forgotten


class PlainWorker(tc.Machine):
    """A worker that knows only the seed's conversation. It finishes what it runs even if
    its broker is gone, and then tells the next one. The seed's own takes all that it gets for
    commands, and says READY only when it is free again."""

    def __init__(self, seeds):
        super().__init__()
        self.seeds = seeds
        self.jobs = {}  # the one it runs, by key
        self.up = False
        self.next_ready = 0.0

    def ready(self, now):
        self.send_line(BROKER, b"", "", b"READY")
        self.next_ready = now + 2.0

    def connected(self, link, now):
        self.up = True
        if not self.jobs:
            self.ready(now)

    def disconnected(self, link, peer, now):
        self.up = False

    def receive(self, link, peer, token, body, data, now):
        if body.startswith(b"{"):
            run, id, attempt = token.split()
            job = types.SimpleNamespace(key=(run, int(id), int(attempt)), token=token, line=body,
                                        cmd=json.loads(body)["cmd"], killed=False, cancelled="",
                                        deadline=math.inf)
            self.jobs[job.key] = job
            self.effects.append(tc.Start(job))
            self.send_line(BROKER, b"", token, b"QUEUED " + body)
        elif self.seeds:
            self.send_line(BROKER, b"", token, b"QUEUED " + body)
            self.send_line(BROKER, b"", token, b"RESULT null")
            if not self.jobs:  # it would read it only then
                self.ready(now)

    def finished(self, job, exit_record, now):
        del self.jobs[job.key]
        fields = {"cmd": job.cmd, "exitcode": exit_record.exitcode, "time": 1,
                  "stdout": tc.to_text(exit_record.output.data)}
        self.send_line(BROKER, b"", job.token, tc.encode("RESULT", fields))
        self.ready(now)

    def knows_batches(self, link, peer):
        return False

    def tick(self, now):
        self.ready(now)

    def deadline(self):
        return self.next_ready if self.up and not self.jobs and not self.seeds else math.inf


class PlainClient(tc.Machine):
    """A client that knows only the seed's conversation: it asks anew for all that was not
    answered when it has lost its broker."""

    def __init__(self, commands):
        super().__init__()
        self.waiting = set(commands)

    def connected(self, link, now):
        for cmd in sorted(self.waiting):
            self.send_line(BROKER, b"", "", tc.encode(COMMAND, {"cmd": cmd, "cwd": "/"}))

    def receive(self, link, peer, token, body, data, now):
        verb, _, fields = body.decode().partition(" ")
        fields = json.loads(fields)
        if verb == "RESULT" and fields["cmd"] in self.waiting:  # it may have asked twice
            self.waiting.discard(fields["cmd"])
            command = types.SimpleNamespace(cmd=fields["cmd"])
            self.effects.append(tc.FinalResult(command, fields, tc.to_bytes(fields["stdout"])))
            if not self.waiting:
                self.effects.append(tc.Exit(0))

    def knows_batches(self, link, peer):
        return False


class Actor:
    """A machine in the simulated world: a broker, a worker or a client, ours or plain."""

    def __init__(self, name):
        self.name = name
        self.role = {"b": "broker", "w": "worker", "v": "worker", "p": "worker",
                     "c": "client", "d": "client", "r": "relay"}[name[0]]
        self.plain = name[0] in "vd"
        self.owner = None  # at the other end of its stream: a broker or a relay
        self.last_stream = None
        self.stream = None  # to its owner, or of a relay to its worker
        self.uplink = None  # of a relay
        self.pipes = tc.PeerLinks()  # of a broker
        self.machine = None  # while it is alive
        self.generation = 0  # of its machine
        self.paused_until = 0.0
        self.inbox = []  # what happened to it while it was paused
        self.line = OrderedDict()  # a worker's jobs that are to be started
        self.began = {}  # (run, id, attempt) > when it started it, by its clock
        self.start_deadline = -math.inf  # when that may be done, by its clock
        self.files = {}  # of a worker: run > SimFiles
        self.source = None  # of a client with a tree: SimSource
        self.wire = None  # to its broker
        self.peers = {}  # (link, peer) > Wire, if it is a broker
        self.wants = None  # (broker's Actor, link) it connects to
        self.exited = None  # a client's exit status
        self.rate = 1.0  # of its clock, seconds a second
        self.offset = 0.0  # and what that shows when the world begins
        self.slots = 1
        self.host = "h" + str(int(name[1:]) // 2)
        self.labels = ()
        self.drain = 0.0
        self.commands = []  # of a client
        self.options = tc.RunOptions()

    def clock(self, now):
        return self.offset + now * self.rate

    def world_time(self, shown):
        return (shown - self.offset) / self.rate


class Wire:
    """A connection: from a member to one link of a broker."""

    def __init__(self, member, hub, link, peer):
        self.member, self.hub, self.link, self.peer = member, hub, link, peer
        self.open = True
        self.swallow = [False, False]  # upwards, downwards: a link that loses all silently
        self.flying = [deque(), deque()]  # frames under way
        self.last = [0.0, 0.0]  # when the last of them arrives


class Stream:
    """The bytes between a worker (way 1 is to it) and its owner (way 0)."""

    def __init__(self, world, owner, worker):
        self.world = world
        self.actors = (owner, worker)
        self.generations = (owner.generation, worker.generation)
        self.links = []  # the owner's end, and the worker's
        self.flying = [deque(), deque()]  # pieces under way
        self.last = [0.0, 0.0]  # when the last of them arrives
        self.open = True
        self.fuse = math.inf  # bytes until it breaks
        self.dead = [False, False]  # ways that lose all, without a sign

    def do(self, end, function):
        self.world.do(self.actors[end], self.generations[end], function)

    def write(self, end, data):
        """This end writes, in pieces as they come."""
        world, way = self.world, 1 - end
        if not self.open:
            return
        broken, self.fuse = len(data) >= self.fuse, self.fuse - len(data)
        data = data[:len(data) + self.fuse] if broken else data
        while data:
            size = world.r.choice([len(data), world.r.randint(1, len(data))])
            self.fly(way, data[:size])
            data = data[size:]
        if broken:
            self.break_off(whole=True)

    def fly(self, way, piece):
        world = self.world
        if self.dead[way]:
            world.seen["lost in a dead stream"] += 1
            return
        delay = world.r.choice([0.0005, 0.002, 0.02, world.r.random() * 0.3])
        self.last[way] = max(self.last[way], world.now + delay)
        item = [piece]
        self.flying[way].append(item)
        world.at(self.last[way], lambda: self.land(way, item))

    def land(self, way, item):
        if any(item is other for other in self.flying[way]):  # else lost
            self.flying[way].remove(item)
            self.arrive(way, item[0])

    def arrive(self, end, piece):
        link = self.links[end]
        if not piece and not link.closed:
            rest = bytes(link.reader.buffer)
            self.world.seen["broken within a record"] += bool(rest) and not link.reader.mark
            self.world.seen["half a RESULT"] += b"RESULT" in rest and end == 0
            self.world.seen["half a command"] += b'{"id"' in rest and end == 1
        self.do(end, lambda m: link.closed or link.received(piece))

    def break_off(self, whole=False):
        """Both ends see the end, after a part of what is under way, to any byte; or after all."""
        if not self.open:
            return
        self.open = False
        self.world.say(self.actors[1].name, "has lost its stream")
        for way in (0, 1):
            items = self.flying[way]
            keep = total = sum(len(item[0]) for item in items)
            if not whole:
                keep = self.world.r.randint(0, total)
            while total > keep:
                cut = min(total - keep, len(items[-1][0]))
                items[-1][0] = items[-1][0][:-cut]
                total -= cut
                if not items[-1][0]:
                    items.pop()
            self.last[way] = max(self.last[way], self.world.now + self.world.r.random() * 0.2)
            if not self.dead[way]:
                self.world.at(self.last[way], lambda way=way: self.arrive(way, b""))

    def beat(self, end):
        """Send a keepalive, and go on. A process that is stopped does not."""
        actor, link, world = self.actors[end], self.links[end], self.world
        if actor.machine is None or actor.generation != self.generations[end] or link.closed:
            return
        if actor.paused_until <= world.now:
            self.do(end, lambda m: link.beat(actor.clock(world.now)))
        world.after(tc.BEAT_INTERVAL, lambda: self.beat(end))


def stream_link(stream, end, machine, *arguments):
    """One end of a stream, as the program has it; only that its bytes fly through the world."""
    class SimLink(tc.StreamLink):
        def write(self, data):
            if not self.closed:
                stream.write(end, data)

        def close(self):
            super().close()
            stream.break_off(whole=True)
    link = SimLink(machine, *arguments,
                   lambda: stream.actors[end].clock(stream.world.now))
    stream.links.append(link)
    return link


class SimSource:
    """The working directory of a simulated client."""

    NAMES = ("a", "b", "d/a", "d/b", "d/c")

    def __init__(self, r, head):
        self.r = r
        self.head = head
        self.files = {path: self.content() for path in r.sample(self.NAMES, r.randint(0, 5))}
        self.sly = {}  # path > content: changes that nobody sees who does not hash

    def content(self):
        return bytes(self.r.choices(b"xyz", k=self.r.choice([0, 3, 40, 300])))

    def edit(self):
        path = self.r.choice(self.NAMES)
        if path not in self.files or self.r.random() < 0.6:
            self.files[path] = self.content()
        elif self.r.random() < 0.5:
            del self.files[path]
        elif self.files[path]:
            self.sly[path] = bytes(reversed(self.files[path])) + b"!"

    def look(self):
        """Return the tree, and what it is to be in a workspace: contents by path."""
        self.files.update(self.sly)
        self.sly.clear()
        parents = {path.rpartition("/")[0] for path in self.files} - {""}
        entries = [*map(directory_entry, parents), link_entry("link", "a"),
                   *(file_entry(path, content) for path, content in self.files.items())]
        return tc.make_tree(self.head, entries), {
            **dict.fromkeys(parents), "link": "a", **self.files}

    def read(self, tree, spans, again):
        """Return the bytes of these spans of the stream; None if a file is not what was hashed."""
        data = b""
        for offset, size in spans:
            data += tree.manifest[offset:offset + size]
            for index, at, part in tree.pieces_of([(offset, size)]):
                path, content = tree.entries[index].path, tree.entries[index].content
                now = self.files.get(path, b"")
                if hashlib.sha256(now).hexdigest() != content or again and path in self.sly:
                    return None
                data += self.sly.get(path, now)[at:at + part]
        return data


class SimSpace:
    """A workspace on a simulated host."""

    def __init__(self, path, owner):
        self.path = path
        self.owner = owner  # whose trees it may have
        self.user = None  # the SimFiles of the run that uses it
        self.manifest = b""  # of the tree that it has, or shall get
        self.files = {}  # contents by path, as in SimSource.look()
        self.half = False  # some are missing
        self.passed = None  # what setup has passed here
        self.noted = None  # what it has noted of that


class SimFiles:
    """A run's workspace at a simulated worker. It does one thing after the other, each after a
    while, and ends with its worker's process. What is on the host's disk stays."""

    def __init__(self, world, actor, run):
        self.world, self.actor, self.run = world, actor, run
        self.generation = actor.generation
        self.last = 0.0  # when the latest thing is done
        self.space = self.tree = None
        self.missing = {}  # index of an entry > what has come of its content
        self.wrong = Counter()  # how often it came wrong

    def carry_out(self, effect):
        world, r = self.world, self.world.r
        self.last = max(self.last, world.now) + r.choice([0, 0.001, 0.1, 1.0]) * r.random()

        def work(machine):
            for event in getattr(self, type(effect).__name__)(effect):
                world.say(self.actor.name, "has", event)
                world.seen[type(event).__name__] += 1
                machine.tree_told(self.run, event, self.actor.clock(world.now))
        world.at(self.last, lambda: world.do(self.actor, self.generation, work))

    def free_spaces(self):
        """Those that this run may take; its own if it has one."""
        owner = self.world.owner_of(self.run)
        return [self.space] if self.space else [
            space for space in self.world.spaces[self.actor.host]
            if space.owner == owner and space.user is None]

    def take(self, space):
        assert space.user in (None, self), "two runs in one workspace"
        self.space, space.user = space, self

    def FindTree(self, effect):
        for space in self.free_spaces():
            if hashlib.sha256(space.manifest).hexdigest() == effect.id:
                self.take(space)
                self.world.seen["known tree"] += 1
                return self.plan()
        return [tc.TreeUnknown()]

    def FillTree(self, effect):
        spaces, owner = self.world.spaces[self.actor.host], self.world.owner_of(self.run)
        free = self.free_spaces()
        if not free:
            free = [SimSpace(f"/{self.actor.host}/{len(spaces)}", owner)]
            spaces += free
        self.world.seen["second workspace"] += len(spaces) > 1
        self.take(free[0])
        self.space.manifest = effect.manifest
        return self.plan()

    def plan(self):
        """Remove what the tree has not, and find out what is missing."""
        world, space = self.world, self.space
        self.check_nothing_runs()
        if self.actor.host in world.full_hosts:
            return [tc.TreeFailed("no room")]
        self.tree = tree = tc.parse_tree(space.manifest)
        seen, self.missing, asked = world.contents[self.actor.host, space.owner], {}, set()
        for index, entry in enumerate(tree.entries):
            if entry.size and entry.content not in seen and entry.content not in asked:
                self.missing[index] = bytearray()
                asked.add(entry.content)
        world.seen["half a workspace"] += bool(self.missing) and space.half
        space.half = bool(self.missing)
        space.files = {entry.path: self.content_of(entry) for entry in tree.entries
                       if not entry.size or entry.content in seen}
        return [tc.TreePlanned(tree.spans_of(self.missing)), *self.complete()]

    def content_of(self, entry):
        if entry.kind != tc.FILE:
            return entry.content or None
        seen = self.world.contents[self.actor.host, self.space.owner]
        return seen[entry.content] if entry.size else b""

    def PutTree(self, effect):
        self.check_nothing_runs()
        world, tree, at, wrong = self.world, self.tree, 0, []
        seen = world.contents[self.actor.host, self.space.owner]
        assert tc.total_size(effect.spans) == len(effect.data)
        for index, offset, size in tree.pieces_of(effect.spans):
            part, entry = self.missing[index], tree.entries[index]
            assert len(part) == offset, "contents out of turn"
            part += effect.data[at:at + size]
            at += size
            if len(part) < entry.size:
                continue
            if hashlib.sha256(part).hexdigest() == entry.content:
                seen[entry.content] = bytes(part)
                del self.missing[index]
                came = world.came[self.actor.name, self.run]
                assert not world.calm or entry.content not in came, "it came twice"
                came.add(entry.content)
            else:
                part.clear()
                self.wrong[index] += 1
                wrong.append(index)
        assert at == len(effect.data), "what was not asked for"
        if wrong and max(self.wrong.values()) > 2:
            return [tc.TreeStored(), tc.TreeFailed("it keeps changing")]
        return [*([tc.TreeWrong(tree.spans_of(wrong))] if wrong else ()), tc.TreeStored(),
                *([] if wrong else self.complete())]

    def complete(self):
        if self.missing:
            return []
        space, head = self.space, self.tree.head
        space.files = {entry.path: self.content_of(entry) for entry in self.tree.entries}
        space.half = False
        need = head["setup"] and space.noted != setup_key(self.tree)
        return [tc.TreeReady(space.path, head["setup"] if need else "")]

    def EndSetup(self, effect):
        assert self.space.passed == setup_key(self.tree)
        self.space.noted = setup_key(self.tree)
        return []

    def ReleaseTree(self, effect):
        self.check_nothing_runs()
        self.leave()
        return [tc.TreeReleased()]

    def leave(self):
        if self.space:
            self.space.user = self.space = None

    def check_nothing_runs(self):
        """Nobody may change a workspace under a command."""
        for actor, generation, key in [*self.world.live, *self.world.setups]:
            assert (actor, generation, key[0]) != (
                self.actor.name, self.generation, self.run) or not self.space, f"{key} runs"


def setup_key(tree):
    return tree.head["setup"], tree.head["setup_for"]


class World:
    """One simulated run. `faults` are the kinds of faults that happen; None is a mix of all,
    with all sorts of peers, clocks, limits and troubles. With an adversary, lines come twice and
    out of turn, as on no connection of ours: then only what clients report is checked, and that
    they report all once they have new connections. In every other world all have keys, and there
    are thieves."""

    MIX = ("crash", "pause", "cut_wire", "cut_wire", "swallow", "freeze", "terminate", "interrupt",
           "steal", "load")
    STREAM_FAULTS = ("break_stream", "freeze_stream")
    TREE_FAULTS = ("edit", "edit", "pry")

    def __init__(self, seed, faults=None, adversary=False, story=False):
        self.r = random.Random(seed)
        self.seed = seed
        self.now = 0.0
        self.events = []  # heap of (time, number, function)
        self.number = 0
        self.story = [] if story else None
        self.trace = hashlib.sha1()
        self.looks_at_end = seed % 4 == 0  # it takes as long as all the rest
        self.seen = Counter()  # interesting things that did happen
        self.actors = {}
        self.serial = 0
        self.deeds = 0  # things that actors were told
        self.starts = Counter()  # cmd > executions begun
        self.records = {}  # cmd > attempt > what its executions can be reported as
        self.attempts = set()  # (run, id, attempt) of all executions
        self.given = Counter()  # cmd > how often a broker gave it to a worker
        self.unable = Counter()  # cmd > how often it could not be started
        self.lost = set()  # (run, id, attempt) that a broker called LOST
        self.forgotten = set()  # runs whose lease a broker has ended, or that it took with it
        self.live = {}  # (actor, generation, attempt) > its job and a token
        self.reports = Counter()  # cmd > times
        self.fetched = {}
        self.kept = {}  # command > output
        self.returning = random.Random(f"files{seed}").random() < 0.3
        self.files = {}  # (command, attempt) > contents of its files
        self.healed = False
        self.faults = self.MIX if faults is None else faults
        self.wild = faults is None
        self.shape = random.Random(f"streams{seed}")  # of the part with streams
        self.streams = "break_stream" in self.faults or self.wild and self.shape.random() < 0.25
        if self.wild and self.streams:
            self.faults += self.STREAM_FAULTS
        # -S: no worker comes back, and none is waited for
        self.hosts_only = self.streams and self.shape.random() < 0.5
        self.keyed = seed % 2 == 1 and not self.hosts_only
        self.endangered = set()  # what lost workers with a stream had
        # --sync: as with the streams, their part is drawn apart
        self.wood = random.Random(f"trees{seed}")
        self.trees = any(kind in self.faults for kind in self.TREE_FAULTS) or (
            self.wild and self.wood.random() < 0.25)
        if self.wild and self.trees:
            self.faults += self.TREE_FAULTS
        self.spaces = defaultdict(list)  # by host
        self.contents = defaultdict(dict)  # (host, owner) > contents it has seen, by hash
        self.known_trees = {}  # id > (client's name, what it is to be in a workspace, setup)
        self.named = defaultdict(set)  # attempt > trees that its client named
        self.barred = {}  # attempt > hosts that its client called unfit before
        self.had = set()  # (worker's name, generation, attempt)
        self.setups = {}  # (actor, generation, run's key) > job
        self.calm = {*self.faults} <= {"pry"}
        self.came = defaultdict(set)  # (worker's name, run) > hashes of contents
        self.answers = Counter()  # (run, id, attempt, spans) > how often they were sent
        self.full_hosts = self.failing_hosts = ()
        # where nothing can be started
        self.bad_hosts = ("h0",) if self.wild and random.Random(f"bad{seed}").random() < 0.3 else ()
        self.adversary = adversary
        self.times = tc.Times()
        # how often commands cannot be started
        self.shortage = self.r.choice([0, 0, 0.1, 0.9]) if self.wild else 0
        self.limits = {"INLINE": SIM_INLINE, "CHUNK_SIZE": SIM_CHUNK}
        if self.wild:
            self.limits.update(MAX_READY_TASKS=self.r.choice([1, 3, tc.MAX_READY_TASKS]),
                               EXCLUDE_AFTER=1)
            self.limits.update(WINDOW=self.r.choice([3, 10, tc.WINDOW]), SPOOL_COST=200,
                               CREDIT=self.r.choice([500, 2000, tc.CREDIT]))
        self.build()

    # --- the world's laws

    def say(self, *words):
        self.trace.update(repr((round(self.now, 6), words)).encode())
        if self.story is not None:
            self.story.append(f"{self.now:9.4f} " + " ".join(map(str, words)))

    def at(self, when, function):
        self.number += 1
        heapq.heappush(self.events, (max(when, self.now), self.number, function))

    def after(self, delay, function):
        self.at(self.now + delay, function)

    def do(self, actor, generation, function, last=False):
        """Let something happen to an actor: now, or when its pause ends. What it wants then is
        carried out at once, or together with what follows, as in a busy loop."""
        if actor.machine is None or actor.generation != generation:
            return
        if actor.paused_until > self.now:
            actor.inbox.append((generation, function))
            return
        self.deeds += 1
        known = list(actor.machine.registry.clients) if actor.role == "broker" else []
        held = self.held_by(actor)
        function(actor.machine)
        if actor.role == "broker":
            check_broker(actor.machine)
            for run in set(known) - set(actor.machine.registry.clients):
                self.seen["forgotten"] += 1
                self.forgotten.add(run)
        if actor.role == "client" and not actor.plain:
            check_client(actor.machine)
            offer = actor.machine.offer
            assert offer.on_way <= tc.OFFERED_AHEAD + tc.CHUNK_SIZE * len(offer.transfers)
        if self.trees and actor.role == "worker" and not actor.plain:
            for use in actor.machine.uses.values():
                use.check(actor.machine.jobs)
        for key, job in held.items():
            if key not in actor.machine.jobs:
                assert self.may_drop(key, job.cmd), f"{actor.name} drops the result of {key}"
        if last or self.r.random() < 0.7:
            self.settle(actor)
        else:
            self.after(self.r.random() * 0.01, lambda: self.do(
                actor, generation, lambda m: None, last=True))

    def held_by(self, actor):
        if actor.role != "worker" or actor.plain or self.adversary:
            return {}
        return {key: job for key, job in actor.machine.jobs.items() if job.state == tc.DELIVERED}

    def may_drop(self, key, cmd):
        """Whether nobody will ask for this attempt's result any more."""
        run, id, attempt = key
        if run in self.forgotten or run.startswith(tc.PLAIN) \
                or key in self.lost or self.reports[cmd]:
            return True
        for actor in self.actors.values():  # one may not have been able yet to tell that it is lost
            if actor.role == "broker" and actor.machine is not None \
                    and run in actor.machine.registry.clients \
                    and actor.machine.registry.clients[run].lost.get(id, (-1,))[0] >= attempt:
                return True
        client = self.actors[run.rpartition("run")[2]].machine  # None: it has left
        if client is None or client.status is not None or id not in client.window:
            return True
        return client.window[id].attempt > attempt

    def settle(self, actor):
        """Carry out what an actor's machine wants, and wake it when it is due."""
        while actor.machine is not None:
            frames, effects = actor.machine.take()
            if not frames and not effects:
                break
            for frame in frames:
                self.send(actor, frame)
            for effect in effects:
                self.carry_out(actor, effect)
        machine = actor.machine
        if machine is None:
            return
        if actor.role == "worker" and not actor.plain:
            actor.start_deadline = machine.start_deadline()
            self.run_line(actor)
        due = machine.deadline()
        if due < 1e9:
            self.at(actor.world_time(due) + 1e-6, lambda g=actor.generation: self.tick(actor, g))

    def tick(self, actor, generation):
        if actor.machine is not None and actor.generation == generation \
                and actor.paused_until <= self.now \
                and actor.machine.deadline() <= actor.clock(self.now):
            self.do(actor, generation, lambda m: m.tick(actor.clock(self.now)))

    def send(self, actor, frame):
        self.say(actor.name, ">", frame.link, frame.peer.decode(), frame.token, frame.body[:150])
        if actor.role != "relay":
            self.note(actor, frame)
        if actor.stream is not None and frame.link == (
                WORKERS if actor.role == "relay" else BROKER):
            actor.stream.links[actor.role == "worker"].send(frame)
            return
        if frame.peer in actor.pipes.links and frame.link == WORKERS:
            actor.pipes.send(frame)
            return
        if actor.role == "relay" and frame.link == WORKERS:
            return  # its worker has gone
        if frame.link == BROKER:
            if actor.wire is not None and actor.wire.open:
                self.fly(actor.wire, 0, frame)
            return
        wire = actor.peers.get((frame.link, frame.peer))
        if wire is None or not wire.open:
            generation = actor.generation
            self.after(0, lambda: self.do(actor, generation, lambda m: m.disconnected(
                frame.link, frame.peer, actor.clock(self.now))))
        else:
            self.fly(wire, 1, frame)

    def note(self, actor, frame):
        """Keep account of what is said."""
        for line in frame.body.split(b"\n"):
            verb = line.split(b" ", 1)[0].decode() if line[:1] != b"{" else COMMAND
            self.seen[verb] += 1
            self.seen["OK taken for a command"] += line == b"QUEUED OK"
            if verb == COMMAND and actor.source is not None:
                self.note_tree(actor, json.loads(line))
            elif verb == COMMAND and frame.link == WORKERS:
                self.given[json.loads(line)["cmd"]] += 1
            elif verb == "LOST" and actor.role == "broker":
                run = frame.token if frame.link != CLIENTS else \
                    actor.machine.registry.run_of.get(frame.peer)
                self.lost.update((run, *row) for row in tc.decode(line)[1]["tasks"])
            elif verb == "CANCEL" and actor.role == "broker" and b"tasks" in line \
                    and actor.machine.upstream.chained \
                    and not actor.machine.upstream.session.joined:
                # it will not list these when it joins, and that will be its LOST
                self.lost.update((frame.token, *row) for row in tc.decode(line)[1]["tasks"])
            elif verb == "READY" and b'"held":[[' in line:
                self.seen["held results announced"] += 1

    def fly(self, wire, way, frame):
        if wire.swallow[way]:
            self.seen["swallowed"] += 1
            return
        if self.adversary and not self.healed and self.r.random() < 0.2:
            self.seen["twice or out of turn"] += 1
            actor = wire.hub if way == 0 else wire.member
            self.after(self.r.random() * 5, lambda g=actor.generation: wire.open and self.hand_over(
                wire, way, frame, actor, g))
            if self.r.random() < 0.5:
                return
        delay = self.r.choice([0.0005, 0.002, 0.02, self.r.random() * 0.3])
        wire.last[way] = max(wire.last[way], self.now + delay)
        wire.flying[way].append(frame)
        actor = wire.hub if way == 0 else wire.member
        generation = actor.generation
        self.at(wire.last[way], lambda: self.land(wire, way, frame, actor, generation))

    def land(self, wire, way, frame, actor, generation):
        if frame not in wire.flying[way]:
            return  # lost when the wire was cut
        wire.flying[way].remove(frame)
        if not wire.open and way == 1:
            return  # a DEALER that lost its connection hears nothing more from it
        self.seen["late"] += not wire.open
        self.hand_over(wire, way, frame, actor, generation)

    def hand_over(self, wire, way, frame, actor, generation):
        link, peer = (wire.link, wire.peer) if way == 0 else (BROKER, b"")
        if actor.role == "broker" and b"RESULT" in frame.body and actor.generation == generation \
                and actor.machine is not None and peer in actor.machine.registry.workers:
            tasks = actor.machine.registry.workers[peer].tasks
            self.seen["stale result"] += not any(key[0] == frame.token for key in tasks)

        def hear(machine):
            if self.keyed and way == 0:
                machine.identified(link, peer, wire.member.name)
            machine.receive(link, peer, frame.token, frame.body, frame.data, actor.clock(self.now))
        self.do(actor, generation, hear)

    def connect(self, member):
        """A member's socket tries to connect to its broker."""
        generation = member.generation
        if member.machine is None or member.wants is None:
            return
        hub, link = member.wants
        if hub.machine is None or hub.paused_until > self.now:  # then nobody shakes hands
            self.after(0.1 + self.r.random(), lambda: member.generation == generation
                       and member.wire is None and self.connect(member))
            return
        self.serial += 1
        wire = member.wire = Wire(member, hub, link, b"p%d" % self.serial)
        hub.peers[link, wire.peer] = wire
        self.after(0.001, lambda: wire.open and self.do(member, generation,
                                                        lambda m: m.connected(
                                                            BROKER, member.clock(self.now))))

    def cut(self, wire, tell_hub=True, tell_member=True):
        """Break a connection; what is under way is lost from some point on."""
        if wire is None or not wire.open:
            return
        wire.open = False
        for way in (0, 1):
            keep = self.r.randint(0, len(wire.flying[way]))
            while len(wire.flying[way]) > keep:
                wire.flying[way].pop()
        hub, member = wire.hub, wire.member
        hub_generation, generation = hub.generation, member.generation
        if tell_hub:
            self.after(self.r.random() * 0.2, lambda: self.do(hub, hub_generation, lambda m: (
                hub.peers.pop((wire.link, wire.peer), None),
                m.disconnected(wire.link, wire.peer, hub.clock(self.now)))))
        if member.wire is wire:
            member.wire = None
            if tell_member:
                self.do(member, generation, lambda m: m.disconnected(
                    BROKER, b"", member.clock(self.now)))
            self.after(self.r.random() * 1.0, lambda: member.generation == generation
                       and member.wire is None and self.connect(member))

    def carry_out(self, actor, effect):
        kind, generation = type(effect), actor.generation
        if kind is tc.Reconnect:
            self.seen["reconnect"] += 1
            if actor.stream is not None:
                actor.stream.links[1].reconnect()
            elif actor.wire is not None:
                self.cut(actor.wire, tell_member=False)
            elif actor.machine is not None:
                self.connect(actor)
        elif kind is tc.Start:
            if actor.plain:
                self.start(actor, effect.job)
            else:
                actor.line[effect.job.key] = effect.job
        elif kind is tc.Recall:
            self.recall(actor, effect.job)
        elif kind in (tc.FindTree, tc.FillTree, tc.PutTree, tc.EndSetup, tc.ReleaseTree):
            if effect.run not in actor.files:
                actor.files[effect.run] = SimFiles(self, actor, effect.run)
            actor.files[effect.run].carry_out(effect)
        elif kind is tc.StartSetup:
            self.start_setup(actor, effect.job)
        elif kind is tc.AnswerFetch:
            self.answer_fetch(actor, effect.fields)
        elif kind is tc.Kill:
            key = (actor.name, generation, effect.job.key)
            if self.recall(actor, effect.job):
                self.seen["killed in line"] += 1
            elif key in self.setups and (effect.hard or self.r.random() < 0.8):
                self.seen["setup killed"] += 1
                self.end_setup(key, exit_record(143))
            elif key in self.live and (effect.hard or self.r.random() < 0.8):
                job, token = self.live.pop(key)
                self.finish(actor, generation, job,
                            self.timed(actor, job, exit_record(143, b"killed")))
        elif kind is tc.FetchedOutput:
            known = self.fetched.get(actor.name, b"")
            self.fetched[actor.name] = known[:effect.offset] + effect.data
        elif kind is tc.ReturnedPart:
            key = effect.command.cmd, effect.attempt
            known = self.files.get(key, b"")
            assert effect.offset <= len(known), f"{key}: a part of its files is missing"
            self.files[key] = known[:effect.offset] + effect.data
            self.seen["fetched files"] += effect.offset > 0
        elif kind is tc.ProvisionalResult:
            self.seen["looked into"] += 1
            self.kept[effect.command] = effect.output if effect.output is not None \
                else self.fetched.get(actor.name)
        elif kind is tc.FinalResult:
            self.report(actor, effect)
        elif kind is tc.Exit:
            self.say(actor.name, "exits", effect.status)
            if actor.role == "client":
                actor.exited = effect.status
                self.seen["no host is fit"] += effect.status == 3
                assert effect.status != 3 or actor.machine.unfit, "it gave up without a reason"
            else:
                self.after(self.r.random() * 3, lambda: self.begin(actor))
            self.stop(actor)

    # --- trees

    def owner_of(self, run):
        """Return whose workspaces a run may take."""
        mark, _, name = run.rpartition("run")
        return mark, self.actors[name].source.head["origin"]

    def look(self, actor):
        """A client has listed its files."""
        def look(machine):
            tree, files = actor.source.look()
            self.known_trees[tree.id] = files, tree.head["setup"] and setup_key(tree)
            machine.set_tree(tree, actor.clock(self.now))
        self.after(self.r.choice([0, 0.1, 3.0]) * self.r.random(), lambda: self.do(
            actor, actor.generation, look))

    def answer_fetch(self, actor, fields):
        machine, tree = actor.machine, actor.machine.offer.tree
        data = None
        if tree is not None and tree.id == fields["tree"]:
            spans = fields.get("spans") or [[fields["offset"], fields["size"]]]
            data = actor.source.read(tree, spans, fields.get("again"))
            if data is None:
                self.seen["changed while it was sent"] += 1
                machine.set_tree(None, actor.clock(self.now))
                self.look(actor)
            what = machine.run, fields["id"], fields["attempt"], str(spans)
            self.answers[what] += "host" in fields  # else a worker has pried
            assert not self.calm or self.answers[what] <= 1, f"{what} is sent twice"
        if data is None:
            machine.refuse(fields)
        else:
            machine.answer(fields, data)

    def note_tree(self, actor, fields):
        """A client submits an attempt."""
        key = (actor.machine.run, fields["id"], fields["attempt"])
        self.named[key].add(fields["tree"])
        self.barred.setdefault(key, {*actor.machine.unfit})

    def hears(self, actor, machine):
        """Keep account of what comes to a worker: contents come only to who has their command."""
        receive, generation = machine.receive, actor.generation

        def hear(link, peer, token, body, data, now):
            for line in body.split(b"\n") if self.trees else ():
                if line[:1] == b"{" or line.startswith(b"CHUNK"):
                    fields = tc.decode(line)[1]
                    key = actor.name, generation, (token, fields["id"], fields["attempt"])
                    if line[:1] == b"{":
                        self.had.add(key)
                    self.seen["CHUNK of a tree"] += "tree" in fields
                    assert "tree" not in fields or key in self.had, f"{key} is not theirs"
            receive(link, peer, token, body, data, now)
        machine.receive = hear

    def start_setup(self, actor, job):
        key = (actor.name, actor.generation, job.key)
        files = actor.files[job.key[0]]
        self.say(actor.name, "sets up", job.key)
        self.check_place(files.tree.id, files, job)
        assert key not in self.setups, "two setups at once"
        assert files.space.noted != setup_key(files.tree), "set up twice"
        assert not self.calm or files.space.passed != setup_key(files.tree), "it is not noted"
        self.setups[key] = job
        ok = actor.host not in self.failing_hosts

        def end():
            if self.setups.get(key) is job:
                if ok and files.space is not None:
                    files.space.passed = setup_key(files.tree)
                self.end_setup(key, exit_record(0 if ok else 1, b"words"))
        self.after(self.r.choice([0.1, 3.0, 9.0]) * self.r.random(), end)

    def end_setup(self, key, how):
        job, actor = self.setups.pop(key), self.actors[key[0]]
        self.say(actor.name, "has set up", job.key, how.exitcode)
        self.seen["setup passed" if how.exitcode == 0 else "setup failed"] += 1
        self.do(actor, key[1], lambda m: (
            m.finished(job, how, actor.clock(self.now)), m.settle()))

    def check_place(self, tree, files, job):
        """A process runs in a workspace of its own run, which has exactly this tree."""
        space = files.space
        assert space is not None and space.user is files, f"{job.key} has no workspace"
        assert space.path == job.cwd.rstrip("/"), (space.path, job.cwd)
        assert space.files == self.known_trees[tree][0], f"{job.key} is not in {tree}"

    def check_tree(self, actor, job):
        """A command runs in the tree that its client named, set up, where it may run."""
        tree = job.tree if not actor.plain else json.loads(job.line).get("tree", "")
        source = self.actors[job.key[0].rpartition("run")[2]].source
        assert (source is not None) == bool(tree), f"{job.key} runs in {tree or 'no tree'}"
        if tree:
            assert tc.TREES in actor.labels, f"{actor.name} knows no trees"
            assert tree in self.named[job.key], f"{job.key} runs in another's tree"
            assert actor.host not in self.barred[job.key], f"{job.key} is on an unfit host"
            files, setup = actor.files[job.key[0]], self.known_trees[tree][1]
            self.check_place(tree, files, job)
            assert not setup or files.space.passed == setup, "it is not set up"
            self.seen["runs in a tree"] += 1

    # --- commands

    def recall(self, actor, job):
        """As the Runner does."""
        waited = actor.line.pop(job.key, None) is not None
        if waited:
            generation, how = actor.generation, tc.requeued(tc.RECALLED)
            self.after(0, lambda: self.do(actor, generation, lambda m: (
                m.finished(job, how, actor.clock(self.now)), m.settle())))
        return waited

    def run_line(self, actor):
        """What the threads of a Runner do, whatever its loop is doing."""
        if actor.machine is None or actor.paused_until > self.now:
            return
        while actor.line and actor.clock(self.now) < actor.start_deadline and actor.slots > sum(
                key[0] == actor.name for key in self.live):
            self.start(actor, actor.line.popitem(last=False)[1])

    def start(self, actor, job):
        """A command begins. How it will end is drawn now."""
        cmd, r = job.cmd, self.r
        self.starts[cmd] += 1
        self.say(actor.name, "starts", job.key, cmd)
        assert self.adversary or job.key not in self.attempts or job.key[0] in self.forgotten, \
            f"{job.key} starts twice"
        self.attempts.add(job.key)
        self.seen["restarted"] += self.starts[cmd] > 1
        chained = "b1" in self.actors  # then what is lost above may have its lease below
        late = job.key in self.lost and actor.owner is not None and self.hosts_only
        self.seen["started on a lost host"] += late
        assert self.adversary or actor.plain or chained or job.key[0] in self.forgotten \
            or job.key not in self.lost or late, f"{job.key} starts too late"
        key = (actor.name, actor.generation, job.key)
        assert key not in self.live, f"{job.key} runs twice at one worker"
        if self.trees and not job.key[0].startswith(tc.PLAIN):
            self.check_tree(actor, job)
        token = object()
        self.live[key] = (job, token)
        drawn = random.Random(cmd) if self.adversary else r  # who may have run an attempt twice
        output = bytes(drawn.choices(b"ab\xff", k=drawn.choice([0, 10, 59, 61, 200])))
        if not actor.plain and r.random() < self.shortage:
            how = exit_record(tc.NOT_RUN, reason="nothing left", requeue=True)
            self.unable[cmd] += 1
            assert cmd[0] == "d" or self.unable[cmd] <= 3 * tc.SPAWN_LIMIT, \
                f"{cmd} is started again and again"  # a plain client may ask for it as often
        elif not actor.plain and r.random() < self.shortage:
            how = exit_record(tc.NOT_RUN, output, reason="no room")
        elif actor.host in self.bad_hosts:
            how = exit_record(127, output)
        else:
            how = exit_record(drawn.choice([0, 0, 1]), output)
        if getattr(job, "returns", None) and not how.requeue:
            rows, data = self.made(cmd, job.key[2])
            how = how._replace(returned=rows, output=FakeOutput(output, data))
        generation = actor.generation
        when = actor.began[job.key] = actor.clock(self.now)

        def tell():
            if not actor.plain and self.live.get(key, (None, None))[1] is token:
                self.do(actor, generation, lambda m: (
                    m.started(job, when, actor.clock(self.now)), m.settle()))
        self.after(tc.REPORT_DELAY, tell)

        def end():
            if self.live.get(key, (None, None))[1] is token:
                if self.trees and not actor.plain and job.tree:
                    self.check_place(job.tree, actor.files[job.key[0]], job)
                del self.live[key]
                if cmd.endswith("poison"):
                    self.crash(actor)
                else:
                    ended = self.timed(actor, job, how)
                    self.after(r.choice([0, tc.REPORT_DELAY]),
                               lambda: self.finish(actor, generation, job, ended))
                    self.run_line(actor)
        self.after(r.choice([0.01, 0.3, 2.0, 8.0]) * r.random(), end)

    def made(self, cmd, attempt):
        """The files that an attempt makes: rows of its RESULT, and the contents."""
        r = random.Random(f"{cmd} {attempt}")
        sizes = [r.choice([0, 3, 30, 200]) for _ in RETURNS]
        rows = [[r.choice([0o644, 0o700]), size] for size in sizes]
        rows[1] = []
        return rows, bytes(r.choices(b"ab\xff", k=sizes[0] + sizes[2]))

    def timed(self, actor, job, how):
        """How it has ended, with the time that it took."""
        return how._replace(time=(actor.clock(self.now) - actor.began[job.key]) * 1000)

    def finish(self, actor, generation, job, how):
        """A process has ended; its worker hears of it as soon as it listens."""
        code, reason = how.exitcode, how.reason
        if job.killed and not job.cancelled and how.time >= job.timeout * 1000:
            code, reason = tc.TIMED_OUT, "stopped"
            self.seen["timeout"] += 1
        known = self.records.setdefault(job.cmd, {}).setdefault(job.key[2], set())
        if not how.requeue:
            known.add((code, how.output.data, reason))
        if job.deadline < actor.clock(actor.paused_until):  # when it goes on, this is seen first
            known.add((tc.TIMED_OUT, how.output.data, "stopped"))
        self.do(actor, generation, lambda m: (
            m.finished(job, how, actor.clock(self.now)), m.settle()))

    def report(self, actor, effect):
        cmd, result = effect.command.cmd, effect.result
        self.reports[cmd] += 1
        self.say(actor.name, "reports", cmd, result)
        assert self.reports[cmd] == 1, f"{cmd} is reported twice"
        assert cmd in actor.commands, f"{cmd} was never asked for"
        output = self.fetched.get(actor.name) if effect.output is None else effect.output
        output = self.kept[effect.command] if not actor.plain and effect.provisional else output
        if not actor.plain and effect.command.attempt > result.get("attempt", 0):
            self.seen["nowhere else to start"] += result["exitcode"] in tc.CANNOT_START
        if not actor.plain and tc.could_not_start_on(effect.command.tries.values()):
            self.seen["started elsewhere"] += 1
        self.seen["fetched"] += effect.output is None
        if "returned" in result:
            key = cmd, result["attempt"]
            assert (result["returned"], self.files.get(key, b"")) == self.made(*key), key
            self.seen["files"] += 1
        text = result.get("reason", "") + tc.to_text(output)
        if "workers were lost" in text or "could not be started" in text:
            self.seen["poison" if "lost" in text else "not started"] += 1
            assert self.given[cmd] >= self.times.crash_limit, cmd
            assert "lost" in text or self.unable[cmd] >= tc.SPAWN_LIMIT, cmd
            return
        assert not cmd.endswith("poison") or result["exitcode"] == tc.TIMED_OUT, cmd
        endings = self.records[cmd]
        if actor.plain:  # these get all in the output, and do not know of attempts
            assert any((result["exitcode"], tc.to_text(output)) == (code, tc.in_utf8(tc.to_text(
                out + (f"testcloud: {why}\n".encode() if why else b""))))
                for attempt in endings.values() for code, out, why in attempt), (cmd, endings)
            return
        reason = result.get("reason", "").partition(" after")[0]
        how = (result["exitcode"], output, reason)
        assert how in endings[result["attempt"]], (cmd, how, endings)
        failed = [n for n in endings if any(code for code, _, _ in endings[n])]
        self.seen["tried elsewhere"] += len(effect.command.tries) > 1
        assert not result["exitcode"] or actor.machine.status is not None or \
            len(failed) >= actor.options.tries, f"{cmd} should have been tried again"

    # --- who lives in it

    def build(self):
        r = self.r
        depth = r.choice([1, 1, 1, 2, 3])
        if self.hosts_only:
            depth = 1
        brokers = [self.add(f"b{n}") for n in range(depth)]
        for upper, lower in zip(brokers, brokers[1:]):
            lower.wants = (upper, WORKERS)
        for n in range(r.randint(1, 4)):
            hub = brokers[-1] if n == 0 else r.choice(brokers)
            worker = self.add(f"p{n}" if self.hosts_only else f"w{n}",
                              None if self.hosts_only else (hub, WORKERS))
            worker.owner = hub if self.hosts_only else None
            worker.slots, worker.drain = r.randint(1, 4), r.choice([0, 0, 3.0])
        if self.streams and not self.hosts_only:
            self.build_streams(brokers)
        for n in range(r.randint(1, 3)):
            client = self.add(f"c{n}", (r.choice(brokers[:1] * 3 + brokers), CLIENTS))
            client.commands = [f"{client.name}.{i}" for i in range(r.randint(1, 25))]
        if self.wild:
            self.build_oddities(brokers)
        if self.trees:
            self.build_trees()
        for actor in self.actors.values():
            self.after(r.random() * r.choice([0.1, 5.0]), lambda a=actor: self.begin(a))

    def build_streams(self, brokers):
        """Add workers with a stream to a relay, or to a broker that does not know what that is."""
        for n in range(self.shape.randint(1, 3)):
            worker = self.add(f"p{n}")
            worker.slots, worker.owner = self.shape.randint(1, 4), self.shape.choice(brokers)
            if self.shape.random() < 0.7:
                relay = self.add(f"r{n}")
                relay.hub, worker.owner = worker.owner, relay

    def build_oddities(self, brokers):
        r = self.r
        if r.random() < 0.3 and not self.hosts_only:
            self.add("v0", (r.choice(brokers), WORKERS))
        if r.random() < 0.3:
            client = self.add("d0", (r.choice(brokers), CLIENTS))
            client.commands = [f"d0.{i}" for i in range(r.randint(1, 10))]
        skewed = r.random() < 0.5
        for actor in self.actors.values():
            if skewed:
                actor.rate, actor.offset = r.uniform(0.8, 1.2), r.uniform(0, 1e6)
            if actor.role == "client" and r.random() < 0.3:
                actor.options = tc.RunOptions(timeout=r.choice([0, 3.0]), tries=r.choice([1, 3, 4]),
                                         needs=r.choice([(), (), ("l",)]), serial=r.random() < 0.2)
            if actor.name in ("w0", "p0") or r.random() < 0.2:
                actor.labels = ("l",)
            if actor.role == "client" and r.random() < 0.05:
                actor.commands[0] += "poison"

    def build_trees(self):
        """Let clients have trees, and all workers but some old ones know them."""
        r, hosts = self.wood, sorted({actor.host for actor in self.actors.values()
                                      if actor.role == "worker"})
        size = r.choice([25, 100, 400])
        self.limits.update(
            CHUNK_SIZE=size, OFFERED_AHEAD=size * r.choice([1, 4, 16]),
            TREE_TIMEOUT=tc.TREE_TIMEOUT if self.calm else 5.0,
            MAX_SPANS=r.choice([1, 2, 1000]), FETCH_AHEAD=r.choice([1, 2, 8]))
        if r.random() < 0.3:
            self.failing_hosts = r.sample(hosts, 1)
        if self.wild and r.random() < 0.2:
            self.full_hosts = r.sample(hosts, 1)
        for actor in self.actors.values():
            if actor.role == "worker" and not actor.plain and (
                    actor.name[1:] == "0" or r.random() < 0.8):
                actor.labels += (tc.TREES,)
            elif actor.role == "client" and not actor.plain and (
                    actor.name == "c0" or r.random() < 0.7):
                actor.options = actor.options._replace(sync=True)
                origin = r.choice(["one", "two"])
                same = random.Random(f"{self.seed} {origin}")  # who have it begin with the same
                actor.source = SimSource(same, {
                    "origin": origin, "name": "tree", "setup": same.choice(["", "make"]), "cwd": "",
                    "setup_for": r.choice(["lock", "lock", "other lock"]), "fresh": ""})

    def add(self, name, wants=None):
        actor = self.actors[name] = Actor(name)
        actor.wants = wants
        return actor

    def begin(self, actor):
        """Start an actor's process, for the first time or anew."""
        if actor.machine is not None or actor.exited is not None:
            return
        if actor.owner is not None and not self.can_open(actor):
            self.after(0.1 + self.r.random(), lambda: self.begin(actor))
            return
        actor.generation += 1
        actor.pipes = tc.PeerLinks()
        actor.paused_until, actor.inbox, actor.peers, actor.wire = 0.0, [], {}, None
        actor.line.clear()
        actor.files = {}
        name = f"{actor.name}.{actor.generation}"
        self.say(name, "begins")
        if actor.plain:
            actor.machine = (PlainWorker(self.r.random() < 0.5) if actor.role == "worker"
                             else PlainClient(actor.commands))
        elif actor.role == "broker":
            name += self.mark(actor)
            times = self.times._replace(  # as in run_on_hosts()
                lost_grace=0.0, worker_expiry=tc.MAX_SILENCE) if self.hosts_only else self.times
            actor.machine = tc.Broker(name, times, actor.wants is not None,
                                      actor.clock(self.now))
        elif actor.role == "relay":
            self.begin_relay(actor)
        elif actor.owner is not None:
            name = name.replace(".", "-") + "." + self.mark(actor)
            actor.machine = tc.Worker(name, actor.slots, host=actor.host, times=self.times,
                                      drain=actor.drain, labels=actor.labels, max_load=3.0)
            self.open_stream(actor)
        elif actor.role == "worker":
            name += self.mark(actor)
            actor.machine = tc.Worker(name, actor.slots, host=actor.host, times=self.times,
                                      drain=actor.drain, labels=actor.labels, max_load=3.0)
        else:
            actor.machine = tc.Client(f"{self.mark(actor)}run{actor.name}", self.times,
                                      options=actor.options)
            for cmd in actor.commands:
                self.after(self.r.random() * 20, lambda cmd=cmd: self.add_command(actor, cmd))
            self.at(self.now + 20, lambda: self.do(actor, actor.generation,
                                                   lambda m: m.end_input(
                                                       actor.clock(self.now))))
        if actor.source is not None:
            self.look(actor)
        elif actor.role == "worker" and not actor.plain:
            self.hears(actor, actor.machine)
        self.connect(actor)
        self.settle(actor)

    def begin_relay(self, actor):
        """As run_relays() does for each host."""
        world, generation = self, actor.generation

        class SimDealer(tc.DealerLink):
            keys = types.SimpleNamespace(pairs={tc.WORKER_ROLE: types.SimpleNamespace(
                public=actor.name)}) if world.keyed else None

            def __init__(self):
                actor.wants = (actor.hub, WORKERS)
                world.after(0, lambda: actor.generation == generation and world.connect(actor))

            def reconnect(self):
                if actor.wants is not None and actor.wire is not None:
                    world.cut(actor.wire, tell_member=False)
                elif actor.wants is None:
                    self.__init__()

            def close(self, linger):
                actor.wants = None
                world.cut(actor.wire, tell_member=False)

        loop = types.SimpleNamespace(add=lambda *_: types.SimpleNamespace(links={}))
        actor.wants = None
        actor.uplink = tc.Relay(
            loop, lambda adapter: adapter.links.update({BROKER: SimDealer()}))
        actor.machine = actor.uplink.machine

    def can_open(self, worker):
        """Whether our end runs, and has seen the end of the last stream."""
        owner, last = worker.owner, worker.last_stream
        return owner.machine is not None and (
            last is None or last.links[0].closed or last.generations[0] != owner.generation)

    def open_stream(self, worker):
        """As a Host and run_from_memory() do."""
        owner, r = worker.owner, self.shape
        stream = worker.stream = worker.last_stream = Stream(self, owner, worker)
        peer = b"stream " + worker.name.encode()
        if owner.role == "relay":
            uplink, owner.stream = owner.uplink, stream
        else:
            uplink = tc.BrokerUplink(owner.machine, owner.pipes, peer)
        mark = b"%032d" % r.randrange(10**32)

        def ended(why, now):
            self.seen["silent stream"] += "silent" in why
            assert not why or "silent" in why, why
            if owner.role == "relay":
                owner.stream = None
            uplink.ended(now)

        def worker_ended(why, now):
            self.after(0, lambda: worker.generation == generation and self.lose(worker))
        generation = worker.generation
        def opened(now):
            if self.keyed and owner.role == "broker":
                owner.machine.identified(WORKERS, peer, worker.name)
            uplink.opened(ours, now)
        ours = stream_link(stream, 0, uplink.machine, WORKERS, uplink.peer,
                           {"reconnect": lambda now: uplink.reconnect()}, ended, mark, opened)
        theirs = stream_link(stream, 1, worker.machine, BROKER, b"",
                             tc.worker_controls(worker.machine), worker_ended, b"",
                             lambda now: None)
        theirs.write(mark[:r.randint(0, 31)] + b"welcome\n" + mark + b"\n")
        for end in (0, 1):
            self.after(tc.BEAT_INTERVAL * self.r.random(), lambda end=end: stream.beat(end))

    def lose(self, worker):
        """A worker's stream has ended; its owner starts another one."""
        if worker.machine is None:
            return
        self.seen["lost stream"] += 1
        self.say(worker.name, "ends with its stream")
        self.stop(worker)
        self.after(self.r.choice([0.05, 1.0, 5.0]), lambda: self.begin(worker))

    def mark(self, actor):
        """What a name has to have in it that is to be bound to a key."""
        return tc.fingerprint(actor.name) if self.keyed else ""

    def add_command(self, actor, cmd):
        def add(machine):
            if not machine.input_ended:
                files = self.returning and not actor.plain and random.Random(cmd).random() < 0.5
                machine.add(cmd, "" if files or actor.source is not None else "/",
                            RETURNS if files else ())
                machine.now = actor.clock(self.now)
                machine.settle()
        self.do(actor, actor.generation, add)

    def stop(self, actor):
        """An actor's process is gone, and with a worker what it ran."""
        if actor.owner is not None and actor.machine is not None:
            self.endangered.update(job.cmd for job in actor.machine.jobs.values())
        for other in self.actors.values():
            if other.stream is not None and (other is actor or other.owner is actor):
                other.stream.break_off(whole=self.r.random() < 0.5)
        actor.machine = actor.stream = None
        for known in (self.live, self.setups):
            for key in [key for key in known if key[0] == actor.name]:
                del known[key]
        for files in actor.files.values():
            files.leave()
        if actor.wire is not None:
            wire, actor.wire = actor.wire, None
            self.cut(wire)
        for wire in list(actor.peers.values()):
            self.cut(wire)

    # --- faults

    def misfortune(self):
        """Something bad happens, and another thing is on its way."""
        if self.healed:
            return
        actor = self.r.choice(list(self.actors.values()))
        kind = self.r.choice(self.faults)
        if kind.endswith(" broker"):
            kind, actor = kind.split()[0], self.actors["b0"]
        elif kind == "edit":
            actor = self.r.choice([other for other in self.actors.values() if other.source])
        elif kind.endswith(" relay"):
            relays = [other for other in self.actors.values() if other.role == "relay"]
            kind, actor = kind.split()[0], self.r.choice(relays or [actor])
        if actor.machine is not None:
            getattr(self, kind)(actor)
        self.after(self.r.expovariate(1 / 3.0), self.misfortune)

    def spared(self, actor):
        """A client that ends early makes a dull world: in a mix most of them go on."""
        return actor.role == "client" and self.wild and self.r.random() < 0.9

    def crash(self, actor):
        if self.spared(actor) or actor.role == "client" and not self.wild:
            return
        self.say(actor.name, "crashes")
        self.seen["crash " + actor.role] += 1
        if actor.role == "broker":
            self.forgotten.update(actor.machine.registry.clients)
        if actor.role == "client":
            actor.exited = 137
        self.stop(actor)
        longest = 2.0 if "crash broker" in self.faults else 5.0
        down = min(longest, self.r.choice([0.01, 1.0, 5.0]) * self.r.random())
        self.after(down, lambda: self.begin(actor))

    def terminate(self, actor):
        if actor.role == "worker" and not actor.plain:
            self.seen["terminate"] += 1
            self.do(actor, actor.generation, lambda m: m.stop(143, actor.clock(self.now)))
        elif actor.role == "relay" and actor.stream is not None:
            self.seen["terminate relay"] += 1
            self.do(actor, actor.generation, lambda m: actor.uplink.control("stop", 143))

    def interrupt(self, actor):
        if actor.role == "client" and not actor.plain and not self.spared(actor):
            self.seen["interrupt"] += 1
            self.do(actor, actor.generation, lambda m: m.cancel(130, actor.clock(self.now)))

    def break_stream(self, actor):
        """Now, or after so many bytes more."""
        if actor.owner is not None and actor.stream is not None:
            self.seen["break stream"] += 1
            if self.r.random() < 0.3:
                actor.stream.break_off()
            else:
                actor.stream.fuse = self.r.randint(1, 3000)

    def freeze_stream(self, actor):
        if actor.owner is not None and actor.stream is not None:
            self.seen["freeze stream"] += 1
            for way in self.r.choice([[0, 1], [0], [1]]):
                actor.stream.dead[way] = self.r.random() < 0.3
                actor.stream.last[way] = max(actor.stream.last[way],
                                             self.now + self.r.random() * 60)

    def cut_wire(self, actor):
        if actor.wire is not None:
            self.seen["cut"] += 1
            self.seen["relay cut"] += actor.role == "relay"
            self.say(actor.name, "is cut off")
            self.cut(actor.wire)

    def swallow(self, actor):
        if actor.wire is not None:
            self.say(actor.name, "speaks into the void")
            self.seen["swallow"] += 1
            actor.wire.swallow = self.r.choice([[True, True], [True, False], [False, True]])

    def freeze(self, actor):
        if actor.wire is not None:
            self.say(actor.name, "is cut off for a while, and then heard late")
            self.seen["freeze"] += 1
            for way in self.r.choice([[0, 1], [0], [1]]):
                actor.wire.last[way] = max(actor.wire.last[way], self.now + self.r.random() * 40)

    def load(self, actor):
        """Somebody works at a worker's machine, or has gone."""
        if actor.role == "worker" and not actor.plain:
            self.seen["load"] += 1
            load = self.r.choice([0.0, 9.0])
            self.do(actor, actor.generation, lambda m: (
                m.set_load(load, actor.clock(self.now)), m.settle()))

    def steal(self, actor):
        """Somebody who has a key of their own, and knows all names, says what only this one may."""
        if not self.keyed or actor.plain or actor.wants is None or actor.role == "relay" \
                or actor.wants[0].machine is None:
            return
        hub, link = actor.wants
        self.serial += 1
        peer, broker = b"thief%d" % self.serial, hub.machine
        if link == CLIENTS:
            known = broker.registry.clients.get(actor.machine.run)
            tasks = known and known.join and known.tasks.values()
            hello = tc.encode("HELLO", {"run": actor.machine.run, "join": 2**40})
        else:
            known = broker.registry.named.get(actor.machine.name)
            tasks = known and known.tasks.values()
            hello = tc.encode("READY", {"name": actor.machine.name, "join": 2**40})
        if not tasks:
            return
        self.seen["steal from a " + actor.role] += 1
        rows = [[task.id, task.attempt] for task in tasks]
        bad = {"id": rows[0][0], "attempt": rows[0][1]}
        words = [tc.encode(verb, fields) for verb, fields in (
            ("DONE", {"tasks": rows}), ("CANCEL", {"tasks": rows}), ("CANCEL", {}),
            ("FETCH", dict(bad, offset=0, size=1)), ("BYE", {})) if link == CLIENTS] + [
            tc.encode(verb, fields) for verb, fields in (
                ("RESULT", dict(bad, exitcode=0, stdout="forged")), ("BYE", {}),
                ("LOST", {"tasks": rows, "why": "forged"})) if link == WORKERS]
        run = next(iter(tasks)).client.run

        def say(token, line):
            def hear(machine):
                machine.identified(link, peer, "thief")
                machine.receive(link, peer, token, line, b"", hub.clock(self.now))
                assert peer not in machine.registry.run_of \
                    and peer not in machine.registry.workers, "a thief got in"
            self.do(hub, hub.generation, hear)
        say("", hello)
        for line in words:
            say(run, line)

    def edit(self, actor):
        """Somebody saves a file."""
        self.seen["edit"] += 1
        actor.source.edit()

    def pry(self, actor):
        """A worker asks for a tree of which it has no command."""
        if actor.role != "worker" or actor.plain:
            return
        for other in self.actors.values():
            tree = other.source and other.machine and other.machine.offer.tree
            for command in [*other.machine.window.values()][:3] if tree else ():
                key = (other.machine.run, command.id, command.attempt)
                if actor.machine.session.joined and (actor.name, actor.generation, key) \
                        not in self.had:
                    self.seen["pry"] += 1
                    actor.machine.say(BROKER, b"", key[0], "FETCH", {
                        "id": key[1], "attempt": key[2], "tree": tree.id, "offset": 0, "size": 10})

    def pause(self, actor):
        heard = "pause broker" not in self.faults  # else a broker below must hear it in between,
        if actor.paused_until > self.now - (0 if heard else 3):  # or will give it up
            return
        duration = self.r.choice([0.5, 5.0, 15.0, 35.0]) * self.r.random()
        if not heard:
            duration = min(duration, self.times.client_lease - 5)
        self.seen["pause " + actor.role] += 1
        began = actor.clock(self.now)
        actor.paused_until = self.now + duration
        generation = actor.generation
        self.say(actor.name, "is paused for", duration)

        def wake(machine):
            """As EventLoop.wait() does."""
            due, now = min(machine.deadline(), began + tc.MAX_POLL_TIME), actor.clock(self.now)
            if now > due + tc.MIN_PAUSE:
                self.seen["paused"] += 1
                machine.paused(now - due, now)

        def resume():
            if actor.generation != generation or actor.paused_until > self.now:
                return
            self.say(actor.name, "goes on")
            if duration > tc.LONG_PAUSE:
                actor.start_deadline = -math.inf  # until its loop has looked at the clock
            self.run_line(actor)
            inbox, actor.inbox = actor.inbox, []
            self.do(actor, generation, wake)
            self.tick(actor, generation)  # what has come meanwhile it has not read yet
            for then, function in inbox:
                self.do(actor, then, function)
            self.tick(actor, generation)
        self.after(duration, resume)

    def heal(self):
        """No more faults; what is dead is started again."""
        self.healed = True
        self.say("heals")
        self.shortage = 0
        for actor in self.actors.values():
            if actor.machine is None:
                self.begin(actor)
            elif actor.wire is not None and (self.adversary or any(actor.wire.swallow)):
                self.cut(actor.wire)
            if actor.role == "worker" and not actor.plain:
                self.do(actor, actor.generation, lambda m, a=actor: (
                    m.set_load(0.0, a.clock(self.now)), m.settle()))

    # --- the run

    def run(self):
        with mock.patch.multiple(tc, **self.limits):
            if self.faults:
                self.after(self.r.random() * 5, self.misfortune)
            self.at(SIM_HEAL, self.heal)
            clients = [actor for actor in self.actors.values() if actor.role == "client"]
            steps = 0
            while self.events and not all(c.exited is not None for c in clients):
                self.step()
                assert self.now < SIM_END, "not all was done in time: " + self.complaint()
                steps += 1
                assert steps < 300000, "too many events"
            for actor in clients:
                assert actor.exited is not None, f"{actor.name} is stuck"
            self.check_reports(clients)
            if self.looks_at_end:
                self.check_end()
        return self

    def step(self):
        self.now, _, function = heapq.heappop(self.events)
        function()

    def complaint(self):
        return "; ".join(f"{a.name}: {list(getattr(a.machine, 'window', ()))} unreported"
                         for a in self.actors.values()
                         if a.role == "client" and a.machine is not None)

    def check_reports(self, clients):
        self.seen["commands"] += len(self.reports)
        for actor in clients:
            missing = set(actor.commands) - set(self.reports)
            assert actor.exited > 1 or not missing, f"never reported: {missing}"

    def check_end(self):
        """With all clients gone, nothing is kept, nothing runs, and soon little happens."""
        self.run_until(self.now + SIM_QUIET - 50)
        before = self.deeds
        self.run_until(self.now + 50)
        members = [actor for actor in self.actors.values() if actor.machine is not None]
        busy = len(members) + 2 * sum(m.owner is not None for m in members)  # keepalives
        assert self.deeds - before < 50 * 3 * busy, "not idle at all"
        if self.adversary:
            return
        assert not self.live, f"still running: {list(self.live)}"
        assert not self.setups, f"still running: {list(self.setups)}"
        for actor in members:
            machine = actor.machine
            if actor.role == "worker":
                assert not machine.jobs, f"{actor.name} holds results"
                assert actor.plain or not machine.uses, f"{actor.name} keeps a workspace"
            elif actor.role == "broker":
                there = machine.registry
                for what in (there.clients, there.run_of, there.departed, there.away,
                             there.clients_seen, machine.scheduler.turns, machine.recovering,
                             machine.scheduler.prefetched, machine.scheduler.away,
                             machine.unconfirmed, machine.partial.parts, machine.upstream.unsent):
                    assert not what, f"{actor.name} remembers {what}"
                present = [m for m in members if m.wants == (actor, WORKERS) or m.owner is actor]
                assert len(there.workers) == len(there.workers_seen) == len(present), actor.name
                assert len(there.named) == sum(not m.plain for m in present), actor.name

    def run_until(self, end):
        while self.events and self.events[0][0] < end:
            self.step()
        self.now = end


class SimulationTest(unittest.TestCase):
    SEEDS = int(os.environ.get("SIM_SEEDS", "150"))
    FAILED_ONCE = [833129633]  # seeds of the mix of faults that found a bug
    ADVERSITY = ("crash", "cut_wire", "pause", "freeze")
    TREE_FAULTS = (*ADVERSITY, "swallow", "terminate", "interrupt", "edit", "edit", "pry")
    KINDS = ((None, False), (ADVERSITY, True), (("crash broker",), False),
             (("crash broker", "pause broker"), False), (("freeze", "pause"), False),
             (("interrupt", "crash", "cut_wire", "pause"), False),
             (TREE_FAULTS, False), ((*ADVERSITY, "edit"), True), (("pry",), False),
             (("edit", "crash broker", "pause broker"), False),
             (("edit", "break_stream", "freeze_stream"), False))  # of worlds

    def world(self, seed, faults=None, adversary=False):
        try:
            return World(seed, faults, adversary).run()
        except Exception as error:
            world = World(seed, faults, adversary, story=True)
            with contextlib.suppress(Exception):
                world.run()
            path = os.path.join(tempfile.gettempdir(), f"testcloud-story-{seed}.txt")
            with open(path, "w") as file:
                file.write("\n".join(world.story))
            raise AssertionError(f"seed {seed} {faults or ''} {adversary or ''}: "
                                 f"{type(error).__name__}: {error} (story in {path})") from error

    def worlds(self, faults, seeds, adversary=False):
        seen = Counter()
        for seed in seeds:
            seen.update(self.world(seed, faults, adversary).seen)
        return seen

    def assert_all_seen(self, seen, *things):
        self.assertEqual([thing for thing in things if not seen[thing]], [])

    def test_same_seed_same_story(self):
        for seed in range(5):
            one, two = World(seed).run(), World(seed).run()
            self.assertEqual(one.trace.hexdigest(), two.trace.hexdigest())

    def test_without_faults_every_command_starts_once(self):
        for seed in range(self.SEEDS // 5):
            world = self.world(seed, [])
            self.assertEqual(set(world.starts.values()), {1}, seed)

    def test_broker_restarts_run_nothing_twice(self):
        seen = Counter()
        for seed in range(self.SEEDS // 2):
            world = self.world(seed, ["crash broker"])
            twice = [key for key, n in world.starts.items() if n > 1]
            self.assertFalse(twice, f"seed {seed}")
            seen.update(world.seen)
        self.assertGreater(seen["crash broker"], self.SEEDS // 2)

    def test_broker_pauses_run_nothing_twice(self):
        for faults in (["pause broker"], ["pause broker", "crash broker"]):
            seen = Counter()
            for seed in range(self.SEEDS // 2):
                world = self.world(seed, faults)
                twice = [key for key, n in world.starts.items() if n > 1]
                self.assertFalse(twice, f"seed {seed} {faults}")
                seen.update(world.seen)
            self.assert_all_seen(seen, "paused", "pause broker")

    def test_all_faults(self):
        if os.environ.get("SIM_SEED"):
            seeds = [int(os.environ["SIM_SEED"])]
        else:
            fresh = random.randrange(10**9)
            seeds = self.FAILED_ONCE + [fresh + n for n in range(self.SEEDS)]
        seen = self.worlds(None, seeds)
        if len(seeds) > 100:
            self.assert_all_seen(
                seen, "crash broker", "crash worker", "crash client", "pause broker",
                "pause worker", "pause client", "paused", "cut",
                "swallow", "swallowed", "freeze", "late", "terminate", "interrupt", "reconnect",
                "restarted", "fetched", "timeout", "tried elsewhere", "not started", "poison",
                "looked into", "files", "fetched files", "load", "forgotten", "started elsewhere",
                "nowhere else to start",
                "OK taken for a command",
                "stale result", "held results announced", "steal from a worker",
                "steal from a client", *(set(tc.MESSAGES) - {"STATUS"}))

    def test_a_command_that_kills_its_workers_is_given_up(self):
        for faults in ([], ["crash broker"]):
            for seed in range(self.SEEDS // 5):
                world = World(seed, faults)
                for actor in world.actors.values():
                    actor.commands[:1] = [cmd + " poison" for cmd in actor.commands[:1]]
                world.run()
                poison = [n for cmd, n in world.starts.items() if cmd.endswith("poison")]
                # a broker may die with what it alone knew of a fault
                limit = world.times.crash_limit + world.seen["crash broker"]
                self.assertTrue(poison and max(poison) <= limit, f"seed {seed}: {poison}")

    def test_lines_that_come_twice_and_out_of_turn(self):
        seen = self.worlds(self.ADVERSITY, range(self.SEEDS // 5), adversary=True)
        self.assert_all_seen(seen, "twice or out of turn")

    # what could be broken in the program, as text to be replaced; each must make a world fail
    MUTANTS = (
        ("a lost command is not tried again",
         '            self.next_attempt(command, fields.get("worker", ""))\n',
         "            pass\n"),
        ("a reported command is not remembered", "        if command is None:  # reported before",
         "        if command is None and self.window:  # reported before"),
        ("a lost worker's commands are forgotten",
         "        for task in list(worker.tasks.values()):\n            self.lose(",
         "        for task in ():\n            self.lose("),
        ("a worker drops results that it has told",
         "            self.report_result(job)\n\n    def forget",
         "            self.report_result(job)\n            self.forget(job)\n\n    def forget"),
        ("a joining worker does not tell what it runs",
         'fields["running"] = [list(job.key) for job in live if job.state != DELIVERED]',
         'fields["running"] = []'),
        ("a joining client submits nothing again",
         "        for command in self.window.values():\n            self.submit(command)\n", ""),
        ("a worker runs again what it has", "        if key not in self.jobs:\n            job =",
         "        if True:\n            job ="),
        ("lost workers are not counted", "self.crashes += fault == CRASH", "pass"),
        ("what could not be started is not counted", "self.spawns += fault == SPAWN", "pass"),
        ("credit is not given back", "client.owed += cost - task.cost",
         "client.owed += max(0, cost - task.cost)"),
        ("slots of the lost are counted", "            self.slots -= worker.slots\n", ""),
        ("a choice of workers outlives them", "        self.slots_by_labels.clear()\n"
         "        self.places_by_host.clear()\n        self.eligible_for.clear()\n", ""),
        ("who once had no room never has", "            self.saturated = {full for full in "
         "self.saturated if worker not in full}\n", "            pass\n"),
        ("a provisional result is not reported",
         "        if constraints is None and command.rechecking:\n", "        if False:\n"),
        ("who waits for another host is never told that there is none",
         "        elif not task.client.from_above:\n", "        if not task.client.from_above:\n"),
        ("commands resubmitted to a new broker start at once", "            if self.now < until:"
         "\n                task.state = RECOVERING",
         "            if False:\n                pass"),
        ("silent clients are kept for ever",
         "            else:\n                self.forget_client("
         "client, silence)", "            else:\n"
         "                registry.see(registry.clients_seen, client, self.now)"),
        ("a lease lasts for ever", "return self.lease_began + LEASE_FRACTION * self.patience",
         "return math.inf"),
        ("what comes without a lease is not doubted",
         "            self.doubted_at = self.owner.now",
         "            pass"),
        ("any OK is a lease", "            self.lease_began = answered",
         "            self.lease_began = self.owner.now"),
        ("the silence of others while we were stopped counts",
         "                seen[who] = max(when + gap, grace - patience)", "                pass"),
        ("poison is never given up", "if self.crashes >= times.crash_limit:", "if False:"),
        ("a client ignores which attempt an answer is about",
         "        return command if command is not None and command.attempt == attempt else None",
         "        return command"),
    )

    def test_the_simulation_finds_what_is_broken(self):
        self.check_mutants(self.MUTANTS, self.fails)

    def check_mutants(self, mutants, fails):
        with open(SCRIPT) as file:
            source = file.read()
        for name, old, new in mutants:
            with self.subTest(name):
                self.assertEqual(source.count(old), 1, "the text to be replaced")
                mutant = types.ModuleType("testcloud")
                with mock.patch.dict(sys.modules, testcloud=mutant):
                    exec(compile(source.replace(old, new), SCRIPT, "exec"), mutant.__dict__)
                with mock.patch.dict(globals(), tc=mutant):
                    self.assertTrue(any(map(fails, range(300))), "no seed found it")

    def fails(self, seed):
        try:
            World(seed).run()
            World(seed, ["freeze"]).run()
            World(seed, ["freeze", "pause"]).run()
            World(seed, self.ADVERSITY, adversary=True).run()
            return any(set(World(seed, [kind]).run().starts.values()) != {1}
                       for kind in ("crash broker", "pause broker"))
        except Exception:
            return True

    STREAM_MUTANTS = (
        ("a broker does not hear of the end of a stream",
         "            self.machine.disconnected(WORKERS, self.peer, now)\n", "            pass\n"),
        ("a worker does not get another connection in place of a silent one",
         "            self.links[self.peer].control(\"connected\")\n", "            pass\n"),
        ("a relay does not pass on that it is connected",
         "        self.control(\"connected\")\n", "        pass\n"),
        ("a relay does not pass on whose key it has",
         "            link.control(\"key_changed\", ", "            str("),
        ("a silent stream goes on", "if self.silent_beats > MAX_SILENT_BEATS:", "if False:"),
        ("keepalives do not count", "        self.silent_beats = 0\n        for kind",
         "        for kind"),
        ("a record is taken from a part", "return len(self.buffer) >= total", "return True"),
    )

    def test_the_simulation_finds_what_is_broken_in_streams(self):
        self.check_mutants(self.STREAM_MUTANTS, self.fails_with_streams)

    def fails_with_streams(self, seed):
        try:
            for faults in ("freeze_stream", "cut_wire"):
                world = World(seed, ["break_stream", faults])
                world.looks_at_end = True
                world.run()
        except Exception:
            return True
        return False

    def test_streams(self):
        """Workers on hosts, whose streams break at any byte; a relay may be in between."""
        seen = Counter()
        for seed in range(self.SEEDS // 3):
            world = self.world(seed, ["break_stream"])
            again = {cmd for cmd, n in world.starts.items() if n > 1}
            self.assertLessEqual(again, world.endangered, seed)
            seen.update(world.seen)
            for faults in (
                    ("freeze_stream",),
                    ("freeze_stream", "crash", "pause", "cut_wire relay", "crash relay",
                     "pause relay", "terminate relay")):
                seen.update(self.world(seed, ["break_stream", *faults]).seen)
        self.assert_all_seen(
            seen, "lost stream", "silent stream", "lost in a dead stream",
            "broken within a record", "half a RESULT", "half a command", "restarted",
            "relay cut", "crash relay", "pause relay", "reconnect",
            "terminate relay")

    def test_trees(self):
        """Workers fetch the trees of clients, whose files may change meanwhile."""
        seen = Counter()
        for seed in range(self.SEEDS // 5):
            world = self.world(seed, ["pry"])
            self.assertLessEqual(set(world.starts.values()), {1}, seed)
            seen.update(world.seen)
            for faults in (["edit"], self.TREE_FAULTS):
                seen.update(self.world(seed, faults).seen)
        self.assert_all_seen(
            seen, "TreeFailed", "TreeUnknown", "TreeWrong", "changed while it was sent", "edit",
            "half a workspace", "known tree", "no host is fit", "pry", "second workspace",
            "setup failed", "setup passed", "CHUNK of a tree", "runs in a tree")

    def test_interrupted_clients(self):
        seen = self.worlds(["interrupt", "crash", "cut_wire", "pause"], range(self.SEEDS // 3))
        self.assert_all_seen(seen, "interrupt")


# === Worker ===========================================================================


class Bench:
    """A worker or client on its own; the tests speak for its broker."""

    def __init__(self, machine):
        self.machine = machine
        self.now = 0.0
        self.lines = []
        self.effects = []
        self.bulk = []
        machine.connected(BROKER, self.now)
        self.collect()

    def collect(self):
        self.machine.settle()  # after started() and finished()
        if isinstance(self.machine, tc.Client):
            check_client(self.machine)
        frames, effects = self.machine.take()
        for frame in frames:
            if frame.data:
                self.bulk.append(frame)
                continue
            for line in frame.body.split(b"\n"):
                self.lines.append((frame.token, *tc.decode(line)))
        self.effects += [effect for effect in effects if not isinstance(effect, tc.Log)]

    def hear(self, line, token="", data=b""):
        line = line if isinstance(line, bytes) else line.encode()
        self.machine.receive(BROKER, b"", token, line, data, self.now)
        self.collect()

    def wait(self, seconds):
        end = self.now + seconds
        while self.now < end:
            self.now = max(self.now, min(end, self.machine.deadline()))
            self.machine.tick(self.now)
            self.collect()
            if any(isinstance(effect, tc.Exit) for effect in self.effects):
                return
            assert self.machine.deadline() > self.now, "it spins"

    def expect(self, verb, **fields):
        _, got_verb, got = self.lines.pop(0)
        assert got_verb == verb, f"{got_verb} {got} instead of {verb}"
        for name, value in fields.items():
            assert got.get(name) == value, f"{name}: {got}"
        return got

    def answer(self, number=None, **fields):
        """The broker says OK to our last greeting, or to that number."""
        session = self.machine.session
        self.hear(tc.encode("OK", dict(
            {"beat" if session.joined else "join": number or session.number}, **fields)))

    def effect(self, kind):
        found = self.effects.pop(0)
        assert isinstance(found, kind), found
        return found

    def quiet_but(self, *verbs):
        """Nothing was said but these, and nothing is to be done; forget them."""
        assert {verb for _, verb, _ in self.lines} <= set(verbs), self.lines
        self.lines.clear()
        self.quiet()

    def quiet_until_start(self):
        self.effect(tc.Start)
        self.quiet()

    def may_start(self):
        return self.now < self.machine.start_deadline()

    def begin(self, job, when=None):
        """The Runner has started it."""
        self.machine.started(job, self.now if when is None else when, self.now)
        self.collect()

    def handed_back(self, job):
        """The Runner hands it back: it had not been started."""
        self.machine.finished(job, tc.requeued(tc.RECALLED), self.now)
        self.collect()

    def quiet(self):
        assert not self.lines and not self.effects, (self.lines, self.effects)


class WorkerTest(unittest.TestCase):
    def setUp(self):
        self.worker = tc.Worker("w1", slots=2, weight=3, host="h")
        self.bench = b = Bench(self.worker)
        b.expect("READY", name="w1", slots=2, weight=3, running=[], held=[], join=1)
        b.hear('OK {"join":1}')

    def give(self, id, attempt=1, **more):
        self.bench.hear(tc.encode("{", dict({"id": id, "attempt": attempt, "cmd": f"c{id}"},
                                            **more)), "r")
        self.bench.wait(tc.REPORT_DELAY)

    def test_a_note_of_the_broker_is_for_the_person_who_started_it(self):
        worker = tc.Worker("w1", slots=2, user="user 7")
        b = Bench(worker)
        b.expect("READY", user="user 7")
        b.answer(note="stop\nit")
        self.assertEqual(b.effect(tc.Notice).text, "notice: stop\\nit")
        b.quiet()

    def test_runs_a_command_and_holds_its_result_until_done(self):
        b = self.bench
        self.give(1, cwd="/x")
        b.expect("QUEUED", tasks=[[1, 1]])
        job = b.effect(tc.Start).job
        self.assertEqual((job.cmd, job.cwd), ("c1", "/x"))
        self.worker.finished(job, exit_record(3, b"out"), 1.0)
        b.collect()
        b.expect("RESULT", id=1, attempt=1, exitcode=3, stdout="out", time=1.5, size=3, host="h",
                 worker="w1")
        b.hear('RESEND {"tasks":[[1,1]]}', "r")
        b.expect("RESULT", id=1)
        b.hear('DONE {"tasks":[[1,1]]}', "r")
        b.quiet()
        self.assertFalse(self.worker.jobs)

    def test_live_output_goes_to_a_client_that_asks_for_it(self):
        b = self.bench
        self.give(1)
        b.expect("QUEUED")
        job = b.effect(tc.Start).job
        b.hear('FETCH {"id":1,"attempt":1,"offset":0,"size":9}', "r")
        b.quiet()
        job.output = tc.Output()
        self.worker.printed(job, b.now)
        b.collect()
        self.assertFalse(b.bulk)
        job.output.write(b"abc")
        self.worker.printed(job, b.now)
        b.collect()
        self.assertEqual(b.bulk.pop().data, b"abc")
        job.output.write(b"de")
        self.worker.printed(job, b.now)
        b.collect()
        self.assertFalse(b.bulk)  # that was not asked for
        b.hear('FETCH {"id":1,"attempt":1,"offset":3,"size":9}', "r")
        self.assertEqual((b.bulk[0].data, tc.decode(b.bulk[0].body)[1]["offset"]), (b"de", 3))

    def test_a_busy_machine_takes_nothing_more(self):
        self.worker.max_load = 4.0
        b = self.bench
        for id in (1, 2):
            self.give(id)
            b.expect("QUEUED")
        running, waiting = (b.effect(tc.Start).job for _ in range(2))
        self.worker.started(running, b.now, b.now)
        self.worker.set_load(3.9, b.now)
        b.collect()
        b.quiet()
        self.worker.set_load(4.0, b.now)
        b.collect()
        b.expect("READY", slots=0, load=4.0)
        self.assertEqual(b.effect(tc.Recall).job, waiting)
        self.worker.set_load(9.0, b.now)
        b.collect()
        b.quiet()
        for load in (3.9, 4.1, 3.7):  # about the limit, all the time
            self.worker.set_load(load, b.now)
            b.collect()
            b.quiet()
        self.worker.set_load(3.5, b.now)
        b.collect()
        b.expect("READY", slots=2, load=3.5)

    def test_a_command_may_name_its_shell(self):
        for more, shell in (({"shell": "bash"}, "bash"), ({}, "/bin/sh"),
                            ({"shell": ""}, "/bin/sh")):
            self.setUp()
            self.give(1, **more)
            self.assertEqual(self.bench.effect(tc.Start).job.shell, shell)

    def test_accepts_more_than_its_slots(self):
        b = self.bench
        for id in (1, 2, 3):
            self.give(id)
            b.expect("QUEUED")
        self.assertEqual([b.effect(tc.Start).job.cmd for _ in range(3)], ["c1", "c2", "c3"])
        b.quiet()

    def test_the_same_command_twice_is_run_once(self):
        b = self.bench
        self.give(1)
        self.give(1)
        b.expect("QUEUED")
        b.expect("QUEUED")
        b.effect(tc.Start)
        b.quiet()

    def test_queued_waits_a_moment_for_company(self):
        b = self.bench
        for id in (1, 2):
            b.hear(b'{"id":%d,"attempt":1,"cmd":"c"}' % id, "r")
        jobs = [b.effect(tc.Start).job, b.effect(tc.Start).job]
        b.quiet()
        self.worker.finished(jobs[0], exit_record(), b.now)
        b.collect()
        b.expect("QUEUED", tasks=[[1, 1], [2, 1]])
        b.expect("RESULT", id=1)
        b.hear('{"id":3,"attempt":1,"cmd":"c"}', "r")
        b.quiet_until_start()
        b.wait(tc.REPORT_DELAY)
        b.expect("QUEUED", tasks=[[3, 1]])
        b.hear('{"id":4,"attempt":1,"cmd":"c"}', "r")
        b.quiet_until_start()
        self.worker.disconnected(BROKER, b"", b.now)
        self.worker.connected(BROKER, b.now)
        b.collect()
        b.expect("READY", running=[["r", 2, 1], ["r", 3, 1], ["r", 4, 1]], held=[["r", 1, 1]])
        b.wait(tc.REPORT_DELAY)
        b.quiet()

    def test_without_an_answer_of_the_broker_in_time_nothing_is_started(self):
        b = self.bench
        b.wait(2.0)
        b.expect("READY")
        b.answer(patience=6)  # so the lease ends at 2 + 4
        b.wait(2.0)
        self.give(1)
        self.assertEqual(self.worker.start_deadline(), 6.0)
        b.wait(6.0 - b.now)
        self.assertFalse(b.may_start())
        b.answer(self.worker.session.number)  # to the greeting at 6
        self.assertEqual(self.worker.start_deadline(), 10.0)

    def test_a_lease_begins_with_the_greeting_that_is_answered(self):
        """Not with one sent later, although its answer has not come either."""
        b = self.bench
        b.answer(patience=12)  # a lease of 8
        b.wait(7.0)
        b.answer(2)  # of 2.0
        b.wait(2.0)
        b.answer(3)  # of 4.0: until 12.0
        b.wait(3.5)
        self.give(1)
        for number in (4, self.worker.session.number):  # of 6.0 and 12.0: before the command came
            b.answer(number)
            self.assertFalse(b.may_start())
        b.wait(2.0)
        b.answer()
        self.assertTrue(b.may_start())

    def test_a_command_that_comes_late_waits_for_the_answer_to_a_later_greeting(self):
        b = self.bench
        b.answer(patience=6)
        b.wait(7.0)
        self.give(1)
        b.answer()  # to a greeting sent before it came
        self.assertFalse(b.may_start())
        b.wait(2.0)
        b.answer()
        self.assertTrue(b.may_start())

    def test_what_is_cancelled_while_it_joins_is_taken_back_before_anything_is_started(self):
        b = self.bench
        for id in (1, 2, 3):
            self.give(id)
        jobs = [b.effect(tc.Start).job for _ in range(3)]
        b.hear("WHO")
        self.assertFalse(b.may_start())
        self.worker.finished(jobs[0], exit_record(), b.now)
        b.hear('CANCEL {"tasks":[[3,1]]}', "r")
        self.assertFalse(b.may_start())
        self.assertEqual(b.effect(tc.Kill), tc.Kill(jobs[2], False))
        b.lines.clear()
        b.hear('OK {"join":2}')
        self.assertTrue(b.may_start())
        b.expect("RESULT", id=1)
        b.handed_back(jobs[2])
        b.expect("LOST", tasks=[[3, 1]], why="cancelled")
        b.quiet()

    def test_an_output_that_cannot_be_read_fails_its_command_and_nothing_else(self):
        b = self.bench
        self.give(1)
        job = b.effect(tc.Start).job
        how = exit_record(0, b"x" * (tc.INLINE + 1))
        how.output.read = mock.Mock(side_effect=OSError(5, "Input/output error"))
        self.worker.finished(job, how, b.now)
        b.collect()
        b.quiet_but("QUEUED", "RESULT")
        b.hear('FETCH {"id":1,"attempt":1,"offset":0,"size":9}', "r")
        b.expect("RESULT", exitcode=tc.NOT_RUN, size=0,
                 reason="its output cannot be read on the worker: Input/output error")
        b.quiet()
        self.assertIsNone(how.output.data)
        self.give(2, cut=7)  # a plain client's, who cannot fetch
        how = exit_record(0, b"x" * (tc.INLINE + 1))
        how.output.read = mock.Mock(side_effect=OSError(5, "Input/output error"))
        self.worker.finished(b.effect(tc.Start).job, how, b.now)
        b.wait(tc.REPORT_DELAY)
        b.expect("QUEUED")
        b.expect("RESULT", id=2, exitcode=tc.NOT_RUN, stdout="")

    def test_recall_hands_back_what_has_not_been_started(self):
        b = self.bench
        for id in (1, 2, 3):
            self.give(id)
        jobs = [b.effect(tc.Start).job for _ in range(3)]
        b.begin(jobs[0])
        b.lines.clear()
        b.hear('RECALL {"tasks":[[1,1],[2,1],[3,1],[9,1]]}', "r")
        self.assertEqual([b.effect(tc.Recall).job for _ in range(2)], jobs[1:])
        b.begin(jobs[1])  # we were not told in time
        b.quiet()
        b.handed_back(jobs[2])
        b.expect("LOST", tasks=[[3, 1]], fault="", why=tc.RECALLED)
        b.quiet()

    def test_cancel_of_what_has_not_been_started(self):
        b = self.bench
        self.give(1)
        job = b.effect(tc.Start).job
        b.lines.clear()
        b.hear("CANCEL", "r")
        b.hear("CANCEL", "r")
        b.hear('RECALL {"tasks":[[1,1]]}', "r")
        self.assertEqual(b.effect(tc.Kill), tc.Kill(job, False))
        b.handed_back(job)
        b.expect("LOST", tasks=[[1, 1]], why="cancelled", fault="")
        b.quiet()
        self.assertFalse(self.worker.jobs or self.worker.kill_at)

    def test_cancel_kills_first_gently_then_hard_and_ends_with_lost(self):
        b = self.bench
        self.give(1)
        job = b.effect(tc.Start).job
        b.lines.clear()
        b.hear("CANCEL", "r")
        self.assertEqual(b.effect(tc.Kill), tc.Kill(job, False))
        b.wait(1.9)
        self.assertFalse(b.effects)
        b.wait(0.2)
        self.assertEqual(b.effect(tc.Kill), tc.Kill(job, True))
        b.lines.clear()
        self.worker.finished(job, exit_record(143), b.now)
        b.collect()
        b.expect("LOST", tasks=[[1, 1]])
        b.quiet()
        self.assertFalse(self.worker.jobs)

    def test_ready_at_quiet_times_and_a_new_socket_when_ok_stays_away(self):
        b = self.bench
        b.wait(2.0)
        b.expect("READY", name="w1", join=None, beat=2)
        b.answer()
        for _ in range(5):
            b.wait(2.0)
            b.expect("READY", join=None)
        self.assertIn("does not answer", b.effect(tc.Notice).text)
        b.wait(2.0)
        b.effect(tc.Reconnect)
        self.assertFalse(b.lines)
        self.worker.connected(BROKER, b.now)
        b.collect()
        b.expect("READY", join=8)
        b.effects.clear()
        b.answer(7)
        b.hear('OK {"beat":8}')
        self.assertFalse(self.worker.session.joined)
        b.answer()
        self.assertTrue(self.worker.session.joined)

    def test_it_speaks_as_often_as_the_broker_needs(self):
        b = self.bench
        b.hear('OK {"patience":0.9}')
        for _ in range(2):
            b.wait(0.9 * tc.GREETING_FRACTION - 0.01)
            self.assertEqual(b.lines, [])
            b.wait(0.01)
            b.expect("READY")

    def test_however_impatient_it_joins_a_broker_that_is_slow_to_answer(self):
        """The answer to one try comes when the next has been sent, and is void."""
        for interval, delay in ((0.001, 0.12), (0.2, 0.5), (2.0, 5.0)):
            b = Bench(tc.Worker("w1", 2, times=tc.Times(ready_interval=interval)))
            answers = []
            while not b.machine.session.joined:
                self.assertLess(b.now, 40 * max(interval, tc.OK_DELAY), (interval, delay))
                self.assertNotIn(tc.Reconnect, map(type, b.effects))
                answers += [(b.now + delay, fields["join"]) for _, _, fields in b.lines]
                b.lines.clear()
                b.wait(min(interval, delay) / 4)
                while answers and answers[0][0] <= b.now:
                    b.hear(tc.encode("OK", {"join": answers.pop(0)[1]}))

    def test_a_paused_worker_starts_nothing_until_it_has_joined_again(self):
        b = self.bench
        b.answer(patience=6)
        self.give(1)
        b.now = 0.6
        self.assertTrue(b.may_start())
        self.worker.paused(0.6, b.now)
        b.collect()
        self.assertFalse(b.may_start())
        b.answer()
        self.assertTrue(b.may_start())

    def test_a_paused_worker_joins_again_before_it_takes_more_commands(self):
        """The broker may have given those that wait in the socket to others."""
        for machine in (tc.Worker("w1", 2), tc.Broker("b1", chained=True)):
            b = Bench(machine)
            b.hear('OK {"join":1,"above":["b0"],"patience":6}')
            b.hear('{"cmd":"true","id":1,"attempt":1}', "r1")
            b.wait(tc.REPORT_DELAY)
            b.lines.clear()
            b.effects.clear()
            machine.paused(0.4, 0.4)  # too short for anything
            b.collect()
            b.quiet()
            machine.paused(0.6, 1.0)  # in our lease, but our connection may be lost
            b.collect()
            b.expect("READY", join=2)
            b.hear('OK {"join":2}')
            b.lines.clear()
            machine.paused(20.0, 20.0)
            b.hear('{"cmd":"true","id":2,"attempt":1}', "r1")
            b.expect("READY", join=3, running=[["r1", 1, 1]])
            b.quiet()

    def test_a_command_of_a_run_without_a_proper_name_is_refused(self):
        """It could not be announced: a broker would not understand our READY."""
        worker = tc.Worker("w1", 2)
        for machine, join in ((worker, {}), (tc.Broker("b1", chained=True), {"above": ["b0"]})):
            b = Bench(machine)
            b.hear(tc.encode("OK", {"join": 1, **join}))
            b.lines.clear()
            for token in ("", "\udcff", "x" * 201):
                b.hear('{"cmd":"true","id":1,"attempt":1}', token)
                b.expect("ERROR")
            b.quiet()

    def test_an_output_may_be_read_while_it_grows_out_of_memory(self):
        class Growing(tc.Output):
            grow = place = None

            @property
            def file(self):
                was, grow, self.grow = self.place, self.grow, None
                if grow:
                    grow()
                return was

            @file.setter
            def file(self, file):
                self.place = file

        output = Growing()
        self.addCleanup(output.close)
        output.write(b"abc")
        output.grow = lambda: output.write(b"d" * tc.INLINE)
        self.assertEqual(output.read(1, 2), b"bc")
        self.assertEqual(output.read(1, 3), b"bcd")

    def test_an_output_that_moves_into_a_file_can_be_read_at_each_moment(self):
        test, moves = self, []

        class Watched(tc.Output):
            def __setattr__(self, name, value):
                super().__setattr__(name, value)
                if name in ("head", "file") and getattr(self, "size", 0):
                    test.assertEqual(self.read(0, 3), b"abc")
                    moves.append(name)

        output = Watched()
        self.addCleanup(output.close)
        output.write(b"abc")
        output.write(b"d" * tc.INLINE)
        self.assertEqual(set(moves), {"head", "file"})

    def test_after_a_full_disk_nothing_more_is_stored(self):
        output = tc.Output()
        self.addCleanup(output.close)
        output.write(b"a" * tc.INLINE)
        with mock.patch.object(tc, "write_all", side_effect=OSError(28, "No space left on device")):
            output.write(b"b")
        output.write(b"c")  # there is room again
        self.assertEqual((output.failure, output.size), ("No space left on device", tc.INLINE))

    def test_files_follow_the_output_in_the_result_or_in_chunks(self):
        b = self.bench
        for id, (output, file) in enumerate(((b"out", b"\xff file"), (b"out", b"f" * tc.INLINE),
                                             (b"o" * (tc.INLINE + 1), b"f"), (b"", b"")), 1):
            self.give(id, **{"return": ["f", "gone"]})
            job = b.effect(tc.Start).job
            self.assertEqual(job.returns, ["f", "gone"])
            b.lines.clear()
            rows, whole = [[0o640, len(file)], []], FakeOutput(output, file)
            self.worker.finished(job, exit_record()._replace(output=whole, returned=rows), b.now)
            b.collect()
            inline = output + file if len(output + file) <= tc.INLINE else output
            told = None if len(output) > tc.INLINE else tc.to_text(inline)
            result = b.expect("RESULT", size=len(output), returned=rows, stdout=told)
            self.assertEqual(tc.stream_size(result), len(output + file))
            fetch = {"id": id, "attempt": 1, "offset": len(output), "size": 10}
            b.hear(tc.encode("FETCH", fetch), "r")
            self.assertEqual([frame.data for frame in b.bulk], [file[:10]] if file else [])
            b.bulk.clear()

    def test_a_file_that_finds_no_room_leaves_the_output_as_it_is(self):
        room, write_all = 2 * tc.INLINE, tc.write_all

        def limited(file, data, offset):
            if offset + len(data) > room:
                raise OSError(28, "No space left on device")
            write_all(file, data, offset)
        for before in (b"output", b"o" * (tc.INLINE + 1)):
            output = tc.Output()
            self.addCleanup(output.close)
            output.write(before)
            size = len(before)
            with tempfile.TemporaryFile() as file, mock.patch.object(tc, "CHUNK_SIZE", 1000), \
                    mock.patch.object(tc, "write_all", limited):
                file.write(b"f" * room)
                file.flush()
                os.lseek(file.fileno(), 0, 0)
                with self.assertRaises(OSError):
                    output.append_file(file.fileno(), room, lambda: True)
                self.assertEqual((output.size, output.total, output.failure), (size, size, ""))
                self.assertEqual(output.read(0, room), before)
                if output.file:  # the others get the room
                    self.assertEqual(os.fstat(output.file.fileno()).st_size, size)
                os.lseek(file.fileno(), 0, 0)
                self.assertEqual(output.append_file(file.fileno(), 100, lambda: True), 100)
                self.assertEqual(output.append_file(file.fileno(), 100, lambda: False), 0)
                self.assertEqual(output.read(0, room), before + b"f" * 100)

    def test_what_a_client_sees_live_is_output_only(self):
        b = self.bench
        self.give(1)
        job = b.effect(tc.Start).job
        b.begin(job)
        job.output = tc.Output()
        self.addCleanup(job.output.close)
        b.hear('FETCH {"id":1,"attempt":1,"offset":0,"size":99}', "r")
        job.output.write(b"shown")
        job.output.append(b"file")
        self.worker.printed(job, b.now)
        b.collect()
        self.assertEqual([frame.data for frame in b.bulk], [b"shown"])

    def test_odd_fetches_do_no_harm(self):
        b = self.bench
        self.give(1)
        self.give(2, cut=2**50)
        output = tc.Output()
        output.write(b"x" * (tc.INLINE + 1))
        job, other = b.effect(tc.Start).job, b.effect(tc.Start).job
        b.lines.clear()
        self.worker.finished(job, exit_record(0)._replace(output=output), 1.0)
        self.worker.finished(other, exit_record(0, b"\0" * tc.PLAIN_INLINE * 2), 1.0)
        self.worker.settle()
        frames, _ = self.worker.take()
        self.assertLess(max(len(frame.body) for frame in frames), tc.MAX_FRAME)
        for offset in (tc.INLINE + 1, 2**44, 2**53):
            b.hear(f'FETCH {{"id":1,"attempt":1,"offset":{offset},"size":10}}', "r")
        self.assertFalse(b.bulk)
        fetch = b'FETCH {"id":1,"attempt":1,"offset":0,"size":70000}'
        b.hear(b"\n".join([fetch] * (tc.MAX_BULK + 100)), "r")
        self.assertEqual(len(b.bulk), tc.MAX_BULK)
        output.close()

    def test_while_joining_commands_are_not_accepted(self):
        b = self.bench
        b.hear("WHO")
        b.expect("READY", join=2)
        self.give(1)
        b.quiet()
        b.hear('OK {"join":2}')
        self.give(1)
        b.expect("QUEUED")

    def test_what_ends_while_there_is_no_broker_is_told_later(self):
        b = self.bench
        self.give(1)
        self.give(2)
        jobs = [b.effect(tc.Start).job, b.effect(tc.Start).job]
        b.lines.clear()
        self.worker.disconnected(BROKER, b"", b.now)
        self.worker.finished(jobs[0], exit_record(), b.now)
        self.worker.connected(BROKER, b.now)
        b.collect()
        b.expect("READY", join=2, running=[["r", 2, 1]], held=[["r", 1, 1]])
        self.worker.finished(jobs[1], exit_record(), b.now)
        b.collect()
        b.quiet()
        b.hear('OK {"join":2}')
        b.expect("RESULT", id=2)
        b.quiet()

    def test_large_output_is_fetched(self):
        b = self.bench
        data = bytes(range(256)) * 1000
        self.give(1)
        job = b.effect(tc.Start).job
        b.lines.clear()
        self.worker.finished(job, exit_record(0, data), 1.0)
        b.collect()
        result = b.expect("RESULT", size=len(data))
        self.assertNotIn("stdout", result)
        b.hear('FETCH {"id":1,"attempt":1,"offset":100,"size":5000}', "r")
        self.assertEqual(b.bulk[0].data, data[100:5100])
        b.hear('FETCH {"id":9,"attempt":1,"offset":100,"size":5000}', "r")
        b.expect("LOST", tasks=[[9, 1]])

    def test_plain_clients_get_a_cut_output_inline(self):
        b = self.bench
        self.give(1, cut=100)
        job = b.effect(tc.Start).job
        b.lines.clear()
        self.worker.finished(job, exit_record(0, b"x" * 1000), 1.0)
        b.collect()
        b.expect("RESULT", size=1000, stdout="x" * 100)

    def test_a_command_that_runs_too_long_is_stopped_and_failed(self):
        b = self.bench
        self.give(1, timeout=30)
        self.give(2, timeout=50)
        self.give(3, timeout=1)  # waits for a slot
        b.lines.clear()
        job = b.effect(tc.Start).job
        b.wait(1.0)
        b.begin(job, 0.5)
        b.begin(b.effect(tc.Start).job)
        b.effect(tc.Start)
        for _ in range(28):
            b.wait(1.0)
            b.hear("OK")
        b.wait(1.4)
        self.assertFalse(b.effects)
        b.wait(0.2)
        self.assertEqual(b.effect(tc.Kill), tc.Kill(job, False))
        b.wait(2.0)
        self.assertEqual(b.effect(tc.Kill), tc.Kill(job, True))
        b.lines.clear()
        self.worker.finished(job, exit_record(137, b"so far", signal=9, time=31_999), b.now)
        b.collect()
        got = b.expect("RESULT", id=1, exitcode=tc.TIMED_OUT, signal=None, stdout="so far")
        self.assertIn("after 30 seconds", got["reason"])

    def test_a_command_that_ended_just_before_its_timeout_has_not_timed_out(self):
        """Although we hear of it after that."""
        b = self.bench
        self.give(1, timeout=1)
        job = b.effect(tc.Start).job
        b.begin(job)
        b.wait(1.0)
        b.effect(tc.Kill)
        b.lines.clear()
        self.worker.finished(job, exit_record(3, b"out", time=999.9), b.now)
        b.collect()
        b.expect("RESULT", id=1, exitcode=3, reason=None)

    def test_a_timed_out_command_that_is_cancelled_is_lost(self):
        b = self.bench
        self.give(1, timeout=3)
        job = b.effect(tc.Start).job
        b.begin(job)
        b.wait(3.1)
        b.effect(tc.Kill)
        b.hear('CANCEL {"tasks":[[1,1]]}', "r")
        b.lines.clear()
        self.worker.finished(job, exit_record(143), b.now)
        b.collect()
        b.expect("LOST", tasks=[[1, 1]], why="cancelled")
        b.quiet()

    def test_the_earliest_time_to_kill_counts(self):
        """A timeout comes after the drain, before it, or when the command is being killed."""
        for timeout, drain, killed_at in ((100, 5.0, 5.0), (3, 50.0, 3.0)):
            worker = tc.Worker("w1", slots=2, drain=drain, times=tc.Times(ready_interval=1e6))
            b = Bench(worker)
            b.hear('OK {"join":1}')
            for id in (1, 2):
                b.hear(tc.encode("{", {"id": id, "attempt": 1, "cmd": "c", "timeout": timeout}),
                       "r")
            before, after = (b.effect(tc.Start).job for _ in range(2))
            b.begin(before)
            worker.stop(143, b.now)
            b.begin(after)  # the Runner started it before it heard of the end
            b.wait(killed_at - 0.1)
            self.assertEqual(b.effects, [tc.Recall(after)])
            b.effects.clear()
            b.wait(0.2)
            self.assertEqual(b.effects, [tc.Kill(before, False), tc.Kill(after, False)])

    def test_a_timeout_does_not_change_when_a_cancelled_command_is_killed(self):
        for timeout in (1, 100):
            self.setUp()
            b = self.bench
            self.give(1, timeout=timeout)
            job = b.effect(tc.Start).job
            b.hear("CANCEL", "r")
            b.effect(tc.Kill)
            b.begin(job)
            grace = self.worker.times.kill_grace
            b.wait(grace - tc.REPORT_DELAY - 0.1)
            self.assertEqual(b.effects, [])
            b.wait(0.2)
            self.assertEqual(b.effects, [tc.Kill(job, True)])

    def test_a_stopped_drain_does_not_put_off_the_kill_of_a_cancelled_command(self):
        worker = tc.Worker("w1", slots=2, drain=50.0)
        b = Bench(worker)
        b.hear('OK {"join":1}')
        b.hear('{"id":1,"attempt":1,"cmd":"c"}', "r")
        job = b.effect(tc.Start).job
        b.begin(job)
        b.hear("CANCEL", "r")
        b.effect(tc.Kill)
        worker.stop(143, b.now)
        b.wait(worker.times.kill_grace)
        self.assertEqual(b.effects, [tc.Kill(job, True)])

    def test_a_stopped_worker_waits_until_its_results_are_fetched(self):
        for patience, taken in ((1.0, True), (100.0, False)):
            self.setUp()
            b = self.bench
            self.give(1)
            self.worker.finished(b.effect(tc.Start).job, exit_record(0, b"x" * (tc.INLINE + 1)),
                                 b.now)
            b.collect()
            self.worker.stop(143, b.now)
            b.collect()
            b.quiet_but("QUEUED", "RESULT", "READY")
            b.wait(min(patience, 2 * self.worker.times.kill_grace - 0.1))
            b.lines = [row for row in b.lines if row[1] != "READY"]
            b.quiet()
            if taken:
                b.hear('FETCH {"id":1,"attempt":1,"offset":0,"size":9}', "r")
                self.assertEqual(b.bulk.pop().data, b"x" * 9)
                b.quiet()
                b.hear('DONE {"tasks":[[1,1]]}', "r")
            else:
                b.wait(0.2)
            self.assertEqual(b.lines.pop()[1], "BYE")
            self.assertEqual(b.effect(tc.Exit).status, 143)

    def test_lines_about_another_attempt_change_nothing(self):
        b = self.bench
        self.give(1, attempt=2)
        self.give(2, attempt=2)
        waiting, ended = (b.effect(tc.Start).job for _ in range(2))
        self.worker.finished(ended, exit_record(0, b"out"), b.now)
        b.collect()
        b.quiet_but("QUEUED", "RESULT")
        for attempt in (1, 3):
            for verb in ("CANCEL", "RECALL", "DONE"):
                b.hear(f'{verb} {{"tasks":[[1,{attempt}],[2,{attempt}]]}}', "r")
                b.quiet()
            b.hear(f'RESEND {{"tasks":[[1,{attempt}]]}}', "r")
            b.expect("LOST", tasks=[[1, attempt]])
            for id in (1, 2):
                b.hear(f'FETCH {{"id":{id},"attempt":{attempt},"offset":0,"size":9}}', "r")
                b.expect("LOST", tasks=[[id, attempt]])
        self.assertFalse(b.bulk)
        self.assertEqual(list(self.worker.jobs.values()), [waiting, ended])
        self.assertFalse(waiting.killed or waiting.cancelled)

    def test_a_stopped_worker_gives_its_commands_time_to_drain(self):
        worker = tc.Worker("w1", slots=2, drain=20.0)
        b = Bench(worker)
        b.hear('OK {"join":1}')
        for id in (1, 2, 3):
            b.hear(tc.encode("{", {"id": id, "attempt": 1, "cmd": "c"}), "run")
        jobs = [b.effect(tc.Start).job for _ in range(3)]
        b.begin(jobs[0])
        b.wait(tc.REPORT_DELAY)
        b.lines.clear()
        worker.stop(143, b.now)
        b.collect()
        b.expect("READY", slots=0)
        self.assertEqual([b.effect(tc.Recall).job for _ in range(2)], jobs[1:])
        b.handed_back(jobs[2])
        b.expect("LOST", tasks=[[3, 1]], why=tc.RECALLED)
        worker.finished(jobs[0], exit_record(0), b.now)
        b.collect()
        b.expect("RESULT", id=1, exitcode=0)
        b.hear('DONE {"tasks":[[1,1]]}', "run")
        for _ in range(19):
            b.wait(1.0)
            b.hear("OK")
        self.assertFalse(b.effects)
        b.wait(1.1)
        b.effect(tc.Kill)
        b.lines.clear()
        worker.finished(jobs[1], exit_record(143), b.now)
        b.collect()
        b.expect("LOST", tasks=[[2, 1]], why=tc.WORKER_STOPPED)
        b.expect("BYE")
        self.assertEqual(b.effect(tc.Exit).status, 143)

    def test_what_could_not_be_started_for_want_of_something_is_handed_back(self):
        b = self.bench
        self.give(1)
        b.lines.clear()
        job = b.effect(tc.Start).job
        self.worker.finished(job, exit_record(126, reason="no room", requeue=True), b.now)
        b.collect()
        b.expect("LOST", tasks=[[1, 1]], why="no room", fault=tc.SPAWN)
        b.quiet()

    def test_stop_hands_back_what_has_not_started_and_leaves(self):
        b = self.bench
        for id in (1, 2, 3):
            self.give(id)
        b.lines.clear()
        jobs = [b.effect(tc.Start).job for _ in range(3)]
        self.worker.stop(143, b.now)
        b.collect()
        b.expect("READY", slots=0)
        self.assertEqual([b.effect(tc.Kill).job for _ in range(3)], jobs)
        b.handed_back(jobs[2])
        b.expect("LOST", tasks=[[3, 1]], why=tc.WORKER_STOPPED)
        for job in jobs[:2]:
            self.worker.finished(job, exit_record(143), b.now)
        b.collect()
        self.assertEqual([verb for _, verb, _ in b.lines], ["LOST", "LOST", "BYE"])
        self.assertEqual(b.effect(tc.Exit).status, 143)

    def test_a_stopped_worker_without_a_broker_does_not_wait_for_clients(self):
        b = self.bench
        for id in (1, 2):
            self.give(id)
        ended, running = (b.effect(tc.Start).job for _ in range(2))
        self.worker.finished(ended, exit_record(), b.now)
        self.worker.disconnected(BROKER, b"", b.now)
        self.worker.stop(143, b.now)
        b.collect()
        self.assertEqual(b.effects, [tc.Kill(running, False)])
        self.worker.finished(running, exit_record(143), b.now)
        b.collect()
        self.assertEqual(b.effects.pop(), tc.Exit(143))

    def test_told_to_stop_twice_it_leaves_at_once(self):
        b = self.bench
        self.give(1)
        self.worker.stop(143, b.now)
        b.collect()
        self.assertNotIn("BYE", [verb for _, verb, _ in b.lines])
        self.worker.stop(130, b.now)
        b.collect()
        self.assertEqual(b.lines.pop()[1], "BYE")
        self.assertEqual(b.effects.pop(), tc.Exit(143))

    def test_a_stopping_worker_takes_no_commands(self):
        b = self.bench
        self.give(1)
        b.effect(tc.Start)
        self.worker.stop(143, b.now)
        b.collect()
        b.effect(tc.Kill)
        b.lines.clear()
        self.give(2)
        b.expect("LOST", tasks=[[2, 1]], why=tc.WORKER_STOPPED)
        b.quiet()

    def test_outputs_are_closed_when_nobody_wants_them(self):
        b = self.bench
        for end in ('DONE {"tasks":[[1,1]]}', 'CANCEL {"tasks":[[1,1]]}', "CANCEL"):
            for ended_before in (True, False):
                self.give(1, split=True)
                job, record = b.effect(tc.Start).job, exit_record(0, b"out")
                if ended_before:
                    self.worker.finished(job, record, b.now)
                    b.collect()
                    b.expect("QUEUED")
                    b.expect("RESULT", split=True)
                b.hear(end, "r")
                if not ended_before:
                    self.worker.finished(job, record, b.now)
                    b.hear(end, "r")
                self.assertIsNone(record.output.data)
                self.assertFalse(self.worker.jobs)
                b.lines.clear()
                b.effects.clear()

    def test_says_what_it_waits_for_and_gives_up(self):
        worker = tc.Worker("w", 1, wait=5.0, address="tcp://x:1")
        b = Bench(worker)
        worker.disconnected(BROKER, b"", 0.0)
        b.wait(1.0)
        self.assertIn("no broker at tcp://x:1", b.effect(tc.Notice).text)
        b.wait(3.0)
        self.assertFalse(b.effects)
        worker.connected(BROKER, b.now)
        b.wait(1.0)
        self.assertIn("does not answer", b.effect(tc.Notice).text)
        b.wait(0.1)
        self.assertIn("gave up", b.effect(tc.Notice).text)
        self.assertEqual(b.effect(tc.Exit).status, 3)


class WorkerTreesTest(unittest.TestCase):
    """A worker whose commands run in workspaces. The tests speak for its files, too."""

    RUN = "k" * 16 + "r" * 32
    TREE = tc.make_tree({"setup": "make"}, [file_entry("a", b"12345")])
    OTHER = tc.make_tree({}, [file_entry("b", b"1")])

    def setUp(self):
        self.worker = tc.Worker("w1", slots=2, host="h")
        self.bench = b = Bench(self.worker)
        b.expect("READY")
        b.hear('OK {"join":1}')

    def give(self, id, tree=TREE, **more):
        self.bench.hear(tc.encode("{", {
            "id": id, "attempt": 1, "cmd": f"c{id}", "tree": tree.id,
            "manifest": len(tree.manifest), "cwd": "sub", "env": {"A": "b"}, **more}), self.RUN)
        self.bench.wait(tc.REPORT_DELAY)
        self.check()

    def check(self):
        for use in self.worker.uses.values():
            use.check(self.worker.jobs)

    def told(self, event):
        self.worker.tree_told(self.RUN, event, self.bench.now)
        self.bench.collect()
        self.bench.wait(tc.REPORT_DELAY)
        self.check()

    def chunk(self, data, tree=TREE, offset=0, id=1, **more):
        self.bench.hear(tc.encode("CHUNK", {
            "id": id, "attempt": 1, "offset": offset, "tree": tree.id, **more}), self.RUN, data)
        self.check()

    def end(self, job, exitcode=0, output=b"", **more):
        self.worker.finished(job, exit_record(exitcode, output, **more), self.bench.now)
        self.bench.collect()
        self.check()

    def until_ready(self, setup=""):
        """The first command has come, and its tree was found here."""
        b = self.bench
        self.give(1)
        b.expect("QUEUED", tasks=[[1, 1]], preparing=tc.FILES, host="h")
        self.assertEqual(b.effect(tc.FindTree), (self.RUN, self.TREE.id))
        self.told(tc.TreePlanned([]))
        self.told(tc.TreeReady("/ws", setup))

    def test_a_tree_is_fetched_then_its_commands_start(self):
        b, tree = self.bench, self.TREE
        self.give(1)
        b.expect("QUEUED", tasks=[[1, 1]], preparing=tc.FILES)
        b.effect(tc.FindTree)
        self.give(2)
        b.expect("QUEUED", tasks=[[2, 1]], preparing=tc.FILES)
        b.quiet()
        self.told(tc.TreeUnknown())
        size = len(tree.manifest)
        b.expect("FETCH", id=1, attempt=1, tree=tree.id, offset=0, size=size, host="h", anew=True)
        self.chunk(b"x" * (size - 1))  # too short
        self.chunk(tree.manifest, tree=self.OTHER)
        b.quiet()
        self.chunk(tree.manifest)
        self.assertEqual(b.effect(tc.FillTree), (self.RUN, tree.manifest))
        self.told(tc.TreePlanned([(size, 5)]))
        b.expect("FETCH", id=1, offset=size, size=5, got=0, of=5)
        self.chunk(b"12345", offset=size)
        self.assertEqual(b.effect(tc.PutTree), (self.RUN, [(size, 5)], b"12345"))
        self.told(tc.TreeStored())
        b.quiet()
        self.told(tc.TreeReady("/ws", ""))
        for id in (1, 2):
            job = b.effect(tc.Start).job
            self.assertEqual((job.cmd, job.cwd, job.top), (f"c{id}", "/ws/sub", "/ws"))
        b.expect("QUEUED", tasks=[[1, 1], [2, 1]], preparing=None)
        self.give(3, cwd="")
        self.assertEqual(b.effect(tc.Start).job.cwd, "/ws")
        b.expect("QUEUED", tasks=[[3, 1]], preparing=None)
        b.quiet()

    def test_a_client_hears_all_that_has_come(self):
        """Of the manifest, too, and of what came with the wrong hash."""
        b, tree, size = self.bench, self.TREE, len(self.TREE.manifest)
        for limit in (mock.patch.object(tc, "CHUNK_SIZE", size - 1),
                      mock.patch.object(tc, "FETCH_AHEAD", 1)):
            limit.start()
            self.addCleanup(limit.stop)
        self.give(1)
        b.effect(tc.FindTree)
        self.told(tc.TreeUnknown())
        b.expect("QUEUED")
        b.expect("FETCH", offset=0, got=0, of=None)
        self.chunk(tree.manifest[:-1])
        b.expect("FETCH", offset=size - 1, size=1, got=size - 1, of=None)
        self.chunk(tree.manifest[-1:], offset=size - 1)
        b.effect(tc.FillTree)
        self.told(tc.TreePlanned([(size, 3), (size + 3, 2)]))
        b.expect("FETCH", offset=size, got=0, of=5, anew=True)
        self.chunk(b"12345", offset=size)
        self.told(tc.TreeWrong([(size, 3)]))
        self.told(tc.TreeStored())
        b.expect("FETCH", offset=size, size=3, got=5, of=8, again=True, anew=None)

    def test_a_setup_runs_before_the_commands_and_takes_no_slot(self):
        b = self.bench
        self.until_ready("make")
        setup = b.effect(tc.StartSetup).job
        self.assertEqual((setup.cmd, setup.cwd, setup.env), ("make", "/ws/sub", {"A": "b"}))
        b.expect("QUEUED", tasks=[[1, 1]], preparing=tc.SETUP, host="h")
        self.give(2)
        b.expect("QUEUED", tasks=[[2, 1]], preparing=tc.SETUP)
        b.quiet()
        self.end(setup)
        b.effect(tc.EndSetup)
        self.assertEqual([b.effect(tc.Start).job.cmd for _ in range(2)], ["c1", "c2"])
        b.wait(tc.REPORT_DELAY)
        b.expect("QUEUED", tasks=[[1, 1], [2, 1]], preparing=None)

    def test_a_failed_setup_makes_the_host_unfit_for_this_run(self):
        b = self.bench
        self.until_ready("make")
        setup = b.effect(tc.StartSetup).job
        self.give(2)
        b.lines.clear()
        self.end(setup, 2, b"x" * tc.SETUP_OUTPUT + b"no make\n")
        lost = b.expect("LOST", tasks=[[1, 1]], fault=tc.UNFIT, host="h",
                        why="the setup ended with exit code 2")
        self.assertEqual((len(lost["output"]), lost["output"][-9:]),
                         (tc.SETUP_OUTPUT, "xno make\n"))
        b.expect("LOST", tasks=[[2, 1]], fault=tc.UNFIT, output="")
        self.give(3)
        b.expect("QUEUED", tasks=[[3, 1]])
        b.expect("LOST", tasks=[[3, 1]], fault=tc.UNFIT)
        b.quiet()

    def test_no_workspace_makes_the_host_unfit(self):
        b = self.bench
        self.give(1)
        b.effect(tc.FindTree)
        self.told(tc.TreeFailed("/cache is full"))
        b.expect("QUEUED")
        b.expect("LOST", fault=tc.UNFIT, why="/cache is full")
        b.quiet()

    def test_a_tree_that_is_gone_gives_the_commands_back(self):
        b = self.bench
        self.give(1)
        self.give(2)
        b.effect(tc.FindTree)
        self.told(tc.TreeUnknown())
        b.lines.clear()
        self.chunk(b"", why="a file has changed")
        for id in (1, 2):
            b.expect("LOST", tasks=[[id, 1]], fault="", why="a file has changed")
        b.quiet()
        self.give(1, self.OTHER, attempt=2)
        self.assertEqual(b.effect(tc.FindTree), (self.RUN, self.OTHER.id))

    def test_another_tree_waits_for_the_commands_of_the_last_one(self):
        b = self.bench
        self.until_ready()
        job = b.effect(tc.Start).job
        b.lines.clear()
        self.give(2, self.OTHER)
        b.expect("QUEUED", tasks=[[2, 1]], preparing=tc.FILES)
        self.give(3)
        b.effect(tc.Start)
        b.lines.clear()
        self.end(job)
        b.quiet_but("RESULT")
        self.end(self.worker.jobs[self.RUN, 3, 1])
        self.assertEqual(b.effect(tc.FindTree), (self.RUN, self.OTHER.id))

    def test_another_tree_waits_for_the_files_of_the_last_one(self):
        for state in ("finding", "storing"):
            with self.subTest(state):
                self.setUp()
                b = self.bench
                self.give(1)
                b.effect(tc.FindTree)
                if state == "storing":
                    self.told(tc.TreePlanned([(100, 5)]))
                    self.chunk(b"12345", offset=100)
                    b.effect(tc.PutTree)
                self.give(2, self.OTHER)
                b.hear('CANCEL {"tasks":[[1,1]]}', self.RUN)
                b.quiet_but("QUEUED", "LOST", "FETCH")
                if state == "storing":
                    self.told(tc.TreeStored())  # and it is complete now
                    b.quiet_but()
                    self.told(tc.TreeReady("/ws", ""))
                else:
                    self.told(tc.TreeUnknown())
                self.assertEqual(b.effect(tc.FindTree), (self.RUN, self.OTHER.id))

    def test_requests_name_a_command_that_is_still_wanted(self):
        b = self.bench
        self.give(1)
        self.give(2)
        self.told(tc.TreeUnknown())
        b.lines.clear()
        b.hear('RECALL {"tasks":[[1,1]]}', self.RUN)
        b.expect("LOST", tasks=[[1, 1]], why=tc.RECALLED)
        b.expect("FETCH", id=2, offset=0, anew=True)
        b.hear('RECALL {"tasks":[[2,1]]}', self.RUN)
        b.expect("LOST", tasks=[[2, 1]])
        b.wait(tc.TREE_TIMEOUT)
        self.assertNotIn("FETCH", [verb for _, verb, _ in b.lines])  # nobody may ask
        b.lines.clear()
        b.answer()
        self.give(3)
        b.expect("QUEUED", tasks=[[3, 1]])
        b.expect("FETCH", id=3, offset=0)

    def test_after_joining_again_it_asks_anew_and_tells_what_takes_no_slot(self):
        b = self.bench
        self.give(1)
        self.told(tc.TreeUnknown())
        b.lines.clear()
        b.hear("WHO")
        b.expect("READY", running=[[self.RUN, 1, 1]])
        b.answer()
        b.expect("QUEUED", tasks=[[1, 1]], preparing=tc.FILES)
        b.expect("FETCH", id=1, anew=True)

    def test_the_end_of_a_run_releases_its_workspace(self):
        b = self.bench
        self.until_ready()
        job = b.effect(tc.Start).job
        b.lines.clear()
        b.hear("CANCEL", self.RUN)
        b.effect(tc.Kill)
        b.quiet()
        self.end(job, 143)
        self.assertEqual(b.effect(tc.ReleaseTree), (self.RUN,))
        b.expect("LOST")
        self.give(2)  # of the same client, whose lease was over
        b.quiet_but("QUEUED")
        self.told(tc.TreeReady("/ws", ""))  # late
        b.quiet()
        self.told(tc.TreeReleased())
        b.effect(tc.FindTree)
        b.quiet()
        b.hear("CANCEL", self.RUN)
        b.expect("LOST", tasks=[[2, 1]])
        b.effect(tc.ReleaseTree)
        self.told(tc.TreeReleased())
        self.assertEqual(self.worker.uses, {})

    def test_the_end_of_a_run_ends_its_setup(self):
        b = self.bench
        self.until_ready("make")
        setup = b.effect(tc.StartSetup).job
        b.lines.clear()
        b.hear("CANCEL", self.RUN)
        b.expect("LOST", tasks=[[1, 1]])
        self.assertEqual(b.effect(tc.Kill), (setup, False))
        b.quiet()
        self.end(setup, 143)
        b.effect(tc.ReleaseTree)
        b.quiet()

    def test_a_run_without_commands_loses_its_workspace_in_the_end(self):
        b = self.bench
        self.until_ready()
        job = b.effect(tc.Start).job
        self.end(job)
        b.hear('DONE {"tasks":[[1,1]]}', self.RUN)
        while self.worker.uses[self.RUN].state == tc.READY:
            b.wait(1.0)
            b.answer()
            self.assertLess(b.now, 2 * tc.RELEASE_AFTER)
        self.assertGreaterEqual(b.now, tc.RELEASE_AFTER)
        b.effect(tc.ReleaseTree)

    def test_a_worker_that_stops_hands_back_what_has_not_begun(self):
        b = self.bench
        self.until_ready("make")
        setup = b.effect(tc.StartSetup).job
        b.lines.clear()
        self.worker.stop(143, b.now)
        b.collect()
        b.expect("READY", slots=0)
        b.expect("LOST", tasks=[[1, 1]], fault="")
        self.assertEqual(b.effect(tc.Kill).job, setup)


# === Running commands =================================================================


class RunnerTest(unittest.TestCase):
    def setUp(self):
        self.ids = itertools.count(1000)
        self.began = {}
        self.printed = []
        self.records = {}
        self.ended = threading.Condition()
        self.runner = self.new_runner(4)
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)

    def new_runner(self, slots, name=""):
        """wake() takes the events at once."""
        runner = tc.Runner(slots, lambda: self.note(runner), name)
        self.addCleanup(runner.close)
        return runner

    def note(self, runner):
        with self.ended:
            for job, what in runner.take_events():
                if isinstance(what, tc.ExitRecord):
                    self.addCleanup(what.output.close)
                    self.records[job.key] = what
                elif isinstance(what, tc.Output):
                    self.printed.append(what.read(0, 99))
                else:
                    self.began[job.key] = what
            self.ended.notify_all()

    def start(self, cmd, cwd=None, **more):
        job = tc.Job(("r", next(self.ids), 1), dict({"cmd": cmd, "cwd": cwd}, **more))
        self.start_job(job)
        return job

    def start_job(self, job):
        self.runner.enqueue(job)
        self.runner.start_jobs(math.inf)

    def result(self, job):
        with self.ended:
            ok = self.ended.wait_for(lambda: job.key in self.records, PATIENCE)
        self.assertTrue(ok, f"{job.cmd} does not end")
        return self.records[job.key]

    def run_one(self, cmd, cwd=None):
        exit_record = self.result(self.start(cmd, cwd))
        return exit_record.exitcode, exit_record.output.read(0, exit_record.output.size)

    def wait_for_file(self, name):
        path, end = os.path.join(self.dir, name), time.monotonic() + PATIENCE
        while not (os.path.exists(path) and os.path.getsize(path)):
            self.assertLess(time.monotonic(), end, f"no {name}")
            time.sleep(0.005)
        with open(path) as file:
            return file.read().strip()

    def assert_gone(self, pid):
        end = time.monotonic() + PATIENCE
        while os.path.exists(f"/proc/{pid}") and time.monotonic() < end:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return  # killed; its reaping is init's business
            time.sleep(0.005)
        self.assertFalse(os.path.exists(f"/proc/{pid}"), f"process {pid} survives")

    def test_stdout_and_stderr_apart(self):
        script = ("printf out; sleep 0.05; printf err >&2; sleep 0.05; printf more; "
                  "seq 3000 >&2; exit 3")
        for limit, cut in ((0, b""), (8, b"\n[testcloud: output cut after 8 of 13903 bytes]\n")):
            exit_record = self.result(self.start(script + f" # {limit}", split=True, limit=limit))
            self.assertEqual(exit_record.exitcode, 3)
            found, rest = {1: b"", 2: b""}, exit_record.output.read(0, 10**6)
            while rest:
                stream, size = tc.PIECE_HEADER.unpack_from(rest)
                found[stream] += rest[5:5 + size]
                self.assertGreaterEqual(len(rest), 5 + size)
                rest = rest[5 + size:]
            lines = b"".join(b"%d\n" % n for n in range(1, 3001))
            whole = {1: b"outmore", 2: b"err" + lines}
            if limit:
                self.assertTrue(found[1].endswith(cut))
                self.assertEqual(len(found[1] + found[2]), 8 + len(cut))
            else:
                self.assertEqual(found, whole)

    def test_variables(self):
        with mock.patch.dict(os.environ, {"A": "old", "B": "kept"}):
            runner = self.new_runner(1, "w")
        job = tc.Job(("r", 1, 1), {"cmd": "echo $A $B $C $TESTCLOUD_RUN", "env": {
            "A": "x y", "C": "\udcff", "TESTCLOUD_RUN": "forged"}})
        runner.enqueue(job)
        runner.start_jobs(math.inf)
        exit_record = self.result(job)
        self.assertEqual(exit_record.output.read(0, 99), b"x y kept \xff r\n")
        self.assertEqual(exit_record.slot, 1)

    @unittest.skipUnless(sys.platform == "linux", "not Linux")
    def test_commands_may_be_given_less_priority_than_we_have(self):
        ours = os.getpriority(os.PRIO_PROCESS, 0)
        runner = tc.Runner(2, lambda: self.note(runner), nice=3)
        self.addCleanup(runner.close)
        job = tc.Job(("r", 1, 1), {"cmd": "nice"})
        runner.enqueue(job)
        runner.start_jobs(math.inf)
        self.assertEqual(self.result(job).output.read(0, 99), b"%d\n" % (ours + 3))
        self.assertEqual(os.getpriority(os.PRIO_PROCESS, 0), ours)

    def test_niceness_of_the_whole_process_is_raised_once(self):
        with mock.patch.object(sys, "platform", "darwin"), mock.patch.object(os, "nice") as nice, \
                mock.patch.object(os, "setpriority") as each:
            runner = tc.Runner(2, lambda: self.note(runner), nice=3)
            self.addCleanup(runner.close)
            self.runner = runner
            self.run_one("true 1")
            self.run_one("true 2")
        nice.assert_called_once_with(3)
        each.assert_not_called()

    def test_what_a_command_prints_at_once_is_told_before_its_end(self):
        job = tc.Job(("r", 1, 1), {"cmd": "echo one; read x < fifo", "cwd": self.dir})
        os.mkfifo(os.path.join(self.dir, "fifo"))
        job.live_from = 0
        self.start_job(job)
        with self.ended:
            self.assertTrue(self.ended.wait_for(lambda: self.printed, PATIENCE))
        with open(os.path.join(self.dir, "fifo"), "w") as fifo:
            fifo.write("\n")
        self.result(job)

    def test_what_a_command_prints_is_told_while_it_runs(self):
        self.runner = self.new_runner(1)
        job = tc.Job(("r", 1, 1), {"cmd": "sleep 0.05; echo one; read x < fifo", "cwd": self.dir})
        os.mkfifo(os.path.join(self.dir, "fifo"))
        job.live_from = 0
        self.runner.enqueue(job)
        for n in range(tc.LOW_WATER):  # that others wait must not delay the event
            self.start(f"true {n}")
        with self.ended:
            self.assertTrue(self.ended.wait_for(lambda: self.printed, PATIENCE))
        self.assertEqual(self.printed, [b"one\n"])
        with open(os.path.join(self.dir, "fifo"), "w") as fifo:
            fifo.write("\n")
        self.result(job)

    def test_output_is_told_once_until_it_was_taken(self):
        job = tc.Job(("r", 1, 1), {"cmd": "for n in 1 2 3 4 5; do echo $n; sleep 0.02; done"})
        job.live_from = 0
        self.start_job(job)
        self.result(job)
        self.assertEqual(len(self.printed), 1)

    def test_no_more_than_its_slots_run_and_others_wait_in_line(self):
        self.runner = self.new_runner(2)
        for n in range(4):
            self.start(f"echo > {self.dir}/{n}; while [ ! -e {self.dir}/end ]; do sleep 0.01; done")
        waiting = self.start(f"touch {self.dir}/never")
        self.wait_for_file("1")
        self.assertEqual(len(self.runner.waiting), 3)
        self.assertTrue(self.runner.recall(waiting))
        how = self.result(waiting)
        self.assertEqual((how.requeue, how.reason), (True, tc.RECALLED))
        self.runner.kill(next(iter(self.runner.waiting.values())), False)  # the third
        open(f"{self.dir}/end", "w").close()
        self.wait_for_file("3")
        with self.ended:
            self.assertTrue(self.ended.wait_for(lambda: len(self.records) == 5, PATIENCE))
        self.assertEqual(sorted(os.listdir(self.dir)), ["0", "1", "3", "end"])
        self.assertEqual(sum(how.requeue for how in self.records.values()), 2)

    def test_nothing_is_started_after_the_deadline(self):
        """After a pause of the process, the loop must look at the clock first."""
        jobs = [tc.Job(("r", n, 1), {"cmd": f"touch {self.dir}/{n}"}) for n in range(3)]
        self.runner = self.new_runner(1)
        first = self.start("true")
        self.result(first)  # a thread is there, and waits
        late = self.start(f"while [ ! -e {self.dir}/end ]; do sleep 0.01; done; rm {self.dir}/end")
        while self.runner.waiting:
            time.sleep(0.001)
        self.runner.enqueue(jobs[0])
        self.runner.start_jobs(-math.inf)
        with mock.patch.object(self.runner.lock, "wait",
                               side_effect=self.runner.lock.wait) as waits:
            open(f"{self.dir}/end", "w").close()
            self.result(late)  # and its thread takes no other
            while not waits.called:
                time.sleep(0.001)
        for job in jobs:
            self.runner.enqueue(job)
            self.runner.start_jobs(time.monotonic() - 0.001)
        self.assertFalse(self.runner.recall(first))
        self.assertEqual((os.listdir(self.dir), list(self.runner.waiting)),
                         ([], [j.key for j in jobs]))
        self.runner.start_jobs(time.monotonic() + PATIENCE)
        for job in jobs:
            self.assertEqual(self.result(job).exitcode, 0)

    def test_what_is_handed_back_is_told_at_once(self):
        """Even with a long queue and a busy slot."""
        self.runner = self.new_runner(1)
        slow = self.start(f"while [ ! -e {self.dir}/end ]; do sleep 0.01; done")
        with self.ended:
            self.assertTrue(self.ended.wait_for(lambda: slow.key in self.began, PATIENCE))
        jobs = [self.start(f"true {n}") for n in range(9)]
        self.runner.recall(jobs[-1])
        self.assertEqual(self.result(jobs[-1]).reason, tc.RECALLED)
        self.runner.kill(jobs[-2], True)
        self.assertEqual(self.result(jobs[-2]).reason, tc.RECALLED)
        self.assertNotIn(slow.key, self.records)
        open(f"{self.dir}/end", "w").close()

    def test_a_slot_that_wakes_after_the_deadline_wakes_the_loop(self):
        self.result(self.start("true"))
        job = tc.Job(("r", 1, 1), {"cmd": "true"})
        calls = []
        with mock.patch.object(self.runner, "wake_loop", side_effect=lambda: calls.append(1)):
            self.runner.enqueue(job)
            with self.runner.lock:
                self.runner.start_deadline = -math.inf
                self.runner.lock.notify()
            end = time.monotonic() + PATIENCE
            while not calls and time.monotonic() < end:
                time.sleep(0.001)
        self.assertTrue(calls)

    def test_events_wake_the_loop_although_their_slot_is_held_up(self):
        self.runner = self.new_runner(1)
        real, hold, first = self.runner.launcher.start, threading.Event(), []

        def start(*args):
            if first:
                hold.wait(PATIENCE)
            first.append(1)
            return real(*args)
        with mock.patch.object(self.runner.launcher, "start", start):
            jobs = [self.start(f"true {n}") for n in range(9)]
            end = time.monotonic() + PATIENCE
            while jobs[0].key not in self.records and time.monotonic() < end:
                self.runner.start_jobs(math.inf)  # as its loop does
            self.assertIn(jobs[0].key, self.records)
            hold.set()
            for job in jobs:
                self.result(job)

    def test_events_wait_for_others_but_not_for_long(self):
        """The loop is woken at once when the queue is short, otherwise soon. A long command has an
        event of its start."""
        self.runner = self.new_runner(1)
        began = time.monotonic()
        for _ in range(20):
            self.runner.enqueue(tc.Job(("r", len(self.runner.waiting), 1), {"cmd": "true"}))
        slow = tc.Job(("r", 20, 1), {"cmd": f"while [ ! -e {self.dir}/end ]; do sleep 0.01; done"})
        self.runner.enqueue(slow)
        for n in range(21, 21 + tc.LOW_WATER):
            self.runner.enqueue(tc.Job(("r", n, 1), {"cmd": "true"}))
        delay = 0.5  # far longer than a short command takes
        with mock.patch.object(self, "note", side_effect=self.note) as calls, \
                mock.patch.object(tc, "REPORT_DELAY", delay):
            self.runner.start_jobs(math.inf)
            with self.ended:
                self.assertTrue(self.ended.wait_for(lambda: slow.key in self.began, PATIENCE))
                self.assertEqual(len(self.records), 20)
        # once in a delay for what has ended, and once for each command that lasted so long
        self.assertLess(calls.call_count, 3 + 2 * (time.monotonic() - began) / delay)
        self.assertTrue(began < self.began[slow.key] < time.monotonic())
        open(f"{self.dir}/end", "w").close()
        self.result(slow)

    def test_an_error_of_a_networks_directory_is_no_shortage(self):
        job = tc.Job(("r", 1, 1), {"cmd": "true", "cwd": self.dir})
        error = TimeoutError(errno.ETIMEDOUT, "Connection timed out", self.dir.encode())
        with mock.patch.object(self.runner.launcher, "start", side_effect=error):
            self.start_job(job)
            how = self.result(job)
        self.assertFalse(how.requeue)
        self.assertIn("cannot enter directory", how.reason)

    def test_what_cannot_be_started_in_time_is_not_started_later(self):
        job = tc.Job(("r", 1, 1), {"cmd": "true"})
        error = BlockingIOError(errno.EAGAIN, "no process")
        with mock.patch.object(self.runner.launcher, "start", side_effect=error) as tries:
            self.runner.enqueue(job)
            self.runner.start_jobs(time.monotonic() + 0.1)
            how = self.result(job)
        self.assertEqual((how.requeue, how.reason), (True, "cannot start it: no process"))
        self.assertLess(tries.call_count, len(tc.SPAWN_DELAYS))

    def test_a_command_that_has_ended_is_not_signalled(self):
        """Another process may have its pid by then."""
        job = self.start("exit 3")
        self.assertEqual(self.result(job).exitcode, 3)
        with mock.patch.object(tc.os, "killpg") as killpg, mock.patch.object(tc.os, "kill") as kill:
            for hard in (False, True):
                self.runner.kill(job, hard)
        self.assertFalse(killpg.called or kill.called)

    def test_output_and_exit_code(self):
        self.assertEqual(self.run_one("echo out; echo err >&2; echo out; exit 3"),
                         (3, b"out\nerr\nout\n"))
        self.assertEqual(self.run_one("true"), (0, b""))
        self.assertEqual(self.run_one("printf 'a\\377b'"), (0, b"a\xffb"))
        self.assertEqual(self.run_one("cat"), (0, b""))
        self.assertEqual(self.run_one("pwd", "/"), (0, b"/\n"))
        self.assertEqual(self.run_one("echo a > /dev/stdout; echo b"), (0, b"a\nb\n"))
        self.assertEqual(self.run_one("no-such-program-anywhere")[0], 127)

    def test_a_command_inherits_no_more_than_it_should(self):
        file = os.open("/", os.O_RDONLY)
        self.addCleanup(os.close, file)
        os.set_inheritable(file, True)  # as what a shell has opened for a worker
        self.runner.close()
        self.runner = self.new_runner(1)
        code, data = self.run_one("exec ls -l /proc/self/fd")
        found = re.findall(rb"(\d) -> (.*)", data)
        self.assertEqual([row[0] for row in found], [b"0", b"1", b"2", b"3"])  # 3 is ls's own
        self.assertEqual((found[0][1], found[1][1]), (b"/dev/null", found[2][1]))
        self.assertEqual(self.run_one("kill -PIPE $$")[0], 128 + signal.SIGPIPE)
        self.assertEqual(self.run_one("kill -XFSZ $$")[0], 128 + signal.SIGXFSZ)

    def test_a_command_has_its_own_variables_instead_of_ours(self):
        with mock.patch.dict(os.environ, TESTCLOUD_SEQ="77", TESTCLOUD_RUN="x",
                             TESTCLOUD_BROKER="b"):
            self.runner = self.new_runner(1, "w1")
        job = tc.Job(("r", 5, 2), {"cmd": "env | grep ^TESTCLOUD_ | sort"})
        self.start_job(job)
        output = self.result(job).output
        self.assertEqual(output.read(0, 999).split(), [
            b"TESTCLOUD_ATTEMPT=2", b"TESTCLOUD_BROKER=b", b"TESTCLOUD_RUN=r", b"TESTCLOUD_SEQ=5",
            b"TESTCLOUD_SLOT=1", b"TESTCLOUD_WORKER=w1"])

    @unittest.skipUnless(sys.platform == "linux", "not Linux")
    def test_the_quick_way_starts_programs_and_says_why_it_cannot(self):
        try:
            spawner = tc.Spawner({b"A": b"a", b"Z": b"z"})
        except AttributeError:
            self.skipTest("libc lacks what it takes")
        ours, theirs = os.pipe()
        for file in (ours, theirs):
            self.addCleanup(os.close, file)
        for changed, expected in (({b"B": b"b", b"C": b"c"}, b"/\nabcz\n"), ({}, b"/\naz\n"),
                                  ({b"A": b"x", b"B": b"b"}, b"/\nxbz\n")):
            pid = spawner.spawn([b"/bin/sh", b"-c", b"pwd; echo $A$B$C$Z; exit 3"],
                                changed, b"/", theirs, theirs)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 3)
            self.assertEqual(os.read(ours, 99), expected)
        for argv, cwd, number in (([b"/no/program"], None, errno.ENOENT),
                                  ([b"/bin/sh"], b"/no", errno.ENOENT),
                                  ([b"/bin/sh", b"x" * 10**7], None, errno.E2BIG)):
            with self.assertRaises(OSError) as caught:
                spawner.spawn(argv, {}, cwd, theirs, theirs)
            self.assertEqual(caught.exception.errno, number)

    def test_an_orphan_belongs_to_one_attempt_of_one_command(self):
        mark = {"TESTCLOUD_WORKER": "w1", "TESTCLOUD_RUN": "r", "TESTCLOUD_SEQ": "5",
                "TESTCLOUD_ATTEMPT": "2"}
        runner = self.new_runner(1, "w1")
        runner.processes["r", 5, 2] = tc.Process()
        for changed, ended in (({}, False), ({"TESTCLOUD_ATTEMPT": "1"}, True),
                               ({"TESTCLOUD_SEQ": "4"}, True), ({"TESTCLOUD_RUN": "q"}, True),
                               ({"TESTCLOUD_WORKER": "w2"}, True)):
            with mock.patch.object(tc, "environment_of", lambda pid, c=changed: {**mark, **c}):
                self.assertEqual(runner.command_has_ended(77), ended, changed)
        runner.processes.clear()

    def test_an_orphan_without_our_variables_may_belong_to_any_command_that_is_older(self):
        runner = self.new_runner(1, "w1")
        ticks = {77: 10.0, 1: 5.0, 2: 20.0}
        older, younger = tc.Process(1), tc.Process(2)
        with mock.patch.object(tc, "environment_of", lambda pid: {}), \
                mock.patch.object(tc, "start_ticks", ticks.get):
            for processes, ended in (([], True), ([younger], True), ([older], False),
                                     ([older, younger], False), ([younger, older], False),
                                     ([younger, tc.Process()], False)):  # it is being started
                runner.processes = dict(enumerate(processes))
                self.assertEqual(runner.command_has_ended(77), ended, processes)
        runner.processes = {}

    def test_an_orphan_that_cannot_be_killed_is_waited_for_once(self):
        runner = self.runner
        runner.children_file = os.open(os.devnull, os.O_RDONLY)
        try:
            with mock.patch.object(tc, "read_children", lambda file: [77]), \
                    mock.patch.object(tc, "reaped", lambda pid: False), \
                    mock.patch.object(runner, "command_has_ended", lambda pid: True), \
                    mock.patch.object(tc.os, "kill") as kill, \
                    mock.patch.object(tc, "REAP_TIMEOUT", 0.05), self.assertLogs() as logs:
                self.run_one("true 1")
                self.run_one("true 2")
        finally:
            os.close(runner.children_file)
            runner.children_file = -1
        kill.assert_called_with(77, signal.SIGKILL)
        self.assertEqual(logs.output, ["WARNING:root:processes that cannot be killed: [77]"])

    def test_orphans_that_cannot_be_killed_are_remembered_until_they_end(self):
        """There may be several, from different times. Another process may get the pid of one."""
        runner, ended = self.runner, tc.Process(2**22 + 1)  # no process has such a pid
        with mock.patch.object(runner, "children_file", 0), \
                mock.patch.object(tc, "read_children") as children, \
                mock.patch.object(tc, "reaped", lambda pid: False), \
                mock.patch.object(runner, "command_has_ended", lambda pid: True), \
                mock.patch.object(tc.os, "kill"), mock.patch.object(tc.os, "killpg"), \
                mock.patch.object(tc, "REAP_TIMEOUT", 0):
            for orphans, waited_for in (([11], [11]), ([11, 22], [22]), ([11, 22], []), ([22], []),
                                        ([11, 22], [11]), ([], []), ([22, 11], [22, 11])):
                children.return_value = orphans
                with mock.patch.object(tc.logging, "warning") as warning:
                    runner.kill_leftovers(tc.Job(("r", 1, 1), {"cmd": "true"}), ended)
                self.assertEqual([call[0][-1] for call in warning.call_args_list],
                                 [waited_for] if waited_for else [], orphans)

    def test_each_command_has_its_directory_and_we_keep_ours(self):
        before = os.getcwd()
        jobs = {self.start(f"sleep 0.05; pwd; : {n}", where): where
                for n, where in enumerate(("/", "/usr", self.dir, "/proc") * 3)}
        for job, where in jobs.items():
            output = self.result(job).output
            self.assertEqual(output.read(0, 999), where.encode() + b"\n")
        self.assertEqual(self.run_one("pwd")[1], before.encode() + b"\n")
        self.assertEqual(os.getcwd(), before)

    def test_what_stops_as_in_a_terminal_can_be_killed(self):
        job = self.start(f"echo $$ > {self.dir}/pid; kill -TSTP $$; sleep 1000")
        self.wait_for_file("pid")
        self.runner.kill(job, False)
        self.assertEqual(self.result(job).signal, signal.SIGTERM)

    def test_killed_by_a_signal(self):
        exit_record = self.result(self.start("kill -9 $$"))
        self.assertEqual((exit_record.exitcode, exit_record.signal), (137, 9))

    def test_killed_for_want_of_memory(self):
        def told(cmd):
            exit_record = self.result(self.start(cmd))
            self.assertEqual(exit_record.exitcode, 137)
            return exit_record.reason == tc.OUT_OF_MEMORY
        kills = [3]
        with mock.patch.object(tc, "oom_kills", lambda: kills[0]):
            self.runner = self.new_runner(2)
            self.assertFalse(told("kill -9 $$"))
            kills[0] += 1  # as of a command that was killed and did not tell
            self.runner.reap(time.monotonic())
            self.assertFalse(told("kill -9 $$; true"))
            other = self.start(f"while [ ! -e {self.dir}/end ]; do sleep 0.01; done; kill -9 $$")
            with self.ended:
                self.assertTrue(self.ended.wait_for(lambda: other.key in self.began, PATIENCE))
            kills[0] += 2
            self.assertTrue(told("sh -c 'kill -9 $$'; exit $?"))
            open(f"{self.dir}/end", "w").close()
            self.assertIn("fewer slots (-j)", self.result(other).reason)
            self.assertFalse(told("kill -9 $$"))
            kills[0] += 1
            self.assertEqual(self.result(self.start("exit 3")).reason, "")

    def test_count_of_those_killed_for_want_of_memory(self):
        own, folder = os.path.join(self.dir, "own"), os.path.join(self.dir, "a b")
        os.mkdir(folder)
        for path, text in ((own, "1:name=systemd:/x\n0::/a b\n"),
                           (f"{folder}/memory.events", "oom 7\noom_kill 5\noom_group_kill 1\n")):
            with open(path, "w") as file:
                file.write(text)
        self.assertEqual(tc.oom_kills(self.dir, own), 5)
        self.assertEqual((tc.oom_kills("/nowhere", own), tc.oom_kills(self.dir, "/no")), (0, 0))

    def run_in(self, shell, cmd, **more):
        how = self.result(self.start(cmd, shell=shell, **more))
        return how.exitcode, how.output.read(0, 999), how.reason

    @unittest.skipUnless(shutil.which("bash"), "no bash")
    def test_another_shell(self):
        cmd = "set -o pipefail; a=(1 2); false | cat <(echo ${a[1]}) -; echo $? $0"
        bash = shutil.which("bash")
        with mock.patch.dict(os.environ, SHELL="/bin/false"):
            for shell in (bash, "bash"):
                self.assertEqual(self.run_in(shell, cmd), (0, f"2\n1 {bash}\n".encode(), ""))
            for shell in ({}, {"shell": ""}):
                how = self.result(self.start("echo $0 $SHELL", **shell))
                self.assertEqual(how.output.read(0, 99).split()[0], b"/bin/sh")
        self.assertEqual(self.run_in("bash", "-x 2> /dev/null; echo $?")[1], b"127\n")
        self.assertEqual(self.run_in(bash, "pwd; echo $B", cwd="/", env={"B": "b"})[1], b"/\nb\n")

    def test_a_shell_that_the_worker_lacks(self):
        file = os.path.join(self.dir, "shell")
        with open(file, "w") as text:
            text.write("no program")
        os.symlink("/bin/echo", f"{self.dir}/echo")
        path = mock.patch.dict(os.environ, PATH="/nonexistent")
        path.start()
        self.addCleanup(path.stop)
        for shell, reason in (
                ("/no/such/shell", "this worker has no shell /no/such/shell (see --shell)"),
                ("no-such-shell", "this worker has no shell no-such-shell (see --shell)"),
                ("echo", "this worker has no shell echo (see --shell)"),  # not from the directory
                (file,
                 f"this worker cannot execute the shell {file}: Permission denied (see --shell)"),
                (f"{file}/sh", f"this worker has no shell {file}/sh (see --shell)"),
                ("/bin/s\0h", "cannot start it: embedded null byte")):
            with self.subTest(shell):
                how = self.result(self.start("true", self.dir, shell=shell))
                self.assertEqual((how.exitcode, how.reason), (tc.NOT_RUN, reason))
                self.assertEqual((how.requeue, how.time), (False, 0.0))
        self.assertEqual(self.run_in("./echo", "true", cwd=self.dir)[:2], (0, b"-c true\n"))
        os.chmod(file, 0o700)
        self.assertIn("Exec format error", self.run_in(file, "true")[2])
        self.assertIn("cannot enter directory", self.run_in("/no/shell", "true", cwd="/no/dir")[2])

    def test_a_command_is_no_option_of_the_shell(self):
        for cmd in ("-x", "+x", "-c 'exit 3'", "--version", "-"):
            code, output = self.run_one(cmd)
            self.assertEqual((code, cmd.split()[0].encode() in output), (127, True), output)
        self.assertTrue(self.run_one("-x 2> /dev/null; echo $0")[1].endswith(b"/bin/sh\n"))

    def test_time_is_in_milliseconds(self):
        exit_record = self.result(self.start("sleep 0.2"))
        self.assertGreater(exit_record.time, 200)
        self.assertLess(abs(exit_record.started - time.time()), 3600)

    def test_large_output_is_whole(self):
        code, data = self.run_one("head -c 3000000 /dev/zero | tr '\\0' x; echo end")
        self.assertEqual((code, len(data), data[-5:]), (0, 3000004, b"xend\n"))

    def test_what_cannot_be_started_fails_with_a_reason(self):
        exit_record = self.result(self.start("true", "/no/such/dir"))
        self.assertEqual(exit_record.exitcode, tc.NOT_RUN)
        self.assertIn("/no/such/dir", exit_record.reason)
        exit_record = self.result(self.start("echo a\0b"))
        self.assertEqual(exit_record.exitcode, tc.NOT_RUN)
        self.assertIn("null byte", exit_record.reason)
        exit_record = self.result(self.start("true " + "x" * 5_000_000))
        self.assertEqual(exit_record.exitcode, tc.NOT_RUN)
        self.assertIn("too long", exit_record.reason)
        self.assertFalse(self.runner.processes)

    def test_a_command_ends_with_its_leader(self):
        began = time.monotonic()
        code, data = self.run_one(f"sleep 1000 & echo $! > {self.dir}/pid; echo done")
        self.assertEqual((code, data), (0, b"done\n"))
        self.assertLess(time.monotonic() - began, 500)
        self.assert_gone(self.wait_for_file("pid"))

    def test_helpers_may_write_for_a_moment_after_their_leader(self):
        """As of `exec > >(tee log)`: into our pipe, and elsewhere."""
        helper = f"(sleep 0.02; echo late; echo late > {self.dir}/log) & echo done"
        for split in (False, True):
            with mock.patch.object(tc, "OUTPUT_GRACE", PATIENCE):
                exit_record = self.result(self.start(helper, split=split))
            self.assertRegex(exit_record.output.read(0, 99), rb"(?s)done\n.*late\n")
            self.assertEqual(self.wait_for_file("log"), "late")
            os.unlink(os.path.join(self.dir, "log"))

    def test_a_command_may_close_its_outputs_and_go_on(self):
        for n, wait in enumerate(("", "sleep 0.05; ")):
            for split in (False, True):
                log = f"{self.dir}/{n}{split}"
                cmd = f"{wait}echo a; exec >&- 2>&-; sleep 0.1; echo end > {log}; exit 3"
                with mock.patch.object(tc, "OUTPUT_GRACE", 0.0):
                    how = self.result(self.start(cmd, split=split))
                self.assertEqual((how.exitcode, tc.read_text(log)), (3, "end\n"))

    def test_a_process_that_has_closed_our_pipe_is_not_waited_for(self):
        with mock.patch.object(tc, "OUTPUT_GRACE", 2 * PATIENCE):
            for wait in ("", "sleep 0.05; "):
                code, data = self.run_one(
                    f"sleep 1000 > {self.dir}/log 2>&1 & echo $! > {self.dir}/pid; {wait}echo done")
                self.assertEqual((code, data), (0, b"done\n"))
                self.assert_gone(self.wait_for_file("pid"))

    def test_without_pidfd_the_same(self):
        with mock.patch.object(tc, "pidfd", lambda pid: -1):
            self.assertEqual(self.run_one("echo a; exit 3"), (3, b"a\n"))
            self.assertEqual(self.run_one("sleep 1000 & echo b"), (0, b"b\n"))
            self.assertEqual(self.run_one("echo d; exec >&- 2>&-; sleep 0.1; exit 3"), (3, b"d\n"))
            with mock.patch.object(tc.os, "waitid", create=True):
                del tc.os.waitid
                self.assertEqual(self.run_one("echo c; exit 4"), (4, b"c\n"))

    def test_kill_reaches_the_whole_group(self):
        job = self.start(f"sleep 1000 & echo $! > {self.dir}/pid; wait")
        child = self.wait_for_file("pid")
        self.runner.kill(job, False)
        self.assertEqual(self.result(job).signal, signal.SIGTERM)
        self.assert_gone(child)

    def test_a_hard_kill_reaches_processes_that_ignore_sigterm_or_are_stopped(self):
        job = self.start(f"trap '' TERM; echo $$ > {self.dir}/pid; while :; do sleep 1000; done")
        self.wait_for_file("pid")
        self.runner.kill(job, False)
        self.runner.kill(job, True)
        self.assertEqual(self.result(job).signal, signal.SIGKILL)
        job = self.start(f"echo $$ > {self.dir}/pid2; kill -STOP $$; sleep 1000")
        self.wait_for_file("pid2")
        self.runner.kill(job, False)
        self.assertEqual(self.result(job).signal, signal.SIGTERM)

    def test_children_of_a_shell_that_was_asked_to_end_have_their_grace(self):
        job = self.start(f"sh -c 'trap \"sleep 0.1; echo clean; exit\" TERM; echo > {self.dir}/a; "
                         f"while :; do sleep 0.01; done'; true")
        self.wait_for_file("a")
        self.runner.kill(job, False)
        exit_record = self.result(job)
        self.assertEqual(exit_record.signal, signal.SIGTERM)
        self.assertTrue(exit_record.output.read(0, 99).endswith(b"clean\n"))
        job = self.start(f"sh -c 'trap \"\" TERM; echo $$ > {self.dir}/b; sleep 1000'; true")
        stubborn = self.wait_for_file("b")
        self.runner.kill(job, False)
        with self.ended:
            self.assertFalse(self.ended.wait_for(lambda: job.key in self.records, 0.2))
        self.runner.kill(job, True)
        self.result(job)
        self.assert_gone(stubborn)

    def test_after_sigkill_nobody_has_a_grace(self):
        """A member of the group may be another user's, whom we cannot kill."""
        job = self.start(f"echo > {self.dir}/a; sleep 1000")
        self.wait_for_file("a")
        with mock.patch.object(tc, "group_is_alive", lambda leader: True):
            self.runner.kill(job, True)
            self.assertEqual(self.result(job).signal, signal.SIGKILL)

    def test_a_command_that_has_left_its_process_group_can_be_killed(self):
        leave = "import os, sys, time; os.setpgid(0, os.getpgid(os.getppid())); " \
                "open(sys.argv[1], 'w').write('x'); time.sleep(1000)"
        for n, hard in enumerate((False, True)):
            job = self.start(f"exec {sys.executable} -c \"{leave}\" {self.dir}/{n}")
            if self.runner.launcher.spawner is None:  # it leads a session, and so it cannot leave
                self.assertEqual(self.result(job).exitcode, 1)
                continue
            self.wait_for_file(str(n))
            self.runner.kill(job, hard)
            self.assertEqual(self.result(job).signal, signal.SIGKILL if hard else signal.SIGTERM)

    def test_kill_before_the_process_is_there(self):
        real = self.runner.launcher.start

        def start(*args):
            self.runner.kill(job, True)
            return real(*args)
        job = tc.Job(("r", 1, 1), {"cmd": "sleep 1000"})
        with mock.patch.object(self.runner.launcher, "start", start):
            self.start_job(job)
            self.assertEqual(self.result(job).signal, signal.SIGKILL)
        self.assertFalse(self.runner.processes)

    def test_close_kills_what_runs(self):
        self.start(f"echo $$ > {self.dir}/pid; sleep 1000")
        pid = self.wait_for_file("pid")
        self.runner.close()
        self.assert_gone(pid)

    def test_close_kills_what_is_just_being_started(self):
        real = self.runner.launcher.start

        def start(*args):
            process = real(*args)
            closer.start()
            while not self.runner.closing:
                time.sleep(0.001)
            return process
        closer = threading.Thread(target=self.runner.close)
        with mock.patch.object(self.runner.launcher, "start", start):
            job = self.start("sleep 1000")
            self.assertEqual(self.result(job).signal, signal.SIGKILL)
        closer.join(PATIENCE)

    def test_without_threads_commands_are_handed_back(self):
        with mock.patch.object(tc.threading.Thread, "start",
                               side_effect=RuntimeError("can't start")):
            self.assertTrue(self.result(self.start("true")).requeue)
        self.assertEqual(self.run_one("echo a"), (0, b"a\n"))

    def test_what_was_written_before_the_end_is_read_however_late(self):
        with mock.patch.object(tc, "OUTPUT_GRACE", -1):  # as if we had been stopped meanwhile
            for size in (1, 60000):
                self.assertEqual(self.run_one(f"head -c {size} /dev/zero"), (0, b"\0" * size))

    def reader(self, pipe):
        """An OutputReader of a command that has just ended, with this pipe."""
        child = subprocess.Popen("true")
        self.addCleanup(child.wait)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        process = tc.Process(child.pid)
        process.pipes = (pipe,)
        job = tc.Job(("r", 1, 1), {"cmd": "true"})
        return tc.OutputReader(self.runner, job, process, tc.Output(limit=10), time.monotonic())

    @unittest.skipUnless(sys.platform == "linux", "not Linux")
    def test_a_pipe_is_read_to_its_end_and_closed(self):
        ours, theirs = os.pipe()
        fcntl.fcntl(theirs, tc.F_SETPIPE_SZ, tc.LARGE_PIPE)
        os.write(theirs, b"x" * 700_000)
        os.close(theirs)
        reader = self.reader(ours)
        with mock.patch.object(tc, "OUTPUT_GRACE", -1):  # as if we had been stopped meanwhile
            reader.read_until_end()
            reader.read_rest()
        self.assertEqual(reader.output.kept + reader.output.dropped, 700_000)
        self.assertRaises(OSError, os.fstat, ours)

    @unittest.skipUnless(sys.platform == "linux", "not Linux")
    def test_a_pipe_into_which_somebody_writes_for_ever_is_closed(self):
        endless = os.open("/dev/zero", os.O_RDONLY)
        reader = self.reader(endless)
        with mock.patch.object(tc, "OUTPUT_GRACE", 2 * PATIENCE):
            reader.read_rest()
        self.assertGreater(reader.output.dropped, tc.PIPE_SIZE)
        self.assertRaises(OSError, os.fstat, endless)

    def test_full_disk_is_a_failed_command(self):
        for limit in (0, 30000, 66000, 200000):
            def room(file, data, offset, limit=limit):
                if offset + len(data) > limit:
                    raise OSError(28, "No space left on device")
                os.pwrite(file.fileno(), data, offset)
            with mock.patch.object(tc, "write_all", room):
                exit_record = self.result(self.start(f"head -c 300000 /dev/zero; true {limit}"))
            self.assertEqual(exit_record.exitcode, tc.NOT_RUN)
            self.assertIn("No space left", exit_record.reason)
            output = exit_record.output
            self.assertEqual(len(output.read(0, 10**9)), output.size)
            self.assertLessEqual(output.size, max(limit, tc.INLINE))

    def test_what_the_machine_lacks_for_a_moment_is_tried_again(self):
        real, tries = self.runner.launcher.start, []

        def start(*args):
            tries.append(1)
            if len(tries) < 3:
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            return real(*args)
        with mock.patch.object(self.runner.launcher, "start", start), \
                mock.patch.object(tc, "SPAWN_DELAYS", (0.001, 0.001)):
            self.assertEqual(self.run_one("echo a"), (0, b"a\n"))

    def test_a_command_that_was_killed_while_the_machine_lacked_something_is_not_tried_again(self):
        job = tc.Job(("r", 1, 1), {"cmd": "true"})
        tries = []

        def start(*args):
            tries.append(self.runner.kill(job, len(tries) > 0))
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        with mock.patch.object(self.runner.launcher, "start", start):
            self.start_job(job)
            self.assertTrue(self.result(job).requeue)
        self.assertEqual(len(tries), 1)

    def test_what_the_machine_lacks_for_long_is_handed_back(self):
        for number in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            def start(*args, number=number):
                raise OSError(number, os.strerror(number))
            with mock.patch.object(self.runner.launcher, "start", start), \
                    mock.patch.object(tc, "SPAWN_DELAYS", (0.001, 0.001)):
                exit_record = self.result(self.start(f"echo {number}"))
            self.assertTrue(exit_record.requeue)
            self.assertIn(os.strerror(number), exit_record.reason)

    def test_a_limited_output_is_cut_with_a_mark_but_read_to_its_end(self):
        for limit, size in ((10, 1000), (70000, 300000)):
            exit_record = self.result(self.start(
                f"head -c {size} /dev/zero; touch {self.dir}/ended", limit=limit))
            output = exit_record.output.read(0, exit_record.output.size)
            self.assertEqual(output, b"\0" * limit + tc.cut_mark(limit, size).encode())
            self.assertTrue(os.path.exists(f"{self.dir}/ended"))

    def test_outputs_around_the_limit_for_memory(self):
        for size in (0, 1, tc.INLINE - 1, tc.INLINE, tc.INLINE + 1, 3 * tc.INLINE):
            for step in (1000, 65536):
                output, data = tc.Output(), os.urandom(size)
                for at in range(0, size, step):
                    output.write(data[at:at + step])
                self.assertEqual((output.size, output.read(0, size + 5)), (size, data))
                self.assertEqual(output.read(size // 2, 7), data[size // 2:size // 2 + 7])
                self.assertEqual(output.read(size + 10, 7), b"")
                output.close()

    def bring(self, cmd, *returns, cwd="", **more):
        """Run a command in self.dir, and return the record, its output and its files: each is
        (mode, data), or None."""
        cwd = os.path.join(self.dir, cwd)
        job = tc.Job(("r", next(self.ids), 1), {"cmd": cmd, "cwd": cwd, "return": returns, **more})
        job.top = self.dir
        self.start_job(job)
        record = self.result(job)
        output, files, at = record.output, [], record.output.size
        for row in record.returned:
            files.append((row[0], output.read(at, row[1])) if row else None)
            at += row[1] if row else 0
        self.assertEqual(output.total, at)
        return record, output.read(0, output.size), files

    def test_files_of_a_command_come_after_its_output(self):
        big = os.urandom(3 * tc.CHUNK_SIZE + 7)
        with open(os.path.join(self.dir, "made"), "wb") as file:
            file.write(big)
        made = "mkdir -p d; cp made d/big; echo x > small; chmod 4750 small; : > empty; echo out"
        for split in (False, True):
            record, output, files = self.bring(
                f"{made}; exit 3", "small", "d/big", "nothing", "empty", "d/../small", split=split)
            self.assertEqual(record.exitcode, 3)
            self.assertEqual(record.reason, "")
            self.assertEqual(output[-4:], b"out\n")
            self.assertEqual(files[0], (0o750, b"x\n"))
            self.assertTrue(files[1][1] == big)
            self.assertEqual(files[2:], [None, (files[3][0], b""), (0o750, b"x\n")])
        record, output, files = self.bring("cat ../made", "../small", cwd="d", limit=10)
        self.assertEqual(output, big[:10] + tc.cut_mark(10, len(big)).encode())
        self.assertEqual(files, [(0o750, b"x\n")])

    def test_only_regular_files_of_the_workspace_come_back(self):
        outside = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, outside)
        record, _, files = self.bring(f"echo secret > {outside}/f", "../../etc/passwd",
                                      f"{outside}/f", "", ".", "a\0b")
        self.assertEqual((files, record.reason), ([None] * 5, ""))
        server = socket.socket(socket.AF_UNIX)
        self.addCleanup(server.close)
        server.bind(os.path.join(self.dir, "socket"))
        os.mkdir(os.path.join(self.dir, "directory"))
        for make, path, why in (
                (f"ln -s {outside} link", "link/f", "there is a link in its path"),
                (f"ln -s {outside}/f alias", "alias", "there is a link in its path"),
                ("ln -s directory inside; echo x > inside/f", "inside/f", "there is a link in its"),
                ("echo > file", "file/f", "there is a link in its path, or a file in place of a"),
                ("mkfifo fifo", "fifo", "it is no regular file"),
                ("true", "directory", "it is no regular file"),
                ("true", "socket", os.strerror(errno.ENXIO)),
                ("true", "x" * 300, os.strerror(errno.ENAMETOOLONG))):
            record, _, files = self.bring(make, path)
            self.assertEqual((record.exitcode, files), (0, [None]), path)
            self.assertIn(f"{path[:80]}", record.reason)
            self.assertIn(f" does not come back: {why}", record.reason)

    def test_what_an_older_command_left_is_no_file_of_one_that_fails(self):
        for make, exitcode, there in (("echo 1 > f", 1, True), ("exit 1", 1, False),
                                      ("true", 0, True),  # as make, when all is up to date
                                      ("touch f; kill -9 $$", 137, True)):
            record, _, files = self.bring(make + f"; exit {exitcode}", "f")
            self.assertEqual((record.exitcode, record.reason), (exitcode, ""))
            self.assertEqual(files[0] is not None, there, make)

    def test_a_command_that_did_not_start_has_no_files(self):
        with open(os.path.join(self.dir, "old"), "w") as file:
            file.write("x")
        record, _, files = self.bring("true", "old", cwd="gone")
        self.assertEqual((record.exitcode, files), (tc.NOT_RUN, []))
        job = tc.Job(("r", 1, 1), {"cmd": "true", "return": ["old"]})  # no workspace
        self.start_job(job)
        self.assertEqual(self.result(job).returned, [[]])

    def test_a_file_for_which_there_is_no_room_does_not_change_the_command(self):
        with mock.patch.object(tc.Output, "append_file", side_effect=OSError(28, "No space left")):
            record, output, files = self.bring("echo x | tee f", "f")
        self.assertEqual((record.exitcode, output, files), (0, b"x\n", [None]))
        self.assertEqual(record.reason, "f does not come back: No space left")

    def test_usable_cpus(self):
        self.assertGreaterEqual(tc.usable_cpus(), 1)
        self.assertLessEqual(tc.usable_cpus(), os.cpu_count())

    def test_cgroup_quotas(self):
        def put(path, text):
            path = os.path.join(self.dir, path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(text)
            return path
        own = put("own", "0::/a/b\n1:name=systemd:/x\n4:cpu,cpuacct:/c\n5:cpuset:/c\n")
        put("fs/a/cpu.max", "250000 100000\n")
        put("fs/a/b/cpu.max", "max 100000\n")
        put("fs/cpu,cpuacct/c/cpu.cfs_quota_us", "300000\n")
        put("fs/cpu,cpuacct/c/cpu.cfs_period_us", "100000\n")
        put("fs/cpu,cpuacct/cpu.cfs_quota_us", "-1\n")
        put("fs/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
        put("fs/cpuset/c/cpu.cfs_quota_us", "100000\n")  # of another controller
        put("fs/cpuset/c/cpu.cfs_period_us", "100000\n")
        self.assertEqual(tc.cgroup_quotas(os.path.join(self.dir, "fs"), own), [2.5, 3.0])
        self.assertEqual(tc.cgroup_quotas("/nowhere", "/nowhere"), [])


class PortableRunnerTest(RunnerTest):
    """The same where libc has no posix_spawn() that we can use."""

    def setUp(self):
        patch = mock.patch.object(tc, "Spawner", side_effect=AttributeError)
        patch.start()
        self.addCleanup(patch.stop)
        super().setUp()


# === Workspaces =======================================================================


OS_OPEN, OS_WRITE = os.open, os.write  # which the tests replace


class Killed(BaseException):
    """Stands for SIGKILL."""


class Synced:
    """Brings trees to workspaces: a client and its worker without the network."""

    def __init__(self, directory, limit=10**12, chunk=tc.CHUNK_SIZE):
        self.events = queue.Queue()
        self.space = tc.Workspaces(limit, lambda run, event: self.events.put(event), directory)
        self.chunk = chunk
        self.fetched = 0

    def tree(self, files, **head):
        """Of {path: (mode, content[, mtime])}, {path: mode} for a directory, {path: target}."""
        entries = []
        self.contents = {}
        for path, what in files.items():
            if isinstance(what, int):
                entries.append(directory_entry(path, what))
            elif isinstance(what, str):
                entries.append(link_entry(path, what))
            else:
                entries.append(file_entry(path, what[1], what[0], *what[2:]))
                self.contents[path] = what[1]
        return tc.make_tree({"origin": "me", "name": "demo", **head}, entries)

    def bytes_of(self, tree, spans):
        return b"".join(self.contents[tree.entries[index].path][offset:offset + size]
                        for index, offset, size in tree.pieces_of(spans))

    def event(self):
        return self.events.get(timeout=PATIENCE)

    def begin(self, tree, run):
        """Return the first event that needs an answer other than the manifest."""
        self.space.find(run, tree.id)
        event = self.event()
        if isinstance(event, tc.TreeUnknown):
            self.space.fill(run, tree.manifest)
            event = self.event()
        return event

    def sync(self, files, run="0" * 32, **head):
        """Return the last event."""
        tree = self.tree(files, **head)
        event = self.begin(tree, run)
        self.fetched = 0
        if not isinstance(event, tc.TreePlanned):
            return event
        self.put_all(tree, event.spans, run)
        while isinstance(event, (tc.TreePlanned, tc.TreeStored)):
            event = self.event()
        return event

    def put_all(self, tree, spans, run):
        for offset, size in spans:
            for start in range(offset, offset + size, self.chunk):
                part = [(start, min(self.chunk, offset + size - start))]
                data = self.bytes_of(tree, part)
                self.fetched += len(data)
                self.space.put(run, part, data)

    def release(self, run="0" * 32):
        """Wait for the thread's end, too: it measures the workspace."""
        thread = self.space.threads.get(run)
        self.space.release(run)
        event = self.event()
        while not isinstance(event, tc.TreeReleased):
            event = self.event()
        if thread:
            thread.thread.join(PATIENCE)

    def close(self):
        self.space.close()


class InStep(Synced):
    """The same in the caller's thread."""

    def __init__(self, directory):
        super().__init__(directory, chunk=7)

    def begin(self, tree, run):
        self.space.threads[run] = tc.WorkspaceThread(self.space, run)
        self.space.add_step = lambda run, step: (
            self.space.threads[run].do(functools.partial(step, self.space.threads[run])))
        return super().begin(tree, run)

    def release(self, run="0" * 32):
        self.space.threads.pop(run).leave()
        while not self.events.empty():
            self.events.get()

    def drop(self, run="0" * 32):
        """What the kernel does when a process was killed."""
        thread = self.space.threads.pop(run)
        if thread.workspace:
            thread.workspace.close_directories()
            os.close(thread.workspace.lock)
        if thread.cache:
            os.close(thread.cache.fd)
        self.events = queue.Queue()


def snapshot(top):
    """What is in a directory, as tree() has it, without times."""
    found = {}
    for folder, names, files in os.walk(top):
        for name in names + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            elif stat.S_ISDIR(status.st_mode):
                what = mode
                if mode & 0o500 != 0o500 and os.geteuid():
                    os.chmod(path, 0o700)
            elif stat.S_ISREG(status.st_mode):
                if not mode & 0o400 and os.geteuid():
                    os.chmod(path, 0o400)
                with open(path, "rb") as file:
                    what = (mode, file.read())
            else:
                what = "special"
            found[os.path.relpath(path, top)] = what
    return found


class RandomTrees:
    NAMES = ("a", "b", "a.c", "a-", "B", "x\n", "\udcff", "\u00e9")

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def content(self):
        return bytes(self.rng.choices(b"ab", k=self.rng.choice((0, 1, 2, 5, 30))))

    def tree(self):
        files = {}
        self.grow(files, "", 0)
        return files

    def grow(self, files, parent, depth):
        for name in self.rng.sample(self.NAMES, self.rng.randrange(5)):
            self.add(files, parent + name, depth)

    def add(self, files, path, depth):
        kind = self.rng.random()
        if kind < 0.4 and depth < 3:
            files[path] = self.rng.choice((0o755, 0o755, 0o700, 0o555, 0o777, 0o000))
            self.grow(files, path + "/", depth + 1)
        elif kind < 0.55:
            files[path] = self.rng.choice(("a", "../b", "/etc", "nowhere", "x\n"))
        else:
            mode = self.rng.choice((0o644, 0o755, 0o600, 0o444, 0o000))
            files[path] = (mode, self.content(), self.rng.randrange(10))

    def remove(self, files, path):
        for one in [*files]:
            if one == path or one.startswith(path + "/"):
                del files[one]

    def edit(self, files):
        """Return a tree after some edits."""
        files = dict(files)
        for _ in range(self.rng.randrange(4)):
            path = self.rng.choice([*files] or ["a"])
            what = files.get(path)
            edit = self.rng.randrange(4)
            if edit == 0 and isinstance(what, tuple):
                files[path] = (what[0], self.content(), self.rng.randrange(10))
            elif edit == 1 and what is not None:  # renamed, also to where it cannot be
                parent = self.rng.choice(["", *(f"{one}/" for one, what in files.items()
                                                if isinstance(what, int))])
                new = parent + self.rng.choice(self.NAMES)
                moved = {new + one[len(path):]: what for one, what in files.items()
                         if one == path or one.startswith(path + "/")}
                if not new.startswith(path):
                    self.remove(files, path)
                    self.remove(files, new)
                    if not parent or parent[:-1] in files:
                        files.update(moved)
            else:
                self.remove(files, path)
                self.add(files, path, path.count("/"))
        return files

    def mischief(self, top, outside, made):
        """Do what commands do. Add to `made` what they made beside the tree."""
        for _ in range(self.rng.randrange(5)):
            there = [""]
            for folder, names, files in os.walk(top):
                there += [os.path.relpath(os.path.join(folder, name), top)
                          for name in names + files]
            path = self.rng.choice(there)
            full = os.path.join(top, path)
            folder = full if os.path.isdir(full) and not os.path.islink(full) else None
            act = self.rng.randrange(10)
            if act < 3 and folder:
                name = os.path.join(path, self.rng.choice(self.NAMES + ("made", "made2")))
                if not os.path.lexists(os.path.join(top, name)):
                    made[name] = b"made " + os.fsencode(name)
                    with open(os.path.join(top, name), "wb") as file:
                        file.write(made[name])
            elif not path:
                continue
            elif act == 3 and os.path.isdir(full) and folder:
                os.chmod(full, self.rng.choice((0o777, 0o700, 0o755)))
            elif act == 4 and os.path.isfile(full) and not os.path.islink(full):
                status = os.stat(full)
                if status.st_nlink == 1:
                    os.chmod(full, 0o600)
                    with open(full, "r+b") as file:  # same size
                        file.write(b"c" * (status.st_size // 2))
                    os.utime(full, ns=(status.st_mtime_ns, status.st_mtime_ns))
                    if path in made:
                        made[path] = b"c" * (status.st_size // 2) + made[path][
                            status.st_size // 2:]
            elif act > 4:
                if folder:
                    shutil.rmtree(full)
                else:
                    os.unlink(full)
                for one in [*made]:
                    if one == path or one.startswith(path + "/"):
                        del made[one]
                if act == 5:
                    os.symlink(self.rng.choice((outside, outside + "/file", "nowhere")), full)
                elif act == 6:
                    os.mkfifo(full)
                elif act == 7:
                    os.mkdir(full)
                elif act == 8:
                    os.link(os.path.join(outside, "file"), full)


class WorkspacesTest(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp()
        self.addCleanup(self.remove, self.dir)
        self.cache = os.path.join(self.dir, "cache", "trees")

    def remove(self, path):
        subprocess.run(["chmod", "-R", "u+rwx", path], stderr=subprocess.DEVNULL)
        shutil.rmtree(path)

    def synced(self, **more):
        synced = Synced(self.cache, **more)
        self.addCleanup(synced.close)
        return synced

    def assert_synced(self, files, event):
        self.assertIsInstance(event, tc.TreeReady, event)
        self.assertEqual(snapshot(event.path), {
            path: what[:2] if isinstance(what, tuple) else what for path, what in files.items()})

    def test_only_what_is_new_is_fetched(self):
        client = self.synced(chunk=3)
        files = {"a": 0o755, "a/one": (0o644, b"one", 1), "a/two": (0o755, b"content two", 2),
                 "copy": (0o644, b"one", 3), "empty": (0o600, b""), "link": "a/one", "z": 0o700}
        self.assert_synced(files, client.sync(files))
        self.assertEqual(client.fetched, 14, "what is in the tree twice came twice")
        client.release()
        self.assert_synced(files, client.sync(files))
        self.assertEqual(client.fetched, 0)
        files["a/two"] = (0o755, b"other content", 9)
        with self.subTest("another tree in the same run"):
            self.assert_synced(files, client.sync(files))
            self.assertEqual(client.fetched, 13)
        client.release()
        del files["a"], files["a/one"], files["a/two"]
        files.update({"b": 0o700, "b/three": (0o644, b"other content", 9), "link": "nowhere"})
        with self.subTest("renamed"):
            self.assert_synced(files, client.sync(files))
            self.assertEqual(client.fetched, 0)

    def test_random_trees_and_commands_and_kills(self):
        for seed in range(int(os.environ.get("TREE_SEEDS", 150))):
            with self.subTest(seed=seed), mock.patch.object(tc, "SECOND", 1):
                self.run_random(seed, os.path.join(self.dir, str(seed)))

    def run_random(self, seed, directory):
        random_trees = RandomTrees(seed)
        rng = random_trees.rng
        os.mkdir(directory)
        outside = os.path.join(directory, "outside")
        os.mkdir(outside)
        with open(outside + "/file", "wb") as file:
            file.write(b"ab")
        untouched = snapshot(outside)
        client = InStep(os.path.join(directory, "cache"))
        files, made, trees, doubtful = random_trees.tree(), {}, [], set()
        for _ in range(6):
            trees.append(files)
            if rng.random() < 0.4:
                other = random_trees.edit(files)
                self.sync_killed(client, other, rng)
                if client.space.threads:
                    client.release()
                doubtful.update(path for path in made if not self.stays(path, other))
                made = {path: what for path, what in made.items() if path not in doubtful}
            event = client.sync(files)
            self.assertIsInstance(event, tc.TreeReady, event)
            made = {path: what for path, what in made.items() if self.stays(path, files)}
            self.compare(files, event.path, made, doubtful)
            doubtful.intersection_update(snapshot(event.path))
            self.assertEqual(snapshot(outside), untouched)
            random_trees.mischief(event.path, outside, made)
            client.release()
            files = rng.choice((random_trees.edit(files), random_trees.edit(files), files,
                                rng.choice(trees), random_trees.tree()))

    def stays(self, path, files):
        """Whether what commands made at a path is not in the way of the tree."""
        parts = path.split("/")
        return path not in files and all(
            isinstance(files.get("/".join(parts[:end]), 0), int) for end in range(1, len(parts)))

    def compare(self, files, top, made, doubtful):
        found = snapshot(top)
        for path, what in files.items():
            self.assertEqual(found.pop(path, None), what[:2] if isinstance(what, tuple) else what,
                             path)
        for path, content in made.items():
            self.assertEqual(found.pop(path, (0, b"is gone"))[1], content, path)
        for path, what in found.items():  # directories and links of commands, and hard links
            self.assertTrue(isinstance(what, (int, str)) or what[1] in (b"ab", b"")
                            or path in doubtful, (path, what))

    def sync_killed(self, client, files, rng):
        """Sync, and be killed at one of the first changes."""
        left = rng.randrange(40)
        with contextlib.ExitStack() as patches:
            for name in ("open", "mkdir", "rename", "unlink", "rmdir", "symlink", "write",
                         "fchmod", "chmod", "utime"):
                def change(*args, call=getattr(os, name), **more):
                    nonlocal left
                    left -= call is not OS_OPEN or bool(args[1] & os.O_CREAT)
                    if left < 0:
                        if call is OS_WRITE and left == -1 and rng.random() < 0.5:
                            call(args[0], args[1][:len(args[1]) // 2])
                        raise Killed
                    return call(*args, **more)
                patches.enter_context(mock.patch.object(tc.os, name, change))
            with contextlib.suppress(Killed):
                client.sync(files)
                return
        client.drop()


# === Client ===========================================================================


class RetryPolicyTest(unittest.TestCase):
    def command(self, *tries):
        """A command with these tries: (exit code, host)."""
        command = tc.Command(1, "a", "/")
        command.tries = {n: tc.Try(*one) for n, one in enumerate(tries, 1)}
        return command

    def learn(self, policy, *tries):
        command = self.command(*tries)
        found = policy.learn(tc.verdict_of([*command.tries.values()], policy.excluded),
                             [*command.tries.values()])
        policy.check()
        return found

    def test_where_a_command_is_tried_next(self):
        elsewhere, again, others = {"not_on": "h"}, {"on": "h"}, {"never_on": ["h"]}
        for most, tries, constraints in (
                (3, [(0, "h")], None), (1, [(1, "h")], None), (0, [(1, "h")], None),
                (3, [(1, "h")], elsewhere), (3, [(1, "h"), (1, "i")], again),
                (3, [(1, "h"), (1, "i"), (1, "h")], None),
                (4, [(1, "h"), (1, "i"), (1, "h")], elsewhere),
                (2, [(1, "h"), (0, "i")], None),  # there is no try left for a recheck
                (3, [(1, "h"), (0, "i")], again), (3, [(1, "h"), (0, "h")], None),
                (5, [(1, "h"), (1, "i"), (1, "h"), (0, "i")], None),  # the first host failed twice
                (1, [(127, "h")], None), (0, [(127, "h")], others), (3, [(126, "h")], others),
                (0, [(127, "i"), (127, "h")], {"never_on": ["h", "i"]}),
                (0, [(127, "h")] * tc.START_HOSTS, None),
                (3, [(127, "h"), (1, "i")], {"not_on": "i"}),  # the first that could start it
                (3, [(127, "h"), (1, "i"), (0, "h")], {"on": "i"}),
                (3, [(127, "i"), (1, "h"), (1, "i"), (1, "h")], None)):
            found = tc.RetryPolicy(most).next_constraints(self.command(*tries))
            self.assertEqual(found, constraints, tries)

    def test_a_pass_is_not_rechecked_on_an_excluded_host(self):
        policy = tc.RetryPolicy(3)
        policy.excluded.add("h")
        self.assertIsNone(policy.next_constraints(self.command((1, "h"), (0, "i"))))
        self.assertEqual(policy.next_constraints(self.command((1, "i"), (0, "j"))), {"on": "i"})

    def test_when_no_host_is_left_that_may_start_it_retries_follow(self):
        command = self.command((127, "h"))
        command.gave_up_waiting = True
        self.assertEqual(tc.RetryPolicy(3).next_constraints(command), {"not_on": "h"})
        self.assertIsNone(tc.RetryPolicy(0).next_constraints(command))

    def test_verdicts(self):
        for verdict, excluded, *tries in (
                (tc.OK, (), (0, "h")), (tc.FAIL, (), (1, "h")), (tc.FAIL, (), (127, "h")),
                (tc.OK, (), (127, "h"), (0, "i")), (tc.FLAKY, (), (1, "h"), (0, "i")),
                (tc.ONLY, ("h",), (1, "h"), (0, "i")), (tc.ONLY, (), (1, "h"), (0, "i"), (1, "h")),
                (tc.FLAKY, (), (1, "h"), (0, "h"), (1, "h")),
                (tc.FLAKY, ("h",), (1, "h"), (1, "i"), (0, "i"))):
            command = self.command(*tries)
            self.assertEqual(tc.verdict_of([*command.tries.values()], excluded), verdict, tries)

    def test_a_host_that_alone_fails_commands_is_excluded_once(self):
        policy, tries = tc.RetryPolicy(3), [(1, "h"), (0, "i"), (1, "h")]
        for _ in range(tc.EXCLUDE_AFTER - 1):
            self.assertEqual(self.learn(policy, *tries), {})
            self.learn(policy, (0, "h"))  # it need not fail all in a row
        self.assertEqual(self.learn(policy, *tries),
                         {"h": "failed there, twice each, and nowhere else"})
        self.assertEqual(self.learn(policy, *tries), {})
        self.assertEqual(policy.failed_only_on, {"h": tc.EXCLUDE_AFTER + 1})

    def test_flaky_commands_exclude_nothing(self):
        policy = tc.RetryPolicy(3)
        for _ in range(2 * tc.EXCLUDE_AFTER):
            self.learn(policy, (1, "h"), (0, "i"))
            self.learn(policy, (1, "h"), (1, "i"), (0, "h"))
        self.assertEqual((policy.excluded, policy.failed_only_on), (set(), {}))

    def test_a_host_that_starts_nothing_is_excluded_if_others_could(self):
        policy = tc.RetryPolicy(0)
        for _ in range(2 * tc.EXCLUDE_AFTER):
            self.learn(policy, (127, "h"), (127, "i"))  # it may be the command's fault
        self.assertEqual(policy.started_elsewhere, {})
        for _ in range(tc.EXCLUDE_AFTER - 1):
            self.assertEqual(self.learn(policy, (127, "h"), (0, "i")), {})
        policy.failed_starts.pop("h")  # it started one
        for _ in range(tc.EXCLUDE_AFTER - 1):
            self.assertEqual(self.learn(policy, (127, "h"), (1, "i")), {})
        self.assertEqual([*self.learn(policy, (127, "h"), (0, "i"))], ["h"])
        self.assertEqual(policy.started_elsewhere, {"h": 2 * tc.EXCLUDE_AFTER - 1})


class HostWaitTest(unittest.TestCase):
    def setUp(self):
        self.waits = tc.HostWait()
        self.waits.can_start = {"h", "i"}
        self.command = tc.Command(1, "a", "/")
        self.command.tries = {1: tc.Try(127, "h")}
        self.window = {1: self.command}

    def test_a_command_waits_until_its_deadline_however_often_it_is_tried(self):
        self.assertTrue(self.waits.add(self.command, 5.0))
        self.waits.check(self.window)
        self.assertEqual(self.waits.hosts(), "i")
        self.waits.commands.clear()
        self.assertTrue(self.waits.add(self.command, 5.0 + tc.HOST_WAIT - 1))
        self.assertEqual(self.waits.overdue(5.0 + tc.HOST_WAIT - 1), [])
        self.assertEqual(self.waits.overdue(5.0 + tc.HOST_WAIT), [self.command])
        self.waits.commands.clear()
        self.assertFalse(self.waits.add(self.command, 5.0 + tc.HOST_WAIT))
        self.assertEqual((self.waits.commands, self.waits.can_start), ({}, {"h"}))
        self.waits.can_start.add("j")
        self.assertFalse(self.waits.add(self.command, 6.0))  # it has been given up

    def test_nothing_is_waited_for_if_all_hosts_are_unable(self):
        self.waits.can_start = {"h"}
        self.assertFalse(self.waits.add(self.command, 5.0))
        self.assertEqual(self.waits.can_start, {"h"})

    def test_a_changed_cloud_is_tried_at_once(self):
        self.waits.cloud_changed((1, 1, 1))
        self.waits.add(self.command, 5.0)
        self.assertEqual(self.waits.cloud_changed((1, 1, 1)), [])
        self.assertEqual(self.waits.cloud_changed((2, 2, 2)), [self.command])
        self.assertEqual(self.waits.cloud_changed((2, 2, 2)), [])

    def test_a_new_broker_is_given_all_the_time(self):
        self.waits.add(self.command, 5.0)
        self.waits.restart()
        self.waits.check(self.window)
        self.assertEqual(self.waits.commands, {})
        self.assertTrue(self.waits.add(self.command, 50.0))
        self.assertEqual(self.command.wait_until, 50.0 + tc.HOST_WAIT)


class RechecksTest(unittest.TestCase):
    def setUp(self):
        self.rechecks = tc.Rechecks()
        self.window = {}
        for id in (1, 2):
            command = self.window[id] = self.rechecks.commands[id] = tc.Command(id, "a", "/")
            command.provisional = {"exitcode": 0, "time": 2000.0}
        self.rechecks.check(self.window)

    def overdue(self, now, alone=True):
        return [command.id for command in self.rechecks.overdue(alone, now)]

    def test_they_have_all_the_time_while_there_is_more_to_do(self):
        self.assertEqual(self.overdue(5.0), [])
        self.assertEqual(self.rechecks.deadline, 5.0 + tc.RECHECK_WAIT)
        self.assertEqual(self.overdue(100.0, alone=False), [])
        self.assertEqual(self.rechecks.deadline, math.inf)
        self.assertEqual(self.overdue(101.0), [])
        self.assertEqual(self.overdue(101.0 + tc.RECHECK_WAIT - 0.1), [])
        self.assertEqual(self.overdue(101.0 + tc.RECHECK_WAIT), [1, 2])

    def test_a_command_that_a_worker_has_gets_three_times_as_long_as_its_pass_took(self):
        self.window[2].worker = "w"
        self.overdue(0.0)
        self.assertEqual(self.overdue(tc.RECHECK_WAIT), [1])
        self.assertEqual(self.rechecks.deadline, tc.RECHECK_WAIT + 6.0)
        del self.rechecks.commands[1]
        self.assertEqual(self.overdue(tc.RECHECK_WAIT + 5.9), [])
        self.assertEqual(self.overdue(tc.RECHECK_WAIT + 6.0), [2])


class FetcherTest(unittest.TestCase):
    def setUp(self):
        self.asked = []
        self.fetcher = tc.Fetcher(lambda command, offset, size: self.asked.append(
            (command.id, offset, size)), 4.0, live=True)
        self.window = {id: tc.Command(id, "a", "/") for id in (1, 2, 3)}
        limits = mock.patch.multiple(tc, CHUNK_SIZE=10, FETCH_AHEAD=2)
        limits.start()
        self.addCleanup(limits.stop)

    def add(self, id, size=25, now=0.0):
        self.fetcher.add(self.window[id], {"size": size}, now)
        self.fetcher.check(self.window)

    def accept(self, id, offset, size=10, now=0.0):
        taken = self.fetcher.accept_chunk(self.window[id], offset, size, now)
        self.fetcher.check(self.window)
        return taken

    def expect(self, *asked):
        self.assertEqual(self.asked, [*asked])
        self.asked.clear()

    def test_one_output_at_a_time_in_order_and_a_little_ahead(self):
        self.add(1)
        self.add(2)
        self.expect((1, 0, 10), (1, 10, 10))
        self.assertFalse(self.accept(2, 0) or self.accept(1, 10) or self.accept(3, 0))
        self.assertTrue(self.accept(1, 0))
        self.expect((1, 20, 5))
        self.assertFalse(self.accept(1, 0))  # twice
        self.assertTrue(self.accept(1, 10) and self.accept(1, 20, 5))
        self.assertEqual(self.fetcher.stored, 25)
        self.expect()
        self.fetcher.remove(self.window[1], 0.0)
        self.expect((2, 0, 10), (2, 10, 10))
        self.assertEqual(self.window[1].result, {})

    def test_what_does_not_come_is_requested_again_from_where_it_is(self):
        self.add(1, now=1.0)
        self.accept(1, 0, now=2.0)
        self.asked.clear()
        self.fetcher.tick([], 5.9)
        self.expect()
        self.fetcher.tick([], 6.0)
        self.expect((1, 10, 10), (1, 20, 5))
        self.assertEqual(self.fetcher.overdue_at, 10.0)

    def test_a_result_that_is_told_again_goes_on_and_another_one_begins_anew(self):
        self.add(1)
        self.add(1)
        self.accept(1, 0)
        self.fetcher.restart()
        self.fetcher.check(self.window)
        self.assertFalse(self.accept(1, 10))  # nobody waits for it
        self.asked.clear()
        self.add(1)
        self.expect((1, 10, 10), (1, 20, 5))
        self.fetcher.remove(self.window[1], 0.0)
        self.add(1)
        self.expect((1, 0, 10), (1, 10, 10))

    def test_files_follow_the_output_and_share_no_chunk_with_it(self):
        for result, *asked in (
                ({"size": 13, "returned": [[0, 4], [], [0, 3]]},
                 (1, 0, 10), (1, 10, 3), (1, 13, 7)),
                ({"size": 3, "stdout": "abc", "returned": [[0, 14]]}, (1, 3, 10), (1, 13, 4)),
                ({"size": 0, "stdout": "", "returned": [[0, 7]]}, (1, 0, 7)),
                ({"returned": [[0, 7]]}, (1, 0, 7))):
            command = self.window[1]
            self.fetcher.add(command, result, 0.0)
            for _, offset, size in asked:
                self.assertTrue(self.accept(1, offset, size))
            self.expect(*asked)
            self.assertEqual(self.fetcher.stored, tc.stream_size(result))
            self.fetcher.remove(command, 0.0)

    def test_another_output_takes_the_place_of_one_that_is_stored_in_part(self):
        self.add(1)
        self.accept(1, 0)
        self.fetcher.restart()
        self.add(2)
        self.accept(2, 0)
        self.fetcher.remove(self.window[2], 0.0)
        self.asked.clear()
        self.add(1)
        self.expect((1, 0, 10), (1, 10, 10))

    def test_live_output_is_requested_of_what_runs(self):
        command, passed, ended = self.window.values()
        for one in (command, passed, ended):
            self.fetcher.listen(one, 0.0)  # no worker has it yet
            one.worker = "w"
        passed.provisional, ended.result = {"exitcode": 0}, {"size": 99}
        command.shown = 7
        for one in (command, passed, ended):
            self.fetcher.listen(one, 1.0)
        self.expect((1, 7, 10))
        self.fetcher.listen(command, 2.0)
        self.asked.clear()
        self.fetcher.tick(self.window.values(), 4.9)
        self.expect()
        self.fetcher.tick(self.window.values(), 5.0)  # that may have been lost
        self.expect((1, 7, 10))
        self.assertEqual(self.fetcher.live_overdue_at, 9.0)


class ClientTest(unittest.TestCase):
    def setUp(self):
        self.client = tc.Client("r1", address="tcp://b:1")
        self.bench = b = Bench(self.client)
        b.expect("HELLO", run="r1", join=1, unreported=[])

    def join(self, number=1, slots=2, workers=1):
        self.bench.hear(tc.encode("OK", {"join": number, "slots": slots, "workers": workers}))

    def add(self, *cmds, end=False):
        for cmd in cmds:
            self.client.add(cmd, "/d")
        self.client.settle()
        if end:
            self.client.end_input(self.bench.now)
        self.bench.collect()

    def expect_done(self, *tasks):
        self.bench.quiet()
        self.bench.wait(tc.DONE_DELAY)
        self.bench.expect("DONE", tasks=list(tasks))
        self.bench.quiet()

    def result(self, id, attempt=1, exitcode=0, **more):
        self.bench.hear(tc.encode("RESULT", dict(
            {"id": id, "attempt": attempt, "exitcode": exitcode, "stdout": "", "size": 0,
             "time": 1}, **more)))

    def test_who_has_nothing_to_run_says_goodbye_before_it_is_answered(self):
        self.client.end_input(0.0)
        self.bench.collect()
        self.bench.expect("BYE")
        self.assertEqual(self.bench.effect(tc.Exit).status, 0)

    def add_returning(self, *returns, **options):
        """Begin a run with a command that brings files back."""
        self.client = tc.Client("r1", options=tc.RunOptions(**options))
        self.bench = Bench(self.client)
        self.join()
        self.client.add("a", "sub", returns)
        self.client.end_input(0.0)
        self.bench.collect()
        self.bench.effects = [effect for effect in self.bench.effects
                              if type(effect) is not tc.RunStarted]
        self.bench.expect("HELLO")
        return self.bench

    def test_files_come_inline_before_their_result(self):
        b = self.add_returning("f", "gone", "../g")
        b.expect("{", **{"return": ["f", "gone", "../g"]})
        rows = [[0o644, 2], [], [0o600, 3]]
        self.result(1, stdout="outFFGGG", size=3, returned=rows, host="h")
        part, end = b.effect(tc.ReturnedPart), b.effect(tc.FinalResult)
        self.assertEqual((part.command, part.attempt, part.rows, part.offset, part.data),
                         (end.command, 1, rows, 0, b"FFGGG"))
        self.assertEqual((end.output, end.result["returned"]), (b"out", rows))

    def test_large_files_are_fetched_after_their_output(self):
        for inline in (True, False):
            size = 3 if inline else tc.INLINE + 1
            output, files = b"o" * size, b"f" * (tc.CHUNK_SIZE + 5)
            b = self.add_returning("f", "g")
            b.lines.clear()
            rows = [[0o644, tc.CHUNK_SIZE], [0o600, 5]]
            more = {"stdout": output.decode()} if inline else {}
            self.result(1, size=size, returned=rows, host="h", **more)
            if not inline:
                b.expect("FETCH", offset=0, size=size)
            b.expect("FETCH", offset=size, size=tc.CHUNK_SIZE)
            b.expect("FETCH", offset=size + tc.CHUNK_SIZE, size=5)
            if not inline:
                b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=output)
                self.assertEqual(b.effect(tc.FetchedOutput), (0, output))
            for at, data in ((0, files[:-5]), (tc.CHUNK_SIZE, files[-5:])):
                b.quiet()
                b.hear(f'CHUNK {{"id":1,"attempt":1,"offset":{size + at}}}', data=data)
                part = b.effect(tc.ReturnedPart)
                self.assertEqual((part.attempt, part.rows, part.offset, part.data),
                                 (1, rows, at, data))
            end = b.effect(tc.FinalResult)
            self.assertEqual(end.output, output if inline else None)
            self.assertEqual(b.effect(tc.Exit).status, 0)

    def test_a_try_that_is_not_reported_brings_no_files(self):
        b = self.add_returning("f", tries=2)
        b.lines.clear()
        self.result(1, 1, 1, stdout="why", size=3, returned=[[0o644, 2**40]], host="h1")
        command = b.expect("{", attempt=2, **{"return": ["f"]}) and self.client.window[1]
        self.assertEqual(command.tries[1].output, b"why")
        b.quiet()
        self.result(1, 2, 1, stdout="whyF", size=3, returned=[[0o644, 1]], host="h2")
        self.assertEqual(b.effect(tc.ReturnedPart).attempt, 2)
        self.assertEqual(b.effect(tc.FinalResult).output, b"why")

    def test_a_pass_that_is_rechecked_keeps_its_files(self):
        b = self.add_returning("f", tries=3)
        b.lines.clear()
        self.result(1, 1, 1, stdout="whyF", size=3, returned=[[0o644, 1]], host="h1")
        b.expect("{", attempt=2)
        self.result(1, 2, 0, stdout="okG", size=2, returned=[[0o644, 1]], host="h2")
        self.assertEqual(b.effect(tc.ReturnedPart)[1:], (2, [[0o644, 1]], 0, b"G"))
        b.effect(tc.ProvisionalResult)
        b.expect("{", attempt=3, **{"return": None})
        self.result(1, 3, 1, host="h1")
        end = b.effect(tc.FinalResult)
        self.assertEqual((end.result["attempt"], end.provisional), (2, True))

    def test_a_path_that_leads_out_is_not_run(self):
        for path in ("../../f", "/f", "..", "a\0b"):
            b = self.add_returning("fine", path)
            end = b.effect(tc.FinalResult)
            self.assertEqual(end.result["exitcode"], tc.NOT_RUN)
            self.assertIn(f"--return {tc.printable(path)} is no file below", end.result["reason"])
            self.assertEqual(b.effect(tc.Exit).status, 1)
            self.assertNotIn("{", [verb for _, verb, _ in b.lines])

    def test_a_missing_file_fails_its_command_if_asked_for(self):
        for exitcode, rows, reason, found in (
                (0, [[], [6, 0]], "", (1, "it did not make f (--fail-on-missing)")),
                (0, [[6, 0], []], "g does not come back: x", (1, "g does not come back: x")),
                (3, [[], []], "", (3, "it did not make f (--fail-on-missing)")),
                (0, [[6, 0], [6, 0]], "", (0, "")), (0, [], "", (0, ""))):
            b = self.add_returning("f", "g", fail_on_missing=True)
            self.result(1, exitcode=exitcode, returned=rows, reason=reason, host="h")
            end = b.effects[-2]
            self.assertEqual((end.result["exitcode"], end.result["reason"]), found)
            self.assertEqual(b.effects[-1].status, int(found[0] > 0))

    def test_odd_files_of_a_worker_do_no_harm(self):
        for more in ({"returned": [[1, 2]]}, {"returned": [[1, 2]], "stdout": ""},
                     {"returned": [[1, 2**53]] * 3},
                     {"returned": [[1, 2], [1, 3]], "stdout": "abcdefg"},
                     {"returned": [[], [], []], "size": 5, "stdout": "x"},
                     {"returned": [[1, 0]], "size": 2**53}):
            for returns in ((), ("f",), ("f", "g")):
                b = self.add_returning(*returns)
                b.hear(tc.encode("RESULT", {"id": 1, "attempt": 1, "exitcode": 0, **more}))
                for offset, data in ((0, b"x" * 2**20), (2**20, b"y"), (2**20 + 1, b"z")):
                    b.hear(f'CHUNK {{"id":1,"attempt":1,"offset":{offset}}}', data=data)

    def test_a_reported_command_is_not_lost_when_its_worker_is(self):
        b = self.bench
        self.join()
        self.add("a", "b", end=True)
        b.lines.clear()
        b.effects.clear()
        self.result(1)
        b.effect(tc.FinalResult)
        b.hear('LOST {"tasks":[[1,1]],"why":"worker w is gone","fault":"crash","worker":"w"}')
        self.expect_done([1, 1])
        self.result(2)
        self.assertEqual((b.effect(tc.FinalResult).command.id, b.effect(tc.Exit).status), (2, 0))
        self.assertEqual((self.client.reported, self.client.failed), (2, 0))

    def test_who_was_stopped_for_longer_than_its_lease_is_told_what_runs_again(self):
        """But not of commands whose results had come before."""
        for ended, said in ((1, "1 command will"), (2, "")):
            self.setUp()
            b = self.bench
            self.add("a", "b")
            b.hear('OK {"join":1,"slots":2,"patience":30}')
            b.hear('QUEUED {"tasks":[[1,1],[2,1]],"worker":"w"}')
            self.client.paused(40.0, 60.0)
            b.collect()
            b.effects.clear()
            for id in range(1, ended + 1):
                self.result(id)
                b.effects.clear()
            b.hear("WHO")
            b.hear('OK {"join":2,"slots":2,"patience":30}')
            told = [effect.text for effect in b.effects if type(effect) is tc.Notice]
            self.assertEqual(len(told), bool(said), told)
            for text in told:
                self.assertRegex(text, f"stopped for 40 s.* {said}")

    def test_a_rejoin_long_after_a_stop_is_not_taken_for_its_end(self):
        b = self.bench
        self.add("a")
        b.hear('OK {"join":1,"slots":1,"patience":30}')
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        self.client.paused(40.0, b.now)
        b.wait(31)
        b.effects.clear()
        self.client.connected(BROKER, b.now)
        b.hear(tc.encode("OK", {"join": self.client.session.number, "slots": 1}))
        self.assertFalse([effect for effect in b.effects
                          if type(effect) is tc.Notice and "stopped" in effect.text])

    def test_hosts_of_one_name_are_two(self):
        """The broker is told identities, people a name for each."""
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3))
        b = self.bench = Bench(self.client)
        self.join()
        self.add("a", end=True)
        b.lines.clear()
        b.effects.clear()
        self.result(1, exitcode=1, host="vm/aa", worker="w1")
        b.expect("{", id=1, attempt=2, not_on="vm/aa")
        self.result(1, attempt=2, host="vm/bb", worker="w2")
        b.expect("{", id=1, attempt=3, on="vm/aa")
        b.lines.clear()
        b.effects.clear()
        self.result(1, attempt=3, exitcode=1, host="vm/aa", worker="w1")
        report = b.effect(tc.FinalResult)
        self.assertEqual(report.command.verdict, tc.ONLY)
        self.assertEqual([row.host for row in report.command.tries.values()], ["vm", "vm~2", "vm"])
        names = tc.HostNames()
        self.assertEqual([names.name_of(one) for one in ("vm~2", "vm/a", "vm/b", "vm/a", "a b",
                                                         "x/y/z")],
                         ["vm~2", "vm", "vm~3", "vm", "a b", "x/y"])

    def test_a_run(self):
        b = self.bench
        self.add("a", "b", end=True)
        b.quiet()
        self.join()
        self.assertEqual(b.effect(tc.RunStarted).commands, 2)
        b.expect("{", id=1, attempt=1, cmd="a", cwd="/d", again=None)
        b.expect("{", id=2)
        b.hear('QUEUED {"tasks":[[1,1],[2,1]],"worker":"w"}')
        self.result(2, stdout="x", size=1)
        report = b.effect(tc.FinalResult)
        self.assertEqual((report.command.cmd, report.output), ("b", b"x"))
        self.result(1, exitcode=5)
        b.effect(tc.FinalResult)
        b.expect("DONE", tasks=[[2, 1], [1, 1]])
        b.expect("BYE")
        self.assertEqual(b.effect(tc.Exit).status, 1)
        b.quiet()

    def test_input_that_goes_on_is_sent_as_it_comes(self):
        b = self.bench
        self.join()
        self.add("a")
        b.expect("{", id=1)
        b.quiet()
        b.wait(tc.ANNOUNCE_DELAY)
        self.assertIsNone(b.effect(tc.RunStarted).commands)
        self.result(1)
        b.effect(tc.FinalResult)
        self.expect_done([1, 1])

    def test_the_number_of_commands_is_told_if_the_input_ends_soon(self):
        b = self.bench
        self.join()
        self.add("a")
        self.add("b", end=True)
        self.assertEqual(b.effect(tc.RunStarted).commands, 2)

    def test_no_result_is_told_before_the_commands_are_announced(self):
        b = self.bench
        self.join()
        self.add("a")
        self.result(1)
        self.assertIsNone(b.effect(tc.RunStarted).commands)
        b.effect(tc.FinalResult)

    def test_a_command_too_long_for_the_wire_fails_at_once(self):
        b = self.bench
        self.join()
        self.add("x" * (tc.MAX_COMMAND + 1), "\udcff" * 100_000, '"' * 300_000, "a", end=True)
        b.effect(tc.RunStarted)
        for _ in range(3):
            self.assertIn("at most", b.effect(tc.FinalResult).result["reason"])
        b.expect("{", id=4)

    def test_the_longest_commands_are_not_too_long_for_the_broker(self):
        self.join()
        self.add("x" * (tc.MAX_COMMAND - tc.OTHER_FIELDS - 50), end=True)
        command = self.client.window[1]
        command.avoid = command.worker = "w" * 200
        self.client.submit(command)
        frames, _ = self.client.take()
        self.assertGreater(len(frames[0].body), tc.MAX_COMMAND - tc.OTHER_FIELDS)
        self.assertLess(len(frames[0].body), tc.MAX_COMMAND)

    def test_no_commands_no_wait(self):
        self.client.end_input(0.0)
        self.bench.collect()
        self.assertEqual(self.bench.effect(tc.Exit).status, 0)

    def test_the_window_bounds_what_is_at_the_broker(self):
        b = self.bench
        with mock.patch.object(tc, "WINDOW", 3):
            self.join()
            self.add(*"abcdef")
            self.assertEqual(len(b.lines), 3)
            b.lines.clear()
            self.result(2)
            b.expect("{", id=4)

    def test_the_window_is_filled_again_when_a_part_of_it_is_free(self):
        b = self.bench
        self.join()
        self.add(*map(str, range(2 * tc.WINDOW)))
        self.assertEqual(len(b.lines), tc.WINDOW)
        b.lines.clear()
        for id in range(1, tc.WINDOW // 16):
            self.result(id)
        self.assertEqual({verb for _, verb, _ in b.lines}, {"DONE"})
        b.lines.clear()
        self.result(tc.WINDOW // 16)
        self.assertEqual([verb for _, verb, _ in b.lines].count("{"), tc.WINDOW // 16)

    def test_done_waits_for_others_but_not_for_many(self):
        b = self.bench
        self.join()
        self.add(*map(str, range(100)))
        b.lines.clear()
        for id in range(1, tc.MAX_DONE):
            self.result(id)
        self.assertEqual(b.lines, [])
        self.result(tc.MAX_DONE)
        b.expect("DONE", tasks=[[id, 1] for id in range(1, tc.MAX_DONE + 1)])
        self.result(99)
        b.wait(tc.DONE_DELAY / 2)
        self.client.disconnected(BROKER, b"", b.now)
        b.wait(1)  # it must not spin
        self.client.connected(BROKER, b.now)
        b.collect()
        b.lines.clear()
        b.hear('OK {"join":2,"slots":2,"workers":1}')
        self.assertEqual(b.lines.pop(), ("", "DONE", {"tasks": [[99, 1]]}))

    def test_after_a_new_broker_all_unreported_is_submitted_again(self):
        b = self.bench
        self.join()
        self.add("a", "b", "c", end=True)
        b.hear('QUEUED {"tasks":[[1,1],[2,1]],"worker":"w"}')
        self.result(2)
        b.lines.clear()
        b.effects.clear()
        self.client.disconnected(BROKER, b"", b.now)
        self.client.connected(BROKER, b.now)
        b.collect()
        b.expect("HELLO", join=2, unreported=[1, 3])
        self.join(2)
        b.expect("{", id=1, attempt=1, again=True, had="w")
        b.expect("{", id=3, attempt=1, again=True, had=None)
        b.quiet()

    def test_lost_attempt_is_followed_by_the_next(self):
        b = self.bench
        self.join()
        self.add("a", end=True)
        b.lines.clear()
        b.effects.clear()
        b.hear('LOST {"tasks":[[1,1]],"why":"gone","fault":"crash","worker":"w"}')
        b.expect("{", id=1, attempt=2, avoid="w", again=None)
        b.hear('LOST {"tasks":[[1,1]],"why":"gone","fault":"crash","worker":"w"}')  # again: stale
        self.result(1, attempt=1)  # late: changes nothing, and need not be held any longer
        self.expect_done([1, 1])
        for attempt in (2, 3):
            b.hear(f'LOST {{"tasks":[[1,{attempt}]],"why":"gone","fault":"crash"}}')
        b.expect("{", attempt=3)
        report = b.effect(tc.FinalResult)
        self.assertEqual(report.result["exitcode"], tc.NOT_RUN)
        self.assertIn("3 workers", report.result["reason"])

    def test_what_may_have_killed_a_worker_runs_with_care(self):
        b = self.bench
        self.join()
        self.add("a")
        b.lines.clear()
        b.hear('LOST {"tasks":[[1,1]],"why":"stopped","fault":"","worker":"w"}')
        b.expect("{", attempt=2, careful=None)
        b.hear('LOST {"tasks":[[1,2]],"why":"gone","fault":"crash","worker":"w"}')
        b.expect("{", attempt=3, careful=True)

    def test_a_command_is_timed_from_its_first_confirmation(self):
        b = self.bench
        self.join()
        self.add("a")
        for b.now, worker in ((1.0, "m"), (2.0, "w")):
            b.hear(tc.encode("QUEUED", {"tasks": [[1, 1]], "worker": worker}))
            command = self.client.window[1]
            self.assertEqual((command.since, command.worker), (1.0, worker))

    def test_a_command_that_was_tried_nowhere_is_tried_again(self):
        """No broker of ours says NOWHERE of it, but what a broker says must not end the client."""
        b = self.bench
        self.join()
        self.add("a")
        b.lines.clear()
        b.hear(tc.encode("LOST", {"tasks": [[1, 1]], "why": "", "fault": tc.NOWHERE}))
        b.expect("{", attempt=2)

    def test_a_command_that_cannot_be_started_anywhere_has_failed(self):
        b = self.bench
        self.join()
        self.add("a", end=True)
        b.lines.clear()
        b.effects.clear()
        for attempt in range(1, tc.SPAWN_LIMIT + 1):
            b.hear(tc.encode("LOST", {
                "tasks": [[1, attempt]], "why": "no memory\33[2J", "fault": "spawn"}))
        self.assertRegex(b.effect(tc.FinalResult).result["reason"], r"no memory\\x1b\[2J$")

    def test_a_failing_command_is_tried_elsewhere(self):
        self.client = tc.Client("r1", options=tc.RunOptions(timeout=30, tries=3, max_output=100))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", end=True)
        b.effect(tc.RunStarted)
        b.expect("{", id=1, attempt=1, timeout=30, limit=100, avoid=None, elsewhere=None)
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        self.result(1, exitcode=3, worker="w", host="h", size=10**6)
        b.expect("{", id=1, attempt=2, timeout=30, limit=100, avoid="w", elsewhere=True, not_on="h")
        self.expect_done([1, 1])
        self.result(1, exitcode=3, worker="w", host="h")  # late
        self.expect_done([1, 1])
        self.result(1, attempt=2, exitcode=4, worker="v", host="i")
        b.expect("{", id=1, attempt=3, avoid="v", elsewhere=True, not_on=None, on="h")
        self.result(1, attempt=3, exitcode=5)
        report = b.effect(tc.FinalResult)
        self.assertEqual(report.result["exitcode"], 5)
        self.assertEqual([row[:2] for row in report.command.tries.values()],
                         [(3, "h"), (4, "i"), (5, "?")])
        self.assertEqual(report.command.verdict, tc.FAIL)

    def test_a_shell_that_a_worker_lacks_is_looked_for_on_another_host(self):
        self.client = tc.Client("r1", options=tc.RunOptions(shell="zsh"))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", end=True)
        b.effect(tc.RunStarted)
        b.expect("{", id=1, attempt=1, shell="zsh")
        self.result(1, exitcode=126, time=0.0, ran=False, worker="w", host="h",
                    reason="this worker has no shell zsh (see --shell)")
        b.expect("{", id=1, attempt=2, shell="zsh", never_on=["h"])

    def test_what_a_failed_try_printed_last_is_kept_while_there_is_room(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", "b", "c", end=True)
        b.lines.clear()
        split = tc.PIECE_HEADER.pack(1, 2) + b"o\0" + tc.PIECE_HEADER.pack(2, 3) + b"err"
        self.client.try_room = tc.TRY_OUTPUT + 9
        for id, attempt, more, size, output in (
                (1, 1, {"stdout": "☃" * 3000}, 9000, "☃" * (tc.TRY_OUTPUT // 3)),
                (2, 1, {"stdout": tc.to_text(split), "split": True}, 5, "o\0err"),
                (3, 1, {"size": 10**6}, 10**6, ""), (3, 2, {"stdout": "no room"}, 7, " room")):
            self.result(id, attempt, 1, host="h", slot=2, time=3.5, started=9.5, **more)
            b.lines.clear()
            one = self.client.window[id].tries[attempt]
            self.assertEqual(one, tc.Try(1, "h", "", 2, 9.5, 3.5, size, output.encode()))
        self.assertEqual(self.client.try_room, 0)
        b.effects.clear()
        self.result(1, 2, host="i", stdout="passed", size=6)
        b.effect(tc.ProvisionalResult)
        self.result(1, 3, 1, host="h", stdout="x...cut", size=7)
        tries = b.effect(tc.FinalResult).command.tries.values()
        _, *others = [(one.size, one.output) for one in tries]
        self.assertEqual(others, [(0, b"")] * 2)


    def examine(self, most, *tries):
        """Have a command end so, on these hosts; where it was wanted each time, and its report."""
        self.client = tc.Client("r1", options=tc.RunOptions(tries=most))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", end=True)
        b.effect(tc.RunStarted)
        wanted = []
        for attempt, (exitcode, host) in enumerate(tries, 1):
            never = sorted({host for code, host in tries[:attempt - 1] if code in tc.CANNOT_START})
            b.expect("{", attempt=attempt, limit=1 if self.client.rechecks.commands else None,
                     never_on=never if attempt > 1 and never and most != 1 else None)
            self.result(1, attempt, exitcode, host=host, stdout=f"from {host}")
            wanted += [(fields.get("on"), fields.get("not_on"))
                       for _, verb, fields in b.lines if verb == "{"]
        reports = [effect for effect in b.effects if isinstance(effect, tc.FinalResult)]
        return wanted, reports[0] if reports else None

    def test_cross_examination(self):
        for most, tries, verdict, exitcode in [
                (3, [(0, "h")], tc.OK, 0),
                (3, [(1, "h"), (1, "i"), (1, "h")], tc.FAIL, 1),
                (3, [(1, "h"), (1, "i"), (0, "h")], tc.FLAKY, 0),
                (3, [(1, "h"), (0, "i"), (0, "h")], tc.FLAKY, 0),
                (3, [(1, "h"), (0, "i"), (1, "h")], tc.ONLY, 0),
                (3, [(1, "h"), (0, "h")], tc.FLAKY, 0),  # there is no other host
                (2, [(1, "h"), (0, "i")], tc.FLAKY, 0),  # that must do
                (5, [(1, "h"), (1, "i"), (1, "h"), (1, "j"), (0, "h")], tc.FLAKY, 0),
                (1, [(1, "h")], tc.FAIL, 1), (0, [(1, "h")], tc.FAIL, 1),
                (1, [(127, "h")], tc.FAIL, 127),  # if that is said, not even then
                (0, [(127, "h"), (0, "i")], tc.OK, 0), (0, [(126, "h"), (1, "i")], tc.FAIL, 1),
                (3, [(127, "h"), (0, "i")], tc.OK, 0)]:  # it says nothing about the command
            with self.subTest(tries):
                wanted, report = self.examine(most, *tries)
                again = [(None, "h"), ("h", None), (None, "h"), ("h", None)]
                if tries[0][0] in tc.CANNOT_START:
                    again = [(None, None)]
                self.assertEqual(wanted, again[:len(tries) - 1])
                self.assertEqual((report.command.verdict, report.result["exitcode"]),
                                 (verdict, exitcode))
                self.assertEqual(self.client.failed, exitcode > 0)
                self.assertEqual(self.client.flaky, verdict in (tc.FLAKY, tc.ONLY))

    def test_what_passed_is_kept_while_its_failure_is_looked_into(self):
        _, report = self.examine(3, (1, "h"), (0, "i"))
        self.assertIsNone(report)
        keep = self.bench.effect(tc.ProvisionalResult)
        self.assertEqual((keep.result["host"], keep.output), ("i", b"from i"))
        self.client.cancel(130, self.bench.now)
        self.bench.collect()
        self.bench.hear('LOST {"tasks":[[1,3]],"why":"cancelled"}')
        self.assertEqual(self.bench.effect(tc.FinalResult).result["host"], "i")
        self.assertEqual(self.bench.effect(tc.Exit).status, 130)

    @mock.patch.object(tc, "RECHECK_WAIT", 0.5)
    def test_what_failed_on_a_host_that_stays_busy_is_reported_when_all_else_is_done(self):
        self.examine(3, (1, "h"), (0, "i"))
        b = self.bench
        b.effect(tc.ProvisionalResult)
        b.wait(0.4)
        self.client.add("b", "/")
        self.client.end_input(b.now)  # there is more to do
        b.collect()
        b.wait(0.7)
        self.assertNotIn(tc.FinalResult, map(type, b.effects))
        self.result(2)
        b.effects.clear()
        b.wait(0.4)
        self.assertNotIn(tc.FinalResult, map(type, b.effects))
        b.effects.clear()
        b.wait(0.2)
        report = b.effect(tc.FinalResult)
        self.assertEqual((report.command.verdict, report.command.provisional["host"]),
                         (tc.FLAKY, "i"))
        self.assertEqual(b.effects[-1], tc.Exit(0))

    @mock.patch.object(tc, "RECHECK_WAIT", 0.5)
    def test_the_next_of_one_at_a_time_does_not_wait_for_a_busy_host(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3, serial=True))
        b = self.bench = Bench(self.client)
        self.join()
        self.add("a", "b")
        self.result(1, 1, 1, host="h")
        self.result(1, 2, 0, host="i")
        b.lines.clear()
        b.wait(0.6)
        self.assertEqual([f["cmd"] for _, verb, f in b.lines if verb == "{"], ["b"])

    @mock.patch.object(tc, "RECHECK_WAIT", 0.5)
    def test_what_runs_again_where_it_failed_is_waited_for(self):
        self.examine(3, (1, "h"), (0, "i"))
        b = self.bench
        b.effect(tc.ProvisionalResult)
        self.client.window[1].provisional["time"] = 1000.0  # ms: it may take as long again
        b.hear('QUEUED {"tasks":[[1,3]],"worker":"w"}')
        b.wait(1.5)
        self.result(1, 3, 1, host="h")
        self.assertEqual(b.effect(tc.FinalResult).command.verdict, tc.ONLY)

    @mock.patch.object(tc, "RECHECK_WAIT", 0.5)
    def test_what_seems_to_run_again_is_not_waited_for_without_end(self):
        """Below a chained broker it may not be running."""
        self.examine(3, (1, "h"), (0, "i"))
        b = self.bench
        b.effect(tc.ProvisionalResult)
        self.client.window[1].provisional["time"] = 500.0
        b.hear('QUEUED {"tasks":[[1,3]],"worker":"m"}')
        b.wait(1.9)
        self.assertNotIn(tc.FinalResult, map(type, b.effects))
        b.wait(0.2)
        self.assertIn(tc.FinalResult, map(type, b.effects))

    def test_what_could_not_be_started_is_reported_if_there_is_no_other_host(self):
        for how in ("no other", "interrupted"):
            wanted, report = self.examine(0, (127, "h"))
            b = self.bench
            self.assertEqual((wanted, report), ([(None, None)], None))
            self.assertEqual(b.effect(tc.ProvisionalResult).output, b"from h")
            b.expect("{", attempt=2, never_on=["h"])
            if how == "interrupted":
                self.client.cancel(130, b.now)
                b.collect()
            b.hear(tc.encode("LOST", {"tasks": [[1, 2]], "why": how, "fault": tc.NOWHERE}))
            if how == "interrupted":  # it may pass elsewhere: it has not failed
                self.assertEqual((b.effect(tc.Exit).status, self.client.stopped), (130, 1))
                continue
            report = b.effect(tc.FinalResult)
            self.assertEqual((report.provisional, report.result["exitcode"]), (True, 127))
            self.assertEqual(self.client.failed, 1)

    def test_what_could_not_be_started_is_not_forgotten_with_the_worker_that_tries_it(self):
        self.examine(0, (127, "h"))
        b = self.bench
        b.lines.clear()
        b.hear('LOST {"tasks":[[1,2]],"why":"worker w is gone","fault":"crash","worker":"w"}')
        b.expect("{", attempt=3, never_on=["h"])
        self.result(1, 3, host="i", stdout="x" * 5,
                    size=tc.INLINE + 1)  # the whole is to be fetched
        b.expect("FETCH", attempt=3)
        b.hear('LOST {"tasks":[[1,3]],"why":"its output is lost"}')
        b.effect(tc.ProvisionalResult)
        b.quiet_but("DONE", "{")
        b.hear(tc.encode("LOST", {"tasks": [[1, 4]], "why": "none", "fault": tc.NOWHERE}))
        b.quiet()  # that host may come back
        for _ in range(6):
            b.wait(2)
            b.answer(slots=2, workers=1)
        b.hear(tc.encode("LOST", {"tasks": [[1, 5]], "why": "none", "fault": tc.NOWHERE}))
        final = next(effect for effect in b.effects if isinstance(effect, tc.FinalResult))
        self.assertEqual(final.result["attempt"], 1)

    def test_what_takes_long_for_such_an_exit_code_did_start(self):
        for exitcode, ms, again in ((127, tc.START_TIME - 1, True), (127, tc.START_TIME, False),
                                    (126, 0, True), (125, 0, False)):
            self.assertEqual(tc.Try(exitcode, "h", spent=ms).did_start, not again)
        ran = tc.try_of({"exitcode": 126, "host": "h", "reason": "its output is lost", "ran": True})
        self.assertTrue(ran.did_start)

    def refuse(self, id, *hosts):
        """These hosts, one after the other, cannot start a command."""
        for attempt, host in enumerate(hosts, 1):
            self.result(id, attempt, 127, host=host, stdout=host)

    def test_hosts_are_tried_until_one_can_start_it(self):
        for able, unable, reported in (
                ((), "abc", False), ((), "abcdefgh", True), ((), "a" * tc.START_HOSTS, True),
                ("a", "ab", False), ("ab", "abc", False)):
            self.setUp()
            self.join()
            self.add(*map(str, range(1 + len(able))), end=True)
            for n, host in enumerate(able, 2):
                self.result(n, host=host)
            self.refuse(1, *unable)
            self.assertEqual(1 not in self.client.window, reported, (able, unable))
            if not reported:
                self.assertEqual(self.client.window[1].constraints["never_on"], sorted(unable))

    def test_two_bad_hosts_are_both_excluded(self):
        self.join()
        self.add(*"abc", end=True)
        for id in (1, 2, 3):
            self.refuse(id, "h2", "h3")
            self.result(id, 3, host="h1")
        self.assertEqual((self.client.retry_policy.excluded, self.client.failed), ({"h2", "h3"}, 0))

    def test_a_host_that_could_start_others_is_waited_for_a_while(self):
        for returns in (True, False):
            self.setUp()
            b = self.bench
            self.join()
            self.add("a", "b", end=True)
            self.result(1, host="h1")
            self.result(2, 1, 127, host="h2/9c", stdout="why", size=3)
            nowhere = tc.encode("LOST", {"tasks": [[2, 2]], "why": "none", "fault": tc.NOWHERE})
            b.answer(hosts=1, slots=2, workers=1)
            b.hear(nowhere)
            b.lines.clear()
            b.effects.clear()
            b.wait(tc.NOTICE_DELAY + 0.1)
            self.assertIn("waiting for h1 to come back: 1 command", b.effect(tc.Notice).text)
            if returns:
                b.answer(hosts=2, slots=4, workers=2)
                sent = [fields for _, verb, fields in b.lines if verb == "{"]
                self.assertEqual([(f["attempt"], f["never_on"]) for f in sent], [(3, ["h2/9c"])])
                self.result(2, 3, host="h1")
            else:
                b.wait(tc.HOST_WAIT - 1)
                b.answer(hosts=1, slots=2, workers=1)
                b.wait(2)
                b.hear(nowhere.replace(b"[2,2]", b"[2,%d]" % self.client.window[2].attempt))
                said = [e.text for e in b.effects if isinstance(e, tc.Notice)]
                self.assertIn("gave up waiting for h1", said)
            self.assertEqual((self.client.reported, self.client.failed), (2, int(not returns)))

    def test_hosts_that_may_not_run_it_do_not_make_it_wait_for_ever(self):
        """There are others, but without the label, say."""
        self.join()
        self.add("a", "b", end=True)
        b = self.bench
        self.result(1, host="h1")
        self.refuse(2, "h2")
        attempt, began = 2, b.now
        while 2 in self.client.window:
            self.assertLess(b.now, began + tc.HOST_WAIT + 5)
            b.lines.clear()
            b.hear(tc.encode("LOST", {
                "tasks": [[2, attempt]], "why": "", "fault": tc.NOWHERE}))
            b.wait(2)
            b.answer(hosts=9, slots=2, workers=int(b.now))
            attempt = self.client.window[2].attempt if 2 in self.client.window else 0
        self.assertGreaterEqual(b.now, began + tc.HOST_WAIT)
        self.assertEqual(self.client.failed, 1)

    def test_the_time_in_which_we_were_stopped_is_no_wait_for_a_host(self):
        self.join()
        self.add("a", "b")
        self.result(1, host="h1")
        self.refuse(2, "h2")
        self.bench.hear(tc.encode("LOST", {"tasks": [[2, 2]], "why": "", "fault": tc.NOWHERE}))
        until = self.bench.now + tc.HOST_WAIT
        self.client.paused(5.0, self.bench.now + 5.0)
        self.assertEqual(self.client.window[2].wait_until, until + 5.0)

    def test_who_joins_again_goes_on_waiting_for_a_host(self):
        self.join()
        self.add("a", "b", end=True)
        self.result(1, host="h1")
        self.refuse(2, "h2")
        lost = tc.encode("LOST", {"tasks": [[2, 2]], "why": "", "fault": tc.NOWHERE})
        self.bench.hear(lost)
        self.bench.hear("WHO")
        self.join(2)
        self.assertEqual(self.client.host_wait.commands, {})
        self.bench.hear(lost)  # lost before
        self.assertEqual((self.client.reported, [*self.client.host_wait.commands]), (1, [2]))
        self.client.disconnected(BROKER, b"", self.bench.now)
        self.bench.wait(tc.HOST_WAIT + 1)  # nobody is there to be asked
        self.bench.machine.connected(BROKER, self.bench.now)
        self.bench.collect()
        self.join(self.client.session.number)
        self.result(2, 2, host="h1")  # of a time before
        self.assertEqual((self.client.reported, self.client.host_wait.commands), (2, {}))

    def test_a_host_that_does_not_come_back_is_waited_for_once(self):
        self.join()
        self.add(*"abc", end=True)
        b = self.bench
        self.result(1, host="h1")
        for id in (2, 3):
            self.refuse(id, "h2")
            for _ in range(9):
                if id in self.client.window:
                    b.hear(tc.encode("LOST", {"tasks": [[id, self.client.window[id].attempt]],
                                              "why": "", "fault": tc.NOWHERE}))
                    b.wait(2 if id == 2 else 0)
                    b.answer(hosts=1, slots=2, workers=1)
        self.assertEqual((self.client.failed, self.client.host_wait.can_start), (2, set()))

    def test_who_waits_for_a_host_is_stopped_with_the_rest(self):
        self.join()
        self.add("a", "b", end=True)
        self.result(1, host="h1")
        self.refuse(2, "h2")
        self.bench.hear(tc.encode("LOST", {"tasks": [[2, 2]], "why": "", "fault": tc.NOWHERE}))
        self.client.cancel(130, self.bench.now)
        self.bench.collect()
        self.assertEqual((self.client.stopped, self.client.failed, self.client.left), (1, 0, True))

    def test_retries_follow_when_no_host_can_start_it(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3))
        b = self.bench = Bench(self.client)
        self.join()
        self.add("a", end=True)
        self.refuse(1, "h1")
        b.hear(tc.encode("LOST", {"tasks": [[1, 2]], "why": "", "fault": tc.NOWHERE}))
        self.assertEqual(self.client.window[1].constraints, {"not_on": "h1", "elsewhere": True})
        self.result(1, 3, host="h1")
        self.assertEqual((self.client.reported, self.client.failed, self.client.flaky), (1, 0, 0))

    def test_retries_end_even_if_no_host_can_start_it_any_more(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3))
        self.bench = Bench(self.client)
        self.join()
        self.add("a", end=True)
        self.result(1, 1, 1, host="h1")
        for attempt in (2, 4):
            self.assertEqual(self.client.reported, 0)
            self.result(1, attempt, 127, host="h1")
            self.bench.hear(tc.encode("LOST", {
                "tasks": [[1, attempt + 1]], "why": "", "fault": tc.NOWHERE}))
            self.bench.wait(tc.HOST_WAIT)
        self.assertEqual((self.client.reported, self.client.failed), (1, 1))

    def test_what_costs_workers_elsewhere_is_reported_as_that(self):
        self.examine(0, (127, "h"))
        for attempt in (2, 3, 4):
            self.bench.hear(tc.encode("LOST", {
                "tasks": [[1, attempt]], "why": "gone", "fault": tc.CRASH, "worker": "w"}))
        report = [effect for effect in self.bench.effects if isinstance(effect, tc.FinalResult)][0]
        self.assertEqual((report.provisional, report.result["exitcode"]), (False, tc.NOT_RUN))
        self.assertIn("3 workers were lost", report.result["reason"])

    def test_a_pass_is_not_forgotten_if_its_first_host_cannot_start_it_any_more(self):
        _, report = self.examine(3, (1, "h"), (0, "i"))
        self.assertIsNone(report)
        self.result(1, 3, 127, host="h")
        report = [effect for effect in self.bench.effects if isinstance(effect, tc.FinalResult)][0]
        self.assertEqual((report.provisional, report.result["host"]), (True, "i"))
        self.assertEqual(report.command.verdict, tc.FLAKY)
        self.assertEqual(self.client.rechecks.commands, {})

    def test_excluded_hosts_are_told_by_identity(self):
        self.join()
        self.add(*"abc", end=True)
        for id in (1, 2, 3):
            self.refuse(id, "vm/1b")
            self.result(id, 2, host="vm/2c")
        self.assertEqual(self.client.retry_policy.excluded, {"vm"})
        self.assertIn(("SHUN", {"hosts": ["vm/1b"]}), [line[1:3] for line in self.bench.lines])

    def test_what_a_kept_try_showed_counts_if_that_is_reported(self):
        self.client = tc.Client("r1", options=tc.RunOptions(live=True))
        b = self.bench = Bench(self.client)
        self.join()
        self.add("a", end=True)
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=b"not found")
        self.result(1, 1, 127, host="h", stdout="not found", size=9)
        self.assertEqual(self.client.window[1].shown, 0)
        b.effects.clear()
        b.hear(tc.encode("LOST", {"tasks": [[1, 2]], "why": "", "fault": tc.NOWHERE}))
        self.assertEqual(b.effect(tc.FinalResult).command.shown, 9)

    def test_a_large_output_of_what_could_not_be_started_is_fetched_before(self):
        self.join()
        self.add("a", end=True)
        b = self.bench
        b.lines.clear()
        b.effects.clear()
        self.result(1, 1, 127, size=tc.INLINE + 5, host="h")
        b.expect("FETCH", attempt=1)
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=b"x" * (tc.INLINE + 5))
        b.effect(tc.FetchedOutput)
        self.assertIsNone(b.effect(tc.ProvisionalResult).output)
        b.expect("{", attempt=2, never_on=["h"])

    def test_a_host_that_can_start_nothing_is_excluded(self):
        self.join()
        self.add(*"abcdefgh", end=True)
        b = self.bench
        for id, began in enumerate((0, 0, 1, 0, 0, 0), 1):
            self.assertFalse(self.client.retry_policy.excluded)
            self.result(id, 1, 0 if began else 127, host="h")
            if not began:
                self.result(id, 2, 0, host="i")
        self.assertEqual(self.client.retry_policy.excluded, {"h"})
        self.assertIn(("SHUN", {"hosts": ["h"]}), [line[1:3] for line in b.lines])
        said = [e.text for e in b.effects if isinstance(e, tc.Notice)]
        self.assertEqual(len(said), 1)
        self.assertIn("EXCLUDING host h", said[0])
        self.result(7, 1, 127, host="h")  # was there already
        self.result(7, 2, 0, host="i")
        self.assertEqual((self.client.reported, self.client.failed), (7, 0))

    def test_an_excluded_host_is_named_with_the_last_reason(self):
        for more, words in (({"reason": "cannot enter directory /x"}, "cannot enter directory /x"),
                            ({"stdout": "hello\nsh: x: not found\n"}, "sh: x: not found")):
            self.setUp()
            self.join()
            self.add(*"abc", end=True)
            for id in range(1, tc.EXCLUDE_AFTER + 1):
                self.result(id, 1, 127, host="h", **more)
                self.result(id, 2, 0, host="i")
            said, = [e.text for e in self.bench.effects if isinstance(e, tc.Notice)]
            self.assertTrue(said.endswith(f" (the last one: {words})"), said)

    def test_a_host_on_which_alone_commands_fail_is_excluded(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add(*"abcde", end=True)
        b.lines.clear()
        for id in range(1, tc.EXCLUDE_AFTER + 1):
            self.assertFalse(self.client.retry_policy.excluded)
            for attempt, (code, host) in enumerate([(1, "h"), (0, "i"), (1, "h")], 1):
                self.result(id, attempt, code, host=host)
        self.assertIn(("SHUN", {"hosts": ["h"]}), [line[1:3] for line in b.lines])
        self.assertIn("EXCLUDING host h", "".join(
            e.text for e in b.effects if isinstance(e, tc.Notice)))
        self.result(4, 1, 1, host="h")  # it was there already: now that needs no more proof
        self.result(4, 2, 0, host="i")
        self.assertEqual([e.command.verdict for e in b.effects if isinstance(e, tc.FinalResult)],
                         [tc.ONLY] * (tc.EXCLUDE_AFTER + 1))
        b.lines.clear()
        b.hear("WHO")
        b.expect("HELLO")
        self.join(2)
        self.assertIn("SHUN", [line[1] for line in b.lines])

    def test_fail_fast(self):
        self.client = tc.Client("r1", options=tc.RunOptions(fail_fast=2))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add(*"abcd")
        b.lines.clear()
        b.effects.clear()
        self.result(1, exitcode=1)
        self.result(2)
        self.assertNotIn("CANCEL", [line[1] for line in b.lines])
        self.result(3, exitcode=1)
        self.assertIn("CANCEL", [line[1] for line in b.lines])
        b.hear('LOST {"tasks":[[4,1]],"why":"cancelled"}')
        self.assertEqual([e.status for e in b.effects if isinstance(e, tc.Exit)], [1])

    def test_flaky_commands_stop_the_run_if_they_count_as_failed(self):
        for counts in (True, False):
            self.client = tc.Client("r1", options=tc.RunOptions(
                tries=2, fail_fast=1, fail_on_flaky=counts))
            self.bench = Bench(self.client)
            self.join()
            self.add("a", "b")
            self.result(1, 1, 1, host="h")
            self.result(1, 2, 0, host="i")
            self.assertEqual("CANCEL" in [verb for _, verb, _ in self.bench.lines], counts)

    def test_fail_fast_when_all_has_run(self):
        self.client = tc.Client("r1", options=tc.RunOptions(fail_fast=1))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", end=True)
        b.lines.clear()
        self.result(1, exitcode=1)
        self.assertNotIn("CANCEL", [line[1] for line in b.lines])
        self.assertEqual([e.status for e in b.effects if isinstance(e, tc.Exit)], [1])
        self.assertIsNone(self.client.status)

    def test_longest_first(self):
        for end, order in ((True, "cdba"), (False, "abcd")):
            self.setUp()
            self.client.timings = {"a": 1, "b": 5, "d": math.inf}
            self.join()
            self.add(*"abcd")
            self.bench.quiet()
            if end:
                self.client.end_input(self.bench.now)
                self.bench.collect()
            else:  # it goes on without knowing the rest
                self.bench.wait(tc.ANNOUNCE_DELAY)
            self.assertEqual("".join(line[2]["cmd"] for line in self.bench.lines), order)

    def test_longest_first_only_where_it_may_help(self):
        for options, slots in ((tc.RunOptions(serial=True), 2), (tc.RunOptions(), 1)):
            self.client = tc.Client("r1", options=options)
            self.client.timings = {"a": 1, "b": 5}
            self.bench = b = Bench(self.client)
            b.answer(broker="b", slots=slots, workers=1, patience=30)
            self.add(*"ab", end=True)
            commands = [line[2]["cmd"] for line in b.lines if line[1] == "{"]
            self.assertEqual(commands, ["a", "b"][:1 if options.serial else 2])

    def test_one_at_a_time(self):
        self.client = tc.Client("r1", options=tc.RunOptions(serial=True))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add(*"ab", end=True)
        b.expect("{", cmd="a")
        b.effect(tc.RunStarted)
        b.quiet()
        self.result(1)
        b.expect("{", cmd="b")

    def test_what_a_running_command_prints_is_asked_for(self):
        self.client = tc.Client("r1", options=tc.RunOptions(live=True))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", end=True)
        b.effects.clear()
        b.lines.clear()
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        b.expect("FETCH", id=1, offset=0)
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=b"ab\n")
        b.expect("FETCH", id=1, offset=3)
        self.assertEqual(b.effect(tc.LiveOutput).data, b"ab\n")
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=b"ab\n")  # it came twice
        b.quiet()
        self.result(1, stdout="ab\nc", size=4)
        self.assertEqual(b.effect(tc.FinalResult).command.shown, 3)

    def test_nothing_more_is_asked_for_than_can_be_shown(self):
        self.client = tc.Client("r1", options=tc.RunOptions(live=True))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", end=True)
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        b.lines.clear()
        self.client.set_live(False)
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=b"ab\n")
        b.wait(1)
        b.collect()
        self.assertNotIn("FETCH", [line[1] for line in b.lines])
        self.client.set_live(True)
        self.client.tick(b.now)
        b.collect()
        self.assertEqual(b.lines[-1][1:], ("FETCH", {
            "id": 1, "attempt": 1, "offset": 3, "size": tc.CHUNK_SIZE}))
        b.lines.clear()
        for _ in range(5):  # that may have been lost
            b.wait(1)
            b.answer()
        self.assertIn(3, [line[2].get("offset") for line in b.lines])

    def test_what_was_shown_of_the_try_that_is_reported(self):
        self.client = tc.Client("r1", options=tc.RunOptions(live=True, tries=3))
        b = self.bench = Bench(self.client)
        b.expect("HELLO")
        self.join()
        self.add("a", end=True)
        for attempt, code, host, shown in ((1, 1, "h", 1), (2, 0, "i", 2), (3, 1, "h", 0)):
            b.effects.clear()
            b.hear(f'QUEUED {{"tasks":[[1,{attempt}]],"worker":"w"}}')
            b.hear(f'CHUNK {{"id":1,"attempt":{attempt},"offset":0}}', data=b"x" * shown)
            self.assertEqual([(effect.offset, len(effect.data)) for effect in b.effects
                              if isinstance(effect, tc.LiveOutput)],
                             [(0, shown)] if shown else [])
            self.result(1, attempt, code, host=host, stdout="xxx", size=3)
        self.assertEqual(b.effect(tc.FinalResult).command.shown, 2)

    def test_large_output_is_fetched_in_order_and_again_if_chunks_stay_away(self):
        b = self.bench
        chunks = tc.FETCH_AHEAD + 2
        size = chunks * tc.CHUNK_SIZE + 5
        self.join()
        self.add("a", end=True)
        b.lines.clear()
        b.effects.clear()
        self.result(1, size=size)
        asked = [b.expect("FETCH", id=1)["offset"] for _ in range(tc.FETCH_AHEAD)]
        self.assertEqual(asked, [n * tc.CHUNK_SIZE for n in range(tc.FETCH_AHEAD)])
        chunk = b"x" * tc.CHUNK_SIZE
        b.hear(f'CHUNK {{"id":1,"attempt":1,"offset":{tc.CHUNK_SIZE}}}', data=chunk)
        b.quiet()  # not its turn
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=chunk)
        self.assertEqual(b.effect(tc.FetchedOutput).offset, 0)
        b.expect("FETCH", offset=tc.FETCH_AHEAD * tc.CHUNK_SIZE)
        b.hear('OK {"slots":2}')
        b.wait(4.1)
        lines = [line for line in b.lines if line[1] == "FETCH"]
        self.assertEqual(lines[0][2]["offset"], tc.CHUNK_SIZE)
        b.effects.clear()
        for n in range(1, chunks + 1):
            data = chunk if n < chunks else b"12345"
            b.hear(f'CHUNK {{"id":1,"attempt":1,"offset":{n * tc.CHUNK_SIZE}}}', data=data)
            b.effect(tc.FetchedOutput)
        self.assertIsNone(b.effect(tc.FinalResult).output)
        self.assertEqual(b.effect(tc.Exit).status, 0)

    def test_a_result_whose_output_is_lost_half_way_is_run_again(self):
        b = self.bench
        self.join()
        self.add("a", end=True)
        self.result(1, size=tc.CHUNK_SIZE + 1)
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=b"x" * tc.CHUNK_SIZE)
        b.lines.clear()
        b.hear('LOST {"tasks":[[1,1]],"why":"gone"}')
        b.expect("{", id=1, attempt=2)
        b.effects.clear()
        self.result(1, attempt=2, stdout="new", size=3)
        self.assertEqual(b.effect(tc.FinalResult).output, b"new")

    def test_other_results_do_not_delay_the_second_asking_for_a_lost_chunk(self):
        b = self.bench
        self.join()
        self.add(*"abcdefgh")
        self.result(1, size=tc.INLINE + 1)
        asked = 0
        for id in range(2, 8):
            b.now += 1.0
            self.result(id)
            self.client.tick(b.now)
            b.collect()
            asked += sum(line[1] == "FETCH" for line in b.lines)
            b.lines.clear()
        self.assertEqual(asked, 2)

    def test_a_try_whose_output_is_lost_does_not_count(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3))
        b = self.bench = Bench(self.client)
        self.join()
        self.add("a", end=True)
        self.result(1, 1, 0, size=tc.INLINE + 1, host="h")
        b.lines.clear()
        b.hear('LOST {"tasks":[[1,1]],"why":"gone"}')
        b.expect("{", attempt=2, not_on=None, on=None)
        self.result(1, 2, 1, host="i")
        b.expect("{", attempt=3, not_on="i")
        self.result(1, 3, 1, host="h")
        self.result(1, 4, 1, host="i")
        report = [e for e in b.effects if isinstance(e, tc.FinalResult)][0]
        self.assertEqual(([*report.command.tries], report.command.verdict), ([2, 3, 4], tc.FAIL))

    def test_what_is_said_of_an_older_attempt_changes_nothing(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3, live=True))
        b = self.bench = Bench(self.client)
        self.join()
        self.add("a", end=True)
        self.result(1, 1, 1, host="h", worker="w")
        b.wait(tc.DONE_DELAY)
        b.lines.clear()
        b.effects.clear()
        command = self.client.window[1]
        before = dict(vars(command), tries=dict(command.tries), result=dict(command.result))
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        b.hear('CHUNK {"id":1,"attempt":1,"offset":0}', data=b"old")
        b.hear('LOST {"tasks":[[1,1]],"why":"gone","fault":"crash","worker":"w"}')
        b.quiet()
        for late in ({"exitcode": 0}, {"exitcode": 1, "host": "i"},
                     {"exitcode": 0, "size": tc.INLINE + 1}):
            self.result(1, 1, **late)
            self.expect_done([1, 1])
        self.assertEqual(vars(command), before)
        self.result(1, 2, 0, host="i", stdout="new", size=3)  # it may be rechecked now
        self.assertEqual(b.effect(tc.ProvisionalResult).result["attempt"], 2)

    def chunk(self, id, offset, data):
        self.bench.hear(tc.encode("CHUNK", {"id": id, "attempt": 1, "offset": offset}), data=data)

    def test_after_joining_again_only_outputs_that_are_told_again_are_fetched(self):
        """Others may have to wait until commands have run anew, whose results we must take."""
        b, half, size = self.bench, tc.CHUNK_SIZE, 2 * tc.CHUNK_SIZE
        self.join()
        self.add("a", "b", "c", end=True)
        for id in (1, 2, 3):
            self.result(id, size=size)
        self.chunk(1, 0, b"x" * half)
        self.client.connected(BROKER, b.now)
        b.collect()
        b.lines.clear()
        b.effects.clear()
        self.join(2)
        self.assertEqual([line[1] for line in b.lines], ["{"] * 3)
        b.lines.clear()
        self.result(1, size=size)
        b.expect("FETCH", id=1, offset=half)  # goes on
        self.client.connected(BROKER, b.now)
        self.join(3)
        b.lines.clear()
        self.result(2, size=size)
        self.chunk(2, 0, b"y" * half)
        self.chunk(2, half, b"y" * half)
        self.assertEqual([effect.offset for effect in b.effects[:2]], [0, half])
        b.lines.clear()
        self.result(1, size=size)
        b.expect("FETCH", id=1, offset=0)  # what was stored of it had to make room

    def test_a_result_of_a_second_execution_counts_while_the_output_of_the_first_is_fetched(self):
        b = self.bench
        self.join()
        self.add("a", "b", end=True)
        for id in (1, 2):
            self.result(id, size=tc.CHUNK_SIZE + 1)
            self.chunk(id, 0, b"x" * tc.CHUNK_SIZE)
            b.lines.clear()
            b.effects.clear()
            self.result(id, size=tc.CHUNK_SIZE + 1)  # told again
            self.assertFalse(b.lines)
            if id == 1:
                self.result(id, size=3, stdout="new", started=2)
                self.assertEqual(b.effect(tc.FinalResult).output, b"new")
            else:
                self.result(id, size=tc.INLINE + 1, started=2)
                b.expect("FETCH", offset=0, size=tc.INLINE + 1)

    def test_interrupt_cancels_and_counts(self):
        b = self.bench
        window = mock.patch.object(tc, "WINDOW", 3)
        window.start()
        self.addCleanup(window.stop)
        self.join()
        self.add(*"abcd", end=True)
        b.hear('QUEUED {"tasks":[[1,1],[2,1]],"worker":"w"}')
        b.lines.clear()
        b.effects.clear()
        self.client.cancel(130, b.now)
        b.collect()
        b.expect("CANCEL")
        self.result(1)
        b.effect(tc.FinalResult)
        b.hear('LOST {"tasks":[[2,1],[3,1]],"why":"cancelled"}')
        self.assertEqual(b.effect(tc.Exit).status, 130)
        self.assertEqual((self.client.reported, self.client.stopped, self.client.never_ran),
                         (1, 1, 2))

    @mock.patch.object(tc, "WINDOW", 3)
    def test_a_second_interrupt_counts_nothing_again(self):
        b = self.bench
        self.join()
        self.add(*"abcdef", end=True)
        self.result(1, host="h")
        self.refuse(2, "i")
        b.hear(tc.encode("LOST", {"tasks": [[2, 2]], "why": "", "fault": tc.NOWHERE}))
        self.assertEqual([*self.client.host_wait.commands], [2])
        b.lines.clear()
        for left in False, True, True:
            self.client.cancel(130, b.now)
            b.collect()
            self.assertEqual((self.client.stopped, self.client.never_ran, self.client.left),
                             (1, 2, left))
        self.assertEqual([verb for _, verb, _ in b.lines], ["CANCEL", "DONE", "BYE"])
        self.assertEqual([e.status for e in b.effects if isinstance(e, tc.Exit)], [130])

    def test_a_recheck_does_not_hold_up_an_interrupted_run(self):
        self.client = tc.Client("r1", options=tc.RunOptions(tries=3))
        b = self.bench = Bench(self.client)
        self.join()
        self.add("a", end=True)
        self.result(1, 1, 1, host="h")
        self.result(1, 2, 0, host="i")
        b.wait(tc.RECHECK_WAIT - 1)
        self.client.cancel(130, b.now)
        b.collect()
        b.effects.clear()
        b.wait(1)
        self.assertEqual(b.effect(tc.FinalResult).result["host"], "i")
        self.assertEqual(b.effect(tc.Exit).status, 130)

    def test_a_new_broker_is_told_of_the_interrupt(self):
        b = self.bench
        self.join()
        self.add("a")
        self.client.cancel(130, b.now)
        b.collect()
        b.hear("WHO")
        b.lines.clear()
        self.join(2)
        self.assertEqual([verb for _, verb, _ in b.lines], ["{", "CANCEL"])

    def test_input_that_an_interrupt_left_unread_is_noted(self):
        for ended in (True, False):
            self.setUp()
            self.join()
            self.add("a", end=ended)
            self.client.cancel(130, self.bench.now)
            self.assertEqual(self.client.cut_short, not ended)

    def test_what_was_lost_before_the_interrupt_has_run(self):
        b = self.bench
        self.join()
        self.add("a", end=True)
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        b.hear('LOST {"tasks":[[1,1]],"why":"leaving","worker":"w"}')
        self.client.cancel(130, b.now)
        b.hear('LOST {"tasks":[[1,2]],"why":"cancelled"}')
        self.assertEqual((self.client.stopped, self.client.never_ran), (1, 0))

    def test_interrupt_does_not_wait_for_ever_and_a_second_one_not_at_all(self):
        for again in (False, True):
            self.setUp()
            b = self.bench
            self.join()
            self.add("a")
            self.client.cancel(130, b.now)
            b.effects.clear()
            if again:
                self.client.cancel(130, b.now)
                b.collect()
            else:
                b.wait(4.1)
            self.assertIn(tc.Exit(130), b.effects)

    def test_why_no_worker_has_a_command(self):
        for needs, constraints, cloud, cause in (
                ((), {}, {}, "no worker (yet); start one"),
                ((), {}, {"workers": 2}, "no worker that takes new commands"),
                ((), {}, {"workers": 2, "slots": 2}, "all 2 are busy"),
                ((), {}, {"workers": 2, "slots": 2, "lacks": "a \1b"},
                 "waiting for a \\x01b; there is none among 2 workers"),
                (("gpu",), {}, {"workers": 2, "slots": 2},
                 "all of workers with --label gpu are busy"),
                ((), {"never_on": ["h1", "h2"]}, {"workers": 2, "slots": 2},
                 "all of hosts other than h1, h2 are busy")):
            self.client = tc.Client("r1", options=tc.RunOptions(needs=needs))
            b = self.bench = Bench(self.client)
            self.join()
            self.add("a")
            self.client.window[1].constraints = constraints
            b.answer(workers=1, slots=1, lacks="what was said before")
            b.answer(**cloud)
            self.assertIn(cause, self.client.wait_reason())

    def test_who_waits_longer_than_it_may_gives_up(self):
        self.client = tc.Client("r1", wait=5.0, address="tcp://b:1")
        b = self.bench = Bench(self.client)
        self.client.disconnected(BROKER, b"", 0.0)
        b.wait(6.0)
        self.assertEqual((b.now, b.effects[-1]), (5.0, tc.Exit(3)))
        self.assertTrue(b.effects[-2].error)
        self.assertRegex(b.effects[-2].text, "^gave up waiting: no broker at tcp://b:1")

    def test_who_has_left_hears_nothing_more(self):
        self.join()
        self.add("a")
        self.client.leave(3)
        self.bench.collect()
        self.bench.effects.clear()
        self.result(1)
        self.assertEqual(self.bench.effects, [])

    def test_the_name_of_a_run_goes_with_its_key(self):
        self.client = tc.Client("mark" + 32 * "0")
        b = self.bench = Bench(self.client)
        self.client.key_changed("new")
        self.client.connected(BROKER, b.now)
        b.collect()
        self.assertEqual([f["run"] for _, _, f in b.lines], ["mark" + 32 * "0", "new" + 32 * "0"])

    def test_commands_that_need_not_run_keep_their_number(self):
        self.join()
        self.client.skip()
        self.add("b", end=True)
        self.assertEqual(self.bench.lines[-1][2]["id"], 2)
        self.result(2)
        self.assertEqual((self.client.reported, self.client.total), (1, 1))

    def test_says_what_it_waits_for(self):
        b = self.bench
        self.client.disconnected(BROKER, b"", 0.0)
        b.wait(1.0)
        self.assertIn("no broker at tcp://b:1", b.effect(tc.Notice).text)
        self.client.connected(BROKER, b.now)
        b.lines.clear()
        b.collect()
        self.join(b.lines[-1][2]["join"], slots=0, workers=0)
        b.wait(0.1)
        self.assertIn("over", b.effect(tc.Notice).text)
        self.add("a")
        b.wait(0.1)
        b.effect(tc.RunStarted)
        b.wait(1.0)
        self.assertIn("no worker", b.effect(tc.Notice).text)
        b.hear('OK {"slots":0,"workers":3}')
        b.wait(1.0)
        self.assertIn("no worker that takes new commands", b.effect(tc.Notice).text)
        b.hear('OK {"slots":2,"workers":1}')
        b.wait(1.0)
        self.assertIn("busy", b.effect(tc.Notice).text)
        b.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        b.wait(1.0)
        self.assertIn("over", b.effect(tc.Notice).text)
        b.wait(0.5)
        self.assertFalse(b.effects)
        b.wait(5.0)
        self.assertIn("does not answer", b.effect(tc.Notice).text)


class ClientTreesTest(unittest.TestCase):
    """A client whose commands run in workspaces with its tree."""

    TREE = tc.make_tree({}, [file_entry("a", b"12345")])
    OTHER = tc.make_tree({}, [file_entry("b", b"1")])

    def setUp(self):
        self.client = tc.Client("r1", address="tcp://b:1", options=tc.RunOptions(
            sync=True, needs=("gpu",)))
        self.bench = Bench(self.client)
        self.bench.expect("HELLO")

    def join(self, **more):
        self.bench.hear(tc.encode("OK", {
            "join": self.client.session.number, "slots": 2, "workers": 1, "trees": True, **more}))

    def add(self, *cmds):
        for cmd in cmds:
            self.client.add(cmd, "sub")
        self.client.end_input(self.bench.now)
        self.bench.collect()
        self.bench.effects = [effect for effect in self.bench.effects
                              if not isinstance(effect, tc.RunStarted)]

    def set_tree(self, tree):
        self.client.set_tree(tree, self.bench.now)
        self.bench.collect()

    def begin(self, *cmds):
        """Submit these commands; a worker has accepted them, and makes their workspace."""
        self.join()
        self.set_tree(self.TREE)
        self.add(*cmds)
        for id in range(1, len(cmds) + 1):
            self.bench.expect("{", id=id)
            self.bench.hear(tc.encode("QUEUED", {
                "tasks": [[id, 1]], "worker": "w", "preparing": tc.FILES, "host": "h/1"}))
        self.bench.quiet()

    def fetch(self, id=1, attempt=1, offset=0, size=9, tree=TREE, **more):
        self.bench.hear(tc.encode("FETCH", {
            "id": id, "attempt": attempt, "offset": offset, "size": size, "tree": tree.id,
            "host": "h/1", **more}))

    def test_commands_wait_for_the_tree_and_name_it(self):
        b = self.bench
        self.join()
        self.add("x", "y")
        b.quiet()
        self.set_tree(self.TREE)
        for id in (1, 2):
            b.expect("{", id=id, tree=self.TREE.id, manifest=len(self.TREE.manifest), cwd="sub",
                     needs=["gpu", tc.TREES])
        b.quiet()

    def test_parts_of_the_tree_go_to_who_has_the_command(self):
        b = self.bench
        self.begin("x")
        self.fetch(size=3, spans=[[0, 1], [5, 2]])
        fields = b.effect(tc.AnswerFetch).fields
        self.assertEqual(fields["spans"], [[0, 1], [5, 2]])
        self.client.answer(fields, b"abc")
        b.collect()
        (answer,), b.bulk = b.bulk, []
        self.assertEqual(tc.decode(answer.body), ("CHUNK", {
            "id": 1, "attempt": 1, "offset": 0, "size": 3, "tree": self.TREE.id}))
        self.assertEqual(answer.data, b"abc")
        self.fetch(id=2)  # no such command
        self.fetch(attempt=2)
        b.hear('FETCH {"id":1,"attempt":1,"offset":0,"size":1}')  # of no tree
        b.quiet()
        self.fetch(tree=self.OTHER)
        b.expect("CHUNK", id=1, tree=self.OTHER.id, why="a file of its tree has changed")
        b.quiet()

    def test_a_tree_that_has_changed_is_refused_and_the_commands_get_the_next(self):
        b = self.bench
        self.begin("x")
        for number in range(20):
            self.fetch(offset=number, size=tc.CHUNK_SIZE)
        self.assertEqual(len([b.effect(tc.AnswerFetch) for _ in range(16)]), 16)
        self.set_tree(None)
        for number in range(16, 20):
            b.expect("CHUNK", offset=number, why="a file of its tree has changed")
        self.fetch()
        b.expect("CHUNK", offset=0, why="a file of its tree has changed")
        b.hear('LOST {"tasks":[[1,1]],"why":"a file of its tree has changed"}')
        b.quiet()
        self.set_tree(self.OTHER)
        b.expect("{", id=1, attempt=2, tree=self.OTHER.id)
        b.quiet()
        b.hear("WHO")
        self.set_tree(None)
        b.expect("HELLO")
        self.join()
        b.quiet()  # there is nothing to submit it with
        self.set_tree(self.TREE)
        b.expect("{", id=1, attempt=2, again=True, tree=self.TREE.id)

    def test_an_unfit_host_is_out_of_the_run(self):
        b = self.bench
        self.begin("x", "y")
        b.hear(tc.encode("LOST", {
            "tasks": [[1, 1]], "why": "the setup ended with exit code 2", "fault": tc.UNFIT,
            "worker": "w", "host": "h/1", "output": "no make\n\x1b[0m"}))
        b.expect("SHUN", hosts=["h/1"])
        b.expect("{", id=1, attempt=2, never_on=["h/1"])
        self.assertEqual(b.effect(tc.Notice), (
            "host h is out of this run: the setup ended with exit code 2\nno make\n\\x1b[0m",
            True))
        b.hear(tc.encode("LOST", {"tasks": [[2, 1]], "why": "the setup", "fault": tc.UNFIT,
                                  "worker": "w", "host": "h/1"}))
        b.expect("{", id=2, attempt=2, never_on=["h/1"])
        b.quiet()
        b.hear('LOST {"tasks":[[2,2]],"why":"there is no other host","fault":"nowhere"}')
        self.assertEqual(b.effect(tc.Notice), (tc.NONE_LEFT, True))
        b.expect("CANCEL")
        b.hear('LOST {"tasks":[[1,2]],"why":"cancelled"}')
        b.expect("BYE")
        self.assertEqual(b.effect(tc.Exit).status, 3)
        self.assertEqual((self.client.stopped, self.client.never_ran), (0, 2))

    def test_it_forgets_what_no_worker_asks_for_any_more(self):
        self.begin("x")
        self.fetch()
        self.bench.effect(tc.AnswerFetch)
        self.assertEqual(self.client.offer.on_way, 9)
        self.bench.hear('QUEUED {"tasks":[[1,1]],"worker":"w"}')
        self.assertEqual(self.client.offer.on_way, 0)

    def test_long_transfers_and_setups_are_told(self):
        b = self.bench
        self.begin("x")
        self.fetch(got=12_300_000, of=80_000_000)
        b.effect(tc.AnswerFetch)
        b.wait(tc.TRANSFER_NOTICE)
        self.assertEqual(b.effect(tc.Notice).text, "sending 12.3 of 80 MB to h")
        b.hear(tc.encode("QUEUED", {"tasks": [[1, 1]], "worker": "w", "preparing": tc.SETUP,
                                    "host": "h/1"}))
        for _ in range(int(tc.TRANSFER_INTERVAL) - 1):
            b.wait(1.0)
            b.answer(slots=2, trees=True)
        b.quiet_but("HELLO")
        b.wait(1.0)
        self.assertEqual(b.effect(tc.Notice).text, "running the setup on h for 10 s")

    def test_old_brokers_and_workers(self):
        b = self.bench
        self.join(unfit=["h/1", "i/2"])
        self.assertEqual(b.effect(tc.Notice).text, "not used: h, i: an older version of this "
                         "program runs there, which knows no --sync")
        b.hear('OK {"beat":1,"slots":2,"workers":1,"trees":true,"unfit":["h/1"]}')
        b.quiet()
        b.hear('OK {"beat":1,"slots":2,"workers":1}')
        notice = b.effect(tc.Notice)
        self.assertIn("the broker at tcp://b:1 is older than this program", notice.text)
        b.expect("BYE")
        self.assertEqual(b.effect(tc.Exit).status, 3)


class StatusClientTest(unittest.TestCase):
    def test_hosts_of_one_name_are_two(self):
        b = Bench(tc.StatusClient("tcp://b:1", math.inf))
        row = {"name": "w", "kind": "worker", "below": [], "labels": [], "slots": 1, "weight": 1,
               "running": 0, "held": 0, "done": 0, "failed": 0, "load": 0, "there": True,
               "silent": 0}
        rows = [dict(row, host=host) for host in ("vm/a", "vm/b")]
        for again in range(2):
            b.hear(tc.encode("STATUS", dict(MessagesTest.EXAMPLES["STATUS"], workers=rows)))
            shown = b.effect(tc.ShowStatus).fields["workers"]
            self.assertEqual([row["host"] for row in shown], ["vm", "vm~2"], again)
            self.assertEqual(b.effect(tc.Exit).status, 0)

    def test_a_broker_that_falls_silent(self):
        b = Bench(tc.StatusClient("tcp://b:1", math.inf, 1.0))
        for _ in range(3):
            b.expect("STATUS")
            b.hear(tc.encode("STATUS", MessagesTest.EXAMPLES["STATUS"]))
            b.effect(tc.ShowStatus)
            b.wait(1)
            self.assertFalse(b.effects)
        b.wait(3)
        self.assertIn("does not answer", b.effect(tc.Notice).text)
        b.hear(tc.encode("STATUS", MessagesTest.EXAMPLES["STATUS"]))
        self.assertIn("is over", b.effects[-1].text)


# === Reporting ========================================================================

SEED_OUTPUTS = ["2.8", "3.12", "3.140", "3.1412", "3.14156"]


def naive_hash(results):
    """The seed's hash, as its own words define it, for (cmd, exitcode, output)."""
    total = b"Array"
    for cmd, code, output in sorted(results):
        total = hashlib.sha1(total + cmd + b"%d" % code + output).hexdigest().encode()
    return total.decode()


class ReportingTest(unittest.TestCase):
    def command(self, cmd, line=None):
        command = tc.Command(next(self.ids), cmd, "/")
        self.reports.lines.setdefault(command.id, (line or cmd, 0))
        return command

    def report(self, cmd, exitcode=0, output=b"", tries=(), line=None, **result):
        command = self.command(cmd, line)
        attempts = [*(tc.Try(*row) for row in tries), tc.Try(exitcode, result.get("host", "h"))]
        command.tries = dict(enumerate(attempts, 1))
        command.verdict = tc.verdict_of(attempts)
        self.reports.report(tc.FinalResult(command, dict(
            {"exitcode": exitcode, "time": 8.14, "attempt": len(attempts), "host": "h"}, **result),
            output))
        return command

    def store(self, split=False):
        store = tc.ResultStore(split)
        for file in store.files:
            self.addCleanup(file.close)
        return store

    def text(self, *words, split=False, options=tc.RunOptions()):
        """What is written with these options."""
        self.out, self.ids = io.BytesIO(), itertools.count(1)
        self.client = tc.Client("r1", options=options)
        settings = tc.build_parser().parse_args(["client", *words])
        store = self.store(settings.raw or split)
        out = mock.Mock(put=lambda item, size=0: self.out.writelines(item))
        with mock.patch.object(tc, "Writer", lambda file, failed: out):
            show = tc.Display(settings, store, None, self.client)
        self.reports = tc.Reports(self.client, store, show.reporters)
        return self.out

    def end(self, complete=True, **more):
        return self.reports.end(complete, **more)

    def test_the_hash_of_the_seeds_example(self):
        store = self.store()
        for n in (3, 1, 5, 2, 4):
            store.results.append(
                store.put(f"bin/pi {n}".encode(), 0, SEED_OUTPUTS[n - 1].encode() + b"\n"))
        self.assertEqual(store.hash(), "24aa911ac6e5f453c2ca1fa3cd8fe3ad2d6b1f43")

    def test_the_hash_does_not_depend_on_the_order(self):
        r = random.Random(1)
        results = [(r.choice([b"a", b"b", b"\xff", b"aa"]), r.choice([0, 1, 2, 10]),
                    bytes(r.choices(b"xy", k=r.choice([0, 1, 2, 3])))) for _ in range(300)]
        with mock.patch.object(tc, "BLOCK_SIZE", 2):  # bytes, so that outputs come in pieces
            for _ in range(3):
                r.shuffle(results)
                store = self.store()
                for cmd, code, output in results:
                    if r.random() < 0.3 and output:
                        for at in range(len(output)):
                            store.put_part(tc.FetchedOutput(at, output[at:at + 1]))
                        output = None
                    store.results.append(store.put(cmd, code, output))
                self.assertEqual(store.hash(), naive_hash(results))

    def test_the_hash_does_not_depend_on_how_an_output_came(self):
        """Inline or in chunks, and with --raw in whatever pieces of stdout and stderr."""
        r = random.Random(1)
        outputs = [bytes(r.choices(b"xy", k=size)) for size in (0, 1, 2, 3, 5, 7, 8, 9) * 3]
        expected = naive_hash((b"a", 1, output) for output in outputs)

        def in_pieces(output):
            cuts = sorted({0, len(output), *(r.randrange(len(output) + 1) for _ in range(3))})
            return b"".join(tc.PIECE_HEADER.pack(r.choice((1, 2)), to - at) + output[at:to]
                            for at, to in zip(cuts, cuts[1:]))
        for split in (False, True) * 5:
            store = self.store(split)
            for output in r.sample(outputs, len(outputs)):
                data = in_pieces(output) if split else output
                fetched = data and r.random() < 0.5
                most = min(3, len(data) - 1)
                cuts = [0, *sorted(r.sample(range(1, len(data)), most))] if fetched else ()
                for at, to in zip(cuts, [*cuts[1:], len(data)]):
                    store.put_part(tc.FetchedOutput(at, data[at:to]))
                with mock.patch.object(tc, "BLOCK_SIZE", 4):
                    store.results.append(store.put(b"a", 1, None if fetched else data))
            for size in (4, 6, 1000):
                with mock.patch.object(tc, "BLOCK_SIZE", size):
                    self.assertEqual(store.hash(), expected)

    def test_an_output_that_was_stored_in_part_and_given_up_leaves_no_trace(self):
        store = self.store()
        store.put_part(tc.FetchedOutput(0, b"abc"))
        store.put_part(tc.FetchedOutput(3, b"def"))
        store.put_part(tc.FetchedOutput(0, b"xy"))
        record = store.put(b"c", 0, None)
        self.assertEqual(b"".join(store.output(record)), b"xy")

    def test_the_transcript(self):
        out = self.text()
        self.reports.started(tc.RunStarted(5))
        self.report("bin/pi 1", output=b"2.8\n")
        self.report("x", 3, b"no newline", time=10.0)
        self.report("y", 0, b"")
        self.report("z", 126, b"", reason="no such directory")
        self.end()
        self.assertEqual(self.reports.times, [8.14, 10.0, 8.14, 8.14])
        text = out.getvalue().decode()
        self.assertTrue(text.startswith(
            "Releasing the hounds: 5 commands to execute\n"
            "OK! bin/pi 1 ⌚8.14ms\n2.8\n\n"
            "FAIL(3) x ⌚10.00ms\nno newline\n\n"
            "OK! y ⌚8.14ms\n\n"
            "FAIL(126) z ⌚8.14ms\ntestcloud: no such directory\n\n"
            "Some commands failed :(\n"), text)
        self.assertRegex(text, r"Ran 4 commands in ⌚\d+\.\d\ds, result hash is [0-9a-f]{40}\n$")

    def test_brief_fail_only_slow_and_colour(self):
        out = self.text("--brief", "--fail-only", "--slow", "5", "--color", "always")
        self.report("good", output=b"shown?")
        self.report("bad", 1, b"shown?")
        self.assertEqual(out.getvalue().decode(), "\033[1;91mFAIL(1) \033[0m\033[31mbad \033[0m"
                                                  "\033[4;31m⌚8.14ms\033[0m\n")
        self.end()
        self.assertIn("\033[4;31mSome commands failed", out.getvalue().decode())

    def test_an_output_for_which_there_is_no_room_is_a_failure_of_its_command_alone(self):
        out, write_all = self.text(), tc.write_all

        def limited(file, data, offset):
            if offset + len(data) > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            write_all(file, data, offset)
        with mock.patch.object(tc, "write_all", limited):
            self.report("a", output=b"1\n")
            self.report("b", output=bytes(1000))
            for at in range(0, 5000, 500):
                self.reports.store.put_part(tc.FetchedOutput(at, bytes(500)))
            self.report("c", output=None)
            self.reports.store.put_part(tc.FetchedOutput(0, b"x" * 500))
            self.report("d", output=None)
        self.assertEqual(os.fstat(self.reports.store.files[1].fileno()).st_size, 500)
        self.end()
        lines = [line for line in out.getvalue().decode().split("\n") if "⌚8" in line]
        self.assertEqual([line.split()[:2] for line in lines], [
            ["OK!", "a"], ["FAIL(126)", "b"], ["FAIL(126)", "c"], ["OK!", "d"]])
        self.assertEqual(out.getvalue().count(b"of the client: No space left on device\n"), 2)
        self.assertEqual(self.reports.store.hash(), naive_hash([
            (b"a", 0, b"1\n"), (b"b", 126, b""), (b"c", 126, b""), (b"d", 0, b"x" * 500)]))

    def test_verdicts(self):
        out = self.text("-b")
        self.report("a", tries=[(1, "i"), (2, "h")])
        self.report("b", tries=[(1, "i"), (1, "i")])
        self.report("c", 3, tries=[(1, "i"), (1, "j")])
        self.client.flaky, self.client.retry_policy.failed_only_on = 2, {"i": 1}
        self.end()
        self.assertEqual(out.getvalue().decode().split("\n")[:-2], [
            "FLAKY! a ⌚8.14ms", "testcloud: tried 3 times; other exit codes: 1 on i, 2 on h",
            "FAILED ONLY ON i! b ⌚8.14ms",
            "testcloud: tried 3 times; other exit codes: 1 on i (2 times)",
            "FAIL(3) c ⌚8.14ms", "testcloud: tried 3 times; other exit codes: 1 on i, 1 on j",
            "Some commands failed :(",
            "1 of 3 commands failed: 1 with exit code 3", "  FAIL(3) c",
            "Flaky: 2 of 3 failed at first, and passed elsewhere or later: 1 FAILED ONLY ON i"])

    def test_the_end_says_what_failed_and_where(self):
        out = self.text("-b")
        self.client.hosts, self.client.retry_policy.started_elsewhere = 2, {"h": 1}
        for n in range(12):
            self.report(f"c{n}", 1 + n % 2, host="h")
        self.report("x" * 200_000, host="i", tries=[(127, "h")])
        self.report("y" * 200_000, 4, host="i")
        self.end(rerun="do it again")
        lines = out.getvalue().decode().split("\n")
        self.assertEqual(lines[0], "FAIL(1) on h: c0 ⌚8.14ms")
        self.assertEqual(lines[12][:8], "OK! xxxx")
        self.assertLess(max(map(len, lines)), 1100)
        self.assertEqual(lines[14:17], [
            "Some commands failed :(",
            "13 of 14 commands failed: 6 with exit code 1, 6 with exit code "
            "2, 1 with exit code 4", "  FAIL(1) on h: c0"])
        self.assertEqual(lines[25:-2], [
            "  FAIL(2) on h: c9", "  and 3 more",
            "12 of 13 failures were on h, where nothing passed; try --retries 3",
            "To run just these again: do it again",
            "1 command could not be started on h, and ran elsewhere"])

    def test_only_a_host_where_nothing_passed_is_suspected(self):
        for results, retries, suspected in (
                ([("h", 1)] * 3 + [("i", 0)], 0, True), ([("h", 1)] * 3 + [("i", 0)], 2, False),
                ([("h", 1)] * 2 + [("i", 0)], 0, False), ([("h", 1)] * 9, 0, False),
                ([("h", 1)] * 9 + [("h", 0), ("i", 0)], 0, False),
                ([("h", 127)] * 3 + [("i", 0)], 0, False)):  # it could not start them
            self.text("-b", options=tc.RunOptions(tries=retries))
            for host, exitcode in results:
                self.report("c", exitcode, host=host)
            self.assertEqual(bool(self.end().bad_hosts), suspected)

    def test_what_is_kept_counts_only_if_it_is_reported(self):
        for kept in (True, False):
            self.text("-b")
            command = self.command("a")
            first, then = ({"exitcode": code, "time": 1.0, "host": "h"} for code in (127, 0))
            command.tries = {1: tc.try_of(first), 2: tc.try_of(then)}
            self.reports.keep(tc.ProvisionalResult(command, first, b"first"))
            self.reports.report(tc.FinalResult(command, first, None, True) if kept else
                                tc.FinalResult(command, then, b"then"))
            self.assertEqual(self.end().ran, 1)
            self.assertEqual(self.reports.store.hash(), naive_hash(
                [(b"a", 127, b"first") if kept else (b"a", 0, b"then")]))

    def test_what_is_flaky_is_listed_if_it_counts_as_failed(self):
        out = self.text("-b", options=tc.RunOptions(fail_on_flaky=True, tries=3))
        self.report("a", tries=[(1, "i")])
        self.report("b", 3)
        self.end()
        self.assertIn("\n2 of 2 commands failed: 1 with exit code 3, 1 flaky\n  FLAKY! a\n"
                      "  FAIL(3) b\n", out.getvalue().decode())

    def test_nothing_run_is_no_success(self):
        for given, empty in (({}, False), ({"may_be_empty": False}, True),
                             ({"may_be_empty": False, "skipped": 1}, False)):
            out = self.text("-b")
            summary = self.end(**given)
            self.assertEqual((summary.empty, tc.exit_status(summary, False, 0)), (empty, 2 * empty))
            said = "No commands to execute" in out.getvalue().decode()
            self.assertEqual(said, "skipped" not in given)
            self.assertEqual(list(tc.final_notices(summary, [], 1)), [tc.NO_COMMANDS] * empty)
            self.assertEqual(bool(summary.trouble()), empty)

    def test_the_signal_that_killed_a_command_is_named(self):
        out = self.text("-b")
        for exitcode, more, words in (
                (137, {"signal": 9}, "testcloud: killed by SIGKILL"), (255, {}, ""), (3, {}, ""),
                (139, {}, "testcloud: exit code 139 is that of a process killed by SIGSEGV"),
                (143, {"reason": "stopped"}, "testcloud: stopped"),
                (165, {"signal": 37}, "testcloud: killed by signal 37")):
            out.truncate(0)
            self.report("c", exitcode, **more)
            self.assertEqual(out.getvalue().decode().split("\n")[1], words)

    def test_what_is_flaky_may_count_as_failed(self):
        for counts, words in ((False, "All commands success"), (True, "Some commands failed")):
            out = self.text("-b", options=tc.RunOptions(fail_on_flaky=counts))
            self.report("a", tries=[(1, "i")])
            self.client.flaky = 1
            self.end()
            self.assertIn(f"\n{words}", out.getvalue().decode())

    def test_in_the_order_of_the_input(self):
        out = self.text("-b", "-k")
        log = mock.Mock(tc.Reporter)  # a file has them as they come: we may be killed
        self.reports.reporters.append(log)
        for seq in range(1, 6):
            self.reports.expect(seq, "")
        for seq in (3, 2, 1, 5):
            self.ids = iter([seq])
            self.report(f"c{seq}")
        self.assertEqual(re.findall("OK! c(.)", out.getvalue().decode()), ["1", "2", "3"])
        self.assertEqual([call.args[0].seq for call in log.result.call_args_list], [3, 2, 1, 5])
        self.end(complete=False)  # the fourth never ran
        self.assertEqual(re.findall("OK! c(.)", out.getvalue().decode()), ["1", "2", "3", "5"])

    def test_lines_that_come_do_not_wait_for_the_order_of_results(self):
        out = self.text("--live", "-k")
        for seq in (1, 2):
            self.reports.expect(seq, f"c{seq}")
        for seq in (2, 1):
            self.ids = iter([seq])
            self.report(f"c{seq}", output=b"out\n")
        self.assertEqual(re.findall("c. *\tout|OK! c.", out.getvalue().decode()),
                         ["c2\tout", "c1\tout", "OK! c1", "OK! c2"])

    def test_results_without_those_before_them_keep_their_order(self):
        out = self.text("-b", "-k")
        for seq in range(1, 5):
            self.reports.expect(seq, "")
        for seq in (4, 2, 3):
            self.ids = iter([seq])
            self.report(f"c{seq}")
        self.assertEqual(out.getvalue(), b"")
        self.end(complete=False)  # the first never ran
        self.assertEqual(re.findall("OK! c(.)", out.getvalue().decode()), ["2", "3", "4"])

    def test_fail_only_shows_what_did_not_simply_pass(self):
        out = self.text("-b", "-f")
        for cmd, tries in (("passed", ()), ("flaky", [(1, "i")]), ("only", [(1, "i"), (1, "i")])):
            self.report(cmd, tries=tries)
        self.assertEqual(re.findall("! (\\w+) ⌚", out.getvalue().decode()), ["flaky", "only"])

    def test_quiet_says_nothing_of_a_run_that_passed(self):
        for more, tries, skipped_failed, said in (
                ((), (), 0, ""), ((), [(1, "i")], 0, "FLAKY! a"),
                ((), (), 1, "Some commands failed"),
                (("--json",), [(1, "i")], 0, ""), (("--json",), (), 1, "Some commands failed")):
            out = self.text("-b", "--quiet", *(more or ["--raw"]))
            self.reports.reporters[0].reporters[1:] = ()  # without JSON lines
            self.reports.started(tc.RunStarted(1))
            self.report("a", tries=tries)
            self.end(skipped=skipped_failed, skipped_failed=skipped_failed)
            self.assertEqual(out.getvalue().decode()[:len(said) or None], said)

    def test_failures_of_an_earlier_run_count(self):
        for failed, words in ((0, "All commands success"), (1, "Some commands failed")):
            out = self.text("-b")
            self.report("a")
            self.end(skipped=3, skipped_failed=failed, rerun="do it again")
            lines = out.getvalue().decode().split("\n")
            self.assertEqual(lines[1][:20], words)
            self.assertEqual("To run just these again: do it again" in lines, bool(failed))
            self.assertIn("Skipped 3 that an earlier run has done" + ", 1 of which failed" * failed,
                          lines)

    def test_the_hash_of_a_part_of_the_run_is_called_so(self):
        for complete in (True, False):
            out = self.text("-b")
            self.report("a")
            self.end(complete)
            self.assertEqual("result hash of these is" in out.getvalue().decode(), not complete)

    def test_tags(self):
        out = self.text("--tag")
        with mock.patch.object(tc, "BLOCK_SIZE", 3):
            self.report("echo a\x1b", output=b"1\n\n345678\n9", line="a\x1b")
        self.assertEqual(out.getvalue().decode().split("\n", 1)[1],
                         "a\\x1b\t1\na\\x1b\t\na\\x1b\t345678\na\\x1b\t9\n\n")

    def test_live_lines(self):
        out = self.text("--live")
        command = self.command("echo a", "a")
        for data in (b"1\n2", b"2\n", b"3"):
            self.reports.live(tc.LiveOutput(command, command.shown, data))
            command.shown += len(data)
        self.assertEqual(out.getvalue(), b"a\t1\na\t22\n")
        self.reports.report(tc.FinalResult(command, {"exitcode": 0, "time": 1.0}, b"1\n22\n33\n4"))
        self.assertEqual(out.getvalue().decode(), "a\t1\na\t22\na\t33\na\t4\nOK! echo a ⌚1.00ms\n")

    def test_a_live_line_ends_with_its_try(self):
        for shown in (b"", b"3\n4"):
            out = self.text("--live")
            command = self.command("a")
            self.reports.live(tc.LiveOutput(command, 0, b"1\n2"))
            if shown:
                self.reports.live(tc.LiveOutput(command, 0, shown))
            command.shown = len(shown)
            self.reports.report(tc.FinalResult(command, {"exitcode": 0, "time": 1.0}, b"3\n4\n5"))
            self.assertEqual(out.getvalue().decode(),
                             "a\t1\na\t2\na\t3\na\t4\na\t5\nOK! a ⌚1.00ms\n")

    def test_a_live_line_that_was_begun_when_all_ended(self):
        out = self.text("--live")
        self.reports.live(tc.LiveOutput(self.command("a"), 0, b"1\n2"))
        self.end(complete=False)
        self.assertEqual(out.getvalue().decode().split("\n")[:3], [
            "a\t1", "a\t2", "Not all commands were executed :("])

    def test_the_summary_on_stderr_comes_after_the_outputs(self):
        """For both may be the same pipe. Nobody waits for a reader of stdout that does not read."""
        for reads in (True, False):
            order, written = [], []

            def writer(file, failed, reads=reads, order=order, written=written):
                def end(ended):
                    order.append(file)
                    if file == 2:
                        ended()
                    elif reads:
                        written.append(ended)
                return mock.Mock(end=end)

            class Event:
                def set(self):
                    pass

                def wait(self, timeout, written=written):
                    """Meanwhile stdout is written."""
                    while written:
                        written.pop()()
            settings = tc.build_parser().parse_args(["client", "--raw"])
            with mock.patch.object(tc, "Writer", writer):
                show = tc.Display(settings, self.store(True), None, tc.Client("r1"))
            with mock.patch.object(tc.threading, "Event", Event):
                show.end(lambda order=order: order.append("ended"))
            self.assertEqual(order, [1, "ended", 2] if reads else [1, 2])

    def test_a_writer_tells_when_it_has_caught_up(self):
        ours, theirs = os.pipe()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        writer, caught_up, done = tc.Writer(theirs, None), threading.Event(), threading.Event()
        writer.caught_up = caught_up.set
        part, parts = bytes(tc.Writer.MAX_BACKLOG // 4), 6
        for _ in range(parts):
            writer.put([part], len(part))
            writer.flush()
        self.assertTrue(writer.is_behind())
        self.assertFalse(caught_up.is_set())
        writer.end(done.set)
        left = parts * len(part)
        while left:
            left -= len(os.read(ours, left))
        self.assertTrue(done.wait(PATIENCE) and caught_up.wait(PATIENCE))
        self.assertFalse(writer.is_behind())

    def test_the_progress_is_drawn_after_what_is_written(self):
        """Never between the parts of an output that waits in a buffer."""
        events, line = [], mock.Mock(tracked=iter)

        @contextlib.contextmanager
        def hidden():
            yield
            events.append("drawn")

        class Terminal(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                events.append(bytes(data))
                return len(data)
        line.hidden, done = hidden, threading.Event()
        with mock.patch.object(tc.threading, "Thread"):
            writer = tc.Writer(1, None)
        for part in (b"a", b"b"):
            writer.put([part])
            writer.flush()
        writer.end(done.set)
        with mock.patch.object(os, "isatty", return_value=True), \
                mock.patch.object(tc, "BlockingFile", lambda *args, **more: Terminal()), \
                mock.patch.object(tc, "PROGRESS_LINE", line):
            writer.write()
        self.assertEqual((events, done.is_set()), ([b"a", "drawn", b"b", "drawn"], True))

    def test_a_writer_that_is_held_up_does_not_redraw_the_progress(self):
        with mock.patch.object(tc.threading, "Thread"):
            writer = tc.Writer(1, None)
        writer.redraw()
        self.assertEqual(writer.batches.qsize(), 1)
        writer.redraw()
        self.assertEqual(writer.batches.qsize(), 1)

    def test_a_live_line_without_end(self):
        out = self.text("--live")
        command = self.command("a")
        with mock.patch.object(tc, "BLOCK_SIZE", 5):
            for data in (b"123", b"456", b"7\n"):
                self.reports.live(tc.LiveOutput(command, command.shown, data))
                command.shown += len(data)
        self.assertEqual(out.getvalue(), b"a\t123456\na\t7\n")

    def pieces(self, *rows):
        return b"".join(tc.PIECE_HEADER.pack(stream, len(data)) + data for stream, data in rows)

    def test_raw_outputs(self):
        out, err = io.BytesIO(), io.BytesIO()
        self.text("--raw")
        settings = tc.build_parser().parse_args(["client", "--raw"])
        with mock.patch.object(tc, "Writer", lambda file, failed: mock.Mock(
                put=(None, out, err)[file].writelines)):
            self.reports.reporters = tc.Display(
                settings, self.reports.store, None, self.client).reporters
        with mock.patch.object(tc, "BLOCK_SIZE", 3):
            self.report("a", output=self.pieces((1, b"out"), (2, b"err"), (1, b"more\n")),
                        split=True)
        self.report("b", output=b"of a plain worker")
        self.end()
        self.assertEqual(out.getvalue(), b"outmore\nof a plain worker")
        self.assertEqual(err.getvalue().decode().split("\n")[:3],
                         ["OK! a ⌚8.14ms", "err", "OK! b ⌚8.14ms"])
        self.assertEqual(self.reports.store.hash(), naive_hash([
            (b"a", 0, b"outerrmore\n"), (b"b", 0, b"of a plain worker")]))

    def test_split_outputs_are_compared_by_what_was_printed(self):
        store = self.store(split=True)
        for parts in ([b"abcd", b"x"], [b"ab", b"cdw"], [b"a"] * 5):
            output = self.pieces(*((1, part) for part in parts))
            store.results.append(store.put(b"c", 0, output))
        with mock.patch.object(tc, "BLOCK_SIZE", 2):
            self.assertEqual(store.hash(), naive_hash(
                [(b"c", 0, b"abcdx"), (b"c", 0, b"abcdw"), (b"c", 0, b"aaaaa")]))

    def test_the_hash_does_not_depend_on_how_an_output_was_split(self):
        r = random.Random(4)
        for _ in range(50):
            results = [(b"c", 0, bytes(r.choices(b"ab", k=r.randint(1, 5)))) for _ in range(6)]
            store = self.store(split=True)
            for cmd, exitcode, output in results:
                cuts = sorted(r.choices(range(len(output) + 1), k=2))
                parts = output[:cuts[0]], output[cuts[0]:cuts[1]], output[cuts[1]:]
                packed = self.pieces(*((r.choice([1, 2]), part) for part in parts))
                store.results.append(store.put(cmd, exitcode, packed))
            self.assertEqual(store.hash(), naive_hash(results))

    def test_json_lines(self):
        out = self.text("--json", "-f")
        self.report("passed")
        with mock.patch.object(tc, "BLOCK_SIZE", 3):
            self.report("a '☃", 3, b"1\xe2\x98\x83\n", tries=[(1, "i")], slot=2, signal=9)
        row = json.loads(out.getvalue())
        self.assertEqual((row["command"], row["output"], row["exitcode"], row["verdict"],
                          row["time"]),
                         ("a '☃", "1☃\n", 3, "FAIL", 8.14))
        self.assertEqual((row["tries"], row["slot"], row["seq"]), ([{
            "exitcode": 1, "host": "i", "worker": "", "slot": 0, "started": 0.0, "time": 0.0,
            "reason": "", "output": ""}], 2, 2))
        self.assertEqual({*row}, {
            "seq", "command", "exitcode", "verdict", "only_on", "host", "worker", "slot", "started",
            "time", "signal", "reason", "tries", "output"})

    def test_json_lines_name_the_files_that_came_back(self):
        out = self.text("--json", "-b")
        self.reports.files = mock.Mock(finish=lambda effect: ["/t/a\udcff"])
        self.report("a")
        self.assertEqual(json.loads(out.getvalue())["returned"], ["/t/a\ufffd"])

    def test_brief_json_lines_have_no_outputs(self):
        out = self.text("--json", "-b")
        self.report("a", 3, b"x", tries=[tc.Try(1, "i", output=b"y")])
        row = json.loads(out.getvalue())
        self.assertEqual(("output" in row, "output" in row["tries"][0]), (False, False))

    def test_json_lines_are_utf8_and_have_bytes_that_are_not_beside(self):
        out = self.text("--json")
        for data in (b"1\xe2\x98\x83\xff\n\xe2\x98", b"\xff and then only good ones"):
            self.report("c", output=data)
            row = json.loads(out.getvalue())
            self.assertEqual(base64.b64decode(row["output_base64"]), data)
            self.assertEqual(row["output"], data.decode("utf-8", "replace"))
            out.seek(0)
            out.truncate()
        self.report("c", output="is \ufffd a character".encode())
        self.assertNotIn("output_base64", json.loads(out.getvalue()))
        out.seek(0)
        out.truncate()
        data = b"1\xe2\x98\x83\xff\n\xe2\x98"
        with mock.patch.object(tc, "BLOCK_SIZE", 3):
            tries = tc.Try(1, "\udcff", output=b"t\xff"), tc.Try(1, "i", output="☃".encode())
            self.report("a '\udcff", 3, data, reason="in \udcfe\U0001f40d", tries=tries)
        self.assertNotRegex(out.getvalue(), rb"\\ud[c-f]..(?<!\\ud83d\\udc0d)|[^ -~\n]")
        row = json.loads(out.getvalue())
        self.assertEqual((row["output"], row["command"], row["reason"]),
                         ("1☃\ufffd\n\ufffd", "a '\ufffd", "in \ufffd\U0001f40d"))
        for name, exact in (("output", data), ("command", b"a '\xff")):
            self.assertEqual(base64.b64decode(row[name + "_base64"]), exact)
        bad, good = row["tries"]
        self.assertEqual((bad["output"], bad["output_base64"], bad["host"]),
                         ("t\ufffd", base64.b64encode(b"t\xff").decode(), "\ufffd"))
        self.assertEqual((good["output"], "output_base64" in good), ("☃", False))

    def test_one_report_that_cannot_be_written_does_not_keep_others_from_it(self):
        with tempfile.TemporaryDirectory() as folder:
            self.text("-b", "-f")
            one, two = os.path.join(folder, "gone", "x.xml"), os.path.join(folder, "y.html")
            os.mkdir(os.path.dirname(one))
            store = self.reports.store
            self.reports.reporters = [tc.JUnit(one, store), tc.HtmlReport(two, store)]
            shutil.rmtree(os.path.dirname(one))
            with contextlib.redirect_stderr(io.StringIO()) as err:
                self.report("a")
                self.end()
            said = f"testcloud: cannot write {one}: No such file or directory\n"
            self.assertEqual(err.getvalue(), said)
            self.assertTrue(self.reports.write_failed)
            self.assertIn("1 command, all passed", tc.read_text(two))

    def test_a_joblog_that_has_no_more_room_does_not_end_the_run(self):
        with tempfile.TemporaryDirectory() as folder:
            self.text("-b")
            log, page = os.path.join(folder, "log"), os.path.join(folder, "page")
            self.reports.reporters = [tc.JobLog(log, []), tc.HtmlReport(page, self.reports.store)]
            self.addCleanup(self.reports.reporters[0].ended, None)
            full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
            with contextlib.redirect_stderr(io.StringIO()) as err, \
                    mock.patch.object(self.reports.reporters[0], "write", full):
                self.report("a")
                self.report("b")
                self.end()
            said = f"testcloud: cannot write {log}: No space left on device\n"
            self.assertEqual(err.getvalue(), said)
            self.assertIn("2 commands, all passed", tc.read_text(page))

    def test_a_joblog_is_of_one_client_at_a_time(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "log")
            for rows in ([], ["a line\n"]):
                log = tc.JobLog(path, rows)
                for more in ([], ["another\n"]):
                    with self.assertRaisesRegex(OSError, "another client writes it"):
                        tc.JobLog(path, more)
                log.ended(None)
                self.assertEqual(tc.read_text(path), tc.JOBLOG_HEADER + "".join(rows))
            busy = OSError(errno.EBUSY, "Device or resource busy")  # it is a mount point
            with mock.patch.object(os, "replace", side_effect=busy):
                log = tc.JobLog(path, ["b\n"])
            log.write("c\n")
            log.ended(None)
            self.assertEqual(tc.read_text(path), tc.JOBLOG_HEADER + "b\nc\n")

    def test_a_joblog_on_a_pipe_that_is_full_and_does_not_block(self):
        """It is waited for, as for any other pipe."""
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        found, lines = [], [f"{n:999}\n" for n in range(1000)]

        def read():
            wait_until_full(theirs)
            with open(ours) as file:
                found.extend(file)
        reader = threading.Thread(target=read)
        reader.start()
        with mock.patch.dict(tc.STANDARD_STREAMS, {"/dev/stdout": theirs}):
            log = tc.JobLog("/dev/stdout", [])
        for line in lines:
            log.write(line)
        log.ended(None)
        os.close(theirs)
        reader.join(PATIENCE)
        self.assertEqual(found, [tc.JOBLOG_HEADER, *lines])

    def log(self, path, rows=(), *reports):
        """A job log that is written with these results, and its lines."""
        self.text("-b")
        self.reports.reporters = [tc.JobLog(path, rows)]
        for cmd, code, more in reports:
            self.report(cmd, code, b"12", **more)
        self.end()
        with open(path, newline="") as file:
            return file.read()

    def test_the_joblog(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "log")
            text = self.log(path, (), ("a\tb\nc", 137, {"signal": 9, "started": 5.25}),
                            ("b", 0, {"tries": [(1, "h"), (1, "h")]}))
            self.assertEqual(text, tc.JOBLOG_HEADER
                             + "1\th\t5.250\t     0.008\t0\t2\t137\t9\ta\tb\0c\n"
                             + "2\th (flaky)\t0.000\t     0.008\t0\t2\t0\t0\tb\n")
            rows = tc.read_joblog(path)
            self.assertEqual([row[:5] for row in rows],
                             [(1, "a\tb\nc", 0, True, 0.008), (2, "b", 0, False, 0.008)])
            self.assertTrue(all(row.failed for row in tc.read_joblog(path, True)))
            with open(path, "ab") as file:  # its writer was killed in the middle of a line
                file.write(b"noise\n3\th\t1.0\t2.0\t0\t2\t0\t0\tech")
            with contextlib.redirect_stderr(io.StringIO()) as err:
                self.assertEqual(tc.read_joblog(path), rows)
            self.assertIn("log: passing over 1 damaged line\n", err.getvalue())
            of_others = tc.JOBLOG_HEADER + "1\th\t5.250\t0.008\t12345\t2\t0\t0\tof GNU parallel\n"
            with open(path, "w") as file:
                row = outcome(stored=tc.StoredResult(b"", 0, 0, 0, 3), occurrence=2)
                file.write(of_others + tc.joblog_line(row))
            self.assertEqual([row.occurrence for row in tc.read_joblog(path)], [0, 2])
            text = self.log(path, [rows[1].line], ("c", 0, {}))
            self.assertEqual([line.split("\t")[-1] for line in text.splitlines()],
                             ["Command", "b", "c"])

    def test_a_command_that_a_signal_ended_has_failed_whatever_its_exit_code(self):
        """GNU parallel logs exit code 0 for it."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "log")
            with open(path, "w") as file:
                file.write(tc.JOBLOG_HEADER + "1\t:\t1.000\t0.5\t0\t0\t0\t9\ta\n"
                           + "2\t:\t1.000\t0.5\t0\t0\t0\t0\tb\n")
            rows = tc.read_joblog(path)
            self.assertEqual([row.failed for row in rows], [True, False])
            for failures_too, expected in ((False, (True, 2, 1)), (True, (False, 1, 0))):
                earlier = tc.EarlierRun(rows, failures_too)
                earlier.has_done("b", 0)
                self.assertEqual((earlier.has_done("a", 0), earlier.skipped,
                                  earlier.skipped_failed),
                                 expected)

    def test_the_joblog_names_the_host_in_one_column(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "log")
            with open(path, "w") as file:
                file.write("a log of some other run, " * 10 + "which is replaced\n")
            text = self.log(path, (), ("a", 1, {"host": "h\t1\n"}),
                            ("b", 0, {"tries": [(1, "i\t"), (1, "i\t")]}))
            self.assertEqual([line.split("\t")[1] for line in text.splitlines()],
                             ["Host", "h\\t1\\n", "h (only on i\\t)"])
            self.assertEqual([row.failed for row in tc.read_joblog(path)], [True, False])
            self.assertEqual([row.failed for row in tc.read_joblog(path, True)], [True, True])

    def test_a_pipe_that_nobody_opens_is_named(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "log")
            os.mkfifo(path)

            def open_it(text):
                self.assertIn(f"waiting for {path}: it is a pipe", text)
                with open(path, "w") as file:
                    file.write(tc.JOBLOG_HEADER)
            with mock.patch.object(tc, "NOTICE_DELAY", 0), \
                    mock.patch.object(tc, "print_notice", open_it):
                self.assertEqual(tc.read_joblog(path), [])

    def test_what_an_earlier_run_has_done_is_known_by_text_and_occurrence(self):
        def left(rows, failures_too, commands):
            done = tc.EarlierRun([tc.JobLogRow(*row, 1.0, "") for row in rows], failures_too)
            ran = "".join(f"{c}{n}" for c, n in ((c, done.next_occurrence(c)) for c in commands)
                          if not done.has_done(c, n))
            return ran, done.skipped, done.skipped_failed
        rows = [(2, "a", 1, False), (3, "b", 0, True), (5, "a", 2, True), (4, "c", 0, False)]
        for failures_too, commands, expected in (
                (False, "aabcaaa", ("a0a3a4", 4, 2)), (False, "xaacba", ("x0a0", 4, 2)),
                (True, "aabca", ("a0b0a2", 2, 0)), (True, "", ("", 0, 0))):
            self.assertEqual(left(rows, failures_too, commands), expected)
        again = [*rows, (1, "a", 0, True), (5, "a", 2, False)]
        self.assertEqual(left(again, False, "aabca"), ("", 5, 2))
        # GNU parallel has 0 for all; and a line more for what was tried again
        plain = [(1, "a", 0, False), (3, "a", 0, True), (2, "a", 0, False), (3, "a", 0, False)]
        self.assertEqual(left(plain, False, "aaaa"), ("a3", 3, 0))
        many = [(n, "a", 0, False) for n in range(100_000)]
        self.assertEqual(left(many, False, "a" * 100_001), ("a100000", 100_000, 0))

    def test_what_is_no_joblog_is_left_alone(self):
        def refused():
            return self.assertRaisesRegex(tc.SetupError, "is no joblog")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "log")
            for data, is_one in ((b"", True), (tc.JOBLOG_HEADER[:9].encode(), True),
                                 (b"echo a\n", False), (b"\0" * 1000, False)):
                with open(path, "wb") as file:
                    file.write(data)
                with contextlib.nullcontext() if is_one else refused():
                    self.assertEqual(tc.read_joblog(path), [])
        with refused():
            tc.read_joblog("/dev/zero")  # has no end

    def test_without_a_home_there_is_no_cache(self):
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": ""}), \
                mock.patch.object(os.path, "expanduser", lambda path: path):
            self.assertEqual(tc.cache_path("timings.json"), "")
        timings = tc.Timings("")
        timings.fresh = {"a": 1.0}
        timings.ended(None)

    def test_timings_are_remembered(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "new", "timings.json")
            self.assertEqual(tc.read_timings(path), {})
            self.text()
            self.reports.reporters = [tc.Timings(path)]
            self.report("first", time=70.0)
            self.end()
            self.assertEqual(tc.read_timings(path), {"first": 0.07})
            self.reports.reporters = [tc.Timings(path)]
            self.report("a", time=70.0)
            with open(path, "w") as file:  # another client has just ended
                file.write('{"a": 9.0, "old": 1.0}')
            self.report("could not start", 126, reason="no directory", time=99.0)
            self.report("never ran", 126, host="", time=99.0)
            self.end()
            self.assertEqual([*tc.read_timings(path).items()], [("old", 1.0), ("a", 0.07)])
            with mock.patch.object(tc.Timings, "MAX_COMMANDS", 1):
                self.reports.reporters = [tc.Timings(path)]
                self.report("b", time=70.0)
                self.end()
            self.assertEqual(tc.read_timings(path), {"b": 0.07})
            self.assertEqual(os.stat(os.path.dirname(path)).st_mode & 0o777, 0o700)
            self.reports.reporters = [tc.Timings(path)]
            self.report("short", time=49.0)
            self.end()
            self.assertEqual(tc.read_timings(path), {"b": 0.07})
            for text in ("", "[]", '{"a":"b"}', "[" * 100_000):
                with open(path, "w") as file:
                    file.write(text)
                self.assertEqual(tc.read_timings(path), {})

    def test_advice(self):
        for times, slots, words in (
                ([38.0] + [9.0] * 40, 4,
                 "longest command 38.0 s; 11 slots would reach 38.0 s; more"),
                ([38.0] + [9.0] * 40, 12, "longest command 38.0 s: more slots than 11 do not help"),
                ([0.17] + [0.0015] * 100_000, 2, "; 28 slots would reach 5.36 s;"),  # for a broker
                ([1.0], 1, "more slots than 1"), ([0.0, 0.0], 3, "more slots than 1")):
            self.assertIn(words, tc.advice_on_slots(times, slots))
        with mock.patch.object(tc, "makespan", wraps=tc.makespan) as tried:
            self.assertIn("; 500 slots would reach 1.00 s", tc.advice_on_slots([1.0] * 500, 8))
        self.assertLess(tried.call_count, 20)
        self.assertEqual(tc.makespan([1.0, 1.0, 2.0], 2), 2.0)
        r = random.Random(3)
        for _ in range(100):
            times = [r.expovariate(1) for _ in range(r.randint(1, 50))]
            slots = r.randint(1, 20)
            self.assertGreaterEqual(tc.makespan(times, slots) * 1.000001, max(
                max(times), sum(times) / slots))
            self.assertLessEqual(tc.makespan(times, slots), max(times) + sum(times) / slots)

    def test_advice_is_only_given_if_slots_were_what_the_run_waited_for(self):
        summary = tc.Summary(True, 6, 0, {}, 0, 0, 3.0, "a" * 40, "")
        for change, times, slots, said in (
                ({}, [500.0] * 6, 1, ["longest"]), ({}, [500.0] * 6, 0, []),
                ({}, [500.0] * 6, 2, []), ({"spent": 1.6}, [500.0] * 6, 2, []),
                ({"complete": False}, [500.0] * 6, 1, []), ({}, [3000.0], 1, []),
                ({}, [90.0] * 30, 1, []),
                ({"wrong_hash": "the result"}, [500.0] * 6, 1, ["the res", "longest"])):
            lines = tc.final_notices(summary._replace(**change), times, slots)
            self.assertEqual([line[:7] for line in lines], said)

    def test_progress_of_hosts(self):
        client = tc.Client("r1")
        client.wanted_hosts = 2
        client.total = 3
        for connected, words, wait in (
                (None, "0/3+ done, 0 running, 0 of 2 hosts, 0 slots", ""),
                (0, "0/3+ done, 0 running, 0 of 2 hosts, 0 slots", "waiting: no host is connected"),
                (1, "0/3+ done, 0 running, 1 of 2 hosts, 0 slots",
                 "waiting: no host that is connected takes commands")):
            client.connected_hosts = connected
            self.assertEqual(tc.progress_text(client, 1.0), words)
            self.assertEqual(tc.slot_wait_reason(client), wait)
        client.accepted = 1  # the broker has not told us of the slots yet
        self.assertEqual(tc.slot_wait_reason(client), "")
        client.accepted, client.slots, client.expecting = 0, 4, True
        self.assertEqual(tc.slot_wait_reason(client), "waiting for more hosts to connect: 1 of 2 "
                                                      "are there, and cannot run what is left")

    def test_progress(self):
        client = tc.Client("r1")
        client.total, client.workers, client.slots = 10, 1, 4
        self.assertEqual(tc.progress_text(client, 1.0), "0/10+ done, 0 running, 1 worker, 4 slots")
        client.reported, client.failed, client.flaky, client.accepted = 4, 1, 2, 9
        client.input_ended, client.workers = True, 2
        self.assertEqual(tc.progress_text(client, 8.0), "4/10 done, 1 failed, 2 flaky, 4 running, "
                                                        "0.5/s, ETA 12 s, 2 workers, 4 slots")
        for words in ("4/10 done, 1 failed, 2 flaky, 4 running, ETA 12 s, 2 workers, 4 slots",
                      "4/10 done, 1 failed, 2 flaky, 4 running, ETA 12 s",
                      "4/10 done, 1 failed, 2 flaky, ETA 12 s", "4/10 done, ETA 12 s"):
            self.assertEqual(tc.progress_text(client, 8.0, len(words)), words)
            self.assertNotEqual(tc.progress_text(client, 8.0, len(words) - 1), words)
        for spent, rate in ((0.0, "4000/s"), (0.25, "16/s"), (1.6, "2.5/s"), (80.0, "0.05/s")):
            self.assertIn(f", {rate}, ETA", tc.progress_text(client, spent))
        client.input_ended = False
        self.assertNotIn("ETA", tc.progress_text(client, 8.0))

    def test_durations(self):
        for seconds, words in ((0.00814, "8.14 ms"), (1.234, "1.23 s"), (63.14, "63.1 s"),
                               (119.7, "2 min 0 s"), (123, "2 min 3 s"), (7387, "2 h 3 min")):
            self.assertEqual(tc.duration(seconds), words)
        for seconds, words in ((0.2, "0 s"), (59.4, "59 s"), (123, "2 min 3 s")):
            self.assertEqual(tc.duration(seconds, whole=True), words)
        for spent, words in ((0.00814, "8.14ms"), (9.5, "9500.00ms"), (63.14, "63.1 s")):
            self.assertEqual(tc.seed_duration(spent, ms=True), words)

    def test_the_tables_of_the_status(self):
        tables = tc.status_tables(dict(MessagesTest.EXAMPLES["STATUS"], above=["b0"], workers=[
            {"name": "w", "host": "h\x1b[2J", "kind": "worker", "below": [], "labels": ["gpu"],
             "slots": 2, "running": 1, "held": 0, "done": 12, "failed": 3, "weight": -1,
             "load": 0.52, "there": True, "silent": 1.4},
            {"name": "v", "host": "v", "kind": "worker", "below": [], "labels": [],
             "slots": 0, "running": 2, "held": 0, "done": 0, "failed": 0, "weight": 0,
             "load": 9.0, "there": True, "silent": 0},
            {"name": "b2", "host": "b2", "kind": "broker", "below": ["b2", "b3"], "labels": [],
             "slots": 8, "running": 8, "held": 0, "done": 1, "failed": 0, "weight": 0, "load": 0,
             "there": False, "silent": 9}]), "tcp://b:1")
        self.assertEqual(tc.join_tables(tables), [
            "tcp://b:1: 2 workers, 3 of 4 slots busy, 1 client", "below b0", "",
            "HOST      SLOTS  RUNNING  DONE  FAILED  WEIGHT  LOAD     SEEN",
            "b2            8        8     1       0       0        9 s ago  "
            "connection lost; broker b2 b3",
            "h\\x1b[2J      2        1    12       3      -1   0.5  1 s ago  label gpu",
            "v             0        2     0       0       0   9.0  0 s ago  takes nothing new", "",
            "CLIENT  PID  QUEUED  RUNNING  DONE  FAILED  WAITS FOR",
            "h        77       1        2     3       1  a worker"])

    def test_clients_of_the_status(self):
        client, = MessagesTest.EXAMPLES["STATUS"]["clients"]
        whole, table = tc.status_tables({"workers": [], "above": ["b\x1b"], "clients": [
            dict(client, there=False), dict(client, kind="plain", pid=None),
            dict(client, host="x" * 99, kind="above")]}, "tcp://b:1")
        self.assertEqual(whole,
                         ["tcp://b:1: 0 workers, 0 of 0 slots busy, 3 clients", r"below b\x1b"])
        self.assertEqual([line.split("  ")[0] for line in table[1:]],
                         ["h", "h (plain)", f"{'x' * 29}...{'x' * 13} (broker above)"])
        self.assertTrue(table[1].endswith("  its connection"))

    def test_long_names_are_cut_in_the_middle_where_columns_are_few(self):
        rows = [["HOST", "SLOTS", ""], ["build-machine-number-17", "2", "a note"], ["h", "4", ""]]
        self.assertEqual(tc.align_columns(rows)[1], "build-machine-number-17      2  a note")
        self.assertEqual(tc.align_columns(rows, 33), [
            "HOST               SLOTS",
            "build-m...mber-17      2  a note",
            "h                      4"])
        self.assertTrue(tc.align_columns(rows, 10)[1].startswith("build...r-17  "))

    def test_a_progress_notice_names_the_command_that_takes_longest(self):
        client = tc.Client("r1")
        client.total = client.slots = client.workers = 1
        self.assertNotIn(";", tc.progress_notice(client, 1.0, 9.0))
        client.accepted = 2
        for since, id, cmd in ((5.0, 1, "short"), (2.0, 2, "long\x1b")):
            command = client.window[id] = tc.Command(id, cmd, "/")
            command.worker, command.since = "w", since
        client.window[3] = tc.Command(3, "not accepted yet", "/")
        self.assertEqual(tc.progress_notice(client, 1.0, 9.0),
                         "0/1+ done, 1 running, 1 worker, 1 slot; for 7 s: long\\x1b")

    def test_a_progress_notice_comes_when_nothing_else_was_written(self):
        client, bar, said = tc.Client("r1"), tc.ProgressLine(), []
        with mock.patch.object(tc, "PROGRESS_LINE", bar), \
                mock.patch.object(tc, "print_notice", said.append), \
                mock.patch.object(tc.time, "monotonic") as clock:
            for steady, heard, wanted in ((False, (), [60, 120]), (False, (50,), [110]),
                                          (True, (50,), [60, 120])):
                clock.return_value = 1000.0
                shown, found = tc.Progress(client, None, 60.0, steady), []
                for second in range(130):
                    clock.return_value = 1000.0 + second
                    if second in heard:
                        bar.last_write = clock()
                    shown.update()
                    if said:
                        found.append(second)
                        bar.last_write = clock()  # as the real one does
                        said.clear()
                self.assertEqual(found, wanted, (steady, heard))
            shown = tc.Progress(client, None, 60.0, True)
            client.left, clock.return_value = True, 9999.0
            shown.update()
            self.assertEqual(said, [], "the run has ended")

    def test_where_progress_is_shown(self):
        def shown(options, tty=True, piped=False, term="xterm", stderr=True):
            settings = tc.build_parser().parse_args(["client", *options])
            status = mock.Mock(st_mode=stat.S_IFIFO if piped else stat.S_IFCHR)
            stderr = mock.Mock(isatty=lambda: tty) if stderr else None
            with mock.patch.object(sys, "stderr", stderr), \
                    mock.patch.object(os, "fstat", lambda file: status), \
                    mock.patch.dict(os.environ, {"TERM": term}):
                progress = tc.progress_of(settings, tc.Client("r1"), None)
            return progress and (progress.interval, bool(progress.steady))
        line, sometimes = (0, False), (tc.SILENCE_INTERVAL, False)
        steadily = (tc.STEADY_INTERVAL, True)
        for wanted, *case in (
                (line, []), (None, ["--quiet"]), (None, ["--quiet", "-p"]), (line, ["-p"]),
                (sometimes, [], {"tty": False}), (steadily, ["-p"], {"tty": False}),
                (None, [], {"piped": True}), (line, ["-p"], {"piped": True}),  # to a pager
                (None, [], {"term": "dumb"}), (line, ["-p"], {"term": "dumb"}),
                (None, ["-p"], {"stderr": False})):
            self.assertEqual(shown(case[0], **dict(*case[1:])), wanted, case)

    def test_tables_share_a_screen(self):
        tables = [["the whole"], [f"worker {n}" for n in range(20)], ["CLIENTS", "one of them"]]
        self.assertEqual(tc.fit_to_screen(tables, 80, 40), tc.join_tables(tables))
        self.assertEqual(tc.fit_to_screen(tables, 80, 8), [
            "the whole", "worker 0", "worker 1", "worker 2", "(17 more lines)",
            "CLIENTS", "one of them"])
        self.assertEqual(tc.fit_to_screen(tables, 8, 5),
                         ["the who", "worker ", "(19 mor", "CLIENTS"])
        self.assertEqual(tc.fit_to_screen([["a " * 10], ["x" * 9]], 12, 24),
                         ["a a a a a a", "    a a a a", "", "x" * 9])
        for rows in range(2, 30):
            shown = tc.fit_to_screen(tables, 80, rows)
            self.assertLess(len(shown), rows)
            self.assertEqual(shown[0], "the whole" if rows > 3 else shown[0])

    def test_bytes_are_passed_on_as_they_are(self):
        out = self.text()
        self.report("printf '\udcff' \x1b[2J\x9b\udc9b\t\u202e\x07", output=b"\x1b[0m")
        self.assertEqual(out.getvalue(), b"OK! printf '\xff' \\x1b[2J\\x9b\\x9b\t\\u202e\\x07 "
                                         b"\xe2\x8c\x9a8.14ms\n\x1b[0m\n\n")
        out.seek(0)
        out.truncate()
        self.report("printf '\udcff'", output=b"\xff\x00\n")
        self.assertEqual(out.getvalue(), b"OK! printf '\xff' \xe2\x8c\x9a8.14ms\n"
                                         b"\xff\x00\n\n")


HEAD, TAIL = tc.JUNIT_HEAD, tc.JUNIT_TAIL
# those of surefire's elements that we have, in its order
XML_ORDER = ["failure", "rerunFailure", "flakyFailure", "error", "system-out"]
FAILED_TOO = tc.Try(3, "h1"), tc.Try(1, "h2")
PASSED_TOO = tc.Try(3, "h1"), tc.Try(0, "h1")
ODD = ("\0\a\b\t\x0b\x1b\x7f\x85 \udc80\udcff\ud800 \ufffe\uffff\U0001f40d ☃ "
       "<&>'\" ]]> <![CDATA[ &#0;")


def outcome(seq=1, cmd="pi 2", exitcode=0, **more):
    known = {"verdict": "FAIL" if exitcode else "OK", "only_on": "", "host": "h1", "worker": "w1",
             "slot": 2, "started": 1700000000.5, "spent": 1500.0, "signal": 0, "reason": "",
             "tries": (), "shown": 0, "stored": None, "line": "", "occurrence": 0}
    return tc.Outcome(seq, cmd, exitcode, **{"failed": exitcode != 0, **known, **more})


def flaky_counts(outcomes):
    """The outcomes of a run with --fail-on-flaky."""
    return [one._replace(failed=one.verdict != "OK") for one in outcomes]


def never(seq, reason="no worker has gpu"):
    return outcome(seq, "gpu", 126, host="", worker="", slot=0, started=0.0, spent=0.0,
                   reason=reason)


def document(*outcomes, output=b"", trouble="", name="nightly"):
    """A JUnit report of these."""
    pieces = [output] if isinstance(output, bytes) else output
    return "".join(tc.junit_xml(name, outcomes, lambda _: iter(pieces), trouble, 2500.0))


def cases(*outcomes, **more):
    return ET.fromstring(document(*outcomes, **more).encode()).findall("testsuite/testcase")


EVERY_VERDICT = [
    outcome(1, "true"),
    outcome(2, "false", 1, tries=FAILED_TOO),
    outcome(3, "sometimes", verdict="FLAKY", tries=PASSED_TOO),
    outcome(4, "elsewhere", verdict="ONLY", only_on="h1", host="h3",
            tries=(tc.Try(3, "h1"), tc.Try(3, "h1"))),
    outcome(5, "sleep 9", 124, reason="stopped after 1 s", signal=15),
    outcome(6, "crash", 139, signal=11),
    outcome(7, "mv x y", 126, reason="Argument list too long", tries=FAILED_TOO),
    outcome(8, "./not-executable", 126),
    never(9),
]


def documents():
    """JUnit reports of every kind, each with its name."""
    yield "every verdict", document(*EVERY_VERDICT, output=b"some\noutput\n")
    yield "flaky ones count", document(*flaky_counts(EVERY_VERDICT))
    yield "not complete", document(*EVERY_VERDICT, trouble=ODD)
    yield "nothing was run", document(trouble="not all")
    yield "empty", document()
    yield "odd", document(*(row._replace(cmd=ODD, host=ODD, worker=ODD, reason=row.reason and ODD)
                            for row in EVERY_VERDICT), output=bytes(range(256)), name=ODD)
    yield "huge", document(outcome(1, "x" * 10**5, 1), output=[b"\0" * 10**6] * 30)
    yield "no clock", document(outcome(started=0.0, spent=0.0, slot=0))
    yield "long", document(outcome(spent=1e12))


class JUnitTest(unittest.TestCase):
    def test_the_reported_try_decides_and_others_that_failed_tell_more(self):
        found = [[part.tag for part in case] for case in cases(*EVERY_VERDICT)]
        again, once = ["rerunFailure"] * 2, ["flakyFailure"]
        self.assertEqual(found, [parts + ["system-out"] for parts in (
            [], ["failure", *again], once, once * 2, ["failure"], ["failure"], [*again, "error"],
            ["failure"])] + [["error"]])

    def test_what_a_failed_try_printed(self):
        row = outcome(verdict="FLAKY", tries=(
            tc.Try(3, "h1", size=9, output=b"why \xff"), tc.Try(0, "h1", size=5)))
        case, = cases(row)
        self.assertEqual([part.findtext("stackTrace") for part in case.findall("flakyFailure")],
                         ["exit code 3 on h1\n\n[... 4 bytes left out ...]\nwhy \\xff"])

    def test_what_is_flaky_may_be_a_failure(self):
        found = cases(*flaky_counts(EVERY_VERDICT[2:4]))
        self.assertEqual([[part.tag for part in case] for case in found], [
            ["failure", "rerunFailure", "system-out"],
            ["failure", "rerunFailure", "rerunFailure", "system-out"]])
        self.assertEqual([case.find("failure").attrib for case in found], [
            {"type": "Flaky", "message": "tried 3 times; other exit codes: 3 on h1, 0 on h1"},
            {"type": "Only", "message": "tried 3 times; other exit codes: 3 on h1 (2 times)"}])
        row = outcome(verdict="FLAKY", tries=(
            tc.Try(2, "h0"), tc.Try(3, "h1", size=3, output=b"why"), tc.Try(0, "h")))
        case, = cases(*flaky_counts([row]), output=b"passed")
        self.assertTrue(case.findtext("failure").endswith(
            "2 on h0, 3 on h1, 0 on h\n\non h1:\nwhy"))

    def test_outputs_of_tries_are_bounded_too(self):
        one = tc.Try(1, "h1", size=4096, output=b"\0" * 4096)
        rows = [outcome(seq, str(seq), verdict="FLAKY", tries=(one,)) for seq in range(2000)]
        with mock.patch.object(tc, "JUNIT_SIZE", 10**6):
            self.assertLess(len(document(*rows)), 2 * 10**6)

    def test_how_it_ended(self):
        for row, kind, message in (
                (1, "ExitCode", "exit code 1 on h1"),
                (4, "Timeout", "exit code 124 on h1, signal 15: stopped after 1 s"),
                (5, "Signal", "exit code 139 on h1, signal 11"),
                (6, "NotRun", "could not be run on h1: Argument list too long"),
                (8, "NotRun", "could not be run: no worker has gpu"),
                (9, "NotRun", "could not be run")):
            case, = cases([*EVERY_VERDICT, never(10, "")][row], output=b"the output\n")
            end = case.find("failure") if case.find("error") is None else case.find("error")
            self.assertEqual(end.attrib, {"type": kind, "message": message})
            self.assertEqual(end.text, f"{message}\n\nthe output\n")

    def test_totals_count_what_is_there(self):
        for trouble, change in itertools.product(("", "x"), (flaky_counts, list)):
            root = ET.fromstring(document(*change(EVERY_VERDICT), trouble=trouble).encode())
            for node in (root, root.find("testsuite")):
                for what, tag in (("tests", "testcase"), ("failures", "failure"),
                                  ("errors", "error")):
                    self.assertEqual(int(node.get(what)), len(list(root.iter(tag))), what)
                self.assertEqual((node.get("name"), node.get("time")), ("nightly", "2.500"))
            self.assertEqual(root.find("testsuite").get("timestamp"), "2023-11-14T22:13:20+00:00")

    def test_a_run_with_a_trouble_of_its_own_is_no_success(self):
        *_, last = cases(outcome(), trouble="not all were run")
        self.assertEqual(last.get("name"), tc.WHOLE_RUN)
        self.assertEqual(last.find("error").text, "not all were run")
        self.assertEqual(cases(outcome(), outcome(2, tc.WHOLE_RUN), trouble="x")[2].get("name"),
                         tc.WHOLE_RUN + " [2]")

    def test_where_and_when_it_ran_and_what_the_tries_tell(self):
        found = cases(*EVERY_VERDICT[1:4], never(9))
        self.assertEqual([case.findtext("system-out") for case in found], [
            "ran on h1 (worker w1, slot 2) at 2023-11-14T22:13:20+00:00\n"
            "FAIL: tried 3 times; other exit codes: 3 on h1, 1 on h2",
            "ran on h1 (worker w1, slot 2) at 2023-11-14T22:13:20+00:00\n"
            "FLAKY: tried 3 times; other exit codes: 3 on h1, 0 on h1",
            "ran on h3 (worker w1, slot 2) at 2023-11-14T22:13:20+00:00\n"
            "ONLY: tried 3 times; other exit codes: 3 on h1 (2 times)\nfailed on h1 only", None])

    def test_cases_are_in_order_of_input_under_names_of_their_own(self):
        found = cases(outcome(3), outcome(1), outcome(4, "pi 2 [2]"), outcome(2),
                      outcome(5, "b" * 999, 1), outcome(6, "b" * 998))
        self.assertEqual([case.get("name") for case in found], [
            "pi 2", "pi 2 [2]", "pi 2 [3]", "pi 2 [2] [2]", "b" * 240 + "...",
            "b" * 240 + "... [2]"])
        self.assertIn("\ncommand: " + "b" * 999 + "\n", found[4].find("failure").text)
        self.assertEqual({case.get("classname") for case in found}, {"nightly"})

    def test_many_of_the_same_name_take_no_longer(self):
        self.assertEqual(len(set(tc.unique_names(["x"] * 200_000))), 200_000)

    def test_clocks_that_are_wrong_give_no_timestamp(self):
        for wrong in (0.0, -1.0, 1e12, 1e18, float("nan"), float("inf")):
            self.assertEqual(tc.iso_time(wrong), "", wrong)
        self.assertNotIn("timestamp", document(outcome(started=1e18)))
        self.assertIn('timestamp="2023', document(outcome(started=1e18), outcome()))

    def test_no_commands(self):
        self.assertEqual(cases(), [])
        self.assertIn('tests="0"', document())

    def test_every_character_makes_a_document(self):
        shown = r"\x00\x07\x08" + "\t" + r"\x0b\x1b" + "\x7f\x85" + \
            r" \x80\xff\ud800 \ufffe\uffff" + \
            "\U0001f40d ☃ <&>'\" ]]> <![CDATA[ &#0;"
        row = outcome(1, ODD, 1, host=ODD, worker=ODD, reason=ODD, tries=(tc.Try(1, ODD),))
        case, = cases(row, output=ODD.encode("utf-8", "surrogatepass"), name=ODD)
        self.assertEqual(case.get("name"), shown)
        self.assertEqual(case.get("classname"), shown)
        self.assertIn(shown, case.find("failure").get("message"))
        self.assertIn(shown, case.find("rerunFailure/stackTrace").text)
        self.assertIn(r"\xed\xb2\x80", case.find("failure").text)
        for point in range(0x110000):
            if not point % 0x1000:  # all of a block at once, as text and as attribute
                block = "".join(map(chr, range(point, point + 0x1000)))
                ET.fromstring(tc.xml_text(tc.xml_element("a", block, b=block)).encode())

    def test_lines_and_tabs_of_a_name_survive(self):
        self.assertEqual(cases(outcome(cmd="a\tb\nc\rd  e"))[0].get("name"), "a\tb\nc\rd  e")

    def test_bytes_and_colours_of_an_output(self):
        output = b"\x1b[1;31mred\x1b[0m\x1b[K \xff\xc3 \xc3\xa9 \x1b]0;t\a"
        case, = cases(outcome(exitcode=1), output=output)
        self.assertTrue(case[0].text.endswith("\nred \\xff\\xc3 é \\x1b]0;t\\x07"), case[0].text)

    def test_characters_split_between_pieces_are_whole(self):
        case, = cases(outcome(exitcode=1), output=[b"\xe2", b"\x98", b"", b"\x83"])
        self.assertTrue(case[0].text.endswith("\n☃"))

    def test_an_output_is_kept_up_to_its_limit(self):
        for size in (0, 1, HEAD - 1, HEAD, HEAD + 1, HEAD + TAIL):
            for piece in (1000, HEAD, 10**6):
                data = bytes(itertools.islice(itertools.cycle(b"abcdefg"), size))
                self.assertEqual(tc.excerpt(data[at:at + piece] for at in range(0, size, piece)),
                                 data.decode())

    def test_a_longer_output_loses_its_middle(self):
        for piece in (1, 7, TAIL, 10**6):
            data = b"H" * HEAD + b"x" * 5 + b"T" * TAIL
            found = tc.excerpt(data[at:at + piece] for at in range(0, len(data), piece))
            self.assertEqual(found, "H" * HEAD + "\n[... 5 bytes left out ...]\n" + "T" * TAIL)

    def test_a_huge_output_takes_little_memory(self):
        tracemalloc.start()
        pieces = tc.junit_xml("n", [outcome(exitcode=1)],
                                 lambda _: (b"%7d" % n * 2**17 for n in range(200)), False, 1.0)
        size = sum(map(len, pieces))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.assertLess(size, HEAD + TAIL + 2000)
        self.assertLess(peak, 5e6)

    def test_outputs_of_passed_commands_are_not_read(self):
        list(tc.junit_xml("n", [outcome()], lambda _: self.fail(), False, 1.0))

    def test_the_report_has_a_limit(self):
        count = tc.JUNIT_SIZE // (HEAD + TAIL) + 50
        text = document(*(outcome(n, f"c {n}", 1) for n in range(count)), output=b"x" * 10**6)
        self.assertLess(len(text), tc.JUNIT_SIZE + count * 1000)
        self.assertIn("output left out: the report is long", text)
        self.assertEqual(text.count("<failure "), count)

    def test_all_are_well_formed_and_in_the_order_of_surefire(self):
        for name, text in documents():
            root = ET.fromstring(text.encode())
            for case in root.iter("testcase"):
                places = [XML_ORDER.index(part.tag) for part in case]
                self.assertEqual(places, sorted(places), name)
                self.assertLessEqual(len(case.findall("error")), 1)
                self.assertEqual(set(case.attrib), {"name", "classname", "time"})
                for part in case:
                    self.assertEqual(set(part.attrib),
                                     set() if part.tag == "system-out" else {"type", "message"})
                    self.assertEqual([child.tag for child in part],
                                     ["stackTrace"] if part.tag in XML_ORDER[1:3] else [])
            for node in root.iter():
                if "time" in node.attrib:
                    self.assertRegex(node.get("time"), r"\A[0-9]+\.[0-9]{3}\Z")
            self.assertLessEqual({"name", "time", "tests", "errors", "skipped", "failures"},
                                 set(root.find("testsuite").attrib))

    def test_all_are_valid(self):
        schema = os.path.join(HERE, ".venv",
                              "junit-10.xsd")  # of Jenkins' xunit plugin; see Makefile
        try:
            from lxml import etree
        except ImportError:
            self.skipTest("needs lxml")
        if not os.path.exists(schema):
            self.skipTest("needs the schema")
        schema = etree.XMLSchema(etree.parse(schema))
        for name, text in documents():
            with self.subTest(name):
                schema.assertValid(etree.fromstring(text.encode()))
        self.assertFalse(schema.validate(etree.fromstring(document(outcome()).replace(
            "<system-out>", "<nonsense/><system-out>").encode())))


class ReturnedFilesTest(unittest.TestCase):
    def setUp(self):
        self.top = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.top)
        self.told = []
        self.files = tc.ReturnedFiles(self.top, lambda text, error: self.told.append((error, text)))
        self.addCleanup(self.files.close)
        self.ids = itertools.count(1)

    def command(self, *returns, cwd="s", id=None):
        return tc.Command(id or next(self.ids), "make it", cwd, returns)

    def part(self, command, rows, data, offset=0, attempt=1):
        self.files.put_part(tc.ReturnedPart(command, attempt, rows, offset, data))

    def finish(self, command, rows, attempt=1, **more):
        paths = self.files.finish(tc.FinalResult(command, {
            "attempt": attempt, "exitcode": 0, "returned": rows, "host": "h", **more}, b""))
        return [os.path.relpath(path, self.top) for path in paths]

    def there(self):
        """All files: their modes and contents by path."""
        found = {}
        for folder, _, names in os.walk(self.top):
            for name in names:
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                    found[os.path.relpath(path, self.top)] = mode, file.read()
        return found

    def test_files_come_in_any_parts_and_get_their_names_together(self):
        contents = [b"", b"abcdefg", b"h", b"", b"ijk"]
        names = ["empty", "d/e/a", "h", "../none", "../i\udcff"]
        rows = [[0o4755, 0], [0o600, 7], [0o444, 1], [0o640, 0], [0o644, 3]]
        rows[3:3], names[3:3], contents[3:3] = [[]], ["missing"], [b""]
        data, expected = b"".join(contents), dict(zip(
            ["s/empty", "s/d/e/a", "s/h", "none", "i\udcff"],
            [(0o755, b""), (0o600, b"abcdefg"), (0o444, b"h"), (0o640, b""), (0o644, b"ijk")]))
        for size in range(1, len(data) + 1):
            command = self.command(*names)
            for at in range(0, len(data), size):
                before = self.there()
                self.assertFalse(before.keys() & expected.keys() and size == 1)
                self.part(command, rows, memoryview(data)[at:at + size], at)
            self.assertEqual(self.finish(command, rows), [*expected])
            self.assertEqual(self.there(), expected)
            if size == 1:
                self.told.clear()
                shutil.rmtree(os.path.join(self.top, "s", "d"))

    def test_the_reported_try_is_the_one_whose_files_come(self):
        command, other = self.command("a", "b"), self.command("c")
        rows = [[0o644, 1], [0o644, 1]]
        self.part(command, rows, b"12", attempt=1)
        self.part(command, rows, b"34", attempt=2)
        self.part(other, [[0o644, 2]], b"x")  # not the whole
        self.part(command, rows, b"5", attempt=3)
        self.assertEqual(self.finish(command, rows, attempt=2), ["s/a", "s/b"])
        self.part(other, [[0o644, 2]], b"yz")  # it begins anew
        self.assertEqual(self.finish(other, [[0o644, 2]]), ["s/c"])
        self.assertEqual({path: data for path, (_, data) in self.there().items()},
                         {"s/a": b"3", "s/b": b"4", "s/c": b"yz"})
        self.assertFalse(self.files.begun or self.files.faults or self.told)

    def test_nothing_is_left_of_what_was_not_reported(self):
        self.part(self.command("a", cwd=""), [[0o644, 9]], b"half")
        self.assertEqual(len(self.there()), 1)
        self.files.close()
        self.assertEqual(self.there(), {})

    def test_a_part_of_a_file_is_none(self):
        for data, offset in ((b"ab", 0), (b"", 0)):
            command = self.command("a", cwd="")
            self.part(command, [[0o644, 3]], data, offset)
            self.assertEqual(self.finish(command, [[0o644, 3]]), [])
        self.assertEqual(self.told, [
            (True, f"cannot write {self.top}/a: its worker sent only a part")] * 2)
        self.assertEqual(self.there(), {})

    def test_no_link_is_followed_or_replaced(self):
        outside = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, outside)
        os.symlink(outside, os.path.join(self.top, "link"))
        os.symlink(os.path.join(outside, "f"), os.path.join(self.top, "alias"))
        os.mkdir(os.path.join(self.top, "inside"))
        os.symlink("inside", os.path.join(self.top, "here"))
        os.mkfifo(os.path.join(self.top, "fifo"))
        for path, why in (("link/f", "there is a link in its path"),
                          ("here/f", "there is a link in its path"),
                          ("alias", "what is there is no regular file"),
                          ("inside", "what is there is no regular file"),
                          ("fifo", "what is there is no regular file")):
            for size in (0, 3):
                command = self.command(path, cwd="")
                if size:
                    self.part(command, [[0o644, size]], b"x" * size)
                self.assertEqual(self.finish(command, [[0o644, size]]), [])
                self.assertIn(f"cannot write {self.top}/{path}: {why}", self.told.pop()[1])
        self.assertFalse(os.listdir(outside) or os.listdir(os.path.join(self.top, "inside")))
        self.assertEqual(len(os.listdir(self.top)), 5)
        self.assertEqual(self.files.unwritten, 10)

    def test_a_full_disk_spares_other_files_and_commands(self):
        command, rows = self.command("a", "b", cwd=""), [[0o644, 2], [0o644, 2]]

        def limited(file, data, offset):
            if offset == 0:
                raise OSError(28, "No space left on device")
        with mock.patch.object(tc, "write_all", limited):
            self.part(command, rows, b"a")
        self.part(command, rows, b"abb", 1)
        self.assertEqual(self.finish(command, rows), ["b"])
        self.assertEqual(self.told, [
            (True, f"cannot write {self.top}/a: No space left on device")])
        self.assertEqual(self.there(), {"b": (0o644, b"bb")})

    def test_missing_files_are_told_a_few_times_and_then_counted(self):
        for _ in range(tc.NAMED_FAILURES + 2):
            self.finish(self.command("a", "b", "c"), [[], [0o644, 0], []])
        self.finish(self.command("a"), [[]], exitcode=124, reason="stopped")  # which says enough
        self.finish(self.command("a"), [])  # it was not started
        self.assertEqual(
            self.told, [(False, "make it brought no a, c from h")] * tc.NAMED_FAILURES)
        self.files.tell_rest()
        self.assertEqual(self.told[-1], (
            False, "2 other commands brought not all files of --return"))
        self.files.lacking = 0
        self.finish(self.command("a"), [[]], reason="a does not come back: No space left")
        self.assertEqual(self.told.pop()[1],
                         "make it brought no a from h: a does not come back: No space left")
        self.files.tell_missing = False  # with --fail-on-missing
        self.finish(self.command("a"), [[]])
        self.assertEqual(len(self.told), tc.NAMED_FAILURES + 1)


class WholeFileTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.path = os.path.join(folder.name, "report.xml")

    def read(self):
        with open(self.path, encoding="utf-8", newline="") as file:
            return file.read()

    def only_the_report(self, *others):
        self.assertEqual(sorted(os.listdir(self.folder)), sorted(["report.xml", *others]))

    def test_a_new_file(self):
        for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
            old = os.umask(mask)
            try:
                tc.write_atomically(self.path, iter(["☃\n", "b\r\n"]))
            finally:
                os.umask(old)
            self.assertEqual(self.read(), "☃\nb\r\n")
            self.assertEqual(os.stat(self.path).st_mode & 0o777, mode)
            os.chmod(self.path, 0o640)
            tc.write_atomically(self.path, [])
            self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o640)
            os.unlink(self.path)

    def test_a_file_is_on_the_disk_before_it_replaces_another(self):
        for durable in (True, False):
            calls = []
            with mock.patch.object(os, "fsync", lambda file, calls=calls: calls.append("fsync")), \
                    mock.patch.object(os, "replace",
                                      lambda *paths, calls=calls: calls.append("replace")):
                tc.write_atomically(self.path, ["x"], durable)
            self.assertEqual(calls, ["fsync", "replace"] if durable else ["replace"])

    def test_a_file_that_is_a_mount_point(self):
        with open(self.path, "w") as file:
            file.write("old")
        busy = OSError(errno.EBUSY, "Device or resource busy")
        with mock.patch.object(os, "replace", side_effect=busy):
            tc.write_atomically(self.path, ["new"])
        self.assertEqual(self.read(), "new")
        self.only_the_report()

    def test_a_device_may_be_in_a_folder_that_is_not_ours(self):
        with mock.patch.object(os, "access", return_value=False):
            tc.JUnit("/dev/null", None)
            tc.JUnit("/dev/stdout", None)
            with self.assertRaises(OSError):
                tc.JUnit(self.path, None)

    def test_in_the_working_directory(self):
        code = "import testcloud; testcloud.write_atomically('report.xml', ['x'])"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=self.folder,
                       env={**os.environ, "PYTHONPATH": HERE})
        self.assertEqual(self.read(), "x")
        self.only_the_report()

    def test_the_old_file_stays_until_the_new_one_is_whole(self):
        tc.write_atomically(self.path, ["old"])
        for error in (OSError("no output"), ValueError("a bug"), KeyboardInterrupt()):
            def pieces(error=error):
                yield "x" * 100_000
                self.assertEqual(self.read(), "old")
                self.assertEqual(len(os.listdir(self.folder)), 2)
                raise error
            with self.assertRaises(type(error)):
                tc.write_atomically(self.path, pieces())
            self.assertEqual(self.read(), "old")
            self.only_the_report()

    def test_an_error_that_looks_like_a_missing_file_is_one(self):
        def pieces():
            yield "x"
            raise FileNotFoundError("no spool")
        with self.assertRaises(FileNotFoundError):
            tc.write_atomically(self.path, pieces())
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_full_disk_raises(self):
        if os.path.exists("/dev/full"):
            with self.assertRaises(OSError):
                tc.write_atomically("/dev/full", ["x" * 100_000])
        tc.write_atomically("/dev/null", ["x"])

    def test_what_cannot_be_written_raises(self):
        loop = os.path.join(self.folder, "loop")
        os.symlink("loop", loop)
        for path in (self.folder, os.path.join(self.folder, "no", "report.xml"), "/proc/none",
                     loop):
            with self.assertRaises(OSError):
                tc.write_atomically(path, ["x"])
        os.unlink(loop)
        self.assertEqual(os.listdir(self.folder), [])

    def test_a_link_stays_and_its_target_is_replaced(self):
        os.mkdir(os.path.join(self.folder, "deep"))
        target = os.path.join(self.folder, "deep", "target.xml")
        os.symlink(os.path.join("deep", "target.xml"), self.path)
        for text in ("made", "replaced"):  # a link to nothing at first
            tc.write_atomically(self.path, [text])
            self.assertTrue(os.path.islink(self.path))
            with open(target) as file:
                self.assertEqual(file.read(), text)
        self.only_the_report("deep")
        self.assertEqual(os.listdir(os.path.dirname(target)), ["target.xml"])

    def test_a_fifo_is_written_to(self):
        os.mkfifo(self.path)
        got = []
        reader = threading.Thread(target=lambda: got.append(self.read()))
        reader.start()
        tc.write_atomically(self.path, ["a", "b"])
        reader.join()
        self.assertEqual(got, ["ab"])
        self.only_the_report()

    def test_stdout_is_written_to_whatever_it_is(self):
        code = ("import testcloud; print('before', flush=True); "
                "testcloud.write_atomically('/dev/stdout', ['<a/>']); print('after')")
        env = {**os.environ, "PYTHONPATH": HERE}
        piped = subprocess.check_output([sys.executable, "-c", code], env=env)
        self.assertEqual(piped, b"before\n<a/>after\n")
        with open(self.path, "wb") as file:
            subprocess.run([sys.executable, "-c", code], stdout=file, env=env, check=True)
        self.assertEqual(self.read(), "before\n<a/>after\n")

    def test_a_joblog_stays_as_it_is_if_another_report_is_refused(self):
        with open(self.path, "w") as file:
            file.write("kept")
        done = subprocess.run([sys.executable, SCRIPT, "client", "--local", "--joblog", self.path,
                               "--junit", "/no/such"], input=b"true", stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, timeout=PATIENCE)
        self.assertEqual((done.returncode, self.read()), (3, "kept"))

    def test_a_joblog_on_stdout_leaves_the_rest_of_it(self):
        with open(self.path, "wb") as file:
            subprocess.run([sys.executable, SCRIPT, "client", "--local", "--joblog", "/dev/stdout"],
                           input=b"true", stdout=file, check=True, timeout=PATIENCE)
        self.assertRegex(self.read(), r"\ASeq\t.*\tCommand\nConnecting")
        self.assertRegex(self.read(), r"\n1\t.*\ttrue\n")
        self.assertRegex(self.read(), r"\nRan 1 command in .*\n\Z")

    def test_it_holds_one_piece_at_a_time(self):
        tracemalloc.start()
        tc.write_atomically(self.path, ("x" * 100_000 for _ in range(500)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.assertLess(peak, 2e6)
        self.assertEqual(os.path.getsize(self.path), 50_000_000)


BROWSER = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
HOSTILE = [
    "</script><img src=x onerror=document.title='owned'>",
    "<!--<script>document.title='owned'</script>",
    "\"><svg onload=document.title='owned'>",
    "cat caf\udce9.txt\x00\x1b[31m \u202egnp.exe",
    "echo {{data}} {{title}} \\u003c &lt; 'x' & \"y\"\nb",
]
VOID_TAGS = {"meta", "input", "img", "br"}
CLOSED_BY_OTHERS = {"td", "th", "tr", "dd", "dt", "tbody", "thead", "option"}


def paged(seq, verdict="OK", **fields):
    known = {"cmd": f"./run --case {seq}", "exitcode": int(verdict == "FAIL"), "only_on": "",
             "host": f"host{seq % 3}", "worker": f"host{seq % 3}-7-ab", "slot": seq % 2 + 1,
             "started": 1764080000.0 + seq, "spent": 10.0 * seq, "signal": 0, "reason": "",
             "tries": (), "shown": 0, "stored": None, "line": "", "occurrence": 0}
    found = tc.Outcome(seq=seq, verdict=verdict, failed=False, **{**known, **fields})
    return found._replace(failed=found.exitcode != 0)


NEVER_RAN = {"host": "", "worker": "", "slot": 0, "started": 0.0, "spent": 0.0, "exitcode": 126}
MIXED_RUN = [paged(seq) for seq in range(1, 41)] + [
    paged(41, "FAIL", signal=9, exitcode=137, tries=(tc.Try(1, "host2"),)),
    paged(42, "FLAKY", tries=(tc.Try(124, "host<b>"),)),
    paged(43, "ONLY", only_on="host7", tries=(tc.Try(1, "host7"), tc.Try(1, "host7"))),
    paged(44, "FAIL", reason="No such file: '<b>'", **NEVER_RAN),
] + [paged(45 + at, "FAIL", cmd=cmd, host=cmd) for at, cmd in enumerate(HOSTILE)]


def rendered(outcomes, output_of=lambda outcome: iter([b"an output\n"]), title="a run", facts=()):
    return "".join(tc.html_page(title, outcomes, output_of, facts))


def failure_in_page(parts):
    """The output in the page of one failure."""
    return Parsed(rendered([paged(1, "FAIL")], lambda outcome: iter(parts))).one("pre")


class PageElement:
    def __init__(self, tag, attributes):
        self.tag, self.attributes, self.text = tag, attributes, ""


class Parsed(html.parser.HTMLParser):
    """The elements of a page, in order, with the text in each and in what it contains."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.strays = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        element = PageElement(tag, dict(attributes))
        self.elements.append(element)
        if tag not in VOID_TAGS:
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open and self.open[-1].tag != tag and self.open[-1].tag in CLOSED_BY_OTHERS:
            self.open.pop()
        if not self.open or self.open.pop().tag != tag:
            self.strays.append(tag)

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag=None, **attributes):
        return [element for element in self.elements if tag in (None, element.tag) and all(
            element.attributes.get(name.rstrip("_").replace("_", "-")) == value
            for name, value in attributes.items())]

    def one(self, tag=None, **attributes):
        found, = self.all(tag, **attributes)
        return found

    def data(self):
        return json.loads(self.one("script", id="data").text)


class PageTest(unittest.TestCase):
    def test_the_order_of_names(self):
        names = ["h" + "9" * 5000, "h10", "h2", "", "h", "2", "a\u0664"]
        self.assertEqual(sorted(names, key=lambda name: tc.natural_order((name, "", 1))),
                         ["", "2", "a\u0664", "h", "h2", "h10", "h" + "9" * 5000])

    def test_nothing_of_a_command_becomes_an_element_or_an_attribute(self):
        plain, hostile = Parsed(rendered([paged(1, "FAIL")])), []
        for text in HOSTILE:
            hostile = Parsed(rendered(
                [paged(1, "FAIL", cmd=text, host=text, worker=text, reason=text,
                         only_on=text, tries=(tc.Try(1, text),))],
                lambda outcome, text=text: iter([text.encode("utf-8", "surrogateescape")]),
                title=text, facts=[(text, text)]))
            with self.subTest(text):
                self.assertEqual(
                    [(element.tag, sorted(element.attributes)) for element in hostile.elements
                     if element.tag not in ("div", "dt", "dd")],
                    [(element.tag, sorted(element.attributes)) for element in plain.elements
                     if element.tag not in ("div", "dt", "dd")])
                self.assertEqual(hostile.strays, [])

    def test_commands_are_the_same_in_html_and_json(self):
        parsed = Parsed(rendered(MIXED_RUN))
        commands = {row[0]: row[1] for row in parsed.data()["commands"]}
        for at, text in enumerate(HOSTILE):
            self.assertEqual(commands[45 + at], tc.one_line(text))
            self.assertIn(tc.one_line(text), [element.text for element in parsed.all("code")])

    def test_what_has_no_shape_is_shown_as_an_escape(self):
        for text, shown in [
            ("a\tb", "a\tb"), ("a\nb", r"a\nb"), ("\x1b[0m", r"\x1b[0m"), ("\x00", r"\x00"),
            ("caf\udce9", r"caf\xe9"), ("\ud800", r"\ud800"), ("\u202eabc", r"\u202eabc"),
            ("日本 é ☃", "日本 é ☃"), ("\u2028", r"\u2028"), ("\ufffe", r"\ufffe"),
        ]:
            self.assertEqual(tc.one_line(text), shown)

    def test_pieces_are_utf_8_without_exception(self):
        self.assertNotIn(b"\x00", rendered(MIXED_RUN).encode("utf-8"))

    def test_braces_of_a_command_are_no_place_in_the_page(self):
        self.assertIn("echo {{data}} {{title}}", rendered(MIXED_RUN))

    def test_page_is_well_formed_and_asks_nobody_for_anything(self):
        text = rendered(MIXED_RUN)
        parsed = Parsed(text)
        self.assertEqual(parsed.strays, [])
        ids = [element.attributes["id"] for element in parsed.elements
               if "id" in element.attributes]
        self.assertEqual(len(ids), len(set(ids)))
        policy = parsed.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
        self.assertTrue(policy.startswith("default-src 'none';"))
        for element in parsed.elements:
            self.assertNotIn(element.tag, ("link", "iframe", "img", "object", "base", "form"))
            self.assertFalse([name for name in element.attributes
                              if name == "src" or name[:2] == "on"])
            self.assertTrue(element.attributes.get("href", "#").startswith("#"))
        self.assertNotIn("://", tc.HTML_TEMPLATE)

    def test_headline_counts(self):
        flaky = [paged(1), paged(2, "FLAKY"), paged(3, "ONLY", only_on="h")]
        for outcomes, words, state, *more in [
                ([], "No commands", "OK"), (MIXED_RUN[:1], "1 command, all passed", "OK"),
                (MIXED_RUN[:40], "40 commands, all passed", "OK"),
                (MIXED_RUN, "7 of 49 commands failed", "FAIL"),
                (flaky, "3 commands, all passed", "OK"),
                (flaky_counts(flaky), "2 of 3 commands failed", "FAIL"),
                (flaky, "3 commands; not <all>", "FAIL", "not <all>"),
                (MIXED_RUN, "7 of 49 commands failed; not all", "FAIL", "not all"),
                ([], "No commands; not all", "FAIL", "not all")]:
            page = Parsed("".join(tc.html_page("a run", outcomes, lambda outcome: iter([]), (),
                                               *more)))
            self.assertEqual((page.one("h1").text, page.one("header").attributes["class"]),
                             (words, state))

    def test_failures_and_flaky_need_no_script(self):
        text = rendered(MIXED_RUN).partition('<script type="application/json"')[0]
        self.assertIn("exit code 137; killed by SIGKILL; tried 2 times; other exit codes: "
                      "1 on host2; "
                      "host2, slot 2 of host2-7-ab, 410.00 ms",
                      text)
        self.assertIn("exit code 126; No such file: &#x27;&lt;b&gt;&#x27;", text)
        self.assertIn("failed only on host7; tried 3 times; other exit codes: 1 on host7 (2 times)",
                      text)
        self.assertIn("other exit codes: 124 on host&lt;b&gt;", text)
        self.assertEqual(text.count("an output"), 7)

    def test_only_outputs_of_failures_are_read(self):
        read = []
        rendered(MIXED_RUN, lambda outcome: read.append(outcome.seq) or iter([]))
        self.assertEqual(read, [41, 44, 45, 46, 47, 48, 49])

    def test_long_output_keeps_both_ends(self):
        parts = [b"x" * 1000] * 100
        self.assertEqual(tc.head_and_tail(iter([b"abc", b"", b"defgh"]), 3, 3), (b"abc", 2, b"fgh"))
        self.assertEqual(tc.head_and_tail(iter([b"abcdefg"]), 4, 4), (b"abcd", 0, b"efg"))
        self.assertEqual(tc.head_and_tail(iter([]), 4, 4), (b"", 0, b""))
        pre = failure_in_page([b"first", *parts, b"last"])
        left_out = 100_009 - 2 * tc.HTML_OUTPUT
        self.assertRegex(pre.text, f"^\nfirstx+{left_out:,} bytes left outx+last$")

    def test_outputs_of_other_tries_are_folded(self):
        tries = tuple(tc.Try(n, "h", output=b"said %d" % n, size=6) for n in (1, 0, 3))
        page = Parsed(rendered([paged(1, "FAIL", tries=(*tries, tc.Try(4, "h")))]))
        self.assertEqual([one.text for one in page.all("details")],
                         [f"Exit code {n} on h\nsaid {n}" for n in (1, 0, 3)])
        self.assertEqual([one.attributes for one in page.all("details")], [{}] * 3)  # closed

    def test_failures_come_first(self):
        ids = re.findall(r'<section id="(\w+)"', tc.HTML_TEMPLATE)
        self.assertEqual(ids, ["failures", "flaky", "timeline", "commands"])

    def test_output_that_is_no_utf_8(self):
        pre = failure_in_page([b"a\xff\r\n\x1b[1m\rb"])
        self.assertEqual(pre.text, "\na\ufffd\n\\x1b[1m\\rb")

    def test_no_output_and_a_character_between_its_halves(self):
        page = Parsed(rendered([paged(1, "FAIL")], lambda outcome: iter([])))
        text = page.one("section", id="failures")
        self.assertIn("It wrote nothing.", text.text)
        pre = failure_in_page([b"x" * (tc.HTML_OUTPUT - 1) + "☃".encode()])
        self.assertTrue(pre.text.endswith("x☃"))

    def test_many_failures_share_the_room(self):
        failed = [paged(seq, "FAIL") for seq in range(1, 21)]
        with mock.patch.multiple(tc, HTML_ENTRIES=10, HTML_OUTPUTS=1000):
            parsed = Parsed(rendered(failed, lambda outcome: iter([b"x" * 5000])))
        outputs = parsed.all("pre")
        self.assertEqual([element.text.count("x") for element in outputs], [100] * 10)
        self.assertIn("has 10 more", parsed.one("section", id="failures").text)

    def test_rows_are_slots_in_the_order_people_count(self):
        outcomes = [paged(at, host=f"host{at}", worker="w") for at in (10, 2, 1)]
        data = Parsed(rendered([*outcomes, paged(3, "FAIL", **NEVER_RAN)])).data()
        self.assertEqual([row[0] for row in data["rows"]], ["host1", "host2", "host10"])
        self.assertEqual(data["began"], 1764080001.0)
        self.assertEqual([(seq, row, at) for seq, _, _, row, at, _, _ in data["commands"]],
                         [(1, 0, 0.0), (2, 1, 1000.0), (3, -1, 0.0), (10, 2, 9000.0)])

    def facts(self, *outcomes, **changes):
        """The facts at the top of a report, by name."""
        report = tc.HtmlReport(os.devnull, mock.Mock(output=lambda stored: []))
        report.outcomes = outcomes
        summary = tc.Summary(True, 1, 1, {"host<9>": 4}, 0, 0, 3.0, "a" * 40)
        text = "".join(report.content(summary._replace(**changes)))
        return dict(re.findall("<dt>(.*?)<dd>(.*?)</div>", text))

    def test_facts(self):
        tried = paged(3, "FLAKY", tries=(tc.Try(7, "host8"), tc.Try(7, "host9")))
        self.assertEqual(self.facts(tried, started_elsewhere={"h": 2}), {
            "took": "3.00 s", "hosts": "3", "result hash": "a" * 40,
            "failed only on host&lt;9&gt;": "4", "could not start on h": "2"})
        never = paged(4, "FAIL", **NEVER_RAN)
        self.assertEqual(self.facts(never)["hosts"], "0")
        self.assertIn("result hash of these", self.facts(never, complete=False))

    def test_the_verdicts_that_occur_are_counted(self):
        page = Parsed(rendered([paged(1), paged(2), paged(3, "FLAKY")]))
        self.assertEqual([(link.attributes["href"], link.text) for link in page.all("a")[:3]], [
            ("#verdict=OK", "✓ OK 2"), ("#verdict=FLAKY", "~ FLAKY 1"), ("#failures", "Failures")])

    def test_how_a_command_ended(self):
        for verdict, fields, said, where in (
                ("FAIL", {"exitcode": 3}, "exit code 3", "; host1, slot 2 of host1-7-ab, 10.00 ms"),
                ("FAIL", {"exitcode": 124, "signal": 15},
                 "exit code 124; timed out; killed by SIGTERM", "; host1, slot 2"),
                ("FAIL", dict(NEVER_RAN, reason="no worker\nhas gpu"),
                 r"exit code 126; no worker\nhas gpu", "\n")):
            page = Parsed(rendered([paged(1, verdict, **fields)]))
            self.assertIn(f"✗ FAIL {said}{where}", page.one("section", id="failures").text)
            self.assertEqual(page.data()["commands"][0][-1], said)
        self.assertEqual(Parsed(rendered([paged(1)])).data()["commands"][0][-1], "")

    def test_the_policy_knows_the_script_by_its_hash(self):
        page = Parsed(rendered([]))
        script = page.one("script", id=None).text
        policy = page.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        self.assertIn(f"script-src 'sha256-{digest}'; ", policy)

    def test_the_script_knows_the_elements_of_the_page(self):
        ids = {element.attributes.get("id") for element in Parsed(rendered([])).elements}
        self.assertLessEqual(set(re.findall(r'\$\("(\w+)"\)', tc.HTML_SCRIPT)), ids)

    def test_other_tries_are_bars_and_their_outputs_are_shown(self):
        page = Parsed(rendered([paged(3, "ONLY", only_on="host9", tries=(
            tc.Try(7, "host9", "w", 1, 1764080001.0, 500.0, 4, b"<why"), tc.Try(7, "host9")))]))
        data = page.data()
        self.assertEqual([row[0] for row in data["rows"]], ["host0", "host9"])
        self.assertEqual(data["tries"], [[3, 7, 1, 0.0, 500.0], [3, 7, -1, 0.0, 0.0]])
        self.assertEqual(data["commands"][0][3:5], [0, 2000.0])
        self.assertEqual(page.one("details").text, "Exit code 7 on host9\n<why")

    def test_no_line_of_the_page_is_made_before_it_is_asked_for(self):
        pieces = tc.html_page("a run", MIXED_RUN, lambda outcome: self.fail("read too early"), ())
        self.assertTrue(next(pieces).startswith("<!DOCTYPE html>"))


@unittest.skipUnless(BROWSER, "no chromium or google-chrome")
class BrowserTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.folder.cleanup)

    def visit(self, outcomes, fragment="", extra=""):
        """The page as the browser has it in the end. `extra` is done by a script of ours."""
        text = rendered(outcomes)
        if extra:  # which needs to be let in
            text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text)
            text = text.replace("</body>", f"<script>{extra}</script></body>")
        path = pathlib.Path(self.folder.name, "page.html")
        path.write_text(text, encoding="utf-8")
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        done = subprocess.run(
            [BROWSER, "--headless", "--disable-gpu", "--window-size=1400,900", *sandbox,
             "--enable-logging=stderr", f"--user-data-dir={self.folder.name}/profile",
             "--virtual-time-budget=3000", "--dump-dom", path.as_uri() + fragment],
            capture_output=True, timeout=120, check=True)
        log = done.stderr.decode("utf-8", "replace").splitlines()
        said = [line for line in log if "CONSOLE" in line]
        self.assertEqual(said, [], "an error of the script, or something that the policy refused")
        return Parsed(done.stdout.decode("utf-8"))

    def lines(self, parsed):
        return [element.attributes["id"] for element in parsed.all("details")
                if "id" in element.attributes]

    def chosen(self, parsed):
        """The command of the list that is open."""
        return parsed.one("details", open="")

    def test_script_runs_and_no_command_does(self):
        parsed = self.visit(MIXED_RUN)
        self.assertEqual(parsed.one("title").text, "a run")
        self.assertEqual(parsed.one(id="found").text, "49 of 49")
        self.assertEqual(parsed.all("img") + parsed.all("svg"), [])
        self.assertEqual(self.lines(parsed)[:3], ["l1", "l2", "l3"])
        self.assertGreater(int(parsed.one("canvas").attributes["width"]), 1000)

    def test_only_a_page_of_the_list_are_elements(self):
        long = [paged(seq) for seq in range(1, 1001)]
        parsed = self.visit(long, "#seq=500")
        self.assertEqual(self.lines(parsed), [f"l{seq}" for seq in range(401, 601)])
        self.assertEqual(self.chosen(parsed).attributes["id"], "l500")
        for clicks, first, buttons in ((["next"], 201, []), (["next"] * 4, 801, ["next"]),
                                       (["next", "back"], 1, ["back"])):
            parsed = self.visit(long, extra="".join(f"$('{id}').click();" for id in clicks))
            self.assertEqual(self.lines(parsed)[0], f"l{first}")
            hidden = parsed.all("button", hidden="")
            self.assertEqual([button.attributes["id"] for button in hidden],
                             buttons)

    def test_slowest_first(self):
        parsed = self.visit(MIXED_RUN[:40], extra="$('slowest').click()")
        self.assertEqual(self.lines(parsed), [f"l{seq}" for seq in range(40, 0, -1)])

    def test_times_are_written_as_testcloud_writes_them(self):
        times = [0.0, 8.14, 999.99, 1000, 9990, 10_000, 119_400, 119_600, 3_600_000, 7_199_600, 9e6]
        parsed = self.visit([], extra=f"document.title = {times}.map(duration).join()")
        self.assertEqual(parsed.one("title").text.split(","),
                         [tc.duration(ms / 1000) for ms in times])

    def test_a_long_command_is_cut_in_the_list_and_whole_when_chosen(self):
        long = paged(1, cmd="x" * 9999)
        self.assertEqual(self.visit([long]).one(id="l1").text.count("x"), 500)
        self.assertIn("x" * 9999, self.visit([long], "#seq=1").one(id="l1").text)

    def test_filter_narrows_the_list(self):
        parsed = self.visit(MIXED_RUN, "#q=CASE+3")
        self.assertEqual(self.lines(parsed), ["l3", *(f"l{seq}" for seq in range(30, 40))])
        self.assertEqual(parsed.one(id="found").text, "11 of 49")
        self.assertEqual(self.lines(self.visit(MIXED_RUN, "#verdict=FLAKY")), ["l42"])
        self.assertEqual(self.lines(self.visit(MIXED_RUN, "#q=no+such+file&verdict=FAIL")), ["l44"])
        self.assertEqual(self.lines(self.visit(MIXED_RUN, "#q=nowhere")), [])
        other = self.visit(MIXED_RUN, "#verdict=FLAKY&seq=5")
        self.assertEqual((self.lines(other), other.all("details", open="")), (["l42"], []))

    def test_typing_filters_and_is_remembered_in_the_address(self):
        parsed = self.visit(MIXED_RUN, extra="""$("q").value = "onload"; $("q").oninput();
            document.title = location.hash""")
        self.assertEqual(self.lines(parsed), ["l47"])
        self.assertEqual(parsed.one("title").text, "#q=onload")

    def test_address_chooses_a_command(self):
        for seq in (17, 41, 44, 45, 48):
            item = self.chosen(self.visit(MIXED_RUN, f"#seq={seq}"))
            self.assertEqual(item.attributes["id"], f"l{seq}")
            self.assertIn(tc.one_line(MIXED_RUN[seq - 1].cmd), item.text)
            self.assertEqual("an output" in item.text, seq != 17)
            self.assertIn("never ran" if seq == 44 else f"slot {seq % 2 + 1} of ", item.text)

    def test_address_that_means_nothing_here(self):
        for fragment in ("#seq=999", "#seq=x&verdict=NONE", "#failures", "#=", "#%"):
            parsed = self.visit(MIXED_RUN[:3], fragment)
            self.assertEqual((len(self.lines(parsed)), parsed.all("details", open="")), (3, []))

    def test_a_command_that_is_opened_is_remembered_in_the_address(self):
        parsed = self.visit(MIXED_RUN, "#q=case", """$("l5").firstChild.click();
            setTimeout(() => { document.title = location.hash; }, 100)""")
        self.assertEqual(parsed.one("title").text, "#q=case&seq=5")

    def test_a_command_is_filled_in_when_it_is_first_opened(self):
        click = """$("l5").firstChild.click();"""
        parsed = self.visit(MIXED_RUN,
                            extra=click + f"setTimeout(() => {{ {click} {click} }}, 100)")
        self.assertEqual(self.chosen(parsed).text.count("slot 2 of host2-7-ab"), 1)

    def point(self, kind, seq):
        """A script that has the pointer on a bar."""
        return f"""{{ const c = bySeq.get({seq}), box = lanes.getBoundingClientRect();
            canvas.dispatchEvent(new PointerEvent("{kind}", {{bubbles: true,
              clientX: box.left + 1 + xOf(c) + c.spent * scale / 2,
              clientY: box.top + 1 + yOf(c.row) + HEIGHT / 2}})); }}"""

    def test_click_on_a_bar_opens_its_command(self):
        for seq in (1, 42):
            parsed = self.visit(MIXED_RUN, extra=self.point("click", seq))
            self.assertEqual(self.chosen(parsed).attributes["id"], f"l{seq}")

    def test_pointer_on_a_bar_names_it(self):
        parsed = self.visit(MIXED_RUN, extra=self.point("pointermove", 41))
        self.assertNotIn("hidden", parsed.one(id="tip").attributes)
        for words in ("41: ./run --case 41", "✗ FAIL", "exit code 137", "410.00 ms", "host2"):
            self.assertIn(words, parsed.one(id="tip").text)
        for gone in ("""canvas.dispatchEvent(new PointerEvent("pointerleave"))""",
                     """canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: 1}))"""):
            parsed = self.visit(MIXED_RUN, extra=f"{self.point('pointermove', 41)}; {gone}")
            self.assertIn("hidden", parsed.one(id="tip").attributes)

    def test_failures_are_in_front(self):
        both = [paged(seq, verdict, spent=500.0, slot=1, host="h", worker="w", started=1764080001.0)
                for seq, verdict in ((1, "FAIL"), (2, "OK"))]
        for seen in (self.visit(both, extra=self.point("click", 2)), self.visit(
                both[::-1], extra=self.point("click", 2))):
            self.assertEqual(self.chosen(seen).attributes["id"], "l1")

    def test_other_tries_are_behind_what_is_reported(self):
        middle = """const c = bySeq.get(1), dots = devicePixelRatio, y = yOf(c.row) + HEIGHT / 2;
            document.title = pen.getImageData((xOf(c) + 1) * dots, y * dots, 1, 1).data"""
        one = paged(1, "FAIL", spent=2.0, slot=1)
        long = paged(2, spent=60_000.0, slot=2, host="host1")
        tries = tuple(tc.Try(1, one.host, one.worker, 1, one.started + more, 2.0)
                      for more in (-0.003, 0.003, 0.006))
        seen = {self.visit([row, long], extra=middle).one("title").text
                for row in (one, one._replace(tries=tries))}
        self.assertEqual(len(seen), 1)

    def test_other_tries_are_faint_bars_in_their_rows(self):
        row = paged(1, "FAIL", spent=500.0, slot=1, host="h", worker="w", tries=(
            tc.Try(1, "h", "w", 2, 1764080001.0, 500.0),
            tc.Try(0, "h", "w", 3, 1764080001.0, 500.0)))
        parsed = self.visit([row], extra="""const dots = devicePixelRatio, line = pen.getImageData(
            (xOf(bySeq.get(1)) + 3) * dots, 0, 1, canvas.height).data;
            document.title = [...[0, 1, 2].map(row => yOf(row) + HEIGHT / 2), 1].map(y =>
              line.slice(4 * Math.floor(y * dots)).slice(0, 4).join()).join(" ")""")
        seen = parsed.one("title").text.split()
        self.assertEqual(len({*seen}), 4, "failed; failed, but faint; passed, but faint; nothing")

    def test_outputs_of_tries_are_in_the_list_too(self):
        row = paged(1, "FLAKY", tries=(tc.Try(3, "h8", size=4, output=b"why8"),
                                       tc.Try(4, "h9", size=4, output=b"why9")))
        self.assertRegex(self.visit([row], "#seq=1").one(id="l1").text,
                         r"(?s)Exit code 3 on h8\s*why8\s*Exit code 4 on h9\s*why9")

    def test_zoom(self):
        parsed = self.visit(MIXED_RUN, extra="""const before = lanes.scrollWidth;
            $("zoom").value = 2; $("zoom").oninput();
            document.title = [lanes.scrollWidth / before, lanes.scrollLeft * 2 + lanes.clientWidth,
              lanes.scrollWidth].map(Math.round).join()""")
        factor, twice_the_middle, width = map(int, parsed.one("title").text.split(","))
        self.assertGreaterEqual(factor, 3)
        self.assertAlmostEqual(twice_the_middle / width, 1, delta=.2)

    def test_the_bar_of_an_opened_command_comes_in_sight(self):
        parsed = self.visit(MIXED_RUN[:40], extra="""$("zoom").value = 6; $("zoom").oninput();
            location.hash = "seq=40";
            setTimeout(() => { document.title = xOf(bySeq.get(40)); }, 100)""")
        self.assertTrue(170 < float(parsed.one("title").text) < 1400, parsed.one("title").text)

    def test_runs_that_are_odd(self):
        for outcomes in ([], [paged(1, "FAIL", **NEVER_RAN)], [paged(1, spent=0.0)],
                         [paged(1), paged(2, started=1e17)], [paged(7, host="__proto__")]):
            self.assertEqual(self.visit(outcomes).one(id="found").text.split()[0],
                             str(len(outcomes)))

    def test_hosts_with_wrong_clocks_begin_together(self):
        for late, aligned in ((5.0, False), (86400.0, True)):
            parsed = self.visit([paged(1), paged(2, started=1764080000.0 + late)],
                                extra="document.title = [1, 2].map("
                                      "n => xOf(bySeq.get(n)) === GUTTER)")
            self.assertEqual(parsed.one("title").text, f"true,{str(aligned).lower()}")
            self.assertEqual("clocks of hosts differ" in parsed.one(id="caption").text, aligned)


# === Addresses, event loop, links =====================================================


class SocketsTest(unittest.TestCase):
    def test_addresses(self):
        for text, expected in [
                ("tcp://host:7", "tcp://host:7"), ("host:7", "tcp://host:7"),
                ("host", "tcp://host:2224"), ("tcp://host", "tcp://host:2224"),
                ("tcp://*:7", "tcp://*:7"), ("*", "tcp://*:2224"), ("*:0", "tcp://*:0"),
                ("[::1]:7", "tcp://[::1]:7"), ("[::1]", "tcp://[::1]:2224"),
                ("ipc:///tmp/x", "ipc:///tmp/x"), ("10.0.0.1:080", "tcp://10.0.0.1:80")]:
            self.assertEqual(tc.parse_address(text, 2224, listen=True), expected, text)
        self.assertEqual(tc.parse_address("host", 2225), "tcp://host:2225")

    def test_wrong_addresses(self):
        for text in ("", "tcp://", ":7", "host:", "host:x", "host:65536", "host:-1", "http://h:1",
                     "a b", "::1", "ipc://", "[::1", "udp://h:1", "host:٣", "[::1]x"):
            with self.subTest(text=text), self.assertRaises(tc.UsageError):
                tc.parse_address(text, 2224, listen=True)
        for text in ("*", "*:5", "host:0", "ipc://" + "x" * 200):
            with self.subTest(text=text), self.assertRaises(tc.UsageError):
                tc.parse_address(text, 2224)

    def test_frames(self):
        import zmq
        body, token = b"READY", "r1"

        def parse(parts):
            parsed = tc.parse_frames([zmq.Frame(part) for part in parts])
            return parsed and (*parsed[:2], bytes(parsed[2]))
        for parts, expected in [
                ([body], ("", body, b"")), ([b"", body], ("", body, b"")),
                ([b"", b"r1", body], (token, body, b"")), ([body, b"data"], ("", body, b"data")),
                ([b"", b"r1", body, b"data"], (token, body, b"data")),
                ([b"", b"", body], ("", body, b"")),
                ([body, b"x", b"y"], None), ([b"", b"r1", body, b"d", b"e"], None)]:
            self.assertEqual(parse(parts), expected)
        for frame in (tc.Outgoing(WORKERS, b"p", "r1", body, b""),
                      tc.Outgoing(CLIENTS, b"p", "", body, b""),
                      tc.Outgoing(CLIENTS, b"p", "", body, b"d"),
                      tc.Outgoing(WORKERS, b"p", "r1", body, b"d")):
            self.assertEqual(parse(tc.frames_of(frame)), (frame.token, body, frame.data))

    def restore_signals(self):
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            if signal.getsignal(number) is not None:
                self.addCleanup(signal.signal, number, signal.getsignal(number))

    def test_ctrl_c_counts_once_for_a_process_and_its_supervisor(self):
        """Each Ctrl-C arrives in one or two copies; the second one counts as the second."""
        self.restore_signals()
        for copies in (["own", "passed on"], ["passed on", "own"], ["passed on"], ["own"]):
            control, supervisor = os.pipe()
            self.addCleanup(os.close, control)
            statuses = []
            with contextlib.closing(tc.EventLoop(sockets=False)) as loop:
                loop.on_signals(lambda status, now, said=statuses: said.append(status),
                                control if "passed on" in copies else -1)
                loop.add(tc.Machine(), {})
                for count in (1, 2):
                    for copy in copies:
                        if copy == "own":
                            signal.raise_signal(signal.SIGINT)
                        else:
                            os.write(supervisor, bytes([signal.SIGINT]))
                        loop.wait()
                    self.assertEqual(statuses, [130] * count, copies)
                os.close(supervisor)
                loop.wait()
                self.assertEqual(loop.status, 137 if "passed on" in copies else None)

    def test_a_signal_just_before_the_waiting_ends_it(self):
        """Its Python handler may run only after the waiting: the system itself must end it."""
        self.restore_signals()
        with contextlib.closing(tc.EventLoop(sockets=False)) as loop:
            loop.on_signals(lambda status, now: None)
            signal.signal(signal.SIGTERM, lambda number, frame: None)
            signal.raise_signal(signal.SIGTERM)
            loop.add(tc.Machine(), {})
            began = time.monotonic()
            with mock.patch.object(tc, "MAX_POLL_TIME", 2 * PATIENCE):
                loop.wait()  # with nothing due
            self.assertLess(time.monotonic() - began, PATIENCE)

    def test_commands_inherit_no_signal_that_is_blocked_or_ignored(self):
        self.restore_signals()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        statuses = []
        with contextlib.closing(tc.EventLoop(sockets=False)) as loop:
            loop.on_signals(lambda status, now: statuses.append(status))
            loop.add(tc.Machine(), {})
            signal.raise_signal(signal.SIGHUP)
            loop.wait()
        self.assertEqual((signal.pthread_sigmask(signal.SIG_BLOCK, ()), statuses), (set(), []))
        self.assertTrue(callable(signal.getsignal(signal.SIGHUP)))

    def test_a_pause_between_two_messages_is_told_before_the_second(self):
        import zmq
        events, stopped = [], [0.0]

        class Probe(tc.Machine):
            def receive(self, link, peer, token, body, data, now):
                events.append(body)
                stopped[0] = 20.0

            def paused(self, gap, now):
                events.append(round(gap))

        real = time.monotonic
        end = real() + PATIENCE
        with contextlib.closing(tc.EventLoop(sockets=True)) as loop, \
                mock.patch.object(tc.time, "monotonic", lambda: real() + stopped[0]):
            link = tc.RouterLink(loop, loop.add(Probe(), {}), CLIENTS, "tcp://127.0.0.1:0")
            peer = loop.context.socket(zmq.DEALER)
            self.addCleanup(peer.close, 0)
            peer.connect(link.address)
            for body in (b"one", b"two"):
                peer.send(body)
            while len(events) < 3 and real() < end:
                loop.wait()
            peer.close(0)
        self.assertEqual(events, [b"one", 20, b"two"])

    def slow_reader(self, delay):
        """What a machine sees that takes 20 ms for a message, until a deadline after that delay."""
        import zmq
        real = time.monotonic
        end = real() + PATIENCE
        took, seen = [real()], []
        due = took[0] + delay

        class Probe(tc.Machine):
            def receive(self, link, *rest):
                took[0] += 0.02
                seen.append(link)
                if seen == [CLIENTS]:
                    worker.send(b"")
                    adapter.links[WORKERS].socket.poll(PATIENCE * 1000)

            def tick(self, now):
                seen.append("tick")

            def deadline(self):
                return due

        with contextlib.closing(tc.EventLoop(sockets=True)) as loop, \
                mock.patch.object(tc.time, "monotonic", lambda: took[0]):
            adapter = loop.add(Probe(), {})
            peers = []
            for link in (CLIENTS, WORKERS):
                address = tc.RouterLink(loop, adapter, link, "tcp://127.0.0.1:0").address
                peers.append(loop.context.socket(zmq.DEALER))
                peers[-1].connect(address)
            client, worker = peers
            while not all(link.pending for link in loop.links) and real() < end:
                loop.wait()
            for _ in range(200):  # 4 seconds of work
                client.send(b"")
            adapter.links[CLIENTS].socket.poll(PATIENCE * 1000)
            while "tick" not in seen and real() < end:
                loop.wait()
            for peer in peers:
                peer.close(0)
        return seen

    def test_a_deadline_waits_for_the_messages_that_came_before_it(self):
        """A round begins with a poll; what comes after that, and what is due after that, waits."""
        for delay in (0.05, 0.5):  # within the first round, or some rounds later
            seen = self.slow_reader(delay)
            self.assertIn(WORKERS, seen[:seen.index("tick")])
            self.assertLess(seen.index("tick"), 100)

    def test_messages_left_unread_are_read_in_the_next_round(self):
        """Also the news that a peer is gone, if its last message was read when time was up."""
        import zmq
        took = [0.0]
        real = time.monotonic
        seen = []

        class Probe(tc.Machine):
            def receive(self, link, peer, token, body, data, now):
                took[0] += tc.MAX_READ_TIME  # so each round reads two
                seen.append(body)

            def disconnected(self, link, peer, now):
                seen.append("gone")

        with contextlib.closing(tc.EventLoop(sockets=True)) as loop, \
                mock.patch.object(tc, "MAX_POLL_TIME", 2 * PATIENCE), \
                mock.patch.object(tc.time, "monotonic", lambda: real() + took[0]):
            link = tc.RouterLink(loop, loop.add(Probe(), {}), CLIENTS, "tcp://127.0.0.1:0")
            peer = loop.context.socket(zmq.DEALER)
            peer.connect(link.address)
            for n in range(4):
                peer.send(b"%d" % n)
            self.assertTrue(link.socket.poll(PATIENCE * 1000))
            peer.close(PATIENCE * 1000)
            end = real() + PATIENCE
            while len(link.monitored) < 2 and real() < end:  # opened and closed
                link.read_events({link.monitor: zmq.POLLIN}, 0.0)
            while "gone" not in seen and real() < end:
                loop.wait()
        self.assertEqual(seen, [b"0", b"1", b"2", b"3", "gone"])
        self.assertLess(real(), end)

    def router(self, machine):
        """A loop, a RouterLink with that machine, and a function that waits for a condition."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        loop = stack.enter_context(contextlib.closing(tc.EventLoop(sockets=True)))
        link = tc.RouterLink(loop, loop.add(machine, {}), CLIENTS, "tcp://127.0.0.1:0")
        return loop, link, functools.partial(self.wait_until, loop)

    def wait_until(self, loop, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end)
            loop.wait()

    def slow_peer(self, loop, address, name=b"me"):
        """A client that says its name and reads nothing by itself."""
        import zmq
        peer = loop.context.socket(zmq.DEALER)
        self.addCleanup(peer.close, 0)
        peer.linger, peer.rcvhwm, peer.rcvtimeo = 0, 1, int(PATIENCE * 1000)
        peer.routing_id = name
        peer.connect(address)
        peer.send(name)
        return peer

    def test_that_no_more_peers_can_connect_is_said_once(self):
        loop, link, wait_until = self.router(tc.Machine())
        link.file_limit = tc.SPARE_FILES  # so that every descriptor is one of the last
        with mock.patch.object(tc, "print_notice") as notice:
            for count in (1, 2):
                peer = socket.create_connection(tc.split_tcp(link.address))
                self.addCleanup(peer.close)
                wait_until(lambda count=count: len(link.pending) == count)
        self.assertEqual(notice.call_count, 1)

    def test_a_connection_is_pending_until_its_first_message(self):
        import zmq
        loop, link, wait_until = self.router(tc.Machine())
        counted = []  # connections whose bytes a MemoryGuard counts anew
        link.count_anew = counted.append
        peer = loop.context.socket(zmq.DEALER)
        self.addCleanup(peer.close, 0)
        peer.connect(link.address)
        wait_until(lambda: link.pending)
        self.assertEqual(counted, [*link.pending])
        peer.send(b"hello")
        wait_until(lambda: link.descriptor_of)
        self.assertEqual(link.pending, {})
        self.assertEqual([*link.peer_at], [*link.descriptor_of.values()])
        self.assertEqual(counted, 2 * [*link.peer_at])
        peer.close(0)
        wait_until(lambda: not link.descriptor_of)
        self.assertEqual((link.pending, link.peer_at, link.key_of), ({}, {}, {}))

    @unittest.skipUnless(sys.platform == "linux", "not Linux")
    def test_memory_that_whole_messages_take_cuts_nobody_off(self):
        loop, link, wait_until = self.router(tc.Machine())
        guard, looks = tc.MemoryGuard(loop, [link]), []
        peer = self.slow_peer(loop, link.address)
        wait_until(lambda: link.descriptor_of)
        with mock.patch.multiple(tc, MEMORY_LIMIT=0, MEMORY_PER_PEER=0, MAX_UNFINISHED=250_000):
            for _ in range(10):
                guard.check_memory(0.0)
                looks += guard.received.values()
                peer.send(self.BODY)
                wait_until(lambda: not guard.received)
        self.assertEqual(len({*looks}), 10, looks)
        self.assertEqual(list(link.descriptor_of), [b"me"])

    def test_a_peer_is_gone_when_another_has_its_descriptor(self):
        """Although the new one's message is read before the end of the old one's connection."""
        events = []

        class Probe(tc.Machine):
            def receive(self, link, peer, *rest):
                events.append(peer)

            def disconnected(self, link, peer, now):
                events.append(b"gone " + peer)
        loop, link, wait_until = self.router(Probe())
        for n in range(100):
            old, new = b"old%d" % n, b"new%d" % n
            events.clear()
            peer = self.slow_peer(loop, link.address, old)
            wait_until(lambda: events)
            descriptor = link.descriptor_of[old]
            peer.close(0)
            with contextlib.suppress(OSError):
                while os.fstat(descriptor):
                    time.sleep(0.001)
            peer = self.slow_peer(loop, link.address, new)
            self.assertTrue(link.socket.poll(PATIENCE * 1000))
            wait_until(lambda new=new: new in events)
            wait_until(lambda old=old: b"gone " + old in events)
            if link.descriptor_of[new] == descriptor:
                self.assertEqual(events, [old, b"gone " + old, new])
                return
        self.fail("no descriptor was used twice")

    BODY = b"x" * 100_000

    def fill(self, link, peer):
        """Send until something must wait for the peer."""
        for _ in range(1000):
            if link.backlogs:
                return
            link.send(tc.Outgoing(link.name, peer, "", self.BODY, b""))
        self.fail("all was sent to a peer that does not read")

    def test_a_slow_peer_gets_all_in_order(self):
        loop, link, wait_until = self.router(tc.Machine())
        peer = self.slow_peer(loop, link.address)
        wait_until(lambda: link.descriptor_of)
        numbers, got = itertools.count(), []
        while len(link.backlogs.get(b"me", ())) < 3:
            link.send(tc.Outgoing(link.name, b"me", "", b"%d " % next(numbers) + self.BODY, b""))

        def read():
            while peer.poll(0):
                got.append(int(peer.recv().split()[0]))
            return not link.backlogs
        wait_until(read)
        self.assertEqual(link.retry_at, math.inf)
        last = next(numbers)
        link.send(tc.Outgoing(link.name, b"me", "", b"%d" % last, b""))
        while got[-1] != last:
            got.append(int(peer.recv().split()[0]))
        self.assertEqual(got, list(range(last + 1)))

    def test_the_frames_of_a_message_are_bounded(self):
        loop, link, wait_until = self.router(tc.Machine())
        peer = self.slow_peer(loop, link.address)
        wait_until(lambda: link.descriptor_of)
        with mock.patch.object(tc, "parse_frames", side_effect=tc.parse_frames) as parse:
            peer.send_multipart([b""] * 100)
            wait_until(lambda: parse.called)
        self.assertEqual(len(parse.call_args[0][0]), tc.MAX_FRAMES)

    def test_a_peer_that_does_not_read_is_cut_off(self):
        import zmq
        for bounds in ({"MAX_BACKLOG": 5}, {"MAX_BACKLOG_BYTES": 500_000}):
            gone, seen = [], []

            class Probe(tc.Machine):
                def receive(self, link, peer, *rest, seen=seen):
                    seen.append(peer)

                def disconnected(self, link, peer, now, gone=gone):
                    gone.append(peer)
            loop, link, wait_until = self.router(Probe())
            peer = self.slow_peer(loop, link.address)
            monitor = peer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            self.addCleanup(monitor.close, 0)
            self.addCleanup(peer.disable_monitor)
            wait_until(lambda seen=seen: seen)
            with mock.patch.multiple(tc, **bounds):
                self.fill(link, b"me")
                for count in range(2, 7):
                    self.assertEqual((gone, len(link.backlogs[b"me"])), ([], count - 1))
                    link.send(tc.Outgoing(link.name, b"me", "", self.BODY, b""))
            self.assertEqual((gone, link.backlogs, link.descriptor_of), ([b"me"], {}, {}))
            end = time.monotonic() + PATIENCE
            while not monitor.poll(0):  # it learns of that when it has read what came before
                self.assertLess(time.monotonic(), end)
                if peer.poll(10):
                    peer.recv()

    def test_a_new_connection_gets_nothing_that_waited_for_the_last_one(self):
        """Neither if it takes over the routing id, nor if the last one has ended before."""
        for ended in (False, True):
            seen = []

            class Probe(tc.Machine):
                def receive(self, link, peer, token, body, *rest, seen=seen):
                    seen.append(body)

                def disconnected(self, link, peer, now, seen=seen):
                    seen.append("gone")
            loop, link, wait_until = self.router(Probe())
            peers = [self.slow_peer(loop, link.address)]
            wait_until(lambda seen=seen: seen)
            self.fill(link, b"me")
            if ended:
                peers[0].close(0)
                wait_until(lambda seen=seen: seen[1:])
            peers.append(self.slow_peer(loop, link.address))
            wait_until(lambda seen=seen: seen[2:])
            self.assertEqual((seen, link.backlogs), ([b"me", "gone", b"me"], {}))
            link.send(tc.Outgoing(link.name, b"me", "", b"new", b""))
            self.assertEqual(peers[1].recv(), b"new")

    def broker(self, context, address="tcp://127.0.0.1:0"):
        """A ROUTER that reads nothing by itself."""
        import zmq
        router = context.socket(zmq.ROUTER)
        self.addCleanup(router.close, 0)
        router.linger, router.rcvhwm, router.rcvtimeo = 0, 1, int(PATIENCE * 1000)
        router.bind(address)
        return router

    def test_a_new_connection_to_a_broker_gets_nothing_that_waited_for_the_last_one(self):
        import zmq
        seen = []

        class Probe(tc.Machine):
            def connected(self, link, now):
                seen.append("up")

            def disconnected(self, link, peer, now):
                seen.append("down")
        with zmq.Context() as context, contextlib.closing(tc.EventLoop(sockets=True)) as loop:
            first = self.broker(context)
            address = first.last_endpoint.decode()
            link = tc.DealerLink(loop, loop.add(Probe(), {}), BROKER, address)
            self.wait_until(loop, lambda: seen == ["up"])
            self.fill(link, b"")
            first.close(0)
            self.wait_until(loop, lambda: seen == ["up", "down"])
            second = self.broker(context, address)
            self.wait_until(loop, lambda: seen == ["up", "down", "up"])
            link.send(tc.Outgoing(link.name, b"", "", b"new", b""))
            self.assertEqual(second.recv_multipart()[1], b"new")
            self.fill(link, b"")
            with mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror):
                link.reconnect()  # as after a silence, perhaps while no name server answers
            self.assertFalse(link.up)
            self.wait_until(loop, lambda: len(seen) == 4)
            link.send(tc.Outgoing(link.name, b"", "", b"newer", b""))
            got = {}  # by connection

            def has_come():
                while second.poll(0):
                    peer, body = second.recv_multipart()
                    got.setdefault(peer, []).append(body)
                return [b"newer"] in got.values()
            self.wait_until(loop, has_come)
            second.close(0)

    def test_a_message_to_a_lost_peer_tells_that_it_is_gone(self):
        gone = []

        class Probe(tc.Machine):
            def disconnected(self, link, peer, now):
                gone.append(peer)
        _, link, _ = self.router(Probe())
        link.send(tc.Outgoing(link.name, b"lost", "", b"x", b""))
        self.assertEqual((gone, link.backlogs), ([b"lost"], {}))

    def test_nothing_is_kept_for_a_broker_that_is_not_there(self):
        import zmq
        with contextlib.closing(tc.EventLoop(sockets=True)) as loop, \
                socket.create_server(("127.0.0.1", 0)) as server, \
                mock.patch.object(tc.threading, "Thread") as thread:
            address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
            link = tc.DealerLink(loop, loop.add(tc.Machine(), {}), BROKER, address)
            link.send(tc.Outgoing(link.name, b"", "", b"x", b""))
            self.assertEqual((link.backlogs, link.retry_at), ({}, math.inf))
            for now in (1.0, 2.0):  # one look at what is there at a time
                link.handshake_failed(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, 0, now)
            self.assertEqual((thread.call_count, link.retry_at), (1, 1.0 + tc.REFUSED_RETRY))

    def test_a_closed_link_sends_nothing(self):
        """As when a relay's worker has ended before its last messages were passed on."""
        with contextlib.closing(tc.EventLoop(sockets=True)) as loop:
            adapter = loop.add(tc.Machine(), {})
            link = tc.DealerLink(loop, adapter, BROKER, "tcp://127.0.0.1:1")
            link.unread, link.retry_at = True, 0.0
            message = tc.Outgoing(BROKER, b"", "", b"x", b"")
            link.backlogs[b""] = deque([message])
            link.close(0)
            adapter.machine.bulk.append(message)
            loop.flush()
            loop.wait()

    def test_a_round_calls_all_that_was_posted(self):
        with contextlib.closing(tc.EventLoop(sockets=False)) as loop:
            loop.add(tc.Machine(), {})
            calls = []
            for name in "ab":
                loop.post(lambda now, name=name: calls.append(name))
            loop.wait()
            for status in (3, 4):
                loop.exit(status)
            self.assertEqual((calls, loop.run()), (["a", "b"], 3))  # the first status counts

    def test_a_pause_is_told_before_messages_are_sent(self):
        events, now = [], [100.0]

        class Probe(tc.Machine):
            def paused(self, gap, now):
                events.append(gap)

            def take(self):
                events.append("take")
                return super().take()
        with contextlib.closing(tc.EventLoop(sockets=False)) as loop, \
                mock.patch.object(tc.time, "monotonic", lambda: now[0]):
            loop.add(Probe(), {})
            loop.clock()
            now[0] += 20.0
            loop.flush()
        self.assertEqual(events, [20.0, "take"])

    def test_every_interval(self):
        times, now = [], [100.0]
        with contextlib.closing(tc.EventLoop(sockets=False)) as loop, \
                mock.patch.object(tc.time, "monotonic", lambda: now[0]):
            loop.every(2.0, times.append)
            for now[0] in (100.0, 101.9, 102.0, 103.0, 109.0, 110.0, 111.0):
                for function in loop.each_round:
                    function()
        self.assertEqual(times, [100.0, 102.0, 109.0, 111.0])

    def test_routing_ids_cannot_be_guessed(self):
        import ctypes

        import zmq
        ids = set()
        for _ in range(2):
            ctypes.CDLL(None).srand(7)
            with contextlib.closing(tc.EventLoop(sockets=True)) as loop:
                link = tc.RouterLink(loop, loop.add(tc.Machine(), {}), CLIENTS, "tcp://127.0.0.1:0")
                peer = loop.context.socket(zmq.DEALER)
                peer.connect(link.address)
                peer.send(b"")
                ids.add(link.socket.recv_multipart()[0])
                peer.close(0)
        self.assertEqual(len(ids), 2, ids)

    def test_loopback(self):
        for address in ("tcp://127.0.0.1:5", "tcp://127.1.2.3:5", "tcp://[::1]:5", "ipc:///x"):
            self.assertTrue(tc.is_loopback(address))
        for address in ("tcp://0.0.0.0:5", "tcp://10.0.0.1:5", "tcp://[::]:5"):
            self.assertFalse(tc.is_loopback(address))


def record(kind, token=b"", body=b"", data=b""):
    return tc.RECORD.pack(kind, len(token), len(body), len(data)) + token + body + data


def control(*words):
    return record(tc.CONTROL, body=json.dumps(words).encode())


class RecordReaderTest(unittest.TestCase):
    """What comes on a stream, in whatever pieces."""

    MARK = b"3f9c0d57a1b2e846" + b"07d3c5e9f1a8b264"

    def read(self, pieces, mark=b""):
        reader = tc.RecordReader(mark)
        return [found for piece in pieces for found in reader.feed(piece)], reader

    def test_records_that_are_split_at_every_byte(self):
        records = [record(tc.MESSAGE, b"r", b"READY {}", b"data"), control(), control("stop", 143),
                   record(tc.MESSAGE), record(tc.MESSAGE, data=b"\0" * 40)]
        stream, ends = b"".join(records), list(itertools.accumulate(map(len, records)))
        expected = [(tc.MESSAGE, [b"r", b"READY {}", b"data"]), (tc.CONTROL, []),
                    (tc.CONTROL, ["stop", 143]), (tc.MESSAGE, [b"", b"", b""]),
                    (tc.MESSAGE, [b"", b"", b"\0" * 40])]
        for at in range(len(stream) + 1):
            found, reader = self.read([stream[:at], stream[at:]])
            self.assertEqual((found, reader.buffer), (expected, b""), at)
        self.assertEqual(self.read([bytes([byte]) for byte in stream])[0], expected)
        # of a stream that breaks: what was whole, and no more
        for at in range(len(stream)):
            whole = sum(end <= at for end in ends)
            self.assertEqual(self.read([stream[:at]])[0], expected[:whole], at)

    def test_sizes(self):
        for size in (0, 1, 255, 65536, tc.MAX_FRAME):
            for part in range(3):
                parts = [b"", b"", b""]
                parts[part] = b"x" * size
                self.assertEqual(self.read([record(tc.MESSAGE, *parts)])[0], [(tc.MESSAGE, parts)])
        found, _ = self.read([tc.RECORD.pack(tc.MESSAGE, 0, tc.MAX_FRAME + 1, 0)])
        self.assertEqual(found, [(tc.BROKEN, [
            f"sent an invalid record: kind 0, sizes [0, {tc.MAX_FRAME + 1}, 0]"])])

    def test_what_is_no_record(self):
        deep = b"[" * 200000
        for bad in (tc.RECORD.pack(2, 0, 0, 0), b"\xff" * 13, b"bash: no job control",
                    record(tc.CONTROL, body=b"{}"), record(tc.CONTROL, body=b"7"),
                    record(tc.CONTROL, body=b'"reconnect"'), record(tc.CONTROL, body=b"null"),
                    record(tc.CONTROL, body=b""), record(tc.CONTROL, body=b"\xff"),
                    record(tc.CONTROL, body=b"[1"), record(tc.CONTROL, body=deep)):
            with self.subTest(bad=bad[:40]):
                good = record(tc.MESSAGE, body=b"good")
                found, _ = self.read([good + bad])
                self.assertEqual(found[0], (tc.MESSAGE, [b"", b"good", b""]))
                (kind, (why,)), = found[1:]
                self.assertEqual((kind, why[:24]), (tc.BROKEN, "sent an invalid record: "))

    def test_noise_before_the_mark(self):
        rest = b"\n" + record(tc.MESSAGE, body=b"READY")
        expected = [(tc.OPENED, [""]), (tc.MESSAGE, [b"", b"READY", b""])]
        noises = [b"", b"Last login: today\r\n", self.MARK[:-1], self.MARK[1:], self.MARK[:16] * 3,
                  self.MARK[:31] + b"\n", b"\0" * 300, self.MARK[:5] + self.MARK[:9]]
        for noise in noises:
            stream = noise + self.MARK + rest
            for at in range(len(stream) + 1):
                found, reader = self.read([stream[:at], stream[at:]], self.MARK)
                self.assertEqual((found, reader.mark), (expected, b""), (noise, at))
        stream = noises[-1] + self.MARK + rest
        self.assertEqual(self.read([bytes([byte]) for byte in stream], self.MARK)[0], expected)

    def test_noise_without_end(self):
        """It takes little memory, and little time for each byte; the mark is found behind it."""
        reader = tc.RecordReader(self.MARK)
        piece = (self.MARK[:20] + b"motd\n") * 160
        for _ in range(2**20 // len(piece)):
            self.assertEqual(list(reader.feed(piece)), [])
            self.assertLessEqual(len(reader.buffer), tc.MAX_MARK_LINE)
        found = list(reader.feed(piece + self.MARK + b"\n"))
        self.assertEqual(found, [(tc.OPENED, [""])])

    def test_a_reason_behind_the_mark(self):
        stream = b"hello\n" + self.MARK + b"no python, it is \xff old\nmore"
        for at in range(len(stream)):
            found, _ = self.read([stream[:at], stream[at:]], self.MARK)
            self.assertEqual(found[0], (tc.OPENED, ["no python, it is \udcff old"]), at)


class StreamLinkTest(unittest.TestCase):
    def test_a_part_of_a_message_is_a_sign_of_life(self):
        """Of 512 KiB on a slow line, it is the only one for long; keepalives do not count: those
        of a relay say nothing about its broker."""
        broker, links, now = tc.Broker("local", tc.Times(), False, 0.0), tc.PeerLinks(), 0.0
        uplink = tc.BrokerUplink(broker, links, b"0")
        link = tc.StreamLink(broker, WORKERS, b"0", {}, lambda why, now: uplink.ended(now), b"mark",
                             lambda now: uplink.opened(link, now), lambda: now)
        link.write = lambda data: None
        ready = tc.encode("READY", {"name": "w", "slots": 1, "join": 1, "running": [], "held": []})
        link.received(b"mark\n" + record(tc.MESSAGE, body=ready))
        chunk = record(tc.MESSAGE, b"run", tc.encode("CHUNK", {"id": 1, "attempt": 1, "offset": 0}),
                       b"x" * 500)
        for pieces, known in (([chunk[at:at + 10] for at in range(0, len(chunk), 10)], True),
                              ([control()[:-1], control()[-1:]] * 10, False)):
            for n, piece in enumerate(pieces, 1):
                now += 2.0
                link.received(piece)
                if n % 6 == 0:
                    broker.tick(now)
            self.assertEqual(broker.scheduler.slots, int(known))


class Ear(tc.Machine):
    """A machine that only notes what comes."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def receive(self, link, peer, token, body, data, now):
        self.messages.append((link, peer, token, body, bytes(data)))


class PipeLinkTest(unittest.TestCase):
    MARK = RecordReaderTest.MARK

    def setUp(self):
        self.loop = tc.EventLoop(sockets=False)
        self.addCleanup(self.loop.close)
        self.loop.add(tc.Machine(), {})
        self.ends = []  # (name of the link, why)
        self.calls = []  # of controls

    def link(self, name, incoming, outgoing, mark=b""):
        """A link between two descriptors, which it closes."""
        link = tc.PipeLink(
            self.loop, Ear(), name, b"p", incoming, outgoing,
            {word: lambda *words, word=word: self.calls.append((word, *words[:-1]))
             for word in ("stop", "reconnect", "opened")},
            lambda why, now: self.ends.append((name, why)), mark,
            lambda now: self.calls.append((name, "opened")))
        self.addCleanup(link.close)
        return link

    def pair(self):
        """Two links on two pipes."""
        one, two = os.pipe(), os.pipe()
        return self.link("one", one[0], two[1]), self.link("two", two[0], one[1])

    def open_link(self, mark=b""):
        """A link, and the two descriptors of its other end: one to read, one to write."""
        one, two = os.pipe(), os.pipe()
        for file in (two[0], one[1]):
            self.addCleanup(os.close, file)
        return self.link("one", one[0], two[1], mark), two[0], one[1]

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end)
            self.loop.wait()

    def send(self, link, body=b"", token="", data=b""):
        link.send(tc.Outgoing(link.name, b"p", token, body, data))

    def test_messages_of_all_sizes_both_ways_at_once(self):
        one, two = self.pair()
        sizes = [0, 1, 4095, 65537, tc.MAX_FRAME]
        for size in sizes:
            for link in (one, two):
                self.send(link, b"b" * size, "r" * min(size, 100), b"\n" * size)
        self.until(lambda: len(one.machine.messages) + len(two.machine.messages) == 2 * len(sizes))
        for link in (one, two):
            self.assertEqual(link.machine.messages, [
                (link.name, b"p", "r" * min(size, 100), b"b" * size, b"\n" * size)
                for size in sizes])
            self.assertEqual((link.backlog_bytes, len(link.backlog)), (0, 0))
            self.assertNotIn(link.outgoing, self.loop.callbacks)  # it would be writable for ever
        self.assertEqual(self.ends, [])

    def test_any_token(self):
        """A broker sends back what its peer has sent, in UTF-8 perhaps longer than that was."""
        one, two = self.pair()
        for token in ("r" * 70000, "\ufffd" * 70000):
            self.send(one, token=token)
        self.until(lambda: len(two.machine.messages) == 2)
        self.assertEqual([row[2] for row in two.machine.messages], ["r" * 70000, "\ufffd" * 210000])

    @unittest.skipUnless(sys.platform == "linux", "not Linux")
    def test_pipes_grow_when_they_carry_much(self):
        get_size = tc.F_SETPIPE_SZ + 1  # F_GETPIPE_SZ
        for size, grown in ((tc.PIPE_SIZE, tc.PIPE_SIZE), (tc.CHUNK_SIZE, tc.LARGE_PIPE)):
            link, _, _ = self.open_link()
            self.send(link, data=b"x" * size)
            self.assertTrue(link.backlog)
            self.assertEqual(fcntl.fcntl(link.outgoing, get_size), grown)
        for size, grown in ((1000, tc.PIPE_SIZE), (tc.PIPE_SIZE, tc.LARGE_PIPE)):
            link, _, feed = self.open_link()
            os.write(feed, record(tc.MESSAGE, data=b"y" * tc.PIPE_SIZE)[:size])
            self.until(lambda link=link, size=size: len(link.reader.buffer) == size)
            self.assertEqual(fcntl.fcntl(link.incoming, get_size), grown)

    def test_on_a_socket(self):
        left, right = socket.socketpair()
        one = self.link("one", left.fileno(), os.dup(left.detach()))
        two = self.link("two", right.fileno(), os.dup(right.detach()))
        self.send(one, b"x" * 10**6)
        self.send(two, b"y" * 10**6)
        self.until(lambda: one.machine.messages and two.machine.messages)
        one.stop_writing()
        one.close()
        self.until(lambda: self.ends)
        self.assertEqual(self.ends, [("two", "")])

    def test_controls(self):
        one, two = self.pair()
        one.control("stop", 143)
        two.reconnect()
        one.control()
        self.send(one, b"last")
        self.until(lambda: len(self.calls) == 2 and two.machine.messages)
        self.assertEqual(sorted(self.calls), [("reconnect",), ("stop", 143)])

    def test_wrong_records_end_the_stream(self):
        for bad in (control("no such"), control(["stop"]), control({}), control(7), control(None),
                    record(tc.CONTROL, body=b"{}"), b"\xff" * 20):
            with self.subTest(bad=bad):
                self.ends.clear()
                link, _, feed = self.open_link()
                os.write(feed, record(tc.MESSAGE, body=b"good") + bad + record(tc.MESSAGE))
                self.until(lambda: self.ends)
                (_, why), = self.ends
                self.assertRegex(why, "^sent ")
                self.assertEqual([body for *_, body, _ in link.machine.messages], [b"good"])
                self.send(link, b"nobody reads this")

    def test_the_mark_opens_the_stream(self):
        link, tap, feed = self.open_link(self.MARK)
        os.write(feed, b"noise\n" + self.MARK[:9])
        link.beat(0.0)
        self.assertFalse(tc.readable(tap))  # it would be taken for a part of the program
        self.loop.wait()
        self.assertEqual(self.calls, [])
        os.write(feed, self.MARK[9:] + b"\n" + record(tc.MESSAGE, body=b"READY"))
        self.until(lambda: link.machine.messages)
        self.assertEqual((self.calls, self.ends), ([("one", "opened")], []))

    def test_a_reason_behind_the_mark_ends_the_stream(self):
        link, _, feed = self.open_link(self.MARK)
        os.write(feed, self.MARK + b"no python\n" + record(tc.MESSAGE))
        self.until(lambda: self.ends)
        self.assertEqual((self.ends, self.calls, link.machine.messages),
                         ([("one", "no python")], [], []))

    def test_the_end_of_the_stream_within_a_record(self):
        whole, half = record(tc.MESSAGE, body=b"whole"), record(tc.MESSAGE, body=b"x" * 99)
        for at in (0, 1, 12, 13, 50, 111):
            self.ends.clear()
            one, two = os.pipe(), os.pipe()
            link = self.link("one", one[0], two[1])
            os.write(one[1], whole + half[:at])
            os.close(one[1])
            self.until(lambda: self.ends)
            os.close(two[0])
            self.assertEqual((self.ends, [row[3] for row in link.machine.messages]),
                             ([("one", "")], [b"whole"]), at)

    def test_a_slow_reader(self):
        """It gets all, in pieces as small as its pipe takes; what waits is bounded."""
        link, tap, _ = self.open_link()
        reader, sent = tc.RecordReader(), []
        for n in range(200):
            sent.append(b"%d " % n * 1000)
            self.send(link, sent[-1])
        self.assertGreater(link.backlog_bytes, 0)
        self.assertIn(link.outgoing, self.loop.callbacks)
        found = []
        while len(found) < len(sent):
            found += [parts[1] for _, parts in reader.feed(os.read(tap, 5000))]
            self.loop.callbacks.get(link.outgoing, lambda now: None)(0.0)
        self.assertEqual(found, sent)
        self.assertEqual((link.backlog_bytes, self.ends), (0, []))

    def test_a_reader_that_never_reads(self):
        link, _, _ = self.open_link()
        files = link.incoming, link.outgoing
        with mock.patch.object(tc, "MAX_BACKLOG_BYTES", 10**6):
            for _ in range(10):
                self.send(link, b"x" * 10**5)
            self.assertEqual(self.ends, [])  # the pipe has taken a part of the first
            for _ in range(10):
                self.send(link, b"x" * 10**5)
        self.assertEqual(self.ends, [("one", "does not read what it is sent")])
        self.assert_closed(link, files)

    def test_a_reader_that_never_reads_small_records(self):
        """They need more memory than their bytes."""
        link, _, _ = self.open_link()
        with mock.patch.object(tc, "MAX_BACKLOG", 5):
            for _ in range(20000):
                link.control("connected")
        self.assertEqual(self.ends, [("one", "does not read what it is sent")])

    def assert_closed(self, link, files):
        """Closed for good, and only once: the numbers may be those of other files by now."""
        self.assertEqual((link.closed, link.incoming, link.outgoing), (True, -1, -1))
        for file in files:
            self.assertNotIn(file, self.loop.callbacks)
            with self.assertRaises(OSError):
                os.fstat(file)
        null = os.open(os.devnull, os.O_RDONLY)
        others = [os.dup2(null, file) for file in files]
        link.end("again", 0.0)
        link.stop_writing()
        link.close()
        link.control("stop")
        for file in {null, *others}:
            os.close(file)  # raises OSError if the link has closed it
        self.assertEqual((len(self.ends), len(link.backlog)), (1, 0))

    def test_a_reader_that_has_gone(self):
        """What it has said before is heard: results, or the reason why it has ended."""
        one, two = os.pipe(), os.pipe()
        link = self.link("one", one[0], two[1])
        files = link.incoming, link.outgoing
        os.write(one[1], record(tc.MESSAGE, body=b"the last result"))
        os.close(two[0])
        os.close(one[1])
        for _ in range(2):
            self.send(link, b"x")
        self.assertEqual((self.ends, len(link.backlog)), ([], 0))
        self.until(lambda: self.ends)
        self.assertEqual([row[3] for row in link.machine.messages], [b"the last result"])
        self.assertEqual(self.ends, [("one", "")])
        self.assert_closed(link, files)

    def test_a_reader_that_has_gone_and_goes_on_speaking(self):
        for mark in (b"", self.MARK):
            self.ends.clear()
            one, two = os.pipe(), os.pipe()
            self.addCleanup(os.close, one[1])
            link = self.link("one", one[0], two[1], mark)
            os.close(two[0])
            self.send(link, b"x")
            os.write(one[1], control())
            self.loop.wait()
            self.assertEqual(self.ends, [])
            link.beat(0.0)
            self.assertEqual(self.ends, [("one", "")])

    def test_silence_ends_a_stream_and_keepalives_do_not(self):
        one, two = self.pair()
        for _ in range(3 * tc.MAX_SILENT_BEATS):
            for link in (one, two):
                link.beat(0.0)
            self.until(lambda: not one.silent_beats and not two.silent_beats)
        self.assertEqual((one.machine.messages, self.calls, self.ends), ([], [], []))
        for _ in range(tc.MAX_SILENT_BEATS):
            one.beat(0.0)
        self.assertEqual(self.ends, [])
        one.beat(0.0)
        self.assertEqual(self.ends, [("one", "silent for 30 seconds")])
        self.until(lambda: len(self.ends) > 1)  # the other end has heard keepalives to the last
        self.assertEqual(self.ends[1:], [("two", "")])


def globals_of(code):
    """The global names that are used in the functions of a module."""
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from globals_of(part)
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")


class WorkerProgramTest(unittest.TestCase):
    """The part of the program that goes to a host."""

    def setUp(self):
        self.source = tc.worker_program(tc.read_text(SCRIPT))
        self.code = compile(self.source, SCRIPT, "exec")
        self.names = {"__name__": "part"}
        exec(self.code, self.names)

    def test_has_all_that_a_worker_uses(self):
        self.assertLess(len(self.source), 0.6 * os.path.getsize(SCRIPT))
        lacks = {name for name in globals_of(self.code)
                 if name not in self.names and not hasattr(builtins, name)}
        # in memory there is no file, and nobody calls run_broker() or makes a Writer or a socket
        self.assertEqual(lacks, {"__file__", "Broker", "BlockingFile", "zmq"})

    def test_lines_keep_their_numbers(self):
        for name in ("to_text", "run_from_memory"):
            self.assertEqual(self.names[name].__code__.co_firstlineno,
                             getattr(tc, name).__code__.co_firstlineno)


# === Key files and authentication =====================================================


class KeyFilesTest(unittest.TestCase):
    KEYS = tc.Keys("B" * 40, "s" * 40, {"client": tc.KeyPair("c" * 40, "d" * 40),
                                        "worker": tc.KeyPair("w" * 40, "x" * 40)},
                   (tc.KeyHolder("alice", "client", "a" * 40),
                    tc.KeyHolder("hub", "worker", "h" * 40)))

    def setUp(self):
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)
        self.path = os.path.join(self.dir, "testcloud.key")

    def refused(self, reason):
        with self.assertRaises(tc.SetupError) as caught:
            tc.read_keys(self.path)
        self.assertRegex(str(caught.exception), reason)
        for secret in ("s" * 40, "d" * 40, "x" * 40):
            self.assertNotIn(secret, str(caught.exception))

    def test_written_keys_are_read_again(self):
        holders = tc.Keys("B" * 40, pairs={"worker": tc.KeyPair("w" * 40, "x" * 40)})
        for keys in (self.KEYS, holders):
            with contextlib.suppress(OSError):
                os.remove(self.path)
            tc.write_keys(self.path, keys)
            self.assertEqual(tc.read_keys(self.path), keys)
            self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)
        self.replace(self.KEYS)
        self.assertEqual(tc.read_keys(self.path), self.KEYS)
        self.assertEqual(os.listdir(self.dir), ["testcloud.key"])

    def test_a_damaged_file_is_refused_without_showing_it(self):
        good = self.KEYS.to_json()
        for text in ("", "x", "{}", "[]", "[" * 100000, good[:-20],
                     good.replace("B" * 40, "B" * 39), good.replace("h" * 40, "h" * 41),
                     good.replace("x" * 40, ""),
                     good.replace('"public": "a', '"pub": "a'),
                     good.replace("s" * 40, "\u00e9" * 40), good.replace("s" * 40, "~" * 40),
                     json.dumps({"broker": {"public": "B" * 40}}), good.replace('"d', '1, "d')):
            with open(self.path, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(self.path, 0o600)
            self.refused("no key file, or damaged")

    def test_a_file_that_others_could_read_or_change_is_refused(self):
        self.refused("No such file.*--key")
        tc.write_keys(self.path, self.KEYS)
        for mode in (0o604, 0o640, 0o620, 0o601):
            os.chmod(self.path, mode)
            self.refused("chmod 600")
        os.chmod(self.path, 0o600)
        with mock.patch.object(tc.os, "geteuid", return_value=os.geteuid() + 1):
            self.refused("belongs to another user")
        os.remove(self.path)
        os.mkfifo(self.path, 0o600)
        self.refused("it is no file")

    def test_holders_are_added_and_revoked(self):
        path = os.path.join(self.dir, "bob.key")
        more = tc.with_holder(self.KEYS, "worker", "bob-1_x", path)
        own = tc.read_keys(path)
        self.assertEqual((own.broker, own.secret, own.holders, [*own.pairs]),
                         (self.KEYS.broker, "", (), ["worker"]))
        self.assertEqual(more.holders, (*self.KEYS.holders, tc.KeyHolder(
            "bob-1_x", "worker", own.pairs["worker"].public)))
        self.assertEqual(tc.without_holder(more, "alice").holders, more.holders[1:])
        with self.assertRaisesRegex(tc.UsageError, "no key of bob .*only of: alice, hub$"):
            tc.without_holder(self.KEYS, "bob")
        full = self.KEYS._replace(holders=self.KEYS.holders * (tc.MAX_KEY_FILE // 160))
        for keys, name, why in ((self.KEYS, "alice", "a key of alice already"),
                                (full, "bob", "no more fit"), *(
                (self.KEYS, name, "letters, digits") for name in (
                    "", "a b", "a/b", "--", "x" * 101, "\u00e9", "a\n"))):
            with self.assertRaisesRegex(tc.UsageError, why):
                tc.with_holder(keys, "client", name, os.path.join(self.dir, "other.key"))
        self.assertEqual(os.listdir(self.dir), ["bob.key"])

    def test_nothing_is_overwritten_and_no_link_followed(self):
        os.symlink(os.path.join(self.dir, "elsewhere"), self.path)
        with self.assertRaisesRegex(tc.SetupError, "is there already"):
            tc.write_keys(self.path, self.KEYS)
        self.assertEqual(os.listdir(self.dir), ["testcloud.key"])
        with self.assertRaisesRegex(tc.SetupError, "name another file"):
            tc.write_keys(os.path.join(self.dir, "no", "such"), self.KEYS)

    def test_a_change_that_fails_leaves_the_file_as_it_was(self):
        tc.write_keys(self.path, self.KEYS)
        with mock.patch.object(tc.os, "replace", side_effect=OSError(28, "no space left")), \
                self.assertRaisesRegex(tc.SetupError, "cannot write .*: no space left"), \
                tc.locked_key_file(self.path) as replace:
            replace(self.KEYS._replace(holders=()))
        self.assertEqual(os.listdir(self.dir), ["testcloud.key"])
        self.assertEqual(tc.read_keys(self.path), self.KEYS)

    def test_where_a_key_file_is_found(self):
        script, config = os.path.join(self.dir, "bin"), os.path.join(self.dir, "config")
        beside, other = os.path.join(script, "testcloud.key"), f"{config}/testcloud/testcloud.key"
        with mock.patch.object(tc, "__file__", os.path.join(script, "testcloud.py")), \
                mock.patch.dict(os.environ, {"XDG_CONFIG_HOME": config}):
            os.environ.pop("TESTCLOUD_KEY_FILE", None)
            self.assertEqual(tc.find_key_file(None), "")
            for path in (other, beside):
                os.makedirs(os.path.dirname(path))
                open(path, "w").close()
                self.assertEqual(tc.find_key_file(None), path)
            link = os.path.join(self.dir, "link", "testcloud.py")
            os.mkdir(os.path.dirname(link))
            os.symlink(tc.__file__, link)
            with mock.patch.object(tc, "__file__", link):
                self.assertEqual(tc.find_key_file(None), os.path.realpath(beside))
                path = os.path.join(self.dir, "link", "testcloud.key")
                open(path, "w").close()
                self.assertEqual(tc.find_key_file(None), path)
            os.environ["TESTCLOUD_KEY_FILE"] = "/no/such"
            self.assertEqual(tc.find_key_file(None), "/no/such")
            self.assertEqual(tc.find_key_file("/given"), "/given")

    def authenticator(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        loop = stack.enter_context(contextlib.closing(tc.EventLoop(sockets=True)))
        return stack.enter_context(contextlib.closing(tc.Authenticator(loop, self.path)))

    def replace(self, keys):
        with tc.locked_key_file(self.path) as replace:
            replace(keys)

    def test_keys_are_allowed_by_role(self):
        tc.write_keys(self.path, self.KEYS)
        authenticator = self.authenticator()
        for role, key, allowed in [
                ("client", "a", True), ("client", "c", True), ("client", "h", False),
                ("client", "w", False), ("client", "B", False), ("worker", "h", True),
                ("worker", "a", False), ("worker", "w", True), ("nobody", "a", False),
                ("client", "z", False)]:
            self.assertEqual(authenticator.allows(role, key * 40), allowed, (role, key))
        self.assertFalse(authenticator.allows("client", ""))

    def test_a_change_that_is_made_while_the_broker_starts_counts(self):
        tc.write_keys(self.path, self.KEYS)
        real = tc.load_keys

        def slowly(path, role):
            keys = real(path, role)
            self.replace(self.KEYS._replace(holders=()))
            return keys
        with mock.patch.object(tc, "load_keys", slowly):
            authenticator = self.authenticator()
        self.assertTrue(authenticator.allows("client", "a" * 40))
        authenticator.reload_keys(0.0)
        self.assertFalse(authenticator.allows("client", "a" * 40))

    def test_a_key_file_of_another_cloud_is_not_taken_over(self):
        """A broker keeps its own keys until it is restarted, or its own file is back."""
        tc.write_keys(self.path, self.KEYS)
        eve = tc.KeyHolder("eve", "client", "e" * 40)
        authenticator = self.authenticator()
        for keys, said, allowed in [
                (self.KEYS._replace(secret="t" * 40, holders=(eve,)),
                 "the key of another cloud. The old key stays; restart", [True, False]),
                (self.KEYS._replace(holders=()), "read the keys again: of 0 holders", [False] * 2)]:
            self.replace(keys)
            with self.assertLogs(level="INFO") as logs:
                authenticator.reload_keys(0.0)
            self.assertIn(said, logs.output[0])
            self.assertEqual([authenticator.allows("client", key * 40) for key in "ae"], allowed)

    def test_a_key_file_that_is_damaged_or_missing_changes_nothing(self):
        tc.write_keys(self.path, self.KEYS)
        authenticator = self.authenticator()
        for change, warnings in ((lambda: os.truncate(self.path, 100), 1),
                                 (lambda: os.remove(self.path), 0)):
            change()
            with mock.patch.object(tc.logging, "warning") as log:
                for _ in range(2):
                    authenticator.reload_keys(0.0)
            self.assertEqual(log.call_count, warnings)
            self.assertTrue(authenticator.allows("client", "a" * 40))
            self.assertFalse(authenticator.allows("client", "z" * 40))

    def test_two_changes_at_once_are_both_made(self):
        tc.write_keys(self.path, self.KEYS)
        roles = ["--role=client", "--role=worker"] * 4
        jobs = [subprocess.Popen(
            [sys.executable, SCRIPT, "keygen", "--key", self.path, role, f"--name=n{n}"],
            cwd=self.dir, stdout=subprocess.DEVNULL) for n, role in enumerate(roles)]
        jobs.append(subprocess.Popen([sys.executable, SCRIPT, "keygen", "--key", self.path,
                                      "--revoke", "hub"], stdout=subprocess.DEVNULL))
        self.assertEqual([job.wait(PATIENCE) for job in jobs], [0] * 9)
        self.assertEqual({who.name for who in tc.read_keys(self.path).holders},
                         {"alice", *(f"n{n}" for n in range(8))})


class RefusalsTest(unittest.TestCase):
    def setUp(self):
        self.refusals, self.now = tc.RefusalLog(), 100.0

    def said(self, *texts, after=0.0, unless=""):
        """What is logged when these are told, and so much later."""
        with mock.patch.object(tc.time, "monotonic", lambda: self.now), \
                mock.patch.object(tc.logging, "warning") as log:
            for text in texts:
                self.refusals.add(self.now, text, unless)
            self.now += after
            self.refusals.flush()
        return [call.args[1] for call in log.call_args_list]

    def test_a_reason_is_logged_once_while_it_lasts(self):
        self.assertEqual([self.said("a", after=tc.REFUSAL_INTERVAL - 1) for _ in range(3)],
                         [["a"], [], []])
        self.said(after=2)
        self.assertEqual(self.said("a"), ["a"])

    def test_a_vague_reason_waits_for_a_better_one(self):
        self.assertEqual(self.said("at h: perhaps", unless="at h"), [])
        self.assertEqual(self.said("at h: surely", after=tc.REFUSAL_DELAY), ["at h: surely"])
        self.assertEqual(self.said("at i: perhaps", "at i: perhaps", unless="at i"), [])
        self.assertEqual(self.said(after=tc.REFUSAL_DELAY), ["at i: perhaps"])
        for said in ([], ["at j: perhaps"]):  # it does not wait longer when it comes again
            after = tc.REFUSAL_DELAY * 0.6
            self.assertEqual(self.said("at j: perhaps", unless="at j", after=after), said)
        self.assertEqual(self.refusals.delayed, {})

    def test_why_a_connection_failed(self):
        import zmq
        tc.require_zmq()
        protocol, no_detail = (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
                               zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        for keyed, event, detail, reason in [
                (True, zmq.EVENT_HANDSHAKE_FAILED_AUTH, 400, ""),
                (True, protocol, 0x11000001, "it has the key of another cloud"),
                (True, protocol, 0x11000002, "it has no key"),
                (False, protocol, 0x11000002, "it uses a key, this broker has none"),
                (True, 0, 0, "it sent nothing"), (True, no_detail, 0, "later: it has no key")]:
            for place in ("h", ""):
                self.setUp()
                link = types.SimpleNamespace(address="tcp://a:1", keyed=keyed)
                with mock.patch.object(tc.logging, "warning") as log:
                    self.refusals.closed(link, place, event, detail, self.now)
                said = [call.args[1] for call in log.call_args_list]
                start = f"connection{' from h' * bool(place)} to tcp://a:1 failed: "
                if reason.startswith("later: ") or not place:  # a better reason may come
                    self.assertEqual(said, [])
                    said = [*self.refusals.delayed]
                self.assertEqual(len(said), bool(reason))
                if reason:
                    self.assertTrue(said[0].startswith(start + reason.replace("later: ", "")), said)

    def test_the_number_of_reasons_is_bounded(self):
        self.assertEqual(len(self.said(*map(str, range(50)))), tc.MAX_REFUSALS)
        self.said(after=tc.REFUSAL_INTERVAL)
        self.assertEqual(self.said("x"), ["x"])


class AuthenticationTest(unittest.TestCase):
    """An Authenticator and a RouterLink in this process, with peers that have keys."""

    def setUp(self):
        folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, folder)
        self.path = os.path.join(folder, "testcloud.key")
        broker = tc.new_pair()
        self.pairs = [tc.new_pair() for _ in range(3)]  # the cloud's own, and those of two holders
        holders = [tc.KeyHolder(f"h{n}", "client", self.pairs[n].public) for n in (1, 2)]
        tc.write_keys(self.path, tc.Keys(broker.public, broker.secret, dict.fromkeys(
            ("client", "worker"), self.pairs[0]), tuple(holders)))
        self.server = broker.public.encode()
        self.events = []

    def start(self, path):
        test = self

        class Probe(tc.Machine):
            def receive(self, link, peer, token, body, *rest):
                test.events.append(("receive", peer, body))

            def identified(self, link, peer, key):
                test.events.append(("identified", peer, key))

            def disconnected(self, link, peer, now):
                test.events.append(("disconnected", peer))
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.loop = stack.enter_context(contextlib.closing(tc.EventLoop(sockets=True)))
        self.authenticator = stack.enter_context(
            contextlib.closing(tc.Authenticator(self.loop, path)))
        self.link = tc.RouterLink(self.loop, self.loop.add(Probe(), {}), CLIENTS,
                                  "tcp://127.0.0.1:0", self.authenticator)

    def wait_until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end, self.events)
            self.loop.wait()

    def peer(self, pair=None, name=b""):
        import zmq
        peer = self.loop.context.socket(zmq.DEALER)
        self.addCleanup(peer.close, 0)
        peer.linger, peer.rcvtimeo = 0, int(PATIENCE * 1000)
        if name:
            peer.routing_id = name
        if pair:
            peer.curve_serverkey = self.server
            peer.curve_publickey, peer.curve_secretkey = (key.encode() for key in pair)
        peer.connect(self.link.address)
        return peer

    def round_trip(self, peer, name):
        """A message from a peer, and one to the peer with that routing id."""
        self.events.clear()
        peer.send(b"ping")
        self.wait_until(lambda: self.events)
        self.link.send(tc.Outgoing(CLIENTS, name, "", b"pong", b""))
        self.assertEqual(peer.recv(), b"pong")
        self.assertEqual(self.events, [("receive", name, b"ping")])

    def test_without_an_answer_nobody_is_accepted(self):
        """Neither with keys nor without."""
        import zmq
        for path, pair in (("", None), (self.path, self.pairs[1])):
            self.start(path)
            self.authenticator.socket.unbind("inproc://zeromq.zap.01")
            peer = self.peer(pair)
            peer.send(b"hello")
            while zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL not in dict(self.link.monitored):
                self.assertTrue(self.link.monitor.poll(PATIENCE * 1000))
                self.link.read_events({self.link.monitor: zmq.POLLIN}, 0.0)
            self.assertFalse(self.link.socket.poll(0))
            peer.close(0)

    def test_a_refused_link_connects_again_with_another_key(self):
        self.start(self.path)
        test, keys = self, [tc.Keys(self.server.decode(), pairs={"client": pair})
                            for pair in (self.pairs[1], tc.new_pair())]

        class Probe(tc.Machine):
            def refused(self, link, why, now):
                test.events.append("not our key" if "does not accept our key" in why else "reached")

            def key_changed(self, mark):
                test.events.append(mark)

            def connected(self, link, now):
                test.events.append("connected")
        with mock.patch.object(tc, "REFUSED_RETRY", 0.0), self.assertLogs(level="WARNING") as logs:
            tc.DealerLink(self.loop, self.loop.add(Probe(), {}), BROKER, self.link.address,
                          "client", keys.pop(), renew=lambda: keys.pop() if keys else None)
            self.wait_until(lambda: "connected" in self.events)
        self.assertEqual([event for event in self.events if event != "reached"],
                         ["not our key", tc.fingerprint(self.pairs[1].public), "connected"])
        self.assertEqual([line.split(":root:")[1] for line in logs.output],
                         ["refused a client at 127.0.0.1: its key is revoked, or unknown"])

    def test_no_peer_takes_over_the_routing_id_of_another(self):
        self.start(self.path)
        peer = self.peer(self.pairs[1])
        peer.send(b"hello")
        self.wait_until(lambda: self.link.descriptor_of)
        name, = self.link.descriptor_of
        thief = self.peer(self.pairs[2], name)
        thief.send(b"mine")
        self.wait_until(lambda: self.link.pending)
        for _ in range(10):
            self.round_trip(peer, name)

    def test_a_routing_id_of_a_lost_peer_belongs_to_the_key_of_the_new_one(self):
        self.start(self.path)
        peer = self.peer(self.pairs[1])
        peer.send(b"hello")
        self.wait_until(lambda: self.link.descriptor_of)
        (name, descriptor), = self.link.descriptor_of.items()
        peer.close(0)
        with contextlib.suppress(OSError):
            while os.fstat(descriptor):
                time.sleep(0.001)
        other = self.peer(self.pairs[2], name)
        other.send(b"hello")
        end = time.monotonic() + PATIENCE
        while not self.link.socket.poll(1) and time.monotonic() < end:
            self.authenticator.answer(0.0)  # nothing else is read yet
        self.wait_until(lambda: len(self.events) >= 5)
        self.assertEqual(self.events, [
            ("identified", name, self.pairs[1].public), ("receive", name, b"hello"),
            ("disconnected", name),
            ("identified", name, self.pairs[2].public), ("receive", name, b"hello")])


class KeysTest(unittest.TestCase):
    """Who holds what, tries what, and what must happen; over real sockets."""

    def setUp(self):
        self.cloud = Cloud(self)
        self.path = os.path.join(self.cloud.dir, "cloud.key")
        self.keygen(self.path)
        self.broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--key", self.path)

    def keygen(self, *argv, status=0):
        process = self.cloud.start("keygen", *argv)
        self.assertEqual(process.wait(PATIENCE), status, self.cloud.err(process))
        return self.cloud.err(process)

    def holder(self, role, name):
        """A key file made for somebody."""
        path = os.path.join(self.cloud.dir, name)
        self.keygen("--key", self.path, "--role", role, "--name", name, path)
        return path

    def raw(self, address, pair=None, server=None):
        """A raw socket with its monitor: it shakes hands, or is refused."""
        import zmq
        sock = self.cloud.dealer()
        monitor = sock.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        self.addCleanup(monitor.close, 0)
        self.addCleanup(sock.disable_monitor)
        if pair:
            sock.setsockopt(zmq.CURVE_SERVERKEY, server.encode())
            sock.setsockopt(zmq.CURVE_PUBLICKEY, pair.public.encode())
            sock.setsockopt(zmq.CURVE_SECRETKEY, pair.secret.encode())
        sock.connect(address)
        self.assertTrue(monitor.poll(PATIENCE * 1000), "no handshake, and no failure")
        event, _ = struct.unpack("=hi", monitor.recv_multipart()[0])
        return sock, event == zmq.EVENT_HANDSHAKE_SUCCEEDED

    def test_keys_are_accepted_at_the_port_of_their_role(self):
        cloud = tc.read_keys(self.path)
        worker = tc.read_keys(self.holder("worker", "w")).pairs["worker"]
        client = tc.read_keys(self.holder("client", "c")).pairs["client"]
        revoked = tc.read_keys(self.holder("client", "r")).pairs["client"]
        self.keygen("--key", self.path, "--revoke", "r")
        self.cloud.wait_for_log(self.broker, "read the keys again: of 2 holders")
        stranger, other = tc.new_pair(), tc.new_pair()
        stolen = tc.KeyPair(client.public, stranger.secret)  # a public key is no secret
        for who, pair, at_clients, at_workers in [
                ("without a key", None, False, False), ("any key", stranger, False, False),
                ("a worker's", worker, False, True), ("a client's", client, True, False),
                ("a revoked one", revoked, False, False), ("another's name", stolen, False, False),
                ("the broker's public key", tc.KeyPair(cloud.broker, stranger.secret), False,
                 False),
                ("the cloud's for workers", cloud.pairs["worker"], False, True),
                ("the cloud's for clients", cloud.pairs["client"], True, False)]:
            with self.subTest(who):
                for address, expected in ((self.broker.clients, at_clients),
                                          (self.broker.workers, at_workers)):
                    self.assertEqual(self.raw(address, pair, cloud.broker)[1], expected)
        self.assertFalse(self.raw(self.broker.clients, client, other.public)[1])
        self.assertIn("refused a client at 127.0.0.1", self.cloud.err(self.broker))

    def test_a_run_belongs_to_the_key_that_began_it(self):
        """Whoever knows its name can neither take its results nor cancel it."""
        cloud = tc.read_keys(self.path)
        alice, eve = (tc.read_keys(self.holder("client", name)).pairs["client"] for name in "ae")
        run = tc.fingerprint(alice.public).encode() + b"r"
        self.cloud.wait_for_log(self.broker, "read the keys again: of 2 holders")
        one, _ = self.raw(self.broker.clients, alice, cloud.broker)
        two, _ = self.raw(self.broker.clients, eve, cloud.broker)
        hello = b'HELLO {"run":"%s","join":%d}'
        one.send(hello % (run, 1))
        self.assertTrue(one.recv().startswith(b"OK"))
        two.send(hello % (run, 2))
        self.assertIn(b"belongs to another key", two.recv())
        two.send(b'CANCEL')
        self.assertEqual(two.recv(), b"WHO")
        again, _ = self.raw(self.broker.clients, alice, cloud.broker)
        again.send(hello % (run, 3))
        self.assertTrue(again.recv().startswith(b"OK"))

    def test_an_authenticated_peer_cannot_act_for_another_role_or_run(self):
        cloud = tc.read_keys(self.path)
        alice, eve = (tc.read_keys(self.holder("client", name)).pairs["client"] for name in "ae")
        run, other = (tc.fingerprint(pair.public).encode() + b"r" for pair in (alice, eve))
        hand = tc.read_keys(self.holder("worker", "w")).pairs["worker"]
        self.cloud.wait_for_log(self.broker, "read the keys again: of 3 holders")
        worker, _ = self.raw(self.broker.workers, hand, cloud.broker)
        one, _ = self.raw(self.broker.clients, alice, cloud.broker)
        two, _ = self.raw(self.broker.clients, eve, cloud.broker)
        name = b"w1." + tc.fingerprint(hand.public).encode()
        worker.send(b'READY {"name":"%s","slots":5,"join":1}' % name)
        self.assertTrue(worker.recv().startswith(b"OK"))
        for at_workers in (b'{"cmd":"true","id":1,"attempt":1}', b'HELLO {"run":"x","join":1}',
                           b"CANCEL", b'FETCH {"id":1,"attempt":1,"offset":0,"size":9}'):
            worker.send(at_workers)
            self.assertIn(b"is not understood on the link to workers", worker.recv())
        for sock, name in ((one, run), (two, other)):
            sock.send(b'HELLO {"run":"%s","join":1}' % name)
            self.assertTrue(sock.recv().startswith(b"OK"))
        for at_clients in (b'READY {"name":"w2","slots":9,"join":1}', b'QUEUED {"tasks":[[1,1]]}',
                           b'RESULT {"id":1,"attempt":1,"exitcode":0}'):
            two.send(at_clients)
            self.assertIn(b"is not understood on the link to clients", two.recv())
        one.send(b'{"cmd":"x","id":1,"attempt":1}')
        self.assertEqual(worker.recv_multipart()[1], run)
        worker.send_multipart([b"", run, b'QUEUED {"tasks":[[1,1]]}'])
        self.assertTrue(one.recv().startswith(b"QUEUED"))
        theirs = (b'CANCEL {"tasks":[[1,1]]}', b"CANCEL", b'DONE {"tasks":[[1,1]]}',
                  b'FETCH {"id":1,"attempt":1,"offset":0,"size":9}')
        for frames in (*([line] for line in theirs), *([b"", run, line] for line in theirs)):
            two.send_multipart(frames)
        two.send(b'HELLO {"run":"%s"}' % other)
        self.assertTrue(two.recv().startswith(b"OK"))  # so all that was heard and not answered
        self.assertFalse(worker.poll(0))
        worker.send_multipart([b"", run, b'RESULT {"id":1,"attempt":1,"exitcode":0,"stdout":"y"}'])
        self.assertIn(b'"stdout":"y"', one.recv())
        self.assertFalse(two.poll(0))

    def test_nobody_can_pose_as_the_broker(self):
        """Not with any key but the secret one of the cloud's own file."""
        import zmq
        worker = tc.read_keys(self.holder("worker", "w")).pairs["worker"]
        for secret in (worker.secret, tc.new_pair().secret, None):
            with zmq.Context() as context, context.socket(zmq.ROUTER) as false:
                false.setsockopt(zmq.LINGER, 0)
                if secret:
                    false.setsockopt(zmq.CURVE_SERVER, 1)
                    false.setsockopt(zmq.CURVE_SECRETKEY, secret.encode())
                address = f"tcp://127.0.0.1:{false.bind_to_random_port('tcp://127.0.0.1')}"
                client = self.cloud.client(address, ["true"], "--key", self.path, wait=False)
                self.cloud.wait_for_log(client, "has another key" if secret else "has no key")
                self.assertFalse(false.poll(0))
                client.terminate()
                self.assertEqual(client.wait(PATIENCE), 143)

    def test_a_recorded_connection_cannot_be_replayed(self):
        self.cloud.worker(self.broker, "--key", self.path)
        proxy = Proxy(self.broker.clients)
        self.addCleanup(proxy.close)
        proxy.record()
        ran = os.path.join(self.cloud.dir, "ran")
        status, _ = self.cloud.client(proxy.address, [f"echo 1 >> {ran}"], "--key", self.path)
        self.assertEqual((status, tc.read_text(ran)), (0, "1\n"))
        self.assertGreater(len(proxy.sent), 500)
        with socket.create_connection(tc.split_tcp(self.broker.clients)) as again:
            again.sendall(proxy.sent)
            with contextlib.suppress(OSError):
                while again.recv(65536):
                    pass
        self.cloud.wait_for_log(self.broker, " failed: it has ")
        status, _ = self.cloud.client(self.broker, [f"echo 2 >> {ran}"], "--key", self.path)
        self.assertEqual((status, tc.read_text(ran)), (0, "1\n2\n"))

    def test_a_workers_name_belongs_to_the_key_with_which_it_joined(self):
        """Whoever knows it cannot answer for its commands, or take its place."""
        cloud = tc.read_keys(self.path)
        good, eve = (tc.read_keys(self.holder("worker", name)).pairs["worker"] for name in "ge")
        self.cloud.wait_for_log(self.broker, "read the keys again: of 2 holders")
        one, _ = self.raw(self.broker.workers, good, cloud.broker)
        two, _ = self.raw(self.broker.workers, eve, cloud.broker)
        client, _ = self.raw(self.broker.clients, cloud.pairs["client"], cloud.broker)
        w1, w2 = (b"w." + tc.fingerprint(pair.public).encode() for pair in (good, eve))
        one.send(b'READY {"name":"%s","slots":1,"join":1}' % w1)
        self.assertTrue(one.recv().startswith(b"OK"))
        client.send(b'{"cmd":"x"}')
        _, token, _ = one.recv_multipart()
        two.send(b'READY {"name":"%s","slots":1,"join":2,"running":[["%s",1,1]]}' % (w1, token))
        self.assertIn(b"belongs to another key", two.recv())
        two.send(b'READY {"name":"%s","slots":0,"join":1,"running":[["%s",1,1]]}' % (w2, token))
        self.assertEqual(two.recv_multipart()[1:], [token, b'CANCEL {"tasks":[[1,1]]}'])
        self.assertTrue(two.recv().startswith(b"OK"))
        two.send_multipart([b"", token, b'RESULT {"id":1,"attempt":1,"exitcode":9,"stdout":"bad"}'])
        one.send_multipart([b"", token,
                            b'RESULT {"id":1,"attempt":1,"exitcode":0,"stdout":"good"}'])
        self.assertIn(b'"good"', client.recv())

    def test_a_routing_id_of_a_peers_own_choice_is_refused(self):
        import zmq
        cloud = tc.read_keys(self.path)
        sock = self.cloud.dealer(identity=b"\0abcd-me")
        for option, key in ((zmq.CURVE_SERVERKEY, cloud.broker),
                            (zmq.CURVE_PUBLICKEY, cloud.pairs["client"].public),
                            (zmq.CURVE_SECRETKEY, cloud.pairs["client"].secret)):
            sock.setsockopt(option, key.encode())
        sock.connect(self.broker.clients)
        sock.send(b'HELLO {"run":"r1","join":1}')
        self.assertFalse(sock.poll(300))

    def test_a_peer_that_was_cut_off_for_not_reading_may_come_back(self):
        import zmq
        cloud = tc.read_keys(self.path)
        pair = cloud.pairs["client"]
        self.cloud.worker(self.broker, "--key", self.path)
        deaf = self.cloud.dealer()
        deaf.setsockopt(zmq.RCVHWM, 1)
        for option, key in ((zmq.CURVE_SERVERKEY, cloud.broker), (zmq.CURVE_PUBLICKEY, pair.public),
                            (zmq.CURVE_SECRETKEY, pair.secret)):
            deaf.setsockopt(option, key.encode())
        deaf.connect(self.broker.clients)
        for _ in range(1000):
            deaf.send(b'{"cmd":"head -c 250000 /dev/zero | tr \\\\0 x"}')
        self.cloud.wait_for_log(self.broker, "does not read: connection closed")
        while not (answer := deaf.recv()).startswith(b"OK"):
            if not deaf.poll(200):
                deaf.send(b'HELLO {"run":"%s1","join":1}' % tc.fingerprint(pair.public).encode())
        self.assertIn(b'"join":1', answer)

    def test_a_run_with_files_for_each_role(self):
        worker, client = self.holder("worker", "w"), self.holder("client", "c")
        self.cloud.worker(self.broker, "--key", worker)
        status, out = self.cloud.client(self.broker, ["echo $TESTCLOUD_SEQ"], "--key", client)
        self.assertEqual((status, "\n1\n" in out), (0, True), out)
        status, out = self.cloud.client(self.broker, ["env"], "--key", client)
        for path in (worker, client, self.path):
            for key in re.findall('"secret": "(.*?)"', tc.read_text(path)):
                self.assertNotIn(key, out)
        for argv in (["client", "--key", worker], ["worker", "--key", client],
                     ["broker", "--key", client], ["keygen", "--key", client, "--role", "worker"]):
            process = self.cloud.start(*argv, stdin=subprocess.DEVNULL)
            self.assertEqual(process.wait(PATIENCE), 3)
            self.assertRegex(self.cloud.err(process),
                             "^testcloud: .*is (not for a|a holder's key).*\n$")

    def test_a_refused_peer_and_the_broker_are_told_the_reason_once(self):
        """Both sides' keys, and the roles: nobody is told another reason, or the same one again."""
        self.keygen(os.path.join(self.cloud.dir, "other.key"))
        revoked = {role: self.holder(role, f"revoked-{role}") for role in ("client", "worker")}
        for role in revoked:
            self.keygen("--key", self.path, "--revoke", f"revoked-{role}")
        self.cloud.wait_for_log(self.broker, "read the keys again: of 0 holders")
        plain = self.cloud.broker()
        started = []
        for broker, key, what in [
                (self.broker, None, "wants a key"),
                (self.broker, "other.key", "has another key than ours"),
                (self.broker, revoked, "does not accept our key: it has been revoked"),
                (plain, "other.key", "has no key, but we have one"),
                (plain, revoked, "has no key, but we have one")]:
            for role in ("client", "worker", "broker"):
                path = key["client" if role == "client" else "worker"] if key is revoked else key
                argv = ["--key", path] if path else ["--insecure"]
                if role == "client":
                    peer = self.cloud.client(broker, ["true"], *argv, "--wait", "5", wait=False)
                elif role == "worker":
                    peer = self.cloud.worker(broker, *argv, "--wait", "5")
                else:
                    above = ["--upstream-key", path] if path else []
                    peer = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--insecure",
                                             "--upstream",
                                             broker.workers, *above)
                started.append((role, what, peer))
        for role, what, peer in started:
            with self.subTest(what, role=role):
                if role != "broker":
                    self.assertEqual(peer.wait(PATIENCE), 3)
                self.cloud.wait_for_log(peer, what)
                told = re.findall("^testcloud: waiting.*|gave up waiting.*", self.cloud.err(peer),
                                  re.M)
                self.assertEqual(len(told), 1 + (role != "broker"), told)
                self.assertEqual([what in line for line in told], [True] * len(told), told)
                self.assertNotIn("Traceback", self.cloud.err(peer))
        for broker, reasons in ((self.broker, ("it has no key", "the key of another cloud",
                                               "its key is revoked")),
                                (plain, ("it uses a key, this broker has none",))):
            for reason in reasons:
                self.cloud.wait_for_log(broker, reason)
            told = [line[24:] for line in self.cloud.err(broker).splitlines()
                    if "at 127" in line or "from 127" in line]
            self.assertEqual(len(told), len({*told}), told)

    def test_peers_of_a_broker_without_a_key_follow_it_when_it_gets_one(self):
        """As by the README: the example first, then keygen, and the broker again."""
        path = os.path.join(self.cloud.dir, "testcloud", "testcloud.key")
        os.mkdir(os.path.dirname(path))
        with mock.patch.dict(os.environ, XDG_CONFIG_HOME=self.cloud.dir):
            broker = self.cloud.broker()
            worker = self.cloud.worker(broker)
            client = self.cloud.client(broker, None, wait=False)
            client.stdin.write(b"echo one\n")
            client.stdin.flush()
            self.assertIn(b"OK! echo one", b"".join(itertools.islice(client.stdout, 3)))
            self.keygen(path)
            new = self.cloud.client(broker, ["true"], wait=False)
            self.cloud.wait_for_log(new, "has no key, but we have one")
            broker.terminate()
            broker.wait(PATIENCE)
            self.cloud.broker(broker.clients, broker.workers)
            client.stdin.write(b"echo two\n")
            client.stdin.close()
            client.stdin = None
            for process, out in ((client, "OK! echo two"), (new, "OK! true")):
                status, said = self.cloud.finish(process)
                self.assertEqual((status, out in said), (0, True), said)
            self.assertNotIn("is that the port", self.cloud.err(worker) + self.cloud.err(client))

    def test_the_other_roles_port_is_told_from_a_revoked_key(self):
        for role, port in (("client", self.broker.workers), ("worker", self.broker.clients)):
            peer = self.cloud.start(role, "--connect", port, "--key", self.path, "--wait", "3",
                                    stdin=subprocess.PIPE)
            self.cloud.wait_for_log(peer,
                                    f"does not accept our key: that is not the port for {role}s")
        self.cloud.wait_for_log(self.broker, "its key is for another role")

    def test_the_security_mechanism_is_known_by_the_greeting(self):
        """Even if its connections end like those of a broker with another key."""
        path = os.path.join(self.cloud.dir, "ipc")
        self.cloud.start("broker", "--insecure", "--clients", f"ipc://{path}", "--workers",
                         "127.0.0.1:0").stdout.readline()
        self.assertEqual(tc.security_mechanism(f"ipc://{path}"), "NULL")
        self.assertEqual(tc.security_mechanism(self.broker.clients), "CURVE")
        for words in (None, b"", b"SSH-2.0-x\r\n", b"\xff"):
            with socket.create_server(("127.0.0.1", 0)) as server, \
                    mock.patch.object(tc, "PROBE_TIMEOUT", PATIENCE if words is not None else 0.05):
                address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
                thread = threading.Thread(target=self.hang_up, args=(server, words))
                thread.start()
                self.assertEqual(tc.security_mechanism(address), "", words)
                thread.join()
            self.assertIsNone(tc.security_mechanism(address))

    def hang_up(self, server, words):
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            if words is not None:
                connection.sendall(words)
                connection.shutdown(socket.SHUT_WR)
            while connection.recv(100):
                pass

    def test_a_revoked_key_is_cut_off_and_one_made_later_gets_in_by_itself(self):
        self.cloud.worker(self.broker, "--key", self.path)
        alice = self.holder("client", "alice")
        client = self.cloud.client(self.broker, None, "--key", alice, wait=False)
        client.stdin.write(b"echo one\n")
        client.stdin.flush()
        self.cloud.wait_for_log(self.broker, "client ")
        before = tc.read_keys(self.path)
        self.keygen("--key", self.path, "--revoke", "alice")
        self.cloud.wait_for_log(client, "does not accept our key")
        with tc.locked_key_file(self.path) as replace:
            replace(before)
        client.stdin.write(b"echo two\n")
        client.stdin.close()
        client.stdin = None
        status, out = self.cloud.finish(client)
        self.assertEqual((status, out.count("\nOK! echo")), (0, 2), out)

    def test_a_revoked_peer_is_cut_off_although_it_says_nothing(self):
        cloud = tc.read_keys(self.path)
        pairs = [tc.read_keys(self.holder(role, role + name)).pairs[role]
                 for name in ("1", "2") for role in ("client", "worker")]
        self.cloud.wait_for_log(self.broker, "read the keys again: of 4 holders")
        peers = []
        for n, pair in enumerate(pairs):
            role, name = ("client", "worker")[n % 2], tc.fingerprint(pair.public).encode()
            peer, _ = self.raw(getattr(self.broker, role + "s"), pair, cloud.broker)
            peer.send(b'HELLO {"run":"%sr","join":1}' % name if role == "client" else
                      b'READY {"name":"w.%s","slots":1,"join":1}' % name)
            self.assertTrue(peer.recv().startswith(b"OK"))
            peers.append(peer)
        for name in ("client1", "worker1"):
            self.keygen("--key", self.path, "--revoke", name)
        for peer, revoked in zip(peers, (True, True, False, False)):
            monitor = peer.get_monitor_socket()
            self.assertEqual(bool(monitor.poll(PATIENCE * 1000 if revoked else 0)), revoked)
        self.cloud.wait_for(
            lambda: self.cloud.err(self.broker).count("has no valid key") == 2, "both")

    def test_messages_are_encrypted_if_there_is_a_key(self):
        for argv, readable in ((["--key", self.path], False), (["--insecure"], True)):
            broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", *argv)
            proxies = [Proxy(broker.clients), Proxy(broker.workers)]
            for proxy in proxies:
                self.addCleanup(proxy.close)
                proxy.record()
            self.cloud.worker(proxies[1].address, *argv)
            status, out = self.cloud.client(
                proxies[0].address, ["echo command-$((40 + 2))-output"], *argv)
            self.assertEqual(status, 0)
            for proxy in proxies:
                for text in (b"echo command", b"command-42-output"):
                    self.assertEqual(text in proxy.recorded, readable, text)

    def test_connections_of_strangers_disturb_nobody(self):
        """Unfinished handshakes in masses, slow ones, port scans, noise: a run goes on."""
        self.cloud.worker(self.broker, "--key", self.path)
        place = tc.split_tcp(self.broker.clients)
        strangers, r = [], random.Random(5)
        limit = tc.raise_file_limit()

        def come(words=b""):
            stranger = socket.create_connection(place)
            strangers.append(stranger)
            self.addCleanup(stranger.close)
            with contextlib.suppress(OSError):  # they may be shown the door
                stranger.sendall(words)
        for n in range(min(10_000, limit // 2)):
            come(b"\xff\0\0\0"[:n % 5])
        client = self.cloud.client(self.broker, None, "--key", self.path, wait=False)
        for n in range(200):
            client.stdin.write(b"echo %d >> done\n" % n)
            client.stdin.flush()
            come(r.choice((b"GET / HTTP/1.0\r\n\r\n", b"SSH-2.0-x\r\n", r.randbytes(1000),
                           b"\0" * 9)))
            for slow in strangers[:50]:
                with contextlib.suppress(OSError):
                    slow.sendall(b"\0")
            with socket.create_connection(place):
                pass
        client.stdin.close()
        client.stdin = None
        status, out = self.cloud.finish(client)
        self.assertEqual((status, out.count("\nOK! ")), (0, 200), out[-500:])
        self.assertIsNone(self.broker.poll())
        self.assertNotIn("Traceback", self.cloud.err(self.broker))
        self.assertLess(peak_memory(self.broker.pid), 150 * 1024)
        self.cloud.wait_for_log(self.broker, "it sent nothing; it is probably not testcloud")

    def test_without_a_key_only_this_machine(self):
        for argv in (["--clients", "0.0.0.0:0"], ["--workers", "*:0"], ["--clients", "[::]:0"]):
            process = self.cloud.start("broker", *argv)
            self.assertEqual(process.wait(PATIENCE), 2)
            self.assertRegex(self.cloud.err(process), "^testcloud: .*keygen.*--insecure.*\n$")

    def test_a_chain_of_brokers_with_keys(self):
        below = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--key", self.path, "--upstream",
                                  self.broker.workers)
        self.cloud.worker(below, "--key", self.path)
        status, out = self.cloud.client(self.broker, ["echo a"], "--key", self.path)
        self.assertEqual(status, 0, out)

    def test_a_broker_joins_another_cloud_with_a_workers_key(self):
        other = os.path.join(self.cloud.dir, "other.key")
        self.keygen(other)
        for key in (["--key", other], ["--insecure"]):
            below = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", *key, "--upstream",
                                      self.broker.workers, "--upstream-key",
                                      self.holder("worker", key[0].strip("-")))
            worker = self.cloud.worker(below, *key)
            status, out = self.cloud.client(self.broker, ["echo a"], "--key", self.path)
            self.assertEqual(status, 0, out)
            worker.terminate()
            below.terminate()
            below.wait(PATIENCE)


# === Hosts ============================================================================


def host_settings(**more):
    """What a command line sets for hosts."""
    return argparse.Namespace(**{
        "subcommand": "client", "sshlogin": [], "sshloginfile": [], "via": [], "ssh": None,
        "python": None, "slots": 0, "local": False, "connect": None, "host": None,
        "verbose": False, "drain": 0.0, "kill_grace": 2.0, **more})


class LoginsTest(unittest.TestCase):
    def login(self, text, **more):
        login, = tc.logins_of(host_settings(sshlogin=[text], **more))
        return login

    def test_logins(self):
        for text, name, slots, alias in (
                ("alpha", "alpha", 0, "alpha"), ("4/alpha", "alpha", 4, "alpha"),
                ("me@alpha", "me@alpha", 0, "alpha"), ("2/me@alpha", "me@alpha", 2, "alpha"),
                (" alpha ", "alpha", 0, "alpha"), ("10.0.0.1", "10.0.0.1", 0, "10.0.0.1"),
                ("fe80::1%eth0", "fe80::1%eth0", 0, "fe80::1%eth0"), ("::1", "::1", 0, "::1"),
                ("ssh://me@alpha:2222", "ssh://me@alpha:2222", 0, "alpha"),
                ("3/ssh://alpha", "ssh://alpha", 3, "alpha"), ("a" * 65, "a" * 65, 0, None),
                ("täst", "täst", 0, "täst"), ("me~@alpha", "me~@alpha", 0, "alpha")):
            with self.subTest(text):
                login = self.login(text)
                self.assertEqual((login.name, login.slots, login.alias), (name, slots, alias))
                self.assertEqual(login.command[-2:], (name, f"exec /bin/sh -c '{tc.BOOTSTRAP}'"))
                self.assertEqual((login.command[0], login.peer), ("ssh", b"0"))
                self.assertEqual(login.login, shlex.join(["ssh", name]))
                self.assertEqual(login.check, shlex.join(["ssh", name, "echo", "ok"]))

    def test_this_machine(self):
        for text, slots in ((":", 0), ("7/:", 7)):
            login = self.login(text)
            self.assertEqual((login.name, login.slots, login.alias), ("this machine", slots, None))
            self.assertEqual(login.command, ("/bin/sh", "-c", tc.BOOTSTRAP))

    def test_wrong_logins(self):
        for text in ("-oProxyCommand=x", "2/-v", "a b", "ssh alpha", "ssh -p 22 alpha", "a\0b",
                     "4/", "/alpha", "alpha/4", "x/alpha", "0/alpha", "-1/alpha", "1.5/alpha",
                     "9" * 5000 + "/alpha", "100000000/:", "0/:", "ssh://-v", "a\nb", "ssh:///"):
            with self.subTest(text=text[:20]), self.assertRaises(tc.UsageError) as caught:
                self.login(text)
            self.assertLess(len(str(caught.exception)), 300)

    def test_slots_of_all_hosts(self):
        logins = tc.logins_of(host_settings(sshlogin=["alpha,2/beta", ":"], via=["1/box run"],
                                            slots=8))
        self.assertEqual([login.slots for login in logins], [8, 2, 8, 1])
        self.assertEqual([login.peer for login in logins], [b"0", b"1", b"2", b"3"])

    def test_another_ssh(self):
        for given in ({"ssh": "my 'good ssh' -p 2222"}, {}):
            with mock.patch.dict(os.environ, TESTCLOUD_SSH="my 'good ssh' -p 2222"):
                login = self.login("alpha", **given)
            self.assertEqual(login.command[:5], ("my", "good ssh", "-p", "2222", "-T"))
            self.assertEqual(login.login, "my 'good ssh' -p 2222 alpha")
        for wrong in ("'", "  ", "a\0b"):
            with self.subTest(wrong), self.assertRaises(tc.UsageError):
                self.login("alpha", ssh=wrong)

    def test_via(self):
        login, = tc.logins_of(host_settings(via=["2/docker exec -i 'my box'"]))
        self.assertEqual((login.name, login.slots, login.alias),
                         ("docker exec -i 'my box'", 2, None))
        self.assertEqual(login.command, (
            "docker", "exec", "-i", "my box", "/bin/sh", "-c", tc.BOOTSTRAP))
        self.assertEqual(login.check, "docker exec -i 'my box' /bin/sh -c 'echo ok'")
        for wrong in ("", "0/docker", "'", "a\0b", "ssh alpha", "/usr/bin/ssh alpha"):
            with self.subTest(wrong), self.assertRaises(tc.UsageError):
                tc.logins_of(host_settings(via=[wrong]))

    def test_usage(self):
        self.assertEqual(tc.logins_of(host_settings()), [])
        for more, why in (
                ({"python": "python3"}, "--python and --ssh go with hosts"),
                ({"ssh": "ssh"}, "--python and --ssh go with hosts"),
                ({"sshlogin": [","]}, "there is no host"), ({"sshlogin": [" , "]}, "no host"),
                ({"sshlogin": ["a"], "local": True}, "no --local"),
                ({"via": ["a"], "connect": "hub"}, "need no broker"),
                ({"sshlogin": ["a"], "subcommand": "worker", "host": "h"}, "its own name"),
                ({"sshloginfile": ["-"]}, "cannot be stdin")):
            with self.subTest(more=more), self.assertRaisesRegex(tc.UsageError, why):
                tc.logins_of(host_settings(**more))
        worker = host_settings(sshlogin=["a"], subcommand="worker", connect="hub")
        self.assertEqual(len(tc.logins_of(worker)), 1)

    def test_a_host_that_is_named_twice(self):
        with mock.patch.object(tc, "print_notice") as notice:
            logins = tc.logins_of(host_settings(sshlogin=["alpha,beta", "2/alpha"]))
        notice.assert_called_once()
        self.assertRegex(notice.call_args[0][0], "^alpha is named 2 times: it gets 2 workers")
        self.assertEqual(len({login.peer for login in logins}), 3)

    def test_files_of_logins(self):
        with tempfile.TemporaryDirectory() as home:
            path = os.path.join(home, "testcloud", "sshloginfile")
            os.mkdir(os.path.dirname(path))
            with open(path, "wb") as file:
                file.write(b"# my hosts\n\nalpha\n  2/beta # fast\r\n\t:\n#gamma\n" b"d\xffe")
            expected = [("alpha", 0), ("beta", 2), ("this machine", 0), ("d\ufffde", 0)]
            for name in (path, ".."):
                with mock.patch.dict(os.environ, XDG_CONFIG_HOME=home):
                    logins = tc.logins_of(host_settings(sshloginfile=[name]))
                self.assertEqual([(login.name, login.slots) for login in logins], expected)
            for wrong in (os.path.join(home, "nosuch"), home):
                with self.assertRaisesRegex(tc.SetupError, f"^cannot read {home}"):
                    tc.logins_of(host_settings(sshloginfile=[wrong]))

    def test_names(self):
        logins = tc.logins_of(host_settings(sshlogin=["alpha,1/beta,4/:"], via=["\33[1m box"]))
        self.assertEqual(tc.names_of(logins),
                         "alpha, beta (1 slot), this machine (4 slots), \\x1b[1m box")


class StartScriptTest(unittest.TestCase):
    """What runs in a host's sh, with each shell that is here, and Pythons that only pretend."""

    SHELLS = [[shutil.which(name), *more] for name, *more in (
        ["/bin/sh"], ["dash"], ["bash", "--posix"], ["bash"], ["mksh"], ["ksh"], ["yash"],
        ["busybox", "sh"], ["zsh", "--emulate", "sh"]) if shutil.which(name)]
    MARK = RecordReaderTest.MARK.decode()

    def setUp(self):
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)

    def python(self, name, version, noise=""):
        """Install one that knows its version, and shows what it is to run and to read."""
        path = os.path.join(self.dir, name)
        good = version.split(".") >= ["3"] and int(version.split(".")[1]) >= 9
        probe = "exit 0" if good else f"echo ', {name} is {version}' >&2; exit 1"
        with open(path, "w") as file:
            file.write(f"#!/bin/sh\nif [ \"$1\" = -ES ]; then {noise}{probe}; fi\n"
                       f"printf '%s %s %s %s\\n' {name} \"$1\" \"$2\" \"$4\"\n"
                       "printf '%s\\n' \"$3\" >&2; exec /bin/cat\n")
        os.chmod(path, 0o755)

    def run_script(self, shell, pythons=tc.PYTHONS, settings={}, rest=b"rest\0\n of it"):
        line = tc.start_script(pythons, self.MARK, 99, settings)
        self.assertNotIn("\n", line)
        self.assertNotIn(self.MARK, line)
        found = subprocess.run([*shell, "-c", tc.BOOTSTRAP], input=line.encode() + b"\n" + rest,
                               capture_output=True, env={"PATH": self.dir}, timeout=PATIENCE)
        return found.stdout.decode(), found.stderr.decode()

    def each_shell(self, check, *arguments, **more):
        """Call check(stdout, stderr) with what the script prints in each shell."""
        for shell in self.SHELLS:
            with self.subTest(shell=shell):
                check(*self.run_script(shell, *arguments, **more))

    def test_the_first_that_is_new_enough(self):
        self.python("python3", "3.8.1")
        self.python("python3.12", "3.12.0")
        self.python("python3.9", "3.9.0")
        settings = {"mark": self.MARK, "host": "it's \"$HOME\" \\ `x` !! ä", "n": math.inf}

        def check(out, err):
            first, rest = out.split("\n", 1)
            self.assertEqual(first.split(" ", 3)[:3], ["python3.12", "-IBS", "-c"])
            self.assertEqual(json.loads(first.split(" ", 3)[3]), settings)
            self.assertEqual(rest, "rest\0\n of it")
            self.assertEqual(err, tc.BOOT.format(size=99) + "\n")
        self.each_shell(check, settings=settings)

    def test_python3_comes_first(self):
        """Whatever else it says; and it does not read what follows."""
        self.python("python3", "3.10.0", noise="echo a warning >&2; /bin/cat; ")
        self.python("python3.13", "3.13.0")
        self.each_shell(lambda out, err: self.assertRegex(out, "^python3 -IBS .*\nrest\0"))

    def test_none_is_new_enough(self):
        for found in ("", ", python3 is 3.6.8, python3.9 is 2.7.18"):
            expected = f"{self.MARK}no python{found}\n", ""
            self.each_shell(lambda *said, expected=expected: self.assertEqual(said, expected))
            self.python("python3", "3.6.8")
            self.python("python3.9", "2.7.18")  # whatever it is called

    def test_a_python_that_is_named(self):
        self.python("python3", "3.13.0")
        self.python("mypython", "3.9.2")
        for name, expected in (("mypython", "^mypython -IBS"),
                               (f"'{self.dir}'/mypython", "^mypython -IBS"),
                               ("nosuch", f"^{self.MARK}no python.*not found.*\n$")):
            self.each_shell(lambda out, err, expected=expected: self.assertRegex(out, expected),
                            [name])

    def test_the_probe(self):
        """Python 2 has to understand it: % and no print."""
        for version, good in (((3, 9), True), ((3, 8, 18), False), ((2, 7, 18), False),
                              ((3, 13), True), ((4, 0), True)):
            fake = types.SimpleNamespace(version_info=version, executable="/py", version="V (x)",
                                         exit=sys.exit)
            with mock.patch.dict(sys.modules, sys=fake):
                try:
                    exec(tc.PROBE, {})
                    found = ""
                except SystemExit as end:
                    found = end.code
            self.assertEqual(found, "" if good else ", /py is V", version)


class FakeSsh:
    """In place of subprocess.Popen: an ssh that does what the test says."""

    def __init__(self, command, stdin, stdout, stderr, start_new_session):
        self.command, self.status, self.pid = command, None, -1
        self.stdin, self.stdout, self.stderr = map(os.dup, (stdin, stdout, stderr))
        os.set_blocking(self.stdin, False)

    def poll(self):
        return self.status

    def end(self, status):
        """As a process ends; killed if it has not."""
        if self.status is None:
            self.status = status
            for file in (self.stdin, self.stdout, self.stderr):
                os.close(file)

    def wait(self, timeout=None):
        self.end(-signal.SIGKILL)
        return self.status


class NoUplink:
    peer = b"0"

    def __init__(self):
        self.machine = Ear()
        self.events = []

    def opened(self, link, now):
        self.events.append("opened")

    def ended(self, now):
        self.events.append("ended")

    def reconnect(self):
        self.events.append("reconnect")


class HostTest(unittest.TestCase):
    """Hosts at a clock that the tests set, with an ssh that does what they say."""

    def setUp(self):
        self.started, self.told, self.none_left = [], [], []
        self.now = 0.0
        self.loop = tc.EventLoop(sockets=False)
        self.loop.clock = lambda: self.now
        self.addCleanup(self.loop.close)
        self.loop.add(tc.Machine(), {})
        patches = [mock.patch.object(tc.subprocess, "Popen", self.popen),
                   mock.patch.object(tc.os, "killpg")]
        for patch in patches:
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(self.end_all)

    def popen(self, *args, **more):
        self.started.append(FakeSsh(*args, **more))
        return self.started[-1]

    def end_all(self):
        for ssh in self.started:
            ssh.end(0)
        for host in self.hosts.hosts:
            if host.process:
                host.finish(0.0)

    def hosts_of(self, text, **more):
        settings = host_settings(sshlogin=[text], **more)
        settings.logins = tc.logins_of(settings)
        self.uplinks = []

        def uplink(login):
            self.uplinks.append(NoUplink())
            return self.uplinks[-1]
        self.hosts = tc.Hosts(self.loop, settings, None, uplink, self.none_left.append,
                              lambda text, error: self.told.append(text))
        return self.hosts.hosts

    def at(self, now):
        """Let a round of the loop pass at this time. Return what the user is told."""
        self.now = now
        self.told.clear()
        for file, function in list(self.loop.callbacks.items()):
            if tc.readable(file):
                function(now)
        self.hosts.look(now)
        return self.told

    def open(self, ssh, now):
        """Print the mark, which comes in the settings."""
        host, = [host for host in self.hosts.hosts if host.process is ssh]
        came = os.read(ssh.stdin, 65536)
        while host.link.backlog or tc.readable(ssh.stdin):
            host.link.write_backlog()
            came += os.read(ssh.stdin, 65536)
        script = came.partition(b"\n")[0].replace(b"''", b"")
        mark = json.loads(re.search(rb"settings='(\{.*?\})'; why=", script)[1])["mark"]
        os.write(ssh.stdout, b"Welcome!\n" + mark.encode() + b"\n")
        self.at(now)

    def die(self, ssh, status, said=b"", printed=b"", now=0.0):
        os.write(ssh.stderr, said)
        os.write(ssh.stdout, printed)
        ssh.end(status)
        return [*self.at(now), *self.at(now)]

    CHANGED = (b"@" * 59 + b"\r\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r\n"
               b"IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!\r\n"
               b"Host key verification failed.\r\n")
    CLOSED = (b"kex_exchange_identification: Connection closed by remote host\r\n"
              b"Connection closed by %s port %d\r\n")
    PROXIED = CLOSED % (b"UNKNOWN", 65535)
    NO_KEYS = ("it accepts none of your keys: copy one there with ssh-copy-id me@alpha, or if it "
               "has a passphrase, load it with ssh-add")
    UNREACHABLE = "cannot be reached: is it on, and is its address right?"
    REFUSED = "connection refused: is sshd running there, and on this port?"
    UNKNOWN = "unknown host: check its name, or define it in ~/.ssh/config"
    FINAL = (  # what ssh prints to stderr and stdout, its status, what we say
        (b"ssh: Could not resolve hostname alpha: Name or service not known\r\n",
         b"", 255, UNKNOWN),
        (b"ssh: Could not resolve hostname alpha: nodename nor servname provided, or not known\r\n",
         b"", 255, UNKNOWN),
        (b"ssh: connect to host alpha port 22: Connection refused\r\n", b"", 255, REFUSED),
        (b"ssh: connect to host alpha port 22: Connection timed out\r\n", b"", 255, UNREACHABLE),
        (b"ssh: connect to host alpha port 22: Operation timed out\r\n", b"", 255, UNREACHABLE),
        (b"Connection timed out during banner exchange\r\nConnection to 1.2.3.4 port 22 timed out"
         b"\r\n", b"", 255, UNREACHABLE),
        (b"ssh: connect to host alpha port 22: No route to host\r\n", b"", 255, UNREACHABLE),
        (b"ssh: connect to host alpha port 22: Network is unreachable\r\n", b"", 255, UNREACHABLE),
        (b"me@alpha: Permission denied (publickey,password).\r\n", b"", 255, NO_KEYS),
        (b"Received disconnect from 1.2.3.4 port 22:2: Too many authentication failures\r\n"
         b"Disconnected from 1.2.3.4 port 22\r\n", b"", 255, NO_KEYS),
        (b"@         WARNING: UNPROTECTED PRIVATE KEY FILE!          @\r\n"
         b"Permissions 0644 for '/k' are too open.\r\nLoad key \"/k\": bad permissions\r\n"
         b"me@alpha: Permission denied (publickey).\r\n", b"", 255,
         "ssh ignores a private key that others may read: chmod 600 it, then: ssh me@alpha"),
        (b"Host key verification failed.\r\n", b"", 255,
         "its host key is not known here: accept it once with: ssh me@alpha"),
        (b"No ED25519 host key is known for alpha and you have requested strict checking.\r\n"
         b"Host key verification failed.\r\n", b"", 255,
         "its host key is not known here: accept it once with: ssh me@alpha"),
        (CHANGED, b"", 255, "its host key has changed: if you know why, remove the old one "
                            "(ssh-keygen -R), then: ssh me@alpha"),
        (b'  remove with:\r\n  ssh-keygen -f "/k" -R "alpha"\r\n' + CHANGED, b"", 255,
         "its host key has changed: if you know why, remove the old one (ssh-keygen -f \"/k\" -R "
         "\"alpha\"), then: ssh me@alpha"),
        (b"/bin/sh: 1: eval: probe='import: not found\n", b"", 2,
         "ssh ended with status 2 (its login shell's start files read our stdin, or redefine a "
         "command): try: ssh me@alpha echo ok"),
        (b"kex_exchange_identification: banner line contains invalid characters\r\n"
         b"banner exchange: Connection to 1.2.3.4 port 80: invalid format\r\n", b"", 255,
         "what listens there is no sshd: is the port right?"),
        # through a jump host
        (b"channel 0: open failed: connect failed: Connection refused\r\n"
         b"stdio forwarding failed\r\n" + PROXIED, b"", 255, REFUSED),
        (b"channel 0: open failed: connect failed: No route to host\r\n"
         b"stdio forwarding failed\r\n" + PROXIED, b"", 255, UNREACHABLE),
        (b"channel 0: open failed: connect failed: Name or service not known\r\n"
         b"stdio forwarding failed\r\n" + PROXIED, b"", 255, UNKNOWN),
        (b"channel 0: open failed: administratively prohibited: open failed\r\n"
         b"stdio forwarding failed\r\n" + PROXIED, b"", 255,
         "its jump host forbids to go on from there (see AllowTcpForwarding in its sshd_config)"),
        (b"ssh: connect to host jump port 22: Connection refused\r\n" + PROXIED, b"", 255, REFUSED),
        # what only ssh's own words can tell
        (b"Unable to negotiate with 1.2.3.4 port 22: no matching host key type found. Their offer: "
         b"ssh-rsa\r\n", b"", 255, "ssh ended with status 255 (Unable to negotiate with 1.2.3.4 "
         "port 22: no matching host key type found. Their offer: ssh-rsa): try: ssh me@alpha echo "
         "ok"),
        (b"WARNING: Your password has expired.\r\n"
         b"Password change required but no TTY available.\r\n", b"", 1,
         "ssh ended with status 1 (Password change required but no TTY available.): try: "
         "ssh me@alpha echo ok"),
        (b"", b"This account is currently not available.\n", 1,
         "ssh ended with status 1 (This account is currently not available.): try: ssh me@alpha "
         "echo ok"),
        (b"no end of line", b"", 127, "ssh ended with status 127 (no end of line): try: "
                                      "ssh me@alpha echo ok"),
        (b"", b"", -15, "ssh killed by signal 15: try: ssh me@alpha echo ok"),
        (b"Permission denied\n", b"", 1,  # not ssh's own
         "ssh ended with status 1 (Permission denied): try: ssh me@alpha echo ok"),
        (b"\x1b[2J\xff" * 200 + b"\n", b"", 2, None))

    def test_failures_that_last(self):
        for said, printed, status, expected in self.FINAL:
            with self.subTest(said):
                self.none_left.clear()
                host, = self.hosts_of("me@alpha")
                self.at(0.0)
                told = self.die(self.started[-1], status, said, printed)
                if expected is not None:  # of the network with the words of ssh
                    words = re.search(rb"(?m)^ssh: .*[^\r\n]", said)
                    words = f" ({words[0].decode()})" if words else ""
                    self.assertEqual(told, [f"me@alpha: {expected}{words}"])
                self.assertTrue(told[0].isprintable() and len(told[0]) < 1200, told)
                self.assertEqual(host.due, math.inf)
                self.assertEqual(self.none_left, [0.0])
                self.assertEqual(self.at(1000.0), [])  # it is not tried again

    def test_logins_that_are_dropped(self):
        drops = "its sshd, or one on the way to it, drops logins (see MaxStartups)"
        for said, cause in (
                (self.CLOSED % (b"1.2.3.4", 22), drops),
                (b"Warning: Permanently added 'alpha' (ED25519) to the list of known hosts.\r\n"
                 b"Connection reset by 1.2.3.4 port 22\r\n", drops),
                (b"ssh_exchange_identification: Connection closed by remote host\r\n",
                 drops),
                (b"kex_exchange_identification: read: Connection reset by peer\r\n",
                 drops),
                (b'"System is booting up."\r\nConnection closed by 1.2.3.4 port 22\r\n',
                 'the connection was closed before the login ("System is booting up.")')):
            with self.subTest(said):
                host, = self.hosts_of("alpha")
                now, delays = 0.0, []
                self.at(now)
                while host.due < math.inf:
                    count = len(self.started)
                    told = self.die(self.started[-1], 255, said, now=now)
                    if host.due < math.inf:
                        delays.append(host.due - now)
                        self.assertEqual(told, [  # one is normal, and not told
                            f"alpha: {cause}; trying again in {delays[-1]:g} s"] * (delays != [1]))
                        self.at(host.due - 0.01)
                        self.assertEqual(len(self.started), count)
                        now = host.due
                        self.at(now)
                        self.assertEqual(len(self.started), count + 1)
                self.assertEqual(told, [f"alpha: {cause}; gave up after 6 tries"])
                self.assertEqual(delays, [1.0, 2.0, 4.0, 8.0, 16.0])

    def test_a_host_without_python(self):
        for printed, more, expected in (
                ("no python", {}, "it has no python3 (nor python3.13 to python3.9): install it, or "
                                  "name it with --python"),
                ("no python, /usr/bin/python3 is 3.6.8", {}, "its Python is too old "
                 "(/usr/bin/python3 is 3.6.8), testcloud needs 3.9 or newer: name another with "
                 "--python"),
                ("no python/bin/sh: 1: p: not found", {"python": "p"},
                 "--python p is no Python 3.9 or newer there: /bin/sh: 1: p: not found")):
            host, = self.hosts_of("alpha", **more)
            self.at(0.0)
            mark = host.link.reader.mark
            # sh has ended before it has read the program
            told = self.die(self.started[-1], 0, b"", mark + printed.encode() + b"\n")
            self.assertEqual(told, [f"alpha: {expected}"])

    def test_what_cannot_be_started(self):
        for error in (FileNotFoundError(2, "No such file"), ValueError("embedded null byte")):
            with mock.patch.object(tc.subprocess, "Popen", side_effect=error):
                self.hosts_of("alpha", ssh="myssh -v")
                before = os.listdir("/dev/fd")
                told = self.at(0.0)
            self.assertRegex(told[0], r"^alpha: cannot run myssh here: .*\(see --ssh and --via\)$")
            self.assertEqual(os.listdir("/dev/fd"), before)
        pipes = iter([os.pipe()])
        with mock.patch.object(tc.os, "pipe", lambda: next(pipes, None) or self.too_many()):
            self.hosts_of("alpha")
            told = self.at(0.0)
        self.assertEqual(told, ["alpha: cannot run ssh here: Too many open files (see --ssh and "
                                "--via)"])

    def too_many(self):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def test_a_host_that_is_lost_comes_back(self):
        """Delays grow while it is lost at once, and begin anew when it was up for long."""
        host, = self.hosts_of("alpha")
        now, delays = 0.0, []
        files = len(os.listdir("/dev/fd"))
        for up_for in (5.0, 5.0, 5.0, 61.0, 5.0, 5.0):
            self.at(now)
            os.write(self.started[-1].stderr, b"Welcome!\n")
            self.open(self.started[-1], now)
            self.assertTrue(host.up)
            now += up_for
            text = "Read from remote host alpha: Connection timed out" if up_for > 9 else ""
            told = self.die(self.started[-1], 255, text.encode(), now=now)
            delays.append(host.due - now)
            self.assertEqual(told, [
                "alpha: lost: ssh ended with status 255" + (f" ({text})" if text else "")
                + f"; trying again in {delays[-1]:g} s"])
            self.assertEqual(len(os.listdir("/dev/fd")), files)
            now = host.due
            self.at(now)
            # what would be final for a host that was never up
            told = self.die(self.started[-1], 255,
                             b"ssh: connect to host alpha port 22: Connection refused\r\n", now=now)
            delays.append(host.due - now)
            self.assertEqual(told, [
                f"alpha: {self.REFUSED} (ssh: connect to host alpha port 22: Connection refused); "
                f"trying again in {delays[-1]:g} s"])
            now = host.due
        self.assertEqual(delays, [1, 2, 4, 8, 16, 32, 1, 2, 4, 8, 16, 32])
        self.at(now)
        self.open(self.started[-1], now)
        self.assertEqual(self.told, ["alpha: is back"])
        for _ in range(4):
            self.die(self.started[-1], 255, now=now)
            now = host.due
            self.at(now)
        self.assertEqual(host.delay, tc.RETRY_DELAYS[1])
        self.assertEqual(self.none_left, [])
        self.assertEqual(self.uplinks[0].events.count("opened"), 7)

    def test_a_reason_does_not_steer_our_terminal(self):
        host, = self.hosts_of("alpha")
        self.at(0.0)
        told = self.die(self.started[-1], 0, b"", host.link.reader.mark + b"\x1b[2J\n")
        self.assertEqual(told, [r"alpha: \x1b[2J"])

    def test_no_process_to_spare_for_a_lost_host(self):
        host, = self.hosts_of("alpha")
        self.at(0.0)
        self.open(self.started[-1], 0.0)
        self.die(self.started[-1], 255, now=1.0)
        error = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        with mock.patch.object(tc.subprocess, "Popen", side_effect=error):
            self.assertEqual(self.at(2.0), [
                f"alpha: cannot run ssh here: {error.strerror} (see --ssh and --via); trying again "
                f"in 2 s"])
        self.at(4.0)
        self.assertEqual(len(self.started), 2)

    def test_a_process_that_cannot_be_killed(self):
        host, = self.hosts_of("alpha")
        self.at(0.0)
        ssh, = self.started
        with mock.patch.object(ssh, "wait", side_effect=subprocess.TimeoutExpired("ssh", 1)):
            self.hosts.close()
        self.assertIsNone(host.process)

    def test_few_logins_at_once(self):
        """Those that take long wait for the network, and do not hold up the others."""
        hosts = self.hosts_of(",".join(f"h{n}" for n in range(30)))
        self.at(0.0)
        self.assertEqual(len(self.started), tc.MAX_LOGINS)
        self.at(tc.LOGIN_TIME - 0.1)
        self.assertEqual(len(self.started), tc.MAX_LOGINS)
        self.open(self.started[0], 1.0)
        self.die(self.started[1], 1, now=1.0)
        self.assertEqual(len(self.started), tc.MAX_LOGINS + 2)
        self.at(tc.LOGIN_TIME)
        self.assertEqual(len(self.started), 2 * tc.MAX_LOGINS)
        self.assertEqual(sum(host.up for host in hosts), 1)

    def test_a_login_that_never_ends(self):
        with mock.patch.object(tc, "START_TIMEOUT", 7.0):
            host, = self.hosts_of("alpha")
            self.at(0.0)
            os.write(self.started[-1].stderr, b"Enter your token:\n")
            self.assertEqual(self.at(6.9), [])
            self.assertEqual(self.at(7.0), [])
            self.assertTrue(host.link.closed)
            self.assertEqual(tc.os.killpg.mock_calls, [mock.call(-1, signal.SIGCONT)])
            self.at(7.0 + tc.END_TIME - 0.01)
            self.assertIsNone(self.started[-1].status)
            told = self.at(7.0 + tc.END_TIME)
        self.assertEqual(told, ["alpha: not ready after 7 seconds: does its login shell wait for "
                                "something? try: ssh alpha echo ok"])
        self.assertEqual(self.started[-1].status, -9)

    def test_the_end_of_all_hosts(self):
        self.hosts_of("alpha,beta,gamma")
        self.at(0.0)
        self.open(self.started[0], 1.0)
        self.die(self.started[1], 1, now=2.0)
        self.die(self.started[2], 1, now=2.0)
        self.die(self.started[0], 1, now=3.0)  # it was up: it is tried again
        self.assertEqual(self.none_left, [])

    def test_silence_is_a_loss(self):
        host, = self.hosts_of("alpha")
        self.at(0.0)
        self.hosts.beat(0.0)
        self.open(self.started[-1], 1.0)
        for _ in range(tc.MAX_SILENT_BEATS + 1):
            self.hosts.beat(2.0)
        self.started[-1].end(0)
        self.assertEqual(self.at(2.0), ["alpha: lost: silent for 30 seconds; trying again in 1 s"])
        self.assertEqual(self.uplinks[0].events, ["opened", "ended"])

    def test_a_silent_host_is_named_and_named_again_when_it_is_heard(self):
        self.hosts_of("alpha")
        self.at(0.0)
        for _ in range(9):
            self.hosts.beat(0.0)  # a login that takes its time is no silence
        ssh = self.started[-1]
        self.open(ssh, 1.0)
        self.told.clear()
        for _ in range(3):
            self.hosts.beat(2.0)
        self.assertEqual(self.told, [])
        for _ in range(3):
            self.hosts.beat(2.0)
        self.assertEqual(self.told, ["alpha: has not answered for 8 s"])
        os.write(ssh.stdout, control())
        self.at(3.0)
        self.hosts.beat(3.0)
        self.assertEqual(self.told, ["alpha: answers again"])
        self.told.clear()
        self.hosts.beat(3.0)
        self.assertEqual(self.told, [])

    def test_hosts_that_are_coming(self):
        self.hosts_of("alpha,beta")
        self.assertTrue(self.hosts.are_coming())
        self.at(0.0)
        self.open(self.started[0], 1.0)
        self.assertTrue(self.hosts.are_coming())
        self.die(self.started[1], 1, now=2.0)  # it is given up
        self.assertFalse(self.hosts.are_coming())
        self.die(self.started[0], 1, now=3.0)  # it was up: it is lost, and not coming
        self.assertFalse(self.hosts.are_coming())

    def test_a_worker_that_heard_nothing_says_so_by_its_status(self):
        self.hosts_of("alpha")
        self.at(0.0)
        self.open(self.started[-1], 1.0)
        self.assertEqual(self.die(self.started[-1], tc.HEARD_NOTHING, now=2.0), [
            "alpha: lost: its worker heard nothing from here for too long; trying again in 1 s"])

    def test_what_workers_say(self):
        host, = self.hosts_of("alpha")
        self.at(0.0)
        ssh = self.started[-1]
        os.write(ssh.stderr, b"testcloud: too early\n")
        self.assertEqual(self.at(0.0), [])
        self.open(ssh, 1.0)
        os.write(ssh.stderr, b"testcloud: one\ntestcloud: two \x1b[2J\nnoise\ntestcl")
        self.assertEqual(self.at(2.0), ["alpha: one", "alpha: two \\x1b[2J"])
        os.write(ssh.stderr, b"oud: three\ntestcloud: one\n")
        self.assertEqual(self.at(3.0), ["alpha: three"])
        os.write(ssh.stderr, b"testcloud: one\n")
        self.assertEqual(self.at(30.0), ["alpha: one"])
        os.write(ssh.stdout, control("reconnect"))
        self.at(30.0)
        self.assertEqual(self.uplinks[0].events, ["opened", "reconnect"])

    def test_a_worker_that_says_very_much(self):
        lines = b"".join(b"testcloud: %d\n" % n for n in range(1000))
        for verbose, shown in ((False, tc.MAX_COMPLAINTS), (True, 1000)):
            self.hosts_of("alpha", verbose=verbose)
            self.at(0.0)
            self.open(self.started[-1], 1.0)
            os.write(self.started[-1].stderr, lines)
            self.assertEqual(len(self.at(2.0)), shown)
            os.write(self.started[-1].stderr, lines)
            self.assertEqual(len(self.at(4.0)), 0)
            self.end_all()

    def test_stop(self):
        """Workers leave; logins end; nothing begins any more."""
        hosts = self.hosts_of(",".join(f"h{n}" for n in range(10)))
        self.at(0.0)
        self.open(self.started[0], 0.0)
        self.hosts.stop(143, 0.0)
        self.assertEqual([host.link.closed for host in hosts[1:9]], [True] * 8)
        reader = tc.RecordReader()
        words = [parts for _, parts in reader.feed(os.read(self.started[0].stdin, 65536))]
        self.assertEqual(words, [["stop", 143]])
        self.assertIsNone(self.loop.status)
        for ssh in list(self.started):
            ssh.end(0)
        self.assertEqual([*self.at(1.0), *self.at(1.0)], [])
        self.assertEqual((self.loop.status, len(self.started)), (143, 9))

    def test_the_end_of_a_client_names_the_hosts_that_it_waits_for(self):
        self.hosts_of("alpha,beta")
        self.at(0.0)
        for ssh in self.started:
            self.open(ssh, 1.0)
        self.started[1].end(0)
        self.told.clear()
        with mock.patch.multiple(tc, NOTICE_DELAY=0.02, CLOSE_TIME=0.1):
            self.hosts.close()
        self.assertEqual(self.told, ["waiting 0.1 s for the workers to end on alpha"])
        self.assertEqual(self.started[0].status, -signal.SIGKILL)

    def test_a_host_that_does_not_stop(self):
        self.hosts_of("alpha", drain=1.0, kill_grace=2.0)
        self.at(0.0)
        self.open(self.started[-1], 1.0)
        self.hosts.stop(143, 2.0)
        self.at(6.9 + tc.CLOSE_TIME)
        self.assertIsNone(self.loop.status)
        self.at(7.0 + tc.CLOSE_TIME)
        self.assertEqual(self.loop.status, 143)

    def test_a_second_stop_exits_at_once(self):
        self.hosts_of("alpha")
        self.at(0.0)
        self.open(self.started[0], 0.0)
        self.hosts.stop(130, 0.0)
        self.hosts.stop(143, 0.0)
        self.assertEqual(self.loop.status, 143)


class RelayTest(unittest.TestCase):
    """A Relay between a stream and a real broker's socket."""

    def setUp(self):
        import zmq
        self.context = zmq.Context()
        self.addCleanup(self.context.term)
        self.router = self.context.socket(zmq.ROUTER)
        self.addCleanup(self.router.close, 0)
        port = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.loop = tc.EventLoop(sockets=True)
        self.addCleanup(self.loop.close)
        self.uplink = tc.Relay(self.loop, lambda adapter: tc.DealerLink(
            self.loop, adapter, BROKER, f"tcp://127.0.0.1:{port}", tc.WORKER_ROLE))
        self.open()

    def open(self):
        """A worker's stream begins."""
        one, two = os.pipe(), os.pipe()
        self.tap, self.feed = two[0], one[1]
        link = tc.PipeLink(self.loop, self.uplink.machine, WORKERS, b"", one[0], two[1], {},
                           lambda why, now: self.uplink.ended(now))
        self.addCleanup(link.close)
        self.addCleanup(os.close, self.tap)
        self.addCleanup(os.close, self.feed)
        self.uplink.opened(link, 0.0)
        self.until(lambda: self.dealer().up)
        self.link = link

    def test_a_name_that_cannot_be_resolved_ends_the_stream_only(self):
        def fail(adapter):
            raise tc.SetupError("cannot find host 'hub': check its name")
        relay, ends = tc.Relay(self.loop, fail), []
        link = types.SimpleNamespace(end=lambda why, now: ends.append(why))
        relay.opened(link, 0.0)
        self.assertEqual(ends, ["cannot find host 'hub': check its name"])

    def dealer(self):
        return self.uplink.adapter.links[BROKER]

    def round(self):
        self.loop.flush()
        self.loop.wait()

    def until(self, condition):
        end = time.monotonic() + PATIENCE
        while not condition():
            self.assertLess(time.monotonic(), end)
            self.round()

    def heard(self):
        """The next message at the broker: who has sent it, and what."""
        self.until(lambda: self.router.poll(0))
        return self.router.recv_multipart()

    def send(self, peer, count):
        for _ in range(count):
            self.router.send_multipart([peer, b"OK"])

    def test_messages_both_ways(self):
        os.write(self.feed, record(tc.MESSAGE, b"run", b"RESULT", b"data"))
        peer, *frames = self.heard()
        self.assertEqual(frames, [b"", b"run", b"RESULT", b"data"])
        self.router.send_multipart([peer, b"", b"run", b"CANCEL", b"more"])
        reader, found = tc.RecordReader(), []
        while [tc.MESSAGE, [b"run", b"CANCEL", b"more"]] not in found:
            self.round()
            if tc.readable(self.tap):
                found += map(list, reader.feed(os.read(self.tap, 65536)))
        self.assertIn([tc.CONTROL, ["connected"]], found)

    def test_a_stream_that_ends_with_messages_under_way(self):
        """Either way; and the next worker has a connection of its own."""
        os.write(self.feed, record(tc.MESSAGE, body=b"READY"))
        first, _ = self.heard()
        self.send(first, 100)
        os.write(self.feed, record(tc.MESSAGE, body=b"last words") + b"noise" * 9)
        self.until(lambda: self.link.closed)
        self.assertIsNone(self.dealer().socket)
        for _ in range(3):
            self.round()
        self.open()
        os.write(self.feed, record(tc.MESSAGE, body=b"READY again"))
        peer, body = self.heard()
        while peer == first:  # what was on its way
            peer, body = self.heard()
        self.assertEqual(body, b"READY again")

    def test_what_a_closed_dealer_still_had_to_do(self):
        for refused in (False, True):
            dealer = self.dealer()
            dealer.refused, dealer.unread, dealer.retry_at = refused, True, 0.0
            dealer.backlogs[b""] = deque([tc.Outgoing(BROKER, b"", "", b"READY", b"")])
            self.link.end("", 0.0)
            for _ in range(3):
                self.round()
            self.assertIsNone(dealer.socket)
            self.open()
            os.write(self.feed, record(tc.MESSAGE, body=b"READY again"))
            self.assertEqual(self.heard()[1], b"READY again")


# === Working tree =====================================================================


needs_git = unittest.skipUnless(shutil.which("git"), "needs git")


class WorkingTreeTest(unittest.TestCase):

    def setUp(self):
        self.top = os.path.realpath(tempfile.mkdtemp(prefix="testcloud-tree-"))
        self.addCleanup(shutil.rmtree, self.top)
        other = tempfile.mkdtemp(prefix="testcloud-hashes-")
        self.addCleanup(shutil.rmtree, other)
        self.hashes = os.path.join(other, "sub", "tree.json")

    def path(self, name):
        return os.path.join(self.top, name)

    def write(self, name, content=b"", mode=0o644):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as file:
            file.write(content)
        os.chmod(self.path(name), mode)

    def git(self, *words, at=""):
        environ = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
        return subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words],
                              cwd=self.path(at), env=environ, check=True,
                              capture_output=True).stdout

    def tree(self, *filters, at="", **more):
        tree = tc.WorkingTree(self.path(at), filters, **more)
        self.addCleanup(lambda: tree.copy and tree.copy.close())
        return tree

    def test_our_own_cache_stays_at_home(self):
        """A home as tree would else take along its workspaces, with copies of itself."""
        self.write(".cache/other/x")
        self.write(".cache/testcloud/trees/home-1/y")
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": self.path(".cache")}):
            self.assertEqual(self.paths(), [".cache/other/x"])
            self.assertIn(".cache/testcloud/trees/home-1/y",
                          self.paths((False, ".cache/testcloud")))

    def paths(self, *filters, at=""):
        """Paths of all but directories with something in them."""
        tree = self.tree(*filters, at=at)
        found = [entry.path for entry in tc.parse_tree(tree.look().manifest).entries]
        parents = {path.rpartition("/")[0] for path in found}
        self.assertEqual(tree.left_out, [])
        return [path for path in found if path not in parents]

    def everything(self):
        """What is below the top, by another way: {path: (kind, mode, content or target)}."""
        found = {}
        for folder, folders, files in os.walk(self.top):
            for name in folders + files:
                path = os.path.join(folder, name)
                status = os.lstat(path)
                if stat.S_ISLNK(status.st_mode):
                    row = (tc.LINK, 0, os.readlink(path))
                elif stat.S_ISDIR(status.st_mode):
                    row = (tc.DIRECTORY, stat.S_IMODE(status.st_mode), "")
                else:
                    row = (tc.FILE, stat.S_IMODE(status.st_mode),
                           hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest())
                found[os.path.relpath(path, self.top)] = row
        return found

    def edit(self, rng):
        """Change anything below the top."""
        found = self.everything()
        names = [*found, "x"]
        name = rng.choice(["a", "b", "c.o", "build", "\udcff", "n\nl", "\u00e9", ".gitignore", "-"])
        folder = rng.choice(["", *(path for path in found if found[path][0] == tc.DIRECTORY)])
        path, kind = os.path.join(folder, name), rng.randrange(6)
        if path in found and (kind or rng.random() < 0.5):
            if found[path][0] == tc.DIRECTORY:
                shutil.rmtree(self.path(path))
            else:
                os.unlink(self.path(path))
        if kind == 1:
            os.makedirs(self.path(path))
        elif kind == 2:
            target = rng.choice(names)
            os.symlink(os.path.relpath(target, folder or "."), self.path(path))
        elif kind > 2 and (kind > 4 or path not in found):
            self.write(path, rng.choice([b"", b"*.o\n", b"/b\nbuild/\n", rng.randbytes(99)]),
                       rng.choice([0o644, 0o755, 0o600]))

    def test_whatever_is_there_goes_along(self):
        rng = random.Random(1)
        with mock.patch.object(tc, "RACY", 10**8):  # so that some hashes come from the cache
            for _ in range(60):
                self.edit(rng)
                tree = self.tree(cache_path=self.hashes).look()
                self.assertEqual({entry.path: (entry.kind, entry.mode, entry.content)
                                  for entry in tree.entries}, self.everything())
                tc.parse_tree(tree.manifest)

    @needs_git
    def test_in_a_work_tree_git_tells_what_belongs_to_it(self):
        self.git("init", "-q")
        rng = random.Random(2)
        for step in range(60):
            self.edit(rng)
            if step % 7 == 0:
                self.git("add", "-A")
            if step % 13 == 0:
                self.git("add", "-Af", ".")
            if step % 20 == 7:
                self.git("commit", "-qm", "x", "--allow-empty")
            everything = {path: kind for path, (kind, *_) in self.everything().items()
                          if not (path + "/").startswith(".git/")}
            files = {os.fsdecode(path) for path in self.git(
                "ls-files", "-z", "-co", "--exclude-standard").split(b"\0")}
            ignored = subprocess.run(
                ["git", "check-ignore", "-z", "--stdin"], cwd=self.top, capture_output=True,
                input=b"\0".join(map(os.fsencode, everything))).stdout.split(b"\0")
            expected = {path for path, kind in everything.items() if (
                os.fsencode(path) not in ignored if kind == tc.DIRECTORY else path in files)}
            for path in files & {*everything}:  # git knows directories by their files only
                while path:
                    expected.add(path)
                    path = os.path.dirname(path)
            expected -= {path for path, kind in everything.items()  # was a file when it was added
                         if kind == tc.DIRECTORY and os.fsencode(path) in ignored and not any(
                             name.startswith(path + "/") for name in files & {*everything})}
            found = self.tree().look().entries
            self.assertEqual({entry.path for entry in found}, expected, step)

    @needs_git
    def test_patterns_mean_what_they_mean_to_git(self):
        self.git("init", "-q")
        rng = random.Random(3)
        parts = ["a", "b", "ab", "*", "?", "[ab]", "[!a]", "[^b]", "[a-c]", "[]a]", "[", "]", "\\",
                 "\\*", "\\a", "!", "-", "[a-]", "[[:alpha:]]", "[c-a]", "[b-]c]", "[\\]]",
                 "\u00e9"]
        paths = set()
        for _ in range(150):
            path = "/".join("".join(rng.choices("abc*[]\\!-\u00e9", k=rng.randint(1, 3)))
                            for _ in range(rng.randint(1, 4)))
            with contextlib.suppress(OSError):
                self.write(path)
        for path in self.everything():
            if path[:5] not in (".git", ".git/"):
                paths.add(path)
        matched = 0
        for part in [*parts, *range(60)]:
            patterns = [part] if part in parts else [rng.choice(["", "", "/", "!"]) + "/".join(
                rng.choice(["**", "".join(rng.choices(parts, k=rng.randint(1, 3)))])
                for _ in range(rng.randint(1, 3))) + rng.choice(["", "", "/"])
                for _ in range(rng.randint(1, 4))]
            pathlib.Path(self.path(".git/info/exclude")).write_text("\n".join(patterns) + "\n")
            git = subprocess.run(
                ["git", "check-ignore", "--no-index", "-z", "--stdin"], cwd=self.top,
                input="\0".join(paths).encode(), capture_output=True).stdout.decode().split("\0")
            tree = self.tree(*((True, pattern) for pattern in patterns))
            ours = {path for path in paths if any(
                tree.state(part.encode(), os.path.isdir(self.path(part)), False, False) is None
                for part in itertools.accumulate(path.split("/"), "{}/{}".format))}
            self.assertEqual(ours, {*filter(None, git)}, patterns)
            matched += len(ours)
        self.assertGreater(matched, 200)

    @needs_git
    def test_filters_come_after_git(self):
        self.git("init", "-q")
        self.write(".gitignore", b"build/\n*.o\n")
        for name in ("src/a.c", "src/a.o", "build/x/lib", "build/y", "doc/b", "doc/c/d", "z.o"):
            self.write(name)
        self.git("add", "-A")
        for filters, expected in (
                ((), "doc/b doc/c/d src/a.c"),
                (["-doc"], "src/a.c"), (["-doc/", "+doc/b"], "src/a.c"),  # as in .gitignore
                (["-doc/*", "+doc/b"], "doc/b src/a.c"),
                (["+doc/b", "-doc/*"], "doc src/a.c"),
                (["-*.c", "+/src/**"], "doc/b doc/c/d src/a.c src/a.o"),
                (["+build"], "build/x/lib build/y doc/b doc/c/d src/a.c"),
                (["+build/x/", "-doc"], "build/x/lib src/a.c"),
                (["+lib"], "build/x/lib doc/b doc/c/d src/a.c"),
                (["-build", "+lib"], "doc/b doc/c/d src/a.c"),
                (["+doc", "-!*.o"], "build/x doc/b doc/c/d src/a.c src/a.o z.o".replace(
                    "build/x ", ""))):
            with self.subTest(filters):
                self.assertEqual(self.paths(*((rule[0] == "-", rule[1:]) for rule in filters)),
                                 [".gitignore", *expected.split()])
        self.assertIn(".git/HEAD", self.paths((False, ".git")))
        self.assertEqual(self.paths(at="build"), ["x/lib", "y"])  # who names it, wants it
        self.assertEqual(self.paths(at="build/x"), ["lib"])
        self.assertEqual(self.paths(at="src"), ["a.c"])

    @needs_git
    def test_work_trees_in_a_work_tree_have_ignore_files_of_their_own(self):
        for top, name in (("", "a"), ("in/side", "b"), ("other", "c")):
            os.makedirs(self.path(top), exist_ok=True)
            self.git("init", "-q", at=top)
            self.write(os.path.join(top, ".gitignore"), name.encode() + b"\n")
            for name in "abc":
                self.write(os.path.join(top, name))
        self.git("add", ".gitignore", at="other")
        self.git("commit", "-qm", "x", at="other")
        self.git("-c", "protocol.file.allow=always", "submodule", "add", "-q",
                 self.path("other"), "module")
        self.write("module/c")
        expected = [".gitignore", ".gitmodules", "b", "c", "in/side/.gitignore", "in/side/a",
                    "in/side/c", "module/.gitignore", "other/.gitignore", "other/a", "other/b"]
        self.assertEqual(self.paths(), expected)
        os.unlink(self.path(".git/index"))
        with mock.patch.dict(os.environ, GIT_DIR=".git", GIT_INDEX_FILE="/no/such",
                             GIT_WORK_TREE="/"):  # as in a hook of another repository
            self.assertEqual(self.paths(), expected)
        shutil.rmtree(self.path("in/side/.git"))
        os.mkdir(self.path("in/side/.git"))
        self.assertEqual(self.paths(), [path for path in expected if path != "in/side/a"])
        tree = self.tree(at="in/side")
        self.assertEqual([entry.path for entry in tree.look().entries], [".gitignore", *"abc"])
        self.assertEqual(tree.left_out, [
            f"{self.path('in/side')} has a .git that is no repository: all its files go along"])

    @needs_git
    def test_a_repository_that_only_the_environment_knows(self):
        self.write("home/.gitignore", b"no\n")
        self.write("home/sub/no")
        self.write("home/sub/yes")
        self.git("init", "-q", "--bare", "dots")
        with mock.patch.dict(os.environ, GIT_DIR=self.path("dots"),
                             GIT_WORK_TREE=self.path("home")):
            self.assertEqual(self.paths(at="home"), [".gitignore", "sub/yes"])
            self.assertEqual(self.paths(at="home/sub"), ["yes"])
            self.assertEqual(tc.git_top(self.path("home/sub")), self.path("home"))
            self.assertEqual(tc.git_top(self.path("dots")), "")

    @needs_git
    def test_git_that_is_missing_or_fails(self):
        self.git("init", "-q")
        self.write(".gitignore", b"a\n")
        self.write("a")
        with mock.patch.dict(os.environ, PATH="/nonexistent"):
            tree = self.tree()
            self.assertEqual(len(tree.look().entries), 2)
        self.assertEqual(tree.left_out, [
            "cannot run git (No such file or directory): files go along that git would ignore in "
            + self.top])
        self.write(".git/config", b"[nonsense")
        with self.assertRaises(tc.SetupError) as raised:
            self.tree().look()
        self.assertRegex(str(raised.exception),
                         f"^git cannot list {self.top}: fatal: bad config .*$")

    def test_what_cannot_go_along_is_named(self):
        os.mkfifo(self.path("fifo"))
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(self.path("socket"))
        os.makedirs(self.path("d/e"))
        for name, target in (("out", "../x"), ("abs", self.path("d")), ("d/e/ok", "../../d/./e"),
                             ("d/out", "e/../../../x"), ("d/up", "../out/y"), ("loop", "loop"),
                             ("back", f"../{os.path.basename(self.top)}/d"), ("d/gone", "none"),
                             ("two", "d/e/ok/../../.."), ("d/two", "../two/d")):
            os.symlink(target, self.path(name))
        tree = self.tree()
        self.assertEqual([entry.path for entry in tree.look().entries],
                         ["d", "d/e", "d/e/ok", "d/gone", "loop"])
        out, special = "this link leads out of the tree", "it is no file, directory or link"
        self.assertEqual(tree.missing, {
            "fifo": special, "socket": special, "abs": out, "back": out, "d/out": out, "d/two": out,
            "d/up": out, "out": out, "two": out})
        self.assertEqual(len(tree.left_out), tc.MAX_LEFT_OUT + 1)
        self.assertEqual(tree.left_out[-1], "4 more are left out")

    def test_what_cannot_be_read_is_left_out(self):
        for name in ("a", "gone", "d/b", "e/c"):
            self.write(name)
        open_file, scan = os.open, os.scandir

        def refuse(path, *rest, **more):
            for name, code in (("a", errno.EACCES), ("gone", errno.ENOENT)):
                if os.fsencode(path) == os.fsencode(self.path(name)):
                    raise OSError(code, os.strerror(code))
            return open_file(path, *rest, **more)

        def refuse_directory(path):
            if os.fsencode(path) == os.fsencode(self.path("d")):
                raise PermissionError(errno.EACCES, "Permission denied")
            return scan(path)

        tree = self.tree()
        with mock.patch.object(os, "open", refuse), mock.patch.object(
                os, "scandir", refuse_directory):
            self.assertEqual([entry.path for entry in tree.look().entries], ["e", "e/c"])
        self.assertEqual(tree.left_out, ["d is left out: permission denied",
                                         "a is left out: permission denied"])
        with mock.patch.object(tc.WorkingTree, "ask_git"), self.assertRaises(tc.SetupError):
            self.tree(at="none").look()

    def test_a_tree_that_is_too_large(self):
        for name, size in (("data/x", 500), ("data/y", 1500), ("z/s", 900), ("b", 30), ("c", 20)):
            self.write(name, bytes(size))
        self.assertEqual(self.tree(limit=2950).look().size, 2950)
        with self.assertRaises(tc.UsageError) as raised, mock.patch.object(
                tc.WorkingTree, "hash_file", side_effect=AssertionError("checked before")):
            self.tree(limit=2949).look()
        self.assertEqual(str(raised.exception), (
            f"{self.top} has 3.0 kB in 5 files, the largest are data (2.0 kB), z (900 bytes), b "
            f"(30 bytes): leave out what commands do not need with --exclude, or allow it with "
            f"--sync-max 1G"))
        with mock.patch.object(tc, "MAX_ENTRIES", 6), self.assertRaises(tc.UsageError) as raised:
            self.tree().look()
        self.assertIn("or more, and 6 may go along", str(raised.exception))

    def test_the_stream_is_read_as_it_was_hashed(self):
        rng = random.Random(4)
        contents = {f"{name}/{number}": rng.randbytes(rng.choice([0, 1, 100, 5000]))
                    for name in ("a", "b/c") for number in range(5)}
        for name, content in contents.items():
            self.write(name, content)
        working = self.tree()
        tree = working.look()
        stream = tree.manifest + b"".join(contents.get(entry.path, b"") for entry in tree.entries)
        self.assertEqual((working.seen, working.hashed), (13, tree.size))
        for _ in range(100):
            spans = [(rng.randrange(len(stream) + 10), rng.randrange(5000)) for _ in range(3)]
            self.assertEqual(working.read(tree, spans, again=rng.random() < 0.1), b"".join(
                stream[start:start + size] for start, size in spans))

    def whole(self, tree):
        return [(len(tree.manifest), tree.size)]

    def test_files_that_change_are_served_from_a_copy(self):
        for name in "abcdefgh":
            self.write(name, name.encode() * 3)
        working = self.tree()
        first = working.look()
        self.write("a", b"AAAA")
        os.unlink(self.path("b"))
        for name in "cgh":
            os.unlink(self.path(name))
        os.mkfifo(self.path("c"))
        os.symlink("/etc/passwd", self.path("g"))
        os.mkdir(self.path("h"))
        os.rename(self.path("d"), self.path("x"))
        self.write("d", b"ddd")  # the same in another file
        os.utime(self.path("d"), ns=(5, 5))
        with self.assertRaises(tc.StaleFiles) as raised:
            working.read(first, self.whole(first))
        self.assertEqual(raised.exception.indexes, [0, 1, 2, 3, 6, 7])
        self.assertEqual(working.read(first, [first.spans_of([4])[0]]), b"eee")
        second = working.refresh(raised.exception.indexes)
        self.assertEqual([entry.path for entry in second.entries], ["a", "d", "e", "f"])
        self.assertEqual(second.entries[1:], first.entries[3:6])
        self.assertEqual(working.left_out, ["b is left out: no such file or directory",
                                            *(f"{name} is left out: it is no file any more"
                                              for name in "cgh")])
        for number in range(3):
            self.write("a", b"%d" % number)  # it converges
            self.assertEqual(working.read(second, self.whole(second)), b"AAAAdddeeefff")
        self.write("e", b"EEE")
        third = working.refresh([2])
        self.assertEqual(working.read(third, self.whole(third)), b"AAAAdddEEEfff")
        with self.assertRaises(tc.StaleFiles):
            working.read(second, self.whole(second))
        same = working.refresh([3])
        self.assertEqual(same.id, third.id)

    def test_a_file_that_changes_while_it_is_read(self):
        self.write("a", b"abc")
        working = self.tree()
        tree = working.look()
        read = tc.OpenFile.read

        def change(file, offset, size):
            data = read(file, offset, size)
            self.write("a", b"longer")
            return data
        with mock.patch.object(tc.OpenFile, "read", change), self.assertRaises(tc.StaleFiles):
            working.read(tree, self.whole(tree))

    def test_a_full_disk_has_no_room_for_copies(self):
        self.write("a", b"abc")
        working = self.tree()
        working.look()
        working.copy = mock.Mock()
        working.copy.write.side_effect = OSError(errno.ENOSPC, "No space left on device")
        with self.assertRaisesRegex(tc.SetupError, "^cannot copy a, which changes, to /.*: No "):
            working.refresh([0])

    def look_later(self, **more):
        """Look when all files are old enough to be remembered. Returns the number hashed."""
        tree, later = self.tree(cache_path=self.hashes), time.time_ns() + 10 * tc.RACY
        hash_file = tree.hash_file
        with mock.patch.object(time, "time_ns", lambda: later), mock.patch.object(
                tree, "hash_file", side_effect=hash_file) as hashing:
            self.looked = tree.look()
            self.looking = tree
        return hashing.call_count

    def test_hashes_are_remembered(self):
        for name in "abc":
            self.write(name, name.encode())
        self.tree(cache_path=self.hashes).look()  # too young to be sure
        self.assertEqual([self.look_later(), self.look_later()], [3, 0])
        tree = self.looked
        self.assertEqual(tree.id, self.tree().look().id)
        self.write("a", b"A")
        os.utime(self.path("a"), ns=(tree.entries[0].mtime,) * 2)  # of the same size, too
        os.unlink(self.path("b"))
        self.assertEqual([self.look_later(), self.look_later()], [1, 0])
        self.assertEqual([entry.content for entry in self.looked.entries],
                         [hashlib.sha256(content).hexdigest() for content in (b"A", b"c")])
        for wrong in (b"", b"[]", b"{", b'{"a": 7}', b'{"a": [1, 2, 3, 4, 5, "x"]}', b"\xff"):
            pathlib.Path(self.hashes).write_bytes(wrong)
            self.assertEqual([self.look_later(), self.look_later()], [2, 0], wrong)
        with mock.patch.object(self, "hashes", "/dev/null/x"):
            self.assertEqual([self.look_later(), self.look_later()], [2, 2])

    def test_a_wrong_hash_is_found_when_a_worker_complains(self):
        for name in "ab":
            self.write(name, name.encode())
        self.look_later()
        known = json.loads(pathlib.Path(self.hashes).read_text())
        known["a"][-1] = "0" * 64
        pathlib.Path(self.hashes).write_text(json.dumps(known))
        self.assertEqual(self.look_later(), 0)
        tree, working = self.looked, self.looking
        self.assertEqual(working.read(tree, self.whole(tree)), b"ab")
        with self.assertRaises(tc.StaleFiles) as raised:
            working.read(tree, self.whole(tree), again=True)
        self.assertEqual(raised.exception.indexes, [0])
        tree = working.refresh([0])
        self.assertEqual(tree.entries[0].content, hashlib.sha256(b"a").hexdigest())
        with mock.patch.object(working, "hash_file") as hashing:
            self.assertEqual(working.read(tree, self.whole(tree), again=True), b"ab")
            hashing.assert_not_called()  # once is enough, however often a worker asks
        self.assertEqual(self.look_later(), 2)

    def test_few_files_of_hashes_are_kept(self):
        self.write("a")
        directory = os.path.dirname(self.hashes)
        os.mkdir(directory)
        for number in range(tc.MAX_HASHES + 3):
            path = os.path.join(directory, f"{number}.json")
            pathlib.Path(path).touch()
            os.utime(path, (number, number))
        self.look_later()
        self.assertEqual({*os.listdir(directory)}, {"tree.json", *(
            f"{number}.json" for number in range(4, tc.MAX_HASHES + 3))})

    def test_where_hashes_are(self):
        with mock.patch.dict(os.environ, XDG_CACHE_HOME="/cache"):
            self.assertRegex(tc.hashes_path("/a"), "^/cache/testcloud/hashes/[0-9a-f]{16}.json$")
            self.assertNotEqual(tc.hashes_path("/a"), tc.hashes_path("/b"))
        with mock.patch.dict(os.environ, XDG_CACHE_HOME="", HOME="nowhere"):
            self.assertEqual(tc.hashes_path("/a"), "")

    def test_a_look_that_takes_long_is_told(self):
        told, looking = [], threading.Event()
        files = mock.Mock(seen=1, hashed=2_500_000, left_out=["x is left out: why"],
                          look=looking.wait)
        self.addCleanup(looking.set)
        reader = tc.TreeReader(mock.Mock(), mock.Mock(), files, told.append)
        began = reader.notice_at - tc.TRANSFER_NOTICE
        for later in (0, 0.9, 1.1, 2, 10, 12):
            reader.tell_look(began + later)
        self.assertEqual(told, ["reading the working tree: 1 name, 2.5 MB"] * 2)
        for later in (50, 60):
            reader.tell_left_out(began + later)
            reader.tell_look(began + later)
        self.assertEqual(told[2:], ["x is left out: why"])

    def test_the_head_says_whose_tree_it_is(self):
        heads = [tc.WorkingTree(top, head={"setup": "x"}).look().head for top in (
            self.top, self.top + "/.", os.path.dirname(os.path.dirname(self.hashes)))]
        self.assertEqual(heads[0], heads[1])
        self.assertNotEqual(heads[0]["origin"], heads[2]["origin"])
        self.assertEqual((heads[0]["name"], heads[0]["setup"]), (os.path.basename(self.top), "x"))
        self.assertEqual(tc.origin_of("/")["name"], "tree")
        self.assertEqual(tc.origin_of("/a/..b \n\u00e9" + "x" * 80)["name"],
                         "..b___" + "x" * 34)
        self.assertEqual(tc.origin_of("/a/...")["name"], "tree")


# === Command line =====================================================================


class CommandLineTest(unittest.TestCase):
    def test_interrupted_while_its_modules_are_imported(self):
        directory = tempfile.mkdtemp(prefix="testcloud-")
        self.addCleanup(shutil.rmtree, directory)
        with open(os.path.join(directory, "argparse.py"), "w") as file:
            file.write("import os, time; os.kill(os.getpid(), 2); time.sleep(60)")
        done = subprocess.run(  # even if we were told to ignore Ctrl-C, as in the background
            [sys.executable, SCRIPT, "worker"], env={**os.environ, "PYTHONPATH": directory},
            stderr=subprocess.PIPE, timeout=PATIENCE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        self.assertEqual((done.returncode, done.stderr), (-signal.SIGINT, b""))

    def test_a_python_that_is_too_old_is_told_which_it_needs(self):
        tried = 0
        for name in ("2.7", "3.6", "3.7", "3.8"):
            for python in filter(None, (
                    shutil.which(f"python{name}"),
                    *pathlib.Path.home().glob(f".pyenv/versions/{name}.*/bin/python"))):
                if subprocess.run([python, "-V"], capture_output=True).returncode:
                    continue  # it only seems to be there
                tried += 1
                for role in tc.RUN:
                    done = subprocess.run([python, SCRIPT, role], capture_output=True,
                                          timeout=PATIENCE)
                    said = done.stderr.replace(b"testcloud:", b"testcloud")
                    self.assertIn(b"testcloud needs Python 3.9 or newer", said)
                    if name in ("3.7", "3.8"):  # older ones cannot read the file
                        self.assertEqual((done.returncode, said.count(b"\n")), (3, 1), said)
        if not tried:
            self.skipTest("no old Python is here")

    def test_windows_is_refused_in_one_line(self):
        program = ("import os, subprocess, sys, tempfile; os.name = 'nt'; "
                   "sys.path[:0] = [sys.argv[1]]; "
                   "sys.modules.update(fcntl=None, resource=None, termios=None); "
                   "import testcloud; sys.exit(testcloud.main(['worker']))")
        done = subprocess.run([sys.executable, "-c", program, os.path.dirname(SCRIPT)],
                              capture_output=True, timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stdout), (3, b""))
        self.assertRegex(done.stderr, rb"^testcloud: needs Linux.* WSL\n$")

    def parse(self, *argv):
        return tc.build_parser().parse_args(argv)

    def main(self, *argv):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = tc.main(list(argv))
            except SystemExit as error:
                status = error.code
        return status, out.getvalue(), err.getvalue()

    def test_settings(self):
        settings = self.parse("client", "-b", "-j", "3", "-s", "5", "pytest", "-q", "{}")
        self.assertEqual((settings.brief, settings.slots, settings.slow, settings.template),
                         (True, 3, 5.0, ["pytest", "-q", "{}"]))
        self.assertEqual(tc.times_from(self.parse("broker", "--worker-expiry", "3")).worker_expiry,
                         3)
        self.assertEqual(tc.times_from(self.parse("worker")), tc.Times())

    def test_every_time_can_be_set_where_it_is_used(self):
        rows = {row.names[0][2:].replace("-", "_") for role in tc.OPTIONS
                for row in tc.options_of(role) if row.names[0].startswith("--")}
        self.assertLessEqual(set(tc.Times._fields), rows)

    def test_of_lines_too_long_for_a_command_only_the_beginning_is_read(self):
        limit = tc.MAX_COMMAND + 1
        data = b"a\n" + b"b" * (3 * limit) + b"\n" + b"c" * (limit - 1) + b"\n" + b"d" * limit
        for end in (b"\n", b"\0"):
            file = io.BytesIO(data.replace(b"\n", end))
            self.assertEqual([(line[:1], len(line)) for line in tc.bounded_lines(file, end)],
                             [(b"a", 1), (b"b", limit), (b"c", limit - 1), (b"d", limit)])

    def test_units(self):
        for text, wanted in (("500ms", 0.5), ("30s", 30), ("1.5", 1.5), ("5m", 300), ("2h", 7200),
                             ("1d", 86400)):
            self.assertEqual(self.parse("client", "--timeout", text).timeout, wanted)
        for text, wanted in (("7", 7), ("64k", 65536), ("10M", 10 * 2**20), ("2G", 2**31)):
            self.assertEqual(self.parse("client", "--max-output", text).max_output, wanted)

    def test_templates(self):
        for template, arguments, command in [
                ("", ["echo  a"], "echo  a"), ("wc -l", ["a b"], "wc -l 'a b'"),
                ("cp {} {}.bak", ["it's"], "cp 'it'\"'\"'s' 'it'\"'\"'s'.bak"),
                ("test {} -ef {}", ["x"], "test x -ef x"), ("echo", ["$HOME"], "echo '$HOME'"),
                ("{#} {} {#}", ["{#}"], "7 '{#}' 7"), ("echo {#}", ["x"], "echo 7"),
                ("cat", ["a", "b c"], "cat a 'b c'"), ("cat {} > {#}", ["a", "b"], "cat a b > 7"),
                ("{2}{1}{3}", ["a", "b c"], "'b c'a"), ("{1/} {2.}", ["a/b", "c.d"], "b c"),
                ("echo ${1} ${}", ["x"], "echo ${1} ${} x"), ("a{''}{''1}", ["x"], "a{''}{''1} x"),
                ("{.}", ["a.b", "c d.e"], "a 'c d'"), ("echo $${}", ["x"], "echo $$x")]:
            self.assertEqual(tc.fill_template(template, tuple(arguments), 7), command)

    def test_names_of_returned_files_are_filled_but_not_quoted(self):
        for template, arguments, path in (
                ("reports/{#}.xml", "a", "reports/7.xml"), ("{.}.o", "a b.c", "a b.o"),
                ("{2}/{1/}", "x/it's;y", "y/it's"), ("{}", "$x;*", "$x *"), ("out", "a", "out"),
                ("${}", "a", "${}")):
            self.assertEqual(
                tc.fill_placeholders(template, tuple(arguments.split(";")), 7), path)
        tc.check_returns(["a'{}'", '"{#}', "{2}"], 2)
        for file, why in (("{3}", "{3} is an argument that no command has"),
                          ("x{%}", "{%} is known only where it runs"), ("{##}", "no meaning")):
            with self.assertRaisesRegex(tc.UsageError, "^--return: .*" + re.escape(why)):
                tc.check_returns(["{}", file], 2)

    def test_parts_of_a_path(self):
        """As GNU parallel has them."""
        for path, *parts in [
                ("a.b/foo.tar.gz", "a.b/foo.tar", "foo.tar.gz", "a.b", "foo.tar"),
                ("foo.", "foo", "foo.", ".", "foo"), (".bashrc", "", ".bashrc", ".", ""),
                ("a/b/", "a/b/", "", "a", ""), ("foo", "foo", "foo", ".", "foo"),
                ("/x", "/x", "x", "/", "x"), ("a.b/c", "a.b/c", "c", "a.b", "c")]:
            self.assertEqual([tc.MODIFIERS[way](path) for way in (".", "/", "//", "/.")], parts)

    def test_templates_that_would_not_do_what_they_say_are_refused(self):
        for words, hint in (
                (["rm", "-rf", "old stuff/{}"], "quote the whole template"),
                (["a", "", "{}"], "be empty"),
                (["sh", "-c", "echo {}; date"], "may be empty or have one"),
                (['wc -c "{}"'], "{} stands in quotes"), (["wc", "'{}'"], "{} stands in quotes"),
                (["""curl -d '{"a": {}}'"""], "write {''}"),
                (['"$(echo "{.}")"'], "{.} stands in q"),
                ([r"""'\'"{1}" """], "{1} stands in quotes"), (["{%}"], "$TESTCLOUD_SLOT"),
                (["{2}"], "--colsep"), (["{0}"], "write {''0}"), (["{-1}"], "{-1} has no meaning"),
                (["{= s/a/b/ =}"], "has no meaning"), (["{##}"], "{##} has"),
                (["{..}"], "{..} has"),
                (["x", "[0-9]{3}"], "write {''3}"), (['sed "s/{}/x/"'], 'write {""}'),
                (['grep -E "a{3}" {}'], 'write {""3}'), ([r"echo '\{}'"], "in quotes"),
                ([r'echo "x\{}"'], "in quotes"), ([r"echo \{}"], "after a backslash"),
                (["cat <<X\n{}\nX"], "in a here-document"), (["echo `basename {}`"], "in `...`"),
                (['echo "a # b" "{}"'], "in quotes"), (['echo "a # {}"'], "in quotes"),
                (["true # {}"], "in a comment"), (["true #"], "in a comment"),
                (["(true)# it's {}"], "in a comment"), (["cat <<E\nx"], "in a here-document"),
                (["echo 'a"], "in quotes"), ([r"echo $'a\'{}'"], "in quotes"),
                (["true # # {}"], "in a comment"), (['"$((1 + 2)) {}"'], "in quotes"),
                (["'a' \"$(true) {}\""], "in quotes"), (["echo $'a$'\"{}\""], "in quotes")):
            with self.assertRaises(tc.UsageError) as caught:
                tc.check_template(words, 1)
            self.assertIn(hint, str(caught.exception))
        for template in ("convert {} {}.jpg && rm {}", '"a b"/{}', "'it'{}\"s\"",
                         '"$(wc -c {})"', "true # don't #\necho {}", "(true)# it's\necho {}",
                         "echo $$", "echo $${}", "echo '5$' {}", r"echo $'a\'b' {}", r"\\{}",
                         "cat <<< {}", r"\"{}\"", r"'\'{}", '"{#}"', "${1}",
                         "(cd {}; ls)", "{1}{.}{//}", '"$((1 + 2))" {}', '"$( (ls {}); ls {})"',
                         "echo $'a$' {}", 'echo "(" {}'):
            self.assertEqual(tc.check_template([template], 1), template)
        self.assertEqual(tc.check_template(["a", "{7}"], math.inf), "a {7}")

    def arguments(self, *words, stdin=b""):
        """What is made of these words of a client's command line."""
        settings = self.parse("client", *words)
        settings.template, settings.sources = tc.split_sources(settings.template)
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            with mock.patch.object(tc, "open_input", lambda path: os.dup(file.fileno())):
                return [*tc.read_arguments(settings)]

    def test_a_byte_order_mark_counts_before_the_first_line_only(self):
        mark = "\ufeff"
        for words, stdin, wanted in (("x", "a\r\nb\r\n", ["a", mark + "b"]),
                                     ("-0 x", "a\r\0b\r", ["a\r", mark + "b\r"])):
            data = (mark + stdin.replace("b", mark + "b")).encode()
            self.assertEqual(self.arguments(*words.split(), stdin=data),
                             [(text,) for text in wanted])

    def test_sources_of_arguments(self):
        for words, stdin, wanted in [
                ("x", b"a\n\nb c\n", [("a",), ("b c",)]), ("x ::: a b", b"no", [("a",), ("b",)]),
                ("x ::: a b ::: c d", b"", ["ac", "ad", "bc", "bd"]), ("::: a", b"", ["a"]),
                ("x ::: a b c :::+ d e", b"", ["ad", "be"]), ("x :::: f", b"1\n2\n", ["1", "2"]),
                ("x ::: a b :::+ c d ::: e f", b"", ["ace", "acf", "bde", "bdf"]),
                ("x ::: a :::: f", b"1\n2\n", ["a1", "a2"]),
                ("x ::: a b :::+ c d :::: f", b"1\n\n",
                 ["ac1", ("a", "c", ""), "bd1", ("b", "d", "")]), ("x :::", b"no", []),
                ("-0 x :::: f", b"a\nb\0c", [("a\nb",), ("c",)]),
                ("-n 2 x", b"1\n2\n3\n", ["12", "3"]), ("-n 2 x ::: a b", b"", ["ab"]),
                ("-n 9 x", b"", []), ("--colsep , x", b"a,b\nc\n,\n", ["ab", "c", ("", "")]),
                (r"--colsep \s+ x ::: 1", b"", ["1"]),
                ("--colsep : x ::: a:b ::: c", b"", ["abc"])]:
            self.assertEqual(self.arguments(*words.split(), stdin=stdin), [*map(tuple, wanted)],
                             words)
        self.assertEqual(self.arguments(":::", "", "a"), [("a",)])
        self.assertEqual(self.arguments("x", ":::", "", "a"), [("",), ("a",)])

    def test_a_client_without_an_option_says_how_to_have_it_here(self):
        for words, hint in (
                ("--halt now,fail=1 x", "--fail-fast"), ("--eta x", "--progress"),
                ("-P 4 x", "-j N --local"),
                ("-P4 x", "-j N --local"), ("-I {} x", "{} in the template"), ("-X x", "-n N"),
                ("-L 2 x", "-n N"), ("--results d x", "--json"), ("--wd d x", "--cwd"),
                ("--pipe x", "no stdin"), ("--bar", "--progress"),
                ("--retry 2 x", "mean --retries?"),
                ("--nonsense", "client has no option --nonsense (see: testcloud.py client --help)"),
                ("--joblgo=x ls", "--joblog?"), ("-q x", "one word"), ("--group x", "never"),
                ("--block 1k x", "no option --block (see")):
            status, out, err = self.main("client", *words.split())
            self.assertEqual((status, out, err.count("\n")), (2, "", 1))
            self.assertIn(hint, err)
            self.assertIn("testcloud.py client --help", err)
        self.assertIn("did you mean --slots?", self.main("worker", "--slot", "3")[2])
        self.assertIn("worker has no argument ls", self.main("worker", "ls")[2])
        self.assertNotIn("--local", self.main("worker", "-P", "4")[2])
        names = {name for row in tc.options_of("client") for name in row.names}
        self.assertFalse(names & {*" ".join(tc.FOREIGN_OPTIONS).split()})

    def test_arguments_take_the_place_of_stdin(self):
        status, out, _ = self.main_process(
            "client", "--dry-run", "echo", "{1}", "{2}", ":::", "a b", "c", ":::", "d")
        self.assertEqual((status, out), (0, "echo 'a b' d\necho c d\n"))
        status, out, err = self.main_process(
            "client", "--local", "--joblog", os.devnull, "false", ":::", "a")
        self.assertEqual(status, 1)
        self.assertRegex(out,
                         r"To run just these again: python3 \S+ client --resume-failed --local "
                              r"--joblog /dev/null -- false ::: a\n")
        status, out, err = self.main_process("client", "--local", "--need", "x", ":::", "true")
        self.assertEqual(status, 0)
        self.assertIn("with --local this machine runs everything", err)
        status, out, err = self.main_process("client", "x", "::::", "/no/such")
        self.assertEqual((status, err), (
            3, "testcloud: cannot read /no/such: No such file or directory\n"))

    def main_process(self, *argv):
        """With a stdin that must not be read."""
        silent, other = os.pipe()
        self.addCleanup(os.close, other)
        self.addCleanup(os.close, silent)
        done = subprocess.run([sys.executable, SCRIPT, *argv], stdin=silent, capture_output=True,
                              text=True, timeout=PATIENCE)
        return done.returncode, done.stdout, done.stderr

    def test_commands_find_their_directory_in_pwd(self):
        with tempfile.TemporaryDirectory() as folder:
            link = os.path.join(folder, "link")
            os.symlink("/", link)
            for more in ("", "--env=A=b"):
                argv = ["client", "--local", "--raw", "-C", link, *filter(None, [more]), ":::",
                        "pwd"]
                self.assertEqual(self.main_process(*argv)[1], link + "\n")

    def test_a_directory_from_the_workers_home(self):
        with tempfile.TemporaryDirectory() as home, mock.patch.dict(os.environ, HOME=home):
            os.mkdir(os.path.join(home, "d"))
            for given, wanted in (("~", home), ("~/d", os.path.join(home, "d"))):
                out = self.main_process("client", "--local", "-C", given, ":::", "pwd -P")[1]
                self.assertIn("\n" + os.path.realpath(wanted) + "\n", out)

    def test_a_dry_run_prints_what_would_be_run(self):
        log = os.path.join(tempfile.mkdtemp(), "log")
        self.addCleanup(shutil.rmtree, os.path.dirname(log))
        self.assertEqual(self.main_process("client", "--local", "--joblog", log, ":::", "true")[0],
                         0)
        for more, status, out in ((["--resume", "--joblog", log], 0, "false\n"),
                                  (["--resume", "--joblog", log + "-none"], 0, "true\nfalse\n"),
                                  (["--joblog", log], 0, "true\nfalse\n")):
            self.assertEqual(self.main_process("client", "--dry-run", *more, ":::", "true",
                                               "false"),
                             (status, out, ""))
        for more, status in ((["--allow-empty"], 0), ([], 2)):
            self.assertEqual(self.main_process("client", "--dry-run", *more, ":::")[:2],
                             (status, ""))
        pathlib.Path(log).write_text("a\nb\n")
        self.assertEqual(self.main_process("client", "--dry-run", "echo {2}{1}",
                                           "::::", log, log)[:2],
                         (0, "echo aa\necho ba\necho ab\necho bb\n"))

    def test_a_directory_after_sync_is_not_taken_for_a_template(self):
        home = os.getcwd()
        self.addCleanup(os.chdir, home)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for name in ("src", "sub/dir", "test"):
                os.makedirs(name)
            for words, sync, template in (
                    ("--sync pytest {}", "", ["pytest", "{}"]),
                    ("--sync src pytest {}", "src", ["pytest", "{}"]),
                    ("--sync . src", ".", ["src"]), ("--sync=src src", "src", ["src"]),
                    ("--sync -- src", "", ["src"]), ("--sync -k src", "", ["src"]),
                    ("--sync sub/dir", "sub/dir", []), ("--sync none/ x", "none/", ["x"]),
                    ("--sync ./test", "./test", []), ("--sync=test test", "test", ["test"]),
                    ("--sync", "", []), ("x", None, ["x"]), ("x --sync", None, ["x", "--sync"])):
                with self.subTest(words):
                    settings = tc.parse_with_own(["client", *words.split()])
                    given = [word for word in settings.template if word != "--"]
                    self.assertEqual((settings.sync, given), (sync, template))
            with mock.patch.dict(os.environ, TESTCLOUD="--sync --exclude a"):
                settings = tc.parse_with_own(["client", "--include", "b", "--exclude", "c", "x"])
                self.assertEqual((settings.sync, settings.filters),
                                 ("", [(True, "a"), (False, "b"), (True, "c")]))
            status, out, err = self.main("client", "--sync", "test", "-f", "{}")
            self.assertEqual((status, out), (2, ""))
            self.assertIn("a directory and a command: write --sync=test, or --sync -- test", err)
            self.assertIn("there is no such directory", self.main("client", "--sync", "none/")[2])

    def test_a_list_of_what_would_go_along(self):
        with tempfile.TemporaryDirectory() as folder:
            for path in (b"d/e", b"a\nb\xff", b"empty", b"c.o"):
                path = os.path.join(os.fsencode(folder), path)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "wb") as file:
                    file.write(b"12345")
            os.unlink(os.path.join(folder, "empty"))
            os.mkdir(os.path.join(folder, "empty"))
            os.symlink("d", os.path.join(folder, "link"))
            os.symlink("/", os.path.join(folder, "out"))
            for more in (["--sync-max", "1"], ["pytest", "{}"]):
                self.assertEqual(self.main_process(
                    "client", f"--sync={folder}", "--sync-list", "--exclude", "*.o", *more),
                    (0, "5\ta\\nb\\xff\n5\td/e\n0\tempty/\n0\tlink\n",
                     "testcloud: out is left out: this link leads out of the tree\n"))

    def test_of_equal_commands_those_in_the_joblog_are_skipped(self):
        with tempfile.TemporaryDirectory() as folder:
            argv = ["client", "--local", "--resume", "--joblog", os.path.join(folder, "log"), ":::"]
            for commands, ran in ((["true"], 1), (["true"] * 3, 2), (["true"] * 3, 0)):
                status, out, _ = self.main_process(*argv, *commands)
                self.assertEqual(status, 0)
                self.assertIn(f"Ran {tc.plural(ran, 'command')} in", out)

    def test_a_broker_without_a_key_warns_of_each_open_port(self):
        with mock.patch.multiple(
                tc, EventLoop=mock.DEFAULT, Authenticator=mock.DEFAULT, MemoryGuard=mock.DEFAULT,
                RouterLink=lambda loop, adapter, name, address, keys: mock.Mock(
                    address=address)) as fake:
            fake["EventLoop"].return_value.run.return_value = 0
            status, _, err = self.main("broker", "--insecure", "--clients", "192.0.2.1:1",
                                       "--workers", "127.0.0.1:1")
        self.assertEqual((status, err.count("ANYBODY CAN RUN COMMANDS")), (0, 1))
        self.assertIn("warning: tcp://192.0.2.1:1 needs no key", err)

    def test_a_worker_is_told_the_load_of_its_machine(self):
        loop, worker = mock.Mock(), mock.Mock()
        tc.watch_load(loop, worker)
        interval, look = loop.every.call_args.args
        self.assertEqual(interval, tc.LOAD_INTERVAL)
        for known, told in (({"return_value": (2.5, 1.0, 0.5)}, [mock.call(2.5, 7.0)]),
                            ({"side_effect": OSError}, [])):
            worker.reset_mock()
            with mock.patch.object(tc.os, "getloadavg", **known):
                look(7.0)
            self.assertEqual(worker.set_load.call_args_list, told)

    def test_a_reader_of_stdout_that_has_gone(self):
        ours, theirs = os.pipe()
        os.close(ours)
        self.addCleanup(os.close, theirs)
        done = subprocess.run([sys.executable, SCRIPT, "completion", "bash"], stdout=theirs,
                              stderr=subprocess.PIPE, timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stderr), (141, b""))

    def test_how_much_is_logged(self):
        with mock.patch.dict(tc.RUN, dict.fromkeys(tc.RUN, lambda settings: 0)), \
                mock.patch.object(tc.logging, "basicConfig") as configure:
            for argv, level in (("client", "WARNING"), ("client --quiet", "ERROR"),
                                ("client -v", "DEBUG"), ("client --quiet -v", "DEBUG"),
                                ("worker", "INFO"), ("worker -v", "DEBUG"),
                                ("completion zsh", "INFO")):
                self.assertEqual(self.main(*argv.split())[0], 0)
                self.assertEqual(configure.call_args.kwargs["level"], getattr(logging, level), argv)

    def test_exit_status_of_a_client(self):
        fine = {"empty": False, "codes": {}, "skipped_failed": 0, "wrong_hash": ""}
        for change, write_failed, status, wanted in (
                ({}, False, 0, 0), ({"codes": {"flaky": 2}}, False, 0, 1),
                ({"skipped_failed": 1}, False, 0, 1),
                ({"wrong_hash": "it differs"}, False, 0, 1), ({}, False, 3, 3),
                ({}, False, 130, 130),
                ({"codes": {"exit code 1": 1}}, True, 0, 3),
                ({"codes": {"exit code 1": 1}}, True, 1, 3), ({}, True, 130, 130),
                ({"empty": True}, False, 0, 2), ({"empty": True}, False, 130, 130),
                ({"empty": True}, True, 0, 3)):
            summary = types.SimpleNamespace(**{**fine, **change})
            self.assertEqual(tc.exit_status(summary, write_failed, status), wanted, change)

    def test_how_to_run_the_failures_again(self):
        settings = types.SimpleNamespace(joblog="l", sources=[], argv=[
            "client", "--resume", "-b", "--joblog", "l", "--resume-failed", "x", "--resume"])
        with mock.patch.object(sys, "argv", ["t.py"]):
            for change, wanted in (({}, "... | "), ({"sources": [(":::", ["a"])]}, ""),
                                   ({"joblog": None}, None)):
                vars(settings).update(change)
                self.assertEqual(tc.rerun_command(settings), "" if wanted is None else (
                    f"{wanted}python3 t.py client --resume-failed -b --joblog l -- x --resume"))

    def test_reports_that_cannot_be_written_leave_the_joblog_alone(self):
        with tempfile.TemporaryDirectory() as folder:
            log = os.path.join(folder, "log")
            text = tc.JOBLOG_HEADER + "1\t:\t1.000\t1.000\t0\t0\t0\t0\tfalse\n"
            pathlib.Path(log).write_text(text)
            for name in ("--html", "--junit"):
                status, out, err = self.main_process(
                    "client", "--local", "--joblog", log, name, "/no/such/place", ":::", "true")
                self.assertEqual((status, out), (3, ""))
                self.assertRegex(err, "^testcloud: cannot write /no/such/place: .*\n$")
            self.assertEqual(pathlib.Path(log).read_text(), text)
            status, _, err = self.main_process(
                "client", "--local", "--joblog", log, "--html", f"{folder}/./log", ":::", "true")
            self.assertEqual((status, err.count("need a file each")), (2, 1))
        nowhere = [f"--{name}={os.devnull}" for name in ("joblog", "junit", "html")]
        self.assertEqual(self.main_process("client", "--local", *nowhere, ":::", "true")[0], 0)

    def test_an_input_that_cannot_be_read_ends_the_run(self):
        status, out, err = self.main_process("client", "--local", "echo", "::::", "/")
        self.assertEqual(status, 3)
        self.assertIn("testcloud: cannot read the input: Is a directory\n", err)
        self.assertIn("Not all commands were executed", out)

    def test_a_template_begins_where_the_options_end(self):
        for words, marked in (
                ("-b pytest -q {}", "-b -- pytest -q {}"), ("-kj 4 make -j4", "-kj 4 -- make -j4"),
                ("-j4 x", "-j4 -- x"), ("--fail-fast pytest -x", "--fail-fast=1 -- pytest -x"),
                ("--fail-fast 3 x", "--fail-fast=3 -- x"), ("--fail-fast", "--fail-fast=1"),
                ("-C -b x", "-C -b -- x"), ("--cwd=/x -- -y", "--cwd=/x -- -y"), ("", ""),
                ("--env A --json echo --json", "--env A --json -- echo --json"), ("-j", "-j"),
                ("- x", "-- - x"), ("--timeout -1 -0 x", "--timeout=-1 -0 -- x"),
                ("-kj -2", "-kj-2"), ("--fail-fast -1", "--fail-fast=-1"),
                ("--fail-fast -0", "--fail-fast=1 -0")):
            self.assertEqual(tc.separate_template(words.split()), marked.split())

    def given_beats(self, own, words, **expected):
        """Parse a client's words with these options in $TESTCLOUD."""
        with mock.patch.dict(os.environ, TESTCLOUD=own):
            settings = vars(tc.parse_with_own(["client", *words.split()]))
        self.assertEqual({name: settings[name] for name in expected}, expected)

    def test_options_of_the_users_own(self):
        with mock.patch.dict(os.environ, TESTCLOUD="-b --env 'A=x y'"):
            settings = tc.parse_with_own(["client", "--retries", "2", "ls"])
            self.assertEqual((settings.brief, settings.env, settings.retries, settings.template),
                             (True, ["A=x y"], 2, ["--", "ls"]))
            self.assertFalse(hasattr(tc.parse_with_own(["worker", "-v"]), "brief"))
        self.given_beats("-k --live", "--json", live=False, json=True, keep_order=True)
        self.given_beats("-k --live", "-b", live=True, brief=True, keep_order=True)
        self.given_beats("-k --live", "ls --raw", live=True, raw=False)
        self.given_beats("--local -k", "--connect h ls", local=False, connect="h", keep_order=True)
        self.given_beats("-S a,b --via c -k", "--local", sshlogin=[], via=[], local=True)
        self.given_beats("--connect=h", "-S a", sshlogin=["a"], connect=None)
        self.given_beats("-S a -j 2", "-S b --slf f", sshlogin=["b"], sshloginfile=["f"], slots=2)
        self.given_beats("--via a", "--retries 2", via=["a"], retries=2)
        self.given_beats("-S a -j 2 --ssh s", "--connect h", slots=0, ssh=None)
        self.given_beats("-S a -j 2 --ssh s", "--local", slots=2, ssh=None)
        self.given_beats("-S a --python p --ssh s", "--local", python=None, ssh=None)
        self.given_beats("--python p --ssh s", "-S a", python="p", ssh="s")
        for wrong in ("'", "--nonsense", "a template", "-j 0"):
            with mock.patch.dict(os.environ, TESTCLOUD=wrong):
                status, _, err = self.main("client")
                self.assertEqual((status, err.count("\n")), (2, 1))
                self.assertIn("$TESTCLOUD", err)

    def test_completion(self):
        def bash(words):
            script = (self.main("completion", "bash")[1] + f"COMP_WORDS=({words}); "
                      "COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _testcloud; echo ${COMPREPLY[@]}")
            done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
            return done.stdout.split()
        self.assertEqual(bash("testcloud.py cl"), ["client"])
        self.assertEqual(bash("testcloud.py ''"), list(tc.OPTIONS))
        self.assertEqual(bash("testcloud.py client --res"), ["--resume", "--resume-failed"])
        self.assertEqual(bash("testcloud.py worker --res"), [])
        self.assertEqual(bash("testcloud.py client --junit ''"), [])  # then files are offered
        self.assertEqual(bash("testcloud.py client --color a"), ["auto", "always"])
        self.assertEqual(bash("testcloud.py keygen --role ''"), ["client", "worker"])
        self.assertEqual(bash("testcloud.py completion ''"), list(tc.SHELLS))
        self.assertEqual(bash("testcloud.py status --h"), ["--help"])
        self.assertEqual(bash("testcloud.py client -- --ju"), [])
        fish = self.main("completion", "fish")[1]
        for line in (" -s s -l slow -r -d ", " -l color -x -a 'auto always never' -d ",
                     " -s k -l keep-order -d ",
                     "'__fish_seen_subcommand_from completion' -x -a 'bash zsh fish' -d "):
            self.assertEqual(fish.count(line), 1, line)
        for shell in tc.SHELLS:
            status, text, _ = self.main("completion", shell)
            self.assertEqual(status, 0)
            self.assertIn("resume-failed", text)
            if shutil.which(shell):
                check = [shell, "--no-execute"] if shell == "fish" else [shell, "-n"]
                self.assertEqual(subprocess.run(check, input=text, text=True).returncode, 0)

    def test_a_shell_for_local_commands_and_none_for_a_dry_run(self):
        for argv, found in (
                (("--local", "--raw", "--shell", "/bin/echo", "a b", ":::", "c"),
                 (0, "-c a b c\n")),
                (("--dry-run", "--shell", "/no/such", "a b", ":::", "c"), (0, "a b c\n"))):
            done = subprocess.run([sys.executable, SCRIPT, "client", *argv], capture_output=True,
                                  text=True, timeout=PATIENCE)
            self.assertEqual((done.returncode, done.stdout), found, done.stderr)

    def test_an_option_without_its_value_takes_no_other_word(self):
        for words in ("--joblog --resume echo", "--joblog -h", "--junit --retries 3", "-C -k echo",
                      "--connect -k", "-n -- echo", "--timeout -- echo", "-C -- echo",
                      "--shell -- x"):
            with self.subTest(words):
                status, out, err = self.main("client", "--local", *words.split())
                self.assertEqual((status, out), (2, ""))
                self.assertIn("expected one argument", err)
        _, _, err = self.main("client", "--local", "-C", "", "echo")
        self.assertIn("invalid directory value: ''", err)

    def test_wrong_usage_is_one_line_and_status_2(self):
        for argv in ([], ["nonsense"], ["client", "--nonsense"], ["worker", "-j", "0"],
                     ["worker", "-j", "x"], ["worker", "--connect", "a b"],
                     ["broker", "--clients", "x:y"], ["broker", "--upstream", "x:y"],
                     ["client", "--color", "blue"], ["client", "--wait", "-1"],
                     ["worker", "-j", str(2**20 + 1)], ["broker", "--worker-expiry", "1e18"],
                     ["client", "--timeout", "1e18"], ["client", "--max-output", str(2**54)],
                     ["client", "-n", "2", ":::", "a"], ["client", "--colsep", "x", ":::", "a"],
                     ["client", "-n", "2", "--colsep", ",", "x"], ["client", "--colsep", "[", "x"],
                     ["client", "-n", "2", "x", ":::", "a", ":::", "b"], ["client", "echo", "{2}"],
                     ["client", "x", "::::"], ["client", "--colsep", "|", "x"],
                     ["worker", "--weight", "heavy"], ["worker", "--weight", "1" + "0" * 12],
                     ["worker", "--missed-oks", "0"], ["client", "--slow", "nan"],
                     ["client", "--timeout", "3x"], ["client", "--timeout", "3sm"],
                     ["client", "--timeout", "s"], ["client", "--timeout", "0"],
                     ["client", "--max-output", "0"], ["client", "--retries", "0"],
                     ["worker", "--connect", "x:0"], ["broker", "--upstream", "*"],
                     ["client", "-j", "2"], ["client", "-C", ""], ["client", "--shell", ""],
                     ["client", "--resume"], ["client", "--return", "f", "x"],
                     ["client", "--sync", "--return", ""], ["client", "--sync", "--return", "{2}"],
                     ["client", "--sync", "--fail-on-missing", "x"], ["client", "--sync=", "x"],
                     ["client", "--exclude", "x"], ["client", "--sync-max", "1G"],
                     ["client", "--sync", "--include", ""],
                     ["client", "--joblog", ""], ["client", "--connect", ""],
                     ["client", "--key", ""],
                     ["client", "--expect", ""], ["client", "--expect", "1" * 39 + "g"],
                     ["client", "--html", "a", "--junit", "./a"], ["keygen", ""],
                     ["keygen", "--revoke", ""], ["client", "--env", ""],
                     ["client", "--raw", "--json"],
                     ["worker", "--host", "a/b"], ["worker", "--host", ""],
                     ["worker", "--host", "a~2"],
                     ["client", "--expect", "1" * 41],
                     ["client", "--env", "NO_SUCH"],
                     ["client", "--env", "A=" + "x" * tc.MAX_COMMAND], ["client", "--need", ""],
                     ["worker", "--label", "a b"],
                     ["worker", "--label", "a\n"], ["client", "--timeout", "-1"],
                     ["client", "--fail-fast", "-2"], ["worker", "--label", "\u00e9"],
                     ["worker", "--max-load", "0"], ["broker", "--upstream-key", "/no/such"],
                     ["broker", "--key", "/no/such", "--insecure"], ["keygen", "--name", "x"],
                     ["keygen", "--role", "client", "--revoke", "x"],
                     ["completion", "csh"], ["client", "--fail-fast=0"]):
            status, out, err = self.main(*argv)
            self.assertEqual((status, out, err.count("\n")), (2, "", 1), (argv, err))
            self.assertTrue(err.startswith("testcloud: "), err)
            self.assertNotIn(tc.NO_COMMANDS, err)  # of an option that is taken, but should not be

    def test_a_broker_elsewhere_needs_a_key(self):
        for role in ("worker", "client", "status"):
            with mock.patch.object(tc, "find_key_file", lambda given: ""):
                status, out, err = self.main(role, "--connect", "192.0.2.1", "--wait", "0.1")
            self.assertEqual((status, out), (2, ""))
            self.assertRegex(err,
                             "^testcloud: .* is on another machine, and trusted only with a key")

    def test_version_and_help(self):
        self.assertEqual(self.main("--version")[:2], (0, f"testcloud {tc.__version__}\n"))
        status, out, _ = self.main("--help")
        self.assertEqual(status, 0)
        self.assertIn(tc.__doc__.split("\n\n")[1], out)
        for role in tc.OPTIONS:
            status, out, _ = self.main(role, "--help")
            self.assertEqual(status, 0)
            rows = out.splitlines()
            self.assertTrue(len(rows) <= 64 and max(map(len, rows)) <= 80, role)  # a large screen
            if role == "client":
                begins = ["testcloud.py client" in row for row in rows[:4]]
                self.assertEqual(begins, [True] * 3 + [False])

    def test_colour(self):
        with mock.patch.object(sys, "stdout", mock.Mock(isatty=lambda: True)):
            with mock.patch.dict(os.environ, {"NO_COLOR": "1"}):
                self.assertFalse(tc.use_colour("auto"))
                self.assertTrue(tc.use_colour("always"))
            with mock.patch.dict(os.environ, {"NO_COLOR": ""}):
                self.assertTrue(tc.use_colour("auto"))
                self.assertFalse(tc.use_colour("never"))


# === Real processes ===================================================================
#
# Every test has a cloud of its own: processes on loopback, ports chosen by the system,
# all of them ended (by their process id) when the test is over.


class Cloud:
    """Processes of testcloud, and raw sockets beside them."""

    def __init__(self, test, script=SCRIPT):
        self.test = test
        self.script = script
        self.dir = tempfile.mkdtemp(prefix="testcloud-")
        test.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.processes = []
        self.context = None  # of the raw sockets
        test.addCleanup(self.end)

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
                process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
        end = time.monotonic() + PATIENCE
        while self.left_behind() and time.monotonic() < end:
            time.sleep(0.01)
        self.test.assertFalse(self.left_behind(), "processes that were left behind")

    def left_behind(self):
        """The pids of what runs in our directory."""
        found = []
        for entry in os.listdir("/proc") if os.path.exists("/proc/self/cwd") else ():
            with contextlib.suppress(OSError):
                if entry.isdigit() and os.readlink(f"/proc/{entry}/cwd") == self.dir:
                    found.append(entry)
        return found

    def start(self, *argv, **more):
        log = open(os.path.join(self.dir, f"log-{len(self.processes)}"), "wb")  # noqa: SIM115
        with log:
            process = subprocess.Popen([sys.executable, self.script, *argv], cwd=self.dir,
                                       stdout=subprocess.PIPE, stderr=log, **more)
        process.log = log.name
        self.processes.append(process)
        return process

    def err(self, process):
        with open(process.log) as file:
            return file.read()

    def wait_for(self, condition, what):
        end = time.monotonic() + PATIENCE
        while not condition():
            self.test.assertLess(time.monotonic(), end, f"{what} did not happen: "
                                 + "; ".join(self.err(p)[-300:] for p in self.processes))
            time.sleep(0.01)

    def wait_for_log(self, process, text):
        self.wait_for(lambda: text in self.err(process), repr(text))

    def broker(self, clients="127.0.0.1:0", workers="127.0.0.1:0", *more, **settings):
        process = self.start("broker", "--clients", clients, "--workers", workers, *more,
                             **settings)
        lines = [process.stdout.readline().decode() for _ in range(2)]
        self.test.assertRegex(lines[0], "^Listening for clients on tcp://127.0.0.1:[0-9]+$")
        self.test.assertRegex(lines[1], "^Listening for workers on tcp://127.0.0.1:[0-9]+$")
        process.clients, process.workers = (line.split()[-1] for line in lines)
        return process

    def worker(self, broker, *more, **settings):
        return self.start("worker", "--connect", getattr(broker, "workers", broker), *more,
                          **settings)

    def inner(self, process):
        """The pid of the process that does the work, below its supervisor."""
        pids = []
        self.wait_for(lambda: pids.append(children_of(process.pid)) or pids[-1], "a child")
        return pids[-1][0]

    def client(self, broker, commands, *more, wait=True):
        process = self.start("client", "--connect", getattr(broker, "clients", broker), *more,
                             stdin=subprocess.PIPE)
        if commands is not None:
            process.stdin.write("".join(f"{c}\n" for c in commands).encode())
            process.stdin.close()
            process.stdin = None
        return self.finish(process) if wait else process

    def finish(self, process):
        out, _ = process.communicate(timeout=PATIENCE * 2)
        return process.returncode, out.decode("utf-8", "surrogateescape")

    def dealer(self, address=None, identity=None):
        import zmq
        if self.context is None:
            self.context = zmq.Context()
            self.context.set(zmq.MAX_SOCKETS, 10_000)
            self.test.addCleanup(self.context.term)
        sock = self.context.socket(zmq.DEALER)
        if identity:
            sock.setsockopt(zmq.ROUTING_ID, identity)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        if address:
            sock.connect(address)
        self.test.addCleanup(sock.close, 0)
        return sock


def children_of(pid):
    return [int(n) for n in tc.read_text(f"/proc/{pid}/task/{pid}/children").split()]


def is_alive(pid):
    """Whether there is such a process, and it is no zombie."""
    state = tc.read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return bool(state) and state[0] != "Z"


def peak_memory(pid):
    """KiB that a process has needed so far, 0 if nobody can tell."""
    found = re.search(r"VmHWM:\s+(\d+)", tc.read_text(f"/proc/{pid}/status"))
    return int(found[1]) if found else 0


def cpu_ticks(pid):
    """What a process has had of the processor so far, in hundredths of a second as a rule."""
    fields = tc.read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def once_each(path, count):
    """A file in which each command has written its number: none twice, none missing."""
    return not wrong_times(path, count)


def wrong_times(path, count):
    """Of the numbers that commands have written to a file, those not there once: how often."""
    times = Counter(tc.read_text(path).split())
    wanted = [str(n) for n in range(1, count + 1)]
    return {n: times[n] for n in {*times, *wanted} if times[n] != 1 or n not in wanted}

def descendants_of(pid):
    return [one for child in children_of(pid) for one in (child, *descendants_of(child))]


def read_bytes(path):
    """What is in a file, nothing if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def pids_with(variable):
    """The processes with this NAME=VALUE in their environment, the oldest first as a rule."""
    found = f"\0{variable}".encode()
    return [pid for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
            if found in b"\0" + read_bytes(f"/proc/{pid}/environ") and is_alive(pid)]


class Hosts:
    """Hosts of a script that stands for ssh: login shells on this machine, each with an empty
    environment and an empty home. `ssh` is the command for --ssh, `via(name)` the one for --via."""

    # argv: the directory of the hosts, then what ssh or a container's exec gets
    SCRIPT = r'''
import getopt, json, os, subprocess, sys, threading

def stop(text, status=255):
    sys.stderr.write(text)
    sys.stderr.flush()
    os._exit(status)

def move(source, target):
    try:
        while True:
            data = os.read(source, 65536)
            if not data:
                return os.close(target)
            while data:
                data = data[os.write(target, data):]
    except OSError:
        if target < 3:
            os._exit(255)  # our reader has left: so do we, and the shell gets EOF
        os.close(target)

hosts, *argv = sys.argv[1:]
via = argv[0] == "--via"
argv = argv[1:] if via else getopt.getopt(
    argv, "46AaCfGgKkMNnqsTtVvXxYyB:b:c:D:E:e:F:I:i:J:L:l:m:O:o:p:Q:R:S:W:w:")[1]
name = argv.pop(0).rpartition("@")[2]
if argv and argv[0] == "--":
    del argv[0]
try:
    with open(os.path.join(hosts, name, "settings")) as file:
        host = json.load(file)
except OSError:
    stop(f"ssh: Could not resolve hostname {name}: Name or service not known\r\n")
for login in range(1, 100_000):
    try:
        with open(os.path.join(hosts, name, f"login-{login}"), "x") as file:
            json.dump(sys.argv[2:], file)
        break
    except FileExistsError:
        pass
if login <= host["refusals"]:
    stop(host["refusal"])
env = {"HOME": host["home"], "SHELL": host["shell"], "SSH_CONNECTION": "127.0.0.1 1 127.0.0.1 2",
       "PATH": host["path"], "USER": "somebody", "LOGNAME": "somebody",
       "TEST_HOST": os.path.join(hosts, name), **host["env"]}
shell = argv if via else [host["shell"], "-c", " ".join(argv)]
for out in (sys.stdout, sys.stderr):
    out.write(host["noise"])
    out.flush()
child = subprocess.Popen(shell, env=env, start_new_session=True, stdin=-1, stdout=-1, stderr=-1,
                         cwd=host["home"] if os.path.isdir(host["home"]) else "/", bufsize=0)
pairs = ((0, child.stdin), (child.stdout, 1), (child.stderr, 2))
number = lambda file: file if isinstance(file, int) else os.dup(file.fileno())
threads = [threading.Thread(target=move, args=(number(a), number(b)), daemon=True)
           for a, b in pairs]
for file in (child.stdin, child.stdout, child.stderr):
    file.close()
for thread in threads:
    thread.start()
for thread in threads[1:]:
    thread.join()
status = child.wait()
os._exit(255 if status < 0 else status)
'''
    # what is found there beside python3: the PATH of a login without a terminal is short
    TOOLS = ("cat", "env", "grep", "head", "hostname", "ls", "nice", "sed", "seq", "setsid", "sh",
             "sleep", "touch", "tr", "wc")
    OLD_PYTHON = """
import sys
sys.version_info, sys.hexversion = (3, 6, 9, "final", 0), 0x030609F0
sys.version = "3.6.9 (old)"
at = next((n for n, arg in enumerate(sys.argv) if n and arg.endswith("c")), None)
if at is None:
    sys.exit(print("Python 3.6.9"))
code, sys.argv = sys.argv[at + 1], ["-c", *sys.argv[at + 2:]]
exec(compile(code, "<string>", "exec"))
"""

    def __init__(self, cloud, *names):
        self.dir = os.path.join(cloud.dir, "hosts")
        os.mkdir(self.dir)
        self.script = self.write("ssh.py", self.SCRIPT)
        self.ssh = shlex.join([sys.executable, "-IS", self.script, self.dir])
        self.tools = os.path.join(self.dir, "tools")
        os.mkdir(self.tools)
        for tool in self.TOOLS:
            os.symlink(shutil.which(tool), os.path.join(self.tools, tool))
        for name in names:
            self.add(name)

    def write(self, name, text):
        path = os.path.join(self.dir, name)
        with open(path, "w") as file:
            file.write(text)
        os.chmod(path, 0o755)
        return path

    def add(self, name, *, shell="/bin/sh", noise="", refusal="", refusals=None, home=None,
            python=f'exec {shlex.quote(sys.executable)} "$@"', **env):
        """A host. With a `refusal` ssh says only this, the first so many times."""
        for kind in ("bin", "home"):
            os.makedirs(os.path.join(self.dir, name, kind), exist_ok=True)
        if python:
            self.write(f"{name}/bin/python3", f"#!/bin/sh\n{python}\n")
        self.write(f"{name}/settings", json.dumps({
            "shell": shell, "noise": noise, "env": env, "refusal": refusal,
            "refusals": refusals if refusals is not None else 100_000 * bool(refusal),
            "home": home or self.home(name), "path": f"{self.dir}/{name}/bin:{self.tools}"}))

    def home(self, name):
        return os.path.join(self.dir, name, "home")

    def old_python(self):
        return (f"exec {shlex.quote(sys.executable)} -I "
                f'{shlex.quote(self.write("old.py", self.OLD_PYTHON))} "$@"')

    def via(self, name):
        return f"{self.ssh} --via {name}"

    def logins(self, name):
        """The arguments of ssh at each login."""
        paths = sorted(pathlib.Path(self.dir, name).glob("login-*"))
        return [json.loads(path.read_text()) for path in paths]

    def pids(self, name):
        """What runs there now, the first process first."""
        return pids_with(f"TEST_HOST={self.dir}/{name}\0")


class Sshd:
    """A real sshd on loopback with keys and configurations of its own. All its hosts are this
    machine. `ssh` is the command for --ssh."""

    PROGRAMS = [shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
                for name in ("sshd", "ssh", "ssh-keygen")]

    def __init__(self, cloud, names):
        self.cloud = cloud
        self.dir = os.path.join(cloud.dir, "sshd")
        os.mkdir(self.dir)
        if os.geteuid() == 0:
            os.makedirs("/run/sshd", 0o755, exist_ok=True)  # it insists
        for key in ("host_key", "key"):
            subprocess.run([self.PROGRAMS[2], "-q", "-t", "ed25519", "-N", "", "-f",
                            self.path(key)], check=True)
        shutil.copy(self.path("key.pub"), self.path("authorized_keys"))
        with socket.socket() as reserved:  # bound and not listening: sshd may still bind it
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
            self.port = reserved.getsockname()[1]
            # only root and PAM can see that our account is not locked
            self.write("sshd_config", ListenAddress="127.0.0.1", Port=self.port,
                       UsePAM="yes" if os.geteuid() else "no", PidFile="none", StrictModes="no",
                       HostKey=self.path("host_key"),
                       AuthorizedKeysFile=self.path("authorized_keys"),
                       PermitRootLogin="yes", PasswordAuthentication="no", AcceptEnv="TEST_HOST",
                       SetEnv=f"HOME={self.path('home')}", MaxStartups="10")
            self.start()
        os.mkdir(self.path("home"))
        with open(self.path("known_hosts"), "w") as file:  # of the second host we know another key
            for name, key in (("sshd", "host_key.pub"), ("changed", "key.pub")):
                file.write(f"{name} {' '.join(tc.read_text(self.path(key)).split()[:2])}\n")
        self.configure(names)
        self.ssh = shlex.join([self.PROGRAMS[1], "-F", self.path("config")])

    def configure(self, names, more={}, **settings):
        """Let ssh know these hosts with these settings, and others with `more`."""
        open(self.path("config"), "w").close()
        for name in (*names, *more):
            self.write("config", "a", Host=name, SetEnv=f"TEST_HOST={self.dir}/{name}",
                       **more.get(name, {}))
        self.write("config", "a", Host="*", HostName="127.0.0.1", Port=self.port,
                   HostKeyAlias="sshd", IdentityFile=self.path("key"), IdentitiesOnly="yes",
                   UserKnownHostsFile=self.path("known_hosts"), GlobalKnownHostsFile="/dev/null",
                   **settings)

    def path(self, name):
        return os.path.join(self.dir, name)

    def write(self, name, mode="w", **settings):
        with open(self.path(name), mode) as file:
            file.writelines(f"{key} {value}\n" for key, value in settings.items())

    def start(self):
        with open(self.path("log"), "w") as log:
            self.process = subprocess.Popen([self.PROGRAMS[0], "-D", "-e", "-f",
                                             self.path("sshd_config")], stderr=log,
                                            stdin=subprocess.DEVNULL)
        self.cloud.processes.append(self.process)
        self.process.log = self.path("log")
        self.cloud.wait_for_log(self.process, "Server listening")

    def pids(self, name):
        return pids_with(f"TEST_HOST={self.dir}/{name}\0")

    def session(self, name):
        """The pid of sshd's process for the first login of a host."""
        return int(tc.read_text(f"/proc/{self.pids(name)[0]}/stat").rpartition(")")[2].split()[1])


class ProcessesTest(unittest.TestCase):
    def setUp(self):
        self.cloud = Cloud(self)

    def test_the_example_of_the_seed(self):
        shutil.copy(os.path.join(HERE, "pi.py"), self.cloud.dir)
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        commands = [f"{sys.executable} ./pi.py {n}" for n in range(1, 6)]
        status, out = self.cloud.client(broker, commands)
        self.assertEqual(status, 0, out)
        lines = out.splitlines()
        self.assertEqual(lines[0], f"Connecting to {broker.clients}")
        self.assertEqual(lines[1], "Releasing the hounds: 5 commands to execute")
        blocks = out.split("\n", 2)[2].split("\n\n")
        self.assertEqual(len(blocks), 6)
        got = {}
        for block in blocks[:5]:
            head, output = block.split("\n")
            cmd = re.fullmatch(r"OK! (.*) ⌚\d+\.\d\dms", head).group(1)
            got[cmd] = output
        self.assertEqual(got, dict(zip(commands, SEED_OUTPUTS)))
        wanted = naive_hash([(c.encode(), 0, o.encode() + b"\n") for c, o in got.items()])
        self.assertRegex(blocks[5], "^All commands successfully executed ☃\n"
                         f"Ran 5 commands in ⌚[0-9.]+s, result hash is {wanted}\n$")

    def test_pi(self):
        def pi(*args, **more):
            return subprocess.run([sys.executable, os.path.join(HERE, "pi.py"), *args],
                                  stderr=subprocess.PIPE, **more)
        for n, wanted in enumerate(SEED_OUTPUTS, 1):
            self.assertEqual(pi(str(n), stdout=subprocess.PIPE).stdout.decode(), wanted + "\n")
        for args in ((), ("0",), ("-1",), ("x",), ("1", "2"), ("9" * 10,)):
            done = pi(*args, stdout=subprocess.PIPE)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count(b"\n")), (2, b"", 1))
        if os.path.exists("/dev/full"):
            with open("/dev/full", "wb") as full:
                done = pi("5", stdout=full)
            self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1))

    def test_locally(self):
        status, out = self.cloud.finish(self.local(["echo a", "exit 3", "pwd"], "-b"))
        self.assertEqual(status, 1)
        self.assertIn("FAIL(3) exit 3 ⌚", out)
        self.assertIn("Some commands failed :(\n1 of 3 commands failed: 1 with exit code 3\n"
                      "  FAIL(3) exit 3\nRan 3 commands in", out)

    def local(self, commands, *options, **more):
        process = self.cloud.start("client", "--local", *options, stdin=subprocess.PIPE, **more)
        process.stdin.write("".join(f"{c}\n" for c in commands).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def test_local_mode_needs_no_pyzmq(self):
        env = dict(os.environ, PYTHONPATH=self.cloud.dir)
        with open(os.path.join(self.cloud.dir, "zmq.py"), "w") as file:
            file.write("raise ImportError('not here')")
        self.cloud.script = shutil.copy(SCRIPT, self.cloud.dir)  # where no .venv is that has it
        status, _ = self.cloud.finish(self.local(["true"], env=env))
        self.assertEqual(status, 0)
        broker = self.cloud.start("broker", env=env)
        self.assertEqual(broker.wait(PATIENCE), 3)
        self.assertRegex(self.cloud.err(broker), "^testcloud: .*pip install pyzmq.*\n$")

    def shadow(self, *names):
        """Put files beside a copy of the program that are called as these modules."""
        self.cloud.script = shutil.copy(SCRIPT, self.cloud.dir)
        for name in names:
            pathlib.Path(self.cloud.dir, name + ".py").write_text("raise SystemExit('shadowed')\n")
        return functools.partial(subprocess.run, cwd=self.cloud.dir, capture_output=True, text=True,
                                 timeout=PATIENCE)

    def test_files_beside_the_script_may_be_called_as_modules_of_python(self):
        library = sysconfig.get_paths()["stdlib"]
        files = [*os.listdir(library), *os.listdir(os.path.join(library, "lib-dynload"))]
        # Python itself imports __future__ for our first line, whatever we do about its path
        names = {name.split(".")[0] for name in files} - {"__future__"}
        run = self.shadow(*filter(str.isidentifier, names))
        broker = self.cloud.broker()
        self.cloud.worker(broker)
        html = os.path.join(self.cloud.dir, "report.html")
        status, out = self.cloud.client(broker, ["echo a"], "--html", html, "--junit",
                                        html + ".xml")
        self.assertEqual((status, "Ran 1 command" in out), (0, True), out)
        self.assertNotIn("shadowed", "".join(map(self.cloud.err, self.cloud.processes)))
        shutil.copy(os.path.join(HERE, "test_testcloud.py"), self.cloud.dir)
        for argv in (["testcloud.py", "client", "--local", "--allow-empty"],
                     ["testcloud.py", "keygen"],
                     ["test_testcloud.py", "MessagesTest"]):
            done = run([sys.executable, *argv], stdin=subprocess.DEVNULL)
            self.assertEqual(done.returncode, 0, (argv, done.stdout, done.stderr))

    def test_our_place_in_the_path_is_left_alone_unless_it_is_ours(self):
        run = self.shadow("argparse", "json", "queue", "socket")
        done = run([sys.executable, "-m", "testcloud", "--version"])
        self.assertEqual((done.stdout, done.stderr), (f"testcloud {tc.__version__}\n", ""))
        done = run([sys.executable, "-c", "import sys; path = sys.path; path.append(path.pop(0)); "
                    "old = [*path]; import testcloud; sys.exit(old != path or path[-1] != '')"])
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        if sys.version_info >= (3, 11):  # then the first place may be one of the user's
            pathlib.Path(self.cloud.dir, "first").mkdir()
            pathlib.Path(self.cloud.dir, "first", "zmq.py").write_text("raise SystemExit('mine')\n")
            done = run([sys.executable, "-P", "testcloud.py", "broker"],
                       env={**os.environ, "PYTHONPATH": os.path.join(self.cloud.dir, "first")})
            self.assertEqual(done.stderr, "mine\n")

    def test_templates_cwd_blank_lines_and_odd_bytes(self):
        process = self.local(["a b", "", "   ", "it's"], "-j", "1", "-C", "/",
                             "printf '%s|' {}; pwd #")
        status, out = self.cloud.finish(process)
        self.assertEqual(status, 0)
        self.assertIn("\na b|/\n", out)
        self.assertIn("\nit's|/\n", out)
        self.assertIn("Ran 2 commands", out)

    def test_missing_directory_is_a_failed_command(self):
        status, out = self.cloud.finish(self.local(["true"], "-C", "/no/such/place"))
        self.assertEqual(status, 1)
        self.assertRegex(out, "FAIL\\(126\\) true .*\n"
                         "testcloud: cannot enter directory /no/such/place: ")

    def test_first_command_runs_before_the_input_ends(self):
        for broker in (None, self.cloud.broker()):
            if broker is None:
                process = self.cloud.start("client", "--local", stdin=subprocess.PIPE)
            else:
                self.cloud.worker(broker)
                process = self.cloud.client(broker, None, wait=False)
            process.stdin.write(b"echo first\n")
            process.stdin.flush()
            lines = [process.stdout.readline() for _ in range(4)]
            self.assertEqual(lines[1], b"Releasing the hounds: commands to execute as they come\n")
            self.assertEqual(lines[3], b"first\n")
            process.stdin.write(b"echo second")
            status, out = self.cloud.finish(process)
            self.assertEqual(status, 0)
            self.assertIn("second\n\nAll commands", out)

    def test_two_thousand_commands_over_three_workers(self):
        broker = self.cloud.broker()
        workers = [self.cloud.worker(broker, "-j", "2") for _ in range(3)]
        for worker in workers:
            self.cloud.wait_for_log(worker, "joined")
        commands = [f"echo $((7 * {n}))" for n in range(2000)]
        status, out = self.cloud.client(broker, commands)
        self.assertEqual(status, 0)
        found = re.findall(r"OK! echo \$\(\(7 \* (\d+)\)\) ⌚[\d.]+ms\n(\d+)\n\n", out)
        self.assertEqual(sorted((int(n), int(x)) for n, x in found),
                         [(n, 7 * n) for n in range(2000)])
        wanted = naive_hash([(c.encode(), 0, b"%d\n" % (7 * n)) for n, c in enumerate(commands)])
        self.assertIn(f"Ran 2000 commands in ⌚{out.rsplit('⌚', 1)[1].split('s,')[0]}s, "
                      f"result hash is {wanted}\n", out)

    def test_worker_and_client_before_the_broker(self):
        probe = socket.socket()
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]  # nobody listens there yet
        probe.close()
        clients = f"ipc://{self.cloud.dir}/clients"
        worker = self.cloud.worker(f"tcp://127.0.0.1:{port}")
        client = self.cloud.client(clients, ["echo x"], wait=False)
        for process in (worker, client):
            self.cloud.wait_for_log(process, "waiting: no broker at")
        self.cloud.start("broker", "--clients", clients, "--workers", f"127.0.0.1:{port}")
        self.assertEqual(self.cloud.finish(client)[0], 0)
        self.assertEqual(self.cloud.err(client).count("waiting: no broker"), 1)
        self.assertIn("the wait is over", self.cloud.err(client))

    def test_without_worker_the_client_says_so_and_gives_up(self):
        broker = self.cloud.broker()
        client = self.cloud.client(broker, ["echo x"], "--wait", "1.5", wait=False)
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 3)
        err = self.cloud.err(client)
        self.assertIn("has no worker (yet); start one with: testcloud.py worker", err)
        self.assertIn("gave up", err)
        self.assertNotIn("is over", err)
        self.assertIn("Not all commands were executed :(\nRan 0 commands in", out)

    def test_the_wrong_port_is_named_once(self):
        broker = self.cloud.broker()
        client = self.cloud.client(broker.workers, ["true"], "--ready-interval", "0.1", "--wait",
                                   "1.5",
                                   wait=False)
        self.assertEqual(self.cloud.finish(client)[0], 3)
        err = self.cloud.err(client)
        self.assertIn("is that the port for clients?", err)
        self.assertEqual(err.count("port for clients?"),
                         2)  # when it began, and when it was given up
        self.assertNotIn("complains", err)

    def test_broker_killed_and_restarted_runs_nothing_twice(self):
        broker = self.cloud.broker()
        for _ in range(2):
            self.cloud.worker(broker, "-j", "2")
        done = os.path.join(self.cloud.dir, "done")
        commands = [f"sleep 0.0{n % 10}; echo {n} >> {done}; echo out {n}" for n in range(1, 301)]
        client = self.cloud.client(broker, commands, wait=False)
        for at in (50, 150):
            self.cloud.wait_for(lambda at=at: os.path.exists(done)
                                and os.path.getsize(done) > 4 * at, f"{at} commands")
            broker.kill()
            broker.wait()
            broker = self.cloud.broker(broker.clients[6:], broker.workers[6:])
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 0)
        self.assertEqual(sorted(map(int, re.findall(r"^out (\d+)$", out, re.M))),
                         list(range(1, 301)))
        self.assertTrue(once_each(done, 300))

    def test_after_each_of_many_restarts_of_the_broker_the_worker_goes_on(self):
        soon = ("--ready-interval", "0.2")
        broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", *soon)
        self.cloud.worker(broker, "-j", "1", *soon)
        for _ in range(10):
            self.assertEqual(self.cloud.client(broker, ["true"], *soon)[0], 0)
            places = broker.clients, broker.workers
            broker.kill()
            broker.wait()
            broker = self.cloud.broker(*places, *soon)

    def test_a_stopped_client_under_a_flood_disturbs_nobody_and_gets_all_in_the_end(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        stopped = self.cloud.client(broker, ["seq 20000"] * 300, "-b", wait=False)
        stopped.stdout.readline()
        stopped.send_signal(signal.SIGSTOP)
        self.assertEqual(self.cloud.client(broker, ["true"] * 50)[0], 0)
        stopped.send_signal(signal.SIGCONT)
        status, out = self.cloud.finish(stopped)
        self.assertEqual((status, out.count("OK! ")), (0, 300))
        self.assertLess(peak_memory(broker.pid), 150 * 1024)

    def test_commands_that_kill_themselves_are_all_reported(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        status, out = self.cloud.client(broker, ["kill -9 $$"] * 2000, "-b")
        self.assertEqual((status, out.count("\nFAIL(137) ")), (1, 2000))
        self.assertIn("\n2000 of 2000 commands failed: 2000 with exit code 137\n", out)
        self.assertEqual(out.count("\n  FAIL(137) "), tc.NAMED_FAILURES)

    @unittest.skipUnless(os.path.exists("/proc/self/stat"), "not Linux")
    def test_the_death_of_peers_costs_those_that_stay_nothing(self):
        broker = self.cloud.broker()
        worker, gone = (self.cloud.worker(broker, "-j", "2") for _ in range(2))
        up = os.path.join(self.cloud.dir, "up")
        client = self.cloud.client(broker, [f"echo x >> {up}; sleep 1000"] * 9, wait=False)
        self.cloud.wait_for(lambda: len(tc.read_text(up)) == 8, "the start of four commands")
        for process in (gone, client):
            process.kill()
        self.cloud.wait_for_log(broker, "is gone")
        pids = (broker.pid, worker.pid, self.cloud.inner(worker))
        before = sum(map(cpu_ticks, pids))
        end = time.monotonic() + 1.5  # a span to measure, not to wait for anything
        while time.monotonic() < end:
            time.sleep(0.1)
        self.assertLess(sum(map(cpu_ticks, pids)) - before, 15)  # of some 150 if one of them spins

    def test_a_broker_that_was_stopped_runs_nothing_twice(self):
        """However long after its deadlines: those whom it could not hear were not silent."""
        broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--worker-expiry", "1",
                                   "--queued-timeout", "1", "--lost-grace", "0.2")
        worker = self.cloud.worker(broker, "-j", "2", "--ready-interval", "0.2")
        self.cloud.wait_for_log(worker, "joined")
        up = os.path.join(self.cloud.dir, "up")
        client = self.cloud.client(broker, [f"echo {n} >> {up}; sleep 0.3" for n in range(1, 21)],
                                   "--ready-interval", "0.2", wait=False)
        self.cloud.wait_for(lambda: tc.read_text(up), "a start")
        for after in (1.05, 2.5, 0.95):
            broker.send_signal(signal.SIGSTOP)
            silent = time.monotonic() + after  # a span to be silent for
            while time.monotonic() < silent:
                time.sleep(0.01)
            broker.send_signal(signal.SIGCONT)
            self.cloud.wait_for(lambda before=tc.read_text(up): tc.read_text(up) != before
                                or client.poll() is not None, "another start")
        self.assertEqual(self.cloud.finish(client)[0], 0)
        self.assertEqual(wrong_times(up, 20), {})

    def test_a_busy_worker_is_not_taken_for_dead(self):
        broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--worker-expiry", "1.5")
        self.cloud.worker(broker, "-j", "16")
        up = os.path.join(self.cloud.dir, "up")
        spin = "timeout 3 sh -c 'while :; do :; done'"
        status, out = self.cloud.client(broker, [f"echo {n} >> {up}; {spin}" for n in range(1, 17)])
        self.assertEqual((status, out.count("\nFAIL(124) ")), (1, 16))
        self.assertEqual(wrong_times(up, 16), {})
        self.assertNotIn("silent", self.cloud.err(broker))

    def test_a_second_worker_joins_in_the_middle(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "1")
        client = self.cloud.client(broker, ["echo $PPID; sleep 0.05"] * 40, "-v", wait=False)
        self.cloud.wait_for(lambda: "ran on" in self.cloud.err(client), "a result")
        second = self.cloud.worker(broker, "-j", "1")
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 0)
        self.assertIn(f"\n{self.cloud.inner(second)}\n", out)

    def test_killed_worker_is_replaced(self):
        broker = self.cloud.broker()
        first = self.cloud.worker(broker, "-j", "1")
        self.cloud.wait_for_log(first, "joined")
        started = os.path.join(self.cloud.dir, "started")
        client = self.cloud.client(broker, [f"echo x >> {started}; echo $PPID; sleep 0.5"],
                                   wait=False)
        self.cloud.wait_for(lambda: os.path.exists(started), "the start")
        second = self.cloud.worker(broker, "-j", "1")
        first.kill()
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 0)
        self.assertIn(f"\n{self.cloud.inner(second)}\n", out)

    def test_stopped_worker_does_not_confirm_and_is_bypassed(self):
        broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--queued-timeout", "0.5")
        first = self.cloud.worker(broker, "-j", "1", "--weight", "5")
        self.cloud.wait_for_log(first, "joined")
        second = self.cloud.worker(broker, "-j", "1")
        self.cloud.wait_for_log(second, "joined")
        os.kill(self.cloud.inner(first), signal.SIGSTOP)
        status, out = self.cloud.client(broker, ["echo $PPID"])
        os.kill(self.cloud.inner(first), signal.SIGCONT)
        self.assertEqual(status, 0)
        self.assertIn(f"\n{self.cloud.inner(second)}\n", out)

    def test_frozen_connection_gets_a_new_socket(self):
        broker = self.cloud.broker()
        proxy = Proxy(broker.workers)
        self.addCleanup(proxy.close)
        worker = self.cloud.worker(proxy.address, "-j", "1", "--ready-interval", "0.2",
                                   "--missed-oks", "2")
        self.cloud.wait_for_log(worker, "joined")
        proxy.swallow()
        self.cloud.wait_for(lambda: self.cloud.err(worker).count("joined") > 1, "a new connection")
        self.assertEqual(self.cloud.client(broker, ["true"])[0], 0)

    def test_large_and_binary_outputs_arrive_whole(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        size = 20_000_000
        commands = [f"head -c {size} /dev/zero | tr '\\0' {c}; printf '\\377'" for c in "abc"]
        process = self.cloud.client(broker, commands, wait=False)
        out, _ = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0)
        for c in b"abc":
            self.assertIn(bytes([c]) * size + b"\xff\n\n", out)

    def test_interrupted_client_stops_its_commands(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143),
                               (signal.SIGUSR1, 128 + signal.SIGUSR1)):
            pids = os.path.join(self.cloud.dir, f"pids-{status}")
            client = self.cloud.client(broker, [f"echo $$ >> {pids}; exec sleep 1000"] * 5,
                                       wait=False)
            self.cloud.wait_for(lambda pids=pids: len(tc.read_text(pids).split()) == 2,
                                "two starts")
            client.send_signal(number)
            code, out = self.cloud.finish(client)
            self.assertEqual(code, status)
            self.assertIn("Not all commands were executed :(\nRan 0 commands in", out)
            self.assertIn("interrupted: 0 commands reported, 2 stopped, 3 never ran",
                          self.cloud.err(client))
            with open(pids) as file:
                for pid in file.read().split():
                    self.cloud.wait_for(lambda pid=pid: not os.path.exists(f"/proc/{pid}"), "end")

    def test_commands_of_a_nice_worker(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "--nice", "7", "-j", "1")
        status, out = self.cloud.client(broker, ["nice"], "--raw")
        self.assertEqual((status, int(out)), (0, min(19, os.nice(0) + 7)))

    def test_a_run_that_stops_before_its_input_ends_is_not_complete(self):
        client = self.cloud.start("client", "--local", "--fail-fast", stdin=subprocess.PIPE)
        client.stdin.write(b"false\n")
        client.stdin.flush()
        self.assertEqual(client.wait(PATIENCE), 1)
        self.assertIn("Not all commands were executed", client.stdout.read().decode())
        self.assertIn("stopped early: 1 command reported, 0 stopped, 0 never ran\n",
                      self.cloud.err(client))

    def test_stopped_worker_leaves_no_process_and_hands_its_commands_back(self):
        broker = self.cloud.broker()
        worker = self.cloud.worker(broker, "-j", "1")
        pids = os.path.join(self.cloud.dir, "pids")
        client = self.cloud.client(
            broker, [f"test -e ok && exit; echo $$ >> {pids}; exec sleep 1000", "true"], wait=False)
        self.cloud.wait_for(lambda: tc.read_text(pids).endswith("\n"), "a start")
        open(os.path.join(self.cloud.dir, "ok"), "w").close()
        worker.terminate()
        self.assertEqual(worker.wait(PATIENCE), 143)
        with open(pids) as file:
            self.assertFalse(os.path.exists(f"/proc/{file.read().strip()}"))
        self.cloud.worker(broker, "-j", "1")
        self.assertEqual(self.cloud.finish(client)[0], 0)

    def test_a_stdin_that_does_not_block_is_waited_for(self):
        theirs, ours = os.pipe()
        os.set_blocking(theirs, False)
        with open(ours, "w") as ours:
            process = self.cloud.start("client", "--local", stdin=theirs)
            os.close(theirs)
            for line in ("\ufeffecho a", "exit 3"):  # such a mark is no part of the command
                ours.write(line + "\n")
                ours.flush()
                for found in iter(process.stdout.readline, b""):
                    if found.startswith((b"OK! echo a ", b"FAIL(3) exit 3 ")):
                        break
        self.assertEqual(self.cloud.finish(process)[0], 1)

    def test_streams_that_do_not_block_are_waited_for(self):
        """As ssh makes them, in the background of the same terminal or pipe."""
        numbers = b"".join(b"%d\n" % n for n in range(1, 30001))
        for options, command, wanted in (
                (["--raw"], "seq 30000; seq 30000 >&2", numbers),
                (["--dry-run"], "\n".join(["true"] * 30000), b"true\n" * 30000),
                (["--junit", "/dev/stdout"], "\n".join(["seq 9000; exit 1"] * 9),
                 b"</testsuites>")):
            (out, theirs), (err, theirs_too) = pipes = os.pipe(), os.pipe()
            for file in (theirs, theirs_too):
                os.set_blocking(file, False)
            process = subprocess.Popen(
                [sys.executable, SCRIPT, "client", "--local", "-j", "1", *options],
                stdin=subprocess.PIPE, stdout=theirs, stderr=theirs_too, cwd=self.cloud.dir)
            self.cloud.processes.append(process)
            process.stdin.write(command.encode() + b"\n")
            process.stdin.close()
            wait_until_full(theirs)
            if options == ["--raw"]:
                wait_until_full(theirs_too)
            for _, file in pipes:
                os.close(file)
            with open(out, "rb") as out, open(err, "rb") as err, \
                    concurrent.futures.ThreadPoolExecutor() as pool:
                out, err = pool.map(lambda file: file.read(), (out, err))
            self.assertEqual((process.wait(PATIENCE), wanted in out),
                             ("--junit" in options, True), (options, out[-99:], err[-99:]))
            if options == ["--raw"]:
                self.assertIn(numbers, err)

    def test_lines_for_a_stderr_that_does_not_block(self):
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        program = ("import sys, testcloud as tc; tc.make_blocking('stderr'); "
                   "[tc.print_notice('x' * 999) for _ in range(200)]")
        with subprocess.Popen([sys.executable, "-c", program], stderr=theirs, cwd=HERE) as process:
            wait_until_full(theirs)
            os.close(theirs)
            with open(ours) as ours:
                self.assertEqual(ours.read(), f"testcloud: {'x' * 999}\n" * 200)
        self.assertEqual(process.returncode, 0)

    def test_a_blocked_stdout_does_not_expire_the_local_worker(self):
        loop = tc.EventLoop(sockets=False)
        self.addCleanup(loop.close)
        client = tc.Client("r1")
        loop.add(client, {})
        self.addCleanup(tc.run_locally(loop, client, 1, tc.Times(), False))
        loop.flush()
        loop.wait()
        loop.flush()
        broker = next(a.machine for a in loop.adapters if isinstance(a.machine, tc.Broker))
        self.assertTrue(broker.registry.workers and broker.registry.clients)
        broker.tick(time.monotonic() + 10000)  # nobody could say anything meanwhile
        self.assertTrue(broker.registry.workers and broker.registry.clients)

    def test_a_blocked_stdout_does_not_end_the_lease(self):
        broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--client-lease", "1")
        self.cloud.worker(broker, "-j", "1")
        client = self.cloud.client(
            broker, ["seq 100000", "echo begin >> ran; sleep 3; echo end >> ran"], wait=False)
        ran = os.path.join(self.cloud.dir, "ran")
        self.cloud.wait_for(lambda: tc.read_text(ran) == "begin\nend\n", "the end of the second")
        self.assertIsNone(client.poll())
        status, out = self.cloud.finish(client)
        self.assertEqual((status, len(out.splitlines()) > 100000), (0, True))
        self.assertEqual(tc.read_text(ran), "begin\nend\n")
        self.assertNotIn("silent", self.cloud.err(broker))

    def test_a_client_whose_stdout_is_blocked_can_be_interrupted(self):
        client = self.local(["seq 100000", "touch started; sleep 1000"], "-j", "1")
        self.cloud.wait_for(lambda: os.path.exists(os.path.join(self.cloud.dir, "started")),
                            "the second command")
        client.terminate()
        self.assertEqual(client.wait(PATIENCE), 143)

    def test_after_the_last_result_a_blocked_client_can_be_interrupted(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "1")
        client = self.cloud.client(broker, ["seq 100000"], "-v", wait=False)
        self.cloud.wait_for_log(broker, "client left")
        client.send_signal(signal.SIGINT)
        self.assertEqual(client.wait(PATIENCE), 130)

    def test_whoever_closes_our_stdout_ends_the_run(self):
        client = self.local(["seq 100000"] * 20)
        client.stdout.readline()
        client.stdout.close()
        client.stdout = None
        self.assertEqual(client.wait(PATIENCE), 141)
        self.assertEqual(self.cloud.err(client), "")

    def test_closing_our_stdout_stops_the_commands_on_the_workers(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        pid = os.path.join(self.cloud.dir, "pid")
        client = self.cloud.client(broker,
                                   [f"echo $$ > {pid}; exec sleep 1000", "sleep 0.2; seq 9"],
                                   wait=False)
        self.cloud.wait_for(lambda: tc.read_text(pid).strip(), "a start")
        client.stdout.close()
        client.stdout = None
        self.assertEqual(client.wait(PATIENCE), 141)
        self.cloud.wait_for(lambda: not os.path.exists("/proc/" + tc.read_text(pid).strip()), "end")
        self.assertNotIn("silent", self.cloud.err(broker))

    def test_an_output_for_which_the_clients_disk_has_no_room_is_a_failed_command(self):
        run = f"{sys.executable} {SCRIPT} client --local -j 1"
        done = subprocess.run(["bash", "-c", f"ulimit -f 1; printf 'seq 9999\necho a\n' | {run}"],
                              cwd=self.cloud.dir, capture_output=True, text=True, timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stderr), (1, ""))
        self.assertRegex(done.stdout, "(?m)^FAIL\\(126\\) seq 9999 .*\ntestcloud: no room for its "
                                      "output in .* of the client: File too large$")
        self.assertRegex(done.stdout, "(?m)^OK! echo a .*\na$")

    def test_a_full_disk_or_no_stdout_or_directory_is_one_line(self):
        run = f"{sys.executable} {SCRIPT} client --local"
        for command, status, text in [
                (f"echo 'seq 9' | {run} > /dev/full", 3, "cannot write the results"),
                (f"seq 9 | {run} --dry-run echo > /dev/full", 3, "cannot write to stdout"),
                (f"echo true | {run} >&-", 3, "stdout is closed"),
                (f"{run} <&-", 2, "stdin is closed"),
                (f"mkdir gone; cd gone; rmdir ../gone; echo true | {run}", 2, "with --cwd")]:
            done = subprocess.run(["bash", "-c", command], cwd=self.cloud.dir, capture_output=True,
                                  text=True, timeout=PATIENCE)
            self.assertEqual(done.returncode, status, (command, done.stderr))
            self.assertRegex(done.stderr, "^testcloud: .*\n$")
            self.assertIn(text, done.stderr)

    def test_who_waits_for_the_other_end_of_a_pipe_says_so(self):
        for name, mode in (("--timings", "wb"), ("--joblog", "rb"), ("--junit", "rb")):
            path = os.path.join(self.cloud.dir, name)
            os.mkfifo(path)
            client = self.cloud.start("client", "--local", name, path, stdin=subprocess.DEVNULL)
            self.cloud.wait_for_log(client, "testcloud: waiting for ")
            with open(path, mode) as pipe:
                self.assertTrue(mode == "wb" or pipe.read().startswith((b"Seq\t", b"<?xml")))
            self.assertEqual(self.cloud.finish(client)[0], 2)  # there are no commands

    def test_a_stderr_that_cannot_be_written(self):
        """Nobody needs it, but with --raw: there it has outputs of commands."""
        for more, status in (("-v", 0), ("--raw", 3), ("--json", 0), ("--raw -b", 0)):
            run = f"{sys.executable} {SCRIPT} client --local {more} > /dev/null 2> /dev/full"
            done = subprocess.run(["bash", "-c", f"echo 'echo x >&2' | {run}"], cwd=self.cloud.dir,
                                  timeout=PATIENCE)
            self.assertEqual(done.returncode, status, more)

    def test_address_in_use(self):
        broker = self.cloud.broker()
        for other in (self.cloud.start("broker", "--clients", broker.clients, "--workers",
                                       "127.0.0.1:0"),
                      self.cloud.start("broker", "--clients", "127.0.0.1:0", "--workers",
                                       broker.workers)):
            self.assertEqual(other.wait(PATIENCE), 3)
            self.assertRegex(self.cloud.err(other),
                             "^testcloud: Address already in use: is another "
                             "broker running on tcp://127.0.0.1:[0-9]+\\?\n$")
        ipc = f"ipc://{self.cloud.dir}/c"
        first = self.cloud.start("broker", "--clients", ipc, "--workers", "127.0.0.1:0")
        self.assertIn(b"Listening", first.stdout.readline())
        second = self.cloud.start("broker", "--clients", ipc, "--workers", "127.0.0.1:0")
        self.assertEqual(second.wait(PATIENCE), 3)
        self.assertTrue(os.path.exists(ipc[6:]))  # it was not the second's to remove
        precious = os.path.join(self.cloud.dir, "precious")
        open(precious, "w").close()
        third = self.cloud.start("broker", "--clients", "ipc://" + precious, "--workers",
                                 "127.0.0.1:0")
        self.assertEqual(third.wait(PATIENCE), 3)
        self.assertIn("no socket", self.cloud.err(third))
        self.assertTrue(os.path.exists(precious))
        first.terminate()
        first.wait(PATIENCE)
        self.assertFalse(os.path.exists(ipc[6:]))

    def test_addresses_that_cannot_be_used(self):
        for argv in (["broker", "--clients", "no.such.host.invalid:0"],
                     ["broker", "--insecure", "--clients", "192.0.2.1:0"],
                     ["broker", "--clients", "ipc:///no/such/dir/x"]):
            process = self.cloud.start(*argv)
            self.assertEqual(process.wait(PATIENCE), 3, argv)
            self.assertRegex(self.cloud.err(process), "^testcloud: .*\n$")

    def test_a_raw_client_above_a_chain(self):
        top = self.cloud.broker()
        bottom = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--upstream", top.workers)
        self.cloud.worker(bottom)
        raw = self.cloud.dealer(top.clients)
        raw.send(b'{"cmd":"echo hi"}')
        self.assertEqual(raw.recv(), b'QUEUED {"cmd":"echo hi"}')
        result = raw.recv()
        self.assertTrue(result.startswith(b"RESULT "), result)
        self.assertEqual(json.loads(result[7:])["stdout"], "hi\n")

    def test_three_brokers_in_a_chain(self):
        top = self.cloud.broker()
        middle = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--upstream", top.workers)
        bottom = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--upstream", middle.workers)
        self.cloud.worker(bottom, "-j", "3")
        self.cloud.worker(middle, "-j", "2")
        status, out = self.cloud.client(top, [f"echo {n}; exit $(({n} % 2))" for n in range(50)]
                                        + ["head -c 200000 /dev/zero | tr '\\0' x"])
        self.assertEqual(status, 1)
        self.assertIn("Ran 51 commands", out)
        self.assertEqual(out.count("OK!"), 26)
        self.assertIn("x" * 200000, out)
        self.assertEqual(self.cloud.client(bottom, ["true"])[0], 0)  # it has clients of its own

    def test_a_shell_in_a_chain_of_which_one_worker_lacks_it(self):
        folder = os.path.join(self.cloud.dir, "bin")
        os.mkdir(folder)
        with open(os.path.join(folder, "shell"), "w") as file:
            file.write("#!/bin/sh\necho $SHELL: $2\n")
        os.chmod(file.name, 0o755)
        top = self.cloud.broker()
        bottom = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--upstream", top.workers)
        self.cloud.worker(top, "--host", "lacks", "--weight", "1", "-j", "2")
        self.cloud.worker(bottom, "--host", "has", "-j", "1", env=dict(
            os.environ, PATH=f"{folder}:{os.environ['PATH']}", SHELL="mine"))
        commands = ["a <(b)", "c"]
        self.cloud.wait_for(lambda: self.cloud.client(top, None, "--json", "--shell", "shell",
                                                      "echo",
                                                      ":::", "x")[0] == 0, "both workers")
        for where in (top, bottom):
            status, out = self.cloud.client(where, commands, "--raw", "-k", "--shell", "shell")
            self.assertEqual((status, out), (0, "mine: a <(b)\nmine: c\n"))
        status, out = self.cloud.client(top, ["true"], "--shell", f"{folder}/none")
        self.assertEqual(status, 1)
        self.assertIn(f"this worker has no shell {folder}/none", out)

    def test_a_loop_of_brokers_is_refused(self):
        one = self.cloud.broker()
        two = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--upstream", one.workers)
        self.cloud.wait_for(lambda: "worker" in self.cloud.err(one), "the join")
        one.kill()
        one.wait()
        one = self.cloud.broker(one.clients[6:], one.workers[6:], "--upstream", two.workers)
        self.cloud.wait_for(lambda: 2 in (one.poll(), two.poll()), "an end")
        ended = one if one.poll() == 2 else two
        self.assertIn("loop of brokers", self.cloud.err(ended))
        itself = self.cloud.broker("127.0.0.1:0", one.workers[6:] if ended is one else
                                   two.workers[6:], "--upstream", ended.workers)
        self.assertEqual(itself.wait(PATIENCE), 2)


class ReturnTest(unittest.TestCase):
    """Files that commands made in their workspace, and that come back."""

    def setUp(self):
        self.cloud = Cloud(self)
        self.env = dict(os.environ, XDG_CACHE_HOME=os.path.join(self.cloud.dir, "cache"))
        self.top = pathlib.Path(self.cloud.dir, "tree")
        (self.top / "sub").mkdir(parents=True)

    def start(self, commands, *options):
        process = self.cloud.start("client", "--sync", str(self.top), *options, env=self.env,
                                   stdin=subprocess.PIPE)
        process.stdin.write("".join(f"{line}\n" for line in commands).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def local(self, commands, *options):
        process = self.start(commands, "--local", *options)
        status, out = self.cloud.finish(process)
        return status, out, self.cloud.err(process)

    def there(self):
        return sorted(str(path.relative_to(self.top)) for path in self.top.rglob("*"))

    def test_files_come_back_to_their_places_whatever_the_exit_code(self):
        status, out, err = self.local(
            ["0", "3"], "--cwd", "sub", "--return", "r/{#}.xml", "--return", "../it's {}", "--json",
            "mkdir -p r; echo {} > r/{#}.xml; chmod 640 r/*; touch \"../it's \"{}; exit {}")
        rows = {row["exitcode"]: row["returned"] for row in map(json.loads, out.splitlines())}
        self.assertEqual(rows, {code: [f"{self.top}/sub/r/{n}.xml", f"{self.top}/it's {code}"]
                                for n, code in ((1, 0), (2, 3))})
        self.assertEqual((status, self.there()), (
            1, ["it's 0", "it's 3", "sub", "sub/r", "sub/r/1.xml", "sub/r/2.xml"]), err)
        self.assertEqual((self.top / "sub/r/2.xml").read_text(), "3\n")
        self.assertEqual(stat.S_IMODE((self.top / "sub/r/1.xml").stat().st_mode), 0o640)

    def test_missing_files_are_named_and_may_fail_their_commands(self):
        status, out, err = self.local(["a", "b"], "--return", "{}", "touch a; :")
        self.assertEqual(status, 0)
        self.assertIn("testcloud: touch a; : b brought no b from ", err)
        os.unlink(self.top / "a")
        status, out, err = self.local(
            ["a", "b"], "--return", "{}", "--fail-on-missing", "touch a; :")
        self.assertEqual((status, err), (1, ""))
        self.assertRegex(out, "FAIL.1. touch a; : b .*\ntestcloud: it did not make b .--fail-on-m")
        self.assertEqual(self.there(), ["a", "sub"])

    def test_what_leads_out_neither_runs_nor_comes(self):
        status, out, err = self.local(["../x", "/etc/passwd", "l/f", "l"], "--return", "{}",
                                      "ln -sfn /etc l; touch {}; touch ran-{#}")
        self.assertEqual(status, 1)
        for path in ("../x", "/etc/passwd"):
            self.assertIn(f"testcloud: --return {path} is no file below the directory of", out)
        for path in ("l/f", "l"):
            self.assertIn(f"testcloud: {path} does not come back: there is a link", out)
        self.assertEqual(self.there(), ["sub"])

    def test_a_file_that_cannot_be_written_is_named_in_the_end(self):
        (self.top / "link").symlink_to(self.cloud.dir)
        (self.top / "d").mkdir()
        status, out, err = self.local(
            ["d", "fine", "link/f"], "--return", "{}", "--exclude", "/d", "mkdir -p link; echo >")
        self.assertEqual(status, 3)
        self.assertIn("All commands successfully executed", out)
        self.assertEqual(sorted(err.splitlines())[:2], [
            f"testcloud: cannot write {self.top}/d: what is there is no regular file",
            f"testcloud: cannot write {self.top}/link/f: there is a link in its path, or a file in "
            "place of a directory"])
        self.assertEqual(self.there(), ["d", "fine", "link", "sub"])

    def test_a_large_file_crosses_a_cloud_in_parts(self):
        size = 5 * tc.CHUNK_SIZE + 7
        broker = self.cloud.broker()
        worker = self.cloud.worker(broker, env=self.env)
        status, out = self.cloud.finish(self.start(
            ["x"], "--connect", broker.clients, "--return", "sub/big", "--return", "small",
            f"echo > small; head -c {size} /dev/urandom | tee sub/big; :"))
        self.assertEqual(status, 0, out[-300:] + self.cloud.err(worker))
        big = (self.top / "sub/big").read_bytes()
        self.assertEqual(len(big), size)
        self.assertIn(naive_hash([(f"echo > small; head -c {size} /dev/urandom | tee sub/big; : x"
                                   .encode(), 0, big)]), out)
        self.assertEqual(self.there(), ["small", "sub", "sub/big"])

    def test_an_interrupted_client_leaves_no_part_of_a_file(self):
        size = 100 * 2**20
        broker = self.cloud.broker()
        self.cloud.worker(broker, env=self.env)
        client = self.start(["x"], "--connect", broker.clients, "--return", "big",
                            f"truncate -s {size} big; :")
        self.cloud.wait_for(lambda: "big" in self.there() or any(
            name.startswith(tc.UNFINISHED) for name in self.there()), "the start of the file")
        broker.send_signal(signal.SIGSTOP)
        client.send_signal(signal.SIGINT)
        status, _ = self.cloud.finish(client)
        if status:  # else we came too late
            self.assertEqual((status, self.there()), (130, ["sub"]))
        else:
            self.assertEqual((self.top / "big").stat().st_size, size)


class WhatIsSaidTest(unittest.TestCase):
    """What comes to stderr, and where from the program runs."""

    def setUp(self):
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)

    def run_client(self, *argv, lines=("true",), code=None, **more):
        """With parts of the program replaced by this code."""
        start = [SCRIPT] if code is None else [
            "-c", f"import os, sys; sys.path.insert(0, {HERE!r}); import testcloud as tc\n{code}\n"
                  f"os._exit(tc.main())"]
        return subprocess.run([sys.executable, *start, "client", "--local", *argv], text=True,
                              input="".join(f"{line}\n" for line in lines), timeout=PATIENCE,
                              **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE,
                                 "cwd": self.dir, **more})

    def test_quiet_is_nothing_but_errors(self):
        for argv, lines, status, err in (
                (("--raw", "-f"), ("true", "echo a >&2"), 0, "^$"),
                (("--json",), ("true",), 0, "^$"), ((), ("true", "false"), 1, "^$"),
                (("--raw",), ("echo a >&2", "false"), 1,
                 r"^a\nFAIL\(1\).*false .*\nSome commands f"),
                (("--expect", "0" * 40), ("true",), 1, "^testcloud: the result hash is"),
                (("--fail-fast",), ("false", "sleep 9"), 1, "^testcloud: stopped early")):
            done = self.run_client("--quiet", "-j1", *argv, lines=lines)
            self.assertEqual(done.returncode, status, argv)
            self.assertRegex(done.stderr, err, argv)
            self.assertEqual(bool(done.stdout), "--raw" not in argv)

    def test_no_advice_on_slots_that_are_not_used(self):
        for more, said in (((), True), (("--serial",), False)):
            done = self.run_client("-j1", *more, lines=["sleep 0.2"] * 4,
                                   code="tc.ADVICE_MIN_RUN = 0.5")
            self.assertEqual("longest command" in done.stderr, said, done.stderr)

    def test_ones_own_option_for_quiet_yields(self):
        with mock.patch.dict(os.environ, TESTCLOUD="--quiet"):
            self.assertIn("true ran on", self.run_client("-v").stderr)
            self.assertEqual(self.run_client("--raw").stderr, "")
        self.assertEqual(self.run_client("--raw", "-v", "--quiet").stderr,
                         "")  # the last one counts

    def test_signs_of_life_without_a_terminal(self):
        """Each of them lets the command go on; results that nobody sees do not put them off."""
        fifo = os.path.join(self.dir, "fifo")
        os.mkfifo(fifo)
        code = f"""tc.SILENCE_INTERVAL = tc.STEADY_INTERVAL = 0.3
real = tc.print_notice
def print_notice(text):
    real(text)
    if "; for " in text:
        open({fifo!r}, "w").close()
tc.print_notice = print_notice"""
        with open(os.path.join(self.dir, "out"), "w") as out:
            for argv in ((), ("-p",)):
                done = self.run_client(*argv, lines=["read x < fifo; true"], code=code, stdout=out)
                self.assertEqual(done.returncode, 0)
                self.assertRegex(done.stderr,
                                 "^testcloud: 0/1 done, 1 running, 1 worker, .* slots?; "
                                              r"for \d s: read x < fifo; true\n$")
        quiet = self.run_client("--quiet", lines=["sleep 1"], code=code)
        self.assertEqual(quiet.stderr, "")

    def test_results_that_are_seen_put_signs_of_life_off(self):
        run = functools.partial(self.run_client, "-j1", lines=["sleep 0.2"] * 12,
                                code="tc.SILENCE_INTERVAL = 1.2")
        self.assertNotIn("/12 done, ", run().stderr)
        path = os.path.join(self.dir, "log")
        for more in ({}, {"stderr": subprocess.STDOUT}):
            with open(path, "w") as log:
                done = run(**{"stdout": log, **more})
            self.assertEqual("/12 done, " in tc.read_text(path) + (done.stderr or ""), not more)

    def test_the_directory_is_sent_with_its_links(self):
        real = os.path.join(os.path.realpath(self.dir), "real")
        link = os.path.join(self.dir, "link")
        os.makedirs(os.path.join(real, "in"))
        os.symlink(real, link)
        for here, pwd, given, sent in (
                (real, link, None, link), (real, link, "in", f"{link}/in"),
                (real, link, "/x", "/x"),
                (f"{real}/in", f"{link}/in", "..", link), (real, self.dir, None, real),
                (real, "/no/such", None, real), (real, "", ".", real),
                (real, f"{link}/in/..", None, real),
                (real, os.path.relpath(link, real), None, real), (real, ".", None, real)):
            code = (f"import testcloud as tc; print(tc.working_directory({given!r}))")
            done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True,
                                  text=True, env={**os.environ, "PWD": pwd, "PYTHONPATH": HERE})
            self.assertEqual(done.stdout, sent + "\n", (pwd, given, done.stderr))

    def lone(self, which):
        """A script of its own, whose python3 lacks pyzmq, beside a .venv with that interpreter."""
        script = shutil.copy(SCRIPT, self.dir)
        venv = os.path.join(self.dir, ".venv")
        package = pathlib.Path(venv, "lib", "python3", "site-packages", "zmq")
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        os.makedirs(os.path.join(venv, "bin"), exist_ok=True)
        python = os.path.join(venv, "bin", "python")
        with open(python, "w") as file:
            file.write(f'#!/bin/sh\necho borrowed >&2\nexec {sys.executable} {which} "$@"\n')
        os.chmod(python, 0o755)
        key = os.path.join(self.dir, f"key{which}")
        return [sys.executable, "-S", script, "keygen", key], python

    @unittest.skipIf(subprocess.run([sys.executable, "-S", "-c", "import zmq"],
                                    stderr=subprocess.DEVNULL).returncode == 0, "zmq is everywhere")
    def test_pyzmq_of_a_venv_beside_the_script(self):
        run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=PATIENCE)
        argv, python = self.lone("")
        done = run(argv)
        self.assertEqual((done.returncode, done.stderr), (0, "borrowed\n"))
        self.assertIn("Wrote ", done.stdout)
        argv, python = self.lone("-S")  # it does not have it after all: tried once
        done = run(argv)
        self.assertEqual(done.returncode, 3)
        self.assertEqual(done.stderr, f"borrowed\ntestcloud: Python's package pyzmq is missing: "
                                      f"run this with {python}, which has it\n")
        code = (f"import os, sys; sys.path.insert(0, {self.dir!r}); import testcloud as tc\n"
                f"uid = os.geteuid(); os.geteuid = lambda: uid + 1\n"
                f"sys.argv = {argv[2:]!r}; sys.exit(tc.main())")
        done = run([sys.executable, "-S", "-c", code])  # it is another user's
        self.assertEqual((done.returncode, "borrowed" in done.stderr), (3, False))
        self.assertIn(f"run this with {python}", done.stderr)
        shutil.rmtree(os.path.join(self.dir, ".venv"))
        self.assertRegex(run(argv).stderr,
                         "pyzmq is missing: apt install python3-zmq .*-m venv .venv")


class HostsTest(unittest.TestCase):
    def setUp(self):
        self.cloud = Cloud(self)

    def test_what_a_machine_is_known_by(self):
        facts = {"/etc/machine-id": "m\n", "/proc/sys/kernel/random/boot_id": "b\n"}
        found = set()
        for change, names in (({}, (None, "vm", "x")), ({"/etc/machine-id": "n"}, (None, "x")),
                              ({"/proc/sys/kernel/random/boot_id": "c"}, (None,)),
                              (dict.fromkeys(facts, ""), (None,))):  # the last: no Linux
            with mock.patch.object(tc, "read_text", {**facts, **change}.get), \
                    mock.patch.object(tc.socket, "gethostname", lambda: "vm"):
                for name in names:
                    self.assertRegex(tc.host_identity(name), f"^{name or 'vm'}/[0-9a-f]{{12}}$")
                    found.add(tc.host_identity(name))
        self.assertEqual(len(found), 6)  # the given name vm is the same as vm
        self.assertLess(len(tc.host_identity("x" * 64)), tc.STATUS_LIMIT)

    def test_a_host_has_one_name_wherever_it_is_shown(self):
        broker = self.cloud.broker()
        for name in ("one", "two", "two"):
            self.cloud.worker(broker, "-j1", "--host", name)
        self.cloud.wait_for(lambda: len(self.status(broker)) == 3, "three workers")
        self.assertEqual(sorted(self.status(broker)), ["one", "two", "two"])
        report = os.path.join(self.cloud.dir, "report")
        status, out = self.cloud.client(
            broker, ["echo $TESTCLOUD_WORKER >> tried; [ $(wc -l < tried) = 2 ]"], "--retries", "3",
            "--json", "--joblog", report)
        result = json.loads(out)
        self.assertEqual(status, 0, result)
        hosts = [result["host"], *(row["host"] for row in result["tries"])]
        self.assertEqual({*hosts}, {"one", "two"})
        self.assertRegex(tc.read_text(report), r"\t(one|two) \(only on (one|two)\)\t")

    def status(self, broker):
        process = self.cloud.start("status", "--json", "--connect", broker.clients)
        return [row["host"] for row in json.loads(self.cloud.finish(process)[1])["workers"]]


class LimitsTest(unittest.TestCase):
    """What the user may set for each command, and for the end of a worker."""

    def setUp(self):
        self.cloud = Cloud(self)

    def test_timeout(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        status, out = self.cloud.client(broker, ["echo a; sleep 1000", "echo b"], "--timeout",
                                        "300ms")
        self.assertEqual(status, 1)
        self.assertRegex(out, r"FAIL\(124\) echo a; sleep 1000 ⌚[0-9.]+ms\n"
                              r"testcloud: stopped after 0.3 seconds \(see --timeout\)\na\n")
        self.assertIn("OK! echo b", out)

    def test_retries_go_to_another_worker(self):
        broker = self.cloud.broker()
        workers = [self.cloud.worker(broker, "-j", "2") for _ in range(2)]
        for worker in workers:
            self.cloud.wait_for_log(worker, "joined")
        path = os.path.join(self.cloud.dir, "where")
        fails_twice = f"echo $TESTCLOUD_WORKER >> {path}; [ $(wc -l < {path}) = 3 ]"
        status, out = self.cloud.client(broker, [fails_twice, "exit 7", "true"], "--retries", "3")
        self.assertEqual(status, 1)
        one, two, three = tc.read_text(path).split()
        self.assertEqual(one, three)
        self.assertNotEqual(one, two)
        self.assertRegex(out,
                         r"FLAKY! echo .*\ntestcloud: tried 3 times; other exit codes: 1 on \S+ "
                              r"\(2 times\)\n")
        self.assertRegex(out,
                         r"FAIL\(7\) exit 7 .*\ntestcloud: tried 3 times; other exit codes: 7 on ")
        self.assertRegex(out, r"OK! true ⌚[0-9.]+ms\n\n")

    def test_max_output(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        status, out = self.cloud.client(broker, ["seq 100000; touch ended"], "--max-output", "10")
        self.assertEqual(status, 0)
        self.assertIn("\n1\n2\n3\n4\n5\n\n[testcloud: output cut after 10 of 588895 bytes]\n", out)
        self.assertTrue(os.path.exists(os.path.join(self.cloud.dir, "ended")))

    def test_a_stopped_worker_drains(self):
        broker = self.cloud.broker()
        worker = self.cloud.worker(broker, "-j", "1", "--drain", "1000")
        flag = os.path.join(self.cloud.dir, "flag")
        client = self.cloud.client(broker, [f"echo up > {flag}; read x < fifo; echo $x",
                                            f"echo second > {flag}"], wait=False)
        os.mkfifo(os.path.join(self.cloud.dir, "fifo"))
        self.cloud.wait_for(lambda: tc.read_text(flag), "the start")
        worker.terminate()
        self.cloud.worker(broker, "-j", "1")
        self.cloud.wait_for(lambda: tc.read_text(flag) == "second\n", "the second command")
        with open(os.path.join(self.cloud.dir, "fifo"), "w") as fifo:
            fifo.write("drained\n")
        status, out = self.cloud.finish(client)
        self.assertEqual((status, worker.wait(PATIENCE)), (0, 143))
        self.assertIn("\ndrained\n", out)

    def test_a_command_that_kills_its_workers_is_named(self):
        broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--lost-grace", "0.1")
        workers = [self.cloud.worker(broker, "-j", "1") for _ in range(3)]
        for worker in workers:
            self.cloud.wait_for_log(worker, "joined")
        status, out = self.cloud.client(broker, ["kill -9 $PPID; sleep 1000", "true"],
                                        "--crash-limit", "2")
        self.assertEqual(status, 1)
        self.assertRegex(out, r"FAIL\(126\) kill -9 .*\ntestcloud: 2 workers were lost while "
                              r"they had it, and it is suspected")
        self.assertEqual(sum(worker.poll() is None for worker in workers), 1)

    @unittest.skipUnless(hasattr(os, "sched_getaffinity"), "not Linux")
    def test_a_worker_short_of_descriptors_hands_its_commands_back(self):
        broker = self.cloud.broker()
        poor = self.cloud.start("worker", "--connect", broker.workers, "-j", "30", "--weight", "5",
                                preexec_fn=lambda: resource.setrlimit(
                                    resource.RLIMIT_NOFILE, (50, 50)))
        self.cloud.wait_for_log(poor, "joined")
        self.cloud.worker(broker, "-j", "2")
        status, out = self.cloud.client(broker, ["sleep 0.1; echo hi"] * 60)
        self.assertEqual((status, out.count("OK! ")), (0, 60), out[-2000:])

    def test_a_worker_that_keeps_many_outputs_opens_more_files_than_its_commands_may(self):
        """Large outputs wait in files for a client that does not fetch them."""
        broker = self.cloud.broker()
        self.cloud.start("worker", "--connect", broker.workers, "-j", "2", preexec_fn=lambda:
                         resource.setrlimit(resource.RLIMIT_NOFILE, (60, 1000)))
        stopped = self.cloud.client(broker, None, "-b", wait=False)
        ended = os.path.join(self.cloud.dir, "ended")
        for _ in range(100):
            stopped.stdin.write(b"seq 20000; echo 1 >> %s\n" % ended.encode())
        stopped.stdin.close()
        stopped.stdin = None
        self.cloud.wait_for(lambda: tc.read_text(ended), "a first result")
        stopped.send_signal(signal.SIGSTOP)
        self.cloud.wait_for(lambda: len(tc.read_text(ended)) == 200, "the last result")
        # many: they must not see our limit in the moment of their start either
        status, out = self.cloud.client(broker, ["seq 20000", *["ulimit -n"] * 200], "--raw")
        stopped.send_signal(signal.SIGCONT)
        self.assertEqual((status, Counter(out.split())["60"]), (0, 201), out[-300:])
        status, out = self.cloud.finish(stopped)
        self.assertEqual((status, out.count("OK! ")), (0, 100))

    def test_what_a_client_shows_while_commands_run(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        os.mkfifo(os.path.join(self.cloud.dir, "fifo"))
        client = self.cloud.client(broker, ["echo one; read x < fifo; echo $x"], "--live",
                                   wait=False)
        for line in (b"Connecting", b"Releasing", b"echo one; read x < fifo; echo $x\tone"):
            self.assertTrue(client.stdout.readline().startswith(line))
        with open(os.path.join(self.cloud.dir, "fifo"), "w") as fifo:
            fifo.write("two\n")
        status, out = self.cloud.finish(client)
        self.assertEqual((status, out.split("\n")[0]), (0, "echo one; read x < fifo; echo $x\ttwo"))

    def test_raw(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        client = self.cloud.client(broker, ["head -c 3000000 /dev/zero; echo err >&2; exit 4"],
                                   "--raw",
                                   wait=False)
        out, _ = client.communicate(timeout=PATIENCE)
        self.assertEqual((client.returncode, out == bytes(3_000_000)), (1, True))
        self.assertRegex(self.cloud.err(client), r"FAIL\(4\) head .*\nerr\n")

    def test_labels_and_status(self):
        broker = self.cloud.broker()
        below = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--upstream", broker.workers)
        self.cloud.worker(broker, "-j", "2")
        self.cloud.worker(below, "-j", "3", "--label", "gpu")
        status, out = self.cloud.client(broker, ["echo $TESTCLOUD_SLOT"] * 20, "--need", "gpu")
        self.assertEqual((status, out.count("OK!")), (0, 20))
        shown = self.cloud.start("status", "--connect", broker.clients, "--json")
        out, _ = shown.communicate(timeout=PATIENCE)
        workers = {row["kind"]: row for row in json.loads(out)["workers"]}
        self.assertEqual((workers["broker"]["labels"], workers["broker"]["done"]), (["gpu"], 20))
        shown = self.cloud.start("status", "--connect", broker.clients)
        out, _ = shown.communicate(timeout=PATIENCE)
        self.assertIn("2 workers, 0 of 5 slots busy, 0 clients", out.decode())
        self.assertEqual(shown.returncode, 0)
        client = self.cloud.client(broker, ["true"], "--need", "tpu", wait=False)
        self.cloud.wait_for_log(client,
                                "waiting for a worker with --label tpu; there is none among 2")
        shown = self.cloud.start("status", "--connect", broker.clients)
        self.assertIn(b"a worker with --label tpu", shown.communicate(timeout=PATIENCE)[0])
        nobody = self.cloud.start("status", "--connect", "127.0.0.1:9", "--wait", "1")
        self.assertEqual(nobody.wait(PATIENCE), 3)
        self.assertRegex(self.cloud.err(nobody), "gave up waiting: no broker at")

    def test_reports_of_a_run_and_its_resumption_after_a_kill(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "1")
        commands = [f"echo {n} >> ran; exit {n % 3}" for n in range(1, 31)]
        client = self.cloud.client(broker, None, "--joblog", "log", wait=False)
        client.stdin.write("".join(f"{c}\n" for c in commands[:20]).encode())
        client.stdin.flush()
        log = os.path.join(self.cloud.dir, "log")
        self.cloud.wait_for(lambda: tc.read_text(log).count("\n") > 5, "some results")
        client.kill()
        client.wait()
        done = len(tc.read_joblog(log))
        status, out = self.cloud.client(broker, commands, "--joblog", "log", "--resume",
                                        "--junit", "x.xml")
        self.assertEqual(status, 1)
        self.assertIn(f"Skipped {done} that an earlier run has done", out)
        self.assertEqual(sorted(row.command for row in tc.read_joblog(log)), sorted(commands))
        report = ET.parse(os.path.join(self.cloud.dir, "x.xml")).getroot()
        self.assertEqual(int(report.get("tests")), 30 - done)
        status, out = self.cloud.client(broker, commands[::-1], "--joblog", "log",
                                        "--resume-failed")
        self.assertEqual((status, out.count("\nFAIL"), "Skipped 10 that" in out), (1, 20, True),
                         out)
        wrong = self.cloud.client(broker, ["true"], "--junit", "no/such/x.xml", wait=False)
        self.assertEqual(wrong.wait(PATIENCE), 3)
        self.assertRegex(self.cloud.err(wrong), "^testcloud: cannot write no/such/x.xml: no such")

    def test_equal_commands_are_resumed_as_the_ones_they_are(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "2")
        line = "echo n$TESTCLOUD_SEQ; [ $TESTCLOUD_SEQ != 2 ] || [ -e fixed ]"
        more = [line] * 4, "--joblog", "log"
        self.assertEqual(self.cloud.client(broker, *more)[0], 1)
        with open(os.path.join(self.cloud.dir, "fixed"), "w"):
            pass
        for ran in ("2", ""):
            status, out = self.cloud.client(broker, *more, "--resume-failed")
            self.assertEqual((status, re.findall("^n(.)", out, re.MULTILINE)), (0, [*ran]), out)
        command_file = os.path.join(self.cloud.dir, "commands")
        with open(command_file, "w") as file:
            file.write("true\n")
        for wrong in ("--joblog", "--timings"):
            client = self.cloud.client(broker, ["true"], wrong, command_file,
                                       *["--resume"] * (wrong == "--joblog"), wait=False)
            self.assertEqual(client.wait(PATIENCE), 3)
            self.assertIn("is no joblog", self.cloud.err(client))
        self.assertEqual(tc.read_text(command_file), "true\n")

    def test_the_expected_hash(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "1")
        right = naive_hash([(b"true", 0, b"")])
        self.assertEqual(self.cloud.client(broker, ["true"], "--expect", right.upper())[0], 0)
        client = self.cloud.client(broker, ["true"], "--expect", "0" * 40, "--junit", "x.xml",
                                   "--html", "x.html", wait=False)
        self.assertEqual(self.cloud.finish(client)[0], 1)
        said = f"the result hash is {right}, and not {'0' * 40} as expected"
        self.assertEqual(self.cloud.err(client), f"testcloud: {said}\n")
        self.assertIn(f'message="{said}"', tc.read_text(os.path.join(self.cloud.dir, "x.xml")))
        self.assertIn(f"1 command; {said}", tc.read_text(os.path.join(self.cloud.dir, "x.html")))

    def limited_broker(self, soft, hard):
        return self.cloud.broker(
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))

    def test_a_broker_raises_its_limit_of_open_files(self):
        broker = self.limited_broker(50, 500)
        self.assertRegex(tc.read_text(f"/proc/{broker.pid}/limits"), r"Max open files +500 +500 ")

    def test_a_broker_that_can_have_no_more_peers_says_so_once(self):
        broker = self.limited_broker(60, 60)
        host, port = tc.split_tcp(broker.clients)
        for _ in range(70):
            peer = socket.create_connection((host, port))
            self.addCleanup(peer.close)
        self.cloud.wait_for_log(broker, "no more peers can connect")
        self.assertIn("may have only 60 open files", self.cloud.err(broker))
        self.assertEqual(self.cloud.err(broker).count("no more peers"), 1)


@unittest.skipUnless(os.path.exists(f"/proc/self/task/{os.getpid()}/children"), "not Linux")
class TerminalTest(unittest.TestCase):
    """What was started in a terminal of its own, of which stdin is the keyboard."""

    SPAWN = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"

    def setUp(self):
        self.cloud = Cloud(self)
        patch = mock.patch.dict(os.environ, TERM="xterm")
        patch.start()
        self.addCleanup(patch.stop)

    def start(self, *argv):
        cloud, command = self.cloud, [sys.executable, SCRIPT, *argv]
        with mock.patch.object(cloud, "script", "-c"):
            return cloud.start(self.SPAWN, *command, stdin=subprocess.PIPE)

    def read_until(self, process, wanted, seen=b""):
        """What it writes, after what was seen, until this is there."""
        while wanted not in seen:
            more = os.read(process.stdout.fileno(), 1000)
            self.assertTrue(more, f"{wanted} never came after {seen}")
            seen += more
        return seen

    def press(self, process, keys):
        process.stdin.write(keys)
        process.stdin.flush()

    def test_commands_of_a_worker_cannot_reach_its_terminal(self):
        broker = self.cloud.broker()
        worker = self.start("worker", "--connect", broker.workers)
        lines = ["echo x > /dev/tty", "read x < /dev/tty", "sleep 0.01; cat"]
        status, out = self.cloud.client(broker, lines)
        self.assertEqual((status, out.count("\nFAIL"), out.count("OK!")), (1, 2, 1), out)
        self.press(worker, b"\x03")
        self.assertEqual(worker.wait(PATIENCE), 130)

    def test_the_line_at_the_bottom(self):
        """It is there on a terminal, never within other lines, and gone at the end."""
        for more, shown in (((), True), (("--json",), True)):
            client = self.start("client", "--local", "--timeout", "30", *more)
            self.press(client, b"echo first; sleep 1.2\necho second\n")
            self.press(client, b"\x04")
            status, out = self.cloud.finish(client)
            self.assertEqual(status, 0, out)
            self.assertEqual("/2 done, " in out or "/2+ done, " in out, shown, out)
            for line in out.split("\n"):
                last = line.rstrip("\r").split("\r\x1b[K")[-1]
                self.assertTrue("done, " not in last or line == out.split("\n")[-1], repr(line))
            self.assertNotIn("done, ", re.split(r"\r\x1b\[K", out)[-1])
        with mock.patch.dict(os.environ, TERM="dumb"):
            client = self.start("client", "--local", "--timeout", "30")
        self.press(client, b"sleep 1.2\n\x04")
        self.assertNotIn("done, ", self.cloud.finish(client)[1])

    def test_an_unfinished_line_of_a_command_is_left_alone(self):
        client = self.start("client", "--local", "-j", "1", "--raw")
        self.press(client, b"sleep 0.9; echo first\nprintf unfin\nsleep 0.5; printf ished\n"
                           b"sleep 0.5; echo last\nsleep 1\n\x04")
        status, out = self.cloud.finish(client)
        self.assertEqual((status, "/5 done, " in out), (0, True), out)
        self.assertNotRegex(out, r"(unfin|ished|last|OK!)[^\n]*done, ")
        self.assertNotRegex(out, r"unfin[^\n]*(last|OK!)")

    def test_lines_for_stderr_begin_at_the_left(self):
        bar, pieces = tc.ProgressLine(), [b"a\nunfinished", b""]
        with contextlib.redirect_stderr(io.StringIO()) as err:
            self.assertEqual([*bar.tracked(pieces)], pieces)
            for said in ("one\n", "two\n"):
                with bar.at_line_start():
                    err.write(said)
        self.assertEqual(err.getvalue(), "\none\ntwo\n")

    def test_the_bar_does_not_follow_an_unfinished_line(self):
        bar = tc.ProgressLine()
        bar.text = "1/2 done, " * 20
        with contextlib.redirect_stderr(io.StringIO()) as err, \
                mock.patch.object(tc, "screen_size", return_value=(80, 24)), \
                mock.patch.object(tc, "PROGRESS_LINE", bar):
            self.assertEqual([*bar.tracked([b"unfinished"])], [b"unfinished"])
            with bar.hidden():
                pass
            self.assertEqual(err.getvalue(), "")
            tc.LogHandler().emit(logging.makeLogRecord({"msg": "logged"}))
            self.assertEqual(err.getvalue(), "\nlogged\n" + bar.text[:79])
            tc.LogHandler().emit(logging.makeLogRecord({"msg": "more"}))
        self.assertEqual(err.getvalue(),
                         "\nlogged\n" + bar.text[:79] + "\r\x1b[Kmore\n" + bar.text[:79])

    def test_a_bar_is_wiped_when_the_terminal_has_become_narrower(self):
        bar = tc.ProgressLine()
        with contextlib.redirect_stderr(io.StringIO()) as err, \
                mock.patch.object(tc, "screen_size", side_effect=[(80, 24), (40, 24)]):
            bar.draw("x" * 70)
            bar.draw("")
        self.assertEqual(err.getvalue(), "x" * 70 + "\r\x1b[K\x1b[A\x1b[K")

    def test_what_there_is_to_say_about_a_run_comes_after_it(self):
        client = self.start("client", "--local", "--expect", "0" * 40)
        self.press(client, b"echo a\n\x04")
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 1)
        self.assertRegex(out.splitlines()[-1], "^testcloud: the result hash is ", out)

    def test_a_live_status(self):
        broker = self.cloud.broker()
        status = self.start("status", "--watch", "--connect", broker.clients)
        seen = b""
        # Ctrl-Z gives the terminal back; but here is no shell, so that nothing stops us
        for wanted, key in ((b"0 workers", b"\x1a"), (b"\x1b[?1049l", b""), (b"\x1b[?1049h", b""),
                            (b"0 workers", b"xq\r")):
            seen = self.read_until(status, wanted, seen)
            seen = seen.partition(wanted)[2]
            self.press(status, key)
        _, out = self.cloud.finish(status)
        self.assertEqual(status.returncode, 0)
        self.assertTrue((seen.decode() + out).rstrip().endswith("\x1b[?1049l"), out)

    def test_a_live_status_that_has_no_broker_any_more(self):
        """It waits for one, and what it says last is to be read when the screen is given back."""
        broker = self.cloud.broker()
        for wait, wanted in ((), b"testcloud: waiting: no broker"), (("--wait", "1"), b"gave up"):
            status = self.start("status", "--watch", "--connect", broker.clients, *wait)
            seen = b""
            if not wait:
                seen = self.read_until(status, b"0 workers")
                broker.kill()
            seen = self.read_until(status, wanted, seen)
            if not wait:
                os.kill(self.cloud.inner(status), signal.SIGWINCH)  # it is drawn again for that
                seen = self.read_until(status, wanted, seen.rpartition(wanted)[2])
                self.press(status, b"q")
            _, out = self.cloud.finish(status)
            after = (seen.decode() + out).partition("\x1b[?1049l")[2]
            self.assertEqual((status.returncode, "gave up" in after),
                             (3, True) if wait else (0, False))

    def test_a_live_status_shows_no_keys_and_leaves_the_terminal_as_it_was(self):
        run = (f"{sys.executable} {SCRIPT} status --watch --connect {self.cloud.broker().clients}; "
               f"stty -a")
        with mock.patch.object(self.cloud, "script", "-c"):
            shell = self.cloud.start(self.SPAWN, "sh", "-c", run, stdin=subprocess.PIPE)
        seen = self.read_until(shell, b"0 workers")
        self.press(shell, b"~")
        seen += self.read_until(shell, b"0 workers")
        self.press(shell, b"q")
        _, out = self.cloud.finish(shell)
        screen, _, after = (seen.decode() + out).partition("\x1b[?1049l")
        self.assertNotIn("~", screen)
        self.assertRegex(after, r"\sicanon\s")
        self.assertRegex(after, r"\secho\s")

    def test_a_live_status_that_is_quit(self):
        status = self.start("status", "--watch", "--connect", self.cloud.broker().clients)
        seen = self.read_until(status, b"0 workers")
        self.press(status, b"\x1c")
        _, out = self.cloud.finish(status)
        self.assertEqual(status.returncode, 128 + signal.SIGQUIT)
        self.assertTrue((seen.decode() + out).rstrip().endswith("\x1b[?1049l"), out)

    def test_a_live_status_on_a_dumb_terminal(self):
        broker = self.cloud.broker()
        with mock.patch.dict(os.environ, TERM="dumb"):
            status = self.start("status", "--watch", "--connect", broker.clients)
        seen = self.read_until(status, b"0 workers")
        seen += self.read_until(status, b"0 workers")
        self.press(status, b"\x03")
        self.assertEqual(status.wait(PATIENCE), 130)
        self.assertNotIn(b"\x1b", seen)

    def test_ctrl_c_comes_to_client_and_supervisor_and_counts_once(self):
        client = self.start("client", "--local", "--live", "-j", "1")
        self.press(client, b"echo be''gun; sleep 1000\n")
        self.read_until(client, b"begun")
        self.press(client, b"\x03")
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 130, out)
        self.assertIn("interrupted: 0 commands reported, 1 stopped, 0 never ran\r\n", out)

    def test_commands_typed_for_this_machine(self):
        client = self.start("client", "--local", "--timeout", "30")
        self.press(client, b"echo $((6*7))\nread x < /dev/tty\n\x04")
        status, out = self.cloud.finish(client)
        self.assertEqual((status, out.count("\n42\r"), out.count("FAIL(")), (1, 1, 2), out)


@unittest.skipUnless(os.path.exists(f"/proc/self/task/{os.getpid()}/children"), "not Linux")
class NothingLeftBehindTest(unittest.TestCase):
    """Whatever ends a command, a client or a worker: no process survives."""

    # every way in which a process can leave its family, with its pid in a file
    ESCAPES = """
        sleep 1000 & echo $! >> {0}
        (sleep 1000 & echo $! >> {0})
        setsid sh -c 'echo $$ >> {0}; exec sleep 1000' &
        (setsid sh -c '(sleep 1000 & echo $! >> {0}) & echo $$ >> {0}; exec sleep 1000' &)
        (env -i setsid sh -c 'trap "" TERM HUP; echo $$ >> {0}; sleep 1000; sleep 1000' &)
        while [ $(wc -l < {0}) -lt 6 ]; do sleep 0.01; done
        """

    def setUp(self):
        self.cloud = Cloud(self)
        self.pids = os.path.join(self.cloud.dir, "pids")
        path = os.path.join(self.cloud.dir, "escape")
        with open(path, "w") as file:
            file.write(f": >> {self.pids}\n" + self.ESCAPES.format(self.pids))
        self.escape = f"sh {path}"

    def wait_for_escapes(self):
        self.cloud.wait_for(lambda: len(tc.read_text(self.pids).split()) == 6, "six processes")

    def assert_all_gone(self):
        self.cloud.wait_for(lambda: not any(map(is_alive, self.left())), "the end of all")

    def left(self):
        pids = tc.read_text(self.pids).split()
        self.assertEqual(len(pids), 6)
        return pids

    def run_on_worker(self, *commands, slots="1"):
        broker = self.cloud.broker()
        worker = self.cloud.worker(broker, "-j", slots)
        return worker, self.cloud.client(broker, commands, wait=False)

    def test_a_command_that_ends(self):
        worker, client = self.run_on_worker(self.escape, "true")
        self.assertEqual(self.cloud.finish(client)[0], 0)
        self.assertFalse(any(map(is_alive, self.left())))

    def test_a_command_beside_others_that_go_on(self):
        marked = self.escape.replace("sh ", "sed -i 's/env -i//' ", 1)  # with our variables
        worker, client = self.run_on_worker(f"{marked}; {self.escape}", "cat fifo", slots="2")
        os.mkfifo(os.path.join(self.cloud.dir, "fifo"))
        self.wait_for_escapes()
        self.assert_all_gone()
        with open(os.path.join(self.cloud.dir, "fifo"), "w") as file:
            file.write("x")
        self.assertEqual(self.cloud.finish(client)[0], 0)

    def test_an_orphan_without_our_variables_is_killed_when_all_older_commands_have_ended(self):
        worker, client = self.run_on_worker("echo a > fifo; sleep 0.5", f"cat fifo; {self.escape}",
                                            slots="2")
        os.mkfifo(os.path.join(self.cloud.dir, "fifo"))
        self.assertEqual(self.cloud.finish(client)[0], 0)
        self.assert_all_gone()

    def test_a_cancelled_command(self):
        worker, client = self.run_on_worker(f"{self.escape}; sleep 1000")
        self.wait_for_escapes()
        client.send_signal(signal.SIGINT)
        self.assertEqual(self.cloud.finish(client)[0], 130)
        self.assert_all_gone()

    def test_a_terminated_worker(self):
        worker, client = self.run_on_worker(f"{self.escape}; sleep 1000")
        self.wait_for_escapes()
        worker.terminate()
        self.assertEqual(worker.wait(PATIENCE), 143)
        self.assertFalse(any(map(is_alive, self.left())))

    def test_a_killed_worker(self):
        worker, client = self.run_on_worker(f"{self.escape}; sleep 1000")
        self.wait_for_escapes()
        os.kill(self.cloud.inner(worker), signal.SIGKILL)
        self.assertEqual(worker.wait(PATIENCE), 137)
        self.assertFalse(any(map(is_alive, self.left())))
        self.assertIn("killed by signal 9", self.cloud.err(worker))

    def test_a_killed_supervisor(self):
        worker, client = self.run_on_worker(f"{self.escape}; sleep 1000")
        self.wait_for_escapes()
        inner = self.cloud.inner(worker)
        worker.kill()
        self.cloud.wait_for(lambda: not is_alive(inner), "the end of the worker")
        self.assert_all_gone()

    def test_locally(self):
        for number, status in ((signal.SIGKILL, 137), (signal.SIGTERM, 143)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.pids)
            client = self.cloud.start("client", "--local", stdin=subprocess.PIPE)
            client.stdin.write(f"{self.escape}; sleep 1000\n".encode())
            client.stdin.flush()
            self.wait_for_escapes()
            os.kill(self.cloud.inner(client), number)
            self.assertEqual(client.wait(PATIENCE), status)
            self.assertFalse(any(map(is_alive, self.left())))

    def test_zombies_do_not_pile_up(self):
        worker, client = self.run_on_worker(
            "for i in 1 2 3 4 5 6 7 8; do (setsid true &); done; sleep 1000", "true", slots="1")
        inner = self.cloud.inner(worker)
        self.cloud.wait_for(lambda: len(children_of(inner)) > 3, "orphans")
        self.cloud.wait_for(lambda: not children_of(inner), "their end")

    def test_a_signal_to_the_whole_group_counts_once(self):
        broker = self.cloud.broker()
        worker = self.cloud.start("worker", "--connect", broker.workers, "-j", "1",
                                  "--kill-grace", "0.3", start_new_session=True)
        flag = os.path.join(self.cloud.dir, "flag")
        self.cloud.client(broker, [f"trap 'sleep 0.1; echo done > {flag}' TERM; echo up > {flag}; "
                                   "sleep 1000 & wait"], wait=False)
        self.cloud.wait_for(lambda: tc.read_text(flag) == "up\n", "the start")
        os.killpg(worker.pid, signal.SIGINT)
        self.assertEqual(worker.wait(PATIENCE), 130)
        self.assertEqual(tc.read_text(flag), "done\n")  # was given its time

    def test_a_worker_ends_with_the_ssh_that_started_it(self):
        """Not before: without stdin, as of `ssh -n`, it goes on. Other pipes do not end it."""
        broker = self.cloud.broker()
        ssh, nohup = {"SSH_CONNECTION": "x"}, {
            "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
        for connection, more in (({}, {}), (ssh, nohup), (ssh, {})):
            worker = self.cloud.start(
                "worker", "--connect", broker.workers, "-j", "1", "--drain", "9",
                start_new_session=True, stdin=subprocess.PIPE,
                env=dict(os.environ, **connection), **more)
            worker.stdout.readline()
            worker.stdin.close()
            self.assertEqual(self.cloud.client(broker, ["true"])[0], 0)
            flag = os.path.join(self.cloud.dir, "flag")
            client = self.cloud.client(
                broker, [f"echo up > {flag}; until [ -e {flag}-end ]; do sleep 0.01; done"],
                wait=False)
            self.cloud.wait_for(lambda flag=flag: tc.read_text(flag), "the start")
            worker.stdout.close()
            tied = bool(connection and not more)
            if tied:
                ask = ("status", "--json", "--connect", broker.clients)
                self.cloud.wait_for(lambda: '"slots": 0' in self.cloud.finish(
                    self.cloud.start(*ask))[1], "its leaving")  # noqa: B023
            open(f"{flag}-end", "w").close()
            self.assertEqual(self.cloud.finish(client)[0], 0)  # it was given time to end
            if not tied:
                self.assertEqual(self.cloud.client(broker, ["true"])[0], 0)
                worker.terminate()
            self.assertEqual(worker.wait(PATIENCE), 129 if tied else 143)
            os.unlink(flag)
            os.unlink(f"{flag}-end")

    def test_whatever_signal_ends_both_of_us_ends_the_commands(self):
        for number in (signal.SIGQUIT, signal.SIGUSR1, signal.SIGALRM, signal.SIGPROF, signal.SIGIO,
                       signal.SIGABRT, signal.SIGRTMIN + 1, signal.SIGSEGV):
            client = self.cloud.start("client", "--local", stdin=subprocess.PIPE,
                                      start_new_session=True)
            pid = os.path.join(self.cloud.dir, f"pid-{number}")
            client.stdin.write(f"echo $$ > {pid}; sleep 1000\n".encode())
            client.stdin.flush()
            self.cloud.wait_for(lambda pid=pid: tc.read_text(pid), "the start")
            os.killpg(client.pid, number)
            self.assertEqual(client.wait(PATIENCE), 128 + number, number)
            self.assertFalse(is_alive(int(tc.read_text(pid))), number)

    def test_commands_do_not_inherit_what_we_ignore_or_block(self):
        ignored = {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGTTOU}
        blocked = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM}

        def be_started_so():
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        show = "grep -E '^Sig(Blk|Ign):' /proc/self/status"
        for portable in (False, True):
            flag = os.path.join(self.cloud.dir, f"up-{portable}")
            self.cloud.script = os.path.join(self.cloud.dir, "start.py")
            with open(self.cloud.script, "w") as file:
                file.write("import sys, testcloud as tc\ndef none(*_):\n  raise OSError\n"
                           f"if {portable}: tc.Spawner = none\nsys.exit(tc.main())")
            process = self.cloud.start(
                "client", "--local", "--raw", stdin=subprocess.PIPE, preexec_fn=be_started_so,
                env=dict(os.environ, PYTHONPATH=HERE))
            process.stdin.write(f"{show}; echo > {flag}\n".encode())
            process.stdin.flush()
            self.cloud.wait_for(lambda flag=flag: tc.read_text(flag), "the command")
            for number in ignored - {signal.SIGUSR1, signal.SIGTTOU}:  # they go on being ignored
                process.send_signal(number)
            status, out = self.cloud.finish(process)
            # those that libc keeps for itself nobody can reset
            head, _, ignored_ones = out.strip().rpartition("\t")
            ours = sum(1 << number - 1 for number in signal.valid_signals())
            out = f"{head}\t{int(ignored_ones, 16) & ours:016x}\n"
            wanted = "SigBlk:\t" + "0" * 16 + "\nSigIgn:\t" + "0" * 16 + "\n"
            left = wanted[:-7] + "200000\n" if portable else wanted  # SIGTTOU
            self.assertEqual((status, out), (0, left), portable)


class OverHosts:
    """What must work on any hosts, be they of a real ssh or not."""

    NAMES = ("alpha", "beta", "gamma")
    OPTIONS = ()

    def start(self, *argv, commands=(), keep=False, **more):
        """With `keep` its stdin stays open."""
        process = self.cloud.start(*argv, *self.OPTIONS, stdin=subprocess.PIPE, **more)
        process.stdin.write("".join(f"{line}\n" for line in commands).encode())
        process.stdin.flush()
        if not keep:
            process.stdin.close()
            process.stdin = None
        return process

    def client(self, logins, commands, *options, wait=True, **more):
        process = self.start("client", "--ssh", self.hosts.ssh, "-S", logins, *options,
                             commands=commands, **more)
        return self.cloud.finish(process) if wait else process

    def path(self, name):
        return os.path.join(self.cloud.dir, name)

    def wait_for_text(self, name, text=""):
        """In a file that a command writes."""
        path = self.path(name)
        self.cloud.wait_for(lambda: os.path.exists(path) and text in tc.read_text(path),
                            f"{text!r} in {name}")

    def meet(self, count):
        """A command that ends when so many of its kind run at once."""
        return (f"touch met-$TESTCLOUD_RUN-$TESTCLOUD_SEQ; until [ $(ls | "
                f"grep -c ^met-$TESTCLOUD_RUN) -ge {count} ]; do sleep 0.01; done")

    def rows(self, out):
        return [json.loads(line) for line in out.splitlines()]

    def assert_nobody_left(self, *names):
        """Nor what commands of busy_client() have started, however it tried to get away."""
        def left():
            pids = "".join(tc.read_text(str(path)) for path in pathlib.Path(self.cloud.dir).glob(
                "escaped-*")).split()
            return any(map(self.hosts.pids, names or self.NAMES)) or any(map(is_alive, pids))
        self.cloud.wait_for(lambda: not left(), "the end of all that ran on the hosts")

    def worker_of(self, name):
        """The pids of a host's worker: its supervisor and itself."""
        found = []

        def look():
            found.extend(
                (pid, child) for pid in self.hosts.pids(name) for child in children_of(pid)
                if all(b"-c\0" in read_bytes(f"/proc/{one}/cmdline")
                       and "python" in os.path.basename(os.readlink(f"/proc/{one}/exe"))
                       for one in (pid, child)))
            return found
        self.cloud.wait_for(look, f"a worker on {name}")
        return found[0]

    def ssh_of(self, process, name):
        """The pid of the ssh that a client or worker has started for a host."""
        found = []
        ssh = self.hosts.ssh.split()[-1].encode()
        self.cloud.wait_for(lambda: found.extend(
            pid for pid in descendants_of(process.pid)
            for argv in [read_bytes(f"/proc/{pid}/cmdline").split(b"\0")]
            if ssh in argv[:-1] and name.encode() in argv and SCRIPT.encode() not in argv)
            or found, f"an ssh for {name}")
        return found[0]

    def busy_client(self, *options):
        """A client with a command on alpha and two on beta, which run until end()."""
        with open(self.path("escape"), "w") as file:
            file.write(NothingLeftBehindTest.ESCAPES.format("PIDS"))
        process = self.client(
            "1/alpha,2/beta", [
                f"e=escaped-{n}-$$; : > $e; sh -c \"$(sed s/PIDS/$e/g escape)\"; "
                f"echo {n} ${{TEST_HOST##*/}} >> begun; "
                f"until [ -e end ] || [ -e end-{n} ]; do sleep 0.02; done; echo {n} >> done"
                for n in (1, 2, 3)], "--json", *options, wait=False)
        self.wait_for_begun(3)
        return process

    def begun(self):
        """Number and host of each command that was begun, again if it was."""
        return [line.split() for line in tc.read_text(self.path("begun")).splitlines()]

    def wait_for_begun(self, count):
        self.cloud.wait_for(lambda: len(self.begun()) >= count, f"the start of {count} commands")

    def end(self, process):
        """Let the commands end. Each is reported once, and has ended once."""
        open(self.path("end"), "w").close()
        status, out = self.cloud.finish(process)
        self.assertEqual((status, sorted(row["seq"] for row in self.rows(out))), (0, [1, 2, 3]))
        self.assertEqual(wrong_times(self.path("done"), 3), {})
        self.assert_nobody_left()

    # --- runs

    def test_three_hosts_from_one_command(self):
        commands = [f"echo {n} >> done; {self.meet(4)}; echo out {n}" for n in range(1, 41)]
        status, out = self.client("1/alpha,2/beta,gamma", commands, "-j1", "--json")
        self.assertEqual(status, 0, out)
        self.assertEqual(wrong_times(self.path("done"), 40), {})
        rows = self.rows(out)
        self.assertEqual({row["host"] for row in rows}, set(self.NAMES))
        self.assertEqual(Counter(row["output"] for row in rows),
                         Counter(f"out {n}\n" for n in range(1, 41)))
        self.assert_nobody_left()

    def test_outputs_are_the_same_bytes(self):
        """A megabyte that is no UTF-8."""
        make = r"head -c 1000000 /dev/zero | tr '\000' '\377'; echo e >&2"
        process = self.client("alpha", [make], "--raw", wait=False)
        out, _ = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, out == b"\xff" * 1_000_000), (0, True))
        self.assertIn("\ne\n", "\n" + self.cloud.err(process))

    def test_interrupted(self):
        client = self.busy_client()
        client.send_signal(signal.SIGINT)
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 130, out)
        self.assert_nobody_left()
        self.assertEqual(tc.read_text(self.path("done")), "")

    # --- losses: each command is reported once, and only those of a lost worker run again

    def check_loss(self, strike):
        """Beta has a free slot when alpha's worker is lost: its command goes there at once."""
        client = self.busy_client("--crash-limit", "9")
        by_host = {host: n for n, host in self.begun()}
        open(self.path(f"end-{by_host['beta']}"), "w").close()
        self.wait_for_text("done", f"{by_host['beta']}\n")
        strike(client)
        self.wait_for_begun(4)
        self.assertEqual(self.begun()[3], [by_host["alpha"], "beta"])
        self.cloud.wait_for_log(client, "testcloud: alpha: is back")
        self.end(client)
        self.assertEqual(len(self.begun()), 4)
        self.assertRegex(self.cloud.err(client), r"testcloud: alpha: lost: .*; trying again in 1 s")

    def test_ssh_is_killed(self):
        self.check_loss(lambda client: os.kill(self.ssh_of(client, "alpha"), signal.SIGKILL))

    def test_the_client_is_killed(self):
        client = self.busy_client()
        client.kill()
        client.wait(PATIENCE)
        self.assert_nobody_left()
        self.assertEqual(tc.read_text(self.path("done")), "")

    # --- hosts that cannot be used

    def check_bad_hosts(self, wanted):
        """Each gets one line with the cause or the fix, by name; the others go on."""
        client = self.client(",".join(["alpha", *wanted, "beta"]), [], "-j1", "--json", keep=True,
                             wait=False)
        for name in wanted:
            self.cloud.wait_for_log(client, f"testcloud: {name}: ")
        client.stdin.write(f"{self.meet(2)}\n".encode() * 2)
        status, out = self.cloud.finish(client)
        lines = self.cloud.err(client).splitlines()
        self.assertEqual((status, {row["host"] for row in self.rows(out)}), (0, {"alpha", "beta"}))
        for name, fix in wanted.items():
            found = [line for line in lines if line.startswith(f"testcloud: {name}: ")]
            self.assertEqual(len(found), 1, lines)
            self.assertRegex(found[0], fix)
            self.assertNotIn("trying again", found[0])
        self.assert_nobody_left(*self.NAMES, *wanted)
        return "\n".join(lines)

    # --- the working tree goes along

    def project(self, **files):
        """A directory of the client with these files."""
        top = self.path("project")
        for name, content in files.items():
            path = os.path.join(top, name.replace("__", "/"))
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(content)
        return top

    def test_the_working_tree_goes_along(self):
        top = self.project(data="one\n", sub__old="old\n")
        commands = [f"(cd {self.cloud.dir}; {self.meet(2)}); pwd; cat data made; ls sub; "
                    f"echo {n} > out-{n}" for n in (1, 2)]

        def run():
            status, out = self.client("alpha,beta", commands, "-j1", "--json", f"--sync={top}",
                                      "--setup", "echo set up >> made", "--return", "out-{#}")
            rows = self.rows(out)
            self.assertEqual((status, {row["host"] for row in rows}), (0, {"alpha", "beta"}))
            self.assertEqual(tc.read_text(f"{top}/out-1") + tc.read_text(f"{top}/out-2"), "1\n2\n")
            places, outputs = zip(*(row["output"].split("\n", 1) for row in rows))
            return places, {*outputs}
        places, outputs = run()
        self.assertEqual(outputs, {"one\nset up\nold\n"})
        self.assertEqual(len({*places}), 2)
        for name in ("out-1", "out-2", "sub/old"):
            os.unlink(os.path.join(top, name))
        self.project(data="two\n", sub__new="new\n")
        again, outputs = run()  # in the same workspaces, where the tree has changed
        self.assertEqual(outputs, {"two\nset up\nset up\nnew\n"})
        self.assertEqual({*again}, {*places})
        self.assert_nobody_left()

    def test_a_host_whose_setup_fails_is_out_of_the_run(self):
        top = self.project(data="x")
        fails_on = "echo is this $PWD; [ ${{TEST_HOST##*/}} != {} ]".format
        process = self.client("alpha,beta", ["true"] * 4, "-j1", "--json", f"--sync={top}",
                              "--setup", fails_on("alpha"), wait=False)
        status, out = self.cloud.finish(process)
        self.assertEqual((status, {row["host"] for row in self.rows(out)}), (0, {"beta"}), out)
        process = self.client("alpha", ["true"] * 4, f"--sync={top}", "--setup",
                              "echo is this $PWD; exit 7", wait=False)
        self.assertEqual(self.cloud.finish(process)[0], 3)
        lines = self.cloud.err(process).splitlines()
        at = lines.index("testcloud: host alpha is out of this run: the setup ended with exit "
                         "code 7")
        self.assertRegex(lines[at + 1], "^is this /.*/project-")
        self.assertIn(f"testcloud: {tc.NONE_LEFT}", lines)

    def test_a_client_is_killed_while_a_workspace_is_set_up(self):
        top = self.project(data="x")
        setup = (f"echo $PWD >> {self.path('places')}; "
                 f"until [ -e {self.path('end')} ]; do sleep 0.02; done")
        options = f"--sync={top}", "--setup", setup, "--json"
        process = self.client("alpha", ["cat data"], *options, wait=False)
        self.wait_for_text("places", "/")
        process.kill()
        process.wait(PATIENCE)
        self.assert_nobody_left("alpha")
        open(self.path("end"), "w").close()
        status, out = self.client("alpha", ["cat data"], *options)
        self.assertEqual((status, self.rows(out)[0]["output"]), (0, "x"))
        places = tc.read_text(self.path("places")).split()
        self.assertEqual(places, [places[0]] * 2)

    # --- a standing cloud

    def test_hosts_for_a_standing_cloud(self):
        broker = self.cloud.broker()
        worker = self.start("worker", "--ssh", self.hosts.ssh, "-S", "1/alpha,2/beta", "--connect",
                            broker.workers, "--label", "gpu", "--nice", "5", "--weight", "7",
                            keep=True)
        rows = []

        def all_there():
            rows[:] = json.loads(self.cloud.finish(self.cloud.start(
                "status", "--json", "--connect", broker.clients))[1])["workers"]
            return len(rows) == 2
        self.cloud.wait_for(all_there, "two workers")
        self.assertEqual({(row["slots"], *row["labels"], row["weight"]) for row in rows},
                         {(1, "gpu", 7), (2, "gpu", 7)})
        status, out = self.cloud.client(broker, [f"{self.meet(3)}; nice; head -c 3000000 /dev/zero"]
                                        * 3, "--need", "gpu", "--json")
        self.assertEqual(status, 0, out[:1000])
        self.assertEqual({row["output"] for row in self.rows(out)}, {"5\n" + "\0" * 3_000_000})
        worker.terminate()
        self.assertEqual(worker.wait(PATIENCE), 143)
        self.assert_nobody_left()


class TreesOfProcessesTest(unittest.TestCase):
    """Trees in a standing cloud, and on this machine alone."""

    def setUp(self):
        self.cloud = Cloud(self)
        self.top = os.path.join(self.cloud.dir, "project")
        os.mkdir(self.top)
        self.write("data", "one\n")

    def write(self, name, text):
        with open(os.path.join(self.top, name), "w") as file:
            file.write(text)

    def env(self, name):
        """The environment of a machine with a cache of its own."""
        return dict(os.environ, XDG_CACHE_HOME=os.path.join(self.cloud.dir, name))

    def test_over_chained_brokers_with_keys(self):
        """The tree is larger than what is under way at once."""
        self.write("large", "x" * 20_000_000)
        key = ("--key", os.path.join(self.cloud.dir, "cloud.key"))
        self.assertEqual(self.cloud.start("keygen", key[1]).wait(PATIENCE), 0)
        loopback = ("127.0.0.1:0", "127.0.0.1:0")
        upper = self.cloud.broker(*loopback, *key)
        lower = self.cloud.broker(*loopback, "--upstream", upper.workers, *key)
        for broker, name in ((upper, "a"), (lower, "b"), (lower, "c")):
            self.cloud.worker(broker, "-j1", "--host", name, *key, env=self.env(name))
        self.cloud.wait_for(lambda: sum(row["slots"] for row in self.status(
            upper, *key)["workers"]) == 3, "three workers")
        met = os.path.join(self.cloud.dir, "met")
        os.mkdir(met)
        command = (f"touch {met}/$TESTCLOUD_SEQ; until [ $(ls {met} | wc -l) = 3 ]; do sleep 0.02; "
                   f"done; cat data; wc -c < large")
        status, out = self.cloud.client(upper, [command] * 3, f"--sync={self.top}", "--json", *key)
        rows = [json.loads(line) for line in out.splitlines()]
        self.assertEqual((status, {row["host"] for row in rows}), (0, {"a", "b", "c"}), out)
        self.assertEqual({row["output"].replace(" ", "") for row in rows}, {"one\n20000000\n"})

    def status(self, broker, *options):
        return json.loads(self.cloud.finish(self.cloud.start(
            "status", "--json", "--connect", broker.clients, *options))[1])

    def test_on_this_machine(self):
        status, out = self.cloud.finish(self.cloud.start(
            "client", "--local", f"--sync={self.top}", "--json", "--return", "made/{}",
            "--setup", "echo ready > ready", "cat data ready; mkdir made; echo {} > made/{}",
            ":::", "x", env=self.env("here")))
        self.assertEqual((status, json.loads(out)["output"]), (0, "one\nready\n"))
        self.assertEqual(tc.read_text(os.path.join(self.top, "made", "x")), "x\n")
        self.assertFalse(os.path.exists(os.path.join(self.top, "ready")))

    def test_two_runs_at_once_have_a_workspace_each(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j2", env=self.env("w"))
        places = os.path.join(self.cloud.dir, "places")
        command = (f"echo $PWD >> {places}; until [ $(wc -l < {places}) -ge 2 ]; do sleep 0.02; "
                   f"done; cat data")
        options = f"--sync={self.top}", "--json"
        clients = [self.cloud.client(broker, [command], *options, wait=False) for _ in range(2)]
        self.assertEqual([self.cloud.finish(client)[0] for client in clients], [0, 0])
        self.assertEqual(len({*tc.read_text(places).split()}), 2)
        self.assertEqual(self.cloud.client(broker, [command], *options)[0], 0)
        self.assertEqual(len({*tc.read_text(places).split()}), 2)  # one of them
        self.cloud.wait_for(lambda: self.status(broker)["workers"][0]["cache"],
                            "a figure of the bytes used")

    def test_a_file_that_changes_after_it_was_hashed(self):
        broker = self.cloud.broker()
        client = self.cloud.client(broker, ["cat data gone"], f"--sync={self.top}", "--json",
                                   wait=False)
        self.write("gone", "")
        self.cloud.wait_for(lambda: any(row["queued"] for row in self.status(broker)["clients"]),
                            "the client's command")
        self.write("data", "two\n")
        self.cloud.worker(broker, env=self.env("w"))
        _, out = self.cloud.finish(client)
        self.assertTrue(json.loads(out)["output"].startswith("two\n"), out)

    def test_a_worker_asks_only_for_trees_of_commands_that_it_has(self):
        """Nor does a client send anything to another client's worker."""
        broker = self.cloud.broker()
        thief = self.cloud.dealer(broker.workers)
        thief.send(b'READY {"name":"thief","join":1,"slots":0}')
        self.assertTrue(thief.recv_multipart()[-1].startswith(b"OK"))
        client = self.cloud.client(broker, ["cat data"], f"--sync={self.top}", wait=False)
        self.cloud.wait_for(lambda: any(row["queued"] for row in self.status(broker)["clients"]),
                            "the client's command")
        for token in (b"", b"x" * 32):
            thief.send_multipart([b"", token, tc.encode("FETCH", {
                "id": 1, "attempt": 1, "offset": 0, "size": 9, "tree": "0" * 64})])
        thief.send(b'READY {"name":"thief","beat":2,"slots":0}')
        heard = [thief.recv_multipart()[-1]]
        while not heard[-1].startswith(b"OK"):
            heard.append(thief.recv_multipart()[-1])
        self.assertFalse([line for line in heard if line.startswith(b"CHUNK")])
        self.cloud.worker(broker, env=self.env("w"))
        self.assertEqual(self.cloud.finish(client)[0], 0)


class ViaTest(OverHosts, unittest.TestCase):
    """Hosts of the script that stands for ssh."""

    NOISE = "Welcome to this host!\n" * 50_000  # more than a pipe holds

    def setUp(self):
        self.cloud = Cloud(self)
        self.hosts = Hosts(self.cloud)
        for name in self.NAMES:
            self.hosts.add(name, noise=self.NOISE)

    def test_a_worker_is_killed(self):
        self.check_loss(lambda client: os.kill(self.worker_of("alpha")[1], signal.SIGKILL))

    def test_a_supervisor_is_killed(self):
        self.check_loss(lambda client: os.kill(self.worker_of("alpha")[0], signal.SIGKILL))

    def test_losses_in_a_standing_cloud(self):
        """A host's ssh is killed, then the broker, then our end of the hosts."""
        broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", "--lost-grace", "0.1")
        worker = self.start("worker", "--ssh", self.hosts.ssh, "-S", "1/alpha,1/beta", "--connect",
                            broker.workers)
        client = self.cloud.client(broker, [
            f"echo {n} ${{TEST_HOST##*/}} >> begun; until [ -e end ]; do sleep 0.02; done; "
            f"echo {n} >> done" for n in (1, 2)], wait=False)
        self.wait_for_begun(2)
        os.kill(self.ssh_of(worker, "alpha"), signal.SIGKILL)
        self.cloud.wait_for_log(worker, "testcloud: alpha: is back")
        self.wait_for_begun(3)
        broker.kill()
        broker.wait()
        self.cloud.start("broker", "--clients", broker.clients, "--workers", broker.workers)
        open(self.path("end"), "w").close()
        self.assertEqual(self.cloud.finish(client)[0], 0)
        self.assertEqual(wrong_times(self.path("done"), 2), {})
        self.assertEqual(len(self.begun()), 3)
        worker.kill()
        self.assert_nobody_left()

    def test_any_login_shell_and_any_noise_will_do(self):
        shells = [path for path in map(shutil.which, ("sh", "dash", "bash", "zsh", "csh", "tcsh",
                                                      "fish")) if path]
        names = list(map(os.path.basename, shells))
        for name, shell in zip(names, shells):
            self.hosts.add(name, shell=shell, noise=self.NOISE)
        status, out = self.client(",".join(names), [self.meet(len(names))] * len(names), "-j1",
                                  "--json")
        self.assertEqual(status, 0)
        self.assertEqual({row["host"] for row in self.rows(out)}, set(names))

    def test_nothing_is_written_on_a_host(self):
        """Nor need it be possible. pyzmq is needed neither there nor here."""
        self.hosts.add("beta", home="/nonexistent", TMPDIR="/nonexistent")
        pathlib.Path(self.path("zmq.py")).write_text("raise ImportError('not here')")
        self.cloud.script = shutil.copy(SCRIPT, self.cloud.dir)  # where no .venv is that has it
        before = {*os.listdir(self.cloud.dir), "log-0"}
        status, out = self.client("alpha,beta", ["seq 300000"] * 4, "-b",
                                  env={**os.environ, "PYTHONPATH": self.cloud.dir})
        self.assertEqual(status, 0, out)
        self.assertEqual(os.listdir(self.hosts.home("alpha")), [])
        self.assertEqual({*os.listdir(self.cloud.dir)}, before)

    def test_environment_and_directory(self):
        self.hosts.add("alpha", FROM_LOGIN="there")
        status, out = self.client(
            "alpha", ["echo $HOME $FROM_LOGIN $MINE $GIVEN $NOT_GIVEN; pwd"], "--json", "--env",
            "MINE", "--env", "GIVEN=x y", env={**os.environ, "MINE": "here", "NOT_GIVEN": "z"})
        self.assertEqual(self.rows(out)[0]["output"], f"{self.hosts.home('alpha')} there here x y\n"
                                                      f"{self.cloud.dir}\n")
        status, out = self.client("alpha", ["true"], "-C", "/no/such/place")
        self.assertEqual(status, 1)
        self.assertRegex(out, "cannot enter directory /no/such/place: .*--cwd")

    def test_live_and_timeout(self):
        os.mkfifo(self.path("fifo"))
        client = self.client("alpha", ["echo one; read x < fifo; echo $x; sleep 1000"], "--live",
                             "--timeout", "500ms", wait=False)
        lines = iter(client.stdout.readline, b"")
        self.assertTrue(any(line.endswith(b"one\n") for line in lines))
        with open(self.path("fifo"), "w") as file:
            file.write("two\n")
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 1)
        self.assertRegex(out, r"(?s)two\n.*FAIL\(124\) .*stopped after 0.5 seconds")

    def test_retries_on_other_hosts(self):
        status, out = self.client(
            "alpha,beta,gamma", [f"{self.meet(3)}; [ ${{TEST_HOST##*/}} != alpha ]"] * 3, "-j1",
            "--retries", "3", "--json")
        rows = self.rows(out)
        self.assertEqual((status, Counter((row["verdict"], row["only_on"]) for row in rows)),
                         (0, {("OK", ""): 2, ("ONLY", "alpha"): 1}))

    # what ssh says if there is no way to a host, and what our line on it must contain
    REFUSALS = {
        "denied": ("somebody@denied: Permission denied (publickey,password).\r\n", "ssh-copy-id"),
        "refused": ("ssh: connect to host refused port 22: Connection refused\r\n",
                    "connection refused: is sshd running"),
        "late": ("ssh: connect to host late port 22: Connection timed out\r\n",
                 "cannot be reached"),
        "far": ("ssh: connect to host far port 22: No route to host\r\n", "cannot be reached"),
        "new": ("No ED25519 host key is known for new and you have requested strict checking.\r\n"
                "Host key verification failed.\r\n", "accept it once with: .* new$"),
        "changed": (
            "@" * 59 + "\r\n@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @\r\n"
            + "@" * 59 + "\r\nIT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!\r\n"
            "Add correct host key in /home/x/.ssh/known_hosts to get rid of this message.\r\n"
            "Host key for changed has changed and you have requested strict checking.\r\n"
            "Host key verification failed.\r\n", "ssh-keygen -R"),
        "odd": ("Bad configuration option: nosuch\r\n", "Bad configuration option: nosuch"),
    }

    def test_hosts_that_cannot_be_used(self):
        """Each gets one line, and is not asked again; the others go on."""
        for name, (text, _) in self.REFUSALS.items():
            self.hosts.add(name, refusal=text)
        self.hosts.add("bare", python=None)
        self.hosts.add("old", python=self.hosts.old_python())
        self.hosts.add("locked", shell=self.hosts.write(
            "nologin", "#!/bin/sh\necho This account is not available.\nexit 1\n"))
        wanted = {**{name: fix for name, (_, fix) in self.REFUSALS.items()},
                  "nowhere": "unknown host", "bare": "--python", "old": r"3\.6.*--python",
                  "locked": "not available"}
        err = self.check_bad_hosts(wanted)
        self.assertNotIn("Welcome", err)
        for name in wanted:
            logins = self.hosts.logins(name)
            self.assertEqual(len(logins), name != "nowhere")
            self.assertTrue(all("BatchMode=yes" in argv for argv in logins))

    def test_without_any_usable_host(self):
        self.hosts.add("denied", refusal=self.REFUSALS["denied"][0])
        for argv in (["client"], ["worker", "--connect", self.cloud.broker().workers]):
            for ssh, fix in ((self.hosts.ssh, "ssh-copy-id"), ("/no/such/ssh -v", "--ssh")):
                process = self.start(*argv, "--ssh", ssh, "-S", "denied,denied", commands=["true"])
                self.assertEqual(self.cloud.finish(process)[0], 3)
                err = self.cloud.err(process)
                self.assertRegex(err, f"testcloud: denied: .*{fix}")
                self.assertEqual(err.count("denied is named 2 times"), 1)

    def test_a_login_that_sshd_drops_is_tried_again(self):
        text = ("kex_exchange_identification: Connection closed by remote host\r\n"
                "Connection closed by 127.0.0.1 port 22\r\n")
        self.hosts.add("alpha", refusal=text, refusals=1)
        self.assertEqual(self.client("alpha", ["true"])[0], 0)
        self.assertEqual(len(self.hosts.logins("alpha")), 2)

    def test_silence_ends_a_worker_and_a_host(self):
        """The client stops, then a host: what runs there ends, and runs again elsewhere."""
        self.change(BEAT_INTERVAL=0.1, MAX_SILENT_BEATS=8)
        client = self.busy_client("--crash-limit", "9")
        client.send_signal(signal.SIGSTOP)
        self.assert_nobody_left()
        client.send_signal(signal.SIGCONT)
        self.wait_for_begun(6)
        open(self.path(f"end-{next(n for n, host in self.begun()[3:] if host == 'beta')}"),
             "w").close()
        self.wait_for_text("done", "\n")
        os.kill(self.ssh_of(client, "alpha"), signal.SIGSTOP)
        self.wait_for_begun(7)
        self.assertEqual(self.begun()[6][1], "beta")
        self.cloud.wait_for_log(client, "testcloud: alpha: lost: silent for ")
        self.end(client)

    def change(self, **constants):
        """Have a program of our own with these."""
        with open(SCRIPT) as file:
            text = file.read()
        for name, value in constants.items():
            text, times = re.subn(f"(?m)^({name}(: \\w+)? = )[0-9.]+", rf"\g<1>{value}", text)
            self.assertEqual(times, 1, name)
        self.cloud.script = self.hosts.write("testcloud.py", text)

    def test_login_shells_that_never_end(self):
        self.change(START_TIMEOUT=0.5)
        for name, command in (("mute", "cat > /dev/null"), ("endless", shutil.which("yes"))):
            self.hosts.add(name, shell=self.hosts.write(f"{name}.sh", f"#!/bin/sh\n{command}\n"))
        client = self.client("mute,endless", ["true"], wait=False)
        self.assertEqual(self.cloud.finish(client)[0], 3)
        for name in ("mute", "endless"):
            self.assertRegex(self.cloud.err(client), f"testcloud: {name}: not ready after 0.5 s.*"
                             f"login shell.* {name} ?")
        self.assert_nobody_left("mute", "endless")

    def test_large_outputs_and_lost_workers(self):
        commands = [f"echo {n} >> begun; sleep 0.05; head -c {300_000 + n} /dev/zero"
                    for n in range(1, 61)]
        client = self.client("alpha,beta,gamma", commands, "-j1", "--json", "--crash-limit", "9",
                             wait=False)
        lines = []
        reader = threading.Thread(target=lambda: lines.extend(client.stdout))
        reader.start()
        for at, strike in ((5, lambda: self.ssh_of(client, "alpha")),
                           (20, lambda: self.ssh_of(client, "gamma")),
                           (35, lambda: self.worker_of("beta")[1])):
            self.wait_for_begun(at)
            os.kill(strike(), signal.SIGKILL)
        self.assertEqual(client.wait(PATIENCE), 0)
        reader.join()
        self.assertEqual(sorted((row["seq"], len(row["output"])) for row in map(json.loads, lines)),
                         [(n, 300_000 + n) for n in range(1, 61)])

    def test_this_machine_is_a_host_too(self):
        status, out = self.client("2/alpha,somebody@beta,1/:", [f"{self.meet(4)}; hostname"] * 4,
                                  "-j1")
        self.assertEqual(status, 0)
        self.assertRegex(out, r"^Connecting to alpha \(2 slots\), somebody@beta \(1 slot\), this "
                              r"machine \(1 slot\)\nReleasing the hounds: 4 commands ")

    def test_via(self):
        process = self.start("client", "--via", self.hosts.via("alpha"), "--via",
                             f"2/{self.hosts.via('beta')}", "-j1", "--json",
                             commands=[f"{self.meet(3)}; echo $TEST_HOST"] * 3)
        status, out = self.cloud.finish(process)
        self.assertEqual(status, 0, out)
        rows = self.rows(out)
        self.assertEqual({os.path.basename(row["output"].strip()) for row in rows},
                         {"alpha", "beta"})
        self.assertEqual({row["host"] for row in rows}, {socket.gethostname()})


@unittest.skipUnless(all(Sshd.PROGRAMS), "there is no sshd: apt install openssh-server")
class SshTest(OverHosts, unittest.TestCase):
    """Hosts of a real sshd on loopback."""

    OPTIONS = ("--python", sys.executable)

    def setUp(self):
        self.cloud = Cloud(self)
        self.hosts = Sshd(self.cloud, self.NAMES)
        done = subprocess.run([*shlex.split(self.hosts.ssh), "alpha", "true"], text=True,
                              capture_output=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        if done.returncode:
            self.skipTest(f"this sshd lets nobody in: {done.stderr.strip()}")

    def test_forty_logins_through_one_sshd(self):
        names = [f"host{n}" for n in range(40)]
        self.hosts.configure(names)
        status, out = self.client(",".join(names), [self.meet(40)] * 40, "-j1", "--json")
        self.assertEqual(status, 0)
        self.assertEqual({row["host"] for row in self.rows(out)}, set(names))
        dropped = self.cloud.err(self.cloud.processes[-1]).count("drops logins")
        self.assertLess(dropped, 10)  # a slow sshd may have a few at once that we do not count
        self.assert_nobody_left(*names)

    def test_sshd_is_killed(self):
        self.check_loss(lambda client: os.kill(self.hosts.session("alpha"), signal.SIGKILL))

    def test_control_master(self):
        """A connection that outlives its ssh, and is shared."""
        self.hosts.configure(self.NAMES, {}, ControlMaster="auto", ControlPersist=60,
                             ControlPath=self.path("control"))
        try:
            for _ in range(2):
                status, out = self.client("alpha,beta", [self.meet(2)] * 2, "-j1", "--json")
                self.assertEqual(status, 0)
                self.assertEqual({row["host"] for row in self.rows(out)}, {"alpha", "beta"})
            self.assert_nobody_left()
        finally:
            subprocess.run([*shlex.split(self.hosts.ssh), "-O", "exit", "alpha"], timeout=PATIENCE,
                           stderr=subprocess.DEVNULL)

    def test_hosts_that_cannot_be_used(self):
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # and does not listen
            self.hosts.configure(["alpha", "beta"], {
                "denied": {"User": "nobody-of-this-name"}, "changed": {"HostKeyAlias": "changed"},
                "refused": {"Port": closed.getsockname()[1]},
                "new": {"UserKnownHostsFile": "/dev/null"}})
            wanted = {"denied": "ssh-copy-id", "changed": "ssh-keygen -f .* -R",
                      "new": "accept it once with: .*ssh -F .* new$",
                      "refused": "connection refused: is sshd running"}
            self.check_bad_hosts(wanted)


class Proxy:
    """A TCP proxy on loopback whose connections can fall silent, lose what is sent, or break.
    What it does to connections it does to those that there are; new ones work."""

    def __init__(self, target):
        host, port = target[6:].rsplit(":", 1)
        self.target = (host, int(port))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.pairs = []
        self.recorded = None
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:  # we are being closed
                return
            try:
                far = socket.create_connection(self.target)
            except OSError:  # the broker is not there now
                near.close()
                continue
            pair = types.SimpleNamespace(sockets=(near, far), deaf=False, going=threading.Event(),
                                         over=False, pumps=[])
            pair.going.set()
            for a, b in ((near, far), (far, near)):
                pair.pumps.append(threading.Thread(target=self.pump, args=(a, b, pair),
                                                   daemon=True))
                pair.pumps[-1].start()
            self.pairs.append(pair)

    def pump(self, a, b, pair):
        try:
            while not pair.over:
                data = a.recv(65536)
                pair.going.wait()
                if pair.over:
                    return
                if not data:
                    b.shutdown(socket.SHUT_WR)
                    return
                if self.recorded is not None:
                    self.recorded += data
                    self.sent += data if a is pair.sockets[0] else b""
                if not pair.deaf:
                    b.sendall(data)
        except OSError:  # one of the two has broken off: so must the other
            for one in (a, b):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def record(self):
        """Keep what passes from now on, both ways, and what is sent to the target."""
        self.recorded, self.sent = bytearray(), bytearray()

    def swallow(self):
        """Lose all that is sent from now on, and do not tell."""
        for pair in self.pairs:
            pair.deaf = True

    def freeze(self):
        """Keep what is sent back until thaw()."""
        for pair in self.pairs:
            pair.going.clear()

    def thaw(self):
        for pair in self.pairs:
            pair.going.set()

    def cut(self):
        """Break all connections with a reset, and lose what was under way."""
        pairs, self.pairs = self.pairs, []
        for pair in pairs:
            pair.over = True
            pair.going.set()
            for one in pair.sockets:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RD)  # wakes its pump, and says nothing to the peer
            for pump in pair.pumps:  # lest it reads from another file of the same number
                pump.join(1)
            for one in pair.sockets:
                one.close()

    def close(self):
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.listener.close()
        self.cut()


class RawPeersTest(unittest.TestCase):
    """Raw pyzmq peers that know only the seed's README, against our broker and other half."""

    def setUp(self):
        self.cloud = Cloud(self)
        self.broker = self.cloud.broker()

    def test_raw_client_with_our_worker(self):
        self.cloud.worker(self.broker, "-j", "2")
        for identity in (None, b"host#client12", b"\xff\x01"):
            client = self.cloud.dealer(self.broker.clients, identity)
            for cmd in ("echo 3.12", "echo 3.12", "pwd"):
                client.send(json.dumps({"cmd": cmd, "cwd": "/"}).encode())
            got = [client.recv_multipart() for _ in range(6)]
            self.assertTrue(all(len(parts) == 1 for parts in got))
            lines = [parts[0].split(b" ", 1) for parts in got]
            results = [json.loads(rest) for verb, rest in lines if verb == b"RESULT"]
            queued = [json.loads(rest) for verb, rest in lines if verb == b"QUEUED"]
            self.assertEqual(sorted(r["cmd"] for r in results), ["echo 3.12", "echo 3.12", "pwd"])
            self.assertEqual(sorted(q["cmd"] for q in queued), ["echo 3.12", "echo 3.12", "pwd"])
            for result in results:
                self.assertEqual(result["exitcode"], 0)
                self.assertGreater(result["time"], 0)
                self.assertEqual(result["stdout"], "/\n" if result["cmd"] == "pwd" else "3.12\n")

    def raw_worker(self, rounds, identity=None):
        """Serve that many commands as the seed's worker does, in a thread."""
        sock = self.cloud.dealer(self.broker.workers, identity)
        served = []

        def serve():
            for _ in range(rounds):
                sock.send(b"READY")
                assert sock.recv_multipart() == [b"OK"]
                empty, token, body = sock.recv_multipart()
                assert empty == b""
                request = json.loads(body)
                served.append(request)
                sock.send_multipart([b"", token, b"QUEUED " + body])
                result = {"cmd": request["cmd"], "exitcode": 0, "time": 13.95,
                          "stdout": request["cmd"].upper() + "\n"}
                sock.send_multipart([b"", token, b"RESULT " + json.dumps(result).encode()])
            sock.send(b"READY")
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        return thread, served

    def test_raw_worker_with_our_client(self):
        thread, served = self.raw_worker(4, b"host#worker7")
        status, out = self.cloud.client(self.broker, ["a", "b", "a", "c"], "-C", "/x")
        thread.join(PATIENCE)
        self.assertEqual(status, 0)
        self.assertEqual(out.count("OK! a ⌚13.95ms\nA\n\n"), 2)
        self.assertEqual([r["cwd"] for r in served], ["/x"] * 4)

    def test_a_raw_worker_that_takes_all_that_it_gets_for_commands(self):
        sock = self.cloud.dealer(self.broker.workers, b"host#worker8")
        sock.send(b"READY")
        served = []

        def serve():
            """Until there is nothing more, for longer than our answers are counted."""
            while len(served) < 1000 and sock.poll(2500 if served else PATIENCE * 1000):
                *empty, body = sock.recv_multipart()
                request = json.loads(body) if body.startswith(b"{") else {}
                served.append(request.get("cmd"))
                sock.send_multipart([*empty, b"QUEUED " + body])
                result = {"exitcode": 0, "stdout": "x\n", **request} if request else None
                words = b"" if request.get("cmd") == "b" else json.dumps(result).encode()
                sock.send_multipart([*empty, b"RESULT " + words])
                sock.send(b"READY")
        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join)
        status, out = self.cloud.client(self.broker, ["a", "b", *["c"] * 98])
        thread.join()
        self.assertEqual(status, 1)
        self.assertEqual((out.count("OK! "), out.count("its result cannot be read")), (99, 1), out)
        self.assertRegex(out, r"FAIL\(126\).* b\b")
        self.assertEqual(len([cmd for cmd in served if cmd]), 100)
        self.assertLess(served.count(None), 6)

    def test_raw_clients_get_utf8_and_an_answer_to_what_is_no_command(self):
        self.cloud.worker(self.broker, "-j", "1")
        client = self.cloud.dealer(self.broker.clients)
        for body in (b"", b"nonsense", b"{"):
            client.send(body)
            self.assertEqual(client.recv()[:6], b"ERROR ")
        for cmd, shown in (("printf '\\377\\342\\230'", "\ufffd" * 2),
                           ("yes ☃ | tr -d '\\n' | head -c 300000", "☃" * (tc.PLAIN_INLINE // 3))):
            client.send(json.dumps({"cmd": cmd}).encode())
            self.assertEqual(client.recv()[:7], b"QUEUED ")
            result = json.loads(client.recv()[7:].decode())
            self.assertEqual(result["stdout"].partition("\n")[0], shown)
            result["stdout"].encode()

    def test_raw_worker_with_raw_client(self):
        thread, _ = self.raw_worker(3)
        client = self.cloud.dealer(self.broker.clients)
        for _ in range(3):
            client.send(b'{"cmd":"pi 2"}')
        got = [client.recv() for _ in range(6)]
        thread.join(PATIENCE)
        self.assertEqual(got.count(b'QUEUED {"cmd":"pi 2"}'), 3)
        for line in got:
            if line.startswith(b"RESULT"):
                self.assertEqual(json.loads(line[7:]), {
                    "cmd": "pi 2", "exitcode": 0, "stdout": "PI 2\n", "time": 13.95})

    def test_a_routing_id_used_again_at_once_belongs_to_the_new_connection(self):
        workers = [self.cloud.dealer(self.broker.workers, b"w")]
        workers[0].send(b"READY")
        workers[0].recv()
        client = self.cloud.dealer(self.broker.clients, b"me")
        client.send(b'{"cmd":"x"}')
        token, body = workers[0].recv_multipart()[1:]
        workers[0].send_multipart([b"", token, b"QUEUED " + body])
        self.assertEqual(client.recv(), b'QUEUED {"cmd":"x"}')
        workers.append(self.cloud.dealer(self.broker.workers, b"w"))  # the first is still there
        workers[1].send(b"READY")
        got = [workers[1].recv_multipart() for _ in range(2)]
        token = next(parts[1] for parts in got if parts != [b"OK"])
        workers[1].send_multipart([b"", token, b'RESULT {"cmd":"x","exitcode":0,"stdout":"2"}'])
        self.assertEqual(json.loads(client.recv()[7:])["stdout"], "2")
        again = self.cloud.dealer(self.broker.clients, b"me")
        again.send(b'{"cmd":"y"}')
        workers[1].send(b"READY")
        self.assertEqual(workers[1].recv_multipart(), [b"OK"])
        token, body = workers[1].recv_multipart()[1:]
        workers[1].send_multipart([b"", token, b"QUEUED " + body])
        self.assertEqual(again.recv(), b'QUEUED {"cmd":"y"}')

    def test_killed_raw_worker_loses_its_command_to_another(self):
        first = self.cloud.dealer(self.broker.workers)
        first.send(b"READY")
        first.recv()
        client = self.cloud.dealer(self.broker.clients)
        client.send(b'{"cmd":"echo hi"}')
        _, token, body = first.recv_multipart()
        first.send_multipart([b"", token, b"QUEUED " + body])
        self.assertTrue(client.recv().startswith(b"QUEUED"))
        first.close(0)
        self.cloud.worker(self.broker)
        while True:
            line = client.recv()
            if line.startswith(b"RESULT"):
                break
        self.assertEqual(json.loads(line[7:])["stdout"], "hi\n")

    def test_connections_that_say_nothing_are_not_mistaken_for_those_that_do(self):
        broker = self.cloud.broker()
        self.cloud.worker(broker, "-j", "1")
        host, port = broker.clients[6:].split(":")
        done = threading.Event()

        def probe():
            while not done.is_set():
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                    pass
        prober = threading.Thread(target=probe)
        prober.start()
        self.addCleanup(prober.join)
        self.addCleanup(done.set)
        import zmq
        context = zmq.Context()
        self.addCleanup(context.term)
        for n in range(300):
            with context.socket(zmq.DEALER) as raw:
                raw.setsockopt(zmq.LINGER, 0)
                raw.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
                raw.connect(broker.clients)
                raw.send(b'{"cmd":"true"}')
                self.assertEqual(raw.recv()[:7], b"QUEUED ", n)
                self.assertEqual(raw.recv()[:7], b"RESULT ", n)

    def test_a_plain_client_that_does_not_read_does_not_fill_the_broker(self):
        import zmq
        before = peak_memory(self.broker.pid)
        self.cloud.worker(self.broker, "-j", "2")
        deaf = self.cloud.dealer(self.broker.clients)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.disconnect(self.broker.clients)
        deaf.connect(self.broker.clients)
        for _ in range(1000):
            deaf.send(b'{"cmd":"head -c 250000 /dev/zero | tr \\\\0 x"}')
        self.cloud.wait_for_log(self.broker, "does not read: connection closed")
        status, out = self.cloud.client(self.broker, ["echo hi"] * 3)
        self.assertEqual((status, out.count("OK!")), (0, 3))
        self.assertLess(peak_memory(self.broker.pid) - before, 113 * 1024)  # KiB

    HELLO = (b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 48
             + b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\6DEALER\x08Identity\0\0\0\0")  # of ZMTP 3.0

    @unittest.skipUnless(sys.platform == "linux", "not Linux")
    def test_a_message_without_end_is_cut_off(self):
        """libzmq would keep all its frames in memory until the last one comes."""
        self.cloud.worker(self.broker, "-j", "2")
        for words in (b"", b'\0\x0e{"cmd":"true"}'):  # a stranger, and one that is known
            peer = socket.create_connection(tc.split_tcp(self.broker.clients))
            self.addCleanup(peer.close)
            peer.sendall(self.HELLO)
            answer = b""
            while b"READY" not in answer:
                answer += peer.recv(200)
            if words:
                peer.sendall(words)
                self.cloud.wait_for_log(self.broker, "plain client")
            frame = b"\x03" + (10**6).to_bytes(8, "big") + b"x" * 10**6
            with self.assertRaises(OSError):
                for n in range(20_000):
                    peer.sendall(frame)
                    if n > 200:  # slower than this machine can, so that it need not have 20 GB
                        time.sleep(0.005)
        self.assertIn("its message does not end", self.cloud.err(self.broker))
        status, out = self.cloud.client(self.broker, ["echo hi"] * 3)
        self.assertEqual((status, out.count("OK!")), (0, 3))

    def test_a_flood_of_large_messages_does_not_fill_the_broker(self):
        peers = [self.cloud.dealer(self.broker.clients) for _ in range(6)]
        for _ in range(200):
            for peer in peers:
                peer.send(b"x" * 1_000_000)
        for peer in peers:
            self.assertIn(b"unknown verb", peer.recv())
            peer.send(b'{"cmd":"x"}')
        self.cloud.worker(self.broker)
        for peer in peers:
            while not peer.recv().startswith(b"RESULT"):
                pass
        self.assertLess(peak_memory(self.broker.pid), 500 * 1024)  # of 1.2 GB that came

    def test_no_web_page_can_have_a_browser_send_a_command(self):
        """A body of frames as of ZMTP 1.0, which shakes no hands, after headers that are noise."""
        self.cloud.worker(self.broker)
        ran = os.path.join(self.cloud.dir, "ran")
        command = b'{"cmd":"touch %s"}' % ran.encode()
        body = b"\1\0" * 600 + bytes([len(command) + 1]) + b"\0" + command
        for path in range(1, 40):
            head = (b"POST /%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n"
                    b"Content-Length: %d\r\n\r\n" % (b"x" * path, len(body)))
            with socket.create_connection(tc.split_tcp(self.broker.clients)) as page, \
                    contextlib.suppress(OSError):
                page.sendall(head + body)
                page.shutdown(socket.SHUT_WR)
                while page.recv(1000):
                    pass
        self.cloud.wait_for_log(self.broker, "it sent nothing")
        status, out = self.cloud.client(self.broker, [f"ls {ran}"])
        self.assertEqual(status, 1, out)

    def test_noise_at_both_ports_disturbs_nobody(self):
        self.cloud.worker(self.broker, "-j", "2")
        done = os.path.join(self.cloud.dir, "done")
        client = self.cloud.client(self.broker, [f"echo {n} >> {done}" for n in range(1, 201)],
                                   wait=False)
        r = random.Random(5)
        for address in (self.broker.clients, self.broker.workers):
            for _ in range(5):
                peer = self.cloud.dealer(address)
                for line in MessagesTest.MALFORMED:
                    peer.send_multipart([b""] * r.randint(0, 3) + [line] * r.randint(1, 12))
                peer.send(os.urandom(1_000_000))
                peer.send_multipart([b"", b"r", b"x" * 1_000_000])
                for _ in range(200):
                    parts = [os.urandom(r.randint(0, 50)) for _ in range(r.randint(1, 6))]
                    peer.send_multipart(parts)
                for verb, fields in MessagesTest.EXAMPLES.items():
                    peer.send_multipart([b"", b"0" * 32, tc.encode(verb, fields)])
                    peer.send(tc.encode(verb, fields))
                self.assertTrue(peer.poll(PATIENCE * 1000))  # it answers
            with socket.create_connection(tc.split_tcp(address)) as raw:
                raw.sendall(b"GET / HTTP/1.0\r\n\r\n" + os.urandom(1000))
        status, out = self.cloud.finish(client)
        self.assertEqual(status, 0, out[-500:])
        self.assertIn("Ran 200 commands", out)
        self.assertFalse(wrong_times(done, 200),
                         self.cloud.err(self.broker)[-20000:] + self.cloud.err(client))
        self.assertIsNone(self.broker.poll())
        self.assertNotIn("Traceback", self.cloud.err(self.broker))


# === Chaos ============================================================================
#
# What the simulation cannot show: real processes, killed and stopped and cut off from each
# other as a seed has it, while a run goes on. Whatever happens is noted in the order in which
# it happens in one file, the ledger: a start by the command itself, the loss of a worker just
# before we cause it. So it can be told of each start whether it was allowed. (The same seed
# is the same schedule, but hardly the same run: processes have their own pace.)


class Place:
    """Where trouble may strike: a process, and the proxy through which it is connected."""

    def __init__(self, role, hub=None):
        self.role = role
        self.hub = hub  # the Place of the broker it is connected to
        self.proxy = hub and Proxy(
            hub.process.clients if role == "client" else hub.process.workers)
        self.process = None
        self.at_rest = True  # no trouble now, and none a moment ago


class Chaos:
    """One run, with a broker chained to the first, and half of the workers below it. A command
    may start again only if the worker that started it last has been lost: we have ended it, or
    kept it or the chained broker above it silent for LONG. Nothing else is an excuse, neither what
    happens to broker and client nor a SHORT silence of the worker. How many commands go with a
    worker is not bounded by its slots: those whose results it held, as the client was away, go as
    well."""

    EXPIRY = 4.0
    BROKER = ("--worker-expiry", str(EXPIRY), "--lost-grace", "2", "--ready-interval", "2.5")
    MEMBER = ("--ready-interval", "0.5")
    SHORT = (0.1, 0.6)  # seconds: with a second to reconnect, less than any patience of BROKER
    LONG = (1.1 * EXPIRY, 1.5 * EXPIRY)
    ANY = (0.1, 3.0)  # for what loses no command however long it takes, up to the client's lease
    # between troubles in one place: two short ones must not make a long one; and as a new broker
    # has to wait for its workers, nothing would ever run if it were struck more often
    REST = {"worker": 1.5, "client": 1.5, "broker": 5.0, "chained": 5.0}
    GAP = (0.05, 0.45)  # between troubles anywhere
    WORKERS = 4
    SECONDS = 300  # of trouble, at most
    PEAK = 150 * 1024  # KiB of memory that no process may exceed

    def __init__(self, test, commands, seed, keyed):
        self.test = test
        self.r = random.Random(seed)
        self.cloud = Cloud(test)
        self.key = ("--insecure",)
        if keyed:
            self.key = ("--key", os.path.join(self.cloud.dir, "cloud.key"))
            test.assertEqual(self.cloud.start("keygen", self.key[1]).wait(PATIENCE), 0)
        self.ledger = os.path.join(self.cloud.dir, "ledger")
        self.commands = dict(self.command(n) for n in range(1, commands + 1))
        self.due = []  # heap of (time, number, function): what ends the troubles there are
        self.number = itertools.count()
        self.faults = Counter()
        self.story = []  # the same, one by one
        self.peaks = Counter()  # KiB, by role
        self.out = ""
        self.broker = Place("broker")
        self.start(self.broker)
        self.chained = Place("chained", self.broker)
        self.start(self.chained)
        self.client = Place("client", self.broker)
        self.workers = [Place("worker", (self.broker, self.chained)[n % 2])
                        for n in range(self.WORKERS)]
        self.places = (self.broker, self.chained, self.client, *self.workers)
        for place in self.places[1:]:
            test.addCleanup(place.proxy.close)
        test.addCleanup(self.heal)

    def command(self, n):
        """A command, with its exit code and output: most are short, some have their habits."""
        parts, code, output = [f"echo {n} $PPID >> ledger"], 0, b""
        if self.r.random() < 0.5:  # if it is killed in its sleep, so must be what it has started
            parts += ["(setsid sleep 1000 &)", f"sleep {self.r.uniform(0, 0.3):.3f}"]
        if self.r.random() < 0.03:  # so much has to be fetched, in one part or in three
            last = self.r.choice((20_000, 100_000))
            parts.append(f"seq {last}")
            output = b"".join(b"%d\n" % i for i in range(1, last + 1))
        if self.r.random() < 0.1:
            code = self.r.randint(1, 9)
            parts.append(f"exit {code}")
        return "; ".join(parts), (code, output)

    # --- the run

    def run(self):
        for place in self.workers:
            self.start(place)
        self.client.process = client = self.cloud.client(
            self.client.proxy.address, self.commands, "-b", "--crash-limit", "1000", *self.MEMBER,
            *self.key, wait=False)
        reader = threading.Thread(target=self.read, args=(client.stdout,))
        reader.start()
        end = time.monotonic() + self.SECONDS
        while self.started() < 0.9 * len(self.commands) and time.monotonic() < end \
                and client.poll() is None:
            self.heal(time.monotonic())
            self.trouble()
            self.sample()
            time.sleep(self.r.uniform(*self.GAP))
        self.heal()
        self.cloud.wait_for(lambda: self.sample() or client.poll() is not None, "the client's end")
        reader.join()
        self.cloud.wait_for(lambda: not self.strays(), "the end of all that the commands started")

    def read(self, file):
        self.out = file.read().decode()

    def started(self):
        return len({line.split()[0] for line in tc.read_text(self.ledger).splitlines()})

    def sample(self):
        """Note how much memory each process has needed so far."""
        for place in self.places:
            for pid in (place.process.pid, *children_of(place.process.pid)):
                self.peaks[place.role] = max(self.peaks[place.role], peak_memory(pid))

    def strays(self):
        """What runs in our directory beside the cloud itself."""
        ours = [place.process.pid for place in self.places if place is not self.client]
        inner = [pid for parent in ours for pid in children_of(parent)]
        return set(map(int, self.cloud.left_behind())).difference(ours, inner)

    # --- troubles: each begins when it is called, and returns how it ends and how long it takes

    def trouble(self):
        name = self.r.choice(list(self.FAULTS))
        roles, begin = self.FAULTS[name]
        places = [place for place in self.places if place.role in roles and place.at_rest]
        if places:
            place = self.r.choice(places)
            place.at_rest = False
            self.faults[name] += 1
            at, pid = time.time(), place.process.pid
            end, duration = begin(self, place)
            self.story.append(f"\n{at % 60:06.3f} {name}: {place.role} {pid}, {duration:.2f} s")
            self.later(duration, *end)
            self.later(duration + self.REST[place.role], self.rest, place)

    def later(self, delay, function, *args):
        heapq.heappush(self.due, (time.monotonic() + delay, next(self.number),
                                  functools.partial(function, *args)))

    def rest(self, place):
        if self.is_leaving(place):
            self.later(self.REST[place.role], self.rest, place)
        else:
            place.at_rest = place.process.poll() is None

    def is_leaving(self, place):
        """Whether its process is to be followed by another."""
        return any(call.func == self.start and call.args == (place,) for _, _, call in self.due)

    def heal(self, now=math.inf):
        while self.due and self.due[0][0] <= now:
            heapq.heappop(self.due)[2]()

    def lose(self, place):
        """From now on the commands of this worker, or of those below, may be started elsewhere."""
        with open(self.ledger, "a") as file:
            for worker in self.workers:
                if place in (worker, worker.hub):
                    # a shell just begun may find that the supervisor is its parent already
                    pids = [worker.process.pid, *children_of(worker.process.pid)]
                    file.writelines(f"lost {pid}\n" for pid in pids)

    def duration(self, place):
        """How long to disturb someone: a worker briefly, or now and then until it is lost."""
        if place.role in ("broker", "client"):
            return self.r.uniform(*self.ANY)
        if self.r.random() < 0.8:
            return self.r.uniform(*self.SHORT)
        self.lose(place)
        return self.r.uniform(*self.LONG)

    def start(self, place):
        old = place.process
        if old and old.poll() is None:  # it may take seconds to leave: others must not wait for it
            self.later(0.05, self.start, place)
            time.sleep(0.005)
            return
        if place.role == "worker":
            place.process = self.cloud.worker(place.proxy.address, "-j", "2", *self.MEMBER,
                                              *self.key)
        else:
            where = (old.clients[6:], old.workers[6:]) if old else ("127.0.0.1:0", "127.0.0.1:0")
            above = ("--upstream", place.proxy.address) if place.proxy else ()
            place.process = self.cloud.broker(*where, *self.BROKER, *above, *self.key)

    def kill(self, place, number=signal.SIGKILL):
        if place.role == "worker":
            self.lose(place)
        place.process.send_signal(number)
        return (self.start, place), self.r.uniform(*self.SHORT)

    def terminate(self, place):
        return self.kill(place, signal.SIGTERM)

    def kill_inner(self, place):
        self.lose(place)
        os.kill(self.cloud.inner(place.process), signal.SIGKILL)
        return (self.start, place), self.r.uniform(*self.SHORT)

    def stop(self, place):
        duration, send = self.duration(place), place.process.send_signal
        if place.role == "worker":
            send = functools.partial(os.kill, self.cloud.inner(place.process))
        send(signal.SIGSTOP)
        return (send, signal.SIGCONT), duration

    def freeze(self, place):
        duration = self.duration(place)
        place.proxy.freeze()
        return (place.proxy.thaw,), duration

    def swallow(self, place):
        duration = self.duration(place)
        place.proxy.swallow()
        return (place.proxy.cut,), duration

    def cut(self, place):
        place.proxy.cut()
        return (place.proxy.cut,), self.r.uniform(*self.SHORT)

    FAULTS = {  # name > roles that it may befall, how it begins
        "worker killed": (["worker"], kill),
        "its child killed": (["worker"], kill_inner),
        "worker terminated": (["worker"], terminate),
        "worker stopped": (["worker"], stop),
        "broker killed": (["broker"], kill),
        "broker stopped": (["broker"], stop),
        "chained broker killed": (["chained"], kill),
        "chained broker stopped": (["chained"], stop),
        "client stopped": (["client"], stop),
        "link frozen": (["worker", "client", "chained"], freeze),
        "link swallows": (["worker", "client", "chained"], swallow),
        "link cut": (["worker", "client", "chained"], cut),
    }

    # --- the accounting

    def starts(self):
        """From the ledger: how often each command was started, and the starts that were wrong: a
        command may start again only if the worker that started it last has been lost."""
        times, wrong, last, lost = Counter(), [], {}, set()
        for line in tc.read_text(self.ledger).splitlines():
            what, pid = line.split()
            if what == "lost":
                lost.add(pid)
                continue
            times[what] += 1
            if last.get(what, pid) not in lost and times[what] > 1:
                wrong.append(f"command {what} was started by worker {pid}, but {last[what]} had it")
            last[what] = pid
        return times, wrong

    def findings(self):
        """All that is not as promised, a line each."""
        times, found = self.starts()
        count = len(self.commands)
        found += [f"command {n} was not started" for n in range(1, count + 1) if not times[str(n)]]
        wanted = Counter(f"FAIL({code}) {cmd}" if code else f"OK! {cmd}"
                         for cmd, (code, _) in self.commands.items())
        got = Counter(re.findall(r"^((?:OK!|FAIL\(\d+\)) .*) ⌚[\d.]+ ?m?s$", self.out, re.M))
        found += [f"not reported: {line}" for line in wanted - got]
        found += [f"should not be reported: {line}" for line in got - wanted]
        hash = naive_hash([(cmd.encode(), *exit_record) for cmd,
                           exit_record in self.commands.items()])
        end = rf"^Ran {count} commands in ⌚[\d.]+ ?(min \d+ )?s, result hash is {hash}$"
        if not re.search(end, self.out, re.M):
            found.append(f"the transcript ends with {self.out[-200:]!r}")
        return found + [f"{role} needed {peak} KiB" for role, peak in self.peaks.items()
                        if peak > self.PEAK]

    def logs(self):
        """The last troubles, and what the client and the last processes said last."""
        last = dict.fromkeys([self.client.process, *self.cloud.processes[-12:]])
        return "".join(self.story[-20:]) + "".join(
            f"\n--- {' '.join(p.args[2:5])} (pid {p.pid})\n{self.cloud.err(p)[-1500:]}"
            for p in last if p)

    def table(self):
        again = sum(n > 1 for n in self.starts()[0].values())
        rows = [("commands", len(self.commands)), ("started more than once", again),
                *self.faults.most_common(),
                *((f"peak MB of {role}", round(peak / 1024)) for role, peak in self.peaks.items())]
        return dict(rows)


class ChaosTest(unittest.TestCase):
    commands, seed = 150, None
    table = {}  # of the last run

    def test_whatever_happens_all_is_reported_once(self):
        self.run_chaos(keyed=False)

    def test_with_keys_as_well(self):
        self.run_chaos(keyed=True)

    def run_chaos(self, keyed):
        seed = random.randrange(10**6) if self.seed is None else self.seed
        began = time.monotonic()
        chaos = Chaos(self, self.commands, seed, keyed)
        try:
            chaos.run()
            self.assertEqual(chaos.findings(), [])
        except Exception as error:
            kept = os.path.join(tempfile.gettempdir(), f"testcloud-chaos-{seed}")
            shutil.copytree(chaos.cloud.dir, kept, dirs_exist_ok=True)
            with open(os.path.join(kept, "story"), "w") as file:
                file.write("".join(chaos.story))
            raise AssertionError(f"chaos of seed {seed}: {error}{chaos.logs()}"
                                 f"\n(all logs and the ledger are in {kept})") from error
        finally:
            ChaosTest.table = {"seed": seed, "seconds": round(time.monotonic() - began),
                               **chaos.table()}
            if self.commands > 1000:
                print(f"{'with' if keyed else 'without'} keys: {ChaosTest.table}", flush=True)


# === Fuzz =============================================================================
#
# Nonsense of all sorts at every socket of the program while it works. What would be carried
# out is left out: a command is run, and a worker with free slots is given some, whoever asks.


class Fuzz:
    """An endless supply of messages, as lists of frames, from true ones to noise."""

    VALUES = (0, 1, 2, -1, 2**31, 2**53, 2**53 + 1, 10**400, 0.5, -0.0, 1e400, True, None, "", "a",
              "r1", "\x00", "\n", "\ud800", "\udcff", "é☃", "x" * 300, [], {}, [[]], [[1]],
              [[1, 1]],
              [["r1", 1, 1]], [[1, 1]] * 50, [1, 2], ["a"], {"a": [{}]}, [[[[]]]])
    TOKENS = (b"", b"", b"r1", b"plain.b.1", b"plain.b.1 1 1", b"0" * 32, b"\xff", b"x" * 300)

    def __init__(self, seed):
        self.r = random.Random(seed)
        self.corpus = [self.line() for _ in range(3000)]

    def line(self):
        """A line with a verb of ours, and fields of which most are right."""
        r = self.r
        verb = r.choice(list(MessagesTest.EXAMPLES))
        spec = tc.MESSAGES[verb]
        fields = {name: value for name, value in MessagesTest.EXAMPLES[verb].items()
                  if r.random() < 0.9}
        for name, check in [*spec.needs.items(), *spec.may_have.items()]:
            if r.random() < 0.3:
                right = [value for value in self.VALUES if check(value)]
                fields[name] = r.choice(right if right and r.random() < 0.7 else self.VALUES)
        if verb == "READY" and r.random() < 0.9:
            fields.update(name="fuzz", slots=0)
        if verb == tc.COMMAND:
            fields["cmd"] = "true"
        return tc.encode(verb, fields)

    def mutate(self, line):
        r, at = self.r, self.r.randrange(len(line))
        other = r.choice(self.corpus)
        return r.choice((
            line[:at], line[at:], line + line, line[:at] + other[at:], line + b"\n" + other,
            line[:at] + bytes([r.randrange(256)]) + line[at + 1:],
            line[:at] + r.choice((b"\n", b"\0", b"{", b'"', b"[" * 500, b"9" * 400)) + line[at:],
            r.randbytes(at + 1)))

    def message(self):
        r = self.r
        while True:
            body = r.choice(self.corpus)
            if r.random() < 0.5:
                body = self.mutate(body)
            kind = r.random()
            if kind < 0.4:
                frames = [body]
            elif kind < 0.8:
                frames = [b"", r.choice(self.TOKENS), body]
            elif kind < 0.9:
                frames = [b"", r.choice(self.TOKENS), body, r.choice(self.corpus)]
            else:
                frames = [r.choice((b"", body, r.choice(self.corpus)))
                          for _ in range(r.randint(1, 12))]
            if all(map(self.is_harmless, frames)):
                return frames

    def is_harmless(self, body):
        for line in body.split(b"\n"):
            if line[:1] == b"{" or line[:5] == b"READY":
                with contextlib.suppress(tc.ProtocolError):
                    verb, fields = tc.decode(line)
                    if verb == "READY" and ("name" not in fields or fields.get("slots") != 0):
                        return False
                    if verb == tc.COMMAND and (fields["cmd"] != "true" or self.r.random() < 0.95):
                        return False
        return True

    def noise(self):
        """Bytes for a connection that does not even speak ZeroMQ, or breaks off."""
        greeting = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 48
        ready = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\6DEALER\x08Identity\0\0\0\0"
        huge = b"\x02" + (2**62).to_bytes(8, "big")
        return self.r.choice((b"", b"GET / HTTP/1.0\r\n\r\n", self.r.randbytes(500), greeting[:20],
                              greeting + self.r.randbytes(500), greeting + ready,
                              greeting + ready + huge + b"x" * 10_000,
                              greeting + ready + self.r.randbytes(500)))


class FuzzTest(unittest.TestCase):
    frames, seed = 12_000, None
    table = {}  # of the last run
    PEAK = 150 * 1024  # KiB that no process may exceed
    PART = 500  # messages of one connection

    def setUp(self):
        seed = random.randrange(10**6) if self.seed is None else self.seed
        self.fuzz = Fuzz(seed)
        self.cloud = Cloud(self)
        self.sent = Counter()  # messages by receiver, and the like
        self.sent["seed"] = seed
        self.addCleanup(lambda: self.table.update(self.sent))

    def check(self, role, process):
        """That the process goes on, unhurt."""
        log = self.cloud.err(process)
        self.assertNotIn("Traceback", log, f"{role}, seed {self.sent['seed']}")
        self.assertIsNone(process.poll(), f"{role}, seed {self.sent['seed']}: {log[-2000:]}")
        for pid in (process.pid, *children_of(process.pid)):
            peak = max(peak_memory(pid), self.sent[f"peak KiB of {role}"])
            self.sent[f"peak KiB of {role}"] = peak
            self.assertLess(peak, self.PEAK, f"{role}, seed {self.sent['seed']}")

    def attack(self, role, address):
        """One connection's worth of nonsense for a port of a broker."""
        import zmq
        peer = self.cloud.dealer(address)
        peer.setsockopt(zmq.SNDTIMEO, int(PATIENCE * 1000))
        listens = self.fuzz.r.random() < 0.8
        for _ in range(self.PART):
            peer.send_multipart(self.fuzz.message())
            while listens and peer.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                peer.recv_multipart()
        self.sent[role] += self.PART
        with contextlib.suppress(ConnectionError), \
                socket.create_connection(tc.split_tcp(address)) as raw:
            raw.sendall(self.fuzz.noise())
        if self.fuzz.r.random() < 0.5:  # it is there until the last message has come
            peer.send(b"HELLO {}")
            end = time.monotonic() + PATIENCE
            while listens and time.monotonic() < end:
                if not peer.poll(200):  # so many answers a second it gets, and no more
                    peer.send(b"HELLO {}")
                elif b"HELLO needs" in peer.recv_multipart()[-1]:
                    break
            else:
                self.assertFalse(listens, "no answer")
        peer.close(0 if self.fuzz.r.random() < 0.5 else 1000)

    def test_nonsense_of_a_host(self):
        """A client's broker takes any record on a stream; the stream ends, and nothing else."""
        r, controls = self.fuzz.r, ([], ["reconnect"], ["reconnect", 1, {}], ["stop"], ["__init__"],
                                    [1], [None], [[]], [{}], {}, {"reconnect": 1}, "reconnect", 7)
        broker, links = tc.Broker("local", tc.Times(lost_grace=0.0), False, 0.0), tc.PeerLinks()
        uplink, now, ends = tc.BrokerUplink(broker, links, b"0"), 0.0, Counter()

        class Host(tc.StreamLink):
            def __init__(self):
                super().__init__(
                    broker, WORKERS, b"0", {"reconnect": lambda *_: uplink.reconnect()}, self.over,
                    b"mark", lambda now: uplink.opened(self, now), lambda: now)
                self.received(r.choice((b"", b"noise\n")) + b"mark\n")

            def over(self, why, now):
                ends[why[:20]] += 1
                uplink.ended(now)

            def write(self, data):
                tc.RECORD.unpack_from(data)

        host = Host()
        for _ in range(self.frames // 2):
            now += r.choice((0, 0, 0.01, 3))
            kind = r.random()
            if kind < 0.9:
                data = record(tc.MESSAGE, r.choice((*self.fuzz.TOKENS, b"\xff" * 70000)),
                              self.fuzz.message()[-1], r.choice((b"", b"data")))
            else:
                data = r.randbytes(40) if kind < 0.92 else record(
                    tc.CONTROL, body=json.dumps(r.choice(controls)).encode())
            at = r.randint(1, len(data))
            pieces = [*filter(None, (data[:at], data[at:])), *([b""] if r.random() < 0.01 else [])]
            for piece in pieces:
                if not host.closed:
                    host.received(piece)
            if broker.deadline() <= now:
                broker.tick(now)
            for outgoing in broker.take()[0]:
                links.send(outgoing)
            check_broker(broker)
            host = Host() if host.closed else host
        self.assertEqual({*ends}, {"", "sent an invalid reco", "sent an unknown cont"})
        host = Host()
        host.received(record(tc.MESSAGE, body=tc.encode("READY", {
            "name": "good", "slots": 3, "join": 1, "running": [], "held": []})))
        self.assertEqual(broker.scheduler.slots, 3)

    def test_nonsense_at_both_ports_of_a_broker(self):
        broker = self.cloud.broker()
        worker = self.cloud.worker(broker, "-j", "2")
        runs = 0
        while sum(self.sent[role] for role in (CLIENTS, WORKERS)) < self.frames:
            runs += 1
            done = os.path.join(self.cloud.dir, f"done{runs}")
            client = self.cloud.client(
                broker, [f"echo {n} >> {done}; echo {n}" for n in range(1, 201)], wait=False)
            out = []
            reader = threading.Thread(target=lambda o=out, c=client: o.append(c.stdout.read()))
            reader.start()
            while client.poll() is None:
                self.attack(CLIENTS, broker.clients)
                self.attack(WORKERS, broker.workers)
            reader.join()
            problem = f"seed {self.sent['seed']}: {out[0][-1000:]!r} {self.cloud.err(client)}"
            self.assertEqual(client.returncode, 0, problem)
            self.assertIn(b"Ran 200 commands", out[0], problem)
            self.assertEqual(sorted(re.findall(rb"(?m)^(\d+)$", out[0]), key=int),
                             [b"%d" % n for n in range(1, 201)], problem)
            self.assertFalse(wrong_times(done, 200), problem)
            client.stdout.close()
            self.cloud.processes.remove(client)
            self.check("broker", broker)
            self.check("worker", worker)

    def router(self):
        """A broker of our own, that says what it likes."""
        import zmq
        context = zmq.Context()
        router = context.socket(zmq.ROUTER)
        self.addCleanup(context.term)
        self.addCleanup(router.close, 0)
        router.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        port = router.bind_to_random_port("tcp://127.0.0.1")
        return router, f"tcp://127.0.0.1:{port}"

    def hear(self, router, process, *verbs):
        """The next message with such a verb: who said it, the verb and the fields; None if the
        process has ended."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if not router.poll(100):
                if process.poll() is not None:
                    return None
                continue
            peer, *_, body = router.recv_multipart()
            for line in body.split(b"\n"):
                verb, fields = tc.decode(line)  # nobody may answer nonsense with nonsense
                if verb in verbs:
                    return peer, verb, fields
        raise AssertionError(f"no {verbs}, seed {self.sent['seed']}")

    def ok(self, greeting):
        numbers = {key: greeting[key] for key in ("join", "beat") if key in greeting}
        return tc.encode("OK", dict(numbers, patience=PATIENCE))

    def pester(self, role, router, process, verb):
        """Nonsense for whoever connects to our broker, among answers to what it says."""
        import zmq
        while self.sent[role] < self.frames // 2:
            heard = self.hear(router, process, verb)
            if heard is None:
                return
            peer, _, fields = heard
            router.send_multipart([peer, b"", b"", self.ok(fields)])
            for _ in range(self.PART):
                router.send_multipart([peer, *self.fuzz.message()])
            self.sent[role] += self.PART
            while router.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                router.recv_multipart()

    def test_nonsense_for_a_worker(self):
        router, address = self.router()
        worker = self.cloud.worker(address, "-j", "2", "--ready-interval", "0.01")
        self.pester("worker", router, worker, "READY")
        self.check("worker", worker)
        command = tc.encode(tc.COMMAND, {"cmd": "echo good", "id": 7, "attempt": 1})
        router.send_multipart([self.hear(router, worker, "READY")[0], b"", b"", b"WHO"])
        fields, end = {}, time.monotonic() + PATIENCE
        while fields.get("id") != 7:
            self.assertLess(time.monotonic(), end, f"no result, seed {self.sent['seed']}")
            peer, verb, fields = self.hear(router, worker, "READY", "RESULT")
            if verb == "READY":
                router.send_multipart([peer, b"", b"", self.ok(fields)])
                router.send_multipart([peer, b"", b"good", command])
        self.assertEqual((fields["exitcode"], fields["stdout"]), (0, "good\n"))
        router.send_multipart([peer, b"", b"good", b'DONE {"tasks":[[7,1]]}'])

    def test_nonsense_for_clients(self):
        router, address = self.router()
        while self.sent["client"] < self.frames // 2:
            client = self.cloud.client(address, ["true", "false"], "--ready-interval", "0.01",
                                       wait=False)
            reader = threading.Thread(target=client.stdout.read)
            reader.start()
            self.pester("client", router, client, "HELLO")
            client.terminate()
            reader.join()
            self.assertIn(client.wait(PATIENCE), (0, 1, 143, -15), self.cloud.err(client)[-2000:])
            self.assertNotIn("Traceback", self.cloud.err(client), f"seed {self.sent['seed']}")
            client.stdout.close()
            self.cloud.processes.remove(client)


# === Documents ========================================================================


class RunnerOfTestsTest(unittest.TestCase):
    def test_it_says_what_ran_and_how_long_it_took(self):
        class Some(unittest.TestCase):
            def test_good(self):
                pass

            def test_bad(self):
                for n in range(2):
                    with self.subTest(n):
                        self.fail()

            @unittest.skip("the moon is full")
            def test_skipped(self):
                pass

            @unittest.expectedFailure
            def test_better_than_thought(self):
                pass
        said = io.StringIO()
        result = Runner(stream=said).run(unittest.defaultTestLoader.loadTestsFromTestCase(Some))
        self.assertFalse(result.wasSuccessful())
        lines = said.getvalue().splitlines()
        self.assertEqual(lines[-1], "1 passed, 2 failed, 1 skipped")
        self.assertIn("skipped 1: the moon is full", lines)
        self.assertRegex(lines[-2], r"^ +\d+\.\d s \S+Some\.test_")

    def test_its_status_tells_scripts(self):
        for name, status, last in (("ClientTest.test_a_run", 0, "1 passed, 0 failed, 0 skipped"),
                                   ("NoSuchTest", 1, "0 passed, 1 failed, 0 skipped")):
            done = subprocess.run([sys.executable, os.path.join(HERE, "test_testcloud.py"), name],
                                  capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr.splitlines()[-1]), (status, last))


class DocumentsTest(unittest.TestCase):
    def test_the_manual_lists_every_message_with_its_way(self):
        rows = re.findall(r"^    ([A-Z]+|\{) +(\S.*?)  +\S", tc.__doc__, re.M)
        table = {verb: way for verb, way in rows if verb in tc.MESSAGES}
        self.assertEqual(table, {verb: spec.way for verb, spec in tc.MESSAGES.items()})

    def test_the_manual_draws_every_move_of_a_task(self):
        rows = re.findall(r"^    ([A-Z]+) +> ([A-Z ]+[A-Z])  ", tc.__doc__, re.M)
        self.assertEqual({state: tuple(after.split()) for state, after in rows},
                         {state: after for state, after in tc.MOVES.items() if after})

    def test_handlers_exist_for_what_comes_in(self):
        for machine in (tc.Broker, tc.Worker, tc.Client):
            for (_, verb), name in machine.HANDLERS.items():
                self.assertIn(verb, tc.MESSAGES)
                self.assertTrue(callable(getattr(machine, name)))

    def test_the_manual_fits_a_terminal(self):
        for line in tc.__doc__.splitlines():
            self.assertLessEqual(len(line), 92, line)

    @unittest.skipUnless(shutil.which("make") and shutil.which("awk"), "make or awk is missing")
    def test_the_table_of_contents_has_every_section_and_class(self):
        done = subprocess.run(["make", "-C", HERE, "--no-print-directory", "toc"], text=True,
                              capture_output=True, env={**os.environ, "MAKEFLAGS": ""})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for name in ("testcloud.py", "test_testcloud.py"):
            lines = tc.read_text(os.path.join(HERE, name)).splitlines()
            for n, line in enumerate(lines, 1):
                found = re.match(r"# (=== .*?)( =+)?$| *# (--- .*)|class (\w+)", line)
                if found:
                    self.assertRegex(done.stdout, rf"(?m)^ *{n} +" + re.escape(
                        found[1] or found[3] or found[4]) + "($|:)")
        self.assertIn("     Times: The times of the protocol, in seconds, and two limits: "
                      "options of the command line.\n", done.stdout)

    def test_every_option_is_in_the_readme(self):
        readme = self.readme()
        for role in tc.OPTIONS:
            for row in tc.options_of(role):
                if row.names[-1].startswith("--"):
                    self.assertIn(row.names[-1], readme)

    # what the README's commands need that is not here, by how these begin
    NEEDS = {"make ": "this is run by it", "scp ": "another host", "ssh ": "another host",
             "hub$": "another host", "mine$": "another host", "sudo ": "root", "docker ": "docker",
             "sudo useradd": "root", "uv ": "uv"}

    def readme(self):
        with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
            return file.read()

    def test_every_command_of_the_readme_runs_or_needs_what_is_not_here(self):
        """In a directory with scripts in place of the programs that they run, and our broker."""
        cloud = Cloud(self)
        broker = cloud.broker()
        folder = os.path.join(cloud.dir, "here")
        for name in ("tests/test_a.py", "tests/test_b.py", "tests/ATest.php", "test/a.test.js",
                     "a.png", "x y.png", "run.sh", "pyproject.toml", "package-lock.json", "bin/"):
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            if not name.endswith("/"):
                pathlib.Path(folder, name).touch()
        shutil.copy(SCRIPT, folder)
        for name in ("bin/pytest", "bin/convert", "bin/make", "bin/gzip", "bin/phpunit", "bin/go",
                     "bin/git", "bin/shellcheck", "bin/pip", "bin/npm", "bin/node",
                     "bin/python3"):
            program = pathlib.Path(folder, name)
            program.write_text(f'#!/bin/sh\necho "$0 $*" | tee -a {cloud.dir}/called\n'
                               f'case "$*" in *.png) : > "$2";; *collect*) echo a.py::b;; '
                               f'*venv*) mkdir -p .venv && cp -R {folder}/bin .venv; esac\n')
            program.chmod(0o755)
        path = f"{folder}/bin:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
        env = dict(os.environ, TESTCLOUD_BROKER=broker.clients, HOME=cloud.dir, PATH=path,
                   XDG_CACHE_HOME=cloud.dir + "/cache",
                   TESTCLOUD_SSH="false")  # no such hosts: only this machine
        cloud.worker(broker, "-j", "2", env=env)
        blocks = re.findall(r"^```sh\n(.*?)^```", self.readme().replace("\\\n", " "), re.M | re.S)
        lines = [line for block in blocks if "&\n" not in block for line in block.splitlines()]
        self.assertGreater(len(lines), 15)
        ran = 0
        for line in filter(lambda line: not line.startswith(tuple(self.NEEDS)), lines):
            line = line.replace("python3 testcloud", f"{sys.executable} testcloud")
            done = subprocess.run(["sh", "-c", line], env=env, cwd=folder, timeout=PATIENCE,
                                  capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, (line, done.stdout, done.stderr))
            ran += 1
        self.assertGreater(ran, 8)
        called = tc.read_text(os.path.join(cloud.dir, "called"))
        for words in ("pytest -q tests/test_a.py", "convert x y.png x y.jpg",
                      "make release CC=clang",
                      "gzip ./run.sh", "pytest -q a.py::b", "go test ", "shellcheck ",
                      "python3 -m venv .venv", "pip install -q pytest -e .", "npm ci --silent",
                      "node --test test/a.test.js"):
            self.assertIn("/" + words, called)

    def test_the_first_example_of_the_readme_runs(self):
        """Typed into a shell in a directory with only the two scripts."""
        readme = self.readme()
        block = re.search(r"```sh\n(python3 testcloud\.py broker &\n.*?)```", readme, re.S).group(1)
        cloud = Cloud(self)
        for name in ("testcloud.py", "pi.py"):
            shutil.copy(os.path.join(HERE, name), cloud.dir)
        ipc = {"broker": f"broker --clients ipc://{cloud.dir}/c --workers ipc://{cloud.dir}/w",
               "worker": f"worker --connect ipc://{cloud.dir}/w",
               "client": f"client --connect ipc://{cloud.dir}/c"}
        for role, call in ipc.items():  # the default ports may be in use
            block = block.replace(f"testcloud.py {role}", f"testcloud.py {call}")
        block = block.replace("python3", sys.executable) + "\nkill %1 %2; wait\n"
        done = subprocess.run(["bash", "-mc", block], cwd=cloud.dir, timeout=PATIENCE,
                              capture_output=True, text=True)
        self.assertIn("Ran 5 commands", done.stdout)
        self.assertIn("OK! ./pi.py 5", done.stdout)


# === Speed ============================================================================
#
# Figures, never asserted: machines differ, and are busy. Where there is a peer to compare
# with, the two run in turn and the ratio counts; all are medians.


def wall(argv, lines=(), **more):
    """Seconds that a process takes to read these lines and end."""
    with tempfile.TemporaryFile() as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.seek(0)
        began = time.monotonic()
        subprocess.run(argv, stdin=file, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       check=True, **more)
        return time.monotonic() - began


def until_bytes(argv, size, lines=()):
    """Seconds until a process has put out so many bytes."""
    with tempfile.TemporaryFile() as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.seek(0)
        began = time.monotonic()
        with subprocess.Popen(argv, stdin=file, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, bufsize=0) as process:
            buffer = bytearray(2**20)
            while size > 0:
                got = process.stdout.readinto(buffer)
                if not got:
                    raise EOFError(argv)
                size -= got
            spent = time.monotonic() - began
            while process.stdout.readinto(buffer):
                pass
        return spent


def memory(pid):
    """KiB that a process has now."""
    return int(re.search(r"VmRSS:\s+(\d+)", tc.read_text(f"/proc/{pid}/status"))[1])


class Speed:
    """The figures. Each yields rows: what was measured, the goal, what it was."""

    def __init__(self, runs, commands):
        self.runs = runs
        self.commands = commands
        self.test = unittest.TestCase()
        self.cloud = Cloud(self.test)

    def warm_cloud(self, *worker):
        broker = self.cloud.broker()
        self.cloud.worker(broker, *(worker or ("-j", "2")))
        self.cloud.client(broker, ["true"])
        return broker

    def client(self, *more):
        return [sys.executable, SCRIPT, "client", "-b", *more]

    def median(self, function):
        return statistics.median(function() for _ in range(self.runs))

    def ratio(self, ours, theirs):
        """How many times as fast as theirs is ours: median of runs in turn."""
        def pair():
            mine = ours()
            return theirs() / mine
        return self.median(pair)

    def against(self, what, command, argv, goals):
        """Rows of one way of ours to run a command very often, against the ways of others."""
        lines = [command] * self.commands
        for peer, theirs in (("xargs -P2", ["xargs", "-P2", "-I{}", "sh", "-c", "{}"]),
                             ("parallel -j2", ["parallel", "-j2"])):
            name = f"{what}, against {peer}"
            if peer not in goals:
                continue
            if not shutil.which(theirs[0]):
                yield name, f">= {goals[peer]} x", f"{theirs[0]} is not installed"
                continue
            found = self.ratio(lambda: wall(argv, lines), lambda t=theirs: wall(t, lines))
            yield name, f">= {goals[peer]} x", f"{found:.2f} x"

    def cloud_against_others(self):
        broker = self.warm_cloud()
        argv = self.client("--connect", broker.clients)
        yield from self.against("true through a broker", "true", argv,
                                {"xargs -P2": 1.0, "parallel -j2": 5.0})
        yield from self.against("/bin/echo hello through a broker", "/bin/echo hello", argv,
                                {"xargs -P2": 1.2})

    def local_against_others(self):
        yield from self.against("true with --local", "true", self.client("--local", "-j", "2"),
                                {"xargs -P2": 1.0})
        found = self.ratio(lambda: wall([sys.executable, "-c", "import zmq"]),
                           lambda: wall(self.client("--local"), ["true"]))
        yield "one true with --local, against import zmq", "<= 1.5 x", f"{found:.2f} x"

    def latency(self):
        sock = self.cloud.dealer(self.warm_cloud().clients)

        def one():
            began = time.monotonic()
            sock.send(b'{"cmd":"true"}')
            while not (answer := sock.recv()).startswith(b"RESULT"):
                pass
            return (time.monotonic() - began) * 1000 - json.loads(answer[7:])["time"]
        found = statistics.median(one() for _ in range(200))
        yield "one command in an idle cloud, beyond its own time", "<= 5 ms", f"{found:.2f} ms"

    def long_among_short(self):
        broker = self.warm_cloud("-j", "4")
        lines = ["sleep 0.01"] * 200
        for at in (40, 80, 120, 160):
            lines[at] = "sleep 2"
        times = [float(line.split()[1]) for line in lines]
        ends = [0.0] * 4  # of the slots: each command goes to the first that is free
        for spent in times:
            heapq.heapreplace(ends, ends[0] + spent)
        found = self.median(lambda: wall(self.client("--connect", broker.clients), lines))
        yield ("4 long commands among 200 short ones, against the best order", "",
               f"{found / max(2.0, sum(times) / 4):.2f} x")
        yield ("    against the best that can be done without knowing which are long", "<= 1.15 x",
               f"{found / max(ends):.2f} x")

    def bulk(self):
        line, path = f"head -c {2**30} /dev/zero", os.path.join(self.cloud.dir, "testcloud.key")
        self.cloud.start("keygen", path).wait()
        for how, key, goal in (("", ["--insecure"], 200), (", encrypted", ["--key", path], 100)):
            broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", *key)
            self.cloud.worker(broker, *key)
            argv = self.client("--connect", broker.clients, *key)
            wall(argv, ["true"])
            found = self.median(lambda argv=argv: wall(argv, [line]))
            yield (f"1 GB of output from one command{how}", f">= {goal} MB/s",
                   f"{2**30 / 1e6 / found:.0f} MB/s")

    def encryption(self):
        """What it costs with small commands."""
        key = ["--key", os.path.join(self.cloud.dir, "testcloud.key")]
        self.cloud.start("keygen", key[1]).wait()
        argv = []
        for how in (["--insecure"], key):
            broker = self.cloud.broker("127.0.0.1:0", "127.0.0.1:0", *how)
            self.cloud.worker(broker, "-j", "2", *how)
            argv.append(self.client("--connect", broker.clients, *how))
            wall(argv[-1], ["true"])
        for what, count in (("true through a broker", self.commands),
                            ("one true through a broker", 1)):
            lines = ["true"] * count
            found = self.ratio(lambda lines=lines: wall(argv[1], lines),
                               lambda lines=lines: wall(argv[0], lines))
            yield f"{what}, encrypted, against not", "", f"{found:.2f} x"

    def dispatch(self):
        """A real broker between dummies in this process, that answer at once."""
        for workers in (1, 10, 200, 2000):
            broker = self.cloud.broker()
            if workers > tc.raise_file_limit() // 4:
                return
            dummies, count = Dummies(self.cloud, broker, workers), 20 * self.commands
            before = cpu_ticks(broker.pid)
            spent = dummies.run(count)
            micros = (cpu_ticks(broker.pid) - before) / os.sysconf("SC_CLK_TCK") * 1e6
            yield (f"dispatch by one broker, {workers} workers", ">= 40000/s",
                   f"{count / spent:.0f}/s")
            yield ("    its processor time per command", "<= 20 us", f"{micros / count:.1f} us")

    def idle_workers(self):
        broker = self.cloud.broker()
        raised = tc.raise_file_limit()
        count = min(2000, raised // 4)
        dummies = Dummies(self.cloud, broker, count)
        dummies.rest(2.5)  # they have all been heard again
        before, began = cpu_ticks(broker.pid), time.monotonic()
        dummies.rest(10)
        spent = (cpu_ticks(broker.pid) - before) / os.sysconf("SC_CLK_TCK")
        share = spent / (time.monotonic() - began)
        yield f"{count} idle workers: the broker's share of a core", "< 5 %", f"{share * 100:.1f} %"
        yield "    its peak", "", f"{peak_memory(broker.pid) / 1024:.0f} MB"

    def through(self, count):
        """So many commands through a real client and a real broker, to workers that answer at once:
        microseconds for each, peaks of client and broker in MB."""
        broker, peak = self.cloud.broker(), 0
        dummies = Dummies(self.cloud, broker, 2)
        with tempfile.TemporaryFile() as file:
            file.write(b"true\n" * count)
            file.seek(0)
            began = time.monotonic()
            client = subprocess.Popen(self.client("--connect", broker.clients), stdin=file,
                                      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            reader = threading.Thread(target=self.read_end, args=(client.stdout,))
            reader.start()
            while client.poll() is None:
                dummies.serve()
                peak = peak_memory(client.pid) or peak
            reader.join()
        spent = time.monotonic() - began
        return spent / count * 1e6, peak / 1024, peak_memory(broker.pid) / 1024

    def growth(self):
        """Up to a million commands in one run."""
        micros = {}
        for count in (self.commands // 10, self.commands, 10 * self.commands, 100 * self.commands):
            micros[count], client, broker = self.through(count)
            yield f"{count} commands in one run, time for each", "", f"{micros[count]:.0f} us"
        yield (f"    against {self.commands} commands", "<= 1",
               f"{micros[count] / micros[self.commands]:.2f} x")
        right = naive_hash([(b"true", 0, b"")] * count) in self.end
        yield "    their result hash", "right", "right" if right else "WRONG"
        yield "    peak of the client", "< 300 MB", f"{client:.0f} MB"
        yield "    peak of the broker", "< 150 MB", f"{broker:.0f} MB"

    def read_end(self, file):
        for line in file:
            self.end = line.decode()

    def machine(self):
        """The broker's machine without sockets: does the cost of a command grow?"""
        base = self.cost(workers=10, clients=1, queued=100)
        yield "machine: 10 workers, 1 client, 100 queued", "", f"{base:.1f} us"
        for size in ({"workers": 1000}, {"workers": 100_000}, {"clients": 1000},
                     {"queued": 10_000}, {"queued": 1_000_000}, {"queued": 10_000_000}):
            (name, number), = size.items()
            if number * 1000 > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
                yield f"    with {number} {name}", "<= 1.5 x", "needs more memory"
                continue
            found = self.cost(**{"workers": 10, "clients": 1, "queued": 100, **size})
            yield f"    with {number} {name}", "<= 1.5 x", f"{found / base:.2f} x"

    def cost(self, workers, clients, queued):
        """Microseconds a command from submission to DONE, with so many others waiting."""
        broker, count = tc.Broker("b"), 2000
        for n in range(workers):
            broker.receive(WORKERS, b"w%d" % n, "", tc.encode("READY", {
                "name": f"w{n}", "join": 1, "slots": 1}), b"", 0.0)
        for n in range(clients):
            broker.receive(CLIENTS, b"c%d" % n, "", tc.encode("HELLO", {
                "run": f"r{n}", "join": 1}), b"", 0.0)
        peers = itertools.cycle([b"c%d" % n for n in range(clients)])
        ids = itertools.count(1)
        broker.take()

        def submit(number):
            for _ in range(number):
                broker.receive(CLIENTS, next(peers), "", b'{"cmd":"true","id":%d,"attempt":1}'
                               % next(ids), b"", 0.0)
        submit(queued)
        began, done = time.perf_counter(), 0
        while done < count:
            frames, _ = broker.take()
            for frame in frames:
                if frame.link == CLIENTS or not frame.body.startswith(b"{"):
                    continue
                id = json.loads(frame.body.split(b"\n")[0])["id"]
                broker.receive(WORKERS, frame.peer, frame.token,
                               b'QUEUED {"tasks":[[%d,1]]}\n'
                               b'RESULT {"id":%d,"attempt":1,"exitcode":0,"size":0,"stdout":""}'
                               % (id, id), b"", 0.0)
                broker.receive(CLIENTS, b"c%s" % frame.token[1:].encode(), "",
                               b'DONE {"tasks":[[%d,1]]}' % id, b"", 0.0)
                done += 1
                if done == count:
                    break
            submit(len(frames))
        return (time.perf_counter() - began) / count * 1e6

    def by_ssh(self):
        """Commands on a host by ssh: all processes are on this machine."""
        if not all(Sshd.PROGRAMS):
            yield "hosts by ssh", "", "sshd is not installed"
            return
        sshd = Sshd(self.cloud, ["alpha"])
        loud = [sys.executable, SCRIPT, "client", "-S", "2/alpha", "--ssh", sshd.ssh]
        ours = [*loud, "-b"]
        plain = [*shlex.split(sshd.ssh), "alpha"]
        lines, broker = ["true"] * self.commands, self.warm_cloud()
        theirs = self.client("--connect", broker.clients)
        found = self.ratio(lambda: wall(ours, lines), lambda: wall(theirs, lines))
        yield "true on a host by ssh, against a broker by TCP", ">= 0.9 x", f"{found:.2f} x"
        found = "parallel is not installed"
        if shutil.which("parallel"):
            few = lines[::200]  # each is a login
            found = self.ratio(lambda: wall(ours, lines) / len(lines), lambda: wall(
                ["parallel", "--ssh", sshd.ssh, "-S", "2/alpha"], few) / len(few))
            found = f"{found:.0f} x"
        yield "    against parallel -S", ">= 20 x", found
        size, command = 2**30, f"head -c {2**30} /dev/zero"
        found = self.ratio(lambda: until_bytes([*loud, "--raw"], size, [command]),
                           lambda: until_bytes([*plain, command], size))
        yield "1 GB of output from a host by ssh, against ssh", ">= 0.7 x", f"{found:.2f} x"
        found = self.median(lambda: until_bytes([*loud, "--json"], 1, ["true"])
                            - wall([*plain, "true"]))
        yield "start to first result, beyond ssh HOST true", "<= 0.5 s", f"{found:.2f} s"

    def many_hosts(self):
        """The start of workers in this machine's own shells, and what each costs the client."""
        count, found = 100, []
        for _ in range(self.runs):
            _, alone = self.start_hosts(1)
            spent, together = self.start_hosts(count)
            found.append((spent, (together - alone) / (count - 1)))
        spent, each = map(statistics.median, zip(*found))
        yield f"{count} hosts, on this machine, until all are there", "<= 20 s", f"{spent:.1f} s"
        yield "    memory of the client for each", "< 300 kB", f"{each:.0f} kB"

    def start_hosts(self, count):
        """Seconds until each of so many hosts runs a command, and KiB of their client then."""
        here, go, log = (os.path.join(self.cloud.dir, name) for name in ("here", "go", "log"))
        os.mkfifo(go)
        open(here, "w").close()
        argv = self.client(*(word for n in range(1, count + 1)
                             for word in ("--via", f"1/env N={n}")))
        began = time.monotonic()
        with open(log, "w") as file, subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=file) as client:
            client.stdin.write(f"echo $N >> {here}; : < {go}\n".encode() * count)
            client.stdin.close()
            while len(tc.read_text(here).split()) < count:
                time.sleep(0.01)
            spent, used = time.monotonic() - began, memory(client.pid)
            with open(go, "w"):
                client.wait()
        os.unlink(go)
        wrong = wrong_times(here, count)
        if wrong:
            raise ValueError(f"hosts by their number of commands: {wrong}\n{tc.read_text(log)}")
        return spent, used

    def working_tree(self, files, size):
        """A new tree: its top, and the environment of its client."""
        top = os.path.join(self.cloud.dir, f"tree-{files}")
        for n in range(files):
            path = os.path.join(top, f"directory-{n // 100}", f"file-{n}")
            if n % 100 == 0:
                os.makedirs(os.path.dirname(path))
            with open(path, "wb") as file:
                file.write(random.randbytes(size))
        return top, {**os.environ, "XDG_CACHE_HOME": os.path.join(self.cloud.dir, "cache")}

    def trees(self):
        """A working tree to a host by ssh: all processes are on this machine."""
        if not all(Sshd.PROGRAMS) or not shutil.which("rsync"):
            yield "a tree to a host by ssh", "", "sshd or rsync is not installed"
            return
        sshd = Sshd(self.cloud, ["alpha"])
        yield from self.tree_against_rsync(sshd, 10_000, 20_000, ">= 1 x")
        yield from self.tree_against_rsync(sshd, 200_000, 100, "")

    def tree_against_rsync(self, sshd, files, size, goal):
        top, env = self.working_tree(files, size)
        copy, path = os.path.join(self.cloud.dir, "copy"), os.path.join(top, "directory-0/file-0")
        ours = self.client("-S", "1/alpha", "--ssh", sshd.ssh, "--sync", top)
        theirs = ["rsync", "-a", "-e", sshd.ssh, f"{top}/", f"alpha:{copy}"]

        def first(argv, lines, *known):
            for path in known:
                shutil.rmtree(path, ignore_errors=True)
            os.sync()  # else one writes to the disk what the other has left in memory
            return wall(argv, lines, env=env)

        def second(argv, lines):
            with open(path, "wb") as file:
                file.write(random.randbytes(size))
            return wall(argv, lines, env=env)
        found = self.ratio(
            lambda: first(ours, ["true"], env["XDG_CACHE_HOME"], sshd.path("home/.cache")),
            lambda: first(theirs, (), copy))
        yield (f"{files} files, {files * size / 1e6:.0f} MB to a host by ssh, against rsync", goal,
               f"{found:.2f} x")
        found = self.ratio(lambda: second(ours, ["true"]), lambda: second(theirs, ()))
        yield "    again, one file changed", goal, f"{found:.2f} x"
        shutil.rmtree(top)

    def memory_of_trees(self):
        broker, peaks = self.cloud.broker(), Counter()
        top, env = self.working_tree(10_000, 20_000)
        worker = self.cloud.inner(self.cloud.worker(broker, env=env))
        client = self.cloud.start("client", "-b", "--connect", broker.clients, "--sync", top,
                                  "true", ":::", "", env=env)
        while client.poll() is None:
            peaks["client"] = peak_memory(client.pid) or peaks["client"]
            time.sleep(0.01)
        peaks.update(broker=peak_memory(broker.pid), worker=peak_memory(worker))
        for name, peak in peaks.items():
            yield (f"10000 files, 200 MB by TCP: peak of the {name}", "< 120 MB",
                   f"{peak / 1024:.0f} MB")

    def commands_with_tree(self):
        top, env = self.working_tree(10, 1000)
        broker, lines = self.cloud.broker(), ["true"] * self.commands
        self.cloud.worker(broker, "-j", "2", env=env)
        ways = [("in a standing cloud", ["--connect", broker.clients])]
        if all(Sshd.PROGRAMS):
            ways.append(("on a host by ssh", ["-S", "2/alpha", "--ssh",
                                              Sshd(self.cloud, ["alpha"]).ssh]))
        for where, how in ways:
            wall(self.client(*how, "--sync", top), ["true"], env=env)
            found = self.ratio(
                lambda how=how: wall(self.client(*how, "--sync", top), lines, env=env),
                lambda how=how: wall(self.client(*how), lines, env=env))
            yield f"true with --sync {where}, against without", ">= 1 x", f"{found:.2f} x"

    FIGURES = (cloud_against_others, local_against_others, dispatch, idle_workers, machine, growth,
               latency, long_among_short, bulk, encryption, by_ssh, many_hosts, trees,
               memory_of_trees, commands_with_tree)


class Dummies:
    """A client and workers that run nothing: they answer each command at once."""

    def __init__(self, cloud, broker, workers):
        import zmq
        self.zmq = zmq
        self.poller = zmq.Poller()
        self.client = cloud.dealer(broker.clients)
        self.workers = [cloud.dealer(broker.workers) for _ in range(workers)]
        for sock in (self.client, *self.workers):
            self.poller.register(sock, zmq.POLLIN)
        for n, sock in enumerate(self.workers):
            sock.send_multipart([b"", b"", tc.encode("READY", {
                "name": f"w{n}", "join": 1, "slots": max(1, 200 // workers)})])
            sock.recv_multipart()
        self.client.send(tc.encode("HELLO", {"run": "r1", "join": 1}))
        self.client.recv()
        self.greet_at = time.monotonic() + 2

    def run(self, count):
        """Seconds for so many commands."""
        began, sent, done = time.monotonic(), 0, 0
        while done < count:
            while sent < min(count, done + 2000):
                last = min(sent + 500, count)
                self.client.send(b"\n".join(b'{"cmd":"true","cwd":"/","id":%d,"attempt":1}' % n
                                            for n in range(sent + 1, last + 1)))
                sent = last
            done += self.serve()
        return time.monotonic() - began

    def serve(self):
        """Answer what there is, or comes within 100 ms; how many results came to our client."""
        results = 0
        if time.monotonic() > self.greet_at:
            self.greet()
        for sock, _ in self.poller.poll(100):
            while sock.getsockopt(self.zmq.EVENTS) & self.zmq.POLLIN:
                if sock is self.client:
                    results += self.take_results(sock.recv())
                else:
                    self.work(sock, sock.recv_multipart())
        return results

    def rest(self, seconds):
        """Only say that we are there, each at a time of its own."""
        end = time.monotonic() + seconds
        for n, sock in itertools.cycle(enumerate(self.workers)):
            if time.monotonic() > end:
                return
            sock.send_multipart([b"", b"", tc.encode("READY", {"name": f"w{n}", "slots": 1,
                                                               "weight": 0})])
            while sock.getsockopt(self.zmq.EVENTS) & self.zmq.POLLIN:
                sock.recv_multipart()
            time.sleep(2.0 / len(self.workers))

    def greet(self):
        """Say that we are still there."""
        self.greet_at = time.monotonic() + 2
        self.client.send(b'HELLO {"run":"r1"}')
        for n, sock in enumerate(self.workers):
            sock.send_multipart([b"", b"", tc.encode("READY", {"name": f"w{n}"})])

    def take_results(self, body):
        ids = re.findall(rb'RESULT {"id":(\d+)', body)
        if ids:
            self.client.send(b'DONE {"tasks":[%s]}' % b",".join(b"[%s,1]" % id for id in ids))
        return len(ids)

    def work(self, sock, parts):
        ids = re.findall(rb'(?m)^{.*"id":(\d+)', parts[-1])
        if ids:
            queued = b'QUEUED {"tasks":[%s]}' % b",".join(b"[%s,1]" % id for id in ids)
            results = [b'RESULT {"id":%s,"attempt":1,"exitcode":0,"time":1,"started":1,"size":0,'
                       b'"worker":"w","host":"h","stdout":""}' % id for id in ids]
            sock.send_multipart([b"", parts[1], b"\n".join([queued, *results])])


# === Long runs ========================================================================
#
# What takes longer than a test may: python test_testcloud.py soak|chaos|fuzz|bench --help.


def soak_batch(first, count):
    """Simulate that many worlds of each kind; what was seen, and what went wrong."""
    test, seen, wrong = SimulationTest(), Counter(), []
    for seed in range(first, first + count):
        for faults, adversary in test.KINDS:
            try:
                seen.update(test.world(seed, faults, adversary).seen, worlds=1)
            except AssertionError as error:
                wrong.append(str(error))
        try:
            SchedulerTest().run_worlds(range(100 * seed, 100 * seed + 100))
            seen["small worlds"] += 100
        except AssertionError as error:
            wrong.append(str(error))
    return seen, wrong


def soak(settings):
    """Simulated worlds on all processors, for a while."""
    first = random.randrange(10**9) if settings.seed is None else settings.seed
    end = time.monotonic() + settings.minutes * 60
    seen, wrong = Counter(), []
    cpus = tc.usable_cpus()
    with concurrent.futures.ProcessPoolExecutor(cpus) as pool:
        seeds = itertools.count(first, settings.batch)
        tasks = {pool.submit(soak_batch, next(seeds), settings.batch) for _ in range(2 * cpus)}
        while tasks:
            done, tasks = concurrent.futures.wait(
                tasks, return_when=concurrent.futures.FIRST_COMPLETED)
            for task in done:
                more, errors = task.result()
                seen.update(more)
                wrong += errors
                for error in errors:
                    print(error, flush=True)
                if time.monotonic() < end:
                    tasks.add(pool.submit(soak_batch, next(seeds), settings.batch))
    return {"first seed": first, "last seed": next(seeds) - 1, "failed": len(wrong),
            **{name: seen.pop(name) for name in ("worlds", "commands")},
            **dict(sorted(seen.items()))}, not wrong


def chaos(settings):
    """Real processes in trouble while a client's run goes on."""
    ChaosTest.commands, ChaosTest.seed = settings.commands, settings.seed
    result = unittest.TextTestRunner().run(
        unittest.defaultTestLoader.loadTestsFromTestCase(ChaosTest))
    return ChaosTest.table, result.wasSuccessful()


def fuzz(settings):
    """Nonsense at every socket of the program while it works."""
    FuzzTest.frames, FuzzTest.seed = settings.messages // 2, settings.seed
    result = unittest.TextTestRunner(verbosity=2, failfast=True).run(
        unittest.defaultTestLoader.loadTestsFromTestCase(FuzzTest))
    return FuzzTest.table, result.wasSuccessful()


def bench(settings):
    """How fast the program is, beside what is installed."""
    for figure in Speed.FIGURES:
        if settings.only in figure.__name__:
            speed = Speed(settings.runs, settings.commands)
            try:
                for what, goal, measured in figure(speed):
                    print(f"{what:56}{goal:>14}{measured:>28}", flush=True)
            finally:
                speed.test.doCleanups()
    return {}, True


class Result(unittest.TextTestResult):
    """A dot for each test, and at the end the slowest ones, and why any were skipped."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.took, self.passed = [], 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def startTest(self, test):
        super().startTest(test)
        self.took.append((-time.monotonic(), test.id()))

    def stopTest(self, test):
        super().stopTest(test)
        self.took[-1] = self.took[-1][0] + time.monotonic(), test.id()

    def say_more(self):
        say, bad = self.stream.writeln, [test for test, _ in self.failures + self.errors]
        failed = {getattr(test, "test_case", test).id() for test in bad + self.unexpectedSuccesses}
        for why, count in Counter(why for _, why in self.skipped).items():
            say(f"skipped {count}: {why}")
        for took, name in sorted(self.took, reverse=True)[:5]:
            say(f"{took:7.1f} s {name}")
        say(f"{self.passed} passed, {len(failed)} failed, {len(self.skipped)} skipped")


class Runner(unittest.TextTestRunner):
    resultclass = Result

    def run(self, test):
        result = super().run(test)
        result.say_more()
        return result


def main():
    if sys.argv[1:2] not in (["soak"], ["chaos"], ["fuzz"], ["bench"]):
        unittest.main(testRunner=Runner)
    parser = argparse.ArgumentParser()
    tools = parser.add_subparsers(required=True)
    for function, *options in (
            (soak, ("--minutes", float, 10.0), ("--batch", int, 10)),
            (chaos, ("--commands", int, 2000)), (fuzz, ("--messages", int, 1_000_000)),
            (bench, ("--runs", int, 5), ("--commands", int, 10_000), ("--only", str, ""))):
        tool = tools.add_parser(function.__name__, help=function.__doc__,
                                description=function.__doc__)
        tool.set_defaults(function=function)
        for name, kind, default in options:
            tool.add_argument(name, type=kind, default=default, help=f"default: {default}")
        tool.add_argument("--seed", type=int, help="default: another one each time")
    settings = parser.parse_args()
    table, right = settings.function(settings)
    for name, value in table.items():
        print(f"{name:24}{value:12}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
