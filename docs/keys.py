#!/usr/bin/env python3
"""dlock's lock keys, written a second time.

An implementation of keys.md that shares nothing with the Rust code and needs nothing but Python 3. Run it to
check every row of key-vectors.json; copy from it to take dlock's locks from Python. A key is the JSON object that
key-vectors.json has: see "Test vectors" in keys.md.
"""

import hashlib
import json
import pathlib
import re
import struct
import sys

TEXT = b"dlock text/bytes"
STRUCTURED = b"dlock structured"

MASK = 0xFFFF_FFFF_FFFF_FFFF


class InvalidKey(Exception):
    """The key is no lock on this server."""


# SipHash-2-4 (Aumasson and Bernstein, 2012), with its later 128-bit variant.


def rotate(x, bits):
    return ((x << bits) | (x >> (64 - bits))) & MASK


def sip_round(v):
    v0, v1, v2, v3 = v
    v0 = (v0 + v1) & MASK
    v2 = (v2 + v3) & MASK
    v1 = rotate(v1, 13) ^ v0
    v3 = rotate(v3, 16) ^ v2
    v0 = rotate(v0, 32)
    v2 = (v2 + v1) & MASK
    v0 = (v0 + v3) & MASK
    v1 = rotate(v1, 17) ^ v2
    v3 = rotate(v3, 21) ^ v0
    v2 = rotate(v2, 32)
    return [v0, v1, v2, v3]


def siphash(key, message, size):
    """SipHash-2-4 of `message`, as 8 or 16 bytes in the order of the reference implementation."""
    k0, k1 = struct.unpack("<QQ", key)
    v = [
        k0 ^ 0x736F6D6570736575,
        k1 ^ 0x646F72616E646F6D,
        k0 ^ 0x6C7967656E657261,
        k1 ^ 0x7465646279746573,
    ]
    if size == 16:
        v[1] ^= 0xEE
    # The last word: what is left, zeros, and the length modulo 256 on top.
    padding = bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for (word,) in struct.iter_unpack("<Q", message + padding):
        v[3] ^= word
        for _ in range(2):
            v = sip_round(v)
        v[0] ^= word

    v[2] ^= 0xEE if size == 16 else 0xFF
    for _ in range(4):
        v = sip_round(v)
    out = struct.pack("<Q", v[0] ^ v[1] ^ v[2] ^ v[3])
    if size == 16:
        v[1] ^= 0xDD
        for _ in range(4):
            v = sip_round(v)
        out += struct.pack("<Q", v[0] ^ v[1] ^ v[2] ^ v[3])
    return out


# Published by SipHash's authors (vectors.h of github.com/veorq/SipHash): the key is the bytes 0 to 15, the message
# the bytes 0 to length - 1.
SIPHASH_64 = {
    0: "310e0edd47db6f72",
    1: "fd67dc93c539f874",
    2: "5a4fa9d909806c0d",
    7: "37d1018bf50002ab",
    8: "6224939a79f5f593",
    15: "e545be4961ca29a1",
}
SIPHASH_128 = {
    0: "a3817f04ba25a8e66df67214c7550293",
    1: "da87c1d86b99af44347659119b22fc45",
    2: "8177228da4a45dc7fca38bdef60affe4",
}


def check_siphash():
    key = bytes(range(16))
    for size, vectors in (8, SIPHASH_64), (16, SIPHASH_128):
        for length, expected in vectors.items():
            actual = siphash(key, bytes(range(length)), size).hex()
            if actual != expected:
                raise AssertionError(f"SipHash-2-4-{size * 8} of {length} bytes: {actual}, not {expected}")
    if siphash(key, bytes(range(15)), 8) != struct.pack("<Q", 0xA129CA6149BE45E5):
        raise AssertionError("the paper's own example")


# From a key to its locks.


def flatten(key):
    """The namespaces from the outermost in, and what they contain."""
    namespaces = []
    while "namespace" in key:
        namespaces.append(key["namespace"].encode("utf-8"))
        key = key["key"]
    return namespaces, key


def refuse_what_is_no_key(namespaces, leaf):
    if b"" in namespaces:
        raise InvalidKey("empty namespace")
    if leaf.get("bytes") == "":
        raise InvalidKey("empty")
    if "sqlalchemy_dlock" in leaf:
        raise InvalidKey("a preset where there is none")


