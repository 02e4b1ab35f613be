//! Several named locks as one.

mod release;
mod try_all;

use std::ops::Range;

pub(super) use release::ReleaseAll;
use try_all::TryAll;

use super::acquire::Acquire;
use super::sql::{self, List};
use crate::proto::{
    Abandoned, Ask, Depth, Failure, Hold, OpenTransaction, Several, Steps, Wait, in_order,
};
use crate::{LockKey, Mode};

/// Names of locks that are taken together, in the order in which everybody takes them: that of their bytes in lower
/// case, so that MySQL sees one order whatever the case. Names that differ in case only are two locks of MariaDB.
#[derive(Debug)]
pub(super) struct Names {
    names: Vec<String>,
    keys: Vec<LockKey>,
}

impl Names {
    pub(super) fn new(ask: &Ask) -> Result<Self, Failure> {
        let names = in_order(ask, LockKey::to_mysql, |name| (folded(name), name.clone()))?;
        let (names, keys) = names.into_iter().unzip();
        Ok(Self { names, keys })
    }

    /// The only one, if they are no more.
    pub(super) fn only(&mut self) -> Option<String> {
        match self.names.len() {
            1 => self.names.pop(),
            _ => None,
        }
    }

    /// Each with its key.
    pub(super) fn into_pairs(self) -> impl Iterator<Item = (String, LockKey)> {
        self.names.into_iter().zip(self.keys)
    }

    pub(super) fn name(&self, index: usize) -> &str {
        &self.names[index]
    }

    pub(super) fn key(&self, index: usize) -> &LockKey {
        &self.keys[index]
    }
}

/// A name in lower case, which two names share if they are one lock of MySQL. (To MariaDB they are two.)
///
/// MySQL lowers each character by itself, by tables of an older Unicode: to one character, which for `İ` is `i`. A
/// newer Unicode only adds pairs. MySQL 9.7 tells accents, final sigmas and trailing spaces apart.
pub(super) fn folded(name: &str) -> String {
    let lower = |letter: char| letter.to_lowercase().next();
    name.chars().filter_map(lower).collect()
}

/// Takes several named locks.
#[derive(Debug)]
pub(super) struct NamedLocks {
    names: Names,
    ask: Ask,
    depth: Depth,
}

impl NamedLocks {
    pub(super) fn several(names: Names, ask: &Ask, depth: Depth) -> Several<Self> {
        let steps = Self {
            names,
            ask: Ask {
                more: Vec::new(),
                ..ask.clone()
            },
            depth,
        };
        Several::new(steps, ask.wait)
    }

    pub(super) fn names(&self) -> &Names {
        &self.names
    }
}

impl Steps for NamedLocks {
    type Key = String;
    type Try = TryAll;
    type Wait = Acquire;
    type Back = ReleaseAll;

    fn names(&self) -> impl ExactSizeIterator<Item = &LockKey> {
        self.names.keys.iter()
    }

    fn try_all(&self, range: Range<usize>) -> Option<TryAll> {
        let names = &self.names.names[range];
        let list = List::new(names.iter());
        Some(TryAll::new(list, names.len(), self.ask.droppable))
    }

    fn wait(&self, index: usize, wait: Wait) -> Acquire {
        let ask = Ask {
            wait,
            ..self.ask.clone()
        };
        Acquire::new(self.names.names[index].clone(), &ask, self.depth)
    }

    fn hold(&self, index: usize, tried: &TryAll) -> Hold<String> {
        let name = self.names.names[index].clone();
        Hold {
            name: Some(Box::new(self.names.keys[index].clone())),
            ..Hold::new(name, Mode::Exclusive, self.depth, tried.droppable())
        }
    }

    fn give_back(&self, holds: Vec<Hold<String>>) -> ReleaseAll {
        ReleaseAll::new(holds)
    }

    fn abandoned(&self, mut at_work: Abandoned, held: &[Hold<String>]) -> Abandoned {
        // A wait that nobody cancels ends when the connection is closed. The server does not notice that while there is
        // a message to read.
        let ends_when_closed = at_work.cancel && at_work.messages.is_empty();
        if !ends_when_closed {
            let list = List::of(held.iter());
            let release = sql::release_all_unread(&list, OpenTransaction::None);
            at_work.messages.push(release.into());
        }
        Abandoned {
            broken: true,
            ..at_work
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_one_lock_of_mysql_are_folded_alike() {
        let same = ["User/user", "É/é", "Σ/σ", "Ж/ж", "\u{212a}/k", "İ/i"];
        for (one, other) in same.iter().filter_map(|pair| pair.split_once('/')) {
            assert_eq!(folded(one), folded(other));
        }
        for (one, other) in [("é", "e"), ("ς", "σ"), ("a ", "a"), ("日", "本")] {
            assert_ne!(folded(one), folded(other));
        }
    }

    #[test]
    fn everybody_takes_them_in_one_order_whatever_their_case() {
        let order = |names: &[&str]| {
            let keys = names.iter().map(LockKey::mysql_name);
            Names::new(&Ask::all(keys)).expect("they are names").names
        };
        assert_eq!(order(&["b", "User"]), ["b", "User"]);
        assert_eq!(order(&["user", "b"]), ["b", "user"]);
        // They are two locks of MariaDB.
        assert_eq!(order(&["user", "v", "User", "User"]), ["User", "user", "v"]);
    }
}
