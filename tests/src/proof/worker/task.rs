//! What an operation is: drawn at random, before it begins.

use std::time::Duration;

use dlock_diesel::LockKey;

use crate::Kind;
use crate::proof::random::Random;
use crate::proof::worker::Common;
use crate::proof::world::{ACCOUNTS, KEYS, SEMAPHORE, lock_key};

/// What bodies panic with.
pub(crate) const PANIC: &str = "a body of the proof";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// A lock's guard, with a fencing token.
    Guard,
    Run,
    Transaction,
    /// Two locks' guard.
    Several,
    /// Two locks' transaction: a transfer.
    Transfer,
    Semaphore,
    SemaphoreTransaction,
    Managed,
    ManagedRun,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Wait {
    Forever,
    Limit(Duration),
    Try,
}

#[derive(Debug, Clone)]
pub(crate) struct Task {
    pub(crate) form: Form,
    pub(crate) names: Vec<&'static str>,
    pub(crate) keys: Vec<LockKey>,
    pub(crate) shared: bool,
    pub(crate) wait: Wait,
    /// In the body.
    pub(crate) pause: Duration,
    pub(crate) draws: bool,
    pub(crate) panics: bool,
    /// The guard is dropped, not released.
    pub(crate) drops: bool,
    /// Async: a wait is cancelled when its future is dropped.
    pub(crate) cancels: bool,
    /// Async: the future is dropped when it has been polled so often.
    pub(crate) polls: Option<u64>,
    pub(crate) amount: i64,
    /// The manager's lease is so short that a process that is stopped loses it.
    leased: bool,
}

impl Task {
    pub(crate) fn draw(common: &Common, random: &mut Random) -> Self {
        let options = &common.options;
        let form = match random.below(if options.leases { 40 } else { 20 }) {
            0..6 => Form::Guard,
            6..8 => Form::Run,
            8..10 => Form::Transaction,
            10 => Form::Several,
            11..14 => Form::Transfer,
            14..16 => Form::Semaphore,
            16 => Form::SemaphoreTransaction,
            17..19 => Form::Managed,
            19 => Form::ManagedRun,
            20..35 => Form::Managed,
            _ => Form::ManagedRun,
        };
        let names = match form {
            Form::Several | Form::Transfer => {
                let first = random.below(4);
                let second = (first + 1 + random.below(3)) % 4;
                vec![ACCOUNTS[first as usize], ACCOUNTS[second as usize]]
            }
            Form::Semaphore | Form::SemaphoreTransaction => vec![SEMAPHORE.0],
            _ => vec![*random.pick(&KEYS)],
        };
        let alone = matches!(form, Form::Guard | Form::Managed);
        let is_managed = matches!(form, Form::Managed | Form::ManagedRun);
        let long = is_managed && options.leases && random.percent(8);
        Self {
            keys: names
                .iter()
                .map(|name| LockKey::from(lock_key(&options.run, name)))
                .collect(),
            shared: alone && common.kind != Kind::Mysql && random.percent(25),
            wait: match random.below(10) {
                0..2 => Wait::Limit(random.micros(1, 60_000)),
                2 => Wait::Try,
                _ => Wait::Forever,
            },
            pause: match random.below(20) {
                _ if long => random.millis(100, 3000),
                0 => random.millis(5, 25),
                1..8 => random.micros(50, 3000),
                _ => Duration::ZERO,
            },
            draws: random.percent(40),
            panics: options.disturbed && random.percent(3),
            drops: random.percent(25),
            cancels: common.kind != Kind::Sqlite && random.percent(50),
            polls: (options.disturbed && options.asynchronous && random.percent(30))
                .then(|| random.below(16)),
            amount: random.below(9) as i64 - 4,
            leased: options.leases && is_managed,
            form,
            names,
        }
    }

    pub(crate) fn is_managed(&self) -> bool {
        matches!(self.form, Form::Managed | Form::ManagedRun)
    }

    /// As the history calls it.
    pub(crate) fn mode(&self) -> String {
        match self.form {
            Form::Semaphore | Form::SemaphoreTransaction => SEMAPHORE.1.to_string(),
            _ if self.shared => "shared".to_owned(),
            _ => "exclusive".to_owned(),
        }
    }

    /// As the history calls it.
    pub(crate) fn form(&self) -> String {
        let wait = match self.wait {
            Wait::Forever => "",
            Wait::Limit(_) => "+limit",
            Wait::Try => "+try",
        };
        let lease = if self.leased { "+lease" } else { "" };
        format!("{:?}{wait}{lease}", self.form)
    }
}
