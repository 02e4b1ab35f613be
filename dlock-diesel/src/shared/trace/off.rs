//! The same names, empty.

use dlock_core::proto::{Ask, Dialect};
use dlock_core::{Holder, LockKey};

use crate::Error;
use crate::manager::desk::Slot;

#[derive(Debug)]
pub struct Waiting;

impl Waiting {
    pub fn of<D: Dialect>(_: &Ask, _: Option<u32>) -> Self {
        Self
    }

    pub fn run<T>(self, f: impl FnOnce() -> T) -> T {
        f()
    }

    pub fn during<F: Future>(self, future: F) -> F {
        future
    }
}

#[derive(Debug)]
pub struct Releasing;

impl Releasing {
    pub fn of(_: &LockKey) -> Self {
        Self
    }

    pub fn run<T>(self, f: impl FnOnce() -> T) -> T {
        f()
    }

    pub fn drop(self, f: impl FnOnce()) {
        f();
    }

    pub fn drop_async<F: Future<Output = ()>>(self, future: F) -> F {
        future
    }

    pub fn during<F: Future>(self, future: F) -> F {
        future
    }
}

pub fn kept<T>(result: Result<T, Error>) -> Result<T, Error> {
    result
}

pub fn lost_error(error: Error) -> Error {
    error
}

pub fn is_held(result: Result<bool, Error>, _: &LockKey) -> Result<bool, Error> {
    result
}

pub fn on_loss(_: &Slot, _: &LockKey) {}

pub fn sees_waits() -> bool {
    false
}

pub fn asking(ask: Ask) -> Ask {
    ask
}

pub fn holders(_: &[Holder]) {}

pub fn session_ended() {}

pub fn marked_broken() {}

pub fn migrations_wait(_: &str) -> bool {
    false
}
