//! What one operation writes into the history.

use std::sync::atomic::{AtomicU64, Ordering};

use dlock_diesel::Error;

use crate::proof::clock::now;
use crate::proof::history::Writer;
use crate::proof::worker::task::Task;
use crate::with_causes;

#[derive(Debug, Clone)]
pub(crate) struct Log {
    pub(crate) writer: Writer,
    pub(crate) actor: String,
    pub(crate) number: u64,
}

impl Log {
    pub(crate) fn ask(&self, task: &Task, session: Option<(i64, u64)>) {
        let number = self.number;
        let (keys, mode, form) = (task.names.join(","), task.mode(), task.form());
        match session {
            Some((session, opened)) => self.write(format_args!(
                "ask op={number} keys={keys} mode={mode} form={form} session={session} opened={opened}"
            )),
            None => self.write(format_args!("ask op={number} keys={keys} mode={mode} form={form}")),
        }
    }

    /// The lock is held, until what this returns is dropped.
    #[must_use]
    pub(crate) fn entered(&self, slot: Option<u32>) -> Inside {
        let number = self.number;
        match slot {
            Some(slot) => self.write(format_args!("in op={number} slot={slot}")),
            None => self.write(format_args!("in op={number}")),
        }
        Inside { log: self.clone() }
    }

    /// A managed lock was not lost just after `looked`.
    #[must_use]
    pub(crate) fn entered_at(&self, looked: u64, slot: Option<u32>) -> Looking {
        let (writer, number) = (&self.writer, self.number);
        match slot {
            Some(slot) => writer.write_at(
                looked,
                &self.actor,
                format_args!("in op={number} slot={slot}"),
            ),
            None => writer.write_at(looked, &self.actor, format_args!("in op={number}")),
        }
        Looking {
            log: self.clone(),
            last: looked.into(),
            written: looked.into(),
        }
    }

    pub(crate) fn token(&self, token: i64) {
        self.write(format_args!("token op={} value={token}", self.number));
    }

    pub(crate) fn wrote(&self, key: &str, from: u64, token: i64, changed: usize) {
        self.write(format_args!(
            "wrote op={} key={key} from={from} token={token} changed={changed}",
            self.number
        ));
    }

    pub(crate) fn adding(&self, key: &str, value: i64) {
        self.write(format_args!(
            "adding op={} key={key} value={value}",
            self.number
        ));
    }

    pub(crate) fn added(&self, key: &str, value: i64) {
        self.write(format_args!(
            "added op={} key={key} value={value}",
            self.number
        ));
    }

    /// The future was dropped after so many polls.
    pub(crate) fn dropped(&self, polls: u64) {
        self.write(format_args!(
            "end op={} result=dropped polls={polls}",
            self.number
        ));
    }

    pub(crate) fn ended(&self, result: &Result<&'static str, Error>) {
        let number = self.number;
        match result {
            Ok(result) => self.write(format_args!("end op={number} result={result}")),
            Err(error) => self.write(format_args!(
                "end op={number} result={} text={}",
                kind(error),
                with_causes(error).replace('\n', " ")
            )),
        }
    }

    fn write(&self, event: std::fmt::Arguments<'_>) {
        self.writer.write(&self.actor, event);
    }
}

/// Declared after the guard, so that it is dropped before the lock is given up: at an error, a panic, or in a future that
/// is dropped.
pub(crate) struct Inside {
    log: Log,
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.log.write(format_args!("out op={}", self.log.number));
    }
}

/// The same of a managed lock, which is held until the last look that found it not lost.
pub(crate) struct Looking {
    log: Log,
    last: AtomicU64,
    written: AtomicU64,
}

impl Looking {
    /// It was not lost just after this moment.
    pub(crate) fn look(&self, looked: u64) {
        self.last.store(looked, Ordering::Relaxed);
        if looked - self.written.load(Ordering::Relaxed) > 20_000_000 {
            self.written.store(looked, Ordering::Relaxed);
            self.log.writer.write_at(
                looked,
                &self.log.actor,
                format_args!("look op={}", self.log.number),
            );
        }
    }
}

impl Drop for Looking {
    fn drop(&mut self) {
        let last = self.last.load(Ordering::Relaxed);
        self.log.writer.write_at(
            last,
            &self.log.actor,
            format_args!("out op={}", self.log.number),
        );
    }
}

/// The moment at which something was found not to be lost, or `None`.
pub(crate) fn look(is_lost: impl FnOnce() -> bool) -> Option<u64> {
    let looked = now();
    (!is_lost()).then_some(looked)
}

fn kind(error: &Error) -> &'static str {
    match error {
        Error::Timeout { .. } => "Timeout",
        Error::Deadlock { .. } => "Deadlock",
        Error::Interrupted { .. } => "Interrupted",
        Error::NotHeld { .. } => "NotHeld",
        Error::InTransaction { .. } => "InTransaction",
        Error::TransactionLeftOpen { .. } => "TransactionLeftOpen",
        Error::NotInTransaction { .. } => "NotInTransaction",
        Error::TooManyLocks { .. } => "TooManyLocks",
        Error::InvalidKey(_) => "InvalidKey",
        Error::Unsupported { .. } => "Unsupported",
        Error::Lost { .. } => "Lost",
        Error::NotConnected { .. } => "NotConnected",
        Error::ManagerClosed { .. } => "ManagerClosed",
        Error::Database(_) => "Database",
        _ => "unknown",
    }
}
