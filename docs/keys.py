#!/usr/bin/env python3
"""The second implementation of dlock's lock keys.

It follows keys.md and shares nothing with the Rust code. It needs Python 3.10 or later and no packages. Copy from it to
take dlock's locks from Python.

    python3 keys.py         checks every row of key-vectors.json
    python3 keys.py KEY     prints what KEY locks on each server

KEY is JSON: "user/001", 42, [1, -2], {"namespace": "billing", "key": 42}, {"sqlx": "user/001"},
{"semaphore": "gpu", "slot": 0} (null for the gate), or an object as in key-vectors.json, which keys.md describes under "Test vectors". Anything else is text, so user/001 needs no quotes.
"""

import hashlib
import hmac
import json
import pathlib
import re
import struct
import sys
import zlib

TEXT = b"dlock text/bytes"
STRUCTURED = b"dlock structured"

MASK = 0xFFFF_FFFF_FFFF_FFFF


class InvalidKey(Exception):
    """The key cannot be a lock on this server."""


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
    """The namespaces, the outermost first, and the key inside them."""
    namespaces = []
    while "namespace" in key:
        namespaces.append(key["namespace"].encode("utf-8"))
        key = key["key"]
    return namespaces, key


def preset_of(key):
    """The preset that the key is, and the key inside it; otherwise None twice."""
    for name in PRESETS:
        if name in key:
            return name, key[name]
    return None, None


def check_key(namespaces, leaf):
    if b"" in namespaces:
        raise InvalidKey("it has an empty namespace")
    if leaf.get("bytes") == "":
        raise InvalidKey("it is empty")
    if preset_of(leaf)[0]:
        raise InvalidKey("it is a preset in a namespace")


def hash_key_and_message(namespaces, leaf):
    if not namespaces and "bytes" in leaf:
        return TEXT, bytes.fromhex(leaf["bytes"])
    return STRUCTURED, structured(namespaces, leaf)


def structured(namespaces, leaf):
    message = b""
    for namespace in namespaces:
        message += b"n" + struct.pack("<I", len(namespace)) + namespace
    if "bytes" in leaf:
        message += b"b" + bytes.fromhex(leaf["bytes"])
    elif "i64" in leaf:
        message += b"i" + struct.pack("<q", int(leaf["i64"]))
    else:
        message += b"p" + struct.pack("<ii", *leaf["pair"])
    return message


def semaphore_message(key):
    """What is hashed for the locks of a semaphore."""
    namespaces, leaf = flatten(key["semaphore"])
    check_key(namespaces, leaf)
    if preset_of(leaf)[0]:
        raise InvalidKey("the semaphore of a preset")
    return b"s" + structured(namespaces, leaf)


def semaphore_block(key):
    """The number of the gate, which is the first of 1024 neighbours."""
    digest = siphash(STRUCTURED, semaphore_message(key), 8)
    return int.from_bytes(digest, "little") // 1024 * 1024


def place(key):
    """0 for the gate, 1 for the first slot."""
    return 0 if key["slot"] is None else 1 + key["slot"]


def postgres(key):
    """The arguments of pg_advisory_lock, in the form of key-vectors.json."""
    if "semaphore" in key:
        return bigint((semaphore_block(key) + place(key)).to_bytes(8, "little"))
    namespaces, leaf = flatten(key)
    preset, inner = preset_of(leaf)
    if preset and not namespaces:
        return PRESETS[preset][0](inner)
    check_key(namespaces, leaf)
    if not namespaces and "i64" in leaf:
        return {"bigint": leaf["i64"]}
    if not namespaces and "pair" in leaf:
        return {"pair": leaf["pair"]}
    return bigint(siphash(*hash_key_and_message(namespaces, leaf), 8))


def mysql(key):
    """The argument of GET_LOCK, in the form of key-vectors.json."""
    if "semaphore" in key:
        namespaces, leaf = flatten(key["semaphore"])
        digest = siphash(STRUCTURED, semaphore_message(key), 16).hex()[:24]
        name = "gate" if key["slot"] is None else key["slot"]
        return {"name": f"dlock:{readable(namespaces, leaf)}:{digest}:{name}"}
    namespaces, leaf = flatten(key)
    preset, inner = preset_of(leaf)
    if preset and not namespaces:
        return PRESETS[preset][1](inner)
    check_key(namespaces, leaf)
    if not namespaces and "bytes" in leaf:
        if re.fullmatch(rb"(?!dlock:)[ -@\[-~]{1,64}", bytes.fromhex(leaf["bytes"])):
            return {"name": bytes.fromhex(leaf["bytes"]).decode("ascii")}
    digest = siphash(*hash_key_and_message(namespaces, leaf), 16).hex()
    return {"name": f"dlock:{readable(namespaces, leaf)}:{digest}"}


def readable(namespaces, leaf):
    """The part of a name that people read."""
    if "bytes" in leaf:
        sources = [bytes.fromhex(leaf["bytes"])]
    elif "i64" in leaf:
        sources = [leaf["i64"].encode()]
    else:
        sources = [str(half).encode() for half in leaf["pair"]]
    text = b"/".join(namespaces + sources).lower()  # of bytes, so it changes ASCII only
    return re.sub(rb"[^a-z0-9._/-]", b"_", text)[:25].decode("ascii")


