//! What the keys of other libraries have in common.

use super::mapping::EMPTY;
use super::{Leaf, LockKey};

/// `key` without its namespaces, or what is wrong with them.
pub(super) fn leaf(key: &LockKey) -> Result<&Leaf, &'static str> {
    if key.namespaces.is_empty() {
        Ok(&key.leaf)
    } else {
        Err(
            "has a namespace, which that library does not have: put it into the text, in every program",
        )
    }
}

/// `leaf` as text, or what is wrong with it.
pub(super) fn text(leaf: &Leaf) -> Result<&str, &'static str> {
    let text = match leaf {
        Leaf::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
        Leaf::Integer(_) | Leaf::Pair(..) | Leaf::Preset(..) | Leaf::Semaphore(..) => None,
    };
    text.ok_or(refusal(leaf))
}

/// What is wrong with `leaf` where the library has no such value.
pub(super) fn refusal(leaf: &Leaf) -> &'static str {
    match leaf {
        Leaf::Bytes(_) => {
            "is not UTF-8, which that library requires here: use text, in every program"
        }
        Leaf::Integer(_) => {
            "is a number, which that library does not have here: use text, in every program"
        }
        Leaf::Pair(..) => {
            "is a pair, which that library does not have here: use text, in every program"
        }
        Leaf::Preset(..) => "is a preset inside a preset: apply one preset only",
        Leaf::Semaphore(..) => "is a lock of a semaphore inside a preset: apply no preset",
    }
}

/// `name` if both MySQL and MariaDB accept it unchanged as a lock name, or what is wrong with it.
pub(super) fn lock_name(name: &str) -> Result<String, &'static str> {
    if name.is_empty() {
        Err(EMPTY)
    } else if name.chars().count() > 64 {
        Err("is longer than 64 characters, the limit of MySQL: shorten it, in every program")
    } else if name.contains('\0') {
        Err("contains NUL, at which MySQL and MariaDB cut lock names: remove it, in every program")
    } else if name.chars().any(|character| character > '\u{ffff}') {
        Err("contains a character beyond U+FFFF, which MySQL refuses: remove it, in every program")
    } else {
        Ok(name.to_owned())
    }
}