def hash_key_and_message(namespaces, leaf):
    if not namespaces and "bytes" in leaf:
        return TEXT, bytes.fromhex(leaf["bytes"])
    message = b""
    for namespace in namespaces:
        message += b"n" + struct.pack("<I", len(namespace)) + namespace
    if "bytes" in leaf:
        message += b"b" + bytes.fromhex(leaf["bytes"])
    elif "i64" in leaf:
        message += b"i" + struct.pack("<q", int(leaf["i64"]))
    else:
        message += b"p" + struct.pack("<ii", *leaf["pair"])
    return STRUCTURED, message


def postgres(key):
    """The argument of pg_advisory_lock, as key-vectors.json has it."""
    namespaces, leaf = flatten(key)
    if not namespaces and "sqlalchemy_dlock" in leaf:
        return {"bigint": str(sqlalchemy_dlock_postgres(leaf["sqlalchemy_dlock"]))}
    refuse_what_is_no_key(namespaces, leaf)
    if not namespaces and "i64" in leaf:
        return {"bigint": leaf["i64"]}
    if not namespaces and "pair" in leaf:
        return {"pair": leaf["pair"]}
    digest = siphash(*hash_key_and_message(namespaces, leaf), 8)
    return {"bigint": str(int.from_bytes(digest, "little", signed=True))}


def mysql(key):
    """The argument of GET_LOCK, as key-vectors.json has it."""
    namespaces, leaf = flatten(key)
    if not namespaces and "sqlalchemy_dlock" in leaf:
        return {"name": sqlalchemy_dlock_mysql(leaf["sqlalchemy_dlock"])}
    refuse_what_is_no_key(namespaces, leaf)
    if "bytes" in leaf:
        sources = [bytes.fromhex(leaf["bytes"])]
    elif "i64" in leaf:
        sources = [leaf["i64"].encode()]
    else:
        sources = [str(half).encode() for half in leaf["pair"]]
    if not namespaces and "bytes" in leaf:
        if re.fullmatch(rb"(?!dlock:)[ -@\[-~]{1,64}", sources[0]):
            return {"name": sources[0].decode("ascii")}
    readable = b"/".join(namespaces + sources).lower()  # of bytes: ASCII alone
    readable = re.sub(rb"[^a-z0-9._/-]", b"_", readable)[:25].decode("ascii")
    digest = siphash(*hash_key_and_message(namespaces, leaf), 16).hex()
    return {"name": f"dlock:{readable}:{digest}"}


def sqlite(key):
    """The number that is locked for SQLite, as key-vectors.json has it."""
    namespaces, leaf = flatten(key)
    refuse_what_is_no_key(namespaces, leaf)
    if not namespaces and "i64" in leaf and 0 <= int(leaf["i64"]) < 1 << 60:
        return {"number": leaf["i64"]}
    digest = siphash(*hash_key_and_message(namespaces, leaf), 8)
    hashed = int.from_bytes(digest, "little") % (1 << 60)
    return {"number": str((1 << 60) + hashed)}


# The preset: sqlalchemy-dlock 0.8.1 (its lock/postgresql.py and lock/mysql.py) on a little-endian machine.


def python_value(key):
    if "i64" in key:
        return int(key["i64"])
    if "bytes" in key:
        return bytes.fromhex(key["bytes"])
    raise InvalidKey("sqlalchemy-dlock has integers, text and bytes alone")


def sqlalchemy_dlock_postgres(key):
    value = python_value(key)
    if isinstance(value, int):
        return value
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little", signed=True)


def sqlalchemy_dlock_mysql(key):
    value = python_value(key)
    try:
        name = value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise InvalidKey("not UTF-8") from None
    if not 1 <= len(name) <= 64:
        raise InvalidKey("empty, or over 64 characters")
    if "\0" in name:
        raise InvalidKey("the servers cut names at NUL")
    if any(character > "\uffff" for character in name):
        raise InvalidKey("MySQL refuses characters outside the BMP")
    return name


def or_error(function, key):
    try:
        return function(key)
    except InvalidKey:
        return {"error": True}


def main():
    check_siphash()
    rows = json.loads(pathlib.Path(__file__).with_name("key-vectors.json").read_text(encoding="utf-8"))
    differences = 0
    for row in rows:
        for server, function in ("postgres", postgres), ("mysql", mysql), ("sqlite", sqlite):
            actual = or_error(function, row["key"])
            if actual != row[server]:
                differences += 1
                print(f"{row['note']}: on {server} {actual}, not {row[server]}", file=sys.stderr)
        if "text" in row and row["text"].encode("utf-8").hex() != row["key"].get("bytes"):
            differences += 1
            print(f"{row['note']}: its text is not its bytes", file=sys.stderr)
    if differences or not rows:
        sys.exit(f"{differences} differences in {len(rows)} rows")
    print(f"{len(rows)} rows agree")


if __name__ == "__main__":
    main()