def sqlite(key):
    """The number that dlock locks for SQLite, in the form of key-vectors.json."""
    if "semaphore" in key:
        return {"number": str((1 << 60) + semaphore_block(key) % (1 << 60) + place(key))}
    namespaces, leaf = flatten(key)
    if preset_of(leaf)[0]:
        raise InvalidKey("no preset has locks for SQLite")
    check_key(namespaces, leaf)
    if not namespaces and "i64" in leaf and 0 <= int(leaf["i64"]) < 1 << 60:
        return {"number": leaf["i64"]}
    digest = siphash(*hash_key_and_message(namespaces, leaf), 8)
    hashed = int.from_bytes(digest, "little") % (1 << 60)
    return {"number": str((1 << 60) + hashed)}


# The presets. Each gets the key that it contains.


def bigint(eight_bytes):
    return {"bigint": str(int.from_bytes(eight_bytes[:8], "little", signed=True))}


def data_of(key):
    if "bytes" not in key:
        raise InvalidKey("that library needs text here")
    return bytes.fromhex(key["bytes"])


def text_of(key):
    try:
        return data_of(key).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidKey("it is not UTF-8") from None


def lock_name(name):
    """The name, if MySQL and MariaDB accept it unchanged."""
    if not 1 <= len(name) <= 64:
        raise InvalidKey("a lock name has 1 to 64 characters")
    if "\0" in name:
        raise InvalidKey("MySQL and MariaDB cut lock names at NUL")
    if any(character > "\uffff" for character in name):
        raise InvalidKey("MySQL refuses characters beyond U+FFFF")
    return {"name": name}


def text_or_integer_name(key):
    return lock_name(key["i64"] if "i64" in key else text_of(key))


def no_lock(_key):
    raise InvalidKey("that library has no locks on this server")


def sqlalchemy_dlock(key):
    if "i64" in key:
        return {"bigint": key["i64"]}
    return bigint(hashlib.blake2b(data_of(key), digest_size=8).digest())


def sqlx(key):
    if "i64" in key:
        return {"bigint": key["i64"]}
    if "pair" in key:
        return key
    # HKDF-SHA256 (RFC 5869) without a salt. The first block of its output is enough.
    extracted = hmac.digest(bytes(32), text_of(key).encode(), "sha256")
    return bigint(hmac.digest(extracted, b"SQLx (Rust) Postgres advisory lock\x01", "sha256"))


def sqlx_migrator(key):
    if not text_of(key):
        raise InvalidKey("it is empty")
    return 0x3D32AD9E * zlib.crc32(text_of(key).encode())


def django_pglock(key):
    if key.get("i64", "0") != "0":
        return {"bigint": key["i64"]}
    if not text_of(key):
        raise InvalidKey("it is empty")
    return bigint(hashlib.sha256(text_of(key).encode()).digest())


def with_advisory_lock(key):
    number = int(key["i64"]) if "i64" in key else zlib.crc32(text_of(key).encode())
    return {"pair": [number & 0x7FFF_FFFF, 0]}


def distributed_lock_postgres(key):
    if "i64" in key:
        return {"bigint": key["i64"]}
    if "pair" in key:
        return key
    text = text_of(key)
    if len(text) <= 9 and text.isascii():
        bits = "".join(f"{ord(character):07b}" for character in text) + "0"
        return {"pair": list(struct.unpack(">ii", int(bits.ljust(64, "1"), 2).to_bytes(8, "big")))}
    if len(text) == 16:
        halves = text[:8], text[8:]
    elif len(text) == 17 and text[8] == ",":
        halves = text[:8], text[9:]
    else:
        halves = ("", "")
    halves = [half.rstrip("\0") for half in halves]  # .NET ignores NULs behind the digits
    if not all(re.fullmatch("[0-9A-Fa-f]+", half) for half in halves):
        return bigint(hashlib.sha1(text.encode()).digest())
    halves = [int(half, 16).to_bytes(4, "big") for half in halves]
    if len(text) == 17:
        return {"pair": [int.from_bytes(half, "big", signed=True) for half in halves]}
    return bigint(b"".join(halves)[::-1])


def distributed_lock_mysql(key):
    text = text_of(key)
    if any(letter.lower() != letter and not letter.isascii() for letter in text):
        raise InvalidKey("the lower case of letters beyond ASCII depends on the version of .NET")
    valid = text.lower() or "__empty__"
    if valid == text and len(text.encode("utf-16-le")) <= 2 * 64:
        return lock_name(text)
    bits = int.from_bytes(hashlib.sha512(text.encode()).digest()[:20], "little")
    digits = ["abcdefghijklmnopqrstuvwxyz234567"[bits >> 5 * place & 31] for place in range(32)]
    return lock_name(valid[:32] + "".join(digits))


