//! A process that takes locks, and writes down what it believes.

#[path = "worker"]
mod asynchronous {
    #[path = "asynchronous.rs"]
    mod flavor;
    #[allow(
        clippy::duplicate_mod,
        reason = "compiled for sync and for async connections"
    )]
    #[path = "operations.rs"]
    mod operations;
    pub(super) use flavor::run;
}
mod log;
mod server;
#[path = "worker"]
mod sync {
    #[path = "sync.rs"]
    mod flavor;
    #[allow(
        clippy::duplicate_mod,
        reason = "compiled for sync and for async connections"
    )]
    #[path = "operations.rs"]
    mod operations;
    pub(super) use flavor::run;
}
mod task;

use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use crate::Kind;
use crate::proof::history::Writer;
use task::Form;

/// What a worker is told.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// The server, or the file of SQLite.
    pub url: String,
    /// The run that it belongs to.
    pub run: String,
    /// Its name in the history: `w1.1`.
    pub name: String,
    /// Where it appends its history.
    pub history: PathBuf,
    /// What it does follows from this number.
    pub seed: u64,
    /// Tasks on a runtime, rather than threads.
    pub asynchronous: bool,
    /// How many threads or tasks.
    pub actors: u32,
    /// After how many operations it ends, if its standard input does not end before.
    pub operations: Option<i64>,
    /// Whether futures are dropped and bodies panic.
    pub disturbed: bool,
    /// Whether many of its locks are managed ones, held for long.
    pub leases: bool,
}

impl WorkerOptions {
    /// Nothing is broken, so that nothing needs to take long: no pauses, and more locks to choose from.
    pub(crate) fn is_calm(&self) -> bool {
        self.operations.is_some() && !self.disturbed
    }

    /// Of its manager. The short one passes in a process that is stopped, the long one not even on a slow machine.
    pub(crate) fn lease(&self) -> Duration {
        Duration::from_secs(if self.leases { 2 } else { 15 })
    }
}

/// What all actors of a process share.
pub(crate) struct Common {
    pub(crate) options: WorkerOptions,
    pub(crate) kind: Kind,
    pub(crate) writer: Writer,
    /// After how many polls the next future of a form is dropped.
    polls: Mutex<HashMap<Form, u64>>,
    left: AtomicI64,
    over: AtomicBool,
}

impl Common {
    /// Whether there is one more operation to do.
    pub(crate) fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed) && self.left.fetch_sub(1, Ordering::Relaxed) > 0
    }

    /// One more than the last time, so that each await is hit in turn.
    pub(crate) fn next_polls(&self, form: Form) -> u64 {
        let mut polls = self.polls.lock().expect("no panic");
        let next = polls.entry(form).or_default();
        *next += 1;
        *next - 1
    }

    /// The future was done before: the next one is dropped at its first await again.
    pub(crate) fn first_poll_again(&self, form: Form) {
        self.polls.lock().expect("no panic").remove(&form);
    }
}

/// Works until standard input ends, or all operations are done.
///
/// # Panics
///
/// If the history cannot be written.
pub fn work(options: WorkerOptions) {
    // Bodies panic on purpose.
    std::panic::set_hook(Box::new(|panic| {
        let text = panic.to_string();
        if !text.contains(task::PANIC) {
            eprintln!("{text}");
        }
    }));
    let kind = match options.url.split(':').next() {
        Some("postgres") => Kind::Postgres,
        Some("mysql") => Kind::Mysql,
        _ => Kind::Sqlite,
    };
    let common = Arc::new(Common {
        writer: Writer::open(&options.history).expect("the history can be opened"),
        left: options.operations.unwrap_or(i64::MAX).into(),
        over: false.into(),
        polls: Mutex::default(),
        kind,
        options,
    });
    thread::spawn({
        let common = Arc::clone(&common);
        move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            common.over.store(true, Ordering::Relaxed);
        }
    });
    match common.options.asynchronous {
        true => asynchronous::run(&common),
        false => sync::run(&common),
    }
}