def preset(postgres, mysql):
    """The two functions of a preset, which refuse what no library has."""

    def checked(function):
        def call(key):
            if "namespace" in key:
                raise InvalidKey("a preset contains no namespaced key")
            if preset_of(key)[0]:
                raise InvalidKey("a preset contains no preset")
            return function(key)

        return call

    return checked(postgres), checked(mysql)


PRESETS = {
    "distributed_lock": preset(distributed_lock_postgres, distributed_lock_mysql),
    "django_pglock": preset(django_pglock, no_lock),
    "mysql_name": preset(no_lock, lambda key: lock_name(text_of(key))),
    "sqlalchemy_dlock": preset(sqlalchemy_dlock, text_or_integer_name),
    "sqlx": preset(sqlx, no_lock),
    "sqlx_migrator": preset(
        lambda key: {"bigint": str(sqlx_migrator(key))},
        lambda key: {"name": f"{sqlx_migrator(key):x}"},
    ),
    "with_advisory_lock": preset(with_advisory_lock, text_or_integer_name),
}


# The command line.


def parse(argument):
    """The key that an argument stands for."""
    try:
        value = json.loads(argument)
    except ValueError:
        value = argument
    if isinstance(value, (bool, float, type(None))):
        value = argument
    try:
        return to_key(value)
    except ValueError as problem:
        sys.exit(f"{problem}: see python3 keys.py --help")


def to_key(value):
    """A JSON value as a key of key-vectors.json."""
    match value:
        case str():
            return {"bytes": value.encode("utf-8").hex()}
        case int() if -(1 << 63) <= value < 1 << 63:
            return {"i64": str(value)}
        case [first, second] | {"pair": [first, second]} if is_i32(first) and is_i32(second):
            return {"pair": [first, second]}
        case {"i64": str(number)}:
            return to_key(int(number))
        case {"bytes": str(digits)}:
            return {"bytes": bytes.fromhex(digits).hex()}
        case {"semaphore": inner, "slot": None | int() as slot} if slot is None or 0 <= slot < 1000:
            return {"semaphore": to_key(inner), "slot": slot}
        case {"namespace": str(namespace), "key": inner}:
            return {"namespace": namespace, "key": to_key(inner)}
        case dict() if len(value) == 1 and value.keys() <= PRESETS.keys():
            [(name, inner)] = value.items()
            return {name: to_key(inner)}
    raise ValueError(f"{json.dumps(value)} is not a key")


def is_i32(value):
    return type(value) is int and -(1 << 31) <= value < 1 << 31


def shown(key):
    """The key as Rust prints it."""
    if "semaphore" in key:
        lock = "gate" if key["slot"] is None else f"slot {key['slot']}"
        return f"{lock} of semaphore {shown(key['semaphore'])}"
    namespaces, leaf = flatten(key)
    name, inner = preset_of(leaf)
    if name:
        dashed = name if name == "with_advisory_lock" else name.replace("_", "-")
        text = f"{dashed} {shown(inner)}"
    elif "i64" in leaf:
        text = leaf["i64"]
    elif "pair" in leaf:
        text = "({}, {})".format(*leaf["pair"])
    else:
        data = bytes.fromhex(leaf["bytes"])
        try:
            text = json.dumps(data.decode("utf-8"), ensure_ascii=False)
        except UnicodeDecodeError:
            text = str(data)
    return "".join(json.dumps(part.decode("utf-8"), ensure_ascii=False) + "/" for part in namespaces) + text


def explain(key):
    """Prints what the key locks on each server."""
    print(f"key: {shown(key)}")
    for server, function in ("PostgreSQL", postgres), ("MySQL, MariaDB", mysql), ("SQLite", sqlite):
        try:
            [(kind, value)] = function(key).items()
            print(f"{server}: {kind} {tuple(value) if kind == 'pair' else value}")
        except InvalidKey as problem:
            print(f"{server}: no lock, because {problem}")


def or_error(function, key):
    try:
        return function(key)
    except InvalidKey:
        return {"error": True}


def check_vectors():
    check_siphash()
    rows = json.loads(pathlib.Path(__file__).with_name("key-vectors.json").read_text(encoding="utf-8"))
    differences = 0
    for row in rows:
        for server, function in ("postgres", postgres), ("mysql", mysql), ("sqlite", sqlite):
            actual = or_error(function, row["key"])
            if actual != row[server]:
                differences += 1
                print(f"{row['note']}: on {server} {actual}, not {row[server]}", file=sys.stderr)
        if to_key(row["key"]) != row["key"]:
            differences += 1
            print(f"{row['note']}: its key is read as {to_key(row['key'])}", file=sys.stderr)
        if "text" in row and row["text"].encode("utf-8").hex() != row["key"].get("bytes"):
            differences += 1
            print(f"{row['note']}: its text is not its bytes", file=sys.stderr)
    if differences or not rows:
        sys.exit(f"{differences} differences in {len(rows)} rows")
    print(f"{len(rows)} rows agree")


def main():
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        sys.exit(__doc__.strip())
    if len(sys.argv) == 2:
        explain(parse(sys.argv[1]))
    else:
        check_vectors()


if __name__ == "__main__":
    main()
